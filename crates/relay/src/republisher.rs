//! Publishes to the stream again what it lacks, beside what is new.

use std::sync::Arc;
use std::time::{Duration, Instant};

use metrics::{counter, gauge};
use outbox::republication::{self, Newest, Page};
use service::{Backoff, Component, Report, Shutdown};
use tokio::sync::Notify;

use crate::database::{PATIENCE, within};
use crate::merging::merge;
use crate::metrics as names;
use crate::packing::Limits;
use crate::publisher::{self, PublishError};
use crate::stream::Usable;
use crate::worker::Shared;

/// Pauses after a failure.
const MIN_RETRY_DELAY: Duration = Duration::from_millis(100);
const MAX_RETRY_DELAY: Duration = Duration::from_secs(5);

/// How often the log tells how far it is.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(10);

/// The task that publishes again.
#[derive(Debug)]
pub struct Republisher {
    /// What it shares with the workers.
    pub shared: Arc<Shared>,
    /// Notified when the stream lacks something.
    pub lacking: Arc<Notify>,
}

#[derive(Debug, thiserror::Error)]
enum TurnError {
    #[error("Postgres failed")]
    Database(#[from] sqlx::Error),
    #[error("publishing failed")]
    Broker(#[from] PublishError),
}

/// How far it is.
struct Progress {
    began: Instant,
    told: Instant,
    messages: usize,
}

impl Republisher {
    /// Publishes whatever is to be published again until shutdown is requested. A failure is repeated, and keeps nothing
    /// else from being published.
    pub async fn run(self, health: Component, shutdown: Shutdown) {
        health.ready();
        while !shutdown.is_requested() {
            health.idle();
            tokio::select! {
                () = shutdown.requested() => {}
                () = self.lacking.notified() => self.publish_all(&health, &shutdown).await,
            }
        }
    }

    /// Returns when there is nothing left to take, or the stream is not usable: the keeper tells when to go on.
    async fn publish_all(&self, health: &Component, shutdown: &Shutdown) {
        let mut retry = Backoff::new(MIN_RETRY_DELAY, MAX_RETRY_DELAY);
        let mut progress: Option<Progress> = None;
        while !shutdown.is_requested() {
            let Ok(stream) = self.shared.usable() else { break };
            match self.turn(stream).await {
                Ok(Some(count)) => {
                    retry.reset();
                    let remaining = self.show_remaining().await;
                    progress.get_or_insert_with(Progress::begin).note(count, remaining);
                    health.ready_with(format!("publishing about {remaining} retained messages again"));
                }
                Ok(None) => break,
                Err(error) => {
                    let report = Report::of(&error);
                    tracing::warn!(error = %report, "cannot publish retained messages again; trying again");
                    health.not_ready(format!("cannot publish retained messages again: {report}"));
                    tokio::select! {
                        () = shutdown.requested() => {}
                        () = tokio::time::sleep(retry.next_delay()) => {}
                    }
                }
            }
        }
        if let Some(progress) = progress {
            progress.end();
        }
        health.ready();
    }

    /// Publishes one page; returns how many retained messages that were, or `None` if there is no page to take.
    async fn turn(&self, stream: Usable) -> Result<Option<usize>, TurnError> {
        let Shared { pool, nats, jetstream, config, .. } = &*self.shared;
        let created = stream.position.created;
        let lease = config.publish_timeout * 2 + PATIENCE;
        let Some(mut page) = within(PATIENCE, Page::take(pool, created, lease)).await? else {
            return Ok(None);
        };
        let count = page.messages.len();
        let limits = Limits { events: config.envelope_events as usize, bytes: stream.max_body };
        let merged = merge(std::mem::take(&mut page.messages), limits, &page.name());
        let published =
            publisher::publish(jetstream, nats, stream.link, merged, config.publish_timeout).await?;
        if nats.link() != stream.link {
            // What was acknowledged may be lost by now, and the loss may be recorded.
            return Err(PublishError::Disconnected.into());
        }
        let newest = published.into_iter().max_by_key(|message| message.stream_seq).map(|message| Newest {
            subject: message.subject,
            message_id: message.message_id,
            stream_seq: message.stream_seq,
        });
        within(PATIENCE, page.settle(newest)).await?;
        counter!(names::REPUBLISHED).increment(count as u64);
        Ok(Some(count))
    }

    /// About how many messages are left, for all relays together.
    async fn show_remaining(&self) -> i64 {
        let asked = republication::remaining(&self.shared.pool);
        let remaining = within(PATIENCE, asked).await.ok().flatten().unwrap_or(0);
        show_remaining(remaining);
        remaining
    }
}

/// Sets the gauge of what is left.
#[expect(clippy::cast_precision_loss, reason = "counts far below 2^52")]
pub fn show_remaining(messages: i64) {
    gauge!(names::REPUBLISH_REMAINING).set(messages as f64);
}

impl Progress {
    fn begin() -> Self {
        Self { began: Instant::now(), told: Instant::now(), messages: 0 }
    }

    fn note(&mut self, count: usize, remaining: i64) {
        self.messages += count;
        if self.told.elapsed() >= PROGRESS_INTERVAL {
            self.told = Instant::now();
            tracing::info!(messages = self.messages, remaining, "publishing retained messages again");
        }
    }

    fn end(&self) {
        tracing::warn!(
            messages = self.messages,
            seconds = self.began.elapsed().as_secs_f64(),
            "published retained messages again"
        );
    }
}
