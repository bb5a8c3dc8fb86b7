//! One queue of a vhost-user port: its ring, the descriptors that go with it, and what waits for its
//! guest.

mod from_guest;
mod to_guest;

use std::collections::VecDeque;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

pub use self::from_guest::{Budget, RemoteFrame, STRAIGHT_BYTES_MIN};
pub use self::to_guest::Refill;
use super::ring::{Broken, Buffers, Direction, Ring};
use crate::offload::{Caps, VNET_HEADER_LEN};
use crate::stats::{DropReason, PortCounters};
use crate::sys::eventfd;

/// Bytes that wait for one port's guest at most, all its queues together: what TCP has in flight between
/// two guests of one host by default (net.ipv4.tcp_rmem, 6 MiB), and some.
pub const BACKLOG_BYTES_MAX: usize = 8 << 20;
/// Frames that wait for one port's guest at most: as for a tap ([`crate::tap`]).
pub const BACKLOG_FRAMES_MAX: usize = 16_384;
/// `struct virtio_net_hdr` without `num_buffers`: what a driver without VERSION_1 and MRG_RXBUF uses.
const LEGACY_HEADER_LEN: usize = 10;
const NUM_BUFFERS_AT: usize = 10;

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
        let why = match self.ring.has_lost_memory() {
            true => Broken::Memory,
            false => why,
        };
        log::warn!("{port}: a queue of the guest is given up until its driver resets it: {why}");
        self.stop(backlog);
        self.running = true;
        self.broken = true;
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

/// The header's 16-bit fields are little-endian (virtio 1.2, 2.4.3), and in the host's order in
/// [`offload`].
fn from_wire(header: &mut [u8]) {
    if cfg!(target_endian = "big") {
        for field in header[2..NUM_BUFFERS_AT].chunks_exact_mut(2) {
            field.swap(0, 1);
        }
    }
}
