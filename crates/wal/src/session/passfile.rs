//! The password file of libpq, for passwords that stand in no URL.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// Who wants to log in, and where.
pub(super) struct Login<'a> {
    pub(super) host: &'a str,
    pub(super) port: u16,
    pub(super) database: &'a str,
    pub(super) user: &'a str,
}

/// Returns the password from the file that `PGPASSFILE` names, or else from `~/.pgpass`. As for libpq, a file that others
/// may read does not count.
pub(super) fn password(login: &Login<'_>) -> Option<String> {
    let named = std::env::var_os("PGPASSFILE").filter(|file| !file.is_empty()).map(PathBuf::from);
    let file = named.or_else(|| std::env::home_dir().map(|home| home.join(".pgpass")))?;
    if !is_private(&file) {
        return None;
    }
    find(&std::fs::read_to_string(file).ok()?, login)
}

fn is_private(file: &Path) -> bool {
    std::fs::metadata(file).is_ok_and(|file| file.permissions().mode() & 0o077 == 0)
}

/// The password of the first line that fits: `host:port:database:user:password`, where `*` fits everything.
fn find(text: &str, login: &Login<'_>) -> Option<String> {
    let port = login.port.to_string();
    let wanted = [login.host, &port, login.database, login.user];
    text.lines().filter(|line| !line.starts_with('#')).find_map(|line| {
        let fields = split(line);
        let (password, given) = fields.split_last().filter(|(_, given)| given.len() == wanted.len())?;
        let fits = given.iter().zip(wanted).all(|(given, wanted)| given == "*" || given == wanted);
        fits.then(|| password.clone())
    })
}

/// Splits at colons; a backslash takes the next character as it is.
fn split(line: &str) -> Vec<String> {
    let mut fields = vec![String::new()];
    let mut characters = line.chars();
    while let Some(character) = characters.next() {
        let field = fields.last_mut().expect("never empty");
        match character {
            '\\' => field.extend(characters.next()),
            ':' => fields.push(String::new()),
            other => field.push(other),
        }
    }
    fields
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_line_that_fits_has_the_password() {
        let login = Login { host: "db", port: 5432, database: "shop", user: "app" };
        let cases = [
            ("db:5432:shop:app:one\n*:*:*:*:two", Some("one")),
            ("# db:5432:shop:app:none\nother:5432:shop:app:none\n*:*:*:*:two", Some("two")),
            (r"db:5432:*:app:a\:b\\c", Some(r"a:b\c")),
            ("db:5432:shop:app", None),
            ("db:5433:shop:app:none", None),
            ("", None),
        ];
        for (text, expected) in cases {
            assert_eq!(find(text, &login).as_deref(), expected, "{text:?}");
        }
    }
}
