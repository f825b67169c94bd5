//! A transaction that changes a million rows.

use std::time::{Duration, Instant};

use anyhow::ensure;

use super::{create_profiles, reader};
use crate::bench::drain::Memory;
use crate::bench::figures::Figure;
use crate::bench::numbers::{grouped, mebibytes};
use crate::bench::{Scale, events, progress, surroundings};
use crate::pair::Ground;
use crate::programs::Programs;
use crate::resp::Connection;

const PATIENCE: Duration = Duration::from_secs(180);

const LOOK_INTERVAL: Duration = Duration::from_millis(5);

const TARGET_BYTES: u64 = 60 << 20;

pub(super) async fn measure(programs: &Programs, scale: Scale) -> anyhow::Result<Figure> {
    let count = scale.pick(1_000_000, 20_000);
    let ground = Ground::start(programs, surroundings::options()).await?;
    ground.migrate().await?;
    create_profiles(&ground.pool, count - 1).await?;
    let (relay, subscriber) = ground.spawn_pair().await?;
    relay.terminate().await?;
    let relay = reader(&ground)?;
    relay.until_ready().await?;
    let mut redis = Connection::open(ground.stack.redis.address()).await?;
    let nothing = redis.command(&["DBSIZE"]).await?;
    events::fill(&mut redis, 0..count).await?;

    let mut memory = Memory::default();
    let pool = ground.pool.clone();
    let writing = tokio::spawn(async move {
        sqlx::query("update profiles set n = n + 1").execute(&pool).await.map(|_| Instant::now())
    });
    let started = Instant::now();
    while !writing.is_finished() || redis.command(&["DBSIZE"]).await? != nothing {
        memory.sample(relay.process());
        ensure!(started.elapsed() < PATIENCE, "keys are left after {PATIENCE:?}\n{}", relay.process().log());
        tokio::time::sleep(LOOK_INTERVAL).await;
    }
    let after = writing.await??.elapsed().as_secs_f64();
    drop(subscriber);
    let measured = format!("{}, the last key gone {after:.1} s after the commit", mebibytes(memory.max()));
    progress(&measured);
    let name = format!("Memory of the relay (RSS) in a transaction of {} rows", grouped(count));
    Ok(Figure::new(name, measured, "the rows are streamed before the commit; only their keys are kept")
        .with_target("≤ 60 MiB", memory.max() <= TARGET_BYTES))
}
