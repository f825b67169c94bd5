//! Which of the 16,384 slots of a Redis Cluster a name belongs to.
//!
//! Source: <https://redis.io/docs/latest/operate/oss_and_stack/reference/cluster-spec/> (CRC16 is the XMODEM variant).

use std::sync::OnceLock;

/// Number of slots of every Redis Cluster.
pub(crate) const SLOTS: usize = 16_384;

/// The slot of `name`, by its hash tag if it has one.
pub(crate) fn slot_of(name: &[u8]) -> u16 {
    let hashed = hash_tag(name).unwrap_or(name);
    crc16(hashed) % 16_384
}

/// The part of `name` that alone decides the slot: between the first `{` and the first `}` after it, if not empty.
pub(crate) fn hash_tag(name: &[u8]) -> Option<&[u8]> {
    let open = name.iter().position(|&byte| byte == b'{')?;
    let length = name[open + 1..].iter().position(|&byte| byte == b'}')?;
    (length > 0).then(|| &name[open + 1..open + 1 + length])
}

/// A short text without braces that lies in `slot`: the smallest decimal number that does.
pub(crate) fn tag_in(slot: u16) -> u32 {
    static TAGS: OnceLock<Vec<u32>> = OnceLock::new();
    TAGS.get_or_init(smallest_numbers)[usize::from(slot)]
}

fn smallest_numbers() -> Vec<u32> {
    let mut tags = vec![u32::MAX; SLOTS];
    let mut missing = SLOTS;
    let mut number = 0_u32;
    while missing > 0 {
        let slot = usize::from(slot_of(number.to_string().as_bytes()));
        if tags[slot] == u32::MAX {
            tags[slot] = number;
            missing -= 1;
        }
        number += 1;
    }
    tags
}

fn crc16(bytes: &[u8]) -> u16 {
    bytes.iter().fold(0, |crc, &byte| (crc << 8) ^ CRC16[usize::from((crc >> 8) ^ u16::from(byte))])
}

const CRC16: [u16; 256] = crc16_table();

const fn crc16_table() -> [u16; 256] {
    let mut table = [0; 256];
    let mut byte = 0_u16;
    while byte < 256 {
        let mut crc = byte << 8;
        let mut bit = 0;
        while bit < 8 {
            crc = if crc & 0x8000 == 0 { crc << 1 } else { (crc << 1) ^ 0x1021 };
            bit += 1;
        }
        table[byte as usize] = crc;
        byte += 1;
    }
    table
}

#[cfg(test)]
mod tests {
    use deadpool_redis::redis::cluster_routing::{Route, SlotAddr};

    use super::*;

    #[test]
    fn slots_are_those_of_the_cluster_specification() {
        assert_eq!(crc16(b"123456789"), 0x31C3);
        // As `CLUSTER KEYSLOT` of Redis 7.0 answers.
        for (name, slot) in [("foo", 12182), ("{}x", 10595), ("a}b", 7866), ("", 0)] {
            assert_eq!(slot_of(name.as_bytes()), slot, "{name}");
        }
        assert_eq!(slot_of(b"{user1000}.following"), slot_of(b"user1000"));
        assert_eq!(slot_of(b"foo{{bar}}zap"), slot_of(b"{bar"));
        assert_eq!(slot_of(b"foo{bar}{zap}"), slot_of(b"bar"));
    }

    proptest::proptest! {
        #[test]
        fn slots_are_those_the_cluster_client_routes_by(name in "[{}a-c]{0,12}|\\PC{0,30}") {
            let ours = Route::new(slot_of(name.as_bytes()), SlotAddr::Master);
            proptest::prop_assert_eq!(ours, Route::with_key(&name, SlotAddr::Master));
        }
    }

    #[test]
    fn every_slot_has_a_short_tag() {
        for slot in 0..16_384 {
            let tag = tag_in(slot).to_string();
            assert_eq!(slot_of(tag.as_bytes()), slot);
            assert!(tag.len() <= 6);
        }
    }
}
