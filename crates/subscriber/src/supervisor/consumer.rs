//! The durable consumer: found or created, owned, and with the options it should have.

use std::time::Duration;

use async_nats::jetstream::stream::Stream;
use chrono::{DateTime, Utc};
use event::nats::STREAM;
use service::Report;

use super::{LookError, Memory, Since, Supervisor, waiting};
use crate::broker::{self, BrokerError, Look};
use crate::durable::{self, Claim, Info};
use crate::position::{Position, Seen};

/// A new consumer of an empty cache begins so long before the last message: what is loaded while it is made is covered.
const NEW_CACHE_MARGIN: Duration = Duration::from_mins(1);

impl Supervisor {
    pub(super) async fn look_at_stream(
        &self,
        memory: &mut Memory,
        position: &Position,
    ) -> Result<Seen, LookError> {
        if memory.handles.is_none() {
            self.consumer.send_replace(None);
            let stream = broker::stream(&self.nats, &self.jetstream).await?;
            self.find_or_create(memory, stream, position).await?;
        }
        let (stream, _) = memory.handles.as_mut().expect("set above");
        let look = broker::look(&self.jetstream, stream, &self.config.durable).await;
        let mut look = look.map_err(|error| self.stream_error(error))?;
        waiting::show(look.pending);
        if let Some(until) = look.consumer.paused_until.take() {
            return Err(BrokerError::Paused { durable: self.config.durable.clone(), until }.into());
        }
        self.recover(memory, &mut look).await?;
        self.own(memory, &look).await?;
        let mut seen = look.seen;
        seen.holes = self.count_holes(memory, seen, look.deleted).await?;
        let info = self.repair(memory, look.consumer).await?;
        memory.info = Some(info);
        self.look_inside(memory, position, &mut seen).await;
        Ok(seen)
    }

    async fn find_or_create(
        &self,
        memory: &mut Memory,
        stream: Stream,
        position: &Position,
    ) -> Result<(), LookError> {
        let durable = &self.config.durable;
        let found =
            durable::find(&self.jetstream, durable).await.map_err(|error| self.stream_error(error))?;
        if found.is_none() {
            self.create(memory, &stream, position).await?;
        }
        let consumer = stream.get_consumer(durable).await;
        let consumer = consumer.map_err(|error| self.stream_error(error))?;
        memory.handles = Some((stream, consumer));
        Ok(())
    }

    /// A consumer that was lost begins where the last one is known to have been; one of a new stream with everything. A
    /// cache without values needs nothing from before.
    async fn create(
        &self,
        memory: &mut Memory,
        stream: &Stream,
        position: &Position,
    ) -> Result<(), LookError> {
        let state = &stream.cached_info().state;
        let mut since = self.begin(stream, position);
        if memory.stored.is_none() {
            memory.is_new = true;
            if state.last_sequence > 0 && self.redis.has_no_values().await? {
                since =
                    from_micros(state.last_timestamp.timestamp_micros()).map(|last| last - NEW_CACHE_MARGIN);
                tracing::info!("this cache is new and empty: it begins with what is published from now on");
            }
        }
        self.create_at(memory, stream, since, position).await
    }

    fn begin(&self, stream: &Stream, position: &Position) -> Option<DateTime<Utc>> {
        let is_same = position.stream_created_us == stream.cached_info().created.timestamp_micros();
        from_micros(position.acked_until_us).filter(|_| is_same && position.acked_until_us > 0)
    }

    /// Creates the durable for this cache.
    pub(super) async fn create_at(
        &self,
        memory: &mut Memory,
        stream: &Stream,
        since: Option<DateTime<Utc>>,
        position: &Position,
    ) -> Result<(), LookError> {
        let own = self.redis.load_identity(&self.config.durable).await?.or_else(|| memory.identity.clone());
        let own = own.unwrap_or_else(cache::Redis::generate_identity);
        let id = self.keep_identity(memory, &own).await?;
        let claim = Claim::new(&id, &self.config.redis_url.to_string(), position);
        durable::create(stream, &self.config, since, &claim).await?;
        // nats-server below 2.10 lets two caches create it one after the other; the last claim counts.
        tokio::time::sleep(super::ownership::CLAIM_PAUSE).await;
        Ok(())
    }

    /// Changes what differs from the options that the consumer should have. With some of them messages were not delivered,
    /// or not whole: then the stream is applied again.
    async fn repair(&self, memory: &mut Memory, info: Info) -> Result<Info, LookError> {
        let durable = &self.config.durable;
        let differences = info.differences(&self.config);
        if differences.is_empty() || differences == memory.tolerated {
            return Ok(info);
        }
        if !differences.essential.is_empty() {
            let is_running = self.consumer.borrow().is_some();
            self.suspect(memory, if is_running { Since::Margin } else { Since::Beginning });
        }
        let (stream, _) = memory.handles.as_ref().expect("looked at before");
        let claim = self.current_claim(memory);
        let changed = durable::update(stream, &info, &self.config, &claim).await.err();
        let found =
            durable::find(&self.jetstream, durable).await.map_err(|error| self.stream_error(error))?;
        let found = found.ok_or_else(|| BrokerError::Gone { durable: durable.clone() })?;
        let left = found.differences(&self.config);
        if !left.essential.is_empty() {
            self.consumer.send_replace(None);
            return Err(self.mismatch(&left.essential, changed).into());
        }
        if left.is_empty() {
            tracing::warn!(durable, "changed the durable consumer back to what it should be: {differences}");
        } else {
            let cause = changed.map(|error| Report::of(error.as_ref()).to_string()).unwrap_or_default();
            tracing::warn!(durable, cause, "the NATS server does not change the durable consumer: {left}");
        }
        memory.tolerated = left;
        Ok(found)
    }

    pub(super) fn mismatch(&self, differences: &[String], source: Option<async_nats::Error>) -> BrokerError {
        let (durable, difference) = (self.config.durable.clone(), differences.join(", "));
        BrokerError::Mismatch { durable, difference, source }
    }

    pub(super) fn stream_error(&self, error: impl Into<async_nats::Error>) -> LookError {
        LookError::Stream(self.nats.judge(error))
    }

    /// The claim of this cache as it should be now.
    pub(super) fn current_claim(&self, memory: &Memory) -> Claim {
        let position = memory.position.clone().unwrap_or_default();
        let id = memory.identity.as_deref().unwrap_or_default();
        Claim::new(id, &self.config.redis_url.to_string(), &position)
    }

    /// Has the stream applied again, unless nothing in this cache can be stale.
    pub(super) fn suspect(&self, memory: &mut Memory, since: Since) {
        if !memory.is_new {
            memory.suspicion = memory.suspicion.max(Some(since));
        }
    }

    /// A stream that was shorter may be long again, but only NATS that was away comes back with old data.
    async fn look_inside(&self, memory: &mut Memory, position: &Position, seen: &mut Seen) {
        let link = self.nats.link();
        if memory.looked_inside == Some(link) || position.stream_created_us != seen.stream_created_us {
            return;
        }
        let Some((stream, _)) = &memory.handles else { return };
        match broker::is_refilled(stream, position.acked_seq, position.acked_until_us).await {
            Ok(false) => memory.looked_inside = Some(link),
            Ok(true) => seen.is_refilled = true,
            Err(error) => {
                tracing::debug!(error = %Report::of(error.as_ref()), "cannot look into the stream; trying again")
            }
        }
    }

    /// Finds out how far a cache has come whose Redis has no record, or has lost it: by the claim of the durable, or by
    /// the last message that was acknowledged.
    async fn recover(&self, memory: &mut Memory, look: &mut Look) -> Result<(), LookError> {
        let is_known = memory.position.as_ref().is_some_and(|known| known.stream_created_us != 0);
        if is_known || memory.is_new {
            return Ok(());
        }
        let info = &look.consumer;
        if info.consumer.delivered.consumer_sequence == 0 || self.redis.has_no_values().await? {
            memory.is_new = true;
            return Ok(());
        }
        let copy = info.claim().map(|claim| claim.position()).filter(|copy| copy.stream_created_us != 0);
        let position = match copy {
            Some(copy) => Some(copy),
            None => self.position_of_floor(memory, look.seen).await?,
        };
        look.seen.is_unrecorded = position.is_none();
        if memory.halted.is_none() {
            tracing::warn!(
                acked_seq = position.as_ref().map(|position| position.acked_seq),
                "Redis has no record of what this cache has applied of {STREAM}; going by the durable consumer"
            );
        }
        memory.position = position.or(Some(Position::default()));
        Ok(())
    }

    /// nats-server moves the floor over messages that are gone. So it proves something only if its message is there.
    async fn position_of_floor(&self, memory: &Memory, seen: Seen) -> Result<Option<Position>, LookError> {
        let Some((stream, _)) = &memory.handles else { return Ok(None) };
        let found =
            broker::published_at(stream, seen.ack_floor).await.map_err(|error| self.stream_error(error))?;
        Ok(found.map(|acked_until_us| Position {
            stream_created_us: seen.stream_created_us,
            acked_seq: seen.ack_floor,
            acked_until_us,
            ..Position::default()
        }))
    }
}

fn from_micros(microseconds: i64) -> Option<DateTime<Utc>> {
    DateTime::from_timestamp_micros(microseconds)
}
