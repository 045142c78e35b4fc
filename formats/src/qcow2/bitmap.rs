//! Persistent bitmaps: the directory, and how they stay consistent although we do not track writes in them.
//!
//! | offset | bytes | field of a directory entry |
//! |---|---|---|
//! | 0 | 8 | offset of the bitmap's table |
//! | 8 | 4 | entries of the table |
//! | 12 | 4 | flags: 1 in use, 2 auto, 4 extra data compatible |
//! | 16, 17 | 1 each | type (1: dirty tracking), granularity bits |
//! | 18 | 2 | length of the name |
//! | 20 | 4 | length of the extra data |
//! | 24 | | extra data, name, padding to 8 |
//!
//! A bitmap with the flag *auto* must reflect every change of the disk. Before our first change we mark each of them *in use*, which
//! the specification gives the meaning "was not saved correctly": its user falls back to a full copy, and nothing is missed.
//! Bitmaps without that flag are frozen and stay as they are.

use std::ops::Range;
use std::rc::Rc;

use super::extensions::BitmapsPlace;
use super::header::Geometry;
use super::l1::OFFSET_MASK;
use crate::error::Error;
use crate::file::{Buf, ImageFile};

const FIXED_BYTES: u64 = 24;
/// Flag: the stored bits are not to be trusted.
pub(super) const IN_USE: u32 = 1;
/// Flag: reflects every change of the disk.
pub(super) const AUTO: u32 = 2;
/// Largest directory that is read, as QEMU limits it.
const DIRECTORY_MAX_BYTES: u64 = 64 << 20;
/// Most bitmaps, as QEMU limits them.
const COUNT_MAX: u32 = 65535;
/// Largest table of a bitmap, in entries.
const TABLE_ENTRIES_MAX: u32 = 0x0800_0000 / 8;

/// An entry of the directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Bitmap {
    /// Offset of the entry in the file.
    pub entry: u64,
    /// Offset of the bitmap's table.
    pub table: u64,
    /// Entries of the table.
    pub table_entries: u32,
    /// Flags.
    pub flags: u32,
    /// Name.
    pub name: String,
}

/// Where the directory is, if that is a place within a file of `length` bytes.
pub(super) fn directory_range(geometry: &Geometry, place: BitmapsPlace, length: u64) -> Option<Range<u64>> {
    let end = place.directory_offset.checked_add(place.directory_bytes)?;
    let sensible = place.directory_bytes <= DIRECTORY_MAX_BYTES
        && place.count <= COUNT_MAX
        && geometry.is_aligned(place.directory_offset)
        && end <= geometry.round_up(length);
    sensible.then_some(place.directory_offset..end)
}

/// Reads and checks the directory.
pub(super) async fn read(
    file: &Rc<dyn ImageFile>,
    geometry: &Geometry,
    place: BitmapsPlace,
) -> Result<Vec<Bitmap>, Error> {
    let corrupt = |what: String| Error::corrupt(file.name(), what);
    if directory_range(geometry, place, file.length()).is_none() {
        return Err(corrupt(format!(
            "its bitmap directory ({} bytes at {}) is not within the file",
            place.directory_bytes, place.directory_offset
        )));
    }
    let directory = file.read(place.directory_offset, place.directory_bytes as usize).await?;
    let mut bitmaps = Vec::new();
    let mut at = 0usize;
    for number in 0..place.count {
        let cut = || corrupt(format!("entry {number} of its bitmap directory is cut off"));
        let fixed = directory.get(at..at + FIXED_BYTES as usize).ok_or_else(cut)?;
        let be32 = |at: usize| u32::from_be_bytes([0, 1, 2, 3].map(|index| fixed[at + index]));
        let (name_len, extra_len) =
            (usize::from(u16::from_be_bytes([fixed[18], fixed[19]])), be32(20) as usize);
        let start = at + FIXED_BYTES as usize + extra_len;
        let name = directory.get(start..start + name_len).ok_or_else(cut)?;
        let bitmap = Bitmap {
            entry: place.directory_offset + at as u64,
            table: u64::from(be32(0)) << 32 | u64::from(be32(4)),
            table_entries: be32(8),
            flags: be32(12),
            name: String::from_utf8_lossy(name).into_owned(),
        };
        let bytes = u64::from(bitmap.table_entries) * 8;
        let end = bitmap.table.checked_add(bytes);
        if !geometry.is_aligned(bitmap.table)
            || bitmap.table_entries > TABLE_ENTRIES_MAX
            || end.is_none_or(|end| end > geometry.round_up(file.length()))
        {
            let what = format!("the table of bitmap {:?} ({bytes} bytes at {})", bitmap.name, bitmap.table);
            return Err(corrupt(format!("{what} is not within the file")));
        }
        bitmaps.push(bitmap);
        at = (start + name_len).next_multiple_of(8);
    }
    Ok(bitmaps)
}

/// The place of a cluster of bits that an entry of a bitmap's table names; `None` when it has none.
pub(super) fn bits_place(
    geometry: &Geometry,
    word: u64,
    end: u64,
) -> Result<Option<Range<u64>>, &'static str> {
    let offset = word & OFFSET_MASK;
    if word & !(OFFSET_MASK | 1) != 0 || (word & 1 != 0 && offset != 0) {
        return Err("has reserved bits set");
    }
    if offset == 0 {
        return Ok(None);
    }
    if !geometry.is_aligned(offset) || offset + geometry.cluster() > end {
        return Err("points to no cluster of the file");
    }
    Ok(Some(offset..offset + geometry.cluster()))
}

/// Marks all bitmaps *in use* that must reflect every change. The caller flushes.
pub(super) async fn mark_in_use(file: &Rc<dyn ImageFile>, bitmaps: &[Bitmap]) -> Result<(), Error> {
    for bitmap in bitmaps.iter().filter(|bitmap| bitmap.flags & AUTO != 0 && bitmap.flags & IN_USE == 0) {
        file.write(bitmap.entry + 12, Buf::copy_of(&(bitmap.flags | IN_USE).to_be_bytes())).await?;
    }
    Ok(())
}
