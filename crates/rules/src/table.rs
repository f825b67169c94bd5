use std::collections::BTreeSet;

use event::{CacheKey, Topic};

use crate::condition::Condition;
use crate::template::Template;

/// Something the rules file says, and the line where it says it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct At<T> {
    /// What it says.
    pub value: T,
    /// Line, counted from 1.
    pub line: usize,
}

/// The rules of one table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TableRules {
    /// Schema of the table.
    pub schema: String,
    /// Its name.
    pub name: String,
    /// Line of the name.
    pub line: usize,
    /// Watched columns; every UPDATE counts if there are none.
    pub columns: Option<Vec<At<String>>>,
    /// Templates of the keys.
    pub keys: Vec<At<Template>>,
    /// Topic of the events.
    pub topic: Topic,
    /// Which row images count.
    pub when: Option<At<Condition>>,
    /// Queries that map changed primary keys to further keys.
    pub expand: Vec<Expand>,
    /// What TRUNCATE invalidates.
    pub on_truncate: OnTruncate,
}

/// A query that maps changed primary keys to further keys.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Expand {
    /// SQL with the array of the primary keys as `$1`.
    pub sql: At<String>,
    /// Namespaces of all keys it may find. They are declared stale when it is not known what changed.
    pub namespaces: Vec<CacheKey>,
}

/// What TRUNCATE of a table invalidates.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum OnTruncate {
    /// Nothing.
    Ignore,
    /// Every key that begins with one of these.
    Namespaces(Vec<CacheKey>),
}

impl OnTruncate {
    /// The namespaces; none if TRUNCATE is ignored.
    #[must_use]
    pub fn namespaces(&self) -> &[CacheKey] {
        match self {
            Self::Ignore => &[],
            Self::Namespaces(namespaces) => namespaces,
        }
    }
}

impl TableRules {
    /// `schema.name`.
    #[must_use]
    pub fn qualified_name(&self) -> String {
        format!("{}.{}", self.schema, self.name)
    }

    /// Columns of templates and condition: every image must have them.
    #[must_use]
    pub fn needed_columns(&self) -> BTreeSet<&str> {
        let of_keys = self.keys.iter().flat_map(|template| template.value.columns());
        of_keys.chain(self.when.as_ref().map(|when| when.value.column())).collect()
    }

    /// Columns whose change makes an UPDATE count: the watched ones and those that every image must have.
    #[must_use]
    pub fn compared_columns(&self) -> BTreeSet<&str> {
        let watched = self.columns.iter().flatten().map(|column| column.value.as_str());
        self.needed_columns().into_iter().chain(watched).collect()
    }
}
