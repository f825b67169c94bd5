//! What the cache costs against plain commands through the same client.

mod operations;

use super::figures::Figure;
use super::numbers::rounded;
use super::{Scale, progress};
use operations::{Kind, Operations};

/// Callers at the same time.
const TASKS: [usize; 2] = [1, 64];

const TARGET_RATIO: f64 = 0.95;

/// Each way beside the plain one; every round measures all of them in turn, so that a change of the machine's mood meets
/// all.
const READS: [Kind; 2] = [Kind::PlainGet, Kind::Hit];
const REST: [Kind; 6] =
    [Kind::PlainGetSet, Kind::MissAndFill, Kind::Acquire, Kind::Fill, Kind::PlainDelete, Kind::MarkAndUnmark];

/// Measures it.
pub async fn measure(scale: Scale) -> anyhow::Result<Vec<Figure>> {
    let server = devstack::Redis::start_alone(devstack::RedisOptions::default()).await?;
    let operations = Operations::on(&server).await?;
    let mut figures = Vec::new();
    for tasks in TASKS {
        let rounds = scale.pick(5, 1);
        let count = scale.pick(20_000, 2_000);
        let [get, hit] = operations.best_of(rounds, READS, tasks, count).await?;
        let rest = operations.best_of(rounds, REST, tasks, count).await?;
        figures.push(of_hits(tasks, get, hit));
        figures.extend(of_the_rest(tasks, get, rest));
    }
    Ok(figures)
}

fn people(tasks: usize) -> String {
    if tasks == 1 { "1 caller".to_owned() } else { format!("{tasks} callers") }
}

fn of_hits(tasks: usize, get: f64, hit: f64) -> Figure {
    let (ratio, who) = (get / hit, people(tasks));
    // Microseconds of one caller; together they do so many a second.
    let rate = |us: f64| rounded(tasks_per_second(tasks, us));
    let measured = format!("{ratio:.3} of the rate of a plain GET: {}/s", rate(hit));
    progress(&format!("{who}: hit {measured}, GET {}/s", rate(get)));
    Figure::new(format!("{who}: hits of get_or_load"), measured, format!("GET {}/s", rate(get)))
        .with_target("≥ 0.95", ratio >= TARGET_RATIO)
}

fn of_the_rest(
    tasks: usize,
    get: f64,
    [get_set, miss, acquire, fill, delete, marks]: [f64; 6],
) -> Vec<Figure> {
    let who = people(tasks);
    let us = |number: f64| format!("{number:.0} µs");
    let figures = vec![
        Figure::new(
            format!("{who}: a miss of get_or_load with its fill"),
            us(miss),
            format!("GET and then SET {}", us(get_set)),
        ),
        Figure::new(
            format!("{who}: its lease, and its fill"),
            format!("{}, {}", us(acquire), us(fill)),
            format!("GET {}", us(get)),
        ),
        Figure::new(
            format!("{who}: what a strict commit adds, mark and unmark"),
            us(marks),
            format!("DEL after the commit {}", us(delete)),
        ),
    ];
    for figure in &figures {
        progress(&format!("{} {}; {}", figure.what, figure.measured, figure.beside));
    }
    figures
}

fn tasks_per_second(tasks: usize, us: f64) -> f64 {
    super::numbers::ratio(tasks as u64, 1) * 1e6 / us
}
