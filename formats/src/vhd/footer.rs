//! The footer: what kind of disk a file holds and how large it is. 512 bytes at the end of the file, and for dynamic and
//! differencing disks a copy of it at offset 0.
//!
//! | offset | bytes | field (big-endian) |
//! |---|---|---|
//! | 0 | 8 | cookie `conectix` |
//! | 8 | 4 | features: bit 0 temporary, bit 1 always set |
//! | 12 | 4 | version 0x00010000 |
//! | 16 | 8 | offset of the dynamic header; all ones in a fixed disk |
//! | 24 | 4 | time of creation, seconds since 2000-01-01 UTC |
//! | 28 | 4 | creator application |
//! | 32 | 4 | creator version |
//! | 36 | 4 | creator's host OS |
//! | 40 | 8 | original size in bytes |
//! | 48 | 8 | current size in bytes |
//! | 56 | 4 | geometry: cylinders (2), heads (1), sectors per track (1) |
//! | 60 | 4 | disk type: 2 fixed, 3 dynamic, 4 differencing |
//! | 64 | 4 | checksum: one's complement of the sum of all other bytes |
//! | 68 | 16 | UUID |
//! | 84 | 1 | saved state |
//! | 85 | 1 | hidden (XenServer); the rest is reserved and zero |
//!
//! Source: Virtual Hard Disk Image Format Specification, version 1.0, "Hard Disk Footer Format".

use zerocopy::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::geometry::Geometry;

/// Bytes of a footer, and of the unit in which everything in the file is placed.
pub const SECTOR: u64 = 512;
/// First bytes of every footer.
pub const COOKIE: [u8; 8] = *b"conectix";
/// What XenServer writes instead when it has disabled an image.
pub const COOKIE_DISABLED: [u8; 8] = *b"v_poison";
/// The only version there is.
pub const VERSION: u32 = 0x0001_0000;
/// `data_offset` when no header follows.
pub const NO_OFFSET: u64 = u64::MAX;
/// The feature bit that is always set.
pub const FEATURE_RESERVED: u32 = 2;
/// The feature bit of a disk that may be deleted at shutdown.
pub const FEATURE_TEMPORARY: u32 = 1;
/// Seconds from 1970 to 2000, where times of this format begin.
pub const EPOCH: u64 = 946_684_800;

/// What kind of disk a file holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DiskType {
    /// The disk's bytes, then the footer.
    Fixed,
    /// Blocks as they were written.
    Dynamic,
    /// As dynamic; what is not there is in the parent.
    Differencing,
}

impl DiskType {
    /// The number in the footer.
    pub fn number(self) -> u32 {
        match self {
            DiskType::Fixed => 2,
            DiskType::Dynamic => 3,
            DiskType::Differencing => 4,
        }
    }

    /// The type with a number.
    pub fn of(number: u32) -> Option<DiskType> {
        [DiskType::Fixed, DiskType::Dynamic, DiskType::Differencing]
            .into_iter()
            .find(|disk_type| disk_type.number() == number)
    }

    /// For people.
    pub fn name(self) -> &'static str {
        match self {
            DiskType::Fixed => "fixed",
            DiskType::Dynamic => "dynamic",
            DiskType::Differencing => "differencing",
        }
    }
}

/// The footer as it is in the file. See the module for the offsets.
#[derive(Debug, Clone, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
#[allow(missing_docs)] // the module's table is the documentation
pub struct Footer {
    pub cookie: [u8; 8],
    pub features: U32,
    pub version: U32,
    pub data_offset: U64,
    pub timestamp: U32,
    pub creator_app: [u8; 4],
    pub creator_version: U32,
    pub creator_os: [u8; 4],
    pub original_size: U64,
    pub current_size: U64,
    pub cylinders: U16,
    pub heads: u8,
    pub sectors_per_track: u8,
    pub disk_type: U32,
    pub checksum: U32,
    pub uuid: [u8; 16],
    pub saved_state: u8,
    pub hidden: u8,
    pub reserved: [u8; 426],
}

/// The one's complement of the sum of bytes: the checksum of all structures of the format, whose own field counts as zero.
pub fn checksum(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(0u32, |sum, byte| sum.wrapping_add(u32::from(*byte)))
}

impl Footer {
    /// Reads a footer and checks that it is one: cookie and checksum. The other fields may hold anything.
    ///
    /// # Errors
    /// What is wrong with it, for a sentence "the footer …".
    pub fn parse(bytes: &[u8]) -> Result<Footer, String> {
        let Ok((footer, _)) = Footer::read_from_prefix(bytes) else {
            return Err(format!("has {} bytes instead of 512", bytes.len()));
        };
        if footer.cookie != COOKIE && footer.cookie != COOKIE_DISABLED {
            return Err("has no cookie \"conectix\"".to_owned());
        }
        let (found, expected) = (footer.checksum.get(), footer.sum());
        if found != expected && !footer.sum_lacks_hidden() {
            return Err(format!("has the checksum {found:#010x}, its bytes give {expected:#010x}"));
        }
        Ok(footer)
    }

    /// The checksum that its bytes give.
    fn sum(&self) -> u32 {
        let mut copy = self.clone();
        copy.checksum = U32::ZERO;
        checksum(copy.as_bytes())
    }

    /// Early XenServer tools set the hidden flag without a new checksum.
    fn sum_lacks_hidden(&self) -> bool {
        let mut shown = self.clone();
        shown.hidden = 0;
        let creator = [0x0000_0001, 0x0001_0001].contains(&self.creator_version.get());
        self.hidden != 0 && self.is_tap() && creator && shown.sum() == self.checksum.get()
    }

    /// Made by XenServer's tools, or in their manner: sizes are exact and a batmap may follow the block table.
    pub fn is_tap(&self) -> bool {
        self.creator_app.starts_with(b"tap")
    }

    /// Its bitmaps count bits from the lowest of each byte: version 0.1 of XenServer's tools only.
    pub fn has_low_bits_first(&self) -> bool {
        self.is_tap() && self.creator_version.get() == 1
    }

    /// The bytes to write, with the right checksum.
    pub fn to_bytes(&self) -> [u8; 512] {
        let mut copy = self.clone();
        copy.checksum = U32::new(self.sum());
        let mut bytes = [0; 512];
        bytes.copy_from_slice(copy.as_bytes());
        bytes
    }

    /// A footer for a new disk; the creator is filled in by the caller.
    pub fn new(disk_type: DiskType, size: u64, uuid: [u8; 16], now_unix: u64) -> Footer {
        let mut footer = Footer::new_zeroed();
        footer.cookie = COOKIE;
        footer.features = U32::new(FEATURE_RESERVED);
        footer.version = U32::new(VERSION);
        let data_offset = if disk_type == DiskType::Fixed { NO_OFFSET } else { SECTOR };
        footer.data_offset = U64::new(data_offset);
        footer.timestamp = U32::new(to_vhd_time(now_unix));
        footer.original_size = U64::new(size);
        footer.set_size(size);
        footer.disk_type = U32::new(disk_type.number());
        footer.uuid = uuid;
        footer
    }

    /// Changes the current size, and the geometry with it.
    pub fn set_size(&mut self, size: u64) {
        self.current_size = U64::new(size);
        let geometry = Geometry::of_size(size);
        self.cylinders = U16::new(geometry.cylinders);
        self.heads = geometry.heads;
        self.sectors_per_track = geometry.sectors_per_track;
    }

    /// Its geometry.
    pub fn geometry(&self) -> Geometry {
        Geometry {
            cylinders: self.cylinders.get(),
            heads: self.heads,
            sectors_per_track: self.sectors_per_track,
        }
    }

    /// Creator for people: `tap 1.3`.
    pub fn creator(&self) -> String {
        let app: String = self
            .creator_app
            .iter()
            .map(|byte| if byte.is_ascii_graphic() { *byte as char } else { ' ' })
            .collect();
        let version = self.creator_version.get();
        format!("{} {}.{}", app.trim_end(), version >> 16, version & 0xffff)
    }
}

/// A time in seconds since 1970 as the format has it; what it cannot hold becomes 0, "not known".
pub fn to_vhd_time(unix: u64) -> u32 {
    unix.checked_sub(EPOCH).and_then(|seconds| u32::try_from(seconds).ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    //! Goal: fields are where the specification has them. Method: a footer byte by byte, in both directions.

    use super::*;

    /// A footer written by hand from the specification's table.
    pub fn bytes_by_hand() -> [u8; 512] {
        let mut bytes = [0u8; 512];
        bytes[0..8].copy_from_slice(b"conectix");
        bytes[8..12].copy_from_slice(&[0, 0, 0, 2]);
        bytes[12..16].copy_from_slice(&[0, 1, 0, 0]);
        bytes[16..24].copy_from_slice(&[0, 0, 0, 0, 0, 0, 2, 0]);
        bytes[24..28].copy_from_slice(&[0x10, 0x20, 0x30, 0x40]);
        bytes[28..32].copy_from_slice(b"tap\0");
        bytes[32..36].copy_from_slice(&[0, 1, 0, 3]);
        bytes[40..48].copy_from_slice(&[0, 0, 0, 0, 0x40, 0, 0, 0]);
        bytes[48..56].copy_from_slice(&[0, 0, 0, 0, 0x80, 0, 0, 0]);
        bytes[56..60].copy_from_slice(&[0x10, 0x41, 16, 63]);
        bytes[60..64].copy_from_slice(&[0, 0, 0, 3]);
        for (index, byte) in bytes[68..84].iter_mut().enumerate() {
            *byte = index as u8 + 1;
        }
        bytes[84] = 1;
        let sum: u32 = bytes.iter().map(|byte| u32::from(*byte)).sum();
        bytes[64..68].copy_from_slice(&(!sum).to_be_bytes());
        bytes
    }

    #[test]
    fn fields_are_where_the_specification_has_them() {
        let bytes = bytes_by_hand();
        let footer = Footer::parse(&bytes).unwrap();
        assert_eq!(size_of::<Footer>(), 512);
        assert_eq!((footer.features.get(), footer.version.get()), (2, VERSION));
        assert_eq!((footer.data_offset.get(), footer.timestamp.get()), (512, 0x1020_3040));
        assert_eq!((footer.creator(), footer.is_tap()), ("tap 1.3".to_owned(), true));
        assert_eq!((footer.original_size.get(), footer.current_size.get()), (1 << 30, 2 << 30));
        let geometry = footer.geometry();
        assert_eq!((geometry.cylinders, geometry.heads, geometry.sectors_per_track), (0x1041, 16, 63));
        assert_eq!(DiskType::of(footer.disk_type.get()), Some(DiskType::Dynamic));
        assert_eq!((footer.uuid[0], footer.uuid[15], footer.saved_state, footer.hidden), (1, 16, 1, 0));
        assert_eq!(footer.to_bytes(), bytes);
    }

    #[test]
    fn every_changed_byte_is_noticed() {
        for at in 0..512 {
            let mut bytes = bytes_by_hand();
            bytes[at] ^= 0x10;
            assert!(Footer::parse(&bytes).is_err(), "byte {at}");
        }
        assert!(Footer::parse(&bytes_by_hand()[..511]).is_err());
    }

    #[test]
    fn early_hidden_flags_are_taken() {
        let mut bytes = bytes_by_hand();
        bytes[85] = 1;
        assert!(Footer::parse(&bytes).is_err(), "version 1.3 counts the flag");
        let mut footer = Footer::parse(&bytes_by_hand()).unwrap();
        footer.creator_version = U32::new(0x0001_0001);
        let mut bytes = footer.to_bytes();
        bytes[85] = 1;
        assert_eq!(Footer::parse(&bytes).unwrap().hidden, 1);
    }
}
