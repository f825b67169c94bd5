//! A backlog, from Postgres through NATS to Redis.

mod memory;

use std::time::{Duration, Instant};

use anyhow::ensure;

use super::account::Account;
use super::figures::Figure;
use super::numbers::{grouped, mebibytes, median, per_second, ratio, rounded};
use super::{Scale, events, plain, progress, surroundings};
use crate::daemon::Daemon;
use crate::pair::Ground;
use crate::programs::Programs;
use crate::resp::Connection;
pub use memory::Memory;

/// How often Redis is asked how many keys are left.
const LOOK_INTERVAL: Duration = Duration::from_millis(2);

/// How long the subscriber may take to write its own record into Redis.
const SETTLE: Duration = Duration::from_secs(2);

/// A drain that takes longer has stopped.
const PATIENCE: Duration = Duration::from_secs(120);

const TARGET_EVENTS_PER_SECOND: f64 = 180e3;
const TARGET_BYTES: u64 = 40 << 20;
const TARGET_STATEMENTS_PER_EVENT: f64 = 0.01;

/// One drain.
#[derive(Debug)]
struct Round {
    events_per_second: f64,
    statements_per_event: f64,
    relay: Memory,
    subscriber: Memory,
}

/// Measures it.
pub async fn measure(programs: &Programs, scale: Scale) -> anyhow::Result<Vec<Figure>> {
    let count = scale.pick(400_000, 20_000);
    let ground = Ground::start(programs, surroundings::options()).await?;
    ground.migrate().await?;
    // The relay has to create the stream before the subscriber can wait on it.
    let (relay, subscriber) = ground.spawn_pair().await?;
    relay.terminate().await?;
    // The subscriber keeps a record of its own in Redis; let it be there before keys are counted.
    tokio::time::sleep(SETTLE).await;

    let mut rounds = Vec::new();
    for _ in 0..scale.pick(3, 1) {
        rounds.push(round(&ground, &subscriber, count).await?);
    }
    subscriber.terminate().await?;
    let raw = raw_limits(&ground, count).await?;
    Ok(figures(&rounds, count, &raw))
}

async fn round(ground: &Ground, subscriber: &Daemon, count: u64) -> anyhow::Result<Round> {
    let mut redis = Connection::open(ground.stack.redis.address()).await?;
    let nothing = redis.command(&["DBSIZE"]).await?;
    events::enqueue(&ground.pool, 0..count).await?;
    events::fill(&mut redis, 0..count).await?;
    sqlx::query("checkpoint").execute(&ground.pool).await?;

    let before = Account::before_relay(subscriber).await?;
    let (mut relay_memory, mut subscriber_memory) = (Memory::default(), Memory::default());
    let started = Instant::now();
    let relay = ground.spawn_relay(&[])?;
    while redis.command(&["DBSIZE"]).await? != nothing {
        relay_memory.sample(relay.process());
        subscriber_memory.sample(subscriber.process());
        ensure!(started.elapsed() < PATIENCE, "keys are left after {PATIENCE:?}\n{}", relay.process().log());
        tokio::time::sleep(LOOK_INTERVAL).await;
    }
    let events_per_second = per_second(count, started.elapsed());
    let statements = relay.metric("relay_statements_total").await?;
    let times = Account::of(&relay, subscriber).await?.since(&before);
    progress(&format!("{} events/s; {times}", rounded(events_per_second)));
    ground.until_outbox_empty(PATIENCE).await?;
    relay.terminate().await?;
    Ok(Round {
        events_per_second,
        statements_per_event: statements / ratio(count, 1),
        relay: relay_memory,
        subscriber: subscriber_memory,
    })
}

async fn raw_limits(ground: &Ground, count: u64) -> anyhow::Result<String> {
    let claimed = plain::claimed_per_second(ground, count).await?;
    let published = plain::published_per_second(ground, count / 4).await?;
    let unlinked = plain::unlinked_per_second(ground, count).await?;
    let text = format!(
        "each server alone: claim and delete {} rows/s, JetStream {} messages/s, UNLINK {} keys/s",
        rounded(claimed),
        rounded(published),
        rounded(unlinked)
    );
    progress(&text);
    Ok(text)
}

fn figures(rounds: &[Round], count: u64, raw: &str) -> Vec<Figure> {
    let speed = median(rounds.iter().map(|round| round.events_per_second).collect());
    let statements = median(rounds.iter().map(|round| round.statements_per_event).collect());
    let relay = rounds.iter().map(|round| round.relay.max()).max().unwrap_or(0);
    let subscriber = rounds.iter().map(|round| round.subscriber.max()).max().unwrap_or(0);
    let growth = |memory: fn(&Round) -> &Memory| {
        let growth = rounds.iter().map(|round| memory(round).growth()).max().unwrap_or(0);
        format!("second half of the drain at most {} above the first", mebibytes(growth))
    };
    let small = "≤ 40 MiB";
    vec![
        Figure::new(
            format!(
                "Drain of {} events, Postgres → NATS → Redis, from the start of the relay to the last key",
                grouped(count)
            ),
            format!("{} events/s", rounded(speed)),
            raw,
        )
        .with_target("≥ 180 k events/s", speed >= TARGET_EVENTS_PER_SECOND),
        Figure::new("SQL statements per event meanwhile", rounded(statements), "one by one: 4")
            .with_target("< 0.01", statements < TARGET_STATEMENTS_PER_EVENT),
        Figure::new("Memory of the relay meanwhile (RSS)", mebibytes(relay), growth(|round| &round.relay))
            .with_target(small, relay <= TARGET_BYTES),
        Figure::new(
            "Memory of the subscriber meanwhile (RSS)",
            mebibytes(subscriber),
            growth(|round| &round.subscriber),
        )
        .with_target(small, subscriber <= TARGET_BYTES),
    ]
}
