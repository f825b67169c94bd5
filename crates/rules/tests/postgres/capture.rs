//! What the triggers capture of ordinary statements.

use crate::bed::{Bed, Enqueued};

pub(crate) const USERS: &str = "
    create table users (
        id bigint primary key, tenant_id int not null, name text, email text, seen int default 0, status text default 'live');
    insert into users (id, tenant_id, name, email)
        select n, n % 3, 'name ' || n, 'u' || n || '@x' from generate_series(1, 9) n";

pub(crate) const RULES: &str = r#"
[[table]]
name = "users"
columns = ["name"]
keys = ["user:{id}:profile", "tenant:{tenant_id}:user:{email}"]
topic = "people"
on_truncate = ["user:", "tenant:"]
"#;

#[tokio::test]
async fn insert_update_and_delete_enqueue_every_key_of_every_row_once() {
    let bed = Bed::watched(USERS, RULES).await;
    bed.run("insert into users (id, tenant_id, email) values (20, 5, 'a@x'), (21, 5, 'b@x')").await;
    let events = bed.events().await;
    assert_eq!(events.len(), 1, "one event for one statement: {events:?}");
    assert_eq!(events[0].topic, "people");
    assert_eq!(events[0].keys.len(), 4);
    let of_1 = ["tenant:1:user:u1@x", "user:1:profile"];
    assert_eq!(bed.keys("update users set name = 'x' where id = 1").await, of_1);
    assert_eq!(bed.keys("delete from users where id = 1").await, of_1);
    assert!(bed.keys("update users set name = 'x' where id = 77").await.is_empty());
}

#[tokio::test]
async fn an_update_of_columns_that_nobody_watches_enqueues_nothing() {
    let bed = Bed::watched(USERS, RULES).await;
    assert!(bed.keys("update users set seen = seen + 1").await.is_empty());
    assert!(bed.keys("update users set name = name").await.is_empty());
    // Of many rows only those that changed.
    let sql = "update users set seen = seen + 1, name = case when id = 2 then 'new' else name end";
    assert_eq!(bed.keys(sql).await, ["tenant:2:user:u2@x", "user:2:profile"]);
    // NULL differs from a value, and from no other NULL.
    assert_eq!(bed.keys("update users set name = null where id = 3").await.len(), 2);
    assert!(bed.keys("update users set name = null where id = 3").await.is_empty());
}

#[tokio::test]
async fn a_changed_key_column_enqueues_the_old_and_the_new_key() {
    let bed = Bed::watched(USERS, RULES).await;
    let keys = bed.keys("update users set email = 'new@x' where id = 4").await;
    assert_eq!(keys, ["tenant:1:user:new@x", "tenant:1:user:u4@x", "user:4:profile"]);
    let keys = bed.keys("update users set id = 40 where id = 5").await;
    assert_eq!(keys, ["tenant:2:user:u5@x", "user:40:profile", "user:5:profile"]);
}

#[tokio::test]
async fn rows_that_trade_their_values_are_changed_rows() {
    let bed = Bed::watched(
        USERS,
        r#"
        [[table]]
        name = "users"
        columns = ["name"]
        keys = ["tenant:{tenant_id}"]
        on_truncate = "ignore""#,
    )
    .await;
    // Both of tenant 1: without the primary key the images would be the same set before and after.
    let trade = "update users u set name = o.name from users o where u.id in (1, 4) and o.id = 5 - u.id";
    assert_eq!(bed.keys(trade).await, ["tenant:1"]);
}

#[tokio::test]
async fn without_watched_columns_every_update_counts() {
    let bed = Bed::watched(
        USERS,
        r#"
        [[table]]
        name = "users"
        keys = ["user:{id}", "users"]
        on_truncate = "ignore""#,
    )
    .await;
    assert_eq!(bed.keys("update users set seen = seen where id = 1").await, ["user:1", "users"]);
    assert!(bed.keys("truncate users").await.is_empty());
}

#[tokio::test]
async fn only_images_on_which_the_condition_holds_count() {
    let bed = Bed::watched(
        USERS,
        r#"
        [[table]]
        name = "users"
        columns = ["name"]
        keys = ["user:{id}:{name}"]
        when = { column = "status", in = ["live", "it's"] }
        on_truncate = "ignore""#,
    )
    .await;
    assert_eq!(bed.keys("update users set name = 'x' where id = 1").await, ["user:1:name 1", "user:1:x"]);
    assert_eq!(bed.keys("update users set status = 'gone', name = 'y' where id = 1").await, ["user:1:x"]);
    assert!(bed.keys("update users set name = 'z' where id = 1").await.is_empty());
    assert!(bed.keys("update users set status = null where id = 1").await.is_empty());
    assert_eq!(bed.keys("update users set status = 'it''s' where id = 1").await, ["user:1:z"]);
    bed.install(
        r#"
        [[table]]
        name = "users"
        keys = ["user:{id}"]
        when = { not = { column = "status", equals = "live" } }
        on_truncate = "ignore""#,
    )
    .await;
    assert_eq!(bed.keys("update users set seen = 1 where id in (1, 2)").await, ["user:1"]);
    assert_eq!(bed.keys("update users set status = null where id = 2").await, ["user:2"]);
}

#[tokio::test]
async fn truncate_enqueues_the_namespaces() {
    let bed = Bed::watched(USERS, RULES).await;
    bed.run("truncate users").await;
    let keys = vec!["user:".to_owned(), "tenant:".to_owned()];
    assert_eq!(bed.events().await, [Enqueued { topic: "people".to_owned(), keys, namespace: true }]);
}

#[tokio::test]
async fn expand_maps_changed_primary_keys_to_further_keys() {
    let bed = Bed::watched(
        "create schema shop;
         create table shop.products (id int primary key, price numeric, seen int);
         create table shop.lines (order_id int, product_id int);
         insert into shop.products values (1, 10, 0), (2, 20, 0), (3, 30, 0);
         insert into shop.lines values (100, 1), (100, 2), (101, 2), (102, null)",
        r#"
        [[table]]
        name = "shop.products"
        columns = ["price"]
        keys = ["product:{id}"]
        on_truncate = "ignore"
        [[table.expand]]
        sql = "select 'order:' || order_id from lines where product_id = any($1)"
        [[table.expand]]
        sql = "select 'count:' || cardinality($1)""#,
    )
    .await;
    let keys = bed.keys("update shop.products set price = price + 1 where id <= 2").await;
    assert_eq!(keys, ["count:2", "order:100", "order:101", "product:1", "product:2"]);
    let keys = bed.keys("update shop.products set id = 30 where id = 3").await;
    assert_eq!(keys, ["count:2", "product:3", "product:30"], "old and new primary key");
    assert!(bed.keys("update shop.products set seen = 1").await.is_empty());
}

#[tokio::test]
async fn updating_a_hundred_thousand_rows_enqueues_a_hundred_events() {
    let bed = Bed::watched(
        "create table items (id int primary key, n int);
         insert into items select n, 0 from generate_series(1, 100000) n",
        "[[table]]\nname = 'items'\ncolumns = ['n']\nkeys = ['item:{id}']\non_truncate = 'ignore'",
    )
    .await;
    bed.run("update items set n = 1").await;
    let events = bed.events().await;
    assert_eq!(events.len(), 100);
    let mut keys: Vec<&str> = events.iter().flat_map(|event| event.keys.iter().map(String::as_str)).collect();
    keys.sort_unstable();
    keys.dedup();
    assert_eq!(keys.len(), 100_000);
}
