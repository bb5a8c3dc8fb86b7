//! The MAC table: a hash table of single atomic words, with limits and ageing.
//!
//! ```text
//!  word   | 63..16 MAC | 15..12 stamp | 11..0 port |      0 = free
//!  table  | window: 4 quarters of 4 words, two cache lines | window | ...
//! ```
//!
//! The hash of an address names a window and a quarter of it. The address lies in that quarter, or
//! anywhere in the window if the quarter was full (1 in 270 is, at the load below). So a search
//! reads one cache line, or the two of a window, whatever the table holds, and removal needs no
//! tombstones. A whole entry is one word, so every change is one compare-and-swap, and whoever loses
//! one leaves the entry as the winner made it. Only the winner adjusts the counts, so they never
//! drift.
//!
//! | load | stations per window | windows that overflow (Poisson) |
//! |---|---|---|
//! | 1/2 | 8 | 1 in 270 |
//! | 1/3 | 5.3 | 1 in 23,000 |
//! | **1/4** | 4 | 1 in 880,000 |
//!
//! Hence four words for each station allowed. One that finds no place all the same is refused and
//! counted like one beyond the limit.
//!
//! Ageing: entries carry the low four bits of the step in which they were last seen; when a step is
//! over, one walk frees those that are too old. Age is at most 8 before a walk, so four bits can't
//! be mistaken. Refreshing writes an entry once per step, not once per frame.

use std::sync::atomic::{AtomicI64, AtomicU32, AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, TryLockError};

use crate::frame::{Mac, PortId, Station};

const QUARTERS: usize = 4;
const QUARTER_WORDS: usize = 4;
const WINDOW_WORDS: usize = QUARTERS * QUARTER_WORDS;
const WORDS_PER_STATION: usize = 4;
const PORT_BITS: u32 = 12;
const STAMP_BITS: u32 = 4;
const MAC_SHIFT: u32 = PORT_BITS + STAMP_BITS;
const STAMP_MASK: u64 = (1 << STAMP_BITS) - 1;
/// Ports whose stations can be learned: what the entry's port field holds. The limit on open files
/// (three for a VMM's port) ends a network earlier.
pub const PORTS_MAX: usize = 1 << PORT_BITS;

/// What the table counted since it was made.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct TableCounters {
    /// Stations in the table now.
    pub stations: usize,
    /// Times a station was seen on another port than before.
    pub moves: u64,
    /// Frames whose source was not learned because its port has all the stations it may have.
    pub refused_port_full: u64,
    /// Frames whose source was not learned because the table, or its part of the table, is full.
    pub refused_table_full: u64,
}

impl TableCounters {
    /// Names, as `lanlet status` shows them, and values.
    pub fn iter(self) -> impl Iterator<Item = (&'static str, u64)> {
        let Self {
            stations,
            moves,
            refused_port_full,
            refused_table_full,
        } = self;
        [
            ("stations", stations as u64),
            ("station_moves", moves),
            ("stations_refused_port_full", refused_port_full),
            ("stations_refused_table_full", refused_table_full),
        ]
        .into_iter()
    }
}

/// Two cache lines, which the CPU fetches together. See the module's head.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Window([[AtomicU64; QUARTER_WORDS]; QUARTERS]);

impl Window {
    /// The word of `mac` among `quarters`, or 0.
    ///
    /// Compares all of them without a branch for each: which one matches can't be predicted, and a
    /// branch on it would make the next search wait for this one's cache miss.
    #[inline]
    fn search(quarters: &[[AtomicU64; QUARTER_WORDS]], mac: u64) -> u64 {
        let key = mac << MAC_SHIFT;
        quarters.iter().flatten().fold(0, |found, entry| {
            let word = entry.load(Relaxed);
            if word ^ key < 1 << MAC_SHIFT {
                word
            } else {
                found
            }
        })
    }

    fn entries(&self) -> impl Iterator<Item = &AtomicU64> {
        self.0.iter().flatten()
    }
}

/// See the module's head.
#[derive(Debug)]
pub(super) struct MacTable {
    windows: Box<[Window]>,
    hash_keys: [u64; 2],
    /// Step that entries are stamped with.
    step: AtomicI64,
    /// Held by whoever walks the table at the end of a step.
    ageing: Mutex<()>,
    stations: AtomicU32,
    stations_max: u32,
    of_port: Box<[AtomicU32]>,
    of_port_max: u32,
    moves: AtomicU64,
    refused_port_full: AtomicU64,
    refused_table_full: AtomicU64,
}

impl MacTable {
    pub fn new(stations_max: usize, stations_per_port_max: usize, seed: u64) -> Self {
        let words = (stations_max.max(1) * WORDS_PER_STATION).next_power_of_two();
        let windows = (words / WINDOW_WORDS).max(1);
        // Two keys out of one seed: steps of SplitMix64 (Steele et al. 2014), forced odd.
        let key = |n: u64| {
            let mut z = seed.wrapping_add(n.wrapping_mul(0x9e37_79b9_7f4a_7c15));
            z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
            (z ^ z >> 31) | 1
        };
        Self {
            windows: (0..windows).map(|_| Window::default()).collect(),
            hash_keys: [key(1), key(2)],
            step: AtomicI64::new(0),
            ageing: Mutex::new(()),
            stations: AtomicU32::new(0),
            stations_max: u32::try_from(stations_max).unwrap_or(u32::MAX),
            of_port: (0..PORTS_MAX).map(|_| AtomicU32::new(0)).collect(),
            of_port_max: u32::try_from(stations_per_port_max).unwrap_or(u32::MAX),
            moves: AtomicU64::new(0),
            refused_port_full: AtomicU64::new(0),
            refused_table_full: AtomicU64::new(0),
        }
    }

    /// The port a station was last seen on.
    #[inline]
    pub fn find_port(&self, mac: u64) -> Option<PortId> {
        match self.find(mac) {
            0 => None,
            word => Some(port_of(word)),
        }
    }

    /// Notes that `mac`, which is not zero, was seen on `port` in the present step.
    #[inline]
    pub fn learn(&self, mac: u64, port: PortId) {
        let stamp = self.step.load(Relaxed) as u64 & STAMP_MASK;
        let word = mac << MAC_SHIFT | stamp << PORT_BITS | u64::from(port.0);
        let found = self.find(mac);
        // A port beyond the field spills into the stamp, where it may look like another port.
        if found != word || usize::from(port.0) >= PORTS_MAX {
            self.change(found, word, port);
        }
    }

    /// The window and the quarter that `mac` hashes to.
    #[inline]
    fn home(&self, mac: u64) -> (&Window, usize) {
        let [a, b] = self.hash_keys;
        // Twice: addresses given out in sequence still show through one round.
        let hash = fold_multiply(fold_multiply(mac ^ a, b), a);
        let window = hash as usize & (self.windows.len() - 1);
        (&self.windows[window], (hash >> 62) as usize)
    }

    /// The word of `mac`, or 0.
    #[inline]
    fn find(&self, mac: u64) -> u64 {
        let (window, quarter) = self.home(mac);
        match Window::search(&window.0[quarter..=quarter], mac) {
            0 => Self::find_astray(window, mac),
            word => word,
        }
    }

    #[cold]
    #[inline(never)]
    fn find_astray(window: &Window, mac: u64) -> u64 {
        // A free word reads as the zero address, which is nobody's: 0 is right there too.
        Window::search(&window.0, mac)
    }

    /// Makes `word` of what was `found`: a refresh, a move or a station not seen before.
    #[cold]
    #[inline(never)]
    fn change(&self, found: u64, word: u64, port: PortId) {
        let Some(of_port) = self.of_port.get(usize::from(port.0)) else {
            return count(&self.refused_port_full);
        };
        let mac = word >> MAC_SHIFT;
        if found == 0 {
            return self.insert(mac, word, of_port);
        }
        let (window, _) = self.home(mac);
        let Some(entry) = window.entries().find(|entry| entry.load(Relaxed) == found) else {
            return;
        };
        if port_of(found) == port {
            replace(entry, found, word);
        } else {
            self.move_station(entry, found, word, of_port);
        }
    }

    fn insert(&self, mac: u64, word: u64, of_port: &AtomicU32) {
        if !reserve(of_port, self.of_port_max) {
            return count(&self.refused_port_full);
        }
        if reserve(&self.stations, self.stations_max) {
            let (window, quarter) = self.home(mac);
            let mut at_home_first = window.0[quarter].iter().chain(window.entries());
            if at_home_first.any(|entry| replace(entry, 0, word)) {
                return;
            }
            self.stations.fetch_sub(1, Relaxed);
        }
        of_port.fetch_sub(1, Relaxed);
        count(&self.refused_table_full);
    }

    /// A port that is full can't draw stations from others: the entry stays as it is.
    fn move_station(&self, entry: &AtomicU64, found: u64, word: u64, of_port: &AtomicU32) {
        if !reserve(of_port, self.of_port_max) {
            return count(&self.refused_port_full);
        }
        if replace(entry, found, word) {
            self.of_port[usize::from(port_of(found).0)].fetch_sub(1, Relaxed);
            count(&self.moves);
        } else {
            of_port.fetch_sub(1, Relaxed);
        }
    }

    /// Frees an entry, unless it changed since `found` was read.
    fn remove(&self, entry: &AtomicU64, found: u64) -> bool {
        let removed = replace(entry, found, 0);
        if removed {
            self.of_port[usize::from(port_of(found).0)].fetch_sub(1, Relaxed);
            self.stations.fetch_sub(1, Relaxed);
        }
        removed
    }

    fn entries(&self) -> impl Iterator<Item = (&AtomicU64, u64)> {
        self.windows
            .iter()
            .flat_map(Window::entries)
            .map(|entry| (entry, entry.load(Relaxed)))
            .filter(|&(_, word)| word != 0)
    }

    /// Makes `step` the present step, and frees entries last seen more than `age_max` steps before.
    /// Steps back are ignored.
    #[inline]
    pub fn advance_to(&self, step: i64, age_max: i64) {
        if step > self.step.load(Relaxed) {
            self.expire(step, age_max);
        }
    }

    #[cold]
    fn expire(&self, step: i64, age_max: i64) {
        // Whoever comes second goes on in the old step rather than wait.
        let _guard = match self.ageing.try_lock() {
            Ok(guard) => guard,
            Err(TryLockError::Poisoned(guard)) => guard.into_inner(),
            Err(TryLockError::WouldBlock) => return,
        };
        let before = self.step.load(Relaxed);
        let advance = step - before;
        if advance <= 0 {
            return;
        }
        for (entry, word) in self.entries() {
            let age_before = (before as u64).wrapping_sub(word >> PORT_BITS) & STAMP_MASK;
            if advance > age_max - age_before as i64 {
                self.remove(entry, word);
            }
        }
        // Stored after the walk: what is learned meanwhile still counts as seen in the old step.
        self.step.store(step, Relaxed);
    }

    /// Frees the entries of a port; their number.
    pub fn remove_port(&self, port: PortId) -> usize {
        self.entries()
            .filter(|&(entry, word)| port_of(word) == port && self.remove(entry, word))
            .count()
    }

    /// The stations, sorted by address.
    pub fn snapshot(&self) -> Vec<Station> {
        let station = |word: u64| {
            let [_, _, mac @ ..] = (word >> MAC_SHIFT).to_be_bytes();
            Station {
                mac: Mac(mac),
                port: port_of(word),
            }
        };
        let mut stations: Vec<_> = self.entries().map(|(_, word)| station(word)).collect();
        stations.sort_unstable();
        // Two workers that learn a station at once may enter it twice, until the copy ages out.
        stations.dedup_by_key(|station| station.mac);
        stations
    }

    pub fn counters(&self) -> TableCounters {
        TableCounters {
            stations: self.stations.load(Relaxed) as usize,
            moves: self.moves.load(Relaxed),
            refused_port_full: self.refused_port_full.load(Relaxed),
            refused_table_full: self.refused_table_full.load(Relaxed),
        }
    }
}

/// Both halves of the product, so that every bit of the result depends on every bit of `value`.
#[inline]
fn fold_multiply(value: u64, key: u64) -> u64 {
    let product = u128::from(value) * u128::from(key);
    (product >> 64) as u64 ^ product as u64
}

fn port_of(word: u64) -> PortId {
    PortId(word as u16 & (PORTS_MAX - 1) as u16)
}

fn replace(entry: &AtomicU64, found: u64, word: u64) -> bool {
    entry
        .compare_exchange(found, word, Relaxed, Relaxed)
        .is_ok()
}

/// Takes one of `max`, or leaves the count as it is.
fn reserve(counter: &AtomicU32, max: u32) -> bool {
    counter
        .fetch_update(Relaxed, Relaxed, |count| (count < max).then_some(count + 1))
        .is_ok()
}

fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Relaxed);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Locally administered unicast addresses that differ in the bits `n` has.
    fn mac(n: u64) -> u64 {
        0x0200_0000_0000 | n
    }

    const AGE_MAX: i64 = 8;

    #[test]
    fn a_table_takes_all_the_stations_it_may_have_whatever_the_seed() {
        let mut refused = 0;
        for seed in 0..20 {
            let table = MacTable::new(16_384, 16_384, seed);
            (0..16_384).for_each(|n| table.learn(mac(n), PortId(1)));
            let counters = table.counters();
            assert_eq!(
                counters.stations as u64 + counters.refused_table_full,
                16_384
            );
            refused += counters.refused_table_full;
            table.learn(mac(1 << 30), PortId(1));
            assert!(table.counters().stations <= 16_384);
        }
        // 20 times 4,096 windows at a load of 1/4.
        assert!(refused <= 3, "{refused}");
    }

    #[test]
    fn a_full_port_neither_evicts_nor_draws_stations() {
        let table = MacTable::new(64, 4, 7);
        table.learn(mac(1000), PortId(1));
        (0..100).for_each(|n| table.learn(mac(n), PortId(2)));
        table.learn(mac(1000), PortId(2));
        assert_eq!(table.find_port(mac(1000)), Some(PortId(1)));
        let counters = table.counters();
        assert_eq!((counters.stations, counters.refused_port_full), (5, 97));
        assert_eq!((counters.moves, counters.refused_table_full), (0, 0));
        // Its own stations may leave, which makes room.
        table.learn(mac(0), PortId(1));
        table.learn(mac(50), PortId(2));
        assert_eq!(table.find_port(mac(50)), Some(PortId(2)));
        assert_eq!(table.counters().moves, 1);
    }

    #[test]
    fn a_full_table_refuses() {
        let table = MacTable::new(8, 8, 7);
        (0..9).for_each(|n| table.learn(mac(n), PortId(n as u16)));
        assert_eq!(table.find_port(mac(8)), None);
        let counters = table.counters();
        assert_eq!((counters.stations, counters.refused_table_full), (8, 1));
        assert_eq!(table.remove_port(PortId(3)), 1);
        table.learn(mac(8), PortId(8));
        assert_eq!(table.find_port(mac(8)), Some(PortId(8)));
        assert_eq!(table.find_port(mac(3)), None);
    }

    #[test]
    fn ports_beyond_the_field_are_not_learned() {
        let table = MacTable::new(8, 8, 7);
        table.learn(mac(1), PortId(PORTS_MAX as u16));
        table.learn(mac(1), PortId(u16::MAX));
        assert_eq!(table.counters().refused_port_full, 2);
        table.learn(mac(1), PortId(PORTS_MAX as u16 - 1));
        assert_eq!(table.find_port(mac(1)), Some(PortId(PORTS_MAX as u16 - 1)));
    }

    #[test]
    fn stamps_survive_wrapping_and_jumps() {
        for jump in 1..=40 {
            let table = MacTable::new(64, 64, 7);
            for start in 0..16 {
                table.advance_to(start, AGE_MAX);
                table.learn(mac(start as u64), PortId(1));
            }
            // Step 15 now; those of steps 7 and later are there.
            table.advance_to(15 + jump, AGE_MAX);
            let left = (9 - jump).max(0) as usize;
            assert_eq!(table.counters().stations, left, "{jump}");
            table.advance_to(3, AGE_MAX);
            assert_eq!(table.counters().stations, left, "time went back");
        }
    }
}
