//! The mappings of UDP and ICMP echo: one host socket per guest address and port (or echo identifier),
//! bounded in total and per guest, expiring by class.
//!
//! # State
//! A [`Mapping`] is a host socket, where its guest is reached, and whom the guest wrote to ([`Peers`]).
//! Which packets share one is said by [`Endpoint`]: the guest's end alone, or with a part of the
//! destination. [`table`] keeps them in the order in which they expire; the bound ports of the host are
//! indexed beside it, for guests that write to each other's.
//!
//! # Limits
//! At its own limit a guest address, or a port, loses its least recently used mapping, classes of low value
//! first; one in use ([`IN_USE`]) is not taken, then the newcomer is refused. At the total, and where the
//! host gives no more sockets, the port that has most gives way to those that have less, in use or not.
//!
//! # Hostile guests
//! Every packet with a fresh source port makes a mapping and so a host socket: hence the limits.
//! Forged source addresses count against the total only; keeping them out is the switch's guard.

pub mod peers;
pub mod table;

use std::net::SocketAddr;

use hashbrown::{HashMap, HashSet};

pub use peers::{Dependence, PEERS_MAX, Peers};
pub use table::{Class, GRANULARITY, IN_USE, Limits, Room};

use super::{FlowId, HostError, Instant, SockId, Uplink};
use crate::frame::{PortId, Station};
use crate::stats::DropReason;
use crate::wire::Family;
use table::Table;

/// What a mapping is for.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Endpoint {
    /// The guest's address and port, or echo identifier.
    pub guest: SocketAddr,
    /// The destinations, where only some share the mapping ([`Dependence::part`]).
    pub to: Option<SocketAddr>,
}

/// A guest's way to the outside, with an `S` of its protocol.
#[derive(Debug)]
pub struct Mapping<S> {
    /// The host's socket.
    pub socket: SockId,
    /// The port that is bound to; 0 where there is none.
    pub external: u16,
    /// Where datagrams go: the sender of the newest one from the guest.
    pub station: Station,
    /// Whom the guest wrote to.
    pub peers: Peers,
    /// What its protocol keeps.
    pub state: S,
}

impl<S> Mapping<S> {
    /// The guest's endpoint shows up at `station`. Behind another port, whom it wrote to before counts no
    /// more: that was decided about another guest.
    pub fn move_to(&mut self, station: Station) {
        if self.station.port != station.port {
            self.peers = Peers::default();
        }
        self.station = station;
    }
}

/// What happened to mappings.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct MappingCounters {
    /// Made.
    pub opened: u64,
    /// Ended by their timeout.
    pub expired: u64,
    /// Ended to make room.
    pub evicted: u64,
}

/// Mappings in `N` classes. Low classes are evicted first.
#[derive(Debug)]
pub struct MappingTable<S, const N: usize> {
    table: Table<Mapping<S>, N>,
    externals: HashMap<(Family, u16), FlowId>,
    counters: MappingCounters,
}

impl<S, const N: usize> MappingTable<S, N> {
    /// An empty table.
    pub fn new(classes: [Class; N], limits: Limits) -> Self {
        Self {
            table: Table::new(classes, limits),
            externals: HashMap::new(),
            counters: MappingCounters::default(),
        }
    }

    /// Whether guests behind `port` have mappings.
    pub fn serves(&self, port: PortId) -> bool {
        self.table.count(port) > 0
    }

    /// Mappings, each with a host socket.
    pub fn len(&self) -> usize {
        self.table.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.table.is_empty()
    }

    /// What happened so far.
    pub fn counters(&self) -> MappingCounters {
        self.counters
    }

    /// The mapping of an endpoint.
    pub fn find(&self, key: Endpoint) -> Option<FlowId> {
        self.table.find(key)
    }

    /// A mapping by its id, unless that is stale.
    pub fn get_mut(&mut self, id: FlowId) -> Option<&mut Mapping<S>> {
        self.table.get_mut(id)
    }

    /// The guest's end of a mapping, and the mapping.
    pub fn get_with_guest(&mut self, id: FlowId) -> Option<(SocketAddr, &mut Mapping<S>)> {
        let guest = self.table.guest(id)?;
        Some((guest, self.table.get_mut(id)?))
    }

    /// The ports of the host that mappings' sockets have.
    pub fn externals(&self) -> HashSet<(Family, u16)> {
        self.externals.keys().copied().collect()
    }

    /// The mapping whose socket has this port of the host.
    pub fn at_external(&self, family: Family, port: u16) -> Option<FlowId> {
        self.externals.get(&(family, port)).copied()
    }

    /// Notes that a mapping is used, and in which class it is from here on.
    pub fn touch(&mut self, id: FlowId, class: usize, now: Instant) {
        self.table.touch(id, class, now);
    }

    /// Makes the mapping of `key`, which has none. `open` gives it a socket with the port it is bound to.
    ///
    /// # Errors
    /// [`DropReason::Limit`] at our own limit, [`DropReason::OutOfFiles`] and
    /// [`DropReason::OutOfPorts`] at the host's, and [`DropReason::HostRefused`] for all else that `open` gave.
    pub fn open<U: Uplink + ?Sized>(
        &mut self,
        key: Endpoint,
        station: Station,
        (class, state): (usize, S),
        now: Instant,
        up: &mut U,
        open: impl FnOnce(&mut U, FlowId) -> Result<(SockId, u16), HostError>,
    ) -> Result<FlowId, DropReason> {
        let room = self.table.room(key.guest.ip(), station.port, now);
        self.make_room(room, up).ok_or(DropReason::Limit)?;
        let opened = open(up, self.table.next_id());
        let (socket, external) = opened.map_err(|error| match error {
            HostError::Exhausted => DropReason::OutOfFiles,
            HostError::NoPort => DropReason::OutOfPorts,
            _ => DropReason::HostRefused,
        })?;
        self.counters.opened += 1;
        let mapping = Mapping {
            socket,
            external,
            station,
            peers: Peers::default(),
            state,
        };
        let id = self.table.insert((key, station.port), class, mapping, now);
        if external != 0 {
            let family = Family::of(key.guest.ip());
            self.externals.insert((family, external), id);
        }
        Ok(id)
    }

    /// Mappings of a port.
    pub fn count(&self, port: PortId) -> usize {
        self.table.count(port)
    }

    /// The port that has most, and how many.
    pub fn largest(&self) -> Option<(PortId, usize)> {
        self.table.largest()
    }

    /// Ends the mapping of a port that is missed least, for when the host has no socket left; one in use
    /// only if `any` may go. Whether there was one.
    pub fn give_up<U: Uplink + ?Sized>(
        &mut self,
        port: PortId,
        any: bool,
        now: Instant,
        up: &mut U,
    ) -> bool {
        let room = match any {
            true => self.table.oldest(port, now),
            false => self.table.idle(port, now),
        };
        self.make_room(room, up).is_some()
    }

    fn make_room<U: Uplink + ?Sized>(&mut self, room: Room, up: &mut U) -> Option<()> {
        match room {
            Room::Free => {}
            Room::Evict(id) => {
                self.counters.evicted += 1;
                self.close(id, up);
            }
            Room::None => return None,
        }
        Some(())
    }

    /// Ends a mapping, unless the id is stale.
    pub fn close<U: Uplink + ?Sized>(&mut self, id: FlowId, up: &mut U) {
        let family = self.table.guest(id).map(|guest| Family::of(guest.ip()));
        if let (Some(mapping), Some(family)) = (self.table.remove(id), family) {
            let key = (family, mapping.external);
            // The host may have given the port to another mapping on another address since.
            if self.externals.get(&key) == Some(&id) {
                self.externals.remove(&key);
            }
            up.close(mapping.socket);
        }
    }

    /// Ends the mappings of the guests behind a port that is gone: else the next guest with the address
    /// would hear the peers of the last one.
    pub fn forget_port<U: Uplink + ?Sized>(&mut self, port: PortId, up: &mut U) {
        for id in self.table.ids_where(|mapping| mapping.station.port == port) {
            self.close(id, up);
        }
    }

    /// Takes peers away that `allowed` (asked with the guest's port and end) no longer grants; a mapping
    /// without any ends. For when the rules change; walks the table.
    pub fn review<U: Uplink + ?Sized>(
        &mut self,
        up: &mut U,
        mut allowed: impl FnMut(&mut U, PortId, SocketAddr, SocketAddr) -> bool,
    ) {
        for id in self.table.ids_where(|_| true) {
            let Some((guest, mapping)) = self.get_with_guest(id) else {
                continue;
            };
            let port = mapping.station.port;
            if mapping.peers.retain(|&peer| allowed(up, port, guest, peer)) {
                self.close(id, up);
            }
        }
    }

    /// When [`MappingTable::handle_timeout`] is to be called next.
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.table.poll_timeout()
    }

    /// Ends the mappings whose time is over.
    pub fn handle_timeout<U: Uplink + ?Sized>(&mut self, now: Instant, up: &mut U) {
        while let Some(id) = self.table.expired(now) {
            self.counters.expired += 1;
            self.close(id, up);
        }
    }
}
