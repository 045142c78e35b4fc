//! Copies between pages of guests and buffers of the pool: planned one by one, made in one call.
//!
//! Invariants: a planned copy names a range of the pool, which is never unmapped; the calls that the copies are made by borrow the
//! pool exclusively, so no Rust reference covers its bytes meanwhile. That the kernel has no operation on the buffer is the planner's
//! business, as for every use of a [`Buf`]; were it otherwise the bytes would be wrong, not the memory.

use std::ptr::NonNull;

use ring_bridge::grants::{CopyStatus, Direction, Domains, Domid, GrantCopy, Gref};

use super::pool::{Buf, Pool};

/// Bytes of one granted page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Granted {
    /// The page.
    pub gref: Gref,
    /// First byte in it.
    pub offset: u16,
    /// Bytes.
    pub len: u16,
}

#[derive(Debug, Clone, Copy)]
struct Planned {
    domid: Domid,
    granted: Granted,
    direction: Direction,
    address: NonNull<u8>,
    owner: u32,
}

/// Copies that wait for their call.
#[derive(Debug, Default)]
pub struct CopyBatch {
    planned: Vec<Planned>,
    calls: Vec<GrantCopy>,
}

impl CopyBatch {
    /// Nothing is planned.
    pub fn is_empty(&self) -> bool {
        self.planned.is_empty()
    }

    /// Plans to copy bytes of a page of `domid` to or from byte `at` of a buffer. `owner` is told when it fails. False, and
    /// nothing is planned, when the buffer is too short.
    pub fn plan(
        &mut self,
        pool: &Pool,
        (buf, at): (&Buf, usize),
        domid: Domid,
        granted: Granted,
        direction: Direction,
        owner: u32,
    ) -> bool {
        let inside = at.checked_add(usize::from(granted.len)).is_some_and(|end| end <= buf.capacity());
        let address = NonNull::new((pool.address(buf) + at) as *mut u8).filter(|_| inside);
        self.planned.extend(address.map(|address| Planned { domid, granted, direction, address, owner }));
        address.is_some()
    }

    /// Makes all copies that are planned. `failed` hears of each that was refused, by its owner.
    pub fn run(&mut self, _pool: &mut Pool, domains: &mut Domains, mut failed: impl FnMut(u32)) {
        self.calls.extend(self.planned.iter().map(|planned| {
            let Planned { domid, granted: Granted { gref, offset, len }, direction, address, .. } = *planned;
            // SAFETY: the range lies in a piece of the pool (checked when it was planned), whose memory is mapped and initialised as long
            // as the pool lives; the pool is borrowed exclusively until `calls` has been cleared below, so nobody refers to it.
            unsafe { GrantCopy::new(domid, gref, offset, len, direction, address) }
        }));
        let mut done = 0;
        while done < self.calls.len() {
            done += domains.copy(&mut self.calls[done..]).max(1);
        }
        for (planned, call) in self.planned.iter().zip(&self.calls) {
            if call.status() != CopyStatus::Done {
                failed(planned.owner);
            }
        }
        self.planned.clear();
        self.calls.clear();
    }
}
