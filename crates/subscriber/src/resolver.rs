//! Removes marks that their writers left behind: those who died, or lost the connection, between marking and unmarking.
//!
//! Most such marks go with the event of their transaction. What remains belongs to transactions that never committed,
//! and to marks that arrived late.

use std::collections::{BTreeSet, HashMap};
use std::time::Duration;

use cache::{Redis, RedisError};
use event::CacheKey;
use event::nats::{MAX_OUTCOMES, OUTCOME_SUBJECT, Outcome, OutcomeReply, OutcomeRequest};
use futures::{StreamExt, TryStreamExt, stream};
use metrics::{counter, gauge};
use service::nats::Nats;
use service::{Report, SaidLately, Shutdown};

use crate::metrics as names;

/// A mark that is older was probably left behind. If not, asking about it does no harm.
const ORPHAN_AGE: Duration = Duration::from_secs(5);

/// How often to look for such marks.
const LOOK_INTERVAL: Duration = Duration::from_secs(2);

/// How long a relay may take to answer.
const QUESTION_TIMEOUT: Duration = Duration::from_secs(2);

/// Marks that are removed at the same time.
const CONCURRENT_REMOVALS: usize = 64;

#[derive(Debug, thiserror::Error)]
enum ResolveError {
    #[error("redis does not list or remove marks")]
    Redis(#[from] RedisError),
    #[error("no relay says how transactions ended")]
    NoAnswer,
}

/// Resolves until shutdown is requested. Several subscribers of one cache may do it at the same time: every step can be
/// repeated.
pub async fn run(redis: Redis, nats: Nats, shutdown: Shutdown) {
    let mut said = SaidLately::default();
    loop {
        match resolve(&redis, &nats).await {
            Ok(()) => said.clear(),
            Err(error) => {
                let report = Report::of(&error).to_string();
                if said.is_news(&report) {
                    tracing::warn!(
                        error = report,
                        "cannot resolve marks; their keys are not cached until that works"
                    );
                }
            }
        }
        tokio::select! {
            () = shutdown.requested() => return,
            () = tokio::time::sleep(LOOK_INTERVAL) => {}
        }
    }
}

/// One look at the marks that are old, and the removal of those whose transaction has ended.
async fn resolve(redis: &Redis, nats: &Nats) -> Result<(), ResolveError> {
    let orphans = redis.orphan_marks(ORPHAN_AGE).await?;
    #[expect(clippy::cast_precision_loss, reason = "counts far below 2^52")]
    gauge!(names::ORPHAN_MARKS).set(orphans.len() as f64);
    if orphans.is_empty() {
        return Ok(());
    }
    let xids: BTreeSet<u64> = orphans.iter().map(|(_, xid)| *xid).collect();
    let xids: Vec<u64> = xids.into_iter().take(MAX_OUTCOMES).collect();
    let outcomes = ask(nats, &xids).await?;
    let mut removals = Vec::new();
    for (key, xid) in orphans {
        if let Some(outcome) = outcomes.get(&xid).copied().and_then(name) {
            removals.push(remove(redis, key, xid, outcome));
        }
    }
    stream::iter(removals).buffer_unordered(CONCURRENT_REMOVALS).try_collect::<()>().await
}

async fn ask(nats: &Nats, xids: &[u64]) -> Result<HashMap<u64, Outcome>, ResolveError> {
    let question = OutcomeRequest { xids: xids.to_vec() };
    let body = serde_json::to_vec(&question).expect("plain data always serializes");
    let asked = nats.client.request(OUTCOME_SUBJECT, body.into());
    let answer = tokio::time::timeout(QUESTION_TIMEOUT, asked).await.ok().and_then(Result::ok);
    let reply: Option<OutcomeReply> = answer.and_then(|answer| serde_json::from_slice(&answer.payload).ok());
    let reply = reply.ok_or(ResolveError::NoAnswer)?;
    Ok(xids.iter().copied().zip(reply.outcomes).collect())
}

/// The outcome as metrics name it, if the transaction has ended.
fn name(outcome: Outcome) -> Option<&'static str> {
    match outcome {
        Outcome::Committed => Some("committed"),
        Outcome::Aborted => Some("aborted"),
        Outcome::InProgress => None,
    }
}

async fn remove(redis: &Redis, key: CacheKey, xid: u64, outcome: &'static str) -> Result<(), ResolveError> {
    redis.resolve(&key, xid).await?;
    counter!(names::MARKS_RESOLVED, "outcome" => outcome).increment(1);
    tracing::debug!(%key, xid, outcome, "removed a mark that its writer left behind");
    Ok(())
}
