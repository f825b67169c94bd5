//! The visibility gate: a transaction that is in the log may still be invisible to new snapshots.
//!
//! A commit is written to the log first and becomes visible later: usually microseconds, sometimes milliseconds, and for
//! as long as a synchronous standby is away. Acting on the log alone would let a reader refill the old value after the
//! delete. One snapshot judges any number of transactions.

use event::{HISTORY_SQL, History};
use sqlx::{AssertSqlSafe, PgPool, Row};

/// What a snapshot of a normal connection sees.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// Every transaction below it has ended.
    xmin: u64,
    /// No transaction from here on had ended.
    xmax: u64,
    /// Those in between that had not, in order.
    in_progress: Vec<u64>,
    /// Timeline of the server that was asked.
    timeline: i64,
    /// The history that the transactions belong to.
    history: Option<History>,
}

impl Snapshot {
    /// Takes a new snapshot on the primary.
    ///
    /// # Errors
    /// Whatever the database says.
    pub async fn take(pool: &PgPool) -> Result<Self, sqlx::Error> {
        // The first eight digits of the name of a file of the log are the timeline.
        let sql = format!(
            "select pg_current_snapshot()::text, left(pg_walfile_name(pg_current_wal_insert_lsn()), 8), {HISTORY_SQL}"
        );
        let row = sqlx::raw_sql(AssertSqlSafe(sql)).fetch_one(pool).await?;
        let (text, timeline): (String, String) = (row.try_get(0)?, row.try_get(1)?);
        let mut snapshot = Self::parse(&text)
            .ok_or_else(|| sqlx::Error::Protocol("pg_current_snapshot() is not xmin:xmax:list".to_owned()))?;
        snapshot.timeline = i64::from_str_radix(&timeline, 16).unwrap_or_default();
        snapshot.history = row.try_get::<&str, _>(2)?.parse().ok();
        Ok(snapshot)
    }

    /// Timeline of the server that was asked: its transactions mean nothing to the log of another.
    #[must_use]
    pub fn timeline(&self) -> i64 {
        self.timeline
    }

    /// The history that the transactions belong to.
    #[must_use]
    pub fn history(&self) -> Option<History> {
        self.history
    }

    fn parse(text: &str) -> Option<Self> {
        let mut parts = text.split(':');
        let xmin = parts.next()?.parse().ok()?;
        let xmax = parts.next()?.parse().ok()?;
        let list = parts.next()?;
        let mut in_progress = Vec::new();
        for xid in list.split(',').filter(|xid| !xid.is_empty()) {
            in_progress.push(xid.parse().ok()?);
        }
        in_progress.sort_unstable();
        Some(Self { xmin, xmax, in_progress, timeline: 0, history: None })
    }

    /// Whether readers that begin now see what the committed transaction `xid` did.
    #[must_use]
    pub fn sees(&self, xid: u64) -> bool {
        xid < self.xmin || (xid < self.xmax && self.in_progress.binary_search(&xid).is_err())
    }

    /// The whole id of a transaction of which the log shows the lower half. Ids in use are never further apart than
    /// half of what the lower half can tell.
    #[must_use]
    pub fn extend(&self, xid: u32) -> u64 {
        let [low, high] = halves(self.xmax);
        let epoch = match xid.wrapping_sub(low).cast_signed() {
            // Younger than the snapshot and past a wrap-around.
            distance if distance >= 0 && xid < low => high + 1,
            // Older, from before one.
            distance if distance < 0 && xid > low => high.saturating_sub(1),
            _ => high,
        };
        (u64::from(epoch) << 32) | u64::from(xid)
    }
}

fn halves(xid: u64) -> [u32; 2] {
    let [a, b, c, d, e, f, g, h] = xid.to_le_bytes();
    [u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h])]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_transaction_in_the_list_or_beyond_the_end_is_not_visible() {
        let snapshot = Snapshot::parse("100:110:100,105").unwrap();
        for (xid, visible) in
            [(99, true), (100, false), (101, true), (105, false), (109, true), (110, false), (200, false)]
        {
            assert_eq!(snapshot.sees(xid), visible, "{xid}");
        }
        assert!(Snapshot::parse("100:100:").unwrap().sees(99));
        assert!(Snapshot::parse("100").is_none() && Snapshot::parse("1:2:x").is_none());
    }

    #[test]
    fn an_id_keeps_its_epoch_across_the_wrap_around() {
        let at =
            |xmax: u64| Snapshot { xmin: xmax, xmax, in_progress: Vec::new(), timeline: 0, history: None };
        let wrap = 1_u64 << 32;
        assert_eq!(at(800).extend(799), 799);
        assert_eq!(at(800).extend(805), 805);
        assert_eq!(at(3 * wrap + 800).extend(799), 3 * wrap + 799);
        assert_eq!(at(3 * wrap + 5).extend(u32::MAX - 1), 3 * wrap - 2);
        assert_eq!(at(3 * wrap - 2).extend(5), 3 * wrap + 5);
    }
}
