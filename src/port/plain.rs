//! Plain taps (`--no-offload`): bare frames, every checksum complete, at most one MTU each.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::io::Errno;

use super::{More, PortRx, PortTx, TapLink};
use crate::frame::{BATCH_FRAMES_MAX, Batch, Frame};
use crate::offload::{self, Caps, VNET_HEADER_LEN};
use crate::stats::{DropReason, PortCounters};
use crate::sys::late_close::LateClose;
use crate::sys::tun;
use crate::tap::TapError;

/// Makes the two halves of a port from the fd of a plain tap.
///
/// # Errors
/// [`TapError::NotATap`] when `fd` is not an IFF_TAP | IFF_NO_PI tap without virtio-net header.
pub fn open(fd: OwnedFd) -> Result<(PlainRx, PlainTx), TapError> {
    let info = tun::info(fd.as_fd()).map_err(TapError::not_a_tap)?;
    if !info.tap || !info.no_packet_info || info.vnet_header {
        let wanted = "IFF_TAP | IFF_NO_PI without IFF_VNET_HDR is needed";
        return Err(TapError::NotATap {
            cause: format!("{}: {wanted}", info.name),
        });
    }
    rustix::io::ioctl_fionbio(&fd, true)
        .map_err(|error| TapError::tap(&info.name, &error.into()))?;
    let fd = Arc::new(LateClose::new(fd));
    let link = TapLink::default();
    Ok((PlainRx { fd: fd.clone() }, PlainTx { fd, link }))
}

/// Receive half.
#[derive(Debug)]
pub struct PlainRx {
    fd: Arc<LateClose>,
}

impl PortRx for PlainRx {
    fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    fn recv(&mut self, batch: &mut Batch, counters: &PortCounters) -> io::Result<More> {
        for _ in 0..BATCH_FRAMES_MAX {
            let Some(buffer) = batch.next_buffer() else {
                break;
            };
            // An empty header makes the frame pass through the one place that checks frames.
            let (header, room) = buffer.split_at_mut(VNET_HEADER_LEN);
            header.fill(0);
            let len = match rustix::io::read(&self.fd, room) {
                Ok(len) => len,
                Err(Errno::AGAIN) => return Ok(More::No),
                Err(Errno::INTR) => continue,
                Err(error) => return Err(error.into()),
            };
            counters.rx(len);
            match offload::admit(&buffer[..VNET_HEADER_LEN + len]) {
                Ok(offload) => batch.commit(VNET_HEADER_LEN..VNET_HEADER_LEN + len, offload),
                Err(reason) => counters.count_drop(reason),
            }
        }
        Ok(More::Yes)
    }
}

/// Send half.
#[derive(Debug)]
pub struct PlainTx {
    fd: Arc<LateClose>,
    link: TapLink,
}

impl PortTx for PlainTx {
    fn caps(&self) -> Caps {
        Caps::default()
    }

    fn send(&self, frame: Frame<'_>) -> Result<(), DropReason> {
        match rustix::io::retry_on_intr(|| rustix::io::write(&self.fd, frame.bytes)) {
            Ok(_) => Ok(()),
            Err(error) => Err(self.link.refusal(error)),
        }
    }

    fn is_up(&self) -> bool {
        self.link.is_up(self.fd.as_fd())
    }
}
