//! What an image's file holds and where: footers, header and tables, read and checked against each other and the file.
//!
//! ```text
//!  0        512          1536                                                             end
//!  | footer | dynamic    | BAT | batmap | parent   | block: bitmap, data | block … | footer |
//!  | (copy) | header     |     | (tap)  | locators |                     |         |        |
//! ```
//! Only the copy of the footer has its fixed place; the rest is found by the offsets in footer and header. Two rules for
//! footers: the one at the end counts; when it is missing or damaged (the file grew and the machine died before the footer was
//! written) the copy takes its place, and the next change of the file writes a new one. A *fixed* disk has no copy: what is at
//! offset 0 there belongs to the guest and is never believed.

use std::ops::Range;
use std::rc::Rc;

use super::footer::{COOKIE_DISABLED, DiskType, Footer, SECTOR};
use super::geometry::disk_size;
use super::header::{
    BLOCK_BYTES_MAX, BLOCK_BYTES_MIN, ENTRIES_MAX, HEADER_BYTES, Header, LocatorEntry, SIZE_MAX,
};
use super::locator;
use crate::error::{Error, ErrorKind};
use crate::file::ImageFile;

/// What was found where footers belong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Footers {
    /// The footer at the end of the file: where it is, or what is wrong with it.
    pub trailing: Result<u64, String>,
    /// The copy at offset 0: good, or what is wrong with it. `Ok` for a fixed disk, which has none.
    pub copy: Result<(), String>,
    /// Both are good and hold different things.
    pub differ: bool,
    /// They differ in the size of the disk only: a resize did not come to its end.
    pub resized: bool,
}

/// An image's structures, checked.
#[derive(Debug, Clone)]
pub struct Layout {
    /// The footer that counts.
    pub footer: Footer,
    /// Its type.
    pub disk_type: DiskType,
    /// Where it came from.
    pub footers: Footers,
    /// The header of dynamic and differencing disks.
    pub header: Option<Header>,
    /// Bytes of the disk.
    pub size: u64,
    /// First byte of the file that belongs to no block: the footer, or the end of the file when it has none.
    pub data_end: u64,
}

/// Where the footer of a file of `length` bytes may be: files of early Virtual PC lack the last byte.
fn trailing_places(length: u64) -> impl Iterator<Item = u64> {
    [SECTOR, SECTOR - 1].into_iter().filter_map(move |bytes| length.checked_sub(bytes))
}

/// The footers of a file, before anything is decided.
async fn read_footers(file: &Rc<dyn ImageFile>) -> Result<(Footers, Option<Footer>, Option<Footer>), Error> {
    let length = file.length();
    let mut trailing = Err(format!("the file has {length} bytes"));
    let mut found = None;
    for at in trailing_places(length) {
        let bytes = file.read(at, SECTOR as usize).await?;
        match Footer::parse(&bytes) {
            Ok(footer) => {
                (trailing, found) = (Ok(at), Some(footer));
                break;
            }
            // What is wrong at the usual place is what people want to know.
            Err(reason) if at + SECTOR == length => trailing = Err(reason),
            Err(_) => {}
        }
    }
    let head = Footer::parse(&file.read(0, SECTOR as usize).await?);
    let copy = head.as_ref().map(|_| ()).map_err(Clone::clone);
    Ok((Footers { trailing, copy, differ: false, resized: false }, found, head.ok()))
}

/// Whether a resize makes one footer of the other.
fn differ_in_size(trailing: &Footer, copy: &Footer) -> bool {
    let mut grown = copy.clone();
    super::fixed::set_size(&mut grown, trailing.current_size.get());
    grown.to_bytes() == trailing.to_bytes()
}

impl Layout {
    /// Reads and checks footers and header. Changes nothing.
    ///
    /// # Errors
    /// I/O; not a VHD; damaged beyond use; something that is not supported.
    pub async fn read(file: &Rc<dyn ImageFile>) -> Result<Layout, Error> {
        let name = file.name();
        let (mut footers, trailing, head) = read_footers(file).await?;
        let sparse_head = head.filter(|copy| copy.disk_type.get() != DiskType::Fixed.number());
        let footer = match (&trailing, &sparse_head) {
            (Some(footer), _) => footer.clone(),
            (None, Some(copy)) => copy.clone(),
            (None, None) => return Err(no_footer(name, &footers)),
        };
        let disk_type = check_footer(name, &footer)?;
        if disk_type == DiskType::Fixed {
            footers.copy = Ok(());
        } else if let (Some(trailing), Some(copy)) = (&trailing, &sparse_head) {
            footers.differ = trailing != copy;
            footers.resized = footers.differ && differ_in_size(trailing, copy);
        }
        let data_end = footers
            .trailing
            .as_ref()
            .map_or(file.length().next_multiple_of(SECTOR), |at| at.next_multiple_of(SECTOR));
        if disk_type == DiskType::Fixed {
            let size = disk_size(&footer, data_end) / SECTOR * SECTOR;
            if size == 0 || size > data_end {
                let what = format!("the footer says {size} bytes, the file has {data_end} before it");
                return Err(Error::corrupt(name, what));
            }
            return Ok(Layout { footer, disk_type, footers, header: None, size, data_end });
        }
        let header = read_header(file, &footer).await?;
        check_header(name, &header, &footer, data_end)?;
        let room = u64::from(header.entries.get()) * u64::from(header.block_size.get());
        let size = disk_size(&footer, room) / SECTOR * SECTOR;
        if size == 0 || size > SIZE_MAX {
            let what = format!("the disk has {size} bytes, from 512 to {SIZE_MAX} (2040 GiB) are possible");
            return Err(Error::corrupt(name, what));
        }
        if room < size {
            let what = format!(
                "the block table has {} entries of {} bytes, which is less than the disk's {size} bytes",
                header.entries.get(),
                header.block_size.get()
            );
            return Err(Error::corrupt(name, what));
        }
        Ok(Layout { footer, disk_type, footers, header: Some(header), size, data_end })
    }

    /// Whether the parent is a raw image: XenServer's convention is a UUID of zeroes.
    pub fn parent_is_raw(&self) -> bool {
        self.header.as_ref().is_some_and(|header| header.parent_uuid == [0; 16])
    }
}

/// Why a file without any footer is not opened.
fn no_footer(name: &str, footers: &Footers) -> Error {
    let reason = |found: &Result<_, String>| found.clone().err().unwrap_or_default();
    let trailing = footers.trailing.as_ref().map(|_| ()).map_err(Clone::clone);
    let (end, start) = (reason(&trailing), reason(&footers.copy));
    if end.contains("checksum") || start.contains("checksum") {
        let what = format!("the footer at its end {end}; its copy at 0 {start}; no good one is left");
        return Error::corrupt(name, what);
    }
    let message =
        format!("{name} is no VHD: it has no footer (\"conectix\") at its end and no copy of one at 0");
    Error::new(ErrorKind::WrongFormat, message)
}

/// Checks what a footer says as far as it stands alone.
fn check_footer(name: &str, footer: &Footer) -> Result<DiskType, Error> {
    if footer.cookie == COOKIE_DISABLED {
        let what = "XenServer has disabled it (cookie \"v_poison\"): what it held is elsewhere now";
        return Err(Error::unsupported(name, what));
    }
    if footer.version.get() >> 16 != 1 {
        let what = format!("the footer has version {:#010x}, 1.0 is known", footer.version.get());
        return Err(Error::unsupported(name, what));
    }
    DiskType::of(footer.disk_type.get()).ok_or_else(|| {
        let what =
            format!("disk type {}: 2 (fixed), 3 (dynamic), 4 (differencing) are known", footer.disk_type);
        Error::unsupported(name, what)
    })
}

async fn read_header(file: &Rc<dyn ImageFile>, footer: &Footer) -> Result<Header, Error> {
    let (name, at) = (file.name(), footer.data_offset.get());
    let inside = at.checked_add(HEADER_BYTES).is_some_and(|end| end <= file.length());
    if at % SECTOR != 0 || at < SECTOR || !inside {
        let what = format!("the footer says that the dynamic header is at {at}, which is not in the file");
        return Err(Error::corrupt(name, what));
    }
    let bytes = file.read(at, HEADER_BYTES as usize).await?;
    Header::parse(&bytes).map_err(|reason| {
        let what = format!("the dynamic header at {at} {reason}; there is no second copy of it");
        Error::corrupt(name, what)
    })
}

/// Checks a header against its footer and the file.
fn check_header(name: &str, header: &Header, footer: &Footer, data_end: u64) -> Result<(), Error> {
    if header.version.get() >> 16 != 1 {
        let what = format!("the dynamic header has version {:#010x}, 1.0 is known", header.version.get());
        return Err(Error::unsupported(name, what));
    }
    let block = header.block_size.get();
    if !block.is_power_of_two() || !(BLOCK_BYTES_MIN..=BLOCK_BYTES_MAX).contains(&block) {
        let what = format!("a block size of {block} bytes: powers of two from 512 to 128 MiB are");
        return Err(Error::unsupported(name, what));
    }
    let entries = header.entries.get();
    if entries > ENTRIES_MAX {
        let what = format!("a block table of {entries} entries, up to {ENTRIES_MAX} are: use larger blocks");
        return Err(Error::unsupported(name, what));
    }
    let at = header.table_offset.get();
    let end = at.checked_add(header.table_bytes()).filter(|end| *end <= data_end);
    let header_at = footer.data_offset.get();
    let on_header = end.is_some_and(|end| at < header_at + HEADER_BYTES && header_at < end);
    if !at.is_multiple_of(SECTOR) || at < SECTOR || end.is_none() || on_header {
        let what = format!(
            "the block table is said to be at {at} with {entries} entries, which is not a free part of the file"
        );
        return Err(Error::corrupt(name, what));
    }
    Ok(())
}

/// The shape of a dynamic or differencing disk: how block numbers, entries and places hang together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Where the BAT begins.
    pub table_offset: u64,
    /// Bytes of a block.
    pub block: u64,
    /// Bytes of a block's bitmap, whole sectors.
    pub bitmap: u64,
    /// Bits count from the lowest of each byte.
    pub low_bits_first: bool,
}

impl Shape {
    /// The shape by footer and header.
    pub fn new(footer: &Footer, header: &Header) -> Shape {
        let block = u64::from(header.block_size.get());
        Shape {
            table_offset: header.table_offset.get(),
            block,
            bitmap: (block / SECTOR).div_ceil(8).next_multiple_of(SECTOR),
            low_bits_first: footer.has_low_bits_first(),
        }
    }

    /// Number of blocks of a disk of `size` bytes.
    pub fn blocks(&self, size: u64) -> u32 {
        size.div_ceil(self.block) as u32
    }

    /// Where the BAT's entry of a block is.
    pub fn entry_offset(&self, block: u32) -> u64 {
        self.table_offset + u64::from(block) * 4
    }

    /// Where the disk's byte `offset` is in the file when its block begins at `start`.
    pub fn data_offset(&self, start: u64, offset: u64) -> u64 {
        start + self.bitmap + offset % self.block
    }

    /// Bytes that a block takes in the file.
    pub fn stored(&self) -> u64 {
        self.bitmap + self.block
    }
}

/// Ranges of the file that hold something other than blocks and the footer at its end, for dynamic and differencing disks. What is
/// said to lie behind the end is not there, and keeps no block from any place.
pub fn metadata_ranges(
    layout: &Layout,
    header: &Header,
    batmap: Option<&super::batmap::Batmap>,
) -> Vec<Range<u64>> {
    let header_at = layout.footer.data_offset.get();
    let table_at = header.table_offset.get();
    let mut ranges =
        vec![0..SECTOR, header_at..header_at + HEADER_BYTES, table_at..table_at + header.table_bytes()];
    if let Some(batmap) = batmap {
        let (at, map) = (batmap.header_offset, batmap.header.offset.get());
        ranges.extend([at..at + SECTOR, map..map + batmap.header.map_bytes()]);
    }
    ranges.extend(header.locators.iter().filter_map(locator_range));
    ranges.retain_mut(|range| {
        range.end = range.end.min(layout.data_end);
        !range.is_empty()
    });
    ranges
}

/// Where locators are said to be that are not in the file. A file that grows over them shall have no block there: the next opening
/// could not tell which of the two is right.
pub fn ranges_behind(layout: &Layout, header: &Header) -> Vec<Range<u64>> {
    let ranges = header.locators.iter().filter_map(locator_range);
    ranges.filter(|range| range.end > layout.data_end).collect()
}

/// Where a locator's path is, in whole sectors; `None` for an empty or senseless one.
pub fn locator_range(entry: &LocatorEntry) -> Option<Range<u64>> {
    if entry.platform == [0; 4] || locator::check_entry(entry).is_err() {
        return None;
    }
    let at = entry.offset.get();
    let end = at.checked_add(u64::from(entry.len.get()))?.checked_next_multiple_of(SECTOR)?;
    Some(at / SECTOR * SECTOR..end)
}
