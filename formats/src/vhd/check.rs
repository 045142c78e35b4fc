//! `image check`: everything that is wrong with a VHD, and its repair as far as nothing has to be guessed.
//!
//! | found | repaired how |
//! |---|---|
//! | copy of the footer missing or damaged, or different | from the one at the end, which counts |
//! | footer at the end missing (a remark: its copy is there for that; a crash while the file grows leaves it so) | from its copy |
//! | copy of the footer has another size only (a remark: a crash in a resize leaves it so) | from the one at the end |
//! | block behind the end of the file | its entry becomes unused: there are no bytes to lose |
//! | batmap damaged, or bits set for blocks that are not complete | an empty batmap, which is always right |
//! | space behind the last block, entries behind the end of the disk | cut off, made unused (a leak) |
//! | block on headers, into the footer, or over another block | not: which data is right cannot be known |
//! | dynamic header | not: it has no copy |

use std::rc::Rc;
use std::time::{SystemTime, UNIX_EPOCH};

use super::bat::{self, Problem, UNUSED, Walk};
use super::batmap::{self, Batmap};
use super::bitmap;
use super::footer::{DiskType, FEATURE_RESERVED, FEATURE_TEMPORARY, Footer, SECTOR, to_vhd_time};
use super::geometry::Geometry;
use super::header::Header;
use super::layout::{self, Layout, Shape};
use super::locator;
use super::reserve::cut_behind;
use crate::driver::{Findings, Open, Repair};
use crate::error::{Error, ErrorKind};
use crate::file::{Buf, ImageFile};

/// Seconds that a clock may be wrong, as XenServer's tools allow.
const CLOCK_SLACK: u32 = 1800;
/// What XenServer's tools count sizes in.
const XEN_BLOCK: u64 = 2 << 20;

/// A check under way.
struct Check {
    file: Rc<dyn ImageFile>,
    repair: Option<Repair>,
    findings: Findings,
}

impl Check {
    /// Whether damage is to be repaired.
    fn mends(&self) -> bool {
        self.repair == Some(Repair::All)
    }
}

/// Checks an image. See the module.
pub async fn check(open: Open, repair: Option<Repair>) -> Result<Findings, Error> {
    let file = super::first_file(&open)?;
    if repair.is_some() && !(open.writable && file.is_writable()) {
        let message = format!("{} is opened read-only: it cannot be repaired", file.name());
        return Err(Error::new(ErrorKind::ReadOnly, message));
    }
    let mut check = Check { file: file.clone(), repair, findings: Findings::default() };
    let layout = match Layout::read(&file).await {
        Err(error) if error.kind == ErrorKind::Corrupt => {
            check.findings.corruption(error.message);
            return Ok(check.findings);
        }
        other => other?,
    };
    check.footer(&layout.footer);
    match &layout.header {
        None => {
            check.findings.allocated_bytes = layout.size;
            check.findings.end = layout.data_end + SECTOR;
            if layout.data_end - layout.size >= SECTOR && !file.is_device() {
                let bytes = layout.data_end - layout.size;
                check.findings.leak(1, format!("{bytes} bytes between the disk and its footer"));
            }
        }
        Some(header) => check.sparse(&layout, header).await?,
    }
    if check.findings.repaired_total > 0 {
        file.flush().await?;
    }
    Ok(check.findings)
}

impl Check {
    /// Oddities of a good footer that other tools mind.
    fn footer(&mut self, footer: &Footer) {
        let mut remark = |line: String| self.findings.remarks.push(line);
        let features = footer.features.get();
        if features & FEATURE_RESERVED == 0 || features & !(FEATURE_RESERVED | FEATURE_TEMPORARY) != 0 {
            remark(format!("the footer's features are {features:#x}, 2 or 3 are expected"));
        }
        if footer.reserved.iter().any(|byte| *byte != 0) {
            remark("the footer's reserved bytes are not zero".to_owned());
        }
        if footer.saved_state > 1 || footer.hidden > 1 {
            remark("the footer's flags are neither 0 nor 1".to_owned());
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        if footer.timestamp.get() > to_vhd_time(now).saturating_add(CLOCK_SLACK) {
            remark("the footer's time of creation is in the future".to_owned());
        }
        let (geometry, size) = (footer.geometry(), footer.current_size.get());
        if geometry.sectors() > Geometry::of_size(size).sectors() {
            let product = geometry.sectors() * SECTOR;
            remark(format!(
                "the footer's geometry gives {product} bytes, its size is {size}: XenServer's tools refuse that"
            ));
        }
        if footer.is_tap() && size % XEN_BLOCK != 0 && footer.disk_type.get() != DiskType::Fixed.number() {
            remark(format!(
                "the size is no multiple of 2 MiB: XenServer's tools ignore the last {} bytes",
                size % XEN_BLOCK
            ));
        }
    }

    /// Dynamic and differencing disks.
    async fn sparse(&mut self, layout: &Layout, header: &Header) -> Result<(), Error> {
        let shape = Shape::new(&layout.footer, header);
        let blocks = shape.blocks(layout.size);
        self.header(layout, header).await?;
        let batmap = batmap::read(&self.file, &layout.footer, header, blocks).await?;
        let metadata = layout::metadata_ranges(layout, header, batmap.as_ref().ok().and_then(Option::as_ref));
        let walk =
            bat::walk(&self.file, &shape, blocks, &metadata, layout.data_end, Findings::LINES_MAX).await?;
        let lost = self.damages(&shape, &walk).await?;
        self.batmap(layout, header, &shape, &walk, batmap).await?;
        self.entries_behind(&shape, blocks, header.entries.get()).await?;
        let free = walk.free.len();
        if free > 0 {
            self.findings
                .remarks
                .push(format!("{free} unused places between blocks: new blocks will take them"));
        }
        let sound = walk.damaged.count() == lost;
        self.footers(layout, &shape, &walk, sound).await?;
        let allocated = u64::from(walk.used - walk.damaged.count()) * shape.block;
        self.findings.allocated_bytes = allocated.min(layout.size);
        self.findings.end = walk.end + SECTOR;
        Ok(())
    }

    /// The header's odd fields, and the locators.
    async fn header(&mut self, layout: &Layout, header: &Header) -> Result<(), Error> {
        if header.reserved.get() != 0 || header.reserved_end.iter().any(|byte| *byte != 0) {
            self.findings.remarks.push("the dynamic header's reserved bytes are not zero".to_owned());
        }
        if header.data_offset.get() != u64::MAX {
            self.findings.remarks.push("the dynamic header's data offset is not all ones".to_owned());
        }
        let present = header.locators.iter().enumerate().filter(|(_, entry)| entry.platform != [0; 4]);
        if layout.disk_type != DiskType::Differencing {
            if present.count() > 0 || header.parent_uuid != [0; 16] {
                self.findings.remarks.push("a dynamic disk names a parent, which is ignored".to_owned());
            }
            return Ok(());
        }
        let mut seen = Vec::new();
        for (index, entry) in present {
            let inside = layout::locator_range(entry).is_some_and(|range| range.end <= layout.data_end);
            match locator::check_entry(entry) {
                Err(reason) => self.findings.corruption(format!("parent locator {index} {reason}")),
                Ok(()) if !inside => {
                    self.findings.corruption(format!("parent locator {index} is not in the file"))
                }
                Ok(()) if seen.contains(&entry.platform) => {
                    self.findings
                        .remarks
                        .push(format!("parent locator {index} has the platform of another one"));
                }
                Ok(()) => seen.push(entry.platform),
            }
        }
        if let Err(error) = super::parent_link(&self.file, layout, header).await {
            if error.kind != ErrorKind::Corrupt {
                return Err(error);
            }
            self.findings.corruption(error.message);
        }
        Ok(())
    }

    /// Damaged entries; returns how many of them are repaired.
    async fn damages(&mut self, shape: &Shape, walk: &Walk) -> Result<u32, Error> {
        let mut lost = 0;
        let mut reported = 0;
        for damage in &walk.damages {
            reported += 1;
            self.findings.corruption(damage.to_string());
            if self.mends() && damage.problem == (Problem::BehindEnd { lost: true }) {
                let entry = Buf::copy_of(&UNUSED.to_be_bytes());
                self.file.write(shape.entry_offset(damage.block), entry).await?;
                self.findings.repaired_total += 1;
                lost += 1;
            }
        }
        // A block that overlaps two others is described twice.
        self.findings.corruptions_total += u64::from(walk.damaged.count()).saturating_sub(reported);
        Ok(lost)
    }

    /// The batmap against table and bitmaps.
    async fn batmap(
        &mut self,
        layout: &Layout,
        header: &Header,
        shape: &Shape,
        walk: &Walk,
        batmap: Result<Option<Batmap>, String>,
    ) -> Result<(), Error> {
        let mut wrong = 0;
        match batmap {
            Ok(None) => return Ok(()),
            Err(reason) => {
                self.findings.corruption(format!("the batmap {reason}"));
                wrong += 1;
                if !self.batmap_has_room(header, layout, walk) {
                    return Ok(());
                }
            }
            Ok(Some(batmap)) => {
                for block in (0..shape.blocks(layout.size)).filter(|block| batmap.full.contains(*block)) {
                    if walk.damaged.contains(block) || self.is_complete(layout, shape, block).await? {
                        continue;
                    }
                    wrong += 1;
                    self.findings
                        .corruption(format!("the batmap calls block {block} complete, which it is not"));
                }
            }
        }
        if wrong > 0 && self.mends() {
            batmap::write_empty(&self.file, header).await?;
            self.findings.repaired_total += wrong;
        }
        Ok(())
    }

    /// Whether an empty batmap can be written behind the block table without touching anything else.
    fn batmap_has_room(&self, header: &Header, layout: &Layout, walk: &Walk) -> bool {
        let at = batmap::header_offset(header);
        let end = at + SECTOR + batmap::BatmapHeader::empty(at, header.entries.get()).map_bytes();
        let others = layout::metadata_ranges(layout, header, None);
        let free = others.iter().all(|range| range.end <= at || end <= range.start);
        free && walk.first.unwrap_or(layout.data_end) >= end
    }

    /// Whether a block is in the file with all its bits.
    async fn is_complete(&self, layout: &Layout, shape: &Shape, block: u32) -> Result<bool, Error> {
        let entry = self.file.read(shape.entry_offset(block), 4).await?;
        let entry = entry[..].try_into().map_or(UNUSED, u32::from_be_bytes);
        if entry == UNUSED {
            return Ok(false);
        }
        let bits = self.file.read(u64::from(entry) * SECTOR, shape.bitmap as usize).await?;
        let start = u64::from(block) * shape.block;
        let sectors = (layout.size.min(start + shape.block) - start).div_ceil(SECTOR);
        Ok(bitmap::run(&bits, 0, 0, sectors, shape.low_bits_first) == (sectors, true))
    }

    /// Entries that no byte of the disk belongs to.
    async fn entries_behind(&mut self, shape: &Shape, blocks: u32, entries: u32) -> Result<(), Error> {
        let mut used = Vec::new();
        let mut total = 0;
        bat::for_each_piece(&self.file, shape, blocks..entries, |first, entries| {
            for (index, _) in entries.enumerate().filter(|(_, entry)| *entry != UNUSED) {
                total += 1;
                if used.len() < Findings::LINES_MAX {
                    used.push(first + index as u32);
                }
            }
        })
        .await?;
        if total == 0 {
            return Ok(());
        }
        self.findings.leak(total, format!("{total} entries of the block table behind the end of the disk"));
        if self.repair.is_some() {
            for block in &used {
                let entry = Buf::copy_of(&UNUSED.to_be_bytes());
                self.file.write(shape.entry_offset(*block), entry).await?;
            }
            self.findings.repaired_total += used.len() as u64;
        }
        Ok(())
    }

    /// The two footers, and what is behind the last block. `sound`: no block is where the end would be cut off.
    async fn footers(
        &mut self,
        layout: &Layout,
        shape: &Shape,
        walk: &Walk,
        sound: bool,
    ) -> Result<(), Error> {
        let footer = Buf::copy_of(&layout.footer.to_bytes());
        let mut writes = Vec::new();
        let written = if self.mends() { "; it is written anew" } else { "" };
        if let Err(reason) = &layout.footers.trailing {
            let line = format!("the footer at the end {reason}; its copy at 0 is used{written}");
            self.findings.remarks.push(line);
            // In place of the damaged one unless a block is there.
            let length = self.file.length();
            let last = (length.saturating_sub(1)) / SECTOR * SECTOR;
            writes.push(if last >= walk.end { last } else { length.next_multiple_of(SECTOR) });
        }
        if let Err(reason) = &layout.footers.copy {
            self.findings.corruption(format!("the copy of the footer at 0 {reason}"));
            writes.push(0);
        }
        let resized = layout.footers.resized;
        if resized {
            let line =
                format!("a resize did not come to its end: the copy of the footer has the old size{written}");
            self.findings.remarks.push(line);
            writes.push(0);
        } else if layout.footers.differ {
            self.findings.corruption("the footer and its copy at 0 differ; the one at the end counts");
            writes.push(0);
        }
        if self.mends() {
            self.findings.repaired_total += writes.iter().filter(|at| **at == 0 && !resized).count() as u64;
            for at in writes {
                self.file.write(at, footer.clone()).await?;
                self.file.flush().await?;
            }
        }
        let behind = layout.data_end.saturating_sub(walk.end);
        if behind >= shape.stored() && !self.file.is_device() {
            self.findings.leak(1, format!("{behind} bytes behind the last block that nothing refers to"));
            if self.repair.is_some() && sound {
                cut_behind(&self.file, &layout.footer, walk.end).await?;
                self.findings.repaired_total += 1;
            }
        }
        Ok(())
    }
}
