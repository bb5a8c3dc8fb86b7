//! Memory of the flows' rings: how much of it is in use, and how much one flow may use.
//!
//! # What counts
//! The pages of a flow's two rings that data has gone over since they were last given back; what waits
//! in them is less. Counted in steps of a page, upward, so that resident memory is no more.
//!
//! # Who may have how much
//! A [`Holder`] may have as much as is free then (the "dynamic threshold" of shared packet buffers): one
//! that takes all it can gets half, two get a third each, and there is a share left for one more. A flow
//! may take half of what its holder may still have, and its part of that among the holder's flows, as
//! all may begin to send at once. Where that is little, windows close and pages that no data waits in are
//! given back at once; no flow ends. [`FLOOR`] each way it has in any case.
//!
//! A window that was shown is not taken back, so a holder whose flows get more and more may pass its half:
//! by the windows of those that came early, at most about as much again.

use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use crate::nat::shares::{HOLDERS_MAX, Holder};
use crate::sys::arena::PAGE_BYTES;

/// Each way, whatever is used: a page, so that every flow goes on.
pub const FLOOR: usize = PAGE_BYTES;
/// From here on a flow is not bounded but by its rings: what most flows never have waiting.
const PLENTY: usize = 128 * 1024;
/// By default, where nobody says how much: as much as `NetworkConfig` takes on a host of 4 GiB.
pub const DEFAULT: usize = 512 << 20;

/// Ring memory of all workers.
#[derive(Debug)]
pub struct Budget {
    max: usize,
    used: AtomicUsize,
    by_holder: Box<[AtomicUsize]>,
}

impl Budget {
    /// Nothing of `max` bytes is used.
    pub fn new(max: usize) -> Self {
        Self {
            max,
            used: AtomicUsize::new(0),
            by_holder: (0..HOLDERS_MAX).map(|_| AtomicUsize::new(0)).collect(),
        }
    }

    /// All there is.
    pub fn max(&self) -> usize {
        self.max
    }

    /// In use.
    pub fn used(&self) -> usize {
        self.used.load(Relaxed)
    }

    /// What may wait in each ring of a flow that uses `charged`, of `holder`, which has `flows`; `None`: all
    /// of it.
    pub fn limit(&self, holder: Holder, flows: usize, charged: usize) -> Option<usize> {
        let free = self.max.saturating_sub(self.used());
        let own = self.by_holder[holder.index()].load(Relaxed);
        let left = free.saturating_sub(own);
        let flows = flows.max(1);
        let limit = (charged + (left / 2).min(left / flows)) / 2;
        (limit < PLENTY).then_some(limit.max(FLOOR))
    }

    /// A flow of `holder` that used `before` uses `after`.
    pub fn charge(&self, holder: Holder, before: usize, after: usize) {
        let own = &self.by_holder[holder.index()];
        if after > before {
            self.used.fetch_add(after - before, Relaxed);
            own.fetch_add(after - before, Relaxed);
        } else if before > after {
            self.used.fetch_sub(before - after, Relaxed);
            own.fetch_sub(before - after, Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::PortId;

    #[test]
    fn who_takes_all_it_can_leaves_others_their_share() {
        let budget = Budget::new(64 << 20);
        let holders: Vec<_> = (1..4).map(|port| Holder::from(PortId(port))).collect();
        assert_eq!(budget.limit(holders[0], 1, 0), None);
        // Each flow takes what it may, and stalls.
        let mut used = [0; 3];
        for (&holder, used) in holders.iter().zip(&mut used) {
            for _ in 0..1_000 {
                let limit = budget.limit(holder, 1, 0).unwrap_or(PLENTY);
                if limit == FLOOR {
                    break;
                }
                budget.charge(holder, 0, limit);
                *used += limit;
            }
        }
        let mib = used.map(|bytes| bytes >> 20);
        assert!((28..=32).contains(&mib[0]), "{mib:?}");
        assert!((14..=17).contains(&mib[1]), "{mib:?}");
        assert!(mib[2] >= 7, "{mib:?}");
        // What it has a flow may keep, and all is there again afterwards.
        assert!(budget.limit(holders[0], 1, 100 << 10).unwrap() >= 50 << 10);
        for (&holder, used) in holders.iter().zip(used) {
            budget.charge(holder, used, 0);
        }
        assert_eq!((budget.used(), budget.limit(holders[0], 1, 0)), (0, None));
    }
}
