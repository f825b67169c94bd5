//! One open-loop run: transactions begin when they are due, whether the earlier ones are done or not.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::ensure;
use futures::future::try_join_all;
use outbox::Event;
use sqlx::{Connection as _, PgConnection, PgPool};

use crate::bench::events;
use crate::bench::numbers::per_second;
use crate::bench::percentiles::Delays;
use crate::observer::Observer;
use crate::pair::Ground;
use crate::resp::Connection;
use crate::wait;

/// Rows of the table that is written to.
pub const ACCOUNTS: i32 = 10_000;

/// Transactions that may be open at the same time.
const WRITERS: usize = 16;

/// How long the last deletion may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// Who deletes the key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// The pair, told by an event in the transaction.
    Outbox,
    /// The pair, which reads the write-ahead log.
    Log,
    /// The service, after its commit.
    Plain,
}

/// What came out.
#[derive(Debug)]
pub struct Outcome {
    /// From the return of COMMIT to the news of the deletion.
    pub delays: Delays,
    /// Transactions a second that were reached.
    pub per_second: f64,
}

/// Times of every transaction in microseconds after the start, 0 before they are known.
#[derive(Debug)]
struct Times {
    zero: Instant,
    committed: Vec<AtomicU64>,
    deleted: Vec<AtomicU64>,
}

/// Creates the table that is written to.
pub async fn create_accounts(pool: &PgPool) -> anyhow::Result<()> {
    sqlx::query("create table accounts (id integer primary key, balance bigint not null default 0)")
        .execute(pool)
        .await?;
    sqlx::query("insert into accounts select n from generate_series(1, $1) n")
        .bind(ACCOUNTS)
        .execute(pool)
        .await?;
    sqlx::query("vacuum analyze accounts").execute(pool).await?;
    Ok(())
}

/// Plays `rate` transactions a second for `duration`.
pub async fn play(ground: &Ground, way: Way, rate: u64, duration: Duration) -> anyhow::Result<Outcome> {
    let count = rate * duration.as_secs();
    let redis = ground.stack.redis.address();
    events::fill(&mut Connection::open(redis).await?, 0..count).await?;
    let mut writers = Vec::new();
    for _ in 0..WRITERS {
        let postgres = PgConnection::connect(&ground.stack.postgres_url()).await?;
        writers.push(Writer { postgres, redis: Connection::open(redis).await?, way });
    }

    let times = Arc::new(Times::new(count));
    let of_observer = Arc::clone(&times);
    let _observer = Observer::start(redis, move |key, at| of_observer.saw_deletion(key, at)).await?;
    let next = AtomicU64::new(0);
    let work = writers.iter_mut().map(|writer| writer.write(&times, &next, rate));
    try_join_all(work).await?;
    let per_second = per_second(count, times.zero.elapsed());
    wait::until("every key is deleted", PATIENCE, async || Ok(times.all_deleted().then_some(()))).await?;
    Ok(Outcome { delays: times.delays()?, per_second })
}

/// One connection of the service.
struct Writer {
    postgres: PgConnection,
    redis: Connection,
    way: Way,
}

impl Writer {
    async fn write(&mut self, times: &Times, next: &AtomicU64, rate: u64) -> anyhow::Result<()> {
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            let Some(committed) = times.committed.get(usize::try_from(number)?) else { return Ok(()) };
            let due = times.zero + Duration::from_secs(number) / u32::try_from(rate)?;
            tokio::time::sleep_until(due.into()).await;
            self.transact(number).await?;
            committed.store(times.microseconds(Instant::now()), Ordering::Relaxed);
            if self.way == Way::Plain {
                self.redis.command(&["UNLINK", &events::key(number)]).await?;
            }
        }
    }

    async fn transact(&mut self, number: u64) -> anyhow::Result<()> {
        if self.way == Way::Log {
            let mut tx = self.postgres.begin().await?;
            sqlx::query("update profiles set n = n + 1 where id = $1")
                .bind(i64::try_from(number)?)
                .execute(&mut *tx)
                .await?;
            return Ok(tx.commit().await?);
        }
        let mut tx = self.postgres.begin().await?;
        sqlx::query("update accounts set balance = balance + 1 where id = $1")
            .bind(1 + i32::try_from(number % u64::from(ACCOUNTS.cast_unsigned()))?)
            .execute(&mut *tx)
            .await?;
        if self.way == Way::Outbox {
            outbox::enqueue(&mut tx, &Event::delete([events::key(number)])?).await?;
        }
        Ok(tx.commit().await?)
    }
}

impl Times {
    fn new(count: u64) -> Self {
        let unknown = || (0..count).map(|_| AtomicU64::new(0)).collect();
        Self { zero: Instant::now(), committed: unknown(), deleted: unknown() }
    }

    fn microseconds(&self, at: Instant) -> u64 {
        u64::try_from(at.saturating_duration_since(self.zero).as_micros()).unwrap_or(u64::MAX).max(1)
    }

    fn saw_deletion(&self, key: &str, at: Instant) {
        let number = key.strip_prefix("user:").and_then(|rest| rest.strip_suffix(":profile"));
        let number = number.and_then(|number| number.parse::<usize>().ok());
        if let Some(deleted) = number.and_then(|number| self.deleted.get(number)) {
            deleted.store(self.microseconds(at), Ordering::Relaxed);
        }
    }

    fn all_deleted(&self) -> bool {
        self.deleted.iter().all(|deleted| deleted.load(Ordering::Relaxed) > 0)
    }

    fn delays(&self) -> anyhow::Result<Delays> {
        let mut delays = Delays::new();
        for (committed, deleted) in self.committed.iter().zip(&self.deleted) {
            let (committed, deleted) = (committed.load(Ordering::Relaxed), deleted.load(Ordering::Relaxed));
            ensure!(committed > 0, "a transaction has not committed");
            // The key may be gone before the service hears that its commit is done.
            delays.record(Duration::from_micros(deleted.saturating_sub(committed)));
        }
        Ok(delays)
    }
}
