//! Log lines about lasting trouble: once for each cause rather than once for each attempt.

use std::{collections::VecDeque, time::Duration};

use tokio::time::Instant;

/// Time after which the same cause is worth another line.
const SAY_AGAIN: Duration = Duration::from_mins(1);

/// Most lines within [`SAY_AGAIN`]: texts that differ in a number only must not fill the log.
const MOST_LINES: usize = 8;

/// Memory of the causes that were logged lately. The first cause after a loss is often not the one that lasts: "broken
/// pipe" comes before "connection refused".
#[derive(Debug, Default)]
pub struct SaidLately {
    lines: VecDeque<(String, Instant)>,
}

impl SaidLately {
    /// Returns true if the text is worth a line in the log, and remembers it then.
    pub fn is_news(&mut self, text: &str) -> bool {
        let now = Instant::now();
        while self.lines.front().is_some_and(|(_, at)| now.duration_since(*at) >= SAY_AGAIN) {
            self.lines.pop_front();
        }
        let is_news = self.lines.len() < MOST_LINES && self.lines.iter().all(|(said, _)| said != text);
        if is_news {
            self.lines.push_back((text.to_owned(), now));
        }
        is_news
    }

    /// Forgets everything, as the trouble is over.
    pub fn clear(&mut self) {
        self.lines.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn each_cause_is_said_once_a_minute_and_again_after_it_was_over() {
        let mut said = SaidLately::default();
        assert!(said.is_news("broken pipe") && said.is_news("refused"));
        assert!(!said.is_news("refused") && !said.is_news("broken pipe"));
        tokio::time::advance(SAY_AGAIN).await;
        assert!(said.is_news("refused"));
        said.clear();
        assert!(said.is_news("refused"));
    }

    #[tokio::test(start_paused = true)]
    async fn texts_that_always_differ_do_not_fill_the_log() {
        let mut said = SaidLately::default();
        let lines = (0..1000).filter(|number| said.is_news(&format!("attempt {number}"))).count();
        assert_eq!(lines, MOST_LINES);
    }
}
