//! Every name this system uses in Redis.
//!
//! A value lies at exactly the key its user named. Our own names start with the control character U+001F, which no
//! [`event::CacheKey`] may contain, so none of them can ever be a user's key. The siblings of a key lie in its slot, so
//! that one script, or one node of a cluster, sees them together.

use deadpool_redis::redis::{RedisWrite, ToRedisArgs};

use crate::slot::{hash_tag, slot_of, tag_in};

/// First byte of every name that is ours.
const OURS: u8 = 0x1f;

/// What a sibling of a key is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Guard,
    Marks,
    Stale,
}

impl Kind {
    const fn letter(self) -> u8 {
        match self {
            Self::Guard => b'g',
            Self::Marks => b'm',
            Self::Stale => b's',
        }
    }
}

/// The name of a sibling of a key; writes itself into a command without an allocation.
///
/// Three forms, so that the sibling always hashes as its key does and no two keys share a sibling:
///
/// - the key has a hash tag of its own: `<US>g:` + key. The first tag in the name is the key's.
/// - It has none and contains no `}`: `<US>g{` + key + `}`. The whole key is the tag.
/// - It has none but contains a `}` (`a}b`, `{}x`), so it cannot be a tag: `<US>g{` + number + `}` + key, where the
///   number is the smallest that lies in the key's slot. The second `}` tells it from the form before.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sibling<'a> {
    kind: Kind,
    key: &'a str,
}

/// The guard of `key`: the lease of the one caller that may fill it, or the version of its value. Always with a TTL.
pub(crate) fn guard(key: &str) -> Sibling<'_> {
    Sibling { kind: Kind::Guard, key }
}

/// The marks of `key`: the set of transactions about to commit a change to it. Never with a TTL.
pub(crate) fn marks(key: &str) -> Sibling<'_> {
    Sibling { kind: Kind::Marks, key }
}

/// The copy of the value of `key` that outlives its invalidation for readers who asked for that. Always with a TTL.
pub(crate) fn stale(key: &str) -> Sibling<'_> {
    Sibling { kind: Kind::Stale, key }
}

impl Sibling<'_> {
    fn write(&self, out: &mut impl std::io::Write) -> std::io::Result<()> {
        let (key, letter) = (self.key.as_bytes(), self.kind.letter());
        if hash_tag(key).is_some() {
            out.write_all(&[OURS, letter, b':'])?;
            out.write_all(key)
        } else if key.contains(&b'}') {
            out.write_all(&[OURS, letter, b'{'])?;
            write!(out, "{}}}", tag_in(slot_of(key)))?;
            out.write_all(key)
        } else {
            out.write_all(&[OURS, letter, b'{'])?;
            out.write_all(key)?;
            out.write_all(b"}")
        }
    }
}

impl ToRedisArgs for Sibling<'_> {
    fn write_redis_args<W: ?Sized + RedisWrite>(&self, out: &mut W) {
        self.write(&mut out.writer_for_next_arg()).expect("writing into memory never fails");
    }
}

/// The part of the key space whose marks are registered together: a slot of a cluster, or a whole server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Shard {
    Server,
    Slot(u16),
}

impl Shard {
    /// Registry of marks: a sorted set of `<mark>:<key>` by the time of the mark in ms. Never with a TTL.
    pub(crate) fn registry(self) -> String {
        self.name("marks")
    }

    /// Exists once any value has had a stale copy. Never with a TTL.
    pub(crate) fn has_stale_copies(self) -> String {
        self.name("stale")
    }

    fn name(self, what: &str) -> String {
        match self {
            Self::Server => format!("\u{1f}{what}"),
            Self::Slot(slot) => format!("\u{1f}{what}{{{}}}", tag_in(slot)),
        }
    }
}

/// How far a subscriber's durable consumer has come.
pub(crate) fn position(durable: &str) -> String {
    format!("\u{1f}position:{durable}")
}

/// Id under which a subscriber's durable consumer knows this cache. In the slot of the position: a node of a cluster that is
/// down takes away both or none.
pub(crate) fn identity(durable: &str) -> String {
    format!("\u{1f}position:{{{}}}:cache", position(durable))
}

/// Whether a name found by a scan is a user's.
pub(crate) fn is_value(name: &[u8]) -> bool {
    name.first() != Some(&OURS)
}

/// Whether a name found by a scan is a guard or a stale copy: what a flush deletes besides values. Marks, their
/// registry and positions outlive every flush.
pub(crate) fn is_guard_or_stale(name: &[u8]) -> bool {
    matches!(name, [OURS, b'g' | b's', b':' | b'{', ..])
}

/// The keys to which a guard or stale copy may belong, each with something after it or not.
pub(crate) fn possible_keys_of(sibling: &[u8]) -> [&[u8]; 2] {
    let rest = sibling.get(3..).unwrap_or_default();
    let after_number = rest.iter().position(|byte| *byte == b'}').map_or(rest, |at| &rest[at + 1..]);
    [rest, after_number]
}

/// Glob that matches at least the guards and stale copies of all keys that `pattern` matches.
pub(crate) fn guards_and_stale_matching(pattern: &str) -> String {
    format!("\u{1f}[gs][:{{]*{pattern}*")
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    fn name(sibling: Sibling<'_>) -> Vec<u8> {
        sibling.to_redis_args().remove(0)
    }

    /// Keys in which braces are as common as everything else.
    fn any_key() -> impl Strategy<Value = String> {
        prop_oneof![
            "[{}a1:]{1,12}",
            "[{}0-9]{1,8}",
            "\\PC{1,40}",
            proptest::string::string_regex("(\\{[0-9]{1,5}\\})?[{}a]{0,6}k").unwrap(),
        ]
    }

    #[test]
    fn siblings_of_each_form_are_as_documented() {
        assert_eq!(name(guard("user:1")), b"\x1fg{user:1}");
        assert_eq!(name(marks("{tenant}:1")), b"\x1fm:{tenant}:1");
        assert_eq!(name(stale("a}b")), format!("\x1fs{{{}}}a}}b", tag_in(slot_of(b"a}b"))).into_bytes());
        // The naive sibling `{key}…` would give these two the same name.
        assert_ne!(name(guard("foo")), name(guard("{foo}")));
    }

    proptest! {
        #[test]
        fn the_key_of_a_sibling_is_among_its_possible_keys(key in any_key()) {
            for sibling in [guard(&key), stale(&key)] {
                let name = name(sibling);
                prop_assert!(possible_keys_of(&name).iter().any(|rest| rest.starts_with(key.as_bytes())));
            }
        }

        #[test]
        fn a_sibling_lies_in_the_slot_of_its_key(key in any_key()) {
            for sibling in [guard(&key), marks(&key), stale(&key)] {
                prop_assert_eq!(slot_of(&name(sibling)), slot_of(key.as_bytes()));
            }
        }

        #[test]
        fn no_two_keys_share_a_sibling(keys in proptest::collection::hash_set(any_key(), 2..200)) {
            let mut owners = HashMap::new();
            for key in &keys {
                for sibling in [guard(key), marks(key), stale(key)] {
                    let other = owners.insert(name(sibling), key);
                    prop_assert_eq!(other, None);
                }
            }
        }

        #[test]
        fn no_sibling_is_a_possible_key(key in any_key()) {
            for sibling in [guard(&key), marks(&key), stale(&key)] {
                let text = String::from_utf8(name(sibling)).unwrap();
                prop_assert!(event::CacheKey::new(text).is_err());
            }
        }
    }

    #[test]
    fn registries_lie_in_the_slot_they_are_for() {
        for slot in [0, 1, 8_191, 16_383] {
            assert_eq!(slot_of(Shard::Slot(slot).registry().as_bytes()), slot);
            assert_eq!(slot_of(Shard::Slot(slot).has_stale_copies().as_bytes()), slot);
        }
    }
}
