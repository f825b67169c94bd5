use hashbrown::HashTable;
use xxhash_rust::xxh3::xxh3_64;

/// Bytes that are reserved at once. A set that grows by doubling would need half as much again at its worst moment.
const CHUNK_BYTES: usize = 64 * 1024;

/// Bytes that precede a key: its length.
const LENGTH_BYTES: usize = 2;

/// A set of short texts that takes little more memory than the texts: one arena, and four bytes a text in the table.
#[derive(Debug, Default)]
pub struct KeySet {
    chunks: Vec<Vec<u8>>,
    /// Places of the keys: number of the chunk in the upper half, offset in the lower.
    places: HashTable<u32>,
}

impl KeySet {
    /// Adds a key and says whether it is new. A key longer than 65,535 bytes is cut: it is far beyond what an event
    /// accepts, and is refused there.
    pub fn insert(&mut self, key: &str) -> bool {
        let key = &key.as_bytes()[..key.len().min(usize::from(u16::MAX) - LENGTH_BYTES)];
        let hash = xxh3_64(key);
        if self.places.find(hash, |&place| read(&self.chunks, place) == key).is_some() {
            return false;
        }
        let place = self.append(key);
        let chunks = &self.chunks;
        self.places.insert_unique(hash, place, |&place| xxh3_64(read(chunks, place)));
        true
    }

    fn append(&mut self, key: &[u8]) -> u32 {
        let needed = LENGTH_BYTES + key.len();
        if self.chunks.last().is_none_or(|chunk| chunk.len() + needed > CHUNK_BYTES) {
            // A transaction with one key must not reserve a whole chunk.
            let first = self.chunks.is_empty();
            self.chunks.push(if first { Vec::new() } else { Vec::with_capacity(CHUNK_BYTES) });
        }
        let number = self.chunks.len() - 1;
        let chunk = &mut self.chunks[number];
        let offset = chunk.len();
        let length = u16::try_from(key.len()).expect("cut to fit");
        chunk.extend(length.to_le_bytes());
        chunk.extend(key);
        let place = number * CHUNK_BYTES + offset;
        u32::try_from(place).expect("the limit on kept keys is far below 4 GiB")
    }

    /// How many keys there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.places.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.places.is_empty()
    }

    /// Memory it takes, in bytes, about.
    #[must_use]
    pub fn bytes(&self) -> usize {
        let chunks: usize = match self.chunks.as_slice() {
            [only] => only.capacity(),
            many => many.len() * CHUNK_BYTES,
        };
        chunks + self.places.capacity() * (size_of::<u32>() + 1)
    }

    /// Gives the keys back, in the order in which they were added, and frees memory on the way.
    pub fn into_keys(self) -> impl Iterator<Item = String> {
        drop(self.places);
        self.chunks.into_iter().flat_map(|chunk| {
            let mut offset = 0;
            std::iter::from_fn(move || {
                let key = (offset < chunk.len()).then(|| text(at(&chunk, offset)))?;
                offset += LENGTH_BYTES + key.len();
                Some(key)
            })
        })
    }
}

fn read(chunks: &[Vec<u8>], place: u32) -> &[u8] {
    let place = place as usize;
    at(&chunks[place / CHUNK_BYTES], place % CHUNK_BYTES)
}

fn at(chunk: &[u8], offset: usize) -> &[u8] {
    let begin = offset + LENGTH_BYTES;
    let length = u16::from_le_bytes([chunk[offset], chunk[offset + 1]]);
    &chunk[begin..begin + usize::from(length)]
}

fn text(key: &[u8]) -> String {
    String::from_utf8_lossy(key).into_owned()
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn it_behaves_like_a_set(keys in proptest::collection::vec("[a-c]{0,3}|x{1000,1020}", 0..400)) {
            let mut set = KeySet::default();
            let mut model = HashSet::new();
            for key in &keys {
                prop_assert_eq!(set.insert(key), model.insert(key.clone()));
            }
            prop_assert_eq!(set.len(), model.len());
            prop_assert_eq!(set.into_keys().collect::<HashSet<_>>(), model);
        }
    }

    #[test]
    fn many_keys_take_little_more_than_their_bytes() {
        let mut set = KeySet::default();
        let mut bytes = 0;
        for number in 0..200_000 {
            let key = format!("user:{number}:profile");
            bytes += key.len();
            set.insert(&key);
        }
        assert!(set.bytes() < bytes + 14 * 200_000, "{} for {bytes}", set.bytes());
    }
}
