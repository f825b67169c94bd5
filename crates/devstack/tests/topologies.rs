//! Clusters and replicas.

use std::time::Duration;

use devstack::{Nats, RedisCluster, RedisReplicaPair, eventually};

const DEADLINE: Duration = Duration::from_secs(60);

#[tokio::test]
async fn a_nats_cluster_keeps_a_stream_when_its_leader_is_killed() {
    let cluster = Nats::cluster(3).await.unwrap();
    let stream = r#"{"name":"kept","subjects":["kept"],"num_replicas":3}"#;
    cluster.nodes[0].request("$JS.API.STREAM.CREATE.kept", stream).await.unwrap();
    let leader = cluster.stream_leader("kept").await.unwrap();
    cluster.nodes[leader].kill().unwrap();
    let next = eventually(DEADLINE, async || match cluster.stream_leader("kept").await {
        Ok(next) if next != leader => Ok(next),
        other => Err(format!("{other:?}")),
    })
    .await;
    assert_ne!(next, leader);
    cluster.nodes[leader].start().await.unwrap();
    cluster.wait_until_ready().await.unwrap();
}

#[tokio::test]
async fn a_redis_cluster_is_complete_on_every_node() {
    let cluster = RedisCluster::start(3, 1).await.unwrap();
    assert_eq!(cluster.urls().len(), 6);
    for node in &cluster.nodes {
        let info = node.command(&["CLUSTER", "INFO"]).await.unwrap();
        assert!(info.contains("cluster_slots_ok:16384"), "{info}");
        assert!(info.contains("cluster_size:3"), "{info}");
    }
}

#[tokio::test]
async fn a_redis_cluster_promotes_the_replica_of_a_killed_master() {
    let cluster = RedisCluster::start(3, 1).await.unwrap();
    cluster.nodes[0].kill().unwrap();
    eventually(DEADLINE, async || {
        let role = cluster.nodes[3].command(&["ROLE"]).await?;
        anyhow::ensure!(role.starts_with("master"), "{role}");
        Ok(())
    })
    .await;
    cluster.wait_until_ready().await.unwrap();
}

#[tokio::test]
async fn a_promoted_replica_has_the_data_and_takes_writes() {
    let pair = RedisReplicaPair::start().await.unwrap();
    pair.primary.command(&["SET", "key", "value"]).await.unwrap();
    pair.wait_in_sync().await.unwrap();
    pair.primary.kill().unwrap();
    assert!(pair.replica.command(&["SET", "key", "other"]).await.is_err());
    pair.promote_replica().await.unwrap();
    assert_eq!(pair.replica.command(&["GET", "key"]).await.unwrap(), "value");
    pair.replica.command(&["SET", "key", "other"]).await.unwrap();
}

#[tokio::test]
async fn a_sentinel_promotes_the_replica_of_a_killed_primary() {
    let pair = RedisReplicaPair::start_with_sentinel().await.unwrap();
    let sentinel = pair.sentinel.as_ref().unwrap();
    pair.primary.kill().unwrap();
    let replica = format!("127.0.0.1\n{}", pair.replica.address().port());
    eventually(DEADLINE, async || {
        let master = sentinel.command(&["SENTINEL", "GET-MASTER-ADDR-BY-NAME", "mymaster"]).await?;
        anyhow::ensure!(master == replica, "{master}");
        Ok(())
    })
    .await;
    eventually(DEADLINE, || pair.replica.command(&["SET", "key", "value"])).await;
}
