//! Without the Rust crate: plain SQL, as psql or any other language sends it.

use crate::demo::stage::{PATIENCE, Stage, key};
use crate::demo::timeline::{Timeline, Zero};

const RADIA: i32 = 7;
const LESLIE: i32 = 8;

/// Plays it.
pub async fn play(timeline: &mut Timeline, stage: &Stage) -> anyhow::Result<()> {
    timeline.scene("Any language: plain SQL, here as psql sends it");
    stage.fill(RADIA, "Radia").await?;
    stage.fill(LESLIE, "Leslie").await?;
    let enqueue = format!("select outbox.enqueue(array['{}', '{}'])", key(RADIA), key(LESLIE));
    let update = format!("update users set name = upper(name) where id in ({RADIA}, {LESLIE})");
    stage.ground.stack.postgres.query(&format!("begin; {update}; {enqueue}; commit")).await?;
    let at = Zero::now();
    timeline.step(0.0, "SQL", &format!("begin; {update};"));
    timeline.step(0.0, "", &format!("{enqueue}; commit"));
    let first = stage.deletions.next_deletion(&key(RADIA), 0, PATIENCE).await?;
    let second = stage.deletions.next_deletion(&key(LESLIE), 0, PATIENCE).await?;
    timeline.step(at.until(first.max(second)), "delete", "both keys are gone from Redis");
    let gone = stage.cached(RADIA).await?.is_none() && stage.cached(LESLIE).await?.is_none();
    timeline.check(gone, "one event, two keys, no library")
}
