//! What a process wrote.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use super::{POLL_INTERVAL, Process};

/// Enough of a log to see why a server failed.
const LOG_TAIL_LINES: usize = 30;

impl Process {
    /// Where standard output and error go.
    #[must_use]
    pub fn log_path(&self) -> &Path {
        &self.log_path
    }

    /// Everything the process has written, in all its runs.
    #[must_use]
    pub fn log(&self) -> String {
        self.log_from(0).unwrap_or_default()
    }

    /// Waits until a line that contains `text` appears in the log of the current run, and returns that line.
    ///
    /// # Errors
    /// When `deadline` passes first, or the process ends without writing it.
    pub async fn wait_for_log(&self, text: &str, deadline: Duration) -> Result<String> {
        let end = Instant::now() + deadline;
        loop {
            let running = self.is_running();
            let log = self.log_from(self.state().log_start)?;
            if let Some(line) = log.lines().find(|line| line.contains(text)) {
                return Ok(line.to_owned());
            }
            if !running || Instant::now() > end {
                bail!("{} has not logged {text:?} within {deadline:?}\n{}", self.name, self.log_tail());
            }
            tokio::time::sleep(POLL_INTERVAL).await;
        }
    }

    /// The end of the log, for error messages.
    pub(crate) fn log_tail(&self) -> String {
        let log = self.log();
        let lines: Vec<&str> = log.lines().collect();
        let tail = &lines[lines.len().saturating_sub(LOG_TAIL_LINES)..];
        format!("--- end of {} ---\n{}", self.log_path.display(), tail.join("\n"))
    }

    fn log_from(&self, offset: u64) -> Result<String> {
        let mut file = File::open(&self.log_path)?;
        file.seek(SeekFrom::Start(offset))?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }
}
