//! The true bytes of a real Debezium, as `cargo xtask record-debezium` keeps them: the right keys come out, or it is said which
//! ones cannot be told.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::path::{Path, PathBuf};

use event::Change;
use rules::{Lock, Rules};
use subscriber::debezium::{Decoded, Decoder};

/// Invalidations, apart by kind.
#[derive(Debug, Default)]
struct Told {
    keys: BTreeSet<String>,
    prefixes: BTreeSet<String>,
}

fn directory() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("recordings/debezium")
}

fn lines(file: &str) -> Vec<Vec<String>> {
    let text = std::fs::read_to_string(directory().join(file)).unwrap();
    text.lines().map(|line| line.split('\t').map(str::to_owned).collect()).collect()
}

fn told(decoded: &Decoded) -> Told {
    let mut told = Told::default();
    for event in &decoded.events {
        let into = if event.change == Change::Namespace { &mut told.prefixes } else { &mut told.keys };
        into.extend(event.keys.iter().map(|key| key.as_str().to_owned()));
    }
    told
}

/// A column of the table with every type, and the texts of Postgres.
struct Column {
    name: String,
    kind: String,
    base: String,
    /// In the row of the snapshot, in the inserted and in the updated one.
    texts: [String; 3],
}

fn columns() -> Vec<Column> {
    let read = |line: Vec<String>| {
        let [name, kind, base, snapshot, inserted, updated] = <[String; 6]>::try_from(line).unwrap();
        Column { name, kind, base, texts: [snapshot, inserted, updated] }
    };
    lines("types.columns.tsv").into_iter().map(read).collect()
}

fn rules_of(columns: &[Column]) -> Rules {
    let keys: Vec<String> = columns.iter().map(|column| format!("'{0}:{{{0}}}'", column.name)).collect();
    let text = format!(
        "[[table]]\nname = 'types'\nkeys = ['id:{{id}}', {}]\non_truncate = ['id:']\n",
        keys.join(", ")
    );
    Rules::parse("rules.toml", &text).unwrap()
}

fn lock_of(columns: &[Column], rules: &Rules) -> Lock {
    let mut text = "[public.types]\nid = 'int8'\n".to_owned();
    columns.iter().for_each(|column| writeln!(text, "{} = '{}'", column.name, column.base).unwrap());
    Lock::parse("rules.lock", &text, rules).unwrap()
}

/// The texts that the row had before and after each message of a recording, by position; `None` where there is no row.
const ROWS: [(Option<usize>, Option<usize>); 4] =
    [(None, Some(0)), (None, Some(1)), (Some(1), Some(2)), (Some(2), None)];

/// Treatment of the values of a column.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Treatment {
    /// Exactly the right keys, always.
    Key,
    /// The prefix, at least for some of the values, and never a wrong key without it.
    Prefix,
    /// A wrong key, or none, and no prefix.
    Wrong,
}

fn treatments(file: &str, is_locked: bool) -> BTreeMap<String, Treatment> {
    let columns = columns();
    let rules = rules_of(&columns);
    let lock = is_locked.then(|| lock_of(&columns, &rules));
    let mut decoder = Decoder::new(rules, lock);
    let mut treatments: BTreeMap<String, Treatment> = BTreeMap::new();
    let messages = lines(file);
    for ((old, new), message) in ROWS.into_iter().zip(&messages) {
        let decoded = decoder.decode(message[2].as_bytes()).unwrap();
        let told = told(&decoded);
        assert!(
            told.keys.contains(if old.is_none() && new == Some(0) { "id:1" } else { "id:2" }),
            "{told:?}"
        );
        for column in &columns {
            let prefix = format!("{}:", column.name);
            let texts = [old, new].into_iter().flatten().map(|row| &column.texts[row]);
            let expected: BTreeSet<String> = texts.map(|text| format!("{prefix}{text}")).collect();
            let found: BTreeSet<String> =
                told.keys.iter().filter(|key| key.starts_with(&prefix)).cloned().collect();
            let treatment = if told.prefixes.contains(&prefix) {
                assert!(decoded.is_incomplete && !decoded.remarks.is_empty());
                Treatment::Prefix
            } else if found == expected {
                Treatment::Key
            } else {
                Treatment::Wrong
            };
            let known = treatments.entry(column.name.clone()).or_insert(treatment);
            *known = treatment.max(*known);
        }
    }
    let truncated = decoder.decode(messages.last().unwrap()[2].as_bytes()).unwrap();
    assert_eq!(told(&truncated).prefixes, BTreeSet::from(["id:".to_owned()]));
    treatments
}

const RECORDINGS: [&str; 7] = [
    "types.tsv",
    "types-plain.tsv",
    "types-defaults.tsv",
    "types-defaults-plain.tsv",
    "types-unusual.tsv",
    "types-unusual-plain.tsv",
    "types-iso-plain.tsv",
];

#[test]
fn with_a_lock_file_every_type_gives_the_right_key_or_its_prefix_under_all_settings() {
    assert!(columns().len() >= 40);
    let recommended = treatments("types.tsv", true);
    for file in RECORDINGS {
        for (column, treatment) in treatments(file, true) {
            let is_right = treatment == Treatment::Prefix
                || treatment == Treatment::Key && recommended[&column] == treatment;
            assert!(is_right, "{file}: {column} {treatment:?}");
        }
    }
}

#[test]
fn without_lock_file_and_schema_no_key_is_trusted() {
    for file in RECORDINGS.iter().filter(|file| file.contains("plain")) {
        let treatments = treatments(file, false);
        assert!(
            treatments.values().all(|treatment| *treatment == Treatment::Prefix),
            "{file}: {treatments:?}"
        );
    }
}

/// The table of the documentation, from what the recordings show.
#[test]
fn the_table_of_the_types_is_that_of_the_recordings() {
    let locked = treatments("types.tsv", true);
    assert_eq!(locked, treatments("types-plain.tsv", true), "with a lock file schemas make no difference");
    let declared = treatments("types.tsv", false);
    let word = |treatment: Treatment| match treatment {
        Treatment::Key => "key",
        Treatment::Prefix => "prefix",
        Treatment::Wrong => "**wrong**",
    };
    let mut table = "| Type | With a lock file | With schemas only |\n|---|---|---|\n".to_owned();
    for column in columns() {
        let (locked, declared) = (word(locked[&column.name]), word(declared[&column.name]));
        let kind = match column.kind.as_str() {
            "mood" => "an enum".to_owned(),
            "shop_id" | "email" | "day" => format!("a domain over `{}`", column.base),
            kind => format!("`{kind}`"),
        };
        writeln!(table, "| {kind} | {locked} | {declared} |").unwrap();
    }
    let readme = std::fs::read_to_string(directory().join("../../../crates/subscriber/README.md")).unwrap();
    let (_, rest) = readme.split_once("<!-- debezium types:begin -->\n").unwrap();
    let (block, _) = rest.split_once("<!-- debezium types:end -->").unwrap();
    assert!(block == table, "the block 'debezium types' of crates/subscriber/README.md should be:\n{table}");
}

const RULES: &str = r#"
[[table]]
name = "keyed"
keys = ["keyed:{id}", "keyed:n:{n0}", "keyed:mail:{n7}", "keyed:nick:{nick}"]
on_truncate = ["keyed:"]
[[table]]
name = "indexed"
keys = ["indexed:{id}", "indexed:mail:{email}"]
on_truncate = ["indexed:"]
[[table]]
name = "pieces"
columns = ["tenant"]
keys = ["piece:{id}", "piece:{tenant}:{email}"]
on_truncate = ["piece:"]
[[table]]
name = "toasted"
keys = ["toasted:{id}", "toasted:body:{body}"]
on_truncate = "ignore"
[[table]]
name = "toasted_full"
keys = ["full:{id}:{email}"]
on_truncate = "ignore"
[[table]]
name = "regions"
keys = ["region:{region}:{id}"]
on_truncate = ["region:"]
[[table]]
name = "generated"
keys = ["g:{id}", "g:mail:{email}", "g:shout:{shout}"]
on_truncate = ["g:"]
[[table]]
name = "Odd Names"
keys = ["odd:{The Id}:{E-mail}"]
on_truncate = ["odd:"]
[[table]]
name = "keyless"
keys = ["keyless:{id}:{email}"]
on_truncate = ["keyless:"]
"#;

/// Every column of these tables has the type that its name says.
fn lock_of_rules(rules: &Rules) -> Lock {
    let mut text = String::new();
    for table in rules.tables() {
        writeln!(text, "[public.\"{}\"]", table.name).unwrap();
        for column in table.needed_columns() {
            let kind = match column {
                "id" | "tenant" | "The Id" => "int8",
                "n0" => "int2",
                _ => "text",
            };
            writeln!(text, "\"{column}\" = '{kind}'").unwrap();
        }
    }
    Lock::parse("rules.lock", &text, rules).unwrap()
}

/// One line for each message: its kind, keys, prefixes, and subjects of the remarks.
fn transcript(file: &str, is_locked: bool) -> String {
    let rules = Rules::parse("rules.toml", RULES).unwrap();
    let lock = is_locked.then(|| lock_of_rules(&rules));
    let mut decoder = Decoder::new(rules, lock);
    let mut transcript = String::new();
    for message in lines(file) {
        let value: serde_json::Value = serde_json::from_str(&message[2]).unwrap_or_default();
        let payload = value.get("payload").unwrap_or(&value);
        let what = format!(
            "{} {}",
            payload["op"].as_str().unwrap_or("-"),
            payload["source"]["table"].as_str().unwrap_or(&message[0])
        );
        match decoder.decode(message[2].as_bytes()) {
            Ok(decoded) => {
                let told = told(&decoded);
                write!(transcript, "{what}: {}", decoded.kind.as_str()).unwrap();
                told.keys.iter().for_each(|key| write!(transcript, " {key}").unwrap());
                told.prefixes.iter().for_each(|prefix| write!(transcript, " {prefix}*").unwrap());
                let about: Vec<&str> = decoded.remarks.iter().map(|remark| remark.subject.as_str()).collect();
                let about =
                    if about.is_empty() { String::new() } else { format!("  ({})", about.join(", ")) };
                writeln!(transcript, "{about}").unwrap();
            }
            Err(error) => writeln!(transcript, "{what}: {error}").unwrap(),
        }
    }
    transcript
}

#[test]
fn every_recorded_message_has_the_effect_that_is_written_beside_it() {
    let mut found = String::new();
    for (file, is_locked) in [
        ("special.tsv", false),
        ("special.tsv", true),
        ("special-plain.tsv", true),
        ("root.tsv", true),
        ("heartbeat.tsv", false),
        ("heartbeat-plain.tsv", true),
        ("transaction.tsv", false),
        ("transaction-plain.tsv", true),
        ("unwrap.tsv", false),
        ("unwrap-plain.tsv", true),
        ("unwrap-fields-plain.tsv", true),
        ("cloudevents.tsv", true),
    ] {
        let lock = if is_locked { "with" } else { "without" };
        writeln!(found, "== {file} {lock} lock file\n{}", transcript(file, is_locked)).unwrap();
    }
    let expected = std::fs::read_to_string(directory().join("effects.txt")).unwrap();
    assert!(found == expected, "effects.txt differs; the effects are now:\n{found}");
}
