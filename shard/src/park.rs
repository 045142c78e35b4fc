//! A disk between two shards: configuration, connections, and the requests that no kernel operation has begun.

use crate::api::{DiskConfig, DiskState};
use crate::blkif::connect::ParkedGuest;
use crate::nbd::ParkedConn;
use crate::request::Kind;

/// A request that was taken and not started, with its data.
#[derive(Debug)]
pub struct ParkedRequest {
    pub(crate) kind: Kind,
    pub(crate) offset: u64,
    pub(crate) len: u64,
    pub(crate) operations: u32,
    pub(crate) payload: Option<Vec<u8>>,
    /// Index of its connection in [`ParkedDisk`] and the connection's command; `None` when its connection has gone.
    pub(crate) origin: Option<(usize, u32)>,
    pub(crate) arrived: crate::clock::Nanos,
}

/// A disk with its connections, taken off one shard and not yet on another. `Send`, and holds no kernel operation.
#[derive(Debug)]
pub struct ParkedDisk {
    /// Its configuration.
    pub config: Box<DiskConfig>,
    /// The state to go on in.
    pub(crate) state: DiskState,
    pub(crate) reason: String,
    pub(crate) flush_failed: bool,
    pub(crate) conns: Vec<ParkedConn>,
    pub(crate) guests: Vec<ParkedGuest>,
    pub(crate) requests: Vec<ParkedRequest>,
}

const fn assert_send<T: Send>() {}
const _: () = assert_send::<ParkedDisk>();
