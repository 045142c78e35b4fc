//! VMDK: the format of VMware. Disks in one file or in several extents, flat or sparse.
//!
//! Source: VMware, "Virtual Disk Format 1.1" (2007) and "Virtual Disk Format 5.0" (2011); what QEMU, VirtualBox and ESX do differently
//! stands where it is handled.
//!
//! | file | what |
//! |---|---|
//! | [`descriptor`] | the text that says what a disk is made of, and how it is changed |
//! | [`header`] | headers of sparse extents: hosted (`KDMV`), streams, ESX server (`COWD`) |
//! | [`directory`] | grain directories and tables: reading, walking, keeping both copies equal |
//! | `sparse`, `reserve` | a sparse extent at run time, and places for its new grains |
//! | `image` | the driver |
//! | `stream` | compressed grains |
//! | [`create`], [`check`], `resize` | what they say |
//!
//! # What a crash leaves
//! Every state is opened by this driver and by others: an entry is written only over a place that is durably zero, or when its data is
//! durable. Both tables are written in one round, and may differ after a crash; the header then says that the extent was not closed
//! cleanly, the first table counts, and the next opening for writing makes them equal. Left over may be unreferenced space at the end.
//!
//! # What is not done
//! Disks are not made smaller, and COWD extents and full 2-GB extents not larger. A stream is written once, by who makes it. Images whose changes are tracked by ESX
//! (version 3, `changeTrackPath`), with read-only or ZERO extents, and sparse extents on block devices are not written. `seSparse` is not
//! documented, and disks on raw devices are not files: both are refused by name, as are encryption and I/O filters.

pub mod check;
pub mod create;
pub mod descriptor;
pub mod directory;
pub mod header;
mod image;
mod reserve;
mod resize;
mod sparse;
mod stream;

#[cfg(test)]
mod tests;

use std::cell::Cell;
use std::ops::Range;
use std::rc::Rc;

use crate::driver::{
    Create, Description, Driver, FileIndex, Findings, Format, Identity, Link, Open, Repair, Space,
};
use crate::error::{Error, ErrorKind};
use crate::file::{ImageFile, Pending};
use crate::metadata::{SLICE_BYTES, Tables};

use descriptor::{Access, Descriptor, Kind, SIGNATURE, TEXT_BYTES_MAX};
use header::{COWD_MAGIC, MAGIC, SECTOR, Shape};
use image::{Image, Part, Parts};
use sparse::Sparse;

/// The format.
#[derive(Debug, Clone, Copy)]
pub struct Vmdk;

impl Format for Vmdk {
    fn name(&self) -> &'static str {
        "vmdk"
    }

    fn recognises(&self, head: &[u8], _tail: &[u8]) -> bool {
        head.starts_with(&MAGIC) || head.starts_with(&COWD_MAGIC) || head.starts_with(SIGNATURE.as_bytes())
    }

    fn describe(&self, file: Rc<dyn ImageFile>) -> Pending<'_, Description> {
        Box::pin(async move { Own::read(&file).await.map(|own| own.describe()) })
    }

    fn open(&self, open: Open) -> Pending<'_, Rc<dyn Driver>> {
        Box::pin(async move { open_image(open).await.map(|image| Rc::new(image) as Rc<dyn Driver>) })
    }

    fn create<'a>(
        &'a self,
        file: Rc<dyn ImageFile>,
        data_files: Vec<Rc<dyn ImageFile>>,
        create: &'a Create,
    ) -> Pending<'a, ()> {
        Box::pin(create::create(file, data_files, create))
    }

    fn check(&self, open: Open, repair: Option<Repair>) -> Pending<'_, Findings> {
        Box::pin(check::check(open, repair))
    }

    fn data_files(&self, create: &Create, image: &str) -> Result<Vec<String>, Error> {
        create::data_files(create, image)
    }

    fn space(&self, create: &Create) -> Result<Space, Error> {
        create::space(create)
    }

    fn set_backing(&self, file: Rc<dyn ImageFile>, backing: Option<(Link, u64)>) -> Pending<'_, ()> {
        Box::pin(set_backing(file, backing))
    }
}

/// What the image's own file is: a descriptor, or an extent, mostly with a descriptor inside.
#[derive(Debug)]
struct Own {
    name: String,
    descriptor: Descriptor,
    /// The descriptor's space in the file.
    place: Range<u64>,
    /// The file is an extent.
    shape: Option<Shape>,
}

/// An identity (CID) as other formats have theirs.
fn identity(cid: u32) -> Identity {
    Identity { uuid: u128::from(cid).to_be_bytes(), modified: None, of_contents: true }
}

/// The identity of a VMDK, out of that of an image of any format.
fn cid_of(identity: Option<Identity>) -> Option<u32> {
    identity.and_then(|identity| u32::try_from(u128::from_be_bytes(identity.uuid)).ok())
}

impl Own {
    async fn read(file: &Rc<dyn ImageFile>) -> Result<Own, Error> {
        let name = file.name().to_owned();
        let head = file.read(0, SECTOR as usize).await?;
        if head[..4] == MAGIC || head[..4] == COWD_MAGIC {
            return Own::of_extent(file, name).await;
        }
        if !head.starts_with(SIGNATURE.as_bytes()) {
            let what = "begins with none of KDMV, COWD and \"# Disk DescriptorFile\"";
            return Err(Error::new(ErrorKind::WrongFormat, format!("{name} is no VMDK: it {what}")));
        }
        if file.length() > TEXT_BYTES_MAX {
            return Err(Error::unsupported(
                &name,
                format!("a descriptor of {} bytes: up to 1 MiB is", file.length()),
            ));
        }
        let text = file.read(0, file.length() as usize).await?;
        let descriptor = Descriptor::parse(&name, &text)?;
        if descriptor.extents.is_empty() {
            return Err(Error::corrupt(&name, "its descriptor has no extents"));
        }
        Ok(Own { name, descriptor, place: 0..file.length(), shape: None })
    }

    /// The only extent of a disk.
    async fn of_extent(file: &Rc<dyn ImageFile>, name: String) -> Result<Own, Error> {
        let shape = Shape::read(file).await?;
        let place = shape.descriptor.clone();
        let len = (place.end - place.start).min(TEXT_BYTES_MAX);
        let text = if place.is_empty() { None } else { Some(file.read(place.start, len as usize).await?) };
        let text = text.filter(|text| text[0] != 0);
        let descriptor = match text {
            Some(text) => Descriptor::parse(&name, &text)?,
            None if shape.root => {
                Descriptor { create_type: "vmfsSparse".to_owned(), ..Descriptor::default() }
            }
            None => {
                let what = "it is an extent of a disk whose descriptor is in another file: name that one";
                return Err(Error::new(ErrorKind::Missing, format!("{name}: {what}")));
            }
        };
        let said = if descriptor.extents.is_empty() { shape.capacity.get() } else { descriptor.size() };
        if descriptor.extents.len() > 1 || said > shape.capacity.get() {
            let what = format!(
                "its descriptor says {} extents of {said} bytes together, its header one of {}",
                descriptor.extents.len(),
                shape.capacity.get()
            );
            return Err(Error::corrupt(&name, what));
        }
        Ok(Own { name, descriptor, place, shape: Some(shape) })
    }

    fn size(&self) -> u64 {
        match (&self.shape, self.descriptor.extents.is_empty()) {
            (Some(shape), true) => shape.capacity.get(),
            _ => self.descriptor.size(),
        }
    }

    /// Names of the extents' files, each once, and the file of each extent as the driver numbers them.
    fn files(&self) -> (Vec<&str>, Vec<FileIndex>) {
        if self.shape.is_some() {
            return (Vec::new(), vec![FileIndex(0)]);
        }
        let mut names: Vec<&str> = Vec::new();
        let mut numbers = std::collections::BTreeMap::new();
        let indexes = self.descriptor.extents.iter().map(|extent| {
            if extent.kind == Kind::Zero {
                return FileIndex(0);
            }
            let number = *numbers.entry(extent.file.as_str()).or_insert_with(|| {
                names.push(&extent.file);
                names.len() as u16
            });
            FileIndex(number)
        });
        let indexes = indexes.collect();
        (names, indexes)
    }

    /// Whether the image can be written, as far as its own file says.
    fn writable(&self) -> Result<(), String> {
        let stream = self.shape.as_ref().is_some_and(|shape| shape.stream);
        if self.shape.as_ref().is_some_and(|shape| shape.stream && !shape.unclean) {
            return Err(
                "it is stream-optimized, which is written once: convert it into a monolithicSparse one"
                    .to_owned(),
            );
        }
        if self.descriptor.change_tracking
            || self.shape.as_ref().is_some_and(|shape| shape.version == 3 && !stream)
        {
            return Err("its changes are tracked in another file (ESX), which would miss ours".to_owned());
        }
        let closed =
            |extent: &&descriptor::ExtentLine| extent.access == Access::ReadOnly || extent.kind == Kind::Zero;
        if let Some(extent) = self.descriptor.extents.iter().find(closed) {
            return Err(format!("it has an extent {:?} of {:?} for reading alone", extent.file, extent.kind));
        }
        Ok(())
    }

    fn describe(&self) -> Description {
        let (names, _) = self.files();
        let link = |name: &&str| Link { paths: vec![(*name).to_owned()], format: None, identity: None };
        let descriptor = &self.descriptor;
        let mut properties = vec![("subformat", descriptor.create_type.clone())];
        properties.extend(descriptor.cid.as_ref().map(|(cid, _)| ("cid", format!("{cid:08x}"))));
        properties.extend(descriptor.parent_cid.map(|cid| ("parent_cid", format!("{cid:08x}"))));
        if let Some(shape) = &self.shape {
            properties.push(("grain_size", shape.grain.to_string()));
            properties.push(("zeroed_grain", shape.zeroed.to_string()));
            properties.extend(shape.unclean.then(|| ("unclean", "yes".to_owned())));
        }
        properties.push(("extents", descriptor.extents.len().max(1).to_string()));
        properties.extend(descriptor.adapter.clone().map(|adapter| ("adapter_type", adapter)));
        properties.extend(descriptor.hardware.clone().map(|version| ("hwversion", version)));
        Description {
            size: self.size(),
            backing: self.backing(),
            data_files: names.iter().map(link).collect(),
            encryption: None,
            identity: descriptor.cid.as_ref().map(|(cid, _)| identity(*cid)),
            writable: self.writable(),
            properties,
        }
    }

    fn backing(&self) -> Option<Link> {
        let cid = self.descriptor.parent_cid?;
        let mut paths = Vec::new();
        if let Some(hint) = self.descriptor.parent_hint.as_deref().filter(|hint| !hint.is_empty()) {
            paths.push(hint.to_owned());
            // It is a hint: where the folder was moved, or was one of Windows, the name may be beside the child.
            let base = hint.rsplit(['/', '\\']).next().unwrap_or_default();
            if base != hint && !base.is_empty() {
                paths.push(base.to_owned());
            }
        }
        Some(Link { paths, format: Some("vmdk".to_owned()), identity: Some(identity(cid)) })
    }
}

/// The image's own file.
fn first_file(open: &Open) -> Result<Rc<dyn ImageFile>, Error> {
    open.files.first().cloned().ok_or_else(|| Error::invalid("a VMDK is opened without its file"))
}

async fn open_image(open: Open) -> Result<Image, Error> {
    let file = first_file(&open)?;
    let name = file.name().to_owned();
    if let Some(snapshot) = &open.snapshot {
        return Err(Error::invalid(format!("{name}: a VMDK has no snapshots inside, found {snapshot:?}")));
    }
    if open.writable && !open.files.iter().all(|file| file.is_writable()) {
        return Err(Error::new(ErrorKind::ReadOnly, format!("{name} is opened read-only")));
    }
    let own = Own::read(&file).await?;
    if let (true, Err(reason)) = (open.writable, own.writable()) {
        return Err(Error::unsupported(&name, format!("writing to it: {reason}")));
    }
    if own.descriptor.parent_cid.is_some() && open.below_size.is_none() {
        return Err(Error::new(
            ErrorKind::Missing,
            format!("{name} has a parent: it cannot be read without it"),
        ));
    }
    if own.descriptor.parent_cid.is_none() && open.below_size.is_some() {
        return Err(Error::invalid(format!("{name} has no parent")));
    }
    let parts = open_parts(&own, &open).await?;
    let sparse = |part: &Part| match &part.kind {
        image::Kind::Sparse(sparse) => Some((sparse.index, sparse.file.clone())),
        _ => None,
    };
    let tables: Vec<_> = parts.iter().filter_map(sparse).collect();
    let slice_bytes = slice_bytes(&own, &parts);
    let data = parts.iter().filter_map(|part| match &part.kind {
        image::Kind::Sparse(sparse) => Some(sparse.file.clone()),
        image::Kind::Flat(file, _) => open.files.get(usize::from(file.0)).cloned(),
        image::Kind::Zero => None,
    });
    let tables = Tables::over(tables, data.collect(), slice_bytes, &open.budget, open.log.clone());
    Ok(Image::new(Parts {
        parts,
        decoded: crate::codec::Decoded::new(&open.budget),
        writable: open.writable,
        below: open.below_size.unwrap_or(0),
        tables,
        slice_bytes: slice_bytes as u64,
        descriptor: own.descriptor,
        descriptor_place: own.place,
        files: open.files,
    }))
}

/// Opens the extents.
async fn open_parts(own: &Own, open: &Open) -> Result<Vec<Part>, Error> {
    let (_, indexes) = own.files();
    let mut parts: Vec<Part> = Vec::new();
    let mut tables_file = 0;
    let mut flat: Vec<(FileIndex, Range<u64>)> = Vec::new();
    for (number, index) in indexes.into_iter().enumerate() {
        let line = own.descriptor.extents.get(number);
        let bytes = line.map_or(own.size(), |line| line.bytes);
        let start = parts.last().map_or(0, |part| part.end.get());
        let missing = || {
            let what = format!("{}: extent {number}: its file was not opened", own.name);
            Error::new(ErrorKind::Missing, what)
        };
        let file = open.files.get(usize::from(index.0)).cloned().ok_or_else(missing)?;
        let kind = match line.filter(|_| own.shape.is_none()).map(|line| (line.kind, line.offset)) {
            Some((Kind::Zero, _)) => image::Kind::Zero,
            Some((Kind::Flat, offset)) => {
                if offset + bytes > file.length() {
                    let what = format!(
                        "it has {} bytes, and extent {number} of {} says {bytes} at {offset}",
                        file.length(),
                        own.name
                    );
                    return Err(Error::corrupt(file.name(), what));
                }
                flat.push((index, offset..offset + bytes));
                image::Kind::Flat(index, offset)
            }
            Some((Kind::Sparse, _)) | None => {
                let sparse = Sparse::open(file, index, tables_file, open.writable).await?;
                tables_file += 1;
                check_sparse(own, &sparse, start, bytes, open.writable)?;
                image::Kind::Sparse(Box::new(sparse))
            }
        };
        parts.push(Part { start, end: Cell::new(start + bytes), kind });
    }
    check_shared(own, &parts, flat)?;
    Ok(parts)
}

/// Whether a sparse extent is what the descriptor says.
fn check_sparse(own: &Own, sparse: &Sparse, start: u64, bytes: u64, writable: bool) -> Result<(), Error> {
    let (name, shape) = (sparse.file.name(), &sparse.shape);
    if shape.capacity.get() < bytes {
        let what =
            format!("its header says {} bytes, and {} expects {bytes}", shape.capacity.get(), own.name);
        return Err(Error::corrupt(name, what));
    }
    if writable && if shape.stream { !shape.unclean } else { shape.version == 3 } {
        return Err(Error::unsupported(
            name,
            "writing to a stream-optimized or change-tracked extent: convert the disk",
        ));
    }
    // A grain would lie in two units of the disk, and two requests could plan it at a time.
    if writable && !start.is_multiple_of(shape.grain) {
        let what = format!(
            "writing to it: it begins at byte {start} of the disk, which is no multiple of its grains of {}",
            shape.grain
        );
        return Err(Error::unsupported(name, what));
    }
    Ok(())
}

/// No byte of a file may be in two extents.
fn check_shared(own: &Own, parts: &[Part], mut flat: Vec<(FileIndex, Range<u64>)>) -> Result<(), Error> {
    let sparse = parts.iter().filter_map(|part| match &part.kind {
        image::Kind::Sparse(sparse) => Some((sparse.index, 0..u64::MAX)),
        _ => None,
    });
    flat.extend(sparse);
    flat.sort_unstable_by_key(|(file, range)| (*file, range.start));
    let shared = flat.windows(2).find(|pair| pair[0].0 == pair[1].0 && pair[0].1.end > pair[1].1.start);
    shared.map_or(Ok(()), |_| {
        Err(Error::corrupt(&own.name, "two of its extents lie over each other in one file"))
    })
}

/// Bytes of a slice of tables: 4 KiB where all tables are there and nothing else is in the same 4 KiB, 512 where the disk's bytes may be
/// the neighbours of a table.
fn slice_bytes(own: &Own, parts: &[Part]) -> usize {
    let slice = SLICE_BYTES as u64;
    let text_end = own.place.start + own.descriptor.text.len() as u64;
    let is_apart = |sparse: &Sparse| {
        let (shape, directory) = (&sparse.shape, sparse.directory.borrow());
        let tables =
            || directory.first.iter().chain(&directory.copy).map(|sector| u64::from(*sector) * SECTOR);
        let directories = [Some(shape.directory.get()), shape.redundant.get()];
        let first = tables().chain(directories.into_iter().flatten()).min().unwrap_or(0);
        let last = tables().max().unwrap_or(0) + shape.table_bytes();
        let own_text = if own.shape.is_some() { text_end } else { 0 };
        let before = own_text.max(SECTOR).max(if shape.cowd { header::COWD_HEADER_BYTES } else { 0 });
        shape.grain >= slice
            && tables().all(|at| at != 0)
            && first / slice * slice >= before
            && (last <= shape.overhead / slice * slice || shape.stream)
    };
    let mut sparse = parts.iter().filter_map(|part| match &part.kind {
        image::Kind::Sparse(sparse) => Some(sparse),
        _ => None,
    });
    if sparse.all(|sparse| is_apart(sparse)) { slice as usize } else { SECTOR as usize }
}

/// See [`Format::set_backing`].
async fn set_backing(file: Rc<dyn ImageFile>, backing: Option<(Link, u64)>) -> Result<(), Error> {
    let own = Own::read(&file).await?;
    if own.descriptor.cid.is_none() {
        return Err(Error::unsupported(
            &own.name,
            "another parent: it has no descriptor that could name one",
        ));
    }
    let parent = match &backing {
        Some((link, _)) => Some(create::parent_of(link)?),
        None => None,
    };
    let text = own.descriptor.with_parent(parent)?;
    descriptor::write(&file, &own.place, &own.descriptor.text, text).await?;
    file.flush().await
}
