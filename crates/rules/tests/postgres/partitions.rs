//! Partitioned tables: a statement trigger fires only on the table that the statement names.

use crate::bed::Bed;

const SCHEMA: &str = "
    create table readings (id int, region text, value int, primary key (id, region)) partition by list (region);
    create table readings_eu partition of readings for values in ('eu');
    create table readings_rest partition of readings default partition by range (id);
    create table readings_rest_low partition of readings_rest for values from (0) to (100);
    insert into readings values (1, 'eu', 0), (2, 'us', 0)";

const RULES: &str = r#"
[[table]]
name = "readings"
columns = ["value"]
keys = ["reading:{region}:{id}"]
on_truncate = ["reading:"]
"#;

#[tokio::test]
async fn changes_through_the_root_and_at_any_partition_directly_are_captured() {
    let bed = Bed::watched(SCHEMA, RULES).await;
    assert_eq!(bed.keys("update readings set value = 1").await, ["reading:eu:1", "reading:us:2"]);
    assert_eq!(bed.keys("update readings_eu set value = 2").await, ["reading:eu:1"]);
    assert_eq!(bed.keys("update readings_rest set value = 2").await, ["reading:us:2"]);
    assert_eq!(bed.keys("update readings_rest_low set value = 3").await, ["reading:us:2"]);
    assert_eq!(bed.keys("insert into readings_rest_low values (3, 'us', 0)").await, ["reading:us:3"]);
    assert_eq!(bed.keys("delete from readings_rest where id = 3").await, ["reading:us:3"]);
}

#[tokio::test]
async fn a_row_that_moves_to_another_partition_has_an_old_and_a_new_key() {
    let bed = Bed::watched(SCHEMA, RULES).await;
    let keys = bed.keys("update readings set region = 'asia' where id = 1").await;
    assert_eq!(keys, ["reading:asia:1", "reading:eu:1"]);
}

#[tokio::test]
async fn truncating_root_or_partition_invalidates_the_namespace() {
    let bed = Bed::watched(SCHEMA, RULES).await;
    for table in ["readings_eu", "readings_rest_low", "readings"] {
        bed.run(&format!("truncate {table}")).await;
        let events = bed.events().await;
        assert!(!events.is_empty() && events.iter().all(|event| event.namespace), "{table}: {events:?}");
    }
}

#[tokio::test]
async fn a_partition_with_columns_in_another_order_is_read_right() {
    let bed = Bed::watched(SCHEMA, RULES).await;
    bed.run("create table late (value int, junk int, region text not null, id int not null); alter table late drop junk;
             alter table readings attach partition late for values in ('late')").await;
    bed.install(RULES).await;
    assert_eq!(bed.keys("insert into readings values (7, 'late', 0)").await, ["reading:late:7"]);
    assert_eq!(bed.keys("update late set value = 1").await, ["reading:late:7"]);
    assert_eq!(bed.keys("update readings set value = 2 where region = 'late'").await, ["reading:late:7"]);
}

#[tokio::test]
async fn a_new_partition_is_captured_through_the_root_and_reported_until_rules_are_applied() {
    let bed = Bed::watched(SCHEMA, RULES).await;
    bed.run("create table readings_new partition of readings for values in ('new')").await;
    assert_eq!(bed.keys("insert into readings values (9, 'new', 0)").await, ["reading:new:9"]);
    let plan = bed.plan(RULES).await;
    let whats: Vec<&str> = plan.steps.iter().map(|step| step.what.as_str()).collect();
    assert_eq!(whats.len(), 4, "{whats:?}");
    assert!(whats.iter().all(|what| what.ends_with("on public.readings_new")), "{whats:?}");
    bed.install(RULES).await;
    assert_eq!(bed.keys("update readings_new set value = 1").await, ["reading:new:9"]);
}
