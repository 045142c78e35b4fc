//! The backend's engine of one ring.
//!
//! Invariants:
//! - Every request that was taken is in exactly one slot of the table until its response is published, and is answered once.
//! - `rsp_published <= rsp_next <= req_cons <= rsp_published + entries`, as distances of wrapping indices; all four are ours.
//! - What the caller gets was checked, and comes from a copy that the frontend cannot reach.
//! - After a [`StopReason`] the shared ring is neither read nor written any more; answers are still taken, and go nowhere.
//! - Nothing is allocated after the construction but by the caller's own vectors.
//!
//! Barriers: a barrier is handed out when it is the only request of this ring, and nothing is taken before it has been answered. So
//! its requester needs no order between its other requests.

mod stop;
mod taken;

use std::collections::VecDeque;
use std::sync::atomic::{Ordering, fence};

pub use stop::{RingError, StopReason};
pub use taken::{Fetch, Request, Taken, Token};

use super::inflight::{Identity, Plan, State, Table, TableError};
use super::request::{Body, Checked, IndirectBody, Limits, Operation, Reason, Segment, Status};
use super::wire::{
    self, Abi, ENTRIES_AT, Entry, REQ_EVENT, REQ_PROD, REQUEST_BYTES_MAX, RSP_EVENT, RSP_PROD, Response,
    SEGMENT_BYTES, SEGMENTS_MAX, SEGMENTS_PER_PAGE, WireSegment, entries, entry_at,
};
use crate::memory::{MemoryError, RingMemory, SharedRegion};

/// What happened on a ring since its construction.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counters {
    /// Requests taken from the ring.
    pub taken: u64,
    /// Of them with indirect segments.
    pub indirect: u64,
    /// Calls of `consume` that took at least one.
    pub batches: u64,
    /// Responses published.
    pub responses: u64,
    /// Publications that asked for a notification of the frontend.
    pub notifies: u64,
    /// Publications that did not.
    pub notifies_saved: u64,
    /// Requests refused, by the number of their [`Reason`].
    pub refused: [u64; Reason::ALL.len()],
    /// Requests of a dead process that were begun again.
    pub begun_again: u64,
    /// Responses of a dead process that were published by us.
    pub published_again: u64,
}

/// What recovery found.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Recovered {
    /// Requests that will be handed out again.
    pub again: usize,
    /// Requests whose known result will be published.
    pub published: usize,
    /// The largest number of times that one of them was begun again, this time included.
    pub attempts_max: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Free,
    /// Left behind by a dead process, in state I or D; or a barrier that has to wait.
    Waiting,
    /// Its segments are being fetched.
    Fetching,
    /// Handed out.
    Running,
    /// Response written, not published.
    Answered,
}

/// What the engine knows about a slot beside the table.
#[derive(Debug, Clone, Copy)]
struct Local {
    phase: Phase,
    /// Operation of the response.
    operation: u8,
    indirect: bool,
    seq: u32,
    id: u64,
    body: Body,
}

const NOTHING: Body = Body { operation: Operation::Flush, sector: 0, sectors: 0, segments: 0 };
const EMPTY: Local =
    Local { phase: Phase::Free, operation: 0, indirect: false, seq: 0, id: 0, body: NOTHING };

/// The backend's side of one ring. `R` is the ring's memory, `T` that of the table of requests in flight.
#[derive(Debug)]
pub struct Ring<R = SharedRegion, T = SharedRegion> {
    ring: R,
    table: Table<T>,
    limits: Limits,
    abi: Abi,
    entries: u32,
    /// Requests before it were taken.
    req_cons: u32,
    /// Responses before it were written.
    rsp_next: u32,
    /// Responses before it were published.
    rsp_published: u32,
    slots: Box<[Local]>,
    free: Vec<u16>,
    /// Responses from `rsp_published` to `rsp_next`.
    unpublished: Vec<u16>,
    /// Refused in the batch that is being taken; answered at its end.
    refused: Vec<(u16, Reason)>,
    /// Left behind by a dead process: results first, then requests in order.
    replay: VecDeque<u16>,
    /// Taken and not answered.
    in_flight: u32,
    /// A barrier that waits or runs.
    barrier: Option<u16>,
    stopped: Option<StopReason>,
    counters: Counters,
}

impl<R: RingMemory, T: RingMemory> Ring<R, T> {
    /// Serves a ring that no process has left unanswered requests of: a new one, or one that was drained. The table is made anew in
    /// `table` ([`super::inflight::table_bytes`]).
    ///
    /// # Errors
    /// [`StopReason`] when the memory is too short or the frontend's indices are broken already.
    pub fn attach(ring: R, table: T, identity: Identity, limits: Limits) -> Result<Self, StopReason> {
        check_size(&ring, identity.pages)?;
        let index = ring.load(RSP_PROD)?;
        let table = Table::create(table, identity, index)?;
        let mut engine = Ring::over(ring, table, limits, index, index);
        engine.free.extend((0..engine.entries as u16).rev());
        engine.producer()?;
        Ok(engine)
    }

    /// Serves a ring that a dead process has left. To be called when none of that process's I/O can land any more. Results that are known are
    /// published and requests handed out again, in the order of the ring, by the calls of `consume` that follow; they are checked anew
    /// against `limits`. After the first `push` the frontend is to be notified in any case: the dead process may have published without.
    ///
    /// # Errors
    /// [`StopReason`] when the table is damaged, or the frontend's indices are broken.
    pub fn recover(ring: R, table: Table<T>, limits: Limits) -> Result<(Self, Recovered), StopReason> {
        check_size(&ring, table.identity().pages)?;
        let plan = Plan::new(&table.snapshot()?, ring.load(RSP_PROD)?)?;
        table.execute(&plan)?;
        let mut engine = Ring::over(ring, table, limits, plan.req_cons, plan.rsp_prod);
        engine.free.extend(plan.free.iter().chain(&plan.published).rev());
        let again = plan.again.iter().map(|again| again.slot);
        for slot in plan.done.iter().copied().chain(again) {
            engine.slots[usize::from(slot)].phase = Phase::Waiting;
            engine.replay.push_back(slot);
            engine.in_flight += 1;
        }
        let attempts_max = plan.again.iter().map(|again| again.attempts).max().unwrap_or(0);
        engine.producer()?;
        Ok((engine, Recovered { again: plan.again.len(), published: plan.done.len(), attempts_max }))
    }

    fn over(ring: R, table: Table<T>, limits: Limits, req_cons: u32, rsp_prod: u32) -> Self {
        let entries = table.entries();
        let room = entries as usize;
        Ring {
            ring,
            abi: table.identity().abi,
            table,
            limits,
            entries,
            req_cons,
            rsp_next: rsp_prod,
            rsp_published: rsp_prod,
            slots: vec![EMPTY; room].into(),
            free: Vec::with_capacity(room),
            unpublished: Vec::with_capacity(room),
            refused: Vec::with_capacity(room),
            replay: VecDeque::new(),
            in_flight: 0,
            barrier: None,
            stopped: None,
            counters: Counters::default(),
        }
    }

    /// Takes at most `budget` requests and appends to `out` what is to be done; refused ones are answered. Returns how many were taken,
    /// begun again or published again: 0 says that there is nothing to do now.
    ///
    /// # Errors
    /// [`RingError::Stopped`]; `out` is then as it was.
    pub fn consume(&mut self, budget: usize, out: &mut Vec<Taken>) -> Result<usize, RingError> {
        self.running()?;
        let before = out.len();
        let done = self.take(budget, out);
        if done.is_err() {
            for taken in out.drain(before..) {
                let (Taken::Run(Request { token, .. }) | Taken::Fetch(Fetch { token, .. })) = taken;
                self.slots[usize::from(token.slot)].phase = Phase::Free;
            }
        }
        let done = self.guard(done)?;
        self.counters.batches += u64::from(done > 0);
        Ok(done)
    }

    /// The segments of a request that was handed out, in order; their lengths add up to the request's. `out` is cleared first.
    ///
    /// # Errors
    /// [`RingError::Token`] for a request that is not running; [`RingError::Stopped`] when the table was damaged meanwhile.
    pub fn segments(&mut self, token: Token, out: &mut Vec<Segment>) -> Result<(), RingError> {
        out.clear();
        let local = *self.local(token, Phase::Running)?;
        let copied = self.copy_segments(token.slot, &local, out);
        self.guard(copied)
    }

    /// What a request that was handed out asks.
    pub fn request(&self, token: Token) -> Option<Request> {
        let local = self.local(token, Phase::Running).ok()?;
        Some(Request { token, body: local.body })
    }

    /// Hands over the segments of an indirect request, `bytes` as [`Fetch::len`] says. Returns the request if it can run; `None` if it
    /// was refused and answered.
    ///
    /// # Errors
    /// [`RingError::Token`] for a request that does not wait for segments, [`RingError::Stopped`].
    pub fn supply(&mut self, token: Token, bytes: &[u8]) -> Result<Option<Request>, RingError> {
        self.running()?;
        let Body { operation, sector, segments, .. } = self.local(token, Phase::Fetching)?.body;
        if bytes.len() != usize::from(segments) * SEGMENT_BYTES {
            self.refuse(token, Reason::IndirectPage)?;
            return Ok(None);
        }
        // `bytes` is the caller's private copy: what is checked is what is kept.
        match crate::blkif::request::check_segments(operation, sector, bytes, &self.limits) {
            Ok(body) => {
                let kept = self.table.keep_segments(token.slot, bytes).map_err(StopReason::from);
                self.guard(kept)?;
                Ok(Some(self.run(token.slot, body)))
            }
            Err(reason) => {
                self.refuse(token, reason)?;
                Ok(None)
            }
        }
    }

    /// Answers a request that waits for its segments, or runs, by a reason to refuse it; for instance when its indirect pages
    /// cannot be read.
    ///
    /// # Errors
    /// As [`Ring::answer`].
    pub fn refuse(&mut self, token: Token, reason: Reason) -> Result<(), RingError> {
        self.answer(token, reason.status())?;
        self.count_refused(reason);
        Ok(())
    }

    /// Answers a request that was handed out. The frontend sees it after the next [`Ring::push`]. On a stopped ring the request ends here.
    ///
    /// # Errors
    /// [`RingError::Token`] when it was answered already; [`RingError::Stopped`] when the answer could not be written.
    pub fn answer(&mut self, token: Token, status: Status) -> Result<(), RingError> {
        if self.local(token, Phase::Running).is_err() {
            self.local(token, Phase::Fetching)?;
        }
        if self.stopped.is_some() {
            self.slots[usize::from(token.slot)].phase = Phase::Free;
            self.in_flight -= 1;
            return Ok(());
        }
        let responded = self.respond(token.slot, status.to_wire());
        self.guard(responded)
    }

    /// Publishes the answers. True: notify the frontend.
    ///
    /// # Errors
    /// [`RingError::Stopped`].
    pub fn push(&mut self) -> Result<bool, RingError> {
        self.running()?;
        if self.unpublished.is_empty() {
            return Ok(false);
        }
        let notify = self.publish();
        self.guard(notify)
    }

    /// Before waiting for an event: asks for one when at least `batch` more requests have come (1 at least; a larger number counts only
    /// while requests are in flight, whose answers bring the caller back here), then looks again. True: do not wait, consume.
    /// Who looks at the ring in every turn calls this only before it blocks: until then the frontend notifies at most once.
    ///
    /// # Errors
    /// [`RingError::Stopped`].
    pub fn sleep(&mut self, batch: u32) -> Result<bool, RingError> {
        self.running()?;
        if self.barrier.is_some() {
            return Ok(self.barrier_due().is_some());
        }
        if !self.replay.is_empty() {
            return Ok(true);
        }
        let batch = if self.in_flight == 0 { 1 } else { batch.clamp(1, self.entries) };
        let looked = self.look_again(batch);
        self.guard(looked)
    }

    /// Requests taken and not answered.
    pub fn in_flight(&self) -> u32 {
        self.in_flight
    }

    /// Entries of the ring: the most requests that can be in flight.
    pub fn entries(&self) -> u32 {
        self.entries
    }

    /// No entry is free for the frontend, as far as it was told.
    pub fn is_full(&self) -> bool {
        self.req_cons.wrapping_sub(self.rsp_published) == self.entries
    }

    /// Why the ring was stopped.
    pub fn stopped(&self) -> Option<StopReason> {
        self.stopped
    }

    /// What the backend offers.
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// Changes what the backend offers, for requests that are taken from now on: above all the size of the disk.
    pub fn set_limits(&mut self, limits: Limits) {
        self.limits = limits;
    }

    /// Whose ring it is.
    pub fn identity(&self) -> &Identity {
        self.table.identity()
    }

    /// What happened.
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// All requests that were handed out and not answered, in no order; those that wait for segments as well.
    pub fn unanswered(&self) -> impl Iterator<Item = Token> {
        let phases = [Phase::Running, Phase::Fetching];
        let slots = (0u16..).zip(&self.slots);
        slots
            .filter(move |(_, local)| phases.contains(&local.phase))
            .map(|(slot, local)| Token { slot, seq: local.seq })
    }

    /// Gives the memories back: the ring's, and the table's.
    pub fn into_memory(self) -> (R, T) {
        (self.ring, self.table.into_memory())
    }

    fn running(&self) -> Result<(), RingError> {
        self.stopped.map_or(Ok(()), |reason| Err(reason.into()))
    }

    /// Stops the ring if the result is a reason to. What was not handed out is forgotten: the caller has to see the end of
    /// what it runs, and of nothing else.
    #[inline]
    fn guard<V>(&mut self, result: Result<V, StopReason>) -> Result<V, RingError> {
        result.map_err(|reason| {
            self.stopped = Some(reason);
            self.in_flight = self.unanswered().count() as u32;
            RingError::Stopped(reason)
        })
    }

    #[inline]
    fn local(&self, token: Token, phase: Phase) -> Result<&Local, RingError> {
        let local = self.slots.get(usize::from(token.slot));
        local.filter(|local| local.seq == token.seq && local.phase == phase).ok_or(RingError::Token(token))
    }

    fn count_refused(&mut self, reason: Reason) {
        self.counters.refused[reason as usize] += 1;
    }

    /// Reads and checks the frontend's index: what it says is `req_cons` or at most as far as the ring is free.
    #[inline]
    fn producer(&self) -> Result<u32, StopReason> {
        let (req_cons, rsp_prod, entries) = (self.req_cons, self.rsp_published, self.entries);
        let req_prod = self.ring.load(REQ_PROD)?;
        let ahead = req_prod.wrapping_sub(rsp_prod);
        if ahead > entries {
            return Err(StopReason::Overrun { req_prod, rsp_prod, entries });
        }
        if ahead < req_cons.wrapping_sub(rsp_prod) {
            return Err(StopReason::WentBack { req_prod, req_cons });
        }
        Ok(req_prod)
    }

    /// The barrier, if it waits and is alone.
    fn barrier_due(&self) -> Option<u16> {
        let slot = self.barrier?;
        let waits = self.slots[usize::from(slot)].phase == Phase::Waiting;
        (waits && self.in_flight == 1).then_some(slot)
    }

    fn take(&mut self, budget: usize, out: &mut Vec<Taken>) -> Result<usize, StopReason> {
        let mut done = 0;
        if self.barrier.is_none() {
            while done < budget && self.barrier.is_none() {
                let Some(slot) = self.replay.pop_front() else { break };
                self.begin_again(slot, out)?;
                done += 1;
            }
            if self.replay.is_empty() {
                done += self.take_new(budget - done, out)?;
            }
            self.answer_refused()?;
        }
        if let Some(slot) = self.barrier_due() {
            let body = self.slots[usize::from(slot)].body;
            out.push(Taken::Run(self.run(slot, body)));
            done = done.max(1);
        }
        Ok(done)
    }

    /// Takes requests from the ring. Nothing of the batch runs or is answered before `req_cons` is stored: the caller gets
    /// it afterwards, and refusals are answered afterwards.
    fn take_new(&mut self, budget: usize, out: &mut Vec<Taken>) -> Result<usize, StopReason> {
        let req_prod = self.producer()?;
        let mut done = 0;
        while self.req_cons != req_prod && done < budget && self.barrier.is_none() {
            let seq = self.req_cons;
            let slot = self.free.pop().ok_or(StopReason::Broken { what: "no free slot" })?;
            let mut entry: Entry = [0; REQUEST_BYTES_MAX];
            let at = entry_at(self.abi, self.entries, seq);
            // The only read of the entry. Everything below uses the copy.
            self.ring.copy_out(at, &mut entry[..self.abi.entry_bytes()])?;
            self.table.take(slot, seq, &entry, wire::used_bytes(self.abi, &entry))?;
            self.req_cons = seq.wrapping_add(1);
            self.in_flight += 1;
            self.start(slot, seq, &entry, out)?;
            done += 1;
        }
        if done > 0 {
            self.table.store_req_cons(self.req_cons)?;
            self.counters.taken += done as u64;
        }
        Ok(done)
    }

    /// Checks a request whose entry was copied, and hands it out, holds it or puts it on the list of refusals.
    fn start(&mut self, slot: u16, seq: u32, entry: &Entry, out: &mut Vec<Taken>) -> Result<(), StopReason> {
        let decoded = wire::decode(self.abi, entry);
        let local = &mut self.slots[usize::from(slot)];
        let operation = decoded.message.response_operation();
        *local = Local { phase: Phase::Waiting, operation, seq, id: decoded.id, ..EMPTY };
        match crate::blkif::request::check(self.abi, entry, &decoded, &self.limits) {
            Ok(Checked::Direct(body)) if body.operation == Operation::Barrier => {
                local.body = body;
                self.barrier = Some(slot);
            }
            Ok(Checked::Direct(body)) => out.push(Taken::Run(self.run(slot, body))),
            Ok(Checked::Indirect(indirect)) => self.start_indirect(slot, seq, indirect, out)?,
            Err(reason) => self.refused.push((slot, reason)),
        }
        Ok(())
    }

    /// Asks for the segments of an indirect request, unless a dead process had them already.
    fn start_indirect(
        &mut self,
        slot: u16,
        seq: u32,
        indirect: IndirectBody,
        out: &mut Vec<Taken>,
    ) -> Result<(), StopReason> {
        let IndirectBody { operation, sector, segments, grefs } = indirect;
        self.counters.indirect += 1;
        if segments > self.table.identity().segments_max {
            self.refused.push((slot, Reason::SegmentCount));
            return Ok(());
        }
        let local = &mut self.slots[usize::from(slot)];
        local.indirect = true;
        if self.table.kept(slot)? == usize::from(segments) {
            let mut kept = vec![0; usize::from(segments) * SEGMENT_BYTES]; // only after a restart
            self.table.copy_segments(slot, 0, &mut kept)?;
            match crate::blkif::request::check_segments(operation, sector, &kept, &self.limits) {
                Ok(body) => out.push(Taken::Run(self.run(slot, body))),
                Err(reason) => self.refused.push((slot, reason)),
            }
            return Ok(());
        }
        local.phase = Phase::Fetching;
        local.body = Body { operation, sector, sectors: 0, segments };
        let len = usize::from(segments) * SEGMENT_BYTES;
        out.push(Taken::Fetch(Fetch::new(Token { slot, seq }, len, grefs)));
        Ok(())
    }

    #[inline]
    fn run(&mut self, slot: u16, body: Body) -> Request {
        let local = &mut self.slots[usize::from(slot)];
        local.phase = Phase::Running;
        local.body = body;
        Request { token: Token { slot, seq: local.seq }, body }
    }

    /// Goes on with what a dead process has left in a slot: publishes a known result, or starts the request as if it had just come.
    fn begin_again(&mut self, slot: u16, out: &mut Vec<Taken>) -> Result<(), StopReason> {
        let mut entry: Entry = [0; REQUEST_BYTES_MAX];
        self.table.copy_request(slot, 0, &mut entry)?;
        let (state, seq) = self.table.state(slot)?;
        match state {
            State::Done => {
                let decoded = wire::decode(self.abi, &entry);
                let operation = decoded.message.response_operation();
                self.slots[usize::from(slot)] = Local { operation, seq, id: decoded.id, ..EMPTY };
                let status = self.table.status(slot)?;
                self.counters.published_again += 1;
                self.respond(slot, status)
            }
            State::InFlight => {
                self.counters.begun_again += 1;
                self.start(slot, seq, &entry, out)
            }
            State::Free | State::Responded => Err(StopReason::Broken { what: "a slot to replay is empty" }),
        }
    }

    fn answer_refused(&mut self) -> Result<(), StopReason> {
        while let Some((slot, reason)) = self.refused.pop() {
            self.count_refused(reason);
            self.respond(slot, reason.status().to_wire())?;
        }
        Ok(())
    }

    /// Writes a response over an entry whose request has been taken: `rsp_next` is behind `req_cons`.
    #[inline]
    fn respond(&mut self, slot: u16, status: i16) -> Result<(), StopReason> {
        let local = &mut self.slots[usize::from(slot)];
        local.phase = Phase::Answered;
        let response = Response { id: local.id, operation: local.operation, status }.encode();
        self.table.respond(slot, status, self.rsp_next)?;
        let at = entry_at(self.abi, self.entries, self.rsp_next);
        self.ring.copy_in(at, &response[..self.abi.response_bytes()])?;
        self.rsp_next = self.rsp_next.wrapping_add(1);
        self.unpublished.push(slot);
        self.in_flight -= 1;
        if self.barrier == Some(slot) {
            self.barrier = None;
        }
        Ok(())
    }

    fn publish(&mut self) -> Result<bool, StopReason> {
        let (old, new) = (self.rsp_published, self.rsp_next);
        self.table.store_intent(new)?;
        self.ring.store(RSP_PROD, new)?;
        // The frontend stores rsp_event and then loads rsp_prod; we do it the other way round. With a full fence on both sides at
        // least one of us sees the other's store.
        fence(Ordering::SeqCst);
        let rsp_event = self.ring.load(RSP_EVENT)?;
        self.rsp_published = new;
        self.table.store_published(new)?;
        self.counters.responses += self.unpublished.len() as u64;
        for slot in self.unpublished.drain(..) {
            self.table.release(slot)?;
            self.slots[usize::from(slot)].phase = Phase::Free;
            self.free.push(slot);
        }
        let notify = new.wrapping_sub(rsp_event) < new.wrapping_sub(old);
        self.counters.notifies += u64::from(notify);
        self.counters.notifies_saved += u64::from(!notify);
        Ok(notify)
    }

    fn look_again(&mut self, batch: u32) -> Result<bool, StopReason> {
        self.ring.store(REQ_EVENT, self.req_cons.wrapping_add(batch))?;
        fence(Ordering::SeqCst); // as in `publish`, for req_event and req_prod
        Ok(self.producer()? != self.req_cons)
    }

    fn copy_segments(&self, slot: u16, local: &Local, out: &mut Vec<Segment>) -> Result<(), StopReason> {
        let count = usize::from(local.body.segments);
        out.reserve(count);
        if !local.indirect {
            let mut bytes = [0; SEGMENTS_MAX * SEGMENT_BYTES];
            let bytes = &mut bytes[..count.min(SEGMENTS_MAX) * SEGMENT_BYTES];
            self.table.copy_request(slot, self.abi.segments_at(), bytes)?;
            return append_segments(bytes, out);
        }
        let mut bytes = [0; SEGMENTS_PER_COPY * SEGMENT_BYTES];
        for first in (0..count).step_by(SEGMENTS_PER_COPY) {
            let part = &mut bytes[..(count - first).min(SEGMENTS_PER_COPY) * SEGMENT_BYTES];
            self.table.copy_segments(slot, first, part)?;
            append_segments(part, out)?;
        }
        Ok(())
    }
}

/// Indirect segments that are copied from the table at a time.
const SEGMENTS_PER_COPY: usize = 64;

/// Appends segments that were checked when the request was taken; they are checked again, since the table is a file.
#[inline]
fn append_segments(bytes: &[u8], out: &mut Vec<Segment>) -> Result<(), StopReason> {
    let (segments, _) = bytes.as_chunks::<SEGMENT_BYTES>();
    for &wire in segments {
        let wire = WireSegment::decode(wire);
        let damaged =
            TableError::Damaged { what: "the gref of a segment that is not in its page", found: wire.gref };
        out.push(Segment::check(wire).ok_or(damaged)?);
    }
    Ok(())
}

/// The memory holds a ring of `pages` pages.
fn check_size(ring: &impl RingMemory, pages: u32) -> Result<(), StopReason> {
    let found = TableError::Damaged { what: "the number of pages of the ring", found: pages };
    entries(pages).ok_or(found)?;
    let (len, region_len) = (pages as usize * wire::PAGE_BYTES, ring.len());
    if region_len < len {
        return Err(MemoryError::OutOfBounds { offset: 0, len, region_len }.into());
    }
    Ok(())
}

/// A ring goes to another shard as a whole.
const _: fn() = || {
    fn is_send<T: Send>() {}
    is_send::<Ring>();
};
const _: () = assert!(ENTRIES_AT + 512 * REQUEST_BYTES_MAX <= 16 * wire::PAGE_BYTES);
const _: () = assert!(SEGMENTS_PER_PAGE * SEGMENT_BYTES == wire::PAGE_BYTES);
