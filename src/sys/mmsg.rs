//! Datagrams in batches: recvmmsg with UDP_GRO and TTL, sendmsg with UDP_SEGMENT, sendmmsg.

#![allow(unsafe_code)]

use std::io;
use std::mem::{MaybeUninit, size_of, zeroed};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::fd::{AsRawFd, BorrowedFd};

/// Datagrams (or trains) of one recvmmsg: a flooded socket holds the worker for some 30 microseconds
/// at a time (measured, benches/nat_udp.rs).
pub const RECV_BATCH: usize = 32;
/// Bytes of one received datagram or train: the largest UDP payload is 65,507.
const RECV_LEN: usize = 65_536;
/// Distance of two receive buffers. Not a multiple of 4,096: the first lines of all buffers would
/// share one set of the L1 cache, which has 8 or 12 ways for 32 buffers.
const RECV_STRIDE: usize = RECV_LEN + 5 * 64;
/// Datagrams of one UDP_SEGMENT call: UDP_MAX_SEGMENTS of linux/udp.h is 64 up to Linux 6.8 and 128
/// after.
pub const SEND_SEGMENTS_MAX: usize = 64;
/// Payload of one UDP_SEGMENT call: the train is one IP packet until the kernel cuts it.
pub const SEND_TRAIN_MAX: usize = 65_507;

/// Room for the control messages of one datagram: two ints (UDP_GRO, IP_TTL) with their headers.
#[repr(C, align(8))]
#[derive(Clone, Copy)]
struct Control([u8; 64]);

// SAFETY: CMSG_SPACE only computes.
const INT_SPACE: usize = unsafe { libc::CMSG_SPACE(size_of::<i32>() as u32) } as usize;
// SAFETY: CMSG_LEN only computes.
const INT_LEN: usize = unsafe { libc::CMSG_LEN(size_of::<i32>() as u32) } as usize;
const _: () = assert!(2 * INT_SPACE <= size_of::<Control>());
const _: () = assert!(align_of::<libc::cmsghdr>() <= align_of::<Control>());

/// What recvmmsg gave for one message.
#[derive(Clone, Copy, Debug)]
pub struct Received<'a> {
    /// Sender; of an ICMP socket the port is 0.
    pub source: SocketAddrV4,
    /// One datagram, or a train of `segment`-sized ones.
    pub payload: &'a [u8],
    /// Set if the kernel coalesced.
    pub segment: Option<u16>,
    /// IP TTL; 0 where the kernel did not tell.
    pub ttl: u8,
}

/// Reused buffers for [`RecvBatch::recv`]. Their memory is touched only as far as datagrams reach.
pub struct RecvBatch {
    bytes: Box<[u8]>,
    controls: Box<[Control; RECV_BATCH]>,
}

impl RecvBatch {
    /// Reserves the buffers.
    pub fn new() -> Self {
        Self {
            bytes: vec![0; RECV_STRIDE * RECV_BATCH].into_boxed_slice(),
            controls: Box::new([Control([0; 64]); RECV_BATCH]),
        }
    }

    /// Receives what waits on an IPv4 datagram socket, at most [`RECV_BATCH`] messages, and hands
    /// each to `sink`. Returns their number.
    ///
    /// # Errors
    /// EAGAIN where nothing waits; a pending error of the socket, which the call clears.
    pub fn recv(
        &mut self,
        fd: BorrowedFd<'_>,
        mut sink: impl FnMut(Received<'_>),
    ) -> io::Result<usize> {
        // SAFETY: all zeros is a valid sockaddr_in.
        let mut names: [libc::sockaddr_in; RECV_BATCH] = unsafe { zeroed() };
        // SAFETY: all zeros is a valid iovec (a null pointer with zero length).
        let mut vectors: [libc::iovec; RECV_BATCH] = unsafe { zeroed() };
        // SAFETY: all zeros is a valid mmsghdr (null pointers with zero lengths).
        let mut headers: [libc::mmsghdr; RECV_BATCH] = unsafe { zeroed() };
        let controls = self.controls.as_mut_ptr();
        for (n, buffer) in self.bytes.chunks_exact_mut(RECV_STRIDE).enumerate() {
            vectors[n].iov_base = buffer.as_mut_ptr().cast();
            vectors[n].iov_len = RECV_LEN;
            let header = &mut headers[n].msg_hdr;
            header.msg_name = (&raw mut names[n]).cast();
            header.msg_namelen = size_of::<libc::sockaddr_in>() as libc::socklen_t;
            header.msg_iov = &raw mut vectors[n];
            header.msg_iovlen = 1;
            // SAFETY: n is below RECV_BATCH, the length of `controls`.
            header.msg_control = unsafe { controls.add(n) }.cast();
            header.msg_controllen = size_of::<Control>() as _;
        }
        // SAFETY: `headers` holds RECV_BATCH entries. Each points to a name, a vector with a buffer
        // of iov_len bytes and a control buffer of msg_controllen bytes of its own; all outlive the
        // call and nothing else refers to them meanwhile. `fd` is open, as BorrowedFd promises.
        let count = unsafe {
            libc::recvmmsg(
                fd.as_raw_fd(),
                headers.as_mut_ptr(),
                RECV_BATCH as u32,
                libc::MSG_DONTWAIT as _,
                std::ptr::null_mut(),
            )
        };
        let count = usize::try_from(count).map_err(|_| io::Error::last_os_error())?;
        for n in 0..count {
            let (segment, ttl) = read_control(&headers[n].msg_hdr);
            let mut len = (headers[n].msg_len as usize).min(RECV_LEN);
            if headers[n].msg_hdr.msg_flags & libc::MSG_TRUNC != 0 {
                // A train longer than the buffer (gro_ipv4_max_size was raised): keep whole datagrams.
                len -= segment.map_or(len, |segment| len % usize::from(segment));
            }
            sink(Received {
                source: from_c(&names[n]),
                payload: &self.bytes[n * RECV_STRIDE..][..len],
                segment: segment.filter(|&segment| usize::from(segment) < len),
                ttl,
            });
        }
        Ok(count)
    }
}

impl Default for RecvBatch {
    fn default() -> Self {
        Self::new()
    }
}

/// Segment size and TTL from the control messages that the kernel wrote for one message.
#[allow(clippy::unnecessary_cast)] // musl's cmsg_len is a u32
fn read_control(header: &libc::msghdr) -> (Option<u16>, u8) {
    let (mut segment, mut ttl) = (None, 0);
    // SAFETY: the kernel set msg_controllen to what it wrote into the control buffer, which is alive
    // and aligned for cmsghdr; CMSG_FIRSTHDR and CMSG_NXTHDR stay inside it.
    let mut message = unsafe { libc::CMSG_FIRSTHDR(header) };
    while !message.is_null() {
        // SAFETY: `message` is a whole cmsghdr, see above.
        let (level, kind, len) = unsafe {
            (
                (*message).cmsg_level,
                (*message).cmsg_type,
                (*message).cmsg_len,
            )
        };
        if len as usize >= INT_LEN {
            // SAFETY: the message holds at least an int behind its header; it may be unaligned.
            let value = unsafe { libc::CMSG_DATA(message).cast::<i32>().read_unaligned() };
            match (level, kind) {
                (libc::SOL_UDP, libc::UDP_GRO) => {
                    segment = u16::try_from(value).ok().filter(|&segment| segment > 0);
                }
                (libc::IPPROTO_IP, libc::IP_TTL) => ttl = u8::try_from(value).unwrap_or(0),
                _ => {}
            }
        }
        // SAFETY: as for CMSG_FIRSTHDR.
        message = unsafe { libc::CMSG_NXTHDR(header, message) };
    }
    (segment, ttl)
}

/// Sends `payload` as datagrams of `segment` bytes each in one call (UDP_SEGMENT).
///
/// # Errors
/// EINVAL, EMSGSIZE or EIO where this route can't: a datagram exceeds its MTU, its device has no
/// checksum offload, or the train is longer than [`SEND_TRAIN_MAX`] or [`SEND_SEGMENTS_MAX`].
pub fn send_train(
    fd: BorrowedFd<'_>,
    to: SocketAddrV4,
    payload: &[u8],
    segment: u16,
) -> io::Result<usize> {
    let mut name = to_c(to);
    let mut vector = vector(payload);
    let mut control = Control([0; 64]);
    let mut header = header(&mut name, &mut vector);
    header.msg_control = (&raw mut control).cast();
    // SAFETY: CMSG_SPACE only computes.
    header.msg_controllen = unsafe { libc::CMSG_SPACE(size_of::<u16>() as u32) } as _;
    // SAFETY: the control buffer is aligned for cmsghdr and, by the assertion above, longer than
    // CMSG_SPACE(int) >= CMSG_SPACE(u16), so header and value fit.
    unsafe {
        let message = libc::CMSG_FIRSTHDR(&header);
        (*message).cmsg_level = libc::SOL_UDP;
        (*message).cmsg_type = libc::UDP_SEGMENT;
        (*message).cmsg_len = libc::CMSG_LEN(size_of::<u16>() as u32) as _;
        libc::CMSG_DATA(message)
            .cast::<u16>()
            .write_unaligned(segment);
    }
    // SAFETY: `header` points to a name, a vector and a control buffer that live until the call
    // returns, each with its true length; the kernel only reads them. `fd` is open.
    let sent = unsafe { libc::sendmsg(fd.as_raw_fd(), &header, SEND_FLAGS) };
    usize::try_from(sent).map_err(|_| io::Error::last_os_error())
}

/// Sends `payload` cut into datagrams of `segment` bytes with sendmmsg, [`RECV_BATCH`] of them at
/// most. Returns the bytes sent.
///
/// # Errors
/// That of the first datagram.
pub fn send_each(
    fd: BorrowedFd<'_>,
    to: SocketAddrV4,
    payload: &[u8],
    segment: u16,
) -> io::Result<usize> {
    let mut name = to_c(to);
    let mut vectors = [const { MaybeUninit::<libc::iovec>::uninit() }; RECV_BATCH];
    let mut headers = [const { MaybeUninit::<libc::mmsghdr>::uninit() }; RECV_BATCH];
    let mut count = 0;
    let datagrams = payload.chunks(usize::from(segment.max(1)));
    for ((datagram, slot), message) in datagrams.zip(&mut vectors).zip(&mut headers) {
        message.write(libc::mmsghdr {
            msg_hdr: header(&mut name, slot.write(vector(datagram))),
            msg_len: 0,
        });
        count += 1;
    }
    // SAFETY: the first `count` headers are initialised; each points to the common name and to a
    // vector of its own, all alive and unmoved until the call returns. `fd` is open.
    let sent = unsafe {
        libc::sendmmsg(
            fd.as_raw_fd(),
            headers.as_mut_ptr().cast(),
            count,
            SEND_FLAGS as _,
        )
    };
    let sent = usize::try_from(sent).map_err(|_| io::Error::last_os_error())?;
    Ok((sent * usize::from(segment)).min(payload.len()))
}

const SEND_FLAGS: i32 = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;

/// The kernel reads through this pointer only, though its type says `*mut`.
fn vector(bytes: &[u8]) -> libc::iovec {
    libc::iovec {
        iov_base: bytes.as_ptr().cast_mut().cast(),
        iov_len: bytes.len(),
    }
}

fn header(name: &mut libc::sockaddr_in, vector: &mut libc::iovec) -> libc::msghdr {
    // SAFETY: all zeros is a valid msghdr (null pointers with zero lengths).
    let mut header: libc::msghdr = unsafe { zeroed() };
    header.msg_name = (&raw mut *name).cast();
    header.msg_namelen = size_of::<libc::sockaddr_in>() as libc::socklen_t;
    header.msg_iov = &raw mut *vector;
    header.msg_iovlen = 1;
    header
}

fn to_c(address: SocketAddrV4) -> libc::sockaddr_in {
    libc::sockaddr_in {
        sin_family: libc::AF_INET as libc::sa_family_t,
        sin_port: address.port().to_be(),
        sin_addr: libc::in_addr {
            s_addr: address.ip().to_bits().to_be(),
        },
        sin_zero: [0; 8],
    }
}

fn from_c(address: &libc::sockaddr_in) -> SocketAddrV4 {
    let ip = Ipv4Addr::from_bits(u32::from_be(address.sin_addr.s_addr));
    SocketAddrV4::new(ip, u16::from_be(address.sin_port))
}
