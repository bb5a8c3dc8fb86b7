//! The guest's end of a TCP flow: smoltcp, driven one socket at a time.
//!
//! One `SocketSet` with N sockets costs O(N) per packet; one set per flow costs 37-60 ns whatever N
//! (measured with 0.14.0). Super-segments pass in both directions: smoltcp is told that the guest
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

use std::net::SocketAddr;

use smoltcp::iface::{Interface, PollResult};
use smoltcp::socket::tcp;

use super::device::{Device, Shown, Window, interface};
use super::syn::{self, Peer, SYN_LEN_MAX, SavedSyn, be32, set_cut};
use crate::frame::Instant;
use crate::gateway::Outbox;
use crate::sys::arena::TcpSocket;
use crate::wire::{Ip, Tcp};

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
    fn handle_segment<O: Outbox + ?Sized>(
        &mut self,
        ip: &Ip<'_>,
        tcp: &Tcp<'_>,
        now: Instant,
        peer: &Peer,
        out: &mut O,
    );

    /// Sends what is due: data, ACKs, window updates, retransmissions.
    fn poll_egress<O: Outbox + ?Sized>(&mut self, now: Instant, peer: &Peer, out: &mut O);

    /// When [`TcpEngine::poll_egress`] next has something to do by itself.
    fn poll_timeout(&mut self, now: Instant) -> Option<Instant>;

    /// State.
    fn phase(&self) -> Phase;

    /// Whether this sequence number is of data that was sent and not acknowledged.
    fn is_in_flight(&self, sequence: u32) -> bool;

    /// Sends what is in flight again, without waiting for the timer.
    fn send_again<O: Outbox + ?Sized>(&mut self, now: Instant, peer: &Peer, out: &mut O);

    /// Whether the segment asks for an ACK that shows us alive (RFC 9293 3.8.4).
    fn is_keep_alive(&self, tcp: &Tcp<'_>) -> bool;

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

    /// Gives memory that holds no data back to the system. Returns what of the receive and the send ring
    /// is still in use, bytes; `None`: as much as before.
    fn release_memory(&mut self) -> (Option<usize>, Option<usize>);

    /// Bounds what may wait to be taken; `None`: by the receive ring alone. The guest is shown no window that
    /// goes beyond, but none that it was shown is taken back.
    fn set_receive_max(&mut self, max: Option<usize>);

    /// Shows the guest a window that has opened again, where the last one was bounded.
    fn announce<O: Outbox + ?Sized>(&mut self, now: Instant, peer: &Peer, out: &mut O);
}

/// [`TcpEngine`] on smoltcp.
pub struct SmolEngine {
    interface: Interface,
    socket: TcpSocket,
    /// Right edge of the newest window shown to the guest.
    edge: u32,
    /// Sequence number of the newest segment sent.
    sequence: u32,
    /// End of the highest data sent.
    sent: u32,
    /// Newest acknowledgment number of the guest.
    taken: u32,
    /// Newest acknowledgment number shown to the guest.
    acknowledged: u32,
    /// End of the highest data fed: above `acknowledged`, the ring holds out-of-order data.
    highest: u32,
    /// Our window scale, once the SYN-ACK has offered it.
    window_shift: u8,
    /// What may wait in the receive ring; `None`: all that fits.
    receive_max: Option<usize>,
    /// The newest window was less than the ring has room for.
    is_bounded: bool,
    /// What the guest acknowledged last.
    guest_acknowledged: u32,
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
        let at = syn.destination();
        socket.with_socket(|socket| {
            // One ACK per batch comes from polling at its end; a delay would stall IW10 by 10 ms.
            socket.set_ack_delay(None);
            socket.set_nagle_enabled(false);
            socket
                .listen((at.ip(), at.port()))
                .expect("a fresh socket listens on a port above zero");
        });
        let mut engine = Self {
            interface: interface(seed, now),
            socket,
            edge: syn.sequence().wrapping_add(1),
            sequence: 0,
            sent: 0,
            taken: 0,
            acknowledged: 0,
            highest: syn.sequence().wrapping_add(1),
            window_shift: 0,
            receive_max: None,
            is_bounded: false,
            guest_acknowledged: 0,
            reset: false,
            parked: false,
        };
        let mut copy = [0; SYN_LEN_MAX];
        let syn = syn.rewritten(peer.segment_bytes(), &mut copy);
        engine.feed(syn, now, peer, out);
        engine
    }

    /// A socket that opens a connection to the guest; [`TcpEngine::poll_egress`] sends the SYN. `None`:
    /// an address or port is zero, or their families differ.
    pub fn connect(
        mut socket: TcpSocket,
        seed: u64,
        (from, guest): (SocketAddr, SocketAddr),
        now: Instant,
    ) -> Option<Self> {
        let mut interface = interface(seed, now);
        let context = interface.context();
        socket
            .with_socket(|socket| {
                socket.set_ack_delay(None);
                socket.set_nagle_enabled(false);
                socket.connect(context, guest, from)
            })
            .ok()?;
        Some(Self {
            interface,
            socket,
            edge: 0,
            sequence: 0,
            sent: 0,
            taken: 0,
            acknowledged: 0,
            highest: 0,
            window_shift: 0,
            receive_max: None,
            is_bounded: false,
            guest_acknowledged: 0,
            reset: false,
            parked: false,
        })
    }

    fn feed<O: Outbox + ?Sized>(&mut self, packet: &[u8], now: Instant, peer: &Peer, out: &mut O) {
        let window = self.window();
        let mut device = Device::new(Some(packet), peer, out, window);
        let interface = &mut self.interface;
        self.socket.with(|set| {
            interface.poll_ingress_single(now, &mut device, set);
        });
        let shown = device.shown;
        self.note(shown);
    }

    /// Answers a SYN in a connection that is open with an ACK (RFC 9293 3.10.7.4): a guest that was
    /// restarted says RST to that, and its next SYN finds the way free. smoltcp ignores such a SYN, but
    /// challenges, once a second at most, an ACK of what was never sent.
    fn challenge<O: Outbox + ?Sized>(
        &mut self,
        ip: &Ip<'_>,
        tcp: &Tcp<'_>,
        now: Instant,
        peer: &Peer,
        out: &mut O,
    ) {
        /// More than any ring holds, less than half of the sequence space.
        const BEYOND: u32 = 1 << 30;
        let mut copy = ip.packet[..ip.header_len + tcp.header.len()].to_vec();
        set_cut(&mut copy, ip.header_len);
        let header = &mut copy[ip.header_len..];
        header[4..8].copy_from_slice(&self.acknowledged.to_be_bytes());
        let never_sent = self.sequence.wrapping_add(BEYOND);
        header[8..12].copy_from_slice(&never_sent.to_be_bytes());
        header[13] = Tcp::ACK;
        self.feed(&copy, now, peer, out);
    }

    fn note(&mut self, shown: Option<Shown>) {
        if let Some(shown) = shown {
            self.sequence = shown.sequence;
            if self.phase() == Phase::Handshake || is_before(self.sent, shown.end) {
                self.sent = shown.end;
            }
            self.edge = shown.edge;
            self.acknowledged = shown.acknowledged;
            self.window_shift = shown.window_shift;
            self.is_bounded = shown.is_bounded;
        }
    }

    fn window(&self) -> Window {
        Window {
            shift: self.window_shift,
            max: self.window_max(),
            edge: self.edge,
        }
    }

    /// The largest window to be shown.
    fn window_max(&self) -> u32 {
        let max = self
            .receive_max
            .map(|max| max.saturating_sub(self.received()));
        max.map_or(u32::MAX, |max| max as u32)
    }
}

/// Whether a sequence number comes before another (RFC 9293 3.4).
fn is_before(sequence: u32, other: u32) -> bool {
    (sequence.wrapping_sub(other) as i32) < 0
}

impl TcpEngine for SmolEngine {
    fn handle_segment<O: Outbox + ?Sized>(
        &mut self,
        ip: &Ip<'_>,
        tcp: &Tcp<'_>,
        now: Instant,
        peer: &Peer,
        out: &mut O,
    ) {
        if tcp.flags & Tcp::ACK != 0 {
            self.guest_acknowledged = be32(tcp.header, 8);
        }
        let fresh = tcp.flags & (Tcp::SYN | Tcp::ACK) == Tcp::SYN;
        if fresh && self.phase() == Phase::Open {
            self.challenge(ip, tcp, now, peer, out);
            return;
        }
        if tcp.flags & Tcp::SYN != 0 {
            if let Some(syn) = SavedSyn::new(ip, tcp) {
                let answer = tcp.flags & Tcp::ACK != 0 && self.phase() == Phase::Handshake;
                if answer && !syn.scales() {
                    // Neither side scales unless both do.
                    self.window_shift = 0;
                }
                if answer {
                    // No window was shown yet: our SYN acknowledged nothing.
                    self.edge = tcp.sequence.wrapping_add(1);
                }
                let mut copy = [0; SYN_LEN_MAX];
                self.feed(
                    syn.rewritten(peer.segment_bytes(), &mut copy),
                    now,
                    peer,
                    out,
                );
                if answer {
                    // The answer to our SYN. Its ACK goes out at once: that shows the guest the window
                    // which everything it sends from here on is measured against.
                    self.highest = tcp.sequence.wrapping_add(1);
                    self.poll_egress(now, peer, out);
                }
            }
            return;
        }
        let taken = be32(tcp.header, 8);
        let is_news = is_before(self.taken, taken) && !is_before(self.sent, taken);
        if tcp.flags & Tcp::ACK != 0 && (is_news || self.phase() == Phase::Handshake) {
            self.taken = taken;
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

    fn poll_egress<O: Outbox + ?Sized>(&mut self, now: Instant, peer: &Peer, out: &mut O) {
        if std::mem::replace(
            &mut self.parked,
            self.socket.get().state() == tcp::State::TimeWait,
        ) {
            return;
        }
        loop {
            let window = self.window();
            let mut device = Device::new(None, peer, out, window);
            let interface = &mut self.interface;
            let result = self
                .socket
                .with(|set| interface.poll_egress(now, &mut device, set));
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
            tcp::State::Closed | tcp::State::TimeWait if self.reset || socket.recv_queue() == 0 => {
                Phase::Closed
            }
            tcp::State::SynReceived | tcp::State::SynSent => Phase::Handshake,
            _ => Phase::Open,
        }
    }

    fn is_in_flight(&self, sequence: u32) -> bool {
        !is_before(sequence, self.taken) && is_before(sequence, self.sent)
    }

    fn send_again<O: Outbox + ?Sized>(&mut self, now: Instant, peer: &Peer, out: &mut O) {
        // smoltcp sends all again when its timer runs out: so to it, that is the time. What it knows of
        // round trips is left out (Karn), and its next timer may be as much later.
        if let Some(due) = self.poll_timeout(now) {
            self.poll_egress(due.max(now), peer, out);
        }
    }

    fn is_keep_alive(&self, tcp: &Tcp<'_>) -> bool {
        let flags = tcp.flags & (Tcp::SYN | Tcp::FIN | Tcp::RST | Tcp::ACK);
        flags == Tcp::ACK
            && tcp.payload.len() <= 1
            && tcp.sequence == self.acknowledged.wrapping_sub(1)
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

    fn received(&self) -> usize {
        self.socket.get().recv_queue()
    }

    fn recv(&mut self, take: impl FnOnce(&mut [u8]) -> usize) {
        // Refused only when nothing was ever received and nothing will be: then there is no data.
        let _ = self
            .socket
            .with_socket(|socket| socket.recv(|bytes| (take(bytes), ())));
    }

    fn unacknowledged(&self) -> usize {
        self.socket.get().send_queue()
    }

    fn room(&self) -> usize {
        let socket = self.socket.get();
        if socket.may_send() {
            socket.send_capacity() - socket.send_queue()
        } else {
            0
        }
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
        self.socket.with_socket(|socket| socket.close());
    }

    fn abort(&mut self) {
        self.reset = true;
        self.socket.with_socket(|socket| socket.abort());
    }

    fn release_memory(&mut self) -> (Option<usize>, Option<usize>) {
        let ahead = self.highest.wrapping_sub(self.acknowledged) as i32;
        self.socket
            .discard_free(usize::try_from(ahead).unwrap_or(0))
    }

    fn set_receive_max(&mut self, max: Option<usize>) {
        self.receive_max = max;
    }

    fn announce<O: Outbox + ?Sized>(&mut self, now: Instant, peer: &Peer, out: &mut O) {
        if !self.is_bounded || self.phase() != Phase::Open {
            return;
        }
        let socket = self.socket.get();
        let (Some(local), Some(remote)) = (socket.local_endpoint(), socket.remote_endpoint())
        else {
            return;
        };
        let room = socket.recv_capacity() - socket.recv_queue();
        let room = room.min(self.window_max() as usize);
        let shown = self.edge.wrapping_sub(self.acknowledged) as usize;
        // RFC 9293 3.8.6.2.2: by a segment, or half of what there is.
        let step = usize::from(peer.our_mss).min(socket.recv_capacity() / 2);
        let step = self.receive_max.map_or(step, |max| step.min(max / 2));
        if room < shown + step.max(1) {
            return;
        }
        // The engine takes no window that it did not make for less than it is. A byte that it has already
        // makes it say again what it has room for.
        let probe = syn::segment(
            (remote.into(), local.into()),
            (self.acknowledged.wrapping_sub(1), self.guest_acknowledged),
        );
        self.feed(&probe, now, peer, out);
    }
}
