//! What the reader of the log says of itself while a server is down: it lives, and names the server.

use devstack::eventually;
use serde_json::Value;
use tests::{Pair, SETTLED};

use super::{fence, sql, users};

/// Waits until a component says, as long as it lives, that it is not ready for a reason with `text`.
async fn until_says(pair: &Pair, component: &str, text: &str) {
    eventually(SETTLED, async || {
        let (_, body) = pair.relay.get("/readyz").await.map_err(|error| format!("{error:#}"))?;
        let health: Value = serde_json::from_str(&body).map_err(|error| error.to_string())?;
        let checks = health["checks"].as_array().cloned().unwrap_or_default();
        let says = |check: &Value| {
            check["name"] == component
                && check["state"] == "not_ready"
                && check["live"] == true
                && check["reason"].as_str().is_some_and(|reason| reason.contains(text))
        };
        if checks.iter().any(says) { Ok(()) } else { Err(body) }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_that_waits_for_nats_is_not_ready_and_says_so_however_much_waits() {
    let pair = users().await;
    fence(&pair).await;
    pair.stack.nats.kill().unwrap();
    pair.fill("user:1:profile").await.unwrap();
    // More than the batches that may be in flight: the last of them waits to be taken in.
    for id in 1..=8 {
        sql(&pair, &format!("update users set name = 'x' where id = {id}")).await;
        until_says(&pair, "wal", "NATS is not connected").await;
    }
    pair.stack.nats.start().await.unwrap();
    pair.until_none("user:1:*").await;
    pair.relay.until_ready().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn while_postgres_is_down_both_parts_of_the_reader_say_so_and_live() {
    let pair = users().await;
    pair.stack.postgres.kill().unwrap();
    until_says(&pair, "slot", "cannot look at slot outbox_relay").await;
    until_says(&pair, "wal", "Postgres").await;
    assert_eq!(pair.relay.get("/livez").await.unwrap().0, 200);
    pair.stack.postgres.start().await.unwrap();
    pair.relay.until_ready().await;
    fence(&pair).await;
}
