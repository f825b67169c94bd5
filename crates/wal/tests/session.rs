//! Replication connections to a real server: who gets in, how, and what is said to those who do not.
#![expect(clippy::unwrap_used, reason = "a failure in a test is a panic")]

use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::time::Duration;

use devstack::proxy::{FaultProxy, Mode};
use devstack::{Postgres, PostgresOptions, eventually};
use service::SecretUrl;
use wal::session::{Frame, Session, SessionError, Settings, StreamOptions};

const PATIENCE: Duration = Duration::from_secs(20);

async fn open(url: &str) -> Result<Session, SessionError> {
    let url: SecretUrl = url.parse().unwrap();
    Session::open(&Settings::parse(&url, "test").unwrap(), Duration::from_secs(10), PATIENCE).await
}

async fn path(postgres: &Postgres, setting: &str) -> PathBuf {
    postgres.query(&format!("show {setting}")).await.unwrap()[0][0].clone().unwrap().into()
}

/// Makes the server ask for a password, of the role `reader` with the password `se/cret`.
async fn demand_password(postgres: &Postgres) {
    postgres.query("create role reader login replication password 'se/cret'").await.unwrap();
    let file = path(postgres, "hba_file").await;
    let kept = std::fs::read_to_string(&file).unwrap();
    std::fs::write(&file, format!("host all reader all scram-sha-256\n{kept}")).unwrap();
    postgres.query("select pg_reload_conf()").await.unwrap();
}

#[tokio::test]
async fn scram_lets_in_whoever_knows_the_password_and_nobody_else() {
    let postgres = Postgres::start_alone(PostgresOptions::default()).await.unwrap();
    demand_password(&postgres).await;
    let url = |password: &str| format!("postgres://reader{password}@{}/postgres", postgres.address());
    // The server reads its configuration a moment later.
    eventually(PATIENCE, async || matches!(open(&url("")).await, Err(SessionError::Refused(_)))).await;
    let mut session = open(&url(":se%2Fcret")).await.unwrap();
    let identity = session.identify().await.unwrap();
    assert!(
        identity.system_id.len() > 10 && identity.timeline == 1 && identity.flushed.0 > 0,
        "{identity:?}"
    );
    let error = open(&url(":wrong")).await.unwrap_err();
    assert!(matches!(error, SessionError::Refused(_)) && !error.to_string().contains("wrong"), "{error}");
}

#[tokio::test]
async fn a_role_without_the_right_is_told_which_one() {
    let postgres = Postgres::start_alone(PostgresOptions::default()).await.unwrap();
    postgres.query("create role nobody login").await.unwrap();
    let error = open(&format!("postgres://nobody@{}/postgres", postgres.address())).await.unwrap_err();
    assert!(error.to_string().contains("replication"), "{error}");
}

/// The certificate of the tests of TLS, which names 127.0.0.1, in the data directory. Returns the authority.
fn certify(data: &Path) -> PathBuf {
    let kept = Path::new(env!("CARGO_MANIFEST_DIR")).join("../cache/tests/tls");
    let owner = std::fs::metadata(data).unwrap();
    for (from, to) in [("server.pem", "server.crt"), ("server.key", "server.key")] {
        let file = data.join(to);
        std::fs::copy(kept.join(from), &file).unwrap();
        chown(&file, Some(owner.uid()), Some(owner.gid())).unwrap();
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o600)).unwrap();
    }
    kept.join("ca.pem")
}

#[tokio::test]
async fn tls_checks_as_much_as_sslmode_asks() {
    let postgres = Postgres::start_alone(PostgresOptions::default()).await.unwrap();
    let port = postgres.address().port();
    let url = |host: &str, query: &str| {
        format!("postgres://postgres@{host}:{port}/postgres?hostaddr=127.0.0.1&{query}")
    };
    let error = open(&url("127.0.0.1", "sslmode=require")).await.unwrap_err();
    assert!(matches!(error, SessionError::Tls(_)), "the server has no TLS yet: {error}");

    let authority = certify(&path(&postgres, "data_directory").await);
    postgres.query("alter system set ssl = on").await.unwrap();
    postgres.query("select pg_reload_conf()").await.unwrap();
    eventually(PATIENCE, async || open(&url("127.0.0.1", "sslmode=require")).await.is_ok()).await;

    let trusted = |host, mode| url(host, &format!("sslmode={mode}&sslrootcert={}", authority.display()));
    assert!(open(&trusted("127.0.0.1", "verify-full")).await.is_ok());
    assert!(
        open(&trusted("other.example", "verify-full")).await.is_err(),
        "the certificate does not name it"
    );
    assert!(open(&trusted("other.example", "verify-ca")).await.is_ok(), "the name does not matter");
    assert!(open(&url("127.0.0.1", "sslmode=verify-ca")).await.is_err(), "the authority is not known");

    // Encrypted indeed, also when it streams.
    postgres.query("create table t (id int primary key); create publication p for table t").await.unwrap();
    postgres.query("select pg_create_logical_replication_slot('s', 'pgoutput')").await.unwrap();
    let session = open(&trusted("127.0.0.1", "verify-full")).await.unwrap();
    let mut stream = session.start(&options("s")).await.unwrap();
    let encrypted = postgres
        .query("select count(*)::text from pg_stat_ssl s join pg_stat_replication r using (pid) where s.ssl")
        .await;
    assert_eq!(encrypted.unwrap()[0][0].as_deref(), Some("1"));
    postgres.query("insert into t values (1)").await.unwrap();
    while !matches!(stream.next().await.unwrap(), Frame::Data(_)) {}
    stream.finish().await;
}

fn options(slot: &str) -> StreamOptions<'_> {
    StreamOptions { slot, publication: "p", server_version: 150_000, streaming: true }
}

#[tokio::test]
async fn a_slot_has_one_reader_and_is_free_when_that_one_leaves() {
    let postgres = Postgres::start_alone(PostgresOptions::default()).await.unwrap();
    postgres.query("create publication p").await.unwrap();
    postgres.query("select pg_create_logical_replication_slot('s', 'pgoutput')").await.unwrap();
    let first = open(&postgres.url()).await.unwrap().start(&options("s")).await.unwrap();
    let error = open(&postgres.url()).await.unwrap().start(&options("s")).await.unwrap_err();
    assert!(matches!(error, SessionError::SlotActive(_)), "{error}");
    first.finish().await;
    eventually(PATIENCE, async || open(&postgres.url()).await.unwrap().start(&options("s")).await.is_ok())
        .await;
    let error = open(&postgres.url()).await.unwrap().start(&options("other")).await.unwrap_err();
    assert!(matches!(error, SessionError::Missing(_)), "{error}");
    let error = open(&postgres.url()).await.unwrap().start(&options("s; drop")).await.unwrap_err();
    assert!(matches!(error, SessionError::InvalidName(_)), "{error}");
}

#[tokio::test]
async fn a_server_that_accepts_and_never_answers_is_given_up() {
    let postgres = Postgres::start_alone(PostgresOptions::default()).await.unwrap();
    let proxy = FaultProxy::start(postgres.address()).await.unwrap();
    proxy.set_mode(Mode::Stall);
    let url: SecretUrl = postgres.url_through(&proxy, "postgres").parse().unwrap();
    let settings = Settings::parse(&url, "test").unwrap();
    let error =
        Session::open(&settings, Duration::from_secs(10), Duration::from_millis(300)).await.unwrap_err();
    assert!(matches!(error, SessionError::TimedOut(_)), "{error}");
}
