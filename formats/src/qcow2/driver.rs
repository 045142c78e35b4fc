//! The driver: opens images, and gives the parts of this folder the shape of the interface.

use std::ops::Range;
use std::rc::Rc;

use super::header::{self, Header};
use super::image::{Image, Parts};
use super::{bitmap, crypt, repair, snapshot};
use crate::crypt::PayloadCipher;
use crate::driver::{Driver, Encoding, Erase, Erased, Extent, Open, Plan, Usage};
use crate::error::{Error, ErrorKind};
use crate::file::{Buf, Pending};

/// An opened qcow2 image.
pub(super) struct Qcow2Driver {
    image: Image,
}

/// Opens an image; `open.files` are the image and, if it has one, its data file.
pub(super) async fn open(open: Open) -> Result<Rc<Qcow2Driver>, Error> {
    open_as(open, Payload::Used).await
}

/// Whether payload is touched through an opened image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Payload {
    /// It is.
    Used,
    /// Only tables are: no key is needed.
    LeftAlone,
}

/// [`open`], maybe without a key.
pub(super) async fn open_as(open: Open, payload: Payload) -> Result<Rc<Qcow2Driver>, Error> {
    let Some(file) = open.files.first().cloned() else {
        return Err(Error::invalid("a qcow2 image needs its file"));
    };
    let name = file.name().to_owned();
    let mut header = Header::read(&file).await?;
    if open.writable && open.snapshot.is_some() {
        return Err(Error::new(
            ErrorKind::ReadOnly,
            format!("{name}: a snapshot can be opened read-only only"),
        ));
    }
    if open.writable && header.incompatible & header::CORRUPT != 0 {
        let what = "it is marked corrupt: open it read-only, or repair it with `image repair`";
        return Err(Error::corrupt(&name, what));
    }
    if header.backing.is_some() && open.below_size.is_none() {
        let message = format!("{name}: its backing file was not opened");
        return Err(Error::new(ErrorKind::Missing, message));
    }
    let data = match header.geometry.data_file {
        true => Some(open.files.get(1).cloned().ok_or_else(|| {
            Error::new(ErrorKind::Missing, format!("{name}: its data file was not opened"))
        })?),
        false => None,
    };
    if open.writable && header.incompatible & header::DIRTY != 0 {
        repair::after_crash(&file, &header).await?;
        header = Header::read(&file).await?;
    }
    let cipher = match payload {
        Payload::Used => crypt::cipher(&file, &header, open.key.as_ref()).await?,
        Payload::LeftAlone => None,
    };
    let snapshots = snapshot::read(&file, &header).await?;
    let bitmaps = match header.extensions.bitmaps {
        Some(place) if open.writable && header.autoclear & header::BITMAPS != 0 => {
            bitmap::read(&file, &header.geometry, place).await?
        }
        _ => Vec::new(),
    };
    let fixed = fixed_places(&header, snapshots.bytes, file.length());
    if open.writable {
        check_overlap(&name, &fixed)?;
    }
    let (mut size, mut l1) = (header.size, header.l1);
    if let Some(wanted) = &open.snapshot {
        let Some(found) = snapshots.find(wanted) else {
            let names: Vec<&str> = snapshots.snapshots.iter().map(|one| one.name.as_str()).take(20).collect();
            let message = format!("{name} has no snapshot {wanted:?}; it has: {}", names.join(", "));
            return Err(Error::new(ErrorKind::Missing, message));
        };
        size = found.size.unwrap_or(header.size);
        l1 = found.l1;
        if size > header::DISK_MAX_BYTES || l1.entries < header.geometry.l1_entries_for(size) {
            let what = format!("the L1 table of snapshot {wanted:?} is too short for its {size} bytes");
            return Err(Error::corrupt(&name, what));
        }
    }
    let no_size_of_its_own = snapshots.snapshots.iter().any(|one| one.size.is_none());
    let fixed_size =
        match (header.extensions.bitmaps.is_some_and(|place| place.count > 0), no_size_of_its_own) {
            (true, _) => Some("it has persistent bitmaps; remove them first"),
            (_, true) => Some("it has snapshots that do not say how large the disk was; delete them first"),
            _ => None,
        };
    let parts = Parts {
        data,
        cipher,
        bitmaps,
        fixed_size,
        writable: open.writable,
        below: open.below_size.unwrap_or(0),
        size: size.next_multiple_of(512),
        l1,
        fixed,
        budget: open.budget,
        log: open.log,
        header,
        file,
    };
    Ok(Rc::new(Qcow2Driver { image: Image::new(parts) }))
}

/// Where the metadata is whose place the header names, in a file of `length` bytes.
fn fixed_places(header: &Header, snapshot_bytes: u64, length: u64) -> Vec<Range<u64>> {
    let geometry = &header.geometry;
    let mut fixed = Vec::new();
    let mut add = |offset: u64, bytes: u64| {
        if bytes > 0 {
            fixed.push(offset..geometry.round_up(offset + bytes));
        }
    };
    add(0, 1);
    add(header.l1.offset, header.l1.entries * 8);
    add(header.reftable.offset, header.reftable.entries * 8);
    add(header.snapshots_offset, snapshot_bytes);
    let luks = header.luks_area().unwrap_or_default();
    add(luks.start, luks.end - luks.start);
    let bitmaps = header.extensions.bitmaps.filter(|_| header.autoclear & header::BITMAPS != 0);
    // A directory that cannot be is not read, so nothing is kept away from it.
    if let Some(range) = bitmaps.and_then(|place| bitmap::directory_range(geometry, place, length)) {
        add(range.start, range.end - range.start);
    }
    fixed
}

fn check_overlap(name: &str, fixed: &[Range<u64>]) -> Result<(), Error> {
    let mut sorted = fixed.to_vec();
    sorted.sort_unstable_by_key(|range| range.start);
    match sorted.windows(2).find(|pair| pair[0].end > pair[1].start) {
        None => Ok(()),
        Some(pair) => {
            let what = format!(
                "tables at {} and {} overlap: open it read-only and copy its data",
                pair[0].start, pair[1].start
            );
            Err(Error::corrupt(name, what))
        }
    }
}

impl Qcow2Driver {
    /// The image behind it.
    pub fn image(&self) -> &Image {
        &self.image
    }

    /// See [`Driver::close`].
    pub async fn shut(&self) -> Result<(), Error> {
        let image = &self.image;
        if !image.writable {
            return Ok(());
        }
        let lost: Vec<u64> = image.plans.borrow().keys().copied().collect();
        lost.into_iter().for_each(|id| image.abort(&Plan { id, fills: Vec::new() }));
        image.maps.write_back().await?;
        image.empty_reserve().await?;
        image.refs.write_back().await?;
        if let Some(data) = &image.data {
            data.flush().await?;
        }
        image.file.flush().await
    }
}

impl Driver for Qcow2Driver {
    fn size(&self) -> u64 {
        self.image.size.get()
    }

    fn granule(&self) -> u64 {
        self.image.geometry.granule()
    }

    fn map(&self, offset: u64, len: u64, out: &mut Vec<Extent>) -> Result<u64, Error> {
        self.image.map(offset, len, out)
    }

    fn load(&self, offset: u64, _len: u64) -> Pending<'_, ()> {
        Box::pin(self.image.load(offset))
    }

    fn plan_write(&self, offset: u64, len: u64) -> Pending<'_, Plan> {
        Box::pin(self.image.plan_write(offset, len))
    }

    fn commit(&self, plan: Plan) -> Pending<'_, ()> {
        Box::pin(async move { self.image.commit(&plan).await })
    }

    fn abort(&self, plan: Plan) {
        self.image.abort(&plan);
    }

    fn erase(&self, range: Range<u64>, how: Erase) -> Pending<'_, Erased> {
        Box::pin(self.image.erase(range, how))
    }

    fn flush(&self) -> Pending<'_, ()> {
        Box::pin(async {
            self.image.maps.write_back().await?;
            if self.image.reserve.freed_count() > super::clusters::FREED_MANY {
                self.image.settle_freed().await?;
            }
            Ok(())
        })
    }

    fn tidy(&self) -> Pending<'_, ()> {
        Box::pin(async {
            self.image.maps.write_back().await?;
            self.image.reserve.cool();
            if self.image.reserve.freed_count() > 0 {
                self.image.settle_freed().await?;
            }
            self.image.refs.write_back().await
        })
    }

    fn resize(&self, size: u64) -> Pending<'_, ()> {
        Box::pin(self.image.resize(size))
    }

    fn close(&self) -> Pending<'_, ()> {
        Box::pin(self.shut())
    }

    fn cipher(&self) -> Option<&PayloadCipher> {
        self.image.cipher.as_ref()
    }

    fn decode(&self, range: Range<u64>) -> Pending<'_, Buf> {
        Box::pin(self.image.decode(range))
    }

    fn encoding(&self) -> Option<Encoding> {
        self.image.encoding()
    }

    fn write_encoded(&self, units: Vec<(u64, Vec<u8>)>) -> Pending<'_, ()> {
        Box::pin(self.image.write_encoded(units))
    }

    fn usage(&self) -> Usage {
        let (maps, refs) = (self.image.maps.usage(), self.image.refs.usage());
        Usage {
            cache_hits: maps.cache_hits + refs.cache_hits,
            cache_misses: maps.cache_misses + refs.cache_misses,
            cache_bytes: maps.cache_bytes + refs.cache_bytes,
            pending_mappings: maps.pending_mappings + self.image.reserve.freed_count() as u64,
        }
    }
}
