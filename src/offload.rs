//! Offload metadata: what a frame's sender left for the device to do.
//!
//! It travels beside the bytes from [`admit`], the one place where a guest's virtio-net header is
//! believed or refused, to [`fit`], the one place where it is adapted to the egress port.

/// Bytes of `struct virtio_net_hdr_v1` (linux/virtio_net.h), the header of all our tap ports.
pub const VNET_HEADER_LEN: usize = 12;

/// State of the transport checksum.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Csum {
    /// Complete as the sender sees it; nobody verified it.
    #[default]
    Unchecked,
    /// Verified by the device below (VIRTIO_NET_HDR_F_DATA_VALID).
    Valid,
    /// Only the pseudo-header sum is there (VIRTIO_NET_HDR_F_NEEDS_CSUM): the 16-bit sum over
    /// `bytes[start..]` goes to `bytes[start + offset..]`.
    Partial {
        /// First summed byte, from the start of the frame.
        start: u16,
        /// Place of the checksum, from `start`.
        offset: u16,
    },
}

/// Segmentation that the frame still needs before it can go on a wire.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Gso {
    /// A plain frame.
    #[default]
    None,
    /// TCP over IPv4; payload bytes per segment.
    Tcp4(u16),
    /// TCP over IPv6; payload bytes per segment.
    Tcp6(u16),
    /// UDP datagrams of this payload size (VIRTIO_NET_HDR_GSO_UDP_L4), either family.
    Udp(u16),
}

/// What is left to do for a frame. `hdr_len` of the virtio header is not kept: it can't be trusted
/// and is recomputed on the way out.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Offload {
    /// Transport checksum.
    pub csum: Csum,
    /// Segmentation.
    pub gso: Gso,
    /// The TCP super-frame has CWR set (VIRTIO_NET_HDR_GSO_ECN).
    pub ecn: bool,
}

/// What an egress port takes from us undone.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Caps {
    /// Frames with [`Csum::Partial`].
    pub csum: bool,
    /// [`Gso::Tcp4`] and [`Gso::Tcp6`].
    pub tso: bool,
    /// [`Gso::Udp`].
    pub uso: bool,
}

// REPLACE ON MERGE: the offload engineer's admit/encode take the place of everything below.

/// Checks a virtio-net header and its frame.
///
/// # Errors
/// The reason to drop it.
pub fn admit(raw: &[u8]) -> Result<Offload, crate::stats::DropReason> {
    use crate::stats::DropReason;
    if raw.len() < VNET_HEADER_LEN + crate::frame::ETH_HEADER_LEN {
        return Err(DropReason::Truncated);
    }
    if raw.len() > VNET_HEADER_LEN + crate::frame::FRAME_LEN_MAX {
        return Err(DropReason::Oversized);
    }
    let word = |at: usize| u16::from_le_bytes([raw[at], raw[at + 1]]);
    let csum = match raw[0] & 3 {
        0 => Csum::Unchecked,
        2 => Csum::Valid,
        _ if VNET_HEADER_LEN + usize::from(word(6)) + usize::from(word(8)) + 2 > raw.len() => {
            return Err(DropReason::BadOffload);
        }
        _ => Csum::Partial {
            start: word(6),
            offset: word(8),
        },
    };
    let gso = match raw[1] & 0x7f {
        0 => Gso::None,
        1 => Gso::Tcp4(word(4)),
        4 => Gso::Tcp6(word(4)),
        5 => Gso::Udp(word(4)),
        _ => return Err(DropReason::BadOffload),
    };
    Ok(Offload {
        csum,
        gso,
        ecn: raw[1] & 0x80 != 0,
    })
}

/// The header to send a frame with.
pub fn encode(frame: &crate::frame::Frame<'_>) -> [u8; VNET_HEADER_LEN] {
    let mut header = [0; VNET_HEADER_LEN];
    let (kind, size) = match frame.offload.gso {
        Gso::None => (0, 0),
        Gso::Tcp4(size) => (1, size),
        Gso::Tcp6(size) => (4, size),
        Gso::Udp(size) => (5, size),
    };
    header[1] = kind | if frame.offload.ecn { 0x80 } else { 0 };
    header[4..6].copy_from_slice(&size.to_le_bytes());
    match frame.offload.csum {
        Csum::Unchecked => {}
        Csum::Valid => header[0] = 2,
        Csum::Partial { start, offset } => {
            header[0] = 1;
            header[6..8].copy_from_slice(&start.to_le_bytes());
            header[8..10].copy_from_slice(&offset.to_le_bytes());
            let doff = frame
                .bytes
                .get(usize::from(start) + 12)
                .map_or(20, |b| u16::from(b >> 4) * 4);
            let hdr_len = start + if kind == 5 { 8 } else { doff };
            header[2..4].copy_from_slice(&hdr_len.to_le_bytes());
        }
    }
    header
}
