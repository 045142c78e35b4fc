//! Carrying out what disks want, and bringing results back to them.

use std::os::fd::AsRawFd;

use super::ops::{IoOp, OpKind};
use super::*;
use crate::api::{CacheMode, ImageFile};
use crate::disk::{IoResult, Mem, SideTarget, Target};
use crate::ram::{RamDisk, RamOutcome};
use crate::request::{Client, Kind};
use crate::storage::Completion;
use crate::storage::pool::Buf;
use crate::storage::side::{Extent, SideJob};
use crate::storage::uring::IOWQ_WORKERS;

/// Punted operations of one backing store that may be out: a quarter of the kernel's workers, so that a store that never
/// answers leaves most of them to its neighbours.
const PER_STORE: u32 = IOWQ_WORKERS[0] / 4;
/// Bounce buffers of a shard; who comes later waits. Every disk may have one beyond.
const BOUNCES_MAX: u32 = 64;
/// Bounce buffers of one disk: a store that never answers must leave the others theirs.
const BOUNCES_PER_DISK: u32 = BOUNCES_MAX / 4;
/// Tries of an operation that the kernel interrupted.
const TRIES_MAX: u8 = 16;

/// Punted work of one backing store: all that may take one of the kernel's workers. fdatasync and fallocate always do, and so
/// does I/O through the page cache and on file systems whose direct I/O blocks. Other I/O is first tried outside of the gate
/// and without waiting, which is how a healthy store does nearly all of it; what the kernel would have to wait for comes
/// back and goes through the gate.
#[derive(Debug, Default)]
pub(super) struct Gate {
    in_flight: u32,
    waiting: VecDeque<(u32, Action)>,
}

impl Gate {
    /// Operations that are out.
    #[cfg(test)]
    pub fn in_flight(&self) -> u32 {
        self.in_flight
    }

    /// Drops what waits for a disk.
    pub fn forget(&mut self, slot: u32) {
        self.waiting.retain(|(disk, _)| *disk != slot);
    }
}

impl<K: Kernel> Shard<K> {
    pub(super) fn run_actions(&mut self) {
        loop {
            while let Some((disk, action)) = self.actions.pop_front() {
                self.carry_out(disk, action);
            }
            match self.awake.pop() {
                Some(disk) => self.run_tasks(disk),
                None => return,
            }
        }
    }

    fn carry_out(&mut self, disk: u32, action: Action) {
        let Some(entry) = self.disks.get(disk as usize).filter(|entry| entry.disk.is_some()) else { return };
        if entry.zombie {
            return self.carry_out_for_zombie(disk, action);
        }
        self.carry_out_for_disk(disk, action);
    }

    fn carry_out_for_disk(&mut self, disk: u32, action: Action) {
        match action {
            Action::Io { .. } => self.start_io(disk, action),
            Action::Sync | Action::Fallocate { .. } => {
                if self.enter_gate(disk, &action) {
                    self.launch(disk, action, 0, true);
                }
            }
            Action::DropBounce { req } => {
                if let Some(bounce) = self.requests[req].bounce.take() {
                    self.give_bounce(disk, bounce);
                }
            }
            Action::Side { target, call } => {
                let Some(Backend::File(file)) = self.backend(disk).cloned() else { return };
                let user_data = self.ops.insert(OpKind::Side { disk, target });
                self.disks[disk as usize].ops += 1;
                self.kernel.side(SideJob { user_data, file, call });
            }
            Action::Memory { req } => self.memory(disk, req),
            Action::Volume { req } => self.start_volume(disk, req),
            Action::Copy { req, to_bounce, bounce_at, payload_at, len } => {
                let (memory, base) = self.memory_of(req);
                let bounce = &self.requests[req].bounce;
                if let (Some(payload), Some(bounce)) = (self.requests[memory].payload.as_ref(), bounce) {
                    let (payload_at, bounce_at, len) =
                        ((base + payload_at) as usize, bounce_at as usize, len as usize);
                    if to_bounce {
                        self.pool.copy(payload, payload_at, bounce, bounce_at, len);
                    } else {
                        self.pool.copy(bounce, bounce_at, payload, payload_at, len);
                    }
                }
            }
            Action::ZeroBounce { req, at, len } => {
                if let Some(bounce) = &self.requests[req].bounce {
                    self.pool.bytes_mut(bounce)[at as usize..][..len as usize].fill(0);
                }
            }
            Action::ZeroPayload { req, at, len } => {
                let (memory, base) = self.memory_of(req);
                if let Some(payload) = &self.requests[memory].payload {
                    self.pool.bytes_mut(payload)[(base + at) as usize..][..len as usize].fill(0);
                }
            }
            Action::Answer { req } => self.answer(disk, req),
            Action::State => {
                let entry = &self.disks[disk as usize];
                if let Some(d) = &entry.disk {
                    let reason = d.reason().to_owned();
                    self.events.send(Event::State { disk: entry.id, state: d.state(), reason });
                }
                if self.disks[disk as usize].pending.is_some() {
                    self.unsettled.push(disk);
                }
            }
        }
    }

    /// A disk that was detached by force: nothing new goes to the kernel.
    fn carry_out_for_zombie(&mut self, disk: u32, action: Action) {
        const GONE: i32 = libc::EIO;
        match action {
            Action::Io { req, mem, len, .. } => self.io_done(disk, req, mem, len, IoResult::Failed(GONE)),
            Action::Sync => self.with_disk(disk, |disk, ctx| disk.on_sync(ctx, GONE)),
            Action::Fallocate { group, .. } | Action::Side { target: SideTarget::Group(group), .. } => {
                self.with_disk(disk, |disk, ctx| disk.on_space(ctx, group, GONE));
            }
            Action::Volume { req } => self.with_disk(disk, |disk, ctx| disk.on_volume(ctx, req, GONE, false)),
            Action::Memory { req } | Action::Side { target: SideTarget::Request(req), .. } => {
                self.with_disk(disk, |disk, ctx| disk.on_memory(ctx, req, Err(GONE)));
            }
            _ => self.carry_out_for_disk(disk, action),
        }
    }

    /// Actions of a disk that wait for buffers, kernel workers or the next turn go on at once, to be refused.
    pub(super) fn unqueue(&mut self, slot: u32) {
        let mut queued = Vec::new();
        let mut take = |disk: u32, action: Action| {
            let ours = disk == slot;
            if ours {
                queued.push((disk, action));
            }
            !ours
        };
        self.starved.retain(|&(disk, action)| take(disk, action));
        self.retry.retain(|&(disk, action)| take(disk, action));
        for gate in self.gates.values_mut() {
            gate.waiting.retain(|&(disk, action)| take(disk, action));
        }
        self.actions.extend(queued);
    }

    /// Finds memory for an I/O and starts it.
    fn start_io(&mut self, disk: u32, action: Action) {
        let Action::Io { req, write, target, len, mem, .. } = action else { return };
        let Some(addr) = self.address(disk, req, mem) else {
            self.counters.buffer_waits.add(1);
            self.starved.push_back((disk, action));
            if self.disks[disk as usize].pending.is_some() && !self.feeding {
                self.unsettled.push(disk);
            }
            return;
        };
        let gated = match self.backend(disk) {
            Some(Backend::File(file)) => descriptor(file, target).1 || self.disks[disk as usize].punts,
            Some(Backend::Ram(ram)) => {
                let ram = ram.clone();
                return self.ram_io(disk, &ram, action);
            }
            _ => {
                if !write && let Some(payload) = &self.requests[req].payload {
                    self.pool.bytes_mut(payload)[..len as usize].fill(0);
                }
                return self.io_done(disk, req, mem, len, IoResult::Done);
            }
        };
        if !gated || self.enter_gate(disk, &action) {
            self.launch(disk, action, addr, gated);
        }
    }

    /// Hands a file operation to the kernel. `addr` is the memory of an I/O.
    fn launch(&mut self, disk: u32, action: Action, addr: usize, gated: bool) {
        let Some(Backend::File(file)) = self.backend(disk) else { return };
        let fd = file.fd.as_raw_fd();
        let (kind, op) = match action {
            Action::Io { req, write, target, offset, len, mem } => {
                let (fd, _) = descriptor(file, target);
                self.disks[disk as usize].ops += 1;
                let op =
                    IoOp { disk, req, write, target, mem, fd, addr, offset, len, done: 0, tries: 0, gated };
                return self.push_io(op);
            }
            Action::Fallocate { group, mode, offset, len } => {
                (OpKind::Fallocate { disk, group }, Op::Fallocate { fd, mode, offset, len })
            }
            _ => (OpKind::Sync { disk }, Op::Fdatasync { fd }),
        };
        let user_data = self.ops.insert(kind);
        self.disks[disk as usize].ops += 1;
        self.counters.ring_ops.add(1);
        self.kernel.push(user_data, op);
    }

    /// Address of the memory of an operation; takes a buffer if there is none yet. `None` when there is no buffer to be had.
    pub(super) fn address(&mut self, disk: u32, req: ReqKey, mem: Mem) -> Option<usize> {
        if !unload(&mut self.pool, &mut self.conns, &mut self.requests[req]) {
            return None;
        }
        let request = &self.requests[req];
        // The bytes of a read arrive in its payload in the end, also those that are bounced.
        let needs_payload = matches!(mem, Mem::Payload(_)) || request.kind == Kind::Read;
        let borrowed = request.via.and_then(|via| via.payload());
        if needs_payload && request.payload.is_none() && borrowed.is_none() {
            let (_, guaranteed) = self.place_of(req);
            let request = &mut self.requests[req];
            let buf = self.pool.take(request.len as usize, guaranteed)?;
            if let Some(origin) = request.origin {
                match origin.client {
                    Client::Conn(conn) => {
                        let conn = self.conns.get_mut(conn as usize);
                        if let Some(conn) = conn.filter(|conn| conn.generation == origin.generation) {
                            conn.note_buffer(&buf);
                        }
                    }
                    Client::Ring(ring) => {
                        if let Some(ring) = self.rings.get(ring, origin.generation) {
                            ring.note_buffer(&buf);
                        }
                    }
                }
            }
            request.payload = Some(buf);
        }
        if let (Some((lender, base)), Mem::Payload(at)) = (borrowed, mem) {
            let payload = self.requests.get(lender)?.payload.as_ref()?;
            return Some(self.pool.address(payload) + (base + at) as usize);
        }
        let request = &mut self.requests[req];
        match mem {
            Mem::Zeroes => Some(self.pool.zeroes()),
            Mem::Payload(at) => request.payload.as_ref().map(|buf| self.pool.address(buf) + at as usize),
            Mem::Bounce { at, size } => {
                if request.bounce.is_none() {
                    // Beyond the budget, or payloads that wait for a bounce buffer could fill it; bounded on its own.
                    let entry = &mut self.disks[disk as usize];
                    let full = self.bounces >= BOUNCES_MAX || entry.bounces >= BOUNCES_PER_DISK;
                    if full && entry.bounces > 0 {
                        return None;
                    }
                    request.bounce = Some(self.pool.take(size as usize, true)?);
                    self.bounces += 1;
                    entry.bounces += 1;
                }
                request.bounce.as_ref().map(|buf| self.pool.address(buf) + at as usize)
            }
        }
    }

    /// Whose payload is the memory of a request, and from which byte on.
    fn memory_of(&self, req: ReqKey) -> (ReqKey, u32) {
        self.requests[req].via.and_then(|via| via.payload()).unwrap_or((req, 0))
    }

    /// Who asked, and whether the payload may go beyond the budget.
    fn place_of(&self, req: ReqKey) -> (Option<Client>, bool) {
        let request = &self.requests[req];
        let Some(origin) = request.origin else { return (None, true) };
        let generation = origin.generation;
        let first = match origin.client {
            Client::Conn(conn) => {
                let conn = self.conns.get(conn as usize).filter(|conn| conn.generation == generation);
                conn.is_none_or(|conn| conn.may_always_have(origin.command, request.offset))
            }
            Client::Ring(ring) => {
                let ring = self.rings.slab.get(ring as usize).filter(|ring| ring.generation == generation);
                ring.is_none_or(|ring| ring.buffers() == 0)
            }
        };
        (Some(origin.client), first)
    }

    /// Gives the bounce buffer of a request back, if it has one.
    pub(super) fn free_bounce(&mut self, disk: u32, request: &mut Request) {
        if let Some(bounce) = request.bounce.take() {
            self.give_bounce(disk, bounce);
        }
    }

    fn give_bounce(&mut self, disk: u32, bounce: Buf) {
        self.pool.give(bounce);
        self.bounces -= 1;
        if let Some(entry) = self.disks.get_mut(disk as usize) {
            entry.bounces -= 1;
        }
    }

    fn push_io(&mut self, op: IoOp) {
        let (fd, addr) = (op.fd, op.addr + op.done as usize);
        let (len, offset) = (op.len - op.done, op.offset + u64::from(op.done));
        // Outside of the gate nothing may take one of the kernel's workers.
        let (write, nowait) = (op.write, !op.gated);
        let user_data = self.ops.insert(OpKind::Io(op));
        self.counters.ring_ops.add(1);
        self.kernel.push(
            user_data,
            if write {
                Op::Write { fd, addr, len, offset, nowait }
            } else {
                Op::Read { fd, addr, len, offset, nowait }
            },
        );
    }

    fn ram_io(&mut self, disk: u32, ram: &RamDisk, action: Action) {
        let Action::Io { req, write, target, offset, len, mem } = action else { return };
        let at = if let Mem::Payload(at) = mem { at } else { 0 };
        let Some(payload) = &self.requests[req].payload else { return };
        let range = at as usize..(at + len) as usize;
        let outcome = if write {
            ram.write(offset, &self.pool.bytes(payload)[range])
        } else {
            ram.read(offset, &mut self.pool.bytes_mut(payload)[range])
        };
        let result = match outcome {
            RamOutcome::Done => IoResult::Done,
            RamOutcome::Partial { done } => {
                let (offset, len, mem) = (offset + done, len - done as u32, Mem::Payload(at + done as u32));
                self.retry.push((disk, Action::Io { req, write, target, offset, len, mem }));
                return;
            }
            RamOutcome::NoSpace => IoResult::Failed(libc::ENOSPC),
            RamOutcome::Failed(errno) => IoResult::Failed(errno),
        };
        self.io_done(disk, req, mem, len, result);
    }

    /// Discards, zeroes or lists a range of a disk in memory.
    fn memory(&mut self, disk: u32, req: ReqKey) {
        let request = &self.requests[req];
        let (kind, offset, len) =
            (request.kind, request.offset + request.cursor, request.len - request.cursor);
        let result = match self.backend(disk) {
            Some(Backend::Ram(ram)) => match kind {
                Kind::Extents { max } => {
                    let extents = ram.extents(offset, len, max);
                    Ok(extents.into_iter().map(|e| Extent { len: e.len, hole: e.hole }).collect())
                }
                _ => {
                    let outcome = match kind {
                        Kind::WriteZeroes { no_hole, .. } => ram.write_zeroes(offset, len, !no_hole),
                        _ => ram.discard(offset, len),
                    };
                    match outcome {
                        RamOutcome::Done => Ok(Vec::new()),
                        RamOutcome::Partial { done } => {
                            self.requests[req].cursor += done;
                            self.retry.push((disk, Action::Memory { req }));
                            return;
                        }
                        RamOutcome::NoSpace => Err(libc::ENOSPC),
                        RamOutcome::Failed(errno) => Err(errno),
                    }
                }
            },
            _ => Ok(vec![Extent { len, hole: true }]),
        };
        self.with_disk(disk, |disk, ctx| disk.on_memory(ctx, req, result));
    }

    /// Counts one more punted operation of the disk's store, or lets the action wait.
    fn enter_gate(&mut self, disk: u32, action: &Action) -> bool {
        let Some(store) = self.disks[disk as usize].store else { return true };
        let gate = self.gates.entry(store).or_default();
        if gate.in_flight >= PER_STORE {
            gate.waiting.push_back((disk, *action));
            return false;
        }
        gate.in_flight += 1;
        true
    }

    fn leave_gate(&mut self, disk: u32) {
        let Some(store) = self.disks.get(disk as usize).and_then(|entry| entry.store) else { return };
        let Some(gate) = self.gates.get_mut(&store) else { return };
        gate.in_flight = gate.in_flight.saturating_sub(1);
        self.open_gate(store);
    }

    /// Starts what waits for a store, as far as its share goes.
    pub(super) fn open_gate(&mut self, store: u64) {
        while let Some(gate) = self.gates.get_mut(&store) {
            if gate.in_flight >= PER_STORE {
                return;
            }
            let Some((disk, action)) = gate.waiting.pop_front() else {
                if gate.in_flight == 0 {
                    self.gates.remove(&store);
                }
                return;
            };
            gate.in_flight += 1;
            let addr = match action {
                // It got its memory before it began to wait.
                Action::Io { req, mem, .. } => self.address(disk, req, mem).unwrap_or(0),
                _ => 0,
            };
            self.launch(disk, action, addr, true);
        }
    }

    /// A completion of the kernel.
    pub(super) fn complete(&mut self, completion: Completion) {
        let Completion { user_data, result, more } = completion;
        match self.ops.get(user_data) {
            Some(OpKind::Inbox) => {
                if !more {
                    self.ops.remove(user_data);
                    self.arm_inbox();
                }
                return self.inbox();
            }
            Some(&OpKind::Ports { realm }) => {
                if !more {
                    self.ops.remove(user_data);
                    self.arm_ports(realm);
                }
                return self.on_ports(realm);
            }
            None => return,
            Some(_) => {}
        }
        let Some(kind) = self.ops.remove(user_data) else { return };
        match kind {
            OpKind::Io(op) => self.on_io(op, result),
            OpKind::Sync { disk } => {
                self.op_gone(disk, true);
                if result < 0 {
                    self.note_failed_sync(disk, -result);
                }
                self.deliver(disk, |disk, ctx| disk.on_sync(ctx, -result.min(0)));
            }
            OpKind::Fallocate { disk, group } => {
                self.op_gone(disk, true);
                self.deliver(disk, |disk, ctx| disk.on_space(ctx, group, -result.min(0)));
            }
            OpKind::Recv { conn } => self.on_recv(conn, result),
            OpKind::Send { conn } => self.on_send(conn, result),
            OpKind::Side { .. } | OpKind::Inbox | OpKind::Ports { .. } | OpKind::Cancel => {}
        }
    }

    /// A result for a disk; one in quarantine only counts it.
    fn deliver(&mut self, disk: u32, event: impl FnOnce(&mut Disk, &mut Ctx<'_>)) {
        if self.disks.get(disk as usize).is_some_and(|entry| !entry.quarantined) {
            self.with_disk(disk, event);
        }
    }

    /// A failed fdatasync must not be forgotten, whoever asked for it and whatever becomes of the file: the next one would succeed.
    fn note_failed_sync(&mut self, slot: u32, errno: i32) {
        self.keep_failed_sync(slot, errno);
        let Some(owner) = self.disks.get(slot as usize).and_then(|entry| entry.owner) else { return };
        if matches!(self.backend(owner), Some(Backend::Image(_))) {
            self.keep_failed_sync(owner, errno);
            self.deliver(owner, |disk, ctx| disk.on_file_sync_failed(ctx, errno));
        }
    }

    /// A disk in quarantine hears no results, but this it does.
    fn keep_failed_sync(&mut self, slot: u32, errno: i32) {
        let Some(entry) = self.disks.get_mut(slot as usize).filter(|entry| entry.quarantined) else { return };
        let Some(disk) = &mut entry.disk else { return };
        let reason = disk.note_failed_sync(errno);
        match entry.before_quarantine.0 {
            DiskState::Failed | DiskState::Zombie => {}
            DiskState::Parked => disk.set_state_before_hold(DiskState::StorageError, reason),
            _ => entry.before_quarantine = (DiskState::StorageError, reason),
        }
    }

    pub(super) fn op_gone(&mut self, disk: u32, gated: bool) {
        if gated {
            self.leave_gate(disk);
        }
        if let Some(entry) = self.disks.get_mut(disk as usize) {
            entry.ops -= 1;
            if entry.ops == 0
                && (entry.quarantined
                    || entry.pending.is_some()
                    || entry.zombie
                    || entry.failed_open.is_some()
                    || entry.swap.is_some())
            {
                self.unsettled.push(disk);
            }
        }
    }

    fn on_io(&mut self, mut op: IoOp, result: i32) {
        let outcome = match result {
            n if n > 0 => {
                op.done += n as u32;
                if op.done < op.len && !op.gated {
                    return self.go_through_gate(op);
                }
                if op.done < op.len && op.tries < TRIES_MAX {
                    // A short transfer: the rest, in the same way. An unaligned rest fails with EINVAL, as it should.
                    op.tries += 1;
                    return self.push_io(op);
                }
                if op.done >= op.len { IoResult::Done } else { IoResult::Failed(libc::EIO) }
            }
            0 => IoResult::Short(op.done),
            errno if !op.gated && matches!(-errno, libc::EAGAIN | libc::EOPNOTSUPP) => {
                if -errno == libc::EOPNOTSUPP {
                    self.disks[op.disk as usize].punts = true;
                }
                return self.go_through_gate(op);
            }
            errno if matches!(-errno, libc::EINTR | libc::EAGAIN) && op.tries < TRIES_MAX => {
                op.tries += 1;
                return self.push_io(op);
            }
            errno => IoResult::Failed(-errno),
        };
        self.op_gone(op.disk, op.gated);
        self.deliver(op.disk, |disk, ctx| disk.on_io(ctx, op.req, op.mem, op.len, outcome));
    }

    /// The rest of an I/O that the kernel cannot do without waiting.
    fn go_through_gate(&mut self, op: IoOp) {
        let IoOp { disk, req, write, target, mem, offset, len, done, .. } = op;
        self.op_gone(disk, false);
        let Some(entry) = self.disks.get(disk as usize) else { return };
        let (offset, len, mem) = (offset + u64::from(done), len - done, mem.behind(done));
        if entry.quarantined {
            // The whole request is run again.
        } else if entry.zombie {
            self.io_done(disk, req, mem, len, IoResult::Failed(libc::EIO));
        } else {
            let action = Action::Io { req, write, target, offset, len, mem };
            if self.enter_gate(disk, &action) {
                self.launch(disk, action, op.addr + done as usize, true);
            }
        }
    }

    fn io_done(&mut self, disk: u32, req: ReqKey, mem: Mem, len: u32, result: IoResult) {
        self.with_disk(disk, |disk, ctx| disk.on_io(ctx, req, mem, len, result));
    }

    /// Results of side threads.
    pub(super) fn side_results(&mut self) {
        while let Some(done) = self.kernel.next_side() {
            let Some(OpKind::Side { disk, target }) = self.ops.remove(done.user_data) else { continue };
            self.op_gone(disk, false);
            self.deliver(disk, |disk, ctx| match target {
                SideTarget::Request(req) => disk.on_extents(ctx, req, done.result),
                SideTarget::Group(group) => disk.on_space(ctx, group, done.result.err().unwrap_or(0)),
            });
            self.run_actions();
        }
    }

    /// Tries again what waited for buffers.
    pub(super) fn feed_starved(&mut self) {
        // Each is tried once, and goes to the back in the same order if there is still none. A connection that has to wait does
        // not stop the others; its own later actions are not tried before its first.
        let mut waiting = std::mem::take(&mut self.starving);
        self.feeding = true;
        for _ in 0..self.starved.len() {
            let Some((disk, action)) = self.starved.pop_front() else { break };
            let (conn, first) = match action {
                Action::Io { req, .. } | Action::Volume { req } => self.place_of(req),
                _ => (None, false),
            };
            if !first && waiting.contains(&(disk, conn)) {
                self.starved.push_back((disk, action));
                continue;
            }
            let before = self.starved.len();
            self.carry_out(disk, action);
            self.run_actions();
            if self.starved.len() > before {
                waiting.push((disk, conn));
            }
        }
        self.feeding = false;
        waiting.clear();
        self.starving = waiting;
        for _ in 0..self.want_buffer.len() {
            if let Some(conn) = self.want_buffer.pop_front() {
                self.service(conn);
            }
        }
        self.feed_rings();
        self.fed_at = self.pool.used();
    }

    /// Answers a request: the one place where requests end.
    fn answer(&mut self, slot: u32, key: ReqKey) {
        let mut request = self.requests.remove(key);
        self.free_bounce(slot, &mut request);
        let entry = &mut self.disks[slot as usize];
        entry.requests -= 1;
        if let Some(disk) = &entry.disk {
            let counters = &disk.config().counters;
            counters.io_now.sub(1);
            if let Some(class) = request.kind.class() {
                let ops = &counters.ops[class as usize];
                let started = if request.started == 0 { self.now } else { request.started };
                let (queue, total) =
                    (started.saturating_sub(request.arrived), self.now.saturating_sub(request.arrived));
                if request.errno == 0 {
                    ops.completed.add(u64::from(request.operations));
                    ops.bytes.add(request.len);
                } else {
                    ops.errors.add(1);
                }
                // One duration per operation of the client: its first piece stands for a large one.
                if request.operations > 0 {
                    ops.service.record(total - queue);
                    ops.queue.record(queue);
                    entry.meter.record(class, queue, total, self.now);
                }
            }
        }
        if let Some((tag, _, size_bytes)) = entry.resize.take_if(|(_, asked, _)| *asked == key) {
            self.resized(slot, tag, size_bytes, request.errno);
        }
        let entry = &mut self.disks[slot as usize];
        if let Some(Pending::Remove { flush, .. }) = &mut entry.pending {
            if *flush == Flush::Asked(key) {
                *flush = if request.errno == 0 { Flush::Done } else { Flush::Failed };
            }
            self.unsettled.push(slot);
        } else if entry.pending.is_some() {
            self.unsettled.push(slot);
        }
        if self.via_done(&mut request) {
            return;
        }
        self.deliver_answer(request);
    }

    /// Gives an answer to who asked, if that is still there.
    fn deliver_answer(&mut self, mut request: Request) {
        let command = request.origin.map_or(0, |origin| origin.command);
        match request.origin.take().map(|origin| (origin.client, origin.generation)) {
            Some((Client::Conn(conn), generation)) => {
                let conn = self.conns.get_mut(conn as usize);
                if let Some(conn) = conn.filter(|conn| conn.generation == generation) {
                    conn.on_answer(&mut self.pool, command, request);
                    return self.dirty.push(conn.slot());
                }
            }
            Some((Client::Ring(slot), generation)) => {
                if let Some(ring) = self.rings.get(slot, generation) {
                    ring.on_answer(&mut self.pool, command, request);
                    return self.rings.make_dirty(slot);
                }
            }
            None => {}
        }
        if let Some(buf) = request.payload.take() {
            self.pool.give(buf);
        }
    }
}

/// Puts data that came from another shard into a buffer; false when there is none to be had. Beyond the budget, as it was when
/// it was received: who else has buffers may wait for just this write.
pub(super) fn unload(pool: &mut Pool, conns: &mut slab::Slab<Box<Conn>>, request: &mut Request) -> bool {
    let Some(bytes) = &request.carried else { return true };
    let Some(buf) = pool.take(bytes.len(), true) else { return false };
    pool.bytes_mut(&buf)[..bytes.len()].copy_from_slice(bytes);
    if let Some(origin) = request.origin
        && let Client::Conn(conn) = origin.client
        && let Some(conn) = conns.get_mut(conn as usize)
        && conn.generation == origin.generation
    {
        conn.note_buffer(&buf);
    }
    (request.payload, request.carried) = (Some(buf), None);
    true
}

/// The descriptor of an I/O, and whether the kernel may punt it to a worker.
fn descriptor(file: &ImageFile, target: Target) -> (i32, bool) {
    match (target, &file.tail) {
        (Target::Tail, Some(tail)) => (tail.as_raw_fd(), true),
        _ => (file.fd.as_raw_fd(), file.cache != CacheMode::None || file.punts || target == Target::Tail),
    }
}
