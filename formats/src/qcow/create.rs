//! New images, and another backing file.
//!
//! A new image has blktap's extended header, its L1 table at 4096, and reads the same in QEMU and in blktap. The header is written
//! last, behind a flush: until then the file is no image.

use std::rc::Rc;

use zerocopy::IntoBytes;
use zerocopy::big_endian::{U32, U64};

use super::header::{self, Geometry, Header, RawHeader};
use crate::driver::{Budget, Create, Driver, Link, Open, Space};
use crate::error::Error;
use crate::file::{Buf, ImageFile};
use crate::size::parse_size;

/// Bytes that are preallocated at a time.
const PREALLOCATE_BYTES: u64 = 1 << 20;

/// What the options say.
struct Options {
    geometry: Geometry,
    extended: bool,
    preallocated: bool,
}

fn parse_options(create: &Create) -> Result<Options, Error> {
    // Over a backing file QEMU and blktap allocate clusters without copying what is around a write: with clusters of one sector
    // there is nothing around it.
    let (cluster_bits, l2_bits) = if create.backing.is_some() { (9, 12) } else { (12, 9) };
    let mut options =
        Options { geometry: Geometry { cluster_bits, l2_bits }, extended: true, preallocated: false };
    for (name, value) in &create.options {
        let bad = |expected: &str| Error::invalid(format!("option {name} is {value:?}: expected {expected}"));
        match (name.as_str(), value.as_str()) {
            ("cluster_size", _) => {
                let bytes = parse_size(value).ok().filter(|bytes| bytes.is_power_of_two());
                let bytes = bytes.filter(|bytes| (512..=64 << 10).contains(bytes));
                let bits = bytes.ok_or_else(|| bad("a power of two from 512 to 64k"))?.trailing_zeros();
                // Tables of one cluster, and of 32 KiB with small ones, as QEMU and blktap make them.
                options.geometry =
                    Geometry { cluster_bits: bits, l2_bits: if bits < 12 { 12 } else { bits - 3 } };
            }
            ("extended", "on" | "yes" | "true") => options.extended = true,
            ("extended", "off" | "no" | "false") => options.extended = false,
            ("extended", _) => return Err(bad("on or off")),
            ("preallocation", "off") => options.preallocated = false,
            ("preallocation", "full") => options.preallocated = true,
            ("preallocation", _) => return Err(bad("off or full")),
            _ => {
                let message = format!(
                    "a qcow image has no option {name}: it has cluster_size, extended, preallocation"
                );
                return Err(Error::invalid(message));
            }
        }
    }
    if options.preallocated && create.backing.is_some() {
        return Err(Error::invalid("preallocation excludes a backing file: its bytes would be hidden"));
    }
    Ok(options)
}

/// Name and type of a backing file, if a header can hold them.
fn name_field(link: &Link) -> Result<(Vec<u8>, usize), Error> {
    let (Some(path), Some(format)) = (link.paths.first(), &link.format) else {
        return Err(Error::invalid("a backing file needs a path and a format"));
    };
    if path.is_empty() || path.len() > 1023 {
        let message = format!("the path of the backing file has {} bytes: 1 to 1023 fit", path.len());
        return Err(Error::invalid(message));
    }
    let path = crate::qcow2::plain_path("the image", "backing file", path)?;
    let mut field = path.as_bytes().to_vec();
    field.extend_from_slice(&header::type_field(format));
    Ok((field, path.len()))
}

/// See [`crate::driver::Format::space`].
pub(super) fn space(create: &Create) -> Result<Space, Error> {
    let geometry = parse_options(create)?.geometry;
    let size = create.size.ok_or_else(|| Error::invalid("an image needs a size to be measured"))?;
    let tables = geometry.l1_entries(size);
    let overhead = (4096 + tables * 8).next_multiple_of(geometry.cluster()) + tables * geometry.l2_bytes();
    Ok(Space { unit: geometry.cluster(), unit_space: geometry.cluster(), overhead })
}

/// See [`crate::driver::Format::create`].
pub(super) async fn create(file: Rc<dyn ImageFile>, create: &Create) -> Result<(), Error> {
    let options = parse_options(create)?;
    let geometry = options.geometry;
    if file.is_device() {
        return Err(Error::unsupported(
            file.name(),
            "a qcow image grows at its end, and a block device has none",
        ));
    }
    let Some(size) = create.size.or(create.backing.as_ref().map(|(_, size)| *size)) else {
        return Err(Error::invalid("a qcow image needs a size, or a backing file to take it from"));
    };
    let most = header::L1_MAX_BYTES / 8 * geometry.l2_covers();
    if size == 0 || !size.is_multiple_of(512) || size > most {
        return Err(Error::invalid(format!("a size of {size} bytes: take a multiple of 512 up to {most}")));
    }
    let (name, name_len) = match &create.backing {
        Some((link, _)) => name_field(link)?,
        None => (Vec::new(), 0),
    };
    let name_at = if options.extended { header::BYTES } else { 48 };
    let l1 = match options.extended {
        true => 4096,
        false => (48 + name.len() as u64).next_multiple_of(8),
    };
    let l1_bytes = geometry.l1_entries(size) * 8;
    file.extend((l1 + l1_bytes).next_multiple_of(4096.max(geometry.cluster()))).await?;
    // A table of zeroes, whose sum does not need it: the file was empty.
    let sum = header::checksum(&vec![0; l1_bytes as usize]);
    let modified = create.backing.as_ref().and_then(|(link, _)| link.identity?.modified).unwrap_or(0);
    let raw = RawHeader {
        magic: U32::new(header::MAGIC),
        version: U32::new(1),
        backing_offset: U64::new(if name.is_empty() { 0 } else { name_at as u64 }),
        backing_len: U32::new(name_len as u32),
        modified: U32::new(modified as u32),
        size: U64::new(size),
        cluster_bits: geometry.cluster_bits as u8,
        l2_bits: geometry.l2_bits as u8,
        padding: [0; 2],
        crypt_method: U32::new(0),
        l1_offset: U64::new(l1),
        xen_magic: U32::new(header::XEN_MAGIC),
        checksum: U32::new(sum),
        cluster_alloc: U32::new(1),
        flags: U32::new(header::L1_BIG_ENDIAN | if options.preallocated { 0 } else { header::SPARSE }),
    };
    if !name.is_empty() {
        file.write(name_at as u64, Buf::copy_of(&name)).await?;
    }
    file.flush().await?;
    file.write(0, Buf::copy_of(&raw.as_bytes()[..name_at])).await?;
    file.flush().await?;
    if options.preallocated { preallocate(file, size).await } else { Ok(()) }
}

/// Writes zeroes to the whole disk, so that every cluster has its place.
async fn preallocate(file: Rc<dyn ImageFile>, size: u64) -> Result<(), Error> {
    let open = Open {
        files: vec![file.clone()],
        writable: true,
        below_size: None,
        budget: Budget::new(4 << 20),
        log: None,
        snapshot: None,
        key: None,
    };
    let image = super::open_image(open).await?;
    let mut at = 0;
    while at < size {
        let len = PREALLOCATE_BYTES.min(size - at);
        let plan = image.plan_write(at, len).await?;
        for fill in &plan.fills {
            file.write(fill.offset, Buf::zeroed((fill.range.end - fill.range.start) as usize)).await?;
        }
        image.commit(&plan).await?;
        at += len;
    }
    Driver::close(&image).await
}

/// See [`crate::driver::Format::set_backing`]: the new name stands at the end of the file before one write of a sector names it.
pub(super) async fn set_backing(file: Rc<dyn ImageFile>, backing: Option<(Link, u64)>) -> Result<(), Error> {
    let header = Header::read(&file).await?;
    let mut place = [0; 16];
    if let Some((link, _)) = &backing {
        let (name, len) = name_field(link)?;
        let at = file.length().next_multiple_of(header.geometry.cluster());
        file.write(at, Buf::copy_of(&name)).await?;
        file.flush().await?;
        place[..8].copy_from_slice(&at.to_be_bytes());
        place[8..12].copy_from_slice(&(len as u32).to_be_bytes());
        let modified = link.identity.and_then(|identity| identity.modified).unwrap_or(0);
        place[12..].copy_from_slice(&(modified as u32).to_be_bytes());
    }
    file.write(8, Buf::copy_of(&place)).await?;
    file.flush().await
}
