//! Offload metadata: what a frame's sender left for the device to do.
//!
//! ```text
//!  port rx -> admit -> coalesce -> Frame { bytes, offload } -> switch, gateway, NAT -> fit -> encode -> port tx
//! ```
//!
//! It travels beside the bytes from [`admit`], the one place where a guest's virtio-net header is
//! believed or refused, to [`fit`], the one place where it is adapted to the egress port. Between, what
//! came as single segments is joined, and acknowledgments that say nothing more are left out, by
//! [`coalesce`]. Nothing here holds state.
//!
//! What a hostile guest can try: a checksum position inside a MAC, a VLAN tag, an IP address or a
//! port number, so that completing the sum rewrites a header after the switch decided on it; a
//! segment size that turns one frame into 65,000; headers that are not there. All are refused as
//! [`DropReason::BadOffload`](crate::stats::DropReason::BadOffload). A malformed IP packet in a
//! frame without claims is none of a switch's business and passes.

mod coalesce;
mod fit;
mod layout;
mod segment;
mod vnet;

pub use coalesce::coalesce;
pub use fit::fit;
pub use vnet::{SEGMENTS_MAX, VNET_HEADER_LEN, admit, admit_head, admit_plain, encode};

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
    /// Segmentation. Anything but [`Gso::None`] goes with [`Csum::Partial`] at the transport header.
    pub gso: Gso,
    /// The TCP super-frame has CWR set (VIRTIO_NET_HDR_GSO_ECN).
    pub ecn: bool,
}

/// What an egress port takes from us undone.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Caps {
    /// Frames with [`Csum::Partial`].
    pub csum: bool,
    /// [`Gso::Tcp4`] and [`Gso::Tcp6`]; means nothing without `csum`.
    pub tso: bool,
    /// [`Gso::Udp`]; means nothing without `csum`.
    pub uso: bool,
}

impl Caps {
    /// Whether the port takes a frame with this much left to do. A super-frame always has its
    /// checksums to do as well, so segmentation without `csum` takes nothing.
    pub fn take(self, offload: Offload) -> bool {
        let csum = self.csum || !matches!(offload.csum, Csum::Partial { .. });
        csum && match offload.gso {
            Gso::None => true,
            Gso::Tcp4(_) | Gso::Tcp6(_) => self.csum && self.tso,
            Gso::Udp(_) => self.csum && self.uso,
        }
    }
}
