//! How many pages of guests may stay mapped on this host, shared by all shards.
//!
//! Two things run out: Xen's table of mappings (maptrack: 262,144 handles for dom0 by default, shared with everything else that
//! dom0 maps; a PV dom0 uses two for each page, seen on Xen 4.17 with Linux 6.12), and the memory areas of our process
//! (vm.max_map_count, 65,530 by default, one per mapping whatever its pages). When the budget is spent, rings copy instead:
//! slower, never wrong.
//!
//! Invariant: what is reserved is given back exactly once, by dropping the [`Reservation`].

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Pages that may be mapped by default: at two handles each, half of Xen's default table.
pub const PAGES_DEFAULT: usize = 64 << 10;
/// Linux's default for vm.max_map_count.
const AREAS_DEFAULT: usize = 65_530;

/// Limits and use; shared by reference count.
#[derive(Debug)]
pub struct Budget {
    pages_max: usize,
    mappings_max: usize,
    pages: AtomicUsize,
    mappings: AtomicUsize,
}

impl Budget {
    /// At most `pages_max` pages in at most `mappings_max` mappings.
    pub fn new(pages_max: usize, mappings_max: usize) -> Arc<Budget> {
        Arc::new(Budget {
            pages_max,
            mappings_max,
            pages: AtomicUsize::new(0),
            mappings: AtomicUsize::new(0),
        })
    }

    /// At most `pages_max` pages in half of the memory areas that the kernel lets this process have.
    pub fn of_host(pages_max: usize) -> Arc<Budget> {
        let areas = std::fs::read_to_string("/proc/sys/vm/max_map_count").ok();
        let areas = areas.and_then(|text| text.trim().parse().ok()).unwrap_or(AREAS_DEFAULT);
        Budget::new(pages_max, areas / 2)
    }

    /// Room for one mapping of `pages`, if there is.
    pub fn reserve(self: &Arc<Budget>, pages: usize) -> Option<Reservation> {
        if !take(&self.mappings, 1, self.mappings_max) {
            return None;
        }
        if !take(&self.pages, pages, self.pages_max) {
            self.mappings.fetch_sub(1, Ordering::Relaxed);
            return None;
        }
        Some(Reservation { budget: self.clone(), pages })
    }

    /// Pages that may be mapped.
    pub fn pages_max(&self) -> usize {
        self.pages_max
    }

    /// Pages that are mapped.
    pub fn pages(&self) -> usize {
        self.pages.load(Ordering::Relaxed)
    }

    /// Mappings that there are.
    pub fn mappings(&self) -> usize {
        self.mappings.load(Ordering::Relaxed)
    }

    /// Less than an eighth is left: who has idle pages should give them back soon.
    pub fn is_scarce(&self) -> bool {
        self.pages() >= self.pages_max - self.pages_max / 8
            || self.mappings() >= self.mappings_max - self.mappings_max / 8
    }
}

/// Adds `n` unless that passes `max`.
fn take(used: &AtomicUsize, n: usize, max: usize) -> bool {
    let add = |used: usize| used.checked_add(n).filter(|&sum| sum <= max);
    used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, add).is_ok()
}

/// A part of the budget; dropping it gives it back.
#[derive(Debug)]
pub struct Reservation {
    budget: Arc<Budget>,
    pages: usize,
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.budget.pages.fetch_sub(self.pages, Ordering::Relaxed);
        self.budget.mappings.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // Goal: shards that compete never pass the budget together, and all of it comes back.
    // Method: four threads reserve and give back as fast as they can while each looks at the sums.
    #[test]
    fn competing_shards_stay_inside_the_budget() {
        let budget = Budget::new(1000, 50);
        std::thread::scope(|scope| {
            for seed in 0..4usize {
                let budget = budget.clone();
                scope.spawn(move || {
                    let mut held = Vec::new();
                    for round in 0..20_000usize {
                        match budget.reserve(1 + (round * 7 + seed) % 64) {
                            Some(reservation) => held.push(reservation),
                            None => held.truncate(held.len() / 2),
                        }
                        assert!(budget.pages() <= 1000 && budget.mappings() <= 50);
                    }
                });
            }
        });
        assert_eq!((budget.pages(), budget.mappings()), (0, 0));
        assert!(budget.reserve(1001).is_none());
        assert_eq!((budget.pages(), budget.mappings()), (0, 0), "a refusal reserves nothing");
    }

    // Goal: scarcity is noticed by pages and by mappings.
    #[test]
    fn scarce_is_less_than_an_eighth() {
        let budget = Budget::new(80, 8);
        let most = budget.reserve(69);
        assert!(!budget.is_scarce());
        let more = budget.reserve(1);
        assert!(budget.is_scarce());
        drop((most, more));
        let held: Vec<_> = (0..7).map(|_| budget.reserve(1)).collect();
        assert!(budget.is_scarce() && held.iter().all(Option::is_some));
    }
}
