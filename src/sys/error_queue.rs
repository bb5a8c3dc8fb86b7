//! The error queue of a socket: IP_RECVERR and IPV6_RECVERR (ip(7), net/ipv4/ip_sockglue.c,
//! `ip_recv_error`).

#![allow(unsafe_code)]

use std::io;
use std::mem::{size_of, zeroed};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsRawFd, BorrowedFd};

use super::name::Name;

/// Room for one `sock_extended_err` with the offender's address, and for TTL, TOS and UDP_GRO, which
/// the socket may have asked for.
#[repr(C, align(8))]
struct Control([u8; 256]);

/// Bytes of a quoted payload that are read: an ICMP error is 1,280 bytes at most (RFC 4443 2.4 c).
const QUOTE_LEN_MAX: usize = 1280;

/// linux/errqueue.h: SO_EE_ORIGIN_LOCAL, SO_EE_ORIGIN_ICMP, SO_EE_ORIGIN_ICMP6.
const ORIGIN_LOCAL: u8 = 1;
const ORIGIN_ICMP: u8 = 2;
const ORIGIN_ICMP6: u8 = 3;

/// One entry.
#[derive(Clone, Copy, Debug)]
pub struct Reported<'a> {
    /// Where the datagram went.
    pub to: SocketAddr,
    /// Errno.
    pub errno: i32,
    /// Who reported it; `None`: this host.
    pub offender: Option<IpAddr>,
    /// ICMP type and code; zeros of an entry of this host's own.
    pub of_type: u8,
    /// See `of_type`.
    pub code: u8,
    /// MTU, where the error is about one.
    pub info: u32,
    /// Quoted payload.
    pub payload: &'a [u8],
}

/// Takes one entry and shows it to `sink`. `Ok(false)`: the entry was of no use here (a time stamp).
///
/// # Errors
/// EAGAIN: the queue is empty.
pub fn recv(fd: BorrowedFd<'_>, sink: &mut dyn FnMut(Reported<'_>)) -> io::Result<bool> {
    let mut payload = [0u8; QUOTE_LEN_MAX];
    let mut control = Control([0; 256]);
    let mut name = Name::EMPTY;
    let mut vector = libc::iovec {
        iov_base: payload.as_mut_ptr().cast(),
        iov_len: payload.len(),
    };
    // SAFETY: all zeros is a valid msghdr (null pointers with zero lengths).
    let mut header: libc::msghdr = unsafe { zeroed() };
    header.msg_name = (&raw mut name).cast();
    header.msg_namelen = size_of::<Name>() as libc::socklen_t;
    header.msg_iov = &raw mut vector;
    header.msg_iovlen = 1;
    header.msg_control = (&raw mut control).cast();
    header.msg_controllen = size_of::<Control>() as _;
    // SAFETY: name, vector, buffer and control buffer are alive until the call returns, each as long
    // as the header says; nothing else refers to them. `fd` is open, as BorrowedFd promises.
    let len = unsafe {
        libc::recvmsg(
            fd.as_raw_fd(),
            &raw mut header,
            libc::MSG_ERRQUEUE | libc::MSG_DONTWAIT,
        )
    };
    let len = usize::try_from(len).map_err(|_| io::Error::last_os_error())?;
    let (Some(to), Some((error, offender))) = (name.get(), extended_error(&header)) else {
        return Ok(false);
    };
    let offender = match error.ee_origin {
        ORIGIN_LOCAL => None,
        ORIGIN_ICMP | ORIGIN_ICMP6 => offender,
        _ => return Ok(false),
    };
    sink(Reported {
        to,
        errno: error.ee_errno as i32,
        offender,
        of_type: error.ee_type,
        code: error.ee_code,
        info: error.ee_info,
        payload: &payload[..len.min(QUOTE_LEN_MAX)],
    });
    Ok(true)
}

#[allow(clippy::unnecessary_cast)] // musl's cmsg_len is a u32
fn extended_error(header: &libc::msghdr) -> Option<(libc::sock_extended_err, Option<IpAddr>)> {
    const ERROR_LEN: usize = size_of::<libc::sock_extended_err>();
    // SAFETY: CMSG_LEN only computes.
    let header_len = unsafe { libc::CMSG_LEN(0) } as usize;
    // SAFETY: the kernel set msg_controllen to what it wrote into the control buffer, which is alive
    // and aligned for cmsghdr; CMSG_FIRSTHDR and CMSG_NXTHDR stay inside it.
    let mut message = unsafe { libc::CMSG_FIRSTHDR(header) };
    while !message.is_null() {
        // SAFETY: `message` is a whole cmsghdr, see above.
        let (level, kind, len) = unsafe {
            (
                (*message).cmsg_level,
                (*message).cmsg_type,
                (*message).cmsg_len as usize,
            )
        };
        let asked = matches!(
            (level, kind),
            (libc::IPPROTO_IP, libc::IP_RECVERR) | (libc::IPPROTO_IPV6, libc::IPV6_RECVERR)
        );
        let data_len = len.saturating_sub(header_len);
        if asked && data_len >= ERROR_LEN {
            // SAFETY: the message holds `data_len` bytes behind its header, at least a
            // sock_extended_err; it may be unaligned, and any bytes are one.
            let (data, error) = unsafe {
                let data = libc::CMSG_DATA(message);
                (
                    data,
                    data.cast::<libc::sock_extended_err>().read_unaligned(),
                )
            };
            let mut offender = Name::EMPTY;
            let offender_len = (data_len - ERROR_LEN).min(size_of::<Name>());
            // SAFETY: `offender_len` bytes follow in the message (SO_EE_OFFENDER) and fit the name,
            // which takes any bytes; the two do not overlap.
            unsafe {
                std::ptr::copy_nonoverlapping(
                    data.add(ERROR_LEN),
                    (&raw mut offender).cast::<u8>(),
                    offender_len,
                );
            }
            return Some((error, offender.get().map(|offender| offender.ip())));
        }
        // SAFETY: as for CMSG_FIRSTHDR.
        message = unsafe { libc::CMSG_NXTHDR(header, message) };
    }
    None
}
