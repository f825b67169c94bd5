//! Marks that strict writers leave behind, and who removes them.

use std::time::{Duration, Instant};

use cache::{Acquired, CacheConfig};
use devstack::proxy::{FaultProxy, Mode};
use devstack::{RedisOptions, StackOptions, eventually};
use event::nats::Outcome;
use outbox::outcome::outcomes;
use outbox::transaction_id;
use outbox::{CommitError, CommitLimits, Marks, TransactionId, Writer};
use sqlx::PgPool;
use sqlx::postgres::PgPoolOptions;
use tests::{Pair, PairOptions};

use crate::strict::{KEY, MINUTE, acquire, events, fill, grant, load, pair_with_user, read, rename};

/// A mark is asked about when it is 5 s old; the rest is for a busy machine.
const RESOLVED: Duration = Duration::from_secs(30);

#[tokio::test(flavor = "multi_thread")]
async fn mark_of_a_writer_that_died_before_commit_is_resolved_and_the_key_can_be_filled_again() {
    let pair = pair_with_user().await;
    let redis = pair.cache().unwrap();
    let pool = PgPoolOptions::new().max_connections(1).connect(&pair.stack.postgres_url()).await.unwrap();
    let mut tx = rename(&pool, "never").await;
    let events = events();
    outbox::enqueue(&mut tx, &events[0]).await.unwrap();
    let transaction = outbox::transaction_id(&mut tx).await.unwrap();
    Marks::new(redis.clone(), &events, transaction).set(MINUTE).await.unwrap();
    let pid: i32 = sqlx::query_scalar("select pg_backend_pid()").fetch_one(&mut *tx).await.unwrap();
    let marked = Instant::now();

    // As long as the transaction is open, nobody may remove its mark, however old.
    while marked.elapsed() < Duration::from_secs(9) {
        assert_eq!(acquire(&redis).await, Acquired::Bypass);
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    sqlx::query("select pg_terminate_backend($1)").bind(pid).execute(&pair.pool).await.unwrap();
    drop(tx);
    let lease = eventually(RESOLVED, async || grant(&redis).await).await;
    assert!(fill(&redis, &lease, &load(&pair.pool).await).await);
    assert_eq!(pair.stack.redis.command(&["GET", KEY]).await.unwrap(), "old");
    eventually(RESOLVED, async || {
        let resolved = pair.subscriber.metric("subscriber_marks_resolved_total").await.unwrap();
        let orphans = pair.subscriber.metric("subscriber_orphan_marks").await.unwrap();
        resolved > 0.0 && orphans < 1.0
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn commit_without_an_answer_keeps_its_mark_until_it_is_visible() {
    let pair = pair_with_user().await;
    let redis = pair.cache().unwrap();
    let cache = cache::Cache::new(redis.clone(), CacheConfig::default());
    assert_eq!(read(&cache, &pair.pool).await, "old");
    let proxy = FaultProxy::start(pair.stack.postgres.address()).await.unwrap();
    let url = pair.stack.postgres.url_through(&proxy, "postgres");
    let pool = PgPoolOptions::new().max_connections(1).connect(&url).await.unwrap();
    let limits = CommitLimits { database: Duration::from_secs(2), ..Default::default() };
    let tx = rename(&pool, "new").await;
    // Commits are written from now on, but become visible only when a standby that does not exist has them too.
    standby(&pair.pool, "ghost").await;
    let error = Writer::with_limits(redis.clone(), limits).commit_strict(tx, &events()).await.unwrap_err();
    assert!(matches!(error, CommitError::Unknown(_)) && !error.is_rolled_back(), "{error:?}");
    // The writer is gone.
    proxy.set_mode(Mode::Refuse);
    proxy.reset_connections();

    let stalled = Instant::now();
    while stalled.elapsed() < Duration::from_secs(12) {
        assert_eq!(read(&cache, &pair.pool).await, "old");
        assert_eq!(acquire(&redis).await, Acquired::Bypass);
        assert!(!pair.is_cached(KEY).await.unwrap());
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    standby(&pair.pool, "").await;
    eventually(RESOLVED, async || load(&pair.pool).await == "new").await;
    // From here on no reader may see anything older.
    eventually(RESOLVED, async || {
        assert_eq!(read(&cache, &pair.pool).await, "new");
        pair.stack.redis.command(&["GET", KEY]).await.unwrap() == "new"
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn commit_whose_connection_is_lost_has_an_unknown_outcome_and_keeps_its_mark() {
    let pair = pair_with_user().await;
    let redis = pair.cache().unwrap();
    let proxy = FaultProxy::start(pair.stack.postgres.address()).await.unwrap();
    let url = pair.stack.postgres.url_through(&proxy, "postgres");
    let pool = PgPoolOptions::new().max_connections(1).connect(&url).await.unwrap();
    let tx = rename(&pool, "new").await;
    standby(&pair.pool, "ghost").await;
    let writer = Writer::new(redis.clone());
    let write = tokio::spawn(async move { writer.commit_strict(tx, &events()).await });
    let waiting = "select exists (select from pg_stat_activity where wait_event = 'SyncRep')";
    eventually(RESOLVED, async || {
        sqlx::query_scalar::<_, bool>(waiting).fetch_one(&pair.pool).await.unwrap()
    })
    .await;
    proxy.set_mode(Mode::Refuse);
    proxy.reset_connections();
    let error = write.await.unwrap().unwrap_err();
    assert!(matches!(error, CommitError::Unknown(_)) && !error.is_rolled_back(), "{error:?}");
    let lost = Instant::now();
    while lost.elapsed() < Duration::from_secs(3) {
        assert_eq!(acquire(&redis).await, Acquired::Bypass, "the commit may still become visible");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    standby(&pair.pool, "").await;
    eventually(RESOLVED, async || grant(&redis).await).await;
    assert_eq!(load(&pair.pool).await, "new");
}

async fn standby(pool: &PgPool, name: &str) {
    let mut connection = pool.acquire().await.unwrap();
    let set = format!("alter system set synchronous_standby_names = '{name}'");
    sqlx::raw_sql(sqlx::AssertSqlSafe(set)).execute(&mut *connection).await.unwrap();
    sqlx::raw_sql("select pg_reload_conf()").execute(&mut *connection).await.unwrap();
    eventually(RESOLVED, async || {
        let shown: String =
            sqlx::query_scalar("show synchronous_standby_names").fetch_one(pool).await.unwrap();
        shown == name
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn outcome_is_what_new_snapshots_see() {
    let pair = pair_with_user().await;
    let pool = &pair.pool;
    let (mut committed, mut aborted, mut open) =
        (pool.begin().await.unwrap(), pool.begin().await.unwrap(), pool.begin().await.unwrap());
    let mut xids = Vec::new();
    for tx in [&mut committed, &mut aborted, &mut open] {
        xids.push(transaction_id(tx).await.unwrap());
    }
    let newest = xids[2];
    let other = |xid: u64| TransactionId { xid, ..newest };
    assert_eq!(outcomes(pool, &xids).await.unwrap(), [Outcome::InProgress; 3]);
    committed.commit().await.unwrap();
    aborted.rollback().await.unwrap();
    // Never assigned: a history that was lost.
    xids.push(other(xids[2].xid + 1_000_000_000));
    let expected = [Outcome::Committed, Outcome::Aborted, Outcome::InProgress, Outcome::Aborted];
    assert_eq!(outcomes(pool, &xids).await.unwrap(), expected);

    // Whatever a registry of marks may contain, it is answered.
    let odd = [0, 1, 2, u64::MAX].map(other);
    assert_eq!(outcomes(pool, &odd).await.unwrap()[3], Outcome::Aborted);
    assert!(!outcomes(pool, &odd).await.unwrap().contains(&Outcome::InProgress));

    // A few ahead, as after a crash: another transaction will get this id, and whoever acted on `aborted` meanwhile
    // would remove its mark.
    let next = other(xids[2].xid + 5_000);
    assert_eq!(outcomes(pool, &[next]).await.unwrap(), [Outcome::InProgress]);
    eventually(RESOLVED, async || outcomes(pool, &[next]).await.unwrap() == [Outcome::Committed]).await;

    sqlx::raw_sql("prepare transaction 'prepared'").execute(&mut *open).await.unwrap();
    assert_eq!(outcomes(pool, &xids[2..3]).await.unwrap(), [Outcome::InProgress]);
    sqlx::raw_sql("rollback prepared 'prepared'").execute(pool).await.unwrap();
    assert_eq!(outcomes(pool, &xids[2..3]).await.unwrap(), [Outcome::Aborted]);
}

#[tokio::test(flavor = "multi_thread")]
async fn subscriber_says_that_marks_could_be_evicted() {
    let configuration = "maxmemory-policy allkeys-lru\n".to_owned();
    let redis = RedisOptions { configuration, ..Default::default() };
    let stack = StackOptions { redis, ..Default::default() };
    let pair = Pair::start_with(PairOptions { stack, ..Default::default() }).await.unwrap();
    eventually(RESOLVED, async || {
        let log = pair.subscriber.process().log();
        if log.contains("maxmemory-policy allkeys-lru") { Ok(()) } else { Err(log) }
    })
    .await;
}
