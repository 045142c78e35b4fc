//! New images. The options are those of `qemu-img`, and two of ours:
//!
//! | option | values | what |
//! |---|---|---|
//! | `subformat` | `monolithicSparse`, `monolithicFlat`, `twoGbMaxExtentSparse`, `twoGbMaxExtentFlat`, `streamOptimized`, `vmfs`, `vmfsSparse` | the type of the disk; flat ones have no parent |
//! | `adapter_type` | `ide`, `buslogic`, `lsilogic`, `legacyESX` | for the machine that will use it |
//! | `hwversion`, `compat6` | number; `on`, `off` | version of the machine, 4 unless given; `compat6=on` is 6 |
//! | `toolsversion` | number | of the guest's tools |
//! | `zeroed_grain` | `on`, `off` | zeroes over a parent take no space (version 2); `off` unless given |
//! | `grain_size` | power of two, 4k to 2M (`vmfsSparse`: from 512) | 64k unless given (`vmfsSparse`: 512, as ESX) |
//! | `extent_size` | size up to 2G, a multiple of 2M | bytes of an extent of the `twoGb…` types |

use std::rc::Rc;

use zerocopy::IntoBytes;
use zerocopy::little_endian::{U16, U32, U64};

use super::descriptor::{self, EXTENTS_MAX, New};
use super::header::{
    COWD_HEADER_BYTES, COWD_MAGIC, COWD_TABLE_ENTRIES, CowdHeader, DIRECTORY_ENTRIES_MAX, FLAG_COMPRESSED,
    FLAG_MARKERS, FLAG_NEWLINES, FLAG_REDUNDANT, FLAG_ZEROED, GRAIN_BYTES_MAX, SECTOR, SECTORS_MAX,
    SparseHeader, TABLE_ENTRIES,
};
use crate::driver::{Create, Link, Space};
use crate::error::Error;
use crate::file::{Buf, ImageFile};
use crate::size::{format_size, parse_size};

/// Sectors of an embedded descriptor: from sector 1 on.
const DESCRIPTOR_SECTORS: u64 = 20;
/// Bytes of an extent of a split disk.
const SPLIT_BYTES: u64 = 2 << 30;
/// Extents of a split disk are a multiple of this, which is one of every grain.
const SPLIT_UNIT: u64 = GRAIN_BYTES_MAX;

/// What a type of disk is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Subformat {
    name: &'static str,
    /// What the descriptor calls its extents.
    kind: &'static str,
    /// The descriptor is inside the extent.
    single: bool,
    /// What the names of the extents' files have behind that of the image; with a number for a split disk.
    suffix: &'static str,
    split: bool,
    /// Options follow the name of a flat file.
    flat: bool,
}

const SUBFORMATS: &[Subformat] = &[
    Subformat {
        name: "monolithicSparse",
        kind: "SPARSE",
        single: true,
        suffix: "",
        split: false,
        flat: false,
    },
    Subformat {
        name: "monolithicFlat",
        kind: "FLAT",
        single: false,
        suffix: "-flat",
        split: false,
        flat: true,
    },
    Subformat {
        name: "twoGbMaxExtentSparse",
        kind: "SPARSE",
        single: false,
        suffix: "-s",
        split: true,
        flat: false,
    },
    Subformat {
        name: "twoGbMaxExtentFlat",
        kind: "FLAT",
        single: false,
        suffix: "-f",
        split: true,
        flat: true,
    },
    Subformat {
        name: "streamOptimized",
        kind: "SPARSE",
        single: true,
        suffix: "",
        split: false,
        flat: false,
    },
    Subformat { name: "vmfs", kind: "VMFS", single: false, suffix: "-flat", split: false, flat: true },
    Subformat {
        name: "vmfsSparse",
        kind: "VMFSSPARSE",
        single: false,
        suffix: "-delta",
        split: false,
        flat: false,
    },
];

/// Options, understood.
#[derive(Debug)]
struct Options {
    subformat: Subformat,
    adapter: String,
    hardware: String,
    tools: String,
    zeroed: bool,
    grain: u64,
    extent: u64,
    size: u64,
}

const KNOWN: &str =
    "subformat, adapter_type, hwversion, compat6, toolsversion, zeroed_grain, grain_size, extent_size";

impl Options {
    fn parse(create: &Create) -> Result<Options, Error> {
        let size = create.size.or(create.backing.as_ref().map(|(_, size)| *size));
        let size =
            size.ok_or_else(|| Error::invalid("a new image needs a size, or a parent to take it from"))?;
        let mut parsed = Options {
            subformat: SUBFORMATS[0],
            adapter: "ide".to_owned(),
            hardware: String::new(),
            tools: "2147483647".to_owned(),
            zeroed: false,
            grain: 0,
            extent: SPLIT_BYTES,
            size: size.checked_next_multiple_of(SECTOR).unwrap_or(u64::MAX),
        };
        let mut compat6 = false;
        for (key, value) in &create.options {
            let refuse = |expected: &str| Error::invalid(format!("option {key}={value}: {expected}"));
            let switch = || match value.as_str() {
                "on" | "yes" | "true" => Ok(true),
                "off" | "no" | "false" => Ok(false),
                _ => Err(refuse("on or off is expected")),
            };
            let size =
                || parse_size(value).map_err(|problem| Error::invalid(format!("option {key}: {problem}")));
            let is_number =
                !value.is_empty() && value.len() < 12 && value.bytes().all(|byte| byte.is_ascii_digit());
            match key.as_str() {
                "subformat" => {
                    let names: Vec<_> = SUBFORMATS.iter().map(|subformat| subformat.name).collect();
                    let known = SUBFORMATS.iter().find(|subformat| subformat.name == value);
                    parsed.subformat =
                        *known.ok_or_else(|| refuse(&format!("one of {} is expected", names.join(", "))))?;
                }
                "adapter_type" => {
                    if !["ide", "buslogic", "lsilogic", "legacyESX"].contains(&value.as_str()) {
                        return Err(refuse("one of ide, buslogic, lsilogic, legacyESX is expected"));
                    }
                    parsed.adapter.clone_from(value);
                }
                "hwversion" if is_number => parsed.hardware.clone_from(value),
                "toolsversion" if is_number => parsed.tools.clone_from(value),
                "hwversion" | "toolsversion" => return Err(refuse("a number is expected")),
                "compat6" => compat6 = switch()?,
                "zeroed_grain" => parsed.zeroed = switch()?,
                "grain_size" => parsed.grain = size()?,
                "extent_size" => {
                    parsed.extent = Some(size()?)
                        .filter(|size| *size > 0 && *size <= SPLIT_BYTES && size.is_multiple_of(SPLIT_UNIT))
                        .ok_or_else(|| refuse("a multiple of 2M up to 2G is expected"))?;
                }
                _ => return Err(Error::invalid(format!("vmdk has no option {key}: it has {KNOWN}"))),
            }
        }
        if compat6 && !parsed.hardware.is_empty() {
            return Err(Error::invalid(
                "options compat6 and hwversion say different things: give one of them",
            ));
        }
        if parsed.hardware.is_empty() {
            parsed.hardware = if compat6 { "6" } else { "4" }.to_owned();
        }
        parsed.check(create)?;
        Ok(parsed)
    }

    fn check(&mut self, create: &Create) -> Result<(), Error> {
        let name = self.subformat.name;
        if self.subformat.flat && (create.backing.is_some() || self.zeroed || self.grain != 0) {
            let what =
                format!("subformat={name} is flat: it has no parent, no zeroed_grain and no grain_size");
            return Err(Error::invalid(what));
        }
        if self.is_stream() && (create.backing.is_some() || self.zeroed) {
            return Err(Error::invalid("subformat=streamOptimized has no parent and no zeroed_grain"));
        }
        if self.is_cowd() && self.zeroed {
            return Err(Error::invalid("subformat=vmfsSparse has no zeroed_grain"));
        }
        let (least, default) = if self.is_cowd() { (SECTOR, SECTOR) } else { (4096, 64 << 10) };
        if self.grain == 0 {
            self.grain = default;
        }
        if !self.grain.is_power_of_two() || !(least..=GRAIN_BYTES_MAX).contains(&self.grain) {
            let what =
                format!("option grain_size={}: a power of two from {least} to 2M is expected", self.grain);
            return Err(Error::invalid(what));
        }
        let most = if self.subformat.split {
            self.extent * EXTENTS_MAX as u64
        } else {
            (SECTORS_MAX * SECTOR) - (4 << 30)
        };
        let flat_max = 1 << 62;
        let most = if self.subformat.flat && !self.subformat.split { flat_max } else { most };
        if self.size == 0 || self.size > most {
            let what = format!(
                "a size of {}: {name} has from 512 bytes to {}",
                format_size(self.size),
                format_size(most)
            );
            return Err(Error::invalid(what));
        }
        if !self.subformat.flat && self.tables(self.size) > DIRECTORY_ENTRIES_MAX {
            let what = format!(
                "a disk of {} in grains of {}: take a larger grain_size",
                format_size(self.size),
                self.grain
            );
            return Err(Error::invalid(what));
        }
        Ok(())
    }

    fn is_stream(&self) -> bool {
        self.subformat.name == "streamOptimized"
    }

    fn is_cowd(&self) -> bool {
        self.subformat.kind == "VMFSSPARSE"
    }

    /// Grain tables of an extent of `bytes` bytes.
    fn tables(&self, bytes: u64) -> u64 {
        let entries = if self.is_cowd() { COWD_TABLE_ENTRIES } else { TABLE_ENTRIES };
        bytes.div_ceil(self.grain * entries)
    }

    /// Bytes of the extents.
    fn extents(&self) -> Vec<u64> {
        let most = if self.subformat.split { self.extent } else { self.size };
        (0..self.size.div_ceil(most)).map(|number| most.min(self.size - number * most)).collect()
    }

    fn database(&self) -> Vec<(&'static str, String)> {
        let heads = if self.adapter == "ide" { 16 } else { 255 };
        vec![
            ("virtualHWVersion", self.hardware.clone()),
            ("geometry.cylinders", (self.size / (63 * heads * SECTOR)).to_string()),
            ("geometry.heads", heads.to_string()),
            ("geometry.sectors", "63".to_owned()),
            ("adapterType", self.adapter.clone()),
            ("toolsVersion", self.tools.clone()),
        ]
    }
}

/// See [`crate::driver::Format::data_files`].
pub(super) fn data_files(create: &Create, image: &str) -> Result<Vec<String>, Error> {
    let options = Options::parse(create)?;
    let Subformat { single, split, suffix, .. } = options.subformat;
    if single {
        return Ok(Vec::new());
    }
    let (stem, end) = image.rfind('.').map_or((image, ""), |at| image.split_at(at));
    let name = |number: usize| match split {
        true => format!("{stem}{suffix}{:03}{end}", number + 1),
        false => format!("{stem}{suffix}{end}"),
    };
    Ok((0..options.extents().len()).map(name).collect())
}

/// See [`crate::driver::Format::space`].
pub(super) fn space(create: &Create) -> Result<Space, Error> {
    let options = Options::parse(create)?;
    if options.subformat.flat {
        return Ok(Space { unit: SECTOR, unit_space: 0, overhead: options.size });
    }
    let tables = options.extents().into_iter().map(|bytes| {
        let layout = Layout::new(&options, bytes);
        if options.is_cowd() {
            layout.tables * COWD_TABLE_ENTRIES * 4 + layout.overhead
        } else {
            layout.overhead
        }
    });
    Ok(Space { unit: options.grain, unit_space: options.grain, overhead: tables.sum() })
}

/// Identity and path of a parent, as a descriptor names it.
///
/// # Errors
/// It is no VMDK, or has no identity.
pub(super) fn parent_of(link: &Link) -> Result<(u32, &str), Error> {
    let Some(path) = link.paths.first() else { return Err(Error::invalid("a parent without a path")) };
    let format = link.format.as_deref().unwrap_or("unknown");
    if format != "vmdk" {
        let message =
            format!("the parent {path} is of type {format}: a VMDK can name parents of type vmdk alone");
        return Err(Error::invalid(message));
    }
    let cid = super::cid_of(link.identity).filter(|cid| *cid != 0);
    let cid =
        cid.ok_or_else(|| Error::invalid(format!("the parent {path} has no identity (CID) to be known by")))?;
    Ok((cid, path))
}

/// The name of a file without its folders.
fn base_name(file: &Rc<dyn ImageFile>) -> &str {
    file.name().rsplit('/').next().unwrap_or_default()
}

/// Makes an image in empty files.
pub async fn create(
    file: Rc<dyn ImageFile>,
    data_files: Vec<Rc<dyn ImageFile>>,
    create: &Create,
) -> Result<(), Error> {
    let options = Options::parse(create)?;
    let parent = match &create.backing {
        Some((link, _)) => Some(parent_of(link)?),
        None => None,
    };
    let sizes = options.extents();
    let files = if options.subformat.single { vec![file.clone()] } else { data_files };
    if files.len() != sizes.len() {
        let what = format!("{} of them are needed, and {} were made", sizes.len(), files.len());
        return Err(Error::invalid(format!("{}: files of its extents: {what}", file.name())));
    }
    let mut lines = Vec::new();
    for (extent, bytes) in files.iter().zip(&sizes) {
        let name = base_name(extent);
        if name.contains(['"', '\n', '\r', '\0']) {
            return Err(Error::invalid(format!(
                "{name:?} cannot stand in a VMDK: quotes and ends of lines do not"
            )));
        }
        let offset = if options.subformat.kind == "FLAT" { " 0" } else { "" };
        lines.push(format!("RW {} {} \"{name}\"{offset}", bytes / SECTOR, options.subformat.kind));
    }
    let cid = super::image::new_cid(None);
    let (create_type, database) = (options.subformat.name, options.database());
    let text = descriptor::compose(&New { cid, parent, create_type, extents: &lines, database: &database })?;
    for (extent, bytes) in files.iter().zip(&sizes) {
        if extent.is_device() && !options.subformat.flat {
            return Err(Error::unsupported(
                extent.name(),
                "a sparse extent on a block device: it has no end to grow at",
            ));
        }
        match options.subformat.flat {
            true => extent.extend(*bytes).await?,
            false => write_extent(extent, &options, *bytes, parent.is_some()).await?,
        }
        extent.flush().await?;
    }
    let at = if options.subformat.single { SECTOR } else { 0 };
    if options.subformat.single && text.len() as u64 > DESCRIPTOR_SECTORS * SECTOR {
        return Err(Error::invalid(format!(
            "the path of the parent has {} bytes, which is too long",
            text.len()
        )));
    }
    file.write(at, Buf::copy_of(&text)).await?;
    file.flush().await
}

/// Where the structures of a new sparse extent are, in bytes.
struct Layout {
    tables: u64,
    directory_bytes: u64,
    redundant: u64,
    directory: u64,
    overhead: u64,
}

impl Layout {
    fn new(options: &Options, bytes: u64) -> Layout {
        let tables = options.tables(bytes);
        let directory_bytes = (tables * 4).next_multiple_of(SECTOR);
        if options.is_cowd() {
            let overhead = (COWD_HEADER_BYTES + directory_bytes).next_multiple_of(options.grain);
            return Layout { tables, directory_bytes, redundant: 0, directory: COWD_HEADER_BYTES, overhead };
        }
        // Tables begin at a multiple of 4 KiB, so that 4 KiB of them can be kept in memory as one piece.
        let before = if options.subformat.single { 1 + DESCRIPTOR_SECTORS } else { 1 };
        let redundant = (before * SECTOR).next_multiple_of(4096);
        let stored = directory_bytes + tables * TABLE_ENTRIES * 4;
        // Streams have no copy.
        let directory = if options.is_stream() { redundant } else { redundant + stored };
        let overhead = (directory + stored).next_multiple_of(options.grain.max(4096));
        Layout { tables, directory_bytes, redundant, directory, overhead }
    }
}

/// Makes an empty sparse extent.
async fn write_extent(
    file: &Rc<dyn ImageFile>,
    options: &Options,
    bytes: u64,
    child: bool,
) -> Result<(), Error> {
    let layout = Layout::new(options, bytes);
    let sectors = |bytes: u64| U64::new(bytes / SECTOR);
    file.extend(layout.overhead).await?;
    if options.is_cowd() {
        let geometry =
            if child { [0; 3] } else { [(bytes / (63 * 255 * SECTOR)).clamp(1, 65535) as u32, 255, 63] };
        let header = CowdHeader {
            magic: COWD_MAGIC,
            version: U32::new(1),
            flags: U32::new(3),
            capacity: U32::new((bytes / SECTOR) as u32),
            grain: U32::new((options.grain / SECTOR) as u32),
            directory: U32::new((layout.directory / SECTOR) as u32),
            directory_entries: U32::new(layout.tables as u32),
            free: U32::new((layout.overhead / SECTOR) as u32),
            geometry: geometry.map(U32::new),
        };
        return file.write(0, Buf::copy_of(header.as_bytes())).await;
    }
    let stream = options.is_stream();
    for directory in [layout.redundant, layout.directory].into_iter().skip(usize::from(stream)) {
        let first = (directory + layout.directory_bytes) / SECTOR;
        let entries: Vec<u8> = (0..layout.tables)
            .flat_map(|table| ((first + table * TABLE_ENTRIES * 4 / SECTOR) as u32).to_le_bytes())
            .collect();
        file.write(directory, Buf::copy_of(&entries)).await?;
    }
    let zeroed = if options.zeroed { FLAG_ZEROED } else { 0 };
    let single = options.subformat.single;
    let header = SparseHeader {
        version: U32::new(match (stream, options.zeroed) {
            (true, _) => 3,
            (false, zeroed) => 1 + u32::from(zeroed),
        }),
        flags: U32::new(
            FLAG_NEWLINES | zeroed | if stream { FLAG_COMPRESSED | FLAG_MARKERS } else { FLAG_REDUNDANT },
        ),
        // Until its last grain is there.
        unclean: u8::from(stream),
        compression: U16::new(u16::from(stream)),
        capacity: sectors(bytes),
        grain: sectors(options.grain),
        descriptor: U64::new(if single { 1 } else { 0 }),
        descriptor_len: U64::new(if single { DESCRIPTOR_SECTORS } else { 0 }),
        redundant: sectors(if stream { 0 } else { layout.redundant }),
        directory: sectors(layout.directory),
        overhead: sectors(layout.overhead),
        ..SparseHeader::new()
    };
    file.write(0, Buf::copy_of(header.as_bytes())).await
}
