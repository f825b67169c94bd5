use std::sync::Arc;

use metrics::{counter, gauge};
use service::Shutdown;
use sqlx::PgPool;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use wal::publication::{self, Lineage, Tables};
use wal::session::{ChangeStream, Frame, SessionError};
use wal::{Assembler, AssemblyError, Lsn, Piece};

use super::Reading;
use crate::database::{PATIENCE, within};
use crate::metrics as names;

/// Parts of transactions on their way to the pump. Their bytes are bounded apart.
const QUEUE_ITEMS: usize = 4096;

/// Memory of everything that was read and is not settled yet, in KiB.
const BUDGET_KIB: usize = 4 * 1024;

/// Counters are raised after this many messages: once for each would cost more than decoding it.
const COUNT_EVERY: u32 = 256;

/// What comes from the log, in its order.
#[derive(Debug)]
pub(super) enum Item {
    /// A part of a transaction, and its share of the memory.
    Piece(Piece, OwnedSemaphorePermit),
    /// A transaction that invalidates nothing ended here, or nothing was to be decoded up to here.
    Nothing(Lsn),
}

/// Why reading ended.
#[derive(Debug, thiserror::Error)]
pub(super) enum ReadError {
    #[error(transparent)]
    Session(#[from] SessionError),
    #[error("cannot decode the write-ahead log")]
    Assembly(#[source] AssemblyError),
    #[error("cannot look up a table of the write-ahead log")]
    Catalog(#[source] sqlx::Error),
    #[error("transactions cannot be read before their commit")]
    NotBeforeCommit(#[source] AssemblyError),
}

/// Where relations are looked up that nobody knew when reading began.
#[derive(Debug)]
pub(super) struct Catalog<'a> {
    pub(super) pool: &'a PgPool,
    pub(super) publication: &'a str,
    pub(super) tables: &'a Tables,
}

impl Catalog<'_> {
    async fn look_up(&self, relation: u32) -> Result<Lineage, sqlx::Error> {
        within(PATIENCE, publication::lineage(self.pool, self.publication, self.tables, relation)).await
    }
}

/// Reading ended because of a shutdown.
#[derive(Debug)]
pub(super) struct ReadEnd {
    pub(super) stream: ChangeStream,
}

/// The reader's end of the queue.
#[derive(Debug)]
pub(super) struct Sender {
    queue: mpsc::Sender<Item>,
    budget: Arc<Semaphore>,
}

pub(super) fn channel() -> (Sender, mpsc::Receiver<Item>) {
    let (queue, receiver) = mpsc::channel(QUEUE_ITEMS);
    (Sender { queue, budget: Arc::new(Semaphore::new(BUDGET_KIB)) }, receiver)
}

impl Sender {
    /// Waits until there is room. Says whether anybody still listens.
    async fn send(&self, piece: Piece) -> bool {
        let item = match piece.end_lsn {
            Some(end_lsn) if piece.is_empty() => Item::Nothing(end_lsn),
            _ => {
                let kib = (piece.bytes() / 1024 + 1).min(BUDGET_KIB);
                let kib = u32::try_from(kib).expect("at most the budget");
                let Ok(permit) = Arc::clone(&self.budget).acquire_many_owned(kib).await else { return false };
                Item::Piece(piece, permit)
            }
        };
        self.queue.send(item).await.is_ok()
    }
}

/// Reads until shutdown is requested or the stream ends.
pub(super) async fn read(
    mut stream: ChangeStream,
    mut assembler: Assembler,
    catalog: &Catalog<'_>,
    sender: Sender,
    reading: &Reading,
    shutdown: &Shutdown,
) -> Result<ReadEnd, ReadError> {
    let mut uncounted = 0;
    let requested = shutdown.requested();
    tokio::pin!(requested);
    loop {
        let frame = tokio::select! {
            biased;
            frame = stream.next() => frame?,
            () = &mut requested => return Ok(ReadEnd { stream }),
        };
        match frame {
            Frame::Data(message) => {
                assembler.feed(&message).map_err(|error| match error {
                    AssemblyError::TooManyKeys | AssemblyError::VoidEvents => {
                        ReadError::NotBeforeCommit(error)
                    }
                    error => ReadError::Assembly(error),
                })?;
                if let Some(relation) = assembler.take_question() {
                    let lineage = catalog.look_up(relation).await.map_err(ReadError::Catalog)?;
                    assembler.answer(relation, lineage);
                }
                while let Some(piece) = assembler.next_piece() {
                    tokio::select! {
                        sent = sender.send(piece) => if !sent { return Ok(ReadEnd { stream }) },
                        () = &mut requested => return Ok(ReadEnd { stream }),
                    }
                }
                if let Some(passed) = assembler.take_passed() {
                    // Without room the next heartbeat says it.
                    let _ = sender.queue.try_send(Item::Nothing(passed));
                }
                uncounted += 1;
                if uncounted >= COUNT_EVERY {
                    uncounted = 0;
                    count(&mut assembler);
                }
            }
            Frame::KeepAlive { wal_end } => {
                count(&mut assembler);
                gauge!(names::CAPTURE_RECEIVED_LSN).set(position(wal_end));
                // Without room it says nothing that the next one does not say as well.
                let _ = sender.queue.try_send(Item::Nothing(wal_end));
            }
            Frame::Notice(text) => {
                if reading.notice(&text) {
                    tracing::warn!("the server says on the replication connection: {text}");
                }
            }
        }
    }
}

fn count(assembler: &mut Assembler) {
    let seen = assembler.take_seen();
    counter!(names::CAPTURE_CHANGES).increment(seen.changes);
    counter!(names::CAPTURE_UNWATCHED).increment(seen.unwatched);
    counter!(names::CAPTURE_REFUSED_KEYS).increment(seen.refused_keys);
}

/// A position in the log as a number that a gauge holds.
#[expect(clippy::cast_precision_loss, reason = "exact up to 8 PiB of log")]
pub(super) fn position(lsn: Lsn) -> f64 {
    lsn.0 as f64
}
