//! The messages of Postgres' logical decoding plugin `pgoutput`, protocol versions 1 and 2. Pure.
//!
//! Format: "Logical Replication Message Formats" in the Postgres manual. A message borrows from its bytes; nothing is
//! allocated but the list of a tuple's columns, whose number the message itself bounds.

mod cursor;

use std::sync::Arc;

use pgwire_replication::Lsn;

use cursor::Cursor;

/// Why bytes are not a message. The stream cannot be trusted any more then, since what was in it is unknown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// The message ends within a field.
    #[error("message of pgoutput ends too early")]
    Truncated,
    /// A text is not UTF-8, although the session asked for it.
    #[error("text in a message of pgoutput is not UTF-8")]
    NotUtf8,
    /// Neither a message of version 1 nor of version 2.
    #[error("unknown message {:?} of pgoutput", *.0 as char)]
    UnknownMessage(u8),
    /// A part of a known message is not as documented.
    #[error("unknown mark {:?} in a message of pgoutput", *.0 as char)]
    UnknownMark(u8),
}

/// How a table identifies the old row in the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReplicaIdentity {
    /// By its primary key.
    Default,
    /// Not at all.
    Nothing,
    /// By the whole row.
    Full,
    /// By a unique index.
    Index,
}

/// A table as it was when the changes that follow were made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Relation {
    /// Its object id.
    pub oid: u32,
    /// Its schema.
    pub schema: Arc<str>,
    /// Its name.
    pub name: Arc<str>,
    /// What the log holds of old rows.
    pub identity: ReplicaIdentity,
    /// Its columns, in the order of the tuples.
    pub columns: Vec<RelationColumn>,
}

/// A column of a [`Relation`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RelationColumn {
    /// Its name.
    pub name: Arc<str>,
    /// Whether it is part of the replica identity.
    pub is_key: bool,
}

/// The value of one column.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Value<'a> {
    /// NULL.
    Null,
    /// A large value that the change left as it was; the log does not hold it.
    Unchanged,
    /// The value as text.
    Text(&'a str),
}

/// The columns of one row, in the order of the relation's.
pub type Tuple<'a> = Vec<Value<'a>>;

/// What the log holds of the row before a change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum OldTuple<'a> {
    /// The columns of the replica identity; the others are not known, though the tuple holds NULL for them.
    Key(Tuple<'a>),
    /// All columns (`REPLICA IDENTITY FULL`).
    Full(Tuple<'a>),
}

/// One message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message<'a> {
    /// A transaction that has committed begins.
    Begin {
        /// Its id, without the epoch.
        xid: u32,
        /// Where its commit is in the log.
        commit_lsn: Lsn,
        /// When it committed, in microseconds since 2000.
        committed_at: i64,
    },
    /// It ends.
    Commit {
        /// Where the log goes on.
        end_lsn: Lsn,
    },
    /// How a table looks; sent before its first change and whenever it was altered.
    Relation(Relation),
    /// A row was inserted.
    Insert {
        /// Subtransaction, in a streamed transaction.
        xid: Option<u32>,
        /// Table.
        relation: u32,
        /// The row.
        new: Tuple<'a>,
    },
    /// A row was updated.
    Update {
        /// Subtransaction, in a streamed transaction.
        xid: Option<u32>,
        /// Table.
        relation: u32,
        /// The row before, as far as the log holds it: nothing if the replica identity did not change.
        old: Option<OldTuple<'a>>,
        /// The row after.
        new: Tuple<'a>,
    },
    /// A row was deleted.
    Delete {
        /// Subtransaction, in a streamed transaction.
        xid: Option<u32>,
        /// Table.
        relation: u32,
        /// The row before.
        old: OldTuple<'a>,
    },
    /// Tables were emptied.
    Truncate {
        /// Subtransaction, in a streamed transaction.
        xid: Option<u32>,
        /// Tables.
        relations: Vec<u32>,
    },
    /// `pg_logical_emit_message`.
    Logical {
        /// Subtransaction, in a streamed transaction.
        xid: Option<u32>,
        /// Whether it belongs to the transaction; otherwise it says nothing of its outcome.
        transactional: bool,
        /// Its place in the log.
        lsn: Lsn,
        /// Its prefix.
        prefix: &'a str,
        /// Its content.
        content: &'a [u8],
    },
    /// Changes of a transaction that is still open follow.
    StreamStart {
        /// Its id, without the epoch.
        xid: u32,
    },
    /// They end for now.
    StreamStop,
    /// A streamed transaction has committed.
    StreamCommit {
        /// Its id, without the epoch.
        xid: u32,
        /// Where its commit is in the log.
        commit_lsn: Lsn,
        /// Where the log goes on.
        end_lsn: Lsn,
        /// When it committed, in microseconds since 2000.
        committed_at: i64,
    },
    /// A streamed transaction or one of its subtransactions was rolled back.
    StreamAbort {
        /// The transaction, without the epoch.
        xid: u32,
        /// What was rolled back; the transaction itself where both are the same.
        subxid: u32,
    },
    /// Where the transaction came from, or a data type: nothing the keys depend on.
    Ignored,
}

/// Reads one message. `streamed` says whether it stands between [`Message::StreamStart`] and [`Message::StreamStop`],
/// where changes carry the id of their subtransaction.
///
/// # Errors
/// [`DecodeError`]. Never panics.
pub fn decode(message: &[u8], streamed: bool) -> Result<Message<'_>, DecodeError> {
    let mut cursor = Cursor::new(message);
    let tag = cursor.u8()?;
    let mut xid = None;
    if streamed && matches!(tag, b'R' | b'Y' | b'I' | b'U' | b'D' | b'T' | b'M') {
        xid = Some(cursor.u32()?);
    }
    Ok(match tag {
        b'B' => {
            let commit_lsn = Lsn(cursor.u64()?);
            let committed_at = cursor.i64()?;
            Message::Begin { xid: cursor.u32()?, commit_lsn, committed_at }
        }
        b'C' => {
            cursor.bytes(1 + 8)?;
            Message::Commit { end_lsn: Lsn(cursor.u64()?) }
        }
        b'R' => Message::Relation(relation(&mut cursor)?),
        b'I' => {
            let relation = cursor.u32()?;
            expect(&mut cursor, b'N')?;
            Message::Insert { xid, relation, new: tuple(&mut cursor)? }
        }
        b'U' => update(&mut cursor, xid)?,
        b'D' => {
            let relation = cursor.u32()?;
            let mark = cursor.u8()?;
            Message::Delete { xid, relation, old: old_tuple(&mut cursor, mark)? }
        }
        b'T' => {
            let count = cursor.u32()?;
            cursor.bytes(1)?;
            Message::Truncate { xid, relations: (0..count).map(|_| cursor.u32()).collect::<Result<_, _>>()? }
        }
        b'M' => {
            let transactional = cursor.u8()? & 1 == 1;
            let lsn = Lsn(cursor.u64()?);
            Message::Logical { xid, transactional, lsn, prefix: cursor.text()?, content: cursor.counted()? }
        }
        b'S' => Message::StreamStart { xid: cursor.u32()? },
        b'E' => Message::StreamStop,
        b'c' => {
            let xid = cursor.u32()?;
            cursor.u8()?;
            let commit_lsn = Lsn(cursor.u64()?);
            let end_lsn = Lsn(cursor.u64()?);
            Message::StreamCommit { xid, commit_lsn, end_lsn, committed_at: cursor.i64()? }
        }
        b'A' => Message::StreamAbort { xid: cursor.u32()?, subxid: cursor.u32()? },
        b'O' | b'Y' => Message::Ignored,
        other => return Err(DecodeError::UnknownMessage(other)),
    })
}

fn update<'a>(cursor: &mut Cursor<'a>, xid: Option<u32>) -> Result<Message<'a>, DecodeError> {
    let relation = cursor.u32()?;
    let mark = cursor.u8()?;
    if mark == b'N' {
        return Ok(Message::Update { xid, relation, old: None, new: tuple(cursor)? });
    }
    let old = Some(old_tuple(cursor, mark)?);
    expect(cursor, b'N')?;
    Ok(Message::Update { xid, relation, old, new: tuple(cursor)? })
}

fn relation(cursor: &mut Cursor<'_>) -> Result<Relation, DecodeError> {
    let oid = cursor.u32()?;
    let schema = cursor.text()?;
    // An empty name is how pgoutput spells the system catalog.
    let schema = if schema.is_empty() { "pg_catalog" } else { schema };
    let name = cursor.text()?;
    let identity = match cursor.u8()? {
        b'd' => ReplicaIdentity::Default,
        b'n' => ReplicaIdentity::Nothing,
        b'f' => ReplicaIdentity::Full,
        b'i' => ReplicaIdentity::Index,
        other => return Err(DecodeError::UnknownMark(other)),
    };
    let count = cursor.u16()?;
    let columns = (0..count)
        .map(|_| {
            let is_key = cursor.u8()? & 1 == 1;
            let name = cursor.text()?.into();
            cursor.bytes(4 + 4)?;
            Ok(RelationColumn { name, is_key })
        })
        .collect::<Result<_, _>>()?;
    Ok(Relation { oid, schema: schema.into(), name: name.into(), identity, columns })
}

fn old_tuple<'a>(cursor: &mut Cursor<'a>, mark: u8) -> Result<OldTuple<'a>, DecodeError> {
    match mark {
        b'K' => tuple(cursor).map(OldTuple::Key),
        b'O' => tuple(cursor).map(OldTuple::Full),
        other => Err(DecodeError::UnknownMark(other)),
    }
}

fn tuple<'a>(cursor: &mut Cursor<'a>) -> Result<Tuple<'a>, DecodeError> {
    let count = usize::from(cursor.u16()?);
    // A column takes a byte at least, so a lying count cannot reserve more than the message is long.
    let mut columns = Vec::with_capacity(count.min(cursor.remaining()));
    for _ in 0..count {
        columns.push(match cursor.u8()? {
            b'n' => Value::Null,
            b'u' => Value::Unchanged,
            b't' => Value::Text(std::str::from_utf8(cursor.counted()?).map_err(|_| DecodeError::NotUtf8)?),
            other => return Err(DecodeError::UnknownMark(other)),
        });
    }
    Ok(columns)
}

fn expect(cursor: &mut Cursor<'_>, mark: u8) -> Result<(), DecodeError> {
    match cursor.u8()? {
        found if found == mark => Ok(()),
        other => Err(DecodeError::UnknownMark(other)),
    }
}
