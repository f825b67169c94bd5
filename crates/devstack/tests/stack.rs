//! A stack starts, answers, survives faults and cleans up.

#![expect(clippy::unwrap_used, reason = "a step that fails fails the test, also in its helper functions")]

use std::process::Command;
use std::time::Duration;

use devstack::{PgBouncer, PoolMode, RedisOptions, Stack, StackOptions, eventually};

const DEADLINE: Duration = Duration::from_secs(30);

async fn count(stack: &Stack) -> String {
    let rows = stack.postgres.query("select count(*) from kept").await.unwrap();
    rows[0][0].clone().unwrap()
}

#[tokio::test]
async fn every_server_of_a_stack_answers() {
    let stack = Stack::start(StackOptions::default()).await.unwrap();
    let settings = "select current_setting('synchronous_commit') || current_setting('wal_level')";
    let rows = stack.postgres.query(settings).await.unwrap();
    assert_eq!(rows, [[Some("onlogical".to_owned())]]);
    assert_eq!(stack.redis.command(&["SET", "key", "value"]).await.unwrap(), "OK");
    assert!(stack.nats.request("$JS.API.STREAM.NAMES", "").await.unwrap().contains("stream_names"));
    let url = stack.create_database("fresh").await.unwrap();
    assert!(url.ends_with("/fresh"));
    stack.postgres.query_in("fresh", "create table only_here ()").await.unwrap();
}

#[tokio::test]
async fn killed_servers_come_back_on_the_same_port_with_their_data() {
    let redis = RedisOptions { append_only: true, ..RedisOptions::default() };
    let stack = Stack::start(StackOptions { redis, ..StackOptions::default() }).await.unwrap();
    stack.postgres.query("create table kept (id int); insert into kept values (1)").await.unwrap();
    stack.nats.request("$JS.API.STREAM.CREATE.kept", r#"{"name":"kept","subjects":["kept"]}"#).await.unwrap();
    stack.redis.command(&["SET", "kept", "1"]).await.unwrap();
    for _ in 0..3 {
        stack.postgres.kill().unwrap();
        stack.nats.kill().unwrap();
        stack.redis.kill().unwrap();
        assert!(stack.postgres.query("select 1").await.is_err());
        let running = [stack.postgres.is_running(), stack.nats.is_running(), stack.redis.is_running()];
        assert_eq!(running, [false; 3]);
        tokio::try_join!(stack.postgres.start(), stack.nats.start(), stack.redis.start()).unwrap();
        assert_eq!(count(&stack).await, "1");
        assert!(stack.nats.request("$JS.API.STREAM.NAMES", "").await.unwrap().contains("kept"));
        // The append-only file is written once a second, but by the kernel's view at once.
        assert_eq!(stack.redis.command(&["GET", "kept"]).await.unwrap(), "1");
    }
    tokio::try_join!(stack.postgres.restart(), stack.nats.restart(), stack.redis.restart()).unwrap();
    assert_eq!(count(&stack).await, "1");
}

#[tokio::test]
async fn a_stopped_server_answers_again_after_resume() {
    let stack = Stack::start(StackOptions::default()).await.unwrap();
    stack.postgres.stop().unwrap();
    let query = stack.postgres.query("select 1");
    assert!(tokio::time::timeout(Duration::from_millis(200), query).await.is_err());
    assert!(stack.postgres.is_running());
    stack.postgres.resume().unwrap();
    eventually(DEADLINE, || stack.postgres.query("select 1")).await;
    stack.postgres.stop().unwrap();
    stack.postgres.terminate().await.unwrap();
    assert!(!stack.postgres.is_running());
}

#[tokio::test]
async fn redis_comes_back_with_an_old_snapshot() {
    for append_only in [false, true] {
        let redis = RedisOptions { append_only, ..RedisOptions::default() };
        let stack = Stack::start(StackOptions { redis, ..StackOptions::default() }).await.unwrap();
        stack.redis.command(&["SET", "key", "old"]).await.unwrap();
        stack.redis.save_snapshot().await.unwrap();
        stack.redis.command(&["SET", "key", "new"]).await.unwrap();
        assert!(stack.redis.restore_snapshot().is_err());
        stack.redis.kill().unwrap();
        stack.redis.restore_snapshot().unwrap();
        stack.redis.start().await.unwrap();
        assert_eq!(stack.redis.command(&["GET", "key"]).await.unwrap(), "old");
    }
}

#[tokio::test]
async fn nats_data_can_be_wiped_and_restored() {
    let stack = Stack::start(StackOptions::default()).await.unwrap();
    stack.nats.request("$JS.API.STREAM.CREATE.kept", r#"{"name":"kept","subjects":["kept"]}"#).await.unwrap();
    stack.nats.terminate().await.unwrap();
    stack.nats.save_data("before").unwrap();
    stack.nats.wipe_data().unwrap();
    stack.nats.start().await.unwrap();
    assert!(stack.nats.request("$JS.API.STREAM.INFO.kept", "").await.is_err());
    stack.nats.kill().unwrap();
    stack.nats.restore_data("before").unwrap();
    stack.nats.start().await.unwrap();
    stack.nats.request("$JS.API.STREAM.INFO.kept", "").await.unwrap();
}

#[tokio::test]
async fn dropping_a_stack_leaves_no_process_and_no_directory() {
    let stack = Stack::start(StackOptions::default()).await.unwrap();
    let path = stack.directory().path().to_owned();
    let pid = stack.postgres.process().pid().unwrap();
    drop(stack);
    assert!(!path.exists());
    assert!(!std::path::Path::new(&format!("/proc/{pid}")).exists());
}

#[tokio::test]
async fn pgbouncer_answers_for_any_database() {
    let stack = Stack::start(StackOptions::default()).await.unwrap();
    let pgbouncer = PgBouncer::start(&stack.postgres, PoolMode::Transaction, 5).await.unwrap();
    assert!(pgbouncer.url().contains(&pgbouncer.address().port().to_string()));
    pgbouncer.process().kill().unwrap();
    pgbouncer.start_again().await.unwrap();
    pgbouncer.process().terminate().await.unwrap();
}

#[tokio::test]
async fn a_process_has_a_log_a_cost_and_an_exit_status() {
    let stack = Stack::start(StackOptions::default()).await.unwrap();
    let mut command = Command::new("sh");
    command.args(["-c", "echo \"hello $WHO\"; read -r line < fifo; exit 3"]).env("WHO", "world");
    command.current_dir(stack.directory().path());
    Command::new("mkfifo").arg(stack.directory().path().join("fifo")).status().unwrap();
    let process = stack.spawn("greeter", command).unwrap();
    assert_eq!(process.wait_for_log("hello", DEADLINE).await.unwrap(), "hello world");
    assert!(process.rss_bytes().unwrap() > 0);
    assert!(process.cpu_seconds().unwrap() < 5.0);
    process.stop().unwrap();
    process.resume().unwrap();
    assert!(process.wait_exit(Duration::from_millis(50)).await.is_err());
    std::fs::write(stack.directory().path().join("fifo"), "go\n").unwrap();
    assert_eq!(process.wait_exit(DEADLINE).await.unwrap().code(), Some(3));
    assert!(process.wait_for_log("never", DEADLINE).await.is_err());
    assert!(stack.postgres.process().cpu_seconds().unwrap() > 0.0);
}

#[tokio::test]
async fn a_server_that_cannot_start_fails_with_its_log() {
    let mut options = StackOptions::default();
    options.postgres.settings.push(("shared_buffers".to_owned(), "nonsense".to_owned()));
    let error = Stack::start(options).await.unwrap_err();
    assert!(format!("{error:#}").contains("invalid value for parameter \"shared_buffers\""), "{error:#}");
}

#[tokio::test]
async fn many_stacks_start_side_by_side() {
    let start = || Stack::start(StackOptions::default());
    let (first, second, third, fourth) = tokio::try_join!(start(), start(), start(), start()).unwrap();
    let mut urls = [first, second, third, fourth].map(|stack| stack.postgres_url()).to_vec();
    urls.sort();
    urls.dedup();
    assert_eq!(urls.len(), 4);
}
