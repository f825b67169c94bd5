//! From where to claim.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// How far behind the newest row seen the next claim begins while there is no backlog. Transactions commit in another
/// order than they insert; most that commit late do so within this time, the rest is found by a sweep from 0.
const TRAIL: Duration = Duration::from_secs(1);

/// The `seq` to claim from. What was deleted below it is still in the index until vacuum; skipping it keeps claims fast
/// even while a long transaction holds vacuum back.
#[derive(Debug, Default)]
pub struct FromSeq {
    seq: i64,
    trail: VecDeque<(Instant, i64)>,
}

impl FromSeq {
    /// From the beginning.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Where to begin now.
    pub fn now(&mut self) -> i64 {
        self.at(Instant::now())
    }

    fn at(&mut self, now: Instant) -> i64 {
        while let Some((_, seq)) = self.trail.pop_front_if(|(seen, _)| now.duration_since(*seen) >= TRAIL) {
            self.seq = self.seq.max(seq + 1);
        }
        self.seq
    }

    /// Notes the newest row of a claim. In a backlog (`full`) the next claim begins right behind it.
    pub fn saw(&mut self, last_seq: Option<i64>, full: bool) {
        self.saw_at(Instant::now(), last_seq, full);
    }

    fn saw_at(&mut self, now: Instant, last_seq: Option<i64>, full: bool) {
        /// One mark in this time is enough, and bounds the queue.
        const GRAIN: Duration = Duration::from_millis(50);
        let Some(last_seq) = last_seq else { return };
        if full {
            self.trail.clear();
            self.seq = self.seq.max(last_seq + 1);
        } else if self.trail.back().is_none_or(|(seen, _)| now.duration_since(*seen) >= GRAIN) {
            self.trail.push_back((now, last_seq));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn claims_begin_a_second_behind_in_quiet_times_and_close_behind_in_a_backlog() {
        let start = Instant::now();
        let mut from = FromSeq::new();
        from.saw_at(start, Some(100), false);
        from.saw_at(start + Duration::from_millis(500), Some(200), false);
        assert_eq!(from.at(start + Duration::from_millis(900)), 0);
        assert_eq!(from.at(start + Duration::from_millis(1_100)), 101);
        from.saw_at(start + Duration::from_millis(1_200), Some(5_000), true);
        assert_eq!(from.at(start + Duration::from_millis(1_200)), 5_001);
    }
}
