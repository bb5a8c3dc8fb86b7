//! What guests hear of their datagrams' fate.

use super::*;
use crate::nat::icmp::error::BURST;

const ROUTER: IpAddr = IpAddr::V4(Ipv4Addr::new(203, 0, 113, 1));
const ROUTER6: IpAddr = IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 9, 0, 0, 0, 0, 1));

/// An error of a router on the way to `to`.
pub fn reported(to: SocketAddr, kind: (u8, u8)) -> Reported {
    Reported {
        to,
        offender: Some(if to.is_ipv4() { ROUTER } else { ROUTER6 }),
        kind,
        mtu: 0,
        error: HostError::HostUnreachable,
        payload: b"probe".to_vec(),
    }
}

/// The next datagram is too long for the host's route; each attempt leaves an entry.
pub fn fail_with_mtu(bench: &mut Bench, to: SocketAddr, mtu: u32) {
    let socket = bench.socket(0);
    for _ in 0..2 {
        bench.up.fail_send(socket, HostError::TooBig);
        let local = Reported {
            offender: None,
            mtu,
            error: HostError::TooBig,
            payload: Vec::new(),
            ..reported(to, (0, 0))
        };
        bench.up.report(socket, local);
    }
}

fn icmp((bytes, offload): &(Vec<u8>, Offload)) -> (IpAddr, IpAddr, Vec<u8>) {
    let packet = parse(bytes, *offload);
    assert_eq!(
        (packet.source, packet.destination),
        (GATEWAY_MAC, GUEST_MAC)
    );
    let ip = packet.ip().expect("IP");
    let Transport::Icmp(message) = ip.transport else {
        panic!("not ICMP")
    };
    (ip.source, ip.destination, message.to_vec())
}

pub fn mtu_of(frame: &(Vec<u8>, Offload)) -> u32 {
    let (_, _, message) = icmp(frame);
    u32::from_be_bytes(message[4..8].try_into().unwrap())
}

#[test]
fn a_routers_error_reaches_the_guest_as_if_there_were_no_nat() {
    let cases = [
        (PEER, ROUTER, (11, 0), 0, 0),
        (PEER, ROUTER, (3, 0), 0, 0),
        (PEER, ROUTER, (3, 1), 0, 0),
        (PEER, ROUTER, (3, 3), 0, 0),
        (PEER, ROUTER, (3, 13), 0, 0),
        (PEER, ROUTER, (3, 4), 1400, 1400),
        (PEER, ROUTER, (3, 1), 99, 0),
        (PEER6, ROUTER6, (3, 0), 0, 0),
        (PEER6, ROUTER6, (1, 0), 0, 0),
        (PEER6, ROUTER6, (1, 1), 0, 0),
        (PEER6, ROUTER6, (1, 3), 0, 0),
        (PEER6, ROUTER6, (1, 4), 0, 0),
        (PEER6, ROUTER6, (2, 0), 1280, 1280),
    ];
    for (peer, router, kind, mtu, rest) in cases {
        let mut bench = Bench::new(LIMITS);
        bench.up.busy_ports.insert(GUEST_PORT);
        bench.send(GUEST_PORT, peer, b"probe").unwrap();
        let probe = guest_udp(guest_for(peer, GUEST_PORT), peer, 1, b"probe");
        let error = Reported {
            mtu,
            ..reported(peer, kind)
        };
        bench.up.report(bench.socket(0), error);
        bench.run();
        let frame = bench.out.pop().unwrap();
        let (from, to, message) = icmp(&frame);
        assert_eq!((from, to), (router, guest_for(peer, 0).ip()));
        assert_eq!((message[0], message[1]), kind);
        assert_eq!(mtu_of(&frame), rest);
        let quoted = parse_quote(&message);
        assert_eq!((quoted.source, quoted.destination), (to, peer.ip()));
        assert_eq!(quoted.protocol, PROTO_UDP);
        // UDP header and payload are as the guest wrote them, checksum included.
        let headers_len = if peer.is_ipv4() { 34 } else { 54 };
        assert_eq!(quoted.transport, probe[headers_len..]);
        let time_exceeded = kind == if peer.is_ipv4() { (11, 0) } else { (3, 0) };
        assert_eq!(quoted.ttl == 1, time_exceeded);
        assert!(bench.drops.is_empty());
        assert_eq!(bench.errors.counters().0, 1);
    }
}

#[test]
fn a_long_quote_is_cut_to_what_an_error_may_have() {
    for (peer, longest, kind) in [(PEER, 576, (3, 1)), (PEER6, 1280, (1, 3))] {
        for len in [0, 500, 1280] {
            let mut bench = Bench::new(LIMITS);
            bench.send(GUEST_PORT, peer, b"x").unwrap();
            let error = Reported {
                payload: vec![9; len],
                ..reported(peer, kind)
            };
            bench.up.report(bench.socket(0), error);
            bench.run();
            let (bytes, _) = bench.out.pop().unwrap();
            let headers_len = if peer.is_ipv4() { 20 } else { 40 };
            let whole = headers_len + 8 + headers_len + 8 + len;
            assert_eq!(bytes.len() - ETH_HEADER_LEN, whole.min(longest));
        }
    }
}

#[test]
fn errors_about_strangers_and_of_other_types_are_dropped() {
    for (peer, types) in [(PEER, [0u8, 4, 5, 8, 12]), (PEER6, [0u8, 4, 128, 135, 137])] {
        let mut bench = Bench::new(LIMITS);
        bench.send(GUEST_PORT, peer, b"x").unwrap();
        let socket = bench.socket(0);
        let unreachable = if peer.is_ipv4() { (3, 3) } else { (1, 4) };
        for to in [
            SocketAddr::new(peer.ip(), 1),
            DNS,
            SocketAddr::new(ROUTER6, 9),
        ] {
            bench.up.report(socket, reported(to, unreachable));
        }
        for of_type in types {
            bench.up.report(socket, reported(peer, (of_type, 0)));
        }
        bench.run();
        assert_eq!(bench.out.count, 0);
        assert_eq!(bench.drops, vec![DropReason::Filtered; 8]);
    }
}

#[test]
fn the_gateway_stands_in_for_who_has_no_address() {
    for (peer, kind, offender) in [
        (PEER, (11, 0), "127.0.0.1"),
        (PEER, (11, 0), "224.0.0.1"),
        (PEER, (11, 0), "2001:db8::9"),
        (PEER6, (3, 0), "fe80::1"),
        (PEER6, (3, 0), "::1"),
        (PEER6, (3, 0), "10.0.0.1"),
    ] {
        let mut bench = Bench::new(LIMITS);
        bench.send(GUEST_PORT, peer, b"x").unwrap();
        let error = Reported {
            offender: Some(offender.parse().unwrap()),
            ..reported(peer, kind)
        };
        bench.up.report(bench.socket(0), error);
        bench.run();
        let (from, ..) = icmp(&bench.out.pop().unwrap());
        let expected: IpAddr = match peer {
            SocketAddr::V4(_) => lan().address.into(),
            SocketAddr::V6(_) => lan().v6.unwrap().address.into(),
        };
        assert_eq!(from, expected, "{offender}");
    }
}

#[test]
fn what_the_host_itself_says_comes_from_the_gateway() {
    let cases = [
        (PEER, HostError::Refused, Some((3, 3))),
        (PEER, HostError::HostUnreachable, Some((3, 1))),
        (PEER, HostError::NetUnreachable, Some((3, 0))),
        (PEER, HostError::Prohibited, Some((3, 13))),
        (PEER, HostError::TooBig, None),
        (PEER, HostError::Other(71), None),
        (PEER6, HostError::Refused, Some((1, 4))),
        (PEER6, HostError::HostUnreachable, Some((1, 3))),
        (PEER6, HostError::NetUnreachable, Some((1, 0))),
        (PEER6, HostError::Prohibited, Some((1, 1))),
    ];
    for (peer, error, expected) in cases {
        let mut bench = Bench::new(LIMITS);
        bench.send(GUEST_PORT, peer, b"x").unwrap();
        let local = Reported {
            offender: None,
            error,
            ..reported(peer, (0, 0))
        };
        bench.up.report(bench.socket(0), local);
        bench.run();
        assert_eq!(
            bench.out.pop().as_ref().map(icmp_error),
            expected,
            "{error:?}"
        );
    }
}

#[test]
fn a_datagram_too_long_for_the_route_says_how_long_it_may_be() {
    for (peer, kind) in [(PEER, (3, 4)), (PEER6, (2, 0))] {
        let mut bench = Bench::new(LIMITS);
        bench.send(GUEST_PORT, peer, b"x").unwrap();
        // What else waits in the queue is not lost.
        bench.up.report(
            bench.socket(0),
            reported(peer, if peer.is_ipv4() { (11, 0) } else { (3, 0) }),
        );
        fail_with_mtu(&mut bench, peer, 1400);
        let dropped = bench.send(GUEST_PORT, peer, &[7; 1450]);
        assert_eq!(dropped, Err(DropReason::TooBig));
        bench.out.pop().unwrap();
        let frame = bench.out.pop().unwrap();
        assert_eq!((icmp_error(&frame), mtu_of(&frame)), (kind, 1400));
        // It quotes the datagram.
        let (_, _, message) = icmp(&frame);
        let quoted = parse_quote(&message);
        assert_eq!(be16(&quoted.transport, 0), GUEST_PORT);
        assert_eq!(quoted.transport[8], 7);
        // The socket is as good as before.
        bench.send(GUEST_PORT, peer, b"y").unwrap();
    }
    // Without an MTU there is nothing to say.
    let mut bench = Bench::new(LIMITS);
    bench.send(GUEST_PORT, PEER, b"x").unwrap();
    fail_with_mtu(&mut bench, PEER, 0);
    assert_eq!(bench.send(GUEST_PORT, PEER, b"x"), Err(DropReason::TooBig));
    assert_eq!(bench.out.count, 0);
}

#[test]
fn errors_are_limited_as_all_icmp_is() {
    let mut bench = Bench::new(LIMITS);
    bench.send(GUEST_PORT, PEER, b"x").unwrap();
    let burst = u64::from(BURST);
    for _ in 0..burst + 150 {
        bench.up.report(bench.socket(0), reported(PEER, (11, 0)));
    }
    bench.run();
    let (sent, held_back) = bench.errors.counters();
    assert_eq!((sent, held_back), (burst, 150));
    assert_eq!(bench.out.count, burst);
}

/// The host's loopback has another address to guests, in answers and in errors alike.
#[test]
fn a_mapped_address_is_what_the_guest_sees() {
    let shown: SocketAddr = "10.0.2.2:9".parse().unwrap();
    let real: SocketAddr = "127.0.0.1:9".parse().unwrap();
    for mapping in [
        Dependence::EndpointIndependent,
        Dependence::AddressAndPortDependent,
    ] {
        let mut bench = Bench::behaving(mapping, Dependence::EndpointIndependent);
        let host = HostAccess {
            loopback: vec![shown.ip()],
            ..HostAccess::default()
        };
        bench.egress = Egress::new(lan(), host);
        for _ in 0..2 {
            bench.send(GUEST_PORT, shown, b"probe").unwrap();
            assert_eq!(bench.up.sent.pop_back().unwrap().to, real);
        }
        assert_eq!(bench.nat.len(), 1);
        let socket = bench.socket(0);
        bench.up.deliver(socket, real, b"x", None);
        bench.run();
        assert_eq!(seen(&bench.out.pop().unwrap()).from, shown);
        let error = Reported {
            offender: Some(real.ip()),
            ..reported(real, (3, 3))
        };
        bench.up.report(socket, error);
        bench.run();
        let (from, _, message) = icmp(&bench.out.pop().unwrap());
        assert_eq!(from, shown.ip());
        assert_eq!(parse_quote(&message).destination, shown.ip());
    }
}
