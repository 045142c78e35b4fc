//! What happened to the files of a store, in the order in which it happened: submissions, completions, entries of allocation
//! logs, and marks of whoever drives the test. The crash states of [`super::replay`] are made from this.

use std::ops::Range;
use std::rc::Rc;

use super::pages::Pages;
use crate::allocation_log::LogEntry;

/// A change of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// Bytes are written.
    Write {
        /// Where.
        offset: u64,
        /// What.
        data: Rc<[u8]>,
    },
    /// A range is made zero.
    Zero(Range<u64>),
    /// The file becomes at least this long.
    Extend(u64),
    /// The file becomes at most this long.
    Truncate(u64),
    /// What was answered before becomes durable.
    Flush,
    /// Sectors of a write that was torn: offset and bytes of each piece.
    Pieces(Vec<(u64, Rc<[u8]>)>),
}

impl Change {
    /// Carries it out on the contents of a file.
    pub fn apply(&self, pages: &mut Pages) {
        match self {
            Change::Write { offset, data } => pages.write(*offset, data),
            Change::Zero(range) => pages.zero(range.clone()),
            Change::Extend(length) => pages.extend(*length),
            Change::Truncate(length) => pages.truncate(*length),
            Change::Flush => {}
            Change::Pieces(pieces) => pieces.iter().for_each(|(offset, data)| pages.write(*offset, data)),
        }
    }

    /// Tears a write: every sector of 512 bytes of the file has landed or not. Other changes are whole or nothing.
    #[must_use]
    pub fn torn(&self, rng: &mut fastrand::Rng) -> Change {
        match self {
            Change::Write { offset, data } => {
                let end = offset + data.len() as u64;
                let (mut pieces, mut at) = (Vec::new(), *offset);
                // Most tears are a prefix; devices with a cache may leave any pattern.
                let prefix = rng.bool().then(|| rng.u64(*offset..=end));
                while at < end {
                    let stop = end.min((at / 512 + 1) * 512);
                    let landed = prefix.map_or_else(|| rng.bool(), |prefix| stop <= prefix);
                    if landed {
                        pieces.push((at, data[(at - offset) as usize..(stop - offset) as usize].into()));
                    }
                    at = stop;
                }
                Change::Pieces(pieces)
            }
            Change::Zero(range) => {
                let middle = (rng.u64(range.start..=range.end) / 512 * 512).clamp(range.start, range.end);
                Change::Zero(if rng.bool() { range.start..middle } else { middle..range.end })
            }
            other => other.clone(),
        }
    }
}

/// Something that happened.
#[derive(Debug, Clone)]
pub enum Event {
    /// An operation was handed to the kernel.
    Submit {
        /// Its number.
        op: u64,
        /// File in the store.
        file: usize,
        /// What it is to do.
        change: Change,
    },
    /// It was answered.
    Complete {
        /// Its number.
        op: u64,
        /// Success.
        ok: bool,
        /// What it has done, where that differs from what it was to do.
        landed: Option<Change>,
    },
    /// An allocation log took entries, at once.
    Append {
        /// Number of the log in the store.
        log: usize,
        /// The entries.
        entries: Vec<LogEntry>,
    },
    /// Entries of an allocation log before this position were released.
    Release {
        /// Number of the log in the store.
        log: usize,
        /// Entries that it ever had before the first one that it keeps.
        position: u64,
    },
    /// A flush has failed and these changes are lost: no later flush makes them durable.
    Lose {
        /// File in the store.
        file: usize,
        /// The numbers of their operations.
        ops: Vec<u64>,
        /// They are not seen any more either.
        gone: bool,
    },
    /// A moment that the test wants to refer to.
    Mark,
}

/// A recorded run.
#[derive(Debug, Clone, Default)]
pub struct Record {
    /// Contents of the files when the recording began; durable.
    pub initial: Vec<Pages>,
    /// Entries that the allocation logs held at that time, and their positions behind the last.
    pub logs: Vec<(Vec<LogEntry>, u64)>,
    /// What happened since.
    pub events: Vec<Event>,
}

impl Record {
    /// Number of operations of a kind that changes were made of: for messages.
    pub fn count(&self, which: impl Fn(&Change) -> bool) -> usize {
        let is = |event: &&Event| matches!(event, Event::Submit { change, .. } if which(change));
        self.events.iter().filter(is).count()
    }

    /// The moments right behind each flush that succeeded.
    pub fn flush_ends(&self) -> Vec<usize> {
        let mut flushes = std::collections::HashSet::new();
        let mut ends = Vec::new();
        for (index, event) in self.events.iter().enumerate() {
            match event {
                Event::Submit { op, change: Change::Flush, .. } => {
                    flushes.insert(*op);
                }
                Event::Complete { op, ok: true, .. } if flushes.contains(op) => ends.push(index + 1),
                _ => {}
            }
        }
        ends
    }
}
