//! The profile service as a program.

use std::process::ExitCode;

use clap::Parser;
use example::Config;
use service::Boot;

/// Serves user profiles from Postgres through Redis
#[derive(Debug, Parser)]
#[command(name = "example", version)]
struct Cli {
    #[command(flatten)]
    config: Config,
}

fn main() -> ExitCode {
    let cli: Cli = service::parse();
    let options = cli.config.service.clone();
    Boot { name: "example", failpoints: &[] }
        .run(&options, async move |shutdown| example::run(cli.config, shutdown).await)
}
