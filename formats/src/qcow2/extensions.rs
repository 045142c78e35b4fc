//! Header extensions: a list of (type, length, data) behind the header, each padded to eight bytes.
//!
//! | type | meaning |
//! |---|---|
//! | 0 | end of the list |
//! | 0xe2792aca | format of the backing file |
//! | 0x6803f857 | names of features, 48 bytes each: kind, bit, name |
//! | 0x23852875 | bitmaps: count, reserved, size and offset of their directory |
//! | 0x44415441 | name of the external data file |
//! | 0x0537be77 | LUKS header: its offset and length |
//!
//! Others are allowed by the specification to be ignored; we never rewrite the list, so they stay.

use crate::error::Error;

/// End of the list.
pub(super) const END: u32 = 0;
/// Format of the backing file.
pub(super) const BACKING_FORMAT: u32 = 0xe279_2aca;
/// Names of features.
pub(super) const FEATURE_NAMES: u32 = 0x6803_f857;
/// Persistent bitmaps.
pub(super) const BITMAPS: u32 = 0x2385_2875;
/// Name of the external data file.
pub(super) const DATA_FILE: u32 = 0x4441_5441;
/// Full disk encryption header.
pub(super) const LUKS: u32 = 0x0537_be77;
/// Bytes of an entry of the feature name table.
const FEATURE_BYTES: usize = 48;
/// Most extensions that are read.
const COUNT_MAX: usize = 1024;

/// Features by name, for the table that `create` writes and for messages: kind (0 incompatible, 1 compatible, 2 autoclear), bit.
pub(super) const KNOWN_FEATURES: &[(u8, u8, &str)] = &[
    (0, 0, "dirty bit"),
    (0, 1, "corrupt bit"),
    (0, 2, "external data file"),
    (0, 3, "compression type"),
    (0, 4, "extended L2 entries"),
    (1, 0, "lazy refcounts"),
    (2, 0, "bitmaps"),
    (2, 1, "raw external data"),
];

/// Where the bitmaps are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct BitmapsPlace {
    /// Number of bitmaps.
    pub count: u32,
    /// Bytes of the directory.
    pub directory_bytes: u64,
    /// Byte offset of the directory.
    pub directory_offset: u64,
}

/// Where the LUKS header is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct LuksPlace {
    /// Byte offset.
    pub offset: u64,
    /// Bytes, with the stripes.
    pub bytes: u64,
}

/// What the extensions say.
#[derive(Debug, Clone, Default)]
pub(super) struct Extensions {
    /// Format of the backing file.
    pub backing_format: Option<String>,
    /// Name of the external data file.
    pub data_file: Option<String>,
    /// Bitmaps.
    pub bitmaps: Option<BitmapsPlace>,
    /// LUKS header.
    pub luks: Option<LuksPlace>,
    /// Feature name table: kind, bit, name.
    features: Vec<(u8, u8, String)>,
}

impl Extensions {
    /// Names the bits of `bits`, for a message.
    pub fn feature_names(&self, kind: u8, bits: u64) -> String {
        let name = |bit: u8| match self.features.iter().find(|feature| (feature.0, feature.1) == (kind, bit))
        {
            Some((_, _, name)) => format!("{name:?} (bit {bit})"),
            None => format!("bit {bit}"),
        };
        let names: Vec<String> = (0..64).filter(|bit| bits >> bit & 1 == 1).map(name).collect();
        names.join(", ")
    }
}

fn be32(bytes: &[u8]) -> Option<u32> {
    Some(u32::from_be_bytes(bytes.get(..4)?.try_into().ok()?))
}

fn be64(bytes: &[u8]) -> Option<u64> {
    Some(u64::from_be_bytes(bytes.get(..8)?.try_into().ok()?))
}

/// Parses the area between the header and the backing file's name (or the end of the first cluster).
pub(super) fn parse(name: &str, mut area: &[u8]) -> Result<Extensions, Error> {
    let mut found = Extensions::default();
    for _ in 0..COUNT_MAX {
        let (Some(kind), Some(len)) = (be32(area), area.get(4..).and_then(be32)) else { return Ok(found) };
        if kind == END {
            return Ok(found);
        }
        let Some(data) = area.get(8..).and_then(|rest| rest.get(..len as usize)) else {
            let what = format!(
                "a header extension (type {kind:#x}) has {len} bytes, more than the header has room for"
            );
            return Err(Error::corrupt(name, what));
        };
        let text = |what: &str| match std::str::from_utf8(data) {
            Ok(text) if !text.chars().any(char::is_control) => Ok(Some(text.to_owned())),
            _ => Err(Error::corrupt(name, format!("the {what} in its header is not plain text"))),
        };
        match kind {
            BACKING_FORMAT => found.backing_format = text("format of the backing file")?,
            DATA_FILE => found.data_file = text("name of the data file")?,
            FEATURE_NAMES => found.features = data.chunks_exact(FEATURE_BYTES).map(feature).collect(),
            BITMAPS => found.bitmaps = Some(bitmaps(name, data)?),
            LUKS => {
                let place = be64(data).zip(data.get(8..).and_then(be64));
                let wrong =
                    || Error::corrupt(name, format!("its LUKS extension has {len} bytes instead of 16"));
                let (offset, bytes) = place.ok_or_else(wrong)?;
                found.luks = Some(LuksPlace { offset, bytes });
            }
            _ => {}
        }
        area = area.get(8 + (len as usize).next_multiple_of(8)..).unwrap_or_default();
    }
    Err(Error::corrupt(name, format!("its header has more than {COUNT_MAX} extensions")))
}

fn feature(entry: &[u8]) -> (u8, u8, String) {
    let name: Vec<u8> = entry[2..].iter().copied().take_while(|byte| *byte != 0).collect();
    let name = String::from_utf8_lossy(&name).replace(char::is_control, "?");
    (entry[0], entry[1], name)
}

fn bitmaps(name: &str, data: &[u8]) -> Result<BitmapsPlace, Error> {
    let place = (|| {
        let (count, directory_bytes, directory_offset) =
            (be32(data)?, be64(data.get(8..)?)?, be64(data.get(16..)?)?);
        Some(BitmapsPlace { count, directory_bytes, directory_offset })
    })();
    place.ok_or_else(|| {
        Error::corrupt(name, format!("its bitmaps extension has {} bytes instead of 24", data.len()))
    })
}

/// Appends an extension with its padding.
pub(super) fn append(out: &mut Vec<u8>, kind: u32, data: &[u8]) {
    out.extend_from_slice(&kind.to_be_bytes());
    out.extend_from_slice(&(data.len() as u32).to_be_bytes());
    out.extend_from_slice(data);
    out.resize(out.len().next_multiple_of(8), 0);
}

/// The feature name table that we write.
pub(super) fn feature_table() -> Vec<u8> {
    let mut table = Vec::new();
    for (kind, bit, name) in KNOWN_FEATURES {
        table.extend_from_slice(&[*kind, *bit]);
        let mut field = [0u8; FEATURE_BYTES - 2];
        field[..name.len()].copy_from_slice(name.as_bytes());
        table.extend_from_slice(&field);
    }
    table
}

/// QEMU's name of a format, which is what stands in images.
pub(super) fn names_in_image(format: &str) -> &str {
    if format == "vhd" { "vpc" } else { format }
}

/// Our name of a format that an image names.
pub(super) fn our_name(format: &str) -> &str {
    if format == "vpc" { "vhd" } else { format }
}
