//! `expand`: with whose rights it runs, and what it must not pass over in silence.

use std::time::Duration;

use rules::catalog::{self, Expander, Found};
use sqlx::PgPool;

use crate::bed::{Bed, parse};

const SHOP: &str = "
    create schema shop; create role applier login; create role app login;
    create table shop.products (id int primary key, price int);
    create table shop.lines (order_id int, product_id bigint, amount int);
    insert into shop.products values (1, 10), (2, 20);
    insert into shop.lines values (100, 1, 1), (101, 2, 1);
    alter table shop.products owner to applier;
    grant usage on schema shop, outbox to applier, app; grant create on schema outbox to applier;
    grant insert on outbox.events to applier; grant execute on all functions in schema outbox to applier;
    grant select on shop.lines to applier; grant all on shop.products to app; grant create on schema shop to app";

const RULES: &str = r#"
[[table]]
name = "shop.products"
keys = ["product:{id}"]
on_truncate = "ignore"
[[table.expand]]
sql = "select 'order:' || order_id from lines where product_id = any($1) -- every page"
namespaces = ["order:"]
"#;

/// The shop in front of a role that is no superuser, and the pool of the superuser.
async fn shop() -> (Bed, PgPool) {
    let mut bed = Bed::new(SHOP).await;
    let (_, server) = bed.server.url().split_once('@').map(|(a, b)| (a.to_owned(), b.to_owned())).unwrap();
    let applier = PgPool::connect(&format!("postgres://applier@{server}")).await.unwrap();
    let superuser = std::mem::replace(&mut bed.pool, applier);
    (bed, superuser)
}

async fn run(pool: &PgPool, sql: &'static str) {
    sqlx::raw_sql(sql).execute(pool).await.unwrap();
}

async fn enqueued(pool: &PgPool) -> Vec<String> {
    sqlx::query_scalar(
        "with taken as (delete from outbox.events returning keys)
         select key from taken, unnest(keys) key order by key",
    )
    .fetch_all(pool)
    .await
    .unwrap()
}

#[tokio::test]
async fn what_row_level_security_would_hide_is_an_error_and_not_nothing() {
    let (bed, superuser) = shop().await;
    bed.install(RULES).await;
    let expanders = catalog::expanders(&bed.pool, &parse(RULES)).await.unwrap();
    let expander: &Expander = expanders[0].as_ref().unwrap();
    let keys = ["1".to_owned()];
    let found = expander.find(&bed.pool, &keys, 10, Duration::from_secs(10)).await.unwrap();
    assert_eq!(found, Found::Keys(vec!["order:100".to_owned()]));

    run(&superuser, "alter table shop.lines enable row level security").await;
    let error = expander.find(&bed.pool, &keys, 10, Duration::from_secs(10)).await.unwrap_err();
    assert!(error.is_lasting() && error.source.to_string().contains("row-level security"), "{error:?}");
    assert!(expander.rehearse(&bed.pool).await.is_err());
    let error = bed.try_run("update shop.products set price = 11 where id = 1").await.unwrap_err();
    assert!(error.to_string().contains("row-level security policy for table \"lines\""), "{error}");
    let problems = bed.problems(RULES).await;
    assert!(problems[0].starts_with("rules.toml:7: table shop.products, column id: expand"), "{problems:?}");
    assert!(problems[0].contains("row-level security policy for table \"lines\""), "{problems:?}");

    run(&superuser, "alter role applier bypassrls").await;
    expander.rehearse(&bed.pool).await.unwrap();
    bed.run("update shop.products set price = 11 where id = 1").await;
    assert_eq!(enqueued(&superuser).await, ["order:100", "product:1"]);
}

#[tokio::test]
async fn what_another_role_puts_into_the_schema_later_is_not_run_with_the_rights_of_the_applier() {
    let (bed, superuser) = shop().await;
    bed.install(RULES).await;
    // Fits `'order:' || order_id` better than the operator of Postgres, which takes anything.
    run(
        &superuser,
        "set role app;
         create function shop.spy(text, int) returns text language plpgsql as
             $$ begin raise exception 'ran as %', current_user; end $$;
         create operator shop.|| (leftarg = text, rightarg = int, function = shop.spy);
         reset role",
    )
    .await;
    let unbound = run_as_written(&superuser).await.unwrap_err();
    assert!(unbound.to_string().contains("ran as"), "the operator is the better fit: {unbound}");
    bed.run("update shop.products set price = 11 where id = 1").await;
    assert_eq!(enqueued(&superuser).await, ["order:100", "product:1"]);
}

/// The query of the rules in a session whose names are looked for as its are.
async fn run_as_written(pool: &PgPool) -> Result<(), sqlx::Error> {
    let sql = "begin; set local search_path = pg_catalog, shop, pg_temp; select 'order:' || order_id from lines; rollback";
    sqlx::raw_sql(sql).execute(&mut pool.acquire().await?.detach()).await.map(drop)
}

#[tokio::test]
async fn who_could_put_something_into_the_schema_and_a_superuser_are_named_as_risks() {
    let (bed, superuser) = shop().await;
    let (rules, plain) =
        (parse(RULES), parse("[[table]]\nname = 'shop.products'\nkeys = ['p']\non_truncate = 'ignore'"));
    let mut applier = bed.pool.acquire().await.unwrap();
    let risks = catalog::risks(&mut applier, &rules).await.unwrap();
    let expected =
        "app may create in schema shop, and so what expand runs with the rights of who applies the rules";
    assert!(risks.len() == 1 && risks[0].starts_with(expected), "{risks:?}");
    run(&superuser, "grant create on schema shop to public, applier").await;
    let risks = catalog::risks(&mut applier, &rules).await.unwrap();
    assert!(risks[0].contains("REVOKE CREATE ON SCHEMA shop FROM PUBLIC, app"), "{risks:?}");
    assert!(catalog::risks(&mut applier, &plain).await.unwrap().is_empty());
    run(&superuser, "revoke create on schema shop from public, app").await;
    assert!(catalog::risks(&mut applier, &rules).await.unwrap().is_empty());
    run(&superuser, "revoke create on schema shop from applier").await;
    let risks = catalog::risks(&mut superuser.acquire().await.unwrap(), &rules).await.unwrap();
    assert!(risks.len() == 1 && risks[0].starts_with("this is a superuser"), "{risks:?}");
}

#[tokio::test]
async fn what_expand_reads_may_be_renamed_and_dropped_only_once_the_rules_let_go_of_it() {
    let (bed, superuser) = shop().await;
    bed.install(RULES).await;
    run(&superuser, "alter table shop.lines rename product_id to product").await;
    bed.run("update shop.products set price = 11 where id = 1").await;
    assert_eq!(enqueued(&superuser).await, ["order:100", "product:1"]);
    assert!(bed.problems(RULES).await[0].contains("column \"product_id\" does not exist"));
    let renamed = RULES.replace("product_id", "product");
    bed.install(&renamed).await;
    assert!(bed.plan(&renamed).await.steps.is_empty());
    for sql in ["alter table shop.lines drop product", "alter table shop.lines alter product type int"] {
        let error = sqlx::raw_sql(sql).execute(&superuser).await.unwrap_err();
        assert!(error.to_string().contains("cannot"), "{sql}: {error}");
    }
    run(&superuser, "alter table shop.lines add note text; alter table shop.lines drop amount").await;
    bed.install("[[table]]\nname = 'shop.products'\nkeys = ['product:{id}']\non_truncate = 'ignore'").await;
    run(&superuser, "alter table shop.lines drop product; drop table shop.lines").await;
    bed.run("update shop.products set price = 12 where id = 1").await;
    assert_eq!(enqueued(&superuser).await, ["product:1"]);
}

#[tokio::test]
async fn a_primary_key_of_a_type_in_a_schema_that_is_not_searched_is_found() {
    let bed = Bed::watched(
        "create schema shop; create domain code as text; create table shop.goods (id code primary key)",
        "[[table]]\nname = 'shop.goods'\nkeys = ['goods:{id}']\non_truncate = 'ignore'
         [[table.expand]]\nsql = \"select 'page:' || id from unnest($1) id\"",
    )
    .await;
    assert_eq!(bed.keys("insert into shop.goods values ('a')").await, ["goods:a", "page:a"]);
}
