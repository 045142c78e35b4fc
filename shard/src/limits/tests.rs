//! Goal: limits hold within 1 % whatever the rate, queue depth, service time and lateness of timers; nothing starves;
//! changes take effect at once; nothing overflows. Method: exact oracles for single buckets, a simulated clock with seeded
//! randomness for whole paths, real threads for the atomics.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use proptest::prelude::*;

use super::bucket::{Bucket, Lease, NANO};
use super::*;
use crate::clock::{MICROSECOND, SECOND};
use sim::{Random, START, Stream, run};

mod sim;

const READ: Direction = Direction::Read;
const WRITE: Direction = Direction::Write;
const GO: Admission = Admission::Go { would_wait: false };

fn rate(per_second: u64) -> Rate {
    Rate { per_second, ..Rate::default() }
}

fn iops(per_second: u64) -> Limits {
    Limits { iops_total: rate(per_second), ..Limits::default() }
}

fn disk(limits: Limits) -> Limiter {
    Limiter::new(limits, vec![], START)
}

fn members(limits: Limits, count: usize) -> (Arc<Group>, Vec<Limiter>) {
    let group = Arc::new(Group::new("g", limits));
    let limiters = (0..count).map(|_| Limiter::new(Limits::default(), vec![group.clone()], START)).collect();
    (group, limiters)
}

fn until(admission: Admission) -> Nanos {
    match admission {
        Admission::Wait { until } => until,
        Admission::Go { .. } => panic!("expected a wait"),
    }
}

/// How many requests of one operation pass at `now`, up to `most`; what then waits is dropped.
fn pass_at(limiter: &mut Limiter, now: Nanos, direction: Direction, most: u64) -> u64 {
    let passed = (0..most).take_while(|_| limiter.admit(now, direction, 1, 0) == GO).count() as u64;
    limiter.idle();
    passed
}

/// Asserts that `units` are within 1 % (and one request, and the catch-up) of a rate over a time.
fn assert_held(units: u64, per_second: u64, duration: Nanos, request: u64, what: &str) {
    let exact = u128::from(per_second) * u128::from(duration);
    let units = u128::from(units) * u128::from(SECOND);
    let slack = exact / 100 + u128::from(request) * u128::from(SECOND);
    assert!(
        units.abs_diff(exact) <= slack,
        "{what}: {} instead of {}",
        units / 1_000_000_000,
        exact / 1_000_000_000
    );
}

/// Five seconds, longer for low rates and shorter for high ones, so that there are 1,000 to 200,000 requests.
fn duration_for(requests_per_second: f64) -> Nanos {
    let seconds = (1000.0 / requests_per_second).max((200_000.0 / requests_per_second).min(5.0));
    (seconds * SECOND as f64) as Nanos
}

#[test]
fn operations_are_held_at_any_rate() {
    for per_second in [1, 3, 7, 50, 500, 999, 10_000, 123_457, 1_000_000] {
        for (depth, late_ms) in [(1, 0), (1, 4), (32, 0), (32, 8)] {
            let period = SECOND / per_second;
            let duration = duration_for(per_second as f64);
            // A timer that is late by more than the clients can catch up in CATCH_UP loses; at 1e6/s that is 1 ms here.
            let late_ms = if per_second == 1_000_000 { late_ms.min(1) } else { late_ms };
            let stream = Stream {
                depth,
                // QD1 can reach the limit only if it is served faster; after oversleeping it has to catch up.
                service: (period / 20).min(1900 * MICROSECOND),
                late: late_ms * MILLISECOND,
                ..Stream::new(0, READ)
            };
            // What was overslept last is missing at the end; it would come in the next moment.
            let duration = duration.max(500 * stream.late);
            let started = run(&mut [disk(iops(per_second))], &[stream], START, duration, per_second)[0];
            assert_held(
                started,
                per_second,
                duration,
                1,
                &format!("{per_second}/s, depth {depth}, {late_ms} ms"),
            );
        }
    }
}

#[test]
fn bytes_are_held_at_any_rate() {
    for per_second in [1_000, 65_536, 1_000_000, 333_333_333, 10_000_000_000, 100_000_000_000] {
        for (bytes, depth) in [(512, 32), (4096, 1), (65_536, 32), (1 << 20, 32), (1 << 25, 4)] {
            let duration = duration_for(per_second as f64 / bytes as f64);
            let stream = Stream {
                depth,
                bytes,
                service: 1,
                late: 3 * MILLISECOND.min(duration / 1000),
                ..Stream::new(0, WRITE)
            };
            let limits = Limits { bps_write: rate(per_second), ..Limits::default() };
            let started = run(&mut [disk(limits)], &[stream], START, duration, per_second)[0];
            assert_held(
                started * bytes,
                per_second,
                duration,
                bytes,
                &format!("{per_second} B/s by {bytes}"),
            );
        }
    }
}

#[test]
fn no_burst_unless_asked() {
    let mut limiter = disk(iops(1000));
    assert_eq!(pass_at(&mut limiter, START, READ, 100), 1, "nothing is gathered before the first request");
    let rested = START + 3600 * SECOND;
    assert_eq!(
        pass_at(&mut limiter, rested, READ, 100),
        11,
        "10 ms of the rate, and the request that takes the debt"
    );
}

#[test]
fn burst_refills_at_the_rate() {
    let limits =
        Limits { iops_total: Rate { per_second: 100, burst: 500, one_time_burst: 0 }, ..Limits::default() };
    let mut limiter = disk(limits);
    assert_eq!(pass_at(&mut limiter, START, READ, 10_000), 501);
    // One operation of debt is paid first, and one more passes without debt.
    assert_eq!(pass_at(&mut limiter, START + SECOND, READ, 10_000), 100);
    assert_eq!(pass_at(&mut limiter, START + 3601 * SECOND, READ, 10_000), 501);
}

#[test]
fn one_time_burst_is_given_once() {
    let once =
        Limits { iops_total: Rate { per_second: 100, burst: 0, one_time_burst: 500 }, ..Limits::default() };
    let mut limiter = disk(once);
    assert_eq!(pass_at(&mut limiter, START, READ, 10_000), 501);
    assert_eq!(pass_at(&mut limiter, START + 3600 * SECOND, READ, 10_000), 2);
    limiter.set(once, vec![], START + 3601 * SECOND);
    assert!(pass_at(&mut limiter, START + 3601 * SECOND, READ, 10_000) <= 2, "the same again gives nothing");

    let (group, mut limiters) = members(once, 2);
    // A group has its catch-up from the start.
    let first = pass_at(&mut limiters[0], START, READ, 300);
    let second = pass_at(&mut limiters[1], START, READ, 10_000);
    assert_eq!((first, second), (300, 202));
    group.set(Limits { iops_read: rate(1 << 30), ..once }, START);
    assert!(pass_at(&mut limiters[0], START + 3600 * SECOND, READ, 10_000) <= 3);
}

#[test]
fn a_write_limit_never_delays_reads() {
    for limits in [
        Limits { iops_write: rate(10), bps_write: rate(1000), ..Limits::default() },
        Limits { iops_write: rate(10), iops_total: rate(1000), ..Limits::default() },
    ] {
        let (_, mut in_group) = members(limits, 1);
        for mut limiter in [disk(limits), in_group.remove(0)] {
            let limiters = std::slice::from_mut(&mut limiter);
            let streams = [Stream::new(0, WRITE), Stream { depth: 1, ..Stream::new(0, READ) }];
            let started = run(limiters, &streams, START, 5 * SECOND, 1);
            if limits.iops_total.per_second == 0 {
                assert_eq!(started[1], 50_000, "reads at QD1 with 100 us run free");
            } else {
                assert_held(started[0], 10, 5 * SECOND, 1, "writes");
                assert_held(started[1], 990, 5 * SECOND, 10, "reads have all that writes may not use");
            }
        }
    }
}

#[test]
fn a_waiting_write_holds_no_place_among_reads() {
    let limits = Limits { iops_write: rate(1), iops_total: rate(10), ..Limits::default() };
    let mut limiter = disk(limits);
    assert_eq!(limiter.admit(START, WRITE, 1, 1), GO);
    assert_eq!(until(limiter.admit(START, WRITE, 1, 1)), START + SECOND);
    assert_eq!(
        until(limiter.admit(START, READ, 1, 1)),
        START + 100 * MILLISECOND,
        "behind the first write only"
    );
}

#[test]
fn reads_and_writes_alternate_at_a_shared_limit() {
    let limits = Limits { iops_total: rate(1000), bps_total: rate(100 << 20), ..Limits::default() };
    for (first, second) in [(READ, WRITE), (WRITE, READ)] {
        let (_, mut in_group) = members(limits, 1);
        for mut limiter in [disk(limits), in_group.remove(0)] {
            let streams = [Stream::new(0, first), Stream { late: MILLISECOND, ..Stream::new(0, second) }];
            let started = run(std::slice::from_mut(&mut limiter), &streams, START, 5 * SECOND, 7);
            assert_held(started[0], 500, 5 * SECOND, 5, "who asks first");
            assert_held(started[1], 500, 5 * SECOND, 5, "who asks last");
        }
    }
}

#[test]
fn large_writes_get_their_turn_among_small_reads() {
    let limits = Limits { bps_total: rate(10 << 20), ..Limits::default() };
    let (_, mut in_group) = members(limits, 1);
    for mut limiter in [disk(limits), in_group.remove(0)] {
        let streams = [
            Stream { bytes: 512, ..Stream::new(0, READ) },
            Stream { bytes: 1 << 20, ..Stream::new(0, WRITE) },
        ];
        let started = run(std::slice::from_mut(&mut limiter), &streams, START, 5 * SECOND, 7);
        assert!(started[1] >= 45, "{started:?}");
        assert!(started[0] >= 45, "{started:?}");
    }
}

#[test]
fn a_client_that_left_holds_nobody_up() {
    let limits = iops(1000);
    let (_, mut in_group) = members(limits, 1);
    for mut limiter in [disk(limits), in_group.remove(0)] {
        let leaving = Stream { leaves: START + SECOND, ..Stream::new(0, WRITE) };
        let streams = [leaving, Stream::new(0, READ)];
        let started = run(std::slice::from_mut(&mut limiter), &streams, START, 5 * SECOND, 7);
        assert_held(started[0] + started[1], 1000, 5 * SECOND, 10, "together");
        assert_held(started[1], 900, 5 * SECOND, 10, "500/s, then 1000/s");
    }
}

#[test]
fn large_operations_cost_more_and_are_never_starved() {
    let limits = Limits { iops_total: rate(100), iops_size: 65_536, ..Limits::default() };
    let mut limiter = disk(limits);
    assert_eq!(limiter.admit(START, READ, 1, 1 << 20), GO);
    assert_eq!(
        until(limiter.admit(START, READ, 1, 65_537)),
        START + 160 * MILLISECOND,
        "16 operations at 100/s"
    );
    assert_eq!(limiter.admit(START + 160 * MILLISECOND, READ, 1, 65_537), GO);
    assert_eq!(until(limiter.admit(START + 160 * MILLISECOND, READ, 1, 1)), START + 180 * MILLISECOND);

    // 4 MiB at 1 KB/s, far above burst and one second of rate: passes, then the debt is paid.
    let slow = Limits { bps_total: rate(1000), ..Limits::default() };
    let (_, mut in_group) = members(slow, 1);
    for mut limiter in [disk(slow), in_group.remove(0)] {
        assert_eq!(limiter.admit(START, READ, 1, 4 << 20), GO);
        let due = until(limiter.admit(START, READ, 1, 4 << 20));
        assert!((4184 * SECOND..=4195 * SECOND).contains(&(due - START)), "{}", due - START);
        assert_eq!(limiter.admit(due, READ, 1, 4 << 20), GO);
    }
    assert_eq!(erase_cost_bytes(1 << 30), 16 << 20);
    assert_eq!(erase_cost_bytes(1), 1);
}

#[test]
fn a_raised_limit_frees_a_waiter_at_once() {
    let mut limiter = disk(iops(1));
    assert_eq!(limiter.admit(START, READ, 1, 0), GO);
    assert_eq!(until(limiter.admit(START, READ, 1, 0)), START + SECOND);
    limiter.set(iops(1000), vec![], START);
    assert_eq!(until(limiter.admit(START, READ, 1, 0)), START + MILLISECOND);
    limiter.set(iops(0), vec![], START);
    assert!(limiter.is_unlimited());
    assert_eq!(limiter.admit(START, READ, 1, u64::MAX), GO);

    let (group, mut limiters) = members(iops(1), 4);
    let mut now = START;
    for limiter in &mut limiters {
        while limiter.admit(now, READ, 1, 0) == GO {}
    }
    now += MILLISECOND;
    assert!(until(limiters[3].admit(now, READ, 1, 0)) > now + 3 * SECOND, "the fourth in the queue");
    group.set(iops(1000), now);
    for limiter in &mut limiters {
        assert!(until(limiter.admit(now, READ, 1, 0)) <= now + 10 * MILLISECOND);
    }
    group.set(iops(0), now);
    assert!(limiters.iter_mut().all(|limiter| limiter.admit(now, READ, 1, 0) == GO));
    assert_eq!(group.limits(), iops(0));
}

#[test]
fn a_lowered_limit_does_not_punish_for_the_past() {
    // 1 GiB of debt is 1 s at 1 GiB/s and would be 12 days at 1 KiB/s.
    let fast = Limits { bps_total: rate(1 << 30), ..Limits::default() };
    let slow = Limits { bps_total: rate(1 << 10), ..Limits::default() };
    let mut limiter = disk(fast);
    assert_eq!(limiter.admit(START, READ, 1, 1 << 30), GO);
    limiter.set(slow, vec![], START);
    assert_eq!(until(limiter.admit(START, READ, 1, 1)), START + SECOND + 1);

    let (group, mut limiters) = members(fast, 1);
    assert_eq!(limiters[0].admit(START, READ, 1, 1 << 30), GO);
    group.set(slow, START);
    assert!(until(limiters[0].admit(START, READ, 1, 1)) <= START + SECOND);
}

#[test]
fn changes_give_no_free_credit() {
    let burst =
        Limits { iops_total: Rate { per_second: 100, burst: 1000, one_time_burst: 0 }, ..Limits::default() };
    let mut limiter = disk(iops(100));
    let (group, mut limiters) = members(iops(100), 1);
    let (mut passed, mut passed_in_group) = (0, 0);
    for step in 0..1000 {
        // In ten seconds the limits change a thousand times.
        let now = START + step * 10 * MILLISECOND;
        let limits = if step % 2 == 0 { burst } else { iops(100) };
        limiter.set(limits, vec![], now);
        group.set(limits, now);
        passed += pass_at(&mut limiter, now, READ, 10_000);
        passed_in_group += pass_at(&mut limiters[0], now, READ, 10_000);
    }
    assert!((990..=1002).contains(&passed), "{passed}");
    assert!((980..=1003).contains(&passed_in_group), "{passed_in_group}");

    let mut fresh = disk(Limits::default());
    fresh.set(burst, vec![], START);
    assert_eq!(pass_at(&mut fresh, START, READ, 10_000), 1, "a burst is earned after a limit was set");
}

#[test]
fn limits_hold_while_they_change() {
    let mut limiter = [disk(iops(100))];
    let mut random = Random(11);
    let (mut passed, mut allowed, mut now) = (0u64, 0u128, START);
    for _ in 0..200 {
        let per_second = 1 + random.below(5000);
        limiter[0].set(iops(per_second), vec![], now);
        let time = 100 * MILLISECOND + random.below(SECOND);
        passed +=
            run(&mut limiter, &[Stream { late: MILLISECOND, ..Stream::new(0, READ) }], now, time, now)[0];
        allowed += u128::from(per_second) * u128::from(time);
        now += time;
    }
    let allowed = (allowed / u128::from(SECOND)) as u64;
    assert!(passed.abs_diff(allowed) <= allowed / 100, "{passed} instead of {allowed}");
}

#[test]
fn dry_run_lets_pass_and_counts_the_excess() {
    let limits = Limits { dry_run: true, ..iops(500) };
    let (_, mut in_group) = members(limits, 1);
    for mut limiter in [disk(limits), in_group.remove(0)] {
        let mut late = 0;
        for request in 0..5000 {
            match limiter.admit(START + request * MILLISECOND, READ, 1, 4096) {
                Admission::Go { would_wait } => late += u64::from(would_wait),
                Admission::Wait { .. } => panic!("a dry run never waits"),
            }
        }
        assert!(late.abs_diff(2500) <= 25, "1000/s against 500/s: {late} of 5000");
    }
    // A dry run of the disk does not lift the limits of its group.
    let group = Arc::new(Group::new("g", iops(500)));
    let mut limiter = [Limiter::new(limits, vec![group], START)];
    let started = run(&mut limiter, &[Stream::new(0, READ)], START, 5 * SECOND, 1)[0];
    assert_held(started, 500, 5 * SECOND, 6, "the group's limit");
}

#[test]
fn groups_hold_their_limit_and_are_fair() {
    for per_second in [10, 100, 1000, 50_000, 400_000] {
        for count in 1..=4u64 {
            let (_group, mut limiters) = members(iops(per_second), count as usize);
            // Member 0 has one request in flight, the others 32: turns are equal all the same.
            let streams: Vec<Stream> = (0..count as usize)
                .map(|index| Stream {
                    depth: if index == 0 { 1 } else { 32 },
                    service: (SECOND / per_second / 4).min(100 * MICROSECOND),
                    late: 3 * MILLISECOND,
                    ..Stream::new(index, if index % 2 == 0 { READ } else { WRITE })
                })
                .collect();
            let duration = duration_for(per_second as f64);
            let started = run(&mut limiters, &streams, START, duration, count);
            let what = format!("{count} members at {per_second}/s: {started:?}");
            let catch_up = per_second / 100;
            assert_held(started.iter().sum(), per_second, duration, 1 + count + catch_up, &what);
            let fair = u128::from(per_second) * u128::from(duration) / u128::from(SECOND * count);
            for share in &started {
                assert!(u128::from(*share).abs_diff(fair) <= fair / 5 + 2, "{what}: unfair");
            }
        }
    }
}

#[test]
fn groups_of_bytes_hold_with_mixed_requests() {
    let limits = Limits { bps_total: rate(50 << 20), ..Limits::default() };
    let (_group, mut limiters) = members(limits, 4);
    let sizes = [512, 4096, 65_536, 1 << 20];
    let streams: Vec<Stream> = (0..4)
        .map(|index| Stream { bytes: sizes[index], late: 2 * MILLISECOND, ..Stream::new(index, WRITE) })
        .collect();
    let started = run(&mut limiters, &streams, START, 20 * SECOND, 3);
    let bytes = started.iter().zip(sizes).map(|(count, size)| count * size).sum();
    assert_held(bytes, 50 << 20, 20 * SECOND, 3 << 20, &format!("{started:?}"));
    assert!(started.iter().all(|count| *count > 100), "nobody starves: {started:?}");
}

#[test]
fn both_levels_hold_and_neither_charges_for_the_other() {
    // Disk 0 may do 100/s by its own limit; disk 1 gets the rest of the group's 1000/s.
    let group = Arc::new(Group::new("g", iops(1000)));
    let mut limiters =
        [iops(100), Limits::default()].map(|own| Limiter::new(own, vec![group.clone()], START));
    let started = run(&mut limiters, &[Stream::new(0, READ), Stream::new(1, READ)], START, 5 * SECOND, 5);
    assert_held(started[0], 100, 5 * SECOND, 2, "own limit");
    assert_held(started[1], 900, 5 * SECOND, 12, "the rest of the group");

    // Two groups, the second one tighter.
    let groups = vec![Arc::new(Group::new("vm", iops(1000))), Arc::new(Group::new("tenant", iops(300)))];
    let mut limiter = [Limiter::new(Limits::default(), groups, START)];
    let started = run(&mut limiter, &[Stream::new(0, READ)], START, 5 * SECOND, 5)[0];
    assert_held(started, 300, 5 * SECOND, 4, "the tighter group");
}

#[test]
fn leases_come_back_from_idle_and_gone_members() {
    let (group, mut limiters) = members(iops(20_000), 2);
    // The catch-up is spent, then member 0 takes a lease (1 ms of the rate, shared by two: 10) and uses one of it.
    let mut now = START;
    assert_eq!(pass_at(&mut limiters[1], now, READ, 200), 200);
    for gone in [false, true] {
        now = until(loop {
            match limiters[1].admit(now, READ, 1, 0) {
                Admission::Go { .. } => {}
                wait => break wait,
            }
        });
        let mut holder = Limiter::new(Limits::default(), vec![group.clone()], now);
        let start = until(holder.admit(now, READ, 1, 0));
        assert_eq!(holder.admit(start, READ, 1, 0), GO);
        let mut other = Limiter::new(Limits::default(), vec![group.clone()], now);
        let before = until(other.admit(start, READ, 1, 0));
        other.idle();
        if gone {
            drop(holder);
        } else {
            holder.idle();
        }
        let after = match other.admit(start, READ, 1, 0) {
            Admission::Wait { until } => until,
            Admission::Go { .. } => start,
        };
        assert!(after < before, "what was given back is there for others: {before} {after}");
        now = start + SECOND;
        limiters[1].idle();
    }
}

#[test]
fn group_holds_under_real_threads() {
    // The clock is moved by those who wait, to the time that they wait for: no thread needs to be fast.
    const THREADS: u64 = 4;
    const PER_SECOND: u64 = 1_000_000;
    let group = Arc::new(Group::new("g", iops(PER_SECOND)));
    let clock = AtomicU64::new(START);
    let end = START + SECOND / 4;
    let passed: Vec<u64> = std::thread::scope(|scope| {
        let worker = || {
            let mut limiter = Limiter::new(Limits::default(), vec![group.clone()], START);
            let mut passed = 0;
            loop {
                let now = clock.load(Ordering::SeqCst);
                match limiter.admit(now, READ, 1, 4096) {
                    _ if now >= end => return passed,
                    Admission::Go { .. } => passed += 1,
                    Admission::Wait { until } => {
                        clock.fetch_max(until, Ordering::SeqCst);
                        std::thread::yield_now();
                    }
                }
            }
        };
        let threads: Vec<_> = (0..THREADS).map(|_| scope.spawn(worker)).collect();
        threads.into_iter().map(|thread| thread.join().expect("a worker failed")).collect()
    });
    let total: u64 = passed.iter().sum();
    let (exact, catch_up, leases) = (PER_SECOND / 4, PER_SECOND / 100, THREADS * 64);
    assert!(total <= exact + catch_up + leases + THREADS, "{passed:?}");
    assert!(total + leases + THREADS >= exact, "{passed:?}");
}

#[test]
fn changing_a_group_under_real_threads_strands_nobody() {
    // Threads ask all the time while the limit changes; at the end it is high, and all must be free soon.
    let group = Arc::new(Group::new("g", iops(1)));
    let (clock, changing) = (AtomicU64::new(START), AtomicU64::new(1));
    let worker = || {
        let mut limiter = Limiter::new(Limits::default(), vec![group.clone()], START);
        while changing.load(Ordering::SeqCst) == 1 {
            let _ = limiter.admit(clock.load(Ordering::SeqCst), READ, 1, 1);
            std::thread::yield_now();
        }
        match limiter.admit(clock.load(Ordering::SeqCst), READ, 1, 1) {
            Admission::Go { .. } => 0,
            Admission::Wait { until } => until - clock.load(Ordering::SeqCst),
        }
    };
    let waits: Vec<u64> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..3).map(|_| scope.spawn(worker)).collect();
        for step in 0..20_001 {
            let limits = if step % 2 == 1 { iops(1) } else { iops(100_000) };
            group.set(limits, clock.fetch_add(100 * MICROSECOND, Ordering::SeqCst));
            std::thread::yield_now();
        }
        changing.store(0, Ordering::SeqCst);
        threads.into_iter().map(|thread| thread.join().expect("a worker failed")).collect()
    });
    assert!(waits.iter().all(|wait| *wait <= 10 * MILLISECOND), "{waits:?}");
}

#[test]
fn a_limiter_moves_between_shards() {
    fn is_send<T: Send>() {}
    is_send::<Limiter>();
    is_send::<Arc<Group>>();
}

/// The exact answer by min-plus algebra, from the whole history and without state: what the bucket holds at `now` is the
/// least of what it can have gathered since each former request, less what was taken since.
fn oracle_credit(bucket: Rate, start: Nanos, history: &[(Nanos, u64)], now: Nanos) -> i128 {
    let rate = i128::from(bucket.per_second);
    let cap = (i128::from(bucket.burst) * NANO).max(rate * i128::from(CATCH_UP));
    let taken =
        |from: usize| history[from..].iter().map(|(_, units)| i128::from(*units) * NANO).sum::<i128>();
    let since_start = i128::from(bucket.burst) * NANO + rate * i128::from(now - start) - taken(0);
    (0..history.len())
        .map(|from| cap + rate * i128::from(now - history[from].0) - taken(from))
        .fold(cap.min(since_start), i128::min)
}

proptest! {
    #[test]
    fn bucket_equals_the_exact_model(
        per_second in prop_oneof![1u64..100, 1u64..2_000_000, 1u64..100_000_000_000],
        burst in prop_oneof![Just(0u64), 1u64..1000],
        asks in prop::collection::vec((prop_oneof![0u64..1000, 0u64..50_000_000, 0u64..3_000_000_000], 1u64..100), 1..60),
    ) {
        let limit = Rate { per_second, burst, one_time_burst: 0 };
        let (bucket, mut lease) = (Bucket::new(limit, START), Lease::default());
        let (mut now, mut history) = (START, vec![]);
        // Two whole nanoseconds are rounded (the window and the end of a lease); nothing adds up.
        let rounding = 2 * i128::from(per_second);
        for (pause, units) in asks {
            now += pause;
            match lease.obtain(&bucket, units, now, false, |_| 0) {
                Ok(()) => {
                    prop_assert!(oracle_credit(limit, START, &history, now) >= -rounding, "too early");
                    lease.spend(&bucket, units);
                    history.push((now, units));
                }
                Err(until) => {
                    prop_assert!(oracle_credit(limit, START, &history, until) >= -rounding, "too early");
                    prop_assert!(oracle_credit(limit, START, &history, until) <= 2 * rounding, "too late");
                }
            }
        }
    }

    #[test]
    fn anything_goes_without_overflow_and_nothing_waits_forever(
        rates in prop::array::uniform6((extreme(), extreme(), extreme())),
        iops_size in extreme(), grouped: bool, dry_run: bool,
        asks in prop::collection::vec((extreme(), any::<bool>(), any::<u32>(), extreme(), 0u8..8), 1..40),
    ) {
        let [a, b, c, d, e, f] = rates.map(|(per_second, burst, one_time_burst)| Rate { per_second, burst, one_time_burst });
        let limits = Limits {
            iops_total: a, iops_read: b, iops_write: c, bps_total: d, bps_read: e, bps_write: f, iops_size, dry_run,
        };
        let group = Arc::new(Group::new("g", limits));
        let groups = || if grouped { vec![group.clone()] } else { vec![] };
        let mut limiter = Limiter::new(limits, groups(), 0);
        let mut now = 0u64;
        for (pause, write, ops, bytes, action) in asks {
            now = now.saturating_add(pause);
            match action {
                0 => limiter.set(Limits { iops_total: b, bps_total: f, ..limits }, groups(), now),
                1 => group.set(Limits { iops_read: a, bps_write: d, ..limits }, now),
                2 => limiter.idle(),
                _ => {}
            }
            let direction = if write { WRITE } else { READ };
            // Following `until` leads to Go: at most one wait per bucket on the path and one turn.
            let mut questions = 0;
            while let Admission::Wait { until } = limiter.admit(now, direction, ops, bytes) {
                prop_assert!(!dry_run);
                if until == u64::MAX || now == u64::MAX {
                    break; // the end of time: 584 years
                }
                prop_assert!(until > now);
                now = until;
                questions += 1;
                prop_assert!(questions < 20);
            }
        }
    }
}

fn extreme() -> impl Strategy<Value = u64> {
    prop_oneof![Just(0), Just(1), Just(u64::MAX), 0..1000u64, 0..10_000_000_000u64, any::<u64>()]
}
