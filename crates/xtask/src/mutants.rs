//! Removes the mechanisms behind the promises one by one, and tells which test finds it out.

mod list;

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail, ensure};
use devstack::Binary;

use crate::matrix::suite::Outcome;
use crate::{programs, servers};
use list::Mutant;

/// Remove the mechanisms behind the promises one by one and print which test finds it out
///
/// Works on a copy of the last commit in `target/mutants`; the list is `crates/xtask/mutants.toml`. Each mutant compiles
/// what it changed and runs the tests named for it, so that the whole list takes about an hour on two cores. Fails if a
/// mutant survives.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Only mutants with this in their names
    #[arg(long)]
    only: Option<String>,
    /// Print the list and run nothing
    #[arg(long)]
    list: bool,
}

/// Runs every mutant and prints a table.
pub fn run(arguments: &Arguments) -> Result<ExitCode> {
    let wanted = |mutant: &Mutant| arguments.only.as_ref().is_none_or(|only| mutant.name.contains(only));
    let mutants: Vec<Mutant> = list::read(programs::workspace())?.into_iter().filter(wanted).collect();
    ensure!(!mutants.is_empty(), "no mutant has that in its name");
    if arguments.list {
        mutants.iter().for_each(|mutant| println!("{}: {}", mutant.name, mutant.file));
        return Ok(ExitCode::SUCCESS);
    }
    servers::provide(Binary::ALL)?;
    let copy = copy_of_the_last_commit()?;
    println!("The tests on the code as it is:");
    check_unchanged(&copy, &mutants)?;
    let mut survivors = 0;
    let mut rows = Vec::new();
    for mutant in &mutants {
        println!("\n== {}", mutant.name);
        let found = with_mutant(&copy, mutant, || test(&copy, mutant))?;
        survivors += usize::from(found.passed());
        rows.push((mutant, found));
    }
    print_table(&rows);
    println!("\n{} of {} mutants were found", rows.len() - survivors, rows.len());
    Ok(if survivors == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// A test that fails anyway would find every mutant.
fn check_unchanged(copy: &Path, mutants: &[Mutant]) -> Result<()> {
    let mut tried: Vec<(&str, &[String])> = Vec::new();
    for mutant in mutants {
        if tried.contains(&(&mutant.target, &mutant.tests)) {
            continue;
        }
        tried.push((&mutant.target, &mutant.tests));
        let outcome = test(copy, mutant)?;
        ensure!(outcome.passed(), "fails without any mutant: {}", outcome.failures.join(", "));
    }
    Ok(())
}

/// Returns a checkout of its own, with its own target folder, so that nothing of the user's changes.
fn copy_of_the_last_commit() -> Result<PathBuf> {
    let workspace = programs::workspace();
    let copy = workspace.join("target/mutants");
    let git = |folder: &Path, arguments: &[&str]| {
        let status =
            Command::new("git").args(arguments).current_dir(folder).status().context("cannot run git")?;
        ensure!(status.success(), "git {} failed", arguments.join(" "));
        anyhow::Ok(())
    };
    if !copy.join(".git").exists() {
        let (from, to) = (workspace.display().to_string(), copy.display().to_string());
        git(workspace, &["clone", "--quiet", "--shared", &from, &to])?;
    }
    git(&copy, &["fetch", "--quiet", "origin", "HEAD"])?;
    git(&copy, &["checkout", "--quiet", "--force", "--detach", "FETCH_HEAD"])?;
    Ok(copy)
}

/// Runs `work` while the mutant is in place. The file is as before afterwards, also after an error.
fn with_mutant<T>(copy: &Path, mutant: &Mutant, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let file = copy.join(&mutant.file);
    let text = std::fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
    std::fs::write(&file, mutant.applied_to(&text)?)?;
    let done = work();
    std::fs::write(&file, text)?;
    done
}

fn test(copy: &Path, mutant: &Mutant) -> Result<Outcome> {
    let mut command = Command::new(programs::cargo());
    command.args(["test", "--quiet", "--workspace", "--no-fail-fast"]);
    match mutant.target.as_str() {
        "lib" => command.arg("--lib"),
        target => command.args(["--test", target]),
    };
    command.arg("--").args(["--format", "pretty"]).args(&mutant.tests);
    command.current_dir(copy).env("RUST_BACKTRACE", "0").envs([programs::test_threads()]);
    let output = command.output().context("cannot start cargo")?;
    let text = String::from_utf8_lossy(&output.stdout);
    let outcome = Outcome::read(&text);
    if outcome.is_empty() {
        bail!("no test was run for {}: {}", mutant.name, String::from_utf8_lossy(&output.stderr));
    }
    println!("{outcome} passed");
    Ok(outcome)
}

fn print_table(rows: &[(&Mutant, Outcome)]) {
    println!("\n| Mechanism removed | Found by |\n|---|---|");
    for (mutant, outcome) in rows {
        let found = outcome.failures.first().map_or("**nothing**".to_owned(), |test| format!("`{test}`"));
        let more = outcome.failures.len().saturating_sub(1);
        let more = if more > 0 { format!(" (+{more})") } else { String::new() };
        println!("| {} | {found}{more} |", mutant.name);
    }
}
