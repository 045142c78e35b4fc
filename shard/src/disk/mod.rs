//! A disk: which requests run, which wait, and what a failure means. A pure state machine.
//!
//! Events come in as method calls, what shall happen goes out as [`Action`]s that the reactor carries out afterwards, in order. A
//! disk touches no ring, no buffer and no other disk; so a panic in here is caught by the reactor, which drops the actions of
//! that event, waits for the disk's kernel operations and builds the disk anew from its configuration and the unanswered
//! requests (which live in the reactor's slab).
//!
//! ```text
//! submit -> [held: state] -> [waiting: limits] -> start -> file.rs | space.rs | sync.rs -> answer
//!                                  ^                            |
//!                                  +--- resume <- [failed] <----+ error, policy `pause`
//! ```

mod file;
mod space;
mod sync;

use std::collections::VecDeque;

use crate::api::{Backend, CacheMode, DiskConfig, DiskState, ErrorPolicy, ShardError, ShardErrorKind};
use crate::clock::Nanos;
use crate::limits::{Admission, Direction, Limiter};
use crate::request::{Client, Kind, Phase, ReqKey, Requests};
use crate::storage::side::{Extent, SideCall};

/// Requests of one disk that may be between start and answer; more wait in `held`.
const STARTED_MAX: u32 = 256;

/// Which descriptor of the image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    /// The main one.
    Direct,
    /// The buffered one behind the last whole block.
    Tail,
}

/// Which memory an operation moves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mem {
    /// The request's payload, from this byte on.
    Payload(u32),
    /// The request's bounce buffer, from this byte on; `size` is how large it has to be.
    Bounce {
        /// First byte.
        at: u32,
        /// Size of the whole buffer.
        size: u32,
    },
    /// Zeroes (writes only).
    Zeroes,
}

impl Mem {
    /// The memory behind the first `bytes` of it.
    pub fn behind(self, bytes: u32) -> Mem {
        match self {
            Mem::Payload(at) => Mem::Payload(at + bytes),
            Mem::Bounce { at, size } => Mem::Bounce { at: at + bytes, size },
            Mem::Zeroes => Mem::Zeroes,
        }
    }
}

/// What a disk wants done.
#[derive(Debug, Clone, Copy)]
pub enum Action {
    /// Move bytes. Answered by [`Disk::on_io`].
    Io {
        /// For this request.
        req: ReqKey,
        /// To the file, else from it.
        write: bool,
        /// Descriptor.
        target: Target,
        /// Byte offset in the file.
        offset: u64,
        /// Bytes.
        len: u32,
        /// Memory.
        mem: Mem,
    },
    /// Copy between payload and bounce buffer.
    Copy {
        /// Of this request.
        req: ReqKey,
        /// From the payload to the bounce buffer, else back.
        to_bounce: bool,
        /// Byte of the bounce buffer.
        bounce_at: u32,
        /// Byte of the payload.
        payload_at: u32,
        /// Bytes.
        len: u32,
    },
    /// Zero a part of the bounce buffer.
    ZeroBounce {
        /// Of this request.
        req: ReqKey,
        /// First byte.
        at: u32,
        /// Bytes.
        len: u32,
    },
    /// Zero the payload from this byte up to a length: a read met the end of the file.
    ZeroPayload {
        /// Of this request.
        req: ReqKey,
        /// First byte.
        at: u32,
        /// Bytes.
        len: u32,
    },
    /// fdatasync. Answered by [`Disk::on_sync`].
    Sync,
    /// fallocate. Answered by [`Disk::on_space`].
    Fallocate {
        /// Which group of requests it serves.
        group: u32,
        /// FALLOC_FL_*.
        mode: i32,
        /// Bytes.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// A call on a side thread. Answered by [`Disk::on_extents`], or [`Disk::on_space`] for a group.
    Side {
        /// For this request, or the group.
        target: SideTarget,
        /// The call.
        call: SideCall,
    },
    /// Carry a request of a format's image out. Answered by [`Disk::on_volume`].
    Volume {
        /// Which.
        req: ReqKey,
    },
    /// Discard, zero or list a range of a RAM disk or null disk at once. Answered by [`Disk::on_memory`].
    Memory {
        /// For this request.
        req: ReqKey,
    },
    /// The request does not need its bounce buffer any more.
    DropBounce {
        /// Which.
        req: ReqKey,
    },
    /// The request is done; its `errno` says how.
    Answer {
        /// Which.
        req: ReqKey,
    },
    /// The state changed by itself; tell the control thread.
    State,
}

/// Whom a side call serves.
#[derive(Debug, Clone, Copy)]
pub enum SideTarget {
    /// One request.
    Request(ReqKey),
    /// A group of discards.
    Group(u32),
}

/// What came of an [`Action::Io`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IoResult {
    /// All bytes moved.
    Done,
    /// The file ended after this many bytes (of the operation).
    Short(u32),
    /// An errno.
    Failed(i32),
}

/// What an event may use.
pub struct Ctx<'a> {
    /// The time of this turn.
    pub now: Nanos,
    /// The disk's slot.
    pub disk: u32,
    /// All requests of the shard.
    pub requests: &'a mut Requests,
    /// What shall be done.
    pub out: &'a mut Vec<Action>,
}

/// A disk of this shard.
#[derive(Debug)]
pub struct Disk {
    config: Box<DiskConfig>,
    state: DiskState,
    reason: String,
    limiter: Limiter,
    /// Requests that wait for a limit: reads, and everything that changes data.
    waiting: [VecDeque<ReqKey>; 2],
    /// When the head of a waiting queue may be tried again.
    wake_at: Option<Nanos>,
    /// Requests that wait for the state to change, or for others to finish (STARTED_MAX).
    held: VecDeque<ReqKey>,
    /// Requests that failed and wait for `resume` or `fail`.
    failed: Vec<ReqKey>,
    started: u32,
    /// `pump` is at work.
    pumping: bool,
    /// State and reason to return to when a move or a detach is taken back.
    before_hold: Option<(DiskState, String)>,
    /// Its image is being opened.
    opening: bool,
    /// An fdatasync failed: no flush succeeds until an operator says `resume --data-in-doubt`.
    flush_failed: bool,
    file: file::Edges,
    space: space::Space,
    sync: sync::SyncGroup,
}

fn error(kind: ShardErrorKind, message: String) -> ShardError {
    ShardError { kind, message }
}

impl Disk {
    /// A disk that serves at once.
    pub fn new(config: Box<DiskConfig>, now: Nanos) -> Disk {
        let limiter = Limiter::new(config.limits, config.groups.clone(), now);
        let file = file::Edges::new(&config.backend);
        config.counters.state.set(DiskState::Running as u64);
        Disk {
            config,
            state: DiskState::Running,
            reason: String::new(),
            limiter,
            waiting: Default::default(),
            wake_at: None,
            held: VecDeque::new(),
            failed: Vec::new(),
            started: 0,
            pumping: false,
            before_hold: None,
            opening: false,
            flush_failed: false,
            file,
            space: space::Space::default(),
            sync: sync::SyncGroup::default(),
        }
    }

    /// Its configuration.
    pub fn config(&self) -> &DiskConfig {
        &self.config
    }

    /// Gives the configuration back.
    pub fn into_config(self) -> Box<DiskConfig> {
        self.config
    }

    /// A new disk with the same configuration and limits, and no request: after a panic. The failed-flush mark survives, and
    /// so does the state to return to from a move or a detach.
    pub fn rebuilt(self, now: Nanos) -> Disk {
        let (flush_failed, before_hold) = (self.flush_failed, self.before_hold);
        let mut disk = Disk::new(self.config, now);
        disk.flush_failed = flush_failed;
        disk.before_hold = before_hold;
        disk
    }

    /// Its state.
    pub fn state(&self) -> DiskState {
        self.state
    }

    /// Why it is in its state.
    pub fn reason(&self) -> &str {
        &self.reason
    }

    /// Requests between start and answer.
    pub fn started(&self) -> u32 {
        self.started
    }

    /// An fdatasync has failed and nobody has accepted it.
    pub fn flush_failed(&self) -> bool {
        self.flush_failed
    }

    /// When a request that waits for a limit may be tried again.
    pub fn wake_at(&self) -> Option<Nanos> {
        if self.serves() { self.wake_at } else { None }
    }

    /// Sets the state without telling anybody (the reactor's commands do).
    pub fn set_state(&mut self, state: DiskState, reason: &str) {
        self.state = state;
        reason.clone_into(&mut self.reason);
        self.config.counters.state.set(state as u64);
    }

    fn enter_state(&mut self, ctx: &mut Ctx<'_>, state: DiskState, reason: String) {
        if self.state == state {
            return;
        }
        if self.state == DiskState::Parked {
            // The move goes on; this is the state to arrive in.
            self.before_hold = Some((state, reason));
            return;
        }
        self.set_state(state, &reason);
        ctx.out.push(Action::State);
    }

    /// New requests are started.
    fn serves(&self) -> bool {
        match self.state {
            _ if self.opening => false,
            DiskState::Running | DiskState::Draining => true,
            // With the policy `report` reads and writes go on; only flushes fail.
            DiskState::StorageError => self.config.on_error == ErrorPolicy::Report,
            _ => false,
        }
    }

    /// A new request.
    pub fn submit(&mut self, ctx: &mut Ctx<'_>, key: ReqKey) {
        match self.state {
            DiskState::Failed | DiskState::Zombie => self.refuse(ctx, key),
            _ if self.serves() && self.held.is_empty() && self.started < STARTED_MAX => self.admit(ctx, key),
            _ => self.held.push_back(key),
        }
    }

    /// Answers EIO to a request that was not started.
    fn refuse(&mut self, ctx: &mut Ctx<'_>, key: ReqKey) {
        ctx.requests[key].errno = libc::EIO;
        ctx.out.push(Action::Answer { req: key });
    }

    fn admit(&mut self, ctx: &mut Ctx<'_>, key: ReqKey) {
        let request = &ctx.requests[key];
        let direction = match request.kind {
            Kind::Read => Direction::Read,
            Kind::Write { .. } | Kind::Discard { .. } | Kind::WriteZeroes { .. } => Direction::Write,
            // Flushes are free and never wait: they cost the guest nothing and protect its data.
            Kind::Flush | Kind::Extents { .. } | Kind::SetLength { .. } => return self.start(ctx, key),
        };
        if self.limiter.is_unlimited() && self.waiting[direction as usize].is_empty() {
            return self.start(ctx, key);
        }
        if self.waiting[direction as usize].is_empty() && self.try_admit(ctx, key, direction) {
            return self.start(ctx, key);
        }
        if ctx.requests[key].throttled == 0 {
            ctx.requests[key].throttled = ctx.now;
            self.config.counters.throttled_now.add(1);
            if let Some(class) = ctx.requests[key].kind.class() {
                self.config.counters.ops[class as usize].throttled.add(1);
            }
        }
        self.waiting[direction as usize].push_back(key);
    }

    /// Asks the limits; on a refusal notes when to ask again.
    fn try_admit(&mut self, ctx: &mut Ctx<'_>, key: ReqKey, direction: Direction) -> bool {
        let request = &ctx.requests[key];
        let bytes = match request.kind {
            Kind::Read | Kind::Write { .. } => request.len,
            kind if self.fills(kind, request.offset, request.len) => request.len,
            _ => crate::limits::erase_cost_bytes(request.len),
        };
        match self.limiter.admit(ctx.now, direction, request.operations, bytes) {
            Admission::Go { would_wait } => {
                if would_wait && let Some(class) = request.kind.class() {
                    self.config.counters.ops[class as usize].would_throttle.add(1);
                }
                true
            }
            Admission::Wait { until } => {
                self.wake_at = Some(self.wake_at.map_or(until, |at| at.min(until)));
                false
            }
        }
    }

    /// The time that [`Disk::wake_at`] named has come, or limits have changed: lets requests go that may.
    pub fn on_timer(&mut self, ctx: &mut Ctx<'_>) {
        if !self.serves() {
            return;
        }
        self.wake_at = None;
        for direction in [Direction::Read, Direction::Write] {
            while let Some(&key) = self.waiting[direction as usize].front() {
                if self.started >= STARTED_MAX {
                    // Asked again when one of those is answered.
                    break;
                }
                if !self.limiter.is_unlimited() && !self.try_admit(ctx, key, direction) {
                    break;
                }
                self.waiting[direction as usize].pop_front();
                self.unthrottle(ctx, key);
                self.start(ctx, key);
            }
        }
    }

    fn unthrottle(&mut self, ctx: &mut Ctx<'_>, key: ReqKey) {
        let request = &mut ctx.requests[key];
        if request.throttled != 0 {
            self.config.counters.throttled_now.sub(1);
            if let Some(class) = request.kind.class() {
                let waited = ctx.now.saturating_sub(request.throttled);
                self.config.counters.ops[class as usize].throttled_ns.add(waited);
            }
            request.throttled = 0;
        }
    }

    /// New limits, effective at once.
    pub fn set_limits(
        &mut self,
        ctx: &mut Ctx<'_>,
        limits: crate::limits::Limits,
        groups: Vec<std::sync::Arc<crate::limits::Group>>,
    ) {
        self.limiter.set(limits, groups.clone(), ctx.now);
        self.config.limits = limits;
        self.config.groups = groups;
        self.on_timer(ctx);
    }

    /// Gives leases of groups back when nothing has run for a while.
    pub fn idle(&mut self) {
        if self.waiting.iter().all(VecDeque::is_empty) {
            self.limiter.idle();
        }
    }

    fn start(&mut self, ctx: &mut Ctx<'_>, key: ReqKey) {
        self.started += 1;
        let request = &mut ctx.requests[key];
        request.started = ctx.now;
        let kind = request.kind;
        if kind.changes() {
            if self.config.read_only {
                return self.finish(ctx, key, libc::EPERM);
            }
            self.note_change(key);
        }
        if matches!(self.config.backend, Backend::Image(_)) {
            let durable = || kind == Kind::Flush || kind.fua() || (kind.changes() && self.writes_through());
            // The files do not know of one that failed before they were opened: before a move, or under another image.
            if self.flush_failed && durable() {
                return self.refuse_sync(ctx, key);
            }
            let request = &mut ctx.requests[key];
            request.phase = Phase::Transfer;
            request.pending = 1;
            ctx.out.push(Action::Volume { req: key });
            return;
        }
        let is_file = matches!(self.config.backend, Backend::File(_));
        match kind {
            Kind::Read => self.start_read(ctx, key),
            Kind::Write { .. } => self.start_write(ctx, key),
            Kind::Flush => self.start_flush(ctx, key),
            Kind::Discard { .. } | Kind::WriteZeroes { .. } if is_file => self.start_space(ctx, key),
            Kind::Extents { max } if is_file => {
                let request = &mut ctx.requests[key];
                request.phase = Phase::Punch;
                let call = SideCall::Extents { offset: request.offset, len: request.len, max };
                ctx.out.push(Action::Side { target: SideTarget::Request(key), call });
            }
            Kind::SetLength { grow } if is_file => {
                let request = &mut ctx.requests[key];
                request.phase = Phase::Punch;
                let call = SideCall::SetLength { length: request.offset, grow };
                ctx.out.push(Action::Side { target: SideTarget::Request(key), call });
            }
            Kind::SetLength { .. } => self.finish(ctx, key, libc::EINVAL),
            Kind::Discard { .. } | Kind::WriteZeroes { .. } | Kind::Extents { .. } => {
                ctx.out.push(Action::Memory { req: key });
            }
        }
    }

    /// An [`Action::Memory`] is done.
    pub fn on_memory(&mut self, ctx: &mut Ctx<'_>, key: ReqKey, result: Result<Vec<Extent>, i32>) {
        match result {
            Ok(extents) => {
                ctx.requests[key].extents = extents;
                self.finish(ctx, key, 0);
            }
            Err(errno) => self.failed_io(ctx, key, errno),
        }
    }

    /// An [`Action::Volume`] is done. `sync_failed`: an fdatasync of the image has failed, now or before.
    pub fn on_volume(&mut self, ctx: &mut Ctx<'_>, key: ReqKey, errno: i32, sync_failed: bool) {
        let request = &mut ctx.requests[key];
        request.pending = 0;
        request.guard = None;
        // "Not fast" is an answer, not a failure.
        let refused =
            errno == libc::EOPNOTSUPP && matches!(request.kind, Kind::WriteZeroes { fast: true, .. });
        match errno {
            0 => self.finish(ctx, key, 0),
            _ if refused => self.finish(ctx, key, errno),
            _ if sync_failed => self.on_volume_sync_failed(ctx, key, errno),
            _ => self.failed_io(ctx, key, errno),
        }
    }

    /// The image is being opened: requests wait. Or it has been.
    pub fn set_opening(&mut self, ctx: &mut Ctx<'_>, opening: bool) {
        self.opening = opening;
        if !opening {
            self.on_timer(ctx);
            self.pump(ctx);
        }
    }

    /// Another image, while nothing is started; returns the old one.
    pub fn set_backend(&mut self, backend: Backend) -> Backend {
        debug_assert_eq!(self.started, 0);
        let old = std::mem::replace(&mut self.config.backend, backend);
        self.file = file::Edges::new(&self.config.backend);
        self.space = space::Space::default();
        self.sync = sync::SyncGroup::default();
        old
    }

    /// The size that the image has.
    pub fn set_size(&mut self, size_bytes: u64) {
        self.config.size_bytes = size_bytes;
    }

    /// A side call for one request is done.
    pub fn on_extents(&mut self, ctx: &mut Ctx<'_>, key: ReqKey, result: Result<Vec<Extent>, i32>) {
        self.on_memory(ctx, key, result);
    }

    /// Ends a started request.
    fn finish(&mut self, ctx: &mut Ctx<'_>, key: ReqKey, errno: i32) {
        ctx.requests[key].errno = errno;
        self.release_edges(ctx, key);
        self.started -= 1;
        ctx.out.push(Action::Answer { req: key });
        self.pump(ctx);
    }

    /// Starts what waited for others to finish.
    fn pump(&mut self, ctx: &mut Ctx<'_>) {
        // What is started may end at once and come here again: the outer loop goes on, the stack does not grow.
        if !self.serves() || self.pumping {
            return;
        }
        self.pumping = true;
        while self.started < STARTED_MAX
            && let Some(key) = self.held.pop_front()
        {
            self.admit(ctx, key);
        }
        self.pumping = false;
        if self.wake_at.is_none() && self.waiting.iter().any(|queue| !queue.is_empty()) {
            // They were stopped by STARTED_MAX, not by a limit.
            self.wake_at = Some(ctx.now);
        }
    }

    /// A kernel operation of a request failed for good.
    fn failed_io(&mut self, ctx: &mut Ctx<'_>, key: ReqKey, errno: i32) {
        let no_space = matches!(errno, libc::ENOSPC | libc::EDQUOT);
        let policy = if no_space { self.config.on_enospc } else { self.config.on_error };
        // The policy is for what clients ask; an operator hears at once that a command failed.
        let command = matches!(ctx.requests[key].kind, Kind::SetLength { .. });
        let given_up = matches!(self.state, DiskState::Failed | DiskState::Zombie);
        if policy == ErrorPolicy::Report || command || given_up {
            return self.finish(ctx, key, errno);
        }
        let request = &ctx.requests[key];
        let what = nix::errno::Errno::from_raw(errno).desc();
        let reason = format!(
            "{} of {} bytes at {} failed: {what}; requests are held: mend the store, then `resume`, or `fail`",
            request.kind.class().map_or("block status", |class| class.label()),
            request.len,
            request.offset,
        );
        self.hold_failed(ctx, key);
        self.config.counters.storage_errors.add(1);
        self.enter_state(ctx, DiskState::StorageError, reason);
    }

    fn hold_failed(&mut self, ctx: &mut Ctx<'_>, key: ReqKey) {
        self.release_edges(ctx, key);
        ctx.out.push(Action::DropBounce { req: key });
        ctx.requests[key].rewind();
        self.started -= 1;
        self.failed.push(key);
    }

    /// Takes a started request back that has nothing in the kernel; it runs again when the disk serves.
    pub fn unstart(&mut self, ctx: &mut Ctx<'_>, key: ReqKey) {
        ctx.requests[key].pending = 0;
        self.release_edges(ctx, key);
        ctx.requests[key].rewind();
        self.started -= 1;
        self.held.push_back(key);
    }

    /// Stops starting requests.
    pub fn pause(&mut self) -> Result<(), ShardError> {
        match self.state {
            DiskState::Running | DiskState::Pausing => {
                self.set_state(DiskState::Pausing, "pause was asked for")
            }
            DiskState::Paused => {}
            state => {
                let message = format!(
                    "disk {} is {state:?} ({}): only a running disk can be paused",
                    self.config.name, self.reason
                );
                return Err(error(ShardErrorKind::WrongState, message));
            }
        }
        Ok(())
    }

    /// Whether [`Disk::resume`] goes on, or why not.
    pub fn may_resume(&self, data_in_doubt: bool) -> Result<(), ShardError> {
        match self.state {
            DiskState::Running | DiskState::Paused | DiskState::Pausing | DiskState::StorageError => {}
            state => {
                let message = format!(
                    "disk {} is {state:?} ({}): detach it and attach it again",
                    self.config.name, self.reason
                );
                return Err(error(ShardErrorKind::WrongState, message));
            }
        }
        if self.flush_failed && !data_in_doubt {
            let message = format!(
                "an fdatasync of disk {} failed, so data that a client wrote may be lost: check the store, then \
                 `resume --data-in-doubt` to accept that, or `fail` to give the disk up",
                self.config.name
            );
            return Err(error(ShardErrorKind::DataInDoubt, message));
        }
        Ok(())
    }

    /// Runs again after a pause or a storage error.
    pub fn resume(&mut self, ctx: &mut Ctx<'_>, data_in_doubt: bool) -> Result<(), ShardError> {
        self.may_resume(data_in_doubt)?;
        if std::mem::take(&mut self.flush_failed) {
            self.config.counters.data_in_doubt.add(1);
        }
        self.set_state(DiskState::Running, "");
        for key in std::mem::take(&mut self.failed) {
            // It paid its limit when it first ran.
            self.start(ctx, key);
        }
        self.on_timer(ctx);
        self.pump(ctx);
        Ok(())
    }

    /// Gives the disk up: what waits is answered with EIO, and so is everything that comes.
    pub fn fail(&mut self, ctx: &mut Ctx<'_>, state: DiskState, reason: &str) {
        // Nothing to return to, should a move be under way.
        self.before_hold = None;
        self.set_state(state, reason);
        for direction in 0..2 {
            for key in std::mem::take(&mut self.waiting[direction]) {
                self.unthrottle(ctx, key);
                self.refuse(ctx, key);
            }
        }
        let held = std::mem::take(&mut self.held);
        for key in held.into_iter().chain(std::mem::take(&mut self.failed)) {
            self.refuse(ctx, key);
        }
        self.wake_at = None;
    }

    /// Stops starting requests until [`Disk::unhold`] or [`Disk::take_unstarted`]: for a move.
    pub fn hold(&mut self) {
        self.before_hold = Some((self.state, std::mem::take(&mut self.reason)));
        self.set_state(DiskState::Parked, "being moved to another shard");
    }

    /// Finishes what was taken and no more: for a detach.
    pub fn drain(&mut self) {
        self.before_hold = Some((self.state, std::mem::take(&mut self.reason)));
        if self.state == DiskState::Running {
            self.set_state(DiskState::Draining, "being detached");
        }
    }

    /// Another state to return to than the one before [`Disk::hold`].
    pub fn set_state_before_hold(&mut self, state: DiskState, reason: String) {
        self.before_hold = Some((state, reason));
    }

    /// Nothing is held any more: a paused disk may do its last flush.
    pub fn drain_rest(&mut self) {
        if self.state == DiskState::Paused {
            self.set_state(DiskState::Draining, "being detached");
        }
    }

    /// The state before [`Disk::hold`].
    pub fn state_before_hold(&mut self) -> (DiskState, String) {
        self.before_hold.take().unwrap_or((self.state, self.reason.clone()))
    }

    /// It was given up before [`Disk::hold`].
    pub fn failed_before_hold(&self) -> bool {
        self.before_hold.as_ref().is_some_and(|(state, _)| *state == DiskState::Failed)
    }

    /// Returns to the state before [`Disk::hold`] or [`Disk::drain`].
    pub fn unhold(&mut self, ctx: &mut Ctx<'_>) {
        let Some((state, reason)) = self.before_hold.take() else { return };
        // A disk that has failed while it drained has said so, and stays so.
        if self.state != DiskState::StorageError {
            self.set_state(state, &reason);
            if state == DiskState::StorageError {
                // It may have failed meanwhile, when nobody was told.
                ctx.out.push(Action::State);
            }
        }
        self.on_timer(ctx);
        self.pump(ctx);
    }

    /// Takes a state over from another shard.
    pub fn restore(&mut self, state: DiskState, reason: &str, flush_failed: bool) {
        self.set_state(state, reason);
        self.flush_failed = flush_failed;
    }

    /// A client has gone: what it asked for and nobody has begun is dropped, so that it cannot land behind what its client
    /// writes over another connection.
    pub fn forget(&mut self, ctx: &mut Ctx<'_>, client: Client, generation: u32) {
        let stays = |requests: &Requests, key: ReqKey| {
            requests[key]
                .origin
                .is_none_or(|origin| (origin.client, origin.generation) != (client, generation))
        };
        let mut dropped = Vec::new();
        let mut sift = |key: &ReqKey| {
            let stays = stays(ctx.requests, *key);
            if !stays {
                dropped.push(*key);
            }
            stays
        };
        for queue in self.waiting.iter_mut().chain([&mut self.held]) {
            queue.retain(&mut sift);
        }
        self.failed.retain(sift);
        for key in dropped {
            self.unthrottle(ctx, key);
            self.refuse(ctx, key);
        }
    }

    /// Takes back all requests that are not started, in the order in which they would run: for a park or a rebuild.
    pub fn take_unstarted(&mut self, ctx: &mut Ctx<'_>) -> Vec<ReqKey> {
        let mut keys = std::mem::take(&mut self.failed);
        for direction in 0..2 {
            for key in std::mem::take(&mut self.waiting[direction]) {
                self.unthrottle(ctx, key);
                keys.push(key);
            }
        }
        keys.extend(std::mem::take(&mut self.held));
        self.wake_at = None;
        keys
    }

    /// Every write must be durable before it is answered.
    pub fn writes_through(&self) -> bool {
        let file = match &self.config.backend {
            Backend::File(file) => Some(file),
            Backend::Image(chain) => chain.layers.first().and_then(|layer| layer.files.first()),
            Backend::Ram(_) | Backend::Null => None,
        };
        file.is_some_and(|file| file.cache == CacheMode::Writethrough)
    }

    /// Requests that wait for anything, and requests that were started.
    #[cfg(test)]
    pub fn counts(&self) -> (usize, usize) {
        let waiting = self.waiting.iter().map(VecDeque::len).sum::<usize>();
        (waiting + self.held.len() + self.failed.len(), self.started as usize)
    }

    /// Panics: the test of quarantine.
    pub fn panic_for_test(&self) {
        panic!("injected panic in disk {}", self.config.name);
    }
}
