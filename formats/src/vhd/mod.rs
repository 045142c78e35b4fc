//! VHD: the format of Virtual PC, Hyper-V and XenServer. Fixed, dynamic and differencing disks.
//!
//! Source: Microsoft's "Virtual Hard Disk Image Format Specification" 1.0; what XenServer's tools add (batmap, hidden flag, raw
//! parents) and what creators do differently stands where it is handled.
//!
//! | file | what |
//! |---|---|
//! | [`footer`], [`header`], [`locator`], [`batmap`], [`bitmap`] | the structures, byte by byte |
//! | [`geometry`] | cylinders, heads, sectors; which size of a footer counts |
//! | [`layout`] | reading all of them and checking them against each other |
//! | [`bat`] | the block table and the walk over it |
//! | [`fixed`], [`sparse`], `sparse_plan` | the drivers |
//! | [`reserve`] | places for new blocks |
//! | [`resize`], [`create`], [`check`], `parent` | what they say |
//!
//! # What a crash leaves
//! Every state is opened by this driver and by others: data is where the BAT says, an entry of the BAT is written only over a place
//! that is durably zero, bits of a bitmap only when the data is durable. What can be missing is the footer at the end, while
//! the file grows (its copy at offset 0 is used then), and what can be left over is unreferenced space (the reserve). Both are
//! mended by the next growth or clean close, or by `image check --repair`.
//!
//! # What is not done
//! Disks are not made smaller. Sizes above 2040 GiB, block sizes above 128 MiB and block tables above 8 Mi entries are refused by
//! name. Encrypted VHDs of XenServer cannot be told from others by their structures.

pub mod bat;
pub mod batmap;
pub mod bitmap;
pub mod blocks;
pub mod check;
pub mod create;
mod crypt;
pub mod fixed;
pub mod footer;
pub mod geometry;
pub mod header;
pub mod layout;
pub mod locator;
mod parent;
pub mod reserve;
pub mod resize;
pub mod sparse;
mod sparse_plan;

#[cfg(test)]
mod tests;

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use crate::crypt::Secret;
use crate::driver::{Create, Description, Driver, Findings, Format, Identity, Link, Open, Repair, Space};
use crate::error::{Error, ErrorKind};
use crate::file::{ImageFile, Pending};
use crate::metadata::Tables;

use blocks::BlockSet;
use footer::{DiskType, EPOCH, FEATURE_TEMPORARY, Footer};
use header::Header;
use layout::{Layout, Shape};
use reserve::Reserve;
use sparse::Sparse;

/// The format.
#[derive(Debug, Clone, Copy)]
pub struct Vhd;

/// Bytes of a slice of tables. Everything in a VHD is placed in sectors, and a bitmap has the guest's data right before and behind
/// it, which a larger slice would overwrite.
const SLICE_BYTES: usize = 512;

impl Format for Vhd {
    fn name(&self) -> &'static str {
        "vhd"
    }

    fn recognises(&self, head: &[u8], tail: &[u8]) -> bool {
        let short = tail.len().checked_sub(511).and_then(|from| tail.get(from..)).map(|bytes| {
            let mut whole = bytes.to_vec();
            whole.push(0);
            whole
        });
        let sparse = |footer: Footer| footer.disk_type.get() != DiskType::Fixed.number();
        Footer::parse(tail).is_ok()
            || short.is_some_and(|bytes| Footer::parse(&bytes).is_ok())
            || Footer::parse(head).is_ok_and(sparse)
    }

    fn describe(&self, file: Rc<dyn ImageFile>) -> Pending<'_, Description> {
        Box::pin(describe(file))
    }

    fn unlock<'a>(&'a self, file: Rc<dyn ImageFile>, key: &'a Secret) -> Pending<'a, Secret> {
        Box::pin(crypt::unlock(file, key))
    }

    fn open(&self, open: Open) -> Pending<'_, Rc<dyn Driver>> {
        Box::pin(open_image(open))
    }

    fn create<'a>(
        &'a self,
        file: Rc<dyn ImageFile>,
        _data_files: Vec<Rc<dyn ImageFile>>,
        create: &'a Create,
    ) -> Pending<'a, ()> {
        Box::pin(create::create(file, create))
    }

    fn check(&self, open: Open, repair: Option<Repair>) -> Pending<'_, Findings> {
        Box::pin(check::check(open, repair))
    }

    fn space(&self, create: &Create) -> Result<Space, Error> {
        create::space(create)
    }

    fn set_backing(&self, file: Rc<dyn ImageFile>, backing: Option<(Link, u64)>) -> Pending<'_, ()> {
        Box::pin(parent::set(file, backing))
    }
}

/// The image's own file.
fn first_file(open: &Open) -> Result<Rc<dyn ImageFile>, Error> {
    open.files.first().cloned().ok_or_else(|| Error::invalid("a VHD is opened without its file"))
}

async fn open_image(open: Open) -> Result<Rc<dyn Driver>, Error> {
    let file = first_file(&open)?;
    let name = file.name().to_owned();
    if let Some(snapshot) = &open.snapshot {
        return Err(Error::invalid(format!("{name}: a VHD has no snapshots inside, found {snapshot:?}")));
    }
    if open.writable && !file.is_writable() {
        return Err(Error::new(ErrorKind::ReadOnly, format!("{name} is opened read-only")));
    }
    let layout = Layout::read(&file).await?;
    let below_size = match (layout.disk_type, open.below_size) {
        (DiskType::Differencing, None) => {
            let message = format!("{name} is a differencing VHD: it cannot be read without its parent");
            return Err(Error::new(ErrorKind::Missing, message));
        }
        (DiskType::Differencing, below) => below,
        (_, Some(_)) => {
            let message = format!("{name} is a {} VHD, which has no parent", layout.disk_type.name());
            return Err(Error::invalid(message));
        }
        (_, None) => None,
    };
    let Some(header) = layout.header.clone() else {
        return Ok(Rc::new(fixed::Fixed::new(file, layout, open.writable)));
    };
    let sparse = open_sparse(file, &open, layout, &header, below_size).await?;
    Ok(Rc::new(sparse))
}

async fn open_sparse(
    file: Rc<dyn ImageFile>,
    open: &Open,
    layout: Layout,
    header: &Header,
    below_size: Option<u64>,
) -> Result<Sparse, Error> {
    let shape = Shape::new(&layout.footer, header);
    let blocks = shape.blocks(layout.size);
    // A batmap that is damaged is not believed, as XenServer does it.
    let batmap = batmap::read(&file, &layout.footer, header, blocks).await?.ok().flatten();
    let metadata = layout::metadata_ranges(&layout, header, batmap.as_ref());
    let walk = bat::walk(&file, &shape, blocks, &metadata, layout.data_end, 1).await?;
    if let (true, Some(damage)) = (open.writable, walk.damages.first()) {
        let count = walk.damaged.count();
        let what = format!(
            "{damage} ({count} such blocks); it can be opened read-only, or repaired by `blktapd image repair`"
        );
        return Err(Error::corrupt(file.name(), what));
    }
    let footer = Rc::new(RefCell::new(layout.footer.clone()));
    let cipher = crypt::cipher(&file, &layout, open.key.as_ref()).await?;
    let keeps_bits = layout.disk_type == DiskType::Differencing || cipher.is_some();
    let reserve =
        Reserve::new(file.clone(), &layout, shape, footer.clone(), !keeps_bits, walk.end, walk.free)
            .avoiding(layout::ranges_behind(&layout, header));
    let tables = Tables::new(
        file.clone(),
        sparse::FILE,
        vec![file.clone()],
        SLICE_BYTES,
        &open.budget,
        open.log.clone(),
    );
    Ok(Sparse {
        tables,
        shape,
        size: Cell::new(layout.size),
        header: RefCell::new(header.clone()),
        footer,
        below_size,
        cipher,
        writable: open.writable,
        damaged: walk.damaged,
        pinned: batmap.map_or_else(BlockSet::default, |batmap| batmap.full),
        unsettled: RefCell::default(),
        last_change: Cell::new(0),
        full: RefCell::new(BlockSet::new(blocks)),
        reserve,
        late: crate::late::Late::default(),
        metadata_end: metadata.iter().map(|range| range.end).max().unwrap_or(0),
        reservations: RefCell::default(),
        abandoned: RefCell::default(),
        plans: RefCell::default(),
        next_plan: Cell::new(0),
        file,
    })
}

async fn describe(file: Rc<dyn ImageFile>) -> Result<Description, Error> {
    let layout = Layout::read(&file).await?;
    let footer = &layout.footer;
    let backing = match &layout.header {
        Some(header) if layout.disk_type == DiskType::Differencing => {
            Some(parent_link(&file, &layout, header).await?)
        }
        _ => None,
    };
    let mut properties = vec![
        ("type", layout.disk_type.name().to_owned()),
        ("creator", footer.creator()),
        ("uuid", uuid::Uuid::from_bytes(footer.uuid).to_string()),
        ("created", (u64::from(footer.timestamp.get()) + EPOCH).to_string()),
    ];
    if let Some(header) = &layout.header {
        let room = u64::from(header.entries.get()) * u64::from(header.block_size.get());
        properties.push(("block_size", header.block_size.to_string()));
        properties.push(("max_size", room.to_string()));
    }
    let geometry = footer.geometry();
    let geometry = format!("{}/{}/{}", geometry.cylinders, geometry.heads, geometry.sectors_per_track);
    properties.push(("geometry", geometry));
    let flags = [
        ("hidden", footer.hidden != 0),
        ("saved_state", footer.saved_state != 0),
        ("temporary", footer.features.get() & FEATURE_TEMPORARY != 0),
    ];
    properties.extend(flags.iter().filter(|(_, set)| *set).map(|(name, _)| (*name, "yes".to_owned())));
    if let Err(reason) = &layout.footers.trailing {
        properties.push(("footer", format!("the one at the end {reason}; its copy at 0 is used")));
    }
    Ok(Description {
        size: layout.size,
        backing,
        data_files: Vec::new(),
        identity: Some(Identity { uuid: footer.uuid, modified: None }),
        writable: Ok(()),
        encryption: crypt::key_hash(&file, &layout).await?.map(|_| crypt::in_words()),
        properties,
    })
}

/// What a differencing disk says of its parent.
async fn parent_link(file: &Rc<dyn ImageFile>, layout: &Layout, header: &Header) -> Result<Link, Error> {
    // Relative paths first: they survive when a folder is moved; then the others in their order.
    let mut entries: Vec<_> = header.locators.iter().filter(|entry| entry.platform != [0; 4]).collect();
    entries.sort_by_key(|entry| entry.platform != locator::W2RU);
    let mut paths: Vec<String> = Vec::new();
    for entry in entries {
        if locator::check_entry(entry).is_err() {
            continue;
        }
        let bytes = file.read(entry.offset.get().min(file.length()), entry.len.get() as usize).await?;
        for path in locator::decode(entry.platform, &bytes) {
            if !paths.contains(&path) {
                paths.push(path);
            }
        }
    }
    let name = locator::decode_utf16(&header.parent_name, locator::Utf16::BigEndian).unwrap_or_default();
    let name = locator::base_name(&name).to_owned();
    if !name.is_empty() && !paths.contains(&name) {
        paths.push(name);
    }
    if paths.is_empty() {
        let what = "it is a differencing disk, and no locator of its parent can be read";
        return Err(Error::corrupt(file.name(), what));
    }
    if layout.parent_is_raw() {
        return Ok(Link { paths, format: Some("raw".to_owned()), identity: None });
    }
    let modified = header.parent_timestamp.get();
    let modified = (modified != 0).then_some(u64::from(modified) + EPOCH);
    let identity = Some(Identity { uuid: header.parent_uuid, modified });
    Ok(Link { paths, format: Some("vhd".to_owned()), identity })
}
