//! Keys of a changed row of which not every value is known.

use std::collections::HashSet;

use event::CacheKey;

use crate::expansion::{Expansion, RefusedKey};
use crate::image::{Cell, Completed, Image};
use crate::table::TableRules;
use crate::template::Template;

/// The keys of a changed row as far as they can be told.
#[derive(Debug, Default)]
pub struct Known<'r> {
    /// The keys that can be told.
    pub expansion: Expansion,
    /// The templates whose keys cannot be told, each once.
    pub unknown: Vec<Unknown<'r>>,
}

/// A template whose key cannot be told.
#[derive(Debug)]
pub struct Unknown<'r> {
    /// The template.
    pub template: &'r Template,
    /// The column whose value is not known.
    pub column: &'r str,
    /// [`Cell::Unchanged`] or [`Cell::Absent`].
    pub cell: Cell<'static>,
}

impl TableRules {
    /// The keys that a changed row invalidates, as [`keys`](Self::keys) gives them, but without an error: a key whose column is
    /// not known is left out and its template named. An image for which the condition cannot be judged counts.
    #[must_use]
    pub fn known_keys(&self, old: Option<&dyn Image>, new: Option<&dyn Image>) -> Known<'_> {
        let mut known = Known::default();
        if !self.is_changed(old, new) {
            return known;
        }
        let mut seen = HashSet::new();
        let completed = new.map(|new| Completed { new, old });
        let images = [old, completed.as_ref().map(|image| image as &dyn Image)];
        for image in images.into_iter().flatten() {
            let counts = self.when.as_ref().is_none_or(|when| when.value.holds(image).unwrap_or(true));
            for template in self.keys.iter().map(|template| &template.value).filter(|_| counts) {
                match template.expand(image) {
                    Ok(Some(key)) if !seen.insert(key.clone()) => {}
                    Ok(Some(key)) => self.add(&mut known.expansion, template, key),
                    Ok(None) => {}
                    Err((column, cell)) => known.add(Unknown { template, column, cell }),
                }
            }
        }
        known
    }

    fn add(&self, expansion: &mut Expansion, template: &Template, key: String) {
        match CacheKey::new(key) {
            Ok(key) => expansion.keys.push(key),
            Err(reason) => expansion.refused.push(RefusedKey {
                table: self.qualified_name(),
                template: template.as_str().to_owned(),
                reason,
            }),
        }
    }
}

impl<'r> Known<'r> {
    fn add(&mut self, unknown: Unknown<'r>) {
        if !self.unknown.iter().any(|other| other.template == unknown.template) {
            self.unknown.push(unknown);
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::{JsonImage, Rules};

    #[test]
    fn one_unknown_column_leaves_the_other_keys_alone() {
        let rules = r#"
[[table]]
name = "users"
keys = ["id:{id}", "mail:{mail}", "both:{id}:{mail}"]
when = { column = "kind", equals = "a" }
on_truncate = "ignore"
"#;
        let rules = Rules::parse("rules.toml", rules).unwrap();
        let users = rules.table("public", "users").unwrap();
        let image = |text| JsonImage::parse(text).unwrap();
        let told = |text| {
            let known = users.known_keys(Some(&image(text)), None);
            let keys: Vec<String> = known.expansion.keys.into_iter().map(|key| key.into_string()).collect();
            let unknown: Vec<String> =
                known.unknown.iter().map(|unknown| unknown.template.as_str().to_owned()).collect();
            (keys.join(" "), unknown.join(" "))
        };
        let both = |keys: &str, unknown: &str| (keys.to_owned(), unknown.to_owned());
        assert_eq!(told(r#"{"id": 1, "mail": "a", "kind": "a"}"#), both("id:1 mail:a both:1:a", ""));
        assert_eq!(told(r#"{"id": 1, "kind": "a"}"#), both("id:1", "mail:{mail} both:{id}:{mail}"));
        assert_eq!(told(r#"{"id": 1, "kind": "b"}"#), both("", ""));
        assert_eq!(told(r#"{"id": 1, "mail": null}"#), both("id:1", ""), "an unknown condition holds");
    }
}
