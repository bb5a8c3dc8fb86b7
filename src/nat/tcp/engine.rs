//! The guest's end of a TCP flow: smoltcp, driven one socket at a time.
//!
//! One `SocketSet` with N sockets costs O(N) per packet; one set per flow costs 37-60 ns whatever N
//! (research/smoltcp.md A, B). Super-segments pass in both directions: smoltcp is told that the guest
//! takes [`Peer::segment_bytes`] at a time, and what it sends above the guest's real MSS leaves as
//! one GSO frame.
//!
//! # What smoltcp 0.14.0 must be kept from
//! Its acceptance window can be wider than its receive ring (until the first ACK after the
//! handshake), and its right window edge may move left by rounding. A guest could make it panic with
//! two packets, and an honest sender could lose the end of a stream without an error. So nothing is
//! fed beyond the newest edge that was advertised: data beyond it is cut off together with the FIN.
//! A panic that slips through ends the flow, not the LAN: [`TcpEngine`] calls are made under
//! `catch_unwind` by the flow that owns the engine.

use std::net::Ipv4Addr;

use smoltcp::iface::{Config, Interface, PollIngressSingleResult, PollResult, SocketSet};
use smoltcp::phy::{self, ChecksumCapabilities, DeviceCapabilities, Medium};
use smoltcp::socket::tcp;
use smoltcp::wire::HardwareAddress;

use crate::frame::{ETH_HEADER_LEN, Instant, Mac};
use crate::gateway::Outbox;
use crate::offload::{Csum, Gso, Offload};
use crate::sys::arena::TcpSocket;
use crate::wire::{self, ETHERTYPE_IPV4, IPV4_HEADER_LEN, Ipv4, PROTO_TCP, Tcp, be16, checksum};

/// MTU that smoltcp believes in: its segments are super-frames.
const ENGINE_MTU: usize = 65_535;
/// Largest payload of one IPv4 TCP packet without options.
const PAYLOAD_MAX: u16 = 65_495;
/// TCP header without options.
const TCP_HEADER_LEN: usize = 20;
/// Segments that one super-frame may become: the kernel's own GSO_MAX_SEGS is 65,535, but a guest
/// without TSO gets each as an entry of its 16,384-entry queue.
const SUPER_FRAME_SEGMENTS_MAX: u16 = 64;
/// Smallest MSS believed (Linux: net.ipv4.tcp_min_snd_mss); below, a guest could have one super-frame
/// cut into tens of thousands of packets.
pub const MSS_MIN: u16 = 48;
/// MSS of a SYN without the option (RFC 9293 3.7.1, MUST-15).
const MSS_DEFAULT: u16 = 536;

/// The guest of a flow, as frames to it need it.
#[derive(Clone, Copy, Debug)]
pub struct Peer {
    /// Source of frames to the guest.
    pub gateway: Mac,
    /// Where the guest's last segment came from.
    pub guest: Mac,
    /// Payload bytes of one packet to the guest.
    pub mss: u16,
    /// MSS shown to the guest in the SYN-ACK.
    pub our_mss: u16,
}

impl Peer {
    /// The peer that sent `syn`, on a LAN of this MTU.
    pub fn from_syn(gateway: Mac, guest: Mac, syn: &Tcp<'_>, mtu: u16) -> Self {
        let our_mss = mtu - (IPV4_HEADER_LEN + TCP_HEADER_LEN) as u16;
        let mss = syn_mss(syn.header).unwrap_or(MSS_DEFAULT).clamp(MSS_MIN, our_mss.max(MSS_MIN));
        Self { gateway, guest, mss, our_mss }
    }

    /// Payload of the largest super-frame: whole segments, so that none leaves a short tail.
    pub fn segment_bytes(&self) -> u16 {
        (PAYLOAD_MAX / self.mss).min(SUPER_FRAME_SEGMENTS_MAX) * self.mss
    }
}

/// Where the guest's end of a flow stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Phase {
    /// SYN-ACK sent, ACK awaited.
    Handshake,
    /// Data may flow; FINs may have gone either way.
    Open,
    /// Nothing more will happen: reset, or both FINs acknowledged.
    Closed,
}

/// The guest's end of one TCP flow. Small, so that an engine without buffers of its own can replace
/// smoltcp if measurements ask for it.
pub trait TcpEngine {
    /// Takes a segment of the guest; may answer through `out` at once.
    fn handle_segment<O: Outbox + ?Sized>(&mut self, ip: &Ipv4<'_>, tcp: &Tcp<'_>, now: Instant, peer: &Peer, out: &mut O);

    /// Sends what is due: data, ACKs, window updates, retransmissions.
    fn poll_egress<O: Outbox + ?Sized>(&mut self, now: Instant, peer: &Peer, out: &mut O);

    /// When [`TcpEngine::poll_egress`] next has something to do by itself.
    fn poll_timeout(&mut self, now: Instant) -> Option<Instant>;

    /// State.
    fn phase(&self) -> Phase;

    /// Whether the guest's FIN has arrived and all data before it was taken.
    fn guest_finished(&self) -> bool;

    /// Bytes from the guest that wait to be taken.
    fn received(&self) -> usize;

    /// Shows waiting bytes to `take`, which returns how many it took.
    fn recv(&mut self, take: impl FnOnce(&mut [u8]) -> usize);

    /// Bytes that are queued for the guest or not yet acknowledged by it.
    fn unacknowledged(&self) -> usize;

    /// Room for data to the guest; 0 before the handshake ends and after [`TcpEngine::close`].
    fn room(&self) -> usize;

    /// Shows contiguous room of at most `limit` bytes to `fill`, which returns how many it wrote.
    fn send(&mut self, limit: usize, fill: impl FnOnce(&mut [u8]) -> usize);

    /// Sends FIN behind the queued data.
    fn close(&mut self);

    /// Sends RST.
    fn abort(&mut self);

    /// Gives memory that holds no data back to the system.
    fn release_idle_memory(&mut self);
}

/// [`TcpEngine`] on smoltcp.
pub struct SmolEngine {
    interface: Interface,
    socket: TcpSocket,
    /// Right edge of the newest window shown to the guest.
    edge: u32,
    /// Newest acknowledgment number shown to the guest.
    acknowledged: u32,
    /// End of the highest data fed: above `acknowledged`, the ring holds out-of-order data.
    highest: u32,
    /// Our window scale, once the SYN-ACK has offered it.
    window_shift: u8,
    /// A RST came or went: what is left in the rings means nothing.
    reset: bool,
    /// The FIN of TIME-WAIT was acknowledged; polling on would let smoltcp's timer clear data that
    /// the host has yet to take.
    parked: bool,
}

impl SmolEngine {
    /// A socket that has taken the guest's SYN; [`TcpEngine::poll_egress`] sends the SYN-ACK. `seed`
    /// makes the initial sequence number (RFC 9293 3.4.1 wants it unpredictable).
    pub fn accept<O: Outbox + ?Sized>(
        mut socket: TcpSocket,
        seed: u64,
        syn: &SavedSyn,
        now: Instant,
        peer: &Peer,
        out: &mut O,
    ) -> Self {
        let port = syn.destination_port();
        let address = syn.destination();
        socket.with_socket(|socket| {
            // One ACK per batch comes from polling at its end; a delay would stall IW10 by 10 ms.
            socket.set_ack_delay(None);
            socket.set_nagle_enabled(false);
            socket.listen((address, port)).expect("a fresh socket listens on a port above zero");
        });
        let mut engine = Self {
            interface: interface(seed, now),
            socket,
            edge: 0,
            acknowledged: 0,
            highest: syn.sequence().wrapping_add(1),
            window_shift: 0,
            reset: false,
            parked: false,
        };
        let mut copy = [0; SYN_LEN];
        let syn = syn.rewritten(peer.segment_bytes(), &mut copy);
        engine.feed(syn, now, peer, out);
        engine
    }

    fn feed<O: Outbox + ?Sized>(&mut self, packet: &[u8], now: Instant, peer: &Peer, out: &mut O) {
        let mut device = Device::new(Some(packet), peer, out, self.window_shift);
        let interface = &mut self.interface;
        self.socket.with(|set| -> PollIngressSingleResult { interface.poll_ingress_single(now, &mut device, set) });
        let shown = device.shown;
        self.note(shown);
    }

    fn note(&mut self, shown: Option<Shown>) {
        if let Some(shown) = shown {
            self.edge = shown.edge;
            self.acknowledged = shown.acknowledged;
            self.window_shift = shown.window_shift;
        }
    }
}

impl TcpEngine for SmolEngine {
    fn handle_segment<O: Outbox + ?Sized>(&mut self, ip: &Ipv4<'_>, tcp: &Tcp<'_>, now: Instant, peer: &Peer, out: &mut O) {
        if tcp.flags & Tcp::SYN != 0 {
            if let Some(syn) = SavedSyn::new(ip, tcp) {
                let mut copy = [0; SYN_LEN];
                self.feed(syn.rewritten(peer.segment_bytes(), &mut copy), now, peer, out);
            }
            return;
        }
        let len = tcp.payload.len() as u32;
        let end = tcp.sequence.wrapping_add(len);
        let beyond = end.wrapping_sub(self.edge) as i32;
        if beyond <= 0 {
            if (end.wrapping_sub(self.highest) as i32) > 0 {
                self.highest = end;
            }
            self.feed(ip.packet, now, peer, out);
            self.reset |= tcp.flags & Tcp::RST != 0 && !self.socket.get().is_open();
            return;
        }
        // Only a sender that ignores the window comes here; a copy is cheap enough for it.
        let kept = len.saturating_sub(beyond as u32);
        let mut cut = ip.packet[..ip.header_len + tcp.header.len() + kept as usize].to_vec();
        set_cut(&mut cut, ip.header_len);
        if kept == 0 {
            // A window probe, answered like a keep-alive: with an ACK that shows the window.
            let probe = self.acknowledged.wrapping_sub(1);
            cut[ip.header_len + 4..ip.header_len + 8].copy_from_slice(&probe.to_be_bytes());
        } else if (self.edge.wrapping_sub(self.highest) as i32) > 0 {
            self.highest = self.edge;
        }
        self.feed(&cut, now, peer, out);
    }

    fn poll_egress<O: Outbox + ?Sized>(&mut self, now: Instant, peer: &Peer, out: &mut O);

    /// When [`TcpEngine::poll_egress`] next has something to do by itself.
    fn poll_timeout(&mut self, now: Instant) -> Option<Instant>;

    /// State.
    fn phase(&self) -> Phase;

    /// Whether the guest's FIN has arrived and all data before it was taken.
    fn guest_finished(&self) -> bool;

    /// Bytes from the guest that wait to be taken.
    fn received(&self) -> usize;

    /// Shows waiting bytes to `take`, which returns how many it took.
    fn recv(&mut self, take: impl FnOnce(&mut [u8]) -> usize);

    /// Bytes that are queued for the guest or not yet acknowledged by it.
    fn unacknowledged(&self) -> usize;

    /// Room for data to the guest; 0 before the handshake ends and after [`TcpEngine::close`].
    fn room(&self) -> usize;

    /// Shows contiguous room of at most `limit` bytes to `fill`, which returns how many it wrote.
    fn send(&mut self, limit: usize, fill: impl FnOnce(&mut [u8]) -> usize);

    /// Sends FIN behind the queued data.
    fn close(&mut self);

    /// Sends RST.
    fn abort(&mut self);

    /// Gives memory that holds no data back to the system.
    fn release_idle_memory(&mut self);
}

/// [`TcpEngine`] on smoltcp.
pub struct SmolEngine {
    interface: Interface,
    socket: TcpSocket,
    /// Right edge of the newest window shown to the guest.
    edge: u32,
    /// Newest acknowledgment number shown to the guest.
    acknowledged: u32,
    /// End of the highest data fed: above `acknowledged`, the ring holds out-of-order data.
    highest: u32,
    /// Our window scale, once the SYN-ACK has offered it.
    window_shift: u8,
}

impl SmolEngine {
    /// A socket that has taken the guest's SYN; [`TcpEngine::poll_egress`] sends the SYN-ACK. `seed`
    /// makes the initial sequence number (RFC 9293 3.4.1 wants it unpredictable).
    pub fn accept<O: Outbox + ?Sized>(
        mut socket: TcpSocket,
        seed: u64,
        syn: &SavedSyn,
        now: Instant,
        peer: &Peer,
        out: &mut O,
    ) -> Self {
        let port = syn.destination_port();
        let address = syn.destination();
        socket.with_socket(|socket| {
            // One ACK per batch comes from polling at its end; a delay would stall IW10 by 10 ms.
            socket.set_ack_delay(None);
            socket.set_nagle_enabled(false);
            socket.listen((address, port)).expect("a fresh socket listens on a port above zero");
        });
        let mut engine = Self {
            interface: interface(seed, now),
            socket,
            edge: 0,
            acknowledged: 0,
            highest: syn.sequence().wrapping_add(1),
            window_shift: 0,
            reset: false,
            parked: false,
        };
        let mut copy = [0; SYN_LEN];
        let syn = syn.rewritten(peer.segment_bytes(), &mut copy);
        engine.feed(syn, now, peer, out);
        engine
    }

    fn feed<O: Outbox + ?Sized>(&mut self, packet: &[u8], now: Instant, peer: &Peer, out: &mut O) {
        let mut device = Device::new(Some(packet), peer, out, self.window_shift);
        let interface = &mut self.interface;
        self.socket.with(|set| -> PollIngressSingleResult { interface.poll_ingress_single(now, &mut device, set) });
        let shown = device.shown;
        self.note(shown);
    }

    fn note(&mut self, shown: Option<Shown>) {
        if let Some(shown) = shown {
            self.edge = shown.edge;
            self.acknowledged = shown.acknowledged;
            self.window_shift = shown.window_shift;
        }
    }
}

impl TcpEngine for SmolEngine {
    fn handle_segment<O: Outbox + ?Sized>(&mut self, ip: &Ipv4<'_>, tcp: &Tcp<'_>, now: Instant, peer: &Peer, out: &mut O) {
        if tcp.flags & Tcp::SYN != 0 {
            if let Some(syn) = SavedSyn::new(ip, tcp) {
                let mut copy = [0; SYN_LEN];
                self.feed(syn.rewritten(peer.segment_bytes(), &mut copy), now, peer, out);
            }
            return;
        }
        let len = tcp.payload.len() as u32;
        let end = tcp.sequence.wrapping_add(len);
        let beyond = end.wrapping_sub(self.edge) as i32;
        if beyond <= 0 {
            if (end.wrapping_sub(self.highest) as i32) > 0 {
                self.highest = end;
            }
            self.feed(ip.packet, now, peer, out);
            return;
        }
        let kept = len.saturating_sub(beyond as u32);
        let buffer = out.buffer();
        // The cut copy is built in the second half of the frame buffer's room only if something is
        // left; a segment wholly beyond the edge (a window probe) is answered like a keep-alive.
        let mut copy = [0u8; 120];
        if kept == 0 {
            let header_len = ip.header_len + tcp.header.len();
            let copy = &mut copy[..header_len];
            copy.copy_from_slice(&ip.packet[..header_len]);
            let at = ip.header_len;
            copy[at + 4..at + 8].copy_from_slice(&self.acknowledged.wrapping_sub(1).to_be_bytes());
            set_cut(copy, ip.header_len);
            self.feed(copy, now, peer, out);
            return;
        }
        let _ = buffer;
        let cut_len = ip.header_len + tcp.header.len() + kept as usize;
        let mut cut = ip.packet[..cut_len].to_vec();
        set_cut(&mut cut, ip.header_len);
        let end = tcp.sequence.wrapping_add(kept);
        if (end.wrapping_sub(self.highest) as i32) > 0 {
            self.highest = end;
        }
        self.feed(&cut, now, peer, out);
    }

    fn poll_egress<O: Outbox + ?Sized>(&mut self, now: Instant, peer: &Peer, out: &mut O) {
        if std::mem::replace(&mut self.parked, self.socket.get().state() == tcp::State::TimeWait) {
            return;
        }
        loop {
            let mut device = Device::new(None, peer, out, self.window_shift);
            let interface = &mut self.interface;
            let result = self.socket.with(|set| interface.poll_egress(now, &mut device, set));
            let shown = device.shown;
            self.note(shown);
            // A RST shows nothing and is the last segment.
            if result == PollResult::None || shown.is_none() {
                return;
            }
        }
    }

    fn poll_timeout(&mut self, now: Instant) -> Option<Instant> {
        let interface = &mut self.interface;
        self.socket.with(|set| interface.poll_at(now, set))
    }

    fn phase(&self) -> Phase {
        let socket = self.socket.get();
        match socket.state() {
            // A RST before the handshake's end puts the socket back to Listen.
            tcp::State::Listen => Phase::Closed,
            tcp::State::Closed | tcp::State::TimeWait if self.reset || socket.recv_queue() == 0 => Phase::Closed,
            tcp::State::SynReceived | tcp::State::SynSent => Phase::Handshake,
            _ => Phase::Open,
        }
    }

    fn guest_finished(&self) -> bool {
        let socket = self.socket.get();
        let fin_taken = matches!(
            socket.state(),
            tcp::State::CloseWait
                | tcp::State::LastAck
                | tcp::State::Closing
                | tcp::State::TimeWait
                | tcp::State::Closed
        );
        fin_taken && !self.reset && socket.recv_queue() == 0
    }

    fn received(&self) -> usize;

    /// Shows waiting bytes to `take`, which returns how many it took.
    fn recv(&mut self, take: impl FnOnce(&mut [u8]) -> usize);

    /// Bytes that are queued for the guest or not yet acknowledged by it.
    fn unacknowledged(&self) -> usize;

    /// Room for data to the guest; 0 before the handshake ends and after [`TcpEngine::close`].
    fn room(&self) -> usize;

    /// Shows contiguous room of at most `limit` bytes to `fill`, which returns how many it wrote.
    fn send(&mut self, limit: usize, fill: impl FnOnce(&mut [u8]) -> usize);

    /// Sends FIN behind the queued data.
    fn close(&mut self);

    /// Sends RST.
    fn abort(&mut self);

    /// Gives memory that holds no data back to the system.
    fn release_idle_memory(&mut self);
}

/// [`TcpEngine`] on smoltcp.
pub struct SmolEngine {
    interface: Interface,
    socket: TcpSocket,
    /// Right edge of the newest window shown to the guest.
    edge: u32,
    /// Newest acknowledgment number shown to the guest.
    acknowledged: u32,
    /// End of the highest data fed: above `acknowledged`, the ring holds out-of-order data.
    highest: u32,
    /// Our window scale, once the SYN-ACK has offered it.
    window_shift: u8,
    /// A RST came or went: what is left in the rings means nothing.
    reset: bool,
    /// The FIN of TIME-WAIT was acknowledged; polling on would let smoltcp's timer clear data that
    /// the host has yet to take.
    parked: bool,
}

impl SmolEngine {
    /// A socket that has taken the guest's SYN; [`TcpEngine::poll_egress`] sends the SYN-ACK. `seed`
    /// makes the initial sequence number (RFC 9293 3.4.1 wants it unpredictable).
    pub fn accept<O: Outbox + ?Sized>(
        mut socket: TcpSocket,
        seed: u64,
        syn: &SavedSyn,
        now: Instant,
        peer: &Peer,
        out: &mut O,
    ) -> Self {
        let port = syn.destination_port();
        let address = syn.destination();
        socket.with_socket(|socket| {
            // One ACK per batch comes from polling at its end; a delay would stall IW10 by 10 ms.
            socket.set_ack_delay(None);
            socket.set_nagle_enabled(false);
            socket.listen((address, port)).expect("a fresh socket listens on a port above zero");
        });
        let mut engine = Self {
            interface: interface(seed, now),
            socket,
            edge: 0,
            acknowledged: 0,
            highest: syn.sequence().wrapping_add(1),
            window_shift: 0,
            reset: false,
            parked: false,
        };
        let mut copy = [0; SYN_LEN];
        let syn = syn.rewritten(peer.segment_bytes(), &mut copy);
        engine.feed(syn, now, peer, out);
        engine
    }

    fn feed<O: Outbox + ?Sized>(&mut self, packet: &[u8], now: Instant, peer: &Peer, out: &mut O) {
        let mut device = Device::new(Some(packet), peer, out, self.window_shift);
        let interface = &mut self.interface;
        self.socket.with(|set| -> PollIngressSingleResult { interface.poll_ingress_single(now, &mut device, set) });
        let shown = device.shown;
        self.note(shown);
    }

    fn note(&mut self, shown: Option<Shown>) {
        if let Some(shown) = shown {
            self.edge = shown.edge;
            self.acknowledged = shown.acknowledged;
            self.window_shift = shown.window_shift;
        }
    }
}

impl TcpEngine for SmolEngine {
    fn handle_segment<O: Outbox + ?Sized>(&mut self, ip: &Ipv4<'_>, tcp: &Tcp<'_>, now: Instant, peer: &Peer, out: &mut O) {
        if tcp.flags & Tcp::SYN != 0 {
            if let Some(syn) = SavedSyn::new(ip, tcp) {
                let mut copy = [0; SYN_LEN];
                self.feed(syn.rewritten(peer.segment_bytes(), &mut copy), now, peer, out);
            }
            return;
        }
        let len = tcp.payload.len() as u32;
        let end = tcp.sequence.wrapping_add(len);
        let beyond = end.wrapping_sub(self.edge) as i32;
        if beyond <= 0 {
            if (end.wrapping_sub(self.highest) as i32) > 0 {
                self.highest = end;
            }
            self.feed(ip.packet, now, peer, out);
            self.reset |= tcp.flags & Tcp::RST != 0 && !self.socket.get().is_open();
            return;
        }
        // Only a sender that ignores the window comes here; a copy is cheap enough for it.
        let kept = len.saturating_sub(beyond as u32);
        let mut cut = ip.packet[..ip.header_len + tcp.header.len() + kept as usize].to_vec();
        set_cut(&mut cut, ip.header_len);
        if kept == 0 {
            // A window probe, answered like a keep-alive: with an ACK that shows the window.
            let probe = self.acknowledged.wrapping_sub(1);
            cut[ip.header_len + 4..ip.header_len + 8].copy_from_slice(&probe.to_be_bytes());
        } else if (self.edge.wrapping_sub(self.highest) as i32) > 0 {
            self.highest = self.edge;
        }
        self.feed(&cut, now, peer, out);
    }

    fn poll_egress<O: Outbox + ?Sized>(&mut self, now: Instant, peer: &Peer, out: &mut O);

    /// When [`TcpEngine::poll_egress`] next has something to do by itself.
    fn poll_timeout(&mut self, now: Instant) -> Option<Instant>;

    /// State.
    fn phase(&self) -> Phase;

    /// Whether the guest's FIN has arrived and all data before it was taken.
    fn guest_finished(&self) -> bool;

    /// Bytes from the guest that wait to be taken.
    fn received(&self) -> usize;

    /// Shows waiting bytes to `take`, which returns how many it took.
    fn recv(&mut self, take: impl FnOnce(&mut [u8]) -> usize);

    /// Bytes that are queued for the guest or not yet acknowledged by it.
    fn unacknowledged(&self) -> usize;

    /// Room for data to the guest; 0 before the handshake ends and after [`TcpEngine::close`].
    fn room(&self) -> usize;

    /// Shows contiguous room of at most `limit` bytes to `fill`, which returns how many it wrote.
    fn send(&mut self, limit: usize, fill: impl FnOnce(&mut [u8]) -> usize);

    /// Sends FIN behind the queued data.
    fn close(&mut self);

    /// Sends RST.
    fn abort(&mut self);

    /// Gives memory that holds no data back to the system.
    fn release_idle_memory(&mut self);
}

/// [`TcpEngine`] on smoltcp.
pub struct SmolEngine {
    interface: Interface,
    socket: TcpSocket,
    /// Right edge of the newest window shown to the guest.
    edge: u32,
    /// Newest acknowledgment number shown to the guest.
    acknowledged: u32,
    /// End of the highest data fed: above `acknowledged`, the ring holds out-of-order data.
    highest: u32,
    /// Our window scale, once the SYN-ACK has offered it.
    window_shift: u8,
}

impl SmolEngine {
    /// A socket that has taken the guest's SYN; [`TcpEngine::poll_egress`] sends the SYN-ACK. `seed`
    /// makes the initial sequence number (RFC 9293 3.4.1 wants it unpredictable).
    pub fn accept<O: Outbox + ?Sized>(
        mut socket: TcpSocket,
        seed: u64,
        syn: &SavedSyn,
        now: Instant,
        peer: &Peer,
        out: &mut O,
    ) -> Self {
        let port = syn.destination_port();
        let address = syn.destination();
        socket.with_socket(|socket| {
            // One ACK per batch comes from polling at its end; a delay would stall IW10 by 10 ms.
            socket.set_ack_delay(None);
            socket.set_nagle_enabled(false);
            socket.listen((address, port)).expect("a fresh socket listens on a port above zero");
        });
        let mut engine = Self {
            interface: interface(seed, now),
            socket,
            edge: 0,
            acknowledged: 0,
            highest: syn.sequence().wrapping_add(1),
            window_shift: 0,
            reset: false,
            parked: false,
        };
        let mut copy = [0; SYN_LEN];
        let syn = syn.rewritten(peer.segment_bytes(), &mut copy);
        engine.feed(syn, now, peer, out);
        engine
    }

    fn feed<O: Outbox + ?Sized>(&mut self, packet: &[u8], now: Instant, peer: &Peer, out: &mut O) {
        let mut device = Device::new(Some(packet), peer, out, self.window_shift);
        let interface = &mut self.interface;
        self.socket.with(|set| -> PollIngressSingleResult { interface.poll_ingress_single(now, &mut device, set) });
        let shown = device.shown;
        self.note(shown);
    }

    fn note(&mut self, shown: Option<Shown>) {
        if let Some(shown) = shown {
            self.edge = shown.edge;
            self.acknowledged = shown.acknowledged;
            self.window_shift = shown.window_shift;
        }
    }
}

impl TcpEngine for SmolEngine {
    fn handle_segment<O: Outbox + ?Sized>(&mut self, ip: &Ipv4<'_>, tcp: &Tcp<'_>, now: Instant, peer: &Peer, out: &mut O) {
        if tcp.flags & Tcp::SYN != 0 {
            if let Some(syn) = SavedSyn::new(ip, tcp) {
                let mut copy = [0; SYN_LEN];
                self.feed(syn.rewritten(peer.segment_bytes(), &mut copy), now, peer, out);
            }
            return;
        }
        let len = tcp.payload.len() as u32;
        let end = tcp.sequence.wrapping_add(len);
        let beyond = end.wrapping_sub(self.edge) as i32;
        if beyond <= 0 {
            if (end.wrapping_sub(self.highest) as i32) > 0 {
                self.highest = end;
            }
            self.feed(ip.packet, now, peer, out);
            return;
        }
        let kept = len.saturating_sub(beyond as u32);
        let buffer = out.buffer();
        // The cut copy is built in the second half of the frame buffer's room only if something is
        // left; a segment wholly beyond the edge (a window probe) is answered like a keep-alive.
        let mut copy = [0u8; 120];
        if kept == 0 {
            let header_len = ip.header_len + tcp.header.len();
            let copy = &mut copy[..header_len];
            copy.copy_from_slice(&ip.packet[..header_len]);
            let at = ip.header_len;
            copy[at + 4..at + 8].copy_from_slice(&self.acknowledged.wrapping_sub(1).to_be_bytes());
            set_cut(copy, ip.header_len);
            self.feed(copy, now, peer, out);
            return;
        }
        let _ = buffer;
        let cut_len = ip.header_len + tcp.header.len() + kept as usize;
        let mut cut = ip.packet[..cut_len].to_vec();
        set_cut(&mut cut, ip.header_len);
        let end = tcp.sequence.wrapping_add(kept);
        if (end.wrapping_sub(self.highest) as i32) > 0 {
            self.highest = end;
        }
        self.feed(&cut, now, peer, out);
    }

    fn poll_egress<O: Outbox + ?Sized>(&mut self, now: Instant, peer: &Peer, out: &mut O) {
        if std::mem::replace(&mut self.parked, self.socket.get().state() == tcp::State::TimeWait) {
            return;
        }
        loop {
            let mut device = Device::new(None, peer, out, self.window_shift);
            let interface = &mut self.interface;
            let result = self.socket.with(|set| interface.poll_egress(now, &mut device, set));
            let shown = device.shown;
            self.note(shown);
            // A RST shows nothing and is the last segment.
            if result == PollResult::None || shown.is_none() {
                return;
            }
        }
    }

    fn poll_timeout(&mut self, now: Instant) -> Option<Instant> {
        let interface = &mut self.interface;
        self.socket.with(|set| interface.poll_at(now, set))
    }

    fn phase(&self) -> Phase {
        match self.socket.get().state() {
            // A RST before the handshake's end puts the socket back to Listen.
            tcp::State::Closed | tcp::State::Listen | tcp::State::TimeWait => Phase::Closed,
            tcp::State::SynReceived | tcp::State::SynSent => Phase::Handshake,
            _ => Phase::Open,
        }
    }

    fn guest_finished(&self) -> bool {
        let socket = self.socket.get();
        socket.recv_queue() == 0
            && matches!(
                socket.state(),
                tcp::State::CloseWait | tcp::State::LastAck | tcp::State::Closing | tcp::State::TimeWait
            )
    }

    fn received(&self) -> usize {
        self.socket.get().recv_queue()
    }

    fn recv(&mut self, take: impl FnOnce(&mut [u8]) -> usize) {
        // Refused only when nothing was ever received and nothing will be: then there is no data.
        let _ = self.socket.with_socket(|socket| socket.recv(|bytes| (take(bytes), ())));
    }

    fn unacknowledged(&self) -> usize {
        self.socket.get().send_queue()
    }

    fn room(&self) -> usize {
        let socket = self.socket.get();
        if socket.may_send() { socket.send_capacity() - socket.send_queue() } else { 0 }
    }

    fn send(&mut self, limit: usize, fill: impl FnOnce(&mut [u8]) -> usize) {
        let _ = self.socket.with_socket(|socket| {
            socket.send(|room| {
                let limit = limit.min(room.len());
                (fill(&mut room[..limit]), ())
            })
        });
    }

    fn close(&mut self) {
        self.socket.with_socket(tcp::Socket::close);
    }

    fn abort(&mut self) {
        self.reset = true;
        self.socket.with_socket(tcp::Socket::abort);
    }

    fn release_idle_memory(&mut self) {
        if self.highest == self.acknowledged {
            self.socket.discard_rings();
        }
    }
}

/// Clears FIN and sets the IP total length to the copy's length.
fn set_cut(packet: &mut [u8], ip_header_len: usize) {
    let total = packet.len() as u16;
    packet[2..4].copy_from_slice(&total.to_be_bytes());
    packet[ip_header_len + 13] &= !Tcp::FIN;
}

/// Answers a segment of no flow, or a refused SYN, with RST (RFC 9293 3.10.7.1).
pub fn reset<O: Outbox + ?Sized>(packet: &[u8], peer: &Peer, now: Instant, out: &mut O) {
    let mut device = Device::new(Some(packet), peer, out, 0);
    let mut set = SocketSet::new(Vec::new());
    interface(0, now).poll_ingress_single(now, &mut device, &mut set);
}

/// An interface of 96 bytes that takes packets for any address.
fn interface(seed: u64, now: Instant) -> Interface {
    let mut config = Config::new(HardwareAddress::Ip);
    config.random_seed = seed;
    let mut interface = Interface::new(config, &mut Capabilities, now);
    interface.set_any_ip(true);
    interface
}

const SYN_LEN: usize = IPV4_HEADER_LEN + TCP_HEADER_LEN + 12;
/// A saved SYN: IP and TCP headers with all their options.
const SAVED_SYN_LEN_MAX: usize = 60 + 60;

/// A guest's SYN, kept while the host's connection is being made.
#[derive(Clone, Debug)]
pub struct SavedSyn {
    packet: [u8; SAVED_SYN_LEN_MAX],
    ip_header_len: u8,
    len: u8,
}

impl SavedSyn {
    /// Keeps the headers of `tcp`; data on a SYN is left for the guest to send again.
    pub fn new(ip: &Ipv4<'_>, tcp: &Tcp<'_>) -> Option<Self> {
        let len = ip.header_len + tcp.header.len();
        let mut packet = [0; SAVED_SYN_LEN_MAX];
        packet.get_mut(..len)?.copy_from_slice(&ip.packet[..len]);
        set_cut(&mut packet[..len], ip.header_len);
        Some(Self { packet, ip_header_len: ip.header_len as u8, len: len as u8 })
    }

    /// The packet as the guest sent it, without data: for RST and ICMP answers.
    pub fn packet(&self) -> &[u8] {
        &self.packet[..usize::from(self.len)]
    }

    fn tcp_header(&self) -> &[u8] {
        &self.packet()[usize::from(self.ip_header_len)..]
    }

    /// Destination address.
    pub fn destination(&self) -> Ipv4Addr {
        Ipv4Addr::new(self.packet[16], self.packet[17], self.packet[18], self.packet[19])
    }

    /// Destination port.
    pub fn destination_port(&self) -> u16 {
        be16(self.tcp_header(), 2)
    }

    /// Initial sequence number of the guest.
    pub fn sequence(&self) -> u32 {
        be32(self.tcp_header(), 4)
    }

    /// The SYN as smoltcp shall see it: MSS of a super-frame, window scale and SACK as the guest
    /// offered them, nothing else.
    fn rewritten<'a>(&self, mss: u16, out: &'a mut [u8; SYN_LEN]) -> &'a [u8] {
        let header = self.tcp_header();
        out[..IPV4_HEADER_LEN].copy_from_slice(&self.packet[..IPV4_HEADER_LEN]);
        out[0] = 0x45;
        out[2..4].copy_from_slice(&(SYN_LEN as u16).to_be_bytes());
        let tcp = &mut out[IPV4_HEADER_LEN..];
        tcp[..TCP_HEADER_LEN].copy_from_slice(&header[..TCP_HEADER_LEN]);
        tcp[12] = ((TCP_HEADER_LEN + 12) / 4 << 4) as u8;
        let mut options = [1u8; 12];
        options[..2].copy_from_slice(&[2, 4]);
        options[2..4].copy_from_slice(&mss.to_be_bytes());
        for option in options_of(header) {
            match option {
                [3, _, shift] => options[4..7].copy_from_slice(&[3, 3, *shift]),
                [4, _] => options[8..10].copy_from_slice(&[4, 2]),
                _ => {}
            }
        }
        tcp[TCP_HEADER_LEN..].copy_from_slice(&options);
        out
    }
}

fn be32(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

/// MSS option of a SYN's TCP header.
fn syn_mss(header: &[u8]) -> Option<u16> {
    options_of(header).find_map(|option| match option {
        [2, 4, high, low] => Some(u16::from_be_bytes([*high, *low])),
        _ => None,
    })
}

/// The options of a TCP header, whole, up to the first malformed one.
fn options_of(header: &[u8]) -> impl Iterator<Item = &[u8]> {
    let mut rest = header.get(TCP_HEADER_LEN..).unwrap_or_default();
    std::iter::from_fn(move || {
        while let [1, behind @ ..] = rest {
            rest = behind;
        }
        let len = match rest {
            [] | [0, ..] | [_] => return None,
            [_, len, ..] => usize::from(*len),
        };
        if len < 2 || len > rest.len() {
            return None;
        }
        let (option, behind) = rest.split_at(len);
        rest = behind;
        Some(option)
    })
}

/// What a sent segment told the guest.
#[derive(Clone, Copy)]
struct Shown {
    acknowledged: u32,
    edge: u32,
    window_shift: u8,
}

/// smoltcp's device for the length of one call: at most one packet in, frames out as they are made.
struct Device<'a, O: ?Sized> {
    input: Option<&'a [u8]>,
    peer: &'a Peer,
    out: &'a mut O,
    window_shift: u8,
    shown: Option<Shown>,
}

impl<'a, O: Outbox + ?Sized> Device<'a, O> {
    fn new(input: Option<&'a [u8]>, peer: &'a Peer, out: &'a mut O, window_shift: u8) -> Self {
        Self { input, peer, out, window_shift, shown: None }
    }
}

fn capabilities() -> DeviceCapabilities {
    let mut capabilities = DeviceCapabilities::default();
    capabilities.medium = Medium::Ip;
    capabilities.max_transmission_unit = ENGINE_MTU;
    // Ingress was verified by `wire`; egress is left to the device or to `offload::fit`.
    capabilities.checksum = ChecksumCapabilities::ignored();
    capabilities
}

impl<O: Outbox + ?Sized> phy::Device for Device<'_, O> {
    type RxToken<'b>
        = RxToken<'b>
    where
        Self: 'b;
    type TxToken<'b>
        = TxToken<'b, O>
    where
        Self: 'b;

    fn receive(&mut self, _now: Instant) -> Option<(Self::RxToken<'_>, Self::TxToken<'_>)> {
        let packet = self.input.take()?;
        let token = TxToken { peer: self.peer, out: self.out, window_shift: self.window_shift, shown: &mut self.shown };
        Some((RxToken(packet), token))
    }

    fn transmit(&mut self, _now: Instant) -> Option<Self::TxToken<'_>> {
        Some(TxToken { peer: self.peer, out: self.out, window_shift: self.window_shift, shown: &mut self.shown })
    }

    fn capabilities(&self) -> DeviceCapabilities {
        capabilities()
    }
}

struct RxToken<'a>(&'a [u8]);

impl phy::RxToken for RxToken<'_> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(self.0)
    }
}

struct TxToken<'a, O: ?Sized> {
    peer: &'a Peer,
    out: &'a mut O,
    window_shift: u8,
    shown: &'a mut Option<Shown>,
}

impl<O: Outbox + ?Sized> phy::TxToken for TxToken<'_, O> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let frame = &mut self.out.buffer()[..ETH_HEADER_LEN + len];
        let result = f(&mut frame[ETH_HEADER_LEN..]);
        let (offload, shown) = finish(frame, self.peer, self.window_shift);
        *self.shown = shown;
        self.out.send(ETH_HEADER_LEN + len, offload);
        result
    }
}

/// Turns the IP packet behind a frame's Ethernet header, as smoltcp wrote it, into a frame for the
/// guest.
fn finish(frame: &mut [u8], peer: &Peer, window_shift: u8) -> (Offload, Option<Shown>) {
    wire::write_ethernet(frame, peer.guest, peer.gateway, ETHERTYPE_IPV4);
    let (ip, tcp) = frame[ETH_HEADER_LEN..].split_at_mut(IPV4_HEADER_LEN);
    let sum = !checksum::fold(checksum::sum(ip) - u64::from(be16(ip, 10)));
    ip[10..12].copy_from_slice(&sum.to_be_bytes());
    let pseudo = checksum::sum(&ip[12..20]) + u64::from(PROTO_TCP) + tcp.len() as u64;
    tcp[16..18].copy_from_slice(&checksum::fold(pseudo).to_be_bytes());

    let header_len = usize::from(tcp[12] >> 4) * 4;
    let flags = tcp[13];
    let acknowledged = be32(tcp, 8);
    let window = u32::from(be16(tcp, 14));
    let mut shift = window_shift;
    if flags & Tcp::SYN != 0 {
        shift = show_our_mss(&mut tcp[TCP_HEADER_LEN..header_len], peer.our_mss);
    }
    // The window of a SYN is never scaled (RFC 7323 2.2).
    let scaled = if flags & Tcp::SYN != 0 { window } else { window << shift };
    let shown = (flags & Tcp::RST == 0).then(|| Shown {
        acknowledged,
        edge: acknowledged.wrapping_add(scaled),
        window_shift: shift,
    });
    let gso = if tcp.len() - header_len > usize::from(peer.mss) { Gso::Tcp4(peer.mss) } else { Gso::None };
    let start = (ETH_HEADER_LEN + IPV4_HEADER_LEN) as u16;
    (Offload { csum: Csum::Partial { start, offset: 16 }, gso, ecn: false }, shown)
}

/// Puts our MSS into a SYN-ACK's options; returns the window scale they offer.
fn show_our_mss(options: &mut [u8], mss: u16) -> u8 {
    let mut at = 0;
    let mut shift = 0;
    while at + 1 < options.len() {
        match (options[at], usize::from(options[at + 1])) {
            (0, _) => break,
            (1, _) => {
                at += 1;
                continue;
            }
            (2, 4) => options[at + 2..at + 4].copy_from_slice(&mss.to_be_bytes()),
            (3, 3) => shift = options[at + 2],
            _ => {}
        }
        at += usize::from(options[at + 1]).max(2);
    }
    shift
}

/// Tells smoltcp what it runs on, where no packet moves.
struct Capabilities;

impl phy::Device for Capabilities {
    type RxToken<'b> = RxToken<'b>;
    type TxToken<'b> = TxToken<'b, NoReply>;

    fn receive(&mut self, _now: Instant) -> Option<(Self::RxToken<'_>, Self::TxToken<'_>)> {
        None
    }

    fn transmit(&mut self, _now: Instant) -> Option<Self::TxToken<'_>> {
        None
    }

    fn capabilities(&self) -> DeviceCapabilities {
        capabilities()
    }
}

/// The outbox of [`Capabilities`], which never gives a token.
struct NoReply;

impl Outbox for NoReply {
    fn buffer(&mut self) -> &mut [u8] {
        &mut []
    }

    fn send(&mut self, _len: usize, _offload: Offload) {}
}
