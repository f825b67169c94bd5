//! Strict writes, and the default ones that invalidate inline, step by step on real servers.

use std::time::{Duration, Instant};

use cache::{Acquired, CacheConfig, Fill, LeaseId, LeaseToken, Redis, RedisConfig};
use devstack::eventually;
use devstack::proxy::{FaultProxy, Mode};
use outbox::{CacheKey, CommitError, CommitLimits, Event, Marks, Writer};
use sqlx::{Acquire, PgPool, Postgres, Transaction};
use tests::Pair;

pub const KEY: &str = "user:1";
pub const MINUTE: Duration = Duration::from_secs(60);
const SOON: Duration = Duration::from_secs(20);

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

pub async fn acquire(redis: &Redis) -> Acquired {
    redis.acquire(&key(), LeaseToken::generate(), MINUTE, false).await.unwrap()
}

/// Leave to fill, if it is given.
pub async fn grant(redis: &Redis) -> Option<LeaseId> {
    if let Acquired::Grant(lease) = acquire(redis).await { Some(lease) } else { None }
}

pub async fn fill(redis: &Redis, lease: &LeaseId, value: &str) -> bool {
    let fill = Fill { value: value.as_bytes(), ttl: MINUTE, version: None, keep_stale_copy: false };
    redis.fill(&key(), lease, fill).await.unwrap()
}

/// What a reader gets, and leaves behind in the cache.
pub async fn read(cache: &cache::Cache, pool: &PgPool) -> String {
    let options = cache::Options::<cache::Raw> { ttl: MINUTE, ..Default::default() };
    let load = || async { Ok::<_, sqlx::Error>(load(pool).await.into_bytes()) };
    String::from_utf8(cache.get_or_load_with(KEY, &options, load).await.unwrap()).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn strict_commit_removes_the_key_before_it_returns() {
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
}

#[tokio::test(flavor = "multi_thread")]
async fn no_reader_can_fill_at_any_point_between_mark_and_unmark() {
    let pair = pair_with_user().await;
    pair.relay.process().terminate().await.unwrap();
    let redis = pair.cache().unwrap();
    let early = grant(&redis).await.unwrap();
    let old = load(&pair.pool).await;
    pair.fill(KEY).await.unwrap();
    let mut tx = rename(&pair.pool, "new").await;
    let events = events();
    outbox::enqueue(&mut tx, &events[0]).await.unwrap();
    let transaction = outbox::transaction_id(&mut tx).await.unwrap();
    let marks = Marks::new(redis.clone(), &events, transaction);

    marks.set(MINUTE).await.unwrap();
    assert!(!pair.is_cached(KEY).await.unwrap());
    assert_eq!(acquire(&redis).await, Acquired::Bypass);
    tx.commit().await.unwrap();
    assert_eq!(acquire(&redis).await, Acquired::Bypass);
    assert!(!fill(&redis, &early, &old).await, "a load from before the mark was stored");
    marks.remove(MINUTE).await.unwrap();
    assert!(!fill(&redis, &early, &old).await, "a load from before the mark was stored");

    let fresh = grant(&redis).await.unwrap();
    assert!(fill(&redis, &fresh, &load(&pair.pool).await).await);
    assert_eq!(pair.stack.redis.command(&["GET", KEY]).await.unwrap(), "new");
}

/// From now on a commit that changes a user waits for whoever has the lock.
async fn hold_commits(pool: &PgPool) -> Transaction<'static, Postgres> {
    let sql = "create function wait() returns trigger language plpgsql as
               $$ begin perform pg_advisory_xact_lock(7); return null; end $$;
               create constraint trigger wait after update on users deferrable initially deferred
               for each row execute function wait();";
    sqlx::raw_sql(sql).execute(pool).await.unwrap();
    let mut barrier = pool.begin().await.unwrap();
    sqlx::query("select pg_advisory_xact_lock(7)").execute(&mut *barrier).await.unwrap();
    barrier
}

/// Waits until a commit waits for the lock.
async fn until_held(pool: &PgPool) {
    let waiting = "select exists (select from pg_locks where locktype = 'advisory' and not granted)";
    eventually(SOON, async || sqlx::query_scalar::<_, bool>(waiting).fetch_one(pool).await.unwrap()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn strict_write_with_an_update_marks_its_key_too() {
    let pair = pair_with_user().await;
    pair.relay.process().terminate().await.unwrap();
    let redis = pair.cache().unwrap();
    let barrier = hold_commits(&pair.pool).await;
    let writer = Writer::new(redis.clone());
    let tx = rename(&pair.pool, "new").await;
    let update = [Event::update(KEY, "new", 2, MINUTE).unwrap()];
    let write = tokio::spawn(async move { writer.commit_strict(tx, &update).await });
    until_held(&pair.pool).await;
    assert_eq!(acquire(&redis).await, Acquired::Bypass);
    barrier.rollback().await.unwrap();
    assert!(write.await.unwrap().unwrap().finished);
    assert!(grant(&redis).await.is_some());
}

#[tokio::test(flavor = "multi_thread")]
async fn default_write_invalidates_only_after_its_commit() {
    let pair = pair_with_user().await;
    pair.relay.process().terminate().await.unwrap();
    let redis = pair.cache().unwrap();
    let barrier = hold_commits(&pair.pool).await;
    let writer = Writer::new(redis.clone());
    let tx = rename(&pair.pool, "new").await;
    let write = tokio::spawn(async move { writer.commit_and_invalidate(tx, &events()).await });
    until_held(&pair.pool).await;
    // What is stored now is old, and nothing but the delete after the commit can remove it.
    let lease = grant(&redis).await.unwrap();
    assert!(fill(&redis, &lease, &load(&pair.pool).await).await);
    barrier.rollback().await.unwrap();
    assert!(write.await.unwrap().unwrap().finished);
    assert!(!pair.is_cached(KEY).await.unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn commit_of_a_failed_transaction_is_an_error_even_without_events() {
    let pair = pair_with_user().await;
    let writer = Writer::new(pair.cache().unwrap());
    for strict in [true, false] {
        let mut tx = rename(&pair.pool, "never").await;
        sqlx::raw_sql("select 1 / 0").execute(&mut *tx).await.unwrap_err();
        let refused = match strict {
            true => writer.commit_strict(tx, &[]).await,
            false => writer.commit_and_invalidate(tx, &[]).await,
        };
        let error = refused.unwrap_err();
        assert!(matches!(error, CommitError::Refused(_)) && error.is_rolled_back(), "{error:?}");
        assert_eq!(load(&pair.pool).await, "old");
        let tx = rename(&pair.pool, "old").await;
        let committed = match strict {
            true => writer.commit_strict(tx, &[]).await,
            false => writer.commit_and_invalidate(tx, &[]).await,
        };
        assert!(committed.unwrap().finished);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn strict_commit_lets_no_old_value_in_from_before_the_commit_until_it_returns() {
    let pair = pair_with_user().await;
    pair.relay.process().terminate().await.unwrap();
    let proxy = FaultProxy::start(pair.stack.redis.address()).await.unwrap();
    let url = pair.stack.redis.url_through(&proxy);
    let limits = CommitLimits { finish: MINUTE, ..Default::default() };
    let writer = Writer::with_limits(Redis::new(RedisConfig { url, ..Default::default() }).unwrap(), limits);
    let redis = pair.cache().unwrap();
    let cache = cache::Cache::new(redis.clone(), CacheConfig::default());

    let straddling = grant(&redis).await.unwrap();
    let old = load(&pair.pool).await;
    // COMMIT takes as long as this lock is held.
    let barrier = hold_commits(&pair.pool).await;
    let tx = rename(&pair.pool, "new").await;
    let write = tokio::spawn(async move { writer.commit_strict(tx, &events()).await });
    eventually(SOON, async || acquire(&redis).await == Acquired::Bypass).await;
    assert!(!fill(&redis, &straddling, &old).await, "a load from before the mark was stored");
    assert_eq!(read(&cache, &pair.pool).await, "old");
    assert!(!pair.is_cached(KEY).await.unwrap());

    // Committed and visible, but the writer is held up before it can unmark.
    proxy.set_mode(Mode::Stall);
    barrier.rollback().await.unwrap();
    eventually(SOON, async || load(&pair.pool).await == "new").await;
    assert_eq!(acquire(&redis).await, Acquired::Bypass);
    assert_eq!(read(&cache, &pair.pool).await, "new");
    assert!(!pair.is_cached(KEY).await.unwrap());

    proxy.set_mode(Mode::Pass);
    assert!(write.await.unwrap().unwrap().finished);
    assert_eq!(read(&cache, &pair.pool).await, "new");
    assert!(pair.is_cached(KEY).await.unwrap());
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
async fn connections_that_no_longer_answer_are_replaced_although_writes_wait_less_long_than_that_takes() {
    let pair = pair_with_user().await;
    let redis = pair.stack.redis.address();
    let hole = FaultProxy::start(redis).await.unwrap();
    let proxy = FaultProxy::start(hole.addr()).await.unwrap();
    let url = pair.stack.redis.url_through(&proxy);
    let config =
        RedisConfig { url, pool_size: 1, response_timeout: Duration::from_secs(2), ..Default::default() };
    let limits = CommitLimits { mark: Duration::from_millis(200), ..Default::default() };
    let writer = Writer::with_limits(Redis::new(config).unwrap(), limits);
    writer.commit_strict(rename(&pair.pool, "new").await, &events()).await.unwrap();
    // From now on whatever is sent on the present connection is lost, and nothing says so.
    hole.set_mode(Mode::DropToServer);
    proxy.set_upstream(redis);
    writer.commit_strict(rename(&pair.pool, "lost").await, &events()).await.unwrap_err();
    eventually(SOON, async || {
        writer.commit_strict(rename(&pair.pool, "newer").await, &events()).await.map(drop)
    })
    .await;
    assert_eq!(load(&pair.pool).await, "newer");
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
    eventually(Duration::from_secs(4), async || grant(&redis).await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn savepoint_is_refused_before_anything_is_marked_and_the_transaction_around_it_goes_on() {
    let pair = pair_with_user().await;
    pair.relay.process().terminate().await.unwrap();
    let writer = Writer::new(pair.cache().unwrap());
    pair.fill(KEY).await.unwrap();
    let mut tx = rename(&pair.pool, "new").await;
    for strict in [true, false] {
        let mut savepoint = tx.begin().await.unwrap();
        sqlx::query("update users set name = 'never' where id = 1").execute(&mut *savepoint).await.unwrap();
        let refused = match strict {
            true => writer.commit_strict(savepoint, &events()).await,
            false => writer.commit_and_invalidate(savepoint, &events()).await,
        };
        let error = refused.unwrap_err();
        assert!(matches!(error, CommitError::Savepoint) && error.is_rolled_back(), "{error:?}");
        // Neither marked nor invalidated, which would be too early: the transaction is still open.
        assert!(pair.is_cached(KEY).await.unwrap());
        assert_eq!(pair.count("\u{1f}m*").await.unwrap(), 0, "something is marked");
    }
    assert_eq!(outbox::testing::enqueued_keys(&mut tx).await.unwrap(), [] as [&str; 0]);
    writer.commit_strict(tx, &events()).await.unwrap();
    assert_eq!(load(&pair.pool).await, "new");
    assert!(!pair.is_cached(KEY).await.unwrap());
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
