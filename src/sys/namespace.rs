//! User, network and mount namespaces for a process with one thread.
#![allow(unsafe_code)]

use std::fs;
use std::io;

use rustix::thread::UnshareFlags;

/// Enters a fresh network namespace, with the further namespaces of `more`.
///
/// # Errors
/// EPERM, EACCES or ENOSPC where the host forbids it; EINVAL for a user namespace in a process with
/// several threads.
pub fn unshare(user: bool, mount: bool) -> io::Result<()> {
    let mut flags = UnshareFlags::NEWNET;
    if user {
        flags |= UnshareFlags::NEWUSER;
    }
    if mount {
        flags |= UnshareFlags::NEWNS;
    }
    unshare_all(flags)
}

/// Enters fresh namespaces of every kind in `flags`. A fresh pid namespace is the children's, not the
/// caller's (pid_namespaces(7)).
///
/// # Errors
/// As of [`unshare`]; EINVAL for CLONE_FILES, which is no namespace.
pub fn unshare_all(flags: UnshareFlags) -> io::Result<()> {
    if flags.contains(UnshareFlags::FILES) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: the hazard of unshare is CLONE_FILES, which splits the fd table between threads; it
    // is not among the flags, as checked above.
    unsafe { rustix::thread::unshare_unsafe(flags) }?;
    Ok(())
}

/// Maps the user and group that entered the user namespace to root in it. Ids are those from before
/// [`unshare`].
///
/// # Errors
/// EPERM where a security module forbids it.
pub fn map_to_root(uid: u32, gid: u32) -> io::Result<()> {
    map_ids(0, uid, gid)
}

/// Maps the user and group that entered the user namespace to `inside`, both. Ids are those from before
/// [`unshare`].
///
/// # Errors
/// EPERM where a security module forbids it.
pub fn map_ids(inside: u32, uid: u32, gid: u32) -> io::Result<()> {
    map_user(inside, uid)?;
    map_group(inside, gid)
}

/// Maps the user that entered the user namespace to `inside`.
///
/// # Errors
/// EPERM where a security module forbids it.
pub fn map_user(inside: u32, uid: u32) -> io::Result<()> {
    fs::write("/proc/self/uid_map", format!("{inside} {uid} 1"))
}

/// Maps the group that entered the user namespace to `inside`.
///
/// # Errors
/// EPERM where a security module forbids it.
pub fn map_group(inside: u32, gid: u32) -> io::Result<()> {
    // Without CAP_SETGID outside, gid_map can be written only after setgroups is denied
    // (user_namespaces(7)).
    fs::write("/proc/self/setgroups", "deny")?;
    fs::write("/proc/self/gid_map", format!("{inside} {gid} 1"))
}

/// Closes every fd from `first` on: what a parent leaked into a freshly executed process.
pub(crate) fn close_from(first: u32) {
    // SAFETY: called by a process that has just started and owns no fd above its standard ones, so
    // no live object loses its fd. Failure (a kernel before 5.9) leaves them open, which is safe.
    unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, 0) };
}
