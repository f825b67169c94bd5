use std::time::Duration;

use anyhow::Context;
use async_nats::jetstream::consumer::{AckPolicy, DeliverPolicy, PullConsumer, pull};
use async_nats::jetstream::stream::Stream;
use async_nats::jetstream::{self};

use crate::Config;

/// Most change events delivered but not acknowledged, over all subscribers of a cache. Each waits for its repetition, so
/// this divided by the pause is the highest lasting rate.
const MAX_ACK_PENDING: i64 = 50_000;

/// Time on top of the pause before the repetition until a message counts as lost.
const ACK_MARGIN: Duration = Duration::from_secs(30);

/// Name of the durable consumer of Debezium's stream.
pub(crate) fn durable(config: &Config) -> String {
    format!("{}-debezium", config.durable)
}

/// Time until an unacknowledged change event is delivered again.
pub(super) fn ack_wait(config: &Config) -> Duration {
    config.debezium_repeat_after + ACK_MARGIN
}

/// Finds Debezium's stream, and creates the durable consumer or brings it up to date.
///
/// # Errors
/// The server's answer, naming the option.
pub(super) async fn open(
    config: &Config,
    jetstream: &jetstream::Context,
) -> anyhow::Result<(Stream, PullConsumer)> {
    let name = config.debezium_stream.as_deref().unwrap_or_default();
    let stream = jetstream
        .get_stream(name)
        .await
        .with_context(|| format!("SUBSCRIBER_DEBEZIUM_STREAM (--debezium-stream) {name} cannot be used"))?;
    let durable = durable(config);
    let wanted = pull::Config {
        durable_name: Some(durable.clone()),
        description: Some("Invalidates the keys of one cache by Debezium's change events".to_owned()),
        deliver_policy: DeliverPolicy::All,
        ack_policy: AckPolicy::Explicit,
        // Follows the pause, so a consumer that exists is updated.
        ack_wait: ack_wait(config),
        max_deliver: -1,
        max_ack_pending: MAX_ACK_PENDING,
        ..Default::default()
    };
    let consumer = stream
        .create_consumer(wanted)
        .await
        .map_err(|error| anyhow::anyhow!(error))
        .with_context(|| format!("cannot create durable consumer {durable}"))?;
    Ok((stream, consumer))
}
