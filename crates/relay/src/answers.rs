//! Answers to what subscribers ask: from when on a stream is complete, and how transactions ended.

use chrono::{DateTime, Utc};
use event::nats::{
    COVERAGE_SUBJECT, CoverageReply, CoverageRequest, MAX_OUTCOMES, Missing, OUTCOME_SUBJECT, OutcomeReply,
    OutcomeRequest,
};
use futures::{StreamExt, stream};
use metrics::counter;
use outbox::republication::{Refill, refill};
use outbox::{TransactionId, outcome};
use serde_json::Value;
use service::nats::Nats;
use service::{Report, Shutdown};
use sqlx::PgPool;

use crate::database::{PATIENCE, within};
use crate::metrics as names;

/// Relays share the questions between them.
const QUEUE_GROUP: &str = "relay";

/// Answers until shutdown is requested. A question that cannot be answered is left to time out: the subscriber asks
/// again.
///
/// # Errors
/// If a subject cannot be subscribed to.
pub async fn run(pool: PgPool, nats: Nats, shutdown: Shutdown) -> Result<(), async_nats::SubscribeError> {
    let about_streams = nats.client.queue_subscribe(COVERAGE_SUBJECT, QUEUE_GROUP.to_owned()).await?;
    let about_outcomes = nats.client.queue_subscribe(OUTCOME_SUBJECT, QUEUE_GROUP.to_owned()).await?;
    let mut questions = stream::select(about_streams, about_outcomes);
    loop {
        let question = tokio::select! {
            () = shutdown.requested() => return Ok(()),
            question = questions.next() => question,
        };
        let Some(question) = question else { return Ok(()) };
        let Some(reply_to) = question.reply else { continue };
        let subject = question.subject.as_str();
        match answer(&pool, subject, &question.payload).await {
            Ok(reply) => {
                if let Err(error) = nats.client.publish(reply_to, reply.to_string().into()).await {
                    tracing::warn!(%error, "could not answer a subscriber");
                }
            }
            Err(error) => {
                tracing::warn!(error = %Report::of(error.as_ref()), subject, "could not answer a subscriber");
            }
        }
    }
}

async fn answer(pool: &PgPool, subject: &str, question: &[u8]) -> anyhow::Result<Value> {
    let reply = match subject {
        OUTCOME_SUBJECT => serde_json::to_value(outcomes(pool, serde_json::from_slice(question)?).await?),
        _ => serde_json::to_value(coverage(pool, serde_json::from_slice(question)?).await?),
    };
    Ok(reply?)
}

async fn coverage(pool: &PgPool, question: CoverageRequest) -> anyhow::Result<CoverageReply> {
    let created = DateTime::from_timestamp_micros(question.stream_created_us).unwrap_or_default();
    let missing_is_retained = match question.missing {
        Some(missing) => Some(refilled(pool, created, missing).await?),
        None => None,
    };
    let coverage = within(PATIENCE, outbox::stream::coverage(pool, created)).await?;
    Ok(CoverageReply {
        complete_since_us: coverage.complete_since.map(|time| time.timestamp_micros()),
        retained_since_us: coverage.retained_since.timestamp_micros(),
        republish_remaining: Some(coverage.remaining.unsigned_abs()),
        missing_is_retained,
    })
}

/// Lets what a subscriber misses be published again; says whether it can be.
async fn refilled(pool: &PgPool, created: DateTime<Utc>, missing: Missing) -> Result<bool, sqlx::Error> {
    let since = DateTime::from_timestamp_micros(missing.since_us).unwrap_or_default();
    let before_seq = i64::try_from(missing.before_seq).unwrap_or(i64::MAX);
    let refill = within(PATIENCE, refill(pool, created, since, before_seq)).await?;
    if let Refill::Begun { messages } = refill {
        counter!(names::STREAM_LOSSES).increment(1);
        tracing::warn!(
            before_seq,
            messages,
            "the stream has lost messages that a subscriber has not read; publishing what is retained since {since} again"
        );
    }
    Ok(refill != Refill::Impossible)
}

async fn outcomes(pool: &PgPool, question: OutcomeRequest) -> anyhow::Result<OutcomeReply> {
    let asked: Vec<TransactionId> = question.transactions.into_iter().take(MAX_OUTCOMES).collect();
    Ok(OutcomeReply { outcomes: within(PATIENCE, outcome::outcomes(pool, &asked)).await? })
}
