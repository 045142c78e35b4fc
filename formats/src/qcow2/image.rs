//! An opened image: its tables in memory, look-ups in them, and the first change.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::ops::Range;
use std::rc::Rc;

use super::bitmap::{self, Bitmap};
use super::clusters::Reserve;
use super::header::{self, Geometry, Header, TablePlace};
use super::l1::L1Entry;
use super::l2::{Entry, State};
use super::plan::{Joined, Piece};
use crate::codec::Decoded;
use crate::crypt::PayloadCipher;
use crate::driver::{Extent, FileIndex, Place, push_extent};
use crate::error::{Error, ErrorKind};
use crate::file::{Buf, ImageFile, Pending};
use crate::late::Late;
use crate::metadata::{SLICE_BYTES, Tables};
use crate::unsettled::Unsettled;

/// The image's own file.
pub(super) const IMAGE_FILE: FileIndex = FileIndex(0);
/// The external data file.
pub(super) const DATA_FILE: FileIndex = FileIndex(1);

/// See the module.
pub(super) struct Image {
    /// The image's file.
    pub file: Rc<dyn ImageFile>,
    /// The external data file.
    pub data: Option<Rc<dyn ImageFile>>,
    /// How payload is encrypted.
    pub cipher: Option<PayloadCipher>,
    /// Constant properties.
    pub geometry: Geometry,
    /// The header as it was at the open.
    pub header: Header,
    /// Bitmaps that a change makes stale.
    pub bitmaps: Vec<Bitmap>,
    /// Why a resize has to be refused.
    pub fixed_size: Option<&'static str>,
    /// Changes are allowed.
    pub writable: bool,
    /// Bytes of the layer below; 0: there is none.
    pub below: u64,
    /// Bytes of the disk.
    pub size: Cell<u64>,
    /// The L1 table that is served.
    pub l1: Rc<Cell<TablePlace>>,
    /// The refcount table.
    pub reftable: Rc<Cell<TablePlace>>,
    /// L1 and L2 tables.
    pub maps: Rc<Tables>,
    /// Refcount table and blocks: without a log, since they are flushed ahead of their use.
    pub refs: Rc<Tables>,
    /// Metadata at a known place: nothing else may point there.
    pub fixed: RefCell<Vec<Range<u64>>>,
    /// Clusters in reserve, and those on their way back.
    pub reserve: Reserve,
    /// Held by who adds or moves L2 tables or moves the L1 table. Taken before `refcounts`.
    pub tables_turn: async_lock::Mutex<()>,
    /// Held by who changes refcounts.
    pub refcounts_turn: async_lock::Mutex<()>,
    /// What plans that are out will do.
    pub plans: RefCell<HashMap<u64, Vec<Piece>, foldhash::fast::FixedState>>,
    /// Number of the next plan.
    pub next_plan: Cell<u64>,
    /// Clusters that got a place and no entry yet, by their number on the disk: plans for other subclusters join them.
    pub joined: RefCell<HashMap<u64, Joined, foldhash::fast::FixedState>>,
    /// Clusters of the disk whose entry was changed and is not safe against the death of the process yet, with the number of commits
    /// that will make it so: a write to such a place must not be acknowledged before, so map does not call them in place.
    pub unsettled: Unsettled,
    /// Operations whose caller went away before they ended: nothing may rely on their range until they have.
    pub late: Late,
    /// Clusters that were decoded last.
    pub decoded: Rc<Decoded>,
    /// Held for reading by who reads encoded bytes: with subclusters a cluster may get another place meanwhile.
    pub encoded_reads: async_lock::RwLock<()>,
    change_turn: async_lock::Mutex<()>,
    changed: Cell<bool>,
}

/// Bytes of a slice of the tables of an image.
pub(super) fn slice_bytes(geometry: &Geometry) -> usize {
    SLICE_BYTES.min(geometry.cluster() as usize)
}

/// What an image is made of, for [`Image::new`].
pub(super) struct Parts {
    pub file: Rc<dyn ImageFile>,
    pub data: Option<Rc<dyn ImageFile>>,
    pub cipher: Option<PayloadCipher>,
    pub header: Header,
    pub bitmaps: Vec<Bitmap>,
    pub fixed_size: Option<&'static str>,
    pub writable: bool,
    pub below: u64,
    pub size: u64,
    pub l1: TablePlace,
    pub fixed: Vec<Range<u64>>,
    pub budget: Rc<crate::driver::Budget>,
    pub log: Option<Rc<dyn crate::driver::AllocationLog>>,
}

impl Image {
    pub fn new(parts: Parts) -> Image {
        let Parts { file, data, cipher, header, budget, log, .. } = parts;
        let geometry = header.geometry;
        let payload = vec![data.clone().unwrap_or_else(|| file.clone())];
        let slice = slice_bytes(&geometry);
        Image {
            maps: Tables::new(file.clone(), IMAGE_FILE, payload, slice, &budget, log),
            refs: Tables::new(file.clone(), IMAGE_FILE, Vec::new(), slice, &budget, None),
            reftable: Rc::new(Cell::new(header.reftable)),
            cipher,
            geometry,
            header,
            bitmaps: parts.bitmaps,
            fixed_size: parts.fixed_size,
            writable: parts.writable,
            below: parts.below,
            size: Cell::new(parts.size),
            l1: Rc::new(Cell::new(parts.l1)),
            fixed: RefCell::new(parts.fixed),
            reserve: Reserve::default(),
            tables_turn: async_lock::Mutex::new(()),
            refcounts_turn: async_lock::Mutex::new(()),
            plans: RefCell::default(),
            next_plan: Cell::new(1),
            joined: RefCell::default(),
            unsettled: Unsettled::default(),
            late: Late::default(),
            decoded: Decoded::new(&budget),
            encoded_reads: async_lock::RwLock::new(()),
            change_turn: async_lock::Mutex::new(()),
            changed: Cell::new(false),
            file,
            data,
        }
    }

    /// Lets a table be served from a new place: `switch` writes that into the header. Believed at once, and taken back when the write
    /// fails: file and memory have the same table whether the caller waits or goes away.
    pub async fn switch_table(
        &self,
        table: &Rc<Cell<TablePlace>>,
        new: TablePlace,
        switch: Pending<'static, ()>,
    ) -> Result<(), Error> {
        let (table, old) = (table.clone(), table.replace(new));
        let switched = async move {
            let result = switch.await;
            if result.is_err() {
                table.set(old);
            }
            result
        };
        self.late.finish(Box::pin(switched)).await
    }

    /// Path, for messages.
    pub fn name(&self) -> &str {
        self.file.name()
    }

    /// The file that holds guest data.
    pub fn payload(&self) -> (FileIndex, &Rc<dyn ImageFile>) {
        match &self.data {
            Some(data) => (DATA_FILE, data),
            None => (IMAGE_FILE, &self.file),
        }
    }

    /// End of the file in whole clusters: a file may end within its last one.
    pub fn end(&self) -> u64 {
        self.geometry.round_up(self.file.length())
    }

    /// A table entry cannot be believed.
    pub fn damaged(&self, what: &str, guest: u64, why: &str) -> Error {
        let advice = "run a check; other ranges are served";
        Error::corrupt(
            self.name(),
            format!("the {what} entry for offset {guest} of the disk {why}: {advice}"),
        )
    }

    /// `offset` lies in metadata whose place is known.
    fn on_fixed(&self, offset: u64) -> bool {
        self.fixed.borrow().iter().any(|range| range.contains(&offset))
    }

    /// Offset of the L1 entry for an offset on the disk; `None` behind the end of the table.
    fn l1_entry_at(&self, guest: u64) -> Option<u64> {
        let index = guest / self.geometry.l2_covers();
        let l1 = self.l1.get();
        (index < l1.entries).then(|| l1.offset + index * 8)
    }

    /// The L1 entry for an offset on the disk, if it is in memory.
    pub fn l1_entry(&self, guest: u64, end: u64) -> Option<Result<L1Entry, Error>> {
        let Some(at) = self.l1_entry_at(guest) else { return Some(Ok(L1Entry { table: 0, copied: false })) };
        let word = self.maps.get_u64(at)?;
        let entry = L1Entry::decode(&self.geometry, word, end).map_err(|why| self.damaged("L1", guest, why));
        Some(entry.and_then(|entry| match entry.table != 0 && self.on_fixed(entry.table) {
            true => Err(self.damaged("L1", guest, "points to other metadata")),
            false => Ok(entry),
        }))
    }

    /// The L1 entry for an offset on the disk, loaded if need be.
    pub async fn load_l1_entry(&self, guest: u64) -> Result<L1Entry, Error> {
        loop {
            if let Some(entry) = self.l1_entry(guest, self.end()) {
                return entry;
            }
            if let Some(at) = self.l1_entry_at(guest) {
                self.maps.load(at).await?;
            }
        }
    }

    /// Changes the L1 entry for an offset on the disk.
    pub async fn set_l1_entry(&self, guest: u64, entry: L1Entry) -> Result<(), Error> {
        let Some(at) = self.l1_entry_at(guest) else {
            return Err(self.damaged("L1", guest, "lies behind the end of the table"));
        };
        self.maps.update(at, &entry.encode().to_be_bytes(), crate::driver::Order::Anytime).await
    }

    /// Offset of the L2 entry for an offset on the disk.
    pub fn l2_entry_at(&self, table: u64, guest: u64) -> u64 {
        table + guest % self.geometry.l2_covers() / self.geometry.cluster() * self.geometry.entry_bytes()
    }

    /// Decodes an L2 entry and checks that it points to no metadata that we know of.
    fn checked_entry(&self, bytes: &[u8], table: u64, guest: u64, end: u64) -> Result<Entry, Error> {
        let entry =
            Entry::decode(&self.geometry, bytes, guest, end).map_err(|why| self.damaged("L2", guest, why))?;
        if let (Some(host), false) = (entry.host, self.geometry.data_file)
            && (host == table || self.on_fixed(host))
        {
            return Err(self.damaged("L2", guest, "points to metadata"));
        }
        if let Some(place) = entry.compressed
            && (self.on_fixed(place.offset) || self.on_fixed(place.offset + place.len - 1))
        {
            return Err(self.damaged("L2", guest, "points to metadata"));
        }
        Ok(entry)
    }

    /// The L2 entry at `at` for the cluster `guest` of the disk, loaded if need be.
    pub async fn load_l2_entry(&self, table: u64, guest: u64) -> Result<Entry, Error> {
        let at = self.l2_entry_at(table, guest);
        let cluster_start = guest & !(self.geometry.cluster() - 1);
        loop {
            let end = self.end();
            let look = |bytes: &[u8]| self.checked_entry(bytes, table, cluster_start, end);
            if let Some(entry) = self.maps.get(at, self.geometry.entry_bytes() as usize, look) {
                return entry;
            }
            self.maps.load(at).await?;
        }
    }

    /// Changes the L2 entry of the cluster `guest` in the table at `table`: `change` is shown the entry and says what becomes of it,
    /// `None` for nothing. Returns the entry that was replaced.
    ///
    /// `change` is asked again whenever something had to be awaited: an entry has a bit for each subcluster, and others may have set
    /// some of them in between.
    pub async fn change_l2_entry(
        &self,
        table: u64,
        guest: u64,
        order: crate::driver::Order,
        mut change: impl FnMut(&Entry) -> Option<Entry>,
    ) -> Result<Entry, Error> {
        let (at, len) = (self.l2_entry_at(table, guest), self.geometry.entry_bytes() as usize);
        loop {
            let old = self.load_l2_entry(table, guest).await?;
            // No await between the look at the entry and its change.
            let Some(new) = change(&old) else { return Ok(old) };
            if self.maps.set(at, &new.encode(&self.geometry)[..len], order) {
                return Ok(old);
            }
            self.maps.prepare(at, len).await?;
        }
    }

    /// See [`crate::driver::Driver::map`].
    pub fn map(&self, offset: u64, len: u64, out: &mut Vec<Extent>) -> Result<u64, Error> {
        let (stop, end) = (offset + len, self.end());
        let own = out.len();
        let mut at = offset;
        while at < stop {
            match self.map_some(at..stop, end, own, out) {
                Some(Ok(done)) => at = done,
                Some(Err(error)) if at == offset => return Err(error),
                Some(Err(_)) | None => break,
            }
        }
        Ok(at - offset)
    }

    /// Maps from the start of `range` on as far as one slice of an L2 table goes; returns where it stopped. `None`: not in memory.
    fn map_some(
        &self,
        range: Range<u64>,
        end: u64,
        own: usize,
        out: &mut Vec<Extent>,
    ) -> Option<Result<u64, Error>> {
        let geometry = &self.geometry;
        let covers = geometry.l2_covers();
        let stop = range.end.min((range.start / covers + 1) * covers);
        let table = match self.l1_entry(range.start, end)? {
            Ok(entry) if entry.table == 0 => {
                push_extent(out, own, range.start, stop - range.start, Place::Absent);
                return Some(Ok(stop));
            }
            Ok(entry) => entry.table,
            Err(error) => return Some(Err(error)),
        };
        let entry_bytes = geometry.entry_bytes();
        let entry_at = self.l2_entry_at(table, range.start);
        let slice = slice_bytes(geometry) as u64;
        let first = range.start & !(geometry.cluster() - 1);
        let entries =
            ((slice - entry_at % slice) / entry_bytes).min((stop - first).div_ceil(geometry.cluster()));
        self.maps.get(entry_at, (entries * entry_bytes) as usize, |bytes| {
            let mut guest = first;
            for bytes in bytes.chunks_exact(entry_bytes as usize) {
                match self.checked_entry(bytes, table, guest, end) {
                    Ok(entry) => self.push_entry(&entry, guest, range.start.max(guest)..stop, own, out),
                    Err(error) if guest <= range.start => return Err(error),
                    Err(_) => return Ok(guest),
                }
                guest += geometry.cluster();
            }
            Ok(guest.min(stop))
        })
    }

    /// Appends what an entry says of the part of the cluster at `guest` that is in `wanted`.
    #[inline]
    fn push_entry(&self, entry: &Entry, guest: u64, wanted: Range<u64>, own: usize, out: &mut Vec<Extent>) {
        let cluster_end = (guest + self.geometry.cluster()).min(wanted.end);
        let granule = self.geometry.granule();
        let in_place = self.writable && entry.copied && !self.unsettled.has(guest) && self.late.is_empty();
        let mut at = wanted.start;
        while at < cluster_end {
            let sub = ((at - guest) / granule) as u32;
            let run = entry.run(sub, self.geometry.subclusters());
            let run_end = (guest + u64::from(sub + run) * granule).min(cluster_end);
            let place = match (entry.state(sub), entry.host) {
                (State::Data, Some(host)) => {
                    Place::Data { file: self.payload().0, offset: host + (at - guest), in_place }
                }
                (State::Zero, host) => Place::Zero { allocated: host.is_some() },
                (State::Compressed, _) => Place::Encoded,
                (State::Data | State::Absent, _) => Place::Absent,
            };
            push_extent(out, own, at, run_end - at, place);
            at = run_end;
        }
    }

    /// See [`crate::driver::Driver::load`].
    pub async fn load(&self, offset: u64) -> Result<(), Error> {
        let table = self.load_l1_entry(offset).await?.table;
        if table != 0 {
            self.maps.load(self.l2_entry_at(table, offset)).await?;
        }
        Ok(())
    }

    /// To be called before every change: the first one drops features that we do not know (the specification's meaning of
    /// *autoclear*) and marks bitmaps.
    pub async fn begin_changes(&self) -> Result<(), Error> {
        if self.changed.get() {
            return Ok(());
        }
        if !self.writable {
            let message = format!("{} was opened read-only", self.name());
            return Err(Error::new(ErrorKind::ReadOnly, message));
        }
        let _turn = self.change_turn.lock().await;
        if self.changed.get() {
            return Ok(());
        }
        let mut kept = self.header.autoclear & header::AUTOCLEAR_KNOWN;
        if self.header.extensions.bitmaps.is_none() {
            kept &= !header::BITMAPS;
        }
        let drops = kept != self.header.autoclear;
        if drops {
            self.file.write(88, Buf::copy_of(&kept.to_be_bytes())).await?;
        }
        bitmap::mark_in_use(&self.file, &self.bitmaps).await?;
        if drops || !self.bitmaps.is_empty() {
            self.file.flush().await?;
        }
        self.changed.set(true);
        Ok(())
    }

    /// Replaces the known place of a piece of metadata.
    pub fn move_fixed(&self, old: Range<u64>, new: Range<u64>) {
        let mut fixed = self.fixed.borrow_mut();
        fixed.retain(|range| *range != old);
        fixed.push(new);
    }

    /// True when the layer below has bytes from `guest` on.
    pub fn below_has(&self, guest: u64) -> bool {
        guest < self.below
    }
}
