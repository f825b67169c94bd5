//! The cache protocol as an explicit-state model: every interleaving of a few writers and readers, with everything that
//! can die, expire or arrive twice, is looked at.
//!
//! - `sound`: the protocol as it is keeps both promises. Each test prints how many states it has seen.
//! - `weakened`: each rule of the protocol is needed; without it the checker finds a counter-example, and the test
//!   expects that it does.
//! - `differential`: the model's Redis and the real one do the same on random states.
//!
//! # The promises
//!
//! - **strict**: no read returns a value that lacks a strict writer's commit which new snapshots showed when the read
//!   began. That is a little more than promised, since the writer itself learns of it later.
//! - **converges**: in every state in which no write, invalidation or fill is in flight and every mark is resolved, the
//!   cached value, if there is one, is what a new snapshot shows.
//!
//! # The model and the product
//!
//! | Here | There |
//! |---|---|
//! | `key.rs`: one key, its guard and marks, a function per atomic step | the scripts and commands of the `cache` crate |
//! | `writer.rs`: a process and its transaction, from the first statement to UNMARK | the `outbox` crate, Postgres |
//! | `delivery.rs`: what happens to the event and to a forgotten mark | `relay`, `subscriber` |
//! | `reader.rs`: one read, alone or joined to another's | `get_or_load` |
//! | `protocol.rs`: the rules, each of which a test can break | the reasons for all that code |
//! | `scenario.rs`, `state.rs`, `system.rs`: who takes part, and what the checker needs | |
//!
//! One key is enough: steps on different keys do not touch each other. Its value is the *set of transactions* that
//! contributed to it, and each writer changes a row of its own, so that values are ordered only as far as Postgres
//! orders them. Where events carry versions all writers change the same row and wait for its lock.
//!
//! What is left out because something in the model already does the same or worse:
//!
//! - Any further delete, such as a default writer's own after its commit, or the one the subscriber and the resolver
//!   send before they remove a mark: value and guard may be evicted at every moment.
//! - A bound on deliveries: an event may be acted on again at any time after its commit.
//! - Reasons to wait: a reader told to WAIT asks again, looks again, or loads without filling, whenever it likes.
//! - The death of a reader, which is a reader whose lease is gone when its fill arrives, or that does not read again.
//! - A lease that nobody holds any more, because its holder died or gave up before the grant arrived: it makes others
//!   wait, and nothing can be filled under it.
//! - A copy of FILL: the first to arrive has ended the lease or found it ended, and no later one has its name.
//! - RELEASE and its copies: a lease may be evicted at every moment.
//! - Deletes in two steps where the slot of a Cluster is moving, except in the tests that are about them.
//! - How late Postgres notices a dead client, or a subscriber a commit: every step may be arbitrarily late.
//!
//! What it takes for granted: Redis forgets no acknowledged write except by expiry and eviction, marks are never
//! evicted, and no two leases of a token have the same name (`protocol.md` says what that rests on).
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod delivery;
mod differential;
mod key;
mod protocol;
mod reader;
mod scenario;
mod sound;
mod state;
mod system;
mod transactions;
mod weakened;
mod writer;
