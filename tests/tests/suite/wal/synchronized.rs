//! Postgres fails over to a standby that has a copy of the slot.

use devstack::proxy::{FaultProxy, Mode};
use devstack::{Postgres, PostgresOptions, eventually};
use tests::{Daemon, Pair, SETTLED};

use super::{USER_RULES, USERS, captured, fence, is_since, sql, until_read};

/// Starts a standby that keeps copies of logical slots, as the README says to set it up.
async fn standby_with_slots(pair: &Pair) -> Postgres {
    sql(pair, "select pg_create_physical_replication_slot('standby')").await;
    let settings = [
        ("primary_slot_name", "standby"),
        ("hot_standby_feedback", "on"),
        ("sync_replication_slots", "on"),
        ("wal_receiver_status_interval", "1s"),
    ];
    let settings = settings.map(|(name, value)| (name.to_owned(), value.to_owned())).to_vec();
    let options = PostgresOptions { settings, ..PostgresOptions::default() };
    let primary = &pair.stack.postgres;
    let standby = Postgres::start_standby_in(pair.stack.directory(), primary, options).await.unwrap();
    let (host, port) = (primary.address().ip(), primary.address().port());
    let primary = format!("host={host} port={port} user=postgres dbname=postgres");
    standby.query(&format!("alter system set primary_conninfo = '{primary}'")).await.unwrap();
    standby.query("select pg_reload_conf()").await.unwrap();
    sql(pair, "alter system set synchronized_standby_slots = 'standby'").await;
    sql(pair, "select pg_reload_conf()").await;
    standby
}

async fn until_true(server: &Postgres, query: &str) {
    eventually(SETTLED, async || {
        let rows = server.query(query).await.map_err(|error| format!("{error:#}"))?;
        if rows == [[Some("t".to_owned())]] { Ok(()) } else { Err(format!("{query}: {rows:?}")) }
    })
    .await;
}

/// A relay that reaches its database through a proxy.
async fn relay_through(pair: &Pair, proxy: &FaultProxy) -> Daemon {
    pair.relay.process().terminate().await.unwrap();
    let url = pair.stack.postgres.url_through(proxy, "postgres");
    let relay = pair.another_relay(&[("DATABASE_URL", url)]).unwrap();
    relay.until_ready().await;
    until_read(pair).await;
    relay
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failover_to_a_standby_with_a_copy_of_the_slot_loses_nothing() {
    let pair = captured(USERS, USER_RULES, &[]).await;
    fence(&pair).await;
    if !is_since(&pair, 170_000, "logical slots on standbys").await {
        return;
    }
    let standby = standby_with_slots(&pair).await;
    let proxy = FaultProxy::start(pair.stack.postgres.address()).await.unwrap();
    let relay = relay_through(&pair, &proxy).await;
    fence(&pair).await;
    let has_copy =
        "select exists (select from pg_replication_slots where slot_name = 'outbox_relay' and synced
        and not temporary and invalidation_reason is null)";
    until_true(&standby, has_copy).await;
    let (_, doctor) = super::relay(&pair, &["doctor"], &[]).await;
    assert!(doctor.contains("ok  failover"), "{doctor}");

    proxy.set_mode(Mode::Refuse);
    proxy.reset_connections();
    pair.fill("user:1:profile").await.unwrap();
    sql(&pair, "update users set name = 'unread' where id = 1").await;
    until_true(&standby, "select name = 'unread' from users where id = 1").await;
    pair.stack.postgres.kill().unwrap();
    proxy.set_upstream(standby.address());
    standby.promote().await.unwrap();
    proxy.set_mode(Mode::Pass);

    pair.until_none("user:1:profile").await;
    relay.until_ready().await;
    pair.fill("user:7:profile").await.unwrap();
    standby.query("update users set name = 'after' where id = 7").await.unwrap();
    pair.until_none("user:7:profile").await;
    until_true(&standby, "select timeline = 2 from outbox.capture").await;
    until_true(&standby, "select failover from pg_replication_slots where slot_name = 'outbox_relay'").await;
    assert!(relay.metric("relay_wal_gaps_total").await.unwrap_or_default() < 0.5);
}
