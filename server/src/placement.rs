//! Which shard a new disk goes to.
//!
//! The least loaded one: the load is the number of its disks, plus a share for how busy it was in the last seconds, so that an
//! idle shard with a few disks more is preferred to a busy one. A core that is fully busy counts like 40 disks (a disk at 50
//! operations per second costs some thousandths of a core).

use std::sync::Arc;

use crate::fleet::{Fleet, Seat, Shard};
use crate::model::ShardState;
use crate::problem::{Problem, ProblemKind};

/// Disks that a fully busy core counts for, besides those it has.
const BUSY_DISKS: u64 = 40;

/// Takes a place on the shard `wanted`, or on the least loaded one that turns.
pub fn place(fleet: &Fleet, wanted: Option<u16>) -> Result<Seat, Problem> {
    if let Some(index) = wanted {
        return Ok(Seat::take(named(fleet, index)?));
    }
    fleet
        .shards()
        .iter()
        .filter(|shard| shard.state() != ShardState::Ended)
        .min_by_key(|shard| (shard.state() == ShardState::Stalled, load(shard), shard.index))
        .map(Seat::take)
        .ok_or_else(|| {
            Problem::new(
                ProblemKind::Unavailable,
                "every shard has ended; restart the daemon and report its log",
            )
        })
}

/// The shard of a number that an operator gave.
pub fn named(fleet: &Fleet, index: u16) -> Result<&Arc<Shard>, Problem> {
    let last = fleet.shards().len().saturating_sub(1);
    let shard = fleet.shard(index.into()).ok_or_else(|| {
        Problem::invalid(format!("there is no shard {index}: they are numbered from 0 to {last}"))
    })?;
    match shard.ended() {
        None => Ok(shard),
        Some(reason) => Err(Problem::new(
            ProblemKind::Unavailable,
            format!("shard {index} has ended ({reason}): choose another, or restart the daemon"),
        )),
    }
}

fn load(shard: &Shard) -> u64 {
    // In thousandths of a disk, so that small shares count.
    shard.seats() as u64 * 1000 + shard.busy_permille() * BUSY_DISKS
}

#[cfg(test)]
mod tests {
    //! Goal: disks spread evenly, a busy or dead shard gets none, a wrong number is explained. Method: links that do nothing.

    use super::*;
    use crate::fleet::{ShardLink, monotonic_now};
    use shard::api::{Envelope, Event};

    struct Idle;
    impl ShardLink for Idle {
        fn send(&self, _: Envelope) {}

        fn take_back(&self) -> Vec<Envelope> {
            Vec::new()
        }
    }

    fn fleet(shards: usize) -> Arc<Fleet> {
        let (fleet, _) =
            Fleet::new((0..shards).map(|n| Shard::new(n, None, Arc::default(), Box::new(Idle))).collect());
        fleet.shards().iter().for_each(|shard| shard.counters.last_turn.set(monotonic_now()));
        fleet
    }

    #[test]
    fn spreads_evenly_and_avoids_the_busy() {
        let fleet = fleet(3);
        let seats: Vec<Seat> = (0..9).map(|_| place(&fleet, None).unwrap()).collect();
        assert!(fleet.shards().iter().all(|shard| shard.seats() == 3));
        drop(seats);
        assert!(fleet.shards().iter().all(|shard| shard.seats() == 0));
        fleet.shards()[0].sample();
        fleet.shards()[0].counters.busy_ns.set(u64::MAX / 2000);
        fleet.shards()[0].sample();
        assert_eq!(fleet.shards()[0].busy_permille(), 1000);
        let seats: Vec<Seat> = (0..20).map(|_| place(&fleet, None).unwrap()).collect();
        assert!(seats.iter().all(|seat| seat.shard().index != 0));
    }

    #[test]
    fn dead_and_unknown_shards_are_refused() {
        let fleet = fleet(2);
        fleet.deliver(1, Event::Stopped { error: Some("boom".into()) });
        assert!((0..5).all(|_| place(&fleet, None).unwrap().shard().index == 0));
        assert!(place(&fleet, Some(1)).unwrap_err().message.contains("boom"));
        assert!(place(&fleet, Some(2)).unwrap_err().message.contains("from 0 to 1"));
        fleet.deliver(0, Event::Stopped { error: None });
        assert_eq!(place(&fleet, None).unwrap_err().kind, ProblemKind::Unavailable);
    }
}
