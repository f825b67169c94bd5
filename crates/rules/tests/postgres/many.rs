//! What a thousand tables cost.

use std::fmt::Write as _;

use devstack::PostgresOptions;
use rules::catalog::check_identity;

use crate::bed::{Bed, parse};

const TABLES: usize = 1_000;

#[tokio::test]
async fn the_catalog_is_not_asked_once_for_each_table() {
    let settings = vec![("log_statement".to_owned(), "all".to_owned())];
    let options = PostgresOptions { settings, ..PostgresOptions::default() };
    let mut schema = String::new();
    let mut rules = String::new();
    for n in 0..TABLES {
        write!(schema, "create table t{n} (id bigint primary key, name text);").unwrap();
        write!(rules, "[[table]]\nname = 't{n}'\nkeys = ['t{n}:{{id}}']\non_truncate = ['t{n}:']\n").unwrap();
    }
    let bed = Bed::with(options, &schema).await;
    let rules = parse(&rules);
    let mut connection = bed.pool.acquire().await.unwrap();
    let statements = || bed.server.process().log().matches("LOG:  execute").count();
    let before = statements();
    let facts = rules::catalog::check(&mut connection, &rules).await.unwrap();
    check_identity(&mut connection, &rules, &facts).await.unwrap();
    assert_eq!(facts.len(), TABLES);
    assert!(facts.iter().all(|facts| facts.primary_key == ["id"] && facts.columns.len() == 2));
    let asked = statements() - before;
    assert!((1..20).contains(&asked), "{asked} statements");
}
