//! Several keys in one read.

use std::collections::HashMap;
use std::convert::Infallible;

use cache::{Cache, CacheConfig, Options, Raw};
use devstack::eventually;

use crate::support::{Bed, MINUTE, SOON, key, mark};

type Found = Result<HashMap<String, u32>, Infallible>;

fn found<const N: usize>(rows: [(&str, u32); N]) -> Found {
    Ok(rows.map(|(key, value)| (key.to_owned(), value)).into())
}

#[tokio::test]
async fn hits_come_from_one_mget_and_all_misses_from_one_call_of_the_loader() {
    let bed = Bed::new().await;
    let cache = bed.cache();
    bed.raw(&["MSET", "a", "1", "c", "3"]).await;
    let keys = ["a", "b", "c", "d"];
    let load = async |missing: Vec<&&str>| {
        assert_eq!(missing, [&"b", &"d"]);
        found([("b", 2)])
    };
    assert_eq!(cache.get_many(&keys, MINUTE, load).await, Ok(vec![Some(1), Some(2), Some(3), None]));
    assert_eq!(bed.raw(&["MGET", "a", "b", "c", "d"]).await, "1\n2\n3\nnull");
    let no_load = async |_: Vec<&&str>| -> Found { unreachable!("everything is cached") };
    assert_eq!(cache.get_many(&keys, MINUTE, no_load).await, Ok(vec![Some(1), Some(2), Some(3), None]));
}

#[tokio::test]
async fn a_key_asked_for_twice_is_loaded_once_and_answered_twice() {
    let bed = Bed::new().await;
    let load = async |missing: Vec<&&str>| {
        assert_eq!(missing, [&"a", &""]);
        found([("a", 1), ("", 0)])
    };
    let read = bed.cache().get_many(&["a", "", "a", ""], MINUTE, load).await;
    assert_eq!(read, Ok(vec![Some(1), Some(0), Some(1), Some(0)]));
    assert_eq!(bed.raw(&["KEYS", "*"]).await, "a");
}

#[tokio::test]
async fn a_delete_during_the_load_keeps_only_its_own_key_from_being_stored() {
    let bed = Bed::new().await;
    let load = async |_: Vec<&&str>| {
        bed.delete(&key("a"), 1).await;
        found([("a", 1), ("b", 2)])
    };
    let read = bed.cache().get_many(&["a", "b"], MINUTE, load).await;
    assert_eq!(read, Ok(vec![Some(1), Some(2)]));
    assert_eq!(bed.raw(&["MGET", "a", "b"]).await, "\n2");
}

#[tokio::test]
async fn marked_keys_and_keys_that_others_are_loading_are_loaded_but_not_stored() {
    let bed = Bed::new().await;
    bed.redis.mark(&[key("marked")], mark(7)).await.unwrap();
    let lease = bed.grant(&key("leased")).await;
    let load = async |_: Vec<&&str>| found([("marked", 1), ("leased", 2), ("free", 3)]);
    let read = bed.cache().get_many(&["marked", "leased", "free"], MINUTE, load).await;
    assert_eq!(read, Ok(vec![Some(1), Some(2), Some(3)]));
    assert_eq!(bed.raw(&["MGET", "marked", "leased", "free"]).await, "\n\n3");
    assert!(bed.fill(&key("leased"), &lease, "2").await);
}

#[tokio::test]
async fn values_that_cannot_be_decoded_are_replaced() {
    let bed = Bed::new().await;
    bed.raw(&["SET", "a", "not a number"]).await;
    bed.raw(&["RPUSH", "b", "element"]).await;
    let load = async |_: Vec<&&str>| found([("a", 1), ("b", 2)]);
    assert_eq!(bed.cache().get_many(&["a", "b"], MINUTE, load).await, Ok(vec![Some(1), Some(2)]));
    assert_eq!(bed.raw(&["MGET", "a", "b"]).await, "1\n2");
}

#[tokio::test]
async fn a_failing_loader_returns_its_own_error_and_gives_all_leases_back() {
    let bed = Bed::new().await;
    let load = async |_: Vec<&&str>| Err::<HashMap<String, u32>, _>("down");
    assert_eq!(bed.cache().get_many(&["a", "b"], MINUTE, load).await, Err("down"));
    eventually(SOON, async || bed.raw(&["DBSIZE"]).await == "0").await;
}

#[tokio::test]
async fn without_redis_everything_is_loaded() {
    let bed = Bed::new().await;
    bed.server.terminate().await.unwrap();
    let load = async |_: Vec<&&str>| found([("a", 1)]);
    assert_eq!(bed.cache().get_many(&["a", "b"], MINUTE, load).await, Ok(vec![Some(1), None]));
}

#[tokio::test]
async fn no_keys_are_no_request_and_options_apply() {
    let bed = Bed::new().await;
    let cache = Cache::new(bed.redis.clone(), CacheConfig::default());
    let none: [&str; 0] = [];
    let no_load = async |_: Vec<&&str>| -> Found { unreachable!("nothing is missing") };
    assert_eq!(cache.get_many(&none, MINUTE, no_load).await, Ok(vec![]));
    let options = Options::<Raw> { ttl: MINUTE, ..Options::default() };
    let load = async |_: Vec<&&str>| Ok::<_, Infallible>(HashMap::from([("a".to_owned(), b"\xff".to_vec())]));
    let read = cache.get_many_with(&["a", "b"], &options, load).await;
    assert_eq!(read, Ok(vec![Some(b"\xff".to_vec()), None]));
    assert_eq!(bed.raw(&["GET", "b"]).await, "\u{1f}absent");
}
