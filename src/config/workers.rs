//! How many threads carry a network's traffic.

use std::fmt;
use std::num::NonZero;
use std::str::FromStr;

/// Workers of a network at most: one serves several gigabits a second, and a worker's number is a byte.
pub const WORKERS_MAX: usize = 64;
const _: () = assert!(WORKERS_MAX <= u8::MAX as usize);

/// Threads of the data path.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Workers {
    /// This many, 1 to [`WORKERS_MAX`].
    Count(usize),
    /// As many as the process may use CPUs.
    Auto,
}

impl Default for Workers {
    fn default() -> Self {
        Self::Count(1)
    }
}

impl Workers {
    /// The number meant here.
    pub fn count(self) -> usize {
        let count = match self {
            Self::Count(count) => count,
            Self::Auto => std::thread::available_parallelism().map_or(1, NonZero::get),
        };
        count.clamp(1, WORKERS_MAX)
    }
}

impl FromStr for Workers {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text == "auto" {
            return Ok(Self::Auto);
        }
        let count = text
            .parse()
            .ok()
            .filter(|count| (1..=WORKERS_MAX).contains(count));
        count.map(Self::Count).ok_or_else(|| {
            format!("{text:?} is neither a number of threads, 1 to {WORKERS_MAX}, nor 'auto'")
        })
    }
}

impl fmt::Display for Workers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Count(count) => count.fmt(f),
            Self::Auto => f.write_str("auto"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_or_as_many_as_there_are_cpus() {
        for good in ["1", "64", "auto"] {
            assert_eq!(good.parse::<Workers>().unwrap().to_string(), good);
        }
        for bad in ["", "0", "65", "-1", "Auto", "2 "] {
            assert!(bad.parse::<Workers>().is_err(), "{bad:?}");
        }
        assert!((1..=WORKERS_MAX).contains(&Workers::Auto.count()));
        assert_eq!(Workers::Count(0).count(), 1);
    }
}
