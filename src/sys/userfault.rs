//! Shared memory whose missing pages are allocated for an account, not for whoever touches them
//! (userfaultfd(2)).
//!
//! A touch of a hole in a tmpfs file that is mapped shared, a read as much as a write, allocates a page
//! (mm/shmem.c, shmem_fault), and the process that touched it is charged for it: until the file is gone, for
//! nobody else. In a range that is watched here, such a touch is a SIGBUS (UFFD_FEATURE_SIGBUS), of
//! which [`super::bus_error`] asks [`Charge::fill`]. Pages that are there cost nothing, and a page that is
//! taken out later (FALLOC_FL_PUNCH_HOLE) is missing again.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Arc, OnceLock};

use rustix::ioctl::opcode;

/// include/uapi/linux/userfaultfd.h.
const UFFD_USER_MODE_ONLY: libc::c_int = 1;
const UFFD_API: u64 = 0xaa;
const FEATURE_MISSING_SHMEM: u64 = 1 << 5;
const FEATURE_SIGBUS: u64 = 1 << 7;
const MODE_MISSING: u64 = 1;

/// `struct uffdio_api`.
#[repr(C)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

/// `struct uffdio_register` and `struct uffdio_zeropage`: a range, how, and what came of it.
#[repr(C)]
struct Range {
    start: u64,
    len: u64,
    mode: u64,
    result: u64,
}

const UFFDIO_API: libc::Ioctl = opcode::read_write::<Api>(0xaa, 0x3f) as libc::Ioctl;
const UFFDIO_REGISTER: libc::Ioctl = opcode::read_write::<Range>(0xaa, 0x00) as libc::Ioctl;
const UFFDIO_ZEROPAGE: libc::Ioctl = opcode::read_write::<Range>(0xaa, 0x04) as libc::Ioctl;

/// The process's descriptor, or why it has none.
static USERFAULT: OnceLock<Result<OwnedFd, i32>> = OnceLock::new();

fn userfault() -> io::Result<&'static OwnedFd> {
    let opened =
        USERFAULT.get_or_init(|| open().map_err(|e| e.raw_os_error().unwrap_or(libc::EIO)));
    opened
        .as_ref()
        .map_err(|&code| io::Error::from_raw_os_error(code))
}

fn open() -> io::Result<OwnedFd> {
    let create = |flags: libc::c_int| {
        // SAFETY: the system call takes flags alone, and returns a descriptor that nobody else has.
        unsafe {
            match libc::syscall(libc::SYS_userfaultfd, flags) {
                fd if fd >= 0 => Ok(OwnedFd::from_raw_fd(fd as libc::c_int)),
                _ => Err(io::Error::last_os_error()),
            }
        }
    };
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    // Without the flag it is a privilege (vm.unprivileged_userfaultfd), but the only way before Linux 5.11.
    let fd = create(flags | UFFD_USER_MODE_ONLY).or_else(|error| match error.raw_os_error() {
        Some(libc::EINVAL) => create(flags),
        _ => Err(error),
    })?;
    let mut api = Api {
        api: UFFD_API,
        features: FEATURE_SIGBUS | FEATURE_MISSING_SHMEM,
        ioctls: 0,
    };
    // SAFETY: the request takes a `struct uffdio_api`, which `Api` is, and keeps no pointer to it.
    match unsafe { libc::ioctl(fd.as_raw_fd(), UFFDIO_API, &raw mut api) } {
        0 => Ok(fd),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Makes sure that [`watch`] will work.
///
/// # Errors
/// As there.
pub fn prepare() -> io::Result<()> {
    userfault().map(|_| ())
}

/// Makes every touch of a missing page of a shared tmpfs mapping a SIGBUS, until it is unmapped.
///
/// # Errors
/// The kernel does not offer that to us.
pub fn watch(start: usize, len: usize) -> io::Result<()> {
    let mut range = Range {
        start: start as u64,
        len: len as u64,
        mode: MODE_MISSING,
        result: 0,
    };
    // SAFETY: the request takes a `struct uffdio_register`, which `Range` is, and keeps no pointer to it. It
    // changes what a touch of the range does, not what is in it.
    match unsafe { libc::ioctl(userfault()?.as_raw_fd(), UFFDIO_REGISTER, &raw mut range) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Bytes that may be allocated for somebody: as part of what may be for all, if there is such a bound.
#[derive(Debug)]
pub struct Allowance {
    used: AtomicU64,
    max: u64,
    within: Option<Arc<Allowance>>,
}

impl Allowance {
    /// `max` bytes, which count against `within`, too.
    pub fn new(max: u64, within: Option<Arc<Allowance>>) -> Self {
        Self {
            used: AtomicU64::new(0),
            max,
            within,
        }
    }

    /// The most that may be allocated.
    pub fn max(&self) -> u64 {
        self.max
    }

    /// What is counted.
    pub fn used(&self) -> u64 {
        self.used.load(Relaxed)
    }

    /// Counts bytes, if they fit.
    pub fn take(&self, bytes: u64) -> bool {
        let sum = |used: u64| used.checked_add(bytes).filter(|&sum| sum <= self.max);
        if self.used.fetch_update(Relaxed, Relaxed, sum).is_err() {
            return false;
        }
        let fits = self.within.as_ref().is_none_or(|all| all.take(bytes));
        if !fits {
            self.used.fetch_sub(bytes, Relaxed);
        }
        fits
    }

    /// Counts bytes no more.
    pub fn give_back(&self, bytes: u64) {
        self.used.fetch_sub(bytes, Relaxed);
        if let Some(all) = &self.within {
            all.give_back(bytes);
        }
    }
}

/// Whom the pages of a mapping are allocated for, and what came of it.
#[derive(Debug)]
pub struct Charge {
    allowance: Arc<Allowance>,
    /// Bytes of the pages that were ever filled.
    filled: AtomicU64,
    /// First address of the mapping.
    start: usize,
    /// Which pages were ever filled. One that is filled again had been taken out, and counts as before: a guest
    /// that gives pages back (a balloon) and takes others does not use its allowance up.
    pages: Box<[AtomicU64]>,
    /// A page could not be had. Shared by all mappings of one owner.
    lost: Arc<AtomicBool>,
}

impl Charge {
    /// Nothing has been allocated in the mapping of `pages` pages at `start`.
    pub fn new(
        (start, pages): (usize, usize),
        allowance: Arc<Allowance>,
        lost: Arc<AtomicBool>,
    ) -> Self {
        Self {
            allowance,
            filled: AtomicU64::new(0),
            start,
            pages: (0..pages.div_ceil(64)).map(|_| AtomicU64::new(0)).collect(),
            lost,
        }
    }

    /// Bytes allocated in the mapping at most.
    pub fn filled(&self) -> u64 {
        self.filled.load(Relaxed)
    }

    /// Says that a page of the mapping could not be had.
    pub fn set_lost(&self) {
        self.lost.store(true, Relaxed);
    }

    /// Allocates a page of a mapping that is watched; whether it is there. For signal handlers: atomics and
    /// one system call.
    pub fn fill(&self, page: usize, page_len: usize) -> bool {
        let Some(number) = page.checked_sub(self.start).map(|at| at / page_len) else {
            return false;
        };
        let (Some(Ok(userfault)), Some(word)) = (USERFAULT.get(), self.pages.get(number / 64))
        else {
            return false;
        };
        let (bit, bytes) = (1 << (number % 64), page_len as u64);
        let counts = word.load(Relaxed) & bit == 0;
        if counts && !self.allowance.take(bytes) {
            return false;
        }
        let mut range = Range {
            start: page as u64,
            len: bytes,
            mode: 0,
            result: 0,
        };
        // SAFETY: the request takes a `struct uffdio_zeropage`, which `Range` is. It puts zeros where nothing
        // is, in a mapping that its owner reaches by volatile copies alone. errno is read at once.
        let code = unsafe {
            match libc::ioctl(userfault.as_raw_fd(), UFFDIO_ZEROPAGE, &raw mut range) {
                0 => 0,
                _ => *libc::__errno_location(),
            }
        };
        // What two threads found to be new counts once.
        let is_first = code == 0 && word.fetch_or(bit, Relaxed) & bit == 0;
        if is_first {
            self.filled.fetch_add(bytes, Relaxed);
        }
        if counts && !is_first {
            self.allowance.give_back(bytes);
        }
        if code == 0 {
            return true;
        }
        // Another thread was quicker, or the mappings of the process are changing: the touch is tried again.
        code == libc::EEXIST || code == libc::EAGAIN
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_allowance_is_part_of_another() {
        let all = Arc::new(Allowance::new(100, None));
        let one = Allowance::new(60, Some(Arc::clone(&all)));
        let other = Allowance::new(60, Some(Arc::clone(&all)));
        assert!(one.take(60) && !one.take(1) && !one.take(u64::MAX));
        assert!(!other.take(41) && other.take(40) && !other.take(1));
        assert_eq!((one.used(), other.used(), all.used()), (60, 40, 100));
        one.give_back(30);
        assert!(other.take(20) && !other.take(1), "60 of its own");
        assert_eq!((other.used(), all.used()), (60, 90));
    }
}
