//! What the end-to-end tests share: the pair as real processes on real servers, and the questions tests ask of it.
//!
//! A test that enqueues keys first puts a value at each of them in Redis; a key that is still there when the pair has
//! come to rest is an invalidation that was lost.

mod daemon;
mod pair;

pub use daemon::{Daemon, program};
pub use pair::{Pair, PairOptions, SETTLED};
