//! Fair shares of a bounded table: who holds how many entries, and in which order those have idled.
//!
//! At the limit the longest idle entry of whoever holds most gives way, so that nobody who holds little is
//! refused by those who hold much. A guest's entries count for its port, those of clients from outside
//! for the forward that they came by: a published port's clients take nothing from its own guest.
//!
//! # State
//! [`Shares`] has a doubly linked list of slots per [`Holder`], in order of last use; a use moves a slot to
//! the tail at most once per [`GRANULARITY`], so a busy entry costs a comparison. [`Held`] has the counts
//! of all workers: each changes its own holders', anyone may read who holds most. That walks the counts,
//! 5 microseconds, and happens at the limit only.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering::Relaxed};

use crate::frame::{Instant, PortId};
use crate::nat::forward::{FORWARDS_MAX, ForwardId};
use crate::nat::mapping::GRANULARITY;
use crate::switch::PORTS_MAX;

const NIL: u32 = u32::MAX;
/// Holders that are told apart.
pub const HOLDERS_MAX: usize = PORTS_MAX + FORWARDS_MAX;

/// Who has an entry: a port, for what its guests began, or a forward. Numbers of forwards are never given
/// twice; of two whose numbers are [`FORWARDS_MAX`] apart both have one share.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Holder(u16);

const _: () = assert!(HOLDERS_MAX <= u16::MAX as usize);

impl From<PortId> for Holder {
    fn from(port: PortId) -> Self {
        Self(port.0 % PORTS_MAX as u16)
    }
}

impl From<ForwardId> for Holder {
    fn from(forward: ForwardId) -> Self {
        Self((PORTS_MAX + forward.0 as usize % FORWARDS_MAX) as u16)
    }
}

impl Holder {
    /// Whether it is a forward.
    pub fn is_forward(self) -> bool {
        usize::from(self.0) >= PORTS_MAX
    }

    /// The port, if it is one.
    pub fn port(self) -> Option<PortId> {
        Some(PortId(self.0)).filter(|_| !self.is_forward())
    }

    /// Its number, below [`HOLDERS_MAX`].
    pub fn index(self) -> usize {
        usize::from(self.0)
    }
}

/// How many entries each holder has, of all workers.
#[derive(Debug)]
pub struct Held {
    counts: Box<[AtomicU32]>,
    total: AtomicUsize,
    forwards: AtomicUsize,
    /// A worker has asked the others for a file, and none has given one yet.
    file_wanted: AtomicBool,
}

impl Default for Held {
    fn default() -> Self {
        Self {
            counts: (0..HOLDERS_MAX).map(|_| AtomicU32::new(0)).collect(),
            total: AtomicUsize::new(0),
            forwards: AtomicUsize::new(0),
            file_wanted: AtomicBool::new(false),
        }
    }
}

impl Held {
    /// Entries of all.
    pub fn total(&self) -> usize {
        self.total.load(Relaxed)
    }

    /// Entries of all forwards.
    pub fn of_forwards(&self) -> usize {
        self.forwards.load(Relaxed)
    }

    /// Entries of one holder.
    pub fn of(&self, holder: Holder) -> usize {
        self.counts[holder.index()].load(Relaxed) as usize
    }

    /// Who holds most, and how many.
    pub fn most(&self) -> (Holder, usize) {
        self.most_from(0)
    }

    /// Which forward holds most, and how many.
    pub fn most_of_forwards(&self) -> (Holder, usize) {
        self.most_from(PORTS_MAX)
    }

    fn most_from(&self, first: usize) -> (Holder, usize) {
        let counts = self.counts.iter().enumerate().skip(first);
        let counts = counts.map(|(index, count)| (count.load(Relaxed), index as u16));
        let (count, index) = counts.max().unwrap_or_default();
        (Holder(index), count as usize)
    }

    /// Notes that the other workers are asked for a file.
    pub fn want_file(&self) {
        self.file_wanted.store(true, Relaxed);
    }

    /// Whether a file is still wanted; who is told so gives one, and nobody else.
    pub fn claim_file(&self) -> bool {
        self.file_wanted.swap(false, Relaxed)
    }

    fn add(&self, holder: Holder) {
        self.counts[holder.index()].fetch_add(1, Relaxed);
        self.total.fetch_add(1, Relaxed);
        self.forwards
            .fetch_add(usize::from(holder.is_forward()), Relaxed);
    }

    fn subtract(&self, holder: Holder) {
        self.counts[holder.index()].fetch_sub(1, Relaxed);
        self.total.fetch_sub(1, Relaxed);
        self.forwards
            .fetch_sub(usize::from(holder.is_forward()), Relaxed);
    }
}

/// A slot's neighbours in its holder's list.
#[derive(Clone, Copy, Debug)]
struct Link {
    holder: Holder,
    previous: u32,
    next: u32,
    /// When it last moved to the tail.
    used: Instant,
}

#[derive(Clone, Copy, Debug)]
struct List {
    head: u32,
    tail: u32,
    count: u32,
}

const EMPTY: List = List {
    head: NIL,
    tail: NIL,
    count: 0,
};

/// The holders of one worker's table.
#[derive(Debug)]
pub struct Shares {
    links: Vec<Option<Link>>,
    lists: Box<[List]>,
    held: Arc<Held>,
}

impl Shares {
    /// Nobody holds anything here yet. What is held counts in `held`.
    pub fn new(held: Arc<Held>) -> Self {
        Self {
            links: Vec::new(),
            lists: vec![EMPTY; HOLDERS_MAX].into_boxed_slice(),
            held,
        }
    }

    /// The counts of all workers.
    pub fn held(&self) -> &Held {
        &self.held
    }

    /// Who has a slot.
    #[inline]
    pub fn holder(&self, slot: u32) -> Option<Holder> {
        let link = self.links.get(slot as usize)?.as_ref()?;
        Some(link.holder)
    }

    /// Entries that a holder has in this table.
    pub fn count(&self, holder: Holder) -> usize {
        self.lists[holder.index()].count as usize
    }

    /// The slot of a holder that is unused longest.
    pub fn oldest(&self, holder: Holder) -> Option<u32> {
        Some(self.lists[holder.index()].head).filter(|&slot| slot != NIL)
    }

    /// Notes that a slot is `holder`'s from here on.
    pub fn insert(&mut self, slot: u32, holder: Holder, now: Instant) {
        self.remove(slot);
        if self.links.len() <= slot as usize {
            self.links.resize(slot as usize + 1, None);
        }
        self.held.add(holder);
        self.lists[holder.index()].count += 1;
        self.push(slot, holder, now);
    }

    /// Notes that a slot was used.
    #[inline]
    pub fn touch(&mut self, slot: u32, used: Instant) {
        if let Some(Some(link)) = self.links.get(slot as usize)
            && used >= link.used + GRANULARITY
        {
            let holder = link.holder;
            self.unlink(slot);
            self.push(slot, holder, used);
        }
    }

    /// Notes that a slot is free; one that nobody holds stays so.
    pub fn remove(&mut self, slot: u32) {
        if let Some(Some(link)) = self.links.get(slot as usize) {
            let holder = link.holder;
            self.unlink(slot);
            self.links[slot as usize] = None;
            self.lists[holder.index()].count -= 1;
            self.held.subtract(holder);
        }
    }

    /// Appends a slot to its holder's list.
    fn push(&mut self, slot: u32, holder: Holder, used: Instant) {
        let list = &mut self.lists[holder.index()];
        let previous = std::mem::replace(&mut list.tail, slot);
        match self.links.get_mut(previous as usize) {
            Some(Some(link)) => link.next = slot,
            _ => list.head = slot,
        }
        self.links[slot as usize] = Some(Link {
            holder,
            previous,
            next: NIL,
            used,
        });
    }

    /// Takes a slot out of its list; its own link is stale afterwards.
    fn unlink(&mut self, slot: u32) {
        let Some(link) = self.links[slot as usize] else {
            return;
        };
        let list = &mut self.lists[link.holder.index()];
        match self.links.get_mut(link.previous as usize) {
            Some(Some(previous)) => previous.next = link.next,
            _ => list.head = link.next,
        }
        match self.links.get_mut(link.next as usize) {
            Some(Some(next)) => next.previous = link.previous,
            _ => list.tail = link.previous,
        }
    }
}

impl Drop for Shares {
    fn drop(&mut self) {
        // Others go on counting.
        for slot in 0..self.links.len() {
            self.remove(slot as u32);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn at(secs: i64) -> Instant {
        Instant::from_secs(secs)
    }

    #[test]
    fn who_holds_most_is_known_to_all_workers() {
        let held = Arc::<Held>::default();
        let mut one = Shares::new(Arc::clone(&held));
        let mut two = Shares::new(Arc::clone(&held));
        let (port, forward) = (Holder::from(PortId(7)), Holder::from(ForwardId(3)));
        (0..3).for_each(|slot| one.insert(slot, port, at(0)));
        (0..2).for_each(|slot| two.insert(slot, forward, at(0)));
        assert_eq!(held.most(), (port, 3));
        assert_eq!(held.most_of_forwards(), (forward, 2));
        assert_eq!((held.total(), held.of_forwards()), (5, 2));
        assert_eq!((two.oldest(port), one.oldest(port)), (None, Some(0)));
        one.touch(0, at(5));
        assert_eq!(one.oldest(port), Some(1));
        // A slot that changes hands.
        one.insert(1, forward, at(6));
        assert_eq!((one.count(port), one.count(forward)), (2, 1));
        assert_eq!((held.of(port), held.of(forward)), (2, 3));
        drop(one);
        assert_eq!((held.total(), held.most()), (2, (forward, 2)));
    }

    proptest! {
        #[test]
        fn behaves_like_the_plain_model(ops in prop::collection::vec((0u32..12, 0u16..3, 0u8..4), 1..200)) {
            let mut shares = Shares::new(Arc::default());
            // Slot, holder and last use; the order is that of the lists.
            let mut model: Vec<(u32, u16)> = Vec::new();
            for (now, (slot, port, op)) in (0..).zip(ops) {
                let known = model.iter().position(|&(of, _)| of == slot);
                match op {
                    0 | 1 => {
                        known.map(|at| model.remove(at));
                        model.push((slot, port));
                        shares.insert(slot, Holder(port), at(now));
                    }
                    2 => {
                        if let Some(place) = known {
                            let moved = model.remove(place);
                            model.push(moved);
                        }
                        shares.touch(slot, at(now));
                    }
                    _ => {
                        known.map(|at| model.remove(at));
                        shares.remove(slot);
                    }
                }
                for port in 0..3 {
                    let mut of_port = model.iter().filter(|&&(_, of)| of == port);
                    prop_assert_eq!(shares.count(Holder(port)), of_port.clone().count());
                    prop_assert_eq!(shares.oldest(Holder(port)), of_port.next().map(|&(slot, _)| slot));
                }
                prop_assert_eq!(shares.held().total(), model.len());
            }
        }
    }
}
