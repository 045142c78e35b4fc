//! A frontend that is not honest: everything that a guest can do to the memory that it shares with us, from a seed.
//!
//! It writes to indices, entries and indirect pages at any time, published or not. What must come of it: requests that are answered or a
//! ring that is stopped, and nothing else.

use fastrand::Rng;

use super::wire::{
    self, Abi, Decoded, ENTRIES_AT, Entry, Message, PAGE_BYTES, REQ_EVENT, REQ_PROD, REQUEST_BYTES_MAX,
    RSP_EVENT, RSP_PROD, WireSegment, entry_at, operation,
};
use crate::memory::{MemoryError, RingMemory};

/// What one blow hit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Blow {
    /// `req_prod`: the ring may have to be stopped.
    Producer,
    /// `req_event`, `rsp_prod` or `rsp_event`.
    Event,
    /// Bytes of an entry.
    Entry,
    /// Bytes of an indirect page.
    Page,
}

/// A source of hostile acts; the same seed gives the same acts.
#[derive(Debug, Clone)]
pub struct Hostile {
    rng: Rng,
}

impl Hostile {
    /// From a seed.
    pub fn new(seed: u64) -> Hostile {
        Hostile { rng: Rng::with_seed(seed) }
    }

    /// Its random numbers.
    pub fn rng(&mut self) -> &mut Rng {
        &mut self.rng
    }

    /// Hits a ring of `entries` entries somewhere.
    ///
    /// # Errors
    /// [`MemoryError::OutOfBounds`] when the memory is shorter than the ring.
    pub fn hit(&mut self, ring: &impl RingMemory, abi: Abi, entries: u32) -> Result<Blow, MemoryError> {
        match self.rng.u32(0..8) {
            0 => self.hit_producer(ring, entries),
            1 | 2 => self.hit_event(ring),
            _ => self.hit_entry(ring, abi, entries),
        }
    }

    /// Hits `req_prod`: a little ahead, a little behind, far away.
    ///
    /// # Errors
    /// As [`Hostile::hit`].
    pub fn hit_producer(&mut self, ring: &impl RingMemory, entries: u32) -> Result<Blow, MemoryError> {
        let old = ring.load(REQ_PROD)?;
        let value = match self.rng.u32(0..4) {
            0 => old.wrapping_add(self.rng.u32(1..=entries)),
            1 => old.wrapping_sub(self.rng.u32(1..=entries)),
            2 => old.wrapping_add(entries).wrapping_add(self.rng.u32(0..3)),
            _ => self.rng.u32(..),
        };
        ring.store(REQ_PROD, value)?;
        Ok(Blow::Producer)
    }

    /// Hits an index that the backend must not read, or that only tells it when to notify.
    ///
    /// # Errors
    /// As [`Hostile::hit`].
    pub fn hit_event(&mut self, ring: &impl RingMemory) -> Result<Blow, MemoryError> {
        let at = [REQ_EVENT, RSP_PROD, RSP_EVENT, 16, 60][self.rng.usize(0..5)];
        ring.store(at, self.rng.u32(..))?;
        Ok(Blow::Event)
    }

    /// Hits an entry: a bit, some bytes, or a whole request of [`Hostile::entry`].
    ///
    /// # Errors
    /// As [`Hostile::hit`].
    pub fn hit_entry(&mut self, ring: &impl RingMemory, abi: Abi, entries: u32) -> Result<Blow, MemoryError> {
        let at = entry_at(abi, entries, self.rng.u32(..));
        match self.rng.u32(0..3) {
            0 => {
                let byte = at + self.rng.usize(0..abi.entry_bytes());
                let mut value = [0];
                ring.copy_out(byte, &mut value)?;
                ring.copy_in(byte, &[value[0] ^ (1 << self.rng.u32(0..8))])?;
            }
            1 => {
                let len = self.rng.usize(1..=abi.entry_bytes());
                let bytes: [u8; REQUEST_BYTES_MAX] = std::array::from_fn(|_| self.rng.u8(..));
                ring.copy_in(at, &bytes[..len])?;
            }
            _ => ring.copy_in(at, &self.entry(abi)[..abi.entry_bytes()])?,
        }
        Ok(Blow::Entry)
    }

    /// Hits a page at `at` of some memory, as if it held segments.
    ///
    /// # Errors
    /// [`MemoryError::OutOfBounds`] when the page does not lie in the memory.
    pub fn hit_page(&mut self, memory: &impl RingMemory, at: usize) -> Result<Blow, MemoryError> {
        for _ in 0..self.rng.usize(1..8) {
            let segment = self.segment().encode();
            memory.copy_in(at + self.rng.usize(0..wire::SEGMENTS_PER_PAGE) * segment.len(), &segment)?;
        }
        if self.rng.u32(0..16) == 0 {
            let bytes: Vec<u8> = (0..PAGE_BYTES).map(|_| self.rng.u8(..)).collect();
            memory.copy_in(at, &bytes)?;
        }
        Ok(Blow::Page)
    }

    /// Hits any byte behind the header of some ring's memory.
    ///
    /// # Errors
    /// [`MemoryError::OutOfBounds`] when the memory is no longer than a ring's header.
    pub fn hit_byte(&mut self, memory: &impl RingMemory) -> Result<Blow, MemoryError> {
        let at = ENTRIES_AT + self.rng.usize(0..memory.len().saturating_sub(ENTRIES_AT).max(1));
        memory.copy_in(at, &[self.rng.u8(..)])?;
        Ok(Blow::Entry)
    }

    /// A segment, wrong as often as not.
    pub fn segment(&mut self) -> WireSegment {
        if self.rng.bool() {
            let first = self.rng.u8(0..8);
            return WireSegment { gref: self.rng.u32(0..16), first, last: self.rng.u8(first..8) };
        }
        WireSegment { gref: self.number() as u32, first: self.rng.u8(0..10), last: self.rng.u8(0..10) }
    }

    /// A request that looks like one: some may run, most are wrong in one thing or more.
    pub fn entry(&mut self, abi: Abi) -> Entry {
        let sector = self.small_or_any();
        let message = match self.rng.u32(0..5) {
            0 | 1 => Message::Direct { operation: self.rng.u8(0..4), segments: self.rng.u8(0..14), sector },
            2 => Message::Discard { flag: self.rng.u8(..), sector, sectors: self.small_or_any() },
            3 => Message::Indirect {
                operation: if self.rng.u32(0..4) > 0 { operation::WRITE } else { self.rng.u8(..) },
                segments: self.small_or_any() as u16,
                sector,
                grefs: std::array::from_fn(|_| self.small_or_any() as u32),
            },
            _ => Message::Unknown { operation: self.rng.u8(..) },
        };
        let good = self.rng.bool();
        let segments: [WireSegment; wire::SEGMENTS_MAX] = std::array::from_fn(|gref| match good {
            true => WireSegment { gref: gref as u32, first: 0, last: wire::LAST_SECTOR },
            false => self.segment(),
        });
        wire::encode(abi, &Decoded { id: self.number(), message }, &segments)
    }

    fn small_or_any(&mut self) -> u64 {
        if self.rng.u32(0..4) > 0 { self.rng.u64(0..16) * 8 } else { self.number() }
    }

    /// A number near something that might be a limit.
    fn number(&mut self) -> u64 {
        let base = match self.rng.u32(0..5) {
            0 => 0,
            1 => 1 << self.rng.u32(0..64),
            2 => u64::MAX,
            3 => u64::MAX / wire::SECTOR_BYTES,
            _ => return self.rng.u64(..),
        };
        base.wrapping_add(self.rng.u64(0..33)).wrapping_sub(16)
    }
}
