//! Who is at the other end of a unix socket that was accepted.
//!
//! The control socket, vhost-user ports and forwards from unix sockets give power over the network, or
//! a place in it. A guest of `lanlet exec` has its user's files, these sockets among them, and its user's
//! id; what tells it from its user is the network namespace that its socket was made in.
//!
//! # Kernel behaviour relied on
//! - The accepted socket is of the namespace of the one that connected (net/unix/af_unix.c,
//!   `unix_stream_connect`), wherever the file lies and whoever holds the descriptor later.
//! - SIOCGSKNS (net/socket.c, `sock_ioctl`) answers EPERM where we have no CAP_NET_ADMIN over that
//!   namespace. We have it over every namespace whose user namespace, or an ancestor of it, our user
//!   made: those of guests, and those that guests make. ENOTTY: a kernel before 4.10; EINVAL: one
//!   without network namespaces. Any other error (EMFILE, ENOMEM) says nothing about the peer.
//!
//! So a container of another owner with the socket mounted into it (docker's daemon is root's) is no
//! guest, and its user decides; for a lanlet that root runs every other namespace counts as a guest's.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};

use rustix::io::Errno;

use super::socket;

/// Why a peer is refused.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// Another user, neither ours nor root.
    #[error("uid {0} was refused")]
    User(u32),
    /// A network namespace that we have power over and are not in.
    #[error("a guest was refused")]
    Guest,
    /// Nobody can tell.
    #[error("a client was refused, since it may be a guest: {0}")]
    Unknown(io::Error),
}

/// Whether this user may talk to this process: the same one, or root.
pub fn is_trusted_user(uid: u32) -> bool {
    uid == 0 || uid == rustix::process::geteuid().as_raw()
}

/// Checks who has connected; `allow_guests`: it may be a guest.
///
/// # Errors
/// It is refused.
pub fn check(stream: BorrowedFd<'_>, allow_guests: bool) -> Result<(), Refusal> {
    let (_, uid) = socket::peer(stream).map_err(Refusal::Unknown)?;
    if !is_trusted_user(uid) {
        return Err(Refusal::User(uid));
    }
    match allow_guests {
        true => Ok(()),
        false => check_namespace(socket::network_namespace(stream)),
    }
}

/// Decides by what the kernel said of the peer's namespace.
fn check_namespace(theirs: io::Result<OwnedFd>) -> Result<(), Refusal> {
    let theirs = match theirs {
        Ok(theirs) => theirs,
        Err(error) => {
            return match Errno::from_io_error(&error) {
                Some(Errno::PERM | Errno::NOTTY | Errno::INVAL) => Ok(()),
                _ => Err(Refusal::Unknown(error)),
            };
        }
    };
    let id = |stat: rustix::fs::Stat| (stat.st_dev, stat.st_ino);
    let unknown = |errno: Errno| Refusal::Unknown(errno.into());
    let ours = rustix::fs::stat("/proc/self/ns/net").map_err(unknown)?;
    let theirs = rustix::fs::fstat(theirs).map_err(unknown)?;
    match id(ours) == id(theirs) {
        true => Ok(()),
        false => Err(Refusal::Guest),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    #[test]
    fn only_two_answers_mean_no_guest_and_the_rest_refuses() {
        let said = |errno: Errno| check_namespace(Err(errno.into()));
        for good in [Errno::PERM, Errno::NOTTY, Errno::INVAL] {
            assert!(said(good).is_ok(), "{good}");
        }
        for bad in [
            Errno::MFILE,
            Errno::NFILE,
            Errno::NOMEM,
            Errno::INTR,
            Errno::BADF,
        ] {
            assert!(matches!(said(bad), Err(Refusal::Unknown(_))), "{bad}");
        }
        let odd = std::io::Error::other("no errno");
        assert!(matches!(
            check_namespace(Err(odd)),
            Err(Refusal::Unknown(_))
        ));
        let own = std::fs::File::open("/proc/self/ns/net").unwrap();
        assert!(check_namespace(Ok(own.into())).is_ok());
        let other = std::fs::File::open("/proc/self/ns/mnt").unwrap();
        assert!(matches!(
            check_namespace(Ok(other.into())),
            Err(Refusal::Guest)
        ));
    }

    #[test]
    fn this_process_is_no_stranger() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        assert!(check(ours.as_fd(), false).is_ok());
        assert!(!is_trusted_user(rustix::process::geteuid().as_raw() + 1));
    }
}
