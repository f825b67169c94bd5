//! What a durable consumer says about the cache it belongs to. Pure.
//!
//! Two caches that share a durable would each miss a part of the events. The claim also keeps a copy of the position where
//! Redis cannot evict it. It lies in the description of the consumer, which every version of nats-server keeps.

use serde::{Deserialize, Serialize};

use crate::position::Position;

/// Text before the claim, for people.
const PREFACE: &str = "Invalidates the keys of one cache; do not edit: ";

/// Most bytes of the address: nats-server accepts 4096 for the whole description.
const MAX_ADDRESS_BYTES: usize = 1024;

/// The cache a durable consumer belongs to, and how far that cache was a short while ago.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claim {
    /// Id of the cache, which its Redis keeps as well.
    pub cache: String,
    /// Address of its Redis without credentials, for people.
    pub redis: String,
    /// Creation time of the stream, in microseconds since the Unix epoch; 0 if no position was recorded yet.
    #[serde(default)]
    pub stream_created_us: i64,
    /// Every message up to this sequence was applied.
    #[serde(default)]
    pub acked_seq: u64,
    /// Every message published up to this time was applied, in microseconds since the Unix epoch by the clock of NATS.
    #[serde(default)]
    pub acked_until_us: i64,
    /// Deleted messages up to this sequence were dealt with.
    #[serde(default)]
    pub holes_until: u64,
}

impl Claim {
    /// The claim of the cache `cache` at `redis`, which has come as far as `position`.
    #[must_use]
    pub fn new(cache: &str, redis: &str, position: &Position) -> Self {
        let mut redis = redis.to_owned();
        while redis.len() > MAX_ADDRESS_BYTES {
            redis.pop();
        }
        Self {
            cache: cache.to_owned(),
            redis,
            stream_created_us: position.stream_created_us,
            acked_seq: position.acked_seq,
            acked_until_us: position.acked_until_us,
            holes_until: position.holes_until,
        }
    }

    /// Reads the claim in the description of a consumer, if there is one.
    #[must_use]
    pub fn parse(description: &str) -> Option<Self> {
        serde_json::from_str(description.get(description.find('{')?..)?).ok()
    }

    /// The description of a consumer with this claim.
    #[must_use]
    pub fn describe(&self) -> String {
        PREFACE.to_owned() + &serde_json::to_string(self).expect("plain data always serializes")
    }

    /// The position that the claim keeps. Which servers had the data then is not known.
    #[must_use]
    pub fn position(&self) -> Position {
        Position {
            stream_created_us: self.stream_created_us,
            acked_seq: self.acked_seq,
            acked_until_us: self.acked_until_us,
            holes_until: self.holes_until,
            ..Position::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_claim_is_read_from_the_description_it_was_written_to() {
        let position = Position { stream_created_us: 7, acked_seq: 100, ..Position::default() };
        let claim = Claim::new("ab", "redis://10.0.0.1:6379/1", &position);
        assert_eq!(Claim::parse(&claim.describe()), Some(claim.clone()));
        assert_eq!(claim.position(), position);
    }

    #[test]
    fn other_descriptions_have_no_claim() {
        for text in ["", "Invalidates the keys of one cache", "{", "{}", "a {\"cache\":1}"] {
            assert_eq!(Claim::parse(text), None, "{text}");
        }
    }

    #[test]
    fn a_long_address_does_not_make_the_description_too_long() {
        let claim = Claim::new("ab", &"redis://é".repeat(1000), &Position::default());
        assert!(claim.describe().len() < 4096);
    }
}
