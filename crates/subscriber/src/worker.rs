//! The loop that applies events: fetch, invalidate, acknowledge.

use std::collections::{BTreeMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_nats::jetstream::consumer::PullConsumer;
use async_nats::jetstream::consumer::pull::{self, MessagesErrorKind};
use async_nats::jetstream::{AckKind, Message};
use cache::{Outcome, Redis, RedisError, Undone, Work};
use event::{Envelope, Traceparent};
use futures::{FutureExt, StreamExt};
use metrics::{counter, gauge, histogram};
use service::{Backoff, Component, Report, SaidLately, Shutdown, failpoint, trace};
use tokio::sync::{OwnedSemaphorePermit, mpsc, watch};
use tracing::Span;

use crate::dead::{self, DeadLetters};
use crate::heartbeat::{self, Heartbeats};
use crate::held::{self, Account, Held, Room, StreamBegin};
use crate::leftover::{Arrival, Cause, Down};
use crate::metrics as names;
use crate::{Config, FAILPOINTS, namespaces};

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

/// How long a node of a cluster may take to answer before its keys are left to others.
const FIRST_ATTEMPT: Duration = Duration::from_millis(500);

/// After so long keys are tried again that the user of Redis may not touch.
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
    /// Where keys go that cannot be invalidated with the rest of their message.
    pub leftover: mpsc::UnboundedSender<Arrival>,
    /// Nodes of a cluster that are known not to answer, and why.
    pub down: watch::Receiver<Arc<Down>>,
    /// Where namespaces go.
    pub namespaces: mpsc::UnboundedSender<namespaces::Request>,
    /// Memory for messages that are done in part.
    pub room: Room,
    /// Where the stream begins.
    pub stream: watch::Receiver<StreamBegin>,
    /// Options.
    pub config: Config,
    /// Largest message the broker delivers, in bytes.
    pub max_payload: usize,
}

/// Messages in hand and what they ask for.
#[derive(Default)]
struct Batch {
    messages: Vec<Message>,
    /// One per message.
    accounts: Vec<Account>,
    work: Work,
    bytes: usize,
    /// When the newest heartbeat among the messages was sent.
    heartbeat_us: Option<i64>,
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
        envelope.events.iter().for_each(|event| self.work.add(event));
        self.accounts.push(Account {
            events: envelope.events.len() as u64,
            oldest_us: envelope.events.iter().map(|event| event.at_us).min(),
            spans: spans(&message, envelope),
        });
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

    /// Applies a batch and acknowledges it. What a node of a cluster does not take now, or the user of Redis may not touch,
    /// is left to [`Leftover`](crate::leftover::Leftover), and namespaces to [`Namespaces`](crate::namespaces::Namespaces);
    /// they acknowledge the messages concerned. One server that does not answer is waited for here. Given up on shutdown:
    /// the messages are then delivered to somebody else.
    async fn settle(&self, mut batch: Batch, health: &Component, shutdown: &Shutdown) {
        let has_namespaces = !batch.work.take_namespaces().is_empty();
        let mut left = self.avoid(&mut batch.work);
        let Some(outcome) = self.apply_for_long(&mut batch, health, shutdown).await else { return };
        left.extend(outcome.undone.into_iter().map(Left::from));
        let heartbeat_us = batch.heartbeat_us;
        failpoint::hit(FAILPOINTS[0]).await;
        if left.is_empty() && !has_namespaces {
            for (message, account) in batch.messages.iter().zip(&batch.accounts) {
                acknowledge(message).await;
                account.count();
            }
        } else {
            self.hand_over(batch, &left, shutdown).await;
        }
        failpoint::hit(FAILPOINTS[1]).await;
        self.heartbeats.applied(heartbeat_us);
    }

    /// Takes away the keys of nodes that are known not to answer.
    fn avoid(&self, work: &mut Work) -> Vec<Left> {
        let down = Arc::clone(&self.down.borrow());
        let mut left: BTreeMap<String, HashSet<String>> = BTreeMap::new();
        if down.is_empty() {
            return Vec::new();
        }
        for key in work.key_names() {
            let node = self.redis.node_of_key(key);
            if down.contains_key(&node) {
                left.entry(node).or_default().insert(key.to_owned());
            }
        }
        *work = work.filtered(|key| !left.values().any(|keys| keys.contains(key)));
        let reason = |node: &String| down.get(node).cloned().unwrap_or_default();
        left.into_iter()
            .map(|(node, keys)| Left { reason: reason(&node), cause: Cause::Node(node), keys })
            .collect()
    }

    /// The cache for the first attempt. A node of a cluster that is slow is left to others, who have more time.
    fn hasty(&self, failures: u32) -> Redis {
        match self.redis.is_cluster() {
            true => self.redis.limited_to(FIRST_ATTEMPT.min(self.config.redis_timeout)),
            false => self.redis.after_failures(failures),
        }
    }

    /// Applies the keys of a batch until nothing is left to do here; nothing if it is given up.
    async fn apply_for_long(
        &self,
        batch: &mut Batch,
        health: &Component,
        shutdown: &Shutdown,
    ) -> Option<Outcome> {
        let mut retry = Backoff::new(MIN_RETRY_DELAY, MAX_RETRY_DELAY);
        let mut said = SaidLately::default();
        let mut kept_alive = Instant::now();
        loop {
            let started = Instant::now();
            let redis = self.hasty(retry.attempts());
            let applying = redis.apply_keys(&batch.work);
            let outcome = while_kept_alive(applying, &batch.messages, self.config.ack_wait, health).await;
            count(&outcome, &batch.work);
            let Some(error) = self.reason_to_wait(&outcome) else {
                histogram!(names::APPLY_TIME).record(started.elapsed());
                if retry.attempts() > 0 {
                    tracing::info!(keys = batch.work.keys(), "Redis applies invalidations again");
                    gauge!(names::REDIS_UP).set(1.0);
                    health.ready();
                }
                return Some(outcome);
            };
            gauge!(names::REDIS_UP).set(0.0);
            let report = Report::of(error).to_string();
            health.not_ready(format!("Redis does not apply invalidations: {report}"));
            if said.is_news(&report) {
                tracing::warn!(
                    error = report,
                    "Redis does not apply invalidations; keeping them until it does"
                );
            }
            batch.work = batch.work.only(&outcome.keys_left());
            tokio::select! {
                () = shutdown.requested() => return None,
                () = tokio::time::sleep(retry.next_delay()) => {}
            }
            if kept_alive.elapsed() >= self.config.ack_wait / 3 {
                kept_alive = Instant::now();
                keep_alive(&batch.messages).await;
            }
        }
    }

    /// The error for which everything has to wait: that of the one server there is.
    fn reason_to_wait<'a>(&self, outcome: &'a Outcome) -> Option<&'a RedisError> {
        let mut undone = outcome.undone.iter().filter(|undone| !undone.is_refused());
        undone.next().filter(|_| !self.redis.is_cluster()).map(|undone| &undone.error)
    }

    /// Acknowledges the messages that are done, and gives what is left of the others to those who try it again.
    async fn hand_over(&self, batch: Batch, left: &[Left], shutdown: &Shutdown) {
        let mut messages: VecDeque<_> = batch.messages.into_iter().zip(batch.accounts).collect();
        while let Some((message, account)) = messages.pop_front() {
            let mut work = work_of(&message);
            let namespaces = work.take_namespaces();
            let parts: Vec<_> = left
                .iter()
                .map(|left| (&left.cause, &left.reason, work.filtered(|key| left.keys.contains(key))))
                .filter(|(_, _, part)| !part.is_empty())
                .collect();
            if parts.is_empty() && namespaces.is_empty() {
                acknowledge(&message).await;
                account.count();
                continue;
            }
            let bytes = parts.iter().map(|(_, _, part)| part.bytes()).sum::<usize>()
                + namespaces.iter().map(|namespace| namespace.as_str().len()).sum::<usize>();
            let Some(room) = self.room_for(bytes, &message, &messages, shutdown).await else { return };
            let sequence = message.info().map_or(0, |info| info.stream_sequence);
            let created_us = self.stream.borrow().created_us;
            let held = Held::new(message.split().1, account, (created_us, sequence), room);
            // A receiver ends only with the process.
            let _ = self.leftover.send(Arrival::Alive(Arc::downgrade(&held)));
            for (cause, reason, part) in parts {
                let part = Arrival::Keys(cause.clone(), reason.clone(), part, Arc::clone(&held));
                let _ = self.leftover.send(part);
            }
            match namespaces.is_empty() {
                true => held::release(held).await,
                false => drop(self.namespaces.send((namespaces, held))),
            }
        }
    }

    /// Room for a message that is done in part, once there is some; nothing if shutdown is requested before.
    async fn room_for(
        &self,
        bytes: usize,
        message: &Message,
        others: &VecDeque<(Message, Account)>,
        shutdown: &Shutdown,
    ) -> Option<OwnedSemaphorePermit> {
        let room = self.room.take(bytes);
        tokio::pin!(room);
        loop {
            tokio::select! {
                () = shutdown.requested() => return None,
                room = &mut room => return Some(room),
                () = tokio::time::sleep(self.config.ack_wait / 3) => {
                    keep_alive(std::slice::from_ref(message)).await;
                    for (other, _) in others {
                        keep_alive(std::slice::from_ref(other)).await;
                    }
                }
            }
        }
    }
}

/// Keys of a batch that are left to others.
struct Left {
    cause: Cause,
    reason: String,
    keys: HashSet<String>,
}

impl From<Undone> for Left {
    fn from(undone: Undone) -> Self {
        let (cause, reason) = (Cause::of(&undone), Report::of(&undone.error).to_string());
        Self { cause, reason, keys: undone.keys.into_iter().collect() }
    }
}

async fn acknowledge(message: &Message) {
    if let Err(error) = message.ack().await {
        tracing::debug!(error = %Report::of(error.as_ref()), "could not acknowledge a message; it will be applied once more");
    }
}

fn work_of(message: &Message) -> Work {
    let mut work = Work::new();
    if let Ok(envelope) = Envelope::decode(&message.payload) {
        envelope.events.iter().for_each(|event| work.add(event));
    }
    work
}

fn count(outcome: &Outcome, work: &Work) {
    counter!(names::REDIS_FAILURES).increment(outcome.undone.len() as u64);
    counter!(names::KEYS_PRESENT).increment(outcome.applied.deleted);
    counter!(names::UPDATES, "outcome" => "replaced").increment(outcome.applied.updated);
    counter!(names::UPDATES, "outcome" => "ignored").increment(outcome.applied.ignored);
    counter!(names::KEYS_INVALIDATED).increment((work.keys() - outcome.keys_left().len()) as u64);
}

/// Waits for something that may take longer than messages may be in hand.
async fn while_kept_alive<T>(
    working: impl Future<Output = T>,
    messages: &[Message],
    ack_wait: Duration,
    health: &Component,
) -> T {
    tokio::pin!(working);
    loop {
        match tokio::time::timeout(ack_wait / 3, &mut working).await {
            Ok(done) => return done,
            Err(_) => {
                health.beat();
                keep_alive(messages).await;
            }
        }
    }
}

/// Tells NATS that messages are still being worked on.
async fn keep_alive(messages: &[Message]) {
    for message in messages {
        let _ = message.ack_with(AckKind::Progress).await;
    }
}
