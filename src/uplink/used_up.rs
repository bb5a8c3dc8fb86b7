//! Destinations that the host has no port left for, so that not every SYN toward one costs a search.
//!
//! The kernel's search through a range that is used up takes long, and ours outside it tries 32 ports with a
//! socket each. A guest that closes its connections first uses both up by the TIME_WAITs that it leaves.
//! What a search has found counts for [`MEMORY`].

use std::net::SocketAddr;
use std::time::{Duration, Instant};

/// How long the outcome of a search counts: a guest repeats a SYN that was dropped after a second, and
/// TIME_WAIT lasts a minute.
const MEMORY: Duration = Duration::from_secs(1);
/// Destinations that are remembered. The kernel keeps 262,144 TIME_WAITs at most
/// (net.ipv4.tcp_max_tw_buckets), which use up its default range toward nine. Beyond, the oldest is
/// forgotten.
const DESTINATIONS_MAX: usize = 16;

/// What a destination has used up.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Used {
    /// The range that the kernel chooses from.
    Range,
    /// The ports outside it, too.
    All,
}

struct Found {
    to: SocketAddr,
    used: Used,
    at: Instant,
}

/// The searches of the last [`MEMORY`] that found nothing.
#[derive(Default)]
pub struct UsedUp {
    found: Vec<Found>,
}

impl UsedUp {
    /// What is known to be used up toward `to`.
    pub fn toward(&mut self, to: SocketAddr) -> Option<Used> {
        // The clock is not asked where there is no need.
        match self.found.is_empty() {
            true => None,
            false => self.toward_at(to, Instant::now()),
        }
    }

    /// Remembers what a search toward `to` found used up.
    pub fn remember(&mut self, to: SocketAddr, used: Used) {
        self.remember_at(to, used, Instant::now());
    }

    fn toward_at(&mut self, to: SocketAddr, now: Instant) -> Option<Used> {
        self.found.retain(|found| now < found.at + MEMORY);
        let found = self.found.iter().find(|found| found.to == to);
        found.map(|found| found.used)
    }

    fn remember_at(&mut self, to: SocketAddr, used: Used, at: Instant) {
        self.found.retain(|found| found.to != to);
        if self.found.len() >= DESTINATIONS_MAX {
            // They are in the order of their searches.
            self.found.remove(0);
        }
        self.found.push(Found { to, used, at });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_search_counts_for_a_second_and_for_its_destination() {
        let (mut used_up, now) = (UsedUp::default(), Instant::now());
        let to = |port| SocketAddr::from(([203, 0, 113, 1], port));
        assert_eq!(used_up.toward_at(to(80), now), None);
        used_up.remember_at(to(80), Used::Range, now);
        used_up.remember_at(to(81), Used::All, now);
        assert_eq!(used_up.toward_at(to(80), now), Some(Used::Range));
        assert_eq!(used_up.toward_at(to(81), now), Some(Used::All));
        assert_eq!(used_up.toward_at(to(82), now), None);
        // What was found later counts, from then on.
        let later = now + MEMORY / 2;
        used_up.remember_at(to(80), Used::All, later);
        assert_eq!(used_up.toward_at(to(80), later), Some(Used::All));
        assert_eq!(used_up.toward_at(to(81), now + MEMORY), None);
        assert_eq!(used_up.toward_at(to(80), now + MEMORY), Some(Used::All));
        assert_eq!(used_up.toward_at(to(80), later + MEMORY), None);
        assert!(used_up.found.is_empty());
        // It is bounded: the oldest gives way.
        for port in 0..2 * DESTINATIONS_MAX as u16 {
            used_up.remember_at(to(port), Used::All, now);
        }
        assert_eq!(used_up.found.len(), DESTINATIONS_MAX);
        assert_eq!(used_up.toward_at(to(0), now), None);
        let last = to(2 * DESTINATIONS_MAX as u16 - 1);
        assert_eq!(used_up.toward_at(last, now), Some(Used::All));
    }
}
