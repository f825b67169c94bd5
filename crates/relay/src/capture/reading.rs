use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Notify;
use wal::Lsn;
use wal::publication::Tables;

/// The server repeats a warning every second for as long as it holds.
const NOTICE_HOLDS: Duration = Duration::from_secs(10);

/// What reader and monitor know of each other.
#[derive(Debug, Default)]
pub struct Reading {
    now: Mutex<Now>,
    /// The publication has changed: the stream is to be opened anew.
    drifted: Notify,
}

#[derive(Debug, Default)]
struct Now {
    /// The tables as they were when the stream began; nothing while nothing is read.
    tables: Option<Arc<Tables>>,
    /// Everything before it is published, or nothing was to be.
    reached: Option<Lsn>,
    /// Last notice of the server, and when it came.
    notice: Option<(Instant, String)>,
}

impl Reading {
    fn now(&self) -> MutexGuard<'_, Now> {
        self.now.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn began(&self, tables: Arc<Tables>) {
        *self.now() = Now { tables: Some(tables), ..Now::default() };
    }

    pub(super) fn ended(&self) {
        *self.now() = Now::default();
    }

    /// The tables that are read; nothing while this relay does not read.
    pub(super) fn tables(&self) -> Option<Arc<Tables>> {
        self.now().tables.clone()
    }

    pub(super) fn set_reached(&self, lsn: Lsn) {
        self.now().reached = Some(lsn);
    }

    /// Position before which everything is published; nothing while this relay does not read.
    pub(super) fn reached(&self) -> Option<Lsn> {
        self.now().reached
    }

    /// Remembers a notice of the server; says whether it is another than the last one.
    pub(super) fn notice(&self, text: &str) -> bool {
        let mut now = self.now();
        let is_new = now.notice.as_ref().is_none_or(|(_, known)| known != text);
        now.notice = Some((Instant::now(), text.to_owned()));
        is_new
    }

    /// What the server warns of at the moment.
    pub(super) fn warning(&self) -> Option<String> {
        let now = self.now();
        let (at, text) = now.notice.as_ref()?;
        (at.elapsed() < NOTICE_HOLDS).then(|| text.clone())
    }

    /// Has the stream opened anew.
    pub(super) fn open_anew(&self) {
        self.drifted.notify_one();
    }

    pub(super) async fn drifted(&self) {
        self.drifted.notified().await;
    }
}
