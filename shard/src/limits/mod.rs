//! Limits of disks and groups: operations and bytes per second, for reads, writes and both together.
//!
//! ```text
//!               buckets of its direction            buckets of both directions
//!  request ──▶ disk, group (any shard), group … ──▶ disk, group (any shard), group … ──▶ Go: all are charged
//!                   └──────────────┴─────────────────────┴──────────┴──▶ Wait until: none is charged
//! ```
//!
//! A [`Limiter`] is one disk's path of buckets. Each name above is a bucket for operations and one for bytes.
//!
//! - **Virtual time.** A bucket is never refilled by a timer: it is one atomic word of virtual time, from which slices are
//!   taken in order of asking (`bucket.rs`). All maths is in integers and exact, so that no rate drifts.
//! - **Debt.** A request is admitted when no bucket on its path is in debt; then its whole cost is taken, and the debt is
//!   paid by waiting. So a request of any size passes at any rate, and over any time T a bucket admits at most
//!   `rate * T + max(burst, rate * CATCH_UP)`, one request per taker, and leases of 1 ms of the rate in sum.
//! - **No burst unless asked.** A bucket that was not used gathers [`CATCH_UP`] of its rate and no more. That much is needed:
//!   a request that waits is woken late by its timer, and the time it overslept must not be lost to it. It is lost when
//!   more than this is overslept.
//! - **Writes and reads.** A write that waits for a write bucket has taken nothing that reads use. Where both wait for
//!   a bucket of both ("total"), they take turns.
//! - **Groups.** Disks on any shard take turns at a group's buckets without locks (`group.rs`).
//! - **Costs.** An operation counts as `ceil(bytes / iops_size)` operations, at least as many as the caller says. Discards and write-zeroes count
//!   as writes, with [`erase_cost_bytes`]. Flushes cost nothing: they are not brought here.
//! - **Dry run.** A disk or group whose `dry_run` is set lets everything pass. What its buckets would have delayed is
//!   reported and not charged, so the count is the excess over the limit, not a debt that grows without end.

use serde::{Deserialize, Serialize};

use crate::clock::{MILLISECOND, Nanos};

mod bucket;
mod group;
mod limiter;

pub use group::Group;
pub use limiter::Limiter;

/// How much of its rate an unused bucket gathers without burst: the longest oversleeping that costs no accuracy.
pub const CATCH_UP: Nanos = 10 * MILLISECOND;

/// A byte that is discarded or zeroed counts as 1/64 of a byte that is moved: such operations cost the store little,
/// but a disk must not keep it busy with endless ranges.
const ERASE_DIVISOR: u64 = 64;

/// What a discard or write-zeroes of `bytes` bytes costs, in bytes. It is also one write operation.
pub fn erase_cost_bytes(bytes: u64) -> u64 {
    bytes.div_ceil(ERASE_DIVISOR)
}

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

/// Which way the data goes. Discards and write-zeroes are writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// To the client.
    Read = 0,
    /// From the client.
    Write = 1,
}

/// The answer of [`Limiter::admit`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub enum Admission {
    /// Start the request; it is paid.
    Go {
        /// A dry run let it pass.
        would_wait: bool,
    },
    /// Ask again with the same request; nothing is paid.
    Wait {
        /// When it is worth asking again; always later than the `now` of the question.
        until: Nanos,
    },
}

/// Buckets of a disk or group.
const BUCKETS: usize = 6;
/// Indices of the two buckets (operations, bytes) that both directions share.
const TOTAL: [usize; 2] = [2, 5];

/// Indices of the two buckets (operations, bytes) of one direction.
fn own(direction: Direction) -> [usize; 2] {
    [direction as usize, direction as usize + 3]
}

/// True for a bucket that counts bytes.
fn counts_bytes(index: usize) -> bool {
    index >= 3
}

impl Limits {
    /// True when there is any limit.
    pub fn any(&self) -> bool {
        self.rates().iter().any(|rate| rate.per_second > 0)
    }

    /// By index: operations of reads, writes, both; bytes of reads, writes, both.
    fn rates(&self) -> [Rate; BUCKETS] {
        [self.iops_read, self.iops_write, self.iops_total, self.bps_read, self.bps_write, self.bps_total]
    }
}

/// What one request costs in a disk or group.
#[derive(Debug, Clone, Copy)]
struct Cost {
    ops: u64,
    bytes: u64,
}

impl Cost {
    fn new(ops: u32, bytes: u64, iops_size: u64) -> Cost {
        // The later pieces of a large request come with no operation of their own.
        let pieces = if iops_size == 0 { 0 } else { bytes.div_ceil(iops_size) };
        Cost { ops: pieces.max(u64::from(ops)), bytes }
    }

    /// In the unit of bucket `index`.
    fn of(self, index: usize) -> u64 {
        if counts_bytes(index) { self.bytes } else { self.ops }
    }
}

#[cfg(test)]
mod tests;
