use super::*;
use crate::gateway::fragment::Reassembler;
use crate::nat::testing::{
    FakeUplink, FrameLog, GATEWAY_MAC, GUEST, GUEST_MAC, GUEST6, Reported, egress, guest_echo,
    guest_echo6, guest_ip, guest_udp, lan, parse,
};
use crate::nat::{Nat, NatConfig};
use crate::wire::{Transport, checksum};
use proptest::prelude::*;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

const TARGET4: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 7);
const TARGET6_ADDRESS: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 7);
const TARGET: IpAddr = IpAddr::V4(TARGET4);
const TARGET6: IpAddr = IpAddr::V6(TARGET6_ADDRESS);
const BOTH: [IpAddr; 2] = [TARGET, TARGET6];

struct Bench {
    nat: PingNat,
    up: FakeUplink,
    out: FrameLog,
    errors: ErrorSender,
    egress: Egress,
    now: Instant,
    drops: Vec<DropReason>,
}

impl Bench {
    fn new(limits: Limits) -> Self {
        Self {
            nat: PingNat::new(lan(), limits),
            up: FakeUplink::new(1),
            out: FrameLog::default(),
            errors: ErrorSender::new(),
            egress: egress(),
            now: Instant::from_secs(1000),
            drops: Vec::new(),
        }
    }

    fn frame(&mut self, frame: &[u8]) -> Result<(), DropReason> {
        let packet = parse(frame, Offload::default());
        let ip = packet.ip().expect("IP");
        let Transport::Icmp(message) = ip.transport else {
            panic!("not ICMP")
        };
        let (nat, up) = (&mut self.nat, &mut self.up);
        let answers = (&mut self.out, &mut self.errors);
        let egress = &mut self.egress;
        nat.handle_packet(&packet, (&ip, message), egress, self.now, up, answers)
    }

    fn ping(&mut self, to: IpAddr, identifier: u16) -> Result<(), DropReason> {
        self.frame(&echo(to, identifier, 64, b"data"))
    }

    fn run(&mut self) {
        while let Some((owner, ready)) = self.up.poll_event() {
            let SockOwner::Ping(id) = owner else {
                panic!("{owner:?}")
            };
            let drops = &mut |reason| self.drops.push(reason);
            let ways = (&mut self.up, &mut self.out, &mut self.errors);
            self.nat
                .handle_ready(id, ready, &self.egress, self.now, ways, drops);
        }
    }

    fn wait(&mut self, secs: u64) {
        self.now += Duration::from_secs(secs);
        self.nat.handle_timeout(self.now, &mut self.up);
        assert_eq!(self.nat.len(), self.up.open_count());
    }
}

/// An echo request of the guest, sequence number 9.
fn echo(to: IpAddr, identifier: u16, ttl: u8, data: &[u8]) -> Vec<u8> {
    match to {
        IpAddr::V4(to) => guest_echo(GUEST, to, (identifier, 9), ttl, data),
        IpAddr::V6(to) => guest_echo6(GUEST6, to, (identifier, 9), ttl, data),
    }
}

fn guest_for(to: IpAddr) -> IpAddr {
    match to {
        IpAddr::V4(_) => GUEST.into(),
        IpAddr::V6(_) => GUEST6.into(),
    }
}

/// Any ICMP or ICMPv6 message of the guest, with a right checksum.
fn message_to(to: IpAddr, ttl: u8, mut message: Vec<u8>) -> Vec<u8> {
    let from = guest_for(to);
    error::complete_checksum(&mut message, from, to);
    let protocol = if to.is_ipv4() {
        PROTO_ICMP
    } else {
        PROTO_ICMPV6
    };
    guest_ip(from, to, protocol, ttl, &message)
}

/// Source and message of a frame to the guest, those in fragments put together first.
fn received(out: &mut FrameLog) -> Vec<(IpAddr, u8, Vec<u8>)> {
    let mut reassembler = Reassembler::new();
    let mut all = Vec::new();
    while let Some((bytes, offload)) = out.pop() {
        assert!(bytes.len() <= ETH_HEADER_LEN + usize::from(lan().mtu));
        let packet = parse(&bytes, offload);
        let whole = match packet.ip().unwrap().transport {
            Transport::Fragment => reassembler
                .handle(&packet, Instant::ZERO)
                .unwrap()
                .map(|frame| frame.bytes.to_vec()),
            _ => Some(bytes),
        };
        let Some(whole) = whole else { continue };
        // Parsing checks the IP and ICMP checksums.
        let packet = parse(&whole, Offload::default());
        assert_eq!(
            (packet.source, packet.destination),
            (GATEWAY_MAC, GUEST_MAC)
        );
        let ip = packet.ip().unwrap();
        assert_eq!(ip.destination, guest_for(ip.source));
        let Transport::Icmp(message) = ip.transport else {
            panic!("not ICMP")
        };
        all.push((ip.source, ip.ttl, message.to_vec()));
    }
    all
}

fn reply_of(to: IpAddr) -> u8 {
    if to.is_ipv4() { 0 } else { 129 }
}

#[test]
fn a_reply_carries_the_guests_identifier_and_a_right_checksum() {
    for to in BOTH {
        // The last ones come in fragments: ping -s 4000, and the longest.
        for len in [0, 1, 56, 1452, 1472, 4000, 65_507] {
            let mut bench = Bench::new(LIMITS);
            let data: Vec<u8> = (0..len).map(|n| n as u8).collect();
            bench.frame(&echo(to, 0xabcd, 12, &data)).unwrap();
            assert_eq!(bench.up.sent[0].ttl, 11);
            assert_ne!(bench.up.local_port(bench.up.sent[0].socket), 0xabcd);
            assert!(bench.up.answer_ping());
            bench.run();
            let all = received(&mut bench.out);
            let [(from, ttl, icmp)] = &all[..] else {
                panic!("{} replies", all.len())
            };
            assert_eq!((*from, *ttl), (to, 63));
            assert_eq!(icmp[..2], [reply_of(to), 0]);
            assert_eq!(icmp[4..8], [0xab, 0xcd, 0, 9]);
            assert!(icmp[8..] == data);
            let counters = bench.nat.counters();
            assert_eq!(
                (
                    counters.mappings.opened,
                    counters.requests,
                    counters.replies
                ),
                (1, 1, 1)
            );
        }
    }
}

#[test]
fn one_mapping_per_identifier_and_its_life() {
    let mut bench = Bench::new(LIMITS);
    for identifier in [1, 2, 1, 2] {
        bench.ping(TARGET, identifier).unwrap();
        bench
            .ping(Ipv4Addr::new(198, 51, 100, 8).into(), identifier)
            .unwrap();
    }
    assert_eq!(bench.nat.len(), 2);
    bench.wait(40);
    while bench.up.answer_ping() {}
    bench.run();
    bench.wait(60);
    assert_eq!(bench.nat.len(), 2, "a reply refreshes");
    bench.wait(1);
    assert!(bench.nat.is_empty());
    assert_eq!(bench.nat.counters().mappings.expired, 2);
    assert_eq!(bench.nat.poll_timeout(), None);
}

#[test]
fn a_gone_port_takes_its_mappings_along() {
    let mut bench = Bench::new(LIMITS);
    bench.ping(TARGET, 1).unwrap();
    bench.ping(TARGET6, 2).unwrap();
    let frame = echo(TARGET, 1, 64, b"");
    let port = parse(&frame, Offload::default()).ingress;
    bench.nat.forget_port(PortId(port.0 + 1), &mut bench.up);
    assert_eq!((bench.nat.len(), bench.up.open_count()), (2, 2));
    bench.nat.forget_port(port, &mut bench.up);
    assert_eq!((bench.nat.len(), bench.up.open_count()), (0, 0));
}

#[test]
fn what_is_no_echo_request_is_not_ours() {
    let mut bench = Bench::new(LIMITS);
    for (to, of_type, code) in [
        (TARGET, 0, 0),
        (TARGET, 3, 1),
        (TARGET, 5, 0),
        (TARGET, 8, 1),
        (TARGET, 11, 0),
        (TARGET, 13, 0),
        (TARGET, 128, 0),
        (TARGET, 255, 255),
        (TARGET6, 1, 0),
        (TARGET6, 3, 0),
        (TARGET6, 8, 0),
        (TARGET6, 128, 1),
        (TARGET6, 129, 0),
        (TARGET6, 133, 0),
        (TARGET6, 135, 0),
    ] {
        let frame = message_to(to, 64, vec![of_type, code, 0, 0, 0, 0, 0, 0]);
        assert_eq!(bench.frame(&frame), Err(DropReason::Unclaimed));
    }
    for to in BOTH {
        let spent = echo(to, 1, 1, b"");
        assert_eq!(bench.frame(&spent), Err(DropReason::TtlExceeded));
    }
    assert_eq!(bench.up.open_count(), 0);
}

#[test]
fn only_replies_of_targets_pass() {
    for target in BOTH {
        let mut bench = Bench::new(LIMITS);
        bench.ping(target, 1).unwrap();
        let socket = bench.up.sent[0].socket;
        let to = SocketAddr::new(target, 0);
        let stranger: IpAddr = match target {
            IpAddr::V4(_) => Ipv4Addr::new(203, 0, 113, 1).into(),
            IpAddr::V6(_) => Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 8).into(),
        };
        let reply = [reply_of(target), 0, 0, 0, 0, 0, 0, 0];
        let request = [echo_types(Family::of(target)).0, 0, 0, 0, 0, 0, 0, 0];
        let up = &mut bench.up;
        up.deliver(socket, SocketAddr::new(stranger, 0), &reply, None);
        up.deliver(socket, to, &reply[..7], None);
        up.deliver(socket, to, &request, None);
        up.deliver_ttl(socket, to, &reply, None, 1);
        bench.run();
        let expected = [
            DropReason::Filtered,
            DropReason::Malformed,
            DropReason::Malformed,
            DropReason::TtlExceeded,
        ];
        assert_eq!((bench.out.count, &bench.drops[..]), (0, &expected[..]));
    }
}

#[test]
fn a_host_without_ping_sockets_is_a_counted_drop() {
    let mut bench = Bench::new(LIMITS);
    bench.up.ping_error = Some(HostError::Prohibited);
    for _ in 0..3 {
        assert_eq!(bench.ping(TARGET, 1), Err(DropReason::HostRefused));
    }
    assert!(bench.nat.hinted && bench.nat.is_empty());
    bench.up.ping_error = None;
    bench.ping(TARGET, 1).unwrap();
}

#[test]
fn limits_take_answered_mappings_first() {
    let mut bench = Bench::new(Limits {
        total: 3,
        per_guest: 2,
        per_port: usize::MAX,
    });
    bench.ping(TARGET, 1).unwrap();
    bench.ping(TARGET, 2).unwrap();
    assert_eq!(bench.ping(TARGET, 3), Err(DropReason::Limit));
    bench.up.sent.pop_front();
    bench.up.answer_ping();
    bench.run();
    bench.ping(TARGET, 3).unwrap();
    let closed: Vec<_> = bench.up.closed.iter().map(|closed| closed.socket).collect();
    assert_eq!(closed, [SockId(1)]);
    assert_eq!(bench.nat.counters().mappings.evicted, 1);
    assert_eq!(bench.nat.len(), bench.up.open_count());
}

#[test]
fn the_host_itself_is_forbidden_and_failures_are_told() {
    for (to, unreachable) in [(TARGET, [3, 0]), (TARGET6, [1, 0])] {
        let mut bench = Bench::new(LIMITS);
        bench.up.host_addresses.insert(to);
        let dropped = bench.ping(to, 1);
        assert_eq!(dropped, Err(DropReason::ForbiddenDestination));
        bench.up.host_addresses.clear();
        bench.ping(to, 1).unwrap();
        let socket = bench.up.sent[0].socket;
        // An earlier request's fate costs nothing.
        bench.up.fail_send(socket, HostError::HostUnreachable);
        bench.ping(to, 1).unwrap();
        for _ in 0..2 {
            bench.up.fail_send(socket, HostError::NetUnreachable);
        }
        assert_eq!(bench.ping(to, 1), Err(DropReason::HostRefused));
        assert_eq!(received(&mut bench.out)[0].2[..2], unreachable);
    }
}

/// The message as the kernel sent it: the socket's identifier in place of the guest's.
fn as_sent(bench: &Bench, to: IpAddr) -> Vec<u8> {
    let sent = &bench.up.sent[0];
    let mut message = sent.payload.clone();
    let identifier = bench.up.local_port(sent.socket);
    message[4..6].copy_from_slice(&identifier.to_be_bytes());
    error::complete_checksum(&mut message, guest_for(to), to);
    message
}

fn error_of(bench: &Bench, to: IpAddr, kind: (u8, u8)) -> Reported {
    let router: IpAddr = match to {
        IpAddr::V4(_) => Ipv4Addr::new(203, 0, 113, 1).into(),
        IpAddr::V6(_) => Ipv6Addr::new(0x2001, 0xdb8, 9, 0, 0, 0, 0, 1).into(),
    };
    Reported {
        to: SocketAddr::new(to, 0),
        offender: Some(router),
        kind,
        mtu: 1400,
        error: HostError::HostUnreachable,
        payload: as_sent(bench, to),
    }
}

// ---- RFC 5508. REQ-5 (errors from guests) and REQ-7 (hairpinned queries) need raw sockets: errors of
// guests are dropped, and the host answers pings to itself where they are allowed.

#[test]
fn rfc5508_req1_queries_pass_and_mappings_are_external_host_independent() {
    for to in BOTH {
        let mut bench = Bench::new(LIMITS);
        let other: IpAddr = match to {
            IpAddr::V4(_) => Ipv4Addr::new(203, 0, 113, 77).into(),
            IpAddr::V6(_) => Ipv6Addr::new(0x2001, 0xdb8, 7, 0, 0, 0, 0, 7).into(),
        };
        for target in [to, other] {
            bench.ping(target, 5).unwrap();
        }
        assert_eq!(bench.up.sent[0].socket, bench.up.sent[1].socket);
        while bench.up.answer_ping() {}
        bench.run();
        let replies = received(&mut bench.out);
        let from: Vec<_> = replies.iter().map(|(from, ..)| *from).collect();
        assert_eq!(from, [to, other]);
    }
}

#[test]
fn rfc5508_req2_a_query_session_lives_at_least_60_seconds() {
    let mut bench = Bench::new(LIMITS);
    bench.ping(TARGET, 1).unwrap();
    bench.wait(60);
    assert_eq!(bench.nat.len(), 1);
    bench.up.answer_ping();
    bench.run();
    assert_eq!(bench.out.count, 1);
}

#[test]
fn rfc5508_req4_errors_are_reverted_to_the_guests_packet() {
    for (to, kinds) in [
        (TARGET, vec![(11, 0), (3, 0), (3, 1), (3, 4), (3, 13)]),
        (TARGET6, vec![(3, 0), (1, 0), (1, 3), (1, 1), (2, 0)]),
    ] {
        for kind in kinds {
            let mut bench = Bench::new(LIMITS);
            let request = echo(to, 0xabcd, 64, b"probe");
            bench.frame(&request).unwrap();
            let error = error_of(&bench, to, kind);
            let (router, socket) = (error.offender.unwrap(), bench.up.sent[0].socket);
            bench.up.report(socket, error);
            bench.run();
            let all = received(&mut bench.out);
            let [(from, _, icmp)] = &all[..] else {
                panic!("{} errors", all.len())
            };
            assert_eq!(*from, router);
            // b: type and code are unchanged.
            assert_eq!((icmp[0], icmp[1]), kind);
            let too_big = kind == if to.is_ipv4() { (3, 4) } else { (2, 0) };
            assert_eq!(icmp[4..8], u32::to_be_bytes(if too_big { 1400 } else { 0 }));
            // a: what is quoted behind the IP header is what the guest sent, its checksum included.
            let headers_len = wire::ip_header_len(to);
            assert_eq!(
                icmp[8 + headers_len..],
                request[ETH_HEADER_LEN + headers_len..]
            );
            assert!(bench.drops.is_empty());
        }
    }
}

/// Eight bytes behind the IP header are all that old routers quote.
#[test]
fn rfc5508_req4_a_cut_quote_is_enough() {
    let mut bench = Bench::new(LIMITS);
    let request = echo(TARGET, 0xabcd, 64, b"a long probe");
    bench.frame(&request).unwrap();
    let mut error = error_of(&bench, TARGET, (11, 0));
    error.payload.truncate(8);
    let short = Reported {
        payload: error.payload[..7].to_vec(),
        ..error.clone()
    };
    let socket = bench.up.sent[0].socket;
    bench.up.report(socket, error);
    bench.up.report(socket, short);
    bench.run();
    let all = received(&mut bench.out);
    assert_eq!(all.len(), 1);
    assert_eq!(all[0].2[28..], request[34..42], "checksum of the whole");
    assert_eq!(bench.drops, [DropReason::Malformed]);
}

#[test]
fn rfc5508_req4_errors_without_a_session_are_dropped() {
    let mut bench = Bench::new(LIMITS);
    bench.ping(TARGET, 1).unwrap();
    let socket = bench.up.sent[0].socket;
    for stranger in [Ipv4Addr::new(203, 0, 113, 9).into(), TARGET6] {
        let error = Reported {
            to: SocketAddr::new(stranger, 0),
            ..error_of(&bench, TARGET, (3, 1))
        };
        bench.up.report(socket, error);
    }
    bench.run();
    assert_eq!(
        (bench.out.count, &bench.drops[..]),
        (0, &[DropReason::Filtered; 2][..])
    );
}

#[test]
fn rfc5508_req6_an_error_neither_refreshes_nor_ends_the_session() {
    let mut bench = Bench::new(LIMITS);
    bench.ping(TARGET, 1).unwrap();
    let (socket, error) = (bench.up.sent[0].socket, error_of(&bench, TARGET, (3, 1)));
    bench.wait(59);
    bench.up.report(socket, error);
    bench.run();
    assert_eq!((bench.nat.len(), bench.out.count), (1, 1));
    bench.wait(2);
    assert!(bench.nat.is_empty());
}

/// The answers are the whole NAT's, for UDP as for echo.
#[test]
fn rfc5508_req8_no_room_and_no_right_are_answered_with_prohibited() {
    for (to, prohibited) in [(TARGET, [3, 13]), (TARGET6, [1, 1])] {
        let (mut up, mut out, now) = (FakeUplink::new(1), FrameLog::default(), Instant::ZERO);
        let config = NatConfig {
            lan: lan(),
            flows_max: 8,
            host: Default::default(),
            udp: Default::default(),
        };
        let mut nat = Nat::new(config, now);
        let mut send = |frame: &[u8], up: &mut FakeUplink| {
            let packet = parse(frame, Offload::default());
            let sent = nat.handle_packet(&packet, now, (up, &mut out));
            (
                sent,
                received(&mut out)
                    .pop()
                    .map(|(_, _, icmp)| [icmp[0], icmp[1]]),
            )
        };
        let udp = |port| {
            let from = SocketAddr::new(guest_for(to), port);
            guest_udp(from, SocketAddr::new(to, 9), 64, b"x")
        };
        // No right to sockets of this kind (net.ipv4.ping_group_range).
        up.ping_error = Some(HostError::Prohibited);
        let no_right = send(&echo(to, 1, 64, b""), &mut up);
        assert_eq!(no_right, (Err(DropReason::HostRefused), Some(prohibited)));
        up.ping_error = None;
        for identifier in 0..LIMITS.per_guest as u16 {
            let sent = send(&echo(to, identifier, 64, b""), &mut up);
            assert_eq!(sent, (Ok(()), None));
        }
        let full = send(&echo(to, 0xffff, 64, b""), &mut up);
        assert_eq!(full, (Err(DropReason::Limit), Some(prohibited)));
        assert_eq!(send(&udp(5000), &mut up), (Ok(()), None));
        up.open_error = Some(HostError::Exhausted);
        let no_files = send(&udp(5001), &mut up);
        assert_eq!(no_files, (Err(DropReason::OutOfFiles), Some(prohibited)));
        up.host_addresses.insert(to);
        let forbidden = send(&udp(5002), &mut up);
        let reason = DropReason::ForbiddenDestination;
        assert_eq!(forbidden, (Err(reason), Some(prohibited)));
    }
}

#[test]
fn rfc5508_req10_unreachable_time_exceeded_and_echo_are_supported() {
    for (to, kinds) in [(TARGET, [(3, 1), (11, 0)]), (TARGET6, [(1, 3), (3, 0)])] {
        let mut bench = Bench::new(LIMITS);
        bench.ping(to, 1).unwrap();
        let socket = bench.up.sent[0].socket;
        for kind in kinds {
            let error = error_of(&bench, to, kind);
            bench.up.report(socket, error);
        }
        bench.up.answer_ping();
        bench.run();
        assert_eq!(bench.out.count, 3);
    }
}

/// REQ-11: what is neither a query nor an error about one, redirects for instance, ends here.
#[test]
fn rfc5508_req11_other_messages_are_dropped() {
    for (to, others) in [(TARGET, [4, 5, 9, 12]), (TARGET6, [4, 127, 137, 200])] {
        let mut bench = Bench::new(LIMITS);
        bench.ping(to, 1).unwrap();
        let socket = bench.up.sent[0].socket;
        for of_type in others {
            let error = error_of(&bench, to, (of_type, 0));
            bench.up.report(socket, error);
        }
        bench.run();
        assert_eq!(
            (bench.out.count, &bench.drops[..]),
            (0, &[DropReason::Filtered; 4][..])
        );
    }
}

#[test]
fn a_request_too_long_for_the_route_says_how_long_it_may_be() {
    for (to, kind) in [(TARGET, [3, 4]), (TARGET6, [2, 0])] {
        let mut bench = Bench::new(LIMITS);
        bench.ping(to, 1).unwrap();
        let socket = bench.up.sent[0].socket;
        for _ in 0..2 {
            bench.up.fail_send(socket, HostError::TooBig);
            let local = Reported {
                offender: None,
                error: HostError::TooBig,
                mtu: 1280,
                ..error_of(&bench, to, (0, 0))
            };
            bench.up.report(socket, local);
        }
        let dropped = bench.frame(&echo(to, 1, 64, &[1; 1400]));
        assert_eq!(dropped, Err(DropReason::TooBig));
        let icmp = received(&mut bench.out).remove(0).2;
        assert_eq!((&icmp[..2], &icmp[4..8]), (&kind[..], &[0, 0, 5, 0][..]));
    }
}

proptest! {
    #[test]
    fn any_message_either_way_is_passed_or_counted(
        v6 in any::<bool>(),
        mut request in prop::collection::vec(any::<u8>(), 8..600),
        replies in prop::collection::vec(
            (any::<bool>(), prop::collection::vec(any::<u8>(), 0..2000), any::<u8>()), 0..20),
        reports in prop::collection::vec(
            (any::<bool>(), any::<(u8, u8)>(), prop::collection::vec(any::<u8>(), 0..1281)), 0..20),
        ttl in any::<u8>(),
    ) {
        let to = if v6 { TARGET6 } else { TARGET };
        let mut bench = Bench::new(LIMITS);
        bench.ping(to, 7).unwrap();
        request[0] &= if v6 { 0x8f } else { 0x0f };
        request[1] &= 1;
        let expected = request[..2] == [if v6 { 128 } else { 8 }, 0] && ttl > 1;
        let sent = bench.frame(&message_to(to, ttl, request));
        prop_assert_eq!(sent.is_ok(), expected);
        let count = replies.len();
        for (genuine, mut reply, ttl) in replies {
            if genuine && reply.len() >= 2 {
                reply[..2].copy_from_slice(&[reply_of(to), 0]);
            }
            let socket = bench.up.open_sockets()[0].0;
            bench.up.deliver_ttl(socket, SocketAddr::new(to, 0), &reply, None, ttl);
        }
        bench.run();
        prop_assert_eq!(received(&mut bench.out).len() + bench.drops.len(), count);
        let (count, before) = (reports.len(), bench.drops.len());
        for (genuine, kind, payload) in reports {
            let kind = if genuine { (3, kind.1) } else { kind };
            let socket = bench.up.open_sockets()[0].0;
            let error = Reported { payload, ..error_of(&bench, to, kind) };
            bench.up.report(socket, error);
        }
        bench.run();
        for (_, _, icmp) in received(&mut bench.out) {
            let longest = if v6 { 1240 } else { 556 };
            prop_assert!(icmp.len() <= longest);
            if !v6 {
                prop_assert_eq!(checksum::fold(checksum::sum(&icmp[8..28])), 0xffff);
            }
        }
        prop_assert_eq!(bench.errors.counters().0 as usize + bench.drops.len() - before, count);
    }
}
