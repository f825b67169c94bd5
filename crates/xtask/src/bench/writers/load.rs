//! Writers that never pause.

use std::time::{Duration, Instant};

use futures::future::try_join_all;
use outbox::Event;
use rand::Rng;
use sqlx::{Connection, PgConnection, PgPool};

use crate::bench::latency::ACCOUNTS;
use crate::bench::numbers::per_second;
use crate::bench::percentiles::Delays;

const UPDATE: &str = "update accounts set balance = balance + 1 where id = $1";
const UPDATE_AND_ENQUEUE: &str = "
    with changed as (update accounts set balance = balance + 1 where id = $1 returning id)
    select outbox.enqueue(array['account:' || id || ':balance']) from changed";

const UPDATE_AND_INSERT: &str = "
    with changed as (update accounts set balance = balance + 1 where id = $1 returning id)
    insert into outbox.events (id, keys)
    select outbox.new_id(), array['account:' || id || ':balance'] from changed";

/// What a transaction does besides updating its row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Extra {
    /// Nothing.
    Nothing,
    /// It enqueues an event.
    Enqueue,
    /// It enqueues an event in the very statement that updates the row.
    EnqueueWithin,
    /// It inserts the row of the event itself in that statement, and leaves the checks to the relay.
    InsertWithin,
    /// It inserts a row into a table without any check, the least an outbox can do.
    BareInsert,
    /// It notifies those who listen.
    Notify,
}

/// So many writers for so long: transactions a second, and how long each took.
pub async fn play(
    url: &str,
    writers: usize,
    extra: Extra,
    duration: Duration,
) -> anyhow::Result<(f64, Delays)> {
    let mut connections = try_join_all((0..writers).map(|_| PgConnection::connect(url))).await?;
    // Statements are prepared and pages are read before it counts.
    try_join_all(connections.iter_mut().map(|connection| write(connection, extra, duration / 10))).await?;
    let started = Instant::now();
    let each =
        try_join_all(connections.iter_mut().map(|connection| write(connection, extra, duration))).await?;
    let elapsed = started.elapsed();
    let mut delays = Delays::new();
    each.iter().for_each(|of_one| delays.add(of_one));
    Ok((per_second(delays.count(), elapsed), delays))
}

/// Creates the table of [`Extra::BareInsert`].
pub async fn create_bare_table(pool: &PgPool) -> anyhow::Result<()> {
    let table = "create table bare (id bigint generated always as identity primary key, key text not null)";
    sqlx::query(table).execute(pool).await?;
    Ok(())
}

/// Empties it.
pub async fn empty_bare_table(pool: &PgPool) -> anyhow::Result<()> {
    sqlx::query("truncate bare").execute(pool).await?;
    Ok(())
}

/// So many transactions altogether, by a few writers.
pub async fn transactions(url: &str, count: u64, extra: Extra) -> anyhow::Result<()> {
    const WRITERS: u64 = 8;
    let writers = (0..WRITERS).map(async |_| {
        let mut connection = PgConnection::connect(url).await?;
        for _ in 0..count / WRITERS {
            transact(&mut connection, rand::rng().random_range(1..=ACCOUNTS), extra).await?;
        }
        anyhow::Ok(())
    });
    try_join_all(writers).await.map(drop)
}

async fn write(connection: &mut PgConnection, extra: Extra, duration: Duration) -> anyhow::Result<Delays> {
    let mut delays = Delays::new();
    let end = Instant::now() + duration;
    while Instant::now() < end {
        let account = rand::rng().random_range(1..=ACCOUNTS);
        let started = Instant::now();
        transact(connection, account, extra).await?;
        delays.record(started.elapsed());
    }
    Ok(delays)
}

async fn transact(connection: &mut PgConnection, account: i32, extra: Extra) -> anyhow::Result<()> {
    let mut tx = connection.begin().await?;
    let update = match extra {
        Extra::EnqueueWithin => UPDATE_AND_ENQUEUE,
        Extra::InsertWithin => UPDATE_AND_INSERT,
        _ => UPDATE,
    };
    sqlx::query(update).bind(account).execute(&mut *tx).await?;
    let key = format!("account:{account}:balance");
    match extra {
        Extra::Nothing | Extra::EnqueueWithin | Extra::InsertWithin => {}
        Extra::Enqueue => {
            outbox::enqueue(&mut tx, &Event::delete([key])?).await?;
        }
        Extra::BareInsert => {
            sqlx::query("insert into bare (key) values ($1) returning id")
                .bind(key)
                .fetch_one(&mut *tx)
                .await?;
        }
        Extra::Notify => {
            sqlx::query("select pg_notify('changes', $1)").bind(key).execute(&mut *tx).await?;
        }
    }
    Ok(tx.commit().await?)
}
