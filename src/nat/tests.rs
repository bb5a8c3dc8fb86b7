//! What concerns several protocols, or the way to them.

use std::net::Ipv4Addr;

use super::policy::answer::writer;
use super::testing::*;
use super::*;
use crate::frame::{ETH_HEADER_LEN, Station};
use crate::offload::Offload;
use crate::wire::{PROTO_TCP, Tcp};

const NOW: Instant = Instant::ZERO;

struct Lab {
    nat: Nat,
    up: FakeUplink,
    out: FrameLog,
}

impl Lab {
    fn new() -> Self {
        let config = NatConfig {
            lan: lan(),
            flows_max: 64,
            host: Default::default(),
            udp: Default::default(),
        };
        Self {
            nat: Nat::new(config, NOW),
            up: FakeUplink::new(1),
            out: FrameLog::default(),
        }
    }

    /// A frame of the guest behind `port`.
    fn send_from(&mut self, port: u16, frame: &[u8], now: Instant) -> Result<(), DropReason> {
        let mut packet = parse(frame, Offload::default());
        packet.ingress = PortId(port);
        let sent = self
            .nat
            .handle_packet(&packet, now, (&mut self.up, &mut self.out));
        while let Some((owner, ready)) = self.up.poll_event() {
            let to = (&mut self.up, &mut self.out);
            self.nat.handle_ready(owner, ready, now, to, &mut |_| {});
        }
        self.nat.flush(now, &mut self.up, &mut self.out);
        sent
    }

    /// The `n`-th connection of the guest behind `port`.
    fn connect(&mut self, port: u16, n: u16, now: Instant) -> Result<(), DropReason> {
        let from = SocketAddr::new(guest_behind(port).into(), 1000 + n);
        let to = "203.0.113.9:80".parse().unwrap();
        self.send_from(
            port,
            &guest_tcp(from, to, (1, 0), (Tcp::SYN, 1000), &[], b""),
            now,
        )
    }

    fn send(&mut self, frame: &[u8]) -> Result<(), DropReason> {
        let packet = parse(frame, Offload::default());
        self.nat
            .handle_packet(&packet, NOW, (&mut self.up, &mut self.out))
    }

    fn send_udp(&mut self, port: u16, to: &str) -> Result<(), DropReason> {
        let from = SocketAddr::new(GUEST.into(), port);
        self.send(&guest_udp(from, to.parse().unwrap(), 64, b"x"))
    }
}

fn guest_behind(port: u16) -> Ipv4Addr {
    Ipv4Addr::new(192, 168, 122, 10 + (port % 200) as u8)
}

/// What TCP segments went to a guest: their flags.
fn flags_to(out: &mut FrameLog, guest: Ipv4Addr) -> Vec<u8> {
    let mut flags = Vec::new();
    while let Some((frame, offload)) = out.pop() {
        let packet = parse(&frame, offload);
        let ip = packet.ip().expect("IP");
        if let Transport::Tcp(tcp) = &ip.transport
            && ip.destination == IpAddr::V4(guest)
        {
            flags.push(tcp.flags);
        }
    }
    flags
}

/// A segment to the gateway's port 81 behind an extension header.
fn segment_behind(extension: u8, option: [u8; 8], data: &[u8]) -> Vec<u8> {
    let gateway = lan().v6.unwrap().address;
    let (from, to) = (
        SocketAddr::new(GUEST6.into(), 4000),
        SocketAddr::new(gateway.into(), 81),
    );
    let tcp = guest_tcp(from, to, (1, 0), (Tcp::SYN, 1000), &[], data);
    let mut payload = option.to_vec();
    payload[0] = PROTO_TCP;
    payload.extend_from_slice(&tcp[ETH_HEADER_LEN + IPV6_HEADER_LEN..]);
    guest_ipv6(GUEST6, gateway, extension, 64, &payload)
}

#[test]
fn extension_headers_before_a_refused_segment_change_nothing() {
    const HOP_BY_HOP: u8 = 0;
    const DESTINATION: u8 = 60;
    for (extension, option) in [
        (DESTINATION, [0, 0, 1, 4, 0, 0, 0, 0]),
        (HOP_BY_HOP, [0, 0, 1, 4, 0, 0, 0, 0]),
        // An option that a router that does not know it would answer with a parameter problem.
        (HOP_BY_HOP, [0, 0, 0xc5, 4, 0, 0, 0, 0]),
    ] {
        for data in [&b""[..], b"xx"] {
            let mut lab = Lab::new();
            let refused = lab.send(&segment_behind(extension, option, data));
            assert_eq!(refused, Err(DropReason::Unclaimed));
            let (frame, offload) = lab.out.pop().expect("an answer");
            let answer = parse(&frame, offload);
            let ip = answer.ip().unwrap();
            let Transport::Tcp(tcp) = &ip.transport else {
                panic!("{ip:?}");
            };
            assert_ne!(tcp.flags & Tcp::RST, 0);
            assert_eq!(tcp.destination_port, 4000);
            assert!(lab.out.pop().is_none());
        }
    }
}

#[test]
fn an_address_that_the_host_gets_is_closed_to_who_wrote_there_before() {
    for notice in [Some("10.8.0.2".parse().unwrap()), None] {
        let mut lab = Lab::new();
        assert_eq!(lab.send_udp(5000, "10.8.0.2:161"), Ok(()));
        assert_eq!(lab.send_udp(5001, "10.8.0.2:161"), Ok(()));
        assert_eq!(lab.send_udp(5001, "10.8.0.3:161"), Ok(()));
        // The host's port 5001 is that guest's mapping: hairpinning stays possible.
        assert_eq!(lab.send_udp(5002, "10.8.0.2:5001"), Ok(()));
        let ping = guest_echo(GUEST, Ipv4Addr::new(10, 8, 0, 2), (1, 1), 64, b"");
        assert_eq!(lab.send(&ping), Ok(()));
        lab.up.host_addresses.insert("10.8.0.2".parse().unwrap());
        lab.nat.address_gained(notice, &mut lab.up);
        assert_eq!(lab.nat.flows(), (0, 2, 0));
        let closed = Err(DropReason::ForbiddenDestination);
        assert_eq!(lab.send_udp(5000, "10.8.0.2:161"), closed);
        assert_eq!(lab.send_udp(5001, "10.8.0.2:161"), closed);
        assert_eq!(lab.send_udp(5001, "10.8.0.3:161"), Ok(()));
        assert_eq!(lab.send_udp(5002, "10.8.0.2:5001"), Ok(()));
        assert_eq!(lab.send(&ping), closed);
    }
}

#[test]
fn a_forward_that_ends_takes_along_only_who_wrote_to_the_host() {
    let mut lab = Lab::new();
    lab.up
        .host_addresses
        .insert("198.51.100.1".parse().unwrap());
    let spec: ForwardSpec = "443:192.168.122.9:443/udp".parse().unwrap();
    let at: SocketAddr = "0.0.0.0:443".parse().unwrap();
    let open = |up: &mut FakeUplink, _, owner| Ok(Some(up.bind(at, owner)));
    lab.nat
        .add_forward(
            (ForwardId(1), &spec),
            &[ListenerKind::Udp(at)],
            &mut lab.up,
            open,
        )
        .unwrap();
    assert_eq!(lab.send_udp(5000, "198.51.100.7:443"), Ok(()));
    assert_eq!(lab.send_udp(5001, "198.51.100.1:443"), Ok(()));
    lab.nat.remove_forward(ForwardId(1), &mut lab.up);
    assert_eq!(lab.nat.flows(), (0, 1, 0));
    let closed = Err(DropReason::ForbiddenDestination);
    assert_eq!(lab.send_udp(5001, "198.51.100.1:443"), closed);
}

#[test]
fn a_port_at_its_limit_takes_nothing_from_others() {
    use mapping::{Class, Endpoint, Limits, MappingTable};
    let mut up = FakeUplink::new(1);
    let class = Class {
        timeout: Duration::from_secs(100),
        expendable: false,
    };
    let limits = Limits {
        total: 4,
        per_guest: 8,
        per_port: 3,
    };
    let mut table = MappingTable::<(), 1>::new([class], limits);
    let mut open = |port, host, secs| {
        let guest = SocketAddr::new(Ipv4Addr::new(192, 168, 122, host).into(), 1000);
        let station = Station {
            mac: GUEST_MAC,
            port: PortId(port),
        };
        let now = NOW + Duration::from_secs(secs);
        let key = Endpoint { guest, to: None };
        let opened = table.open(key, station, (0, ()), now, &mut up, |up, id| {
            up.udp_open(Family::V4, guest.port(), SockOwner::Udp(id))
        });
        (opened.map(|_| ()), table.counters().evicted)
    };
    assert_eq!(open(9, 90, 1), (Ok(()), 0));
    for host in 2..5 {
        assert_eq!(open(1, host, 2), (Ok(()), 0));
    }
    // Its own are in use, then one of them is not.
    assert_eq!(open(1, 9, 3), (Err(DropReason::Limit), 0));
    assert_eq!(open(1, 9, 20), (Ok(()), 1));
    // The port that has most gives way, in use or not.
    assert_eq!(open(9, 91, 21), (Ok(()), 2));
    // As many each: now it is the turn of its own idle one, then nobody's.
    assert_eq!(open(9, 92, 21), (Ok(()), 3));
    assert_eq!(open(9, 93, 21), (Err(DropReason::Limit), 3));
}

#[test]
fn no_name_opens_the_hosts_own_address() {
    for published in [true, false] {
        let mut lab = Lab::new();
        lab.nat
            .policy()
            .add_guest(PortId(1), "web".parse().unwrap(), None);
        let policy = "allow to *.example.test\ndefault deny";
        let policy = Some(Arc::new(policy.parse().unwrap()));
        lab.nat
            .set_policy(policy.clone(), NOW, (&mut lab.up, &mut lab.out));
        let host: SocketAddr = "198.51.100.1:8080".parse().unwrap();
        if published {
            lab.nat.egress.publish(egress::Published {
                id: 7,
                protocol: Protocol::Tcp,
                at: "0.0.0.0:8080".parse().unwrap(),
            });
        }
        let answer = writer::addresses("evil.example.test", &[], &[("198.51.100.1", 60)]);
        lab.nat.policy().pin(PortId(1), &answer, NOW);
        let from = SocketAddr::new(GUEST.into(), 4000);
        let syn = guest_tcp(from, host, (1, 0), (Tcp::SYN, 1000), &[], b"");
        // While it is someone else's, it is a name's like any other.
        assert_eq!(lab.send(&syn), Ok(()));
        lab.up.host_addresses.insert(host.ip());
        lab.nat.set_policy(policy, NOW, (&mut lab.up, &mut lab.out));
        assert_eq!(lab.nat.flows().0, 0, "the flow was reviewed");
        assert_eq!(lab.send(&syn), Err(DropReason::ForbiddenDestination));
    }
}

/// Two guests that hold every flow, and send a byte by each now and then.
#[test]
fn at_the_limit_whoever_has_most_gives_way_to_who_has_less() {
    let mut lab = Lab::new();
    for (port, flows) in [(1, 40), (2, 24)] {
        for n in 0..flows {
            assert_eq!(lab.connect(port, n, NOW), Ok(()));
        }
    }
    assert_eq!(lab.nat.flows().0, 64);
    // A minute later all are fresh.
    let now = NOW + Duration::from_secs(60);
    for (port, flows) in [(1, 40), (2, 24)] {
        for n in (0..flows).rev() {
            let from = SocketAddr::new(guest_behind(port).into(), 1000 + n);
            let to = "203.0.113.9:80".parse().unwrap();
            let byte = guest_tcp(from, to, (2, 1), (Tcp::ACK, 1000), &[], b"x");
            lab.send_from(port, &byte, now).unwrap();
        }
    }
    lab.out.frames.clear();
    // Who has most is refused without a word, so that its SYN comes again; the others get in.
    assert_eq!(lab.connect(1, 99, now), Err(DropReason::Limit));
    assert_eq!(lab.out.frames.len(), 0);
    for (n, port) in (3..20).enumerate() {
        assert_eq!(lab.connect(port, 0, now), Ok(()), "newcomer {n}");
    }
    let of = |lab: &Lab, port: u16| lab.nat.tcp.held().of(PortId(port).into());
    assert_eq!((of(&lab, 1), of(&lab, 2)), (24, 23));
    assert_eq!(lab.nat.flows().0, 64);
    // The longest idle of it went, with RST on both sides.
    let reset = flags_to(&mut lab.out, guest_behind(1));
    assert_eq!(reset.len(), 16);
    assert!(reset.iter().all(|flags| flags & Tcp::RST != 0));
    assert!(lab.up.closed.iter().all(|closed| closed.aborted));
    let from = SocketAddr::new(guest_behind(1).into(), 1000);
    let to = "203.0.113.9:80".parse().unwrap();
    assert!(lab.nat.tcp.has_flow(from, to), "it was used last");
    // Shares that are equal stay so.
    while of(&lab, 1) > 23 {
        assert_eq!(lab.connect(20, of(&lab, 20) as u16, now), Ok(()));
    }
    assert_eq!(lab.connect(2, 99, now), Err(DropReason::Limit));
    // What idles for long goes for another one of the same.
    let later = now + tcp::EVICTABLE_IDLE;
    assert_eq!(lab.connect(2, 99, later), Ok(()));
    assert_eq!((of(&lab, 1), of(&lab, 2)), (23, 23));
}

/// Connects that hang are bounded, too.
#[test]
fn connects_that_hang_lock_nobody_out() {
    let mut lab = Lab::new();
    let config = NatConfig {
        lan: lan(),
        flows_max: 16_384,
        host: Default::default(),
        udp: Default::default(),
    };
    lab.nat = Nat::new(config, NOW);
    lab.up.connect_default = Connect::Wait;
    for port in 1..3 {
        for n in 0..tcp::PORT_CONNECTING_MAX as u16 {
            assert_eq!(lab.connect(port, n, NOW), Ok(()));
        }
        assert_eq!(lab.connect(port, 9_999, NOW), Err(DropReason::Limit));
    }
    assert_eq!(lab.nat.flows().0, tcp::CONNECTING_MAX);
    assert_eq!(lab.connect(3, 0, NOW), Ok(()));
    assert_eq!(lab.connect(3, 1, NOW), Ok(()));
    assert_eq!(lab.nat.flows().0, tcp::CONNECTING_MAX);
    // Who gave way is not told that nobody listens: the SYN comes again.
    assert_eq!(lab.nat.tcp.counters().evicted, 2);
    assert!(lab.out.frames.is_empty());
}

#[test]
fn out_of_files_whoever_has_most_gives_way_whatever_the_protocol() {
    let mut lab = Lab::new();
    for n in 0..10 {
        assert_eq!(lab.connect(1, n, NOW), Ok(()));
    }
    let udp = |port: u16, n: u16| {
        let from = SocketAddr::new(guest_behind(port).into(), 5000 + n);
        guest_udp(from, "203.0.113.9:9".parse().unwrap(), 64, b"x")
    };
    assert_eq!(lab.send_from(2, &udp(2, 0), NOW), Ok(()));
    lab.up.open_max = 11;
    // In use or not, it is guest 1's that go: for UDP, echo and TCP alike.
    assert_eq!(lab.send_from(2, &udp(2, 1), NOW), Ok(()));
    let ping = guest_echo(
        guest_behind(2),
        Ipv4Addr::new(203, 0, 113, 9),
        (1, 1),
        64,
        b"",
    );
    assert_eq!(lab.send_from(2, &ping, NOW), Ok(()));
    assert_eq!(lab.connect(2, 0, NOW), Ok(()));
    assert_eq!(lab.nat.flows(), (8, 2, 1));
    // Who has most gets no more, and is not told that nobody listens.
    lab.out.frames.clear();
    assert_eq!(lab.connect(1, 20, NOW), Err(DropReason::OutOfFiles));
    assert!(lab.out.frames.is_empty());
    assert_eq!(lab.send_from(2, &udp(2, 2), NOW), Ok(()));
    assert_eq!(lab.nat.flows(), (7, 3, 1));
    // Mappings of a guest that has most go as well.
    let mut lab = Lab::new();
    for n in 0..10 {
        assert_eq!(lab.send_from(1, &udp(1, n), NOW), Ok(()));
    }
    lab.up.open_max = 10;
    assert_eq!(lab.connect(2, 0, NOW), Ok(()));
    assert_eq!(lab.nat.flows(), (1, 9, 0));
}

/// `N` workers of one network, and what they share.
fn workers<const N: usize>() -> ([Lab; N], Common) {
    let common = Common::new(&lan(), Arc::default());
    let labs = std::array::from_fn(|worker| {
        let mut lab = Lab::new();
        let config = NatConfig {
            lan: lan(),
            flows_max: 16,
            host: Default::default(),
            udp: Default::default(),
        };
        let common = common.for_worker(crate::frame::WorkerId(worker as u8));
        lab.nat = Nat::with(config, common, NOW);
        lab
    });
    (labs, common)
}

/// However many workers have flows of the guest with most, one of them gives a file.
#[test]
fn workers_give_one_file_for_each_that_is_lacking() {
    let ([mut one, mut two, mut asks], _) = workers();
    for n in 0..3 {
        assert_eq!(one.connect(1, n, NOW), Ok(()));
        assert_eq!(two.connect(1, 100 + n, NOW), Ok(()));
    }
    asks.up.open_max = 0;
    for left in [5, 4] {
        assert_eq!(asks.connect(2, 0, NOW), Err(DropReason::OutOfFiles));
        let request = asks.nat.poll_give_way().unwrap();
        for lab in [&mut one, &mut two] {
            lab.nat
                .handle_give_way(request, NOW, (&mut lab.up, &mut lab.out));
        }
        assert_eq!(one.nat.flows().0 + two.nat.flows().0, left);
    }
}

/// What one worker has not, it asks the others for.
#[test]
fn workers_make_room_for_each_other() {
    let (mut labs, common) = workers();
    let [one, two] = &mut labs;
    for n in 0..12 {
        assert_eq!(one.connect(1, n, NOW), Ok(()));
    }
    for port in 2..12 {
        assert_eq!(two.connect(port, 0, NOW), Ok(()), "at once");
    }
    assert_eq!(one.nat.flows().0 + two.nat.flows().0, 22);
    let request = two.nat.poll_give_way().unwrap();
    assert_eq!(two.nat.poll_give_way(), None, "one question");
    assert_eq!(request.holder, PortId(1).into());
    let io = (&mut one.up, &mut one.out);
    one.nat.handle_give_way(request, NOW, io);
    assert_eq!((one.nat.flows().0, two.nat.flows().0), (6, 10));
    // While nobody answers, the limit is passed by so much and no more.
    let mut refused = 0;
    for port in 100..400 {
        refused += usize::from(two.connect(port, port, NOW).is_err());
    }
    assert_eq!(common.flows.total(), 16 + tcp::OVERDRAFT);
    assert!(refused > 0);
}
