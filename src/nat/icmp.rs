//! ICMP through the NAT: echo by ping sockets, and the errors that guests get.
//!
//! # Path
//! A guest's echo request leaves through an ICMP or ICMPv6 datagram socket of its mapping, one per guest
//! address and identifier (RFC 5508 REQ-1: endpoint-independent). The kernel puts the socket's own
//! identifier in and gives back only the replies to it; they get the guest's identifier again. A reply
//! longer than the path's MTU is cut into fragments. What the host hears about a request, `reported`
//! passes on. Of guests' errors about packets from outside, [`path_mtu`](super::path_mtu) heeds those of
//! packets that are too big; the others end here, as the host's sockets have no way to pass them on.
//!
//! # Timers and limits
//! RFC 5508 REQ-2 asks for at least 60 seconds; see [`MappingTable`] for the order of eviction. A guest
//! that gets no mapping hears that it is prohibited (REQ-8), from [`super::Nat`].
//!
//! # Hostile guests
//! A guest can use up its own mappings. It can't choose the identifier on the wire, nor see replies
//! to others, nor to addresses it did not write to.

pub mod error;
pub(in crate::nat) mod reported;

use std::net::SocketAddr;

use reported::Way;

pub use error::{ErrorKind, ErrorSender, write_about, write_error};

use super::egress::{Egress, Protocol};
use super::mapping::{Class, Endpoint, Limits, Mapping, MappingCounters, MappingTable};
use super::path_mtu::{PathMtu, TooBig};
use super::{
    Datagram, Duration, FlowId, HostError, Instant, Io, Ready, SendOptions, SockId, SockOwner,
    Uplink,
};
use crate::frame::{ETH_HEADER_LEN, PortId, Station};
use crate::gateway::fragment::cut;
use crate::gateway::{LanConfig, Outbox};
use crate::offload::Offload;
use crate::stats::DropReason;
use crate::wire::{self, Family, Ip, IpFields, PROTO_ICMP, PROTO_ICMPV6, Packet};

/// A mapping's life after its last use: the least that RFC 5508 REQ-2 allows, since a `ping` that
/// runs uses it every second and one that ended never comes back.
pub const TIMEOUT: Duration = Duration::from_secs(60);
/// Bounds by default. A monitoring guest pings some hundred targets, each with its own identifier.
pub const LIMITS: Limits = Limits {
    total: 1024,
    per_guest: 256,
    per_port: 768,
};

const ECHO_HEADER_LEN: usize = 8;

/// Types of echo request and reply (RFC 792, RFC 4443 4).
fn echo_types(family: Family) -> (u8, u8) {
    match family {
        Family::V4 => (8, 0),
        Family::V6 => (128, 129),
    }
}

/// Every request was answered: first to go.
const ANSWERED: usize = 0;
/// An answer is awaited.
const WAITING: usize = 1;
const CLASSES: [Class; 2] = [
    Class {
        timeout: TIMEOUT,
        expendable: true,
    },
    Class {
        timeout: TIMEOUT,
        expendable: false,
    },
];

/// What happened so far.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct PingCounters {
    /// Mappings.
    pub mappings: MappingCounters,
    /// Echo requests sent.
    pub requests: u64,
    /// Echo replies given to guests.
    pub replies: u64,
}

impl PingCounters {
    /// Names, as `lanlet status` shows them, and values.
    pub fn iter(self) -> impl Iterator<Item = (&'static str, u64)> {
        let Self {
            mappings,
            requests,
            replies,
        } = self;
        [
            ("ping_opened", mappings.opened),
            ("ping_expired", mappings.expired),
            ("ping_evicted", mappings.evicted),
            ("ping_requests", requests),
            ("ping_replies", replies),
        ]
        .into_iter()
    }
}

/// ICMP echo of all guests.
#[derive(Debug)]
pub struct PingNat {
    lan: LanConfig,
    table: MappingTable<PathMtu, 2>,
    requests: u64,
    replies: u64,
    hinted: bool,
    /// Identification of the next packet that is cut; chosen at random when the first is.
    fragment_id: Option<u32>,
}

impl PingNat {
    /// No mappings yet.
    pub fn new(lan: LanConfig, limits: Limits) -> Self {
        Self {
            lan,
            table: MappingTable::new(CLASSES, limits),
            requests: 0,
            replies: 0,
            hinted: false,
            fragment_id: None,
        }
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
    pub fn counters(&self) -> PingCounters {
        PingCounters {
            mappings: self.table.counters(),
            requests: self.requests,
            replies: self.replies,
        }
    }

    /// Sends a guest's echo request on. `message` is the ICMP message that `ip` carries.
    ///
    /// # Errors
    /// The reason to count the packet as dropped for.
    pub fn handle_packet<U: Uplink + ?Sized, O: Outbox + ?Sized>(
        &mut self,
        packet: &Packet<'_>,
        (ip, message): (&Ip<'_>, &[u8]),
        egress: &mut Egress,
        now: Instant,
        up: &mut U,
        (out, errors): (&mut O, &mut ErrorSender),
    ) -> Result<(), DropReason> {
        let (request, _) = echo_types(Family::of(ip.source));
        if message.len() < ECHO_HEADER_LEN || message[..2] != [request, 0] {
            return Err(DropReason::Unclaimed);
        }
        if ip.ttl <= 1 {
            return Err(DropReason::TtlExceeded);
        }
        let guest = SocketAddr::new(ip.source, wire::be16(message, 4));
        let to = SocketAddr::new(ip.destination, 0);
        let station = Station {
            mac: packet.source,
            port: packet.ingress,
        };
        let mapping = self.mapping((guest, station), to, egress, now, up);
        let id = mapping.inspect_err(|&reason| {
            // RFC 5508 REQ-8: the host gives no socket.
            if reason == DropReason::HostRefused {
                errors.send(&self.lan, ErrorKind::Prohibited, packet, now, out);
            }
        })?;
        let to = egress.real(to);
        self.table.touch(id, WAITING, now);
        let mapping = self.table.get_mut(id).ok_or(DropReason::NoFlow)?;
        let options = SendOptions {
            ttl: ip.ttl - 1,
            tos: ip.tos,
            dont_fragment: ip.dont_fragment() && !packet.reassembled,
            segment: None,
        };
        match send_again(up, mapping.socket, to, message, options) {
            Ok(_) => {
                self.requests += 1;
                Ok(())
            }
            Err(failure) => {
                let sent = (packet, &*mapping);
                let way = Way {
                    lan: &self.lan,
                    egress,
                    guest,
                };
                Err(explain(failure, way, sent, now, (up, out, errors)))
            }
        }
    }

    /// The guest's mapping, made if need be, with `to` among its peers.
    fn mapping<U: Uplink + ?Sized>(
        &mut self,
        (guest, station): (SocketAddr, Station),
        to: SocketAddr,
        egress: &mut Egress,
        now: Instant,
        up: &mut U,
    ) -> Result<FlowId, DropReason> {
        let key = Endpoint { guest, to: None };
        let known = self.table.find(key);
        if let Some(id) = known
            && let Some(mapping) = self.table.get_mut(id)
        {
            let same = mapping.station.port == station.port;
            if same && mapping.peers.touch(egress.real(to)) {
                mapping.station = station;
                return Ok(id);
            }
        }
        let real = egress.admit((station.port, Protocol::Echo), to, now, up)?;
        let id = match known {
            Some(id) => id,
            None => {
                let family = Family::of(guest.ip());
                let hinted = &mut self.hinted;
                let open = |up: &mut U, id| {
                    let opened = up.ping_open(family, SockOwner::Ping(id));
                    if opened == Err(HostError::Prohibited) {
                        hint(hinted);
                    }
                    Ok((opened?, 0))
                };
                self.table
                    .open(key, station, (WAITING, PathMtu::default()), now, up, open)?
            }
        };
        if let Some(mapping) = self.table.get_mut(id) {
            mapping.move_to(station);
            mapping.peers.add(real);
        }
        Ok(id)
    }

    /// A reply was too big for a link behind its guest: the mapping's are cut for a while.
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
        let key = Endpoint {
            guest: report.guest,
            to: None,
        };
        let real = egress.real(report.outside).ip();
        let id = self.table.find(key).ok_or(DropReason::NoFlow)?;
        let mapping = self
            .table
            .get_mut(id)
            .filter(|mapping| mapping.station.port == port && mapping.peers.contains_address(real));
        let mapping = mapping.ok_or(DropReason::NoFlow)?;
        mapping.state.learn(report.mtu, self.lan.mtu, now);
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

    /// Gives the replies and errors that wait on a mapping's socket to its guest. `drops` hears of those
    /// that do not get there.
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
        let way = Way {
            lan: &self.lan,
            egress,
            guest,
        };
        if ready.error {
            reported::hear(way, mapping, now, (up, out, errors), drops);
        }
        let fragment_id = self.fragment_id.get_or_insert_with(|| up.random() as u32);
        let mapping = &*mapping;
        let mtu = mapping.state.get(self.lan.mtu, now);
        let mut replies = 0;
        up.recv_from(mapping.socket, &mut |datagram| match write_reply(
            out.buffer(),
            way,
            mapping,
            &datagram,
        ) {
            Ok(len) if len > ETH_HEADER_LEN + usize::from(mtu) => {
                replies += 1;
                *fragment_id = fragment_id.wrapping_add(1);
                cut(out, len, mtu, *fragment_id);
            }
            Ok(len) => {
                replies += 1;
                out.send(len, Offload::default());
            }
            Err(reason) => drops(reason),
        });
        if replies > 0 {
            self.replies += replies;
            self.table.touch(id, ANSWERED, now);
        }
    }

    /// When [`PingNat::handle_timeout`] is to be called next.
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.table.poll_timeout()
    }

    /// Ends the mappings whose time is over.
    pub fn handle_timeout<U: Uplink + ?Sized>(&mut self, now: Instant, up: &mut U) {
        self.table.handle_timeout(now, up);
    }
}

/// Says once how ping sockets are allowed.
fn hint(hinted: &mut bool) {
    if !std::mem::replace(hinted, true) {
        log::warn!(
            "guests can't ping outside: the host forbids ping sockets; allow them with \
             sysctl -w net.ipv4.ping_group_range='0 2147483647'"
        );
    }
}

/// Writes the frame of an echo reply to `guest`, whose port is the identifier. Returns its length, which
/// may exceed the LAN's MTU.
fn write_reply(
    buffer: &mut [u8],
    Way { lan, egress, guest }: Way<'_>,
    mapping: &Mapping<PathMtu>,
    datagram: &Datagram<'_>,
) -> Result<usize, DropReason> {
    let (source, destination) = (datagram.source.ip(), guest.ip());
    let (protocol, family) = match Family::of(destination) {
        Family::V4 => (PROTO_ICMP, Family::V4),
        Family::V6 => (PROTO_ICMPV6, Family::V6),
    };
    let (message, (_, reply)) = (datagram.payload, echo_types(family));
    if message.len() < ECHO_HEADER_LEN || message[..2] != [reply, 0] {
        return Err(DropReason::Malformed);
    }
    if message.len() > wire::ip_payload_max(destination) {
        return Err(DropReason::TooBig);
    }
    if !mapping.peers.contains_address(source) {
        return Err(DropReason::Filtered);
    }
    let source = egress.shown_address(source);
    let fields = IpFields {
        source,
        destination,
        protocol,
        ttl: ttl_to_guest(datagram.ttl)?,
        tos: datagram.tos,
    };
    let macs = (mapping.station.mac, lan.mac);
    let at = wire::write_ip(buffer, macs, fields, message.len());
    let icmp = &mut buffer[at..][..message.len()];
    icmp.copy_from_slice(message);
    icmp[4..6].copy_from_slice(&guest.port().to_be_bytes());
    error::complete_checksum(icmp, source, destination);
    Ok(at + message.len())
}

/// The TTL toward the guest: counted down by one, as the NAT is a router (RFC 1812 5.3.1).
pub(super) fn ttl_to_guest(ttl: u8) -> Result<u8, DropReason> {
    match ttl {
        0 => Ok(wire::TTL_DEFAULT),
        1 => Err(DropReason::TtlExceeded),
        ttl => Ok(ttl - 1),
    }
}

/// Sends a datagram, a second time where the first attempt only told of an earlier one's fate: what an
/// ICMP error means is a pending error of the socket, which is cleared by being reported. An error comes
/// with the ICMP error that the guest may hear.
pub(super) fn send_again<U: Uplink + ?Sized>(
    up: &mut U,
    socket: SockId,
    to: SocketAddr,
    payload: &[u8],
    options: SendOptions,
) -> Result<usize, (DropReason, Option<ErrorKind>)> {
    let mut outcome = up.send_to(socket, to, payload, options);
    if matches!(outcome, Io::Failed(error) if error != HostError::Exhausted) {
        outcome = up.send_to(socket, to, payload, options);
    }
    Err(match outcome {
        Io::Done(len) | Io::Drained(len) => return Ok(len),
        Io::Blocked | Io::Eof | Io::Failed(HostError::Exhausted) => (DropReason::HostFull, None),
        Io::Failed(HostError::TooBig) => (DropReason::TooBig, None),
        Io::Failed(HostError::NetUnreachable) => {
            (DropReason::HostRefused, Some(ErrorKind::NetUnreachable))
        }
        Io::Failed(HostError::HostUnreachable) => {
            (DropReason::HostRefused, Some(ErrorKind::HostUnreachable))
        }
        Io::Failed(HostError::Prohibited) => (DropReason::HostRefused, Some(ErrorKind::Prohibited)),
        Io::Failed(_) => (DropReason::HostRefused, None),
    })
}

/// Tells the guest why its packet was not sent, where it may hear it. Gives the reason to count.
pub(super) fn explain<S, U: Uplink + ?Sized, O: Outbox + ?Sized>(
    (reason, kind): (DropReason, Option<ErrorKind>),
    way: Way<'_>,
    (packet, mapping): (&Packet<'_>, &Mapping<S>),
    now: Instant,
    (up, out, errors): (&mut U, &mut O, &mut ErrorSender),
) -> DropReason {
    let kind = match reason {
        // The route's MTU is in the error queue. What else waits there is the guest's to hear as well;
        // what is not its business is no packet of this call, hence not counted.
        DropReason::TooBig => {
            let mtu = reported::hear(way, mapping, now, (up, out, errors), &mut |_| ());
            mtu.map(|mtu| ErrorKind::TooBig { mtu })
        }
        _ => kind,
    };
    if let Some(kind) = kind {
        errors.send(way.lan, kind, packet, now, out);
    }
    reason
}

#[cfg(test)]
mod tests;
