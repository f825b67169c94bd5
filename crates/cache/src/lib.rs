#![doc = include_str!("../README.md")]

mod error;
mod names;
mod redis;
mod slot;
mod work;

pub use error::RedisError;
pub use redis::{Applied, EvictionPolicy, Redis, RedisConfig, RedisTls};
pub use work::Work;
