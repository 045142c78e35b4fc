//! `luks:`, a raw disk behind a LUKS header of version 1 or 2: what `qemu-img -f luks` (version 1) and `cryptsetup open` take. New
//! images are of version 1.
//!
//! ```text
//!  0        header and stripes        payload offset                        end of the file
//!  |------------------------------------|------ sectors of the disk ----------|
//! ```
//! Every sector of the disk has its place, so nothing can be mapped away: a hole of the file decrypts to noise. Therefore zeroes are
//! written as encrypted zeroes, a discard does nothing, and a new image is filled with encrypted zeroes unless `wipe=off` says
//! that what it reads at first does not matter. A part of a sector behind the last whole one is not served.

use std::cell::Cell;
use std::ops::Range;
use std::rc::Rc;

use super::cipher::Cipher;
use super::luks1;
use super::luks2;
use super::options::{self, LuksOptions};
use super::{CountsFrom, PayloadCipher, Secret, Spot};
use crate::driver::{
    Create, Description, Driver, Encryption, Erase, Erased, Extent, FileIndex, Findings, Format, Open, Place,
    Plan, Repair, Space, Usage,
};
use crate::error::{Error, ErrorKind};
use crate::file::{Buf, ImageFile, Pending};
use crate::raw::SECTOR_BYTES;

/// The format.
#[derive(Debug)]
pub struct Luks;

/// The data of new images begins on such a border, in bytes.
const PAYLOAD_ALIGN: u64 = 1 << 20;
/// Bytes that a new disk is filled with at a time.
const WIPE_STEP: u64 = 1 << 20;

struct LuksDriver {
    file: Rc<dyn ImageFile>,
    cipher: PayloadCipher,
    payload: u64,
    /// Its header says how large it is.
    fixed_size: bool,
    size: Cell<u64>,
    writable: bool,
}

/// A header of either version.
enum Header {
    One(luks1::Header),
    Two(Box<luks2::Header>),
}

async fn header_of(file: &Rc<dyn ImageFile>) -> Result<Header, Error> {
    let bytes = file.read(0, luks1::HEADER_BYTES).await?;
    let second = luks_version(&bytes) == Some(2) || !bytes.starts_with(&luks1::MAGIC);
    if second && file.length() >= luks2::BINARY_BYTES as u64 {
        let read = |offset, len| file.read(offset, len);
        match luks2::Header::read(file.name(), file.length(), read).await {
            Ok(header) => return Ok(Header::Two(Box::new(header))),
            // Without its first copy it may be no such image at all.
            Err(error) if bytes.starts_with(&luks1::MAGIC) => return Err(error),
            Err(_) => {}
        }
    }
    luks1::Header::parse(file.name(), &bytes, file.length()).map(Header::One)
}

impl Header {
    fn cipher(&self) -> &Cipher {
        match self {
            Header::One(header) => &header.cipher,
            Header::Two(header) => &header.cipher,
        }
    }

    fn payload_offset(&self) -> u64 {
        match self {
            Header::One(header) => header.payload_offset,
            Header::Two(header) => header.payload_offset,
        }
    }

    /// Bytes of the disk in a file of `length` bytes.
    fn disk_bytes(&self, length: u64) -> u64 {
        let room = length.saturating_sub(self.payload_offset());
        let bytes = match self {
            Header::Two(header) => header.payload_bytes.unwrap_or(room).min(room),
            Header::One(_) => room,
        };
        bytes & !(self.cipher().sector_bytes as u64 - 1)
    }

    /// The header says how large the disk is.
    fn has_fixed_size(&self) -> bool {
        matches!(self, Header::Two(header) if header.payload_bytes.is_some())
    }

    /// Encryption, hash, key slots and UUID, for people.
    fn in_words(&self) -> (String, &'static str, String, String) {
        match self {
            Header::One(one) => (one.in_words(), one.hash.name(), one.slots_in_words(), one.uuid.clone()),
            Header::Two(two) => (two.in_words(), two.hash().name(), two.slots_in_words(), two.uuid.clone()),
        }
    }

    fn has_slots(&self) -> bool {
        match self {
            Header::One(header) => !header.used_slots().is_empty(),
            Header::Two(header) => header.slots() > 0,
        }
    }
}

/// The version that a LUKS header says it has.
fn luks_version(head: &[u8]) -> Option<u16> {
    let version = head.strip_prefix(&luks1::MAGIC)?.first_chunk::<2>()?;
    Some(u16::from_be_bytes(*version))
}

impl Format for Luks {
    fn name(&self) -> &'static str {
        "luks"
    }

    fn recognises(&self, head: &[u8], _tail: &[u8]) -> bool {
        luks_version(head).is_some_and(|version| (1..=2).contains(&version))
    }

    fn describe(&self, file: Rc<dyn ImageFile>) -> Pending<'_, Description> {
        Box::pin(async move {
            let header = header_of(&file).await?;
            let (words, hash, key_slots, uuid) = header.in_words();
            Ok(Description {
                size: header.disk_bytes(file.length()),
                backing: None,
                data_files: Vec::new(),
                identity: None,
                writable: Ok(()),
                encryption: Some(Encryption { words, warning: None }),
                properties: vec![
                    ("uuid", uuid),
                    ("hash", hash.to_owned()),
                    ("key_slots", key_slots),
                    ("payload_offset", header.payload_offset().to_string()),
                ],
            })
        })
    }

    fn unlock<'a>(&'a self, file: Rc<dyn ImageFile>, passphrase: &'a Secret) -> Pending<'a, Secret> {
        Box::pin(async move {
            let read = |offset, len| file.read(offset, len);
            match header_of(&file).await? {
                Header::One(header) => header.unlock(file.name(), passphrase, read).await,
                Header::Two(header) => header.unlock(file.name(), passphrase, read).await,
            }
        })
    }

    fn open(&self, open: Open) -> Pending<'_, Rc<dyn Driver>> {
        Box::pin(async move {
            let file =
                open.files.first().cloned().ok_or_else(|| Error::invalid("a luks image needs its file"))?;
            let header = header_of(&file).await?;
            let key = open.key.ok_or_else(|| options::key_missing(file.name()))?;
            let cipher = header
                .cipher()
                .with_key(key.bytes())
                .map_err(|what| Error::invalid(format!("{}: {what}", file.name())))?;
            let driver = LuksDriver {
                cipher: PayloadCipher::new(cipher, CountsFrom::Disk),
                payload: header.payload_offset(),
                fixed_size: header.has_fixed_size(),
                size: Cell::new(header.disk_bytes(file.length())),
                writable: open.writable,
                file,
            };
            Ok(Rc::new(driver) as Rc<dyn Driver>)
        })
    }

    fn create<'a>(
        &'a self,
        file: Rc<dyn ImageFile>,
        _data_files: Vec<Rc<dyn ImageFile>>,
        create: &'a Create,
    ) -> Pending<'a, ()> {
        Box::pin(async move {
            let (luks, wipe) = parse(create)?;
            let size = size_of(create)?;
            let new = luks.measured(PAYLOAD_ALIGN)?;
            let (header, key) = new.make(options::passphrase(create.key.as_ref())?)?;
            let payload = header.len() as u64;
            file.extend(payload + size).await?;
            let cipher = new.cipher.with_key(key.bytes()).map_err(Error::invalid)?;
            let cipher = PayloadCipher::new(cipher, CountsFrom::Disk);
            if wipe {
                wipe_range(&file, &cipher, payload, 0..size).await?;
            }
            file.flush().await?;
            // Last, so that an image that is not complete is none.
            file.write(0, Buf::copy_of(&header)).await?;
            file.flush().await
        })
    }

    fn starts_zero(&self, create: &Create) -> bool {
        parse(create).is_ok_and(|(_, wipe)| wipe)
    }

    fn space(&self, create: &Create) -> Result<Space, Error> {
        let overhead = parse(create)?.0.layout(PAYLOAD_ALIGN)?.area_bytes();
        Ok(Space { unit: SECTOR_BYTES, unit_space: SECTOR_BYTES, overhead })
    }

    fn check(&self, open: Open, _repair: Option<Repair>) -> Pending<'_, Findings> {
        Box::pin(async move {
            let file =
                open.files.first().cloned().ok_or_else(|| Error::invalid("a luks image needs its file"))?;
            let header = header_of(&file).await?;
            let mut found = Findings {
                allocated_bytes: header.disk_bytes(file.length()),
                end: file.length(),
                ..Findings::default()
            };
            if !header.has_slots() {
                found.corruption("none of its key slots is in use: no key opens it");
            }
            Ok(found)
        })
    }
}

fn parse(create: &Create) -> Result<(LuksOptions, bool), Error> {
    let (mut luks, mut wipe) = (LuksOptions::default(), true);
    for (name, value) in &create.options {
        match (name.as_str(), value.as_str()) {
            ("wipe", "on" | "yes" | "true") => wipe = true,
            ("wipe", "off" | "no" | "false") => wipe = false,
            ("wipe", _) => {
                return Err(Error::invalid(format!("option wipe is {value:?}: expected on or off")));
            }
            _ if luks.take(name, value)? => {}
            _ => {
                let known = options::KNOWN;
                return Err(Error::invalid(format!(
                    "a luks image has no option {name}: it has wipe, {known}"
                )));
            }
        }
    }
    Ok((luks, wipe))
}

fn size_of(create: &Create) -> Result<u64, Error> {
    if create.backing.is_some() {
        return Err(Error::invalid(
            "a luks image cannot have a parent: use qcow2 with encrypt.format=luks for the child",
        ));
    }
    let size = create.size.ok_or_else(|| Error::invalid("a luks image needs a size"))?;
    if !size.is_multiple_of(SECTOR_BYTES) || size > crate::raw::SIZE_MAX_BYTES - (1 << 30) {
        return Err(Error::invalid(format!("a size of {size} bytes: take a multiple of 512")));
    }
    Ok(size)
}

/// Fills a part of the disk with encrypted zeroes.
async fn wipe_range(
    file: &Rc<dyn ImageFile>,
    cipher: &PayloadCipher,
    payload: u64,
    range: Range<u64>,
) -> Result<(), Error> {
    let mut at = range.start;
    while at < range.end {
        let mut zeroes = Buf::zeroed((range.end - at).min(WIPE_STEP) as usize);
        let len = zeroes.len() as u64;
        let spot = Spot { disk: at, file: payload + at };
        cipher.encrypt(spot, &mut zeroes);
        file.write(spot.file, zeroes).await?;
        at += len;
    }
    Ok(())
}

fn done<'a, T: 'a>(result: Result<T, Error>) -> Pending<'a, T> {
    Box::pin(std::future::ready(result))
}

impl LuksDriver {
    fn check_writable(&self) -> Result<(), Error> {
        if self.writable {
            return Ok(());
        }
        Err(Error::new(ErrorKind::ReadOnly, format!("{} was opened read-only", self.file.name())))
    }
}

impl Driver for LuksDriver {
    fn size(&self) -> u64 {
        self.size.get()
    }

    fn granule(&self) -> u64 {
        self.cipher.sector_bytes()
    }

    fn cipher(&self) -> Option<&PayloadCipher> {
        Some(&self.cipher)
    }

    fn map(&self, offset: u64, len: u64, out: &mut Vec<Extent>) -> Result<u64, Error> {
        let place =
            Place::Data { file: FileIndex(0), offset: self.payload + offset, in_place: self.writable };
        out.push(Extent { start: offset, len, place });
        Ok(len)
    }

    fn load(&self, _offset: u64, _len: u64) -> Pending<'_, ()> {
        done(Ok(()))
    }

    fn plan_write(&self, offset: u64, _len: u64) -> Pending<'_, Plan> {
        // Only a read-only image sends writers here.
        let result = self.check_writable();
        done(result.and_then(|()| Err(Error::invalid(format!("byte {offset} has its place already")))))
    }

    fn commit(&self, _plan: Plan) -> Pending<'_, ()> {
        done(Ok(()))
    }

    fn abort(&self, _plan: Plan) {}

    fn erase(&self, _range: Range<u64>, _how: Erase) -> Pending<'_, Erased> {
        // A hole would be noise: see the module.
        done(self.check_writable().map(|()| Erased::WriteZeroes))
    }

    fn flush(&self) -> Pending<'_, ()> {
        done(Ok(()))
    }

    fn tidy(&self) -> Pending<'_, ()> {
        done(Ok(()))
    }

    fn resize(&self, size: u64) -> Pending<'_, ()> {
        Box::pin(async move {
            self.check_writable()?;
            let old = self.size.get();
            if self.fixed_size && size != old {
                let what = "its LUKS header says how large its disk is";
                return Err(Error::unsupported(self.file.name(), what));
            }
            if !size.is_multiple_of(self.granule()) || size > crate::raw::SIZE_MAX_BYTES - self.payload {
                let message = format!("a size of {size} bytes: take a multiple of {}", self.granule());
                return Err(Error::invalid(message));
            }
            if size < old {
                self.file.truncate(self.payload + size).await?;
            } else {
                // The file gets longer by encrypted zeroes that are durable: after a crash there may be some of them, and no noise.
                let mut at = old;
                while at < size {
                    let end = size.min(at + WIPE_STEP);
                    wipe_range(&self.file, &self.cipher, self.payload, at..end).await?;
                    self.file.flush().await?;
                    at = end;
                }
            }
            self.size.set(size);
            Ok(())
        })
    }

    fn close(&self) -> Pending<'_, ()> {
        Box::pin(async move { if self.writable { self.file.flush().await } else { Ok(()) } })
    }

    fn usage(&self) -> Usage {
        Usage::default()
    }
}
