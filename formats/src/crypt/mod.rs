//! Encryption of disks: ciphers, LUKS, and where keys come from.
//!
//! ```text
//!  key-file=… ─▶ KeySources ─▶ Secret (passphrase) ─▶ Format::unlock ─▶ Secret (volume key) ─▶ Open::key ─▶ Driver::cipher
//!                                                    seconds of work:                                        │
//!                                                    not on a shard                       volume: payload ◀──┘
//! ```
//! A driver says with [`Driver::cipher`](crate::driver::Driver::cipher) that what is in its places is encrypted; it transforms no
//! payload itself. [`crate::volume`] does, for all formats, in memory of its own: guests never see a byte that is encrypted, nor does
//! the file see one that is not.
//!
//! | file | what |
//! |---|---|
//! | [`cipher`] | AES-XTS and AES-CBC, sector by sector |
//! | [`derive`](mod@derive) | hashes, PBKDF2, the splitter of LUKS |
//! | [`legacy`] | the encryption of qcow before LUKS |
//! | [`luks1`] | the header of LUKS version 1 |
//! | [`luks2`] | the header of LUKS version 2, to be read |
//! | [`luks`] | `luks:`, a raw disk behind a LUKS header |
//! | [`options`] | `-o` options of new encrypted images |
//! | [`secret`] | keys in memory |
//! | [`source`] | `key-file=` and its like |
//!
//! Invariants: keys are in [`secret::Secret`]s and in the key schedules of the crate `aes` (both overwrite themselves when they are
//! dropped), and nowhere else; no message has a byte of one.

use std::rc::Rc;

pub mod cipher;
pub mod derive;
pub mod legacy;
pub mod luks;
pub mod luks1;
pub mod luks2;
pub mod options;
pub mod secret;
pub mod source;
#[cfg(test)]
mod tests;

use cipher::SectorCipher;
pub use secret::Secret;

/// What the number of a sector, for its initialisation vector, is counted from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CountsFrom {
    /// The disk's first byte.
    Disk,
    /// The first byte of the file that has the sector.
    File,
}

/// Where some bytes are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Spot {
    /// Their offset on the disk.
    pub disk: u64,
    /// Their offset in the file that has them.
    pub file: u64,
}

impl Spot {
    /// The spot `bytes` further on.
    pub fn after(self, bytes: u64) -> Spot {
        Spot { disk: self.disk + bytes, file: self.file + bytes }
    }
}

/// How the payload in the places of a driver is encrypted.
#[derive(Clone)]
pub struct PayloadCipher {
    cipher: Rc<dyn SectorCipher>,
    counts_from: CountsFrom,
}

impl std::fmt::Debug for PayloadCipher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "PayloadCipher(by {:?})", self.counts_from)
    }
}

impl PayloadCipher {
    /// With this cipher, that has its key.
    pub fn new(cipher: Rc<dyn SectorCipher>, counts_from: CountsFrom) -> PayloadCipher {
        PayloadCipher { cipher, counts_from }
    }

    /// Bytes that are encrypted together: what is read and written is made of such sectors, on the disk and in the file.
    pub fn sector_bytes(&self) -> u64 {
        self.cipher.sector_bytes() as u64
    }

    /// Whether bytes of the disk are whole sectors.
    pub fn is_whole(&self, offset: u64, len: u64) -> bool {
        (offset | len).is_multiple_of(self.sector_bytes())
    }

    fn number(&self, spot: Spot) -> u64 {
        let offset = match self.counts_from {
            CountsFrom::Disk => spot.disk,
            CountsFrom::File => spot.file,
        };
        offset / cipher::SECTOR_BYTES as u64
    }

    /// Encrypts whole sectors that go to `spot`.
    pub fn encrypt(&self, spot: Spot, bytes: &mut [u8]) {
        self.cipher.encrypt(self.number(spot), bytes);
    }

    /// Decrypts whole sectors that were at `spot`.
    pub fn decrypt(&self, spot: Spot, bytes: &mut [u8]) {
        self.cipher.decrypt(self.number(spot), bytes);
    }
}
