//! Watches the stream and Redis for lost data, and decides what the workers may consume.

use std::collections::BTreeSet;
use std::time::Duration;

use async_nats::jetstream::consumer::PullConsumer;
use async_nats::jetstream::{self, stream::Stream};
use cache::Redis;
use chrono::{DateTime, Utc};
use event::nats::{COVERAGE_SUBJECT, CoverageReply, CoverageRequest};
use metrics::{counter, gauge};
use service::nats::Nats;
use service::{Backoff, Component, Shutdown};
use tokio::sync::watch;
use tokio::time::Instant;

use crate::Config;
use crate::broker::{self, BrokerError};
use crate::config::GapPolicy;
use crate::metrics as names;
use crate::position::{Continuity, Position, Seen};
use crate::replay::{Replay, ReplayError, with_progress};

/// How often Redis and the stream are looked at.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// The shortest replay: clocks differ and acknowledgements are recorded only now and then.
const MIN_REPLAY_MARGIN: Duration = Duration::from_mins(1);

/// How far the clocks of Postgres and NATS may be apart before a gap could be overlooked.
const CLOCK_MARGIN_US: i64 = 5_000_000;

/// How long a relay may take to answer.
const QUESTION_TIMEOUT: Duration = Duration::from_secs(2);

/// Pauses after a failure.
const MIN_RETRY_DELAY: Duration = Duration::from_millis(100);
const MAX_RETRY_DELAY: Duration = Duration::from_secs(2);

/// Invalidations are gone for good and the operator chose to halt.
#[derive(Debug, thiserror::Error)]
#[error(
    "invalidations are missing from the stream for good ({what}) and SUBSCRIBER_GAP_POLICY is halt: keys of this cache \
     may be stale; delete them (or start once with SUBSCRIBER_GAP_POLICY=flush and SUBSCRIBER_FLUSH_PATTERNS), or accept \
     it with `subscriber accept-gap`"
)]
pub struct Halt {
    /// What happened to them.
    pub what: String,
}

/// The watcher.
#[derive(Debug)]
pub struct Supervisor {
    /// The broker.
    pub nats: Nats,
    /// JetStream.
    pub jetstream: jetstream::Context,
    /// The cache.
    pub redis: Redis,
    /// Where the workers learn of the consumer.
    pub consumer: watch::Sender<Option<PullConsumer>>,
    /// Options.
    pub config: Config,
}

/// What one look needs to remember for the next.
#[derive(Default)]
struct Memory {
    position: Option<Position>,
    /// What is stored in Redis.
    stored: Option<Position>,
    /// When Redis was last seen to be the one it was.
    redis_unchanged: Option<DateTime<Utc>>,
    handles: Option<(Stream, PullConsumer)>,
    /// Since when a gap has been waiting for a relay's word.
    doubt: Option<Instant>,
}

#[derive(Debug, thiserror::Error)]
enum LookError {
    #[error(transparent)]
    Broker(#[from] BrokerError),
    #[error("cannot look at the stream")]
    Stream(#[source] async_nats::Error),
    #[error("Redis does not answer")]
    Redis(#[from] cache::RedisError),
    #[error(transparent)]
    Replay(#[from] ReplayError),
    #[error("part of the stream is missing ({0}); waiting for a relay to say whether it publishes it again")]
    Doubt(String),
    #[error(transparent)]
    Halt(#[from] Halt),
}

impl Supervisor {
    /// Watches until shutdown is requested.
    ///
    /// # Errors
    /// [`Halt`].
    pub async fn run(self, health: Component, shutdown: Shutdown) -> Result<(), Halt> {
        let mut memory = Memory::default();
        let mut retry = Backoff::new(MIN_RETRY_DELAY, MAX_RETRY_DELAY);
        while !shutdown.is_requested() {
            let looked = tokio::select! {
                () = shutdown.requested() => break,
                looked = self.look(&mut memory, &health) => looked,
            };
            gauge!(names::NATS_CONNECTED).set(if self.nats.link().connected { 1.0 } else { 0.0 });
            let pause = match looked {
                Ok(()) => {
                    retry.reset();
                    health.ready();
                    LOOK_INTERVAL
                }
                Err(LookError::Halt(halt)) => return Err(halt),
                Err(error) => {
                    self.note(&error, retry.attempts(), &mut memory, &health);
                    retry.next_delay()
                }
            };
            tokio::select! {
                () = shutdown.requested() => {}
                () = tokio::time::sleep(pause) => {}
            }
        }
        Ok(())
    }

    fn note(&self, error: &LookError, attempts: u32, memory: &mut Memory, health: &Component) {
        let cause = std::error::Error::source(error).map(ToString::to_string).unwrap_or_default();
        health.not_ready(format!("{error}: {cause}"));
        if attempts == 0 {
            tracing::warn!(%error, cause, "cannot watch the cache and the stream; trying again");
        }
        match error {
            LookError::Redis(_) => gauge!(names::REDIS_UP).set(0.0),
            // Consumer or stream may be gone: look for them anew.
            _ => memory.handles = None,
        }
    }

    /// Looks at everything once. The order matters: no message is consumed before the stream is known to be whole, and
    /// no position is stored in a Redis that may have lost data.
    async fn look(&self, memory: &mut Memory, health: &Component) -> Result<(), LookError> {
        let instances = self.redis.instances().await?;
        gauge!(names::REDIS_UP).set(1.0);
        if memory.position.is_none() {
            memory.position = Some(self.load_position().await?);
        }
        let position = memory.position.clone().unwrap_or_default();
        let seen = self.look_at_stream(memory, &position).await?;
        self.judge(memory, &position, seen, health).await?;
        self.judge_redis(memory, instances, seen, health).await?;
        self.advance(memory, seen).await?;
        if let Some((_, consumer)) = &memory.handles
            && self.consumer.borrow().is_none()
        {
            self.consumer.send_replace(Some(consumer.clone()));
        }
        Ok(())
    }

    async fn load_position(&self) -> Result<Position, LookError> {
        let record = self.redis.load_position(&self.config.durable).await?;
        Ok(record.and_then(|record| serde_json::from_slice(&record).ok()).unwrap_or_default())
    }

    async fn look_at_stream(&self, memory: &mut Memory, position: &Position) -> Result<Seen, LookError> {
        if memory.handles.is_none() {
            self.consumer.send_replace(None);
            let stream = broker::stream(&self.jetstream).await?;
            // A consumer that was lost begins where the last one is known to have been; one of a new stream with
            // everything.
            let same = position.stream_created_us == stream.cached_info().created.timestamp_micros();
            let since = DateTime::from_timestamp_micros(position.acked_until_us)
                .filter(|_| same && position.acked_until_us > 0);
            let consumer = broker::consumer(&stream, &self.config, since).await?;
            memory.handles = Some((stream, consumer));
        }
        let (stream, consumer) = memory.handles.as_mut().expect("set above");
        let (seen, pending) = broker::look(stream, consumer).await.map_err(LookError::Stream)?;
        #[expect(clippy::cast_precision_loss, reason = "counts far below 2^52")]
        {
            gauge!(names::PENDING).set(pending.messages as f64);
            gauge!(names::ACK_PENDING).set(pending.unacknowledged as f64);
        }
        Ok(seen)
    }

    /// Decides whether the workers may go on with this stream.
    async fn judge(
        &self,
        memory: &mut Memory,
        position: &Position,
        seen: Seen,
        health: &Component,
    ) -> Result<(), LookError> {
        let continuity = position.judge(seen);
        if continuity == Continuity::Whole {
            memory.doubt = None;
            return Ok(());
        }
        self.consumer.send_replace(None);
        let what = match continuity {
            Continuity::Expired { messages } => {
                format!("{messages} messages expired before this cache read them")
            }
            Continuity::Recreated => "the stream was created anew".to_owned(),
            Continuity::Truncated | Continuity::Whole => "NATS came back with old data".to_owned(),
        };
        let covered = match continuity {
            Continuity::Expired { .. } => Some(false),
            _ => self.is_covered(continuity, position, seen).await,
        };
        match covered {
            Some(true) => tracing::warn!(
                what,
                "the stream is not the one this cache knew; relays publish again what it lacks"
            ),
            Some(false) => self.apply_gap_policy(&what, health).await?,
            None => {
                let since = *memory.doubt.get_or_insert_with(Instant::now);
                if since.elapsed() < self.config.gap_grace {
                    return Err(LookError::Doubt(what));
                }
                self.apply_gap_policy(&format!("{what}, and no relay answers"), health).await?;
            }
        }
        memory.doubt = None;
        if continuity == Continuity::Truncated {
            self.restart_consumer(memory, position).await?;
        }
        memory.position = Some(Position {
            stream_created_us: seen.stream_created_us,
            acked_seq: seen.first_seq.saturating_sub(1).min(seen.last_seq),
            ..position.clone()
        });
        Ok(())
    }

    /// A durable that is ahead of its stream would wait until the stream catches up, and skip what comes before.
    async fn restart_consumer(&self, memory: &mut Memory, position: &Position) -> Result<(), LookError> {
        if let Some((stream, _)) = memory.handles.take() {
            stream
                .delete_consumer(&self.config.durable)
                .await
                .map_err(|error| LookError::Stream(error.into()))?;
            let since =
                DateTime::from_timestamp_micros(position.acked_until_us.saturating_sub(CLOCK_MARGIN_US));
            let consumer = broker::consumer(&stream, &self.config, since).await?;
            memory.handles = Some((stream, consumer));
        }
        Ok(())
    }

    /// Whether a relay vouches for everything this cache has not applied. `None` if no relay can say yet.
    async fn is_covered(&self, continuity: Continuity, position: &Position, seen: Seen) -> Option<bool> {
        let question = CoverageRequest { stream_created_us: seen.stream_created_us };
        let body = serde_json::to_vec(&question).expect("plain data always serializes");
        let asked = self.nats.client.request(COVERAGE_SUBJECT, body.into());
        let answer = tokio::time::timeout(QUESTION_TIMEOUT, asked).await.ok()?.ok()?;
        let reply: CoverageReply = serde_json::from_slice(&answer.payload).ok()?;
        let since = match continuity {
            Continuity::Recreated => reply.complete_since_us?,
            _ => reply.retained_since_us,
        };
        Some(since <= position.acked_until_us.saturating_sub(CLOCK_MARGIN_US))
    }

    async fn apply_gap_policy(&self, what: &str, health: &Component) -> Result<(), LookError> {
        let policy = self.config.gap_policy;
        counter!(names::GAPS, "policy" => policy.as_str()).increment(1);
        tracing::error!(what, policy = policy.as_str(), "invalidations are missing from the stream for good");
        if policy == GapPolicy::Halt {
            return Err(Halt { what: what.to_owned() }.into());
        }
        let flush = async {
            match self.config.flush_everything {
                true => self.redis.flush_all_keys().await,
                false => self.redis.delete_matching(&self.config.flush_patterns).await,
            }
        };
        // A large cache takes longer than a component may be silent.
        let deleted = with_progress(|| health.beat(), flush).await?;
        tracing::error!(deleted, "flushed the keys that the gap policy names");
        Ok(())
    }

    /// Replays the stream if Redis is not the one it was: it may have come back with values that were invalidated since.
    async fn judge_redis(
        &self,
        memory: &mut Memory,
        instances: BTreeSet<String>,
        seen: Seen,
        health: &Component,
    ) -> Result<(), LookError> {
        let now = Utc::now();
        let position = memory.position.get_or_insert_default();
        let is_first_start = position.instances.is_empty() && seen.ack_floor == 0;
        if is_first_start || instances.is_subset(&position.instances) {
            position.instances = instances;
            memory.redis_unchanged = Some(now);
            return Ok(());
        }
        let margin = self.replay_margin().await?;
        let (stream, _) = memory.handles.as_ref().expect("looked at before");
        let mut reference = memory.redis_unchanged;
        if reference.is_none() && position.acked_until_us > 0 {
            reference = DateTime::from_timestamp_micros(position.acked_until_us);
        }
        if reference.is_none() {
            reference = stream.get_raw_message(seen.ack_floor).await.ok().map(|message| message.time);
        }
        let since = reference.map(|reference| reference - margin);
        tracing::warn!(
            since = since.map_or("the beginning of the stream".to_owned(), |since| since.to_rfc3339()),
            "Redis was restarted or replaced and may have old values; replaying the stream"
        );
        counter!(names::REPLAYS, "reason" => "redis").increment(1);
        let replay = Replay {
            stream,
            redis: &self.redis,
            topic: self.config.topic.as_ref(),
            max_payload: self.nats.client.server_info().max_payload,
            progress: &|| health.beat(),
        };
        let messages = replay.run(since).await?;
        tracing::warn!(messages, "replayed the stream");
        position.instances = instances;
        memory.redis_unchanged = Some(now);
        Ok(())
    }

    async fn replay_margin(&self) -> Result<Duration, LookError> {
        if let Some(margin) = self.config.replay_margin {
            return Ok(margin);
        }
        let interval = self.redis.longest_snapshot_interval().await?;
        Ok(interval.unwrap_or_default().max(MIN_REPLAY_MARGIN))
    }

    /// Records how far this cache is.
    async fn advance(&self, memory: &mut Memory, seen: Seen) -> Result<(), LookError> {
        let Some((stream, _)) = &memory.handles else { return Ok(()) };
        let position = memory.position.get_or_insert_default();
        position.stream_created_us = seen.stream_created_us;
        if seen.ack_floor > position.acked_seq || position.acked_until_us == 0 {
            // The message may have expired; the time of an older one is good enough then.
            if let Ok(message) = stream.get_raw_message(seen.ack_floor).await {
                position.acked_until_us = message.time.timestamp_micros();
            }
            position.acked_seq = position.acked_seq.max(seen.ack_floor);
        }
        if memory.stored.as_ref() != Some(position) {
            let record = serde_json::to_vec(position).expect("plain data always serializes");
            self.redis.store_position(&self.config.durable, &record).await?;
            memory.stored = Some(position.clone());
        }
        Ok(())
    }
}
