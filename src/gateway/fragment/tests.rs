use super::*;
use crate::gateway::Outbox;
use crate::nat::testing::{
    FrameLog, GUEST, GUEST_MAC, GUEST6, guest_echo, guest_ip, guest_tcp, guest_udp,
};
use crate::wire::{Body, Transport, be16};
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

const OUTSIDE: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 7);
const OUTSIDE6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 7);
const ETH: usize = ETH_HEADER_LEN;

fn at(millis: i64) -> Instant {
    Instant::from_millis(1_000_000 + millis)
}

fn udp(family: Family, payload: &[u8]) -> Vec<u8> {
    let (from, to): (IpAddr, IpAddr) = match family {
        Family::V4 => (GUEST.into(), OUTSIDE.into()),
        Family::V6 => (GUEST6.into(), OUTSIDE6.into()),
    };
    guest_udp(
        SocketAddr::new(from, 4000),
        SocketAddr::new(to, 53),
        64,
        payload,
    )
}

fn data(len: usize) -> Vec<u8> {
    (0..len as u32).map(|n| (n ^ n >> 8) as u8).collect()
}

/// Where the payload of an unfragmented frame begins.
fn payload_at(frame: &[u8]) -> usize {
    match frame[ETH] >> 4 {
        4 => ETH + usize::from(frame[ETH] & 15) * 4,
        _ => ETH + IPV6_HEADER_LEN,
    }
}

/// The fragment of `whole` that carries `range` of its payload, whatever that is.
fn fragment(whole: &[u8], range: Range<usize>, more: bool, id: u16) -> Vec<u8> {
    let at = payload_at(whole);
    let part = &whole[at..][range.clone()];
    let mut frame = whole[..at].to_vec();
    if whole[ETH] >> 4 == 4 {
        let field = (range.start / 8) as u16 | if more { 0x2000 } else { 0 };
        frame[ETH + 2..ETH + 4].copy_from_slice(&((at - ETH + part.len()) as u16).to_be_bytes());
        frame[ETH + 4..ETH + 6].copy_from_slice(&id.to_be_bytes());
        frame[ETH + 6..ETH + 8].copy_from_slice(&field.to_be_bytes());
        frame[ETH + 10..ETH + 12].fill(0);
        let sum = !checksum::fold(checksum::sum(&frame[ETH..]));
        frame[ETH + 10..ETH + 12].copy_from_slice(&sum.to_be_bytes());
    } else {
        let field = range.start as u16 | u16::from(more);
        frame[ETH + 4..ETH + 6].copy_from_slice(&((8 + part.len()) as u16).to_be_bytes());
        let protocol = std::mem::replace(&mut frame[ETH + 6], FRAGMENT);
        frame.extend_from_slice(&[protocol, 0]);
        frame.extend_from_slice(&field.to_be_bytes());
        frame.extend_from_slice(&u32::from(id).to_be_bytes());
    }
    frame.extend_from_slice(part);
    frame
}

/// All fragments of `whole`, cut at `cuts` (in units of eight bytes).
fn fragments(whole: &[u8], cuts: &[usize], id: u16) -> Vec<Vec<u8>> {
    let len = whole.len() - payload_at(whole);
    let mut edges: Vec<usize> = cuts.iter().map(|cut| cut * 8).collect();
    edges.retain(|edge| (1..len).contains(edge));
    edges.extend([0, len]);
    edges.sort_unstable();
    edges.dedup();
    let ranges = edges.windows(2);
    ranges
        .map(|edge| fragment(whole, edge[0]..edge[1], edge[1] < len, id))
        .collect()
}

fn handle_at<'a>(
    reassembler: &'a mut Reassembler,
    frame: &[u8],
    port: u16,
    now: Instant,
) -> Result<Option<Frame<'a>>, DropReason> {
    let frame = Frame {
        bytes: frame,
        offload: Offload::default(),
    };
    let packet = Packet::parse(frame, PortId(port)).expect("a well-formed fragment");
    let ip = packet.ip().expect("IP");
    assert!(matches!(ip.transport, Transport::Fragment));
    reassembler.handle(&packet, now)
}

fn handle(reassembler: &mut Reassembler, frame: &[u8]) -> Result<Option<Vec<u8>>, DropReason> {
    let frame = handle_at(reassembler, frame, 1, at(0))?;
    Ok(frame.map(|frame| frame.bytes.to_vec()))
}

/// What the transport of a frame carries, with all checksums verified.
fn payload_of(frame: &[u8]) -> Vec<u8> {
    let frame = Frame {
        bytes: frame,
        offload: Offload::default(),
    };
    let packet = Packet::parse(frame, PortId(1)).expect("right checksums");
    match packet.ip().expect("IP").transport {
        Transport::Udp(udp) => udp.payload.to_vec(),
        Transport::Icmp(message) => message.to_vec(),
        other => panic!("{other:?}"),
    }
}

/// The reassembled frame is the one that was cut, but for IPv4's fragment fields.
fn assert_same(frame: &[u8], whole: &[u8]) {
    let mut expected = whole.to_vec();
    if whole[ETH] >> 4 == 4 {
        let id = be16(frame, ETH + 4);
        expected[ETH + 4..ETH + 6].copy_from_slice(&id.to_be_bytes());
        expected[ETH + 6..ETH + 8].fill(0);
        expected[ETH + 10..ETH + 12].copy_from_slice(&frame[ETH + 10..ETH + 12]);
    }
    assert!(frame == expected, "another frame came out");
    payload_of(frame);
}

fn family() -> impl Strategy<Value = Family> {
    prop_oneof![Just(Family::V4), Just(Family::V6)]
}

/// A permutation of `0..len`, from random keys.
fn order(len: usize, keys: &[u32]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..len).collect();
    order.sort_by_key(|&n| (keys[n % keys.len()].wrapping_mul(n as u32 + 1), n));
    order
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn any_cut_in_any_order_with_duplicates_gives_the_datagram(
        family in family(),
        len in 16usize..30_000,
        cuts in prop::collection::vec(1usize..3800, 1..60),
        keys in prop::collection::vec(any::<u32>(), 1..40),
        doubles in prop::collection::vec(any::<prop::sample::Index>(), 0..6),
    ) {
        let whole = udp(family, &data(len));
        let parts = fragments(&whole, &cuts, 77);
        prop_assume!(parts.len() > 1 && parts[0].len() > payload_at(&whole) + 7);
        let mut sequence = order(parts.len(), &keys);
        let last = sequence.pop().unwrap();
        for double in &doubles {
            if sequence.is_empty() {
                break;
            }
            let (from, to) = (double.index(sequence.len()), double.index(sequence.len() + 1));
            sequence.insert(to, sequence[from]);
        }
        let mut reassembler = Reassembler::new();
        for n in sequence {
            prop_assert_eq!(handle(&mut reassembler, &parts[n]), Ok(None));
        }
        let frame = handle(&mut reassembler, &parts[last]).unwrap().expect("complete");
        assert_same(&frame, &whole);
        prop_assert!(reassembler.is_empty());
        prop_assert_eq!(reassembler.counters().reassembled, 1);
    }

    #[test]
    fn nothing_comes_of_an_overlap(
        family in family(),
        len in 64usize..20_000,
        cuts in prop::collection::vec(1usize..2500, 1..20),
        keys in prop::collection::vec(any::<u32>(), 1..40),
        (from, span, more) in (0usize..2500, 1usize..600, any::<bool>()),
    ) {
        let whole = udp(family, &data(len));
        let parts = fragments(&whole, &cuts, 77);
        prop_assume!(parts.len() > 1);
        let total = whole.len() - payload_at(&whole);
        let range = (from * 8) % total / 8 * 8;
        let range = range..(range + span * 8).min(total);
        let more = range.start == 0 || (more && range.len() % 8 == 0);
        prop_assume!(!more || range.len().is_multiple_of(8));
        let overlap = fragment(&whole, range, more, 77);
        prop_assume!(!parts.contains(&overlap));
        let mut sequence = order(parts.len(), &keys);
        let last = sequence.pop().unwrap();
        let mut frames: Vec<&[u8]> = sequence.iter().map(|&n| &parts[n][..]).collect();
        // Behind all the others: earlier, it might complete the datagram with some of them.
        frames.push(&overlap);
        frames.push(&parts[last]);
        let mut reassembler = Reassembler::new();
        for frame in &frames {
            prop_assert!(!matches!(handle(&mut reassembler, frame), Ok(Some(_))));
        }
        prop_assert_eq!(reassembler.counters().overlapped, 1);
        // Neither does more of it, nor an ICMP error.
        for frame in &frames {
            prop_assert!(handle(&mut reassembler, frame).is_err());
        }
        reassembler.handle_timeout(at(30_000), &mut |expired| panic!("{expired:?}"));
        prop_assert!(reassembler.is_empty());
        prop_assert_eq!(reassembler.counters().expired, 0);
    }

    #[test]
    fn a_flood_stays_within_its_bounds_and_hurts_no_one_else(
        floods in prop::collection::vec(
            (2u16..12, any::<u16>(), 0usize..7900, 1usize..180, any::<bool>(), family()), 100..400),
    ) {
        let mut reassembler = Reassembler::new();
        let memory = reassembler.memory.len();
        let (whole, noise) = (udp(Family::V4, &data(6000)), [udp(Family::V4, &data(65_000)), udp(Family::V6, &data(65_000))]);
        let parts = fragments(&whole, &[185, 370, 555, 740], 9);
        for (n, (port, id, from, span, more, family)) in floods.into_iter().enumerate() {
            let noise = &noise[usize::from(family == Family::V6)];
            let (range, more) = (from * 8..(from + span) * 8, more || from == 0);
            let _ = handle_at(&mut reassembler, &fragment(noise, range, more, id), port, at(n as i64));
            let mut held = BTreeMap::new();
            for datagram in reassembler.datagrams.iter().flatten() {
                *held.entry(datagram.key.ingress).or_insert(0) += 1;
            }
            prop_assert!(held.values().all(|&held| held <= PER_GUEST_MAX));
            prop_assert_eq!(held.values().sum::<usize>(), reassembler.len());
            prop_assert!(reassembler.len() <= DATAGRAMS_MAX);
            // Spread over five fragments of the flood.
            let part = &parts[n % parts.len()];
            let complete = handle_at(&mut reassembler, part, 1, at(n as i64)).unwrap();
            prop_assert_eq!(complete.is_some(), n % parts.len() == parts.len() - 1);
        }
        prop_assert_eq!(reassembler.memory.len(), memory);
        reassembler.handle_timeout(at(40_000), &mut |_| {});
        prop_assert!(reassembler.is_empty() && reassembler.poll_timeout().is_none());
    }

    #[test]
    fn any_bytes_are_taken_or_refused(
        frames in prop::collection::vec(
            (family(), any::<u16>(), any::<u8>(), prop::collection::vec(any::<u8>(), 1..80)), 1..60),
    ) {
        let mut reassembler = Reassembler::new();
        for (family, field, next, payload) in frames {
            let frame = match family {
                Family::V4 => {
                    let mut frame = guest_ip(GUEST.into(), OUTSIDE.into(), next, 64, &payload);
                    frame[ETH + 6..ETH + 8].copy_from_slice(&(field & 0x201f).to_be_bytes());
                    frame[ETH + 10..ETH + 12].fill(0);
                    let sum = !checksum::fold(checksum::sum(&frame[ETH..ETH + 20]));
                    frame[ETH + 10..ETH + 12].copy_from_slice(&sum.to_be_bytes());
                    frame
                }
                Family::V6 => {
                    let mut behind = vec![next, 0];
                    behind.extend_from_slice(&(field & 0x007f).to_be_bytes());
                    behind.extend_from_slice(&[0; 4]);
                    behind.extend_from_slice(&payload);
                    guest_ip(GUEST6.into(), OUTSIDE6.into(), FRAGMENT, 64, &behind)
                }
            };
            let frame = Frame { bytes: &frame, offload: Offload::default() };
            let Ok(packet) = Packet::parse(frame, PortId(1)) else {
                continue;
            };
            if !packet.is_fragment() {
                continue;
            }
            if let Ok(Some(frame)) = reassembler.handle(&packet, at(0))
                && let Ok(packet) = Packet::parse(frame, PortId(1))
            {
                prop_assert!(!matches!(packet.ip().unwrap().transport, Transport::Fragment));
            }
        }
    }

    #[test]
    fn what_is_cut_fits_and_comes_together_again(
        family in family(), len in 1usize..65_000, mtu in 1280u16..9000, ping in any::<bool>(),
    ) {
        let whole = match family {
            Family::V4 if ping => guest_echo(GUEST, OUTSIDE, (1, 2), 9, &data(len)),
            _ => udp(family, &data(len)),
        };
        let mut out = FrameLog::default();
        out.buffer()[..whole.len()].copy_from_slice(&whole);
        match family {
            Family::V4 => cut4(&mut out, whole.len(), mtu, 0xbeef),
            Family::V6 => cut6(&mut out, whole.len(), mtu, 0xdead_beef),
        }
        let mut reassembler = Reassembler::new();
        let count = out.frames.len();
        for (n, (frame, offload)) in out.frames.iter().enumerate() {
            prop_assert_eq!(*offload, Offload::default());
            prop_assert!(frame.len() - ETH <= usize::from(mtu));
            // All but the last are as full as they can be.
            prop_assert!(n + 1 == count || frame.len() - ETH > usize::from(mtu) - 8);
            if family == Family::V4 && count == 1 {
                assert_same(frame, &whole);
                break;
            }
            let complete = handle(&mut reassembler, frame).unwrap();
            prop_assert_eq!(complete.is_some(), n + 1 == count);
            if let Some(frame) = complete {
                assert_same(&frame, &whole);
            }
        }
    }
}

#[test]
fn an_atomic_fragment_has_nothing_to_do_with_others_of_its_id() {
    let whole = udp(Family::V6, &data(3000));
    let parts = fragments(&whole, &[180], 5);
    let small = udp(Family::V6, b"small");
    let len = small.len() - payload_at(&small);
    let atomic = fragment(&small, 0..len, false, 5);
    let mut reassembler = Reassembler::new();
    assert_eq!(handle(&mut reassembler, &parts[0]), Ok(None));
    let frame = handle(&mut reassembler, &atomic).unwrap().expect("whole");
    assert_same(&frame, &small);
    let frame = handle(&mut reassembler, &parts[1])
        .unwrap()
        .expect("complete");
    assert_same(&frame, &whole);
}

#[test]
fn guests_and_datagrams_are_kept_apart() {
    let whole = udp(Family::V4, &data(2000));
    let parts = fragments(&whole, &[100], 5);
    let mut reassembler = Reassembler::new();
    assert_eq!(handle(&mut reassembler, &parts[0]), Ok(None));
    let mut other_mac = parts[1].clone();
    other_mac[11] ^= 1;
    let other_id = fragments(&whole, &[100], 6).remove(1);
    let mut other_protocol = parts[1].clone();
    other_protocol[ETH + 9] = PROTO_TCP;
    other_protocol[ETH + 11] += PROTO_UDP - PROTO_TCP;
    for other in [&other_mac, &other_id, &other_protocol] {
        assert_eq!(handle(&mut reassembler, other), Ok(None));
    }
    let other_port = handle_at(&mut reassembler, &parts[1], 2, at(0));
    assert!(other_port.unwrap().is_none());
    assert_eq!(reassembler.len(), 5);
    let frame = handle(&mut reassembler, &parts[1]).unwrap();
    assert_same(&frame.expect("complete"), &whole);
    reassembler.forget_port(PortId(2));
    assert_eq!(reassembler.len(), 3);
    reassembler.forget_port(PortId(1));
    assert!(reassembler.is_empty());
}

#[test]
fn the_sender_hears_of_a_timeout_if_its_first_fragment_came() {
    for family in [Family::V4, Family::V6] {
        let whole = udp(family, &data(4000));
        let parts = fragments(&whole, &[100, 200], 5);
        for (came, told) in [(vec![0, 2], true), (vec![2, 0], true), (vec![1, 2], false)] {
            let mut reassembler = Reassembler::new();
            for (n, part) in came.into_iter().enumerate() {
                let now = at(n as i64 * 20_000);
                assert!(
                    handle_at(&mut reassembler, &parts[part], 1, now)
                        .unwrap()
                        .is_none()
                );
            }
            assert_eq!(reassembler.poll_timeout(), Some(at(30_000)));
            reassembler.handle_timeout(at(29_999), &mut |_| panic!("early"));
            let mut heard = Vec::new();
            reassembler.handle_timeout(at(30_000), &mut |expired| {
                assert_eq!((expired.ingress, expired.source), (PortId(1), GUEST_MAC));
                heard.push(expired.packet.to_vec());
            });
            let expected: &[&[u8]] = if told { &[&parts[0][ETH..]] } else { &[] };
            assert_eq!(heard, expected);
            assert_eq!(reassembler.counters().expired, 1);
            assert!(reassembler.is_empty());
        }
    }
}

#[test]
fn a_port_at_its_limit_gives_up_its_oldest() {
    let mut reassembler = Reassembler::new();
    let whole = udp(Family::V4, &data(2000));
    let part = |id: usize, n| fragments(&whole, &[100], id as u16).remove(n);
    for id in 0..PER_GUEST_MAX + 1 {
        let now = at(id as i64);
        assert!(
            handle_at(&mut reassembler, &part(id, 0), 1, now)
                .unwrap()
                .is_none()
        );
    }
    assert_eq!(
        (reassembler.len(), reassembler.counters().limited),
        (PER_GUEST_MAX, 1)
    );
    assert!(handle(&mut reassembler, &part(1, 1)).unwrap().is_some());
    assert_eq!(
        handle(&mut reassembler, &part(0, 1)),
        Ok(None),
        "the oldest is gone"
    );
}

#[test]
fn a_datagram_has_so_many_fragments() {
    let whole = udp(Family::V4, &data(8 * PIECES_MAX + 800));
    let cuts: Vec<usize> = (1..=PIECES_MAX).collect();
    let parts = fragments(&whole, &cuts, 5);
    let mut reassembler = Reassembler::new();
    for part in &parts[..PIECES_MAX] {
        assert_eq!(handle(&mut reassembler, part), Ok(None));
    }
    assert_eq!(
        handle(&mut reassembler, &parts[PIECES_MAX]),
        Err(DropReason::Limit)
    );
    assert_eq!(reassembler.counters().limited, 1);
    assert_eq!(
        handle(&mut reassembler, &parts[0]),
        Err(DropReason::Fragment)
    );
}

#[test]
fn lengths_that_no_sender_cuts_are_refused() {
    for family in [Family::V4, Family::V6] {
        let whole = udp(family, &data(60_000));
        let refused = [
            fragment(&whole, 0..12, true, 1),
            fragment(&whole, 8..8, false, 1),
            fragment(&whole, 0..0, true, 1),
        ];
        for frame in &refused {
            let mut reassembler = Reassembler::new();
            assert_eq!(handle(&mut reassembler, frame), Err(DropReason::Malformed));
            assert!(reassembler.is_empty());
        }
        // An end beyond 65,535 bytes, "ping of death": 65,528 is the last offset.
        let mut beyond = fragment(&whole, 0..64, false, 1);
        let at = payload_at(&whole);
        if family == Family::V4 {
            beyond[ETH + 6..ETH + 8].copy_from_slice(&8189u16.to_be_bytes());
            beyond[ETH + 10..ETH + 12].fill(0);
            let sum = !checksum::fold(checksum::sum(&beyond[ETH..at]));
            beyond[ETH + 10..ETH + 12].copy_from_slice(&sum.to_be_bytes());
        } else {
            beyond[at + 2..at + 4].copy_from_slice(&65_512u16.to_be_bytes());
        }
        let mut reassembler = Reassembler::new();
        assert_eq!(
            handle(&mut reassembler, &beyond),
            Err(DropReason::Malformed)
        );
    }
}

#[test]
fn the_longest_datagram_passes() {
    for (family, payload) in [(Family::V4, 65_507), (Family::V6, 65_527)] {
        let whole = udp(family, &data(payload));
        let parts = fragments(&whole, &(1..50).map(|n| n * 185).collect::<Vec<_>>(), 1);
        let mut reassembler = Reassembler::new();
        let mut complete = None;
        for part in parts.iter().rev() {
            complete = handle(&mut reassembler, part).unwrap();
        }
        assert_same(&complete.expect("complete"), &whole);
    }
}

#[test]
fn the_first_fragment_holds_the_whole_transport_header() {
    let from = SocketAddr::new(GUEST.into(), 1);
    let to = SocketAddr::new(OUTSIDE.into(), 2);
    let tcp = guest_tcp(from, to, (1, 0), (2, 1000), &[], &data(100));
    let from = SocketAddr::new(GUEST6.into(), 1);
    let to = SocketAddr::new(OUTSIDE6.into(), 2);
    let tcp6 = guest_tcp(from, to, (1, 0), (2, 1000), &[], &data(100));
    for (whole, cut, passes) in [
        (&tcp, 1, false),
        (&tcp, 2, false),
        (&tcp, 3, true),
        (&tcp6, 1, false),
        (&tcp6, 2, false),
        (&tcp6, 3, true),
    ] {
        let mut reassembler = Reassembler::new();
        let parts = fragments(whole, &[cut], 1);
        assert_eq!(handle(&mut reassembler, &parts[1]), Ok(None));
        let complete = handle(&mut reassembler, &parts[0]);
        if passes {
            assert!(complete.unwrap().is_some());
        } else {
            assert_eq!(complete, Err(DropReason::Malformed), "{cut}");
        }
        assert!(reassembler.is_empty());
    }
}

#[test]
fn a_fragment_in_a_fragment_is_refused() {
    let inner = fragment(&udp(Family::V6, &data(64)), 0..64, true, 2);
    let mut outer = inner.clone();
    outer[ETH + 6] = FRAGMENT;
    let len = outer.len() - payload_at(&outer);
    let atomic = fragment(&outer, 0..len, false, 3);
    let mut reassembler = Reassembler::new();
    assert_eq!(
        handle(&mut reassembler, &atomic),
        Err(DropReason::Malformed)
    );
    assert_eq!(reassembler.counters().reassembled, 0);
}

#[test]
fn extension_headers_and_options_of_the_first_fragment_stay() {
    // A hop-by-hop header in every fragment, destination options behind the fragment header.
    let plain = udp(Family::V6, &data(1000));
    let mut whole = plain[..ETH + IPV6_HEADER_LEN].to_vec();
    let behind = 8 + 8 + plain.len() - whole.len();
    whole[ETH + 4..ETH + 6].copy_from_slice(&(behind as u16).to_be_bytes());
    whole[ETH + 6] = 0;
    whole.extend_from_slice(&[60, 0, 1, 4, 0, 0, 0, 0]);
    whole.extend_from_slice(&[PROTO_UDP, 0, 1, 4, 0, 0, 0, 0]);
    whole.extend_from_slice(&plain[ETH + IPV6_HEADER_LEN..]);
    let cut = |range: Range<usize>, more: bool| {
        let mut frame = whole[..ETH + 48].to_vec();
        let part = &whole[ETH + 48..][range.clone()];
        frame[ETH + 4..ETH + 6].copy_from_slice(&((16 + part.len()) as u16).to_be_bytes());
        frame[ETH + 40] = FRAGMENT;
        frame.extend_from_slice(&[60, 0]);
        frame.extend_from_slice(&(range.start as u16 | u16::from(more)).to_be_bytes());
        frame.extend_from_slice(&[0, 0, 0, 1]);
        frame.extend_from_slice(part);
        frame
    };
    let mut reassembler = Reassembler::new();
    assert_eq!(handle(&mut reassembler, &cut(0..16, true)), Ok(None));
    let frame = handle(&mut reassembler, &cut(16..1016, false)).unwrap();
    assert_eq!(frame.expect("complete"), whole);
    // Destination options alone in the first fragment: who filters sees no ports there (RFC 7112).
    assert_eq!(handle(&mut reassembler, &cut(0..8, true)), Ok(None));
    let dropped = handle(&mut reassembler, &cut(8..1016, false));
    assert_eq!(dropped, Err(DropReason::Malformed));
}

#[test]
fn congestion_met_by_one_fragment_is_met_by_the_datagram() {
    for family in [Family::V4, Family::V6] {
        for (first, second, expected) in [
            (2, 3, Ok(3)),
            (3, 2, Ok(3)),
            (1, 1, Ok(1)),
            (0, 0, Ok(0)),
            (0, 3, Err(DropReason::Malformed)),
        ] {
            let whole = udp(family, &data(100));
            let mark = |mut frame: Vec<u8>, ecn: u8| {
                if family == Family::V4 {
                    frame[ETH + 1] |= ecn;
                    frame[ETH + 10..ETH + 12].fill(0);
                    let sum = !checksum::fold(checksum::sum(&frame[ETH..ETH + 20]));
                    frame[ETH + 10..ETH + 12].copy_from_slice(&sum.to_be_bytes());
                } else {
                    frame[ETH + 1] |= ecn << 4;
                }
                frame
            };
            let parts = fragments(&whole, &[2], 1);
            let mut reassembler = Reassembler::new();
            handle(&mut reassembler, &mark(parts[0].clone(), first)).unwrap();
            let complete = handle(&mut reassembler, &mark(parts[1].clone(), second));
            let seen = complete.map(|frame| {
                let frame = frame.expect("complete");
                let frame = Frame {
                    bytes: &frame,
                    offload: Offload::default(),
                };
                match Packet::parse(frame, PortId(1)).unwrap().body {
                    Body::Ipv4(ip) => ip.tos,
                    Body::Ipv6(ip) => ip.tos,
                    other => panic!("{other:?}"),
                }
            });
            assert_eq!(seen, expected, "{first} {second}");
        }
    }
}
