//! Changes rows, in the mode's way.

use std::sync::Arc;
use std::time::Duration;

use outbox::{CommitError, CommitLimits, Event, Marks, Writer};
use rand::Rng;
use rand::rngs::StdRng;
use sqlx::{Postgres, Transaction};
use tokio::time::timeout;

use super::child::Shared;
use super::clock::now_ns;
use super::mode::Mode;
use super::plain::Plain;
use super::record::{Kind, Record};
use super::rows;

/// Longest pause between two writes of a task.
const LONGEST_PAUSE_MS: u64 = 60;

/// A write that takes longer is given up, wherever it is.
const PATIENCE: Duration = Duration::from_secs(8);

const LIMITS: CommitLimits = CommitLimits {
    database: Duration::from_secs(3),
    mark: Duration::from_secs(1),
    finish: Duration::from_millis(500),
};

/// How long an updated value may be served.
const TTL: Duration = Duration::from_secs(4);

/// One of so many writes changes two rows; of the others one of so many enqueues the new value instead of a delete.
const TWO_EVERY: u32 = 4;
const UPDATE_EVERY: u32 = 3;

/// One of so many is rolled back; one of so many is refused by the database at the commit.
const ROLL_BACK_EVERY: u32 = 20;
const REFUSED_EVERY: u32 = 20;

/// One of so many is given up halfway, if asked for.
const CANCEL_EVERY: u32 = 25;
const CANCEL_WITHIN_MS: u64 = 6;

/// How late a commit without marks removes the values.
const UNMARKED_PAUSE: Duration = Duration::from_millis(5);

/// What a write is going to be.
#[derive(Debug, Clone)]
struct Plan {
    /// In the order in which their locks are taken.
    rows: Vec<u32>,
    updates: bool,
    rolls_back: bool,
    is_refused: bool,
    inline: bool,
}

/// Why a write was not acknowledged.
#[derive(Debug)]
enum Failure {
    RolledBack,
    Unknown,
}

impl Failure {
    /// What the service that commits by itself makes of an answer to `COMMIT`.
    fn of_commit(error: sqlx::Error) -> Self {
        match error {
            sqlx::Error::Database(_) => Self::RolledBack,
            _ => Self::Unknown,
        }
    }
}

impl From<sqlx::Error> for Failure {
    fn from(_: sqlx::Error) -> Self {
        Self::RolledBack
    }
}

impl From<CommitError> for Failure {
    fn from(error: CommitError) -> Self {
        if error.is_rolled_back() { Self::RolledBack } else { Self::Unknown }
    }
}

/// One task: writes, until the process is told to end.
pub async fn run(shared: Arc<Shared>, mut random: StdRng) -> anyhow::Result<()> {
    let mut plain = Plain::new(&shared.arguments.redis);
    let writer = Writer::with_limits(shared.redis.clone(), LIMITS);
    while !shared.is_stopping() {
        let plan = Plan::new(shared.arguments.rows, &mut random);
        let gives_up = shared.arguments.cancel && random.random_ratio(1, CANCEL_EVERY);
        let patience = match gives_up {
            true => Duration::from_millis(random.random_range(0..=CANCEL_WITHIN_MS)),
            false => PATIENCE,
        };
        let began_ns = now_ns();
        let write = write(&shared, &writer, &mut plain, &plan);
        let outcome = timeout(patience, write).await.unwrap_or(Err(Failure::Unknown));
        let ended_ns = now_ns();
        let record = |kind, row, version: i64| Record {
            kind,
            row,
            version: version.cast_unsigned(),
            began_ns,
            ended_ns,
        };
        let records: Vec<Record> = match outcome {
            Ok(versions) => plan
                .rows
                .iter()
                .zip(versions)
                .map(|(row, version)| record(Kind::Committed, *row, version))
                .collect(),
            Err(Failure::RolledBack) => vec![record(Kind::RolledBack, plan.rows[0], 0)],
            Err(Failure::Unknown) => vec![record(Kind::Unknown, plan.rows[0], 0)],
        };
        shared.log.add(&records)?;
        // Not held back: what is acknowledged here is what readers must see.
        shared.log.flush()?;
        tokio::time::sleep(Duration::from_millis(random.random_range(1..=LONGEST_PAUSE_MS))).await;
    }
    Ok(())
}

impl Plan {
    fn new(count: u32, random: &mut StdRng) -> Self {
        let mut rows = vec![rows::pick(count, random)];
        if random.random_ratio(1, TWO_EVERY) {
            rows.push(rows::pick(count, random));
            rows.sort_unstable();
            rows.dedup();
        }
        Self {
            updates: rows.len() == 1 && random.random_ratio(1, UPDATE_EVERY),
            rolls_back: random.random_ratio(1, ROLL_BACK_EVERY),
            is_refused: random.random_ratio(1, REFUSED_EVERY),
            inline: random.random_ratio(1, 2),
            rows,
        }
    }

    fn events(&self, versions: &[i64]) -> Vec<Event> {
        let keys = self.rows.iter().map(|row| rows::key(*row));
        let event = match (self.updates, versions) {
            (true, [version]) => Event::update(rows::key(self.rows[0]), version.to_string(), *version, TTL),
            _ => Event::delete(keys),
        };
        vec![event.expect("keys, values and versions are small and good")]
    }
}

/// The versions that were committed.
async fn write(
    shared: &Shared,
    writer: &Writer,
    plain: &mut Plain,
    plan: &Plan,
) -> Result<Vec<i64>, Failure> {
    let mut tx = shared.pool.begin().await?;
    let mut versions = Vec::new();
    for row in &plan.rows {
        versions.push(rows::change(&mut tx, *row).await?);
    }
    if plan.rolls_back {
        tx.rollback().await?;
        return Err(Failure::RolledBack);
    }
    if plan.is_refused {
        rows::spoil(&mut tx).await?;
    }
    let events = plan.events(&versions);
    match shared.arguments.mode {
        Mode::Strict => writer.commit_strict(tx, &events).await.map(drop)?,
        Mode::Default if plan.inline => writer.commit_and_invalidate(tx, &events).await.map(drop)?,
        Mode::Default => enqueue(tx, &events).await?,
        Mode::Naive => naive(tx, plain, &plan.rows).await?,
        Mode::Unmarked => unmarked(shared, tx, &events).await?,
    }
    Ok(versions)
}

/// The event alone tells the cache.
async fn enqueue(mut tx: Transaction<'_, Postgres>, events: &[Event]) -> Result<(), Failure> {
    outbox::enqueue_all(&mut tx, events).await.map_err(|_| Failure::RolledBack)?;
    tx.commit().await.map_err(Failure::of_commit)
}

/// Cache-aside as everybody writes it first.
async fn naive(tx: Transaction<'_, Postgres>, plain: &mut Plain, rows: &[u32]) -> Result<(), Failure> {
    tx.commit().await.map_err(Failure::of_commit)?;
    for row in rows {
        plain.command(&["DEL", &rows::key(*row)]).await;
    }
    Ok(())
}

/// A strict commit without its first step, by a process that has to wait for the processor before the last one.
async fn unmarked(
    shared: &Shared,
    mut tx: Transaction<'_, Postgres>,
    events: &[Event],
) -> Result<(), Failure> {
    outbox::enqueue_all(&mut tx, events).await.map_err(|_| Failure::RolledBack)?;
    let transaction = outbox::transaction_id(&mut tx).await?;
    tx.commit().await.map_err(Failure::of_commit)?;
    tokio::time::sleep(UNMARKED_PAUSE).await;
    // A failure is left to the event.
    drop(Marks::new(shared.redis.clone(), events, transaction).remove(LIMITS.finish).await);
    Ok(())
}
