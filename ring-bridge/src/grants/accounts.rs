//! What a shard holds of domains and what it did with it: for metrics, and for tests that nothing leaks.
//!
//! The counters are atomics because mappings may be dropped on another thread than the shard's, and because whoever makes
//! metrics reads them from outside. They order nothing.

use std::sync::atomic::{AtomicU64, Ordering};

macro_rules! accounts {
    ($($(#[$doc:meta])* $name:ident),* $(,)?) => {
        /// Counters of one [`super::Domains`]; read by [`Accounts::counts`].
        #[derive(Debug, Default)]
        pub struct Accounts {
            $(pub(super) $name: Counter,)*
        }

        /// The counters at one time.
        #[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
        pub struct Counts {
            $($(#[$doc])* pub $name: u64,)*
        }

        impl Accounts {
            /// The counters now; each is exact, together they are not of one instant.
            pub fn counts(&self) -> Counts {
                Counts { $($name: self.$name.get(),)* }
            }
        }
    };
}

accounts! {
    /// Mappings that exist now.
    mappings,
    /// Pages in them.
    pages,
    /// Ports that are bound now.
    ports,
    /// Mappings made.
    maps,
    /// Mappings that were refused.
    map_failures,
    /// Mappings that the kernel did not let go; 0 unless something is badly wrong.
    unmap_failures,
    /// Calls of the kernel for copies.
    copy_calls,
    /// Segments copied or refused.
    copy_segments,
    /// Segments whose local buffer crosses a page, so that the hypervisor has two operations of them.
    copy_segments_split,
    /// Segments refused.
    copy_failures,
    /// Bytes copied.
    copy_bytes,
    /// Calls that asked for pending ports.
    drains,
    /// Events taken.
    events,
    /// Events of ports that were not ours any more.
    events_ignored,
    /// Times that the kernel had lost events, and all ports were taken for pending.
    event_overflows,
    /// Calls that unmasked ports.
    unmasks,
    /// Notifications sent.
    notifications,
    /// Notifications that the kernel refused.
    notify_failures,
}

/// A number that threads add to.
#[derive(Debug, Default)]
pub(super) struct Counter(AtomicU64);

impl Counter {
    pub fn add(&self, n: usize) {
        self.0.fetch_add(n as u64, Ordering::Relaxed);
    }

    pub fn sub(&self, n: usize) {
        self.0.fetch_sub(n as u64, Ordering::Relaxed);
    }

    fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}
