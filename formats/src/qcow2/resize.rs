//! Another size of the disk: growing while it is used, shrinking offline.
//!
//! Order of growing: a larger L1 table is written and flushed, then the header points to it; what the new range must not show (the
//! layer below, what a foreign writer left behind the old end) is covered by zeroes, flushed; then the size changes. Each header
//! write is within one sector, so every crash leaves the old or the new state.

use std::rc::Rc;

use super::header::{L1_MAX_BYTES, TablePlace};
use super::image::Image;
use super::l2::State;
use crate::crypt::Spot;
use crate::driver::{Erase, Open};
use crate::error::Error;
use crate::file::Buf;

impl Image {
    /// See [`crate::driver::Driver::resize`].
    pub async fn resize(&self, size: u64) -> Result<(), Error> {
        let old = self.size.get();
        if size == old {
            return Ok(());
        }
        if size < old {
            return Err(Error::invalid(format!(
                "{}: {size} bytes are less than the disk's {old}: a disk in use cannot shrink; `image resize --shrink` does it offline",
                self.name()
            )));
        }
        self.check_new_size(size)?;
        self.begin_changes().await?;
        if self.geometry.l1_entries_for(size) > self.l1.get().entries {
            self.grow_l1(size).await?;
        }
        self.clear_behind(old, size).await?;
        self.maps.write_back().await?;
        self.file.flush().await?;
        if let Some(data) = self.data.as_ref().filter(|_| self.header.data_file_raw()) {
            data.extend(size).await?;
            data.flush().await?;
        }
        self.write_size(size).await
    }

    fn check_new_size(&self, size: u64) -> Result<(), Error> {
        if let Some(why) = self.fixed_size {
            return Err(Error::unsupported(self.name(), format!("its size cannot be changed: {why}")));
        }
        if !size.is_multiple_of(512) || self.geometry.l1_entries_for(size) * 8 > L1_MAX_BYTES {
            let most = L1_MAX_BYTES / 8 * self.geometry.l2_covers();
            return Err(Error::invalid(format!(
                "{}: a size of {size} bytes is not possible: take a multiple of 512 up to {most}",
                self.name()
            )));
        }
        Ok(())
    }

    /// Writes the size into the header and makes it the one that counts.
    async fn write_size(&self, size: u64) -> Result<(), Error> {
        self.file.write(24, Buf::copy_of(&size.to_be_bytes())).await?;
        self.file.flush().await?;
        self.size.set(size);
        Ok(())
    }

    /// Moves the L1 table to a place where it has entries for `size` bytes.
    async fn grow_l1(&self, size: u64) -> Result<(), Error> {
        let _turn = self.tables_turn.lock().await;
        let geometry = &self.geometry;
        let old = self.l1.get();
        let entries = geometry.l1_entries_for(size);
        let clusters = geometry.clusters_of(entries * 8);
        let at = self.allocate_row(clusters).await? << geometry.cluster_bits;
        // Nobody changes an L1 entry while we hold the turn.
        self.maps.write_back().await?;
        self.file.flush().await?;
        let mut table = self.file.read(old.offset, (old.entries * 8) as usize).await?.to_vec();
        table.resize((clusters << geometry.cluster_bits) as usize, 0);
        self.file.write(at, Buf::copy_of(&table)).await?;
        self.file.flush().await?;
        let mut place = [0; 12];
        place[..4].copy_from_slice(&(entries as u32).to_be_bytes());
        place[4..].copy_from_slice(&at.to_be_bytes());
        self.maps.forget(at..at + table.len() as u64);
        let new = TablePlace { offset: at, entries };
        self.switch_table(&self.l1, new, self.file.write(36, Buf::copy_of(&place))).await?;
        self.file.flush().await?;
        let old_bytes = old.offset..old.offset + old.entries * 8;
        let old_clusters =
            old_bytes.start >> geometry.cluster_bits..old_bytes.end.div_ceil(geometry.cluster());
        self.move_fixed(old_bytes, at..at + entries * 8);
        self.reserve.free(old_clusters);
        Ok(())
    }

    /// Makes everything from `old` to `new` read as zero.
    async fn clear_behind(&self, old: u64, new: u64) -> Result<(), Error> {
        let granule = self.geometry.granule();
        let whole = old.next_multiple_of(granule);
        if old < whole {
            self.clear_tail(old, whole).await?;
        }
        let end = new.next_multiple_of(granule);
        if whole >= end {
            return Ok(());
        }
        // What the layer below has there needs zero clusters; version 2 has only real ones.
        let below_end = self.below.clamp(whole, end).next_multiple_of(granule);
        let how = if self.geometry.version >= 3 { Erase::Zero } else { Erase::ZeroKeep };
        if whole < below_end {
            self.erase_granules(whole..below_end, how).await?;
        }
        self.erase_granules(below_end..end, Erase::Zero).await?;
        Ok(())
    }

    /// Zeroes the rest of the granule in which the disk ended.
    async fn clear_tail(&self, old: u64, whole: u64) -> Result<(), Error> {
        let cluster_start = old & !(self.geometry.cluster() - 1);
        let entry = match self.load_l1_entry(old).await?.table {
            0 => Default::default(),
            table => self.load_l2_entry(table, cluster_start).await?,
        };
        let sub = ((old - cluster_start) / self.geometry.granule()) as u32;
        match (entry.state(sub), entry.host) {
            (State::Data, Some(host)) if entry.copied || self.geometry.data_file => {
                let at = host + (old - cluster_start);
                self.clear_place(Spot { disk: old, file: at }, whole - old).await?;
                self.payload().1.flush().await
            }
            (State::Data | State::Compressed, _) => {
                // Shared or encoded: the bytes before the end get a place of their own, with zeroes behind them.
                let granule = self.geometry.granule();
                let start = old & !(granule - 1);
                let (cluster, _) = self.bytes_of(&entry, cluster_start).await?;
                let mut bytes =
                    Buf::copy_of(&cluster[(start - cluster_start) as usize..][..granule as usize]);
                let tail = &mut bytes[(old - start) as usize..];
                if tail.iter().all(|byte| *byte == 0) {
                    return Ok(());
                }
                tail.fill(0);
                let plan = self.plan_write(start, granule).await?;
                let place = plan.fills.first().map(|fill| fill.offset);
                if let Some((cipher, place)) = self.cipher.as_ref().zip(place) {
                    cipher.encrypt(Spot { disk: start, file: place }, &mut bytes);
                }
                let written = match place {
                    Some(place) => self.file.write(place, bytes).await,
                    None => Ok(()),
                };
                match written {
                    Ok(()) => self.commit(&plan).await,
                    Err(error) => {
                        self.abort(&plan);
                        Err(error)
                    }
                }
            }
            (State::Absent, _) if self.below_has(old) => Err(Error::unsupported(
                self.name(),
                format!(
                    "the disk ends at {old}, within a cluster that the longer layer below has: write that cluster first, then grow"
                ),
            )),
            _ => Ok(()),
        }
    }

    /// Drops everything behind `size` and makes that the size.
    async fn shrink(&self, size: u64) -> Result<(), Error> {
        self.check_new_size(size)?;
        self.begin_changes().await?;
        let granule = self.geometry.granule();
        let whole = size.next_multiple_of(granule);
        if size < whole {
            // So that growing again shows zeroes.
            match self.clear_tail(size, whole.min(self.size.get().next_multiple_of(granule))).await {
                Err(error) if error.kind == crate::error::ErrorKind::Unsupported => {}
                other => other?,
            }
        }
        self.erase_granules(whole..self.size.get().next_multiple_of(granule), Erase::Zero).await?;
        self.maps.write_back().await?;
        self.file.flush().await?;
        self.write_size(size).await
    }
}

/// Makes the disk of an image smaller, offline: everything behind `size` bytes is lost. A larger size is refused (that is
/// [`crate::driver::Driver::resize`]'s work).
///
/// # Errors
/// `size` is no multiple of 512 or larger than the disk; the image cannot be changed.
pub async fn shrink(open: Open, size: u64) -> Result<(), Error> {
    let driver: Rc<super::driver::Qcow2Driver> = super::driver::open(open).await?;
    let result = match size <= driver.image().size.get() {
        true => driver.image().shrink(size).await,
        false => {
            Err(Error::invalid(format!("{size} bytes are more than the disk has: that is no shrinking")))
        }
    };
    let closed = driver.shut().await;
    result.and(closed)
}
