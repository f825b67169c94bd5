//! The table's place in the top README.

use anyhow::Context;

use super::progress;
use crate::programs;

const BEGIN: &str = "<!-- bench:begin -->";
const END: &str = "<!-- bench:end -->";

/// Replaces what is between the markers, if there are any.
pub fn write(block: &str) -> anyhow::Result<()> {
    let path = programs::workspace().join("README.md");
    let text = std::fs::read_to_string(&path).context("cannot read README.md")?;
    match replaced(&text, block) {
        Some(text) => {
            std::fs::write(&path, text).context("cannot write README.md")?;
            progress("README.md has the new table");
        }
        None => progress("README.md has no bench markers; it stays as it is"),
    }
    Ok(())
}

fn replaced(text: &str, block: &str) -> Option<String> {
    let (before, rest) = text.split_once(BEGIN)?;
    let (_, after) = rest.split_once(END)?;
    Some(format!("{before}{BEGIN}\n\n{}\n\n{END}{after}", block.trim()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_between_the_markers_is_replaced() {
        let text = format!("above\n{BEGIN}\nold\n{END}\nbelow\n");
        let once = replaced(&text, "new\n").unwrap();
        assert_eq!(once, format!("above\n{BEGIN}\n\nnew\n\n{END}\nbelow\n"));
        assert_eq!(replaced(&once, "new").unwrap(), once);
        assert_eq!(replaced("no markers", "new"), None);
    }
}
