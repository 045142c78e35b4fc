//! The loop of a shard: completions in, state machines run, operations out.
//!
//! ```text
//! enter(wait) -> completions -> disks and connections -> actions -> operations, replies -> enter(wait)
//! ```
//! The reactor owns everything that the kernel may touch: operations, requests, buffers, connections. Disks are pure state
//! machines that it calls inside `catch_unwind`; what they want comes back as [`Action`]s and is carried out here. It is
//! generic over [`Kernel`], so that the same code runs on Linux and in the simulator.
//!
//! Invariants: every operation has a slot in `ops` until its completion has been taken; every request has a slot in
//! `requests` until it is answered, exactly once; a disk's `ops` counts its operations, so that a disk is never taken off
//! the shard while the kernel works for it.

mod actions;
#[cfg(test)]
mod audit;
mod commands;
mod conns;
mod guests;
mod meter;
mod ops;
mod pace;
mod rings;
mod settle;
mod swap;
mod volume;

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, VecDeque};
use std::os::fd::{AsRawFd, OwnedFd};
use std::panic::AssertUnwindSafe;
use std::sync::Arc;

use crossbeam::channel::Receiver;

use crate::api::{Backend, DiskId, DiskState, Envelope, Event};
use crate::clock::{MILLISECOND, Nanos, SECOND};
use crate::disk::{Action, Ctx, Disk};
use crate::nbd::Conn;
use crate::request::{ReqKey, Request, Requests};
use crate::stats::ShardCounters;
use crate::storage::pool::Pool;
use crate::storage::side::signal;
use crate::storage::{Kernel, Op, TIMER};
use actions::Gate;
use meter::Meter;
use ops::{OpKind, Ops};
use pace::Pace;

/// Housekeeping interval: buffers of idle connections go back to the system, stalled clients are looked at.
const TICK: Nanos = SECOND;
/// The same at rest: each wakes the core. Well below the 5 s after which the control thread calls a shard stalled.
const REST: Nanos = 3 * SECOND;
/// A send without progress for this long, while others wait for buffers, ends the connection.
const STALL: Nanos = 30 * SECOND;
/// Connections of one disk.
pub const CONNS_MAX: usize = 64;

/// Where a shard's events go.
#[derive(Debug, Clone)]
pub struct EventSink {
    /// The control thread's channel, for all shards.
    pub tx: crossbeam::channel::Sender<(usize, Event)>,
    /// Wakes the control thread.
    pub wake: Arc<OwnedFd>,
    /// This shard.
    pub shard: usize,
}

impl EventSink {
    /// Tells the control thread.
    pub fn send(&self, event: Event) {
        // The control thread outlives the shards; if not, nobody wants to know.
        if self.tx.send((self.shard, event)).is_ok() {
            signal(&self.wake);
        }
    }
}

/// What a command waits for.
#[derive(Debug)]
enum Pending {
    Pause {
        tag: u64,
    },
    Park {
        tag: u64,
    },
    /// `flush`: the last flush of the disk, once it was asked for.
    Remove {
        tag: u64,
        flush: Flush,
    },
}

/// The flush before a disk goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Flush {
    NotYet,
    Asked(ReqKey),
    Failed,
    Done,
}

/// A disk with what the reactor knows of it.
#[derive(Debug)]
struct Entry {
    id: DiskId,
    /// Absent only for a moment, while the disk is rebuilt or taken away.
    disk: Option<Disk>,
    conns: Vec<u32>,
    /// Devices of guests.
    guests: Vec<guests::Guest>,
    /// Kernel operations and side jobs out.
    ops: u32,
    /// Requests in the slab.
    requests: u32,
    /// Bounce buffers in use.
    bounces: u32,
    /// Turn in which its connections were served last, and the bytes that they may still start in it.
    share: (u64, u64),
    meter: Meter,
    pending: Option<Pending>,
    /// When the timer heap has an entry for it.
    timer: Option<Nanos>,
    /// The same for mappings of its volume that are to be written back.
    tidy: Option<Nanos>,
    panics: u32,
    /// Waits for its operations to come back after a panic.
    quarantined: bool,
    /// State and reason before that.
    before_quarantine: (DiskState, String),
    /// Detached by force.
    zombie: bool,
    /// The command that forced it, until it is answered.
    zombie_tag: Option<u64>,
    /// Limits punted kernel work per backing store.
    store: Option<u64>,
    /// The volume's disk that this one is a file of: hidden from commands.
    owner: Option<u32>,
    /// Its volume, if it is an image of a format.
    engine: Option<Box<volume::Engine>>,
    /// Its image could not be opened: the command to answer, and why.
    failed_open: Option<(u64, String)>,
    /// It is being made larger: the command, its request, and the size in bytes.
    resize: Option<(u64, ReqKey, u64)>,
    /// It is being given another image.
    swap: Option<swap::Swap>,
    /// When an error of its image was told last.
    told: Option<Nanos>,
    /// Its file cannot tell that it would have to wait: all I/O counts as punted.
    punts: bool,
}

/// A shard without its thread: everything that runs on one core.
#[derive(Debug)]
pub struct Shard<K: Kernel> {
    kernel: K,
    now: Nanos,
    pool: Pool,
    ops: Ops,
    requests: Requests,
    disks: slab::Slab<Entry>,
    by_id: HashMap<DiskId, u32>,
    conns: slab::Slab<Box<Conn>>,
    rings: rings::Rings,
    generation: u32,
    inbox: Receiver<Envelope>,
    inbox_wake: Arc<OwnedFd>,
    events: EventSink,
    counters: Arc<ShardCounters>,
    actions: VecDeque<(u32, Action)>,
    /// Volumes whose futures can go on.
    awake: Vec<u32>,
    /// The same, in the next turn.
    awake_next: Vec<u32>,
    /// Memory for tables of images.
    budget: std::rc::Rc<formats::metadata::Budget>,
    pieces: Vec<formats::volume::Piece>,
    /// Where a piece is encrypted before it has its buffer.
    sealing: formats::file::Buf,
    scratch: Vec<Action>,
    new_requests: Vec<Request>,
    timers: BinaryHeap<Reverse<(Nanos, u32)>>,
    next_tick: Nanos,
    /// Something other than the tick has happened since the last one.
    worked: bool,
    /// Ticks since then.
    quiet_ticks: u32,
    /// Connections with more to do in the next turn.
    ready: VecDeque<u32>,
    /// Connections that may have replies to send or input to receive.
    dirty: Vec<u32>,
    /// Connections that wait for a buffer to receive into.
    want_buffer: VecDeque<u32>,
    /// Actions that wait for a buffer.
    starved: VecDeque<(u32, Action)>,
    /// Those that wait for a buffer are being tried.
    feeding: bool,
    /// Disks and connections whose actions have to go on waiting for a buffer; empty between turns.
    starving: Vec<(u32, Option<crate::request::Client>)>,
    /// Sends that the next enter does or refuses: connection and operation.
    sent_now: Vec<(u32, u64)>,
    /// Bounce buffers in use.
    bounces: u32,
    /// Buffer bytes in use when those that wait were last looked at.
    fed_at: usize,
    turn: u64,
    pace: Pace,
    /// Actions of RAM disks that met another shard: tried again in the next turn.
    retry: Vec<(u32, Action)>,
    gates: HashMap<u64, Gate>,
    unsettled: Vec<u32>,
    fault_commands: bool,
    stopping: Option<u64>,
}

/// What a shard is made of.
#[derive(Debug)]
pub struct ShardParts<K> {
    /// Linux or the simulator.
    pub kernel: K,
    /// Buffers.
    pub pool: Pool,
    /// Commands.
    pub inbox: Receiver<Envelope>,
    /// eventfd that becomes readable when there are commands or side results.
    pub inbox_wake: Arc<OwnedFd>,
    /// Where answers go.
    pub events: EventSink,
    /// Counters.
    pub counters: Arc<ShardCounters>,
    /// Memory for tables of images, bytes.
    pub table_budget_bytes: usize,
    /// Accept commands that only tests use.
    pub fault_commands: bool,
}

impl<K: Kernel> Shard<K> {
    /// A shard without disks.
    pub fn new(parts: ShardParts<K>) -> Shard<K> {
        let now = parts.kernel.now();
        let mut shard = Shard {
            kernel: parts.kernel,
            now,
            pool: parts.pool,
            ops: Ops::default(),
            requests: Requests::default(),
            disks: slab::Slab::new(),
            by_id: HashMap::new(),
            conns: slab::Slab::new(),
            rings: rings::Rings::default(),
            generation: 0,
            inbox: parts.inbox,
            inbox_wake: parts.inbox_wake,
            events: parts.events,
            counters: parts.counters,
            actions: VecDeque::new(),
            awake: Vec::new(),
            awake_next: Vec::new(),
            budget: formats::metadata::Budget::new(parts.table_budget_bytes),
            pieces: Vec::new(),
            sealing: formats::file::Buf::zeroed(0),
            scratch: Vec::new(),
            new_requests: Vec::new(),
            timers: BinaryHeap::new(),
            next_tick: now + TICK,
            worked: false,
            quiet_ticks: 0,
            ready: VecDeque::new(),
            dirty: Vec::new(),
            want_buffer: VecDeque::new(),
            starved: VecDeque::new(),
            feeding: false,
            starving: Vec::new(),
            bounces: 0,
            sent_now: Vec::new(),
            fed_at: 0,
            turn: 0,
            pace: Pace::default(),
            retry: Vec::new(),
            gates: HashMap::new(),
            unsettled: Vec::new(),
            fault_commands: parts.fault_commands,
            stopping: None,
        };
        shard.arm_inbox();
        shard
    }

    fn arm_inbox(&mut self) {
        let user_data = self.ops.insert(OpKind::Inbox);
        self.kernel.push(user_data, Op::PollMulti { fd: self.inbox_wake.as_raw_fd() });
    }

    /// The surroundings, for the simulator.
    pub fn kernel(&mut self) -> &mut K {
        &mut self.kernel
    }

    /// Requests, operations and buffer bytes that are out: all zero on an idle shard. For tests.
    pub fn outstanding(&self) -> (usize, usize, usize) {
        (self.requests.len(), self.ops.len() - self.standing_ops(), self.pool.used())
    }

    /// Operations that are always out: the polls of the inbox and of guests' ports.
    fn standing_ops(&self) -> usize {
        1 + self.rings.host.open_realms()
    }

    /// Prints requests and disks. For tests.
    #[cfg(test)]
    pub fn describe(&self) {
        for (key, request) in self.requests.iter() {
            eprintln!("  {key:?}: {request:?}");
        }
        for (_, entry) in &self.disks {
            eprintln!("  {entry:?}");
        }
        for (_, conn) in &self.conns {
            eprintln!("  {}", conn.summary());
        }
    }

    /// One turn: waits for something to do, does it. False when the shard has ended.
    ///
    /// # Errors
    /// Those of io_uring_enter that cannot be met by another try: the ring is broken.
    pub fn turn(&mut self) -> std::io::Result<bool> {
        let starved = !self.starved.is_empty() || !self.want_buffer.is_empty() || self.rings.is_starved();
        let freed = starved && self.pool.used() < self.fed_at;
        let more = !self.ready.is_empty()
            || !self.retry.is_empty()
            || !self.unsettled.is_empty()
            || !self.awake_next.is_empty()
            || freed
            || self.rings.is_busy()
            || self.sends_are_awaited();
        self.turn += 1;
        let deadline =
            self.timers.peek().map_or(self.next_tick, |Reverse((at, _))| (*at).min(self.next_tick));
        let deadline = self.rings.deadline().map_or(deadline, |at| at.min(deadline));
        self.kernel.set_timer(deadline);
        self.kernel.enter(if more { 0 } else { self.pace.want(self.ops.ios()) })?;
        let start = self.kernel.now();
        self.now = start;
        let mut count = 0;
        while let Some(completion) = self.kernel.next_completion() {
            count += 1;
            if completion.user_data != TIMER {
                self.worked = true;
                self.complete(completion);
                self.run_actions();
            }
        }
        self.pace.note(start, count);
        self.finish_sends();
        self.run_timers();
        self.wake_rings();
        for (disk, action) in std::mem::take(&mut self.retry) {
            self.actions.push_back((disk, action));
        }
        self.wake_yielded();
        self.run_actions();
        for _ in 0..self.ready.len() {
            if let Some(conn) = self.ready.pop_front() {
                self.service(conn);
            }
        }
        self.serve_rings();
        self.feed_starved();
        self.settle_all();
        self.flush_conns();
        self.flush_rings();
        if self.now >= self.next_tick {
            self.tick();
        }
        self.account(start);
        // The operations that stay are polls.
        if self.stopping.is_some() && self.disks.is_empty() && self.ops.len() <= self.standing_ops() {
            // What was sent before the control thread could know: every command has its reply.
            self.inbox();
            if let Some(tag) = self.stopping {
                self.reply(tag, Ok(crate::api::Reply::Done));
            }
            return Ok(false);
        }
        Ok(true)
    }

    /// The end after a failure: gives back what others wait for, and keeps what the kernel may still use.
    ///
    /// The ring is closed, so that the kernel ends its operations and lets go of their files; only then are the disks dropped, and
    /// with them the shard's references to images. Commands that nobody took stay in the channel, for who holds its other end. Clients see the end of
    /// their connections. Buffers and message headers stay mapped for ever: an operation that is on its way to a device still
    /// reads or writes them, and nothing tells a closed ring's owner when the last one has ended. (The file does: see the file
    /// table's fence.)
    pub fn abandon(self) {
        let Shard { kernel, disks, conns, inbox, counters, pool, requests, actions, .. } = self;
        drop(kernel);
        for (_, conn) in conns {
            conn.abandon();
        }
        std::mem::forget((pool, requests, actions));
        drop((inbox, disks));
        [&counters.disks, &counters.clients, &counters.ops_in_flight, &counters.buffer_bytes]
            .iter()
            .for_each(|gauge| gauge.set(0));
    }

    fn account(&mut self, start: Nanos) {
        self.pool.collect();
        let end = self.kernel.now();
        let counters = &self.counters;
        counters.busy_ns.add(end.saturating_sub(start));
        counters.turns.record(end.saturating_sub(start));
        counters.last_turn.set(end);
        counters.ring_enters.set(self.kernel.enters());
        counters.ring_overflows.set(self.kernel.overflows());
        counters.ops_in_flight.set((self.ops.len() - self.standing_ops()) as u64);
        counters.buffer_bytes.set(self.pool.used() as u64);
    }

    fn run_timers(&mut self) {
        while let Some(&Reverse((at, disk))) = self.timers.peek()
            && at <= self.now
        {
            self.timers.pop();
            let Some(entry) = self.disks.get_mut(disk as usize) else { continue };
            if entry.tidy == Some(at) {
                entry.tidy = None;
                self.start_tidy(disk);
                self.run_actions();
            }
            if let Some(entry) = self.disks.get_mut(disk as usize)
                && entry.timer == Some(at)
            {
                entry.timer = None;
                self.with_disk(disk, |disk, ctx| disk.on_timer(ctx));
                self.run_actions();
            }
        }
    }

    /// Once a second, or less often at rest.
    fn tick(&mut self) {
        // A shard at rest has given everything back after two looks; then one a minute is enough (histograms, patience).
        self.quiet_ticks =
            if std::mem::take(&mut self.worked) { 0 } else { self.quiet_ticks.wrapping_add(1) };
        let pressed = !self.starved.is_empty() || !self.want_buffer.is_empty() || self.rings.is_starved();
        let rests = self.quiet_ticks > 2 && !pressed;
        self.next_tick = self.now + if rests { REST } else { TICK };
        if rests && !self.quiet_ticks.is_multiple_of(20) {
            return;
        }
        self.pool.trim();
        self.sweep_rings();
        for (_, conn) in &mut self.conns {
            if pressed && conn.is_stalled(self.now, STALL) {
                conn.close(
                    "neither received its replies nor sent its data for 30 s while others waited for buffers",
                );
                self.dirty.push(conn.slot());
            } else if conn.is_idle(self.now, TICK) {
                conn.shrink();
            }
        }
        for (_, entry) in &mut self.disks {
            if entry.meter.idle_since(self.now) > TICK
                && let Some(disk) = &mut entry.disk
            {
                disk.idle();
            }
            entry.meter.release_when_idle(self.now);
        }
    }

    /// Runs a disk's code. A panic in it quarantines the disk and nothing else.
    fn with_disk(&mut self, slot: u32, event: impl FnOnce(&mut Disk, &mut Ctx<'_>)) {
        let Some(entry) = self.disks.get_mut(slot as usize) else { return };
        let Some(disk) = entry.disk.as_mut() else { return };
        let mut out = std::mem::take(&mut self.scratch);
        let mut ctx = Ctx { now: self.now, disk: slot, requests: &mut self.requests, out: &mut out };
        let result = std::panic::catch_unwind(AssertUnwindSafe(|| event(disk, &mut ctx)));
        match result {
            Ok(()) => {
                // Not in the past: a turn that asks for itself would starve the others.
                let wake_at = disk.wake_at().map(|at| at.max(self.now + MILLISECOND / 100));
                if let Some(at) = wake_at
                    && entry.timer.is_none_or(|timer| at < timer)
                {
                    entry.timer = Some(at);
                    self.timers.push(Reverse((at, slot)));
                }
                self.actions.extend(out.drain(..).map(|action| (slot, action)));
            }
            Err(panic) => {
                out.clear();
                self.quarantine(slot, &panic_message(panic.as_ref()));
            }
        }
        self.scratch = out;
    }

    fn quarantine(&mut self, slot: u32, message: &str) {
        // Answers that were decided before stand; everything else of this disk is begun again.
        self.actions.retain(|(disk, action)| *disk != slot || matches!(action, Action::Answer { .. }));
        self.starved.retain(|(disk, _)| *disk != slot);
        self.retry.retain(|(disk, _)| *disk != slot);
        for gate in self.gates.values_mut() {
            gate.forget(slot);
        }
        if let Some(store) = self.disks[slot as usize].store {
            self.open_gate(store);
        }
        self.drop_volume(slot);
        self.end_swap(slot, "the disk's code failed");
        let entry = &mut self.disks[slot as usize];
        entry.panics += 1;
        entry.quarantined = true;
        let reason = format!("the disk's code failed ({message}); please report it");
        if let Some(disk) = &mut entry.disk {
            disk.config().counters.quarantines.add(1);
            if disk.state() != DiskState::Quarantined {
                entry.before_quarantine = (disk.state(), disk.reason().to_owned());
            }
            if !entry.zombie {
                disk.set_state(DiskState::Quarantined, &reason);
            }
        }
        let id = entry.id;
        self.unsettled.push(slot);
        self.events.send(Event::State { disk: id, state: DiskState::Quarantined, reason });
    }

    /// Adds requests of a connection and lets the disk see them.
    fn submit(&mut self, request: Request) {
        let disk = request.disk;
        if let Some(entry) = self.disks.get_mut(disk as usize) {
            entry.requests += 1;
            if let Some(d) = &entry.disk {
                d.config().counters.io_now.add(1);
            }
            let quarantined = entry.quarantined;
            let key = self.requests.insert(request);
            if !quarantined {
                self.with_disk(disk, |disk, ctx| disk.submit(ctx, key));
            }
        }
    }

    fn backend(&self, disk: u32) -> Option<&Backend> {
        self.disks.get(disk as usize)?.disk.as_ref().map(|disk| &disk.config().backend)
    }
}

fn panic_message(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|s| (*s).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "panic".to_owned())
}
