//! What enqueueing costs the writers.

mod load;

use std::time::Duration;

use sqlx::PgPool;

use super::figures::Figure;
use super::numbers::{median, rounded};
use super::percentiles::Delays;
use super::{Scale, events, latency, progress, surroundings};
use crate::pair::Ground;
use crate::programs::Programs;
pub use load::{Extra, play, transactions};

/// Writers at the same time.
const WRITERS: [usize; 3] = [1, 8, 32];

/// The number that has a target, and the target.
const TARGET_WRITERS: usize = 32;
const TARGET_RATIO: f64 = 0.70;

/// What each round measures, one after the other, so that a change of the machine's mood meets all of them.
const VARIANTS: [Variant; 7] = [
    Variant { extra: Extra::Nothing, relayed: false },
    Variant { extra: Extra::Enqueue, relayed: false },
    Variant { extra: Extra::Enqueue, relayed: true },
    Variant { extra: Extra::EnqueueWithin, relayed: false },
    Variant { extra: Extra::InsertWithin, relayed: false },
    Variant { extra: Extra::BareInsert, relayed: false },
    Variant { extra: Extra::Notify, relayed: false },
];

/// What the transactions do besides their own business.
#[derive(Debug, Clone, Copy)]
struct Variant {
    extra: Extra,
    /// In the database that the relay takes events from, rather than in one where they stay.
    relayed: bool,
}

/// A variant over all rounds.
#[derive(Debug)]
struct Outcome {
    per_second: f64,
    delays: Delays,
}

/// Both databases, on one server.
struct Databases {
    relayed: String,
    alone: String,
    alone_pool: PgPool,
}

/// Measures it.
pub async fn measure(programs: &Programs, scale: Scale) -> anyhow::Result<Vec<Figure>> {
    let ground = Ground::start(programs, surroundings::options()).await?;
    ground.migrate().await?;
    latency::create_accounts(&ground.pool).await?;
    let alone = ground.stack.create_database("alone").await?;
    let alone_pool = PgPool::connect(&alone).await?;
    outbox::migrate(&alone_pool).await?;
    latency::create_accounts(&alone_pool).await?;
    load::create_bare_table(&alone_pool).await?;
    let databases = Databases { relayed: ground.stack.postgres_url(), alone, alone_pool };
    let _pair = ground.spawn_pair().await?;

    let mut figures = Vec::new();
    for writers in WRITERS {
        let outcomes = measure_with(&ground, &databases, writers, scale).await?;
        figures.extend(compare(writers, &outcomes));
    }
    Ok(figures)
}

async fn measure_with(
    ground: &Ground,
    databases: &Databases,
    writers: usize,
    scale: Scale,
) -> anyhow::Result<[Outcome; 7]> {
    let duration = scale.pick(Duration::from_millis(1_500), Duration::from_millis(500));
    let mut speeds = VARIANTS.map(|_| Vec::new());
    let mut delays = VARIANTS.map(|_| Delays::new());
    for _ in 0..scale.pick(5, 1) {
        for (index, variant) in VARIANTS.into_iter().enumerate() {
            let url = if variant.relayed { &databases.relayed } else { &databases.alone };
            let (speed, round) = load::play(url, writers, variant.extra, duration).await?;
            speeds[index].push(speed);
            delays[index].add(&round);
            // Each begins with an empty outbox.
            events::claim_all(&databases.alone_pool).await?;
            load::empty_bare_table(&databases.alone_pool).await?;
            ground.until_outbox_empty(Duration::from_secs(60)).await?;
        }
    }
    let mut outcomes =
        speeds.into_iter().zip(delays).map(|(speeds, delays)| Outcome { per_second: median(speeds), delays });
    Ok(std::array::from_fn(|_| outcomes.next().expect("as many as variants")))
}

fn compare(writers: usize, outcomes: &[Outcome; 7]) -> Vec<Figure> {
    let [without, enqueue, relayed, within, inserted, bare, notify] = outcomes;
    let describe =
        |outcome: &Outcome| format!("{} tx/s, {}", rounded(outcome.per_second), outcome.delays.short());
    let share = |outcome: &Outcome| outcome.per_second / without.per_second;
    let measured = |outcome: &Outcome| format!("{:.2} of without: {}", share(outcome), describe(outcome));
    let beside = format!(
        "without {}; instead of enqueue an insert into a bare table {:.2}, pg_notify {:.2}",
        describe(without),
        share(bare),
        share(notify)
    );
    let people = if writers == 1 { "1 writer".to_owned() } else { format!("{writers} writers") };
    progress(&format!(
        "{people}: {}; with the relay {}; in one statement {}, inserted {}; {beside}",
        measured(enqueue),
        measured(relayed),
        measured(within),
        measured(inserted)
    ));
    let judged = |figure: Figure, outcome: &Outcome| match writers {
        TARGET_WRITERS => figure.with_target("≥ 0.70", share(outcome) >= TARGET_RATIO),
        _ => figure,
    };
    vec![
        judged(Figure::new(format!("{people}: an update with enqueue"), measured(enqueue), beside), enqueue),
        judged(
            Figure::new(
                format!("{people}: `outbox.enqueue` in the statement of the update"),
                measured(within),
                "as above",
            ),
            within,
        ),
        judged(
            Figure::new(
                format!("{people}: the row of the event inserted in the statement of the update"),
                measured(inserted),
                "as above",
            ),
            inserted,
        ),
        judged(
            Figure::new(
                format!("{people}: the same while the pair delivers on the same cores"),
                measured(relayed),
                "as above",
            ),
            relayed,
        ),
    ]
}
