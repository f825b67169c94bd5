//! The write-ahead log: server, slot, publication.

use outbox::capture::{self as recorded, Position};
use rules::Rules;
use service::Report;
use sqlx::PgPool;
use wal::publication;
use wal::slot::{self, ServerFacts, SlotState, Standbys};

use super::{Finding, finding};
use crate::admin::slot::describe;
use crate::capture::{ReadElsewhere, check_rules};
use crate::config::{Config, Source};

/// Looks at everything that capture from the log needs.
pub(super) async fn judge(pool: &PgPool, config: &Config) -> anyhow::Result<Vec<Finding>> {
    let state = slot::find(pool, &config.capture.slot).await?;
    if !config.capture.has(Source::Wal) {
        return Ok(vec![judge_without(config, state.as_ref())]);
    }
    let facts = slot::server_facts(pool).await?;
    let mut findings = judge_server(&facts, state.is_some());
    let record = recorded::find(pool, &config.capture.slot).await?;
    // Of what an operator has accepted nothing is missing.
    let recorded = record.filter(|record| !record.begin_anew).map(|record| record.position);
    findings.push(judge_slot(config, state.as_ref(), recorded.as_ref()));
    if !facts.is_standby {
        findings.extend(judge_failover(&facts, state.as_ref(), &slot::standbys(pool).await?));
    }
    findings.extend(judge_rules(pool, config).await?);
    Ok(findings)
}

/// Without a reader a slot fills the disk.
fn judge_without(config: &Config, state: Option<&SlotState>) -> Finding {
    let name = &config.capture.slot;
    match state {
        Some(state) if state.active_pid.is_none() => finding(
            "source",
            format!("this relay does not read the write-ahead log, and slot {}", describe(name, Some(state))),
            false,
            "run a relay with --source outbox,wal, or `relay slot drop`: log is kept for it until the disk is full",
        ),
        Some(state) if ReadElsewhere::find(name, state).is_some() => finding(
            "source",
            format!("this relay does not read the write-ahead log; slot {}", describe(name, Some(state))),
            false,
            "the slot is read by a program that is no relay, and passes changes by: stop that program",
        ),
        Some(state) => {
            finding("source", format!("another relay reads slot {}", describe(name, Some(state))), true, "")
        }
        None => finding(
            "source",
            "outbox alone: what services write after outbox::through_wal() is not seen".to_owned(),
            true,
            "",
        ),
    }
}

fn judge_server(facts: &ServerFacts, slot_exists: bool) -> Vec<Finding> {
    vec![
        finding(
            "wal level",
            facts.wal_level.clone(),
            facts.wal_level == "logical",
            "set wal_level = logical in postgresql.conf and restart Postgres",
        ),
        finding(
            "slots",
            format!("{} of {} taken, {} senders", facts.slots, facts.max_slots, facts.max_wal_senders),
            facts.max_wal_senders > 0 && (slot_exists || facts.slots < facts.max_slots),
            "raise max_replication_slots and max_wal_senders and restart Postgres, or drop a slot nobody reads",
        ),
        finding(
            "role",
            if facts.may_replicate { "may replicate" } else { "may not replicate" }.to_owned(),
            facts.may_replicate,
            "`alter role … replication`; on RDS grant it rds_replication",
        ),
        finding(
            "log limit",
            facts.keep_limit_mb.map_or(
                "max_slot_wal_keep_size is not set: a slot that nobody reads fills the disk".to_owned(),
                |limit| format!("max_slot_wal_keep_size = {limit} MB"),
            ),
            facts.keep_limit_mb.is_some(),
            "set max_slot_wal_keep_size to what the disk can spare: then a slot nobody reads is lost rather than the server",
        ),
        finding(
            "primary",
            if facts.is_standby { "no" } else { "yes" }.to_owned(),
            !facts.is_standby,
            "connect to the primary",
        ),
    ]
}

fn judge_slot(config: &Config, state: Option<&SlotState>, recorded: Option<&Position>) -> Finding {
    let fact = describe(&config.capture.slot, state);
    let remedies: Vec<&str> = match (state, recorded) {
        (None, None) => vec!["start a relay with --source wal: it creates the slot"],
        (None, Some(_)) => vec![
            "changes are missing: it was dropped, or Postgres failed over without it; RELAY_GAP_POLICY=flush, or \
             `relay slot accept-gap`",
        ],
        (Some(state), _) if state.is_lost() => {
            vec!["changes are missing; RELAY_GAP_POLICY=flush, or `relay slot accept-gap`"]
        }
        (Some(state), Some(recorded)) if state.confirmed.0 > recorded.confirmed => vec![
            "it is ahead of what was published: created again, or read by somebody else; RELAY_GAP_POLICY=flush, or \
             `relay slot accept-gap`",
        ],
        (Some(state), _) => judge_lag(config, state),
    };
    let remedy = (!remedies.is_empty()).then(|| remedies.join("; "));
    Finding { subject: "slot", fact, remedy }
}

/// Says whether the slot survives a failover, where there is a standby or Postgres could keep a copy.
fn judge_failover(facts: &ServerFacts, slot: Option<&SlotState>, standbys: &Standbys) -> Option<Finding> {
    let finding =
        |fact: &str, remedy: &str| Some(finding("failover", fact.to_owned(), remedy.is_empty(), remedy));
    let has_standby = standbys.connected > 0;
    if facts.version < slot::KEEPS_SLOTS_ON_STANDBYS {
        let fact = "a standby has no copy of the slot before Postgres 17: a failover is a gap";
        return has_standby.then(|| finding(fact, "")).flatten();
    }
    if slot?.failover != Some(true) {
        let remedy = "start a relay of this release with --source wal: it alters the slot when it opens it";
        return finding("no standby may keep a copy of the slot: a failover is a gap", remedy);
    }
    if has_standby && standbys.awaited.as_deref().is_none_or(str::is_empty) {
        let remedy = "let the standby keep a copy (sync_replication_slots, hot_standby_feedback, primary_slot_name, dbname in \
                      primary_conninfo), and name its physical slot in synchronized_standby_slots";
        return finding(
            "logical slots may run ahead of the standbys, and do not survive a failover then",
            remedy,
        );
    }
    finding("standbys may keep a copy of the slot", "")
}

fn judge_lag(config: &Config, state: &SlotState) -> Vec<&'static str> {
    let mut remedies = Vec::new();
    if state.wal_status == "unreserved" {
        remedies.push("it is about to be lost: see why the relay lags, raise max_slot_wal_keep_size");
    }
    if ReadElsewhere::find(&config.capture.slot, state).is_some() {
        remedies.push("the program that reads it is no relay: stop it, or choose another name in RELAY_SLOT");
    }
    if state.active_pid.is_none() {
        remedies.push("no relay reads it: see the log of the relay");
    }
    if u64::try_from(state.lag_bytes).unwrap_or(0) > config.capture.slot_lag_limit {
        remedies.push(
            "further behind than RELAY_SLOT_LAG_LIMIT: is NATS reachable, is a huge transaction being decoded?",
        );
    }
    remedies
}

async fn judge_rules(pool: &PgPool, config: &Config) -> anyhow::Result<Vec<Finding>> {
    let Some(file) = &config.capture.rules else {
        return Ok(vec![finding("rules", "RELAY_RULES is not set".to_owned(), false, "name the rules file")]);
    };
    let rules = match Rules::load(file) {
        Ok(rules) => rules,
        Err(error) => {
            return Ok(vec![finding(
                "rules",
                Report::of(&error).to_string(),
                false,
                "correct the rules file",
            )]);
        }
    };
    let tables = match publication::resolve(pool, &rules).await {
        Ok(tables) => tables,
        Err(error) => {
            return Ok(vec![finding(
                "rules",
                Report::of(&error).to_string(),
                false,
                "correct the rules, or create the table",
            )]);
        }
    };
    let mut findings = Vec::new();
    if let Err(error) = check_rules(pool, &config.capture, &rules).await {
        findings.push(finding(
            "rules",
            Report::of(&error).to_string(),
            false,
            "correct the rules, or alter the table",
        ));
    }
    let drift = publication::drift(pool, &config.capture.publication, &tables).await?;
    findings.push(finding(
        "publication",
        format!(
            "{} {}",
            config.capture.publication,
            drift
                .as_ref()
                .map_or("is for exactly the tables of the rules".to_owned(), |drift| format!("{drift}"))
        ),
        drift.is_none(),
        "the relay that reads the log corrects it within seconds, and declares stale what was missing, unless it is for all tables: \
         drop it then",
    ));
    Ok(findings)
}
