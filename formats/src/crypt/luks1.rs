//! The header of LUKS version 1: who may have the key of the data, and how the data is encrypted.
//!
//! Source: "LUKS1 On-Disk Format Specification" 1.2.3. Numbers are big-endian, offsets in sectors of 512 bytes.
//!
//! | offset | bytes | field |
//! |---|---|---|
//! | 0 | 6 | magic `LUKS\xba\xbe` |
//! | 6 | 2 | version, 1 |
//! | 8, 40, 72 | 32 each | names of cipher, mode and hash |
//! | 104 | 4 | where the data begins |
//! | 108 | 4 | bytes of the volume key |
//! | 112, 132 | 20, 32 | digest of the volume key, and its salt |
//! | 164 | 4 | iterations of the digest |
//! | 168 | 40 | UUID as text |
//! | 208 | 8 × 48 | key slots: state, iterations, salt (32), first sector of the stripes, number of stripes |
//!
//! A slot has the volume key, split into stripes and encrypted with a key out of a passphrase.

use zerocopy::big_endian::{U16, U32};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};
use zeroize::Zeroizing;

use super::cipher::{Cipher, SECTOR_BYTES};
use super::derive::{Hash, ITERATIONS_MIN, ROUNDS_MAX, merge, split};
use super::secret::{Secret, random};
use crate::error::{Error, ErrorKind};

/// First six bytes.
pub const MAGIC: [u8; 6] = *b"LUKS\xba\xbe";
/// Bytes of the header without the stripes.
pub const HEADER_BYTES: usize = 592;
/// Key slots.
pub const SLOTS: usize = 8;
/// Stripes of a key: every program has always taken so many.
const STRIPES: usize = 4000;
/// States of a slot.
const USED: u32 = 0x00ac_71f3;
const FREE: u32 = 0x0000_dead;
/// Stripes begin on such borders, in bytes.
const SLOT_ALIGN: usize = 4096;
/// Digest of the volume key.
const DIGEST_BYTES: usize = 20;

#[derive(Debug, Clone, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawSlot {
    state: U32,
    iterations: U32,
    salt: [u8; 32],
    first_sector: U32,
    stripes: U32,
}

#[derive(Debug, Clone, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawHeader {
    magic: [u8; 6],
    version: U16,
    cipher: [u8; 32],
    mode: [u8; 32],
    hash: [u8; 32],
    payload_sector: U32,
    key_bytes: U32,
    digest: [u8; DIGEST_BYTES],
    digest_salt: [u8; 32],
    digest_iterations: U32,
    uuid: [u8; 40],
    slots: [RawSlot; SLOTS],
}

/// A slot that is in use.
#[derive(Debug, Clone)]
struct Slot {
    number: usize,
    iterations: u32,
    salt: [u8; 32],
    /// Byte offset of the stripes in the header's area.
    offset: u64,
}

/// A checked header.
#[derive(Debug, Clone)]
pub struct Header {
    /// How the data is encrypted.
    pub cipher: Cipher,
    /// Hash of everything.
    pub hash: Hash,
    /// Byte offset of the data.
    pub payload_offset: u64,
    /// UUID, as written.
    pub uuid: String,
    digest: [u8; DIGEST_BYTES],
    digest_salt: [u8; 32],
    digest_iterations: u32,
    slots: Vec<Slot>,
}

/// The text of a field that is padded with zeroes.
pub(super) fn text(field: &[u8]) -> String {
    let end = field.iter().position(|byte| *byte == 0).unwrap_or(field.len());
    String::from_utf8_lossy(&field[..end]).replace(char::is_control, "?")
}

fn field<const N: usize>(text: &str) -> [u8; N] {
    let mut field = [0; N];
    field[..text.len()].copy_from_slice(text.as_bytes());
    field
}

impl Header {
    /// Checks the first [`HEADER_BYTES`] bytes of the header of `name`, which has `area_bytes` bytes at most with its stripes.
    ///
    /// # Errors
    /// It is no header, or a damaged one, or one of a cipher that is not there.
    pub fn parse(name: &str, bytes: &[u8], area_bytes: u64) -> Result<Header, Error> {
        let Ok((raw, _)) = RawHeader::read_from_prefix(bytes) else {
            return Err(Error::corrupt(
                name,
                format!("its LUKS header has {} bytes, 592 are needed", bytes.len()),
            ));
        };
        if raw.magic != MAGIC {
            let message = format!("{name} has no LUKS header: it does not begin with LUKS\\xba\\xbe");
            return Err(Error::new(ErrorKind::WrongFormat, message));
        }
        match raw.version.get() {
            1 => {}
            other => {
                let what = format!("its LUKS header has version {other}; version 1 is known here");
                return Err(Error::unsupported(name, what));
            }
        }
        let unsupported = |what: String| Error::unsupported(name, what);
        let key_bytes = raw.key_bytes.get() as usize;
        let cipher = Cipher::named(&text(&raw.cipher), &text(&raw.mode), key_bytes).map_err(unsupported)?;
        let hash = Hash::named(&text(&raw.hash)).map_err(unsupported)?;
        let mut header = Header {
            cipher,
            hash,
            payload_offset: u64::from(raw.payload_sector.get()) * SECTOR_BYTES as u64,
            uuid: text(&raw.uuid),
            digest: raw.digest,
            digest_salt: raw.digest_salt,
            digest_iterations: raw.digest_iterations.get(),
            slots: Vec::new(),
        };
        for (number, slot) in raw.slots.iter().enumerate() {
            header.add_slot(name, number, slot, area_bytes)?;
        }
        header.check(name, area_bytes)?;
        Ok(header)
    }

    fn add_slot(&mut self, name: &str, number: usize, slot: &RawSlot, area_bytes: u64) -> Result<(), Error> {
        let corrupt = |what: String| Err(Error::corrupt(name, format!("its LUKS key slot {number} {what}")));
        match slot.state.get() {
            FREE => return Ok(()),
            USED => {}
            other => return corrupt(format!("has the state {other:#010x}, which is neither used nor free")),
        }
        if slot.stripes.get() as usize != STRIPES {
            return corrupt(format!("has {} stripes; there are always {STRIPES}", slot.stripes.get()));
        }
        if slot.iterations.get() == 0 {
            return corrupt("has no iterations".into());
        }
        let offset = u64::from(slot.first_sector.get()) * SECTOR_BYTES as u64;
        let end = offset + self.stripes_bytes() as u64;
        if offset < HEADER_BYTES as u64 || end > area_bytes {
            return corrupt(format!("has its stripes at {offset} to {end}, outside of the header"));
        }
        self.slots.push(Slot { number, iterations: slot.iterations.get(), salt: slot.salt, offset });
        Ok(())
    }

    fn check(&self, name: &str, area_bytes: u64) -> Result<(), Error> {
        if self.payload_offset > area_bytes || self.payload_offset < HEADER_BYTES as u64 {
            let what =
                format!("its data begins at {}, outside of the {area_bytes} bytes", self.payload_offset);
            return Err(Error::corrupt(name, what));
        }
        if self.digest_iterations == 0 {
            return Err(Error::corrupt(name, "the digest of its LUKS key has no iterations"));
        }
        let digest = self.hash.rounds(self.digest_iterations, DIGEST_BYTES);
        let slots =
            self.slots.iter().map(|slot| self.hash.rounds(slot.iterations, self.cipher.key_bytes) + digest);
        let rounds = slots.sum::<u64>();
        if rounds > ROUNDS_MAX {
            let what = format!(
                "its LUKS header asks for {rounds} rounds of {} to be unlocked; {ROUNDS_MAX} is the limit, so that a header \
                 cannot keep a host busy: give its key slots fewer iterations (cryptsetup luksChangeKey --pbkdf-force-iterations)",
                self.hash.name()
            );
            return Err(Error::unsupported(name, what));
        }
        Ok(())
    }

    /// Bytes of the stripes of a slot: whole sectors.
    fn stripes_bytes(&self) -> usize {
        self.cipher.key_bytes * STRIPES
    }

    /// The encryption, for people.
    pub fn in_words(&self) -> String {
        format!("LUKS1 {}, a key of {} bits", self.cipher, self.cipher.key_bytes * 8)
    }

    /// The key slots in use, for people.
    pub fn slots_in_words(&self) -> String {
        let numbers: Vec<_> = self.used_slots().iter().map(usize::to_string).collect();
        format!("{} of {SLOTS} in use ({})", numbers.len(), numbers.join(", "))
    }

    /// Numbers of the key slots that are in use.
    pub fn used_slots(&self) -> Vec<usize> {
        self.slots.iter().map(|slot| slot.number).collect()
    }

    /// The volume key, by a passphrase. `read` gives bytes of the header's area. This takes as long as the iterations want: it is for a
    /// thread that may wait.
    ///
    /// # Errors
    /// No slot takes the passphrase; what `read` answers.
    pub async fn unlock<R>(
        &self,
        name: &str,
        passphrase: &Secret,
        read: impl Fn(u64, usize) -> R,
    ) -> Result<Secret, Error>
    where
        R: Future<Output = Result<crate::file::Buf, Error>>,
    {
        for slot in &self.slots {
            let key =
                self.hash.pbkdf2(passphrase.bytes(), &slot.salt, slot.iterations, self.cipher.key_bytes);
            let cipher = self.cipher.with_key(&key).map_err(|what| Error::corrupt(name, what))?;
            let encrypted = read(slot.offset, self.stripes_bytes()).await?;
            let mut stripes = Zeroizing::new(encrypted.to_vec());
            cipher.decrypt(0, &mut stripes);
            let volume_key = merge(self.hash, &stripes, self.cipher.key_bytes);
            if self.fits(&volume_key) {
                return Ok(Secret::of(volume_key));
            }
        }
        let message = match self.slots.len() {
            0 => format!("{name}: none of its LUKS key slots is in use, so no key opens it"),
            slots => {
                format!("{name}: the key opens none of its {slots} LUKS key slots: give it the right one")
            }
        };
        Err(Error::new(ErrorKind::Invalid, message))
    }

    fn fits(&self, volume_key: &[u8]) -> bool {
        let digest = self.hash.pbkdf2(volume_key, &self.digest_salt, self.digest_iterations, DIGEST_BYTES);
        bool::from(subtle::ConstantTimeEq::ct_eq(&digest[..], &self.digest[..]))
    }
}

/// What a new header shall be.
#[derive(Debug, Clone)]
pub struct New {
    /// Cipher of data and stripes.
    pub cipher: Cipher,
    /// Hash of everything.
    pub hash: Hash,
    /// Iterations of the one slot that is used.
    pub iterations: u32,
    /// The data begins on such a border, in bytes.
    pub payload_align: u64,
}

impl New {
    /// Bytes of the header with room for all slots.
    pub fn area_bytes(&self) -> u64 {
        let slot = (self.cipher.key_bytes * STRIPES).next_multiple_of(SLOT_ALIGN);
        ((SLOT_ALIGN + SLOTS * slot) as u64).next_multiple_of(self.payload_align)
    }

    /// A header with a new volume key, which the passphrase opens: its bytes up to the data, and the key.
    ///
    /// # Errors
    /// The kernel gives no random bytes.
    pub fn make(&self, passphrase: &Secret) -> Result<(Vec<u8>, Secret), Error> {
        let volume_key = Secret::random(self.cipher.key_bytes)?;
        let (hash, key_bytes) = (self.hash, self.cipher.key_bytes);
        let mut raw = RawHeader::new_zeroed();
        raw.magic = MAGIC;
        raw.version = U16::new(1);
        let name = self.cipher.to_string();
        let (cipher, mode) = name.split_once('-').unwrap_or((&name, ""));
        (raw.cipher, raw.mode, raw.hash) = (field(cipher), field(mode), field(hash.name()));
        raw.payload_sector = U32::new((self.area_bytes() / SECTOR_BYTES as u64) as u32);
        raw.key_bytes = U32::new(key_bytes as u32);
        raw.uuid = field(&uuid::Uuid::new_v4().to_string());
        random(&mut raw.digest_salt)?;
        raw.digest_iterations = U32::new((self.iterations / 8).max(ITERATIONS_MIN));
        let digest =
            hash.pbkdf2(volume_key.bytes(), &raw.digest_salt, raw.digest_iterations.get(), DIGEST_BYTES);
        raw.digest.copy_from_slice(&digest);
        let slot_bytes = (key_bytes * STRIPES).next_multiple_of(SLOT_ALIGN);
        for (number, slot) in raw.slots.iter_mut().enumerate() {
            slot.state = U32::new(FREE);
            slot.stripes = U32::new(STRIPES as u32);
            slot.first_sector = U32::new(((SLOT_ALIGN + number * slot_bytes) / SECTOR_BYTES) as u32);
        }
        let slot = &mut raw.slots[0];
        slot.state = U32::new(USED);
        slot.iterations = U32::new(self.iterations);
        random(&mut slot.salt)?;
        let key = hash.pbkdf2(passphrase.bytes(), &slot.salt, self.iterations, key_bytes);
        let mut stripes = split(hash, volume_key.bytes(), STRIPES)?;
        self.cipher.with_key(&key).map_err(Error::invalid)?.encrypt(0, &mut stripes);
        let mut bytes = vec![0; self.area_bytes() as usize];
        bytes[..HEADER_BYTES].copy_from_slice(raw.as_bytes());
        bytes[SLOT_ALIGN..SLOT_ALIGN + stripes.len()].copy_from_slice(&stripes);
        Ok((bytes, volume_key))
    }
}
