//! One state byte per 4 KiB block: a try-lock for many readers or one writer, and whether the block has memory.
//!
//! ```text
//! bit 7      the block has memory in the file
//! bits 0..6  0 free · 1..=126 that many readers · 127 one writer
//! ```
//!
//! Both facts sit in one byte, so a reader learns about the memory and takes its lock in one step. The memory bit changes
//! only under the writer's lock. A lock is taken with acquire and released with release, so what was copied under one is
//! seen under the next. Locks are not fair: a writer can lose to readers for some turns; each is held for one copy.

use std::io;
use std::sync::atomic::{AtomicU8, Ordering};

use ring_bridge::memory::AtomicBytes;

/// Bytes per block: what is never torn.
pub(super) const BLOCK_BYTES: u64 = 4096;

const MEMORY: u8 = 0x80;
const HOLDERS: u8 = 0x7f;
const WRITER: u8 = 0x7f;
/// A shared lock is tried again when another reader came or went at the same moment; this bounds it.
const SHARED_TRIES: u32 = 8;

/// The states of all blocks of a disk.
#[derive(Debug)]
pub(super) struct BlockStates {
    bytes: AtomicBytes,
    #[cfg(test)]
    pub(super) rival: super::rival::Rival,
}

/// What came of a reader's try.
pub(super) enum SharedLock<'a> {
    /// The block has memory and no writer while the guard lives.
    Held(SharedGuard<'a>),
    /// The block has no memory.
    Hole,
    /// A writer is at it.
    Busy,
}

/// A reader's lock on one block.
pub(super) struct SharedGuard<'a>(&'a AtomicU8);

impl Drop for SharedGuard<'_> {
    #[inline]
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Release);
    }
}

impl BlockStates {
    /// States of `blocks` blocks without memory.
    pub(super) fn new(blocks: u64) -> io::Result<BlockStates> {
        let len = usize::try_from(blocks).map_err(io::Error::other)?;
        Ok(BlockStates {
            bytes: AtomicBytes::new(len)?,
            #[cfg(test)]
            rival: super::rival::Rival::default(),
        })
    }

    /// A rival that a test has invented is at the block.
    #[inline]
    fn is_contested(&self) -> bool {
        #[cfg(test)]
        return self.rival.comes();
        #[cfg(not(test))]
        false
    }

    /// Number of blocks.
    pub(super) fn len(&self) -> u64 {
        self.bytes.len() as u64
    }

    #[inline]
    fn state(&self, block: u64) -> &AtomicU8 {
        &self.bytes[block as usize]
    }

    /// Tries to lock a block for reading.
    #[inline]
    pub(super) fn lock_shared(&self, block: u64) -> SharedLock<'_> {
        let byte = self.state(block);
        let mut state = byte.load(Ordering::Acquire);
        for _ in 0..SHARED_TRIES {
            if state & MEMORY == 0 {
                return SharedLock::Hole;
            }
            if self.is_contested() {
                return SharedLock::Busy;
            }
            if state & HOLDERS >= WRITER - 1 {
                return SharedLock::Busy; // a writer, or as many readers as can be counted
            }
            match byte.compare_exchange_weak(state, state + 1, Ordering::Acquire, Ordering::Acquire) {
                Ok(_) => return SharedLock::Held(SharedGuard(byte)),
                Err(now) => state = now,
            }
        }
        SharedLock::Busy
    }

    /// Tries to lock a block for writing.
    #[inline]
    pub(super) fn lock_exclusive(&self, block: u64) -> Option<RunGuard<'_>> {
        let memory = self.try_writer(block)?;
        Some(RunGuard { states: self, start: block, end: block + 1, memory })
    }

    /// Takes the writer's lock; the memory bit if it was free.
    #[inline]
    fn try_writer(&self, block: u64) -> Option<u8> {
        let byte = self.state(block);
        let state = byte.load(Ordering::Relaxed);
        if state & HOLDERS != 0 || self.is_contested() {
            return None;
        }
        byte.compare_exchange(state, state | WRITER, Ordering::Acquire, Ordering::Relaxed).ok()
    }

    /// The first block in `start..end` with memory, or `end`.
    pub(super) fn next_memory(&self, start: u64, end: u64) -> u64 {
        match self.same_memory(start, end) {
            (next, false) => next,
            (_, true) => start,
        }
    }

    /// Where the blocks like `start` end, at most `end`, and whether those have memory. `start` < `end`, else `end` and no memory.
    pub(super) fn same_memory(&self, start: u64, end: u64) -> (u64, bool) {
        let run = &self.bytes[start.min(end) as usize..end as usize];
        let Some(first) = run.first() else { return (end, false) };
        let memory = first.load(Ordering::Acquire) & MEMORY;
        let len = run.iter().position(|byte| byte.load(Ordering::Acquire) & MEMORY != memory);
        (start + len.unwrap_or(run.len()) as u64, memory != 0)
    }

    /// Marks a block that has memory before the disk is shared.
    pub(super) fn set_initial_memory(&self, block: u64) {
        self.state(block).store(MEMORY, Ordering::Relaxed);
    }
}

/// The writer's lock on neighbouring blocks, all with memory or all without.
pub(super) struct RunGuard<'a> {
    states: &'a BlockStates,
    start: u64,
    end: u64,
    /// MEMORY or 0; what the blocks get when they are unlocked.
    memory: u8,
}

impl RunGuard<'_> {
    /// Whether the blocks have memory.
    #[inline]
    pub(super) fn has_memory(&self) -> bool {
        self.memory != 0
    }

    /// First block.
    pub(super) fn start(&self) -> u64 {
        self.start
    }

    /// The block behind the last.
    pub(super) fn end(&self) -> u64 {
        self.end
    }

    /// Number of blocks.
    pub(super) fn blocks(&self) -> u64 {
        self.end - self.start
    }

    /// Locks the following blocks up to `limit`, as far as they are free and like the first.
    pub(super) fn extend(&mut self, limit: u64) {
        while self.end < limit {
            match self.states.try_writer(self.end) {
                Some(memory) if memory == self.memory => self.end += 1,
                Some(memory) => {
                    self.states.state(self.end).store(memory, Ordering::Release);
                    return;
                }
                None => return,
            }
        }
    }

    /// Unlocks the blocks from `end` on.
    pub(super) fn truncate(&mut self, end: u64) {
        for block in end.max(self.start)..self.end {
            self.states.state(block).store(self.memory, Ordering::Release);
        }
        self.end = self.end.min(end.max(self.start));
    }

    /// Says whether the blocks have memory from now on; seen by others when the guard is dropped.
    pub(super) fn set_memory(&mut self, memory: bool) {
        self.memory = if memory { MEMORY } else { 0 };
    }
}

impl Drop for RunGuard<'_> {
    #[inline]
    fn drop(&mut self) {
        for block in self.start..self.end {
            self.states.state(block).store(self.memory, Ordering::Release);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with_memory(blocks: u64) -> BlockStates {
        let states = BlockStates::new(blocks).expect("memory");
        (0..blocks).for_each(|block| states.set_initial_memory(block));
        states
    }

    // Goal: readers share a block, a writer excludes all, and every lock ends with its guard.
    #[test]
    fn many_readers_or_one_writer() {
        let states = with_memory(2);
        {
            let SharedLock::Held(_first) = states.lock_shared(0) else { panic!("free") };
            let SharedLock::Held(_second) = states.lock_shared(0) else { panic!("readers share") };
            assert!(states.lock_exclusive(0).is_none(), "readers keep a writer out");
            assert!(states.lock_exclusive(1).is_some(), "the neighbour is free");
        }
        {
            let _writer = states.lock_exclusive(0).expect("readers are gone");
            assert!(matches!(states.lock_shared(0), SharedLock::Busy));
            assert!(states.lock_exclusive(0).is_none());
        }
        assert!(matches!(states.lock_shared(0), SharedLock::Held(_)), "the writer is gone");
    }

    // Goal: the count of readers never spills into the writer's value or the memory bit.
    // Method: as many readers as fit, one more is refused, then all go and a writer gets in.
    #[test]
    fn readers_are_bounded() {
        let states = with_memory(1);
        let mut held = Vec::new();
        while let SharedLock::Held(guard) = states.lock_shared(0) {
            held.push(guard);
            assert!(held.len() <= 126);
        }
        assert_eq!(held.len(), 126);
        assert!(states.lock_exclusive(0).is_none());
        drop(held);
        assert!(states.lock_exclusive(0).is_some_and(|guard| guard.has_memory()));
    }

    // Goal: a run stops at a lock or at a block of the other kind, and leaves those as they were.
    #[test]
    fn a_run_covers_only_free_blocks_of_one_kind() {
        let states = BlockStates::new(8).expect("memory");
        states.set_initial_memory(5);
        let mut run = states.lock_exclusive(2).expect("free");
        run.extend(8);
        assert_eq!((run.start(), run.end()), (2, 5), "block 5 has memory");
        assert!(states.lock_exclusive(5).is_some_and(|guard| guard.has_memory()), "and was let go unchanged");
        let mut other = states.lock_exclusive(0).expect("free");
        other.extend(8);
        assert_eq!(other.end(), 2, "block 2 is locked");
        run.truncate(4);
        run.set_memory(true);
        assert!(
            states.lock_exclusive(4).is_some_and(|guard| !guard.has_memory()),
            "cut off before the change"
        );
        drop(run);
        assert_eq!(states.same_memory(2, 8), (4, true));
        assert_eq!(states.same_memory(4, 8), (5, false));
        assert_eq!(states.next_memory(4, 8), 5);
        assert_eq!(states.next_memory(6, 8), 8);
        assert_eq!(states.next_memory(8, 8), 8);
    }
}
