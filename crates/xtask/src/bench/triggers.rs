//! What capture by triggers costs the writers.

use std::time::Duration;

use anyhow::Context;
use devstack::Postgres;
use rules::{Rules, catalog, triggers};
use sqlx::PgPool;

use super::figures::Figure;
use super::numbers::{median, rounded};
use super::percentiles::Delays;
use super::writers::{Extra, play};
use super::{Scale, events, latency, progress, surroundings};

/// Writers at the same time.
const WRITERS: [usize; 2] = [1, 8];

/// The median latency of an update under a trigger may be this many times that of the bare update.
const TARGET_RATIO: f64 = 1.35;

/// The row's one key, as the service would name it that enqueues itself.
const RULES: &str = r#"
[[table]]
name = "accounts"
columns = ["balance"]
keys = ["account:{id}:balance"]
on_truncate = ["account:"]
"#;

/// The least a trigger of the kind can do: it looks at nothing and inserts a constant into a table without an index.
const LEAST: &str = "create table constants (keys text[]);
    create function insert_constant() returns trigger language plpgsql as
        'begin insert into constants values (array[''account:1:balance'']); return null; end';
    create trigger insert_constant after update on accounts referencing old table as old_rows new table as new_rows
        for each statement execute function insert_constant()";

/// What each round measures: in which database, and what else the transaction does.
const VARIANTS: [(&str, Extra); 4] = [
    ("bare", Extra::Nothing),
    ("watched", Extra::Nothing),
    ("least", Extra::Nothing),
    ("bare", Extra::Enqueue),
];

/// Measures it.
pub async fn measure(scale: Scale) -> anyhow::Result<Vec<Figure>> {
    let server = Postgres::start_alone(surroundings::options().postgres).await?;
    let mut pools = Vec::new();
    for name in ["bare", "watched", "least"] {
        let pool = PgPool::connect(&server.create_database(name).await?).await?;
        outbox::migrate(&pool).await?;
        latency::create_accounts(&pool).await?;
        pools.push(pool);
    }
    install(&pools[1]).await?;
    sqlx::raw_sql(LEAST).execute(&pools[2]).await?;
    let mut figures = Vec::new();
    for writers in WRITERS {
        figures.push(measure_with(&server, &pools, writers, scale).await?);
    }
    Ok(figures)
}

async fn install(pool: &PgPool) -> anyhow::Result<()> {
    let rules = Rules::parse("rules", RULES)?;
    let mut tx = pool.begin().await?;
    let facts = catalog::check(&mut tx, &rules).await?;
    let plan = triggers::plan(&mut tx, &rules, &facts).await?;
    triggers::apply(&mut tx, &plan, Duration::from_secs(5)).await.context("cannot install the triggers")?;
    Ok(tx.commit().await?)
}

async fn measure_with(
    server: &Postgres,
    pools: &[PgPool],
    writers: usize,
    scale: Scale,
) -> anyhow::Result<Figure> {
    let duration = scale.pick(Duration::from_millis(1_500), Duration::from_millis(300));
    let mut speeds = VARIANTS.map(|_| Vec::new());
    let mut delays = VARIANTS.map(|_| Delays::new());
    for _ in 0..scale.pick(5, 1) {
        for (index, (database, extra)) in VARIANTS.into_iter().enumerate() {
            let (speed, round) = play(&server.database_url(database), writers, extra, duration).await?;
            speeds[index].push(speed);
            delays[index].add(&round);
            for pool in pools {
                events::claim_all(pool).await?;
            }
        }
    }
    let [bare, watched, least, enqueue] = &delays;
    let least_ratio = least.percentile(50.0) / bare.percentile(50.0);
    let ratio = watched.percentile(50.0) / bare.percentile(50.0);
    let described: Vec<String> = speeds
        .into_iter()
        .zip([bare, watched, least, enqueue])
        .map(|(speeds, delays)| format!("{} tx/s, {}", rounded(median(speeds)), delays.short()))
        .collect();
    let people = if writers == 1 { "1 writer".to_owned() } else { format!("{writers} writers") };
    let measured = format!("{ratio:.2} × the latency of the bare update: {}", described[1]);
    let beside = format!(
        "bare {}; a trigger that inserts a constant {least_ratio:.2} ×, {}; the service enqueues the same key {}",
        described[0], described[2], described[3]
    );
    progress(&format!("{people}: {measured}; {beside}"));
    let what = format!("{people}: an update of one row under capture by triggers");
    Ok(Figure::new(what, measured, beside).with_target("≤ 1.35 ×", ratio <= TARGET_RATIO))
}
