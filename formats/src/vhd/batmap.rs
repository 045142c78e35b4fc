//! The batmap of XenServer's tools: one bit per block that says that all sectors of the block are in this file. A hint only: what
//! is not set is looked up in the block's bitmap. It stands behind the BAT of dynamic and differencing disks whose creator is
//! `tap`, from version 1.1 on (from 1.2 always).
//!
//! | offset | bytes | field (big-endian) |
//! |---|---|---|
//! | 0 | 8 | cookie `tdbatmap` |
//! | 8 | 8 | offset of the map |
//! | 16 | 4 | sectors of the map |
//! | 20 | 4 | version: 0x00010001 sums signed bytes, 0x00010002 unsigned ones |
//! | 24 | 4 | checksum of the map's bytes that the current size needs, whole sectors |
//! | 28 | 1 | marker of the tools |
//! | 29 | 1 | method of encryption, 0 for none |
//! | 30, 62 | 32 each | nonce and hash of the key |
//!
//! Bits count from the highest of each byte. Map and checksum are two places, which no write changes at once: a crash between
//! the two would leave a batmap that XenServer's tools refuse the image for. Therefore this driver never changes one of an
//! image in use. It never sets a bit, which the format allows, and a block whose bit is set is never given up: erasing it
//! zeroes it where it is. `check` rebuilds a damaged batmap as an empty one.

use std::rc::Rc;

use zerocopy::big_endian::{U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::blocks::BlockSet;
use super::footer::{Footer, SECTOR};
use super::header::Header;
use crate::error::Error;
use crate::file::{Buf, ImageFile};

/// First bytes of a batmap's header.
pub const COOKIE: [u8; 8] = *b"tdbatmap";
/// The version that is written.
pub const VERSION: u32 = 0x0001_0002;
/// The version whose checksum takes bytes as signed numbers.
const VERSION_SIGNED: u32 = 0x0001_0001;
/// XenServer's block size: the checksum counts blocks of it whatever the header says.
const BLOCK_SHIFT: u32 = 21;

/// The header of a batmap as it is in the file. See the module for the offsets.
#[derive(Debug, Clone, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
#[allow(missing_docs)] // the module's table is the documentation
pub struct BatmapHeader {
    pub cookie: [u8; 8],
    pub offset: U64,
    pub sectors: U32,
    pub version: U32,
    pub checksum: U32,
    pub marker: u8,
    pub key_hash: KeyHash,
    pub reserved: [u8; 418],
}

/// How the key of an encrypted disk is known. See the module for the offsets.
#[derive(Debug, Clone, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
#[allow(missing_docs)] // the module's table is the documentation
pub struct KeyHash {
    pub method: u8,
    pub nonce: [u8; 32],
    pub hash: [u8; 32],
}

/// A batmap that was read.
#[derive(Debug)]
pub struct Batmap {
    /// Where its header is.
    pub header_offset: u64,
    /// Its header.
    pub header: BatmapHeader,
    /// Blocks whose bit is set.
    pub full: BlockSet,
}

/// Where the header of a batmap is: right behind the BAT.
pub fn header_offset(header: &Header) -> u64 {
    header.table_offset.get() + header.table_bytes()
}

/// Whether the creator of an image writes batmaps.
pub fn is_expected(footer: &Footer) -> bool {
    footer.is_tap() && footer.creator_version.get() >= 0x0001_0002
}

/// Whether the creator of an image knows batmaps.
pub fn may_have_one(footer: &Footer) -> bool {
    footer.is_tap() && footer.creator_version.get() >= 0x0001_0001
}

/// Bytes of a map that its checksum covers.
fn covered_bytes(size: u64) -> u64 {
    (size >> (BLOCK_SHIFT + 3)).max(1).next_multiple_of(SECTOR)
}

impl BatmapHeader {
    /// The header in these bytes; `None` if they are none.
    pub fn of(bytes: &[u8]) -> Option<BatmapHeader> {
        BatmapHeader::read_from_bytes(bytes).ok().filter(|header| header.cookie == COOKIE)
    }

    /// A header for an empty map that begins right behind it.
    pub fn empty(header_offset: u64, entries: u32) -> BatmapHeader {
        let mut header = BatmapHeader::new_zeroed();
        header.cookie = COOKIE;
        header.offset = U64::new(header_offset + SECTOR);
        header.sectors = U32::new(entries.div_ceil(8).div_ceil(SECTOR as u32));
        header.version = U32::new(VERSION);
        header.checksum = U32::new(u32::MAX);
        header
    }

    /// Bytes of the map.
    pub fn map_bytes(&self) -> u64 {
        u64::from(self.sectors.get()) * SECTOR
    }

    fn sum(&self, map: &[u8]) -> u32 {
        let signed = self.version.get() == VERSION_SIGNED;
        let value = |byte: u8| if signed { i32::from(byte as i8) as u32 } else { u32::from(byte) };
        !map.iter().fold(0u32, |sum, byte| sum.wrapping_add(value(*byte)))
    }
}

/// Reads the batmap of an image. `Ok(None)`: its creator has none. `blocks` is the number of blocks of the disk.
///
/// # Errors
/// The inner one says what is wrong with the batmap; the outer one that it could not be read.
pub async fn read(
    file: &Rc<dyn ImageFile>,
    footer: &Footer,
    header: &Header,
    blocks: u32,
) -> Result<Result<Option<Batmap>, String>, Error> {
    if !may_have_one(footer) {
        return Ok(Ok(None));
    }
    let header_offset = header_offset(header);
    let bytes = file.read(header_offset, SECTOR as usize).await?;
    let Ok(found) = BatmapHeader::read_from_bytes(&bytes) else { return Ok(Ok(None)) };
    if found.cookie != COOKIE {
        let absent =
            if is_expected(footer) { Err("has no cookie \"tdbatmap\"".to_owned()) } else { Ok(None) };
        return Ok(absent);
    }
    if found.version.get() > VERSION {
        return Ok(Err(format!("has the version {:#x}, {VERSION:#x} is known", found.version.get())));
    }
    let (offset, covered) = (found.offset.get(), covered_bytes(footer.current_size.get()));
    let room = found.map_bytes();
    if room * 8 < u64::from(header.entries.get()) || room < covered {
        return Ok(Err(format!("has {room} bytes for {} blocks", header.entries.get())));
    }
    let end = offset.checked_add(room).filter(|end| *end <= file.length());
    if offset % SECTOR != 0 || offset < SECTOR || end.is_none() {
        return Ok(Err(format!("says that the map is at {offset}, which is not in the file")));
    }
    // At most 128 KiB: the size was checked.
    let map = file.read(offset, covered as usize).await?;
    let (sum, expected) = (found.checksum.get(), found.sum(&map));
    if sum != expected {
        return Ok(Err(format!("has the checksum {sum:#010x}, its map gives {expected:#010x}")));
    }
    let mut full = BlockSet::new(blocks);
    for block in 0..blocks.min(covered as u32 * 8) {
        if map[block as usize / 8] & (0x80 >> (block % 8)) != 0 {
            full.insert(block);
        }
    }
    Ok(Ok(Some(Batmap { header_offset, header: found, full })))
}

/// Writes an empty batmap behind the BAT; marker and key hash of the one that is there stay. Not atomic: for new images and repairs.
pub async fn write_empty(file: &Rc<dyn ImageFile>, header: &Header) -> Result<(), Error> {
    let at = header_offset(header);
    let mut empty = BatmapHeader::empty(at, header.entries.get());
    if let Some(old) = BatmapHeader::of(&file.read(at, SECTOR as usize).await?) {
        (empty.marker, empty.key_hash) = (old.marker, old.key_hash);
    }
    file.write(empty.offset.get(), Buf::zeroed(empty.map_bytes() as usize)).await?;
    file.write(at, Buf::copy_of(empty.as_bytes())).await
}

#[cfg(test)]
mod tests {
    //! Goal: the header is where XenServer's tools have it and the checksum is theirs. Method: bytes by hand.

    use super::*;

    #[test]
    fn fields_and_checksums() {
        let mut bytes = [0u8; 512];
        bytes[0..8].copy_from_slice(b"tdbatmap");
        bytes[8..16].copy_from_slice(&[0, 0, 0, 0, 0, 1, 2, 0]);
        bytes[16..20].copy_from_slice(&[0, 0, 0, 3]);
        bytes[20..24].copy_from_slice(&[0, 1, 0, 2]);
        bytes[24..28].copy_from_slice(&[0xff; 4]);
        let header = BatmapHeader::read_from_bytes(&bytes).unwrap();
        assert_eq!((header.offset.get(), header.map_bytes()), (66048, 1536));
        assert_eq!(header, BatmapHeader::empty(65536, 3 * 512 * 8));
        assert_eq!(header.sum(&[0x80, 1]), !0x81);
        let mut signed = header.clone();
        signed.version = U32::new(VERSION_SIGNED);
        assert_eq!(signed.sum(&[0x80, 1]), !(1u32.wrapping_sub(128)));
        assert_eq!((covered_bytes(1 << 30), covered_bytes(2040 << 30)), (512, 130_560));
    }
}
