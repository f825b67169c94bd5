use std::collections::HashSet;

use super::Applied;
use crate::RedisError;

/// What became of a batch whose keys live at different servers or may be refused one by one.
#[derive(Debug, Default)]
pub struct Outcome {
    /// What was carried out.
    pub applied: Applied,
    /// What was not, by cause.
    pub undone: Vec<Undone>,
}

/// Keys for which a request could not be carried out, all for the same reason.
#[derive(Debug)]
pub struct Undone {
    /// The keys, each once.
    pub keys: Vec<String>,
    /// The node of the cluster, or what stands for the one server.
    pub node: String,
    /// Why.
    pub error: RedisError,
}

impl Undone {
    /// Whether it will not be carried out before somebody changes the rights of the user.
    #[must_use]
    pub fn is_refused(&self) -> bool {
        matches!(self.error, RedisError::KeysRefused { .. })
    }
}

impl Outcome {
    /// All keys that are left.
    #[must_use]
    pub fn keys_left(&self) -> HashSet<&str> {
        self.undone.iter().flat_map(|undone| &undone.keys).map(String::as_str).collect()
    }

    /// What was carried out, if that is everything.
    ///
    /// # Errors
    /// The first cause why it is not; [`RedisError::KeysRefused`] only if there is no other.
    pub fn into_result(mut self) -> Result<Applied, RedisError> {
        self.undone.sort_by_key(Undone::is_refused);
        match self.undone.into_iter().next() {
            Some(undone) => Err(undone.error),
            None => Ok(self.applied),
        }
    }

    /// Adds keys, to those that failed at the same node if there are some. The first error of a node is kept.
    pub(super) fn add(&mut self, node: String, keys: impl Iterator<Item = String>, error: RedisError) {
        match self.undone.iter_mut().find(|undone| undone.node == node && !undone.is_refused()) {
            Some(undone) => undone.keys.extend(keys),
            None => self.undone.push(Undone { keys: keys.collect(), node, error }),
        }
    }

    /// Adds keys that the user may not touch.
    pub(super) fn refuse(&mut self, keys: Vec<String>) {
        if !keys.is_empty() {
            let error = RedisError::KeysRefused { what: listed(&keys) };
            self.undone.push(Undone { keys, node: "the rights of the user".to_owned(), error });
        }
    }
}

/// The first few of many keys.
pub(super) fn listed(keys: &[String]) -> String {
    const NAMED: usize = 3;
    let mut what = keys.iter().take(NAMED).map(|key| format!("{key:?}")).collect::<Vec<_>>().join(", ");
    if keys.len() > NAMED {
        what = format!("{what} and {} more", keys.len() - NAMED);
    }
    what
}
