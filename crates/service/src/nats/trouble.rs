//! What went wrong with NATS, as far as anybody was told.

use std::{
    error::Error,
    sync::{Mutex, MutexGuard, PoisonError},
};

use async_nats::{
    Server, ServerError,
    jetstream::context::{CreateStreamError, CreateStreamErrorKind, RequestError, RequestErrorKind},
};

use crate::{SaidLately, printable, report::causes};

/// Why JetStream did not do what was asked. A right is spoken of only when the server did.
#[derive(Debug, thiserror::Error)]
pub enum JetStreamError {
    /// The connection is lost.
    #[error("{0}")]
    NotConnected(String),
    /// Nobody listens to the API.
    #[error(
        "no JetStream answers at {prefix}.>; enable JetStream on the server (-js) and for the account, or set \
         NATS_JS_DOMAIN to the domain of the stream if this server is a leaf node"
    )]
    NoResponders {
        /// First part of the subjects of the API.
        prefix: String,
    },
    /// The server has refused a publish or a subscription on this connection.
    #[error("no answer from JetStream: the server refuses the NATS user: {0}; give the user this permission")]
    Forbidden(String),
    /// Nothing else is known.
    #[error(
        "no answer from JetStream in time; see the log of the NATS server, it may be overloaded or without a leader"
    )]
    TimedOut,
    /// JetStream has answered with an error.
    #[error("JetStream refuses")]
    Refused(#[source] async_nats::Error),
}

impl JetStreamError {
    /// Whether the same request can succeed a moment later: an answer was lost, or the server has just started.
    #[must_use]
    pub fn may_pass(&self) -> bool {
        match self {
            Self::NotConnected(_) | Self::NoResponders { .. } | Self::TimedOut => true,
            Self::Forbidden(_) => false,
            Self::Refused(error) => code(&error.to_string()).is_some_and(|code| LEADERLESS.contains(&code)),
        }
    }
}

/// Codes of a cluster that is electing.
const LEADERLESS: [&str; 2] = ["10008", "10009"];

/// The code in the text of an answer of JetStream.
fn code(text: &str) -> Option<&str> {
    let (_, rest) = text.rsplit_once("error code ")?;
    rest.get(..5)
}

/// What became of a request without a useful answer.
enum Silence {
    NoResponders,
    TimedOut,
    Answered,
}

/// Memory of the connection's trouble.
#[derive(Debug, Default)]
pub(super) struct Trouble(Mutex<Told>);

#[derive(Debug, Default)]
struct Told {
    said: SaidLately,
    /// Last failure of an attempt to connect.
    attempt: Option<String>,
    /// Last right that the server refused on this connection.
    refusal: Option<String>,
}

impl Trouble {
    fn told(&self) -> MutexGuard<'_, Told> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn connected(&self) {
        *self.told() = Told::default();
    }

    /// Takes in what the client library knows of each server, which it tells nobody. Returns what is worth a log line.
    pub(super) fn attempted(&self, servers: &[Server]) -> Option<String> {
        let failures: Vec<String> = servers
            .iter()
            .filter_map(|server| Some(format!("{}: {}", address(server), server.last_error.as_ref()?)))
            .collect();
        if failures.is_empty() {
            return None;
        }
        let attempt = printable(&failures.join(", "));
        let mut told = self.told();
        told.attempt = Some(attempt.clone());
        told.said.is_news(&attempt).then_some(attempt)
    }

    /// Takes in an error that the server sent. Returns what is worth a log line.
    pub(super) fn refused(&self, error: &ServerError) -> Option<String> {
        let text = printable(error.to_string().trim_start_matches("nats: "));
        let mut told = self.told();
        if text.to_ascii_lowercase().contains("permissions violation") {
            told.refusal = Some(text.clone());
        }
        told.said.is_news(&text).then_some(text)
    }

    pub(super) fn why_not_connected(&self) -> String {
        match &self.told().attempt {
            Some(attempt) => format!("NATS is not connected ({attempt})"),
            None => "NATS is not connected".to_owned(),
        }
    }

    pub(super) fn judge(&self, error: async_nats::Error, prefix: String) -> JetStreamError {
        match silence(error.as_ref()) {
            Silence::Answered => JetStreamError::Refused(error),
            Silence::NoResponders => JetStreamError::NoResponders { prefix },
            Silence::TimedOut => match &self.told().refusal {
                Some(refusal) => JetStreamError::Forbidden(refusal.clone()),
                None => JetStreamError::TimedOut,
            },
        }
    }
}

fn address(server: &Server) -> String {
    format!("{}:{}", server.addr.host(), server.addr.port())
}

fn silence(error: &(dyn Error + 'static)) -> Silence {
    for cause in causes(error) {
        let request = cause.downcast_ref().map(RequestError::kind);
        let create = cause.downcast_ref().map(CreateStreamError::kind);
        let plain = cause.downcast_ref().map(async_nats::RequestError::kind);
        match (request, create, plain) {
            (Some(RequestErrorKind::NoResponders), ..)
            | (_, Some(CreateStreamErrorKind::JetStreamUnavailable), _)
            | (.., Some(async_nats::RequestErrorKind::NoResponders)) => return Silence::NoResponders,
            (Some(RequestErrorKind::TimedOut), ..)
            | (_, Some(CreateStreamErrorKind::TimedOut), _)
            | (.., Some(async_nats::RequestErrorKind::TimedOut)) => {
                return Silence::TimedOut;
            }
            _ => {}
        }
    }
    // Some kinds of errors keep only the text of the one below.
    if error.to_string().ends_with("timed out") { Silence::TimedOut } else { Silence::Answered }
}

/// What to do about an answer of JetStream whose own text does not say it. The text holds `error code 10047`.
pub(crate) fn advice(text: &str) -> Option<&'static str> {
    match code(text)? {
        "10002" => Some("a JetStream limit of the NATS account is reached; raise it, or remove streams"),
        "10005" => Some("fewer servers with JetStream than replicas; start them, or ask for fewer replicas"),
        "10008" | "10009" => Some("the JetStream cluster has no leader; a majority of its servers must run"),
        "10023" | "10028" | "10047" => Some(
            "JetStream has no storage left; raise max_file_store of the server or the limit of the account, or remove \
             streams",
        ),
        "10026" => Some("the limit of consumers is reached; raise max_consumers of account and stream"),
        "10027" => Some("the limit of streams is reached; raise max_streams of the account"),
        "10039" => Some("JetStream is not enabled for this NATS account; enable it"),
        "10074" => Some("replicas need a NATS cluster; set RELAY_STREAM_REPLICAS to 1 on a single server"),
        "10076" => Some("JetStream is not enabled on the NATS server; start it with -js"),
        "10077" => Some("the stream is full or its disk fails; raise max_bytes and max_msgs, or make room"),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_right_is_spoken_of_only_when_the_server_did() {
        let trouble = Trouble::default();
        let timeout = || async_nats::Error::from(RequestError::new(RequestErrorKind::TimedOut));
        let judge = |trouble: &Trouble| trouble.judge(timeout(), "$JS.API".to_owned()).to_string();
        assert!(!judge(&trouble).contains("right"), "{}", judge(&trouble));
        let violation = "Permissions Violation for Publish to \"$JS.API.STREAM.INFO.X\"";
        trouble.refused(&ServerError::Other(violation.to_owned()));
        assert!(judge(&trouble).contains(violation), "{}", judge(&trouble));
        trouble.connected();
        assert!(matches!(trouble.judge(timeout(), String::new()), JetStreamError::TimedOut));
    }

    #[test]
    fn silence_is_told_from_an_answer() {
        let trouble = Trouble::default();
        let of = |error: async_nats::Error| trouble.judge(error, "$JS.API".to_owned());
        let nobody = RequestError::new(RequestErrorKind::NoResponders);
        assert!(matches!(of(nobody.into()), JetStreamError::NoResponders { .. }));
        let nobody = CreateStreamError::new(CreateStreamErrorKind::JetStreamUnavailable);
        assert!(matches!(of(nobody.into()), JetStreamError::NoResponders { .. }));
        assert!(matches!(of("no space left".into()), JetStreamError::Refused(_)));
    }

    #[test]
    fn codes_of_jetstream_have_advice() {
        let text = "jetstream error: insufficient storage resources available (code 500, error code 10047)";
        assert!(advice(text).is_some_and(|advice| advice.contains("max_file_store")));
        assert!(advice("stream not found (code 404, error code 10059)").is_none());
        assert!(advice("nothing of the kind").is_none());
    }
}
