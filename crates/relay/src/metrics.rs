//! Names of the relay's metrics.

use crate::config::GapPolicy;
use crate::publisher::PublishError;
use metrics::{Unit, counter, describe_counter, describe_gauge, describe_histogram};

macro_rules! metrics {
    ($($kind:ident $name:ident = $text:literal, $unit:ident, $help:literal;)*) => {
        $(#[doc = $help] pub const $name: &str = $text;)*

        /// Every metric with its meaning, for the tables of the README.
        pub const ALL: &[(&str, &str)] = &[$(($text, $help)),*];

        /// Tells the recorder what every metric means.
        pub fn describe() {
            $($kind!($name, Unit::$unit, $help);)*
        }
    };
}

metrics! {
    describe_counter EVENTS_PUBLISHED = "relay_events_published_total", Count, "Events of the outbox acknowledged by the stream and settled";
    describe_counter EVENTS_COALESCED = "relay_events_coalesced_total", Count, "Events whose keys were all named by another event of the same claim";
    describe_counter MESSAGES_PUBLISHED = "relay_messages_published_total", Count, "Messages acknowledged by the stream";
    describe_counter CLAIMS = "relay_claims_total", Count, "Claims, by result: rows, empty or failed";
    describe_counter STATEMENTS = "relay_statements_total", Count, "SQL statements of claims and polls";
    describe_counter PUBLISH_FAILURES = "relay_publish_failures_total", Count, "Claims given back because of the broker, by reason";
    describe_counter DATABASE_FAILURES = "relay_database_failures_total", Count, "Claims, and looks at what is retained, that failed because of the database";
    describe_counter DEAD_LETTERS = "relay_dead_letters_total", Count, "Events set aside because they can never be published";
    describe_gauge DEAD_LETTERS_WAITING = "relay_dead_letters", Count, "Events in outbox.dead_letters";
    describe_gauge BACKLOG = "relay_backlog_events", Count, "Events waiting in the outbox, counted up to 100,000";
    describe_gauge BACKLOG_AGE = "relay_backlog_oldest_seconds", Seconds, "Age of the event that waits longest";
    describe_gauge CONNECTED = "relay_nats_connected", Count, "1 while NATS is connected and the stream is usable";
    describe_histogram ENQUEUE_TO_PUBLISH = "relay_enqueue_to_publish_seconds", Seconds, "From enqueue of the oldest event of a claim, or of a batch from the write-ahead log, to the last acknowledgement of the stream";
    describe_histogram CLAIM_TIME = "relay_claim_seconds", Seconds, "Time to claim rows";
    describe_histogram PUBLISH_TIME = "relay_publish_seconds", Seconds, "Time from the first message of a claim to its last acknowledgement";
    describe_histogram SETTLE_TIME = "relay_settle_seconds", Seconds, "Time to retain the envelopes and commit";
    describe_counter REPUBLISHED = "relay_republished_messages_total", Count, "Retained messages published again because the stream had lost them";
    describe_gauge STREAM_RISKS = "relay_stream_risks", Count, "Options of the stream that could lose events or hold them back";
    describe_gauge REPUBLISH_REMAINING = "relay_republish_remaining", Count, "About how many retained messages all relays have yet to publish again";
    describe_counter STREAM_LOSSES = "relay_stream_losses_total", Count, "Times the stream was created anew or found to lack what it had acknowledged";
    describe_gauge CAPTURE_ACTIVE = "relay_wal_active", Count, "1 while this relay reads the write-ahead log";
    describe_gauge CAPTURE_LAG_BYTES = "relay_wal_slot_lag_bytes", Bytes, "Write-ahead log that is not confirmed to the slot";
    describe_gauge CAPTURE_LAG_SECONDS = "relay_wal_slot_lag_seconds", Seconds, "Age of the oldest log that is not published yet";
    describe_gauge CAPTURE_SLOT_LOST = "relay_wal_slot_lost", Count, "1 if Postgres has removed log that the slot needs";
    describe_gauge CAPTURE_RECEIVED_LSN = "relay_wal_received_lsn", Bytes, "Position in the log up to which the server has sent";
    describe_gauge CAPTURE_FLUSHED_LSN = "relay_wal_flushed_lsn", Bytes, "Position in the log before which everything is published";
    describe_gauge CAPTURE_IN_FLIGHT = "relay_wal_in_flight", Count, "Parts of transactions that were read and are not settled";
    describe_counter CAPTURE_CHANGES = "relay_wal_changes_total", Count, "Changes decoded: rows, truncations and logical messages";
    describe_counter CAPTURE_UNWATCHED = "relay_wal_unwatched_changes_total", Count, "Of these, changes that invalidate nothing by the rules";
    describe_counter CAPTURE_UNKNOWN = "relay_wal_unknown_changes_total", Count, "Changes without the values that their keys are made of; namespaces were invalidated instead";
    describe_counter CAPTURE_REFUSED_KEYS = "relay_wal_refused_keys_total", Count, "Keys that no cache key can be, and so were skipped";
    describe_counter CAPTURE_RECONNECTS = "relay_wal_reconnects_total", Count, "Times reading the log was interrupted";
    describe_counter CAPTURE_GAPS = "relay_wal_gaps_total", Count, "Times changes were missing from the slot for good, by policy";
    describe_histogram CAPTURE_GATE_WAIT = "relay_wal_gate_wait_seconds", Seconds, "How long transactions that were not visible at first had to wait";
    describe_counter CAPTURE_PUBLISHED = "relay_wal_events_published_total", Count, "Events from the write-ahead log acknowledged by the stream and settled";
    describe_histogram CAPTURE_EXPAND = "relay_wal_expand_seconds", Seconds, "Time to ask the database for the further keys of expand";
    describe_histogram CAPTURE_KEYS = "relay_wal_keys", Count, "Distinct keys of a transaction, or of a part of a large one";
}

/// Gives what counts failures its zero: the step from nothing to one is no increase for whoever watches.
pub fn start_at_zero() {
    for name in [
        DATABASE_FAILURES,
        DEAD_LETTERS,
        STREAM_LOSSES,
        REPUBLISHED,
        CAPTURE_RECONNECTS,
        CAPTURE_REFUSED_KEYS,
        CAPTURE_UNKNOWN,
    ] {
        counter!(name).increment(0);
    }
    for policy in [GapPolicy::Halt, GapPolicy::Flush] {
        counter!(CAPTURE_GAPS, "policy" => policy.as_str()).increment(0);
    }
    for reason in PublishError::REASONS {
        counter!(PUBLISH_FAILURES, "reason" => reason).increment(0);
    }
    for result in ["rows", "empty", "failed"] {
        counter!(CLAIMS, "result" => result).increment(0);
    }
}
