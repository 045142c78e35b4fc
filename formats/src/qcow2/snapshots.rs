//! Work on internal snapshots, offline: list, create, apply, delete.
//!
//! Each is the same four steps: new tables are written where nothing refers to them; refcounts are raised to what they must be
//! afterwards, flushed; one header write switches; refcounts are lowered and flags set to what they may be now. A crash before the
//! switch leaves the old state with leaks, after it the new state with leaks. (Between raising and the switch the flags "refcount
//! is one" of the active tables are cleared, which costs a copy at most.) In version 3 the image is marked dirty meanwhile, so that
//! the next writer sets right whatever a crash left.

use std::rc::Rc;
use std::time::{SystemTime, UNIX_EPOCH};

use super::check::{Fix, Survey};
use super::driver::Qcow2Driver;
use super::header::{self, Header, SNAPSHOTS_MAX, TablePlace};
use super::snapshot::{self, Snapshot, SnapshotTable};
use crate::driver::Open;
use crate::error::{Error, ErrorKind};
use crate::file::{Buf, ImageFile};

/// The snapshots of an image.
///
/// # Errors
/// The table is damaged; the file is no qcow2 image.
pub async fn list_snapshots(file: Rc<dyn ImageFile>) -> Result<Vec<Snapshot>, Error> {
    let header = Header::read(&file).await?;
    Ok(snapshot::read(&file, &header).await?.snapshots)
}

/// What an operation works on, after the driver has closed.
struct Work {
    file: Rc<dyn ImageFile>,
    header: Header,
    table: SnapshotTable,
}

impl Work {
    async fn read(file: &Rc<dyn ImageFile>) -> Result<Work, Error> {
        let header = Header::read(file).await?;
        let table = snapshot::read(file, &header).await?;
        Ok(Work { file: file.clone(), header, table })
    }

    fn find(&self, wanted: &str) -> Result<usize, Error> {
        let found = self.table.find(wanted).map(|one| one.l1);
        self.table.snapshots.iter().position(|one| Some(one.l1) == found && one.is(wanted)).ok_or_else(|| {
            Error::new(ErrorKind::Missing, format!("{} has no snapshot {wanted:?}", self.file.name()))
        })
    }

    /// Refuses what is damaged: nothing may be built on counts that are wrong.
    async fn require_sound(&self) -> Result<(), Error> {
        let mut survey = Survey::new(&self.file, &self.header, &self.table, Fix::default());
        survey.run().await?;
        match survey.findings.corruptions.first() {
            None => Ok(()),
            Some(line) => Err(Error::corrupt(self.file.name(), format!("{line}; repair it first"))),
        }
    }

    async fn mark(&self, dirty: bool) -> Result<(), Error> {
        if self.header.geometry.version < 3 {
            return Ok(());
        }
        let set = if dirty { header::DIRTY } else { 0 };
        let bits = self.header.incompatible & !header::DIRTY | set;
        self.file.flush().await?;
        self.file.write(72, Buf::copy_of(&bits.to_be_bytes())).await?;
        self.file.flush().await
    }

    /// Raises refcounts to what they are with one more L1 table, and takes flags away that are not true then.
    async fn raise_for(&self, l1: TablePlace) -> Result<(), Error> {
        let raise = Fix { raise: true, ..Fix::default() };
        let mut survey = Survey::new(&self.file, &self.header, &self.table, raise).with_l1(l1);
        survey.run().await?;
        if survey.needs_rebuild || survey.blind || survey.beyond_repair > 0 {
            let bits = 1u32 << self.header.geometry.refcount_order;
            let what =
                format!("its refcounts of {bits} bits cannot count one more snapshot, or it is damaged");
            return Err(Error::unsupported(self.file.name(), what));
        }
        let copied = Fix { copied: true, ..Fix::default() };
        Survey::new(&self.file, &self.header, &self.table, copied).with_l1(l1).run().await
    }

    /// Sets refcounts and flags to what they are now.
    async fn settle(&self) -> Result<(), Error> {
        let now = Work::read(&self.file).await?;
        let all = Fix { raise: true, lower: true, copied: true };
        Survey::new(&now.file, &now.header, &now.table, all).run().await?;
        now.mark(false).await
    }

    async fn switch_snapshots(&self, count: usize, offset: u64) -> Result<(), Error> {
        let mut place = [0; 12];
        place[..4].copy_from_slice(&(count as u32).to_be_bytes());
        place[4..].copy_from_slice(&offset.to_be_bytes());
        self.file.write(60, Buf::copy_of(&place)).await?;
        self.file.flush().await
    }
}

/// Opens for a change of snapshots: repairs what a crash left, marks bitmaps.
async fn prepare(open: Open) -> Result<(Rc<dyn ImageFile>, Rc<Qcow2Driver>), Error> {
    let Some(file) = open.files.first().cloned() else {
        return Err(Error::invalid("a qcow2 image needs its file"));
    };
    let below_size = open.below_size.or(Some(0));
    let driver =
        super::driver::open_as(Open { below_size, ..open }, super::driver::Payload::LeftAlone).await?;
    if driver.image().geometry.data_file {
        return Err(Error::unsupported(file.name(), "internal snapshots exclude an external data file"));
    }
    Ok((file, driver))
}

/// Claims clusters for a table and writes it there; returns its offset.
async fn write_table(driver: &Qcow2Driver, bytes: &[u8]) -> Result<u64, Error> {
    let geometry = &driver.image().geometry;
    let clusters = geometry.clusters_of(bytes.len() as u64).max(1);
    let offset = driver.image().allocate_row(clusters).await? << geometry.cluster_bits;
    let mut whole = Buf::zeroed((clusters << geometry.cluster_bits) as usize);
    whole[..bytes.len()].copy_from_slice(bytes);
    driver.image().file.write(offset, whole).await?;
    Ok(offset)
}

/// The bytes of an L1 table with no entry called its own.
async fn shared_l1(file: &Rc<dyn ImageFile>, l1: TablePlace) -> Result<Vec<u8>, Error> {
    let mut bytes = file.read(l1.offset, (l1.entries * 8) as usize).await?.to_vec();
    bytes.chunks_exact_mut(8).for_each(|word| word[0] &= 0x7f);
    Ok(bytes)
}

/// Makes a snapshot of the active state.
///
/// # Errors
/// The name is taken or too long; the image is damaged, has a data file, or cannot count one more snapshot.
pub async fn create_snapshot(open: Open, name: &str) -> Result<Snapshot, Error> {
    if name.is_empty() || name.len() > 255 || name.chars().any(char::is_control) {
        return Err(Error::invalid("the name of a snapshot has 1 to 255 bytes, without control characters"));
    }
    let (file, driver) = prepare(open).await?;
    let work = Work::read(&file).await?;
    if work.table.snapshots.iter().any(|one| one.is(name))
        || work.table.snapshots.len() >= SNAPSHOTS_MAX as usize
    {
        return Err(Error::invalid(format!("{} has a snapshot {name:?} already, or too many", file.name())));
    }
    work.require_sound().await?;
    driver.image().begin_changes().await?;
    work.mark(true).await?;
    let l1 = work.header.l1;
    let offset = write_table(&driver, &shared_l1(&file, l1).await?).await?;
    let taken: u64 = work.table.snapshots.iter().filter_map(|one| one.id.parse().ok()).max().unwrap_or(0);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let size = work.header.size;
    let mut extra = vec![0u8; 8];
    extra.extend_from_slice(&size.to_be_bytes());
    // No instruction count is known.
    extra.extend_from_slice(&u64::MAX.to_be_bytes());
    let made = Snapshot {
        id: (taken + 1).to_string(),
        name: name.to_owned(),
        seconds: now.as_secs() as u32,
        nanoseconds: now.subsec_nanos(),
        clock_ns: 0,
        state_bytes: 0,
        size: Some(size),
        extra,
        state_bytes_low: 0,
        l1: TablePlace { offset, entries: l1.entries },
    };
    let mut table = work.table.clone();
    table.snapshots.push(made.clone());
    let table_offset = write_table(&driver, &table.encode()).await?;
    driver.shut().await?;
    // The refcount table may have moved.
    let work = Work::read(&file).await?;
    work.raise_for(made.l1).await?;
    work.switch_snapshots(table.snapshots.len(), table_offset).await?;
    work.settle().await?;
    Ok(made)
}

/// Makes the state of a snapshot the active one; the active state is lost. The snapshot stays.
///
/// # Errors
/// There is no such snapshot; the image is damaged.
pub async fn apply_snapshot(open: Open, wanted: &str) -> Result<(), Error> {
    let (file, driver) = prepare(open).await?;
    let work = Work::read(&file).await?;
    let chosen = work.table.snapshots[work.find(wanted)?].clone();
    let size = chosen.size.unwrap_or(work.header.size);
    if size != work.header.size && work.header.extensions.bitmaps.is_some_and(|place| place.count > 0) {
        let what = "the snapshot has another size, and persistent bitmaps fix the size; remove them first";
        return Err(Error::unsupported(file.name(), what));
    }
    work.require_sound().await?;
    driver.image().begin_changes().await?;
    work.mark(true).await?;
    let entries = chosen.l1.entries.max(work.header.geometry.l1_entries_for(size));
    let mut bytes = shared_l1(&file, chosen.l1).await?;
    bytes.resize((entries * 8) as usize, 0);
    let offset = write_table(&driver, &bytes).await?;
    driver.shut().await?;
    // The refcount table may have moved.
    let work = Work::read(&file).await?;
    work.raise_for(TablePlace { offset, entries }).await?;
    // Size, encryption (as it is) and L1 table, in one write.
    let mut place = [0; 24];
    place[..8].copy_from_slice(&size.to_be_bytes());
    place[8..12].copy_from_slice(&file.read(32, 4).await?);
    place[12..16].copy_from_slice(&(entries as u32).to_be_bytes());
    place[16..].copy_from_slice(&offset.to_be_bytes());
    file.write(24, Buf::copy_of(&place)).await?;
    file.flush().await?;
    work.settle().await
}

/// Deletes a snapshot and gives back what only it used.
///
/// # Errors
/// There is no such snapshot; the image is damaged.
pub async fn delete_snapshot(open: Open, wanted: &str) -> Result<(), Error> {
    let (file, driver) = prepare(open).await?;
    let work = Work::read(&file).await?;
    let index = work.find(wanted)?;
    work.require_sound().await?;
    driver.image().begin_changes().await?;
    work.mark(true).await?;
    let mut table = work.table.clone();
    table.snapshots.remove(index);
    let offset = match table.snapshots.is_empty() {
        true => 0,
        false => write_table(&driver, &table.encode()).await?,
    };
    driver.shut().await?;
    work.file.flush().await?;
    work.switch_snapshots(table.snapshots.len(), offset).await?;
    work.settle().await
}
