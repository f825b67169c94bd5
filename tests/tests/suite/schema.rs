//! What the schema and its queries promise by themselves.

use std::time::{Duration, Instant};

use devstack::eventually;
use outbox::{ClaimOptions, Event, Xid};
use sqlx::postgres::PgConnectOptions;
use sqlx::types::Uuid;
use sqlx::types::uuid::Variant;
use sqlx::{Connection, PgConnection};
use tests::{Pair, PairOptions};

#[tokio::test(flavor = "multi_thread")]
async fn claim_plan_uses_the_index_whatever_is_in_the_table() {
    let pair = Pair::start().await.unwrap();
    pair.relay.process().terminate().await.unwrap();
    let uses_index = async || {
        let plan = outbox::diagnosis::facts(&pair.pool).await.unwrap().claim_plan.join("\n");
        assert!(plan.contains("Index Scan using events_pkey") && !plan.contains("Seq Scan"), "{plan}");
    };
    uses_index().await;
    let million = "insert into outbox.events (id, keys) select gen_random_uuid(), array['user:' || n] from generate_series(1, 1000000) n";
    sqlx::raw_sql(million).execute(&pair.pool).await.unwrap();
    uses_index().await;
    sqlx::raw_sql("delete from outbox.events").execute(&pair.pool).await.unwrap();
    uses_index().await;
    sqlx::raw_sql("analyze outbox.events").execute(&pair.pool).await.unwrap();
    uses_index().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn ids_that_the_database_makes_are_of_version_7_and_of_now_and_none_comes_twice() {
    let pair = Pair::start().await.unwrap();
    let ids: Vec<Uuid> =
        sqlx::query_scalar("select distinct outbox.new_id() from generate_series(1, 100000)")
            .fetch_all(&pair.pool)
            .await
            .unwrap();
    assert_eq!(ids.len(), 100_000);
    let now = chrono::Utc::now().timestamp().cast_unsigned();
    for id in ids {
        assert_eq!((id.get_version_num(), id.get_variant()), (7, Variant::RFC4122), "{id}");
        let (seconds, _) = id.get_timestamp().unwrap().to_unix();
        assert!(seconds.abs_diff(now) < 60, "{id} is of {seconds}, now is {now}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn receipt_names_the_transaction_and_the_row() {
    let pair = Pair::start().await.unwrap();
    pair.relay.process().terminate().await.unwrap();
    let mut tx = pair.pool.begin().await.unwrap();
    let event = Event::delete(["user:1"]).unwrap();
    let receipt = outbox::enqueue(&mut tx, &event).await.unwrap();
    let events: Vec<Event> = (0..3000).map(|n| Event::delete([format!("user:{n}")]).unwrap()).collect();
    let receipts = outbox::enqueue_all(&mut tx, &events).await.unwrap();
    let xid: String =
        sqlx::query_scalar("select pg_current_xact_id()::text").fetch_one(&mut *tx).await.unwrap();
    assert_eq!(receipt.xid.to_string(), xid);
    assert_eq!(receipt.event_id, event.id());
    assert_eq!(receipts.len(), 3000);
    for (receipt, event) in receipts.iter().zip(&events) {
        assert_eq!(receipt.event_id, event.id());
        assert_eq!(receipt.xid, Xid(xid.parse().unwrap()));
    }
    assert!(receipts.windows(2).all(|pair| pair[0].seq < pair[1].seq));
    tx.commit().await.unwrap();

    let options = ClaimOptions { limit: 10, max_bytes: 1_000_000, from_seq: 0, prepared: true };
    let (claim, claimed, poison) =
        outbox::Claim::take(&pair.pool, options, Duration::from_secs(5)).await.unwrap();
    assert_eq!((claimed.len(), poison.len()), (10, 0));
    assert_eq!(claimed[0].event.xids, [xid.parse::<u64>().unwrap()]);
    // Another claim skips what this one holds, and a dropped claim gives it back.
    let (other, others, _) = outbox::Claim::take(&pair.pool, options, Duration::from_secs(5)).await.unwrap();
    assert!(others.iter().all(|other| claimed.iter().all(|mine| mine.seq != other.seq)));
    drop(claim);
    other.give_back().await.unwrap();
    eventually(Duration::from_secs(5), async || pair.backlog().await.unwrap() == 3001).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn claim_takes_no_more_bytes_than_it_was_told_but_always_one_row() {
    let pair = Pair::start().await.unwrap();
    pair.relay.process().terminate().await.unwrap();
    let mut tx = pair.pool.begin().await.unwrap();
    for number in 0..5 {
        let event =
            Event::update(format!("k:{number}").as_str(), vec![7; 100_000], 1, Duration::from_secs(60))
                .unwrap();
        outbox::enqueue(&mut tx, &event).await.unwrap();
    }
    tx.commit().await.unwrap();
    for (max_bytes, rows) in [(1, 1), (250_000, 3), (10_000_000, 5)] {
        let options = ClaimOptions { limit: 100, max_bytes, from_seq: 0, prepared: true };
        let (claim, claimed, _) =
            outbox::Claim::take(&pair.pool, options, Duration::from_secs(5)).await.unwrap();
        assert_eq!(claimed.len(), rows, "{max_bytes} bytes");
        claim.give_back().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn retention_keeps_each_message_for_at_least_its_window() {
    let options = PairOptions { relay: vec![("RELAY_RETENTION", "3s".to_owned())], ..Default::default() };
    let pair = Pair::start_with(options).await.unwrap();
    pair.enqueue(&["kept"]).await.unwrap();
    pair.until_outbox_empty().await;
    let published = Instant::now();
    let kept = async || -> i64 {
        sqlx::query_scalar("select count(*) from outbox.published").fetch_one(&pair.pool).await.unwrap()
    };
    eventually(Duration::from_secs(30), async || kept().await == 0).await;
    assert!(published.elapsed() >= Duration::from_secs(3), "forgotten after {:?}", published.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn schema_survives_being_installed_twice_and_beside_migrations_of_the_application() {
    let pair = Pair::start().await.unwrap();
    outbox::migrate(&pair.pool).await.unwrap();
    let own: bool = sqlx::query_scalar("select to_regclass('public._sqlx_migrations') is null")
        .fetch_one(&pair.pool)
        .await
        .unwrap();
    assert!(own, "the application's own table of migrations was touched");
    let uncommented: i64 = sqlx::query_scalar(
        "select count(*) from pg_attribute a join pg_class c on c.oid = a.attrelid
         where c.relnamespace = 'outbox'::regnamespace and c.relkind in ('r', 'p') and not c.relispartition
           and c.relname <> 'migrations' and a.attnum > 0 and not a.attisdropped
           and col_description(c.oid, a.attnum) is null",
    )
    .fetch_one(&pair.pool)
    .await
    .unwrap();
    assert_eq!(uncommented, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn producers_need_no_more_rights_than_they_use() {
    let pair = Pair::start().await.unwrap();
    sqlx::raw_sql(
        "revoke execute on all functions in schema outbox from public;
         create role producer login; grant usage on schema outbox to producer;
         grant insert, select (id, xid, seq) on outbox.events to producer;
         create role sql_producer login; grant usage on schema outbox to sql_producer;
         grant execute on function outbox.enqueue to sql_producer",
    )
    .execute(&pair.pool)
    .await
    .unwrap();
    pair.fill("produced").await.unwrap();
    let options: PgConnectOptions = pair.stack.postgres_url().parse().unwrap();
    let mut producer = PgConnection::connect_with(&options.clone().username("producer")).await.unwrap();
    let mut tx = producer.begin().await.unwrap();
    outbox::enqueue(&mut tx, &Event::delete(["produced"]).unwrap()).await.unwrap();
    tx.commit().await.unwrap();
    assert!(sqlx::query("select keys from outbox.events").execute(&mut producer).await.is_err());
    pair.fill("produced:by-sql").await.unwrap();
    let mut producer = PgConnection::connect_with(&options.username("sql_producer")).await.unwrap();
    sqlx::raw_sql("select outbox.enqueue(array['produced:by-sql'])").execute(&mut producer).await.unwrap();
    assert!(
        sqlx::raw_sql("insert into outbox.events (id, keys) values (gen_random_uuid(), '{k}')")
            .execute(&mut producer)
            .await
            .is_err()
    );
    pair.until_none("produced*").await;
}
