//! Heartbeats of the relays: how long ago something came through the whole pipe and reached each Redis server.
//!
//! Whatever stands in the way, a paused consumer, another filter, a worker that is stuck or a server that is frozen, shows
//! in the age of the last heartbeat.

use std::collections::BTreeMap;
use std::time::Duration;

use async_nats::HeaderMap;
use async_nats::jetstream;
use cache::Redis;
use chrono::Utc;
use event::nats::{HEARTBEAT_HEADER, HEARTBEAT_SUBJECT, STREAM};
use metrics::gauge;
use service::{Component, Shutdown};
use tokio::sync::watch;

use crate::metrics as names;

/// How often the age is judged.
const INTERVAL: Duration = Duration::from_secs(1);

/// Time for asking the stream about its newest heartbeat.
const ASK_PATIENCE: Duration = Duration::from_secs(5);

/// Reads from the headers of a message when it was sent, if it is a heartbeat: microseconds since the Unix epoch.
#[must_use]
pub fn sent_us(headers: Option<&HeaderMap>) -> Option<i64> {
    headers?.get(HEARTBEAT_HEADER)?.as_str().parse().ok()
}

/// Where workers leave the newest heartbeat that they have applied.
#[derive(Debug, Clone)]
pub struct Heartbeats(watch::Sender<i64>);

impl Heartbeats {
    /// Nothing has come yet.
    #[must_use]
    pub fn new() -> Self {
        Self(watch::Sender::new(0))
    }

    /// Notes when the newest heartbeat of a batch was sent, once the batch is applied.
    pub fn applied(&self, sent_us: Option<i64>) {
        let Some(sent_us) = sent_us else { return };
        self.0.send_if_modified(|newest| {
            let is_newer = sent_us > *newest;
            *newest = sent_us.max(*newest);
            is_newer
        });
    }
}

impl Default for Heartbeats {
    fn default() -> Self {
        Self::new()
    }
}

/// Judges the age of heartbeats.
#[derive(Debug)]
pub struct Pulse {
    /// What workers have applied.
    pub heartbeats: Heartbeats,
    /// The cache, of which every server must have answered since.
    pub redis: Redis,
    /// JetStream, to ask if there are heartbeats at all.
    pub jetstream: jetstream::Context,
    /// Age from which on the subscriber is not ready.
    pub limit: Duration,
}

/// Heartbeats at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Ages {
    /// Age of the last heartbeat that reached each Redis server, by name.
    servers: BTreeMap<String, Duration>,
    /// Age of the last heartbeat that workers have applied, or of this process while none has come.
    applied: Duration,
}

/// Judgement of the ages.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    /// Heartbeats come through.
    Young,
    /// They do not come out of the stream.
    NotApplied(Duration),
    /// They do not reach this Redis server.
    NotAnswered(String, Duration),
}

fn judge(ages: &Ages, limit: Duration) -> Verdict {
    if ages.applied > limit {
        return Verdict::NotApplied(ages.applied);
    }
    match ages.servers.iter().max_by_key(|(_, age)| **age) {
        Some((server, age)) if *age > limit => Verdict::NotAnswered(server.clone(), *age),
        _ => Verdict::Young,
    }
}

impl Pulse {
    /// Watches until shutdown is requested.
    pub async fn run(self, health: Component, shutdown: Shutdown) {
        let started_us = Utc::now().timestamp_micros();
        let mut applied = self.heartbeats.0.subscribe();
        let mut reached = BTreeMap::new();
        let mut ticks = tokio::time::interval(INTERVAL);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        health.ready();
        while shutdown.or_done(ticks.tick()).await.is_some() {
            let newest_us = *applied.borrow_and_update();
            if newest_us > 0 {
                self.reach(newest_us, &mut reached).await;
            }
            let ages = Ages {
                servers: reached.iter().map(|(name, sent_us)| (String::clone(name), age(*sent_us))).collect(),
                applied: age(if newest_us > 0 { newest_us } else { started_us }),
            };
            show(&ages);
            match judge(&ages, self.limit) {
                Verdict::Young => health.ready(),
                Verdict::NotApplied(age) => {
                    let is_late = self.not_applied(age, &health).await;
                    if is_late && reached.is_empty() {
                        self.reach(started_us, &mut reached).await;
                    }
                }
                Verdict::NotAnswered(server, age) => health.not_ready(format!(
                    "Redis server {server} has answered no heartbeat for {} s; invalidations of its keys wait",
                    age.as_secs()
                )),
            }
        }
    }

    /// Asks each Redis server for a sign of life: one that gives it has, or could have, what came before the heartbeat. A
    /// server that does not belong to the cache any more is forgotten.
    async fn reach(&self, sent_us: i64, reached: &mut BTreeMap<String, i64>) {
        let Ok(answers) = self.redis.ping_masters().await else { return };
        for gone in reached.keys().filter(|known| !answers.iter().any(|(name, _)| name == *known)) {
            gauge!(names::HEARTBEAT_AGE, "server" => gone.clone()).set(0.0);
        }
        reached.retain(|known, _| answers.iter().any(|(name, _)| name == known));
        for (name, answered) in answers {
            let last = reached.entry(name).or_insert(sent_us);
            *last = if answered { sent_us } else { *last };
        }
    }

    /// Without a relay that sends heartbeats nothing is missing here: it may be away, or older than heartbeats, or there may
    /// be none beside Debezium.
    async fn not_applied(&self, age: Duration, health: &Component) -> bool {
        let newest = self.newest_in_stream().await.filter(|newest| *newest <= self.limit);
        match newest {
            Some(newest) => health.not_ready(format!(
                "no heartbeat was applied for {} s, and stream {STREAM} holds one that is {} s old: Redis does not answer, or \
                 the durable consumer was paused or changed",
                age.as_secs(),
                newest.as_secs()
            )),
            None => health.ready(),
        }
        newest.is_some()
    }

    async fn newest_in_stream(&self) -> Option<Duration> {
        let asking = async {
            let stream = self.jetstream.get_stream_no_info(STREAM).await.ok()?;
            stream.get_last_raw_message_by_subject(HEARTBEAT_SUBJECT).await.ok()
        };
        let message = tokio::time::timeout(ASK_PATIENCE, asking).await.ok()??;
        sent_us(Some(&message.headers)).map(age)
    }
}

/// Without a heartbeat there is no age: a cache that has no relay is no reason for an alarm.
fn show(ages: &Ages) {
    for (server, age) in &ages.servers {
        gauge!(names::HEARTBEAT_AGE, "server" => server.clone()).set(age.as_secs_f64());
    }
}

fn age(sent_us: i64) -> Duration {
    let microseconds = Utc::now().timestamp_micros().saturating_sub(sent_us).max(0);
    Duration::from_micros(microseconds.cast_unsigned())
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(30);

    fn ages(applied: u64, servers: &[(&str, u64)]) -> Ages {
        let servers = servers.iter().map(|(name, age)| ((*name).to_owned(), Duration::from_secs(*age)));
        Ages { servers: servers.collect(), applied: Duration::from_secs(applied) }
    }

    #[test]
    fn the_oldest_heartbeat_decides() {
        let seconds = Duration::from_secs;
        for (ages, expected) in [
            (ages(1, &[("a", 1), ("b", 2)]), Verdict::Young),
            (ages(30, &[("a", 30)]), Verdict::Young),
            (ages(31, &[("a", 31), ("b", 90)]), Verdict::NotApplied(seconds(31))),
            (ages(1, &[("a", 1), ("b", 31)]), Verdict::NotAnswered("b".to_owned(), seconds(31))),
            (ages(31, &[]), Verdict::NotApplied(seconds(31))),
            (ages(1, &[]), Verdict::Young),
        ] {
            assert_eq!(judge(&ages, LIMIT), expected);
        }
    }

    #[test]
    fn only_a_header_with_a_time_makes_a_heartbeat() {
        let mut headers = HeaderMap::new();
        assert_eq!(sent_us(None).or(sent_us(Some(&headers))), None);
        headers.insert(HEARTBEAT_HEADER, "soon");
        assert_eq!(sent_us(Some(&headers)), None);
        headers.insert(HEARTBEAT_HEADER, "17");
        assert_eq!(sent_us(Some(&headers)), Some(17));
    }
}
