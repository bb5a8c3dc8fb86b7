//! The policy as a whole: what its text means, that names can't be got around, and a naive model of it
//! that every decision is compared with.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::net::{Ipv4Addr, Ipv6Addr};

use proptest::prelude::*;

use super::answer::writer;
use super::ledger::{DENIED_MAX, DENIED_PER_GUEST_MAX, PolicyView};
use super::parse::{DESTINATIONS_MAX, LINE_LEN_MAX, LIST_MAX, TEXT_LEN_MAX};
use super::rule::RULES_MAX;
use super::*;

const WEB: PortId = PortId(1);
const BUILD: PortId = PortId(2);
const ALLOW: Verdict = Verdict::Allow;
const DENY: Verdict = Verdict::Deny { silent: false };
const SILENT: Verdict = Verdict::Deny { silent: true };
const A: u16 = 1;
const AAAA: u16 = 28;

fn at(secs: i64) -> Instant {
    Instant::from_secs(secs)
}

fn parse(text: &str) -> Policy {
    text.parse()
        .unwrap_or_else(|error| panic!("{error}\n{text}"))
}

/// A peer like `tcp 198.51.100.1 443` or `icmp 198.51.100.1`.
fn peer(text: &str) -> Peer {
    let words: Vec<_> = text.split(' ').collect();
    Peer {
        protocol: match words[0] {
            "tcp" => Protocol::Tcp,
            "udp" => Protocol::Udp,
            "icmp" => Protocol::Icmp,
            _ => Protocol::Other,
        },
        address: words[1].parse().unwrap(),
        port: words.get(2).map(|port| port.parse().unwrap()),
        of_host: false,
    }
}

struct Lab(PolicyState);

impl Lab {
    /// Guests `web`, of no group, and `ci`, of group `build`, on a LAN with public addresses.
    fn new(text: &str) -> Self {
        let lan = [("192.0.2.0", 24), ("2001:db8:1a::", 64)];
        let lan = lan.map(|(first, prefix)| Cidr::new(first.parse().unwrap(), prefix).unwrap());
        let mut state = PolicyState::new(lan.into());
        state.add_guest(WEB, "web".parse().unwrap(), None);
        state.add_guest(BUILD, "ci".parse().unwrap(), "build".parse().ok());
        state.set_policy(Some(Arc::new(parse(text))));
        Self(state)
    }

    fn of(&mut self, guest: PortId, peer_text: &str, secs: i64) -> Verdict {
        self.0.decide(guest, peer(peer_text), at(secs))
    }

    fn web(&mut self, peer_text: &str) -> Verdict {
        self.of(WEB, peer_text, 0)
    }

    fn resolve(&mut self, guest: PortId, name: &str, addresses: &[&str]) {
        let list: Vec<_> = addresses.iter().map(|&address| (address, 300)).collect();
        self.0
            .pin(guest, &writer::addresses(name, &[], &list), at(0));
    }

    fn may_ask(&mut self, guest: PortId, name: &str) -> bool {
        self.0.decide_query(guest, &writer::query(name, A), at(0))
    }

    fn view(&self, secs: i64) -> PolicyView {
        self.0.view(at(secs)).unwrap()
    }
}

#[test]
fn the_first_rule_that_matches_decides() {
    let mut lab = Lab::new(
        "# what a build may reach
         deny silent to metadata        # whoever asks
         allow guest group=build to 198.51.100.0/24 tcp 80,443
         deny to private
         allow to 198.51.100.7 udp 1000-2000,53
         allow guest port=web,group=none to any icmp
         default deny",
    );
    for (guest, text, verdict) in [
        (WEB, "tcp 169.254.169.254 80", SILENT),
        (WEB, "tcp fd00:ec2::254 80", SILENT),
        (BUILD, "tcp 198.51.100.9 443", ALLOW),
        (BUILD, "tcp 198.51.100.9 22", DENY),
        (BUILD, "udp 198.51.100.9 443", DENY),
        (BUILD, "tcp 198.51.101.9 443", DENY),
        (WEB, "tcp 198.51.100.9 443", DENY),
        (WEB, "udp 198.51.100.7 1000", ALLOW),
        (WEB, "udp 198.51.100.7 2000", ALLOW),
        (WEB, "udp 198.51.100.7 2001", DENY),
        (WEB, "udp 198.51.100.7 53", ALLOW),
        (WEB, "udp 198.51.100.8 1000", DENY),
        (WEB, "icmp 203.0.113.1", ALLOW),
        (BUILD, "icmp 203.0.113.1", DENY),
        (WEB, "icmp 10.0.0.1", DENY),
        (WEB, "gre 203.0.113.1", DENY),
        (PortId(9), "icmp 203.0.113.1", DENY),
    ] {
        assert_eq!(lab.of(guest, text, 0), verdict, "{text}");
        let port = peer(text);
        assert_eq!(lab.0.review(guest, port), verdict, "{text}");
    }
    let counts: Vec<_> = lab
        .view(0)
        .rules
        .iter()
        .map(|rule| (rule.line, rule.flows))
        .collect();
    assert_eq!(counts, [(2, 2), (3, 1), (4, 1), (5, 3), (6, 1)]);
    assert_eq!(lab.view(0).default_flows, 8);
    assert_eq!(lab.view(0).stranger, 1);
}

#[test]
fn words_for_ranges() {
    let mut lab = Lab::new("allow to internet\ndefault deny silent");
    for (address, verdict) in [
        ("203.0.113.1", ALLOW),
        ("2001:db8::1", ALLOW),
        ("10.0.0.1", SILENT),
        ("100.64.0.1", SILENT),
        ("169.254.169.254", SILENT),
        ("168.63.129.16", SILENT),
        ("fd00::1", SILENT),
        ("64:ff9b::a00:1", SILENT),
    ] {
        assert_eq!(lab.web(&format!("tcp {address} 80")), verdict, "{address}");
    }
    let mut lab = Lab::new("deny to private,metadata\ndefault allow");
    for (address, verdict) in [
        ("203.0.113.1", ALLOW),
        ("172.16.0.1", DENY),
        ("fd12::1", DENY),
        ("fe80::1", DENY),
        ("::ffff:172.16.0.1", DENY),
        ("2002:ac10:1::1", DENY),
        ("64:ff9b::ac10:1", DENY),
        ("64:ff9b::a9fe:a9fe", DENY),
    ] {
        assert_eq!(lab.web(&format!("udp {address} 80")), verdict, "{address}");
    }
    // A port that is not known is denied where any is, and allowed only where all are.
    let mut lab =
        Lab::new("deny to 203.0.113.1 tcp 22\nallow to 203.0.113.2 tcp 80\ndefault allow");
    assert_eq!(lab.web("tcp 203.0.113.1"), DENY);
    let mut strict = Lab::new("allow to 203.0.113.2 tcp 80\ndefault deny");
    assert_eq!(strict.web("tcp 203.0.113.2"), DENY);
}

/// Each way around "only *.example.test" that there is at this layer.
#[test]
fn a_policy_of_one_name_can_not_be_passed() {
    let mut lab = Lab::new("allow to *.example.test\ndefault deny");
    let own = "198.51.100.5";
    lab.resolve(WEB, "www.example.test", &[own]);
    assert_eq!(lab.web("tcp 198.51.100.5 443"), ALLOW);
    assert_eq!(lab.web("udp 198.51.100.5 443"), ALLOW);
    assert_eq!(lab.web("icmp 198.51.100.5"), ALLOW);
    let refused = |lab: &mut Lab, what: &str| assert_eq!(lab.web(what), DENY, "{what}");

    // A literal address, one beside it, IPv6, every disguise of an inside address.
    for literal in [
        "tcp 203.0.113.9 443",
        "tcp 198.51.100.6 443",
        "tcp 2001:db8::5 443",
        "tcp 10.0.0.1 80",
        "tcp 64:ff9b::c633:6406 443",
        "tcp 127.0.0.1 80",
        "tcp ::1 80",
        "tcp ::ffff:203.0.113.9 443",
        "icmp 203.0.113.9",
    ] {
        refused(&mut lab, literal);
    }
    // The pinned address in IPv6's clothes is the same one.
    assert_eq!(lab.web("tcp ::ffff:198.51.100.5 443"), ALLOW);
    // Another resolver, DoT, DoQ, DNS to a third party, DoH by address; at the pinned address too.
    for resolver in [
        "udp 203.0.113.53 53",
        "tcp 203.0.113.53 53",
        "tcp 203.0.113.53 853",
        "udp 203.0.113.53 853",
        "tcp 203.0.113.53 443",
        "udp 2001:db8::53 53",
        "udp 198.51.100.5 53",
        "tcp 198.51.100.5 853",
    ] {
        refused(&mut lab, resolver);
    }
    // A name that leads inside: loopback, private, link-local, the LAN, in both families.
    let inside = [
        "127.0.0.1",
        "10.0.0.1",
        "169.254.169.254",
        "192.0.2.7",
        "0.0.0.0",
        "224.0.0.1",
    ];
    let inside6 = [
        "::1",
        "fd00::1",
        "fe80::1",
        "2001:db8:1a::7",
        "::ffff:10.0.0.1",
        "64:ff9b::a00:1",
        "2002:a00:1::1",
        "2002:c000:207::1",
    ];
    lab.resolve(WEB, "rebind.example.test", &inside);
    lab.resolve(WEB, "rebind.example.test", &inside6);
    for address in inside.iter().chain(&inside6) {
        refused(&mut lab, &format!("tcp {address} 80"));
    }
    assert_eq!(lab.view(0).rebinds, (inside.len() + inside6.len()) as u64);
    // Another guest's answer, an answer to nobody.
    lab.resolve(BUILD, "x.example.test", &["203.0.113.20"]);
    lab.resolve(PortId(9), "x.example.test", &["203.0.113.20"]);
    refused(&mut lab, "tcp 203.0.113.20 443");
    // Names that look alike, and the name itself, which `*.` does not mean.
    for name in [
        "evilexample.test",
        "example.test.evil",
        "example.test",
        "test",
    ] {
        lab.resolve(WEB, name, &["203.0.113.30"]);
        refused(&mut lab, "tcp 203.0.113.30 443");
        assert!(!lab.may_ask(WEB, name), "{name}");
    }
    // An alias into the allowed names from outside them.
    let list = [("203.0.113.40", 300)];
    let alias = writer::addresses("evil.example", &["www.example.test"], &list);
    lab.0.pin(WEB, &alias, at(0));
    refused(&mut lab, "tcp 203.0.113.40 443");
    // An answer that carries an address for someone else's name.
    let mut poisoned = writer::addresses("w2.example.test", &[], &[("198.51.100.8", 300)]);
    let owner = writer::name("www.example.test");
    writer::record(&mut poisoned, &owner, A, 300, &[203, 0, 113, 50]);
    lab.0.pin(WEB, &poisoned, at(0));
    refused(&mut lab, "tcp 203.0.113.50 443");
    // Out through an alias is what content networks do.
    let cdn = writer::addresses("cdn.example.test", &["edge.cdn.example"], &list);
    lab.0.pin(WEB, &cdn, at(0));
    assert_eq!(lab.web("tcp 203.0.113.40 443"), ALLOW);
    // Telling a server something by asking for a name.
    for name in ["secret.evil.example", "a.b", "10.2.0.192.in-addr.arpa"] {
        assert!(!lab.may_ask(WEB, name), "{name}");
    }
    assert!(
        !lab.0.decide_query(WEB, &writer::query("", 2), at(0)),
        "the root"
    );
    assert!(!lab.0.decide_query(WEB, &[], at(0)));
    let dotted = [&[9][..], b"x.example", &[4], b"test", &[0, 0, 1, 0, 1]].concat();
    let query = [&[0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0][..], &dotted].concat();
    assert!(!lab.0.decide_query(WEB, &query, at(0)), "a dot in a label");
    assert!(lab.may_ask(WEB, "WWW.Example.TEST"));
    // The TTL is over.
    assert_eq!(lab.of(WEB, "tcp 198.51.100.5 443", 299), ALLOW);
    assert_eq!(lab.of(WEB, "tcp 198.51.100.5 443", 300), DENY);
    assert_eq!(
        lab.0.review(WEB, peer("tcp 198.51.100.5 443")),
        ALLOW,
        "a live flow goes on"
    );
    // The guest is gone, and another is behind its port.
    lab.0.add_guest(WEB, "web".parse().unwrap(), None);
    refused(&mut lab, "tcp 198.51.100.5 443");
}

#[test]
fn addresses_and_ports_that_rules_name_stay_open() {
    let mut lab = Lab::new(
        "allow to *.example.test
         allow to 10.0.0.0/8 tcp 443
         allow to 203.0.113.53 udp,tcp 53
         allow to 203.0.113.54
         allow to any tcp 53,8080
         default deny",
    );
    // With names, addresses say nothing of which names may be asked for; `any` does.
    let mut held = Lab::new("allow to *.example.test\nallow to 10.0.0.0/8\ndefault deny");
    assert!(held.may_ask(WEB, "www.example.test") && !held.may_ask(WEB, "some.example"));
    assert!(lab.may_ask(WEB, "some.example"));
    // The address rule allows what the name can't.
    lab.resolve(WEB, "inside.example.test", &["10.0.0.1"]);
    assert_eq!(lab.web("tcp 10.0.0.1 443"), ALLOW);
    assert_eq!(lab.web("tcp 10.0.0.1 80"), DENY);
    // Another resolver has to be named with its port.
    assert_eq!(lab.web("udp 203.0.113.53 53"), ALLOW);
    assert_eq!(lab.web("udp 203.0.113.53 853"), DENY);
    assert_eq!(lab.web("udp 203.0.113.54 443"), ALLOW);
    assert_eq!(lab.web("udp 203.0.113.54 53"), DENY);
    // `any` means what has a name, and never another resolver.
    assert_eq!(lab.web("tcp 203.0.113.1 53"), DENY);
    assert_eq!(lab.web("tcp 203.0.113.1 8080"), DENY);
    lab.resolve(WEB, "some.example", &["203.0.113.1"]);
    assert_eq!(lab.web("tcp 203.0.113.1 8080"), ALLOW);
    assert_eq!(lab.web("tcp 203.0.113.1 53"), DENY);
    let view = lab.view(0);
    assert_eq!((view.nameless, view.resolver), (1, 3));
    // A network of everything is a network.
    let mut lab = Lab::new("allow to *.example.test\nallow to 0.0.0.0/0 udp 123\ndefault deny");
    assert_eq!(lab.web("udp 203.0.113.1 123"), ALLOW);
}

#[test]
fn denied_names_under_an_allowing_default() {
    let mut lab = Lab::new(
        "deny silent to ads.example,*.ads.example tcp\nallow guest group=build to *\ndefault allow",
    );
    // Held to names: what has none is out.
    assert_eq!(lab.web("tcp 203.0.113.1 443"), DENY);
    assert_eq!(lab.web("udp 203.0.113.1 53"), DENY);
    lab.resolve(WEB, "good.example", &["203.0.113.1"]);
    assert_eq!(lab.web("tcp 203.0.113.1 443"), ALLOW);
    assert_eq!(lab.web("udp 203.0.113.1 53"), DENY);
    // The denied name on the same address, then by an alias on another.
    lab.resolve(WEB, "x.ads.example", &["203.0.113.1"]);
    assert_eq!(lab.web("tcp 203.0.113.1 443"), SILENT);
    assert_eq!(lab.web("udp 203.0.113.1 443"), ALLOW);
    let message = writer::addresses("good.example", &["y.ads.example"], &[("203.0.113.2", 60)]);
    lab.0.pin(WEB, &message, at(0));
    assert_eq!(lab.web("tcp 203.0.113.2 443"), SILENT);
    // Only some protocols of it are denied: it may be asked for.
    assert!(lab.may_ask(WEB, "x.ads.example"));
    assert!(lab.may_ask(WEB, "any.example"));
    let mut lab = Lab::new("deny to *.ads.example\ndefault allow");
    assert!(!lab.may_ask(WEB, "x.ads.example"));
    assert!(lab.may_ask(WEB, "ads.example"));
}

#[test]
fn queries_of_guests_without_names() {
    let mut lab = Lab::new("allow guest group=build to 198.51.100.0/24\ndefault deny");
    assert!(lab.may_ask(BUILD, "any.example"), "for what it may reach");
    assert!(!lab.may_ask(WEB, "any.example"), "nothing is allowed to it");
    assert!(!lab.may_ask(PortId(9), "any.example"), "a stranger");
    assert!(!lab.0.has_names(BUILD) && lab.0.has_names(PortId(9)));
    let mut lab = Lab::new("deny guest port=web\nallow to *.example.test\ndefault allow");
    assert!(!lab.may_ask(WEB, "www.example.test"));
    assert!(lab.may_ask(BUILD, "www.example.test") && lab.0.has_names(BUILD));
    lab.0.set_policy(None);
    assert!(lab.may_ask(PortId(9), "x.y") && !lab.0.has_names(PortId(9)));
    assert_eq!(lab.of(PortId(9), "udp 10.0.0.1 53", 0), ALLOW);
    assert_eq!(lab.0.view(at(0)), None);
}

#[test]
fn a_policy_that_comes_later_knows_the_names() {
    let mut state = PolicyState::new(Vec::new());
    state.add_guest(WEB, "web".parse().unwrap(), None);
    let message = writer::addresses("www.example.test", &[], &[("198.51.100.5", 300)]);
    state.pin(WEB, &message, at(0));
    let https = peer("tcp 198.51.100.5 443");
    assert_eq!(state.decide(WEB, https, at(1)), ALLOW);
    let text = "allow to 203.0.113.1\nallow to *.example.test\ndefault deny";
    state.set_policy(Some(Arc::new(parse(text))));
    assert_eq!(state.decide(WEB, https, at(2)), ALLOW);
    // The same rule keeps its count under the next policy, wherever it stands.
    let text = "allow   to *.example.test # first\nallow to 198.51.100.0/24\ndefault deny";
    state.set_policy(Some(Arc::new(parse(text))));
    let flows = |state: &PolicyState| {
        let view = state.view(at(9)).unwrap();
        view.rules.iter().map(|rule| rule.flows).collect::<Vec<_>>()
    };
    assert_eq!(flows(&state), [1, 0]);
    assert_eq!(state.decide(WEB, https, at(3)), ALLOW);
    assert_eq!(flows(&state), [2, 0]);
    state.set_policy(Some(Arc::new(parse("default deny silent"))));
    assert_eq!(state.review(WEB, https), SILENT);
    assert_eq!(flows(&state), [0; 0]);
}

#[test]
fn the_last_denied_are_shown() {
    let mut lab = Lab::new("deny to 203.0.113.0/24\nallow to *.example.test tcp 80\ndefault deny");
    lab.of(WEB, "tcp 203.0.113.1 80", 1);
    lab.of(WEB, "tcp 203.0.113.1 80", 2);
    lab.resolve(WEB, "www.example.test", &["198.51.100.5"]);
    lab.of(WEB, "tcp 198.51.100.5 443", 3);
    lab.may_ask(BUILD, "secret.evil.example");
    let view = lab.view(10);
    let shown: Vec<String> = view
        .denied
        .iter()
        .map(|denied| {
            format!(
                "{} {} {:?} {:?} {:?} {:?} x{} {}s {}",
                denied.guest.as_deref().unwrap_or_default(),
                denied.protocol,
                denied.to,
                denied.to_port,
                denied.name.as_deref(),
                denied.line,
                denied.count,
                denied.secs_ago,
                denied.cause,
            )
        })
        .collect();
    assert_eq!(
        shown,
        [
            "ci dns None None Some(\"secret.evil.example\") None x1 10s default",
            "web tcp Some(198.51.100.5) Some(443) Some(\"www.example.test\") None x1 7s default",
            "web tcp Some(203.0.113.1) Some(80) None Some(1) x2 8s rule",
        ]
    );
    // A scanner has its share of the list and no more.
    for n in 0..100 {
        lab.of(WEB, &format!("tcp 198.51.100.77 {}", 1000 + n), 20);
    }
    let denied = lab.view(20).denied;
    let of_web = denied
        .iter()
        .filter(|denied| denied.guest.as_deref() == Some("web"));
    assert_eq!(of_web.count(), DENIED_PER_GUEST_MAX);
    assert_eq!(denied.len(), DENIED_PER_GUEST_MAX + 1);
    for guest in 10..100 {
        lab.0.add_guest(PortId(guest), "g".parse().unwrap(), None);
        lab.of(PortId(guest), "tcp 198.51.100.77 80", 20);
        assert!(lab.view(20).denied.len() <= DENIED_MAX);
    }
    let json = serde_json::to_string(&lab.view(20)).unwrap();
    assert_eq!(
        serde_json::from_str::<PolicyView>(&json).unwrap(),
        lab.view(20)
    );
    // Two workers' views are one.
    let mut sum = PolicyView::default();
    sum.merge(lab.view(20));
    sum.merge(lab.view(20));
    assert_eq!(sum.rules[0].flows, 2 * lab.view(20).rules[0].flows);
    assert_eq!(sum.denied.len(), DENIED_MAX);
}

#[test]
fn bad_text_is_refused_with_line_and_word() {
    let long_name = "x".repeat(64);
    for (text, shown) in [
        ("", "line 1: default"),
        ("# nothing\n\nallow to 198.51.100.1", "line 3: default"),
        ("default allow\ndefault deny", "line 2: default"),
        ("default", "line 1: default"),
        ("default maybe", "line 1: maybe"),
        ("default allow silent", "line 1: silent"),
        ("default deny silent now", "line 1: now"),
        ("default deny\npermit to any", "line 2: permit"),
        ("allow", "line 1: allow"),
        ("deny silent", "line 1: deny"),
        ("allow silent to any", "line 1: silent"),
        ("deny silent silent", "line 1: silent"),
        ("Allow to any", "line 1: Allow"),
        ("allow guest", "line 1: guest"),
        ("allow to", "line 1: to"),
        ("allow guest web", "line 1: web"),
        ("allow guest port=", "line 1: port="),
        ("allow guest port=a,", "line 1: port=a,"),
        ("allow guest any,port=a", "line 1: any"),
        ("allow guest mac=x", "line 1: mac=x"),
        (&format!("allow guest port={long_name}x"), "line 1: port="),
        ("allow to any guest port=a", "line 1: guest"),
        ("allow to any to any", "line 1: to"),
        ("allow to a.test, b.test", "line 1: a.test,"),
        ("allow to a.test,,b.test", "line 1: a.test,,b.test"),
        ("allow to privat", "line 1: privat"),
        ("allow to 10.0.0.1/8", "line 1: 10.0.0.1/8"),
        ("allow to 10.0.0.0/33", "line 1: 10.0.0.0/33"),
        ("allow to 10.0.0.0/08", "line 1: 10.0.0.0/08"),
        ("allow to 10.0.0.0/+8", "line 1: 10.0.0.0/+8"),
        ("allow to 10.0.0.0/", "line 1: 10.0.0.0/"),
        ("allow to 010.0.0.1", "line 1: 010.0.0.1"),
        ("allow to 10.0.1", "line 1: 10.0.1"),
        ("allow to 2001:db8::/129", "line 1: 2001:db8::/129"),
        (
            "allow to ::ffff:10.0.0.0/104",
            "line 1: ::ffff:10.0.0.0/104",
        ),
        ("allow to ::ffff:10.0.0.1", "line 1: ::ffff:10.0.0.1"),
        ("allow to [2001:db8::1]", "line 1: [2001:db8::1]"),
        ("allow to fe80::1%eth0", "line 1: fe80::1%eth0"),
        ("allow to 10.0.0.1:80", "line 1: 10.0.0.1:80"),
        ("allow to https://a.test", "line 1: https://a.test"),
        (
            "allow to b\u{fc}cher.example",
            "line 1: b\u{fc}cher.example",
        ),
        ("allow to *a.test", "line 1: *a.test"),
        ("allow to a.test 443", "line 1: 443"),
        ("allow to a.test icmp 1", "line 1: 1"),
        ("allow to a.test any 1", "line 1: 1"),
        ("allow to a.test tcp,icmp 1", "line 1: 1"),
        ("allow to a.test sctp", "line 1: sctp"),
        ("allow to a.test tcp 0", "line 1: 0"),
        ("allow to a.test tcp 65536", "line 1: 65536"),
        ("allow to a.test tcp +1", "line 1: +1"),
        ("allow to a.test tcp 2-1", "line 1: 2-1"),
        ("allow to a.test tcp 1-", "line 1: 1-"),
        ("allow to a.test tcp http", "line 1: http"),
        ("allow to a.test tcp 1 2", "line 1: 2"),
        ("allow to a.test#", "line 1: a.test#"),
        ("allow to a.test\u{1b}[2J", "line 1: a.test\\u{1b}[2J"),
    ] {
        let error = format!("{text}\n").parse::<Policy>().unwrap_err();
        assert!(error.to_string().starts_with(shown), "{text}: {error}");
        assert!(error.reason.len() > 8, "{error}");
        assert!(!error.to_string().contains(char::is_control), "{error}");
    }
}

#[test]
fn limits_of_the_text() {
    let refused = |text: &str| text.parse::<Policy>().unwrap_err().reason;
    let rules = |count: usize| "deny to 198.51.100.1\n".repeat(count) + "default allow";
    assert_eq!(parse(&rules(RULES_MAX)).rules().len(), RULES_MAX);
    assert!(refused(&rules(RULES_MAX + 1)).contains("1024"));
    // The last rule there may be works as the first does.
    let full = "deny to 198.51.100.1\n".repeat(RULES_MAX - 1);
    let mut lab = Lab::new(&(full + "deny silent to *.example.test\ndefault allow"));
    lab.resolve(WEB, "a.example.test", &["203.0.113.1"]);
    assert_eq!(lab.web("tcp 203.0.113.1 80"), SILENT);

    let ports = |count: usize| {
        let list: Vec<_> = (1..=count).map(|port| port.to_string()).collect();
        format!("allow to a.test tcp {}\ndefault deny", list.join(","))
    };
    parse(&ports(LIST_MAX));
    assert!(refused(&ports(LIST_MAX + 1)).contains("64"));
    let guests = |count: usize| {
        let list: Vec<_> = (1..=count).map(|port| format!("port=g{port}")).collect();
        format!("allow guest {}\ndefault deny", list.join(","))
    };
    parse(&guests(LIST_MAX));
    assert!(refused(&guests(LIST_MAX + 1)).contains("64"));
    let line = format!("allow to {}\n", ["198.51.100.1"; 64].join(","));
    assert!(line.len() <= LINE_LEN_MAX);
    let destinations = |lines: usize| line.repeat(lines) + "default deny";
    parse(&destinations(DESTINATIONS_MAX / 64));
    assert!(refused(&destinations(DESTINATIONS_MAX / 64 + 1)).contains("4096"));
    let comment = |len: usize| format!("#{}\ndefault deny", "x".repeat(len - 1));
    parse(&comment(LINE_LEN_MAX));
    assert!(refused(&comment(LINE_LEN_MAX + 1)).contains("1024"));
    let empty = |len: usize| "\n".repeat(len - 12) + "default deny";
    parse(&empty(TEXT_LEN_MAX));
    assert!(refused(&empty(TEXT_LEN_MAX + 1)).contains("262144"));
}

/// Rules as the model knows them.
#[derive(Clone, Debug)]
struct ModelRule {
    action: &'static str,
    guests: Option<&'static str>,
    to: Vec<&'static str>,
    protocol: Option<&'static str>,
    ports: Option<(u16, u16)>,
}

impl ModelRule {
    fn text(&self) -> String {
        let mut text = self.action.to_owned();
        if let Some(guests) = self.guests {
            write!(text, " guest {guests}").unwrap();
        }
        let says_more = self.guests.is_some() || self.protocol.is_some();
        if !self.to.is_empty() || !says_more {
            let to = if self.to.is_empty() {
                "any".into()
            } else {
                self.to.join(",")
            };
            write!(text, " to {to}").unwrap();
        }
        if let Some(protocol) = self.protocol {
            write!(text, " {protocol}").unwrap();
            if let Some((first, last)) = self.ports() {
                write!(text, " {first}-{last}").unwrap();
            }
        }
        text
    }

    fn ports(&self) -> Option<(u16, u16)> {
        self.ports
            .filter(|_| matches!(self.protocol, Some("tcp" | "udp")))
    }
}

/// Addresses, whether they are of the Internet, and what is inside. 203.0.113.9 is of the LAN.
const ADDRESSES: [(&str, bool, Option<&str>); 9] = [
    ("198.51.100.1", true, None),
    ("198.51.100.2", true, None),
    ("203.0.113.9", true, None),
    ("10.0.0.1", false, None),
    ("169.254.169.254", false, None),
    ("2001:db8::1", true, None),
    ("fd00::1", false, None),
    ("64:ff9b::c633:6401", true, Some("198.51.100.1")),
    ("64:ff9b::a00:1", false, Some("10.0.0.1")),
];
const NAMES: [&str; 5] = ["a.test", "b.a.test", "c.b.a.test", "b.test", "d.example"];
const DESTINATIONS: [&str; 15] = [
    "any",
    "internet",
    "private",
    "metadata",
    "198.51.100.1",
    "198.51.100.0/24",
    "0.0.0.0/0",
    "10.0.0.0/8",
    "2001:db8::/32",
    "::/0",
    "64:ff9b::/96",
    "a.test",
    "*.a.test",
    "*.test",
    "*",
];

/// Whether a written network holds an address, bit by bit.
fn in_network(network: &str, address: IpAddr) -> bool {
    let bits = |address: IpAddr| -> String {
        match address {
            IpAddr::V4(address) => format!("4{:032b}", Ipv4Addr::to_bits(address)),
            IpAddr::V6(address) => format!("6{:0128b}", Ipv6Addr::to_bits(address)),
        }
    };
    let (first, prefix) = network.split_once('/').unwrap_or((network, "999"));
    let first = bits(first.parse().unwrap());
    let len = first.len().min(1 + prefix.parse::<usize>().unwrap());
    bits(address).get(..len) == Some(&first[..len])
}

fn is_name(word: &str) -> bool {
    word.starts_with('*') || word.ends_with(".test")
}

fn name_fits(pattern: &str, name: &str) -> bool {
    match pattern.strip_prefix('*') {
        Some(end) => name.ends_with(end) && name.len() > end.len(),
        None => pattern == name,
    }
}

/// The answers a guest got: question, alias, address, end of life.
type Answers = Vec<(
    PortId,
    &'static str,
    Option<&'static str>,
    &'static str,
    i64,
)>;

struct Model<'a> {
    rules: &'a [ModelRule],
    default: &'static str,
    answers: &'a Answers,
}

impl Model<'_> {
    fn about(&self, guest: PortId) -> impl Iterator<Item = &ModelRule> {
        self.rules.iter().filter(move |rule| match rule.guests {
            None | Some("any") => true,
            Some(list) => list.contains(if guest == WEB {
                "port=web"
            } else {
                "group=build"
            }),
        })
    }

    /// The rules of the module's head, one after the other.
    fn decide(&self, guest: PortId, peer: &Peer, now: i64) -> Verdict {
        let text = peer.address.to_string();
        let &(_, internet, inside) = ADDRESSES.iter().find(|known| known.0 == text).unwrap();
        let inside: Option<IpAddr> = inside.map(|inside| inside.parse().unwrap());
        let held = self
            .about(guest)
            .any(|rule| rule.to.iter().any(|word| is_name(word)));
        let live: Vec<_> = (self.answers.iter())
            .filter(|answer| (answer.0, answer.3) == (guest, &*text) && answer.4 > now)
            .collect();
        let named = internet && text != "203.0.113.9" && !live.is_empty();
        let resolver = held && matches!(peer.port, Some(53 | 853));
        let is = |word: &str, address: IpAddr| match word {
            "private" => ["10.0.0.0/8", "fc00::/7"]
                .iter()
                .any(|net| in_network(net, address)),
            "metadata" => in_network("169.254.0.0/16", address),
            _ => in_network(word, address),
        };
        for rule in self.about(guest) {
            let protocol = match peer.protocol {
                Protocol::Tcp => "tcp",
                Protocol::Udp => "udp",
                Protocol::Icmp => "icmp",
                Protocol::Other => "other",
            };
            let listed = |port: u16| {
                rule.ports()
                    .is_some_and(|(first, last)| first <= port && port <= last)
            };
            if rule
                .protocol
                .is_some_and(|this| this != protocol && this != "any")
                || rule.ports().is_some() && !peer.port.is_some_and(listed)
            {
                continue;
            }
            let all = ["any"];
            let words = if rule.to.is_empty() {
                &all[..]
            } else {
                &rule.to
            };
            let deny = rule.action != "allow";
            for word in words {
                let matches = match *word {
                    "any" => deny || !resolver && (!held || named),
                    "internet" => internet && (deny || !resolver && (!held || named)),
                    word if is_name(word) && deny => live.iter().any(|answer| {
                        name_fits(word, answer.1)
                            || answer.2.is_some_and(|alias| name_fits(word, alias))
                    }),
                    word if is_name(word) => {
                        named && !resolver && live.iter().any(|answer| name_fits(word, answer.1))
                    }
                    word if deny => {
                        is(word, peer.address) || inside.is_some_and(|inside| is(word, inside))
                    }
                    word => {
                        let explicit = word == "64:ff9b::/96";
                        // All that is listed together is allowed together.
                        let inside_too = inside.is_none_or(|inside| {
                            explicit
                                || inside.to_string().starts_with("198")
                                || words.iter().any(|word| {
                                    !is_name(word)
                                        && !["any", "internet"].contains(word)
                                        && is(word, inside)
                                })
                        });
                        is(word, peer.address)
                            && inside_too
                            && (!resolver || peer.port.is_some_and(listed))
                    }
                };
                if matches {
                    return match rule.action {
                        "allow" => ALLOW,
                        "deny" => DENY,
                        _ => SILENT,
                    };
                }
            }
        }
        match self.default {
            "deny silent" => SILENT,
            "allow" if !resolver && (!held || named) => ALLOW,
            _ => DENY,
        }
    }
}

fn model_rule() -> impl Strategy<Value = ModelRule> {
    let action = prop::sample::select(vec!["allow", "deny", "deny silent"]);
    let guests = prop::option::of(prop::sample::select(vec![
        "any",
        "port=web",
        "group=build",
        "port=web,group=build",
        "port=other",
    ]));
    let to = prop::sample::subsequence(DESTINATIONS.to_vec(), 0..3);
    let protocol = prop::option::of(prop::sample::select(vec!["tcp", "udp", "icmp", "any"]));
    let ports = prop::option::of(prop::sample::select(vec![(53, 53), (80, 443), (1, 65535)]));
    (action, guests, to, protocol, ports).prop_map(|(action, guests, to, protocol, ports)| {
        ModelRule {
            action,
            guests,
            to,
            protocol,
            ports,
        }
    })
}

fn answers() -> impl Strategy<Value = Answers> {
    let one = (
        prop::sample::select(vec![WEB, BUILD]),
        prop::sample::select(NAMES.to_vec()),
        prop::option::of(prop::sample::select(vec![
            "a.test",
            "x.a.test",
            "edge.example",
        ])),
        prop::sample::select(ADDRESSES.map(|known| known.0).to_vec()),
        prop::sample::select(vec![100i64, 200]),
    );
    prop::collection::vec(one, 0..8)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// Every guest, address, protocol and port, at two times: the compiled policy and the model agree.
    #[test]
    fn decisions_agree_with_the_model(
        rules in prop::collection::vec(model_rule(), 0..7),
        default in prop::sample::select(vec!["allow", "deny", "deny silent"]),
        answers in answers(),
        policy_first: bool,
    ) {
        let mut text = format!("default {default}\n");
        for rule in &rules {
            writeln!(text, "{}", rule.text()).unwrap();
        }
        let policy = Arc::new(parse(&text));
        let mut state = PolicyState::new(vec![Cidr::new([203, 0, 113, 0].into(), 24).unwrap()]);
        state.add_guest(WEB, "web".parse().unwrap(), None);
        state.add_guest(BUILD, "ci".parse().unwrap(), "build".parse().ok());
        if policy_first {
            state.set_policy(Some(Arc::clone(&policy)));
        }
        let mut known: Answers = Vec::new();
        for &(guest, name, alias, address, ends) in &answers {
            // Its own name for an alias is no answer.
            let alias = alias.filter(|alias| *alias != name);
            let list = [(address, ends as u32)];
            let message = writer::addresses(name, alias.as_slice(), &list);
            state.pin(guest, &message, at(0));
            // The aliases of the newest answer count, and the longest life.
            let same = |old: &&mut (PortId, &str, Option<&str>, &str, i64)| (old.0, old.1, old.3) == (guest, name, address);
            match known.iter_mut().find(same) {
                Some(old) => (old.2, old.4) = (alias, old.4.max(ends)),
                None => known.push((guest, name, alias, address, ends)),
            }
        }
        state.set_policy(Some(policy));
        let model = Model { rules: &rules, default, answers: &known };
        let mut tally = BTreeMap::new();
        for now in [50, 150] {
            for guest in [WEB, BUILD] {
                for (address, ..) in ADDRESSES {
                    for flow in ["tcp 53", "tcp 443", "udp 53", "udp 853", "udp 9", "icmp", "other"] {
                        let (protocol, port) = flow.split_once(' ').unwrap_or((flow, ""));
                        let peer = peer(format!("{protocol} {address} {port}").trim_end());
                        let expected = model.decide(guest, &peer, now);
                        let found = state.decide(guest, peer, at(now));
                        prop_assert_eq!(found, expected, "{:?} {:?} at {}\n{}{:?}", guest, peer, now, text, known);
                        if now == 50 {
                            prop_assert_eq!(state.review(guest, peer), expected);
                        }
                        *tally.entry(guest).or_insert(0u64) += 1;
                    }
                }
            }
        }
        let view = state.view(at(300)).unwrap();
        let counted = view.rules.iter().map(|rule| rule.flows).sum::<u64>();
        let counted = counted + view.default_flows + view.nameless + view.resolver + view.stranger;
        prop_assert_eq!(counted, tally.values().sum::<u64>(), "every decision is counted once");
    }

    /// A query is refused exactly where no answer to it could be of use.
    #[test]
    fn refused_queries_are_of_no_use(
        rules in prop::collection::vec(model_rule(), 0..7),
        default in prop::sample::select(vec!["allow", "deny"]),
    ) {
        let mut text = format!("default {default}\n");
        for rule in &rules {
            writeln!(text, "{}", rule.text()).unwrap();
        }
        for name in NAMES {
            let mut state = PolicyState::new(Vec::new());
            state.add_guest(WEB, "web".parse().unwrap(), None);
            state.set_policy(Some(Arc::new(parse(&text))));
            if !state.has_names(WEB) || state.decide_query(WEB, &writer::query(name, A), at(0)) {
                continue;
            }
            // What a literal address could not do, the name can't either.
            for (address, ..) in ADDRESSES {
                for flow in ["tcp 443", "udp 9", "icmp"] {
                    let (protocol, port) = flow.split_once(' ').unwrap_or((flow, ""));
                    let peer = peer(format!("{protocol} {address} {port}").trim_end());
                    let before = state.review(WEB, peer);
                    state.pin(WEB, &writer::addresses(name, &[], &[(address, 60)]), at(0));
                    let after = state.review(WEB, peer);
                    prop_assert!(before == ALLOW || after != ALLOW, "{} {:?}\n{}", name, peer, text);
                    state.add_guest(WEB, "web".parse().unwrap(), None);
                }
            }
        }
    }

    /// Text of the grammar's own words in any order: read or refused, never a panic.
    #[test]
    fn text_never_panics(words in prop::collection::vec(prop::sample::select(vec![
        "allow", "deny", "silent", "default", "guest", "to", "any", "port=web", "group=", "tcp", "udp,tcp", "icmp",
        "53", "1-2", ",", "*.a.test", "*", "10.0.0.0/8", "::/0", "::ffff:1.2.3.4", "private", "#", "\n", "\n", "\u{e4}",
        "\u{0}", "a#b",
    ]), 0..40), glue in prop::sample::select(vec![" ", "", "\t"])) {
        let _ = words.join(glue).parse::<Policy>();
    }

    #[test]
    fn any_text_never_panics(text: String) {
        if let Err(error) = text.parse::<Policy>() {
            prop_assert!(!error.to_string().contains(char::is_control));
        }
    }
}

#[test]
fn aaaa_answers_pin_ipv6() {
    let mut lab = Lab::new("allow to *.example.test\ndefault deny");
    lab.resolve(WEB, "www.example.test", &["2001:db8::5"]);
    assert_eq!(lab.web("tcp 2001:db8::5 443"), ALLOW);
    assert_eq!(lab.web("tcp 2001:db8::6 443"), DENY);
    assert!(
        lab.0
            .decide_query(WEB, &writer::query("www.example.test", AAAA), at(0))
    );
}
