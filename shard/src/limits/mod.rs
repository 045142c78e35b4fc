//! Limits of disks and groups.

use serde::{Deserialize, Serialize};

/// One limit; all zero means none.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Rate {
    /// Operations or bytes per second; 0 is no limit.
    pub per_second: u64,
    /// Operations or bytes that may be taken at once after a time of rest, beyond the rate; refills at the rate.
    pub burst: u64,
    /// Operations or bytes beyond the rate that are given once and do not refill.
    pub one_time_burst: u64,
}

/// The limits of a disk or of a group.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// Operations, reads and writes together.
    pub iops_total: Rate,
    /// Operations, reads.
    pub iops_read: Rate,
    /// Operations, writes (also discards and zeroes).
    pub iops_write: Rate,
    /// Bytes, reads and writes together.
    pub bps_total: Rate,
    /// Bytes, reads.
    pub bps_read: Rate,
    /// Bytes, writes.
    pub bps_write: Rate,
    /// An operation of more bytes than this counts as several; 0 is off.
    pub iops_size: u64,
    /// Count what would wait, and let it pass.
    pub dry_run: bool,
}

/// A group of disks (a VM, a tenant) with limits over all of them, on any shard.
#[derive(Debug)]
pub struct Group {
    name: String,
}

impl Group {
    /// A group with its limits.
    pub fn new(name: &str, _limits: Limits) -> Group {
        Group { name: name.to_owned() }
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }
}
