//! Keys that could not be invalidated with the rest of their messages: their node of a Redis Cluster does not answer, or the
//! user of Redis may not touch them. They are tried again, and hold up no others.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::{Arc, Weak};
use std::time::Duration;

use cache::{Outcome, Redis, Undone, Work};
use futures::stream::FuturesUnordered;
use futures::{FutureExt as _, StreamExt as _, future::BoxFuture};
use metrics::{counter, gauge};
use service::{Backoff, Component, Report, Shutdown};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until};

use crate::held::{self, Held, StreamBegin};
use crate::metrics as names;
use crate::worker::REFUSED_PAUSE;

/// Pauses between attempts at a node.
const MIN_RETRY_DELAY: Duration = Duration::from_millis(50);
const MAX_RETRY_DELAY: Duration = Duration::from_secs(1);

/// How often it is shown how many messages are held.
const SHOW_EVERY: Duration = Duration::from_secs(1);

/// As if an attempt had failed at most so often: a node may take four times as long as elsewhere.
const MAX_PATIENCE: u32 = 2;

/// What keys wait for.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Cause {
    /// A node of the cluster.
    Node(String),
    /// Rights of the user of Redis.
    Rights,
}

impl Cause {
    /// The cause of what was not carried out.
    #[must_use]
    pub fn of(undone: &Undone) -> Self {
        if undone.is_refused() { Self::Rights } else { Self::Node(undone.node.clone()) }
    }

    /// The node that keys wait for, if it is one.
    fn node(&self) -> Option<&str> {
        if let Self::Node(node) = self { Some(node) } else { None }
    }
}

/// Nodes of a cluster that do not answer, and why.
pub type Down = BTreeMap<String, String>;

/// What is left of a message.
pub enum Arrival {
    /// Keys to try again.
    Keys(Cause, String, Work, Arc<Held>),
    /// A message that is done in part, to be kept alive.
    Alive(Weak<Held>),
}

/// Keys and who waits for each.
#[derive(Default)]
struct Keys {
    work: Work,
    holders: HashMap<String, Vec<Arc<Held>>>,
}

/// All keys with the same cause.
struct Lot {
    keys: Keys,
    retry: Backoff,
    due: Instant,
    is_running: bool,
    /// Whether the last attempt failed, or none was made yet.
    has_failed: bool,
    /// Why, for people.
    reason: String,
}

/// An attempt that has ended.
struct Attempt {
    cause: Cause,
    keys: Keys,
    outcome: Outcome,
}

/// What tries them again.
pub struct Leftover {
    /// The cache.
    pub redis: Redis,
    /// What is left of messages.
    pub arrivals: mpsc::UnboundedReceiver<Arrival>,
    /// Where others learn which nodes do not answer.
    pub down: watch::Sender<Arc<Down>>,
    /// Where the stream begins.
    pub stream: watch::Receiver<StreamBegin>,
    /// How often messages are kept alive.
    pub keep_alive_every: Duration,
}

#[derive(Default)]
struct State {
    lots: BTreeMap<Cause, Lot>,
    running: FuturesUnordered<BoxFuture<'static, Attempt>>,
    all: Vec<Weak<Held>>,
}

impl Leftover {
    /// Tries keys again until shutdown is requested. Their messages are then delivered to somebody else.
    pub async fn run(mut self, health: Component, shutdown: Shutdown) {
        let mut state = State::default();
        let (mut second, mut alive) = (interval(SHOW_EVERY), interval(self.keep_alive_every));
        second.set_missed_tick_behavior(MissedTickBehavior::Delay);
        alive.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            state.show(&health);
            self.down.send_if_modified(|down| state.update(down));
            health.idle();
            let due = state.due();
            tokio::select! {
                () = shutdown.requested() => return,
                arrival = self.arrivals.recv() => match arrival {
                    Some(arrival) => state.take(arrival),
                    None => return,
                },
                Some(attempt) = state.running.next() => state.settle(attempt).await,
                () = sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => state.start(&self.redis),
                _ = second.tick() => {
                    state.forget_expired(*self.stream.borrow());
                    state.count_messages();
                }
                _ = alive.tick() => held::keep_alive(&state.all).await,
            }
        }
    }
}

impl State {
    fn take(&mut self, arrival: Arrival) {
        match arrival {
            Arrival::Alive(held) => self.all.push(held),
            Arrival::Keys(cause, reason, work, held) => {
                let keys = &mut self.lot(&cause, &reason).keys;
                for key in work.key_names() {
                    keys.holders.entry(key.to_owned()).or_default().push(Arc::clone(&held));
                }
                keys.work.merge(&work);
            }
        }
    }

    fn lot(&mut self, cause: &Cause, reason: &str) -> &mut Lot {
        if !self.lots.contains_key(cause) {
            let node = cause.node();
            tracing::warn!(node, error = %reason, "keys cannot be invalidated; they are tried again, others go on");
        }
        self.lots.entry(cause.clone()).or_insert_with(|| Lot::new(cause, reason))
    }

    /// When the next attempt is due.
    fn due(&self) -> Option<Instant> {
        let waiting = self.lots.values().filter(|lot| !lot.is_running && !lot.keys.work.is_empty());
        waiting.map(|lot| lot.due).min()
    }

    fn start(&mut self, redis: &Redis) {
        let now = Instant::now();
        for (cause, lot) in &mut self.lots {
            if lot.is_running || lot.due > now || lot.keys.work.is_empty() {
                continue;
            }
            lot.is_running = true;
            let (cause, keys) = (cause.clone(), std::mem::take(&mut lot.keys));
            let redis = redis.after_failures(lot.retry.attempts().min(MAX_PATIENCE));
            let attempt = async move {
                let outcome = redis.apply_keys(&keys.work).await;
                Attempt { cause, keys, outcome }
            };
            self.running.push(attempt.boxed());
        }
    }

    /// Acknowledges what is done and keeps the rest.
    async fn settle(&mut self, attempt: Attempt) {
        let Attempt { cause, keys: Keys { work, mut holders }, outcome } = attempt;
        for undone in &outcome.undone {
            counter!(names::REDIS_FAILURES).increment(1);
            let reason = Report::of(&undone.error).to_string();
            let lot = self.lot(&Cause::of(undone), &reason);
            lot.reason = reason;
            lot.keys.work.merge(&work.only(&undone.keys.iter().map(String::as_str).collect()));
            for key in &undone.keys {
                if let Some(more) = holders.remove(key) {
                    lot.keys.holders.entry(key.clone()).or_default().extend(more);
                }
            }
        }
        counter!(names::KEYS_INVALIDATED).increment(holders.len() as u64);
        counter!(names::KEYS_PRESENT).increment(outcome.applied.deleted);
        for held in holders.into_values().flatten() {
            held::release(held).await;
        }
        let failed = outcome.undone.iter().any(|undone| Cause::of(undone) == cause);
        self.finish(&cause, failed);
    }

    /// Brings up to date which nodes do not answer. Returns true if that has changed.
    fn update(&self, down: &mut Arc<Down>) -> bool {
        let failed = || self.lots.iter().filter(|(_, lot)| lot.has_failed);
        let nodes = || failed().filter_map(|(cause, lot)| Some((cause.node()?, lot)));
        if nodes().map(|(node, _)| node).eq(down.keys().map(String::as_str)) {
            return false;
        }
        *down = Arc::new(nodes().map(|(node, lot)| (node.to_owned(), lot.reason.clone())).collect());
        true
    }

    fn finish(&mut self, cause: &Cause, failed: bool) {
        let Some(lot) = self.lots.get_mut(cause) else { return };
        lot.is_running = false;
        lot.has_failed = failed;
        if failed {
            lot.due = Instant::now() + pause(cause, &mut lot.retry);
        } else if lot.keys.work.is_empty() {
            tracing::info!(node = cause.node(), "no keys wait any more");
            self.lots.remove(cause);
        } else {
            // They came during an attempt that succeeded.
            lot.retry.reset();
            lot.due = Instant::now();
        }
    }

    /// Forgets refused keys of messages that the stream does not have any more. Otherwise they would be tried for ever.
    fn forget_expired(&mut self, stream: StreamBegin) {
        let Some(lot) = self.lots.get_mut(&Cause::Rights).filter(|lot| !lot.is_running) else { return };
        let before = lot.keys.holders.len();
        lot.keys.holders.retain(|_, holders| {
            holders.retain(|held| held.is_in(stream));
            !holders.is_empty()
        });
        if lot.keys.holders.len() == before {
            return;
        }
        let left: HashSet<&str> = lot.keys.holders.keys().map(String::as_str).collect();
        lot.keys.work = lot.keys.work.only(&left);
        tracing::warn!(
            keys = before - left.len(),
            "refused keys have expired with their messages; they may be stale"
        );
        if left.is_empty() {
            self.lots.remove(&Cause::Rights);
        }
    }

    #[expect(clippy::cast_precision_loss, reason = "counts far below 2^52")]
    fn count_messages(&mut self) {
        self.all.retain(|held| held.strong_count() > 0);
        gauge!(names::HELD_MESSAGES).set(self.all.len() as f64);
    }

    #[expect(clippy::cast_precision_loss, reason = "counts far below 2^52")]
    fn show(&self, health: &Component) {
        match self.lots.get(&Cause::Rights) {
            // Counted when the attempt has ended.
            Some(lot) if lot.is_running => {}
            refused => {
                gauge!(names::REFUSED_KEYS).set(refused.map_or(0, |lot| lot.keys.holders.len()) as f64)
            }
        }
        let reasons: Vec<_> = self.lots.iter().filter(|(_, lot)| lot.has_failed).map(reason).collect();
        match reasons.is_empty() {
            true => health.ready(),
            false => health.not_ready(reasons.join("; ")),
        }
    }
}

fn reason((cause, lot): (&Cause, &Lot)) -> String {
    match cause {
        Cause::Node(node) => format!("keys at Redis node {node} wait: {}", lot.reason),
        Cause::Rights => lot.reason.clone(),
    }
}

fn pause(cause: &Cause, retry: &mut Backoff) -> Duration {
    match cause {
        Cause::Node(_) => retry.next_delay(),
        Cause::Rights => REFUSED_PAUSE,
    }
}

impl Lot {
    fn new(cause: &Cause, reason: &str) -> Self {
        let mut retry = Backoff::new(MIN_RETRY_DELAY, MAX_RETRY_DELAY);
        let due = Instant::now() + pause(cause, &mut retry);
        Self {
            keys: Keys::default(),
            retry,
            due,
            is_running: false,
            has_failed: true,
            reason: reason.to_owned(),
        }
    }
}
