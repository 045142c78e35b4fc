//! Allocation logs (see [`formats::allocation_log`]) in mapped files of the run directory: an entry is safe against the death of the
//! process as soon as it is stored, without a system call.
//!
//! A log belongs to one image. It is made or found on the control side, when the image is opened for writing ([`LogFile::open`]);
//! the shard replays what it finds in it before it opens the image, and notes in it from then on. An image that was closed has an
//! empty log, which the control side removes ([`LogFile::remove_if_empty`]); a log with entries is removed by nobody, except when
//! it is of another boot of the host: then it is void.
//!
//! The file is allocated before it is mapped, so that no store to it can fail (SIGBUS), and gets its name when its header is
//! complete. `ring` has the bytes.

mod ring;
#[cfg(test)]
mod tests;

use std::cell::Cell;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use formats::allocation_log::{AllocationLog, LogEntry, LogFull};
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use ring::Words;
use ring_bridge::memory::SharedRegion;

/// Bytes of a log.
const BYTES: usize = ring::WORDS * 8;
/// Entries that a log can hold.
pub const ENTRIES: usize = ring::ENTRIES as usize;

/// Which image a log is of. What an image says of itself does not change while it is in use, but for its size, which grows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogIdentity {
    /// Device and inode of each file, in the driver's order; the inode of a block device is its number and its device 0. At most
    /// [`LogIdentity::FILES_MAX`].
    pub files: Vec<(u64, u64)>,
    /// Bytes of the disk.
    pub size: u64,
    /// Digest of the image's description.
    pub digest: u64,
    /// Path of the image, for messages.
    pub path: String,
}

impl LogIdentity {
    /// Files that a log can name.
    pub const FILES_MAX: usize = ring::FILES_MAX;

    /// What speaks against the image that is there now being the one that this log was made for.
    fn differs(&self, found: &LogIdentity) -> Option<String> {
        if self.files != found.files {
            return Some(format!(
                "its files are {:?} (device, inode), and were {:?}",
                found.files, self.files
            ));
        }
        if found.size < self.size {
            return Some(format!("its disk has {} bytes, and had {}", found.size, self.size));
        }
        (self.digest != found.digest).then(|| "its header says something else than it did".to_owned())
    }
}

/// A digest of text: for [`LogIdentity::digest`].
pub fn digest(text: &str) -> u64 {
    ring::checksum(text.bytes().map(u64::from))
}

/// Why there is no log.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// It cannot be made: the image can be served without it, with a write of metadata for each allocation.
    #[error("the allocation log {path} cannot be made: {source}", path = path.display())]
    Unavailable {
        /// The log.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// There is one, and it is not known to be of this image as it is now: the image must not be served.
    #[error(
        "the allocation log {path} holds acknowledged writes of {image} and does not fit it: {why}. If another program has changed or \
         replaced the image and it is to be used as it is now, without these writes, move the log aside (mv {path} {path}.aside) \
         and try again",
        path = path.display()
    )]
    Mismatch {
        /// The log.
        path: PathBuf,
        /// The image that it was made for.
        image: String,
        /// What was found and expected.
        why: String,
    },
}

/// The boot of the host: a log of another one is void.
fn boot_id() -> io::Result<[u64; 2]> {
    let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    let digits: String = text.trim().chars().filter(|c| *c != '-').collect();
    let number = u128::from_str_radix(&digits, 16).map_err(io::Error::other)?;
    Ok([(number >> 64) as u64, number as u64])
}

/// A log with entries of this boot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LiveLog {
    /// Its file.
    pub path: PathBuf,
    /// The image that it was made for, as it was named.
    pub image: String,
    /// Entries in it.
    pub entries: usize,
}

impl std::fmt::Display for LiveLog {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let LiveLog { path, image, entries } = self;
        write!(
            f,
            "acknowledged writes to {image} are not in it yet: {entries} changes of its tables are in the allocation log {} only; \
             attach it for writing with `blktapd ctl attach` and detach it, which carries them out; if the image is to be used without \
             these writes, move the log aside",
            path.display()
        )
    }
}

/// Looks at the log at `path`, if there is one: what it says, when it holds entries of this boot. Blocks; changes nothing; the log may
/// be in use.
///
/// # Errors
/// It cannot be read. A file that is no log is taken for one that holds something.
pub fn live(path: &Path) -> io::Result<Option<LiveLog>> {
    let mut file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let mut bytes = vec![0; BYTES];
    let read = file.read_exact(&mut bytes);
    let words: Vec<u64> =
        bytes.chunks_exact(8).map(|word| word.try_into().map_or(0, u64::from_ne_bytes)).collect();
    let words = Copied(words);
    let unknown = LiveLog { path: path.to_owned(), image: "an image".to_owned(), entries: 0 };
    match ring::read_header(&words) {
        _ if read.is_err() => Ok(Some(unknown)),
        None => Ok(Some(unknown)),
        Some((boot, _)) if boot != boot_id()? => Ok(None),
        Some((_, identity)) => {
            let entries = ring::scan(&words).1.len();
            Ok((entries > 0).then(|| LiveLog { path: path.to_owned(), image: identity.path, entries }))
        }
    }
}

/// A log that was read.
struct Copied(Vec<u64>);

impl Words for Copied {
    fn load(&self, word: usize) -> u64 {
        self.0.get(word).copied().unwrap_or(0)
    }

    fn store(&self, _: usize, _: u64) {}
}

struct Mapped(SharedRegion);

impl Words for Mapped {
    fn load(&self, word: usize) -> u64 {
        self.0.word(word * 8).map_or(0, |word| word.load(Ordering::Acquire))
    }

    fn store(&self, word: usize, value: u64) {
        // Every word of the log is in its region.
        if let Ok(word) = self.0.word(word * 8) {
            word.store(value, Ordering::Release);
        }
    }
}

/// A log, mapped. One `Log` at a time notes in it.
pub struct LogFile {
    words: Mapped,
    path: PathBuf,
}

impl std::fmt::Debug for LogFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "LogFile({})", self.path.display())
    }
}

impl LogFile {
    /// Finds the log of an image at `path`, or makes an empty one. One that is empty or void is made anew. The caller has the image
    /// locked for writing. Blocks.
    ///
    /// # Errors
    /// See [`LogError`]; what was there is as it was.
    pub fn open(path: &Path, identity: &LogIdentity) -> Result<LogFile, LogError> {
        let unavailable = |source| LogError::Unavailable { path: path.to_owned(), source };
        let mismatch = |image: &str, why: String| {
            let (path, image) = (path.to_owned(), image.to_owned());
            LogError::Mismatch { path, image, why }
        };
        let boot = boot_id().map_err(unavailable)?;
        let found = match OpenOptions::new().read(true).write(true).open(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(mismatch("an image", format!("it cannot be opened: {error}"))),
            Ok(file) => Some(map(&file).map_err(|error| mismatch("an image", error.to_string()))?),
        };
        if let Some(words) = found {
            let Some((of, noted)) = ring::read_header(&words) else {
                return Err(mismatch("an image", "it is no log of this version, or damaged".to_owned()));
            };
            if of == boot && !ring::scan(&words).1.is_empty() {
                return match noted.differs(identity) {
                    None => Ok(LogFile { words, path: path.to_owned() }),
                    Some(why) => Err(mismatch(&noted.path, why)),
                };
            }
        }
        let words = create(path, identity, boot).map_err(unavailable)?;
        Ok(LogFile { words, path: path.to_owned() })
    }

    /// Entries in it now.
    pub fn entries(&self) -> Vec<LogEntry> {
        ring::scan(&self.words).1
    }

    /// Removes its file if it has no entries; true when it is gone. To be called while the image is still locked, and by the last
    /// who has the log. Blocks.
    pub fn remove_if_empty(&self) -> io::Result<bool> {
        if !self.entries().is_empty() {
            return Ok(false);
        }
        match std::fs::remove_file(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(true),
        }
    }

    /// Its file.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

fn map(file: &File) -> io::Result<Mapped> {
    SharedRegion::map(file, BYTES).map(Mapped).map_err(io::Error::other)
}

/// Makes an empty log: under another name until its header is complete.
fn create(path: &Path, identity: &LogIdentity, boot: [u64; 2]) -> io::Result<Mapped> {
    if identity.files.len() > ring::FILES_MAX {
        return Err(io::Error::other(format!("the image has {} files", identity.files.len())));
    }
    let new = path.with_extension("new");
    let made = || {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(true).mode(0o600);
        let mut file = options.open(&new)?;
        let header: Vec<u8> =
            ring::header(identity, boot).iter().flat_map(|word| word.to_ne_bytes()).collect();
        match fallocate(&file, FallocateFlags::empty(), 0, BYTES as i64) {
            // Without fallocate zeroes take the space.
            Err(Errno::EOPNOTSUPP) => {
                file.write_all(&vec![0; BYTES])?;
                io::Seek::rewind(&mut file)?;
            }
            other => other?,
        }
        file.write_all(&header)?;
        let words = map(&file)?;
        std::fs::rename(&new, path)?;
        Ok(words)
    };
    made().inspect_err(|_| {
        // It has taken space that others may need.
        let _ = std::fs::remove_file(&new);
    })
}

/// A log in the hands of the driver that notes in it.
#[derive(Debug)]
pub(crate) struct Log {
    file: Arc<LogFile>,
    position: Cell<u64>,
    released: Cell<u64>,
}

impl Log {
    /// Takes a log up, and what is in it.
    pub fn new(file: Arc<LogFile>) -> (Log, Vec<LogEntry>) {
        let (first, entries) = ring::scan(&file.words);
        let position = first + entries.len() as u64;
        ring::wipe_behind(&file.words, first, position);
        // An idle disk needs none of its pages.
        file.words.0.drop_pages();
        (Log { file, position: Cell::new(position), released: Cell::new(first) }, entries)
    }
}

impl AllocationLog for Log {
    fn append_all(&self, entries: &[LogEntry]) -> Result<(), LogFull> {
        if self.room() < entries.len() {
            return Err(LogFull);
        }
        let number = self.position.get();
        ring::append_all(&self.file.words, number, entries);
        self.position.set(number + entries.len() as u64);
        Ok(())
    }

    fn room(&self) -> usize {
        ENTRIES - (self.position.get() - self.released.get()) as usize
    }

    fn capacity(&self) -> usize {
        ENTRIES
    }

    fn position(&self) -> u64 {
        self.position.get()
    }

    fn release(&self, position: u64) {
        assert!(position <= self.position.get(), "released behind the last entry");
        if position > self.released.get() {
            ring::release(&self.file.words, position);
            self.released.set(position);
        }
    }
}
