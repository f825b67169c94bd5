//! The durable consumer of this cache: found or created, judged, kept as configured.

use std::time::Duration;

use async_nats::jetstream::consumer::{
    self, AckPolicy, DeliverPolicy, FromConsumer, PullConsumer, ReplayPolicy, pull,
};
use async_nats::jetstream::stream::Stream;
use chrono::{DateTime, Utc};
use event::nats::subject;
use service::Report;

use crate::Config;
use crate::broker::BrokerError;

/// Most messages delivered but not acknowledged, over all subscribers of a cache.
const MAX_ACK_PENDING: i64 = 10_000;

/// Finds or creates the durable consumer of this cache, and changes what it was created with to what is configured now.
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
        return Ok(update(stream, existing, config).await);
    }
    let wanted = pull::Config {
        durable_name: Some(durable.clone()),
        description: Some("Invalidates the keys of one cache".to_owned()),
        deliver_policy: since
            .map_or(DeliverPolicy::All, |start_time| DeliverPolicy::ByStartTime { start_time }),
        ack_policy: AckPolicy::Explicit,
        ack_wait: config.ack_wait,
        max_deliver: -1,
        filter_subject: filter(config).unwrap_or_default(),
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

/// The subject of the topic that is wanted; `None` if all are.
#[must_use]
pub fn filter(config: &Config) -> Option<String> {
    config.topic.as_ref().map(subject)
}

/// Old servers drop options they do not know, and the consumer may be somebody else's: what is there is judged.
fn check(actual: &consumer::Config, config: &Config) -> Result<(), BrokerError> {
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
    if actual.filter_subject != filter(config).unwrap_or_default() {
        differences.push(format!("its filter subject is '{}'", actual.filter_subject));
    }
    if differences.is_empty() {
        return Ok(());
    }
    Err(BrokerError::Mismatch { durable: config.durable.clone(), difference: differences.join(", ") })
}

/// Times and limits were given when the consumer was created, perhaps with other options. What cannot be changed is said
/// and lived with: it makes redeliveries earlier or later, and loses nothing.
async fn update(stream: &Stream, existing: PullConsumer, config: &Config) -> PullConsumer {
    let actual = &existing.cached_info().config;
    let Some(difference) = difference(actual, config.ack_wait) else { return existing };
    let wanted =
        consumer::Config { ack_wait: config.ack_wait, max_ack_pending: MAX_ACK_PENDING, ..actual.clone() };
    let durable = &config.durable;
    let updated = match pull::Config::try_from_consumer_config(wanted) {
        Ok(wanted) => stream.create_consumer(wanted).await.map_err(async_nats::Error::from),
        Err(error) => Err(error),
    };
    match updated {
        Ok(updated) if self::difference(&updated.cached_info().config, config.ack_wait).is_none() => {
            tracing::info!(durable, "changed the durable consumer as configured: {difference}");
            updated
        }
        Ok(_) => {
            tracing::warn!(durable, "the NATS server does not change the durable consumer: {difference}");
            existing
        }
        Err(error) => {
            tracing::warn!(durable, error = %Report::of(error.as_ref()), "cannot change the durable consumer as configured: {difference}");
            existing
        }
    }
}

fn difference(actual: &consumer::Config, ack_wait: Duration) -> Option<String> {
    let mut differences = Vec::new();
    if actual.ack_wait != ack_wait {
        differences.push(format!("its ack wait is {:?} instead of {ack_wait:?}", actual.ack_wait));
    }
    if actual.max_ack_pending != MAX_ACK_PENDING {
        differences
            .push(format!("its max ack pending is {} instead of {MAX_ACK_PENDING}", actual.max_ack_pending));
    }
    (!differences.is_empty()).then(|| differences.join(", "))
}
