//! A server, a connection to it, and short ways to say what tests say often.

use std::time::Duration;

use cache::{Acquired, Fill, LeaseId, LeaseToken, Redis, RedisConfig, Work};
use devstack::RedisOptions;
use event::{CacheKey, Change, CommittedEvent, EventId};

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
    let xids = xids.to_vec();
    CommittedEvent { id: EventId::generate(), keys, change, xids, at_us: 0, traceparent: None }
}

pub(crate) fn work(events: impl IntoIterator<Item = CommittedEvent>) -> Work {
    let mut work = Work::new();
    for event in events {
        work.add(&event);
    }
    work
}
