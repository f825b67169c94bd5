//! Watches the stream and Redis for lost data, and decides what the workers may consume.

mod consumer;
mod gap;
mod holes;
mod nodes;
mod ownership;
mod record;
mod restart;
mod waiting;

use std::time::Duration;

use async_nats::jetstream;
use async_nats::jetstream::consumer::PullConsumer;
use async_nats::jetstream::stream::Stream;
use cache::Redis;
use event::nats::STREAM;
use metrics::gauge;
use service::nats::{JetStreamError, Link, Nats};
use service::{Backoff, Component, Report, SaidLately, Shutdown};
use tokio::sync::watch;
use tokio::time::Instant;

use crate::Config;
use crate::broker::BrokerError;
use crate::durable::{Differences, Info};
use crate::held::StreamBegin;
use crate::metrics as names;
use crate::position::Position;
use crate::replay::ReplayError;

use gap::Halt;
use nodes::Nodes;
use ownership::{Doubt, OwnershipError};

/// How often Redis and the stream are looked at.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// How often a halted subscriber looks whether somebody has decided.
const HALT_INTERVAL: Duration = Duration::from_secs(5);

/// A Redis that was looked at within this time was not a replica meanwhile without its history saying so.
const WATCHED: Duration = Duration::from_mins(1);

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
    /// Where those learn that messages have expired who hold some.
    pub stream: watch::Sender<StreamBegin>,
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
    /// True once the record in Redis was older than what this process had stored there.
    is_behind: bool,
    /// True while nothing in this cache can be stale: it is empty, or its consumer begins with everything.
    is_new: bool,
    handles: Option<(Stream, PullConsumer)>,
    /// The consumer at the last look.
    info: Option<Info>,
    /// Id under which the durable belongs to this cache.
    identity: Option<String>,
    ownership_doubt: Option<Doubt>,
    /// What of the options cannot be changed and is lived with.
    tolerated: Differences,
    /// When the claim was last brought up to date.
    claimed: Option<Instant>,
    /// From when on the stream is to be applied again, whatever Redis says.
    suspicion: Option<Since>,
    /// What was deleted from the stream, as far as it is known to have been applied.
    deleted: Option<holes::Deleted>,
    /// When the Redis servers were last looked at.
    looked_at_redis: Option<Instant>,
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
    /// The masters of a cluster that were seen.
    nodes: Nodes,
}

/// Where a replay begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Since {
    /// The replay margin before what was last applied.
    Margin,
    /// The beginning of the stream.
    Beginning,
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
    #[error("a node of the Redis Cluster does not answer ({0}); what belongs to other nodes goes on")]
    Partial(String),
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
    Owner(#[from] OwnershipError),
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
            self.count_waiting().await;
        }
        looked
    }

    /// Looks at everything once. The order matters: no message is consumed before the stream is known to be whole, and
    /// no position is stored in a Redis that may have lost data.
    async fn look(&self, memory: &mut Memory, health: &Component) -> Result<(), LookError> {
        let masters = self.redis.look_at_masters().await?;
        let missing = memory.nodes.note(&masters);
        gauge!(names::REDIS_UP).set(if missing.is_some() { 0.0 } else { 1.0 });
        note_evictions(masters.evicts_marks.clone(), memory);
        let is_watched = memory.looked_at_redis.is_some_and(|looked| looked.elapsed() < WATCHED);
        memory.looked_at_redis = Some(Instant::now());
        self.reread(&masters.instances, is_watched, memory).await?;
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
        let position = memory.position.clone().unwrap_or_default();
        let seen = self.judge(memory, &position, seen, health).await?;
        let begin = StreamBegin { created_us: seen.stream_created_us, first_seq: seen.first_seq };
        self.stream.send_replace(begin);
        self.judge_redis(memory, &masters, is_watched, seen, health).await?;
        self.advance(memory, seen).await?;
        if let Some((_, consumer)) = &memory.handles
            && self.consumer.borrow().is_none()
        {
            self.consumer.send_replace(Some(consumer.clone()));
        }
        missing.map_or(Ok(()), |missing| Err(LookError::Partial(missing)))
    }

    /// Who has Debezium's events to apply does not need a relay. A stream that was there before is missed all the same.
    fn may_lack_stream(&self, position: &Position) -> bool {
        self.config.debezium_stream.is_some() && position.stream_created_us == 0
    }
}

fn note(error: &LookError, memory: &mut Memory, health: &Component) {
    let report = Report::of(error).to_string();
    if memory.said.is_news(&report) {
        tracing::warn!(error = report, "cannot watch the cache and the stream; trying again");
    }
    health.not_ready(report);
    match error {
        LookError::Redis(_) | LookError::Partial(_) | LookError::Full(_) => {}
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
