//! The SYN of a flow: kept while the host connects, and what it says of the guest.

use std::net::{IpAddr, SocketAddr};

use crate::frame::Mac;
use crate::wire::ipv6::{IPV6_HEADER_LEN, address_at};
use crate::wire::{Family, IPV4_HEADER_LEN, Ip, PROTO_TCP, Tcp, be16};

/// Largest payload of a super-frame: with its Ethernet, IP and TCP headers 65,535 bytes, the most
/// that a tap passes whole (its gso_max_size is 65,536).
const fn payload_max(family: Family) -> u16 {
    (65_535 - 14 - TCP_HEADER_LEN - ip_header_len(family)) as u16
}

/// IP header as lanlet and smoltcp write it.
pub const fn ip_header_len(family: Family) -> usize {
    match family {
        Family::V4 => IPV4_HEADER_LEN,
        Family::V6 => IPV6_HEADER_LEN,
    }
}

/// TCP header without options.
pub const TCP_HEADER_LEN: usize = 20;
/// Segments that one super-frame may become: the kernel's own GSO_MAX_SEGS is 65,535, but a guest
/// without TSO gets each as an entry of its 16,384-entry queue.
const SUPER_FRAME_SEGMENTS_MAX: u16 = 64;
/// Smallest MSS believed (Linux: net.ipv4.tcp_min_snd_mss); below, a guest could have one super-frame
/// cut into tens of thousands of packets.
pub const MSS_MIN: u16 = 48;
/// MSS of a SYN without the option (RFC 9293 3.7.1, MUST-15).
const MSS_DEFAULT: u16 = 536;
/// The same of IPv6: 1,280 less headers (RFC 9293 3.7.1).
const MSS_DEFAULT6: u16 = 1220;

/// The guest of a flow, as frames to it need it.
#[derive(Clone, Copy, Debug)]
pub struct Peer {
    /// Source of frames to the guest.
    pub gateway: Mac,
    /// Where the guest's last segment came from.
    pub guest: Mac,
    /// Payload bytes of one packet to the guest.
    pub mss: u16,
    /// MSS shown to the guest in the SYN or SYN-ACK.
    pub our_mss: u16,
    /// Payload of a super-frame at most.
    payload_max: u16,
}

impl Peer {
    /// The peer that sent `syn`, on a LAN of this MTU.
    pub fn from_syn((gateway, guest): (Mac, Mac), family: Family, syn: &Tcp<'_>, mtu: u16) -> Self {
        let our_mss = mtu - (ip_header_len(family) + TCP_HEADER_LEN) as u16;
        let payload_max = payload_max(family);
        let default = match family {
            Family::V4 => MSS_DEFAULT,
            Family::V6 => MSS_DEFAULT6,
        };
        let mss = syn_mss(syn.header)
            .unwrap_or(default)
            .clamp(MSS_MIN, our_mss.clamp(MSS_MIN, payload_max));
        Self {
            gateway,
            guest,
            mss,
            our_mss,
            payload_max,
        }
    }

    /// The guest that a connection from outside goes to. What it takes is known when it answers.
    pub fn unanswered(macs: (Mac, Mac), family: Family, mtu: u16) -> Self {
        let (gateway, guest) = macs;
        Self {
            gateway,
            guest,
            mss: MSS_MIN,
            our_mss: mtu - (ip_header_len(family) + TCP_HEADER_LEN) as u16,
            payload_max: payload_max(family),
        }
    }

    /// Makes packets fit a path of this MTU; whether they were larger.
    pub fn narrow(&mut self, family: Family, mtu: u16) -> bool {
        let headers_len = (ip_header_len(family) + TCP_HEADER_LEN) as u16;
        let mss = mtu.saturating_sub(headers_len).max(MSS_MIN);
        let is_smaller = mss < self.mss;
        self.mss = self.mss.min(mss);
        is_smaller
    }

    /// Payload of the largest super-frame: whole segments, so that none leaves a short tail.
    pub fn segment_bytes(&self) -> u16 {
        (self.payload_max / self.mss).min(SUPER_FRAME_SEGMENTS_MAX) * self.mss
    }
}

/// The SYN as smoltcp sees it at most: no IP options, 12 bytes of TCP options.
pub const SYN_LEN_MAX: usize = IPV6_HEADER_LEN + SYN_TCP_LEN;
const SYN_TCP_LEN: usize = TCP_HEADER_LEN + 12;
/// A saved SYN: IP and TCP headers with all their options. (IPv6 extension headers never come here.)
const SAVED_SYN_LEN_MAX: usize = 60 + 60;

/// A guest's SYN, kept while the host's connection is being made.
#[derive(Clone, Debug)]
pub struct SavedSyn {
    packet: [u8; SAVED_SYN_LEN_MAX],
    ip_header_len: u8,
    len: u8,
}

impl SavedSyn {
    /// Keeps the headers of `tcp`; data on a SYN is left for the guest to send again.
    pub fn new(ip: &Ip<'_>, tcp: &Tcp<'_>) -> Option<Self> {
        let len = ip.header_len + tcp.header.len();
        let mut packet = [0; SAVED_SYN_LEN_MAX];
        packet.get_mut(..len)?.copy_from_slice(&ip.packet[..len]);
        set_cut(&mut packet[..len], ip.header_len);
        Some(Self {
            packet,
            ip_header_len: ip.header_len as u8,
            len: len as u8,
        })
    }

    /// The packet as the guest sent it, without data: for RST and ICMP answers.
    pub fn packet(&self) -> &[u8] {
        &self.packet[..usize::from(self.len)]
    }

    /// Whether it has the window scale option (RFC 7323 2.2).
    pub fn scales(&self) -> bool {
        options_of(self.tcp_header()).any(|option| matches!(option, [3, 3, _]))
    }

    fn tcp_header(&self) -> &[u8] {
        &self.packet()[usize::from(self.ip_header_len)..]
    }

    /// Where the guest connects to.
    pub fn destination(&self) -> SocketAddr {
        let port = be16(self.tcp_header(), 2);
        match family_of(&self.packet) {
            Family::V4 => {
                let octets: [u8; 4] = self.packet[16..20].try_into().expect("four bytes");
                SocketAddr::from((octets, port))
            }
            Family::V6 => SocketAddr::new(address_at(&self.packet, 24).into(), port),
        }
    }

    /// Initial sequence number of the guest.
    pub fn sequence(&self) -> u32 {
        be32(self.tcp_header(), 4)
    }

    /// The SYN as smoltcp shall see it: MSS of a super-frame, window scale and SACK as the guest
    /// offered them, nothing else.
    pub fn rewritten<'a>(&self, mss: u16, out: &'a mut [u8; SYN_LEN_MAX]) -> &'a [u8] {
        let header = self.tcp_header();
        let family = family_of(&self.packet);
        let ip_header_len = ip_header_len(family);
        let out = &mut out[..ip_header_len + SYN_TCP_LEN];
        out[..ip_header_len].copy_from_slice(&self.packet[..ip_header_len]);
        if family == Family::V4 {
            out[0] = 0x45;
        }
        set_len(out);
        let tcp = &mut out[ip_header_len..];
        tcp[..TCP_HEADER_LEN].copy_from_slice(&header[..TCP_HEADER_LEN]);
        tcp[12] = (((TCP_HEADER_LEN + 12) / 4) << 4) as u8;
        let mut options = [1u8; 12];
        options[..2].copy_from_slice(&[2, 4]);
        options[2..4].copy_from_slice(&mss.to_be_bytes());
        for option in options_of(header) {
            match option {
                [3, _, shift] => options[4..7].copy_from_slice(&[3, 3, *shift]),
                [4, _] => options[8..10].copy_from_slice(&[4, 2]),
                _ => {}
            }
        }
        tcp[TCP_HEADER_LEN..].copy_from_slice(&options);
        out
    }
}

/// Big-endian 32 bits at `at`.
///
/// # Panics
/// If the slice is shorter.
pub fn be32(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

/// MSS option of a SYN's TCP header.
fn syn_mss(header: &[u8]) -> Option<u16> {
    options_of(header).find_map(|option| match option {
        [2, 4, high, low] => Some(u16::from_be_bytes([*high, *low])),
        _ => None,
    })
}

/// The options of a TCP header, whole, up to the first malformed one.
fn options_of(header: &[u8]) -> impl Iterator<Item = &[u8]> {
    let mut rest = header.get(TCP_HEADER_LEN..).unwrap_or_default();
    std::iter::from_fn(move || {
        while let [1, behind @ ..] = rest {
            rest = behind;
        }
        let len = match rest {
            [] | [0, ..] | [_] => return None,
            [_, len, ..] => usize::from(*len),
        };
        if len < 2 || len > rest.len() {
            return None;
        }
        let (option, behind) = rest.split_at(len);
        rest = behind;
        Some(option)
    })
}

/// A segment of one byte from one endpoint to the other, with a sequence and an acknowledgment number;
/// without checksums.
pub fn segment((from, to): (SocketAddr, SocketAddr), numbers: (u32, u32)) -> Vec<u8> {
    let family = Family::of(from.ip());
    let ip_len = ip_header_len(family);
    let mut packet = vec![0; ip_len + TCP_HEADER_LEN + 1];
    match (from.ip(), to.ip()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            (packet[0], packet[8], packet[9]) = (0x45, 64, PROTO_TCP);
            packet[12..16].copy_from_slice(&from.octets());
            packet[16..20].copy_from_slice(&to.octets());
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            (packet[0], packet[6], packet[7]) = (0x60, PROTO_TCP, 64);
            packet[8..24].copy_from_slice(&from.octets());
            packet[24..40].copy_from_slice(&to.octets());
        }
        // No connection has such ends.
        _ => {}
    }
    set_len(&mut packet);
    let tcp = &mut packet[ip_len..];
    tcp[..2].copy_from_slice(&from.port().to_be_bytes());
    tcp[2..4].copy_from_slice(&to.port().to_be_bytes());
    tcp[4..8].copy_from_slice(&numbers.0.to_be_bytes());
    tcp[8..12].copy_from_slice(&numbers.1.to_be_bytes());
    tcp[12] = ((TCP_HEADER_LEN / 4) << 4) as u8;
    tcp[13] = Tcp::ACK;
    packet
}

/// Clears FIN and sets the IP header's length to the copy's length.
pub fn set_cut(packet: &mut [u8], ip_header_len: usize) {
    set_len(packet);
    packet[ip_header_len + 13] &= !Tcp::FIN;
}

/// Writes a packet's length into its IP header.
fn set_len(packet: &mut [u8]) {
    let total = packet.len();
    match family_of(packet) {
        Family::V4 => packet[2..4].copy_from_slice(&(total as u16).to_be_bytes()),
        Family::V6 => {
            let payload_len = (total - IPV6_HEADER_LEN) as u16;
            packet[4..6].copy_from_slice(&payload_len.to_be_bytes());
        }
    }
}

/// The family of a packet that was parsed or written here.
pub fn family_of(packet: &[u8]) -> Family {
    match packet[0] >> 4 {
        6 => Family::V6,
        _ => Family::V4,
    }
}
