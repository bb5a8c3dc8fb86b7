//! What a frame costs between ports: admit, fit and encode it whole; complete its checksum; cut
//! 64 KB into segments.

use std::hint::black_box;
use std::time::Duration;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use lanlet::frame::{FRAME_LEN_MAX, Frame};
use lanlet::offload::{Caps, VNET_HEADER_LEN, admit, encode, fit};

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

criterion_group! {
    name = benches;
    config = Criterion::default().warm_up_time(Duration::from_millis(500)).measurement_time(Duration::from_secs(2));
    targets = offload
}
criterion_main!(benches);
