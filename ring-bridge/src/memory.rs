//! Memory that others can change while we look at it.
//!
//! A guest, a client or another shard may write to the same bytes at any moment, so this module never hands out a Rust
//! reference to them: there are bounds-checked copies, and nothing else. The rule for the callers is *copy once, check
//! the copy, use the copy*.
//!
//! # Why a racing copy is defined here
//! A plain `ptr::copy_nonoverlapping` is a non-atomic access: in a race it is undefined behaviour on paper, and in practice
//! the compiler may drop the private copy and read the shared bytes twice, which undoes the check of the copy. A loop of
//! relaxed word-sized atomics is defined but is not vectorised and takes up to twice as long for 4 KiB. (rust-vmm's
//! `vm-memory` uses volatile words for a few bytes and a plain `memcpy` above.) Here every access is made by libc's `memcpy`
//! and `memset`, called through a pointer that is read with `read_volatile`, so the compiler cannot know what is called: it has
//! to take the call for foreign code that may do whatever is allowed, among it what these functions amount to on the
//! machine, a relaxed atomic move of each byte. Each byte that arrives is one that was there at some time during the
//! call; nothing is fetched twice, elided or assumed. The copies order nothing: whoever needs order has an atomic beside
//! the data (a ring index, a block's lock).
//!
//! Invariants: a mapping lives as long as its owner and never moves; nothing in this process unmaps or shrinks what it maps.
//! A mapping may be somebody else's work (granted pages): [`SharedRegion::from_mapping`] takes it with what keeps it alive.
#![allow(unsafe_code)]

use std::ffi::{c_int, c_void};
use std::fmt;
use std::io;
use std::num::NonZeroUsize;
use std::ops::Deref;
use std::os::fd::{AsFd, BorrowedFd};
use std::ptr::NonNull;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap, mmap_anonymous, munmap};
use nix::sys::stat::fstat;

/// Why memory could not be shared or accessed.
#[derive(Debug, thiserror::Error, Clone, Copy, PartialEq, Eq)]
pub enum MemoryError {
    /// The range is not inside the region. Nothing was copied.
    #[error("{len} bytes at offset {offset} are not inside the shared region of {region_len} bytes")]
    OutOfBounds {
        /// First byte asked for, from the start of the region.
        offset: usize,
        /// Bytes asked for.
        len: usize,
        /// Bytes in the region.
        region_len: usize,
    },
    /// The file is shorter than what was to be mapped: touching the missing part would kill the process.
    #[error(
        "the shared memory has {found} bytes, {expected} are needed; the peer must size it before it passes it on"
    )]
    TooShort {
        /// Bytes in the file.
        found: u64,
        /// Bytes that were to be mapped.
        expected: u64,
    },
    /// The peer could shrink its memory under us.
    #[error(
        "the peer's memory can be truncated under the server: its seals are {found:#x}, F_SEAL_SHRINK is required; \
         create it by memfd_create(MFD_ALLOW_SEALING) and seal it by fcntl(F_ADD_SEALS, F_SEAL_SHRINK)"
    )]
    NotSealed {
        /// The seals as fcntl(F_GET_SEALS) gives them.
        found: c_int,
    },
    /// The descriptor cannot carry seals.
    #[error("the peer's memory is no memfd and cannot be protected against truncation; pass a sealed memfd")]
    NoMemfd,
    /// The kernel refused.
    #[error("{what}: {errno}")]
    Kernel {
        /// The call that failed.
        what: &'static str,
        /// Its error.
        errno: Errno,
    },
}

impl MemoryError {
    fn kernel(what: &'static str) -> impl FnOnce(Errno) -> MemoryError {
        move |errno| MemoryError::Kernel { what, errno }
    }
}

/// Requires that a client's memory cannot be shrunk by the client (F_SEAL_SHRINK, fcntl(2)): otherwise a truncation would turn
/// our next access into SIGBUS. Call it before [`SharedRegion::map`], which then compares the size.
///
/// What the seal does not cover: a client may punch holes. On a memfd of ordinary pages that costs a fresh page at our next
/// access; on one of huge pages the access would fail when none is free.
///
/// # Errors
/// [`MemoryError::NotSealed`] without the seal, [`MemoryError::NoMemfd`] when the descriptor knows no seals.
pub fn check_sealed(client_memory: BorrowedFd<'_>) -> Result<(), MemoryError> {
    let seals = match fcntl(client_memory, FcntlArg::F_GET_SEALS) {
        Ok(seals) => seals,
        Err(Errno::EINVAL) => return Err(MemoryError::NoMemfd),
        Err(errno) => return Err(MemoryError::Kernel { what: "fcntl(F_GET_SEALS)", errno }),
    };
    if SealFlag::from_bits_truncate(seals).contains(SealFlag::F_SEAL_SHRINK) {
        Ok(())
    } else {
        Err(MemoryError::NotSealed { found: seals })
    }
}

/// The memory that a ring or a table of requests in flight lies in: everything that the ring engines do to it goes through
/// these four calls, so that a test can stand between (and stop the world after any single store).
///
/// `load` acquires and `store` releases: a program that dies between two stores has made all the earlier ones and none of the
/// later ones, as another process sees them afterwards.
#[allow(clippy::len_without_is_empty)] // it has at least one byte
pub trait RingMemory {
    /// Bytes in the memory.
    fn len(&self) -> usize;

    /// The word of four bytes at `offset`, host byte order, read once with Acquire.
    ///
    /// # Errors
    /// [`MemoryError::OutOfBounds`], also when `offset` is no multiple of 4.
    fn load(&self, offset: usize) -> Result<u32, MemoryError>;

    /// Writes the word of four bytes at `offset` with Release.
    ///
    /// # Errors
    /// [`MemoryError::OutOfBounds`], also when `offset` is no multiple of 4.
    fn store(&self, offset: usize, value: u32) -> Result<(), MemoryError>;

    /// As [`SharedRegion::copy_out`].
    ///
    /// # Errors
    /// [`MemoryError::OutOfBounds`].
    fn copy_out(&self, offset: usize, dst: &mut [u8]) -> Result<(), MemoryError>;

    /// As [`SharedRegion::copy_in`].
    ///
    /// # Errors
    /// [`MemoryError::OutOfBounds`].
    fn copy_in(&self, offset: usize, src: &[u8]) -> Result<(), MemoryError>;
}

impl RingMemory for SharedRegion {
    #[inline]
    fn len(&self) -> usize {
        self.mapping.len
    }

    #[inline]
    fn load(&self, offset: usize) -> Result<u32, MemoryError> {
        Ok(self.word32(offset)?.load(Ordering::Acquire))
    }

    #[inline]
    fn store(&self, offset: usize, value: u32) -> Result<(), MemoryError> {
        self.word32(offset)?.store(value, Ordering::Release);
        Ok(())
    }

    #[inline]
    fn copy_out(&self, offset: usize, dst: &mut [u8]) -> Result<(), MemoryError> {
        SharedRegion::copy_out(self, offset, dst)
    }

    #[inline]
    fn copy_in(&self, offset: usize, src: &[u8]) -> Result<(), MemoryError> {
        SharedRegion::copy_in(self, offset, src)
    }
}

/// A pointer to ring memory is ring memory.
macro_rules! pointer_to_ring_memory {
    ($($pointer:ty),*) => {$(
        impl<M: RingMemory + ?Sized> RingMemory for $pointer {
            #[inline]
            fn len(&self) -> usize {
                (**self).len()
            }
            #[inline]
            fn load(&self, offset: usize) -> Result<u32, MemoryError> {
                (**self).load(offset)
            }
            #[inline]
            fn store(&self, offset: usize, value: u32) -> Result<(), MemoryError> {
                (**self).store(offset, value)
            }
            #[inline]
            fn copy_out(&self, offset: usize, dst: &mut [u8]) -> Result<(), MemoryError> {
                (**self).copy_out(offset, dst)
            }
            #[inline]
            fn copy_in(&self, offset: usize, src: &[u8]) -> Result<(), MemoryError> {
                (**self).copy_in(offset, src)
            }
        }
    )*};
}
pointer_to_ring_memory!(&M, Rc<M>, Arc<M>);

/// Memory mapped shared (tmpfs, memfd, hugetlbfs, granted pages) that others may write at the same time.
///
/// All accesses are raw copies, see the module's text. Touching a page that the file has no memory for allocates it, and
/// ends the process by SIGBUS when there is none: callers allocate first (fallocate), or know that the owner has.
#[derive(Debug)]
pub struct SharedRegion {
    mapping: Mapping,
}

impl SharedRegion {
    /// Maps the first `len` bytes of `file` for reading and writing. The file must be one that nobody else can shrink: our
    /// own, or a client's after [`check_sealed`]. Reserves nothing: holes stay holes.
    ///
    /// # Errors
    /// [`MemoryError::TooShort`] when the file has fewer bytes; [`MemoryError::Kernel`] when mmap refuses (`len` is 0, or no
    /// multiple of the huge page on hugetlbfs).
    pub fn map(file: impl AsFd, len: usize) -> Result<SharedRegion, MemoryError> {
        let found = fstat(file.as_fd()).map_err(MemoryError::kernel("fstat"))?.st_size as u64;
        if found < len as u64 {
            return Err(MemoryError::TooShort { found, expected: len as u64 });
        }
        let size =
            NonZeroUsize::new(len).ok_or(MemoryError::Kernel { what: "mmap", errno: Errno::EINVAL })?;
        let flags = MapFlags::MAP_SHARED | MapFlags::MAP_NORESERVE;
        // SAFETY: a new mapping at an address of the kernel's choice touches no existing memory.
        let start = unsafe { mmap(None, size, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, flags, file, 0) }
            .map_err(MemoryError::kernel("mmap"))?;
        let mapping = Mapping { start: start.cast(), len, owner: None };
        // Guests' data does not belong into a core dump; a kernel that does not know the advice changes nothing.
        mapping.advise(MmapAdvise::MADV_DONTDUMP);
        Ok(SharedRegion { mapping })
    }

    /// Takes over memory that somebody else mapped, for instance granted pages. `owner` keeps the mapping alive: it is dropped
    /// with the region, and may then unmap.
    ///
    /// # Errors
    /// [`MemoryError::Kernel`] with EINVAL when `len` is 0 or `start` is not on a page; `owner` is then dropped.
    ///
    /// # Safety
    /// The `len` bytes from `start` on are mapped shared for reading and writing and stay so until `owner` is dropped, whatever others do;
    /// nobody in this process holds Rust references to them or accesses them otherwise than as this module does.
    pub unsafe fn from_mapping(
        start: NonNull<u8>,
        len: usize,
        owner: Box<dyn Send + Sync>,
    ) -> Result<SharedRegion, MemoryError> {
        if len == 0 || !start.addr().get().is_multiple_of(PAGE_BYTES) {
            return Err(MemoryError::Kernel { what: "taking over a mapping", errno: Errno::EINVAL });
        }
        Ok(SharedRegion { mapping: Mapping { start, len, owner: Some(owner) } })
    }

    /// Takes the pages out of this process until they are touched again; what they hold stays in the file. Does nothing to a
    /// mapping that is somebody else's work: what its pages hold may not be in a file.
    pub fn drop_pages(&self) {
        if self.mapping.owner.is_none() {
            self.mapping.advise(MmapAdvise::MADV_DONTNEED);
        }
    }

    /// Bytes in the region.
    #[allow(clippy::len_without_is_empty)] // a region has at least one byte
    pub fn len(&self) -> usize {
        self.mapping.len
    }

    /// Copies `dst.len()` bytes from `offset` to `dst`.
    ///
    /// # Errors
    /// [`MemoryError::OutOfBounds`]; `dst` is then untouched.
    #[inline]
    pub fn copy_out(&self, offset: usize, dst: &mut [u8]) -> Result<(), MemoryError> {
        let shared = self.at(offset, dst.len())?;
        // SAFETY: `at` checked the source range; `dst` is an exclusive reference to private memory, which no mapping of this
        // module overlaps, since none is ever lent out as a reference.
        unsafe { copy(dst.as_mut_ptr(), shared, dst.len()) };
        Ok(())
    }

    /// Copies `src` to `offset`.
    ///
    /// # Errors
    /// [`MemoryError::OutOfBounds`]; the region is then untouched.
    #[inline]
    pub fn copy_in(&self, offset: usize, src: &[u8]) -> Result<(), MemoryError> {
        let shared = self.at(offset, src.len())?;
        // SAFETY: `at` checked the destination range; `src` is private memory, which no mapping of this module overlaps.
        unsafe { copy(shared, src.as_ptr(), src.len()) };
        Ok(())
    }

    /// Writes `len` zeroes at `offset`.
    ///
    /// # Errors
    /// [`MemoryError::OutOfBounds`]; the region is then untouched.
    #[inline]
    pub fn zero(&self, offset: usize, len: usize) -> Result<(), MemoryError> {
        let shared = self.at(offset, len)?;
        // SAFETY: `at` checked the range.
        unsafe { clear(shared, len) };
        Ok(())
    }

    /// The word of eight bytes at `offset`, for memory that is ours and has to be in order: everybody accesses it as an atomic.
    ///
    /// # Errors
    /// [`MemoryError::OutOfBounds`], also when `offset` is no multiple of 8.
    #[inline]
    pub fn word(&self, offset: usize) -> Result<&AtomicU64, MemoryError> {
        let shared = self.at(offset, 8)?;
        if !offset.is_multiple_of(8) {
            return Err(MemoryError::OutOfBounds { offset, len: 8, region_len: self.mapping.len });
        }
        // SAFETY: `at` checked the range; a mapping begins on a page, so a multiple of 8 is aligned; the bytes are initialised (a file's)
        // and stay mapped as long as `self`; who shares them accesses them by atomics or from outside this program.
        Ok(unsafe { AtomicU64::from_ptr(shared.cast()) })
    }

    /// The word of four bytes at `offset`: an index or a state that both sides access as an atomic (others from outside this
    /// program may write it by any means; a load yields some value that was there).
    ///
    /// # Errors
    /// [`MemoryError::OutOfBounds`], also when `offset` is no multiple of 4.
    #[inline]
    pub fn word32(&self, offset: usize) -> Result<&AtomicU32, MemoryError> {
        let shared = self.at(offset, 4)?;
        if !offset.is_multiple_of(4) {
            return Err(MemoryError::OutOfBounds { offset, len: 4, region_len: self.mapping.len });
        }
        // SAFETY: `at` checked the range; a mapping begins on a page, so a multiple of 4 is aligned; the bytes are initialised
        // (the kernel's) and stay mapped as long as `self`; who shares them accesses them by atomics, by this module's raw copies, or
        // from outside this program.
        Ok(unsafe { AtomicU32::from_ptr(shared.cast()) })
    }

    #[inline]
    fn at(&self, offset: usize, len: usize) -> Result<*mut u8, MemoryError> {
        let region_len = self.mapping.len;
        if offset.checked_add(len).is_none_or(|end| end > region_len) {
            return Err(MemoryError::OutOfBounds { offset, len, region_len });
        }
        // SAFETY: offset <= region_len, so the result is inside the mapping or one past its end (then `len` is 0).
        Ok(unsafe { self.mapping.start.as_ptr().add(offset) })
    }
}

/// An array of bytes, all zero at first, for threads that share small states: one byte per block of a large disk. Memory is
/// used only where a byte was written.
#[derive(Debug)]
pub struct AtomicBytes {
    mapping: Mapping,
}

impl AtomicBytes {
    /// `len` zero bytes (at least one).
    ///
    /// # Errors
    /// ENOMEM when there is no address space, EINVAL for 0.
    pub fn new(len: usize) -> io::Result<AtomicBytes> {
        let size = NonZeroUsize::new(len).ok_or(Errno::EINVAL)?;
        let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE;
        // SAFETY: a new anonymous mapping at an address of the kernel's choice touches no existing memory.
        let start =
            unsafe { mmap_anonymous(None, size, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, flags) }?;
        let mapping = Mapping { start: start.cast(), len, owner: None };
        // One written byte must not cost a huge page.
        mapping.advise(MmapAdvise::MADV_NOHUGEPAGE);
        Ok(AtomicBytes { mapping })
    }
}

impl Deref for AtomicBytes {
    type Target = [AtomicU8];

    #[inline]
    fn deref(&self) -> &[AtomicU8] {
        // SAFETY: the mapping is private to this process and to this value, holds `len` initialised (zero) bytes, lives as
        // long as `self`, and is only ever accessed as AtomicU8, which has the layout of a byte.
        unsafe {
            std::slice::from_raw_parts(self.mapping.start.as_ptr().cast::<AtomicU8>(), self.mapping.len)
        }
    }
}

/// Smallest page of a mapping.
const PAGE_BYTES: usize = 4096;

/// `len` mapped bytes; unmapped when dropped, by us or by their owner.
struct Mapping {
    start: NonNull<u8>,
    len: usize,
    owner: Option<Box<dyn Send + Sync>>,
}

impl fmt::Debug for Mapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Mapping { start, len, owner } = self;
        f.debug_struct("Mapping")
            .field("start", start)
            .field("len", len)
            .field("ours", &owner.is_none())
            .finish()
    }
}

// SAFETY: a mapping belongs to the process, not to a thread, and its address is never changed; an owner is Send.
unsafe impl Send for Mapping {}
// SAFETY: through a shared reference it is reached only by raw copies that are defined when they race (module's text) and
// by atomics; an owner is Sync.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Gives the kernel advice that changes cost, not contents; a refusal is of no consequence.
    fn advise(&self, advice: MmapAdvise) {
        // SAFETY: the range is this mapping, and the kinds of advice used here do not change its contents (MADV_DONTNEED would
        // for a private mapping; it is given for shared ones of files only).
        let _ = unsafe { madvise(self.start.cast(), self.len, advice) };
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        if self.owner.is_some() {
            return; // unmapping is the owner's, who is dropped next
        }
        // SAFETY: the range was mapped by the constructor, is unmapped once, and nobody can hold a reference to it.
        // It fails only for a range that is none; then nothing is unmapped.
        let _ = unsafe { munmap(self.start.cast(), self.len) };
    }
}

static MEMCPY: unsafe extern "C" fn(*mut c_void, *const c_void, usize) -> *mut c_void = libc::memcpy;
static MEMSET: unsafe extern "C" fn(*mut c_void, c_int, usize) -> *mut c_void = libc::memset;

/// Copies `len` bytes; either side may be changed by others meanwhile (module's text).
///
/// # Safety
/// Both ranges are mapped, `dst` writable, and they do not overlap.
#[inline]
unsafe fn copy(dst: *mut u8, src: *const u8, len: usize) {
    // SAFETY: MEMCPY is an initialised static; the volatile read only hides its value from the compiler.
    let memcpy = unsafe { std::ptr::read_volatile(&raw const MEMCPY) };
    // SAFETY: the caller's promise is memcpy's condition.
    unsafe { memcpy(dst.cast(), src.cast(), len) };
}

/// Writes `len` zeroes; others may access the bytes meanwhile (module's text).
///
/// # Safety
/// The range is mapped and writable.
#[inline]
unsafe fn clear(dst: *mut u8, len: usize) {
    // SAFETY: MEMSET is an initialised static; the volatile read only hides its value from the compiler.
    let memset = unsafe { std::ptr::read_volatile(&raw const MEMSET) };
    // SAFETY: the caller's promise is memset's condition.
    unsafe { memset(dst.cast(), 0, len) };
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;
    use std::sync::atomic::AtomicBool;

    use nix::sys::memfd::{MFdFlags, memfd_create};
    use nix::unistd::ftruncate;

    use super::*;

    fn memfd(len: i64, flags: MFdFlags) -> OwnedFd {
        let fd = memfd_create(c"memory-test", flags | MFdFlags::MFD_CLOEXEC).expect("memfd_create");
        ftruncate(&fd, len).expect("ftruncate");
        fd
    }

    // Goal: what one mapping writes, another of the same file reads, at any offset and length.
    // Method: copies at odd offsets through two mappings, compared with a byte vector.
    #[test]
    fn two_mappings_see_the_same_bytes() {
        let fd = memfd(8192, MFdFlags::empty());
        let (a, b) = (SharedRegion::map(&fd, 8192).expect("map"), SharedRegion::map(&fd, 8192).expect("map"));
        let mut model = vec![0u8; 8192];
        for (offset, len, value) in
            [(0, 8192, 1u8), (1, 4095, 2), (4095, 2, 3), (8191, 1, 4), (17, 0, 5), (8192, 0, 6)]
        {
            a.copy_in(offset, &vec![value; len]).expect("inside");
            model[offset..offset + len].fill(value);
            let mut seen = vec![0xee; 8192];
            b.copy_out(0, &mut seen).expect("inside");
            assert_eq!(seen, model);
        }
        b.zero(100, 5000).expect("inside");
        model[100..5100].fill(0);
        let mut seen = vec![0xee; 8192];
        a.copy_out(0, &mut seen).expect("inside");
        assert_eq!(seen, model);
    }

    // Goal: no access outside the region, whatever the numbers; an error and no effect instead.
    // Method: ranges that end behind the region, start behind it, or overflow.
    #[test]
    fn out_of_bounds_is_an_error() {
        let region = SharedRegion::map(memfd(4096, MFdFlags::empty()), 4096).expect("map");
        for (offset, len) in [(0, 4097), (4096, 1), (4095, 2), (usize::MAX, 1), (usize::MAX - 1, 4)] {
            let mut dst = vec![7u8; len];
            let expected = Err(MemoryError::OutOfBounds { offset, len, region_len: 4096 });
            assert_eq!(region.copy_out(offset, &mut dst), expected);
            assert_eq!(dst, vec![7u8; len], "destination untouched");
            assert_eq!(region.copy_in(offset, &dst), expected);
            assert_eq!(region.zero(offset, len), expected);
        }
        assert!(region.zero(1, usize::MAX).is_err());
    }

    // Goal: words are those of the file, at multiples of eight inside it.
    // Method: a store through one mapping, a load through another, and offsets that are none.
    #[test]
    fn words_are_shared_and_aligned() {
        let fd = memfd(4096, MFdFlags::empty());
        let (a, b) = (SharedRegion::map(&fd, 4096).expect("map"), SharedRegion::map(&fd, 4096).expect("map"));
        a.word(4088).expect("the last").store(0x0102_0304_0506_0708, Ordering::Release);
        assert_eq!(b.word(4088).expect("the last").load(Ordering::Acquire), 0x0102_0304_0506_0708);
        for offset in [1, 4, 4089, 4096, usize::MAX - 7] {
            assert!(a.word(offset).is_err(), "{offset}");
        }
    }

    // Goal: words of four bytes likewise, and through the trait.
    #[test]
    fn half_words_are_shared_and_aligned() {
        let fd = memfd(4096, MFdFlags::empty());
        let (a, b) = (SharedRegion::map(&fd, 4096).expect("map"), SharedRegion::map(&fd, 4096).expect("map"));
        RingMemory::store(&&a, 4092, 0x0102_0304).expect("the last");
        assert_eq!(Rc::new(b).load(4092), Ok(0x0102_0304));
        for offset in [1, 2, 4090, 4093, 4096, usize::MAX - 3] {
            assert!(a.load(offset).is_err() && a.store(offset, 1).is_err(), "{offset}");
        }
    }

    // Goal: memory that somebody else mapped is used as our own, is unmapped by its owner and not by us, and the owner goes with
    // the region.
    // Method: the owner is a region and a flag that says when it is dropped; afterwards both views are gone once.
    #[test]
    fn a_mapping_of_somebody_else() {
        struct Owner(SharedRegion, Arc<AtomicBool>);
        impl Drop for Owner {
            fn drop(&mut self) {
                assert_eq!(self.0.load(0), Ok(7), "still mapped");
                self.1.store(true, Ordering::Relaxed);
            }
        }
        let dropped = Arc::new(AtomicBool::new(false));
        let fd = memfd(8192, MFdFlags::empty());
        let owner = Owner(SharedRegion::map(&fd, 8192).expect("map"), dropped.clone());
        let start = owner.0.mapping.start;
        // SAFETY: the mapping lives in the owner; everybody here uses this module.
        let region = unsafe { SharedRegion::from_mapping(start, 8192, Box::new(owner)) }.expect("on a page");
        region.store(0, 7).expect("inside");
        region.drop_pages();
        assert_eq!(
            region.load(8192),
            Err(MemoryError::OutOfBounds { offset: 8192, len: 4, region_len: 8192 })
        );
        assert!(!dropped.load(Ordering::Relaxed));
        drop(region);
        assert!(dropped.load(Ordering::Relaxed));
        for (at, len) in [(start, 0), (NonNull::<u8>::dangling(), 4096)] {
            // SAFETY: refused before any access.
            assert!(unsafe { SharedRegion::from_mapping(at, len, Box::new(())) }.is_err());
        }
    }

    // Goal: a file shorter than the mapping is refused instead of killing us at the first access.
    #[test]
    fn short_file_is_refused() {
        let fd = memfd(4096, MFdFlags::empty());
        let error = SharedRegion::map(&fd, 8192).expect_err("too short");
        assert_eq!(error, MemoryError::TooShort { found: 4096, expected: 8192 });
        assert!(SharedRegion::map(&fd, 0).is_err(), "an empty region is refused");
    }

    // Goal: only memory that its owner cannot shrink is accepted from a client.
    // Method: an unsealed memfd, one with another seal, one that is sealed (and then really cannot shrink), a plain file.
    #[test]
    fn client_memory_must_be_sealed() {
        let fd = memfd(4096, MFdFlags::MFD_ALLOW_SEALING);
        assert_eq!(check_sealed(fd.as_fd()), Err(MemoryError::NotSealed { found: 0 }));
        fcntl(&fd, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_GROW)).expect("seal");
        assert!(matches!(check_sealed(fd.as_fd()), Err(MemoryError::NotSealed { .. })));
        fcntl(&fd, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SHRINK)).expect("seal");
        assert_eq!(check_sealed(fd.as_fd()), Ok(()));
        assert_eq!(ftruncate(&fd, 0), Err(Errno::EPERM));
        let file = std::fs::File::open("/proc/self/exe").expect("own program");
        assert_eq!(check_sealed(file.as_fd()), Err(MemoryError::NoMemfd));
    }

    // Goal: racing copies end and every byte is one that was written.
    // Method: one thread alternates two values over a page; another copies it out and looks for any third value.
    #[test]
    fn racing_copies_yield_only_written_bytes() {
        let region = SharedRegion::map(memfd(4096, MFdFlags::empty()), 4096).expect("map");
        region.copy_in(0, &[1; 4096]).expect("inside");
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    region.copy_in(0, &[2; 4096]).expect("inside");
                    region.copy_in(0, &[1; 4096]).expect("inside");
                }
            });
            let mut copy = [0u8; 4096];
            for _ in 0..2000 {
                region.copy_out(0, &mut copy).expect("inside");
                assert!(copy.iter().all(|&byte| byte == 1 || byte == 2));
            }
            stop.store(true, Ordering::Relaxed);
        });
    }

    // Goal: a large array costs memory only where it was written.
    // Method: 64 GiB of states; a byte at either end is changed, the rest reads zero.
    #[test]
    fn atomic_bytes_are_sparse_and_zero() {
        let bytes = AtomicBytes::new(64 << 30).expect("address space");
        bytes[0].store(1, Ordering::Relaxed);
        bytes[(64 << 30) - 1].store(2, Ordering::Relaxed);
        assert_eq!(bytes[1].load(Ordering::Relaxed), 0);
        assert_eq!(bytes[32 << 30].load(Ordering::Relaxed), 0);
        assert_eq!(bytes[(64 << 30) - 1].load(Ordering::Relaxed), 2);
        assert!(AtomicBytes::new(0).is_err());
    }
}
