//! Taps with a virtio-net header: super-frames and unfinished checksums pass as they are.
//!
//! The same code serves both ends the kernel knows: the switch's end of a VMM's wire and the tap
//! whose netdev is a namespace guest's `eth0`.

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::Relaxed};

use rustix::io::Errno;

use super::{More, PortRx, PortTx, TapLink};
use crate::frame::{BATCH_FRAMES_MAX, Batch, Frame};
use crate::offload::{self, Caps, Csum, Gso, VNET_HEADER_LEN};
use crate::stats::{DropReason, PortCounters};
use crate::sys::late_close::LateClose;
use crate::sys::tun;
use crate::tap::TapError;

/// Refusals of a capability, with no success between, before it is given up. One is not enough: a
/// guest could then slow its neighbours down with one frame that the kernel dislikes.
const REFUSALS_MAX: u32 = 16;

/// Makes the two halves of a port from a tap fd.
///
/// # Errors
/// [`TapError::NotATap`] when `fd` is not an IFF_TAP | IFF_NO_PI | IFF_VNET_HDR tap.
pub fn open(fd: OwnedFd) -> Result<(TapRx, TapTx), TapError> {
    let info = tun::info(fd.as_fd()).map_err(TapError::not_a_tap)?;
    if !(info.tap && info.no_packet_info && info.vnet_header) {
        let wanted = "IFF_TAP | IFF_NO_PI | IFF_VNET_HDR is needed";
        return Err(TapError::NotATap {
            cause: format!("{}: {wanted}", info.name),
        });
    }
    let prepare = || {
        tun::set_vnet_header_len(fd.as_fd(), VNET_HEADER_LEN)?;
        rustix::io::ioctl_fionbio(&fd, true)?;
        tun::enable_offloads(fd.as_fd())
    };
    let uso = prepare().map_err(|error| TapError::tap(&info.name, &error))?;
    let fd = Arc::new(LateClose::new(fd));
    let rx = TapRx { fd: fd.clone() };
    Ok((
        rx,
        TapTx {
            fd,
            link: TapLink::default(),
            caps: LiveCaps::new(
                Caps {
                    csum: true,
                    tso: true,
                    uso,
                },
                info.name,
            ),
        },
    ))
}

/// Receive half.
#[derive(Debug)]
pub struct TapRx {
    fd: Arc<LateClose>,
}

impl PortRx for TapRx {
    fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    fn recv(&mut self, batch: &mut Batch, counters: &PortCounters) -> io::Result<More> {
        // Refused frames count too: a guest that sends nothing else must not hold the worker.
        for _ in 0..BATCH_FRAMES_MAX {
            let Some(buffer) = batch.next_buffer() else {
                break;
            };
            let len = match rustix::io::read(&self.fd, &mut *buffer) {
                Ok(len) => len,
                Err(Errno::AGAIN) => return Ok(More::No),
                Err(Errno::INTR) => continue,
                Err(error) => return Err(error.into()),
            };
            let Some(raw) = buffer.get(..len) else {
                return Ok(More::No);
            };
            match offload::admit(raw) {
                Ok(offload) => {
                    counters.rx(len - VNET_HEADER_LEN);
                    batch.commit(VNET_HEADER_LEN..len, offload);
                }
                Err(reason) => {
                    counters.rx(len.saturating_sub(VNET_HEADER_LEN));
                    counters.count_drop(reason);
                }
            }
        }
        Ok(More::Yes)
    }
}

/// Send half.
#[derive(Debug)]
pub struct TapTx {
    fd: Arc<LateClose>,
    link: TapLink,
    caps: LiveCaps,
}

impl PortTx for TapTx {
    fn caps(&self) -> Caps {
        self.caps.get()
    }

    fn send(&self, frame: Frame<'_>) -> Result<(), DropReason> {
        let header = offload::encode(frame);
        let sent = send_with_header(self.fd.as_fd(), &header, frame, &self.caps);
        sent.map_err(|error| self.link.refusal(error))
    }

    fn is_up(&self) -> bool {
        self.link.is_up(self.fd.as_fd())
    }
}

/// Writes `header` and `frame` as one message and learns from the outcome.
pub(super) fn send_with_header(
    fd: BorrowedFd<'_>,
    header: &[u8],
    frame: Frame<'_>,
    caps: &LiveCaps,
) -> Result<(), Errno> {
    let parts = [IoSlice::new(header), IoSlice::new(frame.bytes)];
    match rustix::io::retry_on_intr(|| rustix::io::writev(fd, &parts)) {
        Ok(_) => {
            caps.accepted(frame);
            Ok(())
        }
        Err(error) => {
            if error == Errno::INVAL {
                caps.refused(frame);
            }
            Err(error)
        }
    }
}

/// What a port takes undone, and what it turned out not to take.
#[derive(Debug)]
pub(super) struct LiveCaps {
    csum: AtomicBool,
    tso: AtomicBool,
    uso: AtomicBool,
    /// Refusals since the last frame with work left that was accepted.
    refusals: AtomicU32,
    name: String,
}

impl LiveCaps {
    pub(super) fn new(caps: Caps, name: String) -> Self {
        Self {
            csum: AtomicBool::new(caps.csum),
            tso: AtomicBool::new(caps.tso),
            uso: AtomicBool::new(caps.uso),
            refusals: AtomicU32::new(0),
            name,
        }
    }

    pub(super) fn get(&self) -> Caps {
        Caps {
            csum: self.csum.load(Relaxed),
            tso: self.tso.load(Relaxed),
            uso: self.uso.load(Relaxed),
        }
    }

    /// The capability that `frame` needs.
    fn needed(&self, frame: Frame<'_>) -> Option<(&AtomicBool, &'static str)> {
        match (frame.offload.gso, frame.offload.csum) {
            (Gso::Udp(_), _) => Some((&self.uso, "UDP segmentation")),
            (Gso::Tcp4(_) | Gso::Tcp6(_), _) => Some((&self.tso, "TCP segmentation")),
            (Gso::None, Csum::Partial { .. }) => Some((&self.csum, "checksum")),
            (Gso::None, _) => None,
        }
    }

    fn accepted(&self, frame: Frame<'_>) {
        // Read first: the common case must not write a cache line that other workers share.
        if self.refusals.load(Relaxed) != 0 && self.needed(frame).is_some() {
            self.refusals.store(0, Relaxed);
        }
    }

    fn refused(&self, frame: Frame<'_>) {
        let Some((capability, what)) = self.needed(frame) else {
            return;
        };
        if self.refusals.fetch_add(1, Relaxed) + 1 < REFUSALS_MAX {
            return;
        }
        self.refusals.store(0, Relaxed);
        if capability.swap(false, Relaxed) {
            log::warn!(
                "{}: the kernel refuses {what} offload; done in software",
                self.name
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::offload::Offload;

    fn frame(gso: Gso) -> Frame<'static> {
        Frame {
            bytes: &[0; 60],
            offload: Offload {
                gso,
                ..Offload::default()
            },
        }
    }

    #[test]
    fn a_capability_goes_after_repeated_refusals_only() {
        let all = Caps {
            csum: true,
            tso: true,
            uso: true,
        };
        let caps = LiveCaps::new(all, "t".to_owned());
        for _ in 0..REFUSALS_MAX - 1 {
            caps.refused(frame(Gso::Udp(1000)));
        }
        caps.accepted(frame(Gso::None));
        caps.accepted(frame(Gso::Tcp4(1448)));
        for _ in 0..REFUSALS_MAX - 1 {
            caps.refused(frame(Gso::Udp(1000)));
        }
        assert_eq!(caps.get(), all);
        caps.refused(frame(Gso::Udp(1000)));
        assert_eq!(caps.get(), Caps { uso: false, ..all });
        caps.refused(frame(Gso::None));
        assert_eq!(caps.get(), Caps { uso: false, ..all });
    }

    #[test]
    fn what_is_no_tap_is_refused() {
        let (a, _b) = rustix::pipe::pipe().unwrap();
        assert!(matches!(open(a), Err(TapError::NotATap { .. })));
    }
}
