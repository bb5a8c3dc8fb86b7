//! Datagrams in batches: recvmmsg with UDP_GRO and TTL, sendmsg with UDP_SEGMENT, sendmmsg.

#![allow(unsafe_code)]

use std::io;
use std::mem::{MaybeUninit, size_of, zeroed};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsRawFd, BorrowedFd};

use super::name::Name;

/// Datagrams (or trains) of one recvmmsg: a super-frame to a guest holds 45 of full size. A flooded socket
/// holds the worker for some 35 microseconds at a time (measured: 24 for 32 of them, benches/nat_udp.rs).
pub const RECV_BATCH: usize = 48;
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

/// Room for the control messages of one datagram: three ints (UDP_GRO, TTL, TOS) and the address it was
/// sent to, with their headers.
#[repr(C, align(8))]
#[derive(Clone, Copy)]
struct Control([u8; CONTROL_LEN]);
const CONTROL_LEN: usize = 128;

// SAFETY: CMSG_SPACE only computes.
const INT_SPACE: usize = unsafe { libc::CMSG_SPACE(size_of::<i32>() as u32) } as usize;
// SAFETY: CMSG_LEN only computes.
const INT_LEN: usize = unsafe { libc::CMSG_LEN(size_of::<i32>() as u32) } as usize;
// SAFETY: CMSG_LEN only computes.
const BYTE_LEN: usize = unsafe { libc::CMSG_LEN(1) } as usize;
/// The larger of the two kinds of address messages.
// SAFETY: CMSG_SPACE only computes.
const PKTINFO_SPACE: usize =
    unsafe { libc::CMSG_SPACE(size_of::<libc::in6_pktinfo>() as u32) } as usize;
const _: () = assert!(size_of::<libc::in_pktinfo>() <= size_of::<libc::in6_pktinfo>());
const _: () = assert!(3 * INT_SPACE + PKTINFO_SPACE <= size_of::<Control>());
// SAFETY: CMSG_LEN only computes.
const PKTINFO4_LEN: usize =
    unsafe { libc::CMSG_LEN(size_of::<libc::in_pktinfo>() as u32) } as usize;
// SAFETY: CMSG_LEN only computes.
const PKTINFO6_LEN: usize =
    unsafe { libc::CMSG_LEN(size_of::<libc::in6_pktinfo>() as u32) } as usize;
const _: () = assert!(align_of::<libc::cmsghdr>() <= align_of::<Control>());

/// What recvmmsg gave for one message.
#[derive(Clone, Copy, Debug)]
pub struct Received<'a> {
    /// Sender; of an ICMP socket the port is 0.
    pub source: SocketAddr,
    /// One datagram, or a train of `segment`-sized ones (the last may be shorter).
    pub payload: &'a [u8],
    /// Set for a train.
    pub segment: Option<u16>,
    /// IP TTL or hop limit; 0 where the kernel did not tell.
    pub ttl: u8,
    /// IP TOS or traffic class; 0 where the kernel did not tell.
    pub tos: u8,
    /// The address it was sent to, where the socket was asked to tell.
    pub destination: Option<IpAddr>,
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
            controls: Box::new([Control([0; CONTROL_LEN]); RECV_BATCH]),
        }
    }

    /// Receives what waits on a datagram socket of either IP version, at most [`RECV_BATCH`] messages, and hands
    /// each to `sink`; with `join`, those of one sender and size that follow each other as one. Returns
    /// their number.
    ///
    /// # Errors
    /// EAGAIN where nothing waits; a pending error of the socket, which the call clears.
    pub fn recv(
        &mut self,
        fd: BorrowedFd<'_>,
        join: bool,
        mut sink: impl FnMut(Received<'_>),
    ) -> io::Result<usize> {
        let mut names = [Name::EMPTY; RECV_BATCH];
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
            header.msg_namelen = size_of::<Name>() as libc::socklen_t;
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
        let mut train: Option<Train> = None;
        for n in 0..count {
            let Told {
                segment,
                ttl,
                tos,
                destination,
            } = read_control(&headers[n].msg_hdr);
            let mut len = (headers[n].msg_len as usize).min(RECV_LEN);
            if headers[n].msg_hdr.msg_flags & libc::MSG_TRUNC != 0 {
                // A train longer than the buffer (gro_ipv4_max_size was raised): keep whole datagrams.
                len -= segment.map_or(len, |segment| len % usize::from(segment));
            }
            let Some(source) = names[n].get() else {
                continue;
            };
            let from = (source, destination, ttl, tos);
            let at = n * RECV_STRIDE;
            let segment = segment.filter(|&segment| usize::from(segment) < len);
            if let Some(train) = &mut train
                && join
                && segment.is_none()
                && train.admits(from, len)
            {
                self.bytes.copy_within(at..at + len, train.at + train.len);
                train.len += len;
                continue;
            }
            if let Some(train) = train.take() {
                sink(train.received(&self.bytes));
            }
            let size = segment.map_or(len, usize::from);
            train = Some(Train {
                from,
                at,
                len,
                size,
            });
        }
        if let Some(train) = train {
            sink(train.received(&self.bytes));
        }
        Ok(count)
    }
}

/// Source, destination, TTL and TOS of a datagram.
type From = (SocketAddr, Option<IpAddr>, u8, u8);

/// A datagram, or several of one sender that came one by one and go on together: most devices' drivers
/// leave what UDP_GRO could do undone.
struct Train {
    from: From,
    at: usize,
    len: usize,
    /// Length of each datagram but the last.
    size: usize,
}

impl Train {
    /// Whether a datagram of `len` bytes may be the next. A shorter one is the last.
    fn admits(&self, from: From, len: usize) -> bool {
        let whole = self.size > 0 && self.len.is_multiple_of(self.size);
        whole
            && (1..=self.size).contains(&len)
            && self.len + len <= SEND_TRAIN_MAX
            && self.from == from
    }

    fn received<'a>(&self, bytes: &'a [u8]) -> Received<'a> {
        let (source, destination, ttl, tos) = self.from;
        Received {
            source,
            payload: &bytes[self.at..][..self.len],
            // Below the length, so at most 65,507.
            segment: (self.size < self.len).then_some(self.size as u16),
            ttl,
            tos,
            destination,
        }
    }
}

impl Default for RecvBatch {
    fn default() -> Self {
        Self::new()
    }
}

/// What the control messages of one datagram say.
#[derive(Default)]
struct Told {
    segment: Option<u16>,
    ttl: u8,
    tos: u8,
    destination: Option<IpAddr>,
}

/// Reads the control messages that the kernel wrote for one message.
#[allow(clippy::unnecessary_cast)] // musl's cmsg_len is a u32
fn read_control(header: &libc::msghdr) -> Told {
    let mut told = Told::default();
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
        // IP_TOS alone is a byte (net/ipv4/ip_sockglue.c, ip_cmsg_recv_tos).
        if len as usize >= BYTE_LEN && (level, kind) == (libc::IPPROTO_IP, libc::IP_TOS) {
            // SAFETY: the message holds at least a byte behind its header.
            told.tos = unsafe { *libc::CMSG_DATA(message) };
        } else if len as usize >= PKTINFO4_LEN
            && (level, kind) == (libc::IPPROTO_IP, libc::IP_PKTINFO)
        {
            // SAFETY: the message holds a whole in_pktinfo behind its header, plain integers; it may be
            // unaligned.
            let info = unsafe {
                libc::CMSG_DATA(message)
                    .cast::<libc::in_pktinfo>()
                    .read_unaligned()
            };
            // Of a broadcast the address to answer from, which ipi_addr is not (ip(7)).
            let local = Ipv4Addr::from_bits(u32::from_be(info.ipi_spec_dst.s_addr));
            told.destination = Some(local.into());
        } else if len as usize >= PKTINFO6_LEN
            && (level, kind) == (libc::IPPROTO_IPV6, libc::IPV6_PKTINFO)
        {
            // SAFETY: as above, a whole in6_pktinfo.
            let info = unsafe {
                libc::CMSG_DATA(message)
                    .cast::<libc::in6_pktinfo>()
                    .read_unaligned()
            };
            let local = Ipv6Addr::from(info.ipi6_addr.s6_addr);
            told.destination = Some(local.into()).filter(|_| !local.is_multicast());
        } else if len as usize >= INT_LEN {
            // SAFETY: the message holds at least an int behind its header; it may be unaligned.
            let value = unsafe { libc::CMSG_DATA(message).cast::<i32>().read_unaligned() };
            match (level, kind) {
                (libc::SOL_UDP, libc::UDP_GRO) => {
                    told.segment = u16::try_from(value).ok().filter(|&segment| segment > 0);
                }
                (libc::IPPROTO_IP, libc::IP_TTL) | (libc::IPPROTO_IPV6, libc::IPV6_HOPLIMIT) => {
                    told.ttl = u8::try_from(value).unwrap_or(0);
                }
                (libc::IPPROTO_IPV6, libc::IPV6_TCLASS) => {
                    told.tos = u8::try_from(value).unwrap_or(0);
                }
                _ => {}
            }
        }
        // SAFETY: as for CMSG_FIRSTHDR.
        message = unsafe { libc::CMSG_NXTHDR(header, message) };
    }
    told
}

/// Sends `payload` in one call: as one datagram, or as several of `segment` bytes each (UDP_SEGMENT);
/// with `from` from that address of the host (IP_PKTINFO, IPV6_PKTINFO).
///
/// # Errors
/// EINVAL, EMSGSIZE or EIO where this route can't send trains: a datagram exceeds its MTU, its device
/// has no checksum offload, or the train is longer than [`SEND_TRAIN_MAX`] or [`SEND_SEGMENTS_MAX`].
pub fn send(
    fd: BorrowedFd<'_>,
    (from, to): (Option<IpAddr>, SocketAddr),
    payload: &[u8],
    segment: Option<u16>,
) -> io::Result<usize> {
    let mut name = Name::new(to);
    let mut vector = vector(payload);
    let (control, control_len) = control_of(from, segment);
    let header = header(&mut name, &mut vector, &control, control_len);
    // SAFETY: `header` points to a name, a vector and a control buffer that live until the call
    // returns, each with its true length; the kernel only reads them. `fd` is open.
    let sent = unsafe { libc::sendmsg(fd.as_raw_fd(), &header, SEND_FLAGS) };
    usize::try_from(sent).map_err(|_| io::Error::last_os_error())
}

/// The control messages of a call, and how many bytes they take.
fn control_of(from: Option<IpAddr>, segment: Option<u16>) -> (Control, usize) {
    let mut messages = Control([0; CONTROL_LEN]);
    let control = &mut messages;
    let mut used = 0;
    if let Some(segment) = segment {
        used += put(control, used, (libc::SOL_UDP, libc::UDP_SEGMENT), segment);
    }
    match from {
        Some(IpAddr::V4(from)) => {
            let info = libc::in_pktinfo {
                ipi_ifindex: 0,
                ipi_spec_dst: libc::in_addr {
                    s_addr: from.to_bits().to_be(),
                },
                ipi_addr: libc::in_addr { s_addr: 0 },
            };
            used += put(control, used, (libc::IPPROTO_IP, libc::IP_PKTINFO), info);
        }
        Some(IpAddr::V6(from)) => {
            let info = libc::in6_pktinfo {
                ipi6_addr: libc::in6_addr {
                    s6_addr: from.octets(),
                },
                ipi6_ifindex: 0,
            };
            used += put(
                control,
                used,
                (libc::IPPROTO_IPV6, libc::IPV6_PKTINFO),
                info,
            );
        }
        None => {}
    }
    (messages, used)
}

/// Writes one control message at `at`, a sum of lengths that this function returned; returns its length
/// with padding.
fn put<T: Copy>(control: &mut Control, at: usize, (level, kind): (i32, i32), value: T) -> usize {
    // SAFETY: both only compute.
    let (len, space) = unsafe {
        (
            libc::CMSG_LEN(size_of::<T>() as u32),
            libc::CMSG_SPACE(size_of::<T>() as u32) as usize,
        )
    };
    assert!(
        at + space <= CONTROL_LEN,
        "control messages fit their buffer"
    );
    // SAFETY: by the assertion header and value lie inside the buffer, which is aligned for cmsghdr as
    // is every sum of CMSG_SPACEs; the value is written unaligned. cmsghdr and T are plain data.
    unsafe {
        let message = control.0.as_mut_ptr().add(at).cast::<libc::cmsghdr>();
        (*message).cmsg_level = level;
        (*message).cmsg_type = kind;
        (*message).cmsg_len = len as _;
        libc::CMSG_DATA(message).cast::<T>().write_unaligned(value);
    }
    space
}

/// Sends `payload` cut into datagrams of `segment` bytes with sendmmsg, [`RECV_BATCH`] of them at
/// most. Returns the bytes sent.
///
/// # Errors
/// That of the first datagram.
pub fn send_each(
    fd: BorrowedFd<'_>,
    (from, to): (Option<IpAddr>, SocketAddr),
    payload: &[u8],
    segment: u16,
) -> io::Result<usize> {
    let mut name = Name::new(to);
    let (control, control_len) = control_of(from, None);
    let mut vectors = [const { MaybeUninit::<libc::iovec>::uninit() }; RECV_BATCH];
    let mut headers = [const { MaybeUninit::<libc::mmsghdr>::uninit() }; RECV_BATCH];
    let mut count = 0;
    let datagrams = payload.chunks(usize::from(segment.max(1)));
    for ((datagram, slot), message) in datagrams.zip(&mut vectors).zip(&mut headers) {
        message.write(libc::mmsghdr {
            msg_hdr: header(
                &mut name,
                slot.write(vector(datagram)),
                &control,
                control_len,
            ),
            msg_len: 0,
        });
        count += 1;
    }
    // SAFETY: the first `count` headers are initialised; each points to the common name, the common
    // control messages and a vector of its own, all alive and unmoved until the call returns. `fd` is open.
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

/// As of [`vector`], the kernel only reads through these pointers.
fn header(
    name: &mut Name,
    vector: &mut libc::iovec,
    control: &Control,
    control_len: usize,
) -> libc::msghdr {
    // SAFETY: all zeros is a valid msghdr (null pointers with zero lengths).
    let mut header: libc::msghdr = unsafe { zeroed() };
    header.msg_name = (&raw mut *name).cast();
    header.msg_namelen = name.socklen();
    header.msg_iov = &raw mut *vector;
    header.msg_iovlen = 1;
    if control_len > 0 {
        header.msg_control = (&raw const *control).cast_mut().cast();
        header.msg_controllen = control_len as _;
    }
    header
}
