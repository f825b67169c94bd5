//! Applying a part of the stream once more, beside normal delivery.

use std::collections::BTreeSet;
use std::time::Duration;

use async_nats::jetstream::consumer::{AckPolicy, DeliverPolicy, PullConsumer, pull};
use async_nats::jetstream::stream::Stream;
use cache::{Redis, RedisError, Work};
use chrono::{DateTime, Utc};
use event::{Envelope, Topic};
use futures::StreamExt;
use metrics::counter;
use service::Report;

use crate::metrics as names;

/// Messages asked for at once.
const FETCH_MESSAGES: usize = 256;

/// Bytes asked for at once, unless one message may be larger.
const FETCH_BYTES: usize = 4 * 1024 * 1024;

/// How long the server may take to answer a request for messages.
const FETCH_EXPIRES: Duration = Duration::from_secs(5);

/// Requests in a row that may bring nothing although there is something to bring.
const MAX_EMPTY_FETCHES: u32 = 6;

/// The consumer of a replay disappears this long after its last request. Between two requests a batch is applied, and
/// searching a large cache for its namespaces takes minutes.
const INACTIVE_THRESHOLD: Duration = Duration::from_mins(30);

/// As if it had failed so often: Redis may take eight times as long as elsewhere.
const REPLAY_PATIENCE: u32 = 3;

/// How often a replay says that it is alive while Redis works.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(1);

/// A replay that did not finish. Starting over is harmless.
#[derive(Debug, thiserror::Error)]
pub enum ReplayError {
    /// NATS failed.
    #[error("NATS failed during the replay")]
    Nats(#[source] async_nats::Error),
    /// The server sent messages that did not arrive. The consumer acknowledges nothing, so they do not come again.
    #[error("messages of the replay were lost on the way: number {got} came where {expected} was to come")]
    Gap {
        /// Number of the next message, counted from the beginning of the replay.
        expected: u64,
        /// Number of the message that came, or of the last that was sent.
        got: u64,
    },
    /// The server has messages and does not send them.
    #[error("NATS does not send the {pending} messages that are left to replay")]
    Stuck {
        /// How many are left.
        pending: u64,
    },
    /// Redis failed.
    #[error("Redis failed during the replay")]
    Redis(#[from] RedisError),
}

/// A stream and the cache to which a part of it is to be applied once more.
pub struct Replay<'a> {
    /// The stream.
    pub stream: &'a Stream,
    /// The cache.
    pub redis: &'a Redis,
    /// Only events of this topic; all if `None`.
    pub topic: Option<&'a Topic>,
    /// Largest message the broker delivers, in bytes.
    pub max_payload: usize,
    /// Called at least once a second or so as long as the replay gets on.
    pub progress: &'a (dyn Fn() + Send + Sync),
}

/// How far a consumer has come.
#[derive(Debug)]
struct Cursor {
    /// Messages delivered; the consumer numbers them from 1 without a gap.
    delivered: u64,
    /// Heartbeats among them, which say nothing about any key.
    heartbeats: u64,
    /// Messages left.
    pending: u64,
}

impl Replay<'_> {
    /// Applies every message published since `since` (or everything, without a time) that was in the stream when the
    /// replay began. Returns how many these were, without heartbeats.
    ///
    /// # Errors
    /// [`ReplayError`]. Without one, every message has been applied or has expired.
    pub async fn run(&self, since: Option<DateTime<Utc>>) -> Result<u64, ReplayError> {
        let last_seq = self.stream.get_info().await.map_err(nats)?.state.last_sequence;
        let mut consumer = self.consumer(since).await?;
        let mut cursor = Cursor { delivered: 0, heartbeats: 0, pending: consumer.cached_info().num_pending };
        let mut empty = 0;
        let mut work = Work::new();
        let mut namespaces = BTreeSet::new();
        while cursor.pending > 0 {
            (self.progress)();
            let before = cursor.delivered;
            self.fetch(&consumer, &mut cursor, last_seq, &mut work).await?;
            if cursor.delivered > before {
                empty = 0;
                namespaces.append(&mut work.take_namespaces());
                self.tolerate_refusal(self.patient().apply(&work)).await?;
                work.clear();
                counter!(names::REPLAYED).increment(cursor.delivered - before);
                continue;
            }
            // Everything left may have expired meanwhile; or an answer was lost, and then it looks the same from here.
            cursor.compare(&mut consumer).await?;
            empty += 1;
            if cursor.pending > 0 && empty >= MAX_EMPTY_FETCHES {
                return Err(ReplayError::Stuck { pending: cursor.pending });
            }
        }
        // Events commute, so one search of the cache does for the namespaces of all.
        if !namespaces.is_empty() {
            self.tolerate_refusal(self.patient().delete_namespaces(&namespaces)).await?;
        }
        if let Err(error) = self.stream.delete_consumer(&consumer.cached_info().name).await {
            tracing::debug!(error = %Report::of(&error), "could not delete the consumer of a replay; it disappears by itself");
        }
        Ok(cursor.delivered - cursor.heartbeats)
    }

    async fn consumer(&self, since: Option<DateTime<Utc>>) -> Result<PullConsumer, ReplayError> {
        let wanted = pull::Config {
            description: Some("Replay for a cache that lost data".to_owned()),
            deliver_policy: since
                .map_or(DeliverPolicy::All, |start_time| DeliverPolicy::ByStartTime { start_time }),
            ack_policy: AckPolicy::None,
            filter_subject: self.topic.map_or_else(String::new, event::nats::subject),
            inactive_threshold: INACTIVE_THRESHOLD,
            ..Default::default()
        };
        self.stream.create_consumer(wanted).await.map_err(nats)
    }

    /// Asks for messages once and adds what came to `work`. How the request ended does not matter as long as something
    /// came: if that was not everything sent, the next message does not follow the last.
    async fn fetch(
        &self,
        consumer: &PullConsumer,
        cursor: &mut Cursor,
        last_seq: u64,
        work: &mut Work,
    ) -> Result<(), ReplayError> {
        let wanted = usize::try_from(cursor.pending).unwrap_or(FETCH_MESSAGES).min(FETCH_MESSAGES);
        let mut messages = consumer
            .batch()
            .max_messages(wanted)
            // A limit below the size of one message would never let it through.
            .max_bytes(FETCH_BYTES.max(self.max_payload.saturating_mul(2)))
            .expires(FETCH_EXPIRES)
            .messages()
            .await
            .map_err(nats)?;
        let before = cursor.delivered;
        while let Some(message) = messages.next().await {
            let message = match message {
                Ok(message) => message,
                // Such as that the next message exceeds the bytes asked for.
                Err(error) if cursor.delivered > before => {
                    tracing::debug!(error = %Report::of(error.as_ref()), "a request for messages ended early");
                    break;
                }
                Err(error) => return Err(ReplayError::Nats(error)),
            };
            let info = message.info().map_err(ReplayError::Nats)?;
            cursor.follow(info.consumer_sequence)?;
            cursor.pending = if info.stream_sequence >= last_seq { 0 } else { info.pending };
            // Poison was set aside when it was first delivered.
            if let Ok(envelope) = Envelope::decode(&message.payload) {
                cursor.heartbeats += u64::from(envelope.events.is_empty());
                envelope.events.iter().for_each(|event| work.add(event));
            }
        }
        Ok(())
    }

    /// A failure costs the whole replay, so Redis is given more time than elsewhere.
    fn patient(&self) -> Redis {
        self.redis.after_failures(REPLAY_PATIENCE)
    }

    /// What is refused comes again by normal delivery until somebody has widened the rights; the rest need not wait for that.
    async fn tolerate_refusal<T>(
        &self,
        applying: impl Future<Output = Result<T, RedisError>>,
    ) -> Result<(), ReplayError> {
        match with_progress(self.progress, applying).await {
            Err(error @ RedisError::KeysRefused { .. }) => {
                counter!(names::REDIS_FAILURES).increment(1);
                tracing::warn!(error = %Report::of(&error), "the replay leaves out what is refused");
            }
            applied => drop(applied?),
        }
        Ok(())
    }
}

impl Cursor {
    fn follow(&mut self, number: u64) -> Result<(), ReplayError> {
        let expected = self.delivered + 1;
        if number != expected {
            return Err(ReplayError::Gap { expected, got: number });
        }
        self.delivered = number;
        Ok(())
    }

    /// Takes over what the server says is left, if it has sent no more than what came.
    async fn compare(&mut self, consumer: &mut PullConsumer) -> Result<(), ReplayError> {
        let info = consumer.info().await.map_err(nats)?;
        let sent = info.delivered.consumer_sequence;
        if sent != self.delivered {
            return Err(ReplayError::Gap { expected: self.delivered + 1, got: sent });
        }
        self.pending = info.num_pending;
        Ok(())
    }
}

/// Waits for something that takes long although each of its steps has a limit, and says meanwhile that it gets on.
pub(crate) async fn with_progress<T>(progress: impl Fn(), work: impl Future<Output = T>) -> T {
    tokio::pin!(work);
    loop {
        match tokio::time::timeout(PROGRESS_INTERVAL, &mut work).await {
            Ok(done) => return done,
            Err(_) => progress(),
        }
    }
}

fn nats(error: impl Into<async_nats::Error>) -> ReplayError {
    ReplayError::Nats(error.into())
}

impl std::fmt::Debug for Replay<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Replay")
            .field("redis", &self.redis)
            .field("topic", &self.topic)
            .finish_non_exhaustive()
    }
}
