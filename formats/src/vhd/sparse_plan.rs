//! Plans of dynamic and differencing disks: see [`super::sparse`] for the picture.

use std::ops::Range;

use super::bitmap;
use super::footer::SECTOR;
use super::sparse::{Abandoned, BITS, FILE, Found, Reservation, Sparse};
use crate::driver::{Fill, Order, Plan, Under};
use crate::error::Error;
use crate::file::Buf;

/// What a plan does in one block.
#[derive(Debug, Clone)]
pub struct Part {
    block: u32,
    /// Bytes of the disk, whole sectors.
    range: Range<u64>,
    /// Where the block's bitmap begins, in bytes of the file.
    start: u64,
    /// The block's place is a reservation.
    fresh: bool,
}

/// Parts that are given back when they are dropped: a plan in the making, or one whose commit ends early.
struct Draft<'a> {
    disk: &'a Sparse,
    parts: Vec<Part>,
}

impl Drop for Draft<'_> {
    fn drop(&mut self) {
        for part in &self.parts {
            self.disk.end_part(part);
        }
    }
}

impl Sparse {
    /// Plans a write of `request`; `range` is the same in whole sectors.
    pub(super) async fn plan(&self, request: Range<u64>, range: Range<u64>) -> Result<Plan, Error> {
        self.late.wait().await;
        let mut draft = Draft { disk: self, parts: Vec::new() };
        let mut fills = Vec::new();
        for (block, part) in self.per_block(range) {
            let (start, fresh) = self.place_for(block).await?;
            let part = Part { block, range: part, start, fresh };
            draft.parts.push(part.clone());
            self.fills(&part, &request, &mut fills).await?;
        }
        let id = self.next_plan.get();
        self.next_plan.set(id + 1);
        self.plans.borrow_mut().insert(id, std::mem::take(&mut draft.parts));
        Ok(Plan { id, fills })
    }

    /// Where a block is, or is going to be: then it is counted in its reservation.
    async fn place_for(&self, block: u32) -> Result<(u64, bool), Error> {
        loop {
            // No await between the look at the reservations and what follows from it.
            if let Some(reservation) = self.reservations.borrow_mut().get_mut(&block) {
                reservation.plans += 1;
                reservation.joined = true;
                return Ok((u64::from(reservation.place) * SECTOR, true));
            }
            match self.find(block)? {
                Found::At(start) => return Ok((start, false)),
                Found::Unknown => self.tables.load(self.shape.entry_offset(block)).await?,
                Found::Nowhere => match self.take_clean(block) {
                    Some(place) => {
                        let reservation = Reservation { place, plans: 1, joined: false, committed: false };
                        self.reservations.borrow_mut().insert(block, reservation);
                        return Ok((u64::from(place) * SECTOR, true));
                    }
                    None => self.make_clean(block).await?,
                },
            }
        }
    }

    /// A clean place for a block: the one that was taken for it before, if there is one. `None`: [`Sparse::make_clean`] first.
    fn take_clean(&self, block: u32) -> Option<u32> {
        let mut abandoned = self.abandoned.borrow_mut();
        match abandoned.get(&block) {
            Some(Abandoned { clean: false, .. }) => None,
            Some(Abandoned { place, .. }) => {
                let place = *place;
                abandoned.remove(&block);
                Some(place)
            }
            None => self.reserve.take(),
        }
    }

    /// Makes a place clean for a block.
    async fn make_clean(&self, block: u32) -> Result<(), Error> {
        // Taken out meanwhile: were this future dropped, the zeroes would still be under way.
        let Some(Abandoned { place, .. }) = self.abandoned.borrow_mut().remove(&block) else {
            return self.reserve.refill(&self.tables).await;
        };
        let result = self.reserve.clean_again(&self.tables, place).await;
        self.abandoned.borrow_mut().insert(block, Abandoned { place, clean: result.is_ok() });
        result
    }

    /// The fills of a part. A request of whole sectors leaves nothing of a fill unwritten; else the sectors at its ends are fills of
    /// their own.
    async fn fills(&self, part: &Part, request: &Range<u64>, fills: &mut Vec<Fill>) -> Result<(), Error> {
        let Range { start, end } = part.range;
        let offset = |at| self.shape.data_offset(part.start, at);
        let fill = |range: Range<u64>, under| Fill { offset: offset(range.start), range, file: FILE, under };
        let head = if start < request.start { start + SECTOR } else { start };
        let tail = if request.end < end { (end - SECTOR).max(head) } else { end };
        if start < head {
            fills.push(fill(start..head, self.under(part, start).await?));
        }
        if head < tail {
            fills.push(fill(head..tail, Under::Kept));
        }
        if tail < end {
            fills.push(fill(tail..end, self.under(part, tail).await?));
        }
        Ok(())
    }

    /// What is under the sector at `at` of the disk, of which a request covers a part.
    async fn under(&self, part: &Part, at: u64) -> Result<Under, Error> {
        let sector = self.sectors_of(part.block, &(at..at + SECTOR));
        let below = if self.is_differencing() { Under::Below } else { Under::Kept };
        let committed =
            self.reservations.borrow().get(&part.block).is_none_or(|reservation| reservation.committed);
        if part.fresh && !committed {
            return Ok(below);
        }
        let (first, low) = (sector.start / BITS * BITS, self.shape.low_bits_first);
        loop {
            let look = |bytes: &[u8]| bitmap::is_set(bytes, first, sector.start, low);
            match self.tables.get(part.start + first / 8, SECTOR as usize, look) {
                None => self.tables.load(part.start + first / 8).await?,
                Some(true) => return Ok(Under::Kept),
                // A place without its bit may hold anything, and its filler is told that it is zero.
                Some(false) => {
                    let data = self.shape.data_offset(part.start, at);
                    self.late.finish(self.file.write(data, Buf::zeroed(SECTOR as usize))).await?;
                    return Ok(below);
                }
            }
        }
    }

    /// Commits a plan.
    pub(super) async fn commit_plan(&self, id: u64) -> Result<(), Error> {
        let parts = self.plans.borrow_mut().remove(&id);
        let mut draft =
            Draft { disk: self, parts: parts.ok_or_else(|| Error::invalid(format!("no plan {id} is out")))? };
        while let Some(part) = draft.parts.last() {
            self.commit_part(part).await?;
            if let Some(part) = draft.parts.pop() {
                self.end_part(&part);
            }
        }
        self.settle().await
    }

    async fn commit_part(&self, part: &Part) -> Result<(), Error> {
        let reservation = self.reservations.borrow().get(&part.block).copied();
        let fresh = reservation.filter(|reservation| part.fresh && !reservation.committed);
        if self.keeps_bits() || fresh.is_none() {
            self.set_bits(part).await?;
        }
        let Some(Reservation { place, .. }) = fresh else { return Ok(()) };
        self.set_entry(part.block, place).await?;
        if let Some(reservation) = self.reservations.borrow_mut().get_mut(&part.block) {
            reservation.committed = true;
        }
        self.reserve.note_used(place);
        if !self.keeps_bits() {
            // The reserve made its bitmap all ones.
            self.full.borrow_mut().insert(part.block);
        }
        Ok(())
    }

    /// Sets the bits of a part's sectors that are clear.
    async fn set_bits(&self, part: &Part) -> Result<(), Error> {
        if self.full.borrow().contains(part.block) {
            return Ok(());
        }
        let sectors = self.sectors_of(part.block, &part.range);
        let low = self.shape.low_bits_first;
        let mut from = sectors.start;
        while from < sectors.end {
            let to = sectors.end.min((from / BITS + 1) * BITS);
            // Whole bytes around the sectors.
            let (first, len) = (from / 8 * 8, (to.div_ceil(8) - from / 8) as usize);
            let offset = part.start + first / 8;
            let mut bits = [0u8; SECTOR as usize];
            let look = |bytes: &[u8]| {
                bits[..len].copy_from_slice(bytes);
                bitmap::set(&mut bits[..len], first, from, to, low)
            };
            match self.tables.get(offset, len, look) {
                None => self.tables.load(offset).await?,
                Some(false) => from = to,
                Some(true) if self.change(part.block, offset, &bits[..len], Order::AfterData) => from = to,
                Some(true) => self.tables.prepare(offset, len).await?,
            }
        }
        Ok(())
    }

    /// A part of a plan is committed or given up.
    fn end_part(&self, part: &Part) {
        if !part.fresh {
            return;
        }
        let mut reservations = self.reservations.borrow_mut();
        let Some(reservation) = reservations.get_mut(&part.block) else { return };
        reservation.plans -= 1;
        if reservation.plans == 0 {
            // Writes to a place that was not committed may be under way still: only this block may get it again.
            if !reservation.committed {
                let abandoned = Abandoned { place: reservation.place, clean: false };
                self.abandoned.borrow_mut().insert(part.block, abandoned);
            }
            reservations.remove(&part.block);
        }
    }

    /// Gives a plan up.
    pub(super) fn abort_plan(&self, id: u64) {
        let parts = self.plans.borrow_mut().remove(&id).unwrap_or_default();
        drop(Draft { disk: self, parts });
    }

    /// Makes a range of whole sectors read as zero, with space in this file.
    pub(super) async fn zero_with_space(&self, range: Range<u64>) -> Result<(), Error> {
        let plan = self.plan(range.clone(), range).await?;
        let parts = self.plans.borrow_mut().remove(&plan.id).unwrap_or_default();
        let draft = Draft { disk: self, parts };
        let zeroes = draft.parts.iter().filter(|part| !self.is_clean(part)).map(|part| {
            let data = self.shape.data_offset(part.start, part.range.start);
            self.file.zero(data..data + (part.range.end - part.range.start))
        });
        self.late.finish(Box::pin(super::reserve::all(zeroes.collect()))).await?;
        let mut draft = draft;
        self.plans.borrow_mut().insert(plan.id, std::mem::take(&mut draft.parts));
        self.commit_plan(plan.id).await
    }

    /// Whether a part lies in a place that nobody has written to but zeroes.
    fn is_clean(&self, part: &Part) -> bool {
        part.fresh && self.reservations.borrow().get(&part.block).is_some_and(|one| !one.joined)
    }
}
