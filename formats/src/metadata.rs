//! Tables of an image in memory, and the one place that decides when a change of them reaches the file.
//!
//! A table is a stretch of a file; [`Tables`] keeps *slices* of it (4 KiB by default), never whole tables. All drivers change their
//! metadata through it, so that the promise of [`crate::driver`] is kept in one place:
//!
//! ```text
//! set(bytes, Anytime | AfterData) ─▶ log (if there is one) ─▶ slice in memory is dirty, map sees it ─▶ settled with a log
//!                                              │
//!                       write_back: [flush of the data files, if a dirty slice has an AfterData change]
//!                                   ─▶ dirty slices are written ─▶ log entries are released ─▶ settled without a log
//! ```
//! - *Settled* means safe against the death of the process: the log has the change, or the file has it. Not against power loss.
//! - What one [`Tables::set`] changes is in the log as a whole or not at all: an entry of two words is never half of each.
//! - With a log *every* change is in it before it is in memory, and so before it can be in the file: a log with gaps could not
//!   tell a value that came after it from one that somebody else wrote. A log without room makes [`Tables::set`] say no, and
//!   [`Tables::prepare`], which must follow, make room. A log has room for all words of a slice, and one more.
//! - A slice with an `AfterData` change is written only behind a flush of the data that began after that change was made; since a
//!   slice is written as a whole, its other changes wait along.
//! - Write-backs are rounds: one runs at a time, who comes meanwhile joins the next one. A round whose future is dropped ends;
//!   the next in the queue begins another.
//! - A dirty slice is never evicted; a failed write leaves it dirty and fails those who waited for the round.
//! - A slice that was written is *in doubt* until a flush of its file that began later has succeeded: a flush that fails may have lost
//!   it, and [`Tables::write_again`] writes it from memory. So it is not evicted before; where that is much, a round flushes.
//! - Writes of a round that was dropped go on in the kernel; the next round begins when they have ended, since two writes of one
//!   place are not ordered.
//!
//! Tables may lie in several files ([`Tables::over`]): then an offset is an [`address`], and one round, one log and one order serve them
//! all.
//!
//! Memory: [`Budget`] is shared by all tables of a shard, and by the units that were decoded ([`crate::codec::Decoded`]). Who needs
//! room takes it from the largest holder: of tables clean slices only, by the clock algorithm. No table is driven below
//! [`SLICES_MIN`] slices, and nobody may hold over half of the budget.

use std::cell::{Cell, RefCell, RefMut};
use std::collections::{HashMap, VecDeque};
use std::rc::{Rc, Weak};

use crate::allocation_log::{AllocationLog, LogEntry, WORD};
use crate::driver::{FileIndex, Usage};
use crate::error::Error;
use crate::file::{Buf, Flushes, ImageFile, Pending};

/// Bytes of a slice unless a driver asks for another size.
pub const SLICE_BYTES: usize = 4096;
/// Slices that every table may keep.
pub const SLICES_MIN: usize = 4;
/// Slices that are read at the same time, at most.
const LOADS: usize = 32;
/// Slices that one round writes at the same time.
const WRITES_MAX: usize = 32;

/// Bits of an address that are an offset in a file.
const OFFSET_BITS: u32 = 48;

/// The address of a byte of a file, for [`Tables::over`]: the number of the file among those given there, and the offset, below 2^48.
pub fn address(file: usize, offset: u64) -> u64 {
    debug_assert!(offset < 1 << OFFSET_BITS);
    (file as u64) << OFFSET_BITS | offset
}

/// When a change may reach the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Order {
    /// At any time: what it makes visible reads as what was there before, until the payload is durable (zeroes under it).
    Anytime,
    /// Only when the payload that was written before the change is durable: it hides other bytes.
    AfterData,
}

/// Who holds memory of a [`Budget`] that others may need more.
pub(crate) trait Holder {
    /// Bytes that it holds.
    fn held_bytes(&self) -> usize;

    /// It could give some of them up.
    fn may_evict(&self) -> bool;

    /// Gives some of them up. False when there are none to give.
    fn evict(&self) -> bool;
}

/// Memory for tables, shared by all tables of a shard (or of an offline tool).
pub struct Budget {
    limit_bytes: usize,
    used_bytes: Cell<usize>,
    holders: RefCell<Vec<Weak<dyn Holder>>>,
}

impl std::fmt::Debug for Budget {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Budget({} of {} bytes)", self.used_bytes.get(), self.limit_bytes)
    }
}

impl Budget {
    /// `limit_bytes` for all; what every table may keep anyway comes on top.
    pub fn new(limit_bytes: usize) -> Rc<Budget> {
        Rc::new(Budget { limit_bytes, used_bytes: Cell::new(0), holders: RefCell::default() })
    }

    /// Bytes in use.
    pub fn used_bytes(&self) -> usize {
        self.used_bytes.get()
    }

    /// What all may hold together.
    pub(crate) fn limit_bytes(&self) -> usize {
        self.limit_bytes
    }

    /// Somebody will hold memory of it.
    pub(crate) fn join(&self, holder: &Rc<dyn Holder>) {
        self.holders.borrow_mut().push(Rc::downgrade(holder));
    }

    /// A holder is being dropped.
    pub(crate) fn leave(&self) {
        self.holders.borrow_mut().retain(|holder| holder.strong_count() > 0);
    }

    /// A holder has so many bytes more.
    pub(crate) fn take(&self, bytes: usize) {
        self.used_bytes.set(self.used_bytes.get() + bytes);
    }

    /// A holder has so many bytes less.
    pub(crate) fn give_back(&self, bytes: usize) {
        self.used_bytes.set(self.used_bytes.get() - bytes);
    }

    /// Makes room for `need` bytes of `asker`, as far as others can give some up.
    pub(crate) fn make_room(&self, asker: &dyn Holder, need: usize) {
        while asker.held_bytes() + need > self.limit_bytes / 2 && asker.evict() {}
        while self.used_bytes.get() + need > self.limit_bytes {
            let largest = {
                let holders = self.holders.borrow();
                let holders = holders.iter().filter_map(Weak::upgrade);
                holders.filter(|holder| holder.may_evict()).max_by_key(|holder| holder.held_bytes())
            };
            if !largest.is_some_and(|holder| holder.evict()) {
                return;
            }
        }
    }
}

/// A stretch of a table in memory.
#[derive(Debug)]
struct Slice {
    number: u64,
    /// No [`Buf`]: its alignment costs more memory than a small slice has, and is needed only while the slice is written.
    bytes: Box<[u8]>,
    /// Looked at since the clock's hand passed.
    recent: Cell<bool>,
    /// The number of the last change; 0 when the file has them all.
    changed: u64,
    /// The number of the last change that must wait for data; 0 when there is none.
    after_data: u64,
    /// It was written when [`Flushes::now`] was this, and no flush has covered that yet.
    doubt: Option<u64>,
}

impl Slice {
    /// It must stay in memory.
    fn is_pinned(&self) -> bool {
        self.changed > 0 || self.doubt.is_some()
    }
}

#[derive(Debug, Default)]
struct Slices {
    by_number: HashMap<u64, usize, foldhash::fast::FixedState>,
    slab: slab::Slab<Slice>,
    hand: usize,
    dirty: usize,
    /// Slices that are dirty or in doubt.
    pinned: usize,
    /// The sum of the files' [`Flushes::last_good`] when doubts were looked at.
    looked_at: u64,
}

impl Slices {
    /// Changes a slice and keeps count.
    fn alter(&mut self, key: usize, alter: impl FnOnce(&mut Slice)) {
        let slice = &mut self.slab[key];
        let (dirty, pinned) = (slice.changed > 0, slice.is_pinned());
        alter(slice);
        self.dirty = self.dirty + usize::from(slice.changed > 0) - usize::from(dirty);
        self.pinned = self.pinned + usize::from(slice.is_pinned()) - usize::from(pinned);
    }
}

/// Writes that are under way. What is left when the round is dropped is the next one's to wait for.
struct InFlight<'a> {
    stray: &'a RefCell<Vec<Pending<'static, ()>>>,
    writes: VecDeque<Pending<'static, ()>>,
}

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        self.stray.borrow_mut().extend(self.writes.drain(..));
    }
}

/// The tables of one image. See the module for what it promises.
pub struct Tables {
    /// Where they lie.
    files: Vec<(FileIndex, Rc<dyn ImageFile>)>,
    /// Files whose payload the tables point to.
    data: Vec<Rc<dyn ImageFile>>,
    slice_bytes: usize,
    budget: Rc<Budget>,
    log: Option<Rc<dyn AllocationLog>>,
    slices: RefCell<Slices>,
    /// Reads that are under way, by the number of the slice, so that nobody reads one twice or over a change.
    loads: [async_lock::Mutex<()>; LOADS],
    /// The round of writing back that is under way.
    round: async_lock::Mutex<()>,
    /// Number of the last change.
    changes: Cell<u64>,
    /// All changes up to this one are in the file.
    written: Cell<u64>,
    /// Writes of rounds that were dropped.
    stray: RefCell<Vec<Pending<'static, ()>>>,
    hits: Cell<u64>,
    misses: Cell<u64>,
}

impl Tables {
    /// Tables of `file`, which is file `index` of its driver; `data` are the files that hold the payload. `slice_bytes` is a power of
    /// two, at least 512. `log` is for these tables alone.
    pub fn new(
        file: Rc<dyn ImageFile>,
        index: FileIndex,
        data: Vec<Rc<dyn ImageFile>>,
        slice_bytes: usize,
        budget: &Rc<Budget>,
        log: Option<Rc<dyn AllocationLog>>,
    ) -> Rc<Tables> {
        Tables::over(vec![(index, file)], data, slice_bytes, budget, log)
    }

    /// The same of several files, which are known by their [`address`] from then on; of one file an address is an offset.
    pub fn over(
        files: Vec<(FileIndex, Rc<dyn ImageFile>)>,
        data: Vec<Rc<dyn ImageFile>>,
        slice_bytes: usize,
        budget: &Rc<Budget>,
        log: Option<Rc<dyn AllocationLog>>,
    ) -> Rc<Tables> {
        debug_assert!(slice_bytes.is_power_of_two() && slice_bytes >= 512);
        let tables = Rc::new(Tables {
            files,
            data,
            slice_bytes,
            budget: budget.clone(),
            log,
            slices: RefCell::default(),
            loads: [const { async_lock::Mutex::new(()) }; LOADS],
            round: async_lock::Mutex::new(()),
            changes: Cell::new(0),
            written: Cell::new(0),
            stray: RefCell::default(),
            hits: Cell::new(0),
            misses: Cell::new(0),
        });
        budget.join(&(tables.clone() as Rc<dyn Holder>));
        tables
    }

    /// Looks at `len` bytes at `offset`, which must not cross a slice. `None` when they are not in memory.
    pub fn get<T>(&self, offset: u64, len: usize, look: impl FnOnce(&[u8]) -> T) -> Option<T> {
        let (number, at) = self.locate(offset, len);
        let slices = self.slices.borrow();
        let Some(&key) = slices.by_number.get(&number) else {
            self.misses.set(self.misses.get() + 1);
            return None;
        };
        self.hits.set(self.hits.get() + 1);
        let slice = &slices.slab[key];
        slice.recent.set(true);
        Some(look(&slice.bytes[at..at + len]))
    }

    /// The big-endian number of eight bytes at `offset`.
    pub fn get_u64(&self, offset: u64) -> Option<u64> {
        self.get(offset, 8, |bytes| bytes.try_into().map(u64::from_be_bytes).unwrap_or_default())
    }

    /// The big-endian number of four bytes at `offset`.
    pub fn get_u32(&self, offset: u64) -> Option<u32> {
        self.get(offset, 4, |bytes| bytes.try_into().map(u32::from_be_bytes).unwrap_or_default())
    }

    /// Brings the slice around `offset` into memory. It may be gone again when others load much: look, and load again.
    pub fn load(&self, offset: u64) -> Pending<'_, ()> {
        Box::pin(async move {
            let (number, _) = self.locate(offset, 0);
            if self.has(number) {
                return Ok(());
            }
            let _turn = self.loads[number as usize % LOADS].lock().await;
            if self.has(number) {
                return Ok(());
            }
            let (_, file, offset) = self.place_of(number)?;
            let bytes = file.read(offset, self.slice_bytes).await?;
            self.insert(number, Box::from(&bytes[..]));
            Ok(())
        })
    }

    /// Does what [`Tables::set`] of these bytes needs: they are in memory, and the log has room. Either may be gone again when others do
    /// much: set, and prepare again.
    pub async fn prepare(&self, offset: u64, len: usize) -> Result<(), Error> {
        self.load(offset).await?;
        let Some(log) = &self.log else { return Ok(()) };
        // One word more: the bytes may begin within one.
        let words = (len.div_ceil(WORD as usize) + 1).min(log.capacity());
        if log.room() < words { self.write_back().await } else { Ok(()) }
    }

    /// Changes bytes at `offset`, which must not cross a slice. False when they are not in memory, or the log has no room: nothing
    /// was done, [`Tables::prepare`] comes first.
    #[must_use]
    pub fn set(&self, offset: u64, bytes: &[u8], order: Order) -> bool {
        let (number, at) = self.locate(offset, bytes.len());
        let mut slices = self.slices.borrow_mut();
        let Some(&key) = slices.by_number.get(&number) else { return false };
        let slice = &slices.slab[key];
        if slice.bytes[at..at + bytes.len()] == *bytes {
            return true;
        }
        if !self.note(number, &slice.bytes, at, bytes) {
            return false;
        }
        let change = self.changes.get() + 1;
        self.changes.set(change);
        slices.alter(key, |slice| {
            slice.bytes[at..at + bytes.len()].copy_from_slice(bytes);
            slice.changed = change;
            if order == Order::AfterData {
                slice.after_data = change;
            }
        });
        true
    }

    /// Loads what is not in memory and changes it.
    pub async fn update(&self, offset: u64, bytes: &[u8], order: Order) -> Result<(), Error> {
        let mut done = 0;
        while done < bytes.len() {
            let at = offset + done as u64;
            let room = self.slice_bytes - (at as usize & (self.slice_bytes - 1));
            let part = &bytes[done..bytes.len().min(done + room)];
            while !self.set(at, part, order) {
                self.prepare(at, part.len()).await?;
            }
            done += part.len();
        }
        Ok(())
    }

    /// Notes in the log that `new` will be at `at` of a slice: the words that change. False, and nothing was noted, when it has no
    /// room. True without a log.
    fn note(&self, number: u64, slice: &[u8], at: usize, new: &[u8]) -> bool {
        let Some(log) = &self.log else { return true };
        const BYTES: usize = WORD as usize;
        let first = at / BYTES * BYTES;
        let stop = (at + new.len()).next_multiple_of(BYTES);
        let words = (stop - first) / BYTES;
        assert!(
            words <= log.capacity(),
            "a change of {words} words, and the log has {} at most",
            log.capacity()
        );
        if log.room() < words {
            return false;
        }
        let mut entries = Vec::with_capacity(words);
        for word in (first..stop).step_by(BYTES) {
            let mut old = [0; BYTES];
            old.copy_from_slice(&slice[word..word + BYTES]);
            let mut changed = old;
            let (from, to) = (word.max(at), (word + BYTES).min(at + new.len()));
            changed[from - word..to - word].copy_from_slice(&new[from - at..to - at]);
            if changed == old {
                continue;
            }
            // It was loaded from there.
            let Ok((file, _, start)) = self.place_of(number) else { return false };
            entries.push(LogEntry { file, offset: start + word as u64, old, new: changed });
        }
        assert!(log.append_all(&entries).is_ok(), "the log had room");
        true
    }

    /// Everything that was changed before this call is safe against the death of the process. With a log it is already.
    pub async fn settle(&self) -> Result<(), Error> {
        let memory = self.dirty_bytes() <= self.budget.limit_bytes / 4;
        if memory && self.log.is_some() {
            return Ok(());
        }
        self.write_back().await
    }

    /// Everything that was changed before this call is in the file, in the order that it needs.
    pub async fn write_back(&self) -> Result<(), Error> {
        let wanted = self.changes.get();
        if self.written.get() >= wanted {
            return Ok(());
        }
        let _turn = self.round.lock().await;
        if self.written.get() >= wanted {
            return Ok(());
        }
        let stray: Vec<_> = self.stray.borrow_mut().drain(..).collect();
        let mut stray = InFlight { stray: &self.stray, writes: stray.into() };
        while let Some(write) = stray.writes.front_mut() {
            // Whatever came of it: what it was to write is written again.
            let _ = write.await;
            stray.writes.pop_front();
        }
        let upto = self.changes.get();
        let log_position = self.log.as_ref().map(|log| log.position());
        // As of now: what changes from here on may need data that the flush below does not cover.
        let mut dirty: Vec<(u64, u64, Box<[u8]>)> = Vec::new();
        let mut after_data = false;
        for (_, slice) in &self.slices.borrow().slab {
            if slice.changed > 0 {
                after_data |= slice.after_data > 0;
                dirty.push((slice.number, slice.changed, slice.bytes.clone()));
            }
        }
        if after_data {
            let flushes: Vec<_> = self.data.iter().map(|file| file.flush()).collect();
            for flush in flushes {
                flush.await?;
            }
        }
        dirty.sort_unstable_by_key(|(number, ..)| *number);
        let mut failure = None;
        for chunk in dirty.chunks(WRITES_MAX) {
            let mut under_way = InFlight { stray: &self.stray, writes: VecDeque::with_capacity(chunk.len()) };
            for (number, _, bytes) in chunk {
                let (_, file, offset) = self.place_of(*number)?;
                under_way.writes.push_back(file.write(offset, Buf::copy_of(bytes)));
            }
            for (number, changed, _) in chunk {
                let Some(write) = under_way.writes.front_mut() else { break };
                match write.await {
                    Ok(()) => self.note_written(*number, *changed),
                    Err(error) => failure = Some(error),
                }
                under_way.writes.pop_front();
            }
        }
        if let Some(error) = failure {
            return Err(error);
        }
        self.written.set(upto);
        if let (Some(log), Some(position)) = (&self.log, log_position) {
            log.release(position);
        }
        if self.doubtful_bytes() > self.budget.limit_bytes / 4 {
            // Its failure is told to the next who needs a flush; until one succeeds they stay in memory.
            for (_, file) in &self.files {
                let _ = file.flush().await;
            }
        }
        Ok(())
    }

    /// A slice is in the file as it was at change `changed`.
    fn note_written(&self, number: u64, changed: u64) {
        let mut slices = self.slices.borrow_mut();
        let Some(&key) = slices.by_number.get(&number) else { return };
        slices.alter(key, |slice| {
            if slice.after_data <= changed {
                slice.after_data = 0;
            }
            if slice.changed == changed {
                slice.changed = 0;
            }
            slice.doubt = self.flushes_of(number).map(Flushes::now);
        });
    }

    /// Writes everything back, and what is in doubt once more: after a flush that has failed. The flush of the file that follows ends the
    /// doubt.
    pub async fn write_again(&self) -> Result<(), Error> {
        {
            let mut slices = self.without_old_doubts();
            let doubtful = |(key, slice): (usize, &Slice)| slice.doubt.is_some().then_some(key);
            let keys: Vec<usize> = slices.slab.iter().filter_map(doubtful).collect();
            for key in keys {
                // No change of what anybody sees, so nothing for the log.
                self.changes.set(self.changes.get() + 1);
                slices.alter(key, |slice| slice.changed = self.changes.get());
            }
        }
        self.write_back().await
    }

    /// Drops the slices that lie in a range of the file whole: what is there is a table no more. The mapping to it is gone and
    /// written back, so nothing of them waits in the log.
    pub fn forget(&self, range: std::ops::Range<u64>) {
        let slice_bytes = self.slice_bytes as u64;
        for number in range.start.div_ceil(slice_bytes)..range.end / slice_bytes {
            let mut slices = self.slices.borrow_mut();
            if let Some(key) = slices.by_number.remove(&number) {
                let slice = slices.slab.remove(key);
                slices.dirty -= usize::from(slice.changed > 0);
                slices.pinned -= usize::from(slice.is_pinned());
                self.budget.give_back(self.slice_bytes);
            }
        }
    }

    /// Changes that are not in the file yet.
    pub fn pending(&self) -> u64 {
        self.changes.get() - self.written.get()
    }

    /// Figures; those of several tables of a driver add up.
    pub fn usage(&self) -> Usage {
        Usage {
            cache_hits: self.hits.get(),
            cache_misses: self.misses.get(),
            cache_bytes: self.held_bytes() as u64,
            pending_mappings: self.pending(),
        }
    }

    fn locate(&self, offset: u64, len: usize) -> (u64, usize) {
        let at = offset as usize & (self.slice_bytes - 1);
        assert!(at + len <= self.slice_bytes, "a look-up of {len} bytes at {offset} crosses a slice");
        (offset / self.slice_bytes as u64, at)
    }

    /// The file of a slice, and where it lies there.
    fn place_of(&self, number: u64) -> Result<(FileIndex, &Rc<dyn ImageFile>, u64), Error> {
        let address = number * self.slice_bytes as u64;
        let (file, offset) = match self.files.len() {
            1 => (0, address),
            _ => ((address >> OFFSET_BITS) as usize, address & ((1 << OFFSET_BITS) - 1)),
        };
        let (index, file) =
            self.files.get(file).ok_or_else(|| Error::invalid(format!("tables have no file {file}")))?;
        Ok((*index, file, offset))
    }

    fn flushes_of(&self, number: u64) -> Option<&Flushes> {
        self.place_of(number).ok().and_then(|(_, file, _)| file.flushes())
    }

    /// The slices, with the doubts ended that flushes have ended.
    fn without_old_doubts(&self) -> RefMut<'_, Slices> {
        let mut borrowed = self.slices.borrow_mut();
        let slices = &mut *borrowed;
        let last_good =
            self.files.iter().filter_map(|(_, file)| file.flushes()).map(Flushes::last_good).sum();
        if last_good != slices.looked_at {
            slices.looked_at = last_good;
            for (_, slice) in &mut slices.slab {
                let flushes = || self.flushes_of(slice.number);
                if slice.doubt.is_some_and(|then| flushes().is_some_and(|flushes| flushes.cover(then))) {
                    slice.doubt = None;
                    slices.pinned -= usize::from(slice.changed == 0);
                }
            }
        }
        borrowed
    }

    fn has(&self, number: u64) -> bool {
        self.slices.borrow().by_number.contains_key(&number)
    }

    fn insert(&self, number: u64, bytes: Box<[u8]>) {
        self.budget.make_room(self, self.slice_bytes);
        let mut slices = self.slices.borrow_mut();
        let slice = Slice { number, bytes, recent: Cell::new(true), changed: 0, after_data: 0, doubt: None };
        let key = slices.slab.insert(slice);
        slices.by_number.insert(number, key);
        self.budget.take(self.slice_bytes);
    }

    fn dirty_bytes(&self) -> usize {
        self.slices.borrow().dirty * self.slice_bytes
    }

    /// Bytes that no flush has covered since they were written, and that were not changed again.
    fn doubtful_bytes(&self) -> usize {
        let slices = self.without_old_doubts();
        (slices.pinned - slices.dirty) * self.slice_bytes
    }
}

impl Holder for Tables {
    fn held_bytes(&self) -> usize {
        self.slices.borrow().slab.len() * self.slice_bytes
    }

    fn may_evict(&self) -> bool {
        let slices = self.without_old_doubts();
        slices.slab.len() > SLICES_MIN && slices.pinned < slices.slab.len()
    }

    /// The clean slice that the clock's hand finds first.
    fn evict(&self) -> bool {
        if !self.may_evict() {
            return false;
        }
        let mut slices = self.slices.borrow_mut();
        let places = slices.slab.capacity().max(1);
        for _ in 0..2 * places {
            let key = slices.hand;
            slices.hand = (key + 1) % places;
            let Some(slice) = slices.slab.get(key) else { continue };
            if !slice.is_pinned() && !slice.recent.replace(false) {
                let number = slice.number;
                slices.slab.remove(key);
                slices.by_number.remove(&number);
                self.budget.give_back(self.slice_bytes);
                return true;
            }
        }
        false
    }
}

impl std::fmt::Debug for Tables {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tables")
            .field("files", &self.files)
            .field("usage", &self.usage())
            .finish_non_exhaustive()
    }
}

impl Drop for Tables {
    fn drop(&mut self) {
        self.budget.give_back(self.held_bytes());
        self.budget.leave();
    }
}
