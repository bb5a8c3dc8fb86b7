//! AF_PACKET with a TPACKET_V2 receive ring (packet(7), Documentation/networking/packet_mmap.rst).
//!
//! The ring is there because a packet socket's receive buffer can't be made large enough without
//! privilege: at 212,992 bytes it holds three super-frames and drops the rest of a burst. V2 because
//! V3 hands frames over by block, on a timer.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::mm::{MapFlags, ProtFlags};
use rustix::net::{AddressFamily, SocketFlags, SocketType};

use super::option;

/// Bytes of `struct virtio_net_hdr`, which PACKET_VNET_HDR puts in front of a frame.
pub const RING_VNET_HEADER_LEN: usize = 10;
/// One frame's slot: the largest frame (65,557 bytes), the ring's header, the virtio-net header and
/// alignment, in whole 4 KiB pages.
const SLOT_LEN: usize = 17 * 4096;
/// Slots in one physically contiguous allocation: just below 1 MiB, so that an order-8 one holds it.
const BLOCK_SLOTS: usize = 15;
/// 255 slots, 17 MiB of kernel memory: a burst of the tap queue's order without loss.
const BLOCKS: usize = 17;
const SLOTS: usize = BLOCK_SLOTS * BLOCKS;
const RING_LEN: usize = SLOTS * SLOT_LEN;
const _: () = assert!(SLOT_LEN >= crate::frame::FRAME_LEN_MAX + 256);
const _: () = assert!(BLOCK_SLOTS * SLOT_LEN <= 1 << 20);

/// Opens a packet socket with its ring on the link `index` of the caller's network namespace.
///
/// # Errors
/// EPERM without CAP_NET_RAW in the namespace, ENOMEM without room for the ring, EINVAL on kernels
/// before 4.20 (PACKET_IGNORE_OUTGOING).
pub fn open(index: u32) -> io::Result<OwnedFd> {
    // Protocol 0: nothing is received before bind, so no frame of another link gets in.
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let fd = rustix::net::socket_with(AddressFamily::PACKET, SocketType::RAW, flags, None)?;
    let set = |name, value| option::set(fd.as_fd(), libc::SOL_PACKET, name, value);
    set(
        libc::PACKET_VERSION,
        libc::tpacket_versions::TPACKET_V2 as libc::c_int,
    )?;
    // Before the ring: the kernel lays the slots out with room for it.
    set(libc::PACKET_VNET_HDR, 1)?;
    set(libc::PACKET_IGNORE_OUTGOING, 1)?;
    // Not PACKET_QDISC_BYPASS: on that path the kernel drops what the guest needs segmented
    // (__dev_direct_xmit in net/core/dev.c), and the tap has no queueing discipline to bypass.
    let ring = libc::tpacket_req {
        tp_block_size: (BLOCK_SLOTS * SLOT_LEN) as u32,
        tp_block_nr: BLOCKS as u32,
        tp_frame_size: SLOT_LEN as u32,
        tp_frame_nr: SLOTS as u32,
    };
    option::set(fd.as_fd(), libc::SOL_PACKET, libc::PACKET_RX_RING, ring)?;
    bind(fd.as_fd(), index)?;
    Ok(fd)
}

/// Frames that did not fit the ring since the last call.
///
/// # Errors
/// When `fd` is no packet socket.
pub fn take_drops(fd: BorrowedFd<'_>) -> io::Result<u32> {
    let stats: libc::tpacket_stats = option::get(fd, libc::SOL_PACKET, libc::PACKET_STATISTICS)?;
    Ok(stats.tp_drops)
}

fn bind(fd: BorrowedFd<'_>, index: u32) -> io::Result<()> {
    // SAFETY: `sockaddr_ll` is integers only: all-zero is a valid value.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = (libc::ETH_P_ALL as u16).to_be();
    address.sll_ifindex = index as libc::c_int;
    let len = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
    // SAFETY: `address` is alive and `len` is its size.
    let result = unsafe { libc::bind(fd.as_raw_fd(), (&raw const address).cast(), len) };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// One received frame, in the ring.
#[derive(Clone, Copy, Debug)]
pub struct RingFrame<'a> {
    /// `struct virtio_net_hdr`.
    pub vnet_header: &'a [u8],
    /// From the destination MAC on, as much as the slot held.
    pub bytes: &'a [u8],
    /// Length of the frame on the wire; more than `bytes` when it was cut.
    pub len: usize,
    /// The outer VLAN tag (TPID, TCI), which the kernel took out of the frame.
    pub vlan: Option<(u16, u16)>,
}

/// The mapped ring of a socket of [`open`].
pub struct PacketRing {
    fd: OwnedFd,
    base: NonNull<u8>,
    next: usize,
}

// SAFETY: the mapping is shared with the kernel only, belongs to this value alone and may be used
// and unmapped by any thread.
unsafe impl Send for PacketRing {}

impl PacketRing {
    /// Maps the ring of `fd`, which may come from another process. One `PacketRing` per socket:
    /// a second one would steal its frames.
    ///
    /// # Errors
    /// EINVAL when `fd` has no ring of the size that [`open`] makes.
    pub fn map(fd: OwnedFd) -> io::Result<Self> {
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a fresh mapping at an address of the kernel's choice touches no existing memory.
        let base = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                RING_LEN,
                protection,
                MapFlags::SHARED,
                &fd,
                0,
            )
        }?;
        let base = NonNull::new(base.cast()).ok_or(io::ErrorKind::InvalidData)?;
        Ok(Self { fd, base, next: 0 })
    }

    /// Shows the next frame to `read` and gives its slot back; `None` when there is none.
    pub fn next<T>(&mut self, read: impl FnOnce(RingFrame<'_>) -> T) -> Option<T> {
        let offset = self.next * SLOT_LEN;
        // SAFETY: `next` < SLOTS, so the slot lies inside the mapping, which lives as long as self.
        let slot = unsafe { self.base.add(offset) };
        // SAFETY: tp_status is the first member of the slot's header, 4-byte aligned because slots
        // are page aligned; the kernel accesses it concurrently, hence the atomic.
        let status = unsafe { AtomicU32::from_ptr(slot.as_ptr().cast()) };
        // Acquire: the frame's bytes, written before the status, are read after it.
        let state = status.load(Ordering::Acquire);
        if state & libc::TP_STATUS_USER == 0 {
            return None;
        }
        // SAFETY: between TP_STATUS_USER and TP_STATUS_KERNEL the slot is ours: nobody writes it.
        // The reference does not outlive this call, the slot is given back after it.
        let bytes = unsafe { std::slice::from_raw_parts(slot.as_ptr(), SLOT_LEN) };
        let result = read(parse_slot(bytes, state));
        status.store(libc::TP_STATUS_KERNEL, Ordering::Release);
        self.next = (self.next + 1) % SLOTS;
        Some(result)
    }
}

impl AsFd for PacketRing {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Drop for PacketRing {
    fn drop(&mut self) {
        // SAFETY: `base` is the start of our mapping of RING_LEN bytes; no reference into it is
        // left, since `next` lends none out.
        let _ = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), RING_LEN) };
    }
}

/// Reads `struct tpacket2_hdr` and what it points to. Lengths are clamped to the slot.
fn parse_slot(slot: &[u8], status: u32) -> RingFrame<'_> {
    let u16_at = |at: usize| u16::from_ne_bytes([slot[at], slot[at + 1]]);
    let u32_at = |at: usize| {
        u32::from_ne_bytes([slot[at], slot[at + 1], slot[at + 2], slot[at + 3]]) as usize
    };
    let start = usize::from(u16_at(12)).clamp(RING_VNET_HEADER_LEN, slot.len());
    let end = start.saturating_add(u32_at(8)).min(slot.len());
    let tpid = if status & libc::TP_STATUS_VLAN_TPID_VALID != 0 {
        u16_at(26)
    } else {
        libc::ETH_P_8021Q as u16
    };
    RingFrame {
        vnet_header: &slot[start - RING_VNET_HEADER_LEN..start],
        bytes: &slot[start..end],
        len: u32_at(4),
        vlan: (status & libc::TP_STATUS_VLAN_VALID != 0).then(|| (tpid, u16_at(24))),
    }
}

const _: () = assert!(std::mem::offset_of!(libc::tpacket2_hdr, tp_len) == 4);
const _: () = assert!(std::mem::offset_of!(libc::tpacket2_hdr, tp_snaplen) == 8);
const _: () = assert!(std::mem::offset_of!(libc::tpacket2_hdr, tp_mac) == 12);
const _: () = assert!(std::mem::offset_of!(libc::tpacket2_hdr, tp_vlan_tci) == 24);
const _: () = assert!(std::mem::offset_of!(libc::tpacket2_hdr, tp_vlan_tpid) == 26);
