mod log;

use std::time::Duration;

use anyhow::bail;
use async_nats::jetstream::stream::Info;
use chrono::{DateTime, Utc};
use event::nats::STREAM;
use outbox::backlog::{self, Backlog};
use outbox::dead_letters;
use outbox::diagnosis::{self, Facts};
use service::nats::{Account, JetStreamError};
use service::{Report, printable};
use sqlx::PgPool;

use super::{Looked, look_at_stream, rules};
use crate::config::{Config, Source};
use crate::stream::{self, Judgement};

/// The oldest Postgres with everything the outbox uses (`xid8`, `pg_current_xact_id`).
const OLDEST_POSTGRES: i32 = 140_000;

/// A transaction open for longer keeps dead rows of the outbox from being vacuumed.
const OLD_TRANSACTION: Duration = Duration::from_mins(1);

/// More dead rows than autovacuum would let stand if it came through.
const MANY_DEAD_TUPLES: i64 = 200_000;

/// Clocks further apart than this make every reported latency wrong.
const MAX_CLOCK_SKEW: Duration = Duration::from_millis(500);

/// Part of a limit of JetStream from which on somebody should act.
const FULL: f64 = 0.8;

/// An event that waits for longer is not on its way.
const OLD_BACKLOG: Duration = Duration::from_mins(1);

/// Counting stops here.
const BACKLOG_LIMIT: i64 = 100_000;

/// One thing that was looked at.
struct Finding {
    subject: &'static str,
    fact: String,
    /// What to do, if it is not fine as it is.
    remedy: Option<String>,
}

/// Prints every finding; fails if one needs action.
pub(super) async fn print(pool: &PgPool, config: &Config) -> anyhow::Result<()> {
    let before = Utc::now();
    let facts = diagnosis::facts(pool).await?;
    let skew = clock_skew(before, Utc::now(), facts.now);
    let mut findings = judge_database(&facts, skew);
    findings.push(judge_backlog(&backlog::measure(pool, BACKLOG_LIMIT).await?));
    findings.push(judge_dead_letters(dead_letters::count(pool).await?));
    // Who reads the log by the rules needs no triggers.
    if config.capture.rules.is_some() && !config.capture.has(Source::Wal) {
        findings.push(judge_triggers(rules::missing(pool, config).await));
    }
    findings.extend(log::judge(pool, config).await?);
    match look_at_stream(config).await {
        Ok((nats, looked)) => {
            match &looked {
                Some(looked) => findings.extend(judge_stream(looked, &nats.client.server_info(), config)),
                None => findings.push(finding(
                    "stream",
                    format!("{STREAM} does not exist"),
                    false,
                    "start a relay: the relay creates the stream when it runs",
                )),
            }
            findings.push(judge_account(nats.account().await));
        }
        Err(error) => findings.push(Finding {
            subject: "stream",
            fact: format!("not reachable: {}", Report::of(error.as_ref())),
            remedy: Some("correct what is named, and look again".to_owned()),
        }),
    }
    for finding in &findings {
        let mark = if finding.remedy.is_some() { "!!" } else { "ok" };
        println!("{mark}  {:<14} {}", finding.subject, printable(&finding.fact));
        if let Some(remedy) = &finding.remedy {
            println!("    {:<14} -> {}", "", printable(remedy));
        }
    }
    match findings.iter().filter(|finding| finding.remedy.is_some()).count() {
        0 => Ok(()),
        count => bail!("{count} of {} findings need action", findings.len()),
    }
}

fn finding(subject: &'static str, fact: String, is_fine: bool, remedy: &str) -> Finding {
    Finding { subject, fact, remedy: (!is_fine).then(|| remedy.to_owned()) }
}

fn judge_database(facts: &Facts, skew: Duration) -> Vec<Finding> {
    let uses_index = facts.claim_plan.iter().any(|line| line.contains("Index Scan using events_pkey"));
    let last_vacuum = facts.last_vacuum.map_or("never".to_owned(), |at| at.to_rfc3339());
    let mut findings = vec![
        finding(
            "postgres",
            format!("version {}", facts.server_version),
            facts.server_version_number >= OLDEST_POSTGRES,
            "upgrade to Postgres 14 or later",
        ),
        finding(
            "claim",
            if uses_index { "uses the index events_pkey".to_owned() } else { facts.claim_plan.join(" / ") },
            uses_index,
            "the claim does not use the index; run `reindex table outbox.events; analyze outbox.events`",
        ),
        finding(
            "autovacuum",
            format!(
                "{}, {} dead rows, {:.1} MB, last vacuum {last_vacuum}",
                if facts.autovacuum { "on" } else { "off" },
                facts.dead_tuples,
                megabytes(facts.table_bytes)
            ),
            facts.autovacuum && facts.dead_tuples < MANY_DEAD_TUPLES,
            "turn autovacuum on for outbox.events, end what holds it back (see below), then `vacuum outbox.events`",
        ),
        finding(
            "durability",
            format!("synchronous_commit = {}", facts.synchronous_commit),
            facts.synchronous_commit != "off",
            "a crash of Postgres loses commits that were confirmed, and with them their events; set it to on",
        ),
        finding(
            "clock",
            format!("{:.0} ms between here and Postgres", skew.as_secs_f64() * 1000.0),
            skew <= MAX_CLOCK_SKEW,
            "latencies are measured across both clocks; synchronize them with NTP",
        ),
    ];
    if let Some(old) = &facts.oldest_transaction {
        findings.push(finding(
            "transaction",
            format!(
                "oldest open for {:.0} s: pid {}, application '{}', {}",
                old.age.as_secs_f64(),
                old.pid,
                old.application,
                old.state
            ),
            old.age <= OLD_TRANSACTION,
            "it keeps dead rows from being vacuumed; end it, or set idle_in_transaction_session_timeout",
        ));
    }
    findings
}

fn judge_dead_letters(count: i64) -> Finding {
    finding(
        "dead letters",
        count.to_string(),
        count == 0,
        "look at them with `relay dead list`, then replay or discard",
    )
}

/// Triggers that the rules want and the database lacks, such as those on a new partition.
fn judge_triggers(missing: anyhow::Result<Option<Vec<String>>>) -> Finding {
    match missing {
        Ok(missing) => {
            let missing = missing.unwrap_or_default();
            let fact = match missing.as_slice() {
                [] => "what the rules say".to_owned(),
                steps => format!("not what the rules say: {}", steps.join(", ")),
            };
            finding(
                "triggers",
                fact,
                missing.is_empty(),
                "if capture is by triggers, run `relay rules apply`",
            )
        }
        Err(error) => Finding {
            subject: "triggers",
            fact: Report::of(error.as_ref()).to_string(),
            remedy: Some("correct the rules; see `relay rules check`".to_owned()),
        },
    }
}

/// The limits of the account. Those of the server are not shown to clients; what they do shows in the backlog.
fn judge_account(account: Result<Account, JetStreamError>) -> Finding {
    let account = match account {
        Ok(account) => account,
        Err(error) => {
            return finding(
                "account",
                format!("limits not known: {}", Report::of(&error)),
                false,
                "let the NATS user publish on $JS.API.INFO",
            );
        }
    };
    let used = megabytes(account.used_bytes);
    match account.limit_bytes {
        Some(limit) => finding(
            "account",
            format!("{used:.1} of {:.1} MB of JetStream storage", megabytes(limit)),
            used < FULL * megabytes(limit),
            "nearly full; raise the limit of the NATS account, otherwise events will wait in the outbox",
        ),
        None => finding("account", format!("{used:.1} MB of JetStream storage, no limit"), true, ""),
    }
}

/// Events that wait although nothing is wrong with the database.
fn judge_backlog(backlog: &Backlog) -> Finding {
    finding(
        "backlog",
        format!("{} events, oldest {:.1} s", backlog.events, backlog.oldest_age_seconds()),
        backlog.oldest_age_seconds() < OLD_BACKLOG.as_secs_f64(),
        "events wait: /readyz and log of the relay name the cause",
    )
}

fn judge_stream(looked: &Looked, server: &async_nats::ServerInfo, config: &Config) -> Vec<Finding> {
    let Looked { info, options } = looked;
    let actual = &info.config;
    let Judgement { unusable, risks } = stream::judge(options, config, server.max_payload);
    let replicas = info.cluster.as_ref().map_or(1, |cluster| cluster.replicas.len() + 1);
    let mut findings = vec![
        finding("nats", format!("version {}, max_payload {}", server.version, server.max_payload), true, ""),
        Finding {
            subject: "stream",
            fact: format!("{} with subjects {}", actual.name, actual.subjects.join(", ")),
            remedy: (!unusable.is_empty()).then(|| unusable.join("; ")),
        },
        finding("stream age", format!("keeps messages for {}", human(actual.max_age)), true, ""),
        finding("duplicates", format!("duplicate window {}", human(actual.duplicate_window)), true, ""),
        finding(
            "replicas",
            format!("{replicas}"),
            replicas >= usize::from(config.stream_replicas),
            "fewer copies than RELAY_STREAM_REPLICAS; edit the stream or check the cluster",
        ),
        finding(
            "stream size",
            match actual.max_bytes {
                limit if limit > 0 => format!("{:.1} of {:.1} MB", used(info), megabytes(limit)),
                _ => format!("{:.1} MB, no limit", used(info)),
            },
            actual.max_bytes <= 0 || used(info) < FULL * megabytes(actual.max_bytes),
            "nearly full; raise max_bytes, otherwise events will wait in the outbox",
        ),
    ];
    let remedy = format!("change it with `nats stream edit {STREAM}`");
    findings.extend(risks.into_iter().map(|risk| finding("option", risk, false, &remedy)));
    findings
}

/// Distance of two clocks, as far as the time the question took allows to say.
fn clock_skew(before: DateTime<Utc>, after: DateTime<Utc>, there: DateTime<Utc>) -> Duration {
    let ahead = (there - after).to_std().unwrap_or_default();
    let behind = (before - there).to_std().unwrap_or_default();
    ahead.max(behind)
}

fn human(time: Duration) -> String {
    if time.is_zero() { "ever".to_owned() } else { format!("{} s", time.as_secs()) }
}

#[expect(clippy::cast_precision_loss, reason = "shown with one decimal")]
fn used(info: &Info) -> f64 {
    info.state.bytes as f64 / 1e6
}

#[expect(clippy::cast_precision_loss, reason = "shown with one decimal")]
fn megabytes(bytes: i64) -> f64 {
    bytes as f64 / 1e6
}
