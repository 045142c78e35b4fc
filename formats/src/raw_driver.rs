//! The raw format as a driver: what a chain needs at its end, and the smallest complete driver there is.
//!
//! Every byte has its place from the start, so nothing is ever planned. A raw disk that is alone needs no driver in the daemon: its
//! requests are the file's.

use std::ops::Range;
use std::rc::Rc;

use crate::driver::{
    Create, Description, Driver, Erase, Erased, Extent, FileIndex, Findings, Format, Open, Place, Plan,
    Repair, Space, Usage,
};
use crate::error::Error;
use crate::file::{ImageFile, Pending};
use crate::raw::{SECTOR_BYTES, served_size};

/// The raw format.
#[derive(Debug)]
pub struct Raw;

/// An opened raw image.
struct RawDriver {
    file: Rc<dyn ImageFile>,
    size: std::cell::Cell<u64>,
    writable: bool,
}

fn size_of(file: &dyn ImageFile) -> Result<u64, Error> {
    let length = file.length();
    served_size(length).ok_or_else(|| {
        Error::invalid(format!("{}: {length} bytes are more than a disk can have", file.name()))
    })
}

fn no_option(name: &str) -> Error {
    Error::invalid(format!("a raw image has no option {name}: it has none at all"))
}

fn done<'a, T: 'a>(result: Result<T, Error>) -> Pending<'a, T> {
    Box::pin(std::future::ready(result))
}

impl Format for Raw {
    fn name(&self) -> &'static str {
        "raw"
    }

    fn recognises(&self, _head: &[u8], _tail: &[u8]) -> bool {
        // Anything can be a raw disk; that is why nobody guesses it.
        false
    }

    fn describe(&self, file: Rc<dyn ImageFile>) -> Pending<'_, Description> {
        done(size_of(&*file).map(|size| Description {
            size,
            backing: None,
            data_files: Vec::new(),
            identity: None,
            writable: Ok(()),
            encryption: None,
            properties: Vec::new(),
        }))
    }

    fn open(&self, open: Open) -> Pending<'_, Rc<dyn Driver>> {
        let Some(file) = open.files.first().cloned() else {
            return done(Err(Error::invalid("a raw image needs its file")));
        };
        done(size_of(&*file).map(|size| {
            let size = std::cell::Cell::new(size);
            Rc::new(RawDriver { file, size, writable: open.writable }) as Rc<dyn Driver>
        }))
    }

    fn create<'a>(
        &'a self,
        file: Rc<dyn ImageFile>,
        _data_files: Vec<Rc<dyn ImageFile>>,
        create: &'a Create,
    ) -> Pending<'a, ()> {
        Box::pin(async move {
            if let Some((name, _)) = create.options.first() {
                return Err(no_option(name));
            }
            if create.backing.is_some() {
                return Err(Error::invalid(
                    "a raw image cannot have a parent: use qcow2 or vhd for the child",
                ));
            }
            let size = create.size.ok_or_else(|| Error::invalid("a raw image needs a size"))?;
            if !size.is_multiple_of(SECTOR_BYTES) || served_size(size).is_none() {
                return Err(Error::invalid(format!("a size of {size} bytes: take a multiple of 512")));
            }
            file.extend(size).await?;
            if file.is_device() {
                // Nobody knows what it held.
                file.zero(0..size).await?;
            }
            file.flush().await
        })
    }

    fn space(&self, create: &Create) -> Result<Space, Error> {
        match create.options.first() {
            Some((name, _)) => Err(no_option(name)),
            None => Ok(Space { unit: SECTOR_BYTES, unit_space: SECTOR_BYTES, overhead: 0 }),
        }
    }

    fn check(&self, open: Open, _repair: Option<Repair>) -> Pending<'_, Findings> {
        let size = open.files.first().map(|file| file.length()).unwrap_or_default();
        done(Ok(Findings { allocated_bytes: size, end: size, ..Findings::default() }))
    }
}

impl RawDriver {
    fn check_writable(&self) -> Result<(), Error> {
        if self.writable {
            return Ok(());
        }
        let message = format!("{} was opened read-only", self.file.name());
        Err(Error::new(crate::error::ErrorKind::ReadOnly, message))
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
        // Only a read-only image sends writers here.
        let result = self.check_writable();
        done(result.and_then(|()| Err(Error::invalid(format!("byte {offset} has its place already")))))
    }

    fn commit(&self, _plan: Plan) -> Pending<'_, ()> {
        done(Ok(()))
    }

    fn abort(&self, _plan: Plan) {}

    fn erase(&self, range: Range<u64>, how: Erase) -> Pending<'_, Erased> {
        Box::pin(async move {
            self.check_writable()?;
            if how == Erase::ZeroKeep {
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
            if !size.is_multiple_of(SECTOR_BYTES) || served_size(size).is_none() {
                return Err(Error::invalid(format!("a size of {size} bytes: take a multiple of 512")));
            }
            let before = self.size.get();
            if size < before {
                self.file.truncate(size).await?;
            } else {
                self.file.extend(size).await?;
                if self.file.is_device() {
                    self.file.zero(before..size).await?;
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
