//! The policy at work in a [`Nat`]: what it lets out, and what it ends.

use std::net::SocketAddr;
use std::sync::Arc;

use super::Policy;
use super::answer::writer;
use crate::frame::{Instant, PortId};
use crate::nat::egress::{HostAccess, Protocol};
use crate::nat::mapping::Dependence;
use crate::nat::testing::{
    Connect, FakeUplink, FrameLog, GUEST, guest_echo, guest_tcp, guest_udp, lan, parse,
};
use crate::nat::udp::UdpBehaviour;
use crate::nat::{Nat, NatConfig, SockOwner};
use crate::offload::Offload;
use crate::stats::DropReason;
use crate::wire::{Tcp, Transport};

const OURS: PortId = PortId(1);
const OTHER: PortId = PortId(2);

fn at(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

struct Bench {
    nat: Nat,
    up: FakeUplink,
    out: FrameLog,
    now: Instant,
}

impl Bench {
    fn new() -> Self {
        let now = Instant::from_secs(1000);
        let mut nat = Nat::new(
            NatConfig {
                lan: lan(),
                flows_max: 64,
                host: HostAccess {
                    loopback: vec![[10, 0, 2, 2].into()],
                    ..HostAccess::default()
                },
                udp: UdpBehaviour {
                    filtering: Dependence::EndpointIndependent,
                    ..UdpBehaviour::default()
                },
            },
            now,
        );
        nat.policy().add_guest(OURS, "ours".parse().unwrap(), None);
        nat.policy()
            .add_guest(OTHER, "other".parse().unwrap(), None);
        Self {
            nat,
            up: FakeUplink::new(1),
            out: FrameLog::default(),
            now,
        }
    }

    fn set(&mut self, text: &str) {
        let policy: Policy = text.parse().unwrap();
        let io = (&mut self.up, &mut self.out);
        self.nat.set_policy(Some(Arc::new(policy)), self.now, io);
    }

    fn frame(&mut self, port: PortId, frame: &[u8]) -> Result<(), DropReason> {
        let mut packet = parse(frame, Offload::default());
        packet.ingress = port;
        let io = (&mut self.up, &mut self.out);
        let handled = self.nat.handle_packet(&packet, self.now, io);
        self.nat.flush(self.now, &mut self.up, &mut self.out);
        handled
    }

    fn udp(&mut self, port: PortId, to: &str) -> Result<(), DropReason> {
        let from = SocketAddr::new(GUEST.into(), 5000);
        self.frame(port, &guest_udp(from, at(to), 64, b"hello"))
    }

    fn syn(&mut self, port: PortId, source: u16, to: &str) -> Result<(), DropReason> {
        let to = at(to);
        self.up.script_connect(to, Connect::Succeed);
        let from = SocketAddr::new(GUEST.into(), source);
        let handled = self.frame(
            port,
            &guest_tcp(from, to, (1, 0), (Tcp::SYN, 1000), &[], b""),
        );
        while let Some((owner, ready)) = self.up.poll_event() {
            let io = (&mut self.up, &mut self.out);
            self.nat
                .handle_ready(owner, ready, self.now, io, &mut |_| {});
        }
        self.nat.flush(self.now, &mut self.up, &mut self.out);
        handled
    }

    fn ping(&mut self, port: PortId, to: &str) -> Result<(), DropReason> {
        let to = to.parse().unwrap();
        self.frame(port, &guest_echo(GUEST, to, (7, 1), 64, b"hello"))
    }

    /// A datagram from outside at the guest's one mapping; why it does not get through.
    fn outside(&mut self, from: &str) -> Option<DropReason> {
        let (socket, owner) = self
            .up
            .open_sockets()
            .into_iter()
            .find(|(_, owner)| matches!(owner, SockOwner::Udp(_)))
            .unwrap();
        self.up.deliver(socket, at(from), b"hi", None);
        let mut dropped = None;
        while let Some((ready_owner, ready)) = self.up.poll_event() {
            assert_eq!(ready_owner, owner);
            let io = (&mut self.up, &mut self.out);
            self.nat
                .handle_ready(owner, ready, self.now, io, &mut |reason| {
                    dropped = Some(reason)
                });
        }
        dropped
    }

    /// What guests got since: R for RST, S for SYN-ACK, I for ICMP, U for UDP.
    fn got(&mut self) -> String {
        let mut got = String::new();
        while let Some((frame, offload)) = self.out.pop() {
            let packet = parse(&frame, offload);
            got.push(match packet.ip().unwrap().transport {
                Transport::Tcp(tcp) if tcp.flags & Tcp::RST != 0 => 'R',
                Transport::Tcp(tcp) if tcp.flags & Tcp::SYN != 0 => 'S',
                Transport::Icmp(_) => 'I',
                Transport::Udp(_) => 'U',
                _ => '?',
            });
        }
        got
    }

    fn counter(&self, name: &str) -> u64 {
        let mut counters = self.nat.counters();
        counters.find(|(this, _)| *this == name).unwrap().1
    }
}

const FORBIDDEN: Result<(), DropReason> = Err(DropReason::ForbiddenDestination);
const SILENT: Result<(), DropReason> = Err(DropReason::SilentlyDenied);

#[test]
fn refusals_are_answered_unless_they_are_silent() {
    let mut bench = Bench::new();
    bench.set("deny silent to 198.51.100.0/24\nallow to 203.0.113.1\ndefault deny");
    for to in ["198.51.100.9:80", "192.0.2.1:80", "203.0.113.1:80"] {
        let (expected, answer) = match to.as_bytes()[0..3] {
            [b'1', b'9', b'8'] => (SILENT, ""),
            [b'1', ..] => (FORBIDDEN, "I"),
            _ => (Ok(()), "S"),
        };
        assert_eq!(bench.syn(OURS, 4000, to), expected, "{to}");
        assert_eq!(bench.got(), answer, "{to}");
        let answer = answer.replace('S', "");
        assert_eq!(bench.udp(OURS, to), expected, "{to}");
        assert_eq!(bench.got(), answer, "{to}");
        assert_eq!(bench.ping(OURS, at(to).ip().to_string().as_str()), expected);
        assert_eq!(bench.got(), answer, "{to}");
    }
    assert_eq!(bench.nat.flows(), (1, 1, 1));
    let view = bench.nat.policy().view(bench.now).unwrap();
    let flows: Vec<u64> = view.rules.iter().map(|rule| rule.flows).collect();
    assert_eq!((flows, view.default_flows), (vec![3, 3], 3));
    assert_eq!(view.denied[0].guest.as_deref(), Some("ours"));
}

#[test]
fn what_a_changed_policy_denies_ends() {
    let mut bench = Bench::new();
    for (source, to) in [(4000, "198.51.100.1:80"), (4001, "203.0.113.1:80")] {
        assert_eq!(bench.syn(OURS, source, to), Ok(()));
        assert_eq!(bench.udp(OURS, to), Ok(()));
        assert_eq!(bench.ping(OURS, &at(to).ip().to_string()), Ok(()));
    }
    assert_eq!((bench.got().as_str(), bench.nat.flows()), ("SS", (2, 1, 1)));
    bench.set("allow to 203.0.113.0/24\ndefault deny");
    assert_eq!((bench.got().as_str(), bench.nat.flows()), ("R", (1, 1, 1)));
    assert_eq!(bench.counter("tcp_revoked"), 1);
    // Of the mappings a peer is left.
    assert_eq!(bench.udp(OURS, "203.0.113.1:80"), Ok(()));
    assert_eq!(bench.udp(OURS, "198.51.100.1:80"), FORBIDDEN);
    assert_eq!(bench.ping(OURS, "198.51.100.1"), FORBIDDEN);
    bench.got();
    bench.set("allow to 203.0.113.0/24 udp\ndefault deny");
    assert_eq!((bench.got().as_str(), bench.nat.flows()), ("R", (0, 1, 0)));
    bench.set("default deny silent");
    // Ended all the same: the guest has a connection to lose.
    assert_eq!((bench.got().as_str(), bench.nat.flows()), ("", (0, 0, 0)));
    assert_eq!(bench.up.open_count(), 0);
    let io = (&mut bench.up, &mut bench.out);
    bench.nat.set_policy(None, bench.now, io);
    assert_eq!(bench.udp(OURS, "198.51.100.1:80"), Ok(()));
}

#[test]
fn an_address_that_stands_for_loopback_is_judged_as_written() {
    let mut bench = Bench::new();
    bench.set("allow to 10.0.2.2 tcp,udp 53\nallow to 127.0.0.1\ndefault deny");
    assert_eq!(bench.udp(OURS, "10.0.2.2:53"), Ok(()));
    assert_eq!(bench.udp(OURS, "10.0.2.2:54"), FORBIDDEN);
    assert_eq!(bench.outside("127.0.0.1:53"), None);
    assert_eq!(bench.got(), "IU");
    bench.set("allow to 10.0.2.2 udp 53\ndefault deny");
    assert_eq!(bench.nat.flows(), (0, 1, 0), "it is the address written to");
    bench.set("allow to 127.0.0.1\ndefault deny");
    assert_eq!(bench.nat.flows(), (0, 0, 0));
}

#[test]
fn no_name_leads_to_what_stands_for_loopback() {
    let mut bench = Bench::new();
    bench.set("allow to *.test\ndefault deny");
    for (address, expected) in [("10.0.2.2", FORBIDDEN), ("203.0.113.1", Ok(()))] {
        let answer = writer::addresses("a.test", &[], &[(address, 60)]);
        bench.nat.policy().pin(OURS, &answer, bench.now);
        assert_eq!(bench.udp(OURS, &format!("{address}:443")), expected);
    }
}

#[test]
fn strangers_that_a_guest_may_not_write_to_do_not_write_to_it() {
    let mut bench = Bench::new();
    bench.set("allow to 203.0.113.0/24 udp 53\ndefault deny");
    assert_eq!(bench.udp(OURS, "203.0.113.1:53"), Ok(()));
    for (from, expected) in [
        ("203.0.113.1:53", None),
        // The filter lets everybody in, the policy does not.
        ("203.0.113.2:53", None),
        ("203.0.113.1:54", Some(DropReason::Filtered)),
        ("198.51.100.1:53", Some(DropReason::Filtered)),
    ] {
        assert_eq!(bench.outside(from), expected, "{from}");
    }
    assert_eq!(bench.got(), "UU");
}

#[test]
fn a_flow_is_of_no_use_behind_another_port() {
    let mut bench = Bench::new();
    bench.set("allow guest port=ours\nallow to 203.0.113.9\ndefault deny");
    assert_eq!(bench.syn(OURS, 4000, "203.0.113.1:80"), Ok(()));
    assert_eq!(bench.udp(OURS, "203.0.113.1:53"), Ok(()));
    assert_eq!(bench.ping(OURS, "203.0.113.1"), Ok(()));
    bench.got();
    // With the other guest's address, ports and identifier.
    let from = SocketAddr::new(GUEST.into(), 4000);
    let segment = guest_tcp(
        from,
        at("203.0.113.1:80"),
        (2, 1),
        (Tcp::ACK, 1000),
        &[],
        b"x",
    );
    assert_eq!(bench.frame(OTHER, &segment), FORBIDDEN);
    assert_eq!(bench.udp(OTHER, "203.0.113.1:53"), FORBIDDEN);
    assert_eq!(bench.ping(OTHER, "203.0.113.1"), FORBIDDEN);
    // Nor by way of an address that it may have.
    assert_eq!(bench.udp(OTHER, "203.0.113.9:53"), Ok(()));
    assert_eq!(bench.udp(OTHER, "203.0.113.1:53"), FORBIDDEN);
    assert_eq!(bench.udp(OURS, "203.0.113.1:53"), Ok(()));
    assert_eq!(bench.nat.flows(), (1, 1, 1));
}

#[test]
fn protocols_are_told_apart() {
    let mut bench = Bench::new();
    bench.set("allow to any icmp\nallow to any tcp 80\ndefault deny");
    assert_eq!(bench.ping(OURS, "203.0.113.1"), Ok(()));
    assert_eq!(bench.syn(OURS, 4000, "203.0.113.1:80"), Ok(()));
    assert_eq!(bench.syn(OURS, 4001, "203.0.113.1:81"), FORBIDDEN);
    assert_eq!(bench.udp(OURS, "203.0.113.1:80"), FORBIDDEN);
    let (egress, up) = (&bench.nat.egress, &mut bench.up);
    assert!(egress.allows((OURS, Protocol::Echo), at("192.0.2.1:0"), up));
    assert!(!egress.allows((OURS, Protocol::Udp), at("192.0.2.1:80"), up));
}
