//! A netlink request/reply socket: just enough of netlink(7) for rtnetlink and tc.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};

/// `struct nlmsghdr`.
const HEADER_LEN: usize = 16;
/// Answers come at once from the kernel: past this the fd is not what it should be.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// Largest answer: an RTM_NEWLINK with all its attributes is some 1,500 bytes.
const ANSWER_LEN: usize = 16 * 1024;

/// A part of a dump.
const DUMP_LEN: usize = 32 * 1024;

/// What the kernel answered instead of "done".
#[derive(Debug)]
pub struct NetlinkError {
    /// The error.
    pub errno: Errno,
    /// The kernel's own words (extended ack), where it has some.
    pub text: Option<String>,
}

impl fmt::Display for NetlinkError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.text {
            Some(text) => write!(f, "{text} ({})", io::Error::from(self.errno)),
            None => io::Error::from(self.errno).fmt(f),
        }
    }
}

impl std::error::Error for NetlinkError {}

impl From<Errno> for NetlinkError {
    fn from(errno: Errno) -> Self {
        Self { errno, text: None }
    }
}

/// A message under construction.
pub struct Message(Vec<u8>);

impl Message {
    /// A request of type `kind` (RTM_*) with NLM_F_* `flags` besides NLM_F_REQUEST.
    pub fn new(kind: u16, flags: i32) -> Self {
        let flags = (flags | libc::NLM_F_REQUEST) as u16;
        let mut bytes = vec![0; HEADER_LEN];
        bytes[4..6].copy_from_slice(&kind.to_ne_bytes());
        bytes[6..8].copy_from_slice(&flags.to_ne_bytes());
        Self(bytes)
    }

    /// Appends the bytes of a fixed header, field by field.
    pub fn put(&mut self, bytes: &[u8]) -> &mut Self {
        self.0.extend_from_slice(bytes);
        self
    }

    /// Appends an attribute.
    pub fn attribute(&mut self, kind: u16, value: &[u8]) -> &mut Self {
        self.nest(kind, |message| {
            message.put(value);
        })
    }

    /// Appends an attribute made of what `fill` appends.
    pub fn nest(&mut self, kind: u16, fill: impl FnOnce(&mut Self)) -> &mut Self {
        let start = self.0.len();
        self.put(&[0; 2]).put(&kind.to_ne_bytes());
        fill(self);
        let len = (self.0.len() - start) as u16;
        self.0[start..start + 2].copy_from_slice(&len.to_ne_bytes());
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        self
    }

    fn finish(mut self, sequence: u32) -> Vec<u8> {
        let len = self.0.len() as u32;
        self.0[..4].copy_from_slice(&len.to_ne_bytes());
        self.0[8..12].copy_from_slice(&sequence.to_ne_bytes());
        self.0
    }
}

/// The attributes in `bytes`, in order.
pub fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let len = usize::from(u16_at(bytes, 0)?);
        let kind = u16_at(bytes, 2)? & !(libc::NLA_F_NESTED | libc::NLA_F_NET_BYTEORDER) as u16;
        let value = bytes.get(4..len)?;
        bytes = bytes.get(len.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

/// The `u16` at `bytes[at..]`, in host order.
pub fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

/// The `u32` at `bytes[at..]`, in host order.
pub fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

/// The `u64` at `bytes[at..]`, in host order.
pub fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_ne_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}

/// A NETLINK_ROUTE socket. It speaks for the network namespace it was opened in, wherever its fd is
/// passed later.
#[derive(Debug)]
pub struct RouteSocket {
    fd: OwnedFd,
    sequence: u32,
}

impl RouteSocket {
    /// Opens a socket in the caller's network namespace that gets the multicast `groups` (RTMGRP_*).
    ///
    /// # Errors
    /// Those of socket(2) and bind(2).
    pub fn open(groups: u32) -> io::Result<Self> {
        let fd = rustix::net::socket_with(
            AddressFamily::NETLINK,
            SocketType::RAW,
            SocketFlags::CLOEXEC,
            None,
        )?;
        rustix::net::bind(&fd, &SocketAddrNetlink::new(0, groups))?;
        for option in [libc::NETLINK_EXT_ACK, libc::NETLINK_CAP_ACK] {
            // A kernel before 4.12 gives errors without words.
            let _ = enable(fd.as_fd(), option);
        }
        Self::from_fd(fd)
    }

    /// Takes a socket that another process opened in its namespace.
    ///
    /// # Errors
    /// EPROTOTYPE when `fd` is no NETLINK_ROUTE socket.
    pub fn from_fd(fd: OwnedFd) -> io::Result<Self> {
        use rustix::net::sockopt::{socket_domain, socket_protocol};
        // NETLINK_ROUTE is protocol number 0, which reads as no protocol.
        if socket_domain(&fd)? != AddressFamily::NETLINK || socket_protocol(&fd)?.is_some() {
            return Err(Errno::PROTOTYPE.into());
        }
        set_socket_timeout(&fd, Timeout::Recv, Some(ANSWER_TIMEOUT))?;
        Ok(Self { fd, sequence: 0 })
    }

    /// The socket, to be passed to another process.
    pub fn into_fd(self) -> OwnedFd {
        self.fd
    }

    /// Sends `message`; what the kernel answered, without its header: `None` for a plain ack.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn request(&mut self, message: Message) -> Result<Option<Vec<u8>>, NetlinkError> {
        self.sequence = self.sequence.wrapping_add(1);
        let bytes = message.finish(self.sequence);
        rustix::net::send(&self.fd, &bytes, SendFlags::empty())?;
        let mut buffer = vec![0; ANSWER_LEN];
        loop {
            let len = rustix::io::retry_on_intr(|| {
                rustix::net::recv(&self.fd, &mut buffer[..], RecvFlags::empty())
            })?
            .0;
            let Some((kind, sequence, body)) = messages(&buffer[..len]).next() else {
                return Err(Errno::BADMSG.into());
            };
            if sequence != self.sequence {
                continue;
            }
            if i32::from(kind) != libc::NLMSG_ERROR {
                return Ok(Some(body.to_vec()));
            }
            return match error(body) {
                None => Ok(None),
                Some(error) => Err(error),
            };
        }
    }

    /// Asks for all there is of something, and shows the body of each message until `sink` has enough.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn dump(
        &mut self,
        message: Message,
        sink: &mut dyn FnMut(&[u8]) -> bool,
    ) -> io::Result<()> {
        self.sequence = self.sequence.wrapping_add(1);
        let bytes = message.finish(self.sequence);
        rustix::net::send(&self.fd, &bytes, SendFlags::empty())?;
        // The kernel fills what it is given, 32 KiB at most (net/netlink/af_netlink.c, netlink_dump).
        let mut buffer = vec![0; DUMP_LEN];
        let mut wants_more = true;
        loop {
            let len = rustix::io::retry_on_intr(|| {
                rustix::net::recv(&self.fd, &mut buffer[..], RecvFlags::empty())
            })?
            .0;
            for (kind, sequence, body) in messages(&buffer[..len]) {
                match i32::from(kind) {
                    _ if sequence != self.sequence => {}
                    libc::NLMSG_DONE => return Ok(()),
                    libc::NLMSG_ERROR => {
                        return error(body).map_or(Ok(()), |error| Err(error.errno.into()));
                    }
                    // What is left has to be read, or it would be the next one's answer.
                    _ => wants_more = wants_more && sink(body),
                }
            }
        }
    }

    /// The next datagram of the groups joined, without waiting: type and body of its messages.
    ///
    /// # Errors
    /// EAGAIN when there is none; ENOBUFS when some were lost.
    pub fn notification(&self) -> io::Result<Vec<(u16, Vec<u8>)>> {
        let mut buffer = vec![0; ANSWER_LEN];
        let (len, _) = rustix::net::recv(&self.fd, &mut buffer[..], RecvFlags::DONTWAIT)?;
        Ok(messages(&buffer[..len])
            .map(|(kind, _, body)| (kind, body.to_vec()))
            .collect())
    }

    /// Throws the multicasts away that wait, `max` at most. Returns how many there were; lost ones
    /// (ENOBUFS) count too.
    ///
    /// # Errors
    /// Those of recv(2) that say nothing about multicasts.
    pub fn discard_notifications(&self, max: usize) -> io::Result<usize> {
        // What does not fit is cut off by the kernel, and nobody looks at it.
        let mut head = [0; HEADER_LEN];
        for count in 0..max {
            match rustix::net::recv(&self.fd, &mut head[..], RecvFlags::DONTWAIT) {
                Ok(_) | Err(Errno::NOBUFS) => {}
                Err(Errno::AGAIN) => return Ok(count),
                Err(error) => return Err(error.into()),
            }
        }
        Ok(max)
    }
}

impl AsFd for RouteSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn messages(mut bytes: &[u8]) -> impl Iterator<Item = (u16, u32, &[u8])> {
    std::iter::from_fn(move || {
        let len = u32_at(bytes, 0)? as usize;
        let message = (
            u16_at(bytes, 4)?,
            u32_at(bytes, 8)?,
            bytes.get(HEADER_LEN..len)?,
        );
        bytes = bytes.get(len.next_multiple_of(4)..).unwrap_or_default();
        Some(message)
    })
}

/// Reads `struct nlmsgerr` and, with NETLINK_CAP_ACK, the attributes behind it; `None` is success.
fn error(body: &[u8]) -> Option<NetlinkError> {
    let code = u32_at(body, 0).unwrap_or(0) as i32;
    if code == 0 {
        return None;
    }
    let text = body
        .get(4 + HEADER_LEN..)
        .and_then(|tail| attributes(tail).find(|&(kind, _)| i32::from(kind) == NLMSGERR_ATTR_MSG))
        .map(|(_, text)| {
            String::from_utf8_lossy(text)
                .trim_end_matches('\0')
                .to_owned()
        });
    Some(NetlinkError {
        errno: Errno::from_raw_os_error(-code),
        text,
    })
}

/// linux/netlink.h; libc does not have it.
const NLMSGERR_ATTR_MSG: i32 = 1;

fn enable(fd: BorrowedFd<'_>, option: libc::c_int) -> io::Result<()> {
    super::option::set(fd, libc::SOL_NETLINK, option, 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_nest_and_pad() {
        let mut message = Message::new(1, 0);
        message.nest(7, |message| {
            message
                .attribute(1, b"abc")
                .attribute(2, &5u32.to_ne_bytes());
        });
        let bytes = message.finish(9);
        assert_eq!(u32_at(&bytes, 0), Some(bytes.len() as u32));
        let outer: Vec<_> = attributes(&bytes[HEADER_LEN..]).collect();
        assert_eq!(outer.len(), 1);
        let inner: Vec<_> = attributes(outer[0].1).collect();
        assert_eq!(inner, [(1, &b"abc"[..]), (2, &5u32.to_ne_bytes()[..])]);
    }

    #[test]
    fn short_input_ends_iteration() {
        let bytes = [8, 0, 1, 0, 1, 2, 3, 4, 9, 0, 1];
        for len in 0..bytes.len() {
            attributes(&bytes[..len]).for_each(drop);
            messages(&bytes[..len]).for_each(drop);
        }
        assert_eq!(attributes(&[0; 8]).next(), None);
    }
}
