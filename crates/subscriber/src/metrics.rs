//! Names of the subscriber's metrics.

use metrics::{Unit, counter, describe_counter, describe_gauge, describe_histogram, gauge};

use crate::debezium::Kind;

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
    describe_gauge HEARTBEAT_AGE = "subscriber_heartbeat_age_seconds", Seconds, "Age of the last heartbeat of a relay that came through to each Redis server: how long ago everything worked";
    describe_counter MESSAGES = "subscriber_messages_total", Count, "Messages settled, by result: applied or dead_letter";
    describe_counter EVENTS_APPLIED = "subscriber_events_applied_total", Count, "Events of applied messages";
    describe_counter KEYS_INVALIDATED = "subscriber_keys_invalidated_total", Count, "Distinct keys per batch that were invalidated or updated";
    describe_counter NAMESPACES_INVALIDATED = "subscriber_namespaces_invalidated_total", Count, "Distinct namespaces per search: every key that begins so was invalidated";
    describe_counter KEYS_PRESENT = "subscriber_keys_present_total", Count, "Names removed for them: values and guards that existed";
    describe_counter UPDATES = "subscriber_updates_total", Count, "Versioned updates, by outcome: replaced or ignored";
    describe_counter REDELIVERIES = "subscriber_redeliveries_total", Count, "Messages that had been delivered before";
    describe_counter DEAD_LETTERS = "subscriber_dead_letters_total", Count, "Messages set aside because they cannot be decoded";
    describe_counter DEAD_LETTERS_FAILED = "subscriber_dead_letters_failed_total", Count, "Failed attempts to set such a message aside; it comes again";
    describe_counter DEBEZIUM_MESSAGES = "subscriber_debezium_messages_total", Count, "Messages of Debezium that were read, by kind: change, no_rules, heartbeat, transaction, schema_change, logical_message or tombstone";
    describe_counter DEBEZIUM_UNKNOWN = "subscriber_debezium_unknown_changes_total", Count, "Changes that Debezium sent of which not every key could be told, so that key prefixes were invalidated";
    describe_gauge DEBEZIUM_HEARTBEAT = "subscriber_debezium_heartbeat_timestamp_seconds", Seconds, "Time of Debezium's newest heartbeat, in seconds since the Unix epoch; absent without heartbeats (heartbeat.interval.ms)";
    describe_gauge DEBEZIUM_PENDING = "subscriber_debezium_pending_messages", Count, "Messages in Debezium's stream that were not delivered yet";
    describe_gauge DEBEZIUM_ACK_PENDING = "subscriber_debezium_ack_pending_messages", Count, "Messages of Debezium that were delivered but not acknowledged; those that wait for their repetition among them";
    describe_counter DEBEZIUM_GAPS = "subscriber_debezium_gaps_total", Count, "Times messages were missing from Debezium's stream before they were read";
    describe_histogram DEBEZIUM_LAG = "subscriber_debezium_commit_to_delete_seconds", Seconds, "From the commit of a change that Debezium sent, by the clock of the database, until Redis applied it first";
    describe_counter REDIS_FAILURES = "subscriber_redis_failures_total", Count, "Failed attempts to apply a batch";
    describe_counter REPLAYS = "subscriber_replays_total", Count, "Replays of the stream, by reason";
    describe_counter REPLAYED = "subscriber_replayed_messages_total", Count, "Messages applied again by replays";
    describe_counter GAPS = "subscriber_gaps_total", Count, "Times invalidations were missing from the stream for good, by policy";
    describe_gauge HALTED = "subscriber_halted", Count, "1 while nothing is consumed because of such a gap, until an operator decides";
    describe_counter MARKS_RESOLVED = "subscriber_marks_resolved_total", Count, "Marks removed that their writers had left behind, by outcome of the transaction: committed or aborted";
    describe_gauge ORPHAN_MARKS = "subscriber_orphan_marks", Count, "Marks of strict writes that are older than 5 s; their keys are not cached";
    describe_gauge OLDEST_ORPHAN_MARK = "subscriber_oldest_orphan_mark_seconds", Seconds, "Age of the oldest of them; the log names its transaction";
    describe_gauge MARKS_EVICTABLE = "subscriber_marks_evictable", Count, "1 while the maxmemory-policy of Redis could evict marks, so that strict writes are not safe";
    describe_gauge PENDING = "subscriber_pending_messages", Count, "Messages in the stream that were not delivered yet";
    describe_gauge ACK_PENDING = "subscriber_ack_pending_messages", Count, "Messages that were delivered but not acknowledged";
    describe_gauge HELD_MESSAGES = "subscriber_held_messages", Count, "Messages that are done in part: the rest waits for a node of a Redis Cluster, for rights or for a search for namespaces";
    describe_gauge REFUSED_KEYS = "subscriber_refused_keys", Count, "Keys to be invalidated that the user of Redis may not touch";
    describe_gauge WAITING_NAMESPACES = "subscriber_waiting_namespaces", Count, "Namespaces to be invalidated for which the cache is being searched, or will be";
    describe_histogram NAMESPACE_SEARCH_TIME = "subscriber_namespace_search_seconds", Seconds, "Time of a search of the cache for namespaces";
    describe_gauge NATS_CONNECTED = "subscriber_nats_connected", Count, "1 while NATS is connected";
    describe_gauge REDIS_UP = "subscriber_redis_up", Count, "1 while Redis answers, in a cluster every master";
    describe_gauge REDIS_NODE_UP = "subscriber_redis_node_up", Count, "By master of a Redis Cluster (node): 1 while it answers; not a number once it is no master any more";
    describe_histogram APPLY_TIME = "subscriber_apply_seconds", Seconds, "Time for Redis to apply a batch";
    describe_histogram ENQUEUE_TO_DELETE = "subscriber_enqueue_to_delete_seconds", Seconds, "From enqueue of the oldest event of a message until Redis applied it";
}

/// Gives every counter its zero: the step from nothing to one is no increase for whoever watches.
pub fn start_at_zero() {
    let plain = [
        EVENTS_APPLIED,
        KEYS_INVALIDATED,
        KEYS_PRESENT,
        REDELIVERIES,
        DEAD_LETTERS,
        DEAD_LETTERS_FAILED,
        REDIS_FAILURES,
        REPLAYED,
        DEBEZIUM_UNKNOWN,
        DEBEZIUM_GAPS,
    ];
    for name in plain {
        counter!(name).increment(0);
    }
    for name in [HALTED, HELD_MESSAGES, REFUSED_KEYS, WAITING_NAMESPACES] {
        gauge!(name).set(0.0);
    }
    for result in ["applied", "dead_letter"] {
        counter!(MESSAGES, "result" => result).increment(0);
    }
    for kind in Kind::ALL {
        counter!(DEBEZIUM_MESSAGES, "kind" => kind.as_str()).increment(0);
    }
    for policy in ["halt", "flush"] {
        counter!(GAPS, "policy" => policy).increment(0);
    }
    for outcome in ["committed", "aborted"] {
        counter!(MARKS_RESOLVED, "outcome" => outcome).increment(0);
    }
    for outcome in ["replaced", "ignored"] {
        counter!(UPDATES, "outcome" => outcome).increment(0);
    }
}
