//! `lanlet exec --into`: a command beside that of a guest in namespaces.
//!
//! The child (`into-init`) enters the namespaces of the guest's process by its pidfd, which the network
//! has had since the guest was attached: its number may be another process's by now, the pidfd is not.

use std::ffi::OsString;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};

use rustix::io::FdFlags;
use rustix::process::geteuid;

use super::signals::Signals;
use super::{Failure, child};
use crate::sys::{inherited, namespace};
use crate::tap::guest::ids;

/// The rest of `into-init`'s command line.
#[derive(clap::Args, Debug)]
pub(super) struct InitArgs {
    #[command(flatten)]
    origin: child::Origin,
    /// Number of the inherited pidfd.
    process: i32,
    /// The command.
    #[arg(last = true, required = true)]
    command: Vec<OsString>,
}

/// Runs a command in the namespaces of a process.
pub(super) fn enter(
    process: OwnedFd,
    command: &[OsString],
    signals: &Signals,
) -> Result<ExitCode, Failure> {
    rustix::io::fcntl_setfd(&process, FdFlags::empty())
        .map_err(|error| Failure::io("cannot pass the guest's process on")(error.into()))?;
    let child = child::this_program()
        .arg("into-init")
        .args(child::Origin::words())
        .arg(process.as_raw_fd().to_string())
        .arg("--")
        .args(command)
        .spawn()
        .map_err(Failure::io("cannot start a process"))?;
    drop(process);
    child::supervise(child, signals, None)
}

/// Enters, and becomes the command. Returns only if that fails.
pub(super) fn init(args: &InitArgs) -> Result<ExitCode, Failure> {
    let process = inherited::take(args.process).map_err(Failure::io("no process was inherited"))?;
    args.origin.restore()?;
    let directory = std::env::current_dir();
    namespace::enter_all_of(process.as_fd())
        .map_err(Failure::io("cannot enter the guest's namespaces"))?;
    drop(process);
    // A mount namespace is entered at its root (setns(2)).
    if let Err(error) = directory.and_then(std::env::set_current_dir) {
        log::warn!("the command runs in /: {error}");
    }
    if !geteuid().is_root() {
        ids::keep_capabilities().unwrap_or_else(|error| {
            log::warn!("the command has no capabilities in its namespace: {error}");
        });
    }
    // A change of credentials clears it, so not before.
    args.origin.die_with_parent()?;
    let (program, arguments) = args.command.split_first().ok_or(Failure::Reported)?;
    let error = Command::new(program).args(arguments).exec();
    Ok(child::cannot_run(program, &error))
}
