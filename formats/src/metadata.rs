//! Tables of an image in memory, and the one place that decides when a change of them reaches the file.
//!
//! A table is a stretch of a file; [`Tables`] keeps *slices* of it (4 KiB by default), never whole tables. All drivers change their
//! metadata through it, so that the promise of [`crate::driver`] is kept in one place:
//!
//! ```text
//! set(bytes, Anytime | AfterData) ─▶ slice in memory is dirty, map sees it ─▶ log (if there is one) ─▶ settled
//!                                              │
//!                       write_back: [flush of the data files, if a dirty slice has an AfterData change]
//!                                   ─▶ dirty slices are written ─▶ log entries are released ─▶ settled without a log
//! ```
//! - *Settled* means safe against the death of the process: the log has the change, or the file has it. Not against power loss.
//! - A slice with an `AfterData` change is written only behind a flush of the data that began after that change was made; since a
//!   slice is written as a whole, its other changes wait along.
//! - Write-backs are rounds: one runs at a time, who comes meanwhile joins the next one. A round whose future is dropped ends;
//!   the next in the queue begins another.
//! - A dirty slice is never evicted; a failed write leaves it dirty and fails those who waited for the round.
//!
//! Memory: [`Budget`] is shared by all tables of a shard. Who needs room takes it from the largest holder, clean slices only, by
//! the clock algorithm; nobody is driven below [`SLICES_MIN`] slices, or may hold over half of the budget.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::rc::{Rc, Weak};

use crate::driver::{FileIndex, Usage};
use crate::error::Error;
use crate::file::{Buf, ImageFile, Pending};

/// Bytes of a slice unless a driver asks for another size.
pub const SLICE_BYTES: usize = 4096;
/// Slices that every table may keep.
pub const SLICES_MIN: usize = 4;
/// Slices that one round writes at the same time.
const WRITES_MAX: usize = 32;

/// When a change may reach the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Order {
    /// At any time: what it makes visible reads as what was there before, until the payload is durable (zeroes under it).
    Anytime,
    /// Only when the payload that was written before the change is durable: it hides other bytes.
    AfterData,
}

/// A change of metadata that is acknowledged and may not be in the file: at most eight bytes that do not cross a slice.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LogEntry {
    /// File of the driver.
    pub file: FileIndex,
    /// Byte offset in it.
    pub offset: u64,
    /// Bytes of `old` and `new` that count.
    pub len: u8,
    /// What the file held before.
    pub old: [u8; 8],
    /// What it shall hold.
    pub new: [u8; 8],
}

/// The log has no room: changes have to be written back first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LogFull;

/// Where changes are kept that outlive the process and not the host. Its entries are replayed, in order, before the image is
/// opened again.
pub trait AllocationLog: std::fmt::Debug {
    /// Notes a change.
    ///
    /// # Errors
    /// No room; nothing was noted.
    fn append(&self, entry: LogEntry) -> Result<(), LogFull>;

    /// Number of entries that were ever noted.
    fn position(&self) -> u64;

    /// All entries before `position` are in the file.
    fn release(&self, position: u64);
}
