//! Links behind a guest that are smaller than the LAN: what a router guest says of them.
//!
//! A guest that routes (containers, a VPN) answers a packet that does not fit its next link with ICMP
//! "fragmentation needed" (RFC 792, RFC 1191) or ICMPv6 "packet too big" (RFC 4443 3.2, RFC 8201), to whom
//! the packet seemed to come from. That is a flow of the NAT, which heeds it in the outside's stead: TCP
//! sends smaller segments from there on, datagrams are cut for [`AGE`].
//!
//! # Hostile guests
//! A report counts for a flow of the port that it came from, and one of TCP for data that is on its way
//! (RFC 5927 4.1, 7.2); it can make packets smaller, down to [`MIN4`] or what IPv6 requires of every link, and
//! have what is on its way sent again once per [`SEND_AGAIN_INTERVAL`](super::tcp::SEND_AGAIN_INTERVAL).
//! So a guest can only slow itself down, and who is behind it needs to see its packets to do that.

use std::net::SocketAddr;

use crate::frame::{Duration, Instant};
use crate::wire::ipv6::{
    FRAGMENT, FRAGMENT_HEADER_LEN, IPV6_HEADER_LEN, MTU_MIN, address_at, walk,
};
use crate::wire::{self, Family, IPV4_HEADER_LEN, PROTO_ICMP, PROTO_ICMPV6, PROTO_TCP, PROTO_UDP};

/// How long what was learned of a path counts: RFC 1191 6.3 and RFC 8201 4 want ten minutes at least
/// before a larger packet is tried.
pub const AGE: Duration = Duration::from_secs(600);
/// Least MTU of an IPv4 path that is believed, the lowest plateau of links that were ever common (RFC 1191
/// 7.1). Linux stops at 552 (net.ipv4.route.min_pmtu), and clears DF below, which TCP's engine can't.
pub const MIN4: u16 = 296;
/// What a router that does not say its MTU (RFC 792 as it was before RFC 1191) is taken to have: what every
/// host takes (RFC 791 3.1).
const UNSAID4: u16 = 576;

const ICMP_HEADER_LEN: usize = 8;
/// Bytes of the transport header that a quote has at least (RFC 792).
const QUOTED_TRANSPORT_LEN: usize = 8;

/// The packet that was too big, as far as it says whose it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Quoted {
    /// A TCP segment with this sequence number.
    Tcp(u32),
    /// A UDP datagram.
    Udp,
    /// An echo reply. The identifier is the guest's port.
    Echo,
}

/// A packet to a guest was too big.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TooBig {
    /// Bytes of IP packet that the path takes.
    pub mtu: u16,
    /// Where the packet was going.
    pub guest: SocketAddr,
    /// Where it seemed to come from.
    pub outside: SocketAddr,
    /// What it was.
    pub quoted: Quoted,
}

impl TooBig {
    /// What a guest's ICMP message says; `None`: something else, or nothing that makes sense.
    pub fn parse(family: Family, message: &[u8]) -> Option<Self> {
        let (header, quote) = message.split_first_chunk::<ICMP_HEADER_LEN>()?;
        match (family, header[0], header[1]) {
            (Family::V4, 3, 4) => Self::parse4(wire::be16(header, 6), quote),
            (Family::V6, 2, 0) => {
                let mtu = u32::from_be_bytes([header[4], header[5], header[6], header[7]]);
                Self::parse6(mtu, quote)
            }
            _ => None,
        }
    }

    fn parse4(mtu: u16, quote: &[u8]) -> Option<Self> {
        let header = quote.first_chunk::<IPV4_HEADER_LEN>()?;
        // Of a packet that was cut, the first piece alone says whose it is.
        if header[0] >> 4 != 4 || wire::be16(header, 6) & 0x1fff != 0 {
            return None;
        }
        let at = |at: usize| <[u8; 4]>::try_from(&header[at..at + 4]).ok();
        let ends = (at(12)?.into(), at(16)?.into());
        let transport = quote.get(usize::from(header[0] & 0x0f) * 4..)?;
        let mtu = match mtu {
            0 => UNSAID4,
            mtu => mtu.max(MIN4),
        };
        Self::of(mtu, ends, header[9], transport)
    }

    fn parse6(mtu: u32, quote: &[u8]) -> Option<Self> {
        let header = quote.first_chunk::<IPV6_HEADER_LEN>()?;
        if header[0] >> 4 != 6 {
            return None;
        }
        let chain = walk(quote).ok()?;
        let (mut protocol, mut at) = (chain.protocol, chain.at);
        if protocol == FRAGMENT {
            let fragment = quote.get(at..at + FRAGMENT_HEADER_LEN)?;
            if wire::be16(fragment, 2) & !7 != 0 {
                return None;
            }
            (protocol, at) = (fragment[0], at + FRAGMENT_HEADER_LEN);
        }
        let ends = (address_at(header, 8).into(), address_at(header, 24).into());
        // RFC 8201 4: never below what every link carries.
        let mtu = u16::try_from(mtu).unwrap_or(u16::MAX).max(MTU_MIN);
        Self::of(mtu, ends, protocol, quote.get(at..)?)
    }

    fn of(
        mtu: u16,
        (outside, guest): (std::net::IpAddr, std::net::IpAddr),
        protocol: u8,
        transport: &[u8],
    ) -> Option<Self> {
        let transport = transport.first_chunk::<QUOTED_TRANSPORT_LEN>()?;
        let (first, second) = (wire::be16(transport, 0), wire::be16(transport, 2));
        let last = [transport[4], transport[5], transport[6], transport[7]];
        let (quoted, outside_port, guest_port) = match protocol {
            PROTO_TCP => (Quoted::Tcp(u32::from_be_bytes(last)), first, second),
            PROTO_UDP => (Quoted::Udp, first, second),
            PROTO_ICMP | PROTO_ICMPV6 => (Quoted::Echo, 0, wire::be16(transport, 4)),
            _ => return None,
        };
        Some(Self {
            mtu,
            guest: SocketAddr::new(guest, guest_port),
            outside: SocketAddr::new(outside, outside_port),
            quoted,
        })
    }
}

/// What is known of the path to one guest endpoint.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct PathMtu(Option<(u16, Instant)>);

impl PathMtu {
    /// Takes a report in, on a LAN of MTU `lan`; whether the path is smaller than was known.
    pub fn learn(&mut self, mtu: u16, lan: u16, now: Instant) -> bool {
        let smaller = mtu < self.get(lan, now);
        if smaller {
            self.0 = Some((mtu, now + AGE));
        }
        smaller
    }

    /// The MTU of the path, on a LAN of MTU `lan`.
    pub fn get(&self, lan: u16, now: Instant) -> u16 {
        match self.0 {
            Some((mtu, until)) if now < until => mtu.min(lan),
            _ => lan,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a router says of a TCP segment, sequence 0x01020304, from 198.51.100.1:80 to 10.0.0.2:4000.
    fn needed(mtu: u16, offset: u16) -> Vec<u8> {
        let mut message = vec![3, 4, 0, 0, 0, 0];
        message.extend(mtu.to_be_bytes());
        message.extend([0x45, 0, 5, 220, 0, 0]);
        message.extend((0x4000 | offset).to_be_bytes());
        message.extend([64, PROTO_TCP, 0, 0, 198, 51, 100, 1, 10, 0, 0, 2]);
        message.extend([0, 80, 0x0f, 0xa0, 1, 2, 3, 4]);
        message
    }

    #[test]
    fn reports_are_read_and_bounded() {
        let report = TooBig::parse(Family::V4, &needed(1400, 0)).unwrap();
        assert_eq!(report.mtu, 1400);
        assert_eq!(report.guest, "10.0.0.2:4000".parse().unwrap());
        assert_eq!(report.outside, "198.51.100.1:80".parse().unwrap());
        assert_eq!(report.quoted, Quoted::Tcp(0x0102_0304));
        for (said, mtu) in [(0, 576), (1, 296), (295, 296), (9000, 9000)] {
            assert_eq!(
                TooBig::parse(Family::V4, &needed(said, 0)).unwrap().mtu,
                mtu
            );
        }
        assert_eq!(TooBig::parse(Family::V4, &needed(1400, 1)), None);
        assert_eq!(TooBig::parse(Family::V6, &needed(1400, 0)), None);
        let whole = needed(1400, 0);
        for len in 0..whole.len() {
            assert_eq!(TooBig::parse(Family::V4, &whole[..len]), None, "{len}");
        }
    }

    #[test]
    fn ipv6_reports_are_read_through_a_fragment_header() {
        for (is_cut, offset, said, mtu) in [
            (false, 0, 1280u32, Some(1280)),
            (true, 0, 1300, Some(1300)),
            (true, 8, 1300, None),
            (false, 0, 68, Some(1280)),
            (false, 0, u32::MAX, Some(u16::MAX)),
        ] {
            let mut message = vec![2, 0, 0, 0];
            message.extend(said.to_be_bytes());
            let protocol = if is_cut { FRAGMENT } else { PROTO_UDP };
            message.extend([0x60, 0, 0, 0, 4, 0, protocol, 64]);
            message.extend([0x20; 16]);
            message.extend([0xfd; 16]);
            if is_cut {
                message.extend([PROTO_UDP, 0, 0, offset | 1, 0, 0, 0, 1]);
            }
            message.extend([0, 53, 0x0f, 0xa0, 4, 0, 0, 0]);
            let report = TooBig::parse(Family::V6, &message);
            assert_eq!(report.map(|report| report.mtu), mtu);
            assert!(report.is_none_or(|report| report.quoted == Quoted::Udp));
            for len in 0..message.len() {
                assert_eq!(TooBig::parse(Family::V6, &message[..len]), None, "{len}");
            }
        }
    }

    #[test]
    fn a_path_is_forgotten_after_its_age() {
        let mut path = PathMtu::default();
        let now = Instant::from_secs(5);
        assert!(path.learn(1400, 1500, now) && !path.learn(1400, 1500, now));
        assert!(!path.learn(1450, 1500, now) && path.learn(1300, 1500, now));
        assert_eq!((path.get(1500, now), path.get(1200, now)), (1300, 1200));
        assert_eq!(path.get(1500, now + AGE), 1500);
        assert!(!PathMtu::default().learn(9000, 1500, now));
    }
}
