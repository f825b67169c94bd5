//! From a request to the connection that carries it, and from its answer to what the caller is told.

use std::str::FromStr as _;

use deadpool_redis::redis::aio::ConnectionLike;
use deadpool_redis::redis::{self, Arg, Cmd, FromRedisValue, Pipeline, Value, from_redis_value};

use super::Redis;
use super::endpoint::Lane;
use super::nodes::{Address, SlotMap};
use crate::RedisError;
use crate::slot::slot_of;

/// How often a request follows its slot to another node before it fails.
const MAX_REDIRECTS: u32 = 3;

/// Where a node says that a slot is.
struct Redirect {
    to: Address,
    /// The node takes requests about the slot only after `ASKING`: the slot is on its way there.
    asking: bool,
}

impl Redis {
    /// Runs one command. In a cluster it goes where its key lives, or without a key to any node that answers.
    pub(crate) async fn query<T: FromRedisValue>(&self, command: &Cmd) -> Result<T, RedisError> {
        let answer = match (self.is_cluster(), key_of(command)) {
            (false, _) => self.query_node(None, command).await,
            (true, Some(key)) => self.query_slot(slot_of(key), command).await,
            (true, None) => self.query_any(command).await,
        };
        from_redis_value(answer?).map_err(|error| RedisError::Unexpected(error.into()))
    }

    /// Runs one command at a node of the cluster, or without an address at the one server.
    pub(super) async fn query_node(
        &self,
        address: Option<&Address>,
        command: &Cmd,
    ) -> Result<Value, RedisError> {
        let lane = self.lanes.get(address, self.limit).await?;
        let answer = self.send(&lane, command).await;
        answer.map_err(|error| self.lanes.failed(&lane, error))
    }

    async fn send(&self, lane: &Lane, command: &Cmd) -> Result<Value, redis::RedisError> {
        let mut connection = lane.connection();
        connection.set_response_timeout(self.limit);
        connection.req_packed_command(command).await?.extract_error()
    }

    /// Runs one command at the node that has the slot, and follows the slot where it is said to be.
    async fn query_slot(&self, slot: u16, command: &Cmd) -> Result<Value, RedisError> {
        let map = self.slot_map().await?;
        let mut place = Redirect { to: self.owner(&map, slot)?, asking: false };
        for _ in 0..MAX_REDIRECTS {
            let lane = self.lanes.get(Some(&place.to), self.limit).await?;
            let answer = match place.asking {
                false => self.send(&lane, command).await,
                true => self.send_asking(&lane, command).await,
            };
            match answer {
                Ok(answer) => return Ok(answer),
                Err(error) => match redirect(&error, &place.to) {
                    Some(next) => {
                        self.lanes.failed(&lane, error);
                        place = next;
                    }
                    None => return Err(self.lanes.failed(&lane, error)),
                },
            }
        }
        Err(RedisError::Unavailable(super::SlotIsMoving.into()))
    }

    /// In one write, so that no request of another task comes in between.
    async fn send_asking(&self, lane: &Lane, command: &Cmd) -> Result<Value, redis::RedisError> {
        let mut both = Pipeline::with_capacity(2);
        both.cmd("ASKING").add_command(command.clone());
        let mut connection = lane.connection();
        connection.set_response_timeout(self.limit);
        let answers = connection.req_packed_commands(&both, 0, 2).await?;
        answers.into_iter().next_back().unwrap_or(Value::Nil).extract_error()
    }

    /// Runs one command at the first node that answers it.
    async fn query_any(&self, command: &Cmd) -> Result<Value, RedisError> {
        let map = self.slot_map().await?;
        let nodes = map
            .masters()
            .into_keys()
            .map(|address| Box::pin(async move { self.query_node(Some(&address), command).await }));
        let nodes: Vec<_> = nodes.collect();
        if nodes.is_empty() {
            return Err(RedisError::unavailable("no node of the cluster has a slot"));
        }
        Ok(futures::future::select_ok(nodes).await?.0)
    }

    /// The node that has a slot.
    pub(super) fn owner(&self, map: &SlotMap, slot: u16) -> Result<Address, RedisError> {
        map.owner(slot).cloned().ok_or_else(|| {
            self.lanes.nodes().doubt();
            RedisError::unavailable("no node of the cluster has the slot")
        })
    }

    /// Runs commands in one write and returns the answer to each, which may be an error.
    pub(super) async fn pipeline_on(
        &self,
        lane: &Lane,
        pipeline: &Pipeline,
    ) -> Result<Vec<Value>, RedisError> {
        let mut connection = lane.connection();
        connection.set_response_timeout(self.limit);
        let answers = connection.req_packed_commands(pipeline, 0, pipeline.len()).await;
        answers.map_err(|error| self.lanes.failed(lane, error))
    }

    /// An answer in a pipeline as the caller sees it.
    pub(super) fn answer(&self, lane: &Lane, answer: Value) -> Result<Value, RedisError> {
        answer.extract_error().map_err(|error| self.lanes.failed(lane, error))
    }
}

/// The first key of a command of this crate.
fn key_of(command: &Cmd) -> Option<&[u8]> {
    let mut arguments = command.args_iter().map(|argument| match argument {
        Arg::Simple(bytes) => bytes,
        _ => b"0",
    });
    match arguments.next()? {
        b"PING" | b"TIME" | b"INFO" | b"CLUSTER" | b"CONFIG" | b"SCAN" => None,
        b"EVAL" | b"EVALSHA" => arguments.nth(2),
        _ => arguments.next(),
    }
}

/// Where an error says that the slot is. A node that knows no name of its own has that by which it was reached.
fn redirect(error: &redis::RedisError, asked: &Address) -> Option<Redirect> {
    let (host, port) = error.redirect_node()?.0.rsplit_once(':')?;
    let host = if host.is_empty() { asked.0.clone() } else { host.to_owned() };
    let asking = error.code() == Some("ASK");
    Some(Redirect { to: (host, u16::from_str(port).ok()?), asking })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::script::FILL;

    #[test]
    fn a_command_goes_where_its_first_key_lives() {
        let command = |words: &[&str]| {
            let mut command = Cmd::new();
            command.arg(words);
            command
        };
        assert_eq!(key_of(&command(&["GET", "k"])), Some(&b"k"[..]));
        assert_eq!(key_of(&command(&["UNLINK", "a", "b"])), Some(&b"a"[..]));
        assert_eq!(key_of(&command(&["EVALSHA", "0123", "2", "a", "b"])), Some(&b"a"[..]));
        assert_eq!(key_of(FILL.call_with_text().arg(1).arg("k")), Some(&b"k"[..]));
        assert_eq!(key_of(&command(&["TIME"])), None);
    }
}
