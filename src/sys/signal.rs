//! Signals as something to poll: a mask and a signalfd.
//!
//! A signalfd tells who sent a signal, which a handler under tokio does not: one typed at the
//! terminal (SI_KERNEL) reached the whole foreground process group, one sent by a process reached
//! lanlet alone and has to be forwarded.
#![allow(unsafe_code)]

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// A set of signals, blocked in this thread and in all threads and processes it makes from then on.
pub struct SignalFd {
    fd: OwnedFd,
}

/// One signal that arrived.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Received {
    /// Its number.
    pub signal: i32,
    /// Whether the kernel made it, as for Ctrl-C at the terminal: then the whole process group has
    /// it.
    pub from_kernel: bool,
}

fn set_of(signals: &[i32]) -> libc::sigset_t {
    let mut set = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: sigemptyset initialises the whole set it is given; it is valid for writes.
    unsafe { libc::sigemptyset(set.as_mut_ptr()) };
    for &signal in signals {
        // SAFETY: the set was initialised above; an unknown signal is refused with EINVAL and
        // leaves it as it was.
        unsafe { libc::sigaddset(set.as_mut_ptr(), signal) };
    }
    // SAFETY: initialised by sigemptyset.
    unsafe { set.assume_init() }
}

fn mask(how: i32, signals: &[i32]) -> io::Result<()> {
    let set = set_of(signals);
    // SAFETY: `set` is initialised and outlives the call; a null old set is allowed.
    let error = unsafe { libc::pthread_sigmask(how, &set, std::ptr::null_mut()) };
    if error != 0 {
        return Err(io::Error::from_raw_os_error(error));
    }
    Ok(())
}

/// Holds the signals back in this thread and in all threads and processes it makes from then on.
///
/// # Errors
/// Of `pthread_sigmask`.
pub fn block(signals: &[i32]) -> io::Result<()> {
    mask(libc::SIG_BLOCK, signals)
}

/// Lets the signals through again: for a process about to become somebody else's program.
///
/// # Errors
/// Of `pthread_sigmask`.
pub fn unblock(signals: &[i32]) -> io::Result<()> {
    mask(libc::SIG_UNBLOCK, signals)
}

impl SignalFd {
    /// Blocks `signals` and makes the descriptor they can be read from. Call it before the first
    /// thread is started, so that no thread takes one by its default action.
    ///
    /// # Errors
    /// Of `pthread_sigmask` and `signalfd`.
    pub fn block(signals: &[i32]) -> io::Result<Self> {
        block(signals)?;
        let set = set_of(signals);
        // SAFETY: `set` is initialised and outlives the call; -1 asks for a new descriptor.
        let fd = unsafe { libc::signalfd(-1, &set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: a descriptor that the kernel just made and nobody else owns.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        Ok(Self { fd })
    }

    /// The next signal, `None` if none is waiting.
    ///
    /// # Errors
    /// Of `read`.
    pub fn next(&self) -> io::Result<Option<Received>> {
        let mut info = MaybeUninit::<libc::signalfd_siginfo>::zeroed();
        let size = size_of::<libc::signalfd_siginfo>();
        // SAFETY: the buffer is `size` bytes, valid for writes, and the kernel writes whole records.
        let read = unsafe { libc::read(self.fd.as_raw_fd(), info.as_mut_ptr().cast(), size) };
        if read < 0 {
            let error = io::Error::last_os_error();
            return match error.kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(None),
                _ => Err(error),
            };
        }
        if read as usize != size {
            return Ok(None);
        }
        // SAFETY: zeroed before, all integers, and fully written by the read.
        let info = unsafe { info.assume_init() };
        Ok(Some(Received {
            signal: info.ssi_signo as i32,
            from_kernel: info.ssi_code == SI_KERNEL,
        }))
    }
}

/// include/uapi/asm-generic/siginfo.h: "sent by the kernel from somewhere", which is what the tty
/// layer does for Ctrl-C and Ctrl-\.
const SI_KERNEL: i32 = 0x80;

impl AsFd for SignalFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// SIGURG is ignored by default, so that a stray one does not end the test process.
    #[test]
    fn a_blocked_signal_is_read_and_says_it_came_from_a_process() {
        let signals = SignalFd::block(&[libc::SIGURG]).unwrap();
        assert_eq!(signals.next().unwrap(), None);
        // SAFETY: raises a signal in this thread, which has it blocked.
        unsafe { libc::raise(libc::SIGURG) };
        let received = signals.next().unwrap().unwrap();
        assert_eq!(
            received,
            Received {
                signal: libc::SIGURG,
                from_kernel: false
            }
        );
        assert_eq!(signals.next().unwrap(), None);
        unblock(&[libc::SIGURG]).unwrap();
    }
}
