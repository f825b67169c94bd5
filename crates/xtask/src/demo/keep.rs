//! Leaves everything running for the audience.

use crate::demo::stage::{Stage, key};
use crate::paint::Paint;
use crate::programs::Programs;

/// The user of the examples.
const EXAMPLE: i32 = 42;

/// Leaves servers and programs running after this process has ended, and says what to do with them.
pub fn leave_running(stage: &Stage, programs: &Programs) -> anyhow::Result<()> {
    let stop = stage.ground.stack.keep()?;
    let paint = Paint::for_stdout();
    let heading = |text: &str| println!("\n{}", paint.bold(text));
    let line = |what: &str, text: &str| println!("  {}{text}", paint.dim(format!("{what:12}")));
    let stack = &stage.ground.stack;
    let redis = format!("redis-cli -p {}", stack.redis.address().port());

    heading("Still running");
    line("Postgres", &stack.postgres_url());
    line("NATS", &stack.nats_url());
    line("Redis", &stack.redis_url());
    line("relay", &format!("{0}/metrics  {0}/readyz", stage.relay.http_url()));
    line("subscriber", &format!("{0}/metrics  {0}/readyz", stage.subscriber.http_url()));
    line("service", &stage.service.url(EXAMPLE));
    line("logs", &format!("{}/*.log", stack.directory().path().display()));

    heading("Play");
    println!("  {redis} set {} cached", key(EXAMPLE));
    println!("  psql {} -c \"select outbox.enqueue(array['{}'])\"", stack.postgres_url(), key(EXAMPLE));
    println!("  {redis} get {}", key(EXAMPLE));
    let body = "-H 'content-type: application/json' -d '{\"name\": \"Ada\"}'";
    println!("  curl -X PUT '{}?mode=strict' {body}", stage.service.url(EXAMPLE));
    println!("  curl {}", stage.service.url(EXAMPLE));
    println!("  nats --server {} stream view INVALIDATIONS", stack.nats_url());
    let relay = programs.relay.display();
    println!("  DATABASE_URL={} NATS_URL={} {relay} status", stack.postgres_url(), stack.nats_url());
    println!("  DATABASE_URL={} NATS_URL={} {relay} doctor", stack.postgres_url(), stack.nats_url());

    heading("Stop");
    println!("  sh {}", stop.display());
    Ok(())
}
