//! IPv6: parsing down to the transport, and the header lanlet writes.

use std::net::{IpAddr, Ipv6Addr};

use super::{
    ETH_HEADER_LEN, ETHERTYPE_IPV6, Ipv6, PROTO_UDP, TTL_DEFAULT, Transport, UDP_HEADER_LEN, be16,
    checksum, parse_transport, write_ethernet,
};
use crate::frame::Mac;
use crate::offload::{Gso, Offload};
use crate::stats::DropReason;

/// IPv6 header without extension headers (RFC 8200 3).
pub const IPV6_HEADER_LEN: usize = 40;
/// Least MTU of a link that carries IPv6 (RFC 8200 5).
pub const MTU_MIN: u16 = 1280;
/// Fragment header (RFC 8200 4.5).
pub const FRAGMENT: u8 = 44;
/// Nothing follows (RFC 8200 4.7).
pub const NO_NEXT_HEADER: u8 = 59;
/// Bytes of a fragment header.
pub const FRAGMENT_HEADER_LEN: usize = 8;

const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const DESTINATION: u8 = 60;
/// More extension headers than any sender chains: RFC 8200 4.1 names six kinds, each once but one.
const EXTENSION_HEADERS_MAX: usize = 8;

/// Where the extension headers of a packet end.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Chain {
    /// What follows them: a transport, or [`FRAGMENT`], which ends the walk.
    pub protocol: u8,
    /// Its place, bytes from the IPv6 header's first.
    pub at: usize,
    /// Place of the byte that names it.
    pub named_at: usize,
}

/// Walks the extension headers of `packet`, which holds an IPv6 header.
///
/// # Errors
/// [`DropReason::Truncated`] where they reach beyond the packet, [`DropReason::Malformed`] where they
/// are too many or route (a routing header lets the sender name addresses that nothing here has
/// looked at; RFC 5095 forbids the common one).
///
/// # Panics
/// If `packet` is shorter than an IPv6 header.
pub fn walk(packet: &[u8]) -> Result<Chain, DropReason> {
    let mut chain = Chain {
        protocol: packet[6],
        at: IPV6_HEADER_LEN,
        named_at: 6,
    };
    for _ in 0..EXTENSION_HEADERS_MAX {
        match chain.protocol {
            HOP_BY_HOP | DESTINATION => {}
            ROUTING => return Err(DropReason::Malformed),
            _ => return Ok(chain),
        }
        let extension = packet.get(chain.at..chain.at + 2);
        let extension = extension.ok_or(DropReason::Truncated)?;
        chain.protocol = extension[0];
        chain.named_at = chain.at;
        chain.at += (usize::from(extension[1]) + 1) * 8;
        if chain.at > packet.len() {
            return Err(DropReason::Truncated);
        }
    }
    Err(DropReason::Malformed)
}

/// Parses what is behind the Ethernet header.
///
/// # Errors
/// [`DropReason::Truncated`] or [`DropReason::Malformed`].
pub(super) fn parse(bytes: &[u8], offload: Offload) -> Result<Ipv6<'_>, DropReason> {
    let header: &[u8; IPV6_HEADER_LEN] = bytes.first_chunk().ok_or(DropReason::Truncated)?;
    if header[0] >> 4 != 6 {
        return Err(DropReason::Malformed);
    }
    // No jumbograms (RFC 2675): a length of 0 would mean one only with a hop-by-hop option.
    let total_len = IPV6_HEADER_LEN + usize::from(be16(header, 4));
    let packet = bytes.get(..total_len).ok_or(DropReason::Truncated)?;
    let chain = walk(packet)?;
    let (source, destination) = (address_at(header, 8), address_at(header, 24));
    let transport = if chain.protocol == FRAGMENT {
        if offload.gso != Gso::None {
            return Err(DropReason::Malformed);
        }
        Transport::Fragment
    } else {
        let addresses: (IpAddr, IpAddr) = (source.into(), destination.into());
        parse_transport(addresses, chain.protocol, &packet[chain.at..], offload)?
    };
    Ok(Ipv6 {
        source,
        destination,
        ttl: header[7],
        tos: (be16(header, 0) >> 4) as u8,
        packet,
        header_len: chain.at,
        transport,
    })
}

/// The address at `at`.
///
/// # Panics
/// If fewer than 16 bytes are there.
pub fn address_at(bytes: &[u8], at: usize) -> Ipv6Addr {
    let octets: [u8; 16] = bytes[at..at + 16].try_into().expect("16 bytes");
    Ipv6Addr::from(octets)
}

/// The fields of an IPv6 header that its writer chooses.
#[derive(Clone, Copy, Debug)]
pub struct Ipv6Fields {
    /// Source address.
    pub source: Ipv6Addr,
    /// Destination address.
    pub destination: Ipv6Addr,
    /// Next header.
    pub protocol: u8,
    /// Hop limit.
    pub hop_limit: u8,
    /// Traffic class: DSCP and ECN.
    pub traffic_class: u8,
}

/// Writes an IPv6 header with flow label 0 into `buffer[14..54]`, for a payload of `payload_len` bytes
/// behind it.
///
/// # Panics
/// If the payload exceeds 65,535 bytes.
pub fn write_ipv6(buffer: &mut [u8], fields: Ipv6Fields, payload_len: usize) {
    let len = u16::try_from(payload_len).expect("an IPv6 packet's payload is 65,535 bytes at most");
    let header = &mut buffer[ETH_HEADER_LEN..ETH_HEADER_LEN + IPV6_HEADER_LEN];
    let first = 6 << 28 | u32::from(fields.traffic_class) << 20;
    header[..4].copy_from_slice(&first.to_be_bytes());
    header[4..6].copy_from_slice(&len.to_be_bytes());
    header[6] = fields.protocol;
    header[7] = fields.hop_limit;
    header[8..24].copy_from_slice(&fields.source.octets());
    header[24..40].copy_from_slice(&fields.destination.octets());
}

/// Offset of a UDP payload in a frame that [`write_udp6`] makes.
pub const UDP6_PAYLOAD_AT: usize = ETH_HEADER_LEN + IPV6_HEADER_LEN + UDP_HEADER_LEN;

/// Completes a UDP over IPv6 frame whose payload of `payload_len` bytes already lies at
/// [`UDP6_PAYLOAD_AT`]; the checksum is computed. Returns the frame's length.
pub fn write_udp6(
    buffer: &mut [u8],
    (source_mac, source, source_port): (Mac, Ipv6Addr, u16),
    (destination_mac, destination, destination_port): (Mac, Ipv6Addr, u16),
    payload_len: usize,
) -> usize {
    let udp_len = UDP_HEADER_LEN + payload_len;
    write_ethernet(buffer, destination_mac, source_mac, ETHERTYPE_IPV6);
    let fields = Ipv6Fields {
        source,
        destination,
        protocol: PROTO_UDP,
        hop_limit: TTL_DEFAULT,
        traffic_class: 0,
    };
    write_ipv6(buffer, fields, udp_len);
    let udp = &mut buffer[ETH_HEADER_LEN + IPV6_HEADER_LEN..][..udp_len];
    udp[..2].copy_from_slice(&source_port.to_be_bytes());
    udp[2..4].copy_from_slice(&destination_port.to_be_bytes());
    udp[4..6].copy_from_slice(&(udp_len as u16).to_be_bytes());
    udp[6..8].copy_from_slice(&[0, 0]);
    // RFC 8200 8.1: a sum of 0 is sent as all ones.
    let sum = match !checksum::transport(source.into(), destination.into(), PROTO_UDP, udp) {
        0 => 0xffff,
        sum => sum,
    };
    udp[6..8].copy_from_slice(&sum.to_be_bytes());
    ETH_HEADER_LEN + IPV6_HEADER_LEN + udp_len
}

/// The link-local address that a MAC's modified EUI-64 gives (RFC 4291 2.5.6, appendix A).
pub fn link_local(mac: Mac) -> Ipv6Addr {
    with_interface_id(Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0), mac)
}

/// The address of the interface with this MAC in a /64 (RFC 4862 5.5.3).
pub fn with_interface_id(prefix: Ipv6Addr, mac: Mac) -> Ipv6Addr {
    let [a, b, c, d, e, f] = mac.0;
    let id = u64::from_be_bytes([a ^ 2, b, c, 0xff, 0xfe, d, e, f]);
    Ipv6Addr::from_bits(prefix.to_bits() >> 64 << 64 | u128::from(id))
}

/// The group that a unicast address's owner listens to (RFC 4291 2.7.1).
pub fn solicited_node(address: Ipv6Addr) -> Ipv6Addr {
    let low = address.to_bits() & 0xff_ffff;
    Ipv6Addr::from_bits(0xff02_0000_0000_0000_0000_0001_ff00_0000 | low)
}

/// The MAC that a group's packets are sent to (RFC 2464 7).
pub fn group_mac(group: Ipv6Addr) -> Mac {
    let [.., a, b, c, d] = group.octets();
    Mac([0x33, 0x33, a, b, c, d])
}

/// The unicast link-local range fe80::/10.
pub fn is_link_local(address: Ipv6Addr) -> bool {
    address.segments()[0] & 0xffc0 == 0xfe80
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::{Frame, PortId};
    use crate::wire::{Body, PROTO_UDP, Packet, checksum, write_ethernet};

    fn udp_frame(extensions: &[&[u8]], payload: &[u8]) -> Vec<u8> {
        let (source, destination) = (Ipv6Addr::LOCALHOST, link_local(Mac([2, 0, 0, 0, 0, 9])));
        let mut udp = vec![0, 7, 0, 9, 0, 0, 0, 0];
        udp.extend_from_slice(payload);
        let len = (udp.len() as u16).to_be_bytes();
        udp[4..6].copy_from_slice(&len);
        let sum = !checksum::transport(source.into(), destination.into(), PROTO_UDP, &udp);
        udp[6..8].copy_from_slice(&sum.to_be_bytes());
        let mut behind: Vec<u8> = extensions.concat();
        behind.extend_from_slice(&udp);
        let mut frame = vec![0; ETH_HEADER_LEN + IPV6_HEADER_LEN];
        write_ethernet(&mut frame, Mac::BROADCAST, Mac([2; 6]), 0x86dd);
        let fields = Ipv6Fields {
            source,
            destination,
            protocol: PROTO_UDP,
            hop_limit: 3,
            traffic_class: 0xb9,
        };
        write_ipv6(&mut frame, fields, behind.len());
        frame.extend_from_slice(&behind);
        frame
    }

    fn parse_frame(frame: &[u8]) -> Result<Packet<'_>, DropReason> {
        let frame = Frame {
            bytes: frame,
            offload: Offload::default(),
        };
        Packet::parse(frame, PortId(1))
    }

    #[test]
    fn a_written_packet_is_read_back() {
        let mut frame = udp_frame(&[], b"hello");
        frame.extend_from_slice(&[0; 6]);
        let Body::Ipv6(ip) = parse_frame(&frame).unwrap().body else {
            panic!("not IPv6");
        };
        assert_eq!((ip.ttl, ip.tos, ip.header_len), (3, 0xb9, 40));
        assert_eq!(ip.packet.len(), 40 + 8 + 5);
        let Transport::Udp(udp) = ip.transport else {
            panic!("not UDP");
        };
        assert_eq!((udp.source_port, udp.payload), (7, &b"hello"[..]));
        let last = frame.len() - 7;
        frame[last] ^= 1;
        assert_eq!(parse_frame(&frame).err(), Some(DropReason::Malformed));
    }

    #[test]
    fn extension_headers_are_walked_and_routing_is_refused() {
        let options = [PROTO_UDP, 0, 1, 4, 0, 0, 0, 0];
        let chained = [DESTINATION, 0, 1, 4, 0, 0, 0, 0];
        let mut frame = udp_frame(&[&chained, &options], b"x");
        frame[ETH_HEADER_LEN + 6] = HOP_BY_HOP;
        let Body::Ipv6(ip) = parse_frame(&frame).unwrap().body else {
            panic!("not IPv6");
        };
        assert_eq!(ip.header_len, 56);
        assert!(matches!(ip.transport, Transport::Udp(_)));
        frame[ETH_HEADER_LEN + 6] = ROUTING;
        assert_eq!(parse_frame(&frame).err(), Some(DropReason::Malformed));
        let endless = [HOP_BY_HOP, 0, 1, 4, 0, 0, 0, 0];
        let mut frame = udp_frame(&[&endless[..]; 9], b"");
        frame[ETH_HEADER_LEN + 6] = HOP_BY_HOP;
        assert_eq!(parse_frame(&frame).err(), Some(DropReason::Malformed));
        let beyond = [PROTO_UDP, 200, 1, 4, 0, 0, 0, 0];
        let mut frame = udp_frame(&[&beyond[..]], b"");
        frame[ETH_HEADER_LEN + 6] = HOP_BY_HOP;
        assert_eq!(parse_frame(&frame).err(), Some(DropReason::Truncated));
    }

    #[test]
    fn no_prefix_of_a_packet_is_taken_for_a_whole() {
        let frame = udp_frame(&[], b"hello");
        for len in ETH_HEADER_LEN..frame.len() {
            assert!(parse_frame(&frame[..len]).is_err(), "{len}");
        }
    }

    #[test]
    fn zero_checksum_is_refused() {
        let mut frame = udp_frame(&[], b"hello");
        frame[ETH_HEADER_LEN + 46..ETH_HEADER_LEN + 48].fill(0);
        assert_eq!(parse_frame(&frame).err(), Some(DropReason::Malformed));
    }

    #[test]
    fn addresses_from_a_mac() {
        let mac = Mac([0x52, 0x54, 0, 0x12, 0x34, 0x56]);
        let address = link_local(mac);
        assert_eq!(address.to_string(), "fe80::5054:ff:fe12:3456");
        assert!(is_link_local(address));
        let group = solicited_node(address);
        assert_eq!(group.to_string(), "ff02::1:ff12:3456");
        assert_eq!(group_mac(group), Mac([0x33, 0x33, 0xff, 0x12, 0x34, 0x56]));
    }
}
