//! The driver of raw images: the disk is the file. As the smallest driver it shows what each method is for.
//!
//! Every byte has its place and no metadata says so: [`Driver::map`] answers from nothing but the size, so `load` and plans are
//! never needed. The disk is the file's length rounded up to sectors ([`served_size`]); bytes behind the end of the file read as
//! zero and a write to them extends it.

use std::cell::Cell;
use std::future::ready;
use std::ops::Range;
use std::rc::Rc;

use super::{SECTOR_BYTES, SIZE_MAX_BYTES, served_size};
use crate::driver::{
    Create, Description, Driver, Erase, Erased, Extent, FileIndex, Findings, Format, Open, Place, Plan,
    Repair, Usage,
};
use crate::error::{Error, ErrorKind};
use crate::file::{ImageFile, Pending};

/// The format `raw`.
#[derive(Debug)]
pub struct Raw;

/// An opened raw image.
#[derive(Debug)]
struct RawDriver {
    file: Rc<dyn ImageFile>,
    size: Cell<u64>,
    writable: bool,
}

/// The answer of something that takes no time.
fn done<'a, T: 'a>(result: Result<T, Error>) -> Pending<'a, T> {
    Box::pin(ready(result))
}

fn size_of(file: &dyn ImageFile) -> Result<u64, Error> {
    let length = file.length();
    served_size(length).ok_or_else(|| {
        let what = format!("{} holds {length} bytes; a disk has at most {SIZE_MAX_BYTES}", file.name());
        Error::new(ErrorKind::Unsupported, what)
    })
}

impl RawDriver {
    fn check_writable(&self) -> Result<(), Error> {
        if self.writable {
            return Ok(());
        }
        Err(Error::new(ErrorKind::ReadOnly, format!("{} was opened read-only", self.file.name())))
    }
}

impl Driver for RawDriver {
    fn size(&self) -> u64 {
        self.size.get()
    }

    fn granule(&self) -> u64 {
        SECTOR_BYTES
    }

    fn map(&self, offset: u64, len: u64, out: &mut Vec<Extent>) -> Result<u64, Error> {
        let place = Place::Data { file: FileIndex(0), offset, in_place: self.writable };
        out.push(Extent { start: offset, len, place });
        Ok(len)
    }

    fn load(&self, _offset: u64, _len: u64) -> Pending<'_, ()> {
        done(Ok(()))
    }

    fn plan_write(&self, offset: u64, _len: u64) -> Pending<'_, Plan> {
        let message = format!("{}: a raw image needs no plan to be written at {offset}", self.file.name());
        done(self.check_writable().and(Err(Error::invalid(message))))
    }

    fn commit(&self, _plan: Plan) -> Pending<'_, ()> {
        done(Ok(()))
    }

    fn abort(&self, _plan: Plan) {}

    fn erase(&self, range: Range<u64>, how: Erase) -> Pending<'_, Erased> {
        Box::pin(async move {
            self.check_writable()?;
            if how == Erase::ZeroKeep {
                // The file can only be told to give space back.
                return Ok(Erased::WriteZeroes);
            }
            self.file.zero(range).await?;
            Ok(Erased::Done)
        })
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
            if !size.is_multiple_of(SECTOR_BYTES) || size > SIZE_MAX_BYTES {
                let name = self.file.name();
                let message = format!(
                    "{name} cannot get {size} bytes: a multiple of {SECTOR_BYTES} up to {SIZE_MAX_BYTES} is possible"
                );
                return Err(Error::invalid(message));
            }
            if self.file.is_device() && size > self.file.length() {
                let (name, length) = (self.file.name(), self.file.length());
                let message = format!("{name} is a device of {length} bytes: enlarge it before the disk");
                return Err(Error::invalid(message));
            }
            // The end of the file first, so that what is cut off does not come back when the disk grows again.
            self.file.truncate(size).await?;
            self.file.extend(size).await?;
            self.size.set(size);
            Ok(())
        })
    }

    fn close(&self) -> Pending<'_, ()> {
        if self.writable { self.file.flush() } else { done(Ok(())) }
    }

    fn usage(&self) -> Usage {
        Usage::default()
    }
}

impl Format for Raw {
    fn name(&self) -> &'static str {
        "raw"
    }

    /// Never: a guest can write anything into a raw disk.
    fn recognises(&self, _head: &[u8], _tail: &[u8]) -> bool {
        false
    }

    fn describe(&self, file: Rc<dyn ImageFile>) -> Pending<'_, Description> {
        done(size_of(&*file).map(|size| Description {
            size,
            backing: None,
            data_files: Vec::new(),
            identity: None,
            writable: Ok(()),
            properties: Vec::new(),
        }))
    }

    fn open(&self, open: Open) -> Pending<'_, Rc<dyn Driver>> {
        let opened = || {
            let Some(file) = open.files.first() else {
                return Err(Error::invalid("a raw image has one file, none was given"));
            };
            let name = file.name();
            if let Some(snapshot) = &open.snapshot {
                return Err(Error::invalid(format!("{name} is raw and has no snapshot {snapshot}")));
            }
            if open.below_size.is_some() {
                return Err(Error::invalid(format!("{name} is raw: it hides every layer below it")));
            }
            let driver =
                RawDriver { file: file.clone(), size: Cell::new(size_of(&**file)?), writable: open.writable };
            Ok(Rc::new(driver) as Rc<dyn Driver>)
        };
        done(opened())
    }

    fn create<'a>(
        &'a self,
        file: Rc<dyn ImageFile>,
        _data_files: Vec<Rc<dyn ImageFile>>,
        create: &'a Create,
    ) -> Pending<'a, ()> {
        Box::pin(async move {
            let name = file.name();
            if let Some((option, _)) = create.options.first() {
                return Err(Error::invalid(format!(
                    "raw images have no option {option}, nor any other ({name})"
                )));
            }
            if create.backing.is_some() {
                return Err(Error::invalid(format!("{name}: a raw image cannot lie over another one")));
            }
            let Some(size) = create.size else {
                return Err(Error::invalid(format!("{name}: a raw image needs a size")));
            };
            if !size.is_multiple_of(SECTOR_BYTES) || size > SIZE_MAX_BYTES {
                let message = format!(
                    "{name}: {size} bytes are not a multiple of {SECTOR_BYTES} up to {SIZE_MAX_BYTES}"
                );
                return Err(Error::invalid(message));
            }
            file.extend(size).await?;
            if file.is_device() {
                file.zero(0..size).await?;
            }
            file.flush().await
        })
    }

    /// Every sequence of bytes is a sound raw image.
    fn check(&self, open: Open, _repair: Option<Repair>) -> Pending<'_, Findings> {
        let length = open.files.first().map_or(0, |file| file.length());
        done(Ok(Findings { allocated_bytes: length, end: length, ..Findings::default() }))
    }
}

#[cfg(test)]
mod tests {
    //! Goal: what is special of raw: odd lengths, devices, refusals. Method: single calls; reading and writing is the conformance
    //! suite's.

    use super::*;
    use crate::driver::Budget;
    use crate::testing::{MemFile, Pages, Store};

    fn open(file: &Rc<MemFile>, writable: bool) -> Open {
        let (files, budget) = (vec![file.clone() as Rc<dyn ImageFile>], Budget::new(1 << 20));
        Open { files, writable, below_size: None, budget, log: None, snapshot: None }
    }

    #[test]
    fn the_last_sector_may_be_a_part_of_one() {
        let store = Store::new(1);
        let file = store.add("a", Pages::of(&[7; 700]));
        let driver = store.run(Raw.open(open(&file, true))).unwrap();
        assert_eq!(driver.size(), 1024);
        assert_eq!(store.run(Raw.describe(file)).unwrap().size, 1024);
    }

    #[test]
    fn sizes_change_and_the_new_part_is_zero() {
        let store = Store::new(1);
        let file = store.add("a", Pages::of(&[7; 4096]));
        let driver = store.run(Raw.open(open(&file, true))).unwrap();
        store.run(driver.resize(1024)).unwrap();
        store.run(driver.resize(2048)).unwrap();
        assert_eq!(driver.size(), 2048);
        assert_eq!(store.pages(0).bytes(0..2048), [[7; 1024], [0; 1024]].concat());
        store.run(driver.resize(1000)).unwrap_err();
    }

    #[test]
    fn refusals_name_what_they_refuse() {
        let store = Store::new(1);
        let file = store.add("disk.img", Pages::device(8192, 1));
        let driver = store.run(Raw.open(open(&file, true))).unwrap();
        let error = store.run(driver.resize(16384)).unwrap_err();
        assert!(error.message.contains("disk.img is a device of 8192 bytes"), "{error}");
        let read_only = store.run(Raw.open(open(&file, false))).unwrap();
        assert_eq!(store.run(read_only.erase(0..512, Erase::Zero)).unwrap_err().kind, ErrorKind::ReadOnly);
        let options = vec![("preallocation".to_string(), "off".to_string())];
        let create = Create { size: Some(512), backing: None, options };
        let error = store.run(Raw.create(file.clone(), vec![], &create)).unwrap_err();
        assert!(error.message.contains("preallocation"), "{error}");
        assert!(store.violations().is_empty());
    }
}
