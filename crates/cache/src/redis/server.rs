//! What the servers say about themselves.

use std::collections::{BTreeSet, HashMap};
use std::time::Duration;

use deadpool_redis::redis::{Cmd, FromRedisValue};
use futures::future::join_all;

use super::Redis;
use super::batch::read;
use super::masters::Master;
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

/// A master and the history of its data. One of the two changes whenever values that had been invalidated may be back.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Instance {
    /// `run_id`: another one after a restart, and on the server that takes over.
    pub run_id: String,
    /// `master_replid`: another one after the server was a replica, even if it never restarted. Empty if the server does
    /// not tell.
    pub history: String,
    /// True if `history` continues that of another master: the server was promoted. A server also renews its history when
    /// its first replica comes and when the last one has been away for long; this is false then.
    pub was_promoted: bool,
}

impl Instance {
    fn read(info: &str) -> Result<Self, RedisError> {
        let run_id = info_field(info, "run_id").ok_or_else(|| RedisError::unexpected("no run_id in INFO"))?;
        let before = info_field(info, "master_replid2").unwrap_or_default();
        Ok(Self {
            run_id: run_id.to_owned(),
            history: info_field(info, "master_replid").unwrap_or_default().to_owned(),
            was_promoted: before.bytes().any(|digit| digit != b'0'),
        })
    }
}

/// All masters at one moment.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Masters {
    /// Each of them.
    pub instances: BTreeSet<Instance>,
    /// A `maxmemory-policy` among theirs under which marks may be evicted, if there is one.
    pub evicts_marks: Option<String>,
    /// Host and port of every master of a cluster; nothing for a single server.
    pub nodes: BTreeSet<String>,
    /// Masters of a cluster that did not answer. The others work.
    pub unreachable: Vec<Unreachable>,
}

/// A master of a cluster that did not answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unreachable {
    /// Host and port.
    pub node: String,
    /// Why, for people.
    pub cause: String,
}

impl Redis {
    /// Every master; see [`Masters::instances`].
    ///
    /// # Errors
    /// Any [`RedisError`]; [`RedisError::Unavailable`] too if what answers is a replica by now, or one does not answer.
    pub async fn instances(&self) -> Result<BTreeSet<Instance>, RedisError> {
        let masters = self.look_at_masters().await?;
        match masters.unreachable.into_iter().next() {
            Some(Unreachable { node, cause }) => {
                Err(RedisError::Unavailable(format!("{node}: {cause}").into()))
            }
            None => Ok(masters.instances),
        }
    }

    /// What must be watched of the masters, by one `INFO` each. Masters of a cluster that do not answer are named.
    ///
    /// # Errors
    /// Any [`RedisError`] if none answers.
    pub async fn look_at_masters(&self) -> Result<Masters, RedisError> {
        let mut info = Cmd::new();
        info.arg("INFO");
        let nodes = self.masters().await?;
        let asked: Vec<_> = nodes.iter().map(|node| Box::pin(self.query_to(node, &info))).collect();
        let mut masters = Masters::default();
        if self.is_cluster() {
            masters.nodes = nodes.iter().map(Master::name).collect();
        }
        let mut failure = None;
        for (node, answer) in nodes.iter().zip(join_all(asked).await) {
            if let Err(error) = answer.and_then(read).and_then(|info: String| self.note(&info, &mut masters))
            {
                masters.unreachable.push(Unreachable { node: node.name(), cause: error.to_string() });
                failure = failure.or(Some(error));
            }
        }
        match failure {
            Some(error) if masters.instances.is_empty() => Err(error),
            _ => Ok(masters),
        }
    }

    /// Adds what one server says.
    fn note(&self, info: &str, masters: &mut Masters) -> Result<(), RedisError> {
        if info_field(info, "role").is_some_and(|role| role != "master") {
            self.lanes.give_up_all();
            return Err(RedisError::unavailable("the server has become a replica"));
        }
        masters.instances.insert(Instance::read(info)?);
        let policy = info_field(info, "maxmemory_policy").filter(|policy| evicts_marks(policy));
        masters.evicts_marks = masters.evicts_marks.take().or(policy.map(str::to_owned));
        Ok(())
    }

    /// Asks every master for a sign of life, all at once, and tells by name which of them gave one.
    ///
    /// # Errors
    /// Any [`RedisError`] if the masters cannot be told.
    pub async fn ping_masters(&self) -> Result<Vec<(String, bool)>, RedisError> {
        let masters = self.masters().await?;
        let asked = masters.iter().map(async |master| {
            let mut ping = Cmd::new();
            ping.arg("PING");
            (master.label(), self.query_to(master, &ping).await.is_ok())
        });
        Ok(join_all(asked).await)
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
            if evicts_marks(policy) {
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

/// Marks have no TTL.
fn evicts_marks(policy: &str) -> bool {
    policy != "noeviction" && !policy.starts_with("volatile-")
}

fn info_field<'a>(info: &'a str, name: &str) -> Option<&'a str> {
    info.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
}

/// The setting reads `3600 1 300 100`: after 3600 s if 1 key changed, after 300 s if 100 did.
fn longest_interval(save: &str) -> Option<Duration> {
    let seconds = save.split_whitespace().step_by(2).filter_map(|number| number.parse().ok()).max()?;
    Some(Duration::from_secs(seconds))
}
