//! Applying a part of the stream once more, beside normal delivery.

use std::time::Duration;

use async_nats::jetstream::consumer::{AckPolicy, DeliverPolicy, pull};
use async_nats::jetstream::stream::Stream;
use cache::{Redis, RedisError, Work};
use chrono::{DateTime, Utc};
use event::Envelope;
use futures::StreamExt;
use metrics::counter;

use crate::Config;
use crate::metrics as names;

/// Messages asked for at once.
const FETCH_MESSAGES: usize = 256;

/// Bytes asked for at once.
const FETCH_BYTES: usize = 4 * 1024 * 1024;

/// How long the server may take to answer a request for messages.
const FETCH_EXPIRES: Duration = Duration::from_secs(5);

/// The consumer of a replay disappears this long after its last request.
const INACTIVE_THRESHOLD: Duration = Duration::from_mins(1);

/// A replay that did not finish. Starting over is harmless.
#[derive(Debug, thiserror::Error)]
pub enum ReplayError {
    /// NATS failed.
    #[error("NATS failed during the replay")]
    Nats(#[source] async_nats::Error),
    /// Redis failed.
    #[error("Redis failed during the replay")]
    Redis(#[from] RedisError),
}

/// Applies every message published since `since` (or everything, without a time) that was in the stream when the replay
/// began. Says how many that were.
///
/// # Errors
/// [`ReplayError`].
pub async fn replay(
    stream: &Stream,
    redis: &Redis,
    config: &Config,
    since: Option<DateTime<Utc>>,
) -> Result<u64, ReplayError> {
    let nats = |error: async_nats::Error| ReplayError::Nats(error);
    let last_seq = stream.get_info().await.map_err(|error| nats(error.into()))?.state.last_sequence;
    let consumer = stream
        .create_consumer(pull::Config {
            description: Some("Replay for a cache that lost data".to_owned()),
            deliver_policy: since
                .map_or(DeliverPolicy::All, |start_time| DeliverPolicy::ByStartTime { start_time }),
            ack_policy: AckPolicy::None,
            filter_subject: config.topic.as_ref().map_or_else(String::new, event::nats::subject),
            inactive_threshold: INACTIVE_THRESHOLD,
            ..Default::default()
        })
        .await
        .map_err(|error| nats(error.into()))?;
    let mut pending = consumer.cached_info().num_pending;
    let mut replayed = 0;
    let mut work = Work::new();
    while pending > 0 {
        let mut messages = consumer
            .batch()
            .max_messages(FETCH_MESSAGES.min(usize::try_from(pending).unwrap_or(FETCH_MESSAGES)))
            .max_bytes(FETCH_BYTES)
            .expires(FETCH_EXPIRES)
            .messages()
            .await
            .map_err(|error| nats(error.into()))?;
        let mut fetched = 0_u64;
        while let Some(message) = messages.next().await {
            let message = message.map_err(nats)?;
            fetched += 1;
            if let Ok(info) = message.info() {
                pending = if info.stream_sequence >= last_seq { 0 } else { info.pending };
            }
            // Poison was set aside when it was first delivered.
            if let Ok(envelope) = Envelope::decode(&message.payload) {
                envelope.events.iter().for_each(|event| work.add(event));
            }
        }
        redis.apply(&work).await?;
        work.clear();
        replayed += fetched;
        counter!(names::REPLAYED).increment(fetched);
        if fetched == 0 {
            // Everything left expired meanwhile.
            break;
        }
    }
    Ok(replayed)
}
