//! The workers of a network, as other threads and they themselves address them.
//!
//! # Frames between workers
//! A guest's frames for the gateway are for the NAT of its port's home. A tap with several queues hands
//! some of them to other workers: those post them here. It is the exception: when the home answers a
//! flow by its own queue, the kernel sends the rest of that flow there (drivers/net/tun.c,
//! tun_flow_update), and a port with one queue is read by its home unless the load was re-spread.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicI32, AtomicU8, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, PoisonError};

use crossbeam_channel::{Receiver, Sender, TryRecvError};
use rustix::event::{EventfdFlags, eventfd};

use super::command::{Command, Readers};
use crate::config::WORKERS_MAX;
use crate::frame::{Duration, FRAME_BUFFER_LEN, Frame, PortId, WorkerId};
use crate::nat::common::Homes;
use crate::offload::Offload;
use crate::stats::{DropReason, PortCounters};
use crate::switch::PORTS_MAX;

/// Frames that wait for one worker. Their memory is used only where frames are posted.
const POSTED_MAX: usize = 128;
/// Of one port: a batch. Two ports that send as much as they can leave their neighbours half.
const POSTED_PER_PORT_MAX: u8 = 32;
const _: () = assert!(4 * POSTED_PER_PORT_MAX as usize <= POSTED_MAX);

/// The side of a worker that others hold.
#[derive(Clone)]
pub struct WorkerHandle {
    commands: Sender<Command>,
    wake: Arc<OwnedFd>,
    posted: Sender<Parcel>,
    spare: Receiver<Box<[u8]>>,
    /// How many wait, by their port.
    waiting: Arc<[AtomicU8]>,
    thread: Arc<Thread>,
}

/// What others see of a worker's thread.
#[derive(Default)]
pub(super) struct Thread {
    number: AtomicI32,
    looked_micros: AtomicU64,
}

impl Thread {
    /// Says that the calling thread is the worker's.
    pub(super) fn begin(&self) {
        let number = rustix::thread::gettid().as_raw_nonzero().get();
        self.number.store(number, Relaxed);
    }

    /// Adds what was spent on looking for traffic instead of sleeping.
    pub(super) fn add_looked(&self, looked: Duration) {
        self.looked_micros.fetch_add(looked.total_micros(), Relaxed);
    }
}

impl WorkerHandle {
    /// Sends a command; `false` if the worker has ended.
    pub fn send(&self, command: Command) -> bool {
        let sent = self.commands.send(command).is_ok();
        self.wake();
        sent
    }

    /// Has the worker look at what waits for it.
    pub fn wake(&self) {
        // Failure means that the counter is at its maximum: the worker is awake anyway.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }

    /// The worker's thread as the kernel numbers it; 0: it does not run.
    pub fn thread(&self) -> i32 {
        self.thread.number.load(Relaxed)
    }

    /// What it has spent on looking for traffic instead of sleeping, microseconds.
    pub fn looked_micros(&self) -> u64 {
        self.thread.looked_micros.load(Relaxed)
    }

    /// Leaves a frame of `ingress` for the worker's gateway. It is to be woken after the batch.
    ///
    /// # Errors
    /// [`DropReason::HomeBusy`]: it is that far behind, or the port has its share of what waits.
    pub(super) fn post(
        &self,
        ingress: PortId,
        counters: Arc<PortCounters>,
        frame: Frame<'_>,
    ) -> Result<(), DropReason> {
        let waiting = self.waiting.get(usize::from(ingress.0));
        let waiting = waiting.ok_or(DropReason::NoPort)?;
        if waiting.load(Relaxed) >= POSTED_PER_PORT_MAX {
            return Err(DropReason::HomeBusy);
        }
        let mut buffer = self.spare.try_recv().map_err(|_| DropReason::HomeBusy)?;
        // Other readers of the port may have passed the look above too: a few more, of 16 at most.
        waiting.fetch_add(1, Relaxed);
        let len = frame.bytes.len();
        buffer[..len].copy_from_slice(frame.bytes);
        let parcel = Parcel {
            ingress,
            counters,
            len,
            offload: frame.offload,
            buffer,
        };
        self.posted
            .try_send(parcel)
            .map_err(|_| DropReason::HomeBusy)
    }
}

/// A frame for another worker's gateway.
struct Parcel {
    ingress: PortId,
    /// The port's: what tells it from another that has its number since.
    counters: Arc<PortCounters>,
    len: usize,
    offload: Offload,
    buffer: Box<[u8]>,
}

/// A worker's own side of its [`WorkerHandle`].
pub struct Seat {
    worker: WorkerId,
    pub(super) commands: Receiver<Command>,
    pub(super) wake: Arc<OwnedFd>,
    pub(super) thread: Arc<Thread>,
    posted: Receiver<Parcel>,
    spare: Sender<Box<[u8]>>,
    waiting: Arc<[AtomicU8]>,
}

impl Seat {
    /// Whose seat it is.
    pub fn id(&self) -> WorkerId {
        self.worker
    }

    /// Hands the frames that others left to `sink`, as many as fit in the mailbox at most.
    pub(super) fn take_posted(&self, sink: &mut dyn FnMut(PortId, &Arc<PortCounters>, Frame<'_>)) {
        for _ in 0..POSTED_MAX {
            let parcel = match self.posted.try_recv() {
                Ok(parcel) => parcel,
                Err(TryRecvError::Empty | TryRecvError::Disconnected) => return,
            };
            if let Some(waiting) = self.waiting.get(usize::from(parcel.ingress.0)) {
                waiting.fetch_sub(1, Relaxed);
            }
            let frame = Frame {
                bytes: &parcel.buffer[..parcel.len],
                offload: parcel.offload,
            };
            sink(parcel.ingress, &parcel.counters, frame);
            // There is room: all buffers together are as many as the channel holds.
            let _ = self.spare.try_send(parcel.buffer);
        }
    }
}

/// All workers of a network, and where its ports are at home.
#[derive(Clone)]
pub struct Crew {
    members: Arc<[WorkerHandle]>,
    homes: Arc<Homes>,
}

impl Crew {
    /// Seats for `count` workers.
    ///
    /// # Errors
    /// The kernel gives no eventfd.
    pub fn new(count: usize) -> io::Result<(Self, Vec<Seat>)> {
        let count = count.clamp(1, WORKERS_MAX);
        let mut members = Vec::with_capacity(count);
        let mut seats = Vec::with_capacity(count);
        for number in 0..count {
            let wake = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
            let (commands, queue) = crossbeam_channel::unbounded();
            let (post, posted) = crossbeam_channel::bounded(POSTED_MAX);
            let (give_back, spare) = crossbeam_channel::bounded(POSTED_MAX);
            // One worker alone posts nothing.
            let buffers = if count > 1 { POSTED_MAX } else { 0 };
            for _ in 0..buffers {
                let _ = give_back.try_send(vec![0; FRAME_BUFFER_LEN].into_boxed_slice());
            }
            let thread = Arc::<Thread>::default();
            let waiting: Arc<[AtomicU8]> = (0..PORTS_MAX).map(|_| AtomicU8::new(0)).collect();
            members.push(WorkerHandle {
                commands,
                wake: Arc::clone(&wake),
                posted: post,
                spare,
                waiting: Arc::clone(&waiting),
                thread: Arc::clone(&thread),
            });
            seats.push(Seat {
                worker: WorkerId(number as u8),
                commands: queue,
                wake,
                thread,
                posted,
                spare: give_back,
                waiting,
            });
        }
        let crew = Self {
            members: members.into(),
            homes: Arc::default(),
        };
        Ok((crew, seats))
    }

    /// The workers, by their numbers.
    pub fn members(&self) -> &[WorkerHandle] {
        &self.members
    }

    /// One worker.
    ///
    /// # Panics
    /// There is none of that number.
    pub fn member(&self, worker: WorkerId) -> &WorkerHandle {
        &self.members[usize::from(worker.0)]
    }

    /// The worker that has the flows of a port's guests.
    pub fn home(&self, port: PortId) -> &WorkerHandle {
        self.member(self.homes.of(port))
    }

    /// Where the ports are at home.
    pub fn homes(&self) -> &Arc<Homes> {
        &self.homes
    }

    /// Sends each worker what `command` makes for it; `false` if one of them has ended.
    pub fn tell_all(&self, mut command: impl FnMut(WorkerId) -> Command) -> bool {
        let mut all = true;
        for (number, member) in self.members.iter().enumerate() {
            all &= member.send(command(WorkerId(number as u8)));
        }
        all
    }

    /// Hands the queues of a port to their readers, if all others that were told of the port have done this:
    /// no worker meets an answer to a frame of a port that it does not know yet.
    pub fn hand_out(&self, readers: Readers) {
        let Some(readers) = Arc::into_inner(readers) else {
            return;
        };
        let readers = readers.into_inner();
        for (worker, reception) in readers.unwrap_or_else(PoisonError::into_inner) {
            self.member(worker).send(Command::Receive(reception));
        }
    }

    /// The others: all but `worker`.
    pub(super) fn others(&self, worker: WorkerId) -> impl Iterator<Item = &WorkerHandle> {
        let own = usize::from(worker.0);
        let numbered = self.members.iter().enumerate();
        numbered
            .filter(move |&(number, _)| number != own)
            .map(|(_, member)| member)
    }
}
