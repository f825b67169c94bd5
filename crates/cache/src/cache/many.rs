//! Several keys at once.

use std::collections::HashMap;
use std::time::Duration;

use event::CacheKey;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::load::{Lease, LeaseRequest};
use super::{Cache, Options};
use crate::codec::{Codec, Json};
use crate::{Acquired, Fill, LeaseToken};

/// One of the keys asked for, each distinct key once.
struct Wanted<'k, K, T> {
    key: &'k K,
    /// The key, if it can be cached.
    cacheable: Option<CacheKey>,
    unusable: bool,
    /// The value once it is known; `Some(None)` if it is known not to exist.
    value: Option<Option<T>>,
}

impl Cache {
    /// The values of `keys`, in their order, from the cache with one `MGET`, and those missing from one call of
    /// `loader`, as JSON. Keys that the loader leaves out of its answer do not exist; that is cached too.
    ///
    /// A key that another reader is loading at the moment is loaded here as well, and not stored.
    ///
    /// # Errors
    /// Only the loader's own.
    pub async fn get_many<'k, T, K, E, F, Fut>(
        &self,
        keys: &'k [K],
        ttl: Duration,
        loader: F,
    ) -> Result<Vec<Option<T>>, E>
    where
        T: Serialize + DeserializeOwned + Clone,
        K: AsRef<str>,
        F: FnOnce(Vec<&'k K>) -> Fut,
        Fut: Future<Output = Result<HashMap<String, T>, E>>,
    {
        self.get_many_with(keys, &Options::<Json> { ttl, ..Options::default() }, loader).await
    }

    /// As [`get_many`](Self::get_many) with options, except that stale values are never served.
    ///
    /// # Errors
    /// Only the loader's own.
    pub async fn get_many_with<'k, T, K, C, E, F, Fut>(
        &self,
        keys: &'k [K],
        options: &Options<C>,
        loader: F,
    ) -> Result<Vec<Option<T>>, E>
    where
        T: Clone,
        K: AsRef<str>,
        C: Codec<Option<T>>,
        F: FnOnce(Vec<&'k K>) -> Fut,
        Fut: Future<Output = Result<HashMap<String, T>, E>>,
    {
        let (mut wanted, places) = self.distinct(keys, options);
        self.look_up(&mut wanted, options).await;
        if wanted.iter().any(|one| one.value.is_none()) {
            Box::pin(self.load_missing(&mut wanted, options, loader)).await?;
        }
        Ok(places.into_iter().map(|at| wanted[at].value.clone().flatten()).collect())
    }

    /// The distinct keys, and for each key asked for its place among them.
    fn distinct<'k, T, K: AsRef<str>, C>(
        &self,
        keys: &'k [K],
        options: &Options<C>,
    ) -> (Vec<Wanted<'k, K, T>>, Vec<usize>) {
        let mut first = HashMap::new();
        let mut wanted = Vec::new();
        let mut place = |key: &'k K| {
            *first.entry(key.as_ref()).or_insert_with(|| {
                let cacheable = self.cacheable(key.as_ref(), options);
                wanted.push(Wanted { key, cacheable, unusable: false, value: None });
                wanted.len() - 1
            })
        };
        let places = keys.iter().map(&mut place).collect();
        (wanted, places)
    }

    async fn look_up<T, K, C: Codec<Option<T>>>(
        &self,
        wanted: &mut [Wanted<'_, K, T>],
        options: &Options<C>,
    ) {
        let keys: Vec<&CacheKey> = wanted.iter().filter_map(|one| one.cacheable.as_ref()).collect();
        if keys.is_empty() {
            return;
        }
        let found = self.ask(self.shared.reads.get_many(&keys)).await.unwrap_or_default();
        let cacheable = wanted.iter_mut().filter(|one| one.cacheable.is_some());
        for (one, found) in cacheable.zip(found) {
            one.value = found.as_ref().and_then(|bytes| options.codec.decode(bytes).ok());
            one.unusable = found.is_some() && one.value.is_none();
        }
        self.count_looked_up(wanted);
    }

    fn count_looked_up<T, K>(&self, wanted: &[Wanted<'_, K, T>]) {
        let meters = &self.shared.meters;
        let count = |test: fn(&Wanted<'_, K, T>) -> bool| {
            u64::try_from(wanted.iter().filter(|one| one.cacheable.is_some() && test(one)).count())
                .unwrap_or(0)
        };
        meters.hits.increment(count(|one| one.value.is_some()));
        meters.misses.increment(count(|one| one.value.is_none()));
        meters.undecodable.increment(count(|one| one.unusable));
    }

    async fn load_missing<'k, T, K, C, E, F, Fut>(
        &self,
        wanted: &mut [Wanted<'k, K, T>],
        options: &Options<C>,
        loader: F,
    ) -> Result<(), E>
    where
        K: AsRef<str>,
        C: Codec<Option<T>>,
        F: FnOnce(Vec<&'k K>) -> Fut,
        Fut: Future<Output = Result<HashMap<String, T>, E>>,
    {
        let keys: Vec<Option<CacheKey>> = wanted.iter().map(|one| one.cacheable.clone()).collect();
        let leases = self.acquire_missing(wanted, &keys, options).await;
        let missing: Vec<usize> = (0..wanted.len()).filter(|&at| wanted[at].value.is_none()).collect();
        if missing.is_empty() {
            return Ok(());
        }
        let mut loaded = self.load(|| loader(missing.iter().map(|&at| wanted[at].key).collect())).await?;
        for at in missing {
            wanted[at].value = Some(loaded.remove(wanted[at].key.as_ref()));
        }
        self.fill_loaded(wanted, leases, options).await;
        Ok(())
    }

    /// Asks for the leases of all missing keys; takes values that have appeared meanwhile.
    async fn acquire_missing<'a, T, K, C: Codec<Option<T>>>(
        &'a self,
        wanted: &mut [Wanted<'_, K, T>],
        keys: &'a [Option<CacheKey>],
        options: &Options<C>,
    ) -> Vec<(usize, Lease<'a>)> {
        let missing: Vec<(usize, &CacheKey)> = keys
            .iter()
            .enumerate()
            .filter(|&(at, _)| wanted[at].value.is_none())
            .filter_map(|(at, key)| Some((at, key.as_ref()?)))
            .collect();
        if missing.is_empty() {
            return Vec::new();
        }
        let token = LeaseToken::generate();
        let requests: Vec<_> =
            missing.iter().map(|&(at, key)| (at, LeaseRequest::new(self, key, token))).collect();
        let asked: Vec<_> = missing.iter().map(|&(at, key)| (key, wanted[at].unusable)).collect();
        let lease = self.shared.config.lease;
        let acquired =
            self.ask(self.shared.reads.acquire_many(&asked, token, lease)).await.unwrap_or_default();
        let mut leases = Vec::new();
        for ((at, request), acquired) in requests.into_iter().zip(acquired) {
            self.shared.meters.leases.count(&acquired);
            match acquired {
                Acquired::Grant(id) => leases.push((at, request.granted(id))),
                Acquired::Value(bytes) => {
                    request.forget();
                    wanted[at].value = options.codec.decode(&bytes).ok();
                }
                Acquired::Wait | Acquired::Bypass => request.forget(),
            }
        }
        leases
    }

    /// Offers what was loaded under a lease.
    async fn fill_loaded<T, K, C: Codec<Option<T>>>(
        &self,
        wanted: &[Wanted<'_, K, T>],
        leases: Vec<(usize, Lease<'_>)>,
        options: &Options<C>,
    ) {
        let mut encoded = Vec::with_capacity(leases.len());
        for (at, lease) in leases {
            let bytes = wanted[at].value.as_ref().and_then(|value| options.codec.encode(value).ok());
            if let Some(bytes) = bytes
                && let Some(ttl) = self.storable_for(options, &bytes)
            {
                let (key, id) = lease.used_for_many();
                encoded.push((key, id, bytes, ttl));
            }
        }
        let fills: Vec<_> = encoded
            .iter()
            .map(|(key, id, value, ttl)| {
                (*key, id, Fill { value, ttl: *ttl, version: None, keep_stale_copy: false })
            })
            .collect();
        if fills.is_empty() {
            return;
        }
        let stored = self.ask(self.shared.reads.fill_many(&fills)).await;
        for nth in 0..fills.len() {
            let stored = stored.as_ref().map(|stored| stored.get(nth).copied().unwrap_or(false));
            self.shared.meters.fills.count(stored);
        }
    }
}
