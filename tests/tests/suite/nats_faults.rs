//! NATS is down, restarted, wiped, restored, or loses its leader.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use devstack::{Nats, Postgres, PostgresOptions, eventually};
use outbox::Event;
use outbox::retention::{self, Lost, StreamPosition};
use tests::{Pair, PairOptions, SETTLED};

/// Far more than the relay needs, far less than a leak would take.
const MAX_RSS_BYTES: u64 = 64 * 1024 * 1024;

#[tokio::test(flavor = "multi_thread")]
async fn nats_down_for_a_minute_under_full_insert_rate_loses_nothing_and_costs_no_memory() {
    let pair = Pair::start().await.unwrap();
    pair.stack.nats.kill().unwrap();
    let end = Instant::now() + Duration::from_secs(60);
    let mut committed = 0;
    while Instant::now() < end {
        pair.fill_many("outage", committed..committed + 500).await.unwrap();
        let events: Vec<Event> =
            (committed..committed + 500).map(|n| Event::delete([format!("outage:{n}")]).unwrap()).collect();
        let mut tx = pair.pool.begin().await.unwrap();
        outbox::enqueue_all(&mut tx, &events).await.unwrap();
        tx.commit().await.unwrap();
        committed += 500;
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert!(committed > 10_000);
    assert_eq!(pair.backlog().await.unwrap(), i64::try_from(committed).unwrap());
    let reason = pair.relay.until_not_ready().await;
    assert!(reason.contains("NATS"), "{reason}");
    pair.stack.nats.start().await.unwrap();
    pair.until_none("outage:*").await;
    pair.until_outbox_empty().await;
    pair.relay.until_ready().await;
    assert_eq!(pair.dead_letters().await.unwrap(), 0);
    assert!(pair.relay.process().rss_bytes().unwrap() < MAX_RSS_BYTES);
    assert!(pair.subscriber.process().rss_bytes().unwrap() < MAX_RSS_BYTES);
}

#[tokio::test(flavor = "multi_thread")]
async fn nats_killed_and_restarted_with_its_data_under_load_loses_nothing() {
    let pair = Pair::start().await.unwrap();
    let end = Instant::now() + Duration::from_secs(8);
    let kills = async {
        while Instant::now() < end {
            tokio::time::sleep(Duration::from_millis(900)).await;
            pair.stack.nats.kill().unwrap();
            pair.stack.nats.start().await.unwrap();
        }
    };
    let (committed, ()) = tokio::join!(pair.load("restart", |_| Instant::now() >= end), kills);
    assert!(committed.unwrap() > 20);
    pair.until_outbox_empty().await;
    pair.until_none("restart:*").await;
    assert_eq!(pair.dead_letters().await.unwrap(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn stream_wiped_while_the_subscriber_is_away_is_published_again_from_the_retention() {
    let pair = Pair::start().await.unwrap();
    pair.fill("before").await.unwrap();
    pair.enqueue(&["before"]).await.unwrap();
    pair.until_none("before").await;
    pair.until_recorded().await;
    pair.subscriber.process().kill().unwrap();
    let committed = pair.load("wiped", |committed| committed >= 400).await.unwrap();
    pair.until_outbox_empty().await;

    pair.stack.nats.kill().unwrap();
    pair.stack.nats.wipe_data().unwrap();
    pair.stack.nats.start().await.unwrap();
    assert_eq!(pair.count("wiped:*").await.unwrap(), committed);
    // The default gap policy is to halt: that the subscriber goes on shows that it knows nothing is missing.
    pair.subscriber.process().start().unwrap();
    pair.until_none("wiped:*").await;
    pair.subscriber.until_ready().await;
    assert!(pair.relay.metric("relay_republished_messages_total").await.unwrap() >= 1.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn nats_restored_from_an_older_backup_is_given_what_it_lacks() {
    let pair = Pair::start().await.unwrap();
    pair.fill("before").await.unwrap();
    pair.enqueue(&["before"]).await.unwrap();
    pair.until_none("before").await;
    pair.until_recorded().await;
    pair.stack.nats.terminate().await.unwrap();
    pair.stack.nats.save_data("backup").unwrap();
    pair.stack.nats.start().await.unwrap();
    pair.subscriber.until_ready().await;

    // These are published and lost again before the subscriber has read them.
    pair.subscriber.process().kill().unwrap();
    pair.load("backup", |committed| committed >= 200).await.unwrap();
    pair.until_outbox_empty().await;
    pair.stack.nats.kill().unwrap();
    pair.stack.nats.restore_data("backup").unwrap();
    pair.stack.nats.start().await.unwrap();
    pair.subscriber.process().start().unwrap();
    pair.until_none("backup:*").await;
    pair.subscriber.until_ready().await;
}

/// A stream that is wiped after the retention has turned, with the subscriber away.
async fn lose_events_for_good(pair: &Pair) {
    pair.fill("before").await.unwrap();
    pair.enqueue(&["before"]).await.unwrap();
    pair.until_none("before").await;
    pair.until_recorded().await;
    pair.subscriber.process().kill().unwrap();
    pair.fill("user:1").await.unwrap();
    pair.fill("other:1").await.unwrap();
    pair.enqueue(&["user:1"]).await.unwrap();
    pair.until_outbox_empty().await;
    eventually(Duration::from_secs(30), async || {
        let kept: i64 =
            sqlx::query_scalar("select count(*) from outbox.published").fetch_one(&pair.pool).await?;
        anyhow::ensure!(kept == 0, "{kept} messages are still retained");
        Ok(())
    })
    .await;
    pair.stack.nats.kill().unwrap();
    pair.stack.nats.wipe_data().unwrap();
    pair.stack.nats.start().await.unwrap();
    pair.relay.until_ready().await;
}

fn short_retention() -> Vec<(&'static str, String)> {
    vec![("RELAY_RETENTION", "1s".to_owned())]
}

#[tokio::test(flavor = "multi_thread")]
async fn events_lost_beyond_the_retention_halt_the_subscriber_loudly() {
    let options = PairOptions { relay: short_retention(), ..Default::default() };
    let pair = Pair::start_with(options).await.unwrap();
    lose_events_for_good(&pair).await;
    pair.subscriber.process().start().unwrap();
    let reason = pair.subscriber.until_not_ready_because("missing from the stream for good").await;
    assert!(reason.contains("created anew") && reason.contains("SUBSCRIBER_GAP_POLICY"), "{reason}");
    assert!(pair.subscriber.metric("subscriber_halted").await.unwrap() > 0.0);
    assert!(pair.is_cached("user:1").await.unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn events_lost_beyond_the_retention_flush_just_the_keys_that_were_named() {
    let subscriber = vec![
        ("SUBSCRIBER_GAP_POLICY", "flush".to_owned()),
        ("SUBSCRIBER_FLUSH_PATTERNS", "user:*,account:*".to_owned()),
    ];
    let options = PairOptions { relay: short_retention(), subscriber, ..Default::default() };
    let pair = Pair::start_with(options).await.unwrap();
    lose_events_for_good(&pair).await;
    pair.subscriber.process().start().unwrap();
    pair.until_none("user:*").await;
    assert!(pair.is_cached("other:1").await.unwrap());
    pair.subscriber.until_ready().await;
    assert!(pair.subscriber.metric("subscriber_gaps_total").await.unwrap() >= 1.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn leader_of_a_three_node_cluster_killed_under_load_loses_nothing() {
    let pair = Pair::start().await.unwrap();
    pair.relay.process().terminate().await.unwrap();
    pair.subscriber.process().terminate().await.unwrap();
    let cluster = Nats::cluster(3).await.unwrap();
    let nats = [("NATS_URL", cluster.url()), ("RELAY_STREAM_REPLICAS", "3".to_owned())];
    let relay = pair.another_relay(&nats).unwrap();
    // Its position is about another stream.
    let subscriber =
        pair.another_subscriber(&[nats[0].clone(), ("SUBSCRIBER_DURABLE", "clustered".to_owned())]).unwrap();
    relay.until_ready().await;
    subscriber.until_ready().await;
    let end = Instant::now() + Duration::from_secs(10);
    let kills = async {
        tokio::time::sleep(Duration::from_secs(2)).await;
        let leader = cluster.stream_leader("INVALIDATIONS").await.unwrap();
        cluster.nodes[leader].kill().unwrap();
        tokio::time::sleep(Duration::from_secs(4)).await;
        cluster.nodes[leader].start().await.unwrap();
        cluster.wait_until_ready().await.unwrap();
    };
    let (committed, ()) = tokio::join!(pair.load("leader", |_| Instant::now() >= end), kills);
    assert!(committed.unwrap() > 20);
    pair.until_outbox_empty().await;
    pair.until_none("leader:*").await;
    relay.until_ready().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn full_stream_holds_events_back_in_the_outbox_instead_of_dropping_them() {
    let relay = vec![("RELAY_STREAM_MAX_BYTES", "20000".to_owned()), ("RELAY_CLAIM_LIMIT", "10".to_owned())];
    let pair = Pair::start_with(PairOptions { relay, ..Default::default() }).await.unwrap();
    pair.subscriber.process().kill().unwrap();
    pair.load("full", |committed| committed >= 400).await.unwrap();
    eventually(Duration::from_secs(30), async || {
        pair.relay.metric("relay_publish_failures_total").await.unwrap_or(0.0) >= 1.0
    })
    .await;
    assert!(pair.backlog().await.unwrap() > 0);
    assert_eq!(pair.dead_letters().await.unwrap(), 0);
    // The operator makes room.
    let info = pair.stack.nats.request("$JS.API.STREAM.INFO.INVALIDATIONS", "").await.unwrap();
    let mut config: serde_json::Value =
        serde_json::from_str::<serde_json::Value>(&info).unwrap()["config"].clone();
    config["max_bytes"] = (-1).into();
    pair.stack.nats.request("$JS.API.STREAM.UPDATE.INVALIDATIONS", &config.to_string()).await.unwrap();
    pair.subscriber.process().start().unwrap();
    pair.until_outbox_empty().await;
    pair.until_none("full:*").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn stream_deleted_under_the_pair_is_created_again_and_nothing_is_lost() {
    let pair = Pair::start().await.unwrap();
    pair.fill("before").await.unwrap();
    pair.enqueue(&["before"]).await.unwrap();
    pair.until_none("before").await;
    pair.until_recorded().await;
    pair.stack.nats.request("$JS.API.STREAM.DELETE.INVALIDATIONS", "").await.unwrap();
    pair.load("deleted", |committed| committed >= 40).await.unwrap();
    pair.until_outbox_empty().await;
    pair.until_none("deleted:*").await;
    pair.subscriber.until_ready().await;
}

/// The relay is killed between two batches of what it publishes again: the stream is longer by then than it was.
#[tokio::test(flavor = "multi_thread")]
async fn what_the_stream_lost_stays_lost_until_it_is_published_again() {
    let postgres = Postgres::start_alone(PostgresOptions::default()).await.unwrap();
    let pool = sqlx::PgPool::connect(&postgres.url()).await.unwrap();
    outbox::migrate(&pool).await.unwrap();
    sqlx::raw_sql(
        "insert into outbox.published (half, stream_created, stream_seq, subject, message_id, events, body)
         select 0, 'epoch', n, 'invalidation.default', n::text, 1, '' from generate_series(101, 150) n",
    )
    .execute(&pool)
    .await
    .unwrap();
    let created = chrono::DateTime::UNIX_EPOCH;
    retention::complete(&pool, created).await.unwrap();
    assert!(!retention::is_incomplete(&pool, created).await.unwrap());
    let newest = retention::newest(&pool, created, i64::MAX).await.unwrap().unwrap();
    assert_eq!((newest.stream_seq, newest.message_ids), (150, vec!["150".to_owned()]));

    let lease = Duration::from_secs(10);
    let back = StreamPosition { created, last_seq: 100 };
    assert_eq!(retention::mark_lost(&pool, back).await.unwrap(), 50);
    let first = Lost::take(&pool, created, 10, lease).await.unwrap().unwrap();
    assert_eq!(first.envelopes[0].message_id, "101");
    let second = Lost::take(&pool, created, 10, lease).await.unwrap().unwrap();
    assert_eq!(second.envelopes[0].message_id, "111", "another relay takes others");
    first.settle(110).await.unwrap();
    // The second never gets there. Others publish meanwhile, so that the stream ends past everything it had.
    drop(second);
    assert!(retention::is_incomplete(&pool, created).await.unwrap());
    let mut again = 0;
    while let Some(lost) = Lost::take(&pool, created, 25, lease).await.unwrap() {
        again += lost.envelopes.len();
        lost.settle(200).await.unwrap();
    }
    assert_eq!(again, 40);
    assert!(!retention::is_incomplete(&pool, created).await.unwrap());
}

/// What was on its way when NATS came back with old data fills the stream again, past what it had lost.
#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_was_filled_again_after_a_loss_is_given_what_it_lacks() {
    fill_again_after_a_loss(50).await;
}

/// Or not quite so far: what lies below its end is not what it was either.
#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_was_filled_again_in_part_is_given_what_it_lacks() {
    fill_again_after_a_loss(5).await;
}

/// Postgres fails at the moment when the relay marks what it has found.
#[tokio::test(flavor = "multi_thread")]
async fn a_loss_that_could_not_be_marked_is_found_again() {
    let pair = lose_and_fill_again(50).await;
    let mut lock = pair.pool.begin().await.unwrap();
    sqlx::raw_sql("lock table outbox.published in exclusive mode").execute(&mut *lock).await.unwrap();
    pair.relay.process().start().unwrap();
    let ended = "select pg_terminate_backend(pid) from pg_stat_activity
        where wait_event_type = 'Lock' and query like 'update outbox.published set stream_created%'";
    eventually(SETTLED, async || !pair.stack.postgres.query(ended).await.unwrap().is_empty()).await;
    lock.rollback().await.unwrap();
    pair.subscriber.process().start().unwrap();
    pair.until_none("lost:*").await;
}

async fn fill_again_after_a_loss(foreign_messages: usize) {
    let pair = lose_and_fill_again(foreign_messages).await;
    pair.relay.process().start().unwrap();
    pair.relay.until_ready().await;
    pair.subscriber.process().start().unwrap();
    pair.until_none("lost:*").await;
    assert!(pair.relay.metric("relay_republished_messages_total").await.unwrap() >= 1.0);
}

/// Twenty applied nowhere and lost by NATS, and so many messages of somebody else in their place; relay and subscriber are
/// down.
async fn lose_and_fill_again(foreign_messages: usize) -> Pair {
    let pair = Pair::start().await.unwrap();
    pair.fill("before").await.unwrap();
    pair.enqueue(&["before"]).await.unwrap();
    pair.until_none("before").await;
    pair.until_recorded().await;
    pair.stack.nats.terminate().await.unwrap();
    pair.stack.nats.save_data("backup").unwrap();
    pair.stack.nats.start().await.unwrap();
    pair.subscriber.process().kill().unwrap();
    // Each a message of its own.
    for number in 0..20 {
        pair.fill(&format!("lost:{number}")).await.unwrap();
        pair.enqueue(&[&format!("lost:{number}")]).await.unwrap();
        pair.until_outbox_empty().await;
    }
    pair.relay.process().kill().unwrap();
    pair.stack.nats.kill().unwrap();
    pair.stack.nats.restore_data("backup").unwrap();
    pair.stack.nats.start().await.unwrap();
    let nats = async_nats::connect(pair.stack.nats_url()).await.unwrap();
    let jetstream = async_nats::jetstream::new(nats);
    let foreign = event::Envelope::encode(&event::Envelope { events: Vec::new() });
    for _ in 0..foreign_messages {
        jetstream.publish("invalidation.other", foreign.clone().into()).await.unwrap().await.unwrap();
    }
    pair
}

#[tokio::test(flavor = "multi_thread")]
async fn a_relay_that_retains_nothing_vouches_for_nothing() {
    let relay = vec![("RELAY_RETENTION", "0s".to_owned())];
    let pair = Pair::start_with(PairOptions { relay, ..Default::default() }).await.unwrap();
    pair.fill("before").await.unwrap();
    pair.enqueue(&["before"]).await.unwrap();
    pair.until_none("before").await;
    pair.until_recorded().await;
    let now = chrono::Utc::now();
    let promised = async || retention::coverage(&pair.pool, now).await.unwrap().retained_since;
    eventually(SETTLED, async || promised().await > now).await;
    // Retaining again promises what comes from now on, and keeps it past the next turn.
    let relay = pair.another_relay(&[("RELAY_RETENTION", "1s".to_owned())]).unwrap();
    pair.relay.process().kill().unwrap();
    relay.until_ready().await;
    eventually(SETTLED, async || promised().await < chrono::Utc::now()).await;
    assert!(promised().await > now, "not of the time when nothing was retained");
    let half = async || -> i16 {
        sqlx::query_scalar("select half from outbox.retention").fetch_one(&pair.pool).await.unwrap()
    };
    let before = half().await;
    eventually(SETTLED, async || half().await != before).await;
    assert!(promised().await > now);
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

/// A pair whose stream, but not its consumer, has come back as it was before twenty messages that were applied.
async fn consumer_ahead_of_its_stream() -> Pair {
    let subscriber = vec![
        ("SUBSCRIBER_GAP_POLICY", "flush".to_owned()),
        ("SUBSCRIBER_FLUSH_PATTERNS", "user:*".to_owned()),
    ];
    let relay = vec![("RELAY_RETENTION", "0s".to_owned())];
    let pair = Pair::start_with(PairOptions { relay, subscriber, ..Default::default() }).await.unwrap();
    let nats = &pair.stack.nats;
    pair.enqueue(&["before"]).await.unwrap();
    pair.until_outbox_empty().await;
    pair.until_recorded().await;
    nats.terminate().await.unwrap();
    nats.save_data("old").unwrap();
    nats.start().await.unwrap();
    pair.relay.until_ready().await;
    for number in 0..20 {
        pair.enqueue(&[&format!("other:{number}")]).await.unwrap();
        pair.until_outbox_empty().await;
    }
    pair.until_recorded().await;
    pair.subscriber.process().kill().unwrap();
    nats.terminate().await.unwrap();
    let consumers =
        find(pair.stack.directory().path(), "data/jetstream/$G/streams/INVALIDATIONS/obs").unwrap();
    let saved = pair.stack.directory().path().join("obs-of-later");
    std::fs::rename(&consumers, &saved).unwrap();
    nats.restore_data("old").unwrap();
    std::fs::remove_dir_all(&consumers).unwrap();
    std::fs::rename(&saved, &consumers).unwrap();
    nats.start().await.unwrap();
    pair.relay.until_ready().await;
    pair
}

fn find(root: &Path, suffix: &str) -> Option<PathBuf> {
    let entries = std::fs::read_dir(root).ok()?.flatten().map(|entry| entry.path());
    entries
        .filter(|path| path.is_dir() && !path.is_symlink())
        .find_map(|path| if path.ends_with(suffix) { Some(path) } else { find(&path, suffix) })
}

#[tokio::test(flavor = "multi_thread")]
async fn a_consumer_that_is_ahead_of_its_stream_costs_one_gap_and_no_message() {
    let pair = consumer_ahead_of_its_stream().await;
    pair.fill("user:1").await.unwrap();
    pair.subscriber.process().start().unwrap();
    pair.until_none("user:1").await;
    pair.fill("next").await.unwrap();
    pair.enqueue(&["next"]).await.unwrap();
    pair.until_none("next").await;
    // Looks follow each other every second.
    pair.fill("user:1").await.unwrap();
    tokio::time::sleep(Duration::from_secs(4)).await;
    pair.subscriber.until_ready().await;
    assert!(pair.is_cached("user:1").await.unwrap(), "{}", pair.subscriber.process().log());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_is_long_again_is_not_taken_for_what_it_was() {
    let pair = consumer_ahead_of_its_stream().await;
    pair.fill("hidden").await.unwrap();
    pair.enqueue(&["hidden"]).await.unwrap();
    pair.until_outbox_empty().await;
    let jetstream = async_nats::jetstream::new(async_nats::connect(pair.stack.nats_url()).await.unwrap());
    let foreign = event::Envelope::encode(&event::Envelope { events: Vec::new() });
    for _ in 0..40 {
        jetstream.publish("invalidation.other", foreign.clone().into()).await.unwrap().await.unwrap();
    }
    pair.subscriber.process().start().unwrap();
    pair.until_none("hidden").await;
    pair.subscriber.until_ready().await;
}
