use std::time::Duration;

use devstack::{Postgres, PostgresOptions};
use rules::catalog::{CatalogError, Facts};
use rules::triggers::{self, Plan};
use rules::{Problem, Rules, RulesError, catalog};
use sqlx::{AssertSqlSafe, PgPool, Row};

/// A database with an outbox.
pub(crate) struct Bed {
    pub(crate) server: Postgres,
    pub(crate) pool: PgPool,
}

/// One event as it was enqueued.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Enqueued {
    pub(crate) topic: String,
    pub(crate) keys: Vec<String>,
    pub(crate) namespace: bool,
}

impl Bed {
    /// A database in which `schema` has been run.
    pub(crate) async fn new(schema: &str) -> Self {
        Self::with(PostgresOptions::default(), schema).await
    }

    pub(crate) async fn with(options: PostgresOptions, schema: &str) -> Self {
        let server = Postgres::start_alone(options).await.unwrap();
        let pool = PgPool::connect(&server.url()).await.unwrap();
        outbox::migrate(&pool).await.unwrap();
        let bed = Self { server, pool };
        bed.run(schema).await;
        bed
    }

    /// A database in which `schema` has been run and the triggers of `rules` are installed.
    pub(crate) async fn watched(schema: &str, rules: &str) -> Self {
        let bed = Self::new(schema).await;
        bed.install(rules).await;
        bed
    }

    pub(crate) async fn run(&self, sql: &str) {
        self.try_run(sql).await.unwrap();
    }

    pub(crate) async fn try_run(&self, sql: &str) -> Result<(), sqlx::Error> {
        sqlx::raw_sql(AssertSqlSafe(sql)).execute(&self.pool).await.map(drop)
    }

    pub(crate) async fn facts(&self, rules: &Rules) -> Result<Vec<Facts>, CatalogError> {
        let mut connection = self.pool.acquire().await.unwrap();
        catalog::check(&mut connection, rules).await
    }

    pub(crate) async fn problems(&self, text: &str) -> Vec<String> {
        let rules = parse(text);
        match self.facts(&rules).await {
            Err(CatalogError::Rules(RulesError::Invalid(problems))) => lines(&problems),
            other => panic!("should not be accepted: {other:?}"),
        }
    }

    pub(crate) async fn plan(&self, text: &str) -> Plan {
        let rules = parse(text);
        let facts = self.facts(&rules).await.unwrap();
        let mut connection = self.pool.acquire().await.unwrap();
        triggers::plan(&mut connection, &rules, &facts).await.unwrap()
    }

    pub(crate) async fn install(&self, text: &str) -> Plan {
        let plan = self.plan(text).await;
        let mut tx = self.pool.begin().await.unwrap();
        triggers::apply(&mut tx, &plan, Duration::from_secs(5)).await.unwrap();
        tx.commit().await.unwrap();
        plan
    }

    /// Everything in the outbox, which is empty afterwards.
    pub(crate) async fn events(&self) -> Vec<Enqueued> {
        let rows = sqlx::query(
            "with taken as (delete from outbox.events returning seq, topic, keys, namespace)
             select topic, keys, namespace from taken order by seq",
        )
        .fetch_all(&self.pool)
        .await
        .unwrap();
        let read = |row: &sqlx::postgres::PgRow| Enqueued {
            topic: row.get(0),
            keys: row.get(1),
            namespace: row.get(2),
        };
        rows.iter().map(read).collect()
    }

    /// The keys that running `sql` enqueues, sorted.
    pub(crate) async fn keys(&self, sql: &str) -> Vec<String> {
        self.run(sql).await;
        let events = self.events().await;
        assert!(events.iter().all(|event| !event.namespace), "{events:?}");
        let mut keys: Vec<String> = events.into_iter().flat_map(|event| event.keys).collect();
        keys.sort_unstable();
        keys
    }

    /// A number that a query returns.
    pub(crate) async fn number(&self, sql: &str) -> i64 {
        sqlx::query_scalar(AssertSqlSafe(sql)).fetch_one(&self.pool).await.unwrap()
    }
}

pub(crate) fn parse(text: &str) -> Rules {
    Rules::parse("rules.toml", text).unwrap()
}

fn lines(problems: &[Problem]) -> Vec<String> {
    problems.iter().map(ToString::to_string).collect()
}
