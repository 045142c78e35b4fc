//! What has waited for a disk to come to rest: pauses, moves, detaches, quarantine.

use super::*;
use crate::api::{Reply, ShardError, ShardErrorKind};
use crate::park::{ParkedDisk, ParkedRequest};
use crate::request::Kind;

impl<K: Kernel> Shard<K> {
    /// Looks at every disk of which something has changed.
    pub(super) fn settle_all(&mut self) {
        // A step may make another possible at once (the last answer, then the flush, then the removal).
        for _ in 0..8 {
            let mut slots = std::mem::take(&mut self.unsettled);
            if slots.is_empty() {
                return;
            }
            slots.sort_unstable();
            slots.dedup();
            for slot in slots {
                if self.disks.contains(slot as usize) {
                    self.settle(slot);
                    self.run_actions();
                }
            }
        }
    }

    fn settle(&mut self, slot: u32) {
        if self.disks[slot as usize].owner.is_some() {
            return self.settle_file(slot);
        }
        if self.settle_failed_open(slot) || self.settle_swap(slot) {
            return;
        }
        let entry = &self.disks[slot as usize];
        if entry.quarantined {
            return self.settle_quarantine(slot);
        }
        if entry.zombie {
            return self.settle_zombie(slot);
        }
        if matches!(entry.pending, Some(Pending::Pause { .. } | Pending::Park { .. })) {
            self.unstart_starved(slot);
        }
        let entry = &self.disks[slot as usize];
        let at_rest = entry.ops == 0 && entry.disk.as_ref().is_some_and(|disk| disk.started() == 0);
        match entry.pending {
            Some(Pending::Pause { tag }) if at_rest => {
                self.disks[slot as usize].pending = None;
                self.with_disk(slot, |disk, _| {
                    if disk.state() == DiskState::Pausing {
                        disk.set_state(DiskState::Paused, "paused by an operator");
                    }
                });
                self.reply(tag, Ok(Reply::Done));
            }
            Some(Pending::Park { tag }) if at_rest => self.settle_park(slot, tag),
            Some(Pending::Remove { tag, flush }) => self.settle_remove(slot, tag, flush),
            _ => {}
        }
    }

    /// Requests that wait for buffers and have nothing in the kernel go back to those that have not started: a client that keeps
    /// the buffers, because it does not read, must not stop a pause or a move.
    fn unstart_starved(&mut self, slot: u32) {
        let ours = |&(disk, action): &(u32, Action)| match action {
            Action::Io { req, .. } | Action::Volume { req } if disk == slot => Some(req),
            _ => None,
        };
        let keys: Vec<ReqKey> = self.starved.iter().filter_map(ours).collect();
        for key in keys {
            let waiting = self.starved.iter().filter(|entry| ours(entry) == Some(key)).count();
            if waiting > 0 && waiting == usize::from(self.requests[key].pending) {
                self.starved.retain(|entry| ours(entry) != Some(key));
                self.with_disk(slot, |disk, ctx| disk.unstart(ctx, key));
                self.run_actions();
            }
        }
    }

    /// After a panic: when the kernel is done with the disk, builds it anew and runs its requests again; the second time it is
    /// paused instead.
    fn settle_quarantine(&mut self, slot: u32) {
        let entry = &mut self.disks[slot as usize];
        if entry.ops > 0 {
            return self.tell_zombie(slot);
        }
        let Some(disk) = entry.disk.take() else { return };
        let (now, before) = ((disk.state(), disk.reason().to_owned()), entry.before_quarantine.clone());
        let mut disk = disk.rebuilt(self.now);
        let (state, reason) = match now.0 {
            // A command that came meanwhile.
            DiskState::Failed | DiskState::Zombie => now,
            _ if entry.panics < 2 || before.0 == DiskState::Failed => before,
            // Of a file: whoever waits for it hears an error.
            _ if entry.owner.is_some() => (DiskState::Failed, "the disk's code failed twice".to_owned()),
            _ => {
                let reason = "the disk's code failed twice: `resume` tries again, `fail` gives the disk up";
                (DiskState::Paused, reason.to_owned())
            }
        };
        disk.set_state(state, &reason);
        entry.disk = Some(disk);
        entry.quarantined = false;
        let id = entry.id;
        if state != DiskState::Zombie {
            self.reopen_engine(slot);
        }
        if state == DiskState::Paused {
            self.end_pending(slot, "the disk's code failed twice, it is paused now");
        }
        self.events.send(Event::State { disk: id, state, reason });
        let mut keys: Vec<_> = self
            .requests
            .iter()
            .filter(|(_, request)| request.disk == slot)
            .map(|(key, request)| (request.arrived, key))
            .collect();
        keys.sort_unstable_by_key(|(arrived, key)| (*arrived, key.0));
        for (_, key) in keys {
            let request = &mut self.requests[key];
            request.rewind();
            request.pending = 0;
            if std::mem::take(&mut request.throttled) != 0
                && let Some(disk) = &self.disks[slot as usize].disk
            {
                disk.config().counters.throttled_now.sub(1);
            }
            self.with_disk(slot, |disk, ctx| disk.submit(ctx, key));
            self.run_actions();
        }
        self.unsettled.push(slot);
    }

    /// A file of a volume: its own quarantine is all that it settles by itself.
    fn settle_file(&mut self, slot: u32) {
        let entry = &self.disks[slot as usize];
        if entry.quarantined && entry.ops == 0 {
            self.settle_quarantine(slot);
        }
    }

    /// The image of a disk that was to go could not be closed: it goes on.
    pub(super) fn close_failed(&mut self, slot: u32, why: &str) {
        let entry = &mut self.disks[slot as usize];
        let tag = match entry.pending {
            Some(Pending::Park { tag }) => {
                entry.pending = None;
                self.with_disk(slot, |disk, ctx| disk.unhold(ctx));
                tag
            }
            Some(Pending::Remove { tag, .. }) => {
                entry.pending = None;
                self.with_disk(slot, |disk, ctx| disk.unhold(ctx));
                tag
            }
            _ => return,
        };
        self.restart_conns(slot);
        let message = format!("its image could not be closed, so the disk stays: {why}");
        self.reply(tag, Err(ShardError { kind: ShardErrorKind::Failed, message }));
    }

    /// Ends a move or detach that cannot go on.
    fn end_pending(&mut self, slot: u32, why: &str) {
        let entry = &mut self.disks[slot as usize];
        let (Some(Pending::Park { tag }) | Some(Pending::Remove { tag, .. })) = entry.pending else { return };
        entry.pending = None;
        if let Some(disk) = &mut entry.disk {
            disk.state_before_hold();
        }
        self.restart_conns(slot);
        self.reply(tag, Err(ShardError { kind: ShardErrorKind::Failed, message: why.to_owned() }));
    }

    fn settle_zombie(&mut self, slot: u32) {
        let entry = &mut self.disks[slot as usize];
        let gone = entry.ops == 0 && entry.requests == 0 && entry.clients() == 0;
        if !gone {
            // The connections go within this turn or the next.
            return self.tell_zombie(slot);
        }
        let tag = entry.zombie_tag.take();
        let Some(config) = self.take_disk(slot) else { return };
        match tag {
            Some(tag) => self.reply(tag, Ok(Reply::Removed(config))),
            None => self.events.send(Event::ZombieGone { config }),
        }
    }

    /// Answers a forced detach, once, if the kernel still works for the disk.
    fn tell_zombie(&mut self, slot: u32) {
        let entry = &mut self.disks[slot as usize];
        let in_flight = entry.ops;
        if in_flight > 0
            && let Some(tag) = entry.zombie_tag.take()
        {
            self.reply(tag, Ok(Reply::Zombie { in_flight }));
        }
    }

    pub(super) fn take_disk(&mut self, slot: u32) -> Option<Box<crate::api::DiskConfig>> {
        self.remove_engine(slot);
        let entry = self.disks.remove(slot as usize);
        self.by_id.remove(&entry.id);
        self.counters.disks.set(self.by_id.len() as u64);
        entry.disk.map(Disk::into_config)
    }

    fn settle_park(&mut self, slot: u32, tag: u64) {
        // Replies are sent until the last request has its answer, or their buffers might be what it waits for. Now that nothing
        // runs, what the kernel does for the connections is taken back.
        let mut all_still = true;
        for conn in self.disks[slot as usize].conns.clone() {
            let Some(c) = self.conns.get_mut(conn as usize) else { continue };
            all_still &= c.can_park();
            if !std::mem::replace(&mut c.parking, true) {
                self.cancel_conn(conn);
            }
        }
        if !all_still || !self.close_engine(slot) {
            return;
        }
        self.flush_rings();
        let mut keys = Vec::new();
        self.with_disk(slot, |disk, ctx| keys = disk.take_unstarted(ctx));
        let keys = self.drop_ring_requests(keys);
        let guests = self.park_guests(slot);
        let mut conns = Vec::new();
        for conn in std::mem::take(&mut self.disks[slot as usize].conns) {
            if let Some(conn) = self.conns.try_remove(conn as usize) {
                self.counters.clients.sub(1);
                conns.push(conn.park(&mut self.pool));
            }
        }
        let requests = keys.into_iter().map(|key| self.park_request(key, &conns)).collect();
        let Some(disk) = &mut self.disks[slot as usize].disk else { return };
        let flush_failed = disk.flush_failed();
        let (state, reason) = disk.state_before_hold();
        let Some(config) = self.take_disk(slot) else { return };
        let parked = ParkedDisk { config, state, reason, flush_failed, conns, guests, requests };
        self.reply(tag, Ok(Reply::Parked(Box::new(parked))));
    }

    fn park_request(&mut self, key: ReqKey, conns: &[crate::nbd::ParkedConn]) -> ParkedRequest {
        let mut request = self.requests.remove(key);
        let origin = request.origin.take().and_then(|origin| {
            let index = conns.iter().position(|conn| conn.origin() == (origin.client, origin.generation))?;
            Some((index, origin.command))
        });
        let payload = request.payload.take().map(|buf| {
            let bytes = self.pool.bytes(&buf)[..request.len as usize].to_vec();
            self.pool.give(buf);
            bytes
        });
        let slot = request.disk;
        self.free_bounce(slot, &mut request);
        if let Some(entry) = self.disks.get(request.disk as usize)
            && let Some(disk) = &entry.disk
        {
            disk.config().counters.io_now.sub(1);
        }
        ParkedRequest {
            kind: request.kind,
            offset: request.offset,
            len: request.len,
            operations: request.operations,
            // A read that failed and is held has a buffer and no data yet.
            payload: payload.filter(|_| matches!(request.kind, Kind::Write { .. })).or(request.carried),
            origin,
            arrived: request.arrived,
        }
    }

    /// A detach step by step: requests finish, the disk is flushed, replies are sent, connections close.
    fn settle_remove(&mut self, slot: u32, tag: u64, flush: Flush) {
        let entry = &mut self.disks[slot as usize];
        let Some(disk) = &entry.disk else { return };
        if disk.state() == DiskState::StorageError || flush == Flush::Failed {
            let message = format!(
                "the disk cannot be detached without loss: {}; mend the store and resume, or detach it with --force",
                disk.reason()
            );
            entry.pending = None;
            self.restart_conns(slot);
            return self.reply(tag, Err(ShardError { kind: ShardErrorKind::Failed, message }));
        }
        let reading =
            entry.conns.iter().any(|&c| self.conns.get(c as usize).is_some_and(|conn| conn.is_reading()));
        match flush {
            Flush::NotYet if entry.requests == 0 && !reading => {
                let failed = disk.state() == DiskState::Failed;
                if failed || disk.config().read_only {
                    entry.pending = Some(Pending::Remove { tag, flush: Flush::Done });
                    return self.unsettled.push(slot);
                }
                entry.requests += 1;
                disk.config().counters.io_now.add(1);
                let key = self.requests.insert(Request::new(slot, Kind::Flush, 0, 0, None, self.now));
                entry.pending = Some(Pending::Remove { tag, flush: Flush::Asked(key) });
                self.with_disk(slot, |disk, ctx| {
                    disk.drain_rest();
                    disk.submit(ctx, key);
                });
            }
            Flush::Done => {
                let mut left = 0;
                for conn in entry.conns.clone() {
                    if let Some(c) = self.conns.get_mut(conn as usize) {
                        left += 1;
                        if c.is_sent() {
                            c.close("the disk was detached");
                            self.dirty.push(conn);
                        }
                    }
                }
                if left == 0 && self.disks[slot as usize].ops == 0 && self.close_engine(slot) {
                    let Some(config) = self.take_disk(slot) else { return };
                    self.reply(tag, Ok(Reply::Removed(config)));
                }
            }
            _ => {}
        }
    }
}
