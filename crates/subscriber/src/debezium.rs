//! Change events of Debezium, by the same rules: for those who run Debezium Server with its NATS JetStream sink already.
//!
//! Debezium acts on the write-ahead log and so may be ahead of what new snapshots see: a reader may fill the old value again
//! after the delete. The relay waits for visibility; here every change is applied at once, and once more after a while, which
//! is a mitigation and no promise. Messages are acknowledged after the repetition.

mod column;
mod consumer;
mod decoder;
mod delivery;
mod envelope;
mod identity;
mod lane;
mod memory;
mod poison;
mod watch;

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use async_nats::jetstream::consumer::pull::{self, MessagesErrorKind};
use async_nats::jetstream::{self, Message};
use cache::Redis;
use event::CommittedEvent;
use futures::StreamExt;
use metrics::{counter, gauge};
use rules::{Lock, Rules};
use service::{Backoff, Component, Health, Limits, Report, Shutdown, UsageError};
use tokio::sync::Semaphore;
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};
use tokio_util::task::TaskTracker;

pub(crate) use consumer::durable;
pub use decoder::{Decoded, Decoder, Kind, Remark};
use delivery::{Delivery, Part};
pub use envelope::DebeziumError;
use lane::{Lane, Next};
use memory::Memory;
use poison::Poison;

use crate::Config;
use crate::metrics as names;

/// Most messages asked for at once, and so most that wait undecoded.
const FETCH_MESSAGES: usize = 1_000;

/// Most keys in hand, those that wait for their repetition included. It bounds the memory.
const MAX_KEYS_IN_HAND: usize = 500_000;

/// Signs of life that NATS is asked for while nothing comes.
const HEARTBEAT: Duration = Duration::from_secs(5);

/// Said at the start without a lock file.
const NO_LOCK: &str = "the types of the columns are not known, since there is no lock file: without schemas in Debezium's \
                       messages every change invalidates the key prefixes of its table; with schemas, bit(1), bytea, money and \
                       name cannot be told from booleans and text; run `relay rules check --lock` and set SUBSCRIBER_RULES_LOCK";

/// Pauses after a failure of NATS.
const MIN_RETRY_DELAY: Duration = Duration::from_millis(50);
const MAX_RETRY_DELAY: Duration = Duration::from_secs(2);

/// Applies the change events.
#[derive(Debug)]
pub struct Debezium {
    decoder: Decoder,
    jetstream: jetstream::Context,
    redis: Redis,
    config: Config,
    in_hand: Arc<Semaphore>,
}

/// Reads the rules; `None` if no stream of Debezium is configured.
///
/// # Errors
/// The problem of options, rules or stream.
pub async fn prepare(
    config: &Config,
    jetstream: &jetstream::Context,
    redis: &Redis,
) -> anyhow::Result<Option<Debezium>> {
    if config.debezium_stream.is_none() {
        return Ok(None);
    }
    let rules = load_rules(config)?;
    let lock = load_lock(config, &rules)?;
    if lock.is_none() {
        tracing::warn!("{NO_LOCK}");
    }
    consumer::open(config, jetstream).await?;
    Ok(Some(Debezium {
        decoder: Decoder::new(rules, lock),
        jetstream: jetstream.clone(),
        redis: redis.clone(),
        config: config.clone(),
        in_hand: Arc::new(Semaphore::new(MAX_KEYS_IN_HAND)),
    }))
}

/// Reads the lock file that is named, or the one beside the rules if there is one.
fn load_lock(config: &Config, rules: &Rules) -> Result<Option<Lock>, UsageError> {
    let beside = config.rules.as_ref().map(|file| file.with_extension("lock")).filter(|file| file.exists());
    let Some(file) = config.rules_lock.as_ref().or(beside.as_ref()) else { return Ok(None) };
    Lock::load(file, rules).map(Some).map_err(|error| UsageError::of(&error))
}

fn load_rules(config: &Config) -> Result<Rules, UsageError> {
    let file = config.rules.as_ref().ok_or_else(|| {
        UsageError(
            "SUBSCRIBER_RULES (--rules) is not set; SUBSCRIBER_DEBEZIUM_STREAM needs the rules file"
                .to_owned(),
        )
    })?;
    let rules = Rules::load(file).map_err(|error| UsageError::of(&error))?;
    for table in rules.tables() {
        if let Some(expand) = table.expand.first() {
            return Err(UsageError(format!(
                "{}:{}: table {}: expand asks the database, which the subscriber does not know; remove it, or capture \
                 with the relay",
                rules.file(),
                expand.sql.line,
                table.qualified_name()
            )));
        }
    }
    Ok(rules)
}

impl Debezium {
    /// Applies change events until shutdown is requested. What is not acknowledged by then is given back and delivered
    /// again.
    pub async fn run(self, health: Health, limits: Limits, shutdown: Shutdown) {
        let lanes = TaskTracker::new();
        let watch =
            watch::run(self.config.clone(), self.jetstream.clone(), self.redis.clone(), shutdown.clone());
        lanes.spawn(watch);
        let mut pump = Pump {
            keys: self.spawn_lanes(&lanes, &health, limits, &shutdown),
            poison: Poison::spawn(&lanes, self.jetstream.clone(), &self.config),
            memory: Memory::default(),
            health: health.component("debezium", limits),
            shutdown: shutdown.clone(),
            debezium: self,
        };
        pump.run().await;
        let client = pump.debezium.jetstream.client();
        drop(pump);
        lanes.close();
        lanes.wait().await;
        // The process ends soon; acknowledgements must not end with it.
        if let Err(error) = client.flush().await {
            tracing::debug!(%error, "cannot flush acknowledgements; change events will be applied once more");
        }
    }

    /// Starts the lanes and returns the queue of the first one. Slow scans for prefixes and repetitions have lanes of their
    /// own, so that no single key waits for them.
    fn spawn_lanes(
        &self,
        tasks: &TaskTracker,
        health: &Health,
        limits: Limits,
        shutdown: &Shutdown,
    ) -> UnboundedSender<Delivery> {
        let start = |name, part, next| {
            let (sender, queue) = unbounded_channel();
            let lane = Lane {
                queue,
                part,
                next,
                redis: self.redis.clone(),
                repeat_after: self.config.debezium_repeat_after,
                ack_wait: consumer::ack_wait(&self.config),
                health: health.component(name, limits),
                shutdown: shutdown.clone(),
            };
            tasks.spawn(lane.run());
            sender
        };
        let repetition = start("debezium repetition", Part::Keys, Next::Acknowledge);
        let repeated_prefixes = start("debezium repeated prefixes", Part::Everything, Next::Acknowledge);
        let prefixes = start("debezium prefixes", Part::Prefixes, Next::Repetition(repeated_prefixes));
        start("debezium keys", Part::Keys, Next::Prefixes { prefixes, repetition })
    }
}

/// Fetches change events, decodes them and hands them to the lanes.
struct Pump {
    debezium: Debezium,
    keys: UnboundedSender<Delivery>,
    poison: Poison,
    memory: Memory,
    health: Component,
    shutdown: Shutdown,
}

impl Pump {
    async fn run(&mut self) {
        let mut retry = Backoff::new(MIN_RETRY_DELAY, MAX_RETRY_DELAY);
        while !self.shutdown.is_requested() {
            if let Err(error) = self.fetch(&mut retry).await {
                let error = Report::of(error.as_ref()).to_string();
                tracing::warn!(error, "cannot fetch Debezium's change events; trying again");
                self.health.not_ready(format!("cannot fetch Debezium's change events: {error}"));
            }
            let _ = self.shutdown.or_done(tokio::time::sleep(retry.next_delay())).await;
        }
    }

    /// Fetches until shutdown is requested or it fails. A stream or a consumer that was deleted is found or created anew by
    /// the next call.
    async fn fetch(&mut self, retry: &mut Backoff) -> anyhow::Result<()> {
        let (_, consumer) = consumer::open(&self.debezium.config, &self.debezium.jetstream).await?;
        let asking = consumer.stream().max_messages_per_batch(FETCH_MESSAGES).heartbeat(HEARTBEAT);
        let messages = asking.messages().await.context("cannot ask for messages")?;
        self.health.ready();
        retry.reset();
        self.pump(messages).await.context("the delivery of messages ended")
    }

    async fn pump(&mut self, mut messages: pull::Stream) -> Result<(), pull::MessagesError> {
        loop {
            self.health.idle();
            let next = self.shutdown.or_done(messages.next()).await.flatten();
            self.health.beat();
            match next {
                Some(Ok(message)) => self.take(message).await,
                Some(Err(error)) if matches!(error.kind(), MessagesErrorKind::MissingHeartbeat) => {}
                Some(Err(error)) => return Err(error),
                None => return Ok(()),
            }
        }
    }

    async fn take(&mut self, message: Message) {
        match self.debezium.decoder.decode(&message.payload) {
            Ok(decoded) => {
                self.observe(&decoded);
                decoded.remarks.into_iter().for_each(|remark| self.memory.say(remark));
                self.hand_over(message, decoded.events, decoded.committed_us).await;
            }
            Err(error) => self.poison.set_aside(message, error),
        }
    }

    fn observe(&self, decoded: &Decoded) {
        counter!(names::DEBEZIUM_MESSAGES, "kind" => decoded.kind.as_str()).increment(1);
        if decoded.is_incomplete {
            counter!(names::DEBEZIUM_UNKNOWN).increment(1);
        }
        if let Kind::Heartbeat(made_ms) = decoded.kind {
            #[expect(clippy::cast_precision_loss, reason = "milliseconds since 1970 are far below 2^53")]
            gauge!(names::DEBEZIUM_HEARTBEAT).set(made_ms as f64 / 1_000.0);
        }
    }

    /// Hands the invalidations of a message to the first lane. Waits while too many keys are in hand.
    async fn hand_over(&self, message: Message, events: Vec<CommittedEvent>, committed_us: Option<i64>) {
        let (_, acker) = message.split();
        let keys = events.iter().map(|event| event.keys.len()).sum::<usize>().clamp(1, MAX_KEYS_IN_HAND);
        // A Redis that is down is the lanes' concern, not a stall of this loop.
        self.health.idle();
        let share = u32::try_from(keys).unwrap_or(u32::MAX);
        let share = Arc::clone(&self.debezium.in_hand).acquire_many_owned(share);
        let Some(Ok(share)) = self.shutdown.or_done(share).await else { return };
        // The lane ends only after this loop.
        let _ = self.keys.send(Delivery::new(acker, events, committed_us, share));
    }
}
