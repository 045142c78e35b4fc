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

use super::file::{BLOCK, File, Writeback};
use super::memory;
use super::random::{Random, mix};
use super::socket::{Gone, Socket};
use crate::clock::{MICROSECOND, MILLISECOND, Nanos, SECOND};
use crate::storage::side::{Extent, SideCall, SideDone, SideJob};
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
    /// A client may act.
    Client(usize),
    /// The operator acts on a disk.
    Operator(usize),
    /// The store of a file answers again.
    Release(usize),
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
enum InFlight {
    File(FileOp),
    Recv { sock: usize, ranges: Vec<(usize, usize)>, scheduled: bool },
    Send { sock: usize, ranges: Vec<(usize, usize)>, done: usize, scheduled: bool },
    Poll,
    Cancel { target: u64 },
}

#[derive(Debug)]
struct FileOp {
    file: usize,
    op: Op,
    /// Bytes moved when the operation was started; the rest when it ends.
    early: u64,
    result: i32,
    /// Bytes that the operation moves: of a failed write some may have landed.
    moves: u64,
    writeback: Writeback,
    /// Hash of the memory of a write or of the junk in the memory of a read.
    seal: u64,
    held: bool,
    failure: Option<Failure>,
}

#[derive(Debug)]
struct Running {
    shard: usize,
    user_data: u64,
    what: InFlight,
}

#[derive(Debug)]
struct Side {
    shard: usize,
    user_data: u64,
    file: usize,
    call: SideCall,
    held: bool,
}

#[derive(Debug, Default)]
struct Lane {
    completions: VecDeque<Completion>,
    side_done: VecDeque<SideDone>,
    timer: Option<Nanos>,
    poll: Option<u64>,
    wake: bool,
    /// Address ranges of the shard's buffers, and of its zeroes.
    memory: Vec<(usize, usize)>,
    user_data: HashSet<u64>,
    enters: u64,
}

/// Clock, files, sockets and everything in flight.
#[derive(Debug)]
pub struct World {
    pub now: Nanos,
    pub rng: Random,
    heap: BinaryHeap<Reverse<(Nanos, u64, Event)>>,
    active: usize,
    sequence: u64,
    pub files: Vec<File>,
    pub sockets: Vec<Socket>,
    descriptors: HashMap<RawFd, Target>,
    running: BTreeMap<u64, Running>,
    sides: BTreeMap<u64, Side>,
    lanes: [Lane; 2],
    clients_due: HashSet<usize>,
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
enum Target {
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
            Event::Release(file) => self.release(file),
            Event::Client(client) => {
                self.clients_due.remove(&client);
                return Some(event);
            }
            Event::Operator(_) | Event::Read(_) => return Some(event),
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

    /// Wakes a shard for a command.
    pub fn wake(&mut self, shard: usize) {
        self.lanes[shard].wake = true;
        let after = self.rng.between(0, 30 * MICROSECOND);
        self.schedule(after, Event::Inbox(shard));
    }

    /// Whether any file operation or side job of a file is out.
    pub fn file_busy(&self, file: usize) -> bool {
        self.files[file].busy > 0 || self.sides.values().any(|side| side.file == file)
    }

    pub fn sockets_busy(&self, id: usize) -> bool {
        self.running.values().any(|running| match running.what {
            InFlight::Recv { sock, .. } | InFlight::Send { sock, .. } => sock == id,
            _ => false,
        })
    }

    fn complete(&mut self, shard: usize, completion: Completion) {
        self.trace([1, shard as u64, completion.result as u64]);
        self.lanes[shard].completions.push_back(completion);
    }

    fn finish(&mut self, id: u64, result: i32) {
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

    fn socket(&self, fd: RawFd) -> usize {
        match self.descriptors.get(&fd) {
            Some(&Target::Socket(id)) => {
                assert!(!self.sockets[id].server_gone, "socket operation on a closed descriptor");
                id
            }
            _ => panic!("socket operation on a descriptor that is no socket"),
        }
    }

    // ---- files ----

    fn start_file(&mut self, shard: usize, id: u64, file: usize, direct: bool, op: Op) -> FileOp {
        assert!(!self.files[file].frozen, "operation on a disk that was reported as at rest: {op:?}");
        let memory = self.lanes[shard].memory.clone();
        let inside = |addr: usize, len: u32, write: bool| {
            // The last range is of zeroes, which only writes may use.
            let ranges = if write { &memory[..] } else { &memory[..memory.len() - 1] };
            let end = addr + len as usize;
            assert!(
                ranges.iter().any(|r| r.0 <= addr && end <= r.0 + r.1),
                "memory outside of the buffers: {op:?}"
            );
        };
        let f = &mut self.files[file];
        let rng = &mut self.rng;
        let faults = f.faults;
        let align = if direct { f.align } else { 1 };
        let step = if direct { f.align.max(f.memory_align) } else { 1 };
        let mut aligned = true;
        let (mut result, mut moves) = (0i32, 0u64);
        let mut writeback = Vec::new();
        let failure = match op {
            Op::Read { addr, len, offset, .. } | Op::Write { addr, len, offset, .. } => {
                let write = matches!(op, Op::Write { .. });
                inside(addr, len, write);
                assert!(len > 0, "I/O of nothing");
                if direct {
                    let memory_align = f.memory_align as usize;
                    aligned = offset % align == 0 && u64::from(len) % align == 0 && addr % memory_align == 0;
                }
                let reach =
                    if write { u64::from(len) } else { f.length.saturating_sub(offset).min(u64::from(len)) };
                result = reach as i32;
                moves = reach;
                let what = if write { What::Write } else { What::Read };
                if rng.chance(faults.again) {
                    (result, moves) = (if rng.chance(500) { -libc::EAGAIN } else { -libc::EINTR }, 0);
                    None
                } else if rng.chance(faults.eio) || (write && rng.chance(faults.enospc)) {
                    let errno =
                        if write && faults.enospc > 0 && rng.chance(500) { libc::ENOSPC } else { libc::EIO };
                    result = -errno;
                    // Some of it may have landed.
                    moves = rng.between(0, reach / align) * align;
                    Some((what, offset, offset + u64::from(len), errno))
                } else {
                    if reach > step && rng.chance(faults.short) {
                        moves = rng.between(1, (reach - 1) / step) * step;
                        result = moves as i32;
                    }
                    None
                }
            }
            Op::Fdatasync { .. } => {
                f.syncs += 1;
                assert!(f.syncs <= 1, "two fdatasyncs of one file in flight");
                writeback = f.begin_sync();
                let errno = if faults.enospc > 0 && rng.chance(300) { libc::ENOSPC } else { libc::EIO };
                rng.chance(faults.sync).then_some((What::Sync, 0, u64::MAX, errno))
            }
            Op::Fallocate { mode, offset, len, .. } => {
                f.fallocates += 1;
                assert!(f.fallocates <= 2, "more than two fallocates of one file in flight");
                assert!(len > 0, "fallocate of nothing");
                let able = if mode & libc::FALLOC_FL_PUNCH_HOLE != 0 { f.can_punch } else { f.can_zero };
                assert!(mode & libc::FALLOC_FL_KEEP_SIZE != 0, "fallocate must not change the length");
                aligned = !f.is_block || (offset % 512 == 0 && len % 512 == 0);
                if !able {
                    result = -libc::EOPNOTSUPP;
                    None
                } else {
                    let errno = if faults.enospc > 0 && rng.chance(500) { libc::ENOSPC } else { libc::EIO };
                    rng.chance(faults.eio).then_some((What::Space, offset, offset + len, errno))
                }
            }
            _ => None,
        };
        // Every rest of a short transfer is aligned here, so Linux's EINVAL would be a mistake of the shard.
        assert!(aligned, "misaligned for this file (align {align}): {op:?}");
        let at = self.instant;
        let failure = failure.map(|(what, start, end, errno)| Failure { file, at, what, start, end, errno });
        if let Some(failure) = failure {
            result = -failure.errno;
        }
        if failure.is_some_and(|failure| failure.what == What::Sync) {
            // Linux marks the pages clean: the next fdatasync knows nothing of them.
            writeback.clear();
        }
        f.busy += 1;
        let early = if moves > 0 { rng.between(0, moves / align) * align } else { 0 };
        let mut op = FileOp { file, op, early, result, moves, writeback, seal: 0, held: f.hung, failure };
        let delay = if rng.chance(faults.slow) {
            rng.between(5 * MILLISECOND, 300 * MILLISECOND)
        } else {
            rng.between(5 * MICROSECOND, 1500 * MICROSECOND)
        };
        self.trace([2 | (file as u64) << 4, op.result as u64, op.moves]);
        self.say(format_args!(
            "shard {shard} file {file} {:?} -> {} in {}us",
            op.op,
            op.result,
            delay / 1000
        ));
        self.prepare(&mut op);
        if !op.held {
            self.schedule(delay, Event::Op(id));
        }
        op
    }

    /// The part of an operation that happens at its start.
    fn prepare(&mut self, op: &mut FileOp) {
        let file = &mut self.files[op.file];
        match op.op {
            Op::Write { addr, len, offset, .. } => {
                let mut bytes = vec![0; len as usize];
                memory::load(addr, &mut bytes);
                op.seal = hash(&bytes);
                file.write(offset, &bytes[..op.early as usize]);
            }
            Op::Read { addr, len, offset, .. } => {
                let junk = vec![0xd5; len as usize];
                memory::store(addr, &junk);
                memory::store(addr, &file.data[offset as usize..(offset + op.early) as usize]);
                op.seal = self.sequence;
            }
            _ => {}
        }
    }

    /// The part of an operation that happens at its end.
    fn conclude(&mut self, mut op: FileOp) -> i32 {
        self.new_failures.extend(op.failure);
        let file = &mut self.files[op.file];
        file.busy -= 1;
        match op.op {
            Op::Write { addr, len, offset, .. } => {
                let mut bytes = vec![0; len as usize];
                memory::load(addr, &mut bytes);
                assert_eq!(op.seal, hash(&bytes), "the buffer of a write changed while the kernel used it");
                file.write(offset + op.early, &bytes[op.early as usize..op.moves as usize]);
            }
            Op::Read { addr, len, offset, .. } => {
                let mut bytes = vec![0; len as usize];
                memory::load(addr, &mut bytes);
                let untouched = bytes[op.early as usize..].iter().all(|&byte| byte == 0xd5);
                assert!(untouched, "the buffer of a read was used by others while the kernel had it");
                let (from, to) = (offset + op.early, offset + op.moves);
                memory::store(addr + op.early as usize, &file.data[from as usize..to as usize]);
            }
            Op::Fdatasync { .. } => {
                file.syncs -= 1;
                if op.result == 0 {
                    file.end_sync(std::mem::take(&mut op.writeback));
                }
            }
            Op::Fallocate { mode, offset, len, .. } => {
                file.fallocates -= 1;
                if op.result == 0 {
                    file.erase(offset, len, mode & libc::FALLOC_FL_PUNCH_HOLE != 0);
                }
            }
            _ => {}
        }
        op.result
    }

    /// The store of a file stops answering.
    pub fn hang(&mut self, file: usize) {
        self.say(format_args!("file {file} hangs"));
        self.files[file].hung = true;
    }

    /// It answers again, also to what it was asked before.
    pub fn release(&mut self, file: usize) {
        self.say(format_args!("file {file} answers again"));
        self.files[file].hung = false;
        let mut ids = Vec::new();
        for (&id, running) in &mut self.running {
            if let InFlight::File(op) = &mut running.what
                && op.file == file
                && std::mem::take(&mut op.held)
            {
                ids.push(Event::Op(id));
            }
        }
        for (&id, side) in &mut self.sides {
            if side.file == file && std::mem::take(&mut side.held) {
                ids.push(Event::Side(id));
            }
        }
        for event in ids {
            let after = self.rng.between(0, MILLISECOND);
            self.schedule(after, event);
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
            if !more {
                self.lanes[shard].poll = None;
                self.lanes[shard].user_data.remove(&user_data);
                let key = self.running.iter().find(|(_, r)| r.shard == shard && r.user_data == user_data);
                if let Some((&id, _)) = key {
                    self.running.remove(&id);
                }
            }
            self.complete(shard, Completion { user_data, result: i32::from(libc::POLLIN), more });
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

    // ---- side jobs ----

    fn start_side(&mut self, shard: usize, job: &SideJob) {
        use std::os::fd::AsRawFd;
        let fd = job.file.fd.as_raw_fd();
        let Some(&Target::File(file, _)) = self.descriptors.get(&fd) else { panic!("side job on no file") };
        assert!(!self.files[file].frozen, "side job on a disk that was reported as at rest");
        self.sequence += 1;
        let id = self.sequence;
        let held = self.files[file].hung;
        self.sides.insert(id, Side { shard, user_data: job.user_data, file, call: job.call, held });
        if !held {
            let after = self.rng.between(10 * MICROSECOND, 2 * MILLISECOND);
            self.schedule(after, Event::Side(id));
        }
    }

    fn side_event(&mut self, id: u64) {
        let Some(side) = self.sides.remove(&id) else { return };
        let file = &mut self.files[side.file];
        let rng = &mut self.rng;
        let (what, start, len) = match side.call {
            SideCall::Extents { offset, len, .. } => (What::Extents, offset, len),
            SideCall::DiscardDevice { offset, len } => (What::Space, offset, len),
        };
        let result = if rng.chance(file.faults.side) {
            let errno = libc::EIO;
            self.new_failures.push(Failure {
                file: side.file,
                at: self.instant,
                what,
                start,
                end: start + len,
                errno,
            });
            Err(errno)
        } else {
            match side.call {
                SideCall::Extents { offset, len, max } => {
                    let extents = file.extents(offset, len, max);
                    Ok(extents.into_iter().map(|(len, hole)| Extent { len, hole }).collect())
                }
                SideCall::DiscardDevice { offset, len } => {
                    assert!(offset % 512 == 0 && len % 512 == 0, "misaligned discard");
                    // A device may forget all, a part, or nothing.
                    for block in offset / BLOCK..(offset + len) / BLOCK {
                        let start = (block * BLOCK).max(offset);
                        if rng.chance(500) {
                            file.erase(start, (offset + len - start).min(BLOCK), true);
                        }
                    }
                    Ok(Vec::new())
                }
            }
        };
        self.trace([3, side.file as u64, u64::from(result.is_ok())]);
        let lane = &mut self.lanes[side.shard];
        lane.side_done.push_back(SideDone { user_data: side.user_data, result });
        self.wake(side.shard);
    }

    // ---- sockets ----

    /// Lets the operations of a socket go on if they can.
    pub fn kick(&mut self, sock: usize) {
        let socket = &self.sockets[sock];
        let gone = socket.client_gone != Gone::No;
        let receive = socket.recv.filter(|_| gone || !socket.to_server.is_empty());
        let send = socket.send.filter(|_| gone || socket.to_client.len() < socket.room);
        for id in [receive, send].into_iter().flatten() {
            if let Some(running) = self.running.get_mut(&id)
                && let InFlight::Recv { scheduled, .. } | InFlight::Send { scheduled, .. } = &mut running.what
                && !std::mem::replace(scheduled, true)
            {
                let after = self.rng.between(MICROSECOND, 60 * MICROSECOND);
                self.schedule(after, Event::Op(id));
            }
        }
    }

    fn try_receive(&mut self, id: u64) {
        let Some(Running { what: InFlight::Recv { sock, ranges, scheduled }, .. }) =
            self.running.get_mut(&id)
        else {
            return;
        };
        *scheduled = false;
        let sock = *sock;
        let socket = &mut self.sockets[sock];
        let total: usize = ranges.iter().map(|range| range.1).sum();
        let mut count = total.min(socket.to_server.len());
        let result = if self.rng.chance(socket.faults) {
            if self.rng.chance(500) { -libc::EINTR } else { -libc::EAGAIN }
        } else if count == 0 {
            match socket.client_gone {
                Gone::No => return,
                Gone::Eof => 0,
                Gone::Reset => -libc::ECONNRESET,
            }
        } else {
            if self.rng.chance(200) {
                count = self.rng.between(1, count as u64) as usize;
            }
            let bytes: Vec<u8> = socket.to_server.drain(..count).collect();
            let mut rest = &bytes[..];
            for &(addr, len) in ranges.iter() {
                let (now, later) = rest.split_at(len.min(rest.len()));
                memory::store(addr, now);
                rest = later;
            }
            count as i32
        };
        socket.recv = None;
        let client = socket.client;
        if result > 0 {
            self.wake_client(client);
        }
        self.finish(id, result);
    }

    fn try_send(&mut self, id: u64) {
        let Some(Running { what: InFlight::Send { sock, ranges, done, scheduled }, .. }) =
            self.running.get_mut(&id)
        else {
            return;
        };
        *scheduled = false;
        let sock = *sock;
        let socket = &mut self.sockets[sock];
        let total: usize = ranges.iter().map(|range| range.1).sum();
        let client = socket.client;
        if socket.client_gone != Gone::No {
            let errno = if socket.client_gone == Gone::Eof { -libc::EPIPE } else { -libc::ECONNRESET };
            let result = if *done > 0 { *done as i32 } else { errno };
            socket.send = None;
            return self.finish(id, result);
        }
        let mut moved = 0;
        let room = socket.room.saturating_sub(socket.to_client.len());
        let (mut skip, mut left) = (*done, room.min(total - *done));
        for &(addr, len) in ranges.iter() {
            let start = skip.min(len);
            skip -= start;
            let step = left.min(len - start);
            if step > 0 {
                let mut bytes = vec![0; step];
                memory::load(addr + start, &mut bytes);
                socket.to_client.extend(bytes);
                left -= step;
                moved += step;
            }
        }
        *done += moved;
        let done = *done;
        // A signal may end it early.
        let ends = done == total || (done > 0 && self.rng.chance(30));
        if moved > 0 {
            self.wake_client(client);
        }
        if ends {
            self.sockets[sock].send = None;
            self.finish(id, done as i32);
        } else {
            self.kick(sock);
        }
    }

    /// Lets a client act soon; one event at a time.
    pub fn wake_client(&mut self, client: usize) {
        if !self.clients_due.insert(client) {
            return;
        }
        let after = self.rng.between(MICROSECOND, 80 * MICROSECOND);
        self.schedule(after, Event::Client(client));
    }
}

fn hash(bytes: &[u8]) -> u64 {
    let mut hash = bytes.len() as u64;
    let mut chunks = bytes.chunks_exact(8);
    for chunk in &mut chunks {
        let mut word = [0; 8];
        word.copy_from_slice(chunk);
        hash = (hash ^ u64::from_le_bytes(word)).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29);
    }
    for &byte in chunks.remainder() {
        hash = (hash ^ u64::from(byte)).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29);
    }
    hash
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

    fn set_timer(&mut self, at: Nanos) {
        let mut world = self.world.borrow_mut();
        let late = world.sequence % 60 * MICROSECOND;
        let lane = &mut world.lanes[self.shard];
        lane.timer = Some(at + late);
    }

    /// Never waits: [`std::io::ErrorKind::WouldBlock`] ends the turn before it began, and the driver takes over.
    fn enter(&mut self, wait: bool) -> std::io::Result<()> {
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
