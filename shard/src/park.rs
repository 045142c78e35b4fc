//! A disk between two shards.

/// A disk with its connections, taken off one shard and not yet on another. `Send`, and holds no kernel operation.
#[derive(Debug)]
pub struct ParkedDisk {
    /// Its configuration.
    pub config: Box<crate::api::DiskConfig>,
}
