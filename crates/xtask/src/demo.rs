//! Shows the pair at work on real servers, and fails if a promise is broken.

mod keep;
mod scenes;
mod service;
mod stage;
mod stream;
mod timeline;

use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;

use devstack::{Binary, RedisOptions, StackOptions};

use crate::pair::Ground;
use crate::{observer, programs, servers};
use stage::Stage;
pub use stage::versions;
use timeline::Timeline;

/// See it work on real servers: commits, rollbacks, crashes, an outage
///
/// Starts Postgres, NATS and Redis in a temporary directory, runs relay, subscriber and the example service as processes
/// beside them, and checks in every scene that what was promised happened. Nothing is left behind.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Leave everything running at the end, and say how to play with it and how to stop it
    #[arg(long)]
    keep: bool,
}

/// Plays all scenes.
pub fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    servers::provide(Binary::SERVERS)?;
    let (programs, example) = programs::under_other_names()?;
    let runtime = tokio::runtime::Runtime::new()?;
    runtime.block_on(play(&programs, &example, arguments.keep))?;
    Ok(ExitCode::SUCCESS)
}

async fn play(programs: &programs::Programs, example: &Path, keep: bool) -> anyhow::Result<()> {
    let started = Instant::now();
    let mut timeline = Timeline::new();
    let mut stage = prepare(&mut timeline, programs, example, started).await?;
    scenes::commit::play(&mut timeline, &stage).await?;
    scenes::rollback::play(&mut timeline, &stage).await?;
    scenes::crash::play(&mut timeline, &mut stage).await?;
    scenes::outage::play(&mut timeline, &stage).await?;
    scenes::plain_sql::play(&mut timeline, &stage).await?;
    scenes::log::play(&mut timeline, &stage).await?;
    scenes::service::play(&mut timeline, &stage).await?;
    timeline.summary(started.elapsed());
    if keep {
        keep::leave_running(&stage, programs)?;
    }
    Ok(())
}

async fn prepare(
    timeline: &mut Timeline,
    programs: &programs::Programs,
    example: &Path,
    started: Instant,
) -> anyhow::Result<Stage> {
    let redis = RedisOptions { configuration: observer::CONFIGURATION.to_owned(), ..Default::default() };
    let ground = Ground::start(programs, StackOptions { redis, ..Default::default() }).await?;
    timeline.title(&versions(&ground).await?);
    timeline.setup("servers", &format!("started in {:.1} s", started.elapsed().as_secs_f64()));
    timeline.setup("schema", &format!("relay migrate: {}", ground.migrate().await?));
    let stage = Stage::set(ground, example).await?;
    timeline.setup("programs", "relay, subscriber and the example service run, each a process of its own");
    Ok(stage)
}
