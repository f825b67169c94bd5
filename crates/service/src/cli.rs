//! Command lines whose errors name the environment variable as well as the flag, and never quote a secret.

use std::{any::TypeId, ffi::OsString};

use clap::{
    Arg, Command, Parser,
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
/// Beyond what clap does by itself, every error about an option that has an environment variable names that variable,
/// and values of [`SecretUrl`] options appear neither in `--help` nor in errors.
///
/// # Errors
///
/// What clap reports, help and version requests included.
pub fn parse_from<C: Parser>(args: impl IntoIterator<Item = impl Into<OsString>>) -> Result<C, clap::Error> {
    let args: Vec<OsString> = args.into_iter().map(Into::into).collect();
    let mut command = hide_secrets(C::command());
    let mut matches =
        command.try_get_matches_from_mut(&args).map_err(|error| name_variables(error, &command, &args))?;
    C::from_arg_matches_mut(&mut matches).map_err(|error| error.format(&mut command))
}

fn is_secret(arg: &Arg) -> bool {
    arg.is_hide_env_values_set() || arg.get_value_parser().type_id() == TypeId::of::<SecretUrl>()
}

/// Keeps `--help` from printing the current values of secret variables.
fn hide_secrets(command: Command) -> Command {
    command
        .mut_args(|arg| {
            let hide = is_secret(&arg);
            arg.hide_env_values(hide)
        })
        .mut_subcommands(hide_secrets)
}

fn name_variables(mut error: clap::Error, command: &Command, args: &[OsString]) -> clap::Error {
    match error.get(ContextKind::InvalidArg).cloned() {
        Some(ContextValue::String(flag)) => {
            if let Some(arg) = find_arg(command, &flag) {
                name_variable_of_value(&mut error, arg, args);
            }
        }
        Some(ContextValue::Strings(flags)) => {
            let named = flags.into_iter().map(|flag| name_variable_of_missing(command, flag)).collect();
            error.insert(ContextKind::InvalidArg, ContextValue::Strings(named));
        }
        _ => {}
    }
    error
}

fn name_variable_of_value(error: &mut clap::Error, arg: &Arg, args: &[OsString]) {
    if is_secret(arg) && error.get(ContextKind::InvalidValue).is_some() {
        error.insert(ContextKind::InvalidValue, ContextValue::String("***".to_owned()));
    }
    if let Some(variable) = arg.get_env() {
        let variable = variable.to_string_lossy();
        let named = if is_given(arg, args) {
            format!("{arg} [env: {variable}]")
        } else {
            format!("{arg} from environment variable {variable}")
        };
        error.insert(ContextKind::InvalidArg, ContextValue::String(named));
    }
}

fn name_variable_of_missing(command: &Command, flag: String) -> String {
    match find_arg(command, &flag).and_then(Arg::get_env) {
        Some(variable) => format!("{flag} (or environment variable {})", variable.to_string_lossy()),
        None => flag,
    }
}

/// Finds the option that clap shows as `flag`, such as `--http-addr <HTTP_ADDR>`, in the command or below it.
fn find_arg<'a>(command: &'a Command, flag: &str) -> Option<&'a Arg> {
    let here = command.get_arguments().find(|arg| arg.to_string() == flag);
    here.or_else(|| command.get_subcommands().find_map(|below| find_arg(below, flag)))
}

/// Whether the flag stands on the command line, which then wins over the environment.
fn is_given(arg: &Arg, args: &[OsString]) -> bool {
    let long = arg.get_long().map(|long| format!("--{long}"));
    let short = arg.get_short().map(|short| format!("-{short}"));
    args.iter().filter_map(|given| given.to_str()).any(|given| {
        let is_long = long.as_deref().is_some_and(|long| given.split('=').next() == Some(long));
        is_long || short.as_deref().is_some_and(|short| given.starts_with(short))
    })
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
        #[arg(long, env = "CARGO_PKG_NAME", global = true, default_value = "127.0.0.1:0")]
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
        assert!(error.contains("invalid value 'nowhere' for '--http-addr <HTTP_ADDR> [env: CARGO_PKG_NAME]'"), "{error}");
    }

    #[test]
    fn a_missing_option_names_the_variable_that_would_do() {
        let error = error_of(&["demo", "--http-addr=[::1]:0", "run", "--database-url=postgres://db/x"]);
        assert!(error.contains("--wait <WAIT> (or environment variable NO_SUCH_VARIABLE)"), "{error}");
    }

    #[test]
    fn a_bad_secret_is_not_quoted_wherever_it_comes_from() {
        let from_flag = error_of(&["demo", "--http-addr=[::1]:0", "connect", "--redis-url", "u:s3cret@cache"]);
        assert!(from_flag.contains("invalid value '***' for '--redis-url <REDIS_URL>"), "{from_flag}");
        assert!(from_flag.contains("NO_SUCH_URL") && from_flag.contains("scheme"), "{from_flag}");
        assert!(!from_flag.contains("s3cret"), "{from_flag}");

        let from_environment = error_of(&["demo", "--http-addr=[::1]:0", "run", "--wait=1s"]);
        assert!(from_environment.contains("'--database-url <DATABASE_URL> from environment variable CARGO_PKG_VERSION'"));
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
