//! NATS comes back without what it had acknowledged: wiped, restored, or filled again.

use std::path::{Path, PathBuf};
use std::time::Duration;

use devstack::{Nats, eventually};
use tests::{Pair, PairOptions, SETTLED};

/// A pair of which each part knows the stream: one event has come through and is recorded everywhere.
async fn acquainted(options: PairOptions) -> Pair {
    let pair = Pair::start_with(options).await.unwrap();
    pair.fill("before").await.unwrap();
    pair.enqueue(&["before"]).await.unwrap();
    pair.until_none("before").await;
    pair.until_recorded().await;
    pair
}

async fn back_up(nats: &Nats) {
    nats.terminate().await.unwrap();
    nats.save_data("backup").unwrap();
    nats.start().await.unwrap();
}

async fn go_back(nats: &Nats) {
    nats.kill().unwrap();
    nats.restore_data("backup").unwrap();
    nats.start().await.unwrap();
}

async fn publish_foreign(pair: &Pair, messages: usize) {
    let jetstream = async_nats::jetstream::new(async_nats::connect(pair.stack.nats_url()).await.unwrap());
    let empty = event::Envelope { events: Vec::new() }.encode();
    for _ in 0..messages {
        jetstream.publish("invalidation.other", empty.clone().into()).await.unwrap().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn stream_wiped_while_the_subscriber_is_away_is_published_again_from_the_retention() {
    let pair = acquainted(PairOptions::default()).await;
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
    let pair = acquainted(PairOptions::default()).await;
    back_up(&pair.stack.nats).await;
    pair.subscriber.until_ready().await;

    // These are published and lost again before the subscriber has read them.
    pair.subscriber.process().kill().unwrap();
    pair.load("backup", |committed| committed >= 200).await.unwrap();
    pair.until_outbox_empty().await;
    go_back(&pair.stack.nats).await;
    pair.subscriber.process().start().unwrap();
    pair.until_none("backup:*").await;
    pair.subscriber.until_ready().await;
}

/// A stream that is wiped after the retention has turned, with the subscriber away.
async fn lose_events_for_good(pair: &Pair) {
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
    let pair = acquainted(options).await;
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
    let pair = acquainted(options).await;
    lose_events_for_good(&pair).await;
    pair.subscriber.process().start().unwrap();
    pair.until_none("user:*").await;
    assert!(pair.is_cached("other:1").await.unwrap());
    pair.subscriber.until_ready().await;
    assert!(pair.subscriber.metric("subscriber_gaps_total").await.unwrap() >= 1.0);
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
    sqlx::raw_sql("lock table outbox.republications in exclusive mode").execute(&mut *lock).await.unwrap();
    pair.relay.process().start().unwrap();
    let ended = "select pg_terminate_backend(pid) from pg_stat_activity
        where wait_event_type = 'Lock' and query like 'delete from outbox.republications%'";
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
    let pair = acquainted(PairOptions::default()).await;
    back_up(&pair.stack.nats).await;
    pair.subscriber.process().kill().unwrap();
    // Each a message of its own.
    for number in 0..20 {
        pair.fill(&format!("lost:{number}")).await.unwrap();
        pair.enqueue(&[&format!("lost:{number}")]).await.unwrap();
        pair.until_outbox_empty().await;
    }
    pair.relay.process().kill().unwrap();
    go_back(&pair.stack.nats).await;
    publish_foreign(&pair, foreign_messages).await;
    pair
}

#[tokio::test(flavor = "multi_thread")]
async fn a_relay_that_retains_nothing_vouches_for_nothing() {
    let relay = vec![("RELAY_RETENTION", "0s".to_owned())];
    let pair = acquainted(PairOptions { relay, ..Default::default() }).await;
    let now = chrono::Utc::now();
    let promised = async || outbox::stream::coverage(&pair.pool, now).await.unwrap().retained_since;
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

/// A pair whose stream, but not its consumer, has come back as it was before twenty messages that were applied.
async fn consumer_ahead_of_its_stream() -> Pair {
    let subscriber = vec![
        ("SUBSCRIBER_GAP_POLICY", "flush".to_owned()),
        ("SUBSCRIBER_FLUSH_PATTERNS", "user:*".to_owned()),
    ];
    let relay = vec![("RELAY_RETENTION", "0s".to_owned())];
    let pair = acquainted(PairOptions { relay, subscriber, ..Default::default() }).await;
    let nats = &pair.stack.nats;
    back_up(nats).await;
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
    nats.restore_data("backup").unwrap();
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
    publish_foreign(&pair, 40).await;
    pair.subscriber.process().start().unwrap();
    pair.until_none("hidden").await;
    pair.subscriber.until_ready().await;
}
