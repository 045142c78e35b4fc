//! New images. The options are those of `vhd-util create` and of QEMU:
//!
//! | option | values | what |
//! |---|---|---|
//! | `type`, `subformat` | `dynamic`, `fixed` | fixed holds the disk's bytes as they are; not with a parent |
//! | `reserve`, `static` | `on`, `off` | `on` is `type=fixed` (vhd-util's `-r`) |
//! | `block_size` | power of two, 512 to 128M | 2M unless given; XenServer's tools take no other |
//! | `max_size` | size | room in the block table for growing (vhd-util's `-S`); twice the size, at least 16384 blocks, unless given |
//! | `creator` | `tap`, `vpc`, `win`, `vbox`, `qem2` | in whose manner; `tap` (XenServer) with a batmap unless the block size forbids it |
//! | `force_size` | `on`, `off` | with `creator=vpc`: `off` rounds the size up to what a geometry expresses, `on` is `creator=qem2` |
//! | `uuid` | UUID | a random one unless given |
//! | `hidden` | `on`, `off` | XenServer's mark of an inner node of a chain |
//!
//! The size is kept to the sector. XenServer's own tools round it up to 2 MiB, and ignore what is behind the last whole 2 MiB:
//! `check` remarks it.

use std::rc::Rc;
use std::time::{SystemTime, UNIX_EPOCH};

use zerocopy::big_endian::{U32, U64};

use super::batmap;
use super::footer::{DiskType, Footer, SECTOR, to_vhd_time};
use super::geometry::Geometry;
use super::header::{
    BLOCK_BYTES_DEFAULT, BLOCK_BYTES_MAX, BLOCK_BYTES_MIN, ENTRIES_MAX, HEADER_BYTES, Header, SIZE_MAX,
};
use super::locator::{self, Utf16};
use crate::driver::{Create, Link, Space};
use crate::error::Error;
use crate::file::{Buf, ImageFile};
use crate::size::{format_size, parse_size};

/// Where the BAT of a new image begins: behind footer and header, as in everybody's images.
const TABLE_OFFSET: u64 = SECTOR + HEADER_BYTES;
/// Entries that a BAT has at least unless the user says otherwise: 32 GiB of 2 MiB blocks in 64 KiB.
const ENTRIES_ROOM: u64 = 16 << 10;
/// Space of a locator at least, so that a parent that moves can be named by a somewhat longer path.
const LOCATOR_BYTES_MIN: u64 = 1024;
/// Bytes of the BAT that are written at a time.
const WRITE_BYTES: u64 = 1 << 20;

/// Who made an image: name and version in the footer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Creator {
    app: [u8; 4],
    version: u32,
    os: [u8; 4],
}

/// The values of `creator`.
const CREATORS: &[(&str, Creator)] = &[
    ("tap", Creator { app: *b"tap\0", version: 0x0001_0003, os: [0; 4] }),
    ("vpc", Creator { app: *b"vpc ", version: 0x0005_0003, os: *b"Wi2k" }),
    ("win", Creator { app: *b"win ", version: 0x0006_0001, os: *b"Wi2k" }),
    ("vbox", Creator { app: *b"vbox", version: 0x0004_0003, os: *b"Wi2k" }),
    ("qem2", Creator { app: *b"qem2", version: 0x0005_0003, os: *b"Wi2k" }),
];

/// Options, understood.
#[derive(Debug)]
struct Options {
    fixed: bool,
    block: u32,
    max_size: Option<u64>,
    creator: Option<&'static str>,
    force_size: Option<bool>,
    uuid: [u8; 16],
    hidden: bool,
}

const KNOWN: &str =
    "type (or subformat), reserve (or static), block_size, max_size, creator, force_size, uuid, hidden";

impl Options {
    fn parse(options: &[(String, String)]) -> Result<Options, Error> {
        let mut parsed = Options {
            fixed: false,
            block: BLOCK_BYTES_DEFAULT,
            max_size: None,
            creator: None,
            force_size: None,
            uuid: *uuid::Uuid::new_v4().as_bytes(),
            hidden: false,
        };
        for (key, value) in options {
            let refuse = |expected: &str| Error::invalid(format!("option {key}={value}: {expected}"));
            let size =
                || parse_size(value).map_err(|problem| Error::invalid(format!("option {key}: {problem}")));
            let switch = || match value.as_str() {
                "on" | "yes" | "true" => Ok(true),
                "off" | "no" | "false" => Ok(false),
                _ => Err(refuse("on or off is expected")),
            };
            match key.as_str() {
                "type" | "subformat" => {
                    parsed.fixed = match value.as_str() {
                        "dynamic" => false,
                        "fixed" => true,
                        _ => {
                            return Err(refuse(
                                "dynamic or fixed is expected; a parent makes a differencing disk",
                            ));
                        }
                    }
                }
                "reserve" | "static" => parsed.fixed |= switch()?,
                "block_size" => {
                    let block = u32::try_from(size()?).ok().filter(|block| {
                        block.is_power_of_two() && (BLOCK_BYTES_MIN..=BLOCK_BYTES_MAX).contains(block)
                    });
                    parsed.block =
                        block.ok_or_else(|| refuse("a power of two from 512 to 128M is expected"))?;
                }
                "max_size" => parsed.max_size = Some(size()?),
                "creator" => {
                    let known = CREATORS.iter().find(|(name, _)| name == value).map(|(name, _)| *name);
                    parsed.creator =
                        Some(known.ok_or_else(|| refuse("one of tap, vpc, win, vbox, qem2 is expected"))?);
                }
                "force_size" => parsed.force_size = Some(switch()?),
                "uuid" => {
                    let uuid = uuid::Uuid::try_parse(value).map_err(|_| refuse("a UUID is expected"))?;
                    parsed.uuid = *uuid.as_bytes();
                }
                "hidden" => parsed.hidden = switch()?,
                _ => return Err(Error::invalid(format!("vhd has no option {key}: it has {KNOWN}"))),
            }
        }
        Ok(parsed)
    }

    /// The creator by the options: XenServer where its tools can use the image.
    fn creator(&self) -> Result<Creator, Error> {
        let by_default = if self.block == BLOCK_BYTES_DEFAULT || self.fixed { "tap" } else { "qem2" };
        let name = match (self.creator, self.force_size) {
            (None, None) => by_default,
            (None | Some("vpc"), Some(true)) => "qem2",
            (None, Some(false)) => "vpc",
            (Some(name), _) => name,
        };
        if name == "tap" && by_default != "tap" {
            let message = "creator=tap has blocks of 2M: leave out block_size, or the creator";
            return Err(Error::invalid(message));
        }
        CREATORS
            .iter()
            .find(|(known, _)| *known == name)
            .map(|(_, creator)| *creator)
            .ok_or_else(|| Error::invalid(format!("unknown creator {name}")))
    }
}

/// Seconds since 1970.
fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// Makes an image in an empty file.
pub async fn create(file: Rc<dyn ImageFile>, create: &Create) -> Result<(), Error> {
    let options = Options::parse(&create.options)?;
    let creator = options.creator()?;
    let below_size = create.backing.as_ref().map(|(_, size)| *size);
    let Some(mut size) = create.size.or(below_size) else {
        return Err(Error::invalid("a new image needs a size, or a parent to take it from"));
    };
    size = size.checked_next_multiple_of(SECTOR).unwrap_or(u64::MAX);
    // A snapshot has its parent's size exactly.
    if creator.app == *b"vpc " && create.backing.is_none() {
        size = Geometry::round_up(size.min(SIZE_MAX + SECTOR));
    }
    if size == 0 || size > SIZE_MAX {
        let message = format!("a size of {}: a VHD has from 512 bytes to 2040GiB", format_size(size));
        return Err(Error::invalid(message));
    }
    let disk_type = match (&create.backing, options.fixed) {
        (Some(_), true) => {
            return Err(Error::invalid("a fixed VHD has no parent: leave out type=fixed or reserve"));
        }
        (Some(_), false) => DiskType::Differencing,
        (None, true) => DiskType::Fixed,
        (None, false) => DiskType::Dynamic,
    };
    let mut footer = Footer::new(disk_type, size, options.uuid, now());
    footer.creator_app = creator.app;
    footer.creator_version = U32::new(creator.version);
    footer.creator_os = creator.os;
    footer.hidden = u8::from(options.hidden);
    if super::geometry::disk_size(&footer, u64::MAX) != size {
        // No geometry is this size, and this creator's images have the size of their geometry.
        footer.creator_app = *b"qem2";
    }
    let end = match disk_type {
        DiskType::Fixed => size,
        _ => write_tables(&file, &footer, &options, create.backing.as_ref().map(|(link, _)| link)).await?,
    };
    let at = if file.is_device() { (file.length() / SECTOR).saturating_sub(1) * SECTOR } else { end };
    if at < end {
        let what = format!("{} bytes, the image needs {}", file.length(), end + SECTOR);
        return Err(Error::invalid(format!("{} has {what}", file.name())));
    }
    if disk_type == DiskType::Fixed && file.is_device() {
        file.zero(0..size).await?;
    }
    file.write(at, Buf::copy_of(&footer.to_bytes())).await?;
    file.flush().await
}

/// Entries of a new BAT.
fn entries(options: &Options, size: u64) -> Result<u32, Error> {
    let block = u64::from(options.block);
    let needed = size.div_ceil(block);
    let room = match options.max_size {
        Some(max_size) if max_size < size || max_size > SIZE_MAX => {
            let message =
                format!("option max_size: {}: from the size to 2040GiB is expected", format_size(max_size));
            return Err(Error::invalid(message));
        }
        Some(max_size) => max_size.div_ceil(block),
        None => (needed * 2)
            .max(ENTRIES_ROOM)
            .min(SIZE_MAX.div_ceil(block))
            .min(u64::from(ENTRIES_MAX))
            .max(needed),
    };
    u32::try_from(room).ok().filter(|entries| *entries <= ENTRIES_MAX).ok_or_else(|| {
        Error::invalid(format!(
            "a disk of {} in blocks of {block} bytes: up to {ENTRIES_MAX} blocks are possible, take a larger block_size",
            format_size(size)
        ))
    })
}

/// See [`crate::driver::Format::space`]. Without a parent.
pub(super) fn space(create: &Create) -> Result<Space, Error> {
    let options = Options::parse(&create.options)?;
    let size = create.size.ok_or_else(|| Error::invalid("an image needs a size to be measured"))?;
    if options.fixed {
        return Ok(Space { unit: SECTOR, unit_space: 0, overhead: size.next_multiple_of(SECTOR) + SECTOR });
    }
    let entries = entries(&options, size)?;
    let block = u64::from(options.block);
    let bitmap = (block / SECTOR).div_ceil(8).next_multiple_of(SECTOR);
    let table = (u64::from(entries) * 4).next_multiple_of(SECTOR);
    let batmap = SECTOR + u64::from(entries).div_ceil(8).next_multiple_of(SECTOR);
    // Data lies on 4 KiB, so that a bitmap takes that.
    let unit_space = block + bitmap.next_multiple_of(4096);
    Ok(Space { unit: block, unit_space, overhead: TABLE_OFFSET + table + batmap + 4096 + SECTOR })
}

/// Writes header, tables and the copy of the footer; returns where they end.
async fn write_tables(
    file: &Rc<dyn ImageFile>,
    footer: &Footer,
    options: &Options,
    parent: Option<&Link>,
) -> Result<u64, Error> {
    let entries = entries(options, footer.current_size.get())?;
    let mut header = Header::new(TABLE_OFFSET, entries, options.block);
    let mut end = TABLE_OFFSET + header.table_bytes();
    if batmap::is_expected(footer) {
        batmap::write_empty(file, &header).await?;
        end += SECTOR + batmap::BatmapHeader::empty(end, entries).map_bytes();
    }
    if let Some(parent) = parent {
        end = write_locators(file, &mut header, parent, end).await?;
    }
    let mut at = TABLE_OFFSET;
    let table_end = TABLE_OFFSET + header.table_bytes();
    while at < table_end {
        let len = (table_end - at).min(WRITE_BYTES);
        let mut unused = Buf::zeroed(len as usize);
        unused.fill(0xff);
        file.write(at, unused).await?;
        at += len;
    }
    file.write(SECTOR, Buf::copy_of(&header.to_bytes())).await?;
    file.write(0, Buf::copy_of(&footer.to_bytes())).await?;
    Ok(end)
}

/// Writes what names the parent, from `at` on; returns where it ends.
pub(super) async fn write_locators(
    file: &Rc<dyn ImageFile>,
    header: &mut Header,
    parent: &Link,
    at: u64,
) -> Result<u64, Error> {
    let Some(path) = parent.paths.first() else {
        return Err(Error::invalid("a parent without a path"));
    };
    let base = locator::base_name(path);
    let name = locator::encode_utf16(base, Utf16::BigEndian);
    if base.is_empty() || name.len() + 2 > header.parent_name.len() {
        let message =
            format!("the parent's name {base:?} does not fit into a VHD: from 1 to 255 characters do");
        return Err(Error::invalid(message));
    }
    header.parent_name[..name.len()].copy_from_slice(&name);
    match (parent.format.as_deref(), parent.identity) {
        // XenServer's way to say that the parent is raw: no UUID.
        (Some("raw"), identity) => {
            let modified = identity.and_then(|identity| identity.modified).unwrap_or(0);
            header.parent_timestamp = U32::new(to_vhd_time(modified));
        }
        (Some("vhd"), Some(identity)) if identity.uuid != [0; 16] => {
            header.parent_uuid = identity.uuid;
            header.parent_timestamp = U32::new(to_vhd_time(identity.modified.unwrap_or(0)));
        }
        (Some("vhd"), _) => {
            return Err(Error::invalid(format!(
                "the parent {path} has no UUID to be known by: convert it first"
            )));
        }
        (format, _) => {
            let format = format.unwrap_or("unknown");
            let message =
                format!("the parent {path} is of type {format}: a VHD can name parents of type vhd and raw");
            return Err(Error::invalid(message));
        }
    }
    let mut end = at;
    for (entry, (platform, path)) in header.locators.iter_mut().zip(locator::choose(&parent.paths)) {
        let bytes = locator::encode(platform, path);
        let space = (bytes.len() as u64).next_multiple_of(SECTOR).max(LOCATOR_BYTES_MIN);
        if bytes.len() as u64 > u64::from(locator::LEN_MAX) {
            return Err(Error::invalid(format!(
                "the parent's path has {} bytes, which is too long",
                path.len()
            )));
        }
        let mut padded = Buf::zeroed(space as usize);
        padded[..bytes.len()].copy_from_slice(&bytes);
        file.write(end, padded).await?;
        entry.platform = platform;
        // In bytes, as Microsoft and XenServer do, though the specification says sectors.
        entry.space = U32::new(space as u32);
        entry.len = U32::new(bytes.len() as u32);
        entry.offset = U64::new(end);
        end += space;
    }
    Ok(end)
}
