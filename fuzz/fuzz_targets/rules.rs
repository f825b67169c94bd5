//! Reading a rules file never panics, and every problem names a line of the file.
#![no_main]

use libfuzzer_sys::fuzz_target;
use rules::{Rules, RulesError};

fuzz_target!(|text: &str| {
    if let Err(RulesError::Invalid(problems)) = Rules::parse("rules.toml", text) {
        assert!(!problems.is_empty());
        assert!(problems.iter().all(|problem| problem.line <= text.lines().count().max(1)));
    }
});
