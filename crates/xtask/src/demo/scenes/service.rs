//! A service reads through the cache, and writes in both modes.

use crate::demo::service::Mode;
use crate::demo::stage::{Stage, key};
use crate::demo::timeline::{Timeline, Zero, spoken};

const MARGARET: i32 = 9;

/// How many more strict writes are checked.
const MORE: u32 = 200;

/// Plays it.
pub async fn play(timeline: &mut Timeline, stage: &Stage) -> anyhow::Result<()> {
    timeline.scene("The example service over HTTP: read through the cache, write in both modes");
    let service = &stage.service;
    let at = Zero::now();
    // No write comes before: its event could delete between the reads what the first one fills.
    let was_cached = stage.cached(MARGARET).await?.is_some();
    let miss = read(timeline, stage, at, "a miss: loaded, and filled under a lease").await?;
    let is_cached = stage.cached(MARGARET).await?.is_some();
    let hit = read(timeline, stage, at, "a hit: one plain GET in Redis").await?;
    let both = [miss, hit].iter().all(|name| *name == format!("user {MARGARET}"));
    timeline
        .check(!was_cached && is_cached && both, &format!("{} is cached by the first read", key(MARGARET)))?;

    for (mode, name, what) in [
        (Mode::Strict, "Margaret Hamilton", "strict: mark, COMMIT, unmark"),
        (Mode::Default, "M. H. Hamilton", "default: COMMIT, then delete; the event would repeat it"),
    ] {
        service.rename(MARGARET, name, mode).await?;
        timeline.step(at.elapsed(), "PUT", &format!("name = '{name}', {what}"));
        let found = read(timeline, stage, at, "a miss again").await?;
        timeline.check(found == name, &format!("the read after it finds '{name}'"))?;
    }
    more(timeline, stage).await
}

async fn read(timeline: &Timeline, stage: &Stage, at: Zero, what: &str) -> anyhow::Result<String> {
    let before = at.elapsed();
    let name = stage.service.name(MARGARET).await?;
    let took = spoken(at.elapsed() - before);
    timeline.step(at.elapsed(), "GET", &format!("'{name}' in {took}, {what}"));
    Ok(name)
}

async fn more(timeline: &mut Timeline, stage: &Stage) -> anyhow::Result<()> {
    let mut fresh = 0;
    for number in 0..MORE {
        let name = format!("Margaret {number}");
        stage.service.rename(MARGARET, &name, Mode::Strict).await?;
        fresh += u32::from(stage.service.name(MARGARET).await? == name);
    }
    timeline.check(
        fresh == MORE,
        &format!("{MORE} more strict writes: every read straight after one finds the new name"),
    )
}
