//! Distributions of delays.

use std::time::Duration;

use hdrhistogram::Histogram;

use super::numbers::{milliseconds, ratio};

/// Longest delay that is told from longer ones.
const MAX: Duration = Duration::from_secs(120);

/// Delays in microseconds.
#[derive(Debug, Clone)]
pub struct Delays {
    histogram: Histogram<u64>,
}

impl Delays {
    /// None yet.
    pub fn new() -> Self {
        let max = u64::try_from(MAX.as_micros()).expect("two minutes");
        Self { histogram: Histogram::new_with_bounds(1, max, 3).expect("the bounds are in order") }
    }

    /// Adds one.
    pub fn record(&mut self, delay: Duration) {
        self.histogram.saturating_record(u64::try_from(delay.as_micros()).unwrap_or(u64::MAX));
    }

    /// Adds all of another distribution.
    pub fn add(&mut self, other: &Self) {
        self.histogram.add(&other.histogram).expect("both have the same bounds");
    }

    /// How many there are.
    pub fn count(&self) -> u64 {
        self.histogram.len()
    }

    /// The delay that this share of them, in percent, does not exceed, in milliseconds.
    pub fn percentile(&self, percent: f64) -> f64 {
        ratio(self.histogram.value_at_percentile(percent), 1000)
    }

    /// The longest, in milliseconds.
    pub fn max(&self) -> f64 {
        ratio(self.histogram.max(), 1000)
    }

    /// `p50 1.20 ms, p99 3.40 ms`
    pub fn short(&self) -> String {
        format!("p50 {}, p99 {}", milliseconds(self.percentile(50.0)), milliseconds(self.percentile(99.0)))
    }

    /// The same with p99.9 and the longest.
    pub fn long(&self) -> String {
        let tail = milliseconds(self.percentile(99.9));
        format!("{}, p99.9 {tail}, max {}", self.short(), milliseconds(self.max()))
    }
}
