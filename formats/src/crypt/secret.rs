//! Keys and passphrases in memory.

use std::sync::Arc;

use zeroize::Zeroizing;

/// Longest passphrase or key that is taken, in bytes.
pub const SECRET_MAX_BYTES: usize = 64 << 10;

/// A passphrase or a key: shared rather than copied, overwritten when its last user drops it, and never shown.
#[derive(Clone)]
pub struct Secret(Arc<Zeroizing<Vec<u8>>>);

impl Secret {
    /// Takes the bytes. Memory that they were read into is the caller's to overwrite: best hand over the very vector that was read.
    pub fn new(bytes: Vec<u8>) -> Secret {
        Secret(Arc::new(Zeroizing::new(bytes)))
    }

    /// Takes bytes that are overwritten by themselves.
    pub fn of(mut bytes: Zeroizing<Vec<u8>>) -> Secret {
        Secret(Arc::new(Zeroizing::new(std::mem::take(&mut *bytes))))
    }

    /// `len` bytes that nobody can guess.
    ///
    /// # Errors
    /// The kernel gives none.
    pub fn random(len: usize) -> Result<Secret, crate::error::Error> {
        let mut bytes = Zeroizing::new(vec![0; len]);
        random(&mut bytes)?;
        Ok(Secret::of(bytes))
    }

    /// The bytes, for a cipher.
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secret(not shown)")
    }
}

/// Fills memory with bytes that nobody can guess.
///
/// # Errors
/// The kernel gives none.
pub(crate) fn random(bytes: &mut [u8]) -> Result<(), crate::error::Error> {
    getrandom::fill(bytes).map_err(|error| {
        let message = format!("the kernel gives no random bytes for a key: {error}");
        crate::error::Error::new(crate::error::ErrorKind::Io(5), message)
    })
}
