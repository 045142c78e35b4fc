//! Clusters of the file: which are free, the reserve that writers take from, and the way back.
//!
//! ```text
//!   free (refcount 0) ─ gather ─▶ filling ─ one flush ─▶ ready ─ allocate ─▶ in a plan ─ commit ─▶ mapped
//!        ▲                                                                     │ abort               │ erase, copy-on-write
//!        └── refcount one less ◀── settling ◀── mappings written, flush ◀── freed ◀──────────────────┘
//! ```
//! - *ready*: the refcount 1 is durable, the bytes read as zero durably, nothing refers to it. A crash leaks it at most.
//! - *freed*: no mapping in memory refers to it any more, but one in the file may, until the mappings are written and flushed.
//! - One *round* serves both ways with one flush. Who needs clusters carries the round in its own future, under
//!   `Image::refcounts_turn`; who finds the reserve low does so too, so that others rarely wait. A round whose future is dropped leaves its
//!   clusters in `filling`, from where the next one gives them back.
//! - New refcount blocks and a grown refcount table (`growth`) are in the file, flushed, before anything refers to them: no crash
//!   leaves a refcount too low.
//!
//! Numbers in this file count clusters of the file unless they are called offsets.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::ops::Range;

use super::header::TablePlace;
use super::image::{Image, slice_bytes};
use super::l1::OFFSET_MASK;
use super::refcount::{self, TABLE_OFFSET_MASK};
use crate::driver::Order;
use crate::error::{Error, ErrorKind};

/// Clusters that an idle image keeps.
const TARGET_MIN: u64 = 4;
/// Bytes that a busy image keeps.
const TARGET_MAX_BYTES: u64 = 64 << 20;
/// Most clusters in reserve.
const TARGET_MAX: u64 = 4096;
/// Slices of refcounts that a round searches for free clusters before it takes from the end of the file.
const SEARCH_SLICES: u64 = 16;
/// Ranges on their way back that make a flush of the guest process them.
pub(super) const FREED_MANY: usize = 256;

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Reserve {
    ready: RefCell<VecDeque<Range<u64>>>,
    filling: RefCell<Vec<Range<u64>>>,
    freed: RefCell<Vec<Range<u64>>>,
    settling: RefCell<Vec<Range<u64>>>,
    /// Not to be used again before the image is closed.
    abandoned: RefCell<Vec<u64>>,
    /// Clusters to have ready; 0: not used yet.
    target: Cell<u64>,
    /// Where the search for free clusters goes on.
    cursor: Cell<u64>,
    /// First cluster behind all that have a refcount; `None` until it was looked for.
    pub(super) end: Cell<Option<u64>>,
    /// Clusters were taken since the last tidy.
    busy: Cell<bool>,
}

fn count(ranges: &VecDeque<Range<u64>>) -> u64 {
    ranges.iter().map(|range| range.end - range.start).sum()
}

impl Reserve {
    /// Takes up to `wanted` clusters in a row.
    fn take(&self, wanted: u64) -> Option<Range<u64>> {
        let mut ready = self.ready.borrow_mut();
        let fits = |range: &Range<u64>| range.end - range.start >= wanted;
        let index = ready.iter().take(16).position(fits).unwrap_or(0);
        let range = ready.get_mut(index)?;
        let taken = range.start..range.end.min(range.start + wanted);
        range.start = taken.end;
        if range.is_empty() {
            ready.remove(index);
        }
        self.busy.set(true);
        Some(taken)
    }

    /// Puts clusters back that were taken and not written to.
    pub fn put_back(&self, range: Range<u64>) {
        self.ready.borrow_mut().push_front(range);
    }

    /// Gives up a reference to each cluster of a range, once the mappings as they are now are durable.
    pub fn free(&self, range: Range<u64>) {
        let mut freed = self.freed.borrow_mut();
        match freed.last_mut() {
            Some(last) if last.end == range.start => last.end = range.end,
            _ => freed.push(range),
        }
    }

    /// Keeps a cluster from being used until the image is closed.
    pub fn abandon(&self, cluster: u64) {
        self.abandoned.borrow_mut().push(cluster);
    }

    /// Ranges on their way back.
    pub fn freed_count(&self) -> usize {
        self.freed.borrow().len() + self.settling.borrow().len()
    }

    fn is_low(&self) -> bool {
        count(&self.ready.borrow()) < self.target.get() / 4
    }

    /// Wants less while nobody takes.
    pub fn cool(&self) {
        if !self.busy.replace(false) {
            self.target.set((self.target.get() / 2).max(TARGET_MIN));
        }
    }
}

/// Clusters that were taken; they go back when this is dropped before [`Taken::keep`].
struct Taken<'a> {
    reserve: &'a Reserve,
    ranges: Vec<Range<u64>>,
}

impl Taken<'_> {
    fn keep(mut self) -> Vec<Range<u64>> {
        std::mem::take(&mut self.ranges)
    }
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        self.ranges.drain(..).for_each(|range| self.reserve.put_back(range));
    }
}

impl Image {
    /// Takes `wanted` clusters out of the reserve, in as few ranges as it can.
    pub async fn allocate(&self, wanted: u64) -> Result<Vec<Range<u64>>, Error> {
        let mut taken = Taken { reserve: &self.reserve, ranges: Vec::new() };
        let mut missing = wanted;
        while missing > 0 {
            if let Some(range) = self.reserve.take(missing) {
                missing -= range.end - range.start;
                taken.ranges.push(range);
                continue;
            }
            let _turn = self.refcounts_turn.lock().await;
            if self.reserve.ready.borrow().is_empty() {
                self.round(missing).await?;
            }
        }
        if self.reserve.is_low()
            && let Some(_turn) = self.refcounts_turn.try_lock()
        {
            // A failure will be met by the first who gets nothing.
            let _ = self.round(1).await;
        }
        Ok(taken.keep())
    }

    /// Processes what was freed, without filling the reserve.
    pub async fn settle_freed(&self) -> Result<(), Error> {
        let _turn = self.refcounts_turn.lock().await;
        self.round(0).await
    }

    /// One round: see the module. `need` is how many clusters somebody waits for. The caller holds `refcounts_turn`.
    async fn round(&self, need: u64) -> Result<(), Error> {
        self.late.wait().await;
        let reserve = &self.reserve;
        reserve.settling.borrow_mut().append(&mut reserve.freed.borrow_mut());
        let settles = !reserve.settling.borrow().is_empty();
        // Left by a round that failed or was dropped.
        reserve.settling.borrow_mut().append(&mut reserve.filling.borrow_mut());
        if settles {
            self.maps.write_back().await?;
        }
        let settling = reserve.settling.borrow().len();
        if need > 0 {
            let target_max = (TARGET_MAX_BYTES / self.geometry.cluster()).clamp(TARGET_MIN, TARGET_MAX);
            let target = (reserve.target.get() * 2).clamp(TARGET_MIN, target_max);
            reserve.target.set(target);
            let missing = target.saturating_sub(count(&reserve.ready.borrow())).max(need);
            if let Err(error) = self.gather(missing, need).await {
                reserve.settling.borrow_mut().append(&mut reserve.filling.borrow_mut());
                return Err(error);
            }
        }
        self.refs.write_back().await?;
        self.file.flush().await?;
        reserve.ready.borrow_mut().extend(reserve.filling.borrow_mut().drain(..));
        self.give_back(settling).await
    }

    /// Takes one reference from the clusters of the first `ranges` ranges that settle: their removal is durable.
    async fn give_back(&self, ranges: usize) -> Result<(), Error> {
        for _ in 0..ranges {
            loop {
                let Some(range) = self.reserve.settling.borrow().first().cloned() else { return Ok(()) };
                let next = self.release_some(&range).await?;
                let mut settling = self.reserve.settling.borrow_mut();
                settling[0].start = next;
                if settling[0].is_empty() {
                    settling.remove(0);
                    break;
                }
            }
        }
        Ok(())
    }

    /// Takes one reference from the first clusters of a range, as far as one slice goes; returns where it stopped. What has no
    /// reference left is given back to the store.
    async fn release_some(&self, range: &Range<u64>) -> Result<u64, Error> {
        let mut unused: Vec<Range<u64>> = Vec::new();
        let stop = self
            .change_some(range, |cluster, refcount| match refcount {
                0 => None,
                1 => {
                    match unused.last_mut() {
                        Some(last) if last.end == cluster => last.end += 1,
                        _ => unused.push(cluster..cluster + 1),
                    }
                    Some(0)
                }
                more => Some(more - 1),
            })
            .await?;
        for range in unused {
            let bytes = range.start << self.geometry.cluster_bits..range.end << self.geometry.cluster_bits;
            self.maps.forget(bytes.clone());
            self.refs.forget(bytes.clone());
            if !self.file.is_device() && bytes.start < self.file.length() {
                // Not doing it costs space only.
                let _ =
                    self.late.finish(self.file.zero(bytes.start..bytes.end.min(self.file.length()))).await;
            }
            self.reserve.cursor.set(self.reserve.cursor.get().min(range.start));
        }
        Ok(stop)
    }

    /// Offset of the refcount block for a cluster; 0 when there is none.
    pub(super) async fn block_of(&self, cluster: u64) -> Result<u64, Error> {
        let index = cluster / self.geometry.block_entries();
        let table = self.reftable.get();
        if index >= table.entries {
            return Ok(0);
        }
        let at = table.offset + index * 8;
        let word = loop {
            match self.refs.get_u64(at) {
                Some(word) => break word,
                None => self.refs.load(at).await?,
            }
        };
        let offset = word & TABLE_OFFSET_MASK;
        let in_file =
            offset.saturating_add(self.geometry.cluster()) <= self.end().max(self.reserve_end_offset());
        if word & !TABLE_OFFSET_MASK != 0 || !self.geometry.is_aligned(offset) || (offset != 0 && !in_file) {
            let what =
                format!("entry {index} of its refcount table is {word:#x}, which is no place of a block");
            return Err(Error::corrupt(self.name(), format!("{what}: repair it offline")));
        }
        Ok(offset)
    }

    fn reserve_end_offset(&self) -> u64 {
        self.reserve.end.get().unwrap_or(0) << self.geometry.cluster_bits
    }

    /// Shows the refcounts of the first clusters of a range to `change`, as far as one slice goes, and sets what it returns. Returns
    /// where it stopped.
    pub(super) async fn change_some(
        &self,
        range: &Range<u64>,
        mut change: impl FnMut(u64, u64) -> Option<u64>,
    ) -> Result<u64, Error> {
        let block = self.block_of(range.start).await?;
        if block == 0 {
            let what = format!("cluster {} is used and has no refcount: repair it offline", range.start);
            return Err(Error::corrupt(self.name(), what));
        }
        let (slice_at, first, stop) = self.slice_of(block, range);
        let slice = slice_bytes(&self.geometry);
        loop {
            let Some(mut bytes) = self.refs.get(slice_at, slice, <[u8]>::to_vec) else {
                self.refs.load(slice_at).await?;
                continue;
            };
            let order = self.geometry.refcount_order;
            let mut touched: Option<Range<usize>> = None;
            for cluster in range.start..stop {
                let index = first + (cluster - range.start) as usize;
                let Some(value) = change(cluster, refcount::get(&bytes, order, index)) else { continue };
                refcount::set(&mut bytes, order, index, value);
                let bits = 1usize << order;
                let place = index * bits / 8..(index * bits + bits).div_ceil(8);
                touched = Some(
                    touched.map_or(place.clone(), |old| old.start.min(place.start)..old.end.max(place.end)),
                );
            }
            if let Some(touched) = touched
                && !self.refs.set(slice_at + touched.start as u64, &bytes[touched], Order::Anytime)
            {
                continue;
            }
            return Ok(stop);
        }
    }

    /// The slice of a refcount block that holds the first cluster of a range: its offset, the first cluster's index in it, and where
    /// the slice (or the range) ends.
    fn slice_of(&self, block: u64, range: &Range<u64>) -> (u64, usize, u64) {
        let slice = slice_bytes(&self.geometry) as u64;
        let per_slice = (slice * 8) >> self.geometry.refcount_order;
        let index = range.start % self.geometry.block_entries();
        let stop = range.end.min(range.start + per_slice - index % per_slice);
        (block + index / per_slice * slice, (index % per_slice) as usize, stop)
    }

    /// Sets the refcount of clusters that have none to 1, and notes them as filling.
    async fn claim(&self, range: Range<u64>) -> Result<(), Error> {
        let mut at = range.start;
        while at < range.end {
            let mut claimed: Vec<u64> = Vec::new();
            let next = self
                .change_some(&(at..range.end), |cluster, refcount| {
                    (refcount == 0).then(|| claimed.push(cluster)).map(|()| 1)
                })
                .await?;
            let mut filling = self.reserve.filling.borrow_mut();
            for cluster in claimed {
                match filling.last_mut() {
                    Some(last) if last.end == cluster => last.end += 1,
                    _ => filling.push(cluster..cluster + 1),
                }
            }
            at = next;
        }
        Ok(())
    }

    /// Gets `wanted` clusters ready but for the flush; fewer will do when the store is full, at least `need`.
    async fn gather(&self, wanted: u64, need: u64) -> Result<(), Error> {
        let end = self.find_end().await?;
        let free = self.find_free(wanted, end, SEARCH_SLICES).await?;
        let mut found = 0;
        for range in free {
            found += range.end - range.start;
            self.claim_zeroed(range).await?;
        }
        if found >= wanted {
            return Ok(());
        }
        let missing = wanted - found;
        match self.append(missing).await {
            Err(error) if error.kind == ErrorKind::NoSpace || self.file.is_device() => {
                let least = need.saturating_sub(found);
                if least == 0 || (least < missing && self.append(least).await.is_ok()) {
                    return Ok(());
                }
                self.reserve.cursor.set(0);
                let free = self.find_free(least, end, u64::MAX).await?;
                let found: u64 = free.iter().map(|range| range.end - range.start).sum();
                if found < least {
                    return Err(Error::new(ErrorKind::NoSpace, error.message));
                }
                for range in free {
                    self.claim_zeroed(range).await?;
                }
                Ok(())
            }
            other => other,
        }
    }

    /// Claims free clusters within the file and makes them read as zero.
    async fn claim_zeroed(&self, range: Range<u64>) -> Result<(), Error> {
        let bits = self.geometry.cluster_bits;
        self.claim(range.clone()).await?;
        self.file.extend(range.end << bits).await?;
        self.late.finish(self.file.zero(range.start << bits..range.end << bits)).await
    }

    /// Claims clusters behind all others.
    async fn append(&self, wanted: u64) -> Result<(), Error> {
        let bits = self.geometry.cluster_bits;
        let start = self.cover(wanted).await?;
        let range = start..start + wanted;
        let former = if self.file.is_device() { u64::MAX } else { self.file.length() };
        self.file.extend(range.end << bits).await?;
        self.file.reserve(range.start << bits..range.end << bits).await?;
        if range.start << bits < former {
            self.late.finish(self.file.zero(range.start << bits..(range.end << bits).min(former))).await?;
        }
        self.reserve.end.set(Some(range.end));
        self.claim(range).await
    }

    /// First cluster behind all that have a refcount. Looked for once, from the end of the refcount table backwards.
    pub(super) async fn find_end(&self) -> Result<u64, Error> {
        if let Some(end) = self.reserve.end.get() {
            return Ok(end);
        }
        let per_block = self.geometry.block_entries();
        let mut end = 0;
        for index in (0..self.reftable.get().entries).rev() {
            let block = self.block_of(index * per_block).await?;
            if block == 0 {
                continue;
            }
            end = block / self.geometry.cluster() + 1;
            let bytes = self.file.read(block, self.geometry.cluster() as usize).await?;
            let order = self.geometry.refcount_order;
            let used = (0..per_block).rev().find(|entry| refcount::get(&bytes, order, *entry as usize) != 0);
            if let Some(used) = used {
                end = end.max(index * per_block + used + 1);
                break;
            }
        }
        if end > OFFSET_MASK >> self.geometry.cluster_bits {
            let what =
                format!("cluster {end} has a refcount and lies behind every file's end: repair it offline");
            return Err(Error::corrupt(self.name(), what));
        }
        self.reserve.end.set(Some(end));
        Ok(end)
    }

    /// Finds up to `wanted` clusters below `end` whose refcount is 0 and to which no table points, looking at `slices` slices.
    async fn find_free(&self, wanted: u64, end: u64, slices: u64) -> Result<Vec<Range<u64>>, Error> {
        let mut free: Vec<Range<u64>> = Vec::new();
        let mut found = 0;
        let mut at = self.reserve.cursor.get();
        let mut looked = 0;
        while at < end && found < wanted && looked < slices {
            let block = self.block_of(at).await?;
            if block == 0 {
                at = (at / self.geometry.block_entries() + 1) * self.geometry.block_entries();
                continue;
            }
            looked += 1;
            at = self
                .change_some(&(at..end), |cluster, refcount| {
                    if refcount == 0 && found < wanted {
                        found += 1;
                        match free.last_mut() {
                            Some(last) if last.end == cluster => last.end += 1,
                            _ => free.push(cluster..cluster + 1),
                        }
                    }
                    None
                })
                .await?;
        }
        // Where nothing was left over the search need not look again.
        self.reserve.cursor.set(if found < wanted { at } else { free.last().map_or(at, |range| range.end) });
        if free.is_empty() {
            return Ok(free);
        }
        self.without_tables(free).await
    }

    /// Takes clusters out of `free` that are tables all the same: an image whose refcounts are too low must not lose more.
    async fn without_tables(&self, mut free: Vec<Range<u64>>) -> Result<Vec<Range<u64>>, Error> {
        let bits = self.geometry.cluster_bits;
        let fixed = self.fixed.borrow().clone();
        for range in fixed {
            exclude(&mut free, &(range.start >> bits..range.end.div_ceil(1 << bits)));
        }
        let blocks = self.reserve.end.get().unwrap_or(0).div_ceil(self.geometry.block_entries());
        let reftable = self.reftable.get();
        let reftable = TablePlace { entries: reftable.entries.min(blocks), ..reftable };
        for (tables, place) in [(&self.maps, self.l1.get()), (&self.refs, reftable)] {
            let slice = slice_bytes(&self.geometry) as u64;
            let mut at = place.offset;
            let stop = place.offset + place.entries * 8;
            while at < stop {
                let len = (slice - at % slice).min(stop - at);
                let Some(found) = tables.get(at, len as usize, |bytes| {
                    let words =
                        bytes.chunks_exact(8).filter_map(|word| word.try_into().ok().map(u64::from_be_bytes));
                    let clusters = words.map(|word| (word & OFFSET_MASK) >> bits);
                    clusters
                        .filter(|cluster| free.iter().any(|range| range.contains(cluster)))
                        .collect::<Vec<_>>()
                }) else {
                    tables.load(at).await?;
                    continue;
                };
                found.iter().for_each(|cluster| exclude(&mut free, &(*cluster..*cluster + 1)));
                at += len;
            }
        }
        Ok(free)
    }

    /// Claims `clusters` clusters in a row that are in no reserve: for tables. Their refcounts are durable when this is done. A
    /// failure or a dropped future gives them back with the next round.
    pub async fn allocate_row(&self, clusters: u64) -> Result<u64, Error> {
        let _turn = self.refcounts_turn.lock().await;
        self.round(0).await?;
        let start = self.cover(clusters).await?;
        self.reserve.end.set(Some(start + clusters));
        self.claim(start..start + clusters).await?;
        self.file.extend((start + clusters) << self.geometry.cluster_bits).await?;
        self.refs.write_back().await?;
        self.file.flush().await?;
        self.reserve.filling.borrow_mut().clear();
        Ok(start)
    }

    /// Everything in reserve goes back; the file is cut behind the last cluster that is used.
    pub async fn empty_reserve(&self) -> Result<(), Error> {
        let _turn = self.refcounts_turn.lock().await;
        let mut unused: Vec<Range<u64>> = self.reserve.ready.borrow_mut().drain(..).collect();
        unused.extend(self.reserve.abandoned.borrow_mut().drain(..).map(|cluster| cluster..cluster + 1));
        self.reserve.freed.borrow_mut().extend(unused.iter().cloned());
        self.round(0).await?;
        self.refs.write_back().await?;
        unused.sort_unstable_by_key(|range| range.start);
        let Some(end) = self.reserve.end.get() else { return Ok(()) };
        let mut tail = end;
        for range in unused.iter().rev() {
            if range.end == tail {
                tail = range.start;
            }
        }
        let bits = self.geometry.cluster_bits;
        if tail < end && !self.file.is_device() && self.file.length() <= end << bits {
            self.file.flush().await?;
            self.file.truncate(tail << bits).await?;
        }
        self.reserve.end.set(None);
        self.reserve.cursor.set(0);
        Ok(())
    }
}

/// Takes `out` out of `ranges`.
fn exclude(ranges: &mut Vec<Range<u64>>, out: &Range<u64>) {
    let mut kept = Vec::with_capacity(ranges.len() + 1);
    for range in ranges.drain(..) {
        if range.end <= out.start || range.start >= out.end {
            kept.push(range);
            continue;
        }
        kept.extend(
            [range.start..out.start.max(range.start), out.end.min(range.end)..range.end]
                .into_iter()
                .filter(|part| !part.is_empty()),
        );
    }
    *ranges = kept;
}
