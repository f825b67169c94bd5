//! Transactions of a million rows.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use tests::Pair;

use super::{captured, fence, sql};

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
