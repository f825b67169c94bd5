//! Changes that the slot cannot give any more: found, and answered by the gap policy.

use metrics::counter;
use outbox::capture::{Position, Record};
use service::Component;
use wal::Lsn;
use wal::session::Identity;
use wal::slot::{self, SlotState};

use super::Capture;
use super::events::{of_missing_changes, of_several};
use super::opening::{Begun, OpenError, create_slot};
use crate::config::GapPolicy;
use crate::metrics as names;

/// Why changes may be missing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Gap {
    /// The slot is gone.
    #[error("the slot that was read does not exist any more{}", failover(*.0))]
    Missing(bool),
    /// Postgres has removed log that the slot needed.
    #[error("the slot is lost: {0}")]
    Lost(&'static str),
    /// The slot has passed changes that were not published.
    #[error("the slot is ahead of what was published: it was created again, or somebody else read it")]
    Ahead,
    /// What the slot decodes next was committed while there was no publication.
    #[error(
        "the publication did not exist at the position of the slot, so what changed there cannot be read"
    )]
    NoPublication,
    /// This is another cluster.
    #[error("this is another Postgres cluster than the one that was read")]
    OtherCluster,
}

fn failover(failed_over: bool) -> &'static str {
    if failed_over { " (Postgres has failed over to a server without it)" } else { "" }
}

/// How reading begins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Beginning {
    /// With a new slot, before which nothing was ever read: nothing is declared stale.
    First,
    /// Where it ended.
    Resumed,
    /// Every key that the rules can name is declared stale, once the slot to be read exists.
    Anew {
        /// Why.
        cause: Cause,
        /// Whether the slot that exists is read. Otherwise a new one replaces it.
        keeps_slot: bool,
    },
    /// Not until somebody decides.
    Halted(Gap),
}

/// Why reading begins anew.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum Cause {
    /// The gap policy says so.
    #[error(transparent)]
    Gap(Gap),
    /// An operator says so.
    #[error("an operator has accepted that changes are missing, or dropped the slot")]
    Accepted,
    /// Nobody knows what was read of the slot, or whether the publication existed at its position.
    #[error("the slot was not created by a relay, or its position was forgotten")]
    Unrecorded,
}

/// Compares what was recorded with what is there. `unreadable` is the position from which the slot could not be read for
/// want of a publication.
pub(super) fn decide(
    record: Option<&Record>,
    slot: Option<&SlotState>,
    now: &Identity,
    unreadable: Option<Lsn>,
    policy: GapPolicy,
) -> Beginning {
    let anew = |cause| Beginning::Anew { cause, keeps_slot: false };
    match (record, slot) {
        (None, None) => Beginning::First,
        (None, Some(_)) => anew(Cause::Unrecorded),
        (Some(record), _) if record.begin_anew => anew(Cause::Accepted),
        (Some(record), _) => match find(&record.position, slot, now, unreadable) {
            None => Beginning::Resumed,
            Some(gap) if policy == GapPolicy::Halt => Beginning::Halted(gap),
            // Another reader may just have created it.
            Some(gap @ (Gap::Ahead | Gap::OtherCluster)) if slot.is_some() => {
                Beginning::Anew { cause: Cause::Gap(gap), keeps_slot: true }
            }
            Some(gap) => anew(Cause::Gap(gap)),
        },
    }
}

fn find(before: &Position, slot: Option<&SlotState>, now: &Identity, unreadable: Option<Lsn>) -> Option<Gap> {
    if let Some(slot) = slot.filter(|slot| slot.is_lost()) {
        return Some(Gap::Lost(slot.lost_because()));
    }
    // Created again by now, the slot is at another position.
    if slot.is_some_and(|slot| unreadable == Some(slot.confirmed)) {
        return Some(Gap::NoPublication);
    }
    if before.system_id != now.system_id {
        return Some(Gap::OtherCluster);
    }
    match slot {
        None => Some(Gap::Missing(before.timeline != now.timeline)),
        Some(slot) if slot.confirmed.0 > before.confirmed => Some(Gap::Ahead),
        Some(_) => None,
    }
}

/// Begins anew and declares every key stale that the rules can name.
pub(super) async fn begin_anew(
    capture: &Capture,
    cause: &Cause,
    kept: Option<&SlotState>,
    begun: &Begun<'_>,
    health: &Component,
) -> Result<(), OpenError> {
    let slot = &capture.config.slot;
    let begins_at = match kept {
        Some(state) => state.confirmed,
        None => {
            slot::discard(&capture.shared.pool, slot).await?;
            create_slot(capture, health).await?
        }
    };
    // In this order: what commits from here on is in the slot, what committed before is flushed. Creating the slot takes as
    // long as the oldest transaction. Until the new position is recorded it is found again that reading begins anew.
    flush(capture, health).await;
    begun.record(capture, begins_at).await?;
    if let Cause::Gap(_) = cause {
        counter!(names::CAPTURE_GAPS, "policy" => capture.config.gap_policy.as_str()).increment(1);
    }
    tracing::warn!(slot, "{cause}; every key that the rules can name was declared stale");
    Ok(())
}

/// Publishes the namespaces of all rules.
async fn flush(capture: &Capture, health: &Component) {
    let at_us = chrono::Utc::now().timestamp_micros();
    let events = capture.rules.tables().iter().flat_map(of_missing_changes).map(|event| {
        of_several(event.topic().clone(), event.keys().to_vec(), event.change().clone(), Vec::new(), at_us)
    });
    let events: Vec<_> = events.collect();
    let mut poison = Vec::new();
    super::pump::publish_surely(&capture.shared, &events, &mut poison, health).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slot(confirmed: u64, wal_status: &str) -> SlotState {
        SlotState {
            plugin: "pgoutput".to_owned(),
            database: "db".to_owned(),
            active_pid: None,
            reader: None,
            wal_status: wal_status.to_owned(),
            confirmed: Lsn(confirmed),
            lag_bytes: 0,
            retained_bytes: 0,
            safe_bytes: None,
            written: Lsn(confirmed),
            invalidation: None,
            failover: None,
        }
    }

    fn identity(system_id: &str, timeline: i64) -> Identity {
        Identity { system_id: system_id.to_owned(), timeline, flushed: Lsn(500) }
    }

    fn record(begin_anew: bool) -> Record {
        let position = Position { system_id: "a".to_owned(), timeline: 1, confirmed: 100 };
        Record { position, publication: None, begin_anew }
    }

    #[test]
    fn every_way_to_miss_changes_is_found_and_nothing_else() {
        let record = record(false);
        let found = |slot: Option<&SlotState>, now, unreadable: Option<u64>| match decide(
            Some(&record),
            slot,
            &now,
            unreadable.map(Lsn),
            GapPolicy::Halt,
        ) {
            Beginning::Halted(gap) => Some(gap),
            Beginning::Resumed => None,
            other => panic!("{other:?}"),
        };
        let find = |slot: Option<&SlotState>, now| found(slot, now, None);
        assert_eq!(find(Some(&slot(100, "reserved")), identity("a", 1)), None);
        assert_eq!(find(Some(&slot(90, "extended")), identity("a", 1)), None, "it goes on from before");
        assert_eq!(find(Some(&slot(101, "reserved")), identity("a", 1)), Some(Gap::Ahead));
        let lost = find(Some(&slot(100, "lost")), identity("a", 1)).unwrap().to_string();
        assert!(lost.contains("max_slot_wal_keep_size"), "{lost}");
        assert_eq!(find(None, identity("a", 1)), Some(Gap::Missing(false)));
        assert_eq!(find(None, identity("a", 2)), Some(Gap::Missing(true)));
        assert_eq!(find(Some(&slot(100, "reserved")), identity("b", 1)), Some(Gap::OtherCluster));
        assert_eq!(
            find(Some(&slot(100, "reserved")), identity("a", 2)),
            None,
            "a slot that failed over as well"
        );
        let unreadable = |at| found(Some(&slot(100, "reserved")), identity("a", 1), Some(at));
        assert_eq!(unreadable(100), Some(Gap::NoPublication));
        assert_eq!(unreadable(99), None, "another slot by now");
    }

    #[test]
    fn a_slot_that_is_given_up_for_another_reason_is_not_blamed_on_the_size_of_the_log() {
        let mut idle = slot(100, "lost");
        idle.invalidation = Some("idle_timeout".to_owned());
        assert!(idle.lost_because().contains("idle_replication_slot_timeout"));
        idle.invalidation = Some("wal_removed".to_owned());
        assert!(idle.lost_because().contains("max_slot_wal_keep_size"));
    }

    #[test]
    fn only_the_very_first_slot_is_read_without_declaring_anything_stale() {
        use GapPolicy::{Flush, Halt};
        let decide = |record: Option<&Record>, slot: Option<&SlotState>, policy| {
            decide(record, slot, &identity("a", 1), None, policy)
        };
        let anew = |cause| Beginning::Anew { cause, keeps_slot: false };
        let (there, ahead, lost) = (slot(100, "reserved"), slot(101, "reserved"), slot(100, "lost"));
        for policy in [Flush, Halt] {
            assert_eq!(decide(None, None, policy), Beginning::First);
            assert_eq!(decide(None, Some(&there), policy), anew(Cause::Unrecorded));
            assert_eq!(decide(None, Some(&lost), policy), anew(Cause::Unrecorded));
            assert_eq!(decide(Some(&record(true)), Some(&there), policy), anew(Cause::Accepted));
            assert_eq!(decide(Some(&record(true)), None, policy), anew(Cause::Accepted));
        }
        let missing = Gap::Missing(false);
        assert_eq!(decide(Some(&record(false)), None, Halt), Beginning::Halted(missing.clone()));
        assert_eq!(decide(Some(&record(false)), None, Flush), anew(Cause::Gap(missing)));
        let kept = Beginning::Anew { cause: Cause::Gap(Gap::Ahead), keeps_slot: true };
        assert_eq!(decide(Some(&record(false)), Some(&ahead), Flush), kept);
    }
}
