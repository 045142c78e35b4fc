//! One ring of a guest: from what its engine hands out to requests of the disk, and from their answers to responses.
//!
//! A pure state machine but for copies and notifications, which it makes through what the reactor hands it ([`Opened`]).
//!
//! Invariants: a command is what the engine has handed out and not got an answer for; it is answered when no request of it is at the
//! disk, none of its bytes is on its way to the guest, and all of it was issued. `held` counts the bytes of requests at the
//! disk and of data on its way to the guest, `buffers` those of pool buffers among them.

mod commands;
mod data;

use std::collections::VecDeque;

use ring_bridge::blkif::request::{Operation, Reason, Segment, Status};
use ring_bridge::blkif::ring::{Counters, Fetch, Request as Taking, RingError, StopReason, Taken, Token};
use ring_bridge::grants::persistent::{Cache, Place};
use ring_bridge::grants::storm::{Damper, Unmask};
use ring_bridge::grants::{Direction, Domid, Gref, PAGE_BYTES, Pages, Port};

use commands::Command;
pub use commands::{Next, Piece};
pub use data::{Outgoing, Transfer};

use super::connect::Realm;
use super::domains::{Engine, Opened};
use super::{GuestCounters, GuestOp};
use crate::clock::{MICROSECOND, Nanos};
use crate::request::{Client, Kind, Origin, PIECE, Request};
use crate::storage::grants::Granted;
use crate::storage::pool::{Buf, Pool};

/// Requests that one ring may take in one turn.
pub const TURN_REQUESTS: usize = 64;
/// Bytes of requests of one ring that may be at the disk, or on their way to the guest.
pub const HELD_MAX: u64 = 4 << 20;
/// Requests in flight from which on the guest's next ones may come without an event for a moment.
const DOZE_FROM: u32 = 8;
/// That moment.
const DOZE: Nanos = 100 * MICROSECOND;
/// New requests in that moment that are an event after all, at most.
const DOZE_REQUESTS: u32 = 8;

/// What is in the engine's counters already told, and gauges as they were told last.
#[derive(Debug, Default, Clone, Copy)]
struct Told {
    counters: Counters,
    pages: u64,
    in_flight: u64,
    held: u64,
}

/// One ring.
#[derive(Debug)]
pub struct GuestRing {
    /// Slot of its disk.
    pub disk: u32,
    slot: u32,
    /// Guards against answers and events for an earlier ring of the same slot.
    pub generation: u32,
    pub realm: Realm,
    pub domid: Domid,
    pub devid: u32,
    pub queue: u32,
    /// The guest's port.
    pub remote: Port,
    /// Ours; `None` when the ring is broken.
    pub port: Option<Port>,
    engine: Engine,
    /// Pages that are kept mapped, if the guest wants that.
    cache: Option<Cache<Pages>>,
    damper: Damper,
    commands: Box<[Option<Command>]>,
    /// Commands that are not held.
    open: u32,
    /// Commands that are held.
    held_flushes: u32,
    /// Commands with something to issue, in order.
    queue_of: VecDeque<u16>,
    /// Indirect requests that wait for their segments.
    pub fetches: VecDeque<Fetch>,
    outgoing: Vec<Outgoing>,
    /// Requests at the disk.
    requests: u32,
    held: u64,
    buffers: u64,
    /// An event was taken and its port is masked.
    pub event: bool,
    /// A request was taken since the event before.
    useful: bool,
    /// The ring was looked at since it became ready.
    looked: bool,
    /// Is in the list of rings to look at.
    pub ready: bool,
    /// Is in the list of rings that wait for a buffer.
    pub wants_buffer: bool,
    /// Takes and starts nothing: about to be parked.
    pub stopped: bool,
    /// Takes nothing: being disconnected.
    pub closing: bool,
    /// The guest has to be notified of the next responses whether it asked or not.
    notify_once: bool,
    /// Looked at then, though no event came.
    doze_until: Option<Nanos>,
    /// It was: every new request is an event until one has come.
    alert: bool,
    /// Its port is unmasked then.
    damped_until: Option<Nanos>,
    /// When the reactor has a timer for it.
    timer: Option<Nanos>,
    /// Commands in `queue_of` that overwrite with zeroes: they may take long, so that others go on beside them.
    wiping: usize,
    /// A flush failed, and nobody was told.
    pub flush_news: bool,
    broken: Option<StopReason>,
    /// That was told.
    pub broken_told: bool,
    told: Told,
    counters: std::sync::Arc<GuestCounters>,
    taken: Vec<Taken>,
    segments: Vec<Segment>,
    granted: Vec<Granted>,
    grefs: Vec<Gref>,
    places: Vec<Place>,
}

/// What a ring is made of.
#[derive(Debug)]
pub struct RingParts {
    /// Slot of its disk.
    pub disk: u32,
    pub realm: Realm,
    /// The guest's port.
    pub remote: Port,
    pub port: Port,
    pub(crate) engine: Engine,
    pub cache: Option<Cache<Pages>>,
    pub counters: std::sync::Arc<GuestCounters>,
    /// A dead process may have published responses without a notification.
    pub recovered: bool,
}

impl GuestRing {
    /// A ring that serves from now on.
    pub fn new(parts: RingParts, slot: u32, generation: u32) -> GuestRing {
        let RingParts { disk, realm, remote, port, engine, cache, counters, recovered } = parts;
        let identity = *engine.identity();
        let entries = engine.entries() as usize;
        counters.rings.add(1);
        GuestRing {
            disk,
            slot,
            generation,
            realm,
            domid: identity.domid,
            devid: identity.devid,
            queue: identity.queue,
            remote,
            port: Some(port),
            engine,
            cache,
            damper: Damper::default(),
            commands: (0..entries).map(|_| None).collect(),
            open: 0,
            held_flushes: 0,
            queue_of: VecDeque::new(),
            fetches: VecDeque::new(),
            outgoing: Vec::new(),
            requests: 0,
            held: 0,
            buffers: 0,
            event: false,
            useful: false,
            looked: false,
            ready: false,
            wants_buffer: false,
            stopped: false,
            closing: false,
            notify_once: recovered,
            doze_until: None,
            alert: false,
            damped_until: None,
            timer: None,
            wiping: 0,
            flush_news: false,
            broken: None,
            broken_told: false,
            told: Told::default(),
            counters,
            taken: Vec::new(),
            segments: Vec::new(),
            granted: Vec::new(),
            grefs: Vec::new(),
            places: Vec::new(),
        }
    }

    /// Its slot in the reactor.
    pub fn slot(&self) -> u32 {
        self.slot
    }

    /// Who asks, as requests name it.
    pub fn client(&self) -> Client {
        Client::Ring(self.slot)
    }

    /// What events of its port carry.
    pub fn event_token(slot: u32, generation: u32) -> u64 {
        u64::from(generation) << 32 | u64::from(slot)
    }

    /// Bytes of pool buffers that it has.
    pub fn buffers(&self) -> u64 {
        self.buffers
    }

    /// Requests of the guest that are not answered.
    pub fn in_flight(&self) -> u32 {
        self.engine.in_flight()
    }

    /// A request of it was given a buffer.
    pub fn note_buffer(&mut self, buf: &Buf) {
        self.buffers += buf.capacity() as u64;
    }

    fn give(&mut self, pool: &mut Pool, buf: Buf) {
        self.buffers = self.buffers.saturating_sub(buf.capacity() as u64);
        pool.give(buf);
    }

    /// Why it was stopped for good.
    pub fn broken(&self) -> Option<StopReason> {
        self.broken
    }

    /// Notes the end of the ring; `None` then.
    fn note<V>(&mut self, result: Result<V, RingError>) -> Option<V> {
        let reason = match result {
            Ok(value) => return Some(value),
            Err(RingError::Stopped(reason)) => reason,
            Err(RingError::Token(token)) => {
                debug_assert!(false, "{token:?} is not known to the engine");
                StopReason::Broken { what: "a request was answered twice" }
            }
        };
        self.broken.get_or_insert(reason);
        None
    }

    /// The disk may have another size than it had, or another image.
    pub fn follow(&mut self, limits: ring_bridge::blkif::request::Limits) {
        if *self.engine.limits() != limits {
            self.engine.set_limits(limits);
        }
    }

    /// New requests may be taken: everything that was taken before has begun.
    fn may_look(&self) -> bool {
        let ends = self.stopped || self.closing || self.broken.is_some();
        !ends && self.queue_of.len() == self.wiping && self.fetches.is_empty()
    }

    /// Takes requests; true when there may be more.
    pub fn take(&mut self) -> bool {
        if !self.may_look() {
            return false;
        }
        self.looked = true;
        self.doze_until = None;
        let mut taken = std::mem::take(&mut self.taken);
        let result = self.engine.consume(TURN_REQUESTS, &mut taken);
        let count = self.note(result).unwrap_or(0);
        if count > 0 {
            (self.useful, self.alert) = (true, false);
        }
        if count > 0 && self.engine.is_full() {
            self.counters.ring_full.add(1);
        }
        for taken in taken.drain(..) {
            match taken {
                Taken::Run(request) => self.enter(request),
                Taken::Fetch(fetch) => self.fetches.push_back(fetch),
            }
        }
        self.taken = taken;
        count == TURN_REQUESTS
    }

    /// Publishes responses; true when the guest is to be notified.
    pub fn push(&mut self) -> bool {
        if self.broken.is_some() {
            return false;
        }
        let before = self.engine.counters().responses;
        let pushed = self.engine.push();
        let notify = self.note(pushed).unwrap_or(false);
        let published = self.engine.counters().responses != before;
        notify || (published && std::mem::take(&mut self.notify_once))
    }

    /// Nothing of it is under way; flushes that are held do not count.
    pub fn is_drained(&self) -> bool {
        self.open == 0 && self.fetches.is_empty() && self.requests == 0 && self.outgoing.is_empty()
    }

    /// At the end of a turn: waits for events, if there is nothing to do. False when there is.
    pub fn sleep(&mut self, now: Nanos) -> bool {
        if self.stopped || self.broken.is_some() || self.wants_buffer {
            return true;
        }
        if !self.fetches.is_empty() || self.can_go_on() {
            return false;
        }
        if !self.may_look() {
            // Answers come first.
            return true;
        }
        let in_flight = self.engine.in_flight();
        let few = in_flight < DOZE_FROM || self.alert;
        let batch = if few { 1 } else { (in_flight / 4).min(DOZE_REQUESTS) };
        self.doze_until = (!few).then_some(now + DOZE);
        let more = self.engine.sleep(batch);
        !self.note(more).unwrap_or(false)
    }

    /// When the reactor has to look at it, if it has no timer for that yet.
    pub fn new_timer(&mut self) -> Option<Nanos> {
        let at = [self.doze_until, self.damped_until].into_iter().flatten().min()?;
        let earlier = self.timer.is_none_or(|timer| at < timer);
        earlier.then(|| *self.timer.insert(at))
    }

    /// A timer has gone off: whether the ring is to be looked at, and a port to be unmasked.
    pub fn on_timer(&mut self, at: Nanos, now: Nanos) -> (bool, Option<Port>) {
        if self.timer == Some(at) {
            self.timer = None;
        }
        let port = self.damped_until.take_if(|until| *until <= now).and(self.port);
        let woken = self.doze_until.take_if(|until| *until <= now).is_some() && self.may_look();
        let more = woken && {
            self.alert = true;
            let more = self.engine.sleep(1);
            self.note(more).unwrap_or(true)
        };
        (more || port.is_some(), port)
    }

    /// Its port stays masked for a while.
    pub fn damp(&mut self, until: Nanos) {
        self.damped_until = Some(until);
    }

    /// What to do with the port of an event after the turn's work; `None` while the ring has not been looked at.
    pub fn event_done(&mut self) -> Option<Unmask> {
        let looked = std::mem::take(&mut self.looked);
        if !self.event || !looked {
            return None;
        }
        self.event = false;
        let useful = std::mem::take(&mut self.useful);
        self.counters.events_spurious.add(u64::from(!useful));
        let unmask = self.damper.handled(useful);
        if unmask != Unmask::Now {
            self.counters.events_damped.add(1);
        }
        Some(unmask)
    }

    /// An event of its port.
    pub fn on_event(&mut self) {
        self.event = true;
        self.counters.events.add(1);
    }

    /// About once a second: mappings that are idle go. True when more are.
    pub fn sweep(&mut self, now: Nanos) -> bool {
        self.cache.as_mut().is_some_and(|cache| cache.sweep(now))
    }

    /// Brings the counters up to date.
    pub fn account(&mut self) {
        let (now, told) = (*self.engine.counters(), &mut self.told);
        let before = std::mem::replace(&mut told.counters, now);
        let counters = &self.counters;
        counters.indirect.add(now.indirect - before.indirect);
        counters.notifications.add(now.notifies - before.notifies);
        counters.notifications_saved.add(now.notifies_saved - before.notifies_saved);
        for ((cell, now), before) in counters.refused.iter().zip(now.refused).zip(before.refused) {
            cell.add(now - before);
        }
        let pages = self.cache.as_ref().map_or(0, Cache::pages) as u64;
        let in_flight = u64::from(self.engine.in_flight());
        let held = u64::from(self.held_flushes);
        counters.persistent_pages.add(pages.wrapping_sub(std::mem::replace(&mut told.pages, pages)));
        counters.in_flight.add(in_flight.wrapping_sub(std::mem::replace(&mut told.in_flight, in_flight)));
        counters.flushes_held.add(held.wrapping_sub(std::mem::replace(&mut told.held, held)));
    }

    /// Takes it apart: gives its buffers back, and the table for who goes on. Requests of it may still be at the disk; their answers find nobody.
    pub fn dismantle(mut self, pool: &mut Pool) -> ring_bridge::memory::SharedRegion {
        for outgoing in std::mem::take(&mut self.outgoing) {
            pool.give(outgoing.buf);
        }
        self.account();
        self.counters.rings.sub(1);
        self.counters.persistent_pages.sub(self.told.pages);
        self.counters.in_flight.sub(self.told.in_flight);
        self.counters.flushes_held.sub(self.told.held);
        let (_, table) = self.engine.into_memory();
        table
    }

    /// Entries of the ring.
    pub fn entries(&self) -> u32 {
        self.engine.entries()
    }

    /// Layout of the ring.
    pub fn abi(&self) -> ring_bridge::blkif::wire::Abi {
        self.engine.identity().abi
    }

    /// The grefs of its ring pages.
    pub fn ring_grefs(&self) -> Vec<Gref> {
        let identity = self.engine.identity();
        identity.grefs[..(identity.pages as usize).min(identity.grefs.len())].to_vec()
    }

    /// What it counts: requests at the disk, bytes held, bytes of buffers; and the last two of what waits to be copied out. For tests.
    #[cfg(test)]
    pub fn counted(&self) -> (u64, u64, u64, u64, u64) {
        let own_held = self.outgoing.iter().map(|outgoing| outgoing.len).sum();
        let own_buffers = self.outgoing.iter().map(|outgoing| outgoing.buf.capacity() as u64).sum();
        (u64::from(self.requests), self.held, self.buffers, own_held, own_buffers)
    }
}
