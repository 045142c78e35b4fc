//! A run: sets disks, shards and clients up from the seed, and drives them.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::os::fd::{AsRawFd, OwnedFd};
use std::rc::Rc;
use std::sync::Arc;

use crossbeam::channel::{Receiver, Sender, unbounded};
use formats::raw;
use ring_bridge::nbd::Handoff;

use super::client::{Client, Habits, Life, agree};
use super::file::{BLOCK, Faults, File};
use super::image;
use super::kernel::{Event as Happening, SimKernel, World};
use super::operator::{Order, Place, SimDisk};
use super::oracle::{INITIAL_DATA, Model, pattern};
use super::random::Random;
use super::socket::Socket;
use crate::api::{Backend, CacheMode, Command, DiskId, Envelope, ErrorPolicy, Event, FileKind, ImageFile};
use crate::clock::{MICROSECOND, MILLISECOND, Nanos, SECOND};
use crate::limits::Group;
use crate::ram::{PageSize, RamBudget, RamDisk, RamOutcome, anonymous_backing};
use crate::reactor::{EventSink, Shard, ShardParts};
use crate::stats::{DiskCounters, ShardCounters};
use crate::storage::pool::{CHUNK, Pool};

/// What a run tests; the seed chooses the rest.
#[derive(Debug, Clone, Copy)]
pub struct Plan {
    pub disks: usize,
    pub clients: usize,
    /// Rounds of load, each until all is at rest.
    pub rounds: usize,
    /// Requests of one client in one round.
    pub requests: u64,
    pub faults: bool,
    pub commands: bool,
    /// Bytes of the shards' buffers.
    pub budget: usize,
    pub size_max: u64,
    pub rare_max: u64,
}

/// One run.
pub struct Sim {
    pub world: Rc<RefCell<World>>,
    pub shards: Vec<Shard<SimKernel>>,
    inboxes: Vec<Sender<Envelope>>,
    events: Receiver<(usize, Event)>,
    pub disks: Vec<SimDisk>,
    pub clients: Vec<Client>,
    pub rng: Random,
    pub plan: Plan,
    pub orders: BTreeMap<u64, Order>,
    /// Sizes that disks are to have.
    pub resizes: BTreeMap<usize, u64>,
    next_tag: u64,
    next_id: u64,
    pub group: Arc<Group>,
    /// A test is the operator.
    pub scripted: bool,
    /// Work is being wound up: no more mischief.
    pub closing: bool,
    /// The shard that was told to stop while it still has disks.
    pub stopping: Option<usize>,
    /// Shards whose loop has ended.
    pub stopped: [bool; 2],
    /// How often what happened.
    pub tally: BTreeMap<String, u64>,
}

fn eventfd() -> Arc<OwnedFd> {
    use nix::sys::eventfd::{EfdFlags, EventFd};
    let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
    Arc::new(OwnedFd::from(EventFd::from_flags(flags).expect("an eventfd")))
}

/// A descriptor that stands for a simulated file.
pub fn token() -> OwnedFd {
    std::fs::File::open("/dev/null").expect("/dev/null").into()
}

impl Sim {
    pub fn new(seed: u64, plan: Plan, verbose: bool) -> Sim {
        let mut world = World::new(seed);
        world.verbose = verbose;
        let world = Rc::new(RefCell::new(world));
        let (event_tx, events) = unbounded();
        let (mut shards, mut inboxes) = (Vec::new(), Vec::new());
        for index in 0..2 {
            let pool = Pool::new(plan.budget, plan.budget * 3 + (64 << 20)).expect("address space");
            let memory = vec![pool.range(), (pool.zeroes(), CHUNK)];
            world.borrow_mut().register_shard(index, memory);
            let (tx, inbox) = unbounded();
            inboxes.push(tx);
            shards.push(Shard::new(ShardParts {
                kernel: SimKernel::new(world.clone(), index),
                pool,
                inbox,
                inbox_wake: eventfd(),
                events: EventSink { tx: event_tx.clone(), wake: eventfd(), shard: index },
                counters: Arc::new(ShardCounters::default()),
                table_budget_bytes: 1 << 20,
                fault_commands: true,
            }));
        }
        let mut sim = Sim {
            world,
            shards,
            inboxes,
            events,
            disks: Vec::new(),
            clients: Vec::new(),
            rng: Random::new(seed),
            plan,
            orders: BTreeMap::new(),
            resizes: BTreeMap::new(),
            next_tag: 0,
            next_id: 0,
            group: Arc::new(Group::new("tenant", crate::limits::Limits::default())),
            scripted: false,
            closing: false,
            stopping: None,
            stopped: [false; 2],
            tally: BTreeMap::new(),
        };
        for _ in 0..plan.disks {
            sim.make_disk();
        }
        sim
    }

    /// The number of the next event of the oracle.
    pub fn instant(&mut self) -> u64 {
        let mut world = self.world.borrow_mut();
        world.instant += 1;
        world.instant
    }

    /// Makes a file and attaches it as a disk.
    fn make_disk(&mut self) {
        let rng = &mut self.rng;
        let is_block = rng.chance(200);
        let buffered = !is_block && rng.chance(250);
        let align = if buffered { 1 } else { rng.pick(&[512, 4096]) };
        let mut length = rng.between(1, self.plan.size_max / BLOCK) * BLOCK;
        if is_block {
            length = length.max(align);
        } else if rng.chance(500) {
            // A tail behind the last whole block.
            length += rng.between(1, BLOCK - 1);
        }
        let size = raw::served_size(length).expect("a small file");
        let index = self.disks.len();
        let mut file = File::new(index, length, size, rng);
        file.align = align;
        file.memory_align = if buffered { 1 } else { rng.pick(&[512, 4096]) };
        file.is_block = is_block;
        file.can_punch = !rng.chance(200);
        file.can_zero = !rng.chance(200);
        // Two disks may share a store.
        file.store = if rng.chance(300) { 1 } else { 100 + self.disks.len() as u64 };
        file.cannot_tell = rng.chance(100);
        let punts = rng.chance(100);
        let mut model = Model::new(size);
        for block in 0..file.allocated.len() as u64 {
            let (start, end) = (block * BLOCK, ((block + 1) * BLOCK).min(length));
            if file.allocated[block as usize] && end > start {
                pattern(INITIAL_DATA, start, &mut file.data[start as usize..end as usize]);
                model.set_initial(start, end);
            }
        }
        file.durable.clone_from(&file.data);
        let cache = match buffered {
            false => CacheMode::None,
            true => rng.pick(&[CacheMode::Writeback, CacheMode::Writethrough]),
        };
        let kind = if is_block { FileKind::Block { discard: rng.chance(500) } } else { FileKind::Regular };
        let tail = (!buffered && !is_block && !length.is_multiple_of(align.max(4096))).then(token);
        let image = Arc::new(ImageFile {
            fd: token(),
            tail,
            offset_align: align as u32,
            memory_align: file.memory_align as u32,
            cache,
            kind,
            length,
            length_now: length.into(),
            punts,
            store: file.store,
        });
        let policy =
            |rng: &mut Random| rng.pick(&[ErrorPolicy::Pause, ErrorPolicy::Report, ErrorPolicy::Report]);
        let (on_error, on_enospc) = (policy(rng), policy(rng));
        let read_only = rng.chance(50);
        let mut world = self.world.borrow_mut();
        let number = world.files.len();
        world.files.push(file);
        world.register_file(image.fd.as_raw_fd(), number, !buffered);
        if let Some(tail) = &image.tail {
            world.register_file(tail.as_raw_fd(), number, false);
        }
        drop(world);
        let mut disk = SimDisk::new(image, size, model, on_error, on_enospc, read_only);
        if self.rng.chance(150) {
            self.put_into_memory(&mut disk);
        }
        self.disks.push(disk);
        if !read_only && size <= image::SIZE_MAX && self.rng.chance(300) {
            for _ in 0..self.rng.between(1, 2) {
                if let Some(chain) = self.overlay(index) {
                    self.disks[index].backend = Backend::Image(chain);
                }
            }
        }
        self.attach(index);
    }

    /// Makes a disk one of memory: a RAM disk, or one that forgets.
    fn put_into_memory(&mut self, disk: &mut SimDisk) {
        disk.model = Model::new(disk.size);
        if self.rng.chance(300) {
            disk.model.forgets = true;
            disk.backend = Backend::Null;
            return;
        }
        let file = anonymous_backing("sim", disk.size, PageSize::Base).expect("a memfd");
        let budget = Arc::new(RamBudget::new(1 << 40));
        let ram = RamDisk::create(file, "sim", disk.size, PageSize::Base, budget).expect("a RAM disk");
        if self.plan.faults {
            ram.invent_rival(self.rng.next(), self.rng.pick(&[0, 20, 300, 600]));
        }
        disk.backend = Backend::Ram(ram);
    }

    /// What a disk holds when nothing is in flight.
    fn contents(&self, index: usize) -> Vec<u8> {
        let disk = &self.disks[index];
        match &disk.backend {
            Backend::File(file) => self.world.borrow().file_behind(file.fd.as_raw_fd()).data.clone(),
            Backend::Image(chain) => {
                let all = 0..disk.size;
                image::contents(&self.world.borrow(), chain, false, &[all]).remove(0)
            }
            Backend::Ram(ram) => {
                let mut bytes = vec![0; disk.size as usize];
                for (number, piece) in bytes.chunks_mut(64 << 10).enumerate() {
                    assert_eq!(ram.read(number as u64 * (64 << 10), piece), RamOutcome::Done);
                }
                bytes
            }
            Backend::Null => vec![0; disk.size as usize],
        }
    }

    /// Attaches a disk to one of the shards.
    pub fn attach(&mut self, disk: usize) {
        self.next_id += 1;
        let id = DiskId(self.next_id);
        let shard = self.stopping.map_or(self.rng.below(2) as usize, |stopping| 1 - stopping);
        let now = self.instant();
        let d = &mut self.disks[disk];
        d.attach(id, shard, now);
        d.counters = Arc::new(DiskCounters::default());
        let config = d.config(disk);
        self.command(disk, shard, Command::AddDisk(Box::new(config)), super::operator::Kind::Add);
    }

    /// Counts something, so that the tests can tell that it happens at all.
    pub fn count(&mut self, what: impl Into<String>) {
        *self.tally.entry(what.into()).or_default() += 1;
    }

    /// Sends a command of a disk to a shard.
    pub fn command(&mut self, disk: usize, shard: usize, command: Command, kind: super::operator::Kind) {
        self.next_tag += 1;
        let tag = self.next_tag;
        let mut world = self.world.borrow_mut();
        world.say(format_args!("operator: disk {disk} shard {shard}: {kind:?} (tag {tag})"));
        world.trace([4, disk as u64, kind as u64]);
        self.inboxes[shard].send(Envelope { tag, command }).expect("the shard is there");
        world.wake(shard);
        self.orders.insert(tag, Order { disk, kind });
    }

    /// One more client of a disk.
    pub fn connect(&mut self, disk: usize) {
        let d = &self.disks[disk];
        let Place::Shard(shard) = d.place else { return };
        let (size, read_only, id) = (d.size, d.read_only, d.id);
        let habits = self.habits(size);
        let rng = &mut self.rng;
        let room = rng.pick(&[4 << 10, 64 << 10, 256 << 10]);
        let number = self.clients.len();
        let faults = if self.plan.faults { 10 } else { 0 };
        let (socket, fd) = Socket::pair(number, room, faults);
        let agreed = agree(size, read_only, rng.below(3));
        let seed = rng.next();
        let sock = self.world.borrow_mut().register_socket(fd.as_raw_fd(), socket);
        let mut client = Client::new(disk, sock, agreed, habits, seed);
        client.budget = self.rng.between(1, self.plan.requests) as u32;
        // Some bytes may have come along with the negotiation.
        let mut unread = Vec::new();
        if self.rng.chance(200) {
            let now = self.instant();
            client.ask(&mut self.disks[disk].model, now);
            let step = client.outbox.len().min(self.rng.between(1, 4096) as usize);
            unread.extend(client.outbox.drain(..step));
        }
        let handoff =
            Handoff { fd, unread, transmission: agreed, tls: None, peer: format!("client {number}") };
        self.clients.push(client);
        let command = Command::Connect { disk: id, handoff: Box::new(handoff) };
        self.command(disk, shard, command, super::operator::Kind::Connect);
        self.world.borrow_mut().wake_client(number);
    }

    fn habits(&mut self, size: u64) -> Habits {
        let rng = &mut self.rng;
        let align = rng.pick(&[1, 512, 512, 4096]).min(size);
        let window = if rng.chance(500) {
            (0, size / align * align)
        } else {
            let len = (rng.between(1, 16) * BLOCK).min(size) / align * align;
            let start = rng.below((size - len) / align + 1) * align;
            (start, start + len)
        };
        let reads_only = rng.chance(150);
        Habits {
            depth: rng.pick(&[1, 2, 4, 16, 64, 128]),
            align,
            usual_max: rng.pick(&[4096, 16 << 10, 64 << 10]),
            rare_max: rng.pick(&[64 << 10, 512 << 10, self.plan.rare_max]),
            write: if reads_only { 0 } else { rng.between(100, 600) },
            flush: rng.between(0, 100),
            erase: if reads_only { 0 } else { rng.between(0, 150) },
            status: rng.between(0, 60),
            fua: rng.pick(&[0, 50, 300]),
            bad: rng.pick(&[0, 0, 50]),
            step: rng.pick(&[40, 4096, 64 << 10, 1 << 20, 1 << 20]),
            window,
        }
    }

    // ---- the loop ----

    /// Lets both shards turn until they would block, and hears what they say.
    pub fn turn_shards(&mut self) {
        loop {
            let mut turned = false;
            for index in 0..2 {
                for count in 0.. {
                    if self.stopped[index] {
                        break;
                    }
                    assert!(count < 5_000, "shard {index} turns without end");
                    match self.shards[index].turn() {
                        Ok(true) => {}
                        Ok(false) => {
                            let told = self.stopping == Some(index)
                                || self.disks.iter().all(|disk| matches!(disk.place, Place::Absent));
                            assert!(told, "ended unasked");
                            self.stopped[index] = true;
                            self.world.borrow_mut().forget_timer(index);
                            break;
                        }
                        Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => break,
                        Err(error) => panic!("shard {index}: {error}"),
                    }
                    turned = true;
                    let mut world = self.world.borrow_mut();
                    world.now += world.rng.between(1, 20) * MICROSECOND;
                }
            }
            self.hear();
            if !turned {
                self.audit();
                return;
            }
        }
    }

    /// Every counter of a budget must be what it counts.
    fn audit(&mut self) {
        for (index, shard) in self.shards.iter().enumerate() {
            if let Err(message) = shard.audit() {
                self.describe();
                panic!("shard {index}: {message}");
            }
        }
        if self.shards.iter().any(|shard| shard.carried() > 0) {
            self.count("carried data wait for a buffer");
        }
    }

    fn hear(&mut self) {
        let mut closed = false;
        self.note_failed_syncs();
        while let Ok((shard, event)) = self.events.try_recv() {
            closed |= matches!(event, Event::ClientGone { .. } | Event::Reply { .. });
            self.on_event(shard, event);
        }
        if closed {
            self.world.borrow_mut().notice_closed();
        }
        for disk in &mut self.disks {
            disk.sync_failed_now = false;
        }
    }

    /// Runs until nothing is left to happen.
    pub fn run_to_rest(&mut self) {
        let start = self.world.borrow().now;
        for step in 0.. {
            assert!(step < 5_000_000, "the run does not come to rest");
            self.turn_shards();
            if self.world.borrow().is_quiet() {
                self.check_quiet();
                if !self.world.borrow().has_events() && self.throttled() == 0 {
                    return;
                }
            }
            // Several things may happen while a shard sleeps or works.
            for _ in 0..self.rng.pick(&[1, 1, 1, 2, 5]) {
                let next = self.world.borrow_mut().next();
                if let Some(event) = next {
                    self.happen(event);
                }
                if self.world.borrow().is_quiet() {
                    break;
                }
            }
            let spent = self.world.borrow().now - start;
            if spent >= 4_000 * SECOND {
                self.describe();
            }
            assert!(spent < 4_000 * SECOND, "no rest after {} virtual seconds", spent / SECOND);
        }
    }

    pub fn throttled(&self) -> u64 {
        self.disks.iter().map(|disk| disk.counters.throttled_now.get()).sum()
    }

    pub fn happen(&mut self, event: Happening) {
        match event {
            Happening::Client(client) => self.act(client),
            Happening::Read(client) => {
                (self.clients[client].deaf, self.clients[client].mute) = (false, false);
                self.world.borrow_mut().wake_client(client);
            }
            Happening::Operator(disk) => self.operate(disk),
            Happening::Buffers(shard) => {
                self.shards[shard].give_buffers_back();
                self.world.borrow_mut().wake(shard);
            }
            _ => {}
        }
    }

    /// Runs everything. Panics when a rule is broken.
    pub fn run(&mut self) -> u64 {
        self.run_to_rest();
        for _ in 0..self.plan.clients {
            let disk = self.rng.below(self.disks.len() as u64) as usize;
            self.connect(disk);
        }
        for round in 0..self.plan.rounds {
            self.world.borrow().say(format_args!("---- round {round}"));
            self.begin_round();
            self.run_to_rest();
        }
        self.world.borrow().say(format_args!("---- end"));
        self.wind_up();
        self.world.borrow().trace_hash()
    }

    fn begin_round(&mut self) {
        if self.rng.chance(60) {
            self.stop_a_shard();
        }
        for disk in 0..self.disks.len() {
            let faults =
                if self.plan.faults && self.rng.chance(700) { self.faults() } else { Faults::default() };
            self.world.borrow_mut().files_of(disk).for_each(|file| file.faults = faults);
            self.disks[disk].lost_requests = false;
            if self.plan.commands {
                for _ in 0..self.rng.below(5) {
                    let after = self.rng.below(20) * self.rng.below(3 * MILLISECOND) + 1;
                    self.world.borrow_mut().schedule(after, Happening::Operator(disk));
                }
            }
        }
        for number in 0..self.clients.len() {
            if self.clients[number].life == Life::Talks {
                self.clients[number].budget += self.rng.between(1, self.plan.requests) as u32;
                let after: Nanos = self.rng.below(2 * MILLISECOND);
                self.world.borrow_mut().schedule(after, Happening::Client(number));
            }
        }
        while self.clients.iter().filter(|client| client.life == Life::Talks).count() < self.plan.clients {
            let disk = self.rng.below(self.disks.len() as u64) as usize;
            let before = self.clients.len();
            self.connect(disk);
            if self.clients.len() == before {
                break;
            }
        }
    }

    /// Tells a shard that has disks to stop: it serves them to their end, and takes no others.
    fn stop_a_shard(&mut self) {
        let shard = self.rng.below(2) as usize;
        let ours = |disk: &SimDisk| matches!(disk.place, Place::Shard(at) if at == shard);
        if self.plan.commands && self.stopping.is_none() && self.disks.iter().any(ours) {
            self.stopping = Some(shard);
            self.send_stop(shard);
        }
    }

    fn send_stop(&mut self, shard: usize) {
        let stop = Envelope { tag: 0, command: Command::Stop };
        self.inboxes[shard].send(stop).expect("the shard is there");
        self.world.borrow_mut().wake(shard);
    }

    fn faults(&mut self) -> Faults {
        let rng = &mut self.rng;
        let mut some = |list: &[u64]| rng.pick(list);
        Faults {
            eio: some(&[0, 0, 5, 30]),
            enospc: some(&[0, 0, 0, 20]),
            short: some(&[0, 50, 200]),
            again: some(&[0, 10, 50]),
            wait: some(&[0, 20, 300]),
            slow: some(&[0, 10, 50]),
            sync: some(&[0, 0, 100]),
            side: some(&[0, 0, 50]),
        }
    }

    /// Heals everything, compares every byte, detaches every disk and looks for leaks.
    fn wind_up(&mut self) {
        self.closing = true;
        for disk in 0..self.disks.len() {
            self.world.borrow_mut().files_of(disk).for_each(|file| file.faults = Faults::default());
            if let Backend::Ram(ram) = &self.disks[disk].backend {
                ram.invent_rival(0, 0);
                if ram.rivals_met() > 0 {
                    self.count("a RAM disk met another shard");
                }
            }
        }
        self.run_to_rest();
        self.settle_orphans();
        let now = self.instant();
        for (index, disk) in self.disks.iter().enumerate() {
            let everything = disk.model.snapshot(now, 0, disk.size);
            if let Err(message) = disk.model.check_read(&everything, 0, &self.contents(index)) {
                self.describe();
                panic!("the file of disk {index} in the end: {message}");
            }
        }
        for disk in 0..self.disks.len() {
            self.detach(disk);
        }
        self.run_to_rest();
        for (index, shard) in self.shards.iter().enumerate() {
            assert_eq!(
                shard.outstanding(),
                (0, 0, 0),
                "shard {index} leaks (requests, operations, buffer bytes)"
            );
        }
        for index in 0..2 {
            self.send_stop(index);
        }
        self.run_to_rest();
        assert_eq!(self.stopped, [true; 2], "the shards did not stop");
        assert!(self.orders.is_empty(), "commands without a reply: {:?}", self.orders);
    }

    /// What a person needs to see when a rule is broken.
    pub fn describe(&self) {
        for (index, shard) in self.shards.iter().enumerate() {
            eprintln!("shard {index}: {:?} requests, operations, bytes out", shard.outstanding());
        }
        if self.world.borrow().verbose {
            for shard in &self.shards {
                shard.describe();
            }
        }
        eprintln!("commands without a reply: {:?}", self.orders);
        for (index, disk) in self.disks.iter().enumerate() {
            eprintln!(
                "disk {index}: {:?} {:?} paused {} error {} failed {} zombie {} {:?} {:?} limits {:?} io {} throttled {}",
                disk.id,
                disk.place,
                disk.paused,
                disk.storage_error,
                disk.failed,
                disk.zombie,
                disk.on_error,
                disk.on_enospc,
                disk.limits,
                disk.counters.io_now.get(),
                disk.counters.throttled_now.get(),
            );
        }
        for (number, client) in self.clients.iter().enumerate().filter(|(_, c)| c.life != Life::Gone) {
            eprintln!(
                "client {number}: disk {} {:?} asked {}",
                client.disk,
                client.habits,
                client.asked.len()
            );
        }
    }
}
