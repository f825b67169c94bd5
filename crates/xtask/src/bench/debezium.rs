//! From the publication of Debezium's change events to deletion under a steady load.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::ensure;
use async_nats::jetstream;
use async_nats::jetstream::stream::{Config, StorageType};
use tokio::task::JoinSet;

use super::figures::Figure;
use super::numbers::grouped;
use super::percentiles::Delays;
use super::{Scale, events, progress, surroundings};
use crate::observer::{self, Observer};
use crate::pair::{Ground, Variable};
use crate::programs::Programs;
use crate::resp::Connection;
use crate::wait;

/// Change events a second.
const RATES: [u64; 3] = [100, 1_000, 5_000];

/// The rate that has a target.
const TARGET_RATE: u64 = 1_000;
const TARGET_P99_MS: f64 = 50.0;

/// Debezium's stream, and the subject of its events.
const STREAM: &str = "DEBEZIUM";
const SUBJECT: &str = "debezium.public.users";

/// Time that the last deletion may take.
const PATIENCE: Duration = Duration::from_secs(60);

const RULES: &str =
    "[[table]]\nname = 'users'\nkeys = ['user:{id}:profile', 'mail:{email}']\non_truncate = ['user:']\n";

const LOCK: &str = "[public.users]\nid = 'int8'\nemail = 'text'\n";

/// Measures it with the default settings.
pub async fn measure(programs: &Programs, scale: Scale) -> anyhow::Result<Vec<Figure>> {
    let mut options = surroundings::options();
    options.redis.configuration = observer::CONFIGURATION.to_owned();
    let ground = Ground::start(programs, options).await?;
    let jetstream = create_stream(&ground).await?;
    let subscriber = ground.spawn_subscriber_with(&environment(&ground)?)?;
    subscriber.until_ready().await?;

    let duration = scale.pick(Duration::from_secs(10), Duration::from_secs(1));
    let mut figures = Vec::new();
    for rate in RATES {
        let delays = play(&ground, &jetstream, rate, duration).await?;
        progress(&format!("{rate} events/s: {}", delays.long()));
        let figure = Figure::new(
            format!("From publication by Debezium to deletion at {} events/s", grouped(rate)),
            delays.long(),
            "",
        );
        let met = delays.percentile(99.0) <= TARGET_P99_MS;
        figures.push(if rate == TARGET_RATE { figure.with_target("p99 ≤ 50 ms", met) } else { figure });
    }
    Ok(figures)
}

async fn create_stream(ground: &Ground) -> anyhow::Result<jetstream::Context> {
    let jetstream = jetstream::new(async_nats::connect(ground.stack.nats_url()).await?);
    let config = Config {
        name: STREAM.to_owned(),
        subjects: vec![SUBJECT.to_owned()],
        storage: StorageType::File,
        ..Default::default()
    };
    jetstream.create_stream(config).await?;
    Ok(jetstream)
}

fn environment(ground: &Ground) -> anyhow::Result<Vec<Variable>> {
    let rules = ground.stack.directory().path().join("debezium.toml");
    std::fs::write(&rules, RULES)?;
    std::fs::write(rules.with_extension("lock"), LOCK)?;
    let rules = rules.display().to_string();
    Ok(vec![("SUBSCRIBER_DEBEZIUM_STREAM", STREAM.to_owned()), ("SUBSCRIBER_RULES", rules)])
}

/// Publishes `rate` change events a second for `duration`, each when it is due.
async fn play(
    ground: &Ground,
    jetstream: &jetstream::Context,
    rate: u64,
    duration: Duration,
) -> anyhow::Result<Delays> {
    let count = rate * duration.as_secs();
    // Repetitions of the run before must not delete keys of this one.
    let first = rate * 1_000_000;
    let redis = ground.stack.redis.address();
    events::fill(&mut Connection::open(redis).await?, first..first + count).await?;
    let times = Arc::new(Times::new(first, count));
    let of_observer = Arc::clone(&times);
    let _observer = Observer::start(redis, move |key, at| of_observer.saw_deletion(key, at)).await?;
    let mut acknowledged = JoinSet::new();
    for number in 0..count {
        let due = times.zero + Duration::from_secs(number) / u32::try_from(rate)?;
        tokio::time::sleep_until(due.into()).await;
        times.published[usize::try_from(number)?]
            .store(times.microseconds(Instant::now()), Ordering::Relaxed);
        let acknowledgement = jetstream.publish(SUBJECT, body(first + number).into()).await?;
        acknowledged.spawn(acknowledgement.into_future());
    }
    while let Some(outcome) = acknowledged.join_next().await {
        outcome??;
    }
    wait::until("every key is deleted", PATIENCE, async || Ok(times.all_deleted().then_some(()))).await?;
    times.delays()
}

fn body(id: u64) -> String {
    format!(
        r#"{{"before":{{"id":{id},"email":"{id}@x","name":"Ada"}},"after":{{"id":{id},"email":"{id}@x","name":"Eva"}},"source":{{"version":"3.6.3.Final","connector":"postgresql","name":"shop","ts_ms":1795865663049,"snapshot":"false","db":"shop","sequence":"[null,\"27673320\"]","ts_us":1795865663049586,"ts_ns":1795865663049586000,"schema":"public","table":"users","txId":742,"lsn":27673320,"xmin":null}},"transaction":null,"op":"u","ts_ms":1795865663262}}"#
    )
}

/// Times of every change event in microseconds after the start, 0 before they are known.
#[derive(Debug)]
struct Times {
    zero: Instant,
    first: u64,
    published: Vec<AtomicU64>,
    deleted: Vec<AtomicU64>,
}

impl Times {
    fn new(first: u64, count: u64) -> Self {
        let unknown = || (0..count).map(|_| AtomicU64::new(0)).collect();
        Self { zero: Instant::now(), first, published: unknown(), deleted: unknown() }
    }

    fn microseconds(&self, at: Instant) -> u64 {
        u64::try_from(at.saturating_duration_since(self.zero).as_micros()).unwrap_or(u64::MAX).max(1)
    }

    fn saw_deletion(&self, key: &str, at: Instant) {
        let number = key.strip_prefix("user:").and_then(|rest| rest.strip_suffix(":profile"));
        let number = number.and_then(|number| number.parse::<u64>().ok()?.checked_sub(self.first));
        let index = number.and_then(|number| usize::try_from(number).ok());
        if let Some(deleted) = index.and_then(|index| self.deleted.get(index)) {
            deleted.store(self.microseconds(at), Ordering::Relaxed);
        }
    }

    fn all_deleted(&self) -> bool {
        self.deleted.iter().all(|deleted| deleted.load(Ordering::Relaxed) > 0)
    }

    fn delays(&self) -> anyhow::Result<Delays> {
        let mut delays = Delays::new();
        for (published, deleted) in self.published.iter().zip(&self.deleted) {
            let (published, deleted) = (published.load(Ordering::Relaxed), deleted.load(Ordering::Relaxed));
            ensure!(deleted >= published, "a key was gone before its change event was published");
            delays.record(Duration::from_micros(deleted - published));
        }
        Ok(delays)
    }
}
