//! How much waits, and how fast it goes.

use chrono::{DateTime, Utc};
use sqlx::{PgPool, Row};

use crate::statement::whole;

/// Rows that wait to be published.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Backlog {
    /// How many, counted up to the limit that was asked for.
    pub events: i64,
    /// When the first of them, by `seq`, was enqueued.
    pub oldest: Option<DateTime<Utc>>,
    /// The clock of the database at that moment.
    pub now: DateTime<Utc>,
}

impl Backlog {
    /// Age of the oldest row in seconds, 0 without any.
    #[must_use]
    pub fn oldest_age_seconds(&self) -> f64 {
        let age = self.oldest.map_or(0, |oldest| (self.now - oldest).num_milliseconds().max(0));
        f64::from(u32::try_from(age).unwrap_or(u32::MAX)) / 1000.0
    }
}

/// Counts the backlog, but not further than `count_limit`: counting a million rows every few seconds would itself be
/// a load.
///
/// # Errors
/// Whatever the database says.
pub async fn measure(pool: &PgPool, count_limit: i64) -> Result<Backlog, sqlx::Error> {
    let row = whole(format!(
        "select (select count(*) from (select from outbox.events limit {count_limit}) counted),
                (select least(greatest(created_at, timestamptz 'epoch'), clock_timestamp())
                    from outbox.events order by seq limit 1),
                clock_timestamp()"
    ))
    .fetch_one(pool)
    .await?;
    Ok(Backlog { events: row.try_get(0)?, oldest: row.try_get(1)?, now: row.try_get(2)? })
}

/// What was published lately, by what is retained of it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Throughput {
    /// Events per second over the last minute.
    pub events_per_second: f64,
    /// Messages per second over the last minute.
    pub messages_per_second: f64,
    /// When the last envelope was recorded.
    pub last_published_at: Option<DateTime<Utc>>,
}

/// Reads the rate of the last minute from the retained envelopes; all zero where retention is off.
///
/// # Errors
/// Whatever the database says.
pub async fn throughput(pool: &PgPool) -> Result<Throughput, sqlx::Error> {
    let row = whole(
        "select coalesce(sum(events) filter (where recent), 0)::float8 / 60,
                count(*) filter (where recent)::float8 / 60, max(published_at)
         from (select events, published_at, published_at > clock_timestamp() - interval '1 minute' as recent
               from outbox.published) p",
    )
    .fetch_one(pool)
    .await?;
    Ok(Throughput {
        events_per_second: row.try_get(0)?,
        messages_per_second: row.try_get(1)?,
        last_published_at: row.try_get(2)?,
    })
}
