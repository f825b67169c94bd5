//! Claiming from a large table, and with vacuum held back.

mod throughput;

use std::time::Instant;

use sqlx::{Connection, PgConnection, PgPool};

use super::figures::Figure;
use super::numbers::{grouped, milliseconds, rounded};
use super::percentiles::Delays;
use super::{Scale, events, progress, surroundings};
use crate::pair::Ground;
use crate::programs::Programs;

/// Claims that are timed.
const CLAIMS: u32 = 50;

const TARGET_RATIO: f64 = 0.8;

/// What a claim costs in one state of the table.
struct Cost {
    delays: Delays,
    uses_index: bool,
    next_seq: i64,
}

/// Measures it.
pub async fn measure(programs: &Programs, scale: Scale) -> anyhow::Result<Vec<Figure>> {
    let rows = scale.pick(1_000_000, 20_000);
    let claims = scale.pick(CLAIMS, 3);
    let ground = Ground::start(programs, surroundings::options()).await?;
    ground.migrate().await?;
    let empty = claim_from(&ground.pool, 0, claims, true).await?;
    events::enqueue(&ground.pool, 0..rows).await?;
    let full = claim_from(&ground.pool, 0, claims, false).await?;
    let normal = throughput::measure(&ground, scale).await?;
    progress(&format!("{} rows: {}; relay {} events/s", grouped(rows), full.delays.short(), rounded(normal)));

    let mut pin = PgConnection::connect(&ground.stack.postgres_url()).await?;
    pin_snapshot(&mut pin).await?;
    events::enqueue(&ground.pool, 0..rows).await?;
    events::claim_all(&ground.pool).await?;
    let sweep = sweep(&ground.pool).await?;
    let behind = claim_from(&ground.pool, full.next_seq + i64::try_from(rows)?, claims, true).await?;
    let pinned = throughput::measure(&ground, scale).await?;
    progress(&format!(
        "pinned: {}; sweep {}; relay {} events/s",
        behind.delays.short(),
        milliseconds(sweep),
        rounded(pinned)
    ));
    pin.close().await?;

    let index = |cost: &Cost| if cost.uses_index { "by the index" } else { "NOT by the index" };
    let describe = |cost: &Cost| format!("{}, {}", cost.delays.short(), index(cost));
    Ok(vec![
        Figure::new(
            format!("Claim of 2,000 rows from {} rows", grouped(rows)),
            describe(&full),
            format!("from an otherwise empty table {}", describe(&empty)),
        )
        .with_target("plan uses the index", full.uses_index),
        Figure::new(
            format!(
                "The same behind {} deleted rows that a pinned snapshot keeps from vacuum",
                grouped(rows)
            ),
            describe(&behind),
            format!("a sweep over all of them for late commits, once a second, {}", milliseconds(sweep)),
        )
        .with_target("plan uses the index", behind.uses_index),
        Figure::new(
            "Relay's throughput with that snapshot pinned",
            format!("{:.2} of normal: {} events/s", pinned / normal, rounded(pinned)),
            format!("normal {} events/s", rounded(normal)),
        )
        .with_target("≥ 0.8", pinned / normal >= TARGET_RATIO),
    ])
}

/// Keeps everything that is deleted from now on visible to one session, so that vacuum must leave it.
async fn pin_snapshot(connection: &mut PgConnection) -> anyhow::Result<()> {
    sqlx::raw_sql("begin isolation level repeatable read; select count(*) from pg_class")
        .execute(connection)
        .await?;
    Ok(())
}

/// Times claims beginning at `from_seq`. With `fresh`, of rows that are enqueued just before.
async fn claim_from(pool: &PgPool, from_seq: i64, claims: u32, fresh: bool) -> anyhow::Result<Cost> {
    if fresh {
        events::enqueue(pool, 0..u64::from(claims) * 2_000).await?;
    }
    let mut delays = Delays::new();
    let mut next_seq = from_seq;
    for _ in 0..claims {
        let started = Instant::now();
        (_, next_seq) = events::claim(pool, next_seq).await?;
        delays.record(started.elapsed());
    }
    let facts = outbox::diagnosis::facts(pool).await?;
    let uses_index =
        facts.claim_plan.iter().any(|line| line.contains("Index") && line.contains("events_pkey"));
    Ok(Cost { delays, uses_index, next_seq })
}

/// Milliseconds that a claim from the very beginning takes when all it finds is dead.
async fn sweep(pool: &PgPool) -> anyhow::Result<f64> {
    let mut delays = Delays::new();
    for _ in 0..5 {
        let started = Instant::now();
        events::claim(pool, 0).await?;
        delays.record(started.elapsed());
    }
    Ok(delays.percentile(50.0))
}
