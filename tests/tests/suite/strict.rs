//! Strict writes, and the default ones that invalidate inline, step by step on real servers.

use std::time::{Duration, Instant};

use cache::{Acquired, CacheConfig, Fill, LeaseToken, Redis, RedisConfig};
use devstack::proxy::{FaultProxy, Mode};
use outbox::{CacheKey, CommitError, CommitLimits, Event, Marks, Writer};
use sqlx::{PgPool, Postgres, Transaction};
use tests::Pair;

pub const KEY: &str = "user:1";
pub const MINUTE: Duration = Duration::from_secs(60);

/// A pair with one user, whose cached value is the name.
pub async fn pair_with_user() -> Pair {
    let pair = Pair::start().await.unwrap();
    let sql =
        "create table users (id bigint primary key, name text not null); insert into users values (1, 'old')";
    sqlx::raw_sql(sql).execute(&pair.pool).await.unwrap();
    pair
}

pub async fn rename<'a>(pool: &PgPool, name: &str) -> Transaction<'a, Postgres> {
    let mut tx = pool.begin().await.unwrap();
    sqlx::query("update users set name = $1 where id = 1").bind(name).execute(&mut *tx).await.unwrap();
    tx
}

pub async fn load(pool: &PgPool) -> String {
    sqlx::query_scalar("select name from users where id = 1").fetch_one(pool).await.unwrap()
}

pub fn events() -> [Event; 1] {
    [Event::delete([KEY]).unwrap()]
}

pub fn key() -> CacheKey {
    CacheKey::new(KEY).unwrap()
}

pub async fn acquire(redis: &Redis, token: LeaseToken) -> Acquired {
    redis.acquire(&key(), token, MINUTE, false).await.unwrap()
}

pub async fn fill(redis: &Redis, token: LeaseToken, value: &str) -> bool {
    let fill = Fill { value: value.as_bytes(), ttl: MINUTE, version: None, keep_stale_copy: false };
    redis.fill(&key(), token, fill).await.unwrap()
}

/// What a reader gets, and leaves behind in the cache.
pub async fn read(cache: &cache::Cache, pool: &PgPool) -> String {
    let options = cache::Options::<cache::Raw> { ttl: MINUTE, ..Default::default() };
    let load = || async { Ok::<_, sqlx::Error>(load(pool).await.into_bytes()) };
    String::from_utf8(cache.get_or_load_with(KEY, &options, load).await.unwrap()).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn strict_commit_removes_the_key_before_it_returns_and_voids_loads_in_flight() {
    let pair = pair_with_user().await;
    // Nobody else invalidates here: what the writer itself does must be enough.
    pair.relay.process().terminate().await.unwrap();
    let redis = pair.cache().unwrap();
    let cache = cache::Cache::new(redis.clone(), CacheConfig::default());
    assert_eq!(read(&cache, &pair.pool).await, "old");
    assert!(pair.is_cached(KEY).await.unwrap());

    let tx = rename(&pair.pool, "new").await;
    let committed = Writer::new(redis.clone()).commit_strict(tx, &events()).await.unwrap();
    assert!(committed.finished && committed.receipts.len() == 1);
    assert!(!pair.is_cached(KEY).await.unwrap());
    assert_eq!(read(&cache, &pair.pool).await, "new");

    let tx = rename(&pair.pool, "newer").await;
    redis.invalidate(&[key()]).await.unwrap();
    let straddling = LeaseToken::generate();
    assert_eq!(acquire(&redis, straddling).await, Acquired::Grant);
    let loaded = load(&pair.pool).await;
    assert_eq!(loaded, "new");
    Writer::new(redis.clone()).commit_strict(tx, &events()).await.unwrap();
    assert!(!fill(&redis, straddling, &loaded).await, "a value from before the commit was stored after it");
    assert_eq!(read(&cache, &pair.pool).await, "newer");
}

#[tokio::test(flavor = "multi_thread")]
async fn no_reader_can_fill_at_any_point_between_mark_and_unmark() {
    let pair = pair_with_user().await;
    pair.relay.process().terminate().await.unwrap();
    let redis = pair.cache().unwrap();
    pair.fill(KEY).await.unwrap();
    let mut tx = rename(&pair.pool, "new").await;
    let events = events();
    let receipt = outbox::enqueue(&mut tx, &events[0]).await.unwrap();
    let marks = Marks::new(redis.clone(), &events, receipt.xid);

    marks.set(MINUTE).await.unwrap();
    assert!(!pair.is_cached(KEY).await.unwrap());
    let before_commit = LeaseToken::generate();
    assert_eq!(acquire(&redis, before_commit).await, Acquired::Bypass);
    let old = load(&pair.pool).await;
    tx.commit().await.unwrap();
    let after_commit = LeaseToken::generate();
    assert_eq!(acquire(&redis, after_commit).await, Acquired::Bypass);
    marks.remove(MINUTE).await.unwrap();
    assert!(!fill(&redis, before_commit, &old).await);
    assert!(!fill(&redis, after_commit, &old).await);

    let fresh = LeaseToken::generate();
    assert_eq!(acquire(&redis, fresh).await, Acquired::Grant);
    assert!(fill(&redis, fresh, &load(&pair.pool).await).await);
    assert_eq!(pair.stack.redis.command(&["GET", KEY]).await.unwrap(), "new");
}

#[tokio::test(flavor = "multi_thread")]
async fn write_that_cannot_be_marked_rolls_back_in_bounded_time_and_changes_nothing() {
    let pair = pair_with_user().await;
    let proxy = FaultProxy::start(pair.stack.redis.address()).await.unwrap();
    let url = pair.stack.redis.url_through(&proxy);
    let limits = CommitLimits { mark: Duration::from_millis(300), ..Default::default() };
    let redis = Redis::new(RedisConfig { url, ..Default::default() }).unwrap();
    let writer = Writer::with_limits(redis.clone(), limits);
    redis.ping().await.unwrap();
    pair.fill(KEY).await.unwrap();

    for mode in [Mode::Stall, Mode::Refuse, Mode::DropToServer] {
        proxy.set_mode(mode);
        proxy.reset_connections();
        let started = Instant::now();
        let error = writer.commit_strict(rename(&pair.pool, "new").await, &events()).await.unwrap_err();
        assert!(matches!(error, CommitError::Mark(_)) && error.is_rolled_back(), "{mode:?}: {error:?}");
        assert!(started.elapsed() < Duration::from_secs(5), "{mode:?}: {:?}", started.elapsed());
        assert_eq!(load(&pair.pool).await, "old");
        assert_eq!(pair.backlog().await.unwrap(), 0);
    }
    // Redis is back: the next write succeeds, with connections that died in between.
    proxy.set_mode(Mode::Pass);
    proxy.reset_connections();
    writer.commit_strict(rename(&pair.pool, "new").await, &events()).await.unwrap();
    assert_eq!(load(&pair.pool).await, "new");
}

#[tokio::test(flavor = "multi_thread")]
async fn commit_refused_by_a_deferred_constraint_is_rolled_back_and_leaves_no_mark() {
    let pair = pair_with_user().await;
    let sql = "create table orders (id bigint references users deferrable initially deferred)";
    sqlx::raw_sql(sql).execute(&pair.pool).await.unwrap();
    let redis = pair.cache().unwrap();
    let mut tx = rename(&pair.pool, "new").await;
    sqlx::query("insert into orders values (404)").execute(&mut *tx).await.unwrap();
    let error = Writer::new(redis.clone()).commit_strict(tx, &events()).await.unwrap_err();
    assert!(matches!(error, CommitError::Refused(_)), "{error:?}");
    assert_eq!(load(&pair.pool).await, "old");
    // Sooner than the resolver would.
    devstack::eventually(Duration::from_secs(4), async || {
        acquire(&redis, LeaseToken::generate()).await == Acquired::Grant
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn default_write_invalidates_inline_and_does_not_depend_on_redis() {
    let pair = pair_with_user().await;
    pair.relay.process().terminate().await.unwrap();
    let writer = Writer::new(pair.cache().unwrap());
    pair.fill(KEY).await.unwrap();
    let committed = writer.commit_and_invalidate(rename(&pair.pool, "new").await, &events()).await.unwrap();
    assert!(committed.finished);
    assert!(!pair.is_cached(KEY).await.unwrap());

    pair.fill(KEY).await.unwrap();
    pair.stack.redis.stop().unwrap();
    let started = Instant::now();
    let committed = writer.commit_and_invalidate(rename(&pair.pool, "newer").await, &events()).await.unwrap();
    assert!(!committed.finished && started.elapsed() < Duration::from_secs(5));
    assert_eq!(load(&pair.pool).await, "newer");
    pair.stack.redis.resume().unwrap();
    // The event does what the writer could not.
    pair.relay.process().start().unwrap();
    pair.until_none(KEY).await;
}
