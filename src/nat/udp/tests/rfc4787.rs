//! RFC 4787, requirement by requirement. REQ-2 (address pooling) and REQ-7 (address conflicts) are not
//! this module's: the host chooses the address, the network its subnet.

use super::*;
use Dependence::{AddressAndPortDependent, AddressDependent, EndpointIndependent};

const KINDS: [Dependence; 3] = [
    EndpointIndependent,
    AddressDependent,
    AddressAndPortDependent,
];
const ELSEWHERE: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(203, 0, 113, 9)), 7000);

/// The sockets that datagrams to two ports of an address and to another address leave by.
fn sockets(mapping: Dependence) -> [SockId; 3] {
    let mut bench = Bench::behaving(mapping, AddressDependent);
    [PEER, OTHER, ELSEWHERE].map(|to| {
        bench.send(GUEST_PORT, to, b"x").unwrap();
        bench.up.sent.pop_back().unwrap().socket
    })
}

#[test]
fn rfc4787_req1_endpoint_independent_mapping_is_the_default() {
    assert_eq!(UdpBehaviour::default().mapping, EndpointIndependent);
    let [peer, other, elsewhere] = sockets(EndpointIndependent);
    assert_eq!((peer, peer), (other, elsewhere));
}

#[test]
fn rfc4787_4_1_the_other_kinds_of_mapping() {
    let [peer, other, elsewhere] = sockets(AddressDependent);
    assert_eq!(peer, other);
    assert_ne!(peer, elsewhere);
    let all = sockets(AddressAndPortDependent);
    assert_eq!(all.into_iter().collect::<BTreeSet<_>>().len(), 3);
}

/// One mapping per destination: what comes back by each belongs to it alone.
#[test]
fn rfc4787_4_1_mappings_by_destination_have_their_own_peers() {
    for filtering in [AddressDependent, AddressAndPortDependent] {
        let mut bench = Bench::behaving(AddressAndPortDependent, filtering);
        for to in [PEER, ELSEWHERE] {
            bench.send(GUEST_PORT, to, b"x").unwrap();
        }
        bench.up.deliver(bench.socket(0), ELSEWHERE, b"x", None);
        bench.run();
        assert_eq!(bench.drops, [DropReason::Filtered]);
        bench.up.deliver(bench.socket(1), ELSEWHERE, b"x", None);
        bench.run();
        assert_eq!(seen(&bench.out.pop().unwrap()).from, ELSEWHERE);
    }
}

#[test]
fn rfc4787_req3_no_two_guests_share_an_outside_port() {
    for peer in [PEER, PEER6] {
        let mut bench = Bench::new(LIMITS);
        let mut ports = BTreeSet::new();
        for host in 2..9 {
            let frame = guest_udp(guest_of(host, peer, GUEST_PORT), peer, 64, b"x");
            bench.frame(&frame, Offload::default()).unwrap();
            let sent = bench.up.sent.pop_back().unwrap();
            assert!(ports.insert(bench.up.local_port(sent.socket)));
        }
        assert!(ports.contains(&GUEST_PORT), "preserved where free");
    }
}

/// REQ-3 a is a recommendation for ports below 1024, which an ordinary user can't bind.
#[test]
fn rfc4787_req3a_high_ports_stay_high() {
    let mut bench = Bench::new(LIMITS);
    bench.up.busy_ports = BTreeSet::from([5000]);
    bench.send(5000, PEER, b"x").unwrap();
    assert!(bench.up.local_port(bench.socket(0)) >= 1024);
}

#[test]
fn rfc4787_req4_port_parity_is_preserved() {
    for port in [5000, 5001] {
        for busy in [40_000u16, 40_001] {
            let mut bench = Bench::new(LIMITS);
            bench.up.busy_ports = BTreeSet::from([port, busy]);
            bench.send(port, PEER, b"x").unwrap();
            assert_eq!(bench.up.local_port(bench.socket(0)) % 2, port % 2);
            assert_eq!(bench.up.open_count(), 1);
        }
    }
}

#[test]
fn rfc4787_req5_no_mapping_expires_within_two_minutes() {
    for kind in KINDS {
        let mut bench = Bench::behaving(kind, kind);
        bench.send(GUEST_PORT, PEER, b"x").unwrap();
        bench.wait(120);
        assert_eq!(bench.nat.len(), 1);
        bench.up.deliver(bench.socket(0), PEER, b"x", None);
        bench.run();
        bench.wait(300);
        assert_eq!(
            bench.nat.len(),
            1,
            "five minutes once it was answered (REQ-5 c)"
        );
        bench.wait(1);
        assert!(bench.nat.is_empty());
    }
}

/// REQ-5 a: well-known destination ports may have less.
#[test]
fn rfc4787_req5a_only_dns_is_shorter() {
    let mut bench = Bench::new(LIMITS);
    for port in [1u16, 52, 54, 123, 443, 1023] {
        bench
            .send(port + 1024, SocketAddr::new(PEER_ADDRESS, port), b"x")
            .unwrap();
    }
    bench.send(999, DNS, b"x").unwrap();
    bench.wait(119);
    assert_eq!(bench.nat.len(), 6);
}

#[test]
fn rfc4787_req6_outbound_refreshes_and_so_does_inbound() {
    let mut bench = Bench::new(LIMITS);
    bench.send(GUEST_PORT, PEER, b"x").unwrap();
    for _ in 0..5 {
        bench.wait(110);
        bench.send(GUEST_PORT, PEER, b"x").unwrap();
    }
    for _ in 0..5 {
        bench.wait(110);
        bench.up.deliver(bench.socket(0), PEER, b"x", None);
        bench.run();
    }
    assert_eq!(bench.nat.counters().mappings.opened, 1);
}

/// Else anyone could keep a guest's mapping open for ever (RFC 4787 12).
#[test]
fn rfc4787_req6_a_stranger_refreshes_nothing() {
    for filtering in KINDS {
        let mut bench = Bench::behaving(EndpointIndependent, filtering);
        bench.send(GUEST_PORT, PEER, b"x").unwrap();
        bench.wait(119);
        bench.up.deliver(bench.socket(0), ELSEWHERE, b"x", None);
        bench.run();
        bench.wait(2);
        assert!(bench.nat.is_empty(), "{filtering:?}");
    }
}

#[test]
fn rfc4787_req8_filtering_is_address_dependent_unless_chosen_otherwise() {
    assert_eq!(UdpBehaviour::default().filtering, AddressDependent);
    for (filtering, passes) in [
        (EndpointIndependent, [true, true, true]),
        (AddressDependent, [true, true, false]),
        (AddressAndPortDependent, [true, false, false]),
    ] {
        for mapping in KINDS {
            let mut bench = Bench::behaving(mapping, filtering);
            bench.send(GUEST_PORT, PEER, b"x").unwrap();
            for (from, passes) in [PEER, OTHER, ELSEWHERE].into_iter().zip(passes) {
                bench.up.deliver(bench.socket(0), from, b"x", None);
                bench.run();
                let got = bench.out.pop().map(|frame| seen(&frame).from);
                assert_eq!(got, passes.then_some(from), "{mapping:?} {filtering:?}");
            }
            let refused = passes.iter().filter(|passes| !**passes).count();
            assert_eq!(bench.drops, vec![DropReason::Filtered; refused]);
        }
    }
}

/// Endpoint-independent filtering does not let in what no network outside carries.
#[test]
fn rfc4787_req8_martians_are_filtered_always() {
    for from in [
        "127.0.0.1:9",
        "0.0.0.0:9",
        "169.254.169.254:80",
        "192.168.122.9:9",
    ] {
        let mut bench = Bench::behaving(EndpointIndependent, EndpointIndependent);
        bench.send(GUEST_PORT, PEER, b"x").unwrap();
        let from = from.parse().unwrap();
        bench.up.deliver(bench.socket(0), from, b"x", None);
        bench.run();
        assert_eq!(bench.drops, [DropReason::Filtered], "{from}");
    }
    for from in ["[::1]:9", "[fe80::1]:9", "[fd00:6c61:6e:1::9]:9"] {
        let mut bench = Bench::behaving(EndpointIndependent, EndpointIndependent);
        bench.send(GUEST_PORT, PEER6, b"x").unwrap();
        bench
            .up
            .deliver(bench.socket(0), from.parse().unwrap(), b"x", None);
        bench.run();
        assert_eq!(bench.drops, [DropReason::Filtered], "{from}");
    }
}

/// What was sent last goes where it was sent to, as the host's kernel does it.
fn carry_back(bench: &mut Bench, host: IpAddr) {
    let sent = bench.up.sent.pop_back().unwrap();
    let from = SocketAddr::new(host, bench.up.local_port(sent.socket));
    let open = bench.up.open_sockets();
    let (to, _) = open
        .into_iter()
        .find(|(socket, _)| bench.up.local_port(*socket) == sent.to.port())
        .expect("a socket of ours has the port");
    bench.up.deliver(to, from, &sent.payload, None);
    bench.run();
}

#[test]
fn rfc4787_req9_hairpinning_shows_the_outside_endpoint() {
    let host: [IpAddr; 2] = [
        Ipv4Addr::new(192, 0, 2, 1).into(),
        Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 1).into(),
    ];
    for (host, peer) in host.into_iter().zip([PEER, PEER6]) {
        let mut bench = Bench::new(LIMITS);
        bench.up.host_addresses.insert(host);
        let (one, two) = (guest_of(2, peer, 5000), guest_of(3, peer, 6000));
        let outside = |port| SocketAddr::new(host, port);
        // Both have mappings; they learn of each other's outside endpoints somewhere.
        for guest in [one, two] {
            bench
                .frame(&guest_udp(guest, peer, 64, b"x"), Offload::default())
                .unwrap();
        }
        bench
            .frame(
                &guest_udp(one, outside(6000), 64, b"punch"),
                Offload::default(),
            )
            .unwrap();
        carry_back(&mut bench, host);
        assert_eq!(bench.drops, [DropReason::Filtered], "two did not write yet");
        bench
            .frame(
                &guest_udp(two, outside(5000), 64, b"hello"),
                Offload::default(),
            )
            .unwrap();
        carry_back(&mut bench, host);
        let got = seen(&bench.out.pop().unwrap());
        assert_eq!((got.from, got.to), (outside(6000), one));
        assert_eq!(got.payload, b"hello");
        bench
            .frame(
                &guest_udp(one, outside(6000), 64, b"back"),
                Offload::default(),
            )
            .unwrap();
        carry_back(&mut bench, host);
        assert_eq!(seen(&bench.out.pop().unwrap()).from, outside(5000));
        assert_eq!(bench.nat.counters().hairpinned, 3);
    }
}

/// A guest can't make itself a way to a service of the host by having had its port once.
#[test]
fn rfc4787_req9_hairpinning_ends_with_the_mapping() {
    let host = IpAddr::from([192, 0, 2, 1]);
    let mut bench = Bench::new(LIMITS);
    bench.up.host_addresses.insert(host);
    bench.send(6000, PEER, b"x").unwrap();
    bench.send(5000, SocketAddr::new(host, 6000), b"x").unwrap();
    let closed = bench.send(5000, SocketAddr::new(host, 7000), b"x");
    assert_eq!(closed, Err(DropReason::ForbiddenDestination));
    for _ in 0..2 {
        bench.wait(100);
        bench.send(5000, PEER, b"x").unwrap();
    }
    assert_eq!(bench.nat.len(), 1);
    let gone = bench.send(5000, SocketAddr::new(host, 6000), b"x");
    assert_eq!(gone, Err(DropReason::ForbiddenDestination));
}

/// REQ-10: no application gateways; a payload is never touched.
#[test]
fn rfc4787_req10_payloads_pass_as_they_are() {
    for port in [69, 5060, 5004, 1719] {
        let mut bench = Bench::new(LIMITS);
        let payload = b"Contact: <sip:192.168.122.2:5000>";
        bench
            .send(GUEST_PORT, SocketAddr::new(PEER_ADDRESS, port), payload)
            .unwrap();
        assert_eq!(bench.up.sent[0].payload, payload);
    }
}

#[test]
fn rfc4787_req11_the_behaviour_does_not_change_under_conflicts() {
    let mut bench = Bench::new(LIMITS);
    bench.up.busy_ports = BTreeSet::from([GUEST_PORT]);
    for to in [PEER, OTHER, ELSEWHERE] {
        bench.send(GUEST_PORT, to, b"x").unwrap();
    }
    assert_eq!(
        bench.nat.len(),
        1,
        "endpoint-independent without port preservation too"
    );
    bench.up.deliver(
        bench.socket(0),
        SocketAddr::new(ELSEWHERE.ip(), 1),
        b"x",
        None,
    );
    bench.run();
    assert_eq!(bench.out.count, 1);
}

#[test]
fn rfc4787_req12_icmp_ends_no_mapping() {
    let mut bench = Bench::new(LIMITS);
    bench.send(GUEST_PORT, PEER, b"x").unwrap();
    let socket = bench.socket(0);
    for kind in [(3, 0), (3, 1), (3, 3), (3, 13), (11, 0)] {
        bench.up.report(socket, errors::reported(PEER, kind));
        bench.run();
    }
    assert_eq!(bench.out.count, 5);
    bench.up.deliver(socket, PEER, b"alive", None);
    bench.run();
    assert_eq!(
        seen(&bench.out.frames.pop_back().unwrap()).payload,
        b"alive"
    );
    // Nor does it keep one.
    bench.wait(299);
    bench.up.report(socket, errors::reported(PEER, (3, 3)));
    bench.run();
    bench.wait(2);
    assert!(bench.nat.is_empty());
}

/// REQ-12 a: ICMP is not filtered by who sent it, as every router on the way may.
#[test]
fn rfc4787_req12a_icmp_of_any_router_passes() {
    let mut bench = Bench::behaving(EndpointIndependent, AddressAndPortDependent);
    bench.send(GUEST_PORT, PEER, b"x").unwrap();
    let mut error = errors::reported(PEER, (11, 0));
    error.offender = Some(Ipv4Addr::new(10, 9, 8, 7).into());
    bench.up.report(bench.socket(0), error);
    bench.run();
    let (bytes, offload) = bench.out.pop().unwrap();
    let ip = parse(&bytes, offload).ip().unwrap().source;
    assert_eq!(ip, IpAddr::from([10, 9, 8, 7]));
}

#[test]
fn rfc4787_req13_too_big_with_df_is_answered() {
    for (peer, expected) in [(PEER, (3, 4)), (PEER6, (2, 0))] {
        let mut bench = Bench::new(LIMITS);
        bench.send(GUEST_PORT, peer, b"x").unwrap();
        errors::fail_with_mtu(&mut bench, peer, 1280);
        assert_eq!(
            bench.send(GUEST_PORT, peer, &[7; 1300]),
            Err(DropReason::TooBig)
        );
        let frame = bench.out.pop().unwrap();
        assert_eq!(icmp_error(&frame), expected);
        assert_eq!(errors::mtu_of(&frame), 1280);
    }
}

/// REQ-14: fragments that arrive in any order. Those of guests are put together before the NAT
/// ([`crate::gateway::fragment`]), those from outside by the host; longer ones reach the guest in
/// fragments again.
#[test]
fn rfc4787_req14_fragments_pass_both_ways() {
    for peer in [PEER, PEER6] {
        let mut bench = Bench::new(LIMITS);
        let mut cut = FrameLog::default();
        let whole = guest_udp(guest_for(peer, GUEST_PORT), peer, 64, &[5; 4000]);
        cut.buffer()[..whole.len()].copy_from_slice(&whole);
        crate::gateway::fragment::cut(&mut cut, whole.len(), 1500, 7);
        let mut reassembler = Reassembler::new();
        bench.reassembled = true;
        for (bytes, offload) in cut.frames.iter().rev() {
            let packet = parse(bytes, *offload);
            if let Some(frame) = reassembler.handle(&packet, bench.now).unwrap() {
                let bytes = frame.bytes.to_vec();
                bench.frame(&bytes, Offload::default()).unwrap();
            }
        }
        let sent = bench.up.sent.pop_front().unwrap();
        assert_eq!((sent.payload.len(), sent.dont_fragment), (4000, false));
        bench.up.deliver(sent.socket, peer, &[6; 4000], None);
        bench.run();
        assert_eq!(reassembled(&mut bench.out).len(), 1);
    }
}
