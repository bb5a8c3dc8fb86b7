//! A bounded slab of flows with generations, and a timer wheel over them.
//!
//! An id that outlived its flow finds nothing, so a late socket event or timer can't hit the flow
//! that took its slot.

use crate::frame::{Duration, Instant};
use crate::nat::FlowId;

/// Entries in slots; the slot of a removed entry is reused under a new generation.
pub struct FlowTable<T> {
    slots: Vec<Slot<T>>,
    free: Vec<u32>,
    limit: usize,
}

struct Slot<T> {
    generation: u32,
    entry: Option<T>,
}

impl<T> FlowTable<T> {
    /// A table for at most `limit` entries.
    pub fn new(limit: usize) -> Self {
        Self {
            slots: Vec::new(),
            free: Vec::new(),
            limit,
        }
    }

    /// Number of entries of this table.
    pub fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Whether there is no entry.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Inserts what `make` returns for the new id.
    ///
    /// # Errors
    /// `full` at the limit, else what `make` fails with; nothing changed then.
    pub fn insert_with<E>(
        &mut self,
        full: E,
        make: impl FnOnce(FlowId) -> Result<T, E>,
    ) -> Result<FlowId, E> {
        if self.len() >= self.limit {
            return Err(full);
        }
        let reused = self.free.last().copied();
        let slot = reused.unwrap_or(self.slots.len() as u32);
        let generation = reused.map_or(0, |slot| self.slots[slot as usize].generation);
        let id = FlowId { slot, generation };
        let entry = Some(make(id)?);
        match self.free.pop() {
            Some(_) => self.slots[slot as usize].entry = entry,
            None => self.slots.push(Slot { generation, entry }),
        }
        Ok(id)
    }

    /// The id of the entry in a slot, if there is one.
    pub fn id_at(&self, slot: u32) -> Option<FlowId> {
        let Slot { generation, entry } = self.slots.get(slot as usize)?;
        let generation = *generation;
        entry.as_ref().map(|_| FlowId { slot, generation })
    }

    /// The entry in a slot, if there is one.
    pub fn at(&self, slot: u32) -> Option<&T> {
        self.slots.get(slot as usize)?.entry.as_ref()
    }

    /// The entry of `id`, if it still exists.
    pub fn get_mut(&mut self, id: FlowId) -> Option<&mut T> {
        let slot = self.slots.get_mut(id.slot as usize)?;
        slot.entry
            .as_mut()
            .filter(|_| slot.generation == id.generation)
    }

    /// Removes the entry of `id`.
    pub fn remove(&mut self, id: FlowId) -> Option<T> {
        let slot = self.slots.get_mut(id.slot as usize)?;
        if slot.generation != id.generation {
            return None;
        }
        let entry = slot.entry.take()?;
        slot.generation = slot.generation.wrapping_add(1);
        self.free.push(id.slot);
        Some(entry)
    }

    /// All entries.
    pub fn iter(&self) -> impl Iterator<Item = &T> {
        self.slots.iter().filter_map(|slot| slot.entry.as_ref())
    }

    /// The ids of all entries, by slot.
    pub fn ids(&self) -> impl Iterator<Item = FlowId> + '_ {
        self.slots
            .iter()
            .enumerate()
            .filter(|(_, slot)| slot.entry.is_some())
            .map(|(index, slot)| FlowId {
                slot: index as u32,
                generation: slot.generation,
            })
    }
}

/// Width of a wheel slot. TCP's shortest timer here is smoltcp's minimum RTO of 1 s.
pub const TICK: Duration = Duration::from_millis(64);
/// Slots: 64 ms x 512 = 33 s. Later deadlines wait in the farthest slot and are put in again.
const WHEEL_SLOTS: usize = 512;

/// Entries that a slot keeps room for: of 512 slots 128 KiB.
const SLOT_KEPT: usize = 32;

/// Deadlines of flows, lazily: an entry that comes due before its flow's real deadline is simply put
/// in again by its owner. Arming is O(1), expiry O(entries due).
pub struct TimerWheel {
    slots: Vec<Vec<FlowId>>,
    /// First tick that has not been expired.
    tick: u64,
    /// First tick with an entry, if there is one.
    soonest: u64,
    len: usize,
}

impl TimerWheel {
    /// An empty wheel that starts at `now`.
    pub fn new(now: Instant) -> Self {
        Self {
            slots: vec![Vec::new(); WHEEL_SLOTS],
            tick: tick_of(now),
            soonest: u64::MAX,
            len: 0,
        }
    }

    /// Calls for `id` at `deadline`, rounded up to a tick. Returns when the entry will really come
    /// due, which is earlier for deadlines beyond the wheel.
    pub fn arm(&mut self, id: FlowId, deadline: Instant) -> Instant {
        let wanted = tick_of(deadline) + 1;
        let tick = wanted.clamp(self.tick, self.tick + WHEEL_SLOTS as u64 - 1);
        self.slots[tick as usize % WHEEL_SLOTS].push(id);
        self.soonest = self.soonest.min(tick);
        self.len += 1;
        Instant::from_micros((tick * TICK.total_micros()) as i64)
    }

    /// When [`TimerWheel::expire`] next has something to do.
    pub fn poll_timeout(&self) -> Option<Instant> {
        (self.len != 0).then(|| Instant::from_micros((self.soonest * TICK.total_micros()) as i64))
    }

    /// Number of entries, those of outdated deadlines included.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is no entry.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Moves the entries that are due at `now` into `due`.
    pub fn expire(&mut self, now: Instant, due: &mut Vec<FlowId>) {
        let end = tick_of(now) + 1;
        // After a long sleep one lap visits every slot.
        let laps_end = end.min(self.tick + WHEEL_SLOTS as u64);
        for tick in self.tick..laps_end {
            let slot = &mut self.slots[tick as usize % WHEEL_SLOTS];
            self.len -= slot.len();
            due.append(slot);
            // What a flood of flows made it grow to.
            slot.shrink_to(SLOT_KEPT);
        }
        self.tick = self.tick.max(end);
        self.soonest = (self.tick..self.tick + WHEEL_SLOTS as u64)
            .find(|tick| !self.slots[*tick as usize % WHEEL_SLOTS].is_empty())
            .unwrap_or(u64::MAX);
    }
}

fn tick_of(time: Instant) -> u64 {
    time.total_micros().max(0) as u64 / TICK.total_micros()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stale_id_finds_nothing() {
        let mut table = FlowTable::new(2);
        let first = table.insert_with((), |_| Ok("a")).unwrap();
        table.insert_with((), |_| Ok("b")).unwrap();
        assert_eq!(table.insert_with("full", |_| Ok("c")), Err("full"));
        assert_eq!(table.remove(first), Some("a"));
        let again = table.insert_with((), |_| Ok("c")).unwrap();
        assert_eq!(again.slot, first.slot);
        assert_eq!(table.get_mut(first), None);
        assert_eq!(table.remove(first), None);
        assert_eq!(table.get_mut(again), Some(&mut "c"));
        assert_eq!(table.ids().count(), 2);
    }

    #[test]
    fn a_failed_insert_changes_nothing() {
        let mut table: FlowTable<()> = FlowTable::new(1);
        assert_eq!(table.insert_with(1, |_| Err(2)), Err(2));
        assert!(table.is_empty());
        assert!(table.insert_with(1, |_| Ok(())).is_ok());
        assert_eq!(table.len(), 1);
    }

    #[test]
    fn timers_come_due_once_never_early_and_long_ones_return() {
        let id = |slot| FlowId {
            slot,
            generation: 0,
        };
        let at = |ms| Instant::from_millis(ms);
        let mut wheel = TimerWheel::new(at(1_000));
        wheel.arm(id(1), at(1_500));
        wheel.arm(id(2), at(1_500));
        let far = wheel.arm(id(3), at(3_600_000));
        assert!(far < at(40_000));
        let mut due = Vec::new();
        wheel.expire(at(1_499), &mut due);
        assert!(due.is_empty());
        let first = wheel.poll_timeout().unwrap();
        assert!(first >= at(1_500) && first <= at(1_500) + TICK * 2);
        wheel.expire(first, &mut due);
        assert_eq!(due, [id(1), id(2)]);
        due.clear();
        wheel.expire(at(500_000), &mut due);
        assert_eq!(due, [id(3)]);
        assert_eq!(wheel.poll_timeout(), None);
        wheel.arm(id(4), at(0));
        due.clear();
        wheel.expire(at(500_100), &mut due);
        assert_eq!(due, [id(4)]);
        // What a flood took is given back.
        for slot in 0..10_000 {
            wheel.arm(id(slot), at(500_200));
        }
        due.clear();
        wheel.expire(at(600_000), &mut due);
        assert_eq!(due.len(), 10_000);
        assert!(wheel.slots.iter().all(|slot| slot.capacity() <= SLOT_KEPT));
    }
}
