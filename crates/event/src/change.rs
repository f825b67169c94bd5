use std::time::Duration;

/// Largest value an update may carry, in bytes: in base64 it still fits the 1 MB `max_payload` of a default nats-server.
pub const MAX_VALUE_BYTES: usize = 512 * 1024;

/// Longest time an update may ask the value to live. A cached value without an end is a leak.
pub const MAX_TTL: Duration = Duration::from_secs(366 * 24 * 60 * 60);

/// Most namespaces one event may name: the whole cache is searched for each.
pub const MAX_NAMESPACES: usize = 100;

/// What is to happen to the keys of an event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// The cached values are no longer true.
    Delete,
    /// Every cached value whose key begins with one of the event's keys is no longer true.
    Namespace,
    /// The one key of the event has this value now. Applied only over a cached value whose version is known and older;
    /// in every other case it acts as a delete.
    Update {
        /// The new value, byte for byte as readers of the cache expect it.
        value: Vec<u8>,
        /// Version taken while holding the row's lock; grows with every change of the row.
        version: i64,
        /// How long the value may be served.
        ttl: Duration,
    },
}

/// Why an update is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum InvalidUpdate {
    /// The value is larger than [`MAX_VALUE_BYTES`]; enqueue a delete instead.
    #[error("value has {bytes} bytes, the limit is {MAX_VALUE_BYTES}; enqueue a delete instead")]
    ValueTooLarge {
        /// Size of the refused value.
        bytes: usize,
    },
    /// Versions start at 0.
    #[error("version {version} is negative")]
    NegativeVersion {
        /// The refused version.
        version: i64,
    },
    /// The time to live is not between 1 ms and [`MAX_TTL`].
    #[error("ttl must be between 1 ms and 366 days")]
    TtlOutOfRange,
    /// An update says what one key holds now, so it names exactly one.
    #[error("an update names exactly one key, not {keys}")]
    NotOneKey {
        /// How many keys it named.
        keys: usize,
    },
}

impl Change {
    /// Checks the parts of an update.
    ///
    /// # Errors
    /// [`InvalidUpdate`] says which limit is broken.
    pub fn update(value: Vec<u8>, version: i64, ttl: Duration) -> Result<Self, InvalidUpdate> {
        if value.len() > MAX_VALUE_BYTES {
            return Err(InvalidUpdate::ValueTooLarge { bytes: value.len() });
        }
        if version < 0 {
            return Err(InvalidUpdate::NegativeVersion { version });
        }
        if ttl < Duration::from_millis(1) || ttl > MAX_TTL {
            return Err(InvalidUpdate::TtlOutOfRange);
        }
        Ok(Self::Update { value, version, ttl })
    }
}
