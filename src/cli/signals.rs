//! The signals of a command from its first line to its last, and the thread that ends the process
//! where its other threads don't.
//!
//! A signal that was ignored when lanlet started stays ignored. One that is to be heeded is blocked and
//! read from a descriptor, so a thread that waits for the kernel, for a slow disk or for a process that is
//! stopped would leave the signal unread for as long. A thread of its own watches over that:
//!
//! | phase | who reads the signals | the process is ended |
//! |---|---|---|
//! | starting | nobody yet | [`START_TIME_MAX`] after a signal, if it still starts |
//! | running | the main thread, which only polls | by the main thread |
//! | ending | the watching thread | by a second signal, or after [`END_TIME_MAX`] |

use std::fmt::Write;
use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering::SeqCst};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec};

use super::Failure;
use super::logger::last_words;
use crate::sys::signal::{self, Received, SignalFd};

/// How long what is being started may take to get ready once a signal has come: less than a person at
/// Ctrl-C takes for a hang.
const START_TIME_MAX: Duration = Duration::from_secs(1);
/// How long an end in good order may take: connections get 2 s to deliver what they hold, sockets are
/// closed and a lease file is written. Half of the shortest patience of those who wait for it (10 s by
/// `docker stop` and 'lanlet down').
const END_TIME_MAX: Duration = Duration::from_secs(5);
/// Signals that come closer than this count as one: timeout(1) signals its child, and then its group.
const SAME_WISH: Duration = Duration::from_millis(300);

/// Signals that are a wish to end; the others that a command passes on are none.
pub(super) const WISHES: [i32; 4] = [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGQUIT];
/// Pause between two looks for one behind others that nobody reads yet.
const LOOK: Duration = Duration::from_millis(100);

const STARTING: u8 = 0;
const RUNNING: u8 = 1;
const ENDING: u8 = 2;

/// A command's signals.
pub(super) struct Signals {
    fd: Arc<SignalFd>,
    phase: Arc<Phase>,
}

struct Phase {
    now: AtomicU8,
    /// Exit status at the end of the patience with [`ENDING`].
    code: AtomicU8,
    changed: OwnedFd,
}

impl Signals {
    /// Holds these signals back, those excepted that are ignored. First thing in a command, before any
    /// other thread is started.
    ///
    /// # Errors
    /// Of signalfd, or a thread can't be had.
    pub(super) fn hold(signals: &[i32]) -> Result<Self, Failure> {
        // Whoever ignores SIGTERM too is nobody who means to keep a network for ever.
        let heeded = |&signal: &i32| signal == libc::SIGTERM || !signal::is_ignored(signal);
        let signals: Vec<i32> = signals.iter().copied().filter(heeded).collect();
        let fd = SignalFd::block(&signals).map_err(Failure::io("cannot hold back signals"))?;
        let changed = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|error| Failure::io("cannot make an eventfd")(error.into()))?;
        let this = Self {
            fd: Arc::new(fd),
            phase: Arc::new(Phase {
                now: AtomicU8::new(STARTING),
                code: AtomicU8::new(0),
                changed,
            }),
        };
        let (fd, phase) = (Arc::clone(&this.fd), Arc::clone(&this.phase));
        std::thread::Builder::new()
            .name("lanlet-signals".to_owned())
            .spawn(move || watch(&fd, &phase))
            .map_err(Failure::io("cannot start a thread"))?;
        Ok(this)
    }

    /// Those that were let through before.
    pub(super) fn held(&self) -> &[i32] {
        self.fd.held()
    }

    /// From here on the caller reads them.
    pub(super) fn running(&self) -> &SignalFd {
        self.phase.set(RUNNING);
        &self.fd
    }

    /// What remains is to end. `code` is the process's exit status if it does not get there by itself.
    pub(super) fn ending(&self, code: u8) {
        self.phase.code.store(code, SeqCst);
        self.phase.set(ENDING);
    }
}

impl Phase {
    fn set(&self, phase: u8) {
        self.now.store(phase, SeqCst);
        // Fails only when the counter is full, and then the thread is awake.
        let _ = rustix::io::write(&self.changed, &1u64.to_ne_bytes());
    }
}

/// The watching thread.
fn watch(signals: &SignalFd, phase: &Phase) {
    let mut since: Option<Instant> = None;
    let mut others_wait = false;
    let mut last = RUNNING;
    loop {
        let now = phase.now.load(SeqCst);
        if now != last {
            (last, since) = (now, (now == ENDING).then(Instant::now));
        }
        let limit = if now == ENDING {
            END_TIME_MAX
        } else {
            START_TIME_MAX
        };
        let left = since.map(|since| limit.saturating_sub(since.elapsed()));
        if left.is_some_and(|left| left.is_zero()) {
            too_late(signals, (now == ENDING).then(|| phase.code.load(SeqCst)));
        }
        let mut fds = vec![PollFd::new(&phase.changed, PollFlags::IN)];
        // While it starts a signal is only noticed: the main thread is to read it.
        if now == ENDING || (now == STARTING && since.is_none() && !others_wait) {
            fds.push(PollFd::from_borrowed_fd(signals.as_fd(), PollFlags::IN));
        }
        let left = left.or((now == STARTING && others_wait).then_some(LOOK));
        let timeout = left.and_then(|left| Timespec::try_from(left).ok());
        let _ = rustix::event::poll(&mut fds, timeout.as_ref());
        let came = fds.get(1).is_some_and(|fd| !fd.revents().is_empty());
        let _ = rustix::io::read(&phase.changed, &mut [0; 8]);
        if now == STARTING && (came || others_wait) {
            let is_wish = signal::is_pending(&WISHES);
            others_wait = !is_wish;
            if is_wish {
                since.get_or_insert_with(Instant::now);
            }
        } else if came
            && let Ok(Some(received)) = signals.next()
            && WISHES.contains(&received.signal)
            && since.is_some_and(|since| since.elapsed() > SAME_WISH)
        {
            last_words(&format!("{received} forces the end"));
            signal::exit_now(status_of(received));
        }
    }
}

/// Ends the process, and says what it was at. `code`: its exit status, where it was ending already.
fn too_late(signals: &SignalFd, code: Option<u8>) -> ! {
    let mut text = String::from("error: ");
    let mut received = std::iter::from_fn(|| signals.next().ok().flatten());
    let received = received.find(|received| WISHES.contains(&received.signal));
    let status = match (code, received) {
        (Some(code), _) => {
            let _ = write!(
                text,
                "the end takes longer than {END_TIME_MAX:?} and is forced"
            );
            code
        }
        (None, Some(received)) => {
            let _ = write!(text, "ended by {received} while it started");
            status_of(received)
        }
        (None, None) => 1,
    };
    let busy = other_threads(code.is_some());
    if !busy.is_empty() {
        let _ = write!(text, "; still at work: {}", busy.join(", "));
    }
    last_words(&text);
    signal::exit_now(status)
}

/// The exit status of a shell for a program that a signal ended.
fn status_of(received: Received) -> u8 {
    u8::try_from(128 + received.signal).unwrap_or(u8::MAX)
}

/// The process's threads but for this one, each with the kernel's function it waits in where that is told.
/// While the process ends the first thread does nothing but wait for the others.
fn other_threads(ending: bool) -> Vec<String> {
    let this = rustix::thread::gettid().as_raw_nonzero().get().to_string();
    let first = std::process::id().to_string();
    let threads = fs::read_dir("/proc/self/task").into_iter().flatten();
    let mut names: Vec<String> = threads
        .flatten()
        .filter(|thread| {
            let id = thread.file_name();
            id != *this && !(ending && id == *first)
        })
        .filter_map(|thread| {
            let name = fs::read_to_string(thread.path().join("comm")).ok()?;
            let place = fs::read_to_string(thread.path().join("wchan")).unwrap_or_default();
            Some(match place.as_str() {
                "" | "0" => name.trim_end().to_owned(),
                place => format!("{} (in {place})", name.trim_end()),
            })
        })
        .collect();
    names.sort();
    names
}
