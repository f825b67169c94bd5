//! What a rules file may say, and what is said about one that is wrong.

use event::Topic;
use rules::{OnTruncate, Problem, Rules, RulesError};

fn problems(text: &str) -> Vec<Problem> {
    match Rules::parse("rules.toml", text) {
        Err(RulesError::Invalid(problems)) => problems,
        other => panic!("should not be accepted: {other:?}"),
    }
}

fn messages(text: &str) -> Vec<String> {
    problems(text).iter().map(ToString::to_string).collect()
}

#[test]
fn schema_topic_and_condition_have_defaults() {
    let text = "[[table]]\nname = 'users'\nkeys = ['user:{id}']\non_truncate = 'ignore'\n";
    let rules = Rules::parse("rules.toml", text).unwrap();
    let users = rules.table("public", "users").unwrap();
    assert_eq!((users.line, users.keys[0].line), (2, 3));
    assert_eq!(users.topic, Topic::default());
    assert_eq!(users.on_truncate, OnTruncate::Ignore);
    assert!(users.when.is_none() && users.columns.is_none() && users.expand.is_empty());
    assert!(
        rules.table("other", "users").is_none(),
        "a table of the same name in another schema has no rules"
    );
}

#[test]
fn every_problem_is_reported_with_its_line_and_table() {
    let text = r#"
[[table]]
name = "users"
columns = ["name", "name"]
keys = ["user:{id", "{tenant}"]
topic = "a.b"
when = { column = "status", equals = "x", is_null = true }
on_truncate = "forget"

[[table]]
name = "shop.orders"
on_truncate = []
[[table.expand]]
sql = "select 1"
"#;
    let messages = messages(text);
    for expected in [
        "rules.toml:4: table public.users: column name is named twice",
        "rules.toml:5: table public.users: key 'user:{id': '{' at byte 5 is not closed; write '{{' for the character itself",
        "rules.toml:6: table public.users: topic must be 1 to 64 ASCII letters, digits, '_' or '-'",
        "rules.toml:7: table public.users: when is a column with exactly one of equals, in and is_null; or not = { … } alone",
        "rules.toml:8: table public.users: on_truncate is a list of key prefixes or \"ignore\", not \"forget\"",
        "rules.toml:12: table shop.orders: on_truncate names 0 key prefixes; 1 to 16 are possible",
        "rules.toml:14: table shop.orders: expand does not use $1, the array of changed primary keys",
    ] {
        assert!(
            messages.iter().any(|message| message == expected),
            "{expected}\nis not among\n{messages:#?}"
        );
    }
    assert_eq!(messages.len(), 7, "{messages:#?}");
}

#[test]
fn a_decision_on_truncate_is_required_and_tables_are_named_once() {
    let text =
        "[[table]]\nname='a'\nkeys=['k']\n[[table]]\nname='public.a'\nkeys=['k']\non_truncate='ignore'\n";
    let messages = messages(text);
    assert!(messages[0].starts_with("rules.toml:1: table public.a: on_truncate is missing"), "{messages:#?}");
    assert!(messages[1].contains("has rules on line 2 already"), "{messages:#?}");
}

#[test]
fn misspelt_fields_and_broken_toml_name_their_line() {
    let messages = [
        messages("[[table]]\nname = 'users'\nkey = ['k']\n"),
        messages("[[table]]\nname = 'users'\nkeys = ['k'\n"),
        messages("[[table]]\nname = 'users'\nkeys = [1]\n"),
        messages(""),
    ];
    assert!(messages[0][0].starts_with("rules.toml:3: unknown field `key`"), "{messages:#?}");
    assert!(messages[1][0].starts_with("rules.toml:"), "{messages:#?}");
    assert!(messages[2][0].starts_with("rules.toml:3: "), "{messages:#?}");
    assert!(messages[3][0].contains("[[table]]"), "{messages:#?}");
}

#[test]
fn a_missing_file_is_named() {
    let error = Rules::load("/nowhere/rules.toml".as_ref()).unwrap_err();
    assert_eq!(error.to_string(), "cannot read the rules file /nowhere/rules.toml");
}
