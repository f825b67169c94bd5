use std::time::Duration;

use devstack::eventually;
use tests::{Daemon, Pair, PairOptions};

use super::{USER_RULES, fence, sql, users};

#[tokio::test(flavor = "multi_thread")]
async fn a_table_that_is_renamed_under_load_keeps_its_rules() {
    let pair = users().await;
    pair.fill_many("user", 0..1).await.unwrap();
    let renames = async {
        for _ in 0..5 {
            sql(&pair, "alter table users rename to people").await;
            tokio::time::sleep(Duration::from_millis(20)).await;
            sql(&pair, "alter table people rename to users").await;
        }
        sql(&pair, "alter table users rename to people").await;
    };
    let writes = async {
        for id in 1..=100 {
            pair.fill(&format!("user:{id}:profile")).await.unwrap();
            let mut table = "users";
            loop {
                let update = format!("update {table} set name = 'x' where id = {id}");
                if sqlx::raw_sql(sqlx::AssertSqlSafe(update)).execute(&pair.pool).await.is_ok() {
                    break;
                }
                table = if table == "users" { "people" } else { "users" };
            }
        }
    };
    tokio::join!(renames, writes);
    pair.until_none("user:*:profile").await;
    assert!(pair.relay.metric("relay_wal_unwatched_changes_total").await.unwrap_or(0.0) < 1.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_column_that_is_renamed_under_the_rules_costs_the_namespace_and_is_never_silent() {
    let pair = users().await;
    pair.fill("user:1:profile").await.unwrap();
    pair.fill("user:2:profile").await.unwrap();
    pair.fill("order:1").await.unwrap();
    sql(&pair, "alter table users rename column id to user_id").await;
    sql(&pair, "update users set name = 'x' where user_id = 1").await;
    pair.until_none("user:*").await;
    assert!(pair.is_cached("order:1").await.unwrap());
    assert!(pair.relay.metric("relay_wal_unknown_changes_total").await.unwrap() >= 1.0);
    assert!(pair.relay.process().log().contains("column id"), "it says which column");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_column_disturbs_nothing() {
    let pair = users().await;
    sql(&pair, "alter table users add column email text").await;
    fence(&pair).await;
}

/// Starts a relay that must refuse to, and returns what it said.
async fn refusal(schema: &'static str, rules: &'static str) -> String {
    let pair = Pair::start_with(PairOptions { schema, rules, ..Default::default() }).await.unwrap();
    let relay: Daemon = pair.another_relay(&[("RELAY_SOURCE", "wal".to_owned())]).unwrap();
    eventually(Duration::from_secs(30), async || !relay.process().is_running()).await;
    relay.process().log()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_template_that_needs_what_the_log_does_not_hold_is_refused_at_the_start() {
    let rules = r#"
        [[table]]
        name = "users"
        keys = ["user:{id}", "mail:{email}"]
        on_truncate = "ignore"
    "#;
    let log = refusal("create table users (id bigint primary key, email text)", rules).await;
    assert!(log.contains("rules.toml:4") && log.contains("public.users"), "{log}");
    assert!(log.contains("email") && log.contains("REPLICA IDENTITY FULL"), "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_whose_writers_a_publication_would_break_is_refused_and_not_published() {
    let log = refusal("create table users (id bigint, name text)", USER_RULES).await;
    assert!(log.contains("not in the replica identity"), "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_that_does_not_exist_is_refused_with_the_line_of_the_rules() {
    let log = refusal("select 1", USER_RULES).await;
    assert!(log.contains("rules.toml:3") && log.contains("no such table"), "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_identity_that_is_taken_away_costs_the_namespace() {
    let schema =
        "create table users (id bigint primary key, email text); alter table users replica identity full;
        insert into users values (1, 'a@x')";
    let rules = r#"
        [[table]]
        name = "users"
        keys = ["mail:{email}"]
        on_truncate = ["mail:"]
    "#;
    let pair = super::captured(schema, rules, &[]).await;
    pair.fill("mail:a@x").await.unwrap();
    // The log does not say any more what the address was before.
    sql(&pair, "alter table users replica identity default; update users set email = 'b@x'").await;
    pair.until_none("mail:*").await;
    assert!(pair.relay.metric("relay_wal_unknown_changes_total").await.unwrap() >= 1.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn sql_in_the_rules_must_say_where_its_keys_lie() {
    let rules = r#"
        [[table]]
        name = "users"
        on_truncate = "ignore"
        [[table.expand]]
        sql = "select 'order:' || id from users where id = any($1)"
    "#;
    let log = refusal("create table users (id bigint primary key)", rules).await;
    assert!(log.contains("rules.toml:6") && log.contains("namespaces = [\"order:\"]"), "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_without_a_beginning_that_could_be_invalidated_is_refused() {
    let rules = r#"
        [[table]]
        name = "users"
        keys = ["user:{id}", "{id}:page"]
        on_truncate = "ignore"
    "#;
    let log = refusal("create table users (id bigint primary key)", rules).await;
    assert!(log.contains("rules.toml:4") && log.contains("begin it with a literal"), "{log}");
}
