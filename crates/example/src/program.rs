//! The profile service as a program.

use std::process::ExitCode;

use crate::Config;
use clap::Parser;
use service::Boot;

/// Serves user profiles from Postgres through Redis
#[derive(Debug, Parser)]
#[command(name = "example", version)]
struct Cli {
    #[command(flatten)]
    config: Config,
}

/// Runs the program with the arguments of this process.
#[must_use]
pub fn program() -> ExitCode {
    let cli: Cli = service::parse();
    let options = cli.config.service.clone();
    Boot { name: "example", failpoints: &[] }
        .run(&options, async move |shutdown| crate::run(cli.config, shutdown).await)
}
