//! A change that no service knows about, found in the write-ahead log.

use crate::demo::stage::{PATIENCE, Stage, key};
use crate::demo::timeline::{Timeline, Zero};

const HEDY: i32 = 11;

const RULES: &str =
    "[[table]]\nname = \"users\"\nkeys = [\"user:{id}:profile\"]\non_truncate = [\"user:\"]\n";

/// Plays it.
pub async fn play(timeline: &mut Timeline, stage: &Stage) -> anyhow::Result<()> {
    timeline.scene("Nobody enqueues anything: an UPDATE by hand, found in the write-ahead log");
    let rules = stage.ground.stack.directory().path().join("rules.toml");
    std::fs::write(&rules, RULES)?;
    let reader = stage
        .ground
        .spawn_relay(&[("RELAY_SOURCE", "wal".to_owned()), ("RELAY_RULES", rules.display().to_string())])?;
    reader.until_ready().await?;
    stage.fill(HEDY, "Hedy").await?;
    let before = stage.deletions.deletions(&key(HEDY)).len();
    let update = format!("update users set name = 'Hedy Lamarr' where id = {HEDY}");
    stage.ground.stack.postgres.query(&update).await?;
    let at = Zero::now();
    timeline.step(0.0, "psql", &update);
    let deleted = stage.deletions.next_deletion(&key(HEDY), before, PATIENCE).await?;
    timeline.step(at.until(deleted), "delete", "the key is gone from Redis, by a rule of four lines");
    timeline.check(stage.cached(HEDY).await?.is_none(), "no code path can be forgotten")?;
    // Without a reader the slot would keep log for ever.
    reader.terminate().await?;
    stage.ground.stack.postgres.query("select pg_drop_replication_slot('outbox_relay')").await?;
    Ok(())
}
