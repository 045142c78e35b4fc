//! Goal: a frontend that changes everything at any moment gets answers or a stopped ring: no panic, no access outside, no loop, nothing unchecked.
//! Method: blows from seeds between the engine's steps and inside its copies (one thread, reproducible); then two threads at once.
//! Further, an honest frontend on another thread that sleeps on events: no wake-up is lost.

mod blkif_rig;

use std::cell::RefCell;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::Duration;

use blkif_rig::{Pages, Server, identity, limits, shared, table};
use fastrand::Rng;
use ring_bridge::blkif::frontend::{self, Frontend};
use ring_bridge::blkif::hostile::Hostile;
use ring_bridge::blkif::request::{Checked, Limits, Operation, Reason, check, check_segments};
use ring_bridge::blkif::ring::{Ring, RingError, StopReason, Taken};
use ring_bridge::blkif::wire::{self, Abi, Message, REQ_PROD, RSP_PROD, WireSegment, entries, entry_at};
use ring_bridge::memory::{MemoryError, RingMemory, SharedRegion};

/// A ring that is hit inside the engine's own accesses.
struct Beaten<'a> {
    memory: SharedRegion,
    hostile: &'a RefCell<Hostile>,
    abi: Abi,
    entries: u32,
}

impl Beaten<'_> {
    fn blow(&self) -> Result<(), MemoryError> {
        let mut hostile = self.hostile.borrow_mut();
        match hostile.rng().u32(0..40) {
            0 => hostile.hit(&self.memory, self.abi, self.entries).map(drop),
            1 | 2 => hostile.hit_entry(&self.memory, self.abi, self.entries).map(drop),
            3 => hostile.hit_event(&self.memory).map(drop),
            _ => Ok(()),
        }
    }
}

impl RingMemory for Beaten<'_> {
    fn len(&self) -> usize {
        self.memory.len()
    }
    fn load(&self, offset: usize) -> Result<u32, MemoryError> {
        self.blow()?;
        self.memory.load(offset)
    }
    fn store(&self, offset: usize, value: u32) -> Result<(), MemoryError> {
        self.blow()?;
        self.memory.store(offset, value)
    }
    fn copy_out(&self, offset: usize, dst: &mut [u8]) -> Result<(), MemoryError> {
        self.blow()?;
        let half = dst.len() / 2;
        self.memory.copy_out(offset, &mut dst[..half])?;
        self.blow()?; // in the middle of the engine's copy
        self.memory.copy_out(offset + half, &mut dst[half..])?;
        self.blow()
    }
    fn copy_in(&self, offset: usize, src: &[u8]) -> Result<(), MemoryError> {
        self.blow()?;
        self.memory.copy_in(offset, src)
    }
}

/// One ring until it stops or its time is over; returns (stopped, requests, refused, answers).
fn beat(seed: u64, pages: &mut Pages) -> (bool, u64, u64, u64) {
    let mut rng = Rng::with_seed(seed);
    let abi = if rng.bool() { Abi::X86_64 } else { Abi::X86_32 };
    let ring_pages = 1 << rng.u32(0..5);
    let entries = entries(ring_pages).expect("pages");
    let (theirs, memory) = shared(ring_pages as usize * 4096);
    drop(Frontend::create(&theirs, abi, ring_pages, rng.u32(..)).expect("ring"));
    let hostile = RefCell::new(Hostile::new(seed));
    let beaten = Beaten { memory, hostile: &hostile, abi, entries };
    let limits =
        Limits { read_only: rng.bool(), block_bytes: if rng.bool() { 512 } else { 4096 }, ..limits(1000) };
    let room = limits.indirect_segments_max;
    let attached = Ring::attach(beaten, table(ring_pages, room), identity(abi, ring_pages, room), limits);
    let Ok(mut ring) = attached else { return (true, 0, 0, 0) };
    let mut server = Server::default();
    let mut disk = vec![0; 512_000];
    let mut stopped = false;
    for _ in 0..60 {
        for _ in 0..rng.u32(0..4) {
            hostile.borrow_mut().hit_entry(&theirs, abi, entries).expect("inside");
            let page = rng.usize(0..8);
            let indirect = hostile.borrow_mut().segment().encode();
            pages.0[page * 4096..page * 4096 + 8].copy_from_slice(&indirect);
        }
        let req_prod = theirs.load(REQ_PROD).expect("inside");
        let more = rng.u32(0..4);
        for index in 0..more {
            let at = entry_at(abi, entries, req_prod.wrapping_add(index));
            let entry = hostile.borrow_mut().entry(abi);
            theirs.copy_in(at, &entry[..abi.entry_bytes()]).expect("inside");
        }
        theirs.store(REQ_PROD, req_prod.wrapping_add(more)).expect("inside");
        let turned = server.turn(&mut ring, &mut disk, pages, &mut rng).and_then(|_| ring.sleep(rng.u32(..)));
        if let Err(error) = turned {
            assert!(
                matches!(error, RingError::Stopped(StopReason::Overrun { .. } | StopReason::WentBack { .. })),
                "{error}"
            );
            stopped = true;
            break;
        }
    }
    let counters = *ring.counters();
    if stopped {
        // What still runs is answered to nobody, and then nothing is left.
        while server.answer(&mut ring, &mut disk, pages, &mut rng).expect("running") {}
        for token in ring.unanswered().collect::<Vec<_>>() {
            ring.refuse(token, Reason::IndirectPage).expect("waits");
        }
        assert_eq!(ring.in_flight(), 0);
    }
    (stopped, counters.taken, counters.refused.iter().sum(), counters.responses)
}

#[test]
fn a_hostile_frontend_gets_answers_or_a_stopped_ring() {
    let seeds = std::env::var("BLKIF_HOSTILE_SEEDS").ok().and_then(|s| s.parse().ok()).unwrap_or(3000);
    let (mut stopped, mut taken, mut refused, mut answered) = (0, 0, 0, 0);
    let mut pages = Pages::new(16);
    for seed in 0..seeds {
        let (stop, requests, refusals, answers) = beat(seed, &mut pages);
        stopped += u64::from(stop);
        taken += requests;
        refused += refusals;
        answered += answers;
    }
    println!(
        "{seeds} rings: {stopped} stopped, {taken} requests taken, {refused} refused, {answered} answered"
    );
    let ran = taken - refused;
    assert!(stopped > seeds / 10 && stopped < seeds && answered > 10 * seeds, "the test lost its force");
    assert!(ran > taken / 10 && refused > taken / 10, "the test lost its force");
}

// The same with real concurrency: another thread hits the ring and an indirect page as fast as it can.
#[test]
fn two_threads_one_of_them_hostile() {
    const BLOWS: u32 = 100_000;
    let (mut stopped, mut taken) = (0u32, 0u64);
    for seed in 0..30 {
        let abi = if seed % 2 == 0 { Abi::X86_64 } else { Abi::X86_32 };
        let (theirs, ours) = shared(8192);
        drop(Frontend::create(&theirs, abi, 2, 0).expect("ring"));
        let mut ring =
            Ring::attach(ours, table(2, 256), identity(abi, 2, 256), limits(1000)).expect("attach");
        let (done, stop) = (AtomicBool::new(false), AtomicBool::new(false));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut hostile = Hostile::new(seed);
                for blow in 1..=BLOWS {
                    hostile.hit_entry(&theirs, abi, 64).expect("inside");
                    let (req_prod, rsp_prod) = (theirs.load(REQ_PROD), theirs.load(RSP_PROD));
                    let (req_prod, rsp_prod) = (req_prod.expect("inside"), rsp_prod.expect("inside"));
                    if blow.is_multiple_of(4) && req_prod.wrapping_sub(rsp_prod) < 64 {
                        theirs.store(REQ_PROD, req_prod.wrapping_add(1)).expect("inside");
                    }
                    if blow.is_multiple_of(BLOWS / 2) {
                        hostile.hit(&theirs, abi, 64).expect("inside");
                    }
                    if stop.load(Ordering::Relaxed) {
                        break;
                    }
                }
                done.store(true, Ordering::Relaxed);
            });
            let (mut server, mut pages, mut rng) = (Server::default(), Pages::new(8), Rng::with_seed(seed));
            let mut disk = vec![0; 512_000];
            while !done.load(Ordering::Relaxed) {
                let turned = server.turn(&mut ring, &mut disk, &mut pages, &mut rng);
                if turned.and_then(|_| ring.sleep(1)).is_err() {
                    stopped += 1;
                    break;
                }
            }
            stop.store(true, Ordering::Relaxed);
        });
        taken += ring.counters().taken;
    }
    println!("30 rings: {stopped} stopped, {taken} requests taken");
    assert!(taken > 10_000, "the test lost its force");
}

/// An event channel: pending or not.
fn event() -> (SyncSender<()>, Receiver<()>) {
    sync_channel(1)
}

fn notify(event: &SyncSender<()>) {
    let _ = event.try_send(()); // pending already, or the peer has all that it wants and has gone
}

fn wait(event: &Receiver<()>) {
    event.recv_timeout(Duration::from_secs(60)).expect("a wake-up was lost");
}

// Goal: with both sides asleep whenever they can be, and events batched at random, nobody sleeps for ever. Method: two threads; a lost wake-up
// ends in a time-out.
#[test]
fn no_wake_up_is_lost_between_two_threads() {
    const REQUESTS: u64 = 60_000;
    for (abi, pages) in [(Abi::X86_64, 1), (Abi::X86_32, 4)] {
        let (theirs, ours) = shared(pages as usize * 4096);
        let mut front = Frontend::create(theirs, abi, pages, u32::MAX - 1000).expect("ring");
        let mut ring =
            Ring::attach(ours, table(pages, 0), identity(abi, pages, 0), limits(1000)).expect("attach");
        let ((to_back, at_back), (to_front, at_front)) = (event(), event());
        std::thread::scope(|scope| {
            scope.spawn(move || {
                let mut rng = Rng::with_seed(1);
                let (mut submitted, mut answered, mut completions) = (0, 0, Vec::new());
                while answered < REQUESTS {
                    let burst = rng.u64(1..40).min(REQUESTS - submitted).min(front.free() as u64);
                    for _ in 0..burst {
                        front.submit(frontend::flush(0, &[]), &[]).expect("inside");
                    }
                    submitted += burst;
                    if burst > 0 && front.publish().expect("inside") {
                        notify(&to_back);
                    }
                    completions.clear();
                    front.poll(&mut completions).expect("an honest backend");
                    answered += completions.len() as u64;
                    let batch = rng.u32(1..4).min(front.pending() as u32);
                    if answered < REQUESTS && completions.is_empty() && !front.sleep(batch).expect("inside") {
                        wait(&at_front);
                    }
                }
            });
            let (mut rng, mut taken, mut held) = (Rng::with_seed(2), Vec::new(), Vec::new());
            let mut answered = 0;
            while answered < REQUESTS {
                taken.clear();
                ring.consume(rng.usize(1..20), &mut taken).expect("an honest frontend");
                held.extend(taken.iter().map(|taken| match taken {
                    Taken::Run(request) => request.token,
                    Taken::Fetch(fetch) => fetch.token,
                }));
                // Some stay in flight; when nothing else is to be done they are answered.
                let keep = if taken.is_empty() { 0 } else { rng.usize(0..4).min(held.len()) };
                for token in held.drain(keep..) {
                    ring.answer(token, ring_bridge::blkif::request::Status::Okay).expect("running");
                    answered += 1;
                }
                if ring.push().expect("push") {
                    notify(&to_front);
                }
                if answered < REQUESTS && held.is_empty() && !ring.sleep(rng.u32(1..4)).expect("inside") {
                    wait(&at_back);
                }
            }
        });
        let counters = ring.counters();
        println!(
            "{abi:?}, {pages} pages: {} notifications for {} requests",
            counters.notifies, counters.responses
        );
        assert_eq!(counters.responses, REQUESTS);
    }
}

/// A second opinion about a request, written from the specification with arithmetic that cannot overflow: the body if it may run.
fn oracle(abi: Abi, entry: &wire::Entry, limits: &Limits) -> Result<(Operation, u128, u128, u32), ()> {
    let at = |offset: usize, len: usize| {
        entry[offset..offset + len].iter().rev().fold(0u128, |n, b| n << 8 | u128::from(*b))
    };
    let (sector_at, data_at) = if abi == Abi::X86_64 { (16, 24) } else { (12, 20) };
    let sector = at(sector_at, 8);
    let block = u128::from(limits.block_bytes / 512);
    let fits = |sectors: u128| {
        sectors > 0
            && sector + sectors <= u128::from(limits.sectors)
            && sector.is_multiple_of(block)
            && sectors.is_multiple_of(block)
    };
    match entry[0] {
        code @ 0..=3 => {
            let operation =
                [Operation::Read, Operation::Write, Operation::Barrier, Operation::Flush][usize::from(code)];
            let offered = [true, true, limits.barrier, limits.flush][usize::from(code)];
            let count = usize::from(entry[1]);
            if !offered || count > 11 || (count == 0 && code < 2) {
                return Err(());
            }
            if count == 0 {
                return Ok((operation, 0, 0, 0));
            }
            let mut sectors = 0;
            for i in 0..count {
                let (first, last) = (at(data_at + 8 * i + 4, 1), at(data_at + 8 * i + 5, 1));
                if last < first || last > 7 || (last - first + 1) % block != 0 {
                    return Err(());
                }
                sectors += last - first + 1;
            }
            let allowed = code == 0 || !limits.read_only;
            if allowed && fits(sectors) { Ok((operation, sector, sectors, count as u32)) } else { Err(()) }
        }
        5 => {
            let secure = entry[1] & 1 == 1;
            let offered = limits.discard && (!secure || limits.secure_discard) && !limits.read_only;
            let sectors = at(data_at, 8);
            if offered && fits(sectors) {
                Ok((Operation::Discard { secure }, sector, sectors, 0))
            } else {
                Err(())
            }
        }
        6 => {
            let count = at(2, 2);
            let writes = entry[1] == 1;
            let okay = entry[1] <= 1
                && (1..=u128::from(limits.indirect_segments_max.min(4096))).contains(&count)
                && !(writes && limits.read_only)
                && fits(block);
            let operation = if writes { Operation::Write } else { Operation::Read };
            if okay { Ok((operation, sector, u128::MAX, count as u32)) } else { Err(()) }
        }
        _ => Err(()),
    }
}

// Goal: the checks accept exactly what the specification allows, for any bytes. Method: random and nearly right entries against a second opinion.
#[test]
fn checks_agree_with_a_second_opinion() {
    let mut hostile = Hostile::new(99);
    let (mut accepted, mut refused) = (0u32, 0u32);
    for round in 0..400_000u32 {
        let rng = hostile.rng();
        let abi = if rng.bool() { Abi::X86_64 } else { Abi::X86_32 };
        let limits = Limits {
            sectors: [1000, 0, 8, u64::MAX / 512, 1 << 33][rng.usize(0..5)],
            block_bytes: if rng.bool() { 512 } else { 4096 },
            read_only: rng.u32(0..4) == 0,
            flush: rng.bool(),
            barrier: rng.bool(),
            discard: rng.bool(),
            secure_discard: rng.bool(),
            indirect_segments_max: [0, 256, 4096, u16::MAX][rng.usize(0..4)],
        };
        let entry = match round % 3 {
            0 => hostile.entry(abi),
            1 => std::array::from_fn(|_| hostile.rng().u8(..) & hostile.rng().u8(..)),
            _ => nearly_right(abi, hostile.rng()),
        };
        let decoded = wire::decode(abi, &entry);
        let ours = check(abi, &entry, &decoded, &limits);
        let found = match ours {
            Ok(Checked::Direct(body)) => {
                assert_eq!(body.len_bytes(), body.sectors * 512);
                assert!(body.offset_bytes().checked_add(body.len_bytes()).is_some());
                Ok((
                    body.operation,
                    u128::from(body.sector),
                    u128::from(body.sectors),
                    u32::from(body.segments),
                ))
            }
            Ok(Checked::Indirect(body)) => {
                Ok((body.operation, u128::from(body.sector), u128::MAX, u32::from(body.segments)))
            }
            Err(_) => Err(()),
        };
        assert_eq!(found, oracle(abi, &entry, &limits), "{decoded:?} {limits:?} {ours:?}");
        if found.is_ok() { accepted += 1 } else { refused += 1 }
    }
    println!("{accepted} accepted, {refused} refused");
    assert!(accepted > 20_000 && refused > 20_000, "the test lost its force: {accepted} {refused}");
}

/// A request that is right but for one thing, if any.
fn nearly_right(abi: Abi, rng: &mut Rng) -> wire::Entry {
    let mut segments = [WireSegment { gref: 1, first: 0, last: 7 }; 11];
    let count = rng.u8(1..=11);
    let sector = rng.u64(0..115) * 8;
    if rng.u32(0..4) == 0 {
        segments[rng.usize(0..11)] = WireSegment { gref: 2, first: rng.u8(0..9), last: rng.u8(0..9) };
    }
    let message = match rng.u32(0..4) {
        0 => frontend::discard(sector, rng.u64(0..16) * 8, rng.bool()),
        1 => frontend::indirect(rng.bool(), sector, rng.u16(0..300), &[5]),
        _ => Message::Direct { operation: rng.u8(0..4), segments: count, sector: sector + rng.u64(0..9) / 8 },
    };
    wire::encode(abi, &wire::Decoded { id: rng.u64(..), message }, &segments)
}

// The same for indirect segments.
#[test]
fn indirect_checks_agree_with_a_second_opinion() {
    let mut hostile = Hostile::new(7);
    let (mut accepted, mut refused) = (0u32, 0u32);
    for round in 0..40_000u32 {
        let blocks = hostile.rng().bool();
        let limits = Limits { block_bytes: if blocks { 512 } else { 4096 }, ..limits(1000) };
        let count = hostile.rng().usize(1..300);
        let mut segments =
            vec![WireSegment { gref: 1, first: 0, last: if round % 2 == 0 { 7 } else { 0 } }; count];
        for _ in 0..hostile.rng().usize(0..2) {
            let at = hostile.rng().usize(0..count);
            segments[at] = hostile.segment();
        }
        let sector = hostile.rng().u64(0..1010);
        let block = u64::from(limits.block_bytes) / 512;
        let len = |s: &WireSegment| u64::from(s.last) + 1 - u64::from(s.first);
        let okay = segments.iter().all(|s| s.first <= s.last && s.last < 8 && len(s) % block == 0)
            && sector.is_multiple_of(block)
            && sector + segments.iter().map(len).sum::<u64>() <= 1000;
        let found = check_segments(Operation::Write, sector, &frontend::pack(&segments), &limits);
        assert_eq!(found.is_ok(), okay, "{sector} {segments:?} {limits:?} {found:?}");
        if okay { accepted += 1 } else { refused += 1 }
    }
    assert!(accepted > 2000 && refused > 2000, "the test lost its force: {accepted} {refused}");
}
