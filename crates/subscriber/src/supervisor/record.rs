//! The record of how far this cache is: read, brought forward, stored.

use std::collections::BTreeSet;
use std::time::Duration;

use async_nats::jetstream::stream::RawMessageErrorKind;
use cache::Instance;
use service::Report;
use tokio::time::Instant;

use super::{LookError, Memory, Since, Supervisor};
use crate::position::{Position, Seen};
use crate::{broker, durable};

/// How often the claim of the durable is given the current position. Each time costs the cluster of NATS a vote.
const CLAIM_INTERVAL: Duration = Duration::from_mins(1);

impl Supervisor {
    pub(super) async fn load_position(&self) -> Result<Option<Position>, LookError> {
        let record = self.redis.load_position(&self.config.durable).await?;
        Ok(record.and_then(|record| serde_json::from_slice(&record).ok()))
    }

    /// Reads the record at every look. That keeps it from being the least recently used key of an idle cache, and shows
    /// when it was evicted or has gone back in time with its Redis.
    pub(super) async fn reread(
        &self,
        instances: &BTreeSet<Instance>,
        is_watched: bool,
        memory: &mut Memory,
    ) -> Result<(), LookError> {
        let record = self.load_position().await?;
        let Some(position) = &memory.position else {
            memory.position = Some(record.clone().unwrap_or_default());
            memory.stored = record;
            return Ok(());
        };
        let Some(record) = record else {
            if memory.stored.take().is_some() {
                tracing::warn!("Redis has lost the record of how far this cache is; storing it again");
            }
            return Ok(());
        };
        // A Redis that was not there before says itself how old its data is: by the record that came with it. Another
        // subscriber may also have brought it up to date by now.
        if !position.knows(instances, is_watched) {
            memory.stored = Some(record.clone());
            memory.position = Some(record);
            return Ok(());
        }
        // Another subscriber of this cache that looked earlier may have stored its record later, once.
        let is_behind = memory.stored.as_ref().is_some_and(|stored| record.is_behind(stored));
        if is_behind && std::mem::take(&mut memory.is_behind) {
            tracing::warn!(
                "the record of how far this cache is has gone back from {} to {}",
                position.acked_seq,
                record.acked_seq
            );
            memory.stored = Some(record.clone());
            memory.position = Some(record);
            self.suspect(memory, Since::Margin);
        } else {
            memory.is_behind = is_behind;
        }
        Ok(())
    }

    /// Records how far this cache is.
    pub(super) async fn advance(&self, memory: &mut Memory, seen: Seen) -> Result<(), LookError> {
        let Some((stream, _)) = &mut memory.handles else { return Ok(()) };
        let position = memory.position.get_or_insert_default();
        position.stream_created_us = seen.stream_created_us;
        let mut applied = seen.ack_floor.min(seen.last_seq).max(position.acked_seq);
        if let Some(subject) = durable::filter(&self.config) {
            match broker::reach(stream, &subject, seen, applied).await {
                Ok(reach) => applied = reach,
                Err(error) => {
                    tracing::debug!(error = %Report::of(error.as_ref()), "cannot look for the next message of the topic")
                }
            }
        }
        if applied > position.acked_seq || position.acked_until_us == 0 {
            match stream.get_raw_message(applied).await {
                Ok(message) => {
                    position.acked_until_us = message.time.timestamp_micros();
                    position.acked_seq = applied;
                }
                // It has expired; the time of an older one is good enough.
                Err(error) if error.kind() == RawMessageErrorKind::NoMessageFound => {
                    position.acked_seq = applied
                }
                // Sequence and time belong together.
                Err(error) => {
                    tracing::debug!(error = %Report::of(&error), "cannot look at the last message that was applied")
                }
            }
        }
        // While the record is older than it was stored, it is left for the next look.
        if memory.stored.as_ref() != memory.position.as_ref() && !memory.is_behind {
            self.store_position(memory).await?;
        }
        self.keep_claim(memory).await;
        Ok(())
    }

    /// Keeps a copy of the record in the durable, where Redis cannot evict it. An older copy makes a loss be noticed too
    /// early, never too late.
    async fn keep_claim(&self, memory: &mut Memory) {
        let claim = self.current_claim(memory);
        let (Some((stream, _)), Some(info)) = (&memory.handles, &memory.info) else { return };
        let kept = info.claim();
        if kept.as_ref() == Some(&claim) {
            return;
        }
        let is_first = kept.is_none_or(|kept| kept.stream_created_us != claim.stream_created_us);
        if !is_first && memory.claimed.is_some_and(|claimed| claimed.elapsed() < CLAIM_INTERVAL) {
            return;
        }
        memory.claimed = Some(Instant::now());
        if let Err(error) = durable::update(stream, info, &self.config, &claim).await {
            let error = Report::of(error.as_ref());
            tracing::debug!(%error, "cannot write into the durable how far this cache is; trying again later");
        }
    }

    /// A Redis that is full keeps the older record. That makes a replay longer, or a gap be judged once more, and hides
    /// nothing: what the stream still has need not wait. Without any record a later loss could not be noticed.
    async fn store_position(&self, memory: &mut Memory) -> Result<(), LookError> {
        let position = memory.position.clone().unwrap_or_default();
        let record = serde_json::to_vec(&position).expect("plain data always serializes");
        match self.redis.store_position(&self.config.durable, &record).await {
            Ok(()) => {
                memory.stored = Some(position);
                if std::mem::take(&mut memory.is_full) {
                    tracing::info!("Redis stores again how far this cache is");
                }
                Ok(())
            }
            Err(error) if error.is_out_of_memory() => {
                if memory.stored.is_none() {
                    return Err(LookError::Full(error));
                }
                if !std::mem::replace(&mut memory.is_full, true) {
                    tracing::warn!(
                        "Redis is full (maxmemory) and does not store how far this cache is; invalidations go on, updates \
                         become deletes, strict writes fail"
                    );
                }
                Ok(())
            }
            Err(error) => Err(error.into()),
        }
    }
}
