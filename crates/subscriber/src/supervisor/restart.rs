//! A Redis that may have come back with old data.

use std::time::Duration;

use cache::Masters;
use chrono::DateTime;
use metrics::counter;
use service::Component;

use super::{LookError, Memory, Since, Supervisor};
use crate::metrics as names;
use crate::position::{Position, Seen};
use crate::replay::Replay;

/// The shortest replay: clocks differ and acknowledgements are recorded only now and then.
const MIN_REPLAY_MARGIN: Duration = Duration::from_mins(1);

impl Supervisor {
    /// Replays the stream if Redis is not the one it was: it may have come back with values that were invalidated since.
    pub(super) async fn judge_redis(
        &self,
        memory: &mut Memory,
        masters: &Masters,
        is_watched: bool,
        seen: Seen,
        health: &Component,
    ) -> Result<(), LookError> {
        let suspicion = memory.suspicion;
        let is_new = std::mem::take(&mut memory.is_new);
        let position = memory.position.get_or_insert_default();
        if suspicion.is_none() && (is_new || position.knows(&masters.instances, is_watched)) {
            trust(position, masters);
            return Ok(());
        }
        let margin = self.replay_margin().await?;
        let (stream, _) = memory.handles.as_ref().expect("looked at before");
        // By the clock of NATS alone, like the messages.
        let mut reference =
            DateTime::from_timestamp_micros(position.acked_until_us).filter(|_| position.acked_until_us > 0);
        // A record that knows of no message is older than all of them; without a record there is only the consumer.
        if reference.is_none() && position.stream_created_us == 0 {
            reference = stream.get_raw_message(seen.ack_floor).await.ok().map(|message| message.time);
        }
        let since =
            reference.filter(|_| suspicion != Some(Since::Beginning)).map(|reference| reference - margin);
        let (reason, what) = match suspicion {
            None => ("redis", "Redis was restarted or replaced and may have old values"),
            Some(_) => ("suspicion", "this cache may have missed invalidations"),
        };
        tracing::warn!(
            since = since.map_or("the beginning of the stream".to_owned(), |since| since.to_rfc3339()),
            "{what}; replaying the stream"
        );
        counter!(names::REPLAYS, "reason" => reason).increment(1);
        let replay = Replay {
            stream,
            redis: &self.redis,
            topic: self.config.topic.as_ref(),
            max_payload: self.nats.client.server_info().max_payload,
            progress: &|| health.beat(),
        };
        let messages = replay.run(since).await?;
        tracing::warn!(messages, "replayed the stream");
        trust(position, masters);
        memory.suspicion = None;
        Ok(())
    }

    async fn replay_margin(&self) -> Result<Duration, LookError> {
        if let Some(margin) = self.config.replay_margin {
            return Ok(margin);
        }
        let interval = self.redis.longest_snapshot_interval().await?;
        Ok(interval.unwrap_or_default().max(MIN_REPLAY_MARGIN))
    }
}

/// Records that the data of these servers is good. Those that do not answer now may be the ones they were when they do.
fn trust(position: &mut Position, masters: &Masters) {
    match masters.unreachable.is_empty() {
        true => position.trust(&masters.instances),
        false => position.trust_also(&masters.instances),
    }
}
