//! The raw limits: what each server does alone.

use std::time::{Duration, Instant};

use anyhow::Context;
use async_nats::jetstream;
use async_nats::jetstream::stream::{Config, StorageType};
use futures::{StreamExt, TryStreamExt, stream};
use sqlx::postgres::PgPoolOptions;

use super::events;
use super::numbers::per_second;
use crate::pair::Ground;
use crate::resp::Connection;

/// Messages on their way at the same time.
const IN_FLIGHT: usize = 512;

/// About the size of an envelope with one event.
const BODY: &[u8] = &[b'x'; 150];

/// Subject of the raw stream.
const SUBJECT: &str = "bench.raw";

/// Rows a second that one connection claims and settles, as the relay does, with nothing else running.
pub async fn claimed_per_second(ground: &Ground, count: u64) -> anyhow::Result<f64> {
    events::enqueue(&ground.pool, 0..count).await?;
    let alone = PgPoolOptions::new().max_connections(1).connect(&ground.stack.postgres_url()).await?;
    let started = Instant::now();
    let rows = events::claim_all(&alone).await?;
    Ok(per_second(rows, started.elapsed()))
}

/// Messages a second that JetStream stores and acknowledges, one event each, pipelined.
pub async fn published_per_second(ground: &Ground, count: u64) -> anyhow::Result<f64> {
    let jetstream = raw_stream(ground).await?;
    let started = Instant::now();
    stream::iter(0..count)
        .map(|_| publish(&jetstream))
        .buffer_unordered(IN_FLIGHT)
        .try_for_each(async |_| Ok(()))
        .await?;
    Ok(per_second(count, started.elapsed()))
}

/// Keys a second that Redis unlinks, a thousand names in a command.
pub async fn unlinked_per_second(ground: &Ground, count: u64) -> anyhow::Result<f64> {
    let mut redis = Connection::open(ground.stack.redis.address()).await?;
    events::fill(&mut redis, 0..count).await?;
    Ok(per_second(count, events::unlink(&mut redis, 0..count).await?))
}

/// JetStream with a stream of its own in a file.
pub async fn raw_stream(ground: &Ground) -> anyhow::Result<jetstream::Context> {
    let jetstream = jetstream::new(async_nats::connect(ground.stack.nats_url()).await?);
    let config = Config {
        name: "BENCH".to_owned(),
        subjects: vec![SUBJECT.to_owned()],
        storage: StorageType::File,
        ..Default::default()
    };
    jetstream.get_or_create_stream(config).await.context("cannot create a stream")?;
    Ok(jetstream)
}

/// Publishes one message, waits for the acknowledgement, and says how long both took.
pub async fn publish(jetstream: &jetstream::Context) -> anyhow::Result<Duration> {
    let started = Instant::now();
    jetstream.publish(SUBJECT, BODY.into()).await?.await?;
    Ok(started.elapsed())
}
