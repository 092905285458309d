//! A histogram as it was read.

use crate::stats::Histogram;
use serde::{Deserialize, Serialize};

/// Counts by power of two: `buckets[b]` values were within 2^(b-1) to 2^b - 1, `buckets[0]` were 0.
/// Trailing zeros are left off. The last of [`Histogram::BUCKETS`] has no upper end.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Distribution {
    /// Counts, the smallest values first.
    pub buckets: Vec<u64>,
    /// Sum of all values.
    pub sum: u64,
}

impl From<&Histogram> for Distribution {
    fn from(histogram: &Histogram) -> Self {
        Self::new(histogram.buckets().collect(), histogram.sum())
    }
}

impl Distribution {
    fn new(mut buckets: Vec<u64>, sum: u64) -> Self {
        let used = buckets.iter().rposition(|count| *count > 0).map_or(0, |last| last + 1);
        buckets.truncate(used);
        Self { buckets, sum }
    }

    /// How many values there are.
    pub fn count(&self) -> u64 {
        self.at_most(usize::MAX)
    }

    /// How many values are below 2^`bits`.
    pub fn at_most(&self, bits: usize) -> u64 {
        let buckets = self.buckets.iter().take(bits.saturating_add(1));
        buckets.fold(0, |sum, count| sum.saturating_add(*count))
    }

    /// The mean; `None` without values.
    pub fn mean(&self) -> Option<f64> {
        let count = self.count();
        (count > 0).then(|| self.sum as f64 / count as f64)
    }

    /// A number that `percent` of a hundred values do not exceed: the end of the bucket where the
    /// quantile lies, so up to twice the quantile. `None` without values, and in the last bucket,
    /// which has no end.
    pub fn percentile(&self, percent: u64) -> Option<u64> {
        let count = u128::from(self.count());
        let rank = (count * u128::from(percent)).div_ceil(100).max(1);
        let mut seen = 0;
        let bucket = self.buckets.iter().position(|count| {
            seen += u128::from(*count);
            seen >= rank
        })?;
        (bucket < Histogram::BUCKETS - 1).then(|| (1 << bucket) - 1)
    }

    /// Applies `op` to this and `other`, bucket by bucket.
    pub(super) fn with(&self, other: &Self, op: fn(u64, u64) -> u64) -> Self {
        let at = |of: &Self, bucket| of.buckets.get(bucket).copied().unwrap_or(0);
        let buckets = 0..self.buckets.len().max(other.buckets.len());
        let buckets = buckets.map(|b| op(at(self, b), at(other, b))).collect();
        Self::new(buckets, op(self.sum, other.sum))
    }
}
