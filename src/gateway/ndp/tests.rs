//! The service under a virtual clock.

use super::message::{
    NEIGHBOR_ADVERTISEMENT, NEIGHBOR_SOLICITATION, REDIRECT, ROUTER_ADVERTISEMENT,
    ROUTER_SOLICITATION, SOURCE_LINK_LAYER, TARGET_LINK_LAYER,
};
use super::*;
use crate::gateway::testing::{GUEST, Kept, lan, lan6, parse};
use crate::wire::ipv6::{Ipv6Fields, address_at, group_mac, link_local, write_ipv6};
use crate::wire::{ETHERTYPE_IPV6, PROTO_ICMPV6, be16, checksum, write_ethernet};

const START: Instant = Instant::from_micros_const(1_000_000_000);
const ANYBODY: Ipv6Addr = Ipv6Addr::UNSPECIFIED;

struct Lab {
    ndp: Ndp,
    out: Kept,
    now: Instant,
    lan: Lan6,
}

/// A packet to be sent by the guest.
#[derive(Clone)]
struct Sent {
    mac: Option<Mac>,
    source: Ipv6Addr,
    destination: Ipv6Addr,
    hop_limit: u8,
    message: Vec<u8>,
}

fn guest() -> Ipv6Addr {
    link_local(GUEST)
}

fn option(kind: u8, mac: Mac) -> Vec<u8> {
    message::link_layer(kind, mac).to_vec()
}

fn sent(source: Ipv6Addr, destination: Ipv6Addr, parts: &[&[u8]]) -> Sent {
    Sent {
        mac: None,
        source,
        destination,
        hop_limit: 255,
        message: parts.concat(),
    }
}

fn neighbor(kind: u8, flags: u8, target: Ipv6Addr) -> Vec<u8> {
    let mut message = vec![kind, 0, 0, 0, flags, 0, 0, 0];
    message.extend_from_slice(&target.octets());
    message
}

fn solicitation(target: Ipv6Addr) -> Sent {
    let option = option(SOURCE_LINK_LAYER, GUEST);
    let message = neighbor(NEIGHBOR_SOLICITATION, 0, target);
    sent(guest(), solicited_node(target), &[&message, &option])
}

fn duplicate_detection(target: Ipv6Addr) -> Sent {
    let message = neighbor(NEIGHBOR_SOLICITATION, 0, target);
    sent(ANYBODY, solicited_node(target), &[&message])
}

fn router_solicitation(source: Ipv6Addr) -> Sent {
    let mut message = vec![ROUTER_SOLICITATION, 0, 0, 0, 0, 0, 0, 0];
    if !source.is_unspecified() {
        message.extend(option(SOURCE_LINK_LAYER, GUEST));
    }
    sent(source, ALL_ROUTERS, &[&message])
}

impl Sent {
    fn frame(&self) -> Vec<u8> {
        let len = self.message.len();
        let mut frame = vec![0; MESSAGE_AT + len];
        let group = self.destination.is_multicast();
        let mac = self.mac.unwrap_or(match group {
            true => group_mac(self.destination),
            false => lan().mac,
        });
        write_ethernet(&mut frame, mac, GUEST, ETHERTYPE_IPV6);
        let fields = Ipv6Fields {
            source: self.source,
            destination: self.destination,
            protocol: PROTO_ICMPV6,
            hop_limit: self.hop_limit,
            traffic_class: 0,
        };
        write_ipv6(&mut frame, fields, len);
        frame[MESSAGE_AT..].copy_from_slice(&self.message);
        let (source, destination) = (self.source.into(), self.destination.into());
        let covered = &frame[MESSAGE_AT..];
        let sum = !checksum::transport(source, destination, PROTO_ICMPV6, covered);
        frame[MESSAGE_AT + 2..MESSAGE_AT + 4].copy_from_slice(&sum.to_be_bytes());
        frame
    }
}

/// An ICMPv6 frame of the gateway.
struct Answer {
    mac: Mac,
    source: Ipv6Addr,
    destination: Ipv6Addr,
    message: Vec<u8>,
}

impl Answer {
    fn of(frame: &[u8]) -> Self {
        // Parsing checks the checksum.
        let packet = parse(frame);
        assert_eq!(packet.source, lan().mac);
        let Body::Ipv6(ip) = packet.body else {
            panic!("not IPv6")
        };
        assert_eq!(ip.ttl, 255);
        let Transport::Icmp(message) = ip.transport else {
            panic!("not ICMPv6")
        };
        assert_eq!(message[1], 0);
        Self {
            mac: packet.destination,
            source: ip.source,
            destination: ip.destination,
            message: message.to_vec(),
        }
    }

    /// Options, by kind.
    fn options(&self, at: usize) -> Vec<(u8, &[u8])> {
        let (mut rest, mut options) = (&self.message[at..], Vec::new());
        while !rest.is_empty() {
            let (option, behind) = rest.split_at(usize::from(rest[1]) * 8);
            options.push((option[0], option));
            rest = behind;
        }
        options
    }

    fn router_lifetime(&self) -> u16 {
        assert_eq!(self.message[0], ROUTER_ADVERTISEMENT);
        be16(&self.message, 6)
    }
}

impl Lab {
    fn new() -> Self {
        Self {
            ndp: Ndp::new(&lan6(), Some("lab.test")),
            out: Kept::new(),
            now: START,
            lan: lan6().v6.unwrap(),
        }
    }

    fn hears(&mut self, sent: &Sent) -> Handled {
        let frame = sent.frame();
        let packet = parse(&frame);
        assert!(self.ndp.claims(&packet));
        self.ndp.handle(&packet, self.now, &mut self.out)
    }

    fn answer(&mut self) -> Answer {
        Answer::of(&self.out.take())
    }

    fn nothing(&mut self) {
        assert!(self.out.frames.is_empty());
    }

    /// Moves on to the next timeout, which sends one frame; the time it took.
    fn next(&mut self) -> (Duration, Answer) {
        let due = self.ndp.poll_timeout().expect("something is due");
        // Not a moment before.
        let before = due - Duration::from_micros(1);
        self.ndp.handle_timeout(before, &mut self.out);
        self.nothing();
        let waited = due - self.now;
        self.now = due;
        self.ndp.handle_timeout(due, &mut self.out);
        (waited, self.answer())
    }
}

#[test]
fn solicitations_for_both_addresses_are_answered_to_the_asker() {
    let mut lab = Lab::new();
    for target in [lab.lan.link_local, lab.lan.address] {
        let by_group = solicitation(target);
        // Unreachability detection asks by unicast (RFC 4861 7.3.3), without need of an option.
        let probe = neighbor(NEIGHBOR_SOLICITATION, 0, target);
        let by_unicast = sent(guest(), target, &[&probe]);
        let global = "fd12:3456:789a:1::77".parse().unwrap();
        let of_global = sent(global, target, &[&probe]);
        for asked in [by_group, by_unicast, of_global] {
            assert_eq!(lab.hears(&asked), Ok(()));
            let answer = lab.answer();
            assert_eq!((answer.mac, answer.destination), (GUEST, asked.source));
            assert_eq!(answer.source, target);
            assert_eq!(answer.message[0], NEIGHBOR_ADVERTISEMENT);
            assert_eq!(answer.message[4], 0xe0, "router, solicited, override");
            assert_eq!(address_at(&answer.message, 8), target);
            let mac = option(TARGET_LINK_LAYER, lan().mac);
            assert_eq!(answer.options(24), [(TARGET_LINK_LAYER, &mac[..])]);
        }
    }
    assert_eq!(lab.ndp.counters.replies, 6);
}

#[test]
fn what_is_asked_of_others_is_left_to_them() {
    let mut lab = Lab::new();
    // The last three bytes are the gateway's, so the group is.
    let other = "fd12:3456:789a:1::ff00:1".parse().unwrap();
    assert_eq!(solicited_node(other), solicited_node(lab.lan.address));
    for asked in [solicitation(other), duplicate_detection(other)] {
        assert_eq!(lab.hears(&asked), Ok(()));
    }
    let message = neighbor(NEIGHBOR_ADVERTISEMENT, 0x20, guest());
    let announced = sent(guest(), ALL_NODES, &[&message]);
    assert_eq!(lab.hears(&announced), Ok(()));
    lab.nothing();
    assert_eq!(lab.ndp.counters, NdpCounters::default());
}

#[test]
fn a_gateway_address_is_defended_at_a_bounded_rate() {
    let mut lab = Lab::new();
    let (ours, other) = (lab.lan.address, lab.lan.link_local);
    let conflict = Err(DropReason::AddressConflict);
    assert_eq!(lab.hears(&duplicate_detection(ours)), conflict);
    let answer = lab.answer();
    assert_eq!(answer.mac, group_mac(ALL_NODES));
    assert_eq!((answer.source, answer.destination), (ours, ALL_NODES));
    assert_eq!(answer.message[4], 0xa0, "router, override, not solicited");
    assert_eq!(address_at(&answer.message, 8), ours);

    // The other address is another matter; claims come in every form.
    let na = neighbor(NEIGHBOR_ADVERTISEMENT, 0x20, other);
    assert_eq!(lab.hears(&sent(guest(), ALL_NODES, &[&na])), conflict);
    assert_eq!(lab.answer().source, other);
    let stolen = sent(ours, other, &[&neighbor(NEIGHBOR_SOLICITATION, 0, other)]);
    assert_eq!(lab.hears(&stolen), conflict);

    // A flood of claims has one answer, and whoever waits for a second gets it.
    let begun = lab.now;
    for _ in 0..100 {
        lab.now += Duration::from_millis(4);
        assert_eq!(lab.hears(&duplicate_detection(ours)), conflict);
    }
    lab.nothing();
    lab.now = begun;
    assert_eq!(lab.ndp.poll_timeout(), Some(begun + DEFEND_PAUSE));
    lab.now = begun + DEFEND_PAUSE;
    lab.ndp.handle_timeout(lab.now, &mut lab.out);
    assert_eq!(lab.out.frames.len(), 2, "one for each address");
    assert_eq!(lab.ndp.poll_timeout(), None);
    let counters = &lab.ndp.counters;
    assert_eq!((counters.conflicts, counters.defended), (103, 4));
}

#[test]
fn an_advertisement_has_all_that_slaac_needs() {
    let mut lab = Lab::new();
    lab.ndp.set_default_route(true, lab.now);
    assert_eq!(lab.hears(&router_solicitation(guest())), Ok(()));
    let ra = lab.answer();
    assert_eq!((ra.mac, ra.destination), (GUEST, guest()));
    assert_eq!(ra.source, lab.lan.link_local);
    assert_eq!(ra.message[4..6], [64, 0], "hop limit; no DHCPv6");
    assert_eq!(ra.router_lifetime(), 1800);
    assert_eq!(ra.message[8..16], [0; 8]);
    let mut prefix = vec![
        3, 4, 64, 0xc0, 0, 0, 0x15, 0x18, 0, 0, 0x0a, 0x8c, 0, 0, 0, 0,
    ];
    let network: Ipv6Addr = "fd12:3456:789a:1::".parse().unwrap();
    prefix.extend_from_slice(&network.octets());
    let mut rdnss = vec![25, 3, 0, 0, 0, 0, 7, 8];
    rdnss.extend_from_slice(&lab.lan.address.octets());
    let dnssl = b"\x1f\x03\0\0\0\0\x07\x08\x03lab\x04test\0\0\0\0\0\0\0";
    assert_eq!(
        ra.options(16),
        [
            (1, &option(SOURCE_LINK_LAYER, lan().mac)[..]),
            (5, &[5, 1, 0, 0, 0, 0, 0x05, 0xdc]),
            (3, &prefix),
            (25, &rdnss),
            (31, dnssl),
        ]
    );
    // Without a domain there is no such option.
    let mut plain = Lab {
        ndp: Ndp::new(&lan6(), None),
        ..Lab::new()
    };
    assert_eq!(plain.hears(&router_solicitation(guest())), Ok(()));
    let ra = plain.answer();
    let kinds: Vec<u8> = ra.options(16).iter().map(|(kind, _)| *kind).collect();
    assert_eq!(kinds, [1, 5, 3, 25]);
    assert_eq!(ra.router_lifetime(), 0, "not told of IPv6 on the host");
}

#[test]
fn a_long_domain_fits() {
    let label = "x".repeat(63);
    let domain = [&label[..], &label, &label, &label[..61]].join(".");
    assert_eq!(domain.len(), 253);
    let mut lab = Lab {
        ndp: Ndp::new(&lan6(), Some(&domain)),
        ..Lab::new()
    };
    assert_eq!(lab.hears(&router_solicitation(guest())), Ok(()));
    let ra = lab.answer();
    let (_, dnssl) = ra.options(16).pop().unwrap();
    assert_eq!(dnssl.len(), 8 + 256);
    assert_eq!(dnssl[8 + 254], 0);
}

#[test]
fn a_guest_without_address_gets_its_answer_with_everybody() {
    let mut lab = Lab::new();
    lab.ndp.port_added(lab.now);
    lab.next();
    assert_eq!(lab.hears(&router_solicitation(ANYBODY)), Ok(()));
    lab.nothing();
    // A second one, and a newcomer, change nothing.
    lab.now += Duration::from_secs(1);
    assert_eq!(lab.hears(&router_solicitation(ANYBODY)), Ok(()));
    lab.ndp.port_added(lab.now);
    let (waited, ra) = lab.next();
    assert_eq!(waited, Duration::from_secs(2), "three after the first");
    assert_eq!((ra.mac, ra.destination), (group_mac(ALL_NODES), ALL_NODES));
    // Three seconds on, it is answered at once.
    lab.now += MULTICAST_PAUSE;
    assert_eq!(lab.hears(&router_solicitation(ANYBODY)), Ok(()));
    assert_eq!(lab.next().0, Duration::ZERO);
}

#[test]
fn advertisements_come_thrice_and_then_at_intervals() {
    let mut lab = Lab::new();
    assert_eq!(lab.ndp.poll_timeout(), None, "nobody hears");
    lab.ndp.port_added(lab.now);
    let waits: Vec<_> = (0..3).map(|_| lab.next().0).collect();
    assert_eq!(waits, [3, 16, 16].map(Duration::from_secs));
    let waits: Vec<_> = (0..200).map(|_| lab.next().0).collect();
    assert!(waits.iter().all(|wait| (198..=600).contains(&wait.secs())));
    let (least, most) = (waits.iter().min().unwrap(), waits.iter().max().unwrap());
    assert!(least.secs() < 220 && most.secs() > 580, "{least} {most}");
    lab.ndp.ports_gone();
    assert_eq!(lab.ndp.poll_timeout(), None);
    assert_eq!(lab.ndp.counters.advertised, 203);
}

#[test]
fn newcomers_do_not_hold_up_what_is_due() {
    let mut lab = Lab::new();
    let begun = lab.now;
    for _ in 0..60 {
        lab.ndp.port_added(lab.now);
        lab.now += Duration::from_secs(1);
    }
    // Once a second: never settled.
    assert_eq!(lab.ndp.poll_timeout(), Some(begun + INITIAL_INTERVAL));
}

#[test]
fn a_change_of_the_host_is_told_at_once() {
    let mut lab = Lab::new();
    lab.ndp.port_added(lab.now);
    for _ in 0..5 {
        assert_eq!(lab.next().1.router_lifetime(), 0);
    }
    lab.now += Duration::from_secs(60);
    lab.ndp.set_default_route(true, lab.now);
    let (waited, ra) = lab.next();
    assert_eq!((waited, ra.router_lifetime()), (Duration::ZERO, 1800));
    lab.now += Duration::from_secs(1);
    lab.ndp.set_default_route(false, lab.now);
    let (waited, ra) = lab.next();
    assert_eq!(waited, Duration::from_secs(2), "paced");
    assert_eq!(ra.router_lifetime(), 0);
    let dns = ra.options(16)[3].1;
    assert_eq!(dns[..8], [25, 3, 0, 0, 0, 0, 7, 8], "DNS stays");
    assert_eq!(lab.next().0, INITIAL_INTERVAL, "and is repeated");
    // The same again is no change.
    let due = lab.ndp.poll_timeout();
    lab.ndp.set_default_route(false, lab.now);
    assert_eq!(lab.ndp.poll_timeout(), due);
}

#[test]
fn prefixes_are_named_and_withdrawn() {
    let mut lab = Lab::new();
    let prefix = |text: &str| -> (Ipv6Addr, u8) { (text.parse().unwrap(), 48) };
    let (one, two) = (prefix("2001:db8:1::"), prefix("2001:db8:2::"));
    let routes = |ra: &Answer| -> Vec<(Vec<u8>, u32)> {
        let options = ra.options(16);
        let routes = options.iter().filter(|(kind, _)| *kind == 24);
        let read = |option: &[u8]| {
            assert_eq!(option[1..4], [3, 48, 0], "medium preference");
            let lifetime = u32::from_be_bytes(option[4..8].try_into().unwrap());
            (option[8..24].to_vec(), lifetime)
        };
        routes.map(|(_, option)| read(option)).collect()
    };
    let named = |(prefix, _): (Ipv6Addr, u8), secs: u32| (prefix.octets().to_vec(), secs);
    lab.ndp.port_added(lab.now);
    lab.ndp.set_prefixes(&[one, two], lab.now);
    let ra = lab.next().1;
    assert_eq!(ra.router_lifetime(), 0);
    assert_eq!(routes(&ra), [named(one, 1800), named(two, 1800)]);
    lab.now += Duration::from_secs(60);
    lab.ndp.set_prefixes(&[two], lab.now);
    for _ in 0..3 {
        assert_eq!(routes(&lab.next().1), [named(two, 1800), named(one, 0)]);
    }
    assert_eq!(
        routes(&lab.next().1),
        [named(two, 1800)],
        "it was said often enough"
    );
    let due = lab.ndp.poll_timeout();
    lab.ndp.set_prefixes(&[two], lab.now);
    assert_eq!(lab.ndp.poll_timeout(), due, "the same again is no change");
    let many: Vec<_> = (0..40)
        .map(|n| (Ipv6Addr::new(0x2001, 0xdb8, n, 0, 0, 0, 0, 0), 48))
        .collect();
    lab.ndp.set_prefixes(&many, lab.now);
    assert_eq!(routes(&lab.next().1).len(), ROUTES_MAX);
    lab.ndp.stop(&mut lab.out);
    assert!(routes(&lab.answer()).iter().all(|(_, secs)| *secs == 0));
}

#[test]
fn the_end_is_told() {
    let mut lab = Lab::new();
    lab.ndp.set_default_route(true, lab.now);
    lab.ndp.stop(&mut lab.out);
    lab.nothing();
    lab.ndp.port_added(lab.now);
    lab.ndp.stop(&mut lab.out);
    let ra = lab.answer();
    assert_eq!((ra.destination, ra.router_lifetime()), (ALL_NODES, 0));
    for (kind, option) in ra.options(16) {
        match kind {
            25 | 31 => assert_eq!(option[4..8], [0; 4]),
            3 => assert_eq!(option[4..8], [0, 0, 0x15, 0x18], "addresses stay"),
            _ => {}
        }
    }
}

#[test]
fn malformed_messages_are_discarded() {
    let mut lab = Lab::new();
    let ours = lab.lan.address;
    let ok = solicitation(ours);
    let edit = |change: &dyn Fn(&mut Sent)| {
        let mut sent = ok.clone();
        change(&mut sent);
        sent
    };
    let group: Ipv6Addr = "ff02::1:ff00:1".parse().unwrap();
    let bad = [
        ("hop limit", edit(&|sent| sent.hop_limit = 254)),
        ("code", edit(&|sent| sent.message[1] = 1)),
        ("short", edit(&|sent| sent.message.truncate(20))),
        ("option of length 0", edit(&|sent| sent.message[25] = 0)),
        ("option too long", edit(&|sent| sent.message[25] = 2)),
        ("half an option", edit(&|sent| sent.message.truncate(28))),
        ("a byte of option", edit(&|sent| sent.message.truncate(25))),
        (
            "group as target",
            edit(&|sent| sent.message[8..24].copy_from_slice(&group.octets())),
        ),
        ("group as source", edit(&|sent| sent.source = group)),
        (
            "anonymous with source option",
            edit(&|sent| sent.source = ANYBODY),
        ),
        (
            "anonymous by unicast",
            edit(&|sent| {
                sent.source = ANYBODY;
                sent.destination = ours;
                sent.message.truncate(24);
            }),
        ),
        (
            "anonymous router solicitation with source option",
            sent(
                ANYBODY,
                ALL_ROUTERS,
                &[&router_solicitation(guest()).message],
            ),
        ),
        (
            "router solicitation with hop limit",
            Sent {
                hop_limit: 64,
                ..router_solicitation(guest())
            },
        ),
        (
            "advertisement to all as solicited",
            sent(
                guest(),
                ALL_NODES,
                &[&neighbor(NEIGHBOR_ADVERTISEMENT, 0x40, ours)],
            ),
        ),
        (
            "anonymous advertisement",
            sent(
                ANYBODY,
                ALL_NODES,
                &[&neighbor(NEIGHBOR_ADVERTISEMENT, 0, ours)],
            ),
        ),
    ];
    for (index, (what, sent)) in bad.iter().enumerate() {
        assert_eq!(lab.hears(sent), Err(DropReason::Malformed), "{what}");
        assert_eq!(lab.ndp.counters.malformed, index as u64 + 1, "{what}");
    }
    lab.nothing();
    // No prefix of a good one is answered unless it ends between options.
    for len in 8..ok.message.len() {
        let cut = edit(&|sent| sent.message.truncate(len));
        assert_eq!(lab.hears(&cut).is_ok(), len == 24, "{len}");
    }
    assert_eq!(lab.hears(&ok), Ok(()));
}

#[test]
fn who_is_not_of_the_lan_gets_no_answer() {
    let mut lab = Lab::new();
    let ours = lab.lan.address;
    for source in ["2001:db8::1", "fd12:3456:789a:1::", "::1"] {
        let source = source.parse().unwrap();
        for asked in [solicitation(ours), router_solicitation(guest())] {
            let asked = Sent { source, ..asked };
            assert_eq!(
                lab.hears(&asked),
                Err(DropReason::ForeignSource),
                "{source}"
            );
        }
    }
    let probe = neighbor(NEIGHBOR_SOLICITATION, 0, ours);
    let to_everybody = Sent {
        mac: Some(Mac::BROADCAST),
        ..sent(guest(), ours, &[&probe])
    };
    let refused = Err(DropReason::ForbiddenDestination);
    assert_eq!(lab.hears(&to_everybody), refused);
    lab.nothing();
}

#[test]
fn other_routers_are_not_believed() {
    let mut lab = Lab::new();
    lab.ndp.port_added(lab.now);
    let due = lab.ndp.poll_timeout();
    for (kind, destination) in [
        (ROUTER_ADVERTISEMENT, ALL_NODES),
        (REDIRECT, lab.lan.link_local),
    ] {
        let message = [&[kind, 0, 0, 0][..], &[0xff; 36]].concat();
        let sent = sent(guest(), destination, &[&message]);
        assert_eq!(lab.hears(&sent), Err(DropReason::RogueRouter));
    }
    lab.nothing();
    assert_eq!(lab.ndp.poll_timeout(), due);
    assert_eq!(lab.ndp.counters.rogue, 2);
}

#[test]
fn without_ipv6_nothing_is_claimed() {
    let mut ndp = Ndp::new(&lan(), Some("lab.test"));
    let ours = lan6().v6.unwrap().address;
    for sent in [solicitation(ours), router_solicitation(guest())] {
        assert!(!ndp.claims(&parse(&sent.frame())));
    }
    ndp.port_added(START);
    ndp.set_default_route(true, START);
    assert_eq!(ndp.poll_timeout(), None);
    let mut out = Kept::new();
    ndp.handle_timeout(START, &mut out);
    ndp.stop(&mut out);
    assert!(out.frames.is_empty());
}

#[test]
fn the_gateway_hears_its_groups_and_no_others() {
    let lan = lan6().v6.unwrap();
    let solicited = solicited_node(lan.link_local);
    for group in [ALL_NODES, ALL_ROUTERS, solicited] {
        assert!(is_gateway_group(&lan, group), "{group}");
    }
    let others = [
        "ff02::16",
        "ff02::fb",
        "ff02::1:2",
        "ff02::1:ff00:2",
        "ff05::2",
    ];
    for group in others {
        assert!(!is_gateway_group(&lan, group.parse().unwrap()), "{group}");
    }
}
