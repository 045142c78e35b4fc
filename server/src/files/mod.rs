//! Image files as the control side sees them: paths, locks, and the one table of open files of the process.
//!
//! Why it exists: a path can hang for ever (a dead NFS mount), can name something that is no disk (a FIFO, a
//! tape), can lead out of the directories that an administrator allowed, or can name an image that somebody
//! else writes to. All of that is settled here, before a shard sees a descriptor.
//!
//! Invariants:
//! - A path is touched, and a descriptor of an image is closed, only on a thread of that mount's lane
//!   ([`lanes`]), never on the control thread and never on a shard. A mount that hangs keeps its own few
//!   threads and nothing else.
//! - There is one open file description for I/O per file ([`table`]); it carries the locks ([`locks`]), so
//!   that the kernel takes them back when the last operation on it has ended, and not before.
//! - Nothing here changes the contents of an image.

pub mod device;
pub mod doctor;
pub mod holders;
pub mod image;
pub mod lanes;
pub mod locks;
pub mod mounts;
pub mod opener;
pub mod table;

pub use image::{Born, Geometry, ImageOptions};
pub use locks::Fence;
pub use table::{FileEntry, FileState, Files, OpenRequest, Opened, Released};

use std::io;
use std::path::Path;

use nix::errno::Errno;

/// Which file, whatever it is called: what two paths to one image have in common.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum FileKey {
    /// A regular file.
    Regular {
        /// `st_dev`.
        device: u64,
        /// `st_ino`.
        inode: u64,
    },
    /// A block device or partition: the same one through any device node.
    Block {
        /// `st_rdev`.
        device: u64,
    },
}

/// Why a file could not be opened, locked or measured: a small kind and a sentence for the operator.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct OpenError {
    /// For exit codes and HTTP status.
    pub kind: OpenErrorKind,
    /// Names the path, what was found, what was expected and what to do.
    pub message: String,
}

/// Kinds of [`OpenError`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum OpenErrorKind {
    /// A component of the path does not exist.
    NotFound,
    /// The kernel does not let this process do it, or the medium is read-only.
    Permission,
    /// Somebody else has it: another disk, another program, a mounted file system.
    Busy,
    /// Outside the configured directories.
    OutsideRoots,
    /// The file system or device cannot do what was asked (O_DIRECT, locks).
    Unsupported,
    /// No answer before the deadline.
    Timeout,
    /// The request makes no sense for this object (a FIFO, an empty file, a wrong sector size).
    Invalid,
    /// Anything else that the kernel answered.
    Io,
}

impl OpenError {
    pub(crate) fn new(kind: OpenErrorKind, message: impl Into<String>) -> Self {
        OpenError { kind, message: message.into() }
    }

    /// What the kernel answered when `doing` was tried on `path`.
    pub(crate) fn from_io(path: &Path, doing: &str, error: &io::Error) -> Self {
        let errno = error.raw_os_error().map(Errno::from_raw);
        let (kind, hint) = match errno {
            Some(Errno::ENOENT | Errno::ENOTDIR) => (OpenErrorKind::NotFound, "check the path"),
            Some(Errno::EACCES | Errno::EPERM) => (
                OpenErrorKind::Permission,
                "check owner, mode and attributes, and the unit's sandbox settings",
            ),
            Some(Errno::EROFS) => {
                (OpenErrorKind::Permission, "the medium is read-only: attach it with --read-only")
            }
            Some(Errno::EBUSY | Errno::ETXTBSY) => (OpenErrorKind::Busy, "somebody else uses it"),
            Some(Errno::ENXIO | Errno::ENODEV) => {
                (OpenErrorKind::NotFound, "there is no device or medium behind this node")
            }
            Some(Errno::ELOOP) => (OpenErrorKind::Invalid, "too many symbolic links, or links in a circle"),
            Some(Errno::ENAMETOOLONG) => {
                (OpenErrorKind::Invalid, "a name may have 255 bytes and a path 4095")
            }
            Some(Errno::EMFILE | Errno::ENFILE) => {
                (OpenErrorKind::Io, "raise the limit of open files (LimitNOFILE= in the unit)")
            }
            Some(Errno::ESTALE) => (OpenErrorKind::Io, "the server has lost this file: mount it again"),
            _ => (OpenErrorKind::Io, "see the kernel's log"),
        };
        OpenError::new(kind, format!("{}: {doing}: {error}; {hint}", path.display()))
    }
}
