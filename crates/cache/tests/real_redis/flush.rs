//! Deleting by pattern, for gaps in the stream.

use std::collections::BTreeSet;

use event::Change;

use crate::support::{Bed, committed, key, mark, work};

impl Bed {
    async fn names(&self) -> BTreeSet<String> {
        self.raw(&["KEYS", "*"]).await.lines().map(str::to_owned).collect()
    }
}

#[tokio::test]
async fn a_flush_deletes_matching_values_everywhere_and_keeps_the_rest() {
    let bed = Bed::new().await;
    let mut set = vec!["MSET".to_owned()];
    for n in 0..3_000 {
        set.extend([format!("user:{n}"), "v".to_owned(), format!("order:{n}"), "v".to_owned()]);
    }
    let set: Vec<&str> = set.iter().map(String::as_str).collect();
    bed.raw(&set).await;
    let patterns = ["user:*".to_owned(), "order:7*".to_owned()];
    assert_eq!(bed.redis.delete_matching(&patterns).await.unwrap(), 3_000 + 111);
    let names = bed.names().await;
    assert_eq!(names.len(), 3_000 - 111);
    assert!(names.iter().all(|name| name.starts_with("order:")));
}

#[tokio::test]
async fn a_flush_voids_the_leases_of_matching_keys_whatever_their_braces() {
    let bed = Bed::new().await;
    for text in ["user:1", "user:{7}", "user:}", "user:{}x"] {
        let key = key(text);
        let lease = bed.grant(&key).await;
        bed.redis.delete_matching(&["user:*".to_owned()]).await.unwrap();
        assert!(!bed.fill(&key, &lease, "from before the flush").await, "{text}");
    }
    assert_eq!(bed.raw(&["DBSIZE"]).await, "0");
}

#[tokio::test]
async fn a_flush_of_everything_keeps_marks_their_registry_and_positions() {
    let bed = Bed::new().await;
    bed.raw(&["SET", "k", "v"]).await;
    bed.raw(&["HSET", "somebody elses", "field", "value"]).await;
    bed.grant(&key("loading")).await;
    bed.redis.mark(&[key("marked"), key("{t}:marked")], mark(7)).await.unwrap();
    bed.redis.store_position("redis", b"record").await.unwrap();
    assert_eq!(bed.redis.flush_all_keys().await.unwrap(), 2);
    let left: BTreeSet<String> =
        ["\u{1f}m{marked}", "\u{1f}m:{t}:marked", "\u{1f}marks", "\u{1f}position:redis"]
            .map(Into::into)
            .into();
    assert_eq!(bed.names().await, left);
}

#[tokio::test]
async fn no_pattern_reaches_the_bookkeeping() {
    let bed = Bed::new().await;
    bed.redis.mark(&[key("k")], mark(7)).await.unwrap();
    bed.redis.store_position("redis", b"record").await.unwrap();
    let before = bed.names().await;
    let patterns = ["*", "\u{1f}*", "\u{1f}marks", "\u{1f}m{k}", "?position:*"].map(Into::into);
    assert_eq!(bed.redis.delete_matching(&patterns).await.unwrap(), 0);
    assert_eq!(bed.names().await, before);
}

#[tokio::test]
async fn a_namespace_is_every_key_that_begins_so_and_no_other() {
    let bed = Bed::new().await;
    let beginnings = ["user:", "u*er:", "[a]:", "a?\\:", "{tenant}:"];
    for beginning in beginnings {
        for text in [format!("{beginning}1"), beginning.to_owned()] {
            bed.raw(&["SET", &text, "v"]).await;
        }
    }
    for other in ["my user:1", "use", "uxer:1", "a:1", "ab\\:1", "tenant:1"] {
        bed.raw(&["SET", other, "v"]).await;
    }
    let others = bed.names().await.len() - 2 * beginnings.len();
    for beginning in beginnings {
        let applied = bed.redis.apply(&work([committed(&[&key(beginning)], Change::Namespace, &[7])])).await;
        assert_eq!(applied.unwrap().deleted, 2, "{beginning}");
    }
    assert_eq!(bed.names().await.len(), others);
}

#[tokio::test]
async fn a_fill_in_flight_while_its_namespace_is_invalidated_is_refused() {
    let bed = Bed::new().await;
    for text in ["user:1", "user:{7}", "user:}", "user:{}x"] {
        let key = key(text);
        let lease = bed.grant(&key).await;
        bed.redis.apply(&work([committed(&[&self::key("user:")], Change::Namespace, &[7])])).await.unwrap();
        assert!(!bed.fill(&key, &lease, "from before the truncate").await, "{text}");
        assert!(!bed.exists(text).await);
        let lease = bed.grant(&key).await;
        assert!(bed.fill(&key, &lease, "from after it").await, "{text}");
    }
}

/// A lease that is granted before the search and filled while it runs is found either as a lease or as a value.
#[tokio::test]
async fn leases_are_searched_for_before_values() {
    let bed = Bed::new().await;
    bed.raw(&["CONFIG", "SET", "slowlog-max-len", "1000"]).await;
    bed.raw(&["CONFIG", "SET", "slowlog-log-slower-than", "0"]).await;
    for by_namespace in [false, true] {
        bed.raw(&["SLOWLOG", "RESET"]).await;
        match by_namespace {
            true => {
                let namespace = committed(&[&key("user:")], Change::Namespace, &[7]);
                bed.redis.apply(&work([namespace])).await.map(drop).unwrap();
            }
            false => bed.redis.delete_matching(&["user:*".to_owned()]).await.map(drop).unwrap(),
        }
        // The latest first.
        let log = bed.raw(&["SLOWLOG", "GET", "1000"]).await;
        let patterns: Vec<&str> =
            log.lines().filter(|line| line.ends_with("user:*") || line.ends_with("user:**")).collect();
        assert_eq!(patterns, ["user:*", "\u{1f}[gs][:{]*user:**"]);
    }
}

#[tokio::test]
async fn many_namespaces_cost_one_search() {
    let bed = Bed::new().await;
    for n in 0..3_000 {
        bed.raw(&["SET", &format!("n{}:{n}", n % 30), "v"]).await;
    }
    let searches = async || {
        let stats = bed.raw(&["INFO", "commandstats"]).await;
        let scan = stats.lines().find_map(|line| line.strip_prefix("cmdstat_scan:calls=")).unwrap_or("0,");
        scan.split(',').next().unwrap().parse::<u64>().unwrap()
    };
    let names: Vec<_> = (0..20).map(|n| key(&format!("n{n}:"))).collect();
    let namespaces = committed(&names.iter().collect::<Vec<_>>(), Change::Namespace, &[7]);
    assert_eq!(bed.redis.apply(&work([namespaces])).await.unwrap().deleted, 2_000);
    let twenty = searches().await;
    let namespace = committed(&[&key("n20:")], Change::Namespace, &[7]);
    assert_eq!(bed.redis.apply(&work([namespace])).await.unwrap().deleted, 100);
    let one = searches().await - twenty;
    assert!(twenty <= one * 3, "{twenty} steps for twenty namespaces, {one} for one");
}
