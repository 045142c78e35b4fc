//! RAM disks: named, sparse, shared by exports on any shard.

/// A named RAM disk.
#[derive(Debug)]
pub struct RamDisk {}
