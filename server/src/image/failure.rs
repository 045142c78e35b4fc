//! Why a command of `image` ended, and with which exit code.

use std::path::Path;

use formats::error::{Error, ErrorKind};

/// Wrong usage (EX_USAGE of sysexits.h): no finding of any command has this number.
pub const USAGE: u8 = 64;

/// A failure: a sentence for the operator.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    /// The command line cannot be right, whatever the files hold.
    pub is_usage: bool,
    /// What the format's code said, if it was that.
    pub kind: Option<ErrorKind>,
    /// Names the thing, what was found, what was expected and what to do.
    pub message: String,
}

impl Failure {
    /// The command line is wrong.
    pub fn usage(message: impl Into<String>) -> Failure {
        Failure { is_usage: true, kind: None, message: message.into() }
    }

    /// Something is not as it has to be.
    pub fn new(message: impl Into<String>) -> Failure {
        Failure { is_usage: false, kind: None, message: message.into() }
    }

    /// What the kernel answered when `doing` was tried on `path`.
    pub fn io(path: &Path, doing: &str, error: &std::io::Error) -> Failure {
        Failure::new(crate::files::OpenError::from_io(path, doing, error).message)
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Failure {
        Failure { is_usage: false, kind: Some(error.kind), message: error.message }
    }
}
