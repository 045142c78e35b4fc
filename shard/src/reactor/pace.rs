//! How many completions a turn waits for.
//!
//! To wake up for each completion costs more than what is done then: the kernel's way in and out, and a notification of a client that
//! gets one answer. Where many operations are out and their completions come quickly, waiting for some of them together costs a
//! request a fraction of its own time and saves most of that; network cards moderate their interrupts for the same reason. A request is late by at
//! most [`BATCH_WAIT`], and by an eighth of its time at the store: so many of those that are out are waited for.

use crate::clock::{MILLISECOND, Nanos};
use crate::storage::BATCH_WAIT;

/// From so many reads and writes on it is worth it.
const FROM: u32 = 16;
/// The part of them that is waited for.
const PART: u32 = 8;
/// Completions that are waited for, at most.
const WANT_MAX: u32 = 8;
/// A gap counts as no longer than this, so that a rest is soon forgotten.
const GAP_MAX: Nanos = MILLISECOND;

/// How quickly completions come.
#[derive(Debug, Default)]
pub(super) struct Pace {
    /// Time between two, in nanoseconds: a mean in which each turn has an eighth.
    gap: Nanos,
    /// When the last came.
    last: Nanos,
}

impl Pace {
    /// Completions to wait for with so many reads and writes out; at least 1.
    pub fn want(&self, ios: u32) -> u32 {
        if ios < FROM {
            return 1;
        }
        let in_time = BATCH_WAIT / self.gap.max(1);
        (ios / PART).min(WANT_MAX).min(u32::try_from(in_time).unwrap_or(u32::MAX)).max(1)
    }

    /// So many completions have come at `now`, since the last time that this was said.
    pub fn note(&mut self, now: Nanos, count: u64) {
        let gap = now.saturating_sub(self.last).min(GAP_MAX) / count.max(1);
        self.gap = (self.gap * 7 + gap) / 8;
        if count > 0 {
            self.last = now;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::MICROSECOND;

    // Goal: completions are waited for together only while many operations are out and their completions come quickly enough, and never more than
    // the part of them. Method: a store of each speed, with each number of operations out.
    #[test]
    fn many_are_waited_for_only_at_a_quick_store() {
        for (gap_us, out, want) in [
            (10, 1, 1),
            (10, 15, 1),
            (10, 16, 2),
            (10, 32, 4),
            (10, 40, 5),
            (10, 4000, 5),
            (1, 4000, 8),
            (30, 32, 1),
            (300, 4000, 1),
        ] {
            let mut pace = Pace::default();
            for turn in 1..100 {
                pace.note(turn * gap_us * MICROSECOND, 1);
            }
            assert_eq!(pace.want(out), want, "{gap_us} us between completions, {out} out");
        }
    }

    // Goal: a store that becomes slow is waited for one by one at once, and a rest does not count for long. Method: a quick store that stops,
    // and goes on.
    #[test]
    fn a_stop_is_noticed_and_forgotten() {
        let mut pace = Pace::default();
        let mut now = 0;
        let quick = |pace: &mut Pace, now: &mut Nanos| {
            for _ in 0..64 {
                *now += 40 * MICROSECOND;
                pace.note(*now, 4);
            }
        };
        quick(&mut pace, &mut now);
        assert_eq!(pace.want(32), 4);
        for _ in 0..3 {
            // Nothing in all the time that a batch may take.
            now += BATCH_WAIT;
            pace.note(now, 0);
        }
        assert!(pace.want(32) <= 2);
        now += 10 * MILLISECOND;
        pace.note(now, 1);
        assert_eq!(pace.want(32), 1);
        quick(&mut pace, &mut now);
        assert_eq!(pace.want(32), 4);
    }
}
