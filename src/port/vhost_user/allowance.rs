//! What lanlet allocates on guests' behalf, and for how long that counts.
//!
//! A guest's memory is its front-end's to allocate. But a guest may name a buffer that it has not touched
//! yet, which its front-end need not have allocated: whoever touches it first does, and is charged for it. So
//! lanlet does that up to a bound, of a port and in total; the tables that map the memory count, too. What
//! was allocated stays charged to us until its file is gone, which is not when the front-end goes: it may keep
//! the file and come back with another. The kernel says when that is: inotify(7), IN_DELETE_SELF.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use rustix::fs::inotify;
use rustix::io::Errno;

use crate::sys::memory_limit;
use crate::sys::userfault::Allowance;

/// The part of the memory that this process may use which it allocates for guests: it has to run, too.
const TOTAL_SHARE: u64 = 4;
/// The part of that which one port may have: three front-ends that mean harm leave the last quarter.
const PORT_SHARE: u64 = 4;
/// Bytes of inotify's events at a time; each is 16.
const EVENTS_BYTES: usize = 4096;

static TOTAL: OnceLock<Arc<Allowance>> = OnceLock::new();

/// Bytes that count as allocated for guests now.
pub fn used() -> u64 {
    TOTAL.get().map_or(0, |total| total.used())
}

/// What may be allocated for the guest of one port.
pub fn of_port() -> Arc<Allowance> {
    let total = TOTAL.get_or_init(|| {
        let bytes = memory_limit::bytes() / TOTAL_SHARE;
        Arc::new(Allowance::new(bytes, None))
    });
    let bytes = total.max() / PORT_SHARE;
    Arc::new(Allowance::new(bytes, Some(Arc::clone(total))))
}

/// Files that are not mapped any more, with what was allocated in them.
#[derive(Default)]
struct Kept {
    inotify: Option<OwnedFd>,
    files: HashMap<i32, Vec<(Arc<Allowance>, u64)>>,
}

fn kept() -> MutexGuard<'static, Kept> {
    static KEPT: OnceLock<Mutex<Kept>> = OnceLock::new();
    // Entries are added and removed whole.
    let kept = KEPT.get_or_init(Mutex::default);
    kept.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Makes sure that the kernel will say when files are gone, for as long as this process runs: a guest of the same
/// user can use up the instances that the user may have (fs.inotify.max_user_instances) later on.
///
/// # Errors
/// It gives no instance.
pub fn prepare() -> io::Result<()> {
    let mut kept = kept();
    if kept.inotify.is_none() {
        let flags = inotify::CreateFlags::NONBLOCK | inotify::CreateFlags::CLOEXEC;
        kept.inotify = Some(inotify::init(flags)?);
    }
    Ok(())
}

/// Has `bytes` that were allocated in a file count until it is gone; for ever where the kernel does not say
/// when that is, or [`prepare`] failed.
pub fn count_until_gone(file: &File, allowance: &Arc<Allowance>, bytes: u64) {
    let mut kept = kept();
    let watch = |inotify: &OwnedFd| {
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        inotify::add_watch(inotify, path, inotify::WatchFlags::DELETE_SELF)
    };
    // Without one the port's opening has told why.
    let watched = kept.inotify.as_ref().map_or(Err(Errno::MFILE), watch);
    match watched {
        Ok(file) => {
            let shares = kept.files.entry(file).or_default();
            match shares.iter_mut().find(|(of, _)| Arc::ptr_eq(of, allowance)) {
                Some((_, sum)) => *sum += bytes,
                None => shares.push((Arc::clone(allowance), bytes)),
            }
        }
        Err(error) => log::warn!(
            "{bytes} bytes of guest memory count as allocated from now on, whether they are or not: inotify: {error}"
        ),
    }
}

/// Counts no more what was allocated in files that are gone.
pub fn settle() {
    let mut kept = kept();
    let Kept { inotify, files } = &mut *kept;
    let Some(inotify) = inotify.as_ref().filter(|_| !files.is_empty()) else {
        return;
    };
    let mut space = [const { MaybeUninit::uninit() }; EVENTS_BYTES];
    let mut events = inotify::Reader::new(inotify, &mut space);
    while let Ok(event) = events.next() {
        for (allowance, bytes) in files.remove(&event.wd()).into_iter().flatten() {
            allowance.give_back(bytes);
        }
    }
}
