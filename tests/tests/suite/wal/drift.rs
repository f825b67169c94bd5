//! The publication changes under the reader, or under one that comes later.

use devstack::eventually;
use tests::{Pair, SETTLED};

use super::{captured, fence, sql, until_read, until_unread, users};

/// Waits until the publication is for whole rows of the table of users, and of nothing else.
async fn until_whole(pair: &Pair) {
    let query = "select prrelid = 'users'::regclass and num_nonnulls(prqual, prattrs::text) = 0 from pg_publication_rel";
    eventually(SETTLED, async || {
        let rows = pair.stack.postgres.query(query).await.unwrap();
        if rows == [[Some("t".to_owned())]] { Ok(()) } else { Err(format!("{rows:?}")) }
    })
    .await;
}

/// What changes behind the back of the reader is declared stale, and captured from then on.
async fn is_noticed(pair: &Pair, change: &str) {
    fence(pair).await;
    pair.fill("user:1:profile").await.unwrap();
    sql(pair, change).await;
    sql(pair, "update users set name = 'missed' where id = 1").await;
    pair.until_none("user:1:profile").await;
    until_whole(pair).await;
    assert!(pair.relay.process().log().contains("so that changes may be missing"));
    pair.relay.until_ready().await;
    until_read(pair).await;
    fence(pair).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_that_somebody_takes_out_of_the_publication_is_put_back_and_declared_stale() {
    let change = "create table other (id bigint primary key); alter publication outbox_relay set table other";
    is_noticed(&users().await, change).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_row_filter_in_the_publication_is_taken_away_and_what_it_hid_declared_stale() {
    let change = "alter publication outbox_relay set table users where (id > 500)";
    is_noticed(&users().await, change).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_that_is_put_in_the_place_of_another_is_captured_from_then_on() {
    let change =
        "create table new_users (like users including all); insert into new_users select * from users;
        begin; alter table users rename to old_users; alter table new_users rename to users; commit";
    is_noticed(&users().await, change).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_relay_with_other_rules_that_starts_beside_the_reader_leaves_the_publication_alone() {
    let schema =
        "create table users (id bigint primary key, name text); create table orders (id bigint primary key);
        insert into users values (1000, 'x')";
    let rules = r#"
        [[table]]
        name = "users"
        keys = ["user:{id}:profile"]
        on_truncate = ["user:"]
        [[table]]
        name = "orders"
        keys = ["order:{id}"]
        on_truncate = ["order:"]
    "#;
    let pair = captured(schema, rules, &[]).await;
    fence(&pair).await;
    let older = pair.stack.directory().path().join("older.toml");
    std::fs::write(&older, super::USER_RULES).unwrap();
    let second = pair.another_relay(&[("RELAY_RULES", older.display().to_string())]).unwrap();
    second.until_ready().await;
    let count = async || {
        let rows = pair.stack.postgres.query("select count(*)::text from pg_publication_rel").await.unwrap();
        rows[0][0].clone().unwrap()
    };
    assert_eq!(count().await, "2");
    // When its turn comes it makes the publication fit its own rules.
    pair.relay.process().terminate().await.unwrap();
    until_read(&pair).await;
    eventually(SETTLED, async || count().await == "1").await;
    fence(&pair).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_publication_hid_while_no_relay_ran_is_declared_stale_as_well() {
    let pair = users().await;
    fence(&pair).await;
    pair.relay.process().terminate().await.unwrap();
    until_unread(&pair).await;
    pair.fill("user:1:profile").await.unwrap();
    sql(&pair, "alter publication outbox_relay set table users (id)").await;
    sql(&pair, "alter publication outbox_relay set (publish = 'insert')").await;
    sql(&pair, "update users set name = 'missed' where id = 1").await;
    pair.relay.process().start().unwrap();
    pair.until_none("user:1:profile").await;
    until_whole(&pair).await;
    fence(&pair).await;
}
