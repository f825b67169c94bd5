#![doc = include_str!("../README.md")]

mod cache;
mod codec;
mod error;
mod mark;
pub mod metrics;
mod names;
pub mod protocol;
mod redis;
mod script;
mod slot;
mod work;

pub use cache::{Cache, CacheConfig, Loaded, Options};
pub use codec::{Codec, CodecError, Json, Raw};
pub use error::RedisError;
pub use mark::Mark;
pub use redis::{
    Acquired, Applied, EvictionPolicy, Fill, Instance, LeaseId, LeaseToken, MAX_STALE, Masters, OldMark,
    OldMarks, Outcome, Redis, RedisConfig, RedisTls, Undone, Unreachable,
};
pub use work::Work;
