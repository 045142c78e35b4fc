//! One segment of a copy between a domain's page and our own memory.
#![allow(unsafe_code)]

use std::ptr::NonNull;

use super::{Domid, GrantFault, Gref, PAGE_BYTES};

/// Which way bytes go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// From the domain's page to our buffer (a guest's write).
    FromDomain,
    /// From our buffer to the domain's page (a guest's read).
    ToDomain,
}

/// How far a segment is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CopyStatus {
    /// Not tried.
    Pending,
    /// The bytes have been copied.
    Done,
    /// They have not, or not all.
    Failed(GrantFault),
}

/// A segment: bytes of one page of one domain, and our buffer for them.
#[derive(Debug)]
pub struct GrantCopy {
    pub(super) domid: Domid,
    pub(super) gref: Gref,
    pub(super) offset: u16,
    pub(super) len: u16,
    pub(super) direction: Direction,
    pub(super) local: NonNull<u8>,
    pub(super) status: CopyStatus,
}

impl GrantCopy {
    /// `len` bytes from `offset` of the page `gref` of `domid`. A range that is not inside a page (or is empty) becomes a failed
    /// segment, not an error here. `local` had better not cross a page boundary: the hypervisor makes two operations of such a
    /// segment.
    ///
    /// # Safety
    /// From now until this value has been used in [`super::Domains::copy`] for the last time or was dropped, `local` is the
    /// start of `len` initialised bytes of private memory, writable if they come from the domain, that nobody else accesses
    /// and no Rust reference covers during the call.
    pub unsafe fn new(
        domid: Domid,
        gref: Gref,
        offset: u16,
        len: u16,
        direction: Direction,
        local: NonNull<u8>,
    ) -> GrantCopy {
        GrantCopy { domid, gref, offset, len, direction, local, status: CopyStatus::Pending }
    }

    /// How far it is.
    pub fn status(&self) -> CopyStatus {
        self.status
    }

    /// Whether the range is one of a page.
    pub(super) fn is_in_page(&self) -> bool {
        self.len > 0 && usize::from(self.offset) + usize::from(self.len) <= PAGE_BYTES
    }

    /// Whether the local buffer crosses a page.
    pub(super) fn is_split(&self) -> bool {
        self.local.as_ptr().addr() % PAGE_BYTES + usize::from(self.len) > PAGE_BYTES
    }
}
