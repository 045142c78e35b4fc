//! I/O buffers of a shard: page-aligned, from one mapping that never moves, in size classes from 4 KiB to 512 KiB.
//!
//! Memory is bounded by a budget, and given back to the system when it has been idle: a disk that was busy once costs nothing
//! afterwards. Every connection may always have one piece (`guaranteed`), so that nobody who sits on buffers can stop others.
//!
//! A [`Buf`] is a unique handle (neither `Copy` nor `Clone`); it does not free itself, because the kernel may still use the memory
//! when its holder has gone: the reactor frees it when the operation has completed. One that the kernel is done with can be lent ([`Loan`])
//! to somebody who knows no pool.

use std::any::Any;
use std::cell::RefCell;
use std::ptr::NonNull;
use std::rc::Rc;

use formats::file::{Buf as Bytes, Lent};

/// Smallest buffer and unit of carving, in bytes.
pub const PAGE: usize = 4096;
/// Largest buffer, in bytes: one chunk.
pub const CHUNK: usize = 512 << 10;
const SLOTS: u32 = (CHUNK / PAGE) as u32;
const CLASSES: usize = 8;
const NONE: u32 = u32::MAX;

/// A buffer: unique handle to a piece of the pool.
#[derive(Debug)]
pub struct Buf {
    chunk: u32,
    slot: u8,
    class: u8,
}

impl Buf {
    /// Capacity in bytes.
    pub fn capacity(&self) -> usize {
        PAGE << self.class
    }
}

/// The address space of a pool.
#[derive(Debug)]
struct Mapping {
    base: NonNull<u8>,
    len: usize,
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: our own mapping, unmapped once; the pool and its loans, which know it, are gone. The shard drops its pool after its ring, so
        // no operation is left.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.len) };
    }
}

/// A buffer in the hands of somebody who knows no pool; the pool has it back when it is dropped.
#[derive(Debug)]
pub struct Loan {
    /// Taken only when it goes back.
    buf: Option<Buf>,
    start: NonNull<u8>,
    len: usize,
    mapping: Rc<Mapping>,
    returned: Rc<RefCell<Vec<Buf>>>,
}

impl Lent for Loan {
    fn bytes(&self) -> &[u8] {
        // SAFETY: `len` bytes from `start` on are the piece of the buffer's, in a mapping that lives as long as `self`; the handle is unique and in
        // here, so nobody else reaches them, and the kernel was done with them when they were lent.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `bytes`, and `self` is borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

impl Drop for Loan {
    fn drop(&mut self) {
        self.returned.borrow_mut().extend(self.buf.take());
    }
}

#[derive(Debug, Clone, Copy)]
struct Chunk {
    /// One bit per slot that starts a free piece.
    free: u128,
    class: u8,
    /// Index in `partial[class]`, or NONE.
    position: u32,
    /// Was touched since it was last given back to the system.
    dirty: bool,
}

/// The buffers of one shard.
#[derive(Debug)]
pub struct Pool {
    mapping: Rc<Mapping>,
    /// Buffers that were lent and are not any more.
    returned: Rc<RefCell<Vec<Buf>>>,
    zeroes: NonNull<u8>,
    chunks: Vec<Chunk>,
    /// Chunks with no piece in use, most recently used last.
    empty: Vec<u32>,
    partial: [Vec<u32>; CLASSES],
    used: usize,
    budget: usize,
    /// Length of `empty` at its lowest since the last trim: chunks below were idle all the time.
    idle_floor: usize,
    /// Free chunks that a test keeps from being used.
    #[cfg(test)]
    hidden: Vec<u32>,
}

/// The pool could not be mapped.
#[derive(Debug, thiserror::Error)]
#[error(
    "cannot reserve {bytes} bytes of address space for I/O buffers: {source}; raise the limit of virtual memory (ulimit -v) or lower the buffer budget"
)]
pub struct PoolError {
    /// Wanted.
    pub bytes: usize,
    /// Why not.
    pub source: std::io::Error,
}

fn map(bytes: usize, protection: i32) -> Result<NonNull<u8>, PoolError> {
    // SAFETY: a new anonymous mapping at an address of the kernel's choice aliases nothing.
    let address = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            bytes,
            protection,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
            -1,
            0,
        )
    };
    if address == libc::MAP_FAILED {
        return Err(PoolError { bytes, source: std::io::Error::last_os_error() });
    }
    NonNull::new(address.cast())
        .ok_or_else(|| PoolError { bytes, source: std::io::Error::other("mapped at 0") })
}

impl Pool {
    /// Reserves address space for `budget` bytes that all share plus `guaranteed` bytes that single connections may take beyond
    /// it. No memory is used before it is touched.
    pub fn new(budget: usize, guaranteed: usize) -> Result<Pool, PoolError> {
        let count = (budget + guaranteed).div_ceil(CHUNK).max(1);
        let mapped = count * CHUNK;
        let base = map(mapped, libc::PROT_READ | libc::PROT_WRITE)?;
        let mapping = Rc::new(Mapping { base, len: mapped });
        let zeroes = map(CHUNK, libc::PROT_READ)?;
        let chunk = Chunk { free: 0, class: 0, position: NONE, dirty: false };
        Ok(Pool {
            mapping,
            returned: Rc::default(),
            zeroes,
            chunks: vec![chunk; count],
            empty: (0..count as u32).rev().collect(),
            partial: Default::default(),
            used: 0,
            budget,
            idle_floor: count,
            #[cfg(test)]
            hidden: Vec::new(),
        })
    }

    /// Has the system use large pages for the buffers, where it has them: the kernel then looks up and describes to the device one page for a
    /// large buffer instead of many. For programs with few pools, since the first touch of a page gives all of it memory.
    pub fn use_large_pages(&self) {
        // SAFETY: advice about our own mapping, which changes no contents. It may be refused, and nothing depends on it.
        unsafe {
            libc::madvise(self.mapping.base.as_ptr().cast(), self.mapping.len, libc::MADV_HUGEPAGE);
        }
    }

    /// Bytes that connections share.
    pub fn budget(&self) -> usize {
        self.budget
    }

    /// Bytes in use.
    pub fn used(&self) -> usize {
        self.used
    }

    /// A buffer of at least `len` bytes (1 to [`CHUNK`]), or `None` when the budget is spent. With `guaranteed` the budget does not
    /// count, only the address space: for the one piece that every connection may always have.
    pub fn take(&mut self, len: usize, guaranteed: bool) -> Option<Buf> {
        debug_assert!(len <= CHUNK);
        let class = (len.max(PAGE).div_ceil(PAGE)).next_power_of_two().trailing_zeros() as usize;
        let bytes = PAGE << class;
        if self.used + bytes > self.budget && !guaranteed {
            return None;
        }
        let index = match self.partial[class].last() {
            Some(&index) => index,
            None => self.carve(class)?,
        };
        let chunk = &mut self.chunks[index as usize];
        let slot = chunk.free.trailing_zeros();
        chunk.free &= !(1u128 << slot);
        if chunk.free == 0 {
            self.unlist(index);
        }
        self.used += bytes;
        Some(Buf { chunk: index, slot: slot as u8, class: class as u8 })
    }

    fn carve(&mut self, class: usize) -> Option<u32> {
        let index = self.empty.pop()?;
        self.idle_floor = self.idle_floor.min(self.empty.len());
        let step = 1u32 << class;
        let mut free = 0u128;
        let mut slot = 0;
        while slot < SLOTS {
            free |= 1u128 << slot;
            slot += step;
        }
        let position = self.partial[class].len() as u32;
        self.partial[class].push(index);
        self.chunks[index as usize] = Chunk { free, class: class as u8, position, dirty: true };
        Some(index)
    }

    fn unlist(&mut self, index: u32) {
        let chunk = self.chunks[index as usize];
        if chunk.position == NONE {
            return;
        }
        let list = &mut self.partial[chunk.class as usize];
        list.swap_remove(chunk.position as usize);
        if let Some(&moved) = list.get(chunk.position as usize) {
            self.chunks[moved as usize].position = chunk.position;
        }
        self.chunks[index as usize].position = NONE;
    }

    /// Gives a buffer back. The kernel must be done with it.
    pub fn give(&mut self, buf: Buf) {
        self.used -= buf.capacity();
        let class = buf.class as usize;
        let chunk = &mut self.chunks[buf.chunk as usize];
        chunk.free |= 1u128 << buf.slot;
        if chunk.position == NONE {
            chunk.position = self.partial[class].len() as u32;
            self.partial[class].push(buf.chunk);
        }
        if self.chunks[buf.chunk as usize].free.count_ones() == SLOTS >> class {
            self.unlist(buf.chunk);
            self.empty.push(buf.chunk);
        }
    }

    /// Lends the first `len` bytes of a buffer. The kernel must be done with it.
    pub fn lend(&self, buf: Buf, len: usize) -> Bytes {
        let len = len.min(buf.capacity());
        // SAFETY: a piece lies inside of the mapping.
        let start = unsafe { self.mapping.base.add(self.offset(&buf)) };
        let (mapping, returned) = (self.mapping.clone(), self.returned.clone());
        Bytes::lent(Box::new(Loan { buf: Some(buf), start, len, mapping, returned }))
    }

    /// Takes bytes that are in a buffer of this pool back with it.
    ///
    /// # Errors
    /// The same bytes: they are somewhere else.
    pub fn take_back(&self, bytes: Bytes) -> Result<Buf, Bytes> {
        let len = bytes.len();
        let mut lent = bytes.into_lent()?;
        let loan = (&mut *lent as &mut dyn Any).downcast_mut::<Loan>();
        let ours = loan.filter(|loan| Rc::ptr_eq(&loan.mapping, &self.mapping));
        if let Some(buf) = ours.and_then(|loan| loan.buf.take()) {
            return Ok(buf);
        }
        let mut bytes = Bytes::lent(lent);
        bytes.truncate(len);
        Err(bytes)
    }

    /// Gives the buffers back that are not lent any more; called once in a turn.
    pub fn collect(&mut self) {
        let returned = self.returned.take();
        for buf in returned {
            self.give(buf);
        }
    }

    /// Gives chunks that were empty since the last call back to the system; called about once a second. Returns whether anything is
    /// left that a later call could give back.
    pub fn trim(&mut self) -> bool {
        let idle = self.idle_floor.min(self.empty.len());
        for &index in &self.empty[..idle] {
            let chunk = &mut self.chunks[index as usize];
            if chunk.dirty {
                chunk.dirty = false;
                // SAFETY: the range is inside our mapping and no piece of the chunk is in use.
                unsafe {
                    let start = self.mapping.base.as_ptr().add(index as usize * CHUNK);
                    libc::madvise(start.cast(), CHUNK, libc::MADV_DONTNEED);
                }
            }
        }
        self.idle_floor = self.empty.len();
        self.empty.iter().any(|&index| self.chunks[index as usize].dirty)
    }

    /// Address of a buffer's first byte, for an [`super::Op`]; aligned to [`PAGE`].
    pub fn address(&self, buf: &Buf) -> usize {
        self.mapping.base.as_ptr() as usize + self.offset(buf)
    }

    /// Where a buffer begins in the mapping.
    fn offset(&self, buf: &Buf) -> usize {
        buf.chunk as usize * CHUNK + buf.slot as usize * PAGE
    }

    /// Every chunk is free.
    #[cfg(test)]
    pub fn is_whole(&self) -> bool {
        self.empty.len() + self.hidden.len() == self.chunks.len() && self.partial.iter().all(Vec::is_empty)
    }

    /// From now on there is no chunk but those that become free.
    #[cfg(test)]
    pub fn hide_free_chunks(&mut self) {
        self.hidden.append(&mut self.empty);
        self.idle_floor = 0;
    }

    /// Ends [`Pool::hide_free_chunks`].
    #[cfg(test)]
    pub fn show_free_chunks(&mut self) {
        self.empty.append(&mut self.hidden);
    }

    /// Address and length of the memory that all buffers are carved from.
    #[cfg(test)]
    pub fn range(&self) -> (usize, usize) {
        (self.mapping.base.as_ptr() as usize, self.mapping.len)
    }

    /// Address of [`CHUNK`] bytes that read as zero, for writes.
    pub fn zeroes(&self) -> usize {
        self.zeroes.as_ptr() as usize
    }

    /// The bytes of a buffer. Not while the kernel writes to it.
    pub fn bytes(&self, buf: &Buf) -> &[u8] {
        // SAFETY: the piece lies inside our mapping; the handle is unique and the borrow of the pool keeps writers of this
        // process away.
        unsafe { std::slice::from_raw_parts(self.address(buf) as *const u8, buf.capacity()) }
    }

    /// The bytes of a buffer, to be filled. Not while the kernel uses it.
    pub fn bytes_mut(&mut self, buf: &Buf) -> &mut [u8] {
        // SAFETY: as in `bytes`, and the borrow of the pool is exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.address(buf) as *mut u8, buf.capacity()) }
    }

    /// Copies `len` bytes between two buffers.
    pub fn copy(&mut self, from: &Buf, from_offset: usize, to: &Buf, to_offset: usize, len: usize) {
        assert!(
            from_offset + len <= from.capacity() && to_offset + len <= to.capacity(),
            "copy inside buffers"
        );
        // SAFETY: both ranges are inside their pieces (asserted), and two handles never name the same piece.
        unsafe {
            std::ptr::copy_nonoverlapping(
                (self.address(from) + from_offset) as *const u8,
                (self.address(to) + to_offset) as *mut u8,
                len,
            );
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        // SAFETY: our own mapping; the shard drops its pool after its ring, so no operation is left.
        unsafe { libc::munmap(self.zeroes.as_ptr().cast(), CHUNK) };
    }
}

#[cfg(test)]
mod tests {
    //! Goal: pieces never overlap, the budget holds, and idle memory goes back. Method: a random walk of take and give against a
    //! list of the ranges in use; of loans, by their addresses.
    use super::*;

    #[test]
    fn pieces_never_overlap_and_all_come_back() {
        let mut pool = Pool::new(4 * CHUNK, CHUNK).expect("map");
        let mut held: Vec<(Buf, usize, u8)> = Vec::new();
        let mut seed = 1u64;
        for round in 0..20_000u32 {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            if seed.is_multiple_of(2) || held.is_empty() {
                let len = 1 + (seed >> 8) as usize % CHUNK;
                if let Some(buf) = pool.take(len, false) {
                    let tag = round as u8;
                    assert!(buf.capacity() >= len);
                    assert_eq!(pool.address(&buf) % PAGE, 0);
                    pool.bytes_mut(&buf).fill(tag);
                    held.push((buf, len, tag));
                }
            } else {
                let (buf, _, tag) = held.swap_remove((seed >> 8) as usize % held.len());
                assert!(pool.bytes(&buf).iter().all(|&b| b == tag), "another piece wrote here");
                pool.give(buf);
            }
            assert_eq!(pool.used(), held.iter().map(|(buf, ..)| buf.capacity()).sum::<usize>());
            assert!(pool.used() <= 4 * CHUNK);
        }
        for (buf, ..) in held {
            pool.give(buf);
        }
        assert_eq!(pool.used(), 0);
        assert_eq!(pool.empty.len(), 5);
    }

    #[test]
    fn a_guaranteed_piece_is_had_when_the_budget_is_spent() {
        let mut pool = Pool::new(CHUNK, CHUNK).expect("map");
        let all = pool.take(CHUNK, false).expect("the budget");
        assert!(pool.take(PAGE, false).is_none());
        let one = pool.take(PAGE, true).expect("guaranteed");
        pool.give(one);
        pool.give(all);
    }

    #[test]
    fn idle_chunks_read_as_zero_after_trim() {
        let mut pool = Pool::new(CHUNK, 0).expect("map");
        let buf = pool.take(CHUNK, false).expect("take");
        pool.bytes_mut(&buf).fill(7);
        pool.give(buf);
        assert!(pool.trim(), "first call starts the watch");
        assert!(!pool.trim(), "second call gives it back");
        let buf = pool.take(CHUNK, false).expect("take");
        assert!(pool.bytes(&buf).iter().all(|&b| b == 0));
        pool.give(buf);
    }
    #[test]
    fn what_is_lent_is_nobody_elses_until_it_is_back() {
        let mut pool = Pool::new(2 * PAGE, 0).expect("map");
        let mut other = Pool::new(PAGE, 0).expect("map");
        let buf = pool.take(PAGE, false).expect("take");
        pool.bytes_mut(&buf).fill(7);
        let place = pool.address(&buf);
        let mut lent = pool.lend(buf, 100);
        lent[99] = 8;
        assert_eq!((lent.len(), lent[0], lent[99], lent.as_ptr() as usize), (100, 7, 8, place));
        let second = pool.take(PAGE, false).expect("take");
        assert_ne!(pool.address(&second), place);
        assert!(pool.take(PAGE, false).is_none(), "what is lent counts");
        lent.truncate(50);
        let lent = other.take_back(lent).expect_err("another pool's");
        assert_eq!(lent.len(), 50);
        let buf = pool.take_back(lent).expect("ours");
        assert_eq!(pool.address(&buf), place);
        assert!(pool.take_back(Bytes::zeroed(1)).is_err());
        drop(pool.lend(buf, PAGE));
        assert_eq!(pool.used(), 2 * PAGE);
        pool.collect();
        assert_eq!(pool.used(), PAGE);
        pool.give(second);
        assert!(pool.is_whole());
        let late = other.take(PAGE, false).map(|buf| other.lend(buf, PAGE)).expect("take");
        drop(other);
        assert_eq!(late[0], 0, "the memory outlives its pool");
    }
}
