use std::time::Duration;

use devstack::{Stack, StackOptions, eventually};
use outbox::Event;
use sqlx::PgPool;
use sqlx::postgres::PgPoolOptions;

use crate::Daemon;

/// How long the pair may take to bring what was enqueued to Redis, faults included.
pub const SETTLED: Duration = Duration::from_secs(90);

/// How to start the pair.
#[derive(Debug, Default)]
pub struct PairOptions {
    /// The servers.
    pub stack: StackOptions,
    /// SQL that runs before the daemons start.
    pub schema: &'static str,
    /// Rules file of the relays; empty for none.
    pub rules: &'static str,
    /// More environment for the relays.
    pub relay: Vec<(&'static str, String)>,
    /// More environment for the subscribers.
    pub subscriber: Vec<(&'static str, String)>,
}

/// Servers, one relay, one subscriber.
#[derive(Debug)]
pub struct Pair {
    /// The first relay.
    pub relay: Daemon,
    /// The first subscriber.
    pub subscriber: Daemon,
    /// Connections of the service that enqueues.
    pub pool: PgPool,
    /// The servers.
    pub stack: Stack,
    options: PairOptions,
}

impl Pair {
    /// Starts everything and waits until it is ready.
    ///
    /// # Errors
    /// If a server or a program cannot be started.
    pub async fn start() -> anyhow::Result<Self> {
        Self::start_with(PairOptions::default()).await
    }

    /// [`Pair::start`] with options.
    ///
    /// # Errors
    /// If a server or a program cannot be started.
    pub async fn start_with(mut options: PairOptions) -> anyhow::Result<Self> {
        let stack = Stack::start(std::mem::take(&mut options.stack)).await?;
        let pool = PgPoolOptions::new().max_connections(20).connect(&stack.postgres_url()).await?;
        outbox::migrate(&pool).await?;
        sqlx::raw_sql(options.schema).execute(&pool).await?;
        if !options.rules.is_empty() {
            let file = stack.directory().path().join("rules.toml");
            std::fs::write(&file, options.rules)?;
            options.relay.push(("RELAY_RULES", file.display().to_string()));
        }
        let relay = spawn_relay(&stack, &options.relay)?;
        let subscriber = spawn_subscriber(&stack, &options.subscriber)?;
        relay.until_ready().await;
        subscriber.until_ready().await;
        Ok(Self { relay, subscriber, pool, stack, options })
    }

    /// One more relay, with more environment than the first.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn another_relay(&self, more: &[(&'static str, String)]) -> anyhow::Result<Daemon> {
        spawn_relay(&self.stack, &[self.options.relay.as_slice(), more].concat())
    }

    /// One more subscriber, with more environment than the first.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn another_subscriber(&self, more: &[(&'static str, String)]) -> anyhow::Result<Daemon> {
        spawn_subscriber(&self.stack, &[self.options.subscriber.as_slice(), more].concat())
    }

    /// Commits one event that names `keys`.
    ///
    /// # Errors
    /// If the database refuses.
    pub async fn enqueue(&self, keys: &[&str]) -> anyhow::Result<()> {
        let mut tx = self.pool.begin().await?;
        outbox::enqueue(&mut tx, &Event::delete(keys.iter().copied())?).await?;
        tx.commit().await?;
        Ok(())
    }

    /// Puts a value at `key`.
    ///
    /// # Errors
    /// If Redis does not answer.
    pub async fn fill(&self, key: &str) -> anyhow::Result<()> {
        self.stack.redis.command(&["SET", key, "cached"]).await.map(drop)
    }

    /// Puts a value at each of `prefix:0` to `prefix:<count - 1>`.
    ///
    /// # Errors
    /// If Redis does not answer.
    pub async fn fill_many(&self, prefix: &str, numbers: std::ops::Range<usize>) -> anyhow::Result<()> {
        let keys: Vec<String> = numbers.map(|number| format!("{prefix}:{number}")).collect();
        for some in keys.chunks(1000) {
            let mut command = vec!["MSET"];
            some.iter().for_each(|key| command.extend([key.as_str(), "cached"]));
            self.stack.redis.command(&command).await?;
        }
        Ok(())
    }

    /// Whether there is a value at `key`.
    ///
    /// # Errors
    /// If Redis does not answer.
    pub async fn is_cached(&self, key: &str) -> anyhow::Result<bool> {
        Ok(self.stack.redis.command(&["EXISTS", key]).await? == "1")
    }

    /// How many keys match a pattern.
    ///
    /// # Errors
    /// If Redis does not answer.
    pub async fn count(&self, pattern: &str) -> anyhow::Result<usize> {
        let script = "local n, c = 0, '0' repeat local r = redis.call('SCAN', c, 'MATCH', ARGV[1], 'COUNT', 1000) \
                      c = r[1] n = n + #r[2] until c == '0' return n";
        Ok(self.stack.redis.command(&["EVAL", script, "0", pattern]).await?.parse()?)
    }

    /// Waits until no key matches the pattern.
    #[track_caller]
    pub fn until_none(&self, pattern: &str) -> impl Future<Output = ()> {
        let pattern = pattern.to_owned();
        eventually(SETTLED, async move || match self.any(&pattern).await {
            Ok(None) => Ok(()),
            Ok(Some(key)) => Err(format!(
                "{key} is still cached; relay:\n{}\nsubscriber:\n{}",
                tail(&self.relay),
                tail(&self.subscriber)
            )),
            Err(error) => Err(format!("{error:#}")),
        })
    }

    /// A key that matches a pattern. Asked for again and again while the subscriber works, so it looks no further than to
    /// the first: Redis does nothing else meanwhile, and a walk through half a million keys takes a second.
    async fn any(&self, pattern: &str) -> anyhow::Result<Option<String>> {
        let script = "local c, k = '0' repeat local r = redis.call('SCAN', c, 'MATCH', ARGV[1], 'COUNT', 100) \
                      c, k = r[1], r[2][1] until k or c == '0' return k or ''";
        let key = self.stack.redis.command(&["EVAL", script, "0", pattern]).await?;
        Ok((!key.is_empty()).then_some(key))
    }

    /// Waits until the outbox is empty.
    #[track_caller]
    pub fn until_outbox_empty(&self) -> impl Future<Output = ()> {
        eventually(SETTLED, async || match self.backlog().await {
            Ok(0) => Ok(()),
            Ok(count) => Err(format!(
                "{count} events wait; relay:\n{}\nsubscriber:\n{}",
                tail(&self.relay),
                tail(&self.subscriber)
            )),
            Err(error) => Err(format!("{error:#}")),
        })
    }

    /// How many events wait in the outbox.
    ///
    /// # Errors
    /// If the database does not answer.
    pub async fn backlog(&self) -> anyhow::Result<i64> {
        Ok(sqlx::query_scalar("select count(*) from outbox.events").fetch_one(&self.pool).await?)
    }

    /// Commits events on fresh, cached keys `prefix:<n>` with several writers until `enough` says so; returns how many.
    /// Faults of Postgres are ridden out as a service would: by trying the transaction again.
    ///
    /// # Errors
    /// If Redis does not answer.
    pub async fn load(&self, prefix: &str, enough: impl Fn(usize) -> bool) -> anyhow::Result<usize> {
        const WRITERS: usize = 8;
        let mut committed = 0;
        while !enough(committed) {
            self.fill_many(prefix, committed..committed + WRITERS).await?;
            let writes = (committed..committed + WRITERS)
                .map(|number| self.enqueue_surely(format!("{prefix}:{number}")));
            futures::future::join_all(writes).await;
            committed += WRITERS;
        }
        Ok(committed)
    }

    async fn enqueue_surely(&self, key: String) {
        while self.enqueue(&[&key]).await.is_err() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// The cache, as the subscriber sees it.
    ///
    /// # Errors
    /// If the URL is wrong.
    pub fn cache(&self) -> anyhow::Result<cache::Redis> {
        Ok(cache::Redis::new(cache::RedisConfig { url: self.stack.redis_url(), ..Default::default() })?)
    }

    /// Waits until the subscriber has recorded that everything in the stream was applied.
    #[track_caller]
    pub fn until_recorded(&self) -> impl Future<Output = ()> {
        let mut last = None;
        eventually(SETTLED, async move || {
            // Heartbeats go on: what is in the stream now is meant.
            let stream =
                self.stack.nats.request("$JS.API.STREAM.INFO.INVALIDATIONS", "").await.map_err(text)?;
            let stream: serde_json::Value = serde_json::from_str(&stream).map_err(text)?;
            let last = *last.get_or_insert(stream["state"]["last_seq"].as_u64().unwrap_or_default());
            let record = self.cache().map_err(text)?.load_position("redis").await.map_err(text)?;
            let position: subscriber::position::Position =
                serde_json::from_slice(&record.unwrap_or_default()).map_err(text)?;
            if position.acked_seq >= last { Ok(()) } else { Err(format!("{position:?} of {last}")) }
        })
    }

    /// How many dead letters there are in the outbox.
    ///
    /// # Errors
    /// If the database does not answer.
    pub async fn dead_letters(&self) -> anyhow::Result<i64> {
        Ok(outbox::dead_letters::count(&self.pool).await?)
    }
}

fn spawn_relay(stack: &Stack, more: &[(&'static str, String)]) -> anyhow::Result<Daemon> {
    let mut variables = vec![("DATABASE_URL", stack.postgres_url()), ("NATS_URL", stack.nats_url())];
    variables.extend(more.iter().cloned());
    Daemon::spawn(stack.directory(), "relay", &variables)
}

fn spawn_subscriber(stack: &Stack, more: &[(&'static str, String)]) -> anyhow::Result<Daemon> {
    let mut variables = vec![("REDIS_URL", stack.redis_url()), ("NATS_URL", stack.nats_url())];
    variables.extend(more.iter().cloned());
    Daemon::spawn(stack.directory(), "subscriber", &variables)
}

fn tail(daemon: &Daemon) -> String {
    let log = daemon.process().log();
    let lines: Vec<&str> = log.lines().collect();
    lines[lines.len().saturating_sub(15)..].join("\n")
}

fn text(error: impl std::fmt::Display) -> String {
    format!("{error:#}")
}
