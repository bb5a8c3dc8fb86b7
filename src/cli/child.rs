//! Running somebody's command as if it had been run directly: same terminal, same process group,
//! signals passed on, its exit status ours, and no command left behind if lanlet is killed.
//!
//! The child starts as lanlet itself (`child-init`), arranges for its death with the parent's, and
//! then becomes the command. That way nothing has to run between fork and exec.
//!
//! The parent's death signal belongs to the *thread* that made the child (prctl(2)), so commands are
//! started from the main thread, which lives as long as the process.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, ExitCode, ExitStatus};
use std::sync::OnceLock;

use clap::Args;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::FdFlags;
use rustix::process::{Pid, PidfdFlags, Resource, Rlimit, Signal, getrlimit, setrlimit};

use super::Failure;
use super::attachment::Attachment;
use super::signals::Signals;
use crate::sys::harden;
use crate::sys::signal::{self, Received};

/// The signals passed on to a command: those that people and service managers send on purpose.
const FORWARDED: [Signal; 7] = [
    Signal::INT,
    Signal::TERM,
    Signal::HUP,
    Signal::QUIT,
    Signal::USR1,
    Signal::USR2,
    Signal::WINCH,
];

/// Exit status of a shell for a command that exists but can't be run (POSIX 2.8.2).
const EXIT_CANNOT_RUN: u8 = 126;
/// Exit status of a shell for a command that is not found (POSIX 2.8.2).
const EXIT_NOT_FOUND: u8 = 127;

fn forwarded() -> [i32; 7] {
    FORWARDED.map(Signal::as_raw)
}

/// Holds back the forwarded signals, to be read by [`supervise`]. First thing in a command, before
/// any thread is started.
///
/// # Errors
/// Of signalfd.
pub(super) fn block_signals() -> Result<Signals, Failure> {
    let signals = Signals::hold(&forwarded())?;
    let _ = HELD.set(signals.held().to_vec());
    Ok(signals)
}

/// Holds the forwarded signals back for good.
///
/// # Errors
/// Of pthread_sigmask.
pub(super) fn hold_signals() -> Result<(), Failure> {
    let held = signal::block(&forwarded()).map(drop);
    held.map_err(Failure::io("cannot hold back signals"))
}

/// The signals that lanlet holds back and that were let through when it started.
static HELD: OnceLock<Vec<i32>> = OnceLock::new();

/// The soft limit of open files that lanlet was started with.
static OPEN_FILES: OnceLock<u64> = OnceLock::new();

/// The soft limit of core files' sizes that lanlet was started with; no limit is the largest number.
static CORE_LIMIT: OnceLock<u64> = OnceLock::new();

/// Sets the limit of core files to zero. Commands get the old one back.
pub(super) fn give_up_core_files() {
    match harden::no_core_files() {
        Ok(soft) => drop(CORE_LIMIT.set(soft.unwrap_or(u64::MAX))),
        Err(error) => log::debug!("core files are possible: {error}"),
    }
}

/// Nothing that this thread starts from here on gains privileges.
pub(super) fn give_up_new_privileges() {
    if let Err(error) = harden::no_new_privileges() {
        log::debug!("programs may gain privileges: {error}");
    }
}

/// Raises the limit of open files as far as it goes: each flow of the NAT takes one. Commands get the
/// old limit back, as select(2) still breaks at 1,024.
pub(super) fn raise_open_files() {
    let limit = getrlimit(Resource::Nofile);
    if let Some(soft) = limit.current.filter(|_| limit.current != limit.maximum) {
        let raised = Rlimit {
            current: limit.maximum,
            maximum: limit.maximum,
        };
        match setrlimit(Resource::Nofile, raised) {
            Ok(()) => drop(OPEN_FILES.set(soft)),
            Err(error) => log::warn!("cannot raise the limit of open files from {soft}: {error}"),
        }
    }
}

/// What a child needs to know to undo what lanlet did to itself.
#[derive(Args, Debug)]
pub(super) struct Origin {
    /// Process that must still be the parent.
    parent: i32,
    /// Soft limit of open files to go back to.
    #[arg(long)]
    open_files: Option<u64>,
    /// Soft limit of core files to go back to; the largest number is none.
    #[arg(long)]
    core: Option<u64>,
    /// Signals to let through again.
    #[arg(long, value_delimiter = ',')]
    held: Vec<i32>,
}

impl Origin {
    /// The words for a child's command line.
    pub(super) fn words() -> Vec<String> {
        let limit = OPEN_FILES.get().map(|soft| format!("--open-files={soft}"));
        let held = HELD.get().filter(|held| !held.is_empty()).map(|held| {
            let numbers: Vec<_> = held.iter().map(i32::to_string).collect();
            format!("--held={}", numbers.join(","))
        });
        let core = CORE_LIMIT.get().map(|soft| format!("--core={soft}"));
        let limit = limit.into_iter().chain(core);
        let parent = std::process::id().to_string();
        limit.chain(held).chain([parent]).collect()
    }

    /// Goes back to signals and limits as lanlet found them.
    ///
    /// # Errors
    /// Of pthread_sigmask.
    pub(super) fn restore(&self) -> Result<(), Failure> {
        if let Some(soft) = self.core {
            let soft = Some(soft).filter(|&soft| soft != u64::MAX);
            if let Err(error) = harden::set_core_limit(soft) {
                log::warn!("cannot set the limit of core files back: {error}");
            }
        }
        if let Some(soft) = self.open_files {
            let maximum = getrlimit(Resource::Nofile).maximum;
            let old = Rlimit {
                current: Some(soft),
                maximum,
            };
            if let Err(error) = setrlimit(Resource::Nofile, old) {
                log::warn!("cannot set the limit of open files back to {soft}: {error}");
            }
        }
        signal::unblock(&self.held).map_err(Failure::io("cannot let signals through"))
    }

    /// Has the kernel kill this process when its parent ends.
    ///
    /// # Errors
    /// The parent has ended already.
    pub(super) fn die_with_parent(&self) -> Result<(), Failure> {
        rustix::process::set_parent_process_death_signal(Some(Signal::KILL))
            .map_err(|error| Failure::io("cannot set the parent's death signal")(error.into()))?;
        // The parent may have died before the line above: then somebody else is the parent by now.
        if rustix::process::getppid() != Pid::from_raw(self.parent) {
            return Err(Failure::because(
                "the process that started this one has ended",
            ));
        }
        Ok(())
    }
}

/// The rest of `child-init`'s command line.
#[derive(Args, Debug)]
pub(super) struct InitArgs {
    #[command(flatten)]
    origin: Origin,
    /// The command.
    #[arg(last = true, required = true)]
    command: Vec<OsString>,
}

/// Becomes the command. Returns only if that fails.
pub(super) fn init(args: &InitArgs) -> Result<ExitCode, Failure> {
    args.origin.die_with_parent()?;
    args.origin.restore()?;
    let (program, arguments) = args.command.split_first().ok_or(Failure::Reported)?;
    let error = Command::new(program).args(arguments).exec();
    Ok(cannot_run(program, &error))
}

/// Says why a command can't be run; the exit status a shell would have for it.
pub(super) fn cannot_run(program: &OsStr, error: &io::Error) -> ExitCode {
    // execvp(3) reports a directory in PATH that can't be entered before a file that is nowhere.
    let is_nowhere = error.kind() == io::ErrorKind::NotFound || !is_visible(program);
    let reason = if is_nowhere {
        "command not found".to_owned()
    } else {
        error.to_string()
    };
    eprintln!(
        "lanlet: error: cannot run {}: {reason}",
        Path::new(program).display()
    );
    ExitCode::from(if is_nowhere {
        EXIT_NOT_FOUND
    } else {
        EXIT_CANNOT_RUN
    })
}

/// Whether there is a file of this name, by its path or in PATH.
fn is_visible(program: &OsStr) -> bool {
    let path = Path::new(program);
    if path.components().count() != 1 {
        return path.exists();
    }
    let directories = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&directories).any(|directory| directory.join(path).exists())
}

/// A copy of this program, as a child's program.
pub(super) fn this_program() -> Command {
    let mut command = Command::new("/proc/self/exe");
    command.arg0("lanlet");
    command
}

/// This program about to become the command whose words are added: it ends with this process, and
/// has no signal held back.
pub(super) fn init_command() -> Command {
    let mut command = this_program();
    command.arg("child-init").args(Origin::words()).arg("--");
    command
}

/// A command which inherits `fds` under the same numbers.
///
/// # Errors
/// Of fcntl.
pub(super) fn with_fds(words: &[OsString], fds: &[OwnedFd]) -> Result<Command, Failure> {
    for fd in fds {
        rustix::io::fcntl_setfd(fd, FdFlags::empty())
            .map_err(|error| Failure::io("cannot pass the tap on")(error.into()))?;
    }
    let mut command = init_command();
    command.args(words);
    Ok(command)
}

/// Waits for a command, passes signals on to it, and has its guest follow a network of another process that
/// ends and comes back.
///
/// # Errors
/// A system call failed.
pub(super) fn supervise(
    mut child: Child,
    signals: &Signals,
    mut attachment: Option<&mut Attachment>,
) -> Result<ExitCode, Failure> {
    let received = signals.running();
    // Not before: the command would have it, too.
    give_up_new_privileges();
    let failed = |error: rustix::io::Errno| Failure::io("cannot watch the command")(error.into());
    let pid = Pid::from_child(&child);
    let process = rustix::process::pidfd_open(pid, PidfdFlags::empty()).map_err(failed)?;
    loop {
        let mut fds = vec![
            PollFd::new(&process, PollFlags::IN),
            PollFd::from_borrowed_fd(received.as_fd(), PollFlags::IN),
        ];
        let own = fds.len();
        let watched = attachment.as_ref().map(|attachment| attachment.fds());
        let watched = watched.into_iter().flatten();
        fds.extend(watched.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)));
        let timeout = attachment
            .as_ref()
            .and_then(|attachment| attachment.timeout());
        let timeout = timeout.and_then(|timeout| Timespec::try_from(timeout).ok());
        match rustix::event::poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(failed(error)),
        }
        let ready = fds[own..].iter().any(|fd| !fd.revents().is_empty());
        let exited = !fds[0].revents().is_empty();
        while let Some(received) = received.next()? {
            forward(received, &process);
        }
        if exited {
            let status = child
                .wait()
                .map_err(Failure::io("cannot wait for the command"))?;
            let code = exit_code(status);
            signals.ending(code);
            return Ok(ExitCode::from(code));
        }
        if let Some(attachment) = &mut attachment {
            attachment.advance(ready);
        }
    }
}

/// Passes a signal on, unless the kernel has given it to the whole process group already.
fn forward(received: Received, process: &OwnedFd) {
    if received.from_kernel {
        return;
    }
    let sent = match Signal::from_named_raw(received.signal) {
        Some(signal) => rustix::process::pidfd_send_signal(process, signal),
        None => Ok(()),
    };
    if let Err(error) = sent {
        log::debug!("cannot pass signal {} on: {error}", received.signal);
    }
}

/// The exit status a shell reports: the command's own, or 128 + the signal that ended it.
fn exit_code(status: ExitStatus) -> u8 {
    let code = status
        .code()
        .unwrap_or_else(|| 128 + status.signal().unwrap_or_default());
    u8::try_from(code).unwrap_or(u8::MAX)
}
