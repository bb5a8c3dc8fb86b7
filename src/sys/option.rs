//! Socket options that no safe wrapper exists for.
#![allow(unsafe_code)]

use std::io;
use std::mem::{MaybeUninit, size_of};
use std::os::fd::{AsRawFd, BorrowedFd};

/// A C structure of integers without padding: safe to pass to the kernel and to fill from it.
///
/// # Safety
/// Every bit pattern is a valid value, there is no padding, and no pointer is inside.
pub(crate) unsafe trait Plain: Copy {}

// SAFETY: integers, or structures of integers of one size.
unsafe impl Plain for libc::c_int {}
// SAFETY: as above, four times u32.
unsafe impl Plain for libc::tpacket_req {}
// SAFETY: as above, two times u32.
unsafe impl Plain for libc::tpacket_stats {}
// SAFETY: three fields of 32 bits.
unsafe impl Plain for libc::ucred {}

/// setsockopt(2).
///
/// # Errors
/// The kernel's.
pub(crate) fn set<T: Plain>(
    fd: BorrowedFd<'_>,
    level: libc::c_int,
    option: libc::c_int,
    value: T,
) -> io::Result<()> {
    let len = size_of::<T>() as libc::socklen_t;
    // SAFETY: the kernel reads `len` bytes of `value`, which is alive, has that size and no padding.
    let result = unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            level,
            option,
            (&raw const value).cast(),
            len,
        )
    };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// getsockopt(2) of an option whose value has exactly the size of `T`.
///
/// # Errors
/// The kernel's; `InvalidData` when it gave fewer bytes.
pub(crate) fn get<T: Plain>(
    fd: BorrowedFd<'_>,
    level: libc::c_int,
    option: libc::c_int,
) -> io::Result<T> {
    let mut value = MaybeUninit::<T>::zeroed();
    let mut len = size_of::<T>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `len` bytes to `value`, which has that size.
    let result = unsafe {
        libc::getsockopt(
            fd.as_raw_fd(),
            level,
            option,
            value.as_mut_ptr().cast(),
            &mut len,
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    if len as usize != size_of::<T>() {
        return Err(io::ErrorKind::InvalidData.into());
    }
    // SAFETY: zeroed, then filled by the kernel; `Plain` has no invalid bit pattern.
    Ok(unsafe { value.assume_init() })
}
