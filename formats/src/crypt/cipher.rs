//! Ciphers of disks: AES in the modes XTS and CBC, sector by sector.
//!
//! Sources: IEEE 1619-2007 for XTS, NIST SP 800-38A for CBC, the kernel's dm-crypt documentation for the names and numbers of
//! initialisation vectors. A sector's vector is its number (in units of 512 bytes, whatever the sector's size):
//!
//! | name | vector |
//! |---|---|
//! | `plain` | the number's low 32 bits, little-endian, then zeroes |
//! | `plain64` | the number as 64 bits, little-endian, then zeroes |
//! | `essiv:sha256` | `plain64`, encrypted by AES-256 with the SHA-256 of the key |
//!
//! Blocks are given to the crate `aes` in batches, since a processor's AES instructions work on many blocks at a time: XTS on all
//! blocks of a sector and the vectors of eight sectors, CBC (where each block waits for the one before) on eight sectors at a time.

use std::fmt;
use std::rc::Rc;

use aes::cipher::{Array, BlockCipherDecrypt, BlockCipherEncrypt, BlockSizeUser, KeyInit, consts::U16};
use sha2::Digest;

/// Unit of sector numbers, in bytes, and the least size of a sector.
pub const SECTOR_BYTES: usize = 512;
/// Bytes of a block of AES.
const BLOCK: usize = 16;
/// Sectors that are worked on together.
const LANES: usize = 8;

type Block = Array<u8, U16>;

/// Transforms whole sectors where they are.
pub trait SectorCipher {
    /// Bytes that are encrypted together: a power of two, at least [`SECTOR_BYTES`].
    fn sector_bytes(&self) -> usize;

    /// Encrypts `bytes`, whole sectors; `number` is that of the first one, in units of [`SECTOR_BYTES`].
    fn encrypt(&self, number: u64, bytes: &mut [u8]);

    /// Decrypts `bytes`, whole sectors; `number` is that of the first one, in units of [`SECTOR_BYTES`].
    fn decrypt(&self, number: u64, bytes: &mut [u8]);
}

/// How a sector's number becomes its initialisation vector. See the module.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Vectors {
    /// 32 bits.
    Plain,
    /// 64 bits.
    Plain64,
    /// 64 bits, encrypted.
    EssivSha256,
}

/// How blocks depend on each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Cipher block chaining, from the start of each sector.
    Cbc,
    /// XEX with a tweaked code book: the key is two keys.
    Xts,
}

/// A cipher of AES, without its key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cipher {
    /// Mode.
    pub mode: Mode,
    /// Vectors.
    pub vectors: Vectors,
    /// Bytes of the key; of both keys for XTS.
    pub key_bytes: usize,
    /// Bytes of a sector.
    pub sector_bytes: usize,
}

impl fmt::Display for Cipher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mode = match self.mode {
            Mode::Cbc => "cbc",
            Mode::Xts => "xts",
        };
        let vectors = match self.vectors {
            Vectors::Plain => "plain",
            Vectors::Plain64 => "plain64",
            Vectors::EssivSha256 => "essiv:sha256",
        };
        write!(f, "aes-{mode}-{vectors}")
    }
}

impl Cipher {
    /// The cipher that `name` and `mode` mean in LUKS (`aes`, `xts-plain64`), with keys of `key_bytes` bytes and sectors of 512.
    ///
    /// # Errors
    /// It is none of ours: what to say, with those that are.
    pub fn named(name: &str, mode: &str, key_bytes: usize) -> Result<Cipher, String> {
        let known = match (name, mode) {
            ("aes", "xts-plain64") => Some((Mode::Xts, Vectors::Plain64)),
            ("aes", "xts-plain") => Some((Mode::Xts, Vectors::Plain)),
            ("aes", "cbc-plain64") => Some((Mode::Cbc, Vectors::Plain64)),
            ("aes", "cbc-plain") => Some((Mode::Cbc, Vectors::Plain)),
            ("aes", "cbc-essiv:sha256") => Some((Mode::Cbc, Vectors::EssivSha256)),
            _ => None,
        };
        let Some((mode, vectors)) = known else {
            return Err(format!(
                "its cipher is {name:?} {mode:?}; there are aes with xts-plain64, xts-plain, cbc-plain64, cbc-plain and \
                 cbc-essiv:sha256"
            ));
        };
        let cipher = Cipher { mode, vectors, key_bytes, sector_bytes: SECTOR_BYTES };
        cipher.check_key_bytes()?;
        Ok(cipher)
    }

    fn check_key_bytes(&self) -> Result<(), String> {
        let possible: &[usize] = if self.mode == Mode::Xts { &[32, 64] } else { &[16, 32] };
        if possible.contains(&self.key_bytes) {
            return Ok(());
        }
        Err(format!("its key has {} bytes; {self} takes {} or {}", self.key_bytes, possible[0], possible[1]))
    }

    /// The cipher with its key.
    ///
    /// # Errors
    /// The key has another length: what to say.
    pub fn with_key(&self, key: &[u8]) -> Result<Rc<dyn SectorCipher>, String> {
        self.check_key_bytes()?;
        if key.len() != self.key_bytes {
            return Err(format!("a key of {} bytes; {self} needs {} here", key.len(), self.key_bytes));
        }
        let wrong = || format!("a key of {} bytes does not fit {self}", key.len());
        let vectors = self.vector_maker(key);
        let bytes = self.sector_bytes;
        fn ready<C>(key: &[u8]) -> Option<C>
        where
            C: KeyInit,
        {
            C::new_from_slice(key).ok()
        }
        let (first, second) = key.split_at(if self.mode == Mode::Xts { key.len() / 2 } else { key.len() });
        Ok(match (self.mode, first.len()) {
            (Mode::Xts, 16) => Rc::new(Xts::<aes::Aes128> {
                data: ready(first).ok_or_else(wrong)?,
                tweak: ready(second).ok_or_else(wrong)?,
                vectors,
                bytes,
            }),
            (Mode::Xts, _) => Rc::new(Xts::<aes::Aes256> {
                data: ready(first).ok_or_else(wrong)?,
                tweak: ready(second).ok_or_else(wrong)?,
                vectors,
                bytes,
            }),
            (Mode::Cbc, 16) => {
                Rc::new(Cbc::<aes::Aes128> { data: ready(first).ok_or_else(wrong)?, vectors, bytes })
            }
            (Mode::Cbc, _) => {
                Rc::new(Cbc::<aes::Aes256> { data: ready(first).ok_or_else(wrong)?, vectors, bytes })
            }
        })
    }

    fn vector_maker(&self, key: &[u8]) -> VectorMaker {
        match self.vectors {
            Vectors::Plain => VectorMaker::Plain,
            Vectors::Plain64 => VectorMaker::Plain64,
            Vectors::EssivSha256 => {
                let salt = zeroize::Zeroizing::new(<[u8; 32]>::from(sha2::Sha256::digest(key)));
                VectorMaker::Essiv(Box::new(aes::Aes256::new((&*salt).into())))
            }
        }
    }
}

/// [`Vectors`] with what they need.
enum VectorMaker {
    Plain,
    Plain64,
    Essiv(Box<aes::Aes256>),
}

impl VectorMaker {
    fn of(&self, number: u64) -> Block {
        let mut vector = Block::default();
        match self {
            VectorMaker::Plain => vector[..4].copy_from_slice(&(number as u32).to_le_bytes()),
            VectorMaker::Plain64 | VectorMaker::Essiv(_) => {
                vector[..8].copy_from_slice(&number.to_le_bytes())
            }
        }
        if let VectorMaker::Essiv(cipher) = self {
            cipher.encrypt_block(&mut vector);
        }
        vector
    }

    /// The vectors of neighbouring sectors of `bytes` bytes.
    fn several(&self, number: u64, bytes: usize) -> [Block; LANES] {
        std::array::from_fn(|lane| self.of(number.wrapping_add((lane * (bytes / SECTOR_BYTES)) as u64)))
    }
}

fn xor(block: &mut [u8], other: &[u8]) {
    block.iter_mut().zip(other).for_each(|(byte, other)| *byte ^= other);
}

/// AES-XTS. `C` is the cipher with half of the key.
struct Xts<C> {
    data: C,
    tweak: C,
    vectors: VectorMaker,
    bytes: usize,
}

/// The tweak of the next block: times x in GF(2^128), the polynomial of IEEE 1619.
fn next_tweak(tweak: u128) -> u128 {
    (tweak << 1) ^ (0x87 & 0u128.wrapping_sub(tweak >> 127))
}

impl<C: BlockCipherEncrypt + BlockSizeUser<BlockSize = U16>> Xts<C> {
    /// Runs `work` on the blocks of each part of each sector, with the tweaks before and after.
    fn run(&self, number: u64, bytes: &mut [u8], work: impl Fn(&mut [Block])) {
        let step = (self.bytes / SECTOR_BYTES) as u64;
        for (group, sectors) in bytes.chunks_mut(self.bytes * LANES).enumerate() {
            let first = number.wrapping_add((group * LANES) as u64 * step);
            let mut starts = self.vectors.several(first, self.bytes);
            self.tweak.encrypt_blocks(&mut starts[..sectors.len().div_ceil(self.bytes)]);
            for (sector, start) in sectors.chunks_exact_mut(self.bytes).zip(&starts) {
                let mut tweak = u128::from_le_bytes((*start).into());
                for part in sector.chunks_exact_mut(SECTOR_BYTES) {
                    let mut tweaks = [0u8; SECTOR_BYTES];
                    for slot in tweaks.chunks_exact_mut(BLOCK) {
                        slot.copy_from_slice(&tweak.to_le_bytes());
                        tweak = next_tweak(tweak);
                    }
                    xor(part, &tweaks);
                    work(Block::slice_as_chunks_mut(part).0);
                    xor(part, &tweaks);
                }
            }
        }
    }
}

impl<C> SectorCipher for Xts<C>
where
    C: BlockCipherEncrypt + BlockCipherDecrypt + BlockSizeUser<BlockSize = U16>,
{
    fn sector_bytes(&self) -> usize {
        self.bytes
    }

    fn encrypt(&self, number: u64, bytes: &mut [u8]) {
        self.run(number, bytes, |blocks| self.data.encrypt_blocks(blocks));
    }

    fn decrypt(&self, number: u64, bytes: &mut [u8]) {
        self.run(number, bytes, |blocks| self.data.decrypt_blocks(blocks));
    }
}

/// AES-CBC.
struct Cbc<C> {
    data: C,
    vectors: VectorMaker,
    bytes: usize,
}

impl<C> SectorCipher for Cbc<C>
where
    C: BlockCipherEncrypt + BlockCipherDecrypt + BlockSizeUser<BlockSize = U16>,
{
    fn sector_bytes(&self) -> usize {
        self.bytes
    }

    fn encrypt(&self, number: u64, bytes: &mut [u8]) {
        let step = (self.bytes / SECTOR_BYTES) as u64;
        for (group, sectors) in bytes.chunks_mut(self.bytes * LANES).enumerate() {
            let first = number.wrapping_add((group * LANES) as u64 * step);
            let mut chain = self.vectors.several(first, self.bytes);
            let lanes = sectors.len() / self.bytes;
            // Block by block, all sectors at once.
            for at in (0..self.bytes).step_by(BLOCK) {
                for (lane, block) in chain[..lanes].iter_mut().enumerate() {
                    xor(block, &sectors[lane * self.bytes + at..][..BLOCK]);
                }
                self.data.encrypt_blocks(&mut chain[..lanes]);
                for (lane, block) in chain[..lanes].iter().enumerate() {
                    sectors[lane * self.bytes + at..][..BLOCK].copy_from_slice(block);
                }
            }
        }
    }

    fn decrypt(&self, number: u64, bytes: &mut [u8]) {
        let step = (self.bytes / SECTOR_BYTES) as u64;
        for (index, sector) in bytes.chunks_exact_mut(self.bytes).enumerate() {
            let mut before: [u8; BLOCK] = self.vectors.of(number.wrapping_add(index as u64 * step)).into();
            for part in sector.chunks_exact_mut(SECTOR_BYTES) {
                let mut encrypted = [0u8; SECTOR_BYTES];
                encrypted.copy_from_slice(part);
                self.data.decrypt_blocks(Block::slice_as_chunks_mut(part).0);
                xor(&mut part[..BLOCK], &before);
                xor(&mut part[BLOCK..], &encrypted[..SECTOR_BYTES - BLOCK]);
                before.copy_from_slice(&encrypted[SECTOR_BYTES - BLOCK..]);
            }
        }
    }
}

#[cfg(test)]
#[path = "cipher_tests.rs"]
mod tests;
