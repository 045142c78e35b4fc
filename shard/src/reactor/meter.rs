//! Latency histograms of one disk, allocated when it does I/O and released when it has been idle for long.

use hdrhistogram::Histogram;

use crate::api::DiskStats;
use crate::clock::{MICROSECOND, Nanos, SECOND};
use crate::stats::OpClass;

/// Idle for this long, a disk's histograms are given back.
const RELEASE_AFTER: Nanos = 300 * SECOND;

#[derive(Debug)]
struct Histograms {
    read: Histogram<u32>,
    write: Histogram<u32>,
    flush: Histogram<u32>,
    queue: Histogram<u32>,
}

/// Histograms in microseconds, 1 µs to 60 s, two significant digits (about 10 KiB each).
#[derive(Debug, Default)]
pub(super) struct Meter {
    histograms: Option<Box<Histograms>>,
    last: Nanos,
}

fn histogram() -> Option<Histogram<u32>> {
    // These bounds are valid, so this is always `Some`.
    Histogram::new_with_bounds(1, 60_000_000, 2).ok()
}

impl Meter {
    /// Counts one answered request.
    pub fn record(&mut self, class: OpClass, queue: Nanos, total: Nanos, now: Nanos) {
        self.last = now;
        if self.histograms.is_none() {
            let (Some(read), Some(write), Some(flush), Some(queue)) =
                (histogram(), histogram(), histogram(), histogram())
            else {
                return;
            };
            self.histograms = Some(Box::new(Histograms { read, write, flush, queue }));
        }
        let Some(histograms) = &mut self.histograms else { return };
        let target = match class {
            OpClass::Read => &mut histograms.read,
            OpClass::Flush => &mut histograms.flush,
            _ => &mut histograms.write,
        };
        target.saturating_record((total / MICROSECOND).max(1));
        histograms.queue.saturating_record((queue / MICROSECOND).max(1));
    }

    /// Nanoseconds since the last answer.
    pub fn idle_since(&self, now: Nanos) -> Nanos {
        now.saturating_sub(self.last)
    }

    /// Gives the memory back after a long rest.
    pub fn release_when_idle(&mut self, now: Nanos) {
        if self.histograms.is_some() && self.idle_since(now) > RELEASE_AFTER {
            self.histograms = None;
        }
    }

    /// A copy of the figures.
    pub fn stats(&self) -> DiskStats {
        match &self.histograms {
            None => DiskStats::default(),
            Some(h) => DiskStats {
                read_us: Some(h.read.clone()),
                write_us: Some(h.write.clone()),
                flush_us: Some(h.flush.clone()),
                queue_us: Some(h.queue.clone()),
            },
        }
    }
}
