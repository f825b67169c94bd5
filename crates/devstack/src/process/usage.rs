//! What a process costs, from `/proc`.

use anyhow::{Context, Result};

use super::Process;
use crate::process_tree::{descendants, stat_fields};

/// Positions in `/proc/<pid>/stat`, counted from the state, of user and system time of the process and of its reaped
/// children.
const CPU_TIMES: std::ops::RangeInclusive<usize> = 11..=14;

impl Process {
    /// Resident memory of the process itself, in bytes.
    ///
    /// # Errors
    /// When it is not running, or the system has no `/proc`.
    pub fn rss_bytes(&self) -> Result<u64> {
        let path = format!("/proc/{}/statm", self.pid()?);
        let text = std::fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
        let pages: u64 = text.split_whitespace().nth(1).context("statm has two fields")?.parse()?;
        Ok(pages * u64::try_from(rustix::param::page_size())?)
    }

    /// Processor time used so far by the process and everything it started, in seconds.
    ///
    /// # Errors
    /// When it is not running, or the system has no `/proc`.
    pub fn cpu_seconds(&self) -> Result<f64> {
        let root = self.pid()?;
        let own = cpu_ticks(root).context("cannot read the processor time")?;
        // A child that has ended meanwhile counts in its parent next time.
        let ticks = own + descendants(root)?.into_iter().filter_map(cpu_ticks).sum::<u32>();
        let per_second = u32::try_from(rustix::param::clock_ticks_per_second())?;
        Ok(f64::from(ticks) / f64::from(per_second))
    }
}

fn cpu_ticks(process: u32) -> Option<u32> {
    stat_fields(process)?.get(CPU_TIMES)?.iter().map(|field| field.parse::<u32>().ok()).sum()
}
