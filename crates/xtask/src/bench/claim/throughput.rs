//! How fast a running relay publishes a backlog that appears all at once.

use std::time::{Duration, Instant};

use crate::bench::numbers::{median, per_second, ratio};
use crate::bench::{Scale, events};
use crate::daemon::Daemon;
use crate::pair::Ground;
use crate::wait;

/// A relay that takes longer has stopped.
const PATIENCE: Duration = Duration::from_secs(120);

/// Long enough for the relay to have left what is dead behind it.
const SETTLE: Duration = Duration::from_secs(3);

/// Starts a relay, gives it some backlogs, each in one commit, and says how many events a second it publishes.
pub async fn measure(ground: &Ground, scale: Scale) -> anyhow::Result<f64> {
    let relay = ground.spawn_relay(&[])?;
    relay.until_ready().await?;
    ground.until_outbox_empty(PATIENCE).await?;
    tokio::time::sleep(SETTLE).await;
    let mut speeds = Vec::new();
    for _ in 0..scale.pick(3, 1) {
        speeds.push(publish(ground, &relay, scale.pick(200_000, 20_000)).await?);
    }
    relay.terminate().await?;
    Ok(median(speeds))
}

async fn publish(ground: &Ground, relay: &Daemon, count: u64) -> anyhow::Result<f64> {
    let before = relay.metric("relay_events_published_total").await?;
    let mut tx = ground.pool.begin().await?;
    events::enqueue_in(&mut tx, 0..count).await?;
    tx.commit().await?;
    let started = Instant::now();
    wait::until("the relay has published everything", PATIENCE, async || {
        let published = relay.metric("relay_events_published_total").await? - before;
        Ok((published >= ratio(count, 1)).then_some(()))
    })
    .await?;
    Ok(per_second(count, started.elapsed()))
}
