//! Looks at Debezium's stream and its consumer: gauges, and messages that are gone before they were read.

use std::time::Duration;

use async_nats::jetstream;
use async_nats::jetstream::consumer::PullConsumer;
use async_nats::jetstream::stream::Stream;
use cache::Redis;
use metrics::{counter, gauge};
use serde::{Deserialize, Serialize};
use service::{Report, Shutdown};

use super::consumer::durable;
use crate::Config;
use crate::config::GapPolicy;
use crate::metrics as names;

/// Time between two looks.
const INTERVAL: Duration = Duration::from_secs(2);

/// Time that a look or a flush of keys may take before it is given up until the next one.
const PATIENCE: Duration = Duration::from_secs(10);

/// Progress of the consumer. The record is kept in Redis, so that a loss while no subscriber runs is noticed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Progress {
    /// Creation time of the stream, in microseconds since the Unix epoch: its identity.
    stream_created_us: i64,
    /// Sequence of the last message that was delivered, or that is known to be lost.
    delivered: u64,
    /// Deliveries so far, those of the same message again included.
    deliveries: u64,
}

/// Messages that are gone before they were delivered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Loss {
    /// So many, at least.
    Messages(u64),
    /// The stream was created anew; it is not known how many.
    Recreated,
}

impl Progress {
    /// Compares what is seen now with the last look. `first` is the first sequence in the stream, read after `now`.
    ///
    /// Every delivery takes the consumer at most one message further, unless messages in between are gone.
    fn loss(self, now: Self, first: u64) -> Option<Loss> {
        if now.stream_created_us != self.stream_created_us {
            return Some(Loss::Recreated);
        }
        if now.deliveries < self.deliveries {
            // A new consumer reads the stream from its beginning.
            return None;
        }
        let skipped =
            now.delivered.saturating_sub(self.delivered).saturating_sub(now.deliveries - self.deliveries);
        let gone = first.saturating_sub(1).saturating_sub(now.delivered.max(self.delivered));
        Some(Loss::Messages(skipped + gone)).filter(|loss| *loss != Loss::Messages(0))
    }

    /// What to remember of this look: messages that are known to be lost are not counted again.
    fn after(self, first: u64) -> Self {
        Self { delivered: self.delivered.max(first.saturating_sub(1)), ..self }
    }
}

/// Looks every few seconds until shutdown is requested.
pub(super) async fn run(config: Config, jetstream: jetstream::Context, redis: Redis, shutdown: Shutdown) {
    let mut known: Option<Progress> = None;
    while !shutdown.is_requested() {
        let look = tokio::time::timeout(PATIENCE, look(&config, &jetstream, &redis, &mut known));
        match shutdown.or_done(look).await {
            Some(Ok(Err(error))) => {
                tracing::debug!(error = %Report::of(error.as_ref()), "cannot look at Debezium's stream")
            }
            Some(Err(_)) => {
                tracing::debug!("cannot look at Debezium's stream: no answer within {PATIENCE:?}")
            }
            _ => {}
        }
        let _ = shutdown.or_done(tokio::time::sleep(INTERVAL)).await;
    }
}

async fn look(
    config: &Config,
    jetstream: &jetstream::Context,
    redis: &Redis,
    known: &mut Option<Progress>,
) -> anyhow::Result<()> {
    let stream = jetstream.get_stream(config.debezium_stream.as_deref().unwrap_or_default()).await?;
    let consumer: PullConsumer =
        stream.get_consumer(&durable(config)).await.map_err(|error| anyhow::anyhow!(error))?;
    let (now, first) = observe(stream, &consumer).await?;
    if known.is_none() {
        let record = redis.load_position(&durable(config)).await?;
        *known = record.and_then(|record| serde_json::from_slice(&record).ok());
    }
    if let Some(loss) = known.and_then(|known| known.loss(now, first)) {
        settle(config, redis, loss).await?;
    }
    let next = now.after(first);
    if *known != Some(next) {
        redis.store_position(&durable(config), &serde_json::to_vec(&next)?).await?;
        *known = Some(next);
    }
    Ok(())
}

/// Sets the gauges. The stream is asked after the consumer: what is gone by then and was not delivered before is lost.
async fn observe(mut stream: Stream, consumer: &PullConsumer) -> anyhow::Result<(Progress, u64)> {
    let info = consumer.cached_info();
    #[expect(clippy::cast_precision_loss, reason = "numbers of messages are far below 2^53")]
    gauge!(names::DEBEZIUM_PENDING).set(info.num_pending as f64);
    #[expect(clippy::cast_precision_loss, reason = "numbers of messages are far below 2^53")]
    gauge!(names::DEBEZIUM_ACK_PENDING).set(info.num_ack_pending as f64);
    let (delivered, deliveries) = (info.delivered.stream_sequence, info.delivered.consumer_sequence);
    let info = stream.info().await?;
    let stream_created_us = info.created.timestamp_micros();
    Ok((Progress { stream_created_us, delivered, deliveries }, info.state.first_sequence))
}

/// Applies the gap policy, as far as it makes sense here: to consume nothing would leave more keys stale.
async fn settle(config: &Config, redis: &Redis, loss: Loss) -> anyhow::Result<()> {
    let what = match loss {
        Loss::Messages(messages) => format!("{messages} messages are gone that were not read"),
        Loss::Recreated => {
            "the stream was created anew; messages of the former one may not have been read".to_owned()
        }
    };
    let stream = config.debezium_stream.as_deref().unwrap_or_default();
    if config.gap_policy == GapPolicy::Flush {
        let deleted = match config.flush_everything {
            true => redis.flush_all_keys().await?,
            false => redis.delete_matching(&config.flush_patterns).await?,
        };
        tracing::error!(stream, deleted, "{what}; flushed the keys that the gap policy names");
    } else {
        tracing::error!(
            stream,
            "{what}; keys of this cache may be stale: delete them; give the stream larger limits (max age, max bytes)"
        );
    }
    counter!(names::DEBEZIUM_GAPS).increment(1);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const KNOWN: Progress = Progress { stream_created_us: 7, delivered: 100, deliveries: 120 };

    fn seen(delivered: u64, deliveries: u64) -> Progress {
        Progress { stream_created_us: 7, delivered, deliveries }
    }

    #[test]
    fn messages_that_were_never_delivered_are_lost_and_counted_once() {
        for (now, first, loss) in [
            (seen(100, 120), 1, None),
            (seen(150, 170), 140, None),
            // Read, acknowledged and expired since the last look.
            (seen(150, 170), 151, None),
            (seen(150, 170), 161, Some(Loss::Messages(10))),
            (seen(160, 170), 155, Some(Loss::Messages(10))),
            // Deliveries of the same messages again.
            (seen(100, 140), 90, None),
            (seen(100, 140), 111, Some(Loss::Messages(10))),
            // A new consumer.
            (seen(20, 20), 10, None),
            (Progress { stream_created_us: 8, ..seen(1, 1) }, 1, Some(Loss::Recreated)),
        ] {
            assert_eq!(KNOWN.loss(now, first), loss, "{now:?} {first}");
        }
        let known = seen(150, 170).after(161);
        assert_eq!(known.loss(seen(150, 170), 161), None);
        assert_eq!(known.loss(seen(161, 171), 161), None, "the consumer has skipped what is gone");
    }
}
