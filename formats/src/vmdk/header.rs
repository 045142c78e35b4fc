//! Headers of sparse extents, and what they come to: the [`Shape`] of an extent.
//!
//! *Hosted* sparse extents (VMware Workstation, Fusion, QEMU, VirtualBox), 512 bytes, little-endian:
//!
//! | offset | bytes | field |
//! |---|---|---|
//! | 0 | 4 | magic `KDMV` |
//! | 4 | 4 | version: 1; 2 has grains that are zero; 3 is a stream, or has its changes tracked elsewhere |
//! | 8 | 4 | flags: 0 end-of-line test, 1 redundant tables, 2 zeroed grains, 16 compressed, 17 markers |
//! | 12 | 8 | capacity in sectors |
//! | 20 | 8 | sectors of a grain |
//! | 28, 36 | 8, 8 | descriptor: first sector (0: none), sectors |
//! | 44 | 4 | entries of a grain table: 512 |
//! | 48, 56 | 8, 8 | first sector of the redundant grain directory, of the grain directory |
//! | 64 | 8 | sectors before the first grain |
//! | 72 | 1 | not cleanly closed |
//! | 73 | 4 | `\n`, space, `\r`, `\n`: a transfer as text shows here |
//! | 77 | 2 | compression: 0 none, 1 deflate |
//!
//! *COWD* (ESX, `vmfsSparse`), 2048 bytes, little-endian:
//!
//! | offset | bytes | field |
//! |---|---|---|
//! | 0 | 4 | magic `COWD` |
//! | 4, 8 | 4, 4 | version 1, flags 3 |
//! | 12, 16 | 4, 4 | capacity, sectors of a grain |
//! | 20, 24 | 4, 4 | grain directory: first sector (4), entries |
//! | 28 | 4 | first sector that is free |
//! | 32 | 12 or 1024 | geometry of a disk without a parent; else the parent's name |
//! | 1648 | 4 | not cleanly closed |
//!
//! Source: VMware, "Virtual Disk Format 1.1" and "5.0", sections on hosted, ESX server and stream-optimized sparse extents.

use std::cell::Cell;
use std::rc::Rc;

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::error::Error;
use crate::file::ImageFile;

/// Bytes of a sector, the unit of all places and sizes of the format.
pub const SECTOR: u64 = 512;
/// First bytes of a hosted sparse extent.
pub const MAGIC: [u8; 4] = *b"KDMV";
/// First bytes of an ESX server sparse extent.
pub const COWD_MAGIC: [u8; 4] = *b"COWD";
/// Entries of a grain table of a hosted extent.
pub const TABLE_ENTRIES: u64 = 512;
/// Entries of a grain table of a COWD extent.
pub const COWD_TABLE_ENTRIES: u64 = 4096;
/// Bytes of a COWD header; the grain directory follows.
pub const COWD_HEADER_BYTES: u64 = 2048;
/// Where a COWD header says which sector is free.
pub const COWD_FREE_AT: u64 = 28;
/// A grain directory that is named by the footer at the end of a stream.
pub const DIRECTORY_AT_END: u64 = u64::MAX;
/// Largest grain, in bytes.
pub const GRAIN_BYTES_MAX: u64 = 2 << 20;
/// Most entries of a grain directory: 4 MiB of them in memory.
pub const DIRECTORY_ENTRIES_MAX: u64 = 1 << 20;
/// Most sectors of an extent's file: entries have 32 bits.
pub const SECTORS_MAX: u64 = u32::MAX as u64;

/// Flag: the end-of-line characters are there.
pub const FLAG_NEWLINES: u32 = 1;
/// Flag: there are redundant tables.
pub const FLAG_REDUNDANT: u32 = 2;
/// Flag: an entry of 1 is a grain that is zero.
pub const FLAG_ZEROED: u32 = 4;
/// Flag: grains are compressed.
pub const FLAG_COMPRESSED: u32 = 1 << 16;
/// Flag: grains and tables have markers.
pub const FLAG_MARKERS: u32 = 1 << 17;
const FLAGS_KNOWN: u32 = FLAG_NEWLINES | FLAG_REDUNDANT | FLAG_ZEROED | FLAG_COMPRESSED | FLAG_MARKERS;
/// What a header has at [`SparseHeader::newlines`].
pub const NEWLINES: [u8; 4] = *b"\n \r\n";

/// The header of a hosted sparse extent. See the module for the offsets.
#[derive(Debug, Clone, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
#[allow(missing_docs)] // the module's table is the documentation
pub struct SparseHeader {
    pub magic: [u8; 4],
    pub version: U32,
    pub flags: U32,
    pub capacity: U64,
    pub grain: U64,
    pub descriptor: U64,
    pub descriptor_len: U64,
    pub entries: U32,
    pub redundant: U64,
    pub directory: U64,
    pub overhead: U64,
    pub unclean: u8,
    pub newlines: [u8; 4],
    pub compression: U16,
    pub padding: [u8; 433],
}

/// The begin of the header of a COWD extent. See the module for the offsets.
#[derive(Debug, Clone, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
#[allow(missing_docs)] // the module's table is the documentation
pub struct CowdHeader {
    pub magic: [u8; 4],
    pub version: U32,
    pub flags: U32,
    pub capacity: U32,
    pub grain: U32,
    pub directory: U32,
    pub directory_entries: U32,
    pub free: U32,
    pub geometry: [U32; 3],
}

/// How an extent is laid out: what its header comes to, checked. Places are in bytes of the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shape {
    /// It is an ESX server sparse extent.
    pub cowd: bool,
    /// Grains are compressed, and nothing is ever changed.
    pub stream: bool,
    /// Grains have markers.
    pub markers: bool,
    /// Version in the header.
    pub version: u32,
    /// Bytes of the disk that it holds.
    pub capacity: Cell<u64>,
    /// Bytes of a grain.
    pub grain: u64,
    /// Entries of a grain table.
    pub entries: u64,
    /// The grain directory.
    pub directory: Cell<u64>,
    /// The redundant one.
    pub redundant: Cell<Option<u64>>,
    /// An entry of 1 means zeroes.
    pub zeroed: bool,
    /// The space of the embedded descriptor: where, and bytes; empty without one.
    pub descriptor: std::ops::Range<u64>,
    /// First byte of the first grain, at least behind the structures whose place the header names.
    pub overhead: u64,
    /// It was not closed cleanly.
    pub unclean: bool,
    /// A disk of its own says in a COWD header what its geometry is; a child does not.
    pub root: bool,
}

impl Shape {
    /// Entries of the grain directory.
    pub fn tables(&self) -> u64 {
        self.capacity.get().div_ceil(self.grain * self.entries)
    }

    /// Grains of the disk.
    pub fn grains(&self) -> u64 {
        self.capacity.get().div_ceil(self.grain)
    }

    /// Bytes of a grain table.
    pub fn table_bytes(&self) -> u64 {
        self.entries * 4
    }

    /// Bytes of a grain directory, in whole sectors.
    pub fn directory_bytes(&self) -> u64 {
        (self.tables() * 4).next_multiple_of(SECTOR)
    }

    /// Where the header notes that the extent is open.
    pub fn unclean_at(&self) -> u64 {
        if self.cowd { 1648 } else { 72 }
    }

    /// Reads the header of an extent's file, and for a stream the footer that counts instead.
    ///
    /// # Errors
    /// I/O; no sparse extent; damaged; something that is not supported.
    pub async fn read(file: &Rc<dyn ImageFile>) -> Result<Shape, Error> {
        let head = file.read(0, COWD_HEADER_BYTES as usize).await?;
        let shape = match head[..4] {
            ref magic if *magic == COWD_MAGIC => Shape::of_cowd(file.name(), &head)?,
            _ => {
                let header = Shape::parse_hosted(file.name(), &head[..SECTOR as usize])?;
                match header.directory.get() == DIRECTORY_AT_END {
                    true => Shape::of_hosted(file.name(), &read_footer(file).await?)?,
                    false => Shape::of_hosted(file.name(), &header)?,
                }
            }
        };
        shape.check(file.name(), file.length())?;
        Ok(shape)
    }

    /// The header in the first sector of a hosted extent.
    ///
    /// # Errors
    /// Another format; damaged.
    pub fn parse_hosted(name: &str, sector: &[u8]) -> Result<SparseHeader, Error> {
        let Some(header) = SparseHeader::read_from_bytes(sector).ok().filter(|header| header.magic == MAGIC)
        else {
            let message =
                format!("{name} is no sparse extent of a VMDK: it begins with neither KDMV nor COWD");
            return Err(Error::new(crate::error::ErrorKind::WrongFormat, message));
        };
        if header.flags.get() & FLAG_NEWLINES != 0 && header.newlines != NEWLINES {
            let what = "the end-of-line characters in its header have changed: it was transferred as text; copy it again";
            return Err(Error::corrupt(name, what));
        }
        Ok(header)
    }

    fn of_hosted(name: &str, header: &SparseHeader) -> Result<Shape, Error> {
        let (version, flags) = (header.version.get(), header.flags.get());
        if !(1..=3).contains(&version) {
            return Err(Error::unsupported(
                name,
                format!("version {version} of a sparse extent: 1 to 3 are known"),
            ));
        }
        if flags & !FLAGS_KNOWN != 0 {
            return Err(Error::unsupported(
                name,
                format!("flags {:#x} of a sparse extent", flags & !FLAGS_KNOWN),
            ));
        }
        if u64::from(header.entries.get()) != TABLE_ENTRIES {
            let what = format!("grain tables of {} entries: 512 are", header.entries);
            return Err(Error::unsupported(name, what));
        }
        let stream = match (header.compression.get(), flags & FLAG_COMPRESSED != 0) {
            (0, false) => false,
            (1, true) => true,
            (method, flag) => {
                let what = format!(
                    "compression method {method} with the flag for compressed grains at {flag}: none (0) or deflate (1) is"
                );
                return Err(Error::unsupported(name, what));
            }
        };
        let bytes = |sectors: U64, what: &str| {
            let bytes = sectors.get().checked_mul(SECTOR).filter(|bytes| *bytes < 1 << 47);
            bytes.ok_or_else(|| Error::corrupt(name, format!("its header says {sectors} sectors for {what}")))
        };
        let (descriptor, len) =
            (bytes(header.descriptor, "the descriptor")?, bytes(header.descriptor_len, "the descriptor")?);
        let redundant = match flags & FLAG_REDUNDANT != 0 && header.redundant.get() != 0 {
            true => Some(bytes(header.redundant, "the redundant grain directory")?),
            false => None,
        };
        Ok(Shape {
            cowd: false,
            stream,
            markers: flags & FLAG_MARKERS != 0,
            version,
            capacity: Cell::new(bytes(header.capacity, "its capacity")?),
            grain: bytes(header.grain, "a grain")?,
            entries: TABLE_ENTRIES,
            directory: Cell::new(bytes(header.directory, "the grain directory")?),
            redundant: Cell::new(redundant.filter(|_| !stream)),
            zeroed: flags & FLAG_ZEROED != 0,
            descriptor: if descriptor == 0 { 0..0 } else { descriptor..descriptor + len },
            overhead: bytes(header.overhead, "its overhead")?,
            unclean: header.unclean != 0,
            root: false,
        })
    }

    fn of_cowd(name: &str, head: &[u8]) -> Result<Shape, Error> {
        let Ok((header, _)) = CowdHeader::read_from_prefix(head) else {
            return Err(Error::corrupt(name, "its header is cut off"));
        };
        if header.version.get() != 1 {
            let what = format!("version {} of a COWD extent: 1 is known", header.version);
            return Err(Error::unsupported(name, what));
        }
        let shape = Shape {
            cowd: true,
            stream: false,
            markers: false,
            version: 1,
            capacity: Cell::new(u64::from(header.capacity.get()) * SECTOR),
            grain: u64::from(header.grain.get()) * SECTOR,
            entries: COWD_TABLE_ENTRIES,
            directory: Cell::new(u64::from(header.directory.get()) * SECTOR),
            redundant: Cell::new(None),
            zeroed: false,
            descriptor: 0..0,
            overhead: 0,
            unclean: head[1648..1652] != [0; 4],
            root: header.geometry.iter().all(|number| (1..1 << 20).contains(&number.get())),
        };
        if shape.grain > 0 && shape.tables() > u64::from(header.directory_entries.get()) {
            let what = format!(
                "its grain directory has {} entries, which is less than its {} bytes need",
                header.directory_entries,
                shape.capacity.get()
            );
            return Err(Error::corrupt(name, what));
        }
        Ok(shape)
    }

    /// What a file of `length` bytes must keep, whatever kind it is of; sets the overhead right.
    fn check(&self, name: &str, length: u64) -> Result<(), Error> {
        if !self.grain.is_power_of_two() || !(SECTOR..=GRAIN_BYTES_MAX).contains(&self.grain) {
            let what = format!("grains of {} bytes: powers of two from 512 to 2 MiB are", self.grain);
            return Err(Error::unsupported(name, what));
        }
        if self.capacity.get() == 0 || self.tables() > DIRECTORY_ENTRIES_MAX {
            let what = format!(
                "an extent of {} bytes in grains of {}: from 1 to {DIRECTORY_ENTRIES_MAX} grain tables are",
                self.capacity.get(),
                self.grain
            );
            return Err(Error::unsupported(name, what));
        }
        for (what, at) in [
            ("grain directory", Some(self.directory.get())),
            ("redundant grain directory", self.redundant.get()),
        ] {
            let Some(at) = at else { continue };
            if at < SECTOR || at.saturating_add(self.tables() * 4) > length {
                let what =
                    format!("the {what} is said to be at {at}, which is not in the file of {length} bytes");
                return Err(Error::corrupt(name, what));
            }
        }
        if !self.descriptor.is_empty() && (self.descriptor.start < SECTOR || self.descriptor.end > length) {
            let what =
                format!("its descriptor is said to be at {:?}, which is not in the file", self.descriptor);
            return Err(Error::corrupt(name, what));
        }
        if self.overhead > length.next_multiple_of(SECTOR) {
            let what =
                format!("it has {length} bytes, and {} of tables alone: it was cut off", self.overhead);
            return Err(Error::corrupt(name, what));
        }
        Ok(())
    }

    /// Bytes at the start of the file that no grain can be in.
    pub fn data_start(&self) -> u64 {
        let header = if self.cowd { COWD_HEADER_BYTES } else { SECTOR };
        header.max(self.overhead)
    }
}

/// The header that the end of a stream has, between its marker and the one that ends the stream.
async fn read_footer(file: &Rc<dyn ImageFile>) -> Result<SparseHeader, Error> {
    let name = file.name();
    let cut =
        |what: &str| Err(Error::corrupt(name, format!("{what}: the stream was cut off; copy it again")));
    let Some(at) = (file.length() / SECTOR * SECTOR).checked_sub(3 * SECTOR) else {
        return cut("it is too short for the footer that its header promises");
    };
    let bytes = file.read(at, 3 * SECTOR as usize).await?;
    let marker = |at: usize, kind: u8| bytes[at + 8..at + 16] == [0, 0, 0, 0, kind, 0, 0, 0];
    if !marker(0, 3) || !marker(2 * SECTOR as usize, 0) {
        return cut("it does not end with a footer and the end-of-stream marker");
    }
    let footer = Shape::parse_hosted(name, &bytes[SECTOR as usize..2 * SECTOR as usize])?;
    if footer.directory.get() == DIRECTORY_AT_END {
        return cut("its footer does not say where the grain directory is");
    }
    Ok(footer)
}

impl SparseHeader {
    /// The header of a new extent; what is not given is zero.
    pub fn new() -> SparseHeader {
        SparseHeader {
            magic: MAGIC,
            newlines: NEWLINES,
            entries: U32::new(TABLE_ENTRIES as u32),
            ..SparseHeader::new_zeroed()
        }
    }
}

impl Default for SparseHeader {
    fn default() -> SparseHeader {
        SparseHeader::new()
    }
}
