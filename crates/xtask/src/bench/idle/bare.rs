//! The least that polling can cost.

use std::time::{Duration, Instant};

use anyhow::Context;
use sqlx::{Connection, PgConnection};

use crate::pair::Ground;

/// A loop that asks Postgres for nothing, at a given rate.
pub struct BareLoop {
    /// Queries a second.
    pub per_second: f64,
    /// How long.
    pub duration: Duration,
}

impl BareLoop {
    /// Runs it in this process, which does nothing else meanwhile; the processor time it takes, in percent of a core.
    pub async fn processor_percent(&self, ground: &Ground) -> anyhow::Result<f64> {
        let mut connection = PgConnection::connect(&ground.stack.postgres_url()).await?;
        let pause = Duration::from_secs_f64(1.0 / self.per_second.max(1.0));
        let (started, before) = (Instant::now(), processor_time()?);
        while started.elapsed() < self.duration {
            sqlx::raw_sql("select 1").execute(&mut connection).await?;
            tokio::time::sleep(pause).await;
        }
        Ok((processor_time()? - before).as_secs_f64() / started.elapsed().as_secs_f64() * 100.0)
    }
}

/// Processor time of this process so far: the first field of each thread's `schedstat`, in nanoseconds.
fn processor_time() -> anyhow::Result<Duration> {
    let mut nanoseconds = 0;
    for thread in std::fs::read_dir("/proc/self/task").context("this system has no /proc")? {
        // A thread may have ended meanwhile.
        let Ok(text) = std::fs::read_to_string(thread?.path().join("schedstat")) else { continue };
        nanoseconds += text.split_whitespace().next().map_or(Ok(0), str::parse::<u64>)?;
    }
    Ok(Duration::from_nanos(nanoseconds))
}
