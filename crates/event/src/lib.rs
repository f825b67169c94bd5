#![doc = include_str!("../README.md")]

mod change;
mod envelope;
mod event;
mod history;
mod key;
pub mod log_event;
pub mod nats;
mod topic;
mod traceparent;

pub use change::{Change, InvalidUpdate, MAX_NAMESPACES, MAX_TTL, MAX_VALUE_BYTES};
pub use envelope::{CommittedEvent, CommittedEventRef, DecodeError, Envelope, EnvelopeWriter, WIRE_VERSION};
pub use event::{Event, EventId, InvalidEvent, MAX_KEYS, check_key_count};
pub use history::{HISTORY_SQL, History, InvalidHistory, TransactionId};
pub use key::{CacheKey, InvalidKey, MAX_KEY_BYTES};
pub use topic::{InvalidTopic, MAX_TOPIC_BYTES, Topic};
pub use traceparent::{InvalidTraceparent, Traceparent};
