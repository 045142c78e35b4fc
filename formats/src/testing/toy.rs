//! The smallest format that allocates: a header, one table, clusters of 4 KiB. It is there to test the suites of this module, and
//! with one of its [`Bug`]s switched on each suite must fail; it also shows a driver author the least that a driver has to do.
//!
//! | offset | holds |
//! |---|---|
//! | 0 | magic `toyimage`, size of the disk in bytes (big-endian) |
//! | 4096 | table: per cluster a big-endian number: 0 absent, 1 zero, else offset of the cluster |
//! | [`FIRST`] | clusters |
//!
//! Places come from past the end of the file: extended and flushed before one is used, so that they read as zero. Places that
//! were freed are leaked until somebody repairs the image (a real driver does better). An image that is opened with a key has its
//! clusters encrypted; it does not say so itself (a real one does).

use std::cell::{Cell, RefCell};
use std::collections::{BTreeSet, HashMap};
use std::ops::Range;
use std::rc::Rc;

use crate::crypt::cipher::{Cipher, Mode, SECTOR_BYTES, Vectors};
use crate::crypt::{CountsFrom, PayloadCipher, Secret};
use crate::driver::{
    Create, Description, Driver, Erase, Erased, Extent, FileIndex, Fill, Findings, Format, Open, Order,
    Place, Plan, Repair, Under, Usage,
};
use crate::error::{Error, ErrorKind};
use crate::file::{Buf, ImageFile, Pending};
use crate::metadata::Tables;

const MAGIC: &[u8; 8] = b"toyimage";
const CLUSTER: u64 = 4096;
const TABLE: u64 = 4096;
const CLUSTERS_MAX: u64 = 16384;
/// Where the clusters begin.
pub const FIRST: u64 = TABLE + CLUSTERS_MAX * 8;
const ZERO: u64 = 1;
/// Clusters by which the file grows.
const GROWTH: u64 = 16;

/// Mistakes that a driver may make.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bug {
    /// Mappings that hide other bytes do not wait for the payload.
    EarlyMapping,
    /// The growth of the file is not flushed before it is used.
    UnflushedGrowth,
    /// A freed place is given out at once, as if it were zero.
    EarlyReuse,
    /// A commit is answered before it is safe against the death of the process.
    EarlyAnswer,
    /// A flush does not write tables back.
    LazyFlush,
    /// Two plans at a time may get the same place.
    SharedPlace,
    /// The place of an aborted plan is taken for zero.
    DirtyAbort,
    /// The table is believed without a check.
    Credulous,
}

/// The format, with or without a mistake.
#[derive(Debug, Clone, Copy)]
pub struct Toy(pub Option<Bug>);

struct Reserved {
    cluster: u64,
    place: u64,
    order: Order,
}

struct ToyDriver {
    bug: Option<Bug>,
    cipher: Option<PayloadCipher>,
    file: Rc<dyn ImageFile>,
    tables: Rc<Tables>,
    size: Cell<u64>,
    below_size: Option<u64>,
    writable: bool,
    /// Places that read as zero.
    free: RefCell<Vec<u64>>,
    growth: async_lock::Mutex<()>,
    plans: RefCell<HashMap<u64, Vec<Reserved>>>,
    next_plan: Cell<u64>,
}

fn entry_at(cluster: u64) -> u64 {
    TABLE + cluster * 8
}

fn clusters(range: Range<u64>) -> Range<u64> {
    range.start / CLUSTER..range.end.div_ceil(CLUSTER)
}

async fn read_header(file: &dyn ImageFile) -> Result<u64, Error> {
    let header = file.read(0, 16).await?;
    let size = header[8..16].try_into().map(u64::from_be_bytes).unwrap_or_default();
    if &header[..8] != MAGIC {
        return Err(Error::new(ErrorKind::WrongFormat, format!("{} is no toy image", file.name())));
    }
    if size % 512 != 0 || size > CLUSTERS_MAX * CLUSTER {
        return Err(Error::corrupt(file.name(), format!("its size is {size}")));
    }
    Ok(size)
}

impl ToyDriver {
    fn has(&self, bug: Bug) -> bool {
        self.bug == Some(bug)
    }

    /// The entry of a cluster, checked; `None` when it is not in memory.
    fn entry(&self, cluster: u64) -> Result<Option<u64>, Error> {
        let Some(entry) = self.tables.get_u64(entry_at(cluster)) else { return Ok(None) };
        // The last place may lie at the very end: what is behind the end of the file reads as zero, and is nobody's.
        let sound = entry <= ZERO || (entry % CLUSTER == 0 && entry >= FIRST && entry < self.file.length());
        if sound || self.has(Bug::Credulous) {
            return Ok(Some(entry));
        }
        Err(Error::corrupt(self.file.name(), format!("cluster {cluster} is said to be at {entry}")))
    }

    async fn loaded_entry(&self, cluster: u64) -> Result<u64, Error> {
        loop {
            match self.entry(cluster)? {
                Some(entry) => return Ok(entry),
                None => self.tables.load(entry_at(cluster)).await?,
            }
        }
    }

    /// A place that reads as zero.
    async fn place(&self) -> Result<u64, Error> {
        let _turn = self.growth.lock().await;
        if let Some(place) = self.free.borrow_mut().pop() {
            return Ok(place);
        }
        let start = self.file.length().next_multiple_of(CLUSTER).max(FIRST);
        self.file.extend(start + GROWTH * CLUSTER).await?;
        if !self.has(Bug::UnflushedGrowth) {
            self.file.flush().await?;
        }
        let mut free = self.free.borrow_mut();
        free.extend((1..GROWTH).rev().map(|number| start + number * CLUSTER));
        if self.has(Bug::SharedPlace) {
            free.insert(0, start);
        }
        Ok(start)
    }

    fn zero_entry(&self) -> u64 {
        if self.below_size.is_some() { ZERO } else { 0 }
    }

    fn check_writable(&self) -> Result<(), Error> {
        if self.writable {
            return Ok(());
        }
        Err(Error::new(ErrorKind::ReadOnly, format!("{} was opened read-only", self.file.name())))
    }
}

impl Driver for ToyDriver {
    fn size(&self) -> u64 {
        self.size.get()
    }

    fn granule(&self) -> u64 {
        CLUSTER
    }

    fn map(&self, offset: u64, len: u64, out: &mut Vec<Extent>) -> Result<u64, Error> {
        let (mut at, end) = (offset, offset + len);
        while at < end {
            let entry = match self.entry(at / CLUSTER) {
                Ok(Some(entry)) => entry,
                Err(error) if at == offset => return Err(error),
                _ => break,
            };
            let stop = end.min((at / CLUSTER + 1) * CLUSTER);
            let place = match entry {
                0 => Place::Absent,
                ZERO => Place::Zero { allocated: false },
                place => {
                    Place::Data { file: FileIndex(0), offset: place + at % CLUSTER, in_place: self.writable }
                }
            };
            out.push(Extent { start: at, len: stop - at, place });
            at = stop;
        }
        Ok(at - offset)
    }

    fn load(&self, offset: u64, _len: u64) -> Pending<'_, ()> {
        Box::pin(async move { self.tables.load(entry_at(offset / CLUSTER)).await })
    }

    fn plan_write(&self, offset: u64, len: u64) -> Pending<'_, Plan> {
        Box::pin(async move {
            self.check_writable()?;
            let (mut fills, mut reserved) = (Vec::new(), Vec::new());
            for cluster in clusters(offset..offset + len) {
                let entry = self.loaded_entry(cluster).await?;
                let range = cluster * CLUSTER..(cluster + 1) * CLUSTER;
                let below = entry == 0 && self.below_size.is_some_and(|size| size > range.start);
                // What is in a new place reads as zero, but not when it is decrypted.
                let encrypted = self.cipher.is_some() && entry <= ZERO;
                let order = match (below || encrypted) && !self.has(Bug::EarlyMapping) {
                    true => Order::AfterData,
                    false => Order::Anytime,
                };
                let place = if entry > ZERO { entry } else { self.place().await? };
                if entry <= ZERO {
                    reserved.push(Reserved { cluster, place, order });
                }
                let under = match (below, encrypted) {
                    (true, _) => Under::Below,
                    (false, true) => Under::Zeroes,
                    (false, false) => Under::Kept,
                };
                fills.push(Fill { range, file: FileIndex(0), offset: place, under });
            }
            let id = self.next_plan.get();
            self.next_plan.set(id + 1);
            self.plans.borrow_mut().insert(id, reserved);
            Ok(Plan { id, fills })
        })
    }

    fn commit(&self, plan: Plan) -> Pending<'_, ()> {
        Box::pin(async move {
            let reserved = self.plans.borrow_mut().remove(&plan.id).unwrap_or_default();
            for Reserved { cluster, place, order } in reserved {
                self.tables.update(entry_at(cluster), &place.to_be_bytes(), order).await?;
            }
            if self.has(Bug::EarlyAnswer) { Ok(()) } else { self.tables.settle().await }
        })
    }

    fn abort(&self, plan: Plan) {
        let reserved = self.plans.borrow_mut().remove(&plan.id).unwrap_or_default();
        if self.has(Bug::DirtyAbort) {
            self.free.borrow_mut().extend(reserved.iter().map(|reserved| reserved.place));
        }
    }

    fn erase(&self, range: Range<u64>, how: Erase) -> Pending<'_, Erased> {
        Box::pin(async move {
            self.check_writable()?;
            if how == Erase::ZeroKeep {
                return Ok(Erased::WriteZeroes);
            }
            for cluster in clusters(range) {
                let old = self.loaded_entry(cluster).await?;
                self.tables
                    .update(entry_at(cluster), &self.zero_entry().to_be_bytes(), Order::Anytime)
                    .await?;
                if old > ZERO && self.has(Bug::EarlyReuse) {
                    self.free.borrow_mut().push(old);
                }
            }
            self.tables.settle().await?;
            Ok(Erased::Done)
        })
    }

    fn flush(&self) -> Pending<'_, ()> {
        Box::pin(
            async move { if self.has(Bug::LazyFlush) { Ok(()) } else { self.tables.write_back().await } },
        )
    }

    fn tidy(&self) -> Pending<'_, ()> {
        Box::pin(self.tables.write_back())
    }

    fn resize(&self, size: u64) -> Pending<'_, ()> {
        Box::pin(async move {
            self.check_writable()?;
            let old = self.size.get();
            if size < old || !size.is_multiple_of(512) || size > CLUSTERS_MAX * CLUSTER {
                let name = self.file.name();
                return Err(Error::invalid(format!("{name} has {old} bytes and cannot get {size}")));
            }
            // The rest of a cluster that the disk ends in is zero already, unless the layer below has something there.
            for cluster in old / CLUSTER..clusters(old..size).end {
                if self.loaded_entry(cluster).await? == 0 && cluster * CLUSTER >= old {
                    let entry = self.zero_entry().to_be_bytes();
                    self.tables.update(entry_at(cluster), &entry, Order::Anytime).await?;
                }
            }
            self.tables.write_back().await?;
            self.file.flush().await?;
            self.file.write(8, Buf::copy_of(&size.to_be_bytes())).await?;
            self.size.set(size);
            Ok(())
        })
    }

    fn close(&self) -> Pending<'_, ()> {
        Box::pin(async move {
            if !self.writable {
                return Ok(());
            }
            self.tables.write_back().await?;
            self.file.flush().await
        })
    }

    fn cipher(&self) -> Option<&PayloadCipher> {
        self.cipher.as_ref()
    }

    fn usage(&self) -> Usage {
        self.tables.usage()
    }
}

/// AES with the key as it is.
fn cipher_of(key: &Secret) -> Result<PayloadCipher, Error> {
    let key = key.bytes();
    let mode = if key.len() == 64 { Mode::Xts } else { Mode::Cbc };
    let cipher = Cipher { mode, vectors: Vectors::Plain64, key_bytes: key.len(), sector_bytes: SECTOR_BYTES };
    Ok(PayloadCipher::new(cipher.with_key(key).map_err(Error::invalid)?, CountsFrom::File))
}

impl Format for Toy {
    fn name(&self) -> &'static str {
        "toy"
    }

    fn recognises(&self, head: &[u8], _tail: &[u8]) -> bool {
        head.starts_with(MAGIC)
    }

    fn describe(&self, file: Rc<dyn ImageFile>) -> Pending<'_, Description> {
        Box::pin(async move {
            let size = read_header(&*file).await?;
            Ok(Description {
                size,
                backing: None,
                data_files: Vec::new(),
                identity: None,
                writable: Ok(()),
                encryption: None,
                properties: Vec::new(),
            })
        })
    }

    fn unlock<'a>(&'a self, _file: Rc<dyn ImageFile>, key: &'a Secret) -> Pending<'a, Secret> {
        Box::pin(std::future::ready(Ok(key.clone())))
    }

    fn open(&self, open: Open) -> Pending<'_, Rc<dyn Driver>> {
        let bug = self.0;
        Box::pin(async move {
            let Some(file) = open.files.first().cloned() else {
                return Err(Error::invalid("one file is needed"));
            };
            let size = read_header(&*file).await?;
            let cipher = open.key.as_ref().map(cipher_of).transpose()?;
            let data = vec![file.clone()];
            let tables =
                Tables::new(file.clone(), FileIndex(0), data, CLUSTER as usize, &open.budget, open.log);
            Ok(Rc::new(ToyDriver {
                bug,
                cipher,
                file,
                tables,
                size: Cell::new(size),
                below_size: open.below_size,
                writable: open.writable,
                free: RefCell::default(),
                growth: async_lock::Mutex::new(()),
                plans: RefCell::default(),
                next_plan: Cell::new(0),
            }) as Rc<dyn Driver>)
        })
    }

    fn create<'a>(
        &'a self,
        file: Rc<dyn ImageFile>,
        _data_files: Vec<Rc<dyn ImageFile>>,
        create: &'a Create,
    ) -> Pending<'a, ()> {
        Box::pin(async move {
            let below = create.backing.as_ref().map(|(_, size)| *size);
            let size = create.size.or(below).ok_or_else(|| Error::invalid("a toy image needs a size"))?;
            file.extend(FIRST).await?;
            file.write(0, Buf::copy_of(&[&MAGIC[..], &size.to_be_bytes()].concat())).await?;
            file.flush().await
        })
    }

    fn check(&self, open: Open, _repair: Option<Repair>) -> Pending<'_, Findings> {
        Box::pin(async move {
            let mut findings = Findings::default();
            let Some(file) = open.files.first().cloned() else { return Ok(findings) };
            let count = clusters(0..read_header(&*file).await?).end;
            let table = file.read(TABLE, (count * 8) as usize).await?;
            let mut used = BTreeSet::new();
            for (cluster, entry) in table.chunks_exact(8).enumerate() {
                let entry = entry.try_into().map(u64::from_be_bytes).unwrap_or_default();
                let sound = entry % CLUSTER == 0 && entry >= FIRST && entry < file.length();
                if entry > ZERO && !(sound && used.insert(entry)) {
                    findings.corruption(format!("cluster {cluster} is said to be at {entry}"));
                }
            }
            let places = file.length().saturating_sub(FIRST) / CLUSTER;
            findings.leak(places.saturating_sub(used.len() as u64), "places that nothing refers to");
            findings.allocated_bytes = used.len() as u64 * CLUSTER;
            findings.end = file.length();
            Ok(findings)
        })
    }
}
