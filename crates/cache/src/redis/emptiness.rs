//! Whether a cache has anything that could be stale.

use deadpool_redis::redis::Cmd;

use super::Redis;
use super::batch::read;
use super::masters::Master;
use crate::{RedisError, names};

/// Names looked at per step of the search.
const NAMES_PER_STEP: usize = 1_000;

/// Most steps per server. A cache without values has few names, all of them ours.
const MAX_STEPS: usize = 16;

impl Redis {
    /// Returns true if no master has a value, a lease or a stale copy. Such a cache needs no invalidation from before.
    /// A server whose search takes long counts as one with values.
    ///
    /// # Errors
    /// Any [`RedisError`].
    pub async fn has_no_values(&self) -> Result<bool, RedisError> {
        for master in self.masters().await? {
            if !self.has_none(&master).await? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    async fn has_none(&self, master: &Master) -> Result<bool, RedisError> {
        let mut cursor = 0_u64;
        for _ in 0..MAX_STEPS {
            let mut step = Cmd::new();
            step.arg("SCAN").arg(cursor).arg("COUNT").arg(NAMES_PER_STEP);
            let (next, found): (u64, Vec<Vec<u8>>) = read(self.query_to(master, &step).await?)?;
            if found.iter().any(|name| names::is_value(name) || names::is_guard_or_stale(name)) {
                return Ok(false);
            }
            if next == 0 {
                return Ok(true);
            }
            cursor = next;
        }
        Ok(false)
    }
}
