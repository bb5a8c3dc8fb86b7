//! How `lanlet up` tells that its network is ready, and goes into the background.
//!
//! With `--detach` the process splits before it has a thread or a descriptor of its own. The first half
//! waits on a pipe; the second one sets the network up with the caller's terminal, so that warnings and
//! errors are seen where the command was given, and leaves that terminal once the network is ready. It is
//! the leader of a session from the start: what is typed meanwhile ends the first half only, and the second
//! one finds nobody at the pipe, and ends.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::path::Path;
use std::process::ExitCode;

use rustix::pipe::PipeFlags;
use rustix::process::{Pid, WaitOptions};

use super::{Failure, logger};
use crate::sys::fork::{Fork, fork};
use crate::sys::inherited;

/// What is written where somebody waits for the network: a line, as s6 wants it.
const READY: &[u8] = b"\n";

/// Which half of the process goes on.
pub(super) enum Half {
    /// The one that was called: the network runs in the other, or could not be started. With the status
    /// to exit with.
    Caller(ExitCode),
    /// The one that runs the network.
    Network(Detached),
}

/// A process that has still to leave its caller's terminal.
pub(super) struct Detached {
    caller: File,
}

/// Splits the process; the caller's half comes back when the other one is ready or has ended.
///
/// # Errors
/// The system refuses.
pub(super) fn split() -> Result<Half, Failure> {
    let failed = || Failure::io("cannot go into the background");
    inherited::close_all().map_err(failed())?;
    let (reader, writer) =
        rustix::pipe::pipe_with(PipeFlags::CLOEXEC).map_err(|error| failed()(error.into()))?;
    match fork().map_err(failed())? {
        Fork::Child => {
            drop(reader);
            rustix::process::setsid().map_err(|error| failed()(error.into()))?;
            Ok(Half::Network(Detached {
                caller: writer.into(),
            }))
        }
        Fork::Parent(pid) => {
            drop(writer);
            wait(reader, pid).map(Half::Caller)
        }
    }
}

/// Waits until the network's process is ready, or for its exit status.
fn wait(reader: OwnedFd, pid: Pid) -> Result<ExitCode, Failure> {
    let mut said = Vec::new();
    File::from(reader)
        .read_to_end(&mut said)
        .map_err(Failure::io("cannot hear from the network's process"))?;
    if said == READY {
        return Ok(ExitCode::SUCCESS);
    }
    let ended =
        rustix::io::retry_on_intr(|| rustix::process::waitpid(Some(pid), WaitOptions::empty()));
    match ended {
        Ok(Some((_, status))) => match (status.exit_status(), status.terminating_signal()) {
            (Some(code), _) => Ok(ExitCode::from(u8::try_from(code).unwrap_or(u8::MAX))),
            (None, Some(signal)) => Err(Failure::because(format!(
                "signal {signal} ended the network's process before it was ready"
            ))),
            (None, None) => Err(Failure::because("the network's process ended too early")),
        },
        _ => Err(Failure::because("the network's process ended too early")),
    }
}

impl Detached {
    /// Leaves the terminal and the directory of the caller, whose half then ends. What is logged from
    /// then on goes to `log`.
    ///
    /// # Errors
    /// The caller has gone, or the system refuses.
    pub(super) fn leave(mut self, log: &File) -> Result<(), Failure> {
        let failed = || Failure::io("cannot leave the terminal");
        let null = File::open("/dev/null").map_err(failed())?;
        std::env::set_current_dir("/").map_err(failed())?;
        rustix::stdio::dup2_stdin(&null)
            .and_then(|()| rustix::stdio::dup2_stdout(log))
            .and_then(|()| rustix::stdio::dup2_stderr(log))
            .map_err(|error| failed()(error.into()))?;
        logger::stderr_has_changed();
        self.caller.write_all(READY).map_err(|error| {
            Failure::because(format!(
                "the command that started the network has ended: {error}"
            ))
        })
    }
}

/// Opens a log file, which only this user reads.
///
/// # Errors
/// It can't be made.
pub(super) fn open_log(path: &Path) -> Result<File, Failure> {
    OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o600)
        .custom_flags(libc::O_NOCTTY)
        .open(path)
        .map_err(Failure::io(format!(
            "cannot open the log {} (--log-file PATH says where else)",
            path.display()
        )))
}

/// The descriptor that somebody waits at for [`tell_ready`].
///
/// # Errors
/// None of this number is open for writing.
pub(super) fn take_ready_fd(number: i32) -> Result<File, Failure> {
    inherited::take(number)
        .map(File::from)
        .map_err(|error| Failure::Usage(format!("--ready-fd {number}: {error}")))
}

/// Says that the network is ready, and closes.
pub(super) fn tell_ready(mut fd: File) {
    if let Err(error) = fd.write_all(READY) {
        log::warn!("cannot tell by --ready-fd that the network is ready: {error}");
    }
}

/// Tells systemd how far the service is (sd_notify(3)), where one asks.
pub(super) fn tell_service_manager(state: &str) {
    let Some(path) = std::env::var("NOTIFY_SOCKET")
        .ok()
        .filter(|path| !path.is_empty())
    else {
        return;
    };
    let sent = || -> std::io::Result<()> {
        let address = match path.strip_prefix('@') {
            Some(name) => SocketAddr::from_abstract_name(name)?,
            None => SocketAddr::from_pathname(&path)?,
        };
        let socket = UnixDatagram::unbound()?;
        socket.connect_addr(&address)?;
        socket.send(state.as_bytes())?;
        socket.shutdown(Shutdown::Both)
    };
    if let Err(error) = sent() {
        log::warn!("cannot tell the service manager at {path}: {error}");
    }
}
