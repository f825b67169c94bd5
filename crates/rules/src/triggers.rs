//! Capture by triggers: for every watched table statement-level triggers that put the keys of changed rows into the
//! outbox, in the writer's own transaction.

mod apply;
mod expression;
mod function;
mod install;

pub use apply::{ApplyError, apply, apply_in_parts, lock};
pub use function::{Function, KEYS_PER_EVENT, Trigger, functions};
pub use install::{Plan, Step, plan, removal, script};

/// All names of ours begin so.
pub const PREFIX: &str = "outbox_capture_";

/// A name as SQL spells it.
pub(crate) fn identifier(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// A text as SQL spells it, whatever `standard_conforming_strings` is when it is read.
pub(crate) fn literal(text: &str) -> String {
    let quoted = text.replace('\'', "''");
    if quoted.contains('\\') { format!("E'{}'", quoted.replace('\\', "\\\\")) } else { format!("'{quoted}'") }
}

/// A body of a function between dollar quotes that it does not contain.
pub(crate) fn dollar_quoted(body: &str) -> String {
    let mut tag = "$capture$".to_owned();
    while body.contains(&tag) {
        tag.insert(1, 'x');
    }
    format!("{tag}{body}{tag}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_rule_says_cannot_leave_its_quotes() {
        assert_eq!(identifier("a\"b"), "\"a\"\"b\"");
        assert_eq!(literal("it's"), "'it''s'");
        assert_eq!(literal("a\\'b"), "E'a\\\\''b'");
        assert_eq!(dollar_quoted("x $capture$ y"), "$xcapture$x $capture$ y$xcapture$");
    }
}
