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

pub use assembly::{Assembler, AssemblyError, Commit, MAX_HELD_BYTES, Piece, Seen, TopicChanges};
pub use gate::Snapshot;
pub use key_set::KeySet;
pub use ledger::{Ledger, Ticket};
pub use name::{InvalidName, check_name};
pub use pgwire_replication::Lsn;

use event::CacheKey;
use rules::{Part, TableRules};

/// Everything a table's rules could name: what TRUNCATE invalidates and the literal beginnings of the templates.
#[must_use]
pub fn namespaces(table: &TableRules) -> Vec<CacheKey> {
    let mut namespaces = table.on_truncate.namespaces().to_vec();
    for template in &table.keys {
        if let Some(Part::Literal(beginning)) = template.value.parts().first()
            && let Ok(beginning) = CacheKey::new(beginning.as_str())
            && !namespaces.iter().any(|known| beginning.as_str().starts_with(known.as_str()))
        {
            namespaces.push(beginning);
        }
    }
    namespaces
}
