//! Change events of Debezium, as its server publishes them to JetStream, applied by the rules.

use std::time::Duration;

use async_nats::jetstream::{self, stream::Config};
use devstack::eventually;
use tests::Pair;

use crate::subscriber::Scene;

const RULES: &str =
    "[[table]]\nname = 'users'\nkeys = ['user:{id}', 'user:{email}']\non_truncate = ['user:']\n";

fn change(op: &str, before: &str, after: &str) -> String {
    format!(
        r#"{{"before":{before},"after":{after},"source":{{"connector":"postgresql","ts_ms":1767225600000,"schema":"public",
        "table":"users","txId":7,"lsn":24023128}},"op":"{op}","ts_ms":1767225600120}}"#
    )
}

struct Bed {
    pair: Pair,
    jetstream: jetstream::Context,
    rules: String,
}

impl Bed {
    async fn new() -> Self {
        let pair = Pair::start().await.unwrap();
        let client = async_nats::connect(pair.stack.nats_url()).await.unwrap();
        let jetstream = jetstream::new(client);
        let rules = pair.stack.directory().path().join("rules.toml");
        std::fs::write(&rules, RULES).unwrap();
        let bed = Self { pair, jetstream, rules: rules.display().to_string() };
        bed.create_stream().await;
        bed
    }

    async fn create_stream(&self) {
        let stream =
            Config { name: "DBZ".to_owned(), subjects: vec!["dbz.>".to_owned()], ..Default::default() };
        self.jetstream.create_stream(stream).await.unwrap();
    }

    fn environment(&self, repeat_after: &str) -> Vec<(&'static str, String)> {
        vec![
            ("SUBSCRIBER_DEBEZIUM_STREAM", "DBZ".to_owned()),
            ("SUBSCRIBER_RULES", self.rules.clone()),
            ("SUBSCRIBER_DEBEZIUM_REPEAT_AFTER", repeat_after.to_owned()),
        ]
    }

    async fn publish(&self, body: &str) {
        self.jetstream.publish("dbz.public.users", body.to_owned().into()).await.unwrap().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn change_events_remove_the_keys_of_old_and_new_row_and_truncate_the_namespace() {
    let bed = Bed::new().await;
    let subscriber = bed.pair.another_subscriber(&bed.environment("50ms")).unwrap();
    subscriber.until_ready().await;
    for key in ["user:1", "user:a@x", "user:b@x", "user:2", "other"] {
        bed.pair.fill(key).await.unwrap();
    }
    bed.publish("").await;
    bed.publish(&change("u", r#"{"id":1,"email":"a@x"}"#, r#"{"id":1,"email":"b@x"}"#)).await;
    for key in ["user:1", "user:a@x", "user:b@x"] {
        bed.pair.until_none(key).await;
    }
    assert!(bed.pair.is_cached("user:2").await.unwrap());
    bed.publish(&format!(r#"{{"schema":{{}},"payload":{}}}"#, change("t", "null", "null"))).await;
    bed.pair.until_none("user:*").await;
    assert!(bed.pair.is_cached("other").await.unwrap());
    // Acknowledged, so that nothing comes again.
    eventually(Duration::from_secs(30), async || {
        subscriber.metric("subscriber_debezium_messages_total").await.is_ok_and(|count| count > 2.5)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_value_that_was_filled_before_the_commit_was_visible_is_removed_by_the_repetition() {
    let bed = Bed::new().await;
    let subscriber = bed.pair.another_subscriber(&bed.environment("2s")).unwrap();
    subscriber.until_ready().await;
    bed.pair.fill("user:1").await.unwrap();
    bed.publish(&change("c", "null", r#"{"id":1,"email":"a@x"}"#)).await;
    bed.pair.until_none("user:1").await;
    bed.pair.fill("user:1").await.unwrap();
    bed.pair.until_none("user:1").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_change_event_waits_for_the_repetitions_of_earlier_ones() {
    let bed = Bed::new().await;
    // No repetition becomes due while the test runs.
    let subscriber = bed.pair.another_subscriber(&bed.environment("1h")).unwrap();
    subscriber.until_ready().await;
    for id in 1..=150 {
        let key = format!("user:{id}");
        bed.pair.fill(&key).await.unwrap();
        bed.publish(&change("c", "null", &format!(r#"{{"id":{id},"email":"{id}@x"}}"#))).await;
        bed.pair.until_none(&key).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_subscriber_that_stops_gives_back_what_it_has_not_repeated() {
    let bed = Bed::new().await;
    // Well below the time after which NATS would deliver the message again by itself.
    let subscriber = bed.pair.another_subscriber(&bed.environment("3s")).unwrap();
    subscriber.until_ready().await;
    bed.pair.fill("user:1").await.unwrap();
    bed.publish(&change("c", "null", r#"{"id":1,"email":"a@x"}"#)).await;
    bed.pair.until_none("user:1").await;
    subscriber.process().terminate().await.unwrap();
    bed.pair.fill("user:1").await.unwrap();
    let another = bed.pair.another_subscriber(&bed.environment("3s")).unwrap();
    another.until_ready().await;
    eventually(Duration::from_secs(25), async || {
        matches!(bed.pair.is_cached("user:1").await, Ok(false))
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_of_debezium_that_was_created_anew_is_read_without_a_restart() {
    let bed = Bed::new().await;
    let subscriber = bed.pair.another_subscriber(&bed.environment("50ms")).unwrap();
    subscriber.until_ready().await;
    bed.jetstream.delete_stream("DBZ").await.unwrap();
    subscriber.until_not_ready_because("DBZ").await;
    bed.create_stream().await;
    subscriber.until_ready().await;
    bed.pair.fill("user:1").await.unwrap();
    bed.publish(&change("c", "null", r#"{"id":1,"email":"a@x"}"#)).await;
    bed.pair.until_none("user:1").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_decoded_is_set_aside_with_its_reason() {
    let bed = Bed::new().await;
    let subscriber = bed.pair.another_subscriber(&bed.environment("50ms")).unwrap();
    subscriber.until_ready().await;
    bed.pair.fill("user:1").await.unwrap();
    bed.publish("avro").await;
    bed.publish(&change("c", "null", r#"{"id":1.5,"email":"a@x"}"#)).await;
    bed.publish(&change("c", "null", r#"{"id":1,"email":"a@x"}"#)).await;
    bed.pair.until_none("user:1").await;
    let dead = bed.jetstream.get_stream("INVALIDATIONS_DEAD").await.unwrap();
    eventually(Duration::from_secs(30), async || {
        dead.get_info().await.is_ok_and(|info| info.state.messages == 2)
    })
    .await;
    let mut reasons = Vec::new();
    for sequence in 1..=2 {
        let letter = dead.get_raw_message(sequence).await.unwrap();
        assert_eq!(letter.subject.as_str(), "invalidation-dead.dbz.public.users");
        reasons.push(letter.headers.get("Invalidation-Dead-Reason").unwrap().to_string());
    }
    assert!(reasons.iter().any(|reason| reason.contains("not a change event")), "{reasons:?}");
    assert!(
        reasons.iter().any(|reason| reason.contains("column id") && reason.contains("decimal.handling.mode")),
        "{reasons:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn rules_that_need_a_database_are_refused_at_the_start() {
    let bed = Bed::new().await;
    let text = format!("{RULES}[[table.expand]]\nsql = \"select 'k' where 1 = any($1)\"\n");
    std::fs::write(&bed.rules, text).unwrap();
    let subscriber = bed.pair.another_subscriber(&bed.environment("1s")).unwrap();
    eventually(Duration::from_secs(30), async || {
        let log = subscriber.process().log();
        let refused = log.contains("rules.toml:6: table public.users: expand asks the database");
        if refused { Ok(()) } else { Err(log) }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_relay_and_postgres_change_events_are_applied_and_a_relay_may_come_later() {
    let scene = Scene::new().await;
    let stream = Config { name: "DBZ".to_owned(), subjects: vec!["dbz.>".to_owned()], ..Default::default() };
    scene.jetstream.create_stream(stream).await.unwrap();
    let rules = scene.directory.path().join("rules.toml");
    std::fs::write(&rules, RULES).unwrap();
    let environment = [
        ("SUBSCRIBER_DEBEZIUM_STREAM", "DBZ".to_owned()),
        ("SUBSCRIBER_RULES", rules.display().to_string()),
        ("SUBSCRIBER_DEBEZIUM_REPEAT_AFTER", "50ms".to_owned()),
    ];
    let subscriber = scene.subscriber(&environment);
    subscriber.until_ready().await;
    let log = subscriber.process().log();
    assert!(log.contains("only Debezium's change events are applied"), "{log}");
    scene.fill("user:1").await;
    let body = change("c", "null", r#"{"id":1,"email":"a@x"}"#);
    scene.jetstream.publish("dbz.public.users", body.into()).await.unwrap().await.unwrap();
    scene.until_gone("user:1").await;
    let status = scene.ask(&["status"], &environment).await;
    assert!(status.contains("stream DBZ") && status.contains("INVALIDATIONS does not exist"), "{status}");

    scene.create_stream(Duration::from_secs(600)).await;
    scene.fill("order:1").await;
    scene.publish("default", "order:1").await;
    scene.until_gone("order:1").await;
    subscriber.until_ready().await;
    let status = scene.ask(&["status"], &environment).await;
    assert!(status.contains("stream DBZ") && status.contains("durable       redis"), "{status}");

    // What has been there is missed.
    scene.jetstream.delete_stream("INVALIDATIONS").await.unwrap();
    subscriber.until_not_ready_because("INVALIDATIONS does not exist").await;
}
