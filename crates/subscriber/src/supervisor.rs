//! Watches the stream and Redis for lost data, and decides what the workers may consume.

mod gap;
mod restart;
mod waiting;

use std::collections::BTreeSet;
use std::time::Duration;

use async_nats::jetstream;
use async_nats::jetstream::consumer::PullConsumer;
use async_nats::jetstream::stream::{RawMessageErrorKind, Stream};
use cache::Redis;
use chrono::DateTime;
use event::nats::STREAM;
use metrics::gauge;
use service::nats::{JetStreamError, Link, Nats};
use service::{Backoff, Component, Report, SaidLately, Shutdown};
use tokio::sync::watch;
use tokio::time::Instant;

use crate::broker::{self, BrokerError};
use crate::metrics as names;
use crate::position::{Position, Seen};
use crate::replay::ReplayError;
use crate::{Config, durable};

use gap::Halt;

/// How often Redis and the stream are looked at.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// How often a halted subscriber looks whether somebody has decided.
const HALT_INTERVAL: Duration = Duration::from_secs(5);

/// Pauses after a failure.
const MIN_RETRY_DELAY: Duration = Duration::from_millis(100);
const MAX_RETRY_DELAY: Duration = Duration::from_secs(2);

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
    /// What is stored in Redis; nothing if this Redis has no record.
    stored: Option<Position>,
    /// Whether the position could not be stored because Redis is full.
    is_full: bool,
    handles: Option<(Stream, PullConsumer)>,
    /// The connection since which the last message that was applied is known to be the one it was.
    looked_inside: Option<Link>,
    /// Since when a gap has been waiting for a relay's word.
    doubt: Option<Instant>,
    /// When it was last said that the subscriber has halted, while it has.
    halted: Option<Instant>,
    /// Whether it is known that no relay has created the stream yet, and no matter.
    lacks_stream: bool,
    /// Causes of failed looks that were logged.
    said: SaidLately,
    /// The policy under which Redis may evict marks, while it may.
    evicts_marks: Option<String>,
}

#[derive(Debug, thiserror::Error)]
enum LookError {
    #[error("{0}; nothing is consumed")]
    NotConnected(String),
    #[error(transparent)]
    Broker(#[from] BrokerError),
    #[error("cannot look at the stream")]
    Stream(#[source] JetStreamError),
    #[error("Redis does not answer")]
    Redis(#[from] cache::RedisError),
    #[error(
        "Redis is full (maxmemory) and has no record yet of what this cache has applied; nothing is consumed before it has, \
         as a gap could not be noticed later: make room"
    )]
    Full(#[source] cache::RedisError),
    #[error(transparent)]
    Replay(#[from] ReplayError),
    #[error("part of the stream is missing ({0}); waiting for a relay to say whether it publishes it again")]
    Doubt(String),
    #[error(transparent)]
    Halt(#[from] Halt),
}

impl Supervisor {
    /// Watches until shutdown is requested.
    pub async fn run(self, health: Component, shutdown: Shutdown) {
        let mut memory = Memory::default();
        let mut retry = Backoff::new(MIN_RETRY_DELAY, MAX_RETRY_DELAY);
        while !shutdown.is_requested() {
            let looked = tokio::select! {
                () = shutdown.requested() => break,
                looked = self.look_and_count(&mut memory, &health) => looked,
            };
            gauge!(names::NATS_CONNECTED).set(if self.nats.link().connected { 1.0 } else { 0.0 });
            let pause = match looked {
                Ok(()) => {
                    retry.reset();
                    memory.said.clear();
                    health.ready();
                    LOOK_INTERVAL
                }
                Err(LookError::Halt(halt)) => {
                    retry.reset();
                    health.not_ready(halt.to_string());
                    HALT_INTERVAL
                }
                Err(error) => {
                    note(&error, &mut memory, &health);
                    retry.next_delay()
                }
            };
            tokio::select! {
                () = shutdown.requested() => {}
                () = tokio::time::sleep(pause) => {}
            }
        }
    }

    async fn look_and_count(&self, memory: &mut Memory, health: &Component) -> Result<(), LookError> {
        let looked = self.look(memory, health).await;
        if let Err(LookError::Redis(_)) = &looked {
            gauge!(names::REDIS_UP).set(0.0);
            self.count_waiting(memory).await;
        }
        looked
    }

    /// Looks at everything once. The order matters: no message is consumed before the stream is known to be whole, and
    /// no position is stored in a Redis that may have lost data.
    async fn look(&self, memory: &mut Memory, health: &Component) -> Result<(), LookError> {
        let masters = self.redis.look_at_masters().await?;
        gauge!(names::REDIS_UP).set(1.0);
        note_evictions(masters.evicts_marks, memory);
        if memory.position.is_none() {
            memory.stored = self.load_position().await?;
            memory.position = Some(memory.stored.clone().unwrap_or_default());
        }
        self.take_word_of(&masters.instances, memory).await?;
        let position = memory.position.clone().unwrap_or_default();
        let link = self.nats.link();
        let seen = tokio::select! {
            seen = self.look_at_stream(memory, &position) => seen,
            // Rather than after the time that a request may take.
            () = self.nats.lost_since(link) => Err(LookError::NotConnected(self.nats.why_not_connected())),
        };
        let seen = match seen {
            Err(LookError::Broker(BrokerError::NoStream)) if self.may_lack_stream(&position) => {
                if !std::mem::replace(&mut memory.lacks_stream, true) {
                    tracing::info!(
                        "no stream {STREAM} yet: only Debezium's change events are applied until a relay creates it"
                    );
                }
                return Ok(());
            }
            seen => seen?,
        };
        if std::mem::take(&mut memory.lacks_stream) {
            tracing::info!("stream {STREAM} exists; its events are applied as well");
        }
        let seen = self.judge(memory, &position, seen, health).await?;
        self.judge_redis(memory, masters.instances, seen, health).await?;
        self.advance(memory, seen).await?;
        if let Some((_, consumer)) = &memory.handles
            && self.consumer.borrow().is_none()
        {
            self.consumer.send_replace(Some(consumer.clone()));
        }
        Ok(())
    }

    async fn load_position(&self) -> Result<Option<Position>, LookError> {
        let record = self.redis.load_position(&self.config.durable).await?;
        Ok(record.and_then(|record| serde_json::from_slice(&record).ok()))
    }

    /// A Redis that was not there before says itself how old its data is: by the record that came with it. Another
    /// subscriber may also have brought it up to date by now.
    async fn take_word_of(&self, instances: &BTreeSet<String>, memory: &mut Memory) -> Result<(), LookError> {
        let is_known = memory.position.as_ref().is_some_and(|known| instances.is_subset(&known.instances));
        if !is_known && let Some(stored) = self.load_position().await? {
            memory.stored = Some(stored.clone());
            memory.position = Some(stored);
        }
        Ok(())
    }

    /// Who has Debezium's events to apply does not need a relay. A stream that was there before is missed all the same.
    fn may_lack_stream(&self, position: &Position) -> bool {
        self.config.debezium_stream.is_some() && position.stream_created_us == 0
    }

    async fn look_at_stream(&self, memory: &mut Memory, position: &Position) -> Result<Seen, LookError> {
        if memory.handles.is_none() {
            self.consumer.send_replace(None);
            let stream = broker::stream(&self.nats, &self.jetstream).await?;
            // A consumer that was lost begins where the last one is known to have been; one of a new stream with
            // everything.
            let same = position.stream_created_us == stream.cached_info().created.timestamp_micros();
            let since = DateTime::from_timestamp_micros(position.acked_until_us)
                .filter(|_| same && position.acked_until_us > 0);
            let consumer = durable::consumer(&stream, &self.config, since).await?;
            memory.handles = Some((stream, consumer));
        }
        let (stream, consumer) = memory.handles.as_mut().expect("set above");
        let (mut seen, pending) = broker::look(stream, consumer)
            .await
            .map_err(|error| LookError::Stream(self.nats.judge(error)))?;
        // A stream that was shorter may be long again, but only NATS that was away comes back with old data.
        let link = self.nats.link();
        if memory.looked_inside != Some(link) && position.stream_created_us == seen.stream_created_us {
            match broker::is_refilled(stream, position.acked_seq, position.acked_until_us).await {
                Ok(false) => memory.looked_inside = Some(link),
                Ok(true) => seen.is_refilled = true,
                Err(error) => {
                    tracing::debug!(error = %Report::of(error.as_ref()), "cannot look into the stream; trying again")
                }
            }
        }
        waiting::show(pending);
        Ok(seen)
    }

    /// Records how far this cache is.
    async fn advance(&self, memory: &mut Memory, seen: Seen) -> Result<(), LookError> {
        let Some((stream, _)) = &mut memory.handles else { return Ok(()) };
        let position = memory.position.get_or_insert_default();
        position.stream_created_us = seen.stream_created_us;
        let mut applied = seen.ack_floor.min(seen.last_seq).max(position.acked_seq);
        if let Some(subject) = durable::filter(&self.config) {
            match broker::reach(stream, &subject, seen, applied).await {
                Ok(reach) => applied = reach,
                Err(error) => {
                    tracing::debug!(error = %Report::of(error.as_ref()), "cannot look for the next message of the topic")
                }
            }
        }
        if applied > position.acked_seq || position.acked_until_us == 0 {
            match stream.get_raw_message(applied).await {
                Ok(message) => {
                    position.acked_until_us = message.time.timestamp_micros();
                    position.acked_seq = applied;
                }
                // It has expired; the time of an older one is good enough.
                Err(error) if error.kind() == RawMessageErrorKind::NoMessageFound => {
                    position.acked_seq = applied
                }
                // Sequence and time belong together.
                Err(error) => {
                    tracing::debug!(error = %Report::of(&error), "cannot look at the last message that was applied")
                }
            }
        }
        if memory.stored.as_ref() == memory.position.as_ref() {
            return Ok(());
        }
        self.store_position(memory).await
    }

    /// A Redis that is full keeps the older record. That makes a replay longer, or a gap be judged once more, and hides
    /// nothing: what the stream still has need not wait. Without any record a later loss could not be noticed.
    async fn store_position(&self, memory: &mut Memory) -> Result<(), LookError> {
        let position = memory.position.clone().unwrap_or_default();
        let record = serde_json::to_vec(&position).expect("plain data always serializes");
        match self.redis.store_position(&self.config.durable, &record).await {
            Ok(()) => {
                memory.stored = Some(position);
                if std::mem::take(&mut memory.is_full) {
                    tracing::info!("Redis stores again how far this cache is");
                }
                Ok(())
            }
            Err(error) if error.is_out_of_memory() => {
                if memory.stored.is_none() {
                    return Err(LookError::Full(error));
                }
                if !std::mem::replace(&mut memory.is_full, true) {
                    tracing::warn!(
                        "Redis is full (maxmemory) and does not store how far this cache is; invalidations go on, updates \
                         become deletes, strict writes fail"
                    );
                }
                Ok(())
            }
            Err(error) => Err(error.into()),
        }
    }
}

fn note(error: &LookError, memory: &mut Memory, health: &Component) {
    let report = Report::of(error).to_string();
    if memory.said.is_news(&report) {
        tracing::warn!(error = report, "cannot watch the cache and the stream; trying again");
    }
    health.not_ready(report);
    match error {
        LookError::Redis(_) | LookError::Full(_) => {}
        // Consumer or stream may be gone: look for them anew.
        _ => memory.handles = None,
    }
}

/// Strict writes are only as safe as their marks.
fn note_evictions(policy: Option<String>, memory: &mut Memory) {
    gauge!(names::MARKS_EVICTABLE).set(if policy.is_some() { 1.0 } else { 0.0 });
    if policy == memory.evicts_marks {
        return;
    }
    match &policy {
        Some(policy) => tracing::error!(
            policy,
            "Redis may evict marks: strict writes are NOT safe with maxmemory-policy {policy}; set it to noeviction or to a \
             volatile-* policy (default writes are not affected)"
        ),
        None => tracing::info!("Redis does not evict marks any more: strict writes are safe again"),
    }
    memory.evicts_marks = policy;
}
