//! NATS goes away and comes back.

use std::time::Duration;

use crate::demo::stage::{PATIENCE, Stage, key};
use crate::demo::timeline::{Timeline, spoken};

const KEN: i32 = 6;

/// Long enough to see that nothing is lost by waiting.
const OUTAGE: Duration = Duration::from_secs(2);

/// Plays it.
pub async fn play(timeline: &mut Timeline, stage: &Stage) -> anyhow::Result<()> {
    timeline.scene("NATS is down: events wait in the outbox, and writers do not notice");
    let nats = &stage.ground.stack.nats;
    stage.fill(KEN, "Ken").await?;
    nats.kill()?;
    let committed = stage.commit(KEN, "Ken Thompson").await?;
    let at = committed.at;
    timeline.trouble(at.until(committed.began), "SIGKILL", "NATS");
    timeline.step(
        0.0,
        "COMMIT",
        &format!("{}; the transaction took {}", key(KEN), spoken(-at.until(committed.began))),
    );
    let answer = stage.relay.until_not_ready().await?;
    timeline.step(at.elapsed(), "relay", &format!("not ready: {}", first_reason(&answer)));
    tokio::time::sleep(OUTAGE).await;
    let waits = stage.waiting().await? == 1 && stage.cached(KEN).await?.is_some();
    timeline.check(waits, "the event waits in the outbox")?;

    nats.start().await?;
    let back = at.elapsed();
    timeline.step(back, "start", "NATS, on the same data");
    let deleted = stage.deletions.next_deletion(&key(KEN), 0, PATIENCE).await?;
    timeline.step(at.until(deleted), "delete", &format!("{} is gone from Redis", key(KEN)));
    stage.relay.until_ready().await?;
    stage.subscriber.until_ready().await?;
    let after = spoken((at.until(deleted) - back).max(0.0));
    timeline.check(
        stage.cached(KEN).await?.is_none(),
        &format!("delivered {after} after NATS was back, nobody had to help"),
    )
}

/// The first reason among those that the components of a program give.
fn first_reason(answer: &str) -> String {
    let answer: serde_json::Value = serde_json::from_str(answer).unwrap_or_default();
    let checks = answer["checks"].as_array().into_iter().flatten();
    let reason = checks.filter_map(|check| check["reason"].as_str()).next();
    reason.unwrap_or("no reason given").to_owned()
}
