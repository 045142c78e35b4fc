//! Places at the end of a regular file, for formats without a list of free space.
//!
//! A place reads as zero and is durable: the file was made longer and flushed before anybody gets it. It grows in steps that double,
//! so that few writes wait for a flush. What nobody took is cut off when the image is closed; a crash leaves it, which is a leak.
//!
//! A place that was taken and not used may still be written to by a caller that went away: nobody else gets it
//! ([`Tail::abandon`]), but whoever it was taken for may have it again, made clean. So a store that is full for hours costs no place.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;

use crate::error::{Error, ErrorKind};
use crate::file::ImageFile;
use crate::late::Late;

/// Bytes of the first step.
const STEP_MIN: u64 = 64 << 10;
/// Bytes of a step, at most (one place may be larger).
const STEP_MAX: u64 = 16 << 20;

/// See the module.
#[derive(Debug)]
pub(crate) struct Tail {
    file: Rc<dyn ImageFile>,
    /// Places begin at multiples of this.
    unit: u64,
    /// Clean bytes at the end of the file.
    start: Cell<u64>,
    end: Cell<u64>,
    /// First byte behind everything that is referred to.
    used_end: Cell<u64>,
    step: Cell<u64>,
    /// Places that were given up, by the owner that may have them again.
    abandoned: RefCell<BTreeMap<u64, u64>>,
    turn: async_lock::Mutex<()>,
}

impl Tail {
    /// Everything that is in the file now counts as used.
    pub fn new(file: Rc<dyn ImageFile>, unit: u64) -> Tail {
        let length = file.length();
        let start = length.next_multiple_of(unit);
        Tail {
            file,
            unit,
            start: Cell::new(start),
            end: Cell::new(start),
            used_end: Cell::new(length),
            step: Cell::new(STEP_MIN / 2),
            abandoned: RefCell::default(),
            turn: async_lock::Mutex::new(()),
        }
    }

    fn take_now(&self, bytes: u64, align: u64) -> Option<u64> {
        let start = self.start.get().next_multiple_of(align.max(self.unit));
        let end = start.checked_add(bytes)?.next_multiple_of(self.unit);
        (end <= self.end.get()).then(|| self.start.replace(end)).map(|_| start)
    }

    /// A clean place of `bytes` bytes at a multiple of `align`.
    pub async fn take(&self, bytes: u64, align: u64) -> Result<u64, Error> {
        loop {
            if let Some(place) = self.take_now(bytes, align) {
                return Ok(place);
            }
            let _turn = self.turn.lock().await;
            let start = self.start.get().next_multiple_of(align.max(self.unit));
            let needed = start.saturating_add(bytes).next_multiple_of(self.unit);
            if needed <= self.end.get() {
                continue;
            }
            let step = (self.step.get() * 2).min(STEP_MAX);
            match self.grow(needed.max(self.end.get() + step)).await {
                Ok(()) => self.step.set(step),
                Err(error) if error.kind == ErrorKind::NoSpace => self.grow(needed).await?,
                Err(error) => return Err(error),
            }
        }
    }

    async fn grow(&self, end: u64) -> Result<(), Error> {
        self.file.extend(end).await?;
        self.file.flush().await?;
        self.end.set(end);
        Ok(())
    }

    /// The place that `owner` had and gave up, clean again; `None` when it has none.
    pub async fn take_again(&self, late: &Late, owner: u64, bytes: u64) -> Result<Option<u64>, Error> {
        // Taken out meanwhile: were this future dropped, the zeroes would still be under way.
        let Some(place) = self.abandoned.borrow_mut().remove(&owner) else { return Ok(None) };
        let mut cleaned = late.finish(self.file.zero(place..place + bytes)).await;
        if cleaned.is_ok() {
            cleaned = self.file.flush().await;
        }
        match cleaned {
            Ok(()) => Ok(Some(place)),
            Err(error) => {
                self.abandoned.borrow_mut().insert(owner, place);
                Err(error)
            }
        }
    }

    /// `owner` does not use its place.
    pub fn abandon(&self, owner: u64, place: u64) {
        self.abandoned.borrow_mut().insert(owner, place);
    }

    /// Something refers to the bytes before `end`.
    pub fn note_used(&self, end: u64) {
        self.used_end.set(self.used_end.get().max(end));
    }

    /// Cuts off what nothing refers to. Everything else must be durable.
    pub async fn close(&self) -> Result<(), Error> {
        let _turn = self.turn.lock().await;
        if self.file.length() > self.used_end.get() {
            self.file.truncate(self.used_end.get()).await?;
            self.start.set(self.used_end.get().next_multiple_of(self.unit));
            self.end.set(self.start.get());
        }
        Ok(())
    }
}
