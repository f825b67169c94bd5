use crate::image::{Cell, Image};

/// A key with places for the values of columns: `user:{id}:profile`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Template {
    text: String,
    parts: Vec<Part>,
}

/// A part of a template.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Part {
    /// Text as it is.
    Literal(String),
    /// The value of this column.
    Column(String),
}

/// Why a text is not a template.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidTemplate {
    /// The text is empty.
    #[error("the template is empty")]
    Empty,
    /// A brace that nothing closes.
    #[error("'{{' at byte {at} is not closed; write '{{{{' for the character itself")]
    Unclosed {
        /// Where it is.
        at: usize,
    },
    /// A brace that closes nothing.
    #[error("'}}' at byte {at} closes nothing; write '}}}}' for the character itself")]
    Unopened {
        /// Where it is.
        at: usize,
    },
    /// Braces with nothing, or with a brace, between them.
    #[error("the braces at byte {at} name no column")]
    NoColumn {
        /// Where they are.
        at: usize,
    },
    /// No key may contain a control character.
    #[error("the template has a control character")]
    ControlCharacter,
}

impl Template {
    /// Reads a template.
    ///
    /// # Errors
    /// [`InvalidTemplate`] says what is wrong with it.
    pub fn parse(text: &str) -> Result<Self, InvalidTemplate> {
        if text.is_empty() {
            return Err(InvalidTemplate::Empty);
        }
        if text.chars().any(char::is_control) {
            return Err(InvalidTemplate::ControlCharacter);
        }
        let mut parts = Vec::new();
        let mut literal = String::new();
        let mut rest = text;
        while let Some(length) = rest.find(['{', '}']) {
            let at = text.len() - rest.len() + length;
            literal.push_str(&rest[..length]);
            let brace = &rest[length..=length];
            rest = &rest[length + 1..];
            if let Some(after) = rest.strip_prefix(brace) {
                literal.push_str(brace);
                rest = after;
                continue;
            }
            if brace == "}" {
                return Err(InvalidTemplate::Unopened { at });
            }
            let (column, after) = rest.split_once('}').ok_or(InvalidTemplate::Unclosed { at })?;
            if column.is_empty() || column.contains('{') {
                return Err(InvalidTemplate::NoColumn { at });
            }
            if !literal.is_empty() {
                parts.push(Part::Literal(std::mem::take(&mut literal)));
            }
            parts.push(Part::Column(column.to_owned()));
            rest = after;
        }
        literal.push_str(rest);
        if !literal.is_empty() {
            parts.push(Part::Literal(literal));
        }
        Ok(Self { text: text.to_owned(), parts })
    }

    /// The template as it was written.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// Whether every key made of it begins with the same text.
    #[must_use]
    pub fn begins_literally(&self) -> bool {
        matches!(self.parts.first(), Some(Part::Literal(_)))
    }

    /// Its parts in order.
    #[must_use]
    pub fn parts(&self) -> &[Part] {
        &self.parts
    }

    /// Columns it names, in order, repetitions included.
    pub fn columns(&self) -> impl Iterator<Item = &str> {
        self.parts.iter().filter_map(|part| match part {
            Part::Column(column) => Some(column.as_str()),
            Part::Literal(_) => None,
        })
    }

    /// The key of an image, or none if a column is NULL. The error names a column whose value is not known.
    pub(crate) fn expand<'t>(
        &'t self,
        image: &dyn Image,
    ) -> Result<Option<String>, (&'t str, Cell<'static>)> {
        let mut key = String::with_capacity(self.text.len() + 16);
        let mut is_null = false;
        for part in &self.parts {
            match part {
                Part::Literal(text) => key.push_str(text),
                Part::Column(column) => match image.cell(column) {
                    Cell::Text(text) => key.push_str(text),
                    Cell::Null => is_null = true,
                    Cell::Unchanged => return Err((column, Cell::Unchanged)),
                    Cell::Absent => return Err((column, Cell::Absent)),
                },
            }
        }
        Ok((!is_null).then_some(key))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn braces_name_columns_and_doubled_braces_are_themselves() {
        let literal = |text: &str| Part::Literal(text.to_owned());
        let column = |name: &str| Part::Column(name.to_owned());
        let parts = |text: &str| Template::parse(text).unwrap().parts().to_vec();
        assert_eq!(parts("user:{id}:profile"), [literal("user:"), column("id"), literal(":profile")]);
        assert_eq!(parts("{a}{b}"), [column("a"), column("b")]);
        assert_eq!(parts("{{t:{t}}}:x"), [literal("{t:"), column("t"), literal("}:x")]);
        assert_eq!(parts("front-page"), [literal("front-page")]);
        assert_eq!(parts("{Имя}"), [column("Имя")]);
    }

    #[test]
    fn what_is_no_template_is_refused_with_the_place() {
        for (text, error) in [
            ("", InvalidTemplate::Empty),
            ("a{id", InvalidTemplate::Unclosed { at: 1 }),
            ("a}b", InvalidTemplate::Unopened { at: 1 }),
            ("a{}", InvalidTemplate::NoColumn { at: 1 }),
            ("a{x{y}", InvalidTemplate::NoColumn { at: 1 }),
            ("a\n", InvalidTemplate::ControlCharacter),
        ] {
            assert_eq!(Template::parse(text).unwrap_err(), error, "{text}");
        }
        assert!(Template::parse("a{id").unwrap_err().to_string().contains("'{' at byte 1"));
    }

    proptest! {
        #[test]
        fn parsing_any_text_never_panics(text in "[{}a-c]{0,12}|\\PC{0,40}") {
            let _ = Template::parse(&text);
        }
    }
}
