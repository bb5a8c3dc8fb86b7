//! ICMP through the NAT: echo by ping sockets, and the errors the gateway sends to guests.
//!
//! # Path
//! A guest's echo request leaves through an ICMP datagram socket of its mapping, one per guest
//! address and identifier (RFC 5508 REQ-1: endpoint-independent). The kernel puts the socket's own
//! identifier in and gives back only the replies to it; they get the guest's identifier again.
//! Everything else that guests send as ICMP is dropped: errors about packets from outside end here,
//! as the host's sockets have no way to pass them on.
//!
//! # Timers and limits
//! RFC 5508 REQ-2 asks for at least 60 seconds; see [`MappingTable`] for the order of eviction.
//!
//! # Hostile guests
//! A guest can use up its own mappings. It can't choose the identifier on the wire, nor see replies
//! to others, nor to addresses it did not write to.

pub mod error;

use std::net::SocketAddrV4;

pub use error::{ErrorKind, ErrorSender, write_about, write_error};

use super::mapping::{Class, Limits, MappingTable, Peers, Room};
use super::{
    Datagram, Duration, FlowId, HostError, Instant, Io, SendOptions, SockId, SockOwner, Uplink,
};
use crate::frame::{ETH_HEADER_LEN, Mac, PortId};
use crate::gateway::{LanConfig, Outbox};
use crate::offload::Offload;
use crate::stats::DropReason;
use crate::wire::{
    self, ETHERTYPE_IPV4, IPV4_HEADER_LEN, Ipv4, Ipv4Fields, PROTO_ICMP, Packet, checksum,
};

/// A mapping's life after its last use: the least that RFC 5508 REQ-2 allows, since a `ping` that
/// runs uses it every second and one that ended never comes back.
pub const TIMEOUT: Duration = Duration::from_secs(60);
/// Bounds by default. A monitoring guest pings some hundred targets, each with its own identifier.
pub const LIMITS: Limits = Limits {
    total: 1024,
    per_guest: 256,
};

const ECHO_REPLY: u8 = 0;
const ECHO_REQUEST: u8 = 8;
const ECHO_HEADER_LEN: usize = 8;

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

#[derive(Debug)]
struct Mapping {
    socket: SockId,
    /// Where replies go: the sender of the newest request.
    mac: Mac,
    /// Where that came in.
    port: PortId,
    peers: Peers,
}

/// What happened to mappings.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct PingCounters {
    /// Made.
    pub opened: u64,
    /// Ended after [`TIMEOUT`].
    pub expired: u64,
    /// Ended to make room.
    pub evicted: u64,
    /// Echo requests sent.
    pub requests: u64,
    /// Echo replies given to guests.
    pub replies: u64,
}

impl PingCounters {
    /// Names, as `lanlet status` shows them, and values.
    pub fn iter(self) -> impl Iterator<Item = (&'static str, u64)> {
        let Self {
            opened,
            expired,
            evicted,
            requests,
            replies,
        } = self;
        [
            ("ping_opened", opened),
            ("ping_expired", expired),
            ("ping_evicted", evicted),
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
    host_access: bool,
    table: MappingTable<Mapping, 2>,
    counters: PingCounters,
    hinted: bool,
}

impl PingNat {
    /// No mappings yet. Without `host_access`, guests can't ping the host's own addresses.
    pub fn new(lan: LanConfig, limits: Limits, host_access: bool) -> Self {
        Self {
            lan,
            host_access,
            table: MappingTable::new(CLASSES, limits),
            counters: PingCounters::default(),
            hinted: false,
        }
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
        self.counters
    }

    /// Sends a guest's echo request on. `message` is the ICMP message that `ip` carries.
    ///
    /// # Errors
    /// The reason to count the packet as dropped for.
    pub fn handle_packet<U: Uplink + ?Sized, O: Outbox + ?Sized>(
        &mut self,
        packet: &Packet<'_>,
        ip: &Ipv4<'_>,
        message: &[u8],
        now: Instant,
        up: &mut U,
        (out, errors): (&mut O, &mut ErrorSender),
    ) -> Result<(), DropReason> {
        if message.len() < ECHO_HEADER_LEN || message[..2] != [ECHO_REQUEST, 0] {
            return Err(DropReason::Unclaimed);
        }
        if ip.ttl <= 1 {
            return Err(DropReason::TtlExceeded);
        }
        let guest = SocketAddrV4::new(ip.source, wire::be16(message, 4));
        let to = SocketAddrV4::new(ip.destination, 0);
        let id = match self.mapping(guest, (packet.source, packet.ingress), to, now, up) {
            Err(DropReason::ForbiddenDestination) => {
                let kind = ErrorKind::Prohibited;
                errors.send(&self.lan, kind, packet, now, out);
                return Err(DropReason::ForbiddenDestination);
            }
            result => result?,
        };
        self.table.touch(id, WAITING, now);
        let mapping = self.table.get_mut(id).ok_or(DropReason::NoFlow)?;
        let options = SendOptions {
            ttl: ip.ttl - 1,
            segment: None,
        };
        match send_again(up, mapping.socket, to, message, options) {
            Ok(_) => {
                self.counters.requests += 1;
                Ok(())
            }
            Err((reason, kind)) => {
                if let Some(kind) = kind {
                    errors.send(&self.lan, kind, packet, now, out);
                }
                Err(reason)
            }
        }
    }

    /// The guest's mapping, made if need be, with `to` among its peers.
    fn mapping<U: Uplink + ?Sized>(
        &mut self,
        guest: SocketAddrV4,
        (mac, port): (Mac, PortId),
        to: SocketAddrV4,
        now: Instant,
        up: &mut U,
    ) -> Result<FlowId, DropReason> {
        let known = self.table.find(guest);
        if let Some(id) = known
            && let Some(mapping) = self.table.get_mut(id)
        {
            (mapping.mac, mapping.port) = (mac, port);
            if mapping.peers.touch(to) {
                return Ok(id);
            }
        }
        if !self.host_access && up.is_host_address(*to.ip()) {
            return Err(DropReason::ForbiddenDestination);
        }
        let id = match known {
            Some(id) => id,
            None => self.open(guest, (mac, port), now, up)?,
        };
        if let Some(mapping) = self.table.get_mut(id) {
            mapping.peers.add(to);
        }
        Ok(id)
    }

    fn open<U: Uplink + ?Sized>(
        &mut self,
        guest: SocketAddrV4,
        (mac, port): (Mac, PortId),
        now: Instant,
        up: &mut U,
    ) -> Result<FlowId, DropReason> {
        self.make_room(self.table.room(*guest.ip(), now), up)?;
        let mut socket = up.ping_open(SockOwner::Ping(self.table.next_id()));
        if socket == Err(HostError::Exhausted) {
            let room = self.table.oldest(now);
            self.make_room(room, up)?;
            socket = up.ping_open(SockOwner::Ping(self.table.next_id()));
        }
        let socket = socket.map_err(|error| self.refusal(error))?;
        self.counters.opened += 1;
        let mapping = Mapping {
            socket,
            mac,
            port,
            peers: Peers::default(),
        };
        Ok(self.table.insert(guest, WAITING, mapping, now))
    }

    fn refusal(&mut self, error: HostError) -> DropReason {
        match error {
            HostError::Exhausted => DropReason::Limit,
            HostError::Prohibited if !self.hinted => {
                self.hinted = true;
                log::warn!(
                    "guests can't ping outside: the host forbids ping sockets; allow them with \
                     sysctl -w net.ipv4.ping_group_range='0 2147483647'"
                );
                DropReason::HostRefused
            }
            _ => DropReason::HostRefused,
        }
    }

    fn make_room<U: Uplink + ?Sized>(&mut self, room: Room, up: &mut U) -> Result<(), DropReason> {
        match room {
            Room::Free => Ok(()),
            Room::Evict(id) => {
                self.counters.evicted += 1;
                self.close(id, up);
                Ok(())
            }
            Room::None => Err(DropReason::Limit),
        }
    }

    /// Ends the mappings of the guests behind a port that is gone.
    pub fn forget_port<U: Uplink + ?Sized>(&mut self, port: PortId, up: &mut U) {
        for id in self.table.ids_where(|mapping| mapping.port == port) {
            self.close(id, up);
        }
    }

    fn close<U: Uplink + ?Sized>(&mut self, id: FlowId, up: &mut U) {
        if let Some(mapping) = self.table.remove(id) {
            up.close(mapping.socket);
        }
    }

    /// Gives the replies that wait on a mapping's socket to its guest. `drops` hears of those that
    /// do not get there.
    pub fn handle_ready<U: Uplink + ?Sized, O: Outbox + ?Sized>(
        &mut self,
        id: FlowId,
        now: Instant,
        up: &mut U,
        out: &mut O,
        drops: &mut dyn FnMut(DropReason),
    ) {
        let Some(guest) = self.table.guest(id) else {
            return;
        };
        let Some(mapping) = self.table.get_mut(id) else {
            return;
        };
        let (lan, mac, peers) = (&self.lan, mapping.mac, &mapping.peers);
        let mut replies = 0;
        up.recv_from(mapping.socket, &mut |datagram| match write_reply(
            out.buffer(),
            lan,
            (mac, guest),
            peers,
            &datagram,
        ) {
            Ok(len) => {
                replies += 1;
                out.send(len, Offload::default());
            }
            Err(reason) => drops(reason),
        });
        if replies > 0 {
            self.counters.replies += replies;
            self.table.touch(id, ANSWERED, now);
        }
    }

    /// When [`PingNat::handle_timeout`] is to be called next.
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

/// Writes the frame of an echo reply to `guest`, whose port is the identifier. Returns its length.
fn write_reply(
    buffer: &mut [u8],
    lan: &LanConfig,
    (mac, guest): (Mac, SocketAddrV4),
    peers: &Peers,
    datagram: &Datagram<'_>,
) -> Result<usize, DropReason> {
    let message = datagram.payload;
    if message.len() < ECHO_HEADER_LEN || message[..2] != [ECHO_REPLY, 0] {
        return Err(DropReason::Malformed);
    }
    let source = *datagram.source.ip();
    if !peers.contains(SocketAddrV4::new(source, 0)) {
        return Err(DropReason::Filtered);
    }
    if IPV4_HEADER_LEN + message.len() > usize::from(lan.mtu) {
        return Err(DropReason::TooBig);
    }
    wire::write_ethernet(buffer, mac, lan.mac, ETHERTYPE_IPV4);
    let fields = Ipv4Fields {
        source,
        destination: *guest.ip(),
        protocol: PROTO_ICMP,
        ttl: ttl_to_guest(datagram.ttl)?,
        tos: 0,
    };
    wire::write_ipv4(buffer, fields, message.len());
    let icmp = &mut buffer[ETH_HEADER_LEN + IPV4_HEADER_LEN..][..message.len()];
    icmp.copy_from_slice(message);
    icmp[2..4].copy_from_slice(&[0, 0]);
    icmp[4..6].copy_from_slice(&guest.port().to_be_bytes());
    let sum = !checksum::fold(checksum::sum(icmp));
    icmp[2..4].copy_from_slice(&sum.to_be_bytes());
    Ok(ETH_HEADER_LEN + IPV4_HEADER_LEN + message.len())
}

/// The TTL toward the guest: counted down by one, as the NAT is a router (RFC 1812 5.3.1).
pub(super) fn ttl_to_guest(ttl: u8) -> Result<u8, DropReason> {
    match ttl {
        0 => Ok(wire::TTL_DEFAULT),
        1 => Err(DropReason::TtlExceeded),
        ttl => Ok(ttl - 1),
    }
}

/// Sends a datagram, a second time where the first attempt only told of an earlier one's fate
/// (ECONNREFUSED and the like are pending errors, cleared by being reported). An error comes with
/// the ICMP error that the guest may hear.
pub(super) fn send_again<U: Uplink + ?Sized>(
    up: &mut U,
    socket: SockId,
    to: SocketAddrV4,
    payload: &[u8],
    options: SendOptions,
) -> Result<usize, (DropReason, Option<ErrorKind>)> {
    let mut outcome = up.send_to(socket, to, payload, options);
    if outcome == Io::Failed(HostError::Refused) {
        outcome = up.send_to(socket, to, payload, options);
    }
    Err(match outcome {
        Io::Done(len) => return Ok(len),
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

#[cfg(test)]
mod tests;
