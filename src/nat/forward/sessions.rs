//! UDP through forwards: who of the outside talks to which guest.
//!
//! # Path
//! A client's datagram comes in by a forward's socket and goes to the guest from the address that the
//! guest is to see; what the guest answers there leaves by the same socket, from the host's address
//! that the client wrote to. Trains stay trains both ways; what the LAN can't carry is cut.
//!
//! # State
//! A session per socket and client, which ends with its forward. It is found by either end, so both
//! pairs are unique: at the gateway's address each session of one guest endpoint has a port of its own.
//!
//! # Timers
//! Datagrams of both directions refresh (RFC 4787 REQ-6: of a forward the operator says who may).
//! [`TIMEOUTS`]: five minutes once the guest has answered, two before (REQ-5), and less for DNS servers,
//! as REQ-5 a) has it for well-known ports. Never early, late by as much at most.
//!
//! # Limits
//! [`SESSIONS_MAX`]: then the forward that has most loses the one that is unused longest, those without an
//! answer first. At its own limit (`max=N`) a forward loses such a one of its own.
//!
//! # Hostile clients
//! can forge sources and make a session with every datagram. They push out each other and idle
//! sessions of the same forward; whoever talked to the guest a moment ago stays.

use std::collections::VecDeque;
use std::net::{IpAddr, SocketAddr};

use hashbrown::HashMap;

use super::ForwardId;
use crate::frame::{Duration, Instant, PortId, Station};
use crate::gateway::{LanConfig, Outbox};
use crate::nat::flow_table::FlowTable;
use crate::nat::icmp::ttl_to_guest;
use crate::nat::path_mtu::{PathMtu, TooBig};
use crate::nat::shares::{Holder, Shares};
use crate::nat::udp::train::Train;
use crate::nat::{Datagram, FlowId, HostError, Io, SendOptions, SockId, Uplink};
use crate::offload::Gso;
use crate::stats::DropReason;
use crate::wire::{Ip, Packet, Udp};

/// Sessions of all forwards: as many as guests have mappings of their own. One takes 300 bytes and no
/// open file.
pub const SESSIONS_MAX: usize = 8_192;
/// First of the ports that the gateway is seen with where the client's own is not free (RFC 6335 6).
const DYNAMIC_PORT_FIRST: u16 = 49_152;
/// Ports below are the gateway's own services'.
const PRESERVED_PORT_MIN: u16 = 1_024;
/// Ports that are tried. With a quarter of the dynamic ones taken, one in 10^19 clients finds none.
const PORT_TRIES: u32 = 32;
/// Port of DNS servers.
const DNS_PORT: u16 = 53;

const DNS: usize = 0;
const ONE_WAY: usize = 1;
const TWO_WAY: usize = 2;
/// By class: what is asked of a DNS server is answered within seconds.
pub const TIMEOUTS: [Duration; 3] = [
    Duration::from_secs(30),
    Duration::from_secs(120),
    Duration::from_secs(300),
];

/// The ports to try at the gateway for a client: its own, then random ones.
pub(super) fn ports_to_try(own: Option<u16>, mut seed: u64) -> impl Iterator<Item = u16> {
    let own = own.filter(|&port| port >= PRESERVED_PORT_MIN);
    let random = (0..PORT_TRIES).map(move |_| {
        // Knuth's MMIX generator; the high bits are the good ones.
        seed = seed
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        DYNAMIC_PORT_FIRST + (seed >> 50) as u16
    });
    own.into_iter().chain(random)
}

/// A forward's UDP socket.
#[derive(Clone, Copy, Debug)]
pub(super) struct Entrance {
    pub forward: ForwardId,
    /// Sessions that it may have.
    pub max: usize,
    pub socket: SockId,
}

/// Where a session goes, and as whom.
#[derive(Clone, Copy, Debug)]
pub(super) struct Way {
    pub guest: SocketAddr,
    pub station: Station,
    /// Whom the guest sees; port 0: the gateway, with a port to be chosen.
    pub shown: SocketAddr,
}

#[derive(Debug)]
struct Session {
    forward: ForwardId,
    socket: SockId,
    client: SocketAddr,
    /// The host's address that the client wrote to.
    local: Option<IpAddr>,
    guest: SocketAddr,
    station: Station,
    shown: SocketAddr,
    class: usize,
    used: Instant,
    /// To the guest.
    path: PathMtu,
}

/// What the sessions came to.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct SessionCounters {
    /// Sessions begun.
    pub opened: u64,
    /// Sessions that gave way to others.
    pub evicted: u64,
}

/// The sessions of all forwards.
pub(super) struct Sessions {
    lan: LanConfig,
    table: FlowTable<Session>,
    by_client: HashMap<(SockId, SocketAddr), FlowId>,
    by_guest: HashMap<(SocketAddr, SocketAddr), FlowId>,
    /// By class in order of use, lazily: an entry whose session was used since, or has another class, is
    /// put in again or left out when it comes to the front. A session has one entry for each class it
    /// was in, two at most.
    queues: [VecDeque<(Instant, FlowId)>; TIMEOUTS.len()],
    /// Which forwards have the sessions.
    shares: Shares,
    /// The same of those that the guest has not answered in, and of DNS.
    expendable: Shares,
    /// Identification of the packet that was cut last; the first is random (RFC 7739).
    fragment_id: Option<u32>,
    pub counters: SessionCounters,
}

impl Sessions {
    pub fn new(lan: LanConfig) -> Self {
        Self {
            lan,
            table: FlowTable::new(SESSIONS_MAX),
            by_client: HashMap::new(),
            by_guest: HashMap::new(),
            queues: Default::default(),
            shares: Shares::new(Default::default()),
            expendable: Shares::new(Default::default()),
            fragment_id: None,
            counters: SessionCounters::default(),
        }
    }

    /// Whether guests behind `port` have sessions.
    pub fn serves(&self, port: PortId) -> bool {
        self.table
            .iter()
            .any(|session| session.station.port == port)
    }

    pub fn len(&self) -> usize {
        self.table.len()
    }

    /// Whether `client` has a session with this guest by this socket.
    pub fn has(&mut self, socket: SockId, client: SocketAddr, guest: SocketAddr) -> bool {
        let session = self.by_client.get(&(socket, client));
        session
            .and_then(|&id| self.table.get_mut(id))
            .is_some_and(|session| session.guest == guest)
    }

    /// Gives a client's datagram or train to the guest. `seed` is a random number.
    pub fn deliver<O: Outbox + ?Sized>(
        &mut self,
        entrance: Entrance,
        way: Way,
        datagram: &Datagram<'_>,
        seed: u64,
        now: Instant,
        out: &mut O,
    ) -> Result<(), DropReason> {
        let ttl = ttl_to_guest(datagram.ttl)?;
        let id = self.session(entrance, way, datagram.source, seed, now)?;
        let session = self.table.get_mut(id).ok_or(DropReason::NoFlow)?;
        session.station = way.station;
        session.local = datagram.destination;
        session.used = now;
        self.shares.touch(id.slot, now);
        self.expendable.touch(id.slot, now);
        let train = Train {
            lan: &self.lan,
            mtu: session.path.get(self.lan.mtu, now),
            from: session.shown,
            to: session.guest,
            mac: way.station.mac,
            ttl,
            tos: datagram.tos,
            payload: datagram.payload,
            segment: datagram.segment,
        };
        train.send(self.fragment_id.get_or_insert(seed as u32), out)
    }

    fn session(
        &mut self,
        entrance: Entrance,
        way: Way,
        client: SocketAddr,
        seed: u64,
        now: Instant,
    ) -> Result<FlowId, DropReason> {
        if let Some(&id) = self.by_client.get(&(entrance.socket, client)) {
            let same = |session: &mut Session| session.guest == way.guest;
            if self.table.get_mut(id).is_some_and(same) {
                return Ok(id);
            }
            // The forward's guest has another address.
            self.remove(id);
        }
        let free = |at: SocketAddr| !self.by_guest.contains_key(&(way.guest, at));
        let shown = if way.shown.port() == 0 {
            ports_to_try(Some(client.port()), seed)
                .map(|port| SocketAddr::new(way.shown.ip(), port))
                .find(|&at| free(at))
        } else {
            Some(way.shown).filter(|&at| free(at))
        };
        let shown = shown.ok_or(DropReason::Limit)?;
        let own = Holder::from(entrance.forward);
        if self.shares.count(own) >= entrance.max {
            self.evict(own);
        } else if self.table.len() >= SESSIONS_MAX {
            self.evict(self.shares.held().most().0);
        }
        let class = match way.guest.port() {
            DNS_PORT => DNS,
            _ => ONE_WAY,
        };
        let session = Session {
            forward: entrance.forward,
            socket: entrance.socket,
            client,
            local: None,
            guest: way.guest,
            station: way.station,
            shown,
            class,
            used: now,
            path: PathMtu::default(),
        };
        let id = self.table.insert_with(DropReason::Limit, |_| Ok(session))?;
        self.by_client.insert((entrance.socket, client), id);
        self.by_guest.insert((way.guest, shown), id);
        self.queues[class].push_back((now, id));
        self.shares.insert(id.slot, own, now);
        self.expendable.insert(id.slot, own, now);
        self.counters.opened += 1;
        Ok(id)
    }

    /// The session that a guest's datagram belongs to.
    pub fn find(&self, guest: SocketAddr, to: SocketAddr) -> Option<FlowId> {
        if self.by_guest.is_empty() {
            return None;
        }
        self.by_guest.get(&(guest, to)).copied()
    }

    /// Sends a guest's datagram or train to the client of its session.
    pub fn answer<U: Uplink + ?Sized>(
        &mut self,
        id: FlowId,
        packet: &Packet<'_>,
        (ip, udp): (&Ip<'_>, &Udp<'_>),
        now: Instant,
        up: &mut U,
    ) -> Result<(), DropReason> {
        let session = self.table.get_mut(id).ok_or(DropReason::NoFlow)?;
        session.used = now;
        self.shares.touch(id.slot, now);
        self.expendable.touch(id.slot, now);
        session.station = Station {
            mac: packet.source,
            port: packet.ingress,
        };
        if session.class == ONE_WAY {
            session.class = TWO_WAY;
            self.expendable.remove(id.slot);
            self.queues[TWO_WAY].push_back((now, id));
        }
        let segment = match packet.offload.gso {
            Gso::Udp(size) if usize::from(size) < udp.payload.len() => Some(size),
            _ => None,
        };
        let options = SendOptions {
            tos: ip.tos,
            segment,
            ..SendOptions::default()
        };
        let (socket, client) = (session.socket, session.client);
        let sent = match session.local {
            Some(local) => up.send_from(socket, local, client, udp.payload, options),
            None => up.send_to(socket, client, udp.payload, options),
        };
        match sent {
            Io::Done(len) if len >= udp.payload.len() => Ok(()),
            Io::Done(_)
            | Io::Drained(_)
            | Io::Blocked
            | Io::Eof
            | Io::Failed(HostError::Exhausted) => Err(DropReason::HostFull),
            Io::Failed(HostError::TooBig) => Err(DropReason::TooBig),
            Io::Failed(_) => Err(DropReason::HostRefused),
        }
    }

    /// A datagram was too big for a link behind its guest: the session's are cut for a while. `None`: it is of
    /// no session.
    pub fn heed(
        &mut self,
        port: PortId,
        report: &TooBig,
        now: Instant,
    ) -> Option<Result<(), DropReason>> {
        let id = self.find(report.guest, report.outside)?;
        let session = self.table.get_mut(id)?;
        if session.station.port != port {
            return Some(Err(DropReason::NoFlow));
        }
        session.path.learn(report.mtu, self.lan.mtu, now);
        Some(Ok(()))
    }

    /// Ends the session of a forward that is unused longest, those that are missed least first.
    fn evict(&mut self, of: Holder) {
        let oldest = self.expendable.oldest(of).or(self.shares.oldest(of));
        if let Some(id) = oldest.and_then(|slot| self.table.id_at(slot)) {
            self.counters.evicted += 1;
            self.remove(id);
        }
    }

    /// The session of a class that is unused longest, brought to the front of its queue. An entry moves
    /// once for a use of its session, so the work is that of the packets that came.
    fn oldest(&mut self, class: usize) -> Option<FlowId> {
        while let Some(&(stamp, id)) = self.queues[class].front() {
            match self.table.get_mut(id) {
                Some(session) if session.class == class && session.used == stamp => {
                    return Some(id);
                }
                Some(session) if session.class == class => {
                    let used = session.used;
                    self.queues[class].pop_front();
                    self.queues[class].push_back((used, id));
                }
                _ => {
                    self.queues[class].pop_front();
                }
            }
        }
        None
    }

    fn remove(&mut self, id: FlowId) {
        if let Some(session) = self.table.remove(id) {
            self.shares.remove(id.slot);
            self.expendable.remove(id.slot);
            self.by_client.remove(&(session.socket, session.client));
            self.by_guest.remove(&(session.guest, session.shown));
        }
    }

    fn remove_where(&mut self, mut wanted: impl FnMut(&Session) -> bool) {
        let ids: Vec<_> = self.table.ids().collect();
        for id in ids {
            if self
                .table
                .get_mut(id)
                .is_some_and(|session| wanted(session))
            {
                self.remove(id);
            }
        }
    }

    /// Ends the sessions of a forward that is gone.
    pub fn remove_forward(&mut self, forward: ForwardId) {
        self.remove_where(|session| session.forward == forward);
    }

    /// Ends the sessions of the guests behind a port that is gone.
    pub fn forget_port(&mut self, port: PortId) {
        self.remove_where(|session| session.station.port == port);
    }

    /// When [`Sessions::handle_timeout`] next has something to do.
    pub fn poll_timeout(&self) -> Option<Instant> {
        let fronts = self.queues.iter().zip(TIMEOUTS);
        fronts
            .filter_map(|(queue, timeout)| Some(queue.front()?.0 + timeout))
            .min()
    }

    /// Ends the sessions whose time is over.
    pub fn handle_timeout(&mut self, now: Instant) {
        for (class, timeout) in TIMEOUTS.into_iter().enumerate() {
            while self.queues[class]
                .front()
                .is_some_and(|&(stamp, _)| stamp + timeout <= now)
            {
                let Some(id) = self.oldest(class) else {
                    break;
                };
                let session = self.table.get_mut(id);
                if session.is_some_and(|session| session.used + timeout <= now) {
                    self.remove(id);
                }
            }
        }
    }
}
