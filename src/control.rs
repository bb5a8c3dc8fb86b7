//! The control plane: how a command finds the process that runs a network, and what it asks of it.
//!
//! A running network NAME has two files in the runtime directory: `NAME.lock`, held with flock for as
//! long as the process lives (the kernel lets go of it on SIGKILL too), and `NAME.sock`, a Unix stream
//! socket. Who holds the lock owns the socket's name, so a socket left over from a crash is replaced
//! without asking anybody. The lock files of `lanlet up` stay when it ends. A private network is called
//! after its command, `exec-1234`, and its lock file goes with it, or is swept away where the process was
//! killed ([`RuntimeDir::sweep`]); who locks a file looks whether it is still the one of that name.
//!
//! Trust: the directory belongs to the user and nobody else writes to it, the socket has mode 0600,
//! and both ends check the other's uid. Guests have no path to it: it is no IP socket, and what `lanlet exec`
//! runs is refused ([`peer`](crate::sys::peer)).

pub mod api;
pub mod client;
pub mod lease_file;
pub mod resolver;
pub mod server;

mod claim;
mod message;
mod running;

pub use self::claim::Claim;
pub use self::running::{Running, is_private};

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Read, Seek};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{FlockOperation, Mode};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

/// Longest path of a Unix socket: sun_path without its NUL (unix(7)).
pub const SOCKET_PATH_MAX: usize = 107;
/// Connections waiting to be accepted: a burst of `lanlet exec` at once.
const BACKLOG: i32 = 64;
/// Bits of a mode that let someone else put files into a directory.
const WRITABLE_BY_OTHERS: u32 = 0o022;
/// Tries to take a name's lock: a command that looks whether the network runs holds it, shared, for
/// microseconds.
const CLAIM_TRIES: u32 = 3;
/// Pause between two tries.
const CLAIM_PAUSE: Duration = Duration::from_millis(20);

/// Why the control plane could not be reached or set up. Names the remedy where there is one.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// The runtime directory can't be used.
    #[error(
        "runtime directory {}: {reason}; set LANLET_RUNTIME_DIR to a directory of your own",
        path.display()
    )]
    RuntimeDirectory {
        /// The directory.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A network of this name runs.
    #[error(
        "network '{name}' is already running{}: attach to it with --name {name}, stop it with \
         'lanlet down --name {name}', or choose another --name",
        pid_note(*pid)
    )]
    Busy {
        /// The network.
        name: String,
        /// Who runs it, if the lock file says.
        pid: Option<u32>,
    },
    /// No network of this name runs.
    #[error(
        "network '{name}' is not running{}: start it with 'lanlet up -d --name {name}'",
        running_note(running)
    )]
    NotRunning {
        /// The network.
        name: String,
        /// Those that do.
        running: Vec<String>,
    },
    /// The lock is held, but nobody answers at the socket.
    #[error(
        "network '{name}' does not answer{}: it may be stopped or shutting down; end that process if it stays",
        pid_note(*pid)
    )]
    NoAnswer {
        /// The network.
        name: String,
        /// Who runs it, if the lock file says.
        pid: Option<u32>,
    },
    /// The socket's path does not fit a Unix socket address.
    #[error(
        "{} has {} bytes, a socket's path at most {SOCKET_PATH_MAX}: set LANLET_RUNTIME_DIR to a shorter one",
        path.display(), path.as_os_str().len()
    )]
    PathTooLong {
        /// The path.
        path: PathBuf,
    },
    /// A system call on a file or socket failed.
    #[error("cannot {action} {}: {error}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        error: io::Error,
    },
    /// The other end belongs to someone else.
    #[error("network '{name}' is run by uid {uid}, not by you")]
    Untrusted {
        /// The network.
        name: String,
        /// The other end's user.
        uid: u32,
    },
    /// The other end hung up.
    #[error("network '{name}': closed the connection; is it shutting down?")]
    Closed {
        /// The network.
        name: String,
    },
    /// The other end says something unexpected.
    #[error("network '{name}': {reason}")]
    Protocol {
        /// The network.
        name: String,
        /// What.
        reason: String,
    },
    /// The network refused the request.
    #[error("{0}")]
    Refused(String),
}

fn pid_note(pid: Option<u32>) -> String {
    pid.map(|pid| format!(" (pid {pid})")).unwrap_or_default()
}

fn running_note(running: &[String]) -> String {
    match running {
        [] => String::new(),
        names => format!(" (these are: {})", names.join(", ")),
    }
}

/// The directory with the control sockets of the networks this user runs.
#[derive(Clone, Debug)]
pub struct RuntimeDir {
    path: PathBuf,
}

impl RuntimeDir {
    /// The directory by the environment: `$LANLET_RUNTIME_DIR`, else `$XDG_RUNTIME_DIR/lanlet`, else
    /// `/run/lanlet` for root, else `/tmp/lanlet-UID`. Nothing is touched yet.
    pub fn from_env() -> Self {
        let var = |key| {
            std::env::var_os(key)
                .filter(|value| !value.is_empty())
                .map(PathBuf::from)
        };
        let uid = rustix::process::geteuid();
        let path = var("LANLET_RUNTIME_DIR")
            .or_else(|| Some(var("XDG_RUNTIME_DIR")?.join("lanlet")))
            .unwrap_or_else(|| match uid.is_root() {
                true => PathBuf::from("/run/lanlet"),
                false => PathBuf::from(format!("/tmp/lanlet-{uid}")),
            });
        // The process may leave its directory; where that is gone already, the path leads nowhere.
        let path = std::path::absolute(&path).unwrap_or(path);
        Self { path }
    }

    /// A directory by its path.
    pub fn at(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into() }
    }

    /// The directory's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where the network's socket is.
    ///
    /// # Errors
    /// The path is too long for a socket.
    pub fn socket(&self, name: &str) -> Result<PathBuf, ControlError> {
        let path = self.path.join(format!("{name}.sock"));
        if path.as_os_str().as_bytes().len() > SOCKET_PATH_MAX {
            return Err(ControlError::PathTooLong { path });
        }
        Ok(path)
    }

    /// Where a socket of this process's own can be, for a VMM that it starts. The directory is made.
    ///
    /// # Errors
    /// The path is too long for a socket, or the directory can't be used.
    pub fn own_socket(&self, what: &str) -> Result<PathBuf, ControlError> {
        // No network's name begins with a dot.
        let path = self.socket(&format!(".{what}-{}", std::process::id()))?;
        self.create()?;
        Ok(path)
    }

    fn lock(&self, name: &str) -> PathBuf {
        self.path.join(format!("{name}.lock"))
    }

    fn refuse(&self, reason: impl Into<String>) -> ControlError {
        ControlError::RuntimeDirectory {
            path: self.path.clone(),
            reason: reason.into(),
        }
    }

    /// Checks that the directory is this user's own and that nobody else writes to it; `false` if
    /// there is none. In /tmp anyone may have made it first, or a link to elsewhere.
    fn exists_safely(&self) -> Result<bool, ControlError> {
        let meta = match std::fs::symlink_metadata(&self.path) {
            Ok(meta) => meta,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            Err(error) => return Err(self.refuse(error.to_string())),
        };
        if meta.is_symlink() {
            return Err(self.refuse("is a symbolic link"));
        }
        if !meta.is_dir() {
            return Err(self.refuse("is not a directory"));
        }
        if meta.uid() != rustix::process::geteuid().as_raw() {
            return Err(self.refuse(format!("belongs to uid {}, not to you", meta.uid())));
        }
        if meta.mode() & WRITABLE_BY_OTHERS != 0 {
            return Err(self.refuse(format!(
                "others may write to it (mode {:o})",
                meta.mode() & 0o7777
            )));
        }
        Ok(true)
    }

    fn create(&self) -> Result<(), ControlError> {
        if self.exists_safely()? {
            return Ok(());
        }
        match DirBuilder::new().mode(0o700).create(&self.path) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(self.refuse(format!("cannot make it: {error}"))),
        }
        self.exists_safely().map(drop)
    }

    /// Claims the network's name and makes its socket.
    ///
    /// # Errors
    /// The name is taken, or the directory can't be used.
    pub fn claim(&self, name: &str) -> Result<Claim, ControlError> {
        Claim::new(self, name)
    }

    /// Opens the network's lock file and locks it.
    fn lock_file(&self, name: &str) -> Result<File, ControlError> {
        let path = self.lock(name);
        let mut lock = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
            .open(&path)
            .map_err(|error| ControlError::RuntimeDirectory {
                path: self.path.clone(),
                reason: format!("cannot open {name}.lock in it: {error}"),
            })?;
        let mut tries = CLAIM_TRIES;
        while let Err(error) = rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            if error != rustix::io::Errno::WOULDBLOCK {
                return Err(ControlError::Io {
                    action: "lock",
                    path,
                    error: error.into(),
                });
            }
            tries -= 1;
            if tries == 0 {
                let pid = read_pid(&mut lock);
                return Err(ControlError::Busy {
                    name: name.to_owned(),
                    pid,
                });
            }
            std::thread::sleep(CLAIM_PAUSE);
        }
        Ok(lock)
    }

    /// Whether a process holds the network's name.
    pub fn is_claimed(&self, name: &str) -> bool {
        self.holder(name).is_some()
    }

    /// Who runs the network, by its lock: `None` if nobody holds it.
    pub(crate) fn holder(&self, name: &str) -> Option<Option<u32>> {
        let mut lock = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
            .open(self.lock(name))
            .ok()?;
        match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockShared) {
            Err(rustix::io::Errno::WOULDBLOCK) => Some(read_pid(&mut lock)),
            _ => None,
        }
    }
}

/// Device and inode of what is at the path.
fn file_id(path: &Path) -> Option<(u64, u64)> {
    let meta = std::fs::symlink_metadata(path).ok()?;
    Some((meta.dev(), meta.ino()))
}

/// Whether the path still leads to this open file.
fn is_at(file: &File, path: &Path) -> bool {
    let ours = file.metadata().ok().map(|meta| (meta.dev(), meta.ino()));
    ours.is_some() && file_id(path) == ours
}

/// A lock file's pid line is at most this long.
const PID_LINE_MAX: u64 = 16;

fn read_pid(lock: &mut File) -> Option<u32> {
    let mut text = String::new();
    lock.rewind().ok()?;
    lock.take(PID_LINE_MAX).read_to_string(&mut text).ok()?;
    text.trim().parse().ok()
}

/// Binds the socket in place of a stale one. Its mode is set between bind and listen: nobody can
/// connect before it is right.
fn listen(path: &Path) -> Result<UnixListener, ControlError> {
    let failed = |action, error: io::Error| ControlError::Io {
        action,
        path: path.to_owned(),
        error,
    };
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(failed("replace", error));
        }
        _ => {}
    }
    let bound = || -> rustix::io::Result<OwnedFd> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket =
            rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
        rustix::fs::chmod(path, Mode::RUSR | Mode::WUSR)?;
        rustix::net::listen(socket.as_fd(), BACKLOG)?;
        Ok(socket)
    };
    bound()
        .map(UnixListener::from)
        .map_err(|error| failed("listen at", error.into()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::fs::symlink;

    /// A directory of the test's own, removed at its end.
    pub(super) struct Scratch(pub PathBuf);

    impl Scratch {
        pub(super) fn new(label: &str) -> Self {
            let path =
                std::env::temp_dir().join(format!("lanlet-test-{}-{label}", std::process::id()));
            let _ = std::fs::remove_dir_all(&path);
            DirBuilder::new().mode(0o700).create(&path).unwrap();
            Self(path)
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn a_name_is_claimed_once_and_free_again_after() {
        let scratch = Scratch::new("claim");
        let dir = RuntimeDir::at(scratch.0.join("run"));
        assert!(dir.holder("a").is_none());
        let claim = dir.claim("a").unwrap();
        assert_eq!(std::fs::metadata(dir.path()).unwrap().mode() & 0o777, 0o700);
        assert_eq!(
            std::fs::metadata(claim.socket()).unwrap().mode() & 0o777,
            0o600
        );
        assert_eq!(dir.holder("a"), Some(Some(std::process::id())));
        let busy = dir.claim("a").unwrap_err();
        let expected = format!(
            "network 'a' is already running (pid {}): ",
            std::process::id()
        );
        assert!(busy.to_string().starts_with(&expected), "{busy}");
        dir.claim("b").unwrap();
        drop(claim);
        assert!(dir.holder("a").is_none());
        dir.claim("a").unwrap();
    }

    #[test]
    fn stale_socket_is_replaced() {
        let scratch = Scratch::new("stale");
        let dir = RuntimeDir::at(&scratch.0);
        drop(UnixListener::bind(dir.socket("a").unwrap()).unwrap());
        assert!(dir.socket("a").unwrap().exists());
        let claim = dir.claim("a").unwrap();
        std::os::unix::net::UnixStream::connect(claim.socket()).unwrap();
    }

    #[test]
    fn directories_that_others_control_are_refused() {
        let scratch = Scratch::new("perm");
        let open = scratch.0.join("open");
        std::fs::create_dir(&open).unwrap();
        std::fs::set_permissions(&open, std::fs::Permissions::from_mode(0o770)).unwrap();
        let error = RuntimeDir::at(&open).claim("a").unwrap_err().to_string();
        assert!(
            error.contains("others may write") && error.contains("LANLET_RUNTIME_DIR"),
            "{error}"
        );

        let link = scratch.0.join("link");
        symlink(&scratch.0, &link).unwrap();
        let error = RuntimeDir::at(&link).claim("a").unwrap_err().to_string();
        assert!(error.contains("symbolic link"), "{error}");

        let file = scratch.0.join("file");
        std::fs::write(&file, "").unwrap();
        let error = RuntimeDir::at(&file).claim("a").unwrap_err().to_string();
        assert!(error.contains("not a directory"), "{error}");
    }

    #[test]
    fn long_path_is_refused_with_its_length() {
        let dir = RuntimeDir::at(format!("/tmp/{}", "x".repeat(100)));
        let error = dir.claim("default").unwrap_err();
        assert!(matches!(error, ControlError::PathTooLong { .. }), "{error}");
    }

    /// A lock file that is a link elsewhere must not be followed and truncated.
    #[test]
    fn lock_link_is_not_followed() {
        let scratch = Scratch::new("locklink");
        let victim = scratch.0.join("victim");
        std::fs::write(&victim, "precious").unwrap();
        symlink(&victim, scratch.0.join("a.lock")).unwrap();
        assert!(RuntimeDir::at(&scratch.0).claim("a").is_err());
        assert_eq!(std::fs::read_to_string(victim).unwrap(), "precious");
    }
}
