use chrono::Utc;
use event::nats::STREAM;
use outbox::{backlog, dead_letters, republication};
use service::Report;
use sqlx::PgPool;

use super::slot::describe;
use super::{Looked, look_at_stream};
use crate::config::{Config, Source};

/// Counting stops here; a larger backlog is shown as "more than".
const COUNT_LIMIT: i64 = 1_000_000;

/// Prints backlog, rate, dead letters and stream.
pub(super) async fn print(pool: &PgPool, config: &Config) -> anyhow::Result<()> {
    let waiting = backlog::measure(pool, COUNT_LIMIT).await?;
    let more = if waiting.events == COUNT_LIMIT { "more than " } else { "" };
    println!("backlog       {more}{} events, oldest {:.1} s", waiting.events, waiting.oldest_age_seconds());
    let rate = backlog::throughput(pool).await?;
    println!(
        "last minute   {:.1} events/s in {:.1} messages/s{}",
        rate.events_per_second,
        rate.messages_per_second,
        if config.retention().is_none() { " (unknown: retention is off)" } else { "" }
    );
    if let Some(last) = rate.last_published_at {
        println!("last publish  {:.1} s ago", seconds(Utc::now() - last));
    }
    if let Some(remaining) = republication::remaining(pool).await? {
        println!("republishing  about {remaining} retained messages are still to be published again");
    }
    println!("dead letters  {}", dead_letters::count(pool).await?);
    let slot = wal::slot::find(pool, &config.capture.slot).await?;
    if slot.is_some() || config.capture.has(Source::Wal) {
        println!("slot          {}", describe(&config.capture.slot, slot.as_ref()));
    }
    match look_at_stream(config).await {
        Ok((_, None)) => println!("stream        {STREAM} does not exist; a relay creates it when it runs"),
        Ok((_, Some(Looked { info, .. }))) => println!(
            "stream        {} holds {} messages, {:.1} MB, sequences {} to {}, {} consumers",
            info.config.name,
            info.state.messages,
            megabytes(info.state.bytes),
            info.state.first_sequence,
            info.state.last_sequence,
            info.state.consumer_count,
        ),
        Err(error) => println!("stream        not reachable: {}", Report::of(error.as_ref())),
    }
    Ok(())
}

fn seconds(time: chrono::TimeDelta) -> f64 {
    time.to_std().unwrap_or_default().as_secs_f64()
}

#[expect(clippy::cast_precision_loss, reason = "shown with one decimal")]
fn megabytes(bytes: u64) -> f64 {
    bytes as f64 / 1e6
}
