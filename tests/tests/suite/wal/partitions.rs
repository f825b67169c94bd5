//! Partitions: each has a replica identity and a TRUNCATE of its own, and they come and go while the log is read.

use devstack::eventually;
use tests::{Pair, SETTLED};

use super::{captured, sql, until_read, until_unread};

/// The key is made of a column that no primary key holds. Only the partitions say what the log holds of it.
const SCHEMA: &str =
    "create table visits (id bigint, day date, page text, primary key (id, day)) partition by range (day);
    create table visits_1 partition of visits for values from ('2026-01-01') to ('2026-02-01');
    alter table visits_1 replica identity full;
    create table users (id bigint primary key, name text);
    insert into users values (1000, 'x');
    insert into visits values (1, '2026-01-15', 'a'), (2, '2026-01-15', 'b')";

const RULES: &str = r#"
    [[table]]
    name = "visits"
    keys = ["page:{page}"]
    on_truncate = ["page:"]
    [[table]]
    name = "users"
    keys = ["user:{id}:profile"]
    on_truncate = ["user:"]
"#;

const SECOND: &str =
    "create table visits_2 partition of visits for values from ('2026-02-01') to ('2026-03-01')";

async fn fill(pair: &Pair, keys: &[&str]) {
    for key in keys {
        pair.fill(key).await.unwrap();
    }
}

async fn unknown_changes(pair: &Pair) -> f64 {
    pair.relay.metric("relay_wal_unknown_changes_total").await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_identity_of_the_partition_counts_and_not_that_of_the_partitioned_table() {
    let pair = captured(SCHEMA, RULES, &[]).await;
    fill(&pair, &["page:a", "page:other"]).await;
    sql(&pair, "update visits set page = 'c' where id = 1").await;
    pair.until_none("page:a").await;
    super::fence(&pair).await;
    assert!(pair.is_cached("page:other").await.unwrap(), "the log says which page it was");
    assert!(unknown_changes(&pair).await < 1.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_partition_made_while_the_log_is_read_has_the_rules_of_its_table() {
    let pair = captured(SCHEMA, RULES, &[]).await;
    super::fence(&pair).await;
    sql(&pair, SECOND).await;
    sql(&pair, "alter table visits_2 replica identity full").await;
    sql(&pair, "insert into visits values (3, '2026-02-15', 'd')").await;
    super::fence(&pair).await;
    fill(&pair, &["page:d", "page:other"]).await;
    sql(&pair, "update visits set page = 'e' where id = 3").await;
    pair.until_none("page:d").await;
    super::fence(&pair).await;
    assert!(pair.is_cached("page:other").await.unwrap());
    assert!(unknown_changes(&pair).await < 1.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_partition_whose_identity_is_too_weak_costs_the_namespace_and_is_named() {
    let schema: &'static str = "create table visits (id bigint, day date, page text, primary key (id, day)) partition by range (day);
        alter table visits replica identity full";
    let rules = r#"
        [[table]]
        name = "visits"
        keys = ["page:{page}"]
        on_truncate = ["page:"]
    "#;
    let pair = captured(schema, rules, &[]).await;
    sql(&pair, SECOND).await;
    sql(&pair, "insert into visits values (3, '2026-02-15', 'd')").await;
    fill(&pair, &["page:d"]).await;
    sql(&pair, "update visits set page = 'e' where id = 3").await;
    pair.until_none("page:d").await;
    // The key may have gone with the event of the insert.
    eventually(SETTLED, async || (unknown_changes(&pair).await >= 1.0).then_some(())).await;
    let log = pair.relay.process().log();
    assert!(log.contains("ALTER TABLE public.visits_2 REPLICA IDENTITY FULL"), "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_partition_that_is_emptied_alone_invalidates_what_truncate_means() {
    let pair = captured(SCHEMA, RULES, &[]).await;
    fill(&pair, &["page:a"]).await;
    sql(&pair, "truncate visits_1").await;
    pair.until_none("page:*").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_partition_that_came_and_went_while_nobody_read_costs_the_namespace() {
    let pair = captured(SCHEMA, RULES, &[]).await;
    super::fence(&pair).await;
    pair.relay.process().terminate().await.unwrap();
    until_unread(&pair).await;
    fill(&pair, &["page:d"]).await;
    sql(&pair, SECOND).await;
    sql(&pair, "insert into visits values (3, '2026-02-15', 'd')").await;
    sql(&pair, "drop table visits_2").await;
    pair.relay.process().start().unwrap();
    pair.until_none("page:d").await;
    assert!(unknown_changes(&pair).await >= 1.0);
    assert!(pair.relay.process().log().contains("table public.visits_2 is not known"));
    super::fence(&pair).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_publication_in_the_name_of_partitioned_tables_is_corrected_and_what_it_hid_declared_stale() {
    let pair = captured(SCHEMA, RULES, &[]).await;
    super::fence(&pair).await;
    pair.relay.process().terminate().await.unwrap();
    until_unread(&pair).await;
    sql(&pair, "alter publication outbox_relay set (publish_via_partition_root = true)").await;
    fill(&pair, &["page:a"]).await;
    sql(&pair, "truncate visits_1").await;
    pair.relay.process().start().unwrap();
    pair.until_none("page:a").await;
    until_read(&pair).await;
    eventually(SETTLED, async || {
        let rows = pair.stack.postgres.query("select pubviaroot::text from pg_publication").await.unwrap();
        rows[0][0].as_deref() == Some("false")
    })
    .await;
    super::fence(&pair).await;
}
