//! A correct frontend of one ring: for tests, and to make load without Xen.
//!
//! It checks of the backend what Linux's frontend checks, and what an advisory has made a rule: a response names a pending request and its
//! operation, there are no more of them than requests, and no padding carries anything. Data pages, grants and events are the caller's: grefs
//! are plain numbers here, fresh or used again as the caller likes. A disk with several queues has one of these for each.
//!
//! Invariant: `rsp_cons <= published <= req_prod <= rsp_cons + entries`, as distances of wrapping indices.

use std::sync::atomic::{Ordering, fence};

use super::request::Status;
use super::wire::{
    self, Abi, Decoded, INDIRECT_PAGES_MAX, Message, REQ_EVENT, REQ_PROD, RSP_EVENT, RSP_PROD, Response,
    WireSegment, entries, entry_at, operation,
};
use crate::memory::{MemoryError, RingMemory, SharedRegion};

/// What a backend did wrong. Linux's frontend gives its disk up after any but [`Fault::Padding`].
#[derive(Debug, thiserror::Error, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// A response to nothing: the id was never used, or its request has been answered.
    #[error("a response to request {id:#x}, which is not pending")]
    NotPending {
        /// Of the response.
        id: u64,
    },
    /// A response with the wrong operation.
    #[error("a response to request {id:#x} of operation {expected} has operation {found}")]
    WrongOperation {
        /// Of the response.
        id: u64,
        /// Of the request; of an indirect one, the inner.
        expected: u8,
        /// Of the response.
        found: u8,
    },
    /// More responses than requests.
    #[error("rsp_prod is {rsp_prod}, {pending} requests behind {rsp_cons} are not answered")]
    Overrun {
        /// The backend's index.
        rsp_prod: u32,
        /// Ours.
        rsp_cons: u32,
        /// Requests that were published and not answered.
        pending: u32,
    },
    /// Padding of a response that is not zero: a leak of the backend's memory.
    #[error("response {index} carries something in its padding: {bytes:02x?}")]
    Padding {
        /// Ring index.
        index: u32,
        /// Its bytes.
        bytes: [u8; wire::RESPONSE_BYTES_MAX],
    },
    /// A status that the protocol does not know.
    #[error("the response to request {id:#x} has status {found}")]
    UnknownStatus {
        /// Of the response.
        id: u64,
        /// Its status.
        found: i16,
    },
    /// The ring's memory is shorter than the ring: a defect of the caller.
    #[error(transparent)]
    Memory(#[from] MemoryError),
}

/// An answered request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Completion {
    /// As [`Frontend::submit`] has returned it.
    pub index: u16,
    /// How it ended.
    pub status: Status,
}

/// The frontend's side of one ring.
#[derive(Debug)]
pub struct Frontend<R = SharedRegion> {
    ring: R,
    abi: Abi,
    entries: u32,
    req_prod: u32,
    published: u32,
    rsp_cons: u32,
    /// Operations that the responses have to name; `None`: free.
    pending: Box<[Option<u8>]>,
    free: Vec<u16>,
    salt: u64,
}

impl<R: RingMemory> Frontend<R> {
    /// Makes a ring of `pages` pages (a power of two up to 16) whose indices begin at `index` (0 in real life).
    ///
    /// # Errors
    /// [`Fault::Memory`] when the memory is too short, or no ring has so many pages.
    pub fn create(ring: R, abi: Abi, pages: u32, index: u32) -> Result<Frontend<R>, Fault> {
        let (len, region_len) = (pages as usize * wire::PAGE_BYTES, ring.len());
        let short = MemoryError::OutOfBounds { offset: 0, len, region_len };
        let entries = entries(pages).filter(|_| len <= region_len).ok_or(short)?;
        let next = index.wrapping_add(1);
        for (at, value) in [(REQ_PROD, index), (REQ_EVENT, next), (RSP_PROD, index), (RSP_EVENT, next)] {
            ring.store(at, value)?;
        }
        Ok(Frontend {
            ring,
            abi,
            entries,
            req_prod: index,
            published: index,
            rsp_cons: index,
            pending: vec![None; entries as usize].into(),
            free: (0..entries as u16).rev().collect(),
            salt: 0,
        })
    }

    /// Ids are the index xor `salt` from now on: Linux's are below the number of entries, others' are pointers. Only while nothing is pending.
    pub fn set_salt(&mut self, salt: u64) {
        if self.pending() == 0 {
            self.salt = salt;
        }
    }

    /// Requests that can be submitted now.
    pub fn free(&self) -> usize {
        self.free.len()
    }

    /// The index that the next request will have.
    pub fn next_index(&self) -> Option<u16> {
        self.free.last().copied()
    }

    /// Requests submitted and not answered.
    pub fn pending(&self) -> usize {
        self.entries as usize - self.free.len()
    }

    /// Writes a request to the ring; the backend sees it after [`Frontend::publish`]. Returns its index, by which it completes; `None` when
    /// the ring is full.
    ///
    /// # Errors
    /// [`Fault::Memory`].
    pub fn submit(&mut self, message: Message, segments: &[WireSegment]) -> Result<Option<u16>, Fault> {
        let Some(index) = self.free.pop() else { return Ok(None) };
        let request = Decoded { id: u64::from(index) ^ self.salt, message };
        let entry = wire::encode(self.abi, &request, segments);
        let at = entry_at(self.abi, self.entries, self.req_prod);
        self.ring.copy_in(at, &entry[..self.abi.entry_bytes()])?;
        self.req_prod = self.req_prod.wrapping_add(1);
        self.pending[usize::from(index)] = Some(message.response_operation());
        Ok(Some(index))
    }

    /// Publishes what was submitted. True: notify the backend.
    ///
    /// # Errors
    /// [`Fault::Memory`].
    pub fn publish(&mut self) -> Result<bool, Fault> {
        let (old, new) = (self.published, self.req_prod);
        self.ring.store(REQ_PROD, new)?;
        fence(Ordering::SeqCst); // between the store of req_prod and the load of req_event
        self.published = new;
        let req_event = self.ring.load(REQ_EVENT)?;
        Ok(new.wrapping_sub(req_event) < new.wrapping_sub(old))
    }

    /// Takes the responses that have come and appends them to `out`.
    ///
    /// # Errors
    /// The backend's [`Fault`]; nothing should be done with the ring afterwards.
    pub fn poll(&mut self, out: &mut Vec<Completion>) -> Result<(), Fault> {
        let rsp_prod = self.ring.load(RSP_PROD)?;
        let pending = self.published.wrapping_sub(self.rsp_cons);
        if rsp_prod.wrapping_sub(self.rsp_cons) > pending {
            return Err(Fault::Overrun { rsp_prod, rsp_cons: self.rsp_cons, pending });
        }
        while self.rsp_cons != rsp_prod {
            let mut bytes = [0; wire::RESPONSE_BYTES_MAX];
            let at = entry_at(self.abi, self.entries, self.rsp_cons);
            self.ring.copy_out(at, &mut bytes[..self.abi.response_bytes()])?;
            let response = Response::decode(bytes).ok_or(Fault::Padding { index: self.rsp_cons, bytes })?;
            out.push(self.complete(response)?);
            self.rsp_cons = self.rsp_cons.wrapping_add(1);
        }
        Ok(())
    }

    fn complete(&mut self, response: Response) -> Result<Completion, Fault> {
        let Response { id, operation: found, status } = response;
        let index = u16::try_from(id ^ self.salt).map_err(|_| Fault::NotPending { id })?;
        let pending = self.pending.get_mut(usize::from(index)).ok_or(Fault::NotPending { id })?;
        let expected = pending.take().ok_or(Fault::NotPending { id })?;
        if expected != found {
            return Err(Fault::WrongOperation { id, expected, found });
        }
        let known = Status::from_wire(status);
        if known.to_wire() != status {
            return Err(Fault::UnknownStatus { id, found: status });
        }
        self.free.push(index);
        Ok(Completion { index, status: known })
    }

    /// Before waiting for an event: asks for one when `batch` more responses have come (1 at least), then looks again. True: do
    /// not wait, poll.
    ///
    /// # Errors
    /// [`Fault::Memory`].
    pub fn sleep(&mut self, batch: u32) -> Result<bool, Fault> {
        self.ring.store(RSP_EVENT, self.rsp_cons.wrapping_add(batch.max(1)))?;
        fence(Ordering::SeqCst); // between the store of rsp_event and the load of rsp_prod
        Ok(self.ring.load(RSP_PROD)? != self.rsp_cons)
    }

    /// The ring's memory.
    pub fn memory(&self) -> &R {
        &self.ring
    }

    /// Layout of the ring.
    pub fn abi(&self) -> Abi {
        self.abi
    }

    /// Entries of the ring.
    pub fn entries(&self) -> u32 {
        self.entries
    }
}

/// A read with its segments in the request.
pub fn read(sector: u64, segments: &[WireSegment]) -> Message {
    direct(operation::READ, sector, segments)
}

/// A write with its segments in the request.
pub fn write(sector: u64, segments: &[WireSegment]) -> Message {
    direct(operation::WRITE, sector, segments)
}

/// A flush; with segments, a write follows.
pub fn flush(sector: u64, segments: &[WireSegment]) -> Message {
    direct(operation::FLUSH_DISKCACHE, sector, segments)
}

/// A barrier, with or without data.
pub fn barrier(sector: u64, segments: &[WireSegment]) -> Message {
    direct(operation::WRITE_BARRIER, sector, segments)
}

/// A direct request of any operation.
pub fn direct(operation: u8, sector: u64, segments: &[WireSegment]) -> Message {
    Message::Direct { operation, segments: segments.len().min(usize::from(u8::MAX)) as u8, sector }
}

/// A discard.
pub fn discard(sector: u64, sectors: u64, secure: bool) -> Message {
    Message::Discard { flag: u8::from(secure) * wire::DISCARD_SECURE, sector, sectors }
}

/// A read or write of `segments` segments that lie in the pages `grefs`, packed ([`pack`]), 512 in each.
pub fn indirect(write: bool, sector: u64, segments: u16, grefs: &[u32]) -> Message {
    let mut pages = [0; INDIRECT_PAGES_MAX];
    for (page, gref) in pages.iter_mut().zip(grefs) {
        *page = *gref;
    }
    let operation = if write { operation::WRITE } else { operation::READ };
    Message::Indirect { operation, segments, sector, grefs: pages }
}

/// The bytes of indirect segments, as they lie in their pages.
pub fn pack(segments: &[WireSegment]) -> Vec<u8> {
    segments.iter().flat_map(|segment| segment.encode()).collect()
}
