//! NAT onto host sockets: a guest's flows are carried on by unprivileged sockets of the host.
//!
//! # A packet's path
//! The gateway hands over every packet that none of its services claims. [`Nat::handle_packet`]
//! checks where it comes from and whether guests may go there, then gives it to [`tcp`], [`udp`] or
//! [`icmp`]. Host sockets answer through [`Nat::handle_ready`]; what the guests get leaves through the
//! [`Outbox`]. At the end of each batch [`Nat::flush`] moves TCP's bytes.
//!
//! # What guests may not reach
//! Loopback, "this network", link-local (cloud metadata lives there), multicast, reserved addresses
//! and the LAN itself are refused whatever the routing table says; so are the host's own addresses
//! unless the network is configured with host access. Refusals are answered with ICMP and counted
//! under [`DropReason::ForbiddenDestination`].
//!
//! # Seams
//! [`Uplink`] is all that the NAT knows of the host, so it runs in tests against a scripted one. The
//! types name IPv4 addresses; IPv6 comes in as a second address family of the same three protocols.

pub mod flow_table;
pub mod icmp;
pub mod mapping;
pub mod tcp;
#[doc(hidden)]
pub mod testing;
pub mod udp;

use std::net::{Ipv4Addr, SocketAddrV4};

use crate::gateway::{LanConfig, Outbox};
use crate::stats::DropReason;
use crate::wire::{Body, Ipv4, Packet, Tcp, Transport};

pub use crate::frame::{Duration, Instant};

/// A host socket of the NAT, as the [`Uplink`] numbers it. Never reused while its owner holds it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct SockId(pub u32);

/// Who owns a host socket: it comes back with every readiness event of that socket.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SockOwner {
    /// A TCP flow, by its slot and generation in the flow table.
    Tcp(FlowId),
    /// A UDP mapping.
    Udp(FlowId),
    /// An ICMP echo mapping.
    Ping(FlowId),
}

/// Slot and generation of an entry in a flow table: a stale id finds nothing.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct FlowId {
    /// Slot, below 2^24.
    pub slot: u32,
    /// Grows by one each time the slot is reused.
    pub generation: u32,
}

/// What epoll said of a host socket. TCP sockets are edge-triggered, the others level-triggered on
/// readability.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Ready {
    /// Data, EOF or an error can be read.
    pub readable: bool,
    /// Connected, or room to send.
    pub writable: bool,
    /// An error is pending (POLLERR): read it with a call on the socket.
    pub error: bool,
}

/// A host error that means something to a guest.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum HostError {
    /// ECONNREFUSED: answered with RST, or ICMP port unreachable.
    Refused,
    /// ECONNRESET, EPIPE: answered with RST.
    Reset,
    /// EHOSTUNREACH.
    HostUnreachable,
    /// ENETUNREACH, EADDRNOTAVAIL.
    NetUnreachable,
    /// EACCES, EPERM: a host firewall, or no right to this kind of socket.
    Prohibited,
    /// ETIMEDOUT.
    TimedOut,
    /// EMSGSIZE.
    TooBig,
    /// EMFILE, ENFILE, ENOMEM, ENOBUFS.
    Exhausted,
    /// Anything else; the errno.
    Other(i32),
}

/// Outcome of one transfer on a host socket.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Io {
    /// This many bytes.
    Done(usize),
    /// The peer sent FIN (TCP receive only).
    Eof,
    /// EAGAIN: wait for readiness.
    Blocked,
    /// The socket is broken.
    Failed(HostError),
}

/// A datagram as it came from outside.
#[derive(Clone, Copy, Debug)]
pub struct Datagram<'a> {
    /// Sender.
    pub source: SocketAddrV4,
    /// One datagram, or several of `segment` bytes each (the last may be shorter).
    pub payload: &'a [u8],
    /// Set if the kernel coalesced (UDP_GRO).
    pub segment: Option<u16>,
    /// IP TTL it arrived with; 0 = the kernel did not say.
    pub ttl: u8,
}

/// How a datagram leaves.
#[derive(Clone, Copy, Debug, Default)]
pub struct SendOptions {
    /// IP TTL; 0 = the socket's default.
    pub ttl: u8,
    /// Payload is a train of datagrams of this size (UDP_SEGMENT).
    pub segment: Option<u16>,
}

/// The host's sockets, as the NAT sees them. `uplink::HostUplink` is the real one; tests script
/// their own. No call blocks.
pub trait Uplink {
    /// Opens a TCP socket and starts to connect. `Ready::writable` or `Ready::error` tells the end;
    /// then [`Uplink::tcp_connected`] gives the result.
    ///
    /// # Errors
    /// The connection failed at once; there is no socket.
    fn tcp_connect(&mut self, to: SocketAddrV4, owner: SockOwner) -> Result<SockId, HostError>;

    /// The result of a connect (SO_ERROR). `Err(HostError::Other(0))` never occurs; a connect still
    /// under way gives `Ok(false)`.
    ///
    /// # Errors
    /// Why the connection failed.
    fn tcp_connected(&mut self, socket: SockId) -> Result<bool, HostError>;

    /// Receives into `buffer`.
    fn tcp_recv(&mut self, socket: SockId, buffer: &mut [u8]) -> Io;

    /// Sends from `bytes`.
    fn tcp_send(&mut self, socket: SockId, bytes: &[u8]) -> Io;

    /// Sends FIN (SHUT_WR).
    fn tcp_shutdown(&mut self, socket: SockId);

    /// Makes [`Uplink::close`] send RST instead of FIN (SO_LINGER 0).
    fn tcp_abort_on_close(&mut self, socket: SockId);

    /// Opens a UDP socket, on `port` if that is free, else on any.
    ///
    /// # Errors
    /// No socket.
    fn udp_open(&mut self, port: u16, owner: SockOwner) -> Result<SockId, HostError>;

    /// Opens an ICMP datagram ("ping") socket. The kernel puts its own identifier into requests and
    /// gives back replies to it alone.
    ///
    /// # Errors
    /// [`HostError::Prohibited`] where net.ipv4.ping_group_range excludes us.
    fn ping_open(&mut self, owner: SockOwner) -> Result<SockId, HostError>;

    /// Sends a datagram: a UDP payload, or a whole ICMP echo message on a ping socket.
    fn send_to(
        &mut self,
        socket: SockId,
        to: SocketAddrV4,
        payload: &[u8],
        options: SendOptions,
    ) -> Io;

    /// Receives all that waits, at most one batch, and hands each datagram to `sink`. Returns whether
    /// more may be waiting.
    fn recv_from(&mut self, socket: SockId, sink: &mut dyn FnMut(Datagram<'_>)) -> bool;

    /// Closes the socket.
    fn close(&mut self, socket: SockId);

    /// Whether the host itself answers on this address (any of its interfaces).
    fn is_host_address(&mut self, address: Ipv4Addr) -> bool;

    /// 64 random bits from the system's generator.
    fn random(&mut self) -> u64;
}

/// What a [`Nat`] is made with.
#[derive(Clone, Debug)]
pub struct NatConfig {
    /// The LAN.
    pub lan: LanConfig,
    /// TCP flows at most. UDP and ICMP mappings have limits of their own.
    pub flows_max: usize,
    /// Guests may connect to the host's own, non-loopback addresses.
    pub host_access: bool,
}

/// The port of DNS, which the gateway passes on over TCP.
const DNS_PORT: u16 = 53;

/// NAT of one worker: the flows of the guests behind its ports.
pub struct Nat {
    lan: LanConfig,
    host_access: bool,
    dns: Option<SocketAddrV4>,
    tcp: tcp::TcpNat,
    udp: udp::UdpNat,
    icmp: icmp::PingNat,
    errors: icmp::ErrorSender,
}

impl Nat {
    /// No flows yet.
    pub fn new(config: NatConfig, now: Instant) -> Self {
        let NatConfig {
            lan,
            flows_max,
            host_access,
        } = config;
        Self {
            tcp: tcp::TcpNat::new(lan.clone(), flows_max, now),
            udp: udp::UdpNat::new(lan.clone(), udp::LIMITS, host_access),
            icmp: icmp::PingNat::new(lan.clone(), icmp::LIMITS, host_access),
            errors: icmp::ErrorSender::new(),
            lan,
            host_access,
            dns: None,
        }
    }

    /// Where TCP connections to the gateway's port 53 go.
    pub fn set_dns_upstream(&mut self, dns: Option<SocketAddrV4>) {
        self.dns = dns;
    }

    /// Takes a guest's packet that no service claimed.
    ///
    /// # Errors
    /// The reason to count it as dropped for.
    pub fn handle_packet<U: Uplink + ?Sized, O: Outbox + ?Sized>(
        &mut self,
        packet: &Packet<'_>,
        now: Instant,
        (up, out): (&mut U, &mut O),
    ) -> Result<(), DropReason> {
        let Body::Ipv4(ip) = &packet.body else {
            return Err(DropReason::Unclaimed);
        };
        if packet.destination.is_group() {
            return Err(DropReason::Unclaimed);
        }
        if !self.lan.contains(ip.source) || ip.source == self.lan.address {
            return Err(DropReason::ForeignSource);
        }
        if ip.destination == self.lan.address {
            return self.handle_for_gateway(packet, ip, now, (up, out));
        }
        if let Transport::Fragment = ip.transport {
            return Err(DropReason::Fragment);
        }
        if ip.ttl <= 1 {
            self.errors
                .send(&self.lan, icmp::ErrorKind::TimeExceeded, packet, now, out);
            return Err(DropReason::TtlExceeded);
        }
        let forbidden = is_never_outside(ip.destination)
            || self.lan.contains(ip.destination)
            || (!self.host_access && opens_tcp(ip) && up.is_host_address(ip.destination));
        if forbidden {
            self.errors
                .send(&self.lan, icmp::ErrorKind::Prohibited, packet, now, out);
            return Err(DropReason::ForbiddenDestination);
        }
        match &ip.transport {
            Transport::Tcp(tcp) => {
                let to = SocketAddrV4::new(ip.destination, tcp.destination_port);
                self.tcp
                    .handle_packet(packet, (ip, tcp), to, now, (up, out))
            }
            Transport::Udp(udp) => {
                let answers = (out, &mut self.errors);
                self.udp.handle_packet(packet, ip, udp, now, up, answers)
            }
            Transport::Icmp(message) => {
                let answers = (out, &mut self.errors);
                self.icmp
                    .handle_packet(packet, ip, message, now, up, answers)
            }
            Transport::Fragment => Err(DropReason::Fragment),
            Transport::Other(_) => {
                self.errors.send(
                    &self.lan,
                    icmp::ErrorKind::ProtocolUnreachable,
                    packet,
                    now,
                    out,
                );
                Err(DropReason::Protocol)
            }
        }
    }

    /// For the gateway's own address: DNS over TCP, else a closed port.
    fn handle_for_gateway<U: Uplink + ?Sized, O: Outbox + ?Sized>(
        &mut self,
        packet: &Packet<'_>,
        ip: &Ipv4<'_>,
        now: Instant,
        (up, out): (&mut U, &mut O),
    ) -> Result<(), DropReason> {
        match (&ip.transport, self.dns) {
            (Transport::Tcp(tcp), Some(dns)) if tcp.destination_port == DNS_PORT => self
                .tcp
                .handle_packet(packet, (ip, tcp), dns, now, (up, out)),
            (Transport::Tcp(tcp), _) => {
                self.tcp.refuse(packet, ip, tcp, now, out);
                Err(DropReason::Unclaimed)
            }
            (Transport::Udp(_), _) => {
                self.errors.send(
                    &self.lan,
                    icmp::ErrorKind::PortUnreachable,
                    packet,
                    now,
                    out,
                );
                Err(DropReason::Unclaimed)
            }
            (Transport::Fragment, _) => Err(DropReason::Fragment),
            (Transport::Icmp(_) | Transport::Other(_), _) => Err(DropReason::Unclaimed),
        }
    }

    /// Takes a readiness event of a host socket. Datagrams from outside that no guest asked for are
    /// counted through `drops`.
    pub fn handle_ready<U: Uplink + ?Sized, O: Outbox + ?Sized>(
        &mut self,
        owner: SockOwner,
        ready: Ready,
        now: Instant,
        (up, out): (&mut U, &mut O),
        drops: &mut dyn FnMut(DropReason),
    ) {
        match owner {
            SockOwner::Tcp(id) => self.tcp.handle_ready(id, ready, now, (up, out)),
            SockOwner::Udp(id) => self.udp.handle_ready(id, now, up, out, drops),
            SockOwner::Ping(id) => self.icmp.handle_ready(id, now, up, out, drops),
        }
    }

    /// Ends a batch: moves TCP's bytes and sends its ACKs.
    pub fn flush<U: Uplink + ?Sized, O: Outbox + ?Sized>(
        &mut self,
        now: Instant,
        up: &mut U,
        out: &mut O,
    ) {
        self.tcp.flush(now, up, out);
    }

    /// Whether [`Nat::flush`] wants to be called again without waiting.
    pub fn has_backlog(&self) -> bool {
        self.tcp.has_backlog()
    }

    /// When [`Nat::handle_timeout`] next has something to do.
    pub fn poll_timeout(&self) -> Option<Instant> {
        [
            self.tcp.poll_timeout(),
            self.udp.poll_timeout(),
            self.icmp.poll_timeout(),
        ]
        .into_iter()
        .flatten()
        .min()
    }

    /// Runs the timers that are due.
    pub fn handle_timeout<U: Uplink + ?Sized, O: Outbox + ?Sized>(
        &mut self,
        now: Instant,
        up: &mut U,
        out: &mut O,
    ) {
        self.tcp.handle_timeout(now, up, out);
        self.udp.handle_timeout(now, up);
        self.icmp.handle_timeout(now, up);
    }

    /// Ends all flows of the guests behind a port that is gone.
    pub fn forget_port<U: Uplink + ?Sized>(&mut self, port: crate::frame::PortId, up: &mut U) {
        self.tcp.forget_port(port, up);
        self.udp.forget_port(port, up);
        self.icmp.forget_port(port, up);
    }

    /// Counters by the names that `lanlet status` shows.
    pub fn counters(&self) -> impl Iterator<Item = (&'static str, u64)> + '_ {
        let (errors, held_back) = self.errors.counters();
        let errors = [
            ("icmp_errors", errors),
            ("icmp_errors_held_back", held_back),
        ];
        let tcp = self.tcp.counters().iter();
        tcp.chain(self.udp.counters().iter())
            .chain(self.icmp.counters().iter())
            .chain(errors)
    }

    /// Flows now: TCP, UDP, ICMP.
    pub fn flows(&self) -> (usize, usize, usize) {
        (self.tcp.len(), self.udp.len(), self.icmp.len())
    }
}

/// Whether the packet may start a TCP flow. UDP and ICMP mappings ask for the host's addresses
/// themselves, once per peer.
fn opens_tcp(ip: &Ipv4<'_>) -> bool {
    matches!(&ip.transport, Transport::Tcp(tcp) if tcp.flags & Tcp::SYN != 0)
}

/// Addresses that no packet of a guest may leave for (RFC 6890): this network, loopback, link-local,
/// multicast, reserved and limited broadcast.
fn is_never_outside(address: Ipv4Addr) -> bool {
    matches!(address.octets(), [0 | 127 | 224..=255, ..] | [169, 254, ..])
}
