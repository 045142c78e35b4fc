//! Goal: a backend that dies after any single store, however often, loses no request and answers none twice.
//! Method: the real engine over memory that counts stores and, at a random one, lets nothing more through (a copy may stop in its
//! middle); the frontend acts between the stores; a new engine recovers and the run goes on. Three engines that are known to be wrong are run
//! too, made by losing a certain store or by forgetting the table: they have to fail, or this test could not.

mod blkif_rig;

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::rc::Rc;

use blkif_rig::{Pages, Server, identity, limits, shared, table};
use fastrand::Rng;
use ring_bridge::blkif::frontend::{self, Completion, Frontend};
use ring_bridge::blkif::inflight::Table;
use ring_bridge::blkif::request::{Limits, Status};
use ring_bridge::blkif::ring::{Ring, RingError, StopReason, Taken};
use ring_bridge::blkif::wire::{Abi, WireSegment, entries};
use ring_bridge::memory::{MemoryError, RingMemory, SharedRegion};

const SEGMENTS_MAX: u16 = 40;
/// Pages and sectors of the disk that belong to one index of the frontend.
const SHARE: u32 = 48;

/// Which engine is run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Engine {
    /// The real one.
    Real,
    /// Recovery does not store `req_cons`.
    ForgetsReqCons,
    /// Recovery leaves R where it has to store D.
    KeepsOldIndex,
    /// Begins at `rsp_prod` with an empty table.
    Naive,
}

/// The frontend, which sees every moment of the backend.
struct Guest {
    front: Frontend<SharedRegion>,
    rng: Rng,
    stop: bool,
    /// Expected bytes per index, and what is pending: (write, segments, byte written).
    model: Vec<u8>,
    pending: Vec<Option<(u8, usize, u8)>>,
    issued: u64,
    answered: u64,
    failed: Option<String>,
}

impl Guest {
    fn step(&mut self, pages: &mut Pages) {
        if self.failed.is_some() {
            return;
        }
        if self.rng.u32(0..10) < 8 {
            self.poll(pages);
        }
        let mut any = false;
        while !self.stop && self.front.free() > 0 && self.rng.u32(0..10) < 6 {
            self.submit(pages);
            any = true;
        }
        if any {
            self.front.publish().expect("publish");
        }
    }

    fn poll(&mut self, pages: &mut Pages) {
        let mut completions = Vec::new();
        let polled = self.front.poll(&mut completions);
        for completion in completions {
            self.complete(completion, pages);
        }
        if let Err(fault) = polled {
            self.failed = Some(fault.to_string());
        }
    }

    fn complete(&mut self, completion: Completion, pages: &mut Pages) {
        let index = usize::from(completion.index);
        let Some((operation, segments, byte)) = self.pending[index].take() else {
            self.failed = Some("answered twice".into());
            return;
        };
        self.answered += 1;
        if completion.status != Status::Okay {
            self.failed = Some(format!("operation {operation} ended with {:?}", completion.status));
        }
        let bytes = &mut self.model[index * SHARE as usize * 512..][..segments * 512];
        match operation {
            0 => {
                for (i, sector) in bytes.chunks(512).enumerate() {
                    let page = &pages.0[(index * SHARE as usize + i) * 4096..];
                    if page[..512] != *sector {
                        self.failed = Some(format!("a read found {} for {}", page[0], sector[0]));
                    }
                }
            }
            5 => bytes.fill(0),
            _ => bytes.fill(byte),
        }
    }

    /// Submits a request to the sectors and pages of the index that it will have: the next free one.
    fn submit(&mut self, pages: &mut Pages) {
        let kind = self.rng.u32(0..16);
        let count = match kind {
            0..=2 => self.rng.u32(12..=u32::from(SEGMENTS_MAX)),
            3 => 0,
            _ => self.rng.u32(1..=11),
        };
        let operation = match kind {
            3 => self.rng.u8(2..=3),
            4 => 5,
            5 => self.rng.u8(2..=3),
            _ => self.rng.u8(0..=1),
        };
        let share = u32::from(self.front.next_index().expect("one is free")) * SHARE;
        let sector = u64::from(share);
        let byte = self.rng.u8(..);
        let segments: Vec<WireSegment> =
            (0..count).map(|i| WireSegment { gref: share + i, first: 0, last: 0 }).collect();
        for segment in &segments {
            pages.0[segment.gref as usize * 4096..][..512].fill(byte);
        }
        let message = match operation {
            5 => frontend::discard(sector, u64::from(count), self.rng.bool()),
            _ if count > 11 => {
                let gref = share + SHARE - 1;
                pages.store(gref, &frontend::pack(&segments));
                frontend::indirect(operation == 1, sector, count as u16, &[gref])
            }
            _ => frontend::direct(operation, sector, &segments),
        };
        let index = self.front.submit(message, &segments).expect("inside").expect("one is free");
        assert_eq!(u32::from(index) * SHARE, share);
        self.pending[usize::from(index)] = Some((operation, count as usize, byte));
        self.issued += 1;
    }
}

/// Everything that outlives the backend, and the moment of its death.
struct World {
    guest: RefCell<Guest>,
    pages: RefCell<Pages>,
    rng: RefCell<Rng>,
    armed: Cell<bool>,
    dead: Cell<bool>,
    recovering: Cell<bool>,
    engine: Engine,
    stores: Cell<u64>,
}

/// Memory whose stores end when the backend dies. `lost` holds stores that a wrong engine only believes to have made.
struct Seam {
    memory: Rc<SharedRegion>,
    is_table: bool,
    world: Rc<World>,
    lost: RefCell<HashMap<usize, u32>>,
}

impl Seam {
    /// After every store: the guest acts, and perhaps this was the last one.
    fn after(&self) {
        let world = &self.world;
        world.stores.set(world.stores.get() + 1);
        if world.rng.borrow_mut().u32(0..10) < 3 {
            world.guest.borrow_mut().step(&mut world.pages.borrow_mut());
        }
        if world.armed.get() && world.rng.borrow_mut().u32(0..100) < 3 {
            world.dead.set(true);
        }
    }

    fn loses(&self, offset: usize, value: u32) -> bool {
        let slot = offset >= 4096 && (offset - 4096).is_multiple_of(192);
        self.is_table
            && self.world.recovering.get()
            && match self.world.engine {
                Engine::ForgetsReqCons => offset == 128,
                Engine::KeepsOldIndex => slot && value == 3,
                Engine::Real | Engine::Naive => false,
            }
    }
}

impl RingMemory for Seam {
    fn len(&self) -> usize {
        self.memory.len()
    }

    fn load(&self, offset: usize) -> Result<u32, MemoryError> {
        match self.lost.borrow().get(&offset) {
            Some(value) => Ok(*value),
            None => self.memory.load(offset),
        }
    }

    fn store(&self, offset: usize, value: u32) -> Result<(), MemoryError> {
        if self.world.dead.get() {
            return Ok(());
        }
        self.lost.borrow_mut().remove(&offset);
        if self.loses(offset, value) {
            self.lost.borrow_mut().insert(offset, value);
        } else {
            self.memory.store(offset, value)?;
        }
        self.after();
        Ok(())
    }

    fn copy_out(&self, offset: usize, dst: &mut [u8]) -> Result<(), MemoryError> {
        self.memory.copy_out(offset, dst)
    }

    fn copy_in(&self, offset: usize, src: &[u8]) -> Result<(), MemoryError> {
        let world = &self.world;
        if world.dead.get() {
            return Ok(());
        }
        // A copy of this program replaces a slot's state as well: what is believed of it ends.
        self.lost.borrow_mut().remove(&offset);
        if world.armed.get() && world.rng.borrow_mut().u32(0..200) < 3 {
            let part = world.rng.borrow_mut().usize(0..src.len());
            self.memory.copy_in(offset, &src[..part])?;
            world.dead.set(true);
            return Ok(());
        }
        self.memory.copy_in(offset, src)?;
        self.after();
        Ok(())
    }
}

/// The backend: lives from one crash to the next.
struct Backend {
    ring: Ring<Seam, Seam>,
    server: Server,
}

struct Run {
    world: Rc<World>,
    ring: Rc<SharedRegion>,
    table: Rc<SharedRegion>,
    disk: Vec<u8>,
    abi: Abi,
    ring_pages: u32,
    crashes: u64,
    first: bool,
}

impl Run {
    fn new(seed: u64, engine: Engine, pages: Pages) -> Run {
        let mut rng = Rng::with_seed(seed);
        let abi = if rng.bool() { Abi::X86_64 } else { Abi::X86_32 };
        let index = if rng.bool() { 0 } else { u32::MAX - rng.u32(0..600) };
        let ring_pages = rng.u32(1..=2);
        let (theirs, ours) = shared(ring_pages as usize * 4096);
        let entries = entries(ring_pages).expect("1 or 2") as usize;
        let guest = Guest {
            front: Frontend::create(theirs, abi, ring_pages, index).expect("ring"),
            rng: rng.fork(),
            stop: false,
            model: vec![0; entries * SHARE as usize * 512],
            pending: vec![None; entries],
            issued: 0,
            answered: 0,
            failed: None,
        };
        let world = World {
            guest: RefCell::new(guest),
            pages: RefCell::new(pages),
            rng: RefCell::new(rng),
            armed: Cell::new(false),
            dead: Cell::new(false),
            recovering: Cell::new(false),
            engine,
            stores: Cell::new(0),
        };
        let (ring, table) = (Rc::new(ours), Rc::new(table(ring_pages, SEGMENTS_MAX)));
        let disk = vec![0; entries * SHARE as usize * 512];
        let (world, crashes, first) = (Rc::new(world), 0, true);
        Run { world, ring, table, disk, abi, ring_pages, crashes, first }
    }

    fn seam(&self, memory: &Rc<SharedRegion>, is_table: bool) -> Seam {
        Seam { memory: memory.clone(), is_table, world: self.world.clone(), lost: RefCell::default() }
    }

    /// Starts a backend, until one survives its start.
    fn start(&mut self) -> Result<Backend, StopReason> {
        loop {
            self.world.dead.set(false);
            let (ring, memory) = (self.seam(&self.ring, false), self.seam(&self.table, true));
            let limits =
                Limits { indirect_segments_max: SEGMENTS_MAX, ..limits(self.disk.len() as u64 / 512) };
            let table = Table::open(memory);
            // A table whose making a crash cut short belongs to a ring that was not served yet.
            let ring = match table {
                Ok(table) if self.world.engine != Engine::Naive => {
                    self.first = false;
                    self.world.recovering.set(true);
                    Ring::recover(ring, table, limits).map(|(ring, _)| ring)
                }
                _ => {
                    assert!(self.first || self.world.engine == Engine::Naive, "the table was lost");
                    let memory = self.seam(&self.table, true);
                    Ring::attach(ring, memory, identity(self.abi, self.ring_pages, SEGMENTS_MAX), limits)
                }
            };
            self.world.recovering.set(false);
            if !self.world.dead.get() {
                return Ok(Backend { ring: ring?, server: Server::default() });
            }
            self.crashes += 1;
        }
    }

    /// One turn of a backend; what it does after its death is not real.
    fn turn(&mut self, backend: &mut Backend) -> Result<(), RingError> {
        let world = self.world.clone();
        let budget = world.rng.borrow_mut().usize(1..8);
        let Backend { ring, server } = backend;
        // The guest acts inside the engine's stores, so its pages are not borrowed across a call of the engine.
        let mut taken = Vec::new();
        ring.consume(budget, &mut taken)?;
        for taken in taken {
            if world.dead.get() {
                return Ok(());
            }
            match taken {
                Taken::Run(request) => server.running.push(request),
                Taken::Fetch(fetch) => {
                    let bytes = world.pages.borrow().fetch(&fetch).expect("honest");
                    server.running.extend(ring.supply(fetch.token, &bytes)?);
                }
            }
        }
        let mut segments = Vec::new();
        let answers = world.rng.borrow_mut().u32(0..5);
        for _ in 0..answers {
            if world.dead.get() || server.running.is_empty() {
                break;
            }
            let at = world.rng.borrow_mut().usize(0..server.running.len());
            let request = server.running.swap_remove(at);
            ring.segments(request.token, &mut segments)?;
            let status =
                blkif_rig::execute(&mut self.disk, &mut world.pages.borrow_mut(), &request, &segments);
            // The process may die here, after the I/O and before the answer.
            ring.answer(request.token, status)?;
        }
        ring.push()?;
        Ok(())
    }

    /// The whole run. `Err`: what went wrong.
    fn run(&mut self, turns: usize) -> Result<(), String> {
        self.world.armed.set(true);
        let mut backend = self.start().map_err(|reason| reason.to_string())?;
        for turn in 0..turns {
            self.world.armed.set(turn < turns - 60);
            self.world.guest.borrow_mut().step(&mut self.world.pages.borrow_mut());
            self.step(&mut backend)?;
        }
        self.world.armed.set(false);
        self.world.guest.borrow_mut().stop = true;
        for _ in 0..400 {
            self.world.guest.borrow_mut().poll(&mut self.world.pages.borrow_mut());
            self.step(&mut backend)?;
        }
        let guest = self.world.guest.borrow();
        if guest.issued != guest.answered {
            return Err(format!("lost: {} issued, {} answered", guest.issued, guest.answered));
        }
        if guest.model != self.disk {
            return Err("the disk is not what the guest was told".into());
        }
        Ok(())
    }

    fn step(&mut self, backend: &mut Backend) -> Result<(), String> {
        let turned = self.turn(backend);
        if self.world.dead.get() {
            self.crashes += 1;
            *backend = self.start().map_err(|reason| reason.to_string())?;
        } else {
            turned.map_err(|error| error.to_string())?;
        }
        self.world.guest.borrow().failed.clone().map_or(Ok(()), Err)
    }
}

/// Runs `seeds` seeds; returns (failed, crashes, requests, first failure).
fn runs(engine: Engine, seeds: u64) -> (u64, u64, u64, Option<String>) {
    let (mut failed, mut crashes, mut requests, mut first) = (0, 0, 0, None);
    let mut pages = Pages::new(64 * SHARE as usize);
    for seed in 0..seeds {
        let mut run = Run::new(seed, engine, pages);
        let result = run.run(160);
        if let Err(what) = result {
            failed += 1;
            first.get_or_insert(format!("seed {seed}: {what}"));
        }
        crashes += run.crashes;
        requests += run.world.guest.borrow().issued;
        pages = Pages(std::mem::take(&mut run.world.pages.borrow_mut().0));
    }
    println!("{engine:?}: {seeds} runs, {failed} failed, {crashes} crashes, {requests} requests; {first:?}");
    (failed, crashes, requests, first)
}

#[test]
fn every_request_is_answered_once_whenever_the_backend_dies() {
    let seeds = std::env::var("BLKIF_CRASH_SEEDS").ok().and_then(|s| s.parse().ok()).unwrap_or(2000);
    let (failed, crashes, requests, first) = runs(Engine::Real, seeds);
    assert_eq!(failed, 0, "{first:?}");
    assert!(crashes > 20 * seeds && requests > 60 * seeds, "the test lost its force: {crashes}, {requests}");
}

#[test]
fn an_engine_that_does_not_store_req_cons_first_is_caught() {
    assert!(runs(Engine::ForgetsReqCons, 100).0 > 0);
}

#[test]
fn an_engine_that_keeps_old_response_indices_is_caught() {
    assert!(runs(Engine::KeepsOldIndex, 100).0 > 0);
}

#[test]
fn an_engine_without_a_table_is_caught() {
    assert!(runs(Engine::Naive, 100).0 > 0);
}
