//! The NATS users that `deploy/OPERATIONS.md` recommends suffice for relay and subscriber, and for nothing else.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use cache::{Acquired, LeaseToken, Redis};
use devstack::{Binary, Port, Process, eventually};
use event::CacheKey;
use outbox::{Event, Marks};
use tests::{Pair, SETTLED};

/// The users of the document, and one who may do everything.
fn configuration(address: &str, store: &Path) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("deploy/OPERATIONS.md");
    let text = std::fs::read_to_string(path).unwrap();
    let (_, rest) = text.split_once("<!-- nats permissions:begin -->\n```text\n").unwrap();
    let (users, _) = rest.split_once("```\n<!-- nats permissions:end -->").unwrap();
    let users = users
        .replace("$RELAY_PASSWORD", "secret")
        .replace("$SUBSCRIBER_PASSWORD", "secret")
        .replacen("users = [", "users = [ { user: admin, password: secret }", 1);
    format!("listen: \"{address}\"\njetstream {{ store_dir: \"{}\" }}\n{users}", store.display())
}

async fn start(pair: &Pair, port: &Port) -> Process {
    let directory = pair.stack.directory();
    let file = directory.path().join("rights.conf");
    let configuration = configuration(&port.address().to_string(), &directory.path().join("rights-data"));
    std::fs::write(&file, configuration).unwrap();
    let mut command = Command::new(Binary::NatsServer.find().unwrap());
    command.arg("-c").arg(&file);
    let nats = Process::spawn(directory, "nats-rights", command).unwrap();
    nats.wait_for_log("Server is ready", Duration::from_secs(20)).await.unwrap();
    nats
}

async fn leave_a_mark(redis: &Redis, pair: &Pair, key: &str) {
    let mut tx = pair.pool.begin().await.unwrap();
    let events = [Event::delete([key]).unwrap()];
    outbox::enqueue(&mut tx, &events[0]).await.unwrap();
    let transaction = outbox::transaction_id(&mut tx).await.unwrap();
    Marks::new(redis.clone(), &events, transaction).set(Duration::from_secs(10)).await.unwrap();
    // The writer dies before its commit.
    tx.rollback().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_recommended_users_suffice() {
    let pair = Pair::start().await.unwrap();
    pair.relay.process().kill().unwrap();
    pair.subscriber.process().kill().unwrap();
    let port = Port::reserve().unwrap();
    let nats = start(&pair, &port).await;
    let url = |user: &str| format!("nats://{user}:secret@{}", port.address());
    let relay = pair.another_relay(&[("NATS_URL", url("relay"))]).unwrap();
    let subscriber = pair.another_subscriber(&[("NATS_URL", url("subscriber"))]).unwrap();
    relay.until_ready().await;
    subscriber.until_ready().await;

    pair.fill("user:1").await.unwrap();
    pair.enqueue(&["user:1"]).await.unwrap();
    pair.until_none("user:1").await;

    // A message that is no event is set aside.
    let admin = async_nats::ConnectOptions::with_user_and_password("admin".into(), "secret".into());
    let admin = admin.connect(port.address().to_string()).await.unwrap();
    let jetstream = async_nats::jetstream::new(admin);
    jetstream.publish("invalidation.default", "rubbish".into()).await.unwrap().await.unwrap();
    eventually(SETTLED, async || {
        let dead = subscriber.metric("subscriber_dead_letters_total").await.unwrap_or(0.0);
        dead >= 1.0
    })
    .await;

    // A relay is asked about a mark.
    let redis = pair.cache().unwrap();
    let key = CacheKey::new("user:2").unwrap();
    leave_a_mark(&redis, &pair, key.as_str()).await;
    eventually(SETTLED, async || {
        let lease = redis.acquire(&key, LeaseToken::generate(), Duration::from_secs(5), false).await;
        !matches!(lease, Ok(Acquired::Bypass))
    })
    .await;

    // Redis comes back and the stream is replayed; NATS comes back and the relay looks into the stream.
    pair.stack.redis.kill().unwrap();
    pair.stack.redis.start().await.unwrap();
    eventually(SETTLED, async || subscriber.metric("subscriber_replays_total").await.unwrap_or(0.0) >= 1.0)
        .await;
    nats.terminate().await.unwrap();
    nats.start().unwrap();
    relay.until_ready().await;
    pair.fill("user:3").await.unwrap();
    pair.enqueue(&["user:3"]).await.unwrap();
    pair.until_none("user:3").await;

    // The stream is gone: a relay vouches for what it publishes again, and the consumer is made anew.
    pair.until_outbox_empty().await;
    jetstream.delete_stream("INVALIDATIONS").await.unwrap();
    pair.fill("user:4").await.unwrap();
    pair.enqueue(&["user:4"]).await.unwrap();
    pair.until_none("user:4").await;
    subscriber.until_ready().await;
    let log = nats.log();
    let violations: Vec<&str> = log.lines().filter(|line| line.contains("Violation")).collect();
    assert!(violations.is_empty(), "{violations:#?}");
    for daemon in [&relay, &subscriber] {
        assert!(!daemon.process().log().contains("permission"), "{}", daemon.process().log());
    }

    // A subscriber cannot publish events, and a relay cannot read what subscribers are told.
    let poor = async_nats::ConnectOptions::with_user_and_password("subscriber".into(), "secret".into());
    let poor = poor.connect(port.address().to_string()).await.unwrap();
    pair.fill("user:5").await.unwrap();
    poor.publish("invalidation.default", "{}".into()).await.unwrap();
    poor.flush().await.unwrap();
    eventually(SETTLED, async || nats.log().contains("Publish Violation")).await;
}
