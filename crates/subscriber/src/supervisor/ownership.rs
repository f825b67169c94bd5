//! The cache that the durable consumer belongs to.
//!
//! Two caches with the same durable would each miss the events that the other one takes. So the durable names its cache by
//! an id that the cache's own Redis keeps as well.

use std::time::Duration;

use tokio::time::Instant;

use super::{LookError, Memory, Since, Supervisor};
use crate::broker::Look;
use crate::durable::{self, Claim};

/// How long a Redis without an id is watched before it takes over the durable of another. A subscriber of the other cache
/// shows itself meanwhile, and one whose own Redis lost the id gives it back.
const DOUBT: Duration = Duration::from_secs(5);

/// After so long a claim counts if nobody has made another.
pub(super) const CLAIM_PAUSE: Duration = Duration::from_millis(250);

/// The durable is used by another cache, or may be.
#[derive(Debug, thiserror::Error)]
pub(super) enum OwnershipError {
    #[error(
        "durable consumer {durable} belongs to another cache, {theirs} (id {their_id}); this cache is {ours} (id {our_id}), \
         and two caches with one durable would each miss events: give this cache another SUBSCRIBER_DURABLE, or, if it \
         replaces the other one, stop the subscribers there and delete the durable: nats consumer rm INVALIDATIONS {durable}"
    )]
    Foreign { durable: String, theirs: String, their_id: String, ours: String, our_id: String },
    #[error(
        "this Redis has no id and durable consumer {durable} belongs to {theirs} (id {their_id}); waiting whether a \
         subscriber of that cache is at work"
    )]
    Undecided { durable: String, theirs: String, their_id: String },
}

/// What was seen since a Redis without an id has met a durable that belongs to another.
pub(super) struct Doubt {
    since: Instant,
    is_at_work: bool,
    delivered: u64,
}

/// What the decision depends on.
struct Facts<'a> {
    /// Id in this Redis.
    own: Option<&'a str>,
    /// Id under which this process owned the durable before.
    held: Option<&'a str>,
    /// Id in the durable.
    claimed: Option<&'a str>,
    /// How long there has been doubt, and whether somebody was at work on the durable meanwhile.
    doubt: (Duration, bool),
}

#[derive(Debug, PartialEq, Eq)]
enum Decision {
    /// The durable belongs to this cache.
    Ours,
    /// Redis has lost the id and gets it again.
    GiveBack,
    /// The durable belongs to nobody and is taken, or to a cache that nobody serves.
    Claim,
    /// Watch longer.
    Wait,
    /// This Redis is another cache and gets an id of its own, so that it stays one.
    Separate,
    /// The durable belongs to another cache.
    Foreign,
}

fn decide(facts: &Facts<'_>) -> Decision {
    match (facts.own, facts.claimed) {
        (Some(own), Some(claimed)) if own == claimed => Decision::Ours,
        (Some(_), Some(_)) => Decision::Foreign,
        (_, None) => Decision::Claim,
        (None, claimed) if claimed == facts.held => Decision::GiveBack,
        (None, Some(_)) => match facts.doubt {
            (elapsed, _) if elapsed < DOUBT => Decision::Wait,
            (_, true) => Decision::Separate,
            (_, false) => Decision::Claim,
        },
    }
}

impl Supervisor {
    /// Makes sure that the durable belongs to this cache.
    pub(super) async fn own(&self, memory: &mut Memory, look: &Look) -> Result<(), LookError> {
        let durable = &self.config.durable;
        let own = self.redis.load_identity(durable).await?;
        let claim = look.consumer.claim();
        let decision = decide(&Facts {
            own: own.as_deref(),
            held: memory.identity.as_deref(),
            claimed: claim.as_ref().map(|claim| &*claim.cache),
            doubt: watch(&mut memory.ownership_doubt, look),
        });
        if decision != Decision::Wait {
            memory.ownership_doubt = None;
        }
        let id = match decision {
            Decision::Ours => own.unwrap_or_default(),
            Decision::GiveBack => {
                let held = memory.identity.clone().unwrap_or_default();
                tracing::warn!(id = held, "Redis has lost the id of this cache and gets it again");
                self.keep_identity(memory, &held).await?
            }
            Decision::Claim => return self.claim(memory, look, own).await,
            Decision::Separate => self.keep_identity(memory, &cache::Redis::generate_identity()).await?,
            Decision::Foreign => own.unwrap_or_default(),
            Decision::Wait => String::new(),
        };
        let Some(claim) = claim.filter(|claim| claim.cache != id) else {
            memory.identity = Some(id);
            return Ok(());
        };
        self.consumer.send_replace(None);
        Err(self.refused(claim, id).into())
    }

    /// Takes the durable for this cache. Where this Redis comes from is not known, so it gets everything that the stream
    /// still has.
    async fn claim(&self, memory: &mut Memory, look: &Look, own: Option<String>) -> Result<(), LookError> {
        let durable = &self.config.durable;
        let differences = look.consumer.differences(&self.config).essential;
        let is_foreign = look.consumer.claim().is_some() || !differences.is_empty();
        self.suspect(memory, if is_foreign { Since::Beginning } else { Since::Margin });
        let own = own.unwrap_or_else(cache::Redis::generate_identity);
        let id = self.keep_identity(memory, &own).await?;
        let position = memory.position.clone().unwrap_or_default();
        let claim = Claim::new(&id, &self.config.redis_url.to_string(), &position);
        let (stream, _) = memory.handles.as_ref().expect("looked at before");
        if let Err(error) = durable::update(stream, &look.consumer, &self.config, &claim).await {
            return Err(match differences.is_empty() {
                true => self.stream_error(error),
                false => self.mismatch(&differences, Some(error)).into(),
            });
        }
        // Another cache may be doing the same.
        tokio::time::sleep(CLAIM_PAUSE).await;
        let found =
            durable::find(&self.jetstream, durable).await.map_err(|error| self.stream_error(error))?;
        match found.and_then(|found| found.claim()) {
            Some(theirs) if theirs.cache != id => Err(self.refused(theirs, id).into()),
            _ => {
                tracing::info!(durable, id, "the durable consumer belongs to this cache");
                memory.identity = Some(id);
                Ok(())
            }
        }
    }

    /// Stores the id of this cache. Like the first record it must have room.
    pub(super) async fn keep_identity(&self, memory: &Memory, id: &str) -> Result<String, LookError> {
        match self.redis.keep_identity(&self.config.durable, id).await {
            // A record that was stored before it was full is enough to notice a gap.
            Err(error) if error.is_out_of_memory() && memory.stored.is_some() => Ok(id.to_owned()),
            Err(error) if error.is_out_of_memory() => Err(LookError::Full(error)),
            kept => Ok(kept?),
        }
    }

    fn refused(&self, claim: Claim, our_id: String) -> OwnershipError {
        let durable = self.config.durable.clone();
        let (theirs, their_id) = (claim.redis, claim.cache);
        if our_id.is_empty() {
            return OwnershipError::Undecided { durable, theirs, their_id };
        }
        OwnershipError::Foreign { durable, theirs, their_id, ours: self.config.redis_url.to_string(), our_id }
    }
}

/// Remembers what was seen of the consumer while there is doubt. This process takes nothing meanwhile.
fn watch(doubt: &mut Option<Doubt>, look: &Look) -> (Duration, bool) {
    let delivered = look.consumer.consumer.delivered.consumer_sequence;
    let doubt = doubt.get_or_insert_with(|| Doubt { since: Instant::now(), is_at_work: false, delivered });
    doubt.is_at_work |= look.consumer.is_at_work() || delivered != doubt.delivered;
    (doubt.since.elapsed(), doubt.is_at_work)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_durable_belongs_to_the_cache_whose_id_it_names() {
        let (early, late) = (Duration::ZERO, DOUBT);
        let cases = [
            (Some("a"), None, Some("a"), (early, true), Decision::Ours),
            (Some("a"), Some("a"), Some("b"), (late, false), Decision::Foreign),
            (Some("a"), None, Some("b"), (late, false), Decision::Foreign),
            (Some("a"), None, None, (early, true), Decision::Claim),
            (None, None, None, (early, false), Decision::Claim),
            // Redis was emptied, or evicted the id, under a subscriber at work.
            (None, Some("a"), Some("a"), (early, true), Decision::GiveBack),
            (None, Some("a"), Some("b"), (early, true), Decision::Wait),
            // A subscriber that starts with a Redis that knows nothing.
            (None, None, Some("a"), (early, false), Decision::Wait),
            (None, None, Some("a"), (early, true), Decision::Wait),
            (None, None, Some("a"), (late, true), Decision::Separate),
            (None, None, Some("a"), (late, false), Decision::Claim),
        ];
        for (own, held, claimed, doubt, expected) in cases {
            let facts = Facts { own, held, claimed, doubt };
            assert_eq!(decide(&facts), expected, "{own:?} {held:?} {claimed:?} {doubt:?}");
        }
    }
}
