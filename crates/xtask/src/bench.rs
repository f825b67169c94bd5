//! Measures the pair beside the raw limits of the same machine.

mod account;
mod cache;
mod capture;
mod claim;
mod debezium;
mod drain;
mod events;
mod figures;
mod idle;
mod latency;
pub mod numbers;
pub mod percentiles;
mod plain;
mod prefixes;
mod readme;
mod surroundings;
mod triggers;
mod wal;
mod writers;

use std::process::ExitCode;

use clap::ValueEnum;
use devstack::Binary;

use crate::paint::Paint;
use crate::programs::Programs;
use crate::{programs, servers};
use figures::Figure;

/// Measure it beside the raw limits of this machine
///
/// Real servers and real processes, built in release, Postgres with fsync. Every figure stands beside the raw limit or
/// the plain way of doing the same, measured in the same run. Takes about seven minutes; leave the machine alone
/// meanwhile.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Small sizes, below a minute altogether: shows that everything works, not how fast it is
    #[arg(long)]
    quick: bool,

    /// Only these
    #[arg(long, value_name = "NAME", num_args = 1.., value_delimiter = ',')]
    only: Vec<Bench>,

    /// Put the table between <!-- bench:begin --> and <!-- bench:end --> in the top README.md
    #[arg(long, conflicts_with_all = ["quick", "only"])]
    write_readme: bool,
}

/// What can be measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Bench {
    /// A backlog, from Postgres through NATS to Redis
    Drain,
    /// From commit to deletion under a steady load
    Latency,
    /// What enqueueing costs the writers
    Writers,
    /// What capture by triggers costs the writers
    Triggers,
    /// What relay and subscriber cost while nothing happens
    Idle,
    /// Claiming from a large table, and with vacuum held back
    Claim,
    /// Write-ahead log and dead tuples
    Wal,
    /// Reads through the cache and strict writes, against plain commands
    Cache,
    /// Capture from the write-ahead log, beside the outbox
    Capture,
    /// Change events of Debezium, from JetStream to deletion
    Debezium,
    /// Single keys while the cache is searched for namespaces
    Prefixes,
}

/// How much to measure.
#[derive(Debug, Clone, Copy)]
pub struct Scale {
    quick: bool,
}

impl Scale {
    /// One of the two.
    pub fn pick<T>(self, full: T, quick: T) -> T {
        if self.quick { quick } else { full }
    }
}

/// Measures and prints the table.
pub fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    if cfg!(debug_assertions) {
        return programs::run_this_in_release("the benchmarks");
    }
    servers::provide(Binary::SERVERS)?;
    println!("Building relay and subscriber in release; the first time this takes a few minutes.");
    let programs = programs::build()?;
    let runtime = tokio::runtime::Runtime::new()?;
    let wanted = if arguments.only.is_empty() { Bench::value_variants() } else { &arguments.only };
    let scale = Scale { quick: arguments.quick };
    let (surroundings, figures) = runtime.block_on(measure(&programs, wanted, scale))?;

    println!("\n{}\n", figures::terminal(&figures, Paint::for_stdout(), !arguments.quick));
    println!("{surroundings}");
    if arguments.write_readme {
        readme::write(&format!("{}\n{surroundings}\n", figures::markdown(&figures)))?;
    }
    Ok(ExitCode::SUCCESS)
}

async fn measure(
    programs: &Programs,
    wanted: &[Bench],
    scale: Scale,
) -> anyhow::Result<(String, Vec<Figure>)> {
    let surroundings = surroundings::describe(programs).await?;
    let mut figures = Vec::new();
    for bench in wanted {
        println!("\n{}", Paint::for_stdout().bold(bench.title()));
        figures.extend(match bench {
            Bench::Drain => drain::measure(programs, scale).await?,
            Bench::Latency => latency::measure(programs, scale).await?,
            Bench::Writers => writers::measure(programs, scale).await?,
            Bench::Idle => idle::measure(programs, scale).await?,
            Bench::Claim => claim::measure(programs, scale).await?,
            Bench::Wal => wal::measure(programs, scale).await?,
            Bench::Triggers => triggers::measure(scale).await?,
            Bench::Cache => cache::measure(scale).await?,
            Bench::Capture => capture::measure(programs, scale).await?,
            Bench::Debezium => debezium::measure(programs, scale).await?,
            Bench::Prefixes => prefixes::measure(programs, scale).await?,
        });
    }
    Ok((surroundings, figures))
}

impl Bench {
    fn title(self) -> String {
        let value = self.to_possible_value().expect("no variant is skipped");
        let help = value.get_help().map(ToString::to_string).unwrap_or_default();
        format!("{}: {help}", value.get_name())
    }
}

/// Tells the one who waits what has just been found.
pub fn progress(text: &str) {
    println!("  {}", Paint::for_stdout().dim(text));
}
