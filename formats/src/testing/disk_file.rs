//! A file of the system as an image file: every operation is done when its future is made, and a flush costs nothing. For images that
//! other programs make or read.

use std::cell::Cell;
use std::fs::{File, OpenOptions};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::rc::Rc;

use crate::error::Error;
use crate::file::{Buf, ImageFile, Pending};

/// See the module.
#[derive(Debug)]
pub struct DiskFile {
    name: String,
    file: File,
    writable: bool,
    /// Changes that were asked for although the file was opened read-only.
    pub forbidden: Cell<u64>,
    /// Bytes that were read.
    pub read_bytes: Cell<u64>,
}

impl DiskFile {
    /// Opens a file; a writable one is made if it is not there.
    ///
    /// # Panics
    /// It cannot be opened: the test cannot go on.
    pub fn open(path: &Path, writable: bool) -> Rc<DiskFile> {
        let mut options = OpenOptions::new();
        let file = options.read(true).write(writable).create(writable).truncate(false).open(path);
        let name = path.display().to_string();
        let file = file.unwrap_or_else(|error| panic!("{name}: {error}"));
        Rc::new(DiskFile { name, file, writable, forbidden: Cell::new(0), read_bytes: Cell::new(0) })
    }

    fn failed(&self, what: &str, error: &std::io::Error) -> Error {
        Error::io(&self.name, what, error.raw_os_error().unwrap_or(5))
    }

    fn change(&self, made: impl FnOnce(&File) -> std::io::Result<()>) -> Pending<'static, ()> {
        if !self.writable {
            self.forbidden.set(self.forbidden.get() + 1);
        }
        done(made(&self.file).map_err(|error| self.failed("a change", &error)))
    }
}

fn done<T: 'static>(result: Result<T, Error>) -> Pending<'static, T> {
    Box::pin(std::future::ready(result))
}

impl ImageFile for DiskFile {
    fn name(&self) -> &str {
        &self.name
    }

    fn length(&self) -> u64 {
        self.file.metadata().map_or(0, |metadata| metadata.len())
    }

    fn is_device(&self) -> bool {
        false
    }

    fn is_writable(&self) -> bool {
        self.writable
    }

    fn read(&self, offset: u64, len: usize) -> Pending<'static, Buf> {
        self.read_bytes.set(self.read_bytes.get() + len as u64);
        let mut buf = Buf::zeroed(len);
        let mut at = 0;
        while at < len {
            match self.file.read_at(&mut buf[at..], offset + at as u64) {
                Ok(0) => break,
                Ok(count) => at += count,
                Err(error) => return done(Err(self.failed("a read", &error))),
            }
        }
        done(Ok(buf))
    }

    fn write(&self, offset: u64, data: Buf) -> Pending<'static, ()> {
        self.change(|file| file.write_all_at(&data, offset))
    }

    fn flush(&self) -> Pending<'static, ()> {
        done(Ok(()))
    }

    fn extend(&self, length: u64) -> Pending<'static, ()> {
        if length <= self.length() {
            return done(Ok(()));
        }
        self.change(|file| file.set_len(length))
    }

    fn truncate(&self, length: u64) -> Pending<'static, ()> {
        self.change(|file| file.set_len(length))
    }

    fn zero(&self, range: Range<u64>) -> Pending<'static, ()> {
        assert!(range.start <= range.end, "{range:?}");
        self.change(|file| {
            let zeroes = vec![0; (1 << 20).min((range.end - range.start) as usize)];
            let mut at = range.start;
            while at < range.end {
                let len = zeroes.len().min((range.end - at) as usize);
                file.write_all_at(&zeroes[..len], at)?;
                at += len as u64;
            }
            Ok(())
        })
    }
}
