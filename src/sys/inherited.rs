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

/// Closes whatever the parent process left open besides standard input, output and error. Once per
/// process and in place of [`take`], before anything else opens descriptors.
///
/// # Errors
/// Descriptors were taken already; or /proc can't be read, on a kernel without close_range(2).
pub fn close_all() -> io::Result<()> {
    if TAKEN.swap(true, Relaxed) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: nothing was taken (above) and nothing of this process has opened a descriptor yet, so no
    // object owns one of these numbers.
    if unsafe { libc::close_range(FIRST as u32, u32::MAX, 0) } == 0 {
        return Ok(());
    }
    // Linux before 5.9, or a filter of system calls that does not know it.
    let numbers: Vec<i32> = std::fs::read_dir("/proc/self/fd")?
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter(|&number| number >= FIRST)
        .collect();
    for number in numbers {
        // SAFETY: as above; the directory's own descriptor is closed already, and EBADF does no harm.
        unsafe { libc::close(number) };
    }
    Ok(())
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
