//! Postgres fails over: connections lead to a standby, or the primary has another name.

use devstack::proxy::FaultProxy;
use devstack::{Postgres, PostgresOptions, eventually};
use outbox::Event;
use sqlx::PgPool;
use tests::{Daemon, Pair, SETTLED};

async fn standby_of(pair: &Pair) -> Postgres {
    let primary = &pair.stack.postgres;
    Postgres::start_standby_in(pair.stack.directory(), primary, PostgresOptions::default()).await.unwrap()
}

/// A relay in the place of the pair's own.
async fn replace_relay(pair: &Pair, url: String) -> Daemon {
    pair.relay.process().terminate().await.unwrap();
    pair.another_relay(&[("DATABASE_URL", url)]).unwrap()
}

async fn deliver(pair: &Pair, pool: &PgPool, key: &str) {
    pair.fill(key).await.unwrap();
    let mut tx = pool.begin().await.unwrap();
    let _ = outbox::enqueue(&mut tx, &Event::delete([key]).unwrap()).await.unwrap();
    tx.commit().await.unwrap();
    pair.until_none(key).await;
}

async fn connections_of_relay(server: &Postgres) -> String {
    let count = "select count(*) from pg_stat_activity where application_name = 'relay'";
    server.query(count).await.unwrap()[0][0].clone().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_relay_that_was_led_to_a_standby_gives_its_connections_up_as_soon_as_the_name_leads_to_the_primary()
{
    let pair = Pair::start().await.unwrap();
    let standby = standby_of(&pair).await;
    let proxy = FaultProxy::start(pair.stack.postgres.address()).await.unwrap();
    let relay = replace_relay(&pair, pair.stack.postgres.url_through(&proxy, "postgres")).await;
    relay.until_ready().await;
    deliver(&pair, &pair.pool, "before").await;

    proxy.set_upstream(standby.address());
    proxy.reset_connections();
    relay.until_not_ready_because("is a standby").await;
    let (live, _) = relay.get("/livez").await.unwrap();
    assert_eq!(live, 200);

    // Connections that are open by now stay as they are.
    proxy.set_upstream(pair.stack.postgres.address());
    deliver(&pair, &pair.pool, "after").await;
    relay.until_ready().await;
    assert_eq!(connections_of_relay(&standby).await, "0");
}

#[tokio::test(flavor = "multi_thread")]
async fn of_several_hosts_the_relay_uses_the_primary_and_follows_it() {
    let pair = Pair::start().await.unwrap();
    let standby = standby_of(&pair).await;
    let url = format!(
        "postgres://postgres@{},{}/postgres?target_session_attrs=read-write",
        standby.address(),
        pair.stack.postgres.address()
    );
    let relay = replace_relay(&pair, url.clone()).await;
    relay.until_ready().await;
    deliver(&pair, &pair.pool, "before").await;
    assert_eq!(connections_of_relay(&standby).await, "0");

    let primary = &pair.stack.postgres;
    eventually(SETTLED, async || {
        let lag = "select count(*) from pg_stat_replication where replay_lsn >= pg_current_wal_lsn()";
        primary.query(lag).await.unwrap() == [[Some("1".to_owned())]]
    })
    .await;
    primary.kill().unwrap();
    let why = relay.until_not_ready_because("is a standby").await;
    assert!(why.contains("Connection refused"), "each host says why: {why}");
    standby.promote().await.unwrap();
    let pool = PgPool::connect(&standby.url()).await.unwrap();
    deliver(&pair, &pool, "after").await;
    relay.until_ready().await;
}
