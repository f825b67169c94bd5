use std::time::Duration;

use cache::{Redis, RedisError, Work};
use metrics::{counter, histogram};
use service::{Backoff, Component, Report, Shutdown};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender};
use tokio::time::Instant;

use super::delivery::{Delivery, Part};
use crate::metrics as names;
use crate::worker::REFUSED_PAUSE;

/// A batch is applied when it has this many keys, whatever else is due.
const BATCH_KEYS: usize = 20_000;

/// Most deliveries applied together. Those with key prefixes are not limited: one scan serves them all.
const BATCH_DELIVERIES: usize = 1_000;

/// Width of the time buckets in which repetitions are applied together.
const BUCKET: Duration = Duration::from_millis(50);

/// Pauses after a failure of Redis.
const MIN_RETRY_DELAY: Duration = Duration::from_millis(50);
const MAX_RETRY_DELAY: Duration = Duration::from_secs(2);

/// Place of a delivery after a lane has applied it.
pub(super) enum Next {
    /// Another lane, at once if it has prefixes; otherwise the repetition.
    Prefixes {
        /// The lane that scans for prefixes.
        prefixes: UnboundedSender<Delivery>,
        /// The lane that repeats single keys.
        repetition: UnboundedSender<Delivery>,
    },
    /// The lane that repeats it.
    Repetition(UnboundedSender<Delivery>),
    /// Nothing follows: it is acknowledged.
    Acknowledge,
}

/// Applies one part of the deliveries in the order of their due times, many at once. No lane waits for another one: the queues
/// between them have no limit of their own, since the shares of the deliveries limit what is in hand altogether.
pub(super) struct Lane {
    pub(super) queue: UnboundedReceiver<Delivery>,
    pub(super) part: Part,
    pub(super) next: Next,
    pub(super) redis: Redis,
    pub(super) repeat_after: Duration,
    pub(super) ack_wait: Duration,
    pub(super) health: Component,
    pub(super) shutdown: Shutdown,
}

/// End of the attempts to apply a batch.
enum Outcome {
    Applied,
    /// Redis refuses some of the keys.
    Refused(RedisError),
    ShutDown,
}

impl Lane {
    /// Applies deliveries until their senders are gone. After the request to shut down it applies nothing more and gives
    /// back what is in hand, so that another subscriber gets it at once.
    pub(super) async fn run(mut self) {
        let mut held = None;
        self.health.ready();
        loop {
            self.health.idle();
            let first = match held.take() {
                Some(first) => first,
                None => match self.queue.recv().await {
                    Some(first) => first,
                    None => return,
                },
            };
            let is_due = self.shutdown.or_done(tokio::time::sleep_until(first.due)).await.is_some();
            self.health.beat();
            if is_due {
                let batch = self.collect(first, &mut held);
                self.settle(batch).await;
            } else {
                self.give_back(first).await;
            }
        }
    }

    /// Takes what else is due. The queue is in the order of the due times, since all deliveries wait equally long.
    fn collect(&mut self, first: Delivery, held: &mut Option<Delivery>) -> (Vec<Delivery>, Work) {
        let now = Instant::now();
        let mut work = Work::new();
        first.add_to(&mut work, self.part);
        let mut batch = vec![first];
        while (batch.len() < BATCH_DELIVERIES || self.part != Part::Keys)
            && work.keys() < BATCH_KEYS
            && let Ok(delivery) = self.queue.try_recv()
        {
            if delivery.due > now {
                *held = Some(delivery);
                break;
            }
            delivery.add_to(&mut work, self.part);
            batch.push(delivery);
        }
        (batch, work)
    }

    async fn settle(&self, (batch, work): (Vec<Delivery>, Work)) {
        match self.apply(&batch, &work).await {
            Outcome::Applied => self.forward(batch).await,
            Outcome::Refused(error) => self.settle_refused(batch, &error).await,
            Outcome::ShutDown => {
                for delivery in batch {
                    self.give_back(delivery).await;
                }
            }
        }
    }

    /// Tells the deliveries with keys that the user of Redis may not touch from the others: they come again later.
    async fn settle_refused(&self, mut batch: Vec<Delivery>, error: &RedisError) {
        if batch.len() > 1 {
            for delivery in batch {
                let mut work = Work::new();
                delivery.add_to(&mut work, self.part);
                Box::pin(self.settle((vec![delivery], work))).await;
            }
        } else if let Some(delivery) = batch.pop() {
            tracing::warn!(error = %Report::of(error), "change events are refused; trying them again in {REFUSED_PAUSE:?}");
            delivery.give_back(REFUSED_PAUSE).await;
        }
    }

    /// Applies a batch for as long as it takes, or until shutdown is requested.
    async fn apply(&self, batch: &[Delivery], work: &Work) -> Outcome {
        let mut retry = Backoff::new(MIN_RETRY_DELAY, MAX_RETRY_DELAY);
        let mut kept_alive = Instant::now();
        while !work.is_empty() {
            if self.shutdown.is_requested() {
                return Outcome::ShutDown;
            }
            let redis = self.redis.after_failures(retry.attempts());
            match self.apply_once(&redis, batch, work).await {
                Ok(()) => break,
                Err(error @ RedisError::KeysRefused { .. }) => {
                    counter!(names::REDIS_FAILURES).increment(1);
                    return Outcome::Refused(error);
                }
                Err(error) => self.say_failed(&error, retry.attempts() == 0),
            }
            if kept_alive.elapsed() >= self.ack_wait / 3 {
                kept_alive = Instant::now();
                keep_alive(batch).await;
            }
            let _ = self.shutdown.or_done(tokio::time::sleep(retry.next_delay())).await;
        }
        if retry.attempts() > 0 {
            tracing::info!("Redis applies change events again");
            self.health.ready();
        }
        Outcome::Applied
    }

    /// One attempt. A scan of a large cache may take longer than a delivery may be in hand, so NATS is told meanwhile.
    async fn apply_once(&self, redis: &Redis, batch: &[Delivery], work: &Work) -> Result<(), RedisError> {
        let applying = redis.apply(work);
        tokio::pin!(applying);
        loop {
            match tokio::time::timeout(self.ack_wait / 3, &mut applying).await {
                Ok(applied) => return applied.map(drop),
                Err(_) => {
                    self.health.beat();
                    keep_alive(batch).await;
                }
            }
        }
    }

    fn say_failed(&self, error: &RedisError, is_first: bool) {
        counter!(names::REDIS_FAILURES).increment(1);
        let error = Report::of(error).to_string();
        self.health.not_ready(format!("Redis does not apply change events: {error}"));
        if is_first {
            tracing::warn!(error, "Redis does not apply change events; keeping them until it does");
        }
    }

    async fn forward(&self, batch: Vec<Delivery>) {
        let repeated_at = bucket_end(Instant::now() + self.repeat_after);
        for mut delivery in batch {
            let lane = match &self.next {
                _ if delivery.is_empty() => {
                    delivery.acknowledge().await;
                    continue;
                }
                Next::Prefixes { prefixes, .. } if delivery.has_prefixes() => prefixes,
                Next::Prefixes { repetition, .. } | Next::Repetition(repetition) => {
                    delivery.due = repeated_at;
                    repetition
                }
                Next::Acknowledge => {
                    delivery.acknowledge().await;
                    continue;
                }
            };
            if self.part == Part::Keys {
                observe_lag(&delivery);
            }
            // A lane ends only after those that send to it.
            let _ = lane.send(delivery);
        }
    }

    /// Gives back a delivery that is not settled, not before its repetition would be due.
    async fn give_back(&self, delivery: Delivery) {
        let pause = delivery.due.saturating_duration_since(Instant::now());
        delivery.give_back(pause).await;
    }
}

async fn keep_alive(batch: &[Delivery]) {
    for delivery in batch {
        delivery.keep_alive().await;
    }
}

fn observe_lag(delivery: &Delivery) {
    let Some(committed_us) = delivery.committed_us else { return };
    let microseconds = chrono::Utc::now().timestamp_micros().saturating_sub(committed_us);
    histogram!(names::DEBEZIUM_LAG).record(Duration::from_micros(microseconds.max(0).cast_unsigned()));
}

/// The end of the bucket that a time falls in. All lanes of the process have the same buckets.
fn bucket_end(time: Instant) -> Instant {
    static EPOCH: std::sync::OnceLock<Instant> = std::sync::OnceLock::new();
    let epoch = *EPOCH.get_or_init(Instant::now);
    let buckets = time.saturating_duration_since(epoch).as_millis().div_ceil(BUCKET.as_millis());
    epoch + BUCKET * u32::try_from(buckets).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_of_one_bucket_have_the_same_end_which_is_not_before_them() {
        let first = bucket_end(Instant::now() + Duration::from_secs(1));
        let inside = first - Duration::from_millis(1);
        assert_eq!(bucket_end(inside), first);
        assert_eq!(bucket_end(first), first);
        assert_eq!(bucket_end(first + Duration::from_millis(1)), first + BUCKET);
    }
}
