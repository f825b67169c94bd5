//! How much memory a process has over time.

use devstack::Process;

/// Samples of its resident memory.
#[derive(Debug, Default)]
pub struct Memory {
    samples: Vec<u64>,
}

impl Memory {
    /// Takes one. A process that has not started yet has none.
    pub fn sample(&mut self, process: &Process) {
        self.samples.extend(process.rss_bytes());
    }

    /// The most it had.
    pub fn max(&self) -> u64 {
        self.samples.iter().copied().max().unwrap_or(0)
    }

    /// How much more it had in the second half than ever in the first.
    pub fn growth(&self) -> u64 {
        let (first, second) = self.samples.split_at(self.samples.len() / 2);
        let max = |samples: &[u64]| samples.iter().copied().max().unwrap_or(0);
        max(second).saturating_sub(max(first))
    }
}
