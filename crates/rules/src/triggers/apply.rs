//! Carrying a plan out beside writers.

use std::time::Duration;

use sqlx::{AssertSqlSafe, Connection, PgConnection};

use super::install::{Plan, Step};
use crate::catalog::expand::BOUND_AS_WRITTEN;

/// Any number that nobody else locks by.
const APPLY_LOCK: i64 = 0x6f75_7462_6f78_7275;

/// A part of a plan could not be carried out.
#[derive(Debug, thiserror::Error)]
#[error("cannot change {part}; {done} of {wanted} changes were made and stay")]
pub struct ApplyError {
    /// What the transaction that failed was about.
    pub part: String,
    /// Changes before it.
    pub done: usize,
    /// Changes of the whole plan.
    pub wanted: usize,
    /// Why.
    pub source: sqlx::Error,
}

/// Keeps others from changing triggers until the caller's transaction ends, so that what is planned meanwhile is still
/// right when it is carried out. Waits no longer than `patience`.
///
/// # Errors
/// Whatever the database says; roll back then.
pub async fn lock(transaction: &mut PgConnection, patience: Duration) -> Result<(), sqlx::Error> {
    let lock = format!(
        "set local lock_timeout = {}; set local idle_in_transaction_session_timeout = 0; \
         select pg_advisory_xact_lock({APPLY_LOCK})",
        millis(patience)
    );
    sqlx::raw_sql(AssertSqlSafe(lock)).execute(transaction).await.map(drop)
}

/// Carries a plan out in the caller's transaction, all or nothing: it keeps the lock on every table until that ends. Waits
/// for no lock longer than `lock_timeout`.
///
/// # Errors
/// Whatever the database says; roll back then.
pub async fn apply(
    transaction: &mut PgConnection,
    plan: &Plan,
    lock_timeout: Duration,
) -> Result<(), sqlx::Error> {
    run(transaction, &plan.steps, lock_timeout).await
}

/// Carries a plan out, each part in a transaction of its own, which locks one table at most: so it cannot be in a deadlock
/// with writers, and none of them waits for longer than `lock_timeout` and the moment that the change takes. After each
/// part, capture is as complete as it was before. Stops at the first part that fails; what was done stays, and a new plan
/// has the rest.
///
/// # Errors
/// [`ApplyError`].
pub async fn apply_in_parts(
    connection: &mut PgConnection,
    plan: &Plan,
    lock_timeout: Duration,
) -> Result<(), ApplyError> {
    let mut done = 0;
    for steps in plan.parts() {
        let failed =
            |source| ApplyError { part: steps[0].part.clone(), done, wanted: plan.steps.len(), source };
        let mut transaction = connection.begin().await.map_err(failed)?;
        run(&mut transaction, steps, lock_timeout).await.map_err(failed)?;
        transaction.commit().await.map_err(failed)?;
        done += steps.len();
    }
    Ok(())
}

/// What a transaction with steps begins with.
pub(super) fn opening(lock_timeout: Duration) -> String {
    format!("{BOUND_AS_WRITTEN}; set local lock_timeout = {}", millis(lock_timeout))
}

async fn run(
    transaction: &mut PgConnection,
    steps: &[Step],
    lock_timeout: Duration,
) -> Result<(), sqlx::Error> {
    sqlx::raw_sql(AssertSqlSafe(opening(lock_timeout))).execute(&mut *transaction).await?;
    for step in steps {
        sqlx::raw_sql(AssertSqlSafe(step.sql.clone())).execute(&mut *transaction).await?;
    }
    Ok(())
}

fn millis(patience: Duration) -> u128 {
    patience.as_millis().max(1)
}
