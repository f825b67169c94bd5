//! Publishes what was read, as soon as it is visible, and confirms the position when everything before it is settled.

use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use chrono::{DateTime, Utc};
use event::History;
use futures::stream::{FuturesUnordered, StreamExt};
use metrics::{counter, gauge, histogram};
use outbox::capture::{self as recorded, Settlement};
use outbox::retention::Published;
use outbox::{Claimed, Poison};
use rules::catalog::{ExpandError, Expander};
use service::{Backoff, Component, Report, failpoint};
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tokio::time::MissedTickBehavior;
use wal::session::Confirmer;
use wal::{Ledger, Lsn, Piece, Snapshot, Ticket};

use super::Capture;
use super::events::{self, Events};
use super::expand::{self, Questions};
use super::reader::{Item, position};
use crate::database::within;
use crate::metrics as names;
use crate::packing::{Limits, pack};
use crate::publisher;
use crate::stream::Usable;
use crate::worker::Shared;

/// Parts of transactions judged and published together.
const BATCH_ITEMS: usize = 512;

/// Batches on their way to the broker at the same time.
const BATCHES_IN_FLIGHT: usize = 4;

/// How often transactions that are not visible yet are judged again.
const GATE_PAUSE: Duration = Duration::from_millis(1);

/// Settling costs a commit, so what is published within this time is settled together.
const SETTLE_INTERVAL: Duration = Duration::from_millis(25);

/// Log that is confirmed although nothing was published in it. Less is left: recording a position writes log itself, and
/// would never come to an end.
const IDLE_CONFIRM_BYTES: u64 = 256 * 1024;

/// A sign of life at least this often, whatever is waited for: all of it has limits of its own.
const SIGN_OF_LIFE: Duration = Duration::from_secs(1);

/// Pauses after a failure of the broker.
const MIN_RETRY_DELAY: Duration = Duration::from_millis(50);
const MAX_RETRY_DELAY: Duration = Duration::from_secs(2);

/// How long Postgres may take to tell what is visible, or to settle. What is published by then is read again.
pub(super) const DATABASE_TIMEOUT: Duration = Duration::from_secs(30);

/// Why the pump stopped.
#[derive(Debug, thiserror::Error)]
pub(super) enum PumpError {
    #[error("cannot ask Postgres which transactions are visible")]
    Snapshot(#[source] sqlx::Error),
    #[error(
        "the write-ahead log comes from timeline {log} and DATABASE_URL leads to timeline {database}: Postgres has failed over"
    )]
    OtherTimeline { log: i64, database: i64 },
    #[error("cannot settle what was published")]
    Settle(#[source] sqlx::Error),
    #[error(transparent)]
    Expand(#[from] ExpandError),
    #[error("cannot ask Postgres for the keys of expand")]
    Ask(#[source] sqlx::Error),
}

/// A part of a transaction that waits to become visible.
struct Waiting {
    piece: Piece,
    permit: OwnedSemaphorePermit,
    ticket: Ticket,
    since: Instant,
    is_late: bool,
}

/// Parts of transactions that JetStream has acknowledged.
struct Acknowledged {
    tickets: Vec<Ticket>,
    /// Their memory is given back when they are settled.
    permits: Vec<OwnedSemaphorePermit>,
    stream: DateTime<Utc>,
    published: Vec<Published>,
    poison: Vec<Poison>,
    events: usize,
}

type Publishing = Pin<Box<dyn Future<Output = Result<Acknowledged, PumpError>> + Send>>;
type Settling = Pin<Box<dyn Future<Output = Result<Lsn, PumpError>> + Send>>;

/// The pump of one session.
pub(super) struct Pump {
    capture: Arc<Capture>,
    expanders: Arc<Vec<Option<Expander>>>,
    /// Timeline of the server whose log is read.
    timeline: i64,
    confirmer: Confirmer,
    health: Component,
    ledger: Ledger,
    waiting: Vec<Waiting>,
    publishing: FuturesUnordered<Publishing>,
    acknowledged: Vec<Acknowledged>,
    settling: Option<Settling>,
    settled_at: Instant,
    /// Last position that was settled.
    settled: Lsn,
}

impl Pump {
    pub(super) fn new(
        capture: Arc<Capture>,
        expanders: Vec<Option<Expander>>,
        timeline: i64,
        confirmer: Confirmer,
        health: Component,
    ) -> Self {
        Self {
            capture,
            expanders: Arc::new(expanders),
            timeline,
            confirmer,
            health,
            ledger: Ledger::default(),
            waiting: Vec::new(),
            publishing: FuturesUnordered::new(),
            acknowledged: Vec::new(),
            settling: None,
            settled_at: Instant::now(),
            settled: Lsn(0),
        }
    }

    /// Runs until the reader has let go of its end and everything it read is settled.
    pub(super) async fn run(mut self, mut items: mpsc::Receiver<Item>) -> Result<(), PumpError> {
        let mut received = Vec::with_capacity(BATCH_ITEMS);
        let mut is_open = true;
        let mut sign_of_life = tokio::time::interval(SIGN_OF_LIFE);
        sign_of_life.set_missed_tick_behavior(MissedTickBehavior::Delay);
        while is_open || !self.is_empty() {
            let has_room = self.publishing.len() < BATCHES_IN_FLIGHT;
            tokio::select! {
                biased;
                _ = sign_of_life.tick() => {
                    self.health.beat();
                    self.capture.reading.set_reached(self.ledger.confirmed());
                }
                Some(acknowledged) = self.publishing.next(), if !self.publishing.is_empty() => {
                    self.acknowledged.push(acknowledged?);
                    failpoint::hit("relay.wal_after_publish").await;
                }
                settled = wait_for(&mut self.settling), if self.settling.is_some() => {
                    self.settled(settled?).await;
                }
                () = tokio::time::sleep_until((self.settled_at + SETTLE_INTERVAL).into()), if self.is_settling_due() => {
                    self.settle();
                }
                count = items.recv_many(&mut received, BATCH_ITEMS), if is_open && has_room => {
                    is_open = count > 0;
                    self.take_in(&mut received);
                    self.publish_visible().await?;
                }
                () = tokio::time::sleep(GATE_PAUSE), if has_room && !self.waiting.is_empty() => {
                    self.publish_visible().await?;
                }
            }
        }
        Ok(())
    }

    /// Whether everything that was taken in is settled.
    fn is_empty(&self) -> bool {
        self.waiting.is_empty()
            && self.publishing.is_empty()
            && self.acknowledged.is_empty()
            && self.settling.is_none()
    }

    fn take_in(&mut self, received: &mut Vec<Item>) {
        let since = Instant::now();
        for item in received.drain(..) {
            match item {
                Item::Piece(piece, permit) => {
                    for missing in &piece.unknown {
                        counter!(names::CAPTURE_UNKNOWN).increment(1);
                        tracing::error!(
                            "{missing}; declaring every key stale that the table's rules can name"
                        );
                    }
                    // Only the last part of a transaction moves the position.
                    let ticket = self.ledger.open(piece.end_lsn.unwrap_or(Lsn(0)));
                    self.waiting.push(Waiting { piece, permit, ticket, since, is_late: false });
                }
                Item::Nothing(lsn) => self.ledger.nothing(lsn),
            }
        }
        gauge!(names::CAPTURE_IN_FLIGHT).set(f64::from(u32::try_from(self.ledger.len()).unwrap_or(u32::MAX)));
    }

    /// Judges everything that waits by one new snapshot, and publishes what readers see by now.
    async fn publish_visible(&mut self) -> Result<(), PumpError> {
        if self.waiting.is_empty() {
            return Ok(());
        }
        let snapshot = within(DATABASE_TIMEOUT, Snapshot::take(&self.capture.shared.pool)).await;
        let snapshot = snapshot.map_err(PumpError::Snapshot)?;
        if snapshot.timeline() != self.timeline {
            return Err(PumpError::OtherTimeline { log: self.timeline, database: snapshot.timeline() });
        }
        let mut batch = Batch { history: snapshot.history(), ..Default::default() };
        let mut still_waiting = Vec::new();
        for mut waiting in self.waiting.drain(..) {
            let xid = snapshot.extend(waiting.piece.commit.xid);
            if snapshot.sees(xid) {
                if waiting.is_late {
                    histogram!(names::CAPTURE_GATE_WAIT).record(waiting.since.elapsed());
                }
                batch.add(waiting, xid);
            } else {
                waiting.is_late = true;
                still_waiting.push(waiting);
            }
        }
        self.waiting = still_waiting;
        if !batch.tickets.is_empty() {
            let (capture, expanders) = (Arc::clone(&self.capture), Arc::clone(&self.expanders));
            self.publishing.push(Box::pin(publish(capture, expanders, batch, self.health.clone())));
        }
        Ok(())
    }

    fn is_settling_due(&self) -> bool {
        let behind = self.ledger.confirmed().0.saturating_sub(self.settled.0);
        self.settling.is_none() && (!self.acknowledged.is_empty() || behind >= IDLE_CONFIRM_BYTES)
    }

    fn settle(&mut self) {
        let mut settlement = Settlement::default();
        let mut permits = Vec::new();
        for acknowledged in self.acknowledged.drain(..) {
            acknowledged.tickets.into_iter().for_each(|ticket| self.ledger.done(ticket));
            if self.capture.shared.config.retention().is_some() {
                settlement.published.push((acknowledged.stream, acknowledged.published));
            }
            settlement.poison.extend(acknowledged.poison);
            permits.extend(acknowledged.permits);
            counter!(names::CAPTURE_PUBLISHED).increment(acknowledged.events as u64);
        }
        let confirmed = self.ledger.confirmed();
        let capture = Arc::clone(&self.capture);
        self.settled_at = Instant::now();
        self.settling = Some(Box::pin(async move {
            let slot = &capture.config.slot;
            let settling = recorded::settle(&capture.shared.pool, slot, confirmed.0, &settlement);
            within(DATABASE_TIMEOUT, settling).await.map_err(PumpError::Settle)?;
            drop(permits);
            Ok(confirmed)
        }));
    }

    /// Only now may the slot hear of it: what it forgets must be retained and recorded.
    async fn settled(&mut self, confirmed: Lsn) {
        self.settling = None;
        self.settled = confirmed;
        failpoint::hit("relay.wal_after_settle").await;
        self.confirmer.confirm(confirmed);
        gauge!(names::CAPTURE_FLUSHED_LSN).set(position(confirmed));
        self.health.ready();
    }
}

/// Cancel-safe: what it waits for stays where it is.
async fn wait_for(settling: &mut Option<Settling>) -> Result<Lsn, PumpError> {
    match settling {
        Some(settling) => settling.await,
        None => std::future::pending().await,
    }
}

/// What is published together.
#[derive(Default)]
struct Batch {
    tickets: Vec<Ticket>,
    permits: Vec<OwnedSemaphorePermit>,
    events: Vec<Claimed>,
    poison: Vec<Poison>,
    questions: Questions,
    history: Option<History>,
}

impl Batch {
    fn add(&mut self, mut waiting: Waiting, xid: u64) {
        histogram!(names::CAPTURE_KEYS)
            .record(f64::from(u32::try_from(waiting.piece.key_count()).unwrap_or(u32::MAX)));
        self.questions.add(&mut waiting.piece, xid);
        let Events { events, poison } = events::of_piece(waiting.piece, xid);
        self.events.extend(events);
        self.poison.extend(poison);
        self.tickets.push(waiting.ticket);
        self.permits.push(waiting.permit);
    }
}

async fn publish(
    capture: Arc<Capture>,
    expanders: Arc<Vec<Option<Expander>>>,
    batch: Batch,
    health: Component,
) -> Result<Acknowledged, PumpError> {
    let Batch { tickets, permits, mut events, mut poison, questions, history } = batch;
    // They are visible, so a new snapshot of the tables that it reads has them.
    events.extend(expand::answer(&capture, &expanders, questions).await?);
    events.iter_mut().for_each(|claimed| claimed.event.history = history);
    let (stream, published) = publish_surely(&capture.shared, &events, &mut poison, &health).await;
    for dead in &poison {
        tracing::error!(event_id = %dead.event_id(), reason = %dead.reason, "event set aside as a dead letter");
    }
    counter!(names::DEAD_LETTERS).increment(poison.len() as u64);
    counter!(names::MESSAGES_PUBLISHED).increment(published.len() as u64);
    if let Some(oldest) = events.iter().map(|claimed| claimed.event.at_us).min() {
        histogram!(names::ENQUEUE_TO_PUBLISH).record(crate::worker::seconds_since(oldest));
    }
    Ok(Acknowledged { tickets, permits, stream, published, poison, events: events.len() })
}

/// Publishes until it succeeds: whatever keeps the broker from taking an event is not the event's fault. Not ready
/// meanwhile, and alive. Returns the identity of the stream that took them.
pub(super) async fn publish_surely(
    shared: &Shared,
    events: &[Claimed],
    poison: &mut Vec<Poison>,
    health: &Component,
) -> (DateTime<Utc>, Vec<Published>) {
    let mut retry = Backoff::new(MIN_RETRY_DELAY, MAX_RETRY_DELAY);
    loop {
        let usable = usable(shared, health).await;
        let limits = Limits { events: shared.config.envelope_events as usize, bytes: usable.max_body };
        let packing = pack(events, limits);
        let patience = shared.config.publish_timeout;
        match publisher::publish(&shared.jetstream, &shared.nats, usable.link, packing.messages, patience)
            .await
        {
            Ok(published) => {
                poison.extend(packing.too_large.iter().map(|&row| {
                    let limit = usable.max_body;
                    let reason =
                        format!("event is larger than the {limit} bytes the broker accepts in a message");
                    Poison::new(&events[row], reason)
                }));
                return (usable.position.created, published);
            }
            Err(error) => {
                counter!(names::PUBLISH_FAILURES, "reason" => error.reason()).increment(1);
                shared.suspect_stream.notify_one();
                let report = Report::of(&error);
                tracing::warn!(error = %report, "could not publish what the write-ahead log says; the slot keeps it");
                health.not_ready(format!("could not publish: {report}; the slot keeps what is in the log"));
                tokio::time::sleep(retry.next_delay()).await;
            }
        }
    }
}

/// Waits until broker and stream are usable; what is not settled is read again.
async fn usable(shared: &Shared, health: &Component) -> Usable {
    loop {
        match shared.usable() {
            Ok(usable) => return usable,
            Err(why) => health.not_ready(why),
        }
        let _ = tokio::time::timeout(SIGN_OF_LIFE, shared.usable_changed()).await;
    }
}
