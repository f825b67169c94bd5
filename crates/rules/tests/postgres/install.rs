//! Installing, updating and removing the triggers.

use std::time::Duration;

use rules::triggers;

use crate::bed::{Bed, parse};
use crate::capture::{RULES, USERS};

fn whats(plan: &triggers::Plan) -> Vec<&str> {
    plan.steps.iter().map(|step| step.what.as_str()).collect()
}

#[tokio::test]
async fn applying_twice_changes_nothing_the_second_time() {
    let bed = Bed::new(USERS).await;
    let first = bed.install(RULES).await;
    assert_eq!(first.steps.len(), 8, "{:?}", whats(&first));
    let second = bed.install(RULES).await;
    assert!(second.steps.is_empty(), "{:?}", whats(&second));
}

#[tokio::test]
async fn changed_rules_replace_functions_without_touching_the_table() {
    let bed = Bed::watched(USERS, RULES).await;
    // A writer is in the middle of a transaction, which would hold up anything that locks the table.
    let mut writer = bed.pool.begin().await.unwrap();
    sqlx::query("update users set name = 'x' where id = 1").execute(&mut *writer).await.unwrap();
    let plan = bed.install(&RULES.replace("user:{id}:profile", "user:{id}:page")).await;
    assert_eq!(plan.steps.len(), 3, "{:?}", whats(&plan));
    assert!(whats(&plan).iter().all(|what| what.starts_with("replace function")), "{:?}", whats(&plan));
    writer.rollback().await.unwrap();
    let keys = bed.keys("update users set name = 'x' where id = 1").await;
    assert_eq!(keys, ["tenant:1:user:u1@x", "user:1:page"]);
}

#[tokio::test]
async fn tables_that_are_no_longer_in_the_file_lose_their_triggers() {
    let bed = Bed::watched(USERS, RULES).await;
    bed.run("create table other (id int primary key)").await;
    bed.install("[[table]]\nname = 'other'\nkeys = ['other:{id}']\non_truncate = 'ignore'").await;
    assert!(bed.keys("update users set name = 'x'").await.is_empty());
    assert_eq!(bed.keys("insert into other values (1)").await, ["other:1"]);
    let left =
        "select count(*) from pg_trigger where tgname like 'outbox_capture%' and tgrelid = 'users'::regclass";
    assert_eq!(bed.number(left).await, 0);
    assert_eq!(
        bed.number("select count(*) from pg_proc where proname like 'outbox_capture%users%'").await,
        0
    );
}

#[tokio::test]
async fn everything_can_be_removed_without_the_rules() {
    let bed = Bed::watched(USERS, RULES).await;
    let mut tx = bed.pool.begin().await.unwrap();
    let plan = triggers::removal(&mut tx).await.unwrap();
    triggers::apply(&mut tx, &plan, Duration::from_secs(5)).await.unwrap();
    assert!(triggers::removal(&mut tx).await.unwrap().steps.is_empty());
    tx.commit().await.unwrap();
    bed.run("update users set name = 'x'").await;
    assert!(bed.events().await.is_empty());
    assert_eq!(bed.number("select count(*) from pg_proc where proname like 'outbox_capture%'").await, 0);
}

#[tokio::test]
async fn a_trigger_that_was_dropped_or_disabled_is_restored() {
    let bed = Bed::watched(USERS, RULES).await;
    bed.run("drop trigger outbox_capture_update on users; alter table users disable trigger outbox_capture_insert").await;
    let plan = bed.install(RULES).await;
    assert_eq!(
        whats(&plan),
        [
            "drop trigger outbox_capture_insert on public.users, which is disabled",
            "create trigger outbox_capture_insert on public.users",
            "create trigger outbox_capture_update on public.users",
        ]
    );
    assert_eq!(bed.keys("update users set name = 'x' where id = 1").await.len(), 2);
}

#[tokio::test]
async fn the_printed_script_installs_the_same() {
    let bed = Bed::new(USERS).await;
    let rules = parse(RULES);
    let script = triggers::script(&rules, &bed.facts(&rules).await.unwrap());
    bed.run(&script).await;
    assert!(bed.plan(RULES).await.steps.is_empty());
}

#[tokio::test]
async fn a_busy_table_makes_apply_give_up_rather_than_stop_its_writers() {
    let bed = Bed::new(USERS).await;
    let plan = bed.plan(RULES).await;
    let mut writer = bed.pool.begin().await.unwrap();
    sqlx::query("update users set name = 'x' where id = 1").execute(&mut *writer).await.unwrap();
    let mut tx = bed.pool.begin().await.unwrap();
    let error = triggers::apply(&mut tx, &plan, Duration::from_millis(100)).await.unwrap_err();
    assert!(error.to_string().contains("lock timeout"), "{error}");
    tx.rollback().await.unwrap();
    assert_eq!(bed.plan(RULES).await, plan, "nothing has changed");
}

#[tokio::test]
async fn apply_holds_the_lock_of_one_table_at_a_time_and_a_second_run_completes_it() {
    let bed = Bed::new("create table a (id int); create table b (id int); insert into a values (1)").await;
    let table = |name: &str| {
        format!("[[table]]\nname = '{name}'\nkeys = ['{name}:{{id}}']\non_truncate = 'ignore'\n")
    };
    let rules = table("a") + &table("b");
    let plan = bed.plan(&rules).await;
    let mut writer = bed.pool.begin().await.unwrap();
    sqlx::query("insert into b values (1)").execute(&mut *writer).await.unwrap();
    let mut connection = bed.pool.acquire().await.unwrap();
    let patience = Duration::from_secs(30);
    let applying =
        tokio::spawn(async move { triggers::apply_in_parts(&mut connection, &plan, patience).await });
    let waiting = "select count(*) from pg_locks where not granted and relation = 'b'::regclass";
    devstack::eventually(patience, async || bed.number(waiting).await == 1).await;
    // In the other order than that of the rules: a deadlock if apply held the lock on a.
    sqlx::query("update a set id = 2").execute(&mut *writer).await.unwrap();
    writer.commit().await.unwrap();
    applying.await.unwrap().unwrap();
    assert!(bed.plan(&rules).await.steps.is_empty());

    let changed = rules.replace("keys = ['b", "topic = 'b'\nkeys = ['b") + &table("c");
    bed.run("create table c (id int); alter table a disable trigger outbox_capture_insert").await;
    let plan = bed.plan(&changed).await;
    let mut writer = bed.pool.begin().await.unwrap();
    sqlx::query("insert into c values (1)").execute(&mut *writer).await.unwrap();
    let mut connection = bed.pool.acquire().await.unwrap();
    let short = Duration::from_millis(100);
    let error = triggers::apply_in_parts(&mut connection, &plan, short).await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "cannot change the triggers of public.c; 8 of 11 changes were made and stay"
    );
    assert!(error.source.to_string().contains("lock timeout"), "{error:?}");
    writer.rollback().await.unwrap();
    bed.events().await;
    assert_eq!(bed.keys("insert into a values (3)").await, ["a:3"]);
    let rest = bed.plan(&changed).await;
    assert!(whats(&rest).iter().all(|what| what.ends_with("on public.c")), "{:?}", whats(&rest));
    triggers::apply_in_parts(&mut connection, &rest, patience).await.unwrap();
    assert_eq!(bed.keys("insert into c values (3)").await, ["c:3"]);
}

#[tokio::test]
async fn who_changes_triggers_is_alone_with_what_was_planned() {
    let bed = Bed::new(USERS).await;
    let (mut one, mut other) = (bed.pool.begin().await.unwrap(), bed.pool.begin().await.unwrap());
    triggers::lock(&mut one, Duration::from_secs(5)).await.unwrap();
    let error = triggers::lock(&mut other, Duration::from_millis(100)).await.unwrap_err();
    assert!(error.to_string().contains("lock timeout"), "{error}");
}

#[tokio::test]
async fn the_name_of_a_partition_cannot_leave_the_comment_of_the_script() {
    let bed = Bed::new(
        "create table t (id int) partition by list (id); create table spied (by text);
         create table \"x\ninsert into spied values ('p');--\" partition of t default",
    )
    .await;
    let rules = parse("[[table]]\nname = 't'\nkeys = ['t:{id}']\non_truncate = 'ignore'");
    bed.run(&triggers::script(&rules, &bed.facts(&rules).await.unwrap())).await;
    assert_eq!(bed.number("select count(*) from spied").await, 0);
    assert_eq!(bed.keys("insert into \"x\ninsert into spied values ('p');--\" values (1)").await, ["t:1"]);
}

#[tokio::test]
async fn names_of_any_length_and_form_get_functions_of_their_own() {
    let long = "a_table_whose_name_is_as_long_as_a_name_may_be_in_postgres_xxxx";
    let bed = Bed::new(&format!(
        "create schema a_b; create schema a; create table a_b.c (id int); create table a.b_c (id int);
         create table {long} (id int); create table \"Ünïcode Täble, with 'quotes' of many bytes ääää\" (\"ID x\" int)"
    ))
    .await;
    let table = |name: &str, column: &str| {
        format!("[[table]]\nname = \"{name}\"\nkeys = [\"{name}:{{{column}}}\"]\non_truncate = 'ignore'\n")
    };
    let tables = [
        ("a_b.c", "id"),
        ("a.b_c", "id"),
        (long, "id"),
        ("Ünïcode Täble, with 'quotes' of many bytes ääää", "ID x"),
    ];
    let rules: String = tables.iter().map(|(name, column)| table(name, column)).collect();
    bed.install(&rules).await;
    assert!(bed.plan(&rules).await.steps.is_empty(), "the names Postgres keeps are the names asked for");
    assert_eq!(bed.keys("insert into a.b_c values (1)").await, ["a.b_c:1"]);
    assert_eq!(bed.keys("insert into a_b.c values (1)").await, ["a_b.c:1"]);
    assert_eq!(bed.keys(&format!("insert into {long} values (1)")).await, [format!("{long}:1")]);
    let keys = bed.keys("insert into \"Ünïcode Täble, with 'quotes' of many bytes ääää\" values (1)").await;
    assert_eq!(keys, ["Ünïcode Täble, with 'quotes' of many bytes ääää:1"]);
}

#[tokio::test]
async fn applying_twice_changes_nothing_though_the_key_has_a_length() {
    let schema = "create table parts (code varchar(20) primary key, name text);
        insert into parts values ('a', 'x')";
    let rules = r#"
        [[table]]
        name = "parts"
        keys = ["part:{code}"]
        on_truncate = "ignore"
        [[table.expand]]
        sql = "select 'shelf:' || code from parts where code = any($1)"
    "#;
    let bed = Bed::watched(schema, rules).await;
    let second = bed.install(rules).await;
    assert!(second.steps.is_empty(), "{:?}", whats(&second));
    assert_eq!(bed.keys("update parts set name = 'y'").await, ["part:a", "shelf:a"]);
}

#[tokio::test]
async fn a_trigger_that_fires_for_replication_alone_is_not_taken_for_installed() {
    let bed = Bed::watched(USERS, RULES).await;
    bed.run(
        "do $$ declare name text; begin
             for name in select tgname from pg_trigger where tgname like 'outbox_capture%' loop
                 execute format('alter table users enable replica trigger %I', name);
             end loop;
         end $$",
    )
    .await;
    assert!(bed.keys("update users set name = 'x' where id = 1").await.is_empty());
    let plan = bed.install(RULES).await;
    assert_eq!(plan.steps.len(), 8, "{:?}", whats(&plan));
    assert_eq!(bed.keys("update users set name = 'y' where id = 1").await.len(), 2);
}
