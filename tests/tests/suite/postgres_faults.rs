//! Postgres dies, transactions commit late, snapshots are pinned, poolers are in between.

use std::time::{Duration, Instant};

use devstack::proxy::{FaultProxy, Mode};
use devstack::{PgBouncer, PoolMode, eventually};
use outbox::Event;
use relay::database::{self, Access, Servers};
use sqlx::postgres::PgPoolOptions;
use sqlx::{Connection, PgConnection};
use tests::{Pair, PairOptions, SETTLED};

#[tokio::test(flavor = "multi_thread")]
async fn postgres_killed_and_restarted_under_load_loses_no_commit() {
    let pair = Pair::start().await.unwrap();
    let end = Instant::now() + Duration::from_secs(8);
    let kills = async {
        for _ in 0..2 {
            tokio::time::sleep(Duration::from_secs(2)).await;
            pair.stack.postgres.kill().unwrap();
            pair.stack.postgres.start().await.unwrap();
        }
    };
    let (committed, ()) = tokio::join!(pair.load("postgres", |_| Instant::now() >= end), kills);
    assert!(committed.unwrap() > 20);
    pair.until_outbox_empty().await;
    pair.until_none("postgres:*").await;
    pair.relay.until_ready().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn postgres_that_is_down_is_not_taken_for_nats() {
    let pair = Pair::start().await.unwrap();
    let failures = async || pair.relay.metric("relay_database_failures_total").await.unwrap();
    assert!(failures().await < 1.0);
    pair.stack.postgres.kill().unwrap();
    // Every component that waits says what for.
    let all_say_so = async || {
        let answer = eventually(SETTLED, async || {
            let (_, body) = pair.relay.get("/readyz").await.map_err(|error| error.to_string())?;
            if body.matches("Postgres failed").count() == 3 { Ok(body) } else { Err(body) }
        });
        let reasons = answer.await;
        assert!(!reasons.contains("NATS"), "{reasons}");
    };
    all_say_so().await;
    // Once the keeper has failed the workers wait for it, and it goes on counting.
    let before = failures().await;
    eventually(SETTLED, async || failures().await >= before + 3.0).await;
    all_say_so().await;
    assert!(pair.relay.metric("relay_nats_connected").await.unwrap() > 0.0);
    let log = pair.relay.process().log();
    assert!(!log.contains("stream is not usable") && !log.contains("connection to NATS lost"), "{log}");
    pair.fill("down").await.unwrap();
    pair.stack.postgres.start().await.unwrap();
    pair.enqueue(&["down"]).await.unwrap();
    pair.until_none("down").await;
    pair.relay.until_ready().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn transaction_with_a_lower_seq_that_commits_late_is_delivered_within_two_seconds() {
    let pair = Pair::start().await.unwrap();
    pair.fill("late").await.unwrap();
    let mut late = pair.pool.begin().await.unwrap();
    let first = outbox::enqueue(&mut late, &Event::delete(["late"]).unwrap()).await.unwrap();
    let end = Instant::now() + Duration::from_secs(5);
    let committed = pair.load("early", |_| Instant::now() >= end).await.unwrap();
    assert!(committed > 20);
    pair.until_none("early:*").await;
    assert!(first.seq < i64::try_from(committed).unwrap());
    assert!(pair.is_cached("late").await.unwrap());
    late.commit().await.unwrap();
    let committed_at = Instant::now();
    pair.until_none("late").await;
    // A sweep a second is the promise; the rest is for a busy machine.
    assert!(committed_at.elapsed() < Duration::from_secs(10), "{:?}", committed_at.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn snapshot_pinned_for_a_minute_delays_nothing() {
    let pair = Pair::start().await.unwrap();
    let mut pinned = PgConnection::connect(&pair.stack.postgres_url()).await.unwrap();
    sqlx::raw_sql("begin isolation level repeatable read; select count(*) from outbox.events")
        .execute(&mut pinned)
        .await
        .unwrap();
    let end = Instant::now() + Duration::from_secs(60);
    let mut committed = 0;
    while Instant::now() < end {
        let events: Vec<Event> = (0..50).map(|n| Event::delete([format!("pinned:{n}")]).unwrap()).collect();
        let mut tx = pair.pool.begin().await.unwrap();
        outbox::enqueue_all(&mut tx, &events).await.unwrap();
        tx.commit().await.unwrap();
        committed += 50;
        tokio::time::sleep(Duration::from_millis(90)).await;
    }
    assert!(committed > 10_000);
    pair.fill("after").await.unwrap();
    let started = Instant::now();
    pair.enqueue(&["after"]).await.unwrap();
    pair.until_none("after").await;
    assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
    pair.until_outbox_empty().await;
    drop(pinned);
}

#[tokio::test(flavor = "multi_thread")]
async fn backlog_of_400_000_events_is_drained_with_flat_memory() {
    const EVENTS: usize = 400_000;
    let pair = Pair::start().await.unwrap();
    pair.relay.process().terminate().await.unwrap();
    pair.fill_many("backlog", 0..EVENTS).await.unwrap();
    for start in (0..EVENTS).step_by(20_000) {
        let events: Vec<Event> =
            (start..start + 20_000).map(|n| Event::delete([format!("backlog:{n}")]).unwrap()).collect();
        let mut tx = pair.pool.begin().await.unwrap();
        outbox::enqueue_all(&mut tx, &events).await.unwrap();
        tx.commit().await.unwrap();
    }
    pair.relay.process().start().unwrap();
    pair.until_outbox_empty().await;
    // Before the polls of the idle relay add up.
    let statements = pair.relay.metric("relay_statements_total").await.unwrap();
    let events = pair.relay.metric("relay_events_published_total").await.unwrap();
    assert!(events >= 400_000.0 && statements / events < 0.01, "{statements} statements for {events} events");
    pair.until_none("backlog:*").await;
    for daemon in [&pair.relay, &pair.subscriber] {
        let rss = daemon.process().rss_bytes().unwrap();
        assert!(rss < 64 * 1024 * 1024, "{} uses {rss} bytes", daemon.process().name());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn serialization_failure_of_the_writer_takes_its_event_along_and_the_retry_is_delivered() {
    let pair = Pair::start().await.unwrap();
    sqlx::raw_sql("create table users (id bigint primary key, name text); insert into users values (1, 'a')")
        .execute(&pair.pool)
        .await
        .unwrap();
    pair.fill("loser").await.unwrap();
    pair.fill("winner").await.unwrap();
    let begin = "begin isolation level serializable";
    let mut winner = pair.pool.begin_with(begin).await.unwrap();
    let mut loser = pair.pool.begin_with(begin).await.unwrap();
    outbox::enqueue(&mut loser, &Event::delete(["loser"]).unwrap()).await.unwrap();
    sqlx::query("update users set name = 'b' where id = 1").execute(&mut *winner).await.unwrap();
    outbox::enqueue(&mut winner, &Event::delete(["winner"]).unwrap()).await.unwrap();
    winner.commit().await.unwrap();
    let failure =
        sqlx::query("update users set name = 'c' where id = 1").execute(&mut *loser).await.unwrap_err();
    assert_eq!(failure.as_database_error().unwrap().code().unwrap(), "40001");
    loser.rollback().await.unwrap();
    pair.until_none("winner").await;
    assert!(pair.is_cached("loser").await.unwrap());
    pair.enqueue(&["loser"]).await.unwrap();
    pair.until_none("loser").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn everything_works_through_pgbouncer_in_transaction_mode_whose_connections_take_turns() {
    let pair = Pair::start().await.unwrap();
    pair.relay.process().terminate().await.unwrap();
    // Debian's PgBouncer may be older than 1.21.
    outbox::without_prepared_statements();
    let pooler = PgBouncer::start(&pair.stack.postgres, PoolMode::Transaction, 3).await.unwrap();
    let through = [("DATABASE_URL", pooler.url()), ("RELAY_TRANSACTION_POOLER", "true".to_owned())];
    let relay = pair.another_relay(&through).unwrap();
    relay.until_ready().await;
    let pool = PgPoolOptions::new().max_connections(1).connect(&pooler.url()).await.unwrap();
    pair.fill_many("pooled", 0..102).await.unwrap();
    for number in 0..100 {
        let mut tx = pool.begin().await.unwrap();
        outbox::enqueue(&mut tx, &Event::delete([format!("pooled:{number}")]).unwrap()).await.unwrap();
        tx.commit().await.unwrap();
    }
    let mut tx = pool.begin().await.unwrap();
    let events = ["pooled:100", "pooled:101"].map(|key| Event::delete([key]).unwrap());
    assert_eq!(outbox::enqueue_all(&mut tx, &events).await.unwrap().len(), 2);
    outbox::testing::assert_enqueued(&mut tx, "pooled:101").await;
    tx.commit().await.unwrap();
    pair.until_none("pooled:*").await;
    assert!(relay.metric("relay_database_failures_total").await.unwrap() < 1.0, "{}", relay.process().log());
}

#[tokio::test(flavor = "multi_thread")]
async fn relay_that_loses_its_connection_while_it_starts_waits_for_postgres() {
    let pair = Pair::start().await.unwrap();
    let url: service::SecretUrl = pair.stack.postgres_url().parse().unwrap();
    let servers = Servers::parse(&url).unwrap();
    let pool = database::connect(&servers, 1, Access::Write).await.unwrap();
    pair.stack.postgres.kill().unwrap();
    let lost = database::check_schema(&pool, &url).await.unwrap_err();
    assert!(lost.is_passing(), "{lost}");
    pair.stack.postgres.start().await.unwrap();
    database::check_schema(&pool, &url).await.unwrap();
}

/// The host loses its power, or a firewall forgets the connections: nothing comes back, not even a refusal.
#[tokio::test(flavor = "multi_thread")]
async fn a_postgres_that_falls_silent_is_noticed_and_left() {
    let pair = Pair::start().await.unwrap();
    let proxy = FaultProxy::start(pair.stack.postgres.address()).await.unwrap();
    pair.relay.process().kill().unwrap();
    let url = pair.stack.postgres.url_through(&proxy, "postgres");
    let relay = pair.another_relay(&[("DATABASE_URL", url), ("DRAIN_TIMEOUT", "2s".to_owned())]).unwrap();
    relay.until_ready().await;
    pair.fill("silent").await.unwrap();
    proxy.set_mode(Mode::DropToClient);
    pair.enqueue(&["silent"]).await.unwrap();
    eventually(SETTLED, async || relay.process().log().contains("no answer within")).await;
    proxy.set_mode(Mode::Pass);
    // New connections come through; those that fell silent never answer again.
    pair.until_none("silent").await;
    relay.until_ready().await;
    // The worker that polls is back as well: the one that sweeps would take a second for each.
    let began = Instant::now();
    for number in 0..10 {
        let key = format!("again:{number}");
        pair.fill(&key).await.unwrap();
        pair.enqueue(&[&key]).await.unwrap();
        pair.until_none(&key).await;
    }
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    proxy.set_mode(Mode::DropToClient);
    let asked = Instant::now();
    relay.process().terminate().await.unwrap();
    assert!(asked.elapsed() < Duration::from_secs(20), "{:?}", asked.elapsed());
}

/// A backup holds its locks for as long as it takes.
#[tokio::test(flavor = "multi_thread")]
async fn somebody_who_reads_what_is_retained_does_not_hold_up_delivery() {
    let relay = vec![("RELAY_RETENTION", "1s".to_owned())];
    let pair = Pair::start_with(PairOptions { relay, ..Default::default() }).await.unwrap();
    let mut backup = pair.pool.begin().await.unwrap();
    sqlx::raw_sql("lock table outbox.published in access share mode").execute(&mut *backup).await.unwrap();
    let end = Instant::now() + Duration::from_secs(8);
    let mut slowest = Duration::ZERO;
    for number in 0.. {
        let key = format!("backup:{number}");
        pair.fill(&key).await.unwrap();
        let enqueued = Instant::now();
        pair.enqueue(&[&key]).await.unwrap();
        pair.until_none(&key).await;
        slowest = slowest.max(enqueued.elapsed());
        if Instant::now() >= end {
            break;
        }
    }
    assert!(slowest < Duration::from_millis(1_500), "{slowest:?}");
    backup.rollback().await.unwrap();
}
