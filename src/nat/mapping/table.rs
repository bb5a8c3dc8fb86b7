//! The order in which mappings expire and give way: by class, by guest, by last use.
//!
//! # State
//! A slab of entries, an index by [`Endpoint`], and three doubly linked lists through every entry: one of
//! all entries of its class, one of its guest's entries of that class, one of its port's, each in order of
//! last use. A class has one timeout, so the head of a list is the next to expire and the first to give
//! way.
//!
//! # Timers
//! A use moves an entry to the tail of its lists at most once per [`GRANULARITY`], so a busy mapping
//! costs one comparison per packet; expiry is late by as much, never early. Only [`Table::ids_where`]
//! walks the table.

use std::net::{IpAddr, SocketAddr};

use hashbrown::HashMap;

use super::Endpoint;
use crate::frame::PortId;
use crate::nat::{Duration, FlowId, Instant};

/// How exactly the order of last use is kept.
pub const GRANULARITY: Duration = Duration::from_secs(1);
/// A mapping used within this time is not evicted: two hot flows would take turns in throwing each
/// other out, a socket opened and closed each time. Longer than DNS and ping round trips.
pub const IN_USE: Duration = Duration::from_secs(5);

/// Slots a [`FlowId`] can name.
const SLOTS_MAX: usize = 1 << 24;
const NIL: u32 = u32::MAX;

/// How long mappings of one class live.
#[derive(Clone, Copy, Debug)]
pub struct Class {
    /// From the last use on.
    pub timeout: Duration,
    /// Whether a mapping of this class may be evicted even though it was used a moment ago.
    pub expendable: bool,
}

/// Bounds of a table.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Limits {
    /// Mappings in all, at most 2^24.
    pub total: usize,
    /// Mappings of one guest address.
    pub per_guest: usize,
    /// Mappings of all addresses behind one port: an IPv6 guest has as many as it likes.
    pub per_port: usize,
}

/// What has to happen before a mapping can be added.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Room {
    /// Nothing.
    Free,
    /// This mapping has to go first.
    Evict(FlowId),
    /// All mappings that count are in use.
    None,
}

/// The neighbours of a mapping in one list.
#[derive(Clone, Copy, Debug)]
struct Links {
    previous: u32,
    next: u32,
}

/// First and last mapping of a list.
#[derive(Clone, Copy, Debug)]
struct List {
    head: u32,
    tail: u32,
}

const EMPTY: List = List {
    head: NIL,
    tail: NIL,
};

/// Which of a mapping's lists.
#[derive(Clone, Copy)]
enum Axis {
    All = 0,
    Guest = 1,
    Port = 2,
}

const AXES: [Axis; 3] = [Axis::All, Axis::Guest, Axis::Port];

/// The mappings of one guest address, or of one port.
#[derive(Debug)]
struct Owned<const N: usize> {
    count: usize,
    lists: [List; N],
}

impl<const N: usize> Default for Owned<N> {
    fn default() -> Self {
        Self {
            count: 0,
            lists: [EMPTY; N],
        }
    }
}

#[derive(Debug)]
struct Entry<V> {
    key: Endpoint,
    /// The port it counts for.
    port: PortId,
    class: usize,
    /// When it last moved to the tail.
    used: Instant,
    links: [Links; AXES.len()],
    value: V,
}

#[derive(Debug)]
struct Slot<V> {
    generation: u32,
    entry: Option<Entry<V>>,
}

/// Mappings with a `V` each, in `N` classes. Low classes are evicted first.
#[derive(Debug)]
pub struct Table<V, const N: usize> {
    classes: [Class; N],
    limits: Limits,
    slots: Vec<Slot<V>>,
    free: Vec<u32>,
    index: HashMap<Endpoint, u32>,
    guests: HashMap<IpAddr, Owned<N>>,
    ports: HashMap<PortId, Owned<N>>,
    lists: [List; N],
}

impl<V, const N: usize> Table<V, N> {
    /// An empty table.
    pub fn new(classes: [Class; N], limits: Limits) -> Self {
        Self {
            classes,
            limits: Limits {
                total: limits.total.min(SLOTS_MAX),
                ..limits
            },
            slots: Vec::new(),
            free: Vec::new(),
            index: HashMap::new(),
            guests: HashMap::new(),
            ports: HashMap::new(),
            lists: [EMPTY; N],
        }
    }

    /// Mappings.
    pub fn len(&self) -> usize {
        self.index.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.index.is_empty()
    }

    /// The mapping of an endpoint.
    pub fn find(&self, key: Endpoint) -> Option<FlowId> {
        let slot = *self.index.get(&key)?;
        Some(self.id(slot))
    }

    /// A mapping's value by its id, unless that is stale.
    pub fn get_mut(&mut self, id: FlowId) -> Option<&mut V> {
        Some(&mut self.entry_mut(id)?.value)
    }

    /// The guest's endpoint of a mapping.
    pub fn guest(&self, id: FlowId) -> Option<SocketAddr> {
        let slot = self.slots.get(id.slot as usize)?;
        let entry = slot.entry.as_ref()?;
        (slot.generation == id.generation).then_some(entry.key.guest)
    }

    /// The id that the next [`Table::insert`] gives.
    pub fn next_id(&self) -> FlowId {
        match self.free.last() {
            Some(&slot) => FlowId {
                slot,
                generation: self.slots[slot as usize].generation.wrapping_add(1),
            },
            None => FlowId {
                slot: self.slots.len() as u32,
                generation: 0,
            },
        }
    }

    /// Whether a mapping of `guest` behind `port` can be added. At the total limit the port that has most
    /// gives way, whether or not its mappings are in use, unless that is the newcomer's. Walks the ports
    /// then.
    pub fn room(&self, guest: IpAddr, port: PortId, now: Instant) -> Room {
        if let Some(own) = self.guests.get(&guest)
            && own.count >= self.limits.per_guest
        {
            return self.victim(&own.lists, now);
        }
        if self.count(port) >= self.limits.per_port {
            return self.idle(port, now);
        }
        if self.len() < self.limits.total {
            return Room::Free;
        }
        match self.largest() {
            Some((largest, count)) if count > self.count(port) + 1 => self.oldest(largest, now),
            _ => self.idle(port, now),
        }
    }

    /// Mappings of a port.
    pub fn count(&self, port: PortId) -> usize {
        self.ports.get(&port).map_or(0, |own| own.count)
    }

    /// The port that has most, and how many.
    pub fn largest(&self) -> Option<(PortId, usize)> {
        let counts = self.ports.iter().map(|(&port, own)| (port, own.count));
        counts.max_by_key(|&(port, count)| (count, port))
    }

    /// The mapping of a port to give up, unless all are in use.
    pub fn idle(&self, port: PortId, now: Instant) -> Room {
        let own = self.ports.get(&port);
        own.map_or(Room::None, |own| self.victim(&own.lists, now))
    }

    /// The mapping of a port to give up: of those that are in use the one unused longest.
    pub fn oldest(&self, port: PortId, now: Instant) -> Room {
        let idle = self.idle(port, now);
        let Some(own) = self.ports.get(&port).filter(|_| idle == Room::None) else {
            return idle;
        };
        let heads = own.lists.iter().map(|list| list.head);
        let oldest = heads
            .filter(|&head| head != NIL)
            .min_by_key(|&head| self.at(head).used);
        oldest.map_or(Room::None, |head| Room::Evict(self.id(head)))
    }

    fn victim(&self, lists: &[List; N], now: Instant) -> Room {
        for (class, list) in self.classes.iter().zip(lists) {
            if list.head == NIL {
                continue;
            }
            let idle = now - self.at(list.head).used;
            if class.expendable || idle >= IN_USE {
                return Room::Evict(self.id(list.head));
            }
        }
        Room::None
    }

    /// Adds a mapping in `class`.
    ///
    /// # Panics
    /// If the endpoint has one already.
    pub fn insert(
        &mut self,
        (key, port): (Endpoint, PortId),
        class: usize,
        value: V,
        now: Instant,
    ) -> FlowId {
        let id = self.next_id();
        let entry = Entry {
            key,
            port,
            class,
            used: now,
            links: [Links {
                previous: NIL,
                next: NIL,
            }; AXES.len()],
            value,
        };
        let slot = Slot {
            generation: id.generation,
            entry: Some(entry),
        };
        match self.free.pop() {
            Some(free) => self.slots[free as usize] = slot,
            None => self.slots.push(slot),
        }
        let before = self.index.insert(key, id.slot);
        assert!(before.is_none(), "{key:?} is mapped already");
        self.guests.entry(key.guest.ip()).or_default().count += 1;
        self.ports.entry(port).or_default().count += 1;
        self.link(id.slot);
        id
    }

    /// Notes that a mapping is used, and in which class it is from here on.
    pub fn touch(&mut self, id: FlowId, class: usize, now: Instant) {
        let Some(entry) = self.entry_mut(id) else {
            return;
        };
        if entry.class == class && now < entry.used + GRANULARITY {
            return;
        }
        self.unlink(id.slot);
        let entry = self.at_mut(id.slot);
        entry.class = class;
        entry.used = now;
        self.link(id.slot);
    }

    /// Takes a mapping out, unless the id is stale.
    pub fn remove(&mut self, id: FlowId) -> Option<V> {
        self.entry_mut(id)?;
        self.unlink(id.slot);
        let entry = self.slots[id.slot as usize].entry.take()?;
        self.index.remove(&entry.key);
        let guest = entry.key.guest.ip();
        if let Some(own) = self.guests.get_mut(&guest) {
            own.count -= 1;
            if own.count == 0 {
                self.guests.remove(&guest);
            }
        }
        if let Some(own) = self.ports.get_mut(&entry.port) {
            own.count -= 1;
            if own.count == 0 {
                self.ports.remove(&entry.port);
            }
        }
        self.free.push(id.slot);
        Some(entry.value)
    }

    /// The mappings whose value is `wanted`; walks the table.
    pub fn ids_where(&self, mut wanted: impl FnMut(&V) -> bool) -> Vec<FlowId> {
        let listed = self.index.values().map(|&slot| (slot, self.at(slot)));
        listed
            .filter(|(_, entry)| wanted(&entry.value))
            .map(|(slot, _)| self.id(slot))
            .collect()
    }

    /// A mapping whose time is over.
    pub fn expired(&self, now: Instant) -> Option<FlowId> {
        let (class, head) = self.next_to_expire()?;
        (now >= self.deadline(class, head)).then(|| self.id(head))
    }

    /// When [`Table::expired`] has to be asked next.
    pub fn poll_timeout(&self) -> Option<Instant> {
        let (class, head) = self.next_to_expire()?;
        Some(self.deadline(class, head))
    }

    fn next_to_expire(&self) -> Option<(usize, u32)> {
        let heads = self.lists.iter().map(|list| list.head).enumerate();
        heads
            .filter(|&(_, head)| head != NIL)
            .min_by_key(|&(class, head)| self.deadline(class, head))
    }

    /// A use that did not move the mapping came at most [`GRANULARITY`] after the one that did.
    fn deadline(&self, class: usize, slot: u32) -> Instant {
        self.at(slot).used + self.classes[class].timeout + GRANULARITY
    }

    fn id(&self, slot: u32) -> FlowId {
        FlowId {
            slot,
            generation: self.slots[slot as usize].generation,
        }
    }

    fn entry_mut(&mut self, id: FlowId) -> Option<&mut Entry<V>> {
        let slot = self.slots.get_mut(id.slot as usize)?;
        if slot.generation != id.generation {
            return None;
        }
        slot.entry.as_mut()
    }

    /// The entry of a slot that is in a list or the index, hence occupied.
    fn at(&self, slot: u32) -> &Entry<V> {
        let slot = &self.slots[slot as usize];
        slot.entry.as_ref().expect("listed slots are occupied")
    }

    fn at_mut(&mut self, slot: u32) -> &mut Entry<V> {
        let slot = &mut self.slots[slot as usize];
        slot.entry.as_mut().expect("listed slots are occupied")
    }

    /// The list of `axis` that `slot` belongs to.
    fn list_mut(&mut self, slot: u32, axis: Axis) -> &mut List {
        let entry = self.at(slot);
        let (class, guest, port) = (entry.class, entry.key.guest.ip(), entry.port);
        match axis {
            Axis::All => &mut self.lists[class],
            Axis::Guest => {
                let guest = self.guests.get_mut(&guest);
                &mut guest.expect("a mapping's guest is known").lists[class]
            }
            Axis::Port => {
                let port = self.ports.get_mut(&port);
                &mut port.expect("a mapping's port is known").lists[class]
            }
        }
    }

    /// Appends a slot to its lists.
    fn link(&mut self, slot: u32) {
        for axis in AXES {
            let list = self.list_mut(slot, axis);
            let previous = std::mem::replace(&mut list.tail, slot);
            if previous == NIL {
                list.head = slot;
            } else {
                self.at_mut(previous).links[axis as usize].next = slot;
            }
            self.at_mut(slot).links[axis as usize] = Links {
                previous,
                next: NIL,
            };
        }
    }

    fn unlink(&mut self, slot: u32) {
        for axis in AXES {
            let Links { previous, next } = self.at(slot).links[axis as usize];
            match previous {
                NIL => self.list_mut(slot, axis).head = next,
                previous => self.at_mut(previous).links[axis as usize].next = next,
            }
            match next {
                NIL => self.list_mut(slot, axis).tail = previous,
                next => self.at_mut(next).links[axis as usize].previous = previous,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    const CLASSES: [Class; 2] = [
        Class {
            timeout: Duration::from_secs(10),
            expendable: true,
        },
        Class {
            timeout: Duration::from_secs(100),
            expendable: false,
        },
    ];

    fn guest(host: u8, port: u16) -> SocketAddr {
        SocketAddr::from(([192, 168, 122, host], port))
    }

    const PORT: PortId = PortId(1);

    fn key(host: u8, port: u16) -> Endpoint {
        Endpoint {
            guest: guest(host, port),
            to: None,
        }
    }

    fn table(total: usize, per_guest: usize) -> Table<u32, 2> {
        Table::new(
            CLASSES,
            Limits {
                total,
                per_guest,
                per_port: usize::MAX,
            },
        )
    }

    fn at(secs: i64) -> Instant {
        Instant::from_secs(secs)
    }

    #[test]
    fn ids_go_stale() {
        let mut table = table(9, 9);
        assert_eq!(table.next_id().generation, 0);
        let first = table.insert((key(2, 1), PORT), 0, 7, at(0));
        assert_eq!(table.find(key(2, 1)), Some(first));
        assert_eq!(table.remove(first), Some(7));
        assert_eq!(table.remove(first), None);
        let expected = table.next_id();
        let second = table.insert((key(2, 2), PORT), 0, 8, at(0));
        assert_eq!(second, expected);
        assert_eq!((second.slot, second.generation), (first.slot, 1));
        assert_eq!(table.get_mut(first), None);
        assert_eq!(table.guest(first), None);
        assert_eq!(table.get_mut(second), Some(&mut 8));
        table.touch(first, 1, at(9));
        assert_eq!(
            table.poll_timeout(),
            Some(at(11)),
            "a stale touch is no use"
        );
    }

    #[test]
    fn expiry_is_at_most_a_granule_late_and_never_early() {
        let mut table = table(9, 9);
        let id = table.insert((key(2, 1), PORT), 0, 0, at(0));
        table.touch(id, 0, Instant::from_millis(900));
        assert_eq!(table.expired(Instant::from_millis(10_999)), None);
        assert_eq!(table.expired(at(11)), Some(id));
        table.touch(id, 0, at(5));
        assert_eq!(table.poll_timeout(), Some(at(16)));
        table.touch(id, 1, Instant::from_millis(5_001));
        assert_eq!(table.poll_timeout(), Some(Instant::from_millis(106_001)));
    }

    #[test]
    fn a_guest_at_its_limit_loses_its_own_oldest() {
        let mut table = table(9, 2);
        let foreign = table.insert((key(3, 1), PORT), 0, 0, at(0));
        let old = table.insert((key(2, 1), PORT), 1, 0, at(1));
        let new = table.insert((key(2, 2), PORT), 1, 0, at(2));
        assert_eq!(
            table.room(guest(2, 0).ip(), PORT, at(3)),
            Room::None,
            "in use"
        );
        assert_eq!(table.room(guest(3, 0).ip(), PORT, at(3)), Room::Free);
        assert_eq!(table.room(guest(2, 0).ip(), PORT, at(7)), Room::Evict(old));
        table.touch(old, 1, at(7));
        assert_eq!(table.room(guest(2, 0).ip(), PORT, at(8)), Room::Evict(new));
        table.touch(old, 0, at(9));
        assert_eq!(table.room(guest(2, 0).ip(), PORT, at(9)), Room::Evict(old));
        // The host has no socket left.
        assert_eq!(table.idle(PORT, at(9)), Room::Evict(foreign));
        for id in [foreign, old, new] {
            table.touch(id, 1, at(11));
        }
        assert_eq!(table.idle(PORT, at(12)), Room::None);
        assert_eq!(table.oldest(PORT, at(12)), Room::Evict(foreign));
    }

    /// However fresh it keeps them: what is in use is no reason to lock others out.
    #[test]
    fn at_the_total_limit_the_port_that_has_most_gives_way() {
        let mut table = table(4, 9);
        let [hog, other, third] = [PortId(1), PortId(2), PortId(3)];
        let oldest = table.insert((key(2, 1), hog), 1, 0, at(0));
        let second = table.insert((key(2, 2), hog), 1, 0, at(0));
        table.insert((key(2, 3), hog), 1, 0, at(0));
        let foreign = table.insert((key(3, 1), other), 1, 0, at(0));
        assert_eq!(table.room(guest(2, 0).ip(), hog, at(1)), Room::None);
        for newcomer in [other, third] {
            assert_eq!(
                table.room(guest(4, 0).ip(), newcomer, at(1)),
                Room::Evict(oldest)
            );
        }
        table.touch(oldest, 1, at(3));
        assert_eq!(
            table.room(guest(4, 0).ip(), other, at(3)),
            Room::Evict(second)
        );
        // Who has most loses its own, though others' are idle as well.
        assert_eq!(
            table.room(guest(2, 0).ip(), hog, at(9)),
            Room::Evict(second)
        );
        table.remove(second);
        table.insert((key(3, 2), other), 1, 0, at(9));
        // Two and two: a third port takes one, neither of the two does from the other.
        assert_eq!(
            table.room(guest(3, 0).ip(), other, at(9)),
            Room::Evict(foreign)
        );
        assert_ne!(table.room(guest(4, 0).ip(), third, at(9)), Room::None);
    }

    #[test]
    fn the_total_limit_takes_the_oldest_of_all() {
        let mut table = table(2, 2);
        let old = table.insert((key(2, 1), PORT), 1, 0, at(0));
        table.insert((key(3, 1), PORT), 1, 0, at(1));
        assert_eq!(table.room(guest(4, 0).ip(), PORT, at(4)), Room::None);
        assert_eq!(table.room(guest(4, 0).ip(), PORT, at(5)), Room::Evict(old));
    }

    /// The table against a map that is searched from end to end.
    #[derive(Clone, Debug)]
    enum Op {
        Use { host: u8, port: u16, class: usize },
        Remove { host: u8, port: u16 },
        Wait { millis: u64 },
    }

    fn op() -> impl Strategy<Value = Op> {
        prop_oneof![
            6 => (2u8..5, 0u16..6, 0usize..2)
                .prop_map(|(host, port, class)| Op::Use { host, port, class }),
            1 => (2u8..5, 0u16..6).prop_map(|(host, port)| Op::Remove { host, port }),
            2 => (0u64..20_000).prop_map(|millis| Op::Wait { millis }),
        ]
    }

    proptest! {
        #[test]
        fn behaves_like_the_plain_model(ops in prop::collection::vec(op(), 1..200)) {
            let mut table = table(10, 4);
            // Guest to (class, last use).
            let mut model: BTreeMap<SocketAddr, (usize, Instant)> = BTreeMap::new();
            let mut now = at(0);
            for op in ops {
                match op {
                    Op::Use { host, port, class } => {
                        let at = guest(host, port);
                        if let Some(id) = table.find(key(host, port)) {
                            table.touch(id, class, now);
                            model.insert(at, (class, now));
                        } else {
                            let room = table.room(at.ip(), PORT, now);
                            if let Room::Evict(id) = room {
                                let victim = table.guest(id).unwrap();
                                let (class, used) = model.remove(&victim).unwrap();
                                prop_assert!(class == 0 || now - used + GRANULARITY >= IN_USE);
                                table.remove(id).unwrap();
                            }
                            if room != Room::None {
                                table.insert((key(host, port), PORT), class, u32::from(port), now);
                                model.insert(at, (class, now));
                            }
                        }
                    }
                    Op::Remove { host, port } => {
                        let id = table.find(key(host, port));
                        let removed = id.and_then(|id| table.remove(id));
                        prop_assert_eq!(removed.is_some(), model.remove(&guest(host, port)).is_some());
                    }
                    Op::Wait { millis } => now += Duration::from_millis(millis),
                }
                while let Some(id) = table.expired(now) {
                    let (class, used) = model.remove(&table.guest(id).unwrap()).unwrap();
                    prop_assert!(now >= used + CLASSES[class].timeout);
                    table.remove(id).unwrap();
                }
                for (class, used) in model.values() {
                    prop_assert!(now < *used + CLASSES[*class].timeout + GRANULARITY);
                }
                prop_assert_eq!(table.len(), model.len());
                prop_assert!(table.len() <= 10);
                for host in 2..5 {
                    prop_assert!(model.keys().filter(|key| key.ip() == guest(host, 0).ip()).count() <= 4);
                }
                prop_assert_eq!(table.poll_timeout().is_none(), model.is_empty());
            }
        }
    }
}
