use deadpool_redis::redis::{Cmd, Pipeline};
use event::CacheKey;

use super::Redis;
use super::batch::{Group, read, requests};
use super::masters::Master;
use crate::{RedisError, names};

/// Names looked at per step of a scan: about a millisecond of the server's time.
const NAMES_PER_STEP: usize = 1_000;

/// Glob that matches the keys that begin with `namespace`, whatever characters it has.
pub(super) fn beginning_with(namespace: &CacheKey) -> String {
    let mut pattern = String::with_capacity(namespace.as_str().len() + 8);
    for character in namespace.as_str().chars() {
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
        let layout = self.layout().await?;
        let deleted = self.search(&layout.nodes, patterns).await?;
        let now = self.layout().await?;
        if layout.has_lasted(&now) {
            return Ok(deleted);
        }
        Ok(deleted + self.search(&now.nodes, patterns).await?)
    }

    async fn search(&self, nodes: &[Master], patterns: &[String]) -> Result<u64, RedisError> {
        for pattern in patterns {
            let pattern = names::guards_and_stale_matching(pattern);
            for node in nodes {
                self.delete_found(node, &pattern, names::is_guard_or_stale).await?;
            }
        }
        let mut deleted = 0;
        for pattern in patterns {
            for node in nodes {
                deleted += self.delete_found(node, pattern, names::is_value).await?;
            }
        }
        Ok(deleted)
    }

    /// Deletes every value in the database, whoever put it there, with all leases and stale copies. Marks, their
    /// registry and positions stay: without its marks a strict write in flight would lose its promise.
    ///
    /// # Errors
    /// Any [`RedisError`]; repeat the call.
    pub async fn flush_all_keys(&self) -> Result<u64, RedisError> {
        self.delete_matching(&["*".to_owned()]).await
    }

    async fn delete_found(
        &self,
        master: &Master,
        pattern: &str,
        deletable: impl Fn(&[u8]) -> bool,
    ) -> Result<u64, RedisError> {
        let mut cursor = 0_u64;
        let mut deleted = 0;
        loop {
            let mut step = Cmd::new();
            step.arg("SCAN").arg(cursor).arg("MATCH").arg(pattern).arg("COUNT").arg(NAMES_PER_STEP);
            let (next, mut found): (u64, Vec<Vec<u8>>) = read(self.query_to(master, &step).await?)?;
            found.retain(|name| deletable(name));
            deleted += self.unlink(found).await?;
            cursor = next;
            if cursor == 0 {
                return Ok(deleted);
            }
        }
    }

    async fn unlink(&self, found: Vec<Vec<u8>>) -> Result<u64, RedisError> {
        let groups = self.group(found, |name| name);
        let unlink = |group: &Group<Vec<u8>>| {
            let mut pipeline = Pipeline::with_capacity(1);
            pipeline.cmd("UNLINK").arg(&group.items);
            pipeline
        };
        self.sum_all(&requests(&groups, unlink)).await
    }
}
