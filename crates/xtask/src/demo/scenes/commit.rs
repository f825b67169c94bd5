//! A transaction commits, and the key goes.

use crate::demo::stage::{PATIENCE, Stage, key};
use crate::demo::stream;
use crate::demo::timeline::Timeline;

const ADA: i32 = 1;

/// How many more commits are timed.
const MORE: i32 = 200;

/// Plays it.
pub async fn play(timeline: &mut Timeline, stage: &Stage) -> anyhow::Result<()> {
    timeline.scene("A transaction commits: the key it named is gone");
    stage.fill(ADA, "Ada").await?;
    let committed = stage.commit(ADA, "Ada Lovelace").await?;
    let deleted = stage.deletions.next_deletion(&key(ADA), 0, PATIENCE).await?;
    let message = stream::last_message(&stage.ground.stack.nats).await?;

    let at = committed.at;
    timeline.step(at.until(committed.began), "BEGIN", "update users set name = 'Ada Lovelace' where id = 1");
    timeline.step(at.until(committed.enqueued), "enqueue", &format!("{}, in the same transaction", key(ADA)));
    timeline.step(0.0, "COMMIT", "the change and its event are durable, together");
    timeline.step(
        at.until_wall(message.stored_at),
        "publish",
        &format!("message {} of the stream", message.seq),
    );
    timeline.step(at.until(deleted), "delete", &format!("{} is gone from Redis", key(ADA)));
    timeline.check(stage.cached(ADA).await?.is_none(), "nobody can read the old profile any more")?;
    more(timeline, stage).await
}

async fn more(timeline: &mut Timeline, stage: &Stage) -> anyhow::Result<()> {
    let mut delays = Vec::new();
    for user in 100..100 + MORE {
        delays.push(stage.commit_and_wait(user).await?);
    }
    delays.sort_by(f64::total_cmp);
    let half = delays[delays.len() / 2];
    let nearly_all = delays[delays.len() * 99 / 100];
    let text = format!(
        "{MORE} more, none forgotten: half of them gone within {half:.1} ms after the commit, 99 % within {nearly_all:.1} ms"
    );
    timeline.check(delays.len() == usize::try_from(MORE)?, &text)
}
