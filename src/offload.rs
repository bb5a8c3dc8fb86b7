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
