//! The rows that are read and written: each has a version, raised by every change under the row's lock.

use rand::Rng;
use sqlx::{PgConnection, PgPool};

/// Creates the rows, and a table that refuses every commit that touches it.
pub async fn create(pool: &PgPool, count: u32) -> anyhow::Result<()> {
    let sql = "create table history (id int primary key, version bigint not null default 1);
               create table refused (id int references history deferrable initially deferred)";
    sqlx::raw_sql(sql).execute(pool).await?;
    sqlx::query("insert into history (id) select generate_series(0, $1 - 1)")
        .bind(i32::try_from(count)?)
        .execute(pool)
        .await?;
    Ok(())
}

/// The key of a row.
pub fn key(row: u32) -> String {
    format!("history:{row}")
}

/// A row, some more often than others: of a hundred rows the first ten get a third of everything.
pub fn pick(count: u32, random: &mut impl Rng) -> u32 {
    let place: f64 = random.random::<f64>().powi(2) * f64::from(count);
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "between 0 and a u32")]
    let row = place as u32;
    row.min(count - 1)
}

/// The version of a row as the database has it.
pub async fn load(pool: &PgPool, row: u32) -> Result<i64, sqlx::Error> {
    sqlx::query_scalar("select version from history where id = $1")
        .bind(row.cast_signed())
        .fetch_one(pool)
        .await
}

/// Versions of several rows, by key.
pub async fn load_many(pool: &PgPool, rows: &[u32]) -> Result<Vec<(u32, i64)>, sqlx::Error> {
    let ids: Vec<i32> = rows.iter().map(|row| row.cast_signed()).collect();
    let found: Vec<(i32, i64)> = sqlx::query_as("select id, version from history where id = any($1)")
        .bind(ids)
        .fetch_all(pool)
        .await?;
    Ok(found.into_iter().map(|(id, version)| (id.cast_unsigned(), version)).collect())
}

/// Changes a row, and returns the version that it has from then on if the transaction commits.
pub async fn change(connection: &mut PgConnection, row: u32) -> Result<i64, sqlx::Error> {
    sqlx::query_scalar("update history set version = version + 1 where id = $1 returning version")
        .bind(row.cast_signed())
        .fetch_one(connection)
        .await
}

/// Lets the transaction be refused when it wants to commit.
pub async fn spoil(connection: &mut PgConnection) -> Result<(), sqlx::Error> {
    sqlx::query("insert into refused values (-1)").execute(connection).await.map(drop)
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;
    use rand::rngs::StdRng;

    use super::*;

    #[test]
    fn every_row_is_picked_and_the_first_most_often() {
        let mut random = StdRng::seed_from_u64(1);
        let mut counts = [0; 100];
        (0..100_000).for_each(|_| counts[pick(100, &mut random) as usize] += 1);
        assert!(counts.iter().all(|count| *count > 100), "{counts:?}");
        let first: i32 = counts[..10].iter().sum();
        assert!((30_000..34_000).contains(&first), "{first}");
    }
}
