//! A guest's driver and its front-end, in this process: it writes rings and buffers into a memfd.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::MemfdFlags;

use super::super::device::Device;
use super::super::memory::{Memory, RegionInfo};
use super::super::queue::Terms;
use super::super::ring::Addresses;
use crate::offload::Caps;
use crate::stats::PortCounters;

pub const GUEST: u64 = 0x1000_0000;
pub const FRONT_END: u64 = 0x7f00_0000_0000;
pub const MEMORY_BYTES: u64 = 4 << 20;
/// Entries of each ring.
pub const SIZE: u16 = 64;
/// Each queue has its rings in a stretch of this size, from the beginning.
const RINGS_BYTES: u64 = 0x4000;
/// Buffers begin here.
pub const BUFFERS: u64 = GUEST + 0x10_0000;

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

pub fn memfd(bytes: u64) -> File {
    let fd = rustix::fs::memfd_create("guest", MemfdFlags::CLOEXEC).unwrap();
    let file = File::from(fd);
    file.set_len(bytes).unwrap();
    file
}

pub fn region(bytes: u64) -> RegionInfo {
    RegionInfo {
        guest_address: GUEST,
        bytes,
        front_end_address: FRONT_END,
        file_offset: 0,
    }
}

/// What Linux's driver agrees to.
pub fn terms() -> Terms {
    Terms {
        caps: Caps {
            csum: true,
            tso: true,
            uso: false,
        },
        ecn: true,
        mergeable: true,
        long_header: true,
        event_idx: false,
    }
}

pub struct Driver {
    pub file: File,
    pub device: Arc<Device>,
    /// The port's.
    pub counters: Arc<PortCounters>,
    pub queues: Vec<DriverQueue>,
}

pub struct DriverQueue {
    pub kick: OwnedFd,
    pub call: OwnedFd,
    pub avail: u16,
    used_seen: u16,
    next_descriptor: u16,
}

fn bell() -> OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap()
}

fn copy(fd: &OwnedFd) -> OwnedFd {
    fd.try_clone().unwrap()
}

/// Whether a bell was rung, which silences it.
pub fn rung(fd: &OwnedFd) -> bool {
    rustix::io::read(fd, &mut [0; 8]).is_ok()
}

impl Driver {
    /// A driver with one pair of queues, on a device of its own.
    pub fn start(terms: Terms) -> Self {
        Self::with_queues(terms, 2)
    }

    pub fn with_queues(terms: Terms, count: usize) -> Self {
        let counters = Arc::<PortCounters>::default();
        let device = Arc::new(Device::new("test".to_owned(), Arc::clone(&counters)).unwrap());
        Self::on(device, counters, terms, count)
    }

    /// The guest's successor, on the same device and with other memory.
    pub fn again(self) -> Self {
        Self::on(self.device, self.counters, terms(), self.queues.len())
    }

    fn on(device: Arc<Device>, counters: Arc<PortCounters>, terms: Terms, count: usize) -> Self {
        let file = memfd(MEMORY_BYTES);
        let regions = vec![(region(MEMORY_BYTES), file.try_clone().unwrap())];
        device
            .set_memory(&Arc::new(Memory::map(regions, device.allowance()).unwrap()))
            .unwrap();
        device.set_terms(terms);
        let mut driver = Self {
            file,
            device,
            counters,
            queues: Vec::new(),
        };
        for index in 0..count {
            driver.add_queue(index);
        }
        driver
    }

    fn add_queue(&mut self, index: usize) {
        let queue = DriverQueue {
            kick: bell(),
            call: bell(),
            avail: 0,
            used_seen: 0,
            next_descriptor: 0,
        };
        let device = &self.device;
        let base = FRONT_END + index as u64 * RINGS_BYTES;
        let addresses = Addresses {
            descriptors: base,
            available: base + 0x1000,
            used: base + 0x2000,
        };
        device
            .change(index, |q| {
                q.ring.set_size(SIZE.into()).unwrap();
                q.ring.set_addresses(addresses)?;
                q.ring.set_next_avail(0);
                q.call = Some(copy(&queue.call));
                q.enabled = true;
                Ok(())
            })
            .unwrap();
        device.set_kick(index, copy(&queue.kick)).unwrap();
        self.queues.push(queue);
    }

    pub fn write(&self, address: u64, bytes: &[u8]) {
        self.file.write_all_at(bytes, address - GUEST).unwrap();
    }

    pub fn read(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.file
            .read_exact_at(&mut bytes, address - GUEST)
            .unwrap();
        bytes
    }

    fn word(&self, address: u64) -> u16 {
        u16::from_le_bytes(self.read(address, 2).try_into().unwrap())
    }

    pub fn descriptors_at(queue: usize) -> u64 {
        GUEST + queue as u64 * RINGS_BYTES
    }

    pub fn available_at(queue: usize) -> u64 {
        Self::descriptors_at(queue) + 0x1000
    }

    pub fn used_at(queue: usize) -> u64 {
        Self::descriptors_at(queue) + 0x2000
    }

    pub fn descriptor(
        table: u64,
        index: u16,
        (address, len, flags, next): (u64, u32, u16, u16),
    ) -> (u64, Vec<u8>) {
        let mut bytes = address.to_le_bytes().to_vec();
        bytes.extend(len.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        (table + 16 * u64::from(index), bytes)
    }

    pub fn set_descriptor(&self, table: u64, index: u16, fields: (u64, u32, u16, u16)) {
        let (at, bytes) = Self::descriptor(table, index, fields);
        self.write(at, &bytes);
    }

    /// Makes a chain available whose descriptors the driver has written from `head` on.
    pub fn offer(&mut self, queue: usize, head: u16) {
        let avail = self.queues[queue].avail;
        let entry = Self::available_at(queue) + 4 + 2 * u64::from(avail % SIZE);
        self.write(entry, &head.to_le_bytes());
        let avail = avail.wrapping_add(1);
        self.queues[queue].avail = avail;
        self.write(Self::available_at(queue) + 2, &avail.to_le_bytes());
    }

    /// A chain of buffers, made available: its head.
    pub fn chain(&mut self, queue: usize, buffers: &[(u64, u32)]) -> u16 {
        let flags = if queue.is_multiple_of(2) { WRITE } else { 0 };
        let head = self.queues[queue].next_descriptor;
        for (n, &(address, len)) in buffers.iter().enumerate() {
            let index = (head + n as u16) % SIZE;
            let last = n + 1 == buffers.len();
            let flags = if last { flags } else { flags | NEXT };
            let fields = (address, len, flags, (index + 1) % SIZE);
            self.set_descriptor(Self::descriptors_at(queue), index, fields);
        }
        self.queues[queue].next_descriptor = (head + buffers.len() as u16) % SIZE;
        self.offer(queue, head);
        head
    }

    pub fn kick(&self, queue: usize) {
        rustix::io::write(&self.queues[queue].kick, &1u64.to_ne_bytes()).unwrap();
    }

    /// Makes a chain available and kicks as a driver with EVENT_IDX does (virtio 1.2, 2.7.10): where the
    /// device has asked for it.
    pub fn chain_and_kick(&mut self, queue: usize, buffers: &[(u64, u32)]) {
        let before = self.queues[queue].avail;
        self.chain(queue, buffers);
        let avail_event = self.word(Self::used_at(queue) + 4 + 8 * u64::from(SIZE));
        if avail_event == before {
            self.kick(queue);
        }
    }

    /// Sends a frame with a header before it, in one buffer.
    pub fn send(&mut self, header: &[u8], frame: &[u8]) {
        let n = u64::from(self.queues[1].avail % SIZE);
        let at = BUFFERS + 0x8_0000 + n * 0x2000;
        let bytes = [header, frame].concat();
        self.write(at, &bytes);
        self.chain(1, &[(at, bytes.len() as u32)]);
        self.kick(1);
    }

    /// The chains given back since this was called last: head and length.
    pub fn used(&mut self, queue: usize) -> Vec<(u32, u32)> {
        let used = Self::used_at(queue);
        let end = self.word(used + 2);
        let mut elements = Vec::new();
        while self.queues[queue].used_seen != end {
            let entry = u64::from(self.queues[queue].used_seen % SIZE);
            let bytes = self.read(used + 4 + 8 * entry, 8);
            let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
            elements.push((word(0), word(4)));
            self.queues[queue].used_seen = self.queues[queue].used_seen.wrapping_add(1);
        }
        elements
    }
}
