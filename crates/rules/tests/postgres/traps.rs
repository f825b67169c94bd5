//! Ways of changing rows that capture is known to miss elsewhere.

use devstack::PostgresOptions;
use sqlx::{Connection, PgConnection};

use crate::bed::Bed;
use crate::capture::{RULES, USERS};

#[tokio::test]
async fn copy_is_captured_like_an_insert() {
    let bed = Bed::watched(USERS, RULES).await;
    let mut connection = PgConnection::connect(&bed.server.url()).await.unwrap();
    let mut copy = connection.copy_in_raw("copy users (id, tenant_id, email) from stdin").await.unwrap();
    copy.send(b"50\t1\tc@x\n51\t1\td@x\n".as_slice()).await.unwrap();
    assert_eq!(copy.finish().await.unwrap(), 2);
    let keys = bed.keys("select").await;
    assert_eq!(keys, ["tenant:1:user:c@x", "tenant:1:user:d@x", "user:50:profile", "user:51:profile"]);
}

#[tokio::test]
async fn rows_that_a_foreign_key_deletes_or_changes_are_captured() {
    let bed = Bed::watched(
        "create table parents (id int primary key);
         create table children (id int primary key, parent int references parents on delete cascade on update cascade);
         create table notes (id int primary key, parent int references parents on delete set null)",
        "[[table]]\nname = 'children'\nkeys = ['child:{id}', 'children:{parent}']\non_truncate = 'ignore'\n
         [[table]]\nname = 'notes'\nkeys = ['note:{id}']\non_truncate = 'ignore'",
    )
    .await;
    bed.run("insert into parents values (1), (2); insert into children values (10, 1), (11, 2); insert into notes values (20, 1)").await;
    bed.events().await;
    assert_eq!(
        bed.keys("update parents set id = 3 where id = 2").await,
        ["child:11", "children:2", "children:3"]
    );
    assert_eq!(bed.keys("delete from parents where id = 1").await, ["child:10", "children:1", "note:20"]);
}

#[tokio::test]
async fn truncate_cascade_invalidates_the_namespaces_of_every_table_it_empties() {
    let bed = Bed::watched(
        "create table parents (id int primary key); create table children (id int, parent int references parents)",
        "[[table]]\nname = 'children'\nkeys = ['child:{id}']\non_truncate = ['child:']",
    )
    .await;
    bed.run("truncate parents cascade").await;
    let events = bed.events().await;
    assert_eq!((events[0].keys.as_slice(), events[0].namespace), (["child:".to_owned()].as_slice(), true));
}

#[tokio::test]
async fn upsert_and_data_modifying_cte_are_captured() {
    let bed = Bed::watched(USERS, RULES).await;
    let upsert =
        "insert into users (id, tenant_id, email, name) values (1, 1, 'u1@x', 'new'), (60, 1, 'e@x', 'f')
        on conflict (id) do update set name = excluded.name";
    let keys = bed.keys(upsert).await;
    assert_eq!(keys, ["tenant:1:user:e@x", "tenant:1:user:u1@x", "user:1:profile", "user:60:profile"]);
    let cte = "with gone as (delete from users where id = 60 returning id) update users set name = 'y' where id = 2";
    let keys = bed.keys(cte).await;
    assert_eq!(keys, ["tenant:1:user:e@x", "tenant:2:user:u2@x", "user:2:profile", "user:60:profile"]);
}

#[tokio::test]
async fn what_is_rolled_back_to_a_savepoint_is_not_enqueued() {
    let bed = Bed::watched(USERS, RULES).await;
    let keys = bed
        .keys(
            "begin; update users set name = 'a' where id = 1; savepoint s; update users set name = 'b' where id = 2;
             rollback to s; update users set name = 'c' where id = 3; commit",
        )
        .await;
    assert_eq!(keys, ["tenant:0:user:u3@x", "tenant:1:user:u1@x", "user:1:profile", "user:3:profile"]);
}

#[tokio::test]
async fn a_prepared_transaction_enqueues_when_it_commits_and_only_then() {
    let options = PostgresOptions {
        settings: vec![("max_prepared_transactions".to_owned(), "4".to_owned())],
        ..Default::default()
    };
    let bed = Bed::with(options, USERS).await;
    bed.install(RULES).await;
    bed.run("begin; update users set name = 'a' where id = 1; prepare transaction 'one'").await;
    bed.run("begin; update users set name = 'a' where id = 2; prepare transaction 'two'").await;
    assert!(bed.keys("select").await.is_empty());
    let keys = bed.keys("commit prepared 'one'").await;
    assert_eq!(keys, ["tenant:1:user:u1@x", "user:1:profile"]);
    assert!(bed.keys("rollback prepared 'two'").await.is_empty());
}

#[tokio::test]
async fn a_table_of_the_same_name_in_another_schema_is_not_captured() {
    let bed = Bed::watched(USERS, RULES).await;
    bed.run("create schema other; create table other.users (like public.users including all)").await;
    let keys = bed
        .keys("set search_path = other; insert into users (id, tenant_id) values (1, 1); reset search_path")
        .await;
    assert!(keys.is_empty(), "{keys:?}");
}

#[tokio::test]
async fn a_renamed_column_stops_writers_with_an_error_that_names_it_until_the_rules_follow() {
    let bed = Bed::watched(USERS, RULES).await;
    bed.run("update users set name = 'warm' where id = 1").await;
    bed.run("alter table users rename email to mail").await;
    let error = bed.try_run("update users set name = 'x' where id = 1").await.unwrap_err();
    let message = format!("{error:?}");
    assert!(message.contains("email") && message.contains("outbox_capture_public_users"), "{message}");
    let problems = bed.problems(RULES).await;
    assert!(
        problems.iter().any(|problem| problem.contains("column email: there is no such column")),
        "{problems:?}"
    );
    bed.install(&RULES.replace("{email}", "{mail}")).await;
    bed.events().await;
    assert_eq!(
        bed.keys("update users set name = 'x' where id = 1").await,
        ["tenant:1:user:u1@x", "user:1:profile"]
    );
}

#[tokio::test]
async fn a_rename_together_with_its_rules_in_one_transaction_loses_nothing_under_load() {
    let bed = Bed::watched(USERS, RULES).await;
    let renamed = RULES.replace("{email}", "{mail}");
    let (url, stop) = (bed.server.url(), std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false)));
    let writing = tokio::spawn({
        let stop = std::sync::Arc::clone(&stop);
        async move {
            let mut connection = PgConnection::connect(&url).await.unwrap();
            let mut writes = 0_i64;
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                sqlx::query("update users set name = name || '.' where id = 1")
                    .execute(&mut connection)
                    .await
                    .unwrap();
                writes += 1;
            }
            writes
        }
    });
    devstack::eventually(std::time::Duration::from_secs(20), async || {
        bed.number("select count(*) from outbox.events").await > 20
    })
    .await;
    let mut tx = bed.pool.begin().await.unwrap();
    sqlx::raw_sql("alter table users rename email to mail").execute(&mut *tx).await.unwrap();
    let rules = crate::bed::parse(&renamed);
    let facts = rules::catalog::check(&mut tx, &rules).await.unwrap();
    let plan = rules::triggers::plan(&mut tx, &rules, &facts).await.unwrap();
    rules::triggers::apply(&mut tx, &plan, std::time::Duration::from_secs(5)).await.unwrap();
    tx.commit().await.unwrap();
    let before = bed.number("select count(*) from outbox.events").await;
    devstack::eventually(std::time::Duration::from_secs(20), async || {
        bed.number("select count(*) from outbox.events").await > before + 20
    })
    .await;
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    let writes = writing.await.unwrap();
    assert_eq!(bed.number("select count(*) from outbox.events").await, writes, "one event for every write");
}

#[tokio::test]
async fn writers_need_no_right_on_the_outbox() {
    let bed = Bed::watched(USERS, RULES).await;
    bed.run("create role app; grant select, update on users to app").await;
    let keys = bed.keys("set role app; update users set name = 'x' where id = 1; reset role").await;
    assert_eq!(keys.len(), 2);
    let functions = "select count(*) from pg_proc p where proname like 'outbox_capture%' and has_function_privilege('app', p.oid, 'execute')";
    assert_eq!(bed.number(functions).await, 0);
}

#[tokio::test]
async fn a_search_path_of_the_writer_cannot_lead_the_functions_astray() {
    let bed = Bed::watched(USERS, RULES).await;
    bed.run(
        "create schema evil; create function evil.concat_bad(text, text) returns text language sql as $$ select 'evil' $$;
         create operator evil.|| (leftarg = text, rightarg = text, function = evil.concat_bad)",
    )
    .await;
    let sql = "set search_path = evil, pg_catalog, public; update users set name = 'x' where id = 1; reset search_path";
    assert_eq!(bed.keys(sql).await, ["tenant:1:user:u1@x", "user:1:profile"]);
}

#[tokio::test]
async fn what_is_no_change_of_a_row_fires_nothing() {
    let bed = Bed::watched(
        "create table t (id int, name text) partition by list (id); create table t1 partition of t for values in (1);
         create table t2 partition of t for values in (2); create table t3 (id int, name text);
         insert into t values (1, 'a'), (2, 'b'); insert into t3 values (3, 'c')",
        "[[table]]\nname = 't'\nkeys = ['t:{id}']\non_truncate = ['t:']",
    )
    .await;
    for sql in [
        "alter table t alter name type text using name || '!'",
        "alter table t add extra text default 'x'; alter table t3 add extra text",
        "alter table t attach partition t3 for values in (3)",
        "alter table t detach partition t2",
        "drop table t1",
        "set session_replication_role = replica; insert into t values (3, 'd'); reset session_replication_role",
    ] {
        assert!(bed.keys(sql).await.is_empty(), "{sql}");
    }
    assert_eq!(bed.keys("insert into t values (3, 'e')").await, ["t:3"]);
}

#[tokio::test]
async fn triggers_that_are_enabled_always_fire_in_a_session_that_replicates_and_stay_so() {
    let bed = Bed::watched(USERS, RULES).await;
    bed.run("alter table users enable always trigger outbox_capture_update").await;
    assert!(bed.install(RULES).await.steps.is_empty());
    let update = "set session_replication_role = replica; update users set name = 'x' where id = 1;
        reset session_replication_role";
    assert_eq!(bed.keys(update).await.len(), 2);
}

#[tokio::test]
async fn a_table_put_in_the_place_of_another_has_no_triggers_until_the_rules_are_applied() {
    let bed = Bed::watched(USERS, RULES).await;
    bed.run(
        "create table fresh (like users including all); insert into fresh select * from users;
         alter table users rename to stale; alter table fresh rename to users",
    )
    .await;
    assert!(bed.keys("update users set name = 'x' where id = 1").await.is_empty());
    let plan = bed.install(RULES).await;
    let whats: Vec<&str> = plan.steps.iter().map(|step| step.what.as_str()).collect();
    assert!(whats.contains(&"drop trigger outbox_capture_update on public.stale"), "{whats:?}");
    assert!(whats.contains(&"create trigger outbox_capture_update on public.users"), "{whats:?}");
    assert_eq!(bed.keys("update users set name = 'y' where id = 1").await.len(), 2);
    assert!(bed.keys("update stale set name = 'y' where id = 1").await.is_empty());
}
