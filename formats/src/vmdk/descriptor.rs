//! The descriptor: the text that says which extents make up a disk and what its parent is. In a file of its own, or inside the only
//! extent.
//!
//! ```text
//!  # Disk DescriptorFile          version, identity (CID), identity of the parent, type, hint where the parent is
//!  # Extent description           ACCESS SECTORS TYPE "FILE" [FIRST SECTOR]
//!  # The Disk Data Base           ddb.KEY = "VALUE"
//! ```
//! Strict: a line that is none of these, a key that comes twice, a number that is none are damage. Bounded: [`TEXT_BYTES_MAX`],
//! [`EXTENTS_MAX`].
//!
//! A descriptor has no second copy, so it is changed only where one write of one sector does it ([`write()`]). Texts that this program
//! composes have their header in sectors of its own, with blanks behind it, so that another parent's name fits.
//!
//! Source: VMware, "Virtual Disk Format 5.0", "The Descriptor File".

use std::fmt::Write as _;
use std::ops::Range;
use std::rc::Rc;

use super::header::SECTOR;
use crate::error::Error;
use crate::file::{Buf, ImageFile};

/// First line of a descriptor file.
pub const SIGNATURE: &str = "# Disk DescriptorFile";
/// Longest descriptor, in bytes.
pub const TEXT_BYTES_MAX: u64 = 1 << 20;
/// Most extents: each is an open file.
pub const EXTENTS_MAX: usize = 1024;
/// `parentCID` of a disk without a parent.
pub const NO_PARENT: u32 = u32::MAX;
/// Types of disks that are known, as `createType` says them.
const TYPES: &[&str] = &[
    "monolithicSparse",
    "monolithicFlat",
    "twoGbMaxExtentSparse",
    "twoGbMaxExtentFlat",
    "2GbMaxExtentSparse",
    "2GbMaxExtentFlat",
    "streamOptimized",
    "vmfs",
    "vmfsThin",
    "vmfsPreallocated",
    "vmfsEagerZeroedThick",
    "vmfsSparse",
    "custom",
];

/// What may be done with an extent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Everything.
    ReadWrite,
    /// It is only read.
    ReadOnly,
}

/// What an extent's file holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The bytes of the disk.
    Flat,
    /// A sparse extent: hosted or COWD, as its own header says.
    Sparse,
    /// There is no file: zeroes.
    Zero,
}

/// A line of the description of extents.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExtentLine {
    /// What may be done.
    pub access: Access,
    /// Bytes of the disk.
    pub bytes: u64,
    /// What it is.
    pub kind: Kind,
    /// Its file, as it is named; empty for [`Kind::Zero`].
    pub file: String,
    /// First byte in that file; 0 for sparse extents.
    pub offset: u64,
    /// Where its number of sectors is in the text.
    sectors_at: Range<usize>,
}

/// A descriptor, understood. The default is that of an extent without one.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Descriptor {
    /// As it is, without padding.
    pub text: Vec<u8>,
    /// Type of the disk.
    pub create_type: String,
    /// Identity of the contents, and where its digits are in the text.
    pub cid: Option<(u32, Range<usize>)>,
    /// Identity of the parent; `None` without one.
    pub parent_cid: Option<u32>,
    /// Where the parent is.
    pub parent_hint: Option<String>,
    /// Changes are to be noted in another file, which this program does not do.
    pub change_tracking: bool,
    /// Extents, in the order of the disk.
    pub extents: Vec<ExtentLine>,
    /// `ddb.adapterType`.
    pub adapter: Option<String>,
    /// `ddb.virtualHWVersion`.
    pub hardware: Option<String>,
    /// Where the header's last line ends.
    pub(super) header_end: usize,
}

/// A line that cannot be understood.
fn bad(name: &str, number: usize, what: impl std::fmt::Display) -> Error {
    Error::corrupt(name, format!("line {} of its descriptor {what}", number + 1))
}

/// Text of a message that came from an image: bounded.
fn shown(text: &str) -> String {
    format!("{:?}", text.chars().take(60).collect::<String>())
}

impl Descriptor {
    /// Understands a text; what is behind the first NUL is padding. `name` is for messages.
    ///
    /// # Errors
    /// Damaged, or something that is not supported.
    pub fn parse(name: &str, text: &[u8]) -> Result<Descriptor, Error> {
        let text = text.split(|byte| *byte == 0).next().unwrap_or_default();
        let mut parsed = Descriptor { text: text.to_vec(), ..Descriptor::default() };
        let mut seen = std::collections::BTreeSet::new();
        let mut start = 0;
        for (number, bytes) in text.split(|byte| *byte == b'\n').enumerate() {
            let at = start;
            start += bytes.len() + 1;
            let Ok(line) = std::str::from_utf8(bytes) else {
                // Names in another encoding would be names of other files.
                return Err(Error::unsupported(
                    name,
                    format!("line {} of its descriptor, which is not UTF-8,", number + 1),
                ));
            };
            let at = at + line.len() - line.trim_start().len();
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            if let Some(extent) = extent_line(line, at).transpose() {
                let extent = extent.map_err(|what| bad(name, number, what))?;
                parsed.extents.push(extent);
                if parsed.extents.len() > EXTENTS_MAX {
                    return Err(Error::unsupported(
                        name,
                        format!("a disk of more than {EXTENTS_MAX} extents"),
                    ));
                }
                continue;
            }
            let Some((key, value)) = line.split_once('=') else {
                return Err(bad(
                    name,
                    number,
                    format!("is neither an extent nor KEY=VALUE: {}", shown(line)),
                ));
            };
            let value_at = at + key.len() + 1 + (value.len() - value.trim_start().len());
            let (key, value) = (key.trim(), value.trim());
            let inner = value.strip_prefix('"').and_then(|value| value.strip_suffix('"'));
            let (value, value_at) = inner.map_or((value, value_at), |inner| (inner, value_at + 1));
            if !seen.insert(key.to_owned()) {
                return Err(bad(name, number, format!("says {} again", shown(key))));
            }
            parsed.set(name, key, value, value_at).map_err(|what| match what {
                Problem::Damage(what) => bad(name, number, what),
                Problem::Unsupported(what) => Error::unsupported(name, what),
            })?;
            if parsed.extents.is_empty() {
                parsed.header_end = (start - 1).min(text.len());
            }
        }
        if parsed.create_type.is_empty() {
            return Err(Error::corrupt(
                name,
                "its descriptor does not say of which type the disk is (createType)",
            ));
        }
        let total = parsed.extents.iter().try_fold(0u64, |sum, extent| sum.checked_add(extent.bytes));
        if total.is_none_or(|bytes| bytes > 1 << 62) || total == Some(0) {
            return Err(Error::corrupt(
                name,
                "the extents of its descriptor come to no size that a disk can have",
            ));
        }
        Ok(parsed)
    }

    fn set(&mut self, name: &str, key: &str, value: &str, value_at: usize) -> Result<(), Problem> {
        let number = |what: &str| {
            let number =
                u32::from_str_radix(value, 16).ok().filter(|_| value.len() <= 8 && !value.starts_with('+'));
            number.ok_or_else(|| {
                Problem::Damage(format!(
                    "says that {what} is {}: up to 8 hexadecimal digits are expected",
                    shown(value)
                ))
            })
        };
        match key {
            "version" if !matches!(value, "1" | "2" | "3") => {
                let what = format!("version {} of a descriptor: 1 to 3 are known", shown(value));
                return Err(Problem::Unsupported(what));
            }
            "CID" => self.cid = Some((number("CID")?, value_at..value_at + value.len())),
            "parentCID" => self.parent_cid = Some(number("parentCID")?).filter(|cid| *cid != NO_PARENT),
            "createType" if !TYPES.contains(&value) => {
                let what = format!("disks of type {}; there are {}", shown(value), TYPES.join(", "));
                return Err(Problem::Unsupported(what));
            }
            "createType" => value.clone_into(&mut self.create_type),
            "parentFileNameHint" => self.parent_hint = Some(value.to_owned()),
            "changeTrackPath" => self.change_tracking = true,
            "ddb.adapterType" => self.adapter = Some(value.to_owned()),
            "ddb.virtualHWVersion" => self.hardware = Some(value.to_owned()),
            // What lies between the disk and its bytes, or is a cipher, must not be passed over.
            "ddb.iofilters" => {
                return Err(Problem::Unsupported(format!("I/O filters ({})", shown(value))));
            }
            key if key.starts_with("encryption") => {
                return Err(Problem::Unsupported(format!("{name} is encrypted ({})", shown(key))));
            }
            _ => {}
        }
        Ok(())
    }

    /// Bytes of the disk.
    pub fn size(&self) -> u64 {
        self.extents.iter().map(|extent| extent.bytes).sum()
    }

    /// The text with another parent.
    ///
    /// # Errors
    /// The name cannot stand in a descriptor.
    pub fn with_parent(&self, parent: Option<(u32, &str)>) -> Result<Vec<u8>, Error> {
        let (header, rest) = self.text.split_at(self.header_end);
        let blanks = rest.iter().take_while(|byte| matches!(byte, b' ' | b'\n' | b'\r')).count();
        let (identity, hint) = parent_lines(parent)?;
        let mut new = Vec::new();
        for line in header.split(|byte| *byte == b'\n') {
            let starts = |key: &str| line.trim_ascii_start().starts_with(key.as_bytes());
            if !starts("parentCID") && !starts("parentFileNameHint") {
                new.extend_from_slice(line);
                new.push(b'\n');
            }
            if starts("CID") {
                new.extend_from_slice(identity.as_bytes());
            }
        }
        new.extend_from_slice(hint.as_bytes());
        // What follows stays where it is if it can.
        let kept = self.header_end + blanks;
        pad(&mut new, kept);
        new.extend_from_slice(&rest[blanks..]);
        Ok(new)
    }

    /// The text with another size of its last extent, in bytes.
    pub fn with_last_size(&self, bytes: u64) -> Vec<u8> {
        let mut new = self.text.clone();
        if new.is_empty() {
            return new;
        }
        if let Some(last) = self.extents.last() {
            new.splice(last.sectors_at.clone(), (bytes / SECTOR).to_string().into_bytes());
        }
        // What is longer takes room from the blanks at the end.
        let excess = new.len().saturating_sub(self.text.len());
        let blanks = (new.len() - 1).saturating_sub(excess)..new.len() - 1;
        if new[blanks.clone()].iter().all(|byte| *byte == b' ') {
            new.drain(blanks);
        }
        new
    }
}

/// Why a line is not taken.
enum Problem {
    Damage(String),
    Unsupported(String),
}

/// An extent of the disk, if that is what a line begins as. `at` is where the line is.
fn extent_line(line: &str, at: usize) -> Result<Option<ExtentLine>, String> {
    let mut rest = line;
    let mut word = || {
        let trimmed = rest.trim_start();
        let (word, behind) = trimmed.split_at(trimmed.find(char::is_whitespace).unwrap_or(trimmed.len()));
        let start = line.len() - trimmed.len();
        rest = behind;
        (word, start)
    };
    let access = match word().0 {
        "RW" => Access::ReadWrite,
        "RDONLY" => Access::ReadOnly,
        "NOACCESS" => return Err("is an extent without access (NOACCESS), which nobody can read".to_owned()),
        _ => return Ok(None),
    };
    let (sectors, sectors_at) = word();
    let bytes = sectors
        .parse::<u64>()
        .ok()
        .and_then(|sectors| sectors.checked_mul(SECTOR))
        .filter(|bytes| *bytes > 0);
    let bytes = bytes.ok_or_else(|| format!("is an extent of {} sectors", shown(sectors)))?;
    let kind = match word().0 {
        "FLAT" | "VMFS" => Kind::Flat,
        "SPARSE" | "VMFSSPARSE" => Kind::Sparse,
        "ZERO" => Kind::Zero,
        other => {
            return Err(format!(
                "is an extent of type {}: FLAT, VMFS, SPARSE, VMFSSPARSE and ZERO are supported",
                shown(other)
            ));
        }
    };
    let sectors_at = at + sectors_at..at + sectors_at + sectors.len();
    let mut extent = ExtentLine { access, bytes, kind, file: String::new(), offset: 0, sectors_at };
    if kind == Kind::Zero {
        return Ok(Some(extent));
    }
    let quoted = rest.trim_start().strip_prefix('"').and_then(|rest| rest.split_once('"'));
    let (file, behind) = quoted.ok_or("is an extent without a file's name in quotes")?;
    if file.is_empty() {
        return Err("is an extent whose file has no name".to_owned());
    }
    file.clone_into(&mut extent.file);
    if kind == Kind::Flat {
        let offset = behind.split_whitespace().next().unwrap_or("0");
        let offset = offset.parse::<u64>().ok().and_then(|sectors| sectors.checked_mul(SECTOR));
        // Sums of it and the size stay far below what a number can hold.
        let offset = offset.filter(|offset| *offset < 1 << 62 && bytes < 1 << 62);
        extent.offset = offset.ok_or("is an extent at a place that no file has")?;
    }
    Ok(Some(extent))
}

/// The lines of a descriptor that name a parent: its identity, and where it is. The first has to follow that of the image's own
/// identity: QEMU drops what is between the two.
fn parent_lines(parent: Option<(u32, &str)>) -> Result<(String, String), Error> {
    let Some((cid, hint)) = parent else {
        return Ok((format!("parentCID={NO_PARENT:08x}\n"), String::new()));
    };
    if hint.is_empty() || hint.contains(['"', '\n', '\r', '\0']) {
        let message =
            format!("the parent's path {hint:?} cannot stand in a VMDK: quotes and ends of lines do not");
        return Err(Error::invalid(message));
    }
    Ok((format!("parentCID={cid:08x}\n"), format!("parentFileNameHint=\"{hint}\"\n")))
}

/// Fills a text up to `len` with a blank line, if there is room for one.
fn pad(text: &mut Vec<u8>, len: usize) {
    if text.len() < len {
        text.resize(len - 1, b' ');
        text.push(b'\n');
    }
}

/// What a new descriptor says.
#[derive(Debug)]
pub struct New<'a> {
    /// Identity of the contents.
    pub cid: u32,
    /// Identity and path of the parent.
    pub parent: Option<(u32, &'a str)>,
    /// Type of the disk.
    pub create_type: &'a str,
    /// Lines of extents.
    pub extents: &'a [String],
    /// Entries of the disk data base.
    pub database: &'a [(&'a str, String)],
}

/// Composes the text of a new descriptor.
///
/// # Errors
/// The parent's path cannot stand in it.
pub fn compose(new: &New<'_>) -> Result<Vec<u8>, Error> {
    let (identity, hint) = parent_lines(new.parent)?;
    let (cid, create_type) = (new.cid, new.create_type);
    let head =
        format!("{SIGNATURE}\nversion=1\nCID={cid:08x}\n{identity}createType=\"{create_type}\"\n{hint}");
    let mut text = head.into_bytes();
    let end = (text.len() + 1).next_multiple_of(SECTOR as usize);
    pad(&mut text, end);
    let mut rest = "# Extent description\n".to_owned();
    for line in new.extents {
        let _ = writeln!(rest, "{line}");
    }
    rest += "\n# The Disk Data Base\n#DDB\n\n";
    for (key, value) in new.database {
        let _ = writeln!(rest, "ddb.{key} = \"{value}\"");
    }
    text.extend_from_slice(rest.as_bytes());
    // Whole sectors: a store of blocks has no other end of a file.
    let end = (text.len() + 1).next_multiple_of(SECTOR as usize);
    pad(&mut text, end);
    Ok(text)
}

/// The one write that makes `new` of the descriptor `old` in its space: `place` of the file, which is all of it when the descriptor has
/// a file of its own.
fn one_write(
    name: &str,
    place: &Range<u64>,
    old: &[u8],
    mut new: Vec<u8>,
) -> Result<Option<(u64, Buf)>, Error> {
    let own_file = place.start == 0;
    // A text of its own file gets no shorter, one inside an extent is followed by zeroes.
    let filler = if own_file { b'\n' } else { 0 };
    new.resize(new.len().max(old.len()), filler);
    let mut old = old.to_vec();
    old.resize(new.len(), 0);
    let sectors = old.chunks(SECTOR as usize).zip(new.chunks(SECTOR as usize)).enumerate();
    let changed: Vec<(usize, &[u8])> =
        sectors.filter(|(_, (old, new))| old != new).map(|(at, (_, new))| (at, new)).collect();
    let fits = own_file || new.len() as u64 <= place.end - place.start;
    match &changed[..] {
        [] => Ok(None),
        [(sector, bytes)] if fits => Ok(Some((place.start + *sector as u64 * SECTOR, Buf::copy_of(bytes)))),
        more => {
            let what = format!(
                "changing its descriptor in {} sectors, which a crash could leave half done: convert it into a new image instead",
                more.len()
            );
            Err(Error::unsupported(name, what))
        }
    }
}

/// Whether [`write()`] can make this change.
///
/// # Errors
/// It cannot.
pub fn check(file: &Rc<dyn ImageFile>, place: &Range<u64>, old: &[u8], new: &[u8]) -> Result<(), Error> {
    one_write(file.name(), place, old, new.to_vec()).map(drop)
}

/// Changes a descriptor in its file by one write of one sector: a crash leaves the old text or the new one. Not flushed.
///
/// # Errors
/// It takes more than that; I/O.
pub async fn write(
    file: &Rc<dyn ImageFile>,
    place: &Range<u64>,
    old: &[u8],
    new: Vec<u8>,
) -> Result<(), Error> {
    match one_write(file.name(), place, old, new)? {
        Some((at, bytes)) => file.write(at, bytes).await,
        None => Ok(()),
    }
}
