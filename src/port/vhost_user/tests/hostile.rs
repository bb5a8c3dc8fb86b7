//! What a guest or a front-end that means harm can write.

use std::fs::File;

use proptest::prelude::*;
use rustix::fs::{FallocateFlags, fallocate};

use super::*;
/// Address, length, flags and next of a descriptor.
type Fields = (u64, u32, u16, u16);

use crate::port::vhost_user::memory::{Memory, MemoryError, RegionInfo};
use crate::port::vhost_user::queue::Terms;
use crate::port::vhost_user::ring::{Addresses, Broken, CHAIN_DESCRIPTORS_MAX};
use crate::sys::userfault::Allowance;

/// The device has given up on queue `queue`, and on no other.
fn assert_given_up(driver: &mut Driver, queue: usize, what: &str) {
    let other = queue ^ 1;
    match other {
        0 => {
            driver.chain(0, &[(BUFFERS, 1000)]);
            driver.device.send(plain(&frame(60, 1))).unwrap();
            driver.device.flush();
            assert_eq!(driver.used(0).len(), 1, "{what}");
            let bytes = frame(60, 1);
            driver.send(&PLAIN, &bytes);
            assert!(settle(driver).is_empty(), "{what}: it is not looked at");
        }
        _ => {
            driver.send(&PLAIN, &frame(60, 1));
            assert_eq!(settle(driver).len(), 1, "{what}");
            assert_eq!(
                driver.device.send(plain(&frame(60, 1))),
                Err(DropReason::Unconnected),
                "{what}"
            );
        }
    }
}

/// The device has given up on all of the guest's queues.
fn assert_lost(driver: &mut Driver, what: &str) {
    driver.send(&PLAIN, &frame(60, 1));
    assert!(settle(driver).is_empty(), "{what}");
    let _ = driver.device.send(plain(&frame(60, 1)));
    let sent = driver.device.send(plain(&frame(60, 1)));
    assert_eq!(sent, Err(DropReason::Unconnected), "{what}");
}

#[test]
fn a_queue_whose_chains_are_wrong_is_given_up() {
    let end = GUEST + MEMORY_BYTES;
    // Descriptors from index 0 on, of a chain from the guest.
    let chains: [(&str, Vec<Fields>); 14] = [
        ("a loop", vec![(BUFFERS, 1, NEXT, 0)]),
        (
            "a loop of two",
            vec![(BUFFERS, 0, NEXT, 1), (BUFFERS, 0, NEXT, 0)],
        ),
        ("next past the end", vec![(BUFFERS, 60, NEXT, SIZE)]),
        ("below the memory", vec![(0, 100, 0, 0)]),
        ("at its end", vec![(end, 1, 0, 0)]),
        ("across its end", vec![(end - 10, 100, 0, 0)]),
        ("a length of 4 GiB", vec![(BUFFERS, u32::MAX, 0, 0)]),
        ("an address that wraps", vec![(u64::MAX - 10, 100, 0, 0)]),
        ("to be written", vec![(BUFFERS, 100, WRITE, 0)]),
        ("an empty table", vec![(BUFFERS, 0, INDIRECT, 0)]),
        ("a table of 17 bytes", vec![(BUFFERS, 17, INDIRECT, 0)]),
        (
            "a table with a successor",
            vec![(BUFFERS, 16, INDIRECT | NEXT, 1), (BUFFERS, 1, 0, 0)],
        ),
        ("a table outside", vec![(end - 16, 32, INDIRECT, 0)]),
        (
            "a table of 4 GiB",
            vec![(BUFFERS, 0xffff_fff0, INDIRECT, 0)],
        ),
    ];
    for (what, descriptors) in chains {
        let mut driver = Driver::start(terms());
        for (index, &fields) in descriptors.iter().enumerate() {
            driver.set_descriptor(Driver::descriptors_at(1), index as u16, fields);
        }
        driver.offer(1, 0);
        driver.kick(1);
        assert!(settle(&driver).is_empty(), "{what}");
        assert_given_up(&mut driver, 1, what);
    }
}

#[test]
fn a_table_in_a_table_is_no_chain() {
    let mut driver = Driver::start(terms());
    driver.set_descriptor(Driver::descriptors_at(1), 0, (BUFFERS, 16, INDIRECT, 0));
    driver.set_descriptor(BUFFERS, 0, (BUFFERS, 16, INDIRECT, 0));
    driver.offer(1, 0);
    driver.kick(1);
    assert!(settle(&driver).is_empty());
    assert_given_up(&mut driver, 1, "a table in a table");
}

#[test]
fn a_table_that_is_long_and_one_that_is_a_loop() {
    for (entries, last_next, admitted) in [
        (CHAIN_DESCRIPTORS_MAX as u16 - 1, None, true),
        (CHAIN_DESCRIPTORS_MAX as u16, None, false),
        (2, Some(0), false),
        (2, Some(2), false),
    ] {
        let mut driver = Driver::start(terms());
        let table = BUFFERS + 0x1_0000;
        for index in 0..entries {
            let last = index + 1 == entries;
            let (flags, next) = match (last, last_next) {
                (true, None) => (0, 0),
                (true, Some(next)) => (NEXT, next),
                (false, _) => (NEXT, index + 1),
            };
            driver.set_descriptor(table, index, (BUFFERS, 1, flags, next));
        }
        let bytes = u32::from(entries) * 16;
        driver.set_descriptor(Driver::descriptors_at(1), 0, (table, bytes, INDIRECT, 0));
        driver.offer(1, 0);
        driver.kick(1);
        assert_eq!(
            settle(&driver).len(),
            usize::from(admitted),
            "{entries} {last_next:?}"
        );
    }
}

#[test]
fn rings_whose_indices_are_wrong_are_given_up() {
    for queue in [0, 1] {
        for idx in [SIZE + 1, 0x8000, 0xffff] {
            let mut driver = Driver::start(terms());
            driver.write(Driver::available_at(queue) + 2, &idx.to_le_bytes());
            let _ = driver.device.send(plain(&frame(60, 1)));
            settle(&driver);
            driver.queues[queue].avail = idx;
            assert_given_up(&mut driver, queue, "an index that jumps");
        }
        let mut driver = Driver::start(terms());
        driver.offer(queue, SIZE);
        let _ = driver.device.send(plain(&frame(60, 1)));
        settle(&driver);
        assert_given_up(&mut driver, queue, "a head past the end");
    }
}

#[test]
fn a_queue_comes_back_when_it_is_set_up_again() {
    let mut driver = Driver::start(terms());
    driver.offer(1, SIZE);
    driver.kick(1);
    settle(&driver);
    driver.device.stop(1).unwrap();
    let avail = driver.queues[1].avail;
    driver
        .device
        .change(1, |queue| {
            queue.ring.set_next_avail(avail);
            Ok(())
        })
        .unwrap();
    driver
        .device
        .set_kick(1, driver.queues[1].kick.try_clone().unwrap())
        .unwrap();
    driver.send(&PLAIN, &frame(60, 8));
    assert_eq!(settle(&driver), [frame(60, 8)]);
}

#[test]
fn short_long_and_empty_frames_are_counted_and_given_back() {
    for (len, reason) in [
        (0, DropReason::Truncated),
        (11, DropReason::Truncated),
        (12 + 13, DropReason::Truncated),
        (12 + 65_535 + 14 + 8 + 1, DropReason::Oversized),
        (1 << 20, DropReason::Oversized),
    ] {
        let mut driver = Driver::start(terms());
        driver.chain(1, &[(BUFFERS, len)]);
        driver.kick(1);
        let (frames, _, counters) = recv(&driver);
        assert!(frames.is_empty());
        assert_eq!(drops(&counters), [(reason, 1)], "{len}");
        assert_eq!(driver.used(1), [(0, 0)]);
    }
}

#[test]
fn buffers_too_small_to_be_of_use_hold_nobody_up() {
    let mut driver = Driver::start(terms());
    for _ in 0..SIZE {
        driver.chain(0, &[(BUFFERS, 1)]);
    }
    assert_eq!(
        driver.device.send(plain(&frame(1500, 1))),
        Err(DropReason::EgressTooBig)
    );
    // Empty ones too.
    let mut driver = Driver::start(terms());
    for _ in 0..SIZE {
        driver.chain(0, &[(BUFFERS, 0)]);
    }
    assert_eq!(
        driver.device.send(plain(&frame(60, 1))),
        Err(DropReason::EgressTooBig)
    );
}

#[test]
fn memory_that_can_not_be_trusted_is_refused() {
    let ours = allowance::of_port();
    let map = |info: RegionInfo, file: File| Memory::map(vec![(info, file)], &ours).map(drop);
    let good = region(0x1000);
    assert_eq!(map(good, memfd(0x1000)), Ok(()));
    assert!(matches!(
        map(good, memfd(0xfff)),
        Err(MemoryError::Short { .. })
    ));
    let far = RegionInfo {
        file_offset: u64::MAX - 0x800,
        ..good
    };
    assert!(matches!(
        map(far, memfd(0x1000)),
        Err(MemoryError::Bounds(_))
    ));
    for wrong in [
        RegionInfo { bytes: 0, ..good },
        RegionInfo {
            guest_address: u64::MAX - 10,
            ..good
        },
        RegionInfo {
            front_end_address: u64::MAX - 10,
            ..good
        },
    ] {
        assert!(matches!(
            map(wrong, memfd(0x1000)),
            Err(MemoryError::Bounds(_))
        ));
    }
    let huge = RegionInfo {
        bytes: 1 << 43,
        ..good
    };
    assert_eq!(map(huge, memfd(0x1000)), Err(MemoryError::TooMuch));
    let many = (0..33).map(|n| {
        let info = RegionInfo {
            guest_address: GUEST + n * 0x1000,
            front_end_address: FRONT_END + n * 0x1000,
            ..good
        };
        (info, memfd(0x1000))
    });
    assert_eq!(
        Memory::map(many.collect(), &ours).map(drop),
        Err(MemoryError::TooMuch)
    );
    let overlapping = RegionInfo {
        front_end_address: FRONT_END + 0x10_0000,
        guest_address: GUEST + 0x800,
        ..good
    };
    let two = vec![(good, memfd(0x1000)), (overlapping, memfd(0x1000))];
    assert!(matches!(
        Memory::map(two, &ours),
        Err(MemoryError::Overlap(_))
    ));
    // A device, a pipe and a file that a disk is behind.
    let (pipe, _end) = rustix::pipe::pipe().unwrap();
    let disk = File::open(std::env::current_exe().unwrap()).unwrap();
    for file in [File::open("/dev/zero").unwrap(), pipe.into(), disk] {
        assert_eq!(map(good, file), Err(MemoryError::NotMemory));
    }
}

#[test]
fn a_buffer_may_lie_in_two_regions() {
    let second = RegionInfo {
        guest_address: GUEST + MEMORY_BYTES,
        front_end_address: FRONT_END + 2 * MEMORY_BYTES,
        ..region(0x1000)
    };
    let mut driver = Driver::start(terms());
    let file = driver.file.try_clone().unwrap();
    let more = memfd(0x1000);
    let regions = vec![
        (region(MEMORY_BYTES), file),
        (second, more.try_clone().unwrap()),
    ];
    let memory = Arc::new(Memory::map(regions, driver.device.allowance()).unwrap());
    driver.device.set_memory(&memory).unwrap();
    let bytes = [&PLAIN[..], &frame(100, 6)].concat();
    driver.write(GUEST + MEMORY_BYTES - 50, &bytes[..50]);
    std::os::unix::fs::FileExt::write_all_at(&more, &bytes[50..], 0).unwrap();
    driver.chain(1, &[(GUEST + MEMORY_BYTES - 50, 112)]);
    driver.kick(1);
    assert_eq!(settle(&driver), [frame(100, 6)]);
}

#[test]
fn memory_that_is_taken_away_is_used_no_more() {
    let mut driver = Driver::start(terms());
    for seed in 0..4 {
        driver.send(&PLAIN, &frame(60, seed));
        driver.chain(0, &[(BUFFERS, 1000)]);
    }
    // The buffers are gone, the rings are still there.
    driver.file.set_len(BUFFERS - GUEST).unwrap();
    // What is being copied is zeros; what comes next is refused.
    assert_eq!(
        driver.device.send(plain(&frame(60, 1))),
        Err(DropReason::EgressError)
    );
    assert!(settle(&driver).is_empty());
    assert_lost(&mut driver, "its memory is gone");
    // Other guests' ports go on, and so does this one when a front-end comes.
    let mut other = Driver::start(terms());
    other.send(&PLAIN, &frame(60, 7));
    assert_eq!(settle(&other), [frame(60, 7)]);
    driver.device.reset();
    let mut next = driver.again();
    next.send(&PLAIN, &frame(60, 8));
    assert_eq!(settle(&next), [frame(60, 8)]);
}

/// Puts other memory under a driver's queues, of which `pages` may be allocated for it.
fn allow(driver: &Driver, pages: u64) -> Arc<Allowance> {
    // Its tables: one for the entries, and what stands above them.
    const TABLES_BYTES: u64 = MEMORY_BYTES / 512 + MEMORY_BYTES / 512 / 32 + 4 * 4096;
    let allowance = Arc::new(Allowance::new(TABLES_BYTES + 4096 * pages, None));
    let regions = vec![(region(MEMORY_BYTES), driver.file.try_clone().unwrap())];
    let memory = Arc::new(Memory::map(regions, &allowance).unwrap());
    driver.device.set_memory(&memory).unwrap();
    assert_eq!(allowance.used(), TABLES_BYTES);
    allowance
}

fn allocated(file: &File) -> u64 {
    512 * rustix::fs::fstat(file).unwrap().st_blocks as u64
}

#[test]
fn holes_are_filled_as_far_as_that_is_allowed() {
    const HOLES: u64 = BUFFERS + 0x4_0000;
    const PAGES: u64 = 8;
    for (queue, is_punched) in [(0, false), (1, false), (0, true), (1, true)] {
        let what = format!("queue {queue}, punched {is_punched}");
        let mut driver = Driver::start(terms());
        let allowance = allow(&driver, PAGES);
        // Both rings and a buffer are there, as the driver wrote them: that costs nothing.
        for queue in [0, 1] {
            driver.write(Driver::used_at(queue), &[0]);
        }
        driver.write(BUFFERS, &[0]);
        driver.chain(0, &[(BUFFERS, 100)]);
        driver.send(&PLAIN, &frame(60, 1));
        let tables = allowance.used();
        assert_eq!(settle(&driver).len(), 1, "{what}");
        driver.device.send(plain(&frame(60, 1))).unwrap();
        assert_eq!(allowance.used(), tables, "{what}");

        let there = allocated(&driver.file);
        let touch = |driver: &mut Driver, n: u64| {
            // A page that was punched out is a hole again.
            let hole = HOLES + 4096 * if is_punched { 0 } else { n };
            driver.chain(queue, &[(hole, 100)]);
            driver.kick(queue);
            match queue {
                0 => drop(driver.device.send(plain(&frame(60, 1)))),
                _ => assert!(settle(driver).iter().flatten().all(|&byte| byte == 0)),
            }
            if is_punched {
                let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                fallocate(&driver.file, flags, hole - GUEST, 4096).unwrap();
            }
        };
        for n in 0..PAGES {
            // The same page again counts once: what it was before is gone.
            let filled = if is_punched { n.min(1) } else { n };
            assert_eq!(allowance.used(), tables + 4096 * filled, "{what}");
            touch(&mut driver, n);
        }
        if is_punched {
            assert_eq!(allowance.used(), tables + 4096, "{what}");
            assert!(allocated(&driver.file) <= there, "{what}");
            continue;
        }
        assert_eq!(allowance.used(), tables + 4096 * PAGES, "{what}");
        if queue == 0 {
            // The guest has what was written into a hole.
            assert_eq!(driver.read(HOLES + 12, 60), frame(60, 1), "{what}");
        }
        for n in PAGES..PAGES + 3 {
            touch(&mut driver, n);
        }
        assert_lost(&mut driver, &what);
        assert_eq!(allowance.used(), tables + 4096 * PAGES, "{what}");
        assert!(
            allocated(&driver.file) <= there + 4096 * (PAGES + 2),
            "{what}"
        );
    }
}

#[test]
fn what_was_allocated_counts_until_its_file_is_gone() {
    let driver = Driver::start(terms());
    let allowance = allow(&driver, 100);
    let tables = allowance.used();
    // Its used rings are holes.
    settle(&driver);
    let filled = allowance.used() - tables;
    assert!(filled >= 4096, "{filled}");
    let file = driver.file.try_clone().unwrap();
    driver.device.reset();
    drop(driver);
    allowance::settle();
    assert_eq!(
        allowance.used(),
        filled,
        "the tables are gone, the pages are not"
    );
    drop(file);
    allowance::settle();
    assert_eq!(allowance.used(), 0);
}

#[test]
fn memory_whose_tables_alone_are_too_much_is_refused() {
    let bytes = 1 << 40;
    let huge = RegionInfo {
        bytes,
        ..region(bytes)
    };
    let allowance = Arc::new(Allowance::new(1 << 20, None));
    let mapped = Memory::map(vec![(huge, memfd(bytes))], &allowance).map(drop);
    assert!(
        matches!(mapped, Err(MemoryError::Tables { .. })),
        "{mapped:?}"
    );
    assert_eq!(allowance.used(), 0);
}

#[test]
fn rings_that_lie_nowhere_are_refused() {
    let driver = Driver::start(terms());
    let end = FRONT_END + MEMORY_BYTES;
    let good = Addresses {
        descriptors: FRONT_END,
        available: FRONT_END + 0x1000,
        used: FRONT_END + 0x2000,
    };
    for wrong in [
        Addresses {
            descriptors: 0,
            ..good
        },
        Addresses {
            descriptors: FRONT_END + 8,
            ..good
        },
        Addresses {
            descriptors: end - 16,
            ..good
        },
        Addresses {
            available: FRONT_END + 1,
            ..good
        },
        Addresses {
            available: end - 64,
            ..good
        },
        Addresses {
            used: FRONT_END + 2,
            ..good
        },
        Addresses {
            used: u64::MAX - 3,
            ..good
        },
    ] {
        let set = driver
            .device
            .change(0, |queue| Ok(queue.ring.set_addresses(wrong)?));
        assert!(matches!(set, Err(device::SetupError::Ring(Broken::Ring))));
        assert!(driver.device.send(plain(&frame(60, 1))).is_err());
    }
    for size in [0, 3, 65_536, 1 << 20] {
        let set = driver
            .device
            .change(0, |queue| Ok(queue.ring.set_size(size)?));
        assert!(set.is_err(), "{size}");
    }
    assert!(driver.device.change(99, |_| Ok(())).is_err());
    assert!(driver.device.stop(usize::MAX).is_err());
    // Memory that no longer has the rings: the queue stands still.
    let mut driver = Driver::start(terms());
    assert!(driver.device.set_memory(&Arc::default()).is_err());
    driver.send(&PLAIN, &frame(60, 1));
    assert!(settle(&driver).is_empty());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// Whatever is in the tables and rings: it ends, nobody panics, and nothing but whole frames comes out.
    #[test]
    fn rings_of_any_content(
        table in prop::collection::vec(
            (
                prop_oneof![
                    (0..MEMORY_BYTES).prop_map(|at| GUEST + at),
                    Just(Driver::descriptors_at(0)),
                    Just(Driver::used_at(1)),
                    any::<u64>(),
                ],
                prop_oneof![0..200u32, 0..100_000u32, any::<u32>()],
                0..8u16,
                0..SIZE + 2,
            ),
            SIZE as usize,
        ),
        heads in prop::collection::vec(0..SIZE + 2, SIZE as usize),
        idx in prop_oneof![0..SIZE + 2, any::<u16>()],
        event_idx: bool,
        mergeable: bool,
        len in 14..70_000usize,
    ) {
        let mut driver = Driver::start(Terms { event_idx, mergeable, ..terms() });
        for queue in [0, 1] {
            for (index, &fields) in table.iter().enumerate() {
                // Half of them go the right way.
                let flags = if queue == 0 { fields.2 ^ WRITE } else { fields.2 };
                let fields = (fields.0, fields.1, flags, fields.3);
                driver.set_descriptor(Driver::descriptors_at(queue), index as u16, fields);
            }
            for (entry, head) in heads.iter().enumerate() {
                driver.write(Driver::available_at(queue) + 4 + 2 * entry as u64, &head.to_le_bytes());
            }
            driver.write(Driver::available_at(queue) + 2, &idx.to_le_bytes());
            driver.kick(queue);
        }
        let bytes = frame(len.min(crate::frame::FRAME_LEN_MAX), 1);
        for _ in 0..3 {
            let _ = driver.device.send(plain(&bytes));
            driver.device.flush();
        }
        for frame in settle(&driver) {
            prop_assert!((14..=crate::frame::FRAME_LEN_MAX).contains(&frame.len()));
        }
        driver.used(0);
    }
}
