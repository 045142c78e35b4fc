//! Places for new grains of a sparse extent: a reserve behind the last grain, ready before it is needed.
//!
//! A place is *clean* when it reads as zero, durably. Clean places come from
//! - *growth*: the file is made longer by many grains at once, and flushed, before one of them is used;
//! - *recycling*: places that were given up by an erase, or that nobody referred to when the extent was opened. They are zeroed, but
//!   only after the removal of their old mapping is durable.
//!
//! At [`Reserve::close`] the unused rest is cut off. Nothing but that ever shortens the file. A growth whose future is dropped leaves its
//! places to nobody: its operation may come late. One that failed is over, and costs nothing.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::ops::Range;
use std::rc::Rc;

use super::header::{COWD_FREE_AT, SECTOR, SECTORS_MAX, Shape};
use crate::error::{Error, ErrorKind};
use crate::file::{Buf, ImageFile};
use crate::metadata::Tables;

/// Bytes of the first growth; each one doubles, up to [`GROWTH_BYTES_MAX`].
const GROWTH_BYTES_MIN: u64 = 512 << 10;
/// Bytes of a growth, at most.
const GROWTH_BYTES_MAX: u64 = 64 << 20;
/// Places that wait to be recycled until it is worth the flushes, in bytes.
const RECYCLE_BYTES_MIN: u64 = 1 << 20;

/// The reserve of one extent. See the module. Ranges are bytes of the file, whole grains.
#[derive(Debug)]
pub struct Reserve {
    file: Rc<dyn ImageFile>,
    grain: u64,
    /// A COWD header says where the free space begins.
    cowd: bool,
    clean: RefCell<VecDeque<Range<u64>>>,
    /// Nobody refers to them, durably; what they hold is not known.
    soiled: RefCell<Vec<Range<u64>>>,
    /// Their mapping is removed in memory.
    released: RefCell<Vec<Range<u64>>>,
    /// First byte behind everything that was ever begun to be written.
    tail: Cell<u64>,
    growth: Cell<u64>,
    turn: async_lock::Mutex<()>,
}

fn bytes<'a>(ranges: impl IntoIterator<Item = &'a Range<u64>>) -> u64 {
    ranges.into_iter().map(|range| range.end - range.start).sum()
}

fn add(ranges: &mut Vec<Range<u64>>, range: Range<u64>) {
    match ranges.last_mut() {
        Some(last) if last.end == range.start => last.end = range.end,
        _ => ranges.push(range),
    }
}

impl Reserve {
    /// The reserve of an extent whose grains and tables end at `end`; `free` is space between them.
    pub fn new(file: Rc<dyn ImageFile>, shape: &Shape, end: u64, free: Vec<Range<u64>>) -> Reserve {
        let mut soiled = free;
        // Behind the last grain there may be the reserve of somebody who died.
        let (start, length) = (end.next_multiple_of(shape.grain), file.length());
        if start + shape.grain <= length {
            add(&mut soiled, start..length - length % shape.grain);
        }
        Reserve {
            grain: shape.grain,
            cowd: shape.cowd,
            clean: RefCell::default(),
            soiled: RefCell::new(soiled),
            released: RefCell::default(),
            tail: Cell::new(length.max(end)),
            growth: Cell::new(GROWTH_BYTES_MIN / 2),
            turn: async_lock::Mutex::new(()),
            file,
        }
    }

    /// A clean place of `len` bytes, whole grains. `None`: [`Reserve::refill`] first.
    pub fn take(&self, len: u64) -> Option<u64> {
        let mut clean = self.clean.borrow_mut();
        let index = clean.iter().position(|range| range.end - range.start >= len)?;
        let place = clean[index].start;
        clean[index].start += len;
        if clean[index].is_empty() {
            clean.remove(index);
        }
        Some(place)
    }

    /// The mapping to a place was removed from the tables in memory, and nobody reads or writes there.
    pub fn release(&self, place: u64) {
        // Places of other programs may lie at any sector; a part of a grain is no place.
        if place.is_multiple_of(self.grain) {
            // Not merged with a neighbour: who makes them clean counts those that were there before a flush.
            self.released.borrow_mut().push(place..place + self.grain);
        }
    }

    /// A place was given up without a mapping, and nobody writes there any more.
    pub fn give_back(&self, place: u64) {
        self.soiled.borrow_mut().push(place..place + self.grain);
    }

    /// Makes a place of `len` bytes clean, unless somebody else did meanwhile.
    pub async fn refill(&self, len: u64, tables: &Tables) -> Result<(), Error> {
        let _turn = self.turn.lock().await;
        if self.clean.borrow().iter().any(|range| range.end - range.start >= len) {
            return Ok(());
        }
        let waiting = || bytes(&*self.released.borrow()) + bytes(&*self.soiled.borrow());
        if len == self.grain && waiting() >= RECYCLE_BYTES_MIN {
            return self.recycle(tables).await;
        }
        match self.grow(len).await {
            Err(error) if error.kind == ErrorKind::NoSpace && len == self.grain && waiting() > 0 => {
                self.recycle(tables).await
            }
            other => other,
        }
    }

    /// Makes the file longer.
    async fn grow(&self, len: u64) -> Result<(), Error> {
        let before = self.tail.get();
        let start = before.next_multiple_of(self.grain);
        let wanted = (self.growth.get() * 2)
            .clamp(GROWTH_BYTES_MIN, GROWTH_BYTES_MAX)
            .next_multiple_of(self.grain)
            .max(len);
        let end = (start + wanted).min(SECTORS_MAX * SECTOR / self.grain * self.grain);
        if end < start + len {
            let what = format!("a sparse extent has at most 2 TiB, and this one has {start} bytes");
            return Err(Error::new(ErrorKind::NoSpace, format!("{}: {what}", self.file.name())));
        }
        // Before anything is awaited: if this future is dropped, nothing else is ever put there.
        self.tail.set(end);
        let extended = self.file.extend(end).await;
        if extended.is_err() {
            self.tail.set(before);
        }
        extended?;
        self.write_free(end).await?;
        self.file.flush().await?;
        self.growth.set(wanted);
        self.clean.borrow_mut().push_back(start..end);
        Ok(())
    }

    /// Notes in a COWD header what is free: where others put their next grain.
    async fn write_free(&self, end: u64) -> Result<(), Error> {
        if !self.cowd {
            return Ok(());
        }
        let sector = (end.div_ceil(SECTOR) as u32).to_le_bytes();
        self.file.write(COWD_FREE_AT, Buf::copy_of(&sector)).await
    }

    /// Zeroes places that were given up.
    async fn recycle(&self, tables: &Tables) -> Result<(), Error> {
        let released = self.released.borrow().len();
        if released > 0 {
            tables.write_back().await?;
            self.file.flush().await?;
            let removed: Vec<_> = self.released.borrow_mut().drain(..released).collect();
            self.soiled.borrow_mut().extend(removed);
        }
        // Taken out first: were this future dropped, the zeroes would still be under way.
        let batch = self.take_soiled();
        let zeroes: Vec<_> = batch.iter().map(|range| self.file.zero(range.clone())).collect();
        let mut zeroed = Ok(());
        for zero in zeroes {
            zeroed = zeroed.and(zero.await);
        }
        let zeroed = match zeroed {
            Ok(()) => self.file.flush().await,
            failed => failed,
        };
        match zeroed {
            Ok(()) => self.clean.borrow_mut().extend(batch),
            Err(_) => self.soiled.borrow_mut().extend(batch),
        }
        zeroed
    }

    /// Takes places that are to be zeroed, not too many at a time.
    fn take_soiled(&self) -> Vec<Range<u64>> {
        let mut soiled = self.soiled.borrow_mut();
        let mut batch = Vec::new();
        let mut room = GROWTH_BYTES_MAX;
        while room > 0
            && let Some(range) = soiled.pop()
        {
            let cut = range.end.min(range.start + room.next_multiple_of(self.grain));
            room = room.saturating_sub(cut - range.start);
            if cut < range.end {
                soiled.push(cut..range.end);
            }
            batch.push(range.start..cut);
        }
        batch
    }

    /// Cuts off what is behind `end`, the first byte behind everything that is referred to. Everything else is durable.
    pub async fn close(&self, end: u64) -> Result<(), Error> {
        let _turn = self.turn.lock().await;
        self.clean.borrow_mut().clear();
        self.write_free(end).await?;
        if end < self.file.length() {
            self.file.truncate(end).await?;
        }
        Ok(())
    }
}
