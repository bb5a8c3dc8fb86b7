//! ICMP errors from the gateway to a guest, about a packet of that guest (RFC 792, RFC 1812 4.3).

use std::net::Ipv4Addr;

use crate::frame::{Duration, ETH_HEADER_LEN, Instant, Mac};
use crate::gateway::{LanConfig, Outbox};
use crate::offload::Offload;
use crate::wire::{
    self, Body, ETHERTYPE_IPV4, IPV4_HEADER_LEN, Ipv4, Ipv4Fields, PROTO_ICMP, Packet, checksum,
};

/// ICMP header with its four bytes of rest.
const ICMP_HEADER_LEN: usize = 8;
/// An error is 576 bytes at most, IP header included (RFC 1812 4.3.2.3).
const ERROR_LEN_MAX: usize = 576;
const QUOTE_LEN_MAX: usize = ERROR_LEN_MAX - IPV4_HEADER_LEN - ICMP_HEADER_LEN;
/// Precedence 6, internetwork control (RFC 1812 4.3.2.5).
const TOS: u8 = 0xc0;

/// What is wrong with the guest's packet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ErrorKind {
    /// Type 11, code 0: TTL exceeded in transit.
    TimeExceeded,
    /// Type 3, code 0.
    NetUnreachable,
    /// Type 3, code 1.
    HostUnreachable,
    /// Type 3, code 2.
    ProtocolUnreachable,
    /// Type 3, code 3.
    PortUnreachable,
    /// Type 3, code 13: communication administratively prohibited (RFC 1812 5.2.7.1).
    Prohibited,
    /// Type 3, code 4, with the MTU that would fit (RFC 1191).
    FragmentationNeeded {
        /// MTU of the next hop, bytes of IP packet.
        mtu: u16,
    },
}

impl ErrorKind {
    /// Type, code, and the low half of the header's rest.
    fn header(self) -> (u8, u8, u16) {
        match self {
            ErrorKind::NetUnreachable => (3, 0, 0),
            ErrorKind::HostUnreachable => (3, 1, 0),
            ErrorKind::ProtocolUnreachable => (3, 2, 0),
            ErrorKind::PortUnreachable => (3, 3, 0),
            ErrorKind::FragmentationNeeded { mtu } => (3, 4, mtu),
            ErrorKind::Prohibited => (3, 13, 0),
            ErrorKind::TimeExceeded => (11, 0, 0),
        }
    }
}

/// Writes the whole frame of an error about `packet` and returns its length; `None` where RFC 1812
/// 4.3.2.7 and RFC 1122 3.2.2 forbid an error.
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
    let Body::Ipv4(ip) = &packet.body else {
        return None;
    };
    if packet.destination.is_group() || !may_cause_error(ip, lan) {
        return None;
    }
    Some(write_about(buffer, lan, kind, packet.source, ip.packet))
}

/// Writes the whole frame of an error about the IP packet `about` of the guest at `guest` and returns
/// its length. For packets that are known to deserve one; [`write_error`] asks.
///
/// # Panics
/// If `about` is shorter than an IPv4 header, or `buffer` than the largest error.
pub fn write_about(
    buffer: &mut [u8],
    lan: &LanConfig,
    kind: ErrorKind,
    guest: Mac,
    about: &[u8],
) -> usize {
    let quote = &about[..about.len().min(QUOTE_LEN_MAX)];
    let icmp_len = ICMP_HEADER_LEN + quote.len();
    wire::write_ethernet(buffer, guest, lan.mac, ETHERTYPE_IPV4);
    let fields = Ipv4Fields {
        source: lan.address,
        destination: Ipv4Addr::new(about[12], about[13], about[14], about[15]),
        protocol: PROTO_ICMP,
        ttl: wire::TTL_DEFAULT,
        tos: TOS,
    };
    wire::write_ipv4(buffer, fields, icmp_len);
    let icmp = &mut buffer[ETH_HEADER_LEN + IPV4_HEADER_LEN..][..icmp_len];
    let (of_type, code, rest) = kind.header();
    icmp[..ICMP_HEADER_LEN].copy_from_slice(&[of_type, code, 0, 0, 0, 0, 0, 0]);
    icmp[6..8].copy_from_slice(&rest.to_be_bytes());
    icmp[ICMP_HEADER_LEN..].copy_from_slice(quote);
    let sum = !checksum::fold(checksum::sum(icmp));
    icmp[2..4].copy_from_slice(&sum.to_be_bytes());
    ETH_HEADER_LEN + IPV4_HEADER_LEN + icmp_len
}

/// Not about ICMP errors, fragments other than the first, broadcasts and multicasts, nor to a source
/// that is no single host.
fn may_cause_error(ip: &Ipv4<'_>, lan: &LanConfig) -> bool {
    let later_fragment = wire::be16(ip.packet, 6) & 0x1fff != 0;
    // Echo, router solicitation, timestamp, information and mask requests and replies. Unknown types
    // may be errors.
    let is_query = |of_type| matches!(of_type, 0 | 8 | 9 | 10 | 13..=18);
    let icmp_error =
        ip.packet[9] == PROTO_ICMP && !ip.payload().first().is_some_and(|t| is_query(*t));
    let group = |address: Ipv4Addr| {
        address.is_multicast() || address.is_broadcast() || address == lan.broadcast()
    };
    let no_host = ip.source.is_unspecified() || ip.source.is_loopback() || group(ip.source);
    !later_fragment && !icmp_error && !no_host && !group(ip.destination)
}

/// Errors of one guest address in a row. A traceroute sends three probes per hop and keeps 16 in
/// flight; a port scan or a flood gets no more than this and [`RATE_PER_SEC`].
pub const BURST: u32 = 50;
/// Errors per second and guest address after a burst (RFC 1812 4.3.2.8 asks for a limit).
pub const RATE_PER_SEC: u32 = 100;
/// Token buckets. Chosen by the last byte of the guest's address: one each in a /24. A guest that
/// forges sources gets 256 buckets at most, and no memory.
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
        let Body::Ipv4(ip) = &packet.body else {
            return false;
        };
        if !self.has_token(ip.source.octets()[3], now) {
            self.suppressed += 1;
            return false;
        }
        let Some(len) = write_error(out.buffer(), lan, kind, packet) else {
            return false;
        };
        self.buckets[usize::from(ip.source.octets()[3])].0 -= COST_MICROS;
        self.sent += 1;
        out.send(len, Offload::default());
        true
    }

    fn has_token(&mut self, bucket: u8, now: Instant) -> bool {
        let (unspent, updated) = &mut self.buckets[usize::from(bucket)];
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
        FrameLog, GUEST, GUEST_MAC, guest_echo, guest_ipv4, guest_udp, lan, parse,
    };
    use crate::wire::Transport;
    use std::net::{Ipv4Addr, SocketAddrV4};

    const OUTSIDE: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 7);

    fn error_about(kind: ErrorKind, frame: &[u8]) -> Option<Vec<u8>> {
        let mut buffer = vec![0xee; 4096];
        let packet = parse(frame, Offload::default());
        let len = write_error(&mut buffer, &lan(), kind, &packet)?;
        buffer.truncate(len);
        Some(buffer)
    }

    fn udp(payload: &[u8]) -> Vec<u8> {
        let to = SocketAddrV4::new(OUTSIDE, 53);
        guest_udp(SocketAddrV4::new(GUEST, 4000), to, 1, payload)
    }

    #[test]
    fn quotes_the_packet_with_right_checksums() {
        let all = [
            (ErrorKind::TimeExceeded, [11, 0, 0, 0]),
            (ErrorKind::NetUnreachable, [3, 0, 0, 0]),
            (ErrorKind::HostUnreachable, [3, 1, 0, 0]),
            (ErrorKind::PortUnreachable, [3, 3, 0, 0]),
            (ErrorKind::Prohibited, [3, 13, 0, 0]),
            (ErrorKind::FragmentationNeeded { mtu: 1280 }, [3, 4, 5, 0]),
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
                assert!(ip.packet.len() <= ERROR_LEN_MAX);
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
        assert!(!send(&packet, 9));
        assert!(send(&packet, 10));
        assert!(!send(&packet, 10));
        assert!(
            !send(&packet, 5),
            "time that runs backwards refills nothing"
        );
        let sent = (0..1000).filter(|n| send(&packet, 1_000_000 + n)).count();
        assert_eq!(sent as u32, BURST + RATE_PER_SEC - 1);
        assert_eq!(errors.counters().0, out.count);
    }
}
