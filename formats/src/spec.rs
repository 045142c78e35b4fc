//! The one grammar of images, and the rules for names of disks.
//!
//! ```text
//! spec      = *( decorator ":" ) type ":" path [ "?" option *( "&" option ) ]
//! option    = key "=" value
//! decorator, type, key = 1*( a-z | 0-9 | "-" )
//! path, value          = *( any character but those below | "%" HEX HEX )
//! ```
//!
//! To be written as `%XX`: in both `%`, `,` and control characters; in a path `?`; in a value `&`. Commas are never
//! taken as they are, since xl's disk syntax would cut the text there. Names are read from the left until a *type* is
//! found, so what follows the type's colon is path, and a path may contain colons.
//!
//! The string is sugar: [`ImageSpec`] is the structured form that the API takes and that is stored. `Display` gives
//! the canonical string (canonical type name, options in order of their keys, everything unusual encoded), and
//! parsing it gives back the same value. [`ImageSpec::target`] is the typed meaning; two specifications mean the same
//! when their targets are equal (`size=1G` and `size=1024M`).
//!
//! A new type is a variant of [`ImageType`], an entry in `TYPES` and a variant of [`Target`].

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::crypt::source::KeySources;
use crate::driver::Format;
use crate::raw::{SECTOR_BYTES, SIZE_MAX_BYTES};
use crate::registry;
use crate::size::{format_size, parse_size};

/// Longest specification that is read, in bytes: a path of PATH_MAX with every byte encoded, and options.
pub const SPEC_MAX_BYTES: usize = 16 * 1024;
/// Longest path in bytes (PATH_MAX without its closing NUL).
pub const PATH_MAX_BYTES: usize = 4095;
/// Longest name of a disk, group or RAM disk, in bytes.
pub const NAME_MAX_BYTES: usize = 64;
/// Longest path of a Unix socket in bytes (`sun_path` is 108 with its closing NUL; unix(7)).
pub const SOCKET_PATH_MAX_BYTES: usize = 107;

/// What kind of mistake a [`SpecError`] is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SpecErrorKind {
    /// Longer than [`SPEC_MAX_BYTES`].
    TooLong,
    /// No `TYPE:` at the start.
    MissingType,
    /// Neither a type nor a decorator.
    UnknownType,
    /// A format that other versions have.
    NotBuilt,
    /// A character that must be encoded.
    Character,
    /// `%` without two hexadecimal digits, or not UTF-8 after decoding.
    Escape,
    /// The path is missing, relative, too long, or not allowed for this type.
    Path,
    /// A name breaks the rule of [`check_disk_name`].
    Name,
    /// A socket's path breaks the rule of [`check_socket_path`].
    SocketPath,
    /// An option without `=` or key.
    OptionSyntax,
    /// This type has no such option.
    UnknownOption,
    /// Given twice.
    DuplicateOption,
    /// Required and not given.
    MissingOption,
    /// A value that the option does not take.
    OptionValue,
}

/// Why a specification or a name was refused: what was found, what is expected, what to do.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub struct SpecError {
    /// For callers to match.
    pub kind: SpecErrorKind,
    /// Byte offset of the problem in the string that was parsed; `None` for a structured specification.
    pub offset: Option<usize>,
    /// For the operator, without the offset.
    pub message: String,
}

impl fmt::Display for SpecError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.offset {
            Some(offset) => write!(f, "{} (at offset {offset})", self.message),
            None => f.write_str(&self.message),
        }
    }
}

fn error(kind: SpecErrorKind, offset: Option<usize>, message: impl Into<String>) -> SpecError {
    SpecError { kind, offset, message: message.into() }
}

/// Foreign text for a message: quoted, without control characters, of bounded length.
fn quoted(text: &str) -> String {
    const SHOWN: usize = 80;
    let more = if text.chars().count() > SHOWN { "…" } else { "" };
    format!("{:?}", format!("{}{more}", text.chars().take(SHOWN).collect::<String>()))
}

/// Types of images that this version serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(into = "String")]
pub enum ImageType {
    /// A file or block device that holds the disk's bytes; `aio` is another name for it.
    Raw,
    /// An image of a format with a driver, by its name in [`crate::registry`]: `vhd`, `qcow2`.
    Image(&'static str),
    /// A named RAM disk.
    Ram,
    /// Reads as zeroes, forgets writes.
    Null,
}

/// Formats of which the name is known, to be refused by name.
const NOT_BUILT: &[&str] = &["vmdk", "vhdx", "vdi", "qed", "parallels"];

/// What there is, for messages.
fn known() -> String {
    let images: Vec<_> =
        registry::ALL.iter().map(|format| format.name()).filter(|name| *name != "raw").collect();
    format!("the types are raw (or aio), {}, ram and null; this version has no decorators", images.join(", "))
}

impl ImageType {
    /// It lies in files, not only in memory.
    pub fn is_file(self) -> bool {
        matches!(self, ImageType::Raw | ImageType::Image(_))
    }

    /// The canonical name.
    pub fn name(self) -> &'static str {
        match self {
            ImageType::Raw => "raw",
            ImageType::Image(format) => format,
            ImageType::Ram => "ram",
            ImageType::Null => "null",
        }
    }
}

impl fmt::Display for ImageType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for ImageType {
    type Err = SpecError;

    fn from_str(name: &str) -> Result<ImageType, SpecError> {
        match name {
            "raw" | "aio" => return Ok(ImageType::Raw),
            "ram" => return Ok(ImageType::Ram),
            "null" => return Ok(ImageType::Null),
            _ => {}
        }
        if let Some(format) = registry::format(name) {
            return Ok(ImageType::Image(format.name()));
        }
        let known = known();
        if NOT_BUILT.contains(&name) {
            let message = format!("the format {} is not built into this version: {known}", quoted(name));
            return Err(error(SpecErrorKind::NotBuilt, None, message));
        }
        let message = format!("{} is neither a type nor a decorator: {known}", quoted(name));
        Err(error(SpecErrorKind::UnknownType, None, message))
    }
}

impl<'de> Deserialize<'de> for ImageType {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<ImageType, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

impl From<ImageType> for String {
    fn from(image_type: ImageType) -> String {
        image_type.name().to_owned()
    }
}

/// An image as the API takes it and as it is stored: `{"type": "raw", "path": "/srv/a.img", "options": {"sector": "512"}}`.
///
/// Deserialising checks the type's name only; call [`ImageSpec::target`] before using one that came from outside.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ImageSpec {
    /// What it is.
    #[serde(rename = "type")]
    pub image_type: ImageType,
    /// raw and images: an absolute path. ram: a name. null: empty. Decoded.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub path: String,
    /// Options of the type, decoded, as they were written.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub options: BTreeMap<String, String>,
}

/// How a raw image's data passes the page cache.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CacheMode {
    /// O_DIRECT; a flush is fdatasync.
    #[default]
    None,
    /// Through the page cache; a flush is fdatasync.
    Writeback,
    /// Through the page cache; every write is followed by fdatasync before it is answered.
    Writethrough,
}

/// Options of `raw:`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RawOptions {
    /// `cache=none|writeback|writethrough`; none when not given.
    pub cache: CacheMode,
    /// `sector=512|4096`: logical sector that clients see, in bytes; the daemon chooses when not given.
    pub sector: Option<u32>,
}

/// Options of an image of a format.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FormatOptions {
    /// `cache=none|writeback|writethrough`, for every file of the chain; none when not given.
    pub cache: CacheMode,
    /// `snapshot=NAME`: a snapshot inside the image (qcow2), served read-only.
    pub snapshot: Option<String>,
    /// `key-file=`, `key-credential=`: where the keys of encrypted images of the chain are.
    pub keys: KeySources,
}

/// Options of `ram:`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RamOptions {
    /// `size=SIZE` in bytes, a positive multiple of 512. Required.
    pub size: u64,
    /// `init=FILE`: absolute path of a file whose bytes are the first contents.
    pub init: Option<PathBuf>,
    /// `huge=2M|1G`: size of the pages in bytes; ordinary pages when not given.
    pub huge: Option<u64>,
}

/// Options of `null:`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NullOptions {
    /// `size=SIZE` in bytes, a positive multiple of 512. Required.
    pub size: u64,
}

/// What a specification means, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// A file or block device.
    Raw {
        /// Absolute.
        path: PathBuf,
        /// Options.
        options: RawOptions,
    },
    /// An image of a format, with what is below it.
    Image {
        /// Its name in [`crate::registry`].
        format: &'static str,
        /// Absolute.
        path: PathBuf,
        /// Options.
        options: FormatOptions,
    },
    /// A RAM disk.
    Ram {
        /// Its name; keeps [`check_disk_name`].
        name: String,
        /// Options.
        options: RamOptions,
    },
    /// Nothing behind it.
    Null {
        /// Options.
        options: NullOptions,
    },
}

/// Where the parts of a specification were in the parsed string, for messages.
#[derive(Debug, Default)]
struct Offsets {
    path: Option<usize>,
    /// Offsets of each option's key and value.
    options: BTreeMap<String, (usize, usize)>,
}

impl Offsets {
    fn key(&self, key: &str) -> Option<usize> {
        self.options.get(key).map(|(key, _)| *key)
    }

    fn value(&self, key: &str) -> Option<usize> {
        self.options.get(key).map(|(_, value)| *value)
    }
}

impl FromStr for ImageSpec {
    type Err = SpecError;

    /// Parses and checks. Paths must be absolute: the daemon has no working directory that an operator could mean.
    fn from_str(text: &str) -> Result<ImageSpec, SpecError> {
        let (spec, offsets) = parse(text)?;
        spec.check(&offsets)?;
        Ok(spec)
    }
}

impl ImageSpec {
    /// Parses and checks what was typed in the directory `base` (absolute): relative paths of files are joined to it.
    pub fn parse_relative_to(text: &str, base: &Path) -> Result<ImageSpec, SpecError> {
        let (mut spec, offsets) = parse(text)?;
        if spec.image_type.is_file() && !spec.path.is_empty() {
            spec.path = joined(base, &spec.path)?;
        }
        if spec.image_type == ImageType::Ram
            && let Some(init) = spec.options.get_mut("init").filter(|init| !init.is_empty())
        {
            *init = joined(base, init)?;
        }
        for (key, file) in &mut spec.options {
            if KeySources::is_file_option(key) && !file.is_empty() {
                *file = joined(base, file)?;
            }
        }
        spec.check(&offsets)?;
        Ok(spec)
    }

    /// The typed meaning, or what is wrong with it.
    pub fn target(&self) -> Result<Target, SpecError> {
        self.check(&Offsets::default())
    }

    fn check(&self, offsets: &Offsets) -> Result<Target, SpecError> {
        match self.image_type {
            ImageType::Raw => {
                self.check_keys(&["cache", "sector"], offsets)?;
                let path = checked_path("the path of raw", &self.path, offsets.path)?;
                Ok(Target::Raw { path, options: self.raw_options(offsets)? })
            }
            ImageType::Image(format) => {
                let has_snapshots = registry::format(format).is_some_and(Format::has_snapshots);
                let keys: &[&str] = if has_snapshots { &["cache", "snapshot"] } else { &["cache"] };
                self.check_keys(keys, offsets)?;
                let what = format!("the path of {}", self.image_type);
                let path = checked_path(&what, &self.path, offsets.path)?;
                let snapshot = self.options.get("snapshot").cloned();
                if snapshot.as_deref() == Some("") {
                    let message = "snapshot= is empty: give the name or number of a snapshot of the image";
                    return Err(error(SpecErrorKind::OptionValue, offsets.value("snapshot"), message));
                }
                let keys = self.key_options(offsets)?;
                let options = FormatOptions { cache: self.cache_option(offsets)?, snapshot, keys };
                Ok(Target::Image { format, path, options })
            }
            ImageType::Ram => {
                self.check_keys(&["huge", "init", "size"], offsets)?;
                check_disk_name(&self.path).map_err(|problem| SpecError {
                    offset: offsets.path,
                    message: format!(
                        "ram takes the name of a RAM disk, like ram:scratch?size=1G; {}",
                        problem.message
                    ),
                    ..problem
                })?;
                Ok(Target::Ram { name: self.path.clone(), options: self.ram_options(offsets)? })
            }
            ImageType::Null => {
                self.check_keys(&["size"], offsets)?;
                if !self.path.is_empty() {
                    let message =
                        format!("null has no path, found {}: write null:?size=1G", quoted(&self.path));
                    return Err(error(SpecErrorKind::Path, offsets.path, message));
                }
                Ok(Target::Null { options: NullOptions { size: self.required_size(offsets)? } })
            }
        }
    }

    fn check_keys(&self, allowed: &[&str], offsets: &Offsets) -> Result<(), SpecError> {
        let takes_keys = matches!(self.image_type, ImageType::Image(_));
        let is_allowed =
            |key: &String| allowed.contains(&key.as_str()) || (takes_keys && KeySources::is_option(key));
        match self.options.keys().find(|key| !is_allowed(key)) {
            None => Ok(()),
            Some(key) => Err(error(
                SpecErrorKind::UnknownOption,
                offsets.key(key),
                format!(
                    "{} has no option {}: it has {}{}",
                    self.image_type,
                    quoted(key),
                    allowed.join(", "),
                    if takes_keys { ", key-file and key-credential" } else { "" }
                ),
            )),
        }
    }

    fn cache_option(&self, offsets: &Offsets) -> Result<CacheMode, SpecError> {
        Ok(match self.options.get("cache").map(String::as_str) {
            None | Some("none") => CacheMode::None,
            Some("writeback") => CacheMode::Writeback,
            Some("writethrough") => CacheMode::Writethrough,
            Some(_) => return Err(self.bad_value("cache", "none, writeback or writethrough", offsets)),
        })
    }

    fn key_options(&self, offsets: &Offsets) -> Result<KeySources, SpecError> {
        let mut keys = KeySources::default();
        for (key, value) in &self.options {
            keys.take(key, value)
                .map_err(|message| error(SpecErrorKind::OptionValue, offsets.value(key), message))?;
        }
        Ok(keys)
    }

    fn raw_options(&self, offsets: &Offsets) -> Result<RawOptions, SpecError> {
        let cache = self.cache_option(offsets)?;
        let sector = match self.options.get("sector").map(String::as_str) {
            None => None,
            Some("512") => Some(512),
            Some("4096") => Some(4096),
            Some(_) => return Err(self.bad_value("sector", "512 or 4096", offsets)),
        };
        Ok(RawOptions { cache, sector })
    }

    fn ram_options(&self, offsets: &Offsets) -> Result<RamOptions, SpecError> {
        let size = self.required_size(offsets)?;
        let init = match self.options.get("init") {
            None => None,
            Some(path) => Some(checked_path("the file of init", path, offsets.value("init"))?),
        };
        let huge = match self.options.get("huge").map(|text| parse_size(text)) {
            None => None,
            Some(Ok(bytes)) if bytes == 2 << 20 || bytes == 1 << 30 => Some(bytes),
            Some(_) => return Err(self.bad_value("huge", "2M or 1G", offsets)),
        };
        Ok(RamOptions { size, init, huge })
    }

    fn required_size(&self, offsets: &Offsets) -> Result<u64, SpecError> {
        let Some(text) = self.options.get("size") else {
            let message = format!("{} needs a size: add size=1G behind a ? or &", self.image_type);
            return Err(error(SpecErrorKind::MissingOption, None, message));
        };
        let bytes = parse_size(text).map_err(|problem| {
            error(SpecErrorKind::OptionValue, offsets.value("size"), format!("option size: {problem}"))
        })?;
        if bytes == 0 || bytes % SECTOR_BYTES != 0 || bytes > SIZE_MAX_BYTES {
            let expected = format!("a multiple of 512 bytes from 512 to {}", format_size(SIZE_MAX_BYTES));
            return Err(self.bad_value("size", &expected, offsets));
        }
        Ok(bytes)
    }

    fn bad_value(&self, key: &str, expected: &str, offsets: &Offsets) -> SpecError {
        let found = quoted(self.options.get(key).map_or("", String::as_str));
        let message = format!("option {key} is {found}: expected {expected}");
        error(SpecErrorKind::OptionValue, offsets.value(key), message)
    }
}

impl fmt::Display for ImageSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.image_type, Encoded(&self.path))?;
        for (number, (key, value)) in self.options.iter().enumerate() {
            let separator = if number == 0 { '?' } else { '&' };
            write!(f, "{separator}{}={}", Encoded(key), Encoded(value))?;
        }
        Ok(())
    }
}

/// Text with every byte as `%XX` that is not plain in each place of the grammar.
struct Encoded<'a>(&'a str);

impl fmt::Display for Encoded<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for byte in self.0.bytes() {
            if byte.is_ascii_alphanumeric() || b"-._~/:@+".contains(&byte) {
                write!(f, "{}", byte as char)?;
            } else {
                write!(f, "%{byte:02X}")?;
            }
        }
        Ok(())
    }
}

/// An image by the grammar alone: the name of its type is not looked at yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NamedImage {
    /// Name of the type, as typed.
    pub type_name: String,
    /// Decoded; not empty, and made absolute.
    pub path: PathBuf,
    /// Options, decoded.
    pub options: BTreeMap<String, String>,
}

impl NamedImage {
    /// Parses what was typed in the directory `base` (absolute), for a type whose path is that of a file.
    ///
    /// # Errors
    /// The grammar is broken, or the path cannot be one.
    pub fn parse_relative_to(text: &str, base: &Path) -> Result<NamedImage, SpecError> {
        let Parts { type_name, path, options, offsets } = split(text)?;
        if path.is_empty() {
            let message = format!("{type_name} needs the path of its file: write {type_name}:/srv/disk.img");
            return Err(error(SpecErrorKind::Path, offsets.path, message));
        }
        let path = checked_path(&format!("the path of {type_name}"), &joined(base, &path)?, offsets.path)?;
        Ok(NamedImage { type_name: type_name.to_owned(), path, options })
    }
}

/// The grammar alone, with the places of its parts.
fn parse(text: &str) -> Result<(ImageSpec, Offsets), SpecError> {
    let Parts { type_name, path, options, offsets } = split(text)?;
    let image_type = type_name.parse().map_err(|problem| SpecError { offset: Some(0), ..problem })?;
    Ok((ImageSpec { image_type, path, options }, offsets))
}

/// A specification by the grammar alone.
struct Parts<'a> {
    type_name: &'a str,
    path: String,
    options: BTreeMap<String, String>,
    offsets: Offsets,
}

/// Cuts a specification into type, path and options.
fn split(text: &str) -> Result<Parts<'_>, SpecError> {
    if text.len() > SPEC_MAX_BYTES {
        let message =
            format!("the image specification has {} bytes: at most {SPEC_MAX_BYTES} are read", text.len());
        return Err(error(SpecErrorKind::TooLong, Some(SPEC_MAX_BYTES), message));
    }
    let is_name = |name: &str| {
        !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
    };
    // No decorators are registered, so the first name is the type.
    let Some((name, rest)) = text.split_once(':').filter(|(name, _)| is_name(name)) else {
        let message =
            format!("{} does not start with a type: write TYPE:PATH, like raw:/srv/disk.img", quoted(text));
        return Err(error(SpecErrorKind::MissingType, Some(0), message));
    };

    let path_offset = name.len() + 1;
    let (path, option_text) = match rest.split_once('?') {
        Some((path, options)) => (path, Some(options)),
        None => (rest, None),
    };
    let mut found = BTreeMap::new();
    let decoded = decode(path, path_offset)?;
    let mut offsets = Offsets { path: Some(path_offset), options: BTreeMap::new() };

    let mut offset = path_offset + path.len() + 1;
    for option in option_text.iter().flat_map(|options| options.split('&')) {
        let Some((key, value)) = option.split_once('=').filter(|(key, _)| is_name(key)) else {
            let message = format!("{} is no option: write KEY=VALUE, and & between options", quoted(option));
            return Err(error(SpecErrorKind::OptionSyntax, Some(offset), message));
        };
        let value_offset = offset + key.len() + 1;
        if found.insert(key.to_owned(), decode(value, value_offset)?).is_some() {
            let message = format!("option {} is given twice: give it once", quoted(key));
            return Err(error(SpecErrorKind::DuplicateOption, Some(offset), message));
        }
        offsets.options.insert(key.to_owned(), (offset, value_offset));
        offset += option.len() + 1;
    }
    Ok(Parts { type_name: name, path: decoded, options: found, offsets })
}

/// Decodes `%XX`; `offset` is where `text` stands in the whole, for messages.
fn decode(text: &str, offset: usize) -> Result<String, SpecError> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [byte, after @ ..] = rest {
        let at = Some(offset + text.len() - rest.len());
        rest = after;
        match *byte {
            b'%' => {
                let digit = |index: usize| after.get(index).and_then(|byte| (*byte as char).to_digit(16));
                let (Some(high), Some(low)) = (digit(0), digit(1)) else {
                    let message =
                        "a % must be followed by two hexadecimal digits: write %25 for a percent sign";
                    return Err(error(SpecErrorKind::Escape, at, message));
                };
                bytes.push((high * 16 + low) as u8);
                rest = &after[2..];
            }
            b',' => {
                let message = "a comma must be written as %2C (xl would cut the text there)";
                return Err(error(SpecErrorKind::Character, at, message));
            }
            byte if byte.is_ascii_control() => {
                let message = format!("the control character with code {byte} is not allowed");
                return Err(error(SpecErrorKind::Character, at, message));
            }
            byte => bytes.push(byte),
        }
    }
    String::from_utf8(bytes).map_err(|_| {
        let message = format!("{} is not UTF-8 after decoding: such paths cannot be served", quoted(text));
        error(SpecErrorKind::Escape, Some(offset), message)
    })
}

/// Checks the path of a file: absolute, of the right length, without control characters (they would forge log lines).
fn checked_path(what: &str, path: &str, offset: Option<usize>) -> Result<PathBuf, SpecError> {
    let refuse = |message: String| Err(error(SpecErrorKind::Path, offset, message));
    if path.is_empty() {
        return refuse(format!("{what} is empty: give an absolute path, like /srv/disk.img"));
    }
    if path.len() > PATH_MAX_BYTES {
        return refuse(format!("{what} has {} bytes: at most {PATH_MAX_BYTES} are possible", path.len()));
    }
    if path.chars().any(char::is_control) {
        return refuse(format!("{what} is {}: control characters are not allowed", quoted(path)));
    }
    if !path.starts_with('/') {
        let message =
            format!("{what} is {}, which is relative: give it in full, starting with /", quoted(path));
        return refuse(message);
    }
    Ok(PathBuf::from(path))
}

/// `path` as seen from `base`.
fn joined(base: &Path, path: &str) -> Result<String, SpecError> {
    let path = base.join(path.strip_prefix("./").unwrap_or(path));
    path.into_os_string().into_string().map_err(|path| {
        let message = format!("{path:?} is not UTF-8: such paths cannot be served");
        error(SpecErrorKind::Path, None, message)
    })
}

/// Checks the name of a disk, group or RAM disk: 1 to [`NAME_MAX_BYTES`] of `A-Z a-z 0-9 . _ -`, not starting with
/// `.` or `-`. Such a name is a file name, a URL segment, an NBD export name and a metric label without encoding, and
/// never looks like an option. The kind of the error is [`SpecErrorKind::Name`].
pub fn check_disk_name(name: &str) -> Result<(), SpecError> {
    let refuse = |found: &str| {
        let message = format!(
            "the name {} {found}: a name has 1 to {NAME_MAX_BYTES} of the characters A-Z a-z 0-9 . _ - and does not \
             start with . or -",
            quoted(name)
        );
        Err(error(SpecErrorKind::Name, None, message))
    };
    if name.is_empty() {
        return refuse("is empty");
    }
    if name.len() > NAME_MAX_BYTES {
        return refuse(&format!("has {} bytes", name.len()));
    }
    if let Some(bad) = name.chars().find(|c| !(c.is_ascii_alphanumeric() || "._-".contains(*c))) {
        return refuse(&format!("contains {bad:?}"));
    }
    if name.starts_with(['.', '-']) {
        return refuse(&format!("starts with {:?}", &name[..1]));
    }
    Ok(())
}

/// Checks that a socket can be bound at `path`: at most [`SOCKET_PATH_MAX_BYTES`]. The kind of the error is
/// [`SpecErrorKind::SocketPath`].
pub fn check_socket_path(path: &Path) -> Result<(), SpecError> {
    let length = path.as_os_str().len();
    if length <= SOCKET_PATH_MAX_BYTES {
        return Ok(());
    }
    let message = format!(
        "the socket path {} has {length} bytes: a Unix socket's path has at most {SOCKET_PATH_MAX_BYTES}; choose a \
         shorter disk name or a shorter --run-dir",
        path.display()
    );
    Err(error(SpecErrorKind::SocketPath, None, message))
}

#[cfg(test)]
#[path = "spec_tests.rs"]
mod tests;
