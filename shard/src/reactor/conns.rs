//! Connections: reading ahead, sending, ending.

use super::ops::OpKind;
use super::*;
use crate::nbd::{ConnCtx, Stop, TURN_BYTES, TURN_STEPS};
use crate::request::Client;

/// Bytes of requests that the clients of one disk may start in one turn.
pub(super) const DISK_TURN_BYTES: u64 = 4 << 20;

impl<K: Kernel> Shard<K> {
    pub(super) fn next_generation(&mut self) -> u32 {
        self.generation = self.generation.wrapping_add(1);
        self.generation
    }

    /// Puts a connection into service.
    pub(super) fn add_conn(&mut self, disk: u32, make: impl FnOnce(u32, u32, Nanos) -> Conn) {
        let generation = self.next_generation();
        let vacant = self.conns.vacant_entry();
        let slot = vacant.key() as u32;
        vacant.insert(Box::new(make(slot, generation, self.now)));
        let entry = &mut self.disks[disk as usize];
        entry.conns.push(slot);
        self.counters.clients.add(1);
        entry.count_clients();
        self.dirty.push(slot);
    }

    /// A disk may hold half of the budget; looked at only when half of it is in use.
    pub(super) fn may_take(&self, disk: u32) -> bool {
        let half = self.pool.budget() / 2;
        if self.pool.used() < half {
            return true;
        }
        let Some(entry) = self.disks.get(disk as usize) else { return false };
        let conns = entry.conns.iter().filter_map(|&c| self.conns.get(c as usize)).map(|c| c.buffers());
        conns.sum::<u64>() + self.ring_buffers(entry) < half as u64
    }

    /// Lets a connection read as far as bytes, room and its share of the turn go. When there are no bytes left the ring waits
    /// for more.
    pub(super) fn service(&mut self, slot: u32) {
        let mut share = (TURN_STEPS, TURN_BYTES);
        while self.service_step(slot, &mut share) {}
        self.dirty.push(slot);
    }

    /// Takes the requests that a connection has received and receives again; whether there was anything. `share` is what it
    /// may still start in this turn: requests and bytes.
    fn service_step(&mut self, slot: u32, share: &mut (u32, u64)) -> bool {
        let Some(conn) = self.conns.get_mut(slot as usize) else { return false };
        if conn.recv_op.is_some() {
            return false;
        }
        let disk = conn.disk;
        let may_take = self.may_take(disk);
        let Some(entry) = self.disks.get_mut(disk as usize) else { return false };
        if entry.share.0 != self.turn {
            entry.share = (self.turn, DISK_TURN_BYTES);
        }
        let Some(conn) = self.conns.get_mut(slot as usize) else { return false };
        let mut requests = std::mem::take(&mut self.new_requests);
        let bytes = share.1.min(entry.share.1);
        let (steps, pool) = (share.0, &mut self.pool);
        let mut ctx = ConnCtx { now: self.now, pool, may_take, steps, bytes, out: &mut requests };
        let stop = conn.advance(&mut ctx);
        let started = bytes - ctx.bytes;
        *share = (ctx.steps, share.1 - started);
        entry.share.1 -= started;
        let mut received = false;
        match stop {
            Stop::Input => {
                let op = conn.receive_op(&self.pool);
                // A client with one request at a time sends the next when it has its answer: looking now would find nothing.
                let more = matches!(op, Op::RecvMsg { .. }) || conn.requests() > 1;
                let result = if more { self.kernel.receive_now(op) } else { -libc::EAGAIN };
                match result {
                    errno if matches!(-errno, libc::EAGAIN | libc::EINTR) => {
                        let user_data = self.ops.insert(OpKind::Recv { conn: slot });
                        conn.recv_op = Some(user_data);
                        self.kernel.push(user_data, op);
                    }
                    result => {
                        conn.on_received(result, self.now);
                        received = true;
                    }
                }
            }
            Stop::Turn => self.ready.push_back(slot),
            Stop::Buffer => {
                self.counters.buffer_waits.add(1);
                self.want_buffer.push_back(slot);
            }
            // Answers bring it back here.
            Stop::Room | Stop::End => {}
        }
        for request in requests.drain(..) {
            self.submit(request);
            self.run_actions();
        }
        self.new_requests = requests;
        if received {
            self.wake_pending(disk);
        }
        received
    }

    pub(super) fn on_recv(&mut self, slot: u32, result: i32) {
        if let Some(conn) = self.conns.get_mut(slot as usize) {
            conn.on_received(result, self.now);
            let disk = conn.disk;
            self.service(slot);
            self.wake_pending(disk);
        }
    }

    pub(super) fn on_send(&mut self, slot: u32, result: i32) {
        if let Some(conn) = self.conns.get_mut(slot as usize) {
            conn.on_sent(&mut self.pool, result, self.now);
            let disk = conn.disk;
            self.dirty.push(slot);
            self.wake_pending(disk);
        }
    }

    /// Somebody waits for the end of a send that has no completion when all goes well: then the shard must not sleep before it
    /// has looked.
    pub(super) fn sends_are_awaited(&self) -> bool {
        let buffers = !self.starved.is_empty() || !self.want_buffer.is_empty();
        let awaits = |slot: u32| self.conns.get(slot as usize).is_some_and(|conn| conn.awaits_send());
        self.sent_now.iter().any(|&(slot, _)| buffers || awaits(slot))
    }

    /// Sends that were to be done at once and of which the kernel has not complained are done.
    pub(super) fn finish_sends(&mut self) {
        if self.sent_now.is_empty() || !self.kernel.all_submitted() {
            return;
        }
        let mut sent = std::mem::take(&mut self.sent_now);
        for (slot, user_data) in sent.drain(..) {
            if self.ops.remove(user_data).is_none() {
                // Its completion came: it was not done.
                continue;
            }
            if let Some(conn) = self.conns.get_mut(slot as usize)
                && conn.send_op == Some(user_data)
            {
                conn.on_sent_all(&mut self.pool, self.now);
                let disk = conn.disk;
                self.dirty.push(slot);
                self.wake_pending(disk);
            }
        }
        self.sent_now = sent;
    }

    fn wake_pending(&mut self, disk: u32) {
        if self.disks.get(disk as usize).is_some_and(|entry| entry.pending.is_some() || entry.zombie) {
            self.unsettled.push(disk);
        }
    }

    /// At the end of a turn: sends replies, receives again where there is room, ends what is to end.
    pub(super) fn flush_conns(&mut self) {
        let mut dirty = std::mem::take(&mut self.dirty);
        dirty.sort_unstable();
        dirty.dedup();
        for &slot in &dirty {
            self.flush_conn(slot);
        }
        dirty.clear();
        // What became dirty meanwhile is looked at in the next turn; it has an operation or a place in a queue.
        let newer = std::mem::replace(&mut self.dirty, dirty);
        for slot in newer {
            self.flush_conn_once(slot);
        }
    }

    fn flush_conn(&mut self, slot: u32) {
        let Some(conn) = self.conns.get(slot as usize) else { return };
        let queued = self.ready.contains(&slot) || self.want_buffer.contains(&slot);
        if conn.closing().is_none() && conn.recv_op.is_none() && !queued {
            self.service(slot);
        }
        self.flush_conn_once(slot);
    }

    fn flush_conn_once(&mut self, slot: u32) {
        let Some(conn) = self.conns.get_mut(slot as usize) else { return };
        if let Some(op) = conn.send_op(&mut self.pool) {
            let user_data = self.ops.insert(OpKind::Send { conn: slot });
            if matches!(op, Op::SendNow { .. }) {
                self.sent_now.push((slot, user_data));
            }
            conn.send_op = Some(user_data);
            self.kernel.push(user_data, op);
        }
        if conn.closing().is_some() || conn.is_finished() {
            self.end_conn(slot);
        }
    }

    /// Cancels what the kernel does for a connection.
    pub(super) fn cancel_conn(&mut self, slot: u32) {
        let Some(conn) = self.conns.get_mut(slot as usize) else { return };
        let targets = [conn.recv_op, conn.send_op];
        for target in targets.into_iter().flatten() {
            let user_data = self.ops.insert(OpKind::Cancel);
            self.kernel.push(user_data, Op::Cancel { target });
        }
    }

    /// Removes a connection when the kernel has let go of it; asks the kernel to, the first time.
    fn end_conn(&mut self, slot: u32) {
        let Some(conn) = self.conns.get_mut(slot as usize) else { return };
        if !conn.can_park() {
            if !std::mem::replace(&mut conn.cancelled, true) {
                self.cancel_conn(slot);
            }
            return;
        }
        let mut conn = self.conns.remove(slot as usize);
        conn.release(&mut self.pool);
        self.counters.clients.sub(1);
        let disk = conn.disk;
        let generation = conn.generation;
        if self.disks.get(disk as usize).is_some_and(|entry| !entry.quarantined) {
            self.with_disk(disk, |disk, ctx| disk.forget(ctx, Client::Conn(slot), generation));
            self.run_actions();
        }
        if let Some(entry) = self.disks.get_mut(disk as usize) {
            entry.conns.retain(|&other| other != slot);
            entry.count_clients();
            let reason = conn.closing().unwrap_or_default().to_owned();
            self.events.send(Event::ClientGone { disk: entry.id, peer: conn.peer().to_owned(), reason });
        }
        self.wake_pending(disk);
    }
}
