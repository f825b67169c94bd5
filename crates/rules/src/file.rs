//! The rules file as it is written, and its checks.

use std::collections::BTreeSet;
use std::fmt;
use std::path::Path;

use event::{CacheKey, Topic};
use serde::Deserialize;
use serde::de::{self, SeqAccess, Visitor};
use toml::Spanned;

use crate::condition::Condition;
use crate::image::bool_text;
use crate::problem::{Problem, RulesError};
use crate::table::{At, Expand, OnTruncate, TableRules};
use crate::template::Template;

/// Most tables in a file.
const MAX_TABLES: usize = 10_000;

/// Most templates, and most `expand`, of a table.
const MAX_PER_TABLE: usize = 64;

/// Most namespaces in a list: each is searched for in the whole cache.
const MAX_NAMESPACES: usize = 16;

/// The rules of all watched tables.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rules {
    file: String,
    tables: Vec<TableRules>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawFile {
    #[serde(default)]
    table: Vec<Spanned<RawTable>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawTable {
    name: Spanned<String>,
    columns: Option<Spanned<Vec<Spanned<String>>>>,
    #[serde(default)]
    keys: Vec<Spanned<String>>,
    topic: Option<Spanned<String>>,
    when: Option<Spanned<RawCondition>>,
    on_truncate: Option<Spanned<RawOnTruncate>>,
    #[serde(default)]
    expand: Vec<RawExpand>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawExpand {
    sql: Spanned<String>,
    namespaces: Option<Spanned<Vec<String>>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawCondition {
    column: Option<String>,
    equals: Option<Scalar>,
    r#in: Option<Vec<Scalar>>,
    is_null: Option<bool>,
    not: Option<Box<RawCondition>>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Scalar {
    Text(String),
    Integer(i64),
    Boolean(bool),
}

enum RawOnTruncate {
    Word(String),
    Namespaces(Vec<String>),
}

impl<'de> Deserialize<'de> for RawOnTruncate {
    fn deserialize<D: de::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct WordOrList;
        impl<'de> Visitor<'de> for WordOrList {
            type Value = RawOnTruncate;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a list of key prefixes, or \"ignore\"")
            }

            fn visit_str<E: de::Error>(self, word: &str) -> Result<RawOnTruncate, E> {
                Ok(RawOnTruncate::Word(word.to_owned()))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<RawOnTruncate, A::Error> {
                let mut namespaces = Vec::new();
                while let Some(namespace) = list.next_element()? {
                    namespaces.push(namespace);
                }
                Ok(RawOnTruncate::Namespaces(namespaces))
            }
        }
        deserializer.deserialize_any(WordOrList)
    }
}

impl Rules {
    /// Reads the rules of a file.
    ///
    /// # Errors
    /// [`RulesError`].
    pub fn load(file: &Path) -> Result<Self, RulesError> {
        let name = file.display().to_string();
        let text = std::fs::read_to_string(file)
            .map_err(|source| RulesError::Unreadable { file: name.clone(), source })?;
        Self::parse(&name, &text)
    }

    /// Reads rules from the text of the file `file_name`.
    ///
    /// # Errors
    /// [`RulesError::Invalid`] with every problem of the first kind met: either what keeps the text from being read at
    /// all, or everything in it that does not make sense.
    pub fn parse(file_name: &str, text: &str) -> Result<Self, RulesError> {
        let raw: RawFile = toml::from_str(text).map_err(|error| {
            let line = line_of(text, error.span().map_or(0, |span| span.start));
            let message = error.message().to_owned();
            let file = file_name.to_owned();
            RulesError::Invalid(vec![Problem { file, line, table: None, column: None, message }])
        })?;
        let mut reader = Reader { file: file_name, text, table: None, problems: Vec::new() };
        let tables = reader.tables(raw);
        if reader.problems.is_empty() {
            Ok(Self { file: file_name.to_owned(), tables })
        } else {
            Err(RulesError::Invalid(reader.problems))
        }
    }

    /// The file they were read from.
    #[must_use]
    pub fn file(&self) -> &str {
        &self.file
    }

    /// All tables in the order of the file.
    #[must_use]
    pub fn tables(&self) -> &[TableRules] {
        &self.tables
    }

    /// The rules of a table, if it has any.
    #[must_use]
    pub fn table(&self, schema: &str, name: &str) -> Option<&TableRules> {
        self.tables.iter().find(|table| table.name == name && table.schema == schema)
    }
}

/// Turns what was written into rules, and collects what is wrong.
struct Reader<'a> {
    file: &'a str,
    text: &'a str,
    table: Option<String>,
    problems: Vec<Problem>,
}

impl Reader<'_> {
    fn at<T>(&self, spanned: &Spanned<T>) -> usize {
        line_of(self.text, spanned.span().start)
    }

    fn refuse(&mut self, line: usize, message: impl Into<String>) {
        let (file, table) = (self.file.to_owned(), self.table.clone());
        self.problems.push(Problem { file, line, table, column: None, message: message.into() });
    }

    fn tables(&mut self, raw: RawFile) -> Vec<TableRules> {
        if raw.table.is_empty() || raw.table.len() > MAX_TABLES {
            self.refuse(
                1,
                format!("there are {} [[table]] entries; 1 to {MAX_TABLES} are possible", raw.table.len()),
            );
        }
        let mut tables: Vec<TableRules> = Vec::new();
        for raw in raw.table {
            self.table = None;
            let Some(table) = self.table(raw) else { continue };
            let known =
                tables.iter().find(|known| (&known.schema, &known.name) == (&table.schema, &table.name));
            if let Some(known) = known {
                let first = known.line;
                self.refuse(table.line, format!("has rules on line {first} already; put them together"));
            }
            tables.push(table);
        }
        tables
    }

    fn table(&mut self, raw: Spanned<RawTable>) -> Option<TableRules> {
        let start = self.at(&raw);
        let raw = raw.into_inner();
        let line = self.at(&raw.name);
        let (schema, name) = self.name(line, raw.name.as_ref())?;
        self.table = Some(format!("{schema}.{name}"));
        if raw.keys.is_empty() && raw.expand.is_empty() {
            self.refuse(start, "has neither keys nor expand, so no change invalidates anything");
        }
        if raw.keys.len() > MAX_PER_TABLE || raw.expand.len() > MAX_PER_TABLE {
            self.refuse(start, format!("has more than {MAX_PER_TABLE} keys or expand"));
        }
        Some(TableRules {
            columns: raw.columns.map(|columns| self.columns(columns)),
            keys: raw.keys.into_iter().filter_map(|key| self.template(&key)).collect(),
            topic: self.topic(raw.topic),
            when: raw.when.and_then(|when| self.when(when)),
            expand: raw.expand.into_iter().filter_map(|expand| self.expand(expand)).collect(),
            on_truncate: self.on_truncate(start, raw.on_truncate),
            schema,
            name,
            line,
        })
    }

    fn name(&mut self, line: usize, name: &str) -> Option<(String, String)> {
        let (schema, table) = name.split_once('.').unwrap_or(("public", name));
        if schema.is_empty() || table.is_empty() || table.contains('.') || name.contains('"') {
            self.refuse(
                line,
                format!("'{name}' is not a table; write schema.table or table, without quotes"),
            );
            return None;
        }
        Some((schema.to_owned(), table.to_owned()))
    }

    fn columns(&mut self, columns: Spanned<Vec<Spanned<String>>>) -> Vec<At<String>> {
        if columns.as_ref().is_empty() {
            let line = self.at(&columns);
            self.refuse(line, "columns is empty; leave it out to watch every column");
        }
        let mut seen = BTreeSet::new();
        let mut read = Vec::new();
        for column in columns.into_inner() {
            let line = self.at(&column);
            let value = column.into_inner();
            if !seen.insert(value.clone()) {
                self.refuse(line, format!("column {value} is named twice"));
            }
            read.push(At { value, line });
        }
        read
    }

    fn template(&mut self, text: &Spanned<String>) -> Option<At<Template>> {
        let line = self.at(text);
        match Template::parse(text.as_ref()) {
            Ok(value) => Some(At { value, line }),
            Err(error) => {
                self.refuse(line, format!("key '{}': {error}", text.as_ref()));
                None
            }
        }
    }

    fn topic(&mut self, topic: Option<Spanned<String>>) -> Topic {
        let Some(topic) = topic else { return Topic::default() };
        let line = self.at(&topic);
        Topic::new(topic.into_inner()).unwrap_or_else(|error| {
            self.refuse(line, error.to_string());
            Topic::default()
        })
    }

    fn expand(&mut self, expand: RawExpand) -> Option<Expand> {
        let line = self.at(&expand.sql);
        let value = expand.sql.as_ref().trim().trim_end_matches(';').to_owned();
        if !value.contains("$1") {
            self.refuse(line, "expand does not use $1, the array of changed primary keys");
            return None;
        }
        let namespaces = expand.namespaces.map_or_else(Vec::new, |list| {
            let line = self.at(&list);
            self.namespaces(line, "namespaces", list.into_inner())
        });
        Some(Expand { sql: At { value, line }, namespaces })
    }

    fn namespaces(&mut self, line: usize, field: &str, list: Vec<String>) -> Vec<CacheKey> {
        if list.is_empty() || list.len() > MAX_NAMESPACES {
            let count = list.len();
            self.refuse(
                line,
                format!("{field} names {count} key prefixes; 1 to {MAX_NAMESPACES} are possible"),
            );
        }
        let checked: Result<Vec<_>, _> = list.into_iter().map(CacheKey::new).collect();
        checked.unwrap_or_else(|error| {
            self.refuse(line, format!("{field}: {error}"));
            Vec::new()
        })
    }

    fn on_truncate(&mut self, start: usize, raw: Option<Spanned<RawOnTruncate>>) -> OnTruncate {
        let Some(raw) = raw else {
            self.refuse(
                start,
                "on_truncate is missing: name the key prefixes that TRUNCATE invalidates, such as [\"user:\"], \
                 or write \"ignore\"",
            );
            return OnTruncate::Ignore;
        };
        let line = self.at(&raw);
        match raw.into_inner() {
            RawOnTruncate::Word(word) if word == "ignore" => OnTruncate::Ignore,
            RawOnTruncate::Word(word) => {
                self.refuse(
                    line,
                    format!("on_truncate is a list of key prefixes or \"ignore\", not \"{word}\""),
                );
                OnTruncate::Ignore
            }
            RawOnTruncate::Namespaces(list) => {
                OnTruncate::Namespaces(self.namespaces(line, "on_truncate", list))
            }
        }
    }

    fn when(&mut self, when: Spanned<RawCondition>) -> Option<At<Condition>> {
        let line = self.at(&when);
        match when.into_inner().checked() {
            Ok(value) => Some(At { value, line }),
            Err(message) => {
                self.refuse(line, message);
                None
            }
        }
    }
}

impl RawCondition {
    fn checked(self) -> Result<Condition, &'static str> {
        let values = |values: Vec<Scalar>| values.into_iter().map(Scalar::into_text).collect();
        match self {
            Self { column: None, equals: None, r#in: None, is_null: None, not: Some(inner) } => {
                Ok(Condition::Not(Box::new(inner.checked()?)))
            }
            Self { column: Some(column), equals: Some(value), r#in: None, is_null: None, not: None } => {
                Ok(Condition::OneOf { column, values: values(vec![value]) })
            }
            Self { column: Some(_), equals: None, r#in: Some(list), is_null: None, not: None }
                if list.is_empty() =>
            {
                Err("when: the list of in is empty, so no row would count")
            }
            Self { column: Some(column), equals: None, r#in: Some(list), is_null: None, not: None } => {
                Ok(Condition::OneOf { column, values: values(list) })
            }
            Self { column: Some(column), equals: None, r#in: None, is_null: Some(is_null), not: None } => {
                let condition = Condition::IsNull { column };
                Ok(if is_null { condition } else { Condition::Not(Box::new(condition)) })
            }
            _ => Err("when is a column with exactly one of equals, in and is_null; or not = { … } alone"),
        }
    }
}

impl Scalar {
    fn into_text(self) -> String {
        match self {
            Self::Text(text) => text,
            Self::Integer(number) => number.to_string(),
            Self::Boolean(value) => bool_text(value).to_owned(),
        }
    }
}

fn line_of(text: &str, at: usize) -> usize {
    text.as_bytes()[..at.min(text.len())].iter().filter(|&&byte| byte == b'\n').count() + 1
}
