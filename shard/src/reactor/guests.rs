//! Guests' devices on a disk: connect, disconnect, and what happens to them when the disk moves or goes.

use ring_bridge::blkif::inflight::{Identity, Table};
use ring_bridge::blkif::request::Limits;
use ring_bridge::grants::budget::Budget;
use ring_bridge::grants::persistent::{Cache, RING_PAGES_DEFAULT};
use ring_bridge::grants::{Domid, PAGE_BYTES};

use super::*;
use crate::api::{ClientInfo, Reply, ShardError, ShardErrorKind};
use crate::blkif::connect::{GuestConnect, GuestInUse, Offer, ParkedGuest, QueueConnect, Realm, Transport};
use crate::blkif::domains::Engine;
use crate::blkif::ring::{GuestRing, RingParts};
use crate::blkif::{GuestCounters, connect};
use crate::request::Client;

/// A guest's device on a disk.
#[derive(Debug)]
pub(super) struct Guest {
    domid: Domid,
    devid: u32,
    peer: Option<Arc<str>>,
    realm: Realm,
    pub offer: Offer,
    numbered: bool,
    persistent: Option<Arc<Budget>>,
    counters: Arc<GuestCounters>,
    rings: Vec<u32>,
    /// The command that disconnects it.
    leaving: Option<u64>,
    /// The control side knows that a flush is held.
    flush_held: bool,
    since: Nanos,
}

type Outcome = Result<Option<Reply>, ShardError>;

fn failure(kind: ShardErrorKind, message: impl Into<String>) -> ShardError {
    ShardError { kind, message: message.into() }
}

fn name(domid: Domid, devid: u32) -> String {
    format!("device {devid} of domain {domid}")
}

impl Entry {
    /// The device that a ring is of.
    pub(super) fn guest(&self, ring: &GuestRing) -> Option<&Guest> {
        self.guests.iter().find(|guest| guest.rings.contains(&ring.slot()))
    }

    /// Connections and guests.
    pub(super) fn clients(&self) -> u64 {
        (self.conns.len() + self.guests.len()) as u64
    }

    /// The gauge of clients.
    pub(super) fn count_clients(&self) {
        if let Some(disk) = &self.disk {
            disk.config().counters.clients.set(self.clients());
        }
    }

    /// A sentence if guests are connected: a disk does not go away under them.
    pub(super) fn guests_refuse(&self) -> Result<(), ShardError> {
        let Some(guest) = self.guests.first() else { return Ok(()) };
        let message = format!(
            "{} uses the disk: disconnect it first, or detach the disk with --force",
            name(guest.domid, guest.devid)
        );
        Err(failure(ShardErrorKind::WrongState, message))
    }
}

impl<K: Kernel> Shard<K> {
    /// Serves a guest's rings.
    pub(super) fn connect_guest(&mut self, slot: u32, connect: GuestConnect) -> Outcome {
        let entry = &self.disks[slot as usize];
        if entry.zombie || matches!(entry.pending, Some(Pending::Remove { .. } | Pending::Park { .. })) {
            let message = "the disk is on its way out: connect again in a moment";
            return Err(failure(ShardErrorKind::WrongState, message));
        }
        let (domid, devid) = (connect.domid, connect.devid);
        if entry.guests.iter().any(|guest| (guest.domid, guest.devid) == (domid, devid)) {
            let message = format!("{} is connected already: disconnect it first", name(domid, devid));
            return Err(failure(ShardErrorKind::WrongState, message));
        }
        let orphans = self.orphans(slot);
        if orphans > 0 {
            let message = format!(
                "{orphans} requests of a guest that was dropped are still at the disk, and could land behind what a new one writes: \
                 wait until its store has ended them"
            );
            return Err(failure(ShardErrorKind::WrongState, message));
        }
        let numbers: Vec<u32> = (0..connect.queues.len() as u32).collect();
        let in_use = self.add_guest(slot, connect, &numbers)?;
        Ok(Some(Reply::GuestConnected(Box::new(in_use))))
    }

    /// Requests of rings that are gone.
    fn orphans(&self, disk: u32) -> usize {
        let gone = |client, generation| match client {
            Client::Ring(ring) => {
                self.rings.slab.get(ring as usize).is_none_or(|ring| ring.generation != generation)
            }
            Client::Conn(_) => false,
        };
        let requests = self.requests.iter().map(|(_, request)| request).filter(|r| r.disk == disk);
        requests.filter_map(|r| r.origin).filter(|origin| gone(origin.client, origin.generation)).count()
    }

    /// Maps and binds what a guest has. All or nothing.
    fn add_guest(
        &mut self,
        slot: u32,
        mut connect: GuestConnect,
        numbers: &[u32],
    ) -> Result<GuestInUse, ShardError> {
        let refused = |message: String| failure(ShardErrorKind::Guest, message);
        connect.check().map_err(refused)?;
        let realm = connect.transport.realm();
        let (domid, devid) = (connect.domid, connect.devid);
        let Some(disk) = &self.disks[slot as usize].disk else {
            return Err(failure(ShardErrorKind::WrongState, "the disk is being rebuilt"));
        };
        let limits = connect.offer.limits(disk.config());
        let (opened, new) =
            self.rings.host.open(realm).map_err(|message| failure(ShardErrorKind::Failed, message))?;
        if new {
            let accounts = opened.domains.accounts().clone();
            self.counters.grants.set(realm, &accounts);
            self.arm_ports(realm);
        }
        let transport = std::mem::replace(&mut connect.transport, Transport::Xen);
        self.rings.host.enter(domid, transport).map_err(refused)?;
        let mut slots = Vec::with_capacity(numbers.len());
        let mut begun_again = 0;
        let mut entries = Vec::with_capacity(numbers.len());
        for (queue, (table, &number)) in
            std::mem::take(&mut connect.queues).into_iter().zip(numbers).enumerate()
        {
            let count = numbers.len();
            match self.add_ring(slot, &connect, realm, limits, table, (queue, number, count)) {
                Ok((ring, again)) => {
                    begun_again += again;
                    entries.push(self.rings.slab[ring as usize].entries());
                    slots.push(ring);
                }
                Err(message) => {
                    for ring in slots {
                        self.drop_ring(ring);
                    }
                    self.rings.host.leave(realm, domid);
                    return Err(refused(message));
                }
            }
        }
        for &ring in &slots {
            self.rings.make_ready(ring);
        }
        let in_use = GuestInUse { limits, entries, persistent: connect.persistent.is_some(), begun_again };
        let GuestConnect { peer, offer, numbered, persistent, counters, .. } = connect;
        let entry = &mut self.disks[slot as usize];
        entry.guests.push(Guest {
            domid,
            devid,
            peer,
            realm,
            offer,
            numbered,
            persistent,
            counters,
            rings: slots,
            leaving: None,
            flush_held: false,
            since: self.now,
        });
        entry.count_clients();
        self.counters.clients.add(1);
        Ok(in_use)
    }

    /// Maps a ring and binds its port. The error names the key and the number at fault. Nothing is left then.
    fn add_ring(
        &mut self,
        disk: u32,
        connect: &GuestConnect,
        realm: Realm,
        limits: Limits,
        queue: QueueConnect,
        (index, number, count): (usize, u32, usize),
    ) -> Result<(u32, usize), String> {
        let QueueConnect { grefs, port: remote, table } = queue;
        let (domid, devid) = (connect.domid, connect.devid);
        let host = &mut self.rings.host;
        let no_domains = || "the domains of this kind are not open".to_owned();
        let mapped = host.get(realm).ok_or_else(no_domains)?.domains.map_ring(domid, &grefs);
        let pages = match mapped {
            Ok(pages) => pages,
            Err(error) => {
                let page = host.bad_page(realm, domid, &grefs).unwrap_or(0);
                let (key, gref) = (connect.page_key(count, index, page), grefs.get(page).copied());
                return Err(format!("{key} = {}: {error}", gref.unwrap_or_default()));
            }
        };
        debug_assert_eq!(pages.len(), grefs.len() * PAGE_BYTES);
        let queue_name = || format!("queue {number} of {}", name(domid, devid));
        let (engine, again) = if connect.recover {
            let table = Table::open(table).map_err(|error| format!("{}: {error}", queue_name()))?;
            let identity = *table.identity();
            if (identity.domid, identity.devid, identity.queue) != (domid, devid, number) {
                return Err(format!("{}: the table is another ring's", queue_name()));
            }
            let (engine, recovered) = Engine::recover(pages, table, limits)
                .map_err(|reason| format!("{}: {reason}", queue_name()))?;
            (engine, recovered.again)
        } else {
            let mut ring_grefs = [0; 16];
            for (place, gref) in ring_grefs.iter_mut().zip(&grefs) {
                *place = *gref;
            }
            let identity = Identity {
                domid,
                devid,
                queue: number,
                abi: connect.abi,
                pages: grefs.len() as u32,
                grefs: ring_grefs,
                port: remote,
                segments_max: connect.offer.indirect_segments_max,
            };
            let engine = Engine::attach(pages, table, identity, limits);
            (engine.map_err(|reason| format!("{}: {reason}", queue_name()))?, 0)
        };
        let generation = self.next_generation();
        let vacant = self.rings.slab.vacant_key() as u32;
        let token = GuestRing::event_token(vacant, generation);
        let opened = self.rings.host.get(realm).ok_or_else(no_domains)?;
        let port = opened.domains.bind(domid, remote, token);
        let port = port.map_err(|error| format!("{} = {remote}: {error}", connect.port_key(count, index)))?;
        let budget = connect.persistent.clone();
        let cache = budget.map(|budget| Cache::new(domid, RING_PAGES_DEFAULT, budget));
        let recovered = connect.recover;
        let counters = connect.counters.clone();
        let parts = RingParts { disk, realm, remote, port, engine, cache, counters, recovered };
        let slot = self.rings.slab.insert(Box::new(GuestRing::new(parts, vacant, generation)));
        debug_assert_eq!(slot as u32, vacant);
        Ok((vacant, again))
    }

    /// Takes a ring away: unbinds, unmaps. Requests of it that have not begun are dropped; answers of the others find nobody.
    fn drop_ring(&mut self, slot: u32) -> Option<ring_bridge::memory::SharedRegion> {
        let ring = self.rings.slab.try_remove(slot as usize)?;
        if let (Some(port), Some(opened)) = (ring.port, self.rings.host.get(ring.realm)) {
            opened.domains.unbind(port);
        }
        let (disk, generation) = (ring.disk, ring.generation);
        let table = ring.dismantle(&mut self.pool);
        if self.disks.get(disk as usize).is_some_and(|entry| !entry.quarantined) {
            self.with_disk(disk, |disk, ctx| disk.forget(ctx, Client::Ring(slot), generation));
            self.run_actions();
        }
        Some(table)
    }

    /// Ends a guest's service.
    pub(super) fn disconnect_guest(
        &mut self,
        slot: u32,
        domid: Domid,
        devid: u32,
        (force, tag): (bool, u64),
    ) -> Outcome {
        let entry = &mut self.disks[slot as usize];
        let found = entry.guests.iter().position(|guest| (guest.domid, guest.devid) == (domid, devid));
        let Some(index) = found else {
            let message = format!("{} is not connected to this disk", name(domid, devid));
            return Err(failure(ShardErrorKind::Guest, message));
        };
        if force {
            let in_flight = self.drop_guest(slot, index);
            return Ok(Some(if in_flight == 0 { Reply::Done } else { Reply::Zombie { in_flight } }));
        }
        if matches!(entry.pending, Some(Pending::Park { .. })) {
            let message = "the disk is being moved: disconnect again in a moment";
            return Err(failure(ShardErrorKind::WrongState, message));
        }
        let guest = &mut entry.guests[index];
        if let Some(earlier) = guest.leaving.replace(tag) {
            let message = "the guest was asked to disconnect again";
            self.reply(earlier, Err(failure(ShardErrorKind::Interrupted, message)));
        }
        for ring in self.disks[slot as usize].guests[index].rings.clone() {
            if let Some(r) = self.rings.slab.get_mut(ring as usize) {
                r.closing = true;
                self.rings.make_dirty(ring);
            }
        }
        self.settle_guests(slot);
        Ok(None)
    }

    /// Takes guests away that are leaving and have nothing under way.
    pub(super) fn settle_guests(&mut self, disk: u32) {
        while let Some(entry) = self.disks.get(disk as usize) {
            let drained =
                |&ring: &u32| self.rings.slab.get(ring as usize).is_none_or(|ring| ring.is_drained());
            let gone = entry
                .guests
                .iter()
                .position(|guest| guest.leaving.is_some() && guest.rings.iter().all(drained));
            let Some(index) = gone else { return };
            let tag = self.disks[disk as usize].guests[index].leaving.take();
            // The last responses: their guest may still want to have them.
            for ring in self.disks[disk as usize].guests[index].rings.clone() {
                self.publish(ring);
            }
            self.drop_guest(disk, index);
            if let Some(tag) = tag {
                self.reply(tag, Ok(Reply::Done));
            }
        }
    }

    fn publish(&mut self, slot: u32) {
        if let Some(ring) = self.rings.slab.get_mut(slot as usize)
            && ring.push()
            && let (Some(port), Some(opened)) = (ring.port, self.rings.host.get(ring.realm))
        {
            opened.domains.notify(port);
        }
    }

    /// Takes a guest away at once. Returns how many of its requests are at the disk and cannot be taken back.
    fn drop_guest(&mut self, disk: u32, index: usize) -> u32 {
        let entry = &mut self.disks[disk as usize];
        let guest = entry.guests.remove(index);
        entry.count_clients();
        self.counters.clients.sub(1);
        if let Some(tag) = guest.leaving {
            let message = "the guest was dropped by force";
            self.reply(tag, Err(failure(ShardErrorKind::Interrupted, message)));
        }
        for ring in guest.rings {
            self.drop_ring(ring);
        }
        self.rings.host.leave(guest.realm, guest.domid);
        self.orphans(disk) as u32
    }

    /// The disk goes, whether guests want it or not.
    pub(super) fn drop_guests(&mut self, disk: u32) {
        while self.disks.get(disk as usize).is_some_and(|entry| !entry.guests.is_empty()) {
            self.drop_guest(disk, 0);
        }
    }

    /// Rings take nothing more, for a move; or go on.
    pub(super) fn stop_rings(&mut self, disk: u32, stop: bool) {
        let Some(entry) = self.disks.get(disk as usize) else { return };
        for ring in entry.guests.iter().flat_map(|guest| guest.rings.iter().copied()).collect::<Vec<_>>() {
            if let Some(r) = self.rings.slab.get_mut(ring as usize) {
                r.stopped = stop;
                self.rings.make_ready(ring);
            }
        }
    }

    /// A guest that is being disconnected stays with its command.
    pub(super) fn guest_is_leaving(&self, disk: u32) -> bool {
        self.disks[disk as usize].guests.iter().any(|guest| guest.leaving.is_some())
    }

    /// Drops requests of guests that have not begun: their rings' tables have them. The others are returned.
    pub(super) fn drop_ring_requests(&mut self, keys: Vec<ReqKey>) -> Vec<ReqKey> {
        let (ours, others): (Vec<_>, Vec<_>) = keys.into_iter().partition(|&key| {
            self.requests[key].origin.is_some_and(|origin| matches!(origin.client, Client::Ring(_)))
        });
        for key in ours {
            let mut request = self.requests.remove(key);
            self.free_bounce(request.disk, &mut request);
            if let Some(entry) = self.disks.get_mut(request.disk as usize) {
                entry.requests -= 1;
                if let Some(disk) = &entry.disk {
                    disk.config().counters.io_now.sub(1);
                }
            }
            if let Some(buf) = request.payload.take() {
                self.pool.give(buf);
            }
        }
        others
    }

    /// Takes the guests off a disk at rest. Their requests that have not begun are dropped with the rings: the tables have them.
    pub(super) fn park_guests(&mut self, disk: u32) -> Vec<ParkedGuest> {
        let entry = &mut self.disks[disk as usize];
        let guests = std::mem::take(&mut entry.guests);
        entry.count_clients();
        self.counters.clients.sub(guests.len() as u64);
        guests.into_iter().filter_map(|guest| self.park_guest(guest)).collect()
    }

    fn park_guest(&mut self, guest: Guest) -> Option<ParkedGuest> {
        let (mut queues, mut numbers) = (Vec::new(), Vec::new());
        let mut abi = ring_bridge::blkif::wire::Abi::X86_64;
        for slot in guest.rings {
            let Some(ring) = self.rings.slab.get(slot as usize) else { continue };
            let (grefs, port, number) = (ring.ring_grefs(), ring.remote, ring.queue);
            let broken = ring.broken().is_some();
            abi = ring.abi();
            let table = self.drop_ring(slot)?;
            if !broken {
                numbers.push(number);
                queues.push(QueueConnect { grefs, port, table });
            }
        }
        let transport = self.rings.host.leave(guest.realm, guest.domid)?;
        let connect = GuestConnect {
            domid: guest.domid,
            devid: guest.devid,
            peer: guest.peer,
            abi,
            transport,
            numbered: guest.numbered,
            queues,
            persistent: guest.persistent,
            offer: guest.offer,
            recover: true,
            counters: guest.counters,
        };
        Some(ParkedGuest { connect, numbers, flush_held: guest.flush_held })
    }

    /// Serves guests again that came with their disk. One that cannot be served any more is told of; the disk goes on.
    pub(super) fn unpark_guests(&mut self, disk: u32, guests: Vec<ParkedGuest>) {
        for ParkedGuest { connect, numbers, flush_held } in guests {
            let (domid, devid, realm) = (connect.domid, connect.devid, connect.transport.realm());
            let (offer, numbered, peer) = (connect.offer, connect.numbered, connect.peer.clone());
            let (persistent, counters) = (connect.persistent.clone(), connect.counters.clone());
            let added = if numbers.is_empty() {
                Err("all of its rings are broken".to_owned())
            } else {
                self.add_guest(disk, connect, &numbers).map_err(|error| error.message)
            };
            let id = self.disks[disk as usize].id;
            if let Err(reason) = added {
                for queue in numbers {
                    self.events.send(Event::RingBroken {
                        disk: id,
                        domid,
                        devid,
                        queue,
                        reason: reason.clone(),
                    });
                }
                let entry = &mut self.disks[disk as usize];
                entry.guests.push(Guest {
                    domid,
                    devid,
                    peer,
                    realm,
                    offer,
                    numbered,
                    persistent,
                    counters,
                    rings: Vec::new(),
                    leaving: None,
                    flush_held,
                    since: self.now,
                });
                entry.count_clients();
                self.counters.clients.add(1);
            } else if let Some(guest) = self.disks[disk as usize].guests.last_mut() {
                guest.flush_held = flush_held;
            }
        }
    }

    /// The guest broke a ring: it is stopped, the control side is told, and nothing else happens.
    pub(super) fn break_ring(&mut self, slot: u32) {
        let Some(ring) = self.rings.slab.get_mut(slot as usize) else { return };
        ring.broken_told = true;
        ring.give_up();
        if let (Some(port), Some(opened)) = (ring.port.take(), self.rings.host.get(ring.realm)) {
            opened.domains.unbind(port);
        }
        let (domid, devid, queue) = (ring.domid, ring.devid, ring.queue);
        let reason = ring.broken().map(|reason| reason.to_string()).unwrap_or_default();
        if let Some(entry) = self.disks.get(ring.disk as usize) {
            self.events.send(Event::RingBroken { disk: entry.id, domid, devid, queue, reason });
        }
    }

    /// A flush of a guest failed and is held.
    pub(super) fn tell_flush_held(&mut self, slot: u32) {
        let Some(ring) = self.rings.slab.get(slot as usize) else { return };
        let Some(entry) = self.disks.get_mut(ring.disk as usize) else { return };
        let disk = entry.id;
        let guest = entry.guests.iter_mut().find(|guest| guest.rings.contains(&slot));
        if let Some(guest) = guest.filter(|guest| !guest.flush_held) {
            guest.flush_held = true;
            let (domid, devid) = (guest.domid, guest.devid);
            self.events.send(Event::FlushHeld { disk, domid, devid });
        }
    }

    /// The disk was resumed: flushes that failed are tried again.
    pub(super) fn retry_flushes(&mut self, disk: u32) {
        let Some(entry) = self.disks.get_mut(disk as usize) else { return };
        let mut rings = Vec::new();
        for guest in &mut entry.guests {
            guest.flush_held = false;
            rings.extend_from_slice(&guest.rings);
        }
        for slot in rings {
            if let Some(ring) = self.rings.slab.get_mut(slot as usize) {
                ring.retry_flushes();
                self.rings.make_ready(slot);
            }
        }
    }

    /// Bytes of buffers that the rings of a disk have.
    pub(super) fn ring_buffers(&self, entry: &Entry) -> u64 {
        let rings = entry.guests.iter().flat_map(|guest| &guest.rings);
        rings.filter_map(|&ring| self.rings.slab.get(ring as usize)).map(|ring| ring.buffers()).sum()
    }

    /// Guests of a disk, for lists.
    pub(super) fn guest_infos(&self, disk: u32) -> impl Iterator<Item = ClientInfo> {
        self.disks[disk as usize].guests.iter().map(|guest| {
            let rings = guest.rings.iter().filter_map(|&ring| self.rings.slab.get(ring as usize));
            let kind = if guest.realm == Realm::Xen { "xen" } else { "shared memory" };
            ClientInfo {
                peer: match &guest.peer {
                    Some(peer) => peer.to_string(),
                    None => format!("{kind} domain {} device {}", guest.domid, guest.devid),
                },
                in_flight: rings.map(|ring| ring.in_flight()).sum(),
                age_s: self.now.saturating_sub(guest.since) / SECOND,
            }
        })
    }
}

const _: () = assert!(connect::QUEUES_MAX <= 8);
