//! lanlet: a little LAN in one process.
//!
//! ```text
//!  qemu -netdev tap,fd=N     namespace guest    qemu, DPDK (vhost-user)
//!       |  virtio + vnet_hdr    |  tap netdev       |
//!   vm tap ~ switch tap         |                   | unix socket,
//!   (mirred wire, in a          |                   | shared memory,
//!   private user+net ns)        |                   | eventfds
//!       | tap fd                | tap fd            |
//!  =====+=======================+===================+====  ports (I/O edge)
//!                worker: epoll, batches, run to completion
//!         admit -> switch (learn, look up) -> fit -> send
//!                          |
//!                     gateway port  (the LAN's .1)
//!         ARP  NDP  DHCPv4  DNS  ICMP echo   then   NAT
//!                          |
//!       TCP: smoltcp per flow   UDP: socket per mapping   ICMP: ping sockets
//!                     host sockets
//! ```
//!
//! # A packet's walk
//! A [`worker`] reads a batch of frames from a [`port`]. Each frame's virtio-net header is parsed and
//! checked once ([`offload::admit`]); from there the frame is plain bytes plus [`offload::Offload`].
//! The [`switch`] learns the source, looks the destination up and answers with a verdict. On the way
//! out [`offload::fit`] passes the frame whole, completes its checksum or segments it, as the egress
//! port's capabilities demand. Frames for the gateway's MAC go to the [`gateway`]: its services claim
//! them in registry order, the [`nat`] takes the rest. What the gateway answers re-enters the switch
//! as ingress of [`frame::PortId::GATEWAY`], so learning, counters and guards see it like any other
//! traffic.
//!
//! # Several workers
//! Each port is read by one worker, or a queue of it by each of several, and that worker writes into
//! whatever port a frame is for. Shared are the MAC table, the leases, where guests are, and a few
//! numbers; gateway and NAT are each worker's own, for the ports that are at home with it
//! ([`nat::common`]).
//!
//! # Layers
//! A module imports only from its own layer and from those above it in this list
//! (`tests/layering.rs` checks it from the sources).
//!
//! | layer | modules |
//! |---|---|
//! | bytes | [`frame`], [`names`], [`offload`], [`wire`], [`stats`] |
//! | logic | [`switch`], [`gateway`], [`dhcp`], [`nat`] |
//! | I/O | [`sys`], [`tap`], [`port`], [`uplink`] |
//! | assembly | [`worker`], [`network`], [`control`], [`config`], [`cli`] |
//!
//! One exception: [`nat`] takes its TCP rings from [`sys::arena`], which is memory and not I/O.
//!
//! The logic layers name no fd, no socket, no thread and no clock: `now`, randomness and the host's
//! sockets are passed in, so that they run in tests under a virtual clock.
//!
//! # Invariants
//! 1. Frames in = frames out + drops by reason (a flood counts its copies).
//! 2. Nothing leaves by the port it came in on.
//! 3. Order holds per (ingress queue, egress port) pair.
//! 4. A group or gateway source MAC is never learned; 01-80-C2-00-00-0x is not forwarded.
//! 5. Tables, flows, leases and queues never pass their limit.
//! 6. Every frame that leaves without offload has right checksums.
//! 7. One address, one lease, across restarts.
//! 8. After all timeouts no flow and no host socket is left.
//! 9. Same seed, same trace.

pub mod cli;
pub mod config;
pub mod control;
pub mod dhcp;
pub mod frame;
pub mod gateway;
pub mod names;
pub mod nat;
pub mod network;
pub mod offload;
pub mod port;
pub mod stats;
pub mod switch;
pub mod sys;
pub mod tap;
pub mod uplink;
pub mod wire;
pub mod worker;
