//! How many flows there may be, and who gives way when there are as many.
//!
//! # Fair shares
//! A flow counts for its port, or for the forward that it came by ([`Holder`]). One holder has [`SHARE`] of
//! all flows at most, and so have all forwards together: clients from outside leave the guests' own
//! flows a quarter. At the limit a newcomer takes the place of the longest idle flow of whoever has
//! most, if that is more than the newcomer's side has with it. It does not matter how idle that flow is: a
//! guest that keeps thousands fresh has no right to more than others. Both of its sides are reset, unless its
//! host connect is under way: then it is as if its SYN had been refused. Who has most itself gets a place
//! only for one of its own flows that idled for [`EVICTABLE_IDLE`].
//!
//! # Refusals
//! A SYN that is refused is dropped and counted, so that the guest repeats it and gets through once
//! there is room; Linux does the same where its table of connections or a listener's queue is full. A RST
//! would say that nobody listens there, and ICMP would end the attempt (RFC 5508 REQ-8 has it for
//! datagrams). Clients of a forward wait in the kernel's queue.
//!
//! # Several workers
//! The limit is that of all workers' flows, and each can end its own only. Where another has the flow
//! that is to go, it is asked to ([`GiveWay`]), and the newcomer gets in at once: [`OVERDRAFT`] flows above
//! the limit at most.

use super::TcpNat;
use super::flow::Flow;
use crate::frame::{Duration, Instant, PortId};
use crate::gateway::Outbox;
use crate::nat::Uplink;
use crate::nat::forward::ForwardId;
use crate::nat::shares::{Held, Holder};

/// Flows whose host connect is under way, at most. Each costs a host socket and 200 bytes; Linux
/// keeps as many half-open connections in a listener's queue (net.core.somaxconn). At the limit the
/// oldest of the port that has most gives way.
pub const CONNECTING_MAX: usize = 4_096;
/// What one port may have of [`CONNECTING_MAX`]: half, so that a guest whose connects all hang leaves
/// the others room.
pub const PORT_CONNECTING_MAX: usize = CONNECTING_MAX / 2;
/// Numerator and denominator of one holder's share of all flows, and of what all forwards have together:
/// 12,288 of the default 16,384.
pub const SHARE: (usize, usize) = (3, 4);
/// Idle time after which a flow may be ended to make room for another one of the same holder. RFC 5382
/// REQ-5's two hours are for a NAT that has room; a connection that says nothing for five minutes is the
/// one missed least.
pub const EVICTABLE_IDLE: Duration = Duration::from_secs(300);
/// Flows above the limit while other workers are asked to make room: as many as a turn of epoll brings.
pub const OVERDRAFT: usize = 64;
/// Handshakes per second that one port may begin and not complete. A connect costs the worker some 20
/// microseconds: a guest that floods with SYNs takes a fifth of it at most. Beyond, SYNs are dropped
/// like lost ones and come again after a second. Completed handshakes are not limited by rate: they
/// cost the guest as much as the worker.
pub const OPENS_PER_SEC: u64 = 10_000;
/// The same at once: as many as may be connecting.
pub const OPENS_BURST: u64 = CONNECTING_MAX as u64;
/// Packets on their way to one port at most, over all its flows: half of the queue of 16,384 entries
/// that its tap has, each of which holds one packet for a guest without TSO.
pub const GUEST_SEGMENTS_IN_FLIGHT: usize = 8_192;

/// Memory of a flow's rings that no data waits in is given back from here on where its holder is short of it:
/// below, the system calls would cost more than the pages.
pub(super) const RELEASE_MIN: usize = 16 * 1024;

/// What a host socket takes that the network has not (TCP_NOTSENT_LOWAT), by the flows of its port. The kernel
/// lets an unread connection have megabytes; what is in flight is not bounded by this, and of many flows none
/// needs much: the worker is a wake-up away. In sum 560 MiB of 12,288 flows that nobody reads, where the kernel's
/// own bound is 4 MiB (net.ipv4.tcp_wmem).
const UNSENT: [(usize, Option<u32>); 5] = [
    // With a bound of 2 MiB one stream up was at 0.9 of what it is without.
    (32, None),
    (64, Some(2 << 20)),
    (512, Some(256 << 10)),
    (2_048, Some(64 << 10)),
    (usize::MAX, Some(UNSENT_MIN)),
];

/// The least bound. A flow that has sent less needs none, and that of most connections costs no system call.
const UNSENT_MIN: u32 = 16 << 10;

/// Bounds what the host socket of `flow` takes, one of `flows` of its port, once it has sent enough for that.
pub(super) fn bound_unsent<U: Uplink + ?Sized>(flow: &mut Flow, flows: usize, up: &mut U) {
    if flow.is_unsent_bounded || flow.sent < UNSENT_MIN {
        return;
    }
    flow.is_unsent_bounded = true;
    let class = UNSENT.iter().find(|(most, _)| flows <= *most);
    if let Some((_, Some(bytes))) = class {
        up.tcp_bound_unsent(flow.host, *bytes);
    }
}

/// What is lacking.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Shortage {
    /// Flows are at their limit.
    Flows,
    /// The process has no file left.
    Files,
}

/// A request to the other workers: those that have flows of `holder` end the longest idle ones, as many in sum
/// as are lacking.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct GiveWay {
    /// Who holds most.
    pub holder: Holder,
    /// Why.
    pub shortage: Shortage,
}

/// Flows of one port, those from outside included.
#[derive(Clone, Copy)]
pub(super) struct PortLoad {
    pub flows: usize,
    /// Those with data on its way to the guest.
    pub busy: usize,
    /// Handshakes that the port may still begin, and when that was last brought up to date.
    pub opens: u64,
    filled_at: Instant,
}

impl Default for PortLoad {
    fn default() -> Self {
        Self {
            flows: 0,
            busy: 0,
            opens: OPENS_BURST,
            filled_at: Instant::ZERO,
        }
    }
}

/// What has to happen before a flow can be added.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Room {
    /// Nothing.
    Free,
    /// The flow in this slot has to go.
    Evict(u32),
    /// One of this holder's has to go, which another worker has.
    Elsewhere(Holder),
    /// There is none for this newcomer.
    None,
}

impl TcpNat {
    /// Who has the flows of all workers.
    pub fn held(&self) -> &Held {
        self.shares.held()
    }

    fn share(&self) -> usize {
        (self.flows_max * SHARE.0 / SHARE.1).max(1)
    }

    /// Whether `of`, which may have `most`, can have another flow.
    fn room(&self, of: Holder, most: usize, now: Instant) -> Room {
        let (held, share) = (self.held(), self.share());
        let own = held.of(of);
        if own >= most.min(share) {
            return self.idle(of, now);
        }
        let outside_full = of.is_forward() && held.of_forwards() >= share;
        if !outside_full && held.total() < self.flows_max {
            return Room::Free;
        }
        let (largest, count) = match outside_full {
            true => held.most_of_forwards(),
            false => held.most(),
        };
        if count <= own + 1 {
            return self.idle(of, now);
        }
        match self.shares.oldest(largest) {
            Some(slot) => Room::Evict(slot),
            None if held.total() < self.flows_max + OVERDRAFT => Room::Elsewhere(largest),
            None => Room::None,
        }
    }

    /// The longest idle flow of a holder, if it may go for another one of the same.
    fn idle(&self, of: Holder, now: Instant) -> Room {
        let oldest = self.shares.oldest(of);
        let is_idle = |&slot: &u32| {
            let flow = self.flows.at(slot);
            flow.is_some_and(|flow| now >= flow.active_at + EVICTABLE_IDLE)
        };
        oldest.filter(is_idle).map_or(Room::None, Room::Evict)
    }

    /// Makes room for a flow that a guest begins; `false`: there is none.
    pub(super) fn make_room<U: Uplink + ?Sized, O: Outbox + ?Sized>(
        &mut self,
        port: PortId,
        now: Instant,
        (up, out): (&mut U, &mut O),
    ) -> bool {
        let own = self.connecting.count(port.into());
        let connecting = self.connecting.held();
        let mut made = own < PORT_CONNECTING_MAX;
        if made && connecting.total() >= CONNECTING_MAX {
            let (largest, count) = connecting.most();
            let oldest = self.connecting.oldest(largest);
            match oldest.filter(|_| count > own + 1) {
                Some(slot) => self.evict(slot, now, (&mut *up, &mut *out)),
                None => made = false,
            }
        }
        if made {
            let room = self.room(port.into(), usize::MAX, now);
            made = self.take(room, now, (up, out));
        }
        self.counters.limited += u64::from(!made);
        made
    }

    /// Whether a forward that may have `max` flows can have another one.
    pub fn has_room_for_client(&self, (forward, max): (ForwardId, usize), now: Instant) -> bool {
        self.room(forward.into(), max, now) != Room::None
    }

    /// Makes room for a client's connection; `false`: there is none.
    pub fn make_room_for_client<U: Uplink + ?Sized, O: Outbox + ?Sized>(
        &mut self,
        (forward, max): (ForwardId, usize),
        now: Instant,
        io: (&mut U, &mut O),
    ) -> bool {
        let room = self.room(forward.into(), max, now);
        let made = self.take(room, now, io);
        self.counters.limited += u64::from(!made);
        made
    }

    fn take<U: Uplink + ?Sized, O: Outbox + ?Sized>(
        &mut self,
        room: Room,
        now: Instant,
        io: (&mut U, &mut O),
    ) -> bool {
        if room == Room::Free {
            return true;
        }
        if !std::mem::replace(&mut self.warned, true) {
            log::warn!(
                "TCP flows are at a limit ({} in all, --max-flows): whoever has most loses its longest \
                 idle one to those who have less, its own new ones have to wait",
                self.flows_max
            );
        }
        match room {
            Room::Free => {}
            Room::Evict(slot) => self.evict(slot, now, io),
            Room::Elsewhere(holder) => self.ask(holder, Shortage::Flows),
            Room::None => return false,
        }
        true
    }

    fn ask(&mut self, holder: Holder, shortage: Shortage) {
        let request = GiveWay { holder, shortage };
        if !self.give_way.contains(&request) {
            self.give_way.push(request);
        }
    }

    /// What the other workers are to be asked.
    pub fn poll_give_way(&mut self) -> Option<GiveWay> {
        self.give_way.pop()
    }

    /// Another worker needs room.
    pub fn handle_give_way<U: Uplink + ?Sized, O: Outbox + ?Sized>(
        &mut self,
        GiveWay { holder, shortage }: GiveWay,
        now: Instant,
        (up, out): (&mut U, &mut O),
    ) {
        if shortage == Shortage::Files {
            // One file is enough: the first that has a flow gives it.
            if self.shares.oldest(holder).is_some() && self.held().claim_file() {
                self.give_up(holder, now, (up, out));
            }
            return;
        }
        while self.is_overdrawn(holder) && self.give_up(holder, now, (&mut *up, &mut *out)) {}
    }

    /// Whether there are more flows than may be, of all or of all forwards.
    fn is_overdrawn(&self, holder: Holder) -> bool {
        let held = self.held();
        held.total() > self.flows_max || (holder.is_forward() && held.of_forwards() > self.share())
    }

    /// Ends a holder's longest idle flow. Returns whether it has one here.
    pub fn give_up<U: Uplink + ?Sized, O: Outbox + ?Sized>(
        &mut self,
        of: Holder,
        now: Instant,
        io: (&mut U, &mut O),
    ) -> bool {
        let oldest = self.shares.oldest(of);
        if let Some(slot) = oldest {
            self.evict(slot, now, io);
        }
        oldest.is_some()
    }

    /// Ends a holder's longest idle flow, if it idled for [`EVICTABLE_IDLE`]. Returns whether there was one.
    pub fn give_up_idle<U: Uplink + ?Sized, O: Outbox + ?Sized>(
        &mut self,
        of: Holder,
        now: Instant,
        io: (&mut U, &mut O),
    ) -> bool {
        match self.idle(of, now) {
            Room::Evict(slot) => self.evict(slot, now, io),
            _ => return false,
        }
        true
    }

    /// No file is left: `holder`, which has most of them, is to give one up. Returns whether it did.
    pub fn give_up_file<U: Uplink + ?Sized, O: Outbox + ?Sized>(
        &mut self,
        holder: Holder,
        now: Instant,
        io: (&mut U, &mut O),
    ) -> bool {
        let given = self.give_up(holder, now, io);
        if !given {
            self.held().want_file();
            self.ask(holder, Shortage::Files);
        }
        given
    }

    /// No file is left for a client of a forward: whoever has most flows is to give one up, if that is more
    /// than the forward has with the new one. Returns whether it did.
    pub fn give_up_file_for_client<U: Uplink + ?Sized, O: Outbox + ?Sized>(
        &mut self,
        forward: ForwardId,
        now: Instant,
        io: (&mut U, &mut O),
    ) -> bool {
        let (largest, count) = self.held().most();
        match count > self.held().of(forward.into()) + 1 {
            true => self.give_up_file(largest, now, io),
            false => self.give_up_idle(forward.into(), now, io),
        }
    }

    fn evict<U: Uplink + ?Sized, O: Outbox + ?Sized>(
        &mut self,
        slot: u32,
        now: Instant,
        (up, out): (&mut U, &mut O),
    ) {
        if let Some(id) = self.flows.id_at(slot) {
            self.counters.evicted += 1;
            self.abort(id, now, up, out);
        }
    }

    /// Takes a token of the port's rate of handshakes; who completes one gives it back.
    pub(super) fn may_open(&mut self, port: PortId, now: Instant) -> bool {
        let load = self.load(port);
        let passed = (now - load.filled_at)
            .total_micros()
            .saturating_mul(OPENS_PER_SEC)
            / 1_000_000;
        if passed > 0 && now > load.filled_at {
            load.opens = (load.opens + passed).min(OPENS_BURST);
            load.filled_at = now;
        }
        let may = load.opens > 0;
        load.opens = load.opens.saturating_sub(1);
        may
    }

    pub(super) fn load(&mut self, port: PortId) -> &mut PortLoad {
        let index = usize::from(port.0);
        if self.ports.len() <= index {
            self.ports.resize(index + 1, PortLoad::default());
        }
        &mut self.ports[index]
    }

    /// Takes a flow off its port's load.
    pub(super) fn leave(&mut self, port: PortId, busy: bool) {
        let load = self.load(port);
        load.flows -= 1;
        load.busy -= usize::from(busy);
    }
}
