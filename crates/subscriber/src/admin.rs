//! What an operator asks of the subscriber on the command line.

use std::time::Duration;

use anyhow::Context as _;
use async_nats::jetstream::consumer::PullConsumer;
use async_nats::jetstream::{Context, stream::Stream};
use cache::Redis;
use chrono::{DateTime, Utc};
use clap::Subcommand;
use event::nats::STREAM;
use service::nats::Nats;
use service::{Report, parse_duration, printable};

use crate::broker::{BrokerError, Look};
use crate::durable::Info;
use crate::position::Position;
use crate::replay::Replay;
use crate::{Config, broker, debezium, durable};

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
    let redis = config.connect_redis()?;
    let nats = Nats::connect(&config.nats, "subscriber-admin", PATIENCE).await?;
    let jetstream = broker::jetstream(&nats);
    let stream = broker::stream(&nats, &jetstream).await;
    if matches!(command, Command::Status) && config.debezium_stream.is_some() {
        debezium_status(&jetstream, config).await?;
        if matches!(stream, Err(BrokerError::NoStream)) {
            println!("stream        {STREAM} does not exist; only Debezium's change events are applied");
            return Ok(());
        }
    }
    let stream = stream?;
    match command {
        Command::Run | Command::Health => unreachable!("handled before"),
        Command::Status => status(&redis, &jetstream, stream, config).await,
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

async fn debezium_status(jetstream: &Context, config: &Config) -> anyhow::Result<()> {
    let name = config.debezium_stream.as_deref().unwrap_or_default();
    let stream = jetstream
        .get_stream(name)
        .await
        .with_context(|| format!("SUBSCRIBER_DEBEZIUM_STREAM (--debezium-stream) {name} cannot be used"))?;
    let durable = debezium::durable(config);
    let Ok(consumer) = stream.get_consumer(&durable).await else {
        println!("debezium      durable {durable} does not exist yet; start a subscriber, which creates it");
        return Ok(());
    };
    let consumer: PullConsumer = consumer;
    let info = consumer.cached_info();
    println!(
        "debezium      stream {name}, durable {durable}: {} messages not delivered, {} not acknowledged",
        info.num_pending, info.num_ack_pending
    );
    Ok(())
}

async fn status(
    redis: &Redis,
    jetstream: &Context,
    mut stream: Stream,
    config: &Config,
) -> anyhow::Result<()> {
    let durable = &config.durable;
    if durable::find(jetstream, durable).await.map_err(|error| anyhow::anyhow!(error))?.is_none() {
        println!("durable       {durable} does not exist yet; start a subscriber, which creates it");
        return Ok(());
    }
    let look = broker::look(jetstream, &mut stream, durable).await;
    let Look { seen, pending, consumer, .. } = look.map_err(|error| anyhow::anyhow!(error))?;
    println!("subscriber    {}", running(config).await);
    let record = redis.load_position(durable).await;
    println!("stream        {STREAM}, sequences {} to {}", seen.first_seq, seen.last_seq);
    println!(
        "durable       {durable}, delivered up to {}, acknowledged up to {}",
        pending.delivered, seen.ack_floor
    );
    show_owner(redis, &consumer, config).await;
    println!(
        "pending       {} messages not delivered, {} not acknowledged",
        pending.messages, pending.unacknowledged
    );
    println!("redelivered   {} messages in flight", pending.redelivered);
    let position: Option<Position> = match &record {
        Ok(Some(record)) => Some(serde_json::from_slice(record)?),
        _ => None,
    };
    let mut applied = seen.ack_floor;
    if let Some(position) =
        position.as_ref().filter(|known| known.stream_created_us == seen.stream_created_us)
    {
        applied = applied.max(position.acked_seq);
    }
    if let Some(subject) = durable::filter(config) {
        applied = broker::reach(&mut stream, &subject, seen, applied).await.unwrap_or(applied);
    }
    println!("lag           {}", lag(&stream, applied, seen.last_seq).await);
    match (record, position) {
        (_, Some(position)) => {
            println!("applied       {}", applied_until(&position, seen.last_seq));
            println!(
                "redis         {}",
                printable(&position.instances.into_iter().collect::<Vec<_>>().join(", "))
            );
        }
        (Ok(_), None) => println!("applied       nothing recorded in this Redis yet"),
        (Err(error), None) => println!("redis         not reachable: {}", Report::of(&error)),
    }
    Ok(())
}

/// The cache that the durable belongs to, and what keeps it from being what it should be.
async fn show_owner(redis: &Redis, consumer: &Info, config: &Config) {
    if let Some(claim) = consumer.claim() {
        let own = redis.load_identity(&config.durable).await;
        let whose = match own {
            Ok(Some(id)) if id == claim.cache => "this cache",
            Ok(_) => "ANOTHER cache",
            Err(_) => "a cache",
        };
        println!("owner         {whose}, {} (id {})", claim.redis, claim.cache);
    }
    if let Some(until) = &consumer.paused_until {
        println!("PAUSED        until {until}; resume it: nats consumer resume {STREAM} {}", config.durable);
    }
    let differences = consumer.differences(config);
    if !differences.is_empty() {
        println!("options       {differences}");
    }
}

/// What the running subscriber says of itself, with the keys that it may not touch and the nodes that do not answer.
async fn running(config: &Config) -> String {
    match service::http::ask_ready(config.http_addr).await {
        Ok(_) => "ready".to_owned(),
        Err(error) => Report::of(&error).to_string(),
    }
}

fn applied_until(position: &Position, last_seq: u64) -> String {
    match DateTime::from_timestamp_micros(position.acked_until_us) {
        Some(until) if position.acked_until_us > 0 => {
            format!("everything published until {}", until.to_rfc3339())
        }
        _ if last_seq == 0 => "nothing was published yet".to_owned(),
        _ => "nothing yet, or what has expired since".to_owned(),
    }
}

/// Age of the oldest message that is not applied.
async fn lag(stream: &Stream, applied: u64, last_seq: u64) -> String {
    if applied >= last_seq {
        return "none".to_owned();
    }
    match stream.get_raw_message(applied + 1).await {
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
        accepted_us: Utc::now().timestamp_micros(),
        holes_until: info.state.last_sequence,
        ..position
    };
    redis.store_position(&config.durable, &serde_json::to_vec(&accepted)?).await?;
    println!(
        "accepted; the subscriber goes on within seconds, or when it is started, with sequence {}",
        info.state.first_sequence
    );
    Ok(())
}
