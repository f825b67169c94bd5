//! What readers and writers put down, in files of fixed-size records.
//!
//! A process that is killed leaves at most one part of a record at the end of its file, and what it had not written yet
//! is missing. Both are fine: a read that is not known is not judged, a commit that is not known forbids nothing.

use std::fs::{File, OpenOptions};
use std::io::{BufReader, BufWriter, Read, Write};
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use anyhow::Context;

/// Length of a record in a file.
const BYTES: usize = 32;

/// What a reader may hold back before it writes: a hundred records.
const BUFFER_BYTES: usize = 100 * BYTES;

/// What happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A read that did not have to load.
    Hit,
    /// A read that loaded.
    Load,
    /// A look at the database past any cache, which tells what is visible before its writer knows.
    Look,
    /// A read that returned nothing, because the database did not answer.
    FailedRead,
    /// A commit that was acknowledged.
    Committed,
    /// A write of which its writer knows that it changed nothing.
    RolledBack,
    /// A write of which its writer does not know what became of it.
    Unknown,
}

const KINDS: [Kind; 7] =
    [Kind::Hit, Kind::Load, Kind::Look, Kind::FailedRead, Kind::Committed, Kind::RolledBack, Kind::Unknown];

/// One read or write of one row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Record {
    /// What happened.
    pub kind: Kind,
    /// To which row.
    pub row: u32,
    /// Its version, as read or as committed; 0 if there is none.
    pub version: u64,
    /// Read before the first thing was asked for.
    pub began_ns: u64,
    /// Read after the last answer had arrived.
    pub ended_ns: u64,
}

impl Record {
    fn to_bytes(self) -> [u8; BYTES] {
        let kind = KINDS.iter().position(|kind| *kind == self.kind).expect("every kind is listed");
        let head = u64::from(self.row) << 32 | kind as u64;
        let mut bytes = [0; BYTES];
        let words = [head, self.version, self.began_ns, self.ended_ns];
        bytes
            .chunks_exact_mut(8)
            .zip(words)
            .for_each(|(place, word)| place.copy_from_slice(&word.to_le_bytes()));
        bytes
    }

    fn from_bytes(bytes: &[u8; BYTES]) -> anyhow::Result<Self> {
        let (words, _) = bytes.as_chunks::<8>();
        let word = |at: usize| u64::from_le_bytes(words[at]);
        let kind = usize::try_from(word(0) & 0xffff_ffff)?;
        Ok(Self {
            kind: *KINDS.get(kind).context("a record of an unknown kind")?,
            row: u32::try_from(word(0) >> 32)?,
            version: word(1),
            began_ns: word(2),
            ended_ns: word(3),
        })
    }
}

/// The file of one process, to be continued by its successor.
#[derive(Debug)]
pub struct Log {
    file: Mutex<BufWriter<File>>,
    before: u64,
}

impl Log {
    /// Opens it, behind the last whole record.
    pub fn open(path: &Path) -> anyhow::Result<Self> {
        let file = OpenOptions::new().create(true).append(true).open(path);
        let file = file.with_context(|| format!("cannot open {}", path.display()))?;
        let before = file.metadata()?.len() / BYTES as u64;
        file.set_len(before * BYTES as u64)?;
        Ok(Self { file: Mutex::new(BufWriter::with_capacity(BUFFER_BYTES, file)), before })
    }

    /// How many records there were when it was opened.
    pub fn records_before(&self) -> u64 {
        self.before
    }

    /// Adds records; they may be held back for a while.
    pub fn add(&self, records: &[Record]) -> anyhow::Result<()> {
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        records.iter().try_for_each(|record| file.write_all(&record.to_bytes()))?;
        Ok(())
    }

    /// Writes what was held back.
    pub fn flush(&self) -> anyhow::Result<()> {
        Ok(self.file.lock().unwrap_or_else(PoisonError::into_inner).flush()?)
    }
}

/// Calls `each` with every whole record of a file.
pub fn read(path: &Path, mut each: impl FnMut(Record)) -> anyhow::Result<()> {
    let file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    let whole = file.metadata()?.len() / BYTES as u64;
    let mut file = BufReader::new(file);
    let mut bytes = [0; BYTES];
    for _ in 0..whole {
        file.read_exact(&mut bytes)?;
        each(Record::from_bytes(&bytes)?);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(kind: Kind, row: u32) -> Record {
        Record { kind, row, version: u64::MAX, began_ns: 1, ended_ns: 1 << 40 }
    }

    #[test]
    fn a_part_of_a_record_is_dropped_and_the_file_goes_on_behind_it() {
        let directory = devstack::StackDirectory::create().unwrap();
        let path = directory.path().join("records");
        let written: Vec<Record> = KINDS.iter().zip(0..).map(|(kind, row)| record(*kind, row)).collect();
        let log = Log::open(&path).unwrap();
        log.add(&written).unwrap();
        log.flush().unwrap();
        OpenOptions::new().append(true).open(&path).unwrap().write_all(&[7; BYTES - 1]).unwrap();

        let all = || {
            let mut found = Vec::new();
            read(&path, |record| found.push(record)).unwrap();
            found
        };
        assert_eq!(all(), written);
        let log = Log::open(&path).unwrap();
        assert_eq!(log.records_before(), KINDS.len() as u64);
        log.add(&[record(Kind::Load, 9)]).unwrap();
        drop(log);
        assert_eq!(all().last(), Some(&record(Kind::Load, 9)));
        assert_eq!(all().len(), KINDS.len() + 1);
    }
}
