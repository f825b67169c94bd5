//! From messages to what committed transactions invalidate. Pure: no clock, no connection.

mod pending;
mod pieces;
mod relations;

use std::collections::HashMap;
use std::sync::Arc;

use event::log_event;
use pgwire_replication::Lsn;
use rules::{Expansion, Image, MissingValue, Rules, TableRules};

use crate::pgoutput::{DecodeError, Message, OldTuple, Relation, Tuple, decode};
use crate::publication::{Lineage, Tables};
use crate::row::Row;

use pending::Pending;
use pieces::Draining;
use relations::{Role, Watched, not_logged, warn_of_unruled};

pub use pieces::{Commit, Piece, TopicChanges};
pub use relations::Unknown;

/// Memory that the keys of open transactions may take, all together. About a million keys.
pub const MAX_HELD_BYTES: usize = 36 * 1024 * 1024;

/// Why the stream cannot go on as it is.
#[derive(Debug, thiserror::Error)]
pub enum AssemblyError {
    /// A message cannot be read.
    #[error(transparent)]
    Decode(#[from] DecodeError),
    /// Messages come in an order that the protocol does not allow.
    #[error("pgoutput sent {0} where it does not belong")]
    OutOfOrder(&'static str),
    /// Open transactions name more keys than are kept. Read on without streaming: the server then sends every
    /// transaction after its commit, and nothing has to be kept.
    #[error("open transactions name more keys than fit in {MAX_HELD_BYTES} bytes")]
    TooManyKeys,
    /// A savepoint was rolled back in an open transaction that has enqueued events without a table. The server names the
    /// transaction of such an event, not the subtransaction, so that nobody can tell which of them are void. Read on
    /// without streaming: the server then sends what has committed and nothing else.
    #[error("a savepoint was rolled back in an open transaction that has enqueued events through the log")]
    VoidEvents,
}

/// What was seen, for the metrics.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Seen {
    /// Changed rows, truncations and logical messages.
    pub changes: u64,
    /// Of these, changes that no rule watches.
    pub unwatched: u64,
    /// Keys that no cache key can be, and so were skipped.
    pub refused_keys: u64,
}

/// Puts transactions together.
#[derive(Debug)]
pub struct Assembler {
    rules: Arc<Rules>,
    /// Which table of the rules a relation was when the reader started: a table that is renamed keeps its rules.
    tables: Tables,
    /// The primary key of each table of the rules that has `expand`.
    primary_keys: Vec<Option<String>>,
    relations: HashMap<u32, Watched>,
    /// The transaction that is being received, which has committed.
    open: Option<(Commit, Pending)>,
    /// Open transactions, each with its subtransactions.
    streamed: HashMap<u32, HashMap<u32, Pending>>,
    /// The one whose changes are being received.
    streaming: Option<u32>,
    held_bytes: usize,
    draining: Option<Draining>,
    /// Place of the last message that belongs to no transaction.
    passed: Option<Lsn>,
    /// Relation that may be a partition: the catalog knows.
    question: Option<u32>,
    seen: Seen,
}

impl Assembler {
    /// An assembler for one session. `tables` says which relation has which rules; `primary_keys` has, in the order of
    /// the rules, the column whose values `expand` is given, where there is one.
    #[must_use]
    pub fn new(rules: Arc<Rules>, tables: Tables, primary_keys: Vec<Option<String>>) -> Self {
        Self {
            rules,
            tables,
            primary_keys,
            relations: HashMap::new(),
            open: None,
            streamed: HashMap::new(),
            streaming: None,
            held_bytes: 0,
            draining: None,
            passed: None,
            question: None,
            seen: Seen::default(),
        }
    }

    /// Takes one message. After each, [`Assembler::take_question`] is to be asked, and [`Assembler::next_piece`] until it
    /// has nothing.
    ///
    /// # Errors
    /// [`AssemblyError`]; the assembler is of no use after one.
    pub fn feed(&mut self, message: &[u8]) -> Result<(), AssemblyError> {
        match decode(message, self.streaming.is_some())? {
            Message::Begin { xid, commit_lsn, committed_at } => {
                let commit = Commit { xid, commit_lsn, committed_at_us: unix(committed_at) };
                self.open = Some((commit, Pending::default()));
            }
            Message::Commit { end_lsn } => {
                let (commit, pending) = self.open.take().ok_or(AssemblyError::OutOfOrder("a commit"))?;
                self.drain(commit, end_lsn, vec![pending]);
            }
            Message::StreamStart { xid } => self.streaming = Some(xid),
            Message::StreamStop => self.streaming = None,
            Message::StreamCommit { xid, commit_lsn, end_lsn, committed_at } => {
                let commit = Commit { xid, commit_lsn, committed_at_us: unix(committed_at) };
                let parts = self.streamed.remove(&xid).unwrap_or_default();
                let parts: Vec<_> = parts.into_values().collect();
                self.held_bytes -= parts.iter().map(Pending::bytes).sum::<usize>();
                self.drain(commit, end_lsn, parts);
            }
            Message::StreamAbort { xid, subxid } => self.abort(xid, subxid)?,
            Message::Relation(relation) => self.learn(relation),
            Message::Insert { xid, relation, new } => self.change(xid, relation, true, None, Some(new))?,
            Message::Update { xid, relation, old, new } => {
                self.change(xid, relation, false, old, Some(new))?
            }
            Message::Delete { xid, relation, old } => self.change(xid, relation, false, Some(old), None)?,
            Message::Truncate { xid, relations } => self.truncate(xid, &relations)?,
            Message::Logical { transactional: false, lsn, .. } => {
                // Sent at its place in the log: what committed before it has been received as a whole.
                if self.open.is_none() && self.streaming.is_none() {
                    self.passed = Some(lsn);
                }
            }
            Message::Logical { xid, prefix, content, .. } => {
                if prefix == log_event::PREFIX {
                    self.seen.changes += 1;
                    let content = content.into();
                    self.pending(xid, |pending| pending.add_event(content))?;
                }
            }
            Message::Ignored => {}
        }
        Ok(())
    }

    /// The next part of what has committed, if there is one. Parts of a transaction that comes after its commit are
    /// given away before all of it was received.
    pub fn next_piece(&mut self) -> Option<Piece> {
        if let Some(draining) = &mut self.draining {
            let piece = draining.next();
            if piece.is_last() {
                self.draining = None;
            }
            return Some(piece);
        }
        let (commit, pending) = self.open.as_mut().filter(|(_, pending)| pending.is_full())?;
        let pending = std::mem::take(pending);
        Some(Piece::of_unfinished(*commit, pending))
    }

    /// A position that the log was decoded to, if there is a new one besides those of the pieces: a heartbeat moves the
    /// position though nothing commits. Everything before it was given away when [`Assembler::next_piece`] has nothing.
    pub fn take_passed(&mut self) -> Option<Lsn> {
        self.passed.take()
    }

    /// Object id of a relation that may be a partition of a table of the rules, if it should be looked up before the next
    /// message is fed; [`Assembler::answer`] takes what was found. Until it is known each transaction that changes it
    /// invalidates whatever the rules of partitioned tables could name.
    pub fn take_question(&mut self) -> Option<u32> {
        self.question.take()
    }

    /// Takes the answer to [`Assembler::take_question`].
    pub fn answer(&mut self, oid: u32, lineage: Lineage) {
        let Some(watched) = self.relations.remove(&oid) else { return };
        match lineage {
            Lineage::Partition(table) => {
                self.tables.adopt(oid, table);
                self.learn(watched.relation);
            }
            Lineage::Other => {
                warn_of_unruled(&watched.relation);
                self.relations.insert(oid, Watched { role: Role::None, ..watched });
            }
            Lineage::Unknown => {
                self.relations.insert(oid, watched);
            }
        }
    }

    /// What was seen since this was last asked.
    pub fn take_seen(&mut self) -> Seen {
        std::mem::take(&mut self.seen)
    }

    /// Memory that open transactions take, in bytes.
    #[must_use]
    pub fn held_bytes(&self) -> usize {
        self.held_bytes
    }

    fn drain(&mut self, commit: Commit, end_lsn: Lsn, parts: Vec<Pending>) {
        self.draining = Some(Draining::new(commit, end_lsn, parts));
    }

    fn abort(&mut self, xid: u32, subxid: u32) -> Result<(), AssemblyError> {
        let dropped: usize = if xid == subxid {
            let parts = self.streamed.remove(&xid).unwrap_or_default();
            parts.values().map(Pending::bytes).sum()
        } else if self.streamed.get(&xid).is_some_and(|parts| parts.values().any(Pending::has_events)) {
            return Err(AssemblyError::VoidEvents);
        } else {
            let part = self.streamed.get_mut(&xid).and_then(|parts| parts.remove(&subxid));
            part.as_ref().map_or(0, Pending::bytes)
        };
        self.held_bytes -= dropped;
        Ok(())
    }

    fn learn(&mut self, relation: Relation) {
        let by_name = self
            .rules
            .tables()
            .iter()
            .position(|table| *table.schema == *relation.schema && *table.name == *relation.name);
        let role = match self.tables.rules_of(relation.oid).or(by_name) {
            Some(index) => Role::Of(index),
            None if !self.tables.partitioned().is_empty() => {
                self.question = Some(relation.oid);
                Role::Stranger(self.transaction())
            }
            None => {
                warn_of_unruled(&relation);
                Role::None
            }
        };
        let not_logged = match role {
            Role::Of(index) => not_logged(&self.rules.tables()[index], self.primary_key(index), &relation),
            _ => None,
        };
        self.relations.insert(relation.oid, Watched { relation, role, not_logged });
    }

    /// Id of the transaction that is being received.
    fn transaction(&self) -> Option<u32> {
        self.streaming.or(self.open.as_ref().map(|(commit, _)| commit.xid))
    }

    /// A change of a table that may be a partition.
    fn change_of_stranger(&mut self, xid: Option<u32>, oid: u32) -> Result<(), AssemblyError> {
        let now = self.transaction();
        let Some(watched) = self.relations.get_mut(&oid) else { return Ok(()) };
        if watched.role != Role::Stranger(now) {
            watched.role = Role::Stranger(now);
            self.question = Some(oid);
        }
        let Relation { schema, name, .. } = &watched.relation;
        let unknown = Unknown::Table(format!("{schema}.{name}"));
        let (rules, partitioned) = (Arc::clone(&self.rules), self.tables.partitioned().to_vec());
        self.pending(xid, |pending| {
            for index in partitioned {
                pending.add_unknown(&rules.tables()[index], &unknown);
            }
        })
    }

    fn change(
        &mut self,
        xid: Option<u32>,
        oid: u32,
        is_insert: bool,
        old: Option<OldTuple<'_>>,
        new: Option<Tuple<'_>>,
    ) -> Result<(), AssemblyError> {
        self.seen.changes += 1;
        let rules = Arc::clone(&self.rules);
        let watched =
            self.relations.get(&oid).ok_or(AssemblyError::OutOfOrder("a change of an unknown table"))?;
        let index = match watched.role {
            Role::Of(index) => index,
            Role::Stranger(_) => return self.change_of_stranger(xid, oid),
            Role::None => {
                self.seen.unwatched += 1;
                return Ok(());
            }
        };
        let table = &rules.tables()[index];
        if let (false, Some(column)) = (is_insert, &watched.not_logged) {
            let because = " of old rows: its replica identity lacks it";
            // Of a partition, its own name: each has an identity of its own.
            let Relation { schema, name, .. } = &watched.relation;
            let missing = MissingValue { table: format!("{schema}.{name}"), column: column.clone(), because };
            return self.pending(xid, |pending| pending.add_unknown(table, &missing.into()));
        }
        let (old, key_only) = match &old {
            None => (None, false),
            Some(OldTuple::Key(values)) => (Some(values), true),
            Some(OldTuple::Full(values)) => (Some(values), false),
        };
        let row = |values, key_only| Row { relation: &watched.relation, values, key_only };
        let old = old.map(|values| row(values, key_only));
        let new = new.as_ref().map(|values| row(values, false));
        match stale(table, self.primary_key(index), old.as_ref(), new.as_ref()) {
            Ok((expansion, primary_keys)) => {
                self.seen.refused_keys += expansion.refused.len() as u64;
                if expansion.keys.is_empty() && primary_keys.is_empty() {
                    self.seen.unwatched += 1;
                    return Ok(());
                }
                self.pending(xid, |pending| {
                    pending.add_keys(&table.topic, &expansion.keys);
                    pending.add_primary_keys(index, &primary_keys);
                })
            }
            Err(missing) => self.pending(xid, |pending| pending.add_unknown(table, &missing.into())),
        }
    }

    fn primary_key(&self, table: usize) -> Option<&str> {
        self.primary_keys.get(table)?.as_deref()
    }

    fn truncate(&mut self, xid: Option<u32>, oids: &[u32]) -> Result<(), AssemblyError> {
        let rules = Arc::clone(&self.rules);
        for oid in oids {
            self.seen.changes += 1;
            let table = match self.relations.get(oid).map(|watched| watched.role) {
                Some(Role::Of(table)) => table,
                Some(Role::Stranger(_)) => {
                    self.change_of_stranger(xid, *oid)?;
                    continue;
                }
                _ => {
                    self.seen.unwatched += 1;
                    continue;
                }
            };
            let table = &rules.tables()[table];
            self.pending(xid, |pending| {
                pending.add_namespaces(&table.topic, table.on_truncate.namespaces())
            })?;
        }
        Ok(())
    }

    /// Adds to the part of the transaction that a message belongs to, and keeps the books on memory.
    fn pending(&mut self, xid: Option<u32>, add: impl FnOnce(&mut Pending)) -> Result<(), AssemblyError> {
        let Some(top) = self.streaming else {
            let (_, pending) =
                self.open.as_mut().ok_or(AssemblyError::OutOfOrder("a change outside a transaction"))?;
            add(pending);
            return Ok(());
        };
        let parts = self.streamed.entry(top).or_default();
        let before = parts.get(&xid.unwrap_or(top)).map_or(0, Pending::bytes);
        let part = parts.entry(xid.unwrap_or(top)).or_default();
        add(part);
        self.held_bytes = self.held_bytes + part.bytes() - before;
        if self.held_bytes > MAX_HELD_BYTES { Err(AssemblyError::TooManyKeys) } else { Ok(()) }
    }
}

/// The keys of a changed row, and what `expand` is to be given. Where the log does not hold the old row as a whole, what
/// is compared is not known, so the change counts.
fn stale(
    table: &TableRules,
    primary_key: Option<&str>,
    old: Option<&Row<'_>>,
    new: Option<&Row<'_>>,
) -> Result<(Expansion, Vec<String>), MissingValue> {
    let (old, new) = (old.map(|row| row as &dyn Image), new.map(|row| row as &dyn Image));
    let primary_keys = primary_key.map_or(Ok(Vec::new()), |column| table.values(column, old, new))?;
    Ok((table.keys(old, new)?, primary_keys))
}

/// Microseconds since 2000 as microseconds since 1970.
fn unix(since_2000: i64) -> i64 {
    pgwire_replication::protocol::replication::pg_to_unix_timestamp(since_2000)
}
