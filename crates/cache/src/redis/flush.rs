use std::collections::BTreeSet;

use deadpool_redis::redis::{Cmd, Pipeline};
use event::CacheKey;
use futures::future::join_all;

use super::Redis;
use super::batch::{Group, read, requests};
use super::masters::Master;
use super::outcome::listed;
use crate::{RedisError, names};

/// Names looked at per step of a scan: about a millisecond of the server's time.
const NAMES_PER_STEP: usize = 1_000;

/// Most names kept of those that the user may not touch.
const MAX_REFUSED: usize = 100;

/// The keys that are searched for.
enum Wanted<'a> {
    /// Those that match a glob pattern.
    Glob(&'a str),
    /// Those that begin with one of these. One pass over the cache finds them all: the server selects by what the
    /// beginnings have in common, and the rest is decided here.
    Beginnings(Vec<&'a [u8]>),
}

/// What a name that is found belongs to.
#[derive(Clone, Copy)]
enum Kind {
    GuardOrStale,
    Value,
}

/// What a search has deleted, and found but may not touch.
#[derive(Default)]
struct Deleted {
    values: u64,
    refused: Vec<String>,
}

impl Wanted<'_> {
    /// Glob for the server that matches at least what is wanted.
    fn pattern(&self, kind: Kind) -> String {
        let pattern = match self {
            Self::Glob(pattern) => (*pattern).to_owned(),
            Self::Beginnings(beginnings) => beginning_with(&in_common(beginnings)),
        };
        match kind {
            Kind::Value => pattern,
            Kind::GuardOrStale => names::guards_and_stale_matching(&pattern),
        }
    }

    fn includes(&self, kind: Kind, name: &[u8]) -> bool {
        let begins = |key: &[u8]| match self {
            Self::Glob(_) => true,
            Self::Beginnings(beginnings) => beginnings.iter().any(|beginning| key.starts_with(beginning)),
        };
        match kind {
            Kind::Value => names::is_value(name) && begins(name),
            Kind::GuardOrStale => {
                names::is_guard_or_stale(name) && names::possible_keys_of(name).into_iter().any(begins)
            }
        }
    }
}

/// What all texts begin with. Whole characters only.
fn in_common(beginnings: &[&[u8]]) -> String {
    let Some((first, others)) = beginnings.split_first() else { return String::new() };
    let same = |at: &usize| others.iter().all(|other| other.get(*at) == first.get(*at));
    let length = (0..first.len()).take_while(same).count();
    first[..length].utf8_chunks().next().map_or_else(String::new, |chunk| chunk.valid().to_owned())
}

/// Glob that matches the keys that begin with `beginning`, whatever characters it has.
fn beginning_with(beginning: &str) -> String {
    let mut pattern = String::with_capacity(beginning.len() + 8);
    for character in beginning.chars() {
        if matches!(character, '*' | '?' | '[' | ']' | '\\') {
            pattern.push('\\');
        }
        pattern.push(character);
    }
    pattern.push('*');
    pattern
}

impl Redis {
    /// Deletes every value whose key matches one of the glob `patterns`, with the leases and stale copies of such keys,
    /// on all masters. Returns the number of values. Marks, their registry and positions stay.
    ///
    /// Leases go first: one granted before the scan either is found, and its fill will be refused, or has become a
    /// value before the scan of the values starts, and is found there. So when this returns every matching value was
    /// loaded after the call. If slots of a cluster are moving meanwhile everything is searched twice.
    ///
    /// # Errors
    /// Any [`RedisError`]; repeat the call.
    pub async fn delete_matching(&self, patterns: &[String]) -> Result<u64, RedisError> {
        self.delete_wanted(&patterns.iter().map(|pattern| Wanted::Glob(pattern)).collect::<Vec<_>>()).await
    }

    /// As [`delete_matching`](Self::delete_matching) for every key that begins with one of `namespaces`. However many they
    /// are, every master is searched once.
    ///
    /// # Errors
    /// Any [`RedisError`]; repeat the call. With [`RedisError::KeysRefused`] all keys are done but those it names.
    pub async fn delete_namespaces(&self, namespaces: &BTreeSet<CacheKey>) -> Result<u64, RedisError> {
        let beginnings = namespaces.iter().map(|namespace| namespace.as_str().as_bytes()).collect();
        self.delete_wanted(&[Wanted::Beginnings(beginnings)]).await
    }

    /// Deletes every value in the database, whoever put it there, with all leases and stale copies. Marks, their
    /// registry and positions stay: without its marks a strict write in flight would lose its promise.
    ///
    /// # Errors
    /// Any [`RedisError`]; repeat the call.
    pub async fn flush_all_keys(&self) -> Result<u64, RedisError> {
        self.delete_matching(&["*".to_owned()]).await
    }

    async fn delete_wanted(&self, wanted: &[Wanted<'_>]) -> Result<u64, RedisError> {
        let layout = self.layout().await?;
        let deleted = self.search(&layout.nodes, wanted).await?;
        let now = self.layout().await?;
        if layout.has_lasted(&now) {
            return Ok(deleted);
        }
        Ok(deleted + self.search(&now.nodes, wanted).await?)
    }

    /// Searches all nodes at the same time: one that does not answer holds up no other.
    async fn search(&self, nodes: &[Master], wanted: &[Wanted<'_>]) -> Result<u64, RedisError> {
        let searches: Vec<_> = nodes.iter().map(|node| Box::pin(self.search_node(node, wanted))).collect();
        let mut deleted = Deleted::default();
        let mut failure = None;
        for outcome in join_all(searches).await {
            match outcome {
                Ok(more) => deleted.add(more),
                Err(error) => failure = failure.or(Some(error)),
            }
        }
        match failure {
            Some(error) => Err(error),
            None if deleted.refused.is_empty() => Ok(deleted.values),
            None => Err(RedisError::KeysRefused { what: listed(&deleted.refused) }),
        }
    }

    async fn search_node(&self, node: &Master, wanted: &[Wanted<'_>]) -> Result<Deleted, RedisError> {
        let mut deleted = Deleted::default();
        for wanted in wanted {
            let others = self.delete_found(node, wanted, Kind::GuardOrStale).await?;
            deleted.refused.extend(others.refused);
        }
        for wanted in wanted {
            deleted.add(self.delete_found(node, wanted, Kind::Value).await?);
        }
        Ok(deleted)
    }

    async fn delete_found(
        &self,
        master: &Master,
        wanted: &Wanted<'_>,
        kind: Kind,
    ) -> Result<Deleted, RedisError> {
        let pattern = wanted.pattern(kind);
        let mut cursor = 0_u64;
        let mut deleted = Deleted::default();
        loop {
            let mut step = Cmd::new();
            step.arg("SCAN").arg(cursor).arg("MATCH").arg(&pattern).arg("COUNT").arg(NAMES_PER_STEP);
            let (next, mut found): (u64, Vec<Vec<u8>>) = read(self.query_to(master, &step).await?)?;
            found.retain(|name| wanted.includes(kind, name));
            deleted.add(self.unlink(&found).await?);
            cursor = next;
            if cursor == 0 {
                return Ok(deleted);
            }
        }
    }

    /// Deletes names. One that the user may not touch has its whole command refused, and is found by halving.
    async fn unlink(&self, found: &[Vec<u8>]) -> Result<Deleted, RedisError> {
        let mut groups = self.group(found, |name| name);
        let mut deleted = Deleted::default();
        while !groups.is_empty() {
            let answers = self.try_all(&requests(&groups, unlinking)).await;
            for (group, answers) in std::mem::take(&mut groups).iter().zip(answers) {
                match answers {
                    Ok(answers) => {
                        for answer in answers {
                            deleted.values += read::<u64>(answer)?;
                        }
                    }
                    Err(error) if error.is_about_keys() => match group.halves() {
                        Some(halves) => groups.extend(halves),
                        None => {
                            deleted.refuse(group.items.iter().map(|name| name.escape_ascii().to_string()))
                        }
                    },
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(deleted)
    }
}

fn unlinking(group: &Group<&Vec<u8>>) -> Pipeline {
    let mut pipeline = Pipeline::with_capacity(1);
    pipeline.cmd("UNLINK");
    for name in &group.items {
        pipeline.arg(name.as_slice());
    }
    pipeline
}

impl Deleted {
    fn add(&mut self, more: Self) {
        self.values += more.values;
        self.refuse(more.refused.into_iter());
    }

    fn refuse(&mut self, names: impl Iterator<Item = String>) {
        self.refused.extend(names.take(MAX_REFUSED.saturating_sub(self.refused.len())));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_beginnings_have_in_common_selects_all_of_them() {
        let common =
            |texts: &[&str]| in_common(&texts.iter().map(|text| text.as_bytes()).collect::<Vec<_>>());
        assert_eq!(common(&["user:"]), "user:");
        assert_eq!(common(&["user:", "us:"]), "us");
        assert_eq!(common(&["a:", "b:"]), "");
        // They differ in the second byte of a character.
        assert_eq!(common(&["x\u{e9}", "x\u{e8}"]), "x");
    }
}
