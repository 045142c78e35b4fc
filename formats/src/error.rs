//! What can go wrong with an image: a small kind to match, and a sentence for the operator.

use std::fmt;

/// What kind of problem an [`Error`] is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorKind {
    /// The image breaks the rules of its format: what was found cannot be trusted.
    Corrupt,
    /// The image is sound, and uses something that this program does not do.
    Unsupported,
    /// The image is of another format.
    WrongFormat,
    /// The request makes no sense (a size, an option, a range).
    Invalid,
    /// The image must not be changed: opened read-only.
    ReadOnly,
    /// The store is full.
    NoSpace,
    /// The store failed; the number is the errno.
    Io(i32),
    /// Something that the image refers to (parent, data file, snapshot) is missing or is not what it was.
    Missing,
}

/// Why an operation on an image failed.
///
/// The message names the file, what was found, what was expected and what to do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Error {
    /// For callers to match.
    pub kind: ErrorKind,
    /// For the operator.
    pub message: String,
}

impl Error {
    /// An error of a kind.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Error {
        Error { kind, message: message.into() }
    }

    /// The image `name` is damaged: `what` says which structure, what it holds and what it should hold.
    pub fn corrupt(name: &str, what: impl fmt::Display) -> Error {
        Error::new(ErrorKind::Corrupt, format!("{name} is damaged: {what}"))
    }

    /// The image `name` needs something that this program does not do.
    pub fn unsupported(name: &str, what: impl fmt::Display) -> Error {
        Error::new(ErrorKind::Unsupported, format!("{name} is not supported: {what}"))
    }

    /// A request that makes no sense.
    pub fn invalid(message: impl Into<String>) -> Error {
        Error::new(ErrorKind::Invalid, message)
    }

    /// An operation of the store on the file `name` failed with an errno. `what` is the operation (`read of 512 bytes at 0`).
    pub fn io(name: &str, what: impl fmt::Display, errno: i32) -> Error {
        let cause = std::io::Error::from_raw_os_error(errno);
        // ENOSPC and EDQUOT have the same numbers on every Linux.
        let kind = if matches!(errno, 28 | 122) { ErrorKind::NoSpace } else { ErrorKind::Io(errno) };
        Error::new(kind, format!("{name}: {what} failed: {cause}"))
    }

    /// The errno that a guest's request is answered with.
    pub fn errno(&self) -> i32 {
        match self.kind {
            ErrorKind::Io(errno) => errno,
            ErrorKind::NoSpace => 28,
            ErrorKind::ReadOnly => 1,
            ErrorKind::Invalid => 22,
            ErrorKind::Unsupported => 95,
            ErrorKind::Corrupt | ErrorKind::WrongFormat | ErrorKind::Missing => 5,
        }
    }

    /// The same error with words before it.
    #[must_use]
    pub fn context(mut self, before: &str) -> Error {
        self.message = format!("{before}: {}", self.message);
        self
    }
}
