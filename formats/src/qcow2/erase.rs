//! Discards and zeroes of whole granules.
//!
//! What an erased range becomes: a zero cluster where something would shine through otherwise or zeroes were asked for (version
//! 3), else nothing. Its cluster goes back; its bytes are given to the store at once, since the range reads as zero from now on
//! and old or new bytes are right until the next flush.

use std::ops::Range;

use super::image::Image;
use super::l2::{Entry, State, mask};
use crate::driver::{Erase, Erased, Order};
use crate::error::Error;

/// What becomes of one cluster.
enum Change {
    /// It is as it should be.
    Nothing,
    /// A new entry; the cluster of the file is not used any more if `frees`.
    Set { entry: Entry, frees: bool },
    /// It needs a new cluster that reads as zero.
    Fill { subclusters: u32 },
    /// Zeroes have to be written as data.
    Write,
    /// A part of a compressed cluster: it needs a place of its own first.
    Decode,
}

impl Image {
    /// See [`crate::driver::Driver::erase`]. The range may end at the end of the disk within a granule.
    pub async fn erase(&self, range: Range<u64>, how: Erase) -> Result<Erased, Error> {
        self.begin_changes().await?;
        self.late.wait().await;
        if let Some(data) = self.data.as_ref().filter(|_| self.header.data_file_raw()) {
            // The data file must read right by itself.
            self.late.finish(data.zero(range)).await?;
            return Ok(Erased::Done);
        }
        if self.geometry.version < 3 && (how == Erase::ZeroKeep || self.below_has(range.start)) {
            return Ok(Erased::WriteZeroes);
        }
        let end = range.end.next_multiple_of(self.geometry.granule());
        self.erase_granules(range.start..end, how).await
    }

    /// Erases whole granules, also behind the end of the disk.
    pub async fn erase_granules(&self, range: Range<u64>, how: Erase) -> Result<Erased, Error> {
        let covers = self.geometry.l2_covers();
        let mut erased = Erased::Done;
        let mut at = range.start;
        while at < range.end {
            let stop = range.end.min((at / covers + 1) * covers);
            let has_table = self.load_l1_entry(at).await?.table != 0;
            let reads_zero = !has_table && !self.below_has(at);
            if !(reads_zero && how != Erase::ZeroKeep)
                && self.erase_in_table(at..stop, how).await? == Erased::WriteZeroes
            {
                erased = Erased::WriteZeroes;
            }
            at = stop;
        }
        self.maps.settle().await?;
        Ok(erased)
    }

    /// Erases a range that one L2 table maps.
    async fn erase_in_table(&self, range: Range<u64>, how: Erase) -> Result<Erased, Error> {
        let geometry = &self.geometry;
        let mut table = None;
        let mut punched: Option<Range<u64>> = None;
        let mut erased = Erased::Done;
        // Only behind their punch: a cluster that went back may be somebody else's soon.
        let mut unused: Vec<Range<u64>> = Vec::new();
        let mut guest = range.start & !(geometry.cluster() - 1);
        while guest < range.end {
            let part = range.start.max(guest)..range.end.min(guest + geometry.cluster());
            let read_table = match table {
                Some(table) => table,
                None => self.load_l1_entry(guest).await?.table,
            };
            let old = match read_table {
                0 => Entry::default(),
                at => self.load_l2_entry(at, guest).await?,
            };
            let change = self.erased(&old, guest, &part, how);
            if !matches!(change, Change::Nothing | Change::Write) && table.is_none() {
                table = Some(self.own_table(guest).await?);
                // The copy of a shared table has other flags: look again.
                continue;
            }
            match change {
                Change::Nothing => {}
                Change::Write => erased = Erased::WriteZeroes,
                Change::Decode => {
                    self.unshare(read_table, guest).await?;
                    continue;
                }
                Change::Set { .. } => {
                    let Some((old, frees)) = self.set_erased(read_table, guest, &part, how).await? else {
                        continue;
                    };
                    if old.compressed.is_some() {
                        self.free_places(&old);
                    }
                    if let Some(host) = old.host.filter(|_| !matches!(how, Erase::ZeroKeep)) {
                        if frees && !geometry.data_file {
                            let cluster = host >> geometry.cluster_bits;
                            match unused.last_mut() {
                                Some(last) if last.end == cluster => last.end += 1,
                                _ => unused.push(cluster..cluster + 1),
                            }
                        }
                        // Zeroes in a place do not read as zero when they are decrypted, and after a crash its entry may be the old one:
                        // an encrypted place goes back to the store when the removal of its entry is durable.
                        if old.copied && self.cipher.is_none() {
                            let bytes = host + (part.start - guest)..host + (part.end - guest);
                            self.punch(&mut punched, Some(bytes)).await?;
                        }
                    }
                }
                Change::Fill { subclusters } => self.fill_zero(read_table, guest, subclusters).await?,
            }
            guest += geometry.cluster();
        }
        self.punch(&mut punched, None).await?;
        unused.into_iter().for_each(|range| self.reserve.free(range));
        if self.reserve.freed_count() > super::clusters::FREED_MANY {
            self.settle_freed().await?;
        }
        Ok(erased)
    }

    /// Sets the entry of a cluster to what erasing its granules `part` makes of it. Returns the entry before, and whether its cluster is
    /// not used any more; `None` when others have made something else of the entry, so that nothing is to be set.
    async fn set_erased(
        &self,
        table: u64,
        guest: u64,
        part: &Range<u64>,
        how: Erase,
    ) -> Result<Option<(Entry, bool)>, Error> {
        let mut freed = None;
        let erase = |now: &Entry| match self.erased(now, guest, part, how) {
            Change::Set { entry, frees } => {
                freed = Some(frees);
                Some(entry)
            }
            _ => {
                freed = None;
                None
            }
        };
        let old = self.change_l2_entry(table, guest, Order::Anytime, erase).await?;
        Ok(freed.map(|frees| (old, frees)))
    }

    /// What becomes of the granules `part` of the cluster at `guest`.
    fn erased(&self, old: &Entry, guest: u64, part: &Range<u64>, how: Erase) -> Change {
        let geometry = &self.geometry;
        let granule = geometry.granule();
        let bits = mask(((part.start - guest) / granule) as u32, ((part.end - guest) / granule) as u32);
        let ends = part.start == guest && part.end >= self.size.get();
        let whole = bits == geometry.all_subclusters() || (ends && old.compressed.is_some());
        let below = self.below_has(guest);
        let v3 = geometry.version >= 3;
        if how == Erase::ZeroKeep {
            let keeps = old.host.is_some() && (old.copied || geometry.data_file);
            return match keeps {
                true if v3 && old.zero & bits == bits => Change::Nothing,
                true if v3 => {
                    let entry = Entry { data: old.data & !bits, zero: old.zero | bits, ..*old };
                    Change::Set { entry, frees: false }
                }
                true => Change::Write,
                false if geometry.data_file || (geometry.extended_l2 && (old.host.is_some() || !whole)) => {
                    Change::Write
                }
                false => Change::Fill { subclusters: bits },
            };
        }
        let explicit = v3 && (how == Erase::Zero || below);
        let settled =
            (0..geometry.subclusters()).filter(|sub| bits >> sub & 1 == 1).all(|sub| match old.state(sub) {
                State::Data | State::Compressed => false,
                State::Zero => true,
                State::Absent => !below,
            });
        if settled && (old.host.is_none() || !whole) {
            return Change::Nothing;
        }
        if whole {
            let zero = if explicit { geometry.all_subclusters() } else { 0 };
            return Change::Set { entry: Entry { zero, ..Entry::default() }, frees: true };
        }
        if old.compressed.is_some() {
            // A part of it cannot be called zero; and a discard shall not take more space than there was.
            return if how == Erase::Discard { Change::Nothing } else { Change::Decode };
        }
        let entry = Entry { data: old.data & !bits, zero: old.zero | bits, ..*old };
        Change::Set { entry, frees: false }
    }

    /// Maps a new cluster that reads as zero.
    async fn fill_zero(&self, table: u64, guest: u64, subclusters: u32) -> Result<(), Error> {
        let taken = self.allocate(1).await?;
        let Some(cluster) = taken.first().map(|range| range.start) else { return Ok(()) };
        let host = Some(cluster << self.geometry.cluster_bits);
        let entry = match &self.cipher {
            None => Entry { host, copied: true, data: subclusters, zero: 0, compressed: None },
            // The place reads as zero only if nobody decrypts it.
            Some(_) => Entry { host, copied: true, data: 0, zero: subclusters, compressed: None },
        };
        match self.change_l2_entry(table, guest, Order::Anytime, |_| Some(entry)).await {
            Ok(old) => {
                self.free_places(&old);
                Ok(())
            }
            Err(error) => {
                self.reserve.put_back(cluster..cluster + 1);
                Err(error)
            }
        }
    }

    /// Gives bytes of the payload's file to the store, in as long stretches as come; `None` ends it.
    async fn punch(&self, pending: &mut Option<Range<u64>>, next: Option<Range<u64>>) -> Result<(), Error> {
        match (pending.as_mut(), &next) {
            (Some(old), Some(new)) if old.end == new.start => {
                old.end = new.end;
                return Ok(());
            }
            _ => {}
        }
        let file = self.payload().1;
        if let Some(old) = std::mem::replace(pending, next) {
            let old = old.start..old.end.min(file.length());
            if !old.is_empty() {
                self.late.finish(file.zero(old)).await?;
            }
        }
        Ok(())
    }
}
