//! A network's name in the runtime directory: its lock file and its socket.
//!
//! Both can be removed while the network runs: logging out removes /run/user/UID, and cleaners of /tmp
//! what is old. The lock on a file without a name keeps nobody out, so the name is claimed anew at once, the
//! kernel saying when (inotify(7)). Where another process was faster, the name is its.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use rustix::fs::inotify::{self, CreateFlags, WatchFlags};

use super::{ControlError, RuntimeDir, file_id, is_at, listen};

/// A network's name, held until dropped.
#[derive(Debug)]
pub struct Claim {
    dir: RuntimeDir,
    name: String,
    listener: Option<UnixListener>,
    socket: PathBuf,
    /// Device and inode of the socket's file.
    socket_id: Option<(u64, u64)>,
    /// The lock file goes with the claim, too. Of other names it stays.
    pub(super) is_private: bool,
    lock: File,
}

impl Claim {
    /// Claims the name and makes its socket.
    pub(super) fn new(dir: &RuntimeDir, name: &str) -> Result<Self, ControlError> {
        let socket = dir.socket(name)?;
        let lock = lock(dir, name)?;
        let listener = listen(&socket)?;
        Ok(Self {
            dir: dir.clone(),
            name: name.to_owned(),
            listener: Some(listener),
            socket_id: file_id(&socket),
            socket,
            is_private: false,
            lock,
        })
    }

    /// The listening socket, non-blocking; once.
    pub fn take_listener(&mut self) -> Option<UnixListener> {
        self.listener.take()
    }

    /// Path of the socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Ends the claim and removes its lock file too: for a name that no other process may want.
    pub fn forget(mut self) {
        self.is_private = true;
    }

    /// Whether lock file and socket are still where others look for them.
    pub(super) fn is_in_place(&self) -> bool {
        self.has_lock() && self.has_socket()
    }

    /// Claims the name again where it was lost, and makes another socket.
    ///
    /// # Errors
    /// [`ControlError::Busy`]: another process has it. Else the directory can't be used, for now.
    pub(super) fn renew(&mut self) -> Result<UnixListener, ControlError> {
        if !self.has_lock() {
            self.lock = lock(&self.dir, &self.name)?;
        }
        let listener = listen(&self.socket)?;
        self.socket_id = file_id(&self.socket);
        Ok(listener)
    }

    /// A descriptor that is readable when something was removed from the directory, or the directory itself.
    ///
    /// # Errors
    /// The kernel gives no inotify instance or watch.
    pub(super) fn watch(&self) -> io::Result<OwnedFd> {
        let inotify = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC)?;
        let removed = WatchFlags::DELETE
            | WatchFlags::MOVED_FROM
            | WatchFlags::DELETE_SELF
            | WatchFlags::MOVE_SELF;
        inotify::add_watch(&inotify, self.dir.path(), removed)?;
        Ok(inotify)
    }

    fn has_lock(&self) -> bool {
        is_at(&self.lock, &self.dir.lock(&self.name))
    }

    fn has_socket(&self) -> bool {
        self.socket_id.is_some() && file_id(&self.socket) == self.socket_id
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        // Another process may have the name. The lock tells: its inode is ours as long as it is open, where the
        // number of a socket's that was removed may be another file's by now.
        if !self.has_lock() {
            return;
        }
        if self.has_socket() {
            let _ = std::fs::remove_file(&self.socket);
        }
        if self.is_private {
            // While it is locked: see `lock`.
            let _ = std::fs::remove_file(self.dir.lock(&self.name));
        }
    }
}

/// Locks the name's file, which is made, and says in it who has it.
fn lock(dir: &RuntimeDir, name: &str) -> Result<File, ControlError> {
    dir.create()?;
    let path = dir.lock(name);
    let mut lock = loop {
        let lock = dir.lock_file(name)?;
        // It may have been removed meanwhile, a private network's by `sweep`: then others would lock
        // another one.
        if is_at(&lock, &path) {
            break lock;
        }
    };
    lock.set_len(0)
        .and_then(|()| writeln!(lock, "{}", std::process::id()))
        .map_err(|error| ControlError::Io {
            action: "write",
            path,
            error,
        })?;
    Ok(lock)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::tests::Scratch;

    #[test]
    fn a_name_that_was_removed_is_claimed_anew_or_another_processs() {
        let scratch = Scratch::new("renew");
        let dir = RuntimeDir::at(scratch.0.join("run"));
        let mut claim = dir.claim("a").unwrap();
        assert!(claim.is_in_place());
        std::fs::remove_file(claim.socket()).unwrap();
        assert!(!claim.is_in_place());
        let listener = claim.renew().unwrap();
        assert!(claim.is_in_place());
        std::os::unix::net::UnixStream::connect(claim.socket()).unwrap();
        drop(listener);

        std::fs::remove_dir_all(dir.path()).unwrap();
        assert!(!claim.is_in_place());
        claim.renew().unwrap();
        assert!(claim.is_in_place());
        assert!(matches!(dir.claim("a"), Err(ControlError::Busy { .. })));

        // Gone with all that is above it, and back.
        std::fs::remove_dir_all(&scratch.0).unwrap();
        assert!(matches!(
            claim.renew(),
            Err(ControlError::RuntimeDirectory { .. })
        ));
        std::fs::create_dir(&scratch.0).unwrap();
        let other = dir.claim("a").unwrap();
        assert!(matches!(claim.renew(), Err(ControlError::Busy { .. })));
        drop(claim);
        assert!(other.is_in_place(), "who has lost the name leaves it alone");
        drop(other);
        assert!(!dir.is_claimed("a"));
    }

    #[test]
    fn a_removal_is_told() {
        let scratch = Scratch::new("watch");
        let dir = RuntimeDir::at(scratch.0.join("run"));
        let claim = dir.claim("a").unwrap();
        let watch = claim.watch().unwrap();
        let mut events = [0; 4096];
        assert!(
            rustix::io::read(&watch, &mut events).is_err(),
            "nothing yet"
        );
        std::fs::remove_dir_all(dir.path()).unwrap();
        assert!(rustix::io::read(&watch, &mut events).unwrap() > 0);
    }
}
