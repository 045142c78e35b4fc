//! What is wrong with an image: entries that point nowhere, places that two entries have.
//!
//! The format has no counts to compare with. References are counted for as many clusters of the file at a time as memory allows, as
//! qcow2's check does it; tables that lie on each other are damage and are not followed, so that every table is read once a pass.
//! Compressed bytes are never changed, so two entries may have the same: that is not looked for.
//!
//! Space is lost inside the file where compressed clusters were replaced, or writers died: a remark says how much. Behind the last
//! cluster in use it is a leak, which a repair cuts off. What data is right where two entries have one place nobody knows: it
//! stays.

use std::rc::Rc;

use md5::{Digest, Md5};

use super::entry::Entry;
use super::header::{self, Header};
use crate::counts::{Counts, DATA, TABLE};
use crate::driver::{Findings, Open, Repair};
use crate::error::{Error, ErrorKind};
use crate::file::ImageFile;

/// A reference to encoded bytes: several may be to one cluster.
const ENCODED: u32 = 1 << 30;
/// Bytes of the L1 table that are read at a time.
const READ_BYTES: u64 = 1 << 20;

struct Survey<'a> {
    file: &'a Rc<dyn ImageFile>,
    header: &'a Header,
    /// Offsets of the L2 tables, ascending, with the offset on the disk that each maps from.
    tables: Vec<(u64, u64)>,
    findings: Findings,
    /// First byte behind everything in use.
    end: u64,
    /// Clusters of the file in use.
    used: u64,
    first_pass: bool,
}

/// See [`crate::driver::Format::check`].
pub(super) async fn check(open: Open, repair: Option<Repair>) -> Result<Findings, Error> {
    let Some(file) = open.files.first() else { return Err(Error::invalid("a qcow image needs its file")) };
    if repair.is_some() && (!open.writable || !file.is_writable()) {
        let message = format!("{} was opened read-only: nothing can be repaired", file.name());
        return Err(Error::new(ErrorKind::ReadOnly, message));
    }
    let header = Header::read(file).await?;
    let end = header.l1 + header.geometry.l1_entries(header.size) * 8;
    let end = end.max(header.name.end).max(header::BYTES as u64);
    let mut survey = Survey {
        file,
        header: &header,
        tables: Vec::new(),
        findings: Findings::default(),
        end,
        used: 0,
        first_pass: true,
    };
    survey.collect().await?;
    let mut first = 0;
    loop {
        let mut counts = Counts { first, ..Counts::default() };
        survey.count(&mut counts).await?;
        survey.used += counts.used().count() as u64;
        survey.first_pass = false;
        match counts.next() {
            Some(next) => first = next,
            None => break,
        }
    }
    survey.conclude(repair).await
}

impl Survey<'_> {
    fn damage(&mut self, line: String) {
        if self.first_pass {
            self.findings.corruption(line);
        }
    }

    /// Reads the L1 table; keeps the tables that can be followed.
    async fn collect(&mut self) -> Result<(), Error> {
        let geometry = &self.header.geometry;
        let range = self.header.l1..self.header.l1 + geometry.l1_entries(self.header.size) * 8;
        let length = self.file.length().next_multiple_of(geometry.cluster());
        let mut all = Md5::new();
        for start in range.clone().step_by(READ_BYTES as usize) {
            let bytes = self.file.read(start, READ_BYTES.min(range.end - start) as usize).await?;
            all.update(&bytes[..]);
            for (index, word) in ((start - range.start) / 8..).zip(bytes.chunks_exact(8)) {
                let word: [u8; 8] = word.try_into().unwrap_or_default();
                let table =
                    if self.header.swapped() { u64::from_le_bytes(word) } else { u64::from_be_bytes(word) };
                if table == 0 {
                    continue;
                }
                let inside = table.checked_add(geometry.l2_bytes()).is_some_and(|end| end <= length);
                if inside && table.is_multiple_of(geometry.cluster()) {
                    self.tables.push((table, index * geometry.l2_covers()));
                } else {
                    self.damage(format!("L1 entry {index} ({table:#x}) names no place of a table"));
                }
            }
        }
        if let Some((noted, ..)) = self.header.extension.filter(|_| !self.header.swapped())
            && header::first_word(all) != noted
        {
            let remark = "the checksum of its extended header is not that of the L1 table: it was not closed; blktap ignores the extension then";
            self.findings.remarks.push(remark.into());
        }
        self.separate();
        Ok(())
    }

    /// Drops tables that lie on others.
    fn separate(&mut self) {
        self.tables.sort_unstable();
        let (bytes, mut kept) = (self.header.geometry.l2_bytes(), Vec::with_capacity(self.tables.len()));
        for (table, guest) in std::mem::take(&mut self.tables) {
            match kept.last() {
                Some((last, other)) if table < last + bytes => {
                    self.damage(format!(
                        "the L2 table for offset {guest} of the disk lies on that for offset {other}"
                    ));
                }
                _ => kept.push((table, guest)),
            }
        }
        self.tables = kept;
    }

    /// Counts the references to clusters of one window.
    async fn count(&mut self, counts: &mut Counts) -> Result<(), Error> {
        let geometry = self.header.geometry;
        let bits = geometry.cluster_bits;
        let clusters = |range: std::ops::Range<u64>| range.start >> bits..range.end.div_ceil(1 << bits);
        let l1 = self.header.l1..self.header.l1 + geometry.l1_entries(self.header.size) * 8;
        for range in [0..header::BYTES as u64, l1.clone(), self.header.name.clone()] {
            counts.add_range(clusters(range), TABLE);
        }
        for (table, guest) in self.tables.clone() {
            for cluster in clusters(table..table + geometry.l2_bytes()) {
                let before = counts.add(cluster, TABLE, 1).unwrap_or(0);
                if before & TABLE != 0 && table < l1.end {
                    self.damage(format!(
                        "the L2 table for offset {guest} of the disk lies on other metadata"
                    ));
                }
            }
            self.end = self.end.max(table + geometry.l2_bytes());
        }
        for (table, start) in self.tables.clone() {
            let bytes = self.file.read(table, geometry.l2_bytes() as usize).await?;
            for (index, word) in bytes.chunks_exact(8).enumerate() {
                let guest = start + ((index as u64) << bits);
                let word = word.try_into().map(u64::from_be_bytes).unwrap_or_default();
                self.count_entry(counts, word, guest);
            }
        }
        Ok(())
    }

    fn count_entry(&mut self, counts: &mut Counts, word: u64, guest: u64) {
        let geometry = self.header.geometry;
        let bits = geometry.cluster_bits;
        let place = format!("the L2 entry for offset {guest} of the disk");
        let (range, kind) = match Entry::decode(&geometry, word, self.file.length()) {
            Ok(Entry::Absent) => return,
            Ok(Entry::Data(offset)) => (offset..offset + geometry.cluster(), DATA),
            Ok(Entry::Compressed { offset, len }) => (offset..offset + len, ENCODED),
            Err(why) => return self.damage(format!("{place} ({word:#x}) {why}")),
        };
        if self.first_pass {
            self.findings.allocated_bytes += geometry.cluster();
            self.end = self.end.max(range.end);
        }
        // Encoded bytes may share a cluster with each other, and with the end of a table.
        let excluded = if kind == DATA { TABLE | DATA | ENCODED } else { DATA };
        for cluster in range.start >> bits..range.end.div_ceil(1 << bits) {
            let before = counts.add(cluster, kind, 1).unwrap_or(0);
            if before & excluded != 0 {
                // Damage of all passes: each looks at other clusters.
                self.findings.corruption(format!(
                    "{place} points to byte {} of the file, which is used otherwise",
                    range.start
                ));
                break;
            }
        }
    }

    /// Says what is lost, and cuts off what is behind everything.
    async fn conclude(mut self, repair: Option<Repair>) -> Result<Findings, Error> {
        let cluster = self.header.geometry.cluster();
        let length = self.file.length();
        let end = self.end.next_multiple_of(cluster);
        let is_reserved = self.header.extension.is_some_and(|(_, _, flags)| flags & header::SPARSE == 0);
        let behind = length.next_multiple_of(cluster).saturating_sub(end.max(4096)) / cluster;
        if self.header.swapped() {
            self.findings.remarks.push("its L1 table is little-endian: the first write puts it right".into());
        }
        let unused = (end / cluster).saturating_sub(self.used) * cluster;
        if unused > 4096.max(cluster) {
            self.findings
                .remarks
                .push(format!("{unused} bytes inside the file are not used: a conversion gives them back"));
        }
        if behind > 0 && !is_reserved && !self.file.is_device() {
            self.findings
                .leak(behind, format!("{behind} clusters behind byte {end} of the file are not used"));
            if repair.is_some() && self.findings.corruptions_total == 0 {
                self.file.truncate(end.min(length)).await?;
                self.file.flush().await?;
                self.findings.repaired_total += behind;
            }
        }
        self.findings.end = self.end;
        Ok(self.findings)
    }
}
