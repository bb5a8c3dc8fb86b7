//! Socket options that rustix does not know.

#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Sets a socket option whose value is a C `int`.
fn set_int(fd: BorrowedFd<'_>, level: i32, name: i32, value: i32) -> io::Result<()> {
    // SAFETY: `value` is a live int for the length of the call, which is what the length argument
    // says; the kernel only reads it. `fd` is open, as BorrowedFd promises.
    let result = unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            level,
            name,
            (&raw const value).cast(),
            size_of::<i32>() as libc::socklen_t,
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// UDP_GRO: consecutive datagrams of one sender arrive as a train, with its segment size in a
/// control message (udp(7), Linux 5.0).
///
/// # Errors
/// The kernel does not offer it, or this is no UDP socket.
pub fn set_udp_gro(fd: BorrowedFd<'_>) -> io::Result<()> {
    set_int(fd, libc::SOL_UDP, libc::UDP_GRO, 1)
}

/// IP_RECVTTL: a control message tells the TTL of each datagram (ip(7)).
///
/// # Errors
/// This is no IPv4 socket.
pub fn set_recv_ttl(fd: BorrowedFd<'_>) -> io::Result<()> {
    set_int(fd, libc::IPPROTO_IP, libc::IP_RECVTTL, 1)
}

/// IP_TTL of all that is sent from here on; `None` returns to net.ipv4.ip_default_ttl.
///
/// # Errors
/// The TTL is 0, or this is no IPv4 socket.
pub fn set_send_ttl(fd: BorrowedFd<'_>, ttl: Option<u8>) -> io::Result<()> {
    set_int(
        fd,
        libc::IPPROTO_IP,
        libc::IP_TTL,
        ttl.map_or(-1, i32::from),
    )
}
