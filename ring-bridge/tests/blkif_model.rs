//! Goal: whatever the options, an honest frontend gets exactly the disk that it expects. Method: frontend and engine over one memory, random options
//! and requests from seeds; a byte model of the disk; the frontend checks every response as Linux's does.

mod blkif_rig;

use blkif_rig::{Pages, Server, identity, limits, shared, table};
use fastrand::Rng;
use ring_bridge::blkif::frontend::{self, Completion, Frontend};
use ring_bridge::blkif::request::{Limits, Status};
use ring_bridge::blkif::ring::Ring;
use ring_bridge::blkif::wire::{Abi, Message, SEGMENTS_PER_PAGE, WireSegment, entries};
use ring_bridge::memory::SharedRegion;

const SECTORS: u64 = 4096;
/// Pages of the guest; the last ones are for indirect segments.
const DATA_PAGES: u32 = 900;
const INDIRECT_PAGES: u32 = 2 * 32;

/// What the frontend expects of a request.
#[derive(Clone)]
enum Expected {
    Read {
        sector: u64,
        segments: Vec<WireSegment>,
    },
    Write {
        sector: u64,
        data: Vec<u8>,
    },
    Discard {
        sector: u64,
        sectors: u64,
    },
    Nothing,
    /// Refused with this.
    Refused(Status),
}

struct Pending {
    expected: Expected,
    range: (u64, u64),
    pages: Vec<u32>,
    indirect: Vec<u32>,
}

struct Guest<'a> {
    front: Frontend<&'a SharedRegion>,
    limits: Limits,
    pages: Pages,
    free_pages: Vec<u32>,
    free_indirect: Vec<u32>,
    pending: Vec<Option<Pending>>,
    model: Vec<u8>,
    rng: Rng,
    answered: usize,
    persistent: bool,
}

impl Guest<'_> {
    /// A range on the disk that nothing pending touches.
    fn range(&mut self, sectors_max: u64) -> Option<(u64, u64)> {
        let block = u64::from(self.limits.block_bytes) / 512;
        let sectors = self.rng.u64(1..=(sectors_max / block).max(1)) * block;
        let sector = self.rng.u64(0..=(self.limits.sectors - sectors) / block) * block;
        let free =
            self.pending.iter().flatten().all(|p| p.range.1 <= sector || p.range.0 >= sector + sectors);
        free.then_some((sector, sector + sectors))
    }

    /// Pages for `sectors` sectors, cut at random (on blocks).
    fn segments(&mut self, sectors: u64, max: usize) -> Option<Vec<WireSegment>> {
        let mut left = sectors;
        let mut segments = Vec::new();
        while left > 0 {
            let len = if self.limits.block_bytes == 4096 { 8 } else { self.rng.u64(1..=8.min(left)) as u8 };
            let first = self.rng.u8(0..=8 - len);
            left -= u64::from(len);
            segments.push(WireSegment { gref: 0, first, last: first + len - 1 });
        }
        if segments.len() > max || segments.len() > self.free_pages.len() {
            return None;
        }
        for segment in &mut segments {
            // Persistent grants: the same pages again and again; fresh ones: any.
            let at = if self.persistent {
                self.free_pages.len() - 1
            } else {
                self.rng.usize(0..self.free_pages.len())
            };
            segment.gref = self.free_pages.swap_remove(at);
        }
        Some(segments)
    }

    fn data(&mut self, segments: &[WireSegment]) -> Vec<u8> {
        let mut data = Vec::new();
        for segment in segments {
            let at = segment.gref as usize * 4096 + usize::from(segment.first) * 512;
            let end = segment.gref as usize * 4096 + (usize::from(segment.last) + 1) * 512;
            self.pages.0[at..end].chunks_mut(512).for_each(|sector| sector.fill(self.rng.u8(..)));
            data.extend_from_slice(&self.pages.0[at..end]);
        }
        data
    }

    fn read_pages(&self, segments: &[WireSegment]) -> Vec<u8> {
        let mut data = Vec::new();
        for segment in segments {
            let page = segment.gref as usize * 4096;
            let (first, end) = (usize::from(segment.first), usize::from(segment.last) + 1);
            data.extend_from_slice(&self.pages.0[page + first * 512..page + end * 512]);
        }
        data
    }

    fn submit(&mut self, message: Message, segments: &[WireSegment], pending: Pending) {
        match self.front.submit(message, segments).expect("inside") {
            Some(index) => self.pending[usize::from(index)] = Some(pending),
            None => self.give_back(pending),
        }
    }

    fn give_back(&mut self, pending: Pending) {
        self.free_pages.extend(pending.pages);
        self.free_indirect.extend(pending.indirect);
    }

    /// Submits a random request.
    fn ask(&mut self) {
        if self.front.free() == 0 {
            return;
        }
        match self.rng.u32(0..20) {
            0 => self.ask_wrong(),
            1 => self.ask_discard(),
            2 => {
                let message =
                    if self.rng.bool() { frontend::flush(u64::MAX, &[]) } else { frontend::barrier(7, &[]) };
                let offered = if matches!(message, Message::Direct { operation: 3, .. }) {
                    self.limits.flush
                } else {
                    self.limits.barrier
                };
                let expected =
                    if offered { Expected::Nothing } else { Expected::Refused(Status::NotSupported) };
                self.submit(
                    message,
                    &[],
                    Pending { expected, range: (0, 0), pages: vec![], indirect: vec![] },
                );
            }
            _ => self.ask_transfer(),
        }
    }

    fn ask_discard(&mut self) {
        let Some(range) = self.range(SECTORS) else { return };
        let secure = self.rng.bool();
        let (sector, sectors) = (range.0, range.1 - range.0);
        let expected = if !self.limits.discard || (secure && !self.limits.secure_discard) {
            Expected::Refused(Status::NotSupported)
        } else if self.limits.read_only {
            Expected::Refused(Status::Error)
        } else {
            Expected::Discard { sector, sectors }
        };
        let pending = Pending { expected, range, pages: vec![], indirect: vec![] };
        self.submit(frontend::discard(sector, sectors, secure), &[], pending);
    }

    fn ask_transfer(&mut self) {
        let indirect = self.limits.indirect_segments_max > 0 && self.rng.u32(0..4) == 0;
        let segments_max =
            if indirect { usize::from(self.limits.indirect_segments_max).min(600) } else { 11 };
        let sectors_max = if indirect { 4 * segments_max as u64 } else { 60 };
        let Some(range) = self.range(sectors_max.min(self.limits.sectors)) else { return };
        let Some(segments) = self.segments(range.1 - range.0, segments_max) else { return };
        let pages: Vec<u32> = segments.iter().map(|s| s.gref).collect();
        let read = self.rng.bool();
        let mut operation = u8::from(!read);
        if !read && !indirect && self.rng.u32(0..8) == 0 {
            operation = self.rng.u8(2..=3);
        }
        let offered = match operation {
            2 => self.limits.barrier,
            3 => self.limits.flush,
            _ => true,
        };
        let expected = if !offered {
            Expected::Refused(Status::NotSupported)
        } else if read {
            Expected::Read { sector: range.0, segments: segments.clone() }
        } else if self.limits.read_only {
            Expected::Refused(Status::Error)
        } else {
            Expected::Write { sector: range.0, data: self.data(&segments) }
        };
        if !indirect {
            let pending = Pending { expected, range, pages, indirect: vec![] };
            self.submit(frontend::direct(operation, range.0, &segments), &segments, pending);
            return;
        }
        let count = segments.len().div_ceil(SEGMENTS_PER_PAGE);
        if self.free_indirect.len() < count {
            self.free_pages.extend(pages);
            return;
        }
        let grefs = self.free_indirect.split_off(self.free_indirect.len() - count);
        for (gref, part) in grefs.iter().zip(segments.chunks(SEGMENTS_PER_PAGE)) {
            self.pages.store(*gref, &frontend::pack(part));
        }
        let message = frontend::indirect(!read, range.0, segments.len() as u16, &grefs);
        self.submit(message, &[], Pending { expected, range, pages, indirect: grefs });
    }

    /// A request that a frontend with a defect makes: answered, and nothing else.
    fn ask_wrong(&mut self) {
        let segment = WireSegment { gref: 0, first: 0, last: 7 };
        let end = self.limits.sectors;
        let (message, segments, status) = match self.rng.u32(0..7) {
            0 => (frontend::read(0, &[]), vec![], Status::Error),
            1 => (frontend::read(end, &[segment]), vec![segment], Status::Error),
            2 => (frontend::write(u64::MAX - 3, &[segment]), vec![segment], Status::Error),
            3 => {
                let twisted = WireSegment { first: 3, last: 2, ..segment };
                (frontend::read(0, &[twisted]), vec![twisted], Status::Error)
            }
            4 => (Message::Unknown { operation: self.rng.u8(7..) }, vec![], Status::NotSupported),
            5 => {
                (Message::Direct { operation: 0, segments: 12, sector: 0 }, vec![segment; 11], Status::Error)
            }
            _ => {
                let max = self.limits.indirect_segments_max;
                let status = if max == 0 { Status::NotSupported } else { Status::Error };
                (frontend::indirect(false, 0, max.saturating_add(1), &[0]), vec![], status)
            }
        };
        let pending =
            Pending { expected: Expected::Refused(status), range: (0, 0), pages: vec![], indirect: vec![] };
        self.submit(message, &segments, pending);
    }

    fn complete(&mut self, completion: Completion) {
        let pending = self.pending[usize::from(completion.index)].take().expect("pending");
        self.answered += 1;
        let okay = match &pending.expected {
            Expected::Refused(status) => *status,
            _ => Status::Okay,
        };
        assert_eq!(completion.status, okay);
        match &pending.expected {
            Expected::Read { sector, segments } => {
                let data = self.read_pages(segments);
                let at = *sector as usize * 512;
                assert_eq!(data, self.model[at..at + data.len()], "read of sector {sector}");
            }
            Expected::Write { sector, data } => {
                let at = *sector as usize * 512;
                self.model[at..at + data.len()].copy_from_slice(data);
            }
            Expected::Discard { sector, sectors } => {
                let at = *sector as usize * 512;
                self.model[at..at + *sectors as usize * 512].fill(0);
            }
            Expected::Nothing | Expected::Refused(_) => {}
        }
        self.give_back(pending);
    }
}

/// One run; returns the number of answered requests.
fn run(seed: u64, pages: Pages) -> (usize, Pages) {
    let mut rng = Rng::with_seed(seed);
    let abi = if rng.bool() { Abi::X86_64 } else { Abi::X86_32 };
    let ring_pages = 1 << rng.u32(0..5);
    let index = if rng.bool() { rng.u32(..) } else { u32::MAX - rng.u32(0..600) };
    let limits = Limits {
        block_bytes: if rng.bool() { 512 } else { 4096 },
        read_only: rng.u32(0..8) == 0,
        flush: rng.u32(0..4) > 0,
        barrier: rng.u32(0..4) > 0,
        discard: rng.u32(0..4) > 0,
        secure_discard: rng.bool(),
        indirect_segments_max: [0, 1, 16, 32, 256, 600, 4096][rng.usize(0..7)],
        ..limits(SECTORS)
    };
    let entries = entries(ring_pages).expect("pages");
    let (theirs, ours) = shared(ring_pages as usize * 4096);
    let mut front = Frontend::create(&theirs, abi, ring_pages, index).expect("ring");
    front.set_salt(if rng.bool() { 0 } else { rng.u64(..) });
    let room = limits.indirect_segments_max;
    let table = table(ring_pages, room);
    let mut ring = Ring::attach(ours, table, identity(abi, ring_pages, room), limits).expect("attach");
    let mut disk = vec![0; SECTORS as usize * 512];
    let mut guest = Guest {
        front,
        limits,
        pages,
        free_pages: (0..DATA_PAGES).collect(),
        free_indirect: (DATA_PAGES..DATA_PAGES + INDIRECT_PAGES).collect(),
        pending: (0..entries).map(|_| None).collect(),
        model: disk.clone(),
        rng: rng.fork(),
        answered: 0,
        persistent: rng.bool(),
    };
    let mut server = Server::default();
    let mut completions = Vec::new();
    for step in 0..200 {
        if step < 100 {
            for _ in 0..rng.usize(0..20) {
                guest.ask();
            }
            guest.front.publish().expect("publish");
        }
        server.turn(&mut ring, &mut disk, &mut guest.pages, &mut rng).expect("an honest frontend");
        if rng.bool() {
            guest.front.poll(&mut completions).expect("an honest backend");
            completions.drain(..).for_each(|completion| guest.complete(completion));
        }
        if step >= 100 && ring.in_flight() == 0 && guest.front.pending() == 0 {
            break;
        }
    }
    while guest.front.pending() > 0 {
        assert!(ring.in_flight() > 0 || ring.sleep(1).expect("sleep"), "requests are lost, seed {seed}");
        while server.take(&mut ring, &mut guest.pages, 600).expect("take") > 0 {}
        while server.answer(&mut ring, &mut disk, &mut guest.pages, &mut rng).expect("answer") {}
        ring.push().expect("push");
        guest.front.poll(&mut completions).expect("an honest backend");
        completions.drain(..).for_each(|completion| guest.complete(completion));
    }
    assert_eq!(disk, guest.model, "seed {seed}");
    assert!(!ring.sleep(1).expect("sleep"));
    (guest.answered, guest.pages)
}

#[test]
fn an_honest_frontend_gets_its_disk() {
    let seeds = std::env::var("BLKIF_MODEL_SEEDS").ok().and_then(|s| s.parse().ok()).unwrap_or(2000);
    let mut answered = 0;
    let mut pages = Pages::new((DATA_PAGES + INDIRECT_PAGES) as usize);
    for seed in 0..seeds {
        let (more, back) = run(seed, pages);
        (answered, pages) = (answered + more, back);
    }
    println!("{answered} requests");
    assert!(answered as u64 > 100 * seeds, "only {answered} requests: the test lost its force");
}
