use super::message::{HEADER_LEN, PAYLOAD_MAX_PLAIN, QUERY_LEN_MAX, Rcode};
use super::*;
use crate::gateway::Lan6;
use crate::gateway::testing::{GUEST, GUEST_ADDRESS, Kept, PORT, lan, parse, udp_frame};
use crate::wire::Body;
use std::net::{Ipv4Addr, Ipv6Addr};

/// id 0xabcd, RD, one question "vm.example" A IN.
fn question() -> Vec<u8> {
    let mut query = vec![0xab, 0xcd, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    query.extend_from_slice(b"\x02vm\x07example\0\0\x01\0\x01");
    query
}

fn with_opt(mut query: Vec<u8>, size: u16) -> Vec<u8> {
    query[11] += 1;
    query.extend_from_slice(&[0, 0, 41]);
    query.extend_from_slice(&size.to_be_bytes());
    query.extend_from_slice(&[0, 0, 0x80, 0, 0, 4, 0, 3, 0, 0]);
    query
}

/// A response with `records` A records, and OPT if the query has it.
fn answer_to(query: &[u8], records: u16) -> Vec<u8> {
    let opt = query[11] == 1;
    let end = question().len();
    let mut answer = query[..end].to_vec();
    answer[2] = 0x81;
    answer[3] = 0x80;
    answer[6..8].copy_from_slice(&records.to_be_bytes());
    for n in 0..records {
        answer.extend_from_slice(&[0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 192, 0]);
        answer.extend_from_slice(&n.to_be_bytes());
    }
    answer[10..12].fill(0);
    if opt { with_opt(answer, 1232) } else { answer }
}

struct Lab {
    service: DnsService,
    out: Kept,
    now: Instant,
}

impl Lab {
    fn new() -> Self {
        Self::with(lan())
    }

    fn with(lan: LanConfig) -> Self {
        Self {
            service: DnsService::new(lan),
            out: Kept::new(),
            now: Instant::from_secs(50),
        }
    }

    fn send(&mut self, port: PortId, mac: Mac, source_port: u16, message: &[u8]) -> Handled {
        let to = (lan().mac, lan().address, DNS_PORT);
        let mut frame = udp_frame((GUEST_ADDRESS, source_port), to, message);
        frame[6..12].copy_from_slice(&mac.0);
        let mut packet = parse(&frame);
        packet.ingress = port;
        assert!(self.service.claims(&packet));
        self.service.handle(&packet, self.now, &mut self.out)
    }

    fn ask(&mut self, message: &[u8]) -> Handled {
        self.send(PORT, GUEST, 40_000, message)
    }

    fn forwarded(&mut self, message: &[u8]) -> DnsQuery {
        assert_eq!(self.ask(message), Ok(()));
        let query = self.service.poll_query().expect("handed out");
        assert_eq!(self.service.poll_query(), None);
        query
    }

    fn answer(&mut self, id: QueryId, message: Vec<u8>) -> Handled {
        let answer = DnsAnswer {
            id,
            message: message.into(),
        };
        self.service.handle_answer(&answer, &mut self.out)
    }

    /// The payload of the one frame sent to the guest.
    fn received(&mut self) -> Vec<u8> {
        let frame = self.out.take();
        let packet = parse(&frame);
        let Body::Ipv4(ip) = packet.body else {
            panic!()
        };
        let (_, udp) = packet.udp4().unwrap();
        assert_eq!((packet.source, packet.destination), (lan().mac, GUEST));
        assert_eq!((ip.source, ip.destination), (lan().address, GUEST_ADDRESS));
        assert_eq!((udp.source_port, udp.destination_port), (DNS_PORT, 40_000));
        assert_eq!(packet.frame.len(), UDP4_PAYLOAD_AT + udp.payload.len());
        udp.payload.to_vec()
    }
}

#[test]
fn a_query_goes_out_and_its_answer_comes_back() {
    let mut lab = Lab::new();
    for message in [question(), with_opt(question(), 4096)] {
        let query = lab.forwarded(&message);
        assert_eq!(query.message, message);
        assert_eq!(
            (query.port, query.reply_to),
            (PORT, (GUEST, GUEST_ADDRESS.into(), 40_000))
        );
        assert!(lab.out.frames.is_empty());
        let answer = answer_to(&message, 3);
        assert_eq!(lab.answer(query.id, answer.clone()), Ok(()));
        assert_eq!(lab.received(), answer);
        assert_eq!(
            lab.answer(query.id, answer),
            Err(DropReason::NoFlow),
            "once"
        );
    }
    let counters = &lab.service.counters;
    assert_eq!(
        (counters.queries, counters.answers, counters.stray),
        (2, 2, 2)
    );
    assert_eq!(lab.service.outstanding(), 0);
    assert!(lab.service.per_mac.is_empty() && lab.service.per_port.is_empty());
}

#[test]
fn answers_that_do_not_fit_are_cut() {
    let plain = question();
    let small = with_opt(question(), 100);
    let middle = with_opt(question(), 1_000);
    let large = with_opt(question(), 65_535);
    let fitting = |room: usize| ((room - plain.len()) / 16) as u16;
    let fitting_opt = |room: usize| ((room - plain.len() - 15) / 16) as u16;
    for (query, fits, mtu) in [
        (&plain, fitting(512), 1500),
        (&small, fitting_opt(512), 1500),
        (&middle, fitting_opt(1_000), 1500),
        (&large, fitting_opt(1_472), 1500),
        (&large, fitting_opt(576 - 28), 576),
        (&large, fitting_opt(9_000 - 28), 9_000),
    ] {
        let mut lab = Lab::with(LanConfig { mtu, ..lan() });
        let id = lab.forwarded(query).id;
        let whole = answer_to(query, fits);
        assert_eq!(lab.answer(id, whole.clone()), Ok(()));
        assert_eq!(lab.received(), whole);
        let id = lab.forwarded(query).id;
        assert_eq!(lab.answer(id, answer_to(query, fits + 1)), Ok(()));
        let mut cut = answer_to(query, 0);
        cut[2] |= 2;
        assert_eq!(lab.received(), cut, "header, question and OPT");
        assert_eq!(lab.service.counters.truncated, 1);
    }
}

#[test]
fn what_is_no_query_is_not_passed_on() {
    let good = question();
    let with = |at: usize, value: u8| {
        let mut bad = good.clone();
        bad[at] = value;
        bad
    };
    let and = |tail: &[u8]| [&good[..], tail].concat();
    let named = |name: &[u8]| [&good[..12], name, &[0, 1, 0, 1]].concat();
    let long_name = [&[63; 64][..]; 4].concat();
    let two_opts = with_opt(with_opt(good.clone(), 600), 600);
    let named_opt = {
        let mut bad = and(&[1, b'x', 0, 0, 41, 2, 0, 0, 0, 0, 0, 0, 0]);
        bad[11] = 1;
        bad
    };
    let overrun = {
        let mut bad = with_opt(good.clone(), 600);
        let len = bad.len();
        bad[len - 5] = 9;
        bad
    };
    let huge = {
        let mut bad = with_opt(good.clone(), 600);
        let len = bad.len();
        bad[len - 6..len - 4].copy_from_slice(&1_300u16.to_be_bytes());
        bad.resize(len - 4 + 1_300, 0);
        bad
    };
    assert!(huge.len() > QUERY_LEN_MAX);
    for (name, message, code) in [
        ("an update", with(2, 0x28), Rcode::NotImp),
        ("opcode 15", with(2, 0x78), Rcode::NotImp),
        ("no question", with(5, 0), Rcode::FormErr),
        ("two questions", with(5, 2), Rcode::FormErr),
        ("an answer section", with(7, 1), Rcode::FormErr),
        ("an authority section", with(9, 1), Rcode::FormErr),
        ("three additional records", with(11, 3), Rcode::FormErr),
        ("a header alone", good[..12].to_vec(), Rcode::FormErr),
        (
            "half a question",
            good[..good.len() - 1].to_vec(),
            Rcode::FormErr,
        ),
        ("rubbish behind", and(&[0]), Rcode::FormErr),
        ("a compressed name", named(&[0xc0, 12]), Rcode::FormErr),
        ("a reserved label", named(&[0x80, 0]), Rcode::FormErr),
        ("an overrunning label", named(&[60, 1]), Rcode::FormErr),
        (
            "a name of 256 bytes",
            named(&[&long_name[..], &[0]].concat()),
            Rcode::FormErr,
        ),
        ("two OPTs", two_opts, Rcode::FormErr),
        ("OPT with a name", named_opt, Rcode::FormErr),
        ("an overrunning OPT", overrun, Rcode::FormErr),
        ("a huge query", huge, Rcode::FormErr),
        ("a zone transfer", with(good.len() - 3, 252), Rcode::Refused),
        ("class CHAOS", with(good.len() - 1, 3), Rcode::Refused),
    ] {
        let mut lab = Lab::new();
        assert_eq!(lab.ask(&message), Ok(()), "{name}");
        assert_eq!(lab.service.poll_query(), None, "{name}");
        let answer = lab.received();
        assert_eq!(answer.len(), HEADER_LEN, "{name}");
        assert_eq!(answer[..2], message[..2], "{name}");
        assert_eq!(answer[2] & 0x80, 0x80, "{name}");
        assert_eq!(
            (answer[3] & 15, &answer[4..]),
            (code as u8, &[0; 8][..]),
            "{name}"
        );
        assert_eq!(
            (lab.service.counters.refused, lab.service.outstanding()),
            (1, 0)
        );
    }
    for (message, reason) in [
        (vec![], DropReason::Truncated),
        (good[..11].to_vec(), DropReason::Truncated),
        (with(2, 0x81), DropReason::Malformed),
    ] {
        let mut lab = Lab::new();
        assert_eq!(lab.ask(&message), Err(reason));
        assert!(lab.out.frames.is_empty(), "answers are not answered");
        assert_eq!(lab.service.counters.malformed, 1);
    }
}

#[test]
fn the_root_and_the_longest_name_and_a_signature_pass() {
    let named = |name: &[u8]| [&question()[..12], name, &[0, 1, 0, 1]].concat();
    let long_name = [&[63; 64][..], &[63; 64], &[63; 64], &[61; 62], &[0]].concat();
    assert_eq!(long_name.len(), 255);
    let mut signed = with_opt(question(), 1232);
    signed[11] = 2;
    signed.extend_from_slice(b"\x03key\0\0\xfa\0\xff\0\0\0\0\0\x02xx");
    for message in [named(&[0]), named(&long_name), signed] {
        let mut lab = Lab::new();
        assert_eq!(lab.forwarded(&message).message, message);
    }
}

#[test]
fn only_guests_by_unicast() {
    let mut lab = Lab::new();
    let mut from = |mac, source, source_port| {
        let frame = udp_frame(
            (source, source_port),
            (mac, lan().address, DNS_PORT),
            &question(),
        );
        lab.service.handle(&parse(&frame), lab.now, &mut lab.out)
    };
    let outside = Ipv4Addr::new(8, 8, 8, 8);
    assert_eq!(from(lan().mac, outside, 9), Err(DropReason::ForeignSource));
    assert_eq!(
        from(lan().mac, lan().address, 9),
        Err(DropReason::ForeignSource)
    );
    assert_eq!(
        from(Mac::BROADCAST, GUEST_ADDRESS, 9),
        Err(DropReason::ForbiddenDestination)
    );
    assert_eq!(
        from(lan().mac, GUEST_ADDRESS, 0),
        Err(DropReason::Malformed)
    );
    assert!(lab.out.frames.is_empty());
    assert_eq!(lab.service.outstanding(), 0);
}

#[test]
fn limits_hold_per_mac_per_port_and_in_total() {
    let mut lab = Lab::new();
    let mac = |n: usize| Mac([2, 0, 0, 0, (n >> 8) as u8, n as u8]);
    let burst = |lab: &mut Lab, port: u16, macs: std::ops::Range<usize>, each: usize| {
        let mut passed = 0;
        for n in macs {
            for _ in 0..each {
                match lab.send(PortId(port), mac(n), 40_000, &question()) {
                    Ok(()) => passed += 1,
                    Err(reason) => assert_eq!(reason, DropReason::Limit),
                }
            }
        }
        while lab.service.poll_query().is_some() {}
        passed
    };
    assert_eq!(burst(&mut lab, 1, 0..1, 1_000), QUERIES_PER_MAC_MAX);
    assert_eq!(burst(&mut lab, 2, 1..1_000, 1), QUERIES_PER_PORT_MAX);
    // The fifth that asks all it can gets half of what is left, and so on: there is a share for one more.
    for port in 3..7 {
        assert!(burst(&mut lab, port, 1_000..2_000, 1) >= 56);
    }
    assert!(burst(&mut lab, 7, 1_000..2_000, 1) >= 24);
    let outstanding = lab.service.outstanding();
    assert!(outstanding < QUERIES_MAX);
    // All forgotten at their deadline.
    let deadline = lab.service.poll_at().unwrap();
    assert_eq!(deadline, lab.now + QUERY_LIFETIME);
    lab.service.expire(deadline - Duration::from_micros(1));
    assert_eq!(lab.service.outstanding(), outstanding);
    lab.service.expire(deadline);
    assert_eq!(lab.service.outstanding(), 0);
    assert_eq!(lab.service.poll_at(), None);
    assert_eq!(lab.service.counters.expired, outstanding as u64);
    assert_eq!(
        lab.answer(QueryId(0), answer_to(&question(), 1)),
        Err(DropReason::NoFlow)
    );
    lab.now = deadline;
    assert_eq!(burst(&mut lab, 1, 0..1, 1_000), QUERIES_PER_MAC_MAX);
}

#[test]
fn a_queue_that_nobody_drains_is_bounded() {
    let mut lab = Lab::new();
    for _ in 0..5_000 {
        lab.now += QUERY_LIFETIME;
        let _ = lab.ask(&question());
    }
    assert_eq!(lab.service.queue.len(), QUERIES_MAX);
    assert!(lab.service.outstanding() <= 1);
}

#[test]
fn abandoned_queries_make_room() {
    let mut lab = Lab::new();
    let id = lab.forwarded(&question()).id;
    lab.service.abandon(id);
    lab.service.abandon(id);
    assert_eq!(
        (lab.service.outstanding(), lab.service.counters.limited),
        (0, 1)
    );
}

#[test]
fn unusable_answers_are_not_passed_on() {
    let mut lab = Lab::new();
    let mut no_question = answer_to(&question(), 100);
    no_question[5] = 0;
    let mut bad_name = answer_to(&question(), 100);
    bad_name[12] = 0xc0;
    for bad in [vec![], vec![0x80; 11], question(), no_question, bad_name] {
        let id = lab.forwarded(&question()).id;
        assert_eq!(lab.answer(id, bad), Err(DropReason::Malformed));
        assert!(lab.out.frames.is_empty());
        assert_eq!(lab.service.outstanding(), 0);
    }
    assert_eq!(lab.service.counters.stray, 5);
}

#[test]
fn failures_repeat_the_question() {
    let query = with_opt(question(), 1232);
    let failure = message::failure(&query, Rcode::ServFail);
    assert_eq!(
        failure[..12],
        [0xab, 0xcd, 0x81, 0x82, 0, 1, 0, 0, 0, 0, 0, 0]
    );
    assert_eq!(failure[12..], question()[12..]);
    assert!(message::is_answer_to(&failure, &query));
    assert_eq!(message::rcode(&failure), Some(2));
    assert_eq!(
        message::failure(&query[..14], Rcode::ServFail).len(),
        HEADER_LEN
    );
    assert_eq!(PAYLOAD_MAX_PLAIN, 512);
}

const LAN6: Lan6 = Lan6 {
    link_local: Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1),
    address: Ipv6Addr::new(0xfd00, 0, 0, 1, 0, 0, 0, 1),
    prefix: 64,
};
const GUEST6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0, 0, 1, 0, 0, 0, 0x77);
const GUEST6_LOCAL: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0x77);

fn lan6() -> LanConfig {
    LanConfig {
        v6: Some(LAN6),
        ..lan()
    }
}

fn udp6_frame(source: Ipv6Addr, to: (Mac, Ipv6Addr, u16), payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![0; UDP6_PAYLOAD_AT + payload.len()];
    frame[UDP6_PAYLOAD_AT..].copy_from_slice(payload);
    write_udp6(&mut frame, (GUEST, source, 40_000), to, payload.len());
    frame
}

#[test]
fn over_ipv6_the_answer_comes_from_the_address_that_was_asked() {
    let mut lab = Lab::with(lan6());
    for (source, gateway) in [
        (GUEST6, LAN6.address),
        (GUEST6_LOCAL, LAN6.link_local),
        (GUEST6_LOCAL, LAN6.address),
        (GUEST6, LAN6.link_local),
    ] {
        let frame = udp6_frame(source, (lan().mac, gateway, DNS_PORT), &question());
        let packet = parse(&frame);
        assert!(lab.service.claims(&packet));
        assert_eq!(lab.service.handle(&packet, lab.now, &mut lab.out), Ok(()));
        let query = lab.service.poll_query().unwrap();
        assert_eq!(query.reply_to, (GUEST, source.into(), 40_000));
        let answer = answer_to(&question(), 2);
        assert_eq!(lab.answer(query.id, answer.clone()), Ok(()));
        let frame = lab.out.take();
        // Parsed, so its checksum is right.
        let packet = parse(&frame);
        let Body::Ipv6(ip) = packet.body else {
            panic!("{:?}", packet.body)
        };
        let Transport::Udp(udp) = ip.transport else {
            panic!("{:?}", ip.transport)
        };
        assert_eq!((packet.source, packet.destination), (lan().mac, GUEST));
        assert_eq!((ip.source, ip.destination), (gateway, source));
        assert_eq!((udp.source_port, udp.destination_port), (DNS_PORT, 40_000));
        assert_eq!((udp.payload, frame.len()), (&answer[..], 62 + answer.len()));
    }
    assert!(lab.service.per_mac.is_empty() && lab.service.per_port.is_empty());
}

#[test]
fn over_ipv6_answers_are_cut_to_the_mtu_less_its_headers() {
    let query = with_opt(question(), 65_535);
    let fits = ((1_500 - 48 - query.len()) / 16) as u16;
    for (records, whole) in [(fits, true), (fits + 1, false)] {
        let mut lab = Lab::with(lan6());
        let to = (lan().mac, LAN6.address, DNS_PORT);
        let frame = udp6_frame(GUEST6, to, &query);
        lab.service
            .handle(&parse(&frame), lab.now, &mut lab.out)
            .unwrap();
        let id = lab.service.poll_query().unwrap().id;
        let answer = answer_to(&query, records);
        lab.answer(id, answer.clone()).unwrap();
        let frame = lab.out.take();
        assert!(frame.len() <= 14 + 1_500);
        assert_eq!(frame.ends_with(&answer), whole);
        assert_eq!(lab.service.counters.truncated, u64::from(!whole));
    }
}

#[test]
fn over_ipv6_only_guests_by_unicast_and_only_where_there_is_ipv6() {
    let (mac, gateway) = (lan().mac, LAN6.address);
    let outside = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1);
    for (mac, source, reason) in [
        (mac, outside, DropReason::ForeignSource),
        (mac, gateway, DropReason::ForeignSource),
        (mac, Ipv6Addr::UNSPECIFIED, DropReason::ForeignSource),
        (mac, Ipv6Addr::LOCALHOST, DropReason::ForeignSource),
        (
            Mac([0x33, 0x33, 0, 0, 0, 1]),
            GUEST6,
            DropReason::ForbiddenDestination,
        ),
    ] {
        let mut lab = Lab::with(lan6());
        let frame = udp6_frame(source, (mac, gateway, DNS_PORT), &question());
        let packet = parse(&frame);
        let handled = lab.service.handle(&packet, lab.now, &mut lab.out);
        assert_eq!(handled, Err(reason), "{source}");
        assert_eq!(lab.service.outstanding(), 0);
    }
    let frame = udp6_frame(GUEST6, (mac, gateway, DNS_PORT), &question());
    assert!(!DnsService::new(lan()).claims(&parse(&frame)));
    let frame = udp6_frame(GUEST6, (mac, outside, DNS_PORT), &question());
    assert!(!DnsService::new(lan6()).claims(&parse(&frame)));
}
