//! ICMP and ICMPv6 errors to a guest, about a packet of that guest (RFC 792, RFC 1812 4.3, RFC 4443):
//! the gateway's own, and those that routers and hosts outside sent about what the NAT sent for it.

use std::net::{IpAddr, Ipv4Addr};

use crate::frame::{Duration, Instant, Mac};
use crate::gateway::{LanConfig, Outbox};
use crate::offload::Offload;
use crate::wire::ipv6::{IPV6_HEADER_LEN, MTU_MIN, address_at, is_link_local, walk};
use crate::wire::{
    self, IPV4_HEADER_LEN, Ip, IpFields, PROTO_ICMP, PROTO_ICMPV6, Packet, checksum,
};

/// ICMP header with its four bytes of rest, the same in both families.
const ICMP_HEADER_LEN: usize = 8;
/// An error is 576 bytes at most, IP header included (RFC 1812 4.3.2.3).
const ERROR4_LEN_MAX: usize = 576;
/// As much of the packet as fits the least IPv6 MTU (RFC 4443 2.4 c).
const ERROR6_LEN_MAX: usize = MTU_MIN as usize;
const QUOTE4_LEN_MAX: usize = ERROR4_LEN_MAX - IPV4_HEADER_LEN - ICMP_HEADER_LEN;
/// What is quoted of a packet at most, either family.
pub const QUOTE_LEN_MAX: usize = ERROR6_LEN_MAX - IPV6_HEADER_LEN - ICMP_HEADER_LEN;
/// Precedence 6, internetwork control (RFC 1812 4.3.2.5). IPv6 has no such rule.
const TOS4: u8 = 0xc0;

/// What is wrong with the guest's packet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ErrorKind {
    /// TTL or hop limit exceeded in transit.
    TimeExceeded,
    /// Not all fragments came in time.
    ReassemblyTimeExceeded,
    /// No way to the network.
    NetUnreachable,
    /// The host does not answer.
    HostUnreachable,
    /// A transport protocol that is not carried on.
    ProtocolUnreachable,
    /// Nobody listens.
    PortUnreachable,
    /// Administratively prohibited.
    Prohibited,
    /// Longer than the next hop takes.
    TooBig {
        /// MTU of the next hop, bytes of IP packet.
        mtu: u32,
    },
}

/// Type, code and the header's last four bytes.
pub(in crate::nat) type Header = (u8, u8, u32);

impl ErrorKind {
    /// RFC 792, RFC 1191 for the MTU, RFC 1812 5.2.7.1 for code 13.
    pub(super) fn header4(self) -> Header {
        match self {
            ErrorKind::NetUnreachable => (3, 0, 0),
            ErrorKind::HostUnreachable => (3, 1, 0),
            ErrorKind::ProtocolUnreachable => (3, 2, 0),
            ErrorKind::PortUnreachable => (3, 3, 0),
            ErrorKind::TooBig { mtu } => (3, 4, mtu.min(0xffff)),
            ErrorKind::Prohibited => (3, 13, 0),
            ErrorKind::TimeExceeded => (11, 0, 0),
            ErrorKind::ReassemblyTimeExceeded => (11, 1, 0),
        }
    }

    /// RFC 4443 3. `about` is the packet: a protocol is told of by the place that names it.
    pub(super) fn header6(self, about: &[u8]) -> Header {
        match self {
            ErrorKind::NetUnreachable => (1, 0, 0),
            ErrorKind::Prohibited => (1, 1, 0),
            ErrorKind::HostUnreachable => (1, 3, 0),
            ErrorKind::PortUnreachable => (1, 4, 0),
            ErrorKind::TooBig { mtu } => (2, 0, mtu),
            ErrorKind::TimeExceeded => (3, 0, 0),
            ErrorKind::ReassemblyTimeExceeded => (3, 1, 0),
            ErrorKind::ProtocolUnreachable => {
                let named_at = walk(about).map_or(6, |chain| chain.named_at);
                (4, 1, named_at as u32)
            }
        }
    }
}

/// Writes the whole frame of an error about `packet` and returns its length; `None` where RFC 1812
/// 4.3.2.7, RFC 1122 3.2.2 and RFC 4443 2.4 e forbid an error.
///
/// A super-frame is quoted as it came: its length field covers the train, its checksum may be partial.
/// Ports and addresses, by which a guest finds the socket, are right.
///
/// # Panics
/// If `buffer` is shorter than the largest error; an [`Outbox`]'s is long enough.
pub fn write_error(
    buffer: &mut [u8],
    lan: &LanConfig,
    kind: ErrorKind,
    packet: &Packet<'_>,
) -> Option<usize> {
    let ip = packet.ip()?;
    if packet.destination.is_group() || !may_cause_error(&ip, lan) {
        return None;
    }
    write_about(buffer, lan, kind, packet.source, ip.packet)
}

/// Writes the whole frame of an error about the IP packet `about` of the guest at `guest` and returns
/// its length; `None` if the gateway has no address of that family. For packets that are known to
/// deserve one; [`write_error`] asks.
///
/// # Panics
/// If `about` is shorter than its IP header, or `buffer` than the largest error.
pub fn write_about(
    buffer: &mut [u8],
    lan: &LanConfig,
    kind: ErrorKind,
    guest: Mac,
    about: &[u8],
) -> Option<usize> {
    let header = match about[0] >> 4 {
        4 => kind.header4(),
        _ => kind.header6(about),
    };
    let from = gateway_address(lan, source_of(about))?;
    Some(write(buffer, (lan.mac, from), header, guest, about))
}

/// The gateway's address that a guest at `guest` knows.
pub(super) fn gateway_address(lan: &LanConfig, guest: IpAddr) -> Option<IpAddr> {
    Some(match guest {
        IpAddr::V4(_) => lan.address.into(),
        IpAddr::V6(guest) if is_link_local(guest) => lan.v6?.link_local.into(),
        IpAddr::V6(_) => lan.v6?.address.into(),
    })
}

/// Who sent the IP packet `about`.
fn source_of(about: &[u8]) -> IpAddr {
    match about[0] >> 4 {
        4 => IpAddr::from([about[12], about[13], about[14], about[15]]),
        _ => address_at(about, 8).into(),
    }
}

/// Writes the frame of an error that comes from `from`, which is of the family of `about`, to the sender
/// of that packet.
pub(in crate::nat) fn write(
    buffer: &mut [u8],
    (mac, from): (Mac, IpAddr),
    (of_type, code, rest): Header,
    guest: Mac,
    about: &[u8],
) -> usize {
    let (protocol, tos, quote_max) = match from {
        IpAddr::V4(_) => (PROTO_ICMP, TOS4, QUOTE4_LEN_MAX),
        IpAddr::V6(_) => (PROTO_ICMPV6, 0, QUOTE_LEN_MAX),
    };
    let quote = &about[..about.len().min(quote_max)];
    let icmp_len = ICMP_HEADER_LEN + quote.len();
    let fields = IpFields {
        source: from,
        destination: source_of(about),
        protocol,
        ttl: wire::TTL_DEFAULT,
        tos,
    };
    let at = wire::write_ip(buffer, (guest, mac), fields, icmp_len);
    let icmp = &mut buffer[at..][..icmp_len];
    icmp[..4].copy_from_slice(&[of_type, code, 0, 0]);
    icmp[4..8].copy_from_slice(&rest.to_be_bytes());
    icmp[ICMP_HEADER_LEN..].copy_from_slice(quote);
    complete_checksum(icmp, from, fields.destination);
    at + icmp_len
}

/// Writes the checksum of an ICMP or ICMPv6 message between two addresses.
pub(super) fn complete_checksum(icmp: &mut [u8], source: IpAddr, destination: IpAddr) {
    icmp[2..4].fill(0);
    let sum = match source {
        IpAddr::V4(_) => checksum::fold(checksum::sum(icmp)),
        IpAddr::V6(_) => checksum::transport(source, destination, PROTO_ICMPV6, icmp),
    };
    icmp[2..4].copy_from_slice(&(!sum).to_be_bytes());
}

/// Whether an error is due about a first fragment that a guest of this LAN sent.
pub fn may_be_about(fragment: &[u8], lan: &LanConfig) -> bool {
    let (source, destination, header_len) = match fragment[0] >> 4 {
        4 => {
            let at = |at: usize| {
                Ipv4Addr::new(
                    fragment[at],
                    fragment[at + 1],
                    fragment[at + 2],
                    fragment[at + 3],
                )
            };
            let header_len = usize::from(fragment[0] & 0x0f) * 4;
            (at(12).into(), at(16).into(), header_len)
        }
        _ => {
            let at = |at| IpAddr::from(address_at(fragment, at));
            (at(8), at(24), IPV6_HEADER_LEN)
        }
    };
    let ip = Ip {
        source,
        destination,
        ttl: 0,
        tos: 0,
        packet: fragment,
        header_len,
        transport: wire::Transport::Fragment,
    };
    lan.is_guest_any(source) && may_cause_error(&ip, lan)
}

/// Not about ICMP errors, fragments other than the first, broadcasts and multicasts, nor to a source
/// that is no single host.
fn may_cause_error(ip: &Ip<'_>, lan: &LanConfig) -> bool {
    let group = |address: IpAddr| match address {
        IpAddr::V4(it) => it.is_multicast() || it.is_broadcast() || it == lan.broadcast(),
        IpAddr::V6(it) => it.is_multicast(),
    };
    let no_host = ip.source.is_unspecified() || ip.source.is_loopback() || group(ip.source);
    if no_host || group(ip.destination) {
        return false;
    }
    let first = ip.payload().first();
    match ip.source {
        IpAddr::V4(_) => {
            let later_fragment = wire::be16(ip.packet, 6) & 0x1fff != 0;
            // Echo, router solicitation, timestamp, information and mask requests and replies. Unknown
            // types may be errors.
            let is_query = |of_type| matches!(of_type, 0 | 8 | 9 | 10 | 13..=18);
            let icmp_error = ip.packet[9] == PROTO_ICMP && !first.is_some_and(|t| is_query(*t));
            !later_fragment && !icmp_error
        }
        IpAddr::V6(_) => {
            // Errors have the high bit clear (RFC 4443 2.1); a redirect is 137.
            let is_query = |of_type| of_type >= 128 && of_type != 137;
            let protocol = walk(ip.packet).map(|chain| chain.protocol);
            protocol.is_ok_and(|it| it != PROTO_ICMPV6 || first.is_some_and(|t| is_query(*t)))
        }
    }
}

/// Errors to one guest address in a row, the gateway's own and those of routers outside. Two
/// traceroutes that send all 90 probes of 30 hops at once are answered in full.
pub const BURST: u32 = 200;
/// Errors per second and guest address after a burst (RFC 1812 4.3.2.8 and RFC 4443 2.4 f ask for a
/// limit): a flood of what can't be delivered costs the worker a thousandth of its time.
pub const RATE_PER_SEC: u32 = 500;
/// Token buckets. Chosen by the bytes of the guest's address: one each in a /24. A guest that forges
/// sources gets 256 buckets at most, and no memory.
const BUCKETS: usize = 256;

/// Microseconds of refill that one error costs.
const COST_MICROS: u64 = 1_000_000 / RATE_PER_SEC as u64;
const FULL_MICROS: u64 = COST_MICROS * BURST as u64;

/// Sends errors, within the rate limit.
#[derive(Debug)]
pub struct ErrorSender {
    /// Unspent refill and when it was last brought up to date.
    buckets: Box<[(u64, Instant); BUCKETS]>,
    sent: u64,
    suppressed: u64,
}

impl ErrorSender {
    /// Full buckets.
    pub fn new() -> Self {
        Self {
            buckets: Box::new([(FULL_MICROS, Instant::ZERO); BUCKETS]),
            sent: 0,
            suppressed: 0,
        }
    }

    /// Sends an error about `packet`, if one is due and the limit allows it. Returns whether it did.
    pub fn send<O: Outbox + ?Sized>(
        &mut self,
        lan: &LanConfig,
        kind: ErrorKind,
        packet: &Packet<'_>,
        now: Instant,
        out: &mut O,
    ) -> bool {
        let Some(ip) = packet.ip() else {
            return false;
        };
        self.send_with(ip.source, now, out, |buffer| {
            write_error(buffer, lan, kind, packet)
        })
    }

    /// As [`ErrorSender::send`], about an IP packet of the guest at `guest` that is known to deserve an
    /// error: see [`write_about`].
    ///
    /// # Panics
    /// If `about` is shorter than its IP header.
    pub fn send_about<O: Outbox + ?Sized>(
        &mut self,
        lan: &LanConfig,
        kind: ErrorKind,
        (guest, about): (Mac, &[u8]),
        now: Instant,
        out: &mut O,
    ) -> bool {
        self.send_with(source_of(about), now, out, |buffer| {
            write_about(buffer, lan, kind, guest, about)
        })
    }

    /// Sends the error to `guest` that `write` writes, if the limit allows it.
    pub(super) fn send_with<O: Outbox + ?Sized>(
        &mut self,
        guest: IpAddr,
        now: Instant,
        out: &mut O,
        write: impl FnOnce(&mut [u8]) -> Option<usize>,
    ) -> bool {
        let bucket = bucket(guest);
        if !self.has_token(bucket, now) {
            self.suppressed += 1;
            return false;
        }
        let Some(len) = write(out.buffer()) else {
            return false;
        };
        self.buckets[bucket].0 -= COST_MICROS;
        self.sent += 1;
        out.send(len, Offload::default());
        true
    }

    fn has_token(&mut self, bucket: usize, now: Instant) -> bool {
        let (unspent, updated) = &mut self.buckets[bucket];
        if now > *updated {
            let passed: Duration = now - *updated;
            *unspent = (*unspent + passed.total_micros()).min(FULL_MICROS);
            *updated = now;
        }
        *unspent >= COST_MICROS
    }

    /// Errors sent and errors that the rate limit held back.
    pub fn counters(&self) -> (u64, u64) {
        (self.sent, self.suppressed)
    }
}

/// The last byte of an IPv4 address; all bytes of the interface identifier of an IPv6 one.
fn bucket(guest: IpAddr) -> usize {
    let byte = match guest {
        IpAddr::V4(guest) => guest.octets()[3],
        IpAddr::V6(guest) => guest.octets()[8..].iter().fold(0, |all, byte| all ^ byte),
    };
    byte.into()
}

impl Default for ErrorSender {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::Mac;
    use crate::nat::testing::{
        FrameLog, GUEST, GUEST_MAC, GUEST6, guest_echo, guest_echo6, guest_ipv4, guest_ipv6,
        guest_udp, lan, parse,
    };
    use crate::wire::{Body, Transport};
    use std::net::{Ipv6Addr, SocketAddr};

    const OUTSIDE: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 7);

    fn error_about(kind: ErrorKind, frame: &[u8]) -> Option<Vec<u8>> {
        let mut buffer = vec![0xee; 4096];
        let packet = parse(frame, Offload::default());
        let len = write_error(&mut buffer, &lan(), kind, &packet)?;
        buffer.truncate(len);
        Some(buffer)
    }

    fn udp(payload: &[u8]) -> Vec<u8> {
        let to = SocketAddr::new(OUTSIDE.into(), 53);
        guest_udp(SocketAddr::new(GUEST.into(), 4000), to, 1, payload)
    }

    #[test]
    fn quotes_the_packet_with_right_checksums() {
        let all = [
            (ErrorKind::TimeExceeded, [11, 0, 0, 0]),
            (ErrorKind::ReassemblyTimeExceeded, [11, 1, 0, 0]),
            (ErrorKind::ProtocolUnreachable, [3, 2, 0, 0]),
            (ErrorKind::NetUnreachable, [3, 0, 0, 0]),
            (ErrorKind::HostUnreachable, [3, 1, 0, 0]),
            (ErrorKind::PortUnreachable, [3, 3, 0, 0]),
            (ErrorKind::Prohibited, [3, 13, 0, 0]),
            (ErrorKind::TooBig { mtu: 1280 }, [3, 4, 5, 0]),
        ];
        for (kind, [of_type, code, high, low]) in all {
            for len in [0, 1, 300, 519, 520, 521, 1472] {
                let about = udp(&vec![7; len]);
                let frame = error_about(kind, &about).unwrap();
                // Parsing checks the IP and ICMP checksums.
                let packet = parse(&frame, Offload::default());
                assert_eq!((packet.source, packet.destination), (lan().mac, GUEST_MAC));
                let Body::Ipv4(ip) = packet.body else {
                    panic!("not IPv4");
                };
                assert_eq!((ip.source, ip.destination), (lan().address, GUEST));
                let Transport::Icmp(icmp) = ip.transport else {
                    panic!("not ICMP");
                };
                assert_eq!(icmp[..2], [of_type, code]);
                assert_eq!(icmp[4..8], [0, 0, high, low]);
                let quoted = (28 + len).min(548);
                assert_eq!(icmp[8..], about[14..14 + quoted]);
                assert!(ip.packet.len() <= ERROR4_LEN_MAX);
            }
        }
    }

    #[test]
    fn no_error_where_the_rfcs_forbid_one() {
        let kind = ErrorKind::TimeExceeded;
        let icmp = |of_type: u8| {
            let mut message = vec![of_type, 0, 0, 0, 0, 0, 0, 0];
            let sum = !checksum::fold(checksum::sum(&message));
            message[2..4].copy_from_slice(&sum.to_be_bytes());
            guest_ipv4(GUEST, OUTSIDE, PROTO_ICMP, 1, &message)
        };
        for error in [3, 4, 5, 11, 12, 42, 255] {
            assert_eq!(error_about(kind, &icmp(error)), None, "{error}");
        }
        assert!(error_about(kind, &icmp(13)).is_some());
        assert!(error_about(kind, &guest_echo(GUEST, OUTSIDE, (1, 1), 1, b"")).is_some());
        for to in [[224, 0, 0, 1], [255; 4], [192, 168, 122, 255]] {
            let frame = guest_ipv4(GUEST, to.into(), 99, 1, b"");
            assert_eq!(error_about(kind, &frame), None, "{to:?}");
        }
        for from in [
            [0; 4],
            [127, 0, 0, 1],
            [224, 0, 0, 1],
            [255; 4],
            [192, 168, 122, 255],
        ] {
            let frame = guest_ipv4(from.into(), OUTSIDE, 99, 1, b"");
            assert_eq!(error_about(kind, &frame), None, "{from:?}");
        }
        let mut broadcast = udp(b"");
        broadcast[..6].copy_from_slice(&Mac::BROADCAST.0);
        assert_eq!(error_about(kind, &broadcast), None);
        let mut later = udp(b"fragment");
        later[20..22].copy_from_slice(&[0, 1]);
        later[24..26].copy_from_slice(&[0, 0]);
        let sum = !checksum::fold(checksum::sum(&later[14..34]));
        later[24..26].copy_from_slice(&sum.to_be_bytes());
        assert_eq!(error_about(kind, &later), None);
    }

    const OUTSIDE6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 7);

    fn udp6(payload: &[u8]) -> Vec<u8> {
        let to = SocketAddr::new(OUTSIDE6.into(), 53);
        guest_udp(SocketAddr::new(GUEST6.into(), 4000), to, 1, payload)
    }

    #[test]
    fn icmpv6_quotes_what_fits_the_least_mtu() {
        let all = [
            (ErrorKind::NetUnreachable, (1, 0, 0)),
            (ErrorKind::Prohibited, (1, 1, 0)),
            (ErrorKind::HostUnreachable, (1, 3, 0)),
            (ErrorKind::PortUnreachable, (1, 4, 0)),
            (ErrorKind::TooBig { mtu: 70_000 }, (2, 0, 70_000)),
            (ErrorKind::TimeExceeded, (3, 0, 0)),
            (ErrorKind::ReassemblyTimeExceeded, (3, 1, 0)),
            (ErrorKind::ProtocolUnreachable, (4, 1, 6)),
        ];
        for (kind, (of_type, code, rest)) in all {
            for len in [0, 1, 300, 1183, 1184, 1185, 1452] {
                let about = udp6(&vec![7; len]);
                let frame = error_about(kind, &about).unwrap();
                // Parsing checks the checksum.
                let packet = parse(&frame, Offload::default());
                assert_eq!((packet.source, packet.destination), (lan().mac, GUEST_MAC));
                let Body::Ipv6(ip) = packet.body else {
                    panic!("not IPv6");
                };
                let gateway = lan().v6.unwrap().address;
                assert_eq!((ip.source, ip.destination), (gateway, GUEST6));
                let Transport::Icmp(icmp) = ip.transport else {
                    panic!("not ICMPv6");
                };
                assert_eq!(icmp[..2], [of_type, code]);
                assert_eq!(icmp[4..8], u32::to_be_bytes(rest));
                let quoted = (48 + len).min(1232);
                assert_eq!(icmp[8..], about[14..14 + quoted]);
                assert!(ip.packet.len() <= 1280);
            }
        }
    }

    #[test]
    fn an_unknown_next_header_is_pointed_at() {
        let options = [99, 0, 1, 4, 0, 0, 0, 0];
        let frame = guest_ipv6(GUEST6, OUTSIDE6, 60, 1, &options);
        let error = error_about(ErrorKind::ProtocolUnreachable, &frame).unwrap();
        assert_eq!(error[54..62], [4, 1, error[56], error[57], 0, 0, 0, 40]);
    }

    #[test]
    fn a_link_local_guest_hears_from_the_link_local_gateway() {
        let from = wire::ipv6::link_local(GUEST_MAC);
        let frame = guest_ipv6(from, OUTSIDE6, 99, 64, b"");
        let error = error_about(ErrorKind::Prohibited, &frame).unwrap();
        let Body::Ipv6(ip) = parse(&error, Offload::default()).body else {
            panic!("not IPv6");
        };
        assert_eq!(
            (ip.source, ip.destination),
            (lan().v6.unwrap().link_local, from)
        );
        let mut without = lan();
        without.v6 = None;
        let packet = parse(&frame, Offload::default());
        let mut buffer = vec![0; 4096];
        let written = write_error(&mut buffer, &without, ErrorKind::Prohibited, &packet);
        assert_eq!(written, None);
    }

    #[test]
    fn no_icmpv6_error_where_rfc_4443_forbids_one() {
        let kind = ErrorKind::TimeExceeded;
        let icmp = |of_type: u8, to: Ipv6Addr| {
            let mut message = [of_type, 0, 0, 0, 0, 0, 0, 0];
            complete_checksum(&mut message, GUEST6.into(), to.into());
            guest_ipv6(GUEST6, to, PROTO_ICMPV6, 1, &message)
        };
        for error in [0, 1, 2, 3, 4, 100, 127, 137] {
            assert_eq!(error_about(kind, &icmp(error, OUTSIDE6)), None, "{error}");
        }
        assert!(error_about(kind, &icmp(128, OUTSIDE6)).is_some());
        assert!(error_about(kind, &guest_echo6(GUEST6, OUTSIDE6, (1, 1), 1, b"")).is_some());
        for (from, to) in [
            (GUEST6, "ff02::1".parse().unwrap()),
            (Ipv6Addr::UNSPECIFIED, OUTSIDE6),
            (Ipv6Addr::LOCALHOST, OUTSIDE6),
            ("ff02::5".parse().unwrap(), OUTSIDE6),
        ] {
            let frame = guest_ipv6(from, to, 99, 1, b"");
            assert_eq!(error_about(kind, &frame), None, "{from} {to}");
        }
        let mut broadcast = udp6(b"");
        broadcast[..6].copy_from_slice(&[0x33, 0x33, 0, 0, 0, 1]);
        assert_eq!(error_about(kind, &broadcast), None);
    }

    #[test]
    fn each_guest_has_its_own_rate() {
        let (mut errors, mut out) = (ErrorSender::new(), FrameLog::default());
        let frame = udp(b"");
        let packet = parse(&frame, Offload::default());
        let other = guest_ipv4(Ipv4Addr::new(192, 168, 122, 9), OUTSIDE, 99, 1, b"");
        let other = parse(&other, Offload::default());
        let mut send = |packet: &Packet<'_>, millis| {
            let now = Instant::from_millis(millis);
            errors.send(&lan(), ErrorKind::TimeExceeded, packet, now, &mut out)
        };
        for _ in 0..BURST {
            assert!(send(&packet, 0));
        }
        assert!(!send(&packet, 0));
        assert!(send(&other, 0));
        assert!(!send(&packet, 1));
        assert!(send(&packet, 2));
        assert!(!send(&packet, 2));
        assert!(
            !send(&packet, 1),
            "time that runs backwards refills nothing"
        );
        let sent = (0..1000).filter(|n| send(&packet, 1_000_000 + n)).count();
        assert_eq!(sent as u32, BURST + RATE_PER_SEC - 1);
        assert_eq!(errors.counters().0, out.count);
    }
}
