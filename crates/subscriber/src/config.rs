use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use cache::{Redis, RedisConfig, RedisTls};
use event::{InvalidTopic, Topic};
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use service::nats::NatsOptions;
use service::{Secret, SecretUrl, ServiceOptions, UsageError, parse_duration, read_secret_file};

/// Default size limit of the dead letters: a producer of garbage must not fill the disk of the broker.
const DEAD_MAX_BYTES: i64 = 256 * 1024 * 1024;

/// Options of the subscriber. Every one is a flag and an environment variable.
#[derive(Debug, Clone, clap::Args)]
pub struct Config {
    /// Where NATS is.
    #[command(flatten)]
    pub nats: NatsOptions,

    /// Redis whose keys are invalidated: redis://, rediss://, redis+cluster://a,b or redis+sentinel://a,b/name
    #[arg(
        long,
        env = "REDIS_URL",
        hide_env_values = true,
        default_value = "redis://127.0.0.1:6379",
        conflicts_with = "redis_url_file",
        global = true
    )]
    pub redis_url: SecretUrl,

    /// File with REDIS_URL, read again every few seconds: new connections use the credentials that it holds then
    #[arg(long, env = "REDIS_URL_FILE", value_name = "FILE", global = true)]
    pub redis_url_file: Option<PathBuf>,

    /// Password for Redis, if REDIS_URL holds none; REDIS_PASSWORD_FILE is safer
    #[arg(
        long,
        env = "REDIS_PASSWORD",
        hide_env_values = true,
        conflicts_with = "redis_password_file",
        global = true
    )]
    pub redis_password: Option<Secret>,

    /// File with the password for Redis, read again every few seconds
    #[arg(long, env = "REDIS_PASSWORD_FILE", value_name = "FILE", global = true)]
    pub redis_password_file: Option<PathBuf>,

    /// File with the certificate authority of the Redis servers
    #[arg(long, env = "REDIS_CA", value_name = "FILE", global = true)]
    pub redis_ca: Option<PathBuf>,

    /// File with the client certificate for Redis; needs REDIS_KEY
    #[arg(long, env = "REDIS_CERT", value_name = "FILE", requires = "redis_key", global = true)]
    pub redis_cert: Option<PathBuf>,

    /// File with the private key of REDIS_CERT
    #[arg(long, env = "REDIS_KEY", value_name = "FILE", requires = "redis_cert", global = true)]
    pub redis_key: Option<PathBuf>,

    /// How long Redis may take to answer; what has failed is repeated with up to sixteen times as much
    #[arg(long, env = "SUBSCRIBER_REDIS_TIMEOUT", default_value = "2s", value_parser = parse_duration, global = true)]
    pub redis_timeout: Duration,

    /// Address of /metrics, /livez and /readyz
    #[arg(long, env = "HTTP_ADDR", default_value = "127.0.0.1:9465", global = true)]
    pub http_addr: SocketAddr,

    /// Durable consumer: one name per cache, shared by all subscribers of that cache
    #[arg(long, env = "SUBSCRIBER_DURABLE", default_value = "redis", value_parser = parse_durable, global = true)]
    pub durable: String,

    /// Take only events of this topic; all if not set
    #[arg(long, env = "SUBSCRIBER_TOPIC", value_parser = parse_topic, global = true)]
    pub topic: Option<Topic>,

    /// Batches in flight at the same time
    #[arg(long, env = "SUBSCRIBER_WORKERS", default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=32), global = true)]
    pub workers: u32,

    /// How long a message may be in hand before NATS delivers it again
    #[arg(long, env = "SUBSCRIBER_ACK_WAIT", default_value = "30s", value_parser = parse_duration, global = true)]
    pub ack_wait: Duration,

    /// How far back to replay when Redis came back with old data; if not set, the longer of 60s and Redis' own longest
    /// snapshot interval
    #[arg(long, env = "SUBSCRIBER_REPLAY_MARGIN", value_parser = parse_duration, global = true)]
    pub replay_margin: Option<Duration>,

    /// What to do when invalidations are missing from the stream for good: halt, or flush the keys that
    /// SUBSCRIBER_FLUSH_PATTERNS or SUBSCRIBER_FLUSH_EVERYTHING name
    #[arg(long, env = "SUBSCRIBER_GAP_POLICY", default_value = "halt", global = true)]
    pub gap_policy: GapPolicy,

    /// Glob patterns of the keys to delete when the gap policy is flush, separated by commas
    #[arg(long, env = "SUBSCRIBER_FLUSH_PATTERNS", value_delimiter = ',', value_parser = parse_pattern, global = true)]
    pub flush_patterns: Vec<String>,

    /// Delete every key of the Redis database when the gap policy is flush
    #[arg(long, env = "SUBSCRIBER_FLUSH_EVERYTHING", global = true)]
    pub flush_everything: bool,

    /// How long to wait for a relay to say that it publishes again what the stream lost, before the gap policy applies
    #[arg(long, env = "SUBSCRIBER_GAP_GRACE", default_value = "30s", value_parser = parse_duration, global = true)]
    pub gap_grace: Duration,

    /// Size limit of the stream of dead letters in bytes; JetStream reserves it when the first dead letter comes
    #[arg(long, env = "SUBSCRIBER_DEAD_MAX_BYTES", default_value_t = DEAD_MAX_BYTES, value_parser = clap::value_parser!(i64).range(1024..), global = true)]
    pub dead_max_bytes: i64,

    /// Age of the last heartbeat of a relay from which on this subscriber is not ready
    #[arg(long, env = "SUBSCRIBER_HEARTBEAT_LIMIT", default_value = "30s", value_parser = parse_duration, global = true)]
    pub heartbeat_limit: Duration,

    /// Stream with change events of Debezium to apply as well, by the rules; none if not set
    #[arg(long, env = "SUBSCRIBER_DEBEZIUM_STREAM", global = true)]
    pub debezium_stream: Option<String>,

    /// File with the rules for Debezium's change events: which cache keys depend on which table
    #[arg(long, env = "SUBSCRIBER_RULES", value_name = "FILE", global = true)]
    pub rules: Option<PathBuf>,

    /// File with the types of the columns that the rules need, which `relay rules check --lock` writes; if not set, the file
    /// beside the rules whose name ends in .lock, if there is one
    #[arg(long, env = "SUBSCRIBER_RULES_LOCK", value_name = "FILE", global = true)]
    pub rules_lock: Option<PathBuf>,

    /// When to apply a change event of Debezium once more: it may have come before its commit was visible to readers
    #[arg(long, env = "SUBSCRIBER_DEBEZIUM_REPEAT_AFTER", default_value = "1s", value_parser = parse_duration, global = true)]
    pub debezium_repeat_after: Duration,

    /// How long to try to reach NATS at the start before the process exits; 0s is for as long as it takes
    #[arg(long, env = "SUBSCRIBER_STARTUP_TIMEOUT", default_value = "0s", value_parser = parse_duration, global = true)]
    pub startup_timeout: Duration,

    /// Logs, traces and draining.
    #[command(flatten)]
    pub service: ServiceOptions,
}

/// What to do about invalidations that are gone for good.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum GapPolicy {
    /// Consume nothing and leave the decision to the operator.
    Halt,
    /// Delete the keys that the operator named, and go on.
    Flush,
}

impl GapPolicy {
    /// The policy's name, for logs and metrics.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Halt => "halt",
            Self::Flush => "flush",
        }
    }
}

impl Config {
    /// Checks what clap cannot: options that only make sense together.
    ///
    /// # Errors
    /// [`UsageError`] naming the option to set.
    pub fn check(&self) -> Result<(), UsageError> {
        let names_keys = self.flush_everything || !self.flush_patterns.is_empty();
        if self.gap_policy == GapPolicy::Flush && !names_keys {
            return Err(UsageError(
                "SUBSCRIBER_GAP_POLICY (--gap-policy) is flush, but neither SUBSCRIBER_FLUSH_PATTERNS \
                 (--flush-patterns) nor SUBSCRIBER_FLUSH_EVERYTHING (--flush-everything) says which keys"
                    .to_owned(),
            ));
        }
        if self.ack_wait < Duration::from_secs(1) {
            return Err(UsageError("SUBSCRIBER_ACK_WAIT (--ack-wait) is below 1s".to_owned()));
        }
        Ok(())
    }

    /// Prepares the connection to Redis, without making it.
    ///
    /// # Errors
    /// [`UsageError`] naming what cannot be used.
    pub fn connect_redis(&self) -> Result<Redis, UsageError> {
        Redis::new(self.redis()?).map_err(|error| {
            UsageError(format!("REDIS_URL (--redis-url) cannot be used: {}", service::Report::of(&error)))
        })
    }

    /// URL of Redis as it is at this moment, with the password.
    ///
    /// # Errors
    /// [`UsageError`] if a file cannot be used.
    pub fn redis_url(&self) -> Result<SecretUrl, UsageError> {
        let url = match &self.redis_url_file {
            Some(file) => SecretUrl::read("REDIS_URL_FILE", file)?,
            None => self.redis_url.clone(),
        };
        let password = match &self.redis_password_file {
            Some(file) => {
                Some(read_secret_file("REDIS_PASSWORD_FILE", file).map_err(|error| UsageError::of(&error))?)
            }
            None => self.redis_password.as_ref().map(|password| password.expose().to_owned()),
        };
        match password {
            Some(password) => with_password(&url, &password),
            None => Ok(url),
        }
    }

    /// Whether credentials of Redis come from a file, which may change.
    #[must_use]
    pub fn has_redis_file(&self) -> bool {
        self.redis_url_file.is_some() || self.redis_password_file.is_some()
    }

    /// Options of the connection to Redis.
    ///
    /// # Errors
    /// [`UsageError`] if a file cannot be used.
    pub fn redis(&self) -> Result<RedisConfig, UsageError> {
        let wants_tls = self.redis_ca.is_some() || self.redis_cert.is_some();
        Ok(RedisConfig {
            url: self.redis_url()?.expose().to_owned(),
            // One for each worker; one more for replay, one for looking at the server.
            pool_size: self.workers as usize + 2,
            connect_timeout: self.redis_timeout,
            response_timeout: self.redis_timeout,
            tls: wants_tls.then(|| RedisTls {
                ca_file: self.redis_ca.clone(),
                client_cert_file: self.redis_cert.clone(),
                client_key_file: self.redis_key.clone(),
            }),
        })
    }
}

/// Puts the password into a URL, for the user that the URL names.
fn with_password(url: &SecretUrl, password: &str) -> Result<SecretUrl, UsageError> {
    let refused = || {
        let text = "REDIS_PASSWORD and REDIS_PASSWORD_FILE need a REDIS_URL with a host";
        UsageError(text.to_owned())
    };
    let (scheme, rest) = url.expose().split_once("://").ok_or_else(refused)?;
    if scheme.ends_with("unix") {
        return Err(refused());
    }
    let (authority, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
    let (user, hosts) = authority.rsplit_once('@').unwrap_or(("", authority));
    let user = user.split(':').next().unwrap_or_default();
    let password = utf8_percent_encode(password, NON_ALPHANUMERIC);
    format!("{scheme}://{user}:{password}@{hosts}{path}").parse().map_err(|_| refused())
}

fn parse_topic(text: &str) -> Result<Topic, InvalidTopic> {
    Topic::new(text)
}

/// Spaces around a pattern are those of a list, not of keys.
fn parse_pattern(text: &str) -> Result<String, &'static str> {
    match text.trim() {
        "" => Err("a pattern is empty, it would match no key"),
        pattern => Ok(pattern.to_owned()),
    }
}

fn parse_durable(text: &str) -> Result<String, String> {
    // The rules of a topic are those of a JetStream name, and stricter.
    Topic::new(text)
        .map(|topic| topic.as_str().to_owned())
        .map_err(|_| "a durable is 1 to 64 ASCII letters, digits, '_' or '-'".to_owned())
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Command {
        #[command(flatten)]
        config: Config,
    }

    fn patterns(list: &str) -> Result<Vec<String>, String> {
        let parsed = Command::try_parse_from(["subscriber", "--flush-patterns", list]);
        parsed.map(|command| command.config.flush_patterns).map_err(|error| error.to_string())
    }

    #[test]
    fn spaces_in_the_list_of_flush_patterns_do_not_belong_to_the_patterns() {
        assert_eq!(patterns("a:*, b c:* ").unwrap(), ["a:*", "b c:*"]);
    }

    #[test]
    fn an_empty_flush_pattern_is_refused() {
        for list in ["", "a:*,", "a:*, ,b:*"] {
            let error = patterns(list).unwrap_err();
            assert!(error.contains("--flush-patterns") && error.contains("empty"), "{error}");
        }
    }

    #[test]
    fn a_password_goes_into_every_form_of_url() {
        for (url, expected) in [
            ("redis://h:1/2", "redis://:p%40%2F@h:1/2"),
            ("rediss://app@h", "rediss://app:p%40%2F@h"),
            ("redis+cluster://app:old@a:1,b:2", "redis+cluster://app:p%40%2F@a:1,b:2"),
            ("redis+sentinel://a,b/name/1", "redis+sentinel://:p%40%2F@a,b/name/1"),
        ] {
            let with = with_password(&url.parse().unwrap(), "p@/").unwrap();
            assert_eq!(with.expose(), expected);
        }
        assert!(with_password(&"redis+unix:///s".parse().unwrap(), "x").is_err());
    }
}
