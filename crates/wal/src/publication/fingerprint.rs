//! What tells a publication from the same one changed and changed back: what it is now cannot show what it was.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use sqlx::{PgConnection, Row};

use super::Tables;

/// Object ids and versions of the rows of the catalog that make up a publication. Each change of the publication writes
/// these rows again, or others in their place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fingerprint {
    /// Version of the publication itself.
    publication: String,
    /// Version of each table in it, by the object id of the table.
    tables: BTreeMap<u32, String>,
}

impl Fingerprint {
    /// Takes the fingerprint of a publication; `None` if it does not exist.
    ///
    /// # Errors
    /// Whatever the database says.
    pub async fn take(connection: &mut PgConnection, name: &str) -> Result<Option<Self>, sqlx::Error> {
        let row = sqlx::query(
            "select concat(p.oid, '/', p.xmin), coalesce((select string_agg(
                 format('%s=%s/%s', r.prrelid::oid, r.oid, r.xmin), ' ') from pg_publication_rel r where r.prpubid = p.oid), '')
             from pg_publication p where p.pubname = $1",
        )
        .persistent(false)
        .bind(name)
        .fetch_optional(connection)
        .await?;
        let Some(row) = row else { return Ok(None) };
        Ok(format!("{} {}", row.try_get::<String, _>(0)?, row.try_get::<String, _>(1)?).parse().ok())
    }

    /// Indexes of the rules whose tables may have been left out of the publication since `before`.
    #[must_use]
    pub fn changed_since(&self, before: &Self, tables: &Tables) -> Vec<usize> {
        let is_other_publication = self.publication != before.publication;
        let is_changed = |oid: &u32| is_other_publication || self.tables.get(oid) != before.tables.get(oid);
        tables
            .listed()
            .iter()
            .enumerate()
            .filter(|(_, oid)| is_changed(oid))
            .map(|(index, _)| index)
            .collect()
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.publication)?;
        self.tables.iter().try_for_each(|(table, version)| write!(formatter, " {table}={version}"))
    }
}

/// A text is no fingerprint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a fingerprint of a publication")]
pub struct InvalidFingerprint;

impl FromStr for Fingerprint {
    type Err = InvalidFingerprint;

    fn from_str(text: &str) -> Result<Self, InvalidFingerprint> {
        let mut words = text.split_whitespace();
        let publication = words.next().ok_or(InvalidFingerprint)?.to_owned();
        let table = |word: &str| {
            let (table, version) = word.split_once('=')?;
            Some((table.parse().ok()?, version.to_owned()))
        };
        let tables = words.map(table).collect::<Option<_>>().ok_or(InvalidFingerprint)?;
        Ok(Self { publication, tables })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fingerprint_names_the_tables_that_may_have_been_left_out() {
        let read = |text: &str| text.parse::<Fingerprint>().unwrap();
        let tables = Tables { listed: vec![7, 8, 9], ..Tables::default() };
        let before = read("1/10 7=2/10 8=3/10 9=4/10");
        assert_eq!(read(&before.to_string()), before);
        let changed = |now: &str| read(now).changed_since(&before, &tables);
        assert_eq!(changed("1/10 7=2/10 8=3/10 9=4/10"), [0; 0]);
        assert_eq!(
            changed("1/10 9=4/10 8=3/10 7=2/10 5=9/11"),
            [0; 0],
            "a table of nobody's rules was added"
        );
        assert_eq!(changed("1/10 7=2/10 8=5/12 9=4/10"), [1], "one was taken out and put back");
        assert_eq!(changed("1/10 7=2/10 9=4/10"), [1], "one was taken out");
        assert_eq!(changed("1/12 7=2/10 8=3/10 9=4/10"), [0, 1, 2], "its options were changed");
        assert_eq!(changed("6/12 7=7/12 8=8/12 9=9/12"), [0, 1, 2], "it was dropped and created again");
        assert_eq!("1/10 7".parse::<Fingerprint>(), Err(InvalidFingerprint));
        assert_eq!("".parse::<Fingerprint>(), Err(InvalidFingerprint));
    }
}
