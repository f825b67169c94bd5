//! Logs on standard error and, when asked for, spans to an OpenTelemetry collector.

use std::{
    io::{self, IsTerminal as _},
    time::Duration,
};

use clap::ValueEnum;
use tracing::level_filters::LevelFilter;
use tracing_subscriber::{
    EnvFilter, Layer, Registry,
    filter::ParseError,
    layer::SubscriberExt as _,
    util::{SubscriberInitExt as _, TryInitError},
};

use crate::otlp::{ExportError, Spans};
use crate::{endpoint, printable};

/// How long [`LogGuard::flush`] waits for the collector at the end of the process.
const FLUSH_LIMIT: Duration = Duration::from_secs(2);

/// Options of logs and traces.
#[derive(Debug, Clone, PartialEq, Eq, clap::Args)]
#[command(next_help_heading = "Logs and traces")]
pub struct LogOptions {
    /// Format of the log on standard error
    #[arg(long, env = "LOG_FORMAT", value_enum, default_value = "human", global = true)]
    pub log_format: LogFormat,

    /// What to log: a level (error, warn, info, debug, trace), or levels by module such as `info,relay=debug`; if not set,
    /// info for a daemon and warn for a command
    #[arg(long = "log", env = "RUST_LOG", value_name = "FILTER", value_parser = parse_filter, global = true)]
    pub log_filter: Option<String>,

    /// OpenTelemetry collector that receives traces, such as `http://127.0.0.1:4318` (needs a build with the feature `otlp`);
    /// none by default
    #[arg(
        long, env = "OTEL_EXPORTER_OTLP_ENDPOINT", value_name = "URL", value_parser = endpoint::parse,
        global = true
    )]
    pub otlp_endpoint: Option<String>,
}

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people; coloured on a terminal
    Human,
    /// One JSON object per line
    Json,
}

/// Logs cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// `RUST_LOG` cannot be read.
    #[error("cannot read the log filter (RUST_LOG or --log)")]
    Filter(#[source] ParseError),
    /// The client of the collector cannot be built.
    #[error("cannot export traces (OTEL_EXPORTER_OTLP_ENDPOINT or --otlp-endpoint)")]
    Otlp(#[source] ExportError),
    /// The process logs elsewhere already.
    #[error("logs are set up already")]
    AlreadySet(#[source] TryInitError),
}

/// Held while the process logs; [`LogGuard::flush`] it at the end.
#[derive(Debug)]
#[must_use = "spans not yet exported are lost unless it is flushed"]
pub struct LogGuard {
    spans: Option<Spans>,
}

/// Sends the process's logs to standard error, and its spans to the collector if there is one.
///
/// `service` names the process in traces; `level` applies where the options have no filter. With a collector, must be called within a Tokio runtime.
///
/// # Errors
///
/// When an option is unusable or logs are set up already.
pub fn init(service: &'static str, options: &LogOptions, level: LevelFilter) -> Result<LogGuard, LogError> {
    let filter =
        env_filter(options.log_filter.as_deref().unwrap_or_default(), level).map_err(LogError::Filter)?;
    let filter = without_noise(filter, options.log_filter.as_deref().unwrap_or_default());
    let endpoint = options.otlp_endpoint.as_deref().filter(|endpoint| !endpoint.is_empty());
    let spans =
        endpoint.map(|endpoint| Spans::export(service, endpoint)).transpose().map_err(LogError::Otlp)?;
    tracing_subscriber::registry()
        .with(lines(options.log_format))
        .with(spans.as_ref().map(|spans| spans.layer(service)))
        .with(filter)
        .try_init()
        .map_err(LogError::AlreadySet)?;
    Ok(LogGuard { spans })
}

impl LogGuard {
    /// Exports what is left, for at most two seconds. Blocks: to be called outside of async code.
    pub fn flush(self) {
        if let Some(spans) = self.spans {
            spans.flush(FLUSH_LIMIT);
        }
    }
}

fn lines(format: LogFormat) -> Box<dyn Layer<Registry> + Send + Sync> {
    let layer = tracing_subscriber::fmt::layer().with_writer(|| OneLine(io::stderr()));
    match format {
        LogFormat::Human => layer.with_ansi(io::stderr().is_terminal() && no_color_is_unset()).boxed(),
        LogFormat::Json => layer.json().flatten_event(true).with_span_list(false).boxed(),
    }
}

/// A writer of whole events that keeps each on one line: a key with a line end must not pass for another event. Escape
/// sequences are the formatter's care, which writes some of its own.
struct OneLine<W>(W);

impl<W: io::Write> io::Write for OneLine<W> {
    fn write(&mut self, event: &[u8]) -> io::Result<usize> {
        let text = String::from_utf8_lossy(event);
        let (line, end) = text.strip_suffix('\n').map_or((&*text, ""), |line| (line, "\n"));
        let parts: Vec<String> = line.split('\u{1b}').map(printable).collect();
        let shown = parts.join("\u{1b}");
        self.0.write_all((shown + end).as_bytes())?;
        Ok(event.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

/// See <https://no-color.org>.
fn no_color_is_unset() -> bool {
    std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}

/// What the client library of NATS says by itself: a line for each attempt to connect, without the cause, which the module
/// `nats` logs once.
const NATS_CLIENT: &str = "async_nats=warn,async_nats::connector=off";

/// The pool of connections reports each attempt to connect as an error; what comes of it is reported by who needs one.
fn without_noise(filter: EnvFilter, text: &str) -> EnvFilter {
    let quiet = "sqlx_core::pool=off".parse().expect("a valid directive");
    if text.contains("sqlx") { filter } else { filter.add_directive(quiet) }
}

fn env_filter(text: &str, level: LevelFilter) -> Result<EnvFilter, ParseError> {
    let builder = EnvFilter::builder().with_default_directive(level.into());
    if text.contains("async_nats") {
        return builder.parse(text);
    }
    builder.parse(format!("{text},{NATS_CLIENT}").trim_start_matches(','))
}

/// Refuses a bad filter while the command line is read, where the error names the variable.
fn parse_filter(text: &str) -> Result<String, ParseError> {
    env_filter(text, LevelFilter::INFO).map(|_valid| text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filters_are_checked_and_an_empty_one_means_the_level_given() {
        for text in ["info", "warn,relay=debug", "relay[claim]=trace"] {
            assert_eq!(parse_filter(text).unwrap(), text);
        }
        let shown = |text| env_filter(text, LevelFilter::WARN).unwrap().to_string();
        assert!(shown("").contains("async_nats=warn") && shown("").ends_with("warn"), "{}", shown(""));
        assert!(shown("debug").contains("async_nats=warn"), "{}", shown("debug"));
        assert_eq!(shown("info,async_nats=debug"), "async_nats=debug,info");
        assert!(parse_filter("relay=loud").is_err());
    }

    #[test]
    fn an_event_stays_on_one_line_and_keeps_its_colours() {
        let mut written = Vec::new();
        let event = "\u{1b}[2mWARN\u{1b}[0m key a\nERROR forged\r\u{202e}x é\n";
        assert_eq!(io::Write::write(&mut OneLine(&mut written), event.as_bytes()).unwrap(), event.len());
        let expected = "\u{1b}[2mWARN\u{1b}[0m key a\\nERROR forged\\r\\u{202e}x é\n";
        assert_eq!(String::from_utf8(written).unwrap(), expected);
    }
}
