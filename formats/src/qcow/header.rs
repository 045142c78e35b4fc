//! The header of a qcow image, version 1: what it says, checked. All numbers are big-endian.
//!
//! | offset | bytes | field |
//! |---|---|---|
//! | 0 | 4 | magic `QFI\xfb` |
//! | 4 | 4 | version, 1 |
//! | 8 | 8 | offset of the backing file's name, 0 for none |
//! | 16 | 4 | its length, at most 1023 |
//! | 20 | 4 | time of modification of the backing file, or 0 |
//! | 24 | 8 | size of the disk in bytes |
//! | 32, 33 | 1 each | cluster bits (9 to 16), bits of the number of entries of an L2 table (6 to 13) |
//! | 36 | 4 | encryption: 0 none, 1 AES |
//! | 40 | 8 | offset of the L1 table |
//!
//! Blktap's images go on with 16 bytes more, if their L1 table begins at a multiple of 4096:
//!
//! | offset | bytes | field |
//! |---|---|---|
//! | 48 | 4 | magic `XEN\xfb` |
//! | 52 | 4 | checksum: the first four bytes of the MD5 of the L1 table, read as a little-endian number |
//! | 56 | 4 | clusters that are allocated together: 1, or all that an L2 table maps |
//! | 60 | 4 | flags: 1 the file is sparse, 2 the L1 table is big-endian (older images have it in the order of their machine) |
//!
//! The format of the backing file has no field. We write it right behind the name, as 16 bytes: `FMT:` and the type, padded with
//! zeroes; others do not look there.

use std::ops::Range;
use std::rc::Rc;

use md5::Digest;
use zerocopy::big_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::error::{Error, ErrorKind};
use crate::file::ImageFile;

/// First four bytes of every file.
pub(super) const MAGIC: u32 = 0x5146_49fb;
/// First four bytes of blktap's extension.
pub(super) const XEN_MAGIC: u32 = 0x5845_4efb;
/// Bytes of the header with the extension.
pub(super) const BYTES: usize = 64;
/// Flag of the extension: the file is sparse.
pub(super) const SPARSE: u32 = 1;
/// Flag of the extension: the L1 table is big-endian.
pub(super) const L1_BIG_ENDIAN: u32 = 2;
/// Largest L1 table.
pub(super) const L1_MAX_BYTES: u64 = 32 << 20;
/// Longest name of a backing file.
const BACKING_MAX_BYTES: u32 = 1023;
/// What is behind the name of the backing file.
pub(super) const TYPE_BYTES: usize = 16;
const TYPE_MAGIC: &[u8; 4] = b"FMT:";

/// The header as it lies in the file. The part behind 48 bytes is blktap's extension, or something else.
#[derive(Debug, Clone, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct RawHeader {
    pub magic: U32,
    pub version: U32,
    pub backing_offset: U64,
    pub backing_len: U32,
    pub modified: U32,
    pub size: U64,
    pub cluster_bits: u8,
    pub l2_bits: u8,
    pub padding: [u8; 2],
    pub crypt_method: U32,
    pub l1_offset: U64,
    pub xen_magic: U32,
    pub checksum: U32,
    pub cluster_alloc: U32,
    pub flags: U32,
}

/// What never changes while an image is open, and the arithmetic of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Geometry {
    /// Cluster size is `1 << cluster_bits`.
    pub cluster_bits: u32,
    /// An L2 table has `1 << l2_bits` entries.
    pub l2_bits: u32,
}

impl Geometry {
    /// Bytes of a cluster.
    pub fn cluster(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Bytes of an L2 table.
    pub fn l2_bytes(&self) -> u64 {
        8 << self.l2_bits
    }

    /// Bytes of the disk that an L2 table maps.
    pub fn l2_covers(&self) -> u64 {
        1 << (self.cluster_bits + self.l2_bits)
    }

    /// L1 entries for a disk of `size` bytes.
    pub fn l1_entries(&self, size: u64) -> u64 {
        size.div_ceil(self.l2_covers())
    }
}

/// A checked header.
#[derive(Debug, Clone)]
pub(super) struct Header {
    /// Constant properties.
    pub geometry: Geometry,
    /// Bytes of the disk: whole sectors.
    pub size: u64,
    /// Offset of the L1 table.
    pub l1: u64,
    /// Clusters are encrypted.
    pub aes: bool,
    /// Where the name of the backing file is, with its type.
    pub name: Range<u64>,
    /// Name of the backing file, and its type if somebody has written that down.
    pub backing: Option<(String, Option<String>)>,
    /// Blktap's extension: checksum, clusters allocated together, flags.
    pub extension: Option<(u32, u32, u32)>,
}

impl Header {
    /// The L1 table is little-endian.
    pub fn swapped(&self) -> bool {
        self.extension.is_some_and(|(_, _, flags)| flags & L1_BIG_ENDIAN == 0)
    }

    /// Reads and checks the header of a file.
    pub async fn read(file: &Rc<dyn ImageFile>) -> Result<Header, Error> {
        let name = file.name();
        let head = file.read(0, BYTES).await?;
        let raw = RawHeader::read_from_bytes(&head[..])
            .map_err(|_| Error::corrupt(name, "the header could not be read whole"))?;
        let mut header = parse(name, &raw, file.length())?;
        let (offset, len) = (raw.backing_offset.get(), raw.backing_len.get());
        if offset == 0 || len == 0 {
            return Ok(header);
        }
        let end = offset.checked_add(u64::from(len)).filter(|end| *end <= file.length());
        let Some(end) = end.filter(|_| len <= BACKING_MAX_BYTES && offset >= 48) else {
            let what = format!("the name of its backing file ({len} bytes at {offset}) is not in the file");
            return Err(Error::corrupt(name, what));
        };
        let bytes = file.read(offset, len as usize + TYPE_BYTES).await?;
        let (text, kind) = bytes.split_at(len as usize);
        let text = match std::str::from_utf8(text) {
            Ok(text) if !text.chars().any(char::is_control) => text.to_owned(),
            _ => {
                return Err(Error::unsupported(name, "the name of its backing file is not plain UTF-8 text"));
            }
        };
        let kind = kind.strip_prefix(TYPE_MAGIC).and_then(|kind| {
            let kind = std::str::from_utf8(kind).ok()?.trim_end_matches('\0');
            (!kind.is_empty() && !kind.chars().any(char::is_control)).then(|| kind.to_owned())
        });
        header.name = offset..end + if kind.is_some() { TYPE_BYTES as u64 } else { 0 };
        header.backing = Some((text, kind));
        Ok(header)
    }
}

fn parse(name: &str, raw: &RawHeader, length: u64) -> Result<Header, Error> {
    let corrupt = |what: String| Err(Error::corrupt(name, what));
    if raw.magic.get() != MAGIC {
        let message = format!("{name} is no qcow image: it does not begin with QFI\\xfb");
        return Err(Error::new(ErrorKind::WrongFormat, message));
    }
    if raw.version.get() != 1 {
        let what = format!("it is qcow version {}: write qcow2:{name} for versions 2 and 3", raw.version);
        return Err(Error::unsupported(name, what));
    }
    let aes = match raw.crypt_method.get() {
        0 => false,
        1 => true,
        other => {
            let what = format!("it uses the unknown encryption method {other}; 1 (AES) is known");
            return Err(Error::unsupported(name, what));
        }
    };
    let (cluster_bits, l2_bits) = (u32::from(raw.cluster_bits), u32::from(raw.l2_bits));
    if !(9..=16).contains(&cluster_bits) || !(6..=13).contains(&l2_bits) {
        let what = format!(
            "its cluster bits are {cluster_bits} and its L2 bits {l2_bits}; 9 to 16 and 6 to 13 are possible"
        );
        return corrupt(what);
    }
    let geometry = Geometry { cluster_bits, l2_bits };
    let size = raw.size.get() & !511;
    let l1_bytes = geometry.l1_entries(size) * 8;
    if size == 0 || l1_bytes > L1_MAX_BYTES {
        return corrupt(format!(
            "its disk has {} bytes; 512 to {} are possible",
            raw.size,
            L1_MAX_BYTES / 8 * geometry.l2_covers()
        ));
    }
    let l1 = raw.l1_offset.get();
    let end = l1.checked_add(l1_bytes).filter(|end| *end <= length.next_multiple_of(4096));
    if l1 < 48 || !l1.is_multiple_of(8) || end.is_none() {
        return corrupt(format!("its L1 table of {l1_bytes} bytes is at {l1}, where none can be"));
    }
    let has_extension = l1.is_multiple_of(4096) && raw.xen_magic.get() == XEN_MAGIC;
    let extension = has_extension.then(|| (raw.checksum.get(), raw.cluster_alloc.get(), raw.flags.get()));
    Ok(Header { geometry, size, l1, aes, name: 0..0, backing: None, extension })
}

/// The bytes behind the name of a backing file.
pub(super) fn type_field(format: &str) -> [u8; TYPE_BYTES] {
    let mut field = [0; TYPE_BYTES];
    field[..4].copy_from_slice(TYPE_MAGIC);
    let len = format.len().min(TYPE_BYTES - 4);
    field[4..4 + len].copy_from_slice(&format.as_bytes()[..len]);
    field
}

/// Blktap's checksum of an L1 table as it lies in the file.
pub(super) fn checksum(table: &[u8]) -> u32 {
    let mut sum = md5::Md5::new();
    sum.update(table);
    first_word(sum)
}

/// The checksum that a sum is noted as.
pub(super) fn first_word(sum: md5::Md5) -> u32 {
    let sum = sum.finalize();
    u32::from_le_bytes([sum[0], sum[1], sum[2], sum[3]])
}
