//! Marks whose writer has probably died: a look through the registries, page by page.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use deadpool_redis::redis::{Cmd, Pipeline, Value};
use event::CacheKey;

use super::Redis;
use super::apply::milliseconds;
use super::batch::read;
use super::masters::Master;
use crate::names::Shard;
use crate::{Mark, RedisError};

/// Most marks of one registry in a page.
const PAGE: isize = 1_000;

/// Registries looked at in one pipeline: about a millisecond of a node's time.
const REGISTRIES_PER_PIPELINE: usize = 1_000;

/// A mark that may have been left behind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OldMark {
    /// The key that is not cached because of it.
    pub key: CacheKey,
    /// The mark.
    pub mark: Mark,
    /// How long it has been there, by the clock of Redis. Zero if that clock has been set back since.
    pub age: Duration,
}

/// A look through all registries. However many marks there are, and whoever made them, it comes to every one.
pub struct OldMarks<'a> {
    redis: &'a Redis,
    older_than_ms: u64,
    now_ms: u64,
    pages: VecDeque<Page>,
}

/// The same part of some registries of one server.
struct Page {
    master: Arc<Master>,
    shards: Vec<Shard>,
    first: isize,
}

impl Redis {
    /// Marks that have been there for longer than `older_than`, by the clock of Redis: their writer has probably died
    /// between marking and unmarking. A time in the future counts as old: the clock was set back.
    ///
    /// Ask Postgres about each transaction (`pg_xact_status`) and [`resolve`](Self::resolve) the marks of those that are
    /// not in progress.
    ///
    /// # Errors
    /// Any [`RedisError`].
    pub async fn old_marks(&self, older_than: Duration) -> Result<OldMarks<'_>, RedisError> {
        let mut time = Cmd::new();
        time.arg("TIME");
        let (seconds, microseconds): (u64, u64) = self.query(&time).await?;
        let mut pages = VecDeque::new();
        for master in self.masters().await? {
            let master = Arc::new(master);
            for shards in master.shards.chunks(REGISTRIES_PER_PIPELINE) {
                pages.push_back(Page { master: Arc::clone(&master), shards: shards.to_vec(), first: 0 });
            }
        }
        let now_ms = seconds * 1_000 + microseconds / 1_000;
        Ok(OldMarks { redis: self, older_than_ms: milliseconds(older_than), now_ms, pages })
    }
}

impl OldMarks<'_> {
    /// The next page, perhaps an empty one; `None` at the end. Marks that are set or removed meanwhile may be missed:
    /// the next look finds them.
    ///
    /// # Errors
    /// Any [`RedisError`].
    pub async fn next(&mut self) -> Result<Option<Vec<OldMark>>, RedisError> {
        let Some(page) = self.pages.pop_front() else { return Ok(None) };
        let mut found = Vec::new();
        for (shard, answer) in page.shards.iter().zip(self.ask(&page).await?) {
            let members: Vec<(String, f64)> = read(answer)?;
            if members.len() >= PAGE.unsigned_abs() {
                let (master, shards) = (Arc::clone(&page.master), vec![*shard]);
                self.pages.push_back(Page { master, shards, first: page.first + PAGE });
            }
            found.extend(members.iter().filter_map(|(member, at_ms)| self.old_mark(member, *at_ms)));
        }
        Ok(Some(found))
    }

    async fn ask(&self, page: &Page) -> Result<Vec<Value>, RedisError> {
        let listing = page.listing();
        match self.redis.pipeline_to(&page.master, listing.clone()).await {
            // The registry of a slot that is moving may be at another node.
            Err(error) if error.is_slot_moving() => self.redis.run_singly(&listing).await,
            answers => answers,
        }
    }

    fn old_mark(&self, member: &str, at_ms: f64) -> Option<OldMark> {
        let (key, mark) = Mark::parse_member(member)?;
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "milliseconds since 1970"
        )]
        let at_ms = at_ms as u64;
        let age_ms = self.now_ms.checked_sub(at_ms);
        let is_old = age_ms.is_none_or(|age_ms| age_ms >= self.older_than_ms);
        let age = Duration::from_millis(age_ms.unwrap_or_default());
        is_old.then_some(OldMark { key: CacheKey::new(key).ok()?, mark, age })
    }
}

impl Page {
    fn listing(&self) -> Pipeline {
        let mut pipeline = Pipeline::with_capacity(self.shards.len());
        for shard in &self.shards {
            pipeline.cmd("ZRANGE").arg(shard.registry()).arg(self.first).arg(self.first + PAGE - 1);
            pipeline.arg("WITHSCORES");
        }
        pipeline
    }
}
