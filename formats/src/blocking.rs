//! A file of the operating system as an [`ImageFile`] whose operations are done when they are made: for threads that may block
//! (headers on the control side, `image info`, tests). Buffered, so any offset will do.

use std::cell::Cell;
use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::ops::Range;
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::Path;
use std::rc::Rc;

use crate::error::Error;
use crate::file::{Buf, ImageFile, Pending};

/// Bytes of zeroes that are written at a time.
const ZERO_RUN: usize = 1 << 20;

/// A file that blocks. See the module.
#[derive(Debug)]
pub struct Blocking {
    file: File,
    name: String,
    device: bool,
    writable: bool,
    length: Cell<u64>,
    /// A flush failed: none succeeds any more.
    flush_failed: Cell<Option<i32>>,
}

fn errno(error: &std::io::Error) -> i32 {
    error.raw_os_error().unwrap_or(5)
}

/// The answer of a future that never waits, as those over [`Blocking`] files do; one that waits all the same is polled until it
/// is done.
pub fn wait<T>(future: impl Future<Output = T>) -> T {
    let mut future = std::pin::pin!(future);
    let mut context = std::task::Context::from_waker(std::task::Waker::noop());
    loop {
        if let std::task::Poll::Ready(value) = future.as_mut().poll(&mut context) {
            return value;
        }
        std::thread::yield_now();
    }
}

fn done<T: 'static>(result: Result<T, Error>) -> Pending<'static, T> {
    Box::pin(std::future::ready(result))
}

impl Blocking {
    /// A file that somebody opened (without O_DIRECT). `name` is its path, for messages.
    ///
    /// # Errors
    /// Neither a regular file nor a block device.
    pub fn new(mut file: File, name: &str, writable: bool) -> Result<Rc<Blocking>, Error> {
        let failed = |error: std::io::Error| Error::io(name, "looking at it", errno(&error));
        let kind = file.metadata().map_err(failed)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(Error::invalid(format!("{name} is neither a regular file nor a block device")));
        }
        // Of a device the metadata has no length.
        let length = file.seek(SeekFrom::End(0)).map_err(failed)?;
        Ok(Rc::new(Blocking {
            file,
            name: name.to_owned(),
            device: kind.is_block_device(),
            writable,
            length: Cell::new(length),
            flush_failed: Cell::new(None),
        }))
    }

    /// Opens a path.
    ///
    /// # Errors
    /// As the system says, and those of [`Blocking::new`].
    pub fn open(path: &Path, writable: bool) -> Result<Rc<Blocking>, Error> {
        let name = path.display().to_string();
        let file = File::options()
            .read(true)
            .write(writable)
            .open(path)
            .map_err(|error| Error::io(&name, "open", errno(&error)))?;
        Blocking::new(file, &name, writable)
    }

    fn check_writable(&self) -> Result<(), Error> {
        if self.writable {
            return Ok(());
        }
        let message = format!("{} was opened read-only", self.name);
        Err(Error::new(crate::error::ErrorKind::ReadOnly, message))
    }

    fn read_now(&self, offset: u64, len: usize) -> Result<Buf, Error> {
        // Whole blocks, so that a file that somebody opened with O_DIRECT will do.
        const BLOCK: u64 = 4096;
        let start = offset - offset % BLOCK;
        let whole = ((offset + len as u64).next_multiple_of(BLOCK) - start) as usize;
        if start != offset || whole != len {
            let buf = self.read_blocks(start, whole)?;
            return Ok(Buf::copy_of(&buf[(offset - start) as usize..][..len]));
        }
        self.read_blocks(offset, len)
    }

    fn read_blocks(&self, offset: u64, len: usize) -> Result<Buf, Error> {
        let mut buf = Buf::zeroed(len);
        let mut at = 0;
        while at < len {
            match self.file.read_at(&mut buf[at..], offset + at as u64) {
                // What is behind the end is zero.
                Ok(0) => break,
                Ok(n) => at += n,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => {
                    let what = format!("read of {len} bytes at {offset}");
                    return Err(Error::io(&self.name, what, errno(&error)));
                }
            }
        }
        Ok(buf)
    }

    fn write_now(&self, offset: u64, data: &[u8]) -> Result<(), Error> {
        self.check_writable()?;
        self.file.write_all_at(data, offset).map_err(|error| {
            Error::io(&self.name, format!("write of {} bytes at {offset}", data.len()), errno(&error))
        })?;
        self.length.set(self.length.get().max(offset + data.len() as u64));
        Ok(())
    }

    fn set_length(&self, length: u64) -> Result<(), Error> {
        self.check_writable()?;
        self.file.set_len(length).map_err(|error| {
            Error::io(&self.name, format!("setting its length to {length}"), errno(&error))
        })?;
        self.length.set(length);
        Ok(())
    }

    fn flush_now(&self) -> Result<(), Error> {
        if self.flush_failed.get().is_none()
            && let Err(error) = self.file.sync_data()
        {
            self.flush_failed.set(Some(errno(&error)));
        }
        match self.flush_failed.get() {
            None => Ok(()),
            Some(errno) => Err(Error::io(&self.name, "fdatasync", errno)),
        }
    }

    fn zero_now(&self, range: Range<u64>) -> Result<(), Error> {
        self.check_writable()?;
        if self.device {
            return self.write_zeroes(range);
        }
        // Never cut and grown again: a kill in between would leave a shorter disk.
        let inside = range.start..range.end.min(self.length.get());
        if inside.start < inside.end {
            use rustix::fs::{FallocateFlags, fallocate};
            let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            if fallocate(&self.file, punch, inside.start, inside.end - inside.start).is_err() {
                // A store without holes.
                self.write_zeroes(inside)?;
            }
        }
        if range.end > self.length.get() {
            self.set_length(range.end)?;
        }
        Ok(())
    }

    fn write_zeroes(&self, range: Range<u64>) -> Result<(), Error> {
        let zeroes = vec![0; ZERO_RUN.min((range.end - range.start) as usize)];
        let mut at = range.start;
        while at < range.end {
            let run = zeroes.len().min((range.end - at) as usize);
            self.write_now(at, &zeroes[..run])?;
            at += run as u64;
        }
        Ok(())
    }
}

/// What the store of a regular file of `length` bytes has from `offset` on, as [`ImageFile::data_run`] says it. Stores that cannot
/// tell have data everywhere.
pub fn data_run(file: &File, offset: u64, length: u64) -> (u64, bool) {
    use rustix::fs::{SeekFrom, seek};
    if offset >= length {
        return (u64::MAX - offset, false);
    }
    let rest = length - offset;
    match seek(file, SeekFrom::Data(offset)) {
        Ok(data) if data > offset => (data - offset, false),
        Ok(_) => match seek(file, SeekFrom::Hole(offset)) {
            Ok(hole) if hole > offset => (hole - offset, true),
            _ => (rest, true),
        },
        // No data up to the end.
        Err(rustix::io::Errno::NXIO) => (rest, false),
        Err(_) => (rest, true),
    }
}

impl ImageFile for Blocking {
    fn name(&self) -> &str {
        &self.name
    }

    fn length(&self) -> u64 {
        self.length.get()
    }

    fn is_device(&self) -> bool {
        self.device
    }

    fn is_writable(&self) -> bool {
        self.writable
    }

    fn read(&self, offset: u64, len: usize) -> Pending<'static, Buf> {
        done(self.read_now(offset, len))
    }

    fn write(&self, offset: u64, data: Buf) -> Pending<'static, ()> {
        done(self.write_now(offset, &data))
    }

    fn flush(&self) -> Pending<'static, ()> {
        done(self.flush_now())
    }

    fn extend(&self, length: u64) -> Pending<'static, ()> {
        done(match (length <= self.length.get(), self.device) {
            (true, _) => Ok(()),
            (false, true) => Err(Error::io(&self.name, format!("growing to {length} bytes"), 28)),
            (false, false) => self.set_length(length),
        })
    }

    fn truncate(&self, length: u64) -> Pending<'static, ()> {
        done(if self.device { Ok(()) } else { self.set_length(length) })
    }

    fn zero(&self, range: Range<u64>) -> Pending<'static, ()> {
        done(if range.start < range.end { self.zero_now(range) } else { Ok(()) })
    }

    fn data_run(&self, offset: u64) -> Pending<'static, (u64, bool)> {
        done(Ok(if self.device { (u64::MAX, true) } else { data_run(&self.file, offset, self.length.get()) }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};

    /// Goal: no instant of making zeroes leaves the file shorter than it was. Method: a file that its store does not let shrink;
    /// ranges inside of it, up to its end, over its end and behind it.
    #[test]
    fn zeroes_never_make_a_file_shorter() {
        for (range, length) in [
            (4096..8192, 20_000),
            (100..20_000, 20_000),
            (0..20_000, 20_000),
            (19_000..30_000, 30_000),
            (25_000..30_000, 30_000),
        ] {
            let memory = File::from(memfd_create("image", MemfdFlags::ALLOW_SEALING).unwrap());
            memory.write_all_at(&[7; 20_000], 0).unwrap();
            fcntl_add_seals(&memory, SealFlags::SHRINK).unwrap();
            let file = Blocking::new(memory.try_clone().unwrap(), "image", true).unwrap();
            wait(file.zero(range.clone())).unwrap();
            let mut expected = vec![7; 20_000];
            expected.resize(length, 0);
            expected[range.start as usize..range.end as usize].fill(0);
            let mut found = vec![1; length];
            memory.read_exact_at(&mut found, 0).unwrap();
            assert!(found == expected, "{range:?}");
            assert_eq!((file.length(), memory.metadata().unwrap().len()), (length as u64, length as u64));
        }
    }
}
