//! Offloads end to end: what segmentation makes is reassembled here by other means and must be the
//! original, every checksum is computed again by etherparse, and a million hostile inputs must leave
//! nothing behind but counts.

use std::collections::BTreeMap;

use etherparse::{NetSlice, SlicedPacket, TransportSlice};
use lanlet::frame::{BATCH_FRAMES_MAX, Batch, FRAME_LEN_MAX, Frame, PortId};
use lanlet::offload::{Caps, Csum, Gso, Offload, VNET_HEADER_LEN, admit, coalesce, encode, fit};
use lanlet::stats::DropReason;
use lanlet::wire::Packet;
use proptest::prelude::*;
use proptest::test_runner::RngSeed;

const FIN: u8 = 0x01;
const PSH: u8 = 0x08;
const ACK: u8 = 0x10;
const CWR: u8 = 0x80;

/// A super-frame to be built.
#[derive(Clone, Debug)]
struct Train {
    tags: Vec<[u8; 4]>,
    v6: bool,
    udp: bool,
    /// IPv4 options or IPv6 extension headers, in units of 4 or 8 bytes.
    ip_extra: usize,
    tcp_options: usize,
    id: u16,
    sequence: u32,
    flags: u8,
    payload: Vec<u8>,
    size: u16,
}

struct Built {
    frame: Vec<u8>,
    offload: Offload,
    network_at: usize,
    transport_at: usize,
    payload_at: usize,
}

impl Train {
    fn build(&self) -> Built {
        let mut frame = vec![0x02, 0, 0, 0, 0, 0xb, 0x02, 0, 0, 0, 0, 0xa];
        self.tags
            .iter()
            .for_each(|tag| frame.extend_from_slice(tag));
        frame.extend_from_slice(if self.v6 {
            &[0x86, 0xdd]
        } else {
            &[0x08, 0x00]
        });
        let network_at = frame.len();
        let protocol = if self.udp { 17 } else { 6 };
        let transport_len = self.payload.len()
            + if self.udp {
                8
            } else {
                20 + 4 * self.tcp_options
            };
        if self.v6 {
            self.ipv6(&mut frame, protocol, transport_len)
        } else {
            self.ipv4(&mut frame, protocol, transport_len)
        }
        let transport_at = frame.len();
        frame.extend_from_slice(&[0x30, 0x39, 0x14, 0x51]);
        if self.udp {
            frame.extend_from_slice(&(transport_len as u16).to_be_bytes());
            frame.extend_from_slice(&[0, 0]);
        } else {
            frame.extend_from_slice(&self.sequence.to_be_bytes());
            frame.extend_from_slice(&[
                1,
                2,
                3,
                4,
                (5 + self.tcp_options as u8) << 4,
                self.flags,
                9,
                9,
                0,
                0,
                0,
                0,
            ]);
            // No-operation options.
            frame.resize(frame.len() + 4 * self.tcp_options, 1);
        }
        let payload_at = frame.len();
        frame.extend_from_slice(&self.payload);
        let offset = if self.udp { 6 } else { 16 };
        let seed = fold(self.pseudo_sum(&frame, network_at, protocol, transport_len));
        frame[transport_at + offset..][..2].copy_from_slice(&seed.to_be_bytes());
        let gso = match (self.udp, self.v6) {
            (true, _) => Gso::Udp(self.size),
            (_, true) => Gso::Tcp6(self.size),
            _ => Gso::Tcp4(self.size),
        };
        let csum = Csum::Partial {
            start: transport_at as u16,
            offset: offset as u16,
        };
        let offload = Offload {
            csum,
            gso,
            ecn: !self.udp && self.flags & CWR != 0,
        };
        Built {
            frame,
            offload,
            network_at,
            transport_at,
            payload_at,
        }
    }

    fn ipv4(&self, frame: &mut Vec<u8>, protocol: u8, transport_len: usize) {
        let at = frame.len();
        let header_len = 20 + 4 * self.ip_extra;
        frame.extend_from_slice(&[0x40 | (header_len / 4) as u8, 0]);
        frame.extend_from_slice(&((header_len + transport_len) as u16).to_be_bytes());
        frame.extend_from_slice(&self.id.to_be_bytes());
        frame.extend_from_slice(&[
            0x40, 0, 64, protocol, 0, 0, 192, 168, 122, 10, 192, 168, 122, 11,
        ]);
        frame.resize(at + header_len, 1);
        let sum = !fold(sum(&frame[at..]));
        frame[at + 10..at + 12].copy_from_slice(&sum.to_be_bytes());
    }

    fn ipv6(&self, frame: &mut Vec<u8>, protocol: u8, transport_len: usize) {
        const DESTINATION_OPTIONS: u8 = 60;
        let extension = (self.ip_extra != 0).then_some(DESTINATION_OPTIONS);
        frame.extend_from_slice(&[0x60, 0, 0, 0]);
        frame.extend_from_slice(&((8 * self.ip_extra + transport_len) as u16).to_be_bytes());
        frame.extend_from_slice(&[extension.unwrap_or(protocol), 64]);
        frame.extend_from_slice(&[0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 10]);
        frame.extend_from_slice(&[0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 11]);
        if extension.is_some() {
            frame.extend_from_slice(&[protocol, self.ip_extra as u8 - 1]);
            frame.resize(frame.len() + 8 * self.ip_extra - 2, 0);
        }
    }

    fn pseudo_sum(
        &self,
        frame: &[u8],
        network_at: usize,
        protocol: u8,
        transport_len: usize,
    ) -> u64 {
        let addresses = if self.v6 { 8..40 } else { 12..20 };
        sum(&frame[network_at..][addresses]) + u64::from(protocol) + transport_len as u64
    }
}

/// RFC 1071 as it is written down.
fn sum(bytes: &[u8]) -> u64 {
    bytes
        .chunks(2)
        .map(|pair| u64::from(u16::from_be_bytes([pair[0], *pair.get(1).unwrap_or(&0)])))
        .sum()
}

fn fold(mut sum: u64) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

fn be16(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

fn fitted(
    bytes: &[u8],
    offload: Offload,
    caps: Caps,
) -> Result<Vec<(Vec<u8>, Offload)>, DropReason> {
    let mut scratch = vec![0; FRAME_LEN_MAX];
    let mut out = Vec::new();
    let frame = Frame { bytes, offload };
    fit(frame, caps, 65_535, &mut scratch, &mut |frame| {
        out.push((frame.bytes.to_vec(), frame.offload))
    })?;
    Ok(out)
}

/// All lengths and checksums of a frame, as etherparse sees them.
fn assert_right(bytes: &[u8]) {
    let packet = SlicedPacket::from_ethernet(bytes).unwrap();
    let transport = packet.transport.as_ref().unwrap();
    match (packet.net.as_ref().unwrap(), transport) {
        (NetSlice::Ipv4(ip), transport) => {
            let header = ip.header().to_header();
            assert_eq!(header.header_checksum, header.calc_header_checksum());
            let (from, to) = (header.source, header.destination);
            match transport {
                TransportSlice::Tcp(tcp) => {
                    assert_eq!(tcp.checksum(), tcp.calc_checksum_ipv4(from, to).unwrap())
                }
                TransportSlice::Udp(udp) => {
                    assert_eq!(usize::from(udp.length()), 8 + udp.payload().len());
                    let right = udp
                        .to_header()
                        .calc_checksum_ipv4_raw(from, to, udp.payload())
                        .unwrap();
                    assert_eq!(udp.checksum(), right);
                }
                other => panic!("{other:?}"),
            }
        }
        (NetSlice::Ipv6(ip), transport) => {
            let header = ip.header().to_header();
            let (from, to) = (header.source, header.destination);
            match transport {
                TransportSlice::Tcp(tcp) => {
                    assert_eq!(tcp.checksum(), tcp.calc_checksum_ipv6(from, to).unwrap())
                }
                TransportSlice::Udp(udp) => {
                    assert_eq!(usize::from(udp.length()), 8 + udp.payload().len());
                    let right = udp
                        .to_header()
                        .calc_checksum_ipv6_raw(from, to, udp.payload())
                        .unwrap();
                    assert_eq!(udp.checksum(), right);
                }
                other => panic!("{other:?}"),
            }
        }
        (other, _) => panic!("{other:?}"),
    }
}

/// Puts segments together again: the first one's headers, everybody's payload, everybody's flags,
/// and the fields that belong to the whole.
fn reassemble(train: &Train, built: &Built, segments: &[(Vec<u8>, Offload)]) -> Vec<u8> {
    let Built {
        network_at,
        transport_at,
        payload_at,
        ..
    } = *built;
    let mut whole = segments[0].0[..payload_at].to_vec();
    let last = segments.len() - 1;
    for (index, (segment, offload)) in segments.iter().enumerate() {
        assert_eq!(*offload, Offload::default());
        assert_right(segment);
        let payload_len = segment.len() - payload_at;
        assert!(payload_len == usize::from(train.size) || (index == last && payload_len > 0));
        if !train.v6 {
            assert_eq!(
                be16(segment, network_at + 4),
                train.id.wrapping_add(index as u16)
            );
        }
        if !train.udp {
            let sequence = u32::from_be_bytes(segment[transport_at + 4..][..4].try_into().unwrap());
            let sent = (whole.len() - payload_at) as u32;
            assert_eq!(sequence, train.sequence.wrapping_add(sent));
            let flags = segment[transport_at + 13];
            let absent =
                if index == 0 { 0 } else { CWR } | if index == last { 0 } else { FIN | PSH };
            assert_eq!(flags, train.flags & !absent);
            whole[transport_at + 13] |= flags;
        }
        whole.extend_from_slice(&segment[payload_at..]);
    }
    let packet_len = whole.len() - network_at;
    if train.v6 {
        whole[network_at + 4..][..2].copy_from_slice(&(packet_len as u16 - 40).to_be_bytes());
    } else {
        whole[network_at + 2..][..2].copy_from_slice(&(packet_len as u16).to_be_bytes());
        whole[network_at + 10..][..2].fill(0);
        let sum = !fold(sum(&whole[network_at..transport_at]));
        whole[network_at + 10..][..2].copy_from_slice(&sum.to_be_bytes());
    }
    let transport_len = whole.len() - transport_at;
    if train.udp {
        whole[transport_at + 4..][..2].copy_from_slice(&(transport_len as u16).to_be_bytes());
    }
    let (offset, protocol) = if train.udp { (6, 17) } else { (16, 6) };
    let seed = fold(train.pseudo_sum(&whole, network_at, protocol, transport_len));
    whole[transport_at + offset..][..2].copy_from_slice(&seed.to_be_bytes());
    whole
}

fn received(frame: &[u8], offload: Offload) -> Vec<u8> {
    let mut raw = encode(Frame {
        bytes: frame,
        offload,
    })
    .to_vec();
    raw.extend_from_slice(frame);
    raw
}

fn train() -> impl Strategy<Value = Train> {
    let tag = (
        prop::sample::select(vec![[0x81, 0x00], [0x88, 0xa8]]),
        any::<[u8; 2]>(),
    )
        .prop_map(|([a, b], [c, d])| [a, b, c, d]);
    let payload = prop_oneof![2..4000usize, 2..65_000usize]
        .prop_flat_map(|len| (Just(len), any::<u64>()))
        .prop_map(|(len, seed)| {
            let mut random = Random(seed | 1);
            (0..len).map(|_| random.next() as u8).collect::<Vec<u8>>()
        });
    let headers = (
        prop::collection::vec(tag, 0..=2),
        any::<bool>(),
        any::<bool>(),
        0..=3usize,
        0..=10usize,
    );
    let fields = (
        any::<u16>(),
        any::<u32>(),
        prop::sample::select(vec![
            ACK,
            ACK | PSH,
            ACK | FIN,
            ACK | CWR,
            ACK | PSH | FIN | CWR,
        ]),
    );
    (headers, fields, payload, 36..9000u16).prop_map(
        |((tags, v6, udp, ip_extra, tcp_options), (id, sequence, flags), payload, size)| Train {
            tags,
            v6,
            udp,
            ip_extra,
            tcp_options,
            id,
            sequence,
            flags,
            payload,
            size,
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 500, rng_seed: RngSeed::Fixed(2), failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn segments_reassemble_to_the_original(train in train()) {
        let built = train.build();
        let plain = Offload { gso: Gso::None, ecn: false, ..built.offload };
        let one_segment = train.payload.len() <= usize::from(train.size);
        let admitted = admit(&received(&built.frame, built.offload)).unwrap();
        prop_assert_eq!(admitted, if one_segment { plain } else { built.offload });

        // Whole, where the port takes it.
        let all = Caps { csum: true, tso: true, uso: true };
        prop_assert_eq!(fitted(&built.frame, admitted, all).unwrap(), vec![(built.frame.clone(), admitted)]);

        for caps in [Caps::default(), Caps { csum: true, ..Caps::default() }, Caps { csum: true, tso: train.udp, uso: !train.udp }] {
            let segments = fitted(&built.frame, admitted, caps).unwrap();
            if !one_segment {
                prop_assert_eq!(segments.len(), train.payload.len().div_ceil(train.size.into()));
                prop_assert_eq!(&reassemble(&train, &built, &segments), &built.frame);
            } else if caps.csum {
                prop_assert_eq!(segments, vec![(built.frame.clone(), plain)]);
            } else {
                prop_assert_eq!(segments.len(), 1);
                assert_right(&segments[0].0);
            }
        }
    }
}

/// Neighbours are joined, and segmentation gives the very frames that went in: whatever else is among them,
/// and however they are damaged (each has its checksum, so none that is damaged is joined).
fn joined(trains: &[Train], damage: &[(usize, usize)], caps: Caps) -> (usize, usize) {
    let mut frames = Vec::new();
    for train in trains {
        let built = train.build();
        let admitted = admit(&received(&built.frame, built.offload)).unwrap();
        let segments = fitted(&built.frame, admitted, Caps::default()).unwrap();
        frames.extend(segments.into_iter().map(|(frame, _)| frame));
    }
    frames.truncate(BATCH_FRAMES_MAX);
    for &(frame, byte) in damage {
        let frame = &mut frames[frame % BATCH_FRAMES_MAX.min(trains.len())];
        let at = byte % frame.len();
        frame[at] ^= 0x10;
    }
    let mut batch = Batch::new();
    let mut sent = 0;
    for frame in &frames {
        let Some(buffer) = batch.next_buffer() else {
            break;
        };
        buffer[VNET_HEADER_LEN..][..frame.len()].copy_from_slice(frame);
        batch.commit(
            VNET_HEADER_LEN..VNET_HEADER_LEN + frame.len(),
            Offload::default(),
        );
        sent += 1;
    }
    let fewer = coalesce(&mut batch, |_| caps);
    assert_eq!(batch.len() + fewer, sent);
    let mut again = Vec::new();
    for frame in batch.frames() {
        // What we make, we would let in.
        let admitted = admit(&received(frame.bytes, frame.offload));
        assert_eq!(admitted, Ok(frame.offload));
        assert!(frame.offload == Offload::default() || caps.take(frame.offload));
        for (segment, _) in fitted(frame.bytes, frame.offload, Caps::default()).unwrap() {
            again.push(segment);
        }
    }
    assert!(again == frames[..sent]);
    (sent, fewer)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 500, rng_seed: RngSeed::Fixed(3), failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn joined_frames_are_cut_to_what_they_were(
        trains in prop::collection::vec(train(), 1..5),
        damage in prop::collection::vec((any::<usize>(), any::<usize>()), 0..3),
        caps in prop::sample::select(vec![
            Caps { csum: true, tso: true, uso: true },
            Caps { csum: true, tso: true, uso: false },
            Caps { csum: true, tso: false, uso: true },
            Caps { csum: false, tso: true, uso: true },
        ]),
    ) {
        let (_, fewer) = joined(&trains, &damage, caps);
        prop_assert!(caps.csum || fewer == 0);
    }
}

#[test]
fn a_run_of_one_flow_becomes_one_frame() {
    let all = Caps {
        csum: true,
        tso: true,
        uso: true,
    };
    for kind in 0..4 {
        let train = Train {
            tags: vec![[0x81, 0, 0, 7]; kind & 1],
            v6: kind & 1 != 0,
            udp: kind & 2 != 0,
            ip_extra: 0,
            tcp_options: 3,
            id: 0xfffe,
            sequence: u32::MAX - 700,
            flags: ACK | PSH,
            payload: vec![kind as u8; 20 * 1_400 + 300],
            size: 1_400,
        };
        assert_eq!(joined(std::slice::from_ref(&train), &[], all), (21, 20));
        // Another of the same endpoints, behind a shorter segment: a datagram of any size may follow, a
        // stream has a hole.
        let twice = [train.clone(), train.clone()];
        assert_eq!(joined(&twice, &[], all), (42, 40));
        // The sixth has a wrong sum: what is before is one frame, it is alone, what is after is one.
        let byte = 14 + 4 * (kind & 1) + 100;
        let mut long = twice.to_vec();
        long.resize(10, train);
        assert_eq!(joined(&long, &[(5, byte)], all).1, 64 - 4 - 2);
        // IP options, extension headers and CWR stay as they are.
        for odd in [
            Train {
                ip_extra: 1,
                ..twice[0].clone()
            },
            Train {
                flags: ACK | CWR,
                udp: false,
                payload: vec![0; 2_800],
                ..twice[0].clone()
            },
        ] {
            assert_eq!(joined(&[odd], &[], all).1, 0);
        }
    }
}

/// xorshift64 (Marsaglia 2003).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.next() >> 16) as usize % bound
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }

    fn fill(&mut self, bytes: &mut [u8]) {
        bytes.fill_with(|| self.next() as u8);
    }
}

/// Frames with right claims, of every kind, to be damaged.
fn templates() -> Vec<Vec<u8>> {
    let mut templates = Vec::new();
    for kind in 0..32usize {
        let train = Train {
            tags: vec![[0x81, 0, 0, 7]; kind >> 2 & 1],
            v6: kind & 1 != 0,
            udp: kind & 2 != 0,
            ip_extra: kind >> 3 & 1,
            tcp_options: 3,
            id: 0xfffe,
            sequence: u32::MAX - 700,
            flags: ACK | PSH | if kind & 4 != 0 { CWR } else { 0 },
            payload: vec![kind as u8; 100 + 40 * kind],
            // Half of them fit one segment.
            size: if kind >> 4 == 0 { 64 } else { 1400 },
        };
        let built = train.build();
        templates.push(received(&built.frame, built.offload));
    }
    templates
}

fn hostile(random: &mut Random, templates: &[Vec<u8>], raw: &mut Vec<u8>) {
    raw.clear();
    if random.below(4) == 0 {
        raw.resize(random.below(300), 0);
        random.fill(raw);
        if let [flags, gso_type, ..] = &mut raw[..] {
            *flags &= 3;
            *gso_type = random.pick(&[0, 1, 3, 4, 5, 0x81, 0x84]);
        }
        if raw.len() > 26 {
            let ethertype: u16 = random.pick(&[0x0800, 0x0806, 0x86dd, 0x8100, 0x88a8, 0x8864]);
            raw[24..26].copy_from_slice(&ethertype.to_be_bytes());
            raw[26] = random.pick(&[0x45, 0x46, 0x60, raw[26]]);
        }
        return;
    }
    raw.extend_from_slice(&templates[random.below(templates.len())]);
    for _ in 0..random.below(5) {
        // Mostly where headers are.
        let anywhere = random.below(4) == 0;
        let at = random.below(if anywhere { raw.len() } else { 100 });
        match random.below(3) {
            0 => raw[at] ^= 1 << random.below(8),
            1 => raw[at] = random.pick(&[0, 1, 0x7f, 0x80, 0xff]),
            _ => raw[at] = random.next() as u8,
        }
    }
    match random.below(10) {
        0 => raw.truncate(random.below(raw.len())),
        1 => raw.resize(raw.len() + random.below(20), 0),
        _ => {}
    }
}

fn any_offload(random: &mut Random) -> Offload {
    let size = random.next() as u16;
    let csum = match random.below(3) {
        0 => Csum::Unchecked,
        1 => Csum::Valid,
        _ => Csum::Partial {
            start: random.below(200) as u16,
            offset: random.next() as u16,
        },
    };
    let gso = random.pick(&[Gso::None, Gso::Tcp4(size), Gso::Tcp6(size), Gso::Udp(size)]);
    Offload {
        csum,
        gso,
        ecn: random.below(2) == 0,
    }
}

#[test]
fn a_million_hostile_frames_are_counted_and_nothing_else() {
    const CASES: u64 = 1_000_000;
    let templates = templates();
    let mut random = Random(0x1a71e7);
    let mut counts: BTreeMap<&str, u64> = BTreeMap::new();
    let mut count = |name| *counts.entry(name).or_default() += 1;
    let (mut raw, mut scratch) = (Vec::new(), vec![0; FRAME_LEN_MAX]);
    for _ in 0..CASES {
        hostile(&mut random, &templates, &mut raw);
        let caps = Caps {
            csum: random.below(2) == 0,
            tso: random.below(2) == 0,
            uso: random.below(2) == 0,
        };
        let mtu = random.pick(&[68, 576, 1500, 65_535]);
        let admitted = admit(&raw);
        let Some(bytes) = raw.get(VNET_HEADER_LEN..) else {
            assert_eq!(admitted, Err(DropReason::Truncated));
            count("in: truncated");
            continue;
        };
        // A frame made inside this process with claims that don't fit must do no harm either.
        let astray = Frame {
            bytes,
            offload: any_offload(&mut random),
        };
        let _ = (
            encode(astray),
            fit(astray, caps, mtu, &mut scratch, &mut |_| ()),
        );
        let offload = match admitted {
            Ok(offload) => offload,
            Err(reason) => {
                count(match reason {
                    DropReason::Truncated => "in: truncated",
                    DropReason::BadOffload => "in: bad offload",
                    other => panic!("{other:?}"),
                });
                continue;
            }
        };
        assert_eq!(
            admit(&received(bytes, offload)),
            Ok(offload),
            "what we write, we would admit"
        );
        let frame = Frame { bytes, offload };
        match Packet::parse(frame, PortId(1)) {
            Ok(_) => count("parsed"),
            Err(_) => count("not parsed"),
        }
        let mut out = 0;
        let fitted = fit(frame, caps, mtu, &mut scratch, &mut |fitted| {
            out += 1;
            assert!(caps.take(fitted.offload));
            assert_eq!(
                fitted.bytes[..14],
                bytes[..14],
                "decided on, so never to change"
            );
            assert!(fitted.offload.gso != Gso::None || fitted.bytes.len() <= mtu + 14 + 8);
        });
        match fitted {
            Err(reason) => {
                assert_eq!((reason, out), (DropReason::EgressTooBig, 0));
                count("out: too big");
            }
            Ok(()) if out > 1 => count("out: segmented"),
            Ok(()) if caps.take(offload) => count("out: whole"),
            Ok(()) => count("out: completed"),
        }
    }
    println!("{counts:#?}");
    let total = |prefix: &str| {
        counts
            .iter()
            .filter(|(name, _)| name.starts_with(prefix))
            .map(|(_, n)| n)
            .sum::<u64>()
    };
    assert_eq!(total("in: ") + total("out: "), CASES);
    assert_eq!(total("parsed") + total("not parsed"), total("out: "));
    assert_eq!(counts.len(), 8);
    assert!(
        counts.values().all(|&n| n > CASES / 200),
        "a case that hardly occurs: {counts:?}"
    );
}
