//! The durable consumer of this cache: found or created, compared with what it should be, repaired.

mod claim;
mod settings;

use async_nats::jetstream::consumer::{
    self, AckPolicy, DeliverPolicy, FromConsumer, PullConsumer, ReplayPolicy, pull,
};
use async_nats::jetstream::response::Response;
use async_nats::jetstream::stream::Stream;
use async_nats::jetstream::{Context, ErrorCode};
use chrono::{DateTime, Utc};
use event::nats::{STREAM, subject};
use serde_json::{Value, json};

use crate::Config;
use crate::broker::BrokerError;

pub use claim::Claim;
pub use settings::{Differences, Options};

/// Most messages delivered but not acknowledged, over all subscribers of a cache.
const MAX_ACK_PENDING: i64 = 10_000;

/// The durable consumer as it is now.
#[derive(Debug, Clone)]
pub struct Info {
    /// The part that the client library knows.
    pub consumer: consumer::Info,
    /// Every option, those included that the library does not know.
    pub options: Options,
    /// Time until which an operator has paused it, while it is paused.
    pub paused_until: Option<String>,
}

impl Info {
    fn read(answer: Value) -> Result<Self, async_nats::Error> {
        let options = answer.get("config").and_then(Value::as_object).cloned().unwrap_or_default();
        let is_paused = answer.get("paused").and_then(Value::as_bool).unwrap_or_default();
        let until = options.get("pause_until").and_then(Value::as_str).unwrap_or("an unknown time");
        let paused_until = is_paused.then(|| until.to_owned());
        Ok(Self { consumer: serde_json::from_value(answer)?, options, paused_until })
    }

    /// The cache it belongs to, if it says so.
    #[must_use]
    pub fn claim(&self) -> Option<Claim> {
        Claim::parse(self.consumer.config.description.as_deref()?)
    }

    /// Returns true if somebody is asking for messages, or has some in hand.
    #[must_use]
    pub fn is_at_work(&self) -> bool {
        self.consumer.num_waiting > 0
    }

    /// What differs from the options it should have.
    #[must_use]
    pub fn differences(&self, config: &Config) -> Differences {
        Differences::between(&self.options, &settings::options(&wanted(config)))
    }
}

/// Looks for the durable consumer.
///
/// # Errors
/// Whatever JetStream says, except that there is none.
pub async fn find(jetstream: &Context, durable: &str) -> Result<Option<Info>, async_nats::Error> {
    let request = format!("CONSUMER.INFO.{STREAM}.{durable}");
    match jetstream.request::<_, _, Response<Value>>(request, &json!({})).await? {
        Response::Ok(answer) => Info::read(answer).map(Some),
        Response::Err { error } if error.error_code() == ErrorCode::CONSUMER_NOT_FOUND => Ok(None),
        Response::Err { error } => Err(error.into()),
    }
}

/// Creates the durable consumer with a claim. It begins at `since`, or with everything that is in the stream.
///
/// # Errors
/// [`BrokerError::Consumer`]; on nats-server 2.10 and later also if somebody else has just created it.
pub async fn create(
    stream: &Stream,
    config: &Config,
    since: Option<DateTime<Utc>>,
    claim: &Claim,
) -> Result<PullConsumer, BrokerError> {
    let durable = &config.durable;
    let deliver_policy =
        since.map_or(DeliverPolicy::All, |start_time| DeliverPolicy::ByStartTime { start_time });
    let wanted = consumer::Config { deliver_policy, description: Some(claim.describe()), ..wanted(config) };
    let refused = |source| BrokerError::Consumer { durable: durable.clone(), source };
    let wanted = pull::Config::try_from_consumer_config(wanted).map_err(refused)?;
    let created = stream.create_consumer_strict(wanted).await.map_err(|error| refused(error.into()))?;
    tracing::info!(durable, "created the durable consumer");
    Ok(created)
}

/// Gives the durable consumer the options it should have, and this claim.
///
/// # Errors
/// Whatever JetStream says, for example that an option cannot be changed.
pub async fn update(
    stream: &Stream,
    info: &Info,
    config: &Config,
    claim: &Claim,
) -> Result<(), async_nats::Error> {
    let actual = info.consumer.config.clone();
    let wanted = wanted(config);
    // Where it began and what it is stored in cannot be changed; what is not ours to decide stays.
    let changed = consumer::Config {
        description: Some(claim.describe()),
        name: actual.name,
        deliver_policy: actual.deliver_policy,
        num_replicas: actual.num_replicas,
        memory_storage: actual.memory_storage,
        metadata: actual.metadata,
        sample_frequency: actual.sample_frequency,
        max_waiting: actual.max_waiting,
        inactive_threshold: actual.inactive_threshold,
        ..wanted
    };
    stream.create_consumer(pull::Config::try_from_consumer_config(changed)?).await?;
    Ok(())
}

/// The subject of the topic that is wanted; `None` if all are.
#[must_use]
pub fn filter(config: &Config) -> Option<String> {
    config.topic.as_ref().map(subject)
}

/// The options that decide what is delivered, and when.
fn wanted(config: &Config) -> consumer::Config {
    consumer::Config {
        durable_name: Some(config.durable.clone()),
        ack_policy: AckPolicy::Explicit,
        ack_wait: config.ack_wait,
        max_deliver: -1,
        filter_subject: filter(config).unwrap_or_default(),
        replay_policy: ReplayPolicy::Instant,
        max_ack_pending: MAX_ACK_PENDING,
        ..Default::default()
    }
}
