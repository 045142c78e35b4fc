//! Refcounts for a longer file: new refcount blocks, and a longer refcount table when the old one is full.
//!
//! Both lie behind all other clusters and count themselves. Order: blocks (and the new table) are written and flushed, then an entry of
//! the table (or the header) points to them. A crash before that leaves the file as it was, with unused bytes behind it.
//!
//! Numbers count clusters of the file unless they are called offsets. The caller holds `Image::refcounts_turn`.

use super::header::{REFTABLE_MAX_BYTES, TablePlace};
use super::image::Image;
use super::refcount;
use crate::driver::Order;
use crate::error::{Error, ErrorKind};
use crate::file::Buf;

impl Image {
    /// Makes sure that `wanted` clusters in a row behind all others have refcount blocks; returns the first. New blocks, and a new
    /// table if the old one is too short, come before them and count themselves.
    pub(super) async fn cover(&self, wanted: u64) -> Result<u64, Error> {
        let at = self.find_end().await?;
        let per_block = self.geometry.block_entries();
        let (mut own, mut missing, mut table_clusters) = (0, Vec::new(), 0);
        loop {
            let last = (at + own + wanted - 1) / per_block;
            missing.clear();
            for index in at / per_block..=last {
                if self.block_of(index * per_block).await? == 0 {
                    missing.push(index);
                }
            }
            table_clusters = if last >= self.reftable.get().entries {
                self.grown_table(last + 1)?
            } else {
                table_clusters
            };
            let needed = missing.len() as u64 + table_clusters;
            if needed == own {
                break;
            }
            own = needed;
        }
        if own > 0 {
            self.add_blocks(at, &missing, table_clusters).await?;
        }
        self.reserve.end.set(Some(at + own));
        Ok(at + own)
    }

    /// Clusters of a refcount table for at least `entries` entries, half as large again as the old one.
    fn grown_table(&self, entries: u64) -> Result<u64, Error> {
        let entries = entries.max(self.reftable.get().entries * 3 / 2);
        let clusters = self.geometry.clusters_of(entries * 8);
        if clusters << self.geometry.cluster_bits > REFTABLE_MAX_BYTES {
            let message =
                format!("{}: its refcount table cannot grow further, so the file cannot", self.name());
            return Err(Error::new(ErrorKind::NoSpace, message));
        }
        Ok(clusters)
    }

    /// Writes the refcount blocks `missing` at cluster `at` and, if `table_clusters` is not 0, a new table behind them.
    async fn add_blocks(&self, at: u64, missing: &[u64], table_clusters: u64) -> Result<(), Error> {
        let geometry = &self.geometry;
        let (bits, per_block) = (geometry.cluster_bits, geometry.block_entries());
        let own = at..at + missing.len() as u64 + table_clusters;
        let mut blocks: Vec<Buf> = missing.iter().map(|_| Buf::zeroed(geometry.cluster() as usize)).collect();
        for cluster in own.clone() {
            match missing.iter().position(|index| *index == cluster / per_block) {
                Some(number) => {
                    refcount::set(
                        &mut blocks[number],
                        geometry.refcount_order,
                        (cluster % per_block) as usize,
                        1,
                    );
                }
                None => {
                    self.change_some(&(cluster..cluster + 1), |_, _| Some(1)).await?;
                }
            }
        }
        // Taken from now on, whatever happens to this future: a failure leaks them.
        self.reserve.end.set(Some(own.end));
        self.refs.forget(own.start << bits..own.end << bits);
        self.file.extend(own.end << bits).await?;
        let mut writes = Vec::new();
        for (number, block) in blocks.into_iter().enumerate() {
            writes.push(self.file.write((at + number as u64) << bits, block));
        }
        for write in writes {
            write.await?;
        }
        self.refs.write_back().await?;
        let entries =
            missing.iter().enumerate().map(|(number, index)| (*index, (at + number as u64) << bits));
        if table_clusters > 0 {
            return self.move_table(own.end - table_clusters, table_clusters, entries.collect()).await;
        }
        self.file.flush().await?;
        for (index, offset) in entries {
            self.refs
                .update(self.reftable.get().offset + index * 8, &offset.to_be_bytes(), Order::Anytime)
                .await?;
        }
        Ok(())
    }

    /// Writes the refcount table with new entries at cluster `at` and makes it the one that counts.
    async fn move_table(&self, at: u64, clusters: u64, entries: Vec<(u64, u64)>) -> Result<(), Error> {
        let geometry = &self.geometry;
        let old = self.reftable.get();
        let mut table = self.file.read(old.offset, (old.entries * 8) as usize).await?.to_vec();
        table.resize((clusters << geometry.cluster_bits) as usize, 0);
        for (index, offset) in entries {
            table[index as usize * 8..index as usize * 8 + 8].copy_from_slice(&offset.to_be_bytes());
        }
        let offset = at << geometry.cluster_bits;
        self.file.write(offset, Buf::copy_of(&table)).await?;
        self.file.flush().await?;
        let mut place = [0; 12];
        place[..8].copy_from_slice(&offset.to_be_bytes());
        place[8..].copy_from_slice(&(clusters as u32).to_be_bytes());
        let new = TablePlace { offset, entries: (table.len() / 8) as u64 };
        self.switch_table(&self.reftable, new, self.file.write(48, Buf::copy_of(&place))).await?;
        let old_bytes = old.offset..old.offset + old.entries * 8;
        self.refs.forget(old_bytes.clone());
        self.move_fixed(old_bytes.clone(), offset..offset + table.len() as u64);
        // They go back when a flush has succeeded, and with them the header is durable.
        self.reserve.free(old_bytes.start >> geometry.cluster_bits..old_bytes.end >> geometry.cluster_bits);
        self.file.flush().await
    }
}
