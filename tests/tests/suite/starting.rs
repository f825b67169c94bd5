//! Servers that are away when the daemons start.

use devstack::{Stack, StackOptions};
use tests::Daemon;

/// A stack with the schema, and the daemons' variables.
async fn scene() -> Stack {
    let stack = Stack::start(StackOptions::default()).await.unwrap();
    let pool = sqlx::PgPool::connect(&stack.postgres_url()).await.unwrap();
    outbox::migrate(&pool).await.unwrap();
    stack
}

fn relay(stack: &Stack) -> Daemon {
    let variables = [("DATABASE_URL", stack.postgres_url()), ("NATS_URL", stack.nats_url())];
    Daemon::spawn(stack.directory(), "relay", &variables).unwrap()
}

fn subscriber(stack: &Stack) -> Daemon {
    let variables = [("REDIS_URL", stack.redis_url()), ("NATS_URL", stack.nats_url())];
    Daemon::spawn(stack.directory(), "subscriber", &variables).unwrap()
}

async fn assert_waits_alive(daemon: &Daemon, words: &[&str]) {
    let why = daemon.until_not_ready_because(words[0]).await;
    for word in words {
        assert!(why.contains(word), "{why}");
    }
    assert_eq!(daemon.get("/livez").await.unwrap().0, 200);
    assert_eq!(daemon.get("/metrics").await.unwrap().0, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn daemons_that_start_while_nats_is_away_say_so_and_begin_when_it_is_back() {
    let stack = scene().await;
    stack.nats.kill().unwrap();
    let (relay, subscriber) = (relay(&stack), subscriber(&stack));
    assert_waits_alive(&relay, &["starting: ", "NATS", "Connection refused"]).await;
    assert_waits_alive(&subscriber, &["starting: ", "NATS", "Connection refused"]).await;
    stack.nats.start().await.unwrap();
    relay.until_ready().await;
    subscriber.until_ready().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_relay_that_starts_while_postgres_is_away_says_so_and_begins_when_it_is_back() {
    let stack = scene().await;
    stack.postgres.kill().unwrap();
    let relay = relay(&stack);
    assert_waits_alive(&relay, &["starting: ", "Postgres", "Connection refused"]).await;
    stack.postgres.start().await.unwrap();
    relay.until_ready().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_subscriber_that_starts_before_redis_and_the_relay_waits_for_both() {
    let stack = scene().await;
    stack.redis.kill().unwrap();
    let subscriber = subscriber(&stack);
    assert_waits_alive(&subscriber, &["starting: ", "stream INVALIDATIONS does not exist", "start a relay"])
        .await;
    let relay = relay(&stack);
    relay.until_ready().await;
    subscriber.until_not_ready_because("redis").await;
    stack.redis.start().await.unwrap();
    subscriber.until_ready().await;
}
