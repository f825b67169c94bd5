//! Brings everything to rest and looks at what is left.

use std::time::Duration;

use anyhow::ensure;
use cache::{Redis, RedisConfig};
use event::nats::STREAM;

use super::field::{Field, end};
use super::mode::Mode;
use super::rows;
use crate::wait;

/// How long the pair may take to deliver what is left, and the resolver to find the marks of the dead.
const SETTLED: Duration = Duration::from_secs(120);

/// Readers go on for so long after the last change, so that there are values to compare.
const AFTERWARDS: Duration = Duration::from_millis(700);

/// The default durable of the subscriber.
const DURABLE: &str = "redis";

/// What is left.
#[derive(Debug)]
pub struct Rest {
    /// Of each row, as the database has it.
    pub versions: Vec<u64>,
    /// How many rows have a cached value.
    pub cached: usize,
    /// Those whose cached value is another than the database's.
    pub stuck: Vec<Stuck>,
}

/// A cached value that no event will ever correct.
#[derive(Debug, Clone)]
pub struct Stuck {
    pub row: u32,
    pub cached: String,
    pub version: u64,
}

/// Ends the writers, waits until nothing is on its way, ends the readers, and compares every cached value.
pub async fn settle(field: &Field, mode: Mode, count: u32) -> anyhow::Result<Rest> {
    end(&field.writers).await?;
    if mode.has_pair() {
        until_delivered(field).await?;
    }
    tokio::time::sleep(AFTERWARDS).await;
    end(&field.readers).await?;
    compare(field, count).await
}

async fn until_delivered(field: &Field) -> anyhow::Result<()> {
    let redis = Redis::new(RedisConfig { url: field.stack.redis_url(), ..RedisConfig::default() })?;
    wait::until("every event is applied and no mark is left", SETTLED, async || {
        let waiting = outbox::backlog::measure(&field.pool, 1).await?.events;
        ensure!(waiting == 0, "{waiting} events wait in the outbox");
        let asked =
            field.stack.nats.request(&format!("$JS.API.CONSUMER.INFO.{STREAM}.{DURABLE}"), "").await?;
        let consumer: serde_json::Value = serde_json::from_str(&asked)?;
        let number = |name: &str| consumer[name].as_u64();
        ensure!(number("num_pending") == Some(0), "messages wait in the stream: {consumer}");
        ensure!(number("num_ack_pending") == Some(0), "messages are not acknowledged: {consumer}");
        let mut pages = redis.old_marks(Duration::ZERO).await?;
        while let Some(marks) = pages.next().await? {
            ensure!(marks.is_empty(), "marks are left, among them {:?}", marks[0]);
        }
        Ok(Some(()))
    })
    .await
}

async fn compare(field: &Field, count: u32) -> anyhow::Result<Rest> {
    let mut rest = Rest { versions: Vec::new(), cached: 0, stuck: Vec::new() };
    for row in 0..count {
        let cached = field.stack.redis.command(&["GET", &rows::key(row)]).await?;
        let version = rows::load(&field.pool, row).await?.cast_unsigned();
        rest.versions.push(version);
        if cached.is_empty() {
            continue;
        }
        rest.cached += 1;
        if cached != version.to_string() {
            rest.stuck.push(Stuck { row, cached, version });
        }
    }
    Ok(rest)
}
