//! The product's own client on a real server, in the model's terms.

use std::time::Duration;

use cache::{Applied, Fill, LeaseId, LeaseToken, Mark, Redis, RedisConfig, Work};
use devstack::RedisOptions;
use event::{CacheKey, CommittedEvent, EventId};

use super::{Answer, Step};
use crate::key::{Acquired, Guard, KeyState, Lease, Updated};
use crate::scenario::Change;
use crate::transactions::Transactions;

pub const TOKENS: usize = 3;
pub const LEASES_PER_TOKEN: usize = 2;

/// Versions in order: where the number of digits changes, and where a Lua number can no longer tell two apart.
pub const VERSIONS: [i64; 8] = [0, 9, 10, 99, 100, 1 << 53, (1 << 53) + 1, i64::MAX];

/// Transactions, the largest among them.
pub const TRANSACTIONS: [u64; 3] = [7, 1 << 53, u64::MAX];

const KEY: &str = "user:1";
const GUARD: &str = "\u{1f}g{user:1}";
const MARKS: &str = "\u{1f}m{user:1}";
const REGISTRY: &str = "\u{1f}marks";

/// The history that all transactions belong to.
const HISTORY: &str = "d0000000001.2";

/// Longer than any run.
const HOUR: Duration = Duration::from_secs(3_600);

/// Everything about a key in one answer: value, guard, their times to live and that of the marks, then the marks.
const READ: &str = "local time = function(name) return redis.call('PTTL', name) end \
    local it = {redis.call('GET', KEYS[1]) or '', redis.call('GET', KEYS[2]) or ''} \
    for nth = 1, 3 do it[nth + 2] = time(KEYS[nth]) end \
    for _, mark in ipairs(redis.call('SMEMBERS', KEYS[3])) do it[#it + 1] = mark end \
    return it";

pub struct Real {
    server: devstack::Redis,
    redis: Redis,
    key: CacheKey,
    tokens: [LeaseToken; TOKENS],
    /// Leases that each token was granted, whatever has become of them.
    leases: Vec<Vec<LeaseId>>,
}

/// A value that is any of eight sets of transactions.
pub fn content(value: u8) -> Transactions {
    Transactions::from_bits(value)
}

fn text(value: Transactions) -> String {
    format!("value {}", value.bits())
}

fn parse(text: &str) -> Transactions {
    content(text.strip_prefix("value ").unwrap().parse().unwrap())
}

/// The mark of a transaction, always the same.
fn mark(of: u8) -> Mark {
    let xid = TRANSACTIONS[usize::from(of)];
    Mark::parse(&format!("{HISTORY}:{xid}:{xid:016x}")).unwrap()
}

fn position<T: PartialEq>(of: &T, all: &[T]) -> u8 {
    u8::try_from(all.iter().position(|one| one == of).unwrap()).unwrap()
}

impl Real {
    pub async fn start() -> Self {
        let server = devstack::Redis::start_alone(RedisOptions::default()).await.unwrap();
        let redis = Redis::new(RedisConfig { url: server.url(), ..RedisConfig::default() }).unwrap();
        let key = CacheKey::new(KEY).unwrap();
        let tokens = std::array::from_fn(|_| LeaseToken::generate());
        let mut leases = Vec::new();
        for token in tokens {
            let mut of_token = Vec::new();
            while of_token.len() < LEASES_PER_TOKEN {
                let acquired = redis.acquire(&key, token, HOUR, false).await.unwrap();
                let cache::Acquired::Grant(lease) = acquired else { panic!("not granted: {acquired:?}") };
                of_token.push(lease);
                server.command(&["DEL", GUARD]).await.unwrap();
            }
            leases.push(of_token);
        }
        Self { server, redis, key, tokens, leases }
    }

    fn lease(&self, lease: Lease) -> &LeaseId {
        &self.leases[usize::from(lease.token)][usize::from(lease.nth)]
    }

    /// Which lease has this name.
    fn find(&self, name: &str) -> Option<Lease> {
        let mut all = (0..).zip(&self.leases).flat_map(|(token, leases)| {
            (0..).zip(leases).map(move |(nth, lease)| (Lease { token, nth }, lease.to_string()))
        });
        all.find_map(|(lease, its)| (its == name).then_some(lease))
    }

    /// Makes the server hold `state`, with the marks registered as MARK registers them.
    pub async fn put(&self, state: &KeyState) {
        self.raw(&["FLUSHALL"]).await;
        let hour = HOUR.as_millis().to_string();
        if let Some(value) = state.value {
            self.raw(&["SET", KEY, &text(value), "PX", &hour]).await;
        }
        let guard = match state.guard {
            Guard::Absent => None,
            Guard::Lease(lease) => Some(format!("L{}", self.lease(lease))),
            Guard::Version(version) => Some(format!("V{}", VERSIONS[usize::from(version)])),
        };
        if let Some(guard) = guard {
            self.raw(&["SET", GUARD, &guard, "PX", &hour]).await;
        }
        for mark in (0..).take(TRANSACTIONS.len()).filter(|&mark| state.marks.contains(mark)) {
            self.add_mark(mark).await;
        }
    }

    /// What the server holds. Values and guards always have a time to live, marks never.
    pub async fn read(&self) -> KeyState {
        let answer = self.raw(&["EVAL", READ, "3", KEY, GUARD, MARKS]).await;
        let lines: Vec<&str> = answer.split('\n').collect();
        let [value, guard, value_ttl, guard_ttl, marks_ttl, marks @ ..] = lines.as_slice() else {
            panic!("unexpected answer {answer:?}");
        };
        let has_ttl = |ttl: &str| ttl.parse::<i64>().unwrap() > 0;
        assert_eq!(has_ttl(value_ttl), !value.is_empty(), "time to live of the value: {value_ttl}");
        assert_eq!(has_ttl(guard_ttl), !guard.is_empty(), "time to live of the guard: {guard_ttl}");
        assert!(!has_ttl(marks_ttl), "time to live of the marks: {marks_ttl}");
        let mut state = KeyState { value: (!value.is_empty()).then(|| parse(value)), ..KeyState::default() };
        if let Some(lease) = guard.strip_prefix('L') {
            state.guard = Guard::Lease(self.find(lease).unwrap());
        } else if let Some(version) = guard.strip_prefix('V') {
            state.guard = Guard::Version(position(&version.parse().unwrap(), &VERSIONS));
        }
        for mark in marks {
            let transaction = Mark::parse(mark).unwrap().transaction();
            state.marks = state.marks.with(position(&transaction.xid, &TRANSACTIONS));
        }
        state
    }

    pub async fn take(&mut self, step: Step) -> Answer {
        let keys = std::slice::from_ref(&self.key);
        let token = |token: u8| self.tokens[usize::from(token)];
        match step {
            Step::Acquire { lease, unusable } => {
                let token = token(lease.token);
                let acquired = self.redis.acquire(&self.key, token, HOUR, unusable).await.unwrap();
                return Answer::Acquired(self.in_model(acquired, lease));
            }
            Step::Fill { lease, value, version } => {
                let bytes = text(content(value)).into_bytes();
                let version = version.map(|version| VERSIONS[usize::from(version)]);
                let fill = Fill { value: &bytes, ttl: HOUR, version, keep_stale_copy: false };
                return Answer::Stored(self.redis.fill(&self.key, self.lease(lease), fill).await.unwrap());
            }
            Step::Deliver { change, value, version, of } => {
                let work = self.work(change, value, version, TRANSACTIONS[usize::from(of)]);
                return Answer::Updated(outcome(self.redis.apply(&work).await.unwrap()));
            }
            Step::Release { token: of } => self.redis.release(&self.key, token(of)).await.unwrap(),
            Step::Invalidate => drop(self.redis.invalidate(keys).await.unwrap()),
            Step::Mark { of } => self.redis.mark(keys, mark(of)).await.unwrap(),
            Step::Unmark { of } => drop(self.redis.unmark(keys, mark(of)).await.unwrap()),
            Step::MarkAdd { of } => self.add_mark(of).await,
            Step::UnmarkRemove { of } => {
                self.raw(&["SREM", MARKS, &mark(of).to_string()]).await;
                self.raw(&["ZREM", REGISTRY, &format!("{}:{KEY}", mark(of))]).await;
            }
            Step::MarkUnlink | Step::UnmarkUnlink => drop(self.raw(&["UNLINK", GUARD, KEY]).await),
            Step::LoseValue => drop(self.raw(&["DEL", KEY]).await),
            Step::LoseGuard => drop(self.raw(&["DEL", GUARD]).await),
        }
        Answer::None
    }

    async fn add_mark(&self, of: u8) {
        self.raw(&["ZADD", REGISTRY, "0", &format!("{}:{KEY}", mark(of))]).await;
        self.raw(&["SADD", MARKS, &mark(of).to_string()]).await;
    }

    fn work(&self, change: Change, value: u8, version: u8, transaction: u64) -> Work {
        let change = match change {
            Change::Delete => event::Change::Delete,
            Change::Update => {
                let bytes = text(content(value)).into_bytes();
                event::Change::update(bytes, VERSIONS[usize::from(version)], HOUR).unwrap()
            }
        };
        let mut work = Work::new();
        work.add(&CommittedEvent {
            id: EventId::generate(),
            keys: vec![self.key.clone()],
            change,
            xids: vec![transaction],
            history: Some(HISTORY.parse().unwrap()),
            at_us: 0,
            traceparent: None,
        });
        work
    }

    /// The answer in the model's terms. A lease with a new name takes the place of `new`.
    fn in_model(&mut self, acquired: cache::Acquired, new: Lease) -> Acquired {
        match acquired {
            cache::Acquired::Grant(lease) => {
                Acquired::Grant(self.find(&lease.to_string()).unwrap_or_else(|| {
                    self.leases[usize::from(new.token)][usize::from(new.nth)] = lease;
                    new
                }))
            }
            cache::Acquired::Wait => Acquired::Wait,
            cache::Acquired::Bypass => Acquired::Bypass,
            cache::Acquired::Value(bytes) => Acquired::Value(parse(std::str::from_utf8(&bytes).unwrap())),
        }
    }

    async fn raw(&self, command: &[&str]) -> String {
        self.server.command(command).await.unwrap()
    }
}

fn outcome(applied: Applied) -> Updated {
    match (applied.updated, applied.ignored) {
        (1, 0) => Updated::Replaced,
        (0, 1) => Updated::Ignored,
        _ => Updated::Deleted,
    }
}
