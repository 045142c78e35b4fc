//! Writes to what has no place of its own: plans, commits, aborts.
//!
//! | what is there | fill | order of the entry |
//! |---|---|---|
//! | nothing, nothing below; zero | new cluster, `Kept` | any time: both read as zero |
//! | nothing, bytes below | new cluster, `Below` | after data |
//! | cluster shared with a snapshot | new cluster, `Copied` | after data |
//! | compressed cluster | new cluster, `Decoded` | after data |
//! | own cluster that is called zero, or subclusters without data | same place, `Zeroes` or `Below` | after data: old bytes are in it |
//! | external data file | its own place there, as the line above | after data |
//! | encrypted, and the first line | new cluster, `Zeroes`: what reads as zero there does not when it is decrypted | after data |
//!
//! With subclusters several plans can be out for one cluster: they share its new place through [`Joined`]. A shared or compressed cluster
//! with subclusters is copied by the driver first, as a whole, since a plan covers a part of it only.

use std::ops::Range;

use super::image::Image;
use super::l1::L1Entry;
use super::l2::{Entry, State, mask};
use crate::crypt::Spot;
use crate::driver::{Fill, Order, Plan, Under};
use crate::error::Error;
use crate::file::Buf;

/// What a plan will do to one L2 entry.
#[derive(Debug)]
pub(super) struct Piece {
    /// Start of the cluster on the disk.
    guest: u64,
    /// Offset of its L2 table.
    table: u64,
    /// Subclusters that get data.
    subclusters: u32,
    /// Where the cluster will be.
    host: u64,
    /// `host` is out of the reserve.
    fresh: bool,
    order: Order,
}

/// A new place of a cluster that has no entry yet.
#[derive(Debug)]
pub(super) struct Joined {
    host: u64,
    users: u32,
    committed: bool,
}

/// A plan in the making, or pieces that are not committed yet: what is left of it goes back when it is dropped.
struct Draft<'a> {
    image: &'a Image,
    pieces: Vec<Piece>,
    /// Clusters of the file to take places from.
    pool: Vec<Range<u64>>,
}

impl Draft<'_> {
    fn take_cluster(&mut self) -> Option<u64> {
        let range = self.pool.first_mut()?;
        let cluster = range.start;
        range.start += 1;
        if range.is_empty() {
            self.pool.remove(0);
        }
        Some(cluster << self.image.geometry.cluster_bits)
    }
}

impl Drop for Draft<'_> {
    fn drop(&mut self) {
        self.pool.drain(..).for_each(|range| self.image.reserve.put_back(range));
        for piece in &self.pieces {
            self.image.give_up(piece);
        }
    }
}

impl Image {
    /// See [`crate::driver::Driver::plan_write`].
    pub async fn plan_write(&self, offset: u64, len: u64) -> Result<Plan, Error> {
        self.begin_changes().await?;
        self.late.wait().await;
        let granule = self.geometry.granule();
        let request = offset..offset + len;
        let range = offset & !(granule - 1)..(offset + len).next_multiple_of(granule);
        let mut missing = 0;
        let clusters = || {
            (range.start & !(self.geometry.cluster() - 1)..range.end)
                .step_by(self.geometry.cluster() as usize)
        };
        for guest in clusters() {
            let table = self.own_table(guest).await?;
            let entry = self.load_l2_entry(table, guest).await?;
            missing += u64::from(!self.geometry.data_file && !entry.copied && !self.has_joined(guest));
        }
        let mut draft = Draft { image: self, pieces: Vec::new(), pool: self.allocate(missing).await? };
        let mut fills = Vec::new();
        for guest in clusters() {
            let part = range.start.max(guest)..range.end.min(guest + self.geometry.cluster());
            self.plan_cluster(&mut draft, guest, part, &request, &mut fills).await?;
        }
        let id = self.next_plan.get();
        self.next_plan.set(id + 1);
        self.plans.borrow_mut().insert(id, std::mem::take(&mut draft.pieces));
        Ok(Plan { id, fills })
    }

    fn has_joined(&self, guest: u64) -> bool {
        self.geometry.extended_l2 && self.joined.borrow().contains_key(&guest)
    }

    /// Plans the granules `part` of the cluster at `guest`.
    async fn plan_cluster(
        &self,
        draft: &mut Draft<'_>,
        guest: u64,
        part: Range<u64>,
        request: &Range<u64>,
        fills: &mut Vec<Fill>,
    ) -> Result<(), Error> {
        let table = self.own_table(guest).await?;
        let (entry, host, fresh) = loop {
            let entry = self.load_l2_entry(table, guest).await?;
            let is_elsewhere = entry.host.is_some() || entry.compressed.is_some();
            match entry.host {
                _ if self.geometry.data_file => break (entry, guest, false),
                Some(host) if entry.copied => break (entry, host, false),
                _ if self.geometry.extended_l2 && is_elsewhere => self.unshare(table, guest).await?,
                _ => {
                    let joined = self.has_joined(guest).then(|| self.join(guest)).flatten();
                    if let Some(host) = joined.or_else(|| draft.take_cluster()) {
                        if joined.is_none() && self.geometry.extended_l2 {
                            let new = Joined { host, users: 1, committed: false };
                            self.joined.borrow_mut().insert(guest, new);
                        }
                        break (entry, host, true);
                    }
                    draft.pool = self.allocate(1).await?;
                }
            }
        };
        let granule = self.geometry.granule();
        let subclusters = ((part.start - guest) / granule) as u32..((part.end - guest) / granule) as u32;
        let mut order = Order::Anytime;
        let mut new_data = 0;
        // Before anything waits: from here on the piece goes back if this future is dropped.
        let number = draft.pieces.len();
        draft.pieces.push(Piece { guest, table, subclusters: 0, host, fresh, order });
        for sub in subclusters {
            let start = guest + u64::from(sub) * granule;
            let place = host + (start - guest);
            let mut under = self.under(&entry, sub, start, fresh);
            if !(under == Under::Kept && entry.copied && entry.state(sub) == State::Data) {
                new_data |= mask(sub, sub + 1);
            }
            if under != Under::Kept {
                order = Order::AfterData;
            }
            let covered = request.start <= start && request.end >= start + granule;
            if matches!(under, Under::Below | Under::Zeroes) && !covered && !fresh {
                // Old bytes are in the place. We zero it ourselves, so that the caller writes no more than it has to: what it leaves
                // behind when it goes away lands in its own range only.
                self.clear_place(Spot { disk: start, file: place }, granule).await?;
                if under == Under::Zeroes {
                    under = Under::Kept;
                }
            }
            push_fill(
                fills,
                Fill { range: start..start + granule, file: self.payload().0, offset: place, under },
            );
        }
        if new_data == 0 && !fresh && !self.unsettled.has(guest) {
            draft.pieces.truncate(number);
        } else {
            draft.pieces[number].subclusters = new_data;
            draft.pieces[number].order = order;
        }
        Ok(())
    }

    /// What becomes of the bytes of a subcluster that the request does not write.
    fn under(&self, entry: &Entry, sub: u32, start: u64, fresh: bool) -> Under {
        match (entry.state(sub), entry.host) {
            (State::Data, Some(old)) if fresh => Under::Copied { file: self.payload().0, offset: old },
            (State::Data, _) => Under::Kept,
            (State::Compressed, _) => Under::Decoded,
            (State::Absent, _) if self.below_has(start) => Under::Below,
            _ if fresh && self.cipher.is_none() => Under::Kept,
            _ => Under::Zeroes,
        }
    }

    /// Takes part in the new place of a cluster that another plan has found.
    fn join(&self, guest: u64) -> Option<u64> {
        let mut joined = self.joined.borrow_mut();
        let one = joined.get_mut(&guest)?;
        one.users += 1;
        Some(one.host)
    }

    /// A piece ends; returns true when nobody else uses its new place and no entry has it.
    fn leave(&self, piece: &Piece, commits: bool) -> bool {
        if !self.geometry.extended_l2 {
            return !commits;
        }
        let mut joined = self.joined.borrow_mut();
        let Some(one) = joined.get_mut(&piece.guest) else { return !commits };
        one.committed |= commits;
        one.users -= 1;
        let unused = one.users == 0 && !one.committed;
        if one.users == 0 {
            joined.remove(&piece.guest);
        }
        unused
    }

    fn give_up(&self, piece: &Piece) {
        if piece.fresh && self.leave(piece, false) {
            // Writes of a caller that went away may land in it later: nobody else gets it while the image is open.
            let cluster = piece.host >> self.geometry.cluster_bits;
            self.reserve.abandon(cluster);
        }
    }

    /// See [`crate::driver::Driver::abort`].
    pub fn abort(&self, plan: &Plan) {
        let pieces = self.plans.borrow_mut().remove(&plan.id).unwrap_or_default();
        pieces.iter().for_each(|piece| self.give_up(piece));
    }

    /// See [`crate::driver::Driver::commit`].
    pub async fn commit(&self, plan: &Plan) -> Result<(), Error> {
        let Some(pieces) = self.plans.borrow_mut().remove(&plan.id) else {
            return Err(Error::invalid(format!("{}: there is no plan {}", self.name(), plan.id)));
        };
        let unsettled = self.unsettled.begin(pieces.iter().map(|piece| piece.guest).collect());
        let mut left = Draft { image: self, pieces, pool: Vec::new() };
        while let Some(piece) = left.pieces.first() {
            let with_piece = |old: &Entry| {
                Some(Entry {
                    host: Some(piece.host),
                    copied: true,
                    data: old.data | piece.subclusters,
                    zero: old.zero & !piece.subclusters,
                    compressed: None,
                })
            };
            let old = self.change_l2_entry(piece.table, piece.guest, piece.order, with_piece).await?;
            if piece.fresh {
                self.leave(piece, true);
            }
            if old.host != Some(piece.host) {
                self.free_places(&old);
            }
            left.pieces.remove(0);
        }
        self.maps.settle().await?;
        unsettled.settled();
        Ok(())
    }

    /// Offset of the L2 table for an offset on the disk, one that belongs to the active state alone: makes or copies one if need be.
    pub async fn own_table(&self, guest: u64) -> Result<u64, Error> {
        let entry = self.load_l1_entry(guest).await?;
        if entry.copied {
            return Ok(entry.table);
        }
        let _turn = self.tables_turn.lock().await;
        let old = self.load_l1_entry(guest).await?;
        if old.copied {
            return Ok(old.table);
        }
        let taken = self.allocate(1).await?;
        let cluster = taken.first().map(|range| range.start).unwrap_or_default();
        let mut draft = Draft { image: self, pieces: Vec::new(), pool: taken };
        let table = cluster << self.geometry.cluster_bits;
        let bytes = table..table + self.geometry.cluster();
        self.maps.forget(bytes.clone());
        if old.table != 0 {
            self.copy_table(old.table, table, guest).await?;
        }
        self.set_l1_entry(guest, L1Entry { table, copied: true }).await?;
        draft.pool.clear();
        if old.table != 0 {
            self.leave_shared(old.table).await;
        }
        Ok(table)
    }

    /// Copies a shared L2 table. None of its clusters is this table's alone.
    async fn copy_table(&self, from: u64, to: u64, guest: u64) -> Result<(), Error> {
        let geometry = &self.geometry;
        let mut bytes = self.file.read(from, geometry.cluster() as usize).await?;
        let start = guest - guest % geometry.l2_covers();
        for (number, slot) in bytes.chunks_exact_mut(geometry.entry_bytes() as usize).enumerate() {
            // A damaged entry is copied as it is: its range stays unreadable.
            let guest = start + number as u64 * geometry.cluster();
            if let Ok(entry) = Entry::decode(geometry, slot, guest, self.end())
                && entry.copied
                && !geometry.data_file
            {
                let shared = Entry { copied: false, ..entry };
                slot.copy_from_slice(&shared.encode(geometry)[..geometry.entry_bytes() as usize]);
            }
        }
        self.file.write(to, bytes).await?;
        self.file.flush().await
    }

    /// Gives up what an entry referred to that nobody reads any more: its cluster, or those that hold a part of its encoded bytes.
    pub fn free_places(&self, old: &Entry) {
        if let Some(host) = old.host.filter(|_| !self.geometry.data_file) {
            let cluster = host >> self.geometry.cluster_bits;
            self.reserve.free(cluster..cluster + 1);
        }
        if let Some(place) = old.compressed {
            self.decoded.forget(place.offset);
            self.reserve.free(place.clusters(&self.geometry));
        }
    }

    /// Gives a shared or compressed cluster with subclusters a place of its own, with all its bytes.
    pub async fn unshare(&self, table: u64, guest: u64) -> Result<(), Error> {
        let _turn = self.tables_turn.lock().await;
        let entry = self.load_l2_entry(table, guest).await?;
        if entry.copied || (entry.host.is_none() && entry.compressed.is_none()) {
            return Ok(());
        }
        let mut draft = Draft { image: self, pieces: Vec::new(), pool: self.allocate(1).await? };
        let Some(host) = draft.pool.first().map(|range| range.start << self.geometry.cluster_bits) else {
            return Ok(());
        };
        let (mut copy, data) = self.bytes_of(&entry, guest).await?;
        if let Some(cipher) = &self.cipher {
            self.each_subcluster(data, |at| {
                cipher.encrypt(Spot { disk: guest, file: host }.after(at.start as u64), &mut copy[at])
            });
        }
        // Written to from now on: it must not go back as clean.
        let taken = draft.pool.remove(0);
        let written = self.file.write(host, copy).await;
        let unsettled = self.unsettled.begin(vec![guest]);
        let mut moved = false;
        let set = match written {
            // Other subclusters may have been erased meanwhile: what the entry says of them now counts.
            Ok(()) => {
                let with_place = |now: &Entry| {
                    moved = (now.host, now.compressed, now.copied) == (entry.host, entry.compressed, false);
                    let data = if now.compressed.is_some() { data } else { now.data };
                    moved.then_some(Entry { host: Some(host), copied: true, data, compressed: None, ..*now })
                };
                self.change_l2_entry(table, guest, Order::AfterData, with_place).await.map(drop)
            }
            Err(error) => Err(error),
        };
        if !moved || set.is_err() {
            self.reserve.free(taken);
        } else if let Some(old) = entry.host {
            self.leave_shared(old).await;
        } else {
            // Who has begun to read the encoded bytes ends first; whoever comes later sees the new entry.
            drop(self.encoded_reads.write().await);
            self.free_places(&entry);
        }
        set?;
        self.maps.settle().await?;
        unsettled.settled();
        Ok(())
    }

    /// Calls `with` with the bytes of a cluster that each of these subclusters has.
    fn each_subcluster(&self, subclusters: u32, mut with: impl FnMut(Range<usize>)) {
        let granule = self.geometry.granule() as usize;
        for sub in (0..self.geometry.subclusters()).filter(|sub| subclusters & (1 << sub) != 0) {
            with(sub as usize * granule..(sub as usize + 1) * granule);
        }
    }

    /// The bytes of a cluster as the guest knows them, and the subclusters that it has.
    pub async fn bytes_of(&self, entry: &Entry, guest: u64) -> Result<(Buf, u32), Error> {
        let mut copy = Buf::zeroed(self.geometry.cluster() as usize);
        if let Some(place) = entry.compressed {
            copy.copy_from_slice(&self.decode_cluster(place, guest).await?);
            return Ok((copy, self.geometry.all_subclusters()));
        }
        let Some(old) = entry.host else { return Ok((copy, 0)) };
        let bytes = self.file.read(old, copy.len()).await?;
        self.each_subcluster(entry.data, |at| {
            copy[at.clone()].copy_from_slice(&bytes[at.clone()]);
            if let Some(cipher) = &self.cipher {
                cipher.decrypt(Spot { disk: guest, file: old }.after(at.start as u64), &mut copy[at]);
            }
        });
        Ok((copy, entry.data))
    }

    /// Gives up our reference to a cluster that the entry called shared, and that others may be reading at this moment: they hold
    /// other subclusters of it, or are loading another part of the table. As long as a snapshot has it, too, that changes nothing
    /// for them. If it turns out to have been ours alone, it is left as it is until the image is closed.
    async fn leave_shared(&self, host: u64) {
        let cluster = host >> self.geometry.cluster_bits;
        let mut references = 0;
        let look = |_, refcount| {
            references = refcount;
            None
        };
        let looked = self.change_some(&(cluster..cluster + 1), look).await;
        match looked {
            Ok(_) if references > 1 => self.reserve.free(cluster..cluster + 1),
            _ => self.reserve.abandon(cluster),
        }
    }
}

/// Appends a fill, or lengthens the last one if that continues in the new one.
fn push_fill(fills: &mut Vec<Fill>, fill: Fill) {
    if let Some(last) = fills.last_mut() {
        let len = last.range.end - last.range.start;
        let same = match (last.under, fill.under) {
            (Under::Copied { file, offset }, Under::Copied { file: next_file, offset: next }) => {
                file == next_file && offset + len == next
            }
            (before, after) => before == after,
        };
        if same
            && last.range.end == fill.range.start
            && last.file == fill.file
            && last.offset + len == fill.offset
        {
            last.range.end = fill.range.end;
            return;
        }
    }
    fills.push(fill);
}
