//! The table of requests in flight: what a successor of this process needs to answer each request of a ring exactly once.
//!
//! It lies in memory that outlives the process and not the host (a mapped file; its name, its creation and its size, [`table_bytes`], are the
//! caller's). The engine of [`super::ring`] keeps its private copies of requests here and nowhere else. `rsp_prod` alone does not tell
//! a successor what was answered: responses come in any order and overwrite the entries of requests.
//!
//! # Format, version 1
//! Host byte order; written and read on one host by programs of one architecture. Words of four bytes unless said otherwise.
//!
//! | at | is |
//! |---|---|
//! | 0 | magic, [`MAGIC`]; stored last, 0 while the table is being made |
//! | 4 | version |
//! | 8, 12, 16 | domain, device, queue |
//! | 20 | layout: 0 x86_64, 1 x86_32 |
//! | 24 | pages of the ring |
//! | 28 | the frontend's event channel port |
//! | 32 | room for indirect segments per slot |
//! | 64 | 16 grefs of the ring's pages |
//! | 128 | `req_cons`: requests before it were taken |
//! | 132 | `published`: a value of `rsp_prod` that we have stored |
//! | 136 | `intent`: the value of `rsp_prod` that we are about to store |
//! | 4096 | slots of [`SLOT_BYTES`], as many as the ring has entries |
//! | page behind | segments of indirect requests, 8 bytes each, in the same order |
//!
//! | slot | is |
//! |---|---|
//! | 0 | state, [`State`] |
//! | 4 | seq: the ring index of the request |
//! | 8 | rsp_idx: the ring index of its response, in state R |
//! | 12 | status, in states R and D |
//! | 16 | attempts: how often a successor began it again |
//! | 20 | number of indirect segments kept; 0: they have to be fetched |
//! | 32 | the request as it was copied from the ring, up to 112 bytes, of which those that mean something are kept |
//!
//! # Order of stores
//! ```text
//! consume batch: for each: slot body (state F inside) ; state=I        then req_cons        before any request of the batch runs
//! fetched      : segments ; their number
//! answer       : status ; rsp_idx=p ; state=R ; ring[p]=response
//! push batch   : intent=new ; rsp_prod=new ; published=new ; state=F of each
//! recover      : req_cons first ; bounds ; R with rsp_idx<rsp_prod -> F ; other R -> D before any new response ; attempts of each I
//! ```
//! Each line's order matters; a test stops the real code after every single store. A process that dies keeps the order of its stores in
//! shared memory (the kernel's exit path synchronises), so Release stores and foreign calls, which the compiler cannot reorder, are enough. This
//! is no log against power failure.

use super::wire::{Abi, ENTRIES_MAX, Entry, INDIRECT_SEGMENTS_MAX, PAGE_BYTES, SEGMENT_BYTES, entries};
use crate::memory::{MemoryError, RingMemory};

/// First word of a table: `BTIF`.
pub const MAGIC: u32 = u32::from_le_bytes(*b"BTIF");
/// Version of the format above.
pub const VERSION: u32 = 1;
/// Bytes of a slot: three cache lines, of which a request of one segment uses one.
pub const SLOT_BYTES: usize = 192;

const SLOTS_AT: usize = PAGE_BYTES;
const GREFS_AT: usize = 64;
const REQ_CONS: usize = 128;
const PUBLISHED: usize = 132;
const INTENT: usize = 136;

const STATE: usize = 0;
const SEQ: usize = 4;
const RSP_IDX: usize = 8;
const STATUS: usize = 12;
const ATTEMPTS: usize = 16;
const SEGMENTS: usize = 20;
const REQUEST: usize = 32;
/// Bytes of a slot's words and its request.
const BODY_BYTES: usize = REQUEST + size_of::<Entry>();

/// Bytes of a table for a ring of `entries` entries (at most [`ENTRIES_MAX`] count) with room for `segments_max` indirect segments per request (at most
/// [`INDIRECT_SEGMENTS_MAX`] count).
pub const fn table_bytes(entries: u32, segments_max: u16) -> usize {
    let entries = if entries < ENTRIES_MAX { entries } else { ENTRIES_MAX } as usize;
    segments_at(entries) + (entries * room(segments_max) * SEGMENT_BYTES).next_multiple_of(PAGE_BYTES)
}

const fn segments_at(entries: usize) -> usize {
    SLOTS_AT + (entries * SLOT_BYTES).next_multiple_of(PAGE_BYTES)
}

const fn room(segments_max: u16) -> usize {
    if segments_max < INDIRECT_SEGMENTS_MAX { segments_max as usize } else { INDIRECT_SEGMENTS_MAX as usize }
}

/// Whose ring a table belongs to: enough to find and map the ring again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    /// The frontend's domain.
    pub domid: u16,
    /// The device's number in XenStore.
    pub devid: u32,
    /// The queue, from 0.
    pub queue: u32,
    /// Layout of the ring.
    pub abi: Abi,
    /// Pages of the ring: a power of two up to 16.
    pub pages: u32,
    /// The granted pages of the ring; those behind `pages` are 0.
    pub grefs: [u32; 16],
    /// The frontend's event channel port.
    pub port: u32,
    /// Room for indirect segments per request.
    pub segments_max: u16,
}

/// Why a table cannot be used.
#[derive(Debug, thiserror::Error, Clone, Copy, PartialEq, Eq)]
pub enum TableError {
    /// The memory is shorter than its header says, or than the ring needs.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// It is no table, or one whose making was not finished: the ring had not been served yet.
    #[error("no table of requests in flight: it begins with {found:#010x}, {MAGIC:#010x} is expected")]
    Magic {
        /// What it begins with.
        found: u32,
    },
    /// Made by another version of the program.
    #[error("the table of requests in flight has version {found}, this program knows version {VERSION}")]
    Version {
        /// Its version.
        found: u32,
    },
    /// A number of the header or of a slot that cannot be.
    #[error("the table of requests in flight is damaged: {what} is {found}")]
    Damaged {
        /// Which.
        what: &'static str,
        /// Its value.
        found: u32,
    },
    /// The frontend changed an index that is ours: what it was told cannot be known any more.
    #[error("the ring's rsp_prod is {found}, {published} or {intent} is expected: the frontend wrote to it")]
    ResponseIndex {
        /// What the ring says.
        found: u32,
        /// The last value that was surely stored.
        published: u32,
        /// The value that was going to be stored.
        intent: u32,
    },
}

/// How far the request of a slot has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum State {
    /// Nothing here.
    Free = 0,
    /// Taken, not answered: I.
    InFlight = 1,
    /// Answered at rsp_idx, perhaps published: R.
    Responded = 2,
    /// The result is known, its response is not in the ring: D.
    Done = 3,
}

impl State {
    fn from_word(word: u32) -> Result<State, TableError> {
        match word {
            0 => Ok(State::Free),
            1 => Ok(State::InFlight),
            2 => Ok(State::Responded),
            3 => Ok(State::Done),
            found => Err(TableError::Damaged { what: "the state of a slot", found }),
        }
    }
}

/// A table of requests in flight.
#[derive(Debug)]
pub struct Table<T> {
    memory: T,
    identity: Identity,
    entries: u32,
}

impl<T: RingMemory> Table<T> {
    /// Makes an empty table for a ring whose `rsp_prod` is `index`. What the memory held is lost.
    ///
    /// # Errors
    /// [`TableError::Damaged`] for a number of pages that no ring has; [`TableError::Memory`] when the memory has less than
    /// [`table_bytes`].
    pub fn create(memory: T, identity: Identity, index: u32) -> Result<Table<T>, TableError> {
        let table = Table::over(memory, identity)?;
        let Identity { domid, devid, queue, abi, pages, grefs, port, segments_max } = identity;
        let words = [
            (0, 0),
            (4, VERSION),
            (8, u32::from(domid)),
            (12, devid),
            (16, queue),
            (20, abi_word(abi)),
            (24, pages),
            (28, port),
            (32, u32::from(segments_max)),
            (REQ_CONS, index),
            (PUBLISHED, index),
            (INTENT, index),
        ];
        let grefs = grefs.iter().enumerate().map(|(i, &gref)| (GREFS_AT + 4 * i, gref));
        let slots = (0..table.entries).map(|slot| (SLOTS_AT + slot as usize * SLOT_BYTES + STATE, 0));
        for (at, value) in words.into_iter().chain(grefs).chain(slots) {
            table.memory.store(at, value)?;
        }
        table.memory.store(0, MAGIC)?;
        Ok(table)
    }

    /// Opens a table that a process has left behind.
    ///
    /// # Errors
    /// Any of [`TableError`] but `ResponseIndex`.
    pub fn open(memory: T) -> Result<Table<T>, TableError> {
        let word = |at| memory.load(at);
        let found = word(0)?;
        if found != MAGIC {
            return Err(TableError::Magic { found });
        }
        let found = word(4)?;
        if found != VERSION {
            return Err(TableError::Version { found });
        }
        let short = |what, found: u32| u16::try_from(found).map_err(|_| TableError::Damaged { what, found });
        let mut grefs = [0; 16];
        for (i, gref) in grefs.iter_mut().enumerate() {
            *gref = word(GREFS_AT + 4 * i)?;
        }
        let identity = Identity {
            domid: short("the domain", word(8)?)?,
            devid: word(12)?,
            queue: word(16)?,
            abi: match word(20)? {
                0 => Abi::X86_64,
                1 => Abi::X86_32,
                found => return Err(TableError::Damaged { what: "the layout", found }),
            },
            pages: word(24)?,
            grefs,
            port: word(28)?,
            segments_max: short("the room for segments", word(32)?)?,
        };
        Table::over(memory, identity)
    }

    fn over(memory: T, identity: Identity) -> Result<Table<T>, TableError> {
        let entries = entries(identity.pages)
            .ok_or(TableError::Damaged { what: "the number of pages of the ring", found: identity.pages })?;
        if identity.segments_max > INDIRECT_SEGMENTS_MAX {
            let found = u32::from(identity.segments_max);
            return Err(TableError::Damaged { what: "the room for segments", found });
        }
        let (len, region_len) = (table_bytes(entries, identity.segments_max), memory.len());
        if region_len < len {
            return Err(MemoryError::OutOfBounds { offset: 0, len, region_len }.into());
        }
        Ok(Table { memory, identity, entries })
    }

    /// Whose it is.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// Number of slots, and of entries of the ring.
    pub fn entries(&self) -> u32 {
        self.entries
    }

    /// Gives the memory back.
    pub fn into_memory(self) -> T {
        self.memory
    }

    #[inline]
    fn slot_at(&self, slot: u16) -> usize {
        SLOTS_AT + usize::from(slot) * SLOT_BYTES
    }

    fn kept_at(&self, slot: u16) -> usize {
        let room = room(self.identity.segments_max) * SEGMENT_BYTES;
        segments_at(self.entries as usize) + usize::from(slot) * room
    }

    /// Takes a request into a free slot: the first `used` bytes of `entry` (at most all), and state I.
    #[inline]
    pub(super) fn take(&self, slot: u16, seq: u32, entry: &Entry, used: usize) -> Result<(), MemoryError> {
        let at = self.slot_at(slot);
        let mut body = [0; BODY_BYTES];
        body[SEQ..SEQ + 4].copy_from_slice(&seq.to_ne_bytes());
        body[REQUEST..].copy_from_slice(entry);
        self.memory.copy_in(at, &body[..BODY_BYTES.min(REQUEST + used)])?;
        self.memory.store(at + STATE, State::InFlight as u32)
    }

    /// Requests before `index` were taken.
    #[inline]
    pub(super) fn store_req_cons(&self, index: u32) -> Result<(), MemoryError> {
        self.memory.store(REQ_CONS, index)
    }

    /// Keeps the fetched segments of an indirect request.
    pub(super) fn keep_segments(&self, slot: u16, segments: &[u8]) -> Result<(), MemoryError> {
        self.memory.copy_in(self.kept_at(slot), segments)?;
        self.memory.store(self.slot_at(slot) + SEGMENTS, (segments.len() / SEGMENT_BYTES) as u32)
    }

    /// Number of indirect segments kept.
    pub(super) fn kept(&self, slot: u16) -> Result<usize, TableError> {
        let found = self.memory.load(self.slot_at(slot) + SEGMENTS)?;
        let kept = found as usize;
        if kept > room(self.identity.segments_max) {
            return Err(TableError::Damaged { what: "the number of segments of a slot", found });
        }
        Ok(kept)
    }

    /// Copies indirect segments that are kept, from segment `first` on.
    pub(super) fn copy_segments(&self, slot: u16, first: usize, dst: &mut [u8]) -> Result<(), MemoryError> {
        self.memory.copy_out(self.kept_at(slot) + first * SEGMENT_BYTES, dst)
    }

    /// Copies a part of a slot's request.
    #[inline]
    pub(super) fn copy_request(&self, slot: u16, from: usize, dst: &mut [u8]) -> Result<(), MemoryError> {
        self.memory.copy_out(self.slot_at(slot) + REQUEST + from, dst)
    }

    /// The slot's request ended with `status` and is answered at ring index `rsp_idx`. The response is written to the ring after this.
    #[inline]
    pub(super) fn respond(&self, slot: u16, status: i16, rsp_idx: u32) -> Result<(), MemoryError> {
        let at = self.slot_at(slot);
        self.memory.store(at + STATUS, status as u16 as u32)?;
        self.memory.store(at + RSP_IDX, rsp_idx)?;
        self.memory.store(at + STATE, State::Responded as u32)
    }

    /// State and ring index of a slot.
    pub(super) fn state(&self, slot: u16) -> Result<(State, u32), TableError> {
        let at = self.slot_at(slot);
        Ok((State::from_word(self.memory.load(at + STATE)?)?, self.memory.load(at + SEQ)?))
    }

    /// The status of a slot in state R or D.
    pub(super) fn status(&self, slot: u16) -> Result<i16, MemoryError> {
        Ok(self.memory.load(self.slot_at(slot) + STATUS)? as u16 as i16)
    }

    /// `rsp_prod` is about to be stored.
    #[inline]
    pub(super) fn store_intent(&self, index: u32) -> Result<(), MemoryError> {
        self.memory.store(INTENT, index)
    }

    /// `rsp_prod` was stored.
    #[inline]
    pub(super) fn store_published(&self, index: u32) -> Result<(), MemoryError> {
        self.memory.store(PUBLISHED, index)
    }

    /// The slot's response was published.
    #[inline]
    pub(super) fn release(&self, slot: u16) -> Result<(), MemoryError> {
        self.memory.store(self.slot_at(slot) + STATE, State::Free as u32)
    }

    /// Reads what a plan is made from: to look at a ring before it is recovered, or without.
    ///
    /// # Errors
    /// [`TableError::Damaged`] for a state that is none.
    pub fn snapshot(&self) -> Result<Snapshot, TableError> {
        let mut slots = Vec::with_capacity(self.entries as usize);
        for slot in 0..self.entries as u16 {
            let word = |field| self.memory.load(self.slot_at(slot) + field);
            slots.push(SlotView {
                state: State::from_word(word(STATE)?)?,
                seq: word(SEQ)?,
                rsp_idx: word(RSP_IDX)?,
                attempts: word(ATTEMPTS)?,
            });
        }
        Ok(Snapshot {
            req_cons: self.memory.load(REQ_CONS)?,
            published: self.memory.load(PUBLISHED)?,
            intent: self.memory.load(INTENT)?,
            slots,
        })
    }

    /// Carries a plan out. It may stop after any store and be planned and carried out again.
    pub(super) fn execute(&self, plan: &Plan) -> Result<(), MemoryError> {
        self.store_req_cons(plan.req_cons)?;
        self.store_intent(plan.rsp_prod)?;
        self.store_published(plan.rsp_prod)?;
        for &slot in &plan.published {
            self.release(slot)?;
        }
        for &slot in &plan.done {
            self.memory.store(self.slot_at(slot) + STATE, State::Done as u32)?;
        }
        for again in &plan.again {
            self.memory.store(self.slot_at(again.slot) + ATTEMPTS, again.attempts)?;
        }
        Ok(())
    }
}

const fn abi_word(abi: Abi) -> u32 {
    match abi {
        Abi::X86_64 => 0,
        Abi::X86_32 => 1,
    }
}

/// The part of a slot that recovery decides by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SlotView {
    /// State.
    pub state: State,
    /// Ring index of the request.
    pub seq: u32,
    /// Ring index of the response, in state R.
    pub rsp_idx: u32,
    /// How often it was begun again.
    pub attempts: u32,
}

/// What a dead process has left of a ring.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// Requests before it were taken; those of the last batch may have been as well.
    pub req_cons: u32,
    /// A value of `rsp_prod` that was stored.
    pub published: u32,
    /// The value that was last going to be stored.
    pub intent: u32,
    /// All slots.
    pub slots: Vec<SlotView>,
}

/// A request to begin again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Again {
    /// Its slot.
    pub slot: u16,
    /// Its ring index.
    pub seq: u32,
    /// How often it will have been begun again, this time included.
    pub attempts: u32,
}

/// What recovery does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// Requests before it were taken.
    pub req_cons: u32,
    /// The frontend was told of the responses before it.
    pub rsp_prod: u32,
    /// Slots whose response the frontend has been told of: R to F.
    pub published: Vec<u16>,
    /// Slots whose result is known and has to be published: R to D, and D, in the order of their requests.
    pub done: Vec<u16>,
    /// Requests to begin again, in the order of the ring.
    pub again: Vec<Again>,
    /// Slots with nothing in them, those of `published` not among them.
    pub free: Vec<u16>,
}

impl Plan {
    /// Decides what has to be done for a ring whose `rsp_prod` reads `rsp_prod`.
    ///
    /// # Errors
    /// [`TableError::ResponseIndex`] when the frontend wrote to `rsp_prod`; [`TableError::Damaged`] when the slots do not fit the indices:
    /// each request that was taken and not answered has exactly one slot.
    pub fn new(snapshot: &Snapshot, rsp_prod: u32) -> Result<Plan, TableError> {
        let &Snapshot { req_cons, published, intent, ref slots } = snapshot;
        if rsp_prod != published && rsp_prod != intent {
            return Err(TableError::ResponseIndex { found: rsp_prod, published, intent });
        }
        let mut plan = Plan {
            req_cons,
            rsp_prod,
            published: Vec::new(),
            done: Vec::new(),
            again: Vec::new(),
            free: Vec::new(),
        };
        let mut taken = req_cons.wrapping_sub(rsp_prod) as i32;
        if taken < 0 {
            return Err(TableError::Damaged { what: "the index of requests taken", found: req_cons });
        }
        for (slot, view) in (0u16..).zip(slots) {
            // Distances from rsp_prod; all honest ones are small, so their sign is the order.
            let after_seq = view.seq.wrapping_add(1).wrapping_sub(rsp_prod) as i32;
            match view.state {
                State::Free => plan.free.push(slot),
                State::Responded if (view.rsp_idx.wrapping_sub(rsp_prod) as i32) < 0 => {
                    plan.published.push(slot);
                    taken = taken.max(after_seq);
                }
                State::Responded | State::Done => {
                    plan.done.push(slot);
                    taken = taken.max(after_seq);
                }
                State::InFlight => {
                    let attempts = view.attempts.saturating_add(1);
                    plan.again.push(Again { slot, seq: view.seq, attempts });
                    taken = taken.max(after_seq);
                }
            }
        }
        let unanswered = plan.done.len() + plan.again.len();
        if usize::try_from(taken) != Ok(unanswered) {
            let what = "the number of requests taken and not answered, which disagrees with the slots,";
            return Err(TableError::Damaged { what, found: taken as u32 });
        }
        plan.req_cons = rsp_prod.wrapping_add(taken as u32);
        let order = |seq: u32| seq.wrapping_sub(plan.req_cons) as i32;
        plan.again.sort_unstable_by_key(|again| order(again.seq));
        plan.done.sort_unstable_by_key(|&slot| order(slots[usize::from(slot)].seq));
        if plan.again.windows(2).any(|pair| pair[0].seq == pair[1].seq) {
            return Err(TableError::Damaged { what: "the index of two requests", found: plan.req_cons });
        }
        Ok(plan)
    }

    /// Requests that were begun again at least `attempts` times, this time included: perhaps what kills the process.
    pub fn poisoned(&self, attempts: u32) -> usize {
        self.again.iter().filter(|again| again.attempts >= attempts).count()
    }
}

#[cfg(test)]
mod tests {
    use State::{Done, Free, InFlight, Responded};

    use super::*;

    fn view(state: State, seq: u32, rsp_idx: u32) -> SlotView {
        SlotView { state, seq, rsp_idx, attempts: 0 }
    }

    // Goal: the plan of each state, across the wrap of the indices.
    // Method: a table written by hand at bases around zero; the expected plan written by hand.
    #[test]
    fn a_plan_by_hand() {
        for base in [0u32, 5, u32::MAX, u32::MAX - 2, u32::MAX - 4, 1 << 31] {
            let at = |offset: u32| base.wrapping_add(offset);
            // Published 3 of 7 taken; the header missed the last two of the batch.
            let snapshot = Snapshot {
                req_cons: at(5),
                published: at(1),
                intent: at(3),
                slots: vec![
                    view(InFlight, at(6), 0),
                    view(Responded, at(1), at(2)),
                    view(Responded, at(3), at(3)),
                    view(Done, at(4), at(77)),
                    view(Free, at(0), at(0)),
                    SlotView { attempts: 2, ..view(InFlight, at(5), 0) },
                ],
            };
            let plan = Plan::new(&snapshot, at(3)).expect("a good table");
            assert_eq!(plan.req_cons, at(7));
            assert_eq!((plan.published.as_slice(), plan.done.as_slice()), (&[1u16][..], &[2u16, 3][..]));
            let again = |slot, offset, attempts| Again { slot, seq: at(offset), attempts };
            assert_eq!(plan.again, [again(5, 5, 3), again(0, 6, 1)]);
            assert_eq!(plan.free, [4]);
            assert_eq!((plan.poisoned(3), plan.poisoned(1), plan.poisoned(4)), (1, 2, 0));
        }
    }

    // Goal: what the frontend or rubbish did to the numbers is found, whatever they are.
    // Method: rsp_prod that is neither; slots that are too few, too many, twice.
    #[test]
    fn damage_is_found() {
        let good = Snapshot {
            req_cons: 2,
            published: 0,
            intent: 1,
            slots: vec![view(InFlight, 0, 0), view(InFlight, 1, 0), view(Free, 9, 9)],
        };
        assert!(Plan::new(&good, 0).is_ok());
        for found in [2, 3, u32::MAX, 1 << 31] {
            let error = TableError::ResponseIndex { found, published: 0, intent: 1 };
            assert_eq!(Plan::new(&good, found), Err(error));
        }
        let damaged = |change: fn(&mut Snapshot)| {
            let mut snapshot = good.clone();
            change(&mut snapshot);
            matches!(Plan::new(&snapshot, 0), Err(TableError::Damaged { .. }))
        };
        assert!(damaged(|s| s.slots[1].state = Free));
        assert!(damaged(|s| s.slots[2].state = Done));
        assert!(damaged(|s| s.slots[1].seq = 0));
        assert!(damaged(|s| s.slots[1].seq = 1 << 20));
        assert!(damaged(|s| s.req_cons = u32::MAX));
        assert!(damaged(|s| s.req_cons = 1 << 31));
    }

    // Goal: sizes are whole pages and what a host of many disks can afford. Method: the numbers.
    #[test]
    fn sizes() {
        assert_eq!(table_bytes(32, 0), 4096 + 8192);
        assert_eq!(table_bytes(32, 256), 4096 + 8192 + 65536);
        assert_eq!(table_bytes(512, 4096), 4096 + 98304 + 512 * 32768);
        assert_eq!(table_bytes(u32::MAX, u16::MAX), table_bytes(512, 4096));
        const { assert!(BODY_BYTES <= SLOT_BYTES) };
    }
}
