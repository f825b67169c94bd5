//! Connecting, losing the connection, and what servers say about themselves.

use std::time::Duration;

use cache::{Redis, RedisConfig, RedisError, RedisTls};
use devstack::proxy::{FaultProxy, Mode};
use devstack::{RedisCluster, RedisOptions, RedisReplicaPair, eventually};

use crate::support::{Bed, SOON, connect, key};

fn config(url: &str) -> RedisConfig {
    RedisConfig { url: url.to_owned(), ..RedisConfig::default() }
}

#[tokio::test]
async fn a_server_that_is_down_is_no_error_until_it_is_needed() {
    let bed = Bed::new().await;
    bed.server.terminate().await.unwrap();
    let redis = connect(&bed.server.url());
    assert!(matches!(redis.ping().await.unwrap_err(), RedisError::Unavailable(_)));
    bed.server.start().await.unwrap();
    eventually(SOON, async || redis.ping().await).await;
}

#[tokio::test]
async fn connections_are_replaced_after_a_restart_and_the_restart_is_noticed() {
    let bed = Bed::new().await;
    let before = bed.redis.instances().await.unwrap();
    assert_eq!(bed.redis.instances().await.unwrap(), before);
    for _ in 0..8 {
        bed.redis.ping().await.unwrap();
    }
    bed.server.restart().await.unwrap();
    let after = eventually(SOON, async || bed.redis.instances().await).await;
    assert_eq!(after.len(), 1);
    assert_ne!(before, after);
}

#[tokio::test]
async fn a_request_without_an_answer_fails_after_the_configured_time_and_can_be_retried() {
    let bed = Bed::new().await;
    let proxy = FaultProxy::start(bed.server.address()).await.unwrap();
    let url = bed.server.url_through(&proxy);
    let response_timeout = Duration::from_millis(100);
    let redis = Redis::new(RedisConfig { response_timeout, ..config(&url) }).unwrap();
    redis.ping().await.unwrap();
    proxy.set_mode(Mode::DropToClient);
    for _ in 0..8 {
        assert!(redis.invalidate(&[key("k")]).await.unwrap_err().is_retryable());
    }
    proxy.set_mode(Mode::Pass);
    eventually(SOON, async || redis.invalidate(&[key("k")]).await).await;
}

#[tokio::test]
async fn a_reply_lost_after_the_delete_was_carried_out_makes_the_batch_fail_and_repeating_it_succeeds() {
    let bed = Bed::new().await;
    let proxy = FaultProxy::start(bed.server.address()).await.unwrap();
    let redis = connect(&bed.server.url_through(&proxy));
    for _ in 0..4 {
        redis.ping().await.unwrap();
    }
    bed.raw(&["SET", "k", "v"]).await;
    proxy.set_mode(Mode::DropReplyOnce);
    assert!(redis.invalidate(&[key("k")]).await.unwrap_err().is_retryable());
    eventually(SOON, async || redis.invalidate(&[key("k")]).await).await;
    assert!(!bed.exists("k").await);
}

#[tokio::test]
async fn missing_and_wrong_credentials_and_missing_rights_are_refusals_that_name_themselves() {
    let bed = Bed::new().await;
    bed.raw(&["ACL", "SETUSER", "writer", "on", ">secret", "~*", "+@all"]).await;
    bed.raw(&["ACL", "SETUSER", "reader", "on", ">secret", "~*", "+get", "+ping"]).await;
    let url = |user: &str| bed.server.url().replace("redis://", &format!("redis://{user}@"));
    connect(&url("writer:secret")).ping().await.unwrap();
    let refused = |error: RedisError| match error {
        RedisError::Refused { code, .. } => code,
        other => panic!("{other:?}"),
    };
    assert_eq!(refused(connect(&url("writer:wrong")).ping().await.unwrap_err()), "WRONGPASS");
    let reader = connect(&url("reader:secret"));
    reader.ping().await.unwrap();
    let error = reader.invalidate(&[key("k")]).await.unwrap_err();
    assert!(error.to_string().starts_with("redis refuses access (NOPERM): NOPERM "), "{error}");
    assert!(!error.is_retryable());
    bed.raw(&["ACL", "SETUSER", "default", "resetpass", ">secret"]).await;
    assert_eq!(refused(connect(&bed.server.url()).ping().await.unwrap_err()), "NOAUTH");
}

#[tokio::test]
async fn a_server_that_may_evict_marks_is_reported_with_what_to_set() {
    let bed = Bed::new().await;
    for safe in ["noeviction", "volatile-lru", "volatile-ttl"] {
        bed.raw(&["CONFIG", "SET", "maxmemory-policy", safe]).await;
        assert_eq!(bed.redis.eviction_policy().await.unwrap().as_str(), safe);
    }
    bed.raw(&["CONFIG", "SET", "maxmemory-policy", "allkeys-lru"]).await;
    let error = bed.redis.eviction_policy().await.unwrap_err();
    assert!(matches!(&error, RedisError::MarksEvictable { policy } if policy == "allkeys-lru"));
    assert!(error.to_string().contains("set maxmemory-policy to noeviction or to a volatile-* policy"));
}

#[tokio::test]
async fn the_longest_snapshot_interval_is_told_unless_snapshots_are_off_or_config_is_forbidden() {
    let bed = Bed::new().await;
    assert_eq!(bed.redis.longest_snapshot_interval().await.unwrap(), None);
    bed.raw(&["CONFIG", "SET", "save", "900 1 3600 7 60 10000"]).await;
    let hour = Duration::from_secs(3_600);
    assert_eq!(bed.redis.longest_snapshot_interval().await.unwrap(), Some(hour));
    bed.raw(&["ACL", "SETUSER", "app", "on", ">secret", "~*", "+@all", "-config"]).await;
    let app = connect(&bed.server.url().replace("redis://", "redis://app:secret@"));
    assert_eq!(app.longest_snapshot_interval().await.unwrap(), None);
}

#[tokio::test]
async fn after_a_failover_the_sentinels_are_asked_again() {
    let pair = RedisReplicaPair::start_with_sentinel().await.unwrap();
    let sentinel = pair.sentinel.as_ref().unwrap().address();
    let redis = connect(&format!("redis+sentinel://{sentinel}/{}", RedisReplicaPair::MASTER_NAME));
    eventually(SOON, async || redis.store_position("redis", b"before").await).await;
    let before = redis.instances().await.unwrap();
    pair.wait_in_sync().await.unwrap();
    pair.primary.kill().unwrap();
    eventually(SOON, async || redis.store_position("redis", b"after").await).await;
    let after = eventually(SOON, async || redis.instances().await).await;
    assert_ne!(before, after);
    assert_eq!(pair.replica.command(&["GET", "\u{1f}position:redis"]).await.unwrap(), "after");
}

#[tokio::test]
async fn a_master_that_has_become_a_replica_is_left() {
    let pair = RedisReplicaPair::start().await.unwrap();
    // As a name that points to another server after a failover.
    let name = FaultProxy::start(pair.primary.address()).await.unwrap();
    let redis = connect(&pair.primary.url_through(&name));
    for _ in 0..4 {
        redis.invalidate(&[key("k")]).await.unwrap();
    }
    pair.promote_replica().await.unwrap();
    let port = pair.replica.address().port().to_string();
    pair.primary.command(&["REPLICAOF", "127.0.0.1", &port]).await.unwrap();
    name.set_upstream(pair.replica.address());
    assert!(redis.invalidate(&[key("k")]).await.unwrap_err().is_retryable());
    // All connections are left at once, not each after a failure of its own.
    for _ in 0..8 {
        redis.invalidate(&[key("k")]).await.unwrap();
    }
}

#[tokio::test]
async fn a_replica_is_not_taken_for_the_cache() {
    let pair = RedisReplicaPair::start().await.unwrap();
    let redis = connect(&pair.replica.url());
    assert!(redis.instances().await.unwrap_err().is_retryable());
    assert!(redis.invalidate(&[key("k")]).await.unwrap_err().is_retryable());
}

#[test]
fn urls_that_cannot_work_are_refused_without_showing_the_password() {
    for url in [
        "",
        "localhost:6379",
        "http://user:hunter2@host",
        "redis://user:hunter2@host/database",
        "redis://user:hunter2@host:port",
        "redis://user:hunt/er2@host",
        "rediss://user:hunter2@host/#insecure",
        "redis+cluster://user:hunter2@host:1,host:2/3",
        "redis+sentinel://user:hunter2@host:26379",
        "redis+sentinel://user:hunter2@host:26379/master/database",
    ] {
        let error = Redis::new(config(url)).unwrap_err();
        assert!(matches!(error, RedisError::Config(_)), "{url}");
        assert!(!error.is_retryable());
        assert!(!format!("{error} {error:?}").contains("hunt"), "{error}");
    }
}

#[test]
fn urls_of_all_forms_are_accepted_and_debug_output_hides_the_password() {
    for url in [
        "redis://127.0.0.1",
        "redis://user:secret@host:6380/2",
        "rediss://:secret@host",
        "redis+unix:///run/redis.sock?pass=secret",
        "redis+cluster://user:secret@a:7000,b:7001",
        "rediss+cluster://a:7000",
        "redis+sentinel://user:secret@a:26379,b:26379/mymaster/3",
    ] {
        let redis = Redis::new(config(url)).unwrap_or_else(|error| panic!("{url}: {error}"));
        let shown = format!("{redis:?} {:?}", config(url));
        assert!(!shown.contains("secret"), "{shown}");
    }
}

#[test]
fn tls_files_need_a_tls_url_and_must_be_readable_and_complete() {
    let with = |url: &str, tls: RedisTls| {
        Redis::new(RedisConfig { tls: Some(tls), ..config(url) }).unwrap_err().to_string()
    };
    let missing = RedisTls { ca_file: Some("/no/such/ca.pem".into()), ..RedisTls::default() };
    assert!(with("redis://host", missing.clone()).contains("does not start with rediss"));
    assert!(with("rediss://host", missing).contains("/no/such/ca.pem"));
    let half = RedisTls { client_cert_file: Some("cert.pem".into()), ..RedisTls::default() };
    assert!(with("rediss://host", half).contains("belong together"));
}

#[tokio::test]
async fn a_node_of_a_cluster_reached_as_if_it_were_alone_is_an_error_that_says_so() {
    let cluster = RedisCluster::start(2, 0).await.unwrap();
    for node in &cluster.nodes {
        let redis = connect(&node.url());
        for keys in [vec![key("a"), key("b")], vec![key("a")], vec![key("b")]] {
            match redis.invalidate(&keys).await {
                Err(RedisError::Config(reason)) => assert!(reason.contains("redis+cluster://"), "{reason}"),
                Ok(_) | Err(_) if keys.len() > 1 => panic!("two slots at once must not work"),
                outcome => drop(outcome.unwrap()),
            }
        }
    }
}

fn certificate(name: &str) -> std::path::PathBuf {
    std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/tls").join(name)
}

#[tokio::test]
async fn tls_trusts_the_given_authority_and_shows_the_given_certificate() {
    let port = devstack::Port::reserve().unwrap();
    let configuration = format!(
        "tls-port {}\ntls-ca-cert-file {}\ntls-cert-file {}\ntls-key-file {}\ntls-auth-clients yes\n",
        port.number(),
        certificate("ca.pem").display(),
        certificate("server.pem").display(),
        certificate("server.key").display(),
    );
    let url = format!("rediss://127.0.0.1:{}", port.number());
    let server =
        devstack::Redis::start_alone(RedisOptions { configuration, ..RedisOptions::default() }).await;
    let _server = match server {
        Err(error) if format!("{error:#}").contains("TLS") || format!("{error:#}").contains("tls-") => {
            eprintln!("this redis-server is built without TLS: only the refusal is tested");
            Redis::new(config(&url)).unwrap().ping().await.unwrap_err();
            return;
        }
        server => server.unwrap(),
    };
    let with = |tls| Redis::new(RedisConfig { tls, ..config(&url) }).unwrap();
    let full = RedisTls {
        ca_file: Some(certificate("ca.pem")),
        client_cert_file: Some(certificate("client.pem")),
        client_key_file: Some(certificate("client.key")),
    };
    with(Some(full.clone())).ping().await.unwrap();
    let anonymous = RedisTls { client_cert_file: None, client_key_file: None, ..full.clone() };
    with(Some(anonymous)).ping().await.unwrap_err();
    with(None).ping().await.unwrap_err();
    with(Some(RedisTls { ca_file: None, ..full })).ping().await.unwrap_err();
}
