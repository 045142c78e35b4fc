//! Goal: what has gone wrong in other backends (Xen's security advisories, as far as they concern the ring) does not go wrong here.
//! Method: one named test each, over memory that does at the worst moment what a hostile guest would.

mod blkif_rig;

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use blkif_rig::{Pages, Server, identity, limits, shared, table};
use fastrand::Rng;
use ring_bridge::blkif::frontend::{self, Frontend};
use ring_bridge::blkif::request::{Limits, Operation, Reason, Segment, Status};
use ring_bridge::blkif::ring::{Fetch, Ring, RingError, StopReason, Taken, Token};
use ring_bridge::blkif::wire::{Abi, Message, REQ_PROD, RSP_EVENT, RSP_PROD, WireSegment, entry_at};
use ring_bridge::memory::{MemoryError, RingMemory, SharedRegion};

const ABIS: [Abi; 2] = [Abi::X86_64, Abi::X86_32];
const PAGE: WireSegment = WireSegment { gref: 3, first: 0, last: 7 };

/// A ring of one page with everything offered on 1000 sectors.
fn ring(abi: Abi, change: fn(&mut Limits)) -> (Frontend, Ring) {
    let (theirs, ours) = shared(4096);
    let front = Frontend::create(theirs, abi, 1, u32::MAX - 1).expect("ring");
    let mut limits = limits(1000);
    change(&mut limits);
    let ring = Ring::attach(ours, table(1, 256), identity(abi, 1, 256), limits).expect("attach");
    (front, ring)
}

fn consume<R: RingMemory>(ring: &mut Ring<R>) -> Vec<Taken> {
    let mut taken = Vec::new();
    ring.consume(100, &mut taken).expect("honest indices");
    taken
}

fn token(taken: &Taken) -> Token {
    match taken {
        Taken::Run(request) => request.token,
        Taken::Fetch(fetch) => fetch.token,
    }
}

fn fetch(taken: &[Taken]) -> Fetch {
    match taken {
        [Taken::Fetch(fetch)] => *fetch,
        other => panic!("one request to fetch for, not {other:?}"),
    }
}

fn answers(front: &mut Frontend, ring: &mut Ring) -> Vec<Status> {
    ring.push().expect("push");
    let mut completions = Vec::new();
    front.poll(&mut completions).expect("an honest backend");
    completions.into_iter().map(|completion| completion.status).collect()
}

/// A ring whose entries change as soon as they have been read: everything becomes a write of 11 segments somewhere else.
struct Changing {
    memory: SharedRegion,
    reads: RefCell<Vec<(usize, usize)>>,
}

impl RingMemory for Changing {
    fn len(&self) -> usize {
        self.memory.len()
    }
    fn load(&self, offset: usize) -> Result<u32, MemoryError> {
        self.memory.load(offset)
    }
    fn store(&self, offset: usize, value: u32) -> Result<(), MemoryError> {
        self.memory.store(offset, value)
    }
    fn copy_out(&self, offset: usize, dst: &mut [u8]) -> Result<(), MemoryError> {
        self.memory.copy_out(offset, dst)?;
        self.reads.borrow_mut().push((offset, dst.len()));
        self.memory.copy_in(offset, &vec![0x41; dst.len()])?;
        self.memory.copy_in(offset, &[1, 11])
    }
    fn copy_in(&self, offset: usize, src: &[u8]) -> Result<(), MemoryError> {
        self.memory.copy_in(offset, src)
    }
}

// CVE-2015-8550: requests were read twice, and changed between the check and the use.
#[test]
fn xsa_155_a_request_is_fetched_once() {
    for abi in ABIS {
        let (theirs, ours) = shared(4096);
        let mut front = Frontend::create(theirs, abi, 1, 0).expect("ring");
        let ours = Rc::new(Changing { memory: ours, reads: RefCell::default() });
        let identity = identity(abi, 1, 256);
        let mut ring = Ring::attach(ours.clone(), table(1, 256), identity, limits(1000)).expect("attach");
        let two = [PAGE, WireSegment { gref: 4, first: 1, last: 2 }];
        front.submit(frontend::read(10, &two), &two).expect("inside");
        front.publish().expect("publish");
        let taken = consume(&mut ring);
        assert_eq!(
            *ours.reads.borrow(),
            [(entry_at(abi, 32, 0), abi.entry_bytes())],
            "one read of one entry"
        );
        let [Taken::Run(request)] = taken[..] else { panic!("{taken:?}") };
        assert_eq!(
            (request.body.operation, request.body.sector, request.body.sectors),
            (Operation::Read, 10, 10)
        );
        let mut segments = Vec::new();
        ring.segments(request.token, &mut segments).expect("running");
        let expected =
            [Segment { gref: 3, offset: 0, len: 4096 }, Segment { gref: 4, offset: 512, len: 1024 }];
        assert_eq!(segments, expected);
        // The id and the operation of the response come from the copy as well.
        ring.answer(request.token, Status::Okay).expect("running");
        ring.push().expect("push");
        let mut completions = Vec::new();
        front.poll(&mut completions).expect("an honest backend");
        assert_eq!(completions.len(), 1);
    }
}

// The same for the pages of indirect requests: what was checked is what is used.
#[test]
fn xsa_155_indirect_segments_are_fetched_once() {
    let (mut front, mut ring) = ring(Abi::X86_64, |_| ());
    let segments: Vec<WireSegment> = (0..100).map(|gref| WireSegment { gref, first: 0, last: 0 }).collect();
    front.submit(frontend::indirect(true, 5, 100, &[77]), &[]).expect("inside");
    front.publish().expect("publish");
    let fetch = fetch(&consume(&mut ring));
    assert_eq!(fetch.pieces().collect::<Vec<_>>(), [(77, 800)]);
    let mut bytes = frontend::pack(&segments);
    let request = ring.supply(fetch.token, &bytes).expect("waits").expect("good segments");
    bytes.fill(0xff); // the caller's buffer, and the guest's page, are not looked at again
    let mut seen = Vec::new();
    ring.segments(request.token, &mut seen).expect("running");
    let expected = (0..100).map(|gref| Segment { gref, offset: 0, len: 512 });
    assert_eq!(seen, expected.collect::<Vec<_>>());
    assert_eq!(ring.supply(fetch.token, &bytes), Err(RingError::Token(fetch.token)), "once");
}

// CVE-2017-10911: responses were copied with what lay in their padding.
#[test]
fn xsa_216_responses_leak_nothing() {
    for (abi, bytes) in [(Abi::X86_64, 16), (Abi::X86_32, 12)] {
        let (mut front, mut ring) = ring(abi, |_| ());
        front.set_salt(0x0102_0304_0506_0700);
        let segments = [WireSegment { gref: 0xa5a5_a5a5, first: 0, last: 7 }; 11];
        front.submit(frontend::write(0, &segments), &segments).expect("inside");
        front.publish().expect("publish");
        let at = entry_at(abi, 32, u32::MAX - 1);
        let mut before = vec![0; abi.entry_bytes()];
        front.memory().copy_out(at, &mut before).expect("inside");
        let taken = consume(&mut ring);
        ring.answer(token(&taken[0]), Status::Error).expect("running");
        ring.push().expect("push");
        let mut after = vec![0; abi.entry_bytes()];
        front.memory().copy_out(at, &mut after).expect("inside");
        let expected = [0, 7, 6, 5, 4, 3, 2, 1, 1, 0, 0xff, 0xff, 0, 0, 0, 0];
        assert_eq!(after[..bytes], expected[..bytes]);
        assert_eq!(after[bytes..], before[bytes..], "no byte more than the response");
    }
}

// CVE-2013-0216 and 0217: bogus indices made the backend loop or die.
#[test]
fn xsa_39_a_bogus_producer_stops_the_ring_and_nothing_else() {
    for (ahead, stops) in [(0, false), (1, false), (32, false), (33, true), (u32::MAX, true), (1 << 31, true)]
    {
        let (front, mut ring) = ring(Abi::X86_64, |_| ());
        let index = u32::MAX - 1;
        front.memory().store(REQ_PROD, index.wrapping_add(ahead)).expect("inside");
        let mut taken = Vec::new();
        let result = ring.consume(100, &mut taken);
        assert_eq!(result.is_err(), stops, "{ahead}");
        if stops {
            assert!(matches!(ring.stopped(), Some(StopReason::Overrun { .. })));
            assert!(taken.is_empty());
            front.memory().store(REQ_PROD, index).expect("inside");
            assert!(ring.consume(100, &mut taken).is_err(), "stopped for good");
            assert!(ring.sleep(1).is_err() && ring.push().is_err());
        } else {
            assert_eq!(taken.len() as u32 + ring.counters().refused.iter().sum::<u64>() as u32, ahead);
        }
    }
}

// The same with requests in flight: an index that goes back, or around.
#[test]
fn xsa_39_a_producer_that_goes_back_stops_the_ring() {
    let (mut front, mut ring) = ring(Abi::X86_64, |_| ());
    for _ in 0..10 {
        front.submit(frontend::flush(0, &[]), &[]).expect("inside");
    }
    front.publish().expect("publish");
    assert_eq!(consume(&mut ring).len(), 10);
    front.memory().store(REQ_PROD, (u32::MAX - 1).wrapping_add(9)).expect("inside");
    let error = RingError::Stopped(StopReason::WentBack { req_prod: 7, req_cons: 8 });
    assert_eq!(ring.sleep(1), Err(error));
}

// Our own indices lie in memory of the guest's, too; they must be of no consequence.
#[test]
fn xsa_39_our_indices_are_not_read_back() {
    let (mut front, mut ring) = ring(Abi::X86_64, |_| ());
    for round in 0u32..100 {
        front.submit(frontend::flush(0, &[]), &[]).expect("inside");
        front.publish().expect("publish");
        front.memory().store(RSP_PROD, round.wrapping_mul(0x9e37_79b9)).expect("inside");
        front.memory().store(RSP_EVENT, round.wrapping_mul(0x85eb_ca6b)).expect("inside");
        let taken = consume(&mut ring);
        ring.answer(token(&taken[0]), Status::Okay).expect("running");
        assert_eq!(answers(&mut front, &mut ring), [Status::Okay], "round {round}");
    }
}

// CVE-2020-29569: things were freed while I/O used them.
#[test]
fn xsa_350_a_stopped_ring_waits_for_its_requests() {
    let (mut front, mut ring) = ring(Abi::X86_64, |_| ());
    for _ in 0..3 {
        front.submit(frontend::read(0, &[PAGE]), &[PAGE]).expect("inside");
    }
    front.publish().expect("publish");
    let taken = consume(&mut ring);
    front.memory().store(REQ_PROD, 1 << 30).expect("inside");
    assert!(ring.consume(1, &mut Vec::new()).is_err());
    assert_eq!(ring.in_flight(), 3);
    let mut before = vec![0; 4096];
    front.memory().copy_out(0, &mut before).expect("inside");
    for (left, taken) in (0..3).rev().zip(&taken) {
        ring.answer(token(taken), Status::Okay).expect("running");
        assert_eq!(ring.answer(token(taken), Status::Okay), Err(RingError::Token(token(taken))));
        assert_eq!(ring.in_flight(), left);
    }
    let mut after = vec![0; 4096];
    front.memory().copy_out(0, &mut after).expect("inside");
    assert_eq!(before, after, "a stopped ring is not written");
    assert_eq!(ring.unanswered().count(), 0);
}

/// Counts accesses.
struct Counting(SharedRegion, Cell<u32>);

impl RingMemory for Counting {
    fn len(&self) -> usize {
        self.0.len()
    }
    fn load(&self, offset: usize) -> Result<u32, MemoryError> {
        self.1.set(self.1.get() + 1);
        self.0.load(offset)
    }
    fn store(&self, offset: usize, value: u32) -> Result<(), MemoryError> {
        self.1.set(self.1.get() + 1);
        self.0.store(offset, value)
    }
    fn copy_out(&self, offset: usize, dst: &mut [u8]) -> Result<(), MemoryError> {
        self.1.set(self.1.get() + 1);
        self.0.copy_out(offset, dst)
    }
    fn copy_in(&self, offset: usize, src: &[u8]) -> Result<(), MemoryError> {
        self.1.set(self.1.get() + 1);
        self.0.copy_in(offset, src)
    }
}

// CVE-2020-27673: storms of events. The engine's part: an event without requests costs a few accesses, not a pass over the ring.
#[test]
fn xsa_332_an_event_without_requests_costs_nothing() {
    let (theirs, ours) = shared(65536);
    let _front = Frontend::create(theirs, Abi::X86_64, 16, 0).expect("ring");
    let ours = Rc::new(Counting(ours, Cell::new(0)));
    let identity = identity(Abi::X86_64, 16, 0);
    let mut ring = Ring::attach(ours.clone(), table(16, 0), identity, limits(8)).expect("attach");
    ours.1.set(0);
    for _ in 0..100 {
        assert_eq!(ring.consume(1000, &mut Vec::new()), Ok(0));
        assert_eq!(ring.push(), Ok(false));
        assert_eq!(ring.sleep(1), Ok(false));
    }
    assert!(ours.1.get() <= 300, "{} accesses", ours.1.get());
}

// CVE-2021-26930 and others: the failure of one grant in a batch hid others or was taken for fatal.
#[test]
fn xsa_361_one_unreadable_page_fails_one_request() {
    let (mut front, mut ring) = ring(Abi::X86_32, |_| ());
    for gref in [1, 2, 3] {
        front.submit(frontend::indirect(false, 0, 12, &[gref]), &[]).expect("inside");
    }
    front.publish().expect("publish");
    let taken = consume(&mut ring);
    let good = frontend::pack(&[PAGE; 12]);
    ring.refuse(token(&taken[1]), Reason::IndirectPage).expect("waits");
    for at in [0, 2] {
        ring.supply(token(&taken[at]), &good).expect("waits").expect("good segments");
        ring.answer(token(&taken[at]), Status::Okay).expect("running");
    }
    assert_eq!(answers(&mut front, &mut ring), [Status::Error, Status::Okay, Status::Okay]);
    assert_eq!(ring.counters().refused[Reason::IndirectPage as usize], 1);
}

// CVE-2015-7311 and 266: read-only disks could be written by another door.
#[test]
fn xsa_142_read_only_is_honoured_by_every_door() {
    let (mut front, mut ring) = ring(Abi::X86_64, |limits| limits.read_only = true);
    let doors = [
        frontend::write(0, &[PAGE]),
        frontend::flush(0, &[PAGE]),
        frontend::barrier(0, &[PAGE]),
        frontend::discard(0, 8, false),
        frontend::discard(0, 8, true),
        frontend::indirect(true, 0, 12, &[1]),
    ];
    for door in doors {
        front.submit(door, &[PAGE]).expect("inside");
    }
    front.publish().expect("publish");
    assert_eq!(consume(&mut ring), []);
    assert_eq!(answers(&mut front, &mut ring), [Status::Error; 6]);
    assert_eq!(ring.counters().refused[Reason::ReadOnly as usize], 6);
    // Nothing to write is no write.
    front.submit(frontend::flush(0, &[]), &[]).expect("inside");
    front.publish().expect("publish");
    assert_eq!(consume(&mut ring).len(), 1);
}

// 376, 391, 396, 403: frontends do not trust their backend; so every answer is exactly the protocol's: the operation of an indirect
// request's response is the inner one, ids come back whole, whatever was refused.
#[test]
fn xsa_391_every_refusal_is_a_correct_response() {
    for abi in ABIS {
        let (mut front, mut ring) = ring(abi, |limits| {
            limits.barrier = false;
            limits.discard = false;
        });
        front.set_salt(0xdead_beef_0000_ff00);
        let cases = [
            (frontend::read(0, &[]), Status::Error, Reason::SegmentCount),
            (Message::Direct { operation: 1, segments: 255, sector: 0 }, Status::Error, Reason::SegmentCount),
            (frontend::read(1001, &[PAGE]), Status::Error, Reason::OutOfRange),
            (frontend::read(u64::MAX, &[PAGE]), Status::Error, Reason::OutOfRange),
            (frontend::read(u64::MAX >> 8, &[PAGE]), Status::Error, Reason::OutOfRange),
            (frontend::barrier(0, &[]), Status::NotSupported, Reason::NotOffered),
            (frontend::discard(0, 1, false), Status::NotSupported, Reason::NotOffered),
            (frontend::indirect(true, 0, 257, &[]), Status::Error, Reason::SegmentCount),
            (frontend::indirect(true, 0, 0, &[]), Status::Error, Reason::SegmentCount),
            (Message::Unknown { operation: 4 }, Status::NotSupported, Reason::UnknownOperation),
            (Message::Unknown { operation: 255 }, Status::NotSupported, Reason::UnknownOperation),
            (
                Message::Indirect { operation: 3, segments: 1, sector: 0, grefs: [0; 8] },
                Status::Error,
                Reason::IndirectOperation,
            ),
        ];
        let mut counted = [0; Reason::ALL.len()];
        for (message, status, reason) in cases {
            front.submit(message, &[PAGE]).expect("inside");
            front.publish().expect("publish");
            assert_eq!(consume(&mut ring), [], "{message:?}");
            assert_eq!(answers(&mut front, &mut ring), [status], "{message:?}");
            counted[reason as usize] += 1;
            assert_eq!(ring.counters().refused, counted, "{message:?}");
        }
    }
}

// The size of a disk changes online: in both directions, from one request to the next.
#[test]
fn a_resize_counts_for_the_next_request() {
    let (mut front, mut ring) = ring(Abi::X86_64, |_| ());
    for (sectors, okay) in [(1000, false), (1008, true), (999, false)] {
        ring.set_limits(Limits { sectors, ..*ring.limits() });
        front.submit(frontend::read(1000, &[PAGE]), &[PAGE]).expect("inside");
        front.publish().expect("publish");
        let taken = consume(&mut ring);
        assert_eq!(taken.len(), usize::from(okay));
        for taken in taken {
            ring.answer(token(&taken), Status::Okay).expect("running");
        }
        assert_eq!(answers(&mut front, &mut ring), [if okay { Status::Okay } else { Status::Error }]);
    }
    // An indirect request is checked against the size at which its segments come.
    front.submit(frontend::indirect(false, 900, 12, &[1]), &[]).expect("inside");
    front.publish().expect("publish");
    let fetch = fetch(&consume(&mut ring));
    ring.set_limits(Limits { sectors: 950, ..*ring.limits() });
    assert_eq!(ring.supply(fetch.token, &frontend::pack(&[PAGE; 12])), Ok(None));
}

// A barrier runs alone, and in its place.
#[test]
fn a_barrier_is_alone() {
    let (mut front, mut ring) = ring(Abi::X86_64, |_| ());
    for message in [frontend::write(0, &[PAGE]), frontend::barrier(8, &[PAGE]), frontend::write(16, &[PAGE])]
    {
        front.submit(message, &[PAGE]).expect("inside");
    }
    front.publish().expect("publish");
    let first = consume(&mut ring);
    assert_eq!(first.len(), 1, "what was before it");
    assert_eq!(ring.sleep(1), Ok(false), "it waits for a completion");
    assert_eq!(consume(&mut ring), []);
    ring.answer(token(&first[0]), Status::Okay).expect("running");
    assert_eq!(ring.sleep(1), Ok(true));
    let second = consume(&mut ring);
    let [Taken::Run(request)] = second[..] else { panic!("{second:?}") };
    assert_eq!((request.body.operation, request.body.sectors), (Operation::Barrier, 8));
    assert_eq!((consume(&mut ring), ring.sleep(1)), (vec![], Ok(false)), "nothing beside it");
    ring.answer(request.token, Status::Okay).expect("running");
    assert_eq!(ring.sleep(1), Ok(true));
    assert_eq!(consume(&mut ring).len(), 1, "what is behind it");
}

// Blocks of 4096 bytes: whole ones only, but sizes and sectors stay in units of 512.
#[test]
fn large_blocks_are_whole() {
    let (mut front, mut ring) = ring(Abi::X86_64, |limits| limits.block_bytes = 4096);
    let half = WireSegment { last: 3, ..PAGE };
    let other_half = WireSegment { first: 4, ..PAGE };
    for (sector, segments, okay) in [
        (992, vec![PAGE], true),
        (991, vec![PAGE], false),
        (0, vec![half, other_half], false),
        (8, vec![half], false),
    ] {
        front.submit(frontend::read(sector, &segments), &segments).expect("inside");
        front.publish().expect("publish");
        assert_eq!(consume(&mut ring).len(), usize::from(okay), "{sector} {segments:?}");
    }
    assert_eq!(ring.counters().refused[Reason::Alignment as usize], 3);
}

// Goal: notifications only where they were asked for, in both directions, across the wrap of the indices.
#[test]
fn notifications_follow_the_events() {
    let (mut front, mut ring) = ring(Abi::X86_64, |_| ());
    let ask = |front: &mut Frontend, count: u32| {
        for _ in 0..count {
            front.submit(frontend::flush(0, &[]), &[]).expect("inside");
        }
        front.publish().expect("publish")
    };
    let answer = |ring: &mut Ring, taken: &[Taken]| {
        taken.iter().for_each(|taken| ring.answer(token(taken), Status::Okay).expect("running"));
        ring.push().expect("push")
    };
    assert!(ask(&mut front, 1), "the first one");
    assert!(!ask(&mut front, 1), "we have not slept since");
    let taken = consume(&mut ring);
    assert!(answer(&mut ring, &taken[..1]), "the first one");
    assert_eq!(ring.sleep(3), Ok(false));
    assert!(!ask(&mut front, 2), "two of three");
    assert!(ask(&mut front, 1), "the third");
    assert!(!answer(&mut ring, &taken[1..]), "the frontend has not slept since");
    front.poll(&mut Vec::new()).expect("an honest backend");
    assert!(!front.sleep(2).expect("inside"));
    let taken = consume(&mut ring);
    assert!(!answer(&mut ring, &taken[..1]));
    assert!(answer(&mut ring, &taken[1..]));
    assert_eq!(ring.sleep(32), Ok(false), "with nothing in flight every request counts");
    assert!(ask(&mut front, 1));
    assert_eq!((ring.counters().notifies, ring.counters().notifies_saved), (2, 2));
}

// Goal: any bytes at all in the entries are answered or run within limits; nothing else. Method: a whole ring of random bytes, often.
#[test]
fn rubbish_is_answered() {
    let mut rng = Rng::with_seed(5);
    let mut pages = Pages::new(8);
    for abi in ABIS {
        let (front, mut ring) = ring(abi, |_| ());
        let mut server = Server::default();
        let mut index = u32::MAX - 1;
        let mut disk = vec![0; 512_000];
        for _ in 0..2000 {
            let bytes: Vec<u8> = (0..4096 - 64).map(|_| rng.u8(..) & rng.u8(..) & rng.u8(..)).collect();
            front.memory().copy_in(64, &bytes).expect("inside");
            index = index.wrapping_add(32);
            front.memory().store(REQ_PROD, index).expect("inside");
            while ring.in_flight() > 0 || ring.sleep(1).expect("honest indices") {
                server.take(&mut ring, &mut pages, 40).expect("honest indices");
                while server.answer(&mut ring, &mut disk, &mut pages, &mut rng).expect("running") {}
                ring.push().expect("push");
            }
        }
        assert_eq!((ring.counters().taken, ring.counters().responses), (64_000, 64_000));
        println!("{abi:?}: {:?}", ring.counters());
    }
}
