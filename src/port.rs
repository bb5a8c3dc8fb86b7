//! Ports: the I/O edge of the switch, split into a receive half owned by one worker and a send half
//! that any worker may use.
//!
//! | kind | module | the guest's side |
//! |---|---|---|
//! | tap with virtio-net header | [`tap`] | a VMM through the wire of [`crate::tap`], or a namespace's `eth0` |
//! | packet socket | [`packet`] | the `vm` tap where the kernel can't do the wire |
//! | plain tap | [`plain`] | any netdev user; no offloads |
//! | vhost-user | [`vhost_user`] | a VMM or DPDK that shares its guest's memory |

pub mod packet;
pub mod plain;
pub mod tap;
pub mod vhost_user;

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use self::vhost_user::RemoteFrame;
use crate::frame::{Batch, Frame};
use crate::offload::Caps;
use crate::stats::{DropReason, PortCounters};

/// Whether a port may have more frames waiting.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum More {
    /// The batch filled up first: read again.
    Yes,
    /// The port is drained; epoll tells when to come back.
    No,
}

/// The receive half of a port.
pub trait PortRx: Send {
    /// What to wait on for readability (level-triggered).
    fn fd(&self) -> BorrowedFd<'_>;

    /// Reads admitted frames into `batch` until it is full or the port is drained. Frames that
    /// [`crate::offload::admit`] refuses are counted in `counters` and skipped.
    ///
    /// # Errors
    /// The port is gone for good (its device was deleted).
    fn recv(&mut self, batch: &mut Batch, counters: &PortCounters) -> io::Result<More>;

    /// [`PortRx::recv`], but frames that lie in a guest's memory may leave by `shortcut`: only while
    /// `batch` is empty, so that order holds.
    ///
    /// # Errors
    /// Those of [`PortRx::recv`].
    fn recv_with(
        &mut self,
        batch: &mut Batch,
        counters: &PortCounters,
        _shortcut: &mut dyn Shortcut,
    ) -> io::Result<More> {
        self.recv(batch, counters)
    }
}

/// The way from one guest's memory to another's, by one copy.
pub trait Shortcut {
    /// Whether a frame that begins with `head` is likely to be taken.
    fn leads(&self, head: &[u8]) -> bool;

    /// Decides about a frame and sends it, if it is for one port that takes it as it is and from where
    /// it is; `false`: it goes by the batch.
    fn send(&mut self, frame: &RemoteFrame<'_>) -> bool;
}

/// The send half of a port.
pub trait PortTx: Send + Sync {
    /// What the port takes undone.
    fn caps(&self) -> Caps;

    /// Sends one frame that already fits [`PortTx::caps`]. Never blocks.
    ///
    /// # Errors
    /// The reason to count; the frame is lost.
    fn send(&self, frame: Frame<'_>) -> Result<(), DropReason>;

    /// Sends a frame that lies in another guest's memory; `None`: this port can't.
    fn send_remote(&self, _frame: &RemoteFrame<'_>) -> Option<Result<(), DropReason>> {
        None
    }

    /// Whether what was sent reaches the guest with [`PortTx::flush`] only.
    fn is_batched(&self) -> bool {
        false
    }

    /// Open files that the port may have besides those that it has from the start, whether it has them yet or
    /// not: guests' host sockets leave them alone.
    fn files_to_come(&self) -> usize {
        0
    }

    /// Ends a batch of [`PortTx::send`]. Never blocks.
    fn flush(&self) {}

    /// Whether somebody is there to take a frame: floods leave out who is not. Guests come up later than
    /// their ports, and what was said before is not missed.
    fn is_up(&self) -> bool {
        true
    }
}

/// Whether the netdev of a tap is up, as far as it is known. That it is not is looked at again whenever it
/// matters; that it is, until a frame is refused.
#[derive(Debug, Default)]
struct TapLink {
    is_known_up: AtomicBool,
}

impl TapLink {
    /// Looks, unless it is known to be up: a tap can be written to while it is (drivers/net/tun.c,
    /// tun_sock_writeable).
    fn is_up(&self, fd: BorrowedFd<'_>) -> bool {
        if self.is_known_up.load(Relaxed) {
            return true;
        }
        let mut fds = [PollFd::from_borrowed_fd(fd, PollFlags::OUT)];
        let now = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        let is_up = poll(&mut fds, Some(&now)).is_ok() && fds[0].revents().contains(PollFlags::OUT);
        self.is_known_up.store(is_up, Relaxed);
        is_up
    }

    /// The reason to count a frame for that the kernel refused.
    fn refusal(&self, error: Errno) -> DropReason {
        let reason = refusal(error);
        if reason == DropReason::LinkDown {
            self.is_known_up.store(false, Relaxed);
        }
        reason
    }
}

/// Frames that the kernel dropped between a guest and its port.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct KernelDrops {
    /// From the guest: it sent faster than the port was read.
    pub rx: u64,
    /// To the guest: it read slower than the port sent, or the kernel refused the frame.
    pub tx: u64,
}

/// Where the kernel's drops of a port can be read, for `lanlet status`. Not for the packet path.
pub trait DropSource: Send + Sync {
    /// The drops since the port was made.
    ///
    /// # Errors
    /// The device is gone.
    fn kernel_drops(&self) -> io::Result<KernelDrops>;
}

/// The reason to count when the kernel refused a frame.
fn refusal(error: Errno) -> DropReason {
    match error {
        Errno::AGAIN | Errno::NOBUFS | Errno::NOMEM => DropReason::EgressFull,
        Errno::MSGSIZE => DropReason::EgressTooBig,
        Errno::IO | Errno::NETDOWN => DropReason::LinkDown,
        // EBADFD, ENXIO: the device is gone, which the receive half reports.
        _ => DropReason::EgressError,
    }
}
