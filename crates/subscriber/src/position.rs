//! What a subscriber must remember to notice that something was lost, and the judgement of what it sees. Pure.
//!
//! The record lives in the Redis whose keys it is about: when Redis comes back with old data, so does the record, and the
//! instances named in it are not the ones that answer.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

/// The record.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Position {
    /// Run ids of the Redis servers whose data is known to be good.
    pub instances: BTreeSet<String>,
    /// Creation time of the stream, in microseconds since the Unix epoch: its identity.
    pub stream_created_us: i64,
    /// Every message up to this sequence was applied.
    pub acked_seq: u64,
    /// Every message published up to this time was applied, in microseconds since the Unix epoch by the clock of NATS.
    pub acked_until_us: i64,
    /// When an operator accepted that invalidations are missing, in microseconds since the Unix epoch; 0 if nobody did, or
    /// the subscriber has gone on since.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub accepted_us: i64,
}

/// How long the word of an operator counts: until a subscriber has looked, but not for a gap of another day.
const ACCEPTANCE_US: i64 = 10 * 60 * 1_000_000;

fn is_zero(number: &i64) -> bool {
    *number == 0
}

/// The stream and the consumer as they are now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seen {
    /// Creation time of the stream, in microseconds since the Unix epoch.
    pub stream_created_us: i64,
    /// First sequence in the stream.
    pub first_seq: u64,
    /// Last sequence the stream has given.
    pub last_seq: u64,
    /// Every message up to this sequence was acknowledged by this consumer.
    pub ack_floor: u64,
    /// Whether the last message that was applied is another one now.
    pub is_refilled: bool,
}

/// What became of the messages that this cache has not applied yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Continuity {
    /// They are all in the stream.
    Whole,
    /// So many of them expired before they were read.
    Expired {
        /// How many.
        messages: u64,
    },
    /// It is another stream than the one known.
    Recreated,
    /// The stream ends before what had been read of it, or did and was filled again: NATS came back with old data.
    Truncated,
}

impl Position {
    /// Whether an operator has accepted whatever is missing at `now_us`. For a while, as messages go on expiring until the
    /// first of them is read.
    #[must_use]
    pub fn is_gap_accepted(&self, now_us: i64) -> bool {
        self.accepted_us != 0 && now_us.saturating_sub(self.accepted_us) < ACCEPTANCE_US
    }

    /// Judges what is seen now against what is remembered.
    #[must_use]
    pub fn judge(&self, seen: Seen) -> Continuity {
        if self.stream_created_us == 0 {
            return Continuity::Whole;
        }
        if self.stream_created_us != seen.stream_created_us {
            return Continuity::Recreated;
        }
        if seen.is_refilled || self.acked_seq.max(seen.ack_floor) > seen.last_seq {
            return Continuity::Truncated;
        }
        // `first_seq` is the sequence of the first message, or of the next one to come if there is none. The floor of the
        // consumer proves nothing here: nats-server itself moves it over messages that have expired unread.
        match seen.first_seq.saturating_sub(1).saturating_sub(self.acked_seq) {
            0 => Continuity::Whole,
            messages => Continuity::Expired { messages },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KNOWN: Position = Position {
        instances: BTreeSet::new(),
        stream_created_us: 7,
        acked_seq: 100,
        acked_until_us: 1,
        accepted_us: 0,
    };
    const SEEN: Seen =
        Seen { stream_created_us: 7, first_seq: 40, last_seq: 150, ack_floor: 100, is_refilled: false };

    #[test]
    fn a_stream_that_still_has_everything_unread_is_whole() {
        assert_eq!(KNOWN.judge(SEEN), Continuity::Whole);
        assert_eq!(KNOWN.judge(Seen { first_seq: 101, ..SEEN }), Continuity::Whole);
        // Everything was read and has expired since.
        assert_eq!(KNOWN.judge(Seen { first_seq: 101, last_seq: 100, ..SEEN }), Continuity::Whole);
        assert_eq!(
            Position::default().judge(Seen { first_seq: 40, ack_floor: 0, ..SEEN }),
            Continuity::Whole
        );
    }

    #[test]
    fn messages_that_expired_unread_are_counted() {
        let seen = Seen { first_seq: 121, ..SEEN };
        assert_eq!(KNOWN.judge(seen), Continuity::Expired { messages: 20 });
        // Since 2.9.17 nats-server moves the floor over them.
        let seen = Seen { first_seq: 1_001, last_seq: 1_000, ack_floor: 1_000, ..SEEN };
        assert_eq!(KNOWN.judge(seen), Continuity::Expired { messages: 900 });
    }

    #[test]
    fn acceptance_of_a_gap_counts_for_ten_minutes() {
        assert!(!KNOWN.is_gap_accepted(5));
        let accepted = Position { accepted_us: 5, ..KNOWN };
        assert!(accepted.is_gap_accepted(6) && accepted.is_gap_accepted(4 + ACCEPTANCE_US));
        assert!(!accepted.is_gap_accepted(5 + ACCEPTANCE_US));
    }

    #[test]
    fn a_record_of_an_older_version_is_read_and_nothing_is_written_that_it_would_not_know() {
        let record = r#"{"instances":[],"stream_created_us":7,"acked_seq":100,"acked_until_us":1}"#;
        assert_eq!(serde_json::from_str::<Position>(record).unwrap(), KNOWN);
        assert_eq!(serde_json::to_string(&KNOWN).unwrap(), record);
    }

    #[test]
    fn another_or_a_shorter_stream_is_noticed() {
        assert_eq!(KNOWN.judge(Seen { stream_created_us: 8, ..SEEN }), Continuity::Recreated);
        assert_eq!(KNOWN.judge(Seen { last_seq: 90, ack_floor: 80, ..SEEN }), Continuity::Truncated);
        assert_eq!(KNOWN.judge(Seen { last_seq: 90, ack_floor: 95, ..SEEN }), Continuity::Truncated);
        assert_eq!(KNOWN.judge(Seen { is_refilled: true, ..SEEN }), Continuity::Truncated);
    }
}
