//! Write-ahead log and dead tuples.

use std::time::Duration;

use super::figures::Figure;
use super::latency::create_accounts;
use super::numbers::grouped;
use super::writers::{Extra, transactions};
use super::{Scale, progress, surroundings};
use crate::pair::Ground;
use crate::programs::Programs;

/// How long the last event may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// Statistics arrive a moment later.
const STATISTICS: Duration = Duration::from_millis(1_500);

/// Measures it.
pub async fn measure(programs: &Programs, scale: Scale) -> anyhow::Result<Vec<Figure>> {
    let count = scale.pick(40_000, 4_000);
    let ground = Ground::start(programs, surroundings::options()).await?;
    ground.migrate().await?;
    create_accounts(&ground.pool).await?;
    // The first change of a page after a checkpoint logs the whole page; that is not what an event costs.
    transactions(&ground.stack.postgres_url(), count / 2, Extra::Enqueue).await?;

    let plain =
        logged(&ground, async || transactions(&ground.stack.postgres_url(), count, Extra::Nothing).await)
            .await?;
    let with_event =
        logged(&ground, async || transactions(&ground.stack.postgres_url(), count, Extra::Enqueue).await)
            .await?;
    let dead_before = dead(&ground).await?;
    let events = count + count / 2;
    let relayed = logged(&ground, async || relay_all(&ground).await).await?;
    tokio::time::sleep(STATISTICS).await;
    let dead = dead(&ground).await? - dead_before;
    progress(&format!(
        "WAL bytes: update {plain}, with an event {with_event}; to relay {events} events {relayed}; {dead} dead"
    ));

    let per = |bytes: i64, number: u64| anyhow::Ok(grouped(u64::try_from(bytes.max(0))? / number));
    Ok(vec![
        Figure::new(
            "Write-ahead log that an event adds to the writer's transaction",
            format!("{} bytes", per(with_event - plain, count)?),
            format!("the update itself {} bytes", per(plain, count)?),
        ),
        Figure::new(
            "Write-ahead log to claim, settle and retain an event, out of a backlog",
            format!("{} bytes", per(relayed, events)?),
            format!(
                "together {} times the update itself",
                times(with_event - plain, plain, relayed, count, events)
            ),
        ),
        Figure::new(
            "Dead tuples per event, in all tables of the outbox",
            format!("{:.2}", f64::from(i32::try_from(dead)?) / f64::from(u32::try_from(events)?)),
            "the update itself leaves 1",
        ),
    ])
}

fn times(event: i64, update: i64, relayed: i64, count: u64, events: u64) -> String {
    let each = |bytes: i64, number: u64| super::numbers::ratio(bytes.max(0).cast_unsigned(), number);
    format!("{:.1}", (each(event, count) + each(relayed, events)) / each(update, count))
}

/// Bytes of write-ahead log that come to be meanwhile.
async fn logged(ground: &Ground, work: impl AsyncFnOnce() -> anyhow::Result<()>) -> anyhow::Result<i64> {
    let position = async || {
        let position = "select (pg_current_wal_insert_lsn() - '0/0')::bigint";
        anyhow::Ok(sqlx::query_scalar::<_, i64>(position).fetch_one(&ground.pool).await?)
    };
    let before = position().await?;
    work().await?;
    Ok(position().await? - before)
}

async fn relay_all(ground: &Ground) -> anyhow::Result<()> {
    let relay = ground.spawn_relay(&[])?;
    ground.until_outbox_empty(PATIENCE).await?;
    relay.terminate().await
}

/// Tuples that were deleted or replaced so far in the schema of the outbox.
async fn dead(ground: &Ground) -> anyhow::Result<i64> {
    let sql = "select (sum(n_tup_del) + sum(n_tup_upd))::bigint from pg_stat_all_tables where schemaname = 'outbox'";
    Ok(sqlx::query_scalar(sql).fetch_one(&ground.pool).await?)
}
