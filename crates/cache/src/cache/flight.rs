//! One load per key inside a process: the first reader that misses leads, the others follow.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use event::CacheKey;
use tokio::sync::watch;

/// How a flight ended.
#[derive(Debug, Clone)]
pub(super) enum Landing {
    /// There is a value, as good as their own for readers who came before a certain moment:
    ///
    /// - before its fill was sent, if the fill was accepted: then nothing had invalidated the key until after they came;
    /// - before the cache was asked, if it was found there;
    /// - before the load began, in any case.
    ///
    /// A later reader may have come after a commit that this value does not contain.
    Value { bytes: Arc<Vec<u8>>, for_readers_before: Instant },
    /// Nothing was loaded, and another may lead.
    Abandoned,
    /// The loader failed, or its value cannot be shared. Everyone is on their own: queueing behind one failing load
    /// after the other would take for ever.
    Failed,
}

/// The flights in the air.
#[derive(Default)]
pub(super) struct Flights {
    by_key: Mutex<HashMap<CacheKey, watch::Receiver<Option<Landing>>>>,
}

/// What a reader does about a key.
pub(super) enum Role<'a> {
    Leader(Leader<'a>),
    Follower(Follower),
}

/// The reader that loads. Dropping it without [`land`](Self::land), as when its caller gives up, lets another lead.
pub(super) struct Leader<'a> {
    flights: &'a Flights,
    key: &'a CacheKey,
    landing: watch::Sender<Option<Landing>>,
}

/// A reader that waits.
pub(super) struct Follower(watch::Receiver<Option<Landing>>);

impl Flights {
    pub(super) fn join<'a>(&'a self, key: &'a CacheKey) -> Role<'a> {
        let mut by_key = self.by_key.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(flight) = by_key.get(key) {
            return Role::Follower(Follower(flight.clone()));
        }
        let (landing, flight) = watch::channel(None);
        by_key.insert(key.clone(), flight);
        Role::Leader(Leader { flights: self, key, landing })
    }
}

impl Leader<'_> {
    /// Tells the followers. The next reader that misses leads again.
    pub(super) fn land(self, landing: Landing) {
        self.end(landing);
    }

    fn end(&self, landing: Landing) {
        // First forget the flight, so that whoever is told does not join it again.
        self.flights.by_key.lock().unwrap_or_else(PoisonError::into_inner).remove(self.key);
        self.landing.send_replace(Some(landing));
    }
}

impl Drop for Leader<'_> {
    fn drop(&mut self) {
        let landed = self.landing.borrow().is_some();
        if !landed {
            self.end(Landing::Abandoned);
        }
    }
}

impl Follower {
    /// Waits for the flight to end. Cancel-safe.
    pub(super) async fn landing(mut self) -> Landing {
        match self.0.wait_for(Option::is_some).await {
            Ok(landing) => landing.clone().unwrap_or(Landing::Abandoned),
            Err(_) => Landing::Abandoned,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key() -> CacheKey {
        CacheKey::new("k").unwrap()
    }

    #[tokio::test]
    async fn a_leader_that_is_dropped_lets_another_lead() {
        let (flights, key) = (Flights::default(), key());
        let Role::Leader(leader) = flights.join(&key) else { panic!("the first leads") };
        let Role::Follower(follower) = flights.join(&key) else { panic!("the second follows") };
        drop(leader);
        assert!(matches!(follower.landing().await, Landing::Abandoned));
        assert!(matches!(flights.join(&key), Role::Leader(_)));
    }

    #[tokio::test]
    async fn followers_learn_how_the_flight_ended_and_later_readers_lead_again() {
        let (flights, key) = (Flights::default(), key());
        let Role::Leader(leader) = flights.join(&key) else { panic!("the first leads") };
        let Role::Follower(follower) = flights.join(&key) else { panic!("the second follows") };
        leader.land(Landing::Value { bytes: Arc::new(b"v".to_vec()), for_readers_before: Instant::now() });
        assert!(matches!(flights.join(&key), Role::Leader(_)));
        let Landing::Value { bytes, .. } = follower.landing().await else { panic!("no value") };
        assert_eq!(*bytes, b"v");
    }
}
