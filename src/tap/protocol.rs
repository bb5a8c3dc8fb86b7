//! What lanlet and its namespace helper say to each other: JSON, one value per SEQPACKET message.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::{TapError, WireKind, WireOptions};
use crate::port::KernelDrops;
use crate::sys::fd_pass;

/// Longest message: an error text with paths in it.
const MESSAGE_LEN_MAX: usize = 8 * 1024;

/// Asked of the helper. The first message carries the fd for [`Event`]s.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Request {
    /// Sent once, with the helper's end of the event socket.
    Start,
    /// Make a wire.
    Create(WireOptions),
    /// Take a wire down. Its fds are the caller's to close.
    Destroy(u64),
    /// The kernel's counters of a wire.
    Drops(u64),
}

/// The helper's answer.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Reply {
    /// To `Start` and `Destroy`.
    Done,
    /// To `Create`; the message carries the VMM's fds, then the switch's, then the netlink socket.
    Wire {
        id: u64,
        kind: WireKind,
        vm_ifname: String,
        sw_ifname: String,
        /// How many of the fds are the VMM's.
        vm_queues: usize,
        uso: bool,
        /// Why it is not the kind that was tried first.
        fallback: Option<TapError>,
    },
    /// To `Drops`.
    Drops(KernelDrops),
    /// To any.
    Failed(TapError),
}

/// Sent by the helper when it happens.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Event {
    /// The VMM's tap of this wire is gone: its last fd was closed.
    Gone(u64),
}

/// Sends one message.
pub(super) fn send<T: Serialize>(
    socket: BorrowedFd<'_>,
    message: &T,
    fds: &[BorrowedFd<'_>],
) -> io::Result<()> {
    let bytes = serde_json::to_vec(message)?;
    if bytes.len() > MESSAGE_LEN_MAX {
        return Err(io::ErrorKind::InvalidData.into());
    }
    fd_pass::send(socket, &bytes, fds)
}

/// Receives one message; `None` when the peer is gone.
pub(super) fn recv<T: DeserializeOwned>(
    socket: BorrowedFd<'_>,
) -> io::Result<Option<(T, Vec<OwnedFd>)>> {
    let mut buffer = [0; MESSAGE_LEN_MAX];
    match fd_pass::recv(socket, &mut buffer) {
        Ok((0, _)) => Ok(None),
        Ok((len, fds)) => Ok(Some((serde_json::from_slice(&buffer[..len])?, fds))),
        Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Ok(None),
        Err(error) => Err(error),
    }
}
