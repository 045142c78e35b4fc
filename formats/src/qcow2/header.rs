//! The header of a qcow2 file: what it says, checked, and what follows from it by arithmetic.
//!
//! Source: docs/interop/qcow2.txt of QEMU ("the specification" in this folder). All numbers are big-endian.
//!
//! | offset | bytes | field |
//! |---|---|---|
//! | 0 | 4 | magic `QFI\xfb` |
//! | 4 | 4 | version, 2 or 3 |
//! | 8 | 8 | offset of the backing file's name, 0 for none |
//! | 16 | 4 | its length, at most 1023 |
//! | 20 | 4 | cluster bits, 9 to 21 |
//! | 24 | 8 | size of the disk |
//! | 32 | 4 | encryption method |
//! | 36 | 4 | entries of the active L1 table |
//! | 40 | 8 | offset of the active L1 table |
//! | 48 | 8 | offset of the refcount table |
//! | 56 | 4 | its clusters |
//! | 60 | 4 | number of snapshots |
//! | 64 | 8 | offset of the snapshot table |
//! | 72, 80, 88 | 8 each | incompatible, compatible, autoclear features (version 3) |
//! | 96 | 4 | refcount order: an entry has `1 << order` bits |
//! | 100 | 4 | length of the header |
//! | 104 | 1 | compression type |
//!
//! Fields that change together lie in one sector: (size, L1) at 24, (refcount table) at 48, (snapshots) at 60, so that one write
//! switches from old to new whatever happens.

use std::rc::Rc;

use zerocopy::big_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::extensions::{self, Extensions};
use crate::codec::Method;
use crate::error::{Error, ErrorKind};
use crate::file::ImageFile;

/// First four bytes of every file.
pub(super) const MAGIC: u32 = 0x5146_49fb;
/// Bytes of a version 2 header.
pub(super) const V2_BYTES: usize = 72;
/// Shortest version 3 header.
const V3_MIN_BYTES: u32 = 104;
/// Bytes of the header that we know.
pub(super) const KNOWN_BYTES: usize = 112;
/// Longest name of a backing file.
const BACKING_MAX_BYTES: u32 = 1023;
/// Largest active L1 table, as QEMU limits it.
pub(super) const L1_MAX_BYTES: u64 = 32 << 20;
/// Largest refcount table, as QEMU limits it.
pub(super) const REFTABLE_MAX_BYTES: u64 = 8 << 20;
/// Most snapshots, as QEMU limits them.
pub(super) const SNAPSHOTS_MAX: u32 = 65536;
/// Largest disk. (The specification has none; tables within their limits reach further only with large clusters.)
pub(super) const DISK_MAX_BYTES: u64 = 1 << 60;

/// Refcounts may be wrong.
pub(super) const DIRTY: u64 = 1;
/// Metadata may be damaged.
pub(super) const CORRUPT: u64 = 1 << 1;
/// Guest data is in another file.
pub(super) const DATA_FILE: u64 = 1 << 2;
/// The compression type is not deflate.
pub(super) const COMPRESSION: u64 = 1 << 3;
/// L2 entries have 16 bytes, with subclusters.
pub(super) const EXTENDED_L2: u64 = 1 << 4;
const INCOMPATIBLE_KNOWN: u64 = DIRTY | CORRUPT | DATA_FILE | COMPRESSION | EXTENDED_L2;
/// Compatible: refcounts may be updated lazily. We never do.
pub(super) const LAZY_REFCOUNTS: u64 = 1;
/// Autoclear: the bitmaps extension is consistent.
pub(super) const BITMAPS: u64 = 1;
/// Autoclear: the data file is a raw image by itself.
pub(super) const DATA_FILE_RAW: u64 = 1 << 1;
/// Autoclear bits that we keep.
pub(super) const AUTOCLEAR_KNOWN: u64 = BITMAPS | DATA_FILE_RAW;

/// The header as it lies in the file. The part behind 72 bytes is absent in version 2.
#[derive(Debug, Clone, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct RawHeader {
    pub magic: U32,
    pub version: U32,
    pub backing_offset: U64,
    pub backing_len: U32,
    pub cluster_bits: U32,
    pub size: U64,
    pub crypt_method: U32,
    pub l1_entries: U32,
    pub l1_offset: U64,
    pub reftable_offset: U64,
    pub reftable_clusters: U32,
    pub snapshots: U32,
    pub snapshots_offset: U64,
    pub incompatible: U64,
    pub compatible: U64,
    pub autoclear: U64,
    pub refcount_order: U32,
    pub header_len: U32,
    pub compression_type: u8,
    pub padding: [u8; 7],
}

/// What never changes while an image is open, and the arithmetic of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Geometry {
    /// 2 or 3.
    pub version: u32,
    /// Cluster size is `1 << cluster_bits`.
    pub cluster_bits: u32,
    /// A refcount has `1 << refcount_order` bits.
    pub refcount_order: u32,
    /// L2 entries have 16 bytes.
    pub extended_l2: bool,
    /// Guest data is in another file.
    pub data_file: bool,
}

impl Geometry {
    /// Bytes of a cluster.
    pub fn cluster(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Bytes of an L2 entry.
    pub fn entry_bytes(&self) -> u64 {
        if self.extended_l2 { 16 } else { 8 }
    }

    /// Entries of an L2 table.
    pub fn l2_entries(&self) -> u64 {
        self.cluster() / self.entry_bytes()
    }

    /// Bytes of the disk that an L2 table maps.
    pub fn l2_covers(&self) -> u64 {
        self.l2_entries() * self.cluster()
    }

    /// Subclusters of a cluster; without extended entries the cluster is one.
    pub fn subclusters(&self) -> u32 {
        if self.extended_l2 { 32 } else { 1 }
    }

    /// A bit for each subcluster.
    pub fn all_subclusters(&self) -> u32 {
        if self.extended_l2 { u32::MAX } else { 1 }
    }

    /// Bytes of a subcluster: the unit in which ranges get places.
    pub fn granule(&self) -> u64 {
        self.cluster() / u64::from(self.subclusters())
    }

    /// Refcounts of a refcount block.
    pub fn block_entries(&self) -> u64 {
        (self.cluster() * 8) >> self.refcount_order
    }

    /// The largest refcount.
    pub fn refcount_max(&self) -> u64 {
        u64::MAX >> (64 - (1u32 << self.refcount_order))
    }

    /// L1 entries for a disk of `size` bytes.
    pub fn l1_entries_for(&self, size: u64) -> u64 {
        size.div_ceil(self.l2_covers())
    }

    /// `offset` rounded up to whole clusters.
    pub fn round_up(&self, offset: u64) -> u64 {
        offset.saturating_add(self.cluster() - 1) & !(self.cluster() - 1)
    }

    /// Number of clusters of `bytes` bytes.
    pub fn clusters_of(&self, bytes: u64) -> u64 {
        bytes.div_ceil(self.cluster())
    }

    /// `offset` is the start of a cluster.
    pub fn is_aligned(&self, offset: u64) -> bool {
        offset & (self.cluster() - 1) == 0
    }
}

/// A table of 8-byte entries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct TablePlace {
    /// Byte offset in the file.
    pub offset: u64,
    /// Entries.
    pub entries: u64,
}

/// How payload is encrypted: the encryption method of the header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum CryptMethod {
    /// 0: not at all.
    Plain,
    /// 1: AES-CBC.
    Aes,
    /// 2: LUKS.
    Luks,
}

/// Bytes of a LUKS header with its stripes, at most.
const LUKS_MAX_BYTES: u64 = 64 << 20;

/// A checked header with its extensions.
#[derive(Debug, Clone)]
pub(super) struct Header {
    /// Constant properties.
    pub geometry: Geometry,
    /// Bytes of the disk, as written.
    pub size: u64,
    /// Active L1 table.
    pub l1: TablePlace,
    /// Refcount table.
    pub reftable: TablePlace,
    /// Number of snapshots.
    pub snapshots: u32,
    /// Their table.
    pub snapshots_offset: u64,
    /// Incompatible features: all known.
    pub incompatible: u64,
    /// Compatible features.
    pub compatible: u64,
    /// Autoclear features, known or not.
    pub autoclear: u64,
    /// Name of the backing file, as written.
    pub backing: Option<String>,
    /// Header extensions.
    pub extensions: Extensions,
    /// How payload is encrypted.
    pub encryption: CryptMethod,
    /// How compressed clusters are encoded.
    pub compression: Method,
}

impl Header {
    /// Reads and checks header and extensions of a file.
    pub async fn read(file: &Rc<dyn ImageFile>) -> Result<Header, Error> {
        let head = file.read(0, KNOWN_BYTES).await?;
        let raw = RawHeader::read_from_bytes(&head)
            .map_err(|_| Error::corrupt(file.name(), "the header could not be read whole"))?;
        let geometry = geometry_of(file.name(), &raw)?;
        let first = file.read(0, geometry.cluster() as usize).await?;
        Header::parse(file.name(), &first, file.length())
    }

    /// Parses the first cluster of a file of `file_len` bytes.
    pub fn parse(name: &str, first: &[u8], file_len: u64) -> Result<Header, Error> {
        let Ok((raw, _)) = RawHeader::read_from_prefix(first) else {
            return Err(Error::new(
                ErrorKind::WrongFormat,
                format!("{name} is too short for a qcow2 header"),
            ));
        };
        let geometry = geometry_of(name, &raw)?;
        let v3 = geometry.version >= 3;
        let feature = |field: U64| if v3 { field.get() } else { 0 };
        let header_len = if v3 { raw.header_len.get() as usize } else { V2_BYTES };
        let backing = backing_name(name, &raw, first, header_len)?;
        let end = if backing.is_some() { raw.backing_offset.get() as usize } else { first.len() };
        let extensions = extensions::parse(name, first.get(header_len..end).unwrap_or_default())?;

        let incompatible = feature(raw.incompatible);
        let unknown = incompatible & !INCOMPATIBLE_KNOWN;
        if unknown != 0 {
            let names = extensions.feature_names(0, unknown);
            let what = format!("it uses features that this program does not know: {names}");
            return Err(Error::unsupported(name, what));
        }
        let compression_known = v3 && header_len > V3_MIN_BYTES as usize;
        let compression = match (compression_known, raw.compression_type) {
            (false, _) | (true, 0) => Method::Deflate,
            (true, 1) => Method::Zstd,
            (true, other) => {
                let what = format!("its compression type is {other}; 0 (zlib) and 1 (zstd) are known");
                return Err(Error::unsupported(name, what));
            }
        };
        if (compression != Method::Deflate) != (incompatible & COMPRESSION != 0) {
            let (what, bit) = (compression_name(compression), incompatible & COMPRESSION != 0);
            let what =
                format!("its compression type is {what}, and the feature bit for others than zlib is {bit}");
            return Err(Error::corrupt(name, what));
        }
        let encryption = match raw.crypt_method.get() {
            0 => CryptMethod::Plain,
            1 => CryptMethod::Aes,
            2 => CryptMethod::Luks,
            other => {
                let what = format!("its encryption method is {other}; 1 (AES) and 2 (LUKS) are known");
                return Err(Error::unsupported(name, what));
            }
        };
        let header = Header {
            geometry,
            encryption,
            size: raw.size.get(),
            l1: TablePlace { offset: raw.l1_offset.get(), entries: u64::from(raw.l1_entries.get()) },
            reftable: TablePlace {
                offset: raw.reftable_offset.get(),
                entries: u64::from(raw.reftable_clusters.get()) * geometry.cluster() / 8,
            },
            snapshots: raw.snapshots.get(),
            snapshots_offset: raw.snapshots_offset.get(),
            incompatible,
            compatible: feature(raw.compatible),
            autoclear: feature(raw.autoclear),
            backing,
            extensions,
            compression,
        };
        header.check(name, file_len)?;
        Ok(header)
    }

    /// Guest data in a data file that is a raw image by itself.
    pub fn data_file_raw(&self) -> bool {
        self.geometry.data_file && self.autoclear & DATA_FILE_RAW != 0
    }

    /// Where the LUKS header is, in bytes of the file; `None` without one.
    pub fn luks_area(&self) -> Option<std::ops::Range<u64>> {
        let place = self.extensions.luks.filter(|_| self.encryption == CryptMethod::Luks)?;
        Some(place.offset..place.offset + place.bytes)
    }

    /// Checks what the tables' places and sizes must keep.
    fn check(&self, name: &str, file_len: u64) -> Result<(), Error> {
        let geometry = &self.geometry;
        let corrupt = |what: String| Err(Error::corrupt(name, what));
        if self.size > DISK_MAX_BYTES {
            return corrupt(format!("its disk has {} bytes, more than any table maps", self.size));
        }
        let table = |what: &str, offset: u64, bytes: u64, bytes_max: u64| {
            if bytes > bytes_max {
                return corrupt(format!("its {what} has {bytes} bytes; at most {bytes_max} are sensible"));
            }
            if !geometry.is_aligned(offset) || (bytes > 0 && offset < geometry.cluster()) {
                return corrupt(format!("its {what} is at {offset}, where no cluster for it begins"));
            }
            if offset.checked_add(bytes).is_none_or(|end| end > geometry.round_up(file_len)) {
                return corrupt(format!(
                    "its {what} ({bytes} bytes at {offset}) lies behind the end of the file"
                ));
            }
            Ok(())
        };
        table("L1 table", self.l1.offset, self.l1.entries * 8, L1_MAX_BYTES)?;
        table("refcount table", self.reftable.offset, self.reftable.entries * 8, REFTABLE_MAX_BYTES)?;
        if self.reftable.entries == 0 {
            return corrupt("it has no refcount table".into());
        }
        if self.snapshots > SNAPSHOTS_MAX {
            return corrupt(format!(
                "it has {} snapshots; at most {SNAPSHOTS_MAX} are possible",
                self.snapshots
            ));
        }
        if self.snapshots > 0 {
            table("snapshot table", self.snapshots_offset, 40 * u64::from(self.snapshots), u64::MAX)?;
        }
        match (self.encryption, self.extensions.luks) {
            (CryptMethod::Luks, None) => {
                return corrupt("it is encrypted with LUKS and does not say where".into());
            }
            (CryptMethod::Luks, Some(place)) => {
                table("LUKS header", place.offset, place.bytes, LUKS_MAX_BYTES)?;
                if place.bytes < crate::crypt::luks1::HEADER_BYTES as u64 {
                    return corrupt(format!("its LUKS header has {} bytes", place.bytes));
                }
            }
            _ => {}
        }
        if self.encryption != CryptMethod::Plain && self.data_file_raw() {
            return corrupt("it is encrypted and says that its data file is a raw image".into());
        }
        if self.l1.entries < geometry.l1_entries_for(self.size) {
            return corrupt(format!(
                "its L1 table has {} entries, but a disk of {} bytes needs {}",
                self.l1.entries,
                self.size,
                geometry.l1_entries_for(self.size)
            ));
        }
        if self.data_file_raw() && self.backing.is_some() {
            return corrupt("it has a raw data file and a backing file, which exclude each other".into());
        }
        Ok(())
    }
}

/// QEMU's name of a compression type.
pub(super) fn compression_name(method: Method) -> &'static str {
    if method == Method::Zstd { "zstd" } else { "zlib" }
}

/// Checks what must be known before anything else is read.
fn geometry_of(name: &str, raw: &RawHeader) -> Result<Geometry, Error> {
    if raw.magic.get() != MAGIC {
        let message = format!("{name} is no qcow2 image: it does not begin with QFI\\xfb");
        return Err(Error::new(ErrorKind::WrongFormat, message));
    }
    let version = raw.version.get();
    if !(2..=3).contains(&version) {
        return Err(Error::unsupported(name, format!("it is qcow version {version}; 2 and 3 are known")));
    }
    let cluster_bits = raw.cluster_bits.get();
    if !(9..=21).contains(&cluster_bits) {
        return Err(Error::corrupt(
            name,
            format!("its cluster bits are {cluster_bits}; 9 to 21 are possible"),
        ));
    }
    let mut geometry =
        Geometry { version, cluster_bits, refcount_order: 4, extended_l2: false, data_file: false };
    if version >= 3 {
        let header_len = raw.header_len.get();
        if header_len < V3_MIN_BYTES || u64::from(header_len) > geometry.cluster() {
            let what =
                format!("its header has {header_len} bytes; at least 104 are needed, within a cluster");
            return Err(Error::corrupt(name, what));
        }
        geometry.refcount_order = raw.refcount_order.get();
        if geometry.refcount_order > 6 {
            let what = format!("its refcount order is {}; 0 to 6 are possible", geometry.refcount_order);
            return Err(Error::corrupt(name, what));
        }
        geometry.extended_l2 = raw.incompatible.get() & EXTENDED_L2 != 0;
        geometry.data_file = raw.incompatible.get() & DATA_FILE != 0;
        if geometry.extended_l2 && cluster_bits < 14 {
            let what =
                format!("it has subclusters in clusters of {} bytes; 16384 is the least", geometry.cluster());
            return Err(Error::corrupt(name, what));
        }
    }
    Ok(geometry)
}

/// The name of the backing file.
fn backing_name(
    name: &str,
    raw: &RawHeader,
    first: &[u8],
    header_len: usize,
) -> Result<Option<String>, Error> {
    let offset = raw.backing_offset.get();
    let len = raw.backing_len.get();
    if offset == 0 || len == 0 {
        return Ok(None);
    }
    let bytes = usize::try_from(offset)
        .ok()
        .filter(|start| len <= BACKING_MAX_BYTES && *start >= header_len)
        .and_then(|start| first.get(start..start.checked_add(len as usize)?));
    let Some(bytes) = bytes else {
        let what =
            format!("the name of its backing file ({len} bytes at {offset}) is not in the first cluster");
        return Err(Error::corrupt(name, what));
    };
    match std::str::from_utf8(bytes) {
        Ok(text) if !text.chars().any(char::is_control) => Ok(Some(text.to_owned())),
        _ => Err(Error::unsupported(name, "the name of its backing file is not plain UTF-8 text")),
    }
}
