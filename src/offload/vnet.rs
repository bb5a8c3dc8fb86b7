//! `struct virtio_net_hdr_v1` (linux/virtio_net.h): believed or refused on the way in, written anew
//! on the way out.
//!
//! Its 16-bit fields are in the host's byte order: a tap uses native order unless TUNSETVNETLE or
//! TUNSETVNETBE says otherwise, and we set neither. (A VMM sets TUNSETVNETLE on its own tap; the
//! kernel keeps that per device and writes our side's header for our side.)

use super::layout::{Headers, Ip, TCP_CSUM_AT, TCP_HEADER_LEN, UDP_CSUM_AT, headers_len, network};
use super::{Csum, Gso, Offload};
use crate::frame::{ETH_HEADER_LEN, FRAME_LEN_MAX, Frame};
use crate::stats::DropReason;
use crate::wire::{
    ETHERTYPE_ARP, ETHERTYPE_IPV4, ETHERTYPE_IPV6, PROTO_ICMP, PROTO_TCP, PROTO_UDP, UDP_HEADER_LEN,
};

/// Bytes of `struct virtio_net_hdr_v1`, the header of all our tap ports.
pub const VNET_HEADER_LEN: usize = 12;

/// Segments one super-frame may be cut into. Bounds what a port without segmentation can be made to
/// send for one frame (2 ms at 1 us each). Linux sends 64 KB trains down to 36 bytes a segment
/// (net.ipv4.tcp_min_snd_mss 48 less timestamps), 1,820 of them. A limit on the size itself would
/// hit UDP senders, which may use UDP_SEGMENT with a few bytes.
pub const SEGMENTS_MAX: usize = 2048;

const F_NEEDS_CSUM: u8 = 1;
const F_DATA_VALID: u8 = 2;
const GSO_NONE: u8 = 0;
const GSO_TCPV4: u8 = 1;
const GSO_TCPV6: u8 = 4;
const GSO_UDP_L4: u8 = 5;
const GSO_ECN: u8 = 0x80;

const PROTO_ICMPV6: u8 = 58;
/// Place of the checksum in an ICMP or ICMPv6 message.
const ICMP_CSUM_AT: usize = 2;

/// Checks a frame that came without a virtio-net header.
///
/// # Errors
/// [`DropReason::Truncated`] below [`ETH_HEADER_LEN`], [`DropReason::Oversized`] above
/// [`FRAME_LEN_MAX`] bytes.
#[inline]
pub fn admit_plain(frame: &[u8]) -> Result<Offload, DropReason> {
    match frame.len() {
        0..ETH_HEADER_LEN => Err(DropReason::Truncated),
        ETH_HEADER_LEN..=FRAME_LEN_MAX => Ok(Offload::default()),
        _ => Err(DropReason::Oversized),
    }
}

/// Checks a frame and the virtio-net header before it: `raw` is what a read from a tap returned,
/// [`VNET_HEADER_LEN`] bytes of header and then the frame. What it returns holds for the frame.
///
/// A super-frame whose payload fits one segment comes out as a plain frame; the kernel takes it for
/// one too (`virtio_net_hdr_to_skb`).
///
/// # Errors
/// Those of [`admit_plain`], and [`DropReason::BadOffload`] for claims that don't fit the frame.
#[inline]
pub fn admit(raw: &[u8]) -> Result<Offload, DropReason> {
    let (header, frame) = raw
        .split_first_chunk::<VNET_HEADER_LEN>()
        .ok_or(DropReason::Truncated)?;
    let plain = admit_plain(frame)?;
    // Flags and gso type both zero: the other fields mean nothing.
    if header[0] == 0 && header[1] == GSO_NONE {
        return Ok(plain);
    }
    admit_claims(header, frame, frame.len()).ok_or(DropReason::BadOffload)
}

/// [`admit`] for a frame of `len` bytes of which `raw` holds only the header and the first ones; `None`
/// where those do not suffice to tell.
pub fn admit_head(raw: &[u8], len: usize) -> Option<Offload> {
    let (header, head) = raw.split_first_chunk::<VNET_HEADER_LEN>()?;
    if head.len() < ETH_HEADER_LEN || len < head.len() || len > FRAME_LEN_MAX {
        return None;
    }
    match header[0] == 0 && header[1] == GSO_NONE {
        true => Some(Offload::default()),
        false => admit_claims(header, head, len),
    }
}

/// `head` is the frame, or its beginning, and `len` the frame's length.
fn admit_claims(header: &[u8; VNET_HEADER_LEN], head: &[u8], len: usize) -> Option<Offload> {
    let [flags, gso_type, ..] = *header;
    let field = |at: usize| u16::from_ne_bytes([header[at], header[at + 1]]);
    // RSC_INFO and what later kernels add mean something only where negotiated; we negotiate none.
    if flags & !(F_NEEDS_CSUM | F_DATA_VALID) != 0 {
        return None;
    }
    let csum = if flags & F_NEEDS_CSUM != 0 {
        let (start, offset) = (field(6), field(8));
        if !partial_is_safe(head, len, start.into(), offset.into()) {
            return None;
        }
        Csum::Partial { start, offset }
    } else if flags & F_DATA_VALID != 0 {
        Csum::Valid
    } else {
        Csum::Unchecked
    };
    if gso_type == GSO_NONE {
        return Some(Offload {
            csum,
            ..Offload::default()
        });
    }
    let size = field(4);
    let (gso, ecn) = match gso_type {
        GSO_TCPV4 => (Gso::Tcp4(size), false),
        GSO_TCPV6 => (Gso::Tcp6(size), false),
        GSO_UDP_L4 => (Gso::Udp(size), false),
        // GSO_ECN is for TCP alone; GSO_UDP (IP fragments) we never negotiate.
        _ if gso_type == GSO_TCPV4 | GSO_ECN => (Gso::Tcp4(size), true),
        _ if gso_type == GSO_TCPV6 | GSO_ECN => (Gso::Tcp6(size), true),
        _ => return None,
    };
    admit_super_frame((head, len), csum, gso, size.into(), ecn)
}

fn admit_super_frame(
    (head, len): (&[u8], usize),
    csum: Csum,
    gso: Gso,
    size: usize,
    ecn: bool,
) -> Option<Offload> {
    let headers = Headers::of(head, gso)?;
    // virtio 1.2, 5.1.6.2.1: whoever asks for segmentation asks for checksums too.
    let at_transport = csum
        == Csum::Partial {
            start: headers.ip.transport_at as u16,
            offset: headers.transport.csum_at() as u16,
        };
    if size == 0 || !at_transport {
        return None;
    }
    let payload_len = len - headers.payload_at;
    if payload_len <= size {
        return Some(Offload {
            csum,
            ..Offload::default()
        });
    }
    // No padding and no jumbogram: segments are cut from exactly what the IP header covers.
    let ip_covers_frame = headers.ip.packet_len == len - headers.ip.network_at;
    (ip_covers_frame && payload_len.div_ceil(size) <= SEGMENTS_MAX).then_some(Offload {
        csum,
        gso,
        ecn,
    })
}

/// Whether completing the checksum touches nothing that a decision may have been based on before:
/// neither MACs, VLAN tags, IP headers, ARP, nor a transport header outside its checksum field.
///
/// Positions behind the transport header stay allowed, because guests that tunnel leave the inner
/// checksum to the device; so do other EtherTypes (PPPoE, MPLS) behind the Ethernet header.
fn partial_is_safe(head: &[u8], len: usize, start: usize, offset: usize) -> bool {
    // Off a 16-bit boundary the stored sum would not be the one that receivers compute.
    if !offset.is_multiple_of(2) || start + offset + 2 > len {
        return false;
    }
    let Some((network_at, ethertype)) = network(head) else {
        return false;
    };
    let ip = match ethertype {
        ETHERTYPE_IPV4 | ETHERTYPE_IPV6 => Ip::at(head, network_at, ethertype),
        ETHERTYPE_ARP => None,
        _ => return start >= network_at,
    };
    // The checksum of a fragmented datagram is not within one fragment.
    let Some(ip) = ip.filter(|ip| !ip.fragment) else {
        return false;
    };
    let at_transport = start == ip.transport_at;
    match ip.protocol {
        PROTO_TCP if at_transport => offset == TCP_CSUM_AT,
        PROTO_TCP => start >= ip.transport_at + TCP_HEADER_LEN,
        PROTO_UDP if at_transport => offset == UDP_CSUM_AT,
        PROTO_UDP => start >= ip.transport_at + UDP_HEADER_LEN,
        PROTO_ICMP | PROTO_ICMPV6 => at_transport && offset == ICMP_CSUM_AT,
        _ => start >= ip.transport_at,
    }
}

/// The virtio-net header to write before a frame. `hdr_len` covers the headers the frame really has:
/// the kernel copies that many bytes into the linear part of its buffer.
#[inline]
pub fn encode(frame: Frame<'_>) -> [u8; VNET_HEADER_LEN] {
    let mut header = [0; VNET_HEADER_LEN];
    let mut put = |at: usize, value: u16| header[at..at + 2].copy_from_slice(&value.to_ne_bytes());
    let Offload { csum, gso, ecn } = frame.offload;
    let mut flags = 0;
    match csum {
        Csum::Unchecked => {}
        Csum::Valid => flags = F_DATA_VALID,
        Csum::Partial { start, offset } => {
            flags = F_NEEDS_CSUM;
            put(6, start);
            put(8, offset);
        }
    }
    let (gso_type, size) = match gso {
        Gso::None => (GSO_NONE, 0),
        Gso::Tcp4(size) => (GSO_TCPV4, size),
        Gso::Tcp6(size) => (GSO_TCPV6, size),
        Gso::Udp(size) => (GSO_UDP_L4, size),
    };
    if gso != Gso::None {
        put(4, size);
        let len = headers_len(frame.bytes, frame.offload).unwrap_or(0);
        put(2, u16::try_from(len).unwrap_or(0));
    }
    header[0] = flags;
    header[1] = if ecn { gso_type | GSO_ECN } else { gso_type };
    header
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::offload::Caps;

    const TCP4_CSUM: Csum = Csum::Partial {
        start: 34,
        offset: 16,
    };

    /// A TCP over IPv4 frame with `payload_len` bytes of data.
    fn tcp4(payload_len: usize) -> Vec<u8> {
        let mut frame = vec![0; 14 + 20 + 20 + payload_len];
        frame[12..14].copy_from_slice(&[0x08, 0x00]);
        frame[14] = 0x45;
        let total_len = (frame.len() - 14) as u16;
        frame[16..18].copy_from_slice(&total_len.to_be_bytes());
        frame[23] = PROTO_TCP;
        frame[46] = 0x50;
        frame[47] = 0x10;
        frame
    }

    fn raw(flags: u8, gso_type: u8, [size, start, offset]: [u16; 3], frame: &[u8]) -> Vec<u8> {
        let mut raw = vec![flags, gso_type];
        for field in [0, size, start, offset, 0] {
            raw.extend_from_slice(&u16::to_ne_bytes(field));
        }
        raw.extend_from_slice(frame);
        raw
    }

    #[test]
    fn lengths_are_bounded() {
        assert_eq!(admit(&[0; 11]), Err(DropReason::Truncated));
        assert_eq!(admit(&[0; 12 + 13]), Err(DropReason::Truncated));
        assert_eq!(admit(&[0; 12 + 14]), Ok(Offload::default()));
        assert_eq!(admit(&vec![0; 12 + FRAME_LEN_MAX]), Ok(Offload::default()));
        assert_eq!(
            admit(&vec![0; 12 + FRAME_LEN_MAX + 1]),
            Err(DropReason::Oversized)
        );
    }

    #[test]
    fn super_frame_passes_and_hdr_len_is_recomputed() {
        let frame = tcp4(4000);
        let mut received = raw(F_NEEDS_CSUM, GSO_TCPV4 | GSO_ECN, [1460, 34, 16], &frame);
        received[2..4].copy_from_slice(&u16::to_ne_bytes(0xffff));
        let offload = admit(&received).unwrap();
        assert_eq!(
            offload,
            Offload {
                csum: TCP4_CSUM,
                gso: Gso::Tcp4(1460),
                ecn: true
            }
        );
        received[2..4].copy_from_slice(&u16::to_ne_bytes(54));
        assert_eq!(
            encode(Frame {
                bytes: &frame,
                offload
            }),
            received[..12]
        );
    }

    #[test]
    fn one_segment_is_a_plain_frame() {
        let offload = admit(&raw(F_NEEDS_CSUM, GSO_TCPV4, [1460, 34, 16], &tcp4(1460))).unwrap();
        assert_eq!(
            offload,
            Offload {
                csum: TCP4_CSUM,
                ..Offload::default()
            }
        );
    }

    #[test]
    fn lying_headers_are_refused() {
        let frame = tcp4(4000);
        let case = |flags, gso_type, fields| admit(&raw(flags, gso_type, fields, &frame));
        let refused = Err(DropReason::BadOffload);
        assert_eq!(case(4, GSO_NONE, [0; 3]), refused, "unknown flag");
        assert_eq!(case(F_NEEDS_CSUM, 3, [1460, 34, 6]), refused, "UFO");
        assert_eq!(
            case(F_NEEDS_CSUM, GSO_ECN, [1460, 34, 16]),
            refused,
            "ECN alone"
        );
        assert_eq!(
            case(F_NEEDS_CSUM, GSO_UDP_L4 | GSO_ECN, [1460, 34, 6]),
            refused
        );
        assert_eq!(
            case(F_NEEDS_CSUM, GSO_TCPV6, [1460, 34, 16]),
            refused,
            "wrong family"
        );
        assert_eq!(
            case(F_NEEDS_CSUM, GSO_UDP_L4, [1460, 34, 6]),
            refused,
            "wrong transport"
        );
        assert_eq!(
            case(0, GSO_TCPV4, [1460, 34, 16]),
            refused,
            "no checksum asked for"
        );
        assert_eq!(
            case(F_NEEDS_CSUM, GSO_TCPV4, [0, 34, 16]),
            refused,
            "no size"
        );
        assert_eq!(
            case(F_NEEDS_CSUM, GSO_TCPV4, [1, 34, 16]),
            refused,
            "4,000 segments"
        );
        assert!(
            case(F_NEEDS_CSUM, GSO_TCPV4, [2, 34, 16]).is_ok(),
            "2,000 segments"
        );

        let refused_if = |change: fn(&mut Vec<u8>)| {
            let mut frame = tcp4(4000);
            change(&mut frame);
            admit(&raw(F_NEEDS_CSUM, GSO_TCPV4, [1460, 34, 16], &frame)) == refused
        };
        assert!(!refused_if(|_| ()));
        assert!(refused_if(|frame| frame[47] = 0x12), "SYN");
        assert!(refused_if(|frame| frame[47] = 0x14), "RST");
        assert!(refused_if(|frame| frame[46] = 0x40), "short TCP header");
        assert!(refused_if(|frame| frame[20] = 0x20), "fragment");
        assert!(refused_if(|frame| frame.push(0)), "padding");
    }

    #[test]
    fn a_checksum_never_lands_on_a_header_that_was_decided_on() {
        let frame = tcp4(100);
        let allowed: Vec<(u16, u16)> = (0..80)
            .flat_map(|start| (0..80).map(move |offset| (start, offset)))
            .filter(|&(start, offset)| {
                start + offset < 54 && admit(&raw(1, 0, [0, start, offset], &frame)).is_ok()
            })
            .collect();
        assert_eq!(allowed, [(34, 16)]);
        assert!(
            admit(&raw(1, 0, [0, 54, 16], &frame)).is_ok(),
            "an inner checksum"
        );
        assert!(admit(&raw(1, 0, [0, 54, 98], &frame)).is_ok());
        assert!(
            admit(&raw(1, 0, [0, 54, 99], &frame)).is_err(),
            "odd, and past the end"
        );
        assert!(
            admit(&raw(1, 0, [0, 54, 100], &frame)).is_err(),
            "past the end"
        );
        assert!(admit(&raw(1, 0, [0, 0xffff, 0xfffe], &frame)).is_err());

        let mut arp = frame.clone();
        arp[13] = 0x06;
        assert!(admit(&raw(1, 0, [0, 54, 16], &arp)).is_err());
        let mut pppoe = frame;
        pppoe[12..14].copy_from_slice(&[0x88, 0x64]);
        assert!(admit(&raw(1, 0, [0, 42, 16], &pppoe)).is_ok());
        assert!(admit(&raw(1, 0, [0, 12, 16], &pppoe)).is_err());
    }

    #[test]
    fn segmentation_without_checksums_is_no_capability() {
        let offload = Offload {
            csum: TCP4_CSUM,
            gso: Gso::Tcp4(1460),
            ecn: false,
        };
        assert!(
            !Caps {
                csum: false,
                tso: true,
                uso: true
            }
            .take(offload)
        );
        assert!(
            !Caps {
                csum: true,
                tso: false,
                uso: true
            }
            .take(offload)
        );
        assert!(
            Caps {
                csum: true,
                tso: true,
                uso: false
            }
            .take(offload)
        );
        assert!(Caps::default().take(Offload::default()));
    }
}
