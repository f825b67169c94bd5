//! Where the figures come from.

use devstack::{PostgresOptions, StackOptions};

use super::numbers::grouped;
use crate::demo::versions;
use crate::pair::Ground;
use crate::programs::Programs;

/// The servers of all benchmarks: Postgres writes through to the disk, and plans checkpoints as a production server
/// would. NATS acknowledges before it syncs, its default.
pub fn options() -> StackOptions {
    let settings = [("max_wal_size", "4GB"), ("shared_buffers", "512MB")];
    let settings = settings.map(|(name, value)| (name.to_owned(), value.to_owned())).to_vec();
    StackOptions { postgres: PostgresOptions { durable: true, settings }, ..Default::default() }
}

/// One sentence: servers, cores, load.
pub async fn describe(programs: &Programs) -> anyhow::Result<String> {
    let ground = Ground::start(programs, options()).await?;
    let versions = versions(&ground).await?;
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let cores = grouped(cores.try_into()?);
    let load = std::fs::read_to_string("/proc/loadavg").ok();
    let load = load.as_deref().and_then(|text| text.split_whitespace().next());
    let load = load.map_or(String::new(), |load| format!("; load average before the run {load}"));
    Ok(format!("{versions}, all of it and the load generator on {cores} cores, Postgres with fsync{load}."))
}
