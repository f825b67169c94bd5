#![doc = include_str!("../README.md")]

mod bench;
mod daemon;
mod demo;
mod history;
mod matrix;
mod mutants;
mod observer;
mod paint;
mod pair;
mod programs;
mod record_debezium;
mod resp;
mod servers;
mod test;
mod wait;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Tasks of this project: see it work, test it, measure it
///
/// Postgres, NATS and Redis are found on PATH or in the usual places; what is missing is installed with the system's
/// package manager, which is said before it happens.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

/// Each says what it does at its own arguments.
#[derive(Debug, Subcommand)]
enum Task {
    Demo(demo::Arguments),
    Test(test::Arguments),
    Bench(bench::Arguments),
    Matrix(matrix::Arguments),
    Mutants(mutants::Arguments),
    CheckHistory(history::Arguments),
    RecordDebezium(record_debezium::Arguments),
    /// A reader or a writer of check-history
    #[command(hide = true)]
    HistoryProcess(history::ProcessArguments),
}

fn main() -> ExitCode {
    if let Some(code) = programs::act_as_called() {
        return code;
    }
    let outcome = match Cli::parse().task {
        Task::Demo(arguments) => demo::run(&arguments),
        Task::Test(arguments) => test::run(&arguments),
        Task::Bench(arguments) => bench::run(&arguments),
        Task::Matrix(arguments) => matrix::run(&arguments),
        Task::Mutants(arguments) => mutants::run(&arguments),
        Task::CheckHistory(arguments) => history::run(&arguments),
        Task::RecordDebezium(arguments) => record_debezium::run(&arguments),
        Task::HistoryProcess(arguments) => history::run_process(arguments).map(|()| ExitCode::SUCCESS),
    };
    outcome.unwrap_or_else(|error| {
        eprintln!("\nerror: {error:#}");
        ExitCode::FAILURE
    })
}
