//! Whose marks are whose: transaction ids alone are those of another database, of another primary, and of a later
//! transaction too.

use std::time::{Duration, Instant};

use cache::{Acquired, Redis, RedisConfig};
use devstack::proxy::{FaultProxy, Mode};
use devstack::{Nats, Postgres, PostgresOptions, StackOptions, eventually};
use event::nats::Outcome;
use outbox::outcome::{OutcomeError, outcomes};
use outbox::{Event, Marks, TransactionId, transaction_id};
use sqlx::{PgPool, Postgres as Pg, Transaction};
use tests::{Daemon, Pair, PairOptions};

use crate::strict::{MINUTE, acquire, events, grant, pair_with_user, rename};

/// A mark is asked about when it is 5 s old; the rest is for a busy machine.
const RESOLVED: Duration = Duration::from_secs(40);

/// Several looks of a resolver, the first of which is at a mark that is old enough.
const LOOKS: Duration = Duration::from_secs(10);

/// An open transaction whose key is marked.
async fn marked<'a>(pool: &PgPool, redis: &Redis) -> (Transaction<'a, Pg>, Marks) {
    let mut tx = rename(pool, "new").await;
    let events = events();
    outbox::enqueue(&mut tx, &events[0]).await.unwrap();
    let marks = Marks::new(redis.clone(), &events, transaction_id(&mut tx).await.unwrap());
    marks.set(MINUTE).await.unwrap();
    (tx, marks)
}

/// Waits until a resolver has looked at the mark several times, and finds it there all the time.
async fn assert_stays(redis: &Redis, resolver: &Daemon) {
    eventually(RESOLVED, async || {
        let old = resolver.metric("subscriber_orphan_marks").await.unwrap();
        assert_eq!(acquire(redis).await, Acquired::Bypass, "the mark of an open transaction is gone");
        old > 0.0
    })
    .await;
    let seen = Instant::now();
    while seen.elapsed() < LOOKS {
        assert_eq!(acquire(redis).await, Acquired::Bypass, "the mark of an open transaction is gone");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

fn daemon(pair: &Pair, name: &str, variables: &[(&str, String)]) -> Daemon {
    Daemon::spawn(pair.stack.directory(), name, variables).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn another_database_with_the_same_redis_leaves_marks_of_open_transactions_alone() {
    let pair = pair_with_user().await;
    let redis = pair.cache().unwrap();
    // Another service, with everything of its own but Redis. It writes nothing.
    let directory = pair.stack.directory();
    let postgres = Postgres::start_unrelated_in(directory, PostgresOptions::default()).await.unwrap();
    let nats = Nats::start_in(directory, devstack::NatsOptions::default()).await.unwrap();
    outbox::migrate(&PgPool::connect(&postgres.url()).await.unwrap()).await.unwrap();
    let relay = daemon(&pair, "relay", &[("DATABASE_URL", postgres.url()), ("NATS_URL", nats.url())]);
    let variables = [
        ("REDIS_URL", pair.stack.redis_url()),
        ("NATS_URL", nats.url()),
        ("SUBSCRIBER_DURABLE", "other".to_owned()),
    ];
    let subscriber = daemon(&pair, "subscriber", &variables);
    relay.until_ready().await;
    subscriber.until_ready().await;

    let (tx, _) = marked(&pair.pool, &redis).await;
    assert_stays(&redis, &subscriber).await;
    tx.rollback().await.unwrap();
    // The own relay and subscriber know that it has ended.
    eventually(RESOLVED, async || grant(&redis).await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn relay_of_the_old_primary_leaves_marks_of_the_new_one_alone() {
    let pair = pair_with_user().await;
    let redis = pair.cache().unwrap();
    let directory = pair.stack.directory();
    let promoted = Postgres::start_standby_in(directory, &pair.stack.postgres, PostgresOptions::default())
        .await
        .unwrap();
    let pool = PgPool::connect(&promoted.url()).await.unwrap();
    let past = transaction_id(&mut pair.pool.begin().await.unwrap()).await.unwrap();
    let error = outcomes(&pool, &[past]).await.unwrap_err();
    assert!(matches!(error, OutcomeError::Standby), "{error:?}");
    // Its old primary goes on, and its relay with it, as after a failover until somebody fences them.
    promoted.promote().await.unwrap();

    let (tx, _) = marked(&pool, &redis).await;
    assert_stays(&redis, &pair.subscriber).await;
    let history = transaction_id(&mut pool.begin().await.unwrap()).await.unwrap().history.unwrap();
    assert!(history.continues(past.history.unwrap()) && !past.history.unwrap().continues(history));
    tx.rollback().await.unwrap();

    // The new primary answers for its own transactions, and for those of its past.
    let relay = pair.another_relay(&[("DATABASE_URL", promoted.url())]).unwrap();
    relay.until_ready().await;
    eventually(RESOLVED, async || grant(&redis).await).await;
    pair.relay.process().terminate().await.unwrap();
    let (tx, _) = marked(&pair.pool, &redis).await;
    drop(tx);
    eventually(RESOLVED, async || grant(&redis).await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn late_unmark_of_a_transaction_whose_id_was_lost_leaves_the_mark_of_the_next() {
    // The ids that are assigned stay in memory until this passes, and a crash gives them back.
    let settings = vec![("wal_writer_delay".to_owned(), "10s".to_owned())];
    let postgres = PostgresOptions { settings, ..Default::default() };
    let stack = StackOptions { postgres, ..Default::default() };
    let pair = Pair::start_with(PairOptions { stack, ..Default::default() }).await.unwrap();
    pair.relay.process().terminate().await.unwrap();
    let redis = pair.cache().unwrap();
    let proxy = FaultProxy::start(pair.stack.redis.address()).await.unwrap();
    let url = pair.stack.redis.url_through(&proxy);
    let config = RedisConfig { url, pool_size: 1, response_timeout: MINUTE, ..Default::default() };
    let slow = Redis::new(config).unwrap();
    slow.ping().await.unwrap();

    let (first, second) = eventually(MINUTE, async || {
        let first = assigned_id(&pair).await;
        pair.stack.postgres.kill().unwrap();
        pair.stack.postgres.start().await.unwrap();
        let second = assigned_id(&pair).await;
        if first == second { Ok((first, second)) } else { Err(format!("{first} and {second}")) }
    })
    .await;
    proxy.set_mode(Mode::Stall);
    let late = Marks::new(slow, &events(), first);
    late.set(Duration::from_millis(200)).await.unwrap_err();
    let unmark = tokio::spawn(async move { late.remove(MINUTE).await });
    let marks = Marks::new(redis.clone(), &events(), second);
    marks.set(MINUTE).await.unwrap();
    proxy.set_mode(Mode::Pass);
    unmark.await.unwrap().unwrap();
    assert_eq!(acquire(&redis).await, Acquired::Bypass, "the mark of another transaction was removed");
    marks.remove(MINUTE).await.unwrap();
    eventually(RESOLVED, async || grant(&redis).await).await;
}

/// The id of a transaction that rolls back.
async fn assigned_id(pair: &Pair) -> TransactionId {
    eventually(MINUTE, async || transaction_id(&mut pair.pool.begin().await?).await).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mark_behind_thousands_of_an_open_transaction_is_resolved_and_the_open_one_is_named() {
    let pair = pair_with_user().await;
    let redis = pair.cache().unwrap();
    let keys: Vec<String> = (0..2_500).map(|number| format!("open:{number}")).collect();
    let many = [Event::delete(keys.iter().map(String::as_str)).unwrap()];
    let mut open = pair.pool.begin().await.unwrap();
    let blocking = transaction_id(&mut open).await.unwrap();
    Marks::new(redis.clone(), &many, blocking).set(MINUTE).await.unwrap();

    let (tx, _) = marked(&pair.pool, &redis).await;
    drop(tx);
    eventually(RESOLVED, async || grant(&redis).await).await;
    eventually(RESOLVED, async || {
        let marks = pair.subscriber.metric("subscriber_orphan_marks").await.unwrap();
        let age = pair.subscriber.metric("subscriber_oldest_orphan_mark_seconds").await.unwrap();
        if marks >= 2_500.0 && age >= 5.0 { Ok(()) } else { Err(format!("{marks} marks, {age} s")) }
    })
    .await;
    eventually(MINUTE + RESOLVED, async || {
        let log = pair.subscriber.process().log();
        if log.contains(&format!("transaction {blocking} has kept 2500 keys")) { Ok(()) } else { Err(log) }
    })
    .await;
    open.rollback().await.unwrap();
    pair.until_none("\u{1f}marks").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn each_mark_goes_or_stays_by_the_outcome_of_its_own_transaction() {
    let pair = pair_with_user().await;
    let redis = pair.cache().unwrap();
    let event = |key: &str| [Event::delete([key]).unwrap()];
    let mut transactions = Vec::new();
    for _ in 0..4 {
        let mut tx = pair.pool.begin().await.unwrap();
        let transaction = transaction_id(&mut tx).await.unwrap();
        transactions.push((tx, transaction));
    }
    let keys = ["committed", "open:1", "aborted", "open:2"];
    for (key, (_, transaction)) in keys.iter().zip(&transactions) {
        Marks::new(redis.clone(), &event(key), *transaction).set(MINUTE).await.unwrap();
    }
    // A mark of a transaction that has committed: a copy of MARK that came late, when its event was gone.
    let mut open = Vec::new();
    for (nth, (tx, _)) in transactions.into_iter().enumerate() {
        match nth {
            0 => tx.commit().await.unwrap(),
            2 => tx.rollback().await.unwrap(),
            _ => open.push(tx),
        }
    }
    for key in ["committed", "aborted"] {
        pair.until_none(&format!("\u{1f}m{{{key}}}")).await;
    }
    assert_eq!(pair.count("\u{1f}m{open:*}").await.unwrap(), 2, "a mark of an open transaction is gone");
    let (_, metrics) = pair.subscriber.get("/metrics").await.unwrap();
    for outcome in ["committed", "aborted"] {
        let resolved = |line: &str| {
            line.starts_with("subscriber_marks_resolved_total{")
                && line.contains(&format!("outcome=\"{outcome}\""))
                && line.ends_with(" 1")
        };
        assert!(metrics.lines().any(resolved), "{outcome}: {metrics}");
    }
    drop(open);
    pair.until_none("\u{1f}marks").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_said_about_transactions_of_another_history() {
    let pair = pair_with_user().await;
    let mut tx = pair.pool.begin().await.unwrap();
    let own = transaction_id(&mut tx).await.unwrap();
    tx.commit().await.unwrap();
    let foreign = TransactionId { history: Some("d0123456789.1".parse().unwrap()), ..own };
    let unnamed = TransactionId { history: None, ..own };
    // A number that would be approached step by step, were it asked about here.
    let ahead = TransactionId { xid: own.xid + 100_000, ..foreign };
    let asked = [foreign, own, ahead, unnamed];
    let expected = [Outcome::OtherHistory, Outcome::Committed, Outcome::OtherHistory, Outcome::Committed];
    assert_eq!(outcomes(&pair.pool, &asked).await.unwrap(), expected);
    let after = transaction_id(&mut pair.pool.begin().await.unwrap()).await.unwrap();
    assert!(after.xid < own.xid + 100, "ids were used up for another database: {after}");
}
