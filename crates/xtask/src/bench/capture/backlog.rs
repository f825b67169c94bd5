//! Many small transactions that were committed while no relay read the log.

use std::time::{Duration, Instant};

use anyhow::ensure;
use sqlx::{AssertSqlSafe, PgPool};

use super::{create_profiles, reader};
use crate::bench::figures::Figure;
use crate::bench::numbers::{grouped, median, per_second, rounded};
use crate::bench::{Scale, events, progress, surroundings};
use crate::pair::Ground;
use crate::programs::Programs;
use crate::resp::Connection;

/// A drain that takes longer has stopped.
const PATIENCE: Duration = Duration::from_secs(120);

const LOOK_INTERVAL: Duration = Duration::from_millis(5);

const TARGET_PER_SECOND: f64 = 50e3;

pub(super) async fn measure(programs: &Programs, scale: Scale) -> anyhow::Result<Vec<Figure>> {
    let count = scale.pick(200_000, 10_000);
    let ground = Ground::start(programs, surroundings::options()).await?;
    ground.migrate().await?;
    create_profiles(&ground.pool, count).await?;
    let (relay, subscriber) = ground.spawn_pair().await?;
    relay.terminate().await?;
    let relay = reader(&ground)?;
    relay.until_ready().await?;
    relay.terminate().await?;

    let mut rounds = Vec::new();
    let mut raw = Vec::new();
    for _ in 0..scale.pick(3, 1) {
        sqlx::query("select pg_create_logical_replication_slot('bare', 'pgoutput')")
            .execute(&ground.pool)
            .await?;
        rounds.push(round(&ground, count).await?);
        raw.push(decoded(&ground.pool, count).await?);
        progress(&format!(
            "{} transactions/s; Postgres alone decodes {}",
            rounded(*rounds.last().expect("just pushed")),
            rounded(*raw.last().expect("just pushed"))
        ));
    }
    drop(subscriber);
    let speed = median(rounds);
    let name = format!("Drain of {} single-row transactions by the write-ahead log", grouped(count));
    let beside = format!("Postgres alone decodes {} transactions/s", rounded(median(raw)));
    Ok(vec![
        Figure::new(name, format!("{} transactions/s", rounded(speed)), beside)
            .with_target("≥ 50 k transactions/s", speed >= TARGET_PER_SECOND),
    ])
}

async fn round(ground: &Ground, count: u64) -> anyhow::Result<f64> {
    let mut redis = Connection::open(ground.stack.redis.address()).await?;
    let nothing = redis.command(&["DBSIZE"]).await?;
    commit_one_by_one(&ground.pool, count).await?;
    events::fill(&mut redis, 0..count).await?;
    sqlx::query("checkpoint").execute(&ground.pool).await?;
    let started = Instant::now();
    let relay = reader(ground)?;
    while redis.command(&["DBSIZE"]).await? != nothing {
        ensure!(started.elapsed() < PATIENCE, "keys are left after {PATIENCE:?}\n{}", relay.process().log());
        tokio::time::sleep(LOOK_INTERVAL).await;
    }
    let speed = per_second(count, started.elapsed());
    relay.terminate().await?;
    Ok(speed)
}

/// Each row in a transaction of its own; nobody waits for the disk, since it is not the writers that are measured.
async fn commit_one_by_one(pool: &PgPool, count: u64) -> anyhow::Result<()> {
    let mut connection = pool.acquire().await?;
    sqlx::query("set synchronous_commit = off").execute(&mut *connection).await?;
    let each = format!(
        "do $$ begin for number in 0..{} loop
            update profiles set n = n + 1 where id = number; commit;
         end loop; end $$",
        count - 1
    );
    sqlx::raw_sql(AssertSqlSafe(each)).execute(&mut *connection).await?;
    sqlx::query("reset synchronous_commit").execute(&mut *connection).await?;
    Ok(())
}

/// What the server manages when nobody has to read it: decoding the same log into nothing.
async fn decoded(pool: &PgPool, count: u64) -> anyhow::Result<f64> {
    let started = Instant::now();
    sqlx::query(
        "select count(*) from pg_logical_slot_get_binary_changes('bare', null, null, 'proto_version', '1',
            'publication_names', 'outbox_relay')",
    )
    .execute(pool)
    .await?;
    let speed = per_second(count, started.elapsed());
    sqlx::query("select pg_drop_replication_slot('bare')").execute(pool).await?;
    Ok(speed)
}
