//! Removes marks that their writers left behind: those who died, or lost the connection, between marking and unmarking.
//!
//! Most such marks go with the event of their transaction. What remains belongs to transactions that never committed,
//! and to marks that arrived late.

mod look;

use std::time::{Duration, Instant};

use cache::{OldMark, Redis, RedisError};
use event::TransactionId;
use event::nats::{MAX_OUTCOMES, OUTCOME_SUBJECT, Outcome, OutcomeReply, OutcomeRequest};
use metrics::{counter, gauge};
use service::nats::Nats;
use service::{Report, SaidLately, Shutdown};

use crate::metrics as names;
use look::{Blocking, Look};

/// A mark that is older was probably left behind. If not, asking about it does no harm.
const ORPHAN_AGE: Duration = Duration::from_secs(5);

/// How often to look for such marks.
const LOOK_INTERVAL: Duration = Duration::from_secs(2);

/// How long a relay may take to answer.
const QUESTION_TIMEOUT: Duration = Duration::from_secs(2);

/// A transaction whose marks are older keeps keys from being cached for so long that somebody should know of it.
const BLOCKING_AGE: Duration = Duration::from_secs(30);

/// How often to say that the same transaction still does.
const SAY_AGAIN: Duration = Duration::from_mins(5);

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
    let mut named = None;
    loop {
        match resolve(&redis, &nats, &mut named).await {
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

/// One look at all marks that are old, and the removal of those whose transaction has ended. Without an answer of a relay
/// they are counted all the same.
async fn resolve(
    redis: &Redis,
    nats: &Nats,
    said: &mut Option<(TransactionId, Instant)>,
) -> Result<(), ResolveError> {
    let mut look = Look::default();
    let mut answered = Ok(());
    let mut pages = redis.old_marks(ORPHAN_AGE).await?;
    while let Some(page) = pages.next().await? {
        if answered.is_ok() {
            answered = ask_about(nats, &mut look, &page).await;
        }
        remove(redis, look.take_ended(page)).await?;
    }
    #[expect(clippy::cast_precision_loss, reason = "counts far below 2^52")]
    gauge!(names::ORPHAN_MARKS).set(look.marks() as f64);
    gauge!(names::OLDEST_ORPHAN_MARK).set(look.oldest().as_secs_f64());
    name_blocking(look.blocking(), said);
    answered
}

/// Asks about the transactions of a page that nobody has asked about in this look.
async fn ask_about(nats: &Nats, look: &mut Look, page: &[OldMark]) -> Result<(), ResolveError> {
    for transactions in look.unknown(page).chunks(MAX_OUTCOMES) {
        look.learn(ask(nats, transactions).await?);
    }
    Ok(())
}

async fn ask(
    nats: &Nats,
    transactions: &[TransactionId],
) -> Result<Vec<(TransactionId, Outcome)>, ResolveError> {
    let question = OutcomeRequest { transactions: transactions.to_vec() };
    let body = serde_json::to_vec(&question).expect("plain data always serializes");
    let asked = nats.client.request(OUTCOME_SUBJECT, body.into());
    let answer = tokio::time::timeout(QUESTION_TIMEOUT, asked).await.ok().and_then(Result::ok);
    let reply: Option<OutcomeReply> = answer.and_then(|answer| serde_json::from_slice(&answer.payload).ok());
    let reply = reply.ok_or(ResolveError::NoAnswer)?;
    Ok(transactions.iter().copied().zip(reply.outcomes).collect())
}

async fn remove(redis: &Redis, ended: Vec<(OldMark, &'static str)>) -> Result<(), ResolveError> {
    let marks: Vec<_> = ended.iter().map(|(old, _)| (old.key.clone(), old.mark)).collect();
    redis.resolve(&marks).await?;
    for (old, outcome) in ended {
        counter!(names::MARKS_RESOLVED, "outcome" => outcome).increment(1);
        tracing::debug!(key = %old.key, mark = %old.mark, outcome, "removed a mark that its writer left behind");
    }
    Ok(())
}

/// Names the transaction that has kept keys from being cached the longest, now and then.
fn name_blocking(blocking: Option<Blocking>, said: &mut Option<(TransactionId, Instant)>) {
    let Some(Blocking { transaction, keys, age, others, outcome }) = blocking else { return };
    let is_known = said.is_some_and(|(known, at)| known == transaction && at.elapsed() < SAY_AGAIN);
    if age < BLOCKING_AGE || is_known {
        return;
    }
    *said = Some((transaction, Instant::now()));
    let why = match outcome {
        Some(Outcome::OtherHistory) => {
            "it belongs to another database or another server, whose own relay and subscriber have to remove its marks"
        }
        Some(_) => "it has not ended; find it in pg_stat_activity (backend_xid) or pg_prepared_xacts",
        None => "no relay has said how it ended",
    };
    tracing::warn!(%transaction, keys, others, "transaction {transaction} has kept {keys} keys from being cached for {age:?}: {why}");
}
