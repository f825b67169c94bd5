//! From the command line to the exit code: what the `main` of a daemon does around its own work.

use std::{error::Error, future::Future, io, process::ExitCode, time::Duration};

use serde_json::json;
use tracing::level_filters::LevelFilter;

use crate::{
    Report, Shutdown, failpoint,
    logs::{self, LogError, LogFormat, LogOptions},
    nats::NatsError,
    parse_duration,
    report::causes,
    shutdown::exit_on_signals,
};

/// The exit code of a command line or configuration that cannot be obeyed, as clap's own.
const EXIT_USAGE: u8 = 2;

/// How long threads that are still busy may hold up the exit.
const RUNTIME_STOP_LIMIT: Duration = Duration::from_secs(1);

/// Options that every daemon has: flatten them into the binary's own with `#[command(flatten)]`.
#[derive(Debug, Clone, PartialEq, Eq, clap::Args)]
pub struct ServiceOptions {
    /// Options of logs and traces.
    #[command(flatten)]
    pub log: LogOptions,

    /// How long work in flight may take to finish when the process is told to stop
    #[arg(
        long, env = "DRAIN_TIMEOUT", value_name = "DURATION", default_value = "10s", value_parser = parse_duration,
        global = true
    )]
    pub drain_timeout: Duration,
}

/// An error by which a command says that its configuration, not the world, is at fault; the process exits with 2.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct UsageError(
    /// What is wrong, naming flag and environment variable.
    pub String,
);

impl UsageError {
    /// The error and its causes, which all lie with the configuration.
    #[must_use]
    pub fn of(error: &(dyn Error + 'static)) -> Self {
        Self(Report::of(error).to_string())
    }
}

/// What a binary tells about itself.
#[derive(Debug, Clone, Copy)]
pub struct Boot {
    /// The name of the service in traces and errors.
    pub name: &'static str,
    /// All failpoints that the binary has, see [`failpoint`].
    pub failpoints: &'static [&'static str],
}

impl Boot {
    /// Sets up logs, failpoints, the Tokio runtime and signals, runs the command, and turns its result into an exit
    /// code: 0, 2 if a [`UsageError`] or another fault of the configuration is in the chain of causes, otherwise 1.
    ///
    /// The error is printed once, with its causes, on one line of standard error.
    pub fn run<F, R, E>(self, options: &ServiceOptions, command: F) -> ExitCode
    where
        F: FnOnce(Shutdown) -> R,
        R: Future<Output = Result<(), E>>,
        E: Into<anyhow::Error>,
    {
        let daemon = async {
            let shutdown = self.prepare(Shutdown::on_signals)?;
            command(shutdown).await.map_err(Into::into)
        };
        self.finish(options, LevelFilter::INFO, daemon)
    }

    /// Like [`Boot::run`], for a command that somebody waits for: it logs warnings only if not told otherwise, and SIGINT or
    /// SIGTERM ends it at once, with code 130 or 143.
    pub fn run_command<E>(
        self,
        options: &ServiceOptions,
        command: impl Future<Output = Result<(), E>>,
    ) -> ExitCode
    where
        E: Into<anyhow::Error>,
    {
        let command = async {
            self.prepare(exit_on_signals)?;
            command.await.map_err(Into::into)
        };
        self.finish(options, LevelFilter::WARN, command)
    }

    fn prepare<T>(self, listen: impl FnOnce() -> io::Result<T>) -> anyhow::Result<T> {
        failpoint::init(self.failpoints)?;
        Ok(listen()?)
    }

    fn finish(
        self,
        options: &ServiceOptions,
        level: LevelFilter,
        work: impl Future<Output = anyhow::Result<()>>,
    ) -> ExitCode {
        match self.try_run(&options.log, level, work) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                self.print(options.log.log_format, &Report::of(error.as_ref()).to_string());
                exit_code(error.as_ref())
            }
        }
    }

    fn try_run(
        self,
        log: &LogOptions,
        level: LevelFilter,
        work: impl Future<Output = anyhow::Result<()>>,
    ) -> anyhow::Result<()> {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().enable_all().thread_name(self.name).build()?;
        let guard = {
            let _within = runtime.enter();
            logs::init(self.name, log, level)?
        };
        let result = runtime.block_on(work);
        guard.flush();
        runtime.shutdown_timeout(RUNTIME_STOP_LIMIT);
        result
    }

    /// Past the log, as the last word must come out whatever the log's filter is.
    fn print(self, format: LogFormat, error: &str) {
        match format {
            LogFormat::Human => eprintln!("error: {error}"),
            LogFormat::Json => {
                eprintln!("{}", json!({ "level": "ERROR", "message": error, "target": self.name }));
            }
        }
    }
}

fn exit_code(error: &(dyn Error + 'static)) -> ExitCode {
    if causes(error).any(is_usage) { ExitCode::from(EXIT_USAGE) } else { ExitCode::FAILURE }
}

fn is_usage(cause: &(dyn Error + 'static)) -> bool {
    cause.is::<UsageError>()
        || matches!(cause.downcast_ref(), Some(LogError::Otlp(_)))
        || cause.is::<failpoint::FailpointError>()
        || cause.downcast_ref::<NatsError>().is_some_and(NatsError::is_usage)
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("cannot reach the broker")]
    struct Unreachable(#[source] Box<dyn Error + Send + Sync>);

    #[test]
    fn a_usage_error_anywhere_in_the_chain_exits_with_two() {
        let usage = Unreachable(UsageError("--topic is empty".to_owned()).into());
        assert_eq!(exit_code(&usage), ExitCode::from(2));
        let usage = anyhow::Error::from(usage).context("cannot start");
        assert_eq!(exit_code(usage.as_ref()), ExitCode::from(2));
        assert_eq!(exit_code(&Unreachable(io::Error::other("down").into())), ExitCode::FAILURE);
    }
}
