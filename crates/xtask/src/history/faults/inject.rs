//! Makes faults happen, and undoes each.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use devstack::proxy::{FaultProxy, Mode};
use devstack::{Postgres, Process};
use rand::Rng;
use rand::rngs::StdRng;
use tokio::time::sleep;

use super::{Fault, Journal};
use crate::daemon::Daemon;
use crate::history::clock::now_ns;
use crate::history::field::{Field, Target};
use crate::wait;

/// Longest time that something is stopped, stalled or losing bytes, and between two faults, in milliseconds.
const LONGEST_TROUBLE_MS: u64 = 1_200;
const LONGEST_PEACE_MS: u64 = 250;

/// Longest time that something killed stays away.
const LONGEST_ABSENCE_MS: u64 = 300;

/// How much later bytes arrive on a slow line.
const DELAY: Duration = Duration::from_millis(20);

/// How long Postgres may take to come back or to answer.
const PATIENCE: Duration = Duration::from_secs(30);

/// One fault after the other until `stop`; what is in trouble then recovers first. Several of these may run at a time.
/// Blocks now and then, so it belongs on no thread on which the lines' proxies depend.
pub async fn inject(
    field: &Field,
    faults: &[Fault],
    journal: &Journal,
    mut random: StdRng,
    stop: &AtomicBool,
) -> anyhow::Result<()> {
    let faults: Vec<Fault> = faults.iter().copied().filter(|fault| *fault != Fault::Cancel).collect();
    while !faults.is_empty() && !stop.load(Ordering::Relaxed) {
        sleep(Duration::from_millis(random.random_range(0..=LONGEST_PEACE_MS))).await;
        let fault = faults[random.random_range(0..faults.len())];
        let from_ns = now_ns();
        if let Some(target) = happen(fault, field, &mut random).await? {
            journal.add(fault, &target, from_ns);
        }
    }
    Ok(())
}

/// Makes one happen, and says to whom. `None` if it cannot happen now: its target is in other trouble, or takes no part.
async fn happen(fault: Fault, field: &Field, random: &mut StdRng) -> anyhow::Result<Option<String>> {
    let itself: fn(&Process) -> &Process = |process| process;
    let (relay, subscriber) = (field.relay.as_ref(), field.subscriber.as_ref());
    match fault {
        Fault::KillWriter => kill_one(one(&field.writers, random), itself, random).await,
        Fault::StopWriter => stop_one(one(&field.writers, random), itself, random).await,
        Fault::KillReader => kill_one(one(&field.readers, random), itself, random).await,
        Fault::StopReader => stop_one(one(&field.readers, random), itself, random).await,
        Fault::KillRelay => kill_one(relay, Daemon::process, random).await,
        Fault::StopRelay => stop_one(relay, Daemon::process, random).await,
        Fault::KillSubscriber => kill_one(subscriber, Daemon::process, random).await,
        Fault::StopSubscriber => stop_one(subscriber, Daemon::process, random).await,
        Fault::Cut
        | Fault::LoseRequests
        | Fault::LoseReplies
        | Fault::LoseReply
        | Fault::Stall
        | Fault::Delay => {
            let Some(line) = one(&field.lines, random) else { return Ok(None) };
            let Ok(_busy) = line.busy.try_lock() else { return Ok(None) };
            disturb(fault, &line.it, random).await;
            Ok(Some(line.name.clone()))
        }
        Fault::RestartRedis => {
            let Ok(_busy) = field.redis_trouble.try_lock() else { return Ok(None) };
            field.stack.redis.kill()?;
            absence(random).await;
            field.stack.redis.start().await?;
            Ok(Some("Redis".to_owned()))
        }
        Fault::RestartNats => {
            let Ok(_busy) = field.nats_trouble.try_lock() else { return Ok(None) };
            field.stack.nats.kill()?;
            absence(random).await;
            field.stack.nats.start().await?;
            Ok(Some("NATS".to_owned()))
        }
        Fault::RestartPostgres => {
            let Ok(_busy) = field.postgres_trouble.try_lock() else { return Ok(None) };
            field.stack.postgres.kill()?;
            absence(random).await;
            field.stack.postgres.start().await?;
            Ok(Some("Postgres".to_owned()))
        }
        Fault::LateCommit => {
            let Ok(_busy) = field.postgres_trouble.try_lock() else { return Ok(None) };
            late_commit(field, random).await.map(Some)
        }
        Fault::Cancel => Ok(None),
    }
}

fn one<'a, T>(targets: &'a [Target<T>], random: &mut StdRng) -> Option<&'a Target<T>> {
    if targets.is_empty() { None } else { targets.get(random.random_range(0..targets.len())) }
}

async fn kill_one<T>(
    target: Option<&Target<T>>,
    process: fn(&T) -> &Process,
    random: &mut StdRng,
) -> anyhow::Result<Option<String>> {
    let Some(target) = target else { return Ok(None) };
    let Ok(_busy) = target.busy.try_lock() else { return Ok(None) };
    let process = process(&target.it);
    if !process.is_running() {
        return Ok(None);
    }
    process.kill()?;
    absence(random).await;
    process.start()?;
    Ok(Some(target.name.clone()))
}

async fn stop_one<T>(
    target: Option<&Target<T>>,
    process: fn(&T) -> &Process,
    random: &mut StdRng,
) -> anyhow::Result<Option<String>> {
    let Some(target) = target else { return Ok(None) };
    let Ok(_busy) = target.busy.try_lock() else { return Ok(None) };
    let process = process(&target.it);
    if !process.is_running() {
        return Ok(None);
    }
    process.stop()?;
    trouble(random).await;
    process.resume()?;
    Ok(Some(target.name.clone()))
}

async fn disturb(fault: Fault, line: &FaultProxy, random: &mut StdRng) {
    let mode = match fault {
        Fault::LoseRequests => Mode::DropToServer,
        Fault::LoseReplies => Mode::DropToClient,
        Fault::LoseReply => Mode::DropReplyOnce,
        Fault::Stall => Mode::Stall,
        Fault::Delay => Mode::Delay(DELAY),
        _ => {
            line.reset_connections();
            return;
        }
    };
    line.set_mode(mode);
    trouble(random).await;
    line.set_mode(Mode::Pass);
    if matches!(fault, Fault::LoseRequests | Fault::LoseReplies) {
        line.reset_connections();
    }
}

/// Holds all commits between the write-ahead log and visibility, as a synchronous standby that is away does, and kills a
/// writer that may be waiting for one.
async fn late_commit(field: &Field, random: &mut StdRng) -> anyhow::Result<String> {
    let postgres = &field.stack.postgres;
    standby(postgres, "ghost").await?;
    trouble(random).await;
    let mut killed = None;
    if let Some(writer) = one(&field.writers, random)
        && let Ok(busy) = writer.busy.try_lock()
    {
        writer.it.kill()?;
        killed = Some((writer, busy));
        absence(random).await;
    }
    standby(postgres, "").await?;
    if let Some((writer, _busy)) = &killed {
        writer.it.start()?;
    }
    Ok(killed.map_or_else(|| "nobody died".to_owned(), |(writer, _)| format!("{} died", writer.name)))
}

async fn standby(postgres: &Postgres, name: &str) -> anyhow::Result<()> {
    wait::until("Postgres takes a setting", PATIENCE, async || {
        postgres.query(&format!("alter system set synchronous_standby_names = '{name}'")).await?;
        postgres.query("select pg_reload_conf()").await?;
        Ok(Some(()))
    })
    .await
}

async fn trouble(random: &mut StdRng) {
    sleep(Duration::from_millis(random.random_range(20..=LONGEST_TROUBLE_MS))).await;
}

async fn absence(random: &mut StdRng) {
    sleep(Duration::from_millis(random.random_range(0..=LONGEST_ABSENCE_MS))).await;
}
