use anyhow::bail;
use clap::{Args, Subcommand};
use event::EventId;
use outbox::dead_letters::{self, DeadLetter};
use service::printable;
use sqlx::PgPool;
use uuid::Uuid;

/// What to do with dead letters.
#[derive(Debug, Clone, Subcommand)]
pub enum DeadCommand {
    /// List the newest dead letters
    List {
        /// How many to list
        #[arg(long, default_value_t = 50)]
        limit: u32,
    },
    /// Show one dead letter with all its keys
    Show {
        /// Its event id
        id: Uuid,
    },
    /// Put dead letters back into the outbox, with new event ids
    Replay(Selection),
    /// Delete dead letters for good
    Discard(Selection),
}

/// Which dead letters.
#[derive(Debug, Clone, Args)]
#[group(required = true, multiple = false)]
pub struct Selection {
    /// Event ids
    pub ids: Vec<Uuid>,
    /// All of them
    #[arg(long)]
    pub all: bool,
}

pub(super) async fn execute(pool: &PgPool, command: DeadCommand) -> anyhow::Result<()> {
    match command {
        DeadCommand::List { limit } => {
            let letters = dead_letters::list(pool, i64::from(limit)).await?;
            if letters.is_empty() {
                println!("no dead letters");
            }
            letters.iter().for_each(print_line);
        }
        DeadCommand::Show { id } => match dead_letters::find(pool, EventId(id)).await? {
            Some(letter) => print_whole(&letter),
            None => bail!("there is no dead letter {id}"),
        },
        DeadCommand::Replay(selection) => {
            let replayed = dead_letters::replay(pool, selection.ids().as_deref()).await?;
            println!("{replayed} put back into the outbox");
        }
        DeadCommand::Discard(selection) => {
            let discarded = dead_letters::discard(pool, selection.ids().as_deref()).await?;
            println!("{discarded} discarded");
        }
    }
    Ok(())
}

impl Selection {
    /// The chosen ids; `None` is all.
    fn ids(&self) -> Option<Vec<EventId>> {
        (!self.all).then(|| self.ids.iter().copied().map(EventId).collect())
    }
}

fn print_line(letter: &DeadLetter) {
    let first = letter.keys.first().map_or(String::new(), |key| printable(key));
    let more = letter.keys.len().saturating_sub(1);
    let more = if more > 0 { format!(" and {more} more") } else { String::new() };
    println!(
        "{}  {}  {}  {first}{more}: {}",
        letter.id,
        letter.dead_at.to_rfc3339(),
        printable(&letter.topic.to_string()),
        printable(&letter.reason)
    );
}

fn print_whole(letter: &DeadLetter) {
    println!("id          {}", letter.id);
    println!("topic       {}", printable(&letter.topic.to_string()));
    println!("enqueued    {}", letter.created_at.to_rfc3339());
    println!("set aside   {}", letter.dead_at.to_rfc3339());
    println!("reason      {}", printable(&letter.reason));
    if let (Some(bytes), Some(version)) = (letter.value_bytes, letter.version) {
        println!("update      {bytes} bytes, version {version}");
    }
    for key in &letter.keys {
        println!("key         {}", printable(key));
    }
}
