//! Credentials of Redis that change on disk.

use std::time::Duration;

use cache::Redis;
use service::{Report, SaidLately, Shutdown};

use crate::Config;

/// How often files with credentials are read again.
const INTERVAL: Duration = Duration::from_secs(5);

/// Reads the files again and again, so that new connections use what is in them now. Runs until shutdown is requested.
pub async fn follow(redis: Redis, config: Config, shutdown: Shutdown) {
    let mut said = SaidLately::default();
    let mut used = config.redis_url().ok();
    while !shutdown.is_requested() {
        match config.redis_url() {
            Ok(url) if used.as_ref() != Some(&url) => match redis.use_url(url.expose()) {
                Ok(()) => {
                    tracing::info!("the credentials of Redis have changed; new connections use them");
                    used = Some(url);
                }
                Err(error) => warn(&mut said, &Report::of(&error).to_string()),
            },
            Ok(_) => {}
            Err(error) => warn(&mut said, &error.to_string()),
        }
        tokio::select! {
            () = shutdown.requested() => {}
            () = tokio::time::sleep(INTERVAL) => {}
        }
    }
}

fn warn(said: &mut SaidLately, error: &str) {
    if said.is_news(error) {
        tracing::warn!("{error}; new connections to Redis use the credentials from before");
    }
}
