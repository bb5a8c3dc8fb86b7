//! Where the headers of a frame lie, as far as offload claims need to know.

use super::{Csum, Gso, Offload};
use crate::wire::{
    ETHERTYPE_IPV4, ETHERTYPE_IPV6, ETHERTYPE_VLAN, IPV4_HEADER_LEN, PROTO_TCP, PROTO_UDP,
    UDP_HEADER_LEN, be16, checksum,
};

/// EtherType of an 802.1ad service tag.
const ETHERTYPE_SERVICE_VLAN: u16 = 0x88a8;
/// As many tags as [`crate::frame::FRAME_LEN_MAX`] has room for.
const VLAN_TAGS_MAX: usize = 2;
/// IPv6 header without extensions.
pub(super) const IPV6_HEADER_LEN: usize = 40;
/// More extension headers than any sender chains: RFC 8200 4.1 names six kinds, each once but one.
const EXTENSION_HEADERS_MAX: usize = 8;
/// TCP header without options.
pub(super) const TCP_HEADER_LEN: usize = 20;
/// Place of the checksum in a TCP header.
pub(super) const TCP_CSUM_AT: usize = 16;
/// Place of the checksum in a UDP header.
pub(super) const UDP_CSUM_AT: usize = 6;
/// TCP header byte with the flags.
pub(super) const TCP_FLAGS_AT: usize = 13;
/// SYN and RST: no sender puts them on more than one segment.
const TCP_NOT_IN_TRAINS: u8 = 0x02 | 0x04;

/// EtherType behind the VLAN tags and the place of what follows it; `None` if the frame ends
/// before or has too many tags.
#[inline]
pub(super) fn network(bytes: &[u8]) -> Option<(usize, u16)> {
    let mut at = 12;
    for _ in 0..=VLAN_TAGS_MAX {
        let ethertype = u16::from_be_bytes(*bytes.get(at..)?.first_chunk()?);
        if !matches!(ethertype, ETHERTYPE_VLAN | ETHERTYPE_SERVICE_VLAN) {
            return Some((at + 2, ethertype));
        }
        at += 4;
    }
    None
}

/// IP version.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Family {
    V4,
    V6,
}

/// An IP header that lies within the frame. Its checksum is not looked at.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ip {
    pub family: Family,
    /// First byte of the IP header.
    pub network_at: usize,
    /// First byte behind IP header, options and extension headers; at most the frame's length.
    pub transport_at: usize,
    /// What lies there.
    pub protocol: u8,
    /// Length of the packet from `network_at` on, as its header says.
    pub packet_len: usize,
    /// One fragment of several.
    pub fragment: bool,
    /// An IPv6 routing header: the pseudo-header's destination is not the header's (RFC 8200 8.1).
    pub routed: bool,
}

impl Ip {
    /// The IP headers at `network_at`, for one of the two EtherTypes of IP.
    #[inline]
    pub fn at(bytes: &[u8], network_at: usize, ethertype: u16) -> Option<Ip> {
        match ethertype {
            ETHERTYPE_IPV4 => Self::v4(bytes, network_at),
            ETHERTYPE_IPV6 => Self::v6(bytes, network_at),
            _ => None,
        }
    }

    #[inline]
    fn v4(bytes: &[u8], network_at: usize) -> Option<Ip> {
        let header: &[u8; IPV4_HEADER_LEN] = bytes.get(network_at..)?.first_chunk()?;
        let header_len = usize::from(header[0] & 0x0f) * 4;
        let transport_at = network_at + header_len;
        if header[0] >> 4 != 4 || header_len < IPV4_HEADER_LEN || transport_at > bytes.len() {
            return None;
        }
        Some(Ip {
            family: Family::V4,
            network_at,
            transport_at,
            protocol: header[9],
            packet_len: usize::from(be16(header, 2)),
            // More fragments, or an offset.
            fragment: be16(header, 6) & 0x3fff != 0,
            routed: false,
        })
    }

    fn v6(bytes: &[u8], network_at: usize) -> Option<Ip> {
        const HOP_BY_HOP: u8 = 0;
        const ROUTING: u8 = 43;
        const FRAGMENT: u8 = 44;
        const DESTINATION: u8 = 60;
        let header: &[u8; IPV6_HEADER_LEN] = bytes.get(network_at..)?.first_chunk()?;
        if header[0] >> 4 != 6 {
            return None;
        }
        let mut ip = Ip {
            family: Family::V6,
            network_at,
            transport_at: network_at + IPV6_HEADER_LEN,
            protocol: header[6],
            packet_len: IPV6_HEADER_LEN + usize::from(be16(header, 4)),
            fragment: false,
            routed: false,
        };
        for _ in 0..EXTENSION_HEADERS_MAX {
            match ip.protocol {
                HOP_BY_HOP | ROUTING | DESTINATION => {}
                other => {
                    ip.fragment = other == FRAGMENT;
                    return Some(ip);
                }
            }
            let extension: &[u8; 2] = bytes.get(ip.transport_at..)?.first_chunk()?;
            ip.routed |= ip.protocol == ROUTING;
            ip.protocol = extension[0];
            ip.transport_at += (usize::from(extension[1]) + 1) * 8;
            if ip.transport_at > bytes.len() {
                return None;
            }
        }
        None
    }
}

/// Transport of a super-frame.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Transport {
    Tcp,
    Udp,
}

impl Transport {
    /// Place of the checksum in the transport header.
    pub fn csum_at(self) -> usize {
        match self {
            Transport::Tcp => TCP_CSUM_AT,
            Transport::Udp => UDP_CSUM_AT,
        }
    }

    /// Sum of the pseudo-header without its length: addresses and protocol (RFC 9293 3.1, RFC 8200 8.1) of
    /// the IP header at `network_at`.
    pub fn pseudo_sum(self, bytes: &[u8], network_at: usize, family: Family) -> u64 {
        let addresses = match family {
            Family::V4 => 12..IPV4_HEADER_LEN,
            Family::V6 => 8..IPV6_HEADER_LEN,
        };
        let protocol = match self {
            Transport::Tcp => PROTO_TCP,
            Transport::Udp => PROTO_UDP,
        };
        checksum::sum(&bytes[network_at..][addresses]) + u64::from(protocol)
    }
}

/// The headers of a super-frame, which segments are made from. They exist only for frames whose
/// headers are what the [`Gso`] kind says.
#[derive(Clone, Copy, Debug)]
pub(super) struct Headers {
    pub ip: Ip,
    pub transport: Transport,
    /// First byte of the payload; at most the frame's length.
    pub payload_at: usize,
}

impl Headers {
    /// The headers that `gso` promises, if they are there.
    #[inline]
    pub fn of(bytes: &[u8], gso: Gso) -> Option<Headers> {
        let (network_at, ethertype) = network(bytes)?;
        let ip = Ip::at(bytes, network_at, ethertype)?;
        let (transport, protocol, family) = match gso {
            Gso::None => return None,
            Gso::Tcp4(_) => (Transport::Tcp, PROTO_TCP, Some(Family::V4)),
            Gso::Tcp6(_) => (Transport::Tcp, PROTO_TCP, Some(Family::V6)),
            Gso::Udp(_) => (Transport::Udp, PROTO_UDP, None),
        };
        let family_matches = family.is_none_or(|family| family == ip.family);
        if ip.protocol != protocol || !family_matches || ip.fragment || ip.routed {
            return None;
        }
        let header_len = match transport {
            Transport::Tcp => tcp_train_header_len(bytes.get(ip.transport_at..)?)?,
            Transport::Udp => UDP_HEADER_LEN,
        };
        let payload_at = ip.transport_at + header_len;
        (payload_at <= bytes.len()).then_some(Headers {
            ip,
            transport,
            payload_at,
        })
    }
}

/// Header length of a TCP segment that may be cut into several.
fn tcp_train_header_len(tcp: &[u8]) -> Option<usize> {
    let header: &[u8; TCP_HEADER_LEN] = tcp.first_chunk()?;
    let header_len = usize::from(header[12] >> 4) * 4;
    (header_len >= TCP_HEADER_LEN && header[TCP_FLAGS_AT] & TCP_NOT_IN_TRAINS == 0)
        .then_some(header_len)
}

/// Length of all headers of a super-frame, without another walk over them: [`super::admit`] made
/// sure that the checksum starts where the transport header does.
#[inline]
pub(super) fn headers_len(bytes: &[u8], offload: Offload) -> Option<usize> {
    let Csum::Partial { start, .. } = offload.csum else {
        return None;
    };
    let start = usize::from(start);
    match offload.gso {
        Gso::None => None,
        Gso::Tcp4(_) | Gso::Tcp6(_) => Some(start + usize::from(bytes.get(start + 12)? >> 4) * 4),
        Gso::Udp(_) => Some(start + UDP_HEADER_LEN),
    }
}
