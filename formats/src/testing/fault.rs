//! What shall go wrong: rules that pick operations by kind, file and count.

use std::ops::Range;

/// Kind of an operation on a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Read.
    Read,
    /// Write.
    Write,
    /// Zero.
    Zero,
    /// Flush.
    Flush,
    /// Extend.
    Extend,
    /// Truncate.
    Truncate,
}

/// An operation as rules see it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Op {
    /// Number, in the order of submission.
    pub id: u64,
    /// Number of the file in the store.
    pub file: usize,
    /// What it does.
    pub kind: Kind,
    /// Where; for `Extend` and `Truncate` from 0 to the length, for `Flush` empty.
    pub range: Range<u64>,
}

/// What has landed of a change that failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Landed {
    /// Nothing.
    Nothing,
    /// Some of its sectors of 512 bytes; of other changes than writes nothing.
    Part,
    /// All of it, and yet it failed.
    All,
}

/// How an operation goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// It fails with an errno.
    Fails {
        /// The number.
        errno: i32,
        /// What it has changed all the same.
        landed: Landed,
    },
    /// It is not completed before this many others were.
    Slow(u64),
    /// A flush fails with EIO, and some of what was written to the file since the last good one is lost for good
    /// ([`Store::track_losses`](super::Store::track_losses) comes first).
    Loses,
}

impl Fault {
    /// EIO, and nothing has landed.
    pub const EIO: Fault = Fault::Fails { errno: 5, landed: Landed::Nothing };
    /// EIO in the middle of a write.
    pub const SHORT: Fault = Fault::Fails { errno: 5, landed: Landed::Part };
    /// ENOSPC, and nothing has landed.
    pub const ENOSPC: Fault = Fault::Fails { errno: 28, landed: Landed::Nothing };
}

/// Operations that go wrong.
pub struct Rule {
    matches: Box<dyn Fn(&Op) -> bool>,
    skip: u64,
    times: u64,
    fault: Fault,
}

impl Rule {
    /// All operations for which `matches` is true.
    pub fn when(fault: Fault, matches: impl Fn(&Op) -> bool + 'static) -> Rule {
        Rule { matches: Box::new(matches), skip: 0, times: u64::MAX, fault }
    }

    /// The operation number `n` from now on (from 0 on), whatever it is.
    pub fn nth(n: u64, fault: Fault) -> Rule {
        Rule::when(fault, |_| true).skipping(n).at_most(1)
    }

    /// Leaves the first `skip` of them alone.
    #[must_use]
    pub fn skipping(self, skip: u64) -> Rule {
        Rule { skip, ..self }
    }

    /// Harms at most `times` of them.
    #[must_use]
    pub fn at_most(self, times: u64) -> Rule {
        Rule { times, ..self }
    }

    /// The fault for an operation that has just been submitted.
    pub(super) fn judge(&mut self, op: &Op) -> Option<Fault> {
        if self.times == 0 || !(self.matches)(op) {
            return None;
        }
        if self.skip > 0 {
            self.skip -= 1;
            return None;
        }
        self.times -= 1;
        Some(self.fault)
    }
}

impl std::fmt::Debug for Rule {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Rule({:?}, skip {}, times {})", self.fault, self.skip, self.times)
    }
}
