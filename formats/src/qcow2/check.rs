//! A survey of everything that an image refers to, compared with its refcounts.
//!
//! ```text
//!  places    header, directory of bitmaps, snapshot table ─▶ where the tables are that are named there; none on another
//!  collect   L1 tables (active, snapshots) ─▶ every distinct L2 table, with how often it is referred to
//!  window    references ─▶ counts of clusters, as many as memory allows ─▶ compared with the refcount blocks ─▶ next window
//!  copied    active tables again: the flag "refcount is one" against the counts
//! ```
//! Memory is bounded: counts are kept in pages of 1024 clusters, at most `PAGES_MAX` of them; an image with more is read in several
//! passes.
//! What is kept besides is a line for each table, and tables are clusters of the file.
//! Time is bounded by the file: tables that lie on each other are damage and are not followed, so that what is read in a pass is
//! in the file once; every L2 table is read once a pass, however often it is referred to.

use std::collections::{HashMap, HashSet};
use std::rc::Rc;

mod places;

use places::{Fixed, Holds};

use super::bitmap;
use super::header::{Geometry, Header, TablePlace};
use super::l1::L1Entry;
use super::l2::Entry;
use super::refcount::{self, TABLE_OFFSET_MASK};
use super::snapshot::SnapshotTable;
use crate::counts::{ACTIVE, COUNT, Counts, DATA, L2, PAGE, TABLE};
use crate::driver::Findings;
use crate::error::Error;
use crate::file::{Buf, ImageFile, Pending};

/// L2 tables that are read at the same time, in bytes.
const READ_AHEAD_BYTES: u64 = 4 << 20;
/// Most L2 tables that are read at the same time.
const READ_AHEAD_MAX: u64 = 16;

/// What a survey may change.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Fix {
    /// Refcounts that are too low.
    pub raise: bool,
    /// Refcounts that are too high.
    pub lower: bool,
    /// Flags that say that a refcount is one.
    pub copied: bool,
}

/// How an L2 table is referred to.
#[derive(Debug, Clone, Copy, Default)]
struct TableUse {
    references: u32,
    /// Offset on the disk that it maps from, in the active state.
    active: Option<u64>,
}

/// A table, for [`Survey::separate`].
#[derive(Debug, Clone, Copy)]
enum Place {
    /// Number in `fixed`.
    Fixed(usize),
    /// Number of a refcount block.
    Block(usize),
    /// Offset of an L2 table.
    L2(u64),
}

/// Words of tables that are read at a time, in bytes: enough for speed, and others get in between.
const READ_BYTES: u64 = 1 << 20;

/// See the module.
pub(super) struct Survey<'a> {
    file: &'a Rc<dyn ImageFile>,
    header: &'a Header,
    snapshots: &'a SnapshotTable,
    /// Further L1 tables whose references count, for snapshots in the making.
    extra: Vec<TablePlace>,
    fix: Fix,
    /// End of the file in whole clusters.
    end: u64,
    tables: Vec<(u64, TableUse)>,
    /// Offset of each refcount block that can be used; 0 for none.
    blocks: Vec<u64>,
    /// Tables other than L2 tables and refcount blocks.
    fixed: Vec<Fixed>,
    /// The result.
    pub findings: Findings,
    /// Tables could not be followed: what they refer to is not known, so nothing may be called unused.
    pub blind: bool,
    /// Refcounts cannot be repaired where they are.
    pub needs_rebuild: bool,
    /// Damage that no repair of refcounts mends.
    pub beyond_repair: u64,
    quiet: bool,
}

fn be64(bytes: &[u8]) -> u64 {
    bytes.try_into().map(u64::from_be_bytes).unwrap_or_default()
}

impl<'a> Survey<'a> {
    /// A survey that may change what `fix` says.
    pub fn new(
        file: &'a Rc<dyn ImageFile>,
        header: &'a Header,
        snapshots: &'a SnapshotTable,
        fix: Fix,
    ) -> Survey<'a> {
        Survey {
            file,
            header,
            snapshots,
            extra: Vec::new(),
            fix,
            end: header.geometry.round_up(file.length()),
            tables: Vec::new(),
            blocks: Vec::new(),
            fixed: Vec::new(),
            findings: Findings::default(),
            blind: false,
            needs_rebuild: false,
            beyond_repair: 0,
            quiet: false,
        }
    }

    /// Counts the references of one more L1 table.
    pub fn with_l1(mut self, l1: TablePlace) -> Survey<'a> {
        self.extra.push(l1);
        self
    }

    fn geometry(&self) -> &'a Geometry {
        &self.header.geometry
    }

    /// Damage of the mapping: it cannot be mended without guessing.
    fn damage(&mut self, line: String) {
        if !self.quiet {
            self.findings.corruption(line);
            self.beyond_repair += 1;
        }
    }

    /// Surveys, reports, and changes what it may. Changes are flushed.
    pub async fn run(&mut self) -> Result<(), Error> {
        self.collect_places().await?;
        self.separate_fixed();
        self.collect().await?;
        self.collect_blocks().await?;
        self.separate();
        let mut first = 0;
        loop {
            let mut counts = Counts { first, ..Counts::default() };
            self.count(&mut counts).await?;
            self.compare(&counts).await?;
            if self.fix.raise || self.fix.lower {
                self.file.flush().await?;
            }
            self.check_copied(&counts).await?;
            // Lines about entries were written in the first pass.
            self.quiet = true;
            match counts.end {
                Some(end) => first = end,
                None => break,
            }
        }
        if self.fix.copied {
            self.file.flush().await?;
        }
        Ok(())
    }

    /// Counts the references to the clusters of one window, for a rebuild; `first` is [`Counts::next`] of the window before.
    pub async fn window(&mut self, first: u64) -> Result<Counts, Error> {
        self.quiet = true;
        let mut counts = Counts { first, ..Counts::default() };
        self.count(&mut counts).await?;
        Ok(counts)
    }

    /// The refcount blocks as they are do not count as used any more.
    pub fn forget_blocks(&mut self) {
        self.blocks.clear();
    }

    /// Reads all L1 tables; notes every distinct L2 table.
    async fn collect(&mut self) -> Result<(), Error> {
        let mut tables = HashMap::new();
        for index in 0..self.fixed.len() {
            if let Fixed { holds: Holds::L1 { active }, overlaps: false, .. } = self.fixed[index] {
                self.collect_l1(index, active, &mut tables).await?;
            }
        }
        self.tables = tables.into_iter().collect();
        self.tables.sort_unstable_by_key(|(offset, _)| *offset);
        Ok(())
    }

    async fn collect_l1(
        &mut self,
        table: usize,
        active: bool,
        tables: &mut HashMap<u64, TableUse>,
    ) -> Result<(), Error> {
        let geometry = self.geometry();
        let range = self.fixed[table].range.clone();
        for start in range.clone().step_by(READ_BYTES as usize) {
            let len = READ_BYTES.min(range.end - start);
            let bytes = self.file.read(start, len as usize).await?;
            for (index, word) in ((start - range.start) / 8..).zip(bytes.chunks_exact(8)) {
                let entry = match L1Entry::decode(geometry, be64(word), self.end) {
                    Ok(entry) if entry.table == 0 => continue,
                    Ok(entry) => entry,
                    Err(why) => {
                        self.blind = true;
                        let what = &self.fixed[table].name;
                        self.damage(format!("entry {index} of {what} ({:#x}) {why}", be64(word)));
                        continue;
                    }
                };
                let found: &mut TableUse = tables.entry(entry.table).or_default();
                found.references += 1;
                if !active {
                    continue;
                }
                match found.active {
                    None => found.active = Some(index * geometry.l2_covers()),
                    Some(other) => {
                        let what = &self.fixed[table].name;
                        self.damage(format!(
                            "entry {index} of {what} points to the L2 table of offset {other} of the disk"
                        ));
                    }
                }
            }
        }
        Ok(())
    }

    /// Reads the refcount table and keeps the blocks that can be used.
    async fn collect_blocks(&mut self) -> Result<(), Error> {
        let geometry = self.geometry();
        let place = self.header.reftable;
        let table = self.file.read(place.offset, (place.entries * 8) as usize).await?;
        let mut seen = HashSet::new();
        for (index, word) in table.chunks_exact(8).enumerate() {
            let word = be64(word);
            let offset = word & TABLE_OFFSET_MASK;
            let why = match word {
                0 => None,
                _ if word != offset => Some("has reserved bits set"),
                _ if !geometry.is_aligned(offset) => Some("points to no start of a cluster"),
                _ if offset.saturating_add(geometry.cluster()) > self.end => {
                    Some("points behind the end of the file")
                }
                _ if !seen.insert(offset) => Some("points to another entry's block"),
                _ => None,
            };
            if let Some(why) = why {
                self.findings.corruption(format!("entry {index} of the refcount table ({word:#x}) {why}"));
                self.needs_rebuild = true;
            }
            self.blocks.push(if why.is_some() { 0 } else { offset });
        }
        Ok(())
    }

    /// Finds blocks and L2 tables that lie on each other, or on other tables. A refcount block that does is not used; nothing is
    /// repaired while others do, since a repair of one would damage the other.
    fn separate(&mut self) {
        let cluster = self.geometry().cluster();
        let fixed = self.fixed.iter().enumerate();
        let fixed = fixed.map(|(index, one)| (one.range.start, one.range.end, Place::Fixed(index)));
        let blocks = self.blocks.iter().enumerate().filter(|(_, block)| **block != 0);
        let blocks = blocks.map(|(index, block)| (*block, *block + cluster, Place::Block(index)));
        let tables = self.tables.iter().map(|(table, _)| (*table, *table + cluster, Place::L2(*table)));
        let mut places: Vec<(u64, u64, Place)> = fixed.chain(blocks).chain(tables).collect();
        places.retain(|(start, end, _)| start < end);
        places.sort_unstable_by_key(|(start, ..)| *start);
        let mut before: Option<(u64, Place)> = None;
        for (start, end, place) in places {
            // Tables own whole clusters.
            let end = self.geometry().round_up(end);
            let other = before.filter(|(before_end, _)| *before_end > start).map(|(_, other)| other);
            match (place, other) {
                // Found before.
                (_, None) | (Place::Fixed(_), Some(Place::Fixed(_))) => {}
                (_, Some(other)) => self.overlap(place, other),
            }
            if before.is_none_or(|(before_end, _)| before_end < end) {
                before = Some((end, place));
            }
        }
    }

    fn overlap(&mut self, one: Place, other: Place) {
        let line = format!("{} lies on {}", self.describe(one), self.describe(other));
        let block = match (one, other) {
            (Place::Block(index), _) | (_, Place::Block(index)) => index,
            _ => {
                self.damage(line);
                self.fix = Fix::default();
                self.blind = true;
                return;
            }
        };
        self.findings.corruption(line);
        self.blocks[block] = 0;
        self.needs_rebuild = true;
    }

    fn describe(&self, place: Place) -> String {
        match place {
            Place::Fixed(index) => self.fixed[index].name.clone(),
            Place::Block(index) => format!("refcount block {index}"),
            Place::L2(table) => format!("the L2 table at {table}"),
        }
    }

    /// Counts all references to clusters of the window.
    async fn count(&mut self, counts: &mut Counts) -> Result<(), Error> {
        let bits = self.geometry().cluster_bits;
        // Those that lie on others are counted for none: where there are thousands, that would take as long as reading them.
        for one in self.fixed.iter().filter(|one| !one.overlaps) {
            counts.add_range(one.range.start >> bits..one.range.end.div_ceil(1 << bits), TABLE);
        }
        for block in self.blocks.iter().filter(|block| **block != 0) {
            counts.add(block >> bits, TABLE, 1);
        }
        for (table, uses) in &self.tables {
            let active = if uses.active.is_some() { ACTIVE } else { 0 };
            counts.add(table >> bits, L2 | active, uses.references);
        }
        for index in 0..self.fixed.len() {
            if let Fixed { holds: Holds::Bitmap, overlaps: false, .. } = self.fixed[index] {
                self.count_bitmap(counts, index).await?;
            }
        }
        let tables = self.tables.clone();
        let mut reads = ReadAhead::new(self.file, self.geometry(), tables.iter().map(|(offset, _)| *offset));
        for &(table, uses) in &tables {
            let bytes = reads.next().await?;
            self.count_table(counts, table, uses, &bytes);
        }
        Ok(())
    }

    /// Counts the clusters that hold the bits of a bitmap; `table` is its table's number in `fixed`.
    async fn count_bitmap(&mut self, counts: &mut Counts, table: usize) -> Result<(), Error> {
        let geometry = self.geometry();
        let range = self.fixed[table].range.clone();
        for start in range.clone().step_by(READ_BYTES as usize) {
            let len = READ_BYTES.min(range.end - start);
            let bytes = self.file.read(start, len as usize).await?;
            for (index, word) in ((start - range.start) / 8..).zip(bytes.chunks_exact(8)) {
                let why = match bitmap::bits_place(geometry, be64(word), self.end) {
                    Ok(None) => continue,
                    Ok(Some(bits)) => {
                        // Nobody else may have it, nor another bitmap: their writers take it for their own.
                        match counts.add(bits.start >> geometry.cluster_bits, TABLE, 1) {
                            None | Some(0) => continue,
                            Some(_) => "points to a cluster that is used otherwise",
                        }
                    }
                    Err(why) => {
                        self.blind = true;
                        why
                    }
                };
                let name = &self.fixed[table].name;
                self.damage(format!("entry {index} of {name} {why}"));
            }
        }
        Ok(())
    }

    fn count_table(&mut self, counts: &mut Counts, table: u64, uses: TableUse, bytes: &[u8]) {
        let geometry = self.geometry();
        let bits = geometry.cluster_bits;
        let active = if uses.active.is_some() { ACTIVE } else { 0 };
        for (index, slot) in bytes.chunks_exact(geometry.entry_bytes() as usize).enumerate() {
            let guest = uses.active.unwrap_or(0) + index as u64 * geometry.cluster();
            let place = || match uses.active {
                Some(_) => format!("the L2 entry for offset {guest} of the disk"),
                None => format!("entry {index} of the L2 table at {table}"),
            };
            let entry = match Entry::decode(geometry, slot, guest, self.end) {
                Ok(entry) => entry,
                Err(why) => {
                    self.blind = true;
                    self.damage(format!("{} ({:#x}) {why}", place(), be64(&slot[..8])));
                    continue;
                }
            };
            if !self.quiet && uses.active.is_some() {
                let data = u64::from(entry.data.count_ones()) * geometry.granule();
                self.findings.allocated_bytes +=
                    if entry.compressed.is_some() { geometry.cluster() } else { data };
            }
            if let Some(encoded) = entry.compressed {
                for cluster in encoded.clusters(geometry) {
                    let before = counts.add(cluster, DATA, uses.references).unwrap_or(0);
                    if before & (TABLE | L2 | ACTIVE) != 0 {
                        self.damage(format!(
                            "{} points to cluster {cluster}, which is used otherwise",
                            place()
                        ));
                    }
                }
                continue;
            }
            let Some(host) = entry.host.filter(|_| !geometry.data_file) else { continue };
            let before = counts.add(host >> bits, DATA | active, uses.references).unwrap_or(0);
            if before & (TABLE | L2) != 0 {
                self.damage(format!("{} points to cluster {}, which is a table", place(), host >> bits));
            } else if before & active != 0 {
                self.damage(format!(
                    "{} points to cluster {}, which another offset has, too",
                    place(),
                    host >> bits
                ));
            }
        }
    }

    /// Compares the counts of a window with the refcounts, and repairs what it may.
    async fn compare(&mut self, counts: &Counts) -> Result<(), Error> {
        let geometry = self.geometry();
        let per_block = geometry.block_entries();
        self.compare_missing_blocks(counts);
        for index in 0..self.blocks.len() as u64 {
            let block = self.blocks[index as usize];
            let clusters = index * per_block..(index + 1) * per_block;
            if block == 0 || !(counts.contains(clusters.start) || counts.contains(clusters.end - 1)) {
                continue;
            }
            let mut bytes = self.file.read(block, geometry.cluster() as usize).await?;
            let mut touched = false;
            let mut page = None;
            for entry in 0..per_block {
                let cluster = clusters.start + entry;
                if entry == 0 || cluster.is_multiple_of(PAGE) {
                    page = counts.page(cluster / PAGE);
                }
                let stored = refcount::get(&bytes, geometry.refcount_order, entry as usize);
                let counted = page.map_or(0, |words| u64::from(words[(cluster % PAGE) as usize] & COUNT));
                if stored == counted || !counts.contains(cluster) {
                    continue;
                }
                if self.judge(cluster, stored, counted) {
                    refcount::set(&mut bytes, geometry.refcount_order, entry as usize, counted);
                    touched = true;
                }
            }
            if touched {
                self.file.write(block, bytes).await?;
            }
        }
        let last = counts.pages.iter().rev().find_map(|(page, words)| {
            words.iter().rposition(|word| word & COUNT > 0).map(|at| page * PAGE + at as u64 + 1)
        });
        self.findings.end = self.findings.end.max(last.unwrap_or(0) << geometry.cluster_bits);
        Ok(())
    }

    /// Reports a refcount that is wrong; returns whether to set it right.
    fn judge(&mut self, cluster: u64, stored: u64, counted: u64) -> bool {
        if stored > counted {
            // Only references that are all known make the rest unused.
            let repair = self.fix.lower && !self.blind;
            self.findings
                .leak(1, format!("cluster {cluster} has the refcount {stored} and {counted} references"));
            self.findings.repaired_total += u64::from(repair);
            return repair;
        }
        self.findings.corruption(format!(
            "cluster {cluster} has the refcount {stored}, too low for {counted} references"
        ));
        if counted > self.geometry().refcount_max() {
            self.beyond_repair += 1;
            return false;
        }
        self.findings.repaired_total += u64::from(self.fix.raise);
        self.fix.raise
    }

    /// Clusters that are used and for which there is no refcount block.
    fn compare_missing_blocks(&mut self, counts: &Counts) {
        let per_block = self.geometry().block_entries();
        let has_block = |cluster: u64| {
            let index = usize::try_from(cluster / per_block).unwrap_or(usize::MAX);
            self.blocks.get(index).is_some_and(|block| *block != 0)
        };
        for (cluster, _) in counts.used().filter(|(cluster, _)| !has_block(*cluster)) {
            self.findings.corruption(format!("cluster {cluster} is used and has no refcount"));
            self.needs_rebuild = true;
        }
    }

    /// Checks the flag "refcount is one" of the active tables against the counts of a window.
    async fn check_copied(&mut self, counts: &Counts) -> Result<(), Error> {
        let geometry = self.geometry();
        let bits = geometry.cluster_bits;
        let l1 = self.header.l1;
        let mut words = self.file.read(l1.offset, (l1.entries * 8) as usize).await?;
        let mut touched = false;
        for (index, word) in words.chunks_exact_mut(8).enumerate() {
            let Ok(entry) = L1Entry::decode(geometry, be64(word), self.end) else { continue };
            let cluster = entry.table >> bits;
            if entry.table == 0 || !counts.contains(cluster) || entry.copied == (counts.get(cluster) == 1) {
                continue;
            }
            if self.judge_copied(format!("L1 entry {index}"), cluster, entry.copied, counts.get(cluster)) {
                word.copy_from_slice(&L1Entry { copied: !entry.copied, ..entry }.encode().to_be_bytes());
                touched = true;
            }
        }
        if touched {
            self.file.write(l1.offset, words).await?;
        }
        if geometry.data_file {
            return Ok(());
        }
        let tables: Vec<(u64, u64)> =
            self.tables.iter().filter_map(|(table, uses)| uses.active.map(|guest| (*table, guest))).collect();
        let mut reads = ReadAhead::new(self.file, geometry, tables.iter().map(|(offset, _)| *offset));
        for &(table, start) in &tables {
            let mut bytes = reads.next().await?;
            let mut touched = false;
            for (index, slot) in bytes.chunks_exact_mut(geometry.entry_bytes() as usize).enumerate() {
                let guest = start + index as u64 * geometry.cluster();
                let Ok(entry) = Entry::decode(geometry, slot, guest, self.end) else { continue };
                let Some(cluster) = entry.host.map(|host| host >> bits) else { continue };
                if !counts.contains(cluster) || entry.copied == (counts.get(cluster) == 1) {
                    continue;
                }
                let place = format!("the L2 entry for offset {guest} of the disk");
                if self.judge_copied(place, cluster, entry.copied, counts.get(cluster)) {
                    let right = Entry { copied: !entry.copied, ..entry };
                    slot.copy_from_slice(&right.encode(geometry)[..slot.len()]);
                    touched = true;
                }
            }
            if touched {
                self.file.write(table, bytes).await?;
            }
        }
        Ok(())
    }

    fn judge_copied(&mut self, place: String, cluster: u64, copied: bool, count: u64) -> bool {
        let says = if copied { "is" } else { "is not" };
        self.findings.corruption(format!(
            "{place} says that the refcount of cluster {cluster} {says} one; it has {count} references"
        ));
        // The flag may be set only when all references are known.
        let repair = self.fix.copied && (copied || !self.blind);
        self.findings.repaired_total += u64::from(repair);
        repair
    }
}

/// Reads L2 tables in order, several at a time.
struct ReadAhead<'a, I: Iterator<Item = u64>> {
    file: &'a Rc<dyn ImageFile>,
    cluster: usize,
    depth: usize,
    offsets: I,
    reads: std::collections::VecDeque<Pending<'static, Buf>>,
}

impl<'a, I: Iterator<Item = u64>> ReadAhead<'a, I> {
    fn new(file: &'a Rc<dyn ImageFile>, geometry: &Geometry, offsets: I) -> ReadAhead<'a, I> {
        let depth = (READ_AHEAD_BYTES / geometry.cluster()).clamp(1, READ_AHEAD_MAX) as usize;
        ReadAhead { file, cluster: geometry.cluster() as usize, depth, offsets, reads: Default::default() }
    }

    async fn next(&mut self) -> Result<Buf, Error> {
        while self.reads.len() < self.depth
            && let Some(offset) = self.offsets.next()
        {
            self.reads.push_back(self.file.read(offset, self.cluster));
        }
        match self.reads.pop_front() {
            Some(read) => read.await,
            None => Ok(Buf::zeroed(0)),
        }
    }
}
