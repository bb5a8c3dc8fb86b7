//! TCP of the NAT: a guest's connection is ended here and carried on by a socket of the host.
//!
//! # Theory of operation
//! A flow has two ends. The guest's end is a `TcpEngine` that speaks TCP with the guest as if it
//! were the outside server. The host's end is a non-blocking socket of the [`Uplink`]. Between them
//! bytes go from ring to socket and from socket to ring; what one end can't take closes the other
//! end's window, so nothing queues without a bound.
//!
//! ```text
//!  guest SYN ─► Connecting: SYN kept, host connect() under way, no ring memory
//!                 │ refused: RST   unreachable, timed out: ICMP
//!                 ▼ connected
//!               Open: SYN-ACK, data, FINs both ways ─► gone (host socket closed, slot free)
//! ```
//! The guest sees a SYN-ACK only once the outside server has answered, so "connection refused" and
//! "unreachable" mean what they say. While a flow is `Connecting`, the guest's SYN retransmissions
//! are ignored and a RST ends it.
//!
//! # Batches
//! [`TcpNat::handle_packet`] and [`TcpNat::handle_ready`] only note what happened and mark the flow
//! dirty; [`TcpNat::flush`], at the end of a port's turn, moves bytes and polls each dirty flow once:
//! one ACK and one `send()` per flow and turn. A flow that still has work after its share of
//! [`DOWN_BYTES_PER_FLUSH`] stays dirty, see [`TcpNat::has_backlog`].
//!
//! # Lossless toward the guest
//! smoltcp recovers from loss slowly (RTO at least 1 s, no SACK), so what is in flight to one port
//! stays below that port's queue: [`GUEST_SEGMENTS_IN_FLIGHT`] over all its busy flows.
//!
//! # Timers (RFC 5382)
//! Established flows end after [`ESTABLISHED_IDLE`] without a segment or byte (REQ-5: at least 2 h 4
//! min), handshakes and flows with a FIN on either side after [`TRANSITORY_IDLE`] (at least 4 min).
//! A flow is forgotten with the last FIN's ACK: the link to the guest loses nothing, so TIME-WAIT has
//! nothing to wait for, and a SYN that reuses the ports starts a fresh flow.
//!
//! # A hostile guest
//! can open flows up to the limits; at those it takes nothing from who holds less, see [`limits`]. It
//! can't exceed its rings, can't reach another guest's flow (the key has its address, the switch guards
//! that) and, should it make the engine panic, loses that flow only.

pub mod budget;
mod device;
mod engine;
mod flow;
mod limits;
mod probe;
mod syn;

pub use self::flow::{
    DOWN_BYTES_PER_FLUSH, ESTABLISHED_IDLE, SEND_AGAIN_INTERVAL, TRANSITORY_IDLE,
};
pub use self::limits::{
    CONNECTING_MAX, EVICTABLE_IDLE, GUEST_SEGMENTS_IN_FLIGHT, GiveWay, OPENS_BURST, OPENS_PER_SEC,
    OVERDRAFT, PORT_CONNECTING_MAX, SHARE, Shortage,
};

use std::net::{IpAddr, SocketAddr};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;

use hashbrown::HashMap;

use self::budget::Budget;
use self::engine::{Phase, SmolEngine, TcpEngine};
use self::flow::{Flow, FlowKey, IDLE_RELEASE, Rest, State};
use self::limits::{PortLoad, RELEASE_MIN, bound_unsent};
use self::syn::{Peer, SavedSyn};
use super::egress::{Egress, Protocol};
use super::flow_table::{FlowTable, TimerWheel};
use super::forward::ForwardId;
use super::icmp::{ErrorKind, write_about};
use super::path_mtu::TooBig;
use super::shares::{Held, Shares};
use super::{FlowId, HostError, Ready, Service, SockId, SockOwner, Uplink};
use crate::frame::{Instant, Mac, PortId};
use crate::gateway::{LanConfig, Outbox};
use crate::offload::Offload;
use crate::stats::DropReason;
use crate::sys::arena::{Arena, RX_RING_BYTES};
use crate::wire::{Family, Ip, Packet, Tcp};

/// Receive rings by the number of flows there are: a flow that the guest has sent a ring's worth on
/// keeps all of it resident until it idles, and rings that fall out of the cache cost a page walk and
/// misses per packet. With many flows none of them needs a deep ring: guest and lanlet are
/// microseconds apart. In sum 32 + 120 + 960 MiB for 16,384 flows that are all busy.
const RX_RINGS: [(usize, usize); 3] = [
    (64, RX_RING_BYTES),
    (1_024, 128 * 1024),
    (usize::MAX, 64 * 1024),
];

fn rx_ring_bytes(flows: usize) -> usize {
    let class = RX_RINGS.iter().find(|(below, _)| flows <= *below);
    class.map_or(RX_RING_BYTES, |(_, bytes)| *bytes)
}

/// What happened, for `lanlet status`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct TcpCounters {
    /// Connections that reached the outside.
    pub opened: u64,
    /// Connections from outside taken on to guests.
    pub accepted: u64,
    /// Connects that failed, whatever the cause.
    pub failed: u64,
    /// SYNs and connections of clients that were let wait at a limit.
    pub limited: u64,
    /// Flows whose segments were made smaller for a link behind the guest.
    pub narrowed: u64,
    /// Flows ended by a reset of either side.
    pub reset: u64,
    /// Flows ended by an idle timer.
    pub idled_out: u64,
    /// Flows whose windows were bounded for lack of memory.
    pub short: u64,
    /// Flows ended to make room for new ones.
    pub evicted: u64,
    /// Flows ended because the host lost the address they came from.
    pub readdressed: u64,
    /// Flows ended because the policy no longer allows them.
    pub revoked: u64,
    /// Flows ended because the engine failed on them.
    pub faults: u64,
}

impl TcpCounters {
    /// Names and values.
    pub fn iter(self) -> impl Iterator<Item = (&'static str, u64)> {
        let Self {
            opened,
            accepted,
            failed,
            limited,
            narrowed,
            reset,
            idled_out,
            short,
            evicted,
            readdressed,
            revoked,
            faults,
        } = self;
        [
            ("tcp_opened", opened),
            ("tcp_accepted", accepted),
            ("tcp_connect_failed", failed),
            ("tcp_limited", limited),
            ("tcp_narrowed", narrowed),
            ("tcp_reset", reset),
            ("tcp_idled_out", idled_out),
            ("tcp_short_of_memory", short),
            ("tcp_evicted", evicted),
            ("tcp_readdressed", readdressed),
            ("tcp_revoked", revoked),
            ("tcp_faults", faults),
        ]
        .into_iter()
    }
}

/// All TCP flows of one worker.
pub struct TcpNat {
    lan: LanConfig,
    flows: FlowTable<Flow>,
    keys: HashMap<FlowKey, FlowId>,
    arena: Arena,
    wheel: TimerWheel,
    flows_max: usize,
    /// Who has the flows.
    shares: Shares,
    /// Memory of their rings.
    memory: Arc<Budget>,
    /// Who has those whose host connect is under way.
    connecting: Shares,
    /// What only another worker can make room for.
    give_way: Vec<GiveWay>,
    warned: bool,
    dirty: Vec<FlowId>,
    spare: Vec<FlowId>,
    ports: Vec<PortLoad>,
    counters: TcpCounters,
}

/// Where the host socket of a new flow goes.
pub enum Target<'a> {
    /// Where the guest wanted to, if that is allowed.
    Outside(&'a mut Egress),
    /// An address of the outside or the host.
    Address(SocketAddr),
    /// A stream socket of the host's file system.
    Unix(&'a Path),
    /// A service of lanlet's own.
    Service(Service),
}

impl TcpNat {
    /// No flows yet, `flows_max` at most.
    pub fn new(lan: LanConfig, flows_max: usize, now: Instant) -> Self {
        let memory = Arc::new(Budget::new(budget::DEFAULT));
        Self::sharing(lan, flows_max, (Arc::default(), memory), now)
    }

    /// No flows yet, `flows_max` at most together with all others that count theirs in `held` and their
    /// rings in `memory`.
    pub fn sharing(
        lan: LanConfig,
        flows_max: usize,
        (held, memory): (Arc<Held>, Arc<Budget>),
        now: Instant,
    ) -> Self {
        Self {
            lan,
            flows: FlowTable::new(flows_max + OVERDRAFT),
            keys: HashMap::new(),
            // Rounded up: the arena maps whole chunks, the table is what limits.
            arena: Arena::new(flows_max + OVERDRAFT),
            wheel: TimerWheel::new(now),
            flows_max,
            shares: Shares::new(held),
            memory,
            connecting: Shares::new(Arc::default()),
            give_way: Vec::new(),
            warned: false,
            dirty: Vec::new(),
            spare: Vec::new(),
            ports: Vec::new(),
            counters: TcpCounters::default(),
        }
    }

    /// Number of flows.
    pub fn len(&self) -> usize {
        self.flows.len()
    }

    /// Whether guests behind `port` have flows.
    pub fn serves(&self, port: PortId) -> bool {
        let load = self.ports.get(usize::from(port.0));
        load.is_some_and(|load| load.flows > 0)
    }

    /// Whether there is no flow.
    pub fn is_empty(&self) -> bool {
        self.flows.is_empty()
    }

    /// Counters so far.
    pub fn counters(&self) -> TcpCounters {
        self.counters
    }

    /// Takes a guest's segment. `target` says where the host socket of a new flow goes.
    ///
    /// # Errors
    /// The reason to count the segment as dropped for. All have been answered as they should be, except
    /// [`DropReason::OutOfFiles`], [`DropReason::OutOfPorts`] and what [`Egress::admit`] gives.
    pub fn handle_packet<U: Uplink + ?Sized, O: Outbox + ?Sized>(
        &mut self,
        packet: &Packet<'_>,
        (ip, tcp): (&Ip<'_>, &Tcp<'_>),
        target: Target<'_>,
        now: Instant,
        (up, out): (&mut U, &mut O),
    ) -> Result<(), DropReason> {
        if tcp.source_port == 0 || tcp.destination_port == 0 {
            return Err(DropReason::Malformed);
        }
        let key = FlowKey {
            guest: SocketAddr::new(ip.source, tcp.source_port),
            outside: SocketAddr::new(ip.destination, tcp.destination_port),
        };
        let Some(&id) = self.keys.get(&key) else {
            return self.handle_stray(packet, (ip, tcp), key, target, now, (up, out));
        };
        let Some(flow) = self.flows.get_mut(id) else {
            return Err(DropReason::NoFlow);
        };
        // Another guest's by the port, which what was decided about the first says nothing of.
        if flow.port != packet.ingress
            && flow.is_judged
            && let Target::Outside(egress) = target
        {
            let of = (packet.ingress, Protocol::Tcp);
            egress.admit(of, key.outside, now, up)?;
        }
        flow.active_at = now;
        flow.peer.guest = packet.source;
        if flow.port != packet.ingress {
            let before = std::mem::replace(&mut flow.port, packet.ingress);
            let busy = std::mem::take(&mut flow.busy);
            if !flow.from_outside {
                let charged = std::mem::take(&mut flow.charged);
                self.memory.charge(before.into(), charged, 0);
                self.shares.insert(id.slot, packet.ingress.into(), now);
            }
            if flow.is_connecting() {
                self.connecting.insert(id.slot, packet.ingress.into(), now);
            }
            self.leave(before, busy);
            self.load(packet.ingress).flows += 1;
        }
        let Some(flow) = self.flows.get_mut(id) else {
            return Err(DropReason::NoFlow);
        };
        match &mut flow.state {
            State::Connecting(_) => {
                if tcp.flags & Tcp::RST != 0 {
                    self.counters.reset += 1;
                    self.remove(id, up, true);
                }
            }
            State::Open(engine) => {
                flow.touched |= !tcp.payload.is_empty();
                flow.walked.0 += tcp.payload.len();
                if flow.from_outside
                    && tcp.flags & (Tcp::SYN | Tcp::ACK) == Tcp::SYN | Tcp::ACK
                    && engine.phase() == Phase::Handshake
                {
                    let macs = (self.lan.mac, packet.source);
                    let family = Family::of(ip.source);
                    flow.peer = Peer::from_syn(macs, family, tcp, self.lan.mtu);
                }
                if !flow.watched && engine.is_keep_alive(tcp) {
                    flow.watched = true;
                    up.tcp_watch(flow.host);
                }
                let peer = &flow.peer;
                let began_here = !flow.from_outside && engine.phase() == Phase::Handshake;
                let handled = guarded(|| engine.handle_segment(ip, tcp, now, peer, out));
                if handled.is_none() {
                    self.fault(id, up);
                    return Err(DropReason::FlowFault);
                }
                if began_here && engine.phase() == Phase::Open {
                    // Its token comes back.
                    let load = self.load(packet.ingress);
                    load.opens = (load.opens + 1).min(OPENS_BURST);
                }
                self.mark_dirty(id);
            }
        }
        Ok(())
    }

    /// A segment of no flow: the start of one, or answered with RST.
    fn handle_stray<U: Uplink + ?Sized, O: Outbox + ?Sized>(
        &mut self,
        packet: &Packet<'_>,
        (ip, tcp): (&Ip<'_>, &Tcp<'_>),
        key: FlowKey,
        target: Target<'_>,
        now: Instant,
        (up, out): (&mut U, &mut O),
    ) -> Result<(), DropReason> {
        let peer = self.peer(packet, ip, tcp);
        let opens = tcp.flags & (Tcp::SYN | Tcp::ACK | Tcp::RST | Tcp::FIN) == Tcp::SYN;
        let syn = SavedSyn::new(ip, tcp).filter(|_| opens);
        let Some(syn) = syn else {
            if tcp.flags & Tcp::RST == 0 {
                reset(ip.packet, &peer, now, out);
            }
            return Err(DropReason::NoFlow);
        };
        if !self.may_open(packet.ingress, now) {
            self.counters.limited += 1;
            return Err(DropReason::Limit);
        }
        let is_judged = matches!(target, Target::Outside(_));
        let target = match target {
            Target::Outside(egress) => {
                let of = (packet.ingress, Protocol::Tcp);
                Target::Address(egress.admit(of, key.outside, now, up)?)
            }
            target => target,
        };
        if !self.make_room(packet.ingress, now, (&mut *up, &mut *out)) {
            return Err(DropReason::Limit);
        }
        let hops = probe::hops(ip.ttl);
        let opened = self.flows.insert_with(None, |id| {
            let owner = SockOwner::Tcp(id);
            let host = match target {
                Target::Outside(_) => return Err(None),
                Target::Address(to) => up.tcp_connect(to, hops, owner),
                Target::Unix(path) => up.unix_connect(path, owner),
                Target::Service(service) => {
                    up.service_connect(service, (packet.ingress, key.guest), owner)
                }
            }
            .map_err(Some)?;
            let state = State::Connecting(Box::new(syn.clone()));
            let flow = Flow::new(key, packet.ingress, peer, host, state, now);
            Ok(Flow {
                is_judged,
                is_probe: hops.is_some(),
                ..flow
            })
        });
        match opened {
            Ok(id) => {
                self.keys.insert(key, id);
                self.shares.insert(id.slot, packet.ingress.into(), now);
                self.connecting.insert(id.slot, packet.ingress.into(), now);
                self.load(packet.ingress).flows += 1;
                self.arm(id, now + TRANSITORY_IDLE);
                Ok(())
            }
            Err(None) => {
                self.counters.limited += 1;
                Err(DropReason::Limit)
            }
            Err(Some(HostError::Exhausted)) => Err(DropReason::OutOfFiles),
            // The guest's next SYN may find one.
            Err(Some(HostError::NoPort)) => Err(DropReason::OutOfPorts),
            Err(Some(error)) => {
                self.counters.failed += 1;
                answer_failure(&self.lan, &syn, &peer, error, now, out);
                Err(DropReason::HostRefused)
            }
        }
    }

    fn peer(&self, packet: &Packet<'_>, ip: &Ip<'_>, syn: &Tcp<'_>) -> Peer {
        let macs = (self.lan.mac, packet.source);
        Peer::from_syn(macs, Family::of(ip.source), syn, self.lan.mtu)
    }

    /// A segment with this sequence number was too big for a link behind the guest: those of its flow get
    /// smaller, and what is in flight is sent again, once per [`SEND_AGAIN_INTERVAL`]. A report about data that
    /// is not on its way is forged, or too late to matter (RFC 5927 4.1).
    ///
    /// # Errors
    /// The reason to count the report as dropped for.
    pub fn heed<U: Uplink + ?Sized, O: Outbox + ?Sized>(
        &mut self,
        port: PortId,
        (report, sequence): (&TooBig, u32),
        now: Instant,
        (up, out): (&mut U, &mut O),
    ) -> Result<(), DropReason> {
        let TooBig { guest, outside, .. } = *report;
        let id = self.keys.get(&FlowKey { guest, outside }).copied();
        let id = id.ok_or(DropReason::NoFlow)?;
        let flow = self.flows.get_mut(id).filter(|flow| flow.port == port);
        let flow = flow.ok_or(DropReason::NoFlow)?;
        let State::Open(engine) = &mut flow.state else {
            return Err(DropReason::NoFlow);
        };
        if !engine.is_in_flight(sequence) {
            return Err(DropReason::NoFlow);
        }
        if !flow.peer.narrow(Family::of(guest.ip()), report.mtu) {
            return Ok(());
        }
        self.counters.narrowed += 1;
        flow.send_again_due = true;
        if now < flow.send_again_from {
            let at = flow.send_again_from;
            self.arm(id, at);
            return Ok(());
        }
        if guarded(|| flow.send_again(now, out)).is_none() {
            self.fault(id, up);
            return Err(DropReason::FlowFault);
        }
        self.mark_dirty(id);
        Ok(())
    }

    /// Whether the guest's endpoint has a connection with this outside endpoint.
    pub fn has_flow(&self, guest: SocketAddr, outside: SocketAddr) -> bool {
        self.keys.contains_key(&FlowKey { guest, outside })
    }

    /// Takes a connection of the host, which came by a forward, on to a guest: sends a SYN from `shown` and
    /// joins the two. If the guest refuses, the host's connection is reset. On an error the socket stays
    /// the caller's. Room was made by [`TcpNat::make_room_for_client`].
    ///
    /// # Errors
    /// [`DropReason::Limit`]: no flow left, or the guest's endpoint has a connection with `shown`;
    /// [`DropReason::Malformed`]: an address or port is zero, or the families differ.
    pub fn open_to_guest<U: Uplink + ?Sized>(
        &mut self,
        (host, forward): (SockId, ForwardId),
        (guest, mac, port): (SocketAddr, Mac, PortId),
        shown: SocketAddr,
        now: Instant,
        up: &mut U,
    ) -> Result<(), DropReason> {
        let key = FlowKey {
            guest,
            outside: shown,
        };
        if self.keys.contains_key(&key) {
            self.counters.limited += 1;
            return Err(DropReason::Limit);
        }
        let rings = self.arena.socket(rx_ring_bytes(self.flows.len()));
        let rings = rings.ok_or(DropReason::Limit)?;
        let seed = up.random();
        let engine = guarded(|| SmolEngine::connect(rings, seed, (shown, guest), now)).flatten();
        let engine = Box::new(engine.ok_or(DropReason::Malformed)?);
        let peer = Peer::unanswered((self.lan.mac, mac), Family::of(guest.ip()), self.lan.mtu);
        let opened = self.flows.insert_with(None::<HostError>, |_| {
            Ok(Flow::new(key, port, peer, host, State::Open(engine), now))
        });
        let Ok(id) = opened else {
            self.counters.limited += 1;
            return Err(DropReason::Limit);
        };
        up.hand_over(host, SockOwner::Tcp(id));
        self.keys.insert(key, id);
        self.shares.insert(id.slot, forward.into(), now);
        self.load(port).flows += 1;
        self.counters.accepted += 1;
        self.arm(id, now + TRANSITORY_IDLE);
        self.mark_dirty(id);
        Ok(())
    }

    /// Refuses a SYN, or resets a stray segment, without looking for a flow.
    pub fn refuse<O: Outbox + ?Sized>(
        &self,
        packet: &Packet<'_>,
        ip: &Ip<'_>,
        tcp: &Tcp<'_>,
        now: Instant,
        out: &mut O,
    ) {
        if tcp.flags & Tcp::RST == 0 {
            let peer = self.peer(packet, ip, tcp);
            reset(ip.packet, &peer, now, out);
        }
    }

    /// Takes a readiness event of a flow's host socket.
    pub fn handle_ready<U: Uplink + ?Sized, O: Outbox + ?Sized>(
        &mut self,
        id: FlowId,
        ready: Ready,
        now: Instant,
        (up, out): (&mut U, &mut O),
    ) {
        let flows = self.flows.len();
        let Some(flow) = self.flows.get_mut(id) else {
            return;
        };
        flow.host_readable |= ready.readable | ready.error;
        flow.host_writable |= ready.writable;
        flow.last_edge |= ready.last_edge;
        // The error is taken with the question: from here on the flow remembers it.
        if ready.error && !flow.is_connecting() && up.tcp_connected(flow.host).is_err() {
            flow.broken_at.get_or_insert(now);
        }
        if let State::Connecting(syn) = &flow.state {
            // Room to send and nothing wrong: only a connected socket is so.
            let is_connected = ready.writable && !ready.error && !ready.hung_up;
            let connected = match is_connected {
                true => Ok(true),
                false => up.tcp_connected(flow.host),
            };
            match connected {
                Ok(false) => return,
                Ok(true) => {
                    let Some(socket) = self.arena.socket(rx_ring_bytes(flows)) else {
                        // No address space: the next SYN finds the way free.
                        self.counters.limited += 1;
                        self.remove(id, up, true);
                        return;
                    };
                    let (seed, peer) = (up.random(), &flow.peer);
                    let accepted =
                        guarded(|| SmolEngine::accept(socket, seed, syn, now, peer, out));
                    let Some(engine) = accepted else {
                        self.fault(id, up);
                        return;
                    };
                    flow.state = State::Open(Box::new(engine));
                    flow.active_at = now;
                    flow.host_writable = true;
                    if std::mem::take(&mut flow.is_probe) {
                        up.tcp_free_hops(flow.host);
                    }
                    self.connecting.remove(id.slot);
                    self.counters.opened += 1;
                }
                Err(error) => {
                    self.counters.failed += 1;
                    let ended = flow.is_probe.then_some(flow.host);
                    let told = ended.is_some_and(|host| {
                        probe::tell(host, syn.packet(), (&self.lan, flow.peer.guest), (up, out))
                    });
                    if !told {
                        answer_failure(&self.lan, syn, &flow.peer, error, now, out);
                    }
                    self.remove(id, up, false);
                    return;
                }
            }
        }
        self.mark_dirty(id);
    }

    /// Moves bytes and answers the guests, for every flow that something happened to.
    pub fn flush<U: Uplink + ?Sized, O: Outbox + ?Sized>(
        &mut self,
        now: Instant,
        up: &mut U,
        out: &mut O,
    ) {
        if self.dirty.is_empty() {
            return;
        }
        let mut batch = std::mem::replace(&mut self.dirty, std::mem::take(&mut self.spare));
        for id in batch.drain(..) {
            let Some(flow) = self.flows.get_mut(id) else {
                continue;
            };
            flow.dirty = false;
            self.flush_one(id, now, up, out);
        }
        self.spare = batch;
    }

    /// Whether [`TcpNat::flush`] left work that needs no event to go on.
    pub fn has_backlog(&self) -> bool {
        !self.dirty.is_empty()
    }

    fn flush_one<U: Uplink + ?Sized, O: Outbox + ?Sized>(
        &mut self,
        id: FlowId,
        now: Instant,
        up: &mut U,
        out: &mut O,
    ) {
        let Some(flow) = self.flows.get_mut(id) else {
            return;
        };
        let Some(load) = self.ports.get_mut(usize::from(flow.port.0)) else {
            return;
        };
        let was_busy = flow.busy;
        let share =
            (GUEST_SEGMENTS_IN_FLIGHT / load.busy.max(1)).max(1) * usize::from(flow.peer.mss);
        let Some(holder) = self.shares.holder(id.slot) else {
            return;
        };
        let flows = self.shares.held().of(holder);
        let limit = self.memory.limit(holder, flows, flow.charged);
        let share = share.min(limit.unwrap_or(usize::MAX));
        if !std::mem::replace(&mut flow.is_short, limit.is_some()) && limit.is_some() {
            self.counters.short += 1;
        }
        let flushed = guarded(|| {
            let rest = flow.flush((share, limit), now, up, out);
            if limit.is_some() && flow.unused_memory() >= RELEASE_MIN {
                flow.release_memory();
            }
            (rest, flow.poll_timeout(now))
        });
        bound_unsent(flow, load.flows, up);
        let memory = flow.memory();
        if memory != flow.charged {
            self.memory.charge(holder, flow.charged, memory);
            flow.charged = memory;
        }
        self.shares.touch(id.slot, flow.active_at);
        match (was_busy, flow.busy) {
            (false, true) => load.busy += 1,
            (true, false) => load.busy -= 1,
            _ => {}
        }
        match flushed {
            None => self.fault(id, up),
            Some((Rest::Ended, _)) => self.remove(id, up, false),
            Some((Rest::Backlog, _)) => self.mark_dirty(id),
            Some((Rest::Idle, next)) => self.arm(id, next),
        }
    }

    /// When [`TcpNat::handle_timeout`] next has something to do.
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.wheel.poll_timeout()
    }

    /// Runs the timers that are due.
    pub fn handle_timeout<U: Uplink + ?Sized, O: Outbox + ?Sized>(
        &mut self,
        now: Instant,
        up: &mut U,
        out: &mut O,
    ) {
        let mut due = std::mem::take(&mut self.spare);
        self.wheel.expire(now, &mut due);
        for id in due.drain(..) {
            let Some(flow) = self.flows.get_mut(id) else {
                continue;
            };
            // Left over from an earlier deadline: the entry that counts is still to come.
            if flow.armed.is_some_and(|armed| armed > now) {
                continue;
            }
            flow.armed = None;
            if flow.send_again_due
                && now >= flow.send_again_from
                && guarded(|| flow.send_again(now, out)).is_none()
            {
                self.fault(id, up);
                continue;
            }
            if now >= flow.active_at + flow.idle_limit() {
                self.counters.idled_out += 1;
                self.abort(id, now, up, out);
                continue;
            }
            if flow.touched
                && now >= flow.active_at + IDLE_RELEASE
                && guarded(|| flow.release_memory()).is_some()
            {
                // What data waits in stays; nothing else is to be had until something happens.
                flow.touched = false;
            }
            self.flush_one(id, now, up, out);
        }
        self.spare = due;
    }

    /// Ends the connections from a local address that the host has lost; `None`: those from any that is
    /// not the host's own any more.
    pub fn address_gone<U: Uplink + ?Sized, O: Outbox + ?Sized>(
        &mut self,
        address: Option<IpAddr>,
        now: Instant,
        up: &mut U,
        out: &mut O,
    ) {
        let ids: Vec<_> = self.flows.ids().collect();
        for id in ids {
            let Some(flow) = self.flows.get_mut(id) else {
                continue;
            };
            let Some(local) = up.local_address(flow.host) else {
                continue;
            };
            let gone = match address {
                Some(address) => local == address,
                None => !up.is_host_address(local),
            };
            if gone {
                self.counters.readdressed += 1;
                self.abort(id, now, up, out);
            }
        }
    }

    /// Ends the guests' flows that `allowed`, given port and outside endpoint, no longer grants. Those of
    /// forwards and of services are not asked about.
    pub fn review<U: Uplink + ?Sized, O: Outbox + ?Sized>(
        &mut self,
        now: Instant,
        (up, out): (&mut U, &mut O),
        allowed: impl Fn(&mut U, PortId, SocketAddr) -> bool,
    ) {
        let ids: Vec<_> = self.flows.ids().collect();
        for id in ids {
            if let Some(flow) = self.flows.get_mut(id)
                && flow.is_judged
                && !allowed(up, flow.port, flow.key.outside)
            {
                self.counters.revoked += 1;
                self.abort(id, now, up, out);
            }
        }
    }

    /// Ends all flows of the guests behind a port that is gone.
    pub fn forget_port<U: Uplink + ?Sized>(&mut self, port: PortId, up: &mut U) {
        let ids: Vec<_> = self.flows.ids().collect();
        for id in ids {
            if self.flows.get_mut(id).is_some_and(|flow| flow.port == port) {
                self.remove(id, up, true);
            }
        }
    }

    /// Ends a flow with RST on both sides. Of one that is still connecting the guest hears nothing: its next
    /// SYN is treated as a first one.
    fn abort<U: Uplink + ?Sized, O: Outbox + ?Sized>(
        &mut self,
        id: FlowId,
        now: Instant,
        up: &mut U,
        out: &mut O,
    ) {
        if let Some(flow) = self.flows.get_mut(id) {
            let peer = &flow.peer;
            if let State::Open(engine) = &mut flow.state {
                guarded(|| {
                    engine.abort();
                    engine.poll_egress(now, peer, out);
                });
            }
            self.remove(id, up, true);
        }
    }

    fn fault<U: Uplink + ?Sized>(&mut self, id: FlowId, up: &mut U) {
        if self.counters.faults == 0 {
            log::warn!("a TCP flow failed inside its engine and was ended; the others go on");
        }
        self.counters.faults += 1;
        self.remove(id, up, true);
    }

    fn remove<U: Uplink + ?Sized>(&mut self, id: FlowId, up: &mut U, abort: bool) {
        let Some(flow) = self.flows.remove(id) else {
            return;
        };
        self.keys.remove(&flow.key);
        if let Some(holder) = self.shares.holder(id.slot) {
            self.memory.charge(holder, flow.charged, 0);
        }
        self.shares.remove(id.slot);
        self.connecting.remove(id.slot);
        self.leave(flow.port, flow.busy);
        match flow.state {
            State::Connecting(_) => {}
            // Both FINs went through, or the guest's side was reset: then the host's is, too.
            State::Open(_) if !(flow.host_finished && flow.guest_finished) => {
                self.counters.reset += 1;
                up.tcp_abort_on_close(flow.host);
            }
            State::Open(_) if abort => up.tcp_abort_on_close(flow.host),
            State::Open(_) => {}
        }
        up.close(flow.host);
    }

    fn mark_dirty(&mut self, id: FlowId) {
        if let Some(flow) = self.flows.get_mut(id)
            && !flow.dirty
        {
            flow.dirty = true;
            self.dirty.push(id);
        }
    }

    /// Arms the wheel unless it calls for this flow early enough anyway.
    fn arm(&mut self, id: FlowId, deadline: Instant) {
        if let Some(flow) = self.flows.get_mut(id)
            && flow.armed.is_none_or(|armed| deadline < armed)
        {
            flow.armed = Some(self.wheel.arm(id, deadline));
        }
    }
}

/// Calls into the engine; `None` if it panicked. Its flow is then to be ended.
fn guarded<R>(call: impl FnOnce() -> R) -> Option<R> {
    catch_unwind(AssertUnwindSafe(call)).ok()
}

/// Answers a segment of no flow, or a refused SYN, with RST.
fn reset<O: Outbox + ?Sized>(packet: &[u8], peer: &Peer, now: Instant, out: &mut O) {
    guarded(|| device::reset(packet, peer, now, out));
}

/// Tells the guest why its connection failed (RFC 5382 REQ-4 and RFC 1122 4.2.3.9 let it react).
fn answer_failure<O: Outbox + ?Sized>(
    lan: &LanConfig,
    syn: &SavedSyn,
    peer: &Peer,
    error: HostError,
    now: Instant,
    out: &mut O,
) {
    let kind = match error {
        HostError::HostUnreachable | HostError::TimedOut => ErrorKind::HostUnreachable,
        HostError::NetUnreachable => ErrorKind::NetUnreachable,
        HostError::Prohibited => ErrorKind::Prohibited,
        HostError::Refused
        | HostError::Reset
        | HostError::TooBig
        | HostError::Exhausted
        | HostError::NoPort
        | HostError::Other(_) => {
            reset(syn.packet(), peer, now, out);
            return;
        }
    };
    if let Some(len) = write_about(out.buffer(), lan, kind, peer.guest, syn.packet()) {
        out.send(len, Offload::default());
    }
}

#[cfg(test)]
mod tests;
