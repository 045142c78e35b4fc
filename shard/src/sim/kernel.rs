//! The simulated kernel: virtual clock, operations that end after random times in random order, faults, sockets.
//!
//! One [`World`] is shared by the shards of a run and by the driver, which takes the events of [`World::next`] one by one and
//! lets the shards turn. What Linux would let pass or punish with corruption is a panic here: memory outside of the
//! shard's buffers, a buffer that changes while an operation uses it, an operation on a descriptor that is closed or frozen,
//! two operations with the same user data, more punted operations than the design allows.

use std::cell::RefCell;
use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, HashMap, HashSet, VecDeque};
use std::os::fd::RawFd;
use std::rc::Rc;

use super::file::{File, Writeback};
use super::memory;
use super::random::{Random, mix};
use super::socket::{Gone, Socket};
use crate::clock::{MICROSECOND, Nanos, SECOND};
use crate::storage::side::{SideCall, SideDone, SideJob};
use crate::storage::{Completion, Kernel, Op, TIMER};

/// Something that happens at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Event {
    /// A kernel operation ends, or a socket operation tries to.
    Op(u64),
    /// A cancel reaches its target.
    Cancel(u64),
    /// A side job ends.
    Side(u64),
    /// The inbox of a shard becomes readable.
    Inbox(usize),
    /// The ports of a shard's guests become readable.
    Ports(usize),
    /// A client may act.
    Client(usize),
    /// The operator acts on a disk.
    Operator(usize),
    /// The store of a disk answers again.
    Release(usize),
    /// A shard whose address space for buffers was spent has some again.
    Buffers(usize),
    /// A client that had stopped reads again.
    Read(usize),
}

impl Event {
    /// Whether the event is a part of the machinery: when none of these is to come, all that can be done is done.
    fn is_active(self) -> bool {
        !matches!(self, Event::Operator(_) | Event::Release(_) | Event::Read(_))
    }
}

/// Why a file operation failed, for the oracle.
#[derive(Debug, Clone, Copy)]
pub struct Failure {
    pub file: usize,
    /// Number of the oracle's event at which it was decided.
    pub at: u64,
    pub what: What,
    pub start: u64,
    pub end: u64,
    pub errno: i32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum What {
    Read,
    Write,
    Sync,
    Space,
    Extents,
}

#[derive(Debug)]
pub(super) enum InFlight {
    File(FileOp),
    Recv { sock: usize, ranges: Vec<(usize, usize)>, scheduled: bool },
    Send { sock: usize, ranges: Vec<(usize, usize)>, done: usize, scheduled: bool },
    Poll,
    Cancel { target: u64 },
}

#[derive(Debug)]
pub(super) struct FileOp {
    pub(super) file: usize,
    pub(super) op: Op,
    /// Bytes moved when the operation was started; the rest when it ends.
    pub(super) early: u64,
    pub(super) result: i32,
    /// Bytes that the operation moves: of a failed write some may have landed.
    pub(super) moves: u64,
    pub(super) writeback: Writeback,
    /// Hash of the memory of a write or of the junk in the memory of a read.
    pub(super) seal: u64,
    pub(super) held: bool,
    pub(super) failure: Option<Failure>,
    /// May take a worker of this shard's kernel for this store.
    pub(super) punted: Option<(usize, u64)>,
}

#[derive(Debug)]
pub(super) struct Running {
    pub(super) shard: usize,
    pub(super) user_data: u64,
    pub(super) what: InFlight,
}

#[derive(Debug)]
pub(super) struct Side {
    pub(super) shard: usize,
    pub(super) user_data: u64,
    pub(super) file: usize,
    pub(super) call: SideCall,
    pub(super) held: bool,
}

#[derive(Debug, Default)]
pub(super) struct Lane {
    pub(super) completions: VecDeque<Completion>,
    pub(super) side_done: VecDeque<SideDone>,
    pub(super) timer: Option<Nanos>,
    pub(super) poll: Option<u64>,
    /// The poll of the ports of guests, and whether its event is to come.
    ports: Option<u64>,
    ports_due: bool,
    pub(super) wake: bool,
    /// Address ranges of the shard's buffers, and of its zeroes.
    pub(super) memory: Vec<(usize, usize)>,
    pub(super) user_data: HashSet<u64>,
    pub(super) enters: u64,
}

/// Clock, files, sockets and everything in flight.
#[derive(Debug)]
pub struct World {
    pub now: Nanos,
    pub rng: Random,
    heap: BinaryHeap<Reverse<(Nanos, u64, Event)>>,
    active: usize,
    pub(super) sequence: u64,
    pub files: Vec<File>,
    pub sockets: Vec<Socket>,
    pub(super) descriptors: HashMap<RawFd, Target>,
    pub(super) running: BTreeMap<u64, Running>,
    pub(super) sides: BTreeMap<u64, Side>,
    pub(super) lanes: [Lane; 2],
    pub(super) clients_due: HashSet<usize>,
    /// Operations out that may take a worker, by shard and store.
    pub(super) punted: HashMap<(usize, u64), u32>,
    /// Failed operations: those that the judge has noted, and new ones.
    pub failures: Vec<Failure>,
    pub new_failures: Vec<Failure>,
    /// Number of the oracle's events so far.
    pub instant: u64,
    trace: u64,
    /// Print what happens.
    pub verbose: bool,
}

#[derive(Debug, Clone, Copy)]
pub(super) enum Target {
    /// A file, and whether by O_DIRECT.
    File(usize, bool),
    Socket(usize),
}

impl World {
    pub fn new(seed: u64) -> World {
        World {
            now: 1_000 * SECOND,
            rng: Random::new(seed ^ 0x5157_u64),
            heap: BinaryHeap::new(),
            active: 0,
            sequence: 0,
            files: Vec::new(),
            sockets: Vec::new(),
            descriptors: HashMap::new(),
            running: BTreeMap::new(),
            sides: BTreeMap::new(),
            lanes: Default::default(),
            clients_due: HashSet::new(),
            punted: HashMap::new(),
            failures: Vec::new(),
            new_failures: Vec::new(),
            instant: 0,
            trace: 0,
            verbose: false,
        }
    }

    /// Adds a fact to the trace, whose hash identifies the run.
    pub fn trace(&mut self, facts: [u64; 3]) {
        for fact in facts.into_iter().chain([self.now]) {
            self.trace = mix(self.trace ^ fact);
        }
    }

    pub fn trace_hash(&self) -> u64 {
        self.trace
    }

    pub fn say(&self, what: std::fmt::Arguments<'_>) {
        if self.verbose {
            eprintln!("{:>12.3} {what}", (self.now - 1_000 * SECOND) as f64 / 1e3);
        }
    }

    pub fn schedule(&mut self, after: Nanos, event: Event) {
        self.sequence += 1;
        self.active += usize::from(event.is_active());
        self.heap.push(Reverse((self.now + after, self.sequence, event)));
    }

    /// Whether nothing is left that happens by itself (timers apart).
    pub fn is_quiet(&self) -> bool {
        self.active == 0
    }

    /// When the next event is due, timers of shards among them.
    pub fn next_at(&self) -> Option<Nanos> {
        let timers = self.lanes.iter().filter_map(|lane| lane.timer);
        self.heap.peek().map(|Reverse((at, ..))| *at).into_iter().chain(timers).min()
    }

    /// Whether anything but timers is to come.
    pub fn has_events(&self) -> bool {
        !self.heap.is_empty()
    }

    /// Moves the clock to the next event. Returns it if it is the driver's.
    pub fn next(&mut self) -> Option<Event> {
        let due = self.next_at()?;
        for shard in 0..2 {
            if self.lanes[shard].timer == Some(due) {
                self.now = self.now.max(due);
                self.lanes[shard].timer = None;
                self.complete(shard, Completion { user_data: TIMER, result: -libc::ETIME, more: false });
                return None;
            }
        }
        let Reverse((at, _, event)) = self.heap.pop()?;
        self.now = self.now.max(at);
        self.active -= usize::from(event.is_active());
        match event {
            Event::Op(id) => self.op_event(id),
            Event::Cancel(id) => self.cancel_event(id),
            Event::Side(id) => self.side_event(id),
            Event::Inbox(shard) => self.inbox_event(shard),
            Event::Ports(shard) => self.ports_event(shard),
            Event::Release(disk) => self.release(disk),
            Event::Client(client) => {
                self.clients_due.remove(&client);
                return Some(event);
            }
            Event::Operator(_) | Event::Read(_) | Event::Buffers(_) => return Some(event),
        }
        None
    }

    pub fn register_shard(&mut self, shard: usize, memory: Vec<(usize, usize)>) {
        self.lanes[shard].memory = memory;
    }

    pub fn register_file(&mut self, fd: RawFd, file: usize, direct: bool) {
        self.descriptors.insert(fd, Target::File(file, direct));
    }

    pub fn register_socket(&mut self, fd: RawFd, socket: Socket) -> usize {
        let id = self.sockets.len();
        self.sockets.push(socket);
        self.descriptors.insert(fd, Target::Socket(id));
        id
    }

    /// Notices sockets that a shard has closed. None may be in use by an operation.
    pub fn notice_closed(&mut self) {
        for id in 0..self.sockets.len() {
            if !self.sockets[id].server_gone && self.sockets[id].is_hung_up() {
                self.sockets[id].server_gone = true;
                let client = self.sockets[id].client;
                self.wake_client(client);
                for running in self.running.values() {
                    let used = match running.what {
                        InFlight::Recv { sock, .. } | InFlight::Send { sock, .. } => sock == id,
                        _ => false,
                    };
                    assert!(!used, "a socket was closed with an operation in flight");
                }
            }
        }
    }

    /// A shard that has ended asks for no more.
    pub fn forget_timer(&mut self, shard: usize) {
        self.lanes[shard].timer = None;
    }

    /// A shard has not been told of a command.
    pub fn is_waking(&self, shard: usize) -> bool {
        self.lanes[shard].wake
    }

    /// Wakes a shard for a command.
    pub fn wake(&mut self, shard: usize) {
        self.lanes[shard].wake = true;
        let after = self.rng.between(0, 30 * MICROSECOND);
        self.schedule(after, Event::Inbox(shard));
    }

    /// The files of a disk.
    pub fn files_of(&mut self, disk: usize) -> impl Iterator<Item = &mut File> {
        self.files.iter_mut().filter(move |file| file.disk == disk)
    }

    /// Whether operations on a disk may start.
    pub fn set_frozen(&mut self, disk: usize, frozen: bool) {
        self.files_of(disk).for_each(|file| file.frozen = frozen);
    }

    /// Whether its store has stopped answering.
    pub fn is_hung(&self, disk: usize) -> bool {
        self.files.iter().any(|file| file.disk == disk && file.hung)
    }

    /// Whether any file operation or side job of a disk is out.
    pub fn is_busy(&self, disk: usize) -> bool {
        self.files.iter().any(|file| file.disk == disk && file.busy > 0)
            || self.sides.values().any(|side| self.files[side.file].disk == disk)
    }

    /// The file behind a descriptor.
    pub fn file_behind(&self, fd: RawFd) -> &File {
        match self.descriptors.get(&fd) {
            Some(&Target::File(file, _)) => &self.files[file],
            other => panic!("{other:?} is no file"),
        }
    }

    pub fn sockets_busy(&self, id: usize) -> bool {
        self.running.values().any(|running| match running.what {
            InFlight::Recv { sock, .. } | InFlight::Send { sock, .. } => sock == id,
            _ => false,
        })
    }

    pub(super) fn complete(&mut self, shard: usize, completion: Completion) {
        self.trace([1, shard as u64, completion.result as u64]);
        self.lanes[shard].completions.push_back(completion);
    }

    pub(super) fn finish(&mut self, id: u64, result: i32) {
        let Some(running) = self.running.remove(&id) else { panic!("operation {id} ends twice") };
        self.lanes[running.shard].user_data.remove(&running.user_data);
        self.complete(running.shard, Completion { user_data: running.user_data, result, more: false });
    }

    fn start(&mut self, shard: usize, user_data: u64, op: Op) {
        assert_ne!(user_data, TIMER, "an operation has the timer's user data");
        assert!(
            self.lanes[shard].user_data.insert(user_data),
            "two operations in flight with one user data: {op:?}"
        );
        self.sequence += 1;
        let id = self.sequence;
        let what = match op {
            Op::Read { fd, .. } | Op::Write { fd, .. } | Op::Fdatasync { fd } | Op::Fallocate { fd, .. } => {
                let Some(&Target::File(file, direct)) = self.descriptors.get(&fd) else {
                    panic!("file operation on a descriptor that is closed or no file: {op:?}");
                };
                let op = self.start_file(shard, id, file, direct, op);
                InFlight::File(op)
            }
            Op::Recv { fd, addr, len } => {
                assert!(len > 0, "receive of nothing");
                InFlight::Recv { sock: self.socket(fd), ranges: vec![(addr, len as usize)], scheduled: false }
            }
            Op::RecvMsg { fd, header } => {
                InFlight::Recv { sock: self.socket(fd), ranges: memory::ranges(header), scheduled: false }
            }
            Op::SendMsg { fd, header } => {
                let ranges = memory::ranges(header);
                assert!(ranges.iter().any(|r| r.1 > 0), "send of nothing");
                assert!(ranges.len() <= 1024, "more ranges than the kernel takes");
                InFlight::Send { sock: self.socket(fd), ranges, done: 0, scheduled: false }
            }
            Op::SendNow { fd, header } => {
                let ranges = memory::ranges(header);
                let total: usize = ranges.iter().map(|range| range.1).sum();
                assert!(total > 0, "send of nothing");
                let sock = self.socket(fd);
                assert!(self.sockets[sock].send.is_none(), "two operations of one direction on one socket");
                let socket = &mut self.sockets[sock];
                let room = socket.room.saturating_sub(socket.to_client.len());
                if socket.client_gone != Gone::No {
                    self.lanes[shard].user_data.remove(&user_data);
                    return self.complete(shard, Completion { user_data, result: -libc::EPIPE, more: false });
                }
                let client = socket.client;
                let mut left = room.min(total);
                let moved = left;
                for (addr, len) in ranges {
                    let step = left.min(len);
                    let mut bytes = vec![0; step];
                    memory::load(addr, &mut bytes);
                    socket.to_client.extend(bytes);
                    left -= step;
                }
                self.lanes[shard].user_data.remove(&user_data);
                if moved > 0 {
                    self.wake_client(client);
                }
                if moved < total {
                    let result = if moved > 0 { moved as i32 } else { -libc::EAGAIN };
                    self.complete(shard, Completion { user_data, result, more: false });
                }
                return;
            }
            Op::Poll { .. } => {
                self.lanes[shard].ports = Some(user_data);
                InFlight::Poll
            }
            Op::PollMulti { .. } => {
                self.lanes[shard].poll = Some(user_data);
                if self.lanes[shard].wake {
                    self.schedule(0, Event::Inbox(shard));
                }
                InFlight::Poll
            }
            Op::Cancel { target } => {
                let after = self.rng.between(0, 100 * MICROSECOND);
                self.schedule(after, Event::Cancel(id));
                InFlight::Cancel { target }
            }
        };
        let sock = match what {
            InFlight::Recv { sock, .. } | InFlight::Send { sock, .. } => Some(sock),
            _ => None,
        };
        if let Some(sock) = sock {
            let is_recv = matches!(what, InFlight::Recv { .. });
            let slot = if is_recv { &mut self.sockets[sock].recv } else { &mut self.sockets[sock].send };
            assert!(slot.is_none(), "two operations of one direction on one socket");
            *slot = Some(id);
        }
        self.running.insert(id, Running { shard, user_data, what });
        if let Some(sock) = sock {
            self.kick(sock);
        }
    }

    pub(super) fn socket(&self, fd: RawFd) -> usize {
        match self.descriptors.get(&fd) {
            Some(&Target::Socket(id)) => {
                assert!(!self.sockets[id].server_gone, "socket operation on a closed descriptor");
                id
            }
            _ => panic!("socket operation on a descriptor that is no socket"),
        }
    }

    fn op_event(&mut self, id: u64) {
        // A cancelled operation leaves its event behind.
        let Some(running) = self.running.get(&id) else { return };
        match running.what {
            InFlight::File(_) => {
                let Some(running) = self.running.remove(&id) else { return };
                let InFlight::File(op) = running.what else { return };
                let result = self.conclude(op);
                self.lanes[running.shard].user_data.remove(&running.user_data);
                self.complete(
                    running.shard,
                    Completion { user_data: running.user_data, result, more: false },
                );
            }
            InFlight::Recv { .. } => self.try_receive(id),
            InFlight::Send { .. } => self.try_send(id),
            InFlight::Poll | InFlight::Cancel { .. } => {}
        }
    }

    fn inbox_event(&mut self, shard: usize) {
        if let Some(user_data) = self.lanes[shard].poll
            && std::mem::take(&mut self.lanes[shard].wake)
        {
            // Now and then a multishot poll ends, and has to be armed again.
            let more = !self.rng.chance(50);
            self.poll_event(shard, user_data, more);
            self.lanes[shard].poll = more.then_some(user_data);
        }
    }

    fn ports_event(&mut self, shard: usize) {
        self.lanes[shard].ports_due = false;
        if let Some(user_data) = self.lanes[shard].ports.take() {
            self.poll_event(shard, user_data, false);
        }
    }

    /// A poll completes; `more`: it goes on.
    fn poll_event(&mut self, shard: usize, user_data: u64, more: bool) {
        if !more {
            self.lanes[shard].user_data.remove(&user_data);
            let key = self.running.iter().find(|(_, r)| r.shard == shard && r.user_data == user_data);
            if let Some((&id, _)) = key {
                self.running.remove(&id);
            }
        }
        self.complete(shard, Completion { user_data, result: i32::from(libc::POLLIN), more });
    }

    /// The ports of guests of a shard have something to say: it hears of it after some time.
    pub fn report_ports(&mut self, shard: usize) {
        if self.lanes[shard].ports.is_some() && !std::mem::replace(&mut self.lanes[shard].ports_due, true) {
            let after = self.rng.between(0, 30 * MICROSECOND);
            self.schedule(after, Event::Ports(shard));
        }
    }

    fn cancel_event(&mut self, id: u64) {
        let Some(Running { shard, what: InFlight::Cancel { target }, .. }) = self.running.get(&id) else {
            return;
        };
        let (shard, target) = (*shard, *target);
        let found = self.running.iter().find(|(_, r)| r.shard == shard && r.user_data == target);
        let found = found.map(|(&id, _)| id);
        let Some(victim) = found else { return self.finish(id, -libc::ENOENT) };
        let cancelled = match &self.running[&victim].what {
            InFlight::Recv { sock, .. } => Some((*sock, true, 0)),
            InFlight::Send { sock, done, .. } => Some((*sock, false, *done)),
            _ => None,
        };
        let Some((sock, is_recv, done)) = cancelled else { return self.finish(id, -libc::EALREADY) };
        let slot = if is_recv { &mut self.sockets[sock].recv } else { &mut self.sockets[sock].send };
        *slot = None;
        self.finish(victim, if done > 0 { done as i32 } else { -libc::ECANCELED });
        self.finish(id, 0);
    }
}

/// One shard's view of the [`World`].
#[derive(Debug)]
pub struct SimKernel {
    world: Rc<RefCell<World>>,
    shard: usize,
}

impl SimKernel {
    pub fn new(world: Rc<RefCell<World>>, shard: usize) -> SimKernel {
        SimKernel { world, shard }
    }
}

impl Kernel for SimKernel {
    fn now(&self) -> Nanos {
        self.world.borrow().now
    }

    fn push(&mut self, user_data: u64, op: Op) {
        self.world.borrow_mut().start(self.shard, user_data, op);
    }

    fn receive_now(&mut self, op: Op) -> i32 {
        let mut world = self.world.borrow_mut();
        match op {
            Op::Recv { fd, addr, len } => world.receive_now(fd, &[(addr, len as usize)]),
            Op::RecvMsg { fd, header } => world.receive_now(fd, &memory::ranges(header)),
            other => panic!("not a receive: {other:?}"),
        }
    }

    fn set_timer(&mut self, at: Nanos) {
        let mut world = self.world.borrow_mut();
        let late = world.sequence % 60 * MICROSECOND;
        let lane = &mut world.lanes[self.shard];
        lane.timer = Some(at + late);
    }

    /// Never waits: [`std::io::ErrorKind::WouldBlock`] ends the turn before it began, and the driver takes over.
    fn enter(&mut self, want: u32) -> std::io::Result<()> {
        let wait = want > 0;
        let mut world = self.world.borrow_mut();
        let lane = &mut world.lanes[self.shard];
        lane.enters += 1;
        if wait && lane.completions.is_empty() {
            return Err(std::io::ErrorKind::WouldBlock.into());
        }
        Ok(())
    }

    fn all_submitted(&self) -> bool {
        true
    }

    fn next_completion(&mut self) -> Option<Completion> {
        self.world.borrow_mut().lanes[self.shard].completions.pop_front()
    }

    fn side(&mut self, job: SideJob) {
        self.world.borrow_mut().start_side(self.shard, &job);
    }

    fn next_side(&mut self) -> Option<SideDone> {
        self.world.borrow_mut().lanes[self.shard].side_done.pop_front()
    }

    fn enters(&self) -> u64 {
        self.world.borrow().lanes[self.shard].enters
    }

    fn overflows(&self) -> u64 {
        0
    }
}
