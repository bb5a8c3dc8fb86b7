//! What a process gives up for good, so that a hole in it opens less.

use std::io;

use rustix::process::{
    DumpableBehavior, Resource, Rlimit, getrlimit, set_dumpable_behavior, setrlimit,
};

/// Nothing that this thread executes, or threads and processes that it makes from here on, gains rights by
/// a setuid bit or by capabilities of a file (PR_SET_NO_NEW_PRIVS). Not for who becomes or starts a command
/// of the user's: that could run no `sudo` and no `newuidmap` either.
///
/// # Errors
/// A kernel before 3.5.
pub fn no_new_privileges() -> io::Result<()> {
    Ok(rustix::thread::set_no_new_privs(true)?)
}

/// No other process of the user's reads this one's memory or traces it, and no core file has it. Until the
/// next execve. Files below /proc/self are root's from here on: maps of ids have to be written before.
///
/// # Errors
/// A security module forbids it.
pub fn not_dumpable() -> io::Result<()> {
    Ok(set_dumpable_behavior(DumpableBehavior::NotDumpable)?)
}

/// Sets the soft limit of core files' sizes to zero; what it was, `None` for no limit.
///
/// # Errors
/// Of setrlimit.
pub fn no_core_files() -> io::Result<Option<u64>> {
    let limit = getrlimit(Resource::Core);
    set_core_limit(Some(0))?;
    Ok(limit.current)
}

/// Sets the soft limit of core files' sizes.
///
/// # Errors
/// It is above the hard limit.
pub fn set_core_limit(current: Option<u64>) -> io::Result<()> {
    let maximum = getrlimit(Resource::Core).maximum;
    Ok(setrlimit(Resource::Core, Rlimit { current, maximum })?)
}
