//! Which station has which address: what the gateway needs to reach a guest that has not spoken to it.
//!
//! Answers to guests go where the guests' frames came from. A connection that comes in by a forward has
//! no such frame, so its guest is looked for here.
//!
//! # Path
//! [`Neighbors::observe`] sees every packet for the gateway and learns from ARP and from neighbour
//! solicitations and advertisements that [`message::parse`] finds valid, nothing else: other packets
//! cost one comparison.
//! [`Neighbors::look_up`] answers at once, or asks the LAN (ARP request, neighbour solicitation) and
//! lets the caller wait until [`Neighbors::news`] says that an answer came. The workers of a network
//! share one table: who is looked for by one may be behind a port of another.
//!
//! # State and timers
//! An address is believed for [`REACHABLE`], then asked for again; one that a guest only looks for
//! duplicates of, to take it, is asked for at once, and is whoever's speaks for it; one that does not answer
//! [`PROBES`] questions [`PROBE_INTERVAL`] apart is forgotten.
//!
//! # Limits
//! [`PORT_ADDRESSES_MAX`] addresses behind a port, the oldest gives way; [`PROBING_MAX`] questions at a
//! time.
//!
//! # Hostile guests
//! A guest can claim any address that it is the first to have, as on any LAN. It can't take over one
//! whose owner was heard within [`REACHABLE`], nor one that is leased to another: the caller then says
//! which MAC it expects, and nobody else's answer counts.

use std::collections::VecDeque;
use std::net::{IpAddr, Ipv6Addr};

use hashbrown::HashMap;

use super::ndp::message::{self, Message};
use super::{LanConfig, Outbox, arp, service_counters};
use crate::frame::{Duration, Instant, Mac, PortId, Station};
use crate::offload::Offload;
use crate::wire::ipv6::solicited_node;
use crate::wire::{Body, Ipv6, Packet, Transport};

/// How long an address is believed (RFC 4861 10, REACHABLE_TIME).
pub const REACHABLE: Duration = Duration::from_secs(30);
/// Questions before an address counts as nobody's (RFC 4861 10, MAX_MULTICAST_SOLICIT).
pub const PROBES: u8 = 3;
/// Time between them (RFC 4861 10, RETRANS_TIMER).
pub const PROBE_INTERVAL: Duration = Duration::from_secs(1);
/// Addresses behind one port: a guest has one of IPv4 and three of IPv6, one that hosts containers more.
pub const PORT_ADDRESSES_MAX: usize = 64;
/// Addresses asked for at a time: as many forwards as a network can have.
pub const PROBING_MAX: usize = 1_024;

service_counters! {
    /// What the search for guests came to.
    NeighborCounters {
        /// Questions sent.
        asked = "neighbors_asked",
        /// Addresses that nobody answered for.
        silent = "neighbors_silent",
        /// Claims of an address that another station has.
        conflicts = "neighbors_conflicts",
    }
}

/// What is known of an address.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Reach {
    /// Its station was heard not long ago.
    Known(Station),
    /// It was there; whether it still is was asked.
    Stale(Station),
    /// The LAN was asked.
    Asked,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    station: Station,
    heard_at: Instant,
    /// It only asked whether anybody has the address already (RFC 4862 5.4).
    is_tentative: bool,
}

impl Entry {
    /// Whether the address is believed to be the station's.
    fn is_fresh(&self, now: Instant) -> bool {
        !self.is_tentative && now < self.heard_at + REACHABLE
    }
}

/// How a station claims an address.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Claim {
    /// It speaks with it.
    Spoken,
    /// It asks whether somebody has it, before it takes it.
    Tentative,
}

#[derive(Clone, Copy, Debug)]
struct Probe {
    expected: Option<Mac>,
    next_at: Instant,
    left: u8,
}

/// The addresses of guests.
#[derive(Debug)]
pub struct Neighbors {
    lan: LanConfig,
    known: HashMap<IpAddr, Entry>,
    /// The addresses behind each port, in the order they were learned.
    by_port: HashMap<PortId, VecDeque<IpAddr>>,
    probes: HashMap<IpAddr, Probe>,
    /// To be asked for by whoever looked.
    questions: Vec<IpAddr>,
    news: u64,
    counters: NeighborCounters,
}

impl Neighbors {
    /// Nobody is known yet.
    pub fn new(lan: LanConfig) -> Self {
        Self {
            lan,
            known: HashMap::new(),
            by_port: HashMap::new(),
            probes: HashMap::new(),
            questions: Vec::new(),
            news: 0,
            counters: NeighborCounters::default(),
        }
    }

    /// Counters so far.
    pub fn counters(&self) -> impl Iterator<Item = (&'static str, u64)> + use<> {
        self.counters.iter()
    }

    /// Whether there may be something to learn from a packet.
    #[inline]
    pub fn is_telling(packet: &Packet<'_>) -> bool {
        match &packet.body {
            Body::Arp(_) => true,
            Body::Ipv6(ip) => match ip.transport {
                Transport::Icmp(bytes) => message::is_discovery(bytes),
                _ => false,
            },
            Body::Ipv4(_) | Body::Other(_) => false,
        }
    }

    /// Learns from a packet that reached the gateway.
    pub fn observe(&mut self, packet: &Packet<'_>, now: Instant) {
        let claim = match &packet.body {
            Body::Arp(_) => {
                arp::spoken_for(packet).map(|address| (IpAddr::V4(address), Claim::Spoken))
            }
            Body::Ipv6(ip) => match ip.transport {
                Transport::Icmp(message) => {
                    spoken_for(ip, message).map(|(address, claim)| (IpAddr::V6(address), claim))
                }
                _ => None,
            },
            Body::Ipv4(_) | Body::Other(_) => None,
        };
        let claim = claim.filter(|&(address, _)| self.lan.is_guest_any(address));
        let Some((address, claim)) = claim else {
            return;
        };
        let station = Station {
            mac: packet.source,
            port: packet.ingress,
        };
        match claim {
            Claim::Spoken => self.learn(address, station, now),
            Claim::Tentative => self.expect(address, station, now),
        }
    }

    /// Takes down an address that its station is about to have. Anybody else who speaks for it has it.
    fn expect(&mut self, address: IpAddr, station: Station, now: Instant) {
        if self.known.contains_key(&address) || self.probes.contains_key(&address) {
            return;
        }
        self.learn(address, station, now);
        if let Some(entry) = self.known.get_mut(&address) {
            entry.is_tentative = true;
        }
    }

    fn learn(&mut self, address: IpAddr, station: Station, now: Instant) {
        let expected = self.probes.get(&address).and_then(|probe| probe.expected);
        if let Some(entry) = self.known.get(&address) {
            let theirs = entry.station.mac != station.mac;
            let fresh = entry.is_fresh(now);
            if theirs && fresh && expected != Some(station.mac) {
                self.counters.conflicts += 1;
                return;
            }
            self.forget(address);
        }
        if expected.is_none_or(|mac| mac == station.mac) && self.probes.remove(&address).is_some() {
            self.news += 1;
        }
        let own = self.by_port.entry(station.port).or_default();
        own.push_back(address);
        let oldest = (own.len() > PORT_ADDRESSES_MAX).then(|| own.pop_front());
        if let Some(oldest) = oldest.flatten() {
            self.known.remove(&oldest);
        }
        let entry = Entry {
            station,
            heard_at: now,
            is_tentative: false,
        };
        self.known.insert(address, entry);
    }

    fn forget(&mut self, address: IpAddr) {
        let Some(entry) = self.known.remove(&address) else {
            return;
        };
        if let Some(own) = self.by_port.get_mut(&entry.station.port) {
            own.retain(|&other| other != address);
        }
    }

    /// Forgets who is behind a port that is gone.
    pub fn forget_port(&mut self, port: PortId) {
        for address in self.by_port.remove(&port).into_iter().flatten() {
            self.known.remove(&address);
        }
    }

    /// Where `address` is. `expected`: it is leased to this MAC, and nobody else counts. Where that is
    /// not known for certain the LAN is to be asked, with [`ask`], for what
    /// [`Neighbors::take_questions`] gives.
    pub fn look_up(&mut self, address: IpAddr, expected: Option<Mac>, now: Instant) -> Reach {
        let entry = self.known.get(&address).copied();
        let entry = entry.filter(|entry| expected.is_none_or(|mac| mac == entry.station.mac));
        if let Some(entry) = entry
            && entry.is_fresh(now)
        {
            return Reach::Known(entry.station);
        }
        self.probe(address, expected, now);
        entry.map_or(Reach::Asked, |entry| Reach::Stale(entry.station))
    }

    /// The addresses heard from a MAC, in no order. Walks the table: for guests without a lease.
    pub fn addresses_of(&self, mac: Mac) -> impl Iterator<Item = IpAddr> {
        let own = move |(_, entry): &(&IpAddr, &Entry)| entry.station.mac == mac;
        self.known.iter().filter(own).map(|(&address, _)| address)
    }

    /// The addresses with their stations, the one heard last last.
    pub fn heard(&self) -> Vec<(IpAddr, Station)> {
        let mut heard: Vec<_> = self.known.iter().collect();
        heard.sort_by_key(|(_, entry)| entry.heard_at);
        let told = |(&address, entry): (&IpAddr, &Entry)| (address, entry.station);
        heard.into_iter().map(told).collect()
    }

    fn probe(&mut self, address: IpAddr, expected: Option<Mac>, now: Instant) {
        if let Some(probe) = self.probes.get_mut(&address) {
            probe.expected = expected;
            return;
        }
        if self.probes.len() >= PROBING_MAX {
            return;
        }
        let probe = Probe {
            expected,
            next_at: now + PROBE_INTERVAL,
            left: PROBES - 1,
        };
        self.probes.insert(address, probe);
        self.counters.asked += 1;
        self.questions.push(address);
    }

    /// The addresses that the LAN is to be asked for. Others wait for this table while it is locked, so
    /// it is not asked meanwhile.
    pub fn take_questions(&mut self) -> Vec<IpAddr> {
        std::mem::take(&mut self.questions)
    }

    /// How many of the addresses that were asked for have been found.
    pub fn news(&self) -> u64 {
        self.news
    }

    /// When [`Neighbors::handle_timeout`] next has something to do.
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.probes.values().map(|probe| probe.next_at).min()
    }

    /// Asks again, as [`Neighbors::look_up`] does, and gives up addresses that nobody answers for.
    pub fn handle_timeout(&mut self, now: Instant) {
        let (questions, counters) = (&mut self.questions, &mut self.counters);
        let mut silent = Vec::new();
        self.probes.retain(|&address, probe| {
            if now < probe.next_at {
                return true;
            }
            if probe.left == 0 {
                silent.push(address);
                return false;
            }
            probe.left -= 1;
            probe.next_at = now + PROBE_INTERVAL;
            counters.asked += 1;
            questions.push(address);
            true
        });
        self.counters.silent += silent.len() as u64;
        for address in silent {
            // A leased address may have been another's until now: who was heard stays.
            let stale = |entry: &&Entry| !entry.is_fresh(now);
            if self.known.get(&address).filter(stale).is_some() {
                self.forget(address);
            }
        }
    }
}

/// The address that a neighbour message's sender says it has, or will have.
fn spoken_for(ip: &Ipv6<'_>, message: &[u8]) -> Option<(Ipv6Addr, Claim)> {
    match message::parse(ip, message).ok()? {
        Message::NeighborSolicitation { target } if ip.source.is_unspecified() => {
            Some((target, Claim::Tentative))
        }
        Message::NeighborSolicitation { .. } => Some((ip.source, Claim::Spoken)),
        Message::NeighborAdvertisement { target } => Some((target, Claim::Spoken)),
        Message::RouterSolicitation | Message::FromRouter => None,
    }
}

/// Asks all stations who has `address`.
pub fn ask<O: Outbox + ?Sized>(lan: &LanConfig, address: IpAddr, out: &mut O) {
    match (address, &lan.v6) {
        (IpAddr::V4(address), _) => arp::request(lan, Mac::BROADCAST, address, out),
        (IpAddr::V6(address), Some(lan6)) => solicit(lan.mac, lan6.link_local, address, out),
        (IpAddr::V6(_), None) => {}
    }
}

/// A multicast neighbour solicitation (RFC 4861 7.2.2).
fn solicit<O: Outbox + ?Sized>(mac: Mac, source: Ipv6Addr, target: Ipv6Addr, out: &mut O) {
    let buffer = out.buffer();
    let len = message::write_solicitation(buffer, target, mac);
    let group = (Mac::BROADCAST, solicited_node(target));
    let len = message::finish(buffer, (mac, source), group, len);
    out.send(len, Offload::default());
}

#[cfg(test)]
mod tests {
    use super::super::Lan6;
    use super::super::ndp::message::{
        ALL_NODES, MESSAGE_AT, NEIGHBOR_ADVERTISEMENT, NEIGHBOR_SOLICITATION, finish,
    };
    use super::super::testing::{GUEST, GUEST_ADDRESS, Kept, PORT, lan, parse};
    use super::*;
    use crate::frame::ETH_HEADER_LEN;
    use crate::wire::ipv6::{self, address_at};
    use crate::wire::{ETHERTYPE_ARP, write_ethernet};
    use std::net::Ipv4Addr;

    const OTHER: Mac = Mac([0x52, 0x54, 0, 0, 0, 8]);
    const GUEST6: Ipv6Addr = Ipv6Addr::new(0xfd00, 1, 2, 3, 0, 0, 0, 7);

    fn look_up(
        neighbors: &mut Neighbors,
        (address, expected, now): (IpAddr, Option<Mac>, Instant),
        out: &mut Kept,
    ) -> Reach {
        let reach = neighbors.look_up(address, expected, now);
        ask_all(neighbors, out);
        reach
    }

    fn ask_all(neighbors: &mut Neighbors, out: &mut Kept) {
        for address in neighbors.take_questions() {
            ask(&neighbors.lan, address, out);
        }
    }

    fn station(mac: Mac) -> Station {
        Station { mac, port: PORT }
    }

    fn arp(mac: Mac, sender: Ipv4Addr) -> Vec<u8> {
        let mut frame = vec![0; 60];
        write_ethernet(&mut frame, Mac::BROADCAST, mac, ETHERTYPE_ARP);
        frame[14..22].copy_from_slice(&[0, 1, 8, 0, 6, 4, 0, 2]);
        frame[22..28].copy_from_slice(&mac.0);
        frame[28..32].copy_from_slice(&sender.octets());
        frame
    }

    fn lan6() -> LanConfig {
        let mac = lan().mac;
        LanConfig {
            v6: Some(Lan6 {
                link_local: ipv6::link_local(mac),
                address: Ipv6Addr::new(0xfd00, 1, 2, 3, 0, 0, 0, 1),
                prefix: 64,
            }),
            ..lan()
        }
    }

    /// A neighbour message about `target`, from it; its first word but the checksum is `head`.
    fn discovery(
        mac: Mac,
        to: Ipv6Addr,
        head: [u8; 3],
        target: Ipv6Addr,
        options: &[u8],
    ) -> Vec<u8> {
        let [kind, code, flags] = head;
        let mut frame = vec![0; MESSAGE_AT];
        frame.extend_from_slice(&[kind, code, 0, 0, flags, 0, 0, 0]);
        frame.extend_from_slice(&target.octets());
        frame.extend_from_slice(options);
        let len = frame.len() - MESSAGE_AT;
        finish(&mut frame, (mac, target), (lan().mac, to), len);
        frame
    }

    fn advertisement(mac: Mac, target: Ipv6Addr, hop_limit: u8) -> Vec<u8> {
        let to = lan6().v6.unwrap().link_local;
        let head = [NEIGHBOR_ADVERTISEMENT, 0, 0x60];
        let mut frame = discovery(mac, to, head, target, &[]);
        frame[ETH_HEADER_LEN + 7] = hop_limit;
        frame
    }

    #[test]
    fn an_unknown_address_is_asked_for_and_its_answer_is_news() {
        let (mut neighbors, mut out) = (Neighbors::new(lan()), Kept::new());
        let (address, now) = (IpAddr::V4(GUEST_ADDRESS), Instant::from_secs(100));
        for _ in 0..3 {
            assert_eq!(
                look_up(&mut neighbors, (address, None, now), &mut out),
                Reach::Asked
            );
        }
        let question = out.take();
        assert_eq!(Mac::at(&question, 0), Mac::BROADCAST);
        assert_eq!(question[20..22], [0, 1]);
        assert_eq!(question[38..42], GUEST_ADDRESS.octets());
        assert_eq!(neighbors.news(), 0);
        neighbors.observe(&parse(&arp(GUEST, GUEST_ADDRESS)), now);
        assert_eq!(neighbors.news(), 1);
        let found = look_up(&mut neighbors, (address, None, now), &mut out);
        assert_eq!(found, Reach::Known(station(GUEST)));
        assert_eq!(neighbors.poll_timeout(), None);
        let later = now + REACHABLE;
        let found = look_up(&mut neighbors, (address, None, later), &mut out);
        assert_eq!(found, Reach::Stale(station(GUEST)));
        assert_eq!(out.frames.len(), 1, "and is asked again");
    }

    #[test]
    fn who_does_not_answer_is_given_up() {
        let (mut neighbors, mut out) = (Neighbors::new(lan()), Kept::new());
        let (address, mut now) = (IpAddr::V4(GUEST_ADDRESS), Instant::from_secs(100));
        neighbors.observe(&parse(&arp(GUEST, GUEST_ADDRESS)), now);
        now += REACHABLE;
        look_up(&mut neighbors, (address, None, now), &mut out);
        let mut asked = 1;
        while let Some(due) = neighbors.poll_timeout() {
            assert!(due > now);
            now = due;
            neighbors.handle_timeout(now);
            ask_all(&mut neighbors, &mut out);
            asked += 1;
            assert!(asked < 10);
        }
        assert_eq!(now, Instant::from_secs(133));
        assert_eq!(out.frames.len(), usize::from(PROBES));
        assert_eq!(neighbors.counters.silent, 1);
        assert_eq!(
            look_up(&mut neighbors, (address, None, now), &mut out),
            Reach::Asked
        );
    }

    #[test]
    fn an_address_can_not_be_taken_from_who_has_it() {
        let (mut neighbors, mut out) = (Neighbors::new(lan()), Kept::new());
        let (address, now) = (IpAddr::V4(GUEST_ADDRESS), Instant::from_secs(100));
        neighbors.observe(&parse(&arp(GUEST, GUEST_ADDRESS)), now);
        neighbors.observe(&parse(&arp(OTHER, GUEST_ADDRESS)), now);
        let found = look_up(&mut neighbors, (address, None, now), &mut out);
        assert_eq!(found, Reach::Known(station(GUEST)));
        assert_eq!(neighbors.counters.conflicts, 1);
        // Leased to the other: only its answer counts, at once.
        let found = look_up(&mut neighbors, (address, Some(OTHER), now), &mut out);
        assert_eq!(found, Reach::Asked);
        neighbors.observe(&parse(&arp(GUEST, GUEST_ADDRESS)), now);
        assert_eq!(neighbors.news(), 0);
        neighbors.observe(&parse(&arp(OTHER, GUEST_ADDRESS)), now);
        assert_eq!(neighbors.news(), 1);
        let found = look_up(&mut neighbors, (address, Some(OTHER), now), &mut out);
        assert_eq!(found, Reach::Known(station(OTHER)));
    }

    #[test]
    fn a_port_has_its_share_and_takes_it_along() {
        let (mut neighbors, mut out) = (Neighbors::new(lan()), Kept::new());
        let now = Instant::from_secs(100);
        let nth = |n: usize| Ipv4Addr::new(192, 168, 122, 10 + n as u8);
        for n in 0..2 * PORT_ADDRESSES_MAX {
            neighbors.observe(&parse(&arp(GUEST, nth(n))), now);
            // Heard again: it does not count twice.
            neighbors.observe(&parse(&arp(GUEST, nth(n))), now);
        }
        assert_eq!(neighbors.known.len(), PORT_ADDRESSES_MAX);
        assert_eq!(neighbors.addresses_of(GUEST).count(), PORT_ADDRESSES_MAX);
        let newest = nth(2 * PORT_ADDRESSES_MAX - 1).into();
        let found = look_up(&mut neighbors, (newest, None, now), &mut out);
        assert_eq!(found, Reach::Known(station(GUEST)));
        neighbors.forget_port(PORT);
        assert!(neighbors.known.is_empty() && neighbors.by_port.is_empty());
    }

    #[test]
    fn questions_are_bounded() {
        let lan = LanConfig {
            prefix: 16,
            ..lan()
        };
        let (mut neighbors, mut out) = (Neighbors::new(lan), Kept::new());
        for n in 0..2 * PROBING_MAX as u32 {
            let address = Ipv4Addr::from_bits(Ipv4Addr::new(192, 168, 0, 2).to_bits() + n);
            look_up(
                &mut neighbors,
                (address.into(), None, Instant::ZERO),
                &mut out,
            );
        }
        assert_eq!(neighbors.probes.len(), PROBING_MAX);
        assert_eq!(out.frames.len(), PROBING_MAX);
    }

    #[test]
    fn ipv6_is_solicited_and_advertised() {
        let (mut neighbors, mut out) = (Neighbors::new(lan6()), Kept::new());
        let (address, now) = (IpAddr::V6(GUEST6), Instant::from_secs(100));
        assert_eq!(
            look_up(&mut neighbors, (address, None, now), &mut out),
            Reach::Asked
        );
        let frame = out.take();
        let packet = parse(&frame);
        let Body::Ipv6(ip) = &packet.body else {
            panic!("{packet:?}");
        };
        assert_eq!(packet.destination, Mac([0x33, 0x33, 0xff, 0, 0, 7]));
        assert_eq!((ip.ttl, ip.destination), (255, solicited_node(GUEST6)));
        let Transport::Icmp(message) = ip.transport else {
            panic!("{ip:?}: its checksum is right");
        };
        assert_eq!(message[..2], [NEIGHBOR_SOLICITATION, 0]);
        assert_eq!(address_at(message, 8), GUEST6);
        assert_eq!((&message[24..26], message.len()), (&[1, 1][..], 32));
        assert_eq!(Mac::at(message, 26), lan().mac);

        neighbors.observe(&parse(&advertisement(GUEST, GUEST6, 64)), now);
        assert_eq!(neighbors.news(), 0, "it may be from beyond the link");
        neighbors.observe(&parse(&advertisement(GUEST, GUEST6, 255)), now);
        assert_eq!(neighbors.news(), 1);
        let found = look_up(&mut neighbors, (address, None, now), &mut out);
        assert_eq!(found, Reach::Known(station(GUEST)));
    }

    #[test]
    fn an_address_that_is_only_looked_for_is_whoever_speaks_for_it() {
        let claim = |mac: Mac| {
            let head = [NEIGHBOR_SOLICITATION, 0, 0];
            let mut frame = discovery(mac, GUEST6, head, GUEST6, &[]);
            let len = frame.len() - MESSAGE_AT;
            let to = (Mac::BROADCAST, solicited_node(GUEST6));
            finish(&mut frame, (mac, Ipv6Addr::UNSPECIFIED), to, len);
            frame
        };
        let (mut neighbors, mut out) = (Neighbors::new(lan6()), Kept::new());
        let (address, now) = (IpAddr::V6(GUEST6), Instant::from_secs(100));
        neighbors.observe(&parse(&claim(OTHER)), now);
        assert_eq!(neighbors.heard(), [(address, station(OTHER))]);
        neighbors.observe(&parse(&claim(GUEST)), now);
        assert_eq!(neighbors.heard(), [(address, station(OTHER))]);
        // Not believed without being asked for.
        let found = look_up(&mut neighbors, (address, None, now), &mut out);
        assert_eq!((found, out.frames.len()), (Reach::Stale(station(OTHER)), 1));
        neighbors.observe(&parse(&advertisement(GUEST, GUEST6, 255)), now);
        let found = look_up(&mut neighbors, (address, None, now), &mut out);
        assert_eq!(found, Reach::Known(station(GUEST)));
        neighbors.observe(&parse(&claim(OTHER)), now);
        assert_eq!(neighbors.heard(), [(address, station(GUEST))]);
        assert_eq!(neighbors.counters.conflicts, 0);
    }

    #[test]
    fn what_rfc_4861_has_discarded_is_not_learned() {
        const ASKS: [u8; 3] = [NEIGHBOR_SOLICITATION, 0, 0];
        const ANSWERS: [u8; 3] = [NEIGHBOR_ADVERTISEMENT, 0, 0x60];
        const UNASKED: [u8; 3] = [NEIGHBOR_ADVERTISEMENT, 0, 0x20];
        const MAC: [u8; 8] = [1, 1, 0x52, 0x54, 0, 0, 0, 7];
        let gateway = lan6().v6.unwrap().link_local;
        for (head, to, options, learned) in [
            (ASKS, gateway, &MAC[..], true),
            (ASKS, gateway, &[1, 0, 0, 0, 0, 0, 0, 0], false),
            (ASKS, gateway, &MAC[..7], false),
            (ANSWERS, gateway, &[], true),
            (ANSWERS, gateway, &[2, 2, 0, 0, 0, 0, 0, 0], false),
            (ANSWERS, gateway, &[2], false),
            (UNASKED, ALL_NODES, &[], true),
            (ANSWERS, ALL_NODES, &[], false),
        ] {
            let mut neighbors = Neighbors::new(lan6());
            let frame = discovery(GUEST, to, head, GUEST6, options);
            neighbors.observe(&parse(&frame), Instant::from_secs(100));
            let known = neighbors.known.contains_key(&IpAddr::V6(GUEST6));
            assert_eq!(known, learned, "{head:?} to {to} with {options:?}");
        }
        // An owner of a group's address.
        let mut frame = discovery(GUEST, gateway, ANSWERS, ALL_NODES, &[]);
        let len = frame.len() - MESSAGE_AT;
        finish(&mut frame, (GUEST, GUEST6), (lan().mac, gateway), len);
        let packet = parse(&frame);
        let Body::Ipv6(ip) = &packet.body else {
            panic!("{packet:?}");
        };
        assert_eq!(spoken_for(ip, &frame[MESSAGE_AT..]), None);
    }

    #[test]
    fn foreign_addresses_and_relayed_messages_are_not_learned() {
        let mut neighbors = Neighbors::new(lan());
        let now = Instant::from_secs(100);
        for sender in [lan().address, Ipv4Addr::new(10, 0, 0, 1), lan().broadcast()] {
            neighbors.observe(&parse(&arp(GUEST, sender)), now);
        }
        let mut relayed = arp(GUEST, GUEST_ADDRESS);
        relayed[22..28].copy_from_slice(&OTHER.0);
        neighbors.observe(&parse(&relayed), now);
        neighbors.observe(&parse(&advertisement(GUEST, GUEST6, 255)), now);
        assert!(neighbors.known.is_empty());
    }
}
