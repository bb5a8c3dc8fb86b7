//! What concerns several protocols, or the way to them.

use std::net::Ipv4Addr;

use super::policy::answer::writer;
use super::testing::*;
use super::*;
use crate::frame::{ETH_HEADER_LEN, Station};
use crate::offload::Offload;
use crate::wire::PROTO_TCP;

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
    assert_eq!(open(1, 9, 20), (Err(DropReason::Limit), 0));
    assert_eq!(open(9, 91, 20), (Ok(()), 1));
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
