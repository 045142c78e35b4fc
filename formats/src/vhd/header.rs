//! The dynamic disk header: where the block table is, how large blocks are, who the parent is. 1024 bytes, of which everything
//! that may change during the life of an image (place and length of the table, checksum) lies in the first 512, so that one
//! sector's write changes it whole.
//!
//! | offset | bytes | field (big-endian) |
//! |---|---|---|
//! | 0 | 8 | cookie `cxsparse` |
//! | 8 | 8 | all ones |
//! | 16 | 8 | offset of the block table (BAT) |
//! | 24 | 4 | version 0x00010000 |
//! | 28 | 4 | entries of the BAT |
//! | 32 | 4 | block size in bytes |
//! | 36 | 4 | checksum |
//! | 40 | 16 | UUID of the parent; zero when the parent is raw (XenServer) |
//! | 56 | 4 | time of the parent's last modification, seconds since 2000 |
//! | 60 | 4 | reserved |
//! | 64 | 512 | name of the parent, UTF-16 big-endian |
//! | 576 | 8 × 24 | parent locators: see [`super::locator`] |
//! | 768 | 256 | reserved |
//!
//! Source: the specification, "Dynamic Disk Header Format".

use zerocopy::big_endian::{U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::footer::{NO_OFFSET, SECTOR, VERSION, checksum};

/// Bytes of a header.
pub const HEADER_BYTES: u64 = 1024;
/// First bytes of every header.
pub const COOKIE: [u8; 8] = *b"cxsparse";
/// Block size of nearly all images, and the only one of XenServer's tools.
pub const BLOCK_BYTES_DEFAULT: u32 = 2 << 20;
/// Smallest block: one sector.
pub const BLOCK_BYTES_MIN: u32 = 512;
/// Largest block that is served. Nobody makes larger ones than 2 MiB; the bitmap of one block has 32 KiB here.
pub const BLOCK_BYTES_MAX: u32 = 128 << 20;
/// Most entries of a block table that is served: 8 Mi, which is 2040 GiB of blocks from 256 KiB up. The table is walked when
/// an image is opened, which this bounds.
pub const ENTRIES_MAX: u32 = 8 << 20;
/// Largest disk: 2040 GiB, since entries are 32-bit sector numbers and places behind it could not be named.
pub const SIZE_MAX: u64 = 2040 << 30;

/// One of the eight parent locators as it is in the header.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct LocatorEntry {
    /// Platform code.
    pub platform: [u8; 4],
    /// Space for it: sectors by the specification, bytes in what Microsoft and XenServer write.
    pub space: U32,
    /// Bytes of the path.
    pub len: U32,
    /// Zero.
    pub reserved: U32,
    /// Where the path is.
    pub offset: U64,
}

impl LocatorEntry {
    /// Bytes of the space, whichever unit it is in; `None` when it makes no sense in either.
    pub fn space_bytes(&self) -> Option<u64> {
        match u64::from(self.space.get()) {
            sectors if sectors < SECTOR => Some(sectors * SECTOR),
            bytes if bytes % SECTOR == 0 => Some(bytes),
            _ => None,
        }
    }
}

/// The header as it is in the file. See the module for the offsets.
#[derive(Debug, Clone, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
#[allow(missing_docs)] // the module's table is the documentation
pub struct Header {
    pub cookie: [u8; 8],
    pub data_offset: U64,
    pub table_offset: U64,
    pub version: U32,
    pub entries: U32,
    pub block_size: U32,
    pub checksum: U32,
    pub parent_uuid: [u8; 16],
    pub parent_timestamp: U32,
    pub reserved: U32,
    pub parent_name: [u8; 512],
    pub locators: [LocatorEntry; 8],
    pub reserved_end: [u8; 256],
}

impl Header {
    /// Reads a header and checks that it is one: cookie and checksum.
    ///
    /// # Errors
    /// What is wrong with it, for a sentence "the dynamic header …".
    pub fn parse(bytes: &[u8]) -> Result<Header, String> {
        let Ok((header, _)) = Header::read_from_prefix(bytes) else {
            return Err(format!("has {} bytes instead of 1024", bytes.len()));
        };
        if header.cookie != COOKIE {
            return Err("has no cookie \"cxsparse\"".to_owned());
        }
        let (found, expected) = (header.checksum.get(), header.sum());
        if found != expected {
            return Err(format!("has the checksum {found:#010x}, its bytes give {expected:#010x}"));
        }
        Ok(header)
    }

    /// The checksum that its bytes give.
    fn sum(&self) -> u32 {
        let mut copy = self.clone();
        copy.checksum = U32::ZERO;
        checksum(copy.as_bytes())
    }

    /// The bytes to write, with the right checksum.
    pub fn to_bytes(&self) -> [u8; HEADER_BYTES as usize] {
        let mut copy = self.clone();
        copy.checksum = U32::new(self.sum());
        let mut bytes = [0; HEADER_BYTES as usize];
        bytes.copy_from_slice(copy.as_bytes());
        bytes
    }

    /// A header without a parent.
    pub fn new(table_offset: u64, entries: u32, block_size: u32) -> Header {
        let mut header = Header::new_zeroed();
        header.cookie = COOKIE;
        header.data_offset = U64::new(NO_OFFSET);
        header.table_offset = U64::new(table_offset);
        header.version = U32::new(VERSION);
        header.entries = U32::new(entries);
        header.block_size = U32::new(block_size);
        header
    }

    /// Bytes of the BAT in the file, whole sectors.
    pub fn table_bytes(&self) -> u64 {
        (u64::from(self.entries.get()) * 4).next_multiple_of(SECTOR)
    }
}

#[cfg(test)]
mod tests {
    //! Goal: fields are where the specification has them. Method: a header byte by byte, in both directions.

    use super::*;

    fn bytes_by_hand() -> [u8; 1024] {
        let mut bytes = [0u8; 1024];
        bytes[0..8].copy_from_slice(b"cxsparse");
        bytes[8..16].fill(0xff);
        bytes[16..24].copy_from_slice(&[0, 0, 0, 0, 0, 0, 6, 0]);
        bytes[24..28].copy_from_slice(&[0, 1, 0, 0]);
        bytes[28..32].copy_from_slice(&[0, 0, 2, 0]);
        bytes[32..36].copy_from_slice(&[0, 0x20, 0, 0]);
        bytes[40..56].fill(7);
        bytes[56..60].copy_from_slice(&[1, 2, 3, 4]);
        bytes[64..68].copy_from_slice(&[0, b'a', 0, b'b']);
        // The second locator.
        bytes[600..604].copy_from_slice(b"W2ru");
        bytes[604..608].copy_from_slice(&[0, 0, 2, 0]);
        bytes[608..612].copy_from_slice(&[0, 0, 0, 24]);
        bytes[616..624].copy_from_slice(&[0, 0, 0, 0, 0, 1, 0, 0]);
        let sum: u32 = bytes.iter().map(|byte| u32::from(*byte)).sum();
        bytes[36..40].copy_from_slice(&(!sum).to_be_bytes());
        bytes
    }

    #[test]
    fn fields_are_where_the_specification_has_them() {
        let bytes = bytes_by_hand();
        let header = Header::parse(&bytes).unwrap();
        assert_eq!(size_of::<Header>(), 1024);
        assert_eq!((header.table_offset.get(), header.entries.get()), (1536, 512));
        assert_eq!((header.block_size.get(), header.table_bytes()), (BLOCK_BYTES_DEFAULT, 2048));
        assert_eq!((header.parent_uuid, header.parent_timestamp.get()), ([7; 16], 0x0102_0304));
        assert_eq!(&header.parent_name[..6], &[0, b'a', 0, b'b', 0, 0]);
        let locator = header.locators[1];
        assert_eq!((locator.platform, locator.len.get(), locator.offset.get()), (*b"W2ru", 24, 65536));
        assert_eq!(locator.space_bytes(), Some(512));
        assert_eq!(header.to_bytes(), bytes);
    }

    #[test]
    fn every_changed_byte_is_noticed() {
        for at in 0..1024 {
            let mut bytes = bytes_by_hand();
            bytes[at] ^= 0x10;
            assert!(Header::parse(&bytes).is_err(), "byte {at}");
        }
    }

    #[test]
    fn space_is_in_sectors_or_bytes() {
        let mut entry = LocatorEntry::new_zeroed();
        for (space, bytes) in
            [(1, Some(512)), (3, Some(1536)), (512, Some(512)), (1024, Some(1024)), (700, None)]
        {
            entry.space = U32::new(space);
            assert_eq!(entry.space_bytes(), bytes, "{space}");
        }
    }
}
