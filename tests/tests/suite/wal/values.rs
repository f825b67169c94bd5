//! Values become the same text whatever the server has as defaults: text is what keys are made of.

use devstack::{PostgresOptions, StackOptions};

use super::{captured_on, relay, sql};

const SCHEMA: &str =
    "create table visits (id int primary key, day date, at timestamp, atz timestamptz, weight float8);
    alter table visits replica identity full;
    insert into visits values
        (1, '2026-02-03', '2026-02-03 10:00:00.5', '2026-02-03 10:00:00+05:30', 0.1);
    alter database postgres set datestyle = 'SQL, DMY'";

const RULES: &str = r#"
    [[table]]
    name = "visits"
    keys = ["visit:{id}", "day:{day}", "at:{at}", "atz:{atz}"]
    columns = ["weight"]
    on_truncate = "ignore"
"#;

#[tokio::test(flavor = "multi_thread")]
async fn the_log_gives_the_keys_that_triggers_give_whatever_the_defaults_of_the_server() {
    let odd = [
        ("timezone", "Europe/Berlin"),
        ("datestyle", "German, DMY"),
        ("intervalstyle", "iso_8601"),
        ("extra_float_digits", "-10"),
    ];
    let settings = odd.map(|(name, value)| (name.to_owned(), value.to_owned())).to_vec();
    let stack =
        StackOptions { postgres: PostgresOptions { settings, ..Default::default() }, ..Default::default() };
    let pair = captured_on(stack, SCHEMA, RULES, &[]).await;
    let (ok, text) = relay(&pair, &["rules", "apply"], &[]).await;
    assert!(ok, "{text}");
    let expected = ["at:2026-02-03 10:00:00.5", "atz:2026-02-03 04:30:00+00", "day:2026-02-03", "visit:1"];
    for key in expected {
        pair.fill(key).await.unwrap();
    }
    // A change that fewer digits would not show.
    sql(&pair, "update visits set weight = 0.1000000000000001").await;
    for key in expected {
        pair.until_none(key).await;
    }
    let of_triggers: Vec<String> = sqlx::query_scalar("select unnest(keys) from outbox.events order by 1")
        .fetch_all(&pair.pool)
        .await
        .unwrap();
    assert_eq!(of_triggers, expected);
}
