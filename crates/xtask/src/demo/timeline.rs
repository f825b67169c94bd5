//! What the audience reads.

use std::time::{Duration, Instant, SystemTime};

use anyhow::ensure;

use crate::paint::Paint;

/// Width of the column with times.
const TIME_WIDTH: usize = 12;

/// Width of the column that says what happens.
const WHAT_WIDTH: usize = 10;

/// Prints scenes and counts the checks.
#[derive(Debug)]
pub struct Timeline {
    paint: Paint,
    scenes: u32,
    checks: u32,
}

/// The moment from which a scene's times count, on both clocks.
#[derive(Debug, Clone, Copy)]
pub struct Zero {
    instant: Instant,
    wall: SystemTime,
}

impl Zero {
    /// This moment.
    pub fn now() -> Self {
        Self { instant: Instant::now(), wall: SystemTime::now() }
    }

    /// Milliseconds from zero to a moment, negative before it.
    pub fn until(self, at: Instant) -> f64 {
        let after = at.saturating_duration_since(self.instant).as_secs_f64();
        let before = self.instant.saturating_duration_since(at).as_secs_f64();
        (after - before) * 1e3
    }

    /// The same for a moment on the clock of a server on this machine.
    pub fn until_wall(self, at: SystemTime) -> f64 {
        match at.duration_since(self.wall) {
            Ok(after) => after.as_secs_f64() * 1e3,
            Err(error) => -error.duration().as_secs_f64() * 1e3,
        }
    }

    /// Milliseconds from zero to now.
    pub fn elapsed(self) -> f64 {
        self.until(Instant::now())
    }
}

impl Timeline {
    /// On standard output.
    pub fn new() -> Self {
        Self { paint: Paint::for_stdout(), scenes: 0, checks: 0 }
    }

    /// The headline.
    pub fn title(&self, versions: &str) {
        println!("\n{}  {}", self.paint.bold("Cache invalidation, live"), self.paint.dim(versions));
    }

    /// One line about the preparations.
    pub fn setup(&self, what: &str, text: &str) {
        println!("{:TIME_WIDTH$}{}{text}", "", self.paint.dim(format!("{what:WHAT_WIDTH$}")));
    }

    /// Starts a scene.
    pub fn scene(&mut self, title: &str) {
        self.scenes += 1;
        println!("\n{}  {}", self.paint.cyan(self.scenes.to_string()), self.paint.bold(title));
    }

    /// Something that happened, so many milliseconds after the scene's zero.
    pub fn step(&self, ms: f64, what: &str, text: &str) {
        let time = format!("{:>width$}  ", offset(ms), width = TIME_WIDTH - 2);
        println!("{}{}{text}", self.paint.dim(time), self.paint.cyan(format!("{what:WHAT_WIDTH$}")));
    }

    /// The same for trouble.
    pub fn trouble(&self, ms: f64, what: &str, text: &str) {
        let time = format!("{:>width$}  ", offset(ms), width = TIME_WIDTH - 2);
        println!("{}{}{text}", self.paint.dim(time), self.paint.red(format!("{what:WHAT_WIDTH$}")));
    }

    /// A promise, kept or broken.
    ///
    /// # Errors
    /// If it is broken.
    pub fn check(&mut self, holds: bool, promise: &str) -> anyhow::Result<()> {
        let mark = if holds { self.paint.green("✔") } else { self.paint.red("✘") };
        println!("{:indent$}{mark} {promise}", "", indent = TIME_WIDTH);
        self.checks += u32::from(holds);
        ensure!(holds, "this does not hold: {promise}");
        Ok(())
    }

    /// The last line.
    pub fn summary(&self, took: Duration) {
        let verdict = format!("{} checks passed", self.checks);
        let scenes = format!("in {} scenes, {:.1} s", self.scenes, took.as_secs_f64());
        println!("\n{} {}  {}", self.paint.green("✔"), self.paint.bold(verdict), self.paint.dim(scenes));
    }
}

fn offset(ms: f64) -> String {
    match ms {
        // The moment itself, or so close that a sign would be noise.
        ms if ms.abs() < 0.005 => "0".to_owned(),
        ms if ms.abs() < 10.0 => format!("{ms:+.2} ms"),
        ms if ms.abs() < 1000.0 => format!("{ms:+.0} ms"),
        ms => format!("{:+.2} s", ms / 1e3),
    }
}

/// Milliseconds as a person says them.
pub fn spoken(ms: f64) -> String {
    if ms < 100.0 { format!("{ms:.1} ms") } else { format!("{:.2} s", ms / 1e3) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_short_and_signed() {
        let texts = [0.001, -0.5, 2.345, 54.3, 2_012.0].map(offset);
        assert_eq!(texts, ["0", "-0.50 ms", "+2.35 ms", "+54 ms", "+2.01 s"]);
    }
}
