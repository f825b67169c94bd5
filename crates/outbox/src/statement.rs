//! Statements that are sent whole.
//!
//! One with parameters is prepared first, and outside a transaction a pooler in transaction mode may prepare it on one
//! connection to the server and run it on another. The values here are numbers, times and ids.

use chrono::{DateTime, Utc};
use sqlx::{AssertSqlSafe, RawSql};

/// Begins a transaction as the statements here need it, whatever is the default of server, database or role.
pub(crate) const BEGIN: &str = "begin isolation level read committed, read write";

/// A statement with its values in it, sent as one message.
pub(crate) fn whole(sql: impl Into<String>) -> RawSql {
    sqlx::raw_sql(AssertSqlSafe(sql.into()))
}

/// A time as it is stored, in whole microseconds: a longer fraction would be rounded.
pub(crate) fn time(at: DateTime<Utc>) -> String {
    format!("timestamptz '{}'", at.format("%Y-%m-%d %H:%M:%S%.6f+00"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_cut_to_microseconds_as_the_driver_cuts_them() {
        let at = DateTime::from_timestamp(1_700_000_000, 123_456_999).unwrap();
        assert_eq!(time(at), "timestamptz '2023-11-14 22:13:20.123456+00'");
    }
}
