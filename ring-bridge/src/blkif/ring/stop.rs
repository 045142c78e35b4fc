//! Why a ring stops, and why a call had no effect.

use super::Token;
use crate::blkif::inflight::TableError;
use crate::memory::MemoryError;

/// Why a ring was stopped for good. The daemon, the disk and its other rings go on.
#[derive(Debug, thiserror::Error, Clone, Copy, PartialEq, Eq)]
pub enum StopReason {
    /// More requests than the ring has entries.
    #[error(
        "the frontend broke its ring: req_prod is {req_prod}, more than {entries} ahead of rsp_prod {rsp_prod}"
    )]
    Overrun {
        /// The frontend's index.
        req_prod: u32,
        /// The index that it was told.
        rsp_prod: u32,
        /// Entries of the ring.
        entries: u32,
    },
    /// The frontend's index went back behind requests that were taken.
    #[error("the frontend broke its ring: req_prod is {req_prod}, requests up to {req_cons} were taken")]
    WentBack {
        /// The frontend's index.
        req_prod: u32,
        /// Our index.
        req_cons: u32,
    },
    /// The table of requests in flight cannot be used, or does not hold what was written to it.
    #[error(transparent)]
    Table(#[from] TableError),
    /// An offset outside the ring or the table, or a slot that is missing: a defect of this program.
    #[error("the ring's engine is broken: {what}")]
    Broken {
        /// What was found.
        what: &'static str,
    },
}

impl From<MemoryError> for StopReason {
    fn from(error: MemoryError) -> StopReason {
        StopReason::Table(TableError::Memory(error))
    }
}

/// Why a call had no effect.
#[derive(Debug, thiserror::Error, Clone, Copy, PartialEq, Eq)]
pub enum RingError {
    /// The ring is stopped, by this call or before.
    #[error(transparent)]
    Stopped(#[from] StopReason),
    /// No such request is waiting for that: it was answered before, or is in another state. A defect of the caller.
    #[error("request {seq} in slot {slot} does not wait for this", slot = .0.slot, seq = .0.seq)]
    Token(Token),
}
