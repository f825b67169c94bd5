//! Keeps the stream usable: creates it, notices when it lost something, publishes that again, and turns the retention.

use std::sync::Arc;
use std::time::Duration;

use async_nats::jetstream;
use futures::{StreamExt, TryStreamExt, stream};
use metrics::{counter, gauge};
use outbox::retention::{self, Republication};
use service::nats::Nats;
use service::{Backoff, Component, Shutdown};
use sqlx::PgPool;
use tokio::sync::{Notify, watch};

use crate::Config;
use crate::metrics as names;
use crate::publisher::{PublishError, publish_again};
use crate::stream::{self as nats_stream, StreamError, Usable};

/// How often the stream is looked at without a reason.
const LOOK_INTERVAL: Duration = Duration::from_secs(2);

/// Retained messages fetched at once.
const REPUBLISH_BATCH: u16 = 64;

/// Pauses after a failure.
const MIN_RETRY_DELAY: Duration = Duration::from_millis(100);
const MAX_RETRY_DELAY: Duration = Duration::from_secs(5);

/// The keeper of the stream.
#[derive(Debug)]
pub struct Keeper {
    /// The database.
    pub pool: PgPool,
    /// The broker.
    pub nats: Nats,
    /// JetStream.
    pub jetstream: jetstream::Context,
    /// Where the workers learn of the stream.
    pub stream: watch::Sender<Option<Usable>>,
    /// Notified by a worker that could not publish.
    pub suspect: Arc<Notify>,
    /// Options.
    pub config: Config,
}

#[derive(Debug, thiserror::Error)]
enum KeeperError {
    #[error(transparent)]
    Stream(#[from] StreamError),
    #[error("Postgres failed")]
    Database(#[from] sqlx::Error),
    #[error("publishing retained messages failed")]
    Publish(#[from] PublishError),
}

impl Keeper {
    /// Looks after the stream until shutdown is requested.
    pub async fn run(self, health: Component, shutdown: Shutdown) {
        let mut retry = Backoff::new(MIN_RETRY_DELAY, MAX_RETRY_DELAY);
        while !shutdown.is_requested() {
            let link = self.nats.link();
            let pause = match self.look().await {
                Ok(()) => {
                    retry.reset();
                    health.ready();
                    LOOK_INTERVAL
                }
                Err(error) => {
                    self.withdraw();
                    let cause =
                        std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
                    tracing::warn!(%error, cause, "the stream is not usable; events wait in the outbox");
                    health.not_ready(format!("{error}: {cause}"));
                    retry.next_delay()
                }
            };
            tokio::select! {
                () = shutdown.requested() => {}
                () = self.suspect.notified() => {}
                () = tokio::time::sleep(pause) => {}
                () = self.nats.lost_since(link) => {
                    self.withdraw();
                    health.not_ready("NATS is not connected");
                    tokio::select! {
                        () = shutdown.requested() => {}
                        () = self.nats.connected() => {}
                    }
                }
            }
        }
    }

    /// Until the stream has been looked at again nobody publishes: its identity goes into what is retained, and a
    /// message must never be recorded under the identity of a later stream.
    fn withdraw(&self) {
        gauge!(names::CONNECTED).set(0.0);
        self.stream.send_replace(None);
    }

    async fn look(&self) -> Result<(), KeeperError> {
        let max_payload = self.nats.client.server_info().max_payload;
        let usable = nats_stream::ensure(&self.jetstream, &self.config, max_payload).await?;
        if self.config.retention().is_some() && retention::is_incomplete(&self.pool, usable.position).await? {
            self.republish(usable).await?;
        }
        if self.stream.borrow().is_none_or(|known| !same_stream(known, usable)) {
            self.stream.send_replace(Some(usable));
        }
        gauge!(names::CONNECTED).set(1.0);
        if let Some(window) = self.config.retention()
            && retention::rotate(&self.pool, window).await?
        {
            tracing::debug!("turned the retention of published messages");
        }
        Ok(())
    }

    /// Publishes what the stream lacks. One relay at a time; the others go on publishing new events meanwhile.
    async fn republish(&self, usable: Usable) -> Result<(), KeeperError> {
        let Some(mut republication) = Republication::begin(&self.pool, usable.position).await? else {
            return Ok(());
        };
        let mut messages = 0_u64;
        let mut last_seq = usable.position.last_seq;
        loop {
            let batch = republication.next(REPUBLISH_BATCH).await?;
            if batch.is_empty() {
                break;
            }
            if messages == 0 {
                counter!(names::STREAM_LOSSES).increment(1);
                tracing::warn!(
                    "the stream lacks messages it had acknowledged; publishing what is retained again"
                );
            }
            messages += batch.len() as u64;
            let publishes = batch.into_iter().map(|message| {
                let jetstream = self.jetstream.clone();
                let timeout = self.config.publish_timeout;
                async move { publish_again(&jetstream, &message, timeout).await }
            });
            let acknowledged: Vec<i64> =
                stream::iter(publishes).buffer_unordered(usize::from(REPUBLISH_BATCH)).try_collect().await?;
            last_seq = acknowledged.into_iter().fold(last_seq, i64::max);
        }
        republication.finish(last_seq).await?;
        if messages > 0 {
            counter!(names::REPUBLISHED).increment(messages);
            tracing::warn!(messages, "published retained messages again");
        }
        Ok(())
    }
}

fn same_stream(known: Usable, now: Usable) -> bool {
    known.position.created == now.position.created && known.max_body == now.max_body
}
