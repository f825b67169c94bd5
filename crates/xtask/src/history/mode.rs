//! Ways to read and write, and what each promises.

use std::time::Duration;

use clap::ValueEnum;

/// How readers and writers go about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Mode {
    /// Writers mark before they commit; readers use the cache's read path
    Strict,
    /// Writers enqueue, half of them also invalidate after the commit; readers use the cache's read path
    Default,
    /// Plain cache-aside without any of this: GET, SELECT, SET; UPDATE, COMMIT, DEL
    Naive,
    /// Strict writers that forget the mark: to see that the checker notices
    #[value(hide = true)]
    Unmarked,
}

/// What must hold at the end of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Promise {
    /// No read is stale, and none goes backwards.
    Strict,
    /// Stale reads end, and no stale value stays.
    Bounded,
    /// None; a run without stale reads proves that the checker sees nothing.
    None,
}

impl Mode {
    /// As on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Strict => "strict",
            Self::Default => "default",
            Self::Naive => "naive",
            Self::Unmarked => "unmarked",
        }
    }

    /// What it promises, or claims to.
    pub fn promise(self) -> Promise {
        match self {
            Self::Strict | Self::Unmarked => Promise::Strict,
            Self::Default => Promise::Bounded,
            Self::Naive => Promise::None,
        }
    }

    /// Whether the pair takes part.
    pub fn has_pair(self) -> bool {
        self != Self::Naive
    }
}

/// How long a read in default mode may be behind when nothing fails: a thousand times the usual.
const LONGEST_WINDOW: Duration = Duration::from_secs(10);

/// The same with faults: the longest of them, a message delivered again, and a daemon that starts again.
const LONGEST_WINDOW_WITH_FAULTS: Duration = Duration::from_secs(30);

/// How long a read may be behind in a mode whose promise is [`Promise::Bounded`].
pub fn longest_window(with_faults: bool) -> Duration {
    if with_faults { LONGEST_WINDOW_WITH_FAULTS } else { LONGEST_WINDOW }
}
