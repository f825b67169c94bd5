//! Change events of Debezium, by the same rules: for those who run Debezium Server with its NATS JetStream sink already.
//!
//! Debezium acts on the write-ahead log and so may be ahead of what new snapshots see: a reader may fill the old value again
//! after the delete. The relay waits for visibility; here every change is applied once more after a while instead, which
//! is a mitigation and no promise. Messages are acknowledged after the repetition.

mod envelope;

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use async_nats::jetstream::consumer::pull::{self, MessagesErrorKind};
use async_nats::jetstream::consumer::{AckPolicy, DeliverPolicy, PullConsumer};
use async_nats::jetstream::{self, AckKind, Message};
use cache::{Redis, RedisError, Work};
use futures::{FutureExt, StreamExt};
use metrics::counter;
use rules::Rules;
use service::{Backoff, Component, Report, Shutdown, UsageError};
use tokio::sync::Semaphore;
use tokio_util::task::TaskTracker;

pub use envelope::{DebeziumError, decode};

use crate::dead::DeadLetters;
use crate::metrics as names;
use crate::worker::REFUSED_PAUSE;
use crate::{Config, worker};

/// Most messages applied together.
const BATCH_MESSAGES: usize = 256;

/// Most batches that wait for their repetition.
const MAX_WAITING_BATCHES: usize = 64;

/// Messages in hand: as many as wait, and a batch that is being fetched.
const MAX_ACK_PENDING: i64 = ((MAX_WAITING_BATCHES + 1) * BATCH_MESSAGES) as i64;

/// Signs of life that NATS is asked for while nothing comes.
const HEARTBEAT: Duration = Duration::from_secs(5);

/// Time on top of the pause before the repetition until a message counts as lost.
const ACK_MARGIN: Duration = Duration::from_secs(30);

/// Pauses after a failure of Redis or NATS.
const MIN_RETRY_DELAY: Duration = Duration::from_millis(50);
const MAX_RETRY_DELAY: Duration = Duration::from_secs(2);

/// What applies the change events.
#[derive(Debug)]
pub struct Debezium {
    rules: Rules,
    consumer: PullConsumer,
    redis: Redis,
    dead: DeadLetters,
    repeat_after: Duration,
    ack_wait: Duration,
}

/// Reads the rules and prepares the consumer; `None` if no stream of Debezium is configured.
///
/// # Errors
/// What is wrong with options, rules or stream.
pub async fn prepare(
    config: &Config,
    jetstream: &jetstream::Context,
    redis: &Redis,
) -> anyhow::Result<Option<Debezium>> {
    let Some(stream_name) = &config.debezium_stream else { return Ok(None) };
    let file = config.rules.as_ref().ok_or_else(|| {
        UsageError(
            "SUBSCRIBER_RULES (--rules) is not set; SUBSCRIBER_DEBEZIUM_STREAM needs the rules file"
                .to_owned(),
        )
    })?;
    let rules = Rules::load(file).map_err(|error| UsageError::of(&error))?;
    for table in rules.tables() {
        if let Some(expand) = table.expand.first() {
            let unusable = format!(
                "{}:{}: table {}: expand asks the database, which the subscriber does not know; remove it, or capture \
                 with the relay",
                rules.file(),
                expand.sql.line,
                table.qualified_name()
            );
            return Err(UsageError(unusable).into());
        }
    }
    let stream = jetstream.get_stream(stream_name).await.with_context(|| {
        format!("SUBSCRIBER_DEBEZIUM_STREAM (--debezium-stream) {stream_name} cannot be used")
    })?;
    let durable = durable(config);
    let ack_wait = config.debezium_repeat_after + ACK_MARGIN;
    let wanted = pull::Config {
        durable_name: Some(durable.clone()),
        description: Some("Invalidates the keys of one cache by Debezium's change events".to_owned()),
        deliver_policy: DeliverPolicy::All,
        ack_policy: AckPolicy::Explicit,
        ack_wait,
        max_deliver: -1,
        max_ack_pending: MAX_ACK_PENDING,
        ..Default::default()
    };
    // Brings a consumer that is there already up to date: its time to acknowledge follows the pause.
    let consumer = stream
        .create_consumer(wanted)
        .await
        .map_err(|error| anyhow::anyhow!(error))
        .with_context(|| format!("cannot create durable consumer {durable}"))?;
    Ok(Some(Debezium {
        rules,
        consumer,
        redis: redis.clone(),
        dead: DeadLetters::new(jetstream.clone()),
        repeat_after: config.debezium_repeat_after,
        ack_wait,
    }))
}

/// Name of the durable consumer of Debezium's stream.
pub(crate) fn durable(config: &Config) -> String {
    format!("{}-debezium", config.durable)
}

impl Debezium {
    /// Applies change events until shutdown is requested. What is not acknowledged by then is delivered again.
    pub async fn run(self, health: Component, shutdown: Shutdown) {
        let this = Arc::new(self);
        let waiting = Arc::new(Semaphore::new(MAX_WAITING_BATCHES));
        let tasks = TaskTracker::new();
        let mut retry = Backoff::new(MIN_RETRY_DELAY, MAX_RETRY_DELAY);
        while !shutdown.is_requested() {
            if let Err(error) = this.fetch(&waiting, &tasks, &mut retry, &health, &shutdown).await {
                tracing::warn!(error, "cannot fetch Debezium's change events; trying again");
                health.not_ready(format!("cannot fetch Debezium's change events: {error}"));
            }
            tokio::select! {
                () = shutdown.requested() => {}
                () = tokio::time::sleep(retry.next_delay()) => {}
            }
        }
        tasks.close();
        tasks.wait().await;
    }

    /// Fetches until shutdown is requested or it fails.
    async fn fetch(
        self: &Arc<Self>,
        waiting: &Arc<Semaphore>,
        tasks: &TaskTracker,
        retry: &mut Backoff,
        health: &Component,
        shutdown: &Shutdown,
    ) -> Result<(), String> {
        // A consumer that is gone does not show before the first message is missed.
        self.consumer.get_info().await.map_err(|error| error.to_string())?;
        let asking = self.consumer.stream().max_messages_per_batch(BATCH_MESSAGES).heartbeat(HEARTBEAT);
        let messages = asking.messages().await.map_err(|error| error.to_string())?;
        health.ready();
        retry.reset();
        self.pump(messages, waiting, tasks, health, shutdown).await.map_err(|error| error.to_string())
    }

    async fn pump(
        self: &Arc<Self>,
        mut messages: pull::Stream,
        waiting: &Arc<Semaphore>,
        tasks: &TaskTracker,
        health: &Component,
        shutdown: &Shutdown,
    ) -> Result<(), pull::MessagesError> {
        loop {
            health.idle();
            let first = tokio::select! {
                () = shutdown.requested() => return Ok(()),
                next = messages.next() => next,
            };
            health.beat();
            let first = match first {
                Some(Ok(first)) => first,
                Some(Err(error)) if matches!(error.kind(), MessagesErrorKind::MissingHeartbeat) => continue,
                Some(Err(error)) => return Err(error),
                None => return Ok(()),
            };
            let mut batch = Vec::new();
            let mut work = Work::new();
            self.take(first, &mut batch, &mut work).await;
            while batch.len() < BATCH_MESSAGES
                && let Some(Some(Ok(message))) = messages.next().now_or_never()
            {
                self.take(message, &mut batch, &mut work).await;
            }
            let Ok(permit) = Arc::clone(waiting).acquire_owned().await else { return Ok(()) };
            let (this, health, shutdown) = (Arc::clone(self), health.clone(), shutdown.clone());
            tasks.spawn(async move {
                this.settle(&batch, &work, &health, &shutdown).await;
                drop(permit);
            });
        }
    }

    async fn take(&self, message: Message, batch: &mut Vec<Message>, work: &mut Work) {
        match decode(&message.payload, &self.rules) {
            Ok(events) => {
                events.iter().for_each(|event| work.add(event));
                batch.push(message);
            }
            Err(error) => match self.dead.set_aside(&message, &error).await {
                Ok(()) => counter!(names::DEAD_LETTERS).increment(1),
                Err(failure) => {
                    tracing::warn!(error = %Report::of(failure.as_ref()), "cannot set aside a change event that cannot be decoded");
                }
            },
        }
    }

    /// Applies a batch twice with the pause between, then acknowledges it.
    async fn settle(&self, batch: &[Message], work: &Work, health: &Component, shutdown: &Shutdown) {
        if !work.is_empty() {
            if let Err(refused) = self.apply(batch, work, health, shutdown).await {
                return self.settle_refused(batch, &refused, health, shutdown).await;
            }
            tokio::select! {
                () = shutdown.requested() => return,
                () = tokio::time::sleep(self.repeat_after) => {}
            }
            if let Err(refused) = self.apply(batch, work, health, shutdown).await {
                return self.settle_refused(batch, &refused, health, shutdown).await;
            }
        }
        if shutdown.is_requested() {
            return;
        }
        for message in batch {
            if let Err(error) = message.ack().await {
                tracing::debug!(error = %Report::of(error.as_ref()), "could not acknowledge a change event; it will be applied once more");
            }
        }
        counter!(names::DEBEZIUM_MESSAGES).increment(batch.len() as u64);
    }

    /// Tells the messages with keys that the user of Redis may not touch from the others: they come again later.
    async fn settle_refused(
        &self,
        batch: &[Message],
        error: &RedisError,
        health: &Component,
        shutdown: &Shutdown,
    ) {
        if let [message] = batch {
            tracing::warn!(error = %Report::of(error), "change events are refused; trying them again in {REFUSED_PAUSE:?}");
            if let Err(error) = message.ack_with(AckKind::Nak(Some(REFUSED_PAUSE))).await {
                tracing::debug!(error = %Report::of(error.as_ref()), "could not give back a change event; it comes again later");
            }
            return;
        }
        let singly = batch.iter().map(async |message| {
            let mut work = Work::new();
            if let Ok(events) = decode(&message.payload, &self.rules) {
                events.iter().for_each(|event| work.add(event));
            }
            Box::pin(self.settle(std::slice::from_ref(message), &work, health, shutdown)).await;
        });
        futures::future::join_all(singly).await;
    }

    /// Applies a batch for as long as it takes, or until shutdown is requested. An error if keys of it are refused.
    async fn apply(
        &self,
        batch: &[Message],
        work: &Work,
        health: &Component,
        shutdown: &Shutdown,
    ) -> Result<(), RedisError> {
        let mut retry = Backoff::new(MIN_RETRY_DELAY, MAX_RETRY_DELAY);
        let mut kept_alive = Instant::now();
        while !shutdown.is_requested() {
            let redis = self.redis.after_failures(retry.attempts());
            let Err(error) = worker::apply(&redis, work, batch, self.ack_wait, health).await else {
                if retry.attempts() > 0 {
                    health.ready();
                }
                return Ok(());
            };
            counter!(names::REDIS_FAILURES).increment(1);
            if matches!(error, RedisError::KeysRefused { .. }) {
                return Err(error);
            }
            health.not_ready(format!("Redis does not apply change events: {}", Report::of(&error)));
            if retry.attempts() == 0 {
                tracing::warn!(error = %Report::of(&error), "Redis does not apply change events; keeping them until it does");
            }
            if kept_alive.elapsed() >= self.ack_wait / 3 {
                kept_alive = Instant::now();
                worker::keep_alive(batch).await;
            }
            tokio::select! {
                () = shutdown.requested() => {}
                () = tokio::time::sleep(retry.next_delay()) => {}
            }
        }
        Ok(())
    }
}
