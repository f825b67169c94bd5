//! House rules that are easy to break and easy to check.

use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

/// Every Rust source file below a folder of the repository, with its text.
fn sources(folder: &str) -> Vec<(PathBuf, String)> {
    let mut found = Vec::new();
    let mut folders = vec![root().join(folder)];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).unwrap().map(Result::unwrap) {
            let path = entry.path();
            if path.is_dir() && !path.ends_with("target") && !path.is_symlink() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = std::fs::read_to_string(&path).unwrap();
                found.push((path, text));
            }
        }
    }
    assert!(!found.is_empty(), "no sources in {folder}");
    found
}

fn is_in(path: &Path, folder: &str) -> bool {
    path.starts_with(root().join(folder))
}

#[test]
fn outbox_tables_are_touched_only_by_the_outbox_crate() {
    for (path, text) in sources("crates") {
        let allowed = [
            "crates/outbox",
            "crates/rules/src/triggers",
            "crates/rules/tests",
            "crates/xtask",
            "crates/example",
        ]
        .iter()
        .any(|folder| is_in(&path, folder));
        let touches = ["from outbox.", "into outbox.", "update outbox.", "truncate outbox."];
        assert!(
            allowed || !touches.iter().any(|sql| text.contains(sql)),
            "{} has SQL on the outbox",
            path.display()
        );
    }
}

#[test]
fn redis_is_spoken_to_only_by_the_cache_crate() {
    for (path, text) in sources("crates") {
        let allowed =
            ["crates/cache", "crates/devstack", "crates/xtask"].iter().any(|folder| is_in(&path, folder));
        assert!(allowed || !text.contains("deadpool_redis"), "{} uses the Redis client", path.display());
    }
}

#[test]
fn relay_and_subscriber_know_nothing_of_each_other() {
    for (crate_name, other) in [("relay", "subscriber"), ("subscriber", "relay")] {
        let manifest =
            std::fs::read_to_string(root().join(format!("crates/{crate_name}/Cargo.toml"))).unwrap();
        let manifest: toml::Table = manifest.parse().unwrap();
        assert!(manifest["dependencies"].get(other).is_none(), "{crate_name} depends on {other}");
    }
}

#[test]
fn no_test_is_switched_off_and_no_file_is_a_drawer() {
    let switched_off = concat!("#[ig", "nore");
    for (path, text) in sources("crates").into_iter().chain(sources("tests")) {
        assert!(!text.contains(switched_off), "{} switches a test off", path.display());
        let stem = path.file_stem().unwrap().to_str().unwrap();
        assert!(
            !["utils", "util", "common", "helpers", "misc", "types", "mod"].contains(&stem),
            "{}",
            path.display()
        );
    }
}

#[test]
fn every_failpoint_is_reached_by_a_test() {
    let tests: String = sources("tests").into_iter().map(|(_, text)| text).collect();
    for name in relay::FAILPOINTS.iter().chain(subscriber::FAILPOINTS) {
        assert!(tests.contains(name), "no test uses the failpoint {name}");
    }
}
