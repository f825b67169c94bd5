//! A server, a connection to it, and short ways to say what tests say often.

use std::time::Duration;

use cache::{Acquired, Fill, LeaseId, LeaseToken, Mark, Redis, RedisConfig, Work};
use devstack::RedisOptions;
use event::{CacheKey, Change, CommittedEvent, EventId, History};

pub(crate) const MINUTE: Duration = Duration::from_secs(60);

/// Long enough for anything on a busy machine.
pub(crate) const SOON: Duration = Duration::from_secs(20);

/// A Redis server and a connection to it.
pub(crate) struct Bed {
    pub(crate) server: devstack::Redis,
    pub(crate) redis: Redis,
}

impl Bed {
    pub(crate) async fn new() -> Self {
        Self::with(RedisOptions::default()).await
    }

    pub(crate) async fn with(options: RedisOptions) -> Self {
        let server = devstack::Redis::start_alone(options).await.unwrap();
        let redis = connect(&server.url());
        Self { server, redis }
    }

    /// Runs a command as any client could.
    pub(crate) async fn raw(&self, command: &[&str]) -> String {
        self.server.command(command).await.unwrap()
    }

    pub(crate) async fn exists(&self, name: &str) -> bool {
        self.raw(&["EXISTS", name]).await == "1"
    }

    pub(crate) async fn grant(&self, key: &CacheKey) -> LeaseId {
        granted(self.acquire(key, LeaseToken::generate()).await)
    }

    pub(crate) async fn acquire(&self, key: &CacheKey, token: LeaseToken) -> Acquired {
        self.redis.acquire(key, token, MINUTE, false).await.unwrap()
    }

    pub(crate) async fn fill(&self, key: &CacheKey, lease: &LeaseId, value: &str) -> bool {
        self.redis.fill(key, lease, plain(value)).await.unwrap()
    }

    pub(crate) async fn delete(&self, key: &CacheKey, xid: u64) -> cache::Applied {
        self.redis.apply(&work([deleted(&[key], &[xid])])).await.unwrap()
    }
}

pub(crate) fn connect(url: &str) -> Redis {
    Redis::new(RedisConfig { url: url.to_owned(), ..RedisConfig::default() }).unwrap()
}

#[track_caller]
pub(crate) fn granted(acquired: Acquired) -> LeaseId {
    match acquired {
        Acquired::Grant(lease) => lease,
        other => panic!("not granted: {other:?}"),
    }
}

pub(crate) fn key(text: &str) -> CacheKey {
    CacheKey::new(text).unwrap()
}

/// The history that all transactions here belong to.
pub(crate) fn history() -> History {
    "d0000000001.2".parse().unwrap()
}

/// The mark of transaction `xid`.
pub(crate) fn mark(xid: u64) -> Mark {
    Mark::parse(&format!("{}:{xid}:{xid:016x}", history())).unwrap()
}

/// Key and transaction of every mark that is older.
pub(crate) async fn orphans(redis: &Redis, older_than: Duration) -> Vec<(CacheKey, u64)> {
    let mut pages = redis.old_marks(older_than).await.unwrap();
    let mut orphans = Vec::new();
    while let Some(page) = pages.next().await.unwrap() {
        orphans.extend(page.into_iter().map(|old| (old.key, old.mark.transaction().xid)));
    }
    orphans
}

pub(crate) fn plain(value: &str) -> Fill<'_> {
    Fill { value: value.as_bytes(), ttl: MINUTE, version: None, keep_stale_copy: false }
}

pub(crate) fn deleted(keys: &[&CacheKey], xids: &[u64]) -> CommittedEvent {
    committed(keys, Change::Delete, xids)
}

pub(crate) fn updated(key: &CacheKey, value: &str, version: i64, xid: u64) -> CommittedEvent {
    committed(&[key], Change::update(value.into(), version, MINUTE).unwrap(), &[xid])
}

pub(crate) fn committed(keys: &[&CacheKey], change: Change, xids: &[u64]) -> CommittedEvent {
    let keys = keys.iter().copied().cloned().collect();
    let (xids, history) = (xids.to_vec(), Some(history()));
    CommittedEvent { id: EventId::generate(), keys, change, xids, history, at_us: 0, traceparent: None }
}

pub(crate) fn work(events: impl IntoIterator<Item = CommittedEvent>) -> Work {
    let mut work = Work::new();
    for event in events {
        work.add(&event);
    }
    work
}
