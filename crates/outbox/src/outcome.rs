//! How transactions ended, as far as new snapshots are concerned: what decides whether a mark may go.

use event::nats::Outcome;
use sqlx::{PgPool, Row};

use crate::Xid;
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
    /// Whatever the database says.
    #[error("could not look up the outcome of transactions")]
    Database(#[from] sqlx::Error),
}

/// One snapshot decides for all. The status alone does not: between the commit record and the end of the transaction
/// (as long as a synchronous standby takes), and in old minor releases in general, `pg_xact_status` says `committed` of a
/// transaction that new snapshots do not see. It is evaluated after the snapshot was taken, and raises an error for
/// ids that were never assigned, so it is asked only about what the snapshot sees.
fn look(xids: &[Xid]) -> String {
    let ids: Vec<String> = xids.iter().map(Xid::to_string).collect();
    format!(
        "
    select pg_is_in_recovery(), x.xid < pg_snapshot_xmax(s.snapshot), pg_visible_in_snapshot(x.xid, s.snapshot),
           case when pg_visible_in_snapshot(x.xid, s.snapshot) then pg_xact_status(x.xid) end
    from (select pg_current_snapshot() as snapshot) s,
         (select id::xid8 as xid, n from unnest('{{{}}}'::text[]) with ordinality ids (id, n)) x
    order by x.n",
        ids.join(",")
    )
}

/// Says how each of `xids`, top-level transactions of this server, ended. In the order of the question.
///
/// - A prepared transaction is in progress.
/// - A transaction so old that Postgres has forgotten its outcome has ended, and counts as committed.
/// - An id that this server has not assigned was assigned in a history that a crash, failover or restore has lost: its
///   transaction will never commit, but its id will be used again. A few ids ahead (a crash loses those whose record
///   was not written) the answer is `in progress` until the server has gone past it, to which this question
///   contributes by using up ids; far ahead it is `aborted`.
///
/// # Errors
/// [`OutcomeError`]. Cancel-safe.
pub async fn outcomes(pool: &PgPool, xids: &[Xid]) -> Result<Vec<Outcome>, OutcomeError> {
    let rows = whole(look(xids)).fetch_all(pool).await?;
    let mut outcomes = Vec::with_capacity(xids.len());
    let mut beyond = Vec::new();
    for (row, xid) in rows.iter().zip(xids) {
        if row.try_get(0)? {
            return Err(OutcomeError::Standby);
        }
        if !row.try_get::<bool, _>(1)? {
            beyond.push((outcomes.len(), xid.0));
        }
        outcomes.push(judge(row.try_get(2)?, row.try_get(3)?));
    }
    if let Some(highest) = beyond.iter().map(|(_, xid)| *xid).max() {
        let assigned = go_towards(pool, highest).await?;
        for (at, xid) in beyond {
            if is_lost(xid, assigned) {
                outcomes[at] = Outcome::Aborted;
            }
        }
    }
    Ok(outcomes)
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
async fn go_towards(pool: &PgPool, xid: u64) -> Result<u64, sqlx::Error> {
    let mut assigned = 0;
    for _ in 0..MAX_PROBES {
        let row = whole("select pg_current_xact_id()::text::bigint").fetch_one(pool).await?;
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
