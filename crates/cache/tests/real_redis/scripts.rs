//! Servers forget scripts when they restart.

use cache::{Fill, LeaseToken};

use crate::support::{Bed, granted, key, mark, plain, updated, work};

#[tokio::test]
async fn every_step_works_on_a_server_that_has_forgotten_all_scripts() {
    let bed = Bed::new().await;
    let key = key("k");
    let forget = async || drop(bed.raw(&["SCRIPT", "FLUSH"]).await);
    for round in 1..=2 {
        forget().await;
        let lease = bed.grant(&key).await;
        forget().await;
        let fill = Fill { version: Some(1), ..plain("one") };
        assert!(bed.redis.fill(&key, &lease, fill).await.unwrap(), "round {round}");
        forget().await;
        let events = [updated(&key, "two", 2, 1), updated(&crate::support::key("other"), "x", 2, 1)];
        assert_eq!(bed.redis.apply(&work(events)).await.unwrap().updated, 1);
        forget().await;
        bed.redis.mark(std::slice::from_ref(&key), mark(7)).await.unwrap();
        forget().await;
        bed.redis.unmark(std::slice::from_ref(&key), mark(7)).await.unwrap();
        let token = LeaseToken::generate();
        granted(bed.acquire(&key, token).await);
        forget().await;
        bed.redis.release(&key, token).await.unwrap();
        bed.grant(&key).await;
        bed.raw(&["FLUSHALL"]).await;
    }
}
