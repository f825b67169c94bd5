//! Keeps the stream usable: creates it, notices when it lost something, publishes that again, and turns the retention.

use std::sync::Arc;
use std::time::Duration;

use async_nats::header::NATS_MESSAGE_ID;
use async_nats::jetstream;
use async_nats::jetstream::stream::RawMessageErrorKind;
use chrono::{DateTime, Utc};
use event::nats::STREAM;
use futures::{StreamExt, TryStreamExt, stream};
use metrics::{counter, gauge};
use outbox::retention::{self, Lost, Newest, StreamPosition};
use service::nats::{Link, Nats};
use service::{Backoff, Component, Report, Shutdown};
use sqlx::PgPool;
use tokio::sync::{Notify, watch};

use crate::Config;
use crate::database::{PATIENCE, explain, within};
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

/// How often the reason why NATS is not connected is looked at: the first one is not the one that lasts.
const REASON_INTERVAL: Duration = Duration::from_secs(1);

/// The keeper of the stream.
#[derive(Debug)]
pub struct Keeper {
    /// The database.
    pub pool: PgPool,
    /// The broker.
    pub nats: Nats,
    /// JetStream.
    pub jetstream: jetstream::Context,
    /// Where the workers learn of the stream, or why there is none.
    pub stream: watch::Sender<Result<Usable, String>>,
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

/// What one look needs to remember for the next.
#[derive(Debug, Default)]
struct Memory {
    /// The connection since which the content of the stream is known to be what it was.
    known_since: Option<Link>,
    /// Whether it was said that it cannot be looked at.
    is_blind: bool,
}

impl Keeper {
    /// Looks after the stream until shutdown is requested.
    pub async fn run(self, health: Component, shutdown: Shutdown) {
        let mut retry = Backoff::new(MIN_RETRY_DELAY, MAX_RETRY_DELAY);
        let mut memory = Memory::default();
        while !shutdown.is_requested() {
            let link = self.nats.link();
            if !link.connected {
                self.disconnected();
            }
            let pause = match self.look(&mut memory, link, &health).await {
                Ok(()) => {
                    retry.reset();
                    health.ready();
                    LOOK_INTERVAL
                }
                Err(error) => {
                    let error = self.explain(error).await;
                    health.not_ready(self.give_up(&error));
                    retry.next_delay()
                }
            };
            tokio::select! {
                biased;
                () = shutdown.requested() => {}
                () = self.nats.lost_since(link) => {
                    self.disconnected();
                    self.wait_for_connection(&health, &shutdown).await;
                }
                () = self.suspect.notified() => {}
                () = tokio::time::sleep(pause) => {}
            }
        }
    }

    async fn wait_for_connection(&self, health: &Component, shutdown: &Shutdown) {
        loop {
            health.not_ready(not_connected(&self.nats));
            health.idle();
            tokio::select! {
                () = shutdown.requested() => return,
                () = self.nats.connected() => return,
                () = tokio::time::sleep(REASON_INTERVAL) => {}
            }
        }
    }

    /// Until the stream has been looked at again nobody publishes: its identity goes into what is retained, and a
    /// message must never be recorded under the identity of a later stream.
    fn withdraw(&self, why: String) {
        let _before = self.stream.send_replace(Err(why));
    }

    fn disconnected(&self) {
        gauge!(names::CONNECTED).set(0.0);
        self.withdraw(not_connected(&self.nats));
    }

    async fn explain(&self, error: KeeperError) -> KeeperError {
        match error {
            KeeperError::Database(error) => explain(&self.pool.connect_options(), error).await.into(),
            other => other,
        }
    }

    /// The one place that decides what a failed look means; returns why nothing is published.
    fn give_up(&self, error: &KeeperError) -> String {
        let report = Report::of(error);
        if let KeeperError::Database(_) = error {
            // The stream was found usable before Postgres was asked.
            gauge!(names::CONNECTED).set(1.0);
            counter!(names::DATABASE_FAILURES).increment(1);
            tracing::warn!(error = %report, "cannot compare the stream with what is retained; events wait in the outbox");
        } else {
            gauge!(names::CONNECTED).set(0.0);
            tracing::warn!(error = %report, "the stream is not usable; events wait in the outbox");
        }
        let why = format!("{report}; events wait in the outbox");
        self.withdraw(why.clone());
        why
    }

    async fn look(&self, memory: &mut Memory, link: Link, health: &Component) -> Result<(), KeeperError> {
        let usable = self.ensure(link).await?;
        let created = usable.position.created;
        match self.config.retention() {
            None => within(PATIENCE, retention::keep_nothing(&self.pool)).await?,
            Some(_) => {
                within(PATIENCE, retention::keep(&self.pool)).await?;
                self.find_losses(usable, memory).await?;
                if within(PATIENCE, retention::is_incomplete(&self.pool, created)).await? {
                    self.republish(created, health).await?;
                }
            }
        }
        let is_known = self.stream.borrow().as_ref().is_ok_and(|known| same_stream(*known, usable));
        if !is_known {
            let _before = self.stream.send_replace(Ok(usable));
        }
        gauge!(names::CONNECTED).set(1.0);
        if let Some(window) = self.config.retention() {
            self.rotate(window).await;
        }
        Ok(())
    }

    async fn ensure(&self, link: Link) -> Result<Usable, StreamError> {
        nats_stream::ensure(&self.nats, &self.jetstream, &self.config, link).await
    }

    /// Marks what the stream has acknowledged and does not hold any more. Its end tells most of it; but it may have been
    /// filled again by what was on its way, so after the connection was lost, and after every loss, the newest message that it
    /// should hold is looked at as well.
    async fn find_losses(&self, usable: Usable, memory: &mut Memory) -> Result<(), KeeperError> {
        let StreamPosition { created, mut last_seq } = usable.position;
        let Some(newest) = within(PATIENCE, retention::newest(&self.pool, created, i64::MAX)).await? else {
            memory.known_since = Some(usable.link);
            return Ok(());
        };
        if newest.stream_seq > last_seq {
            // Another relay may have published and settled between the two looks.
            let again = self.ensure(usable.link).await?.position;
            if again.created != created {
                return Ok(());
            }
            last_seq = again.last_seq;
        }
        let is_shorter = newest.stream_seq > last_seq;
        if !is_shorter && memory.known_since == Some(usable.link) {
            return Ok(());
        }
        let held = match within(PATIENCE, retention::newest(&self.pool, created, last_seq)).await? {
            Some(newest) => self.holds(&newest, memory).await,
            None => Some(true),
        };
        // In doubt this connection is looked at again the next time, and after a loss until that is marked.
        let known_since = held.map(|_| usable.link);
        memory.known_since = None;
        if held == Some(false) {
            // Where it parts from what it was is not known: all of it is in doubt.
            last_seq = 0;
        } else if !is_shorter {
            memory.known_since = known_since;
            return Ok(());
        }
        let position = StreamPosition { created, last_seq };
        let messages = within(PATIENCE, retention::mark_lost(&self.pool, position)).await?;
        memory.known_since = known_since;
        counter!(names::STREAM_LOSSES).increment(1);
        tracing::warn!(
            messages,
            "the stream lacks messages it had acknowledged; publishing what is retained again"
        );
        Ok(())
    }

    /// Whether the message at the newest sequence is the one that was published; one that has expired may have been. `None`
    /// if it cannot be told now.
    async fn holds(&self, newest: &Newest, memory: &mut Memory) -> Option<bool> {
        let looked = async {
            let stream =
                self.jetstream.get_stream_no_info(STREAM).await.map_err(|error| error.to_string())?;
            match stream.get_raw_message(newest.stream_seq.unsigned_abs()).await {
                Ok(message) => {
                    let id =
                        message.headers.get(NATS_MESSAGE_ID).map(ToString::to_string).unwrap_or_default();
                    Ok(newest.message_ids.contains(&id))
                }
                Err(error) if error.kind() == RawMessageErrorKind::NoMessageFound => Ok(true),
                Err(error) => Err(error.to_string()),
            }
        };
        match looked.await {
            Ok(holds) => {
                memory.is_blind = false;
                Some(holds)
            }
            Err(error) => {
                if !std::mem::replace(&mut memory.is_blind, true) {
                    tracing::warn!(
                        error,
                        "cannot look into the stream, trying again; the NATS user needs permission to publish on \
                         $JS.API.STREAM.MSG.GET.{STREAM}"
                    );
                }
                None
            }
        }
    }

    /// Publishes what the stream lacks. Other relays may do so as well, and go on publishing new events meanwhile.
    async fn republish(&self, created: DateTime<Utc>, health: &Component) -> Result<(), KeeperError> {
        let publish_timeout = self.config.publish_timeout;
        let lease = publish_timeout * 2 + PATIENCE;
        let mut messages = 0_u64;
        while let Some(mut lost) =
            within(PATIENCE, Lost::take(&self.pool, created, REPUBLISH_BATCH, lease)).await?
        {
            let publishes = std::mem::take(&mut lost.envelopes).into_iter().map(|message| {
                let jetstream = self.jetstream.clone();
                async move { publish_again(&jetstream, &message, publish_timeout).await }
            });
            let acknowledged: Vec<i64> =
                stream::iter(publishes).buffer_unordered(usize::from(REPUBLISH_BATCH)).try_collect().await?;
            messages += acknowledged.len() as u64;
            counter!(names::REPUBLISHED).increment(acknowledged.len() as u64);
            let last_seq = acknowledged.into_iter().max().unwrap_or_default();
            within(PATIENCE, lost.settle(last_seq)).await?;
            health.beat();
        }
        within(PATIENCE, retention::complete(&self.pool, created)).await?;
        if messages > 0 {
            tracing::warn!(messages, "published retained messages again");
        }
        Ok(())
    }

    /// Never in the way of publishing: somebody who reads what is retained, such as a backup, delays it.
    async fn rotate(&self, window: Duration) {
        match within(PATIENCE, retention::rotate(&self.pool, window)).await {
            Ok(true) => tracing::debug!("turned the retention of published messages"),
            Ok(false) => {}
            Err(error) => {
                tracing::debug!(error = %Report::of(&error), "could not turn the retention of published messages")
            }
        }
    }
}

/// Why nothing is published while the connection is lost.
pub fn not_connected(nats: &Nats) -> String {
    format!("{}; events wait in the outbox", nats.why_not_connected())
}

fn same_stream(known: Usable, now: Usable) -> bool {
    let of = |usable: Usable| (usable.position.created, usable.max_body, usable.link);
    of(known) == of(now)
}
