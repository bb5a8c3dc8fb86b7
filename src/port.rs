//! Ports: the I/O edge of the switch, split into a receive half owned by one worker and a send half
//! that any worker may use.

use std::io;
use std::os::fd::BorrowedFd;

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
}
