//! New images.
//!
//! ```text
//!  cluster 0   1 ..            ..              ..        ..
//!  header      refcount table  refcount blocks  L1 table  (LUKS header) (preallocated: L2 tables and data)
//! ```
//! The header is written last, behind a flush: until then the file is no image.

use std::rc::Rc;

use zerocopy::IntoBytes;
use zerocopy::big_endian::{U32, U64};

use super::driver::Qcow2Driver;
use super::extensions;
use super::header::{self, Geometry, KNOWN_BYTES, L1_MAX_BYTES, MAGIC, RawHeader, V2_BYTES};
use super::l2::Entry;
use super::refcount;
use crate::codec::Method;
use crate::crypt::options::{LuksOptions, passphrase};
use crate::driver::{Budget, Create, Open, Order, Space};
use crate::error::Error;
use crate::file::{Buf, ImageFile};
use crate::size::parse_size;

/// Memory for tables while space is preallocated.
const BUDGET_BYTES: usize = 4 << 20;
/// Border on which the data of a LUKS header would begin, as QEMU has it; here there is none behind it.
const LUKS_ALIGN: u64 = 4096;
/// Clusters that are preallocated at a time.
const PREALLOCATE_CLUSTERS: u64 = 256;
/// Smallest cluster with a table of the names of features.
const FEATURE_TABLE_FROM: u64 = 4096;

/// How much is allocated from the start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Preallocation {
    Off,
    Metadata,
    Full,
}

/// What the options say.
#[derive(Debug)]
struct Options {
    geometry: Geometry,
    lazy_refcounts: bool,
    data_file: Option<String>,
    data_file_raw: bool,
    compression: Method,
    preallocation: Preallocation,
    /// Encrypted so.
    luks: Option<LuksOptions>,
}

const KNOWN: &str = "cluster_size, compat, compression_type, data_file, data_file_raw, encrypt.format, extended_l2, lazy_refcounts, \
                     preallocation, refcount_bits";

fn parse_options(create: &Create) -> Result<Options, Error> {
    let mut geometry =
        Geometry { version: 3, cluster_bits: 16, refcount_order: 4, extended_l2: false, data_file: false };
    let mut options = Options {
        geometry,
        lazy_refcounts: false,
        data_file: None,
        data_file_raw: false,
        compression: Method::Deflate,
        preallocation: Preallocation::Off,
        luks: None,
    };
    let (mut luks, mut refines_luks) = (LuksOptions::default(), None);
    for (name, value) in &create.options {
        let bad = |expected: &str| Error::invalid(format!("option {name} is {value:?}: expected {expected}"));
        let switch = || match value.as_str() {
            "on" | "yes" | "true" => Ok(true),
            "off" | "no" | "false" => Ok(false),
            _ => Err(bad("on or off")),
        };
        match name.as_str() {
            "cluster_size" => {
                let bytes = parse_size(value)
                    .ok()
                    .filter(|bytes| bytes.is_power_of_two() && (512..=2 << 20).contains(bytes));
                geometry.cluster_bits =
                    bytes.ok_or_else(|| bad("a power of two from 512 to 2M"))?.trailing_zeros();
            }
            "compat" => {
                geometry.version = match value.as_str() {
                    "0.10" | "v2" => 2,
                    "1.1" | "v3" => 3,
                    _ => return Err(bad("0.10 or 1.1")),
                }
            }
            "compression_type" => {
                options.compression = match value.as_str() {
                    "zlib" => Method::Deflate,
                    "zstd" => Method::Zstd,
                    _ => return Err(bad("zlib or zstd")),
                }
            }
            "refcount_bits" => {
                let bits = value.parse::<u32>().ok().filter(|bits| bits.is_power_of_two() && *bits <= 64);
                geometry.refcount_order =
                    bits.ok_or_else(|| bad("1, 2, 4, 8, 16, 32 or 64"))?.trailing_zeros();
            }
            "extended_l2" => geometry.extended_l2 = switch()?,
            "lazy_refcounts" => options.lazy_refcounts = switch()?,
            "data_file" if value.is_empty() => return Err(bad("a path")),
            "data_file" => options.data_file = Some(value.clone()),
            "data_file_raw" => options.data_file_raw = switch()?,
            "preallocation" => {
                options.preallocation = match value.as_str() {
                    "off" => Preallocation::Off,
                    "metadata" => Preallocation::Metadata,
                    // Both make sure of the space by writing it.
                    "falloc" | "full" => Preallocation::Full,
                    _ => return Err(bad("off, metadata, falloc or full")),
                }
            }
            "encrypt.format" => match value.as_str() {
                "luks" => options.luks = Some(LuksOptions::default()),
                "aes" => {
                    let message = "encrypt.format=aes protects little, so no such images are made: take encrypt.format=luks";
                    return Err(Error::invalid(message));
                }
                _ => return Err(bad("luks")),
            },
            encryption if encryption.strip_prefix("encrypt.").is_some() => {
                let option = encryption.strip_prefix("encrypt.").unwrap_or_default();
                if !luks.take(option, value)? {
                    let known = crate::crypt::options::KNOWN;
                    return Err(Error::invalid(format!(
                        "there is no option {name}: behind encrypt. there are format, {known}"
                    )));
                }
                refines_luks = Some(name);
            }
            _ => return Err(Error::invalid(format!("a qcow2 image has no option {name}: it has {KNOWN}"))),
        }
    }
    match (&mut options.luks, refines_luks) {
        (Some(chosen), _) => *chosen = luks,
        (None, Some(name)) => return Err(Error::invalid(format!("{name} needs encrypt.format=luks"))),
        (None, None) => {}
    }
    geometry.data_file = options.data_file.is_some();
    options.geometry = geometry;
    options.check(create)?;
    if options.data_file_raw && options.preallocation == Preallocation::Off {
        // Without a mapping the data file and the disk would differ.
        options.preallocation = Preallocation::Metadata;
    }
    Ok(options)
}

impl Options {
    /// Bytes of the LUKS header.
    fn luks_bytes(&self) -> Result<u64, Error> {
        self.luks.as_ref().map_or(Ok(0), |luks| Ok(luks.layout(LUKS_ALIGN)?.area_bytes()))
    }

    fn check(&self, create: &Create) -> Result<(), Error> {
        let geometry = &self.geometry;
        let refuse = |message: &str| Err(Error::invalid(message));
        if geometry.version < 3
            && (geometry.extended_l2
                || self.lazy_refcounts
                || geometry.data_file
                || self.compression != Method::Deflate
                || geometry.refcount_order != 4)
        {
            return refuse(
                "compat=0.10 has refcounts of 16 bits, zlib, and no lazy_refcounts, extended_l2 or data_file: use compat=1.1",
            );
        }
        if geometry.extended_l2 && geometry.cluster_bits < 14 {
            return refuse("extended_l2 needs a cluster_size of at least 16k");
        }
        if self.data_file_raw && !geometry.data_file {
            return refuse("data_file_raw needs data_file");
        }
        if self.data_file_raw && create.backing.is_some() {
            return refuse(
                "data_file_raw excludes a backing file: the data file could not be read by itself",
            );
        }
        if self.luks.is_some() && geometry.data_file {
            return refuse("encrypt.format excludes data_file: encrypt the image's own clusters");
        }
        if self.luks.is_some() && geometry.version < 3 && self.preallocation != Preallocation::Off {
            return refuse(
                "an encrypted image can be preallocated with compat=1.1 only: 0.10 has no zero clusters",
            );
        }
        if self.preallocation != Preallocation::Off && create.backing.is_some() {
            return refuse("preallocation excludes a backing file: its bytes would be hidden");
        }
        Ok(())
    }

    /// Header, extensions and backing name: the first cluster.
    fn first_cluster(&self, create: &Create, layout: &Layout) -> Result<Vec<u8>, Error> {
        let geometry = &self.geometry;
        let v3 = geometry.version >= 3;
        let mut tail = Vec::new();
        let mut backing = None;
        if let Some((link, _)) = &create.backing {
            let (Some(path), Some(format)) = (link.paths.first(), &link.format) else {
                return Err(Error::invalid("a backing file needs a path and a format"));
            };
            if path.len() > 1023 || path.is_empty() {
                return Err(Error::invalid(format!(
                    "the path of the backing file has {} bytes: 1 to 1023 fit",
                    path.len()
                )));
            }
            super::plain_path("the new image", "backing file", path)?;
            let format = extensions::names_in_image(format);
            extensions::append(&mut tail, extensions::BACKING_FORMAT, format.as_bytes());
            backing = Some(path.as_bytes());
        }
        if let Some(path) = &self.data_file {
            super::plain_path("the new image", "data file", path)?;
            extensions::append(&mut tail, extensions::DATA_FILE, path.as_bytes());
        }
        if layout.luks_bytes > 0 {
            let offset = layout.luks << geometry.cluster_bits;
            let place = [offset.to_be_bytes(), layout.luks_bytes.to_be_bytes()].concat();
            extensions::append(&mut tail, extensions::LUKS, &place);
        }
        if v3 && geometry.cluster() >= FEATURE_TABLE_FROM {
            extensions::append(&mut tail, extensions::FEATURE_NAMES, &extensions::feature_table());
        }
        extensions::append(&mut tail, extensions::END, &[]);
        let header_len = if v3 { KNOWN_BYTES } else { V2_BYTES };
        let backing_offset = header_len + tail.len();
        tail.extend_from_slice(backing.unwrap_or_default());
        let flag = |set: bool, bit: u64| if set { bit } else { 0 };
        let raw = RawHeader {
            magic: U32::new(MAGIC),
            version: U32::new(geometry.version),
            backing_offset: U64::new(if backing.is_some() { backing_offset as u64 } else { 0 }),
            backing_len: U32::new(backing.map_or(0, <[u8]>::len) as u32),
            cluster_bits: U32::new(geometry.cluster_bits),
            size: U64::new(layout.size),
            crypt_method: U32::new(if layout.luks_bytes > 0 { 2 } else { 0 }),
            l1_entries: U32::new(layout.l1_entries as u32),
            l1_offset: U64::new(layout.l1 << geometry.cluster_bits),
            reftable_offset: U64::new(geometry.cluster()),
            reftable_clusters: U32::new(layout.table as u32),
            snapshots: U32::new(0),
            snapshots_offset: U64::new(0),
            incompatible: U64::new(
                flag(geometry.data_file, header::DATA_FILE)
                    | flag(geometry.extended_l2, header::EXTENDED_L2)
                    | flag(self.compression != Method::Deflate, header::COMPRESSION),
            ),
            compatible: U64::new(flag(self.lazy_refcounts, header::LAZY_REFCOUNTS)),
            autoclear: U64::new(flag(self.data_file_raw, header::DATA_FILE_RAW)),
            refcount_order: U32::new(geometry.refcount_order),
            header_len: U32::new(KNOWN_BYTES as u32),
            compression_type: u8::from(self.compression == Method::Zstd),
            padding: [0; 7],
        };
        let mut first = raw.as_bytes()[..header_len].to_vec();
        first.append(&mut tail);
        if first.len() as u64 > geometry.cluster() {
            let message = format!(
                "header and names need {} bytes: take a larger cluster_size or shorter paths",
                first.len()
            );
            return Err(Error::invalid(message));
        }
        first.resize(geometry.cluster() as usize, 0);
        Ok(first)
    }
}

/// Where the tables of a new image are, in clusters.
#[derive(Debug)]
struct Layout {
    size: u64,
    l1_entries: u64,
    /// Clusters of the refcount table.
    table: u64,
    /// Refcount blocks.
    blocks: u64,
    /// First cluster of the L1 table.
    l1: u64,
    /// First cluster of the LUKS header.
    luks: u64,
    /// Its bytes; 0 for none.
    luks_bytes: u64,
    /// First cluster behind everything.
    end: u64,
}

impl Layout {
    fn new(geometry: &Geometry, size: u64, luks_bytes: u64) -> Result<Layout, Error> {
        let l1_entries = geometry.l1_entries_for(size);
        if l1_entries * 8 > L1_MAX_BYTES {
            let most = L1_MAX_BYTES / 8 * geometry.l2_covers();
            let message =
                format!("a disk of {size} bytes is too large for this cluster_size, which reaches {most}");
            return Err(Error::invalid(message));
        }
        let l1_clusters = geometry.clusters_of(l1_entries * 8).max(1);
        let (mut table, mut blocks) = (1, 1);
        loop {
            let luks = 1 + table + blocks + l1_clusters;
            let end = luks + geometry.clusters_of(luks_bytes);
            let needed = end.div_ceil(geometry.block_entries());
            let needed_table = geometry.clusters_of(needed * 8);
            if needed <= blocks && needed_table <= table {
                return Ok(Layout {
                    size,
                    l1_entries,
                    table,
                    blocks,
                    l1: 1 + table + blocks,
                    luks,
                    luks_bytes,
                    end,
                });
            }
            (table, blocks) = (needed_table.max(table), needed.max(blocks));
        }
    }

    async fn write_tables(&self, geometry: &Geometry, file: &Rc<dyn ImageFile>) -> Result<(), Error> {
        let cluster = geometry.cluster() as usize;
        let mut table = Buf::zeroed(self.table as usize * cluster);
        for index in 0..self.blocks {
            let number = 1 + self.table + index;
            let offset = number << geometry.cluster_bits;
            table[index as usize * 8..][..8].copy_from_slice(&offset.to_be_bytes());
            let mut block = Buf::zeroed(cluster);
            let first = index * geometry.block_entries();
            for counted in first..self.end.min(first + geometry.block_entries()) {
                refcount::set(&mut block, geometry.refcount_order, (counted - first) as usize, 1);
            }
            file.write(offset, block).await?;
        }
        file.write(geometry.cluster(), table).await?;
        // The L1 table: zeroes, written in pieces.
        let mut at = self.l1 << geometry.cluster_bits;
        let end = self.luks << geometry.cluster_bits;
        while at < end {
            let len = (end - at).min(1 << 20);
            file.write(at, Buf::zeroed(len as usize)).await?;
            at += len;
        }
        Ok(())
    }
}

/// See [`crate::driver::Format::data_files`].
pub(super) fn data_files(create: &Create) -> Result<Vec<String>, Error> {
    Ok(parse_options(create)?.data_file.into_iter().collect())
}

/// See [`crate::driver::Format::space`]: with the tables of a disk that has a place for every cluster, as `qemu-img measure` counts.
pub(super) fn space(create: &Create) -> Result<Space, Error> {
    let options = parse_options(create)?;
    let geometry = options.geometry;
    let size = create.size.ok_or_else(|| Error::invalid("an image needs a size to be measured"))?;
    let cluster = geometry.cluster();
    let layout = Layout::new(&geometry, size, options.luks_bytes()?)?;
    let data = if geometry.data_file { 0 } else { size.div_ceil(cluster) };
    let tables = size.div_ceil(geometry.l2_covers());
    // Header, L1 table, L2 tables, and refcounts of all that and of themselves.
    let fixed =
        1 + geometry.clusters_of(layout.l1_entries * 8) + tables + geometry.clusters_of(layout.luks_bytes);
    let (mut blocks, mut table) = (1, 1);
    loop {
        let needed = (fixed + data + blocks + table).div_ceil(geometry.block_entries());
        let needed_table = geometry.clusters_of(needed * 8);
        if needed <= blocks && needed_table <= table {
            break;
        }
        (blocks, table) = (needed.max(blocks), needed_table.max(table));
    }
    let unit_space = if geometry.data_file { 0 } else { cluster };
    Ok(Space { unit: cluster, unit_space, overhead: (fixed + blocks + table) * cluster })
}

/// See [`crate::driver::Format::create`].
pub(super) async fn create(
    file: Rc<dyn ImageFile>,
    data_files: Vec<Rc<dyn ImageFile>>,
    create: &Create,
) -> Result<(), Error> {
    let options = parse_options(create)?;
    let Some(size) = create.size.or(create.backing.as_ref().map(|(_, size)| *size)) else {
        return Err(Error::invalid("a qcow2 image needs a size, or a backing file to take it from"));
    };
    if !size.is_multiple_of(512) {
        return Err(Error::invalid(format!("a size of {size} bytes: take a multiple of 512")));
    }
    let geometry = options.geometry;
    let layout = Layout::new(&geometry, size, options.luks_bytes()?)?;
    let first = options.first_cluster(create, &layout)?;
    let luks = match &options.luks {
        Some(luks) => Some(luks.measured(LUKS_ALIGN)?.make(passphrase(create.key.as_ref())?)?),
        None => None,
    };
    if geometry.data_file && data_files.is_empty() {
        return Err(Error::invalid("option data_file: the data file was not given"));
    }
    file.extend(layout.end << geometry.cluster_bits).await?;
    layout.write_tables(&geometry, &file).await?;
    let key = match luks {
        Some((header, key)) => {
            file.write(layout.luks << geometry.cluster_bits, Buf::copy_of(&header)).await?;
            Some(key)
        }
        None => None,
    };
    if options.data_file_raw
        && let Some(data) = data_files.first()
    {
        data.extend(size).await?;
        data.flush().await?;
    }
    file.flush().await?;
    file.write(0, Buf::copy_of(&first)).await?;
    file.flush().await?;
    if options.preallocation == Preallocation::Off || size == 0 {
        return Ok(());
    }
    let files = std::iter::once(file).chain(data_files).collect();
    let open = Open {
        files,
        writable: true,
        below_size: None,
        budget: Budget::new(BUDGET_BYTES),
        log: None,
        snapshot: None,
        key,
    };
    let driver = super::driver::open(open).await?;
    let filled = preallocate(&driver, options.preallocation).await;
    let closed = driver.shut().await;
    filled.and(closed)
}

/// Gives every cluster of the disk its place.
async fn preallocate(driver: &Qcow2Driver, how: Preallocation) -> Result<(), Error> {
    let image = driver.image();
    let geometry = &image.geometry;
    let clusters = geometry.clusters_of(image.size.get());
    let mut done = 0;
    while done < clusters {
        let wanted = (clusters - done).min(PREALLOCATE_CLUSTERS);
        let places = match geometry.data_file {
            true => std::iter::once(done..done + wanted).collect(),
            false => image.allocate(wanted).await?,
        };
        for range in places {
            if how == Preallocation::Full {
                let bytes = (range.end - range.start) << geometry.cluster_bits;
                image
                    .payload()
                    .1
                    .write(range.start << geometry.cluster_bits, Buf::zeroed(bytes as usize))
                    .await?;
            }
            for cluster in range {
                let guest = done << geometry.cluster_bits;
                let table = image.own_table(guest).await?;
                let host = Some(cluster << geometry.cluster_bits);
                let all = geometry.all_subclusters();
                // What is in the place reads as zero only if nobody decrypts it.
                let (data, zero) = if image.cipher.is_some() { (0, all) } else { (all, 0) };
                let entry = Entry { host, copied: true, data, zero, compressed: None };
                image.change_l2_entry(table, guest, Order::Anytime, |_| Some(entry)).await?;
                done += 1;
            }
        }
        image.maps.write_back().await?;
    }
    if let (true, Some(data)) = (geometry.data_file, &image.data) {
        data.extend(image.size.get()).await?;
    }
    Ok(())
}
