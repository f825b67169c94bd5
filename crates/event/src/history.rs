//! Names of transactions that no other database, and no other past of the same one, uses too.

use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// SQL expression for the history of the database that evaluates it, as text; null on a standby. Anybody may evaluate it.
///
/// The timeline is that of the log being written. The one in `pg_control_checkpoint()` is still the old one for a while
/// after a promotion.
pub const HISTORY_SQL: &str = "(select case when not pg_is_in_recovery() then concat(
    'd', left(encode(sha256(convert_to(concat_ws(' ',
        (select system_identifier from pg_control_system()),
        (select oid from pg_database where datname = current_database())), 'UTF8')), 'hex'), 10),
    '.', ('x' || left(pg_walfile_name(pg_current_wal_insert_lsn()), 8))::bit(32)::int) end)";

/// The history that a transaction id belongs to: a database on a timeline of its Postgres cluster.
///
/// A transaction id alone means nothing elsewhere: two clusters assign the same ones, and so do a new primary and the old
/// one that it has left behind. As text: `d`, ten hexadecimal digits that stand for the database, `.`, the timeline.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct History {
    database: u64,
    timeline: u32,
}

/// Text that is not a history.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("text is not a history of transactions")]
pub struct InvalidHistory;

impl History {
    /// Whether `other` is this history or an earlier part of it. A server that was promoted goes on with the past of its
    /// primary, and decides how the transactions ended that were open there.
    #[must_use]
    pub fn continues(self, other: Self) -> bool {
        self.database == other.database && self.timeline >= other.timeline
    }
}

impl std::fmt::Display for History {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "d{:010x}.{}", self.database, self.timeline)
    }
}

impl FromStr for History {
    type Err = InvalidHistory;

    fn from_str(text: &str) -> Result<Self, InvalidHistory> {
        let (database, timeline) =
            text.strip_prefix('d').and_then(|rest| rest.split_once('.')).ok_or(InvalidHistory)?;
        let history = Self {
            database: u64::from_str_radix(database, 16).map_err(|_| InvalidHistory)?,
            timeline: timeline.parse().map_err(|_| InvalidHistory)?,
        };
        // One name for each: what is written back must be what was read.
        let fits = history.database <= MAX_DATABASE && history.to_string() == text;
        if fits { Ok(history) } else { Err(InvalidHistory) }
    }
}

impl Serialize for History {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for History {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<str>::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// Largest number that ten hexadecimal digits can say.
const MAX_DATABASE: u64 = (1 << 40) - 1;

/// A transaction of one history.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct TransactionId {
    /// The history it belongs to; `None` where a writer of an older version has not said it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub history: Option<History>,
    /// Its number (`xid8`).
    pub xid: u64,
}

impl TransactionId {
    /// Whether `other` can be this transaction, as a server sees it that has perhaps been promoted since.
    #[must_use]
    pub fn is_also(self, other: Self) -> bool {
        let same_history = match (self.history, other.history) {
            (Some(own), Some(its)) => own.continues(its),
            (_, None) => true,
            (None, Some(_)) => false,
        };
        self.xid == other.xid && same_history
    }
}

impl std::fmt::Display for TransactionId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.history {
            Some(history) => write!(f, "{history}:{}", self.xid),
            None => write!(f, "{}", self.xid),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn history(text: &str) -> History {
        text.parse().unwrap()
    }

    #[test]
    fn a_history_is_read_back_as_it_is_written_and_nothing_else_is_one() {
        let history: History = "d4f0a8b3c21.12".parse().unwrap();
        assert_eq!((history.timeline, history.to_string().as_str()), (12, "d4f0a8b3c21.12"));
        for text in [
            "",
            "733",
            "d.1",
            "d00000000ff",
            "d00000000FF.1",
            "dff.1",
            "d00000000ff.01",
            "d100000000ff.1",
            "d00000000ff.-1",
        ] {
            assert_eq!(text.parse::<History>(), Err(InvalidHistory), "{text}");
        }
    }

    #[test]
    fn a_promoted_server_knows_its_own_past_and_nobody_elses() {
        let (first, second, other) =
            (history("d0000000001.1"), history("d0000000001.2"), history("d0000000002.1"));
        assert!(first.continues(first) && second.continues(first));
        assert!(!first.continues(second) && !first.continues(other) && !second.continues(other));
        let of = |history, xid| TransactionId { history, xid };
        assert!(of(Some(second), 7).is_also(of(Some(first), 7)));
        assert!(!of(Some(first), 7).is_also(of(Some(second), 7)));
        assert!(!of(Some(first), 7).is_also(of(Some(first), 8)));
        // A writer of an older version does not name its history, and its events remove only marks that name none.
        assert!(of(None, 7).is_also(of(None, 7)) && of(Some(first), 7).is_also(of(None, 7)));
        assert!(!of(None, 7).is_also(of(Some(first), 7)));
    }
}
