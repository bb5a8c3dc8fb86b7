//! A guest's frames through the whole NAT, with a scripted host: no panic of the NAT, no fault inside
//! the TCP engine, no socket left when all timers have run.
#![no_main]

use lanlet::frame::{Duration, Frame, Instant, PortId};
use lanlet::nat::testing::{FakeUplink, FrameLog, lan};
use lanlet::nat::{Nat, NatConfig};
use lanlet::offload;
use lanlet::wire::Packet;
use libfuzzer_sys::fuzz_target;

/// A frame's length is the first two bytes of its record, the time before it the third.
const RECORD_HEADER_LEN: usize = 3;
/// Past every timeout of the NAT.
const DAY: Duration = Duration::from_secs(24 * 3600);

fuzz_target!(|input: &[u8]| {
    let mut now = Instant::from_secs(1);
    let config = NatConfig {
        lan: lan(),
        flows_max: 64,
        host: Default::default(),
        udp: Default::default(),
    };
    let mut nat = Nat::new(config, now);
    let (mut up, mut out) = (FakeUplink::new(1), FrameLog::default());
    out.keep = false;
    let mut rest = input;
    while let Some((header, behind)) = rest.split_first_chunk::<RECORD_HEADER_LEN>() {
        let len = usize::from(u16::from_le_bytes([header[0], header[1]])).min(behind.len());
        let (raw, next) = behind.split_at(len);
        rest = next;
        now += Duration::from_millis(u64::from(header[2]) * 100);
        if let Ok(offload) = offload::admit(raw) {
            let frame = Frame {
                bytes: &raw[offload::VNET_HEADER_LEN..],
                offload,
            };
            if let Ok(packet) = Packet::parse(frame, PortId(1)) {
                let _ = nat.handle_packet(&packet, now, (&mut up, &mut out));
            }
        }
        turn(&mut nat, now, &mut up, &mut out);
    }
    for _ in 0..1_000 {
        if nat.flows() == (0, 0, 0) {
            break;
        }
        now += DAY;
        turn(&mut nat, now, &mut up, &mut out);
    }
    let faults = nat.counters().find(|(name, _)| *name == "tcp_faults");
    assert_eq!(faults.map(|(_, count)| count), Some(0));
    assert_eq!((nat.flows(), up.open_count()), ((0, 0, 0), 0));
});

fn turn(nat: &mut Nat, now: Instant, up: &mut FakeUplink, out: &mut FrameLog) {
    for _ in 0..64 {
        let Some((owner, ready)) = up.poll_event() else {
            break;
        };
        nat.handle_ready(owner, ready, now, (&mut *up, &mut *out), &mut |_| {});
    }
    nat.flush(now, up, out);
    nat.handle_timeout(now, up, out);
}
