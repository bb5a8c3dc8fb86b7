//! What a frame costs between ports: admit, fit and encode it whole; complete its checksum; cut
//! 64 KB into segments; join a batch of segments.

use std::hint::black_box;
use std::time::Duration;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use lanlet::frame::{BATCH_FRAMES_MAX, Batch, FRAME_LEN_MAX, Frame};
use lanlet::offload::{Caps, VNET_HEADER_LEN, admit, coalesce, encode, fit};
use lanlet::wire::checksum;

const ALL: Caps = Caps {
    csum: true,
    tso: true,
    uso: true,
};
const NONE: Caps = Caps {
    csum: false,
    tso: false,
    uso: false,
};
const TCP_HEADERS_LEN: usize = 14 + 20 + 20;
/// Largest payload of a TCP super-frame without options.
const SUPER_PAYLOAD: usize = 65_535 - 40;

/// A vnet header and a TCP over IPv4 frame with its checksum left to do.
fn tcp4(payload_len: usize, gso_size: u16) -> Vec<u8> {
    let mut raw = vec![0x5a; VNET_HEADER_LEN + TCP_HEADERS_LEN + payload_len];
    let (vnet, frame) = raw.split_at_mut(VNET_HEADER_LEN);
    vnet.fill(0);
    vnet[0] = 1;
    vnet[1] = u8::from(gso_size != 0);
    vnet[4..6].copy_from_slice(&gso_size.to_ne_bytes());
    vnet[6..8].copy_from_slice(&34u16.to_ne_bytes());
    vnet[8..10].copy_from_slice(&16u16.to_ne_bytes());
    frame[12..14].copy_from_slice(&[0x08, 0x00]);
    frame[14..16].copy_from_slice(&[0x45, 0]);
    frame[16..18].copy_from_slice(&((40 + payload_len) as u16).to_be_bytes());
    frame[20..24].copy_from_slice(&[0x40, 0, 64, 6]);
    frame[46..48].copy_from_slice(&[0x50, 0x10]);
    raw
}

/// The whole way of a frame from the read buffer to the header of the write.
fn forward(raw: &[u8], caps: Caps, scratch: &mut [u8]) -> usize {
    let offload = admit(raw).unwrap();
    let frame = Frame {
        bytes: &raw[VNET_HEADER_LEN..],
        offload,
    };
    let mut frames = 0;
    fit(frame, caps, 1500, scratch, &mut |frame| {
        black_box(encode(frame));
        frames += 1;
    })
    .unwrap();
    frames
}

fn offload(c: &mut Criterion) {
    let mut scratch = vec![0; FRAME_LEN_MAX];
    let mut case = |name: &str, raw: &[u8], caps, frames| {
        let mut group = c.benchmark_group("offload");
        group.throughput(Throughput::Bytes((raw.len() - VNET_HEADER_LEN) as u64));
        group.bench_function(name, |b| {
            b.iter(|| {
                assert_eq!(forward(black_box(raw), caps, &mut scratch), frames);
            });
        });
    };
    let mut plain = tcp4(1460, 0);
    plain[0] = 0;
    case("whole_plain", &plain, ALL, 1);
    case("whole_partial_checksum", &tcp4(1460, 0), ALL, 1);
    case("whole_super_frame", &tcp4(SUPER_PAYLOAD, 1460), ALL, 1);
    case("complete_checksum_1500", &tcp4(1460, 0), NONE, 1);
    case("segment_64k", &tcp4(SUPER_PAYLOAD, 1460), NONE, 45);
}

/// A UDP over IPv4 frame with its checksum left to do.
fn udp4(payload_len: usize) -> Vec<u8> {
    let mut raw = tcp4(payload_len, 0);
    raw.drain(VNET_HEADER_LEN + 42..VNET_HEADER_LEN + TCP_HEADERS_LEN);
    raw[8..10].copy_from_slice(&6u16.to_ne_bytes());
    let frame = &mut raw[VNET_HEADER_LEN..];
    frame[16..18].copy_from_slice(&((28 + payload_len) as u16).to_be_bytes());
    frame[23] = 17;
    frame[38..40].copy_from_slice(&((8 + payload_len) as u16).to_be_bytes());
    frame[24..26].fill(0);
    let sum = !checksum::fold(checksum::sum(&frame[14..34]));
    frame[24..26].copy_from_slice(&sum.to_be_bytes());
    raw
}

/// A full batch: read (copied) and joined, beside read alone.
fn join(c: &mut Criterion) {
    let mut batch = Batch::new();
    for payload_len in [64, 1460] {
        let raw = udp4(payload_len);
        let offload = admit(&raw).unwrap();
        for (what, caps, left) in [("read", NONE, BATCH_FRAMES_MAX), ("read_and_join", ALL, 1)] {
            // A super-frame holds 44 datagrams of 1460 bytes.
            let left = if payload_len == 1460 && left == 1 {
                2
            } else {
                left
            };
            let mut group = c.benchmark_group("offload");
            group.throughput(Throughput::Elements(BATCH_FRAMES_MAX as u64));
            group.bench_function(format!("{what}_64_udp_{payload_len}"), |b| {
                b.iter(|| {
                    batch.clear();
                    for _ in 0..BATCH_FRAMES_MAX {
                        batch.next_buffer().unwrap()[..raw.len()].copy_from_slice(&raw);
                        batch.commit(VNET_HEADER_LEN..raw.len(), offload);
                    }
                    coalesce(&mut batch, |_| caps);
                    assert_eq!(batch.len(), left);
                });
            });
        }
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default().warm_up_time(Duration::from_millis(500)).measurement_time(Duration::from_secs(2));
    targets = offload, join
}
criterion_main!(benches);
