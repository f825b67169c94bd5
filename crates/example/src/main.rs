//! The profile service as a program.

use std::process::ExitCode;

fn main() -> ExitCode {
    example::program()
}
