//! The header of LUKS version 2, to be read: who may have the key of the data, and how the data is encrypted.
//!
//! Source: "LUKS2 On-Disk Format Specification" 1.1. Numbers of the binary header are big-endian.
//!
//! | offset | bytes | field |
//! |---|---|---|
//! | 0 | 6 | magic, `LUKS\xba\xbe`; of the second copy `SKUL\xba\xbe` |
//! | 6 | 2 | version, 2 |
//! | 8 | 8 | bytes of header and JSON area |
//! | 16 | 8 | sequence number: the copy with the higher one counts |
//! | 72 | 32 | algorithm of the checksum |
//! | 168 | 40 | UUID as text |
//! | 256 | 8 | offset of this copy |
//! | 448 | 64 | checksum of header and JSON area, with zeroes here |
//! | 4096 | | JSON: key slots, segments, digests |
//!
//! Served are images of one encrypted segment without integrity data, with the ciphers of [`super::cipher`]; key slots by PBKDF2 and
//! Argon2 (RFC 9106), whose memory and time are bounded. What else a header wants of its reader is refused by name.

use std::collections::BTreeMap;

use base64ct::{Base64, Encoding};
use serde::Deserialize;
use sha2::Digest as _;
use zerocopy::big_endian::{U16, U64};
use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};
use zeroize::Zeroizing;

use super::cipher::{Cipher, SECTOR_BYTES};
use super::derive::{Hash, ROUNDS_MAX, merge};
use super::luks1::{self, text};
use super::secret::Secret;
use crate::error::{Error, ErrorKind};
use crate::file::Buf;

/// First bytes of the second copy.
const MAGIC_SECOND: [u8; 6] = *b"SKUL\xba\xbe";
/// Bytes of the binary header.
pub const BINARY_BYTES: usize = 4096;
/// Sizes that header and JSON area may have, which are the places of the second copy.
const SIZES: [u64; 9] =
    [16 << 10, 32 << 10, 64 << 10, 128 << 10, 256 << 10, 512 << 10, 1 << 20, 2 << 20, 4 << 20];
/// Stripes of a key.
const STRIPES: usize = 4000;
/// Memory that Argon2 may take, in KiB, as cryptsetup limits it.
const ARGON2_MEMORY_MAX_KIB: u32 = 1 << 20;
/// Memory times passes, of all key slots together, in KiB.
const ARGON2_WORK_MAX_KIB: u64 = 32 << 20;
/// Key slots, at most.
const SLOTS_MAX: usize = 32;

#[derive(Debug, Clone, FromBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Binary {
    magic: [u8; 6],
    version: U16,
    bytes: U64,
    sequence: U64,
    label: [u8; 48],
    checksum_algorithm: [u8; 32],
    salt: [u8; 64],
    uuid: [u8; 40],
    subsystem: [u8; 48],
    offset: U64,
    padding: [u8; 184],
    checksum: [u8; 64],
}

#[derive(Debug, Deserialize)]
struct Metadata {
    keyslots: BTreeMap<String, Keyslot>,
    segments: BTreeMap<String, Segment>,
    digests: BTreeMap<String, DigestOf>,
    #[serde(default)]
    config: Config,
}

#[derive(Debug, Default, Deserialize)]
struct Config {
    #[serde(default)]
    requirements: Option<Requirements>,
}

#[derive(Debug, Default, Deserialize)]
struct Requirements {
    #[serde(default)]
    mandatory: Vec<String>,
}

#[derive(Debug, Deserialize)]
struct Keyslot {
    #[serde(rename = "type")]
    kind: String,
    key_size: usize,
    af: Option<Splitter>,
    area: Area,
    kdf: Option<Kdf>,
}

#[derive(Debug, Deserialize)]
struct Splitter {
    stripes: usize,
    hash: String,
}

#[derive(Debug, Deserialize)]
struct Area {
    #[serde(rename = "type")]
    kind: String,
    offset: String,
    size: String,
    encryption: Option<String>,
    key_size: Option<usize>,
}

#[derive(Debug, Deserialize)]
struct Kdf {
    #[serde(rename = "type")]
    kind: String,
    salt: String,
    hash: Option<String>,
    iterations: Option<u32>,
    time: Option<u32>,
    memory: Option<u32>,
    cpus: Option<u32>,
}

#[derive(Debug, Deserialize)]
struct Segment {
    #[serde(rename = "type")]
    kind: String,
    offset: String,
    size: String,
    iv_tweak: Option<String>,
    encryption: Option<String>,
    sector_size: Option<usize>,
    integrity: Option<serde_json::Value>,
}

#[derive(Debug, Deserialize)]
struct DigestOf {
    #[serde(rename = "type")]
    kind: String,
    keyslots: Vec<String>,
    segments: Vec<String>,
    salt: String,
    digest: String,
    hash: String,
    iterations: u32,
}

/// How a passphrase becomes the key of a slot.
#[derive(Debug, Clone)]
enum Derivation {
    Pbkdf2 { hash: Hash, iterations: u32 },
    Argon2 { algorithm: argon2::Algorithm, parameters: argon2::Params },
}

#[derive(Debug, Clone)]
struct Slot {
    number: String,
    derivation: Derivation,
    salt: Vec<u8>,
    cipher: Cipher,
    hash: Hash,
    offset: u64,
}

/// A checked header.
#[derive(Debug, Clone)]
pub struct Header {
    /// How the data is encrypted.
    pub cipher: Cipher,
    /// Byte offset of the data.
    pub payload_offset: u64,
    /// Bytes of the data; `None`: up to the end.
    pub payload_bytes: Option<u64>,
    /// UUID, as written.
    pub uuid: String,
    hash: Hash,
    iterations: u32,
    salt: Vec<u8>,
    digest: Vec<u8>,
    slots: Vec<Slot>,
}

fn number(text: &str) -> Result<u64, String> {
    text.parse().map_err(|_| format!("{text:?} is no number"))
}

fn base64(text: &str) -> Result<Vec<u8>, String> {
    Base64::decode_vec(text).map_err(|_| "a salt or digest is no base64".to_owned())
}

fn cipher(encryption: Option<&str>, key_bytes: usize, sector_bytes: usize) -> Result<Cipher, String> {
    let encryption = encryption.unwrap_or("none");
    let (name, mode) = encryption.split_once('-').unwrap_or((encryption, ""));
    let cipher = Cipher::named(name, mode, key_bytes)?;
    if !sector_bytes.is_power_of_two() || !(SECTOR_BYTES..=4096).contains(&sector_bytes) {
        return Err(format!("its sectors have {sector_bytes} bytes; 512 to 4096 are possible"));
    }
    Ok(Cipher { sector_bytes, ..cipher })
}

/// Reads the copy of the header at `offset`, if it is sound: its sequence number and its JSON text.
async fn copy_at<R>(offset: u64, read: &impl Fn(u64, usize) -> R) -> Result<Option<(Binary, Vec<u8>)>, Error>
where
    R: Future<Output = Result<Buf, Error>>,
{
    let bytes = read(offset, BINARY_BYTES).await?;
    let Ok((binary, _)) = Binary::read_from_prefix(&bytes) else { return Ok(None) };
    let magic = if offset == 0 { luks1::MAGIC } else { MAGIC_SECOND };
    let sound = binary.magic == magic
        && binary.version.get() == 2
        && binary.offset.get() == offset
        && SIZES.contains(&binary.bytes.get());
    if !sound || text(&binary.checksum_algorithm) != "sha256" {
        return Ok(None);
    }
    let mut whole = read(offset, binary.bytes.get() as usize).await?;
    whole[448..512].fill(0);
    if sha2::Sha256::digest(&whole[..])[..] != binary.checksum[..32] {
        return Ok(None);
    }
    let json = &whole[BINARY_BYTES..];
    let end = json.iter().position(|byte| *byte == 0).unwrap_or(json.len());
    let json = json[..end].to_vec();
    Ok(Some((binary, json)))
}

impl Header {
    /// Reads the header of `name`, whose file has `length` bytes, out of the copy that counts. `read` gives bytes of the file.
    ///
    /// # Errors
    /// Both copies are damaged; something that this program does not do.
    pub async fn read<R>(name: &str, length: u64, read: impl Fn(u64, usize) -> R) -> Result<Header, Error>
    where
        R: Future<Output = Result<Buf, Error>>,
    {
        let first = copy_at(0, &read).await?;
        // Where the second one is says the first; else it is looked for.
        let places = match &first {
            Some((binary, _)) => vec![binary.bytes.get()],
            None => SIZES.to_vec(),
        };
        let mut best = first;
        for place in places {
            let second = copy_at(place, &read).await?;
            let newer = |(found, _): &(Binary, Vec<u8>)| {
                best.as_ref().is_none_or(|(best, _)| found.sequence.get() > best.sequence.get())
            };
            if second.as_ref().is_some_and(newer) {
                best = second;
            }
        }
        let Some((binary, json)) = best else {
            return Err(Error::corrupt(name, "neither copy of its LUKS header has a right checksum"));
        };
        let metadata: Metadata = serde_json::from_slice(&json).map_err(|error| {
            Error::corrupt(name, format!("its LUKS header cannot be understood: {error}"))
        })?;
        Header::new(&metadata, text(&binary.uuid), length).map_err(|what| Error::unsupported(name, what))
    }

    fn new(metadata: &Metadata, uuid: String, length: u64) -> Result<Header, String> {
        let wants = metadata.config.requirements.as_ref().map_or(&[][..], |wants| &wants.mandatory);
        if let Some(first) = wants.first() {
            return Err(format!("its LUKS header requires {first:?} of its readers"));
        }
        let mut segments = metadata.segments.iter();
        let (Some((segment_name, segment)), None) = (segments.next(), segments.next()) else {
            return Err(format!("its LUKS header has {} segments; one is possible", metadata.segments.len()));
        };
        if segment.kind != "crypt" || segment.integrity.is_some() {
            return Err("its segment is not encrypted, or has integrity data".to_owned());
        }
        if segment.iv_tweak.as_deref().is_some_and(|tweak| tweak != "0") {
            return Err("the vectors of its segment begin at another number than 0".to_owned());
        }
        // Each list is looked through for each entry of another one.
        let lists =
            metadata.digests.values().flat_map(|digest| [digest.keyslots.len(), digest.segments.len()]);
        let longest = lists.chain([metadata.keyslots.len(), metadata.digests.len()]).max().unwrap_or(0);
        if longest > SLOTS_MAX {
            return Err(format!("its LUKS header has a list of {longest} entries; {SLOTS_MAX} are possible"));
        }
        let holds = |digest: &&DigestOf| digest.kind == "pbkdf2" && digest.segments.contains(segment_name);
        let digest =
            metadata.digests.values().find(holds).ok_or("its segment has no digest of a known type")?;
        let slots_of = |(number, _): &(&String, &Keyslot)| digest.keyslots.contains(number);
        let keyslots: Vec<_> = metadata.keyslots.iter().filter(slots_of).take(SLOTS_MAX).collect();
        let key_bytes =
            keyslots.first().map(|(_, slot)| slot.key_size).ok_or("none of its key slots opens its data")?;
        let payload_offset = number(&segment.offset)?;
        let header = Header {
            cipher: cipher(segment.encryption.as_deref(), key_bytes, segment.sector_size.unwrap_or(512))?,
            payload_offset,
            payload_bytes: if segment.size == "dynamic" { None } else { Some(number(&segment.size)?) },
            uuid,
            hash: Hash::named(&digest.hash)?,
            iterations: digest.iterations,
            salt: base64(&digest.salt)?,
            digest: base64(&digest.digest)?,
            slots: keyslots
                .iter()
                .filter(|(_, slot)| slot.kind == "luks2" && slot.key_size == key_bytes)
                .map(|(number, slot)| Slot::new(number, slot, payload_offset.min(length)))
                .collect::<Result<_, String>>()?,
        };
        if payload_offset > length || !payload_offset.is_multiple_of(header.cipher.sector_bytes as u64) {
            return Err(format!("its data begins at {payload_offset}, where no data can be"));
        }
        if header.digest.is_empty() || header.digest.len() > 64 || header.iterations == 0 {
            return Err("the digest of its LUKS key cannot be one".to_owned());
        }
        header.check_work()?;
        Ok(header)
    }

    fn check_work(&self) -> Result<(), String> {
        let (mut rounds, mut memory) = (0, 0);
        for slot in &self.slots {
            rounds += self.hash.rounds(self.iterations, self.digest.len());
            match &slot.derivation {
                Derivation::Pbkdf2 { hash, iterations } => {
                    rounds += hash.rounds(*iterations, slot.cipher.key_bytes)
                }
                Derivation::Argon2 { parameters, .. } => {
                    memory += u64::from(parameters.m_cost()) * u64::from(parameters.t_cost());
                }
            }
        }
        if rounds > ROUNDS_MAX || memory > ARGON2_WORK_MAX_KIB {
            return Err(format!(
                "its LUKS header asks for {rounds} rounds of a hash and {memory} KiB of Argon2 to be unlocked; {ROUNDS_MAX} and \
                 {ARGON2_WORK_MAX_KIB} are the limits, so that a header cannot keep a host busy"
            ));
        }
        Ok(())
    }

    /// The encryption, for people.
    pub fn in_words(&self) -> String {
        format!("LUKS2 {}, a key of {} bits", self.cipher, self.cipher.key_bytes * 8)
    }

    /// The key slots in use, for people.
    pub fn slots_in_words(&self) -> String {
        let numbers: Vec<_> = self.slots.iter().map(|slot| slot.number.as_str()).collect();
        format!("{} in use ({})", numbers.len(), numbers.join(", "))
    }

    /// Hash of the digest.
    pub fn hash(&self) -> Hash {
        self.hash
    }

    /// Key slots that can be opened.
    pub fn slots(&self) -> usize {
        self.slots.len()
    }

    /// The volume key, by a passphrase. `read` gives bytes of the file. For a thread that may wait.
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
        R: Future<Output = Result<Buf, Error>>,
    {
        for slot in &self.slots {
            let key = slot.key(passphrase).map_err(|what| Error::corrupt(name, what))?;
            let cipher = slot.cipher.with_key(&key).map_err(|what| Error::corrupt(name, what))?;
            let mut stripes = Zeroizing::new(read(slot.offset, slot.stripes_bytes(self)).await?.to_vec());
            cipher.decrypt(0, &mut stripes);
            stripes.truncate(self.cipher.key_bytes * STRIPES);
            let volume_key = merge(slot.hash, &stripes, self.cipher.key_bytes);
            let digest = self.hash.pbkdf2(&volume_key, &self.salt, self.iterations, self.digest.len());
            if bool::from(subtle::ConstantTimeEq::ct_eq(&digest[..], &self.digest[..])) {
                return Ok(Secret::of(volume_key));
            }
        }
        let message = format!(
            "{name}: the key opens none of its {} LUKS key slots: give it the right one",
            self.slots.len()
        );
        Err(Error::new(ErrorKind::Invalid, message))
    }
}

impl Slot {
    fn new(number_text: &str, slot: &Keyslot, end_max: u64) -> Result<Slot, String> {
        let of_slot = |what: String| format!("its LUKS key slot {number_text}: {what}");
        let (Some(af), Some(kdf)) = (&slot.af, &slot.kdf) else {
            return Err(of_slot("splitter or key derivation are missing".to_owned()));
        };
        if af.stripes != STRIPES || slot.area.kind != "raw" || slot.key_size > 64 {
            return Err(of_slot(format!(
                "{} stripes of {} bytes in an area of type {:?}",
                af.stripes, slot.key_size, slot.area.kind
            )));
        }
        let (offset, bytes) = (number(&slot.area.offset)?, number(&slot.area.size)?);
        let needed = ((slot.key_size * STRIPES) as u64).next_multiple_of(SECTOR_BYTES as u64);
        if bytes < needed || offset.checked_add(bytes).is_none_or(|end| end > end_max) {
            return Err(of_slot(format!(
                "its stripes are said to be {bytes} bytes at {offset}, outside of the header"
            )));
        }
        let cipher =
            cipher(slot.area.encryption.as_deref(), slot.area.key_size.unwrap_or(slot.key_size), 512);
        Ok(Slot {
            number: number_text.to_owned(),
            derivation: kdf.derivation().map_err(of_slot)?,
            salt: base64(&kdf.salt)?,
            cipher: cipher.map_err(of_slot)?,
            hash: Hash::named(&af.hash).map_err(of_slot)?,
            offset,
        })
    }

    /// Bytes of the stripes: whole sectors.
    fn stripes_bytes(&self, header: &Header) -> usize {
        (header.cipher.key_bytes * STRIPES).next_multiple_of(SECTOR_BYTES)
    }

    fn key(&self, passphrase: &Secret) -> Result<Zeroizing<Vec<u8>>, String> {
        let len = self.cipher.key_bytes;
        match &self.derivation {
            Derivation::Pbkdf2 { hash, iterations } => {
                Ok(hash.pbkdf2(passphrase.bytes(), &self.salt, *iterations, len))
            }
            Derivation::Argon2 { algorithm, parameters } => {
                let argon2 = argon2::Argon2::new(*algorithm, argon2::Version::V0x13, parameters.clone());
                let mut key = Zeroizing::new(vec![0; len]);
                argon2
                    .hash_password_into(passphrase.bytes(), &self.salt, &mut key)
                    .map_err(|error| format!("its LUKS key slot {}: Argon2: {error}", self.number))?;
                Ok(key)
            }
        }
    }
}

impl Kdf {
    fn derivation(&self) -> Result<Derivation, String> {
        let algorithm = match self.kind.as_str() {
            "pbkdf2" => {
                let iterations = self.iterations.filter(|iterations| *iterations > 0);
                return Ok(Derivation::Pbkdf2 {
                    hash: Hash::named(self.hash.as_deref().unwrap_or("none"))?,
                    iterations: iterations.ok_or("PBKDF2 without iterations")?,
                });
            }
            "argon2i" => argon2::Algorithm::Argon2i,
            "argon2id" => argon2::Algorithm::Argon2id,
            other => {
                return Err(format!("the key derivation {other:?}; there are pbkdf2, argon2i and argon2id"));
            }
        };
        let (Some(time), Some(memory), Some(cpus)) = (self.time, self.memory, self.cpus) else {
            return Err("Argon2 without time, memory or cpus".to_owned());
        };
        if memory > ARGON2_MEMORY_MAX_KIB || cpus > 64 {
            return Err(format!(
                "Argon2 with {memory} KiB of memory on {cpus} processors; {ARGON2_MEMORY_MAX_KIB} KiB and 64 are the limits"
            ));
        }
        let parameters = argon2::Params::new(memory, time, cpus, None);
        let parameters = parameters.map_err(|error| format!("Argon2: {error}"))?;
        Ok(Derivation::Argon2 { algorithm, parameters })
    }
}

#[cfg(test)]
#[path = "luks2_tests.rs"]
mod tests;
