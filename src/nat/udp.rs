//! UDP through the NAT: a host socket per guest address and port, or per destination as well.
//!
//! # Path
//! `from_guest`: a datagram's payload goes to the mapping's socket as it is; headers are the kernel's
//! business, but TTL, DSCP, ECN and DF, which go along. A train (UDP segmentation offload) goes in one
//! call and stays one packet as far down as the host's device can cut it. `to_guest`: what the socket
//! receives gets headers again; a train that the kernel coalesced becomes one super-frame, what is
//! longer than the LAN's MTU fragments. Checksums are left to the egress port. What the host hears of
//! a datagram's fate, `icmp::reported` passes on.
//!
//! # State
//! One mapping per guest address and port whatever the destination, or for each destination address or
//! endpoint, as [`UdpBehaviour::mapping`] says (RFC 4787 4.1), on the same host port where that is free
//! and at least of the same parity (REQ-3, REQ-4). It remembers whom the guest wrote to;
//! [`UdpBehaviour::filtering`] says what of that who gets through has to match (RFC 4787 5): the socket
//! is open to the whole of the host's networks, its guest need not be.
//!
//! # Hairpinning
//! A guest that writes to the host's own address and another mapping's port gets through (REQ-9): the
//! kernel carries the datagram from one socket to the other, so that the receiver sees the sender's
//! outside endpoint (REQ-9 a) and its filter applies. That is asked again for each datagram: the port may
//! be a service's of the host by then.
//!
//! # Timers
//! A use in either direction refreshes (REQ-6; inbound counts only from whom the guest wrote to, so that
//! no stranger keeps a mapping alive). Between 10 and 300 seconds by class, see `CLASSES`.
//!
//! # Limits
//! [`LIMITS`], or the host's on open files; [`MappingTable`] says who gives way. A guest that gets no
//! mapping hears that it is prohibited (RFC 5508 REQ-8), from [`super::Nat`]. What the host's socket does not take is dropped
//! ([`DropReason::HostFull`]): UDP has no back-pressure.
//!
//! # Hostile guests
//! A guest can use up its own mappings, and host ports above 1023 as any program on the host can. It
//! can't reach what [`Egress`] refuses; that is asked once per peer.

mod to_guest;
pub(super) mod train;

use std::net::SocketAddr;

use super::egress::{Egress, Protocol};
use super::icmp::reported::{self, Way};
use super::icmp::{ErrorKind, ErrorSender, explain, send_again};
use super::mapping::{Class, Dependence, Endpoint, Limits, Mapping, MappingCounters, MappingTable};
use super::path_mtu::{PathMtu, TooBig};
use super::{Duration, FlowId, HostError, Instant, Ready, SendOptions, SockId, SockOwner, Uplink};
use crate::frame::{PortId, Station};
use crate::gateway::{LanConfig, Outbox};
use crate::offload::Gso;
use crate::stats::DropReason;
use crate::wire::{Family, Ip, Packet, Udp};
use to_guest::ToGuest;

/// Bounds by default. Each mapping is an open file: where a process may have 20,000 of them, TCP keeps
/// its 10,000. A guest that resolves for a whole network has 2,048 queries under way.
pub const LIMITS: Limits = Limits {
    total: 8192,
    per_guest: 2048,
    per_port: 6144,
};

/// Destination port of DNS (RFC 1035 4.2.1).
const DNS_PORT: u16 = 53;

/// Attempts at a port of the right parity: the neighbour of a port that the host chose is free unless
/// most are taken, and then every second choice is right.
const PARITY_ATTEMPTS: usize = 4;

/// Only DNS, and every query answered.
const RESOLVED: usize = 0;
/// Only DNS.
const RESOLVING: usize = 1;
/// Nothing came back yet.
const ONE_WAY: usize = 2;
/// Both directions were used.
const TWO_WAY: usize = 3;

/// How long mappings live after their last use. RFC 4787 REQ-5: not less than two minutes, five
/// recommended; well-known destination ports may have less (REQ-5 a). A DNS client that got its answer
/// is done (a second query of the same socket, AAAA beside A, counts as open until answered); one that
/// did not retries within seconds, which refreshes.
const CLASSES: [Class; 4] = [
    Class {
        timeout: Duration::from_secs(10),
        expendable: true,
    },
    Class {
        timeout: Duration::from_secs(30),
        expendable: false,
    },
    Class {
        timeout: Duration::from_secs(120),
        expendable: false,
    },
    Class {
        timeout: Duration::from_secs(300),
        expendable: false,
    },
];

/// How mappings are made and who gets through them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct UdpBehaviour {
    /// Which destinations share a mapping.
    pub mapping: Dependence,
    /// How far who sends to a mapping must be whom its guest wrote to.
    pub filtering: Dependence,
}

impl Default for UdpBehaviour {
    /// What RFC 4787 requires of mapping (REQ-1), and recommends of filtering where more than the most
    /// transparency is wanted (REQ-8).
    fn default() -> Self {
        Self {
            mapping: Dependence::EndpointIndependent,
            filtering: Dependence::AddressDependent,
        }
    }
}

/// What UDP keeps of a mapping.
#[derive(Debug)]
struct State {
    /// Something came back.
    replied: bool,
    /// All destinations so far were DNS servers.
    dns_only: bool,
    /// Datagrams out and not answered, of a `dns_only` mapping.
    queries: u32,
    /// Some of its peers are mappings of this NAT.
    hairpins: bool,
    /// To the guest.
    path: PathMtu,
}

type UdpMapping = Mapping<State>;

impl State {
    fn class(&self) -> usize {
        match (self.dns_only, self.replied) {
            (true, true) if self.queries == 0 => RESOLVED,
            (true, _) => RESOLVING,
            (false, false) => ONE_WAY,
            (false, true) => TWO_WAY,
        }
    }
}

/// What happened so far. A train counts once.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct UdpCounters {
    /// Mappings.
    pub mappings: MappingCounters,
    /// Datagrams sent for guests.
    pub from_guest: u64,
    /// Datagrams given to guests.
    pub to_guest: u64,
    /// Datagrams sent to other mappings of this NAT, counted in `from_guest` too.
    pub hairpinned: u64,
    /// Mappings whose datagrams are cut for a link behind the guest.
    pub narrowed: u64,
}

impl UdpCounters {
    /// Names, as `lanlet status` shows them, and values.
    pub fn iter(self) -> impl Iterator<Item = (&'static str, u64)> {
        let Self {
            mappings,
            from_guest,
            to_guest,
            hairpinned,
            narrowed,
        } = self;
        [
            ("udp_opened", mappings.opened),
            ("udp_expired", mappings.expired),
            ("udp_evicted", mappings.evicted),
            ("udp_from_guest", from_guest),
            ("udp_to_guest", to_guest),
            ("udp_hairpinned", hairpinned),
            ("udp_narrowed", narrowed),
        ]
        .into_iter()
    }
}

/// UDP of all guests.
#[derive(Debug)]
pub struct UdpNat {
    lan: LanConfig,
    behaviour: UdpBehaviour,
    table: MappingTable<State, 4>,
    from_guest: u64,
    to_guest: u64,
    hairpinned: u64,
    narrowed: u64,
    /// Identification of the packet that was cut last; the first is random.
    fragment_id: Option<u32>,
}

impl UdpNat {
    /// No mappings yet.
    pub fn new(lan: LanConfig, limits: Limits) -> Self {
        Self {
            lan,
            behaviour: UdpBehaviour::default(),
            table: MappingTable::new(CLASSES, limits),
            from_guest: 0,
            to_guest: 0,
            hairpinned: 0,
            narrowed: 0,
            fragment_id: None,
        }
    }

    /// Behaves like this from here on. Mappings that another kind of mapping made end unused.
    pub fn set_behaviour(&mut self, behaviour: UdpBehaviour) {
        self.behaviour = behaviour;
    }

    /// Whether guests behind `port` have mappings.
    pub fn serves(&self, port: PortId) -> bool {
        self.table.serves(port)
    }

    /// Mappings, each with a host socket.
    pub fn len(&self) -> usize {
        self.table.len()
    }

    /// Whether there is no mapping.
    pub fn is_empty(&self) -> bool {
        self.table.is_empty()
    }

    /// What happened so far.
    pub fn counters(&self) -> UdpCounters {
        UdpCounters {
            mappings: self.table.counters(),
            from_guest: self.from_guest,
            to_guest: self.to_guest,
            hairpinned: self.hairpinned,
            narrowed: self.narrowed,
        }
    }

    /// Sends a guest's datagram or train on. The caller has checked that the source is of the LAN and
    /// the destination is neither a group nor reserved.
    ///
    /// # Errors
    /// The reason to count the packet as dropped for. The guest has got an ICMP error where one is
    /// due, except for [`DropReason::TtlExceeded`], what [`Egress::admit`] gives and the lack of room
    /// for a mapping.
    pub fn handle_packet<U: Uplink + ?Sized, O: Outbox + ?Sized>(
        &mut self,
        packet: &Packet<'_>,
        (ip, udp): (&Ip<'_>, &Udp<'_>),
        egress: &mut Egress,
        now: Instant,
        up: &mut U,
        (out, errors): (&mut O, &mut ErrorSender),
    ) -> Result<(), DropReason> {
        // Port 0 can neither be sent to nor answered (RFC 768: "if not used").
        if udp.source_port == 0 || udp.destination_port == 0 {
            return Err(DropReason::Malformed);
        }
        if ip.ttl <= 1 {
            return Err(DropReason::TtlExceeded);
        }
        let guest = SocketAddr::new(ip.source, udp.source_port);
        let to = SocketAddr::new(ip.destination, udp.destination_port);
        let station = Station {
            mac: packet.source,
            port: packet.ingress,
        };
        let mapping = self.mapping((guest, station), to, egress, now, up);
        let (id, hairpin) = mapping.inspect_err(|&reason| {
            // RFC 5508 REQ-8: the host gives no socket.
            if reason == DropReason::HostRefused {
                errors.send(&self.lan, ErrorKind::Prohibited, packet, now, out);
            }
        })?;
        let to = egress.real(to);
        let mapping = self.table.get_mut(id).ok_or(DropReason::NoFlow)?;
        mapping.state.dns_only &= to.port() == DNS_PORT;
        mapping.state.queries = mapping.state.queries.saturating_add(1);
        let (class, socket) = (mapping.state.class(), mapping.socket);
        self.table.touch(id, class, now);

        let segment = match packet.offload.gso {
            Gso::Udp(size) if usize::from(size) < udp.payload.len() => Some(size),
            _ => None,
        };
        let options = SendOptions {
            ttl: ip.ttl - 1,
            tos: ip.tos,
            dont_fragment: ip.dont_fragment() && !packet.reassembled,
            segment,
        };
        match send_again(up, socket, to, udp.payload, options) {
            Ok(len) if len < udp.payload.len() => Err(DropReason::HostFull),
            Ok(_) => {
                self.from_guest += 1;
                self.hairpinned += u64::from(hairpin);
                Ok(())
            }
            Err(failure) => {
                let mapping = self.table.get_mut(id).ok_or(DropReason::NoFlow)?;
                let way = Way {
                    lan: &self.lan,
                    egress,
                    guest,
                };
                let sent = (packet, &*mapping);
                Err(explain(failure, way, sent, now, (up, out, errors)))
            }
        }
    }

    /// The guest's mapping, made if need be, with `to` among its peers, and whether `to` is a mapping of
    /// this NAT as well.
    fn mapping<U: Uplink + ?Sized>(
        &mut self,
        (guest, station): (SocketAddr, Station),
        to: SocketAddr,
        egress: &mut Egress,
        now: Instant,
        up: &mut U,
    ) -> Result<(FlowId, bool), DropReason> {
        let real = egress.real(to);
        let key = Endpoint {
            guest,
            to: self.behaviour.mapping.part(real),
        };
        let known = self.table.find(key);
        if let Some(id) = known
            && let Some(mapping) = self.table.get_mut(id)
        {
            let same = mapping.station.port == station.port;
            if same && mapping.peers.touch(real) && !mapping.state.hairpins {
                mapping.station = station;
                return Ok((id, false));
            }
        }
        let what = (station.port, Protocol::Udp);
        let family = Family::of(real.ip());
        let target = self.table.at_external(family, real.port());
        let target = target.and_then(|id| Some(self.table.get_mut(id)?.socket));
        // A socket on one address only is not what answers on another of the host's.
        let reached = target.filter(|&socket| {
            let local = up.local_address(socket);
            local.is_none_or(|local| local.is_unspecified() || local == real.ip())
        });
        let hairpin = match reached {
            Some(_) => {
                egress.admit_to_mapping(what, to, now, up)?;
                up.is_host_address(real.ip())
            }
            None => {
                egress.admit(what, to, now, up)?;
                false
            }
        };
        let id = match known {
            Some(id) => id,
            None => self.open(key, station, real, now, up)?,
        };
        if let Some(mapping) = self.table.get_mut(id) {
            mapping.move_to(station);
            mapping.peers.add(real);
            mapping.state.hairpins |= hairpin;
        }
        Ok((id, hairpin))
    }

    fn open<U: Uplink + ?Sized>(
        &mut self,
        key: Endpoint,
        station: Station,
        to: SocketAddr,
        now: Instant,
        up: &mut U,
    ) -> Result<FlowId, DropReason> {
        let state = State {
            replied: false,
            dns_only: to.port() == DNS_PORT,
            queries: 0,
            hairpins: false,
            path: PathMtu::default(),
        };
        let class = state.class();
        let open = |up: &mut U, id| open_socket(up, key.guest, SockOwner::Udp(id));
        self.table.open(key, station, (class, state), now, up, open)
    }

    /// A datagram was too big for a link behind its guest: the mapping's are cut for a while.
    ///
    /// # Errors
    /// The reason to count the report as dropped for.
    pub fn heed(
        &mut self,
        port: PortId,
        report: &TooBig,
        egress: &Egress,
        now: Instant,
    ) -> Result<(), DropReason> {
        let real = egress.real(report.outside);
        let key = Endpoint {
            guest: report.guest,
            to: self.behaviour.mapping.part(real),
        };
        let id = self.table.find(key).ok_or(DropReason::NoFlow)?;
        let mapping = self.table.get_mut(id).filter(|mapping| {
            mapping.station.port == port && mapping.peers.contains_address(real.ip())
        });
        let mapping = mapping.ok_or(DropReason::NoFlow)?;
        self.narrowed += u64::from(mapping.state.path.learn(report.mtu, self.lan.mtu, now));
        Ok(())
    }

    /// As [`MappingTable::give_up`].
    pub fn give_up<U: Uplink + ?Sized>(
        &mut self,
        port: PortId,
        any: bool,
        now: Instant,
        up: &mut U,
    ) -> bool {
        self.table.give_up(port, any, now, up)
    }

    /// Mappings of a port.
    pub fn count(&self, port: PortId) -> usize {
        self.table.count(port)
    }

    /// As [`MappingTable::largest`].
    pub fn largest(&self) -> Option<(PortId, usize)> {
        self.table.largest()
    }

    /// Ends the mappings of the guests behind a port that is gone.
    pub fn forget_port<U: Uplink + ?Sized>(&mut self, port: PortId, up: &mut U) {
        self.table.forget_port(port, up);
    }

    /// Takes peers away that `allowed` no longer grants: see [`MappingTable::review`].
    pub fn review<U: Uplink + ?Sized>(
        &mut self,
        up: &mut U,
        allowed: impl FnMut(&mut U, PortId, SocketAddr, SocketAddr) -> bool,
    ) {
        self.table.review(up, allowed);
    }

    /// As [`UdpNat::review`] for when the host's addresses change, but peers that are mappings of this NAT
    /// stay.
    pub fn review_host<U: Uplink + ?Sized>(
        &mut self,
        up: &mut U,
        mut allowed: impl FnMut(&mut U, SocketAddr) -> bool,
    ) {
        let externals = self.table.externals();
        self.review(up, |up, _, _, peer| {
            externals.contains(&(Family::of(peer.ip()), peer.port())) || allowed(up, peer)
        });
    }

    /// Gives what waits on a mapping's socket to its guest, errors first, one batch at most; the
    /// readiness event returns while there is more. `drops` hears of what does not get through.
    pub fn handle_ready<U: Uplink + ?Sized, O: Outbox + ?Sized>(
        &mut self,
        id: FlowId,
        ready: Ready,
        egress: &Egress,
        now: Instant,
        (up, out, errors): (&mut U, &mut O, &mut ErrorSender),
        drops: &mut dyn FnMut(DropReason),
    ) {
        let Some((guest, mapping)) = self.table.get_with_guest(id) else {
            return;
        };
        if ready.error {
            let way = Way {
                lan: &self.lan,
                egress,
                guest,
            };
            reported::hear(way, mapping, now, (up, out, errors), drops);
        }
        let mut to_guest = ToGuest {
            lan: &self.lan,
            egress,
            guest,
            mtu: mapping.state.path.get(self.lan.mtu, now),
            mapping,
            filtering: self.behaviour.filtering,
            fragment_id: self.fragment_id.get_or_insert_with(|| up.random() as u32),
        };
        let (mut passed, mut answers) = (0u64, 0u32);
        up.recv_from(
            to_guest.mapping.socket,
            &mut |datagram| match to_guest.send(&datagram, out) {
                Ok(known) => {
                    passed += 1;
                    answers += u32::from(known);
                }
                Err(reason) => drops(reason),
            },
        );
        self.to_guest += passed;
        if answers > 0 {
            let state = &mut mapping.state;
            state.replied = true;
            state.queries = state.queries.saturating_sub(answers);
            let class = state.class();
            self.table.touch(id, class, now);
        }
    }

    /// When [`UdpNat::handle_timeout`] is to be called next.
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.table.poll_timeout()
    }

    /// Ends the mappings whose time is over.
    pub fn handle_timeout<U: Uplink + ?Sized>(&mut self, now: Instant, up: &mut U) {
        self.table.handle_timeout(now, up);
    }
}

/// A socket on the guest's port where that is free, else on one of the same parity, as RTP's pairs of
/// ports want it (RFC 4787 REQ-4): of two neighbours one is.
fn open_socket<U: Uplink + ?Sized>(
    up: &mut U,
    guest: SocketAddr,
    owner: SockOwner,
) -> Result<(SockId, u16), HostError> {
    let right = |port: u16| port % 2 == guest.port() % 2;
    let family = Family::of(guest.ip());
    let mut kept = up.udp_open(family, guest.port(), owner)?;
    for _ in 0..PARITY_ATTEMPTS {
        if right(kept.1) {
            break;
        }
        let Ok(other) = up.udp_open(family, kept.1 ^ 1, owner) else {
            break;
        };
        up.close(kept.0);
        kept = other;
    }
    Ok(kept)
}

#[cfg(test)]
mod tests;
