//! Checking images, and repairing what can be repaired without guessing what data is right.
//!
//! | found | repaired how |
//! |---|---|
//! | an entry of the first grain directory or table that cannot be right, its copy can | from the copy |
//! | a grain behind the end of the file, and in the copy too | its entry becomes 0: there are no bytes to lose |
//! | the copy of a table differs (a remark when the extent was not closed cleanly: a crash leaves it so) | from the first, which counts |
//! | space behind the last grain (a leak) | cut off |
//! | the header says more than the descriptor (a remark: a crash in a resize leaves it so) | not: the descriptor counts, the next resize ends it |
//! | two grains at one place, grains on tables | not, unless the copy is right: which data is right cannot be known |

use std::rc::Rc;

use super::directory::{self, Damage, Directory, Place, Problem, Walk};
use super::header::{SECTOR, Shape};
use super::{Own, first_file, image};
use crate::driver::{Findings, Open, Repair};
use crate::error::{Error, ErrorKind};
use crate::file::{Buf, ImageFile};

/// Checks an image. See the module.
pub async fn check(open: Open, repair: Option<Repair>) -> Result<Findings, Error> {
    let file = first_file(&open)?;
    if repair.is_some() && !(open.writable && open.files.iter().all(|file| file.is_writable())) {
        let message = format!("{} is opened read-only: it cannot be repaired", file.name());
        return Err(Error::new(ErrorKind::ReadOnly, message));
    }
    let mut findings = Findings::default();
    let parts = match Own::read(&file).await {
        Ok(own) => {
            let reading = Open { writable: false, ..open.clone() };
            super::open_parts(&own, &reading).await
        }
        Err(error) => Err(error),
    };
    let parts = match parts {
        Err(error) if error.kind == ErrorKind::Corrupt => {
            findings.corruption(error.message);
            return Ok(findings);
        }
        other => other?,
    };
    for part in &parts {
        let bytes = part.end.get() - part.start;
        match &part.kind {
            image::Kind::Zero => {}
            image::Kind::Flat(..) => findings.allocated_bytes += bytes,
            image::Kind::Sparse(sparse) => {
                if sparse.shape.capacity.get() > bytes {
                    let more = sparse.shape.capacity.get();
                    findings.remarks.push(format!(
                        "{}: its header says {more} bytes, the descriptor {bytes}, which counts",
                        sparse.file.name()
                    ));
                }
                let mut extent = Extent {
                    file: &sparse.file,
                    shape: &sparse.shape,
                    directory: sparse.directory.borrow().clone(),
                    repair: repair.filter(|_| !sparse.shape.stream),
                    findings: &mut findings,
                };
                extent.check().await?;
            }
        }
    }
    findings.end = findings.end.max(if parts.len() == 1 { 0 } else { file.length() });
    if findings.repaired_total > 0 {
        for file in &open.files {
            file.flush().await?;
        }
    }
    Ok(findings)
}

/// A sparse extent under check.
struct Extent<'a> {
    file: &'a Rc<dyn ImageFile>,
    shape: &'a Shape,
    directory: Directory,
    repair: Option<Repair>,
    findings: &'a mut Findings,
}

impl Extent<'_> {
    async fn check(&mut self) -> Result<(), Error> {
        if self.shape.stream {
            return self.check_stream().await;
        }
        let mends = self.repair == Some(Repair::All);
        self.directory_entries(mends).await?;
        let mut walk = directory::walk(self.file, self.shape, &self.directory).await?;
        for damage in walk.damages.clone() {
            self.findings.corruption(format!("{}: {damage}", self.file.name()));
        }
        self.findings.corruptions_total += walk.damages_total - walk.damages.len() as u64;
        if mends && walk.damages_total > 0 {
            walk = self.mend(walk).await?;
        }
        // A directory that is wrong has its tables anywhere: what is written there then would be lost.
        self.copies(mends && walk.damages_total == 0).await?;
        let free: u64 = walk.free.iter().map(|range| range.end - range.start).sum();
        if free > 0 {
            let line =
                format!("{} bytes between grains that nothing refers to: new grains will take them", free);
            self.findings.remarks.push(line);
        }
        self.findings.allocated_bytes += walk.used * self.shape.grain;
        self.findings.end = self.findings.end.max(walk.end);
        let behind = self.file.length().saturating_sub(walk.end.next_multiple_of(self.shape.grain));
        if behind >= self.shape.grain {
            self.findings.leak(1, format!("{}: {behind} bytes behind the last grain", self.file.name()));
            if self.repair.is_some() && walk.damages_total == 0 {
                self.file.truncate(walk.end).await?;
                self.findings.repaired_total += 1;
            }
        }
        Ok(())
    }

    /// Entries of the first directory that are not in the file, where the copy's are.
    async fn directory_entries(&mut self, mends: bool) -> Result<(), Error> {
        let bytes = self.shape.table_bytes();
        for index in 0..self.directory.copy.len() {
            let place = |entry| Directory::place(Some(entry), bytes, self.file.length());
            let (first, copy) = (self.directory.first[index], self.directory.copy[index]);
            match (place(&first), place(&copy)) {
                (Err(_), Ok(Some(from))) if mends => {
                    self.findings.corruption(format!(
                        "grain table {index} is said to be at sector {first:#x}; its copy is used"
                    ));
                    // The copy is the only one that is left, so it becomes the first; both directories name it no more than once.
                    let at = self.file.length().next_multiple_of(self.shape.grain);
                    let table = self.file.read(from, bytes as usize).await?;
                    self.file.extend(at + self.shape.grain.max(bytes)).await?;
                    self.file.write(at, table).await?;
                    self.file.flush().await?;
                    let sector = (at / SECTOR) as u32;
                    let entry = Buf::copy_of(&sector.to_le_bytes());
                    self.file.write(self.shape.directory.get() + index as u64 * 4, entry).await?;
                    self.directory.first[index] = sector;
                    self.findings.repaired_total += 1;
                }
                (Ok(_), Err(sector)) => {
                    self.findings.corruption(format!(
                        "the copy of grain table {index} is said to be at sector {sector:#x}"
                    ));
                }
                (Ok(Some(_)), Ok(None)) => {
                    self.findings.corruption(format!("grain table {index} has no copy"));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Repairs damaged entries; returns what is found then.
    async fn mend(&mut self, walk: Walk) -> Result<Walk, Error> {
        let length = self.file.length();
        let mut changed = std::collections::BTreeMap::new();
        for Damage { number, entry, problem } in &walk.damages {
            let (table, at) = ((number / self.shape.entries) as usize, number % self.shape.entries * 4);
            let place = |list: &[u32]| {
                Directory::place(list.get(table), self.shape.table_bytes(), length).ok().flatten()
            };
            if matches!(problem, Problem::NoTable | Problem::TablesOverlap) {
                continue;
            }
            let Some(first) = place(&self.directory.first) else { continue };
            let copy = match place(&self.directory.copy) {
                Some(copy) => directory::numbers(&self.file.read(copy + at, 4).await?).next(),
                None => None,
            };
            let sound = copy.filter(|copy| copy != entry && Place::of(self.shape, *copy, length).is_ok());
            let nothing = (*problem == Problem::BehindEnd).then_some(0);
            let Some(new) = sound.or(nothing) else { continue };
            self.file.write(first + at, Buf::copy_of(&new.to_le_bytes())).await?;
            changed.insert(*number, (first + at, nothing.unwrap_or(*entry)));
        }
        let mut mended = directory::walk(self.file, self.shape, &self.directory).await?;
        // A copy that is no better was not the right one.
        let worse: Vec<_> =
            mended.damages.iter().filter_map(|damage| changed.remove(&damage.number)).collect();
        for (at, entry) in &worse {
            self.file.write(*at, Buf::copy_of(&entry.to_le_bytes())).await?;
        }
        if !worse.is_empty() {
            mended = directory::walk(self.file, self.shape, &self.directory).await?;
        }
        self.findings.repaired_total += walk.damages_total.saturating_sub(mended.damages_total);
        Ok(mended)
    }

    /// The copies of tables against those that count.
    async fn copies(&mut self, mends: bool) -> Result<(), Error> {
        let mut differ = 0;
        for (first, copy) in self.directory.first.iter().zip(&self.directory.copy) {
            let place = |entry| {
                Directory::place(Some(entry), self.shape.table_bytes(), self.file.length()).ok().flatten()
            };
            let (Some(first), Some(copy)) = (place(first), place(copy)) else { continue };
            let bytes = self.shape.table_bytes() as usize;
            let (first, copy) = (self.file.read(first, bytes), self.file.read(copy, bytes));
            differ += u64::from(first.await?[..] != copy.await?[..]);
        }
        if differ == 0 {
            return Ok(());
        }
        let name = self.file.name();
        if self.shape.unclean {
            let line = format!(
                "{name}: it was not closed cleanly, and {differ} copies of grain tables are behind: opening it for writing mends them"
            );
            self.findings.remarks.push(line);
        } else {
            self.findings
                .corruption(format!("{name}: {differ} copies of grain tables differ from those that count"));
        }
        if mends {
            let mended = directory::make_equal(self.file, self.shape, &self.directory).await?;
            self.findings.repaired_total += u64::from(!self.shape.unclean && mended == differ);
        }
        Ok(())
    }

    /// A stream: every grain is in the file, and none is at another's place.
    async fn check_stream(&mut self) -> Result<(), Error> {
        let length = self.file.length();
        let (mut used, mut damages) = (0, Vec::new());
        let mut total = 0u64;
        directory::for_each_piece(self.file, self.shape, &self.directory.first, |first, entries| {
            for (number, entry) in (first..).zip(entries) {
                match Place::of(self.shape, entry, length) {
                    Ok(Place::At(_)) => used += 1,
                    Ok(_) => {}
                    Err(problem) => {
                        total += 1;
                        if damages.len() < Findings::LINES_MAX {
                            damages.push(Damage { number, entry, problem });
                        }
                    }
                }
            }
        })
        .await?;
        let lines = damages.len() as u64;
        damages.iter().for_each(|damage| self.findings.corruption(format!("{}: {damage}", self.file.name())));
        self.findings.corruptions_total += total - lines;
        self.findings.allocated_bytes += used * self.shape.grain;
        self.findings.end = length;
        Ok(())
    }
}
