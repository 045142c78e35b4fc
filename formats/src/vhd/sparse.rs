//! The driver of dynamic and differencing disks at run time: look-ups, plans, commits.
//!
//! ```text
//!  block there, bit set    ─▶ written in place
//!  block there, bit clear  ─▶ plan: the same place; commit sets the bit (after the data: what is under it may be another's)
//!  block not there         ─▶ plan: a clean place from the reserve, shared by all plans of the block until the first commit;
//!                             commit sets the BAT's entry: at any time, since what it makes visible is zero (no parent), or
//!                             has no bits yet (a parent); then, with a parent, the bits, after the data
//! ```
//! What is visible to a look-up is not safe against the death of the process before it is settled (in the log, or in the file). Of a
//! block with changes that are not, nothing is written in place: another write to it is planned and committed, and so waits
//! until they are. This covers sectors that a first commit made visible beside its own, and commits whose settling failed.
//!
//! Invariants: a block's place is checked against the whole table when the image is opened ([`super::bat::walk`]) and against the
//! file at each look-up; a block in `full` has all bits set; a block in `pinned` is never given up (its batmap bit is set).

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::ops::Range;
use std::rc::Rc;

use super::bat::{self, UNUSED};
use super::blocks::BlockSet;
use super::footer::{Footer, SECTOR};
use super::header::Header;
use super::layout::Shape;
use super::reserve::Reserve;
use super::{bitmap, sparse_plan};
use crate::crypt::PayloadCipher;
use crate::driver::{Driver, Erase, Erased, Extent, FileIndex, Order, Place, Plan, Usage};
use crate::error::{Error, ErrorKind};
use crate::file::{ImageFile, Pending};
use crate::late::Late;
use crate::metadata::Tables;

/// The file of the image itself.
pub const FILE: FileIndex = FileIndex(0);

/// A place that plans are about to fill.
#[derive(Debug, Clone, Copy)]
pub struct Reservation {
    /// Sector of its bitmap.
    pub place: u32,
    /// Plans that are out for it.
    pub plans: u32,
    /// More than one plan was out for it at some time.
    pub joined: bool,
    /// The BAT has it.
    pub committed: bool,
}

/// A place whose plans were all given up.
#[derive(Debug, Clone, Copy)]
pub struct Abandoned {
    /// Sector of its bitmap.
    pub place: u32,
    /// It was made clean again.
    pub clean: bool,
}

/// A dynamic or differencing disk.
#[derive(Debug)]
pub struct Sparse {
    pub(super) file: Rc<dyn ImageFile>,
    pub(super) tables: Rc<Tables>,
    pub(super) shape: Shape,
    /// Bytes of the disk.
    pub(super) size: Cell<u64>,
    /// As it is in the file.
    pub(super) header: RefCell<Header>,
    pub(super) footer: Rc<RefCell<Footer>>,
    /// Bytes of the parent; `None` when there is none.
    pub(super) below_size: Option<u64>,
    /// How sectors that are there are encrypted.
    pub(super) cipher: Option<PayloadCipher>,
    pub(super) writable: bool,
    /// Blocks that are not served.
    pub(super) damaged: BlockSet,
    pub(super) pinned: BlockSet,
    pub(super) full: RefCell<BlockSet>,
    /// Blocks with changes that may not be settled, and the number of the last one of each.
    pub(super) unsettled: RefCell<BTreeMap<u32, u64>>,
    pub(super) last_change: Cell<u64>,
    pub(super) reserve: Reserve,
    /// Zeroes that were being written when their caller went away.
    pub(super) late: Late,
    /// First byte behind headers and tables.
    pub(super) metadata_end: u64,
    pub(super) reservations: RefCell<BTreeMap<u32, Reservation>>,
    /// Places that only the block they were taken for may get: writes of callers that went away may land in them still.
    pub(super) abandoned: RefCell<BTreeMap<u32, Abandoned>>,
    pub(super) plans: RefCell<BTreeMap<u64, Vec<sparse_plan::Part>>>,
    pub(super) next_plan: Cell<u64>,
}

/// Where a block is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Found {
    /// The table has to be read first.
    Unknown,
    /// Nowhere.
    Nowhere,
    /// At this byte of the file its bitmap begins.
    At(u64),
}

impl Sparse {
    /// The disk has a parent.
    pub(super) fn is_differencing(&self) -> bool {
        self.below_size.is_some()
    }

    /// A sector without its bit is not in this file, also without a parent: bits of new blocks are set as their sectors are written.
    pub(super) fn keeps_bits(&self) -> bool {
        self.is_differencing() || self.cipher.is_some()
    }

    /// Looks a block up in the table, from memory, and checks the answer.
    pub(super) fn find(&self, block: u32) -> Result<Found, Error> {
        if self.damaged.contains(block) {
            let what = format!("the block table's entry of block {block}: run `image check` on it");
            return Err(Error::corrupt(self.file.name(), what));
        }
        match self.tables.get_u32(self.shape.entry_offset(block)) {
            None => Ok(Found::Unknown),
            Some(UNUSED) => Ok(Found::Nowhere),
            Some(entry) => {
                let start = u64::from(entry) * SECTOR;
                if start < SECTOR || start + self.shape.stored() > self.file.length() {
                    let what =
                        format!("block {block} is said to be at sector {entry:#x}, which is not in the file");
                    return Err(Error::corrupt(self.file.name(), what));
                }
                Ok(Found::At(start))
            }
        }
    }

    /// [`Sparse::find`], reading the table when it has to.
    pub(super) async fn look_up(&self, block: u32) -> Result<Found, Error> {
        loop {
            match self.find(block)? {
                Found::Unknown => self.tables.load(self.shape.entry_offset(block)).await?,
                found => return Ok(found),
            }
        }
    }

    /// The part of a block that lies in the disk.
    pub(super) fn block_range(&self, block: u32) -> Range<u64> {
        let start = u64::from(block) * self.shape.block;
        start..(start + self.shape.block).min(self.size.get()).max(start)
    }

    /// The block that holds a byte.
    pub(super) fn block_of(&self, offset: u64) -> u32 {
        (offset / self.shape.block) as u32
    }

    /// Pieces of a range, one per block.
    pub(super) fn per_block(&self, range: Range<u64>) -> impl Iterator<Item = (u32, Range<u64>)> + use<> {
        let block = self.shape.block;
        let mut at = range.start;
        std::iter::from_fn(move || {
            let start = at;
            at = range.end.min((start / block + 1) * block);
            (start < range.end).then_some(((start / block) as u32, start..at))
        })
    }

    /// Maps `from..to` of one block; returns up to where.
    fn map_block(&self, block: u32, from: u64, to: u64, out: &mut Vec<Extent>) -> Result<u64, Error> {
        let start = match self.find(block)? {
            Found::Unknown => return Ok(from),
            Found::Nowhere => {
                let nothing =
                    if self.is_differencing() { Place::Absent } else { Place::Zero { allocated: false } };
                push(out, from, to - from, nothing);
                return Ok(to);
            }
            Found::At(start) => start,
        };
        let block_start = u64::from(block) * self.shape.block;
        let data = |at| self.shape.data_offset(start, at);
        let in_place = self.writable && !self.unsettled.borrow().contains_key(&block) && self.late.is_empty();
        if self.full.borrow().contains(block) || self.is_full(block, start) {
            let place = Place::Data { file: FILE, offset: data(from), in_place };
            push(out, from, to - from, place);
            return Ok(to);
        }
        let mut at = from;
        while at < to {
            let sector = (at - block_start) / SECTOR;
            // Bits of one sector of the bitmap at a time: that many are sure to be in one slice.
            let first = sector / BITS * BITS;
            let last = (to - block_start).div_ceil(SECTOR).min(first + BITS);
            let low = self.shape.low_bits_first;
            let look = |bytes: &[u8]| bitmap::run(bytes, first, sector, last, low);
            let Some((sectors, set)) = self.tables.get(start + first / 8, SECTOR as usize, look) else {
                return Ok(at);
            };
            let end = to.min(block_start + (sector + sectors) * SECTOR);
            let place = match set {
                true => Place::Data { file: FILE, offset: data(at), in_place },
                false if self.is_differencing() => Place::Absent,
                false => Place::Zero { allocated: true },
            };
            push(out, at, end - at, place);
            at = end;
        }
        Ok(to)
    }

    /// Whether all bits of a block are set, as far as that is cheap to find out; remembers it.
    fn is_full(&self, block: u32, start: u64) -> bool {
        let sectors = (self.block_range(block).end - u64::from(block) * self.shape.block).div_ceil(SECTOR);
        if sectors > BITS {
            return false;
        }
        let low = self.shape.low_bits_first;
        let look = |bytes: &[u8]| bitmap::run(bytes, 0, 0, sectors, low) == (sectors, true);
        let full = self.tables.get(start, SECTOR as usize, look) == Some(true);
        if full {
            self.full.borrow_mut().insert(block);
        }
        full
    }

    /// Changes the tables for a block, if [`Tables::set`] can: else [`Tables::prepare`] comes first.
    pub(super) fn change(&self, block: u32, offset: u64, bytes: &[u8], order: Order) -> bool {
        let done = self.tables.set(offset, bytes, order);
        if done {
            self.last_change.set(self.last_change.get() + 1);
            self.unsettled.borrow_mut().insert(block, self.last_change.get());
        }
        done
    }

    /// Sets the BAT's entry of a block.
    pub(super) async fn set_entry(&self, block: u32, entry: u32) -> Result<(), Error> {
        let offset = self.shape.entry_offset(block);
        while !self.change(block, offset, &entry.to_be_bytes(), Order::Anytime) {
            self.tables.prepare(offset, 4).await?;
        }
        Ok(())
    }

    /// What was changed before is safe against the death of the process.
    pub(super) async fn settle(&self) -> Result<(), Error> {
        let until = self.last_change.get();
        self.tables.settle().await?;
        self.unsettled.borrow_mut().retain(|_, change| *change > until);
        Ok(())
    }

    /// What was changed before is in the file.
    async fn write_back(&self) -> Result<(), Error> {
        let until = self.last_change.get();
        self.tables.write_back().await?;
        self.unsettled.borrow_mut().retain(|_, change| *change > until);
        Ok(())
    }

    /// Reads the bits of sectors of a block that is there.
    pub(super) async fn load_bits(&self, start: u64, sectors: Range<u64>) -> Result<(), Error> {
        let mut first = sectors.start / BITS * BITS;
        while first < sectors.end {
            self.tables.load(start + first / 8).await?;
            first += BITS;
        }
        Ok(())
    }

    /// Sectors of a block, of a range of the disk that lies in it; outwards.
    pub(super) fn sectors_of(&self, block: u32, range: &Range<u64>) -> Range<u64> {
        let start = u64::from(block) * self.shape.block;
        (range.start - start) / SECTOR..(range.end - start).div_ceil(SECTOR)
    }

    pub(super) fn check_writable(&self) -> Result<(), Error> {
        if self.writable {
            return Ok(());
        }
        let message = format!("{} is opened read-only", self.file.name());
        Err(Error::new(ErrorKind::ReadOnly, message))
    }

    async fn erase_range(&self, range: Range<u64>, how: Erase) -> Result<Erased, Error> {
        self.check_writable()?;
        self.late.wait().await;
        let range = range.start..range.end.min(self.size.get());
        if self.cipher.is_some() {
            return self.erase_encrypted(range, how).await;
        }
        if !self.is_differencing() {
            self.erase_blocks(range, how).await?;
            self.settle().await?;
            return Ok(Erased::Done);
        }
        if how == Erase::Discard && !self.holds_all(range.clone()).await? {
            // What is not here is the parent's, and no format's bit says "zero".
            return Ok(Erased::WriteZeroes);
        }
        self.zero_with_space(range).await?;
        Ok(Erased::Done)
    }

    /// Erases in an encrypted disk: whole blocks go, without a parent; else zeroes are written, since those in a place would be
    /// something else when they are decrypted.
    async fn erase_encrypted(&self, range: Range<u64>, how: Erase) -> Result<Erased, Error> {
        if self.is_differencing() || how == Erase::ZeroKeep {
            return Ok(Erased::WriteZeroes);
        }
        let mut erased = Erased::Done;
        for (block, part) in self.per_block(range) {
            match self.look_up(block).await? {
                Found::At(start) if part == self.block_range(block) && self.may_unmap(block) => {
                    self.set_entry(block, UNUSED).await?;
                    self.full.borrow_mut().remove(block);
                    // Not punched: after a crash the entry may be there still, and what it shows must be what was there.
                    self.reserve.release((start / SECTOR) as u32);
                }
                Found::At(_) => erased = Erased::WriteZeroes,
                Found::Nowhere | Found::Unknown => {}
            }
        }
        self.settle().await?;
        Ok(erased)
    }

    /// Erases in a disk without a parent.
    async fn erase_blocks(&self, range: Range<u64>, how: Erase) -> Result<(), Error> {
        for (block, part) in self.per_block(range) {
            let whole = part == self.block_range(block);
            match self.look_up(block).await? {
                Found::At(start) if whole && how != Erase::ZeroKeep && self.may_unmap(block) => {
                    self.set_entry(block, UNUSED).await?;
                    self.full.borrow_mut().remove(block);
                    self.punch(start).await;
                    // Only now: zeroes that are on their way must not meet the next owner of the place.
                    self.reserve.release((start / SECTOR) as u32);
                }
                Found::At(_) if how == Erase::ZeroKeep => self.zero_with_space(part).await?,
                Found::At(start) => {
                    let data = self.shape.data_offset(start, part.start);
                    self.late.finish(self.file.zero(data..data + (part.end - part.start))).await?;
                }
                Found::Nowhere if how == Erase::ZeroKeep => self.zero_with_space(part).await?,
                Found::Nowhere | Found::Unknown => {}
            }
        }
        Ok(())
    }

    /// Gives the bytes of a block back to the store whose entry was removed. The entry in the file may be there still: what it shows
    /// after power loss was asked to be zero, and is. Its bitmap stays, so that it says the same of every sector.
    async fn punch(&self, start: u64) {
        let data = start + self.shape.bitmap..(start + self.shape.stored()).min(self.file.length());
        if !self.file.is_device() && !data.is_empty() {
            // Not doing it costs space only: who gets the place zeroes it.
            let _ = self.file.zero(data).await;
        }
    }

    fn may_unmap(&self, block: u32) -> bool {
        !self.pinned.contains(block) && !self.reservations.borrow().contains_key(&block)
    }

    /// First byte behind all blocks and metadata, by the table in the file.
    async fn find_end(&self) -> Result<u64, Error> {
        let mut end = self.metadata_end;
        let blocks = 0..self.shape.blocks(self.size.get());
        bat::for_each_piece(&self.file, &self.shape, blocks, |_, entries| {
            let last = entries.filter(|entry| *entry != UNUSED).max();
            end = end.max(last.map_or(0, |entry| u64::from(entry) * SECTOR + self.shape.stored()));
        })
        .await?;
        Ok(end)
    }

    /// Whether all sectors of a range are in this file.
    async fn holds_all(&self, range: Range<u64>) -> Result<bool, Error> {
        let mut extents = Vec::new();
        let mut at = range.start;
        while at < range.end {
            extents.clear();
            let covered = self.map(at, range.end - at, &mut extents)?;
            if extents.iter().any(|extent| !matches!(extent.place, Place::Data { .. })) {
                return Ok(false);
            }
            if covered == 0 {
                self.load(at, range.end - at).await?;
            }
            at += covered;
        }
        Ok(true)
    }
}

/// Sectors whose bits are in one sector of a bitmap.
pub const BITS: u64 = SECTOR * 8;

/// Appends an extent, to the last one when it continues it.
fn push(out: &mut Vec<Extent>, start: u64, len: u64, place: Place) {
    if let Some(last) = out.last_mut()
        && last.start + last.len == start
    {
        let continues = match (last.place, place) {
            (Place::Data { offset: a, in_place: x, .. }, Place::Data { offset: b, in_place: y, .. }) => {
                a + last.len == b && x == y
            }
            (a, b) => a == b,
        };
        if continues {
            last.len += len;
            return;
        }
    }
    out.push(Extent { start, len, place });
}

impl Driver for Sparse {
    fn size(&self) -> u64 {
        self.size.get()
    }

    fn granule(&self) -> u64 {
        SECTOR
    }

    fn map(&self, offset: u64, len: u64, out: &mut Vec<Extent>) -> Result<u64, Error> {
        for (block, part) in self.per_block(offset..offset + len) {
            match self.map_block(block, part.start, part.end, out) {
                Ok(to) if to == part.end => {}
                Ok(to) => return Ok(to - offset),
                Err(error) if part.start == offset => return Err(error),
                Err(_) => return Ok(part.start - offset),
            }
        }
        Ok(len)
    }

    fn load(&self, offset: u64, len: u64) -> Pending<'_, ()> {
        Box::pin(async move {
            let block = self.block_of(offset);
            let Found::At(start) = self.look_up(block).await? else { return Ok(()) };
            if self.full.borrow().contains(block) {
                return Ok(());
            }
            let end = (offset + len).min(self.block_range(block).end);
            self.load_bits(start, self.sectors_of(block, &(offset..end))).await
        })
    }

    fn plan_write(&self, offset: u64, len: u64) -> Pending<'_, Plan> {
        Box::pin(async move {
            self.check_writable()?;
            let end = (offset + len).next_multiple_of(SECTOR).min(self.size.get());
            self.plan(offset..offset + len, offset / SECTOR * SECTOR..end).await
        })
    }

    fn commit(&self, plan: Plan) -> Pending<'_, ()> {
        Box::pin(self.commit_plan(plan.id))
    }

    fn abort(&self, plan: Plan) {
        self.abort_plan(plan.id);
    }

    fn erase(&self, range: Range<u64>, how: Erase) -> Pending<'_, Erased> {
        Box::pin(self.erase_range(range, how))
    }

    fn cipher(&self) -> Option<&PayloadCipher> {
        self.cipher.as_ref()
    }

    fn flush(&self) -> Pending<'_, ()> {
        Box::pin(self.write_back())
    }

    fn tidy(&self) -> Pending<'_, ()> {
        Box::pin(self.write_back())
    }

    fn resize(&self, size: u64) -> Pending<'_, ()> {
        Box::pin(self.grow(size))
    }

    fn close(&self) -> Pending<'_, ()> {
        Box::pin(async move {
            if !self.writable {
                return Ok(());
            }
            self.write_back().await?;
            self.file.flush().await?;
            let used_end = if self.reserve.has_given_up() { Some(self.find_end().await?) } else { None };
            self.reserve.close(used_end).await
        })
    }

    fn usage(&self) -> Usage {
        self.tables.usage()
    }
}
