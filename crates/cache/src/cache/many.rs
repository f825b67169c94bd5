//! Several keys at once.

use std::collections::HashMap;

use event::CacheKey;

use super::{Cache, Options};
use crate::codec::{Codec, Json};
use crate::{Acquired, Fill, LeaseToken};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::time::Duration;

/// A key that is not in the cache.
struct Missing<'k, K> {
    key: &'k K,
    /// Where it can be cached.
    cacheable: Option<CacheKey>,
    /// Its place among the keys asked for.
    at: usize,
    unusable: bool,
}

impl Cache {
    /// The values of `keys`, in their order, from the cache with one `MGET`; those missing from one call of `loader`,
    /// as JSON. Keys that the loader leaves out do not exist; that is cached too.
    ///
    /// What another reader is loading at the moment is loaded once more and not stored.
    ///
    /// # Errors
    /// Only the loader's own.
    pub async fn get_many<T, K, E, F, Fut>(
        &self,
        keys: &[K],
        ttl: Duration,
        loader: F,
    ) -> Result<Vec<Option<T>>, E>
    where
        T: Serialize + DeserializeOwned + Clone,
        K: AsRef<str>,
        F: FnOnce(Vec<&K>) -> Fut,
        Fut: Future<Output = Result<HashMap<String, T>, E>>,
    {
        todo!()
    }
}
