//! What an operator asks of the subscriber on the command line.

use std::time::Duration;

use async_nats::jetstream::stream::Stream;
use cache::Redis;
use chrono::{DateTime, Utc};
use clap::Subcommand;
use event::nats::STREAM;
use service::nats::Nats;
use service::parse_duration;

use crate::position::Position;
use crate::replay::Replay;
use crate::{Config, broker};

/// An operator waits in front of the terminal: give up early.
const PATIENCE: Duration = Duration::from_secs(5);

/// Administrative commands.
#[derive(Debug, Clone, Subcommand)]
pub enum Command {
    /// Invalidate keys until told to stop (the default)
    Run,
    /// Show what is pending, redelivered and applied, and how far this cache is behind
    Status,
    /// Apply again what was published lately, for a Redis that may have lost invalidations
    Replay {
        /// How far back, such as 10m or 2h
        #[arg(long, value_parser = parse_duration)]
        since: Duration,
    },
    /// Accept that invalidations are missing for good, and let the subscriber go on from where the stream begins
    AcceptGap,
    /// Ask the running subscriber at HTTP_ADDR whether it is ready; exits with 1 if not
    Health,
}

/// Carries out an administrative command; [`Command::Run`] is not one.
///
/// # Errors
/// What failed, naming what to fix.
pub async fn execute(command: Command, config: &Config) -> anyhow::Result<()> {
    if matches!(command, Command::Health) {
        println!("{}", service::http::ask_ready(config.http_addr).await?);
        return Ok(());
    }
    let redis = Redis::new(config.redis())?;
    let nats = Nats::connect(&config.nats, "subscriber-admin", config.startup_timeout.min(PATIENCE)).await?;
    let stream = broker::stream(&broker::jetstream(&nats)).await?;
    match command {
        Command::Run | Command::Health => unreachable!("handled before"),
        Command::Status => status(&redis, stream, config).await,
        Command::Replay { since } => {
            let replay = Replay {
                stream: &stream,
                redis: &redis,
                topic: config.topic.as_ref(),
                max_payload: nats.client.server_info().max_payload,
                progress: &|| {},
            };
            let messages = replay.run(Some(Utc::now() - since)).await?;
            println!("applied {messages} messages again");
            Ok(())
        }
        Command::AcceptGap => accept_gap(&redis, &stream, config).await,
    }
}

async fn status(redis: &Redis, mut stream: Stream, config: &Config) -> anyhow::Result<()> {
    let durable = &config.durable;
    let Ok(mut consumer) = stream.get_consumer(durable).await else {
        println!("durable       {durable} does not exist yet; start a subscriber, which creates it");
        return Ok(());
    };
    let (seen, pending) =
        broker::look(&mut stream, &mut consumer).await.map_err(|error| anyhow::anyhow!(error))?;
    println!("stream        {STREAM}, sequences {} to {}", seen.first_seq, seen.last_seq);
    println!(
        "durable       {durable}, delivered up to {}, acknowledged up to {}",
        pending.delivered, seen.ack_floor
    );
    println!(
        "pending       {} messages not delivered, {} not acknowledged",
        pending.messages, pending.unacknowledged
    );
    println!("redelivered   {} messages in flight", pending.redelivered);
    println!("lag           {}", lag(&stream, seen.ack_floor, seen.last_seq).await);
    match redis.load_position(durable).await {
        Ok(Some(record)) => {
            let position: Position = serde_json::from_slice(&record)?;
            let until = DateTime::from_timestamp_micros(position.acked_until_us).unwrap_or_default();
            println!("applied       everything published until {}", until.to_rfc3339());
            println!("redis         {}", position.instances.into_iter().collect::<Vec<_>>().join(", "));
        }
        Ok(None) => println!("applied       nothing recorded in this Redis yet"),
        Err(error) => println!("redis         not reachable: {error}"),
    }
    Ok(())
}

/// Age of the oldest message that is not acknowledged.
async fn lag(stream: &Stream, ack_floor: u64, last_seq: u64) -> String {
    if ack_floor >= last_seq {
        return "none".to_owned();
    }
    match stream.get_raw_message(ack_floor + 1).await {
        Ok(message) => {
            let age = (Utc::now() - message.time).to_std().unwrap_or_default();
            format!("{:.1} s, the age of the oldest message not acknowledged", age.as_secs_f64())
        }
        Err(_) => "unknown, the next message has expired".to_owned(),
    }
}

async fn accept_gap(redis: &Redis, stream: &Stream, config: &Config) -> anyhow::Result<()> {
    let record = redis.load_position(&config.durable).await?;
    let position: Position =
        record.map(|record| serde_json::from_slice(&record)).transpose()?.unwrap_or_default();
    let info = stream.cached_info();
    let accepted = Position {
        stream_created_us: info.created.timestamp_micros(),
        acked_seq: info.state.first_sequence.saturating_sub(1).min(info.state.last_sequence),
        ..position
    };
    redis.store_position(&config.durable, &serde_json::to_vec(&accepted)?).await?;
    println!("accepted; the subscriber goes on with sequence {}", info.state.first_sequence);
    Ok(())
}
