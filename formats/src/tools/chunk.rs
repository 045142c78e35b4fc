//! The memory of one step of a tool, as the payload of requests. Bytes that arrive or leave as a whole are not copied.

use std::cell::RefCell;
use std::ops::Range;

use crate::error::Error;
use crate::file::{Buf, Pending};
use crate::volume::{FileId, Payload, Volume};

/// See the module. Its bytes may be written once: a write of all of them gives them away.
pub(super) struct Chunk<'a> {
    volume: &'a Volume,
    bytes: RefCell<Buf>,
    len: usize,
}

impl<'a> Chunk<'a> {
    /// `len` zeroes, for requests on `volume`.
    pub(super) fn new(volume: &'a Volume, len: usize) -> Chunk<'a> {
        // A read of one piece brings its own memory.
        Chunk { volume, bytes: RefCell::new(Buf::zeroed(0)), len }
    }

    /// These bytes, for requests on `volume`.
    pub(super) fn of(volume: &'a Volume, bytes: Buf) -> Chunk<'a> {
        Chunk { volume, len: bytes.len(), bytes: RefCell::new(bytes) }
    }

    /// The bytes.
    pub(super) fn into_bytes(self) -> Buf {
        let len = self.len;
        let mut bytes = self.bytes.into_inner();
        if bytes.len() < len {
            bytes = Buf::zeroed(len);
        }
        bytes
    }

    fn is_whole(&self, at: usize, len: usize) -> bool {
        at == 0 && len == self.len
    }

    fn change(&self, change: impl FnOnce(&mut Buf)) {
        let mut bytes = self.bytes.borrow_mut();
        if bytes.len() < self.len {
            *bytes = Buf::zeroed(self.len);
        }
        change(&mut bytes);
    }
}

fn no_file<'a, T: 'a>() -> Pending<'a, T> {
    Box::pin(std::future::ready(Err(Error::invalid("a driver named a file that it does not have"))))
}

impl Payload for Chunk<'_> {
    fn read(&self, file: FileId, offset: u64, at: usize, len: usize) -> Pending<'_, ()> {
        let Some(file) = self.volume.file(file) else { return no_file() };
        let read = file.read_lent(offset, len);
        Box::pin(async move {
            self.put(at, read.await?);
            Ok(())
        })
    }

    fn write(&self, file: FileId, offset: u64, at: usize, len: usize) -> Pending<'_, ()> {
        let Some(file) = self.volume.file(file) else { return no_file() };
        let bytes = match self.is_whole(at, len) {
            true => self.bytes.replace(Buf::zeroed(0)),
            false => Buf::copy_of(&self.bytes.borrow()[at..at + len]),
        };
        file.write(offset, bytes)
    }

    fn put(&self, at: usize, bytes: Buf) {
        if self.is_whole(at, bytes.len()) {
            self.bytes.replace(bytes);
            return;
        }
        self.change(|memory| memory[at..at + bytes.len()].copy_from_slice(&bytes));
    }

    fn get(&self, at: usize, len: usize) -> Pending<'_, Buf> {
        let bytes = Buf::copy_of(&self.bytes.borrow()[at..at + len]);
        Box::pin(std::future::ready(Ok(bytes)))
    }

    fn zero(&self, at: usize, len: usize) {
        // Memory that no read has brought is zero.
        if self.bytes.borrow().len() == self.len {
            self.change(|memory| memory[at..at + len].fill(0));
        }
    }
}

/// Reads `len` bytes at `offset`; behind the end of the disk there are zeroes.
pub(super) async fn read(volume: &Volume, offset: u64, len: usize) -> Result<Buf, Error> {
    let inside = volume.size().saturating_sub(offset).min(len as u64);
    let chunk = Chunk::new(volume, inside as usize);
    if inside > 0 {
        volume.read(offset, inside, &chunk).await?;
    }
    let bytes = chunk.into_bytes();
    if bytes.len() == len {
        return Ok(bytes);
    }
    let mut longer = Buf::zeroed(len);
    longer[..bytes.len()].copy_from_slice(&bytes);
    Ok(longer)
}

/// Writes bytes at `offset`.
pub(super) async fn write(volume: &Volume, offset: u64, bytes: Buf) -> Result<(), Error> {
    let len = bytes.len() as u64;
    volume.write(offset, len, &Chunk::of(volume, bytes)).await
}

/// Cuts `len` bytes at `offset` of a disk into runs of aligned units that are alike: the bytes of each run, and what it is.
pub(super) fn runs(
    offset: u64,
    len: usize,
    unit: u64,
    what: impl Fn(Range<usize>) -> bool,
) -> Vec<(Range<usize>, bool)> {
    let mut runs: Vec<(Range<usize>, bool)> = Vec::new();
    let mut at = 0;
    while at < len {
        let to_border = unit - (offset + at as u64) % unit;
        let end = len.min(at + to_border as usize);
        let kind = what(at..end);
        match runs.last_mut() {
            Some(last) if last.1 == kind => last.0.end = end,
            _ => runs.push((at..end, kind)),
        }
        at = end;
    }
    runs
}

/// The unit in which a tool looks for bytes that need not be written to a disk.
pub(super) fn unit_of(target: &Volume) -> u64 {
    target.granule().clamp(4096, super::CHUNK)
}
