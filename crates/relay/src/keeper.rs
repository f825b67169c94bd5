//! Keeps the stream usable: creates it, notices when it lost something, and turns the retention.

use std::sync::Arc;
use std::time::Duration;

use async_nats::header::NATS_MESSAGE_ID;
use async_nats::jetstream;
use async_nats::jetstream::stream::RawMessageErrorKind;
use event::nats::STREAM;
use metrics::{counter, gauge};
use outbox::stream::{self as known, Meeting, Newest, OtherRelay, StreamPosition};
use outbox::{republication, retention};
use serde_json::{Map, Value};
use service::nats::{Link, Nats};
use service::{Backoff, Component, Report, Shutdown};
use sqlx::PgPool;
use tokio::sync::{Notify, watch};
use uuid::Uuid;

use crate::Config;
use crate::database::{PATIENCE, within};
use crate::metrics as names;
use crate::republisher::show_remaining;
use crate::stream::{self as nats_stream, StreamError, Usable};

/// How often the stream is looked at without a reason.
const LOOK_INTERVAL: Duration = Duration::from_secs(2);

/// How long it may take at the end to say so.
const LEAVE_PATIENCE: Duration = Duration::from_secs(1);

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
    /// Notified when the stream lacks something that is retained.
    pub lacking: Arc<Notify>,
    /// Name of this process among the relays.
    pub relay: Uuid,
    /// Name of the database, if it can be told.
    pub owner: Option<String>,
    /// Options.
    pub config: Config,
}

#[derive(Debug, thiserror::Error)]
enum KeeperError {
    #[error(transparent)]
    Stream(#[from] StreamError),
    #[error("Postgres failed")]
    Database(#[from] sqlx::Error),
    #[error(
        "a relay at {address} publishes the events of this database to a stream created at {stream_created}, and looked at it \
         {seen_ago:.0} s ago; this relay sees a stream created at {seen}: if that is another NATS, stop one of the two and see \
         that NATS_URL is the same everywhere; if the stream was created anew, the other relay will see it in a moment",
        address = other.address, stream_created = other.stream_created, seen_ago = other.seen_ago
    )]
    Elsewhere { other: OtherRelay, seen: chrono::DateTime<chrono::Utc> },
}

/// What one look needs to remember for the next.
#[derive(Debug, Default)]
struct Memory {
    /// The connection since which the content of the stream is known to be what it was.
    known_since: Option<Link>,
    /// Whether it was said that it cannot be looked at.
    is_blind: bool,
    /// What was said about the options of the stream.
    risks: Vec<String>,
    /// Whether it was said that the name of the database cannot be written into the stream.
    cannot_claim: bool,
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
            let pause = match self.look(&mut memory, link).await {
                Ok(()) => {
                    retry.reset();
                    if memory.risks.is_empty() {
                        health.ready();
                    } else {
                        health.ready_with(format!("stream {STREAM}: {}", memory.risks.join("; ")));
                    }
                    LOOK_INTERVAL
                }
                Err(error) => {
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
        let _ = tokio::time::timeout(LEAVE_PATIENCE, known::leave(&self.pool, self.relay)).await;
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

    async fn look(&self, memory: &mut Memory, link: Link) -> Result<(), KeeperError> {
        let nats_stream::Seen { usable, risks, unowned } = self.ensure(link).await?;
        note_risks(memory, risks);
        if let (Some(options), Some(owner), false) = (unowned, &self.owner, memory.cannot_claim) {
            self.claim(memory, options, owner).await;
        }
        match self.config.retention() {
            None => within(PATIENCE, retention::keep_nothing(&self.pool)).await?,
            Some(_) => within(PATIENCE, retention::keep(&self.pool)).await?,
        }
        self.meet(usable).await?;
        if self.config.retention().is_some() {
            self.find_losses(usable, memory).await?;
        }
        let is_known = self.stream.borrow().as_ref().is_ok_and(|known| same_stream(*known, usable));
        if !is_known {
            let _before = self.stream.send_replace(Ok(usable));
        }
        gauge!(names::CONNECTED).set(1.0);
        self.tell_republisher().await?;
        if let Some(window) = self.config.retention() {
            self.rotate(window).await;
        }
        Ok(())
    }

    /// Makes the stream the one that all relays publish to. From then on what is new can be published: what was retained
    /// before is known to be lost, whatever comes into the stream meanwhile.
    async fn meet(&self, usable: Usable) -> Result<(), KeeperError> {
        let created = usable.position.created;
        match within(PATIENCE, known::meet(&self.pool, self.relay, created)).await? {
            Meeting::Known | Meeting::First => Ok(()),
            Meeting::Recreated { messages } => {
                counter!(names::STREAM_LOSSES).increment(1);
                tracing::warn!(
                    messages,
                    "the stream was created anew; publishing about so many retained messages to it again"
                );
                Ok(())
            }
            Meeting::Elsewhere(other) => Err(KeeperError::Elsewhere { other, seen: created }),
        }
    }

    /// Parts may have been left by a relay that ended, or asked for by an operator or a subscriber.
    async fn tell_republisher(&self) -> Result<(), KeeperError> {
        let remaining = within(PATIENCE, republication::remaining(&self.pool)).await?;
        show_remaining(remaining.unwrap_or(0));
        if remaining.is_some() {
            self.lacking.notify_one();
        }
        Ok(())
    }

    /// A stream of an older version, or of an operator, names no database. Without the right to change that, everything goes
    /// on; only a relay of another database is not kept away.
    async fn claim(&self, memory: &mut Memory, options: Map<String, Value>, owner: &str) {
        match nats_stream::claim(&self.nats, &self.jetstream, options, owner).await {
            Ok(()) => tracing::info!(owner, "stream {STREAM} names its database now"),
            Err(error) => {
                memory.cannot_claim = true;
                tracing::warn!(
                    error = %Report::of(&error),
                    "cannot write the name of the database into the description of stream {STREAM}: a relay of another database \
                     would not be refused; the NATS user needs permission to publish on $JS.API.STREAM.UPDATE.{STREAM}"
                );
            }
        }
    }

    async fn ensure(&self, link: Link) -> Result<nats_stream::Seen, StreamError> {
        nats_stream::ensure(&self.nats, &self.jetstream, &self.config, self.owner.as_deref(), link).await
    }

    /// Notices that the stream does not hold any more what it has acknowledged. Its end tells most of it; but it may have been
    /// filled again by what was on its way, so after the connection was lost, and after every loss, the newest message that it
    /// should hold is looked at as well.
    async fn find_losses(&self, usable: Usable, memory: &mut Memory) -> Result<(), KeeperError> {
        let StreamPosition { created, mut last_seq } = usable.position;
        let Some(newest) = within(PATIENCE, known::newest(&self.pool, i64::MAX)).await? else {
            memory.known_since = Some(usable.link);
            return Ok(());
        };
        if newest.stream_seq > last_seq {
            // Another relay may have published and settled between the two looks.
            let again = self.ensure(usable.link).await?.usable.position;
            if again.created != created {
                return Ok(());
            }
            last_seq = again.last_seq;
        }
        let is_shorter = newest.stream_seq > last_seq;
        if !is_shorter && memory.known_since == Some(usable.link) {
            return Ok(());
        }
        let held = if is_shorter { Some(false) } else { self.holds(&newest, memory).await };
        memory.known_since = None;
        if held == Some(false) {
            let lost = known::lose(&self.pool, created, newest.identity);
            if let Some(messages) = within(PATIENCE, lost).await? {
                counter!(names::STREAM_LOSSES).increment(1);
                tracing::warn!(
                    messages,
                    "the stream lacks messages it had acknowledged; publishing about so many retained messages again"
                );
            }
        }
        // In doubt the content is looked at again the next time.
        memory.known_since = held.map(|_| usable.link);
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

/// Says what is new about the options of the stream.
fn note_risks(memory: &mut Memory, risks: Vec<String>) {
    gauge!(names::STREAM_RISKS).set(f64::from(u32::try_from(risks.len()).unwrap_or(u32::MAX)));
    for risk in risks.iter().filter(|risk| !memory.risks.contains(risk)) {
        tracing::warn!("stream {STREAM}: {risk}; change it with `nats stream edit {STREAM}`");
    }
    memory.risks = risks;
}

/// Why nothing is published while the connection is lost.
pub fn not_connected(nats: &Nats) -> String {
    format!("{}; events wait in the outbox", nats.why_not_connected())
}

fn same_stream(known: Usable, now: Usable) -> bool {
    let of = |usable: Usable| (usable.position.created, usable.max_body, usable.link);
    of(known) == of(now)
}
