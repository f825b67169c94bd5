//! The subscriber: invalidates the Redis keys named by events from NATS JetStream.

use std::process::ExitCode;

fn main() -> ExitCode {
    subscriber::program()
}
