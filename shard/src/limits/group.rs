//! Limits over the disks of a VM or tenant, wherever their shards are: atomic buckets, no locks.
//!
//! A disk's own limits are a group with one member. A member spends leases locally, so an atomic word is touched once per
//! lease and not once per request. A lease is what the request at hand lacks, and at least the member's share of 1 ms of
//! the rate (at most 64 operations or 256 KiB). At 10 operations/s that is one operation: low rates are as exact as high
//! ones.
//!
//! **Fairness.** Each direction of each disk takes its own leases, so that it has a place of its own in the buckets' queues
//! (see [`super::bucket`]): disks share a group in equal turns, and reads and writes of a disk share its limits in equal
//! turns. Turns are equal, not bytes: who sends larger requests gets more bytes out of a limit on operations.
//!
//! **Error bound.** Over any time T a bucket admits at most `rate * T + max(burst, rate * CATCH_UP)`, plus the leases
//! that are held: 1 ms of the rate in sum, and one request per direction of each member. Nothing is lost: an idle disk gives
//! its leases back ([`super::Limiter::idle`]), and a gone one too.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::bucket::{Bucket, Lease, NANO};
use super::{BUCKETS, Cost, Direction, Limits, counts_bytes};
use crate::clock::{MILLISECOND, Nanos, SECOND};

/// Leases per second of one bucket, when no request is larger.
const LEASES_PER_SECOND: u64 = SECOND / MILLISECOND;
/// Largest lease of operations that no single request asks for.
const LEASE_MAX_OPS: u64 = 64;
/// Largest lease of bytes that no single request asks for.
const LEASE_MAX_BYTES: u64 = 256 * 1024;

/// A group of disks (a VM, a tenant) with limits over all of them, on any shard.
#[derive(Debug)]
pub struct Group {
    name: String,
    buckets: [Bucket; BUCKETS],
    iops_size: AtomicU64,
    dry_run: AtomicBool,
    members: AtomicU64,
}

impl Group {
    /// A group with its limits, as if it had been at rest.
    pub fn new(name: &str, limits: Limits) -> Group {
        Group::starting(name, limits, 0)
    }

    /// A group with full bursts at `start`, and no catch-up.
    pub(super) fn starting(name: &str, limits: Limits, start: Nanos) -> Group {
        Group {
            name: name.to_owned(),
            buckets: limits.rates().map(|rate| Bucket::new(rate, start)),
            iops_size: AtomicU64::new(limits.iops_size),
            dry_run: AtomicBool::new(limits.dry_run),
            members: AtomicU64::new(0),
        }
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Changes the limits at once, without free credit: a new burst is earned. Debt becomes a shorter wait under a higher
    /// rate and never a longer one. To be called by one thread at a time; `now` is CLOCK_MONOTONIC. Requests of members
    /// that wait profit when they are asked for again: the caller has to make their shards do so.
    pub fn set(&self, limits: Limits, now: Nanos) {
        self.iops_size.store(limits.iops_size, Ordering::Relaxed);
        self.dry_run.store(limits.dry_run, Ordering::Relaxed);
        for (bucket, rate) in self.buckets.iter().zip(limits.rates()) {
            bucket.set(rate, now);
        }
    }

    /// The limits that hold now.
    pub fn limits(&self) -> Limits {
        let [iops_read, iops_write, iops_total, bps_read, bps_write, bps_total] =
            self.buckets.each_ref().map(Bucket::rate);
        Limits {
            iops_total,
            iops_read,
            iops_write,
            bps_total,
            bps_read,
            bps_write,
            iops_size: self.iops_size.load(Ordering::Relaxed),
            dry_run: self.dry_run.load(Ordering::Relaxed),
        }
    }
}

/// A disk's leases in a group. Leaves the group, and gives back what it holds, when dropped.
#[derive(Debug)]
pub(super) struct Member {
    group: Arc<Group>,
    /// Of reads and of writes.
    leases: [[Lease; BUCKETS]; 2],
}

impl Member {
    pub(super) fn join(group: Arc<Group>) -> Member {
        group.members.fetch_add(1, Ordering::Relaxed);
        Member { group, leases: Default::default() }
    }

    pub(super) fn group(&self) -> &Arc<Group> {
        &self.group
    }

    pub(super) fn dry_run(&self) -> bool {
        self.group.dry_run.load(Ordering::Relaxed)
    }

    pub(super) fn cost(&self, ops: u32, bytes: u64) -> Cost {
        Cost::new(ops, bytes, self.group.iops_size.load(Ordering::Relaxed))
    }

    /// Makes sure that each bucket of `indices` has `cost` for `direction` now. Else the latest time at which one of them
    /// will; a dry run does not queue for it.
    pub(super) fn obtain(
        &mut self,
        indices: [usize; 2],
        direction: Direction,
        cost: Cost,
        now: Nanos,
    ) -> Result<(), Nanos> {
        let queue = !self.dry_run();
        let takers = 2 * self.group.members.load(Ordering::Relaxed).max(1);
        let mut until = now;
        for index in indices {
            let most = if counts_bytes(index) { LEASE_MAX_BYTES } else { LEASE_MAX_OPS };
            let least = |rate: u64| i128::from((rate / LEASES_PER_SECOND / takers).min(most)) * NANO;
            let lease = &mut self.leases[direction as usize][index];
            if let Err(start) = lease.obtain(&self.group.buckets[index], cost.of(index), now, queue, least) {
                until = until.max(start);
            }
        }
        if until > now { Err(until) } else { Ok(()) }
    }

    /// Spends what [`Member::obtain`] just said to be there.
    pub(super) fn spend(&mut self, index: usize, direction: Direction, cost: Cost) {
        self.leases[direction as usize][index].spend(&self.group.buckets[index], cost.of(index));
    }

    /// Gives back all that is not spent, places in queues too. Cheap when there is nothing.
    pub(super) fn give_back(&mut self) {
        for leases in &mut self.leases {
            for (lease, bucket) in leases.iter_mut().zip(&self.group.buckets) {
                lease.give_back(bucket);
            }
        }
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        self.give_back();
        self.group.members.fetch_sub(1, Ordering::Relaxed);
    }
}
