use rules::{MissingValue, TableRules};

use crate::pgoutput::{Relation, ReplicaIdentity};

/// Why it cannot be told which keys a change invalidates.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unknown {
    /// The log does not hold what they are made of.
    #[error(transparent)]
    Value(#[from] MissingValue),
    /// The table was in the publication, and neither rules nor catalog know it: a partition, most likely, that was
    /// dropped, detached or created in the very transaction.
    #[error("table {0} is not known, and may have been a partition of any table of the rules")]
    Table(String),
}

/// A relation of the publication.
#[derive(Debug)]
pub(super) struct Watched {
    pub(super) relation: Relation,
    pub(super) role: Role,
    /// Column of the rules that the log does not hold of old rows: the replica identity was changed since the start, or is
    /// that of a partition created since.
    pub(super) not_logged: Option<String>,
}

/// What a relation is to the rules.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    /// The table of these rules, by their index, or a partition of it.
    Of(usize),
    /// None of the rules' business.
    None,
    /// Perhaps a partition; and the transaction in which the catalog was last asked.
    Stranger(Option<u32>),
}

pub(super) fn warn_of_unruled(relation: &Relation) {
    tracing::warn!(
        schema = &*relation.schema,
        table = &*relation.name,
        "the publication holds a table without rules; its changes invalidate nothing"
    );
}

/// A column that the rules need and the replica identity lacks, though the table has it.
pub(super) fn not_logged(
    table: &TableRules,
    primary_key: Option<&str>,
    relation: &Relation,
) -> Option<String> {
    if relation.identity == ReplicaIdentity::Full {
        return None;
    }
    let is_logged = |name: &str| relation.columns.iter().all(|column| &*column.name != name || column.is_key);
    table.needed_columns().into_iter().chain(primary_key).find(|name| !is_logged(name)).map(str::to_owned)
}
