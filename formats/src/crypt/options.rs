//! Options of new encrypted images, the same for all formats: `cipher`, `key-bits`, `hash`, `iter-time`.

use std::time::Duration;

use super::Secret;
use super::cipher::Cipher;
use super::derive::{Hash, ITERATIONS_MIN};
use super::luks1::New;
use crate::error::{Error, ErrorKind};

/// Their names, for messages.
pub const KNOWN: &str = "cipher, key-bits, hash and iter-time";

/// What was asked for.
#[derive(Debug, Clone)]
pub struct LuksOptions {
    cipher: String,
    key_bits: usize,
    hash: Hash,
    iter_time: Duration,
}

impl Default for LuksOptions {
    /// What cryptsetup and QEMU choose: AES-XTS with two keys of 256 bits, SHA-256, two seconds of work for who tries a passphrase.
    fn default() -> LuksOptions {
        LuksOptions {
            cipher: "aes-xts-plain64".into(),
            key_bits: 512,
            hash: Hash::Sha256,
            iter_time: Duration::from_millis(2000),
        }
    }
}

impl LuksOptions {
    /// Takes an option. False: it is none of these.
    ///
    /// # Errors
    /// The value makes no sense.
    pub fn take(&mut self, name: &str, value: &str) -> Result<bool, Error> {
        let bad = |expected: &str| Error::invalid(format!("option {name} is {value:?}: expected {expected}"));
        match name {
            "cipher" => self.cipher = value.to_owned(),
            "key-bits" => {
                self.key_bits = value.parse().map_err(|_| bad("128, 256 or 512"))?;
            }
            "hash" => self.hash = Hash::named(value).map_err(|_| bad("sha1, sha256 or sha512"))?,
            "iter-time" => {
                let ms = value.parse().ok().filter(|ms| (1..=60_000).contains(ms));
                self.iter_time = Duration::from_millis(ms.ok_or_else(|| bad("milliseconds, 1 to 60000"))?);
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// What the header is made of, without a look at what this machine can do.
    ///
    /// # Errors
    /// Cipher and key do not fit.
    pub fn layout(&self, payload_align: u64) -> Result<New, Error> {
        let (name, mode) = self.cipher.split_once('-').unwrap_or((&self.cipher, ""));
        let cipher = Cipher::named(name, mode, self.key_bits / 8)
            .map_err(|what| Error::invalid(format!("the new image cannot be encrypted so: {what}")))?;
        Ok(New { cipher, hash: self.hash, iterations: ITERATIONS_MIN, payload_align })
    }

    /// The header, with as many iterations as this machine does in the time that was asked for.
    ///
    /// # Errors
    /// As [`LuksOptions::layout`].
    pub fn measured(&self, payload_align: u64) -> Result<New, Error> {
        let mut new = self.layout(payload_align)?;
        new.iterations = self.hash.iterations_in(self.iter_time, new.cipher.key_bytes);
        Ok(new)
    }
}

/// The passphrase of an image that is to be made.
///
/// # Errors
/// None was given.
pub fn passphrase(key: Option<&Secret>) -> Result<&Secret, Error> {
    key.ok_or_else(|| {
        let message = "an encrypted image needs a key: name one with key-file=, like luks:/srv/a.luks?key-file=/etc/keys/a";
        Error::new(ErrorKind::Invalid, message)
    })
}

/// What to say of an image that needs a key and got none.
pub fn key_missing(name: &str) -> Error {
    let message = format!(
        "{name} is encrypted and no key was given: name the file that has it with key-file=, like TYPE:PATH?key-file=/etc/keys/a"
    );
    Error::new(ErrorKind::Missing, message)
}
