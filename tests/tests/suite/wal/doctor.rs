//! What `relay doctor` finds out about the slot, and what it says to do.

use devstack::{StackOptions, eventually};
use tests::{Pair, SETTLED};

use super::{
    USER_RULES, USERS, captured_on, fence, lose_slot, relay, slot, sql, until_read, until_unread, users,
    with_little_log, write_log,
};

/// What doctor says about one subject: its mark, what it found, and what to do.
async fn finding(pair: &Pair, subject: &str, more: &[(&str, &str)]) -> (bool, String) {
    let (ok, text) = relay(pair, &["doctor"], more).await;
    let mut lines =
        text.lines().skip_while(|line| line.get(4..).is_none_or(|rest| !rest.starts_with(subject)));
    let line = lines.next().unwrap_or_else(|| panic!("nothing about {subject}:\n{text}"));
    let remedy = lines.next().filter(|line| line.trim_start().starts_with("->")).unwrap_or_default();
    let is_fine = line.starts_with("ok");
    assert_eq!(is_fine, remedy.is_empty(), "every finding says what to do:\n{text}");
    assert!(is_fine || !ok, "doctor fails when something needs action:\n{text}");
    (is_fine, format!("{}{remedy}", &line[4..]))
}

#[track_caller]
fn assert_needs(finding: &(bool, String), texts: &[&str]) {
    assert!(
        !finding.0 && texts.iter().all(|text| finding.1.contains(text)),
        "{texts:?} not in {}",
        finding.1
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn doctor_is_content_with_a_slot_that_is_read() {
    let mut stack = StackOptions::default();
    stack.postgres.settings.push(("max_slot_wal_keep_size".to_owned(), "1GB".to_owned()));
    let pair = captured_on(stack, USERS, USER_RULES, &[]).await;
    let server = until_read(&pair).await;
    let (ok, text) = relay(&pair, &["doctor"], &[]).await;
    assert!(ok && !text.contains("!!"), "{text}");
    let (_, found) = finding(&pair, "slot ", &[]).await;
    assert!(found.contains(&format!("read by process {server}")), "{found}");
    let (_, found) = finding(&pair, "log limit", &[]).await;
    assert!(found.contains("1024 MB"), "{found}");
    let (fine, found) = finding(&pair, "source", &[("RELAY_SOURCE", "outbox")]).await;
    assert!(fine && found.contains("another relay reads"), "{found}");
}

#[tokio::test(flavor = "multi_thread")]
async fn doctor_names_a_slot_that_nobody_reads_or_that_is_gone_and_a_log_without_limit() {
    let pair = users().await;
    fence(&pair).await;
    assert_needs(&finding(&pair, "log limit", &[]).await, &["fills the disk", "set max_slot_wal_keep_size"]);
    // Less than this is left unconfirmed for good.
    let limit = [("RELAY_SLOT_LAG_LIMIT", "50000")];
    eventually(SETTLED, async || {
        sql(&pair, "select pg_logical_emit_message(false, 'noise', repeat('x', 100000))").await;
        let (fine, found) = finding(&pair, "slot ", &limit).await;
        let says = !fine && found.contains("RELAY_SLOT_LAG_LIMIT") && found.contains("NATS");
        if says { Ok(()) } else { Err(found) }
    })
    .await;

    pair.relay.process().kill().unwrap();
    until_unread(&pair).await;
    assert_needs(&finding(&pair, "slot ", &[]).await, &["nobody reads it", "log of the relay"]);
    let outbox = [("RELAY_SOURCE", "outbox")];
    assert_needs(&finding(&pair, "source", &outbox).await, &["nobody reads it", "`relay slot drop`"]);
    write_log(&pair, 2).await;
    assert_needs(
        &finding(&pair, "slot ", &limit).await,
        &["nobody reads it", "further behind than RELAY_SLOT_LAG_LIMIT"],
    );

    sql(&pair, "select pg_drop_replication_slot('outbox_relay')").await;
    let gone = ["does not exist", "changes are missing", "RELAY_GAP_POLICY=flush", "`relay slot accept-gap`"];
    assert_needs(&finding(&pair, "slot ", &[]).await, &gone);
    sql(&pair, "select pg_create_logical_replication_slot('outbox_relay', 'pgoutput')").await;
    assert_needs(&finding(&pair, "slot ", &[]).await, &["ahead of", "`relay slot accept-gap`"]);

    let (ok, text) = relay(&pair, &["slot", "drop"], &[]).await;
    assert!(ok, "{text}");
    assert_needs(&finding(&pair, "slot ", &[]).await, &["does not exist", "start a relay with --source wal"]);
    let (fine, found) = finding(&pair, "source", &outbox).await;
    assert!(fine && found.contains("outbox alone"), "{found}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_slot_is_said_everywhere_and_accepted_while_the_outbox_goes_on() {
    let both = [("RELAY_SOURCE", "outbox,wal")];
    let pair = captured_on(with_little_log(), USERS, USER_RULES, &both).await;
    fence(&pair).await;
    pair.relay.process().kill().unwrap();
    until_unread(&pair).await;
    lose_slot(&pair).await;
    pair.relay.process().start().unwrap();
    super::until_not_ready_because(&pair, "slot outbox_relay is lost").await;
    let reason = super::until_not_ready_because(&pair, "RELAY_GAP_POLICY").await;
    assert!(reason.contains("max_slot_wal_keep_size"), "{reason}");
    eventually(SETTLED, async || pair.relay.metric("relay_wal_slot_lost").await.unwrap() > 0.5).await;
    assert_needs(
        &finding(&pair, "slot ", &[]).await,
        &["lost", "RELAY_GAP_POLICY=flush", "`relay slot accept-gap`"],
    );

    pair.fill("cart:1").await.unwrap();
    pair.enqueue(&["cart:1"]).await.unwrap();
    pair.until_none("cart:1").await;

    let (ok, text) = relay(&pair, &["slot", "accept-gap"], &[]).await;
    assert!(ok, "{text}");
    until_read(&pair).await;
    pair.relay.until_ready().await;
    assert_ne!(slot(&pair, "wal_status").await, "lost");
    eventually(SETTLED, async || pair.relay.metric("relay_wal_slot_lost").await.unwrap() < 0.5).await;
    fence(&pair).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slot_that_another_program_reads_is_not_taken_for_one_that_a_relay_reads() {
    let pair = users().await;
    let second = pair.another_relay(&[]).unwrap();
    fence(&pair).await;
    // Whichever of the two stands by: another relay on the slot is as it should be.
    second.until_ready().await;
    pair.relay.until_ready().await;
    second.process().terminate().await.unwrap();
    pair.relay.process().terminate().await.unwrap();
    until_unread(&pair).await;
    let holder = super::alarm::hold_slot(&pair.stack.postgres_url()).await;
    let server = until_read(&pair).await;
    assert_needs(&finding(&pair, "slot ", &[]).await, &[&format!("process {server} 'holder'"), "no relay"]);
    let outbox = [("RELAY_SOURCE", "outbox")];
    assert_needs(&finding(&pair, "source", &outbox).await, &["'holder'", "stop that program"]);

    pair.relay.process().start().unwrap();
    super::until_not_ready_because(&pair, &format!("read by 'holder', process {server}")).await;
    let told =
        || pair.relay.process().log().matches("which is no relay; the write-ahead log is not read").count();
    tokio::time::sleep(std::time::Duration::from_secs(3)).await;
    assert_eq!(told(), 1, "said once, however often it is looked at");
    drop(holder);
    pair.relay.until_ready().await;
    fence(&pair).await;
}
