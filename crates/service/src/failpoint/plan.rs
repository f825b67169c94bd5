//! Reading the `FAILPOINTS` variable.

use std::{collections::HashMap, time::Duration};

use crate::parse_duration;

/// What to do at one failpoint, and when.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Plan {
    pub(super) action: Action,
    /// The only hit that counts, from 1; `None` for every hit.
    pub(super) at_hit: Option<u64>,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) enum Action {
    Kill,
    Sleep(Duration),
    Pause,
}

/// Why the `FAILPOINTS` variable cannot be obeyed.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum FailpointError {
    /// An entry is not of the form `name=action`.
    #[error("FAILPOINTS: {entry:?} is not of the form name=action or name=action@N")]
    NotAnEntry {
        /// The entry as written.
        entry: String,
    },
    /// No failpoint of this program has the name.
    #[error("FAILPOINTS: this program has no failpoint {name:?}; it has {known}")]
    UnknownName {
        /// The name as written.
        name: String,
        /// The names there are.
        known: String,
    },
    /// The name occurs twice.
    #[error("FAILPOINTS: {name} is armed twice")]
    Twice {
        /// The repeated name.
        name: String,
    },
    /// The action is not one of those there are.
    #[error("FAILPOINTS: {action:?} is not an action; use kill, pause or sleep(500ms)")]
    UnknownAction {
        /// The action as written.
        action: String,
    },
    /// What follows `@` is not a positive number.
    #[error("FAILPOINTS: {count:?} after @ is not the number of a hit, counted from 1")]
    BadCount {
        /// The number as written.
        count: String,
    },
}

/// Reads a list of entries separated by `;`; empty entries are ignored.
pub(super) fn parse(text: &str, known: &[&str]) -> Result<HashMap<String, Plan>, FailpointError> {
    let mut plans = HashMap::new();
    for entry in text.split(';').map(str::trim).filter(|entry| !entry.is_empty()) {
        let (name, rest) =
            entry.split_once('=').ok_or_else(|| FailpointError::NotAnEntry { entry: entry.to_owned() })?;
        let name = name.trim().to_owned();
        if !known.contains(&name.as_str()) {
            let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
            return Err(FailpointError::UnknownName { name, known });
        }
        let plan = parse_plan(rest)?;
        if plans.insert(name.clone(), plan).is_some() {
            return Err(FailpointError::Twice { name });
        }
    }
    Ok(plans)
}

fn parse_plan(text: &str) -> Result<Plan, FailpointError> {
    let (action, count) = match text.rsplit_once('@') {
        Some((action, count)) => (action, Some(count.trim())),
        None => (text, None),
    };
    let at_hit = count.map(parse_count).transpose()?;
    Ok(Plan { action: parse_action(action.trim())?, at_hit })
}

fn parse_count(text: &str) -> Result<u64, FailpointError> {
    let count = text.parse().ok().filter(|&count| count > 0);
    count.ok_or_else(|| FailpointError::BadCount { count: text.to_owned() })
}

fn parse_action(text: &str) -> Result<Action, FailpointError> {
    let sleep = text.strip_prefix("sleep(").and_then(|rest| rest.strip_suffix(')'));
    let action = match (text, sleep) {
        ("kill", _) => Some(Action::Kill),
        ("pause", _) => Some(Action::Pause),
        (_, Some(duration)) => parse_duration(duration).ok().map(Action::Sleep),
        _ => None,
    };
    action.ok_or_else(|| FailpointError::UnknownAction { action: text.to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    const KNOWN: &[&str] = &["relay.after_claim", "relay.after_publish"];

    #[test]
    fn entries_with_actions_and_hit_numbers_are_read() {
        let plans = parse(" relay.after_claim=sleep(500ms) ; relay.after_publish = kill@3;", KNOWN).unwrap();
        assert_eq!(
            plans["relay.after_claim"],
            Plan { action: Action::Sleep(Duration::from_millis(500)), at_hit: None }
        );
        assert_eq!(plans["relay.after_publish"], Plan { action: Action::Kill, at_hit: Some(3) });
        let paused = parse("relay.after_claim=pause", KNOWN).unwrap();
        assert_eq!(paused["relay.after_claim"], Plan { action: Action::Pause, at_hit: None });
        assert!(parse("", KNOWN).unwrap().is_empty());
    }

    #[test]
    fn every_mistake_is_refused_with_the_part_that_is_wrong() {
        for (text, part) in [
            ("relay.after_claim", "\"relay.after_claim\" is not of the form name=action"),
            (
                "relay.nowhere=kill",
                "no failpoint \"relay.nowhere\"; it has relay.after_claim, relay.after_publish",
            ),
            ("relay.after_claim=kil", "\"kil\" is not an action"),
            ("relay.after_claim=sleep(5)", "\"sleep(5)\" is not an action"),
            ("relay.after_claim=kill@0", "\"0\" after @"),
            ("relay.after_claim=kill@x", "\"x\" after @"),
            ("relay.after_claim=kill;relay.after_claim=pause", "relay.after_claim is armed twice"),
        ] {
            let error = parse(text, KNOWN).expect_err(text).to_string();
            assert!(error.starts_with("FAILPOINTS: ") && error.contains(part), "{error}");
        }
    }

    #[test]
    fn a_program_without_failpoints_says_so() {
        let error = parse("x=kill", &[]).expect_err("there is none").to_string();
        assert!(error.ends_with("it has none"), "{error}");
    }
}
