//! Counters that a shard writes and the control thread reads at a scrape.
//!
//! Every counter has one writer, the shard that owns the disk, so an increment is a relaxed load and a relaxed store: no
//! locked instruction on a request's path, and a scrape costs the shard nothing. Figures of one scrape may be some
//! nanoseconds apart from each other.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::clock::Nanos;

/// A counter or gauge with one writer.
#[derive(Debug, Default)]
pub struct Cell(AtomicU64);

impl Cell {
    /// Adds; only the owning shard may call it.
    #[inline]
    pub fn add(&self, n: u64) {
        self.0.store(self.0.load(Ordering::Relaxed).wrapping_add(n), Ordering::Relaxed);
    }

    /// Subtracts; only the owning shard may call it.
    #[inline]
    pub fn sub(&self, n: u64) {
        self.0.store(self.0.load(Ordering::Relaxed).wrapping_sub(n), Ordering::Relaxed);
    }

    /// Sets; only the owning shard may call it.
    #[inline]
    pub fn set(&self, n: u64) {
        self.0.store(n, Ordering::Relaxed);
    }

    /// Reads, from any thread.
    #[inline]
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Upper bounds of the latency buckets in nanoseconds; one more bucket holds what is above the last.
pub const BUCKETS_NS: [Nanos; 13] = [
    50_000,
    100_000,
    200_000,
    500_000,
    1_000_000,
    2_000_000,
    5_000_000,
    10_000_000,
    50_000_000,
    100_000_000,
    500_000_000,
    1_000_000_000,
    10_000_000_000,
];

/// A histogram with the fixed buckets of [`BUCKETS_NS`]; the counts are per bucket, not cumulative.
#[derive(Debug, Default)]
pub struct BucketCounts {
    counts: [Cell; BUCKETS_NS.len() + 1],
    sum_ns: Cell,
}

impl BucketCounts {
    /// Counts one duration.
    #[inline]
    pub fn record(&self, ns: Nanos) {
        let index = BUCKETS_NS.iter().position(|&bound| ns <= bound).unwrap_or(BUCKETS_NS.len());
        self.counts[index].add(1);
        self.sum_ns.add(ns);
    }

    /// The counts, one per bound of [`BUCKETS_NS`] and one for what is above, and the sum in nanoseconds.
    pub fn read(&self) -> ([u64; BUCKETS_NS.len() + 1], u64) {
        (std::array::from_fn(|i| self.counts[i].get()), self.sum_ns.get())
    }
}

/// Operations that are counted apart, in the order of [`DiskCounters::ops`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(usize)]
pub enum OpClass {
    /// Read.
    Read = 0,
    /// Write.
    Write = 1,
    /// Flush.
    Flush = 2,
    /// Discard (trim).
    Discard = 3,
    /// Write zeroes.
    WriteZeroes = 4,
}

impl OpClass {
    /// All classes, in the order of their numbers.
    pub const ALL: [OpClass; 5] =
        [OpClass::Read, OpClass::Write, OpClass::Flush, OpClass::Discard, OpClass::WriteZeroes];

    /// The value of the metrics label `op`.
    pub fn label(self) -> &'static str {
        match self {
            OpClass::Read => "read",
            OpClass::Write => "write",
            OpClass::Flush => "flush",
            OpClass::Discard => "discard",
            OpClass::WriteZeroes => "write_zeroes",
        }
    }
}

/// Counters of one class of operation of one disk.
#[derive(Debug, Default)]
pub struct OpCounters {
    /// Answered without error.
    pub completed: Cell,
    /// Bytes of those.
    pub bytes: Cell,
    /// Answered with an error.
    pub errors: Cell,
    /// From the first kernel operation to the answer.
    pub service: BucketCounts,
    /// From arrival to the first kernel operation: limits, pauses, budgets.
    pub queue: BucketCounts,
    /// Requests that waited for a limit.
    pub throttled: Cell,
    /// Nanoseconds that they waited.
    pub throttled_ns: Cell,
    /// Requests that a dry-run limit would have made wait.
    pub would_throttle: Cell,
}

/// Counters of one disk. The control thread makes them at attach and keeps them over moves.
#[derive(Debug, Default)]
pub struct DiskCounters {
    /// `DiskState` as a number.
    pub state: Cell,
    /// Per class, indexed by [`OpClass`].
    pub ops: [OpCounters; 5],
    /// Requests taken and not answered.
    pub io_now: Cell,
    /// Requests of those that wait for a limit.
    pub throttled_now: Cell,
    /// Connections.
    pub clients: Cell,
    /// Panics or broken invariants in the disk's work.
    pub quarantines: Cell,
    /// Failed fdatasyncs.
    pub flush_failures: Cell,
    /// `resume --data-in-doubt` was said: acknowledged data may be lost.
    pub data_in_doubt: Cell,
    /// Times the disk entered `storage-error`.
    pub storage_errors: Cell,
}

/// Counters of one shard.
#[derive(Debug, Default)]
pub struct ShardCounters {
    /// Nanoseconds spent outside the kernel's wait.
    pub busy_ns: Cell,
    /// Duration of turns: a long one is a stall for the other disks of the shard.
    pub turns: BucketCounts,
    /// Time of the last turn (CLOCK_MONOTONIC, ns): the heartbeat.
    pub last_turn: Cell,
    /// Operations handed to the ring.
    pub ring_ops: Cell,
    /// io_uring_enter calls.
    pub ring_enters: Cell,
    /// Completion-queue overflows.
    pub ring_overflows: Cell,
    /// Disks served.
    pub disks: Cell,
    /// Connections served.
    pub clients: Cell,
    /// Kernel operations in flight.
    pub ops_in_flight: Cell,
    /// Bytes of I/O buffers in use.
    pub buffer_bytes: Cell,
    /// Requests that waited for a buffer.
    pub buffer_waits: Cell,
    /// Ring set-up in use: 0 deferred taskrun, 1 cooperative, 2 plain.
    pub ring_flavour: Cell,
    /// 1 when the kernel lets this thread have memory without waiting for write-back, which may itself wait for this thread
    /// (`PR_SET_IO_FLUSHER`); 0 where it may not ask for that.
    pub io_flusher: Cell,
    /// What it holds of guests.
    pub grants: crate::blkif::GrantAccounts,
}
