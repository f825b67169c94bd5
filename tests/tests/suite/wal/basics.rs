use super::{captured, fence, sql, users};

#[tokio::test(flavor = "multi_thread")]
async fn a_change_that_no_service_knows_of_invalidates_its_key_and_no_other() {
    let pair = users().await;
    pair.fill("user:1:profile").await.unwrap();
    pair.fill("user:2:profile").await.unwrap();
    sql(&pair, "update users set name = 'Ada L.' where id = 1").await;
    pair.until_none("user:1:*").await;
    fence(&pair).await;
    assert!(pair.is_cached("user:2:profile").await.unwrap(), "nothing changed there");
    assert!(pair.relay.metric("relay_wal_changes_total").await.unwrap() >= 1.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn old_and_new_key_go_when_a_key_column_changes_whatever_identifies_the_row() {
    let schema = "create table by_key (id bigint primary key);
        create table by_index (id bigint primary key, tenant int not null, email text not null);
        create unique index by_index_identity on by_index (tenant, email);
        alter table by_index replica identity using index by_index_identity;
        create table whole (id bigint primary key, email text);
        alter table whole replica identity full;
        insert into by_key values (1); insert into by_index values (1, 7, 'a@x');
        insert into whole values (1, 'a@x')";
    let rules = r#"
        [[table]]
        name = "by_key"
        keys = ["key:{id}"]
        on_truncate = "ignore"
        [[table]]
        name = "by_index"
        keys = ["index:{tenant}:{email}"]
        on_truncate = "ignore"
        [[table]]
        name = "whole"
        keys = ["whole:{email}"]
        on_truncate = "ignore"
    "#;
    let pair = captured(schema, rules, &[]).await;
    for key in ["key:1", "key:2", "index:7:a@x", "index:7:b@x", "whole:a@x", "whole:b@x"] {
        pair.fill(key).await.unwrap();
    }
    sql(&pair, "update by_key set id = 2; update by_index set email = 'b@x'; update whole set email = 'b@x'")
        .await;
    for pattern in ["key:*", "index:*", "whole:*"] {
        pair.until_none(pattern).await;
    }
    for key in ["key:2", "index:7:b@x", "whole:b@x"] {
        pair.fill(key).await.unwrap();
    }
    sql(&pair, "delete from by_key; delete from by_index; delete from whole").await;
    for pattern in ["key:*", "index:*", "whole:*"] {
        pair.until_none(pattern).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_large_value_that_did_not_change_is_still_part_of_the_key() {
    // Stored out of line and not compressed, so that an UPDATE of another column does not write it again.
    let schema = "create table docs (id bigint primary key, slug text, n int);
        alter table docs alter column slug set storage external; alter table docs replica identity full;
        alter table docs set (toast_tuple_target = 128);
        insert into docs values (1, repeat('s', 900) || repeat(' ', 2000) || 'x', 0)";
    let rules = r#"
        [[table]]
        name = "docs"
        keys = ["doc:{id}", "slug:{slug}"]
        on_truncate = "ignore"
    "#;
    let pair = captured(schema, rules, &[]).await;
    // Too long for a key: skipped, and counted, which shows that the value was known.
    pair.fill("doc:1").await.unwrap();
    sql(&pair, "update docs set n = 1").await;
    pair.until_none("doc:*").await;
    assert!(pair.relay.metric("relay_wal_unknown_changes_total").await.unwrap_or(0.0) < 1.0);

    let key = format!("slug:{}", "k".repeat(1000));
    pair.fill(&key).await.unwrap();
    sql(&pair, "update docs set slug = repeat('k', 1000)").await;
    pair.until_none("slug:*").await;
    pair.fill(&key).await.unwrap();
    sql(&pair, "update docs set n = 2").await;
    pair.until_none("slug:*").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn truncate_invalidates_the_namespaces_and_nothing_else() {
    let pair = users().await;
    pair.fill_many("user", 0..200).await.unwrap();
    pair.fill("order:1").await.unwrap();
    sql(&pair, "truncate users").await;
    pair.until_none("user:*").await;
    assert!(pair.is_cached("order:1").await.unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn copy_cascades_and_partitions_are_changes_like_any_other() {
    let schema = "create table users (id bigint primary key, name text);
        create table orders (id bigint primary key, user_id bigint references users on delete cascade);
        create table events (id bigint, day date, primary key (id, day)) partition by range (day);
        create table events_1 partition of events for values from ('2026-01-01') to ('2026-02-01');
        create table events_2 partition of events for values from ('2026-02-01') to ('2026-03-01');
        insert into users values (1, 'Ada'); insert into orders values (10, 1), (11, 1);
        insert into events values (1, '2026-01-15')";
    let rules = r#"
        [[table]]
        name = "users"
        keys = ["user:{id}"]
        on_truncate = "ignore"
        [[table]]
        name = "orders"
        keys = ["order:{id}"]
        on_truncate = "ignore"
        [[table]]
        name = "events"
        keys = ["event:{id}"]
        on_truncate = ["event:"]
    "#;
    let pair = captured(schema, rules, &[]).await;
    for key in ["order:10", "order:11", "user:1", "event:1", "event:2"] {
        pair.fill(key).await.unwrap();
    }
    sql(&pair, "delete from users").await;
    pair.until_none("order:*").await;
    pair.until_none("user:*").await;
    // From one partition to the other: a delete and an insert in the log.
    sql(&pair, "update events set day = '2026-02-15'").await;
    pair.until_none("event:1").await;

    let mut copy = pair.pool.acquire().await.unwrap();
    let mut copy = copy.copy_in_raw("copy events from stdin").await.unwrap();
    copy.send(b"2\t2026-02-20\n".as_slice()).await.unwrap();
    copy.finish().await.unwrap();
    pair.until_none("event:2").await;

    pair.fill("event:3").await.unwrap();
    sql(&pair, "truncate events").await;
    pair.until_none("event:*").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_of_the_same_name_in_another_schema_is_none_of_our_business() {
    let schema = "create table users (id bigint primary key, name text); insert into users values (1000, '');
        create schema other; create table other.users (id bigint primary key, name text);
        insert into other.users values (1, '')";
    let pair = captured(schema, super::USER_RULES, &[]).await;
    pair.fill("user:1:profile").await.unwrap();
    sql(&pair, "update other.users set name = 'x'; truncate other.users").await;
    fence(&pair).await;
    assert!(pair.is_cached("user:1:profile").await.unwrap());
}
