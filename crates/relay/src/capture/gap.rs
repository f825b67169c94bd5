//! Changes that the slot cannot give any more: found, and answered by the gap policy.

use metrics::counter;
use outbox::capture::{self as recorded, Position};
use service::Component;
use wal::Lsn;
use wal::session::Identity;
use wal::slot::{self, SlotState};

use super::Capture;
use super::events::{of_missing_changes, of_several};
use super::opening::{OpenError, create_slot, position};
use crate::config::GapPolicy;
use crate::metrics as names;

/// Why changes may be missing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Gap {
    /// The slot is gone.
    #[error("the slot that was read does not exist any more{}", failover(*.0))]
    Missing(bool),
    /// Postgres has removed log that the slot needed.
    #[error("the slot is lost: Postgres has removed log that was not read yet (max_slot_wal_keep_size)")]
    Lost,
    /// The slot has passed changes that were not published.
    #[error("the slot is ahead of what was published: it was created again, or somebody else read it")]
    Ahead,
    /// What the slot decodes next was committed while there was no publication.
    #[error("the publication did not exist at the position of the slot: it was dropped and created again")]
    NoPublication,
    /// This is another cluster.
    #[error("this is another Postgres cluster than the one that was read")]
    OtherCluster,
}

fn failover(failed_over: bool) -> &'static str {
    if failed_over { " (Postgres has failed over to a server without it)" } else { "" }
}

/// Compares what was recorded with what is there. `unreadable` is the position from which the slot could not be read for
/// want of a publication.
pub(super) fn find(
    before: Option<&Position>,
    slot: Option<&SlotState>,
    now: &Identity,
    unreadable: Option<Lsn>,
) -> Option<Gap> {
    if slot.is_some_and(SlotState::is_lost) {
        return Some(Gap::Lost);
    }
    // Nothing was read yet, so nothing is missing.
    let before = before?;
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

/// Carries out the gap policy: halts, or begins anew and declares every key stale that the rules can name.
pub(super) async fn close(
    capture: &Capture,
    gap: Gap,
    existing: Option<SlotState>,
    identity: &Identity,
    health: &Component,
) -> Result<(), OpenError> {
    let policy = capture.config.gap_policy;
    if policy == GapPolicy::Halt {
        return Err(gap.into());
    }
    let pool = &capture.shared.pool;
    let name = &capture.config.slot;
    let usable = existing.filter(|state| !state.is_lost() && gap != Gap::NoPublication);
    let begins_at = match usable {
        Some(state) => state.confirmed,
        None => {
            if gap == Gap::NoPublication {
                slot::discard(pool, name).await?;
            } else {
                slot::discard_lost(pool, name).await?;
            }
            create_slot(capture, health).await?
        }
    };
    // In this order: what commits from here on is in the slot, what committed before is flushed. Until the new position
    // is recorded the gap is found again.
    flush(capture, health).await;
    recorded::begin(pool, name, &position(identity, begins_at)).await?;
    counter!(names::CAPTURE_GAPS, "policy" => policy.as_str()).increment(1);
    tracing::warn!(slot = name, "{gap}; every key that the rules can name was declared stale");
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
        }
    }

    fn identity(system_id: &str, timeline: i64) -> Identity {
        Identity { system_id: system_id.to_owned(), timeline, flushed: Lsn(500) }
    }

    #[test]
    fn every_way_to_miss_changes_is_found_and_nothing_else() {
        let before = Position { system_id: "a".to_owned(), timeline: 1, confirmed: 100 };
        let find = |slot: Option<&SlotState>, now| find(Some(&before), slot, &now, None);
        assert_eq!(find(Some(&slot(100, "reserved")), identity("a", 1)), None);
        assert_eq!(find(Some(&slot(90, "extended")), identity("a", 1)), None, "it goes on from before");
        assert_eq!(find(Some(&slot(101, "reserved")), identity("a", 1)), Some(Gap::Ahead));
        assert_eq!(find(Some(&slot(100, "lost")), identity("a", 1)), Some(Gap::Lost));
        assert_eq!(find(None, identity("a", 1)), Some(Gap::Missing(false)));
        assert_eq!(find(None, identity("a", 2)), Some(Gap::Missing(true)));
        assert_eq!(find(Some(&slot(100, "reserved")), identity("b", 1)), Some(Gap::OtherCluster));
        assert_eq!(
            find(Some(&slot(100, "reserved")), identity("a", 2)),
            None,
            "a slot that failed over as well"
        );
        let unreadable =
            |at| super::find(Some(&before), Some(&slot(100, "reserved")), &identity("a", 1), Some(Lsn(at)));
        assert_eq!(unreadable(100), Some(Gap::NoPublication));
        assert_eq!(unreadable(99), None, "another slot by now");
        assert_eq!(super::find(None, None, &identity("a", 1), None), None, "the first start");
    }
}
