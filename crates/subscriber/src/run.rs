use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use async_nats::jetstream;
use cache::Redis;
use service::nats::{Nats, NatsError};
use service::{Health, HttpServer, Limits, Metrics, Patience, Report, Shutdown, drain};
use tokio::sync::{mpsc, watch};
use tokio_util::task::TaskTracker;

use crate::broker::BrokerError;
use crate::dead::DeadLetters;
use crate::debezium::Debezium;
use crate::heartbeat::{Heartbeats, Pulse};
use crate::held::{Room, StreamBegin};
use crate::leftover::Leftover;
use crate::namespaces::Namespaces;
use crate::supervisor::Supervisor;
use crate::worker::{self, Shared};
use crate::{Config, broker, credentials, debezium, resolver};

/// Without a turn of its loop for this long a component is not ready. Waiting for messages is not silence.
const STALL_AFTER: Duration = Duration::from_secs(30);

/// Without a turn of its loop for this long the process should be restarted.
const DEAD_AFTER: Duration = Duration::from_mins(10);

/// Time for one attempt to connect to NATS at the start.
const CONNECT_PATIENCE: Duration = Duration::from_secs(1);

/// Runs the subscriber until shutdown is requested, then finishes the batches in hand.
///
/// # Errors
/// What is wrong with the configuration or the surroundings at the start, naming what to fix. Other trouble is waited out.
pub async fn run(config: Config, shutdown: Shutdown) -> anyhow::Result<()> {
    config.check()?;
    let metrics = Metrics::install()?;
    crate::metrics::describe();
    crate::metrics::start_at_zero();
    let health = Health::new();
    let startup = health.component("startup", Limits::default());
    let http = HttpServer::start(config.http_addr, health.clone(), metrics).await?;
    let opening = Patience::new(config.startup_timeout).persist(&startup, is_passing, || open(&config));
    let Some(opened) = shutdown.or_done(Box::pin(opening)).await else {
        tracing::info!("stopped while starting");
        return Ok(());
    };
    let Opened { redis, nats, jetstream, debezium } = opened?;
    let limits = Limits { stall_after: Some(STALL_AFTER), dead_after: Some(DEAD_AFTER) };
    let watching = health.component("stream and redis", limits);

    let heartbeats = Heartbeats::new();
    let (consumer_sender, consumer) = watch::channel(None);
    let (stream_sender, stream) = watch::channel(StreamBegin::default());
    let (leftover, arrivals) = mpsc::unbounded_channel();
    let (down_sender, down) = watch::channel(Arc::default());
    let (namespaces, requests) = mpsc::unbounded_channel();
    let shared = Arc::new(Shared {
        redis: redis.clone(),
        dead: DeadLetters::new(jetstream.clone(), &config),
        consumer,
        heartbeats: heartbeats.clone(),
        leftover,
        down,
        namespaces,
        room: Room::default(),
        stream: stream.clone(),
        max_payload: nats.client.server_info().max_payload,
        config: config.clone(),
    });
    let tasks = TaskTracker::new();
    for _ in 0..config.workers {
        tasks.spawn(worker::run(Arc::clone(&shared), health.component("apply", limits), shutdown.clone()));
    }
    let keep_alive_every = config.ack_wait / 3;
    let leftover = Leftover { redis: redis.clone(), arrivals, down: down_sender, stream, keep_alive_every };
    tasks.spawn(leftover.run(health.component("leftover keys", limits), shutdown.clone()));
    let namespaces = Namespaces { redis: redis.clone(), requests };
    tasks.spawn(namespaces.run(health.component("namespaces", limits), shutdown.clone()));
    if let Some(debezium) = debezium {
        tasks.spawn(debezium.run(health.clone(), limits, shutdown.clone()));
    }
    if config.has_redis_file() {
        tasks.spawn(credentials::follow(redis.clone(), config.clone(), shutdown.clone()));
    }
    // A consumer of one topic gets no heartbeats.
    if config.topic.is_none() {
        let (redis, jetstream, limit) = (redis.clone(), jetstream.clone(), config.heartbeat_limit);
        let pulse = Pulse { heartbeats, redis, jetstream, limit };
        tasks.spawn(pulse.run(health.component("heartbeat", limits), shutdown.clone()));
    }
    tasks.spawn(resolver::run(redis.clone(), nats.clone(), shutdown.clone()));
    let supervisor = Supervisor {
        nats: nats.clone(),
        jetstream,
        redis,
        consumer: consumer_sender,
        stream: stream_sender,
        config: config.clone(),
    };
    let mut watch = tokio::spawn(supervisor.run(watching, shutdown.clone()));
    tasks.close();
    startup.ready();
    tracing::info!(
        nats = %nats.url(), redis = %config.redis_url()?, durable = config.durable, http = %http.local_addr(),
        "subscriber runs"
    );

    // It ends before only if it panics.
    let watched = tokio::select! {
        ended = &mut watch => ended,
        () = shutdown.requested() => Ok(()),
    };
    shutdown.request();
    health.draining();
    drain("batches in hand", async { tasks.wait().await }, config.service.drain_timeout).await;
    http.stop().await;
    Ok(watched?)
}

/// What the subscriber works with.
struct Opened {
    redis: Redis,
    nats: Nats,
    jetstream: jetstream::Context,
    debezium: Option<Debezium>,
}

/// Connects to the servers and looks whether they are what the subscriber needs. Nothing to be undone when it is dropped.
async fn open(config: &Config) -> anyhow::Result<Opened> {
    let (redis, redis_url) = (config.connect_redis()?, config.redis_url()?);
    refuse_wrong_credentials(&redis)
        .await
        .with_context(|| format!("REDIS_URL (--redis-url) {redis_url} cannot be used"))?;
    let nats = Nats::connect(&config.nats, "subscriber", CONNECT_PATIENCE).await?;
    let jetstream = broker::jetstream(&nats);
    find_stream(&nats, &jetstream, config).await?;
    let debezium = debezium::prepare(config, &jetstream, &redis).await?;
    Ok(Opened { redis, nats, jetstream, debezium })
}

/// Tells if a failure to start may pass without anybody doing something: a server is away, or the relay, which creates the
/// stream, has not started yet.
fn is_passing(error: &anyhow::Error) -> bool {
    let nats = matches!(error.downcast_ref(), Some(NatsError::Unreachable { .. }));
    nats || error.downcast_ref().is_some_and(BrokerError::may_pass)
}

/// A Redis that is down is waited for; one that refuses us needs the operator.
async fn refuse_wrong_credentials(redis: &Redis) -> Result<(), cache::RedisError> {
    match redis.ping().await {
        Err(error) if !error.is_retryable() => Err(error),
        Err(error) => {
            tracing::warn!(error = %Report::of(&error), "Redis does not answer yet");
            Ok(())
        }
        Ok(()) => Ok(()),
    }
}

/// The relay creates the stream of events. Who has Debezium's events to apply may have no relay at all.
async fn find_stream(
    nats: &Nats,
    jetstream: &jetstream::Context,
    config: &Config,
) -> Result<(), BrokerError> {
    match broker::stream(nats, jetstream).await {
        Err(BrokerError::NoStream) if config.debezium_stream.is_some() => Ok(()),
        other => other.map(drop),
    }
}
