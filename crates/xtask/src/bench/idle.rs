//! What relay and subscriber cost while nothing happens.

mod bare;

use std::time::{Duration, Instant};

use super::figures::Figure;
use super::numbers::{mebibytes, rounded};
use super::{Scale, progress, surroundings};
use crate::daemon::Daemon;
use crate::pair::Ground;
use crate::programs::Programs;
use bare::BareLoop;

/// What happens at the start is not idleness.
const SETTLE: Duration = Duration::from_secs(3);

const TARGET_PERCENT: f64 = 1.0;
const TARGET_QUERIES: f64 = 250.0;

/// Counters at one moment.
struct Reading {
    at: Instant,
    relay_cpu: f64,
    subscriber_cpu: f64,
    postgres_cpu: f64,
    statements: f64,
    transactions: i64,
}

/// Measures it.
pub async fn measure(programs: &Programs, scale: Scale) -> anyhow::Result<Vec<Figure>> {
    let ground = Ground::start(programs, surroundings::options()).await?;
    ground.migrate().await?;
    let (relay, subscriber) = ground.spawn_pair().await?;
    tokio::time::sleep(scale.pick(SETTLE, SETTLE / 3)).await;
    let before = read(&ground, &relay, &subscriber).await?;
    let duration = scale.pick(Duration::from_secs(20), Duration::from_secs(2));
    tokio::time::sleep(duration).await;
    let after = read(&ground, &relay, &subscriber).await?;

    let seconds = (after.at - before.at).as_secs_f64();
    let percent = |of: fn(&Reading) -> f64| (of(&after) - of(&before)) / seconds * 100.0;
    let queries = (after.statements - before.statements) / seconds;
    let transactions = f64::from(i32::try_from(after.transactions - before.transactions)?) / seconds;
    let (relay_cpu, subscriber_cpu) =
        (percent(|reading| reading.relay_cpu), percent(|reading| reading.subscriber_cpu));
    let bare = BareLoop { per_second: queries, duration }.processor_percent(&ground).await?;
    progress(&format!(
        "relay {relay_cpu:.2} %, subscriber {subscriber_cpu:.2} %, {} queries/s; as many bare queries {bare:.2} %",
        rounded(queries)
    ));
    let rss = |daemon: &Daemon| anyhow::Ok(mebibytes(daemon.process().rss_bytes()?));
    Ok(vec![
        Figure::new(
            "Idle relay, processor time",
            format!("{relay_cpu:.2} % of a core"),
            format!(
                "a loop of as many `select 1` and nothing else {bare:.2} %; Postgres {:.2} % to answer; memory {}",
                percent(|reading| reading.postgres_cpu),
                rss(&relay)?
            ),
        )
        .with_target("≤ 1 %", relay_cpu <= TARGET_PERCENT),
        Figure::new(
            "Idle relay, queries",
            format!("{} per second", rounded(queries)),
            format!("Postgres counts {} transactions per second", rounded(transactions)),
        )
        .with_target("≤ 250 per second", queries.max(transactions) <= TARGET_QUERIES),
        Figure::new(
            "Idle subscriber, processor time",
            format!("{subscriber_cpu:.2} % of a core"),
            format!("has {} of memory", rss(&subscriber)?),
        ),
    ])
}

async fn read(ground: &Ground, relay: &Daemon, subscriber: &Daemon) -> anyhow::Result<Reading> {
    let transactions = sqlx::query_scalar(
        "select xact_commit + xact_rollback from pg_stat_database where datname = current_database()",
    )
    .fetch_one(&ground.pool)
    .await?;
    Ok(Reading {
        at: Instant::now(),
        relay_cpu: relay.process().cpu_seconds()?,
        subscriber_cpu: subscriber.process().cpu_seconds()?,
        postgres_cpu: ground.stack.postgres.process().cpu_seconds()?,
        statements: relay.metric("relay_statements_total").await?,
        transactions,
    })
}
