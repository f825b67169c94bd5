//! Capture from the write-ahead log, beside the outbox.

mod backlog;
mod huge;

use std::time::Duration;

use sqlx::PgPool;

use super::figures::Figure;
use super::latency::{Way, create_accounts, play};
use super::numbers::grouped;
use super::{Scale, progress, surroundings};
use crate::daemon::Daemon;
use crate::observer;
use crate::pair::{Ground, Variable};
use crate::programs::Programs;

/// Transactions a second.
const RATE: u64 = 1_000;
const TARGET_P50_MS: f64 = 1.5;
const TARGET_P99_MS: f64 = 8.0;

const RULES: &str =
    "[[table]]\nname = \"profiles\"\nkeys = [\"user:{id}:profile\"]\non_truncate = [\"user:\"]\n";

/// Measures it.
pub async fn measure(programs: &Programs, scale: Scale) -> anyhow::Result<Vec<Figure>> {
    let mut figures = latency(programs, scale).await?;
    figures.extend(backlog::measure(programs, scale).await?);
    figures.push(huge::measure(programs, scale).await?);
    Ok(figures)
}

async fn latency(programs: &Programs, scale: Scale) -> anyhow::Result<Vec<Figure>> {
    let mut options = surroundings::options();
    options.redis.configuration = observer::CONFIGURATION.to_owned();
    let ground = Ground::start(programs, options).await?;
    ground.migrate().await?;
    create_accounts(&ground.pool).await?;
    let duration = scale.pick(Duration::from_secs(10), Duration::from_secs(1));
    create_profiles(&ground.pool, RATE * duration.as_secs()).await?;

    let (relay, subscriber) = ground.spawn_pair().await?;
    play(&ground, Way::Outbox, 200, Duration::from_secs(1)).await?;
    let outbox = play(&ground, Way::Outbox, RATE, duration).await?.delays;
    progress(&format!("{RATE} tx/s by the outbox: {}", outbox.long()));
    relay.terminate().await?;
    let relay = reader(&ground)?;
    relay.until_ready().await?;
    play(&ground, Way::Log, 200, Duration::from_secs(1)).await?;
    let log = play(&ground, Way::Log, RATE, duration).await?.delays;
    progress(&format!("{RATE} tx/s by the write-ahead log: {}", log.long()));
    drop(subscriber);
    let met = log.percentile(50.0) <= TARGET_P50_MS && log.percentile(99.0) <= TARGET_P99_MS;
    let name = format!("From commit to deletion at {} tx/s, by the write-ahead log", grouped(RATE));
    Ok(vec![
        Figure::new(name, log.long(), format!("by the outbox: {}", outbox.long()))
            .with_target("p50 ≤ 1.5 ms, p99 ≤ 8 ms", met),
    ])
}

/// A table of which each row has a key, numbered from 0.
async fn create_profiles(pool: &PgPool, count: u64) -> anyhow::Result<()> {
    sqlx::query("create table profiles (id bigint primary key, n bigint not null default 0)")
        .execute(pool)
        .await?;
    sqlx::query("insert into profiles select n from generate_series(0, $1) n")
        .bind(i64::try_from(count)?)
        .execute(pool)
        .await?;
    sqlx::query("vacuum analyze profiles").execute(pool).await?;
    Ok(())
}

/// A relay that reads the log. Does not wait until it is ready.
fn reader(ground: &Ground) -> anyhow::Result<Daemon> {
    let rules = ground.stack.directory().path().join("rules.toml");
    std::fs::write(&rules, RULES)?;
    let source: [Variable; 2] =
        [("RELAY_SOURCE", "wal".to_owned()), ("RELAY_RULES", rules.display().to_string())];
    ground.spawn_relay(&source)
}
