//! UDP through the NAT: a host socket per guest address and port.
//!
//! # Path
//! `from_guest`: a datagram's payload goes to the mapping's socket as it is; headers are the kernel's
//! business. A train (UDP segmentation offload) goes in one call and stays one packet as far down as
//! the host's device can cut it. `to_guest`: what the socket receives gets headers again; a train that
//! the kernel coalesced becomes one super-frame. Checksums are left to the egress port.
//!
//! # State
//! One mapping per guest address and port whatever the destination (RFC 4787 REQ-1), on the same
//! host port where that is free (REQ-3). It remembers whom the guest wrote to, and only they get
//! through (REQ-8, address- and port-dependent filtering): the socket is open to the whole of the
//! host's networks, its guest need not be.
//!
//! # Timers
//! A use in either direction refreshes (REQ-6; inbound counts, since filtering lets only peers of the
//! guest's choice in). Between 10 and 300 seconds by class, see `CLASSES`.
//!
//! # Limits
//! [`LIMITS`], or the host's on open files; [`MappingTable`] says who gives way. What the host's
//! socket does not take is dropped ([`DropReason::HostFull`]): UDP has no back-pressure.
//!
//! # Hostile guests
//! A guest can use up its own mappings, and host ports above 1023 as any program on the host can. It
//! can't reach the host's own addresses unless `host_access` says so; that is asked once per peer.

use std::net::SocketAddrV4;

use super::icmp::{ErrorKind, ErrorSender, send_again, ttl_to_guest};
use super::mapping::{Class, Limits, MappingTable, Peers, Room};
use super::{
    Datagram, Duration, FlowId, HostError, Instant, SendOptions, SockId, SockOwner, Uplink,
};
use crate::frame::{ETH_HEADER_LEN, Mac, PortId};
use crate::gateway::{LanConfig, Outbox};
use crate::offload::{Csum, Gso, Offload};
use crate::stats::DropReason;
use crate::wire::{
    self, ETHERTYPE_IPV4, IPV4_HEADER_LEN, Ipv4, Ipv4Fields, PROTO_UDP, Packet, UDP_HEADER_LEN,
    UDP4_PAYLOAD_AT, Udp, checksum,
};

/// Bounds by default. Each mapping is an open file: where a process may have 20,000 of them, TCP keeps
/// its 10,000. A guest that resolves for a whole network has 2,048 queries under way.
pub const LIMITS: Limits = Limits {
    total: 8192,
    per_guest: 2048,
};

/// Destination port of DNS (RFC 1035 4.2.1).
const DNS_PORT: u16 = 53;

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

/// Largest UDP payload over IPv4 without options.
const PAYLOAD_MAX: usize = 65_535 - IPV4_HEADER_LEN - UDP_HEADER_LEN;

#[derive(Debug)]
struct Mapping {
    socket: SockId,
    /// Where datagrams go: the sender of the newest one from the guest.
    mac: Mac,
    /// Where that came in.
    port: PortId,
    peers: Peers,
    /// Something came back.
    replied: bool,
    /// All destinations so far were DNS servers.
    dns_only: bool,
    /// Datagrams out and not answered, of a `dns_only` mapping.
    queries: u32,
}

impl Mapping {
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
    /// Mappings made.
    pub opened: u64,
    /// Mappings ended by their timeout.
    pub expired: u64,
    /// Mappings ended to make room.
    pub evicted: u64,
    /// Datagrams sent for guests.
    pub from_guest: u64,
    /// Datagrams given to guests.
    pub to_guest: u64,
}

impl UdpCounters {
    /// Names, as `lanlet status` shows them, and values.
    pub fn iter(self) -> impl Iterator<Item = (&'static str, u64)> {
        let Self {
            opened,
            expired,
            evicted,
            from_guest,
            to_guest,
        } = self;
        [
            ("udp_opened", opened),
            ("udp_expired", expired),
            ("udp_evicted", evicted),
            ("udp_from_guest", from_guest),
            ("udp_to_guest", to_guest),
        ]
        .into_iter()
    }
}

/// UDP of all guests.
#[derive(Debug)]
pub struct UdpNat {
    lan: LanConfig,
    host_access: bool,
    table: MappingTable<Mapping, 4>,
    counters: UdpCounters,
}

impl UdpNat {
    /// No mappings yet. Without `host_access`, guests can't reach the host's own addresses.
    pub fn new(lan: LanConfig, limits: Limits, host_access: bool) -> Self {
        Self {
            lan,
            host_access,
            table: MappingTable::new(CLASSES, limits),
            counters: UdpCounters::default(),
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
    pub fn counters(&self) -> UdpCounters {
        self.counters
    }

    /// Sends a guest's datagram or train on. The caller has checked that the source is of the LAN and
    /// the destination is neither a group nor reserved.
    ///
    /// # Errors
    /// The reason to count the packet as dropped for. The guest has got an ICMP error where one is
    /// due, except for [`DropReason::TtlExceeded`].
    pub fn handle_packet<U: Uplink + ?Sized, O: Outbox + ?Sized>(
        &mut self,
        packet: &Packet<'_>,
        ip: &Ipv4<'_>,
        udp: &Udp<'_>,
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
        let guest = SocketAddrV4::new(ip.source, udp.source_port);
        let to = SocketAddrV4::new(ip.destination, udp.destination_port);
        let id = match self.mapping(guest, (packet.source, packet.ingress), to, now, up) {
            Err(DropReason::ForbiddenDestination) => {
                let kind = ErrorKind::Prohibited;
                errors.send(&self.lan, kind, packet, now, out);
                return Err(DropReason::ForbiddenDestination);
            }
            result => result?,
        };
        let mapping = self.table.get_mut(id).ok_or(DropReason::NoFlow)?;
        mapping.dns_only &= to.port() == DNS_PORT;
        mapping.queries = mapping.queries.saturating_add(1);
        let (class, socket) = (mapping.class(), mapping.socket);
        self.table.touch(id, class, now);

        let segment = match packet.offload.gso {
            Gso::Udp(size) if usize::from(size) < udp.payload.len() => Some(size),
            _ => None,
        };
        let options = SendOptions {
            ttl: ip.ttl - 1,
            segment,
        };
        match send_again(up, socket, to, udp.payload, options) {
            Ok(len) if len < udp.payload.len() => Err(DropReason::HostFull),
            Ok(_) => {
                self.counters.from_guest += 1;
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
            None => self.open(guest, (mac, port), to, now, up)?,
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
        to: SocketAddrV4,
        now: Instant,
        up: &mut U,
    ) -> Result<FlowId, DropReason> {
        self.make_room(self.table.room(*guest.ip(), now), up)?;
        let mut socket = up.udp_open(guest.port(), SockOwner::Udp(self.table.next_id()));
        if socket == Err(HostError::Exhausted) {
            self.make_room(self.table.oldest(now), up)?;
            socket = up.udp_open(guest.port(), SockOwner::Udp(self.table.next_id()));
        }
        let socket = socket.map_err(|error| match error {
            HostError::Exhausted => DropReason::Limit,
            _ => DropReason::HostRefused,
        })?;
        self.counters.opened += 1;
        let mapping = Mapping {
            socket,
            mac,
            port,
            peers: Peers::default(),
            replied: false,
            dns_only: to.port() == DNS_PORT,
            queries: 0,
        };
        let class = mapping.class();
        Ok(self.table.insert(guest, class, mapping, now))
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

    /// Gives what waits on a mapping's socket to its guest, one batch at most; the readiness event
    /// returns while there is more. `drops` hears of datagrams that do not get through.
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
        let to_guest = ToGuest {
            lan: &self.lan,
            mac: mapping.mac,
            guest,
            peers: &mapping.peers,
        };
        let mut passed = 0u32;
        up.recv_from(
            mapping.socket,
            &mut |datagram| match to_guest.send(&datagram, out) {
                Ok(()) => passed += 1,
                Err(reason) => drops(reason),
            },
        );
        if passed > 0 {
            self.counters.to_guest += u64::from(passed);
            mapping.replied = true;
            mapping.queries = mapping.queries.saturating_sub(passed);
            let class = mapping.class();
            self.table.touch(id, class, now);
        }
    }

    /// When [`UdpNat::handle_timeout`] is to be called next.
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

/// The way to one mapping's guest.
struct ToGuest<'a> {
    lan: &'a LanConfig,
    mac: Mac,
    guest: SocketAddrV4,
    peers: &'a Peers,
}

impl ToGuest<'_> {
    /// Sends a datagram, or a train as one super-frame, to the guest.
    fn send<O: Outbox + ?Sized>(
        &self,
        datagram: &Datagram<'_>,
        out: &mut O,
    ) -> Result<(), DropReason> {
        if !self.peers.contains(datagram.source) {
            return Err(DropReason::Filtered);
        }
        let ttl = ttl_to_guest(datagram.ttl)?;
        let payload = datagram.payload;
        let segment = datagram
            .segment
            .map(usize::from)
            .filter(|size| (1..payload.len()).contains(size));
        let longest = segment.unwrap_or(payload.len());
        if IPV4_HEADER_LEN + UDP_HEADER_LEN + longest > usize::from(self.lan.mtu) {
            return Err(DropReason::TooBig);
        }
        let Some(size) = segment else {
            self.send_frame(datagram.source, ttl, payload, None, out);
            return Ok(());
        };
        // A super-frame is one IP packet: 65,535 bytes hold all of a train unless the host raised
        // gro_ipv4_max_size.
        for train in payload.chunks(PAYLOAD_MAX / size * size) {
            let gso = (train.len() > size).then_some(size as u16);
            self.send_frame(datagram.source, ttl, train, gso, out);
        }
        Ok(())
    }

    /// `payload` fits one IP packet.
    fn send_frame<O: Outbox + ?Sized>(
        &self,
        from: SocketAddrV4,
        ttl: u8,
        payload: &[u8],
        gso: Option<u16>,
        out: &mut O,
    ) {
        const UDP_AT: usize = ETH_HEADER_LEN + IPV4_HEADER_LEN;
        let frame = out.buffer();
        wire::write_ethernet(frame, self.mac, self.lan.mac, ETHERTYPE_IPV4);
        let udp_len = UDP_HEADER_LEN + payload.len();
        let fields = Ipv4Fields {
            source: *from.ip(),
            destination: *self.guest.ip(),
            protocol: PROTO_UDP,
            ttl,
            tos: 0,
        };
        wire::write_ipv4(frame, fields, udp_len);
        // Partial: the sum of the pseudo-header, with the length of the whole train as the kernel's
        // segmentation expects it (net/ipv4/udp_offload.c, __udp_gso_segment).
        let sum = checksum::pseudo_header4(*from.ip(), *self.guest.ip(), PROTO_UDP, udp_len);
        let udp = &mut frame[UDP_AT..UDP4_PAYLOAD_AT];
        udp[..2].copy_from_slice(&from.port().to_be_bytes());
        udp[2..4].copy_from_slice(&self.guest.port().to_be_bytes());
        udp[4..6].copy_from_slice(&(udp_len as u16).to_be_bytes());
        udp[6..8].copy_from_slice(&checksum::fold(sum).to_be_bytes());
        frame[UDP4_PAYLOAD_AT..][..payload.len()].copy_from_slice(payload);
        let offload = Offload {
            csum: Csum::Partial {
                start: UDP_AT as u16,
                offset: 6,
            },
            gso: gso.map_or(Gso::None, Gso::Udp),
            ecn: false,
        };
        out.send(UDP4_PAYLOAD_AT + payload.len(), offload);
    }
}

#[cfg(test)]
mod tests;
