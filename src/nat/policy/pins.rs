//! Pins: which addresses the DNS answers to a guest have given to which names, and until when.
//!
//! # State
//! For each guest, by address: the names that led there, each with its aliases, its expiry and the
//! rules that have patterns for it (worked out when it is pinned, and again when the policy changes).
//!
//! # Timers
//! A pin lives as long as its answer's TTL, within [`TTL_MIN`] and [`TTL_MAX`]; a second answer never
//! shortens it, since the guest may still work with the first. Nothing runs at its end: an expired pin
//! opens no new flow, and stays while there is room, so that flows it once allowed can be judged when
//! the policy changes.
//!
//! # Limits
//! [`PINS_PER_GUEST_MAX`], [`PINS_MAX`], [`NAMES_PER_ADDRESS_MAX`]. A full guest loses its expired pins,
//! and if that is not enough, those unused for longest: a quarter at a time, so that pinning costs the
//! same however full it is. In total, the guest with the most pins gives way. What is lost is asked for
//! again; till then it is denied.
//!
//! # Hostile guests
//! A guest that resolves without end, even with a name server of its own below an allowed name, fills
//! its own share.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;

use super::answer::Answer;
use super::name::Name;
use super::rule::{Named, Policy};
use super::{Duration, Instant};
use crate::frame::PortId;

/// Shortest life of a pin. A connection is opened some time after the answer: resolvers in programs
/// hold addresses for up to a minute whatever their TTL (Chromium 60 s, OpenJDK 30 s), and Happy
/// Eyeballs tries addresses one after the other.
pub const TTL_MIN: Duration = Duration::from_secs(60);
/// Longest life: a week, what caches are told to cap a TTL at (RFC 8767 4).
pub const TTL_MAX: Duration = Duration::from_secs(7 * 24 * 3600);
/// Pins of one guest: pairs of name and address. A desktop's day has some 2,000 names with a handful
/// of addresses each, most of which expire within minutes.
pub const PINS_PER_GUEST_MAX: usize = 4_096;
/// Pins of all guests. Four guests that fill their shares with the longest names there are hold
/// 50 MB; honest ones, one or two.
pub const PINS_MAX: usize = 16_384;
/// Names of one address that are remembered: a content network serves many sites from one.
pub const NAMES_PER_ADDRESS_MAX: usize = 16;
const _: () = assert!(NAMES_PER_ADDRESS_MAX < PINS_PER_GUEST_MAX && PINS_PER_GUEST_MAX < PINS_MAX);

/// An answered question, shared by its addresses.
#[derive(Debug)]
struct Resolved {
    question: Name,
    aliases: Vec<Name>,
    /// Rules with a pattern for the question.
    own: Vec<u16>,
    /// Rules with a pattern for an alias.
    of_aliases: Vec<u16>,
}

impl Resolved {
    fn new(question: Name, aliases: Vec<Name>, policy: Option<&Policy>) -> Self {
        let mut resolved = Self {
            question,
            aliases,
            own: Vec::new(),
            of_aliases: Vec::new(),
        };
        if let Some(policy) = policy {
            let of = |name| policy.rules_for(name);
            resolved.own.extend(of(&resolved.question));
            resolved.own.sort_unstable();
            resolved.own.dedup();
            let of_aliases = resolved.aliases.iter().flat_map(of);
            resolved.of_aliases.extend(of_aliases);
            resolved.of_aliases.sort_unstable();
            resolved.of_aliases.dedup();
        }
        resolved
    }
}

#[derive(Debug)]
struct Pin {
    resolved: Arc<Resolved>,
    expires: Instant,
    /// When it was last pinned, or asked about for a flow.
    used: Instant,
}

/// Pins of one guest.
#[derive(Debug, Default)]
pub struct GuestPins {
    by_address: HashMap<IpAddr, Vec<Pin>>,
    count: usize,
}

/// Pins of all guests.
#[derive(Debug, Default)]
pub struct Pins {
    guests: HashMap<PortId, GuestPins>,
    count: usize,
    evicted: u64,
}

impl Pins {
    /// Pins now.
    pub fn count(&self) -> usize {
        self.count
    }

    /// Live pins that were dropped for want of room.
    pub fn evicted(&self) -> u64 {
        self.evicted
    }

    /// Forgets a guest's.
    pub fn forget(&mut self, guest: PortId) {
        self.take(guest);
    }

    /// Takes a guest's out.
    pub fn take(&mut self, guest: PortId) -> GuestPins {
        let gone = self.guests.remove(&guest).unwrap_or_default();
        self.count -= gone.count;
        gone
    }

    /// Puts in what another table had of a guest, if there is room. [`Pins::handle_policy`] has to follow: the other may
    /// have known another policy.
    pub fn put(&mut self, guest: PortId, pins: GuestPins) {
        self.forget(guest);
        if self.count + pins.count > PINS_MAX {
            self.evicted += pins.count as u64;
            return;
        }
        self.count += pins.count;
        self.guests.insert(guest, pins);
    }

    /// Remembers the addresses of an answer to `guest`.
    pub fn pin(&mut self, guest: PortId, answer: Answer, policy: Option<&Policy>, now: Instant) {
        let Answer {
            question,
            aliases,
            addresses,
        } = answer;
        if addresses.is_empty() {
            return;
        }
        let resolved = Arc::new(Resolved::new(question, aliases, policy));
        for (address, ttl_secs) in addresses {
            let ttl = Duration::from_secs(ttl_secs.into());
            let expires = now + ttl.clamp(TTL_MIN, TTL_MAX);
            let pin = Pin {
                resolved: Arc::clone(&resolved),
                expires,
                used: now,
            };
            self.make_room(guest, now);
            let guest = self.guests.entry(guest).or_default();
            let grown = guest.insert(address, pin);
            guest.count += grown;
            self.count += grown;
        }
    }

    /// Leaves room for one more of `guest`.
    fn make_room(&mut self, guest: PortId, now: Instant) {
        let full = |pins: &GuestPins| pins.count >= PINS_PER_GUEST_MAX;
        let who = if self.guests.get(&guest).is_some_and(full) {
            Some(guest)
        } else if self.count >= PINS_MAX {
            let most = self.guests.iter().max_by_key(|(_, pins)| pins.count);
            most.map(|(&guest, _)| guest)
        } else {
            None
        };
        if let Some(pins) = who.and_then(|who| self.guests.get_mut(&who)) {
            let before = pins.count;
            self.evicted += pins.shrink(now);
            self.count -= before - pins.count;
        }
    }

    /// What the names of `address` say to the rules. `counts`: whether they can allow it at all.
    /// `at`: when they have to be live; `None`: any time that is remembered.
    pub fn named(
        &self,
        guest: PortId,
        address: IpAddr,
        counts: bool,
        at: Option<Instant>,
    ) -> Named {
        let mut named = Named::default();
        let pins = self.guests.get(&guest);
        for pin in pins
            .and_then(|pins| pins.by_address.get(&address))
            .into_iter()
            .flatten()
        {
            if at.is_some_and(|at| pin.expires <= at) {
                continue;
            }
            let Resolved {
                own, of_aliases, ..
            } = &*pin.resolved;
            named.is_named |= counts;
            named.allowing.extend(own.iter().copied());
            named.denying.extend(own.iter().chain(of_aliases).copied());
        }
        named
    }

    /// Notes that a flow made use of the pins of `address`, and gives the name pinned or used last.
    pub fn touch(&mut self, guest: PortId, address: IpAddr, now: Instant) -> Option<Name> {
        let pins = self.guests.get_mut(&guest)?.by_address.get_mut(&address)?;
        let newest = pins
            .iter()
            .max_by_key(|pin| (pin.expires > now, pin.used))?;
        let name = newest.resolved.question.clone();
        for pin in pins.iter_mut().filter(|pin| pin.expires > now) {
            pin.used = now;
        }
        Some(name)
    }

    /// Works out anew which rules have patterns for the names.
    pub fn handle_policy(&mut self, policy: Option<&Policy>) {
        let mut done: HashMap<*const Resolved, Arc<Resolved>> = HashMap::new();
        let guests = self.guests.values_mut();
        // The old ones are kept until all are done: an address in `done` must not be used again.
        let mut old = Vec::new();
        for pin in guests.flat_map(|pins| pins.by_address.values_mut().flatten()) {
            let fresh = done.entry(Arc::as_ptr(&pin.resolved)).or_insert_with(|| {
                let Resolved {
                    question, aliases, ..
                } = &*pin.resolved;
                Arc::new(Resolved::new(question.clone(), aliases.clone(), policy))
            });
            old.push(std::mem::replace(&mut pin.resolved, Arc::clone(fresh)));
        }
    }
}

impl GuestPins {
    /// Adds a pin; gives how many more there are than before.
    fn insert(&mut self, address: IpAddr, pin: Pin) -> usize {
        let pins = self.by_address.entry(address).or_default();
        let same = |old: &Pin| old.resolved.question == pin.resolved.question;
        if let Some(old) = pins.iter_mut().find(|old| same(old)) {
            *old = Pin {
                expires: old.expires.max(pin.expires),
                ..pin
            };
            return 0;
        }
        if pins.len() < NAMES_PER_ADDRESS_MAX {
            pins.push(pin);
            return 1;
        }
        let expendable = pins
            .iter_mut()
            .min_by_key(|old| (old.expires > pin.used, old.used));
        if let Some(expendable) = expendable {
            *expendable = pin;
        }
        0
    }

    /// Drops a quarter: what is expired, then what is unused for longest. Gives how many were live.
    fn shrink(&mut self, now: Instant) -> u64 {
        let rank = |pin: &Pin| (pin.expires > now, pin.used);
        let mut ranks: Vec<_> = self.by_address.values().flatten().map(rank).collect();
        let quarter = ranks.len() / 4;
        let (_, &mut last, _) = ranks.select_nth_unstable(quarter);
        let before = self.count;
        let mut live = 0;
        // Pins of equal rank leave only until a quarter is gone.
        let mut equal = 1 + ranks[..quarter]
            .iter()
            .filter(|&&rank| rank == last)
            .count();
        self.by_address.retain(|_, pins| {
            pins.retain(|pin| {
                let rank = rank(pin);
                let goes = rank < last || rank == last && equal > 0;
                equal -= usize::from(goes && rank == last);
                self.count -= usize::from(goes);
                live += u64::from(goes && rank.0);
                !goes
            });
            !pins.is_empty()
        });
        debug_assert_eq!(self.count, before - quarter - 1);
        live
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nat::policy::answer::writer;

    const GUEST: PortId = PortId(1);

    fn at(secs: i64) -> Instant {
        Instant::from_secs(secs)
    }

    fn policy(text: &str) -> Policy {
        format!("{text}\ndefault deny").parse().unwrap()
    }

    fn answer(name: &str, addresses: &[(&str, u32)]) -> Answer {
        Answer::parse(&writer::addresses(name, &[], addresses)).unwrap()
    }

    fn is_named(pins: &Pins, address: &str, at: Option<Instant>) -> bool {
        pins.named(GUEST, address.parse().unwrap(), true, at)
            .is_named
    }

    #[test]
    fn a_pin_lives_as_long_as_its_ttl() {
        let mut pins = Pins::default();
        let ttls = [
            ("198.51.100.1", 0),
            ("198.51.100.2", 100),
            ("198.51.100.3", u32::MAX >> 1),
        ];
        pins.pin(GUEST, answer("a.test", &ttls), None, at(0));
        for (address, secs) in [
            ("198.51.100.1", TTL_MIN.secs() as i64),
            ("198.51.100.2", 100),
            ("198.51.100.3", TTL_MAX.secs() as i64),
        ] {
            assert!(is_named(&pins, address, Some(at(secs - 1))), "{address}");
            assert!(!is_named(&pins, address, Some(at(secs))), "{address}");
            assert!(is_named(&pins, address, None), "{address}");
        }
        assert!(!is_named(&pins, "198.51.100.4", None));
        let other = pins.named(PortId(2), [198, 51, 100, 1].into(), true, None);
        assert!(!other.is_named, "another guest's");
        // A shorter answer does not shorten it, a longer one lengthens it.
        pins.pin(
            GUEST,
            answer("a.test", &[("198.51.100.2", 60)]),
            None,
            at(1),
        );
        assert!(is_named(&pins, "198.51.100.2", Some(at(99))));
        pins.pin(
            GUEST,
            answer("a.test", &[("198.51.100.2", 200)]),
            None,
            at(2),
        );
        assert!(is_named(&pins, "198.51.100.2", Some(at(201))));
        assert_eq!(pins.count(), 3);
        pins.forget(GUEST);
        assert_eq!(pins.count(), 0);
    }

    #[test]
    fn rules_follow_names_and_policies() {
        let first = policy("allow to a.test\nallow to *.test\ndeny to *.cdn.example");
        let message = writer::addresses("a.test", &["x.cdn.example"], &[("198.51.100.1", 60)]);
        let mut pins = Pins::default();
        let parsed = Answer::parse(&message).unwrap();
        pins.pin(GUEST, parsed, Some(&first), at(0));
        let set = |rules: &[u16]| {
            let mut set = super::super::rule::RuleSet::default();
            set.extend(rules.iter().copied());
            set
        };
        let address = [198, 51, 100, 1].into();
        let named = pins.named(GUEST, address, true, None);
        assert_eq!(named.allowing, set(&[0, 1]));
        assert_eq!(named.denying, set(&[0, 1, 2]));
        let second = policy("deny to x.cdn.example\nallow to b.test");
        pins.handle_policy(Some(&second));
        let named = pins.named(GUEST, address, true, None);
        assert_eq!((named.allowing, named.denying), (set(&[]), set(&[0])));
        assert!(!pins.named(GUEST, address, false, None).is_named);
        pins.handle_policy(None);
        assert_eq!(pins.named(GUEST, address, true, None).denying, set(&[]));
    }

    #[test]
    fn an_address_has_so_many_names() {
        let mut pins = Pins::default();
        let many = NAMES_PER_ADDRESS_MAX as i64 + 5;
        for n in 0..many {
            let list = [("198.51.100.1", 600)];
            pins.pin(GUEST, answer(&format!("n{n}.test"), &list), None, at(n));
        }
        assert_eq!(pins.count(), NAMES_PER_ADDRESS_MAX);
        let known = policy("allow to n0.test,n4.test\nallow to n5.test\nallow to n20.test");
        pins.handle_policy(Some(&known));
        let named = pins.named(GUEST, [198, 51, 100, 1].into(), true, None);
        let mut newest = super::super::rule::RuleSet::default();
        newest.extend([1, 2]);
        assert_eq!(named.allowing, newest, "the oldest gave way");
        let last = pins.touch(GUEST, [198, 51, 100, 1].into(), at(many));
        assert_eq!(last.unwrap().as_str(), "n20.test");
    }

    /// One that can be told from its number.
    fn numbered(n: usize, ttl: u32) -> Answer {
        let [_, _, a, b] = (n as u32).to_be_bytes();
        answer("a.test", &[(&format!("198.51.{a}.{b}"), ttl)])
    }

    #[test]
    fn a_full_guest_loses_what_is_expired_then_what_is_unused() {
        let mut pins = Pins::default();
        for n in 0..PINS_PER_GUEST_MAX {
            // Every tenth is soon over, though pinned last.
            let ttl = if n % 10 == 9 { 60 } else { 1_000_000 };
            pins.pin(GUEST, numbered(n, ttl), None, at(n as i64));
        }
        assert_eq!(pins.count(), PINS_PER_GUEST_MAX);
        let now = at(PINS_PER_GUEST_MAX as i64 + 100);
        // The oldest of all is in use.
        assert!(pins.touch(GUEST, [198, 51, 0, 0].into(), now).is_some());
        pins.pin(GUEST, numbered(60_000, 60), None, now);
        assert_eq!(pins.count(), PINS_PER_GUEST_MAX - PINS_PER_GUEST_MAX / 4);
        assert!(is_named(&pins, "198.51.0.0", None));
        assert!(is_named(&pins, "198.51.234.96", None), "the one that came");
        assert!(!is_named(&pins, "198.51.0.1", None), "unused for longest");
        assert!(!is_named(&pins, "198.51.15.249", None), "expired: 4089");
        assert!(is_named(&pins, "198.51.15.255", None), "4095");
        let expired = PINS_PER_GUEST_MAX / 10;
        assert_eq!(
            pins.evicted(),
            (PINS_PER_GUEST_MAX / 4 + 1 - expired) as u64
        );
    }

    #[test]
    fn the_greediest_gives_way() {
        let mut pins = Pins::default();
        let full = PINS_MAX / PINS_PER_GUEST_MAX;
        for guest in 0..full {
            for n in 0..PINS_PER_GUEST_MAX {
                pins.pin(PortId(guest as u16 + 10), numbered(n, 600), None, at(0));
            }
        }
        assert_eq!(pins.count(), PINS_MAX);
        for n in 0..1000 {
            pins.pin(GUEST, numbered(n, 600), None, at(1));
            assert!(pins.count() <= PINS_MAX);
        }
        let of_guest = pins.guests[&GUEST].count;
        assert_eq!(of_guest, 1000, "a modest guest keeps what it has");
        let sum: usize = pins.guests.values().map(|pins| pins.count).sum();
        assert_eq!(sum, pins.count());
        let held = pins
            .guests
            .values()
            .flat_map(|pins| pins.by_address.values());
        assert_eq!(held.map(Vec::len).sum::<usize>(), pins.count());
    }
}
