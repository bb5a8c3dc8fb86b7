//! User, network and mount namespaces for a process with one thread.
#![allow(unsafe_code)]

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::thread::{
    LinkNameSpaceType, ThreadNameSpaceType, UnshareFlags, move_into_link_name_space,
    move_into_thread_name_spaces,
};

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

/// The user namespace that owns another namespace.
///
/// # Errors
/// EPERM where it is neither the caller's nor below that.
pub fn owner_of(namespace: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    /// linux/nsfs.h: _IO(0xb7, 1).
    const NS_GET_USERNS: libc::c_ulong = 0xb701;
    // SAFETY: NS_GET_USERNS takes no argument. A descriptor of another kind refuses the number.
    let owner = unsafe { libc::ioctl(namespace.as_raw_fd(), NS_GET_USERNS as _) };
    if owner < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call gave a fresh descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(owner) })
}

/// Enters a network namespace, and before it the user namespace that owns it, if that is another one
/// than the caller's. The process must have one thread.
///
/// # Errors
/// EPERM where the caller has no right over it.
pub fn enter_network(namespace: BorrowedFd<'_>) -> io::Result<()> {
    let owner = owner_of(namespace)?;
    let id = |stat: rustix::fs::Stat| (stat.st_dev, stat.st_ino);
    let ours = id(rustix::fs::stat("/proc/self/ns/user")?);
    if id(rustix::fs::fstat(&owner)?) != ours {
        move_into_link_name_space(owner.as_fd(), Some(LinkNameSpaceType::User))?;
    }
    Ok(move_into_link_name_space(
        namespace,
        Some(LinkNameSpaceType::Network),
    )?)
}

/// Enters the network namespace of a process, by its pidfd, and its user and mount namespaces where these
/// are others than the caller's. The process that enters must have one thread.
///
/// # Errors
/// EPERM where the caller has no right over them, ESRCH for a process that has ended.
pub fn enter_all_of(process: BorrowedFd<'_>) -> io::Result<()> {
    let (user, mount) = (ThreadNameSpaceType::USER, ThreadNameSpaceType::MOUNT);
    let network = ThreadNameSpaceType::NETWORK;
    let all = move_into_thread_name_spaces(process, user | mount | network);
    // A user namespace that one is in already is refused (EINVAL), and so is a mount namespace that is
    // shared with an outer user namespace (EPERM). Each call enters all of its namespaces or none.
    let entered =
        [mount | network, user | network, network]
            .into_iter()
            .fold(all, |entered, some| {
                entered
                    .or_else(|first| move_into_thread_name_spaces(process, some).map_err(|_| first))
            });
    Ok(entered?)
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
