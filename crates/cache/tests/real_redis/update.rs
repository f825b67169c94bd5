//! Versioned updates: no miss after the write, and never an older value over a newer one.

use std::sync::atomic::{AtomicUsize, Ordering};

use cache::{Acquired, Applied, Fill, LeaseId, LeaseToken};
use event::CacheKey;
use proptest::prelude::*;

use crate::support::{Bed, deleted, key, mark, plain, updated, work};

impl Bed {
    async fn cached(&self, key: &CacheKey, value: &str, version: i64) {
        let lease = self.grant(key).await;
        let fill = Fill { version: Some(version), ..plain(value) };
        assert!(self.redis.fill(key, &lease, fill).await.unwrap());
    }

    async fn update(&self, key: &CacheKey, value: &str, version: i64) -> Applied {
        self.redis.apply(&work([updated(key, value, version, 1)])).await.unwrap()
    }
}

const UPDATED: Applied = Applied { deleted: 0, updated: 1, ignored: 0, unmarked: 0 };
const IGNORED: Applied = Applied { deleted: 0, updated: 0, ignored: 1, unmarked: 0 };
const AS_DELETE: Applied = Applied { deleted: 0, updated: 0, ignored: 0, unmarked: 0 };

#[tokio::test]
async fn an_update_replaces_an_older_version_so_that_no_miss_follows() {
    let bed = Bed::new().await;
    let key = key("k");
    bed.cached(&key, "one", 1).await;
    assert_eq!(bed.update(&key, "two", 2).await, UPDATED);
    assert_eq!(bed.raw(&["GET", "k"]).await, "two");
    assert_eq!(bed.update(&key, "three", 3).await, UPDATED);
    assert!(bed.raw(&["PTTL", "k"]).await.parse::<i64>().unwrap() > 0);
}

#[tokio::test]
async fn an_update_that_is_not_newer_is_ignored() {
    let bed = Bed::new().await;
    let key = key("k");
    bed.cached(&key, "five", 5).await;
    assert_eq!(bed.update(&key, "four", 4).await, IGNORED);
    assert_eq!(bed.update(&key, "five again", 5).await, IGNORED);
    assert_eq!(bed.raw(&["GET", "k"]).await, "five");
}

#[tokio::test]
async fn versions_are_compared_exactly_over_their_whole_range() {
    let bed = Bed::new().await;
    let key = key("k");
    bed.cached(&key, "v", 9).await;
    let steps = [10, 99, 100, (1 << 53) + 1, (1 << 53) + 2, i64::MAX - 1, i64::MAX];
    for version in steps {
        assert_eq!(bed.update(&key, "newer", version).await, UPDATED, "{version}");
        assert_eq!(bed.update(&key, "older", version - 1).await, IGNORED, "{version}");
    }
}

#[tokio::test]
async fn an_update_of_a_value_without_a_known_version_acts_as_a_delete() {
    let bed = Bed::new().await;
    let key = key("k");
    let lease = bed.grant(&key).await;
    assert!(bed.fill(&key, &lease, "unversioned").await);
    assert_eq!(bed.update(&key, "two", 2).await, AS_DELETE);
    assert!(!bed.exists("k").await);
}

#[tokio::test]
async fn an_update_of_an_absent_key_does_not_create_it() {
    let bed = Bed::new().await;
    let key = key("k");
    assert_eq!(bed.update(&key, "two", 2).await, AS_DELETE);
    bed.cached(&key, "one", 1).await;
    // The value was evicted, its version was not.
    bed.raw(&["DEL", "k"]).await;
    assert_eq!(bed.update(&key, "two", 2).await, AS_DELETE);
    assert_eq!(bed.raw(&["KEYS", "*"]).await, "");
}

#[tokio::test]
async fn an_update_during_a_load_voids_its_lease() {
    let bed = Bed::new().await;
    let key = key("k");
    let lease = bed.grant(&key).await;
    assert_eq!(bed.update(&key, "two", 2).await, AS_DELETE);
    assert!(!bed.redis.fill(&key, &lease, Fill { version: Some(1), ..plain("one") }).await.unwrap());
}

#[tokio::test]
async fn an_update_of_a_marked_key_acts_as_a_delete_and_then_removes_its_own_mark() {
    let bed = Bed::new().await;
    let key = key("k");
    bed.redis.mark(std::slice::from_ref(&key), mark(9)).await.unwrap();
    // As a restored snapshot could bring back a value under a mark.
    bed.raw(&["SET", "k", "one"]).await;
    bed.raw(&["SET", "\u{1f}g{k}", "V1"]).await;
    assert_eq!(bed.update(&key, "two", 2).await, AS_DELETE);
    assert!(!bed.exists("k").await);
    assert_eq!(bed.acquire(&key, LeaseToken::generate()).await, Acquired::Bypass);
    let applied = bed.redis.apply(&work([updated(&key, "three", 3, 9)])).await.unwrap();
    assert_eq!(applied.unmarked, 1);
    bed.grant(&key).await;
}

#[tokio::test]
async fn an_update_deletes_a_value_or_guard_of_the_wrong_type() {
    let bed = Bed::new().await;
    let key = key("k");
    bed.raw(&["HSET", "k", "field", "value"]).await;
    bed.raw(&["RPUSH", "\u{1f}g{k}", "element"]).await;
    assert_eq!(bed.update(&key, "two", 2).await, AS_DELETE);
    assert_eq!(bed.raw(&["KEYS", "*"]).await, "");
}

/// What can happen around one row whose every change increments its version.
#[derive(Debug, Clone)]
enum Step {
    /// Commits the next version, with an event that updates or deletes.
    Write {
        as_update: bool,
    },
    /// Delivers one of the events so far, perhaps not for the first time.
    Deliver(usize),
    /// A reader misses, loads and fills without interruption.
    Read,
    /// A reader misses, loads, or fills; readers are interleaved freely.
    Miss(usize),
    Load(usize),
    Fill(usize),
    /// The value, or the guard, expires or is evicted.
    LoseValue,
    LoseGuard,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => any::<bool>().prop_map(|as_update| Step::Write { as_update }),
        5 => any::<usize>().prop_map(Step::Deliver),
        3 => Just(Step::Read),
        3 => (0..2_usize).prop_map(Step::Miss),
        3 => (0..2_usize).prop_map(Step::Load),
        3 => (0..2_usize).prop_map(Step::Fill),
        1 => Just(Step::LoseValue),
        1 => Just(Step::LoseGuard),
    ]
}

/// A row, the events of its changes and two readers, in front of real Redis.
struct Row {
    key: CacheKey,
    version: i64,
    events: Vec<event::CommittedEvent>,
    readers: [(Option<LeaseId>, Option<i64>); 2],
}

impl Row {
    async fn take(&mut self, bed: &Bed, step: Step) {
        match step {
            Step::Write { as_update } => self.write(as_update),
            Step::Read => {
                for step in [Step::Miss(0), Step::Load(0), Step::Fill(0)] {
                    Box::pin(self.take(bed, step)).await;
                }
            }
            Step::Deliver(nth) if !self.events.is_empty() => {
                let event = self.events[nth % self.events.len()].clone();
                bed.redis.apply(&work([event])).await.unwrap();
            }
            Step::Miss(reader) => {
                let lease = match bed.acquire(&self.key, LeaseToken::generate()).await {
                    Acquired::Grant(lease) => Some(lease),
                    _ => None,
                };
                self.readers[reader] = (lease, None);
            }
            Step::Load(reader) => self.readers[reader].1 = Some(self.version),
            Step::Fill(reader) => {
                if let (Some(lease), Some(version)) = std::mem::take(&mut self.readers[reader]) {
                    let value = version.to_string();
                    let fill = Fill { version: Some(version), ..plain(&value) };
                    bed.redis.fill(&self.key, &lease, fill).await.unwrap();
                }
            }
            Step::LoseValue => drop(bed.raw(&["DEL", self.key.as_str()]).await),
            Step::LoseGuard => drop(bed.raw(&["DEL", &format!("\u{1f}g{{{}}}", self.key)]).await),
            Step::Deliver(_) => {}
        }
    }

    fn write(&mut self, as_update: bool) {
        self.version += 1;
        let value = self.version.to_string();
        let xid = u64::try_from(self.version).unwrap();
        self.events.push(match as_update {
            true => updated(&self.key, &value, self.version, xid),
            false => deleted(&[&self.key], &[xid]),
        });
    }

    async fn cached(&self, bed: &Bed) -> Option<i64> {
        bed.raw(&["GET", self.key.as_str()]).await.parse().ok()
    }
}

#[test]
fn in_any_order_with_duplicates_and_racing_fills_no_value_gets_older_and_the_last_one_wins() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let bed = runtime.block_on(Bed::new());
    let cases = AtomicUsize::new(0);
    let config = ProptestConfig { cases: 150, max_shrink_iters: 200, ..ProptestConfig::default() };
    proptest!(config, |(steps in proptest::collection::vec(step(), 1..40), seed in any::<u64>())| {
        let case = cases.fetch_add(1, Ordering::Relaxed);
        runtime.block_on(async {
            let key = key(&format!("row:{case}"));
            let mut row = Row { key, version: 0, events: Vec::new(), readers: [const { (None, None) }; 2] };
            for step in steps {
                let delivery = matches!(step, Step::Deliver(_));
                let before = row.cached(&bed).await;
                row.take(&bed, step).await;
                let after = row.cached(&bed).await;
                if let (true, Some(before), Some(after)) = (delivery, before, after) {
                    prop_assert!(after >= before, "{before} became {after}");
                }
            }
            // Everything is delivered in some order, the readers finish: the cache tells the truth or nothing.
            let rotate = usize::try_from(seed % 40).unwrap();
            for nth in 0..row.events.len() {
                row.take(&bed, Step::Deliver(nth + rotate)).await;
            }
            for reader in [0, 1] {
                row.take(&bed, Step::Fill(reader)).await;
            }
            let cached = row.cached(&bed).await;
            prop_assert!(cached.is_none_or(|cached| cached == row.version), "{cached:?} of {}", row.version);
            Ok(())
        })?;
    });
}
