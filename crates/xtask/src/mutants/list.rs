//! The list of mutants.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

/// One mechanism that is removed.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Mutant {
    /// Mechanism that is gone.
    pub name: String,
    /// File that is changed, below the top of the project.
    pub file: String,
    /// Text that is replaced. Occurs once.
    find: String,
    replace: String,
    /// Test target of cargo that ought to notice, or `lib` for unit tests.
    pub target: String,
    /// Filters of test names.
    pub tests: Vec<String>,
}

#[derive(Debug, Deserialize)]
struct List {
    mutant: Vec<Mutant>,
}

/// Reads the list of the project in `workspace`.
pub fn read(workspace: &Path) -> Result<Vec<Mutant>> {
    let file = workspace.join("crates/xtask/mutants.toml");
    let text = std::fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
    Ok(toml::from_str::<List>(&text)?.mutant)
}

impl Mutant {
    /// Returns the text of its file with the mechanism removed.
    pub fn applied_to(&self, text: &str) -> Result<String> {
        let places = text.matches(&self.find).count();
        ensure!(places == 1, "{}: its text occurs {places} times in {}", self.name, self.file);
        Ok(text.replacen(&self.find, &self.replace, 1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::programs;

    #[test]
    fn every_mutant_of_the_list_still_fits_the_code() {
        let workspace = programs::workspace();
        let mutants = read(workspace).unwrap();
        assert!(mutants.len() > 20, "{}", mutants.len());
        for mutant in mutants {
            let text = std::fs::read_to_string(workspace.join(&mutant.file)).unwrap();
            assert_ne!(mutant.applied_to(&text).unwrap(), text, "{}", mutant.name);
            assert!(!mutant.tests.is_empty(), "{}", mutant.name);
        }
    }
}
