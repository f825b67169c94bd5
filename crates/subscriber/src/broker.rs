//! The stream, the durable consumer and the dead letters on NATS.

use std::time::Duration;

use async_nats::jetstream::consumer::{AckPolicy, DeliverPolicy, PullConsumer, ReplayPolicy, pull};
use async_nats::jetstream::context::{GetStreamError, GetStreamErrorKind};
use async_nats::jetstream::stream::{Config as StreamConfig, DiscardPolicy, Stream};
use async_nats::jetstream::{self, ErrorCode};
use chrono::{DateTime, Utc};
use event::nats::{DEAD_SUBJECTS, STREAM, subject};
use service::nats::Nats;

use crate::Config;
use crate::position::Seen;

/// Stream of messages that could not be decoded.
pub const DEAD_STREAM: &str = "INVALIDATIONS_DEAD";

/// How long dead letters are kept for somebody to look at.
const DEAD_MAX_AGE: Duration = Duration::from_hours(30 * 24);

/// Most bytes of dead letters: a producer of garbage must not fill the disk of the broker.
const DEAD_MAX_BYTES: i64 = 256 * 1024 * 1024;

/// Most messages delivered but not acknowledged, over all subscribers of a cache.
const MAX_ACK_PENDING: i64 = 10_000;

/// Why NATS cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum BrokerError {
    /// The server has no JetStream, or not for this account.
    #[error("JetStream is not enabled on the NATS server or for this account; start it with -js")]
    NoJetStream,
    /// Nobody has created the stream yet.
    #[error("stream {STREAM} does not exist; start a relay, which creates it")]
    NoStream,
    /// The credentials may not use the JetStream API, or NATS is overloaded.
    #[error(
        "no answer from the JetStream API; the NATS user needs permission to publish on $JS.API.> and $JS.ACK.> \
         and to subscribe to _INBOX.>"
    )]
    NoAnswer(#[source] async_nats::Error),
    /// The consumer could not be created.
    #[error("cannot create durable consumer {durable}")]
    Consumer {
        /// Its name.
        durable: String,
        /// What JetStream said.
        #[source]
        source: async_nats::Error,
    },
    /// A consumer of that name does something else.
    #[error(
        "durable consumer {durable} exists with other options: {difference}; delete it or choose another SUBSCRIBER_DURABLE"
    )]
    Mismatch {
        /// Its name.
        durable: String,
        /// What differs.
        difference: String,
    },
}

/// JetStream with timeouts fit for a subscriber.
#[must_use]
pub fn jetstream(nats: &Nats) -> jetstream::Context {
    jetstream::context::ContextBuilder::new()
        .timeout(Duration::from_secs(5))
        .ack_timeout(Duration::from_secs(5))
        .build(nats.client.clone())
}

/// Finds the stream.
///
/// # Errors
/// [`BrokerError`].
pub async fn stream(jetstream: &jetstream::Context) -> Result<Stream, BrokerError> {
    jetstream.get_stream(STREAM).await.map_err(explain)
}

fn explain(error: GetStreamError) -> BrokerError {
    if let GetStreamErrorKind::JetStream(reason) = error.kind() {
        match reason.error_code() {
            ErrorCode::STREAM_NOT_FOUND => return BrokerError::NoStream,
            ErrorCode::JETSTREAM_NOT_ENABLED | ErrorCode::JETSTREAM_NOT_ENABLED_FOR_ACCOUNT => {
                return BrokerError::NoJetStream;
            }
            _ => {}
        }
    }
    if error.to_string().contains("no responders") {
        BrokerError::NoJetStream
    } else {
        BrokerError::NoAnswer(error.into())
    }
}

/// Finds or creates the durable consumer of this cache.
///
/// A new one begins at `since`, or with everything that is in the stream.
///
/// # Errors
/// [`BrokerError`].
pub async fn consumer(
    stream: &Stream,
    config: &Config,
    since: Option<DateTime<Utc>>,
) -> Result<PullConsumer, BrokerError> {
    let durable = config.durable.clone();
    if let Ok(existing) = stream.get_consumer::<pull::Config>(&durable).await {
        check(&existing.cached_info().config, config)?;
        return Ok(existing);
    }
    let wanted = pull::Config {
        durable_name: Some(durable.clone()),
        description: Some("Invalidates the keys of one cache".to_owned()),
        deliver_policy: since
            .map_or(DeliverPolicy::All, |start_time| DeliverPolicy::ByStartTime { start_time }),
        ack_policy: AckPolicy::Explicit,
        ack_wait: config.ack_wait,
        max_deliver: -1,
        filter_subject: filter(config),
        replay_policy: ReplayPolicy::Instant,
        max_ack_pending: MAX_ACK_PENDING,
        ..Default::default()
    };
    let created = stream
        .create_consumer(wanted)
        .await
        .map_err(|error| BrokerError::Consumer { durable: durable.clone(), source: error.into() })?;
    check(&created.cached_info().config, config)?;
    tracing::info!(durable, "created the durable consumer");
    Ok(created)
}

fn filter(config: &Config) -> String {
    config.topic.as_ref().map_or_else(String::new, subject)
}

/// Old servers drop options they do not know, and the consumer may be somebody else's: what is there is judged.
fn check(actual: &async_nats::jetstream::consumer::Config, config: &Config) -> Result<(), BrokerError> {
    let mut differences = Vec::new();
    if actual.deliver_subject.is_some() {
        differences.push("it is a push consumer".to_owned());
    }
    if actual.ack_policy != AckPolicy::Explicit {
        differences.push("its ack policy is not explicit".to_owned());
    }
    if actual.max_deliver > 0 {
        differences.push(format!("it gives up after {} deliveries", actual.max_deliver));
    }
    if actual.filter_subject != filter(config) {
        differences.push(format!("its filter subject is '{}'", actual.filter_subject));
    }
    if differences.is_empty() {
        return Ok(());
    }
    Err(BrokerError::Mismatch { durable: config.durable.clone(), difference: differences.join(", ") })
}

/// Makes sure there is a stream that keeps dead letters.
///
/// # Errors
/// [`BrokerError`].
pub async fn ensure_dead_stream(jetstream: &jetstream::Context) -> Result<(), BrokerError> {
    let wanted = StreamConfig {
        name: DEAD_STREAM.to_owned(),
        description: Some("Messages of INVALIDATIONS that could not be decoded".to_owned()),
        subjects: vec![DEAD_SUBJECTS.to_owned()],
        discard: DiscardPolicy::Old,
        max_age: DEAD_MAX_AGE,
        max_bytes: DEAD_MAX_BYTES,
        ..Default::default()
    };
    match jetstream.get_or_create_stream(wanted).await {
        Ok(_) => Ok(()),
        Err(error) => Err(BrokerError::NoAnswer(error.into())),
    }
}

/// The stream and the consumer as they are now.
///
/// # Errors
/// Whatever JetStream says, for example that the consumer is gone.
pub async fn look(
    stream: &mut Stream,
    consumer: &mut PullConsumer,
) -> Result<(Seen, Pending), async_nats::Error> {
    let info = stream.info().await?.clone();
    let state = consumer.info().await?;
    let seen = Seen {
        stream_created_us: info.created.timestamp_micros(),
        first_seq: info.state.first_sequence,
        last_seq: info.state.last_sequence,
        ack_floor: state.ack_floor.stream_sequence,
    };
    let pending = Pending {
        messages: state.num_pending,
        unacknowledged: state.num_ack_pending as u64,
        redelivered: state.num_redelivered as u64,
        delivered: state.delivered.stream_sequence,
    };
    Ok((seen, pending))
}

/// What a consumer has before it.
#[derive(Debug, Clone, Copy)]
pub struct Pending {
    /// Messages not delivered yet.
    pub messages: u64,
    /// Messages delivered but not acknowledged.
    pub unacknowledged: u64,
    /// Messages delivered more than once and not acknowledged yet.
    pub redelivered: u64,
    /// Last sequence delivered.
    pub delivered: u64,
}
