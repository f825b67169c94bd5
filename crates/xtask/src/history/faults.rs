//! What can go wrong while readers read and writers write.

mod inject;
mod restart;

use std::collections::BTreeMap;
use std::str::FromStr;
use std::sync::{Mutex, PoisonError};

use anyhow::bail;
use clap::ValueEnum;

pub use inject::inject;
pub use restart::restart_daemons;

use super::clock::now_ns;

/// One kind of fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub enum Fault {
    /// A writer is killed (SIGKILL) and replaced
    KillWriter,
    /// A writer is stopped (SIGSTOP) for a while
    StopWriter,
    /// A reader is killed and replaced
    KillReader,
    /// A reader is stopped for a while
    StopReader,
    /// The relay is killed and started again
    KillRelay,
    /// The relay is stopped for a while
    StopRelay,
    /// The subscriber is killed and started again
    KillSubscriber,
    /// The subscriber is stopped for a while
    StopSubscriber,
    /// All connections of a line are reset
    Cut,
    /// What is sent to a server is lost for a while, then the connections are reset
    LoseRequests,
    /// Requests are carried out, and what the server answers is lost for a while; then the connections are reset
    LoseReplies,
    /// One answer is lost with its connection after the request was carried out
    LoseReply,
    /// Nothing passes for a while
    Stall,
    /// Everything arrives late for a while
    Delay,
    /// Redis is killed and started again on its append-only file
    RestartRedis,
    /// NATS is killed and started again on its data
    RestartNats,
    /// Postgres is killed and started again on its data
    RestartPostgres,
    /// Commits are not acknowledged and not visible, as a synchronous standby is away; a writer dies meanwhile
    LateCommit,
    /// Callers give up some reads and writes halfway
    Cancel,
}

/// Those that were asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Faults(pub Vec<Fault>);

impl Fault {
    /// As on the command line.
    pub fn name(self) -> String {
        self.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
    }
}

impl FromStr for Faults {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<Self> {
        match text {
            "none" => return Ok(Self(Vec::new())),
            "all" => return Ok(Self(Fault::value_variants().to_vec())),
            _ => {}
        }
        let mut faults = Vec::new();
        for name in text.split(',') {
            let Ok(fault) = Fault::from_str(name.trim(), true) else {
                let names: Vec<String> = Fault::value_variants().iter().map(|fault| fault.name()).collect();
                bail!("{name:?} is no fault; give none, all, or some of: {}", names.join(", "));
            };
            faults.push(fault);
        }
        Ok(Self(faults))
    }
}

impl std::fmt::Display for Faults {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0.len() {
            0 => f.write_str("none"),
            count if count == Fault::value_variants().len() => f.write_str("all"),
            _ => f.write_str(&self.0.iter().map(|fault| fault.name()).collect::<Vec<_>>().join(",")),
        }
    }
}

/// A fault that happened.
#[derive(Debug, Clone)]
pub struct Happened {
    pub fault: Fault,
    /// To whom.
    pub target: String,
    pub from_ns: u64,
    pub until_ns: u64,
}

/// All that happened.
#[derive(Debug, Default)]
pub struct Journal {
    entries: Mutex<Vec<Happened>>,
}

impl Journal {
    fn add(&self, fault: Fault, target: &str, from_ns: u64) {
        let happened = Happened { fault, target: target.to_owned(), from_ns, until_ns: now_ns() };
        self.entries.lock().unwrap_or_else(PoisonError::into_inner).push(happened);
    }

    /// How often each fault happened.
    pub fn counts(&self) -> BTreeMap<Fault, usize> {
        let mut counts = BTreeMap::new();
        for happened in self.entries.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            *counts.entry(happened.fault).or_default() += 1;
        }
        counts
    }

    /// What happened between two moments, in words.
    pub fn during(&self, from_ns: u64, until_ns: u64) -> Vec<String> {
        let entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        let then = entries.iter().filter(|one| one.from_ns <= until_ns && one.until_ns >= from_ns);
        then.map(|one| format!("{} ({})", one.fault.name(), one.target)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_are_none_all_or_a_list() {
        assert_eq!("none".parse::<Faults>().unwrap().to_string(), "none");
        assert_eq!("all".parse::<Faults>().unwrap().to_string(), "all");
        let some: Faults = "kill-writer, late-commit".parse().unwrap();
        assert_eq!(some.0, [Fault::KillWriter, Fault::LateCommit]);
        assert_eq!(some.to_string(), "kill-writer,late-commit");
        let error = "kill-everyone".parse::<Faults>().unwrap_err().to_string();
        assert!(error.contains("restart-redis"), "{error}");
    }
}
