//! The switch's and the offloads' pieces: a decision; a frame from the read buffer to the header of the
//! write, whole, completed or cut; a batch joined.

use std::hint::black_box;

use super::{Piece, reference};
use crate::frame::{BATCH_FRAMES_MAX, Batch, ETH_HEADER_LEN, FRAME_LEN_MAX, Frame, Mac, PortId};
use crate::nat::testing::{guest_tcp, guest_udp, guest_udp_train};
use crate::offload::{Caps, VNET_HEADER_LEN, admit, coalesce, encode, fit};
use crate::switch::{Switch, SwitchConfig, Verdict};

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
/// Stations and ports of the switch.
const STATIONS: u32 = 1_000;
const PORTS: u32 = 100;
const MSS: usize = 1_460;
/// Payload of the super-frame: full segments, as many as fit.
const SUPER_PAYLOAD: usize = 44 * MSS;

pub(super) fn all() -> Vec<Piece> {
    let datagram = with_header(guest_udp(from(), to(), 64, &[7; MSS]), 0, 6);
    vec![
        decide(),
        frame(
            "whole-frame",
            with_header(segment(MSS), 0, 16),
            ALL,
            1,
            reference::look_ups(1_000),
        ),
        frame(
            "whole-super-frame",
            with_header(segment(SUPER_PAYLOAD), MSS as u16, 16),
            ALL,
            1,
            reference::look_ups(1_000),
        ),
        frame(
            "checksum",
            with_header(segment(MSS), 0, 16),
            NONE,
            1,
            reference::sum(MSS),
        ),
        frame(
            "segment-64k",
            with_header(segment(SUPER_PAYLOAD), MSS as u16, 16),
            NONE,
            44,
            reference::copy(SUPER_PAYLOAD),
        ),
        join(datagram),
    ]
}

fn from() -> std::net::SocketAddr {
    ([192, 168, 122, 2], 5000).into()
}

fn to() -> std::net::SocketAddr {
    ([198, 51, 100, 7], 7000).into()
}

fn segment(payload: usize) -> Vec<u8> {
    guest_tcp(from(), to(), (1, 1), (0x10, 512), &[], &vec![7; payload])
}

/// A frame as a tap delivers it: with the checksum at `csum_offset` of the transport header left to do,
/// and TCP over IPv4 left to be cut where `gso` is not 0.
fn with_header(frame: Vec<u8>, gso: u16, csum_offset: u16) -> Vec<u8> {
    let mut header = [0; VNET_HEADER_LEN];
    header[0] = 1;
    header[1] = u8::from(gso != 0);
    header[4..6].copy_from_slice(&gso.to_le_bytes());
    header[6..8].copy_from_slice(&34_u16.to_le_bytes());
    header[8..10].copy_from_slice(&csum_offset.to_le_bytes());
    [&header[..], &frame].concat()
}

fn decide() -> Piece {
    let port = |station: u32| PortId(1 + (station % PORTS) as u16);
    let switch = Switch::new(SwitchConfig::new(Mac([0x02, 0, 0, 0, 0, 1]), 1));
    let header = |source: u32, destination: u32| {
        let mut header = [0; ETH_HEADER_LEN];
        for (at, station) in [(0, destination), (6, source)] {
            header[at..at + 2].copy_from_slice(&[0x52, 0x54]);
            header[at + 2..at + 6].copy_from_slice(&station.to_be_bytes());
        }
        header
    };
    for station in 0..STATIONS {
        switch.decide(port(station), &header(station, station));
    }
    let mut station = 0;
    Piece {
        name: "decide",
        work: Box::new(move |count| {
            for _ in 0..count {
                station = (station + 7_919) % STATIONS;
                let other = (station + 1) % STATIONS;
                let verdict = switch.decide(port(station), black_box(&header(station, other)));
                assert!(matches!(black_box(verdict), Verdict::Unicast(_)));
            }
        }),
        reference: reference::look_ups(STATIONS),
    }
}

fn frame(
    name: &'static str,
    raw: Vec<u8>,
    caps: Caps,
    frames: usize,
    reference: reference::Reference,
) -> Piece {
    let mut scratch = vec![0; FRAME_LEN_MAX];
    let mut forward = move || {
        let raw = black_box(&raw[..]);
        let offload = admit(raw).expect("a good frame");
        let frame = Frame {
            bytes: &raw[VNET_HEADER_LEN..],
            offload,
        };
        let mut sent = 0;
        let fitted = fit(frame, caps, 1_500, &mut scratch, &mut |frame| {
            black_box(encode(frame));
            sent += 1;
        });
        assert!(fitted.is_ok() && sent == frames);
    };
    Piece {
        name,
        work: Box::new(move |count| (0..count).for_each(|_| forward())),
        reference,
    }
}

fn join(raw: Vec<u8>) -> Piece {
    let offload = admit(&raw).expect("a good frame");
    let bytes = BATCH_FRAMES_MAX * raw.len();
    let mut batch = Batch::new();
    let mut join = move || {
        batch.clear();
        for _ in 0..BATCH_FRAMES_MAX {
            let buffer = batch.next_buffer().expect("an empty batch");
            buffer[..raw.len()].copy_from_slice(&raw);
            batch.commit(VNET_HEADER_LEN..raw.len(), offload);
        }
        coalesce(&mut batch, |_| ALL);
        assert!(batch.len() <= 2, "a super-frame holds 44 of them");
    };
    Piece {
        name: "join-64-datagrams",
        work: Box::new(move |count| (0..count).for_each(|_| join())),
        reference: reference::copy(bytes),
    }
}

/// A train of full datagrams and its offload, for the NAT.
pub(super) fn train() -> (Vec<u8>, crate::offload::Offload) {
    guest_udp_train(from(), to(), MSS as u16, &vec![7; SUPER_PAYLOAD])
}
