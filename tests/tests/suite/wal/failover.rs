//! Postgres fails over to a standby, which has everything but the slot.

use std::path::PathBuf;

use devstack::proxy::{FaultProxy, Mode};
use devstack::{Postgres, PostgresOptions, eventually};
use outbox::Event;
use sqlx::PgPool;
use tests::{Daemon, Pair, SETTLED};

use super::{USER_RULES, USERS, captured, fence, relay, until_read};

const BOTH: (&str, &str) = ("RELAY_SOURCE", "outbox,wal");

/// A pair whose database has been taken over by a standby, while its relay could not reach either: `user:1:profile` is
/// stale, and the slot with its change is gone.
struct FailedOver {
    pair: Pair,
    relay: Daemon,
    standby: Postgres,
    /// Connections to the new primary.
    pool: PgPool,
    /// Between the relay and the database.
    _proxy: FaultProxy,
}

impl FailedOver {
    async fn with_policy(policy: &str) -> Self {
        let pair = captured(USERS, USER_RULES, &[BOTH]).await;
        fence(&pair).await;
        let standby = Postgres::start_standby_in(
            pair.stack.directory(),
            &pair.stack.postgres,
            PostgresOptions::default(),
        )
        .await
        .unwrap();
        let proxy = FaultProxy::start(pair.stack.postgres.address()).await.unwrap();
        let url = pair.stack.postgres.url_through(&proxy, "postgres");
        pair.relay.process().terminate().await.unwrap();
        let policy = ("RELAY_GAP_POLICY", policy.to_owned());
        let relay = pair.another_relay(&[("DATABASE_URL", url), policy]).unwrap();
        relay.until_ready().await;
        until_read(&pair).await;

        proxy.set_mode(Mode::Refuse);
        proxy.reset_connections();
        pair.fill("user:1:profile").await.unwrap();
        pair.fill("order:1").await.unwrap();
        super::sql(&pair, "update users set name = 'missed' where id = 1").await;
        eventually(SETTLED, async || {
            let name = standby.query("select name from users where id = 1").await.unwrap();
            if name == [[Some("missed".to_owned())]] { Ok(()) } else { Err(format!("{name:?}")) }
        })
        .await;
        pair.stack.postgres.kill().unwrap();
        // The name of the database points there before it is a primary.
        proxy.set_upstream(standby.address());
        proxy.set_mode(Mode::Pass);
        until_not_ready_because(&relay, "is a standby").await;
        let rules = pair.stack.directory().path().join("rules.toml");
        ask_standby(&pair, &standby, rules).await;
        standby.promote().await.unwrap();
        let pool = PgPool::connect(&standby.url()).await.unwrap();
        Self { pair, relay, standby, pool, _proxy: proxy }
    }

    async fn sql(&self, statement: &str) -> Vec<Vec<Option<String>>> {
        self.standby.query(statement).await.unwrap()
    }

    async fn one(&self, statement: &str) -> String {
        self.sql(statement).await.swap_remove(0).swap_remove(0).unwrap_or_default()
    }

    /// What services enqueue on the new primary arrives.
    async fn assert_outbox_goes_on(&self) {
        self.pair.fill("cart:1").await.unwrap();
        let mut tx = self.pool.begin().await.unwrap();
        let _ = outbox::enqueue(&mut tx, &Event::delete(["cart:1"]).unwrap()).await.unwrap();
        tx.commit().await.unwrap();
        self.pair.until_none("cart:1").await;
    }

    /// What changes on the new primary is captured.
    async fn assert_capture_goes_on(&self) {
        self.relay.until_ready().await;
        for _ in 0..2 {
            self.pair.fill("user:7:profile").await.unwrap();
            self.sql("update users set name = name || '.' where id = 7").await;
            self.pair.until_none("user:7:*").await;
        }
    }
}

async fn until_not_ready_because(relay: &Daemon, text: &str) {
    eventually(SETTLED, async || {
        let (status, body) = relay.get("/readyz").await.map_err(|error| format!("{error:#}"))?;
        if status == 503 && body.contains(text) { Ok(()) } else { Err(format!("{status} {body}")) }
    })
    .await;
}

/// The commands of the operator work on a standby, and say that it is one.
async fn ask_standby(pair: &Pair, standby: &Postgres, rules: PathBuf) {
    let url = standby.url();
    let environment = [("DATABASE_URL", url.as_str()), ("RELAY_RULES", rules.to_str().unwrap())];
    // Newer servers can keep a logical slot on a standby; any slot will do.
    standby.query("select pg_create_physical_replication_slot('outbox_relay')").await.unwrap();
    let (ok, text) = relay(pair, &["doctor"], &environment).await;
    assert!(!ok && text.contains("connect to the primary"), "{text}");
    let (ok, text) = relay(pair, &["slot", "show"], &environment).await;
    assert!(ok && text.contains("nobody reads it"), "{text}");
    standby.query("select pg_drop_replication_slot('outbox_relay')").await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failover_without_the_slot_halts_and_says_that_it_was_one_while_the_outbox_goes_on() {
    let after = FailedOver::with_policy("halt").await;
    until_not_ready_because(&after.relay, "Postgres has failed over to a server without it").await;
    assert_eq!(after.one("select count(*) from pg_replication_slots").await, "0");
    assert!(after.pair.is_cached("user:1:profile").await.unwrap(), "nobody has decided yet");
    after.assert_outbox_goes_on().await;

    let (ok, text) =
        relay(&after.pair, &["slot", "accept-gap"], &[("DATABASE_URL", &after.standby.url())]).await;
    assert!(ok, "{text}");
    after.pair.until_none("user:1:profile").await;
    after.assert_capture_goes_on().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failover_without_the_slot_flushes_what_the_rules_can_name_and_goes_on_if_asked_to() {
    let after = FailedOver::with_policy("flush").await;
    after.pair.until_none("user:*").await;
    assert!(after.pair.is_cached("order:1").await.unwrap());
    after.assert_capture_goes_on().await;
    after.assert_outbox_goes_on().await;
    assert_eq!(after.one("select timeline from outbox.capture").await, "2");
    assert!(after.relay.process().log().contains("failed over"), "{}", after.relay.process().log());
}

/// The old primary may still serve the log when the name of the database points to the new one already. Its transactions
/// mean nothing there.
#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_says_whose_transactions_it_judges() {
    let pair = captured(USERS, USER_RULES, &[]).await;
    let old = &pair.stack.postgres;
    let standby =
        Postgres::start_standby_in(pair.stack.directory(), old, PostgresOptions::default()).await.unwrap();
    standby.promote().await.unwrap();
    for (server, timeline) in [(old, 1), (&standby, 2)] {
        let pool = PgPool::connect(&server.url()).await.unwrap();
        assert_eq!(wal::Snapshot::take(&pool).await.unwrap().timeline(), timeline);
    }
}
