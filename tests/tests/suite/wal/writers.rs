//! Capture must not make the application's writers fail, nor miss them: what Postgres would refuse is found before, or said.

use super::{USER_RULES, USERS, captured, fence, relay, sql, until_not_ready_because};

const TABLES: &str = "create table users (id bigint primary key, name text); insert into users values (1000, 'x');
    create table keyless (id bigint);
    create table deferred (id bigint primary key deferrable);
    create unlogged table fast (id bigint primary key);
    create table parts (id bigint, at date) partition by range (at); create table parts_all partition of parts default";

#[tokio::test(flavor = "multi_thread")]
async fn tables_whose_writers_would_fail_or_be_missed_are_refused_before_they_are_published() {
    let pair = captured(TABLES, USER_RULES, &[]).await;
    let file = pair.stack.directory().path().join("other.toml");
    let none = "has no replica identity: Postgres would refuse every UPDATE and DELETE";
    for (table, refusal) in [
        ("keyless", format!("public.keyless {none}")),
        ("deferred", format!("public.deferred {none}")),
        ("parts", format!("public.parts_all {none}")),
        ("fast", "public.fast is unlogged, so the write-ahead log does not have its changes".to_owned()),
    ] {
        // No column is needed, so none can be missing from the identity.
        let rules = format!("[[table]]\nname = '{table}'\nkeys = ['all:{table}']\non_truncate = ['all:']");
        std::fs::write(&file, rules).unwrap();
        let (ok, text) =
            relay(&pair, &["rules", "check", "--wal"], &[("RELAY_RULES", &file.display().to_string())]).await;
        assert!(!ok && text.contains(&refusal), "{table}: {text}");
        let log = pair.another_relay(&[("RELAY_RULES", file.display().to_string())]).unwrap();
        let status = log.process().wait_exit(tests::SETTLED).await.unwrap();
        assert!(!status.success() && log.process().log().contains(&refusal), "{}", log.process().log());
    }
    let published = "select count(*)::text from pg_publication_rel";
    let rows = pair.stack.postgres.query(published).await.unwrap();
    assert_eq!(rows, [[Some("1".to_owned())]], "nothing of it was ever published");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rehearsal_finds_what_no_rule_of_ours_knows_and_leaves_nothing_behind() {
    let pair = captured(TABLES, USER_RULES, &[]).await;
    let rules = rules::Rules::parse("r", "[[table]]\nname = 'users'\nkeys = ['u:{id}']\non_truncate = ['u:']\n\
        [[table]]\nname = 'parts'\nkeys = ['p']\non_truncate = ['p']\n[[table]]\nname = 'keyless'\nkeys = ['k']\non_truncate = ['k']").unwrap();
    let mut tx = pair.pool.begin().await.unwrap();
    let facts = rules::catalog::check(&mut tx, &rules).await.unwrap();
    sqlx::raw_sql("create publication trial for table users, parts, keyless")
        .execute(&mut *tx)
        .await
        .unwrap();
    let refusals = wal::publication::rehearse(&mut tx, &facts).await.unwrap();
    tx.rollback().await.unwrap();
    let tables: Vec<&str> = refusals.iter().map(|refusal| refusal.table.as_str()).collect();
    assert_eq!(tables, ["public.parts_all", "public.keyless"], "{refusals:?}");
    assert!(refusals[0].said.contains("does not have a replica identity"), "{refusals:?}");
    sql(&pair, "update keyless set id = 1; update parts set id = 1").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_whose_writers_begin_to_fail_while_it_is_read_is_named() {
    let pair = captured(USERS, USER_RULES, &[]).await;
    fence(&pair).await;
    sql(&pair, "alter table users drop constraint users_pkey").await;
    let failed = sqlx::raw_sql("update users set name = 'x'").execute(&pair.pool).await.unwrap_err();
    assert!(failed.to_string().contains("replica identity"), "{failed}");
    let reason = until_not_ready_because(&pair, "refuses every UPDATE and DELETE of published tables").await;
    assert!(reason.contains("users: it has no replica identity"), "{reason}");
    sql(&pair, "alter table users add primary key (id)").await;
    pair.relay.until_ready().await;
    fence(&pair).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_merge_that_moves_a_row_to_another_partition_is_in_the_log_and_check_warns_who_uses_triggers() {
    let schema =
        "create table visits (id bigint, day int, page text, primary key (id, day)) partition by range (day);
        create table visits_1 partition of visits for values from (1) to (10);
        create table visits_2 partition of visits default;
        alter table visits_1 replica identity full; alter table visits_2 replica identity full;
        insert into visits values (1, 1, 'a'), (2, 1, 'b')";
    let rules = r#"
        [[table]]
        name = "visits"
        keys = ["page:{page}"]
        on_truncate = ["page:"]
    "#;
    let pair = captured(schema, rules, &[]).await;
    let merge = |id: i32| {
        format!(
            "merge into visits v using (select {id} id) s on v.id = s.id when matched then update set day = 20"
        )
    };
    super::until_read(&pair).await;
    pair.fill("page:a").await.unwrap();
    sql(&pair, &merge(1)).await;
    pair.until_none("page:a").await;

    let (ok, text) = relay(&pair, &["rules", "apply"], &[]).await;
    assert!(ok && text.contains("public.visits is partitioned: a MERGE that moves a row"), "{text}");
    let (ok, text) = relay(&pair, &["rules", "check"], &[]).await;
    assert!(ok && text.contains("public.visits is partitioned: a MERGE that moves a row"), "{text}");
    let mut tx = pair.pool.begin().await.unwrap();
    sqlx::raw_sql(sqlx::AssertSqlSafe(merge(2))).execute(&mut *tx).await.unwrap();
    let seen = outbox::testing::enqueued(&mut tx).await.unwrap();
    assert!(seen.is_empty(), "if Postgres shows it to triggers by now, the warning can go: {seen:?}");
    sqlx::raw_sql("update visits set day = 1").execute(&mut *tx).await.unwrap();
    assert!(!outbox::testing::enqueued(&mut tx).await.unwrap().is_empty(), "an UPDATE is seen");
}
