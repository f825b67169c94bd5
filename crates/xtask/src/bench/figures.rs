//! The table of results.

use crate::paint::Paint;

/// One row.
#[derive(Debug)]
pub struct Figure {
    /// What was measured.
    pub what: String,
    /// The result.
    pub measured: String,
    /// The raw limit or the plain way, from the same run.
    pub beside: String,
    /// What it has to reach.
    pub target: Option<Target>,
}

/// A target and whether it was met.
#[derive(Debug)]
pub struct Target {
    text: String,
    met: bool,
}

impl Figure {
    /// A row without a target.
    pub fn new(what: impl Into<String>, measured: impl Into<String>, beside: impl Into<String>) -> Self {
        Self { what: what.into(), measured: measured.into(), beside: beside.into(), target: None }
    }

    /// The same with a target.
    pub fn with_target(self, text: &str, met: bool) -> Self {
        Self { target: Some(Target { text: text.to_owned(), met }), ..self }
    }

    fn cells(&self) -> [&str; 4] {
        [&self.what, &self.measured, &self.beside, self.target.as_ref().map_or("", |target| &target.text)]
    }

    fn mark(&self) -> &'static str {
        match &self.target {
            None => "",
            Some(target) if target.met => " ✔",
            Some(_) => " ✘",
        }
    }
}

const HEADINGS: [&str; 4] = ["What", "Measured", "Beside it, in the same run", "Target"];

/// The table for a terminal: one block a row, since the cells are sentences. Targets are judged only if asked for:
/// those of a quick run mean nothing.
pub fn terminal(figures: &[Figure], paint: Paint, judge: bool) -> String {
    let blocks = figures.iter().map(|figure| {
        let [what, measured, beside, target] = figure.cells();
        let mut block = format!("{}\n    {}", paint.bold(what), paint.cyan(measured));
        if !beside.is_empty() {
            block.push_str(&format!("\n    {} {beside}", paint.dim("beside")));
        }
        if !target.is_empty() {
            let text = format!("{target}{}", if judge { figure.mark() } else { "" });
            let missed = judge && figure.target.as_ref().is_some_and(|target| !target.met);
            let text = if missed { paint.red(text) } else { paint.green(text) };
            block.push_str(&format!("\n    {} {text}", paint.dim("target")));
        }
        block
    });
    blocks.collect::<Vec<_>>().join("\n")
}

/// The table in Markdown.
pub fn markdown(figures: &[Figure]) -> String {
    let row =
        |cells: [String; 4]| format!("| {} |\n", cells.map(|cell| cell.replace('|', "\\|")).join(" | "));
    let mut table = row(HEADINGS.map(str::to_owned));
    table.push_str("|---|---|---|---|\n");
    for figure in figures {
        let [what, measured, beside, target] = figure.cells().map(str::to_owned);
        table.push_str(&row([what, format!("**{measured}**"), beside, target + figure.mark()]));
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_says_whether_its_target_was_met() {
        let figure = |met| Figure::new("drain", "9 k/s", "10 k/s").with_target("≥ 8 k/s", met);
        let table = markdown(&[figure(true), figure(false)]);
        let rows: Vec<&str> = table.lines().skip(2).collect();
        assert_eq!(
            rows,
            ["| drain | **9 k/s** | 10 k/s | ≥ 8 k/s ✔ |", "| drain | **9 k/s** | 10 k/s | ≥ 8 k/s ✘ |"]
        );
    }
}
