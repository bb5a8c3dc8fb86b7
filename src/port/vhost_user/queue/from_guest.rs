//! A queue's frames from the guest: into a batch, or straight to another guest.

use super::super::ring::{Broken, Remote};
use super::{Queue, from_wire};
use crate::frame::{BATCH_BYTES, BATCH_FRAMES_MAX, Batch, FRAME_BUFFER_LEN, Frame};
use crate::offload::{self, VNET_HEADER_LEN};
use crate::port::Shortcut;
use crate::stats::{DropReason, PortCounters};

/// Bytes of a frame that are copied before it is decided whether the rest goes straight to its receiver:
/// more than Ethernet, two tags, IPv6 and TCP have, with all options.
const HEAD_LEN: usize = 192;
/// Smallest frame that goes straight to another guest's memory. *Measured* (2 cores, EPYC), guests' memory
/// outside the L2 cache: the second copy, from a batch that is inside it, costs 0.12 of 0.61 us for 1,514
/// bytes, 0.77 of 1.9 us for 9,014 and 6.9 of 14.2 us for 65,000. Smaller ones are worth more joined.
pub const STRAIGHT_BYTES_MIN: usize = 4096;
/// Largest: what [`offload::fit`] would let pass to any port.
const STRAIGHT_BYTES_MAX: usize = 65_535;

/// A frame in a guest's memory, of which only the beginning was copied and looked at.
#[derive(Clone, Copy, Debug)]
pub struct RemoteFrame<'a> {
    /// Its beginning, and what was admitted for it.
    pub head: Frame<'a>,
    /// What follows.
    pub(in super::super) rest: Remote<'a>,
}

impl RemoteFrame<'_> {
    /// Bytes of the frame.
    pub fn frame_len(&self) -> usize {
        self.head.bytes.len() + self.rest.bytes()
    }
}

/// What may still be read from a port before its worker turns to others, all its queues together: as much
/// as a batch. Frames that are refused or go straight to their receiver fill no batch, and count too.
#[derive(Debug)]
pub struct Budget {
    frames: usize,
    straight_bytes: usize,
}

impl Budget {
    /// Whether nothing more may be read.
    pub fn is_spent(&self) -> bool {
        self.frames == 0 || self.straight_bytes == 0
    }
}

impl Default for Budget {
    fn default() -> Self {
        Self {
            frames: BATCH_FRAMES_MAX,
            straight_bytes: BATCH_BYTES,
        }
    }
}

impl Queue {
    /// Reads frames into `batch` until it is full or the budget spent (`true`), or the ring empty. Large
    /// ones may leave by `shortcut`: while the batch is empty, and a batch that is not ends before them.
    ///
    /// # Errors
    /// The driver broke a rule.
    pub fn drain(
        &mut self,
        batch: &mut Batch,
        budget: &mut Budget,
        counters: &PortCounters,
        shortcut: &mut dyn Shortcut,
    ) -> Result<bool, Broken> {
        self.ring.disable_kick()?;
        while !budget.is_spent() {
            let is_first = batch.is_empty();
            let Some(buffer) = batch.next_buffer() else {
                return Ok(true);
            };
            self.buffers.clear();
            let Some(head) = self.ring.take(&mut self.buffers)? else {
                return Ok(false);
            };
            budget.frames -= 1;
            let header_len = self.terms.header_len();
            let frame_len = self.buffers.bytes().saturating_sub(header_len);
            if (STRAIGHT_BYTES_MIN..=STRAIGHT_BYTES_MAX).contains(&frame_len) && self.enabled {
                match self.send_straight(buffer, is_first, shortcut)? {
                    Straight::Sent => {
                        let bytes = &mut budget.straight_bytes;
                        *bytes = bytes.saturating_sub(frame_len);
                        counters.rx(frame_len);
                        self.ring.push_used(head, 0)?;
                        continue;
                    }
                    Straight::Later => {
                        self.ring.untake(1);
                        return Ok(true);
                    }
                    Straight::No => {}
                }
            }
            counters.rx(frame_len);
            let admitted = if !self.enabled {
                Err(DropReason::Unconnected)
            } else if self.buffers.bytes() < header_len {
                Err(DropReason::Truncated)
            } else if VNET_HEADER_LEN + frame_len > FRAME_BUFFER_LEN {
                Err(DropReason::Oversized)
            } else {
                let raw = &mut buffer[..VNET_HEADER_LEN + frame_len];
                self.read_raw(raw)?;
                offload::admit(raw)
            };
            self.ring.push_used(head, 0)?;
            match admitted {
                Ok(offload) => batch.commit(VNET_HEADER_LEN..VNET_HEADER_LEN + frame_len, offload),
                Err(reason) => counters.count_drop(reason),
            }
        }
        Ok(true)
    }

    /// Reads the header, and as much of the frame as `raw` has room for.
    fn read_raw(&self, raw: &mut [u8]) -> Result<(), Broken> {
        let header_len = self.terms.header_len();
        let (header, frame) = raw.split_at_mut(VNET_HEADER_LEN);
        self.ring
            .read(&self.buffers, 0, &mut header[..header_len])?;
        header[header_len..].fill(0);
        self.ring.read(&self.buffers, header_len, frame)?;
        from_wire(header);
        Ok(())
    }

    /// Sends the frame in `buffers` by the shortcut, if that leads to its receiver. `scratch` is for its
    /// head: nobody looks at bytes that the guest can still change.
    fn send_straight(
        &self,
        scratch: &mut [u8],
        is_first: bool,
        shortcut: &mut dyn Shortcut,
    ) -> Result<Straight, Broken> {
        let raw = &mut scratch[..VNET_HEADER_LEN + HEAD_LEN];
        self.read_raw(raw)?;
        let head = &raw[VNET_HEADER_LEN..];
        if !shortcut.leads(head) {
            return Ok(Straight::No);
        }
        if !is_first {
            return Ok(Straight::Later);
        }
        let header_len = self.terms.header_len();
        let Some(offload) = offload::admit_head(raw, self.buffers.bytes() - header_len) else {
            return Ok(Straight::No);
        };
        let frame = RemoteFrame {
            head: Frame {
                bytes: head,
                offload,
            },
            rest: Remote {
                ring: &self.ring,
                buffers: &self.buffers,
                skip: header_len + HEAD_LEN,
            },
        };
        Ok(match shortcut.send(&frame) {
            true => Straight::Sent,
            false => Straight::No,
        })
    }
}

/// What became of a frame that may go straight to its receiver.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Straight {
    Sent,
    /// When those before it have been sent.
    Later,
    /// By the batch.
    No,
}
