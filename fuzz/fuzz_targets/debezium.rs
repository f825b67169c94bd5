//! Reading a message of Debezium never panics.
#![no_main]

use libfuzzer_sys::fuzz_target;
use rules::Rules;
use subscriber::debezium::Decoder;

const RULES: &str = r#"
[[table]]
name = "users"
keys = ["user:{id}:profile", "mail:{email}"]
columns = ["email"]
on_truncate = ["user:"]
"#;

fuzz_target!(|body: &[u8]| {
    let rules = Rules::parse("rules.toml", RULES).expect("these rules are right");
    let _outcome = Decoder::new(rules, None).decode(body);
});
