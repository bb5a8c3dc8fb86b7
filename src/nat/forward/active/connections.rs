//! Connections of a forward: accepted, passed on to the guest, or parked until it is found.

use std::net::SocketAddr;

use super::super::ForwardId;
use super::super::sessions::ports_to_try;
use super::{
    ACCEPTS_PER_EVENT, ActiveForwards, FORWARD_PARKED_MAX, Listener, Own, PARKED_MAX, PARKED_TIME,
    Parked, REST, RETRY, Shown, shown_address,
};
use crate::frame::{Instant, Station};
use crate::gateway::Outbox;
use crate::gateway::neighbor::Reach;
use crate::nat::tcp::TcpNat;
use crate::nat::{FlowId, HostError, SockId, SockOwner, Uplink};
use crate::wire::Family;

impl ActiveForwards {
    pub(super) fn accept<U: Uplink + ?Sized, O: Outbox + ?Sized>(
        &mut self,
        id: FlowId,
        listener: Listener,
        tcp: &mut TcpNat,
        now: Instant,
        (up, out): (&mut U, &mut O),
    ) {
        for _ in 0..ACCEPTS_PER_EVENT {
            let of = self.with_max(listener.forward);
            if self.is_full(listener.forward) || !tcp.has_room_for_client(of, now) {
                self.rest(id, listener.socket, now, up);
                return;
            }
            let accepted = self.own.insert_with(Some(HostError::Exhausted), |own| {
                let accepted = up.accept(listener.socket, SockOwner::Forward(own));
                let (socket, client) = accepted.map_err(Some)?.ok_or(None)?;
                Ok(Own::Parked(Parked {
                    forward: listener.forward,
                    socket,
                    client,
                    guest_port: listener.guest_port,
                    queued: false,
                }))
            });
            match accepted {
                Ok(own) => self.move_on(own, tcp, now, (up, out)),
                Err(None) => return,
                Err(Some(HostError::Exhausted))
                    if tcp.give_up_file_for_client(listener.forward, now, (up, out)) => {}
                // Too many at once that are refused.
                Err(Some(HostError::Prohibited)) => {
                    self.rest(id, listener.socket, now, up);
                    return;
                }
                Err(Some(error)) => {
                    if !std::mem::replace(&mut self.warned, true) {
                        log::warn!(
                            "connections to forwards have to wait, none can be taken: {error:?} (raise \
                             the limit on open files, ulimit -n, if that is it)"
                        );
                    }
                    self.rest(id, listener.socket, now, up);
                    return;
                }
            }
        }
    }

    /// A forward, with what it may have of connections.
    fn with_max(&self, forward: ForwardId) -> (ForwardId, usize) {
        let max = self.forwards.get(&forward).map(|active| active.max);
        (forward, max.unwrap_or(usize::MAX))
    }

    fn waiting(&self, forward: ForwardId) -> usize {
        let active = self.forwards.get(&forward);
        active.map_or(0, |active| active.counters.waiting)
    }

    /// Whether no more connections may wait for the guest of a forward.
    pub(super) fn is_full(&self, forward: ForwardId) -> bool {
        let waiting = self.waiting(forward);
        waiting >= FORWARD_PARKED_MAX
            || (self.parked_count >= PARKED_MAX && self.fullest().1 <= waiting + 1)
    }

    /// The forward whose guest most connections wait for, and how many.
    fn fullest(&self) -> (ForwardId, usize) {
        let waiting = self
            .forwards
            .iter()
            .map(|(&id, active)| (active.counters.waiting, id));
        let (waiting, id) = waiting.max().unwrap_or((0, ForwardId(0)));
        (id, waiting)
    }

    /// Stops to hear of a listening socket for a while.
    fn rest<U: Uplink + ?Sized>(&mut self, id: FlowId, socket: SockId, now: Instant, up: &mut U) {
        up.listen_for(socket, false);
        self.resting.push_back((now + REST, id));
    }

    /// Passes a connection on to its guest, if that can be reached, else lets it wait.
    pub(super) fn move_on<U: Uplink + ?Sized, O: Outbox + ?Sized>(
        &mut self,
        id: FlowId,
        tcp: &mut TcpNat,
        now: Instant,
        (up, out): (&mut U, &mut O),
    ) {
        let Some(&mut Own::Parked(parked)) = self.own.get_mut(id) else {
            return;
        };
        let family = parked.client.map_or(Family::V4, |at| Family::of(at.ip()));
        let place = self.locate(parked.forward, family, now, out);
        let Some((address, Reach::Known(station))) = place else {
            if !parked.queued {
                self.park(id, now + PARKED_TIME, now, up);
            }
            return;
        };
        let shown = self
            .forwards
            .get(&parked.forward)
            .map(|active| active.shown);
        let shown = shown.unwrap_or_default();
        let guest = SocketAddr::new(address, parked.guest_port);
        let at = shown_address(&self.lan, shown, parked.client, address);
        let at = at.and_then(|at| match at {
            Shown::Client(client) => Some(client).filter(|&at| !tcp.has_flow(guest, at)),
            Shown::Gateway(gateway) => {
                let own = parked.client.map(|client| client.port());
                ports_to_try(own, up.random())
                    .map(|port| SocketAddr::new(gateway, port))
                    .find(|&at| !tcp.has_flow(guest, at))
            }
        });
        let of = self.with_max(parked.forward);
        if at.is_some() && !tcp.make_room_for_client(of, now, (&mut *up, &mut *out)) {
            if !parked.queued {
                self.park(id, now + PARKED_TIME, now, up);
            }
            return;
        }
        let opened = at.is_some_and(|at| {
            let Station { mac, port } = station;
            let host = (parked.socket, parked.forward);
            tcp.open_to_guest(host, (guest, mac, port), at, now, up)
                .is_ok()
        });
        if !opened {
            self.give_up(id, up);
            return;
        }
        self.unpark(id);
        if let Some(active) = self.forwards.get_mut(&parked.forward) {
            active.counters.opened += 1;
        }
    }

    /// Takes a connection out; its socket is the caller's.
    pub(super) fn unpark(&mut self, id: FlowId) -> Option<Parked> {
        let Some(Own::Parked(parked)) = self.own.remove(id) else {
            return None;
        };
        self.parked_count -= usize::from(parked.queued);
        if let Some(active) = self.forwards.get_mut(&parked.forward) {
            active.counters.waiting -= usize::from(parked.queued);
        }
        Some(parked)
    }

    /// Lets a connection wait for its guest. Where as many wait as may, the forward with most of them gives up
    /// the one that waits longest.
    pub(super) fn park<U: Uplink + ?Sized>(
        &mut self,
        id: FlowId,
        until: Instant,
        now: Instant,
        up: &mut U,
    ) {
        if self.parked_count >= PARKED_MAX {
            let (fullest, _) = self.fullest();
            if let Some(&oldest) = self.parked_of(fullest).first() {
                self.give_up(oldest, up);
            }
        }
        let Some(Own::Parked(parked)) = self.own.get_mut(id) else {
            return;
        };
        parked.queued = true;
        if let Some(active) = self.forwards.get_mut(&parked.forward) {
            active.counters.waiting += 1;
        }
        self.parked_count += 1;
        // One that came from another worker has waited already.
        let later = self.parked.partition_point(|&(others, _)| others <= until);
        self.parked.insert(later, (until, id));
        self.retry_at.get_or_insert(now + RETRY);
    }

    /// Resets a connection.
    pub(super) fn give_up<U: Uplink + ?Sized>(&mut self, id: FlowId, up: &mut U) {
        let Some(parked) = self.unpark(id) else {
            return;
        };
        up.tcp_abort_on_close(parked.socket);
        up.close(parked.socket);
        if let Some(active) = self.forwards.get_mut(&parked.forward) {
            active.counters.refused += 1;
        }
    }
}
