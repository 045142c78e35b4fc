//! The allocation log: changes of tables that are acknowledged and not in the file yet, kept where they outlive the process and
//! not the host; and their replay.
//!
//! [`crate::metadata::Tables`] notes every change before anybody sees it, so an acknowledged allocation needs neither a write of
//! metadata nor a flush. Whoever opens the image next carries the log out first ([`replay`]); only then is the format's driver
//! asked. A log that was lost with the host is no loss: then the promise is the one for power loss, and the order in which tables
//! are written keeps that one.
//!
//! A log belongs to one [`crate::metadata::Tables`]: [`AllocationLog::release`] counts entries, whoever noted them.
//!
//! Entries are of whole words of eight bytes at multiples of eight, which no slice and no sector divides. So the entries of one word
//! are a chain: the old value of each is the new value of the one before it, and the file, wherever the process died, holds one of
//! these values. Anything else in the file was written by somebody who did not know of the log.

use std::collections::BTreeMap;
use std::rc::Rc;

use crate::driver::FileIndex;
use crate::error::{Error, ErrorKind};
use crate::file::{Buf, ImageFile};

/// Bytes of a word: what an entry is about.
pub const WORD: u64 = 8;
/// Words that lie in one stretch of this many bytes of a file are read and written together.
const STRETCH: u64 = 4096;
/// Stretches that are read or written at the same time.
const STRETCHES: usize = 32;

/// A change of a word of metadata that is acknowledged and may not be in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LogEntry {
    /// File of the driver.
    pub file: FileIndex,
    /// Byte offset in it, a multiple of [`WORD`].
    pub offset: u64,
    /// What the file held before, or would hold if all earlier entries were in it.
    pub old: [u8; 8],
    /// What it shall hold.
    pub new: [u8; 8],
}

/// The log has no room: changes have to be written back first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LogFull;

/// Where changes are kept that outlive the process and not the host.
pub trait AllocationLog: std::fmt::Debug {
    /// Notes a change.
    ///
    /// # Errors
    /// No room; nothing was noted.
    fn append(&self, entry: LogEntry) -> Result<(), LogFull> {
        self.append_all(&[entry])
    }

    /// Notes changes of several words that mean something together only: whenever the process dies, all of them are in the log or none.
    ///
    /// # Errors
    /// No room; nothing was noted.
    fn append_all(&self, entries: &[LogEntry]) -> Result<(), LogFull>;

    /// Entries that have room now.
    fn room(&self) -> usize;

    /// Entries that it can hold.
    fn capacity(&self) -> usize;

    /// Number of entries that were ever noted.
    fn position(&self) -> u64;

    /// All entries before `position` are in the file.
    fn release(&self, position: u64);
}

/// A word of a file of the image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Place {
    /// Index of the file, which exists.
    file: usize,
    offset: u64,
}

/// The entries of one word.
struct Chain {
    first: [u8; 8],
    values: Vec<[u8; 8]>,
}

impl Chain {
    fn last(&self) -> [u8; 8] {
        self.values.last().copied().unwrap_or(self.first)
    }

    fn has(&self, value: [u8; 8]) -> bool {
        self.first == value || self.values.contains(&value)
    }
}

fn hex(value: [u8; 8]) -> String {
    format!("{:#018x}", u64::from_be_bytes(value))
}

fn damaged(files: &[Rc<dyn ImageFile>], what: &str) -> Error {
    let name = files.first().map_or("the image", |file| file.name());
    let advice = "the log is kept; nothing was changed";
    Error::new(ErrorKind::Corrupt, format!("{name}: its allocation log {what}: {advice}"))
}

/// Sorts entries by their words. They are checked for what can be known without the files.
fn chains(entries: &[LogEntry], files: &[Rc<dyn ImageFile>]) -> Result<BTreeMap<Place, Chain>, Error> {
    let mut chains: BTreeMap<Place, Chain> = BTreeMap::new();
    for (number, entry) in entries.iter().enumerate() {
        let file = files.get(usize::from(entry.file.0));
        if file.is_none() || !entry.offset.is_multiple_of(WORD) {
            let what = format!(
                "has an entry {number} for offset {} of file {}, and the image has {} files",
                entry.offset,
                entry.file.0,
                files.len()
            );
            return Err(damaged(files, &what));
        }
        let place = Place { file: usize::from(entry.file.0), offset: entry.offset };
        let chain = chains.entry(place).or_insert_with(|| Chain { first: entry.old, values: Vec::new() });
        if chain.last() != entry.old {
            let what = format!(
                "says in entry {number} that offset {} held {}, and {} was noted before",
                entry.offset,
                hex(entry.old),
                hex(chain.last())
            );
            return Err(damaged(files, &what));
        }
        chain.values.push(entry.new);
    }
    Ok(chains)
}

/// Makes the files of an image hold what its log says, as they must before the image is opened. The order: what the entries point to
/// becomes durable; *all* words are looked at; only when each holds a value that the log knows is any written; the words
/// become durable. The caller then releases the entries. Doing it again, after an end at any point, comes to the same.
///
/// # Errors
/// A word holds a value that the log does not know, or the log contradicts itself: nothing was written, and the image must not be
/// served. Errors of the files.
pub async fn replay(entries: &[LogEntry], files: &[Rc<dyn ImageFile>]) -> Result<(), Error> {
    if entries.is_empty() {
        return Ok(());
    }
    let chains = chains(entries, files)?;
    for file in files {
        file.flush().await?;
    }
    let words: Vec<(Place, Chain)> = chains.into_iter().collect();
    let near = |a: &(Place, Chain), b: &(Place, Chain)| {
        a.0.file == b.0.file && a.0.offset / STRETCH == b.0.offset / STRETCH
    };
    let stretches: Vec<&[(Place, Chain)]> = words.chunk_by(near).collect();
    // A few bytes for each that changes: the whole log may be in as many stretches as it has entries.
    let mut changes: Vec<(Place, Vec<u8>)> = Vec::new();
    for some in stretches.chunks(STRETCHES) {
        let reads: Vec<_> = some
            .iter()
            .map(|words| {
                let (first, last) = (words[0].0, words[words.len() - 1].0);
                files[first.file].read(first.offset, (last.offset + WORD - first.offset) as usize)
            })
            .collect();
        for (words, read) in some.iter().zip(reads) {
            let found = read.await?;
            let wanted = carried_out(&found, words, files[words[0].0.file].name())?;
            if wanted[..] != found[..] {
                changes.push((words[0].0, wanted));
            }
        }
    }
    for some in changes.chunks(STRETCHES) {
        let writes: Vec<_> =
            some.iter().map(|(at, bytes)| files[at.file].write(at.offset, Buf::copy_of(bytes))).collect();
        for write in writes {
            write.await?;
        }
    }
    for file in files.iter().filter(|file| file.is_writable()) {
        file.flush().await?;
    }
    Ok(())
}

/// The bytes of a stretch, which begins with the first of `words`, with the last value of each word.
fn carried_out(found: &[u8], words: &[(Place, Chain)], name: &str) -> Result<Vec<u8>, Error> {
    let mut bytes = found.to_vec();
    for (place, chain) in words {
        let at = (place.offset - words[0].0.offset) as usize;
        let word = &mut bytes[at..at + WORD as usize];
        let mut value = [0; WORD as usize];
        value.copy_from_slice(word);
        if !chain.has(value) {
            return Err(foreign(name, place.offset, value, chain));
        }
        word.copy_from_slice(&chain.last());
    }
    Ok(bytes)
}

/// Somebody has written to the image who did not know of the log.
fn foreign(name: &str, offset: u64, found: [u8; 8], chain: &Chain) -> Error {
    let steps = chain.values.len();
    let first = hex(chain.first);
    let last = hex(chain.last());
    Error::corrupt(
        name,
        format!(
            "at offset {offset} it holds {}, and its allocation log of the daemon that died leads from {first} to {last} in {steps} \
             steps: another program has changed the image since. Nothing was written and the log is kept. If the image is to be \
             used as it is now, without the writes that only the log has, move its log aside and attach it again",
            hex(found)
        ),
    )
}

#[cfg(test)]
#[path = "allocation_log_tests.rs"]
mod tests;
