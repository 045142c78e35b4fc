//! The limit on the memory of all RAM disks together.

use std::sync::atomic::{AtomicU64, Ordering};

/// Bytes that all RAM disks may use, and how many they do. Shared by every disk; taken from once per allocation, not per
/// request.
#[derive(Debug)]
pub struct RamBudget {
    limit_bytes: AtomicU64,
    used_bytes: AtomicU64,
}

impl RamBudget {
    /// A budget of `limit_bytes`.
    pub fn new(limit_bytes: u64) -> RamBudget {
        RamBudget { limit_bytes: AtomicU64::new(limit_bytes), used_bytes: AtomicU64::new(0) }
    }

    /// The limit in bytes.
    pub fn limit_bytes(&self) -> u64 {
        self.limit_bytes.load(Ordering::Relaxed)
    }

    /// Changes the limit. Below what is used, nothing is taken away, but nothing more is given either.
    pub fn set_limit_bytes(&self, limit_bytes: u64) {
        self.limit_bytes.store(limit_bytes, Ordering::Relaxed);
    }

    /// Bytes in use.
    pub fn used_bytes(&self) -> u64 {
        self.used_bytes.load(Ordering::Relaxed)
    }

    /// Takes `bytes` if they fit under the limit.
    pub(super) fn take(&self, bytes: u64) -> bool {
        let limit = self.limit_bytes();
        let fits = |used: u64| used.checked_add(bytes).filter(|&sum| sum <= limit);
        self.used_bytes.fetch_update(Ordering::Relaxed, Ordering::Relaxed, fits).is_ok()
    }

    /// Counts `bytes` that exist already, whatever the limit says.
    pub(super) fn take_beyond_limit(&self, bytes: u64) {
        self.used_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Gives `bytes` back that were taken before.
    pub(super) fn give_back(&self, bytes: u64) {
        self.used_bytes.fetch_sub(bytes, Ordering::Relaxed);
    }
}
