//! What the servers say about themselves.

use std::collections::{BTreeSet, HashMap};
use std::time::Duration;

use deadpool_redis::redis::{Cmd, FromRedisValue};

use super::Redis;
use super::batch::read;
use crate::RedisError;

/// A `maxmemory-policy` that never evicts a key without a TTL, so never a mark.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EvictionPolicy(String);

impl EvictionPolicy {
    /// The policy's name as Redis spells it.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl std::fmt::Display for EvictionPolicy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl Redis {
    /// The `run_id` of every master. It changes when a server restarts and when another takes over, which is when
    /// values that had been invalidated may be back.
    ///
    /// # Errors
    /// Any [`RedisError`]; [`RedisError::Unavailable`] too if what answers is a replica by now.
    pub async fn instances(&self) -> Result<BTreeSet<String>, RedisError> {
        let mut run_ids = BTreeSet::new();
        for info in self.infos().await? {
            if info_field(&info, "role").is_some_and(|role| role != "master") {
                self.lanes.give_up_all();
                return Err(RedisError::unavailable("the server has become a replica"));
            }
            let run_id =
                info_field(&info, "run_id").ok_or_else(|| RedisError::unexpected("no run_id in INFO"))?;
            run_ids.insert(run_id.to_owned());
        }
        Ok(run_ids)
    }

    /// The longest time between two snapshots that any master is configured for: how old the data of a restarted
    /// server can be. `None` if there are no snapshots or the servers do not tell.
    ///
    /// # Errors
    /// Any [`RedisError`] except missing rights, which mean `None`.
    pub async fn longest_snapshot_interval(&self) -> Result<Option<Duration>, RedisError> {
        let mut ask = Cmd::new();
        ask.arg("CONFIG").arg("GET").arg("save");
        let answers = match self.ask_masters::<HashMap<String, String>>(&ask).await {
            // Managed services rename or remove CONFIG.
            Err(RedisError::Refused { .. } | RedisError::Unexpected(_)) => return Ok(None),
            answers => answers?,
        };
        let longest =
            answers.into_iter().filter_map(|settings| longest_interval(settings.get("save")?)).max();
        Ok(longest)
    }

    /// The eviction policy, if strict writes are safe under it.
    ///
    /// # Errors
    /// [`RedisError::MarksEvictable`] if any master may evict keys without a TTL, or any other [`RedisError`].
    pub async fn eviction_policy(&self) -> Result<EvictionPolicy, RedisError> {
        let mut safe = None;
        for info in self.infos().await? {
            let policy = info_field(&info, "maxmemory_policy")
                .ok_or_else(|| RedisError::unexpected("no maxmemory_policy in INFO"))?;
            if policy != "noeviction" && !policy.starts_with("volatile-") {
                return Err(RedisError::MarksEvictable { policy: policy.to_owned() });
            }
            safe = Some(EvictionPolicy(policy.to_owned()));
        }
        safe.ok_or_else(|| RedisError::unavailable("no master answered"))
    }

    async fn infos(&self) -> Result<Vec<String>, RedisError> {
        let mut info = Cmd::new();
        info.arg("INFO");
        self.ask_masters(&info).await
    }

    /// Asks every master the same and returns their answers.
    async fn ask_masters<T: FromRedisValue>(&self, command: &Cmd) -> Result<Vec<T>, RedisError> {
        let mut answers = Vec::new();
        for master in self.masters().await? {
            answers.push(read(self.query_to(&master, command).await?)?);
        }
        Ok(answers)
    }
}

fn info_field<'a>(info: &'a str, name: &str) -> Option<&'a str> {
    info.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
}

/// The setting reads `3600 1 300 100`: after 3600 s if 1 key changed, after 300 s if 100 did.
fn longest_interval(save: &str) -> Option<Duration> {
    let seconds = save.split_whitespace().step_by(2).filter_map(|number| number.parse().ok()).max()?;
    Some(Duration::from_secs(seconds))
}
