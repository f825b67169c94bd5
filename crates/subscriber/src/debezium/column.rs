//! Values of columns as the text that Postgres writes.

use rules::Lock;
use serde_json::Value;

use super::envelope::DeclaredType;

/// Text that Debezium sends in place of a large value that did not change (its `unavailable.value.placeholder`).
pub(super) const UNAVAILABLE: &str = "__debezium_unavailable_value";

/// Semantic types whose text is the one Postgres writes.
const TEXT_TYPES: [&str; 2] = ["io.debezium.data.Uuid", "io.debezium.data.Enum"];

/// Types of a schema whose JSON values Postgres would write the same.
const PLAIN_TYPES: [&str; 6] = ["int8", "int16", "int32", "int64", "boolean", "string"];

/// Said of a value whose type neither a schema nor a lock file tells.
const UNKNOWN_TYPE: &str = "its type is not known, since messages come without a schema; set SUBSCRIBER_RULES_LOCK to the \
                            file that `relay rules check --lock` writes, or value.converter.schemas.enable=true in Debezium";

/// Said of values of type `numeric` in another form than text.
const SET_DECIMAL: &str = "set decimal.handling.mode=string in Debezium";

/// Said of values that no setting of Debezium changes.
const OTHER_COLUMN: &str = "use a column of integers, text, boolean or uuid, an ordinary one that a trigger fills if need be, \
                            or capture with the relay";

/// A value whose text is not known, and the remedy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Unreadable(pub(super) String);

/// Everything that is known about the type of a column.
#[derive(Debug, Clone, Copy)]
pub(super) struct ColumnType<'a> {
    /// The type in the lock file.
    pub(super) locked: Option<&'a str>,
    /// The type in the schema of the message.
    pub(super) declared: Option<&'a DeclaredType>,
}

/// Returns the value as Postgres writes it; `None` is NULL.
///
/// # Errors
/// [`Unreadable`], if that is not certain.
pub(super) fn text(value: &Value, column: ColumnType<'_>) -> Result<Option<String>, Unreadable> {
    match (column.locked, column.declared) {
        (None, None) => return Err(Unreadable(UNKNOWN_TYPE.to_owned())),
        (Some(locked), _) if !Lock::is_sent_as_text(locked) => return Err(of_type(locked)),
        (_, Some(declared)) if !is_text(declared) => return Err(of_declared(declared)),
        _ => {}
    }
    let text = plain_text(value)?;
    match (column.locked, &text) {
        (Some(locked), Some(text)) if !fits(locked, value, text) => Err(of_other_form(locked)),
        _ => Ok(text),
    }
}

/// The text of a JSON value, whatever its column's type.
fn plain_text(value: &Value) -> Result<Option<String>, Unreadable> {
    match value {
        Value::Null => Ok(None),
        Value::String(text) => Ok(Some(text.clone())),
        Value::Bool(value) => Ok(Some(if *value { "t" } else { "f" }.to_owned())),
        Value::Number(number) if !number.is_f64() => Ok(Some(number.to_string())),
        Value::Number(_) => {
            Err(Unreadable(format!("Debezium sends it as a floating point number; {SET_DECIMAL}")))
        }
        Value::Array(_) | Value::Object(_) => Err(Unreadable(format!(
            "Debezium sends it as a structure; if it is a number, {SET_DECIMAL}; else {OTHER_COLUMN}"
        ))),
    }
}

/// The text of a value of unknown type, if it has one: a guess.
pub(super) fn guess(value: &Value) -> Option<String> {
    plain_text(value).ok().flatten()
}

fn is_text(declared: &DeclaredType) -> bool {
    match &declared.semantic {
        Some(semantic) => TEXT_TYPES.contains(&semantic.as_str()),
        None => PLAIN_TYPES.contains(&declared.plain.as_str()),
    }
}

fn of_declared(declared: &DeclaredType) -> Unreadable {
    let name = declared.semantic.as_deref().unwrap_or(&declared.plain);
    let is_number = ["Decimal", "float", "double"].iter().any(|word| name.ends_with(word));
    let remedy = if is_number { SET_DECIMAL } else { OTHER_COLUMN };
    Unreadable(format!("Debezium sends it as {name}, not as Postgres writes it; {remedy}"))
}

fn of_type(locked: &str) -> Unreadable {
    Unreadable(format!(
        "Debezium does not send values of type {locked} as Postgres writes them; {OTHER_COLUMN}"
    ))
}

fn of_other_form(locked: &str) -> Unreadable {
    let remedy = if locked == "numeric" {
        SET_DECIMAL
    } else {
        "if the column's type was changed, write the lock file again with `relay rules check --lock`"
    };
    Unreadable(format!("Debezium sends it in another form than values of type {locked} have; {remedy}"))
}

/// Tells whether a JSON value can be one of this type: without a schema other types look similar.
fn fits(locked: &str, value: &Value, text: &str) -> bool {
    match locked {
        "int2" | "int4" | "int8" | "oid" => value.is_number(),
        "bool" => value.is_boolean(),
        "numeric" => value.is_string() && is_numeric(text),
        _ => value.is_string(),
    }
}

/// Tells the text of a `numeric` from the base64 of its bytes, which `decimal.handling.mode=precise` sends.
fn is_numeric(text: &str) -> bool {
    let digits = text.strip_prefix('-').unwrap_or(text);
    let (whole, fraction) = digits.split_once('.').unwrap_or((digits, "0"));
    let is_number = |digits: &str| !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit());
    let has_no_leading_zero = whole == "0" || !whole.starts_with('0');
    (is_number(whole) && is_number(fraction) && has_no_leading_zero) || ["NaN", "Infinity"].contains(&digits)
}

/// Tells whether a value could be the one that Debezium fills in for a column whose old value it does not know: NULL, or the
/// zero of the type where NULL is not allowed.
pub(super) fn is_placeholder(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Bool(value) => !value,
        Value::Number(number) => number.as_f64() == Some(0.0),
        Value::String(text) => text.bytes().all(|byte| byte == b'0' || byte == b'.' || byte == b' '),
        Value::Array(values) => values.is_empty(),
        Value::Object(_) => false,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn of(value: Value, locked: &str) -> Result<Option<String>, Unreadable> {
        text(&value, ColumnType { locked: Some(locked), declared: None })
    }

    #[test]
    fn a_value_in_the_form_of_another_type_is_no_text() {
        assert_eq!(of(json!(7), "int8").unwrap().as_deref(), Some("7"));
        assert_eq!(of(json!("7"), "text").unwrap().as_deref(), Some("7"));
        assert_eq!(of(json!(false), "bool").unwrap().as_deref(), Some("f"));
        assert_eq!(of(json!(null), "int8"), Ok(None));
        for number in ["0", "0.50", "-10.50", "12345678901234567890", "NaN", "-Infinity"] {
            assert_eq!(of(json!(number), "numeric").unwrap().as_deref(), Some(number));
        }
        for (value, locked) in [
            (json!("7"), "int8"),
            (json!(7), "text"),
            (json!("t"), "bool"),
            (json!("BfU="), "numeric"),
            (json!("0050"), "numeric"),
            (json!(10.5), "numeric"),
            (json!(10), "numeric"),
            (json!(1.0), "int8"),
            (json!("Ada"), "name"),
            (json!(null), "name"),
            (json!(20785), "date"),
            (json!(true), "bit"),
        ] {
            assert!(of(value.clone(), locked).is_err(), "{value} as {locked}");
        }
    }

    #[test]
    fn what_cannot_be_read_is_named_with_the_setting_to_change() {
        let declared = |plain: &str, semantic: Option<&str>| {
            let declared = DeclaredType { plain: plain.to_owned(), semantic: semantic.map(str::to_owned) };
            text(&json!(1), ColumnType { locked: None, declared: Some(&declared) }).map_err(|error| error.0)
        };
        assert_eq!(declared("int64", None).unwrap().as_deref(), Some("1"));
        for (plain, semantic, word) in [
            ("bytes", Some("org.apache.kafka.connect.data.Decimal"), "decimal.handling.mode=string"),
            ("struct", Some("io.debezium.data.VariableScaleDecimal"), "decimal.handling.mode=string"),
            ("double", None, "decimal.handling.mode=string"),
            ("int64", Some("io.debezium.time.MicroTimestamp"), "a trigger fills"),
            ("bytes", None, "capture with the relay"),
        ] {
            let error = declared(plain, semantic).unwrap_err();
            assert!(error.contains(word), "{error}");
        }
        let unknown = text(&json!(1), ColumnType { locked: None, declared: None }).unwrap_err().0;
        assert!(unknown.contains("SUBSCRIBER_RULES_LOCK") && unknown.contains("schemas.enable"), "{unknown}");
    }
}
