//! Counting for a fixed time that begins with the first thing counted.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::cli::bench::case::Measured;

/// A count that several threads share.
pub(super) struct Meter {
    time: Duration,
    begun: OnceLock<Instant>,
    bytes: AtomicU64,
    units: AtomicU64,
}

impl Meter {
    pub(super) fn new(time: Duration) -> Self {
        Self {
            time,
            begun: OnceLock::new(),
            bytes: AtomicU64::new(0),
            units: AtomicU64::new(0),
        }
    }

    /// Counts, unless the time is over; returns whether it is not.
    pub(super) fn add(&self, bytes: usize, units: usize) -> bool {
        let goes_on = self.begun.get_or_init(Instant::now).elapsed() <= self.time;
        if goes_on {
            self.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
            self.units.fetch_add(units as u64, Ordering::Relaxed);
        }
        goes_on
    }

    /// Whether anything came, and its time is over.
    pub(super) fn is_over(&self) -> bool {
        self.begun
            .get()
            .is_some_and(|begun| begun.elapsed() > self.time)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.begun.get().is_none()
    }

    pub(super) fn measured(&self) -> Measured {
        Measured {
            secs: self.time.as_secs_f64(),
            bytes: self.bytes.load(Ordering::Relaxed),
            units: self.units.load(Ordering::Relaxed),
            ..Measured::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_begins_with_the_first_byte_and_ends() {
        let meter = Meter::new(Duration::from_millis(20));
        std::thread::sleep(Duration::from_millis(30));
        assert!(meter.is_empty() && !meter.is_over());
        assert!(meter.add(10, 1));
        std::thread::sleep(Duration::from_millis(30));
        assert!(meter.is_over() && !meter.add(5, 1));
        let measured = meter.measured();
        assert_eq!((measured.bytes, measured.units), (10, 1));
    }
}
