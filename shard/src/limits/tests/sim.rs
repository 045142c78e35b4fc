//! A small deterministic model of clients behind limiters: streams of requests with a queue depth and a service time,
//! woken late by their timers, on one simulated clock.

use std::collections::BTreeMap;

use crate::clock::{MICROSECOND, Nanos, SECOND};
use crate::limits::{Admission, Direction, Limiter};

/// Far from 0, as CLOCK_MONOTONIC is on a host that has run for a while.
pub const START: Nanos = 1_000_000 * SECOND;

/// One direction of one disk, always with a full queue while it lives.
pub struct Stream {
    /// Index of the limiter.
    pub disk: usize,
    pub direction: Direction,
    pub depth: usize,
    pub bytes: u64,
    pub service: Nanos,
    /// A timer fires up to this much after its time.
    pub late: Nanos,
    /// The client leaves at this time, in the middle of a wait if it has to.
    pub leaves: Nanos,
}

impl Stream {
    pub fn new(disk: usize, direction: Direction) -> Stream {
        Stream {
            disk,
            direction,
            depth: 32,
            bytes: 4096,
            service: 100 * MICROSECOND,
            late: 0,
            leaves: Nanos::MAX,
        }
    }
}

/// A reproducible sequence (Knuth's MMIX constants).
pub struct Random(pub u64);

impl Random {
    pub fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        if bound == 0 { 0 } else { (self.0 >> 16) % bound }
    }
}

/// Runs for `duration` from `from` and returns how many requests each stream started in it. Events of the same time come in
/// the order of streams, which is the unfairest order that a shard could have.
pub fn run(
    limiters: &mut [Limiter],
    streams: &[Stream],
    from: Nanos,
    duration: Nanos,
    seed: u64,
) -> Vec<u64> {
    let mut random = Random(seed);
    let mut started = vec![0u64; streams.len()];
    let mut in_flight = vec![0usize; streams.len()];
    // Events: (time, stream, number) -> true for a timer, false for a completion.
    let mut events: BTreeMap<(Nanos, usize, u64), bool> = BTreeMap::new();
    let mut waiting = vec![true; streams.len()];
    let mut number = 0u64;
    events.extend((0..streams.len()).map(|stream| ((from, stream, 0), true)));
    while let Some(((now, index, _), timer)) = events.pop_first() {
        let stream = &streams[index];
        if now >= from + duration {
            break;
        }
        if timer {
            waiting[index] = false;
        } else {
            in_flight[index] -= 1;
        }
        while !waiting[index] && in_flight[index] < stream.depth && now < stream.leaves {
            number += 1;
            match limiters[stream.disk].admit(now, stream.direction, 1, stream.bytes) {
                Admission::Go { .. } => {
                    started[index] += 1;
                    in_flight[index] += 1;
                    events.insert((now + stream.service.max(1), index, number), false);
                }
                Admission::Wait { until } => {
                    assert!(until > now, "a wait must end later than now");
                    waiting[index] = true;
                    events.insert((until + random.below(stream.late + 1), index, number), true);
                }
            }
        }
    }
    started
}
