//! A packet socket on the `vm` tap: the port of a VMM where the kernel can't do the wire (no
//! act_mirred), slower than it.
//!
//! The kernel takes the outer VLAN tag out of what it hands over and PACKET_VNET_HDR has 10 bytes
//! where a tap has 12, so each frame is put together again on its way into the batch.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use super::tap::{LiveCaps, send_with_header};
use super::{DropSource, KernelDrops, More, PortRx, PortTx, refusal};
use crate::frame::{BATCH_FRAMES_MAX, Batch, Frame};
use crate::offload::{self, Caps, Offload, VNET_HEADER_LEN};
use crate::stats::{DropReason, PortCounters};
use crate::sys::packet_ring::{self, PacketRing, RING_VNET_HEADER_LEN, RingFrame};
use crate::tap::TapError;

/// Destination and source MAC: the VLAN tag goes behind them.
const MACS_LEN: usize = 12;
const VLAN_TAG_LEN: usize = 4;
/// VIRTIO_NET_HDR_F_NEEDS_CSUM
const NEEDS_CSUM: u8 = 1;
/// Place of `csum_start` in the header.
const CSUM_START: std::ops::Range<usize> = 6..8;

/// Makes the halves of a port, and the source of its drops, from a socket of
/// [`packet_ring::open`]. `uso`: whether the kernel knows UDP segmentation.
///
/// # Errors
/// [`TapError::NotATap`] when `fd` is not such a socket.
pub fn open(fd: OwnedFd, uso: bool) -> Result<(PacketRx, PacketTx, PacketDrops), TapError> {
    let tx = Arc::new(fd.try_clone().map_err(TapError::not_a_tap)?);
    let ring = PacketRing::map(fd).map_err(TapError::not_a_tap)?;
    let caps = LiveCaps::new(
        Caps {
            csum: true,
            tso: true,
            uso,
        },
        "packet socket".to_owned(),
    );
    let drops = PacketDrops {
        fd: tx.clone(),
        total: AtomicU64::new(0),
    };
    Ok((PacketRx { ring }, PacketTx { fd: tx, caps }, drops))
}

/// Receive half.
pub struct PacketRx {
    ring: PacketRing,
}

impl PortRx for PacketRx {
    fn fd(&self) -> BorrowedFd<'_> {
        self.ring.as_fd()
    }

    fn recv(&mut self, batch: &mut Batch, counters: &PortCounters) -> io::Result<More> {
        let mut idle = true;
        for _ in 0..BATCH_FRAMES_MAX {
            let Some(buffer) = batch.next_buffer() else {
                break;
            };
            match self.ring.next(|slot| assemble(slot, buffer)) {
                Some((len, result)) => {
                    idle = false;
                    counters.rx(len);
                    match result {
                        Ok(offload) => {
                            batch.commit(VNET_HEADER_LEN..VNET_HEADER_LEN + len, offload);
                        }
                        Err(reason) => counters.count_drop(reason),
                    }
                }
                // Woken for nothing: an error may wait, and it would wake us for ever.
                None if idle => {
                    rustix::net::sockopt::socket_error(&self.ring)??;
                    return Ok(More::No);
                }
                None => return Ok(More::No),
            }
        }
        Ok(More::Yes)
    }
}

/// Writes a tap's header and the whole frame into `buffer`: the frame's length and its offload.
fn assemble(slot: RingFrame<'_>, buffer: &mut [u8]) -> (usize, Result<Offload, DropReason>) {
    let tag_len = if slot.vlan.is_some() { VLAN_TAG_LEN } else { 0 };
    let len = slot.bytes.len() + tag_len;
    if slot.bytes.len() < slot.len || VNET_HEADER_LEN + len > buffer.len() {
        return (slot.len, Err(DropReason::Oversized));
    }
    if slot.bytes.len() < MACS_LEN || slot.vnet_header.len() != RING_VNET_HEADER_LEN {
        return (len, Err(DropReason::Truncated));
    }
    let (header, frame) = buffer.split_at_mut(VNET_HEADER_LEN);
    header.fill(0);
    header[..RING_VNET_HEADER_LEN].copy_from_slice(slot.vnet_header);
    let (macs, rest) = slot.bytes.split_at(MACS_LEN);
    frame[..MACS_LEN].copy_from_slice(macs);
    frame[MACS_LEN + tag_len..len].copy_from_slice(rest);
    if let Some((tpid, tci)) = slot.vlan {
        frame[MACS_LEN..MACS_LEN + 2].copy_from_slice(&tpid.to_be_bytes());
        frame[MACS_LEN + 2..MACS_LEN + 4].copy_from_slice(&tci.to_be_bytes());
        shift_csum_start(header);
    }
    (len, offload::admit(&buffer[..VNET_HEADER_LEN + len]))
}

/// The checksum starts further back by the tag that was put in before it.
fn shift_csum_start(header: &mut [u8]) {
    if header[0] & NEEDS_CSUM != 0 {
        let start = u16::from_ne_bytes([header[CSUM_START.start], header[CSUM_START.start + 1]]);
        let start = start.saturating_add(VLAN_TAG_LEN as u16);
        header[CSUM_START].copy_from_slice(&start.to_ne_bytes());
    }
}

/// Send half.
#[derive(Debug)]
pub struct PacketTx {
    fd: Arc<OwnedFd>,
    caps: LiveCaps,
}

impl PortTx for PacketTx {
    fn caps(&self) -> Caps {
        self.caps.get()
    }

    fn send(&self, frame: Frame<'_>) -> Result<(), DropReason> {
        let header = offload::encode(frame);
        send_with_header(
            self.fd.as_fd(),
            &header[..RING_VNET_HEADER_LEN],
            frame,
            &self.caps,
        )
        .map_err(refusal)
    }
}

/// Drops of the ring. What the tap's queue dropped on the way to the guest is the link's to tell.
#[derive(Debug)]
pub struct PacketDrops {
    fd: Arc<OwnedFd>,
    /// The kernel's counter starts anew with each reading.
    total: AtomicU64,
}

impl DropSource for PacketDrops {
    fn kernel_drops(&self) -> io::Result<KernelDrops> {
        let fresh = u64::from(packet_ring::take_drops(self.fd.as_fd())?);
        let rx = self.total.fetch_add(fresh, Relaxed) + fresh;
        Ok(KernelDrops { rx, tx: 0 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::offload::Csum;

    fn slot<'a>(vnet_header: &'a [u8], bytes: &'a [u8]) -> RingFrame<'a> {
        RingFrame {
            vnet_header,
            bytes,
            len: bytes.len(),
            vlan: None,
        }
    }

    #[test]
    fn the_vlan_tag_goes_back_and_the_checksum_moves() {
        let header = [NEEDS_CSUM, 0, 0, 0, 0, 0, 34, 0, 16, 0];
        let mut bytes = [7; 60];
        // An EtherType for experiments: with IP, admission would look for its headers.
        bytes[12..14].copy_from_slice(&[0x88, 0xb5]);
        let tagged = RingFrame {
            vlan: Some((0x8100, 0x2005)),
            ..slot(&header, &bytes)
        };
        let mut buffer = [0; 200];
        let (len, offload) = assemble(tagged, &mut buffer);
        assert_eq!(len, 64);
        assert_eq!(buffer[12 + 12..12 + 18], [0x81, 0, 0x20, 5, 0x88, 0xb5]);
        assert_eq!(buffer[12 + 18..12 + 64], [7; 46]);
        assert_eq!(
            offload.unwrap().csum,
            Csum::Partial {
                start: 38,
                offset: 16
            }
        );
    }

    #[test]
    fn cut_and_short_frames_are_refused() {
        let bytes = [0; 60];
        let mut buffer = [0; 100];
        let cut = RingFrame {
            len: 61,
            ..slot(&[0; 10], &bytes)
        };
        assert_eq!(assemble(cut, &mut buffer), (61, Err(DropReason::Oversized)));
        assert_eq!(
            assemble(slot(&[0; 10], &bytes), &mut buffer[..70]).1,
            Err(DropReason::Oversized)
        );
        let short = slot(&[0; 10], &bytes[..11]);
        assert_eq!(assemble(short, &mut buffer).1, Err(DropReason::Truncated));
    }
}
