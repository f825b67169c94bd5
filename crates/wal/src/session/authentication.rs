use pgwire_replication::auth::ScramClient;
use pgwire_replication::protocol::framing::{MessageReader, write_password_message};
use pgwire_replication::protocol::messages::auth;
use pgwire_replication::protocol::parse_auth_request;
use tokio::io::BufReader;

use super::transport::Transport;
use super::{SessionError, Settings};

const SCRAM: &str = "SCRAM-SHA-256";

/// Answers the server's questions until it is ready: no password, a plain one, or SCRAM, in which the server proves
/// that it knows the password as well.
pub(super) async fn authenticate(
    stream: &mut BufReader<Transport>,
    reader: &mut MessageReader,
    settings: &Settings,
) -> Result<(), SessionError> {
    loop {
        let message = reader.read(stream).await?;
        match message.tag {
            b'R' => {
                let (code, rest) = parse_auth_request(&message.payload)?;
                match code {
                    auth::OK => {}
                    auth::CLEARTEXT_PASSWORD => send_plain(stream, settings).await?,
                    auth::SASL => scram(stream, reader, settings, rest).await?,
                    auth::MD5_PASSWORD => {
                        return Err(SessionError::Refused(
                            "it asks for an MD5 password, which is not supported; \
                             set password_encryption = scram-sha-256 and the password again"
                                .to_owned(),
                        ));
                    }
                    other => {
                        return Err(SessionError::Refused(format!(
                            "it asks for authentication method {other}; supported are trust, password, \
                             scram-sha-256 and client addresses"
                        )));
                    }
                }
            }
            b'E' => return Err(SessionError::from_server(&message.payload)),
            b'Z' => return Ok(()),
            _ => {}
        }
    }
}

async fn send_plain(stream: &mut BufReader<Transport>, settings: &Settings) -> Result<(), SessionError> {
    let mut password = settings.password()?.as_bytes().to_vec();
    password.push(0);
    Ok(write_password_message(stream, &password).await?)
}

/// RFC 5802 and "SASL Authentication" in the Postgres manual, without channel binding.
async fn scram(
    stream: &mut BufReader<Transport>,
    reader: &mut MessageReader,
    settings: &Settings,
    offered: &[u8],
) -> Result<(), SessionError> {
    if !offered.split(|&byte| byte == 0).any(|mechanism| mechanism == SCRAM.as_bytes()) {
        return Err(SessionError::Refused(format!("it does not offer {SCRAM}")));
    }
    let client = ScramClient::new(&settings.user);
    let first = client.client_first.as_bytes();
    let length = u32::try_from(first.len()).map_err(|_| SessionError::Unexpected)?;
    let mut initial = [SCRAM.as_bytes(), &[0]].concat();
    initial.extend(length.to_be_bytes());
    initial.extend(first);
    write_password_message(stream, &initial).await?;

    let server_first = expect(stream, reader, auth::SASL_CONTINUE).await?;
    let (last, transcript, salted) = client.client_final(settings.password()?, &server_first)?;
    write_password_message(stream, last.as_bytes()).await?;
    let server_final = expect(stream, reader, auth::SASL_FINAL).await?;
    Ok(ScramClient::verify_server_final(&server_final, &salted, &transcript)?)
}

async fn expect(
    stream: &mut BufReader<Transport>,
    reader: &mut MessageReader,
    wanted: i32,
) -> Result<String, SessionError> {
    let message = reader.read(stream).await?;
    match message.tag {
        b'R' => {
            let (code, rest) = parse_auth_request(&message.payload)?;
            if code != wanted {
                return Err(SessionError::Unexpected);
            }
            String::from_utf8(rest.to_vec()).map_err(|_| SessionError::Unexpected)
        }
        b'E' => Err(SessionError::from_server(&message.payload)),
        _ => Err(SessionError::Unexpected),
    }
}
