//! Mappings of files that another process can shrink.
//!
//! An access to a shared mapping past its file's end is a SIGBUS, which ends the process. For mappings that
//! are guarded here, a handler puts a page of zeros in the place instead, and the access goes on: whoever
//! shrank the file has only harmed himself. Elsewhere SIGBUS does what it did before.
//!
//! The handler runs between any two instructions: it reads atomics and makes one system call, which is
//! all that it may.
#![allow(unsafe_code)]

use std::io;
use std::mem::MaybeUninit;
use std::sync::OnceLock;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::sync::atomic::{AtomicBool, AtomicUsize};

/// Mappings guarded at a time: 64 each of 256 guests, which is the most that one can have
/// (`port::vhost_user::memory`), so that it takes 256 that mean harm to leave none for the next. 512 KiB of
/// address space, of which what was never used takes no memory.
pub const GUARDS_MAX: usize = 16_384;

/// Why a mapping is not guarded, and so not had.
#[derive(Debug, thiserror::Error)]
#[error(
    "guests' memory is in {GUARDS_MAX} pieces already: detach vhost-user ports, or attach this guest to \
     another network"
)]
struct TooMany;

struct Slot {
    taken: AtomicBool,
    /// First address; 0: nothing is guarded.
    start: AtomicUsize,
    len: AtomicUsize,
    page_len: AtomicUsize,
}

static SLOTS: [Slot; GUARDS_MAX] = [const {
    Slot {
        taken: AtomicBool::new(false),
        start: AtomicUsize::new(0),
        len: AtomicUsize::new(0),
        page_len: AtomicUsize::new(0),
    }
}; GUARDS_MAX];

/// End of the slots that were ever taken: the handler need not look beyond.
static SLOTS_END: AtomicUsize = AtomicUsize::new(0);

/// What SIGBUS did before.
static BEFORE: OnceLock<libc::sigaction> = OnceLock::new();

/// Guards a mapping while it lives, which has to be shorter than the mapping does.
#[derive(Debug)]
pub struct Guard {
    slot: usize,
}

/// Guards the mapping of `len` bytes at `start`, whose pages have `page_len` bytes.
///
/// # Errors
/// [`GUARDS_MAX`] are guarded already, or the kernel takes no handler.
pub fn guard(start: usize, len: usize, page_len: usize) -> io::Result<Guard> {
    install()?;
    let free = SLOTS
        .iter()
        .position(|slot| !slot.taken.swap(true, Acquire))
        .ok_or_else(|| io::Error::other(TooMany))?;
    // Before the slot says what it guards.
    SLOTS_END.fetch_max(free + 1, Release);
    let slot = &SLOTS[free];
    slot.len.store(len, Relaxed);
    slot.page_len.store(page_len, Relaxed);
    slot.start.store(start, Release);
    Ok(Guard { slot: free })
}

impl Drop for Guard {
    fn drop(&mut self) {
        let slot = &SLOTS[self.slot];
        slot.start.store(0, Release);
        slot.taken.store(false, Release);
    }
}

/// The page that an address is in, and its length, where it is guarded.
fn page_of(address: usize) -> Option<(usize, usize)> {
    let mut taken = SLOTS.iter().take(SLOTS_END.load(Acquire));
    taken.find_map(|slot| {
        let start = slot.start.load(Acquire);
        let (len, page_len) = (slot.len.load(Relaxed), slot.page_len.load(Relaxed));
        let at = address.checked_sub(start).filter(|&at| at < len)?;
        (start != 0 && page_len != 0).then(|| (start + at / page_len * page_len, page_len))
    })
}

fn install() -> io::Result<()> {
    static INSTALLED: OnceLock<Option<i32>> = OnceLock::new();
    let failed = INSTALLED.get_or_init(|| {
        let mut before = MaybeUninit::<libc::sigaction>::zeroed();
        // SAFETY: sigaction is plain data for which all zeros is a value; both pointers are to live ones;
        // the handler does nothing but what signal-safety(7) allows (see there).
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = on_bus_error as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
            if libc::sigaction(libc::SIGBUS, std::ptr::null(), before.as_mut_ptr()) != 0 {
                return io::Error::last_os_error().raw_os_error();
            }
            // Before the handler can run.
            let _ = BEFORE.set(before.assume_init());
            if libc::sigaction(libc::SIGBUS, &action, std::ptr::null_mut()) != 0 {
                return io::Error::last_os_error().raw_os_error();
            }
        }
        None
    });
    failed.map_or(Ok(()), |code| Err(io::Error::from_raw_os_error(code)))
}

extern "C" fn on_bus_error(signal: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the kernel hands a valid siginfo to a handler with SA_SIGINFO; si_addr is set where the
    // signal is of a fault (si_code above 0).
    let address = unsafe {
        if (*info).si_code > 0 {
            (*info).si_addr() as usize
        } else {
            0
        }
    };
    if let Some((page, page_len)) = page_of(address) {
        // SAFETY: the page lies within a mapping whose owner guards it and reaches it by volatile copies
        // alone: no reference is to it. errno is kept, as the code that was interrupted may be about to
        // read it.
        let mapped = unsafe {
            let errno = *libc::__errno_location();
            let mapped = libc::mmap(
                page as *mut libc::c_void,
                page_len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE,
                -1,
                0,
            );
            *libc::__errno_location() = errno;
            mapped
        };
        if mapped != libc::MAP_FAILED {
            return;
        }
    }
    // Nobody's: as it was. A fault comes again at once, a signal that was sent is sent again.
    if let Some(before) = BEFORE.get() {
        // SAFETY: `before` is what the kernel said; both calls are allowed in a handler.
        unsafe {
            libc::sigaction(libc::SIGBUS, before, std::ptr::null_mut());
            libc::raise(signal);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_of_guarded_mappings_are_found() {
        // Addresses that no mapping of a process has.
        const AT: usize = 0xffff_8000_0000_0000;
        assert_eq!(page_of(AT), None);
        let guarded = guard(AT, 0x5000, 0x1000).unwrap();
        assert_eq!(page_of(AT), Some((AT, 0x1000)));
        assert_eq!(page_of(AT + 0x4fff), Some((AT + 0x4000, 0x1000)));
        assert_eq!(page_of(AT + 0x5000), None);
        assert_eq!(page_of(AT - 1), None);
        drop(guarded);
        assert_eq!(page_of(AT), None);
    }
}
