//! Names and questions that the programs share on NATS.

use serde::{Deserialize, Serialize};

use crate::{Topic, TransactionId};

/// The stream that carries envelopes.
pub const STREAM: &str = "INVALIDATIONS";

/// Every subject of the stream.
pub const SUBJECTS: &str = "invalidation.>";

/// Subjects of messages that could not be decoded, `invalidation-dead.<topic>`; outside the stream.
pub const DEAD_SUBJECTS: &str = "invalidation-dead.>";

/// Where relays answer [`CoverageRequest`].
pub const COVERAGE_SUBJECT: &str = "invalidation-relay.coverage";

/// Where relays answer [`OutcomeRequest`].
pub const OUTCOME_SUBJECT: &str = "invalidation-relay.outcome";

/// Subject of heartbeats, within the stream.
pub const HEARTBEAT_SUBJECT: &str = "invalidation.heartbeat";

/// Header that makes a message a heartbeat: when it was sent, in microseconds since the Unix epoch. The message is an envelope
/// without events, for readers that do not know the header.
pub const HEARTBEAT_HEADER: &str = "Invalidation-Heartbeat";

/// Most transactions one [`OutcomeRequest`] may ask about; of more, the first so many are answered.
pub const MAX_OUTCOMES: usize = 1_000;

/// Header of a dead letter: why the message was set aside.
pub const DEAD_REASON_HEADER: &str = "Invalidation-Dead-Reason";

/// Header of a dead letter: sequence of the original message in the stream.
pub const DEAD_SEQUENCE_HEADER: &str = "Invalidation-Stream-Sequence";

/// Subject that envelopes of `topic` are published on.
#[must_use]
pub fn subject(topic: &Topic) -> String {
    format!("invalidation.{topic}")
}

/// Subject for the dead letter of a message that came on `subject`.
#[must_use]
pub fn dead_subject(subject: &str) -> String {
    format!("invalidation-dead.{}", subject.strip_prefix("invalidation.").unwrap_or(subject))
}

/// Asked by a subscriber that missed part of a stream or finds another stream than the one it knew: from when on is
/// what I see complete?
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CoverageRequest {
    /// Creation time of the stream, in microseconds since the Unix epoch.
    pub stream_created_us: i64,
    /// What of it was lost before it was read. A relay publishes again what it retains of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub missing: Option<Missing>,
}

/// Messages that a stream has lost and that a subscriber has not read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Missing {
    /// They were published since, in microseconds since the Unix epoch.
    pub since_us: i64,
    /// They came before this sequence.
    pub before_seq: u64,
}

/// A relay's answer to [`CoverageRequest`]. Times are microseconds since the Unix epoch.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CoverageReply {
    /// Every event published since is in that stream, was in it, or is about to be published to it again. `None` while no
    /// relay has examined the stream.
    pub complete_since_us: Option<i64>,
    /// Everything published since is retained, and is published again whenever the stream turns out to lack it.
    pub retained_since_us: i64,
    /// About how many messages are still to be published to that stream again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub republish_remaining: Option<u64>,
    /// Everything that the request says is missing is published again, or was. `None` if the relay did not understand.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub missing_is_retained: Option<bool>,
}

/// Asked by a subscriber that finds marks whose writer has left them behind: how did these transactions end?
///
/// A relay that does not know this form does not answer, rather than speak of transactions of its own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OutcomeRequest {
    /// At most [`MAX_OUTCOMES`].
    pub transactions: Vec<TransactionId>,
}

/// A relay's answer to [`OutcomeRequest`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OutcomeReply {
    /// One for each transaction, in the order of the request.
    pub outcomes: Vec<Outcome>,
}

/// How a transaction ended, as a new snapshot sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// Every new snapshot sees what it wrote.
    Committed,
    /// No snapshot ever will.
    Aborted,
    /// Still open, or its commit is not visible yet.
    InProgress,
    /// It belongs to another database, or to a timeline that the relay's server does not continue.
    OtherHistory,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn subjects_name_the_topic() {
        assert_eq!(subject(&Topic::default()), "invalidation.default");
        assert_eq!(dead_subject("invalidation.orders"), "invalidation-dead.orders");
        assert_eq!(dead_subject("debezium.users"), "invalidation-dead.debezium.users");
    }
}
