//! Pages of a domain that are mapped into this process.
//!
//! The domain may write to them at any moment, so there are no references to their bytes: raw copies (see
//! [`crate::memory`] for why these are defined when they race), atomics for a ring's indices, and an address for kernel
//! operations.
//!
//! Invariants: the mapping stays where it is until the value is dropped; dropping unmaps first and then lets the kernel forget
//! the grants, and holds the device open until then; a page that is mapped cannot be taken away by its domain (Xen keeps a granted
//! page while it is mapped; a memfd is sealed against shrinking), so no access faults; what is mapped for reading only is not
//! stored to.
#![allow(unsafe_code)]

use std::ptr::NonNull;
use std::sync::Arc;

use nix::errno::Errno;
use nix::sys::mman::munmap;

use super::gntdev::GntDev;
use super::{Accounts, PAGE_BYTES};
use crate::memory::{MemoryError, RingMemory, SharedRegion};

/// What we may do with mapped pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protection {
    /// Read only: a guest's write request, or an indirect page.
    ReadOnly,
    /// Read and write.
    ReadWrite,
}

/// Who has to be told after munmap.
#[derive(Debug)]
pub(super) enum Source {
    /// A mapping of grants: the device forgets the record `index`.
    Grants {
        /// The device; open as long as a mapping exists.
        device: Arc<GntDev>,
        /// The record.
        index: u64,
    },
    /// Pages of a file: nobody.
    File,
}

/// Mapped pages of one domain; unmapped when dropped.
#[derive(Debug)]
pub struct Pages {
    region: SharedRegion,
    address: usize,
    protection: Protection,
}

impl Pages {
    /// Takes a mapping over and counts it.
    ///
    /// # Errors
    /// [`MemoryError::Kernel`] for no pages, or a start that is not on one; it is unmapped then.
    ///
    /// # Safety
    /// `count` pages from `start` are one mapping (or several, side by side) with at least `protection`, that nobody else
    /// unmaps, moves or refers to, and that can be accessed without a fault while they are mapped.
    pub(super) unsafe fn from_mapping(
        start: NonNull<u8>,
        count: usize,
        protection: Protection,
        source: Source,
        accounts: Arc<Accounts>,
    ) -> Result<Pages, MemoryError> {
        accounts.maps.add(1);
        accounts.mappings.add(1);
        accounts.pages.add(count);
        let address = start.as_ptr().expose_provenance();
        let mapping = Mapping { start, count, source, accounts };
        // SAFETY: the caller's promise, kept until `mapping` is dropped, which alone unmaps; if the mapping is for reading only, `self` stores
        // nothing through the region and does not give it away.
        let region = unsafe { SharedRegion::from_mapping(start, count * PAGE_BYTES, Box::new(mapping)) }?;
        Ok(Pages { region, address, protection })
    }

    /// Number of pages.
    pub fn count(&self) -> usize {
        self.region.len() / PAGE_BYTES
    }

    /// What may be done with them.
    pub fn protection(&self) -> Protection {
        self.protection
    }

    /// Address of the first byte, for operations of the kernel; valid until the value is dropped.
    pub fn address(&self) -> usize {
        self.address
    }

    /// Bytes.
    #[allow(clippy::len_without_is_empty)] // there is at least one page
    pub fn len(&self) -> usize {
        self.region.len()
    }

    /// As [`SharedRegion::copy_out`].
    ///
    /// # Errors
    /// [`MemoryError::OutOfBounds`]; `dst` is then untouched.
    #[inline]
    pub fn copy_out(&self, offset: usize, dst: &mut [u8]) -> Result<(), MemoryError> {
        self.region.copy_out(offset, dst)
    }

    /// As [`SharedRegion::copy_in`].
    ///
    /// # Errors
    /// [`MemoryError::OutOfBounds`]; [`MemoryError::Kernel`] with EACCES when the pages are read-only; nothing is then copied.
    #[inline]
    pub fn copy_in(&self, offset: usize, src: &[u8]) -> Result<(), MemoryError> {
        self.writable()?.copy_in(offset, src)
    }

    fn writable(&self) -> Result<&SharedRegion, MemoryError> {
        match self.protection {
            Protection::ReadOnly => Err(MemoryError::Kernel {
                what: "store to pages that are mapped read-only",
                errno: Errno::EACCES,
            }),
            Protection::ReadWrite => Ok(&self.region),
        }
    }
}

/// For the ring engine.
impl RingMemory for Pages {
    #[inline]
    fn len(&self) -> usize {
        Pages::len(self)
    }

    #[inline]
    fn load(&self, offset: usize) -> Result<u32, MemoryError> {
        RingMemory::load(&self.region, offset)
    }

    #[inline]
    fn store(&self, offset: usize, value: u32) -> Result<(), MemoryError> {
        RingMemory::store(self.writable()?, offset, value)
    }

    #[inline]
    fn copy_out(&self, offset: usize, dst: &mut [u8]) -> Result<(), MemoryError> {
        Pages::copy_out(self, offset, dst)
    }

    #[inline]
    fn copy_in(&self, offset: usize, src: &[u8]) -> Result<(), MemoryError> {
        Pages::copy_in(self, offset, src)
    }
}

/// What has to be undone. The region's owner, so it is dropped after the last access.
#[derive(Debug)]
struct Mapping {
    start: NonNull<u8>,
    count: usize,
    source: Source,
    accounts: Arc<Accounts>,
}

// SAFETY: a mapping belongs to the process, not to a thread, its address is never changed, and the device's calls may come from any
// thread.
unsafe impl Send for Mapping {}
// SAFETY: nothing can be done through a shared reference.
unsafe impl Sync for Mapping {}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range was mapped when the value was made and is unmapped once, here; nobody can refer to it any more, and who
        // gave its address to the kernel keeps the pages until the operation has ended.
        let unmapped = unsafe { munmap(self.start.cast(), self.count * PAGE_BYTES) };
        let forgotten = match (&self.source, unmapped) {
            // The record of a mapping that is still there is needed by it.
            (_, Err(errno)) => Err(errno),
            (Source::Grants { device, index }, Ok(())) => device.forget(*index, self.count),
            (Source::File, Ok(())) => Ok(()),
        };
        match forgotten {
            Ok(()) => {
                self.accounts.mappings.sub(1);
                self.accounts.pages.sub(self.count);
            }
            Err(_) => self.accounts.unmap_failures.add(1),
        }
    }
}
