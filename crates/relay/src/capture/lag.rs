use std::collections::VecDeque;
use std::time::{Duration, Instant};

use wal::Lsn;

/// Most positions that are remembered. At one every two seconds this is over two hours; then every other one goes.
const MAX_REMEMBERED: usize = 4096;

/// How far publishing is behind in time: the age of the oldest log that is not published. Bytes cannot show it: a little
/// log that nobody gets is as stale as much of it.
#[derive(Debug, Default)]
pub(super) struct Lag {
    /// Ends of the log that are not reached, with the time when each was seen, oldest first.
    ahead: VecDeque<(Instant, Lsn)>,
}

impl Lag {
    /// Takes note of the end of the log, and of the position before which everything is published. Returns the lag.
    pub(super) fn observe(&mut self, now: Instant, written: Lsn, reached: Lsn) -> Duration {
        while self.ahead.front().is_some_and(|(_, seen)| *seen <= reached) {
            self.ahead.pop_front();
        }
        if written > reached && self.ahead.back().is_none_or(|(_, seen)| *seen < written) {
            self.ahead.push_back((now, written));
        }
        if self.ahead.len() > MAX_REMEMBERED {
            let mut nth = 0_usize;
            self.ahead.retain(|_| {
                nth += 1;
                nth % 2 == 1
            });
        }
        self.ahead.front().map_or(Duration::ZERO, |(seen, _)| now.saturating_duration_since(*seen))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lag_is_the_age_of_the_oldest_log_that_is_not_published() {
        let start = Instant::now();
        let mut lag = Lag::default();
        let mut observe = |second: u64, written: u64, reached: u64| {
            lag.observe(start + Duration::from_secs(second), Lsn(written), Lsn(reached)).as_secs()
        };
        assert_eq!(observe(0, 100, 100), 0, "caught up");
        assert_eq!(observe(2, 110, 100), 0, "just written");
        assert_eq!(observe(4, 120, 100), 2, "a few bytes count");
        assert_eq!(observe(60, 120, 100), 58, "nothing is written, and nothing published");
        assert_eq!(observe(62, 130, 110), 58, "the oldest is published, the next one is as old");
        assert_eq!(observe(64, 130, 120), 2);
        assert_eq!(observe(66, 140, 140), 0);
        assert_eq!(observe(68, 90, 80), 0, "another server");
    }

    #[test]
    fn what_is_remembered_is_bounded_and_the_oldest_is_kept() {
        let start = Instant::now();
        let mut lag = Lag::default();
        for second in 0..20_000 {
            let now = start + Duration::from_secs(second);
            assert_eq!(lag.observe(now, Lsn(second + 1), Lsn(0)).as_secs(), second);
            assert!(lag.ahead.len() <= MAX_REMEMBERED);
        }
    }
}
