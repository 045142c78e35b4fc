//! One disk's path of buckets: its own, then those of its groups. Owned by the disk, used by its shard only.

use std::sync::Arc;

use super::group::{Group, Member};
use super::{Admission, Direction, Limits, TOTAL, own};
use crate::clock::Nanos;

/// The limits of one disk.
///
/// The caller keeps a queue per direction and asks for its first request only; after a `Wait` it asks again at `until`
/// (or a little later) with the same request. One direction's `Wait` says nothing about the other. It may go with the disk
/// to another shard.
#[derive(Debug)]
pub struct Limiter {
    /// The disk's own limits, if it has any, then its groups.
    members: Vec<Member>,
    has_own: bool,
}

impl Limiter {
    /// A disk's limits with full bursts, and the groups whose limits hold as well.
    pub fn new(limits: Limits, groups: Vec<Arc<Group>>, now: Nanos) -> Limiter {
        let own = limits.any().then(|| Arc::new(Group::starting("", limits, now)));
        let has_own = own.is_some();
        Limiter { members: own.into_iter().chain(groups).map(Member::join).collect(), has_own }
    }

    /// Changes limits and groups at once, without free credit, as [`Group::set`] does; a limit where none was begins with an
    /// empty burst. Requests that wait should be asked for again.
    pub fn set(&mut self, limits: Limits, groups: Vec<Arc<Group>>, now: Nanos) {
        let mut former = std::mem::take(&mut self.members);
        let own = limits.any().then(|| {
            let own = match self.has_own {
                true => former[0].group().clone(),
                false => Arc::new(Group::new("", Limits::default())),
            };
            own.set(limits, now);
            own
        });
        self.has_own = own.is_some();
        for group in own.into_iter().chain(groups) {
            let kept = former.iter().position(|member| Arc::ptr_eq(member.group(), &group));
            self.members.push(match kept {
                Some(index) => former.swap_remove(index),
                None => Member::join(group),
            });
        }
    }

    /// True when nothing can ever wait: no limit of its own and no group.
    pub fn is_unlimited(&self) -> bool {
        self.members.is_empty()
    }

    /// May the disk start a request of `ops` operations and `bytes` bytes? (`ops` is above 1 for merged requests only; for
    /// discards and write-zeroes see [`super::erase_cost_bytes`].) `Go` has charged every bucket on the path. `Wait` has
    /// charged none: it keeps a place in queues, which the next request of this direction takes or [`Limiter::idle`]
    /// gives up.
    pub fn admit(&mut self, now: Nanos, direction: Direction, ops: u32, bytes: u64) -> Admission {
        if self.members.is_empty() {
            return Admission::Go { would_wait: false };
        }
        // Buckets of the direction first: a write that waits for one must not hold a place among all.
        let mut late = 0;
        for indices in [own(direction), TOTAL] {
            let mut until = now;
            for (number, member) in self.members.iter_mut().enumerate() {
                match member.obtain(indices, direction, member.cost(ops, bytes), now) {
                    Ok(()) => {}
                    Err(_) if member.dry_run() => late |= bit(number),
                    Err(start) => until = until.max(start),
                }
            }
            if until > now {
                return Admission::Wait { until };
            }
        }
        for (number, member) in self.members.iter_mut().enumerate() {
            if late & bit(number) == 0 {
                let cost = member.cost(ops, bytes);
                for index in own(direction).into_iter().chain(TOTAL) {
                    member.spend(index, direction, cost);
                }
            }
        }
        Admission::Go { would_wait: late != 0 }
    }

    /// Gives leases back. To be called when the disk has had nothing to do for a while (a tick), or when a request that
    /// waited was dropped.
    pub fn idle(&mut self) {
        for member in &mut self.members {
            member.give_back();
        }
    }
}

/// The bit of a member; those from the 64th on share one, which only the count of a dry run can notice.
fn bit(number: usize) -> u64 {
    1 << number.min(63)
}
