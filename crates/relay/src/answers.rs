//! Answers to what subscribers ask: from when on a stream is complete.

use chrono::DateTime;
use event::nats::{COVERAGE_SUBJECT, CoverageReply, CoverageRequest};
use futures::StreamExt;
use outbox::retention;
use service::Shutdown;
use service::nats::Nats;
use sqlx::PgPool;

/// Relays share the questions between them.
const QUEUE_GROUP: &str = "relay";

/// Answers until shutdown is requested. A question that cannot be answered is left to time out: the subscriber asks
/// again.
///
/// # Errors
/// If the subject cannot be subscribed to.
pub async fn run(pool: PgPool, nats: Nats, shutdown: Shutdown) -> Result<(), async_nats::SubscribeError> {
    let mut questions = nats.client.queue_subscribe(COVERAGE_SUBJECT, QUEUE_GROUP.to_owned()).await?;
    loop {
        let question = tokio::select! {
            () = shutdown.requested() => return Ok(()),
            question = questions.next() => question,
        };
        let Some(question) = question else { return Ok(()) };
        let Some(reply_to) = question.reply else { continue };
        match answer(&pool, &question.payload).await {
            Ok(reply) => {
                let body = serde_json::to_vec(&reply).expect("plain data always serializes");
                if let Err(error) = nats.client.publish(reply_to, body.into()).await {
                    tracing::warn!(%error, "could not answer a subscriber");
                }
            }
            Err(error) => tracing::warn!(%error, "could not answer a subscriber's question about the stream"),
        }
    }
}

async fn answer(pool: &PgPool, question: &[u8]) -> anyhow::Result<CoverageReply> {
    let question: CoverageRequest = serde_json::from_slice(question)?;
    let created = DateTime::from_timestamp_micros(question.stream_created_us).unwrap_or_default();
    let coverage = retention::coverage(pool, created).await?;
    Ok(CoverageReply {
        complete_since_us: coverage.complete_since.map(|time| time.timestamp_micros()),
        retained_since_us: coverage.retained_since.timestamp_micros(),
    })
}
