//! What the tests of blkif share: memory that two sides map, a guest's pages, a disk of bytes, and a server that runs what the engine hands out.
#![allow(dead_code)] // each test file uses a part

use std::os::fd::OwnedFd;

use fastrand::Rng;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::unistd::ftruncate;
use ring_bridge::blkif::inflight::{Identity, table_bytes};
use ring_bridge::blkif::request::{Limits, Operation, Reason, Segment, Status};
use ring_bridge::blkif::ring::{Fetch, Request, Ring, RingError, Taken};
use ring_bridge::blkif::wire::{Abi, PAGE_BYTES, entries};
use ring_bridge::memory::{RingMemory, SharedRegion};

/// Two mappings of the same new memory.
pub fn shared(bytes: usize) -> (SharedRegion, SharedRegion) {
    let fd: OwnedFd = memfd_create(c"blkif-test", MFdFlags::MFD_CLOEXEC).expect("memfd_create");
    ftruncate(&fd, bytes as i64).expect("ftruncate");
    (SharedRegion::map(&fd, bytes).expect("map"), SharedRegion::map(&fd, bytes).expect("map"))
}

/// New memory for a table.
pub fn table(pages: u32, segments_max: u16) -> SharedRegion {
    shared(table_bytes(entries(pages).expect("pages"), segments_max)).0
}

pub fn identity(abi: Abi, pages: u32, segments_max: u16) -> Identity {
    Identity { domid: 7, devid: 51712, queue: 0, abi, pages, grefs: [0; 16], port: 9, segments_max }
}

/// Everything offered, 512-byte blocks.
pub fn limits(sectors: u64) -> Limits {
    Limits {
        sectors,
        block_bytes: 512,
        read_only: false,
        flush: true,
        barrier: true,
        discard: true,
        secure_discard: true,
        indirect_segments_max: 256,
    }
}

/// A guest's memory; a gref is the number of a page.
pub struct Pages(pub Vec<u8>);

impl Pages {
    pub fn new(pages: usize) -> Pages {
        Pages(vec![0; pages * PAGE_BYTES])
    }

    /// The bytes of a page that `segment` names, if there is such a page.
    pub fn piece(&mut self, segment: &Segment) -> Option<&mut [u8]> {
        let at = segment.gref as usize * PAGE_BYTES + usize::from(segment.offset);
        self.0.get_mut(at..at + usize::from(segment.len))
    }

    /// The bytes of an indirect request's pages, if they exist.
    pub fn fetch(&self, fetch: &Fetch) -> Option<Vec<u8>> {
        let mut bytes = Vec::new();
        for (gref, len) in fetch.pieces() {
            let at = gref as usize * PAGE_BYTES;
            bytes.extend_from_slice(self.0.get(at..at + len)?);
        }
        Some(bytes)
    }

    /// Writes an indirect page's bytes, packed from `gref` on.
    pub fn store(&mut self, gref: u32, bytes: &[u8]) {
        let at = gref as usize * PAGE_BYTES;
        self.0[at..at + bytes.len()].copy_from_slice(bytes);
    }
}

/// Runs a request on a disk of bytes.
pub fn execute(disk: &mut [u8], pages: &mut Pages, request: &Request, segments: &[Segment]) -> Status {
    let body = request.body;
    let mut at = body.offset_bytes() as usize;
    let end = at + body.len_bytes() as usize;
    assert!(end <= disk.len(), "the engine let a request pass the end of the disk");
    if let Operation::Discard { .. } = body.operation {
        disk[at..end].fill(0);
        return Status::Okay;
    }
    assert_eq!(segments.len(), usize::from(body.segments));
    assert_eq!(segments.iter().map(|segment| u64::from(segment.len)).sum::<u64>(), body.len_bytes());
    for segment in segments {
        assert!(segment.len > 0 && segment.offset + segment.len <= 4096);
        let Some(page) = pages.piece(segment) else { return Status::Error };
        let sectors = &mut disk[at..at + page.len()];
        match body.operation {
            Operation::Read => page.copy_from_slice(sectors),
            _ => sectors.copy_from_slice(page),
        }
        at += usize::from(segment.len);
    }
    Status::Okay
}

/// What runs behind a ring: requests handed out, answered in any order.
#[derive(Default)]
pub struct Server {
    pub running: Vec<Request>,
    taken: Vec<Taken>,
    segments: Vec<Segment>,
}

impl Server {
    /// Takes requests, fetches segments.
    pub fn take<R: RingMemory, T: RingMemory>(
        &mut self,
        ring: &mut Ring<R, T>,
        pages: &mut Pages,
        budget: usize,
    ) -> Result<usize, RingError> {
        self.taken.clear();
        let done = ring.consume(budget, &mut self.taken)?;
        for taken in &self.taken {
            match taken {
                Taken::Run(request) => self.running.push(*request),
                Taken::Fetch(fetch) => match pages.fetch(fetch) {
                    Some(bytes) => self.running.extend(ring.supply(fetch.token, &bytes)?),
                    None => ring.refuse(fetch.token, Reason::IndirectPage)?,
                },
            }
        }
        assert!(ring.in_flight() <= ring.entries());
        Ok(done)
    }

    /// Runs and answers one request, chosen at random. False: there is none.
    pub fn answer<R: RingMemory, T: RingMemory>(
        &mut self,
        ring: &mut Ring<R, T>,
        disk: &mut [u8],
        pages: &mut Pages,
        rng: &mut Rng,
    ) -> Result<bool, RingError> {
        if self.running.is_empty() {
            return Ok(false);
        }
        let request = self.running.swap_remove(rng.usize(0..self.running.len()));
        ring.segments(request.token, &mut self.segments)?;
        let status = execute(disk, pages, &request, &self.segments);
        ring.answer(request.token, status)?;
        Ok(true)
    }

    /// A turn: takes, answers some, publishes. True: the frontend is to be notified.
    pub fn turn<R: RingMemory, T: RingMemory>(
        &mut self,
        ring: &mut Ring<R, T>,
        disk: &mut [u8],
        pages: &mut Pages,
        rng: &mut Rng,
    ) -> Result<bool, RingError> {
        self.take(ring, pages, rng.usize(1..70))?;
        for _ in 0..rng.usize(0..20) {
            self.answer(ring, disk, pages, rng)?;
        }
        ring.push()
    }
}
