//! Socket options that rustix does not know.

#![allow(unsafe_code)]

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use super::option;

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

/// Asks for what travels beside each datagram: TTL and TOS (IP_RECVTTL, IP_RECVTOS, or
/// IPV6_RECVHOPLIMIT, IPV6_RECVTCLASS), and for ICMP errors (IP_RECVERR, IPV6_RECVERR), see ip(7) and
/// ipv6(7).
///
/// # Errors
/// This is no IP socket, or none of that version.
pub fn set_recv_details(fd: BorrowedFd<'_>, v6: bool) -> io::Result<()> {
    let (level, options) = match v6 {
        false => (
            libc::IPPROTO_IP,
            [libc::IP_RECVERR, libc::IP_RECVTTL, libc::IP_RECVTOS],
        ),
        true => (
            libc::IPPROTO_IPV6,
            [
                libc::IPV6_RECVERR,
                libc::IPV6_RECVHOPLIMIT,
                libc::IPV6_RECVTCLASS,
            ],
        ),
    };
    options
        .into_iter()
        .try_for_each(|option| set_int(fd, level, option, 1))
}

/// Asks for ICMP errors about what is sent (IP_RECVERR, IPV6_RECVERR), or not.
///
/// # Errors
/// This is no IP socket of that version.
pub fn set_recv_errors(fd: BorrowedFd<'_>, v6: bool, wanted: bool) -> io::Result<()> {
    let (level, option) = match v6 {
        false => (libc::IPPROTO_IP, libc::IP_RECVERR),
        true => (libc::IPPROTO_IPV6, libc::IPV6_RECVERR),
    };
    set_int(fd, level, option, i32::from(wanted))
}

/// Asks for the address that each datagram was sent to (IP_PKTINFO, IPV6_RECVPKTINFO): of a socket on all
/// addresses it is the one to answer from.
///
/// # Errors
/// This is no IP socket of that version.
pub fn set_recv_destination(fd: BorrowedFd<'_>, v6: bool) -> io::Result<()> {
    let (level, option) = match v6 {
        false => (libc::IPPROTO_IP, libc::IP_PKTINFO),
        true => (libc::IPPROTO_IPV6, libc::IPV6_RECVPKTINFO),
    };
    set_int(fd, level, option, 1)
}

/// IP_TTL or IPV6_UNICAST_HOPS of all that is sent from here on; `None` returns to the host's default.
///
/// # Errors
/// The TTL is 0, or this is no IP socket of that version.
pub fn set_send_ttl(fd: BorrowedFd<'_>, v6: bool, ttl: Option<u8>) -> io::Result<()> {
    let (level, option) = match v6 {
        false => (libc::IPPROTO_IP, libc::IP_TTL),
        true => (libc::IPPROTO_IPV6, libc::IPV6_UNICAST_HOPS),
    };
    set_int(fd, level, option, ttl.map_or(-1, i32::from))
}

/// IP_TOS or IPV6_TCLASS of all that is sent from here on.
///
/// # Errors
/// This is no IP socket of that version.
pub fn set_send_tos(fd: BorrowedFd<'_>, v6: bool, tos: u8) -> io::Result<()> {
    let (level, option) = match v6 {
        false => (libc::IPPROTO_IP, libc::IP_TOS),
        true => (libc::IPPROTO_IPV6, libc::IPV6_TCLASS),
    };
    set_int(fd, level, option, i32::from(tos))
}

/// IP_MTU_DISCOVER: whether what is sent from here on may be fragmented on its way. If not, the path
/// MTU that the kernel has learnt is not applied either (IP_PMTUDISC_PROBE): each router speaks for
/// itself.
///
/// # Errors
/// This is no IP socket of that version.
pub fn set_dont_fragment(fd: BorrowedFd<'_>, v6: bool, dont_fragment: bool) -> io::Result<()> {
    let (level, option, value) = match (v6, dont_fragment) {
        (false, true) => (
            libc::IPPROTO_IP,
            libc::IP_MTU_DISCOVER,
            libc::IP_PMTUDISC_PROBE,
        ),
        (false, false) => (
            libc::IPPROTO_IP,
            libc::IP_MTU_DISCOVER,
            libc::IP_PMTUDISC_DONT,
        ),
        (true, true) => (
            libc::IPPROTO_IPV6,
            libc::IPV6_MTU_DISCOVER,
            libc::IPV6_PMTUDISC_PROBE,
        ),
        (true, false) => (
            libc::IPPROTO_IPV6,
            libc::IPV6_MTU_DISCOVER,
            libc::IPV6_PMTUDISC_DONT,
        ),
    };
    set_int(fd, level, option, value)
}

/// IP_BIND_ADDRESS_NO_PORT: bind fixes the address only, connect chooses the port (ip(7), Linux 4.2; it
/// serves IPv6 sockets too).
///
/// # Errors
/// This is no IP socket, or the kernel is older.
pub fn set_bind_address_no_port(fd: BorrowedFd<'_>) -> io::Result<()> {
    set_int(fd, libc::IPPROTO_IP, libc::IP_BIND_ADDRESS_NO_PORT, 1)
}

/// TCP_NOTSENT_LOWAT: a send blocks, and the socket is not writable, while so many bytes wait that were never
/// sent (tcp(7); net/ipv4/tcp.c, `tcp_sendmsg_locked` asks `sk_stream_memory_free`). What is in flight does not
/// count.
///
/// # Errors
/// This is no TCP socket.
pub fn set_unsent_max(fd: BorrowedFd<'_>, bytes: u32) -> io::Result<()> {
    let bytes = i32::try_from(bytes).unwrap_or(i32::MAX);
    set_int(fd, libc::IPPROTO_TCP, libc::TCP_NOTSENT_LOWAT, bytes)
}

/// IPV6_V6ONLY: the socket has nothing to do with IPv4.
///
/// # Errors
/// This is no IPv6 socket, or it is bound.
pub fn set_v6_only(fd: BorrowedFd<'_>) -> io::Result<()> {
    set_int(fd, libc::IPPROTO_IPV6, libc::IPV6_V6ONLY, 1)
}

/// SO_BINDTODEVICE: the socket takes and sends only what goes through this interface (socket(7)).
/// Needs no privilege since Linux 5.7, once per socket.
///
/// # Errors
/// ENODEV: there is none of this name. EPERM: an older kernel.
pub fn bind_to_device(fd: BorrowedFd<'_>, interface: &CStr) -> io::Result<()> {
    let name = interface.to_bytes_with_nul();
    // SAFETY: `name` is alive for the length of the call and has as many bytes as the length argument
    // says; the kernel only reads it, and copies no more than IFNAMSIZ. `fd` is open, as BorrowedFd
    // promises.
    let result = unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_BINDTODEVICE,
            name.as_ptr().cast(),
            name.len() as libc::socklen_t,
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// SO_PEERCRED: the process at the other end of a unix stream socket, as its pid and uid; `None` as
/// pid where it has none in this pid namespace.
///
/// # Errors
/// This is no connected unix socket.
pub fn peer(fd: BorrowedFd<'_>) -> io::Result<(Option<u32>, u32)> {
    let peer: libc::ucred = option::get(fd, libc::SOL_SOCKET, libc::SO_PEERCRED)?;
    let pid = u32::try_from(peer.pid).ok().filter(|&pid| pid != 0);
    Ok((pid, peer.uid))
}

/// SO_PEERPIDFD: a pidfd of the process at the other end of a unix stream socket, whatever pid namespace it
/// is in (Linux 6.5).
///
/// # Errors
/// The kernel is older, or the process has ended.
pub fn peer_process(fd: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let process: libc::c_int = option::get(fd, libc::SOL_SOCKET, libc::SO_PEERPIDFD)?;
    if process < 0 {
        return Err(io::ErrorKind::InvalidData.into());
    }
    // SAFETY: the call gave a fresh descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(process) })
}

/// The network namespace that a socket is of.
///
/// # Errors
/// EPERM without CAP_NET_ADMIN there.
pub fn network_namespace(fd: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    /// linux/sockios.h.
    const SIOCGSKNS: libc::c_ulong = 0x894c;
    // SAFETY: SIOCGSKNS takes no argument. Another kind of fd than a socket's refuses the number.
    let namespace = unsafe { libc::ioctl(fd.as_raw_fd(), SIOCGSKNS as _) };
    if namespace < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call gave a fresh fd that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(namespace) })
}
