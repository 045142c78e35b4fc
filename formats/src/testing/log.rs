//! An allocation log in memory: what outlives the process and not the host.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;
use std::rc::Weak;

use super::pages::Pages;
use super::record::Event;
use super::store::Store;
use crate::metadata::{AllocationLog, LogEntry, LogFull};

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

    /// Nothing is in it.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub(super) fn state(&self) -> (Vec<LogEntry>, u64) {
        (self.entries.borrow().iter().copied().collect(), self.position.get())
    }
}

impl AllocationLog for MemLog {
    fn append(&self, entry: LogEntry) -> Result<(), LogFull> {
        assert!((1..=8).contains(&entry.len), "an entry has one to eight bytes: {entry:?}");
        if self.len() >= self.capacity {
            return Err(LogFull);
        }
        self.entries.borrow_mut().push_back(entry);
        self.position.set(self.position.get() + 1);
        if let Some(store) = self.store.upgrade() {
            store.note(Event::Append { log: self.number, entry });
        }
        Ok(())
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

/// Carries the entries of a log out on the files of its driver (`files[FileIndex]`), as must happen before the image is opened
/// again. All are checked before any is written: each byte must be one that the log knows.
///
/// # Errors
/// A sentence that names the first byte that is neither old nor new.
pub fn replay_log(entries: &[LogEntry], files: &mut [&mut Pages]) -> Result<(), String> {
    let known = |file, at: u64, byte: u8| {
        entries.iter().any(|entry| {
            let within = at.checked_sub(entry.offset).filter(|within| *within < u64::from(entry.len));
            entry.file == file
                && within.is_some_and(|within| {
                    entry.old[within as usize] == byte || entry.new[within as usize] == byte
                })
        })
    };
    for entry in entries {
        let Some(pages) = files.get(usize::from(entry.file.0)) else {
            return Err(format!("the log names file {:?}, which the driver does not have", entry.file));
        };
        let mut found = [0; 8];
        let found = &mut found[..usize::from(entry.len)];
        pages.read(entry.offset, found);
        for (at, byte) in (entry.offset..).zip(found.iter()) {
            if !known(entry.file, at, *byte) {
                return Err(format!(
                    "the byte {at} of file {:?} is {byte:#x}, neither old nor new: {entry:?}",
                    entry.file
                ));
            }
        }
    }
    for entry in entries {
        files[usize::from(entry.file.0)].write(entry.offset, &entry.new[..usize::from(entry.len)]);
    }
    Ok(())
}
