mod driver;
mod front_end;
mod hostile;

use std::sync::atomic::Ordering::Relaxed;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use self::driver::*;
use super::queue::Terms;
use super::*;
use crate::offload::{Csum, Gso, Offload};
use crate::port::PortRx;

const PLAIN: [u8; 12] = [0; 12];

/// A frame whose bytes tell where they belong.
fn frame(len: usize, seed: u8) -> Vec<u8> {
    let mut frame: Vec<u8> = (0..len)
        .map(|n| (n as u8).wrapping_mul(31) ^ seed)
        .collect();
    frame[..12].copy_from_slice(&[2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2]);
    frame[12..14].copy_from_slice(&[0x88, 0xb5]);
    frame
}

fn plain(bytes: &[u8]) -> Frame<'_> {
    Frame {
        bytes,
        offload: Offload::default(),
    }
}

/// What the device reads in one go.
fn recv(driver: &Driver) -> (Vec<Vec<u8>>, More, PortCounters) {
    let counters = PortCounters::default();
    let mut batch = Batch::new();
    let more = driver.device.recv(&mut batch, &counters, &mut NoShortcut);
    let frames = batch.frames().map(|frame| frame.bytes.to_vec());
    (frames.collect(), more, counters)
}

fn drops(counters: &PortCounters) -> Vec<(DropReason, u64)> {
    counters.dropped().collect()
}

/// Whether the worker would be woken.
fn wakes(driver: &Driver) -> bool {
    let mut fds = [PollFd::new(driver.device.epoll(), PollFlags::IN)];
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    poll(&mut fds, Some(&now)).unwrap() == 1
}

/// Reads until nothing more comes, and the worker would sleep.
fn settle(driver: &Driver) -> Vec<Vec<u8>> {
    let mut all = Vec::new();
    for _ in 0..100 {
        let (frames, more, _) = recv(driver);
        all.extend(frames);
        if more == More::No {
            return all;
        }
    }
    panic!("it never ends");
}

#[test]
fn frames_come_in_and_buffers_go_back() {
    let mut driver = Driver::start(terms());
    settle(&driver);
    assert!(!wakes(&driver));
    for seed in 0..3 {
        driver.send(&PLAIN, &frame(60 + usize::from(seed), seed));
    }
    assert!(wakes(&driver));
    let (frames, more, counters) = recv(&driver);
    assert_eq!(
        frames,
        (0..3)
            .map(|seed| frame(60 + usize::from(seed), seed))
            .collect::<Vec<_>>()
    );
    assert_eq!(more, More::No);
    assert!(!wakes(&driver), "and the worker may sleep");
    assert_eq!(counters.rx_frames.load(Relaxed), 3);
    assert_eq!(driver.used(1), [(0, 0), (1, 0), (2, 0)]);
    assert!(rung(&driver.queues[1].call));
}

#[test]
fn any_layout_of_a_chain_is_read() {
    let mut driver = Driver::start(terms());
    let bytes = [&PLAIN[..], &frame(1000, 7)].concat();
    driver.write(BUFFERS, &bytes);
    // The header in two pieces, then the frame in three; the whole in one; through an indirect table.
    driver.chain(
        1,
        &[
            (BUFFERS, 5),
            (BUFFERS + 5, 7),
            (BUFFERS + 12, 1),
            (BUFFERS + 13, 500),
            (BUFFERS + 513, 499),
        ],
    );
    driver.chain(1, &[(BUFFERS, 1012)]);
    let table = BUFFERS + 0x1_0000;
    driver.set_descriptor(table, 0, (BUFFERS, 12, NEXT, 1));
    driver.set_descriptor(table, 1, (BUFFERS + 12, 1000, 0, 0));
    driver.set_descriptor(Driver::descriptors_at(1), 40, (table, 32, INDIRECT, 0));
    driver.offer(1, 40);
    driver.kick(1);
    assert_eq!(settle(&driver), vec![frame(1000, 7); 3]);
    assert_eq!(driver.used(1), [(0, 0), (5, 0), (40, 0)]);
}

#[test]
fn a_frame_is_spread_over_as_many_buffers_as_it_needs() {
    let mut driver = Driver::start(terms());
    for n in 0..4 {
        driver.chain(0, &[(BUFFERS + n * 0x1000, 500)]);
    }
    let sent = frame(1200, 9);
    driver.device.send(plain(&sent)).unwrap();
    assert_eq!(driver.used(0), [], "shown with the batch");
    driver.device.flush();
    assert_eq!(driver.used(0), [(0, 500), (1, 500), (2, 212)]);
    assert!(rung(&driver.queues[0].call));
    let mut got = driver.read(BUFFERS, 500);
    got.extend(driver.read(BUFFERS + 0x1000, 500));
    got.extend(driver.read(BUFFERS + 0x2000, 212));
    assert_eq!(
        got[..12],
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 3, 0],
        "num_buffers"
    );
    assert_eq!(got[12..], sent);
    driver.device.flush();
    assert!(!rung(&driver.queues[0].call), "called once per batch");
}

#[test]
fn without_merging_a_frame_fits_its_buffer_or_is_dropped() {
    let mut driver = Driver::start(Terms {
        mergeable: false,
        ..terms()
    });
    driver.chain(0, &[(BUFFERS, 12), (BUFFERS + 0x1000, 600)]);
    driver.chain(0, &[(BUFFERS + 0x2000, 600)]);
    let too_big = frame(601, 1);
    assert_eq!(
        driver.device.send(plain(&too_big)),
        Err(DropReason::EgressTooBig)
    );
    driver.device.send(plain(&frame(600, 2))).unwrap();
    driver.device.flush();
    assert_eq!(driver.used(0), [(0, 612)]);
    assert_eq!(driver.read(BUFFERS + 10, 2), [1, 0]);
    assert_eq!(driver.read(BUFFERS + 0x1000, 600), frame(600, 2));
}

#[test]
fn a_legacy_drivers_header_is_shorter() {
    let mut driver = Driver::start(Terms {
        mergeable: false,
        long_header: false,
        ..terms()
    });
    driver.send(&PLAIN[..10], &frame(64, 3));
    assert_eq!(settle(&driver), [frame(64, 3)]);
    driver.chain(0, &[(BUFFERS, 2000)]);
    driver.device.send(plain(&frame(64, 4))).unwrap();
    driver.device.flush();
    assert_eq!(driver.used(0), [(0, 74)]);
    assert_eq!(driver.read(BUFFERS + 10, 64), frame(64, 4));
}

#[test]
fn what_finds_no_buffers_waits_for_the_drivers_kick() {
    for event_idx in [false, true] {
        let mut driver = Driver::start(Terms {
            event_idx,
            ..terms()
        });
        settle(&driver);
        for seed in 0..3 {
            driver.device.send(plain(&frame(100, seed))).unwrap();
        }
        driver.device.flush();
        assert_eq!(driver.used(0), []);
        let quiet = driver.read(Driver::used_at(0), 2) != [0, 0];
        assert!(!quiet, "the driver is asked to kick");
        driver.chain(0, &[(BUFFERS, 1000)]);
        driver.chain(0, &[(BUFFERS + 0x1000, 1000)]);
        driver.kick(0);
        assert!(wakes(&driver));
        assert!(settle(&driver).is_empty());
        assert_eq!(driver.used(0), [(0, 112), (1, 112)]);
        assert_eq!(driver.read(BUFFERS + 0x1000 + 12, 100), frame(100, 1));
        // The third is still the next, whatever comes after it.
        driver.device.send(plain(&frame(100, 3))).unwrap();
        driver.chain(0, &[(BUFFERS, 1000)]);
        driver.chain(0, &[(BUFFERS + 0x1000, 1000)]);
        driver.device.flush();
        assert_eq!(driver.used(0), [(2, 112), (3, 112)]);
        assert_eq!(driver.read(BUFFERS + 12, 100), frame(100, 2));
        assert_eq!(driver.read(BUFFERS + 0x1000 + 12, 100), frame(100, 3));
        let quiet = driver.read(Driver::used_at(0), 2) != [0, 0];
        assert!(quiet || event_idx, "nothing waits: kicks are of no use");
    }
}

#[test]
fn a_frame_gets_its_buffers_one_kick_after_the_other() {
    for event_idx in [false, true] {
        let mut driver = Driver::start(Terms {
            event_idx,
            ..terms()
        });
        settle(&driver);
        driver.device.send(plain(&frame(1200, 1))).unwrap();
        // By the worker that reads the port, before the one that sent has flushed it.
        settle(&driver);
        for n in 0..3 {
            assert_eq!(driver.used(0), [], "{n}");
            let buffer = [(BUFFERS + n * 0x1000, 500)];
            match event_idx {
                true => driver.chain_and_kick(0, &buffer),
                false => {
                    driver.chain(0, &buffer);
                    driver.kick(0);
                }
            }
            assert!(wakes(&driver), "{n}: the driver was asked to kick");
            settle(&driver);
        }
        assert_eq!(driver.used(0), [(0, 500), (1, 500), (2, 212)]);
    }
}

#[test]
fn what_waits_is_bounded_and_lost_with_its_guest() {
    let driver = Driver::start(terms());
    let big = frame(60_000, 1);
    let mut kept = 0;
    while driver.device.send(plain(&big)).is_ok() {
        kept += 1;
    }
    assert_eq!(kept, queue::BACKLOG_BYTES_MAX / 60_012);
    assert_eq!(driver.device.send(plain(&big)), Err(DropReason::EgressFull));
    driver.device.stop(0).unwrap();
    assert_eq!(
        driver.device.send(plain(&big)),
        Err(DropReason::Unconnected)
    );
    assert_eq!(
        drops(&driver.counters),
        [(DropReason::Abandoned, kept as u64)]
    );
    // And by number; with none left over where the ring breaks under the first.
    let mut driver = Driver::start(terms());
    driver.device.send(plain(&big)).unwrap();
    driver.device.send(plain(&big)).unwrap();
    driver.chain(0, &[(0, 1000)]);
    driver.device.flush();
    assert_eq!(drops(&driver.counters), [(DropReason::Abandoned, 2)]);
    driver.device.reset();
    let mut driver = driver.again();
    let small = frame(60, 1);
    let kept = (0..).take_while(|_| driver.device.send(plain(&small)).is_ok());
    assert_eq!(kept.count(), queue::BACKLOG_FRAMES_MAX);
    driver.device.reset();
    driver = driver.again();
    let kept = (0..).take_while(|_| driver.device.send(plain(&big)).is_ok());
    assert_eq!(kept.count(), queue::BACKLOG_BYTES_MAX / 60_012);
}

#[test]
fn offloads_pass_as_the_guest_agreed() {
    let mut driver = Driver::start(Terms {
        ecn: false,
        ..terms()
    });
    let mut tcp = vec![0; 14 + 20 + 20 + 3000];
    tcp[12..14].copy_from_slice(&[8, 0]);
    tcp[14] = 0x45;
    tcp[16..18].copy_from_slice(&3040u16.to_be_bytes());
    tcp[23] = 6;
    tcp[46] = 0x50;
    let offload = Offload {
        csum: Csum::Partial {
            start: 34,
            offset: 16,
        },
        gso: Gso::Tcp4(1448),
        ecn: true,
    };
    for n in 0..4 {
        driver.chain(0, &[(BUFFERS + n * 0x1000, 4000)]);
    }
    let sent = Frame {
        bytes: &tcp,
        offload,
    };
    driver.device.send(sent).unwrap();
    driver.device.flush();
    let header = driver.read(BUFFERS, 12);
    assert_eq!(header, [1, 1, 54, 0, 0xa8, 5, 34, 0, 16, 0, 1, 0]);
    // And back in.
    driver.send(&header, &tcp);
    let counters = PortCounters::default();
    let mut batch = Batch::new();
    driver.device.recv(&mut batch, &counters, &mut NoShortcut);
    let got = batch.frames().next().unwrap();
    assert_eq!(
        got.offload,
        Offload {
            ecn: false,
            ..offload
        }
    );
    assert_eq!(got.bytes, tcp);
    // DATA_VALID is not for a guest that agreed on no checksums, nor is such a super-frame.
    driver.device.set_terms(Terms {
        caps: Caps::default(),
        ..terms()
    });
    assert_eq!(driver.device.send(sent), Err(DropReason::EgressError));
    let valid = Offload {
        csum: Csum::Valid,
        ..Offload::default()
    };
    let bytes = frame(60, 1);
    driver.used(0);
    driver
        .device
        .send(Frame {
            bytes: &bytes,
            offload: valid,
        })
        .unwrap();
    assert_eq!(driver.read(BUFFERS + 0x1000, 1), [0]);
}

#[test]
fn the_driver_is_called_when_it_wants_to_be() {
    let mut driver = Driver::start(terms());
    let send = |driver: &mut Driver| {
        driver.chain(0, &[(BUFFERS, 1000)]);
        driver.device.send(plain(&frame(60, 1))).unwrap();
        driver.device.flush();
        rung(&driver.queues[0].call)
    };
    assert!(send(&mut driver));
    driver.write(Driver::available_at(0), &[1, 0]);
    assert!(!send(&mut driver), "VIRTQ_AVAIL_F_NO_INTERRUPT");

    let mut driver = Driver::start(Terms {
        event_idx: true,
        ..terms()
    });
    let used_event = Driver::available_at(0) + 4 + 2 * u64::from(SIZE);
    assert!(send(&mut driver), "event 0 is the first buffer");
    assert!(!send(&mut driver), "and no other");
    driver.write(used_event, &3u16.to_le_bytes());
    assert!(!send(&mut driver));
    assert!(send(&mut driver));
}

#[test]
fn a_call_that_would_block_is_left() {
    let mut driver = Driver::start(terms());
    let call = &driver.queues[0].call;
    rustix::io::write(call, &(u64::MAX - 1).to_ne_bytes()).unwrap();
    let flags = rustix::fs::fcntl_getfl(call).unwrap();
    rustix::fs::fcntl_setfl(call, flags - rustix::fs::OFlags::NONBLOCK).unwrap();
    driver.chain(0, &[(BUFFERS, 1000)]);
    driver.device.send(plain(&frame(60, 1))).unwrap();
    driver.device.flush();
    assert_eq!(driver.used(0), [(0, 72)]);
}

#[test]
fn indices_wrap() {
    let mut driver = Driver::start(terms());
    for n in 0..70_000u32 {
        let bytes = frame(60, n as u8);
        driver.send(&PLAIN, &bytes);
        driver.chain(0, &[(BUFFERS, 1000)]);
        driver.device.send(plain(&bytes)).unwrap();
        driver.device.flush();
        let counters = PortCounters::default();
        let mut batch = Batch::new();
        driver.device.recv(&mut batch, &counters, &mut NoShortcut);
        assert_eq!(batch.frames().next().unwrap().bytes, bytes);
        if n % 32 == 0 {
            assert_eq!(driver.used(0).len(), if n == 0 { 1 } else { 32 });
            assert_eq!(driver.used(1).len(), if n == 0 { 1 } else { 32 });
        }
    }
}

#[test]
fn flows_spread_over_queues_and_keep_to_theirs() {
    let mut driver = Driver::with_queues(terms(), 8);
    let datagram = |port: u16| {
        let mut bytes = frame(60, 0);
        bytes[12..14].copy_from_slice(&[8, 0]);
        bytes[14] = 0x45;
        bytes[20..22].fill(0);
        bytes[34..36].copy_from_slice(&port.to_be_bytes());
        bytes
    };
    for queue in [0, 2, 4, 6] {
        for n in 0..32 {
            driver.chain(queue, &[(BUFFERS + 0x1000 * n, 1000)]);
        }
    }
    for port in 0..16 {
        driver.device.send(plain(&datagram(port))).unwrap();
    }
    driver.device.flush();
    let first = [0, 2, 4, 6].map(|queue| driver.used(queue).len());
    assert_eq!(first.iter().sum::<usize>(), 16);
    assert!(first.iter().all(|&count| count != 0), "{first:?}");
    for port in 0..16 {
        driver.device.send(plain(&datagram(port))).unwrap();
    }
    driver.device.flush();
    assert_eq!([0, 2, 4, 6].map(|queue| driver.used(queue).len()), first);
    // And all of them are read.
    for queue in [1, 3, 5, 7] {
        driver.write(BUFFERS, &[&PLAIN[..], &frame(60, 5)].concat());
        driver.chain(queue, &[(BUFFERS, 72)]);
    }
    driver.kick(7);
    assert_eq!(settle(&driver).len(), 4);
}

#[test]
fn a_queue_that_is_not_enabled_is_emptied() {
    let mut driver = Driver::start(terms());
    settle(&driver);
    let off = |queue: &mut queue::Queue| {
        queue.enabled = false;
        Ok(())
    };
    driver.device.change(0, off).unwrap();
    driver.device.change(1, off).unwrap();
    driver.send(&PLAIN, &frame(60, 1));
    let (frames, _, counters) = recv(&driver);
    assert!(frames.is_empty());
    assert_eq!(drops(&counters), [(DropReason::Unconnected, 1)]);
    assert_eq!(driver.used(1), [(0, 0)]);
    assert_eq!(
        driver.device.send(plain(&frame(60, 1))),
        Err(DropReason::Unconnected)
    );
}

#[test]
fn a_queue_goes_on_where_it_was_stopped() {
    let mut driver = Driver::start(terms());
    driver.send(&PLAIN, &frame(60, 1));
    settle(&driver);
    driver.send(&PLAIN, &frame(60, 2));
    assert_eq!(
        driver.device.stop(1).unwrap(),
        1,
        "the second was not looked at"
    );
    assert!(settle(&driver).is_empty());
    driver
        .device
        .set_kick(1, driver.queues[1].kick.try_clone().unwrap())
        .unwrap();
    assert!(
        wakes(&driver),
        "what was kicked for meanwhile is not missed"
    );
    assert_eq!(settle(&driver), [frame(60, 2)]);
    assert_eq!(driver.used(1), [(0, 0), (1, 0)]);
}

#[test]
fn buffers_that_are_filled_go_back_when_the_queue_stops() {
    let mut driver = Driver::start(terms());
    for n in 0..2 {
        driver.chain(0, &[(BUFFERS + n * 0x1000, 1000)]);
    }
    driver.device.send(plain(&frame(100, 1))).unwrap();
    assert_eq!(driver.device.stop(0).unwrap(), 1);
    assert_eq!(driver.used(0), [(0, 112)], "before any flush");
    assert!(rung(&driver.queues[0].call));
    let kick = driver.queues[0].kick.try_clone().unwrap();
    driver.device.set_kick(0, kick).unwrap();
    driver.device.send(plain(&frame(100, 2))).unwrap();
    driver.device.flush();
    assert_eq!(driver.used(0), [(1, 112)]);
}

#[test]
fn a_full_batch_is_gone_on_with() {
    let mut driver = Driver::start(terms());
    for seed in 0..50 {
        driver.send(&PLAIN, &frame(60, seed));
    }
    let table = BUFFERS;
    driver.write(table, &[0; 12]);
    // Nine super-frames in the same memory: a batch holds seven.
    for _ in 0..9 {
        driver.chain(1, &[(BUFFERS, 60_000)]);
    }
    let (frames, more, _) = recv(&driver);
    assert!(frames.len() < 59);
    assert_eq!(more, More::Yes);
    assert!(wakes(&driver), "the worker may turn to others meanwhile");
    assert_eq!(frames.len() + settle(&driver).len(), 59);
    assert!(!wakes(&driver));
}

/// Takes all large frames.
struct Sink(usize);

impl Shortcut for Sink {
    fn leads(&self, _: &[u8]) -> bool {
        true
    }

    fn send(&mut self, frame: &RemoteFrame<'_>) -> bool {
        self.0 += frame.frame_len();
        true
    }
}

#[test]
fn a_guest_with_many_queues_holds_its_worker_no_longer_than_one_with_one() {
    // Frames that are refused.
    let mut driver = Driver::with_queues(terms(), device::QUEUES_MAX);
    for queue in (1..device::QUEUES_MAX).step_by(2) {
        for _ in 0..SIZE {
            driver.chain(queue, &[(BUFFERS, 1)]);
        }
    }
    let mut refused = 0;
    for _ in 0..device::QUEUE_PAIRS_MAX {
        let (_, more, counters) = recv(&driver);
        assert_eq!(more, More::Yes);
        assert_eq!(drops(&counters), [(DropReason::Truncated, 64)]);
        refused += 64;
    }
    assert_eq!(refused, device::QUEUE_PAIRS_MAX * usize::from(SIZE));
    for queue in (1..device::QUEUES_MAX).step_by(2) {
        assert_eq!(driver.used(queue).len(), usize::from(SIZE), "{queue}");
    }
    // And such as go straight to their receiver.
    let mut driver = Driver::with_queues(terms(), 4);
    for queue in [1, 3, 1, 3] {
        for _ in 0..SIZE / 4 {
            driver.chain(queue, &[(BUFFERS, 60_012)]);
        }
    }
    for turn in 0..4 {
        let (mut batch, mut sink) = (Batch::new(), Sink(0));
        let counters = PortCounters::default();
        let more = driver.device.recv(&mut batch, &counters, &mut sink);
        assert_eq!((more, sink.0), (More::Yes, 9 * 60_000));
        let used = [1, 3].map(|queue| driver.used(queue).len());
        assert_eq!(used, if turn % 2 == 0 { [9, 0] } else { [0, 9] });
    }
}

/// Leads to another driver's device, for frames whose 13th byte says so.
struct To<'a>(&'a Driver, Vec<usize>);

impl Shortcut for To<'_> {
    fn leads(&self, head: &[u8]) -> bool {
        head[12] == 0x88
    }

    fn send(&mut self, frame: &RemoteFrame<'_>) -> bool {
        self.1.push(frame.frame_len());
        self.0.device.send_remote(frame).unwrap();
        true
    }
}

#[test]
fn large_frames_go_straight_from_guest_to_guest() {
    let (mut from, mut to) = (Driver::start(terms()), Driver::start(terms()));
    let (small, large, other) = (frame(60, 1), frame(30_000, 2), {
        let mut other = frame(5000, 3);
        other[12] = 8;
        other
    });
    let at = BUFFERS + 0x10_0000;
    from.write(at, &[&PLAIN[..], &large].concat());
    from.write(at + 0x1_0000, &[&PLAIN[..], &other].concat());
    // In pieces that are the receiver's nowhere.
    let pieces = [
        (at, 12),
        (at + 12, 100),
        (at + 112, 9_000),
        (at + 9_112, 20_900),
    ];
    for n in 0..8 {
        to.chain(0, &[(BUFFERS + n * 0x1000, 4_000), (at + n * 0x1000, 96)]);
    }
    from.chain(1, &pieces);
    from.send(&PLAIN, &small);
    from.chain(1, &pieces);
    from.chain(1, &[(at + 0x1_0000, 5012)]);
    from.kick(1);

    let mut shortcut = To(&to, Vec::new());
    let mut got = Vec::new();
    let mut rounds = 0;
    let counters = PortCounters::default();
    loop {
        let mut batch = Batch::new();
        let more = from.device.recv(&mut batch, &counters, &mut shortcut);
        rounds += 1;
        got.extend(batch.frames().map(|frame| frame.bytes.to_vec()));
        // Those before a large frame are out of the batch before it goes.
        assert_eq!(shortcut.1.len(), rounds.min(2));
        if more == More::No {
            break;
        }
    }
    assert_eq!(got, [small, other]);
    assert_eq!(shortcut.1, [30_000, 30_000]);
    assert_eq!(counters.rx_frames.load(Relaxed), 4);
    assert_eq!(from.used(1).len(), 4);
    to.device.flush();
    let read = |to: &Driver| {
        let all = (0..8).flat_map(|n| {
            let mut chain = to.read(BUFFERS + n * 0x1000, 4_000);
            chain.extend(to.read(at + n * 0x1000, 96));
            chain
        });
        all.take(30_012).collect::<Vec<u8>>()
    };
    assert_eq!(to.used(0).len(), 8);
    assert_eq!(read(&to)[10..12], [8, 0]);
    assert_eq!(read(&to)[12..], large);
    // The second found no buffers: it was copied, and its sender has its own back.
    from.write(at, &vec![0; 0x1_0000]);
    to.write(BUFFERS, &vec![0; 0x8000]);
    for n in 0..8 {
        to.chain(0, &[(BUFFERS + n * 0x1000, 4_000), (at + n * 0x1000, 96)]);
    }
    to.kick(0);
    settle(&to);
    assert_eq!(to.used(0).len(), 8);
    assert_eq!(read(&to)[12..], large);
}
