//! The loop that applies events: fetch, invalidate, acknowledge.

use std::sync::Arc;
use std::time::{Duration, Instant};

use async_nats::jetstream::consumer::PullConsumer;
use async_nats::jetstream::consumer::pull::{self, MessagesErrorKind};
use async_nats::jetstream::{AckKind, Message};
use cache::{Applied, Redis, RedisError, Work};
use event::{Envelope, Traceparent};
use futures::{FutureExt, StreamExt};
use metrics::{counter, gauge, histogram};
use service::{Backoff, Component, Report, SaidLately, Shutdown, failpoint, trace};
use tokio::sync::watch;
use tracing::Span;

use crate::dead::{self, DeadLetters};
use crate::heartbeat::{self, Heartbeats};
use crate::metrics as names;
use crate::{Config, FAILPOINTS};

/// Most messages asked for at once, and so most that wait in memory.
const FETCH_MESSAGES: usize = 64;

/// Most bytes asked for at once, unless one message may be larger.
const FETCH_BYTES: usize = 4 * 1024 * 1024;

/// A batch is applied when it has this many keys, whatever else is ready.
const BATCH_KEYS: usize = 20_000;

/// Most spans opened for one message; the rest of a large batch is not worth its memory.
const MAX_SPANS: usize = 16;

/// How long a request for messages stays open on the server, and how often it says that it is alive.
const FETCH_EXPIRES: Duration = Duration::from_secs(30);
const FETCH_HEARTBEAT: Duration = Duration::from_secs(5);

/// A fetch that NATS has not refused for so long is a good one.
const GOOD_FETCH: Duration = Duration::from_millis(500);

/// After so long a message comes again of which Redis has refused a key.
pub(crate) const REFUSED_PAUSE: Duration = Duration::from_secs(10);

/// Pauses after a failure of Redis or NATS.
const MIN_RETRY_DELAY: Duration = Duration::from_millis(50);
const MAX_RETRY_DELAY: Duration = Duration::from_secs(2);

/// What all workers share.
#[derive(Debug)]
pub struct Shared {
    /// The cache.
    pub redis: Redis,
    /// Where undecodable messages go.
    pub dead: DeadLetters,
    /// The durable consumer, while the stream is known to be whole.
    pub consumer: watch::Receiver<Option<PullConsumer>>,
    /// Where the heartbeats of applied batches go.
    pub heartbeats: Heartbeats,
    /// Options.
    pub config: Config,
    /// Largest message the broker delivers, in bytes.
    pub max_payload: usize,
}

/// Messages in hand and what they ask for.
#[derive(Default)]
struct Batch {
    messages: Vec<Message>,
    work: Work,
    events: u64,
    /// Enqueue time of the oldest event of each message.
    oldest_us: Vec<i64>,
    bytes: usize,
    /// When the newest heartbeat among the messages was sent.
    heartbeat_us: Option<i64>,
    /// Spans of traced messages; each lasts until its message is acknowledged.
    spans: Vec<Span>,
}

/// Applies messages until shutdown is requested, then finishes the batch in hand.
pub async fn run(shared: Arc<Shared>, health: Component, shutdown: Shutdown) {
    let mut retry = Backoff::new(MIN_RETRY_DELAY, MAX_RETRY_DELAY);
    let mut consumer = shared.consumer.clone();
    while !shutdown.is_requested() {
        // Without a relay there is nothing to take. Whatever else keeps the consumer away, the supervisor says.
        if shared.config.debezium_stream.is_some() && consumer.borrow().is_none() {
            health.ready();
        }
        health.idle();
        let current = tokio::select! {
            () = shutdown.requested() => break,
            current = consumer.wait_for(Option::is_some) => match current {
                Ok(current) => current.clone(),
                Err(_) => break,
            },
        };
        let Some(current) = current else { continue };
        health.beat();
        consumer.mark_unchanged();
        let fetched = match messages(&current, shared.max_payload).await {
            Ok(stream) => pump(&shared, stream, &mut consumer, &mut retry, &health, &shutdown).await,
            Err(error) => Err(error),
        };
        if let Err(error) = fetched {
            let report = Report::of(error.as_ref());
            if retry.attempts() == 0 {
                tracing::warn!(error = %report, "cannot fetch messages; trying again");
            } else {
                health.not_ready(format!("cannot fetch messages: {report}"));
            }
        }
        tokio::select! {
            () = shutdown.requested() => {}
            () = tokio::time::sleep(retry.next_delay()) => {}
        }
    }
}

async fn messages(consumer: &PullConsumer, max_payload: usize) -> Result<pull::Stream, async_nats::Error> {
    Ok(consumer
        .stream()
        .max_messages_per_batch(FETCH_MESSAGES)
        // A limit below the size of one message would stop the consumer for ever.
        .max_bytes_per_batch(FETCH_BYTES.max(max_payload.saturating_mul(2)))
        .expires(FETCH_EXPIRES)
        .heartbeat(FETCH_HEARTBEAT)
        .messages()
        .await?)
}

/// Takes batches from the stream until it ends, the consumer is replaced or shutdown is requested. A fetch that NATS refuses
/// ends at once; one that lasts is a good one, whether messages come or not.
async fn pump(
    shared: &Shared,
    mut stream: pull::Stream,
    consumer: &mut watch::Receiver<Option<PullConsumer>>,
    retry: &mut Backoff,
    health: &Component,
    shutdown: &Shutdown,
) -> Result<(), async_nats::Error> {
    let good = tokio::time::sleep(GOOD_FETCH);
    tokio::pin!(good);
    let mut is_good = false;
    loop {
        health.idle();
        let next = tokio::select! {
            () = shutdown.requested() => return Ok(()),
            changed = consumer.changed() => {
                if changed.is_ok() { return Ok(()); }
                continue;
            }
            () = &mut good, if !is_good => None,
            next = stream.next() => Some(next),
        };
        health.beat();
        if !is_good && !matches!(next, Some(Some(Err(_)) | None)) {
            is_good = true;
            retry.reset();
            health.ready();
        }
        let Some(next) = next else { continue };
        let first = match next {
            Some(Ok(message)) => message,
            Some(Err(error)) if matches!(error.kind(), MessagesErrorKind::MissingHeartbeat) => {
                tracing::debug!("NATS misses a heartbeat; the fetch goes on by itself");
                continue;
            }
            Some(Err(error)) => return Err(error.into()),
            None => return Ok(()),
        };
        let mut batch = Batch::default();
        shared.take(&mut batch, first).await;
        while batch.has_room()
            && let Some(Some(Ok(message))) = stream.next().now_or_never()
        {
            shared.take(&mut batch, message).await;
        }
        if !batch.messages.is_empty() {
            shared.settle(batch, health, shutdown).await;
        }
    }
}

impl Batch {
    fn has_room(&self) -> bool {
        self.messages.len() < FETCH_MESSAGES && self.work.keys() < BATCH_KEYS && self.bytes < FETCH_BYTES
    }

    fn add(&mut self, message: Message, envelope: &Envelope) {
        self.bytes += message.payload.len();
        self.heartbeat_us = self.heartbeat_us.max(heartbeat::sent_us(message.headers.as_ref()));
        self.events += envelope.events.len() as u64;
        envelope.events.iter().for_each(|event| self.work.add(event));
        self.oldest_us.extend(envelope.events.iter().map(|event| event.at_us).min());
        self.spans.extend(spans(&message, envelope));
        self.messages.push(message);
    }
}

/// The parts of the writers' traces that happen here. The header of a message with one event names the relay's span; in a
/// batch each event names its writer's.
fn spans(message: &Message, envelope: &Envelope) -> Vec<Span> {
    let header = message.headers.as_ref().and_then(|headers| headers.get("traceparent"));
    let parents: Vec<Traceparent> = match header.and_then(|header| Traceparent::new(header.as_str()).ok()) {
        Some(parent) => vec![parent],
        None => {
            envelope.events.iter().filter_map(|event| event.traceparent.clone()).take(MAX_SPANS).collect()
        }
    };
    parents
        .iter()
        .map(|parent| {
            let span = tracing::info_span!("invalidate", subject = %message.subject);
            trace::parent_from(&span, parent.as_str());
            span
        })
        .collect()
}

impl Shared {
    /// Adds a message to the batch, or sets it aside if it is poison.
    async fn take(&self, batch: &mut Batch, message: Message) {
        if message.info().is_ok_and(|info| info.delivered > 1) {
            counter!(names::REDELIVERIES).increment(1);
        }
        if dead::pass_over(&message).await {
            return;
        }
        match Envelope::decode(&message.payload) {
            Ok(envelope) => batch.add(message, &envelope),
            Err(error) => match self.dead.set_aside(&message, &error).await {
                Ok(()) => {
                    counter!(names::MESSAGES, "result" => "dead_letter").increment(1);
                    counter!(names::DEAD_LETTERS).increment(1);
                }
                // Not acknowledged, so it comes again.
                Err(failure) => {
                    tracing::warn!(error = %Report::of(failure.as_ref()), "cannot set aside a message that cannot be decoded; it comes again")
                }
            },
        }
    }

    /// Applies a batch, for as long as it takes, and acknowledges it. Given up on shutdown: the messages are then delivered
    /// to somebody else. Messages with keys that the user of Redis may not touch come again later, and hold up nobody.
    async fn settle(&self, batch: Batch, health: &Component, shutdown: &Shutdown) {
        let mut retry = Backoff::new(MIN_RETRY_DELAY, MAX_RETRY_DELAY);
        let mut said = SaidLately::default();
        let mut kept_alive = Instant::now();
        loop {
            let started = Instant::now();
            let redis = self.redis.after_failures(retry.attempts());
            match apply(&redis, &batch.work, &batch.messages, self.config.ack_wait, health).await {
                Ok(applied) => {
                    histogram!(names::APPLY_TIME).record(started.elapsed());
                    counter!(names::KEYS_PRESENT).increment(applied.deleted);
                    counter!(names::UPDATES, "outcome" => "replaced").increment(applied.updated);
                    counter!(names::UPDATES, "outcome" => "ignored").increment(applied.ignored);
                    break;
                }
                Err(error @ RedisError::KeysRefused { .. }) => {
                    counter!(names::REDIS_FAILURES).increment(1);
                    return self.settle_refused(batch, &error, health, shutdown).await;
                }
                Err(error) => {
                    counter!(names::REDIS_FAILURES).increment(1);
                    gauge!(names::REDIS_UP).set(0.0);
                    let report = Report::of(&error).to_string();
                    health.not_ready(format!("Redis does not apply invalidations: {report}"));
                    if said.is_news(&report) {
                        tracing::warn!(
                            error = report,
                            "Redis does not apply invalidations; keeping them until it does"
                        );
                    }
                }
            }
            tokio::select! {
                () = shutdown.requested() => return,
                () = tokio::time::sleep(retry.next_delay()) => {}
            }
            if kept_alive.elapsed() >= self.config.ack_wait / 3 {
                kept_alive = Instant::now();
                keep_alive(&batch.messages).await;
            }
        }
        if retry.attempts() > 0 {
            tracing::info!(keys = batch.work.keys(), "Redis applies invalidations again");
            health.ready();
        }
        failpoint::hit(FAILPOINTS[0]).await;
        for message in &batch.messages {
            if let Err(error) = message.ack().await {
                tracing::debug!(error = %Report::of(error.as_ref()), "could not acknowledge a message; it will be applied once more");
            }
        }
        failpoint::hit(FAILPOINTS[1]).await;
        self.heartbeats.applied(batch.heartbeat_us);
        batch.count();
    }
}

impl Shared {
    /// Takes the messages of a batch one by one, to tell those that are refused from the others.
    async fn settle_refused(
        &self,
        batch: Batch,
        error: &RedisError,
        health: &Component,
        shutdown: &Shutdown,
    ) {
        if let [message] = &*batch.messages {
            tracing::warn!(error = %Report::of(error), "invalidations are refused; trying them again in {REFUSED_PAUSE:?}");
            if let Err(error) = message.ack_with(AckKind::Nak(Some(REFUSED_PAUSE))).await {
                tracing::debug!(error = %Report::of(error.as_ref()), "could not give back a message; it comes again later");
            }
            return;
        }
        for message in batch.messages {
            let Ok(envelope) = Envelope::decode(&message.payload) else { continue };
            let mut single = Batch::default();
            single.add(message, &envelope);
            Box::pin(self.settle(single, health, shutdown)).await;
        }
    }
}

/// One attempt to apply what `messages` say. Searching a large cache for a namespace may take longer than messages may be
/// in hand, so they are kept meanwhile.
pub(crate) async fn apply(
    redis: &Redis,
    work: &Work,
    messages: &[Message],
    ack_wait: Duration,
    health: &Component,
) -> Result<Applied, RedisError> {
    let applying = redis.apply(work);
    tokio::pin!(applying);
    loop {
        match tokio::time::timeout(ack_wait / 3, &mut applying).await {
            Ok(applied) => return applied,
            Err(_) => {
                health.beat();
                keep_alive(messages).await;
            }
        }
    }
}

/// Tells NATS that messages are still being worked on.
pub(crate) async fn keep_alive(messages: &[Message]) {
    for message in messages {
        let _ = message.ack_with(AckKind::Progress).await;
    }
}

impl Batch {
    fn count(&self) {
        gauge!(names::REDIS_UP).set(1.0);
        counter!(names::MESSAGES, "result" => "applied").increment(self.messages.len() as u64);
        counter!(names::EVENTS_APPLIED).increment(self.events);
        counter!(names::KEYS_INVALIDATED).increment(self.work.keys() as u64);
        counter!(names::NAMESPACES_INVALIDATED).increment(self.work.namespaces().len() as u64);
        let now = chrono::Utc::now().timestamp_micros();
        for oldest in &self.oldest_us {
            let microseconds = now.saturating_sub(*oldest).max(0).cast_unsigned();
            histogram!(names::ENQUEUE_TO_DELETE).record(Duration::from_micros(microseconds));
        }
    }
}
