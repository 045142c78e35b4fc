//! Encrypted VHDs of XenServer's tapdisk: AES-XTS over the sectors that are there; tables and bitmaps are not encrypted.
//!
//! Facts from tapdisk's sources (drivers/crypto, vhd/lib, BSD licence): the key has 256 or 512 bits, for AES-128 or AES-256. A
//! sector's vector is its number on the disk, of which 32 bits count (`xts-plain`). The batmap's header says that a disk is encrypted
//! and how a key is known for the right one: its *key hash*, SHA-256 of a nonce and the key. Each image of a chain has its own.
//!
//! A sector that is not there is not encrypted, so a new block has no bits set, with or without a parent, and zeroes are written.

use std::rc::Rc;

use sha2::Digest;
use subtle::ConstantTimeEq;

use super::batmap;
use super::footer::SECTOR;
use super::layout::Layout;
use crate::crypt::cipher::{Cipher, Mode, SECTOR_BYTES, Vectors};
use crate::crypt::{CountsFrom, PayloadCipher, Secret, options};
use crate::driver::Encryption;
use crate::error::Error;
use crate::file::ImageFile;

use batmap::KeyHash;

/// AES-XTS, the only method that tapdisk has by itself; others come from libraries of a site.
const AES_XTS: u8 = 1;

/// The key hash of an encrypted image. A batmap that is damaged otherwise has it all the same.
pub(super) async fn key_hash(file: &Rc<dyn ImageFile>, layout: &Layout) -> Result<Option<KeyHash>, Error> {
    let Some(header) = layout.header.as_ref().filter(|_| batmap::may_have_one(&layout.footer)) else {
        return Ok(None);
    };
    let bytes = file.read(batmap::header_offset(header), SECTOR as usize).await?;
    let Some(found) = batmap::BatmapHeader::of(&bytes) else { return Ok(None) };
    match found.key_hash.method {
        0 => Ok(None),
        AES_XTS => Ok(Some(found.key_hash)),
        other => {
            let what =
                format!("it is encrypted with method {other} of tapdisk; {AES_XTS} (AES-XTS) is known");
            Err(Error::unsupported(file.name(), what))
        }
    }
}

/// The encryption, for people.
pub(super) fn in_words() -> Encryption {
    Encryption { words: "tapdisk AES-XTS, a key of 256 or 512 bits".to_owned(), warning: None }
}

/// See [`crate::driver::Format::unlock`]: the key is given as it is.
pub(super) async fn unlock(file: Rc<dyn ImageFile>, key: &Secret) -> Result<Secret, Error> {
    let name = file.name().to_owned();
    let Some(expected) = key_hash(&file, &Layout::read(&file).await?).await? else {
        return Err(Error::invalid(format!("{name} is not encrypted: take its key away")));
    };
    if !matches!(key.bytes().len(), 32 | 64) {
        let message = format!(
            "{name}: the key has {} bytes: tapdisk's keys have 32 or 64, as they are in its key files",
            key.bytes().len()
        );
        return Err(Error::invalid(message));
    }
    let hash = sha2::Sha256::new().chain_update(expected.nonce).chain_update(key.bytes()).finalize();
    if !bool::from(hash[..].ct_eq(&expected.hash[..])) {
        return Err(Error::invalid(format!(
            "{name}: the key is not the one of its key hash: give it the right one"
        )));
    }
    Ok(key.clone())
}

/// The cipher of an image, with its key.
pub(super) async fn cipher(
    file: &Rc<dyn ImageFile>,
    layout: &Layout,
    key: Option<&Secret>,
) -> Result<Option<PayloadCipher>, Error> {
    if key_hash(file, layout).await?.is_none() {
        return Ok(None);
    }
    let key = key.ok_or_else(|| options::key_missing(file.name()))?.bytes();
    let (mode, vectors) = (Mode::Xts, Vectors::Plain);
    let cipher = Cipher { mode, vectors, key_bytes: key.len(), sector_bytes: SECTOR_BYTES }.with_key(key);
    let cipher = cipher.map_err(|what| Error::invalid(format!("{}: {what}", file.name())))?;
    Ok(Some(PayloadCipher::new(cipher, CountsFrom::Disk)))
}
