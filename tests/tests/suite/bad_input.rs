//! Bad events and bad messages: a clear error, nothing else disturbed, nothing lost.

use std::time::Duration;

use devstack::eventually;
use outbox::{EnqueueError, Event};
use tests::{Pair, PairOptions};

#[tokio::test(flavor = "multi_thread")]
async fn sql_function_refuses_bad_keys_with_a_message_that_names_the_rule() {
    let pair = Pair::start().await.unwrap();
    let cases = [
        ("array[]::text[]", "event names no key"),
        ("null", "event names no key"),
        ("array['a', '']", "key 1 of the event is empty"),
        ("array['a', null]", "key 1 of the event is empty"),
        ("array[repeat('x', 1025)]", "key 0 of the event has 1025 bytes, the limit is 1024"),
        (r"array[E'a\nb']", "key 0 of the event has a control character"),
        (
            "array(select 'k' || n from generate_series(1, 10001) n)",
            "event names 10001 keys, the limit is 10000",
        ),
    ];
    for (keys, message) in cases {
        let statement = format!("select outbox.enqueue({keys})");
        let error = sqlx::raw_sql(sqlx::AssertSqlSafe(statement)).execute(&pair.pool).await.unwrap_err();
        assert!(error.to_string().contains(message), "{keys}: {error}");
    }
    let cases = [
        ("topic => 'a.b'", "topic 'a.b' is not 1 to 64 letters"),
        ("value => 'v'", "an update needs value, version and ttl_ms"),
        ("value => 'v', version => -1, ttl_ms => 5", "version -1 is negative"),
        ("value => 'v', version => 1, ttl_ms => 0", "ttl_ms 0 is not between"),
        ("value => decode(repeat('00', 524289), 'hex'), version => 1, ttl_ms => 5", "value has 524289 bytes"),
        ("traceparent => 'x'", "traceparent is not a W3C trace context"),
    ];
    for (arguments, message) in cases {
        let statement = format!("select outbox.enqueue(array['k'], {arguments})");
        let error = sqlx::raw_sql(sqlx::AssertSqlSafe(statement)).execute(&pair.pool).await.unwrap_err();
        assert!(error.to_string().contains(message), "{arguments}: {error}");
    }
    assert_eq!(pair.backlog().await.unwrap(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn row_inserted_past_every_check_becomes_a_dead_letter_and_delays_nothing() {
    let pair = Pair::start().await.unwrap();
    pair.fill("after").await.unwrap();
    let cases = [
        ("keys", "'{}'", "event names no key"),
        ("keys", "array[null]", "key 0 of the event is not valid"),
        ("keys", "array['a', '']", "key 1 of the event is not valid"),
        ("keys", r"array[E'a\nb']", "key 0 of the event is not valid"),
        ("keys", "array[['a', 'b'], ['c', '']]", "key 3 of the event is not valid"),
        ("keys, topic", "array['k'], 'a.b'", "topic"),
        ("keys, traceparent", "array['k'], 'x'", "traceparent"),
        ("keys, value, version, ttl_ms", "array['k'], 'v', -1, 5", "version"),
        ("keys, value, version, ttl_ms", "array['k'], 'v', 1, 0", "ttl must be"),
        ("keys, value, version, ttl_ms", "array['k', 'l'], 'v', 1, 5", "one key"),
    ];
    for (columns, values, _) in cases {
        let statement =
            format!("insert into outbox.events (id, {columns}) values (gen_random_uuid(), {values})");
        sqlx::raw_sql(sqlx::AssertSqlSafe(statement)).execute(&pair.pool).await.unwrap();
    }
    pair.enqueue(&["after"]).await.unwrap();
    pair.until_none("after").await;
    pair.until_outbox_empty().await;
    let mut letters = outbox::dead_letters::list(&pair.pool, 100).await.unwrap();
    letters.sort_by_key(|letter| letter.created_at);
    assert_eq!(letters.len(), cases.len());
    for ((columns, values, reason), letter) in cases.iter().zip(&letters) {
        assert!(letter.reason.contains(reason), "{columns} = {values}: {}", letter.reason);
    }
}

/// Arrays that do not begin at 1 are easily made in plpgsql; a row may say that it was made at any time.
#[tokio::test(flavor = "multi_thread")]
async fn what_only_looks_odd_is_delivered() {
    let pair = Pair::start().await.unwrap();
    let cases = [
        "select outbox.enqueue('[0:1]={odd:1,odd:2}'::text[])",
        "insert into outbox.events (id, keys, created_at) values (gen_random_uuid(), array['odd:3'], 'infinity')",
        "insert into outbox.events (id, keys, created_at) values (gen_random_uuid(), array['odd:4'], '-infinity')",
        "insert into outbox.events (id, keys, created_at) values (gen_random_uuid(), array['odd:5'], '290000-01-01')",
    ];
    pair.fill_many("odd", 1..6).await.unwrap();
    for statement in cases {
        sqlx::raw_sql(statement).execute(&pair.pool).await.unwrap();
    }
    pair.until_none("odd:*").await;
    pair.until_outbox_empty().await;
    assert_eq!(pair.dead_letters().await.unwrap(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn event_of_ten_thousand_keys_arrives_whole_through_a_small_max_payload() {
    let mut options = PairOptions::default();
    options.stack.nats.max_payload = Some(64 * 1024);
    let pair = Pair::start_with(options).await.unwrap();
    pair.fill_many("many", 0..10_000).await.unwrap();
    let event = Event::delete((0..10_000).map(|number| format!("many:{number}"))).unwrap();
    let mut tx = pair.pool.begin().await.unwrap();
    outbox::enqueue(&mut tx, &event).await.unwrap();
    tx.commit().await.unwrap();
    pair.until_none("many:*").await;
    assert_eq!(pair.dead_letters().await.unwrap(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn update_above_max_payload_becomes_a_dead_letter_that_can_be_replayed_and_delays_nothing() {
    let mut options = PairOptions::default();
    options.stack.nats.max_payload = Some(64 * 1024);
    let pair = Pair::start_with(options).await.unwrap();
    pair.fill("small").await.unwrap();
    pair.fill("large").await.unwrap();
    let large = Event::update("large", vec![b'x'; 100_000], 1, Duration::from_secs(60)).unwrap();
    let mut tx = pair.pool.begin().await.unwrap();
    outbox::enqueue(&mut tx, &large).await.unwrap();
    outbox::enqueue(&mut tx, &Event::delete(["small"]).unwrap()).await.unwrap();
    tx.commit().await.unwrap();
    pair.until_none("small").await;
    pair.until_outbox_empty().await;
    let letters = outbox::dead_letters::list(&pair.pool, 10).await.unwrap();
    assert_eq!(letters.len(), 1);
    assert!(letters[0].reason.contains("larger than"), "{}", letters[0].reason);
    assert_eq!(letters[0].keys, ["large"]);
    assert!(pair.relay.metric("relay_dead_letters_total").await.unwrap() >= 1.0);

    // It comes back under a new id; under the old one JetStream might swallow it.
    assert_eq!(outbox::dead_letters::replay(&pair.pool, Some(&[letters[0].id])).await.unwrap(), 1);
    eventually(Duration::from_secs(20), async || pair.dead_letters().await.unwrap() == 1).await;
    let again = outbox::dead_letters::list(&pair.pool, 10).await.unwrap();
    assert_ne!(again[0].id, letters[0].id);
    assert_eq!(outbox::dead_letters::discard(&pair.pool, None).await.unwrap(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn garbage_on_the_stream_is_set_aside_with_its_reason_and_delays_nothing() {
    let pair = Pair::start().await.unwrap();
    let nats = async_nats::connect(pair.stack.nats_url()).await.unwrap();
    let jetstream = async_nats::jetstream::new(nats);
    let whole = r#"{"v":1,"events":[{"id":"01936d3c-7a80-7000-8000-000000000001","keys":["k"],"at_us":1}]}"#;
    let garbage: [&str; 4] = ["garbage", &whole[..whole.len() - 3], r#"{"v":2,"events":[]}"#, "\u{0}\u{1}"];
    for body in garbage {
        jetstream.publish("invalidation.default", body.to_owned().into()).await.unwrap().await.unwrap();
    }
    pair.fill("k").await.unwrap();
    pair.fill("after").await.unwrap();
    // Duplicates, in any order, are harmless.
    for _ in 0..3 {
        jetstream.publish("invalidation.other", whole.into()).await.unwrap().await.unwrap();
    }
    pair.enqueue(&["after"]).await.unwrap();
    pair.until_none("after").await;
    pair.until_none("k").await;
    // It is created with the first of them, beside the changes.
    let find = async || jetstream.get_stream("INVALIDATIONS_DEAD").await.map_err(|error| error.to_string());
    let dead = eventually(Duration::from_secs(20), find).await;
    eventually(Duration::from_secs(20), async || {
        dead.get_info().await.is_ok_and(|info| info.state.messages == 4)
    })
    .await;
    let mut reasons = Vec::new();
    for sequence in 1..=4 {
        let letter = dead.get_raw_message(sequence).await.unwrap();
        assert_eq!(letter.subject.as_str(), "invalidation-dead.default");
        let reason = letter.headers.get("Invalidation-Dead-Reason").unwrap().to_string();
        reasons.push((String::from_utf8_lossy(&letter.payload).into_owned(), reason));
    }
    for body in garbage {
        assert!(reasons.iter().any(|(letter, _)| letter == body), "the original bytes of {body:?} are gone");
    }
    assert!(reasons.iter().any(|(_, reason)| reason.contains("wire version 2")), "{reasons:?}");
    // They are not delivered again.
    pair.until_recorded().await;
    assert!(pair.subscriber.metric("subscriber_dead_letters_total").await.unwrap() < 4.5);
}

#[tokio::test(flavor = "multi_thread")]
async fn database_without_its_schema_gives_the_writer_an_error_that_says_what_to_run() {
    let pair = Pair::start().await.unwrap();
    let url = pair.stack.create_database("bare").await.unwrap();
    let pool = sqlx::PgPool::connect(&url).await.unwrap();
    let mut tx = pool.begin().await.unwrap();
    let error = outbox::enqueue(&mut tx, &Event::delete(["k"]).unwrap()).await.unwrap_err();
    assert!(matches!(error, EnqueueError::NotInstalled(_)), "{error:?}");
    assert!(error.to_string().contains("relay migrate"));
}

/// Postgres takes rows of up to a gigabyte, the relay has a few megabytes.
#[tokio::test(flavor = "multi_thread")]
async fn a_huge_value_becomes_a_delete_and_huge_keys_a_dead_letter_without_being_fetched() {
    let pair = Pair::start().await.unwrap();
    pair.fill("huge").await.unwrap();
    pair.fill("versioned").await.unwrap();
    let peak = || {
        let status =
            std::fs::read_to_string(format!("/proc/{}/status", pair.relay.process().pid().unwrap())).unwrap();
        let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
        peak.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
    };
    let before = peak();
    let huge = "insert into outbox.events (id, keys, value, version, ttl_ms) values
        (gen_random_uuid(), array['huge'], decode(repeat('00', 50000000), 'hex'), null, null),
        (gen_random_uuid(), array['versioned'], decode(repeat('00', 50000000), 'hex'), 1, 1000),
        (gen_random_uuid(), array[repeat('k', 50000000)], null, null, null)";
    sqlx::raw_sql(huge).execute(&pair.pool).await.unwrap();
    pair.until_none("huge").await;
    pair.until_none("versioned").await;
    pair.until_outbox_empty().await;
    let letters = outbox::dead_letters::list(&pair.pool, 100).await.unwrap();
    assert_eq!(letters.len(), 1);
    assert!(letters[0].reason.contains("keys have 500"), "{}", letters[0].reason);
    let grown = peak() - before;
    assert!(grown < 50_000_000, "the relay grew by {grown} bytes");
}
