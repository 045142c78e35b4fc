//! Places for new blocks: a reserve at the end of the file, ready before it is needed.
//!
//! ```text
//!  regular file   … last block | footer |~| block | block | … | block | footer (new)
//!                                        └──────── the reserve ───┘
//! ```
//! A place is *clean* when its data is known to read as zero, its bitmap is what a new block wants (all ones without a parent,
//! so that only the BAT changes at run time; all zeroes with one), and both are durable. Clean places come from
//! - *growth*: the file is made longer by many blocks at once, by the one write that puts the footer at the new end; that is
//!   durable before anything else is written there. The old footer stays where it is, in a gap that alignment leaves anyway: new
//!   places begin behind it. So a file system that writes a sector and the length that it brings together (all that journal
//!   do) leaves a footer at the end at every instant; on others the copy at offset 0 stands in (see [`super::layout`]). On
//!   a block device the footer stays at the device's end and the places are zeroed;
//! - *recycling*: places that were given up by an erase, or that nobody referred to when the image was opened. They are zeroed, but
//!   only after the removal of their old mapping is durable.
//!
//! At [`Reserve::close`] the unused rest is cut off: the footer is written behind the last block, flushed, and only then is
//! the file shortened. Nothing but that ever shortens it.
//!
//! A future that is dropped leaves operations in flight. Their places are never used again while the image is open: a late
//! write of ours must not land in a guest's block. That leaks them until the next opening finds them. An operation that *failed* is
//! over: the end of the file is where it was, and places that were not made ready wait to be recycled. So a store that is full for
//! hours costs no place.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::ops::Range;
use std::rc::Rc;

use super::bat::{UNUSED, first_data};
use super::footer::{Footer, SECTOR};
use super::layout::{Layout, Shape};
use crate::error::{Error, ErrorKind};
use crate::file::{Buf, ImageFile, Pending};
use crate::metadata::Tables;

/// Blocks of the first growth; each one doubles, up to [`GROWTH_BLOCKS_MAX`] and [`GROWTH_BYTES_MAX`].
const GROWTH_BLOCKS_MIN: u64 = 4;
/// Blocks of a growth, at most.
const GROWTH_BLOCKS_MAX: u64 = 128;
/// Bytes of a growth, at most (one block may be larger).
const GROWTH_BYTES_MAX: u64 = 256 << 20;
/// Places that wait to be recycled until it is worth the flushes.
const RECYCLE_MIN: usize = 16;
/// Places that are recycled at a time.
const RECYCLE_MAX: usize = 128;

/// Awaits all, so that nothing is in flight afterwards; the first error is kept.
pub async fn all(operations: Vec<Pending<'static, ()>>) -> Result<(), Error> {
    let mut result = Ok(());
    for operation in operations {
        let one = operation.await;
        result = result.and(one);
    }
    result
}

/// The reserve of one image. See the module.
#[derive(Debug)]
pub struct Reserve {
    file: Rc<dyn ImageFile>,
    shape: Shape,
    /// What a footer says; shared with the driver, which changes it when the disk is resized.
    footer: Rc<RefCell<Footer>>,
    /// Bitmaps of new blocks are all ones.
    ones: bool,
    clean: RefCell<VecDeque<u32>>,
    /// Nobody refers to them, durably; what they hold is not known.
    soiled: RefCell<Vec<u32>>,
    /// Their mapping is removed in memory.
    released: RefCell<Vec<u32>>,
    /// Ranges behind the end of the file in which no block may begin to be.
    avoid: Vec<Range<u64>>,
    /// First byte behind all blocks and metadata that are referred to.
    used_end: Cell<u64>,
    /// First byte behind everything that was ever begun to be written. On a device: of the places.
    tail: Cell<u64>,
    /// Up to where a footer that could not be written may have left a piece of it, behind `tail`.
    torn_end: Cell<u64>,
    /// Where the footer of a device is.
    device_footer: u64,
    growth: Cell<u64>,
    /// Footers that were damaged when the image was opened are to be written first.
    damaged_copy: Cell<bool>,
    /// Where the footer was written that ends the file now.
    new_footer: Cell<Option<u64>>,
    /// The end of the file was changed.
    moved: Cell<bool>,
    given_up: Cell<bool>,
    turn: async_lock::Mutex<()>,
}

impl Reserve {
    /// An empty reserve for an image whose blocks and metadata end at `used_end`; `free` are the places between them that nobody
    /// refers to.
    pub fn new(
        file: Rc<dyn ImageFile>,
        layout: &Layout,
        shape: Shape,
        footer: Rc<RefCell<Footer>>,
        ones: bool,
        used_end: u64,
        mut free: Vec<u32>,
    ) -> Reserve {
        let is_device = file.is_device();
        // Behind the last block there may be the reserve of somebody who died.
        let mut data = first_data(&shape, used_end);
        while !is_device && data + shape.block <= layout.data_end && free.len() < RECYCLE_MAX * 64 {
            free.push(((data - shape.bitmap) / SECTOR) as u32);
            data = first_data(&shape, data + shape.block);
        }
        let length = file.length();
        let footers = &layout.footers;
        Reserve {
            shape,
            footer,
            ones,
            clean: RefCell::default(),
            soiled: RefCell::new(free),
            released: RefCell::default(),
            used_end: Cell::new(used_end),
            tail: Cell::new(if is_device { used_end } else { length.next_multiple_of(SECTOR) }),
            torn_end: Cell::new(0),
            avoid: Vec::new(),
            device_footer: layout
                .footers
                .trailing
                .clone()
                .unwrap_or((length / SECTOR).saturating_sub(1) * SECTOR),
            growth: Cell::new(GROWTH_BLOCKS_MIN / 2),
            damaged_copy: Cell::new(footers.copy.is_err() || footers.differ),
            new_footer: Cell::new(None),
            // A footer that is missing is written at the latest when the image is closed.
            moved: Cell::new(footers.trailing.is_err()),
            given_up: Cell::new(false),
            turn: async_lock::Mutex::new(()),
            file,
        }
    }

    /// The same, which puts no block into these ranges behind the end of the file.
    pub fn avoiding(self, avoid: Vec<Range<u64>>) -> Reserve {
        Reserve { avoid, ..self }
    }

    /// A clean place, as the sector of its bitmap. `None`: [`Reserve::refill`] first.
    pub fn take(&self) -> Option<u32> {
        self.clean.borrow_mut().pop_front()
    }

    /// A place that was taken is referred to now.
    pub fn note_used(&self, place: u32) {
        let end = u64::from(place) * SECTOR + self.shape.stored();
        self.used_end.set(self.used_end.get().max(end));
    }

    /// The mapping to a place was removed from the tables in memory, and nobody reads or writes there.
    pub fn release(&self, place: u32) {
        self.released.borrow_mut().push(place);
        self.given_up.set(true);
    }

    /// Makes at least one place clean, unless somebody else did meanwhile.
    pub async fn refill(&self, tables: &Tables) -> Result<(), Error> {
        let _turn = self.turn.lock().await;
        if !self.clean.borrow().is_empty() {
            return Ok(());
        }
        let waiting = || self.released.borrow().len() + self.soiled.borrow().len();
        if waiting() >= RECYCLE_MIN {
            return self.recycle(tables).await;
        }
        match self.grow().await {
            Err(error) if error.kind == ErrorKind::NoSpace && waiting() > 0 => self.recycle(tables).await,
            other => other,
        }
    }

    /// Makes the file longer. See the module for the order.
    async fn grow(&self) -> Result<(), Error> {
        self.mend_copy().await?;
        let by_bytes = (GROWTH_BYTES_MAX / self.shape.stored()).max(1);
        let wanted = (self.growth.get() * 2).min(GROWTH_BLOCKS_MAX).min(by_bytes);
        let mut places: Vec<u32> = Vec::new();
        let mut end = self.tail.get();
        while (places.len() as u64) < wanted {
            let data = first_data(&self.shape, end);
            let start = data - self.shape.bitmap;
            let taken = |range: &&Range<u64>| range.start < data + self.shape.block && start < range.end;
            if let Some(range) = self.avoid.iter().find(taken) {
                end = range.end;
                continue;
            }
            let sector = start / SECTOR;
            let Some(place) = u32::try_from(sector).ok().filter(|place| *place != UNUSED) else { break };
            if self.file.is_device() && data + self.shape.block > self.device_footer {
                break;
            }
            places.push(place);
            end = data + self.shape.block;
        }
        let Some(first) = places.first() else {
            let what = format!("there is no room for a block behind byte {}", self.tail.get());
            return Err(Error::new(ErrorKind::NoSpace, format!("{}: {what}", self.file.name())));
        };
        let first = u64::from(*first) * SECTOR;
        self.move_end(first..end).await?;
        let result = self.prepare_places(first..end, &places).await;
        match result {
            Ok(()) => {
                self.growth.set(wanted);
                self.clean.borrow_mut().extend(places);
            }
            // The file has them, and what they hold is not known.
            Err(_) => self.soiled.borrow_mut().extend(places),
        }
        result
    }

    /// Moves the end of all places to the end of `room`: of a regular file by writing the footer there, of a device by zeroing it.
    async fn move_end(&self, room: Range<u64>) -> Result<(), Error> {
        self.moved.set(true);
        let before = self.tail.get();
        // Before anything is awaited: if this future is dropped, nothing else is ever put where the operation writes.
        let moved = if self.file.is_device() {
            self.tail.set(room.end);
            self.file.zero(room).await
        } else {
            self.tail.set(room.end + SECTOR);
            let moved = self.write_footer(room.end).await;
            match moved {
                Ok(()) => self.new_footer.set(Some(room.end)),
                Err(_) => self.torn_end.set(self.torn_end.get().max(room.end + SECTOR)),
            }
            moved
        };
        if moved.is_err() {
            // Answered: nothing is in flight.
            self.tail.set(before);
        }
        moved
    }

    /// Makes places clean that lie in new `room`, which reads as zero.
    async fn prepare_places(&self, room: Range<u64>, places: &[u32]) -> Result<(), Error> {
        let torn = room.start..self.torn_end.replace(0).min(room.end);
        if (self.ones || !torn.is_empty()) && !self.file.is_device() {
            // What made the file longer without the footer would leave none at the end.
            self.file.flush().await?;
        }
        if !torn.is_empty() {
            self.file.zero(torn).await?;
        }
        all(self.write_bitmaps(places)).await?;
        self.file.flush().await
    }

    /// Makes a place clean that was taken, and not used in the end.
    pub async fn clean_again(&self, tables: &Tables, place: u32) -> Result<(), Error> {
        let _turn = self.turn.lock().await;
        // A commit that failed may have left bits of it in the tables.
        tables.write_back().await?;
        self.clean_places(tables, &[place]).await
    }

    /// Zeroes places that were given up.
    async fn recycle(&self, tables: &Tables) -> Result<(), Error> {
        self.mend_copy().await?;
        let released = self.released.borrow().len();
        if released > 0 {
            tables.write_back().await?;
            self.file.flush().await?;
            self.soiled.borrow_mut().extend(self.released.borrow_mut().drain(..released));
        }
        // Taken out first: were this future dropped, the zeroes would still be under way.
        self.moved.set(true);
        let batch: Vec<u32> = {
            let mut soiled = self.soiled.borrow_mut();
            let rest = soiled.len().saturating_sub(RECYCLE_MAX);
            soiled.split_off(rest)
        };
        let result = self.clean_places(tables, &batch).await;
        match result {
            Ok(()) => self.clean.borrow_mut().extend(batch),
            Err(_) => self.soiled.borrow_mut().extend(batch),
        }
        result
    }

    async fn clean_places(&self, tables: &Tables, places: &[u32]) -> Result<(), Error> {
        let zeroes = places.iter().map(|place| {
            let start = u64::from(*place) * SECTOR;
            tables.forget(start..start + self.shape.bitmap);
            self.file.zero(start..start + self.shape.stored())
        });
        all(zeroes.collect()).await?;
        all(self.write_bitmaps(places)).await?;
        self.file.flush().await
    }

    /// Begins to write the bitmaps of new blocks, where they are not zero anyway.
    fn write_bitmaps(&self, places: &[u32]) -> Vec<Pending<'static, ()>> {
        if !self.ones {
            return Vec::new();
        }
        let mut ones = Buf::zeroed(self.shape.bitmap as usize);
        let used = (self.shape.block / SECTOR) as usize;
        super::bitmap::set(&mut ones, 0, 0, used as u64, self.shape.low_bits_first);
        places.iter().map(|place| self.file.write(u64::from(*place) * SECTOR, ones.clone())).collect()
    }

    fn write_footer(&self, at: u64) -> Pending<'static, ()> {
        self.file.write(at, Buf::copy_of(&self.footer.borrow().to_bytes()))
    }

    /// Writes the copy of the footer when it was damaged, before anything relies on it.
    async fn mend_copy(&self) -> Result<(), Error> {
        if self.damaged_copy.get() {
            self.write_footer(0).await?;
            self.file.flush().await?;
            self.damaged_copy.set(false);
        }
        Ok(())
    }

    /// Writes the footer that the driver has changed, at the end first, so that a crash between the two leaves an image whose footer
    /// at the end, the one that counts, is the new one.
    pub async fn rewrite_footers(&self) -> Result<(), Error> {
        let _turn = self.turn.lock().await;
        self.moved.set(true);
        if self.file.is_device() {
            self.write_footer(self.device_footer).await?;
        } else {
            let at = self.tail.get();
            self.move_end(at..at).await?;
        }
        self.file.flush().await?;
        self.write_footer(0).await?;
        self.file.flush().await?;
        self.damaged_copy.set(false);
        Ok(())
    }

    /// The footer that was written at the end of the file is written once more.
    pub async fn write_footer_again(&self) -> Result<(), Error> {
        let _turn = self.turn.lock().await;
        match self.new_footer.get() {
            Some(at) => self.write_footer(at).await,
            None => Ok(()),
        }
    }

    /// Places were given up: the last block may be another one now.
    pub fn has_given_up(&self) -> bool {
        self.given_up.get()
    }

    /// Cuts off what is behind the last block, if the end of the file was moved. Everything else must be durable. `used_end`, if it is
    /// known better now: first byte behind all blocks and metadata that are referred to.
    pub async fn close(&self, used_end: Option<u64>) -> Result<(), Error> {
        let _turn = self.turn.lock().await;
        if let Some(used_end) = used_end {
            self.moved.set(self.moved.get() || used_end < self.used_end.get());
            self.used_end.set(used_end);
        }
        self.mend_copy().await?;
        if !self.moved.get() {
            return Ok(());
        }
        self.clean.borrow_mut().clear();
        if self.file.is_device() {
            self.write_footer(self.device_footer).await?;
            return self.file.flush().await;
        }
        let footer = self.footer.borrow().clone();
        cut_behind(&self.file, &footer, self.used_end.get()).await
    }
}

/// Makes a regular file end with a footer right behind `used_end`: the footer is durable before the file is shortened.
pub async fn cut_behind(file: &Rc<dyn ImageFile>, footer: &Footer, used_end: u64) -> Result<(), Error> {
    let at = used_end.next_multiple_of(SECTOR);
    file.write(at, Buf::copy_of(&footer.to_bytes())).await?;
    file.flush().await?;
    file.truncate(at + SECTOR).await?;
    file.flush().await
}
