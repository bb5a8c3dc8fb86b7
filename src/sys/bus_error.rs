//! Mappings of files that another process can shrink, or leave holes in.
//!
//! An access to a shared mapping past its file's end is a SIGBUS, which ends the process, and so is one to a
//! hole where that is asked for ([`userfault`]). For mappings that are guarded here, a handler has the hole
//! filled. Where that can't be had, it puts zeros of our own in the place, so that the access goes on, and
//! says that the mapping is lost: its owner stops using it, so that such zeros don't add up. Elsewhere SIGBUS
//! does what it did before.
//!
//! The handler runs between any two instructions: it uses atomics and makes two system calls at most,
//! which is all that it may.
//!
//! [`userfault`]: super::userfault
#![allow(unsafe_code)]

use std::io;
use std::mem::MaybeUninit;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, fence};
use std::sync::{Arc, OnceLock};

use super::userfault::Charge;

/// Mappings guarded at a time: 64 each of 256 guests, which is the most that one can have
/// (`port::vhost_user::memory`), so that it takes 256 that mean harm to leave none for the next. 640 KiB of
/// address space, of which what was never used takes no memory.
pub const GUARDS_MAX: usize = 16_384;
/// Bytes of zeros put in place at a time, if pages are not larger: a frame's, so that what is being copied
/// when a mapping is lost leaves few pieces of it behind (vm.max_map_count).
const ZEROS_BYTES: usize = 64 << 10;

/// asm-generic/siginfo.h: nothing is there. Other codes are of pages that are, and are broken (memory
/// failures): to fill those would never end.
const BUS_ADRERR: libc::c_int = 2;

/// Why a mapping is not guarded, and so not had.
#[derive(Debug, thiserror::Error)]
#[error(
    "guests' memory is in {GUARDS_MAX} pieces already: detach vhost-user ports, or attach this guest to \
     another network"
)]
struct TooMany;

struct Slot {
    taken: AtomicBool,
    /// Changes with what is said below, and is odd while that changes. The handler may be held up between any
    /// two loads, for as long as it takes to free the slot and take it again.
    version: AtomicUsize,
    /// First address; 0: nothing is guarded.
    start: AtomicUsize,
    len: AtomicUsize,
    page_len: AtomicUsize,
    charge: AtomicPtr<Charge>,
}

static SLOTS: [Slot; GUARDS_MAX] = [const { Slot::new() }; GUARDS_MAX];

impl Slot {
    const fn new() -> Self {
        Self {
            taken: AtomicBool::new(false),
            version: AtomicUsize::new(0),
            start: AtomicUsize::new(0),
            len: AtomicUsize::new(0),
            page_len: AtomicUsize::new(0),
            charge: AtomicPtr::new(std::ptr::null_mut()),
        }
    }

    /// Says what it guards. For whoever has taken the slot.
    fn set(&self, start: usize, len: usize, page_len: usize, charge: *const Charge) {
        let version = self.version.load(Relaxed);
        self.version.store(version.wrapping_add(1), Relaxed);
        // Who reads any of what follows finds that the version has changed.
        fence(Release);
        self.start.store(start, Relaxed);
        self.len.store(len, Relaxed);
        self.page_len.store(page_len, Relaxed);
        self.charge.store(charge.cast_mut(), Relaxed);
        self.version.store(version.wrapping_add(2), Release);
    }

    /// Where an address is in what it guards. A slot that changes meanwhile guards something else: the mapping
    /// that the access is to is in use, so its slot does not change.
    fn find(&self, address: usize) -> Option<Place> {
        let version = self.version.load(Acquire);
        let start = self.start.load(Relaxed);
        let (len, page_len) = (self.len.load(Relaxed), self.page_len.load(Relaxed));
        let charge = self.charge.load(Relaxed);
        fence(Acquire);
        if version & 1 != 0 || self.version.load(Relaxed) != version {
            return None;
        }
        let at = address.checked_sub(start).filter(|&at| at < len)?;
        (start != 0 && page_len != 0).then(|| Place {
            charge,
            page: start + at / page_len * page_len,
            page_len,
            end: start + len,
        })
    }
}

/// End of the slots that were ever taken: the handler need not look beyond.
static SLOTS_END: AtomicUsize = AtomicUsize::new(0);

/// What SIGBUS did before.
static BEFORE: OnceLock<libc::sigaction> = OnceLock::new();

/// Guards a mapping while it lives, which has to be shorter than the mapping does.
#[derive(Debug)]
pub struct Guard {
    slot: usize,
    /// What the slot points to.
    charge: Arc<Charge>,
}

impl Guard {
    /// Whom its pages are allocated for.
    pub fn charge(&self) -> &Charge {
        &self.charge
    }
}

/// Guards the mapping of `len` bytes at `start`, whose pages have `page_len` bytes and are allocated for
/// `charge`.
///
/// # Errors
/// [`GUARDS_MAX`] are guarded already, or the kernel takes no handler.
pub fn guard(start: usize, len: usize, page_len: usize, charge: Charge) -> io::Result<Guard> {
    install()?;
    let free = SLOTS
        .iter()
        .position(|slot| !slot.taken.swap(true, Acquire))
        .ok_or_else(|| io::Error::other(TooMany))?;
    // Before the slot says what it guards.
    SLOTS_END.fetch_max(free + 1, Release);
    let charge = Arc::new(charge);
    SLOTS[free].set(start, len, page_len, Arc::as_ptr(&charge));
    Ok(Guard { slot: free, charge })
}

impl Drop for Guard {
    fn drop(&mut self) {
        let slot = &SLOTS[self.slot];
        slot.set(0, 0, 0, std::ptr::null());
        slot.taken.store(false, Release);
    }
}

/// Where an access failed.
struct Place {
    charge: *const Charge,
    page: usize,
    page_len: usize,
    /// Of the mapping.
    end: usize,
}

/// The page that an address is in, where it is guarded.
fn page_of(address: usize) -> Option<Place> {
    let mut taken = SLOTS.iter().take(SLOTS_END.load(Acquire));
    taken.find_map(|slot| slot.find(address))
}

/// Makes a page that an access failed at accessible. `is_missing`: nothing is wrong with it but that it is
/// not there.
fn mend(place: &Place, is_missing: bool) -> bool {
    // SAFETY: the pointer is null or to what the guard of the mapping holds, which lives as long as the
    // mapping is in use: the access that failed uses it.
    let charge = unsafe { place.charge.as_ref() };
    if let Some(charge) = charge {
        if is_missing && charge.fill(place.page, place.page_len) {
            return true;
        }
        charge.set_lost();
    }
    let len = ZEROS_BYTES.max(place.page_len).min(place.end - place.page);
    // SAFETY: the pages lie within a mapping whose owner guards it and reaches it by volatile copies alone:
    // no reference is to them.
    let mapped = unsafe {
        libc::mmap(
            place.page as *mut libc::c_void,
            len,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE,
            -1,
            0,
        )
    };
    mapped != libc::MAP_FAILED
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
    let (address, code) = unsafe {
        match (*info).si_code {
            code if code > 0 => ((*info).si_addr() as usize, code),
            code => (0, code),
        }
    };
    if let Some(place) = page_of(address) {
        // SAFETY: the pointer is to this thread's errno, which is kept: the code that was interrupted may be
        // about to read it.
        let mended = unsafe {
            let errno = *libc::__errno_location();
            let mended = mend(&place, code == BUS_ADRERR);
            *libc::__errno_location() = errno;
            mended
        };
        if mended {
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
    use super::super::userfault::Allowance;
    use super::*;

    #[test]
    fn pages_of_guarded_mappings_are_found() {
        // Addresses that no mapping of a process has.
        const AT: usize = 0xffff_8000_0000_0000;
        let page_of = |address| page_of(address).map(|place| (place.page, place.page_len));
        let allowance = Arc::new(Allowance::new(0, None));
        assert_eq!(page_of(AT), None);
        let guarded = guard(
            AT,
            0x5000,
            0x1000,
            Charge::new((AT, 5), allowance, Arc::default()),
        )
        .unwrap();
        assert_eq!(page_of(AT), Some((AT, 0x1000)));
        assert_eq!(page_of(AT + 0x4fff), Some((AT + 0x4000, 0x1000)));
        assert_eq!(page_of(AT + 0x5000), None);
        assert_eq!(page_of(AT - 1), None);
        drop(guarded);
        assert_eq!(page_of(AT), None);
    }

    #[test]
    fn a_slot_that_is_taken_again_is_never_half_read() {
        // No mapping of a process is here, and what is at the first of them ends before the address.
        const SMALL: (usize, usize) = (0xffff_9000_0000_0000, 0x1000);
        const LARGE: (usize, usize) = (0xffff_a000_0000_0000, 0x100_0000);
        const READS: usize = 1_000_000;
        const BEYOND: usize = SMALL.0 + SMALL.1;
        let slot = Slot::new();
        let is_over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !is_over.load(Relaxed) {
                    for (start, len) in [SMALL, LARGE] {
                        slot.set(start, len, 0x1000, std::ptr::null());
                    }
                }
            });
            let found = (0..READS).filter(|_| slot.find(BEYOND).is_some()).count();
            is_over.store(true, Relaxed);
            assert_eq!(found, 0, "of {READS}");
        });
    }
}
