//! Another backing file: the reference in the header, changed by one write of one sector.
//!
//! ```text
//! | header | extensions … end | … old name … | new name |        first cluster
//! |<------- sector 0: switches ------->|
//! ```
//! The new name is written first, to bytes of the first cluster that nothing refers to, and flushed; then sector 0, which holds the
//! header, the place of the name and the extension with the format. If the extensions do not end in sector 0, the table of
//! feature names is left out: it only serves messages.

use std::rc::Rc;

use zerocopy::big_endian::{U32, U64};
use zerocopy::{FromBytes, IntoBytes};

use super::extensions;
use super::header::{self, Header, RawHeader, V2_BYTES};
use crate::driver::Link;
use crate::error::Error;
use crate::file::{Buf, ImageFile};

/// What is written as one.
const SECTOR: usize = 512;

/// Extensions as they lie in the file: type and bytes.
type Raw = Vec<(u32, Vec<u8>)>;

/// See [`crate::driver::Format::set_backing`].
pub(super) async fn set(file: Rc<dyn ImageFile>, backing: Option<(Link, u64)>) -> Result<(), Error> {
    let name = file.name().to_owned();
    let header = Header::read(&file).await?;
    if backing.is_some() && header.data_file_raw() {
        let what = "its raw data file excludes a backing file, since it could not be read by itself";
        return Err(Error::unsupported(&name, what));
    }
    let first = file.read(0, header.geometry.cluster() as usize).await?;
    let Ok((raw, _)) = RawHeader::read_from_prefix(&first) else {
        return Err(Error::corrupt(&name, "the header could not be read whole"));
    };
    let v3 = header.geometry.version >= 3;
    let start = if v3 { raw.header_len.get() as usize } else { V2_BYTES };
    let old_name = raw.backing_offset.get() as usize
        ..(raw.backing_offset.get() + u64::from(raw.backing_len.get())) as usize;
    let end = if header.backing.is_some() { old_name.start } else { first.len() };
    let (old, old_end) = split(first.get(start..end).unwrap_or_default());
    let new = backing.as_ref().map(|(link, _)| new_name(&name, link)).transpose()?;
    let area = new_area(old, new.as_ref().map(|(_, format)| format.as_str()), SECTOR.saturating_sub(start));
    let room = start + area.len();
    if room > SECTOR {
        let what = format!(
            "its header extensions need {room} bytes: a new backing file can be named only where 512 do"
        );
        return Err(Error::unsupported(&name, what));
    }

    let path = new.as_ref().map_or(&[][..], |(path, _)| path.as_bytes());
    let mut at = if room + path.len() <= SECTOR { room } else { SECTOR.max(start + old_end) };
    if at >= SECTOR && header.backing.is_some() && at < old_name.end && old_name.start < at + path.len() {
        at = old_name.end;
    }
    if at + path.len() > first.len() {
        let what = format!("its first cluster has no room for a path of {} bytes", path.len());
        return Err(Error::unsupported(&name, what));
    }
    let mut sector = Buf::copy_of(&first[..SECTOR]);
    sector[start..].fill(0);
    sector[start..room].copy_from_slice(&area);
    if at >= SECTOR && !path.is_empty() {
        file.write(at as u64, Buf::copy_of(path)).await?;
        file.flush().await?;
    } else {
        sector[at..at + path.len()].copy_from_slice(path);
    }
    let raw = RawHeader {
        backing_offset: U64::new(if path.is_empty() { 0 } else { at as u64 }),
        backing_len: U32::new(path.len() as u32),
        autoclear: if v3 { U64::new(raw.autoclear.get() & header::AUTOCLEAR_KNOWN) } else { raw.autoclear },
        ..raw
    };
    let known = start.min(raw.as_bytes().len());
    sector[..known].copy_from_slice(&raw.as_bytes()[..known]);
    file.write(0, sector).await?;
    file.flush().await
}

/// Path and format of a link, if a header can hold them.
fn new_name(name: &str, link: &Link) -> Result<(String, String), Error> {
    let (Some(path), Some(format)) = (link.paths.first(), &link.format) else {
        return Err(Error::invalid(format!("{name}: a backing file needs a path and a format")));
    };
    if path.is_empty() || path.len() > 1023 {
        let message = format!("{name}: the path of the backing file has {} bytes: 1 to 1023 fit", path.len());
        return Err(Error::invalid(message));
    }
    Ok((super::plain_path(name, "backing file", path)?, format.clone()))
}

/// The extensions in an area that was checked before, and where they end.
fn split(area: &[u8]) -> (Raw, usize) {
    let mut found = Raw::new();
    let mut at = 0;
    let word = |at: usize| {
        area.get(at..at + 4).map(|bytes| u32::from_be_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
    };
    while let (Some(kind), Some(len)) = (word(at), word(at + 4)) {
        let Some(data) = area.get(at + 8..at + 8 + len as usize).filter(|_| kind != extensions::END) else {
            return (found, (at + 8).min(area.len()));
        };
        found.push((kind, data.to_vec()));
        at += 8 + (len as usize).next_multiple_of(8);
    }
    (found, at.min(area.len()))
}

/// The bytes of the extensions with another format of the backing file.
fn new_area(mut old: Raw, format: Option<&str>, room: usize) -> Vec<u8> {
    old.retain(|(kind, _)| *kind != extensions::BACKING_FORMAT);
    if let Some(format) = format {
        let format = extensions::names_in_image(format);
        old.insert(0, (extensions::BACKING_FORMAT, format.as_bytes().to_vec()));
    }
    let encode = |old: &Raw| {
        let mut area = Vec::new();
        old.iter().for_each(|(kind, data)| extensions::append(&mut area, *kind, data));
        extensions::append(&mut area, extensions::END, &[]);
        area
    };
    let whole = encode(&old);
    if whole.len() <= room {
        return whole;
    }
    old.retain(|(kind, _)| *kind != extensions::FEATURE_NAMES);
    encode(&old)
}
