//! The relay is killed at the two worst moments.

use std::os::unix::process::ExitStatusExt;

use anyhow::ensure;

use crate::daemon::Daemon;
use crate::demo::stage::{Committed, PATIENCE, Stage, key};
use crate::demo::stream;
use crate::demo::timeline::{Timeline, Zero};

const EDSGER: i32 = 4;
const WITNESS: i32 = 5;
const SIGKILL: i32 = 9;

/// Plays it.
pub async fn play(timeline: &mut Timeline, stage: &mut Stage) -> anyhow::Result<()> {
    timeline.scene("The relay is killed twice with the event in hand: delivered all the same, once");
    stage.relay.terminate().await?;
    stage.fill(EDSGER, "Edsger").await?;
    let before = stream::messages(&stage.ground.stack.nats).await?;

    let doomed = armed(stage, "relay.after_claim")?;
    doomed.until_ready().await?;
    let committed = stage.commit(EDSGER, "Edsger Dijkstra").await?;
    timeline.step(0.0, "COMMIT", &key(EDSGER));
    let at = committed.at;
    die(timeline, at, &doomed, "with the row claimed, before it publishes").await?;
    let waits = stage.waiting().await? == 1 && stage.cached(EDSGER).await?.is_some();
    timeline.check(waits, "Postgres freed the row when the relay died: the event waits in the outbox")?;

    published_but_not_settled(timeline, stage, committed).await?;
    recover(timeline, stage, at, before).await
}

async fn published_but_not_settled(
    timeline: &mut Timeline,
    stage: &Stage,
    committed: Committed,
) -> anyhow::Result<()> {
    let doomed = armed(stage, "relay.after_publish")?;
    timeline.step(committed.at.elapsed(), "start", "a new relay");
    // What it published is on its way; who is first, the death or the deletion, is anybody's guess.
    let deleted = stage.deletions.next_deletion(&key(EDSGER), 0, PATIENCE).await?;
    timeline.step(committed.at.until(deleted), "delete", &format!("{} is gone from Redis", key(EDSGER)));
    die(timeline, committed.at, &doomed, "having published, before its claim commits").await?;
    timeline.check(
        stage.waiting().await? == 1,
        "the event is back in the outbox: nobody recorded that it was published",
    )
}

async fn recover(timeline: &mut Timeline, stage: &mut Stage, at: Zero, before: u64) -> anyhow::Result<()> {
    stage.fill(EDSGER, "Edsger Dijkstra").await?;
    timeline.step(at.elapsed(), "fill", "a reader caches the new profile");
    timeline.step(at.elapsed(), "start", "a new relay, which publishes the event again under the same id");
    stage.relay = stage.ground.spawn_relay(&[])?;
    stage.relay.until_ready().await?;
    stage.ground.until_outbox_empty(PATIENCE).await?;
    let messages = stream::messages(&stage.ground.stack.nats).await? - before;
    timeline
        .check(messages == 1, "the stream recognised the duplicate: one event, two deaths, one message")?;
    stage.commit_and_wait(WITNESS).await?;
    let once = stage.deletions.deletions(&key(EDSGER)).len() == 1 && stage.cached(EDSGER).await?.is_some();
    timeline.check(once, "the key was deleted once; the new profile is still cached")
}

/// A relay that kills itself at a failpoint.
fn armed(stage: &Stage, failpoint: &str) -> anyhow::Result<Daemon> {
    stage.ground.spawn_relay(&[("FAILPOINTS", format!("{failpoint}=kill"))])
}

async fn die(timeline: &Timeline, at: Zero, doomed: &Daemon, when: &str) -> anyhow::Result<()> {
    let status = doomed.process().wait_exit(PATIENCE).await?;
    ensure!(status.signal() == Some(SIGKILL), "the relay should have been killed, but ended with {status}");
    timeline.trouble(at.elapsed(), "SIGKILL", &format!("the relay dies {when}"));
    Ok(())
}
