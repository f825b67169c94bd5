//! The README and the files for operators say what the code does: generated tables, names that exist.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::path::{Path, PathBuf};

use clap::{Args, Command};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

fn read(file: &str) -> String {
    std::fs::read_to_string(root().join(file)).unwrap_or_else(|error| panic!("{file}: {error}"))
}

/// The block of the README between two markers.
fn block(name: &str) -> String {
    let readme = read("README.md");
    let (begin, end) = (format!("<!-- {name}:begin -->\n"), format!("<!-- {name}:end -->"));
    let (_, rest) = readme.split_once(&begin).unwrap_or_else(|| panic!("the README has no {begin}"));
    rest.split_once(&end).unwrap_or_else(|| panic!("the README has no {end}")).0.to_owned()
}

#[track_caller]
fn assert_block(name: &str, expected: &str) {
    assert!(block(name) == expected, "the README's block '{name}' should be:\n{expected}");
}

fn options_table<A: Args>() -> String {
    let command = A::augment_args(Command::new("x"));
    let mut table = "| Variable | Flag | Default | |\n|---|---|---|---|\n".to_owned();
    for argument in command.get_arguments() {
        let variable = argument.get_env().unwrap().to_string_lossy();
        let default = argument
            .get_default_values()
            .first()
            .map_or_else(String::new, |value| format!("`{}`", value.to_string_lossy()));
        let help = argument.get_help().unwrap().to_string();
        writeln!(table, "| `{variable}` | `--{}` | {default} | {help} |", argument.get_long().unwrap())
            .unwrap();
    }
    table
}

#[test]
fn option_tables_of_the_readme_are_those_of_the_programs() {
    assert_block("relay options", &options_table::<relay::Config>());
    assert_block("subscriber options", &options_table::<subscriber::Config>());
}

#[test]
fn metrics_table_of_the_readme_is_that_of_the_programs() {
    let mut table = "| Metric | |\n|---|---|\n".to_owned();
    for (name, help) in relay::metrics::ALL.iter().chain(subscriber::metrics::ALL) {
        writeln!(table, "| `{name}` | {help} |").unwrap();
    }
    assert_block("metrics", &table);
}

/// Words of a text that look like names with this prefix.
fn names<'a>(text: &'a str, prefix: &str) -> BTreeSet<&'a str> {
    text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_')
        .filter(|word| word.starts_with(prefix))
        .collect()
}

#[test]
fn every_metric_of_dashboard_and_alerts_exists() {
    let known: BTreeSet<&str> =
        relay::metrics::ALL.iter().chain(subscriber::metrics::ALL).map(|(name, _)| *name).collect();
    for file in ["deploy/alerts.yml", "deploy/grafana/dashboards/cache-invalidation.json"] {
        let text = read(file);
        let used: BTreeSet<&str> =
            names(&text, "relay_").union(&names(&text, "subscriber_")).copied().collect();
        assert!(used.len() > 5, "{file}");
        for name in used {
            let base =
                name.strip_suffix("_bucket").or(name.strip_suffix("_count")).or(name.strip_suffix("_sum"));
            assert!(
                known.contains(name) || base.is_some_and(|base| known.contains(base)),
                "{file} uses {name}"
            );
        }
    }
}

/// Whoever is woken by an alert looks at the dashboard next.
#[test]
fn every_metric_that_alerts_is_on_the_dashboard() {
    let alerts = read("deploy/alerts.yml");
    let dashboard = read("deploy/grafana/dashboards/cache-invalidation.json");
    let queries: String = dashboard.lines().filter(|line| line.contains("\"expr\":")).collect();
    for prefix in ["relay_", "subscriber_"] {
        let shown = names(&queries, prefix);
        let missing: Vec<&str> = names(&alerts, prefix).difference(&shown).copied().collect();
        assert!(missing.is_empty(), "alerts use {missing:?}, which no panel shows");
        assert!(shown.len() > 10, "{shown:?}");
    }
}

#[test]
fn every_variable_and_command_of_the_compose_file_exists() {
    let text = read("docker-compose.yml");
    let mut known: BTreeSet<String> = BTreeSet::new();
    for command in
        [relay::Config::augment_args(Command::new("x")), subscriber::Config::augment_args(Command::new("x"))]
    {
        known.extend(
            command
                .get_arguments()
                .map(|argument| argument.get_env().unwrap().to_string_lossy().into_owned()),
        );
    }
    for prefix in ["RELAY_", "SUBSCRIBER_", "DATABASE_", "DRAIN_", "LOG_", "HTTP_"] {
        for name in names(&text, prefix) {
            let is_port = name.ends_with("_PORT");
            assert!(
                is_port || known.contains(name),
                "docker-compose.yml sets {name}, which no program knows"
            );
        }
    }
    for file in ["deploy/nats.conf", "deploy/prometheus.yml", "deploy/alerts.yml", "Dockerfile"] {
        assert!(root().join(file).is_file(), "{file}");
    }
}

/// The anchors of a document.
fn headings(text: &str) -> Vec<String> {
    let titles = text
        .lines()
        .filter_map(|line| line.strip_prefix("##"))
        .map(|title| title.trim_start_matches('#').trim());
    let anchor = |title: &str| {
        let kept = title.chars().filter(|letter| letter.is_alphanumeric() || " -_".contains(*letter));
        kept.collect::<String>().to_lowercase().replace(' ', "-")
    };
    titles.map(anchor).collect()
}

#[test]
fn links_of_the_readme_lead_somewhere() {
    let readme = read("README.md");
    let mut links = 0;
    for (_, rest) in readme.match_indices("](").map(|(at, _)| readme.split_at(at + 2)) {
        let target = rest.split_once(')').unwrap().0;
        if target.starts_with("http") || target.starts_with('#') {
            continue;
        }
        links += 1;
        let (file, heading) = target.split_once('#').unwrap_or((target, ""));
        assert!(root().join(file).exists(), "the README links to {target}");
        let known = heading.is_empty() || headings(&read(file)).contains(&heading.to_owned());
        assert!(known, "the README links to {target}");
    }
    assert!(links > 5);
}
