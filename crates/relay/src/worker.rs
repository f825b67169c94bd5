//! The loop that moves events: claim, publish, settle.

use std::sync::Arc;
use std::time::{Duration, Instant};

use async_nats::jetstream;
use metrics::{counter, histogram};
use outbox::{Claim, ClaimOptions, Claimed, Poison, wait_for_events};
use service::nats::Nats;
use service::{Backoff, Component, Report, Shutdown, failpoint};
use sqlx::PgPool;
use tokio::sync::{Notify, watch};

use crate::database::{PATIENCE, within};
use crate::heartbeat::LastClaim;
use crate::keeper::not_connected;
use crate::metrics as names;
use crate::pace::FromSeq;
use crate::packing::{Limits, pack};
use crate::publisher::{self, PublishError};
use crate::stream::Usable;
use crate::{Config, FAILPOINTS};

/// Bytes of keys and values in one claim: with a few claims in flight the relay's memory stays in the tens of megabytes
/// whatever the events hold.
const CLAIM_BYTES: i64 = 4 * 1024 * 1024;

/// How often the outbox is searched from its beginning, for rows whose transactions committed late.
pub const SWEEP_INTERVAL: Duration = Duration::from_secs(1);

/// Pauses after a failure of Postgres or the broker.
const MIN_RETRY_DELAY: Duration = Duration::from_millis(50);
const MAX_RETRY_DELAY: Duration = Duration::from_secs(2);

/// Time for the statements of a claim on top of the time for publishing, before the server takes the rows back.
const LEASE_MARGIN: Duration = Duration::from_secs(5);

/// How long Postgres may take to answer a wait that it is to end after a quarter of a second.
const WAIT_PATIENCE: Duration = Duration::from_secs(5);

/// What all workers share.
#[derive(Debug)]
pub struct Shared {
    /// The database.
    pub pool: PgPool,
    /// The broker.
    pub nats: Nats,
    /// JetStream with the publish timeout.
    pub jetstream: jetstream::Context,
    /// The stream while it is usable, and else why it is not.
    pub stream: watch::Receiver<Result<Usable, String>>,
    /// Asks the keeper to look at the stream now.
    pub suspect_stream: Arc<Notify>,
    /// When a claim last came to an end.
    pub last_claim: LastClaim,
    /// Wakes a resting worker: there is more than one can take.
    pub more: Notify,
    /// Options.
    pub config: Config,
}

/// Why a cycle failed. Both kinds give every claimed row back and are tried again for ever.
#[derive(Debug, thiserror::Error)]
enum CycleError {
    #[error("Postgres failed")]
    Database(#[from] sqlx::Error),
    #[error("publishing failed")]
    Broker(#[from] PublishError),
    #[error("the stream is not usable yet")]
    NoStream,
}

/// What a cycle did.
#[derive(Debug, Clone, Copy)]
struct Cycle {
    rows: usize,
    full: bool,
    last_seq: Option<i64>,
}

/// Runs the worker that polls: it finds new events first, and wakes the others when there are more than it can take.
/// Returns when shutdown is requested, with nothing in hand.
pub async fn poll(shared: Arc<Shared>, health: Component, shutdown: Shutdown) {
    let mut from_seq = FromSeq::new();
    let mut last_sweep = Instant::now();
    let sweeps_alone = shared.config.workers == 1;
    let mut retry = Backoff::new(MIN_RETRY_DELAY, MAX_RETRY_DELAY);
    // Rows that another relay holds wake every wait and can be claimed by nobody.
    let mut held_elsewhere = Backoff::new(shared.config.poll_min, shared.config.poll_max);
    let mut wait_first = false;
    while !shutdown.is_requested() {
        if !usable(&shared, &health, &shutdown).await {
            continue;
        }
        let sweep = sweeps_alone && last_sweep.elapsed() >= SWEEP_INTERVAL;
        let from = if sweep { 0 } else { from_seq.now() };
        let waits = wait_first && !sweep;
        let outcome =
            if waits { wait_and_cycle(&shared, from).await } else { cycle(&shared, from).await.map(Some) };
        match outcome {
            Ok(done) => {
                shared.last_claim.note();
                health.ready();
                retry.reset();
                if sweep {
                    last_sweep = Instant::now();
                }
                let Some(done) = done else { continue };
                from_seq.saw(done.last_seq, done.full);
                if done.full {
                    shared.more.notify_one();
                }
                // After rows the next claim follows at once: a wait is a round trip, and there usually is more.
                wait_first = done.rows == 0;
                if done.rows > 0 {
                    held_elsewhere.reset();
                } else if waits {
                    rest(held_elsewhere.next_delay(), &shutdown).await;
                }
            }
            Err(error) => recover(&shared, &health, &mut retry, error, &shutdown).await,
        }
    }
}

/// Runs a worker that helps while there is a backlog and otherwise sweeps for late commits. Returns when shutdown is
/// requested, with nothing in hand.
pub async fn help(shared: Arc<Shared>, health: Component, sweeps: bool, shutdown: Shutdown) {
    let mut retry = Backoff::new(MIN_RETRY_DELAY, MAX_RETRY_DELAY);
    let mut last_sweep = Instant::now();
    let mut from = 0;
    let mut busy = false;
    while !shutdown.is_requested() {
        if !usable(&shared, &health, &shutdown).await {
            continue;
        }
        if !busy {
            let sweep_due =
                if sweeps { SWEEP_INTERVAL.saturating_sub(last_sweep.elapsed()) } else { Duration::MAX };
            health.idle();
            tokio::select! {
                () = shared.more.notified() => {}
                () = tokio::time::sleep(sweep_due) => {}
                () = shutdown.requested() => continue,
            }
            health.beat();
        }
        if sweeps && last_sweep.elapsed() >= SWEEP_INTERVAL {
            from = 0;
            last_sweep = Instant::now();
        }
        match cycle(&shared, from).await {
            Ok(done) => {
                health.ready();
                retry.reset();
                busy = done.full;
                from = done.last_seq.map_or(from, |seq| seq + 1);
                if done.full {
                    shared.more.notify_one();
                }
            }
            Err(error) => recover(&shared, &health, &mut retry, error, &shutdown).await,
        }
    }
}

impl Shared {
    /// What may be published to now, or why nothing may.
    pub fn usable(&self) -> Result<Usable, String> {
        if self.nats.link().connected { self.stream.borrow().clone() } else { Err(not_connected(&self.nats)) }
    }

    /// Waits until [`usable`](Self::usable) may say something else than that nothing may.
    pub async fn usable_changed(&self) {
        let mut stream = self.stream.clone();
        stream.mark_unchanged();
        if !self.nats.link().connected {
            return self.nats.connected().await;
        }
        let is_by_now = stream.borrow().is_ok();
        if !is_by_now && stream.changed().await.is_err() {
            // Without the keeper the process is about to end.
            std::future::pending().await
        }
    }
}

/// Waits until broker and stream are usable; says `false` if that took waiting.
async fn usable(shared: &Shared, health: &Component, shutdown: &Shutdown) -> bool {
    let mut waited = false;
    while let Err(why) = shared.usable() {
        waited = true;
        health.not_ready(why);
        health.idle();
        if shutdown.or_done(shared.usable_changed()).await.is_none() {
            break;
        }
    }
    if waited {
        health.beat();
    }
    !waited
}

async fn rest(pause: Duration, shutdown: &Shutdown) {
    tokio::select! {
        () = tokio::time::sleep(pause) => {}
        () = shutdown.requested() => {}
    }
}

/// The one place that decides what a failed cycle means: the rows are back in the outbox; wait, then try again.
async fn recover(
    shared: &Shared,
    health: &Component,
    retry: &mut Backoff,
    error: CycleError,
    shutdown: &Shutdown,
) {
    counter!(names::CLAIMS, "result" => "failed").increment(1);
    let report = Report::of(&error);
    match &error {
        CycleError::Broker(reason) => {
            counter!(names::PUBLISH_FAILURES, "reason" => reason.reason()).increment(1);
            shared.suspect_stream.notify_one();
            tracing::warn!(error = %report, "could not publish; the events stay in the outbox");
        }
        CycleError::Database(_) => {
            counter!(names::DATABASE_FAILURES).increment(1);
            tracing::warn!(error = %report, "could not claim or settle; the events stay in the outbox");
        }
        CycleError::NoStream => {}
    }
    health.not_ready(report.to_string());
    rest(retry.next_delay(), shutdown).await;
}

/// Waits inside Postgres for something to claim; `None` if nothing came. An empty outbox costs a few short statements a
/// second instead of transactions.
async fn wait_and_cycle(shared: &Shared, from: i64) -> Result<Option<Cycle>, CycleError> {
    counter!(names::STATEMENTS).increment(1);
    let Config { poll_min, poll_max, .. } = shared.config;
    let waiting = wait_for_events(&shared.pool, from, poll_min, poll_max);
    if within(WAIT_PATIENCE, waiting).await? {
        return cycle(shared, from).await.map(Some);
    }
    counter!(names::CLAIMS, "result" => "empty").increment(1);
    Ok(None)
}

/// Claims rows, publishes them and settles the claim. Whatever fails on the way gives the rows back.
async fn cycle(shared: &Shared, from: i64) -> Result<Cycle, CycleError> {
    let stream = shared.usable().map_err(|_| CycleError::NoStream)?;
    let options = ClaimOptions {
        from_seq: from,
        limit: i64::from(shared.config.claim_limit),
        max_bytes: CLAIM_BYTES,
        prepared: !shared.config.transaction_pooler,
    };
    let started = Instant::now();
    let lease = shared.config.publish_timeout + LEASE_MARGIN;
    let (mut claim, claimed, mut poison) = within(lease, Claim::take(&shared.pool, options, lease)).await?;
    counter!(names::STATEMENTS).increment(3);
    let rows = claimed.len() + poison.len();
    if rows == 0 {
        within(PATIENCE, claim.give_back()).await?;
        counter!(names::CLAIMS, "result" => "empty").increment(1);
        return Ok(Cycle { rows, full: false, last_seq: None });
    }
    histogram!(names::CLAIM_TIME).record(started.elapsed());
    counter!(names::CLAIMS, "result" => "rows").increment(1);
    failpoint::hit(FAILPOINTS[0]).await;

    let last_seq = claimed.iter().map(|claimed| claimed.seq).max();
    let published = publish(shared, stream, &claimed, &mut poison).await?;
    drop(claimed);
    failpoint::hit(FAILPOINTS[1]).await;

    let settling = Instant::now();
    if !poison.is_empty() {
        set_aside(&mut claim, &poison).await?;
    }
    if shared.config.retention().is_some() && !published.is_empty() {
        within(PATIENCE, claim.retain(stream.position.created, &published)).await?;
        counter!(names::STATEMENTS).increment(1);
    }
    within(PATIENCE, claim.settle()).await?;
    histogram!(names::SETTLE_TIME).record(settling.elapsed());
    counter!(names::EVENTS_PUBLISHED).increment((rows - poison.len()) as u64);
    counter!(names::MESSAGES_PUBLISHED).increment(published.len() as u64);
    failpoint::hit(FAILPOINTS[2]).await;
    Ok(Cycle { rows, full: rows >= shared.config.claim_limit as usize, last_seq })
}

async fn publish(
    shared: &Shared,
    stream: Usable,
    claimed: &[Claimed],
    poison: &mut Vec<Poison>,
) -> Result<Vec<outbox::retention::Published>, CycleError> {
    let limits = Limits { events: shared.config.envelope_events as usize, bytes: stream.max_body };
    let packing = pack(claimed, limits);
    counter!(names::EVENTS_COALESCED).increment(packing.coalesced as u64);
    for &row in &packing.too_large {
        let reason =
            format!("event is larger than the {} bytes the broker accepts in a message", stream.max_body);
        poison.push(Poison::new(&claimed[row], reason));
    }
    let started = Instant::now();
    let timeout = shared.config.publish_timeout;
    let published =
        publisher::publish(&shared.jetstream, &shared.nats, stream.link, packing.messages, timeout).await?;
    histogram!(names::PUBLISH_TIME).record(started.elapsed());
    if let Some(oldest) = claimed.iter().map(|claimed| claimed.event.at_us).min() {
        histogram!(names::ENQUEUE_TO_PUBLISH).record(seconds_since(oldest));
    }
    Ok(published)
}

async fn set_aside(claim: &mut Claim, poison: &[Poison]) -> Result<(), CycleError> {
    for event in poison {
        tracing::error!(event_id = %event.event_id(), reason = %event.reason, "event set aside as a dead letter");
    }
    counter!(names::DEAD_LETTERS).increment(poison.len() as u64);
    Ok(within(PATIENCE, claim.set_aside(poison)).await?)
}

pub(crate) fn seconds_since(at_us: i64) -> f64 {
    let microseconds = chrono::Utc::now().timestamp_micros().saturating_sub(at_us).max(0);
    Duration::from_micros(microseconds.cast_unsigned()).as_secs_f64()
}
