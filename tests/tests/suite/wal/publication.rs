//! A publication that is as it should be, and was not in between.

use tests::Pair;

use super::{
    USER_RULES, USERS, captured, fence, sql, until_not_ready_because, until_read, until_unread, users,
};

/// Takes the table out of the publication, changes a row, and puts the table back.
async fn change_unseen(pair: &Pair) {
    pair.fill("user:1:profile").await.unwrap();
    pair.fill("order:1").await.unwrap();
    sql(pair, "alter publication outbox_relay drop table users").await;
    sql(pair, "update users set name = 'missed' where id = 1").await;
    sql(pair, "alter publication outbox_relay add table users").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_that_was_out_of_the_publication_between_two_looks_is_declared_stale() {
    let pair = users().await;
    fence(&pair).await;
    change_unseen(&pair).await;
    pair.until_none("user:1:profile").await;
    assert!(pair.is_cached("order:1").await.unwrap(), "only what the rules of the table can name");
    until_read(&pair).await;
    pair.relay.until_ready().await;
    fence(&pair).await;
    // What the relay has written itself is no change.
    let said = |pair: &Pair| pair.relay.process().log().matches("somebody changed publication").count();
    assert_eq!(said(&pair), 1, "{}", pair.relay.process().log());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_that_was_out_of_the_publication_while_no_relay_ran_is_declared_stale() {
    let pair = users().await;
    fence(&pair).await;
    pair.relay.process().terminate().await.unwrap();
    until_unread(&pair).await;
    change_unseen(&pair).await;
    pair.relay.process().start().unwrap();
    pair.until_none("user:1:profile").await;
    fence(&pair).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_publication_that_was_dropped_and_created_again_between_two_looks_is_a_gap() {
    let pair = captured(USERS, USER_RULES, &[]).await;
    fence(&pair).await;
    pair.fill("user:1:profile").await.unwrap();
    sql(&pair, "drop publication outbox_relay").await;
    sql(&pair, "update users set name = 'missed' where id = 1").await;
    sql(&pair, "create publication outbox_relay for table users").await;
    sql(&pair, "insert into users values (2000, 'seen')").await;
    until_not_ready_because(&pair, "the publication did not exist at the position of the slot").await;
    let (ok, text) = super::relay(&pair, &["slot", "accept-gap"], &[]).await;
    assert!(ok, "{text}");
    pair.until_none("user:1:profile").await;
    pair.relay.until_ready().await;
    fence(&pair).await;
}
