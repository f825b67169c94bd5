use std::path::PathBuf;
use std::time::Duration;

use super::address::without_password;

/// How to reach Redis.
///
/// URLs:
///
/// - `redis://[[user]:password@]host[:port][/db]`, `rediss://…` with TLS;
/// - `redis+cluster://[[user]:password@]host:port,host:port,…`, `rediss+cluster://…`;
/// - `redis+sentinel://[[user]:password@]host:port,host:port,…/master[/db]`, `rediss+sentinel://…`, where the credentials
///   are those of the servers; the Sentinels themselves are asked without.
#[derive(Clone)]
pub struct RedisConfig {
    /// Where Redis is; see above for the forms.
    pub url: String,
    /// Number of connections. Requests share them, so few are enough: one per busy core.
    pub pool_size: usize,
    /// Longest time to establish a connection.
    pub connect_timeout: Duration,
    /// Longest time to wait for the answer to one request. A request that timed out may still be carried out.
    pub response_timeout: Duration,
    /// Certificates, if the system's own are not the right ones.
    pub tls: Option<RedisTls>,
}

/// TLS material, all in PEM files.
#[derive(Debug, Clone, Default)]
pub struct RedisTls {
    /// Certificates of the authorities to trust instead of the system's.
    pub ca_file: Option<PathBuf>,
    /// Certificate that proves who the client is; needs `client_key_file`.
    pub client_cert_file: Option<PathBuf>,
    /// Private key of `client_cert_file`.
    pub client_key_file: Option<PathBuf>,
}

impl Default for RedisConfig {
    fn default() -> Self {
        Self {
            url: "redis://127.0.0.1:6379".to_owned(),
            pool_size: 4,
            connect_timeout: Duration::from_secs(2),
            response_timeout: Duration::from_secs(5),
            tls: None,
        }
    }
}

impl std::fmt::Debug for RedisConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RedisConfig")
            .field("url", &without_password(&self.url))
            .field("pool_size", &self.pool_size)
            .field("connect_timeout", &self.connect_timeout)
            .field("response_timeout", &self.response_timeout)
            .field("tls", &self.tls)
            .finish()
    }
}
