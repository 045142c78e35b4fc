//! Streams (`streamOptimized`): every grain is compressed and has a marker before it. They are read at any place, and written once, from
//! begin to end, by who makes them (`image convert -c`).
//!
//! ```text
//!  header | descriptor | grain directory | grain tables | marker, grain | marker, grain | … | end of stream
//! ```
//! Others put the tables behind the grains, with a footer that says where they are ([`super::header`]): a stream can be read from
//! a tape then. Both are read.
//!
//! | offset | bytes | marker of a grain |
//! |---|---|---|
//! | 0 | 8 | first sector of the disk that it holds |
//! | 8 | 4 | bytes that follow |
//! | 12 | | the grain, zlib; filled up to a sector |
//!
//! A stream that is being made is marked in its header as not cleanly closed. Only such a one takes grains.

use std::ops::Range;
use std::rc::Rc;

use super::directory::Place;
use super::header::{SECTOR, SECTORS_MAX};
use super::image::Image;
use super::sparse::Sparse;
use crate::codec::{self, Method};
use crate::driver::{Encoding, Order};
use crate::error::{Error, ErrorKind};
use crate::file::{Buf, ImageFile};

/// Bytes of a marker before a grain.
const MARKER_BYTES: u64 = 12;
/// Bytes that are read of a grain whose length is not known yet.
const FIRST_READ_BYTES: u64 = 4096;

/// The longest form of a grain that is taken: compression may make it longer.
fn encoded_max(grain: u64) -> u64 {
    2 * grain
}

/// Reads the compressed bytes of the grain at `at`, which begins at one of `sectors` of the disk.
async fn read_grain(file: Rc<dyn ImageFile>, at: u64, grain: u64, sectors: [u64; 2]) -> Result<Buf, Error> {
    let first = file.read(at, FIRST_READ_BYTES as usize).await?;
    let number = |range: Range<usize>| range.rev().fold(0u64, |sum, byte| sum << 8 | u64::from(first[byte]));
    let (sector, len) = (number(0..8), number(8..12));
    let data = at + MARKER_BYTES;
    if !sectors.contains(&sector)
        || len == 0
        || len > encoded_max(grain)
        || data + len > file.length().next_multiple_of(SECTOR)
    {
        let what = format!(
            "the grain at {at} has a marker of {len} bytes for sector {sector}, sector {} is expected",
            sectors[0]
        );
        return Err(Error::corrupt(file.name(), what));
    }
    match first.get(MARKER_BYTES as usize..(MARKER_BYTES + len) as usize) {
        Some(bytes) => Ok(Buf::copy_of(bytes)),
        None => file.read(data, len as usize).await,
    }
}

impl Image {
    /// See [`crate::driver::Driver::decode`].
    pub(super) async fn decode_grain(&self, range: Range<u64>) -> Result<Buf, Error> {
        let (start, sparse) =
            self.sparse_at(range.start).ok_or_else(|| Error::invalid("nothing there is encoded"))?;
        let grain_bytes = sparse.shape.grain;
        let grain = (range.start - start) / grain_bytes;
        let (from, whole) = (start + grain * grain_bytes, self.end_of_extent(range.start));
        let held = grain_bytes.min(whole - from);
        let part = (range.start - from) as usize..(range.end.min(from + held) - from) as usize;
        let Place::At(at) = sparse.place_of(&self.tables, grain).await? else {
            return Ok(Buf::zeroed(part.len()));
        };
        if !sparse.shape.markers {
            return Err(Error::unsupported(sparse.file.name(), "compressed grains without markers"));
        }
        let sectors = [from / SECTOR, (from - start) / SECTOR];
        let file = sparse.file.clone();
        let read = move || {
            Box::pin(read_grain(file, at, grain_bytes, sectors)) as crate::file::Pending<'static, Buf>
        };
        let damaged = |what| {
            let advice = "run `image check`; other ranges are served";
            Error::corrupt(
                sparse.file.name(),
                format!("the grain at {at}, for offset {from} of the disk: {what}: {advice}"),
            )
        };
        if held < grain_bytes {
            // Some writers fill the last grain up, some do not.
            let mut bytes =
                codec::decode_up_to(Method::Zlib, &read().await?, grain_bytes as usize).map_err(damaged)?;
            bytes.resize(grain_bytes as usize, 0);
            return Ok(Buf::copy_of(&bytes[part]));
        }
        let place = crate::metadata::address(sparse.tables_file, at);
        let bytes = self.decoded.get(place, Method::Zlib, grain_bytes as usize, read, damaged).await?;
        Ok(Buf::copy_of(&bytes[part]))
    }

    /// The only extent, if it is a stream that is being made.
    fn made_stream(&self) -> Option<&Sparse> {
        let sparse = self.sparse_at(0).map(|(_, sparse)| sparse);
        sparse.filter(|sparse| self.parts.len() == 1 && sparse.shape.stream && sparse.writable.is_some())
    }

    /// See [`crate::driver::Driver::encoding`].
    pub(super) fn stream_encoding(&self) -> Option<Encoding> {
        let grain = self.made_stream()?.shape.grain;
        Some(Encoding { method: Method::Zlib, unit: grain, encoded_max: encoded_max(grain) as usize })
    }

    /// See [`crate::driver::Driver::write_encoded`].
    pub(super) async fn append_grains(&self, units: Vec<(u64, Vec<u8>)>) -> Result<(), Error> {
        let Some(sparse) = self.made_stream() else {
            let what = "taking compressed grains: only a stream that is being made does";
            return Err(Error::unsupported(self.name(), what));
        };
        let (writable, grain_bytes) = (sparse.writable()?, sparse.shape.grain);
        let start = writable.append.get();
        let mut bytes = Vec::new();
        let mut entries = Vec::new();
        for (offset, encoded) in units {
            let grain = offset / grain_bytes;
            if sparse.place_of(&self.tables, grain).await? != Place::Absent {
                let what = format!("writing the grain at {offset} again: a stream is written once");
                return Err(Error::unsupported(self.name(), what));
            }
            let sector = (start + bytes.len() as u64) / SECTOR;
            let entry = u32::try_from(sector).ok().filter(|sector| u64::from(*sector) < SECTORS_MAX);
            let full =
                || Error::new(ErrorKind::NoSpace, format!("{}: a stream has at most 2 TiB", self.name()));
            entries.push((grain, entry.ok_or_else(full)?));
            bytes.extend_from_slice(&(offset / SECTOR).to_le_bytes());
            bytes.extend_from_slice(&(encoded.len() as u32).to_le_bytes());
            bytes.extend_from_slice(&encoded);
            bytes.resize(bytes.len().next_multiple_of(SECTOR as usize), 0);
        }
        let end = start + bytes.len() as u64;
        if writable.append.replace(end) != start {
            return Err(Error::invalid(format!("{}: two write a stream at a time", self.name())));
        }
        sparse.note_used(end);
        self.late.finish(sparse.file.write(start, Buf::copy_of(&bytes))).await?;
        for (grain, entry) in entries {
            sparse.set(&self.tables, grain, entry, Order::AfterData).await?;
        }
        self.tables.settle().await
    }
}

impl Sparse {
    /// Ends a stream: the marker behind its last grain.
    pub(super) async fn end_stream(&self) -> Result<(), Error> {
        let Some(writable) = self.writable.as_ref().filter(|_| self.shape.stream) else { return Ok(()) };
        let end = writable.append.get();
        self.file.write(end, Buf::zeroed(SECTOR as usize)).await?;
        self.note_used(end + SECTOR);
        Ok(())
    }
}
