//! Heartbeats: small messages that go through the whole pipe, so that each subscriber knows how old its cache may be.
//!
//! A heartbeat is an envelope without events, with a header that says when it was sent. It is published while claims come
//! to an end, and says nothing of a relay that cannot reach its database.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use async_nats::jetstream::message::PublishMessage;
use chrono::Utc;
use event::Envelope;
use event::nats::{HEARTBEAT_HEADER, HEARTBEAT_SUBJECT};
use service::{Report, Shutdown};

use crate::worker::Shared;

/// Without a claim for this long no heartbeat is sent. A claim may wait for the broker.
const CLAIM_PATIENCE: Duration = Duration::from_secs(15);

/// When a claim last came to an end, with or without events.
#[derive(Debug, Default)]
pub struct LastClaim(AtomicI64);

impl LastClaim {
    /// Notes that a claim came to an end now.
    pub fn note(&self) {
        self.0.store(Utc::now().timestamp_millis(), Ordering::Relaxed);
    }

    fn is_recent(&self) -> bool {
        let age = Utc::now().timestamp_millis().saturating_sub(self.0.load(Ordering::Relaxed));
        u128::from(age.unsigned_abs()) <= CLAIM_PATIENCE.as_millis()
    }
}

/// Sends heartbeats until shutdown is requested. `claims` is whether this relay takes events from the outbox.
pub async fn run(shared: Arc<Shared>, interval: Duration, claims: bool, shutdown: Shutdown) {
    let mut ticks = tokio::time::interval(interval);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    while shutdown.or_done(ticks.tick()).await.is_some() {
        if shared.usable().is_err() || (claims && !shared.last_claim.is_recent()) {
            continue;
        }
        // Others report that nothing can be published.
        if let Err(error) = send(&shared, interval).await {
            tracing::debug!(error = %Report::of(&*error), "cannot send a heartbeat");
        }
    }
}

/// Several relays send one heartbeat an interval: the stream drops a message id that it knows.
async fn send(shared: &Shared, interval: Duration) -> Result<(), async_nats::Error> {
    let now_us = Utc::now().timestamp_micros();
    let turn = now_us / i64::try_from(interval.as_micros()).unwrap_or(i64::MAX).max(1);
    let message = PublishMessage::build()
        .payload(Envelope { events: Vec::new() }.encode().into())
        .message_id(format!("heartbeat-{turn}"))
        .header("Content-Type", Envelope::CONTENT_TYPE)
        .header(HEARTBEAT_HEADER, now_us.to_string().as_str());
    shared.jetstream.send_publish(HEARTBEAT_SUBJECT, message).await?.await?;
    Ok(())
}
