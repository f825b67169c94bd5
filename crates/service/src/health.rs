//! Whether the process can do its job (ready) and whether its loops still turn (live).

mod snapshot;

use std::{
    fmt,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::time::Instant;

pub use snapshot::{ComponentSnapshot, HealthSnapshot, State};

/// In place of a time: the component waits for work, and silence is not a stall.
const IDLE: u64 = u64::MAX;

/// How long a component may go without [`Component::beat`] before its silence counts against it.
///
/// The default sets no limit: only what the component declares counts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Limits {
    /// After this long without progress the component is not ready.
    pub stall_after: Option<Duration>,
    /// After this long without progress the process is not live and should be restarted; much longer than
    /// `stall_after`, as a restart cures a hung loop but not a slow server.
    pub dead_after: Option<Duration>,
}

/// The health of all components of the process; clones share it.
///
/// The process is ready when it has components, all of them are ready, and it is not draining.
#[derive(Clone)]
pub struct Health {
    shared: Arc<Shared>,
}

struct Shared {
    started: Instant,
    draining: AtomicBool,
    components: Mutex<Vec<Arc<Record>>>,
}

struct Record {
    name: &'static str,
    limits: Limits,
    /// Milliseconds from `Shared::started` to the last sign of progress, or [`IDLE`].
    progress_ms: AtomicU64,
    declared: Mutex<Declared>,
}

enum Declared {
    Starting,
    Ready,
    /// Ready, and what it does besides.
    Busy(String),
    NotReady(String),
}

/// One component's handle to report on itself; clones speak for the same component.
#[derive(Clone)]
pub struct Component {
    record: Arc<Record>,
    started: Instant,
}

impl Health {
    /// Health with no components, hence not ready.
    #[must_use]
    pub fn new() -> Self {
        let shared = Shared {
            started: Instant::now(),
            draining: AtomicBool::new(false),
            components: Mutex::default(),
        };
        Self { shared: Arc::new(shared) }
    }

    /// Adds a component, which counts as not ready ("starting") until it says otherwise, even if its handle is dropped.
    #[must_use = "the component stays not ready until its handle says otherwise"]
    pub fn component(&self, name: &'static str, limits: Limits) -> Component {
        let started = self.shared.started;
        let record = Arc::new(Record {
            name,
            limits,
            progress_ms: AtomicU64::new(millis_since(started)),
            declared: Mutex::new(Declared::Starting),
        });
        locked(&self.shared.components).push(Arc::clone(&record));
        Component { record, started }
    }

    /// Makes the process not ready for good, while its components finish their work.
    pub fn draining(&self) {
        self.shared.draining.store(true, Ordering::Relaxed);
    }

    /// The state of everything at this moment.
    #[must_use]
    pub fn snapshot(&self) -> HealthSnapshot {
        let now_ms = millis_since(self.shared.started);
        let components =
            locked(&self.shared.components).iter().map(|record| record.snapshot(now_ms)).collect();
        HealthSnapshot { draining: self.shared.draining.load(Ordering::Relaxed), components }
    }
}

impl Default for Health {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for Health {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_tuple("Health").field(&self.snapshot()).finish()
    }
}

impl Component {
    /// Declares that the component does its job. Counts as progress.
    pub fn ready(&self) {
        self.declare(Declared::Ready);
    }

    /// Declares that the component does its job, and what it is busy with, for people. Counts as progress.
    pub fn ready_with(&self, note: impl Into<String>) {
        self.declare(Declared::Busy(note.into()));
    }

    /// Declares that the component cannot do its job, and why, for people. Counts as progress.
    pub fn not_ready(&self, reason: impl Into<String>) {
        self.declare(Declared::NotReady(reason.into()));
    }

    /// Reports progress: one atomic store, cheap enough for every turn of a loop. Ends [`Component::idle`].
    pub fn beat(&self) {
        self.record.progress_ms.store(millis_since(self.started), Ordering::Relaxed);
    }

    /// Declares that the component waits for work, so that silence is no stall until the next beat.
    pub fn idle(&self) {
        self.record.progress_ms.store(IDLE, Ordering::Relaxed);
    }

    fn declare(&self, declared: Declared) {
        *locked(&self.record.declared) = declared;
        self.beat();
    }
}

impl fmt::Debug for Component {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_tuple("Component").field(&self.record.name).finish()
    }
}

impl Record {
    fn snapshot(&self, now_ms: u64) -> ComponentSnapshot {
        let silent = match self.progress_ms.load(Ordering::Relaxed) {
            IDLE => Duration::ZERO,
            progress_ms => Duration::from_millis(now_ms.saturating_sub(progress_ms)),
        };
        let over = |limit: Option<Duration>| limit.is_some_and(|limit| silent > limit);
        let (state, reason) = match &*locked(&self.declared) {
            Declared::Starting => (State::Starting, Some("starting".to_owned())),
            Declared::NotReady(reason) => (State::NotReady, Some(reason.clone())),
            Declared::Ready | Declared::Busy(_) if over(self.limits.stall_after) => {
                (State::Stalled, Some(format!("no progress for {} s", silent.as_secs())))
            }
            Declared::Ready => (State::Ready, None),
            Declared::Busy(note) => (State::Ready, Some(note.clone())),
        };
        ComponentSnapshot { name: self.name, state, reason, silent, live: !over(self.limits.dead_after) }
    }
}

/// Saturates below [`IDLE`], which is half a billion years away.
fn millis_since(started: Instant) -> u64 {
    u64::try_from(started.elapsed().as_millis()).unwrap_or(IDLE - 1)
}

/// Health is only ever replaced whole, so a panic elsewhere cannot have left it half written.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits =
        Limits { stall_after: Some(Duration::from_secs(10)), dead_after: Some(Duration::from_secs(120)) };

    async fn pass(seconds: u64) {
        tokio::time::advance(Duration::from_secs(seconds)).await;
    }

    fn only(health: &Health) -> ComponentSnapshot {
        health.snapshot().components.remove(0)
    }

    #[tokio::test(start_paused = true)]
    async fn a_process_without_components_is_live_but_not_ready() {
        let snapshot = Health::new().snapshot();
        assert!(snapshot.is_live() && !snapshot.is_ready());
    }

    #[tokio::test(start_paused = true)]
    async fn a_component_is_not_ready_until_it_says_so() {
        let health = Health::new();
        let component = health.component("nats", Limits::default());
        assert_eq!(only(&health).state, State::Starting);
        component.ready();
        assert!(health.snapshot().is_ready());
        component.not_ready("connection refused");
        assert_eq!(only(&health).state, State::NotReady);
        assert_eq!(only(&health).reason.as_deref(), Some("connection refused"));
        component.ready();
        assert!(health.snapshot().is_ready());
    }

    #[tokio::test(start_paused = true)]
    async fn one_component_that_is_not_ready_makes_the_process_not_ready() {
        let health = Health::new();
        health.component("nats", Limits::default()).ready();
        let _never_ready = health.component("postgres", Limits::default());
        assert!(!health.snapshot().is_ready());
    }

    #[tokio::test(start_paused = true)]
    async fn a_component_without_progress_is_stalled_and_a_beat_revives_it() {
        let health = Health::new();
        let component = health.component("claim", LIMITS);
        component.ready();
        pass(10).await;
        assert!(health.snapshot().is_ready(), "the limit itself is within bounds");
        pass(2).await;
        assert_eq!(only(&health).state, State::Stalled);
        assert_eq!(only(&health).reason.as_deref(), Some("no progress for 12 s"));
        assert!(health.snapshot().is_live());
        component.beat();
        assert!(health.snapshot().is_ready());
    }

    #[tokio::test(start_paused = true)]
    async fn an_idle_component_is_neither_stalled_nor_dead() {
        let health = Health::new();
        let component = health.component("claim", LIMITS);
        component.ready();
        component.idle();
        pass(86_400).await;
        assert!(health.snapshot().is_ready() && health.snapshot().is_live());
        component.beat();
        pass(11).await;
        assert_eq!(only(&health).state, State::Stalled, "a beat ends idleness");
    }

    #[tokio::test(start_paused = true)]
    async fn only_a_long_silence_makes_the_process_not_live() {
        let health = Health::new();
        let component = health.component("claim", LIMITS);
        component.not_ready("no broker");
        pass(120).await;
        assert!(health.snapshot().is_live());
        pass(1).await;
        assert!(!health.snapshot().is_live());
        component.beat();
        assert!(health.snapshot().is_live());
    }

    #[tokio::test(start_paused = true)]
    async fn a_draining_process_is_live_but_not_ready() {
        let health = Health::new();
        health.component("claim", Limits::default()).ready();
        health.draining();
        assert!(health.snapshot().is_live() && !health.snapshot().is_ready());
    }
}
