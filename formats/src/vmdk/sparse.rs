//! A sparse extent at run time: look-ups in its tables, changes of them, places for its grains.
//!
//! Every change of an entry is made in both grain tables, through [`Tables`], which decides when they reach the file. Before the first
//! one the header is marked as not cleanly closed, durably; the mark goes when the extent is closed and both tables are equal.
//! The grain directories are in memory; an entry without a table gets one when a grain of it is written.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::ops::Range;
use std::rc::Rc;

use super::directory::{self, Directory, Place};
use super::header::{SECTOR, Shape};
use super::reserve::Reserve;
use crate::driver::{FileIndex, Order};
use crate::error::{Error, ErrorKind};
use crate::file::{Buf, ImageFile};
use crate::metadata::{Tables, address};

/// What only an extent has that is opened for writing.
#[derive(Debug)]
pub struct Writable {
    /// Places for new grains.
    pub reserve: Reserve,
    /// Where the next grain of a stream goes.
    pub append: Cell<u64>,
    /// First byte behind everything that is referred to, unless grains were given up.
    used_end: Cell<u64>,
    /// Grains were given up: the last one may be another one now.
    given_up: Cell<bool>,
    /// Places of grains whose plans were given up: only the grain they were taken for may get them again.
    pub abandoned: RefCell<BTreeMap<u64, u64>>,
    /// The header says that the extent is open.
    marked: Cell<bool>,
    mark_turn: async_lock::Mutex<()>,
    /// Held by who adds a grain table.
    tables_turn: async_lock::Mutex<()>,
    /// Changes that were made in one of the two tables and maybe not in the other.
    halves: Cell<u64>,
}

/// A sparse extent.
#[derive(Debug)]
pub struct Sparse {
    /// Its file.
    pub file: Rc<dyn ImageFile>,
    /// The number of that file in the driver.
    pub index: FileIndex,
    /// How it is laid out.
    pub shape: Shape,
    /// Number of its file among those of the tables.
    pub tables_file: usize,
    /// Its grain directories.
    pub directory: RefCell<Directory>,
    /// `None` when it is opened to be read.
    pub writable: Option<Writable>,
}

impl Sparse {
    /// Opens an extent; one that shall be written is walked through, and refused when anything of it is damaged.
    ///
    /// # Errors
    /// Those of [`Shape::read`]; damage; something that cannot be written.
    pub async fn open(
        file: Rc<dyn ImageFile>,
        index: FileIndex,
        tables_file: usize,
        writable: bool,
    ) -> Result<Sparse, Error> {
        let shape = Shape::read(&file).await?;
        let directory = Directory::read(&file, &shape).await?;
        let writable = if writable { Some(Writable::open(&file, &shape, &directory).await?) } else { None };
        Ok(Sparse { file, index, shape, tables_file, directory: RefCell::new(directory), writable })
    }

    fn damaged(&self, what: impl std::fmt::Display) -> Error {
        Error::corrupt(self.file.name(), format!("{what}: run `image check` on it; other ranges are served"))
    }

    /// Where in the tables the entries of a grain are: of the table that counts, and of its copy. `None`: there is no table.
    ///
    /// # Errors
    /// The directory is damaged there.
    pub fn entry_addresses(&self, grain: u64) -> Result<Option<(u64, Option<u64>)>, Error> {
        let (table, at) = (grain / self.shape.entries, grain % self.shape.entries * 4);
        let directory = self.directory.borrow();
        let place = |list: &[u32]| {
            let place =
                Directory::place(list.get(table as usize), self.shape.table_bytes(), self.file.length());
            place.map_err(|sector| {
                self.damaged(format!("grain table {table} is said to be at sector {sector:#x}"))
            })
        };
        let Some(first) = place(&directory.first)? else { return Ok(None) };
        // A copy that cannot be found is not written; no copy is an extent for writing opened with.
        let copy = place(&directory.copy).ok().flatten();
        let here = |offset: u64| address(self.tables_file, offset + at);
        Ok(Some((here(first), copy.map(here))))
    }

    /// Shows what the entries of `grains` say to `each`, from memory, as far as one slice of a table goes; returns how many were shown.
    /// `None`: not in memory.
    ///
    /// # Errors
    /// The first entry is damaged.
    pub fn look(
        &self,
        tables: &Tables,
        slice_bytes: u64,
        grains: Range<u64>,
        mut each: impl FnMut(u64, Place),
    ) -> Result<Option<u64>, Error> {
        let table_end = (grains.start / self.shape.entries + 1) * self.shape.entries;
        let Some((at, _)) = self.entry_addresses(grains.start)? else {
            let end = grains.end.min(table_end);
            (grains.start..end).for_each(|grain| each(grain, Place::Absent));
            return Ok(Some(end - grains.start));
        };
        let in_slice = (slice_bytes - at % slice_bytes) / 4;
        let count = (grains.end.min(table_end) - grains.start).min(in_slice);
        let length = self.file.length();
        let shown = tables.get(at, (count * 4) as usize, |bytes| {
            for (grain, entry) in (grains.start..).zip(directory::numbers(bytes)) {
                match Place::of(&self.shape, entry, length) {
                    Ok(place) => each(grain, place),
                    Err(_) if grain > grains.start => return Ok(grain - grains.start),
                    Err(problem) => {
                        let damage = directory::Damage { number: grain, entry, problem };
                        return Err(self.damaged(damage));
                    }
                }
            }
            Ok(count)
        });
        shown.transpose()
    }

    /// What the entry of a grain says, loaded if need be.
    ///
    /// # Errors
    /// I/O; damage.
    pub async fn place_of(&self, tables: &Tables, grain: u64) -> Result<Place, Error> {
        let mut found = Place::Absent;
        loop {
            if self.look(tables, 4, grain..grain + 1, |_, place| found = place)?.is_some() {
                return Ok(found);
            }
            self.load(tables, grain).await?;
        }
    }

    /// Brings the entry of a grain into memory.
    ///
    /// # Errors
    /// I/O; damage.
    pub async fn load(&self, tables: &Tables, grain: u64) -> Result<(), Error> {
        match self.entry_addresses(grain)? {
            Some((at, _)) => tables.load(at).await,
            None => Ok(()),
        }
    }

    /// Sets the entry of a grain, which has a table.
    ///
    /// # Errors
    /// I/O. The entry is the old one or the new one.
    pub async fn set(&self, tables: &Tables, grain: u64, entry: u32, order: Order) -> Result<(), Error> {
        let Some((first, copy)) = self.entry_addresses(grain)? else {
            return Err(self.damaged(format!("grain {grain} has no grain table")));
        };
        self.set_both(tables, (first, copy), entry, order).await
    }

    async fn set_both(
        &self,
        tables: &Tables,
        (first, copy): (u64, Option<u64>),
        entry: u32,
        order: Order,
    ) -> Result<(), Error> {
        let entry = entry.to_le_bytes();
        let halves = self.writable.as_ref().map(|writable| &writable.halves);
        halves.inspect(|halves| halves.set(halves.get() + 1));
        // Setting what is set already changes nothing.
        while !(tables.set(first, &entry, order) && copy.is_none_or(|copy| tables.set(copy, &entry, order))) {
            tables.prepare(first, 4).await?;
            if let Some(copy) = copy {
                tables.prepare(copy, 4).await?;
            }
        }
        halves.inspect(|halves| halves.set(halves.get() - 1));
        Ok(())
    }

    /// The part of an extent that is opened for writing.
    ///
    /// # Errors
    /// It is not.
    pub fn writable(&self) -> Result<&Writable, Error> {
        self.writable.as_ref().ok_or_else(|| {
            Error::new(ErrorKind::ReadOnly, format!("{} was opened read-only", self.file.name()))
        })
    }

    /// A clean place for a grain, and whether its zeroes are durable. `reuse`: one that was taken for it before will do, when it
    /// was made zero again; `late` waits for that even when the caller goes away.
    ///
    /// # Errors
    /// No space; I/O.
    pub async fn take(
        &self,
        tables: &Tables,
        grain: u64,
        reuse: bool,
        late: &crate::late::Late,
    ) -> Result<(u64, bool), Error> {
        let writable = self.writable()?;
        let old = if reuse { writable.abandoned.borrow_mut().remove(&grain) } else { None };
        if let Some(place) = old {
            let zeroed = late.finish(self.file.zero(place..place + self.shape.grain)).await;
            if zeroed.is_err() {
                writable.abandoned.borrow_mut().insert(grain, place);
            }
            return zeroed.map(|()| (place, false));
        }
        self.take_clean(tables, self.shape.grain).await.map(|place| (place, true))
    }

    pub(super) async fn take_clean(&self, tables: &Tables, len: u64) -> Result<u64, Error> {
        let writable = self.writable()?;
        loop {
            match writable.reserve.take(len) {
                Some(place) => return Ok(place),
                None => writable.reserve.refill(len, tables).await?,
            }
        }
    }

    /// Makes sure that a grain has a table; a new one is of zeroes, which say what no table says. The directories are written at once,
    /// the copy first: nobody must find a table without a copy of it.
    ///
    /// # Errors
    /// No space; I/O.
    pub async fn own_table(
        &self,
        tables: &Tables,
        grain: u64,
        late: &crate::late::Late,
    ) -> Result<(), Error> {
        if self.entry_addresses(grain)?.is_some() {
            return Ok(());
        }
        let writable = self.writable()?;
        let _turn = writable.tables_turn.lock().await;
        if self.entry_addresses(grain)?.is_some() {
            return Ok(());
        }
        let bytes = self.shape.table_bytes();
        let copies = if self.shape.redundant.get().is_some() { 2 } else { 1 };
        let len = (bytes * copies).next_multiple_of(self.shape.grain);
        let place = self.take_clean(tables, len).await?;
        self.note_used(place + len);
        tables.forget(address(self.tables_file, place)..address(self.tables_file, place + len));
        let index = grain / self.shape.entries;
        let sector = |at: u64| (at / SECTOR) as u32;
        let entries =
            [(self.shape.redundant.get(), place + bytes), (Some(self.shape.directory.get()), place)];
        for (directory, table) in entries {
            let Some(at) = directory else { continue };
            let entry = Buf::copy_of(&sector(table).to_le_bytes());
            late.finish(self.file.write(at + index * 4, entry)).await?;
            self.file.flush().await?;
        }
        let mut directory = self.directory.borrow_mut();
        directory.first[index as usize] = sector(place);
        if let Some(entry) = directory.copy.get_mut(index as usize) {
            *entry = sector(place + bytes);
        }
        Ok(())
    }

    /// The file is referred to up to `end`.
    pub fn note_used(&self, end: u64) {
        if let Some(writable) = &self.writable {
            writable.used_end.set(writable.used_end.get().max(end));
        }
    }

    /// The entry of a grain at `place` was removed, and its bytes were given to the store.
    pub fn release(&self, grain: u64, place: u64) {
        if let Some(writable) = &self.writable {
            writable.given_up.set(true);
            // Left there by a commit that failed behind the change of the entry.
            writable.abandoned.borrow_mut().remove(&grain);
            writable.reserve.release(place);
        }
    }

    /// Marks the header as not cleanly closed, durably, before the first change of a table.
    ///
    /// # Errors
    /// I/O.
    pub async fn mark(&self) -> Result<(), Error> {
        let writable = self.writable()?;
        if writable.marked.get() {
            return Ok(());
        }
        let _turn = writable.mark_turn.lock().await;
        if !writable.marked.get() {
            self.file.write(self.shape.unclean_at(), Buf::copy_of(&[1])).await?;
            self.file.flush().await?;
            writable.marked.set(true);
        }
        Ok(())
    }

    /// Ends the use of the extent: its tables are written and durable. The unused rest of the reserve and the mark go.
    ///
    /// # Errors
    /// I/O.
    pub async fn close(&self) -> Result<(), Error> {
        let Some(writable) = self.writable.as_ref().filter(|writable| writable.marked.get()) else {
            return Ok(());
        };
        let mut end = writable.used_end.get();
        if writable.given_up.get() {
            let directory = self.directory.borrow().clone();
            end = directory::walk(&self.file, &self.shape, &directory).await?.end;
        }
        writable.reserve.close(end).await?;
        if writable.halves.get() == 0 {
            self.file.flush().await?;
            self.file.write(self.shape.unclean_at(), Buf::copy_of(&[0])).await?;
            writable.marked.set(false);
        }
        self.file.flush().await
    }
}

impl Writable {
    async fn open(file: &Rc<dyn ImageFile>, shape: &Shape, directory: &Directory) -> Result<Writable, Error> {
        let name = file.name();
        if file.is_device() {
            return Err(Error::unsupported(
                name,
                "writing to a sparse extent on a block device: it has no end to grow at",
            ));
        }
        let walk = match shape.stream {
            // It is new.
            true => directory::Walk { end: file.length(), ..directory::Walk::default() },
            false => directory::walk(file, shape, directory).await?,
        };
        if let Some(damage) = walk.damages.first() {
            let total = walk.damages_total;
            let what = format!(
                "{damage} ({total} such entries); it can be opened read-only, or repaired by `blktapd image repair`"
            );
            return Err(Error::corrupt(name, what));
        }
        if shape.unclean
            && shape.redundant.get().is_some()
            && directory::make_equal(file, shape, directory).await? > 0
        {
            file.flush().await?;
        }
        Ok(Writable {
            reserve: Reserve::new(file.clone(), shape, walk.end, walk.free),
            append: Cell::new(file.length().next_multiple_of(SECTOR)),
            used_end: Cell::new(walk.end),
            given_up: Cell::new(false),
            abandoned: RefCell::default(),
            marked: Cell::new(shape.unclean),
            mark_turn: async_lock::Mutex::new(()),
            tables_turn: async_lock::Mutex::new(()),
            halves: Cell::new(0),
        })
    }
}
