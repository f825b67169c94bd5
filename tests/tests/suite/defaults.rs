//! Server, database and role have defaults that nobody thought of.

use std::process::Command;
use std::time::{Duration, Instant};

use outbox::Event;
use sqlx::{Connection, PgConnection};
use tests::{Pair, PairOptions, program};

const DEFAULTS: &str = "
    alter database postgres set default_transaction_isolation = 'repeatable read';
    alter database postgres set default_transaction_read_only = on;
    alter database postgres set default_transaction_deferrable = on;
    alter database postgres set statement_timeout = '100ms';
    alter database postgres set lock_timeout = '1ms';
    alter database postgres set idle_session_timeout = '200ms';
    alter database postgres set idle_in_transaction_session_timeout = '50ms';
    alter database postgres set search_path = '';
    alter database postgres set bytea_output = 'escape';
    alter database postgres set intervalstyle = 'iso_8601';
    alter database postgres set standard_conforming_strings = off;
    alter database postgres set array_nulls = off;
    alter database postgres set row_security = off;
    alter database postgres set synchronous_commit = off;
    alter database postgres set datestyle = 'SQL, DMY';
    alter database postgres set timezone = 'Pacific/Chatham';
    alter database postgres set extra_float_digits = -15;
    alter database postgres set client_min_messages = error;
    alter database postgres set enable_indexscan = off;
    alter database postgres set jit_above_cost = 0;
    alter database postgres set plan_cache_mode = force_generic_plan;
    alter database postgres set plpgsql.extra_errors = 'all';
    alter database postgres set plpgsql.variable_conflict = 'use_column';
    alter database postgres set transform_null_equals = on;
";

/// What a service has to say anyway where sessions are read-only and impatient.
const WRITER: &str = "set default_transaction_read_only = off; set statement_timeout = 0; set jit = off; \
    set idle_session_timeout = 0; \
    set idle_in_transaction_session_timeout = 0";

#[tokio::test(flavor = "multi_thread")]
async fn defaults_of_the_database_change_nothing() {
    let pair = Pair::start_with(PairOptions { schema: DEFAULTS, ..Default::default() }).await.unwrap();
    let mut writer = PgConnection::connect(&pair.stack.postgres_url()).await.unwrap();
    sqlx::raw_sql(WRITER).execute(&mut writer).await.unwrap();
    let mut slowest = Duration::ZERO;
    for number in 0..6 {
        let keys: Vec<String> = (0..10 + number * 30).map(|key| format!("hostile:{key}")).collect();
        pair.fill("hostile:0").await.unwrap();
        let enqueued = Instant::now();
        let mut tx = writer.begin().await.unwrap();
        outbox::enqueue(&mut tx, &Event::delete(keys.clone()).unwrap()).await.unwrap();
        sqlx::query("select outbox.enqueue($1)").bind(&keys).execute(&mut *tx).await.unwrap();
        tx.commit().await.unwrap();
        pair.until_none("hostile:*").await;
        slowest = slowest.max(enqueued.elapsed());
    }
    assert!(slowest < Duration::from_secs(5), "{slowest:?}");
    pair.until_outbox_empty().await;
    pair.relay.until_ready().await;
    let failures = pair.relay.metric("relay_database_failures_total").await.unwrap();
    assert!(failures < 1.0, "{failures} failures; {}", pair.relay.process().log());

    // The keeper gives a new stream what is retained, with statements of its own.
    pair.stack.nats.request("$JS.API.STREAM.DELETE.INVALIDATIONS", "").await.unwrap();
    devstack::eventually(tests::SETTLED, async || {
        pair.relay.metric("relay_republished_messages_total").await.unwrap() >= 1.0
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_schema_is_installed_whatever_the_defaults_are() {
    let pair = Pair::start_with(PairOptions { schema: DEFAULTS, ..Default::default() }).await.unwrap();
    let mut admin = PgConnection::connect(&pair.stack.postgres_url()).await.unwrap();
    sqlx::raw_sql(WRITER).execute(&mut admin).await.unwrap();
    pair.relay.process().terminate().await.unwrap();
    sqlx::raw_sql("set lock_timeout = 0; drop schema outbox cascade").execute(&mut admin).await.unwrap();
    let mut migrate = Command::new(program("relay").unwrap());
    migrate.arg("migrate").env("DATABASE_URL", pair.stack.postgres_url()).env("NO_COLOR", "1");
    let output = tokio::task::spawn_blocking(move || migrate.output().unwrap()).await.unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// Change data capture and migration services create one, with every table there is.
#[tokio::test(flavor = "multi_thread")]
async fn a_publication_for_all_tables_stops_neither_publishing_nor_the_repair_after_a_loss() {
    let pair = Pair::start().await.unwrap();
    sqlx::raw_sql("create publication everything for all tables").execute(&pair.pool).await.unwrap();
    let without = "select c.relname from pg_class c
        where c.relnamespace = 'outbox'::regnamespace and c.relkind = 'r' and c.relreplident <> 'f'
            and not exists (select from pg_index i where i.indrelid = c.oid and i.indisprimary)";
    let without: Vec<String> = sqlx::query_scalar(without).fetch_all(&pair.pool).await.unwrap();
    assert!(without.is_empty(), "these could not be updated: {without:?}");

    pair.fill("before").await.unwrap();
    pair.enqueue(&["before"]).await.unwrap();
    pair.until_none("before").await;
    pair.until_recorded().await;
    pair.stack.nats.kill().unwrap();
    pair.stack.nats.wipe_data().unwrap();
    pair.stack.nats.start().await.unwrap();
    pair.fill("after").await.unwrap();
    pair.enqueue(&["after"]).await.unwrap();
    pair.until_none("after").await;
    devstack::eventually(tests::SETTLED, async || {
        pair.relay.metric("relay_republished_messages_total").await.unwrap() >= 1.0
    })
    .await;
    pair.relay.until_ready().await;
}
