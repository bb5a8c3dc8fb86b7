//! Forwards at work: connections and datagrams from outside on their way to guests.
//!
//! # Path
//! ```text
//!  listening socket ready ─► accept ─► which guest? ─► where is it? ─► TcpNat::open_to_guest
//!                                         │ nobody       │ asked
//!                                         └── parked ────┘  again on news and every 250 ms,
//!                                                           reset after 5 s
//! ```
//! Once a connection is on its way it is a TCP flow like others, and outlives its forward. UDP has
//! [`Sessions`], which end with it. A guest's connection to a unix socket of the host is a
//! [`super::super::tcp::Target`] of its own ([`ActiveForwards::unix_target`]).
//!
//! # Several workers
//! Every worker knows every forward, one of them has its sockets. A connection belongs to the worker that
//! its guest's port is at home with, so a forward whose guest turns out to be elsewhere moves there with
//! its sockets and all that waits ([`Moved`]).
//!
//! # Limits
//! [`ACCEPTS_PER_EVENT`] connections are taken at a time, [`PARKED_MAX`] wait for their guest, of which
//! one forward has [`FORWARD_PARKED_MAX`]. At those limits, at that of flows ([`crate::nat::tcp`]) and
//! without a free file, a listening socket rests for [`REST`]: clients wait in the kernel's queue and
//! nothing spins. Datagrams for a guest that
//! is being looked for wait too, [`HELD_MAX`] at most (RFC 1122 2.3.2.2).
//!
//! # Hostile guests and clients
//! A guest that does not answer costs its clients 5 s each. A client that connects and says nothing
//! costs a flow like one that a guest opens, and counts against the same limits.

mod connections;
mod datagrams;
mod moved;

use std::collections::{BTreeMap, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use hashbrown::HashMap;

use self::datagrams::Waiting;
pub use self::moved::Moved;
use super::directory::{Directory, Memory};
use super::sessions::Sessions;
use super::spec::{AllowGuests, Direction, ForwardSpec, Guest, HostEnd, ShownSource};
use super::{ForwardId, SOCKETS_MAX};
use crate::dhcp::lease::LeaseTable;
use crate::frame::{Duration, Instant, Mac, PortId, WorkerId};
use crate::gateway::neighbor::{self, Neighbors, Reach};
use crate::gateway::{LanConfig, Outbox};
use crate::names::GuestName;
use crate::nat::common::Common;
use crate::nat::egress::{self, Egress, Published, is_never_outside};
use crate::nat::flow_table::FlowTable;
use crate::nat::path_mtu::TooBig;
use crate::nat::tcp::TcpNat;
use crate::nat::{Datagram, FlowId, HostError, Ready, SockId, SockOwner, Uplink};
use crate::stats::DropReason;
use crate::wire::{Family, Ip, Packet, Tcp, Udp};

/// Connections taken from one listening socket before others get their turn: an accept and a SYN cost
/// 20 microseconds.
pub const ACCEPTS_PER_EVENT: usize = 64;
/// Connections that wait for their guest. Each has an open file.
pub const PARKED_MAX: usize = 1_024;
/// Those of one forward. Where all are taken, the forward that has most gives up its oldest for one that
/// has less: guests that are gone don't keep others' clients waiting.
pub const FORWARD_PARKED_MAX: usize = PARKED_MAX / 4;
/// How long they wait: a guest that is there answers within milliseconds, one that renews its lease
/// within a second or two.
pub const PARKED_TIME: Duration = Duration::from_secs(5);
/// How often those whose guest is unknown look again.
const RETRY: Duration = Duration::from_millis(250);
/// How long a listening socket rests that can't be served.
pub const REST: Duration = Duration::from_millis(100);
/// Datagrams that wait for their guest, of 64 KiB at most.
pub const HELD_MAX: usize = 64;

/// Where a forward's socket listens.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ListenerKind {
    /// TCP connections are accepted.
    Tcp(SocketAddr),
    /// Datagrams are received.
    Udp(SocketAddr),
    /// Unix stream connections are accepted.
    Unix(AllowGuests),
}

/// What a forward has done.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct ForwardCounters {
    /// Connections passed on, UDP sessions begun.
    pub opened: u64,
    /// Connections reset and datagrams dropped: no guest, or a limit.
    pub refused: u64,
    /// Connections that wait for their guest now.
    pub waiting: usize,
}

impl ForwardCounters {
    /// Adds what another worker counted.
    pub fn add(&mut self, other: Self) {
        self.opened += other.opened;
        self.refused += other.refused;
        self.waiting += other.waiting;
    }
}

/// A forward to a guest, or to a unix socket.
#[derive(Debug)]
struct Active {
    guest: Guest,
    shown: ShownSource,
    /// Connections, or UDP sessions, at a time.
    max: usize,
    memory: Memory,
    sockets: Vec<FlowId>,
    counters: ForwardCounters,
}

/// A socket that belongs to a forward.
#[derive(Debug)]
enum Own {
    /// It listens. May: rest.
    Listener(Listener),
    /// An accepted connection whose guest is being looked for. Moved on to a TCP flow, or reset.
    Parked(Parked),
}

#[derive(Clone, Copy, Debug)]
struct Listener {
    forward: ForwardId,
    socket: SockId,
    kind: ListenerKind,
    guest_port: u16,
}

#[derive(Clone, Copy, Debug)]
struct Parked {
    forward: ForwardId,
    socket: SockId,
    client: Option<SocketAddr>,
    guest_port: u16,
    /// In the queue of those that wait.
    queued: bool,
}

/// The forwards of a network and what is under way by them.
pub struct ActiveForwards {
    lan: LanConfig,
    forwards: BTreeMap<ForwardId, Active>,
    /// Where guests reach unix sockets.
    to_host: HashMap<(IpAddr, u16), (ForwardId, PathBuf)>,
    own: FlowTable<Own>,
    /// By the time they are given up; those that are through already are passed over.
    parked: VecDeque<(Instant, FlowId)>,
    parked_count: usize,
    held: VecDeque<Waiting>,
    resting: VecDeque<(Instant, FlowId)>,
    retry_at: Option<Instant>,
    common: Common,
    /// When questions of this worker's are due again.
    neighbors_at: Option<Instant>,
    /// The neighbours' news that this worker has acted on.
    seen_news: u64,
    /// News came from a guest of this worker: the others look again too.
    announce: bool,
    /// Forwards whose guests are elsewhere.
    leaving: BTreeMap<ForwardId, WorkerId>,
    directory: Directory,
    sessions: Sessions,
    warned: bool,
}

impl ActiveForwards {
    /// None yet.
    pub fn new(lan: LanConfig, common: Common) -> Self {
        Self {
            forwards: BTreeMap::new(),
            to_host: HashMap::new(),
            own: FlowTable::new(SOCKETS_MAX + PARKED_MAX),
            parked: VecDeque::new(),
            parked_count: 0,
            held: VecDeque::new(),
            resting: VecDeque::new(),
            retry_at: None,
            common,
            neighbors_at: None,
            seen_news: 0,
            announce: false,
            leaving: BTreeMap::new(),
            directory: Directory::default(),
            sessions: Sessions::new(lan.clone()),
            warned: false,
            lan,
        }
    }

    /// Where the leases are.
    pub fn set_leases(&mut self, leases: Arc<Mutex<LeaseTable>>) {
        self.directory.set_leases(leases);
    }

    /// A port's name, and its guest's MAC where that is known.
    pub fn name_port(&mut self, port: PortId, name: GuestName, mac: Option<Mac>) {
        self.directory.name_port(port, name, mac);
    }

    /// Learns where guests are.
    #[inline]
    pub fn observe(&mut self, packet: &Packet<'_>, now: Instant) {
        if !Neighbors::is_telling(packet) {
            return;
        }
        let mut neighbors = self.common.neighbors();
        let before = neighbors.news();
        neighbors.observe(packet, now);
        self.announce |= neighbors.news() != before;
    }

    /// Whether a guest of this worker answered to a question that another worker may have asked.
    pub fn take_announcement(&mut self) -> bool {
        std::mem::take(&mut self.announce)
    }

    /// Begins to serve a forward that [`super::ForwardSet`] has taken, with the host's port filled in.
    /// `open` opens the n-th of the sockets that `listeners` tells of; `None`: another worker has it.
    ///
    /// # Errors
    /// A socket can't be had: none is left open.
    pub fn add<U: Uplink + ?Sized>(
        &mut self,
        (id, spec): (ForwardId, &ForwardSpec),
        listeners: &[ListenerKind],
        egress: &mut Egress,
        up: &mut U,
        mut open: impl FnMut(&mut U, usize, SockOwner) -> Result<Option<SockId>, HostError>,
    ) -> Result<(), HostError> {
        let mut active = Active {
            guest: Guest::Own,
            shown: ShownSource::Gateway,
            max: spec.max.map_or(usize::MAX, |max| max.get() as usize),
            memory: Memory::default(),
            sockets: Vec::new(),
            counters: ForwardCounters::default(),
        };
        match &spec.direction {
            Direction::ToHost {
                address,
                port,
                path,
            } => {
                let gateway = std::iter::once(IpAddr::V4(self.lan.address));
                let lan6 = self.lan.v6.into_iter();
                let gateway = gateway
                    .chain(lan6.flat_map(|lan| [lan.address, lan.link_local].map(IpAddr::V6)));
                let at = address.map_or_else(|| gateway.collect(), |address| vec![address]);
                for address in at {
                    let path = PathBuf::from(path.as_str());
                    self.to_host.insert((address, *port), (id, path));
                }
            }
            Direction::ToGuest {
                listen,
                guest,
                ports,
                shown,
            } => {
                (active.guest, active.shown) = (guest.clone(), *shown);
                let first = match listen {
                    HostEnd::Ports(host) => host.ports.map_or(0, |ports| ports.first()),
                    HostEnd::Unix(..) => 0,
                };
                for (n, &kind) in listeners.iter().enumerate() {
                    let nth = match kind {
                        ListenerKind::Tcp(at) | ListenerKind::Udp(at) => at.port() - first,
                        ListenerKind::Unix(_) => 0,
                    };
                    let guest_port = ports.nth(usize::from(nth)).unwrap_or(ports.first());
                    let opened = self.own.insert_with(Some(HostError::Exhausted), |own| {
                        let opened = open(up, n, SockOwner::Forward(own)).map_err(Some)?;
                        Ok(Own::Listener(Listener {
                            forward: id,
                            socket: opened.ok_or(None)?,
                            kind,
                            guest_port,
                        }))
                    });
                    match opened {
                        Ok(own) => active.sockets.push(own),
                        Err(None) => {}
                        Err(Some(error)) => {
                            self.close(&active.sockets, up);
                            return Err(error);
                        }
                    }
                }
                for &kind in listeners {
                    let (protocol, at) = match kind {
                        ListenerKind::Tcp(at) => (egress::Protocol::Tcp, at),
                        ListenerKind::Udp(at) => (egress::Protocol::Udp, at),
                        ListenerKind::Unix(_) => continue,
                    };
                    let id = id.0;
                    egress.publish(Published { id, protocol, at });
                }
            }
        }
        self.forwards.insert(id, active);
        Ok(())
    }

    /// Ends a forward: nothing more comes in by it. Connections under way go on, UDP sessions end.
    pub fn remove<U: Uplink + ?Sized>(&mut self, id: ForwardId, egress: &mut Egress, up: &mut U) {
        let Some(active) = self.forwards.remove(&id) else {
            return;
        };
        egress.withdraw(id.0);
        self.to_host.retain(|_, (of, _)| *of != id);
        self.close(&active.sockets, up);
        for own in self.parked_of(id) {
            self.give_up(own, up);
        }
        self.sessions.remove_forward(id);
    }

    /// The connections that wait for the guest of a forward.
    fn parked_of(&mut self, id: ForwardId) -> Vec<FlowId> {
        let own = &mut self.own;
        let mut is_its =
            |at| matches!(own.get_mut(at), Some(Own::Parked(parked)) if parked.forward == id);
        let waiting = self.parked.iter().map(|&(_, at)| at);
        waiting.filter(|&at| is_its(at)).collect()
    }

    fn close<U: Uplink + ?Sized>(&mut self, sockets: &[FlowId], up: &mut U) {
        for &own in sockets {
            if let Some(Own::Listener(listener)) = self.own.remove(own) {
                up.close(listener.socket);
            }
        }
    }

    /// Whether guests reach any unix socket.
    pub fn has_unix_targets(&self) -> bool {
        !self.to_host.is_empty()
    }

    /// The unix socket that a guest's TCP segment is for; `known`: its flow exists.
    pub fn unix_target(&mut self, ip: &Ip<'_>, tcp: &Tcp<'_>, known: bool) -> Option<&Path> {
        let (id, path) = self.to_host.get(&(ip.destination, tcp.destination_port))?;
        if !known
            && tcp.flags & (Tcp::SYN | Tcp::ACK) == Tcp::SYN
            && let Some(active) = self.forwards.get_mut(id)
        {
            active.counters.opened += 1;
        }
        Some(path)
    }

    /// The UDP session that a guest's datagram belongs to.
    pub fn session(&self, ip: &Ip<'_>, udp: &Udp<'_>) -> Option<FlowId> {
        self.sessions.find(
            SocketAddr::new(ip.source, udp.source_port),
            SocketAddr::new(ip.destination, udp.destination_port),
        )
    }

    /// As [`Sessions::heed`].
    pub fn heed(
        &mut self,
        port: PortId,
        report: &TooBig,
        now: Instant,
    ) -> Option<Result<(), DropReason>> {
        self.sessions.heed(port, report, now)
    }

    /// Sends a guest's datagram to the client of its session.
    ///
    /// # Errors
    /// The reason to count it as dropped for.
    pub fn answer<U: Uplink + ?Sized>(
        &mut self,
        session: FlowId,
        packet: &Packet<'_>,
        (ip, udp): (&Ip<'_>, &Udp<'_>),
        now: Instant,
        up: &mut U,
    ) -> Result<(), DropReason> {
        self.sessions.answer(session, packet, (ip, udp), now, up)
    }

    /// Takes a readiness event of a forward's socket.
    pub fn handle_ready<U: Uplink + ?Sized, O: Outbox + ?Sized>(
        &mut self,
        id: FlowId,
        ready: Ready,
        tcp: &mut TcpNat,
        now: Instant,
        (up, out): (&mut U, &mut O),
        drops: &mut dyn FnMut(DropReason),
    ) {
        match self.own.get_mut(id) {
            Some(&mut Own::Listener(listener)) => match listener.kind {
                ListenerKind::Tcp(_) | ListenerKind::Unix(_) => {
                    self.accept(id, listener, tcp, now, (up, out));
                }
                ListenerKind::Udp(_) => self.receive(id, listener, now, (up, out), drops),
            },
            // Data and the client's FIN keep until the guest takes them.
            Some(Own::Parked(parked)) if ready.error => {
                if up.tcp_connected(parked.socket).is_err() {
                    self.give_up(id, up);
                }
            }
            Some(Own::Parked(_)) | None => {}
        }
    }

    /// Which address the guest of a forward has, and where that is. Nowhere here: the forward leaves.
    fn locate<O: Outbox + ?Sized>(
        &mut self,
        forward: ForwardId,
        family: Family,
        now: Instant,
        out: &mut O,
    ) -> Option<(IpAddr, Reach)> {
        let active = self.forwards.get_mut(&forward)?;
        let mut neighbors = self.common.neighbors();
        let found =
            self.directory
                .find(&active.guest, family, &mut active.memory, &neighbors, now)?;
        let reach = neighbors.look_up(found.address, found.mac, now);
        self.neighbors_at = neighbors.poll_timeout();
        let questions = neighbors.take_questions();
        drop(neighbors);
        for address in questions {
            neighbor::ask(&self.lan, address, out);
        }
        if let Reach::Known(station) | Reach::Stale(station) = reach
            && let Some(home) = self.common.elsewhere(station.port)
        {
            self.leaving.insert(forward, home);
            return None;
        }
        Some((found.address, reach))
    }

    /// Ends a turn: passes on what waited for a guest that has been found.
    pub fn flush<U: Uplink + ?Sized, O: Outbox + ?Sized>(
        &mut self,
        tcp: &mut TcpNat,
        now: Instant,
        (up, out): (&mut U, &mut O),
    ) {
        if self.parked.is_empty() && self.held.is_empty() {
            return;
        }
        let news = self.common.neighbors().news();
        if std::mem::replace(&mut self.seen_news, news) != news {
            self.try_again(tcp, now, (up, out));
        }
    }

    fn try_again<U: Uplink + ?Sized, O: Outbox + ?Sized>(
        &mut self,
        tcp: &mut TcpNat,
        now: Instant,
        (up, out): (&mut U, &mut O),
    ) {
        let waiting: Vec<_> = self.parked.iter().map(|&(_, id)| id).collect();
        for id in waiting {
            self.move_on(id, tcp, now, (up, out));
        }
        let own = &mut self.own;
        self.parked
            .retain(|&(_, id)| matches!(own.get_mut(id), Some(Own::Parked(_))));
        for waiting in std::mem::take(&mut self.held) {
            let Some(&mut Own::Listener(listener)) = self.own.get_mut(waiting.listener) else {
                continue;
            };
            let family = Family::of(waiting.client.ip());
            let place = self.locate(listener.forward, family, now, out);
            if !matches!(place, Some((_, Reach::Known(_)))) {
                self.held.push_back(waiting);
                continue;
            }
            let datagram = Datagram {
                source: waiting.client,
                payload: &waiting.payload,
                segment: waiting.segment,
                ttl: 0,
                tos: 0,
                destination: waiting.destination,
            };
            // It was taken in when it came; what goes wrong from here on is a loss like any other.
            let seed = up.random();
            let _ = self.pass_on(waiting.listener, listener, place, &datagram, seed, now, out);
        }
    }

    /// When [`ActiveForwards::handle_timeout`] next has something to do.
    pub fn poll_timeout(&self) -> Option<Instant> {
        [
            self.retry_at,
            self.resting.front().map(|&(at, _)| at),
            self.neighbors_at,
            self.sessions.poll_timeout(),
        ]
        .into_iter()
        .flatten()
        .min()
    }

    /// Runs the timers that are due.
    pub fn handle_timeout<U: Uplink + ?Sized, O: Outbox + ?Sized>(
        &mut self,
        tcp: &mut TcpNat,
        now: Instant,
        (up, out): (&mut U, &mut O),
    ) {
        if self.neighbors_at.is_some_and(|at| at <= now) {
            let mut neighbors = self.common.neighbors();
            neighbors.handle_timeout(now);
            self.neighbors_at = neighbors.poll_timeout();
            let questions = neighbors.take_questions();
            drop(neighbors);
            for address in questions {
                neighbor::ask(&self.lan, address, out);
            }
        }
        self.sessions.handle_timeout(now);
        while let Some(&(at, id)) = self.resting.front()
            && at <= now
        {
            self.resting.pop_front();
            if let Some(Own::Listener(listener)) = self.own.get_mut(id) {
                up.listen_for(listener.socket, true);
            }
        }
        if self.retry_at.is_none_or(|at| now < at) {
            return;
        }
        self.retry_at = None;
        self.try_again(tcp, now, (up, out));
        while let Some(&(until, id)) = self.parked.front()
            && until <= now
        {
            self.parked.pop_front();
            self.give_up(id, up);
        }
        let before = self.held.len();
        self.held.retain(|waiting| now < waiting.until);
        if before != 0 || !self.parked.is_empty() {
            self.retry_at = Some(now + RETRY);
        }
    }

    /// Forgets the guests behind a port that is gone.
    pub fn forget_port(&mut self, port: PortId) {
        self.common.neighbors().forget_port(port);
        self.directory.forget_port(port);
        self.sessions.forget_port(port);
    }

    /// Whether guests behind `port` have UDP sessions.
    pub fn serves(&self, port: PortId) -> bool {
        self.sessions.serves(port)
    }

    /// UDP sessions now.
    pub fn session_count(&self) -> usize {
        self.sessions.len()
    }

    /// What each forward has done.
    pub fn forwards(&self) -> impl Iterator<Item = (ForwardId, ForwardCounters)> + '_ {
        self.forwards
            .iter()
            .map(|(&id, active)| (id, active.counters))
    }

    /// Counters by the names that `lanlet status` shows.
    pub fn counters(&self) -> impl Iterator<Item = (&'static str, u64)> + use<> {
        let sessions = self.sessions.counters;
        let own = [
            ("forward_sessions_opened", sessions.opened),
            ("forward_sessions_evicted", sessions.evicted),
        ];
        // Of the table that all workers share one of them tells.
        let shared = self.common.is_first();
        let neighbors = shared.then(|| self.common.neighbors().counters());
        own.into_iter().chain(neighbors.into_iter().flatten())
    }
}

/// Whom a guest sees.
enum Shown {
    /// The client itself.
    Client(SocketAddr),
    /// The gateway, by this address, at a port to be chosen.
    Gateway(IpAddr),
}

/// Whom the guest at `guest` sees of a client, `None`: the network has no address for it.
fn shown_address(
    lan: &LanConfig,
    shown: ShownSource,
    client: Option<SocketAddr>,
    guest: IpAddr,
) -> Option<Shown> {
    let answerable = |client: &SocketAddr| {
        shown == ShownSource::Client
            && Family::of(client.ip()) == Family::of(guest)
            && !is_never_outside(client.ip())
            && !lan.holds(client.ip())
    };
    if let Some(client) = client.filter(answerable) {
        // The scope of an address means nothing to a guest.
        return Some(Shown::Client(SocketAddr::new(client.ip(), client.port())));
    }
    let gateway = match (guest, lan.v6) {
        (IpAddr::V4(_), _) => lan.address.into(),
        (IpAddr::V6(guest), Some(lan6)) if guest.is_unicast_link_local() => lan6.link_local.into(),
        (IpAddr::V6(_), Some(lan6)) => lan6.address.into(),
        (IpAddr::V6(_), None) => return None,
    };
    Some(Shown::Gateway(gateway))
}

#[cfg(test)]
mod tests;
