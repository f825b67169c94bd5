//! Reads and writes versioned rows from several processes, breaks things meanwhile, and checks every single read.

mod checker;
mod child;
mod clock;
mod faults;
mod field;
mod mode;
mod plain;
mod reader;
mod record;
mod report;
mod rows;
mod settle;
mod writer;

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use devstack::Binary;
use rand::SeedableRng;
use rand::rngs::StdRng;

use crate::paint::Paint;
use crate::programs::Programs;
use crate::{programs, servers};
use checker::{History, Tally};
use clock::now_ns;
use faults::{Fault, Faults, Journal};
use field::{Field, Setup};
use mode::Mode;
use report::Report;
use settle::Rest;

pub use child::{Arguments as ProcessArguments, run as run_process};

/// Faults at the same time.
const INJECTORS: u64 = 2;

/// How often daemons that ended by themselves are started again.
const RESTART_INTERVAL: Duration = Duration::from_millis(200);

/// Check that no read is ever stale
///
/// Several reader and writer processes work on versioned rows, on real servers and with the real pair, while processes
/// are killed and stopped, connections cut, answers lost and servers restarted. Every read is checked: it is stale if it
/// returned a version lower than the highest one whose commit was acknowledged before the read began. Fails if the
/// mode's promise is broken. Redis runs with appendfsync always: strict writes rely on what it has acknowledged.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// How readers and writers go about it
    #[arg(long, default_value = "strict")]
    mode: Mode,

    /// For how long, in seconds; coming to rest afterwards takes a few more
    #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    seconds: u64,

    /// What goes wrong: none, all, or a list separated by commas; an unknown name is answered with all of them
    #[arg(long, default_value = "all")]
    faults: Faults,

    /// Repeats the choices of an earlier run, though not its timing
    #[arg(long)]
    seed: Option<u64>,

    /// Rows; few of them are read and written most often
    #[arg(long, default_value_t = 40, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    rows: u32,

    /// Reader processes
    #[arg(long, default_value_t = 3)]
    readers: usize,

    /// Writer processes
    #[arg(long, default_value_t = 3)]
    writers: usize,

    /// A relay that is already built; this program is then not rebuilt in release either
    #[arg(long, hide = true, requires = "subscriber")]
    relay: Option<PathBuf>,

    /// A subscriber that is already built
    #[arg(long, hide = true, requires = "relay")]
    subscriber: Option<PathBuf>,

    /// Where to put the figures as JSON
    #[arg(long, hide = true)]
    summary: Option<PathBuf>,
}

/// Runs it and says what it found.
pub fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let programs = match (&arguments.relay, &arguments.subscriber) {
        (Some(relay), Some(subscriber)) => Programs { relay: relay.clone(), subscriber: subscriber.clone() },
        _ if cfg!(debug_assertions) => return programs::run_this_in_release("the checker"),
        _ => {
            servers::provide(Binary::SERVERS)?;
            println!("Building relay and subscriber in release; the first time this takes a few minutes.");
            programs::build()?
        }
    };
    let runtime = tokio::runtime::Runtime::new()?;
    let report = runtime.block_on(play(&programs, arguments))?;
    report.print();
    if let Some(path) = &arguments.summary {
        std::fs::write(path, report.summary().to_string())?;
    }
    Ok(if report.broken().is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

async fn play(programs: &Programs, arguments: &Arguments) -> anyhow::Result<Report> {
    let faults = arguments.faults.clone();
    let setup = Setup {
        mode: arguments.mode,
        seed: arguments.seed.unwrap_or_else(|| u64::from(rand::random::<u32>())),
        rows: arguments.rows,
        readers: arguments.readers,
        writers: arguments.writers,
        cancel: faults.0.contains(&Fault::Cancel),
    };
    progress(&format!("{} mode, seed {}, faults: {faults}", setup.mode.name(), setup.seed));
    let mut field = Field::prepare(programs, &setup).await?;
    let started_ns = now_ns();
    field.populate(&setup).await?;
    let (journal, duration) = (Journal::default(), Duration::from_secs(arguments.seconds));
    run_with_faults(&field, &setup, &faults, duration, &journal).await?;
    progress("coming to rest");
    let rest = settle::settle(&field, setup.mode, setup.rows).await?;
    progress("checking");
    let tally = tokio::task::block_in_place(|| check(&field, &rest))?;
    Ok(Report { setup, seconds: arguments.seconds, faults, journal, tally, rest, started_ns })
}

/// Lets readers and writers run for a while, with faults.
async fn run_with_faults(
    field: &Field,
    setup: &Setup,
    faults: &Faults,
    duration: Duration,
    journal: &Journal,
) -> anyhow::Result<()> {
    let stop = AtomicBool::new(false);
    let injectors = (0..INJECTORS).map(|injector| {
        let random = StdRng::seed_from_u64(setup.seed.wrapping_add(injector));
        faults::inject(field, &faults.0, journal, random, &stop)
    });
    let time = async {
        tokio::time::sleep(duration).await;
        stop.store(true, Ordering::Relaxed);
    };
    let running = async {
        tokio::join!(futures::future::try_join_all(injectors), time).0?;
        // What is down now has nobody else to start it.
        faults::restart_daemons(field)
    };
    let mut running = std::pin::pin!(running);
    loop {
        tokio::select! {
            ended = &mut running => return ended,
            () = tokio::time::sleep(RESTART_INTERVAL) => faults::restart_daemons(field)?,
        }
    }
}

/// Goes through all records twice: what is known when, then whether each read knew it.
fn check(field: &Field, rest: &Rest) -> anyhow::Result<Tally> {
    let records = field.all_records();
    let mut history = History::default();
    for path in &records {
        record::read(path, |record| history.learn(&record))?;
    }
    history.settle();
    let mut tally = Tally::new();
    for path in &records {
        record::read(path, |record| {
            let last = usize::try_from(record.row).ok().and_then(|row| rest.versions.get(row));
            tally.add(&record, &history, last.copied().unwrap_or(0));
        })?;
    }
    Ok(tally)
}

fn progress(text: &str) {
    println!("{}", Paint::for_stdout().dim(text));
}
