use std::time::Duration;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::{
    CacheKey, Change, InvalidKey, InvalidTopic, InvalidTraceparent, InvalidUpdate, MAX_NAMESPACES, Topic,
    Traceparent,
};

/// Most keys one event may name. A change that touches more is better described by several events.
pub const MAX_KEYS: usize = 10_000;

/// Identity of an event: a UUID of version 7, so that ids sort roughly by time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct EventId(pub Uuid);

impl EventId {
    /// A new identity.
    #[must_use]
    pub fn generate() -> Self {
        Self(Uuid::now_v7())
    }
}

impl std::fmt::Display for EventId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

/// One fact to be enqueued in the transaction that makes it true: these cache keys changed.
///
/// Invariant: 1 to [`MAX_KEYS`] keys, exactly one if it is an update.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    id: EventId,
    topic: Topic,
    keys: Vec<CacheKey>,
    change: Change,
    traceparent: Option<Traceparent>,
}

/// Why an event is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidEvent {
    /// An event that names no key says nothing.
    #[error("event names no key")]
    NoKeys,
    /// More than [`MAX_KEYS`] keys.
    #[error("event names {keys} keys, the limit is {MAX_KEYS}; split it into several events")]
    TooManyKeys {
        /// How many keys it named.
        keys: usize,
    },
    /// More than [`MAX_NAMESPACES`] namespaces.
    #[error("event names {namespaces} namespaces, the limit is {MAX_NAMESPACES}")]
    TooManyNamespaces {
        /// How many it named.
        namespaces: usize,
    },
    /// One of the keys is refused.
    #[error("key {index} of the event is not valid: {reason}")]
    Key {
        /// Position of the key, counted from 0.
        index: usize,
        /// What is wrong with it.
        reason: InvalidKey,
    },
    /// The topic is refused.
    #[error(transparent)]
    Topic(#[from] InvalidTopic),
    /// The trace context is refused.
    #[error(transparent)]
    Traceparent(#[from] InvalidTraceparent),
    /// The update is refused.
    #[error(transparent)]
    Update(#[from] InvalidUpdate),
    /// The value of an update on the wire is not base64.
    #[error("value of the update is not base64")]
    ValueNotBase64,
}

impl Event {
    /// An event that makes every one of `keys` unusable.
    ///
    /// # Errors
    /// [`InvalidEvent`] if there are no keys, too many, or one of them is not valid.
    pub fn delete<K>(keys: impl IntoIterator<Item = K>) -> Result<Self, InvalidEvent>
    where
        K: TryInto<CacheKey>,
        K::Error: Into<InvalidKey>,
    {
        Self::new(checked(keys)?, Change::Delete)
    }

    /// An event that makes every key unusable that begins with one of `namespaces`. The whole cache is searched for them,
    /// so it is for rare events such as a TRUNCATE.
    ///
    /// # Errors
    /// [`InvalidEvent`] if there are no namespaces, more than [`MAX_NAMESPACES`], or one could not begin a key.
    pub fn delete_namespaces<K>(namespaces: impl IntoIterator<Item = K>) -> Result<Self, InvalidEvent>
    where
        K: TryInto<CacheKey>,
        K::Error: Into<InvalidKey>,
    {
        Self::new(checked(namespaces)?, Change::Namespace)
    }

    /// An event that tells the cache the new value of `key`, so that no miss follows the write.
    ///
    /// `version` must be read while holding the row's lock (a `version` column that the `UPDATE` itself increments);
    /// no other number is safe across transactions. The version of a key must never go back, not even when its row is
    /// deleted and inserted again; where it may, enqueue a delete instead.
    ///
    /// # Errors
    /// [`InvalidEvent`] if the key is not valid or a limit of the update is broken.
    pub fn update<K>(
        key: K,
        value: impl Into<Vec<u8>>,
        version: i64,
        ttl: Duration,
    ) -> Result<Self, InvalidEvent>
    where
        K: TryInto<CacheKey>,
        K::Error: Into<InvalidKey>,
    {
        let key = key.try_into().map_err(|error| InvalidEvent::Key { index: 0, reason: error.into() })?;
        Self::new(vec![key], Change::update(value.into(), version, ttl)?)
    }

    fn new(keys: Vec<CacheKey>, change: Change) -> Result<Self, InvalidEvent> {
        check_key_count(&keys, &change)?;
        Ok(Self { id: EventId::generate(), topic: Topic::default(), keys, change, traceparent: None })
    }

    /// The same event under another topic.
    #[must_use]
    pub fn with_topic(self, topic: Topic) -> Self {
        Self { topic, ..self }
    }

    /// The same event as part of a distributed trace.
    #[must_use]
    pub fn with_traceparent(self, traceparent: Traceparent) -> Self {
        Self { traceparent: Some(traceparent), ..self }
    }

    /// Identity of the event.
    #[must_use]
    pub fn id(&self) -> EventId {
        self.id
    }

    /// Topic it is published under.
    #[must_use]
    pub fn topic(&self) -> &Topic {
        &self.topic
    }

    /// Keys it names.
    #[must_use]
    pub fn keys(&self) -> &[CacheKey] {
        &self.keys
    }

    /// What happens to the keys.
    #[must_use]
    pub fn change(&self) -> &Change {
        &self.change
    }

    /// Trace it belongs to.
    #[must_use]
    pub fn traceparent(&self) -> Option<&Traceparent> {
        self.traceparent.as_ref()
    }
}

fn checked<K>(keys: impl IntoIterator<Item = K>) -> Result<Vec<CacheKey>, InvalidEvent>
where
    K: TryInto<CacheKey>,
    K::Error: Into<InvalidKey>,
{
    let check = |(index, key): (usize, K)| {
        key.try_into().map_err(|error| InvalidEvent::Key { index, reason: error.into() })
    };
    keys.into_iter().enumerate().map(check).collect()
}

/// Whether an event with this change may name so many keys.
///
/// # Errors
/// [`InvalidEvent`] if there are none, too many, or not the one that an update needs.
pub fn check_key_count(keys: &[CacheKey], change: &Change) -> Result<(), InvalidEvent> {
    match change {
        _ if keys.is_empty() => Err(InvalidEvent::NoKeys),
        Change::Delete if keys.len() > MAX_KEYS => Err(InvalidEvent::TooManyKeys { keys: keys.len() }),
        Change::Namespace if keys.len() > MAX_NAMESPACES => {
            Err(InvalidEvent::TooManyNamespaces { namespaces: keys.len() })
        }
        Change::Update { .. } if keys.len() != 1 => Err(InvalidUpdate::NotOneKey { keys: keys.len() }.into()),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::MAX_VALUE_BYTES;

    #[test]
    fn a_delete_names_one_to_ten_thousand_valid_keys() {
        assert_eq!(Event::delete(Vec::<String>::new()).unwrap_err(), InvalidEvent::NoKeys);
        let keys = |count: usize| (0..count).map(|n| format!("user:{n}"));
        assert_eq!(Event::delete(keys(MAX_KEYS)).unwrap().keys().len(), MAX_KEYS);
        assert_eq!(
            Event::delete(keys(MAX_KEYS + 1)).unwrap_err(),
            InvalidEvent::TooManyKeys { keys: 10_001 }
        );
        let error = Event::delete(["user:1", "user:\n2"]).unwrap_err();
        assert_eq!(
            error.to_string(),
            "key 1 of the event is not valid: cache key has the control character U+000A at byte 5"
        );
    }

    #[test]
    fn a_namespace_is_the_beginning_of_a_key() {
        let event = Event::delete_namespaces(["user:", "tenant:"]).unwrap();
        assert_eq!((event.change(), event.keys().len()), (&Change::Namespace, 2));
        assert!(Event::delete_namespaces([""]).is_err(), "the empty namespace would be the whole cache");
        let many = (0..=MAX_NAMESPACES).map(|n| format!("n{n}:"));
        let error = Event::delete_namespaces(many).unwrap_err();
        assert_eq!(error, InvalidEvent::TooManyNamespaces { namespaces: 101 });
    }

    #[test]
    fn an_update_is_held_to_its_limits() {
        let minute = Duration::from_secs(60);
        assert!(Event::update("k", "v", 0, minute).is_ok());
        let too_large = Event::update("k", vec![0; MAX_VALUE_BYTES + 1], 1, minute).unwrap_err();
        assert_eq!(
            too_large.to_string(),
            "value has 524289 bytes, the limit is 524288; enqueue a delete instead"
        );
        assert!(Event::update("k", "v", -1, minute).is_err());
        assert!(Event::update("k", "v", 1, Duration::ZERO).is_err());
        assert!(Event::update("k", "v", 1, MAX_TTL_AND_MORE).is_err());
    }

    const MAX_TTL_AND_MORE: Duration = Duration::from_secs(367 * 24 * 60 * 60);
}
