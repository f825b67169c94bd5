use std::collections::BTreeSet;
use std::fmt::Write;

use event::MAX_KEY_BYTES;
use xxhash_rust::xxh3::xxh3_64;

use super::expression::{comparable, condition, key, may_be_refused, text_of};
use super::{PREFIX, dollar_quoted, identifier, literal};
use crate::PINNED_SETTINGS;
use crate::catalog::expand::definition;
use crate::catalog::{Column, Facts};
use crate::table::TableRules;

/// Most keys in one event: a statement that changes 100,000 rows enqueues about 100.
pub const KEYS_PER_EVENT: usize = 1_000;

/// Longest name Postgres keeps, in bytes.
const MAX_NAME_BYTES: usize = 63;

/// Names of the transition tables.
const OLD: &str = "old_rows";
const NEW: &str = "new_rows";

/// Name of the primary key, as it is, in an image; no column of a rule has a name with this character.
const PRIMARY_KEY: &str = "\"=key\"";

/// A function in the schema `outbox`, and the trigger that calls it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Function {
    /// Its name, without the schema.
    pub name: String,
    /// Arguments as SQL.
    pub arguments: String,
    /// The statement that creates or replaces it.
    pub definition: String,
    /// Comment: what it is for, and a hash of the definition by which a change is noticed.
    pub comment: String,
    /// The trigger, if the function is one of a trigger.
    pub trigger: Option<Trigger>,
    /// The schema whose tables its names are bound to when it is created, if they are.
    pub bound_in: Option<String>,
}

/// What a trigger reacts to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trigger {
    /// After an INSERT statement, COPY included.
    Insert,
    /// After an UPDATE statement.
    Update,
    /// After a DELETE statement.
    Delete,
    /// After TRUNCATE.
    Truncate,
}

impl Trigger {
    /// Name of the trigger and of the event.
    fn word(self) -> &'static str {
        match self {
            Self::Insert => "insert",
            Self::Update => "update",
            Self::Delete => "delete",
            Self::Truncate => "truncate",
        }
    }

    /// Name of the trigger on each table.
    #[must_use]
    pub fn name(self) -> String {
        format!("{PREFIX}{}", self.word())
    }

    /// The statement that creates it.
    #[must_use]
    pub fn definition(self, schema: &str, table: &str, function: &str) -> String {
        let tables = match self {
            Self::Insert => format!(" referencing new table as {NEW}"),
            Self::Update => format!(" referencing old table as {OLD} new table as {NEW}"),
            Self::Delete => format!(" referencing old table as {OLD}"),
            Self::Truncate => String::new(),
        };
        format!(
            "create or replace trigger {} after {} on {}.{}{tables} for each statement execute function outbox.{}()",
            self.name(),
            self.word(),
            identifier(schema),
            identifier(table),
            identifier(function),
        )
    }
}

/// The functions that capture changes of a table.
#[must_use]
pub fn functions(table: &TableRules, facts: &Facts) -> Vec<Function> {
    let generator = Generator { table, facts };
    let mut functions = Vec::new();
    let mut expands = Vec::new();
    if let Some(column) = facts.single_key() {
        for (nth, expand) in table.expand.iter().enumerate() {
            let function = generator.expand(nth + 1, column, &expand.sql.value);
            expands.push(function.name.clone());
            functions.push(function);
        }
    }
    for trigger in [Trigger::Insert, Trigger::Update, Trigger::Delete] {
        functions.push(generator.capture(trigger, &expands));
    }
    if !table.on_truncate.namespaces().is_empty() {
        functions.push(generator.truncate());
    }
    functions
}

struct Generator<'a> {
    table: &'a TableRules,
    facts: &'a Facts,
}

impl Generator<'_> {
    /// `outbox_capture_<schema>_<table>_<hash>_<what>`: readable, and distinct whatever underscores the names have.
    fn name(&self, what: &str) -> String {
        let hash = format!("{:08x}", xxh3_64(self.table.qualified_name().as_bytes()) >> 32);
        let room = MAX_NAME_BYTES - PREFIX.len() - hash.len() - what.len() - 2;
        let mut readable = format!("{}_{}", self.table.schema, self.table.name);
        while readable.len() > room {
            readable.pop();
        }
        format!("{PREFIX}{readable}_{hash}_{what}")
    }

    fn function(&self, what: &str, arguments: String, rest: &str, trigger: Option<Trigger>) -> Function {
        let name = self.name(what);
        let definition =
            format!("create or replace function outbox.{}({arguments}) {rest}", identifier(&name));
        let hash = xxh3_64(definition.as_bytes());
        let comment = format!("Capture of {}, made by relay rules; {hash:016x}", self.table.qualified_name());
        Function { name, arguments, definition, comment, trigger, bound_in: None }
    }

    /// A function for the user's SQL, so that `$1` is the array of keys.
    fn expand(&self, nth: usize, key: &Column, sql: &str) -> Function {
        let schema = &self.table.schema;
        let rest = definition(schema, sql);
        let function = self.function(&format!("expand_{nth}"), key.array_type.clone(), &rest, None);
        Function { bound_in: Some(schema.clone()), ..function }
    }

    fn of_trigger(&self, trigger: Trigger, body: &str) -> Function {
        let rest = format!("{} as {}", self.head(), dollar_quoted(body));
        self.function(trigger.word(), String::new(), &rest, Some(trigger))
    }

    fn truncate(&self) -> Function {
        let namespaces: Vec<String> =
            self.table.on_truncate.namespaces().iter().map(|namespace| literal(namespace.as_str())).collect();
        let body = format!(
            "\nbegin\n    insert into outbox.events (id, topic, keys, namespace)\n    values (outbox.new_id(), {}, \
             array[{}], true);\n    return null;\nend\n",
            literal(self.table.topic.as_str()),
            namespaces.join(", ")
        );
        self.of_trigger(Trigger::Truncate, &body)
    }

    /// Owned by who may write the outbox, so that writers of the table need no right on it. No plan is compiled just in
    /// time: the plan is kept, and the first statement may have been a huge one.
    fn head(&self) -> String {
        let mut head =
            "returns trigger language plpgsql security definer set search_path = pg_catalog, pg_temp set jit = off"
                .to_owned();
        // What has floats in it is compared by its text, which must tell apart what differs, whatever the writer has set.
        if self.compared().iter().any(|column| column.may_have_floats()) {
            head.push_str(" set extra_float_digits = 1");
        }
        let needed = self.table.needed_columns();
        if self
            .facts
            .columns
            .iter()
            .any(|column| needed.contains(column.name.as_str()) && column.depends_on_settings())
        {
            for (setting, value) in PINNED_SETTINGS {
                let _ = write!(
                    head,
                    " set {setting} = {}",
                    value.split(", ").map(literal).collect::<Vec<_>>().join(", ")
                );
            }
        }
        head
    }

    fn capture(&self, trigger: Trigger, expands: &[String]) -> Function {
        let checked = !expands.is_empty()
            || self.table.keys.iter().any(|template| may_be_refused(&template.value, self.facts));
        let topic = literal(self.table.topic.as_str());
        let mut body = "\ndeclare\n    keys text[];\n".to_owned();
        if checked {
            body.push_str("    skipped bigint;\n");
        }
        body.push_str("begin\n");
        body.push_str(&self.collect(trigger, expands, checked));
        if checked {
            let _ = write!(
                body,
                "    if skipped > 0 then\n        raise warning '% keys of table % are no cache keys (empty, above {MAX_KEY_BYTES} \
                 bytes or with control characters) and were not invalidated', skipped, {};\n    end if;\n",
                literal(&self.table.qualified_name())
            );
        }
        let _ = write!(
            body,
            "    if cardinality(keys) <= {KEYS_PER_EVENT} then
        insert into outbox.events (id, topic, keys) values (outbox.new_id(), {topic}, keys);
    elsif keys is not null then
        insert into outbox.events (id, topic, keys)
        select outbox.new_id(), {topic}, array_agg(k.key)
        from unnest(keys) with ordinality k (key, nth) group by (k.nth - 1) / {KEYS_PER_EVENT};
    end if;
    return null;
end\n"
        );
        self.of_trigger(trigger, &body)
    }

    /// The statement that puts the distinct keys of all changed rows into `keys`.
    fn collect(&self, trigger: Trigger, expands: &[String], checked: bool) -> String {
        let valid = format!(
            "octet_length(k.key) between 1 and {MAX_KEY_BYTES} and k.key !~ {}",
            literal("[\\x01-\\x1f\\x7f-\\x9f]")
        );
        let (filter, skipped, into) = if checked {
            (
                format!(" filter (where {valid})"),
                format!(", count(*) filter (where not ({valid}))"),
                "keys, skipped",
            )
        } else {
            (String::new(), String::new(), "keys")
        };
        let condition = self.table.when.as_ref().map(|when| format!(" where {}", condition(&when.value)));
        let condition = condition.unwrap_or_default();
        let images = self.images(trigger, !expands.is_empty());
        let (with, source) = if expands.is_empty() {
            (String::new(), format!("({images})"))
        } else {
            (format!("    with images as materialized (\n        {images})\n"), "images".to_owned())
        };
        let keys: Vec<String> = self.table.keys.iter().map(|template| key(&template.value)).collect();
        let mut selects = match keys.as_slice() {
            [] => Vec::new(),
            [one] => vec![format!("select {one} as key from {source} i{condition}")],
            many => {
                let rows: Vec<String> = many.iter().map(|key| format!("({key})")).collect();
                let rows = rows.join(", ");
                vec![format!(
                    "select v.key from {source} i cross join lateral (values {rows}) v (key){condition}"
                )]
            }
        };
        for expand in expands {
            selects.push(format!(
                "select e.key from outbox.{}((select array_agg(distinct i.{PRIMARY_KEY}) from {source} i{condition})) e (key)",
                identifier(expand)
            ));
        }
        format!(
            "{with}    select array_agg(distinct k.key){filter}{skipped} into {into}\n    from (\n        {}\n    ) k \
             where k.key is not null;\n",
            selects.join("\n        union all\n        ")
        )
    }

    /// The row images that count, with the columns that rules need, as text.
    fn images(&self, trigger: Trigger, with_primary_key: bool) -> String {
        match trigger {
            Trigger::Insert => self.image(NEW, with_primary_key),
            Trigger::Delete => self.image(OLD, with_primary_key),
            _ if self.table.columns.is_none() => {
                format!(
                    "{} union all {}",
                    self.image(NEW, with_primary_key),
                    self.image(OLD, with_primary_key)
                )
            }
            _ => self.changed_images(with_primary_key),
        }
    }

    fn image(&self, rows: &str, with_primary_key: bool) -> String {
        let columns = self.image_columns("r").into_iter().map(|(sql, name)| format!("{sql} as {name}"));
        let mut columns: Vec<String> = columns.collect();
        if let (true, Some(key)) = (with_primary_key, self.facts.single_key()) {
            columns.push(format!("r.{} as {PRIMARY_KEY}", identifier(&key.name)));
        }
        format!("select {} from {rows} r", columns.join(", "))
    }

    /// Expressions of the needed columns and their names. At least one, since a row without columns is no row to SQL.
    fn image_columns(&self, row: &str) -> Vec<(String, String)> {
        let needed = self.table.needed_columns();
        let mut columns: Vec<_> = self
            .facts
            .columns
            .iter()
            .filter(|column| needed.contains(column.name.as_str()))
            .map(|column| (text_of(column, row), identifier(&column.name)))
            .collect();
        if columns.is_empty() {
            columns.push(("true".to_owned(), "\"=row\"".to_owned()));
        }
        columns
    }

    /// Columns by which images are told apart.
    fn compared(&self) -> Vec<&Column> {
        let compared: BTreeSet<&str> = self
            .table
            .compared_columns()
            .into_iter()
            .chain(self.facts.primary_key.iter().map(String::as_str))
            .collect();
        self.facts.columns.iter().filter(|column| compared.contains(column.name.as_str())).collect()
    }

    /// Of an UPDATE only images that differ between old and new in a column that counts. The images of a row cannot be
    /// joined, since nothing need identify it; instead equal images cancel each other out. What remains is right: where
    /// every image has its equal, the table holds what it held, as far as the rules look. The primary key, if there is one,
    /// is part of the image, so that rows that trade their values are not taken for unchanged.
    fn changed_images(&self, with_primary_key: bool) -> String {
        let columns = self.compared();
        let mut names: Vec<String> = columns.iter().map(|column| identifier(&column.name)).collect();
        let mut values: Vec<String> = columns
            .iter()
            .map(|column| format!("{} as {}", comparable(column, "r"), identifier(&column.name)))
            .collect();
        if let (true, Some(key)) = (with_primary_key, self.facts.single_key()) {
            names.push(PRIMARY_KEY.to_owned());
            values.push(format!("r.{} as {PRIMARY_KEY}", identifier(&key.name)));
        }
        let (names, values) = (names.join(", "), values.join(", "));
        let side = |rows: &str, sign: i32| format!("select {values}, {sign} as side from {rows} r");
        let mut outer: Vec<String> =
            self.image_columns("c").into_iter().map(|(sql, name)| format!("{sql} as {name}")).collect();
        if with_primary_key {
            outer.push(format!("c.{PRIMARY_KEY}"));
        }
        format!(
            "select {} from (select {names} from ({} union all {}) s group by {names} having sum(side) <> 0) c",
            outer.join(", "),
            side(NEW, 1),
            side(OLD, -1),
        )
    }
}
