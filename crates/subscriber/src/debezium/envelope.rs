//! The shapes of the messages that Debezium sends.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::{Map, Value};

/// Name of a column and its JSON value.
pub(super) type JsonRow = Map<String, Value>;

/// A message that cannot be read as one of Debezium's.
#[derive(Debug, thiserror::Error)]
pub enum DebeziumError {
    /// It is not JSON, or a part of it has another type.
    #[error(
        "cannot read the message as a change event: it is not JSON of the expected shape; set \
         debezium.format.value=json in Debezium Server"
    )]
    Malformed(#[source] serde_json::Error),
    /// It has the shape of something else.
    #[error("cannot read the message as a change event: {found}; {remedy}")]
    OtherShape {
        /// The shape that it has.
        found: &'static str,
        /// The setting of Debezium to change.
        remedy: &'static str,
    },
    /// Its operation is not known.
    #[error("cannot apply the change event: its operation '{0}' is not known; upgrade the subscriber")]
    UnknownOperation(String),
    /// It lacks the row image that its operation needs.
    #[error("cannot apply the change event of table {table}: operation '{op}' has no row image")]
    NoImage {
        /// The table.
        table: String,
        /// The operation.
        op: String,
    },
}

/// A message of Debezium.
#[derive(Debug)]
pub(super) enum Envelope {
    /// A change of rows.
    Change(Box<RowChange>),
    /// Anything that changes no row.
    Control(Control),
}

/// A message that changes no row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Control {
    /// Follows a delete, for the compaction of Kafka.
    Tombstone,
    /// Sent at intervals; with the time at which it was made, in milliseconds since the Unix epoch.
    Heartbeat(i64),
    /// Begin or end of a transaction.
    Transaction,
    /// DDL of a connector that reports it.
    SchemaChange,
    /// A message that an application wrote into the write-ahead log.
    LogicalMessage,
}

/// A change of rows.
#[derive(Debug, Deserialize)]
pub(super) struct RowChange {
    pub(super) op: String,
    pub(super) before: Option<JsonRow>,
    pub(super) after: Option<JsonRow>,
    pub(super) source: Source,
    /// The schema that came with the message; `None` without `value.converter.schemas.enable`.
    #[serde(skip)]
    pub(super) schema: Option<DeclaredTypes>,
}

/// Place and time of a change.
#[derive(Debug, Deserialize)]
pub(super) struct Source {
    schema: Option<String>,
    db: Option<String>,
    pub(super) table: String,
    #[serde(default)]
    ts_ms: i64,
    ts_us: Option<i64>,
}

impl Source {
    /// The schema. MySQL and MariaDB have only databases.
    pub(super) fn schema(&self) -> &str {
        self.schema.as_deref().or(self.db.as_deref()).unwrap_or_default()
    }

    /// Commit time in microseconds since the Unix epoch.
    pub(super) fn committed_us(&self) -> i64 {
        self.ts_us.unwrap_or_else(|| self.ts_ms.saturating_mul(1_000))
    }
}

/// Reads the body of a message.
///
/// # Errors
/// [`DebeziumError`], naming the setting of Debezium that makes it send something else.
pub(super) fn read(body: &[u8]) -> Result<Envelope, DebeziumError> {
    if body.is_empty() {
        return Ok(Envelope::Control(Control::Tombstone));
    }
    let message: Value = serde_json::from_slice(body).map_err(DebeziumError::Malformed)?;
    let (schema, payload) = unwrap(message);
    if payload.is_null() {
        return Ok(Envelope::Control(Control::Tombstone));
    }
    let object = payload.as_object().ok_or(OTHER)?;
    if !object.contains_key("op") || !object.get("source").is_some_and(Value::is_object) {
        return control(object).map(Envelope::Control);
    }
    if object["op"] == "m" {
        return Ok(Envelope::Control(Control::LogicalMessage));
    }
    if object["source"].get("table").is_none() {
        return Err(NO_TABLE);
    }
    let change: RowChange = serde_json::from_value(payload).map_err(DebeziumError::Malformed)?;
    Ok(Envelope::Change(Box::new(RowChange { schema: schema.as_ref().map(declared_types), ..change })))
}

/// Separates the schema from the payload, if the message has exactly these two: a row may have columns of those names.
fn unwrap(mut message: Value) -> (Option<Value>, Value) {
    match message.as_object_mut() {
        Some(object)
            if object.len() == 2 && object.contains_key("schema") && object.contains_key("payload") =>
        {
            let schema = object.remove("schema").filter(|schema| !schema.is_null());
            (schema, object.remove("payload").unwrap_or_default())
        }
        _ => (None, message),
    }
}

const OTHER: DebeziumError = DebeziumError::OtherShape {
    found: "it has neither 'op' nor 'source', and is no control message",
    remedy: "send rows through no transform that rewrites them, such as ExtractNewRecordState or the outbox EventRouter",
};

const FLATTENED: DebeziumError = DebeziumError::OtherShape {
    found: "it is a row without its envelope (ExtractNewRecordState)",
    remedy: "remove this transform from debezium.transforms, or send to this stream from a connector without it",
};

const CLOUD_EVENT: DebeziumError = DebeziumError::OtherShape {
    found: "it is a CloudEvent",
    remedy: "set debezium.format.value=json in Debezium Server",
};

const NO_TABLE: DebeziumError = DebeziumError::OtherShape {
    found: "its source names no table",
    remedy: "use a connector of a relational database, such as PostgreSQL",
};

fn control(object: &JsonRow) -> Result<Control, DebeziumError> {
    let has = |name: &str| object.contains_key(name);
    let is_time = |name: &String| ["ts_ms", "ts_us", "ts_ns"].contains(&name.as_str());
    if object.keys().all(is_time)
        && let Some(made_ms) = object.get("ts_ms").and_then(Value::as_i64)
    {
        return Ok(Control::Heartbeat(made_ms));
    }
    if has("id") && object.get("status").is_some_and(|status| status == "BEGIN" || status == "END") {
        return Ok(Control::Transaction);
    }
    if has("ddl") && (has("databaseName") || has("tableChanges")) {
        return Ok(Control::SchemaChange);
    }
    if has("specversion") {
        return Err(CLOUD_EVENT);
    }
    if ["__op", "__deleted", "__table", "__schema", "__source_ts_ms"].into_iter().any(has) {
        return Err(FLATTENED);
    }
    Err(OTHER)
}

/// Types of the columns of the rows, from the schema of a message.
#[derive(Debug, Default)]
pub(super) struct DeclaredTypes {
    of_columns: BTreeMap<String, DeclaredType>,
}

/// Type of a column in the schema of a message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct DeclaredType {
    /// Type in JSON, such as `int64` or `string`.
    pub(super) plain: String,
    /// Meaning of the value, such as `io.debezium.time.Date`.
    pub(super) semantic: Option<String>,
}

impl DeclaredTypes {
    pub(super) fn of(&self, column: &str) -> Option<&DeclaredType> {
        self.of_columns.get(column)
    }
}

fn declared_types(schema: &Value) -> DeclaredTypes {
    let fields = |schema: &Value| schema.get("fields").and_then(Value::as_array).cloned().unwrap_or_default();
    let word = |column: &Value, name: &str| column.get(name).and_then(Value::as_str).map(str::to_owned);
    let mut types = DeclaredTypes::default();
    for image in fields(schema) {
        if !["before", "after"].map(Some).contains(&image.get("field").and_then(Value::as_str)) {
            continue;
        }
        for column in fields(&image) {
            if let (Some(field), Some(plain)) = (word(&column, "field"), word(&column, "type")) {
                let declared = DeclaredType { plain, semantic: word(&column, "name") };
                types.of_columns.insert(field, declared);
            }
        }
    }
    types
}

#[cfg(test)]
mod tests {
    use super::*;

    fn control_of(body: &str) -> Option<Control> {
        match read(body.as_bytes()) {
            Ok(Envelope::Control(control)) => Some(control),
            _ => None,
        }
    }

    fn error_of(body: &str) -> String {
        read(body.as_bytes()).map(drop).unwrap_err().to_string()
    }

    #[test]
    fn control_messages_are_recognised_by_their_shape_with_and_without_a_schema() {
        let source = r#"{"connector":"mysql","db":"shop","table":"users"}"#;
        let schema_change = format!(
            r#"{{"source":{source},"ts_ms":1,"databaseName":"shop","schemaName":null,"ddl":"ALTER TABLE users","tableChanges":[]}}"#
        );
        for (body, control) in [
            (r#"{"ts_ms":1767225600000}"#, Control::Heartbeat(1_767_225_600_000)),
            (r#"{"ts_ms":1,"ts_us":2,"ts_ns":3}"#, Control::Heartbeat(1)),
            (
                r#"{"status":"BEGIN","id":"7:1","event_count":null,"data_collections":null,"ts_ms":1}"#,
                Control::Transaction,
            ),
            (
                r#"{"status":"END","id":"7:1","event_count":2,"data_collections":[],"ts_ms":1}"#,
                Control::Transaction,
            ),
            (&*schema_change, Control::SchemaChange),
            (r#"{"op":"m","ts_ms":1,"source":{},"message":{}}"#, Control::LogicalMessage),
            ("null", Control::Tombstone),
        ] {
            assert_eq!(control_of(body), Some(control), "{body}");
            assert_eq!(
                control_of(&format!(r#"{{"schema":{{}},"payload":{body}}}"#)),
                Some(control),
                "{body}"
            );
        }
        assert_eq!(control_of(""), Some(Control::Tombstone));
    }

    #[test]
    fn other_shapes_are_refused_with_the_setting_to_change() {
        for (body, word) in [
            ("avro?", "debezium.format.value=json"),
            (r#"{"specversion":"1.0","id":"1","data":{"op":"c"}}"#, "debezium.format.value=json"),
            (r#"{"id":1,"email":"a@x","__op":"c","__deleted":"false"}"#, "ExtractNewRecordState"),
            (r#"{"id":1,"email":"a@x"}"#, "EventRouter"),
            (r#""{\"keys\":[]}""#, "EventRouter"),
            ("{}", "EventRouter"),
            (r#"{"id":1,"payload":"x"}"#, "EventRouter"),
            (r#"{"op":"c","source":{"connector":"mongodb","db":"shop","collection":"users"}}"#, "relational"),
            (r#"{"op":"c","source":{"schema":"public","table":"users"},"after":7}"#, "expected shape"),
        ] {
            let error = error_of(body);
            assert!(error.contains(word) && error.starts_with("cannot "), "{body}: {error}");
        }
    }
}
