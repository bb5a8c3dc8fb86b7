//! One fragment: whose it is and where it belongs.

use std::net::IpAddr;

use super::PACKET_MAX;
use crate::frame::{ETH_HEADER_LEN, Mac, PortId};
use crate::stats::DropReason;
use crate::wire::ipv6::{FRAGMENT, FRAGMENT_HEADER_LEN, IPV6_HEADER_LEN, walk};
use crate::wire::{Body, Family, Ipv4, Ipv6, Packet, be16};

/// Headers in front of a fragment's payload at most, Ethernet's included. IPv4 has 74 bytes at most;
/// with IPv6 this leaves 194 for the extension headers that every fragment repeats, which are hop-by-hop
/// options of a few bytes where there are any.
pub(super) const HEADERS_MAX: usize = 256;

/// More fragments follow (RFC 791 3.1).
const IPV4_MORE: u16 = 0x2000;
const IPV4_OFFSET: u16 = 0x1fff;
/// The same of IPv6's fragment header, whose offset stands three bits higher (RFC 8200 4.5).
const IPV6_MORE: u16 = 0x0001;
const IPV6_OFFSET: u16 = 0xfff8;

/// What the fragments of one datagram have in common. Port and MAC keep guests that forge addresses
/// out of each other's datagrams.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Key {
    pub ingress: PortId,
    pub mac: Mac,
    source: IpAddr,
    destination: IpAddr,
    id: u32,
    /// Of IPv4 (RFC 791 3.2). IPv6 goes by the first fragment's (RFC 8200 4.5): 0.
    protocol: u8,
}

impl Key {
    pub fn family(&self) -> Family {
        Family::of(self.source)
    }
}

/// A checked fragment.
#[derive(Clone, Copy, Debug)]
pub(super) struct Piece<'a> {
    pub key: Key,
    /// Everything in front of the payload; ends with IPv6's fragment header.
    pub headers: &'a [u8],
    /// Place of the byte that names the fragment header, from the IPv6 header on.
    pub named_at: usize,
    /// At least one byte.
    pub payload: &'a [u8],
    /// Of the payload in the datagram's.
    pub start: usize,
    /// It is not the last.
    pub more: bool,
    /// Codepoint of explicit congestion notification.
    pub ecn: u8,
}

impl<'a> Piece<'a> {
    /// The fragment that `packet` is.
    pub fn of(packet: &Packet<'a>) -> Result<Self, DropReason> {
        let piece = match &packet.body {
            Body::Ipv4(ip) => Self::of_ipv4(packet, ip),
            Body::Ipv6(ip) => Self::of_ipv6(packet, ip)?,
            Body::Arp(_) | Body::Other(_) => return Err(DropReason::Unclaimed),
        };
        let len = piece.payload.len();
        let odd = piece.more && !len.is_multiple_of(8);
        // The largest datagram is counted with the headers that this fragment has, of which IPv6's
        // own and its fragment header do not count (RFC 8200 4.5).
        let uncounted = match piece.key.family() {
            Family::V4 => 0,
            Family::V6 => IPV6_HEADER_LEN + FRAGMENT_HEADER_LEN,
        };
        let counted = piece.headers.len() - ETH_HEADER_LEN - uncounted;
        let too_long = counted + piece.start + len > PACKET_MAX;
        if len == 0 || odd || too_long || piece.headers.len() > HEADERS_MAX {
            return Err(DropReason::Malformed);
        }
        Ok(piece)
    }

    fn of_ipv4(packet: &Packet<'a>, ip: &Ipv4<'a>) -> Self {
        let field = be16(ip.packet, 6);
        Self {
            key: Key {
                ingress: packet.ingress,
                mac: packet.source,
                source: ip.source.into(),
                destination: ip.destination.into(),
                id: be16(ip.packet, 4).into(),
                protocol: ip.packet[9],
            },
            headers: &packet.frame[..ETH_HEADER_LEN + ip.header_len],
            named_at: 0,
            payload: ip.payload(),
            start: usize::from(field & IPV4_OFFSET) * 8,
            more: field & IPV4_MORE != 0,
            ecn: ip.tos & 3,
        }
    }

    fn of_ipv6(packet: &Packet<'a>, ip: &Ipv6<'a>) -> Result<Self, DropReason> {
        let chain = walk(ip.packet)?;
        if chain.protocol != FRAGMENT {
            return Err(DropReason::Unclaimed);
        }
        let header = ip.packet.get(chain.at..chain.at + FRAGMENT_HEADER_LEN);
        let header = header.ok_or(DropReason::Truncated)?;
        let headers_len = chain.at + FRAGMENT_HEADER_LEN;
        let field = be16(header, 2);
        Ok(Self {
            key: Key {
                ingress: packet.ingress,
                mac: packet.source,
                source: ip.source.into(),
                destination: ip.destination.into(),
                id: u32::from_be_bytes([header[4], header[5], header[6], header[7]]),
                protocol: 0,
            },
            headers: &packet.frame[..ETH_HEADER_LEN + headers_len],
            named_at: chain.named_at,
            payload: &ip.packet[headers_len..],
            start: usize::from(field & IPV6_OFFSET),
            more: field & IPV6_MORE != 0,
            ecn: ip.tos & 3,
        })
    }
}
