//! What the control thread asks.

use super::*;
use crate::api::{ClientInfo, Command, DiskConfig, Reply, ShardError, ShardErrorKind};
use crate::park::ParkedDisk;
use crate::request::Kind;

fn failure(kind: ShardErrorKind, message: impl Into<String>) -> ShardError {
    ShardError { kind, message: message.into() }
}

/// What a command comes to: a reply now, or later from `settle`.
type Outcome = Result<Option<Reply>, ShardError>;

impl<K: Kernel> Shard<K> {
    /// Commands and side results have come.
    pub(super) fn inbox(&mut self) {
        let mut counter = [0u8; 8];
        // Empty after a spurious wake-up: nothing lost.
        let _ = nix::unistd::read(&*self.inbox_wake, &mut counter);
        self.side_results();
        while let Ok(envelope) = self.inbox.try_recv() {
            self.command(envelope);
            self.run_actions();
        }
    }

    pub(super) fn reply(&self, tag: u64, result: Result<Reply, ShardError>) {
        self.events.send(Event::Reply { tag, result });
    }

    fn command(&mut self, envelope: Envelope) {
        let Envelope { tag, command } = envelope;
        let outcome = match command {
            Command::AddDisk(config) => self.add_disk(config, tag),
            Command::Unpark(parked) => self.unpark(parked, tag),
            Command::Stop => {
                if let Some(earlier) = self.stopping.replace(tag) {
                    self.reply(earlier, Ok(Reply::Done));
                }
                Ok(None)
            }
            Command::RemoveDisk { disk, force } => {
                self.slot(disk).and_then(|slot| self.remove(slot, tag, force))
            }
            Command::Connect { disk, handoff } => {
                self.slot(disk).and_then(|slot| self.connect(slot, *handoff))
            }
            Command::ConnectGuest { disk, guest } => {
                self.slot(disk).and_then(|slot| self.connect_guest(slot, *guest))
            }
            Command::DisconnectGuest { disk, domid, devid, force } => {
                self.slot(disk).and_then(|slot| self.disconnect_guest(slot, domid, devid, (force, tag)))
            }
            Command::Pause { disk } => self.slot(disk).and_then(|slot| self.pause(slot, tag)),
            Command::Park { disk } => self.slot(disk).and_then(|slot| self.park(slot, tag)),
            Command::CancelPark { disk } => self.slot(disk).and_then(|slot| self.cancel_park(slot)),
            Command::Resume { disk, data_in_doubt } => {
                self.slot(disk).and_then(|slot| self.resume(slot, tag, data_in_doubt))
            }
            Command::Swap { disk, backend } => self.slot(disk).and_then(|slot| self.swap(slot, tag, backend)),
            Command::Resize { disk, size_bytes } => {
                self.slot(disk).and_then(|slot| self.resize(slot, tag, size_bytes))
            }
            Command::Fail { disk } => self.slot(disk).map(|slot| {
                self.with_disk(slot, |disk, ctx| {
                    disk.fail(ctx, DiskState::Failed, "given up by an operator")
                });
                self.unsettled.push(slot);
                Some(Reply::Done)
            }),
            Command::SetLimits { disk, limits, groups } => self.slot(disk).map(|slot| {
                self.with_disk(slot, |disk, ctx| disk.set_limits(ctx, limits, groups));
                Some(Reply::Done)
            }),
            Command::Stats { disk } => self
                .slot(disk)
                .map(|slot| Some(Reply::Stats(Box::new(self.disks[slot as usize].meter.stats())))),
            Command::Clients { disk } => self.slot(disk).map(|slot| Some(Reply::Clients(self.clients(slot)))),
            Command::InjectPanic { disk } => {
                self.faults_allowed().and_then(|()| self.slot(disk)).map(|slot| {
                    self.with_disk(slot, |disk, _| disk.panic_for_test());
                    Some(Reply::Done)
                })
            }
            Command::InjectShardPanic => match self.faults_allowed() {
                Ok(()) => panic!("injected panic in the reactor"),
                Err(refusal) => Err(refusal),
            },
        };
        match outcome {
            Ok(None) => {}
            Ok(Some(reply)) => self.reply(tag, Ok(reply)),
            Err(error) => self.reply(tag, Err(error)),
        }
    }

    fn faults_allowed(&self) -> Result<(), ShardError> {
        let message = "fault commands are off: start the daemon with --fault-commands (tests only)";
        if self.fault_commands { Ok(()) } else { Err(failure(ShardErrorKind::WrongState, message)) }
    }

    fn slot(&self, disk: DiskId) -> Result<u32, ShardError> {
        let slot = self.by_id.get(&disk).copied();
        slot.ok_or_else(|| failure(ShardErrorKind::NoSuchDisk, format!("this shard has no disk {}", disk.0)))
    }

    /// Adds a disk. The image of one that has a format is being opened then; `tag` is answered when it is.
    pub(super) fn insert_disk(&mut self, config: Box<DiskConfig>, tag: Option<u64>) -> u32 {
        let (id, backend) = (config.id, config.backend.clone());
        let slot = self.insert_entry(config, None);
        self.by_id.insert(id, slot);
        self.counters.disks.set(self.by_id.len() as u64);
        if let Backend::Image(chain) = backend {
            self.start_engine(slot, &chain, tag);
        }
        slot
    }

    /// Adds a disk that commands do not see.
    pub(super) fn insert_entry(&mut self, config: Box<DiskConfig>, owner: Option<u32>) -> u32 {
        let id = config.id;
        let store = match &config.backend {
            Backend::File(file) => Some(file.store),
            Backend::Ram(_) | Backend::Image(_) | Backend::Null => None,
        };
        self.disks.insert(Entry {
            id,
            disk: Some(Disk::new(config, self.now)),
            conns: Vec::new(),
            guests: Vec::new(),
            ops: 0,
            requests: 0,
            bounces: 0,
            share: (0, 0),
            meter: Meter::default(),
            pending: None,
            timer: None,
            tidy: None,
            panics: 0,
            quarantined: false,
            before_quarantine: (DiskState::Running, String::new()),
            zombie: false,
            zombie_tag: None,
            store,
            owner,
            engine: None,
            failed_open: None,
            resize: None,
            swap: None,
            doubt: None,
            told: None,
            punts: false,
        }) as u32
    }

    fn add_disk(&mut self, config: Box<DiskConfig>, tag: u64) -> Outcome {
        if self.stopping.is_some() {
            return Err(failure(ShardErrorKind::WrongState, "the shard is stopping"));
        }
        let image = matches!(config.backend, Backend::Image(_));
        self.insert_disk(config, Some(tag));
        Ok((!image).then_some(Reply::Done))
    }

    fn connect(&mut self, slot: u32, handoff: ring_bridge::nbd::Handoff) -> Outcome {
        let entry = &self.disks[slot as usize];
        if entry.zombie || matches!(entry.pending, Some(Pending::Remove { .. } | Pending::Park { .. })) {
            let message = "the disk is on its way out: connect again in a moment";
            return Err(failure(ShardErrorKind::WrongState, message));
        }
        if entry.conns.len() >= CONNS_MAX {
            let message = format!("the disk has {CONNS_MAX} connections already: close some");
            return Err(failure(ShardErrorKind::Limit, message));
        }
        self.add_conn(slot, |conn, generation, now| Conn::new(handoff, slot, conn, generation, now));
        Ok(Some(Reply::Done))
    }

    fn clients(&self, slot: u32) -> Vec<ClientInfo> {
        let conns = self.disks[slot as usize].conns.iter();
        conns
            .filter_map(|&conn| self.conns.get(conn as usize))
            .map(|conn| ClientInfo {
                peer: conn.peer().to_owned(),
                in_flight: conn.requests(),
                age_s: self.now.saturating_sub(conn.since()) / SECOND,
            })
            .chain(self.guest_infos(slot))
            .collect()
    }

    fn set_pending(&mut self, slot: u32, pending: Pending) -> Result<(), ShardError> {
        let entry = &mut self.disks[slot as usize];
        if let Some(pending) = &entry.pending {
            let what = match pending {
                Pending::Pause { .. } => "being paused",
                Pending::Park { .. } => "being moved",
                Pending::Remove { .. } => "being detached",
            };
            return Err(failure(
                ShardErrorKind::WrongState,
                format!("the disk is {what}: wait for that to end"),
            ));
        }
        if entry.quarantined
            || entry.zombie
            || entry.swap.is_some()
            || entry.resize.is_some()
            || entry.failed_open.is_some()
            || entry.doubt.is_some()
            || entry.opening()
        {
            return Err(failure(
                ShardErrorKind::WrongState,
                "the disk waits for kernel operations to come back",
            ));
        }
        entry.pending = Some(pending);
        self.unsettled.push(slot);
        Ok(())
    }

    fn pause(&mut self, slot: u32, tag: u64) -> Outcome {
        self.set_pending(slot, Pending::Pause { tag })?;
        let mut result = Ok(());
        self.with_disk(slot, |disk, _| result = disk.pause());
        if let Err(error) = result {
            self.disks[slot as usize].pending = None;
            return Err(error);
        }
        Ok(None)
    }

    fn resume(&mut self, slot: u32, tag: u64, data_in_doubt: bool) -> Outcome {
        let entry = &mut self.disks[slot as usize];
        if entry.doubt.is_some() {
            let message = "the disk's tables are being written again: wait for that to end";
            return Err(failure(ShardErrorKind::WrongState, message));
        }
        if entry.swap.is_some() {
            let message = "the disk is being given another image: wait for that to end";
            return Err(failure(ShardErrorKind::WrongState, message));
        }
        if let Some(Pending::Pause { tag }) = entry.pending {
            entry.pending = None;
            let message = "the pause was ended by a resume before everything in flight had finished";
            self.reply(tag, Err(failure(ShardErrorKind::Interrupted, message)));
        }
        let mut result = Ok(());
        self.with_disk(slot, |disk, _| result = disk.may_resume(data_in_doubt));
        result?;
        let failed = self.disks[slot as usize].disk.as_ref().is_some_and(Disk::flush_failed);
        if data_in_doubt {
            // First, so that what the disk held finds files that flush again.
            self.accept_doubt(slot);
            if failed && self.write_again(slot, tag) {
                return Ok(None);
            }
        }
        self.go_on(slot, data_in_doubt).map(Some)
    }

    /// The last step of a resume.
    pub(super) fn go_on(&mut self, slot: u32, data_in_doubt: bool) -> Result<Reply, ShardError> {
        let mut result = Ok(());
        self.with_disk(slot, |disk, ctx| result = disk.resume(ctx, data_in_doubt));
        self.watch_pending(slot);
        result?;
        self.retry_flushes(slot);
        Ok(Reply::Done)
    }

    /// Makes a disk larger. Requests go on meanwhile, as far as its image lets them.
    fn resize(&mut self, slot: u32, tag: u64, size_bytes: u64) -> Outcome {
        let entry = &mut self.disks[slot as usize];
        let Some(disk) = &entry.disk else {
            return Err(failure(ShardErrorKind::WrongState, "the disk is being rebuilt"));
        };
        let busy = entry.pending.is_some()
            || entry.swap.is_some()
            || entry.resize.is_some()
            || entry.doubt.is_some();
        if disk.state() != DiskState::Running || busy || entry.zombie {
            let message = format!("the disk is {:?} or busy: only a running disk is resized", disk.state());
            return Err(failure(ShardErrorKind::WrongState, message));
        }
        entry.requests += 1;
        disk.config().counters.io_now.add(1);
        let kind = Kind::SetLength { grow: true };
        let key = self.requests.insert(Request::new(slot, kind, size_bytes, 0, None, self.now));
        entry.resize = Some((tag, key, size_bytes));
        self.with_disk(slot, |disk, ctx| disk.submit(ctx, key));
        Ok(None)
    }

    /// The request of a resize has ended.
    pub(super) fn resized(&mut self, slot: u32, tag: u64, size_bytes: u64, errno: i32) {
        if errno != 0 {
            let what = nix::errno::Errno::from_raw(errno).desc();
            let message =
                format!("the image could not be made {size_bytes} bytes large: {what}; see `ctl events`");
            return self.reply(tag, Err(failure(ShardErrorKind::Failed, message)));
        }
        self.with_disk(slot, |disk, _| disk.set_size(size_bytes));
        self.reply(tag, Ok(Reply::Done));
    }

    fn park(&mut self, slot: u32, tag: u64) -> Outcome {
        if self.guest_is_leaving(slot) {
            let message = "a guest is being disconnected from the disk: wait for that to end";
            return Err(failure(ShardErrorKind::WrongState, message));
        }
        self.set_pending(slot, Pending::Park { tag })?;
        let state = self.disks[slot as usize].disk.as_ref().map(Disk::state);
        if !matches!(
            state,
            Some(DiskState::Running | DiskState::Paused | DiskState::StorageError | DiskState::Failed)
        ) {
            self.disks[slot as usize].pending = None;
            let message = format!("the disk is {state:?}: only a disk at rest or in service can be moved");
            return Err(failure(ShardErrorKind::WrongState, message));
        }
        self.with_disk(slot, |disk, _| disk.hold());
        self.stop_conns(slot);
        Ok(None)
    }

    /// Stops reading from the connections of a disk.
    fn stop_conns(&mut self, slot: u32) {
        for &conn in &self.disks[slot as usize].conns {
            if let Some(conn) = self.conns.get_mut(conn as usize) {
                conn.stopped = true;
            }
        }
        self.stop_rings(slot, true);
    }

    /// Closes the connections of a disk.
    fn close_conns(&mut self, slot: u32, why: &str) {
        for conn in self.disks[slot as usize].conns.clone() {
            if let Some(c) = self.conns.get_mut(conn as usize) {
                c.close(why);
                self.dirty.push(conn);
            }
        }
    }

    /// Connections read and send again.
    pub(super) fn restart_conns(&mut self, slot: u32) {
        for conn in self.disks[slot as usize].conns.clone() {
            if let Some(c) = self.conns.get_mut(conn as usize) {
                c.stopped = false;
                c.parking = false;
                self.dirty.push(conn);
            }
        }
        self.stop_rings(slot, false);
    }

    /// Returns to service.
    fn cancel_park(&mut self, slot: u32) -> Outcome {
        let Some(Pending::Park { tag }) = self.disks[slot as usize].pending else {
            return Ok(Some(Reply::Done));
        };
        self.disks[slot as usize].pending = None;
        self.reply(tag, Err(failure(ShardErrorKind::Interrupted, "taken back; the disk is in service")));
        let entry = &mut self.disks[slot as usize];
        if entry.quarantined {
            // It goes on when it has been rebuilt.
            if let Some(disk) = &mut entry.disk {
                entry.before_quarantine = disk.state_before_hold();
            }
        } else {
            if entry.closed() && !entry.disk.as_ref().is_some_and(Disk::failed_before_hold) {
                // Closed for the move, just now.
                self.reopen_engine(slot);
            }
            self.with_disk(slot, |disk, ctx| disk.unhold(ctx));
        }
        self.restart_conns(slot);
        Ok(Some(Reply::Done))
    }

    fn unpark(&mut self, parked: Box<ParkedDisk>, tag: u64) -> Outcome {
        if self.stopping.is_some() || self.by_id.contains_key(&parked.config.id) {
            return Ok(Some(Reply::NotTaken(parked)));
        }
        let parked = *parked;
        let image = matches!(parked.config.backend, Backend::Image(_));
        let slot = self.insert_disk(parked.config, Some(tag));
        let mut origins = Vec::with_capacity(parked.conns.len());
        for conn in parked.conns {
            let at = self.conns.vacant_key() as u32;
            self.add_conn(slot, |conn_slot, generation, now| {
                Conn::unpark(conn, slot, conn_slot, generation, now)
            });
            origins.push((at, self.generation));
        }
        if parked.state != DiskState::Running || parked.flush_failed {
            let (state, reason, flush_failed) = (parked.state, parked.reason, parked.flush_failed);
            if state == DiskState::StorageError {
                // It may have failed on its way, when nobody was told.
                let disk = self.disks[slot as usize].id;
                self.events.send(Event::State { disk, state, reason: reason.clone() });
            }
            self.with_disk(slot, |disk, _| disk.restore(state, &reason, flush_failed));
        }
        for request in parked.requests {
            let origin = request.origin.map(|(index, command)| {
                let (conn, generation) = origins[index];
                crate::request::Origin { client: crate::request::Client::Conn(conn), generation, command }
            });
            let mut new =
                Request::new(slot, request.kind, request.offset, request.len, origin, request.arrived);
            new.operations = request.operations;
            new.carried = request.payload;
            debug_assert!(!matches!(new.kind, Kind::Write { .. }) || new.carried.is_some());
            // When the address space of the pool is spent it waits for a buffer like any other.
            actions::unload(&mut self.pool, &mut self.conns, &mut new);
            self.submit(new);
            self.run_actions();
        }
        self.unpark_guests(slot, parked.guests);
        Ok((!image).then_some(Reply::Done))
    }

    fn remove(&mut self, slot: u32, tag: u64, force: bool) -> Outcome {
        if force {
            return self.remove_by_force(slot, tag);
        }
        self.disks[slot as usize].guests_refuse()?;
        let state =
            self.disks[slot as usize].disk.as_ref().map(|disk| (disk.state(), disk.reason().to_owned()));
        match state {
            Some((DiskState::Running | DiskState::Paused | DiskState::Failed, _)) => {}
            Some((state, reason)) => {
                let message =
                    format!("the disk is {state:?} ({reason}): resume it first, or detach it with --force");
                return Err(failure(ShardErrorKind::WrongState, message));
            }
            None => return Err(failure(ShardErrorKind::WrongState, "the disk is being rebuilt")),
        }
        let paused = matches!(state, Some((DiskState::Paused, _)));
        self.set_pending(slot, Pending::Remove { tag, flush: Flush::NotYet })?;
        self.with_disk(slot, |disk, _| disk.drain());
        self.stop_conns(slot);
        if paused {
            // What a paused disk holds was not acknowledged and must not run: it goes with its connections.
            self.close_conns(slot, "the disk was detached while it was paused");
        }
        Ok(None)
    }

    fn remove_by_force(&mut self, slot: u32, tag: u64) -> Outcome {
        if let Some(pending) = self.disks[slot as usize].pending.take() {
            let (Pending::Pause { tag } | Pending::Park { tag } | Pending::Remove { tag, .. }) = pending;
            let message = "the disk was detached by force";
            self.reply(tag, Err(failure(ShardErrorKind::Interrupted, message)));
        }
        self.disks[slot as usize].zombie = true;
        self.with_disk(slot, |disk, ctx| disk.fail(ctx, DiskState::Zombie, "detached by force"));
        self.end_swap(slot, "the disk was detached by force");
        self.end_doubt(slot, "the disk was detached by force");
        for file in self.file_slots(slot) {
            self.disks[file as usize].zombie = true;
            self.with_disk(file, |disk, ctx| disk.fail(ctx, DiskState::Zombie, "detached by force"));
            self.unqueue(file);
        }
        self.unqueue(slot);
        self.run_actions();
        self.close_conns(slot, "the disk was detached by force");
        self.drop_guests(slot);
        if let Some(earlier) = self.disks[slot as usize].zombie_tag.replace(tag) {
            self.reply(
                earlier,
                Err(failure(ShardErrorKind::Interrupted, "the disk was detached by force again")),
            );
        }
        self.unsettled.push(slot);
        Ok(None)
    }
}
