//! The driver: an image of one or more extents at run time.
//!
//! ```text
//!  flat extent    ─▶ written in place
//!  grain there    ─▶ written in place
//!  grain not here ─▶ plan: a clean place from the reserve; commit sets both entries: at any time over zeroes, after the data when
//!                    the parent has other bytes
//!  erase          ─▶ entry 0 without a parent, 1 where the format has zeroed grains; else the caller writes zeroes
//! ```
//! The first change of all gives the contents a new identity (CID), durably: a child that was made before does not take this image for
//! its parent any more. So nothing is in place before it.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::ops::Range;
use std::rc::Rc;

use super::directory::Place as Grain;
use super::header::SECTOR;
use super::sparse::Sparse;
use crate::driver::{
    Driver, Encoding, Erase, Erased, Extent, FileIndex, Fill, Order, Place, Plan, Under, Usage, push_extent,
};
use crate::error::{Error, ErrorKind};
use crate::file::{Buf, ImageFile, Pending};
use crate::late::Late;
use crate::metadata::Tables;
use crate::unsettled::Unsettled;

/// What an extent of the disk is.
#[derive(Debug)]
pub(super) enum Kind {
    /// Bytes in a file, from an offset on.
    Flat(FileIndex, u64),
    /// Zeroes, without a file.
    Zero,
    /// Grains.
    Sparse(Box<Sparse>),
}

/// A stretch of the disk.
#[derive(Debug)]
pub(super) struct Part {
    pub start: u64,
    pub end: Cell<u64>,
    pub kind: Kind,
}

/// What a plan will do to one grain.
#[derive(Debug)]
struct Piece {
    part: usize,
    grain: u64,
    place: u64,
    order: Order,
    /// The same grain may get the place again: nothing but its requests' own bytes is on the way there.
    reusable: bool,
}

/// An opened image.
pub(super) struct Image {
    /// The image's file, then those of its extents.
    pub files: Vec<Rc<dyn ImageFile>>,
    /// The extents, without gaps.
    pub parts: Vec<Part>,
    pub granule: u64,
    pub writable: bool,
    /// Bytes of the layer below; 0: there is none.
    pub below: u64,
    pub tables: Rc<Tables>,
    pub slice_bytes: u64,
    /// The descriptor as it is, and its space in the first file.
    pub descriptor: RefCell<super::descriptor::Descriptor>,
    pub descriptor_place: Range<u64>,
    pub unsettled: Unsettled,
    pub late: Late,
    /// Grains that were decoded last.
    pub decoded: Rc<crate::codec::Decoded>,
    plans: RefCell<BTreeMap<u64, Vec<Piece>>>,
    next_plan: Cell<u64>,
    /// The contents have a new identity, or need none.
    changed: Cell<bool>,
    change_turn: async_lock::Mutex<()>,
}

/// What [`Image::new`] needs.
pub(super) struct Parts {
    pub files: Vec<Rc<dyn ImageFile>>,
    pub parts: Vec<Part>,
    pub writable: bool,
    pub below: u64,
    pub tables: Rc<Tables>,
    pub decoded: Rc<crate::codec::Decoded>,
    pub slice_bytes: u64,
    pub descriptor: super::descriptor::Descriptor,
    pub descriptor_place: Range<u64>,
}

/// Pieces that are given back when they are dropped: a plan in the making, or one whose commit ends early.
struct Draft<'a> {
    image: &'a Image,
    pieces: Vec<Piece>,
}

impl Drop for Draft<'_> {
    fn drop(&mut self) {
        for piece in &self.pieces {
            // Writes of a caller that went away may land in the place later: nobody else gets it while the image is open.
            if let Some(writable) = self.image.sparse(piece.part).and_then(|sparse| sparse.writable.as_ref())
                && piece.reusable
            {
                writable.abandoned.borrow_mut().insert(piece.grain, piece.place);
            }
        }
    }
}

/// Another identity than `old`, with as many digits.
pub(super) fn new_cid(old: Option<(u32, usize)>) -> u32 {
    loop {
        let random = uuid::Uuid::new_v4().as_u128() as u32;
        let cid = old.map_or(random, |(_, digits)| {
            random & u32::MAX.checked_shr(32 - 4 * digits.clamp(1, 8) as u32).unwrap_or(0)
        });
        // The last two mean that there is no parent, or that the identity is elsewhere.
        if cid < u32::MAX - 1 && old.is_none_or(|(old, _)| old != cid) {
            return cid;
        }
    }
}

impl Image {
    pub fn new(parts: Parts) -> Image {
        let granule = parts.parts.iter().filter_map(|part| match &part.kind {
            Kind::Sparse(sparse) => Some(sparse.shape.grain),
            _ => None,
        });
        Image {
            granule: granule.max().unwrap_or(SECTOR),
            files: parts.files,
            parts: parts.parts,
            writable: parts.writable,
            below: parts.below,
            tables: parts.tables,
            slice_bytes: parts.slice_bytes,
            descriptor: RefCell::new(parts.descriptor),
            descriptor_place: parts.descriptor_place,
            unsettled: Unsettled::default(),
            late: Late::default(),
            decoded: parts.decoded,
            plans: RefCell::default(),
            next_plan: Cell::new(0),
            changed: Cell::new(false),
            change_turn: async_lock::Mutex::new(()),
        }
    }

    /// Path, for messages.
    pub fn name(&self) -> &str {
        self.files.first().map_or("", |file| file.name())
    }

    fn sparse(&self, part: usize) -> Option<&Sparse> {
        match &self.parts.get(part)?.kind {
            Kind::Sparse(sparse) => Some(sparse),
            _ => None,
        }
    }

    /// The sparse extents.
    pub fn all_sparse(&self) -> impl Iterator<Item = &Sparse> {
        (0..self.parts.len()).filter_map(|part| self.sparse(part))
    }

    /// The sparse extent that has a byte of the disk, and where it begins.
    pub fn sparse_at(&self, offset: u64) -> Option<(u64, &Sparse)> {
        let part = self.part_at(offset);
        Some((self.parts[part].start, self.sparse(part)?))
    }

    /// Where the extent ends that has a byte of the disk.
    pub fn end_of_extent(&self, offset: u64) -> u64 {
        self.parts[self.part_at(offset)].end.get()
    }

    /// The extent that has a byte of the disk.
    fn part_at(&self, offset: u64) -> usize {
        self.parts.partition_point(|part| part.end.get() <= offset).min(self.parts.len().saturating_sub(1))
    }

    /// The pieces of a range, one per extent.
    fn pieces(&self, range: Range<u64>) -> Vec<(usize, Range<u64>)> {
        let mut pieces = Vec::new();
        let mut at = range.start;
        while at < range.end {
            let part = self.part_at(at);
            let end = range.end.min(self.parts[part].end.get());
            if end <= at {
                break;
            }
            pieces.push((part, at..end));
            at = end;
        }
        pieces
    }

    /// The bytes of the disk that a grain of an extent holds.
    fn grain_range(&self, part: &Part, grain_bytes: u64, grain: u64) -> Range<u64> {
        let start = part.start + grain * grain_bytes;
        start..(start + grain_bytes).min(part.end.get())
    }

    /// Maps the part of an extent from the start of `range` on, behind index `own` of `out`; returns where it stopped.
    fn map_part(
        &self,
        part: &Part,
        range: Range<u64>,
        own: usize,
        out: &mut Vec<Extent>,
    ) -> Result<u64, Error> {
        let in_place = self.writable && self.changed.get() && self.late.is_empty();
        let sparse = match &part.kind {
            Kind::Flat(file, offset) => {
                let offset = offset + (range.start - part.start);
                push_extent(
                    out,
                    own,
                    range.start,
                    range.end - range.start,
                    Place::Data { file: *file, offset, in_place },
                );
                return Ok(range.end);
            }
            Kind::Zero => {
                push_extent(out, own, range.start, range.end - range.start, Place::Zero { allocated: false });
                return Ok(range.end);
            }
            Kind::Sparse(sparse) => sparse,
        };
        let grain_bytes = sparse.shape.grain;
        let grains = (range.start - part.start) / grain_bytes..(range.end - part.start).div_ceil(grain_bytes);
        let shown = sparse.look(&self.tables, self.slice_bytes, grains.clone(), |grain, place| {
            let start = part.start + grain * grain_bytes;
            let (from, to) = (range.start.max(start), range.end.min(start + grain_bytes));
            let place = match place {
                Grain::Absent => Place::Absent,
                Grain::Zero => Place::Zero { allocated: false },
                Grain::At(_) if sparse.shape.stream => Place::Encoded,
                Grain::At(at) => Place::Data {
                    file: sparse.index,
                    offset: at + (from - start),
                    in_place: in_place && !self.unsettled.has(start),
                },
            };
            push_extent(out, own, from, to - from, place);
        })?;
        let Some(count) = shown else { return Ok(range.start) };
        Ok(range.end.min(part.start + (grains.start + count) * grain_bytes))
    }

    /// To be called before every change: the first one gives the contents a new identity.
    pub async fn begin_changes(&self) -> Result<(), Error> {
        if !self.writable {
            let message = format!("{} was opened read-only", self.name());
            return Err(Error::new(ErrorKind::ReadOnly, message));
        }
        if self.changed.get() {
            return Ok(());
        }
        let _turn = self.change_turn.lock().await;
        if self.changed.get() {
            return Ok(());
        }
        let cid = self.descriptor.borrow().cid.clone();
        if let (Some((old, at)), Some(file)) = (cid, self.files.first()) {
            let digits = at.len();
            let new = new_cid(Some((old, digits)));
            let text = format!("{new:0digits$x}").into_bytes();
            self.late.wait().await;
            self.late
                .finish(file.write(self.descriptor_place.start + at.start as u64, Buf::copy_of(&text)))
                .await?;
            file.flush().await?;
            let mut descriptor = self.descriptor.borrow_mut();
            descriptor.text[at.clone()].copy_from_slice(&text);
            descriptor.cid = Some((new, at));
        }
        self.changed.set(true);
        Ok(())
    }

    async fn plan(&self, range: Range<u64>) -> Result<Plan, Error> {
        self.begin_changes().await?;
        self.late.wait().await;
        let mut draft = Draft { image: self, pieces: Vec::new() };
        let mut fills = Vec::new();
        for (number, piece) in self.pieces(range) {
            let part = &self.parts[number];
            match &part.kind {
                Kind::Zero => {
                    let what = "writing to an extent of type ZERO, which has no place for data";
                    return Err(Error::unsupported(self.name(), what));
                }
                Kind::Flat(file, offset) => {
                    let offset = offset + (piece.start - part.start);
                    fills.push(Fill { range: piece, file: *file, offset, under: Under::Kept });
                }
                Kind::Sparse(sparse) => {
                    let grain_bytes = sparse.shape.grain;
                    let grains = (piece.start - part.start) / grain_bytes
                        ..(piece.end - part.start).div_ceil(grain_bytes);
                    for grain in grains {
                        fills.push(self.plan_grain(&mut draft, number, sparse, grain).await?);
                    }
                }
            }
        }
        let id = self.next_plan.get();
        self.next_plan.set(id + 1);
        self.plans.borrow_mut().insert(id, std::mem::take(&mut draft.pieces));
        Ok(Plan { id, fills })
    }

    async fn plan_grain(
        &self,
        draft: &mut Draft<'_>,
        part: usize,
        sparse: &Sparse,
        grain: u64,
    ) -> Result<Fill, Error> {
        let range = self.grain_range(&self.parts[part], sparse.shape.grain, grain);
        let old = sparse.place_of(&self.tables, grain).await?;
        if sparse.shape.stream {
            let what = "writing to a stream, which takes compressed grains alone, once: make it by `image convert -c`";
            return Err(Error::unsupported(self.name(), what));
        }
        if let Grain::At(offset) = old {
            return Ok(Fill { range, file: sparse.index, offset, under: Under::Kept });
        }
        sparse.mark().await?;
        sparse.own_table(&self.tables, grain, &self.late).await?;
        let below = old == Grain::Absent && range.start < self.below;
        let (place, durable) = sparse.take(&self.tables, grain, !below, &self.late).await?;
        let order = if durable && !below { Order::Anytime } else { Order::AfterData };
        draft.pieces.push(Piece { part, grain, place, order, reusable: !below });
        let under = if below { Under::Below } else { Under::Kept };
        Ok(Fill { range, file: sparse.index, offset: place, under })
    }

    async fn commit_plan(&self, id: u64) -> Result<(), Error> {
        let pieces = self.plans.borrow_mut().remove(&id);
        let pieces =
            pieces.ok_or_else(|| Error::invalid(format!("{}: there is no plan {id}", self.name())))?;
        let starts = pieces.iter().map(|piece| self.start_of(piece)).collect();
        let unsettled = self.unsettled.begin(starts);
        let mut draft = Draft { image: self, pieces };
        while let Some(piece) = draft.pieces.last() {
            if let Some(sparse) = self.sparse(piece.part) {
                sparse.note_used(piece.place + sparse.shape.grain);
                let entry = (piece.place / SECTOR) as u32;
                sparse.set(&self.tables, piece.grain, entry, piece.order).await?;
            }
            draft.pieces.pop();
        }
        self.tables.settle().await?;
        unsettled.settled();
        Ok(())
    }

    /// Where the grain of a piece begins on the disk: by that it is known as unsettled.
    fn start_of(&self, piece: &Piece) -> u64 {
        let grain_bytes = self.sparse(piece.part).map_or(SECTOR, |sparse| sparse.shape.grain);
        self.parts[piece.part].start + piece.grain * grain_bytes
    }

    async fn erase_range(&self, range: Range<u64>, how: Erase) -> Result<Erased, Error> {
        self.begin_changes().await?;
        self.late.wait().await;
        if how == Erase::ZeroKeep {
            return Ok(Erased::WriteZeroes);
        }
        let mut erased = Erased::Done;
        for (number, piece) in self.pieces(range) {
            let part = &self.parts[number];
            match &part.kind {
                Kind::Zero => {}
                Kind::Flat(file, offset) => {
                    let at = offset + (piece.start - part.start);
                    let file = &self.files[usize::from(file.0)];
                    self.late.finish(file.zero(at..at + (piece.end - piece.start))).await?;
                }
                Kind::Sparse(sparse) => {
                    let grain_bytes = sparse.shape.grain;
                    let grains = (piece.start - part.start) / grain_bytes
                        ..(piece.end - part.start).div_ceil(grain_bytes);
                    for grain in grains {
                        if !self.erase_grain(number, sparse, grain, &piece).await? {
                            erased = Erased::WriteZeroes;
                        }
                    }
                }
            }
        }
        self.tables.settle().await?;
        Ok(erased)
    }

    /// Makes a grain read as zero without space; false: the format cannot say that.
    async fn erase_grain(
        &self,
        number: usize,
        sparse: &Sparse,
        grain: u64,
        erased: &Range<u64>,
    ) -> Result<bool, Error> {
        if sparse.shape.stream {
            // What is there stays, and what is not there is zero.
            return Ok(sparse.place_of(&self.tables, grain).await? == Grain::Absent);
        }
        let range = self.grain_range(&self.parts[number], sparse.shape.grain, grain);
        let below = range.start < self.below;
        let entry = match (below, sparse.shape.zeroed) {
            (false, _) => 0,
            (true, true) => 1,
            (true, false) => return Ok(false),
        };
        if range.start < erased.start || range.end > erased.end {
            return Ok(false);
        }
        let place = match sparse.place_of(&self.tables, grain).await? {
            Grain::Absent if below => None,
            Grain::Absent | Grain::Zero => return Ok(true),
            Grain::At(at) => Some(at),
        };
        sparse.mark().await?;
        sparse.own_table(&self.tables, grain, &self.late).await?;
        sparse.set(&self.tables, grain, entry, Order::Anytime).await?;
        if let Some(at) = place {
            // What the entry shows after power loss was asked to be zero, and is. Only then the place may get another owner: the zeroes
            // must not meet it. Not giving the bytes back costs space only.
            let _ = self
                .late
                .finish(sparse.file.zero(at..(at + sparse.shape.grain).min(sparse.file.length())))
                .await;
            sparse.release(grain, at);
        }
        Ok(true)
    }

    async fn shut(&self) -> Result<(), Error> {
        if !self.writable {
            return Ok(());
        }
        let lost: Vec<_> = self.plans.borrow_mut().split_off(&0).into_values().collect();
        lost.into_iter().for_each(|pieces| drop(Draft { image: self, pieces }));
        self.late.wait().await;
        self.tables.write_back().await?;
        for sparse in self.all_sparse() {
            sparse.end_stream().await?;
        }
        for file in self.files.iter().filter(|file| file.is_writable()) {
            file.flush().await?;
        }
        for sparse in self.all_sparse() {
            sparse.close().await?;
        }
        Ok(())
    }
}

impl Driver for Image {
    fn size(&self) -> u64 {
        self.parts.last().map_or(0, |part| part.end.get())
    }

    fn granule(&self) -> u64 {
        self.granule
    }

    fn map(&self, offset: u64, len: u64, out: &mut Vec<Extent>) -> Result<u64, Error> {
        let (mut at, end, own) = (offset, offset + len, out.len());
        while at < end {
            let part = &self.parts[self.part_at(at)];
            let stop = end.min(part.end.get());
            match self.map_part(part, at..stop, own, out) {
                Ok(done) if done > at => at = done,
                Err(error) if at == offset => return Err(error),
                Ok(_) | Err(_) => break,
            }
        }
        Ok(at - offset)
    }

    fn load(&self, offset: u64, _len: u64) -> Pending<'_, ()> {
        Box::pin(async move {
            let part = self.part_at(offset);
            let Some(sparse) = self.sparse(part) else { return Ok(()) };
            sparse.load(&self.tables, (offset - self.parts[part].start) / sparse.shape.grain).await
        })
    }

    fn plan_write(&self, offset: u64, len: u64) -> Pending<'_, Plan> {
        Box::pin(self.plan(offset..offset + len))
    }

    fn commit(&self, plan: Plan) -> Pending<'_, ()> {
        Box::pin(self.commit_plan(plan.id))
    }

    fn abort(&self, plan: Plan) {
        let pieces = self.plans.borrow_mut().remove(&plan.id).unwrap_or_default();
        drop(Draft { image: self, pieces });
    }

    fn abort_at_rest(&self, plan: Plan) {
        let pieces = self.plans.borrow_mut().remove(&plan.id).unwrap_or_default();
        let (kept, given): (Vec<_>, Vec<_>) = pieces.into_iter().partition(|piece| piece.reusable);
        for piece in given {
            let sparse = self.sparse(piece.part);
            if let Some(writable) = sparse.and_then(|sparse| sparse.writable.as_ref()) {
                writable.reserve.give_back(piece.place);
            }
        }
        drop(Draft { image: self, pieces: kept });
    }

    fn erase(&self, range: Range<u64>, how: Erase) -> Pending<'_, Erased> {
        Box::pin(self.erase_range(range.start..range.end.min(self.size()), how))
    }

    fn flush(&self) -> Pending<'_, ()> {
        Box::pin(self.tables.write_back())
    }

    fn tidy(&self) -> Pending<'_, ()> {
        Box::pin(self.tables.write_back())
    }

    fn write_again(&self) -> Pending<'_, ()> {
        // All else (identity, marks, new tables, the reserve) counts only behind a flush that succeeded.
        Box::pin(self.tables.write_again())
    }

    fn resize(&self, size: u64) -> Pending<'_, ()> {
        Box::pin(self.grow(size))
    }

    fn keep_identity(&self) {
        self.changed.set(self.writable);
    }

    fn close(&self) -> Pending<'_, ()> {
        Box::pin(self.shut())
    }

    fn decode(&self, range: Range<u64>) -> Pending<'_, Buf> {
        Box::pin(self.decode_grain(range))
    }

    fn encoding(&self) -> Option<Encoding> {
        self.stream_encoding()
    }

    fn write_encoded(&self, units: Vec<(u64, Vec<u8>)>) -> Pending<'_, ()> {
        Box::pin(async move {
            self.begin_changes().await?;
            self.late.wait().await;
            self.append_grains(units).await
        })
    }

    fn usage(&self) -> Usage {
        self.tables.usage()
    }
}
