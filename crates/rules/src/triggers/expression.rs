//! SQL expressions of what a rule says, over a row image named `i`.

use super::{identifier, literal};
use crate::catalog::{Column, Facts};
use crate::condition::Condition;
use crate::template::{Part, Template};

/// The value of a column as the write-ahead log has it: as the type's output function writes it. For some types a cast to
/// text differs (`true`, blanks trimmed, `/32` added), so those go through `concat`, which is slower.
pub(super) fn text_of(column: &Column, row: &str) -> String {
    let name = identifier(&column.name);
    match column.base_type.as_str() {
        "bool" | "bpchar" | "inet" | "cidr" => {
            format!("case when {row}.{name} is not null then concat({row}.{name}) end")
        }
        "text" => format!("{row}.{name}"),
        _ => format!("{row}.{name}::text"),
    }
}

/// A value that is equal to another exactly if their texts are.
pub(super) fn comparable(column: &Column, row: &str) -> String {
    if column.is_compared_as_it_is() {
        format!("{row}.{}", identifier(&column.name))
    } else {
        format!("{} collate \"C\"", text_of(column, row))
    }
}

/// The key of a template; NULL if a column is. Columns of the image are text already.
pub(super) fn key(template: &Template) -> String {
    let part = |part: &Part| match part {
        Part::Literal(text) => literal(text),
        Part::Column(name) => format!("i.{}", identifier(name)),
    };
    template.parts().iter().map(part).collect::<Vec<_>>().join(" || ")
}

/// Whether an image counts: never NULL.
pub(super) fn condition(condition: &Condition) -> String {
    match condition {
        Condition::OneOf { column, values } => {
            let values: Vec<String> = values.iter().map(|value| literal(value)).collect();
            format!("coalesce(i.{} collate \"C\" in ({}), false)", identifier(column), values.join(", "))
        }
        Condition::IsNull { column } => format!("i.{} is null", identifier(column)),
        Condition::Not(inner) => format!("not ({})", self::condition(inner)),
    }
}

/// Whether a key of the template may be none that a cache can have, whatever its columns hold.
pub(super) fn may_be_refused(template: &Template, facts: &Facts) -> bool {
    // The longest text of any other type, an IPv6 network, has fewer bytes than this.
    const LONGEST_VALUE: usize = 64;
    let free = template.columns().any(|name| facts.column(name).is_none_or(Column::is_free_text));
    free || template.as_str().len() + template.columns().count() * LONGEST_VALUE > event::MAX_KEY_BYTES
}
