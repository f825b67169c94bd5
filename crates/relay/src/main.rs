//! The relay: takes committed events from the outbox and publishes them to NATS JetStream.

use std::process::ExitCode;

fn main() -> ExitCode {
    relay::program()
}
