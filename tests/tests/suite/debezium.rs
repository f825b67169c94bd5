//! Change events of Debezium, as its server publishes them to JetStream, applied by the rules.

use std::path::Path;
use std::time::Duration;

use async_nats::jetstream::consumer::PullConsumer;
use async_nats::jetstream::{self, stream::Config};
use devstack::eventually;
use tests::Pair;

use crate::subscriber::Scene;

const RULES: &str =
    "[[table]]\nname = 'users'\nkeys = ['user:{id}', 'user:{email}']\non_truncate = ['user:']\n";

/// As `relay rules check --lock` writes it.
const LOCK: &str = "[public.users]\nid = 'int8'\nemail = 'text'\n";

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
        std::fs::write(rules.with_extension("lock"), LOCK).unwrap();
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

    fn lock(&self) -> String {
        self.rules.replace(".toml", ".lock")
    }

    /// Runs `relay rules check --lock`, and returns what it says.
    async fn check_and_lock(&self, succeeds: bool) -> String {
        let mut command = std::process::Command::new(tests::program("relay").unwrap());
        command
            .args(["rules", "check", "--lock", &self.lock()])
            .env("DATABASE_URL", self.pair.stack.postgres_url())
            .env("RELAY_RULES", &self.rules);
        let process = self.pair.stack.spawn("relay-check", command).unwrap();
        let status = process.wait_exit(Duration::from_secs(60)).await.unwrap();
        assert_eq!(status.success(), succeeds, "{}", process.log());
        process.log()
    }

    /// Waits until every message of Debezium's stream is acknowledged.
    async fn until_acknowledged(&self) {
        eventually(Duration::from_secs(60), async || {
            let stream = self.jetstream.get_stream("DBZ").await.map_err(|error| error.to_string())?;
            let consumer: PullConsumer =
                stream.get_consumer("redis-debezium").await.map_err(|error| error.to_string())?;
            let info = consumer.cached_info();
            match info.num_pending + info.num_ack_pending as u64 {
                0 => Ok(()),
                _ => Err(format!("{info:?}")),
            }
        })
        .await;
    }

    /// Waits until Redis has the record of how far the consumer is.
    async fn until_recorded(&self) {
        eventually(Duration::from_secs(30), async || {
            let record =
                self.pair.stack.redis.command(&["KEYS", "*redis-debezium*"]).await.unwrap_or_default();
            if record.contains("redis-debezium") { Ok(()) } else { Err(record) }
        })
        .await;
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
    bed.until_acknowledged().await;
    assert_eq!(subscriber.metric("subscriber_debezium_messages_total{kind=\"change\"}").await.unwrap(), 2.0);
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
    eventually(Duration::from_secs(25), async || matches!(bed.pair.is_cached("user:1").await, Ok(false)))
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_of_debezium_that_was_created_anew_is_read_without_a_restart() {
    let bed = Bed::new().await;
    let subscriber = bed.pair.another_subscriber(&bed.environment("50ms")).unwrap();
    subscriber.until_ready().await;
    bed.until_recorded().await;
    bed.jetstream.delete_stream("DBZ").await.unwrap();
    subscriber.until_not_ready_because("DBZ").await;
    bed.create_stream().await;
    subscriber.until_ready().await;
    bed.pair.fill("user:1").await.unwrap();
    bed.publish(&change("c", "null", r#"{"id":1,"email":"a@x"}"#)).await;
    bed.pair.until_none("user:1").await;
    eventually(Duration::from_secs(30), async || {
        matches!(subscriber.metric("subscriber_debezium_gaps_total").await, Ok(count) if count == 1.0)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_waits_for_its_repetition_is_on_the_gauge() {
    let bed = Bed::new().await;
    let subscriber = bed.pair.another_subscriber(&bed.environment("1h")).unwrap();
    subscriber.until_ready().await;
    bed.publish(&change("c", "null", r#"{"id":1,"email":"a@x"}"#)).await;
    eventually(Duration::from_secs(30), async || {
        matches!(subscriber.metric("subscriber_debezium_ack_pending_messages").await, Ok(count) if count == 1.0)
    })
    .await;
    let observed = subscriber.metric("subscriber_debezium_commit_to_delete_seconds_count").await.unwrap();
    assert_eq!(observed, 1.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_decoded_is_set_aside_with_its_reason() {
    let bed = Bed::new().await;
    let subscriber = bed.pair.another_subscriber(&bed.environment("50ms")).unwrap();
    subscriber.until_ready().await;
    bed.pair.fill("user:1").await.unwrap();
    bed.publish("avro").await;
    bed.publish(r#"{"id":1,"email":"a@x","__deleted":"false"}"#).await;
    bed.publish(&change("c", "null", r#"{"id":1,"email":"a@x"}"#)).await;
    bed.pair.until_none("user:1").await;
    // It is created with the first of them, beside the changes.
    let find =
        async || bed.jetstream.get_stream("INVALIDATIONS_DEAD").await.map_err(|error| error.to_string());
    let dead = eventually(Duration::from_secs(30), find).await;
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
    assert!(reasons[0].contains("debezium.format.value=json"), "{reasons:?}");
    assert!(reasons[1].contains("ExtractNewRecordState"), "{reasons:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn control_messages_are_counted_and_no_dead_letters() {
    let bed = Bed::new().await;
    let subscriber = bed.pair.another_subscriber(&bed.environment("50ms")).unwrap();
    subscriber.until_ready().await;
    for body in [
        r#"{"ts_ms":1767225600000}"#,
        r#"{"status":"BEGIN","id":"7:1","event_count":null,"data_collections":null,"ts_ms":1}"#,
        r#"{"status":"END","id":"7:1","event_count":1,"data_collections":[],"ts_ms":1}"#,
        r#"{"op":"m","ts_ms":1,"source":{"schema":"","table":""},"message":{"prefix":"p","content":"eA=="}}"#,
        "",
    ] {
        bed.publish(body).await;
    }
    for (kind, count) in
        [("heartbeat", 1.0), ("transaction", 2.0), ("logical_message", 1.0), ("tombstone", 1.0)]
    {
        let name = format!("subscriber_debezium_messages_total{{kind=\"{kind}\"}}");
        eventually(
            Duration::from_secs(30),
            async || matches!(subscriber.metric(&name).await, Ok(found) if found == count),
        )
        .await;
    }
    let made = subscriber.metric("subscriber_debezium_heartbeat_timestamp_seconds").await.unwrap();
    assert_eq!(made, 1_767_225_600.0);
    bed.until_acknowledged().await;
    assert_eq!(subscriber.metric("subscriber_dead_letters_total").await.unwrap(), 0.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_of_a_table_without_rules_is_counted_and_warned_of_once() {
    let bed = Bed::new().await;
    let subscriber = bed.pair.another_subscriber(&bed.environment("50ms")).unwrap();
    subscriber.until_ready().await;
    let other = change("c", "null", r#"{"id":1,"email":"a@x"}"#)
        .replace(r#""table":"users""#, r#""table":"users_eu""#);
    bed.publish(&other).await;
    bed.publish(&other).await;
    bed.until_acknowledged().await;
    assert_eq!(
        subscriber.metric("subscriber_debezium_messages_total{kind=\"no_rules\"}").await.unwrap(),
        2.0
    );
    let log = subscriber.process().log();
    let warnings = log.lines().filter(|line| line.contains("table public.users_eu come, which has no rules"));
    assert_eq!(warnings.count(), 1, "{log}");
    assert!(log.contains("publish.via.partition.root=true"), "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_column_that_cannot_be_read_costs_its_prefix_and_leaves_the_other_keys_alone() {
    let bed = Bed::new().await;
    let rules = "[[table]]\nname = 'users'\nkeys = ['user:{id}', 'born:{born}']\non_truncate = ['user:']\n";
    std::fs::write(&bed.rules, rules).unwrap();
    std::fs::write(bed.lock(), "[public.users]\nid = 'int8'\nborn = 'date'\n").unwrap();
    let subscriber = bed.pair.another_subscriber(&bed.environment("50ms")).unwrap();
    subscriber.until_ready().await;
    for key in ["user:1", "user:2", "born:2020-01-01", "born:2021-01-01"] {
        bed.pair.fill(key).await.unwrap();
    }
    bed.publish(&change("d", r#"{"id":1,"born":18262}"#, "null")).await;
    bed.publish(&change("d", r#"{"id":1,"born":18262}"#, "null")).await;
    bed.pair.until_none("user:1").await;
    bed.pair.until_none("born:*").await;
    assert!(bed.pair.is_cached("user:2").await.unwrap());
    bed.until_acknowledged().await;
    assert_eq!(subscriber.metric("subscriber_debezium_unknown_changes_total").await.unwrap(), 2.0);
    let log = subscriber.process().log();
    assert_eq!(log.lines().filter(|line| line.contains("column born")).count(), 1, "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn without_lock_file_messages_without_a_schema_invalidate_the_prefixes() {
    let bed = Bed::new().await;
    std::fs::remove_file(bed.lock()).unwrap();
    let subscriber = bed.pair.another_subscriber(&bed.environment("50ms")).unwrap();
    subscriber.until_ready().await;
    bed.pair.fill("user:2").await.unwrap();
    bed.publish(&change("c", "null", r#"{"id":1,"email":"a@x"}"#)).await;
    bed.pair.until_none("user:*").await;
    bed.until_acknowledged().await;
    let log = subscriber.process().log();
    assert!(log.contains("relay rules check --lock") && log.contains("schemas.enable=true"), "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_that_are_gone_before_they_were_read_are_counted_and_the_gap_policy_flushes() {
    let bed = Bed::new().await;
    let mut environment = bed.environment("50ms");
    environment.push(("SUBSCRIBER_GAP_POLICY", "flush".to_owned()));
    environment.push(("SUBSCRIBER_FLUSH_PATTERNS", "user:*".to_owned()));
    let subscriber = bed.pair.another_subscriber(&environment).unwrap();
    subscriber.until_ready().await;
    bed.publish(&change("c", "null", r#"{"id":1,"email":"a@x"}"#)).await;
    bed.until_acknowledged().await;
    bed.until_recorded().await;
    subscriber.process().terminate().await.unwrap();

    for id in 2..=20 {
        bed.publish(&change("c", "null", &format!(r#"{{"id":{id},"email":"{id}@x"}}"#))).await;
    }
    let stream = bed.jetstream.get_stream("DBZ").await.unwrap();
    stream.purge().keep(3).await.unwrap();
    bed.pair.fill("user:2").await.unwrap();
    bed.pair.fill("other").await.unwrap();
    let subscriber = bed.pair.another_subscriber(&environment).unwrap();
    bed.pair.until_none("user:*").await;
    assert!(bed.pair.is_cached("other").await.unwrap());
    eventually(Duration::from_secs(30), async || {
        matches!(subscriber.metric("subscriber_debezium_gaps_total").await, Ok(count) if count == 1.0)
    })
    .await;
    let log = subscriber.process().log();
    assert!(log.contains("messages are gone that were not read"), "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_lock_file_is_written_by_the_relay_and_one_that_is_outdated_is_refused() {
    let bed = Bed::new().await;
    sqlx::raw_sql("create table users (id int8 primary key, email text not null)")
        .execute(&bed.pair.pool)
        .await
        .unwrap();
    let check = async |succeeds: bool| bed.check_and_lock(succeeds).await;
    std::fs::remove_file(bed.lock()).unwrap();
    assert!(check(false).await.contains("REPLICA IDENTITY FULL"));
    assert!(!Path::new(&bed.lock()).exists(), "nothing is written for an identity without the columns");
    sqlx::raw_sql("alter table users replica identity full; alter table users alter email type varchar(9)")
        .execute(&bed.pair.pool)
        .await
        .unwrap();
    let said = check(true).await;
    assert!(said.contains("rules.lock"), "{said}");
    let lock = std::fs::read_to_string(bed.lock()).unwrap();
    assert!(lock.contains("id = \"int8\"") && lock.contains("email = \"varchar\""), "{lock}");
    let subscriber = bed.pair.another_subscriber(&bed.environment("50ms")).unwrap();
    subscriber.until_ready().await;

    sqlx::raw_sql("alter table users add born date").execute(&bed.pair.pool).await.unwrap();
    std::fs::write(&bed.rules, RULES.replace("'user:{email}'", "'user:{email}', 'born:{born}'")).unwrap();
    let outdated = bed.pair.another_subscriber(&bed.environment("50ms")).unwrap();
    eventually(Duration::from_secs(30), async || {
        let log = outdated.process().log();
        let named = log.contains("column born of table public.users") && log.contains("rules check --lock");
        if named { Ok(()) } else { Err(log) }
    })
    .await;
    let said = check(true).await;
    assert!(
        said.contains("column born") && said.contains("date"),
        "what Debezium does not send as text is said: {said}"
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
    std::fs::write(rules.with_extension("lock"), LOCK).unwrap();
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
