//! Encrypted images: which method, and what the driver does with payload itself.
//!
//! | method | header | sectors count from |
//! |---|---|---|
//! | 0 | none | |
//! | 1, AES-CBC of version 1 | none: the key is the passphrase | the disk's first byte |
//! | 2, LUKS1 | a LUKS header with its stripes, in clusters of its own | the file's first byte |
//!
//! Clusters that are compressed are not encrypted, whatever the method.

use std::rc::Rc;

use super::header::{CryptMethod, Header};
use super::image::Image;
use crate::crypt::luks1::{self, HEADER_BYTES};
use crate::crypt::{CountsFrom, PayloadCipher, Secret, Spot, legacy, options};
use crate::driver::Encryption;
use crate::error::Error;
use crate::file::{Buf, ImageFile};

/// The LUKS header of an image, if it has one.
async fn luks_of(file: &Rc<dyn ImageFile>, header: &Header) -> Result<Option<luks1::Header>, Error> {
    let Some(area) = header.luks_area() else { return Ok(None) };
    let bytes = file.read(area.start, HEADER_BYTES).await?;
    luks1::Header::parse(file.name(), &bytes, area.end - area.start).map(Some)
}

/// The encryption of an image, and its properties for people.
pub(super) async fn describe(
    file: &Rc<dyn ImageFile>,
    header: &Header,
) -> Result<(Option<Encryption>, Vec<(&'static str, String)>), Error> {
    if header.encryption == CryptMethod::Aes {
        return Ok((Some(legacy::in_words()), Vec::new()));
    }
    let Some(luks) = luks_of(file, header).await? else { return Ok((None, Vec::new())) };
    let properties = vec![("hash", luks.hash.name().to_owned()), ("key_slots", luks.slots_in_words())];
    Ok((Some(Encryption { words: luks.in_words(), warning: None }), properties))
}

/// See [`crate::driver::Format::unlock`].
pub(super) async fn unlock(file: Rc<dyn ImageFile>, passphrase: &Secret) -> Result<Secret, Error> {
    let header = Header::read(&file).await?;
    match luks_of(&file, &header).await? {
        Some(luks) => {
            let start = header.luks_area().unwrap_or_default().start;
            luks.unlock(file.name(), passphrase, |offset, len| file.read(start + offset, len)).await
        }
        None if header.encryption == CryptMethod::Aes => legacy::unlock(passphrase),
        None => Err(Error::invalid(format!("{} is not encrypted: take its key away", file.name()))),
    }
}

/// The cipher of an image, with its key.
pub(super) async fn cipher(
    file: &Rc<dyn ImageFile>,
    header: &Header,
    key: Option<&Secret>,
) -> Result<Option<PayloadCipher>, Error> {
    if header.encryption == CryptMethod::Plain {
        return Ok(None);
    }
    let key = key.ok_or_else(|| options::key_missing(file.name()))?;
    Ok(Some(match luks_of(file, header).await? {
        Some(luks) => {
            let cipher = luks.cipher.with_key(key.bytes());
            let cipher = cipher.map_err(|what| Error::invalid(format!("{}: {what}", file.name())))?;
            PayloadCipher::new(cipher, CountsFrom::File)
        }
        None => legacy::cipher(key)?,
    }))
}

impl Image {
    /// Makes a part of a place read as zero. `spot` is where it begins.
    pub async fn clear_place(&self, spot: Spot, bytes: u64) -> Result<(), Error> {
        let file = self.payload().1;
        let operation = match &self.cipher {
            None => file.zero(spot.file..spot.file + bytes),
            Some(cipher) => {
                let mut zeroes = Buf::zeroed(bytes as usize);
                cipher.encrypt(spot, &mut zeroes);
                file.write(spot.file, zeroes)
            }
        };
        self.late.finish(operation).await
    }
}
