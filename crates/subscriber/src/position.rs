//! What a subscriber must remember to notice that something was lost, and the judgement of what it sees. Pure.
//!
//! The record lives in the Redis whose keys it is about: when Redis comes back with old data, so does the record, and the
//! instances named in it are not the ones that answer.

use std::collections::BTreeSet;

use cache::Instance;
use serde::{Deserialize, Serialize};

/// The record.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Position {
    /// Redis servers whose data is known to be good: run id and id of the history, with a colon between.
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
    /// Messages up to this sequence that were deleted from the middle of the stream were dealt with.
    #[serde(default, skip_serializing_if = "is_none")]
    pub holes_until: u64,
}

/// How long the word of an operator counts: until a subscriber has looked, but not for a gap of another day.
const ACCEPTANCE_US: i64 = 10 * 60 * 1_000_000;

fn is_zero(number: &i64) -> bool {
    *number == 0
}

fn is_none(sequence: &u64) -> bool {
    *sequence == 0
}

fn name(instance: &Instance) -> String {
    format!("{}:{}", instance.run_id, instance.history)
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
    /// Messages deleted from the middle of the stream that may not have been applied.
    pub holes: u64,
    /// True if the consumer has delivered messages and nothing says which of them this cache has applied.
    pub is_unrecorded: bool,
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
    /// So many of them were deleted from the middle of the stream.
    Deleted {
        /// How many.
        messages: u64,
    },
    /// Nothing says which messages this cache has applied.
    Unrecorded,
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

    /// Returns true if each of these servers has the data that this record is about. While the servers are watched
    /// (`is_watched`), a server may renew its history without having been a replica.
    #[must_use]
    pub fn knows(&self, instances: &BTreeSet<Instance>, is_watched: bool) -> bool {
        instances.iter().all(|instance| {
            let is_renewed = is_watched && !instance.was_promoted;
            self.instances.contains(&name(instance))
                // Versions before 0.2 recorded the run id alone.
                || self.instances.contains(&instance.run_id)
                || is_renewed && self.instances.iter().any(|known| known.split(':').next() == Some(&*instance.run_id))
        })
    }

    /// Records that the data of these servers is good.
    pub fn trust(&mut self, instances: &BTreeSet<Instance>) {
        self.instances = instances.iter().map(name).collect();
    }

    /// Records that the data of these servers is good too.
    pub fn trust_also(&mut self, instances: &BTreeSet<Instance>) {
        self.instances.extend(instances.iter().map(name));
    }

    /// Returns true if this record was stored before `newer`, about the same stream.
    #[must_use]
    pub fn is_behind(&self, newer: &Self) -> bool {
        self.accepted_us == 0
            && self.stream_created_us == newer.stream_created_us
            && self.acked_seq < newer.acked_seq
    }

    /// Judges what is seen now against what is remembered.
    #[must_use]
    pub fn judge(&self, seen: Seen) -> Continuity {
        if self.stream_created_us == 0 {
            return if seen.is_unrecorded { Continuity::Unrecorded } else { Continuity::Whole };
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
            0 if seen.holes > 0 => Continuity::Deleted { messages: seen.holes },
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
        holes_until: 0,
    };
    const SEEN: Seen = Seen {
        stream_created_us: 7,
        first_seq: 40,
        last_seq: 150,
        ack_floor: 100,
        is_refilled: false,
        holes: 0,
        is_unrecorded: false,
    };

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

    #[test]
    fn deleted_messages_count_once_nothing_worse_is_known() {
        let seen = Seen { holes: 3, ..SEEN };
        assert_eq!(KNOWN.judge(seen), Continuity::Deleted { messages: 3 });
        assert_eq!(KNOWN.judge(Seen { first_seq: 121, ..seen }), Continuity::Expired { messages: 20 });
    }

    #[test]
    fn without_a_record_only_a_consumer_that_has_delivered_something_is_suspect() {
        let seen = Seen { is_unrecorded: true, ..SEEN };
        assert_eq!(Position::default().judge(seen), Continuity::Unrecorded);
        assert_eq!(KNOWN.judge(seen), Continuity::Whole);
    }

    fn instance(run_id: &str, history: &str, was_promoted: bool) -> BTreeSet<Instance> {
        [Instance { run_id: run_id.to_owned(), history: history.to_owned(), was_promoted }].into()
    }

    #[test]
    fn a_server_is_known_by_its_run_and_its_history() {
        let mut known = KNOWN;
        known.trust(&instance("a", "h1", false));
        let cases = [
            // The same, and the same again by a record of an older version.
            (("a", "h1", false), false, true),
            (("a", "h1", true), false, true),
            (("old", "h9", true), false, true),
            // Restarted, or another server.
            (("b", "h1", false), true, false),
            // Was a replica meanwhile.
            (("a", "h2", true), true, false),
            (("a", "h2", true), false, false),
            // Its first replica came, seen or not.
            (("a", "h2", false), true, true),
            (("a", "h2", false), false, false),
        ];
        known.instances.insert("old".to_owned());
        for ((run_id, history, was_promoted), is_watched, expected) in cases {
            let seen = instance(run_id, history, was_promoted);
            assert_eq!(known.knows(&seen, is_watched), expected, "{seen:?} {is_watched}");
        }
    }

    #[test]
    fn an_older_record_of_the_same_stream_is_behind() {
        let older = Position { acked_seq: 99, ..KNOWN };
        assert!(older.is_behind(&KNOWN) && !KNOWN.is_behind(&older) && !KNOWN.is_behind(&KNOWN));
        assert!(!Position { stream_created_us: 6, ..older.clone() }.is_behind(&KNOWN));
        assert!(!Position { accepted_us: 1, ..older }.is_behind(&KNOWN), "an operator wrote it");
    }
}
