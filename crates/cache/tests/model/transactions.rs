//! Sets of transactions, the model's only kind of data.

use std::fmt;

/// A set of up to eight transactions, each named by the index of its writer.
///
/// It also stands for a cached or loaded value: the value of a key is determined by the committed changes in it, so it
/// is the set of the transactions that were visible to the snapshot it was loaded in. A value is older than a commit
/// exactly when it lacks it.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Transactions(u8);

impl Transactions {
    pub const NONE: Self = Self(0);

    pub const fn from_bits(bits: u8) -> Self {
        Self(bits)
    }

    pub const fn bits(self) -> u8 {
        self.0
    }

    pub const fn with(self, transaction: u8) -> Self {
        Self(self.0 | 1 << transaction)
    }

    pub const fn without(self, transaction: u8) -> Self {
        Self(self.0 & !(1 << transaction))
    }

    pub const fn contains(self, transaction: u8) -> bool {
        self.0 & 1 << transaction != 0
    }

    pub const fn contains_all(self, others: Self) -> bool {
        others.0 & !self.0 == 0
    }

    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    pub const fn and(self, others: Self) -> Self {
        Self(self.0 & others.0)
    }

    /// The same set after two writers have exchanged their names.
    pub const fn renamed(self, one: u8, other: u8) -> Self {
        let differ = (self.0 >> one ^ self.0 >> other) & 1;
        Self(self.0 ^ (differ << one | differ << other))
    }
}

impl fmt::Debug for Transactions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries((0..8).filter(|&transaction| self.contains(transaction))).finish()
    }
}
