use std::collections::{BTreeMap, HashMap};

use event::{CacheKey, Change, CommittedEvent, EventId, MAX_KEYS};
use rules::{Cell, Image, MissingValue, Rules, TableRules};
use serde::Deserialize;
use serde_json::{Map, Value};

/// What Debezium sends instead of a large value that did not change (its `unavailable.value.placeholder`).
const UNAVAILABLE: &str = "__debezium_unavailable_value";

/// Semantic types whose text is the one Postgres writes.
const PLAIN_TYPES: [&str; 2] = ["io.debezium.data.Uuid", "io.debezium.data.Enum"];

/// Why a message is no change event that the rules can be applied to.
#[derive(Debug, thiserror::Error)]
pub enum DebeziumError {
    /// It is not JSON of the expected shape.
    #[error("message is not a change event of Debezium in JSON")]
    Malformed(#[source] serde_json::Error),
    /// It does something else than rows do.
    #[error("change event has the operation '{0}', which is not known; upgrade the subscriber")]
    UnknownOperation(String),
    /// It lacks the row image its operation needs.
    #[error("table {table}: change event '{op}' has no row image")]
    NoImage {
        /// The table.
        table: String,
        /// The operation.
        op: String,
    },
    /// A value in an encoding other than the text of Postgres.
    #[error("table {table}, column {column}: {reason}")]
    Encoding {
        /// The table.
        table: String,
        /// The column.
        column: String,
        /// What is wrong and which setting of Debezium to change.
        reason: String,
    },
    /// A value that a key needs is not there.
    #[error(transparent)]
    Missing(#[from] MissingValue),
}

#[derive(Deserialize)]
struct Payload {
    op: String,
    before: Option<Map<String, Value>>,
    after: Option<Map<String, Value>>,
    source: Source,
}

#[derive(Deserialize)]
struct Source {
    schema: String,
    table: String,
    #[serde(default)]
    ts_ms: i64,
}

/// The events that a message stands for; none for tombstones, for tables without rules, and where no key changed.
///
/// # Errors
/// [`DebeziumError`]; the message is poison then.
pub fn decode(body: &[u8], rules: &Rules) -> Result<Vec<CommittedEvent>, DebeziumError> {
    if body.is_empty() {
        return Ok(Vec::new());
    }
    let mut message: Value = serde_json::from_slice(body).map_err(DebeziumError::Malformed)?;
    let types = declared_types(&message);
    // With `value.converter.schemas.enable` the event is wrapped together with its schema.
    if let Some(payload) = message.get_mut("payload") {
        message = payload.take();
    }
    if message.is_null() || message.get("op").is_some_and(|op| op == "m") {
        return Ok(Vec::new());
    }
    let payload: Payload = serde_json::from_value(message).map_err(DebeziumError::Malformed)?;
    let Some(table) = rules.table(&payload.source.schema, &payload.source.table) else {
        return Ok(Vec::new());
    };
    let at_us = payload.source.ts_ms.saturating_mul(1_000);
    let keys = match payload.op.as_str() {
        "t" => {
            let namespaces = table.on_truncate.namespaces().to_vec();
            let event = (!namespaces.is_empty()).then(|| event(namespaces, Change::Namespace, at_us));
            return Ok(event.into_iter().collect());
        }
        "c" | "r" => changed(table, &types, None, Some(needed(table, &payload.op, payload.after)?))?,
        "d" => changed(table, &types, Some(needed(table, &payload.op, payload.before)?), None)?,
        "u" => {
            let after = needed(table, &payload.op, payload.after)?;
            changed(table, &types, payload.before, Some(after))?
        }
        other => return Err(DebeziumError::UnknownOperation(other.to_owned())),
    };
    Ok(keys.chunks(MAX_KEYS).map(|keys| event(keys.to_vec(), Change::Delete, at_us)).collect())
}

fn event(keys: Vec<CacheKey>, change: Change, at_us: i64) -> CommittedEvent {
    CommittedEvent { id: EventId::generate(), keys, change, xids: Vec::new(), at_us, traceparent: None }
}

fn needed(
    table: &TableRules,
    op: &str,
    image: Option<Map<String, Value>>,
) -> Result<Map<String, Value>, DebeziumError> {
    image.ok_or_else(|| DebeziumError::NoImage { table: table.qualified_name(), op: op.to_owned() })
}

fn changed(
    table: &TableRules,
    types: &BTreeMap<String, String>,
    before: Option<Map<String, Value>>,
    after: Option<Map<String, Value>>,
) -> Result<Vec<CacheKey>, DebeziumError> {
    let read =
        |image: Option<Map<String, Value>>| image.map(|image| Row::read(table, types, &image)).transpose();
    let (before, after) = (read(before)?, read(after)?);
    let expansion = table
        .keys(before.as_ref().map(|row| row as &dyn Image), after.as_ref().map(|row| row as &dyn Image))?;
    for refused in &expansion.refused {
        tracing::warn!("{refused}");
    }
    Ok(expansion.keys)
}

/// The columns that rules look at.
struct Row {
    cells: HashMap<String, Option<String>>,
}

impl Row {
    fn read(
        table: &TableRules,
        types: &BTreeMap<String, String>,
        image: &Map<String, Value>,
    ) -> Result<Self, DebeziumError> {
        let needed = table.needed_columns();
        let mut cells = HashMap::new();
        for column in table.compared_columns() {
            let Some(value) = image.get(column) else { continue };
            let text = match text(value, types.get(column).map(String::as_str)) {
                Ok(text) => text,
                // Columns that are only watched are compared, in whatever encoding they come.
                Err(_) if !needed.contains(column) => Some(value.to_string()),
                Err(reason) => {
                    let (table, column) = (table.qualified_name(), column.to_owned());
                    return Err(DebeziumError::Encoding { table, column, reason });
                }
            };
            cells.insert(column.to_owned(), text);
        }
        Ok(Self { cells })
    }
}

impl Image for Row {
    fn cell(&self, column: &str) -> Cell<'_> {
        match self.cells.get(column) {
            Some(Some(text)) if text == UNAVAILABLE => Cell::Unchanged,
            Some(Some(text)) => Cell::Text(text),
            Some(None) => Cell::Null,
            None => Cell::Absent,
        }
    }
}

/// The value as Postgres writes it, or what to change so that Debezium sends it so.
fn text(value: &Value, declared: Option<&str>) -> Result<Option<String>, String> {
    if let Some(declared) = declared.filter(|declared| !PLAIN_TYPES.contains(declared)) {
        let remedy = if declared.contains("Decimal") || declared.contains("VariableScale") {
            "set decimal.handling.mode=string in Debezium"
        } else if declared.contains("time") || declared.contains("Date") {
            "Debezium never sends times as Postgres writes them; use a generated text column"
        } else {
            "use a column of integers, text, boolean or uuid"
        };
        return Err(format!("Debezium sends it as {declared}; {remedy}"));
    }
    match value {
        Value::Null => Ok(None),
        Value::String(text) => Ok(Some(text.clone())),
        Value::Bool(value) => Ok(Some(if *value { "t" } else { "f" }.to_owned())),
        Value::Number(number) if !number.is_f64() => Ok(Some(number.to_string())),
        Value::Number(_) => Err("Debezium sends it as a floating point number; set decimal.handling.mode=string in Debezium".to_owned()),
        Value::Array(_) | Value::Object(_) => Err("Debezium sends it as a structure; use decimal.handling.mode=string if it is a number, or a column of another type".to_owned()),
    }
}

/// Types of the columns that are more than JSON shows, from the schema that comes with the event, if one does.
fn declared_types(message: &Value) -> BTreeMap<String, String> {
    let fields = |schema: &Value| schema.get("fields").and_then(Value::as_array).cloned().unwrap_or_default();
    let images = message.get("schema").map(fields).unwrap_or_default();
    let image = images.iter().filter(|field| {
        field.get("field").and_then(Value::as_str).is_some_and(|name| name == "before" || name == "after")
    });
    let mut types = BTreeMap::new();
    for column in image.flat_map(fields) {
        let word = |name: &str| column.get(name).and_then(Value::as_str).map(str::to_owned);
        let raw = word("type").filter(|raw| ["bytes", "float", "double"].contains(&raw.as_str()));
        if let (Some(field), Some(declared)) = (word("field"), word("name").or(raw)) {
            types.insert(field, declared);
        }
    }
    types
}

#[cfg(test)]
mod tests {
    use super::*;

    const RULES: &str = r#"
[[table]]
name = "users"
columns = ["name"]
keys = ["user:{id}", "user:{email}", "active:{active}:{id}"]
on_truncate = ["user:"]
[[table]]
name = "shop.prices"
keys = ["price:{amount}"]
on_truncate = "ignore"
"#;

    fn keys(body: &str) -> Result<Vec<String>, DebeziumError> {
        let rules = Rules::parse("rules.toml", RULES).unwrap();
        let events = decode(body.as_bytes(), &rules)?;
        Ok(events.into_iter().flat_map(|event| event.keys).map(CacheKey::into_string).collect())
    }

    fn change(op: &str, before: &str, after: &str) -> String {
        format!(
            r#"{{"before":{before},"after":{after},"source":{{"version":"2.7.0.Final","connector":"postgresql","name":"shop",
            "ts_ms":1767225600000,"db":"shop","schema":"public","table":"users","txId":771,"lsn":24023128,"snapshot":"false"}},
            "transaction":null,"op":"{op}","ts_ms":1767225600120}}"#
        )
    }

    const ADA: &str = r#"{"id":1,"name":"Ada","email":"a@x","active":true,"seen":1}"#;
    const MOVED: &str = r#"{"id":1,"name":"Ada","email":"b@x","active":true,"seen":1}"#;

    #[test]
    fn every_operation_is_expanded_by_the_rules() {
        let all = ["user:1", "user:a@x", "active:t:1"];
        assert_eq!(keys(&change("c", "null", ADA)).unwrap(), all);
        assert_eq!(keys(&change("r", "null", ADA)).unwrap(), all);
        assert_eq!(keys(&change("d", ADA, "null")).unwrap(), all);
        assert_eq!(keys(&change("u", ADA, MOVED)).unwrap(), ["user:1", "user:a@x", "active:t:1", "user:b@x"]);
        assert_eq!(
            keys(&change("u", "null", ADA)).unwrap(),
            all,
            "without the old image as with the default identity"
        );
        assert!(keys(&change("u", ADA, &ADA.replace(r#""seen":1"#, r#""seen":2"#))).unwrap().is_empty());
        assert_eq!(keys(&change("t", "null", "null")).unwrap(), ["user:"]);
        assert!(
            matches!(keys(&change("x", "null", ADA)), Err(DebeziumError::UnknownOperation(op)) if op == "x")
        );
        assert!(matches!(keys(&change("d", "null", "null")), Err(DebeziumError::NoImage { .. })));
    }

    #[test]
    fn tombstones_messages_and_tables_without_rules_ask_for_nothing() {
        let other = change("c", "null", ADA).replace(r#""table":"users""#, r#""table":"orders""#);
        let other_schema = change("c", "null", ADA).replace(r#""schema":"public""#, r#""schema":"old""#);
        for body in [
            "",
            "null",
            r#"{"schema":null,"payload":null}"#,
            r#"{"op":"m","message":{}}"#,
            &other,
            &other_schema,
        ] {
            assert!(keys(body).unwrap().is_empty(), "{body}");
        }
        assert!(matches!(keys("{}"), Err(DebeziumError::Malformed(_))));
        assert!(matches!(keys("avro?"), Err(DebeziumError::Malformed(_))));
    }

    #[test]
    fn a_value_that_was_not_sent_is_taken_from_the_old_image_or_named() {
        let unavailable = MOVED.replace("b@x", UNAVAILABLE);
        assert_eq!(keys(&change("u", ADA, &unavailable)).unwrap().len(), 0, "nothing watched changed");
        let renamed = unavailable.replace("\"Ada\"", "\"Eva\"");
        assert_eq!(keys(&change("u", ADA, &renamed)).unwrap(), ["user:1", "user:a@x", "active:t:1"]);
        let error = keys(&change("u", "null", &renamed)).unwrap_err();
        assert!(error.to_string().contains("column email"), "{error}");
    }

    #[test]
    fn encodings_that_are_not_the_text_of_postgres_are_named_with_the_setting_to_change() {
        let wrapped = |kind: &str, amount: &str| {
            format!(
                r#"{{"schema":{{"type":"struct","fields":[{{"type":"struct","field":"after","fields":[
                {{"type":"int32","field":"id"}},{{{kind},"field":"amount"}}]}}]}},
                "payload":{{"before":null,"after":{{"id":1,"amount":{amount}}},"op":"c",
                "source":{{"schema":"shop","table":"prices","ts_ms":1}}}}}}"#
            )
        };
        let decimal = r#""type":"bytes","name":"org.apache.kafka.connect.data.Decimal""#;
        let error = keys(&wrapped(decimal, "\"BfU=\"")).unwrap_err().to_string();
        assert!(error.starts_with("table shop.prices, column amount:"), "{error}");
        assert!(error.contains("decimal.handling.mode=string"), "{error}");
        let time = r#""type":"int64","name":"io.debezium.time.MicroTimestamp""#;
        assert!(keys(&wrapped(time, "1")).unwrap_err().to_string().contains("generated text column"));
        assert!(keys(&wrapped(r#""type":"double""#, "1.5")).is_err());
        let uuid = r#""type":"string","name":"io.debezium.data.Uuid""#;
        assert_eq!(keys(&wrapped(uuid, "\"6ec0bd7f\"")).unwrap(), ["price:6ec0bd7f"]);
        assert_eq!(keys(&wrapped(r#""type":"string""#, "\"10.50\"")).unwrap(), ["price:10.50"]);
    }
}
