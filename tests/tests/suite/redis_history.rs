//! Redis has other data than it had, although its process is the same.

use devstack::{Redis, eventually};
use tests::SETTLED;

use crate::durable::{LONG, RECORD, acquainted, another_redis};

/// Makes `replica` a copy of `source` that stands by itself afterwards.
async fn copy(source: &Redis, replica: &Redis) {
    let (host, port) = (source.address().ip().to_string(), source.address().port().to_string());
    source.command(&["SET", "copied", &port]).await.unwrap();
    replica.command(&["REPLICAOF", &host, &port]).await.unwrap();
    eventually(SETTLED, async || replica.command(&["GET", "copied"]).await.is_ok_and(|text| text == port))
        .await;
    replica.command(&["REPLICAOF", "NO", "ONE"]).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn redis_that_took_the_old_data_of_another_without_a_restart_is_replayed_to() {
    let (scene, _, subscriber) = acquainted(LONG).await;
    let run_id = async || {
        let info = scene.redis.command(&["INFO", "server"]).await.unwrap();
        info.lines().find(|line| line.starts_with("run_id")).unwrap().to_owned()
    };
    let before = run_id().await;
    let old = another_redis(&scene).await;
    scene.fill("stale").await;
    scene.fill("kept").await;
    copy(&scene.redis, &old).await;
    scene.publish("default", "stale").await;
    scene.until_gone("stale").await;
    scene.until_recorded(2).await;
    // The first replica renews the history of its master, which loses nothing.
    assert!(subscriber.metric("subscriber_replays_total").await.unwrap() < 1.0);

    copy(&old, &scene.redis).await;
    scene.until_gone("stale").await;
    assert_eq!(scene.redis.command(&["EXISTS", "kept"]).await.unwrap(), "1");
    assert_eq!(run_id().await, before);
    subscriber.until_ready().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn record_that_goes_back_in_time_shows_that_redis_did() {
    let (scene, _, subscriber) = acquainted(LONG).await;
    let before = scene.redis.command(&["GET", RECORD]).await.unwrap();
    scene.publish("default", "stale").await;
    scene.until_recorded(2).await;
    // As when old data is copied into a Redis that runs.
    scene.fill("stale").await;
    scene.redis.command(&["SET", RECORD, &before]).await.unwrap();
    scene.until_gone("stale").await;
    scene.until_recorded(2).await;
    subscriber.until_ready().await;
}
