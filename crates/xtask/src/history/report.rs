//! What is said at the end.

use super::checker::{Offence, Tally};
use super::faults::{Faults, Journal};
use super::field::Setup;
use super::mode::{Promise, longest_window};
use super::record::Kind;
use super::settle::Rest;
use crate::bench::numbers::{grouped, ratio};
use crate::paint::Paint;

/// Width of the column that says what a line is about.
const WHAT_WIDTH: usize = 14;

/// Everything a run has found.
#[derive(Debug)]
pub struct Report {
    pub setup: Setup,
    pub seconds: u64,
    pub faults: Faults,
    pub journal: Journal,
    pub tally: Tally,
    pub rest: Rest,
    /// Origin of the times that are shown.
    pub started_ns: u64,
}

impl Report {
    /// What is wrong, if anything.
    pub fn broken(&self) -> Vec<String> {
        let Tally { stale, backwards, invented, .. } = self.tally;
        let mut broken = Vec::new();
        let mut holds = |holds: bool, what: String| {
            if !holds {
                broken.push(what);
            }
        };
        holds(
            self.tally.reads() > 0 && self.tally.commits > 0,
            "nothing was read, or nothing written".to_owned(),
        );
        match self.setup.mode.promise() {
            Promise::Strict => {
                holds(stale == 0, format!("{} stale reads", grouped(stale)));
                holds(backwards == 0, format!("{} reads went backwards", grouped(backwards)));
            }
            Promise::Bounded => {
                let longest = longest_window(!self.faults.0.is_empty());
                let window = self.tally.windows.max();
                let text = format!(
                    "a read was stale {window:.0} ms after the commit, which is longer than {longest:?}"
                );
                holds(window <= longest.as_secs_f64() * 1e3, text);
            }
            Promise::None => {
                holds(stale > 0, "no stale reads in naive mode: the checker sees nothing".to_owned());
                return broken;
            }
        }
        let stuck = self.rest.stuck.len();
        holds(stuck == 0, format!("{stuck} stale values stay in the cache"));
        holds(invented == 0, format!("{invented} reads of versions that were never committed"));
        broken
    }

    /// Prints everything.
    pub fn print(&self) {
        let paint = Paint::for_stdout();
        let tally = &self.tally;
        let line = |what: &str, text: &str| println!("  {}{text}", paint.dim(format!("{what:WHAT_WIDTH$}")));
        let heading = format!("{} for {} s, seed {}", self.setup.mode.name(), self.seconds, self.setup.seed);
        println!("\n{}  {}", paint.bold(heading), paint.dim(format!("faults: {}", self.faults)));
        let hit_rate = ratio(tally.hits, tally.reads().max(1)) * 100.0;
        line("reads", &format!("{}, hits {hit_rate:.1} %", grouped(tally.reads())));
        let writes = format!(
            "{} commits acknowledged, {} writes of unknown outcome, {} rolled back",
            grouped(tally.commits),
            grouped(tally.unknown),
            grouped(tally.rolled_back)
        );
        line("writes", &writes);
        if tally.failed_reads > 0 {
            line("failed reads", &format!("{}, as Postgres did not answer", grouped(tally.failed_reads)));
        }
        let faults: Vec<String> =
            self.journal.counts().iter().map(|(fault, count)| format!("{} {count}", fault.name())).collect();
        if !faults.is_empty() {
            line("faults", &faults.join(", "));
        }
        line("stale reads", &grouped(tally.stale));
        if tally.windows.count() > 0 {
            line("stale window", &tally.windows.long());
        }
        let looks = format!(
            "{} older than what a read or one of {} looks at the database had returned before",
            grouped(tally.backwards),
            grouped(tally.looks)
        );
        line("backwards", &looks);
        let Rest { cached, stuck, versions } = &self.rest;
        line("in the end", &format!("{cached} of {} rows cached, {} stuck", versions.len(), stuck.len()));
        self.print_verdict(paint);
    }

    fn print_verdict(&self, paint: Paint) {
        let broken = self.broken();
        let is_naive = self.setup.mode.promise() == Promise::None;
        if broken.is_empty() {
            let verdict = match self.setup.mode.promise() {
                Promise::Strict => "no read was stale, none went backwards, no stale value stays",
                Promise::Bounded => "stale reads ended in time, no stale value stays",
                Promise::None => "stale reads are what this mode gives, and the checker sees them",
            };
            println!("  {} {verdict}", paint.green("✔"));
        }
        for what in &broken {
            println!("  {} {what}", paint.red("✘"));
        }
        if broken.is_empty() || is_naive {
            return;
        }
        for offence in &self.tally.offences {
            println!("    {}", self.in_full(offence));
        }
        for stuck in &self.rest.stuck {
            println!(
                "    row {}: the cache has version {}, the database {}",
                stuck.row, stuck.cached, stuck.version
            );
        }
    }

    fn in_full(&self, offence: &Offence) -> String {
        let Offence { read, known, newer_since_ns, from_a_read } = offence;
        let at =
            |moment_ns: u64| format!("{:.3} ms", ratio(moment_ns.saturating_sub(self.started_ns), 1_000_000));
        let how = if read.kind == Kind::Hit { "from the cache" } else { "loaded" };
        let who = if *from_a_read {
            "another read or a look at the database had returned"
        } else {
            "a commit had acknowledged"
        };
        let active = self.journal.during(*newer_since_ns, read.ended_ns);
        let active = if active.is_empty() { "no fault".to_owned() } else { active.join(", ") };
        format!(
            "row {}: the read from {} to {} got version {} {how}; {who} a newer one at {} ({known} before the read); {active}",
            read.row,
            at(read.began_ns),
            at(read.ended_ns),
            read.version,
            at(*newer_since_ns),
        )
    }

    /// The figures for programs.
    pub fn summary(&self) -> serde_json::Value {
        let tally = &self.tally;
        let faults: serde_json::Map<String, serde_json::Value> =
            self.journal.counts().iter().map(|(fault, count)| (fault.name(), (*count).into())).collect();
        serde_json::json!({
            "mode": self.setup.mode.name(), "seed": self.setup.seed, "faults": faults,
            "reads": tally.reads(), "hits": tally.hits, "commits": tally.commits,
            "stale": tally.stale, "backwards": tally.backwards, "invented": tally.invented,
            "cached": self.rest.cached, "stuck": self.rest.stuck.len(), "broken": self.broken(),
        })
    }
}
