use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use service::nats::NatsOptions;
use service::{SecretUrl, ServiceOptions, UsageError, parse_duration};

/// Options of the relay. Every one is a flag and an environment variable.
#[derive(Debug, Clone, clap::Args)]
pub struct Config {
    /// Postgres database with the outbox
    #[arg(
        long,
        env = "DATABASE_URL",
        hide_env_values = true,
        conflicts_with = "database_url_file",
        global = true
    )]
    pub database_url: Option<SecretUrl>,

    /// File with DATABASE_URL, read again every few seconds: new connections use what it holds then
    #[arg(long, env = "DATABASE_URL_FILE", value_name = "FILE", global = true)]
    pub database_url_file: Option<PathBuf>,

    /// Where NATS is.
    #[command(flatten)]
    pub nats: NatsOptions,

    /// Address of /metrics, /livez and /readyz
    #[arg(long, env = "HTTP_ADDR", default_value = "127.0.0.1:9464", global = true)]
    pub http_addr: SocketAddr,

    /// Claims in flight at the same time; the second works while the first waits for the broker
    #[arg(long, env = "RELAY_WORKERS", default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=32), global = true)]
    pub workers: u32,

    /// Most events in one claim
    #[arg(long, env = "RELAY_CLAIM_LIMIT", default_value_t = 2000, value_parser = clap::value_parser!(u32).range(1..=20_000), global = true)]
    pub claim_limit: u32,

    /// Most events in one message
    #[arg(long, env = "RELAY_ENVELOPE_EVENTS", default_value_t = 500, value_parser = clap::value_parser!(u32).range(1..=20_000), global = true)]
    pub envelope_events: u32,

    /// First pause between looks at an empty outbox, inside Postgres; grows to RELAY_POLL_MAX while it stays empty
    #[arg(long, env = "RELAY_POLL_MIN", default_value = "1ms", value_parser = parse_duration, global = true)]
    pub poll_min: Duration,

    /// Longest pause between looks at an empty outbox, at most 250ms
    #[arg(long, env = "RELAY_POLL_MAX", default_value = "5ms", value_parser = parse_duration, global = true)]
    pub poll_max: Duration,

    /// How long the broker may take to acknowledge before the claimed events are given back
    #[arg(long, env = "RELAY_PUBLISH_TIMEOUT", default_value = "5s", value_parser = parse_duration, global = true)]
    pub publish_timeout: Duration,

    /// How long published messages are kept in Postgres, to be published again if the broker loses them; 0s keeps none
    #[arg(long, env = "RELAY_RETENTION", default_value = "10m", value_parser = parse_duration, global = true)]
    pub retention: Duration,

    /// Time between heartbeats, which tell subscribers that everything up to the cache works; 0s sends none
    #[arg(long, env = "RELAY_HEARTBEAT", default_value = "1s", value_parser = parse_duration, global = true)]
    pub heartbeat: Duration,

    /// How long the stream keeps messages; at least the longest time to live of a cached value
    #[arg(long, env = "RELAY_STREAM_MAX_AGE", default_value = "24h", value_parser = parse_duration, global = true)]
    pub stream_max_age: Duration,

    /// Copies of the stream in a NATS cluster
    #[arg(long, env = "RELAY_STREAM_REPLICAS", default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=5), global = true)]
    pub stream_replicas: u8,

    /// Size limit of the stream in bytes; when it is reached events wait in the outbox. No limit if not set
    #[arg(long, env = "RELAY_STREAM_MAX_BYTES", value_parser = clap::value_parser!(i64).range(1..), global = true)]
    pub stream_max_bytes: Option<i64>,

    /// Postgres is reached through a pooler in transaction mode: keep no prepared statements
    #[arg(long, env = "RELAY_TRANSACTION_POOLER", global = true)]
    pub transaction_pooler: bool,

    /// How long to try to reach Postgres and NATS at the start before the process exits; 0s is for as long as it takes
    #[arg(long, env = "RELAY_STARTUP_TIMEOUT", default_value = "0s", value_parser = parse_duration, global = true)]
    pub startup_timeout: Duration,

    /// Capture from the write-ahead log.
    #[command(flatten)]
    pub capture: CaptureConfig,

    /// Logs, traces and draining.
    #[command(flatten)]
    pub service: ServiceOptions,
}

impl Config {
    /// The database's URL as it is at this moment.
    ///
    /// # Errors
    /// [`UsageError`] if it is not set, or its file cannot be used.
    pub fn database_url(&self) -> Result<SecretUrl, UsageError> {
        match &self.database_url_file {
            Some(file) => SecretUrl::read("DATABASE_URL_FILE", file),
            None => self
                .database_url
                .clone()
                .ok_or_else(|| UsageError("DATABASE_URL (--database-url) is not set".to_owned())),
        }
    }

    /// Time between heartbeats, if there are any.
    #[must_use]
    pub fn heartbeat(&self) -> Option<Duration> {
        (!self.heartbeat.is_zero()).then_some(self.heartbeat)
    }

    /// How long published messages are kept, if at all.
    #[must_use]
    pub fn retention(&self) -> Option<Duration> {
        (!self.retention.is_zero()).then_some(self.retention)
    }
}

/// Where events come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Source {
    /// The table `outbox.events`, where services and triggers enqueue.
    Outbox,
    /// The write-ahead log, by the rules.
    Wal,
}

/// What to do when changes are missing from the slot for good.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum GapPolicy {
    /// Stop reading until somebody decides.
    Halt,
    /// Declare every key stale that the rules can name, and go on.
    Flush,
}

impl GapPolicy {
    /// As the option spells it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Halt => "halt",
            Self::Flush => "flush",
        }
    }
}

/// Options of capture from the write-ahead log.
#[derive(Debug, Clone, clap::Args)]
pub struct CaptureConfig {
    /// Where events come from: outbox, wal or outbox,wal
    #[arg(
        long = "source",
        env = "RELAY_SOURCE",
        default_value = "outbox",
        value_delimiter = ',',
        global = true
    )]
    pub sources: Vec<Source>,

    /// File with the rules: which cache keys depend on which table
    #[arg(long, env = "RELAY_RULES", global = true)]
    pub rules: Option<PathBuf>,

    /// Replication slot that --source wal reads; created if missing
    #[arg(long, env = "RELAY_SLOT", default_value = "outbox_relay", global = true)]
    pub slot: String,

    /// Publication of the tables of the rules; created if missing
    #[arg(long, env = "RELAY_PUBLICATION", default_value = "outbox_relay", global = true)]
    pub publication: String,

    /// What to do when changes are missing from the slot for good: halt, or flush every key the rules can name
    #[arg(long, env = "RELAY_GAP_POLICY", default_value = "halt", global = true)]
    pub gap_policy: GapPolicy,

    /// Bytes of write-ahead log the slot may be behind before the relay is not ready and says so
    #[arg(long, env = "RELAY_SLOT_LAG_LIMIT", default_value_t = 1_073_741_824, global = true)]
    pub slot_lag_limit: u64,
}

impl CaptureConfig {
    /// Whether events come from there.
    #[must_use]
    pub fn has(&self, source: Source) -> bool {
        self.sources.contains(&source)
    }
}
