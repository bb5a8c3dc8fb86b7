//! Splitting a process in two.
#![allow(unsafe_code)]

use std::io;

use rustix::process::Pid;

/// Which of the two this is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fork {
    /// The one that was there, with the new one's number.
    Parent(Pid),
    /// The new one.
    Child,
}

/// Splits this process, which may have one thread only.
///
/// # Errors
/// Of fork, or there are more threads.
pub fn fork() -> io::Result<Fork> {
    if std::fs::read_dir("/proc/self/task")?.count() != 1 {
        return Err(io::Error::other("the process has several threads"));
    }
    // SAFETY: with one thread nobody else holds a lock (the allocator's, stdio's) that would stay locked
    // in the child, so the child may run any code. The caller's values exist in both processes; what
    // they own are descriptors and memory, of which each process has copies of its own.
    match unsafe { libc::fork() } {
        0 => Ok(Fork::Child),
        -1 => Err(io::Error::last_os_error()),
        pid => Ok(Fork::Parent(
            Pid::from_raw(pid).ok_or(io::ErrorKind::InvalidData)?,
        )),
    }
}
