//! Generated columns: since Postgres 18 a table whose replica identity has one refuses its writers unless it is published.

use devstack::eventually;
use tests::{Pair, SETTLED};

use super::{captured, is_since, relay, sql, until_read};

const GENERATED_COLUMNS: i32 = 180_000;

const ITEMS: &str = "create table items (id bigint primary key, name text,
        slug text generated always as (lower(name)) stored);
    alter table items replica identity full;
    insert into items (id, name) select n, 'Item ' || n from generate_series(1, 1000) n;
    create table users (id bigint primary key, name text); insert into users values (1000, 'x')";
const ITEM_RULES: &str = r#"
    [[table]]
    name = "items"
    keys = ["item:{id}"]
    on_truncate = ["item:"]
"#;
const SLUG_RULES: &str = r#"
    [[table]]
    name = "items"
    keys = ["item:{id}", "slug:{slug}"]
    on_truncate = ["item:", "slug:"]
"#;

/// The application's own statements work, and what they change is invalidated.
async fn assert_captured(pair: &Pair) {
    until_read(pair).await;
    for statement in ["update items set name = 'Other ' || id where id = 1", "delete from items where id = 2"]
    {
        pair.fill("item:1").await.unwrap();
        pair.fill("item:2").await.unwrap();
        sql(pair, statement).await;
        pair.until_none(if statement.starts_with("delete") { "item:2" } else { "item:1" }).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn writers_of_a_table_whose_replica_identity_has_a_generated_column_go_on() {
    let pair = captured(ITEMS, ITEM_RULES, &[]).await;
    assert_captured(&pair).await;
    if !is_since(&pair, GENERATED_COLUMNS, "publication of generated columns").await {
        return;
    }
    // As a migration tool would leave it: noticed, and what it refused until then was refused loudly.
    sql(&pair, "alter publication outbox_relay set (publish_generated_columns = none)").await;
    eventually(SETTLED, async || {
        let update = "update items set name = 'back' where id = 3";
        sqlx::raw_sql(update).execute(&pair.pool).await.map(drop).map_err(|error| error.to_string())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stored_generated_column_can_be_part_of_a_key_where_the_log_has_it() {
    let pair = captured(ITEMS, ITEM_RULES, &[]).await;
    let rules = pair.stack.directory().path().join("slug.toml");
    std::fs::write(&rules, SLUG_RULES).unwrap();
    let rules = rules.display().to_string();
    let (ok, text) = relay(&pair, &["rules", "check", "--wal"], &[("RELAY_RULES", &rules)]).await;
    if !is_since(&pair, GENERATED_COLUMNS, "publication of generated columns").await {
        assert!(
            !ok && text.contains("which the write-ahead log does not carry before Postgres 18"),
            "{text}"
        );
        return;
    }
    assert!(ok, "{text}");
    pair.relay.process().terminate().await.unwrap();
    let second = pair.another_relay(&[("RELAY_RULES", rules)]).unwrap();
    second.until_ready().await;
    until_read(&pair).await;
    pair.fill("slug:item 5").await.unwrap();
    pair.fill("slug:new").await.unwrap();
    sql(&pair, "update items set name = 'NEW' where id = 5").await;
    pair.until_none("slug:*").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_virtual_generated_column_is_refused_where_it_would_be_missed_or_fail_writers() {
    let pair = captured(ITEMS, ITEM_RULES, &[]).await;
    if !is_since(&pair, GENERATED_COLUMNS, "virtual generated columns").await {
        return;
    }
    sql(&pair, "create table people (id bigint primary key, email text, lower_email text generated always as (lower(email)));
        alter table people replica identity full").await;
    let check = async |rules: &str, arguments: &[&str]| {
        let file = pair.stack.directory().path().join("people.toml");
        std::fs::write(&file, rules).unwrap();
        relay(&pair, arguments, &[("RELAY_RULES", &file.display().to_string())]).await
    };
    for rule in [
        "keys = ['p:{lower_email}']",
        "keys = ['p:{id}']\ncolumns = ['lower_email']",
        "keys = ['p:{id}']\nwhen = { column = 'lower_email', equals = 'x' }",
    ] {
        let rules = format!("[[table]]\nname = 'people'\non_truncate = ['p:']\n{rule}");
        for arguments in [
            &["rules", "check"] as &[&str],
            &["rules", "apply"],
            &["rules", "sql"],
            &["rules", "check", "--wal"],
        ] {
            let (ok, text) = check(&rules, arguments).await;
            assert!(
                !ok && text.contains("lower_email: is a virtual generated column"),
                "{arguments:?}: {text}"
            );
        }
    }
    // No rule names it, and the writers would fail all the same.
    let rules = "[[table]]\nname = 'people'\nkeys = ['p:{id}']\non_truncate = ['p:']";
    let (ok, text) = check(rules, &["rules", "check", "--wal"]).await;
    assert!(!ok && text.contains("ALTER TABLE public.people REPLICA IDENTITY DEFAULT"), "{text}");
    let (ok, text) = check(rules, &["rules", "apply"]).await;
    assert!(ok, "triggers do not mind: {text}");
    sql(&pair, "alter table people replica identity default").await;
    let (ok, text) = check(rules, &["rules", "check", "--wal"]).await;
    assert!(ok, "{text}");
}
