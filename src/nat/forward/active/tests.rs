//! Forwards over a scripted host and a guest made of frames, under a virtual clock.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;

use super::*;
use crate::dhcp::DhcpConfig;
use crate::nat::forward::sessions::ports_to_try;
use crate::nat::testing::{
    FakeUplink, FrameLog, GATEWAY_MAC, GUEST, GUEST_MAC, GUEST6, guest_ipv6, guest_tcp, guest_udp,
    guest_udp_train, lan, parse,
};
use crate::nat::{Nat, NatConfig};
use crate::offload::{Gso, Offload};
use crate::wire::{self, Body, ETHERTYPE_ARP, Transport, write_ethernet};

const CLIENT: &str = "198.51.100.9:40000";

fn at(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

struct Lab {
    nat: Nat,
    up: FakeUplink,
    log: FrameLog,
    now: Instant,
    dropped: Vec<DropReason>,
    last: u32,
}

impl Lab {
    fn new() -> Self {
        let range = DhcpConfig::new(lan()).range();
        let leases = LeaseTable::new(range, &lan()).unwrap();
        let common = Common::new(&lan(), Arc::default());
        Self::of(common, Arc::new(Mutex::new(leases)))
    }

    fn of(common: Common, leases: Arc<Mutex<LeaseTable>>) -> Self {
        let config = NatConfig {
            lan: lan(),
            flows_max: 4_096,
            udp: Default::default(),
            host: Default::default(),
        };
        let now = Instant::from_secs(100);
        let mut nat = Nat::with(config, common, now);
        nat.forwards_mut().set_leases(leases);
        Self {
            nat,
            up: FakeUplink::new(7),
            log: FrameLog::default(),
            now,
            dropped: Vec::new(),
            last: 0,
        }
    }

    /// Adds a forward whose sockets listen at `at`.
    fn add(&mut self, text: &str, listeners: &[ListenerKind]) -> (ForwardId, Vec<SockId>) {
        self.last += 1;
        let id = ForwardId(self.last);
        let spec: ForwardSpec = text.parse().unwrap();
        ForwardSetCheck::check(&spec);
        let mut sockets = Vec::new();
        self.nat
            .add_forward((id, &spec), listeners, &mut self.up, |up, n, owner| {
                let socket = match listeners[n] {
                    ListenerKind::Udp(at) => up.bind(at, owner),
                    ListenerKind::Tcp(_) | ListenerKind::Unix(_) => up.listen(owner),
                };
                sockets.push(socket);
                Ok(Some(socket))
            })
            .unwrap();
        (id, sockets)
    }

    fn add_tcp(&mut self, text: &str, listen: &str) -> (ForwardId, SockId) {
        let (id, sockets) = self.add(text, &[ListenerKind::Tcp(at(listen))]);
        (id, sockets[0])
    }

    fn add_udp(&mut self, text: &str, listen: &str) -> (ForwardId, SockId) {
        let (id, sockets) = self.add(text, &[ListenerKind::Udp(at(listen))]);
        (id, sockets[0])
    }

    /// What the worker does in a turn, until nothing is left to do.
    fn settle(&mut self) {
        for _ in 0..1_000 {
            let event = self.up.poll_event();
            if let Some((owner, ready)) = event {
                let mut drops = |reason| self.dropped.push(reason);
                let to = (&mut self.up, &mut self.log);
                self.nat
                    .handle_ready(owner, ready, self.now, to, &mut drops);
            }
            self.nat.flush(self.now, &mut self.up, &mut self.log);
            if event.is_none() {
                break;
            }
        }
        if self.nat.poll_timeout().is_some_and(|due| due <= self.now) {
            self.nat
                .handle_timeout(self.now, &mut self.up, &mut self.log);
        }
    }

    fn wait(&mut self, time: Duration) {
        let end = self.now + time;
        while let Some(due) = self.nat.poll_timeout().filter(|&due| due <= end) {
            // A timer that is due may be late by a tick, never in the past for ever.
            self.now = due.max(self.now + Duration::from_millis(1));
            self.settle();
        }
        self.now = end.max(self.now);
        self.settle();
    }

    fn guest_sends(&mut self, frame: &[u8], offload: Offload) -> Result<(), DropReason> {
        let packet = parse(frame, offload);
        self.nat.observe(&packet, self.now);
        if let Body::Arp(_) = packet.body {
            self.nat.flush(self.now, &mut self.up, &mut self.log);
            return Ok(());
        }
        let to = (&mut self.up, &mut self.log);
        let handled = self.nat.handle_packet(&packet, self.now, to);
        self.settle();
        handled
    }

    /// The guest says that it has an address.
    fn answer_arp(&mut self, mac: Mac, address: Ipv4Addr) {
        let mut frame = vec![0; 60];
        write_ethernet(&mut frame, GATEWAY_MAC, mac, ETHERTYPE_ARP);
        frame[14..22].copy_from_slice(&[0, 1, 8, 0, 6, 4, 0, 2]);
        frame[22..28].copy_from_slice(&mac.0);
        frame[28..32].copy_from_slice(&address.octets());
        let _ = self.guest_sends(&frame, Offload::default());
    }

    /// The guest says that it has its IPv6 address.
    fn answer_ndp(&mut self) {
        let to = lan().v6.unwrap().link_local;
        let mut message = vec![136, 0, 0, 0, 0x60, 0, 0, 0];
        message.extend_from_slice(&GUEST6.octets());
        let sum = !wire::checksum::transport(GUEST6.into(), to.into(), 58, &message);
        message[2..4].copy_from_slice(&sum.to_be_bytes());
        let frame = guest_ipv6(GUEST6, to, 58, 255, &message);
        let _ = self.guest_sends(&frame, Offload::default());
    }

    /// The next IP packet to the guest: its ends, its MAC, and what it carries. ARP is passed over.
    fn next(&mut self) -> Option<(SocketAddr, SocketAddr, Mac, Vec<u8>, Offload)> {
        loop {
            let (frame, offload) = self.log.pop()?;
            let packet = parse(&frame, offload);
            let Some(ip) = packet.ip() else {
                continue;
            };
            let (source, destination, payload) = match &ip.transport {
                Transport::Tcp(tcp) => (tcp.source_port, tcp.destination_port, tcp.payload),
                Transport::Udp(udp) => (udp.source_port, udp.destination_port, udp.payload),
                Transport::Icmp(_) => continue,
                Transport::Fragment => (0, 0, &ip.packet[ip.header_len..]),
                other => panic!("{other:?}"),
            };
            return Some((
                SocketAddr::new(ip.source, source),
                SocketAddr::new(ip.destination, destination),
                packet.destination,
                payload.to_vec(),
                offload,
            ));
        }
    }

    /// The ends of the SYN that the guest gets.
    fn next_syn(&mut self) -> (SocketAddr, SocketAddr) {
        let (from, to, mac, ..) = self.next().expect("a SYN");
        assert_eq!(mac, GUEST_MAC);
        (from, to)
    }

    fn is_silent(&mut self) -> bool {
        self.next().is_none()
    }

    fn counters(&self, id: ForwardId) -> ForwardCounters {
        let of = self.nat.forwards().find(|(of, _)| *of == id);
        of.expect("the forward is there").1
    }
}

/// The forwards of these tests are such as a network takes.
struct ForwardSetCheck;

impl ForwardSetCheck {
    fn check(spec: &ForwardSpec) {
        super::super::ForwardSet::default().check(spec).unwrap();
        super::super::ForwardSet::check_on(spec, &lan()).unwrap();
    }
}

#[test]
fn a_connection_waits_for_the_guest_to_be_found_and_goes_on_to_it() {
    let mut lab = Lab::new();
    let (id, listener) = lab.add_tcp("8080:192.168.122.2:80", "0.0.0.0:8080");
    lab.up.knock(listener, Some(at(CLIENT)));
    lab.settle();
    let (arp, _) = lab.log.pop().expect("a question");
    assert_eq!(arp[12..14], [8, 6]);
    assert_eq!(arp[38..42], GUEST.octets());
    assert!(lab.is_silent());
    assert_eq!(lab.counters(id).waiting, 1);
    lab.answer_arp(GUEST_MAC, GUEST);
    // The client's own port, as it is free at the gateway.
    assert_eq!(
        lab.next_syn(),
        (at("192.168.122.1:40000"), at("192.168.122.2:80"))
    );
    let counters = lab.counters(id);
    assert_eq!(
        (counters.opened, counters.waiting, counters.refused),
        (1, 0, 0)
    );
    // A second client with the same port, and one with a port of the gateway's services.
    for client in ["203.0.113.5:40000", "198.51.100.9:53"] {
        lab.up.knock(listener, Some(at(client)));
        lab.settle();
        let (from, _) = lab.next_syn();
        assert_eq!(from.ip(), at("192.168.122.1:0").ip());
        assert!(from.port() >= 49_152, "{from}");
    }
}

#[test]
fn bytes_pass_both_ways_and_removal_leaves_the_connection() {
    let mut lab = Lab::new();
    let (id, listener) = lab.add_tcp("8080:192.168.122.2:80", "0.0.0.0:8080");
    lab.answer_arp(GUEST_MAC, GUEST);
    lab.up.knock(listener, Some(at(CLIENT)));
    lab.settle();
    let (syn, offload) = lab.log.pop().unwrap();
    let packet = parse(&syn, offload);
    let Some(Transport::Tcp(tcp)) = packet.ip().map(|ip| ip.transport) else {
        panic!("{packet:?}");
    };
    let (guest, shown) = (at("192.168.122.2:80"), at("192.168.122.1:40000"));
    let acknowledged = tcp.sequence.wrapping_add(1);
    let answer = |flags, sequence, data: &[u8]| {
        guest_tcp(
            guest,
            shown,
            (sequence, acknowledged),
            (flags, 64_000),
            &[],
            data,
        )
    };
    let syn_ack = answer(0x12, 5_000, b"");
    lab.guest_sends(&syn_ack, Offload::default()).unwrap();
    lab.nat.remove_forward(id, &mut lab.up);
    lab.guest_sends(&answer(0x18, 5_001, b"hello"), Offload::default())
        .unwrap();
    let (socket, _) = lab.up.open_sockets()[0];
    assert_eq!(lab.up.peer_recv(socket), b"hello");
    lab.up.peer_send(socket, b"world");
    lab.settle();
    let mut received = Vec::new();
    while let Some((from, _, _, payload, _)) = lab.next() {
        assert_eq!(from, shown);
        received.extend(payload);
    }
    assert_eq!(received, b"world");
    assert_eq!(lab.up.open_count(), 1, "the listener is closed");
    assert_eq!(lab.nat.forwards().count(), 0);
}

#[test]
fn a_client_whose_guest_is_not_there_is_reset_after_five_seconds() {
    let mut lab = Lab::new();
    let (by_address, first) = lab.add_tcp("8080:192.168.122.2:80", "0.0.0.0:8080");
    let (by_name, second) = lab.add_tcp("8081:nobody:80", "0.0.0.0:8081");
    for listener in [first, second] {
        lab.up.knock(listener, Some(at(CLIENT)));
    }
    lab.settle();
    lab.wait(PARKED_TIME - Duration::from_millis(100));
    assert!(lab.up.closed.is_empty());
    assert_eq!(lab.counters(by_name).waiting, 1);
    lab.wait(Duration::from_millis(500));
    let aborted: Vec<_> = lab.up.closed.iter().map(|closed| closed.aborted).collect();
    assert_eq!(aborted, [true, true]);
    for id in [by_address, by_name] {
        let counters = lab.counters(id);
        assert_eq!((counters.refused, counters.waiting), (1, 0));
    }
    assert!(lab.is_silent());
    lab.wait(Duration::from_secs(60));
    assert_eq!(lab.nat.poll_timeout(), None, "nothing is left to be done");
}

#[test]
fn only_the_holder_of_the_lease_is_found() {
    let mut lab = Lab::new();
    let leases = {
        let range = DhcpConfig::new(lan()).range();
        Arc::new(Mutex::new(LeaseTable::new(range, &lan()).unwrap()))
    };
    lab.nat.forwards_mut().set_leases(Arc::clone(&leases));
    let address = leases
        .lock()
        .unwrap()
        .attach(GUEST_MAC, PortId(1), None, lab.now)
        .unwrap();
    let (_, listener) = lab.add_tcp("8080:[52:54:00:00:00:02]:80", "0.0.0.0:8080");
    lab.up.knock(listener, Some(at(CLIENT)));
    lab.settle();
    lab.answer_arp(Mac([0x52, 0x54, 0, 0, 0, 0x66]), address);
    assert!(lab.is_silent(), "somebody else claims the address");
    lab.answer_arp(GUEST_MAC, address);
    let (_, to) = lab.next_syn();
    assert_eq!(to, SocketAddr::new(address.into(), 80));
}

#[test]
fn a_range_maps_port_by_port() {
    let mut lab = Lab::new();
    lab.answer_arp(GUEST_MAC, GUEST);
    let kinds: Vec<_> = (8000..=8002)
        .map(|port| ListenerKind::Tcp(SocketAddr::new(at("127.0.0.1:0").ip(), port)))
        .collect();
    let (_, sockets) = lab.add("127.0.0.1:8000-8002:192.168.122.2:90-92", &kinds);
    for (n, &listener) in sockets.iter().enumerate() {
        lab.up.knock(listener, Some(at("127.0.0.1:50000")));
        lab.settle();
        let (_, to) = lab.next_syn();
        assert_eq!(to.port(), 90 + n as u16);
    }
}

#[test]
fn the_guest_sees_the_client_where_it_can_answer_to_it() {
    let mut lab = Lab::new();
    lab.answer_arp(GUEST_MAC, GUEST);
    let forward = "8080:192.168.122.2:80,client-address";
    let (_, listener) = lab.add_tcp(forward, "0.0.0.0:8080");
    for (client, shown) in [
        (CLIENT, CLIENT),
        ("127.0.0.1:40001", "192.168.122.1:40001"),
        ("192.168.122.77:40002", "192.168.122.1:40002"),
        ("[2001:db8::9]:40003", "192.168.122.1:40003"),
    ] {
        lab.up.knock(listener, Some(at(client)));
        lab.settle();
        assert_eq!(lab.next_syn().0, at(shown), "{client}");
    }
    // Who has no address at all.
    let (_, listener) = {
        let (id, sockets) = lab.add(
            "unix:/x-192.168.122.2:80",
            &[ListenerKind::Unix(AllowGuests(false))],
        );
        (id, sockets[0])
    };
    lab.up.knock(listener, None);
    lab.settle();
    assert_eq!(lab.next_syn().0.ip(), at("192.168.122.1:0").ip());
}

#[test]
fn an_ipv6_guest_is_reached_from_the_gateways_ipv6_address() {
    let mut lab = Lab::new();
    let forward = "8080:[fd00:6c61:6e:1:5054:ff:fe00:2]:80";
    let (_, listener) = lab.add_tcp(forward, "0.0.0.0:8080");
    lab.up.knock(listener, Some(at(CLIENT)));
    lab.settle();
    assert!(
        lab.log
            .frames
            .iter()
            .any(|(frame, _)| frame[..2] == [0x33, 0x33])
    );
    lab.log.frames.clear();
    lab.answer_ndp();
    assert_eq!(
        lab.next_syn(),
        (
            at("[fd00:6c61:6e:1::1]:40000"),
            SocketAddr::new(GUEST6.into(), 80)
        )
    );
}

#[test]
fn a_listener_rests_after_clients_that_may_not_connect() {
    let mut lab = Lab::new();
    lab.answer_arp(GUEST_MAC, GUEST);
    let kinds = [ListenerKind::Unix(AllowGuests(false))];
    let (id, sockets) = lab.add("unix:/x-192.168.122.2:80", &kinds);
    lab.up.open_error = Some(HostError::Prohibited);
    lab.up.knock(sockets[0], None);
    lab.settle();
    assert!(lab.up.poll_event().is_none(), "it does not spin");
    lab.wait(REST / 2);
    assert_eq!(lab.counters(id).opened, 0);
    lab.wait(REST);
    assert_eq!(lab.counters(id).opened, 1);
}

#[test]
fn without_files_and_at_its_limit_a_listener_rests_and_comes_back() {
    let mut lab = Lab::new();
    lab.answer_arp(GUEST_MAC, GUEST);
    let (id, listener) = lab.add_tcp("8080:192.168.122.2:80", "0.0.0.0:8080");
    lab.up.open_max = 1;
    lab.up.knock(listener, Some(at(CLIENT)));
    lab.settle();
    assert!(lab.up.poll_event().is_none(), "it does not spin");
    lab.up.open_max = usize::MAX;
    lab.wait(REST * 2);
    assert_eq!(lab.counters(id).opened, 1);

    let (id, listener) = lab.add_tcp("8081:192.168.122.3:80", "0.0.0.0:8081");
    for n in 0..2 * FORWARD_PARKED_MAX as u16 {
        lab.up
            .knock(listener, Some(SocketAddr::new(at(CLIENT).ip(), 20_000 + n)));
    }
    lab.settle();
    assert_eq!(lab.counters(id).waiting, FORWARD_PARKED_MAX);
    lab.wait(Duration::from_secs(6));
    let counters = lab.counters(id);
    assert_eq!(counters.refused as usize, FORWARD_PARKED_MAX);
    assert_eq!(counters.waiting, FORWARD_PARKED_MAX, "the second half");
    lab.wait(Duration::from_secs(6));
    assert_eq!(lab.counters(id).waiting, 0);
}

#[test]
fn a_client_that_goes_away_while_it_waits_is_forgotten() {
    let mut lab = Lab::new();
    let (id, listener) = lab.add_tcp("8080:192.168.122.2:80", "0.0.0.0:8080");
    lab.up.knock(listener, Some(at(CLIENT)));
    lab.settle();
    let (socket, _) = *lab.up.open_sockets().last().unwrap();
    // What it sent, and its FIN, keep.
    lab.up.peer_send(socket, b"GET /");
    lab.up.peer_shutdown(socket);
    lab.settle();
    assert_eq!(lab.counters(id).waiting, 1);
    lab.up.peer_break(socket, HostError::Reset);
    lab.settle();
    assert_eq!(lab.counters(id).waiting, 0);
    assert_eq!(lab.up.open_count(), 1);
}

#[test]
fn udp_has_a_session_for_each_client_and_answers_from_where_it_was_asked() {
    let mut lab = Lab::new();
    let (id, socket) = lab.add_udp("5353:192.168.122.2:53/udp", "0.0.0.0:5353");
    lab.up.deliver(socket, at(CLIENT), b"one", None);
    lab.up.mark_destination(socket, at("198.51.100.1:0").ip());
    lab.settle();
    assert!(lab.is_silent());
    lab.answer_arp(GUEST_MAC, GUEST);
    let (from, to, mac, payload, _) = lab.next().expect("what waited");
    assert_eq!(
        (from, to),
        (at("192.168.122.1:40000"), at("192.168.122.2:53"))
    );
    assert_eq!((mac, &*payload), (GUEST_MAC, &b"one"[..]));
    // Another client with the same port.
    lab.up
        .deliver(socket, at("203.0.113.5:40000"), b"two", None);
    lab.up.mark_destination(socket, at("198.51.100.77:0").ip());
    lab.settle();
    let (other, ..) = lab.next().unwrap();
    assert!(other.port() >= 49_152);

    for (shown, client, host) in [
        (from, CLIENT, "198.51.100.1:0"),
        (other, "203.0.113.5:40000", "198.51.100.77:0"),
    ] {
        let frame = guest_udp(to, shown, 64, b"answer");
        lab.guest_sends(&frame, Offload::default()).unwrap();
        let sent = lab.up.sent.pop_front().unwrap();
        assert_eq!((sent.socket, sent.to), (socket, at(client)));
        assert_eq!(sent.from, Some(at(host).ip()));
        assert_eq!(sent.payload, b"answer");
    }
    let (train, offload) = guest_udp_train(to, from, 100, &[7; 250]);
    lab.guest_sends(&train, offload).unwrap();
    assert_eq!(lab.up.sent.pop_front().unwrap().segment, Some(100));
    // To where no session is: the gateway's own closed port.
    let stray = guest_udp(to, at("192.168.122.1:1234"), 64, b"x");
    assert!(lab.guest_sends(&stray, Offload::default()).is_err());
    assert_eq!(lab.counters(id).opened, 2);
    assert_eq!(lab.nat.flows().1, 2);
    lab.nat.remove_forward(id, &mut lab.up);
    assert_eq!((lab.nat.flows().1, lab.up.open_count()), (0, 0));
}

#[test]
fn udp_sessions_end_by_class_and_trains_pass() {
    let mut lab = Lab::new();
    lab.answer_arp(GUEST_MAC, GUEST);
    let (_, socket) = lab.add_udp("5000:192.168.122.2:5000/udp", "127.0.0.1:5000");
    lab.up
        .deliver(socket, at("127.0.0.1:41000"), &[1; 2_500], Some(1_000));
    lab.settle();
    let (from, to, _, payload, offload) = lab.next().unwrap();
    assert_eq!((payload.len(), offload.gso), (2_500, Gso::Udp(1_000)));
    // Too long for the LAN: in fragments.
    lab.up
        .deliver(socket, at("127.0.0.1:41000"), &[2; 4_000], None);
    lab.settle();
    let mut len = 0;
    while let Some((.., payload, _)) = lab.next() {
        assert!(payload.len() <= 1_480);
        len += payload.len();
    }
    assert_eq!(len, 4_008);
    // Without an answer two minutes, with one five, after the last use.
    lab.wait(Duration::from_secs(119));
    assert_eq!(lab.nat.flows().1, 1);
    let frame = guest_udp(to, from, 64, b"answer");
    lab.guest_sends(&frame, Offload::default()).unwrap();
    lab.wait(Duration::from_secs(299));
    assert_eq!(lab.nat.flows().1, 1);
    lab.wait(Duration::from_secs(2));
    assert_eq!(lab.nat.flows().1, 0);
    lab.up.deliver(socket, at("127.0.0.1:41000"), b"", None);
    lab.settle();
    lab.answer_arp(GUEST_MAC, GUEST);
    let (.., payload, _) = lab.next().expect("an empty datagram is one, too");
    assert!(payload.is_empty());
    lab.wait(Duration::from_secs(121));
    assert_eq!(lab.nat.flows().1, 0);
}

#[test]
fn the_short_end_of_a_train_too_long_for_the_lan_comes_whole() {
    let mut lab = Lab::new();
    lab.answer_arp(GUEST_MAC, GUEST);
    lab.answer_ndp();
    for (listen, guest) in [
        ("127.0.0.1:5000", SocketAddr::new(GUEST.into(), 5_000)),
        ("[::1]:5000", SocketAddr::new(GUEST6.into(), 5_000)),
    ] {
        let client = SocketAddr::new(at(listen).ip(), 41_000);
        let (_, socket) = lab.add_udp(&format!("{listen}:{guest}/udp"), listen);
        lab.up.deliver(socket, client, &[3; 4_100], Some(2_000));
        lab.settle();
        // Two fragments for each long datagram. The end as a fragment on its own would be an atomic one
        // (RFC 8021), which no sender has a reason for.
        for _ in 0..4 {
            let (from, ..) = lab.next().expect("a fragment");
            assert_eq!(from.port(), 0, "{guest}: it was cut");
        }
        let (from, to, mac, payload, offload) = lab.next().expect("the end");
        assert_eq!((from.port(), to, mac), (41_000, guest, GUEST_MAC));
        assert_eq!((&*payload, offload), (&[3; 100][..], Offload::default()));
        assert!(lab.is_silent());
    }
    assert!(lab.dropped.is_empty());
}

#[test]
fn forged_clients_push_out_each_other_and_not_who_talks() {
    let mut lab = Lab::new();
    lab.answer_arp(GUEST_MAC, GUEST);
    let (_, socket) = lab.add_udp("5000:192.168.122.2:5000/udp", "127.0.0.1:5000");
    lab.up.deliver(socket, at(CLIENT), b"hello", None);
    lab.settle();
    let (from, to, ..) = lab.next().unwrap();
    let frame = guest_udp(to, from, 64, b"answer");
    lab.guest_sends(&frame, Offload::default()).unwrap();
    lab.log.keep = false;
    for n in 0..2 * super::super::sessions::SESSIONS_MAX as u32 {
        let client = SocketAddr::new(Ipv4Addr::from_bits(0x0b00_0000 + n).into(), 1_000);
        lab.up.deliver(socket, client, b"flood", None);
        if n % 512 == 0 {
            lab.settle();
        }
    }
    lab.settle();
    assert_eq!(lab.nat.flows().1, super::super::sessions::SESSIONS_MAX);
    lab.up.sent.clear();
    lab.guest_sends(&frame, Offload::default()).unwrap();
    assert_eq!(lab.up.sent.pop_front().unwrap().to, at(CLIENT));
}

/// A published port that is flooded costs other forwards nothing, and no forward passes its own limit.
#[test]
fn a_flood_of_one_forward_costs_the_sessions_of_no_other() {
    let mut lab = Lab::new();
    lab.answer_arp(GUEST_MAC, GUEST);
    let (_, quiet) = lab.add_udp("5000:192.168.122.2:5000/udp", "127.0.0.1:5000");
    let (_, flooded) = lab.add_udp("6000:192.168.122.2:6000/udp", "127.0.0.1:6000");
    lab.up.deliver(quiet, at(CLIENT), b"hello", None);
    lab.settle();
    let (from, to, ..) = lab.next().unwrap();
    lab.log.keep = false;
    let client = |n| SocketAddr::new(Ipv4Addr::from_bits(0x0b00_0000 + n).into(), 1_000);
    for n in 0..super::super::sessions::SESSIONS_MAX as u32 + 500 {
        lab.up.deliver(flooded, client(n), b"flood", None);
        if n % 512 == 0 {
            lab.settle();
        }
    }
    lab.settle();
    lab.up.sent.clear();
    // It has not been answered before: the class that gives way first.
    let frame = guest_udp(to, from, 64, b"answer");
    lab.guest_sends(&frame, Offload::default()).unwrap();
    assert_eq!(lab.up.sent.pop_front().unwrap().to, at(CLIENT));
    let before = lab.nat.flows().1;
    let (_, small) = lab.add_udp("7000:192.168.122.2:7000/udp,max=3", "127.0.0.1:7000");
    for n in 0..10 {
        lab.up.deliver(small, client(n), b"hello", None);
    }
    lab.settle();
    assert_eq!(
        lab.nat.flows().1,
        before,
        "three of them, in place of others"
    );
}

/// Clients beyond `max=N` wait in the kernel's queue, and the flows that idle longest go for them.
#[test]
fn a_forward_has_as_many_connections_as_it_may() {
    let mut lab = Lab::new();
    lab.answer_arp(GUEST_MAC, GUEST);
    let (id, listener) = lab.add_tcp("8080:192.168.122.2:80,max=2", "0.0.0.0:8080");
    let client = |n: u16| SocketAddr::new(at(CLIENT).ip(), 20_000 + n);
    (0..3).for_each(|n| lab.up.knock(listener, Some(client(n))));
    lab.settle();
    let counters = lab.counters(id);
    assert_eq!((counters.opened, counters.refused), (2, 0));
    assert!(lab.up.poll_event().is_none(), "it does not spin");
    // A place that gets free is taken.
    let first = FlowId {
        slot: 0,
        generation: 0,
    };
    let gone = lab.up.socket_of(SockOwner::Tcp(first)).unwrap();
    lab.up.peer_break(gone, HostError::Reset);
    lab.settle();
    lab.wait(Duration::from_secs(3));
    assert_eq!((lab.counters(id).opened, lab.nat.flows().0), (3, 2));
    assert_eq!(lab.counters(id).refused, 0);
}

/// Clients from outside leave guests a quarter of the flows, whatever the number of forwards.
#[test]
fn clients_from_outside_leave_guests_their_reserve() {
    let mut lab = Lab::new();
    lab.answer_arp(GUEST_MAC, GUEST);
    let most = 4_096 * 3 / 4;
    for number in 0..8u16 {
        let port = 8_000 + number;
        let text = format!("{port}:192.168.122.2:{port}");
        let (_, listener) = lab.add_tcp(&text, &format!("0.0.0.0:{port}"));
        for n in 0..500 {
            lab.up
                .knock(listener, Some(SocketAddr::new(at(CLIENT).ip(), 20_000 + n)));
        }
        lab.log.keep = false;
        // Accepted some at a time.
        (0..20).for_each(|_| lab.settle());
    }
    assert_eq!(lab.nat.flows().0, most);
    for n in 0..1_000 {
        let from = SocketAddr::new(GUEST.into(), 1_000 + n);
        let syn = guest_tcp(
            from,
            at("203.0.113.9:80"),
            (1, 0),
            (Tcp::SYN, 1_000),
            &[],
            b"",
        );
        assert_eq!(lab.guest_sends(&syn, Offload::default()), Ok(()));
    }
    assert_eq!(lab.nat.flows().0, most + 1_000);
}

#[test]
fn datagrams_that_wait_are_bounded() {
    let mut lab = Lab::new();
    let (id, socket) = lab.add_udp("5000:192.168.122.2:5000/udp", "127.0.0.1:5000");
    for _ in 0..2 * HELD_MAX {
        lab.up.deliver(socket, at(CLIENT), b"x", None);
    }
    lab.settle();
    assert_eq!(lab.dropped, vec![DropReason::Limit; HELD_MAX]);
    assert_eq!(lab.counters(id).refused as usize, HELD_MAX);
    lab.wait(PARKED_TIME + Duration::from_secs(1));
    lab.answer_arp(GUEST_MAC, GUEST);
    assert!(lab.is_silent(), "they are too old");
}

#[test]
fn a_guest_reaches_a_unix_socket_of_the_host() {
    let mut lab = Lab::new();
    let (id, _) = lab.add("tcp::5432-unix:/run/db.sock", &[]);
    lab.add("tcp:10.99.0.1:80-unix:/run/web.sock", &[]);
    lab.up.unix_listeners.insert("/run/db.sock".into());
    let guest = at("192.168.122.2:50000");
    let syn = |to: &str| guest_tcp(guest, at(to), (1, 0), (2, 64_000), &[], b"");
    for to in ["192.168.122.1:5432", "192.168.122.1:5432"] {
        lab.guest_sends(&syn(to), Offload::default()).unwrap();
    }
    assert_eq!(lab.up.open_count(), 1);
    let (from, ..) = lab.next().expect("a SYN-ACK");
    assert_eq!(from, at("192.168.122.1:5432"));
    assert_eq!(
        lab.counters(id).opened,
        1,
        "a SYN that comes again counts once"
    );
    // Nobody listens there.
    let refused = lab.guest_sends(&syn("10.99.0.1:80"), Offload::default());
    assert_eq!(refused, Err(DropReason::HostRefused));
    lab.nat.remove_forward(id, &mut lab.up);
    let other = guest_tcp(
        at("192.168.122.2:50001"),
        at("192.168.122.1:5432"),
        (1, 0),
        (2, 64_000),
        &[],
        b"",
    );
    let gone = lab.guest_sends(&other, Offload::default());
    assert_eq!(gone, Err(DropReason::Unclaimed));
}

#[test]
fn a_published_port_is_open_to_guests_until_it_is_removed() {
    let mut lab = Lab::new();
    let host = at("198.51.100.1:0").ip();
    lab.up.host_addresses.insert(host);
    let (id, _) = lab.add_tcp("8080:192.168.122.3:80", "0.0.0.0:8080");
    let syn = |port| {
        let to = SocketAddr::new(host, 8080);
        guest_tcp(
            SocketAddr::new(GUEST.into(), port),
            to,
            (1, 0),
            (2, 64_000),
            &[],
            b"",
        )
    };
    lab.guest_sends(&syn(1_000), Offload::default()).unwrap();
    lab.nat.remove_forward(id, &mut lab.up);
    let refused = lab.guest_sends(&syn(1_001), Offload::default());
    assert_eq!(refused, Err(DropReason::ForbiddenDestination));
}

#[test]
fn a_socket_that_can_not_be_had_leaves_nothing_behind() {
    let mut lab = Lab::new();
    let spec: ForwardSpec = "8000-8002:192.168.122.2:90-92".parse().unwrap();
    let kinds: Vec<_> = (8000..=8002)
        .map(|port| ListenerKind::Tcp(SocketAddr::new(at("0.0.0.0:0").ip(), port)))
        .collect();
    let added = lab.nat.add_forward(
        (ForwardId(1), &spec),
        &kinds,
        &mut lab.up,
        |up, n, owner| match n {
            2 => Err(HostError::Exhausted),
            _ => Ok(Some(up.listen(owner))),
        },
    );
    assert_eq!(added, Err(HostError::Exhausted));
    assert_eq!(lab.up.open_count(), 0);
    assert_eq!(lab.nat.forwards().count(), 0);
}

#[test]
fn what_a_network_can_not_serve_is_refused() {
    let refusal = |text: &str| {
        let spec: ForwardSpec = text.parse().unwrap();
        let refused = super::super::ForwardSet::check_on(&spec, &lan());
        refused.err().map(|error| error.to_string())
    };
    for good in [
        "80:192.168.122.9:80",
        "80:[fd00:6c61:6e:1::9]:80",
        "80:web:80",
        "tcp::80-unix:/x",
        "tcp:192.168.122.1:80-unix:/x",
        "tcp:10.0.2.100:80-unix:/x",
    ] {
        assert_eq!(refusal(good), None, "{good}");
    }
    for (bad, part) in [
        ("80:192.168.122.1:80", "is no address of a guest"),
        ("80:10.0.0.9:80", "is no address of a guest"),
        ("80:[fd01::9]:80", "is no address of a guest"),
        ("tcp::53-unix:/x", "the gateway's own DNS"),
        ("tcp:192.168.122.1:53-unix:/x", "the gateway's own DNS"),
        ("tcp:192.168.122.100:80-unix:/x", "only the gateway"),
    ] {
        let reason = refusal(bad).unwrap_or_else(|| panic!("{bad} is taken"));
        assert!(reason.contains(part), "{bad}: {reason}");
    }
}

#[test]
fn ports_to_try_stay_above_the_services() {
    let ports: Vec<_> = ports_to_try(Some(53), 3).collect();
    assert!(ports.iter().all(|&port| port >= 49_152));
    assert!(ports.iter().collect::<BTreeSet<_>>().len() > ports.len() / 2);
    assert_eq!(ports_to_try(Some(1_024), 3).next(), Some(1_024));
}

#[test]
fn a_forward_moves_to_the_worker_of_its_guest_with_all_that_waits() {
    let range = DhcpConfig::new(lan()).range();
    let leases = Arc::new(Mutex::new(LeaseTable::new(range, &lan()).unwrap()));
    let common = Common::new(&lan(), Arc::default());
    common.homes.set(PortId(1), WorkerId(1));
    let mut here = Lab::of(common.clone(), Arc::clone(&leases));
    let mut there = Lab::of(common.for_worker(WorkerId(1)), leases);
    let text = "8080:192.168.122.2:80";
    let listen = [ListenerKind::Tcp(at("0.0.0.0:8080"))];
    let (id, sockets) = here.add(text, &listen);
    let spec = text.parse().unwrap();
    let add = there
        .nat
        .add_forward((id, &spec), &listen, &mut there.up, |_, _, _| Ok(None));
    add.unwrap();
    // A client waits while the guest is looked for; its answer is heard by the other worker.
    here.up.knock(sockets[0], Some(at(CLIENT)));
    here.settle();
    assert!(here.log.pop().is_some() && here.nat.forwards_mut().poll_leaving().is_none());
    there.answer_arp(GUEST_MAC, GUEST);
    assert!(there.nat.forwards_mut().take_announcement());
    here.settle();
    let (to, moved) = here
        .nat
        .forwards_mut()
        .poll_leaving()
        .expect("it is elsewhere");
    assert_eq!(to, WorkerId(1));
    assert_eq!((moved.listeners.len(), moved.parked.len()), (1, 1));
    assert_eq!(here.counters(id), ForwardCounters::default());
    // Its sockets become the other's.
    let mut taken = Vec::new();
    there.nat.take_forward(
        moved,
        there.now,
        (&mut there.up, &mut there.log),
        |up, _, kind, owner| {
            taken.push(kind);
            match kind {
                Some(_) => Ok(up.listen(owner)),
                None => up.tcp_connect(at(CLIENT), None, owner),
            }
        },
    );
    assert_eq!(taken, [Some(listen[0]), None]);
    there.settle();
    assert_eq!(there.next_syn().1, at("192.168.122.2:80"));
    let counters = there.counters(id);
    assert_eq!((counters.opened, counters.waiting), (1, 0));
}

#[test]
fn who_has_a_guests_name_keeps_it_where_the_forward_moves() {
    let range = DhcpConfig::new(lan()).range();
    let leases = Arc::new(Mutex::new(LeaseTable::new(range, &lan()).unwrap()));
    let common = Common::new(&lan(), Arc::default());
    let mut here = Lab::of(common.clone(), Arc::clone(&leases));
    let mut there = Lab::of(common.for_worker(WorkerId(1)), leases);
    let thief = Mac([0x52, 0x54, 0, 0, 0, 1]);
    let listen = [ListenerKind::Tcp(at("0.0.0.0:8080"))];
    let (id, sockets) = here.add("8080:web:80", &listen);
    let spec = "8080:web:80".parse().unwrap();
    let add = there
        .nat
        .add_forward((id, &spec), &listen, &mut there.up, |_, _, _| Ok(None));
    add.unwrap();
    for lab in [&mut here, &mut there] {
        lab.nat
            .forwards_mut()
            .name_port(PortId(9), "web".parse().unwrap(), Some(GUEST_MAC));
    }
    here.answer_arp(GUEST_MAC, GUEST);
    here.up.knock(sockets[0], Some(at(CLIENT)));
    here.settle();
    assert_eq!(here.next_syn().1, at("192.168.122.2:80"));
    // Another port of that name, which would be found first.
    for lab in [&mut here, &mut there] {
        lab.nat
            .forwards_mut()
            .name_port(PortId(1), "web".parse().unwrap(), Some(thief));
    }
    there.answer_arp(thief, Ipv4Addr::new(192, 168, 122, 3));
    common.homes.set(PortId(1), WorkerId(1));
    here.up.knock(sockets[0], Some(at("198.51.100.9:40001")));
    here.settle();
    let (_, moved) = here
        .nat
        .forwards_mut()
        .poll_leaving()
        .expect("it is elsewhere");
    there.nat.take_forward(
        moved,
        there.now,
        (&mut there.up, &mut there.log),
        |up, _, kind, owner| match kind {
            Some(_) => Ok(up.listen(owner)),
            None => up.tcp_connect(at(CLIENT), None, owner),
        },
    );
    there.settle();
    assert_eq!(there.next_syn().1, at("192.168.122.2:80"));
}
