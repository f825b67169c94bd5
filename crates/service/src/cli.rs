//! Command lines whose errors name the environment variable as well as the flag, and never quote a secret.

use std::{any::TypeId, ffi::OsString};

use clap::{
    Arg, Command, Parser,
    builder::Resettable,
    error::{ContextKind, ContextValue},
};

use crate::SecretUrl;

/// Reads the process's arguments and environment; prints help or the error and exits (with code 2) if there is
/// nothing to run.
#[must_use]
pub fn parse<C: Parser>() -> C {
    parse_from(std::env::args_os()).unwrap_or_else(|error| error.exit())
}

/// Like [`parse`] with the arguments given (the first is the program's name), returning the error.
///
/// Beyond what clap does by itself: every error about an option that has an environment variable names that variable;
/// values of [`SecretUrl`] options appear neither in `--help` nor in errors; an empty variable counts as not set.
///
/// # Errors
///
/// What clap reports, help and version requests included.
pub fn parse_from<C: Parser>(args: impl IntoIterator<Item = impl Into<OsString>>) -> Result<C, clap::Error> {
    let args: Vec<OsString> = args.into_iter().map(Into::into).collect();
    let mut command = prepare(C::command());
    let mut matches = command
        .try_get_matches_from_mut(&args)
        .map_err(|error| name_variables(error, &C::command(), &args))?;
    C::from_arg_matches_mut(&mut matches).map_err(|error| error.format(&mut command))
}

fn prepare(command: Command) -> Command {
    command
        .mut_args(|arg| {
            let hide = is_secret(&arg);
            let is_empty = arg.get_env().and_then(std::env::var_os).is_some_and(|value| value.is_empty());
            let arg = arg.hide_env_values(hide);
            if is_empty { arg.env(Resettable::Reset) } else { arg }
        })
        .mut_subcommands(prepare)
}

fn is_secret(arg: &Arg) -> bool {
    arg.is_hide_env_values_set() || arg.get_value_parser().type_id() == TypeId::of::<SecretUrl>()
}

fn name_variables(mut error: clap::Error, command: &Command, args: &[OsString]) -> clap::Error {
    match error.get(ContextKind::InvalidArg).cloned() {
        Some(ContextValue::String(shown)) => {
            if let Some(arg) = find_arg(command, &shown) {
                name_variable_of_value(&mut error, &shown, arg, args);
            }
        }
        Some(ContextValue::Strings(shown)) => {
            let named = shown.into_iter().map(|shown| name_variable_of_missing(command, shown)).collect();
            error.insert(ContextKind::InvalidArg, ContextValue::Strings(named));
        }
        _ => {}
    }
    error
}

fn name_variable_of_value(error: &mut clap::Error, shown: &str, arg: &Arg, args: &[OsString]) {
    if is_secret(arg) && error.get(ContextKind::InvalidValue).is_some() {
        error.insert(ContextKind::InvalidValue, ContextValue::String("***".to_owned()));
    }
    if let Some(variable) = arg.get_env() {
        let variable = variable.to_string_lossy();
        let named = if is_given(arg, args) {
            format!("{shown} [env: {variable}]")
        } else {
            format!("{shown} from environment variable {variable}")
        };
        error.insert(ContextKind::InvalidArg, ContextValue::String(named));
    }
}

fn name_variable_of_missing(command: &Command, shown: String) -> String {
    match find_arg(command, &shown).and_then(Arg::get_env) {
        Some(variable) => format!("{shown} (or environment variable {})", variable.to_string_lossy()),
        None => shown,
    }
}

/// Finds the option that clap shows as, for example, `--http-addr <HTTP_ADDR>`, in the command or below it.
fn find_arg<'a>(command: &'a Command, shown: &str) -> Option<&'a Arg> {
    let long = shown.strip_prefix("--")?.split([' ', '=', '[']).next()?;
    let here = command.get_arguments().find(|arg| arg.get_long() == Some(long));
    here.or_else(|| command.get_subcommands().find_map(|below| find_arg(below, shown)))
}

/// Whether the flag stands on the command line, which then wins over the environment.
fn is_given(arg: &Arg, args: &[OsString]) -> bool {
    let long = arg.get_long().map(|long| format!("--{long}"));
    args.iter().filter_map(|given| given.to_str()).any(|given| given.split('=').next() == long.as_deref())
}

#[cfg(test)]
mod tests {
    use std::{net::SocketAddr, time::Duration};

    use clap::Subcommand;

    use super::*;

    // `CARGO_PKG_NAME` and `CARGO_PKG_VERSION` stand for operators' variables: cargo sets both for tests (to `service`
    // and a version), and a test cannot set a variable of its own process without unsafe code.
    #[derive(Debug, Parser)]
    struct Cli {
        #[arg(long, env = "CARGO_PKG_NAME")]
        http_addr: Option<SocketAddr>,
        #[command(subcommand)]
        command: Option<Sub>,
    }

    #[derive(Debug, Subcommand)]
    enum Sub {
        Run {
            #[arg(long, env = "CARGO_PKG_VERSION")]
            database_url: SecretUrl,
            #[arg(long, env = "NO_SUCH_VARIABLE", value_parser = crate::parse_duration)]
            wait: Duration,
        },
        Connect {
            #[arg(long, env = "NO_SUCH_URL")]
            redis_url: SecretUrl,
        },
    }

    fn error_of(args: &[&str]) -> String {
        parse_from::<Cli>(args.iter().copied()).expect_err("must be refused").to_string()
    }

    #[test]
    fn a_bad_value_from_the_environment_names_the_variable_and_the_flag() {
        let error = error_of(&["demo"]);
        assert!(
            error.contains("invalid value 'service' for '--http-addr <HTTP_ADDR> from environment variable CARGO_PKG_NAME'"),
            "{error}"
        );
    }

    #[test]
    fn a_bad_value_of_a_flag_names_the_variable_too() {
        let error = error_of(&["demo", "--http-addr=nowhere"]);
        assert!(
            error.contains("invalid value 'nowhere' for '--http-addr <HTTP_ADDR> [env: CARGO_PKG_NAME]'"),
            "{error}"
        );
    }

    #[test]
    fn a_missing_option_names_the_variable_that_would_do() {
        let error = error_of(&["demo", "--http-addr=[::1]:0", "run", "--database-url=postgres://db/x"]);
        assert!(error.contains("--wait <WAIT> (or environment variable NO_SUCH_VARIABLE)"), "{error}");
    }

    #[test]
    fn a_bad_secret_is_not_quoted_wherever_it_comes_from() {
        let from_flag =
            error_of(&["demo", "--http-addr=[::1]:0", "connect", "--redis-url", "u:s3cret@cache"]);
        assert!(from_flag.contains("invalid value '***' for '--redis-url <REDIS_URL>"), "{from_flag}");
        assert!(from_flag.contains("NO_SUCH_URL") && from_flag.contains("scheme"), "{from_flag}");
        assert!(!from_flag.contains("s3cret"), "{from_flag}");

        let from_environment = error_of(&["demo", "--http-addr=[::1]:0", "run", "--wait=1s"]);
        assert!(
            from_environment
                .contains("'--database-url <DATABASE_URL> from environment variable CARGO_PKG_VERSION'")
        );
        assert!(!from_environment.contains(env!("CARGO_PKG_VERSION")), "{from_environment}");
    }

    #[test]
    fn help_shows_the_variable_of_a_secret_but_not_its_value() {
        let help = error_of(&["demo", "run", "--help"]);
        assert!(help.contains("[env: CARGO_PKG_VERSION]"), "{help}");
        assert!(!help.contains(env!("CARGO_PKG_VERSION")), "{help}");
    }

    #[test]
    fn good_arguments_are_read() {
        let args = ["demo", "--http-addr=[::1]:9", "run", "--database-url=postgres://db/x", "--wait=2s"];
        let cli: Cli = parse_from(args).unwrap();
        assert_eq!(cli.http_addr, Some("[::1]:9".parse().unwrap()));
        let Some(Sub::Run { database_url, wait }) = cli.command else { panic!("wrong command") };
        assert_eq!((database_url.expose(), wait), ("postgres://db/x", Duration::from_secs(2)));
    }
}
