//! A change that no service knows about, found in the write-ahead log, and another by a trigger.

use crate::demo::stage::{PATIENCE, Stage, key};
use crate::demo::timeline::{Timeline, Zero};

const HEDY: i32 = 11;
const RADIA: i32 = 12;

const RULES: &str =
    "[[table]]\nname = \"users\"\nkeys = [\"user:{id}:profile\"]\non_truncate = [\"user:\"]\n";

const REMOVE_TRIGGERS: &str = "
    do $$ declare name text; begin
        for name in select tgname from pg_trigger where tgrelid = 'users'::regclass and not tgisinternal loop
            execute format('drop trigger %I on users', name);
        end loop;
    end $$";

/// Plays it.
pub async fn play(timeline: &mut Timeline, stage: &Stage) -> anyhow::Result<()> {
    timeline
        .scene("Nobody enqueues anything: an UPDATE by hand, found in the write-ahead log or by a trigger");
    let rules = stage.ground.stack.directory().path().join("rules.toml");
    std::fs::write(&rules, RULES)?;
    let rules = rules.display().to_string();
    let variables = [("RELAY_SOURCE", "wal".to_owned()), ("RELAY_RULES", rules.clone())];
    let reader = stage.ground.spawn_relay(&variables)?;
    reader.until_ready().await?;
    update_by_hand(timeline, stage, HEDY, "Hedy Lamarr").await?;
    // Without a reader the slot would keep log for ever.
    reader.terminate().await?;
    stage.ground.stack.postgres.query("select pg_drop_replication_slot('outbox_relay')").await?;

    stage.ground.administer(&["rules", "apply", "--rules", &rules]).await?;
    timeline.setup("relay", "rules apply: the same four lines, now as triggers");
    update_by_hand(timeline, stage, RADIA, "Radia Perlman").await?;
    // The other scenes are to show what happens without them.
    stage.ground.stack.postgres.query(REMOVE_TRIGGERS).await?;
    Ok(())
}

async fn update_by_hand(timeline: &mut Timeline, stage: &Stage, user: i32, name: &str) -> anyhow::Result<()> {
    stage.fill(user, "before").await?;
    let before = stage.deletions.deletions(&key(user)).len();
    let update = format!("update users set name = '{name}' where id = {user}");
    stage.ground.stack.postgres.query(&update).await?;
    let at = Zero::now();
    timeline.step(0.0, "psql", &update);
    let deleted = stage.deletions.next_deletion(&key(user), before, PATIENCE).await?;
    timeline.step(at.until(deleted), "delete", "the key is gone from Redis, by a rule of four lines");
    timeline.check(stage.cached(user).await?.is_none(), "no code path can be forgotten")
}
