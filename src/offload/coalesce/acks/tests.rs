use std::collections::BTreeMap;

use proptest::prelude::*;
use proptest::test_runner::RngSeed;

use super::super::coalesce;
use crate::frame::Batch;
use crate::offload::{Caps, Offload};
use crate::wire::checksum;

const FIN: u8 = 0x01;
const PSH: u8 = 0x08;
const ACK: u8 = 0x10;
const ECE: u8 = 0x40;

#[derive(Clone, PartialEq, Eq, Debug)]
struct Segment {
    v6: bool,
    port: u16,
    sequence: u32,
    ack: u32,
    /// The reserved bits and those above them: header length excluded.
    reserved: u8,
    flags: u8,
    window: u16,
    /// A multiple of four bytes.
    options: Vec<u8>,
    payload: Vec<u8>,
    is_damaged: bool,
}

/// One that says nothing but `ack`.
fn bare(port: u16, ack: u32) -> Segment {
    Segment {
        v6: false,
        port,
        sequence: 7,
        ack,
        reserved: 0,
        flags: ACK,
        window: 500,
        options: Vec::new(),
        payload: Vec::new(),
        is_damaged: false,
    }
}

fn timestamps(value: u32) -> Vec<u8> {
    let mut option = vec![1, 1, 8, 10];
    option.extend(value.to_be_bytes());
    option.extend([0; 4]);
    option
}

impl Segment {
    fn frame(&self) -> Vec<u8> {
        let mut tcp = Vec::new();
        tcp.extend(self.port.to_be_bytes());
        tcp.extend(80u16.to_be_bytes());
        tcp.extend(self.sequence.to_be_bytes());
        tcp.extend(self.ack.to_be_bytes());
        let words = 5 + self.options.len() as u8 / 4;
        tcp.extend([words << 4 | self.reserved, self.flags]);
        tcp.extend(self.window.to_be_bytes());
        tcp.extend([0; 4]);
        tcp.extend(&self.options);
        tcp.extend(&self.payload);
        let mut frame = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];
        let addresses = match self.v6 {
            false => {
                let mut ip = [0; 20];
                ip[0] = 0x45;
                ip[2..4].copy_from_slice(&(20 + tcp.len() as u16).to_be_bytes());
                ip[4..6].copy_from_slice(&(self.ack as u16).to_be_bytes());
                (ip[8], ip[9]) = (64, 6);
                ip[12..20].copy_from_slice(&[10, 0, 0, 1, 10, 0, 0, 2]);
                let sum = !checksum::fold(checksum::sum(&ip));
                ip[10..12].copy_from_slice(&sum.to_be_bytes());
                frame.extend([8, 0]);
                frame.extend(ip);
                ip[12..20].to_vec()
            }
            true => {
                let mut ip = [0; 40];
                ip[0] = 0x60;
                ip[4..6].copy_from_slice(&(tcp.len() as u16).to_be_bytes());
                (ip[6], ip[7]) = (6, 64);
                (ip[8], ip[24], ip[23], ip[39]) = (0xfd, 0xfd, 1, 2);
                frame.extend([0x86, 0xdd]);
                frame.extend(ip);
                ip[8..40].to_vec()
            }
        };
        let sum = checksum::sum(&addresses) + 6 + tcp.len() as u64 + checksum::sum(&tcp);
        let sum = !checksum::fold(sum) ^ u16::from(self.is_damaged);
        tcp[16..18].copy_from_slice(&sum.to_be_bytes());
        frame.extend(tcp);
        frame
    }
}

/// What is left of a batch, as indices into `segments`.
fn left(segments: &[Segment]) -> Vec<usize> {
    let frames: Vec<_> = segments.iter().map(Segment::frame).collect();
    let mut batch = Batch::new();
    for frame in &frames {
        batch.next_buffer().unwrap()[..frame.len()].copy_from_slice(frame);
        batch.commit(0..frame.len(), Offload::default());
    }
    // Receivers that take nothing: no trains.
    let fewer = coalesce(&mut batch, |_| Caps::default());
    assert_eq!(batch.len() + fewer, frames.len());
    let mut rest = frames.iter().enumerate();
    batch
        .frames()
        .map(|frame| {
            let found = rest.find(|(_, sent)| **sent == frame.bytes);
            found.expect("frames stay as they are, in order").0
        })
        .collect()
}

#[test]
fn the_last_acknowledgment_says_it_all() {
    assert_eq!(left(&[bare(1, 100), bare(1, 200), bare(1, 300)]), [2]);
    // Others' between them do not matter, numbers wrap.
    let mixed = [bare(1, u32::MAX), bare(2, 5), bare(1, 10), bare(2, 6)];
    assert_eq!(left(&mixed), [2, 3]);
    let stamped = [1, 2].map(|value| Segment {
        v6: true,
        options: timestamps(value),
        ..bare(1, value)
    });
    assert_eq!(left(&stamped), [1]);
}

#[test]
fn what_a_sender_learns_from_single_ones_stays() {
    let stays = |name: &str, segments: &[Segment]| {
        assert_eq!(left(segments).len(), segments.len(), "{name}");
    };
    let (older, newer) = (bare(1, 100), bare(1, 200));
    let with = |change: fn(&mut Segment)| {
        let mut changed = newer.clone();
        change(&mut changed);
        [older.clone(), changed]
    };
    stays("repeated", &[older.clone(), older.clone(), newer.clone()]);
    stays(
        "three times",
        &[older.clone(), older.clone(), older.clone(), newer.clone()],
    );
    stays(
        "window update",
        &with(|it| (it.ack, it.window) = (100, 900)),
    );
    stays("back", &with(|it| it.ack = 99));
    stays("ECE", &with(|it| it.flags |= ECE));
    stays("AE", &with(|it| it.reserved = 1));
    stays("FIN", &with(|it| it.flags |= FIN));
    stays("PSH", &with(|it| it.flags |= PSH));
    stays("data", &with(|it| it.payload = vec![1]));
    stays("sequence", &with(|it| it.sequence += 1));
    stays("options", &with(|it| it.options = timestamps(1)));
    stays("a wrong sum", &with(|it| it.is_damaged = true));
    let sack = vec![1, 1, 5, 10, 0, 0, 0, 1, 0, 0, 0, 2];
    let sacks = [100, 200].map(|ack| Segment {
        options: sack.clone(),
        ..bare(1, ack)
    });
    stays("SACK", &sacks);
    let back_in_time = [(100, 5), (200, 4)].map(|(ack, value)| Segment {
        options: timestamps(value),
        ..bare(1, ack)
    });
    stays("older timestamp", &back_in_time);
    let mut echoes = [100, 200].map(|ack| Segment {
        options: timestamps(1),
        ..bare(1, ack)
    });
    echoes[1].options[11] = 1;
    stays("another echo", &echoes);
}

fn segment() -> impl Strategy<Value = Segment> {
    let flags = prop::sample::select(vec![ACK, ACK, ACK, ACK, ACK | ECE, ACK | PSH]);
    let options = prop::option::of(0u32..3);
    let payload = prop::sample::select(vec![0, 0, 0, 0, 9]);
    let odds = (0u8..10, 0u32..8, 0u16..2, any::<bool>());
    (0u16..3, 0u32..6, flags, options, payload, odds).prop_map(
        |(port, ack, flags, stamp, payload, (odd, sequence, window, v6))| Segment {
            v6,
            port,
            sequence: if odd == 0 { sequence } else { 7 },
            // Across the wrap.
            ack: (u32::MAX - 2).wrapping_add(ack),
            reserved: u8::from(odd == 1),
            flags,
            window,
            options: stamp.map_or_else(Vec::new, timestamps),
            payload: vec![0; payload],
            is_damaged: odd == 2,
        },
    )
}

/// What a sender has of a batch: of each flow what counts by itself, in order, and the last word. Whether
/// a bare one repeats what a segment with data said is not told apart.
#[derive(PartialEq, Eq, Debug, Default)]
struct Learned {
    counted: Vec<Segment>,
    highest: Option<u32>,
    last: Option<Segment>,
}

fn learn(segments: &[Segment]) -> BTreeMap<(bool, u16), Learned> {
    let mut flows = BTreeMap::<_, Learned>::new();
    for segment in segments.iter().filter(|segment| !segment.is_damaged) {
        let flow = flows.entry((segment.v6, segment.port)).or_default();
        let is_bare = segment.flags == ACK && segment.reserved == 0 && segment.payload.is_empty();
        let ahead = flow
            .highest
            .map_or(1, |highest| segment.ack.wrapping_sub(highest) as i32);
        // What is behind is ignored (RFC 9293 3.10.7.4).
        if !is_bare || ahead == 0 {
            flow.counted.push(segment.clone());
        }
        if segment.payload.is_empty() && ahead > 0 {
            flow.highest = Some(segment.ack);
        }
        flow.last = Some(segment.clone());
    }
    flows
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 20_000, rng_seed: RngSeed::Fixed(4), failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_sender_learns_the_same(segments in prop::collection::vec(segment(), 2..24)) {
        let rest: Vec<_> = left(&segments).into_iter().map(|at| segments[at].clone()).collect();
        prop_assert_eq!(learn(&rest), learn(&segments));
    }
}
