//! Signals as something to poll: a mask and a signalfd.
//!
//! A signalfd tells who sent a signal, which a handler under tokio does not: one typed at the
//! terminal (SI_KERNEL) reached the whole foreground process group, one sent by a process reached
//! lanlet alone and has to be forwarded.
#![allow(unsafe_code)]

use std::borrow::Cow;
use std::fmt;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// A set of signals, blocked in this thread and in all threads and processes it makes from then on.
pub struct SignalFd {
    fd: OwnedFd,
    held: Vec<i32>,
}

/// One signal that arrived.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Received {
    /// Its number.
    pub signal: i32,
    /// Whether the kernel made it, as for Ctrl-C at the terminal: then the whole process group has
    /// it.
    pub from_kernel: bool,
    /// The process that sent it; `None`: it has no pid in this pid namespace, or the kernel sent it.
    pub pid: Option<u32>,
    /// The user of the sender.
    pub uid: u32,
}

impl fmt::Display for Received {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&name(self.signal))?;
        if self.from_kernel {
            return f.write_str(match self.signal {
                libc::SIGINT => " (Ctrl-C at the terminal)",
                libc::SIGHUP => " (the terminal has closed)",
                _ => " from the terminal",
            });
        }
        match self.pid {
            Some(pid) => write!(f, " from {}, uid {}", Process(pid), self.uid),
            None => write!(f, " from outside this pid namespace"),
        }
    }
}

/// A process by its pid and, where it still runs, its name.
pub struct Process(pub u32);

impl fmt::Display for Process {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "pid {}", self.0)?;
        let name = std::fs::read_to_string(format!("/proc/{}/comm", self.0));
        // Any process may call itself anything.
        match name.as_deref().map(str::trim_end).map(str::escape_debug) {
            Ok(name) => write!(f, " ({name})"),
            Err(_) => Ok(()),
        }
    }
}

/// Name of the signals that end a process on purpose; of others the number.
fn name(signal: i32) -> Cow<'static, str> {
    match signal {
        libc::SIGINT => "SIGINT".into(),
        libc::SIGTERM => "SIGTERM".into(),
        libc::SIGHUP => "SIGHUP".into(),
        libc::SIGQUIT => "SIGQUIT".into(),
        other => format!("signal {other}").into(),
    }
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

/// Changes this thread's mask; the one before.
fn mask(how: i32, signals: &[i32]) -> io::Result<libc::sigset_t> {
    let set = set_of(signals);
    let mut old = set_of(&[]);
    // SAFETY: both sets are initialised and outlive the call.
    let error = unsafe { libc::pthread_sigmask(how, &set, &mut old) };
    if error != 0 {
        return Err(io::Error::from_raw_os_error(error));
    }
    Ok(old)
}

/// Holds the signals back in this thread and in all threads and processes it makes from then on;
/// those of them that were not held back before.
///
/// # Errors
/// Of `pthread_sigmask`.
pub fn block(signals: &[i32]) -> io::Result<Vec<i32>> {
    let old = mask(libc::SIG_BLOCK, signals)?;
    // SAFETY: the kernel filled `old`; an unknown signal is answered with -1.
    let was_free = |&signal: &i32| unsafe { libc::sigismember(&old, signal) } == 0;
    Ok(signals.iter().copied().filter(was_free).collect())
}

/// Whether one of these signals waits to be let through or read.
pub fn is_pending(signals: &[i32]) -> bool {
    let mut set = set_of(&[]);
    // SAFETY: `set` is initialised and valid for writes.
    if unsafe { libc::sigpending(&mut set) } != 0 {
        return false;
    }
    // SAFETY: `set` is initialised; an unknown signal is answered with -1.
    let waits = |&signal: &i32| unsafe { libc::sigismember(&set, signal) } == 1;
    signals.iter().any(waits)
}

/// Whether this process ignores a signal, as nohup(1) has it ignore SIGHUP, and a shell without job
/// control SIGINT and SIGQUIT in its background jobs.
pub fn is_ignored(signal: i32) -> bool {
    let mut action = MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: a null new action asks only; `action` is valid for writes.
    let asked = unsafe { libc::sigaction(signal, std::ptr::null(), action.as_mut_ptr()) };
    // SAFETY: filled by the call if that succeeded, else zeroed, which is a valid value (SIG_DFL).
    asked == 0 && unsafe { action.assume_init() }.sa_sigaction == libc::SIG_IGN
}

/// Lets the signals through again: for a process about to become somebody else's program.
///
/// # Errors
/// Of `pthread_sigmask`.
pub fn unblock(signals: &[i32]) -> io::Result<()> {
    mask(libc::SIG_UNBLOCK, signals).map(drop)
}

/// Ends the process at once, whatever its threads and its exit handlers are at.
pub fn exit_now(code: u8) -> ! {
    // SAFETY: _exit runs nothing of this process any more.
    unsafe { libc::_exit(code.into()) }
}

impl SignalFd {
    /// Blocks `signals` and makes the descriptor they can be read from. Call it before the first
    /// thread is started, so that no thread takes one by its default action.
    ///
    /// # Errors
    /// Of `pthread_sigmask` and `signalfd`.
    pub fn block(signals: &[i32]) -> io::Result<Self> {
        let held = block(signals)?;
        let set = set_of(signals);
        // SAFETY: `set` is initialised and outlives the call; -1 asks for a new descriptor.
        let fd = unsafe { libc::signalfd(-1, &set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: a descriptor that the kernel just made and nobody else owns.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        Ok(Self { fd, held })
    }

    /// Those of its signals that were not blocked before: a program that this process starts wants
    /// them let through.
    pub fn held(&self) -> &[i32] {
        &self.held
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
            pid: Some(info.ssi_pid).filter(|&pid| pid != 0),
            uid: info.ssi_uid,
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
        assert!(is_pending(&[libc::SIGURG]) && !is_pending(&[libc::SIGWINCH]));
        let received = signals.next().unwrap().unwrap();
        let expected = Received {
            signal: libc::SIGURG,
            from_kernel: false,
            pid: Some(std::process::id()),
            uid: rustix::process::getuid().as_raw(),
        };
        assert_eq!(received, expected);
        assert_eq!(signals.next().unwrap(), None);
        assert_eq!(signals.held(), [libc::SIGURG]);
        assert!(
            block(&[libc::SIGURG]).unwrap().is_empty(),
            "it is held back already"
        );
        unblock(&[libc::SIGURG]).unwrap();
    }

    #[test]
    fn a_sender_is_named() {
        let received = Received {
            signal: libc::SIGTERM,
            from_kernel: false,
            pid: Some(std::process::id()),
            uid: 7,
        };
        let text = received.to_string();
        let begin = format!("SIGTERM from pid {} (", std::process::id());
        assert!(
            text.starts_with(&begin) && text.ends_with("), uid 7"),
            "{text}"
        );
        let text = Received {
            pid: None,
            ..received
        }
        .to_string();
        assert_eq!(text, "SIGTERM from outside this pid namespace");
        let (signal, from_kernel) = (libc::SIGINT, true);
        let text = Received {
            signal,
            from_kernel,
            ..received
        }
        .to_string();
        assert_eq!(text, "SIGINT (Ctrl-C at the terminal)");
    }
}
