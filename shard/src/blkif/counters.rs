//! What a guest's device did, for metrics: written by the shard of its disk, read by the control thread.

use ring_bridge::blkif::request::{Operation, Reason};

use crate::stats::Cell;

/// Operations of guests that are counted apart, in the order of [`GuestCounters::requests`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(usize)]
pub enum GuestOp {
    /// Read.
    Read = 0,
    /// Write.
    Write = 1,
    /// Flush, with or without data.
    Flush = 2,
    /// Write barrier.
    Barrier = 3,
    /// Discard.
    Discard = 4,
    /// Discard that erases.
    SecureDiscard = 5,
}

impl GuestOp {
    /// All, in the order of their numbers.
    pub const ALL: [GuestOp; 6] = [
        GuestOp::Read,
        GuestOp::Write,
        GuestOp::Flush,
        GuestOp::Barrier,
        GuestOp::Discard,
        GuestOp::SecureDiscard,
    ];

    /// The value of the metrics label `op`.
    pub fn label(self) -> &'static str {
        match self {
            GuestOp::Read => "read",
            GuestOp::Write => "write",
            GuestOp::Flush => "flush",
            GuestOp::Barrier => "barrier",
            GuestOp::Discard => "discard",
            GuestOp::SecureDiscard => "secure_discard",
        }
    }

    /// That of a request.
    pub fn of(operation: Operation) -> GuestOp {
        match operation {
            Operation::Read => GuestOp::Read,
            Operation::Write => GuestOp::Write,
            Operation::Flush => GuestOp::Flush,
            Operation::Barrier => GuestOp::Barrier,
            Operation::Discard { secure: false } => GuestOp::Discard,
            Operation::Discard { secure: true } => GuestOp::SecureDiscard,
        }
    }
}

/// Counters of one guest's device, all queues together. The control thread makes them and keeps them over moves.
#[derive(Debug, Default)]
pub struct GuestCounters {
    /// Requests that passed the checks, by [`GuestOp`].
    pub requests: [Cell; 6],
    /// Requests with indirect segments.
    pub indirect: Cell,
    /// Requests refused, by the number of their [`Reason`].
    pub refused: [Cell; Reason::ALL.len()],
    /// Requests answered with an error after they had passed the checks.
    pub errors: Cell,
    /// Events taken from its ports.
    pub events: Cell,
    /// Of them with nothing in the ring.
    pub events_spurious: Cell,
    /// Times that a port was kept quiet for it.
    pub events_damped: Cell,
    /// Batches of responses that the guest was notified of.
    pub notifications: Cell,
    /// Batches of responses that it did not want to be notified of.
    pub notifications_saved: Cell,
    /// Times that a look at a ring took its last free entry.
    pub ring_full: Cell,
    /// Segments copied by the hypervisor, or from and to the client's memory.
    pub segments_copied: Cell,
    /// Segments moved through persistent mappings.
    pub segments_mapped: Cell,
    /// Requests of which a segment could not be had.
    pub segment_faults: Cell,
    /// Gauge: pages that are mapped persistently.
    pub persistent_pages: Cell,
    /// Gauge: requests taken and not answered.
    pub in_flight: Cell,
    /// Gauge: flushes that failed and are not answered.
    pub flushes_held: Cell,
    /// Gauge: rings served.
    pub rings: Cell,
    /// Rings stopped because the guest broke them.
    pub rings_broken: Cell,
}
