//! Whether to poll for a while before sleeping: going to sleep and being woken cost the worker, and whoever
//! wakes it, more than the work for a few frames.
//!
//! # How it learns
//! From each wait's real length, slept or polled: polling pays where events keep following each other
//! within [`SPIN`]. Nothing is tried out, so a network at rest, or with a frame now and then, never polls.
//! Between two polls the worker offers its core to others (sched_yield(2)). If they take it, the wait gets
//! longer than [`SPIN`] and counts as one that did not pay: a machine without a core to spare unlearns
//! polling by itself.

use std::time::Duration;

/// Longest polling. Measured on taps and veth: what one request and its response take on a machine that is
/// awake is 20 to 50 microseconds.
pub const SPIN: Duration = Duration::from_micros(50);
/// Of [`SCALE`], what a wait counts: the last dozen say most.
const STEP: u32 = SCALE / 8;
/// One.
const SCALE: u32 = 1 << 16;
/// Share of waits that have to be short. Polling in vain costs as much as two wake-ups.
const WORTHWHILE: u32 = SCALE / 3 * 2;

/// The learned share of short waits.
#[derive(Debug, Default)]
pub struct Patience {
    short: u32,
}

impl Patience {
    /// Whether to poll before the next sleep.
    pub fn pays(&self) -> bool {
        self.short >= WORTHWHILE
    }

    /// A wait for events, of whatever kind, took this long.
    pub fn learn(&mut self, waited: Duration) {
        self.short -= self.short / (SCALE / STEP);
        if waited < SPIN {
            self.short += STEP;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn traffic_teaches_and_rest_unlearns() {
        let mut patience = Patience::default();
        assert!(!patience.pays(), "a network that has just started");
        let short = Duration::from_micros(20);
        let long = Duration::from_millis(1);
        let learned = (1..).find(|_| {
            patience.learn(short);
            patience.pays()
        });
        assert!((5..20).contains(&learned.unwrap()), "{learned:?}");
        (0..1_000_000).for_each(|_| patience.learn(short));
        assert!(patience.short <= SCALE);
        let unlearned = (1..).find(|_| {
            patience.learn(long);
            !patience.pays()
        });
        assert!((1..8).contains(&unlearned.unwrap()), "{unlearned:?}");
        // Every second wait is long.
        for _ in 0..1_000 {
            patience.learn(short);
            patience.learn(long);
            assert!(!patience.pays());
        }
    }
}
