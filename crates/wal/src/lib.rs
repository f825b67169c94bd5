#![doc = include_str!("../README.md")]

mod assembly;
mod gate;
mod key_set;
mod ledger;
mod name;
pub mod pgoutput;
pub mod publication;
mod row;
pub mod session;
pub mod slot;

pub use assembly::{Assembler, AssemblyError, Commit, MAX_HELD_BYTES, Piece, Seen, TopicChanges, Unknown};
pub use gate::Snapshot;
pub use key_set::KeySet;
pub use ledger::{Ledger, Ticket};
pub use name::{InvalidName, check_name};
pub use pgwire_replication::Lsn;

use event::CacheKey;
use rules::{Part, TableRules};

/// Everything a table's rules could name: what TRUNCATE invalidates, the literal beginnings of the templates and the
/// namespaces of `expand`.
#[must_use]
pub fn namespaces(table: &TableRules) -> Vec<CacheKey> {
    let mut namespaces = table.on_truncate.namespaces().to_vec();
    let beginnings = table.keys.iter().filter_map(|template| match template.value.parts().first() {
        Some(Part::Literal(beginning)) => CacheKey::new(beginning.as_str()).ok(),
        _ => None,
    });
    let of_expand = table.expand.iter().flat_map(|expand| expand.namespaces.iter().cloned());
    for namespace in beginnings.chain(of_expand) {
        if !namespaces.iter().any(|known| namespace.as_str().starts_with(known.as_str())) {
            namespaces.push(namespace);
        }
    }
    namespaces
}

#[cfg(test)]
mod tests {
    use rules::Rules;

    #[test]
    fn whatever_the_rules_can_name_lies_in_a_namespace() {
        let rules = r#"
            [[table]]
            name = "users"
            keys = ["user:{id}:profile", "user:{id}", "mail:{email}"]
            on_truncate = ["user:"]
            [[table.expand]]
            sql = "select 'order:' || 1 where 1 = any($1)"
            namespaces = ["order:", "mail:x"]
        "#;
        let rules = Rules::parse("rules.toml", rules).unwrap();
        let namespaces = super::namespaces(&rules.tables()[0]);
        let namespaces: Vec<&str> = namespaces.iter().map(event::CacheKey::as_str).collect();
        assert_eq!(namespaces, ["user:", "mail:", "order:"]);
    }
}
