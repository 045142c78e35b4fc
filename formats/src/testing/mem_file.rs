//! A file of the simulated store, as drivers see it.

use std::cell::Cell;
use std::ops::Range;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};

use super::fault::Kind;
use super::pages::Pages;
use super::record::Change;
use super::store::{Action, Answer, Store};
use crate::error::Error;
use crate::file::{Buf, ImageFile, Pending};

/// An opened file of a [`Store`]. A flush that failed makes all later flushes of this object fail.
#[derive(Debug)]
pub struct MemFile {
    store: Rc<Store>,
    file: usize,
    name: String,
    writable: bool,
    failed_flush: Rc<Cell<Option<i32>>>,
}

impl MemFile {
    pub(super) fn new(store: Rc<Store>, file: usize, name: &str, writable: bool) -> Rc<MemFile> {
        let failed_flush = Rc::new(Cell::new(None));
        Rc::new(MemFile { store, file, name: name.to_string(), writable, failed_flush })
    }

    /// A file in a store of its own whose operations are done when they are made ([`Store::done_at_once`]).
    pub fn alone(name: &str, pages: Pages, writable: bool) -> Rc<MemFile> {
        let store = Store::new(0);
        store.done_at_once();
        let file = store.add(name, pages);
        if writable { file } else { store.open(file.file(), false) }
    }

    /// The store it is in.
    pub fn store(&self) -> &Rc<Store> {
        &self.store
    }

    /// A copy of what it holds now.
    pub fn pages(&self) -> Pages {
        self.store.pages(self.file)
    }

    /// Its number in the store.
    pub fn file(&self) -> usize {
        self.file
    }

    pub(super) fn label(&self) -> &str {
        &self.name
    }

    pub(super) fn may_write(&self) -> bool {
        self.writable
    }

    pub(super) fn failed_flush(&self) -> Rc<Cell<Option<i32>>> {
        self.failed_flush.clone()
    }

    fn change(&self, kind: Kind, change: Change) -> Pending<'static, ()> {
        let waiting = Waiting(self.store.submit(self, kind, Action::Change(change)));
        Box::pin(async { waiting.await.map(drop) })
    }
}

impl ImageFile for MemFile {
    fn name(&self) -> &str {
        &self.name
    }

    fn length(&self) -> u64 {
        self.store.length(self.file)
    }

    fn is_device(&self) -> bool {
        self.store.is_device(self.file)
    }

    fn is_writable(&self) -> bool {
        self.writable
    }

    fn read(&self, offset: u64, len: usize) -> Pending<'static, Buf> {
        let range = offset..offset.saturating_add(len as u64);
        Box::pin(Waiting(self.store.submit(self, Kind::Read, Action::Read(range))))
    }

    fn write(&self, offset: u64, data: Buf) -> Pending<'static, ()> {
        self.change(Kind::Write, Change::Write { offset, data: data[..].into() })
    }

    fn flush(&self) -> Pending<'static, ()> {
        self.change(Kind::Flush, Change::Flush)
    }

    fn extend(&self, length: u64) -> Pending<'static, ()> {
        self.change(Kind::Extend, Change::Extend(length))
    }

    fn truncate(&self, length: u64) -> Pending<'static, ()> {
        self.change(Kind::Truncate, Change::Truncate(length))
    }

    fn zero(&self, range: Range<u64>) -> Pending<'static, ()> {
        self.change(Kind::Zero, Change::Zero(range))
    }
}

/// Waits for an operation; dropping it leaves the operation alone.
struct Waiting(Rc<Answer>);

impl Future for Waiting {
    type Output = Result<Buf, Error>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Result<Buf, Error>> {
        if let Some(result) = self.0.result.borrow_mut().take() {
            return Poll::Ready(result);
        }
        *self.0.waker.borrow_mut() = Some(context.waker().clone());
        Poll::Pending
    }
}
