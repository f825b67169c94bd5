/// What the database knows of a table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Facts {
    /// Schema of the table.
    pub schema: String,
    /// Its name.
    pub name: String,
    /// Whether it is a table or a partitioned table.
    pub is_table: bool,
    /// The table it is a partition of, if it is one.
    pub partition_of: Option<String>,
    /// Tables that inherit from it, or it from them, and are no partitions.
    pub kin: Vec<String>,
    /// The table itself and, below it, all its partitions of every level.
    pub relations: Vec<Relation>,
    /// Its columns in order.
    pub columns: Vec<Column>,
    /// Columns of the primary key in order.
    pub primary_key: Vec<String>,
}

/// A table in which rows can be changed under that name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Relation {
    /// Its schema.
    pub schema: String,
    /// Its name.
    pub name: String,
    /// Whether it is a foreign table, which can have no statement trigger with transition tables.
    pub is_foreign: bool,
    /// Whether it holds rows itself, as a partitioned table does not.
    pub holds_rows: bool,
}

/// A column.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Column {
    /// Its name.
    pub name: String,
    /// Its type as SQL spells it.
    pub type_name: String,
    /// The same with length and precision.
    pub full_type: String,
    /// The type of an array of it, which needs no `search_path`.
    pub array_type: String,
    /// Name of its type in `pg_type`; of a domain, that of the type below it.
    pub base_type: String,
    /// Whether the type is an enum.
    pub is_enum: bool,
    /// Whether and how its value is computed from others.
    pub generated: Generated,
}

/// How the value of a column is computed from others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Generated {
    /// It is not.
    No,
    /// When a row is written; the row holds it.
    Stored,
    /// When a row is read; no row, and so neither a trigger nor the write-ahead log, holds it. Since Postgres 18.
    Virtual,
}

impl Generated {
    /// From `attgenerated`.
    pub(super) fn from_catalog(letter: &str) -> Self {
        match letter {
            "" => Self::No,
            "v" => Self::Virtual,
            _ => Self::Stored,
        }
    }
}

/// Types whose text in a key depends on nothing, or only on [`PINNED_SETTINGS`](crate::PINNED_SETTINGS).
const TYPES_OF_KEYS: [&str; 18] = [
    "int2",
    "int4",
    "int8",
    "oid",
    "numeric",
    "bool",
    "uuid",
    "text",
    "varchar",
    "bpchar",
    "name",
    "citext",
    "date",
    "timestamp",
    "timestamptz",
    "inet",
    "cidr",
    "macaddr",
];

/// Types of which two values are equal exactly if their texts are.
const TYPES_COMPARED_AS_THEY_ARE: [&str; 10] =
    ["int2", "int4", "int8", "oid", "bool", "uuid", "date", "timestamp", "timestamptz", "bytea"];

impl Column {
    /// Whether its value can be part of a key.
    #[must_use]
    pub fn can_be_in_a_key(&self) -> bool {
        self.is_enum || TYPES_OF_KEYS.contains(&self.base_type.as_str())
    }

    /// Whether the text of its values depends on settings of the session.
    #[must_use]
    pub fn depends_on_settings(&self) -> bool {
        matches!(self.base_type.as_str(), "date" | "timestamp" | "timestamptz")
    }

    /// Whether its values may hold any characters.
    pub(crate) fn is_free_text(&self) -> bool {
        self.is_enum
            || matches!(
                self.base_type.as_str(),
                "text" | "varchar" | "bpchar" | "name" | "citext" | "numeric"
            )
    }

    /// Whether its text may be that of floating-point numbers: of arrays, composite and geometric types it is not known.
    pub(crate) fn may_have_floats(&self) -> bool {
        !self.is_compared_as_it_is() && !self.can_be_in_a_key()
    }

    /// Whether `=` tells apart what the text tells apart.
    pub(crate) fn is_compared_as_it_is(&self) -> bool {
        TYPES_COMPARED_AS_THEY_ARE.contains(&self.base_type.as_str())
    }
}

impl Facts {
    /// A column by its name.
    #[must_use]
    pub fn column(&self, name: &str) -> Option<&Column> {
        self.columns.iter().find(|column| column.name == name)
    }

    /// Whether its rows are in partitions.
    #[must_use]
    pub fn is_partitioned(&self) -> bool {
        self.is_table && self.relations.first().is_some_and(|relation| !relation.holds_rows)
    }

    /// The column of the primary key, if it is just one.
    #[must_use]
    pub fn single_key(&self) -> Option<&Column> {
        match self.primary_key.as_slice() {
            [name] => self.column(name),
            _ => None,
        }
    }
}
