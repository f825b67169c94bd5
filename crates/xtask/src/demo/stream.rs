//! What the stream says of itself.

use std::time::SystemTime;

use anyhow::Context;
use chrono::DateTime;
use devstack::Nats;
use event::nats::STREAM;

/// The last message of the stream.
#[derive(Debug, Clone, Copy)]
pub struct Message {
    /// Its sequence.
    pub seq: u64,
    /// When the server stored it.
    pub stored_at: SystemTime,
}

/// How many messages the stream has ever taken.
pub async fn last_seq(nats: &Nats) -> anyhow::Result<u64> {
    let info = ask(nats, &format!("$JS.API.STREAM.INFO.{STREAM}"), "").await?;
    info["state"]["last_seq"].as_u64().context("the stream has no state")
}

/// Its last message.
pub async fn last_message(nats: &Nats) -> anyhow::Result<Message> {
    let request = serde_json::json!({ "seq": last_seq(nats).await? }).to_string();
    let reply = ask(nats, &format!("$JS.API.STREAM.MSG.GET.{STREAM}"), &request).await?;
    let message = &reply["message"];
    let time = message["time"].as_str().context("the message has no time")?;
    let stored_at = SystemTime::from(DateTime::parse_from_rfc3339(time)?);
    Ok(Message { seq: message["seq"].as_u64().context("the message has no sequence")?, stored_at })
}

async fn ask(nats: &Nats, subject: &str, request: &str) -> anyhow::Result<serde_json::Value> {
    Ok(serde_json::from_str(&nats.request(subject, request).await?)?)
}
