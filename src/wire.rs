//! Checked views of packets for the gateway, and the headers it writes.
//!
//! Built on etherparse's slices: a [`Packet`] exists only if every length in it was checked, so the
//! services and the NAT read fields without further bounds thought.

pub mod checksum;
pub mod ipv6;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use etherparse::{Ipv4HeaderSlice, TcpHeaderSlice, UdpHeaderSlice};

use crate::frame::{ETH_HEADER_LEN, Frame, Mac, PortId};
use crate::offload::{Csum, Gso, Offload};
use crate::stats::DropReason;

/// EtherType of IPv4.
pub const ETHERTYPE_IPV4: u16 = 0x0800;
/// EtherType of ARP.
pub const ETHERTYPE_ARP: u16 = 0x0806;
/// EtherType of IPv6.
pub const ETHERTYPE_IPV6: u16 = 0x86dd;
/// EtherType of an 802.1Q tag.
pub const ETHERTYPE_VLAN: u16 = 0x8100;
/// IPv4 header without options.
pub const IPV4_HEADER_LEN: usize = 20;
/// UDP header.
pub const UDP_HEADER_LEN: usize = 8;
/// Offset of a UDP payload in a frame that [`write_udp4`] makes.
pub const UDP4_PAYLOAD_AT: usize = ETH_HEADER_LEN + IPV4_HEADER_LEN + UDP_HEADER_LEN;
/// IP protocol numbers (IANA).
pub const PROTO_ICMP: u8 = 1;
/// TCP.
pub const PROTO_TCP: u8 = 6;
/// UDP.
pub const PROTO_UDP: u8 = 17;
/// ICMPv6.
pub const PROTO_ICMPV6: u8 = 58;

/// A frame that reached the gateway, parsed once.
#[derive(Clone, Copy, Debug)]
pub struct Packet<'a> {
    /// Port the frame came in by.
    pub ingress: PortId,
    /// Sender.
    pub source: Mac,
    /// The gateway's MAC or a group address.
    pub destination: Mac,
    /// Left undone by the sender.
    pub offload: Offload,
    /// The whole Ethernet frame, padding included.
    pub frame: &'a [u8],
    /// What it carries.
    pub body: Body<'a>,
    /// It came in fragments and was put together: its sender lets it be fragmented, IPv6 or not.
    pub reassembled: bool,
}

/// Layer 3 of a [`Packet`].
#[derive(Clone, Copy, Debug)]
pub enum Body<'a> {
    /// Everything behind the Ethernet header; not checked further.
    Arp(&'a [u8]),
    /// A checked IPv4 packet.
    Ipv4(Ipv4<'a>),
    /// A checked IPv6 packet.
    Ipv6(Ipv6<'a>),
    /// Another EtherType.
    Other(u16),
}

/// A checked IP packet: version, header lengths and total length hold; of IPv4 the header checksum too.
#[derive(Clone, Copy, Debug)]
pub struct Ip<'a, A = IpAddr> {
    /// Source address.
    pub source: A,
    /// Destination address.
    pub destination: A,
    /// Time to live or hop limit, as received.
    pub ttl: u8,
    /// DSCP and ECN.
    pub tos: u8,
    /// The packet from its first header byte to its total length (padding cut off).
    pub packet: &'a [u8],
    /// Header length with options, 20..=60 bytes; with IPv6 extension headers 40 and more.
    pub header_len: usize,
    /// Layer 4.
    pub transport: Transport<'a>,
}

/// A checked IPv4 packet.
pub type Ipv4<'a> = Ip<'a, Ipv4Addr>;
/// A checked IPv6 packet.
pub type Ipv6<'a> = Ip<'a, Ipv6Addr>;

impl<'a, A: Copy + Into<IpAddr>> Ip<'a, A> {
    /// Everything behind the IP header.
    pub fn payload(&self) -> &'a [u8] {
        &self.packet[self.header_len..]
    }

    /// The packet as one of either family.
    pub fn any(&self) -> Ip<'a> {
        Ip {
            source: self.source.into(),
            destination: self.destination.into(),
            ttl: self.ttl,
            tos: self.tos,
            packet: self.packet,
            header_len: self.header_len,
            transport: self.transport,
        }
    }
}

impl Ip<'_> {
    /// Whether routers on its way may not fragment the packet: DF of IPv4, always with IPv6.
    pub fn dont_fragment(&self) -> bool {
        self.source.is_ipv6() || self.packet[6] & 0x40 != 0
    }
}

/// IP version.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// That of an address.
    pub fn of(address: IpAddr) -> Self {
        match address {
            IpAddr::V4(_) => Family::V4,
            IpAddr::V6(_) => Family::V6,
        }
    }
}

/// Layer 4 of an [`Ip`].
#[derive(Clone, Copy, Debug)]
pub enum Transport<'a> {
    /// A TCP segment; the checksum holds or is offloaded.
    Tcp(Tcp<'a>),
    /// A UDP datagram (or a train of them, see [`Gso::Udp`]); the checksum holds, is absent or offloaded.
    Udp(Udp<'a>),
    /// An ICMP or (over IPv6) ICMPv6 message with a right checksum, at least 8 bytes.
    Icmp(&'a [u8]),
    /// More fragments follow or this is not the first.
    Fragment,
    /// Another IP protocol.
    Other(u8),
}

/// A TCP segment.
#[derive(Clone, Copy, Debug)]
pub struct Tcp<'a> {
    /// Source port.
    pub source_port: u16,
    /// Destination port.
    pub destination_port: u16,
    /// Sequence number.
    pub sequence: u32,
    /// FIN, SYN, RST, PSH, ACK, URG, ECE, CWR from bit 0 on (RFC 9293 3.1).
    pub flags: u8,
    /// Header with options, 20..=60 bytes.
    pub header: &'a [u8],
    /// Data.
    pub payload: &'a [u8],
}

impl Tcp<'_> {
    /// FIN flag.
    pub const FIN: u8 = 0x01;
    /// SYN flag.
    pub const SYN: u8 = 0x02;
    /// RST flag.
    pub const RST: u8 = 0x04;
    /// ACK flag.
    pub const ACK: u8 = 0x10;
}

/// A UDP datagram.
#[derive(Clone, Copy, Debug)]
pub struct Udp<'a> {
    /// Source port.
    pub source_port: u16,
    /// Destination port.
    pub destination_port: u16,
    /// Data. Of a [`Gso::Udp`] frame: datagrams of the gso size behind each other.
    pub payload: &'a [u8],
}

impl<'a> Packet<'a> {
    /// Parses a frame for the gateway.
    ///
    /// # Errors
    /// [`DropReason::Truncated`] or [`DropReason::Malformed`].
    pub fn parse(frame: Frame<'a>, ingress: PortId) -> Result<Self, DropReason> {
        let bytes = frame.bytes;
        if bytes.len() < ETH_HEADER_LEN {
            return Err(DropReason::Truncated);
        }
        let behind = &bytes[ETH_HEADER_LEN..];
        let body = match be16(bytes, 12) {
            ETHERTYPE_ARP => Body::Arp(behind),
            ETHERTYPE_IPV4 => Body::Ipv4(parse_ipv4(behind, frame.offload)?),
            ETHERTYPE_IPV6 => Body::Ipv6(ipv6::parse(behind, frame.offload)?),
            other => Body::Other(other),
        };
        Ok(Packet {
            ingress,
            source: frame.source(),
            destination: frame.destination(),
            offload: frame.offload,
            frame: bytes,
            body,
            reassembled: false,
        })
    }

    /// The IP packet, if it is one.
    pub fn ip(&self) -> Option<Ip<'a>> {
        match &self.body {
            Body::Ipv4(ip) => Some(ip.any()),
            Body::Ipv6(ip) => Some(ip.any()),
            Body::Arp(_) | Body::Other(_) => None,
        }
    }

    /// Whether it is a piece of an IP packet.
    pub fn is_fragment(&self) -> bool {
        matches!(
            self.body,
            Body::Ipv4(Ipv4 {
                transport: Transport::Fragment,
                ..
            }) | Body::Ipv6(Ipv6 {
                transport: Transport::Fragment,
                ..
            })
        )
    }

    /// The IPv4 packet and its UDP datagram, if it is one.
    pub fn udp4(&self) -> Option<(&Ipv4<'a>, &Udp<'a>)> {
        match &self.body {
            Body::Ipv4(
                ip @ Ipv4 {
                    transport: Transport::Udp(udp),
                    ..
                },
            ) => Some((ip, udp)),
            _ => None,
        }
    }
}

fn parse_ipv4(bytes: &[u8], offload: Offload) -> Result<Ipv4<'_>, DropReason> {
    let header = Ipv4HeaderSlice::from_slice(bytes).map_err(|_| refusal(bytes, IPV4_HEADER_LEN))?;
    let header_len = header.slice().len();
    let total_len = usize::from(header.total_len());
    if total_len < header_len {
        return Err(DropReason::Malformed);
    }
    let packet = bytes.get(..total_len).ok_or(DropReason::Truncated)?;
    if checksum::fold(checksum::sum(header.slice())) != 0xffff {
        return Err(DropReason::Malformed);
    }
    let payload = &packet[header_len..];
    let transport = if header.is_fragmenting_payload() {
        Transport::Fragment
    } else {
        let addresses = (
            header.source_addr().into(),
            header.destination_addr().into(),
        );
        parse_transport(addresses, header.protocol().0, payload, offload)?
    };
    Ok(Ipv4 {
        source: header.source_addr(),
        destination: header.destination_addr(),
        ttl: header.ttl(),
        tos: header.slice()[1],
        packet,
        header_len,
        transport,
    })
}

/// Layer 4 of a whole packet. `protocol` is the one behind the last IP header.
fn parse_transport(
    (source, destination): (IpAddr, IpAddr),
    protocol: u8,
    payload: &[u8],
    offload: Offload,
) -> Result<Transport<'_>, DropReason> {
    let right = |covered: &[u8]| {
        offload.csum != Csum::Unchecked
            || checksum::transport(source, destination, protocol, covered) == 0xffff
    };
    Ok(match protocol {
        PROTO_TCP => {
            let tcp = TcpHeaderSlice::from_slice(payload).map_err(|_| refusal(payload, 20))?;
            if !right(payload) {
                return Err(DropReason::Malformed);
            }
            let (header, data) = payload.split_at(tcp.slice().len());
            Transport::Tcp(Tcp {
                source_port: tcp.source_port(),
                destination_port: tcp.destination_port(),
                sequence: tcp.sequence_number(),
                flags: header[13],
                header,
                payload: data,
            })
        }
        PROTO_UDP => {
            let udp = UdpHeaderSlice::from_slice(payload)
                .map_err(|_| refusal(payload, UDP_HEADER_LEN))?;
            // The length field of a super-frame covers all its datagrams.
            let len = match (udp.length(), offload.gso) {
                (_, Gso::Udp(_)) => payload.len(),
                (len, _) => usize::from(len),
            };
            if len < UDP_HEADER_LEN {
                return Err(DropReason::Malformed);
            }
            let datagram = payload.get(..len).ok_or(DropReason::Truncated)?;
            // A zero checksum means that the sender computed none (RFC 768); IPv6 allows no such thing
            // to hosts (RFC 8200 8.1).
            let none = udp.checksum() == 0 && source.is_ipv4();
            if !none && !right(datagram) {
                return Err(DropReason::Malformed);
            }
            Transport::Udp(Udp {
                source_port: udp.source_port(),
                destination_port: udp.destination_port(),
                payload: &datagram[UDP_HEADER_LEN..],
            })
        }
        PROTO_ICMP if source.is_ipv4() => {
            if payload.len() < 8 {
                return Err(DropReason::Truncated);
            }
            if checksum::fold(checksum::sum(payload)) != 0xffff {
                return Err(DropReason::Malformed);
            }
            Transport::Icmp(payload)
        }
        PROTO_ICMPV6 if source.is_ipv6() => {
            if payload.len() < 8 {
                return Err(DropReason::Truncated);
            }
            if !right(payload) {
                return Err(DropReason::Malformed);
            }
            Transport::Icmp(payload)
        }
        other => Transport::Other(other),
    })
}

/// Too few bytes for the header, or a header that contradicts itself.
fn refusal(bytes: &[u8], header_len: usize) -> DropReason {
    if bytes.len() < header_len {
        DropReason::Truncated
    } else {
        DropReason::Malformed
    }
}

/// Big-endian 16 bits at `at`.
///
/// # Panics
/// If the slice is shorter.
pub fn be16(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

/// Writes an Ethernet header into `buffer[..14]`.
pub fn write_ethernet(buffer: &mut [u8], destination: Mac, source: Mac, ethertype: u16) {
    buffer[..6].copy_from_slice(&destination.0);
    buffer[6..12].copy_from_slice(&source.0);
    buffer[12..14].copy_from_slice(&ethertype.to_be_bytes());
}

/// The fields of an IPv4 header that its writer chooses.
#[derive(Clone, Copy, Debug)]
pub struct Ipv4Fields {
    /// Source address.
    pub source: Ipv4Addr,
    /// Destination address.
    pub destination: Ipv4Addr,
    /// IP protocol.
    pub protocol: u8,
    /// Time to live.
    pub ttl: u8,
    /// DSCP and ECN.
    pub tos: u8,
}

/// Default TTL of what the gateway originates (IANA's recommended default).
pub const TTL_DEFAULT: u8 = 64;

/// Writes an IPv4 header with DF set and no options into `buffer[14..34]`, for a payload of
/// `payload_len` bytes behind it. Identification is 0, as RFC 6864 4.1 allows for atomic datagrams.
///
/// # Panics
/// If header and payload exceed 65,535 bytes.
pub fn write_ipv4(buffer: &mut [u8], fields: Ipv4Fields, payload_len: usize) {
    let total =
        u16::try_from(IPV4_HEADER_LEN + payload_len).expect("an IPv4 packet holds 65,535 bytes");
    let header = &mut buffer[ETH_HEADER_LEN..ETH_HEADER_LEN + IPV4_HEADER_LEN];
    header[0] = 0x45;
    header[1] = fields.tos;
    header[2..4].copy_from_slice(&total.to_be_bytes());
    header[4..8].copy_from_slice(&[0, 0, 0x40, 0]);
    header[8] = fields.ttl;
    header[9] = fields.protocol;
    header[10..12].copy_from_slice(&[0, 0]);
    header[12..16].copy_from_slice(&fields.source.octets());
    header[16..20].copy_from_slice(&fields.destination.octets());
    let sum = !checksum::fold(checksum::sum(header));
    header[10..12].copy_from_slice(&sum.to_be_bytes());
}

/// The fields of an IP header of either family that its writer chooses.
#[derive(Clone, Copy, Debug)]
pub struct IpFields {
    /// Source address.
    pub source: IpAddr,
    /// Destination address, of the same family.
    pub destination: IpAddr,
    /// Transport.
    pub protocol: u8,
    /// Time to live or hop limit.
    pub ttl: u8,
    /// DSCP and ECN.
    pub tos: u8,
}

/// Length of the header that [`write_ip`] writes for addresses of this one's family.
pub fn ip_header_len(address: IpAddr) -> usize {
    match address {
        IpAddr::V4(_) => IPV4_HEADER_LEN,
        IpAddr::V6(_) => ipv6::IPV6_HEADER_LEN,
    }
}

/// Longest payload behind such a header.
pub fn ip_payload_max(address: IpAddr) -> usize {
    match address {
        IpAddr::V4(_) => 65_535 - IPV4_HEADER_LEN,
        IpAddr::V6(_) => 65_535,
    }
}

/// Writes Ethernet and IP headers for a payload of `payload_len` bytes, which begins where this says.
///
/// # Panics
/// If the addresses are of different families, or the packet exceeds the largest.
pub fn write_ip(
    buffer: &mut [u8],
    (destination, source): (Mac, Mac),
    fields: IpFields,
    payload_len: usize,
) -> usize {
    let IpFields {
        protocol, ttl, tos, ..
    } = fields;
    match (fields.source, fields.destination) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            write_ethernet(buffer, destination, source, ETHERTYPE_IPV4);
            let fields = Ipv4Fields {
                source: from,
                destination: to,
                protocol,
                ttl,
                tos,
            };
            write_ipv4(buffer, fields, payload_len);
            ETH_HEADER_LEN + IPV4_HEADER_LEN
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            write_ethernet(buffer, destination, source, ETHERTYPE_IPV6);
            let fields = ipv6::Ipv6Fields {
                source: from,
                destination: to,
                protocol,
                hop_limit: ttl,
                traffic_class: tos,
            };
            ipv6::write_ipv6(buffer, fields, payload_len);
            ETH_HEADER_LEN + ipv6::IPV6_HEADER_LEN
        }
        (from, to) => panic!("{from} and {to} are of different families"),
    }
}

/// Completes a UDP over IPv4 frame whose payload of `payload_len` bytes already lies at
/// [`UDP4_PAYLOAD_AT`]; checksums are computed. Returns the frame's length.
pub fn write_udp4(
    buffer: &mut [u8],
    (source_mac, source, source_port): (Mac, Ipv4Addr, u16),
    (destination_mac, destination, destination_port): (Mac, Ipv4Addr, u16),
    payload_len: usize,
) -> usize {
    let udp_len = UDP_HEADER_LEN + payload_len;
    write_ethernet(buffer, destination_mac, source_mac, ETHERTYPE_IPV4);
    let fields = Ipv4Fields {
        source,
        destination,
        protocol: PROTO_UDP,
        ttl: TTL_DEFAULT,
        tos: 0,
    };
    write_ipv4(buffer, fields, udp_len);
    let udp = &mut buffer[ETH_HEADER_LEN + IPV4_HEADER_LEN..][..udp_len];
    udp[..2].copy_from_slice(&source_port.to_be_bytes());
    udp[2..4].copy_from_slice(&destination_port.to_be_bytes());
    udp[4..6].copy_from_slice(&(udp_len as u16).to_be_bytes());
    udp[6..8].copy_from_slice(&[0, 0]);
    // 0 would mean "none": RFC 768 sends it as all ones.
    let sum = match !checksum::transport4(source, destination, PROTO_UDP, udp) {
        0 => 0xffff,
        sum => sum,
    };
    udp[6..8].copy_from_slice(&sum.to_be_bytes());
    ETH_HEADER_LEN + IPV4_HEADER_LEN + udp_len
}
