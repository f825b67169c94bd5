//! Namespaces (beginnings of keys), on a lane of their own: each costs a search of the whole cache, which holds up no single
//! key. Whatever has come by the time a search begins is searched for together.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use cache::{Redis, RedisError};
use event::CacheKey;
use metrics::{counter, gauge, histogram};
use service::{Backoff, Component, Report, Shutdown};
use tokio::sync::mpsc;
use tokio::time::Instant;

use crate::held::{self, Held};
use crate::metrics as names;
use crate::replay::with_progress;

/// Pauses after a failure.
const MIN_RETRY_DELAY: Duration = Duration::from_millis(100);
const MAX_RETRY_DELAY: Duration = Duration::from_secs(2);

/// After so long namespaces are searched for again in which there are keys that the user may not touch.
const REFUSED_PAUSE: Duration = Duration::from_mins(1);

/// Namespaces of a message, and the message.
pub type Request = (BTreeSet<CacheKey>, Arc<Held>);

/// What searches for them.
pub struct Namespaces {
    /// The cache.
    pub redis: Redis,
    /// Namespaces of messages. Their number is bounded by the room for messages in hand.
    pub requests: mpsc::UnboundedReceiver<Request>,
}

#[derive(Default)]
struct Waiting {
    /// Not searched for yet.
    fresh: Vec<Request>,
    /// Searched for without success. What of it could be done is done.
    failed: Vec<Request>,
}

impl Waiting {
    fn namespaces(&self) -> BTreeSet<CacheKey> {
        self.fresh.iter().chain(&self.failed).flat_map(|(namespaces, _)| namespaces).cloned().collect()
    }

    #[expect(clippy::cast_precision_loss, reason = "counts far below 2^52")]
    fn show(&self, running: &[Request]) {
        let mut all = self.namespaces();
        all.extend(running.iter().flat_map(|(namespaces, _)| namespaces).cloned());
        gauge!(names::WAITING_NAMESPACES).set(all.len() as f64);
    }
}

impl Namespaces {
    /// Searches until shutdown is requested. Messages that wait then are delivered to somebody else.
    pub async fn run(mut self, health: Component, shutdown: Shutdown) {
        let mut waiting = Waiting::default();
        let mut retry = Backoff::new(MIN_RETRY_DELAY, MAX_RETRY_DELAY);
        let mut pause = Duration::ZERO;
        health.ready();
        loop {
            health.idle();
            let has_failed = !waiting.failed.is_empty();
            if waiting.fresh.is_empty() {
                tokio::select! {
                    () = shutdown.requested() => return,
                    request = self.requests.recv() => match request {
                        Some(request) => waiting.fresh.push(request),
                        None => return,
                    },
                    () = tokio::time::sleep(pause), if has_failed => {}
                }
            }
            while let Ok(request) = self.requests.try_recv() {
                waiting.fresh.push(request);
            }
            let mut batch = std::mem::take(&mut waiting.fresh);
            if has_failed && self.is_complete().await {
                batch.append(&mut waiting.failed);
            }
            if batch.is_empty() {
                pause = pause.max(retry.next_delay());
                continue;
            }
            let searched = tokio::select! {
                () = shutdown.requested() => return,
                searched = self.search(&batch, &mut waiting, &health) => searched,
            };
            match searched {
                Ok(()) => {
                    retry.reset();
                    for (_, held) in batch {
                        held::release(held).await;
                    }
                }
                Err(error) => {
                    pause = after(&error, &mut retry);
                    waiting.failed.append(&mut batch);
                    health.not_ready(format!("namespaces wait: {}", Report::of(&error)));
                }
            }
            if waiting.failed.is_empty() {
                health.ready();
            }
            waiting.show(&[]);
        }
    }

    /// Whether every master answers, so that it is worth the work to search all of them once more.
    async fn is_complete(&self) -> bool {
        self.redis.look_at_masters().await.is_ok_and(|masters| masters.unreachable.is_empty())
    }

    /// Searches for all of the batch, while more may come.
    async fn search(
        &mut self,
        batch: &[Request],
        waiting: &mut Waiting,
        health: &Component,
    ) -> Result<(), RedisError> {
        let namespaces: BTreeSet<_> = batch.iter().flat_map(|(namespaces, _)| namespaces).cloned().collect();
        waiting.show(batch);
        let started = Instant::now();
        let redis = self.redis.clone();
        let searching = with_progress(|| health.beat(), redis.delete_namespaces(&namespaces));
        tokio::pin!(searching);
        let searched = loop {
            tokio::select! {
                searched = &mut searching => break searched,
                Some(request) = self.requests.recv() => {
                    waiting.fresh.push(request);
                    waiting.show(batch);
                }
            }
        };
        let seconds = started.elapsed().as_secs_f64();
        match searched {
            Ok(deleted) => {
                tracing::info!(
                    namespaces = namespaces.len(),
                    deleted,
                    seconds,
                    "searched the cache for namespaces"
                );
                histogram!(names::NAMESPACE_SEARCH_TIME).record(seconds);
                counter!(names::NAMESPACES_INVALIDATED).increment(namespaces.len() as u64);
                counter!(names::KEYS_PRESENT).increment(deleted);
                Ok(())
            }
            Err(error) => {
                counter!(names::REDIS_FAILURES).increment(1);
                tracing::warn!(error = %Report::of(&error), seconds, "cannot search all of the cache for namespaces; trying again");
                Err(error)
            }
        }
    }
}

fn after(error: &RedisError, retry: &mut Backoff) -> Duration {
    match error {
        RedisError::KeysRefused { .. } => REFUSED_PAUSE,
        _ => retry.next_delay(),
    }
}
