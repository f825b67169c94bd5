//! What the stream says of itself.

use std::time::SystemTime;

use anyhow::{Context, ensure};
use chrono::DateTime;
use devstack::Nats;
use event::Topic;
use event::nats::STREAM;

/// The last message of the stream.
#[derive(Debug, Clone, Copy)]
pub struct Message {
    /// Its sequence.
    pub seq: u64,
    /// When the server stored it.
    pub stored_at: SystemTime,
}

/// Counts the messages with events. Heartbeats have a subject of their own.
pub async fn messages(nats: &Nats) -> anyhow::Result<u64> {
    let subject = event::nats::subject(&Topic::default());
    let filter = serde_json::json!({ "subjects_filter": subject }).to_string();
    let info = ask(nats, &format!("$JS.API.STREAM.INFO.{STREAM}"), &filter).await?;
    ensure!(info["state"].is_object(), "the stream has no state");
    Ok(info["state"]["subjects"][&subject].as_u64().unwrap_or_default())
}

/// Its last message with events.
pub async fn last_message(nats: &Nats) -> anyhow::Result<Message> {
    let subject = event::nats::subject(&Topic::default());
    let request = serde_json::json!({ "last_by_subj": subject }).to_string();
    let reply = ask(nats, &format!("$JS.API.STREAM.MSG.GET.{STREAM}"), &request).await?;
    let message = &reply["message"];
    let time = message["time"].as_str().context("the message has no time")?;
    let stored_at = SystemTime::from(DateTime::parse_from_rfc3339(time)?);
    Ok(Message { seq: message["seq"].as_u64().context("the message has no sequence")?, stored_at })
}

async fn ask(nats: &Nats, subject: &str, request: &str) -> anyhow::Result<serde_json::Value> {
    Ok(serde_json::from_str(&nats.request(subject, request).await?)?)
}
