use super::*;
use crate::frame::ETH_HEADER_LEN;
use crate::gateway::fragment::Reassembler;
use crate::nat::egress::HostAccess;
use crate::nat::testing::{
    FakeUplink, FrameLog, GATEWAY_MAC, GUEST, GUEST_MAC, GUEST6, Reported, egress, guest_udp,
    guest_udp_train, lan, parse,
};
use crate::offload::{Csum, Offload};
use crate::wire::{PROTO_UDP, Transport, be16, checksum};
use proptest::prelude::*;
use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

mod errors;
mod rfc4787;

const PEER_ADDRESS: IpAddr = IpAddr::V4(Ipv4Addr::new(198, 51, 100, 2));
const PEER6_ADDRESS: IpAddr = IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 2));
const DNS: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(198, 51, 100, 1)), 53);
const PEER: SocketAddr = SocketAddr::new(PEER_ADDRESS, 7000);
const OTHER: SocketAddr = SocketAddr::new(PEER_ADDRESS, 7001);
const PEER6: SocketAddr = SocketAddr::new(PEER6_ADDRESS, 7000);
const GUEST_PORT: u16 = 5000;

/// The guest's address of the same family as `peer`'s.
fn guest_for(peer: SocketAddr, port: u16) -> SocketAddr {
    match peer {
        SocketAddr::V4(_) => SocketAddr::new(GUEST.into(), port),
        SocketAddr::V6(_) => SocketAddr::new(GUEST6.into(), port),
    }
}

struct Bench {
    nat: UdpNat,
    up: FakeUplink,
    out: FrameLog,
    errors: ErrorSender,
    egress: Egress,
    now: Instant,
    drops: Vec<DropReason>,
    /// Whether what the guest sends next came in fragments.
    reassembled: bool,
}

impl Bench {
    fn new(limits: Limits) -> Self {
        Self {
            nat: UdpNat::new(lan(), limits),
            up: FakeUplink::new(1),
            out: FrameLog::default(),
            errors: ErrorSender::new(),
            egress: egress(),
            now: Instant::from_secs(1000),
            drops: Vec::new(),
            reassembled: false,
        }
    }

    fn behaving(mapping: Dependence, filtering: Dependence) -> Self {
        let mut bench = Self::new(LIMITS);
        bench.nat.set_behaviour(UdpBehaviour { mapping, filtering });
        bench
    }

    fn frame(&mut self, frame: &[u8], offload: Offload) -> Result<(), DropReason> {
        let mut packet = parse(frame, offload);
        packet.reassembled = self.reassembled;
        let ip = packet.ip().expect("IP");
        let Transport::Udp(udp) = ip.transport else {
            panic!("not UDP")
        };
        let (nat, up) = (&mut self.nat, &mut self.up);
        let answers = (&mut self.out, &mut self.errors);
        let egress = &mut self.egress;
        nat.handle_packet(&packet, (&ip, &udp), egress, self.now, up, answers)
    }

    fn send(&mut self, port: u16, to: SocketAddr, payload: &[u8]) -> Result<(), DropReason> {
        let source = guest_for(to, port);
        self.frame(&guest_udp(source, to, 64, payload), Offload::default())
    }

    /// All readiness events.
    fn run(&mut self) {
        while let Some((owner, ready)) = self.up.poll_event() {
            let SockOwner::Udp(id) = owner else {
                panic!("{owner:?}")
            };
            let drops = &mut |reason| self.drops.push(reason);
            let ways = (&mut self.up, &mut self.out, &mut self.errors);
            self.nat
                .handle_ready(id, ready, &self.egress, self.now, ways, drops);
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
    from: SocketAddr,
    to: SocketAddr,
    ttl: u8,
    tos: u8,
    payload: Vec<u8>,
    gso: Gso,
}

fn seen((bytes, offload): &(Vec<u8>, Offload)) -> Seen {
    let packet = parse(bytes, *offload);
    assert_eq!(
        (packet.source, packet.destination),
        (GATEWAY_MAC, GUEST_MAC)
    );
    let ip = packet.ip().expect("IP");
    let Transport::Udp(udp) = ip.transport else {
        panic!("not UDP")
    };
    if *offload != Offload::default() {
        let partial = Csum::Partial {
            start: (ETH_HEADER_LEN + ip.header_len) as u16,
            offset: 6,
        };
        assert_eq!(offload.csum, partial);
        // Completing the checksum as a device does makes it right.
        let mut transport = ip.payload().to_vec();
        let sum = !checksum::fold(checksum::sum(&transport));
        transport[6..8].copy_from_slice(&sum.to_be_bytes());
        let whole = checksum::transport(ip.source, ip.destination, PROTO_UDP, &transport);
        assert_eq!(whole, 0xffff);
    }
    Seen {
        from: SocketAddr::new(ip.source, udp.source_port),
        to: SocketAddr::new(ip.destination, udp.destination_port),
        ttl: ip.ttl,
        tos: ip.tos,
        payload: udp.payload.to_vec(),
        gso: offload.gso,
    }
}

/// Type and code of an ICMP or ICMPv6 error.
fn icmp_error(frame: &(Vec<u8>, Offload)) -> (u8, u8) {
    let ip = parse(&frame.0, frame.1).ip().expect("IP");
    let Transport::Icmp(icmp) = ip.transport else {
        panic!("not ICMP")
    };
    (icmp[0], icmp[1])
}

/// Addresses and ports of the packet that an ICMP error quotes, and what is behind its IP header.
struct Quoted {
    source: IpAddr,
    destination: IpAddr,
    protocol: u8,
    ttl: u8,
    transport: Vec<u8>,
}

fn parse_quote(message: &[u8]) -> Quoted {
    let packet = &message[8..];
    if packet[0] >> 4 == 4 {
        assert_eq!(checksum::fold(checksum::sum(&packet[..20])), 0xffff);
        let address = |at: usize| IpAddr::from(<[u8; 4]>::try_from(&packet[at..at + 4]).unwrap());
        Quoted {
            source: address(12),
            destination: address(16),
            protocol: packet[9],
            ttl: packet[8],
            transport: packet[20..].to_vec(),
        }
    } else {
        let address = |at: usize| IpAddr::from(<[u8; 16]>::try_from(&packet[at..at + 16]).unwrap());
        Quoted {
            source: address(8),
            destination: address(24),
            protocol: packet[6],
            ttl: packet[7],
            transport: packet[40..].to_vec(),
        }
    }
}

/// The frames to the guest, those in fragments put together as the guest does. Every one fits the LAN.
fn reassembled(out: &mut FrameLog) -> Vec<(Vec<u8>, Offload)> {
    let mut reassembler = Reassembler::new();
    let mut whole = Vec::new();
    while let Some((bytes, offload)) = out.pop() {
        assert!(bytes.len() <= ETH_HEADER_LEN + usize::from(lan().mtu));
        let packet = parse(&bytes, offload);
        if let Transport::Fragment = packet.ip().unwrap().transport {
            let joined = reassembler.handle(&packet, Instant::ZERO).unwrap();
            whole.extend(joined.map(|frame| (frame.bytes.to_vec(), frame.offload)));
        } else {
            whole.push((bytes, offload));
        }
    }
    assert!(reassembler.is_empty());
    whole
}

#[test]
fn a_datagram_goes_out_and_its_answer_comes_back() {
    for peer in [PEER, PEER6] {
        let mut bench = Bench::new(LIMITS);
        bench.send(GUEST_PORT, peer, b"ask").unwrap();
        let sent = bench.up.sent.pop_front().unwrap();
        assert_eq!((sent.to, &sent.payload[..]), (peer, &b"ask"[..]));
        assert_eq!((sent.ttl, sent.segment), (63, None));
        assert_eq!(bench.up.local_port(sent.socket), GUEST_PORT);

        bench.up.deliver_ttl(sent.socket, peer, b"answer", None, 50);
        bench.up.mark_tos(sent.socket, 0xb9);
        bench.up.deliver(sent.socket, peer, b"", None);
        bench.run();
        for (ttl, tos, payload) in [(49, 0xb9, &b"answer"[..]), (63, 0, b"")] {
            let expected = Seen {
                from: peer,
                to: guest_for(peer, GUEST_PORT),
                ttl,
                tos,
                payload: payload.to_vec(),
                gso: Gso::None,
            };
            assert_eq!(seen(&bench.out.pop().unwrap()), expected);
        }
        assert_eq!(bench.out.pop(), None);
        let expected = UdpCounters {
            mappings: MappingCounters {
                opened: 1,
                ..MappingCounters::default()
            },
            from_guest: 1,
            to_guest: 2,
            ..UdpCounters::default()
        };
        assert_eq!(bench.nat.counters(), expected);
        assert!(bench.drops.is_empty());
    }
}

#[test]
fn an_empty_datagram_is_one_too() {
    for peer in [PEER, PEER6] {
        let mut bench = Bench::new(LIMITS);
        bench.send(GUEST_PORT, peer, b"").unwrap();
        assert_eq!(bench.up.sent[0].payload, b"");
        bench.up.deliver(bench.socket(0), peer, b"", None);
        bench.run();
        assert_eq!(seen(&bench.out.pop().unwrap()).payload, b"");
    }
}

/// DSCP, ECN and whether routers may fragment travel with each datagram.
#[test]
fn headers_that_matter_go_along() {
    for (flags, dont_fragment) in [(0x40, true), (0, false)] {
        let mut bench = Bench::new(LIMITS);
        let mut frame = guest_udp(guest_for(PEER, GUEST_PORT), PEER, 64, b"x");
        frame[15] = 0x2e << 2 | 1;
        frame[20] = flags;
        frame[24..26].fill(0);
        let sum = !checksum::fold(checksum::sum(&frame[14..34]));
        frame[24..26].copy_from_slice(&sum.to_be_bytes());
        bench.frame(&frame, Offload::default()).unwrap();
        let sent = &bench.up.sent[0];
        assert_eq!((sent.tos, sent.dont_fragment), (0xb9, dont_fragment));
    }
    for reassembled in [false, true] {
        let mut bench = Bench::new(LIMITS);
        bench.reassembled = reassembled;
        let mut frame = guest_udp(guest_for(PEER6, GUEST_PORT), PEER6, 64, b"x");
        frame[14..16].copy_from_slice(&[0x6b, 0x90]);
        bench.frame(&frame, Offload::default()).unwrap();
        let sent = &bench.up.sent[0];
        assert_eq!((sent.tos, sent.dont_fragment), (0xb9, !reassembled));
    }
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
fn trains_stay_whole_both_ways() {
    for peer in [PEER, PEER6] {
        let mut bench = Bench::new(LIMITS);
        let source = guest_for(peer, GUEST_PORT);
        let payload: Vec<u8> = (0..3500u32).map(|n| n as u8).collect();
        let (frame, offload) = guest_udp_train(source, peer, 1000, &payload);
        bench.frame(&frame, offload).unwrap();
        let sent = bench.up.sent.pop_front().unwrap();
        assert_eq!((sent.segment, sent.payload), (Some(1000), payload.clone()));
        assert_eq!(bench.up.send_calls, 1);
        // A train of one datagram is none.
        let (frame, offload) = guest_udp_train(source, peer, 1000, &payload[..1000]);
        bench.frame(&frame, offload).unwrap();
        assert_eq!(bench.up.sent.pop_front().unwrap().segment, None);

        bench.up.deliver(sent.socket, peer, &payload, Some(1000));
        bench
            .up
            .deliver(sent.socket, peer, &payload[..900], Some(1000));
        bench.run();
        let train = seen(&bench.out.pop().unwrap());
        assert_eq!(
            (train.gso, train.payload),
            (Gso::Udp(1000), payload.clone())
        );
        assert_eq!(seen(&bench.out.pop().unwrap()).gso, Gso::None);

        // Longer than an IP packet: two super-frames, datagram boundaries kept.
        let long: Vec<u8> = (0..65_536u32).map(|n| (n >> 4) as u8).collect();
        bench.up.deliver(sent.socket, peer, &long, Some(1400));
        bench.run();
        let parts = [bench.out.pop().unwrap(), bench.out.pop().unwrap()].map(|frame| seen(&frame));
        assert_eq!(parts[0].payload.len(), 46 * 1400);
        assert_eq!([&parts[0].payload[..], &parts[1].payload].concat(), long);
        assert!(bench.drops.is_empty());
    }
}

#[test]
fn what_is_longer_than_a_link_behind_the_guest_comes_in_fragments_for_ten_minutes() {
    for (peer, mtu) in [(PEER, 600), (PEER6, 1280)] {
        let mut bench = Bench::new(LIMITS);
        bench.send(GUEST_PORT, peer, b"x").unwrap();
        let guest = guest_for(peer, GUEST_PORT);
        let report = TooBig {
            mtu,
            guest,
            outside: peer,
            quoted: crate::nat::path_mtu::Quoted::Udp,
        };
        let payload = [7; 1400];
        let longest = |bench: &mut Bench| {
            let socket = bench.socket(0);
            bench.up.deliver(socket, peer, &payload, None);
            bench.run();
            let mut longest = (0, 0);
            while let Some((frame, _)) = bench.out.pop() {
                longest = (longest.0 + 1, longest.1.max(frame.len() - ETH_HEADER_LEN));
            }
            longest
        };
        let whole = (1, 1400 + 8 + crate::wire::ip_header_len(peer.ip()));
        assert_eq!(longest(&mut bench), whole);
        let egress = egress();
        let other = |at: SocketAddr| SocketAddr::new(at.ip(), at.port() + 1);
        let far: SocketAddr = match peer {
            SocketAddr::V4(_) => "198.51.100.77:7000".parse().unwrap(),
            SocketAddr::V6(_) => "[2001:db8::77]:7000".parse().unwrap(),
        };
        for (port, report) in [
            (PortId(9), report),
            (
                PortId(1),
                TooBig {
                    guest: other(guest),
                    ..report
                },
            ),
            (
                PortId(1),
                TooBig {
                    outside: far,
                    ..report
                },
            ),
        ] {
            let heeded = bench.nat.heed(port, &report, &egress, bench.now);
            assert_eq!(heeded, Err(DropReason::NoFlow));
        }
        assert_eq!(longest(&mut bench), whole);
        let port = PortId(1);
        assert_eq!(bench.nat.heed(port, &report, &egress, bench.now), Ok(()));
        let (frames, bytes) = longest(&mut bench);
        assert!(frames > 1 && bytes <= usize::from(mtu), "{frames} {bytes}");
        assert_eq!(bench.nat.counters().narrowed, 1);
        for _ in 0..3 {
            // In use, so that the mapping stays.
            bench.wait(200);
            bench.send(GUEST_PORT, peer, b"x").unwrap();
        }
        assert_eq!(longest(&mut bench), whole);
    }
}

#[test]
fn what_is_longer_than_the_mtu_comes_in_fragments() {
    for (peer, headers_len, longest) in [(PEER, 28, 65_507), (PEER6, 48, 65_527)] {
        let mut bench = Bench::new(LIMITS);
        bench.send(GUEST_PORT, peer, b"x").unwrap();
        let socket = bench.socket(0);
        let data: Vec<u8> = (0..longest).map(|n: u32| ((n * 7) >> 3) as u8).collect();
        let fitting = 1500 - headers_len;
        for len in [fitting, fitting + 1, 4000, data.len()] {
            bench.up.deliver(socket, peer, &data[..len], None);
            bench.run();
            assert_eq!(bench.out.frames.len() == 1, len == fitting);
            let whole = reassembled(&mut bench.out);
            assert_eq!(whole.len(), 1);
            let frame = seen(&whole[0]);
            assert_eq!((frame.from, &frame.payload[..]), (peer, &data[..len]));
        }
        // Each datagram of a train is one of its own: three fragments, and the short end whole.
        bench.up.deliver(socket, peer, &data[..9000], Some(4000));
        bench.run();
        assert_eq!(bench.out.frames.len(), 7);
        let whole = reassembled(&mut bench.out);
        let lens: Vec<_> = whole
            .iter()
            .map(|frame| seen(frame).payload.len())
            .collect();
        assert_eq!(lens, [4000, 4000, 1000]);
        bench
            .up
            .deliver_ttl(socket, peer, b"end of the way", None, 1);
        bench.run();
        assert_eq!(bench.drops, [DropReason::TtlExceeded]);
    }
}

#[test]
fn ttl_ends_at_the_gateway() {
    let mut bench = Bench::new(LIMITS);
    let source = SocketAddr::new(GUEST.into(), GUEST_PORT);
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
    let zero = SocketAddr::new(PEER.ip(), 0);
    assert_eq!(bench.send(0, PEER, b"x"), Err(DropReason::Malformed));
    assert_eq!(bench.send(1, zero, b"x"), Err(DropReason::Malformed));
    assert_eq!(bench.up.open_count(), 0);
}

#[test]
fn the_hosts_own_addresses_are_forbidden_unless_allowed() {
    let mut bench = Bench::new(LIMITS);
    bench.up.host_addresses.insert(PEER.ip());
    bench.send(GUEST_PORT, DNS, b"x").unwrap();
    for port in [GUEST_PORT, 6000] {
        let dropped = bench.send(port, PEER, b"x");
        assert_eq!(dropped, Err(DropReason::ForbiddenDestination));
    }
    assert_eq!((bench.nat.len(), bench.up.sent.len()), (1, 1));
    bench.egress = Egress::new(
        lan(),
        HostAccess {
            own_addresses: true,
            ..HostAccess::default()
        },
    );
    bench.send(GUEST_PORT, PEER, b"x").unwrap();
    assert_eq!(bench.up.sent.len(), 2);
}

#[test]
fn failed_sends_are_counted_and_told_to_the_guest() {
    let mut bench = Bench::new(LIMITS);
    bench.send(GUEST_PORT, PEER, b"x").unwrap();
    let socket = bench.socket(0);
    // What a pending error tells is an earlier datagram's fate.
    for earlier in [
        HostError::Refused,
        HostError::HostUnreachable,
        HostError::TooBig,
    ] {
        bench.up.fail_send(socket, earlier);
        bench.send(GUEST_PORT, PEER, b"again").unwrap();
        assert_eq!(bench.up.sent.back().unwrap().payload, b"again");
    }
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
        if error != HostError::Exhausted {
            bench.up.fail_send(socket, error);
        }
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
    assert_eq!(
        (counters.mappings.opened, counters.mappings.expired),
        (6, 6)
    );
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
    assert_eq!(bench.nat.counters().mappings.opened, 1);
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
        per_port: usize::MAX,
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
    assert_eq!(bench.nat.counters().mappings.evicted, 1);
    // The event of the evicted mapping finds nothing.
    let stale = bench.up.closed[0].owner;
    let SockOwner::Udp(id) = stale else { panic!() };
    let (nat, up) = (&mut bench.nat, &mut bench.up);
    nat.handle_ready(
        id,
        Ready::default(),
        &bench.egress,
        bench.now,
        (up, &mut bench.out, &mut bench.errors),
        &mut |_| panic!("nothing is there"),
    );
}

#[test]
fn a_host_without_files_left_costs_an_idle_mapping() {
    let mut bench = Bench::new(LIMITS);
    bench.up.open_max = 2;
    bench.send(1001, PEER, b"x").unwrap();
    bench.send(1002, DNS, b"x").unwrap();
    assert_eq!(bench.send(1003, PEER, b"x"), Err(DropReason::OutOfFiles));
    let give_up = |bench: &mut Bench| {
        let port = PortId(1);
        bench.nat.give_up(port, false, bench.now, &mut bench.up)
    };
    assert!(!give_up(&mut bench), "both are in use");
    bench.up.deliver(bench.socket(1), DNS, b"done", None);
    bench.run();
    assert!(give_up(&mut bench));
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
    let frame = guest_udp(SocketAddr::new(GUEST.into(), 5002), PEER, 64, b"x");
    let mut packet = parse(&frame, Offload::default());
    let home = packet.ingress;
    packet.ingress = PortId(home.0 + 1);
    let (ip, udp) = packet.udp4().expect("UDP");
    let (nat, up) = (&mut bench.nat, &mut bench.up);
    let answers = (&mut bench.out, &mut bench.errors);
    nat.handle_packet(
        &packet,
        (&ip.any(), udp),
        &mut bench.egress,
        bench.now,
        up,
        answers,
    )
    .unwrap();
    bench.nat.forget_port(home, &mut bench.up);
    assert_eq!((bench.nat.len(), bench.up.open_count()), (1, 1));
    bench.nat.forget_port(packet.ingress, &mut bench.up);
    assert_eq!((bench.nat.len(), bench.up.open_count()), (0, 0));
    assert_eq!(bench.nat.counters().mappings.expired, 0);
}

#[test]
fn replies_follow_the_guest_to_its_new_mac() {
    let mut bench = Bench::new(LIMITS);
    bench.send(GUEST_PORT, PEER, b"x").unwrap();
    let source = SocketAddr::new(GUEST.into(), GUEST_PORT);
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
    Report {
        socket: usize,
        peer: u8,
        kind: (u8, u8),
        local: bool,
        len: usize,
    },
    Wait {
        millis: u64,
    },
}

fn op() -> impl Strategy<Value = Op> {
    let segment = || prop::option::of(0u16..3000);
    prop_oneof![
        6 => (2u8..6, 0u16..5, 0u8..10, any::<u8>(), 0usize..4000, segment()).prop_map(
            |(host, port, peer, ttl, len, segment)| Op::FromGuest { host, port, peer, ttl, len, segment }
        ),
        6 => (0usize..12, 0u8..10, any::<u8>(), 0usize..65_508, segment()).prop_map(
            |(socket, peer, ttl, len, segment)| Op::ToGuest { socket, peer, ttl, len, segment }
        ),
        1 => (0usize..12).prop_map(|socket| Op::FailSend { socket }),
        2 => (0usize..12, 0u8..10, (0u8..14, 0u8..16), any::<bool>(), 0usize..1281).prop_map(
            |(socket, peer, kind, local, len)| Op::Report { socket, peer, kind, local, len }
        ),
        2 => (0u64..100_000).prop_map(|millis| Op::Wait { millis }),
    ]
}

fn peer(n: u8) -> SocketAddr {
    let port = if n.is_multiple_of(2) { 53 } else { 7000 };
    let address: IpAddr = match n {
        0..6 => Ipv4Addr::new(203, 0, 113, n / 2).into(),
        _ => Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, (n / 2).into()).into(),
    };
    SocketAddr::new(address, port)
}

/// Guest number `host` in the family of `peer`.
fn guest_of(host: u8, peer: SocketAddr, port: u16) -> SocketAddr {
    let address: IpAddr = match peer {
        SocketAddr::V4(_) => Ipv4Addr::new(192, 168, 122, host).into(),
        SocketAddr::V6(_) => {
            Ipv6Addr::from_bits(GUEST6.to_bits() & !0xff | u128::from(host)).into()
        }
    };
    SocketAddr::new(address, port)
}

fn dependence() -> impl Strategy<Value = Dependence> {
    prop_oneof![
        Just(Dependence::EndpointIndependent),
        Just(Dependence::AddressDependent),
        Just(Dependence::AddressAndPortDependent),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]
    #[test]
    fn whatever_happens_the_books_balance(
        ops in prop::collection::vec(op(), 1..120),
        mapping in dependence(),
        filtering in dependence(),
    ) {
        let limits = Limits { total: 10, per_guest: 4, per_port: usize::MAX };
        let mut bench = Bench::new(limits);
        bench.nat.set_behaviour(UdpBehaviour { mapping, filtering });
        // Guest endpoint and peer of every datagram that went out.
        let mut wrote: BTreeSet<(SocketAddr, SocketAddr)> = BTreeSet::new();
        for op in ops {
            match op {
                Op::FromGuest { host, port, peer: to, ttl, len, segment } => {
                    let to = peer(to);
                    let source = guest_of(host, to, port);
                    let payload = vec![1; len];
                    let offload = Offload { gso: segment.map_or(Gso::None, Gso::Udp), ..Offload::default() };
                    let before = bench.up.send_calls;
                    let result = bench.frame(&guest_udp(source, to, ttl, &payload), offload);
                    // A send that fails was still meant.
                    if bench.up.send_calls > before {
                        wrote.insert((source, to));
                    }
                    if result.is_ok() {
                        let sent = bench.up.sent.pop_back().unwrap();
                        prop_assert_eq!((sent.to, sent.ttl), (to, ttl - 1));
                        prop_assert_eq!(sent.payload, payload);
                    }
                }
                Op::ToGuest { socket, peer: from, ttl, len, segment } => {
                    if let Some(&(socket, _)) = bench.up.open_sockets().get(socket) {
                        bench.up.deliver_ttl(socket, peer(from), &vec![from; len], segment, ttl);
                        let before = bench.drops.len();
                        bench.run();
                        prop_assert!(!bench.out.frames.is_empty() || bench.drops.len() > before);
                    }
                }
                Op::FailSend { socket } => {
                    if let Some(&(socket, _)) = bench.up.open_sockets().get(socket) {
                        bench.up.fail_send(socket, HostError::Other(5));
                    }
                }
                Op::Report { socket, peer: to, kind, local, len } => {
                    if let Some(&(socket, _)) = bench.up.open_sockets().get(socket) {
                        bench.up.report(socket, Reported {
                            to: peer(to),
                            offender: (!local).then_some(peer(to).ip()),
                            kind,
                            mtu: 1400,
                            error: HostError::HostUnreachable,
                            payload: vec![3; len],
                        });
                        bench.run();
                    }
                }
                Op::Wait { millis } => {
                    bench.now += Duration::from_millis(millis);
                    bench.nat.handle_timeout(bench.now, &mut bench.up);
                }
            }
            while let Some(frame) = bench.out.pop() {
                let packet = parse(&frame.0, frame.1);
                let ip = packet.ip().unwrap();
                let longest = match (frame.1.gso, ip.transport) {
                    (Gso::Udp(size), _) => usize::from(size) + ip.header_len + 8,
                    _ => ip.packet.len(),
                };
                prop_assert!(longest <= 1500);
                if let Transport::Udp(udp) = ip.transport {
                    let to = SocketAddr::new(ip.destination, udp.destination_port);
                    let from = SocketAddr::new(ip.source, udp.source_port);
                    let known = wrote.iter().any(|&(guest, peer)| guest == to && match filtering {
                        Dependence::EndpointIndependent => true,
                        Dependence::AddressDependent => peer.ip() == from.ip(),
                        Dependence::AddressAndPortDependent => peer == from,
                    });
                    prop_assert!(known, "{from} to {to}");
                }
                if let Transport::Icmp(message) = ip.transport {
                    // Quotes a datagram that this guest may have sent.
                    let quoted = parse_quote(message);
                    prop_assert_eq!(quoted.source, ip.destination);
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
