//! The Redis side: what one key and its siblings hold, and each atomic step on them.
//!
//! Every function is one script or one command of the real thing and nothing here knows the model checker, so that the
//! same functions can be compared with a real server.

use crate::protocol::{Deletes, Protocol};
use crate::transactions::Transactions;

/// A lease.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Lease {
    /// The token of its reader.
    pub token: u8,
    /// What tells it from earlier leases of that token.
    pub nth: u8,
}

/// The guard of a key.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Guard {
    /// Nothing: no load in flight may be stored, and the value's version, if there is a value, is unknown.
    #[default]
    Absent,
    /// Whoever has this lease may fill.
    Lease(Lease),
    /// The value was loaded or updated at this version.
    Version(u8),
}

/// A key with its siblings.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KeyState {
    pub value: Option<Transactions>,
    pub guard: Guard,
    pub marks: Transactions,
}

/// Answer of ACQUIRE.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Acquired {
    Grant(Lease),
    Wait,
    Bypass,
    Value(Transactions),
}

/// Answer of APPLY.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Updated {
    Replaced,
    Ignored,
    Deleted,
}

impl KeyState {
    /// `acquire.lua`. `unusable` says that the value present, if any, is to be replaced; `nth` is what the server has to
    /// tell a new lease from earlier ones.
    pub fn acquire(&mut self, protocol: &Protocol, token: u8, nth: u8, unusable: bool) -> Acquired {
        if protocol.acquire_respects_marks && !self.marks.is_empty() {
            return Acquired::Bypass;
        }
        if let (Some(value), false) = (self.value, unusable) {
            return Acquired::Value(value);
        }
        match self.guard {
            Guard::Lease(lease) if lease.token == token => Acquired::Grant(lease),
            Guard::Lease(_) => Acquired::Wait,
            Guard::Absent | Guard::Version(_) => {
                let lease = Lease { token, nth: if protocol.server_names_leases { nth } else { 0 } };
                self.guard = Guard::Lease(lease);
                Acquired::Grant(lease)
            }
        }
    }

    /// `fill.lua`. Returns whether the value was stored.
    pub fn fill(
        &mut self,
        protocol: &Protocol,
        lease: Lease,
        value: Transactions,
        version: Option<u8>,
    ) -> bool {
        if protocol.fill_checks_lease && self.guard != Guard::Lease(lease) {
            return false;
        }
        self.value = Some(value);
        self.guard = version.map_or(Guard::Absent, Guard::Version);
        true
    }

    /// `release.lua`.
    pub fn release(&mut self, token: u8) {
        if matches!(self.guard, Guard::Lease(lease) if lease.token == token) {
            self.guard = Guard::Absent;
        }
    }

    /// INVALIDATE: `UNLINK` of guard and value.
    pub fn invalidate(&mut self, protocol: &Protocol) {
        self.delete(protocol.delete_voids_lease);
        if !protocol.delete_spares_marks {
            self.marks = Transactions::NONE;
        }
    }

    /// The first half of a delete in a moving slot, which is also what an update does there.
    pub fn delete_first(&mut self, deletes: Deletes) {
        match deletes {
            Deletes::ValueFirst => self.value = None,
            Deletes::AtOnce | Deletes::GuardFirst => self.guard = Guard::Absent,
        }
    }

    /// The second half.
    pub fn delete_second(&mut self, deletes: Deletes) {
        match deletes {
            Deletes::ValueFirst => self.guard = Guard::Absent,
            Deletes::AtOnce | Deletes::GuardFirst => self.value = None,
        }
    }

    /// `apply.lua`.
    pub fn apply_update(&mut self, protocol: &Protocol, value: Transactions, version: u8) -> Updated {
        let known = match self.guard {
            Guard::Version(known) if self.value.is_some() => Some(known),
            _ => None,
        };
        match known {
            _ if !self.marks.is_empty() => {}
            Some(known) if known >= version => return Updated::Ignored,
            None if protocol.update_needs_known_version => {}
            _ => {
                self.value = Some(value);
                self.guard = Guard::Version(version);
                return Updated::Replaced;
            }
        }
        self.delete(protocol.delete_voids_lease);
        Updated::Deleted
    }

    /// MARK, part 1: `SADD`.
    pub fn mark_add(&mut self, transaction: u8) {
        self.marks = self.marks.with(transaction);
    }

    /// MARK, part 2: `UNLINK` of guard and value.
    pub fn mark_unlink(&mut self, protocol: &Protocol) {
        self.delete(protocol.mark_voids_lease);
    }

    /// UNMARK, part 1: `UNLINK` of guard and value.
    pub fn unmark_unlink(&mut self, protocol: &Protocol) {
        if protocol.unmark_deletes {
            self.delete(true);
        }
    }

    /// UNMARK, part 2: `SREM`.
    pub fn unmark_remove(&mut self, transaction: u8) {
        self.marks = self.marks.without(transaction);
    }

    /// The value expires or is evicted.
    pub fn lose_value(&mut self) {
        self.value = None;
    }

    /// The lease or the version expires or is evicted.
    pub fn lose_guard(&mut self) {
        self.guard = Guard::Absent;
    }

    fn delete(&mut self, lease_too: bool) {
        self.value = None;
        if lease_too || !matches!(self.guard, Guard::Lease(_)) {
            self.guard = Guard::Absent;
        }
    }
}
