//! Colours, for those who want them.

use std::io::IsTerminal;

/// Paints text for standard output, or leaves it plain.
#[derive(Debug, Clone, Copy)]
pub struct Paint {
    coloured: bool,
}

impl Paint {
    /// Coloured on a terminal, unless `NO_COLOR` is set (<https://no-color.org>).
    pub fn for_stdout() -> Self {
        let set = |name| std::env::var_os(name).is_some_and(|value| !value.is_empty());
        let dumb = std::env::var_os("TERM").is_some_and(|terminal| terminal == "dumb");
        Self { coloured: std::io::stdout().is_terminal() && !set("NO_COLOR") && !dumb }
    }

    /// Important.
    pub fn bold(self, text: impl AsRef<str>) -> String {
        self.with("1", text.as_ref())
    }

    /// Less important.
    pub fn dim(self, text: impl AsRef<str>) -> String {
        self.with("2", text.as_ref())
    }

    /// Good.
    pub fn green(self, text: impl AsRef<str>) -> String {
        self.with("32", text.as_ref())
    }

    /// Bad.
    pub fn red(self, text: impl AsRef<str>) -> String {
        self.with("31", text.as_ref())
    }

    /// A name or a command.
    pub fn cyan(self, text: impl AsRef<str>) -> String {
        self.with("36", text.as_ref())
    }

    fn with(self, code: &str, text: &str) -> String {
        if self.coloured { format!("\u{1b}[{code}m{text}\u{1b}[0m") } else { text.to_owned() }
    }
}
