//! How transactions ended, as far as new snapshots are concerned: what decides whether a mark may go.

use event::nats::Outcome;
use event::{HISTORY_SQL, History, TransactionId};
use sqlx::postgres::PgRow;
use sqlx::{PgPool, Row, ValueRef};

use crate::enqueue::read_history;
use crate::statement::whole;

/// Numbers used up at most per question to find out whether Postgres has assigned a transaction id: a tenth of a second.
const MAX_PROBES: usize = 1_000;

/// A transaction id so far ahead of those assigned belongs to a history that was lost, and is not reached again while
/// anybody acts on the answer: assigning so many takes tens of seconds, acting is limited to a few.
const LOST_DISTANCE: u64 = 1_000_000;

/// Why nothing can be said about the outcomes.
#[derive(Debug, thiserror::Error)]
pub enum OutcomeError {
    /// A standby lags: it may not know of a transaction that is about to commit on the primary.
    #[error("the server is in recovery; only a primary knows what is in progress")]
    Standby,
    /// The connections lead to one server now and to another the next moment.
    #[error("the database was {before} and is {after} now; asked again, it answers")]
    Moved {
        /// The history it had at first.
        before: History,
        /// The history it has now.
        after: History,
    },
    /// Whatever the database says.
    #[error("could not look up the outcome of transactions")]
    Database(#[from] sqlx::Error),
}

/// One snapshot decides for all. The status alone does not: between the commit record and the end of the transaction
/// (as long as a synchronous standby takes), and in old minor releases in general, `pg_xact_status` says `committed` of a
/// transaction that new snapshots do not see. It is evaluated after the snapshot was taken, and raises an error for
/// ids that were never assigned, so it is asked only about what the snapshot sees.
fn look(transactions: &[TransactionId]) -> String {
    let ids: Vec<String> = transactions.iter().map(|transaction| transaction.xid.to_string()).collect();
    format!(
        "
    select s.history, x.xid < pg_snapshot_xmax(s.snapshot), pg_visible_in_snapshot(x.xid, s.snapshot),
           case when pg_visible_in_snapshot(x.xid, s.snapshot) then pg_xact_status(x.xid) end
    from (select pg_current_snapshot() as snapshot, {HISTORY_SQL} as history) s,
         (select id::xid8 as xid, n from unnest('{{{}}}'::text[]) with ordinality ids (id, n)) x
    order by x.n",
        ids.join(",")
    )
}

/// Says how each of `transactions`, top-level ones, ended. In the order of the question.
///
/// - A transaction of another history is none of this database's ([`Outcome::OtherHistory`]): its id means another
///   transaction here. The history is looked up together with the answer, so it is the server's own at that moment. A
///   transaction without a history counts as one of this database.
/// - A prepared transaction is in progress.
/// - A transaction so old that Postgres has forgotten its outcome has ended, and counts as committed.
/// - An id that this server has not assigned was assigned in a past that a crash, failover or restore has lost: its
///   transaction will never commit, but its id will be used again. A few ids ahead (a crash loses those whose record
///   was not written) the answer is `in progress` until the server has gone past it, to which this question
///   contributes by using up ids; far ahead it is `aborted`.
///
/// # Errors
/// [`OutcomeError`]. Cancel-safe.
pub async fn outcomes(pool: &PgPool, transactions: &[TransactionId]) -> Result<Vec<Outcome>, OutcomeError> {
    let rows = whole(look(transactions)).fetch_all(pool).await?;
    let mut outcomes = Vec::with_capacity(transactions.len());
    let mut beyond = Vec::new();
    let mut history = None;
    for (row, transaction) in rows.iter().zip(transactions) {
        let own = own_history(row, 0)?;
        history = Some(own);
        if transaction.history.is_some_and(|its| !own.continues(its)) {
            outcomes.push(Outcome::OtherHistory);
            continue;
        }
        if !row.try_get::<bool, _>(1)? {
            beyond.push((outcomes.len(), transaction.xid));
        }
        outcomes.push(judge(row.try_get(2)?, row.try_get(3)?));
    }
    let highest = beyond.iter().map(|(_, xid)| *xid).max();
    if let (Some(history), Some(highest)) = (history, highest) {
        let assigned = go_towards(pool, history, highest).await?;
        for (at, xid) in beyond {
            if is_lost(xid, assigned) {
                outcomes[at] = Outcome::Aborted;
            }
        }
    }
    Ok(outcomes)
}

fn own_history(row: &PgRow, column: usize) -> Result<History, OutcomeError> {
    match row.try_get_raw(column)?.is_null() {
        true => Err(OutcomeError::Standby),
        false => Ok(read_history(row, column)?),
    }
}

fn judge(visible: bool, status: Option<&str>) -> Outcome {
    match (visible, status) {
        (false, _) | (true, Some("in progress")) => Outcome::InProgress,
        (true, Some("aborted")) => Outcome::Aborted,
        (true, _) => Outcome::Committed,
    }
}

fn is_lost(xid: u64, assigned: u64) -> bool {
    xid.saturating_sub(assigned) > LOST_DISTANCE
}

/// Uses up ids until `xid` is assigned, at most [`MAX_PROBES`], and returns the last one. Ids that are beyond the
/// snapshot because their transaction is the newest are passed by the first.
async fn go_towards(pool: &PgPool, history: History, xid: u64) -> Result<u64, OutcomeError> {
    let mut assigned = 0;
    let sql = format!("select pg_current_xact_id()::text::bigint, {HISTORY_SQL}");
    for _ in 0..MAX_PROBES {
        let row = whole(sql.as_str()).fetch_one(pool).await?;
        let now = own_history(&row, 1)?;
        if now != history {
            return Err(OutcomeError::Moved { before: history, after: now });
        }
        assigned = row.try_get::<i64, _>(0)?.cast_unsigned();
        if assigned >= xid || is_lost(xid, assigned) {
            break;
        }
    }
    Ok(assigned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_commit_that_is_not_visible_is_in_progress() {
        assert_eq!(judge(false, Some("committed")), Outcome::InProgress);
        assert_eq!(judge(true, Some("in progress")), Outcome::InProgress);
        assert_eq!(judge(true, Some("committed")), Outcome::Committed);
        assert_eq!(judge(true, Some("aborted")), Outcome::Aborted);
    }

    #[test]
    fn a_forgotten_outcome_counts_as_committed() {
        assert_eq!(judge(true, None), Outcome::Committed);
    }
}
