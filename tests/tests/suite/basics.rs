//! What the pair is for, without faults.

use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use devstack::eventually;
use outbox::{Event, Topic, Traceparent};
use tests::{Pair, program};

#[tokio::test(flavor = "multi_thread")]
async fn committed_event_removes_the_key_and_only_it() {
    let pair = Pair::start().await.unwrap();
    pair.fill("user:123:profile").await.unwrap();
    pair.fill("user:124:profile").await.unwrap();
    pair.enqueue(&["user:123:profile"]).await.unwrap();
    pair.until_none("user:123:profile").await;
    assert!(pair.is_cached("user:124:profile").await.unwrap());
    pair.until_outbox_empty().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn rolled_back_event_is_never_published() {
    let pair = Pair::start().await.unwrap();
    pair.fill("user:1").await.unwrap();
    pair.fill("user:2").await.unwrap();
    let mut tx = pair.pool.begin().await.unwrap();
    outbox::enqueue(&mut tx, &Event::delete(["user:1"]).unwrap()).await.unwrap();
    tx.rollback().await.unwrap();
    // An event behind it shows that the pair has been past it.
    pair.enqueue(&["user:2"]).await.unwrap();
    pair.until_none("user:2").await;
    assert!(pair.is_cached("user:1").await.unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn topic_and_trace_of_the_writer_travel_with_the_event() {
    let pair = Pair::start().await.unwrap();
    let trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    let event = Event::delete(["order:7"])
        .unwrap()
        .with_topic(Topic::new("orders").unwrap())
        .with_traceparent(Traceparent::new(trace).unwrap());
    pair.fill("order:7").await.unwrap();
    let mut tx = pair.pool.begin().await.unwrap();
    outbox::enqueue(&mut tx, &event).await.unwrap();
    tx.commit().await.unwrap();
    pair.until_none("order:7").await;
    let nats = async_nats::connect(pair.stack.nats_url()).await.unwrap();
    let stream = async_nats::jetstream::new(nats).get_stream("INVALIDATIONS").await.unwrap();
    let message = stream.get_last_raw_message_by_subject("invalidation.orders").await.unwrap();
    assert_eq!(message.headers.get("traceparent").unwrap().as_str(), trace);
}

/// JetStream swallows a message whose id it has seen within two minutes.
#[tokio::test(flavor = "multi_thread")]
async fn the_same_event_enqueued_in_two_transactions_is_delivered_twice() {
    let pair = Pair::start().await.unwrap();
    let event = Event::delete(["board"]).unwrap();
    for _ in 0..2 {
        pair.fill("board").await.unwrap();
        let mut tx = pair.pool.begin().await.unwrap();
        outbox::enqueue(&mut tx, &event).await.unwrap();
        tx.commit().await.unwrap();
        pair.until_none("board").await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn any_language_can_enqueue_with_one_function_and_a_trigger_can_too() {
    let pair = Pair::start().await.unwrap();
    sqlx::raw_sql(
        "create table users (id bigint primary key, name text);
         create function forget_user() returns trigger language plpgsql as $$
         begin perform outbox.enqueue(array['user:' || new.id]); return new; end $$;
         create trigger forget_user after insert or update on users for each row execute function forget_user();",
    )
    .execute(&pair.pool)
    .await
    .unwrap();
    pair.fill("user:7").await.unwrap();
    pair.fill("user:8").await.unwrap();
    pair.stack.postgres.query("insert into users values (7, 'Ada')").await.unwrap();
    pair.stack.postgres.query("select outbox.enqueue(array['user:8'])").await.unwrap();
    pair.until_none("user:*").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn sigterm_under_load_ends_both_cleanly_and_loses_nothing() {
    let pair = Pair::start().await.unwrap();
    let both_ran_again = AtomicBool::new(false);
    let stop = async {
        let applied = async || pair.subscriber.metric("subscriber_events_applied_total").await.unwrap();
        eventually(Duration::from_secs(60), async || applied().await >= 50.0).await;
        for daemon in [&pair.relay, &pair.subscriber] {
            let status = daemon.process().terminate().await.unwrap();
            assert!(status.success(), "{status}; log:\n{}", daemon.process().log());
            daemon.process().start().unwrap();
        }
        both_ran_again.store(true, Ordering::Relaxed);
    };
    let (committed, ()) = tokio::join!(pair.load("drain", |_| both_ran_again.load(Ordering::Relaxed)), stop);
    assert!(committed.unwrap() > 50);
    pair.until_outbox_empty().await;
    pair.until_none("drain:*").await;
}

/// Runs an administrative command of the subscriber and returns what it printed.
async fn ask_subscriber(pair: &Pair, arguments: &[&str]) -> String {
    let mut command = Command::new(program("subscriber").unwrap());
    command
        .args(arguments)
        .env("NATS_URL", pair.stack.nats_url())
        .env("REDIS_URL", pair.stack.redis_url())
        .env("HTTP_ADDR", pair.subscriber.http().to_string());
    let output = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn operator_can_ask_the_subscriber_and_have_it_replay() {
    let pair = Pair::start().await.unwrap();
    pair.fill("user:1").await.unwrap();
    pair.enqueue(&["user:1"]).await.unwrap();
    pair.until_none("user:1").await;
    pair.until_recorded().await;
    let status = ask_subscriber(&pair, &["status"]).await;
    assert!(
        status.contains("lag           none") && status.contains("everything published until"),
        "{status}"
    );
    assert!(ask_subscriber(&pair, &["health"]).await.contains("ready"));
    // Somebody restored a value behind our back.
    pair.fill("user:1").await.unwrap();
    let replayed = ask_subscriber(&pair, &["replay", "--since", "10m"]).await;
    assert_eq!(replayed.trim(), "applied 1 messages again");
    assert!(!pair.is_cached("user:1").await.unwrap());
    assert!(ask_subscriber(&pair, &["accept-gap"]).await.contains("accepted"));
}

#[tokio::test(flavor = "multi_thread")]
async fn wait_for_events_ends_with_the_first_commit_and_sees_no_other() {
    let pair = Pair::start().await.unwrap();
    pair.relay.process().kill().unwrap();
    let wait = async |from_seq| {
        let (min, max) = (Duration::from_millis(1), Duration::from_millis(5));
        outbox::wait_for_events(&pair.pool, from_seq, min, max).await.unwrap()
    };
    assert!(!wait(0).await);
    let mut tx = pair.pool.begin().await.unwrap();
    let receipt = outbox::enqueue(&mut tx, &Event::delete(["user:1"]).unwrap()).await.unwrap();
    assert!(!wait(0).await, "an uncommitted row is nobody's business");
    // Committed while the server waits, or just before on a slow machine.
    let (found, committed) = tokio::join!(wait(0), tx.commit());
    committed.unwrap();
    assert!(found || wait(0).await);
    assert!(!wait(receipt.seq + 1).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn idle_relay_asks_postgres_a_few_times_a_second() {
    let pair = Pair::start().await.unwrap();
    pair.fill("user:1").await.unwrap();
    pair.enqueue(&["user:1"]).await.unwrap();
    pair.until_none("user:1").await;
    pair.until_outbox_empty().await;
    let statements = async || pair.relay.metric("relay_statements_total").await.unwrap();
    let (started, before) = (Instant::now(), statements().await);
    eventually(Duration::from_secs(60), async || statements().await >= before + 20.0).await;
    // Four waits a second and a sweep of three statements, not hundreds of looks.
    assert!(started.elapsed() > Duration::from_secs(1), "{:?}", started.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn counters_of_failures_are_there_before_the_first_failure() {
    let pair = Pair::start().await.unwrap();
    for (daemon, counter) in
        [(&pair.relay, "relay_dead_letters_total 0"), (&pair.subscriber, "subscriber_redis_failures_total 0")]
    {
        let (_, metrics) = daemon.get("/metrics").await.unwrap();
        assert!(metrics.lines().any(|line| line == counter), "no {counter} in {metrics}");
    }
}
