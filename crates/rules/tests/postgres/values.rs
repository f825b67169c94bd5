//! How values become text, and keys that no cache key can be.

use rules::{JsonImage, PINNED_SETTINGS};
use sqlx::{Connection, PgConnection};

use crate::bed::{Bed, parse};

const TYPES: &str = "
    create type mood as enum ('happy', 'it''s');
    create domain label as varchar(20);
    create table things (
        id int primary key, small int2, big int8, number numeric(10, 3), id2 uuid, body text, short varchar(10), padded char(5),
        flag boolean, day date, at timestamp, atz timestamptz, feeling mood, tag label, ip inet, odd int default 0);
    insert into things values (1, -2, 9007199254740993, 1.500, '6EC0BD7F-11C0-43DA-975E-2A8AD9EBAE0B', 'Ä b', 'x', 'ab', true,
        '2026-02-01', '2026-02-01 10:00:00.5', '2026-02-01 10:00:00+05:30', 'it''s', 'L', '::1')";

const COLUMNS: [&str; 14] = [
    "small", "big", "number", "id2", "body", "short", "padded", "flag", "day", "at", "atz", "feeling", "tag",
    "ip",
];

/// What Postgres' output functions write, which is what `pgoutput` sends.
const TEXTS: [&str; 14] = [
    "-2",
    "9007199254740993",
    "1.500",
    "6ec0bd7f-11c0-43da-975e-2a8ad9ebae0b",
    "Ä b",
    "x",
    "ab   ",
    "t",
    "2026-02-01",
    "2026-02-01 10:00:00.5",
    "2026-02-01 04:30:00+00",
    "it's",
    "L",
    "::1",
];

fn rules(watch: &str) -> String {
    let keys: Vec<String> = COLUMNS.iter().map(|column| format!("'{column}={{{column}}}'")).collect();
    format!("[[table]]\nname = 'things'\n{watch}\nkeys = [{}]\non_truncate = 'ignore'", keys.join(", "))
}

fn expected() -> Vec<String> {
    let mut keys: Vec<String> =
        COLUMNS.iter().zip(TEXTS).map(|(column, text)| format!("{column}={text}")).collect();
    keys.sort_unstable();
    keys
}

#[tokio::test]
async fn triggers_write_values_as_the_log_does_whatever_the_session_is_set_to() {
    let bed = Bed::new(TYPES).await;
    for watch in ["", "columns = ['odd']"] {
        bed.install(&rules(watch)).await;
        let mut session = PgConnection::connect(&bed.server.url()).await.unwrap();
        let update = "set datestyle = 'German, DMY'; set timezone = 'Asia/Tokyo'; set standard_conforming_strings = off;
            set extra_float_digits = -10; update things set odd = odd + 1";
        sqlx::raw_sql(update).execute(&mut session).await.unwrap();
        assert_eq!(bed.keys("select").await, expected(), "{watch}");
    }
}

#[tokio::test]
async fn the_write_ahead_log_has_the_same_texts() {
    let options = devstack::PostgresOptions {
        settings: vec![("wal_level".to_owned(), "logical".to_owned())],
        ..Default::default()
    };
    let bed = Bed::with(options, TYPES).await;
    bed.run("alter table things replica identity full; create publication p for table things").await;
    bed.run("select pg_create_logical_replication_slot('s', 'pgoutput')").await;
    bed.run("update things set odd = 1").await;
    let mut reader = PgConnection::connect(&bed.server.url()).await.unwrap();
    for (name, value) in PINNED_SETTINGS {
        sqlx::query("select set_config($1, $2, false)")
            .bind(name)
            .bind(value)
            .execute(&mut reader)
            .await
            .unwrap();
    }
    let changes: Vec<Vec<u8>> = sqlx::query_scalar(
        "select data from pg_logical_slot_get_binary_changes('s', null, null, 'proto_version', '1', 'publication_names', 'p')",
    )
    .fetch_all(&mut reader)
    .await
    .unwrap();
    let update = changes.iter().find(|change| change[0] == b'U').expect("an update");
    for text in TEXTS {
        // A value is 't', its length in four bytes, and its text.
        let mut cell = vec![b't'];
        cell.extend(u32::try_from(text.len()).unwrap().to_be_bytes());
        cell.extend(text.as_bytes());
        assert!(update.windows(cell.len()).any(|window| window == cell), "{text}");
    }
}

#[tokio::test]
async fn the_pure_expansion_of_the_same_row_gives_the_same_keys() {
    let fields: Vec<String> =
        COLUMNS.iter().zip(TEXTS).map(|(column, text)| format!("\"{column}\": \"{text}\"")).collect();
    let image = JsonImage::parse(&format!("{{{}}}", fields.join(","))).unwrap();
    let expansion = parse(&rules("")).table("public", "things").unwrap().keys(None, Some(&image)).unwrap();
    let mut keys: Vec<String> = expansion.keys.into_iter().map(|key| key.into_string()).collect();
    keys.sort_unstable();
    assert_eq!(keys, expected());
}

#[tokio::test]
async fn values_that_are_equal_to_sql_but_not_as_text_have_changed() {
    let bed = Bed::watched(TYPES, "[[table]]\nname = 'things'\nkeys = ['n:{number}', 'p:{padded}']\ncolumns = ['body']\non_truncate = 'ignore'").await;
    bed.run("alter table things alter number type numeric").await;
    bed.events().await;
    assert_eq!(bed.keys("update things set number = 1.5").await, ["n:1.5", "n:1.500", "p:ab   "]);
}

#[tokio::test]
async fn what_a_row_holds_never_makes_its_writer_fail() {
    let bed = Bed::watched(
        "create table t (id int primary key, name text)",
        "[[table]]\nname = 't'\nkeys = ['t:{id}', '{name}']\non_truncate = 'ignore'",
    )
    .await;
    for (id, name) in [
        (1, "''".to_owned()),
        (2, "repeat('x', 2000)".to_owned()),
        (3, "E'a\\nb'".to_owned()),
        (4, "E'\\u0085'".to_owned()),
        (5, "null".to_owned()),
        (6, "repeat('ä', 513)".to_owned()),
    ] {
        let keys = bed.keys(&format!("insert into t values ({id}, {name})")).await;
        assert_eq!(keys, [format!("t:{id}")], "{name}");
    }
    let keys = bed.keys("insert into t values (7, repeat('ä', 512))").await;
    assert_eq!(keys.len(), 2, "1,024 bytes are not too many");
    // The writer is told, in one line for the statement.
    let log = bed.server.process().log();
    let warning = "WARNING:  1 keys of table public.t are no cache keys";
    assert!(log.contains(warning), "{log}");
}

#[tokio::test]
async fn floats_that_differ_are_changes_whatever_the_writer_has_set_and_whatever_they_are_in() {
    let schema = "create type spot as (at float8); create domain price as float8; create domain prices as float8[];
        create table goods (id int primary key, one float8, many float8[], part spot, shape point, tame price, herd prices,
            kept range_of);
        insert into goods values (1, 0.1, '{0.1}', '(0.1)', '(0.1,0)', 0.1, '{0.1}', '[0.1,1)')";
    let bed = Bed::new("create type range_of as range (subtype = float8)").await;
    bed.run(schema).await;
    for (column, value) in [
        ("one", "0.1000000000000001"),
        ("many", "{0.1000000000000001}"),
        ("part", "(0.1000000000000001)"),
        ("shape", "(0.1000000000000001,0)"),
        ("tame", "0.1000000000000001"),
        ("herd", "{0.1000000000000001}"),
        ("kept", "[0.1000000000000001,1)"),
    ] {
        let rules = format!(
            "[[table]]\nname = 'goods'\ncolumns = ['{column}']\nkeys = ['goods:{{id}}']\non_truncate = 'ignore'"
        );
        bed.install(&rules).await;
        let update = format!(
            "set extra_float_digits = 0; update goods set {column} = '{value}'; reset extra_float_digits"
        );
        assert_eq!(bed.keys(&update).await, ["goods:1"], "{column}");
    }
}

#[tokio::test]
async fn a_condition_that_no_value_can_match_is_refused_with_the_text_to_write() {
    let schema = "create type state as enum ('draft', 'live');
        create domain percent as int check (value between 0 and 100);
        create table goods (id int primary key, price numeric(10,2), sold boolean, code char(5), short varchar(2),
            state state, at timestamptz, share percent, small int2)";
    let bed = Bed::new(schema).await;
    let rules = |when: &str| {
        format!("[[table]]\nname = 'goods'\nkeys = ['goods:{{id}}']\nwhen = {when}\non_truncate = 'ignore'")
    };
    for (when, expected) in [
        (
            "{ column = 'price', equals = 5 }",
            "column price: the condition compares with '5', which never matches: as numeric(10,2) it is written '5.00'",
        ),
        (
            "{ column = 'sold', equals = 'true' }",
            "column sold: the condition compares with 'true', which never matches: as boolean it is written 't'",
        ),
        ("{ column = 'code', equals = 'ab' }", "as character(5) it is written 'ab   '"),
        ("{ column = 'short', equals = 'abc' }", "as character varying(2) it is written 'ab'"),
        (
            "{ not = { column = 'state', equals = 'drafts' } }",
            "it is no value of state: invalid input value for enum",
        ),
        (
            "{ column = 'at', equals = '2026-02-01' }",
            "as timestamp with time zone it is written '2026-02-01 00:00:00+00'",
        ),
        (
            "{ column = 'share', equals = 101 }",
            "it is no value of percent: value for domain percent violates",
        ),
        (
            "{ column = 'small', in = [1, 70000] }",
            "compares with '70000', which never matches: it is no value of smallint",
        ),
    ] {
        let problems = bed.problems(&rules(when)).await;
        assert_eq!(problems.len(), 1, "{problems:#?}");
        assert!(problems[0].starts_with("rules.toml:4: table public.goods, column "), "{problems:?}");
        assert!(problems[0].contains(expected), "{expected}: {problems:?}");
    }
    for when in [
        "{ column = 'price', in = ['5.00', '-1.50'] }",
        "{ column = 'sold', equals = true }",
        "{ column = 'code', equals = 'ab   ' }",
        "{ not = { column = 'state', equals = 'draft' } }",
        "{ column = 'at', equals = '2026-02-01 00:00:00+00' }",
        "{ column = 'share', equals = 100 }",
        "{ column = 'short', is_null = true }",
    ] {
        let facts = bed.facts(&parse(&rules(when))).await;
        assert!(facts.is_ok(), "{when}: {facts:?}");
    }
    bed.install(&rules("{ column = 'price', equals = '5.00' }")).await;
    assert_eq!(bed.keys("insert into goods (id, price) values (1, 5), (2, 6)").await, ["goods:1"]);
}
