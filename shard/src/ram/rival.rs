//! Another shard at a block, for tests: the simulator's shards run in one thread and never meet, so it invents the meetings.
//!
//! One seed gives the same meetings in every run, as long as one thread uses the disk.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// By chance, the try of a lock finds it taken.
#[derive(Debug, Default)]
pub struct Rival {
    state: AtomicU64,
    /// In a thousand.
    chance: AtomicU64,
    met: AtomicU64,
}

impl Rival {
    /// Begins anew.
    pub fn set(&self, seed: u64, chance: u64) {
        self.state.store(seed, Relaxed);
        self.chance.store(chance, Relaxed);
    }

    /// Whether it is there at this try.
    pub fn comes(&self) -> bool {
        let chance = self.chance.load(Relaxed);
        if chance == 0 {
            return false;
        }
        // Knuth's linear congruential generator, whose upper bits are good.
        let state =
            self.state.load(Relaxed).wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        self.state.store(state, Relaxed);
        let comes = (state >> 33) % 1000 < chance;
        self.met.fetch_add(u64::from(comes), Relaxed);
        comes
    }

    /// How often it was.
    pub fn met(&self) -> u64 {
        self.met.load(Relaxed)
    }
}
