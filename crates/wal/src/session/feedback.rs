use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use pgwire_replication::Lsn;
use pgwire_replication::protocol::framing::{write_copy_data, write_copy_done};
use pgwire_replication::protocol::replication::{encode_standby_status_update, unix_to_pg_timestamp};
use tokio::io::{BufReader, WriteHalf};
use tokio::sync::Notify;
use tokio::task::JoinHandle;

use super::SessionError;
use super::transport::Transport;

/// How often the server hears how far everything is published. Each time it is asked to answer, so that a dead
/// connection is noticed from this side as well.
const STATUS_INTERVAL: Duration = Duration::from_secs(1);

/// Time for the last words on a connection.
const FAREWELL: Duration = Duration::from_secs(1);

/// The half of the connection that is written to.
type Writer = WriteHalf<BufReader<Transport>>;

/// Says what the server may forget. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Confirmer(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    flushed: AtomicU64,
    stop: Notify,
}

impl Confirmer {
    /// Everything before `lsn` is published: a later session need not see it again. Never goes back.
    pub fn confirm(&self, lsn: Lsn) {
        self.0.flushed.fetch_max(lsn.0, Ordering::Relaxed);
    }

    /// What was confirmed last; 0 until something was.
    #[must_use]
    pub fn confirmed(&self) -> Lsn {
        Lsn(self.0.flushed.load(Ordering::Relaxed))
    }
}

/// The task that speaks while the other half of the connection listens.
#[derive(Debug)]
pub(super) struct Feedback {
    confirmer: Confirmer,
    task: JoinHandle<()>,
}

impl Feedback {
    pub(super) fn spawn(writer: Writer) -> Self {
        let confirmer = Confirmer(Arc::new(Shared { flushed: AtomicU64::new(0), stop: Notify::new() }));
        let task = tokio::spawn(speak(writer, confirmer.clone()));
        Self { confirmer, task }
    }

    pub(super) fn confirmer(&self) -> Confirmer {
        self.confirmer.clone()
    }

    /// Tells the server the last confirmed position and ends the stream, so that the slot is free at once.
    pub(super) async fn finish(mut self) {
        self.confirmer.0.stop.notify_one();
        // If it does not get through, the server sees the position a little older: a few events come again.
        let _ = tokio::time::timeout(FAREWELL, &mut self.task).await;
    }
}

impl Drop for Feedback {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Ends when the connection does; the reading half reports that.
async fn speak(mut writer: Writer, confirmer: Confirmer) {
    let mut interval = tokio::time::interval(STATUS_INTERVAL);
    loop {
        let stopping = tokio::select! {
            _ = interval.tick() => false,
            () = confirmer.0.stop.notified() => true,
        };
        if tell(&mut writer, confirmer.confirmed(), !stopping).await.is_err() {
            return;
        }
        if stopping {
            // The reading half is about to be dropped: there is nobody left to tell.
            let _ = write_copy_done(&mut writer).await;
            return;
        }
    }
}

async fn tell(writer: &mut Writer, flushed: Lsn, answer: bool) -> Result<(), SessionError> {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let now = unix_to_pg_timestamp(i64::try_from(now.as_micros()).unwrap_or(i64::MAX));
    Ok(write_copy_data(writer, &encode_standby_status_update(flushed, now, answer)).await?)
}
