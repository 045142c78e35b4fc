//! Rings of guests in a turn: which are looked at, what is copied when, when guests are notified.
//!
//! ```text
//! serve_rings: take ─▶ fetch segments ─▶ pieces ─▶ copy in ─▶ submit      flush_rings: copy out ─▶ answer ─▶ push ─▶ notify ─▶ sleep, unmask
//! ```
//! Each arrow to a copy is one call for all rings of the turn.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};

use ring_bridge::blkif::ring::Fetch;
use ring_bridge::grants::Event as PortEvent;
use ring_bridge::grants::storm::Unmask;

use super::ops::OpKind;
use super::*;
use crate::blkif::Realm;
use crate::blkif::domains::Host;
use crate::blkif::ring::{GuestRing, Next, Outgoing, Piece, Transfer};
use crate::nbd::TURN_BYTES;
use crate::storage::pool::Buf;

/// What waits for the end of a copy.
#[derive(Debug)]
enum Job {
    /// Segments of an indirect request.
    Fetch(Fetch, Buf),
    /// A request for the disk.
    Start(Piece),
    /// Data for the guest.
    Out(Outgoing),
}

/// A job, its ring, and whether its bytes could be had.
#[derive(Debug)]
struct Copying {
    ring: u32,
    job: Job,
    good: bool,
}

/// All rings of a shard, and what is to be done with them.
#[derive(Debug, Default)]
pub(super) struct Rings {
    pub slab: slab::Slab<Box<GuestRing>>,
    pub host: Host,
    /// To be looked at in the next turn (or this one).
    ready: Vec<u32>,
    /// Empty; its memory is used in turn with that of `ready`.
    serving: Vec<u32>,
    /// With something to publish, or that may sleep.
    dirty: Vec<u32>,
    wants_buffer: VecDeque<u32>,
    copying: Vec<Copying>,
    events: Vec<PortEvent>,
    /// When a ring that sleeps or whose port is kept quiet is to be looked at.
    timers: BinaryHeap<Reverse<(Nanos, u32, u32)>>,
    /// Kinds of domains that had more events than one look takes.
    overfull: [bool; Realm::ALL.len()],
}

impl Rings {
    /// The ring that a request or an event is of.
    pub fn get(&mut self, slot: u32, generation: u32) -> Option<&mut GuestRing> {
        let ring = self.slab.get_mut(slot as usize)?;
        (ring.generation == generation).then_some(&mut **ring)
    }

    /// Has it looked at.
    pub fn make_ready(&mut self, slot: u32) {
        if let Some(ring) = self.slab.get_mut(slot as usize)
            && !std::mem::replace(&mut ring.ready, true)
        {
            self.ready.push(slot);
        }
    }

    /// Has its responses published.
    pub fn make_dirty(&mut self, slot: u32) {
        self.dirty.push(slot);
    }

    /// There is work for the next turn.
    pub fn is_busy(&self) -> bool {
        !self.ready.is_empty() || !self.dirty.is_empty() || self.overfull.contains(&true)
    }

    /// Some wait for buffers.
    pub fn is_starved(&self) -> bool {
        !self.wants_buffer.is_empty()
    }

    /// When the next ring is to be looked at.
    pub fn deadline(&self) -> Option<Nanos> {
        self.timers.peek().map(|Reverse((at, ..))| *at)
    }

    /// Makes the copies that were planned; marks those that failed.
    fn copy(&mut self, pool: &mut Pool) {
        for realm in Realm::ALL {
            let Rings { host, copying, .. } = self;
            if let Some(opened) = host.get(realm) {
                opened.copy(pool, |owner| {
                    if let Some(copying) = copying.get_mut(owner as usize) {
                        copying.good = false;
                    }
                });
            }
        }
    }
}

impl<K: Kernel> Shard<K> {
    /// Ports of a kind of domains have something to say.
    pub(super) fn on_ports(&mut self, realm: Realm) {
        let Rings { host, events, slab, ready, overfull, .. } = &mut self.rings;
        let Some(opened) = host.get(realm) else { return };
        overfull[realm as usize] = opened.drain(events);
        for PortEvent { token, .. } in events.drain(..) {
            let (slot, generation) = (token as u32, (token >> 32) as u32);
            let ring = slab.get_mut(slot as usize).filter(|ring| ring.generation == generation);
            if let Some(ring) = ring {
                ring.on_event();
                if !std::mem::replace(&mut ring.ready, true) {
                    ready.push(slot);
                }
            }
        }
    }

    /// Polls a kind of domains that has just been opened, or whose poll has ended.
    ///
    /// Once at a time: Linux's evtchn wakes pollers only when its list of events was empty. An event that comes while the list is
    /// being read wakes nobody, and no later one does; a new poll finds it. It is submitted with the turn's other operations,
    /// after the list was read.
    pub(super) fn arm_ports(&mut self, realm: Realm) {
        use std::os::fd::AsRawFd;
        let Some(opened) = self.rings.host.get(realm) else { return };
        let fd = opened.domains.event_fd().as_raw_fd();
        let user_data = self.ops.insert(OpKind::Ports { realm });
        self.kernel.push(user_data, Op::Poll { fd });
    }

    /// Looks at rings whose time has come.
    pub(super) fn wake_rings(&mut self) {
        for realm in Realm::ALL {
            if std::mem::take(&mut self.rings.overfull[realm as usize]) {
                self.on_ports(realm);
            }
        }
        let now = self.now;
        while let Some(&Reverse((at, slot, generation))) = self.rings.timers.peek()
            && at <= now
        {
            self.rings.timers.pop();
            let Some(ring) = self.rings.get(slot, generation) else { continue };
            let (look, port) = ring.on_timer(at, now);
            let (realm, again) = (ring.realm, ring.new_timer());
            self.rings.timers.extend(again.map(|at| Reverse((at, slot, generation))));
            if let (Some(port), Some(opened)) = (port, self.rings.host.get(realm)) {
                opened.unmask.push(port);
            }
            if look {
                self.rings.make_ready(slot);
            }
        }
    }

    /// Takes what guests ask, and has the disks do it.
    pub(super) fn serve_rings(&mut self) {
        if self.rings.ready.is_empty() {
            return;
        }
        let spare = std::mem::take(&mut self.rings.serving);
        let mut ready = std::mem::replace(&mut self.rings.ready, spare);
        for &slot in &ready {
            self.take_from(slot);
        }
        self.fetch_segments(&ready);
        for &slot in &ready {
            self.start_from(slot);
        }
        self.end_copies();
        self.rings.dirty.extend_from_slice(&ready);
        ready.clear();
        self.rings.serving = ready;
    }

    fn take_from(&mut self, slot: u32) {
        let Some(ring) = self.rings.slab.get_mut(slot as usize) else { return };
        ring.ready = false;
        let guest = self.disks.get(ring.disk as usize).and_then(|entry| {
            let limits = entry.guest(ring)?.offer.limits(entry.disk.as_ref()?.config());
            Some(limits)
        });
        if let Some(limits) = guest {
            ring.follow(limits);
        }
        if ring.take() {
            self.rings.make_ready(slot);
        }
    }

    /// Copies the segments of indirect requests, and lets these be checked.
    fn fetch_segments(&mut self, slots: &[u32]) {
        let (now, pool) = (self.now, &mut self.pool);
        for &slot in slots {
            let Rings { slab, host, copying, wants_buffer, .. } = &mut self.rings;
            let Some(ring) = slab.get_mut(slot as usize) else { continue };
            let Some(opened) = host.get(ring.realm) else { continue };
            let mut first = true;
            while let Some(fetch) = ring.fetches.pop_front() {
                let Some(buf) = pool.take(fetch.len, std::mem::take(&mut first)) else {
                    ring.fetches.push_front(fetch);
                    if !std::mem::replace(&mut ring.wants_buffer, true) {
                        wants_buffer.push_back(slot);
                    }
                    break;
                };
                let owner = copying.len() as u32;
                let good = ring.fetch_in(&fetch, &buf, pool, opened, owner, now) != Transfer::Failed;
                copying.push(Copying { ring: slot, job: Job::Fetch(fetch, buf), good });
            }
        }
        self.end_copies();
    }

    /// Starts what a ring has taken, as far as room, buffers and the share of the turn go.
    fn start_from(&mut self, slot: u32) {
        let Some(ring) = self.rings.slab.get(slot as usize) else { return };
        let disk = ring.disk;
        let Some(entry) = self.disks.get_mut(disk as usize) else { return };
        if entry.share.0 != self.turn {
            entry.share = (self.turn, conns::DISK_TURN_BYTES);
        }
        let mut share = entry.share.1.min(TURN_BYTES);
        loop {
            if share == 0 {
                return self.rings.make_ready(slot);
            }
            let may_take = self.may_take(disk);
            let Rings { slab, host, copying, wants_buffer, .. } = &mut self.rings;
            let Some(ring) = slab.get_mut(slot as usize) else { return };
            let Some(opened) = host.get(ring.realm) else { return };
            match ring.next(&mut self.pool, may_take, self.now) {
                Next::Piece(piece) => {
                    let cost = piece.request.len.clamp(512, u64::from(crate::request::PIECE));
                    share = share.saturating_sub(cost);
                    if let Some(entry) = self.disks.get_mut(disk as usize) {
                        entry.share.1 = entry.share.1.saturating_sub(cost);
                    }
                    let owner = copying.len() as u32;
                    let copied = ring.copy_in(&piece, &mut self.pool, opened, owner, self.now);
                    if copied == Transfer::Done && copying.is_empty() {
                        self.submit(piece.request);
                        self.run_actions();
                    } else {
                        let good = copied != Transfer::Failed;
                        copying.push(Copying { ring: slot, job: Job::Start(piece), good });
                    }
                }
                Next::Buffer => {
                    self.counters.buffer_waits.add(1);
                    if !std::mem::replace(&mut ring.wants_buffer, true) {
                        wants_buffer.push_back(slot);
                    }
                    return;
                }
                // Answers bring it back here.
                Next::Nothing | Next::Room => return,
            }
        }
    }

    /// Makes the copies that were planned and goes on with what waited for them, in order.
    fn end_copies(&mut self) {
        if self.rings.copying.is_empty() {
            return;
        }
        self.rings.copy(&mut self.pool);
        let mut copying = std::mem::take(&mut self.rings.copying);
        for Copying { ring: slot, job, good } in copying.drain(..) {
            let Some(ring) = self.rings.slab.get_mut(slot as usize) else { continue };
            match job {
                Job::Fetch(fetch, buf) => {
                    let bytes = self.pool.bytes(&buf).get(..fetch.len).filter(|_| good);
                    ring.supply(&fetch, bytes);
                    self.pool.give(buf);
                }
                Job::Start(piece) if good => {
                    self.submit(piece.request);
                    self.run_actions();
                }
                Job::Start(piece) => ring.refuse(&mut self.pool, piece),
                Job::Out(outgoing) => ring.on_copied(&mut self.pool, outgoing, good),
            }
        }
        self.rings.copying = copying;
    }

    /// Rings that wait for buffers are tried again.
    pub(super) fn feed_rings(&mut self) {
        for slot in std::mem::take(&mut self.rings.wants_buffer) {
            if let Some(ring) = self.rings.slab.get_mut(slot as usize) {
                ring.wants_buffer = false;
                self.rings.make_ready(slot);
            }
        }
        self.serve_rings();
    }

    /// At the end of a turn: data goes to the guests, then responses, then notifications; rings that have nothing to do sleep.
    pub(super) fn flush_rings(&mut self) {
        if self.rings.dirty.is_empty() {
            return;
        }
        let mut dirty = std::mem::take(&mut self.rings.dirty);
        dirty.sort_unstable();
        dirty.dedup();
        let now = self.now;
        for &slot in &dirty {
            let Rings { slab, host, copying, .. } = &mut self.rings;
            let Some(ring) = slab.get_mut(slot as usize) else { continue };
            let Some(opened) = host.get(ring.realm) else { continue };
            let mut outgoing = ring.take_outgoing();
            for data in outgoing.drain(..) {
                let owner = copying.len() as u32;
                match ring.copy_out(&data, &mut self.pool, opened, owner, now) {
                    Transfer::Done => ring.on_copied(&mut self.pool, data, true),
                    // A part of what failed may be planned.
                    copied => {
                        let good = copied != Transfer::Failed;
                        copying.push(Copying { ring: slot, job: Job::Out(data), good });
                    }
                }
            }
            ring.give_outgoing(outgoing);
        }
        self.end_copies();
        for &slot in &dirty {
            self.finish_ring(slot);
        }
        for realm in Realm::ALL {
            if let Some(opened) = self.rings.host.get(realm)
                && !opened.unmask.is_empty()
            {
                let mut ports = std::mem::take(&mut opened.unmask);
                opened.domains.unmask(&ports);
                ports.clear();
                opened.unmask = ports;
            }
        }
        // What became dirty meanwhile is looked at in the next turn.
        if self.rings.dirty.is_empty() {
            dirty.clear();
            self.rings.dirty = dirty;
        }
    }

    fn finish_ring(&mut self, slot: u32) {
        let now = self.now;
        let Rings { slab, host, timers, .. } = &mut self.rings;
        let Some(ring) = slab.get_mut(slot as usize) else { return };
        let Some(opened) = host.get(ring.realm) else { return };
        let notify = ring.push();
        if let Some(port) = ring.port.filter(|_| notify) {
            opened.domains.notify(port);
        }
        let sleeps = ring.sleep(now);
        if let Some(port) = ring.port {
            match ring.event_done() {
                Some(Unmask::Now) => opened.unmask.push(port),
                Some(Unmask::After(delay)) => {
                    opened.domains.hold(port);
                    ring.damp(now + delay);
                }
                None => {}
            }
        }
        timers.extend(ring.new_timer().map(|at| Reverse((at, slot, ring.generation))));
        ring.account();
        let (disk, closing) = (ring.disk, ring.closing);
        if ring.broken().is_some() && !ring.broken_told {
            self.break_ring(slot);
        }
        if let Some(ring) = self.rings.slab.get_mut(slot as usize)
            && std::mem::take(&mut ring.flush_news)
        {
            self.tell_flush_held(slot);
        }
        if closing {
            self.settle_guests(disk);
        }
        if !sleeps {
            self.rings.make_ready(slot);
        }
    }

    /// About once a second: persistent mappings that are idle go.
    pub(super) fn sweep_rings(&mut self) {
        for (_, ring) in &mut self.rings.slab {
            ring.sweep(self.now);
            ring.account();
        }
    }
}
