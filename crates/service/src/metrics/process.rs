//! Metrics of the process itself, under the names that Prometheus client libraries agree on.

use std::{fmt::Write as _, fs};

/// Appends what `/proc` tells at this moment; on a system without it, nothing.
pub(super) fn render(text: &mut String) {
    let stat = fs::read_to_string("/proc/self/stat").unwrap_or_default();
    write_metric(
        text,
        "process_cpu_seconds_total",
        "counter",
        "CPU time used, in seconds",
        cpu_seconds(&stat),
    );
    write_metric(
        text,
        "process_resident_memory_bytes",
        "gauge",
        "Resident memory, in bytes",
        resident_bytes(&stat),
    );
    write_metric(text, "process_open_fds", "gauge", "Open file descriptors", open_files());
    let started = fs::read_to_string("/proc/stat").ok().and_then(|system| start_seconds(&stat, &system));
    write_metric(
        text,
        "process_start_time_seconds",
        "gauge",
        "Start, in seconds since the Unix epoch",
        started,
    );
}

fn write_metric(text: &mut String, name: &str, kind: &str, help: &str, value: Option<f64>) {
    if let Some(value) = value {
        // Writing to a string cannot fail.
        let _infallible = writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}\n{name} {value}\n");
    }
}

/// A field of `/proc/self/stat` by its number in proc(5). The second may hold spaces but is in parentheses.
fn field(stat: &str, number: usize) -> Option<f64> {
    let after_name = stat.rsplit_once(") ")?.1;
    after_name.split_ascii_whitespace().nth(number.checked_sub(3)?)?.parse().ok()
}

fn ticks_per_second() -> f64 {
    u32::try_from(rustix::param::clock_ticks_per_second()).map_or(100.0, f64::from)
}

fn cpu_seconds(stat: &str) -> Option<f64> {
    Some((field(stat, 14)? + field(stat, 15)?) / ticks_per_second())
}

fn resident_bytes(stat: &str) -> Option<f64> {
    let page = u32::try_from(rustix::param::page_size()).ok()?;
    Some(field(stat, 24)? * f64::from(page))
}

fn open_files() -> Option<f64> {
    // The directory's own descriptor is among those listed.
    let listed = fs::read_dir("/proc/self/fd").ok()?.count().saturating_sub(1);
    u32::try_from(listed).ok().map(f64::from)
}

fn start_seconds(stat: &str, system: &str) -> Option<f64> {
    let boot: f64 = system.lines().find_map(|line| line.strip_prefix("btime "))?.trim().parse().ok()?;
    Some(boot + field(stat, 22)? / ticks_per_second())
}

#[cfg(test)]
mod tests {
    use std::time::{SystemTime, UNIX_EPOCH};

    use super::*;

    fn value(text: &str, name: &str) -> f64 {
        let line = text.lines().find(|line| line.starts_with(name)).expect(name);
        line.rsplit_once(' ').unwrap().1.parse().unwrap()
    }

    #[test]
    fn a_program_name_with_spaces_and_parentheses_shifts_no_field() {
        let stat = "42 (a ) b) S 1 2 3 4 5 6 7 8 9 10 150 50 13 14 15 16 17 18 400 20 3";
        assert_eq!(field(stat, 3), None, "the state is a letter");
        assert_eq!(field(stat, 4), Some(1.0));
        assert_eq!(cpu_seconds(stat), Some(200.0 / ticks_per_second()));
        assert_eq!(start_seconds(stat, "cpu 1 2\nbtime 1000\n"), Some(1000.0 + 400.0 / ticks_per_second()));
    }

    #[test]
    fn the_test_process_itself_is_measured_plausibly() {
        let mut text = String::new();
        render(&mut text);
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs_f64();
        let age = now - value(&text, "process_start_time_seconds");
        assert!((-5.0..3_600.0).contains(&age), "started {age} s ago");
        assert!(value(&text, "process_resident_memory_bytes") > 1_000_000.0);
        assert!(value(&text, "process_open_fds") >= 3.0);
        assert!(value(&text, "process_cpu_seconds_total") >= 0.0);
    }

    #[test]
    fn what_cannot_be_read_is_left_out() {
        let mut text = String::new();
        write_metric(&mut text, "process_open_fds", "gauge", "Open file descriptors", None);
        assert!(text.is_empty());
    }
}
