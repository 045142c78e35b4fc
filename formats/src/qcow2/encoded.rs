//! Compressed clusters: reading them, and storing those that a tool has encoded.
//!
//! A compressed cluster is never changed: a write gives it an ordinary place (`plan`). Its bytes lie anywhere in clusters of the file
//! that it shares with others; each of these clusters counts it in its refcount, and loses it when the entry is replaced.
//!
//! Order of storing: bytes are written and refcounts raised, one flush, then the entries, which wait for a flush of the data
//! like all that hide other bytes: bytes that are not durable would not read as zero, but as damage.

use std::ops::Range;
use std::rc::Rc;

use super::image::Image;
use super::l2::{Compressed, Entry};
use crate::driver::{Encoding, Order};
use crate::error::{Error, ErrorKind};
use crate::file::Buf;

/// Bytes that go into clusters of the file which lie in a row, and the clusters' references.
struct Packer<'a> {
    image: &'a Image,
    /// Clusters that were taken and are not used yet; they go back.
    pool: Vec<Range<u64>>,
    /// What is left of the clusters in use.
    rest: Range<u64>,
    /// Bytes to be written, by offset, ascending within a run of clusters.
    runs: Vec<(u64, Vec<u8>)>,
    /// Clusters in use and their references.
    references: Vec<(u64, u64)>,
}

impl Drop for Packer<'_> {
    fn drop(&mut self) {
        self.pool.drain(..).for_each(|range| self.image.reserve.put_back(range));
        // What was written to is not clean any more.
        self.references.iter().for_each(|(cluster, _)| self.image.reserve.abandon(*cluster));
    }
}

impl Packer<'_> {
    /// Finds a place for the encoded bytes of a cluster.
    async fn place(&mut self, bytes: &[u8]) -> Result<Compressed, Error> {
        let geometry = &self.image.geometry;
        let (bits, len) = (geometry.cluster_bits, bytes.len() as u64);
        let is_full = |(cluster, references): &(u64, u64)| {
            *cluster == self.rest.start >> bits && *references >= geometry.refcount_max()
        };
        if self.references.last().is_some_and(is_full) {
            self.rest.start = geometry.round_up(self.rest.start + 1).min(self.rest.end);
        }
        while self.rest.end - self.rest.start < len {
            if self.pool.is_empty() {
                self.pool = self.image.allocate(1).await?;
            }
            let next = self.pool.remove(0);
            let (start, end) = (next.start << bits, next.end << bits);
            if start != self.rest.end || self.rest.is_empty() {
                self.rest.start = start;
            }
            self.rest.end = end;
        }
        let offset = self.rest.start;
        let place = Compressed::of_stream(geometry, offset, len).ok_or_else(|| {
            let what =
                format!("byte {offset} of the file is behind what an entry of a compressed cluster reaches");
            Error::new(ErrorKind::NoSpace, format!("{}: {what}", self.image.name()))
        })?;
        self.rest.start += len;
        for cluster in place.clusters(geometry) {
            match self.references.last_mut().filter(|(last, _)| *last == cluster) {
                Some((_, references)) => *references += 1,
                None => self.references.push((cluster, 1)),
            }
        }
        match self.runs.last_mut() {
            Some((start, run)) if *start + run.len() as u64 == offset => run.extend_from_slice(bytes),
            _ => self.runs.push((offset, bytes.to_vec())),
        }
        Ok(place)
    }

    /// Clusters of the last run that nothing was put into.
    fn give_back_rest(&mut self) {
        let bits = self.image.geometry.cluster_bits;
        let unused = self.image.geometry.round_up(self.rest.start) >> bits..self.rest.end >> bits;
        if !unused.is_empty() {
            self.pool.push(unused);
        }
        self.rest = 0..0;
    }

    /// Writes the bytes, raises the refcounts (the reserve's clusters have one reference), and makes both durable.
    async fn store(&mut self) -> Result<(), Error> {
        let image = self.image;
        let writes: Vec<_> =
            self.runs.iter().map(|(offset, run)| image.file.write(*offset, Buf::copy_of(run))).collect();
        let _turn = image.refcounts_turn.lock().await;
        for &(cluster, references) in self.references.iter().filter(|(_, references)| *references > 1) {
            image.change_some(&(cluster..cluster + 1), |_, refcount| Some(refcount + references - 1)).await?;
        }
        image.refs.write_back().await?;
        for write in writes {
            write.await?;
        }
        image.file.flush().await
    }
}

impl Image {
    /// See [`crate::driver::Driver::decode`].
    pub async fn decode(&self, range: Range<u64>) -> Result<Buf, Error> {
        let _reading = self.encoded_reads.read().await;
        let guest = range.start & !(self.geometry.cluster() - 1);
        let end = range.end.min(guest + self.geometry.cluster());
        let part = (range.start - guest) as usize..(end - guest) as usize;
        let entry = match self.load_l1_entry(guest).await?.table {
            0 => Entry::default(),
            table => self.load_l2_entry(table, guest).await?,
        };
        match (entry.compressed, entry.host) {
            (Some(place), _) => Ok(Buf::copy_of(&self.decode_cluster(place, guest).await?[part])),
            // With subclusters a write to another one may have given the cluster an ordinary place since it was mapped.
            (None, Some(host)) => self.payload().1.read(host + part.start as u64, part.len()).await,
            (None, None) => Err(Error::invalid(format!("nothing at {} is encoded", range.start))),
        }
    }

    /// The bytes of a compressed cluster.
    pub async fn decode_cluster(&self, place: Compressed, guest: u64) -> Result<Rc<[u8]>, Error> {
        let damaged = |why| {
            let Compressed { offset, len } = place;
            let what = format!(
                "the compressed cluster for offset {guest} of the disk (up to {len} bytes at {offset})"
            );
            Error::corrupt(self.name(), format!("{what}: {why}; other ranges are served"))
        };
        let read = || self.file.read(place.offset, place.len as usize);
        let cluster = self.geometry.cluster() as usize;
        self.decoded.get(place.offset, self.header.compression, cluster, read, damaged).await
    }

    /// See [`crate::driver::Driver::encoding`].
    pub fn encoding(&self) -> Option<Encoding> {
        let unit = self.geometry.cluster();
        let encoding = Encoding { method: self.header.compression, unit, encoded_max: unit as usize - 1 };
        (self.writable && !self.geometry.data_file).then_some(encoding)
    }

    /// See [`crate::driver::Driver::write_encoded`].
    pub async fn write_encoded(&self, units: Vec<(u64, Vec<u8>)>) -> Result<(), Error> {
        let Some(encoding) = self.encoding() else {
            return Err(Error::unsupported(self.name(), "an external data file excludes compression"));
        };
        if let Some((at, bytes)) =
            units.iter().find(|(_, bytes)| !(1..=encoding.encoded_max).contains(&bytes.len()))
        {
            let message = format!(
                "{}: {} bytes for offset {at} do not fit a compressed cluster",
                self.name(),
                bytes.len()
            );
            return Err(Error::invalid(message));
        }
        self.begin_changes().await?;
        self.late.wait().await;
        let mut tables = Vec::with_capacity(units.len());
        for (guest, _) in &units {
            tables.push(self.own_table(*guest).await?);
        }
        let total: u64 = units.iter().map(|(_, bytes)| bytes.len() as u64).sum();
        let pool = self.allocate(self.geometry.clusters_of(total)).await?;
        let mut packer = Packer { image: self, pool, rest: 0..0, runs: Vec::new(), references: Vec::new() };
        let mut places = Vec::with_capacity(units.len());
        for (_, bytes) in &units {
            places.push(packer.place(bytes).await?);
        }
        packer.give_back_rest();
        packer.store().await?;
        // From here on the entries have them: what a failure leaves is leaks.
        packer.references.clear();
        drop(packer);
        for (((guest, _), table), place) in units.iter().zip(tables).zip(places) {
            let entry = Entry { compressed: Some(place), ..Entry::default() };
            self.decoded.forget(place.offset);
            let old = self.change_l2_entry(table, *guest, Order::AfterData, |_| Some(entry)).await?;
            self.free_places(&old);
        }
        self.maps.settle().await
    }
}
