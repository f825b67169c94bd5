//! The steps between commit and deletion, each alone: what is left if nobody ever waits.

use std::time::Instant;

use crate::bench::numbers::milliseconds;
use crate::bench::percentiles::Delays;
use crate::bench::{events, plain};
use crate::pair::Ground;
use crate::resp::Connection;

/// Measures each step some times, one after the other, on idle servers.
pub async fn estimate(ground: &Ground, times: u64) -> anyhow::Result<String> {
    let jetstream = plain::raw_stream(ground).await?;
    let mut redis = Connection::open(ground.stack.redis.address()).await?;
    let (mut claim, mut publish, mut unlink) = (Delays::new(), Delays::new(), Delays::new());
    let mut from_seq = 0;
    for number in 0..times {
        events::enqueue(&ground.pool, number..number + 1).await?;
        let started = Instant::now();
        let (_, next) = events::claim(&ground.pool, from_seq).await?;
        claim.record(started.elapsed());
        from_seq = next;
        publish.record(plain::publish(&jetstream).await?);
        let started = Instant::now();
        redis.command(&["UNLINK", &events::key(number)]).await?;
        unlink.record(started.elapsed());
    }
    let [claim, publish, unlink] = [claim, publish, unlink].map(|delays| delays.percentile(50.0));
    Ok(format!(
        "the steps alone, without waiting: claim {} + publish {} + UNLINK {} = {}",
        milliseconds(claim),
        milliseconds(publish),
        milliseconds(unlink),
        milliseconds(claim + publish + unlink)
    ))
}
