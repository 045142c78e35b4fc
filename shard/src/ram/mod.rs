//! RAM disks: named, sparse, shared by exports on any shard. The one named exception to shared-nothing.
//!
//! The bytes are in a file on tmpfs or hugetlbfs (`backing`), mapped once and copied to and from by the shards. Beside it
//! stands one state byte per 4 KiB block (`blocks`): a try-lock, and whether the block has memory.
//!
//! Invariants, and why they hold with several shards at work:
//! 1. *No torn block.* Bytes of a block are copied out only under its shared lock and changed only under its exclusive
//!    lock. So two copies of this module never race, and a reader sees whole writes of a block. A longer request is a
//!    sequence of blocks; other requests may come between them, as on any disk.
//! 2. *No wait.* Locks are tried, never waited for; a conflict ends the call with [`RamOutcome::Partial`] and the caller goes
//!    on in its next turn. Locks are held for one copy or one fallocate, released by guards on every path, and while one is held
//!    only further locks in ascending order are tried, so one of two rivals always proceeds.
//! 3. *No SIGBUS.* The mapping is touched only where the state says "has memory". That bit is set under the exclusive lock
//!    after fallocate succeeded, and cleared under the exclusive lock with the hole punched before; nobody else has the file open
//!    for writing (mode 0600, and locked against a second server). A full file system or a spent budget is therefore an
//!    answer ([`RamOutcome::NoSpace`]), never a fault.
//! 4. *A hole is never touched.* A block without memory reads as zeroes without a lock: that read took place before any
//!    write that has not yet published the bit. A write publishes it (release) before it is answered.
//! 5. *Allocation unit.* Memory comes and goes in units of the file system's page: one block with base pages, 512
//!    with 2 MiB pages. All blocks of a unit are locked while its memory changes, so the bit is the same in all of them.
//!    The budget is taken before the fallocate and given back after the hole is punched: it never undercounts.

mod backing;
mod blocks;
mod budget;
mod initial;
#[cfg(test)]
mod rival;

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use ring_bridge::memory::{MemoryError, SharedRegion};

pub use backing::{Backing, anonymous_backing, open_backing, publish_backing, remove_backing};
use blocks::{BLOCK_BYTES, BlockStates, RunGuard, SharedLock};
pub use budget::RamBudget;

/// Most bytes that one call copies or zeroes; a longer request goes on in the next turn.
pub const CALL_BYTES_MAX: usize = 1 << 20;
/// Blocks allocated at once from a first write on, with base pages: one fallocate for 64 KiB of sequential writes.
const ALLOCATE_BLOCKS: u64 = 16;
/// Most blocks that one hole is punched for (with base pages), and most holes per call. The kernel takes up to a microsecond
/// per page, so this bounds a discard's turn to some hundred.
const PUNCH_BLOCKS_MAX: u64 = 256;
const PUNCHES_PER_CALL: u32 = 2;
/// Most states that one discard or one query looks at per call (1 GiB of disk).
const SCAN_BLOCKS_MAX: u64 = 1 << 18;
/// fallocate is interrupted by signals; this many in a row are no accident.
const INTERRUPTS_MAX: u32 = 100;

/// Pages that a RAM disk is made of; the unit in which it takes and gives back memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum PageSize {
    /// The machine's ordinary page, on tmpfs.
    Base,
    /// 2 MiB, on hugetlbfs; the host must have reserved such pages. The disk's size must be a multiple of it.
    Huge2M,
}

impl PageSize {
    /// The size of a [`PageSize::Huge2M`].
    pub const HUGE_BYTES: u64 = 2 << 20;
}

/// What came of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RamOutcome {
    /// All of it is done.
    Done,
    /// The first `done` bytes are done (may be 0): another shard is at the next block, or the call's share of the turn is used
    /// up. Ask again for the rest in the next turn; no block is half done other than where the request itself ends inside it.
    Partial {
        /// Bytes done, from the request's start.
        done: u64,
    },
    /// The limit on all RAM disks or the file system is full. What came before the failing block is done.
    NoSpace,
    /// This error number: EINVAL outside the disk, else what the kernel said.
    Failed(i32),
}

/// A stretch of the disk with or without memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RamExtent {
    /// Bytes.
    pub len: u64,
    /// It has no memory and reads as zeroes.
    pub hole: bool,
}

/// What went wrong on the control side, for matching.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RamErrorKind {
    /// A name or size that cannot be.
    Invalid,
    /// The directory or file is not on the kind of memory file system that was asked for.
    WrongFileSystem,
    /// A disk of this name exists with another size, or is not ours.
    Mismatch,
    /// Another server, or a disk that is still being detached, uses the file.
    Busy,
    /// Memory or budget is full.
    NoSpace,
    /// No huge pages are reserved.
    NoHugePages,
    /// The kernel refused something else.
    Io,
}

/// Why a RAM disk could not be made: a kind, and a sentence for the operator.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{message}")]
pub struct RamError {
    /// For matching.
    pub kind: RamErrorKind,
    /// Names the disk, what was found, what was expected, what to do.
    pub message: String,
}

impl RamError {
    fn new(kind: RamErrorKind, message: String) -> RamError {
        RamError { kind, message }
    }
}

/// Why a block could not be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stop {
    Busy,
    NoSpace,
    Failed(Errno),
}

impl Stop {
    /// The outcome of a request of which `done` bytes are done.
    fn outcome(self, done: u64) -> RamOutcome {
        match self {
            Stop::Busy => RamOutcome::Partial { done },
            Stop::NoSpace => RamOutcome::NoSpace,
            Stop::Failed(errno) => RamOutcome::Failed(errno as i32),
        }
    }
}

impl From<MemoryError> for Stop {
    /// Ranges are checked against the disk's size, which the region covers: this is a defect, and fails the request.
    fn from(_: MemoryError) -> Stop {
        Stop::Failed(Errno::EFAULT)
    }
}

/// A named RAM disk. Any number of threads may use one at the same time; see the module's text.
///
/// A flush of it has nothing to do: what was answered is in the shared file, which outlives the process and not the host.
#[derive(Debug)]
pub struct RamDisk {
    name: String,
    size_bytes: u64,
    /// Blocks whose memory comes and goes together.
    unit_blocks: u64,
    /// Blocks that one allocation tries to cover: a multiple of `unit_blocks`.
    allocate_blocks: u64,
    file: OwnedFd,
    region: SharedRegion,
    states: BlockStates,
    allocated_bytes: AtomicU64,
    budget: Arc<RamBudget>,
}

/// The part of a request that lies in one block.
struct Piece {
    block: u64,
    /// First byte on the disk.
    offset: usize,
    /// Where the bytes are in the request.
    range: std::ops::Range<usize>,
}

impl RamDisk {
    /// Makes a disk on `file`, which has exactly `size_bytes` (see [`open_backing`]). Memory that the file already has (a
    /// disk taken up after a restart) is found and counted in `budget`, beyond its limit if need be: its
    /// contents exist. Runs on the control side.
    ///
    /// # Errors
    /// `Invalid` (size), `WrongFileSystem`, `Mismatch` (length of the file), `Io`.
    pub fn create(
        file: OwnedFd,
        name: &str,
        size_bytes: u64,
        page: PageSize,
        budget: Arc<RamBudget>,
    ) -> Result<Arc<RamDisk>, RamError> {
        backing::check_size(name, size_bytes, page)?;
        let unit_bytes = backing::check_file(&file, name, size_bytes, page)?;
        let io = |error: &dyn std::fmt::Display| {
            RamError::new(
                RamErrorKind::Io,
                format!("RAM disk {name}: cannot map {size_bytes} bytes: {error}"),
            )
        };
        let region = SharedRegion::map(&file, size_bytes as usize).map_err(|e| io(&e))?;
        let states = BlockStates::new(size_bytes.div_ceil(BLOCK_BYTES)).map_err(|e| io(&e))?;
        let unit_blocks = (unit_bytes / BLOCK_BYTES).max(1);
        let disk = RamDisk {
            name: name.to_owned(),
            size_bytes,
            unit_blocks,
            allocate_blocks: ALLOCATE_BLOCKS.max(unit_blocks),
            file,
            region,
            states,
            allocated_bytes: AtomicU64::new(0),
            budget,
        };
        backing::find_memory(&disk.file, size_bytes, page, |range| disk.adopt(range)).map_err(|e| io(&e))?;
        Ok(Arc::new(disk))
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its size in bytes, a multiple of 512.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// Bytes of memory that it uses now.
    pub fn allocated_bytes(&self) -> u64 {
        self.allocated_bytes.load(Ordering::Relaxed)
    }

    /// Reads `dst.len()` bytes from `offset`. Holes are zeroes.
    pub fn read(&self, offset: u64, dst: &mut [u8]) -> RamOutcome {
        self.each_block(offset, dst.len() as u64, |piece| {
            let dst = &mut dst[piece.range];
            match self.states.lock_shared(piece.block) {
                SharedLock::Held(_guard) => self.region.copy_out(piece.offset, dst)?,
                SharedLock::Hole => dst.fill(0),
                SharedLock::Busy => return Err(Stop::Busy),
            }
            Ok(())
        })
    }

    /// Writes `src` to `offset`, allocating memory as needed.
    pub fn write(&self, offset: u64, src: &[u8]) -> RamOutcome {
        self.each_block(offset, src.len() as u64, |piece| {
            let _guard = self.lock_with_memory(piece.block)?;
            Ok(self.region.copy_in(piece.offset, &src[piece.range])?)
        })
    }

    /// Makes a range read as zeroes. With `may_unmap` this is [`RamDisk::discard`]; without it the range has memory afterwards
    /// and a later write to it cannot run out of space.
    pub fn write_zeroes(&self, offset: u64, len: u64, may_unmap: bool) -> RamOutcome {
        if may_unmap {
            return self.discard(offset, len);
        }
        self.each_block(offset, len, |piece| {
            let _guard = self.lock_with_memory(piece.block)?;
            Ok(self.region.zero(piece.offset, piece.range.len())?)
        })
    }

    /// Gives memory back. The range reads as zeroes afterwards, also where it covers an allocation unit in part and the
    /// memory has to stay.
    pub fn discard(&self, offset: u64, len: u64) -> RamOutcome {
        let Some(end) = self.end_of(offset, len) else { return RamOutcome::Failed(libc::EINVAL) };
        let scan_end = end.min((offset / BLOCK_BYTES + SCAN_BLOCKS_MAX) * BLOCK_BYTES);
        let (mut at, mut zeroed, mut punches) = (offset, 0, 0);
        while at < end {
            at = at
                .max(self.states.next_memory(at / BLOCK_BYTES, scan_end.div_ceil(BLOCK_BYTES)) * BLOCK_BYTES);
            if at >= end {
                break;
            }
            if at >= scan_end || punches == PUNCHES_PER_CALL || zeroed >= CALL_BYTES_MAX as u64 {
                return RamOutcome::Partial { done: at - offset };
            }
            let step = match self.whole_units(at, end) {
                Some(units) => {
                    punches += 1;
                    self.punch(units)
                }
                None => {
                    let block_end = (at / BLOCK_BYTES + 1) * BLOCK_BYTES;
                    let piece_end = end.min(block_end);
                    zeroed += piece_end - at;
                    self.zero_in_block(at, piece_end).map(|()| piece_end)
                }
            };
            match step {
                Ok(next) => at = next,
                Err(stop) => return stop.outcome(at - offset),
            }
        }
        RamOutcome::Done
    }

    /// Stretches with and without memory from `offset` on, at most `max`, which together cover `len` bytes or less: a
    /// query looks at a bounded part of the disk. Empty for a range outside the disk, or of no length.
    pub fn extents(&self, offset: u64, len: u64, max: usize) -> Vec<RamExtent> {
        let mut extents = Vec::new();
        let Some(end) = self.end_of(offset, len) else { return extents };
        let end = end.min((offset / BLOCK_BYTES + SCAN_BLOCKS_MAX) * BLOCK_BYTES);
        let mut at = offset;
        while at < end && extents.len() < max {
            let (next_block, memory) = self.states.same_memory(at / BLOCK_BYTES, end.div_ceil(BLOCK_BYTES));
            let next = end.min(next_block * BLOCK_BYTES);
            extents.push(RamExtent { len: next - at, hole: !memory });
            at = next;
        }
        extents
    }

    /// Runs `work` on each block of a range until it stops or the call's share is used up.
    fn each_block(
        &self,
        offset: u64,
        len: u64,
        mut work: impl FnMut(Piece) -> Result<(), Stop>,
    ) -> RamOutcome {
        if self.end_of(offset, len).is_none() {
            return RamOutcome::Failed(libc::EINVAL);
        }
        let share = len.min(CALL_BYTES_MAX as u64);
        let mut done = 0;
        while done < share {
            let at = offset + done;
            let in_block = BLOCK_BYTES - at % BLOCK_BYTES;
            let next = done + in_block.min(len - done);
            let piece =
                Piece { block: at / BLOCK_BYTES, offset: at as usize, range: done as usize..next as usize };
            if let Err(stop) = work(piece) {
                return stop.outcome(done);
            }
            done = next;
        }
        if done == len { RamOutcome::Done } else { RamOutcome::Partial { done } }
    }

    /// The end of a range; `None` outside the disk.
    fn end_of(&self, offset: u64, len: u64) -> Option<u64> {
        offset.checked_add(len).filter(|&end| end <= self.size_bytes)
    }

    /// Locks a block exclusively and sees to it that it has memory.
    #[inline]
    fn lock_with_memory(&self, block: u64) -> Result<RunGuard<'_>, Stop> {
        let guard = self.states.lock_exclusive(block).ok_or(Stop::Busy)?;
        if guard.has_memory() {
            return Ok(guard);
        }
        drop(guard);
        self.allocate(block)?;
        // A discard of another shard may come between; then this is a conflict like any other.
        self.states.lock_exclusive(block).filter(RunGuard::has_memory).ok_or(Stop::Busy)
    }

    /// Gives the unit of `block` memory, and more behind it when that is free to take.
    #[cold]
    fn allocate(&self, block: u64) -> Result<(), Stop> {
        let unit_start = block - block % self.unit_blocks;
        let unit_end = self.states.len().min(unit_start + self.unit_blocks);
        let chunk_start = block - block % self.allocate_blocks;
        let chunk_end = self.states.len().min(chunk_start + self.allocate_blocks);
        let mut guard = self.states.lock_exclusive(unit_start).ok_or(Stop::Busy)?;
        if guard.has_memory() {
            return Ok(()); // another shard was first
        }
        guard.extend(chunk_end);
        if guard.end() < unit_end {
            return Err(Stop::Busy);
        }
        self.cut_to_units(&mut guard);
        match self.fallocate_run(&guard) {
            Err(Stop::NoSpace) if guard.end() > unit_end => {
                guard.truncate(unit_end);
                self.fallocate_run(&guard)?;
            }
            other => other?,
        }
        guard.set_memory(true);
        Ok(())
    }

    /// Takes budget and memory for the blocks of `guard`: all or nothing.
    fn fallocate_run(&self, guard: &RunGuard<'_>) -> Result<(), Stop> {
        let bytes = guard.blocks() * BLOCK_BYTES;
        if !self.budget.take(bytes) {
            return Err(Stop::NoSpace);
        }
        match self.fallocate(FallocateFlags::FALLOC_FL_KEEP_SIZE, guard) {
            Ok(()) => {
                self.allocated_bytes.fetch_add(bytes, Ordering::Relaxed);
                Ok(())
            }
            Err(errno) => {
                self.budget.give_back(bytes);
                // ENOMEM: the control group's limit, or hugetlbfs without a free page.
                let full = matches!(errno, Errno::ENOSPC | Errno::EDQUOT | Errno::ENOMEM);
                Err(if full { Stop::NoSpace } else { Stop::Failed(errno) })
            }
        }
    }

    /// The largest range of whole units that starts at `at`, ends by `end` and is one punch's work.
    fn whole_units(&self, at: u64, end: u64) -> Option<std::ops::Range<u64>> {
        let unit_bytes = self.unit_blocks * BLOCK_BYTES;
        if !at.is_multiple_of(unit_bytes) {
            return None;
        }
        // The last unit of the disk may be short; a range that reaches the disk's end covers it.
        let whole_end =
            if end == self.size_bytes { end.div_ceil(unit_bytes) } else { end / unit_bytes } * unit_bytes;
        let last = (whole_end / BLOCK_BYTES).min(self.states.len());
        let first = at / BLOCK_BYTES;
        let last = last.min(first + PUNCH_BLOCKS_MAX.max(self.unit_blocks));
        (first < last).then_some(first..last)
    }

    /// Takes the memory from the start of `blocks`, as far as other shards let it; returns the byte behind the last one.
    fn punch(&self, blocks: std::ops::Range<u64>) -> Result<u64, Stop> {
        let mut guard = self.states.lock_exclusive(blocks.start).ok_or(Stop::Busy)?;
        if guard.has_memory() {
            guard.extend(blocks.end);
            self.cut_to_units(&mut guard);
            if guard.blocks() == 0 {
                return Err(Stop::Busy);
            }
            let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
            self.fallocate(flags, &guard).map_err(Stop::Failed)?;
            guard.set_memory(false);
            self.allocated_bytes.fetch_sub(guard.blocks() * BLOCK_BYTES, Ordering::Relaxed);
            self.budget.give_back(guard.blocks() * BLOCK_BYTES);
        }
        Ok((guard.end() * BLOCK_BYTES).min(self.size_bytes))
    }

    /// From now on so many of a thousand tries of a lock meet another shard, by chance of this seed.
    #[cfg(test)]
    pub fn invent_rival(&self, seed: u64, chance: u64) {
        self.states.rival.set(seed, chance);
    }

    /// How often that has happened.
    #[cfg(test)]
    pub fn rivals_met(&self) -> u64 {
        self.states.rival.met()
    }

    /// Unlocks what is behind the last whole unit; the disk's last unit may be short.
    fn cut_to_units(&self, guard: &mut RunGuard<'_>) {
        if guard.end() < self.states.len() {
            guard.truncate(guard.end() - guard.end() % self.unit_blocks);
        }
    }

    /// Zeroes bytes of one block in place, if it has memory.
    fn zero_in_block(&self, start: u64, end: u64) -> Result<(), Stop> {
        let guard = self.states.lock_exclusive(start / BLOCK_BYTES).ok_or(Stop::Busy)?;
        if guard.has_memory() {
            self.region.zero(start as usize, (end - start) as usize)?;
        }
        Ok(())
    }

    fn fallocate(&self, flags: FallocateFlags, run: &RunGuard<'_>) -> Result<(), Errno> {
        let unit_bytes = self.unit_blocks * BLOCK_BYTES;
        let start = run.start() * BLOCK_BYTES;
        // The file ends with the disk; its last page is still a whole one.
        let len = (run.blocks() * BLOCK_BYTES).next_multiple_of(unit_bytes);
        let mut interrupts = 0;
        loop {
            match fallocate(&self.file, flags, start as i64, len as i64) {
                Err(Errno::EINTR) if interrupts < INTERRUPTS_MAX => interrupts += 1,
                other => return other,
            }
        }
    }

    /// Counts memory that the file already has.
    fn adopt(&self, bytes: std::ops::Range<u64>) {
        let unit_bytes = self.unit_blocks * BLOCK_BYTES;
        let first = bytes.start / unit_bytes * self.unit_blocks;
        let end = (bytes.end.div_ceil(unit_bytes) * self.unit_blocks).min(self.states.len());
        for block in first..end {
            self.states.set_initial_memory(block);
        }
        let bytes = (end - first) * BLOCK_BYTES;
        self.allocated_bytes.fetch_add(bytes, Ordering::Relaxed);
        self.budget.take_beyond_limit(bytes);
    }
}

impl Drop for RamDisk {
    fn drop(&mut self) {
        self.budget.give_back(*self.allocated_bytes.get_mut());
    }
}
