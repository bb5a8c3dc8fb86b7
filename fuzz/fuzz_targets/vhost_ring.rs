//! A guest that writes anything into its rings and tables: the port ends, panics never, and hands on
//! nothing but whole frames.
#![no_main]

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::sync::{Arc, OnceLock};

use lanlet::frame::{Batch, ETH_HEADER_LEN, FRAME_LEN_MAX, Frame};
use lanlet::offload::{Caps, Offload};
use lanlet::port::vhost_user::allowance;
use lanlet::port::vhost_user::device::Device;
use lanlet::port::vhost_user::memory::{Memory, RegionInfo};
use lanlet::port::vhost_user::queue::Terms;
use lanlet::port::vhost_user::ring::Addresses;
use lanlet::port::vhost_user::{NoShortcut, eventfd};
use lanlet::port::{More, Shortcut};
use lanlet::stats::PortCounters;
use libfuzzer_sys::fuzz_target;

/// Where the guest has its memory. Low, so that few bytes of input make an address in it.
const GUEST: u64 = 0x1_0000;
const BYTES: u64 = 0x4000;
/// Entries of each ring: few, so that both fit the 300 bytes of an input and some are left for what they
/// point to.
const SIZE: u32 = 4;
/// A queue's descriptors, available and used ring.
const RINGS_BYTES: u64 = 0x80;

/// The guest's memory, made once: it is written anew each time.
fn memory() -> &'static (File, Arc<Memory>) {
    static MEMORY: OnceLock<(File, Arc<Memory>)> = OnceLock::new();
    MEMORY.get_or_init(|| {
        let path = format!("/dev/shm/lanlet-fuzz-{}", std::process::id());
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).create_new(true).open(&path);
        let file = file.expect("a file in /dev/shm");
        let _ = std::fs::remove_file(path);
        file.set_len(BYTES).expect("its size");
        let info = RegionInfo {
            guest_address: GUEST,
            bytes: BYTES,
            front_end_address: GUEST,
            file_offset: 0,
        };
        let copy = file.try_clone().expect("a copy of its descriptor");
        let memory = Memory::map(vec![(info, copy)], &allowance::of_port()).expect("its mapping");
        (file, Arc::new(memory))
    })
}

fuzz_target!(|data: (u8, u16, u16, &[u8])| {
    let (options, base, len, bytes) = data;
    let (file, memory) = memory();
    // Both rings: descriptors, available, used, each at a place of its own; then whatever they point to.
    let mut image = vec![0; BYTES as usize];
    let count = bytes.len().min(image.len());
    image[..count].copy_from_slice(&bytes[..count]);
    file.write_all_at(&image, 0).expect("the guest's memory");
    let device = Device::new("fuzz".to_owned(), Arc::default()).expect("a device");
    device.set_memory(memory).expect("its memory");
    device.set_terms(Terms {
        caps: Caps {
            csum: options & 1 != 0,
            tso: options & 2 != 0,
            uso: false,
        },
        ecn: options & 4 != 0,
        mergeable: options & 8 != 0,
        long_header: options & 16 != 0,
        event_idx: options & 32 != 0,
    });
    for index in 0..2 {
        let at = GUEST + RINGS_BYTES * index as u64;
        let addresses = Addresses {
            descriptors: at,
            available: at + 0x40,
            used: at + 0x50,
        };
        let kick = eventfd().expect("an eventfd");
        let set = device.change(index, |queue| {
            queue.ring.set_size(SIZE)?;
            queue.ring.set_addresses(addresses)?;
            queue.ring.set_next_avail(base);
            queue.enabled = true;
            Ok(())
        });
        set.expect("a place in the memory");
        device.set_kick(index, kick).expect("its kick");
    }
    let frame_len = usize::from(len).clamp(ETH_HEADER_LEN, FRAME_LEN_MAX);
    let frame = vec![0x55; frame_len];
    let shortcut: &mut dyn Shortcut = &mut NoShortcut;
    for _ in 0..2 {
        let _ = device.send(Frame {
            bytes: &frame,
            offload: Offload::default(),
        });
        device.flush();
    }
    let counters = PortCounters::default();
    // It has no more than 4 chains to give, and gives up where it tells otherwise.
    for _ in 0..8 {
        let mut batch = Batch::new();
        let more = device.recv(&mut batch, &counters, shortcut);
        for frame in batch.frames() {
            assert!((ETH_HEADER_LEN..=FRAME_LEN_MAX).contains(&frame.bytes.len()));
        }
        if more == More::No {
            return;
        }
    }
    panic!("it never ends");
});
