//! Neighbor Discovery (RFC 4861) for the gateway: its two addresses, and the LAN's router
//! advertisements, from which guests make their own addresses (SLAAC, RFC 4862).
//!
//! # A message's path
//! [`message::parse`] makes the checks that RFC 4861 demands; then
//!
//! | from a guest | answered with |
//! |---|---|
//! | router solicitation | a router advertisement to the asker; to all nodes where it has no address yet |
//! | neighbor solicitation for a gateway address | a neighbor advertisement to the asker |
//! | the same from the unspecified address (duplicate address detection) | a defence: an advertisement to all nodes |
//! | neighbor advertisement of a gateway address | a defence |
//! | router advertisement, redirect | nothing; counted as `rogue_router` |
//! | anything else | nothing |
//!
//! # State
//! No neighbor cache here: an answer goes back to the station that asked, and the NAT takes a guest's MAC
//! from the guest's own frames. Only forwards look for guests that have not spoken ([`super::neighbor`]).
//! The gateway does no duplicate address detection of its own: when it starts, the LAN has no other
//! station, and later it was there first. What is kept is whether the host has IPv6, when which
//! advertisement is due, and whether anybody is there to hear it.
//!
//! # Timers
//! Router advertisements to all nodes: [`SETTLE_TIME`] after a port was added, three in the
//! beginning and after each change, then at random between [`ra::INTERVAL_MIN`] and
//! [`ra::INTERVAL_MAX`], never closer than [`MULTICAST_PAUSE`]; a last one when the network ends.
//! Defences: at most one per address and [`DEFEND_PAUSE`], later ones when that is over.
//!
//! # What a hostile guest can try
//! Take a gateway address: defended for ever, as with ARP, at a bounded rate. Make the gateway
//! flood: what goes to all nodes is bounded by the pauses above. Reflect answers to others: they go to
//! the asking frame's MAC, and to addresses of this LAN only. Pose as router: the gateway believes
//! none; that the other guests do not either takes a guard in the switch, which there is none yet.

pub(super) mod message;
mod ra;

use std::net::Ipv6Addr;

use self::message::{ALL_NODES, ALL_ROUTERS, MESSAGE_AT, Message};
pub use self::ra::{ROUTES_MAX, Route, RoutedPrefix};
use super::{Handled, Lan6, LanConfig, Outbox, Service, service_counters};
use crate::frame::{Duration, Instant, Mac};
use crate::offload::Offload;
use crate::stats::DropReason;
use crate::wire::ipv6::solicited_node;
use crate::wire::{Body, Ipv6, Packet, Transport};

/// Least time between two router advertisements to all nodes (MIN_DELAY_BETWEEN_RAS, RFC 4861 10).
pub const MULTICAST_PAUSE: Duration = Duration::from_secs(3);
/// Time from a port's coming to the advertisement for it: a namespace guest's link is brought up by
/// then, and guests that want one sooner ask.
pub const SETTLE_TIME: Duration = MULTICAST_PAUSE;
/// Advertisements in quick succession in the beginning and after a change
/// (MAX_INITIAL_RTR_ADVERTISEMENTS, RFC 4861 10).
const INITIAL_COUNT: u8 = 3;
/// Pause between those at most (MAX_INITIAL_RTR_ADVERT_INTERVAL, RFC 4861 10).
const INITIAL_INTERVAL: Duration = Duration::from_secs(16);
/// Least time between two defences of an address. Who is detecting duplicates waits for a second
/// (RETRANS_TIMER, RFC 4861 10): a defence held back for half of it still comes in time.
pub const DEFEND_PAUSE: Duration = Duration::from_millis(500);

service_counters! {
    /// What the NDP service did.
    NdpCounters {
        /// Router solicitations that were answered, or will be by the next advertisement to all.
        solicited = "ndp_router_solicitations",
        /// Router advertisements sent.
        advertised = "ndp_router_advertisements",
        /// Neighbor solicitations for a gateway address answered.
        replies = "ndp_replies",
        /// Claims of a gateway address by others.
        conflicts = "ndp_conflicts",
        /// Advertisements sent in defence.
        defended = "ndp_defended",
        /// Router advertisements and redirects of guests.
        rogue = "ndp_rogue_router",
        /// Messages that RFC 4861 has discarded.
        malformed = "ndp_malformed",
    }
}

/// The NDP service. Without IPv6 on the LAN it claims nothing.
pub struct Ndp {
    router: Option<Router>,
    counters: NdpCounters,
}

struct Router {
    lan: Lan6,
    mac: Mac,
    advertisement: ra::Advertisement,
    /// Whether the host has a way to the IPv6 outside.
    has_default: bool,
    /// Where the host leads without a default route (RFC 4191), and what it does not lead to any more.
    prefixes: Vec<RoutedPrefix>,
    /// Whether there is a port that hears advertisements.
    heard: bool,
    /// When the next advertisement to all nodes is due; holds while anybody hears it.
    due: Instant,
    /// When the newest port is settled, until an advertisement is sent. Newcomers put this off, but
    /// not what is due.
    settled: Option<Instant>,
    sent: Option<Instant>,
    initial_left: u8,
    /// Of the two addresses, in the order of [`Router::addresses`].
    defences: [Defence; 2],
    random: u64,
}

#[derive(Clone, Copy, Default)]
struct Defence {
    sent: Option<Instant>,
    /// One was held back until then.
    due: Option<Instant>,
}

impl Ndp {
    /// A service for the gateway of `lan`, which guests are not yet told to route by.
    pub fn new(lan: &LanConfig, domain: Option<&str>) -> Self {
        let router = lan.v6.map(|v6| Router {
            lan: v6,
            mac: lan.mac,
            advertisement: ra::Advertisement::new(v6, lan.mac, lan.mtu, domain),
            has_default: false,
            prefixes: Vec::new(),
            heard: false,
            due: Instant::ZERO,
            settled: None,
            sent: None,
            initial_left: INITIAL_COUNT,
            defences: [Defence::default(); 2],
            random: lan.mac.to_u64(),
        });
        Self {
            router,
            counters: NdpCounters::default(),
        }
    }

    /// A port was added: its guest may not ask.
    pub fn port_added(&mut self, now: Instant) {
        let Some(router) = &mut self.router else {
            return;
        };
        if !router.heard {
            router.heard = true;
            router.due = now + INITIAL_INTERVAL;
        }
        router.settled = Some(router.earliest(now + SETTLE_TIME));
    }

    /// The last port was removed.
    pub fn ports_gone(&mut self) {
        if let Some(router) = &mut self.router {
            router.heard = false;
            router.settled = None;
            router.initial_left = INITIAL_COUNT;
        }
    }

    /// Whether the host has a way to the IPv6 outside, and so guests have one by the gateway. A change
    /// is told at once.
    pub fn set_default_route(&mut self, has_default: bool, now: Instant) {
        let Some(router) = &mut self.router else {
            return;
        };
        if router.has_default != has_default {
            router.has_default = has_default;
            router.tell(now);
        }
    }

    /// The prefixes that guests reach by the gateway where it gives no default route, [`ROUTES_MAX`] of them
    /// at most. A change is told at once, and what is gone is withdrawn.
    pub fn set_prefixes(&mut self, prefixes: &[(Ipv6Addr, u8)], now: Instant) {
        let Some(router) = &mut self.router else {
            return;
        };
        let routed = |&(prefix, len): &(Ipv6Addr, u8)| RoutedPrefix {
            prefix,
            len,
            is_there: true,
        };
        let mut wanted: Vec<_> = prefixes.iter().take(ROUTES_MAX).map(routed).collect();
        let is_there = |routed: &&RoutedPrefix| routed.is_there;
        if router.prefixes.iter().filter(is_there).eq(&wanted) {
            return;
        }
        let is_same = |one: &RoutedPrefix, other: &RoutedPrefix| {
            (one.prefix, one.len) == (other.prefix, other.len)
        };
        let mut gone = std::mem::take(&mut router.prefixes);
        gone.retain(|before| !wanted.iter().any(|routed| is_same(routed, before)));
        gone.iter_mut().for_each(|routed| routed.is_there = false);
        wanted.extend(gone);
        wanted.truncate(ROUTES_MAX);
        router.prefixes = wanted;
        router.tell(now);
    }

    /// When [`Ndp::handle_timeout`] has something to do next.
    pub fn poll_timeout(&self) -> Option<Instant> {
        let router = self.router.as_ref()?;
        let advertisement = router.heard.then(|| router.next_advertisement());
        let defences = router.defences.iter().map(|defence| defence.due);
        defences.chain([advertisement]).flatten().min()
    }

    /// Sends what is due.
    pub fn handle_timeout(&mut self, now: Instant, out: &mut dyn Outbox) {
        let Some(router) = &mut self.router else {
            return;
        };
        for index in 0..router.defences.len() {
            if router.defences[index].due.is_some_and(|due| due <= now) {
                self.counters.defended += 1;
                router.defend(index, now, out);
            }
        }
        if router.heard && router.next_advertisement() <= now {
            self.counters.advertised += 1;
            router.send_advertisement((Mac::BROADCAST, ALL_NODES), router.route(), out);
            router.sent = Some(now);
            router.settled = None;
            router.due = now + router.next_interval();
            if router.initial_left == 0 {
                router.prefixes.retain(|routed| routed.is_there);
            }
        }
    }

    /// Tells guests that their router is gone: the network ends.
    pub fn stop(&mut self, out: &mut dyn Outbox) {
        if let Some(router) = self.router.as_mut().filter(|router| router.heard) {
            self.counters.advertised += 1;
            router.send_advertisement((Mac::BROADCAST, ALL_NODES), Route::Ending, out);
        }
    }

    /// Whether a packet is of Neighbor Discovery.
    pub fn is_discovery(packet: &Packet<'_>) -> bool {
        Self::message(packet).is_some()
    }

    fn message<'p, 'a>(packet: &'p Packet<'a>) -> Option<(&'p Ipv6<'a>, &'a [u8])> {
        let Body::Ipv6(ip) = &packet.body else {
            return None;
        };
        match ip.transport {
            Transport::Icmp(bytes) if message::is_discovery(bytes) => Some((ip, bytes)),
            _ => None,
        }
    }
}

impl Router {
    fn addresses(&self) -> [Ipv6Addr; 2] {
        [self.lan.link_local, self.lan.address]
    }

    fn index_of(&self, target: Ipv6Addr) -> Option<usize> {
        self.addresses()
            .iter()
            .position(|&address| address == target)
    }

    fn route(&self) -> Route {
        match self.has_default {
            true => Route::Default,
            false => Route::None,
        }
    }

    /// Tells of a change at once, and again as in the beginning.
    fn tell(&mut self, now: Instant) {
        self.initial_left = INITIAL_COUNT;
        // Before a first port is settled, the advertisement for it tells it.
        if self.sent.is_some() {
            self.due = self.earliest(now);
        }
    }

    fn next_advertisement(&self) -> Instant {
        self.settled
            .map_or(self.due, |settled| settled.min(self.due))
    }

    /// `wanted`, or as soon after the last advertisement to all nodes as the next may come.
    fn earliest(&self, wanted: Instant) -> Instant {
        self.sent
            .map_or(wanted, |sent| wanted.max(sent + MULTICAST_PAUSE))
    }

    /// The pause after an advertisement, which is thereby counted.
    fn next_interval(&mut self) -> Duration {
        let span = (ra::INTERVAL_MAX - ra::INTERVAL_MIN).total_micros();
        let regular = ra::INTERVAL_MIN + Duration::from_micros(self.next_random() % (span + 1));
        self.initial_left = self.initial_left.saturating_sub(1);
        match self.initial_left {
            0 => regular,
            _ => regular.min(INITIAL_INTERVAL),
        }
    }

    /// SplitMix64 (Steele, Lea, Flood 2014): keeps routers out of step, and nobody has to be unable to
    /// guess it.
    fn next_random(&mut self) -> u64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.random ^ self.random >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }

    fn send_advertisement(&self, to: (Mac, Ipv6Addr), route: Route, out: &mut dyn Outbox) {
        let buffer = out.buffer();
        let message = &mut buffer[MESSAGE_AT..];
        let len = self.advertisement.write(message, route, &self.prefixes);
        // Only a link-local source makes an advertisement valid (RFC 4861 6.1.2).
        let len = message::finish(buffer, (self.mac, self.lan.link_local), to, len);
        out.send(len, Offload::default());
    }

    fn send_neighbor(
        &self,
        target: Ipv6Addr,
        to: (Mac, Ipv6Addr),
        solicited: bool,
        out: &mut dyn Outbox,
    ) {
        let buffer = out.buffer();
        let len = message::write_advertisement(buffer, target, self.mac, solicited);
        let len = message::finish(buffer, (self.mac, target), to, len);
        out.send(len, Offload::default());
    }

    /// Says whose the address is, to everybody.
    fn defend(&mut self, index: usize, now: Instant, out: &mut dyn Outbox) {
        self.defences[index] = Defence {
            sent: Some(now),
            due: None,
        };
        let target = self.addresses()[index];
        self.send_neighbor(target, (Mac::BROADCAST, ALL_NODES), false, out);
    }
}

/// The groups of the gateway: those of every router, and the solicited-node groups of its addresses.
pub(super) fn is_gateway_group(lan: &Lan6, group: Ipv6Addr) -> bool {
    [
        ALL_NODES,
        ALL_ROUTERS,
        solicited_node(lan.link_local),
        solicited_node(lan.address),
    ]
    .contains(&group)
}

impl Service for Ndp {
    fn name(&self) -> &'static str {
        "ndp"
    }

    fn claims(&self, packet: &Packet<'_>) -> bool {
        self.router.is_some() && Self::message(packet).is_some()
    }

    fn handle(&mut self, packet: &Packet<'_>, now: Instant, out: &mut dyn Outbox) -> Handled {
        let (ip, bytes) = Self::message(packet).ok_or(DropReason::Unclaimed)?;
        let router = self.router.as_mut().ok_or(DropReason::Unclaimed)?;
        let parsed = message::parse(ip, bytes).inspect_err(|_| self.counters.malformed += 1)?;
        if packet.destination != router.mac && !ip.destination.is_multicast() {
            return Err(DropReason::ForbiddenDestination);
        }
        let target = match parsed {
            Message::FromRouter => {
                self.counters.rogue += 1;
                return Err(DropReason::RogueRouter);
            }
            Message::RouterSolicitation if ip.source.is_unspecified() => {
                self.counters.solicited += 1;
                router.due = router.due.min(router.earliest(now));
                return Ok(());
            }
            Message::RouterSolicitation => {
                if !router.lan.is_guest(ip.source) {
                    return Err(DropReason::ForeignSource);
                }
                self.counters.solicited += 1;
                self.counters.advertised += 1;
                router.send_advertisement((packet.source, ip.source), router.route(), out);
                return Ok(());
            }
            Message::NeighborSolicitation { target }
            | Message::NeighborAdvertisement { target } => target,
        };
        let Some(index) = router.index_of(target) else {
            return Ok(());
        };
        let asks = matches!(parsed, Message::NeighborSolicitation { .. });
        let claimed = !asks || ip.source.is_unspecified() || router.lan.is_gateway(ip.source);
        if claimed {
            self.counters.conflicts += 1;
            let pause_over = router.defences[index].sent.map(|sent| sent + DEFEND_PAUSE);
            match pause_over.filter(|&over| now < over) {
                Some(over) => router.defences[index].due = Some(over),
                None => {
                    self.counters.defended += 1;
                    router.defend(index, now, out);
                }
            }
            return Err(DropReason::AddressConflict);
        }
        if !router.lan.is_guest(ip.source) {
            return Err(DropReason::ForeignSource);
        }
        self.counters.replies += 1;
        router.send_neighbor(target, (packet.source, ip.source), true, out);
        Ok(())
    }

    fn counters(&self) -> impl Iterator<Item = (&'static str, u64)> {
        self.counters.iter()
    }
}

#[cfg(test)]
mod tests;
