//! A queue's frames to the guest: into its buffers, or kept until it has some.

use super::super::ring::{Broken, CHAIN_DESCRIPTORS_MAX, Remote};
use super::{Backlog, NUM_BUFFERS_AT, Queue, from_wire};
use crate::frame::Frame;
use crate::offload::{self, VNET_HEADER_LEN};
use crate::stats::DropReason;

/// Chains that one frame is spread over at most: 43 of Linux's smallest buffers hold a super-frame.
const MERGED_CHAINS_MAX: usize = 128;
/// Rounds of asking for a kick and finding that buffers came meanwhile, before others get their turn.
const REFILLS_MAX: usize = 4;

const GSO_TYPE_AT: usize = 1;
const GSO_ECN: u8 = 0x80;

/// How far a queue's refill came.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Refill {
    /// Nothing waits.
    Empty,
    /// What waits goes on with the driver's next kick.
    Asked,
    /// The driver is quicker than we are: come back without a kick.
    Again,
}

impl Queue {
    /// Sends a frame, or keeps it until its guest has buffers; `rest` lies behind its bytes.
    ///
    /// # Errors
    /// Why it is lost.
    pub fn send(
        &mut self,
        frame: Frame<'_>,
        rest: Option<Remote<'_>>,
        backlog: &Backlog,
        port: &str,
    ) -> Result<(), DropReason> {
        if !self.is_open() {
            return Err(DropReason::Unconnected);
        }
        if !self.terms.caps.take(frame.offload) {
            // Fitted for the front-end that was there a moment ago.
            return Err(DropReason::EgressError);
        }
        let mut header = offload::encode(frame);
        if !self.terms.caps.csum {
            header[0] = 0;
        }
        if !self.terms.ecn {
            // Its receiver ends the connection, and has the flag in the TCP header.
            header[GSO_TYPE_AT] &= !GSO_ECN;
        }
        from_wire(&mut header);
        let sent = match self.waiting.is_empty() {
            true => self.deliver(&mut header, frame.bytes, rest),
            false => Ok(Delivery::NoRoom),
        };
        match sent {
            Ok(Delivery::Done) => Ok(()),
            Ok(Delivery::TooSmall) => Err(DropReason::EgressTooBig),
            Ok(Delivery::SourceLost) => Err(DropReason::EgressError),
            Ok(Delivery::NoRoom) => {
                let copied_len = header.len() + frame.bytes.len();
                let len = copied_len + rest.map_or(0, |rest| rest.bytes());
                if !backlog.take_in(len) {
                    return Err(DropReason::EgressFull);
                }
                let mut kept = Vec::with_capacity(len);
                kept.extend_from_slice(&header);
                kept.extend_from_slice(frame.bytes);
                kept.resize(len, 0);
                if rest.is_some_and(|rest| rest.read(&mut kept[copied_len..]).is_err()) {
                    backlog.let_go(len);
                    return Err(DropReason::EgressError);
                }
                self.waiting.push_back(kept.into_boxed_slice());
                Ok(())
            }
            Err(why) => {
                self.give_up(why, backlog, port);
                Err(DropReason::EgressError)
            }
        }
    }

    /// Writes a frame into the guest's buffers, if there are enough.
    fn deliver(
        &mut self,
        header: &mut [u8; VNET_HEADER_LEN],
        bytes: &[u8],
        rest: Option<Remote<'_>>,
    ) -> Result<Delivery, Broken> {
        let header_len = self.terms.header_len();
        let needed = header_len + bytes.len() + rest.map_or(0, |rest| rest.bytes());
        self.buffers.clear();
        self.heads.clear();
        let chains_max = match self.terms.mergeable {
            // A ring whose buffers are all ours has no more of them.
            true => MERGED_CHAINS_MAX.min(self.ring.size().into()),
            false => 1,
        };
        while self.buffers.bytes() < needed {
            let refused = if self.heads.len() == chains_max
                || self.buffers.descriptors() > CHAIN_DESCRIPTORS_MAX
            {
                Delivery::TooSmall
            } else {
                let room = self.buffers.bytes();
                if let Some(head) = self.ring.take(&mut self.buffers)? {
                    self.heads.push((head, self.buffers.bytes() - room));
                    continue;
                }
                Delivery::NoRoom
            };
            self.ring.untake(self.heads.len() as u16);
            return Ok(refused);
        }
        // virtio 1.2, 5.1.6.4: 1 where buffers are not merged.
        let count = self.heads.len() as u16;
        header[NUM_BUFFERS_AT..].copy_from_slice(&count.to_le_bytes());
        let parts = [&header[..header_len], bytes];
        if !self.ring.write(&self.buffers, parts, rest)? {
            self.ring.untake(count);
            return Ok(Delivery::SourceLost);
        }
        let mut left = needed;
        for &(head, room) in &self.heads {
            self.ring.push_used(head, room.min(left))?;
            left = left.saturating_sub(room);
        }
        Ok(Delivery::Done)
    }

    /// Ends a batch: the guest sees what it was sent, and is called where it wants that. What waits goes
    /// on when it has buffers, with the driver's next kick.
    pub fn flush(&mut self, backlog: &Backlog, port: &str) -> Refill {
        if !self.is_served() {
            return Refill::Empty;
        }
        let flushed = self.refill(backlog).and_then(|refill| {
            self.show()?;
            Ok(refill)
        });
        flushed.unwrap_or_else(|why| {
            self.give_up(why, backlog, port);
            Refill::Empty
        })
    }

    fn refill(&mut self, backlog: &Backlog) -> Result<Refill, Broken> {
        for _ in 0..REFILLS_MAX {
            while let Some(mut frame) = self.waiting.pop_front() {
                // Each is a header and a frame.
                let Some((header, bytes)) = frame.split_first_chunk_mut() else {
                    continue;
                };
                match self.deliver(header, bytes, None) {
                    Ok(Delivery::Done) => {}
                    Ok(Delivery::TooSmall | Delivery::SourceLost) => backlog.count_abandoned(),
                    Ok(Delivery::NoRoom) => {
                        self.waiting.push_front(frame);
                        break;
                    }
                    Err(why) => {
                        // Lost, and counted, with those behind it.
                        self.waiting.push_front(frame);
                        return Err(why);
                    }
                }
                backlog.let_go(frame.len());
            }
            if self.waiting.is_empty() {
                if self.asked_at.take().is_some() {
                    self.ring.disable_kick()?;
                }
                return Ok(Refill::Empty);
            }
            let seen = self.ring.avail_seen();
            if self.asked_at == Some(seen) && !self.ring.has_news()? {
                return Ok(Refill::Asked);
            }
            self.show()?;
            self.asked_at = Some(self.ring.avail_seen());
            if !self.ring.enable_kick()? {
                return Ok(Refill::Asked);
            }
        }
        Ok(Refill::Again)
    }
}

/// What became of a frame for the guest.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Delivery {
    Done,
    /// The guest has given too few buffers so far.
    NoRoom,
    /// The guest's buffers don't hold such a frame.
    TooSmall,
    /// The memory that the frame is in was lost meanwhile.
    SourceLost,
}
