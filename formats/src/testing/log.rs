//! An allocation log in memory: what outlives the process and not the host.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;
use std::rc::Weak;

use super::record::Event;
use super::store::Store;
use crate::allocation_log::{AllocationLog, LogEntry, LogFull, WORD};

/// See the module. Made by [`Store::add_log`].
pub struct MemLog {
    store: Weak<Store>,
    number: usize,
    capacity: usize,
    entries: RefCell<VecDeque<LogEntry>>,
    position: Cell<u64>,
}

impl MemLog {
    pub(super) fn new(store: Weak<Store>, number: usize, capacity: usize) -> Rc<MemLog> {
        Rc::new(MemLog { store, number, capacity, entries: RefCell::default(), position: Cell::new(0) })
    }

    /// Its number in the store.
    pub fn number(&self) -> usize {
        self.number
    }

    /// Entries that were not released.
    pub fn len(&self) -> usize {
        self.entries.borrow().len()
    }

    /// Entries that were not released, the oldest first.
    pub fn entries(&self) -> Vec<LogEntry> {
        self.entries.borrow().iter().copied().collect()
    }

    /// Nothing is in it.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub(super) fn state(&self) -> (Vec<LogEntry>, u64) {
        (self.entries(), self.position.get())
    }
}

impl AllocationLog for MemLog {
    fn append_all(&self, entries: &[LogEntry]) -> Result<(), LogFull> {
        let whole = |entry: &LogEntry| entry.offset.is_multiple_of(WORD);
        assert!(entries.iter().all(whole), "an entry is a whole word: {entries:?}");
        if self.len() + entries.len() > self.capacity {
            return Err(LogFull);
        }
        self.entries.borrow_mut().extend(entries);
        self.position.set(self.position.get() + entries.len() as u64);
        if let Some(store) = self.store.upgrade() {
            store.note(Event::Append { log: self.number, entries: entries.to_vec() });
        }
        Ok(())
    }

    fn room(&self) -> usize {
        self.capacity - self.len()
    }

    fn capacity(&self) -> usize {
        self.capacity
    }

    fn position(&self) -> u64 {
        self.position.get()
    }

    fn release(&self, position: u64) {
        assert!(position <= self.position.get(), "released behind the last entry");
        let first = self.position.get() - self.len() as u64;
        let count = position.saturating_sub(first) as usize;
        self.entries.borrow_mut().drain(..count);
        if let Some(store) = self.store.upgrade() {
            store.note(Event::Release { log: self.number, position });
        }
    }
}

impl std::fmt::Debug for MemLog {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "MemLog({} entries)", self.len())
    }
}
