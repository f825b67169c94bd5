//! The invalidations that a message of Debezium stands for.

use std::collections::BTreeMap;

use event::{CacheKey, Change, CommittedEvent, EventId, MAX_KEYS};
use rules::{Cell, Image, Known, Lock, Part, Rules, TableRules};

use super::column::{self, ColumnType, UNAVAILABLE, Unreadable};
use super::envelope::{self, Control, DebeziumError, DeclaredTypes, Envelope, JsonRow, RowChange};
use super::identity::Identities;

/// Turns messages of Debezium into invalidations, by the rules.
#[derive(Debug)]
pub struct Decoder {
    rules: Rules,
    lock: Option<Lock>,
    identities: Identities,
}

/// The meaning of a message.
#[derive(Debug)]
pub struct Decoded {
    /// Kind of the message, for the metric.
    pub kind: Kind,
    /// Invalidations. Empty if no watched value changed.
    pub events: Vec<CommittedEvent>,
    /// Commit time by the clock of the database, in microseconds since the Unix epoch; `None` for snapshots and control
    /// messages.
    pub committed_us: Option<i64>,
    /// Facts that an operator should know.
    pub remarks: Vec<Remark>,
    /// Whether some keys could not be told, so that prefixes are invalidated instead.
    pub is_incomplete: bool,
}

/// Kind of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A change of a table with rules.
    Change,
    /// A change of a table without rules.
    NoRules,
    /// A heartbeat, with the time at which it was made, in milliseconds since the Unix epoch.
    Heartbeat(i64),
    /// Begin or end of a transaction.
    Transaction,
    /// A change of a schema.
    SchemaChange,
    /// A message that an application wrote into the write-ahead log.
    LogicalMessage,
    /// Follows a delete.
    Tombstone,
}

impl Kind {
    /// Every kind, for metrics that begin with zero.
    pub const ALL: [Self; 7] = [
        Self::Change,
        Self::NoRules,
        Self::Heartbeat(0),
        Self::Transaction,
        Self::SchemaChange,
        Self::LogicalMessage,
        Self::Tombstone,
    ];

    /// Its name.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Change => "change",
            Self::NoRules => "no_rules",
            Self::Heartbeat(_) => "heartbeat",
            Self::Transaction => "transaction",
            Self::SchemaChange => "schema_change",
            Self::LogicalMessage => "logical_message",
            Self::Tombstone => "tombstone",
        }
    }
}

impl From<Control> for Kind {
    fn from(control: Control) -> Self {
        match control {
            Control::Heartbeat(made_ms) => Self::Heartbeat(made_ms),
            Control::Transaction => Self::Transaction,
            Control::SchemaChange => Self::SchemaChange,
            Control::LogicalMessage => Self::LogicalMessage,
            Control::Tombstone => Self::Tombstone,
        }
    }
}

/// A fact that an operator should know. Said once for each subject.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Remark {
    /// Table or table and column that it is about.
    pub subject: String,
    /// The fact and the remedy.
    pub text: String,
}

impl Decoder {
    /// A decoder for these rules. The lock file tells the types of columns, of which messages without a schema say nothing.
    #[must_use]
    pub fn new(rules: Rules, lock: Option<Lock>) -> Self {
        Self { rules, lock, identities: Identities::default() }
    }

    /// Returns the meaning of a message.
    ///
    /// # Errors
    /// [`DebeziumError`]; the message is poison then.
    pub fn decode(&mut self, body: &[u8]) -> Result<Decoded, DebeziumError> {
        match envelope::read(body)? {
            Envelope::Control(control) => Ok(Decoded::nothing(control.into())),
            Envelope::Change(change) => self.change(&change),
        }
    }

    fn change(&mut self, change: &RowChange) -> Result<Decoded, DebeziumError> {
        let committed_us = change.source.committed_us();
        let Self { rules, lock, identities } = self;
        let Some(table) = rules.table(change.source.schema(), &change.source.table) else {
            let mut decoded = Decoded::nothing(Kind::NoRules);
            decoded.remarks.push(no_rules(change));
            return Ok(decoded);
        };
        let reader = Reader { table, lock: lock.as_ref(), schema: change.schema.as_ref() };
        let mut decoded = match change.op.as_str() {
            "t" => {
                let mut decoded = Decoded::nothing(Kind::Change);
                decoded.add(table.on_truncate.namespaces().to_vec(), Change::Namespace, committed_us);
                return Ok(decoded);
            }
            "c" | "r" => reader.invalidations(None, Some(needed(change, &change.after)?), committed_us),
            "u" => {
                let after = needed(change, &change.after)?;
                let mut decoded = reader.invalidations(change.before.as_ref(), Some(after), committed_us);
                identities.saw_update(&table.qualified_name(), change.before.as_ref());
                decoded.remarks.extend(reader.lacks_old_row(change));
                decoded
            }
            "d" => {
                let before = needed(change, &change.before)?;
                identities.saw_delete(&table.qualified_name(), before);
                let known = reader.without_filled_in(before, identities);
                reader.invalidations(Some(&known), None, committed_us)
            }
            other => return Err(DebeziumError::UnknownOperation(other.to_owned())),
        };
        decoded.committed_us = (change.op != "r").then_some(committed_us);
        Ok(decoded)
    }
}

fn needed<'a>(change: &RowChange, image: &'a Option<JsonRow>) -> Result<&'a JsonRow, DebeziumError> {
    image.as_ref().ok_or_else(|| DebeziumError::NoImage { table: name_of(change), op: change.op.clone() })
}

fn name_of(change: &RowChange) -> String {
    format!("{}.{}", change.source.schema(), change.source.table)
}

fn no_rules(change: &RowChange) -> Remark {
    let table = name_of(change);
    let text = format!(
        "change events of table {table} come, which has no rules; if it is a partition of a table that has, set \
         publish.via.partition.root=true in Debezium and create the publication anew; if nothing cached depends on it, leave \
         it out by table.exclude.list"
    );
    Remark { subject: table, text }
}

impl Decoded {
    fn nothing(kind: Kind) -> Self {
        Self { kind, events: Vec::new(), committed_us: None, remarks: Vec::new(), is_incomplete: false }
    }

    fn add(&mut self, keys: Vec<CacheKey>, change: Change, at_us: i64) {
        self.events.extend(keys.chunks(MAX_KEYS).map(|keys| CommittedEvent {
            id: EventId::generate(),
            keys: keys.to_vec(),
            change: change.clone(),
            xids: Vec::new(),
            history: None,
            at_us,
            traceparent: None,
        }));
    }
}

/// Reads the rows of one change.
struct Reader<'a> {
    table: &'a TableRules,
    lock: Option<&'a Lock>,
    schema: Option<&'a DeclaredTypes>,
}

impl Reader<'_> {
    fn invalidations(&self, before: Option<&JsonRow>, after: Option<&JsonRow>, at_us: i64) -> Decoded {
        let mut decoded = Decoded::nothing(Kind::Change);
        if self.is_unchanged(before, after) {
            return decoded;
        }
        let rows = [before, after].map(|row| row.map(|row| self.read(row)));
        let [old, new] = [&rows[0], &rows[1]].map(|row| row.as_ref().map(|row| row as &dyn Image));
        let known = self.table.known_keys(old, new);
        decoded.remarks.extend(known.expansion.refused.iter().map(|refused| Remark {
            subject: format!("{} {}", refused.table, refused.template),
            text: refused.to_string(),
        }));
        decoded.remarks.extend(self.unjudged(&rows));
        self.add_unknown(&mut decoded, &known, &rows, at_us);
        let mut keys = known.expansion.keys;
        keys.extend(self.guesses(&rows));
        decoded.add(keys, Change::Delete, at_us);
        decoded
    }

    /// Invalidates the prefixes of the keys that cannot be told.
    fn add_unknown(&self, decoded: &mut Decoded, known: &Known<'_>, rows: &[Option<Row>], at_us: i64) {
        let mut prefixes: Vec<CacheKey> = Vec::new();
        for unknown in &known.unknown {
            prefixes.extend(self.prefixes(unknown.template.parts()));
            let reason = rows.iter().flatten().find_map(|row| row.unreadable.get(unknown.column));
            let reason = match reason {
                Some(Unreadable(reason)) => reason.clone(),
                None => absent(unknown.cell, &self.table.qualified_name()),
            };
            decoded.remarks.push(Remark {
                subject: format!("{}.{}", self.table.qualified_name(), unknown.column),
                text: format!(
                    "cannot tell the keys '{}' of table {}, column {}: {reason}; invalidating every key of this beginning instead",
                    unknown.template.as_str(),
                    self.table.qualified_name(),
                    unknown.column
                ),
            });
        }
        prefixes.sort_unstable();
        prefixes.dedup();
        decoded.is_incomplete = !known.unknown.is_empty();
        decoded.add(prefixes, Change::Namespace, at_us);
    }

    /// A condition whose column has no known value counts as fulfilled.
    fn unjudged(&self, rows: &[Option<Row>]) -> Option<Remark> {
        let column = self.table.when.as_ref()?.value.column();
        let is_unknown = |row: &Row| matches!(row.cell(column), Cell::Absent | Cell::Unchanged);
        rows.iter().flatten().find(|row| is_unknown(row))?;
        let table = self.table.qualified_name();
        let text = format!(
            "cannot judge the condition of table {table}: the value of column {column} is not known; every row counts"
        );
        Some(Remark { subject: format!("{table} condition"), text })
    }

    /// The beginning of the keys of a template; without one, everything that TRUNCATE invalidates.
    fn prefixes(&self, parts: &[Part]) -> Vec<CacheKey> {
        match parts.first() {
            Some(Part::Literal(beginning)) => CacheKey::new(beginning.as_str()).into_iter().collect(),
            _ => self.table.on_truncate.namespaces().to_vec(),
        }
    }

    /// Tells whether no compared column changed, in whatever form the values come.
    fn is_unchanged(&self, before: Option<&JsonRow>, after: Option<&JsonRow>) -> bool {
        let (Some(_), Some(before), Some(after)) = (&self.table.columns, before, after) else { return false };
        let is_same = |column: &str| match (before.get(column), after.get(column)) {
            (_, Some(new)) if new == UNAVAILABLE => true,
            (Some(old), Some(new)) => old == new,
            _ => false,
        };
        self.table.compared_columns().into_iter().all(is_same)
    }

    fn read(&self, json: &JsonRow) -> Row {
        let mut row = Row::default();
        for column in self.table.needed_columns() {
            let Some(value) = json.get(column) else { continue };
            if value == UNAVAILABLE {
                row.cells.insert(column.to_owned(), Value::Unchanged);
                continue;
            }
            let declared = self.schema.and_then(|schema| schema.of(column));
            let locked = self.lock.and_then(|lock| lock.column_type(self.table, column));
            match column::text(value, ColumnType { locked, declared }) {
                Ok(text) => drop(row.cells.insert(column.to_owned(), Value::Text(text))),
                Err(unreadable) => {
                    row.unreadable.insert(column.to_owned(), unreadable);
                    if locked.is_none() && declared.is_none() {
                        row.guesses.insert(column.to_owned(), Value::Text(column::guess(value)));
                    }
                }
            }
        }
        row
    }

    /// The keys that would be right if values of unknown type are text. To delete them hurts nobody, and where they are right
    /// nobody waits for the scan.
    fn guesses(&self, rows: &[Option<Row>]) -> Vec<CacheKey> {
        let mut guessed = rows.iter().flatten().filter(|row| !row.guesses.is_empty()).map(|row| {
            let mut all = row.clone();
            all.cells.extend(row.guesses.clone());
            self.table.known_keys(None, Some(&all)).expansion.keys
        });
        let mut keys = guessed.next().unwrap_or_default();
        keys.extend(guessed.flatten());
        keys
    }

    /// Leaves out values that Debezium may have filled in.
    fn without_filled_in(&self, before: &JsonRow, identities: &Identities) -> JsonRow {
        let (table, is_vouched_for) = (self.table.qualified_name(), self.lock.is_some());
        let mut known = before.clone();
        known.retain(|column, _| !identities.may_be_filled_in(&table, column, before, is_vouched_for));
        known
    }

    /// Without its old row an update hides keys that it leaves behind, unless all are made of the primary key.
    fn lacks_old_row(&self, change: &RowChange) -> Option<Remark> {
        let columns = self.table.needed_columns();
        if change.before.is_some() || self.lock.is_some() || columns.len() < 2 {
            return None;
        }
        let table = self.table.qualified_name();
        let columns = columns.into_iter().collect::<Vec<_>>().join(", ");
        let text = format!(
            "updates of table {table} come without the old row, so keys made of former values stay, except those of the \
             primary key (the rules need the columns {columns}); run `ALTER TABLE {table} REPLICA IDENTITY FULL`, or, if all \
             these columns are in the primary key, write a lock file with `relay rules check --lock`"
        );
        Some(Remark { subject: format!("{table} without old rows"), text })
    }
}

fn absent(cell: Cell<'static>, table: &str) -> String {
    match cell {
        Cell::Unchanged => format!(
            "it is a large value that did not change and was not sent; run `ALTER TABLE {table} REPLICA IDENTITY FULL`"
        ),
        _ => format!(
            "the message has no value of it; if it is not in the replica identity, run `ALTER TABLE {table} REPLICA \
             IDENTITY FULL`; if it was renamed or dropped, correct the rules; if it is generated, or of a type that \
             Debezium leaves out, use an ordinary column that a trigger fills, or capture with the relay"
        ),
    }
}

/// The columns that the rules need.
#[derive(Debug, Clone, Default)]
struct Row {
    cells: BTreeMap<String, Value>,
    unreadable: BTreeMap<String, Unreadable>,
    guesses: BTreeMap<String, Value>,
}

#[derive(Debug, Clone)]
enum Value {
    Text(Option<String>),
    Unchanged,
}

impl Image for Row {
    fn cell(&self, column: &str) -> Cell<'_> {
        match self.cells.get(column) {
            Some(Value::Text(Some(text))) => Cell::Text(text),
            Some(Value::Text(None)) => Cell::Null,
            Some(Value::Unchanged) => Cell::Unchanged,
            None => Cell::Absent,
        }
    }
}
