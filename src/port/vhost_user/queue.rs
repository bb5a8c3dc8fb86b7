//! One queue of a vhost-user port: its ring, the descriptors that go with it, and what waits for its
//! guest.

use std::collections::VecDeque;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use super::ring::{Broken, Buffers, CHAIN_DESCRIPTORS_MAX, Direction, Remote, Ring};
use crate::frame::{BATCH_BYTES, BATCH_FRAMES_MAX, Batch, FRAME_BUFFER_LEN, Frame};
use crate::offload::{self, Caps, VNET_HEADER_LEN};
use crate::port::Shortcut;
use crate::stats::{DropReason, PortCounters};
use crate::sys::eventfd;

/// Bytes that wait for one port's guest at most, all its queues together: what TCP has in flight between
/// two guests of one host by default (net.ipv4.tcp_rmem, 6 MiB), and some.
pub const BACKLOG_BYTES_MAX: usize = 8 << 20;
/// Frames that wait for one port's guest at most: as for a tap ([`crate::tap`]).
pub const BACKLOG_FRAMES_MAX: usize = 16_384;
/// Chains that one frame is spread over at most: 43 of Linux's smallest buffers hold a super-frame.
const MERGED_CHAINS_MAX: usize = 128;
/// Rounds of asking for a kick and finding that buffers came meanwhile, before others get their turn.
const REFILLS_MAX: usize = 4;

/// `struct virtio_net_hdr` without `num_buffers`: what a driver without VERSION_1 and MRG_RXBUF uses.
const LEGACY_HEADER_LEN: usize = 10;
const NUM_BUFFERS_AT: usize = 10;
const GSO_TYPE_AT: usize = 1;
const GSO_ECN: u8 = 0x80;

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
    pub(super) rest: Remote<'a>,
}

impl RemoteFrame<'_> {
    /// Bytes of the frame.
    pub fn frame_len(&self) -> usize {
        self.head.bytes.len() + self.rest.bytes()
    }
}

/// What front-end and guest agreed on, as far as frames are concerned.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Terms {
    /// What the guest takes undone.
    pub caps: Caps,
    /// The guest takes super-frames with CWR set.
    pub ecn: bool,
    /// A frame may be spread over several chains (MRG_RXBUF).
    pub mergeable: bool,
    /// The header ends with `num_buffers`.
    pub long_header: bool,
    /// EVENT_IDX.
    pub event_idx: bool,
}

impl Terms {
    fn header_len(&self) -> usize {
        match self.long_header {
            true => VNET_HEADER_LEN,
            false => LEGACY_HEADER_LEN,
        }
    }
}

impl Default for Terms {
    fn default() -> Self {
        Self {
            // Nobody is there: no work is done for what is dropped.
            caps: Caps {
                csum: true,
                tso: true,
                uso: true,
            },
            ecn: false,
            mergeable: false,
            long_header: true,
            event_idx: false,
        }
    }
}

/// What waits for the guest of a port, all its queues together.
#[derive(Debug)]
pub struct Backlog {
    bytes: AtomicUsize,
    frames: AtomicUsize,
    counters: Arc<PortCounters>,
}

impl Backlog {
    /// Nothing; `counters` are the port's.
    pub fn new(counters: Arc<PortCounters>) -> Self {
        Self {
            bytes: AtomicUsize::new(0),
            frames: AtomicUsize::new(0),
            counters,
        }
    }

    fn take_in(&self, bytes: usize) -> bool {
        let fits = self.bytes.fetch_add(bytes, Relaxed) + bytes <= BACKLOG_BYTES_MAX
            && self.frames.load(Relaxed) < BACKLOG_FRAMES_MAX;
        match fits {
            true => drop(self.frames.fetch_add(1, Relaxed)),
            false => drop(self.bytes.fetch_sub(bytes, Relaxed)),
        }
        fits
    }

    fn let_go(&self, bytes: usize) {
        self.bytes.fetch_sub(bytes, Relaxed);
        self.frames.fetch_sub(1, Relaxed);
    }

    fn count_abandoned(&self) {
        self.counters.count_drop(DropReason::Abandoned);
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

/// A queue.
#[derive(Debug)]
pub struct Queue {
    /// The ring.
    pub ring: Ring,
    /// What the driver kicks.
    pub kick: Option<OwnedFd>,
    /// What we call the driver by.
    pub call: Option<OwnedFd>,
    /// SET_VRING_ENABLE.
    pub enabled: bool,
    terms: Terms,
    running: bool,
    broken: bool,
    buffers: Buffers,
    /// Heads of the chains in `buffers`, and their sizes.
    heads: Vec<(u16, usize)>,
    waiting: VecDeque<Box<[u8]>>,
    /// A kick was asked for, for what waits, when the driver's available index was this. Once the driver
    /// has gone past it no kick comes any more, with EVENT_IDX: however many buffers it adds then.
    asked_at: Option<u16>,
}

impl Queue {
    /// A queue that nobody has set up.
    pub fn new(direction: Direction) -> Self {
        Self {
            ring: Ring::new(direction),
            kick: None,
            call: None,
            enabled: false,
            terms: Terms::default(),
            running: false,
            broken: false,
            buffers: Buffers::default(),
            heads: Vec::new(),
            waiting: VecDeque::new(),
            asked_at: None,
        }
    }

    /// Puts in force what was agreed on.
    pub fn set_terms(&mut self, terms: Terms) {
        self.terms = terms;
        self.ring.set_event_idx(terms.event_idx);
        // Kicks are asked for in another way with EVENT_IDX than without.
        self.asked_at = None;
    }

    /// Starts the queue where it has all it needs, after any change; whether it runs.
    ///
    /// # Errors
    /// The ring is not where the front-end says.
    pub fn start(&mut self) -> Result<bool, Broken> {
        // The wish for a kick may have been left where the ring is no more.
        self.asked_at = None;
        if !self.running && self.kick.is_some() && self.ring.has_place() {
            self.ring.start()?;
            self.ring.disable_kick()?;
            self.running = true;
            self.broken = false;
        }
        Ok(self.running)
    }

    /// Stops the queue; what waits for its guest is lost.
    pub fn stop(&mut self, backlog: &Backlog) {
        if self.is_served() {
            // What was sent since the last flush: whoever goes on with the ring reads the used index there,
            // and buffers above it would be nobody's.
            let _ = self.show();
        }
        self.running = false;
        self.asked_at = None;
        for frame in self.waiting.drain(..) {
            backlog.let_go(frame.len());
            backlog.count_abandoned();
        }
        self.waiting.shrink_to_fit();
    }

    /// Whether frames go through it.
    pub fn is_open(&self) -> bool {
        self.is_served() && self.enabled
    }

    /// Whether its ring is looked at: one that is not enabled is emptied, and its frames dropped
    /// (vhost-user.rst, "Ring states").
    pub fn is_served(&self) -> bool {
        self.running && !self.broken && self.ring.has_place()
    }

    /// Whether frames wait for the guest.
    pub fn has_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Gives the ring up until it is set up again.
    pub fn give_up(&mut self, why: Broken, backlog: &Backlog, port: &str) {
        log::warn!("{port}: a queue of the guest is given up until its driver resets it: {why}");
        self.stop(backlog);
        self.running = true;
        self.broken = true;
    }

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
                if let Some(rest) = rest {
                    // Its places were found in the memory that is held meanwhile.
                    let read = rest.read(&mut kept[copied_len..]);
                    debug_assert!(read.is_ok());
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
        self.ring
            .write(&self.buffers, [&header[..header_len], bytes], rest)?;
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
                    Ok(Delivery::TooSmall) => backlog.count_abandoned(),
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

    /// Shows the driver what it was given back, and calls it where it wants that.
    ///
    /// # Errors
    /// The ring has no place.
    pub fn show(&mut self) -> Result<(), Broken> {
        if self.ring.publish()?
            && self.ring.wants_call()?
            && let Some(call) = &self.call
        {
            eventfd::signal(call.as_fd());
        }
        Ok(())
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

/// What became of a frame for the guest.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Delivery {
    Done,
    /// The guest has given too few buffers so far.
    NoRoom,
    /// The guest's buffers don't hold such a frame.
    TooSmall,
}

/// The header's 16-bit fields are little-endian (virtio 1.2, 2.4.3), and in the host's order in
/// [`offload`].
fn from_wire(header: &mut [u8]) {
    if cfg!(target_endian = "big") {
        for field in header[2..NUM_BUFFERS_AT].chunks_exact_mut(2) {
            field.swap(0, 1);
        }
    }
}
