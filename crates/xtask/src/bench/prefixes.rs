//! Single keys, while the cache is searched for namespaces.

use std::time::Duration;

use outbox::Event;
use tokio::time::{MissedTickBehavior, interval};

use super::figures::Figure;
use super::latency::{Way, create_accounts, play};
use super::numbers::grouped;
use super::{Scale, progress, surroundings};
use crate::observer;
use crate::pair::Ground;
use crate::programs::Programs;
use crate::resp::Connection;

/// Transactions a second, each with one key.
const RATE: u64 = 100;

/// How often an event names namespaces: more often than a search ends, so that there is always one.
const EVERY: Duration = Duration::from_millis(500);

/// Namespaces of an event.
const NAMESPACES: usize = 5;

/// Keys per step of filling the cache.
const STEP: u64 = 100_000;

const TARGET_P99_MS: f64 = 50.0;

/// Measures it.
pub async fn measure(programs: &Programs, scale: Scale) -> anyhow::Result<Vec<Figure>> {
    let mut options = surroundings::options();
    options.redis.configuration = observer::CONFIGURATION.to_owned();
    let ground = Ground::start(programs, options).await?;
    ground.migrate().await?;
    create_accounts(&ground.pool).await?;
    let (_relay, subscriber) = ground.spawn_pair().await?;
    let (foreign, duration) =
        (scale.pick(5_000_000, 50_000), scale.pick(Duration::from_secs(20), Duration::from_secs(2)));
    fill(&ground, foreign).await?;
    play(&ground, Way::Outbox, RATE, Duration::from_secs(1)).await?;
    let alone = play(&ground, Way::Outbox, RATE, duration).await?.delays;
    progress(&format!("without a search: {}", alone.long()));
    let during = tokio::select! {
        during = play(&ground, Way::Outbox, RATE, duration) => during?.delays,
        failed = name_namespaces(&ground) => return failed.map(|()| Vec::new()),
    };
    let searches = subscriber.metric("subscriber_namespace_search_seconds_count").await?;
    let seconds = subscriber.metric("subscriber_namespace_search_seconds_sum").await?;
    progress(&format!("during searches: {}; {searches} searches, {seconds:.1} s", during.long()));
    let what = format!(
        "From commit to deletion at {} tx/s while {} foreign keys are searched for namespaces without a pause",
        grouped(RATE),
        grouped(foreign)
    );
    let each = seconds / searches.max(1.0);
    let beside =
        format!("without a search: {}; a search for {NAMESPACES} namespaces takes {each:.1} s", alone.long());
    let met = during.percentile(99.0) <= TARGET_P99_MS;
    Ok(vec![Figure::new(what, during.long(), beside).with_target("p99 ≤ 50 ms", met)])
}

async fn fill(ground: &Ground, count: u64) -> anyhow::Result<()> {
    let mut redis = Connection::open(ground.stack.redis.address()).await?;
    let script = "for n = ARGV[1], ARGV[2] do redis.call('SET', 'foreign:' .. n, 'x') end return 1";
    for first in (0..count).step_by(usize::try_from(STEP)?) {
        let last = (first + STEP).min(count) - 1;
        redis.command(&["EVAL", script, "0", &first.to_string(), &last.to_string()]).await?;
    }
    Ok(())
}

/// Names namespaces until it is dropped.
async fn name_namespaces(ground: &Ground) -> anyhow::Result<()> {
    let mut tick = interval(EVERY);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tick.tick().await;
        let names = (0..NAMESPACES).map(|number| format!("nobody:{number}:"));
        let mut tx = ground.pool.begin().await?;
        outbox::enqueue(&mut tx, &Event::delete_namespaces(names)?).await?;
        tx.commit().await?;
    }
}
