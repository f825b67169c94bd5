//! The nodes of a cluster: connections to each of its own, and which node has which slot.
//!
//! A node that does not answer holds up only what is asked of that node. Everything else has connections of its own, and
//! the first node that answers says where the slots are.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use deadpool_redis::redis::{Cmd, Value};
use futures::future::select_ok;

use super::Redis;
use super::batch::read;
use super::endpoint::Endpoint;
use super::masters::node_name;
use crate::RedisError;
use crate::names::Shard;

/// Host and port.
pub(super) type Address = (String, u16);

/// Number of slots of every cluster.
const SLOTS: usize = 16_384;

/// Shortest time between two questions where the slots are, so that failing requests do not ask one each.
const ASK_PAUSE: Duration = Duration::from_millis(100);

/// No node has the slot.
const NOBODY: u16 = u16::MAX;

/// What is known of the nodes of a cluster.
pub(super) struct Nodes {
    seeds: Vec<Address>,
    connections: usize,
    endpoints: Mutex<HashMap<Address, Arc<Endpoint>>>,
    map: Mutex<Arc<SlotMap>>,
    asked: tokio::sync::Mutex<Option<Instant>>,
    is_doubtful: AtomicBool,
}

/// Which node has which slot.
#[derive(Default)]
pub(super) struct SlotMap {
    nodes: Vec<Address>,
    /// Per slot a position in `nodes`.
    owners: Vec<u16>,
}

impl SlotMap {
    pub(super) fn owner(&self, slot: u16) -> Option<&Address> {
        self.nodes.get(usize::from(*self.owners.get(usize::from(slot))?))
    }

    /// The masters, each with its slots.
    pub(super) fn masters(&self) -> BTreeMap<Address, Vec<Shard>> {
        let mut masters = BTreeMap::<Address, Vec<Shard>>::new();
        for (slot, owner) in (0_u16..).zip(&self.owners) {
            if let Some(node) = self.nodes.get(usize::from(*owner)) {
                masters.entry(node.clone()).or_default().push(Shard::Slot(slot));
            }
        }
        masters
    }

    /// Reads the answer to `CLUSTER SLOTS` of the node at `answered`.
    fn read(ranges: Vec<Value>, answered: &Address) -> Result<Self, RedisError> {
        let mut map = Self { nodes: Vec::new(), owners: vec![NOBODY; SLOTS] };
        for range in ranges {
            let (first, last, (host, port)) = read_range(range)?;
            // A node that knows no name of its own means the one by which it was reached.
            let node = (if host.is_empty() { answered.0.clone() } else { host }, port);
            let position = map.nodes.iter().position(|known| *known == node).unwrap_or_else(|| {
                map.nodes.push(node);
                map.nodes.len() - 1
            });
            let owners = map.owners.get_mut(usize::from(first)..=usize::from(last));
            let owners = owners.ok_or_else(|| RedisError::unexpected("a slot beyond the last"))?;
            owners.fill(u16::try_from(position).unwrap_or(NOBODY));
        }
        Ok(map)
    }
}

impl Nodes {
    pub(super) fn new(seeds: Vec<Address>, connections: usize) -> Self {
        Self {
            seeds,
            connections,
            endpoints: Mutex::default(),
            map: Mutex::default(),
            asked: tokio::sync::Mutex::default(),
            is_doubtful: AtomicBool::new(true),
        }
    }

    /// Has the next request ask where the slots are.
    pub(super) fn doubt(&self) {
        self.is_doubtful.store(true, Ordering::Relaxed);
    }

    pub(super) fn endpoint(&self, address: &Address) -> Arc<Endpoint> {
        let mut endpoints = self.endpoints.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(endpoint) = endpoints.get(address) {
            return Arc::clone(endpoint);
        }
        let endpoint = Arc::new(Endpoint::new(node_name(Some(address)), self.connections));
        endpoints.insert(address.clone(), Arc::clone(&endpoint));
        endpoint
    }

    pub(super) fn known(&self) -> Arc<SlotMap> {
        Arc::clone(&self.map.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn learn(&self, map: SlotMap) -> Arc<SlotMap> {
        let map = Arc::new(map);
        let mut endpoints = self.endpoints.lock().unwrap_or_else(PoisonError::into_inner);
        endpoints.retain(|address, _| map.nodes.contains(address) || self.seeds.contains(address));
        *self.map.lock().unwrap_or_else(PoisonError::into_inner) = Arc::clone(&map);
        map
    }

    /// Everyone who may know where the slots are.
    fn candidates(&self) -> Vec<Address> {
        let known = self.known();
        let seeds = self.seeds.iter().filter(|seed| !known.nodes.contains(seed));
        known.nodes.iter().chain(seeds).cloned().collect()
    }
}

impl Redis {
    /// Which node has which slot, as far as is known now. Asked for anew after a failure.
    ///
    /// # Errors
    /// If nothing is known and no node answers.
    pub(super) async fn slot_map(&self) -> Result<Arc<SlotMap>, RedisError> {
        let nodes = self.lanes.nodes();
        let known = nodes.known();
        if !known.nodes.is_empty() && !nodes.is_doubtful.load(Ordering::Relaxed) {
            return Ok(known);
        }
        let mut asked = nodes.asked.lock().await;
        let known = nodes.known();
        let is_recent = asked.is_some_and(|asked| asked.elapsed() < ASK_PAUSE);
        if !known.nodes.is_empty() && (is_recent || !nodes.is_doubtful.load(Ordering::Relaxed)) {
            return Ok(known);
        }
        nodes.is_doubtful.store(false, Ordering::Relaxed);
        let answer = self.ask_for_slots().await;
        *asked = Some(Instant::now());
        match answer {
            Ok(map) => Ok(nodes.learn(map)),
            Err(error) => {
                nodes.doubt();
                if known.nodes.is_empty() { Err(error) } else { Ok(known) }
            }
        }
    }

    /// The answer of the first node that gives one.
    async fn ask_for_slots(&self) -> Result<SlotMap, RedisError> {
        let asking = self.lanes.nodes().candidates().into_iter().map(|address| {
            Box::pin(async move {
                let mut slots = Cmd::new();
                slots.arg("CLUSTER").arg("SLOTS");
                let answer = self.query_node(Some(&address), &slots).await?;
                SlotMap::read(read(answer)?, &address)
            })
        });
        Ok(select_ok(asking.collect::<Vec<_>>()).await?.0)
    }
}

/// One element of `CLUSTER SLOTS`: first slot, last slot, master, replicas. A node is host, port and more.
fn read_range(range: Value) -> Result<(u16, u16, Address), RedisError> {
    let mut parts = read::<Vec<Value>>(range)?.into_iter();
    let (Some(first), Some(last), Some(master)) = (parts.next(), parts.next(), parts.next()) else {
        return Err(RedisError::unexpected("a range of slots without a master"));
    };
    let mut address = read::<Vec<Value>>(master)?.into_iter();
    let (Some(host), Some(port)) = (address.next(), address.next()) else {
        return Err(RedisError::unexpected("a master without an address"));
    };
    let host: Option<String> = read(host)?;
    Ok((read(first)?, read(last)?, (host.unwrap_or_default(), read(port)?)))
}
