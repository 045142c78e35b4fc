//! Files of images, opened for a tool: the right kind of object, and locked as QEMU locks it.
//!
//! Invariants:
//! - A path is opened without side effects first (O_PATH); only regular files and block devices go further.
//! - The locks are on [`OpenFile::file`], a buffered descriptor that stays open as long as anything is done; descriptors for direct
//!   I/O are opened from it.

use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use formats::blocking::Blocking;

use super::failure::Failure;
use crate::files::FileKey;
use crate::files::device::Device;
use crate::files::holders;
use crate::files::locks::{self, Access};

/// What is wanted of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Want {
    /// Read; writers are kept out.
    Read,
    /// Read and write; everybody is kept out.
    Write,
    /// Read without a lock.
    Look,
}

/// A file, opened.
#[derive(Debug)]
pub struct OpenFile {
    /// Buffered; carries the locks.
    pub file: File,
    /// As it was named.
    pub path: PathBuf,
    /// Which file it is.
    pub key: FileKey,
    /// It may be written.
    pub writable: bool,
    /// No direct I/O.
    pub buffered: bool,
}

impl OpenFile {
    /// Opens and locks a path.
    ///
    /// # Errors
    /// No such file, no file that can hold an image, or somebody uses it.
    pub fn open(path: &Path, want: Want) -> Result<OpenFile, Failure> {
        let failed = |error: &std::io::Error| Failure::io(path, "open", error);
        let found =
            OpenOptions::new().read(true).custom_flags(libc::O_PATH).open(path).map_err(|e| failed(&e))?;
        let key = key_of(path, &found)?;
        let writable = want == Want::Write;
        let is_device = matches!(key, FileKey::Block { .. });
        // O_EXCL claims a device: nobody has mounted it or claims it later.
        let flags = if is_device && writable { libc::O_EXCL } else { 0 };
        let file = OpenOptions::new()
            .read(true)
            .write(writable)
            .custom_flags(flags)
            .open(format!("/proc/self/fd/{}", found.as_raw_fd()))
            .map_err(|error| match (error.raw_os_error(), key) {
                (Some(libc::EBUSY), FileKey::Block { device }) => {
                    Failure::new(format!("{} is in use: {}", path.display(), Device::new(device).users()))
                }
                _ => failed(&error),
            })?;
        let opened = OpenFile { file, path: path.to_owned(), key, writable, buffered: false };
        match want {
            Want::Read => opened.lock(Access::Read)?,
            Want::Write => opened.lock(Access::Write)?,
            Want::Look => {}
        }
        Ok(opened)
    }

    /// A file that this program has just made; nobody else can have it.
    pub fn made(file: File, path: &Path) -> Result<OpenFile, Failure> {
        let key = key_of(path, &file)?;
        let opened = OpenFile { file, path: path.to_owned(), key, writable: true, buffered: false };
        opened.lock(Access::Write)?;
        Ok(opened)
    }

    /// A block device.
    pub fn is_device(&self) -> bool {
        matches!(self.key, FileKey::Block { .. })
    }

    fn lock(&self, access: Access) -> Result<(), Failure> {
        let conflict = locks::take(&self.file, access).map_err(|error| {
            Failure::new(format!(
                "{}: its file system does not take locks: {error}; without them two programs could write one image",
                self.path.display()
            ))
        })?;
        let Some(conflict) = conflict else { return Ok(()) };
        let file = holders::name_in_own_lock(self.file.as_raw_fd());
        let holder = file.and_then(|file| holders::find(&file, conflict.byte));
        Err(Failure::new(format!(
            "{} is in use: {} {}; stop it first",
            self.path.display(),
            holder.map_or_else(
                || "another program (or this command, if it was named twice)".to_owned(),
                |holder| holder.to_string()
            ),
            conflict.what_they_do()
        )))
    }

    /// The file for work that may block, by its buffered descriptor.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn blocking(&self) -> Result<Rc<Blocking>, Failure> {
        let file = self.file.try_clone().map_err(|error| Failure::io(&self.path, "duplicate", &error))?;
        Ok(Blocking::new(file, &self.path.display().to_string(), self.writable)?)
    }

    /// Bytes that its file system holds for it; of a device, 0.
    pub fn allocated_bytes(&self) -> u64 {
        self.file.metadata().map_or(0, |stat| stat.blocks() * 512)
    }

    /// When it was changed last, seconds since 1970.
    pub fn modified(&self) -> Option<u64> {
        self.file.metadata().ok().and_then(|stat| u64::try_from(stat.mtime()).ok())
    }
}

fn key_of(path: &Path, file: &File) -> Result<FileKey, Failure> {
    let stat = file.metadata().map_err(|error| Failure::io(path, "fstat", &error))?;
    let kind = stat.file_type();
    let found = match () {
        () if kind.is_file() => return Ok(FileKey::Regular { device: stat.dev(), inode: stat.ino() }),
        () if kind.is_block_device() => return Ok(FileKey::Block { device: stat.rdev() }),
        () if kind.is_dir() => "a directory",
        () if kind.is_fifo() => "a FIFO",
        () if kind.is_socket() => "a socket",
        () if kind.is_char_device() => "a character device",
        () => "neither file nor device",
    };
    Err(Failure::new(format!(
        "{} is {found}; an image is a regular file or a block device: check the path",
        path.display()
    )))
}
