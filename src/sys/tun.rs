//! tun/tap ioctls (linux/if_tun.h). The `tun-tap` crate can't set IFF_VNET_HDR, hence our own.
#![allow(unsafe_code)]

use std::ffi::{CStr, c_char};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};

use rustix::fs::{Mode, OFlags};

/// The device every tap starts from.
pub const TUN_PATH: &str = "/dev/net/tun";

/// Offloads for [`set_offload`]: checksum and TCP segmentation, known since Linux 2.6.27.
pub const OFFLOAD_TSO: u32 =
    libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6 | libc::TUN_F_TSO_ECN;
/// UDP segmentation, known since Linux 6.2.
pub const OFFLOAD_USO: u32 = libc::TUN_F_USO4 | libc::TUN_F_USO6;

/// How a tap is set up, as TUNGETIFF tells.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TapInfo {
    /// Name of the netdev, in the network namespace it was made in.
    pub name: String,
    /// A tap (Ethernet frames), not a tun.
    pub tap: bool,
    /// Frames come without the 4-byte packet information.
    pub no_packet_info: bool,
    /// Frames come with a virtio-net header.
    pub vnet_header: bool,
    /// The tap may have several queues.
    pub multi_queue: bool,
}

/// Opens [`TUN_PATH`], non-blocking and close-on-exec. The netdev of [`attach`] appears in the
/// network namespace of this call.
///
/// # Errors
/// ENOENT or ENODEV without the `tun` module, EACCES or EPERM by the file's mode.
pub fn open() -> io::Result<OwnedFd> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK;
    Ok(rustix::fs::open(TUN_PATH, flags, Mode::empty())?)
}

/// Makes the netdev `name` (the kernel fills a `%d`) with IFF_TAP | IFF_NO_PI and, as asked,
/// IFF_VNET_HDR and IFF_MULTI_QUEUE; the name it got. The netdev goes when its last fd is closed.
///
/// # Errors
/// EPERM without CAP_NET_ADMIN in the namespace, EBUSY for a name in use, EINVAL for a name that is
/// too long.
pub fn attach(
    fd: BorrowedFd<'_>,
    name: &str,
    vnet_header: bool,
    multi_queue: bool,
) -> io::Result<String> {
    let mut flags = libc::IFF_TAP | libc::IFF_NO_PI;
    if vnet_header {
        flags |= libc::IFF_VNET_HDR;
    }
    if multi_queue {
        flags |= libc::IFF_MULTI_QUEUE;
    }
    let mut request = empty_ifreq();
    if name.len() >= request.ifr_name.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as c_char;
    }
    // IFF_* of a tap fit the field's 16 bits; IFF_VNET_HDR and IFF_MULTI_QUEUE use its upper half.
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: TUNSETIFF reads and writes one `struct ifreq`, which `request` is, and keeps no
    // pointer to it.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETIFF, &mut request) })?;
    Ok(ifreq_name(&request))
}

/// Sets the length of the virtio-net header in front of each frame: 10 or 12.
///
/// # Errors
/// EINVAL for a length the kernel does not know.
pub fn set_vnet_header_len(fd: BorrowedFd<'_>, len: usize) -> io::Result<()> {
    let len = libc::c_int::try_from(len).map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: TUNSETVNETHDRSZ reads one `int`.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETVNETHDRSZ, &len) })
}

/// Tells the kernel which work it may leave to the reader of this fd.
///
/// # Errors
/// EINVAL for a flag the kernel does not know; then nothing changes.
pub fn set_offload(fd: BorrowedFd<'_>, flags: u32) -> io::Result<()> {
    // SAFETY: TUNSETOFFLOAD takes its argument by value.
    check(unsafe {
        libc::ioctl(
            fd.as_raw_fd(),
            libc::TUNSETOFFLOAD,
            libc::c_ulong::from(flags),
        )
    })
}

/// Asks what `fd` is. VMMs make the same call on the fd they are given.
///
/// # Errors
/// ENOTTY when `fd` is no tun/tap at all, EBADFD when its device is gone.
pub fn info(fd: BorrowedFd<'_>) -> io::Result<TapInfo> {
    let mut request = empty_ifreq();
    // SAFETY: TUNGETIFF writes one `struct ifreq`, which `request` is. An fd that is no tap refuses
    // the number: its type byte 'T' with these sizes belongs to no other driver.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNGETIFF, &mut request) })?;
    // SAFETY: TUNGETIFF sets the flags member; every bit pattern is a valid integer.
    let flags = libc::c_int::from(unsafe { request.ifr_ifru.ifru_flags } as u16);
    Ok(TapInfo {
        name: ifreq_name(&request),
        tap: flags & libc::IFF_TAP != 0,
        no_packet_info: flags & libc::IFF_NO_PI != 0,
        vnet_header: flags & libc::IFF_VNET_HDR != 0,
        multi_queue: flags & libc::IFF_MULTI_QUEUE != 0,
    })
}

/// The IFF_* flags that the kernel's tun driver knows.
///
/// # Errors
/// When `fd` is not [`open`]'s.
pub fn features(fd: BorrowedFd<'_>) -> io::Result<u32> {
    let mut features: libc::c_uint = 0;
    // SAFETY: TUNGETFEATURES writes one `unsigned int`.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNGETFEATURES, &mut features) })?;
    Ok(features)
}

/// Makes a tap with a 12-byte little-endian virtio-net header: its fd and name.
///
/// # Errors
/// Those of [`open`] and [`attach`].
pub fn open_vnet(name: &str, multi_queue: bool) -> io::Result<(OwnedFd, String)> {
    let fd = open()?;
    let name = attach(fd.as_fd(), name, true, multi_queue)?;
    set_vnet_header_len(fd.as_fd(), crate::offload::VNET_HEADER_LEN)?;
    Ok((fd, name))
}

/// As [`open_vnet`], with this many queues: an fd for each.
///
/// # Errors
/// As there.
pub fn open_queues(name: &str, queues: u16) -> io::Result<Vec<OwnedFd>> {
    (0..queues.max(1))
        .map(|_| open_vnet(name, queues > 1).map(|(fd, _)| fd))
        .collect()
}

/// Makes a plain tap, without virtio-net header, by the `tun-tap` crate: its fd and name.
///
/// # Errors
/// Those of [`open`] and [`attach`].
pub fn open_plain(name: &str) -> io::Result<(OwnedFd, String)> {
    let tap = tun_tap::Iface::without_packet_info(name, tun_tap::Mode::Tap)?;
    tap.set_non_blocking()?;
    let name = tap.name().to_owned();
    // SAFETY: into_raw_fd hands over the only owner of the fd.
    Ok((unsafe { OwnedFd::from_raw_fd(tap.into_raw_fd()) }, name))
}

/// Takes every offload the kernel has for the reader of `fd`; whether UDP segmentation is among
/// them (it is both ways or not at all: Linux 6.2 brought both).
///
/// # Errors
/// When `fd` is no tap with a virtio-net header.
pub fn enable_offloads(fd: BorrowedFd<'_>) -> io::Result<bool> {
    match set_offload(fd, OFFLOAD_TSO | OFFLOAD_USO) {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
            set_offload(fd, OFFLOAD_TSO).map(|()| false)
        }
        result => result.map(|()| true),
    }
}

fn empty_ifreq() -> libc::ifreq {
    // SAFETY: `ifreq` is integers, byte arrays and a raw pointer: all-zero is a valid value.
    unsafe { std::mem::zeroed() }
}

fn ifreq_name(request: &libc::ifreq) -> String {
    let bytes = request.ifr_name.map(|c| c as u8);
    CStr::from_bytes_until_nul(&bytes)
        .map(|name| name.to_string_lossy().into_owned())
        .unwrap_or_default()
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}
