//! The rules of the protocol, each of which can be broken.

/// How a delete is carried out where the names of a key may be at two nodes, because its slot is moving.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Deletes {
    /// They are not: guard and value go together.
    AtOnce,
    /// Together or in two steps, the guard first.
    GuardFirst,
    /// Together or in two steps, the value first.
    ValueFirst,
}

/// Every rule that the argument for the promises rests on. The sound protocol keeps all of them; a weakened variant is
/// `Protocol { some_rule: false, ..Protocol::SOUND }`, so both are the same code.
#[derive(Clone, Copy, Debug)]
pub struct Protocol {
    /// Strict writers announce their commit.
    pub strict_writers_mark: bool,
    /// MARK adds the mark first and deletes value and lease second.
    pub mark_is_added_before_delete: bool,
    /// MARK deletes the lease in flight, not only the value.
    pub mark_voids_lease: bool,
    /// Marks have no TTL and are never evicted.
    pub marks_last: bool,
    /// A mark names the history of its transaction and itself. A transaction id alone is also that of another database's
    /// transaction, and of a later one after a crash or a failover.
    pub marks_are_told_apart: bool,
    /// The writer removes its mark only after Postgres has told it how the transaction ended.
    pub unmark_waits_for_outcome: bool,
    /// UNMARK deletes value and lease before it removes the mark.
    pub unmark_deletes: bool,
    /// Whoever resolves a forgotten mark waits until new snapshots show the commit. The commit log, or a
    /// `pg_xact_status` that asks it first, says `committed` earlier.
    pub resolver_waits_for_visibility: bool,

    /// Every committed event reaches the cache in the end.
    pub events_are_delivered: bool,
    /// Events are acted on only when their transaction is visible to new snapshots, not as soon as it is in the log.
    pub events_wait_for_visibility: bool,
    /// Whether a delete may be interrupted, and after which half. That of UNMARK is needed for nothing here.
    pub deletes: Deletes,
    /// INVALIDATE deletes the lease in flight, not only the value.
    pub delete_voids_lease: bool,
    /// INVALIDATE leaves the marks of other transactions alone.
    pub delete_spares_marks: bool,
    /// APPLY replaces a value only if it knows that value's version.
    pub update_needs_known_version: bool,
    /// A version is taken while the row's lock is held.
    pub version_is_taken_under_lock: bool,

    /// ACQUIRE grants nothing while there is a mark.
    pub acquire_respects_marks: bool,
    /// The server names a lease when it grants it, never twice alike. If the token of the request alone were the name, a
    /// copy of the request, delayed on the way, could bring a dead lease back to life.
    pub server_names_leases: bool,
    /// FILL stores nothing unless the lease is still there.
    pub fill_checks_lease: bool,
    /// A load runs in a snapshot taken after the lease was granted.
    pub snapshot_follows_grant: bool,
    /// A load reads the primary, not a replica that lags behind.
    pub loads_read_primary: bool,
    /// A reader that joined a load after it had begun takes the value only if its fill was accepted.
    pub late_joiner_needs_fill: bool,

    /// The writer itself deletes the key before it commits. No part of the protocol; classic advice does it.
    pub writer_deletes_before_commit: bool,
    /// The writer itself deletes the key after it has committed. Default-mode writers may, and then it changes nothing
    /// that an eviction could not; classic advice has nothing else.
    pub writer_deletes_after_commit: bool,
}

impl Protocol {
    /// The protocol as it is.
    pub const SOUND: Self = Self {
        strict_writers_mark: true,
        mark_is_added_before_delete: true,
        mark_voids_lease: true,
        marks_last: true,
        marks_are_told_apart: true,
        unmark_waits_for_outcome: true,
        unmark_deletes: true,
        resolver_waits_for_visibility: true,
        events_are_delivered: true,
        events_wait_for_visibility: true,
        deletes: Deletes::AtOnce,
        delete_voids_lease: true,
        delete_spares_marks: true,
        update_needs_known_version: true,
        version_is_taken_under_lock: true,
        acquire_respects_marks: true,
        server_names_leases: true,
        fill_checks_lease: true,
        snapshot_follows_grant: true,
        loads_read_primary: true,
        late_joiner_needs_fill: true,
        writer_deletes_before_commit: false,
        writer_deletes_after_commit: false,
    };

    /// What an application does that has a cache and no protocol: load and set after a miss, delete after a commit.
    pub const CACHE_ASIDE: Self = Self {
        strict_writers_mark: false,
        events_are_delivered: false,
        fill_checks_lease: false,
        writer_deletes_after_commit: true,
        ..Self::SOUND
    };
}
