//! `expand` of the rules: further keys, which only the database knows.
//!
//! It runs after the gate, so its snapshot has the transactions it is asked about. It may have later ones as well, and
//! that is right: which keys depend on a row now is what matters, and a key that does not depend on it any more was
//! invalidated by the change that made it so, if that table has rules.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use event::{CacheKey, Change, MAX_NAMESPACES};
use metrics::{counter, histogram};
use outbox::Claimed;
use rules::TableRules;
use rules::catalog::{ExpandError, Expander, Found};
use wal::Piece;

use super::Capture;
use super::events::of_several;
use super::pump::{DATABASE_TIMEOUT, PumpError};
use crate::database::within;
use crate::metrics as names;

/// Most keys that are published singly for what is published together. If there are more, the namespaces are.
const MAX_KEYS: usize = 50_000;

/// How long the queries of a table may take; after that their namespaces are declared stale.
const PATIENCE: Duration = Duration::from_secs(10);

/// Most keys in one event.
const EVENT_KEYS: usize = 1_000;

/// What `expand` is to be asked, by the index of the table in the rules.
#[derive(Debug, Default)]
pub(super) struct Questions(BTreeMap<usize, Question>);

#[derive(Debug, Default)]
struct Question {
    primary_keys: BTreeSet<String>,
    xids: Vec<u64>,
    /// When the first of the transactions committed.
    at_us: Option<i64>,
}

impl Questions {
    /// Takes the primary keys out of a part of the transaction `xid`.
    pub(super) fn add(&mut self, piece: &mut Piece, xid: u64) {
        let at_us = piece.commit.committed_at_us;
        for (table, primary_keys) in std::mem::take(&mut piece.primary_keys) {
            let question = self.0.entry(table).or_default();
            question.primary_keys.extend(primary_keys);
            if question.xids.last() != Some(&xid) {
                question.xids.push(xid);
            }
            question.at_us = Some(question.at_us.map_or(at_us, |known| known.min(at_us)));
        }
    }
}

/// Asks the database, and makes events of what it says. What it will never say is answered by the namespaces.
pub(super) async fn answer(
    capture: &Capture,
    expanders: &[Option<Expander>],
    questions: Questions,
) -> Result<Vec<Claimed>, PumpError> {
    let mut events = Vec::new();
    for (index, Question { primary_keys, xids, at_us }) in questions.0 {
        let Some(Some(expander)) = expanders.get(index) else { continue };
        let table = &capture.rules.tables()[index];
        let primary_keys: Vec<String> = primary_keys.into_iter().collect();
        let asked_at = Instant::now();
        let asking = Box::pin(expander.find(&capture.shared.pool, &primary_keys, MAX_KEYS, PATIENCE));
        let found = within(DATABASE_TIMEOUT, async { Ok(asking.await) }).await.map_err(PumpError::Ask)?;
        histogram!(names::CAPTURE_EXPAND).record(asked_at.elapsed());
        let (change, keys, most) = match keys(table, expander, found)? {
            Some(keys) => (Change::Delete, keys, EVENT_KEYS),
            None => (Change::Namespace, expander.namespaces().cloned().collect(), MAX_NAMESPACES),
        };
        let at_us = at_us.unwrap_or_default();
        events.extend(
            keys.chunks(most).map(|keys| {
                of_several(table.topic.clone(), keys.to_vec(), change.clone(), xids.clone(), at_us)
            }),
        );
    }
    Ok(events)
}

/// The keys that were found; `None` if it cannot be told which they are.
fn keys(
    table: &TableRules,
    expander: &Expander,
    found: Result<Found, ExpandError>,
) -> Result<Option<Vec<CacheKey>>, ExpandError> {
    let found = match found {
        Ok(Found::Keys(found)) => found,
        Ok(Found::TooMany) => {
            let table = table.qualified_name();
            tracing::warn!(
                table,
                "expand found more than {MAX_KEYS} keys or took longer than {PATIENCE:?}; declaring its namespaces stale"
            );
            return Ok(None);
        }
        Err(error) if error.is_lasting() => {
            counter!(names::CAPTURE_UNKNOWN).increment(1);
            tracing::error!("{}; declaring its namespaces stale", service::Report::of(&error));
            return Ok(None);
        }
        Err(error) => return Err(error),
    };
    let mut keys = Vec::with_capacity(found.len());
    let (mut refused, mut outside) = (0, None);
    for key in found {
        match CacheKey::new(key) {
            Ok(key) => keys.push(key),
            Err(_) => refused += 1,
        }
    }
    for key in &keys {
        if !expander.namespaces().any(|namespace| key.as_str().starts_with(namespace.as_str())) {
            outside = Some(key);
        }
    }
    counter!(names::CAPTURE_REFUSED_KEYS).increment(refused);
    if let Some(key) = outside {
        let table = table.qualified_name();
        tracing::error!(
            table,
            key = key.as_str(),
            "expand found a key outside its namespaces: after a gap it would stay; add its beginning to the rules"
        );
    }
    Ok(Some(keys))
}
