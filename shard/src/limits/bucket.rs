//! One token bucket: an atomic word of virtual time, and the leases that are taken from it.
//!
//! **The word.** `tat` (theoretical arrival time, as in the generic cell rate algorithm, ITU-T I.371) is the nanosecond at
//! which all that was handed out is paid. Handing out a [`Lease`] of `d` nanoseconds moves it by `d` with one
//! compare-and-swap; the lease is good for exactly `rate * d` *nano-units* (1e-9 of an operation or byte):
//!
//! ```text
//! start = max(tat, now - max(burst / rate, CATCH_UP))        tat = start + d,  d = ceil(nano-units / rate)
//! start <= now:  spend the lease at once                     start > now:  wait until start, and spend it then
//! ```
//!
//! What rounding up gives too much stays in the lease and is spent next: no rate drifts. There is no refill and no timer.
//!
//! **A queue.** Who waits has its start already, and nobody overtakes: `tat` is a queue in order of asking. Each taker has
//! one place in it at most. So takers get equal turns, whatever their queue depths and however late their timers are,
//! and each waits for at most one lease of each other.
//!
//! **Live change.** [`Bucket::set`] stores the configuration, then moves `tat`, then counts `version` up. A lease taken
//! meanwhile fails its compare-and-swap (`tat` always moves), or is not started yet and void, since its version is old. So
//! nobody waits for a start that an old rate computed.
//!
//! Numbers: nano-units are products of two 64-bit numbers, inside 128 bits; times stop at `u64::MAX`, in 584 years.

use std::sync::atomic::{AtomicU64, Ordering};

use crossbeam::utils::CachePadded;

use super::{CATCH_UP, Rate};
use crate::clock::{Nanos, SECOND};

/// Nano-units in one unit.
pub(super) const NANO: i128 = SECOND as i128;

/// A token bucket, or no limit while its rate is 0.
#[derive(Debug, Default)]
pub(super) struct Bucket {
    per_second: AtomicU64,
    burst: AtomicU64,
    one_time_burst: AtomicU64,
    one_time_taken: AtomicU64,
    version: AtomicU64,
    /// Alone in its cache line: it is written by all shards, the rest only by [`Bucket::set`].
    tat: CachePadded<AtomicU64>,
}

impl Bucket {
    /// A bucket with its whole burst and nothing else at `start`.
    pub(super) fn new(rate: Rate, start: Nanos) -> Bucket {
        Bucket {
            per_second: AtomicU64::new(rate.per_second),
            burst: AtomicU64::new(rate.burst),
            one_time_burst: AtomicU64::new(rate.one_time_burst),
            tat: CachePadded::new(AtomicU64::new(start.saturating_sub(burst_nanos(rate)))),
            ..Bucket::default()
        }
    }

    /// The limit that holds now.
    pub(super) fn rate(&self) -> Rate {
        Rate {
            per_second: self.per_second(),
            burst: self.burst.load(Ordering::Relaxed),
            one_time_burst: self.one_time_burst.load(Ordering::Relaxed),
        }
    }

    pub(super) fn per_second(&self) -> u64 {
        self.per_second.load(Ordering::Relaxed)
    }

    /// Changes the limit. By one thread at a time. Credit is never added to: a new burst is earned. Debt stays the same
    /// number of units, which a higher rate pays sooner, but never becomes a longer wait than it was. A one-time burst
    /// that grows gives the difference.
    pub(super) fn set(&self, rate: Rate, now: Nanos) {
        let old = self.rate();
        if old == rate {
            return;
        }
        self.per_second.store(rate.per_second, Ordering::Relaxed);
        self.burst.store(rate.burst, Ordering::Relaxed);
        self.one_time_burst.store(rate.one_time_burst, Ordering::Relaxed);
        let mut tat = self.tat.load(Ordering::Relaxed);
        loop {
            let debt = u128::from(tat.saturating_sub(now));
            let moved = match old.per_second {
                0 => now, // was no limit: whatever the word says is long gone
                _ if debt > 0 && rate.per_second > old.per_second => {
                    let shorter = (debt * u128::from(old.per_second)).div_ceil(u128::from(rate.per_second));
                    now + shorter as u64 // not above debt
                }
                _ => tat.max(now.saturating_sub(window(old))),
            };
            // Release: who sees the new word sees the new configuration. The word always changes, see above.
            let moved = if moved == tat { tat.saturating_add(1) } else { moved };
            match self.tat.compare_exchange_weak(tat, moved, Ordering::AcqRel, Ordering::Relaxed) {
                Ok(_) => break,
                Err(current) => tat = current,
            }
        }
        if old.per_second != rate.per_second {
            self.version.fetch_add(1, Ordering::Release);
        }
    }

    /// Hands out `missing` nano-units, or `least` of them if that is more. With `queue` the lease may start later than now;
    /// without, `Err` is when something would be free. `Ok(None)`: there is no limit.
    fn reserve(
        &self,
        missing: i128,
        least: impl Fn(u64) -> i128,
        now: Nanos,
        queue: bool,
    ) -> Result<Option<Lease>, Nanos> {
        let version = self.version.load(Ordering::Acquire);
        let mut tat = self.tat.load(Ordering::Acquire);
        loop {
            let rate = self.rate();
            if rate.per_second == 0 {
                return Ok(None);
            }
            let start = tat.max(now.saturating_sub(window(rate)));
            if start > now && !queue {
                return Err(start);
            }
            let amount = missing.max(least(rate.per_second)).unsigned_abs();
            let nanos = amount.div_ceil(u128::from(rate.per_second));
            let nanos = u64::try_from(nanos).unwrap_or(u64::MAX);
            let end = start.saturating_add(nanos);
            match self.tat.compare_exchange_weak(tat, end, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => {
                    let credit = i128::from(nanos).saturating_mul(i128::from(rate.per_second));
                    return Ok(Some(Lease { credit, per_second: rate.per_second, start, version, once: 0 }));
                }
                Err(current) => tat = current,
            }
        }
    }

    /// Takes up to `units` of the one-time burst.
    fn take_once(&self, units: u64) -> u64 {
        let mut taken = self.one_time_taken.load(Ordering::Relaxed);
        loop {
            let grant = self.one_time_burst.load(Ordering::Relaxed).saturating_sub(taken).min(units);
            let after = taken + grant;
            if grant == 0 {
                return 0;
            }
            match self.one_time_taken.compare_exchange_weak(
                taken,
                after,
                Ordering::Relaxed,
                Ordering::Relaxed,
            ) {
                Ok(_) => return grant,
                Err(current) => taken = current,
            }
        }
    }
}

/// The time in which a rate yields its burst.
fn burst_nanos(rate: Rate) -> Nanos {
    let nanos = u128::from(rate.burst) * u128::from(SECOND) / u128::from(rate.per_second.max(1));
    u64::try_from(nanos).unwrap_or(u64::MAX)
}

/// How far back credit reaches.
fn window(rate: Rate) -> Nanos {
    burst_nanos(rate).max(CATCH_UP)
}

/// What one taker holds of one bucket; spent without touching the bucket.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Lease {
    /// Nano-units, to be spent from `start` on.
    credit: i128,
    /// The rate at which the last part was taken.
    per_second: u64,
    /// When the last part begins.
    start: Nanos,
    /// Version of the bucket when it was taken.
    version: u64,
    /// Units of the one-time burst; spent first.
    once: u64,
}

impl Lease {
    /// Nano-units that may be spent now.
    fn usable(&self, now: Nanos) -> i128 {
        let started = if self.start <= now { self.credit } else { 0 };
        started + i128::from(self.once) * NANO
    }

    /// Makes sure that `units` may be spent now, or says when to ask again. With `queue` there is a place in the queue
    /// then; without, somebody else may come first. `least` says for a rate how many nano-units a lease has when the request
    /// needs fewer.
    pub(super) fn obtain(
        &mut self,
        bucket: &Bucket,
        units: u64,
        now: Nanos,
        queue: bool,
        least: impl Fn(u64) -> i128,
    ) -> Result<(), Nanos> {
        let needed = i128::from(units) * NANO;
        if bucket.per_second() == 0 {
            *self = Lease::default();
            return Ok(());
        }
        if self.start > now && bucket.version.load(Ordering::Acquire) != self.version {
            self.give_back(bucket);
        }
        if self.usable(now) >= needed {
            return Ok(());
        }
        if bucket.tat.load(Ordering::Relaxed) > now {
            let lacking = (needed - self.usable(now)).unsigned_abs().div_ceil(NANO.unsigned_abs());
            self.once += bucket.take_once(u64::try_from(lacking).unwrap_or(u64::MAX));
            if self.usable(now) >= needed {
                return Ok(());
            }
        }
        if self.start > now {
            return Err(self.start);
        }
        if let Some(taken) = bucket.reserve(needed - self.usable(now), least, now, queue)? {
            *self = Lease { credit: self.credit + taken.credit, once: self.once, ..taken };
        }
        if self.start > now { Err(self.start) } else { Ok(()) }
    }

    /// Spends `units` that [`Lease::obtain`] just said to be there.
    pub(super) fn spend(&mut self, bucket: &Bucket, units: u64) {
        if bucket.per_second() > 0 {
            let once = self.once.min(units);
            self.once -= once;
            // A limit that was set between the two finds no lease: this one request is free.
            self.credit = (self.credit - i128::from(units - once) * NANO).max(0);
        }
    }

    /// Gives back what is not spent, a place in the queue too. What came from before the window is cut off by the next
    /// lease. After a change of the rate the shorter time goes back, as [`Bucket::set`] kept the shorter one.
    pub(super) fn give_back(&mut self, bucket: &Bucket) {
        let lease = std::mem::take(self);
        if lease.once > 0 {
            bucket.one_time_taken.fetch_sub(lease.once, Ordering::Relaxed);
        }
        let per_second = bucket.per_second().max(lease.per_second);
        if lease.credit > 0 && per_second > 0 {
            let nanos = u64::try_from(lease.credit / i128::from(per_second)).unwrap_or(u64::MAX);
            let earlier = |tat: u64| Some(tat.saturating_sub(nanos));
            let _ = bucket.tat.fetch_update(Ordering::AcqRel, Ordering::Relaxed, earlier); // never refused
        }
    }
}
