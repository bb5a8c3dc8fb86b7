//! Looks for events instead of sleeping, while they come in quick succession.
//!
//! To wake a thread takes longer than to switch a frame, and who sends the frame pays a part of it. So a
//! worker whose waits are short may look again and again before it sleeps (as the kernel does:
//! net.core.busy_poll, vhost-net's poll-us).
//!
//! **Learned from traffic.** It looks only while its waits, on average, end within the time that it may
//! look for: an idle network is not polled, nor one that has a frame now and then.
//!
//! **Not at others' expense.** A look is a system call. One that took much longer was interrupted:
//! somebody else needs the CPU. Then there is no looking for a while, and for twice as long the next time.
//! Who waits for the CPU without an interruption is not noticed: where all are busy, bulk traffic loses.

use std::io;

use crate::frame::{Duration, Instant};

/// A look that took longer was interrupted: it takes 0.8 us, and one in a thousand more than 4 (2 cores, kernel
/// 6.18).
const INTERRUPTED: Duration = Duration::from_micros(15);
/// How long there is no looking after an interruption, the first time: what the scheduler gives others at a
/// time is of this order.
const PAUSE_MIN: Duration = Duration::from_millis(1);
/// The same at most: where others always need the CPU, four looks a second are in vain.
const PAUSE_MAX: Duration = Duration::from_millis(256);
/// The newest wait is one part in so many of the average: one long wait among short ones does not end the
/// looking unless it counts as more than the others spare.
const WEIGHT: u64 = 8;
/// Limits that a wait counts as, at most: after a pause the average is back within some 20 short waits.
const LIMITS_MAX: u64 = 4;

/// How a worker waits, and what it has learned of its waits.
pub(super) struct BusyPoll {
    /// How long to look at most; zero: not at all.
    limit: Duration,
    /// Average wait, microseconds.
    wait: u64,
    /// There is no looking before.
    paused_until: Instant,
    pause: Duration,
}

impl BusyPoll {
    /// Looks for `limit` at most before each sleep.
    pub(super) fn new(limit: Duration) -> Self {
        Self {
            limit,
            wait: limit.total_micros() * LIMITS_MAX,
            paused_until: Instant::ZERO,
            pause: PAUSE_MIN,
        }
    }

    /// Waits for events, for `sleep` at most. `poll` does for the time it is given, and returns whether there
    /// are any. Returns how long it looked.
    ///
    /// # Errors
    /// What `poll` fails with.
    pub(super) fn wait(
        &mut self,
        sleep: Duration,
        clock: impl Fn() -> Instant,
        mut poll: impl FnMut(Duration) -> io::Result<bool>,
    ) -> io::Result<Duration> {
        if self.limit == Duration::ZERO || sleep <= self.limit {
            return poll(sleep).map(|_| Duration::ZERO);
        }
        let begun = clock();
        let (mut found, mut now) = (false, begun);
        if self.wait < self.limit.total_micros() && begun >= self.paused_until {
            (found, now) = self.look(begun, &clock, &mut poll)?;
        }
        let looked = now - begun;
        if !found {
            let rest = sleep.total_micros().saturating_sub(looked.total_micros());
            poll(Duration::from_micros(rest))?;
            now = clock();
        }
        let wait = (now - begun).total_micros();
        let wait = wait.min(self.limit.total_micros() * LIMITS_MAX);
        self.wait = (self.wait * (WEIGHT - 1) + wait) / WEIGHT;
        Ok(looked)
    }

    /// Whether there were events before it was time to stop, and what time it is.
    fn look(
        &mut self,
        begun: Instant,
        clock: impl Fn() -> Instant,
        mut poll: impl FnMut(Duration) -> io::Result<bool>,
    ) -> io::Result<(bool, Instant)> {
        let mut before = begun;
        while before - begun < self.limit {
            let found = poll(Duration::ZERO)?;
            let now = clock();
            if now - before > INTERRUPTED {
                self.paused_until = now + self.pause;
                self.pause = (self.pause * 2).min(PAUSE_MAX);
                return Ok((found, now));
            }
            if found {
                self.pause = (self.pause / 2).max(PAUSE_MIN);
                return Ok((true, now));
            }
            before = now;
        }
        Ok((false, before))
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    const LIMIT: Duration = Duration::from_micros(50);
    const LONG: Duration = Duration::from_secs(1);

    /// A clock that polls move on, and an event some time after each wait begins.
    struct Bench {
        busy_poll: BusyPoll,
        now: Cell<Instant>,
        looks: Cell<usize>,
        sleeps: Cell<usize>,
    }

    impl Bench {
        fn new(limit: Duration) -> Self {
            Self {
                busy_poll: BusyPoll::new(limit),
                now: Cell::new(Instant::ZERO),
                looks: Cell::new(0),
                sleeps: Cell::new(0),
            }
        }

        /// One wait for an event after `micros`; a look takes `look` microseconds.
        fn wait(&mut self, micros: u64, look: u64) {
            let due = self.now.get() + Duration::from_micros(micros);
            let (now, looks, sleeps) = (&self.now, &self.looks, &self.sleeps);
            let poll = |time: Duration| {
                if time == Duration::ZERO {
                    looks.set(looks.get() + 1);
                    now.set(now.get() + Duration::from_micros(look));
                } else {
                    sleeps.set(sleeps.get() + 1);
                    now.set(due.max(now.get()));
                }
                Ok(now.get() >= due)
            };
            self.busy_poll.wait(LONG, || now.get(), poll).unwrap();
        }
    }

    #[test]
    fn looks_while_traffic_comes_fast_enough() {
        let mut bench = Bench::new(LIMIT);
        (0..40).for_each(|_| bench.wait(20, 1));
        let slept = bench.sleeps.get();
        assert!((10..30).contains(&slept), "{slept}");
        (0..1_000).for_each(|_| bench.wait(20, 1));
        assert_eq!(bench.sleeps.get(), slept, "it sleeps no more");
        // Nothing for a while: some looks in vain, then none.
        (0..8).for_each(|_| bench.wait(1_000_000, 1));
        let looks = bench.looks.get();
        (0..1_000).for_each(|_| bench.wait(1_000_000, 1));
        assert_eq!(bench.looks.get(), looks);
        // Somewhat too slow: none as well.
        (0..1_000).for_each(|_| bench.wait(60, 1));
        assert_eq!(bench.looks.get(), looks);
    }

    #[test]
    fn who_is_interrupted_leaves_the_cpu_to_others() {
        let mut bench = Bench::new(LIMIT);
        (0..100).for_each(|_| bench.wait(20, 1));
        let looks = bench.looks.get();
        let begun = bench.now.get();
        while bench.now.get() - begun < LONG {
            bench.wait(40, 30);
        }
        // After 1, 2, 4 ... 256 ms.
        let interrupted = bench.looks.get() - looks;
        assert!((8..14).contains(&interrupted), "{interrupted}");
    }

    #[test]
    fn without_a_limit_it_sleeps_at_once() {
        let mut bench = Bench::new(Duration::ZERO);
        (0..100).for_each(|_| bench.wait(1, 1));
        assert_eq!((bench.looks.get(), bench.sleeps.get()), (0, 100));
    }

    #[test]
    fn what_is_due_soon_is_not_looked_past() {
        let mut busy_poll = BusyPoll::new(LIMIT);
        let sleeps = Cell::new(0);
        for sleep in [Duration::ZERO, LIMIT] {
            let poll = |time| {
                assert_eq!(time, sleep);
                sleeps.set(sleeps.get() + 1);
                Ok(false)
            };
            busy_poll.wait(sleep, || Instant::ZERO, poll).unwrap();
        }
        assert_eq!(sleeps.get(), 2);
    }
}
