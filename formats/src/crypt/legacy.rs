//! The encryption of qcow before LUKS: AES-128 in CBC mode with the passphrase as its key, for old images. Sectors count from the disk's
//! first byte.
//!
//! It is weak in every respect: the key is as easy to guess as the passphrase, whoever knows a part of the contents can find the same
//! contents elsewhere, and nothing shows that a key is wrong. Images are read and written, and none are made.

use super::cipher::{Cipher, Mode, SECTOR_BYTES, Vectors};
use super::{CountsFrom, PayloadCipher, Secret};
use crate::driver::Encryption;
use crate::error::Error;

const KEY_BYTES: usize = 16;

/// What an operator should know.
pub const WARNING: &str = "it uses the AES encryption of old qcow images, which protects little and cannot tell a wrong key: convert it \
to qcow2 with encrypt.format=luks";

/// The encryption, for people.
pub fn in_words() -> Encryption {
    Encryption {
        words: "AES-128 cbc-plain64, a passphrase as key (old, weak)".to_owned(),
        warning: Some(WARNING),
    }
}

/// The key of a passphrase: its first 16 bytes, with zeroes behind a shorter one.
///
/// # Errors
/// It is empty.
pub fn unlock(passphrase: &Secret) -> Result<Secret, Error> {
    let given = passphrase.bytes();
    if given.is_empty() {
        return Err(Error::invalid("the key is empty"));
    }
    let mut key = zeroize::Zeroizing::new(vec![0; KEY_BYTES]);
    let used = given.len().min(KEY_BYTES);
    key[..used].copy_from_slice(&given[..used]);
    Ok(Secret::of(key))
}

/// The cipher of the payload, with a key of [`unlock`].
///
/// # Errors
/// It is no such key.
pub fn cipher(key: &Secret) -> Result<PayloadCipher, Error> {
    let cipher = Cipher {
        mode: Mode::Cbc,
        vectors: Vectors::Plain64,
        key_bytes: KEY_BYTES,
        sector_bytes: SECTOR_BYTES,
    };
    let cipher = cipher.with_key(key.bytes()).map_err(Error::invalid)?;
    Ok(PayloadCipher::new(cipher, CountsFrom::Disk))
}
