//! From the configured URL to a client of the right sort.

use std::path::Path;

use deadpool_redis::redis::io::tcp::TcpSettings;
use deadpool_redis::redis::sentinel::{
    SentinelClient, SentinelClientBuilder, SentinelNodeConnectionInfo, SentinelServerType,
};
use deadpool_redis::redis::{
    self, Client, ClientTlsConfig, ConnectionAddr, ConnectionInfo, ErrorKind, IntoConnectionInfo,
    RedisConnectionInfo, TlsCertificates, TlsMode,
};

use super::config::{RedisConfig, RedisTls};
use super::nodes::Address as NodeAddress;
use crate::RedisError;

/// A client that has not connected yet.
pub(super) enum Target {
    Server(Box<Client>),
    /// The nodes to begin with.
    Cluster {
        seeds: Vec<ConnectionInfo>,
        certificates: Option<TlsCertificates>,
    },
    Sentinel(Box<tokio::sync::Mutex<SentinelClient>>),
}

/// A URL taken apart as far as all forms share it.
struct Address<'a> {
    tls: bool,
    credentials: &'a str,
    hosts: &'a str,
    path: &'a str,
}

impl Target {
    pub(super) fn new(config: &RedisConfig) -> Result<Self, RedisError> {
        let url = config.url.as_str();
        let (scheme, rest) = url.split_once("://").ok_or_else(|| invalid("it has no scheme", url))?;
        let tls = scheme.starts_with("rediss");
        if config.tls.is_some() && !tls {
            return Err(RedisError::Config(
                "TLS files are given but the URL does not start with rediss".into(),
            ));
        }
        if tls {
            choose_crypto_provider();
        }
        let certificates = config.tls.as_ref().map(read_certificates).transpose()?;
        match scheme.trim_start_matches("rediss").trim_start_matches("redis") {
            "" | "+unix" => server(url, certificates),
            "+cluster" => cluster(config, &Address::new(tls, rest), certificates),
            "+sentinel" => sentinel(&Address::new(tls, rest), certificates, url),
            _ => Err(invalid("its scheme is not known", url)),
        }
    }
}

impl Target {
    /// Addresses of the nodes to begin with; none unless it is a cluster.
    pub(super) fn seeds(&self) -> Vec<NodeAddress> {
        match self {
            Self::Cluster { seeds, .. } => seeds.iter().filter_map(address_of).collect(),
            Self::Server(_) | Self::Sentinel(_) => Vec::new(),
        }
    }

    /// A client for one node of the cluster, with the credentials and certificates of all.
    pub(super) fn node(&self, (host, port): &NodeAddress) -> Result<Client, redis::RedisError> {
        let Self::Cluster { seeds, certificates } = self else {
            return Err((ErrorKind::InvalidClientConfig, "only a cluster has nodes").into());
        };
        let first = seeds.first().ok_or((ErrorKind::InvalidClientConfig, "the cluster has no node"))?;
        let mut address = first.addr().clone();
        match &mut address {
            ConnectionAddr::TcpTls { host: first, port: first_port, .. } => {
                (*first, *first_port) = (host.clone(), *port);
            }
            other => *other = ConnectionAddr::Tcp(host.clone(), *port),
        }
        let info = first.clone().set_addr(address);
        match certificates.clone() {
            Some(certificates) => Client::build_with_tls(info, certificates),
            None => Client::open(info),
        }
    }
}

impl<'a> Address<'a> {
    fn new(tls: bool, rest: &'a str) -> Self {
        let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
        let (credentials, hosts) = match authority.rfind('@') {
            Some(at) => authority.split_at(at + 1),
            None => ("", authority),
        };
        Self { tls, credentials, hosts, path }
    }

    /// One URL per host, each complete.
    fn each_host(&self) -> Result<Vec<ConnectionInfo>, RedisError> {
        let scheme = if self.tls { "rediss" } else { "redis" };
        self.hosts
            .split(',')
            .map(|host| connection_info(&format!("{scheme}://{}{host}", self.credentials)))
            .collect()
    }
}

fn server(url: &str, certificates: Option<TlsCertificates>) -> Result<Target, RedisError> {
    let info = connection_info(url)?;
    let client = match certificates {
        Some(certificates) => Client::build_with_tls(info, certificates),
        None => Client::open(info),
    };
    let client = client.map_err(|error| invalid(&error.to_string(), url))?;
    Ok(Target::Server(Box::new(client)))
}

fn cluster(
    config: &RedisConfig,
    address: &Address<'_>,
    certificates: Option<TlsCertificates>,
) -> Result<Target, RedisError> {
    if !address.path.is_empty() {
        return Err(invalid("a database number of a cluster is not supported; remove it", &config.url));
    }
    let seeds = address.each_host()?;
    if seeds.first().and_then(address_of).is_none_or(|(host, _)| host.is_empty()) {
        return Err(invalid("it names no host", &config.url));
    }
    Ok(Target::Cluster { seeds, certificates })
}

/// Host and port of a server; none for a socket.
fn address_of(info: &ConnectionInfo) -> Option<NodeAddress> {
    match info.addr() {
        ConnectionAddr::Tcp(host, port) | ConnectionAddr::TcpTls { host, port, .. } => {
            Some((host.clone(), *port))
        }
        _ => None,
    }
}

/// A connection that does not tell the server which library it is of: the user may lack the right to `CLIENT SETINFO`, and
/// each refusal is an entry in the ACL log.
pub(super) fn without_library_name(info: ConnectionInfo) -> ConnectionInfo {
    let settings = info.redis_settings().clone().set_skip_set_lib_name();
    info.set_redis_settings(settings)
}

fn sentinel(
    address: &Address<'_>,
    certificates: Option<TlsCertificates>,
    url: &str,
) -> Result<Target, RedisError> {
    let (master, database) = address.path.split_once('/').unwrap_or((address.path, ""));
    if master.is_empty() {
        return Err(invalid("it names no master after the hosts of the Sentinels", url));
    }
    let database = match database {
        "" => 0,
        number => number.parse().map_err(|_| invalid("its database is not a number", url))?,
    };
    let servers = address.each_host()?;
    let client = match certificates {
        None => sentinel_client(&servers, master, database, address.tls),
        Some(certificates) => sentinel_client_with(certificates, &servers, master, database),
    };
    let client = client.map_err(|error| invalid(&error.to_string(), url))?;
    Ok(Target::Sentinel(Box::new(tokio::sync::Mutex::new(client))))
}

/// A client that looks for the master with the credentials of the servers, and asks the Sentinels without.
fn sentinel_client(
    servers: &[ConnectionInfo],
    master: &str,
    database: i64,
    tls: bool,
) -> Result<SentinelClient, redis::RedisError> {
    let bare = |server: &ConnectionInfo| {
        let settings = RedisConnectionInfo::default().set_skip_set_lib_name();
        server.clone().set_redis_settings(settings)
    };
    let settings = servers.first().map(|server| server.redis_settings().clone()).unwrap_or_default();
    let mut node = SentinelNodeConnectionInfo::default()
        .set_redis_connection_info(settings.set_db(database))
        .set_tcp_settings(tcp_settings());
    if tls {
        node = node.set_tls_mode(TlsMode::Secure);
    }
    let sentinels = servers.iter().map(bare).collect();
    SentinelClient::build(sentinels, master, Some(node), SentinelServerType::Master)
}

/// As [`sentinel_client`], with certificates. The library has no way to leave out `CLIENT SETINFO` here.
fn sentinel_client_with(
    certificates: TlsCertificates,
    servers: &[ConnectionInfo],
    master: &str,
    database: i64,
) -> Result<SentinelClient, redis::RedisError> {
    let bare = servers.iter().map(|info| info.addr().clone());
    let mut builder = SentinelClientBuilder::new(bare, master, SentinelServerType::Master)?
        .set_client_to_redis_tcp_settings(tcp_settings())
        .set_client_to_sentinel_tcp_settings(tcp_settings())
        .set_client_to_redis_db(database)
        .set_client_to_redis_tls_mode(TlsMode::Secure)
        .set_client_to_redis_certificates(certificates.clone())
        .set_client_to_sentinel_certificates(certificates);
    if let Some(settings) = servers.first().map(ConnectionInfo::redis_settings) {
        if let Some(user) = settings.username() {
            builder = builder.set_client_to_redis_username(user);
        }
        if let Some(password) = settings.password() {
            builder = builder.set_client_to_redis_password(password);
        }
    }
    builder.build()
}

/// rustls panics at the first connection if the process contains several providers, or none, and chose none.
fn choose_crypto_provider() {
    // An error means that the process has chosen already.
    drop(rustls::crypto::ring::default_provider().install_default());
}

fn connection_info(url: &str) -> Result<ConnectionInfo, RedisError> {
    let info = url.into_connection_info().map_err(|error| invalid(&error.to_string(), url))?;
    if matches!(info.addr(), ConnectionAddr::TcpTls { insecure: true, .. }) {
        return Err(invalid("unverified TLS is not supported", url));
    }
    Ok(without_library_name(info.set_tcp_settings(tcp_settings())))
}

/// Without `TCP_NODELAY` a small request can wait 40 ms for the acknowledgement of the one before.
fn tcp_settings() -> TcpSettings {
    TcpSettings::default().set_nodelay(true)
}

fn read_certificates(tls: &RedisTls) -> Result<TlsCertificates, RedisError> {
    let client_tls = match (&tls.client_cert_file, &tls.client_key_file) {
        (Some(certificate), Some(key)) => {
            Some(ClientTlsConfig { client_cert: read(certificate)?, client_key: read(key)? })
        }
        (None, None) => None,
        _ => return Err(RedisError::Config("a client certificate and its key belong together".into())),
    };
    let root_cert = tls.ca_file.as_deref().map(read).transpose()?;
    Ok(TlsCertificates { client_tls, root_cert })
}

fn read(file: &Path) -> Result<Vec<u8>, RedisError> {
    std::fs::read(file)
        .map_err(|error| RedisError::Config(format!("cannot read {}: {error}", file.display())))
}

fn invalid(reason: &str, url: &str) -> RedisError {
    RedisError::Config(format!("{reason} ({})", without_password(url)))
}

/// The URL as it may be shown: no password, and no query, which can hold one too.
pub(super) fn without_password(url: &str) -> String {
    let Some((scheme, rest)) = url.split_once("://") else {
        return "a text that is not a URL".to_owned();
    };
    let query = rest.find('?').unwrap_or(rest.len());
    match rest.rfind('@') {
        None => format!("{scheme}://{}", &rest[..query]),
        // The `?` may belong to a password that is not encoded, or the `@` to a query: who can tell.
        Some(at) if at > query => format!("{scheme}://***"),
        Some(at) => {
            let user = rest[..at].split(':').next().unwrap_or_default();
            format!("{scheme}://{user}:***@{}", &rest[at + 1..query])
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_part_of_a_password_is_shown_wherever_it_stands() {
        for (url, shown) in [
            ("redis://host:1/2", "redis://host:1/2"),
            ("redis://ann:secret@host:1/2", "redis://ann:***@host:1/2"),
            ("redis+cluster://:secret@a:1,b:2", "redis+cluster://:***@a:1,b:2"),
            ("redis://:sec/ret@host", "redis://:***@host"),
            ("redis://:sec#ret@host", "redis://:***@host"),
            ("redis://:sec@ret@host", "redis://:***@host"),
            ("redis://:sec?ret@host", "redis://***"),
            ("redis://:sec?ret@host?db=1", "redis://***"),
            ("redis+unix:///socket?pass=secret", "redis+unix:///socket"),
            ("redis+unix:///socket?pass=sec@ret", "redis+unix://***"),
            ("redis://ann:secret@host?pass=secret", "redis://ann:***@host"),
            (":secret@host", "a text that is not a URL"),
        ] {
            assert_eq!(without_password(url), shown);
            let config = RedisConfig { url: url.to_owned(), ..RedisConfig::default() };
            let said = format!("{config:?} {:?}", Target::new(&config).err());
            assert!(!said.contains("sec") && !said.contains("ret"), "{said}");
        }
    }
}
