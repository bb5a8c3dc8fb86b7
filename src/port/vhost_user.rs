//! vhost-user: guests whose memory we share (virtio 1.2; docs/interop/vhost-user.rst of QEMU).
//!
//! ```text
//!  VMM or DPDK (front-end) --unix socket--> control thread: features, memory, rings
//!        |  shared memory: rings, buffers        |  Device: a lock per queue
//!        |  eventfds: kick, call                 v
//!        +------------------------------> worker: recv, send, flush
//! ```
//! The port listens; a front-end connects, says where its guest's memory and rings are, and may come and
//! go: the port stays, and drops what is for it meanwhile. The worker serves the rings itself: it waits on
//! an epoll of the port's own, which the kick descriptors of whatever front-end there is are in.
//!
//! # A frame's way
//! From the guest: its chain is checked and copied into the batch, then given back; a large frame for
//! another vhost-user port that takes it as it is ([`Shortcut`]) is copied straight into that guest's
//! buffers, but for its headers, which are looked at in between. To the guest: a frame is
//! copied into as many chains as it needs, behind a header that says how many; they are shown, and the
//! guest called, once per batch ([`PortTx::flush`]). Where the guest has too few buffers the frame waits,
//! as it would in a tap's queue, until the guest has made some available; if the guest goes before, or has
//! made too small ones available, the frame counts as [`Abandoned`](DropReason::Abandoned).
//!
//! # Limits
//! [`memory::REGIONS_MAX`], [`memory::MEMORY_BYTES_MAX`], [`device::QUEUE_PAIRS_MAX`],
//! [`ring::QUEUE_SIZE_MAX`], [`ring::CHAIN_DESCRIPTORS_MAX`], [`queue::BACKLOG_BYTES_MAX`] and
//! [`queue::BACKLOG_FRAMES_MAX`]: above the last two a frame counts as
//! [`EgressFull`](DropReason::EgressFull).
//!
//! # What a hostile guest or front-end can try
//! - Descriptors, indices, lengths and addresses that are wrong, or change while we look: see [`ring`].
//!   Its queue is given up, nobody else's.
//! - Never to give buffers: its frames wait up to the limit, then drop. Nobody waits for it.
//! - To stop in the middle of a message: the control thread is this port's alone.
//! - Descriptors that block: kicks are never read; calls must be eventfds, and are signalled as the kernel
//!   does it, which never waits ([`crate::sys::eventfd`]).
//! - Memory that goes away, or was never there: see [`memory`] and [`allowance`].

pub mod allowance;
pub mod device;
mod front_end;
pub mod memory;
pub mod queue;
pub mod ring;
mod server;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use self::device::Device;
pub use self::queue::RemoteFrame;
pub use self::server::Server;
use super::{More, PortRx, PortTx, Shortcut};
use crate::frame::{Batch, Frame};
use crate::offload::Caps;
use crate::stats::{DropReason, PortCounters};
use crate::sys::eventfd;

/// Open files of a port at most: its socket, epoll and two bells, and its front-end's.
pub const FILES_MAX: usize = 4 + device::FRONT_END_FILES_MAX;

/// A port and what serves its socket.
#[derive(Debug)]
pub struct VhostUser {
    /// Receive half.
    pub rx: VhostRx,
    /// Send half.
    pub tx: VhostTx,
    /// Takes front-ends while it lives.
    pub server: Server,
}

/// Makes a port from a listening Unix stream socket. `name` is what the log calls it, and `counters` are
/// those that its frames are counted in.
///
/// # Errors
/// The kernel gives no epoll, eventfd or thread.
pub fn open(
    listener: OwnedFd,
    allow_guests: bool,
    name: String,
    counters: Arc<PortCounters>,
) -> io::Result<VhostUser> {
    if let Err(error) = eventfd::prepare() {
        log::warn!(
            "{name}: without asynchronous I/O ({error}) a vhost-user front-end that means harm can hold a worker \
             up: raise fs.aio-max-nr, or use a kernel with CONFIG_AIO"
        );
    }
    let device = Arc::new(Device::new(name, counters)?);
    Ok(VhostUser {
        rx: VhostRx(Arc::clone(&device)),
        tx: VhostTx(Arc::clone(&device)),
        server: Server::start(listener, allow_guests, device)?,
    })
}

/// Receive half.
#[derive(Debug)]
pub struct VhostRx(Arc<Device>);

impl PortRx for VhostRx {
    fn fd(&self) -> BorrowedFd<'_> {
        self.0.epoll().as_fd()
    }

    fn recv(&mut self, batch: &mut Batch, counters: &PortCounters) -> io::Result<More> {
        self.recv_with(batch, counters, &mut NoShortcut)
    }

    fn recv_with(
        &mut self,
        batch: &mut Batch,
        counters: &PortCounters,
        shortcut: &mut dyn Shortcut,
    ) -> io::Result<More> {
        Ok(self.0.recv(batch, counters, shortcut))
    }
}

/// A bell, as kicks and calls are.
///
/// # Errors
/// The kernel gives none.
pub fn eventfd() -> io::Result<OwnedFd> {
    use rustix::event::EventfdFlags;
    Ok(rustix::event::eventfd(
        0,
        EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK,
    )?)
}

/// All frames go by the batch.
pub struct NoShortcut;

impl Shortcut for NoShortcut {
    fn leads(&self, _: &[u8]) -> bool {
        false
    }

    fn send(&mut self, _: &RemoteFrame<'_>) -> bool {
        false
    }
}

/// Send half.
#[derive(Debug)]
pub struct VhostTx(Arc<Device>);

impl PortTx for VhostTx {
    fn caps(&self) -> Caps {
        self.0.caps()
    }

    fn send(&self, frame: Frame<'_>) -> Result<(), DropReason> {
        self.0.send(frame)
    }

    fn send_remote(&self, frame: &RemoteFrame<'_>) -> Option<Result<(), DropReason>> {
        Some(self.0.send_remote(frame))
    }

    fn is_batched(&self) -> bool {
        true
    }

    fn files_to_come(&self) -> usize {
        device::FRONT_END_FILES_MAX
    }

    fn flush(&self) {
        self.0.flush();
    }

    fn is_up(&self) -> bool {
        self.0.is_open()
    }
}

#[cfg(test)]
mod tests;
