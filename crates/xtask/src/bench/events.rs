//! Backlogs, and the keys that go with them.

use std::ops::Range;
use std::time::{Duration, Instant};

use anyhow::Context;
use outbox::{Claim, ClaimOptions, Event};
use sqlx::{PgPool, Postgres, Transaction};

use crate::resp::Connection;

/// Events in one statement.
const STATEMENT_EVENTS: u64 = 5_000;

/// Names in one Redis command.
const COMMAND_NAMES: u64 = 1_000;

/// Rows in one claim, as the relay's default.
const CLAIM_ROWS: i64 = 2_000;

/// Bytes in one claim, as the relay has it.
const CLAIM_BYTES: i64 = 4 << 20;

/// Longer than any claim here takes.
const LEASE: Duration = Duration::from_secs(60);

/// The key of the event with this number.
pub fn key(number: u64) -> String {
    format!("user:{number}:profile")
}

/// Commits events of one key each, some thousands in a transaction.
pub async fn enqueue(pool: &PgPool, numbers: Range<u64>) -> anyhow::Result<()> {
    for some in chunks(numbers, STATEMENT_EVENTS) {
        let mut tx = pool.begin().await?;
        enqueue_in(&mut tx, some).await?;
        tx.commit().await?;
    }
    Ok(())
}

/// The same in a transaction that is already open.
pub async fn enqueue_in(tx: &mut Transaction<'_, Postgres>, numbers: Range<u64>) -> anyhow::Result<()> {
    for some in chunks(numbers, STATEMENT_EVENTS) {
        let events: Vec<Event> = some.map(|number| Event::delete([key(number)])).collect::<Result<_, _>>()?;
        outbox::enqueue_all(tx, &events).await?;
    }
    Ok(())
}

/// Puts a value at the key of each event.
pub async fn fill(redis: &mut Connection, numbers: Range<u64>) -> anyhow::Result<()> {
    for some in chunks(numbers, COMMAND_NAMES) {
        let keys: Vec<String> = some.map(key).collect();
        let words = keys.iter().flat_map(|key| [key.as_str(), "{\"name\":\"Ada Lovelace\"}"]);
        redis.queue(&["MSET"].into_iter().chain(words).collect::<Vec<_>>());
        redis.drain().await?;
    }
    Ok(())
}

/// Deletes the keys of events as fast as Redis can, and says how long that took.
pub async fn unlink(redis: &mut Connection, numbers: Range<u64>) -> anyhow::Result<Duration> {
    let keys: Vec<String> = numbers.map(key).collect();
    let commands: Vec<Vec<&str>> = keys
        .chunks(usize::try_from(COMMAND_NAMES)?)
        .map(|names| ["UNLINK"].into_iter().chain(names.iter().map(String::as_str)).collect())
        .collect();
    let started = Instant::now();
    for some in commands.chunks(8) {
        some.iter().for_each(|command| redis.queue(command));
        redis.drain().await?;
    }
    Ok(started.elapsed())
}

/// How to claim by hand, from `from_seq` on.
pub fn claim_options(from_seq: i64) -> ClaimOptions {
    ClaimOptions { limit: CLAIM_ROWS, max_bytes: CLAIM_BYTES, from_seq, prepared: true }
}

/// Claims from `from_seq` on, settles, and returns how many rows there were and the `seq` behind the last one.
pub async fn claim(pool: &PgPool, from_seq: i64) -> anyhow::Result<(u64, i64)> {
    let (claim, rows, _) = Claim::take(pool, claim_options(from_seq), LEASE).await.context("cannot claim")?;
    let next = rows.iter().map(|row| row.seq + 1).max().unwrap_or(from_seq);
    claim.settle().await?;
    Ok((rows.len().try_into()?, next))
}

/// Claims until nothing is left, without publishing anything; how many rows there were.
pub async fn claim_all(pool: &PgPool) -> anyhow::Result<u64> {
    let (mut total, mut from_seq) = (0, 0);
    loop {
        let (rows, next) = claim(pool, from_seq).await?;
        if rows == 0 {
            return Ok(total);
        }
        total += rows;
        from_seq = next;
    }
}

fn chunks(numbers: Range<u64>, size: u64) -> impl Iterator<Item = Range<u64>> {
    let end = numbers.end;
    (numbers.start..end)
        .step_by(usize::try_from(size).expect("a small number"))
        .map(move |first| first..end.min(first + size))
}
