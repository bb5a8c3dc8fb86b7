//! Medians, percentiles and spread of small lists of figures.

/// Percentiles shown of a latency, in hundredths of a percent so that they stay whole numbers.
pub(super) const PERCENTILES: [u32; 3] = [5_000, 9_900, 9_990];

/// What several runs of one thing gave.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(super) struct Summary {
    pub(super) median: f64,
    pub(super) min: f64,
    pub(super) max: f64,
    /// How many figures these are of.
    pub(super) count: usize,
}

impl Summary {
    /// Of some figures; `None` of none.
    pub(super) fn of(samples: &[f64]) -> Option<Self> {
        let mut sorted = samples.to_vec();
        sorted.sort_by(f64::total_cmp);
        let (&min, &max) = (sorted.first()?, sorted.last()?);
        let middle = sorted.len() / 2;
        let median = match sorted.len() % 2 {
            0 => (sorted[middle - 1] + sorted[middle]) / 2.0,
            _ => sorted[middle],
        };
        Some(Self {
            median,
            min,
            max,
            count: sorted.len(),
        })
    }

    /// Half of the range, in percent of the median: 0 where the median is 0.
    pub(super) fn spread_percent(&self) -> f64 {
        match self.median == 0.0 {
            true => 0.0,
            false => (self.max - self.min) / 2.0 / self.median.abs() * 100.0,
        }
    }
}

/// The smallest value that at least this share of the sorted values does not exceed (nearest rank);
/// `None` of none.
pub(super) fn percentile(sorted: &[u32], hundredths: u32) -> Option<u32> {
    let rank = (sorted.len() as u64 * u64::from(hundredths)).div_ceil(10_000);
    let index = usize::try_from(rank).ok()?.saturating_sub(1);
    sorted.get(index).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_of_odd_and_even_numbers_of_runs() {
        assert_eq!(Summary::of(&[]), None);
        let one = Summary::of(&[4.0]).unwrap();
        assert_eq!((one.median, one.min, one.max), (4.0, 4.0, 4.0));
        assert_eq!(one.spread_percent(), 0.0);
        assert_eq!(Summary::of(&[3.0, 9.0, 1.0]).unwrap().median, 3.0);
        assert_eq!(Summary::of(&[1.0, 2.0, 4.0, 9.0]).unwrap().median, 3.0);
    }

    #[test]
    fn spread_is_half_the_range() {
        let summary = Summary::of(&[8.0, 10.0, 12.0]).unwrap();
        assert!((summary.spread_percent() - 20.0).abs() < 1e-9);
        assert_eq!(Summary::of(&[0.0, 0.0]).unwrap().spread_percent(), 0.0);
    }

    #[test]
    fn percentiles_are_values_that_occurred() {
        let sorted: Vec<u32> = (1..=1000).collect();
        let found = PERCENTILES.map(|hundredths| percentile(&sorted, hundredths));
        assert_eq!(found, [Some(500), Some(990), Some(999)]);
        assert_eq!(percentile(&[7], 5_000), Some(7));
        assert_eq!(percentile(&[7], 9_990), Some(7));
        assert_eq!(percentile(&[], 5_000), None);
    }
}
