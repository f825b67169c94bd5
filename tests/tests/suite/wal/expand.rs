//! Further keys that only the database knows: a page of an order that shows a product.

use devstack::eventually;
use sqlx::Connection;
use tests::{Pair, SETTLED};

use super::{captured, sql};

const SHOP: &str = "create schema shop;
    create domain product_id as text;
    create table shop.products (id product_id primary key, price int, shelf int);
    create table shop.lines (order_id int, product_id text references shop.products on delete cascade on update cascade);
    insert into shop.products values ('it''s', 1, 1), ('b\\\"', 1, 1), ('c', 1, 1);
    insert into shop.lines values (100, 'it''s'), (100, 'c'), (101, 'b\\\"'), (102, null)";

const RULES: &str = r#"
    [[table]]
    name = "shop.products"
    columns = ["price"]
    keys = ["product:{id}"]
    on_truncate = "ignore"
    [[table.expand]]
    sql = "select 'order:' || order_id || ':page' from lines where product_id = any($1)"
    namespaces = ["order:"]
    [[table.expand]]
    sql = "select 'seen:' || id from unnest($1) id -- and nothing else"
    namespaces = ["seen:"]
"#;

async fn shop() -> Pair {
    captured(SHOP, RULES, &[]).await
}

async fn fill(pair: &Pair, keys: &[&str]) {
    for key in keys {
        pair.fill(key).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_page_that_shows_a_changed_row_goes_and_no_other() {
    let pair = shop().await;
    let pages = ["order:100:page", "order:101:page", "order:102:page"];
    fill(&pair, &pages).await;
    fill(&pair, &["product:it's", "seen:it's"]).await;
    sql(&pair, "update shop.products set price = 2 where id = 'it''s'").await;
    pair.until_none("order:100:*").await;
    pair.until_none("product:it's").await;
    pair.until_none("seen:it's").await;
    sql(&pair, "update shop.products set price = 2 where id like 'b%'").await;
    pair.until_none("order:101:*").await;
    assert!(pair.is_cached("order:102:page").await.unwrap(), "no product of it changed");
    // Old and new primary key, of a row that is another's reference at the same time.
    fill(&pair, &["seen:c", "seen:d", "order:100:page"]).await;
    sql(&pair, "update shop.products set id = 'd' where id = 'c'").await;
    for pattern in ["seen:*", "order:100:*"] {
        pair.until_none(pattern).await;
    }
    assert!(pair.relay.metric("relay_wal_expand_seconds_count").await.unwrap() >= 3.0);
    assert_eq!(pair.relay.metric("relay_wal_unknown_changes_total").await.unwrap_or(0.0), 0.0);
}

/// What the query reads was written by the transaction itself, so it must not be asked before that is visible.
#[tokio::test(flavor = "multi_thread")]
async fn the_database_is_asked_when_it_can_know() {
    let pair = shop().await;
    fill(&pair, &["order:500:page"]).await;
    sql(&pair, "alter system set synchronous_standby_names = 'ghost'").await;
    sql(&pair, "select pg_reload_conf()").await;
    let url = pair.stack.postgres_url();
    let writer = tokio::spawn(async move {
        let mut connection = sqlx::PgConnection::connect(&url).await.unwrap();
        let change =
            "insert into shop.lines values (500, 'c'); update shop.products set price = 3 where id = 'c'";
        sqlx::raw_sql(change).execute(&mut connection).await
    });
    eventually(SETTLED, async || pair.relay.metric("relay_wal_changes_total").await.unwrap_or(0.0) >= 1.0)
        .await;
    assert!(pair.is_cached("order:500:page").await.unwrap());
    sql(&pair, "alter system reset synchronous_standby_names").await;
    sql(&pair, "select pg_reload_conf()").await;
    writer.await.unwrap().unwrap();
    pair.until_none("order:500:*").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_query_that_fails_costs_its_namespaces_and_is_never_silent() {
    let pair = shop().await;
    sql(&pair, "alter table shop.lines rename column order_id to number").await;
    fill(&pair, &["order:100:page", "order:102:page", "product:c", "other:1"]).await;
    sql(&pair, "update shop.products set price = 2 where id = 'c'").await;
    pair.until_none("order:*").await;
    pair.until_none("product:c").await;
    assert!(pair.is_cached("other:1").await.unwrap());
    assert!(pair.relay.metric("relay_wal_unknown_changes_total").await.unwrap() >= 1.0);
    let log = pair.relay.process().log();
    assert!(log.contains("rules.toml:8: table shop.products") && log.contains("order_id"), "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn more_keys_than_are_published_singly_become_their_namespaces() {
    let pair = shop().await;
    sql(&pair, "insert into shop.lines select 1000 + n, 'c' from generate_series(1, 60000) n").await;
    fill(&pair, &["order:1001:page", "order:61000:page", "other:1"]).await;
    sql(&pair, "update shop.products set price = 2 where id = 'c'").await;
    pair.until_none("order:*").await;
    assert!(pair.is_cached("other:1").await.unwrap());
    assert!(pair.relay.process().log().contains("more than 50000 keys"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_outside_the_namespaces_goes_and_is_told_of() {
    let rules = r#"
        [[table]]
        name = "users"
        on_truncate = "ignore"
        [[table.expand]]
        sql = "select 'page:' || id from unnest($1) id"
        namespaces = ["order:"]
    "#;
    let pair = captured(super::USERS, rules, &[]).await;
    fill(&pair, &["page:7"]).await;
    sql(&pair, "update users set name = 'x' where id = 7").await;
    pair.until_none("page:7").await;
    assert!(pair.relay.process().log().contains("outside its namespaces"));
}
