use super::*;
use crate::nat::testing::{
    FakeUplink, FrameLog, GATEWAY_MAC, GUEST, GUEST_MAC, guest_udp, guest_udp_train, lan, parse,
};
use crate::wire::{Body, Transport};
use proptest::prelude::*;
use std::collections::BTreeSet;
use std::net::Ipv4Addr;

const DNS: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(198, 51, 100, 1), 53);
const PEER: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(198, 51, 100, 2), 7000);
const OTHER: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(198, 51, 100, 2), 7001);
const GUEST_PORT: u16 = 5000;

struct Bench {
    nat: UdpNat,
    up: FakeUplink,
    out: FrameLog,
    errors: ErrorSender,
    now: Instant,
    drops: Vec<DropReason>,
}

impl Bench {
    fn new(limits: Limits) -> Self {
        Self {
            nat: UdpNat::new(lan(), limits, false),
            up: FakeUplink::new(1),
            out: FrameLog::default(),
            errors: ErrorSender::new(),
            now: Instant::from_secs(1000),
            drops: Vec::new(),
        }
    }

    fn frame(&mut self, frame: &[u8], offload: Offload) -> Result<(), DropReason> {
        let packet = parse(frame, offload);
        let (ip, udp) = packet.udp4().expect("UDP");
        let (nat, up) = (&mut self.nat, &mut self.up);
        let answers = (&mut self.out, &mut self.errors);
        nat.handle_packet(&packet, ip, udp, self.now, up, answers)
    }

    fn send(&mut self, port: u16, to: SocketAddrV4, payload: &[u8]) -> Result<(), DropReason> {
        let source = SocketAddrV4::new(GUEST, port);
        self.frame(&guest_udp(source, to, 64, payload), Offload::default())
    }

    /// All readiness events.
    fn run(&mut self) {
        while let Some((owner, _)) = self.up.poll_event() {
            let SockOwner::Udp(id) = owner else {
                panic!("{owner:?}")
            };
            let drops = &mut |reason| self.drops.push(reason);
            self.nat
                .handle_ready(id, self.now, &mut self.up, &mut self.out, drops);
        }
    }

    fn socket(&self, nth: usize) -> SockId {
        self.up.open_sockets()[nth].0
    }

    fn wait(&mut self, secs: u64) {
        self.now += Duration::from_secs(secs);
        self.nat.handle_timeout(self.now, &mut self.up);
        assert_eq!(self.nat.len(), self.up.open_count());
    }
}

/// What a frame to the guest says.
#[derive(Debug, PartialEq)]
struct Seen {
    from: SocketAddrV4,
    to: SocketAddrV4,
    ttl: u8,
    payload: Vec<u8>,
    gso: Gso,
}

fn seen((bytes, offload): &(Vec<u8>, Offload)) -> Seen {
    let packet = parse(bytes, *offload);
    assert_eq!(
        (packet.source, packet.destination),
        (GATEWAY_MAC, GUEST_MAC)
    );
    let (ip, udp) = packet.udp4().expect("UDP");
    let partial = Csum::Partial {
        start: 34,
        offset: 6,
    };
    assert_eq!(offload.csum, partial);
    // Completing the checksum as a device does makes it right.
    let mut transport = ip.payload().to_vec();
    let sum = !checksum::fold(checksum::sum(&transport));
    transport[6..8].copy_from_slice(&sum.to_be_bytes());
    let whole = checksum::transport4(ip.source, ip.destination, PROTO_UDP, &transport);
    assert_eq!(whole, 0xffff);
    Seen {
        from: SocketAddrV4::new(ip.source, udp.source_port),
        to: SocketAddrV4::new(ip.destination, udp.destination_port),
        ttl: ip.ttl,
        payload: udp.payload.to_vec(),
        gso: offload.gso,
    }
}

/// Type and code of an ICMP error.
fn icmp_error(frame: &(Vec<u8>, Offload)) -> (u8, u8) {
    let Body::Ipv4(ip) = parse(&frame.0, frame.1).body else {
        panic!("not IPv4")
    };
    let Transport::Icmp(icmp) = ip.transport else {
        panic!("not ICMP")
    };
    (icmp[0], icmp[1])
}

#[test]
fn a_datagram_goes_out_and_its_answer_comes_back() {
    let mut bench = Bench::new(LIMITS);
    bench.send(GUEST_PORT, PEER, b"ask").unwrap();
    let sent = bench.up.sent.pop_front().unwrap();
    assert_eq!((sent.to, &sent.payload[..]), (PEER, &b"ask"[..]));
    assert_eq!((sent.ttl, sent.segment), (63, None));
    assert_eq!(bench.up.local_port(sent.socket), GUEST_PORT);

    bench.up.deliver_ttl(sent.socket, PEER, b"answer", None, 50);
    bench.up.deliver(sent.socket, PEER, b"", None);
    bench.run();
    let guest = SocketAddrV4::new(GUEST, GUEST_PORT);
    for (ttl, payload) in [(49, &b"answer"[..]), (63, b"")] {
        let expected = Seen {
            from: PEER,
            to: guest,
            ttl,
            payload: payload.to_vec(),
            gso: Gso::None,
        };
        assert_eq!(seen(&bench.out.pop().unwrap()), expected);
    }
    assert_eq!(bench.out.pop(), None);
    let expected = UdpCounters {
        opened: 1,
        from_guest: 1,
        to_guest: 2,
        ..UdpCounters::default()
    };
    assert_eq!(bench.nat.counters(), expected);
    assert!(bench.drops.is_empty());
}

#[test]
fn one_mapping_for_all_destinations_and_a_port_of_its_own_per_guest_port() {
    let mut bench = Bench::new(LIMITS);
    bench.up.busy_ports = BTreeSet::from([6000]);
    for to in [PEER, OTHER, DNS] {
        bench.send(GUEST_PORT, to, b"x").unwrap();
    }
    assert_eq!(bench.nat.len(), 1);
    bench.send(6000, PEER, b"x").unwrap();
    assert_eq!(bench.nat.len(), 2);
    assert_eq!(bench.up.local_port(bench.socket(0)), GUEST_PORT);
    assert_ne!(bench.up.local_port(bench.socket(1)), 6000);
}

#[test]
fn strangers_are_filtered() {
    let mut bench = Bench::new(LIMITS);
    bench.send(GUEST_PORT, PEER, b"x").unwrap();
    let same_host_other_port = OTHER;
    for stranger in [same_host_other_port, DNS] {
        bench.up.deliver(bench.socket(0), stranger, b"attack", None);
    }
    bench.run();
    assert_eq!(bench.drops, [DropReason::Filtered; 2]);
    assert_eq!(bench.out.count, 0);
    // Strangers do not keep a mapping alive.
    bench.wait(119);
    bench.up.deliver(bench.socket(0), OTHER, b"attack", None);
    bench.run();
    bench.wait(2);
    assert!(bench.nat.is_empty());
}

#[test]
fn trains_stay_whole_both_ways() {
    let mut bench = Bench::new(LIMITS);
    let source = SocketAddrV4::new(GUEST, GUEST_PORT);
    let payload: Vec<u8> = (0..3500u32).map(|n| n as u8).collect();
    let (frame, offload) = guest_udp_train(source, PEER, 1000, &payload);
    bench.frame(&frame, offload).unwrap();
    let sent = bench.up.sent.pop_front().unwrap();
    assert_eq!((sent.segment, sent.payload), (Some(1000), payload.clone()));
    assert_eq!(bench.up.send_calls, 1);
    // A train of one datagram is none.
    let (frame, offload) = guest_udp_train(source, PEER, 1000, &payload[..1000]);
    bench.frame(&frame, offload).unwrap();
    assert_eq!(bench.up.sent.pop_front().unwrap().segment, None);

    bench.up.deliver(sent.socket, PEER, &payload, Some(1000));
    bench
        .up
        .deliver(sent.socket, PEER, &payload[..900], Some(1000));
    bench.run();
    let train = seen(&bench.out.pop().unwrap());
    assert_eq!(
        (train.gso, train.payload),
        (Gso::Udp(1000), payload.clone())
    );
    assert_eq!(seen(&bench.out.pop().unwrap()).gso, Gso::None);

    // Longer than an IP packet: two super-frames, datagram boundaries kept.
    let long: Vec<u8> = (0..65_536u32).map(|n| (n >> 4) as u8).collect();
    bench.up.deliver(sent.socket, PEER, &long, Some(1400));
    bench.run();
    let parts = [bench.out.pop().unwrap(), bench.out.pop().unwrap()].map(|frame| seen(&frame));
    assert_eq!(parts[0].payload.len(), 46 * 1400);
    assert_eq!([&parts[0].payload[..], &parts[1].payload].concat(), long);
    assert!(bench.drops.is_empty());
}

#[test]
fn what_the_lan_cannot_carry_is_dropped() {
    let mut bench = Bench::new(LIMITS);
    bench.send(GUEST_PORT, PEER, b"x").unwrap();
    let socket = bench.socket(0);
    bench.up.deliver(socket, PEER, &[1; 1473], None);
    bench.up.deliver(socket, PEER, &[1; 3000], Some(1473));
    bench.up.deliver(socket, PEER, &[1; 1472], None);
    bench.up.deliver(socket, PEER, &[1; 3000], Some(1472));
    bench
        .up
        .deliver_ttl(socket, PEER, b"end of the way", None, 1);
    bench.run();
    let expected = [
        DropReason::TooBig,
        DropReason::TooBig,
        DropReason::TtlExceeded,
    ];
    assert_eq!((bench.out.count, &bench.drops[..]), (2, &expected[..]));
}

#[test]
fn ttl_ends_at_the_gateway() {
    let mut bench = Bench::new(LIMITS);
    let source = SocketAddrV4::new(GUEST, GUEST_PORT);
    for ttl in [0, 1] {
        let frame = guest_udp(source, PEER, ttl, b"x");
        let dropped = bench.frame(&frame, Offload::default());
        assert_eq!(dropped, Err(DropReason::TtlExceeded));
    }
    assert!(bench.nat.is_empty());
    bench
        .frame(&guest_udp(source, PEER, 2, b"x"), Offload::default())
        .unwrap();
    assert_eq!(bench.up.sent[0].ttl, 1);
}

#[test]
fn port_zero_is_no_port() {
    let mut bench = Bench::new(LIMITS);
    let zero = SocketAddrV4::new(*PEER.ip(), 0);
    assert_eq!(bench.send(0, PEER, b"x"), Err(DropReason::Malformed));
    assert_eq!(bench.send(1, zero, b"x"), Err(DropReason::Malformed));
    assert_eq!(bench.up.open_count(), 0);
}

#[test]
fn the_hosts_own_addresses_are_forbidden_unless_allowed() {
    let mut bench = Bench::new(LIMITS);
    bench.up.host_addresses.insert(*PEER.ip());
    bench.send(GUEST_PORT, DNS, b"x").unwrap();
    for port in [GUEST_PORT, 6000] {
        let dropped = bench.send(port, PEER, b"x");
        assert_eq!(dropped, Err(DropReason::ForbiddenDestination));
        assert_eq!(icmp_error(&bench.out.pop().unwrap()), (3, 13));
    }
    assert_eq!((bench.nat.len(), bench.up.sent.len()), (1, 1));
    bench.nat.host_access = true;
    bench.send(GUEST_PORT, PEER, b"x").unwrap();
    assert_eq!(bench.up.sent.len(), 2);
}

#[test]
fn failed_sends_are_counted_and_told_to_the_guest() {
    let mut bench = Bench::new(LIMITS);
    bench.send(GUEST_PORT, PEER, b"x").unwrap();
    let socket = bench.socket(0);
    bench.up.fail_send(socket, HostError::Refused);
    bench.send(GUEST_PORT, PEER, b"again").unwrap();
    assert_eq!(bench.up.sent.back().unwrap().payload, b"again");
    let failures = [
        (
            HostError::NetUnreachable,
            DropReason::HostRefused,
            Some((3, 0)),
        ),
        (
            HostError::HostUnreachable,
            DropReason::HostRefused,
            Some((3, 1)),
        ),
        (
            HostError::Prohibited,
            DropReason::HostRefused,
            Some((3, 13)),
        ),
        (HostError::TooBig, DropReason::TooBig, None),
        (HostError::Exhausted, DropReason::HostFull, None),
        (HostError::Other(22), DropReason::HostRefused, None),
    ];
    for (error, reason, icmp) in failures {
        bench.up.fail_send(socket, error);
        assert_eq!(bench.send(GUEST_PORT, PEER, b"x"), Err(reason));
        assert_eq!(bench.out.pop().as_ref().map(icmp_error), icmp, "{error:?}");
    }
    bench.up.fail_send(socket, HostError::Refused);
    bench.up.fail_send(socket, HostError::Refused);
    let dropped = bench.send(GUEST_PORT, PEER, b"x");
    assert_eq!(dropped, Err(DropReason::HostRefused));
}

/// Seconds after which the mapping of `bench` is gone.
fn lifetime(bench: &mut Bench) -> u64 {
    for secs in 1..1000 {
        bench.wait(1);
        if bench.nat.is_empty() {
            return secs;
        }
    }
    panic!("never");
}

#[test]
fn timeouts_by_class() {
    let answered = |bench: &mut Bench, from| {
        bench.up.deliver(bench.socket(0), from, b"answer", None);
        bench.run();
    };
    let late = GRANULARITY_SECS;
    let mut bench = Bench::new(LIMITS);
    bench.send(GUEST_PORT, PEER, b"x").unwrap();
    assert_eq!(lifetime(&mut bench), 120 + late);
    bench.send(GUEST_PORT, PEER, b"x").unwrap();
    answered(&mut bench, PEER);
    assert_eq!(lifetime(&mut bench), 300 + late);
    bench.send(GUEST_PORT, DNS, b"A?").unwrap();
    assert_eq!(lifetime(&mut bench), 30 + late);
    bench.send(GUEST_PORT, DNS, b"A?").unwrap();
    bench.send(GUEST_PORT, DNS, b"AAAA?").unwrap();
    answered(&mut bench, DNS);
    assert_eq!(lifetime(&mut bench), 30 + late);
    bench.send(GUEST_PORT, DNS, b"A?").unwrap();
    answered(&mut bench, DNS);
    assert_eq!(lifetime(&mut bench), 10 + late);
    bench.send(GUEST_PORT, DNS, b"A?").unwrap();
    answered(&mut bench, DNS);
    bench.send(GUEST_PORT, PEER, b"x").unwrap();
    assert_eq!(lifetime(&mut bench), 300 + late);
    let counters = bench.nat.counters();
    assert_eq!((counters.opened, counters.expired), (6, 6));
}

const GRANULARITY_SECS: u64 = super::super::mapping::GRANULARITY.secs();

#[test]
fn use_in_either_direction_refreshes() {
    let mut bench = Bench::new(LIMITS);
    bench.send(GUEST_PORT, PEER, b"x").unwrap();
    for _ in 0..5 {
        bench.wait(100);
        bench.up.deliver(bench.socket(0), PEER, b"news", None);
        bench.run();
        bench.wait(100);
        bench.send(GUEST_PORT, PEER, b"x").unwrap();
    }
    assert_eq!(bench.nat.counters().opened, 1);
    let timeout = bench.nat.poll_timeout().unwrap();
    assert!(timeout > bench.now + Duration::from_secs(299));
    assert_eq!(lifetime(&mut bench), 300 + GRANULARITY_SECS);
    assert_eq!(bench.nat.poll_timeout(), None);
}

#[test]
fn limits_evict_the_idle_and_spare_the_busy() {
    let mut bench = Bench::new(Limits {
        total: 3,
        per_guest: 2,
    });
    bench.send(1001, PEER, b"x").unwrap();
    bench.send(1002, PEER, b"x").unwrap();
    assert_eq!(bench.send(1003, PEER, b"x"), Err(DropReason::Limit));
    bench.wait(6);
    bench.send(1001, PEER, b"x").unwrap();
    bench.send(1003, PEER, b"x").unwrap();
    let ports: Vec<_> = (0..2)
        .map(|n| bench.up.local_port(bench.socket(n)))
        .collect();
    assert_eq!(ports, [1001, 1003]);
    assert_eq!(bench.nat.counters().evicted, 1);
    // The event of the evicted mapping finds nothing.
    let stale = bench.up.closed[0].owner;
    let SockOwner::Udp(id) = stale else { panic!() };
    let (nat, up) = (&mut bench.nat, &mut bench.up);
    nat.handle_ready(id, bench.now, up, &mut bench.out, &mut |_| {
        panic!("nothing is there")
    });
}

#[test]
fn a_host_without_files_left_costs_an_idle_mapping() {
    let mut bench = Bench::new(LIMITS);
    bench.up.open_max = 2;
    bench.send(1001, PEER, b"x").unwrap();
    bench.send(1002, DNS, b"x").unwrap();
    assert_eq!(bench.send(1003, PEER, b"x"), Err(DropReason::Limit));
    bench.up.deliver(bench.socket(1), DNS, b"done", None);
    bench.run();
    bench.send(1003, PEER, b"x").unwrap();
    assert_eq!(bench.up.open_count(), 2);
    bench.up.open_error = Some(HostError::Prohibited);
    bench.wait(6);
    assert_eq!(bench.send(1004, PEER, b"x"), Err(DropReason::HostRefused));
    assert_eq!(bench.nat.len(), bench.up.open_count());
}

/// Else the next guest with the address would hear the peers of the last one.
#[test]
fn a_gone_port_takes_its_mappings_along() {
    let mut bench = Bench::new(LIMITS);
    for port in 5000..5003 {
        bench.send(port, PEER, b"x").unwrap();
    }
    // The guest of the last mapping moves to another port.
    let frame = guest_udp(SocketAddrV4::new(GUEST, 5002), PEER, 64, b"x");
    let mut packet = parse(&frame, Offload::default());
    let home = packet.ingress;
    packet.ingress = PortId(home.0 + 1);
    let (ip, udp) = packet.udp4().expect("UDP");
    let (nat, up) = (&mut bench.nat, &mut bench.up);
    let answers = (&mut bench.out, &mut bench.errors);
    nat.handle_packet(&packet, ip, udp, bench.now, up, answers)
        .unwrap();
    bench.nat.forget_port(home, &mut bench.up);
    assert_eq!((bench.nat.len(), bench.up.open_count()), (1, 1));
    bench.nat.forget_port(packet.ingress, &mut bench.up);
    assert_eq!((bench.nat.len(), bench.up.open_count()), (0, 0));
    assert_eq!(bench.nat.counters().expired, 0);
}

#[test]
fn replies_follow_the_guest_to_its_new_mac() {
    let mut bench = Bench::new(LIMITS);
    bench.send(GUEST_PORT, PEER, b"x").unwrap();
    let source = SocketAddrV4::new(GUEST, GUEST_PORT);
    let mut moved = guest_udp(source, PEER, 64, b"x");
    moved[11] = 0x77;
    bench.frame(&moved, Offload::default()).unwrap();
    bench.up.deliver(bench.socket(0), PEER, b"y", None);
    bench.run();
    assert_eq!(bench.out.pop().unwrap().0[5], 0x77);
}

#[derive(Clone, Debug)]
enum Op {
    FromGuest {
        host: u8,
        port: u16,
        peer: u8,
        ttl: u8,
        len: usize,
        segment: Option<u16>,
    },
    ToGuest {
        socket: usize,
        peer: u8,
        ttl: u8,
        len: usize,
        segment: Option<u16>,
    },
    FailSend {
        socket: usize,
    },
    Wait {
        millis: u64,
    },
}

fn op() -> impl Strategy<Value = Op> {
    let segment = || prop::option::of(0u16..3000);
    prop_oneof![
        6 => (2u8..6, 0u16..5, 0u8..6, any::<u8>(), 0usize..4000, segment()).prop_map(
            |(host, port, peer, ttl, len, segment)| Op::FromGuest { host, port, peer, ttl, len, segment }
        ),
        6 => (0usize..12, 0u8..6, any::<u8>(), 0usize..65_536, segment()).prop_map(
            |(socket, peer, ttl, len, segment)| Op::ToGuest { socket, peer, ttl, len, segment }
        ),
        1 => (0usize..12).prop_map(|socket| Op::FailSend { socket }),
        2 => (0u64..100_000).prop_map(|millis| Op::Wait { millis }),
    ]
}

fn peer(n: u8) -> SocketAddrV4 {
    let port = if n.is_multiple_of(2) { 53 } else { 7000 };
    SocketAddrV4::new(Ipv4Addr::new(203, 0, 113, n / 2), port)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]
    #[test]
    fn whatever_happens_the_books_balance(ops in prop::collection::vec(op(), 1..120)) {
        let limits = Limits { total: 10, per_guest: 4 };
        let mut bench = Bench::new(limits);
        // Guest endpoint and peer of every datagram that went out.
        let mut wrote: BTreeSet<(SocketAddrV4, SocketAddrV4)> = BTreeSet::new();
        for op in ops {
            match op {
                Op::FromGuest { host, port, peer: to, ttl, len, segment } => {
                    let source = SocketAddrV4::new(Ipv4Addr::new(192, 168, 122, host), port);
                    let payload = vec![to; len];
                    let offload = Offload { gso: segment.map_or(Gso::None, Gso::Udp), ..Offload::default() };
                    let before = bench.up.send_calls;
                    let result = bench.frame(&guest_udp(source, peer(to), ttl, &payload), offload);
                    // A send that fails was still meant.
                    if bench.up.send_calls > before {
                        wrote.insert((source, peer(to)));
                    }
                    if result.is_ok() {
                        let sent = bench.up.sent.pop_back().unwrap();
                        prop_assert_eq!((sent.to, sent.ttl), (peer(to), ttl - 1));
                        prop_assert_eq!(sent.payload, payload);
                    }
                }
                Op::ToGuest { socket, peer: from, ttl, len, segment } => {
                    if let Some(&(socket, _)) = bench.up.open_sockets().get(socket) {
                        bench.up.deliver_ttl(socket, peer(from), &vec![from; len], segment, ttl);
                        let drops = bench.drops.len();
                        bench.run();
                        prop_assert!(bench.out.count > 0 || bench.drops.len() > drops);
                    }
                }
                Op::FailSend { socket } => {
                    if let Some(&(socket, _)) = bench.up.open_sockets().get(socket) {
                        bench.up.fail_send(socket, HostError::Other(5));
                    }
                }
                Op::Wait { millis } => {
                    bench.now += Duration::from_millis(millis);
                    bench.nat.handle_timeout(bench.now, &mut bench.up);
                }
            }
            while let Some(frame) = bench.out.pop() {
                let packet = parse(&frame.0, frame.1);
                if let Some((ip, udp)) = packet.udp4() {
                    let to = SocketAddrV4::new(ip.destination, udp.destination_port);
                    let from = SocketAddrV4::new(ip.source, udp.source_port);
                    prop_assert!(wrote.contains(&(to, from)));
                    let longest = match frame.1.gso {
                        Gso::Udp(size) => usize::from(size) + 28,
                        _ => ip.packet.len(),
                    };
                    prop_assert!(longest <= 1500);
                }
            }
            prop_assert_eq!(bench.nat.len(), bench.up.open_count());
            prop_assert!(bench.nat.len() <= limits.total);
            if let Some(timeout) = bench.nat.poll_timeout() {
                prop_assert!(timeout > bench.now);
            }
        }
        bench.wait(302);
        prop_assert!(bench.nat.is_empty());
        prop_assert_eq!(bench.up.open_count(), 0);
    }
}
