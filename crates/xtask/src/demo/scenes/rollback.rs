//! A transaction rolls back, and nothing happens.

use crate::demo::stage::{PATIENCE, Stage, key};
use crate::demo::timeline::Timeline;

const GRACE: i32 = 2;
const WITNESS: i32 = 3;

/// Plays it.
pub async fn play(timeline: &mut Timeline, stage: &Stage) -> anyhow::Result<()> {
    timeline.scene("A transaction rolls back: nothing happens");
    stage.fill(GRACE, "Grace").await?;
    stage.fill(WITNESS, "Barbara").await?;
    let at = stage.roll_back(GRACE, "Grace Hopper").await?;
    timeline.step(0.0, "ROLLBACK", &format!("{} had been enqueued", key(GRACE)));
    // What commits later goes through the same relay and stream: once it is through, the other would be as well.
    let committed = stage.commit(WITNESS, "Barbara Liskov").await?;
    timeline.step(at.until(committed.enqueued), "COMMIT", &format!("another transaction, {}", key(WITNESS)));
    let deleted = stage.deletions.next_deletion(&key(WITNESS), 0, PATIENCE).await?;
    timeline.step(at.until(deleted), "delete", &format!("{} is gone from Redis", key(WITNESS)));
    let kept = stage.cached(GRACE).await?.is_some() && stage.deletions.deletions(&key(GRACE)).is_empty();
    timeline.check(kept, &format!("{} is still cached, and was never touched", key(GRACE)))
}
