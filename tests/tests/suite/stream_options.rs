//! The options of the stream, and the database it belongs to, are looked at while the relay runs.

use async_nats::jetstream;
use devstack::{Nats, NatsOptions, eventually};
use serde_json::{Value, json};
use tests::{Pair, SETTLED};

async fn options(nats: &Nats) -> Value {
    let answer = nats.request("$JS.API.STREAM.INFO.INVALIDATIONS", "").await.unwrap();
    serde_json::from_str::<Value>(&answer).unwrap()["config"].clone()
}

/// Edits the stream as an operator does.
async fn edit(nats: &Nats, changes: Value) {
    let mut options = options(nats).await;
    for (name, value) in changes.as_object().unwrap() {
        options[name] = value.clone();
    }
    let answer = nats.request("$JS.API.STREAM.UPDATE.INVALIDATIONS", &options.to_string()).await.unwrap();
    assert!(!answer.contains("error"), "{answer}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_limit_for_messages_that_is_too_small_holds_events_back_instead_of_setting_them_aside() {
    let pair = Pair::start().await.unwrap();
    edit(&pair.stack.nats, json!({ "max_msg_size": 1024 })).await;
    pair.relay.until_not_ready_because("max_msg_size is 1024").await;
    pair.fill("held").await.unwrap();
    pair.enqueue(&["held"]).await.unwrap();
    edit(&pair.stack.nats, json!({ "max_msg_size": -1 })).await;
    pair.until_none("held").await;
    pair.relay.until_ready().await;
    assert!(pair.relay.metric("relay_dead_letters_total").await.unwrap() < 1.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_accepts_small_messages_only_is_refused() {
    let pair = Pair::start().await.unwrap();
    let small = NatsOptions { max_payload: Some(1024), ..Default::default() };
    let small = Nats::start_in(pair.stack.directory(), small).await.unwrap();
    let relay = pair.another_relay(&[("NATS_URL", small.url())]).unwrap();
    eventually(SETTLED, async || relay.process().log().contains("set max_payload to at least")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_option_that_could_lose_events_is_said_while_the_relay_runs() {
    let pair = Pair::start().await.unwrap();
    let minute = 60_000_000_000_i64;
    edit(&pair.stack.nats, json!({ "max_age": minute, "duplicate_window": minute })).await;
    eventually(SETTLED, async || match pair.relay.get("/readyz").await {
        Ok((200, body)) if body.contains("RELAY_STREAM_MAX_AGE") => Ok(()),
        other => Err(format!("{other:?}")),
    })
    .await;
    assert!(pair.relay.metric("relay_stream_risks").await.unwrap() > 0.0);
    assert_eq!(pair.relay.process().log().matches("it keeps messages for 60s").count(), 1);
    edit(&pair.stack.nats, json!({ "max_age": 24 * 60 * minute })).await;
    eventually(SETTLED, async || pair.relay.metric("relay_stream_risks").await.unwrap() < 1.0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_was_sealed_is_not_usable() {
    let pair = Pair::start().await.unwrap();
    edit(&pair.stack.nats, json!({ "sealed": true })).await;
    pair.relay.until_not_ready_because("it is sealed").await;
    let jetstream = jetstream::new(async_nats::connect(pair.stack.nats_url()).await.unwrap());
    jetstream.delete_stream("INVALIDATIONS").await.unwrap();
    pair.fill("next").await.unwrap();
    pair.enqueue(&["next"]).await.unwrap();
    pair.until_none("next").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_relay_of_another_database_is_refused_and_a_released_stream_is_taken_again() {
    let pair = Pair::start().await.unwrap();
    let url = pair.stack.create_database("second").await.unwrap();
    outbox::migrate(&sqlx::PgPool::connect(&url).await.unwrap()).await.unwrap();
    let stranger = pair.another_relay(&[("DATABASE_URL", url)]).unwrap();
    eventually(SETTLED, async || stranger.process().log().contains("belongs to the database")).await;
    pair.fill("own").await.unwrap();
    pair.enqueue(&["own"]).await.unwrap();
    pair.until_none("own").await;

    // The description of an older version names no database.
    let owned = options(&pair.stack.nats).await["description"].clone();
    edit(&pair.stack.nats, json!({ "description": "Cache invalidations of committed transactions" })).await;
    eventually(SETTLED, async || options(&pair.stack.nats).await["description"] == owned).await;
    edit(&pair.stack.nats, json!({ "description": owned.as_str().unwrap().replace("/", "/9") })).await;
    pair.relay.until_not_ready_because("belongs to the database").await;
}
