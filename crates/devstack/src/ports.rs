//! Ports nobody else takes.

use std::fs::{File, OpenOptions};
use std::hash::{BuildHasher, RandomState};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::ops::RangeInclusive;
use std::path::Path;

use anyhow::{Context, Result, bail};

use crate::base_directory::{base_directory, create};

/// Below the range the kernel hands out for outgoing connections (32768 and up on Linux), above well-known servers.
const PORTS: RangeInclusive<u16> = 15_000..=31_999;

/// A Redis cluster node also listens on its port plus this, for the cluster bus.
pub(crate) const CLUSTER_BUS_OFFSET: u16 = 10_000;

/// A loopback port that is this object's alone, also while nothing listens on it.
///
/// A lock file holds it against every other process of this user; a server can therefore be killed and started again
/// on the same port. Released on drop, and by the kernel when the process dies.
#[derive(Debug)]
pub struct Port {
    number: u16,
    _locks: Vec<File>,
}

impl Port {
    /// Reserves a free port.
    ///
    /// # Errors
    /// When the lock directory is unusable or every port is taken.
    pub fn reserve() -> Result<Self> {
        Self::search(PORTS, &[0])
    }

    /// Reserves a port whose cluster bus port is free too.
    pub(crate) fn reserve_with_cluster_bus() -> Result<Self> {
        Self::search(*PORTS.start()..=*PORTS.end() - CLUSTER_BUS_OFFSET, &[0, CLUSTER_BUS_OFFSET])
    }

    /// The port number.
    #[must_use]
    pub fn number(&self) -> u16 {
        self.number
    }

    /// The port on the IPv4 loopback address.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        SocketAddr::from((Ipv4Addr::LOCALHOST, self.number))
    }

    /// Tries the range in order from a random start, so that processes starting together rarely meet.
    fn search(range: RangeInclusive<u16>, offsets: &[u16]) -> Result<Self> {
        let directory = base_directory()?.join("ports");
        create(&directory, 0o700)?;
        let length = u64::from(range.end() - range.start()) + 1;
        let start = RandomState::new().hash_one(std::process::id()) % length;
        for step in 0..length {
            let distance = u16::try_from((start + step) % length).expect("the range is within u16");
            let number = range.start() + distance;
            let locks: Option<Vec<File>> =
                offsets.iter().map(|offset| lock(&directory, number + offset)).collect::<Result<_>>()?;
            if let Some(locks) = locks {
                return Ok(Self { number, _locks: locks });
            }
        }
        bail!("every port from {} to {} is taken", range.start(), range.end())
    }
}

/// The lock on one port, or `None` when somebody holds it or listens there.
fn lock(directory: &Path, number: u16) -> Result<Option<File>> {
    let path = directory.join(number.to_string());
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .with_context(|| format!("cannot open {}", path.display()))?;
    let free = file.try_lock().is_ok() && TcpListener::bind((Ipv4Addr::LOCALHOST, number)).is_ok();
    Ok(free.then_some(file))
}
