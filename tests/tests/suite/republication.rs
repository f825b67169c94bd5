//! What the stream lacks is published again: all of it, beside what is new, and to the right stream.

use std::process::Command;
use std::time::{Duration, Instant};

use chrono::{DateTime, Utc};
use devstack::{Nats, Postgres, PostgresOptions, eventually};
use outbox::republication::{Newest, Page, Refill, refill, remaining};
use outbox::stream::{Meeting, lose, meet, newest};
use outbox::{retention, stream};
use sqlx::{AssertSqlSafe, PgPool};
use tests::{Pair, PairOptions, SETTLED, program};
use uuid::Uuid;

const LEASE: Duration = Duration::from_secs(10);

/// A database of its own with the schema.
async fn database() -> (Postgres, PgPool) {
    let postgres = Postgres::start_alone(PostgresOptions::default()).await.unwrap();
    let pool = PgPool::connect(&postgres.url()).await.unwrap();
    outbox::migrate(&pool).await.unwrap();
    (postgres, pool)
}

fn at(seconds: i64) -> DateTime<Utc> {
    DateTime::from_timestamp(1_700_000_000 + seconds, 0).unwrap()
}

/// Retains messages of one event each, with keys `key:<n>` and sequences `n`, as if they had been published to the present
/// stream; the body is what a relay would have written.
async fn retain(pool: &PgPool, half: i16, numbers: std::ops::RangeInclusive<i64>, padding: usize) {
    let (first, last) = (numbers.start(), numbers.end());
    sqlx::raw_sql(AssertSqlSafe(format!(
        "insert into outbox.published (half, stream_created, stream_seq, subject, message_id, events, body)
         select {half}, r.stream_identity, n, 'invalidation.default', 'id-' || n, 1, convert_to(format(
            '{{\"v\":1,\"events\":[{{\"id\":\"%s\",\"keys\":[\"key:%s\"],\"xids\":[1],\"at_us\":1,\"x\":\"%s\"}}]}}',
            gen_random_uuid(), n, repeat('x', {padding})), 'UTF8')
         from outbox.retention r, generate_series({first}::bigint, {last}) n"
    )))
    .execute(pool)
    .await
    .unwrap();
}

/// Takes and settles pages until nothing is left; returns the sequences the messages had.
async fn take_all(pool: &PgPool, created: DateTime<Utc>) -> Vec<i64> {
    let mut taken = Vec::new();
    while remaining(pool).await.unwrap().is_some() {
        let page = eventually(SETTLED, async || match Page::take(pool, created, LEASE).await {
            Ok(Some(page)) => Ok(page),
            Ok(None) => Err("the pages are in the hands of others".to_owned()),
            Err(error) => Err(error.to_string()),
        })
        .await;
        taken.extend(page.messages.iter().map(|message| message.stream_seq));
        page.settle(None).await.unwrap();
    }
    taken.sort_unstable();
    taken
}

#[tokio::test(flavor = "multi_thread")]
async fn everything_retained_before_a_loss_is_taken_once_and_nothing_that_came_after() {
    let (_postgres, pool) = database().await;
    let relay = Uuid::now_v7();
    assert_eq!(meet(&pool, relay, at(0)).await.unwrap(), Meeting::First);
    assert_eq!(take_all(&pool, at(0)).await, [0; 0]);
    retain(&pool, 0, 1..=10_000, 0).await;
    retain(&pool, 1, 10_001..=20_000, 0).await;
    // Larger than a page allows for together.
    retain(&pool, 0, 20_001..=20_100, 100_000).await;
    let before = newest(&pool, i64::MAX).await.unwrap().unwrap();
    assert_eq!((before.stream_seq, before.message_ids), (20_100, vec!["id-20100".to_owned()]));

    // Two relays notice the loss: it is recorded once.
    let messages = lose(&pool, at(0), before.identity).await.unwrap().unwrap();
    assert!((10_000..40_000).contains(&messages), "{messages}");
    assert_eq!(lose(&pool, at(0), before.identity).await.unwrap(), None);
    assert_eq!(
        newest(&pool, i64::MAX).await.unwrap(),
        None,
        "what was lost says nothing of what the stream holds"
    );
    retain(&pool, 0, 50..=60, 0).await;
    assert_eq!(newest(&pool, i64::MAX).await.unwrap().unwrap().stream_seq, 60);

    // A relay that dies with a page in hand gives it back, and two relays have different pages.
    let dies = Page::take(&pool, at(0), LEASE).await.unwrap().unwrap();
    let other = Page::take(&pool, at(0), LEASE).await.unwrap().unwrap();
    let first = dies.messages[0].stream_seq;
    assert!(other.messages.iter().all(|message| message.stream_seq != first));
    drop((dies, other));
    let left = remaining(&pool).await.unwrap().unwrap();
    let taken = take_all(&pool, at(0)).await;
    assert!(taken == (1..=20_100).collect::<Vec<_>>(), "{} of 20,100, {left} left before", taken.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_to_be_published_again_is_not_thrown_away_before() {
    let (_postgres, pool) = database().await;
    meet(&pool, Uuid::now_v7(), at(0)).await.unwrap();
    take_all(&pool, at(0)).await;
    retain(&pool, 0, 1..=100, 0).await;
    lose(&pool, at(0), at(0)).await.unwrap().unwrap();
    assert!(!retention::rotate(&pool, Duration::ZERO).await.unwrap());
    assert!(!retention::rotate(&pool, Duration::ZERO).await.unwrap());
    assert_eq!(take_all(&pool, at(0)).await.len(), 100);
    assert!(retention::rotate(&pool, Duration::ZERO).await.unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_recorded_while_the_loss_is_noticed_is_published_again_too() {
    let (_postgres, pool) = database().await;
    meet(&pool, Uuid::now_v7(), at(0)).await.unwrap();
    take_all(&pool, at(0)).await;
    let mut late = pool.begin().await.unwrap();
    sqlx::raw_sql(
        "insert into outbox.published (half, stream_created, stream_seq, subject, message_id, events, body)
         select 0, stream_identity, 7, 'invalidation.default', 'late', 1, '' from outbox.retention",
    )
    .execute(&mut *late)
    .await
    .unwrap();
    lose(&pool, at(0), at(0)).await.unwrap().unwrap();
    let refused = Page::take(&pool, at(0), LEASE).await;
    assert!(refused.is_err(), "the end of the table is not read before all who write there have ended");
    late.commit().await.unwrap();
    assert_eq!(take_all(&pool, at(0)).await, [7]);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_end_of_what_was_published_again_is_remembered_for_the_next_loss() {
    let (_postgres, pool) = database().await;
    meet(&pool, Uuid::now_v7(), at(0)).await.unwrap();
    take_all(&pool, at(0)).await;
    retain(&pool, 0, 1..=10, 0).await;
    lose(&pool, at(0), at(0)).await.unwrap().unwrap();
    let last =
        Newest { subject: "invalidation.default".to_owned(), message_id: "again".to_owned(), stream_seq: 4 };
    while let Some(page) = Page::take(&pool, at(0), LEASE).await.unwrap() {
        page.settle(Some(last.clone())).await.unwrap();
    }
    let known = newest(&pool, i64::MAX).await.unwrap().unwrap();
    assert_eq!((known.stream_seq, known.message_ids[0].as_str()), (4, "again"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_comes_back_lacks_what_was_published_to_another_one() {
    let (_postgres, pool) = database().await;
    let relay = Uuid::now_v7();
    meet(&pool, relay, at(0)).await.unwrap();
    retain(&pool, 0, 1..=5, 0).await;
    assert!(matches!(meet(&pool, relay, at(9)).await.unwrap(), Meeting::Recreated { .. }));
    assert_eq!(take_all(&pool, at(9)).await.len(), 5);
    retain(&pool, 0, 6..=8, 0).await;
    let unknown = stream::coverage(&pool, at(0)).await.unwrap();
    assert_eq!(unknown.complete_since, None, "the relays do not publish there any more");
    // An older backup of NATS: the stream is the one that was known before.
    assert!(matches!(meet(&pool, relay, at(0)).await.unwrap(), Meeting::Recreated { .. }));
    assert_eq!(take_all(&pool, at(0)).await.len(), 8);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hole_is_filled_once_and_only_if_it_is_retained() {
    let (_postgres, pool) = database().await;
    meet(&pool, Uuid::now_v7(), at(0)).await.unwrap();
    take_all(&pool, at(0)).await;
    retain(&pool, 0, 1..=50, 0).await;
    let recent = Utc::now() - chrono::TimeDelta::minutes(1);
    assert!(matches!(refill(&pool, at(0), recent, 40).await.unwrap(), Refill::Begun { .. }));
    assert_eq!(refill(&pool, at(0), recent, 40).await.unwrap(), Refill::Asked);
    assert_eq!(refill(&pool, at(0), recent, 30).await.unwrap(), Refill::Asked);
    assert_eq!(take_all(&pool, at(0)).await.len(), 50);
    assert_eq!(refill(&pool, at(0), recent, 40).await.unwrap(), Refill::Asked);
    let later = Utc::now() + chrono::TimeDelta::hours(1);
    assert!(matches!(refill(&pool, at(0), later, 41).await.unwrap(), Refill::Begun { .. }));
    assert_eq!(take_all(&pool, at(0)).await, [0; 0], "nothing was recorded since");
    assert_eq!(refill(&pool, at(1), recent, 90).await.unwrap(), Refill::Impossible, "another stream");
    sqlx::raw_sql("update outbox.retention set retained_since = now()").execute(&pool).await.unwrap();
    assert_eq!(refill(&pool, at(0), recent, 90).await.unwrap(), Refill::Impossible, "not retained");
}

/// A pair of which each part knows the stream: one event has come through and is recorded everywhere.
async fn acquainted(options: PairOptions) -> Pair {
    let pair = Pair::start_with(options).await.unwrap();
    pair.fill("before").await.unwrap();
    pair.enqueue(&["before"]).await.unwrap();
    pair.until_none("before").await;
    pair.until_recorded().await;
    pair
}

async fn jetstream(nats: &Nats) -> async_nats::jetstream::Context {
    async_nats::jetstream::new(async_nats::connect(nats.url()).await.unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_large_loss_is_repaired_without_a_halt_and_counted() {
    const MESSAGES: i64 = 100_000;
    let pair = acquainted(PairOptions::default()).await;
    retain(&pair.pool, 0, 1..=MESSAGES, 0).await;
    pair.fill("key:1").await.unwrap();
    pair.fill(&format!("key:{MESSAGES}")).await.unwrap();
    jetstream(&pair.stack.nats).await.delete_stream("INVALIDATIONS").await.unwrap();
    pair.fill("fresh").await.unwrap();
    pair.enqueue(&["fresh"]).await.unwrap();
    pair.until_none("fresh").await;
    pair.until_none("key:*").await;
    eventually(SETTLED, async || pair.relay.metric("relay_republish_remaining").await.unwrap() < 1.0).await;
    let metric = async |name| pair.relay.metric(name).await.unwrap();
    assert!(metric("relay_stream_losses_total").await >= 1.0);
    assert!(metric("relay_republished_messages_total").await >= 100_000.0);
    assert!(pair.subscriber.metric("subscriber_gaps_total").await.unwrap() < 1.0);
    pair.subscriber.until_ready().await;
    let info = jetstream(&pair.stack.nats).await.get_stream("INVALIDATIONS").await.unwrap();
    let messages = info.cached_info().state.messages;
    assert!(messages < 2_000, "{messages} messages instead of a few large ones");
}

/// Somebody keeps the relay from reading what is retained; what is new goes on all the same.
#[tokio::test(flavor = "multi_thread")]
async fn a_republication_that_fails_does_not_hold_up_what_is_new() {
    let pair = acquainted(PairOptions::default()).await;
    pair.subscriber.process().kill().unwrap();
    pair.load("lost", |committed| committed >= 50).await.unwrap();
    pair.until_outbox_empty().await;
    let mut writer = pair.pool.begin().await.unwrap();
    sqlx::raw_sql("lock table outbox.published in row exclusive mode").execute(&mut *writer).await.unwrap();
    jetstream(&pair.stack.nats).await.delete_stream("INVALIDATIONS").await.unwrap();
    pair.subscriber.process().start().unwrap();
    pair.relay.until_not_ready_because("cannot publish retained messages again").await;
    for number in 0..10 {
        let key = format!("fresh:{number}");
        pair.fill(&key).await.unwrap();
        pair.enqueue(&[&key]).await.unwrap();
        pair.until_none(&key).await;
    }
    assert!(pair.count("lost:*").await.unwrap() > 0);
    writer.rollback().await.unwrap();
    pair.until_none("lost:*").await;
    pair.relay.until_ready().await;
    pair.subscriber.until_ready().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_purged_unread_is_published_again() {
    let pair = acquainted(PairOptions::default()).await;
    pair.subscriber.process().kill().unwrap();
    pair.load("purged", |committed| committed >= 200).await.unwrap();
    pair.until_outbox_empty().await;
    let stream = jetstream(&pair.stack.nats).await.get_stream("INVALIDATIONS").await.unwrap();
    stream.purge().await.unwrap();
    // The default gap policy is to halt.
    pair.subscriber.process().start().unwrap();
    pair.until_none("purged:*").await;
    pair.subscriber.until_ready().await;
    assert!(pair.subscriber.metric("subscriber_gaps_total").await.unwrap() < 1.0);
    assert!(pair.relay.metric("relay_stream_losses_total").await.unwrap() >= 1.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_purged_and_is_not_retained_any_more_is_a_gap() {
    let relay = vec![("RELAY_RETENTION", "1s".to_owned())];
    let pair = acquainted(PairOptions { relay, ..Default::default() }).await;
    pair.subscriber.process().kill().unwrap();
    pair.load("purged", |committed| committed >= 16).await.unwrap();
    pair.until_outbox_empty().await;
    eventually(SETTLED, async || {
        let kept: i64 =
            sqlx::query_scalar("select count(*) from outbox.published").fetch_one(&pair.pool).await?;
        anyhow::ensure!(kept == 0, "{kept} messages are still retained");
        Ok(())
    })
    .await;
    let stream = jetstream(&pair.stack.nats).await.get_stream("INVALIDATIONS").await.unwrap();
    stream.purge().await.unwrap();
    pair.subscriber.process().start().unwrap();
    let reason = pair.subscriber.until_not_ready_because("missing from the stream for good").await;
    assert!(reason.contains("expired"), "{reason}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operator_can_have_the_last_minutes_published_again() {
    let pair = acquainted(PairOptions::default()).await;
    pair.fill("before").await.unwrap();
    let mut command = Command::new(program("relay").unwrap());
    command.args(["republish", "--since", "5m"]).env("DATABASE_URL", pair.stack.postgres_url());
    let output = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    pair.until_none("before").await;
}

/// Two NATS for one database: the relay that comes later does not take the messages of the other for lost.
#[tokio::test(flavor = "multi_thread")]
async fn a_relay_with_another_nats_waits_until_the_first_has_ended() {
    let pair = acquainted(PairOptions::default()).await;
    let other = Nats::start_in(pair.stack.directory(), Default::default()).await.unwrap();
    let stray = pair.another_relay(&[("NATS_URL", other.url())]).unwrap();
    let reason = stray.until_not_ready_because("NATS_URL is the same everywhere").await;
    assert!(reason.contains("127.0.0.1"), "{reason}");
    let began = Instant::now();
    let mut number = 0;
    while began.elapsed() < Duration::from_secs(10) {
        number += 1;
        let key = format!("moved:{number}");
        pair.fill(&key).await.unwrap();
        pair.enqueue(&[&key]).await.unwrap();
        pair.until_none(&key).await;
    }
    for relay in [&pair.relay, &stray] {
        assert!(relay.metric("relay_republished_messages_total").await.unwrap() < 1.0);
    }
    // The move: the first one ends, and the other publishes all that is retained to its own NATS.
    pair.relay.process().terminate().await.unwrap();
    stray.until_ready().await;
    eventually(SETTLED, async || {
        let again = stray.metric("relay_republished_messages_total").await.unwrap();
        if again >= f64::from(number) { Ok(()) } else { Err(format!("{again} of {number}")) }
    })
    .await;
}
