//! Descriptors that a parent process left open for this one.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use rustix::io::FdFlags;

/// First descriptor that is not standard input, output or error.
const FIRST: i32 = 3;

static TAKEN: AtomicBool = AtomicBool::new(false);

/// Takes over the descriptor that the parent process announced by its number, and keeps it from
/// programs executed later. Once per process, before anything else opens descriptors.
///
/// # Errors
/// There is none of this number, or one was taken already.
pub fn take(number: i32) -> io::Result<OwnedFd> {
    if number < FIRST || TAKEN.swap(true, Relaxed) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: F_GETFD reads one flag of a descriptor, or fails with EBADF.
    if unsafe { libc::fcntl(number, libc::F_GETFD) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it is open (above), it was inherited and so belongs to no object of this process, and
    // TAKEN keeps it from being handed out twice.
    let fd = unsafe { OwnedFd::from_raw_fd(number) };
    rustix::io::fcntl_setfd(&fd, FdFlags::CLOEXEC)?;
    Ok(fd)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn standard_and_closed_descriptors_are_refused() {
        assert!(take(0).is_err());
        assert!(take(1_000_000).is_err());
        assert!(take(3).is_err(), "one per process");
    }
}
