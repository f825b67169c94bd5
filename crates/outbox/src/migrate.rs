use sqlx::migrate::Migrator;
use sqlx::{PgPool, Row};

use crate::statement::whole;

static EMBEDDED: Migrator = sqlx::migrate!("./migrations");

/// Table of applied migrations. In our own schema: the application may use sqlx migrations as well.
const TABLE: &str = "outbox.migrations";

/// The schema could not be installed.
#[derive(Debug, thiserror::Error)]
#[error("could not migrate the schema `outbox`")]
pub struct MigrateError(#[from] sqlx::migrate::MigrateError);

/// How the schema in the database compares with what this program was built for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SchemaState {
    /// The schema `outbox` is not there.
    Missing,
    /// Migrations are missing.
    Older {
        /// Version that is installed.
        installed: i64,
        /// Version this program needs.
        needed: i64,
    },
    /// Everything this program needs is there. A later schema counts too: migrations only ever add.
    Current,
}

/// Installs or upgrades the schema `outbox`. Safe to run at any time and by several processes at once.
///
/// # Errors
/// [`MigrateError`], for example when the role may not create a schema.
pub async fn migrate(pool: &PgPool) -> Result<(), MigrateError> {
    // Asked first, since the migrator's `if not exists` would have the server report all it finds.
    if schema_state(pool).await.map_err(sqlx::migrate::MigrateError::from)? == SchemaState::Current {
        return Ok(());
    }
    let mut migrator = Migrator::with_migrations(EMBEDDED.migrations.to_vec());
    migrator.dangerous_set_table_name(TABLE);
    migrator.create_schema("outbox");
    // A newer release may have migrated already; what it added does not disturb this one.
    migrator.set_ignore_missing(true);
    Ok(migrator.run(pool).await?)
}

/// Compares the installed schema with the one this program needs.
///
/// # Errors
/// Whatever the database says, such as a refused connection.
pub async fn schema_state(pool: &PgPool) -> Result<SchemaState, sqlx::Error> {
    let needed = EMBEDDED.migrations.iter().map(|migration| migration.version).max().unwrap_or(0);
    let present = whole(format!("select to_regclass('{TABLE}') is not null")).fetch_one(pool).await?;
    if !present.try_get::<bool, _>(0)? {
        return Ok(SchemaState::Missing);
    }
    let installed: i64 = whole("select coalesce(max(version), 0) from outbox.migrations where success")
        .fetch_one(pool)
        .await?
        .try_get(0)?;
    Ok(match installed {
        0 => SchemaState::Missing,
        installed if installed < needed => SchemaState::Older { installed, needed },
        _ => SchemaState::Current,
    })
}
