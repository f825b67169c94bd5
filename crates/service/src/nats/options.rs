//! Options of the connection to NATS, and what they say about servers and credentials.

use std::path::{Path, PathBuf};

use async_nats::{Auth, AuthError, ServerAddr};
use percent_encoding::percent_decode_str;

use super::{NatsError, creds};
use crate::secret::{Secret, read_secret_file};
use crate::{Report, SecretUrl};

/// Options of the connection: flatten them into the binary's own.
#[derive(Debug, Clone, PartialEq, Eq, clap::Args)]
pub struct NatsOptions {
    /// NATS server or servers, separated by commas
    #[arg(
        long,
        env = "NATS_URL",
        hide_env_values = true,
        default_value = "nats://127.0.0.1:4222",
        conflicts_with = "nats_url_file",
        global = true
    )]
    pub nats_url: SecretUrl,

    /// File with NATS_URL; user and password in it are read again for each attempt to connect
    #[arg(long, env = "NATS_URL_FILE", value_name = "FILE", global = true)]
    pub nats_url_file: Option<PathBuf>,

    /// NATS user, if NATS_URL names none
    #[arg(long, env = "NATS_USER", conflicts_with = "nats_creds", global = true)]
    pub nats_user: Option<String>,

    /// Password of NATS_USER; NATS_PASSWORD_FILE is safer
    #[arg(
        long,
        env = "NATS_PASSWORD",
        hide_env_values = true,
        requires = "nats_user",
        conflicts_with = "nats_password_file",
        global = true
    )]
    pub nats_password: Option<Secret>,

    /// File with the password of NATS_USER, read again for each attempt to connect
    #[arg(long, env = "NATS_PASSWORD_FILE", value_name = "FILE", requires = "nats_user", global = true)]
    pub nats_password_file: Option<PathBuf>,

    /// File with NATS credentials (a .creds file), read again for each attempt to connect
    #[arg(long, env = "NATS_CREDS", value_name = "FILE", global = true)]
    pub nats_creds: Option<PathBuf>,

    /// File with the certificate authority of the NATS servers, read again for each attempt to connect; implies TLS
    #[arg(long, env = "NATS_CA", value_name = "FILE", global = true)]
    pub nats_ca: Option<PathBuf>,

    /// File with the client certificate for NATS; needs NATS_KEY, implies TLS
    #[arg(long, env = "NATS_CERT", value_name = "FILE", requires = "nats_key", global = true)]
    pub nats_cert: Option<PathBuf>,

    /// File with the private key of NATS_CERT
    #[arg(long, env = "NATS_KEY", value_name = "FILE", requires = "nats_cert", global = true)]
    pub nats_key: Option<PathBuf>,

    /// JetStream domain of the stream, if it is not the one of the server connected to, as on a leaf node
    #[arg(long, env = "NATS_JS_DOMAIN", value_parser = parse_domain, global = true)]
    pub nats_js_domain: Option<String>,
}

impl NatsOptions {
    /// The URL, from the file if there is one.
    pub(super) fn url(&self) -> Result<SecretUrl, NatsError> {
        let Some(file) = &self.nats_url_file else { return Ok(self.nats_url.clone()) };
        let text = read_secret_file("NATS_URL_FILE", file)?;
        text.parse().map_err(|source| NatsError::UrlFile { file: file.display().to_string(), source })
    }

    /// The servers. Their addresses hold no credentials, as the client library writes addresses into its log.
    pub(super) fn servers(&self) -> Result<Vec<ServerAddr>, NatsError> {
        parse_servers(&self.url()?)?.into_iter().map(without_user).collect()
    }

    /// Credentials as they are at this moment.
    pub(super) fn auth(&self, nonce: &[u8]) -> Result<Auth, NatsError> {
        let mut auth = Auth::new();
        if let Some(file) = &self.nats_creds {
            let text = read_secret_file("NATS_CREDS", file)?;
            (auth.jwt, auth.signature) = creds::sign(&text, nonce)
                .map(|(jwt, signature)| (Some(jwt), Some(signature)))
                .map_err(|source| NatsError::Credentials { file: file.display().to_string(), source })?;
        } else if let Some(user) = &self.nats_user {
            auth.username = Some(user.clone());
            auth.password = self.password()?;
        } else if let Some(server) = parse_servers(&self.url()?)?.iter().find(|server| server.has_user_pass())
        {
            // A lone user is a token, as NATS has it.
            let user = server.username().map(decode);
            match server.password() {
                Some(password) => (auth.username, auth.password) = (user, Some(decode(password))),
                None => auth.token = user,
            }
        }
        Ok(auth)
    }

    fn password(&self) -> Result<Option<String>, NatsError> {
        match &self.nats_password_file {
            Some(file) => Ok(Some(read_secret_file("NATS_PASSWORD_FILE", file)?)),
            None => Ok(self.nats_password.as_ref().map(|password| password.expose().to_owned())),
        }
    }

    /// [`auth`](Self::auth) in the words of the client library.
    pub(super) fn auth_again(&self, nonce: &[u8]) -> Result<Auth, AuthError> {
        self.auth(nonce).map_err(|error| AuthError::new(Report::of(&error)))
    }

    /// Fails if a file that the client library reads later cannot be read now, as its own error does not name the file.
    pub(super) fn check_files(&self) -> Result<(), NatsError> {
        let files =
            [("NATS_CA", &self.nats_ca), ("NATS_CERT", &self.nats_cert), ("NATS_KEY", &self.nats_key)];
        for (option, file) in files {
            if let Some(file) = file {
                read_secret_file(option, file)?;
            }
        }
        self.auth(&[]).map(drop)
    }

    pub(super) fn client_certificate(&self) -> Option<(&Path, &Path)> {
        Some((self.nats_cert.as_deref()?, self.nats_key.as_deref()?))
    }

    /// First part of the subjects of the JetStream API.
    pub(super) fn api_prefix(&self) -> String {
        match &self.nats_js_domain {
            Some(domain) => format!("$JS.{domain}.API"),
            None => "$JS.API".to_owned(),
        }
    }
}

fn parse_servers(url: &SecretUrl) -> Result<Vec<ServerAddr>, NatsError> {
    url.expose()
        .split(',')
        .map(|server| server.trim().parse::<ServerAddr>())
        .collect::<Result<Vec<_>, _>>()
        .map_err(|_| NatsError::Url { url: url.clone() })
}

fn without_user(server: ServerAddr) -> Result<ServerAddr, NatsError> {
    let mut url = server.into_inner();
    // Both fail only for URLs without a host, which have no user either.
    let _ = url.set_username("").and_then(|()| url.set_password(None));
    ServerAddr::from_url(url).map_err(|_| NatsError::NoServer)
}

fn decode(text: &str) -> String {
    percent_decode_str(text).decode_utf8_lossy().into_owned()
}

fn parse_domain(text: &str) -> Result<String, &'static str> {
    let is_token = !text.is_empty() && !text.contains(|c: char| c.is_whitespace() || ".*>".contains(c));
    is_token.then(|| text.to_owned()).ok_or("a domain is one token: no spaces, '.', '*' or '>'")
}
