//! What a vhost-user port's two halves and its control thread share: the queues, each behind a lock of its
//! own, and which of them are open.
//!
//! Locks: a queue's is held by a worker for a batch (receive), a frame (send) or what waits for the guest
//! and finds buffers (flush: [`super::queue::BACKLOG_BYTES_MAX`] at most, a millisecond or two, once the
//! guest has given that many), and for a few stores by the control thread. Mapping and unmapping memory
//! happens with none held.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU8, AtomicU32, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::event::{Timespec, epoll};

use super::allowance;
use super::memory::{Memory, REGIONS_MAX};
use super::queue::{Backlog, Budget, Queue, Refill, RemoteFrame, Terms};
use super::ring::{Broken, Direction, Remote};
use crate::frame::{Batch, Frame};
use crate::offload::Caps;
use crate::port::{More, Shortcut};
use crate::stats::{DropReason, PortCounters};
use crate::sys::userfault::Allowance;

/// Queue pairs of one port at most. Each costs an fd or two and, while its guest uses it, a look per
/// batch; guests use as many as they have CPUs.
pub const QUEUE_PAIRS_MAX: usize = 8;
/// Queues of one port, both directions: even ones to the guest, odd ones from it (virtio 1.2, 5.1.2).
pub const QUEUES_MAX: usize = 2 * QUEUE_PAIRS_MAX;
/// Open files that a front-end can have its port hold: a table of memory and, while that is exchanged, the
/// one before it; a kick and a call for each queue, and the one that takes another's place; its connection,
/// which the handler has twice.
pub const FRONT_END_FILES_MAX: usize = 2 * REGIONS_MAX + 2 * QUEUES_MAX + 1 + 2;
/// Events taken at a time: all there can be.
const EVENTS_MAX: usize = QUEUES_MAX + 1;
const _: () = assert!(QUEUE_PAIRS_MAX <= u32::BITS as usize);

/// Why a front-end's wish was not met.
#[derive(Debug, thiserror::Error)]
pub enum SetupError {
    /// It names a queue that is none.
    #[error("queue {0} of {QUEUES_MAX}")]
    NoQueue(usize),
    /// The ring is wrong.
    #[error(transparent)]
    Ring(#[from] Broken),
    /// The descriptor is wrong.
    #[error("a queue is kicked and calls by an eventfd")]
    NoEventfd,
    /// The system refused.
    #[error(transparent)]
    System(#[from] io::Error),
}

/// All that the halves and the control thread share.
#[derive(Debug)]
pub struct Device {
    /// What the port is called in the log.
    name: String,
    /// Ready when a guest has kicked, or `again` was rung: what the worker waits on.
    epoll: OwnedFd,
    again: OwnedFd,
    queues: [Mutex<Queue>; QUEUES_MAX],
    /// Queues to the guest that take frames; bit `i` is queue `2 i`.
    open: AtomicU32,
    /// Queues from the guest that are looked at; bit `i` is queue `2 i + 1`.
    served: AtomicU32,
    /// Queues to the guest where frames wait.
    waiting: AtomicU32,
    /// Pair to begin reading at: the one after that which was not emptied, so that each gets its turn.
    first: AtomicU32,
    caps: AtomicU8,
    backlog: Backlog,
    allowance: Arc<Allowance>,
}

const CAP_CSUM: u8 = 1;
const CAP_TSO: u8 = 2;
const CAP_USO: u8 = 4;

impl Device {
    /// A port without a front-end. Frames that wait for a guest in vain are counted in `counters`.
    ///
    /// # Errors
    /// The kernel gives no epoll or eventfd.
    pub fn new(name: String, counters: Arc<PortCounters>) -> io::Result<Self> {
        if let Err(error) = allowance::prepare() {
            log::warn!(
                "{name}: without inotify ({error}) guest memory that lanlet allocates counts for ever, and further \
                 vhost-user guests may get none: raise fs.inotify.max_user_instances, then attach the port anew"
            );
        }
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let again = super::eventfd()?;
        let device = Self {
            name,
            epoll,
            again,
            queues: std::array::from_fn(|index| {
                Mutex::new(Queue::new(match index % 2 {
                    0 => Direction::ToGuest,
                    _ => Direction::FromGuest,
                }))
            }),
            open: AtomicU32::new(0),
            served: AtomicU32::new(0),
            waiting: AtomicU32::new(0),
            first: AtomicU32::new(0),
            caps: AtomicU8::new(CAP_CSUM | CAP_TSO | CAP_USO),
            backlog: Backlog::new(counters),
            allowance: allowance::of_port(),
        };
        device.watch(&device.again)?;
        Ok(device)
    }

    /// What the port is called in the log.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What may be allocated on the guest's behalf, whichever front-end it has.
    pub fn allowance(&self) -> &Arc<Allowance> {
        &self.allowance
    }

    /// What the worker waits on.
    pub fn epoll(&self) -> &OwnedFd {
        &self.epoll
    }

    /// Edge-triggered, and never read: a descriptor of a front-end could be made to block, and one that
    /// stays readable would keep the worker awake.
    fn watch(&self, fd: &OwnedFd) -> io::Result<()> {
        let flags = epoll::EventFlags::IN | epoll::EventFlags::ET;
        epoll::add(&self.epoll, fd, epoll::EventData::new_u64(0), flags)?;
        Ok(())
    }

    /// Has the worker look at the port.
    fn ring_again(&self) {
        // Fails when the counter is full, and then it was rung.
        let _ = rustix::io::write(&self.again, &1u64.to_ne_bytes());
    }

    fn queue(&self, index: usize) -> MutexGuard<'_, Queue> {
        // A panic elsewhere leaves a queue that checks all it reads.
        self.queues[index % QUEUES_MAX]
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    // The worker's side.

    /// What the guest takes undone.
    pub fn caps(&self) -> Caps {
        let caps = self.caps.load(Relaxed);
        Caps {
            csum: caps & CAP_CSUM != 0,
            tso: caps & CAP_TSO != 0,
            uso: caps & CAP_USO != 0,
        }
    }

    /// Whether a guest takes frames.
    pub fn is_open(&self) -> bool {
        self.open.load(Relaxed) != 0
    }

    /// Sends a frame to the guest. [`Device::flush`] shows it.
    ///
    /// # Errors
    /// Why it is lost.
    pub fn send(&self, frame: Frame<'_>) -> Result<(), DropReason> {
        self.send_with(frame, None)
    }

    /// Sends a frame from another guest's memory, whose queue is locked: a queue from a guest first, then
    /// one to a guest, so that no two wait for each other.
    ///
    /// # Errors
    /// Why it is lost.
    pub fn send_remote(&self, frame: &RemoteFrame<'_>) -> Result<(), DropReason> {
        self.send_with(frame.head, Some(frame.rest))
    }

    fn send_with(&self, frame: Frame<'_>, rest: Option<Remote<'_>>) -> Result<(), DropReason> {
        let open = self.open.load(Relaxed);
        let pair = match open.count_ones() {
            0 => return Err(DropReason::Unconnected),
            1 => open.trailing_zeros(),
            count => nth_bit(open, flow_hash(frame.bytes) % count),
        };
        let index = 2 * pair as usize;
        let mut queue = self.queue(index);
        let sent = queue.send(frame, rest, &self.backlog, &self.name);
        // Before a flush can ask for the kick that whoever reads the port looks at `waiting` after.
        if sent.is_err() || queue.has_waiting() {
            self.note(index, &queue);
        }
        sent
    }

    /// Ends a batch.
    pub fn flush(&self) {
        self.flush_queues(self.open.load(Relaxed));
    }

    fn flush_queues(&self, mut pairs: u32) {
        while pairs != 0 {
            let pair = pairs.trailing_zeros();
            pairs &= pairs - 1;
            let index = 2 * pair as usize;
            let mut queue = self.queue(index);
            if queue.flush(&self.backlog, &self.name) == Refill::Again {
                self.ring_again();
            }
            self.note(index, &queue);
        }
    }

    /// Reads frames of all queues into `batch`.
    ///
    /// What wakes the worker: at any time, either an event of `epoll` has not been taken, or every queue
    /// was seen empty after its driver had been asked to kick.
    pub fn recv(
        &self,
        batch: &mut Batch,
        counters: &PortCounters,
        shortcut: &mut dyn Shortcut,
    ) -> More {
        let mut budget = Budget::default();
        self.flush_queues(self.waiting.load(Relaxed));
        if self.drain(batch, &mut budget, counters, shortcut) {
            return More::Yes;
        }
        self.take_events();
        // Once more, for whoever kicked between the look and the taking.
        self.flush_queues(self.waiting.load(Relaxed));
        if self.drain(batch, &mut budget, counters, shortcut) {
            self.ring_again();
            return More::Yes;
        }
        More::No
    }

    /// Reads every queue until it is empty and its driver asked to kick; whether there may be more.
    fn drain(
        &self,
        batch: &mut Batch,
        budget: &mut Budget,
        counters: &PortCounters,
        shortcut: &mut dyn Shortcut,
    ) -> bool {
        let mut more = false;
        let first = self.first.load(Relaxed);
        // Bit `i` is pair `first + i`.
        let mut served = self.served.load(Relaxed).rotate_right(first);
        while served != 0 {
            if budget.is_spent() {
                return true;
            }
            let pair = (first + served.trailing_zeros()) % u32::BITS;
            served &= served - 1;
            let index = 2 * pair as usize + 1;
            let mut queue = self.queue(index);
            if !queue.is_served() {
                continue;
            }
            let drained = queue.drain(batch, budget, counters, shortcut);
            let read = drained.and_then(|full| {
                queue.show()?;
                Ok(full || queue.ring.enable_kick()?)
            });
            match read {
                Ok(false) => {}
                Ok(true) => {
                    if !more {
                        self.first.store((pair + 1) % u32::BITS, Relaxed);
                    }
                    more = true;
                }
                Err(why) => {
                    queue.give_up(why, &self.backlog, &self.name);
                    self.note(index, &queue);
                }
            }
        }
        more
    }

    fn take_events(&self) {
        let mut events = [const { MaybeUninit::<epoll::Event>::uninit() }; EVENTS_MAX];
        let now = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        // Of a signal: the events stay, and wake the worker once more.
        let _ = epoll::wait(&self.epoll, &mut events, Some(&now));
    }

    // The control thread's side.

    /// Changes a queue, and has the worker look at it.
    ///
    /// # Errors
    /// Of `change`, or what the queue found wrong with it; the queue is not served then.
    pub fn change<T>(
        &self,
        index: usize,
        change: impl FnOnce(&mut Queue) -> Result<T, SetupError>,
    ) -> Result<T, SetupError> {
        if index >= QUEUES_MAX {
            return Err(SetupError::NoQueue(index));
        }
        let mut queue = self.queue(index);
        let changed = change(&mut queue).and_then(|value| {
            queue.start()?;
            Ok(value)
        });
        self.note(index, &queue);
        drop(queue);
        self.ring_again();
        changed
    }

    /// Exchanges what a queue is kicked by.
    ///
    /// # Errors
    /// It can't be waited on.
    pub fn set_kick(&self, index: usize, kick: OwnedFd) -> Result<(), SetupError> {
        self.change(index, |queue| {
            self.unwatch(queue);
            self.watch(&kick)?;
            queue.kick = Some(kick);
            Ok(())
        })
    }

    fn unwatch(&self, queue: &mut Queue) {
        // Its front-end has copies: closing ours alone does not end the watch.
        if let Some(kick) = queue.kick.take() {
            let _ = epoll::delete(&self.epoll, &kick);
        }
    }

    /// Stops a queue; where it would have gone on.
    ///
    /// # Errors
    /// There is no such queue.
    pub fn stop(&self, index: usize) -> Result<u16, SetupError> {
        self.change(index, |queue| {
            self.unwatch(queue);
            queue.stop(&self.backlog);
            Ok(queue.ring.next_avail())
        })
    }

    /// Puts other memory under all queues.
    ///
    /// # Errors
    /// A queue's rings are not in it; the others have it.
    pub fn set_memory(&self, memory: &Arc<Memory>) -> Result<(), SetupError> {
        let mut result = Ok(());
        for index in 0..QUEUES_MAX {
            let mut swapped = Arc::clone(memory);
            let set = self.change(index, |queue| Ok(queue.ring.set_memory(&mut swapped)?));
            result = result.and(set);
            // The last user of the old memory unmaps it, here and without a lock.
            drop(swapped);
        }
        result
    }

    /// Puts in force what front-end and guest agreed on.
    pub fn set_terms(&self, terms: Terms) {
        let bit = |is_set, bit| if is_set { bit } else { 0 };
        let Caps { csum, tso, uso } = terms.caps;
        let caps = bit(csum, CAP_CSUM) | bit(tso, CAP_TSO) | bit(uso, CAP_USO);
        self.caps.store(caps, Relaxed);
        for index in 0..QUEUES_MAX {
            self.queue(index).set_terms(terms);
        }
    }

    /// Back to a port without a front-end.
    pub fn reset(&self) {
        for index in 0..QUEUES_MAX {
            let _ = self.stop(index);
            let _ = self.change(index, |queue| {
                queue.call = None;
                queue.enabled = false;
                queue.ring.forget();
                Ok(())
            });
        }
        let _ = self.set_memory(&Arc::default());
        self.set_terms(Terms::default());
    }

    /// Brings what is known about a queue without its lock up to date.
    fn note(&self, index: usize, queue: &Queue) {
        let bit = 1 << (index / 2);
        let set = |bits: &AtomicU32, is_set: bool| {
            // Read first: the common case must not write a cache line that other workers share.
            if (bits.load(Relaxed) & bit != 0) != is_set {
                match is_set {
                    true => bits.fetch_or(bit, Relaxed),
                    false => bits.fetch_and(!bit, Relaxed),
                };
            }
        };
        if index.is_multiple_of(2) {
            set(&self.open, queue.is_open());
            set(&self.waiting, queue.has_waiting());
        } else {
            set(&self.served, queue.is_served());
        }
    }
}

/// The `n`th bit that is set.
fn nth_bit(mut bits: u32, n: u32) -> u32 {
    for _ in 0..n {
        bits &= bits - 1;
    }
    bits.trailing_zeros()
}

/// Spreads flows over queues; frames of one flow get the same number. What IP addresses and ports there
/// are lie, without VLAN tags, in the 28 bytes from byte 26 on (IPv4) or the 36 from byte 22 (IPv6).
fn flow_hash(frame: &[u8]) -> u32 {
    let ranges = match frame.get(12..14) {
        Some([0x08, 0x00]) => [26..34, 34..38],
        Some([0x86, 0xdd]) => [22..54, 54..58],
        _ => [0..12, 0..0],
    };
    // Fragments after the first have no ports: those of one datagram stay together by their addresses.
    let is_fragment = frame.get(12..14) == Some(&[0x08, 0x00])
        && frame
            .get(20..22)
            .is_some_and(|field| field[0] & 0x3f != 0 || field[1] != 0);
    let [addresses, ports] = ranges;
    let ports = if is_fragment { 0..0 } else { ports };
    let mut hash = 0u32;
    for range in [addresses, ports] {
        for word in frame.get(range).unwrap_or_default().chunks_exact(4) {
            let word = u32::from_ne_bytes([word[0], word[1], word[2], word[3]]);
            // The golden ratio's multiplier (Knuth, TAOCP 6.4).
            hash = (hash.rotate_left(5) ^ word).wrapping_mul(0x9e37_79b9);
        }
    }
    hash >> 16
}
