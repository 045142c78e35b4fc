//! Files for tests: in memory with a record of what was done, and on disk for other programs.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::rc::Rc;

use crate::error::Error;
use crate::file::{Buf, ImageFile, Pending};

const PAGE: u64 = 4096;

/// What was done to a file.
#[derive(Debug, Clone)]
pub enum Op {
    Write(u64, Rc<[u8]>),
    Zero(Range<u64>),
    Truncate(u64),
    Flush,
}

/// Sparse bytes.
#[derive(Debug, Clone, Default)]
pub struct Bytes {
    pages: BTreeMap<u64, Rc<[u8]>>,
    pub length: u64,
}

impl Bytes {
    pub fn of(bytes: &[u8]) -> Bytes {
        let mut made = Bytes::default();
        made.write(0, bytes);
        made
    }

    pub fn read(&self, offset: u64, out: &mut [u8]) {
        let mut at = 0;
        while at < out.len() {
            let position = offset + at as u64;
            let in_page = (position % PAGE) as usize;
            let len = (out.len() - at).min(PAGE as usize - in_page);
            match self.pages.get(&(position / PAGE)) {
                Some(page) if position < self.length => {
                    out[at..at + len].copy_from_slice(&page[in_page..in_page + len]);
                }
                _ => out[at..at + len].fill(0),
            }
            at += len;
        }
    }

    pub fn write(&mut self, offset: u64, bytes: &[u8]) {
        let mut at = 0;
        while at < bytes.len() {
            let position = offset + at as u64;
            let in_page = (position % PAGE) as usize;
            let len = (bytes.len() - at).min(PAGE as usize - in_page);
            let empty = || vec![0u8; PAGE as usize].into();
            let page: &mut Rc<[u8]> = self.pages.entry(position / PAGE).or_insert_with(empty);
            Rc::make_mut(page)[in_page..in_page + len].copy_from_slice(&bytes[at..at + len]);
            at += len;
        }
        self.length = self.length.max(offset + bytes.len() as u64);
    }

    fn zero(&mut self, range: Range<u64>) {
        let mut at = range.start;
        while at < range.end {
            let end = range.end.min((at / PAGE + 1) * PAGE);
            if end - at == PAGE {
                self.pages.remove(&(at / PAGE));
            } else if self.pages.contains_key(&(at / PAGE)) {
                let length = self.length;
                self.write(at, &vec![0; (end - at) as usize]);
                self.length = length;
            }
            at = end;
        }
    }

    pub fn apply(&mut self, op: &Op) {
        match op {
            Op::Write(offset, bytes) => self.write(*offset, bytes),
            Op::Zero(range) => {
                self.zero(range.clone());
                self.length = self.length.max(range.end);
            }
            Op::Truncate(length) => {
                if *length < self.length {
                    self.zero(*length..self.length.next_multiple_of(PAGE));
                }
                self.length = *length;
            }
            Op::Flush => {}
        }
    }

    /// All of them, for small files.
    pub fn to_vec(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.length as usize];
        self.read(0, &mut bytes);
        bytes
    }
}

/// A file in memory. Everything is done at once.
#[derive(Debug)]
pub struct Mem {
    pub bytes: RefCell<Bytes>,
    pub writable: bool,
    pub device: bool,
    /// What was done, when it is wanted.
    pub record: RefCell<Option<Vec<Op>>>,
    /// Changes that work until all fail.
    pub changes_left: Cell<u64>,
}

impl Mem {
    pub fn new(bytes: Bytes) -> Rc<Mem> {
        Rc::new(Mem::plain(bytes))
    }

    pub fn plain(bytes: Bytes) -> Mem {
        Mem {
            bytes: RefCell::new(bytes),
            writable: true,
            device: false,
            record: RefCell::new(None),
            changes_left: Cell::new(u64::MAX),
        }
    }

    fn done(&self, op: Op) -> Pending<'static, ()> {
        assert!(self.writable, "a change of a file that was opened read-only: {op:?}");
        if self.changes_left.get() == 0 {
            return Box::pin(std::future::ready(Err(Error::io("mem", "a change", 28))));
        }
        self.changes_left.set(self.changes_left.get() - 1);
        assert!(!self.device || !matches!(op, Op::Write(at, _) if at >= self.length()));
        self.bytes.borrow_mut().apply(&op);
        if let Some(record) = &mut *self.record.borrow_mut() {
            record.push(op);
        }
        Box::pin(std::future::ready(Ok(())))
    }
}

impl ImageFile for Mem {
    fn name(&self) -> &str {
        "mem.vhd"
    }
    fn length(&self) -> u64 {
        self.bytes.borrow().length
    }
    fn is_device(&self) -> bool {
        self.device
    }
    fn is_writable(&self) -> bool {
        self.writable
    }
    fn read(&self, offset: u64, len: usize) -> Pending<'static, Buf> {
        assert!(len <= 64 << 20, "an unreasonable read of {len} bytes");
        let mut buf = Buf::zeroed(len);
        self.bytes.borrow().read(offset, &mut buf);
        Box::pin(std::future::ready(Ok(buf)))
    }
    fn write(&self, offset: u64, data: Buf) -> Pending<'static, ()> {
        self.done(Op::Write(offset, data[..].into()))
    }
    fn flush(&self) -> Pending<'static, ()> {
        self.done(Op::Flush)
    }
    fn extend(&self, length: u64) -> Pending<'static, ()> {
        if length > self.length() {
            self.done(Op::Truncate(length))
        } else {
            Box::pin(std::future::ready(Ok(())))
        }
    }
    fn truncate(&self, length: u64) -> Pending<'static, ()> {
        self.done(Op::Truncate(length))
    }
    fn zero(&self, range: Range<u64>) -> Pending<'static, ()> {
        self.done(Op::Zero(range))
    }
}

/// A file on disk.
#[derive(Debug)]
pub struct Disk {
    name: String,
    file: std::fs::File,
    writable: bool,
}

impl Disk {
    /// Opens, or makes, a file.
    pub fn open(path: &std::path::Path, writable: bool) -> Rc<dyn ImageFile> {
        let mut options = std::fs::OpenOptions::new();
        let file = options.read(true).write(writable).create(writable).truncate(false).open(path).unwrap();
        Rc::new(Disk { name: path.display().to_string(), file, writable })
    }
}

fn ready<T: 'static>(name: &str, result: std::io::Result<T>) -> Pending<'static, T> {
    let result = result.map_err(|error| Error::io(name, "an operation", error.raw_os_error().unwrap_or(5)));
    Box::pin(std::future::ready(result))
}

impl ImageFile for Disk {
    fn name(&self) -> &str {
        &self.name
    }
    fn length(&self) -> u64 {
        self.file.metadata().unwrap().len()
    }
    fn is_device(&self) -> bool {
        false
    }
    fn is_writable(&self) -> bool {
        self.writable
    }
    fn read(&self, offset: u64, len: usize) -> Pending<'static, Buf> {
        let mut buf = Buf::zeroed(len);
        let mut at = 0;
        while at < len {
            match self.file.read_at(&mut buf[at..], offset + at as u64) {
                Ok(0) => break,
                Ok(read) => at += read,
                Err(error) => return ready(&self.name, Err(error)),
            }
        }
        ready(&self.name, Ok(buf))
    }
    fn write(&self, offset: u64, data: Buf) -> Pending<'static, ()> {
        ready(&self.name, self.file.write_all_at(&data, offset))
    }
    fn flush(&self) -> Pending<'static, ()> {
        ready(&self.name, Ok(()))
    }
    fn extend(&self, length: u64) -> Pending<'static, ()> {
        ready(&self.name, self.file.set_len(self.length().max(length)))
    }
    fn truncate(&self, length: u64) -> Pending<'static, ()> {
        ready(&self.name, self.file.set_len(length))
    }
    fn zero(&self, range: Range<u64>) -> Pending<'static, ()> {
        let zeroes = vec![0; (range.end - range.start) as usize];
        ready(&self.name, self.file.write_all_at(&zeroes, range.start))
    }
}
