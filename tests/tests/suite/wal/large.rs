//! Transactions of a million rows.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use devstack::{StackOptions, eventually};
use tests::{Pair, SETTLED};

use super::{captured, captured_on, fence, sql};

const ROWS: usize = 1_000_000;

const MANY: &str = "create table users (id bigint primary key, name text);
    insert into users select n, 'user' from generate_series(1, 1000000) n";

/// The relay must not grow with the transaction. A debug build takes a little more than the 60 MiB of the benchmark.
const LIMIT_BYTES: u64 = 80 << 20;

/// Runs `work` and returns the most memory the relay had meanwhile.
async fn memory_during(pair: &Pair, work: impl Future<Output = ()>) -> u64 {
    let (done, most) = (AtomicBool::new(false), AtomicU64::new(0));
    let watch = async {
        while !done.load(Ordering::Relaxed) {
            most.fetch_max(pair.relay.process().rss_bytes().unwrap_or(0), Ordering::Relaxed);
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    let work = async {
        work.await;
        done.store(true, Ordering::Relaxed);
    };
    tokio::join!(watch, work);
    most.load(Ordering::Relaxed)
}

async fn a_million_rows(relay: &[(&'static str, &str)]) {
    let pair = captured(MANY, super::USER_RULES, relay).await;
    let most = memory_during(&pair, async {
        pair.fill_many("touched", 0..1).await.unwrap();
        for id in [1, ROWS / 2, ROWS] {
            pair.fill(&format!("user:{id}:profile")).await.unwrap();
        }
        sql(&pair, "update users set name = 'x'").await;
        pair.until_none("user:*").await;
        fence(&pair).await;
    })
    .await;
    assert!(most < LIMIT_BYTES, "the relay had {} MiB", most >> 20);
    let keys = pair.relay.metric("relay_wal_keys_sum").await.unwrap();
    assert!(keys >= ROWS as f64, "{keys} keys were published");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transaction_of_a_million_rows_is_published_whole_in_little_memory() {
    a_million_rows(&[]).await;
}

/// Keys so long that fifty thousand of them are more than is kept of open transactions.
const LONG: &str =
    "create table docs (id bigint primary key, slug text); alter table docs replica identity full";
const LONG_RULES: &str = r#"
    [[table]]
    name = "docs"
    keys = ["doc:{slug}"]
    on_truncate = ["doc:"]
"#;
const LONG_ROWS: usize = 50_000;

/// Besides what is kept at most, what is on its way.
const LONG_LIMIT_BYTES: u64 = 160 << 20;

fn slug(number: usize) -> String {
    format!("{number:0900}")
}

#[tokio::test(flavor = "multi_thread")]
async fn an_open_transaction_with_more_keys_than_are_kept_is_read_after_its_commit_instead() {
    let mut stack = StackOptions::default();
    stack.postgres.settings.push(("logical_decoding_work_mem".to_owned(), "64kB".to_owned()));
    let pair = captured_on(stack, LONG, LONG_RULES, &[]).await;
    for number in [1, LONG_ROWS / 2, LONG_ROWS] {
        pair.fill(&format!("doc:{}", slug(number))).await.unwrap();
    }
    let most = memory_during(&pair, async {
        let mut tx = pair.pool.begin().await.unwrap();
        let insert = "insert into docs select n, lpad(n::text, 900, '0') from generate_series(1, 50000) n";
        sqlx::raw_sql(insert).execute(&mut *tx).await.unwrap();
        eventually(SETTLED, async || {
            let log = pair.relay.process().log();
            let why = "open transactions name more keys than fit in";
            let what = "reading transactions after their commit";
            if log.lines().any(|line| line.contains(why) && line.contains(what)) { Ok(()) } else { Err(log) }
        })
        .await;
        // Others are not held up by it, and nothing of it is believed yet.
        pair.fill("doc:other").await.unwrap();
        sql(&pair, "insert into docs values (-1, 'other')").await;
        pair.until_none("doc:other").await;
        assert_eq!(pair.count("doc:*").await.unwrap(), 3, "it has not committed");
        tx.commit().await.unwrap();
        pair.until_none("doc:*").await;
    })
    .await;
    eventually(SETTLED, async || {
        let keys = pair.relay.metric("relay_wal_keys_sum").await.unwrap();
        if keys >= (LONG_ROWS + 1) as f64 { Ok(()) } else { Err(format!("{keys} keys were published")) }
    })
    .await;
    assert!(most < LONG_LIMIT_BYTES, "the relay had {} MiB", most >> 20);
    pair.relay.until_ready().await;
}
