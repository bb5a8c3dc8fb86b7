//! Datagrams of a forward: passed on to the guest by a session, or held until it is found.

use std::net::{IpAddr, SocketAddr};

use super::super::sessions::{Entrance, Way};
use super::{
    ActiveForwards, HELD_MAX, Listener, ListenerKind, PARKED_TIME, RETRY, Shown, shown_address,
};
use crate::frame::Instant;
use crate::gateway::Outbox;
use crate::gateway::neighbor::Reach;
use crate::nat::{Datagram, FlowId, Uplink};
use crate::stats::DropReason;
use crate::wire::Family;

/// A datagram whose guest is being looked for.
#[derive(Debug)]
pub(super) struct Waiting {
    pub until: Instant,
    pub listener: FlowId,
    pub client: SocketAddr,
    pub destination: Option<IpAddr>,
    pub payload: Vec<u8>,
    pub segment: Option<u16>,
}

impl ActiveForwards {
    pub(super) fn receive<U: Uplink + ?Sized, O: Outbox + ?Sized>(
        &mut self,
        id: FlowId,
        listener: Listener,
        now: Instant,
        (up, out): (&mut U, &mut O),
        drops: &mut dyn FnMut(DropReason),
    ) {
        let ListenerKind::Udp(at) = listener.kind else {
            return;
        };
        let place = self.locate(listener.forward, Family::of(at.ip()), now, out);
        let mut seed = up.random();
        up.recv_from(listener.socket, &mut |datagram| {
            seed = seed.rotate_left(13).wrapping_add(1);
            if let Err(reason) = self.pass_on(id, listener, place, &datagram, seed, now, out) {
                drops(reason);
                if let Some(active) = self.forwards.get_mut(&listener.forward) {
                    active.counters.refused += 1;
                }
            }
        });
    }

    /// Gives a datagram to its guest, or keeps it until the guest is found.
    #[allow(clippy::too_many_arguments)] // what is known of the batch, and of the datagram
    pub(super) fn pass_on<O: Outbox + ?Sized>(
        &mut self,
        id: FlowId,
        listener: Listener,
        place: Option<(IpAddr, Reach)>,
        datagram: &Datagram<'_>,
        seed: u64,
        now: Instant,
        out: &mut O,
    ) -> Result<(), DropReason> {
        let socket = listener.socket;
        let station = match place {
            Some((_, Reach::Known(station))) => station,
            // A session goes on while its guest is asked whether it is still there.
            Some((address, Reach::Stale(station)))
                if self.sessions.has(
                    socket,
                    datagram.source,
                    SocketAddr::new(address, listener.guest_port),
                ) =>
            {
                station
            }
            _ => return self.hold(id, datagram, now),
        };
        let Some((address, _)) = place else {
            return Err(DropReason::NoFlow);
        };
        let active = self.forwards.get_mut(&listener.forward);
        let active = active.ok_or(DropReason::NoFlow)?;
        let shown = shown_address(&self.lan, active.shown, Some(datagram.source), address);
        let way = Way {
            guest: SocketAddr::new(address, listener.guest_port),
            station,
            shown: match shown.ok_or(DropReason::NoFlow)? {
                Shown::Client(client) => client,
                Shown::Gateway(gateway) => SocketAddr::new(gateway, 0),
            },
        };
        let entrance = Entrance {
            forward: listener.forward,
            max: active.max,
            socket,
        };
        let before = self.sessions.counters.opened;
        let sent = self
            .sessions
            .deliver(entrance, way, datagram, seed, now, out);
        active.counters.opened += self.sessions.counters.opened - before;
        sent
    }

    fn hold(
        &mut self,
        listener: FlowId,
        datagram: &Datagram<'_>,
        now: Instant,
    ) -> Result<(), DropReason> {
        if self.held.len() >= HELD_MAX {
            return Err(DropReason::Limit);
        }
        self.held.push_back(Waiting {
            until: now + PARKED_TIME,
            listener,
            client: datagram.source,
            destination: datagram.destination,
            payload: datagram.payload.to_vec(),
            segment: datagram.segment,
        });
        self.retry_at.get_or_insert(now + RETRY);
        Ok(())
    }
}
