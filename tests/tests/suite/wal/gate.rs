//! A transaction in the log is not yet a transaction that readers see.

use std::time::Duration;

use devstack::eventually;
use sqlx::Connection;
use tests::SETTLED;

use super::{sql, users};

/// A standby that does not exist keeps every commit in the log from becoming visible.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_deleted_while_a_standby_holds_up_the_commit() {
    let pair = users().await;
    pair.fill("user:1:profile").await.unwrap();
    sql(&pair, "alter system set synchronous_standby_names = 'ghost'").await;
    sql(&pair, "select pg_reload_conf()").await;
    let url = pair.stack.postgres_url();
    let writer = tokio::spawn(async move {
        let mut connection = sqlx::PgConnection::connect(&url).await.unwrap();
        sqlx::raw_sql("update users set name = 'new' where id = 1").execute(&mut connection).await
    });
    // It has been decoded, and the commit hangs.
    eventually(SETTLED, async || pair.relay.metric("relay_wal_changes_total").await.unwrap_or(0.0) >= 1.0)
        .await;
    let name = async || -> String {
        sqlx::query_scalar("select name from users where id = 1").fetch_one(&pair.pool).await.unwrap()
    };
    assert_eq!(name().await, "user", "readers still see the old row");
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(
        pair.is_cached("user:1:profile").await.unwrap(),
        "a delete now would let a reader fill the old value"
    );
    // A reader that misses now, for whatever reason, stores what it sees.
    pair.stack.redis.command(&["SET", "user:1:profile", &name().await]).await.unwrap();

    sql(&pair, "alter system reset synchronous_standby_names").await;
    sql(&pair, "select pg_reload_conf()").await;
    writer.await.unwrap().unwrap();
    assert_eq!(name().await, "new");
    pair.until_none("user:1:*").await;
    assert!(pair.relay.metric("relay_wal_gate_wait_seconds_count").await.unwrap() >= 1.0);
}
