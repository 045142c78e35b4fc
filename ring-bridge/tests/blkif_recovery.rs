//! Goal: a successor finds a ring as its predecessor has left it, knows what may have killed it, and refuses what it cannot know.
//! Method: engines that are dropped in the middle, one situation each. (Crashes at every single store: `blkif_crash`.)

mod blkif_rig;

use std::rc::Rc;

use blkif_rig::{identity, limits, shared, table};
use ring_bridge::blkif::frontend::{self, Completion, Frontend};
use ring_bridge::blkif::inflight::{Identity, MAGIC, Table, TableError, table_bytes};
use ring_bridge::blkif::request::{Limits, Operation, Reason, Segment, Status};
use ring_bridge::blkif::ring::{Recovered, Request, Ring, StopReason, Taken, Token};
use ring_bridge::blkif::wire::{Abi, REQ_PROD, RSP_PROD, WireSegment};
use ring_bridge::memory::{RingMemory, SharedRegion};

const PAGE: WireSegment = WireSegment { gref: 3, first: 0, last: 7 };
type Engine = Ring<Rc<SharedRegion>, Rc<SharedRegion>>;

/// What outlives the backend.
struct Host {
    front: Frontend<Rc<SharedRegion>>,
    ring: Rc<SharedRegion>,
    table: Rc<SharedRegion>,
}

impl Host {
    fn new() -> (Host, Engine) {
        let ring = Rc::new(shared(4096).0);
        let front = Frontend::create(ring.clone(), Abi::X86_32, 1, u32::MAX).expect("ring");
        let table = Rc::new(table(1, 256));
        let identity = identity(Abi::X86_32, 1, 256);
        let engine = Ring::attach(ring.clone(), table.clone(), identity, limits(1000)).expect("attach");
        (Host { front, ring, table }, engine)
    }

    fn ask(&mut self, messages: &[ring_bridge::blkif::wire::Message]) {
        for message in messages {
            self.front.submit(*message, &[PAGE]).expect("inside");
        }
        self.front.publish().expect("publish");
    }

    fn recover(&self) -> Result<(Engine, Recovered), StopReason> {
        self.recover_with(limits(1000))
    }

    fn recover_with(&self, limits: Limits) -> Result<(Engine, Recovered), StopReason> {
        Ring::recover(self.ring.clone(), Table::open(self.table.clone())?, limits)
    }

    fn answers(&mut self, engine: &mut Engine) -> Vec<Completion> {
        engine.push().expect("push");
        let mut completions = Vec::new();
        self.front.poll(&mut completions).expect("an honest backend");
        completions
    }
}

fn consume(engine: &mut Engine) -> Vec<Taken> {
    let mut taken = Vec::new();
    engine.consume(100, &mut taken).expect("an honest frontend");
    taken
}

fn run(taken: &Taken) -> Request {
    match taken {
        Taken::Run(request) => *request,
        Taken::Fetch(fetch) => panic!("{fetch:?}"),
    }
}

fn token(taken: &Taken) -> Token {
    match taken {
        Taken::Run(request) => request.token,
        Taken::Fetch(fetch) => fetch.token,
    }
}

// Requests come again in the order of the ring, with what they asked; the number of times is counted per request.
#[test]
fn requests_come_again_in_order_and_are_counted() {
    let (mut host, mut engine) = Host::new();
    host.ask(&[8, 16, 24, 32].map(|sector| frontend::write(sector, &[PAGE])));
    let taken = consume(&mut engine);
    engine.answer(token(&taken[1]), Status::Okay).expect("running");
    assert_eq!(host.answers(&mut engine).len(), 1);
    for attempt in 1..=3 {
        let (mut next, recovered) = host.recover().expect("a good table");
        assert_eq!(recovered, Recovered { again: 3, published: 0, attempts_max: attempt });
        assert_eq!(next.in_flight(), 3);
        assert_eq!(next.sleep(1), Ok(true));
        let taken = consume(&mut next);
        assert_eq!(taken.iter().map(|t| run(t).body.sector).collect::<Vec<_>>(), [8, 24, 32]);
        let mut segments = Vec::new();
        next.segments(token(&taken[2]), &mut segments).expect("running");
        assert_eq!(segments, [Segment { gref: 3, offset: 0, len: 4096 }]);
        assert_eq!(next.counters().begun_again, 3);
        engine = next;
    }
    // A new request in the slot of an old one begins to count anew.
    for token in engine.unanswered().collect::<Vec<_>>() {
        engine.answer(token, Status::Okay).expect("running");
    }
    assert_eq!(host.answers(&mut engine).len(), 3);
    host.ask(&[frontend::read(0, &[PAGE])]);
    assert_eq!(consume(&mut engine).len(), 1);
    assert_eq!(host.recover().expect("a good table").1.attempts_max, 1);
}

// A result that is known is published, not made again; and exactly once.
#[test]
fn known_results_are_published_without_running() {
    let (mut host, mut engine) = Host::new();
    host.ask(&[frontend::write(8, &[PAGE]), frontend::write(16, &[PAGE])]);
    let taken = consume(&mut engine);
    engine.answer(token(&taken[1]), Status::Error).expect("running"); // written, not published
    drop(engine);
    let (mut engine, recovered) = host.recover().expect("a good table");
    assert_eq!((recovered.again, recovered.published), (1, 1));
    assert_eq!(consume(&mut engine).iter().map(|t| run(t).body.sector).collect::<Vec<_>>(), [8]);
    let answers = host.answers(&mut engine);
    assert_eq!(answers, [Completion { index: 1, status: Status::Error }]);
    drop(engine);
    let (_, recovered) = host.recover().expect("a good table");
    assert_eq!((recovered.again, recovered.published), (1, 0));
}

// Indirect segments that were fetched are kept: the guest's page may have changed since. Before that they are fetched again.
#[test]
fn indirect_segments_are_kept() {
    let (mut host, mut engine) = Host::new();
    host.ask(&[frontend::indirect(true, 8, 100, &[5])]);
    assert!(matches!(consume(&mut engine)[..], [Taken::Fetch(_)]));
    drop(engine);
    let (mut engine, _) = host.recover().expect("a good table");
    let [Taken::Fetch(fetch)] = consume(&mut engine)[..] else { panic!("to be fetched again") };
    engine.supply(fetch.token, &frontend::pack(&[PAGE; 100])).expect("waits").expect("good segments");
    drop(engine);
    let (mut engine, _) = host.recover().expect("a good table");
    let [Taken::Run(request)] = consume(&mut engine)[..] else { panic!("kept") };
    assert_eq!((request.body.operation, request.body.sectors), (Operation::Write, 800));
    let mut segments = Vec::new();
    engine.segments(request.token, &mut segments).expect("running");
    assert_eq!(segments, [Segment { gref: 3, offset: 0, len: 4096 }; 100]);
}

// A barrier keeps its place: what was before it runs first, it runs alone.
#[test]
fn a_barrier_keeps_its_place() {
    let (mut host, mut engine) = Host::new();
    host.ask(&[frontend::write(8, &[PAGE]), frontend::barrier(16, &[PAGE]), frontend::write(24, &[PAGE])]);
    consume(&mut engine);
    drop(engine);
    let (mut engine, recovered) = host.recover().expect("a good table");
    assert_eq!(recovered.again, 2, "nothing behind the barrier was taken");
    for (sector, operation) in [(8, Operation::Write), (16, Operation::Barrier), (24, Operation::Write)] {
        let taken = consume(&mut engine);
        assert_eq!(taken.len(), 1);
        assert_eq!((run(&taken[0]).body.sector, run(&taken[0]).body.operation), (sector, operation));
        engine.answer(token(&taken[0]), Status::Okay).expect("running");
    }
    assert_eq!(host.answers(&mut engine).len(), 3);
}

// What is offered may have changed: requests are checked anew.
#[test]
fn requests_are_checked_anew() {
    let (mut host, mut engine) = Host::new();
    host.ask(&[
        frontend::write(8, &[PAGE]),
        frontend::read(900, &[PAGE]),
        frontend::indirect(true, 8, 20, &[5]),
    ]);
    let taken = consume(&mut engine);
    engine.supply(token(&taken[2]), &frontend::pack(&[PAGE; 20])).expect("waits").expect("good segments");
    drop(engine);
    let changed = Limits { read_only: true, sectors: 800, ..limits(1000) };
    let (mut engine, _) = host.recover_with(changed).expect("a good table");
    assert_eq!(consume(&mut engine), []);
    assert_eq!(engine.counters().refused[Reason::ReadOnly as usize], 2);
    assert_eq!(engine.counters().refused[Reason::OutOfRange as usize], 1);
    assert_eq!(host.answers(&mut engine).len(), 3);
}

// The frontend wrote to our index while nobody was there: the ring is not served any more.
#[test]
fn a_foreign_response_index_is_refused() {
    let (mut host, mut engine) = Host::new();
    host.ask(&[frontend::write(8, &[PAGE]); 3]);
    let taken = consume(&mut engine);
    engine.answer(token(&taken[0]), Status::Okay).expect("running");
    host.answers(&mut engine);
    drop(engine);
    for (found, good) in [(0, true), (1, false), (u32::MAX, false), (1 << 31, false)] {
        host.ring.store(RSP_PROD, found).expect("inside");
        let recovered = host.recover();
        let error = StopReason::Table(TableError::ResponseIndex { found, published: 0, intent: 0 });
        assert_eq!(recovered.err(), (!good).then_some(error), "{found}");
    }
    host.ring.store(RSP_PROD, 0).expect("inside");
    host.ring.store(REQ_PROD, 34).expect("inside");
    assert!(matches!(host.recover().err(), Some(StopReason::Overrun { .. })));
}

// A table says whose it is; one of another version, a torn one, a short one, or something else is refused with the reason.
#[test]
fn tables_are_checked() {
    let whose = Identity {
        domid: u16::MAX,
        devid: u32::MAX,
        queue: 7,
        abi: Abi::X86_32,
        pages: 16,
        grefs: std::array::from_fn(|i| 1000 + i as u32),
        port: 77,
        segments_max: 4096,
    };
    let memory = Rc::new(table(16, 4096));
    assert_eq!(Table::open(memory.clone()).err(), Some(TableError::Magic { found: 0 }));
    Table::create(memory.clone(), whose, 5).expect("room");
    let table = Table::open(memory.clone()).expect("a good table");
    assert_eq!((*table.identity(), table.entries()), (whose, 512));
    let short = SharedRegion::map(
        nix::sys::memfd::memfd_create(c"short", nix::sys::memfd::MFdFlags::empty())
            .inspect(|fd| nix::unistd::ftruncate(fd, 8192).expect("ftruncate"))
            .expect("memfd"),
        8192,
    )
    .expect("map");
    let mut page = vec![0; 4096];
    memory.copy_out(0, &mut page).expect("inside");
    short.copy_in(0, &page).expect("inside");
    assert!(matches!(Table::open(&short).err(), Some(TableError::Memory(_))));
    assert!(matches!(Table::create(&short, whose, 0).err(), Some(TableError::Memory(_))));
    assert_eq!(table_bytes(512, 4096), memory.len());
    for (at, value, what) in [
        (0, MAGIC + 1, "Magic"),
        (4, 2, "Version"),
        (8, 65536, "Damaged"),
        (20, 2, "Damaged"),
        (24, 3, "Damaged"),
        (24, 32, "Damaged"),
        (32, 4097, "Damaged"),
    ] {
        let old = memory.load(at).expect("inside");
        memory.store(at, value).expect("inside");
        let error = Table::open(memory.clone()).expect_err("refused");
        assert!(format!("{error:?}").starts_with(what), "{at}: {error:?}");
        memory.store(at, old).expect("inside");
    }
    Table::open(memory).expect("good again");
}

// Any rubbish in a table gives a reason or an engine that works, never a panic. Method: random words over tables of a running engine.
#[test]
fn rubbish_in_a_table_is_survived() {
    let mut rng = fastrand::Rng::with_seed(3);
    let (mut refused, mut served) = (0, 0);
    for _ in 0..3000 {
        let (mut host, mut engine) = Host::new();
        host.ask(&[
            frontend::write(8, &[PAGE]),
            frontend::indirect(true, 8, 20, &[5]),
            frontend::flush(0, &[]),
        ]);
        let taken = consume(&mut engine);
        engine.supply(token(&taken[1]), &frontend::pack(&[PAGE; 20])).expect("waits");
        drop(engine);
        for _ in 0..rng.usize(1..6) {
            let at = if rng.bool() { rng.usize(0..40) } else { 1024 + rng.usize(0..32 * 48) } * 4;
            let value = if rng.bool() { rng.u32(0..8) } else { rng.u32(..) };
            host.table.store(at, value).expect("inside");
        }
        match host.recover() {
            Err(_) => refused += 1,
            Ok((mut engine, _)) => {
                served += 1;
                let mut taken = Vec::new();
                let mut segments = Vec::new();
                if engine.consume(100, &mut taken).is_ok() {
                    for taken in &taken {
                        let _ = engine.segments(token(taken), &mut segments);
                        let _ = engine.answer(token(taken), Status::Okay);
                    }
                    let _ = engine.push();
                }
            }
        }
    }
    println!("{refused} refused, {served} served");
    assert!(refused > 300 && served > 300, "the test lost its force: {refused} {served}");
}
