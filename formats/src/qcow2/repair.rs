//! Check and repair as offline work.
//!
//! Refcounts that are wrong are set right where they are; that raises before anything is used again and lowers only what nothing refers
//! to, so every crash in between leaves leaks at most. Where blocks are missing or lie on other tables, all refcounts are written anew
//! at the end of the file, flushed, and one header write makes them count.
//!
//! What a repair never does: guess what data is right. Entries that point nowhere, or two offsets with one cluster, stay as they are and
//! are reported.

use std::rc::Rc;

use super::check::{Fix, Survey};
use super::header::{self, Geometry, Header, REFTABLE_MAX_BYTES};
use super::refcount;
use super::snapshot::{self, SnapshotTable};
use crate::driver::{Findings, Open, Repair};
use crate::error::{Error, ErrorKind};
use crate::file::{Buf, ImageFile};

/// See [`crate::driver::Format::check`].
pub(super) async fn check(open: Open, repair: Option<Repair>) -> Result<Findings, Error> {
    let Some(file) = open.files.first() else { return Err(Error::invalid("a qcow2 image needs its file")) };
    if repair.is_some() && (!open.writable || !file.is_writable()) {
        return Err(Error::new(
            ErrorKind::ReadOnly,
            format!("{} was opened read-only: nothing can be repaired", file.name()),
        ));
    }
    let header = Header::read(file).await?;
    let snapshots = match snapshot::read(file, &header).await {
        Ok(snapshots) => snapshots,
        Err(error) => {
            // Without the table nothing can be said about what is in use.
            let mut findings = Findings::default();
            findings.corruption(error.message);
            return Ok(findings);
        }
    };
    let fix = match repair {
        None => Fix::default(),
        Some(Repair::Leaks) => Fix { lower: true, ..Fix::default() },
        Some(Repair::All) => Fix { raise: true, lower: true, copied: true },
    };
    let mut findings = survey(file, &header, &snapshots, fix).await?;
    let dirty = header.incompatible & header::DIRTY != 0;
    let corrupt = header.incompatible & header::CORRUPT != 0;
    if dirty {
        findings.remarks.push("it is marked dirty: it was not closed, and its refcounts may be wrong".into());
    }
    if corrupt {
        findings.remarks.push("it is marked corrupt".into());
    }
    if repair == Some(Repair::All) && (dirty || corrupt) {
        // Look again: only an image that is sound loses its marks.
        let header = Header::read(file).await?;
        let again = survey(file, &header, &snapshots, Fix::default()).await?;
        if again.corruptions_total == 0 {
            clear_marks(file, &header).await?;
        }
    }
    Ok(findings)
}

/// One survey, with a rebuild of the refcounts if that is what it takes.
async fn survey(
    file: &Rc<dyn ImageFile>,
    header: &Header,
    snapshots: &SnapshotTable,
    fix: Fix,
) -> Result<Findings, Error> {
    let mut survey = Survey::new(file, header, snapshots, fix);
    survey.run().await?;
    if !survey.needs_rebuild || !fix.raise {
        return Ok(survey.findings);
    }
    if survey.blind || survey.beyond_repair > 0 {
        survey
            .findings
            .remarks
            .push("its refcounts are not rebuilt: what damaged tables refer to is not known".into());
        return Ok(survey.findings);
    }
    rebuild(file, header, &mut survey).await?;
    let mut findings = survey.findings;
    findings.repaired_total = findings.corruptions_total + findings.leaks_total;
    // What was repaired in the old blocks counts no more; flags are right only against the new ones.
    let header = Header::read(file).await?;
    Survey::new(file, &header, snapshots, fix).run().await?;
    Ok(findings)
}

/// Writes all refcounts anew behind the end of the file.
async fn rebuild(file: &Rc<dyn ImageFile>, header: &Header, survey: &mut Survey<'_>) -> Result<(), Error> {
    let geometry = &header.geometry;
    let per_block = geometry.block_entries();
    let start = file.length().div_ceil(geometry.cluster());
    // Blocks for everything up to their own end; the table behind them.
    let (mut blocks, mut table) = (0, 1);
    loop {
        let needed_blocks = (start + blocks + table).div_ceil(per_block);
        let needed_table = geometry.clusters_of(needed_blocks * 8);
        if (needed_blocks, needed_table) == (blocks, table) {
            break;
        }
        (blocks, table) = (needed_blocks.max(blocks), needed_table.max(table));
    }
    if table << geometry.cluster_bits > REFTABLE_MAX_BYTES {
        let message = format!("{}: the file is too long for a refcount table", file.name());
        return Err(Error::new(ErrorKind::NoSpace, message));
    }
    let end = start + blocks + table;
    file.extend(end << geometry.cluster_bits).await?;
    survey.forget_blocks();
    let old_table = header.reftable.offset >> geometry.cluster_bits;
    let old_table = old_table..old_table + geometry.clusters_of(header.reftable.entries * 8);
    let mut writer = BlockWriter { file, geometry, start, held: None };
    let mut first = 0;
    loop {
        let counts = survey.window(first).await?;
        for (cluster, count) in counts.used() {
            // The old table is on its way out.
            writer.set(cluster, count - u64::from(old_table.contains(&cluster))).await?;
        }
        match counts.next() {
            Some(next) => first = next,
            None => break,
        }
    }
    for cluster in start..end {
        writer.set(cluster, 1).await?;
    }
    writer.finish().await?;
    let mut entries = vec![0u8; (table << geometry.cluster_bits) as usize];
    for (index, slot) in entries.chunks_exact_mut(8).take(blocks as usize).enumerate() {
        slot.copy_from_slice(&((start + index as u64) << geometry.cluster_bits).to_be_bytes());
    }
    let offset = (start + blocks) << geometry.cluster_bits;
    file.write(offset, Buf::copy_of(&entries)).await?;
    file.flush().await?;
    let mut place = [0; 12];
    place[..8].copy_from_slice(&offset.to_be_bytes());
    place[8..].copy_from_slice(&(table as u32).to_be_bytes());
    file.write(48, Buf::copy_of(&place)).await?;
    file.flush().await
}

/// Fills refcount blocks that lie in a row and read as zero, with ascending clusters.
struct BlockWriter<'a> {
    file: &'a Rc<dyn ImageFile>,
    geometry: &'a Geometry,
    /// Cluster of the first block.
    start: u64,
    held: Option<(u64, Buf)>,
}

impl BlockWriter<'_> {
    async fn set(&mut self, cluster: u64, count: u64) -> Result<(), Error> {
        let index = cluster / self.geometry.block_entries();
        if self.held.as_ref().is_none_or(|(held, _)| *held != index) {
            self.finish().await?;
            let at = (self.start + index) << self.geometry.cluster_bits;
            self.held = Some((index, self.file.read(at, self.geometry.cluster() as usize).await?));
        }
        if let Some((_, bytes)) = &mut self.held {
            let entry = (cluster % self.geometry.block_entries()) as usize;
            refcount::set(bytes, self.geometry.refcount_order, entry, count);
        }
        Ok(())
    }

    async fn finish(&mut self) -> Result<(), Error> {
        match self.held.take() {
            Some((index, bytes)) => {
                self.file.write((self.start + index) << self.geometry.cluster_bits, bytes).await
            }
            None => Ok(()),
        }
    }
}

/// Takes the marks *dirty* and *corrupt* off.
async fn clear_marks(file: &Rc<dyn ImageFile>, header: &Header) -> Result<(), Error> {
    let kept = header.incompatible & !(header::DIRTY | header::CORRUPT);
    file.flush().await?;
    file.write(72, Buf::copy_of(&kept.to_be_bytes())).await?;
    file.flush().await
}

/// Repairs the refcounts of an image that is marked dirty, before it is written to.
///
/// # Errors
/// It has damage that is not in refcounts.
pub(super) async fn after_crash(file: &Rc<dyn ImageFile>, header: &Header) -> Result<(), Error> {
    let snapshots = snapshot::read(file, header).await?;
    survey(file, header, &snapshots, Fix { raise: true, lower: true, copied: true }).await?;
    let header = Header::read(file).await?;
    let left = survey(file, &header, &snapshots, Fix::default()).await?;
    if left.corruptions_total > 0 {
        let first = left.corruptions.first().map(String::as_str).unwrap_or_default();
        let what =
            format!("it was not closed, and its refcounts could not be repaired: {first}; open it read-only");
        return Err(Error::corrupt(file.name(), what));
    }
    clear_marks(file, &header).await
}
