//! From commit to deletion under a steady load.

mod chain;
mod run;

use std::time::Duration;

use super::account::Account;
use super::figures::Figure;
use super::numbers::{grouped, rounded};
use super::{Scale, progress, surroundings};
use crate::observer;
use crate::pair::Ground;
use crate::programs::Programs;
use run::Outcome;
pub use run::{ACCOUNTS, Way, create_accounts, play};

/// Transactions a second.
const RATES: [u64; 3] = [100, 1_000, 5_000];

/// The rate that has a target.
const TARGET_RATE: u64 = 1_000;
const TARGET_P50_MS: f64 = 2.0;
const TARGET_P99_MS: f64 = 8.0;

/// Measures it.
pub async fn measure(programs: &Programs, scale: Scale) -> anyhow::Result<Vec<Figure>> {
    let mut options = surroundings::options();
    options.redis.configuration = observer::CONFIGURATION.to_owned();
    let ground = Ground::start(programs, options).await?;
    ground.migrate().await?;
    create_accounts(&ground.pool).await?;
    let chain = chain::estimate(&ground, scale.pick(1_000, 100)).await?;
    progress(&chain);
    let (relay, subscriber) = ground.spawn_pair().await?;

    let duration = scale.pick(Duration::from_secs(10), Duration::from_secs(1));
    // The first transactions open connections and prepare statements.
    run::play(&ground, Way::Outbox, 200, Duration::from_secs(1)).await?;
    let mut figures = Vec::new();
    for rate in RATES {
        let before = Account::of(&relay, &subscriber).await?;
        let outbox = run::play(&ground, Way::Outbox, rate, duration).await?;
        let steps = Account::of(&relay, &subscriber).await?.since(&before);
        let plain = run::play(&ground, Way::Plain, rate, duration).await?;
        progress(&format!("{rate} tx/s: {}; plain {}", outbox.delays.long(), plain.delays.long()));
        progress(&format!("    on average {steps}"));
        figures.push(figure(rate, &outbox, &plain, &chain));
    }
    Ok(figures)
}

fn figure(rate: u64, outbox: &Outcome, plain: &Outcome, chain: &str) -> Figure {
    let delays = &outbox.delays;
    let mut beside = format!("deleted by the service itself after its commit: {}", plain.delays.long());
    if rate == TARGET_RATE {
        beside = format!("{beside}; {chain}");
    }
    if outbox.per_second < ratio_of(rate) {
        beside = format!("{beside}; the machine managed {} tx/s", rounded(outbox.per_second));
    }
    let figure =
        Figure::new(format!("From commit to deletion at {} tx/s", grouped(rate)), delays.long(), beside);
    if rate != TARGET_RATE {
        return figure;
    }
    let met = delays.percentile(50.0) <= TARGET_P50_MS && delays.percentile(99.0) <= TARGET_P99_MS;
    figure.with_target("p50 ≤ 2 ms, p99 ≤ 8 ms", met)
}

/// Below this the schedule was not kept.
fn ratio_of(rate: u64) -> f64 {
    super::numbers::ratio(rate * 95, 100)
}
