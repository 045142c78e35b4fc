//! A chain of images as one disk: carries out what drivers plan. The daemon's shards, the offline tools and the tests run this
//! same code; they differ in their [`Payload`] and their [`ImageFile`]s.
//!
//! ```text
//!  read   lock(Read) ─ map, from the top layer down ─ (load, map again) ─▶ pieces ─▶ payload
//!  write  lock(Write) ─ all in place? ─▶ payload to file
//!           └ no: lock(Allocate) ─ plan_write ─ fills ─▶ payload (and what is around it) to file ─ commit | abort
//!  erase  edges are written as zeroes ─ whole granules: lock(Erase) ─ driver.erase
//! ```
//! Payload of a layer with a [`Driver::cipher`] goes through memory of our own: read, decrypted, put; got, encrypted, written. A write
//! of a part of a sector reads what is around it first, while nobody else has the sector.
//!
//! The fast paths are synchronous ([`Volume::map_read`], [`Volume::map_write`]): a shard asks them first and makes a future only
//! when they cannot answer from memory. Only the top layer is ever changed.
//!
//! No poll of these futures is long, however long the request's range: what can go on without waiting yields now and then.

use std::cell::{Cell, RefCell};
use std::ops::Range;
use std::rc::Rc;

use futures_lite::future::yield_now;

use crate::crypt::{PayloadCipher, Spot};
use crate::driver::{Driver, Erase, Erased, Extent, FileIndex, Fill, Place, Plan, Under, Usage};
use crate::error::{Error, ErrorKind};
use crate::file::{Buf, ImageFile, Pending, is_zero};
use crate::locks::{RangeGuard, RangeLocks, Use};

/// Layers of a chain, at most.
pub const DEPTH_MAX: usize = 64;

/// Bytes that copies around payloads may hold at a time, per disk; one copy may be larger.
const COPY_BYTES_MAX: usize = 8 << 20;

/// One image of a chain.
#[derive(Clone)]
pub struct Layer {
    /// Its driver.
    pub driver: Rc<dyn Driver>,
    /// Its files, as the driver numbers them.
    pub files: Vec<Rc<dyn ImageFile>>,
}

/// A file of a volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct FileId {
    /// Layer, 0 is the top.
    pub layer: u16,
    /// File of its driver.
    pub file: FileIndex,
}

/// A stretch of a disk and where a read finds it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// First byte of the disk.
    pub start: u64,
    /// Bytes.
    pub len: u64,
    /// Where.
    pub source: Source,
}

/// Where a read finds bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// In a file.
    File {
        /// Which.
        id: FileId,
        /// Byte offset.
        offset: u64,
    },
    /// They are zero.
    Zero,
    /// A driver decodes them.
    Encoded {
        /// Layer.
        layer: u16,
    },
}

/// The memory of one request. Offsets count from its first byte. The files are those of [`Layer::files`]; an implementation may
/// move bytes between them and its memory without a copy.
pub trait Payload {
    /// Fills `len` bytes at `at` from a file.
    fn read(&self, file: FileId, offset: u64, at: usize, len: usize) -> Pending<'_, ()>;

    /// Stores `len` bytes at `at` in a file.
    fn write(&self, file: FileId, offset: u64, at: usize, len: usize) -> Pending<'_, ()>;

    /// Copies bytes into the memory. Done at the latest when the request is.
    fn put(&self, at: usize, bytes: Buf);

    /// Copies bytes out of the memory.
    fn get(&self, at: usize, len: usize) -> Pending<'_, Buf>;

    /// Zeroes a part of the memory.
    fn zero(&self, at: usize, len: usize);
}

/// A disk: one or more layers, the first on top.
pub struct Volume {
    layers: Vec<Layer>,
    sizes: RefCell<Vec<u64>>,
    locks: RangeLocks,
    copies: async_lock::Semaphore,
    /// Commits that have failed, and how many of them a write-back has made good. As long as there are others, the map may know places
    /// that nobody would find after the death of the process.
    failed_commits: Cell<u64>,
    mended_commits: Cell<u64>,
    /// Extents of the layers, while a map walks down.
    scratch: RefCell<Vec<Vec<Extent>>>,
}

impl std::fmt::Debug for Volume {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Volume").field("layers", &self.layers.len()).field("size", &self.size()).finish()
    }
}

/// Answers of several operations: all are awaited, the first error is kept.
async fn all(operations: Vec<Pending<'_, ()>>) -> Result<(), Error> {
    let mut result = Ok(());
    for operation in operations {
        let one = operation.await;
        result = result.and(one);
    }
    result
}

impl Volume {
    /// A disk of these layers, the first on top; at least one and at most [`DEPTH_MAX`].
    ///
    /// # Errors
    /// Too many layers, or none.
    pub fn new(layers: Vec<Layer>) -> Result<Volume, Error> {
        if layers.is_empty() || layers.len() > DEPTH_MAX {
            return Err(Error::invalid(format!(
                "a chain of {} images: from 1 to {DEPTH_MAX} are possible; `image coalesce` shortens a chain",
                layers.len()
            )));
        }
        let sizes = layers.iter().map(|layer| layer.driver.size()).collect();
        let scratch = RefCell::new(vec![Vec::new(); layers.len()]);
        Ok(Volume {
            layers,
            sizes: RefCell::new(sizes),
            locks: RangeLocks::new(),
            copies: async_lock::Semaphore::new(COPY_BYTES_MAX / COPY_UNIT),
            failed_commits: Cell::new(0),
            mended_commits: Cell::new(0),
            scratch,
        })
    }

    /// Bytes of the disk.
    pub fn size(&self) -> u64 {
        self.sizes.borrow()[0]
    }

    /// The layers, the first on top.
    pub fn layers(&self) -> &[Layer] {
        &self.layers
    }

    /// The granule of the top layer, in bytes.
    pub fn granule(&self) -> u64 {
        self.layers[0].driver.granule()
    }

    /// A file of a layer.
    pub fn file(&self, id: FileId) -> Option<&Rc<dyn ImageFile>> {
        self.layers.get(usize::from(id.layer))?.files.get(usize::from(id.file.0))
    }

    /// How the payload of a layer is encrypted.
    pub fn cipher(&self, layer: u16) -> Option<&PayloadCipher> {
        self.layers.get(usize::from(layer))?.driver.cipher()
    }

    /// Figures of all layers together.
    pub fn usage(&self) -> Usage {
        self.layers.iter().map(|layer| layer.driver.usage()).fold(Usage::default(), |sum, one| Usage {
            cache_hits: sum.cache_hits + one.cache_hits,
            cache_misses: sum.cache_misses + one.cache_misses,
            cache_bytes: sum.cache_bytes + one.cache_bytes,
            pending_mappings: sum.pending_mappings + one.pending_mappings,
        })
    }

    fn check_range(&self, offset: u64, len: u64) -> Result<(), Error> {
        if offset.checked_add(len).is_some_and(|end| end <= self.size()) {
            return Ok(());
        }
        let size = self.size();
        Err(Error::invalid(format!("{len} bytes at {offset} are not inside the disk of {size} bytes")))
    }

    /// Keeps a range from being erased while it is read from or written to at the places that a map named. `None`: somebody is
    /// in the way, take the slow path.
    pub fn try_hold(&self, offset: u64, len: u64, write: bool) -> Option<RangeGuard> {
        self.locks.try_take(offset..offset + len, if write { Use::Write } else { Use::Read })
    }

    /// Where a read finds `len` bytes at `offset`, from memory: appends to `out` and returns how many bytes that covers; 0 when
    /// something has to be read first. The caller holds the range.
    ///
    /// # Errors
    /// Damaged tables at `offset`.
    pub fn map_read(&self, offset: u64, len: u64, out: &mut Vec<Piece>) -> Result<u64, Error> {
        self.map_below(0, offset, len, out)
    }

    /// [`Volume::map_read`] of the layers from `layer` on.
    fn map_below(&self, layer: usize, offset: u64, len: u64, out: &mut Vec<Piece>) -> Result<u64, Error> {
        let Some(&size) = self.sizes.borrow().get(layer) else {
            push_piece(out, offset, len, Source::Zero);
            return Ok(len);
        };
        // A layer may be smaller than the one above it: behind its end there are zeroes.
        let inside = size.saturating_sub(offset).min(len);
        if inside > 0 {
            let mut extents = std::mem::take(&mut self.scratch.borrow_mut()[layer]);
            extents.clear();
            let covered = self.layers[layer].driver.map(offset, inside, &mut extents);
            let walked = covered.and_then(|covered| {
                let done = self.walk(layer, &extents, out)?;
                Ok((covered, done))
            });
            self.scratch.borrow_mut()[layer] = extents;
            let (covered, done) = walked?;
            if done < covered || covered < inside {
                return Ok(done);
            }
        }
        push_piece(out, offset + inside, len - inside, Source::Zero);
        Ok(len)
    }

    /// Turns extents of a layer into pieces; returns how many bytes that covers.
    fn walk(&self, layer: usize, extents: &[Extent], out: &mut Vec<Piece>) -> Result<u64, Error> {
        let mut done = 0;
        for extent in extents {
            let source = match extent.place {
                Place::Data { file, offset, .. } => {
                    Source::File { id: FileId { layer: layer as u16, file }, offset }
                }
                Place::Zero { .. } => Source::Zero,
                Place::Encoded => Source::Encoded { layer: layer as u16 },
                Place::Absent => {
                    let covered = match self.map_below(layer + 1, extent.start, extent.len, out) {
                        // What is before the damage can be read.
                        Err(_) if done > 0 => return Ok(done),
                        other => other?,
                    };
                    done += covered;
                    if covered < extent.len {
                        return Ok(done);
                    }
                    continue;
                }
            };
            push_piece(out, extent.start, extent.len, source);
            done += extent.len;
        }
        Ok(done)
    }

    /// Where `len` bytes at `offset` may be written at once, from memory: appends to `out` and returns true when *all* of them have
    /// their place and no metadata has to change. The caller holds the range.
    pub fn map_write(&self, offset: u64, len: u64, out: &mut Vec<Piece>) -> bool {
        self.is_settled() && self.map_in_place(offset, len, out)
    }

    /// Every place that the map knows is safe against the death of the process.
    fn is_settled(&self) -> bool {
        self.mended_commits.get() == self.failed_commits.get()
    }

    /// Sees to it that a write in place is as safe as the place.
    async fn settle(&self) -> Result<(), Error> {
        if !self.is_settled() {
            let failed = self.failed_commits.get();
            self.layers[0].driver.tidy().await?;
            self.mended_commits.set(failed.max(self.mended_commits.get()));
        }
        Ok(())
    }

    fn map_in_place(&self, offset: u64, len: u64, out: &mut Vec<Piece>) -> bool {
        let mut extents = std::mem::take(&mut self.scratch.borrow_mut()[0]);
        extents.clear();
        let covered = self.layers[0].driver.map(offset, len, &mut extents);
        let mut ok = covered == Ok(len);
        for extent in &extents {
            let Place::Data { file, offset, in_place: true } = extent.place else {
                ok = false;
                break;
            };
            let id = FileId { layer: 0, file };
            push_piece(out, extent.start, extent.len, Source::File { id, offset });
        }
        self.scratch.borrow_mut()[0] = extents;
        ok
    }

    /// Reads what [`Volume::map_read`] needs at `offset`.
    pub async fn load(&self, offset: u64, len: u64) -> Result<(), Error> {
        self.load_below(0, offset, len).await
    }

    async fn load_below(&self, first: usize, offset: u64, len: u64) -> Result<(), Error> {
        let mut len = len;
        for (index, layer) in self.layers.iter().enumerate().skip(first) {
            let size = self.sizes.borrow()[index];
            len = len.min(size.saturating_sub(offset));
            if len == 0 {
                return Ok(());
            }
            let mut extents = Vec::new();
            if layer.driver.map(offset, len, &mut extents)? == 0 {
                layer.driver.load(offset, len).await?;
                extents.clear();
                layer.driver.map(offset, len, &mut extents)?;
            }
            match extents.first() {
                Some(Extent { place: Place::Absent, len: absent, .. }) => len = *absent,
                _ => return Ok(()),
            }
        }
        Ok(())
    }

    /// Reads `len` bytes at `offset` into the payload.
    pub async fn read(&self, offset: u64, len: u64, payload: &dyn Payload) -> Result<(), Error> {
        self.check_range(offset, len)?;
        let _guard = self.locks.take(offset..offset + len, Use::Read).await;
        self.read_below(0, offset, len, payload).await
    }

    /// Reads from the layers from `layer` on; the payload's byte 0 is the disk's byte `offset`.
    async fn read_below(
        &self,
        layer: usize,
        offset: u64,
        len: u64,
        payload: &dyn Payload,
    ) -> Result<(), Error> {
        let (mut at, end) = (offset, offset + len);
        let mut pieces = Vec::new();
        while at < end {
            pieces.clear();
            let covered = self.map_below(layer, at, end - at, &mut pieces)?;
            if covered == 0 {
                self.load_below(layer, at, end - at).await?;
                continue;
            }
            self.read_pieces(&pieces, offset, payload).await?;
            at += covered;
        }
        Ok(())
    }

    /// Carries out a map: the payload's byte 0 is the disk's byte `origin`.
    async fn read_pieces(&self, pieces: &[Piece], origin: u64, payload: &dyn Payload) -> Result<(), Error> {
        let mut reads = Vec::new();
        for piece in pieces {
            let (at, len) = ((piece.start - origin) as usize, piece.len as usize);
            match piece.source {
                Source::File { id, offset } => match self.cipher(id.layer) {
                    None => reads.push(payload.read(id, offset, at, len)),
                    Some(cipher) => {
                        let spot = Spot { disk: piece.start, file: offset };
                        reads.push(self.read_encrypted(cipher, id, spot, at, len, payload));
                    }
                },
                Source::Zero => payload.zero(at, len),
                Source::Encoded { layer } => {
                    let range = piece.start..piece.start + piece.len;
                    let put = |start: u64, bytes| payload.put((start - origin) as usize, bytes);
                    if let Err(error) = self.decode(usize::from(layer), range, put).await {
                        // What was begun owns nothing of ours, but the caller's memory must be still when we answer.
                        let _ = all(reads).await;
                        return Err(error);
                    }
                }
            }
        }
        all(reads).await
    }

    /// Decodes a range of a layer, unit by unit: gives `put` the bytes with their offset on the disk.
    async fn decode(&self, layer: usize, range: Range<u64>, put: impl Fn(u64, Buf)) -> Result<(), Error> {
        let mut at = range.start;
        while at < range.end {
            let bytes = self.layers[layer].driver.decode(at..range.end).await?;
            let len = bytes.len() as u64;
            if len == 0 || len > range.end - at {
                return Err(Error::new(ErrorKind::Io(5), format!("a driver decoded {len} bytes at {at}")));
            }
            put(at, bytes);
            at += len;
        }
        Ok(())
    }

    /// Reads `len` bytes at `spot` into the payload's byte `at`, by the sectors that hold them.
    fn read_encrypted<'a>(
        &'a self,
        cipher: &'a PayloadCipher,
        id: FileId,
        spot: Spot,
        at: usize,
        len: usize,
        payload: &'a dyn Payload,
    ) -> Pending<'a, ()> {
        let unit = cipher.sector_bytes();
        let head = spot.disk % unit;
        let start = Spot { disk: spot.disk - head, file: spot.file - head };
        let sectors = (head + len as u64).next_multiple_of(unit) as usize;
        let Some(file) = self.file(id) else { return Box::pin(std::future::ready(Err(no_such_file()))) };
        let read = file.read(start.file, sectors);
        Box::pin(async move {
            let mut bytes = read.await?;
            cipher.decrypt(start, &mut bytes);
            if sectors > len {
                bytes = Buf::copy_of(&bytes[head as usize..][..len]);
            }
            payload.put(at, bytes);
            Ok(())
        })
    }

    /// Writes `len` bytes from the payload's byte `at` on to `spot` of the top layer: whole sectors, if it is encrypted.
    fn write_at<'a>(
        &'a self,
        id: FileId,
        spot: Spot,
        at: usize,
        len: usize,
        payload: &'a dyn Payload,
    ) -> Pending<'a, ()> {
        let Some(cipher) = self.cipher(id.layer) else { return payload.write(id, spot.file, at, len) };
        let bytes = payload.get(at, len);
        Box::pin(async move {
            let mut bytes = bytes.await?;
            cipher.encrypt(spot, &mut bytes);
            self.file(id).ok_or_else(no_such_file)?.write(spot.file, bytes).await
        })
    }

    /// Writes whole sectors of the cipher around a request that has parts of them.
    async fn write_merged(
        &self,
        offset: u64,
        len: u64,
        payload: &dyn Payload,
        unit: u64,
    ) -> Result<(), Error> {
        let sectors = offset & !(unit - 1)..(offset + len).next_multiple_of(unit);
        let granules = sectors.start & !(self.granule() - 1)..sectors.end.next_multiple_of(self.granule());
        // Who reads meanwhile would see neither the old nor the new bytes where blocks of a sector depend on each other.
        let guard = self.locks.take(granules, Use::Erase).await;
        let whole = (sectors.end - sectors.start) as usize;
        // Not counted as a copy: it would wait for room for the copies of its own fills.
        let memory = Memory::new(whole);
        let is_partial = |edge: &u64| *edge < offset || *edge + unit > offset + len;
        for edge in [sectors.start, sectors.end - unit].into_iter().filter(is_partial) {
            let window = Window { memory: &memory, volume: self, at: (edge - sectors.start) as usize };
            self.read_below(0, edge, unit, &window).await?;
        }
        memory.put((offset - sectors.start) as usize, &payload.get(0, len as usize).await?);
        let window = Window { memory: &memory, volume: self, at: 0 };
        self.write_parts(sectors.start, whole as u64, &window, guard).await
    }

    /// Writes `len` bytes at `offset` from the payload. Done means: safe against the death of the process, not yet against power
    /// loss.
    pub async fn write(&self, offset: u64, len: u64, payload: &dyn Payload) -> Result<(), Error> {
        self.check_range(offset, len)?;
        if let Some(cipher) = self.cipher(0).filter(|cipher| !cipher.is_whole(offset, len)) {
            return self.write_merged(offset, len, payload, cipher.sector_bytes()).await;
        }
        let mut pieces = Vec::new();
        {
            let _guard = self.locks.take(offset..offset + len, Use::Write).await;
            self.load_top(offset, len).await?;
            if self.map_in_place(offset, len, &mut pieces) {
                self.write_pieces(&pieces, offset, payload).await?;
                return self.settle().await;
            }
        }
        let granule = self.granule();
        let (start, end) = (offset & !(granule - 1), (offset + len).next_multiple_of(granule));
        let guard = self.locks.take(start..end, Use::Allocate).await;
        self.write_parts(offset, len, payload, guard).await
    }

    /// Loads tables of the top layer for a range, as far as they stay in memory.
    async fn load_top(&self, offset: u64, len: u64) -> Result<(), Error> {
        let driver = &self.layers[0].driver;
        let mut extents = Vec::new();
        if driver.map(offset, len, &mut extents)? == 0 {
            driver.load(offset, len).await?;
        }
        Ok(())
    }

    async fn write_pieces(&self, pieces: &[Piece], origin: u64, payload: &dyn Payload) -> Result<(), Error> {
        let writes = pieces.iter().filter_map(|piece| match piece.source {
            Source::File { id, offset } => {
                let spot = Spot { disk: piece.start, file: offset };
                Some(self.write_at(id, spot, (piece.start - origin) as usize, piece.len as usize, payload))
            }
            Source::Zero | Source::Encoded { .. } => None,
        });
        all(writes.collect()).await
    }

    /// Writes stretch by stretch: what has its place in place, the rest by plans.
    async fn write_parts(
        &self,
        offset: u64,
        len: u64,
        payload: &dyn Payload,
        guard: RangeGuard,
    ) -> Result<(), Error> {
        let driver = &self.layers[0].driver;
        let (mut at, end) = (offset, offset + len);
        let mut extents = Vec::new();
        while at < end {
            extents.clear();
            let covered = driver.map(at, end - at, &mut extents)?;
            if covered == 0 {
                driver.load(at, end - at).await?;
                continue;
            }
            let in_place = |extent: &Extent| matches!(extent.place, Place::Data { in_place: true, .. });
            let Some(first) = extents.first().map(in_place) else { continue };
            let run: u64 =
                extents.iter().take_while(|extent| in_place(extent) == first).map(|extent| extent.len).sum();
            if first {
                let mut pieces = Vec::new();
                for extent in extents.iter().take_while(|extent| in_place(extent)) {
                    if let Place::Data { file, offset, .. } = extent.place {
                        let id = FileId { layer: 0, file };
                        push_piece(&mut pieces, extent.start, extent.len, Source::File { id, offset });
                    }
                }
                self.write_pieces(&pieces, offset, payload).await?;
            } else {
                self.write_plan(at, run, offset, payload, &guard).await?;
            }
            at += run;
        }
        self.settle().await
    }

    /// Plans a stretch, carries the plan out, commits it.
    async fn write_plan(
        &self,
        at: u64,
        len: u64,
        origin: u64,
        payload: &dyn Payload,
        guard: &RangeGuard,
    ) -> Result<(), Error> {
        let driver = &self.layers[0].driver;
        let mut plan = Unfinished { driver, plan: Some(driver.plan_write(at, len).await?) };
        let Some(fills) = plan.plan.as_ref().map(|plan| &plan.fills) else { return Ok(()) };
        debug_assert!(fills.first().is_some_and(|fill| fill.range.start <= at));
        debug_assert!(fills.last().is_some_and(|fill| fill.range.end >= at + len));
        let replaces = fills.iter().any(|fill| matches!(fill.under, Under::Copied { .. } | Under::Decoded));
        let steps = fills
            .iter()
            .map(|fill| Box::pin(self.fill(fill, at..at + len, origin, payload)) as Pending<'_, ()>);
        all_at_once(steps.collect()).await?;
        if replaces {
            // The old place may be given up by the commit: who still reads there ends first.
            guard.become_erase().await;
        }
        let Some(plan) = plan.plan.take() else { return Ok(()) };
        let committed = driver.commit(plan).await;
        self.failed_commits.set(self.failed_commits.get() + u64::from(committed.is_err()));
        committed
    }

    /// Writes the part of a request that lies in a fill, and what the fill needs around it.
    async fn fill(
        &self,
        fill: &Fill,
        request: Range<u64>,
        origin: u64,
        payload: &dyn Payload,
    ) -> Result<(), Error> {
        let id = FileId { layer: 0, file: fill.file };
        let part = fill.range.start.max(request.start)..fill.range.end.min(request.end);
        let part_offset = fill.offset + (part.start - fill.range.start);
        let (part_at, part_len) = ((part.start - origin) as usize, (part.end - part.start) as usize);
        let whole = part == fill.range;
        let part_spot = Spot { disk: part.start, file: part_offset };
        if whole || fill.under == Under::Kept {
            return self.write_at(id, part_spot, part_at, part_len, payload).await;
        }
        let cipher = self.cipher(0);
        let len = (fill.range.end - fill.range.start) as usize;
        let _room = self.copy_room(len).await;
        let around = Memory::new(len);
        let edges = [fill.range.start..part.start, part.end..fill.range.end];
        // One read of all costs less than one of each side, if what lies between is no more than they are.
        let together = part_len <= len / 2 && edges.iter().all(|edge| !edge.is_empty());
        let reads = if together { vec![fill.range.clone()] } else { edges.to_vec() };
        for edge in reads.iter().filter(|edge| !edge.is_empty()) {
            let at = (edge.start - fill.range.start) as usize;
            let edge_len = edge.end - edge.start;
            match fill.under {
                Under::Kept | Under::Zeroes => {}
                Under::Below => {
                    let window = Window { memory: &around, volume: self, at };
                    self.read_below(1, edge.start, edge_len, &window).await?;
                }
                Under::Copied { file, offset } => {
                    let source = self.file(FileId { layer: 0, file }).ok_or_else(no_such_file)?;
                    let mut bytes = source.read(offset + at as u64, edge_len as usize).await?;
                    if let Some(cipher) = cipher {
                        cipher.decrypt(Spot { disk: edge.start, file: offset + at as u64 }, &mut bytes);
                    }
                    around.put(at, &bytes);
                }
                Under::Decoded => {
                    let put =
                        |start: u64, bytes: Buf| around.put((start - fill.range.start) as usize, &bytes);
                    self.decode(0, edge.clone(), put).await?;
                }
            }
        }
        let inside = |edge: &Range<u64>| {
            (edge.start - fill.range.start) as usize..(edge.end - fill.range.start) as usize
        };
        if fill.under == Under::Below
            && cipher.is_none()
            && edges.iter().all(|edge| around.is_zero(inside(edge)))
        {
            // The place reads as zero already.
            return self.write_at(id, part_spot, part_at, part_len, payload).await;
        }
        let mut bytes = around.take();
        let at = (part.start - fill.range.start) as usize;
        bytes[at..at + part_len].copy_from_slice(&payload.get(part_at, part_len).await?);
        if let Some(cipher) = cipher {
            cipher.encrypt(Spot { disk: fill.range.start, file: fill.offset }, &mut bytes);
        }
        let file = self.file(id).ok_or_else(no_such_file)?;
        file.write(fill.offset, bytes).await
    }

    /// Stores encoded units, see [`Driver::write_encoded`].
    pub async fn write_encoded(&self, units: Vec<(u64, Vec<u8>)>) -> Result<(), Error> {
        let top = &self.layers[0].driver;
        let unit = top.encoding().map_or(1, |encoding| encoding.unit);
        let (Some((first, _)), Some((last, _))) = (units.first(), units.last()) else { return Ok(()) };
        let sound = units.windows(2).all(|pair| pair[0].0 < pair[1].0)
            && units.iter().all(|(at, _)| at.is_multiple_of(unit));
        if !sound || *last >= self.size() {
            return Err(Error::invalid("encoded units are whole, ascending and inside the disk"));
        }
        // Their old places may be given up.
        let _guard = self.locks.take(*first..*last + unit, Use::Erase).await;
        let written = top.write_encoded(units).await;
        self.failed_commits.set(self.failed_commits.get() + u64::from(written.is_err()));
        written
    }

    /// Waits until a copy of `len` bytes fits into what copies may hold.
    async fn copy_room(&self, len: usize) -> Vec<async_lock::SemaphoreGuard<'_>> {
        let mut room = Vec::new();
        // One copy takes at most half, so that two never wait for each other with everything taken.
        for _ in 0..len.div_ceil(COPY_UNIT).min(COPY_BYTES_MAX / COPY_UNIT / 2) {
            match self.copies.try_acquire() {
                Some(unit) => room.push(unit),
                None if room.is_empty() => room.push(self.copies.acquire().await),
                None => break,
            }
        }
        room
    }

    /// Discards or zeroes a range of any alignment.
    pub async fn erase(&self, offset: u64, len: u64, how: Erase) -> Result<(), Error> {
        self.check_range(offset, len)?;
        let (granule, end) = (self.granule(), offset + len);
        // The last granule of a disk may be a part of one: it counts as whole.
        let inner_end = if end == self.size() { end } else { end & !(granule - 1) };
        let inner = offset.next_multiple_of(granule).min(end)..inner_end;
        if inner.start >= inner.end {
            return self.write_zeroes(offset, len, how).await;
        }
        self.write_zeroes(offset, inner.start - offset, how).await?;
        self.write_zeroes(inner.end, end - inner.end, how).await?;
        // In bounded steps, so that others get in between.
        let mut at = inner.start;
        while at < inner.end {
            let step = at..inner.end.min(at + ERASE_STEP.min(granule * ERASE_GRANULES).max(granule));
            let erased = {
                let _guard = self.locks.take(step.clone(), Use::Erase).await;
                self.layers[0].driver.erase(step.clone(), how).await?
            };
            if erased == Erased::WriteZeroes {
                self.write_zeroes(step.start, step.end - step.start, how).await?;
            }
            at = step.end;
            if at < inner.end {
                yield_now().await;
            }
        }
        Ok(())
    }

    /// Writes zeroes as data, except where there are zeroes. A discard has nothing to write.
    async fn write_zeroes(&self, offset: u64, len: u64, how: Erase) -> Result<(), Error> {
        if how == Erase::Discard || len == 0 {
            return Ok(());
        }
        let (mut at, end) = (offset, offset + len);
        for round in 1_u64.. {
            if at >= end {
                break;
            }
            if round.is_multiple_of(ZERO_RUNS) {
                yield_now().await;
            }
            let run = (end - at).min(ZERO_RUN);
            let mut pieces = Vec::new();
            let covered = {
                let _guard = self.locks.take(at..at + run, Use::Read).await;
                self.map_read(at, run, &mut pieces)?
            };
            if covered == 0 {
                self.load(at, run).await?;
                continue;
            }
            for piece in pieces {
                if piece.source != Source::Zero || how == Erase::ZeroKeep {
                    let memory = Memory::new(piece.len as usize);
                    let window = Window { memory: &memory, volume: self, at: 0 };
                    self.write(piece.start, piece.len, &window).await?;
                }
            }
            at += covered;
        }
        Ok(())
    }

    /// Makes everything durable that was answered before.
    pub async fn flush(&self) -> Result<(), Error> {
        let top = &self.layers[0];
        top.driver.flush().await?;
        all(top.files.iter().filter(|file| file.is_writable()).map(|file| file.flush()).collect()).await
    }

    /// Writes back what only memory and log have.
    pub async fn tidy(&self) -> Result<(), Error> {
        self.layers[0].driver.tidy().await
    }

    /// Changes the size of the disk, in bytes.
    pub async fn resize(&self, size: u64) -> Result<(), Error> {
        let _guard = self.locks.take(0..u64::MAX, Use::Erase).await;
        self.layers[0].driver.resize(size).await?;
        self.sizes.borrow_mut()[0] = self.layers[0].driver.size();
        Ok(())
    }

    /// Ends the use of all layers. Waits for what is under way.
    pub async fn close(&self) -> Result<(), Error> {
        let _guard = self.locks.take(0..u64::MAX, Use::Erase).await;
        let mut result = Ok(());
        for layer in &self.layers {
            let one = layer.driver.close().await;
            result = result.and(one);
        }
        result
    }
}

/// Unit of [`COPY_BYTES_MAX`].
const COPY_UNIT: usize = 64 << 10;
/// Bytes that one erase keeps others away from.
const ERASE_STEP: u64 = 64 << 20;
/// The same in granules.
const ERASE_GRANULES: u64 = 4096;
/// Bytes of zeroes that are written at a time.
const ZERO_RUN: u64 = 256 << 10;
/// So many of these without a look at what else there is to do; where there are zeroes already, none takes time.
const ZERO_RUNS: u64 = 16;

fn no_such_file() -> Error {
    Error::new(ErrorKind::Io(5), "a driver named a file that it does not have")
}

fn push_piece(out: &mut Vec<Piece>, start: u64, len: u64, source: Source) {
    if len == 0 {
        return;
    }
    if let Some(last) = out.last_mut()
        && last.start + last.len == start
    {
        let continues = match (last.source, source) {
            (Source::Zero, Source::Zero) => true,
            (Source::File { id: a, offset: x }, Source::File { id: b, offset: y }) => {
                a == b && x + last.len == y
            }
            (Source::Encoded { layer: a }, Source::Encoded { layer: b }) => a == b,
            _ => false,
        };
        if continues {
            last.len += len;
            return;
        }
    }
    out.push(Piece { start, len, source });
}

/// Polls all at once and waits for all; the first error is kept.
async fn all_at_once(mut futures: Vec<Pending<'_, ()>>) -> Result<(), Error> {
    if futures.len() == 1
        && let Some(only) = futures.pop()
    {
        return only.await;
    }
    let mut results: Vec<Option<Result<(), Error>>> = futures.iter().map(|_| None).collect();
    std::future::poll_fn(|context| {
        let mut pending = false;
        for (future, result) in futures.iter_mut().zip(&mut results) {
            if result.is_none() {
                match future.as_mut().poll(context) {
                    std::task::Poll::Ready(value) => *result = Some(value),
                    std::task::Poll::Pending => pending = true,
                }
            }
        }
        if pending { std::task::Poll::Pending } else { std::task::Poll::Ready(()) }
    })
    .await;
    results.into_iter().flatten().collect()
}

/// A plan that is aborted unless it was taken out.
struct Unfinished<'a> {
    driver: &'a Rc<dyn Driver>,
    plan: Option<Plan>,
}

impl Drop for Unfinished<'_> {
    fn drop(&mut self) {
        if let Some(plan) = self.plan.take() {
            self.driver.abort(plan);
        }
    }
}

/// Memory of our own as a payload: for copies, zeroes, tools and tests.
#[derive(Debug)]
pub struct Memory {
    bytes: RefCell<Buf>,
}

impl Memory {
    /// `len` zeroes.
    pub fn new(len: usize) -> Memory {
        Memory { bytes: RefCell::new(Buf::zeroed(len)) }
    }

    /// With these bytes.
    pub fn of(bytes: Buf) -> Memory {
        Memory { bytes: RefCell::new(bytes) }
    }

    /// The bytes; the memory is empty then.
    pub fn take(&self) -> Buf {
        self.bytes.replace(Buf::zeroed(0))
    }

    /// Copies bytes in.
    pub fn put(&self, at: usize, bytes: &[u8]) {
        self.bytes.borrow_mut()[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn is_zero(&self, range: Range<usize>) -> bool {
        is_zero(&self.bytes.borrow()[range])
    }
}

/// [`Memory`] as the payload of requests on a volume; the payload's byte 0 is the memory's byte `at`.
#[derive(Debug)]
pub struct Window<'a> {
    /// The memory.
    pub memory: &'a Memory,
    /// Whose files are meant.
    pub volume: &'a Volume,
    /// First byte.
    pub at: usize,
}

impl Payload for Window<'_> {
    fn read(&self, file: FileId, offset: u64, at: usize, len: usize) -> Pending<'_, ()> {
        let Some(file) = self.volume.file(file) else {
            return Box::pin(std::future::ready(Err(no_such_file())));
        };
        let read = file.read(offset, len);
        Box::pin(async move {
            self.memory.put(self.at + at, &read.await?);
            Ok(())
        })
    }

    fn write(&self, file: FileId, offset: u64, at: usize, len: usize) -> Pending<'_, ()> {
        let Some(file) = self.volume.file(file) else {
            return Box::pin(std::future::ready(Err(no_such_file())));
        };
        let at = self.at + at;
        let bytes = Buf::copy_of(&self.memory.bytes.borrow()[at..at + len]);
        file.write(offset, bytes)
    }

    fn put(&self, at: usize, bytes: Buf) {
        self.memory.put(self.at + at, &bytes);
    }

    fn get(&self, at: usize, len: usize) -> Pending<'_, Buf> {
        let at = self.at + at;
        let bytes = Buf::copy_of(&self.memory.bytes.borrow()[at..at + len]);
        Box::pin(std::future::ready(Ok(bytes)))
    }

    fn zero(&self, at: usize, len: usize) {
        let at = self.at + at;
        self.memory.bytes.borrow_mut()[at..at + len].fill(0);
    }
}
