//! What is said about rules that do not fit the database.

use rules::catalog::{CatalogError, check_identity};
use rules::coverage;

use crate::bed::{Bed, parse};
use crate::capture::{RULES, USERS};

#[tokio::test]
async fn every_misfit_is_reported_with_line_table_and_column() {
    let bed = Bed::new(
        "create schema shop; create table shop.orders (id int, total float8, at timestamptz, tags text[]);
         create table pairs (a int, b int, primary key (a, b));
         create table users (id int primary key, name text); create view v as select 1 as id",
    )
    .await;
    let problems = bed
        .problems(
            r#"
[[table]]
name = "orders"
keys = ["order:{id}"]
on_truncate = "ignore"

[[table]]
name = "shop.orders"
columns = ["id", "amount"]
keys = ["order:{id}:{total}"]
when = { column = "state", equals = 1 }
on_truncate = "ignore"
[[table.expand]]
sql = "select 'x' where 1 = any($1)"

[[table]]
name = "pairs"
keys = ["pair:{a}"]
on_truncate = "ignore"
[[table.expand]]
sql = "select 'x' where 1 = any($1)"

[[table]]
name = "v"
keys = ["v:{id}"]
on_truncate = "ignore"

[[table]]
name = "users"
on_truncate = "ignore"
[[table.expand]]
sql = "select 'x' from nowhere where id = any($1)"
[[table.expand]]
sql = "select 1, 2 where 1 = any($1)"
[[table.expand]]
sql = "select 'x' where 'a'::text = any($1)"
[[table.expand]]
sql = "delete from users where id = any($1) returning name"
"#,
        )
        .await;
    for expected in [
        "rules.toml:3: table public.orders: there is no such table, but one of this name in schema shop",
        "rules.toml:9: table shop.orders, column amount: there is no such column; there are id, total, at, tags",
        "rules.toml:10: table shop.orders, column total: values of type double precision cannot be part of a key",
        "rules.toml:11: table shop.orders, column state: there is no such column",
        "rules.toml:14: table shop.orders: expand needs a primary key, which the table does not have",
        "rules.toml:21: table public.pairs: expand needs a primary key of one column, not (a, b)",
        "rules.toml:24: table public.v: is neither a table nor a partitioned table",
        "rules.toml:32: table public.users, column id: expand must be a query of one column of text",
        "rules.toml:34: table public.users, column id: expand must be a query of one column of text",
        "rules.toml:36: table public.users, column id: expand must be a query of one column of text",
        "rules.toml:38: table public.users, column id: expand is not a query",
    ] {
        assert!(problems.iter().any(|problem| problem.starts_with(expected)), "{expected}\n{problems:#?}");
    }
    assert_eq!(problems.len(), 11, "{problems:#?}");
}

#[tokio::test]
async fn a_partition_is_refused_in_favour_of_its_root() {
    let bed =
        Bed::new("create table t (id int) partition by range (id); create table t1 partition of t default")
            .await;
    let problems = bed.problems("[[table]]\nname = 't1'\nkeys = ['t:{id}']\non_truncate = 'ignore'").await;
    assert!(problems[0].contains("is a partition of t; name that table instead"), "{problems:?}");
}

#[tokio::test]
async fn table_inheritance_is_refused_from_either_side() {
    let bed = Bed::new(
        "create table cities (id int); create schema far; create table far.capitals (state text) inherits (cities);
         create table ports () inherits (cities); create table alone (id int)",
    )
    .await;
    let rules =
        |name: &str| format!("[[table]]\nname = '{name}'\nkeys = ['city:{{id}}']\non_truncate = 'ignore'");
    let problems = bed.problems(&rules("cities")).await;
    let expected =
        "rules.toml:2: table public.cities: is bound by table inheritance to far.capitals, ports: ";
    assert!(problems[0].starts_with(expected), "{problems:?}");
    let problems = bed.problems(&rules("far.capitals")).await;
    assert!(problems[0].contains("is bound by table inheritance to cities: "), "{problems:?}");
    bed.install(&rules("alone")).await;
    bed.run("alter table far.capitals no inherit cities; alter table ports no inherit cities").await;
    bed.install(&rules("cities")).await;
}

#[tokio::test]
async fn the_log_must_carry_the_old_value_of_every_column_a_key_needs() {
    let bed = Bed::new(USERS).await;
    let rules = parse(RULES);
    let facts = bed.facts(&rules).await.unwrap();
    let mut connection = bed.pool.acquire().await.unwrap();
    let CatalogError::Rules(error) = check_identity(&mut connection, &rules, &facts).await.unwrap_err()
    else {
        panic!("not about the rules");
    };
    let error = error.to_string();
    for column in ["tenant_id", "email"] {
        let expected =
            format!("rules.toml:5: table public.users, column {column}: is not in the replica identity");
        assert!(error.contains(&expected), "{error}");
    }
    assert!(!error.contains("column id:"), "{error}");
    bed.run(
        "alter table users alter email set not null; create unique index on users (tenant_id, email, id);
             alter table users replica identity using index users_tenant_id_email_id_idx",
    )
    .await;
    check_identity(&mut connection, &rules, &facts).await.unwrap();
    bed.run("alter table users replica identity nothing").await;
    assert!(check_identity(&mut connection, &rules, &facts).await.is_err());
    bed.run("alter table users replica identity full").await;
    check_identity(&mut connection, &rules, &facts).await.unwrap();
}

#[tokio::test]
async fn the_identity_of_every_partition_counts() {
    let bed = Bed::new(
        "create table t (id int, name text) partition by range (id); create table t1 partition of t default;
         alter table t replica identity full",
    )
    .await;
    let rules = parse("[[table]]\nname = 't'\nkeys = ['t:{name}']\non_truncate = 'ignore'");
    let facts = bed.facts(&rules).await.unwrap();
    let mut connection = bed.pool.acquire().await.unwrap();
    let error = check_identity(&mut connection, &rules, &facts).await.unwrap_err().to_string();
    assert!(error.contains("ALTER TABLE public.t1 REPLICA IDENTITY FULL"), "{error}");
    bed.run("alter table t1 replica identity full").await;
    check_identity(&mut connection, &rules, &facts).await.unwrap();
}

#[tokio::test]
async fn coverage_lists_tables_and_columns_that_no_rule_watches() {
    let bed = Bed::new(USERS).await;
    bed.run("create schema other; create table other.users (id int); create table p (id int) partition by list (id);
             create table p1 partition of p default").await;
    let rules = parse(RULES);
    let facts = bed.facts(&rules).await.unwrap();
    let mut connection = bed.pool.acquire().await.unwrap();
    let coverage = coverage::coverage(&mut connection, &rules, &facts).await.unwrap();
    assert_eq!(coverage.tables, ["other.users", "public.p"]);
    let columns = vec!["seen".to_owned(), "status".to_owned()];
    assert_eq!(coverage.columns, [("public.users".to_owned(), columns)]);
}
