use deadpool_redis::redis::{self, ErrorKind, ServerErrorKind};

use crate::redis::SlotIsMoving;

/// Why Redis did not do what was asked. Every variant is a decision for the caller.
///
/// Services log it with one `{error}`, so the text holds the answer of Redis and every other cause.
#[derive(Debug, thiserror::Error)]
pub enum RedisError {
    /// No answer, or not now: connection refused, timeout, loading, failing over. Try again later.
    #[error("redis is not available: {}", told(&**.0))]
    Unavailable(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The credentials or rights are not enough. Someone has to change them; trying again does not help by itself.
    #[error("redis refuses access ({code}): {}", told(source))]
    Refused {
        /// The code Redis answered, such as `NOPERM` or `WRONGPASS`.
        code: String,
        /// The whole answer.
        #[source]
        source: redis::RedisError,
    },
    /// The rights are enough for the commands but not for these keys. All other keys of the request have been dealt with.
    #[error("redis refuses access to {what}; widen the key patterns (~) of its user")]
    KeysRefused {
        /// The keys or namespaces, or the first of many.
        what: String,
    },
    /// The configuration cannot work. The text never contains a password.
    #[error("redis configuration is not usable: {0}")]
    Config(String),
    /// Redis may evict keys that have no TTL, and with them the marks that strict writes depend on.
    #[error(
        "redis evicts keys without a TTL (maxmemory-policy {policy}), marks of strict writes among them; \
         set maxmemory-policy to noeviction or to a volatile-* policy"
    )]
    MarksEvictable {
        /// The policy found.
        policy: String,
    },
    /// Redis answered something this system does not understand.
    #[error("redis gave an unexpected answer: {}", told(&**.0))]
    Unexpected(#[source] Box<dyn std::error::Error + Send + Sync>),
}

impl RedisError {
    /// Whether the same request can succeed later without anyone changing a configuration.
    #[must_use]
    pub fn is_retryable(&self) -> bool {
        matches!(self, Self::Unavailable(_))
    }

    /// Whether Redis refused because it has reached `maxmemory`. It still deletes.
    #[must_use]
    pub fn is_out_of_memory(&self) -> bool {
        let Self::Unavailable(cause) = self else { return false };
        cause.downcast_ref::<redis::RedisError>().and_then(code).as_deref() == Some("OOM")
    }

    /// Whether the keys of the request were not at one node of the cluster because their slot is moving.
    pub(crate) fn is_slot_moving(&self) -> bool {
        let Self::Unavailable(cause) = self else { return false };
        cause.is::<SlotIsMoving>()
            || cause.downcast_ref::<redis::RedisError>().is_some_and(|error| {
                matches!(
                    error.kind(),
                    ErrorKind::Server(
                        ServerErrorKind::TryAgain | ServerErrorKind::Ask | ServerErrorKind::Moved
                    )
                )
            })
    }

    /// Returns true if the node said that the slot of the keys is another's.
    pub(crate) fn is_slot_moved(&self) -> bool {
        let Self::Unavailable(cause) = self else { return false };
        cause
            .downcast_ref::<redis::RedisError>()
            .is_some_and(|error| error.kind() == ErrorKind::Server(ServerErrorKind::Moved))
    }

    /// Whether the user may not touch one of the keys, though it may run the command. Only the text tells: "no permissions
    /// to access one of the keys used as arguments", from 7.2 on "No permissions to access a key", and of a script "The
    /// user executing the script can't access at least one of the keys".
    pub(crate) fn is_about_keys(&self) -> bool {
        let Self::Refused { source, .. } = self else { return false };
        let text = source.to_string();
        let about = ["permissions to access", "executing the script can't access"];
        about.iter().any(|about| text.contains(about)) && text.contains("key")
    }

    /// Whether Redis is there and does other things than the one it was asked for.
    pub(crate) fn is_answer(&self) -> bool {
        match self {
            Self::Refused { code, .. } => code == "NOPERM",
            Self::KeysRefused { .. } | Self::Unexpected(_) => true,
            _ => self.is_out_of_memory(),
        }
    }

    pub(crate) fn unavailable(reason: &'static str) -> Self {
        Self::Unavailable(reason.into())
    }

    pub(crate) fn unexpected(reason: impl Into<String>) -> Self {
        Self::Unexpected(reason.into().into())
    }
}

impl From<redis::RedisError> for RedisError {
    fn from(error: redis::RedisError) -> Self {
        match error.kind() {
            ErrorKind::Io
            | ErrorKind::Parse
            | ErrorKind::ClusterConnectionNotFound
            | ErrorKind::MasterNameNotFoundBySentinel
            | ErrorKind::NoValidReplicasFoundBySentinel => Self::Unavailable(error.into()),
            ErrorKind::AuthenticationFailed => refused("WRONGPASS", error),
            ErrorKind::InvalidClientConfig | ErrorKind::EmptySentinelList | ErrorKind::Client => {
                Self::Config(error.to_string())
            }
            ErrorKind::Server(kind) => from_server(kind, error),
            ErrorKind::Extension => from_code(error),
            _ => Self::Unexpected(error.into()),
        }
    }
}

fn refused(code: &str, source: redis::RedisError) -> RedisError {
    RedisError::Refused { code: code.to_owned(), source }
}

fn from_server(kind: ServerErrorKind, error: redis::RedisError) -> RedisError {
    match kind {
        ServerErrorKind::BusyLoading
        | ServerErrorKind::TryAgain
        | ServerErrorKind::ClusterDown
        | ServerErrorKind::MasterDown
        | ServerErrorKind::ReadOnly
        | ServerErrorKind::NoScript
        // A cluster client follows redirects by itself; seeing one means that the slots are moving right now.
        | ServerErrorKind::Moved
        | ServerErrorKind::Ask => RedisError::Unavailable(error.into()),
        ServerErrorKind::NoPerm => refused("NOPERM", error),
        ServerErrorKind::ResponseError if error.detail().is_some_and(|text| text.contains("max number of clients")) => {
            RedisError::Unavailable(error.into())
        }
        _ => from_code(error),
    }
}

/// Returns true if the server takes no writes because it is a replica.
pub(crate) fn is_read_only(error: &redis::RedisError) -> bool {
    code(error).as_deref() == Some("READONLY")
}

/// Codes the client has no word for, and codes within the text of another.
fn from_code(error: redis::RedisError) -> RedisError {
    match code(&error).as_deref() {
        Some(code @ ("NOAUTH" | "WRONGPASS" | "DENIED" | "NOPERM")) => refused(code, error),
        // Out of memory, a failing disk, a missing replica, a running script and a failover all pass.
        Some(
            "OOM" | "MISCONF" | "NOREPLICAS" | "BUSY" | "READONLY" | "LOADING" | "MASTERDOWN" | "CLUSTERDOWN"
            | "TRYAGAIN",
        ) => RedisError::Unavailable(error.into()),
        _ => RedisError::Unexpected(error.into()),
    }
}

/// There is no connection to Redis.
#[derive(Debug, thiserror::Error)]
#[error("cannot connect to {address}")]
pub(crate) struct NotConnected {
    /// The URL without its password.
    pub(crate) address: String,
    /// The reason of the client.
    pub(crate) source: redis::RedisError,
}

/// An error and its causes, each once.
fn told(error: &(dyn std::error::Error + 'static)) -> String {
    let mut told: Vec<String> = Vec::new();
    for cause in std::iter::successors(Some(error), |&error| error.source()) {
        let text = cause.downcast_ref().and_then(answer).unwrap_or_else(|| cause.to_string());
        if !told.iter().any(|before| before.contains(&text)) {
            told.push(text);
        }
    }
    told.join(": ")
}

/// Returns the answer of Redis as it was sent; of a pipeline, the answer to the first command that failed.
fn answer(error: &redis::RedisError) -> Option<String> {
    let errors = error.clone().into_server_errors()?;
    let (_, first) = errors.first()?;
    Some(format!("{} {}", first.code(), first.details().unwrap_or_default()).trim_end().to_owned())
}

/// What the server put before the message; of a pipeline, what it said to the first command that failed.
fn code(error: &redis::RedisError) -> Option<String> {
    if let Some(inner) = error.detail().and_then(code_in_script) {
        return Some(inner.to_owned());
    }
    if let Some(code) = error.code() {
        return Some(code.to_owned());
    }
    error.clone().into_server_errors()?.first().map(|(_, error)| error.code().to_owned())
}

/// The code of an error that a command within a script met. Before version 7 the server answers
/// `ERR Error running script (call to f_…): @user_script:16: -OOM command not allowed …`, and to a missing right
/// without any code.
fn code_in_script(text: &str) -> Option<&str> {
    if text.contains("user executing the script can't") {
        return Some("NOPERM");
    }
    let (_, inner) = text.strip_prefix("Error running script")?.split_once(": -")?;
    let code = inner.split(|letter: char| !letter.is_ascii_uppercase()).next()?;
    (!code.is_empty()).then_some(code)
}

#[cfg(test)]
mod tests {
    use deadpool_redis::redis::{Value, parse_redis_value};

    use super::*;

    fn answered(text: &str) -> RedisError {
        let answer = parse_redis_value(format!("-{text}\r\n").as_bytes());
        answer.and_then(Value::extract_error).unwrap_err().into()
    }

    #[test]
    fn an_error_within_a_script_counts_as_what_it_is() {
        let script = |inner: &str| {
            answered(&format!("ERR Error running script (call to f_0a1b): @user_script:16: {inner}"))
        };
        assert!(script("-OOM command not allowed when used memory > 'maxmemory'.").is_out_of_memory());
        for passing in [
            "-READONLY You can't write against a read only replica.",
            "-MISCONF Redis is configured to save RDB snapshots, but it's currently unable to persist to disk.",
            "-NOREPLICAS Not enough good replicas to write.",
            "-BUSY Redis is busy running a script.",
            "-LOADING Redis is loading the dataset in memory",
            "-CLUSTERDOWN Hash slot not served",
        ] {
            assert!(script(passing).is_retryable(), "{passing}");
        }
        let keys = script(
            "The user executing the script can't access at least one of the keys mentioned in the command arguments",
        );
        assert!(keys.is_about_keys(), "{keys:?}");
        let command = script("The user executing the script can't run this command or subcommand");
        assert!(matches!(&command, RedisError::Refused { code, .. } if code == "NOPERM"), "{command:?}");
        assert!(!command.is_about_keys());
        let other = script("Wrong number of args calling Redis command From Lua script");
        assert!(matches!(other, RedisError::Unexpected(_)), "{other:?}");
    }
}
