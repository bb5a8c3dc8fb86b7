use super::*;
use crate::nat::testing::{
    FakeUplink, FrameLog, GATEWAY_MAC, GUEST, GUEST_MAC, guest_echo, guest_ipv4, lan, parse,
};
use crate::wire::{Body, Transport};
use proptest::prelude::*;
use std::net::Ipv4Addr;

const TARGET: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 7);

struct Bench {
    nat: PingNat,
    up: FakeUplink,
    out: FrameLog,
    errors: ErrorSender,
    now: Instant,
    drops: Vec<DropReason>,
}

impl Bench {
    fn new(limits: Limits) -> Self {
        Self {
            nat: PingNat::new(lan(), limits, false),
            up: FakeUplink::new(1),
            out: FrameLog::default(),
            errors: ErrorSender::new(),
            now: Instant::from_secs(1000),
            drops: Vec::new(),
        }
    }

    fn frame(&mut self, frame: &[u8]) -> Result<(), DropReason> {
        let packet = parse(frame, Offload::default());
        let Body::Ipv4(ip) = &packet.body else {
            panic!("not IPv4")
        };
        let Transport::Icmp(message) = ip.transport else {
            panic!("not ICMP")
        };
        let (nat, up) = (&mut self.nat, &mut self.up);
        let answers = (&mut self.out, &mut self.errors);
        nat.handle_packet(&packet, ip, message, self.now, up, answers)
    }

    fn ping(&mut self, to: Ipv4Addr, identifier: u16) -> Result<(), DropReason> {
        self.frame(&guest_echo(GUEST, to, (identifier, 1), 64, b"data"))
    }

    fn run(&mut self) {
        while let Some((owner, _)) = self.up.poll_event() {
            let SockOwner::Ping(id) = owner else {
                panic!("{owner:?}")
            };
            let drops = &mut |reason| self.drops.push(reason);
            self.nat
                .handle_ready(id, self.now, &mut self.up, &mut self.out, drops);
        }
    }

    fn wait(&mut self, secs: u64) {
        self.now += Duration::from_secs(secs);
        self.nat.handle_timeout(self.now, &mut self.up);
        assert_eq!(self.nat.len(), self.up.open_count());
    }
}

#[test]
fn a_reply_carries_the_guests_identifier_and_a_right_checksum() {
    for len in [0, 1, 56, 1472] {
        let mut bench = Bench::new(LIMITS);
        let data: Vec<u8> = (0..len).map(|n| n as u8).collect();
        bench
            .frame(&guest_echo(GUEST, TARGET, (0xabcd, 9), 12, &data))
            .unwrap();
        assert_eq!(bench.up.sent[0].ttl, 11);
        assert_ne!(bench.up.local_port(bench.up.sent[0].socket), 0xabcd);
        assert!(bench.up.answer_ping());
        bench.run();
        // Parsing checks the IP and ICMP checksums.
        let (frame, offload) = bench.out.pop().unwrap();
        let packet = parse(&frame, offload);
        assert_eq!(
            (packet.source, packet.destination),
            (GATEWAY_MAC, GUEST_MAC)
        );
        let Body::Ipv4(ip) = packet.body else {
            panic!("not IPv4")
        };
        assert_eq!((ip.source, ip.destination, ip.ttl), (TARGET, GUEST, 63));
        let Transport::Icmp(icmp) = ip.transport else {
            panic!("not ICMP")
        };
        assert_eq!(
            (&icmp[..2], &icmp[4..8]),
            (&[0, 0][..], &[0xab, 0xcd, 0, 9][..])
        );
        assert_eq!(&icmp[8..], data);
        let counters = bench.nat.counters();
        assert_eq!(
            (counters.opened, counters.requests, counters.replies),
            (1, 1, 1)
        );
    }
}

#[test]
fn one_mapping_per_identifier_and_its_life() {
    let mut bench = Bench::new(LIMITS);
    for identifier in [1, 2, 1, 2] {
        bench.ping(TARGET, identifier).unwrap();
        bench
            .ping(Ipv4Addr::new(198, 51, 100, 8), identifier)
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
    assert_eq!(bench.nat.counters().expired, 2);
    assert_eq!(bench.nat.poll_timeout(), None);
}

#[test]
fn a_gone_port_takes_its_mappings_along() {
    let mut bench = Bench::new(LIMITS);
    bench.ping(TARGET, 1).unwrap();
    bench.ping(TARGET, 2).unwrap();
    let frame = guest_echo(GUEST, TARGET, (1, 1), 64, b"");
    let port = parse(&frame, Offload::default()).ingress;
    bench.nat.forget_port(PortId(port.0 + 1), &mut bench.up);
    assert_eq!((bench.nat.len(), bench.up.open_count()), (2, 2));
    bench.nat.forget_port(port, &mut bench.up);
    assert_eq!((bench.nat.len(), bench.up.open_count()), (0, 0));
}

#[test]
fn what_is_no_echo_request_is_not_ours() {
    let mut bench = Bench::new(LIMITS);
    for (of_type, code) in [(0, 0), (3, 1), (5, 0), (8, 1), (11, 0), (13, 0), (255, 255)] {
        let mut message = vec![of_type, code, 0, 0, 0, 0, 0, 0];
        let sum = !checksum::fold(checksum::sum(&message));
        message[2..4].copy_from_slice(&sum.to_be_bytes());
        let frame = guest_ipv4(GUEST, TARGET, PROTO_ICMP, 64, &message);
        assert_eq!(bench.frame(&frame), Err(DropReason::Unclaimed));
    }
    let spent = guest_echo(GUEST, TARGET, (1, 1), 1, b"");
    assert_eq!(bench.frame(&spent), Err(DropReason::TtlExceeded));
    assert_eq!(bench.up.open_count(), 0);
}

#[test]
fn only_replies_of_targets_pass() {
    let mut bench = Bench::new(LIMITS);
    bench.ping(TARGET, 1).unwrap();
    let socket = bench.up.sent[0].socket;
    let to = SocketAddrV4::new(TARGET, 0);
    let stranger = SocketAddrV4::new(Ipv4Addr::new(203, 0, 113, 1), 0);
    bench.up.deliver(socket, stranger, &[0; 8], None);
    bench.up.deliver(socket, to, &[0; 7], None);
    bench
        .up
        .deliver(socket, to, &[8, 0, 0, 0, 0, 0, 0, 0], None);
    bench.up.deliver(socket, to, &[0; 1481], None);
    bench.up.deliver_ttl(socket, to, &[0; 8], None, 1);
    bench.run();
    let expected = [
        DropReason::Filtered,
        DropReason::Malformed,
        DropReason::Malformed,
        DropReason::TooBig,
        DropReason::TtlExceeded,
    ];
    assert_eq!((bench.out.count, &bench.drops[..]), (0, &expected[..]));
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
    bench.wait(6);
    bench.up.open_error = Some(HostError::Exhausted);
    bench
        .frame(&guest_echo(
            Ipv4Addr::new(192, 168, 122, 3),
            TARGET,
            (1, 1),
            64,
            b"",
        ))
        .unwrap();
    assert_eq!(bench.nat.counters().evicted, 2);
    assert_eq!(bench.nat.len(), bench.up.open_count());
}

#[test]
fn the_host_itself_is_forbidden_and_failures_are_told() {
    let mut bench = Bench::new(LIMITS);
    bench.up.host_addresses.insert(TARGET);
    let dropped = bench.ping(TARGET, 1);
    assert_eq!(dropped, Err(DropReason::ForbiddenDestination));
    assert_eq!(bench.out.pop().unwrap().0[34..36], [3, 13]);
    bench.up.host_addresses.clear();
    bench.ping(TARGET, 1).unwrap();
    let socket = bench.up.sent[0].socket;
    bench.up.fail_send(socket, HostError::NetUnreachable);
    assert_eq!(bench.ping(TARGET, 1), Err(DropReason::HostRefused));
    assert_eq!(bench.out.pop().unwrap().0[34..36], [3, 0]);
}

proptest! {
    #[test]
    fn any_message_either_way_is_passed_or_counted(
        mut request in prop::collection::vec(any::<u8>(), 8..600),
        replies in prop::collection::vec(
            (any::<bool>(), prop::collection::vec(any::<u8>(), 0..2000), any::<u8>()), 0..20),
        ttl in any::<u8>(),
    ) {
        let mut bench = Bench::new(LIMITS);
        bench.ping(TARGET, 7).unwrap();
        request[0] &= 0x0f;
        request[1] &= 1;
        request[2..4].fill(0);
        let sum = !checksum::fold(checksum::sum(&request));
        request[2..4].copy_from_slice(&sum.to_be_bytes());
        let sent = bench.frame(&guest_ipv4(GUEST, TARGET, PROTO_ICMP, ttl, &request));
        prop_assert_eq!(sent.is_ok(), request[..2] == [8, 0] && ttl > 1);
        let count = replies.len();
        for (genuine, mut reply, ttl) in replies {
            if genuine && reply.len() >= 2 {
                reply[..2].fill(0);
            }
            let socket = bench.up.open_sockets()[0].0;
            bench.up.deliver_ttl(socket, SocketAddrV4::new(TARGET, 0), &reply, None, ttl);
        }
        bench.run();
        prop_assert_eq!(bench.out.frames.len() + bench.drops.len(), count);
        for (frame, offload) in &bench.out.frames {
            parse(frame, *offload);
        }
    }
}
