//! What a request may ask: the checks of a private copy, and what is left of it afterwards.
//!
//! Invariants: every function here is pure and total: any bytes give a request or a [`Reason`]. A [`Segment`] that leaves this module lies in
//! its page. A request that leaves it lies on the disk, as large as the disk was at that moment; whoever runs it may rely on `offset + len`
//! not overflowing.
//!
//! The checks are those of Linux's backend (and a few more), so that a frontend cannot tell the difference by an honest request.

use super::wire::{self, Decoded, INDIRECT_PAGES_MAX, Message, SECTOR_BYTES, WireSegment, operation};

/// What the backend offers on a ring, as it is published to the frontend.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Size of the disk in sectors of 512 bytes; may change while the ring runs.
    pub sectors: u64,
    /// Bytes of a logical block: 512 or 4096. Any other power of two from 512 to 4096 works as well.
    pub block_bytes: u32,
    /// Writes and discards are refused.
    pub read_only: bool,
    /// `feature-flush-cache`.
    pub flush: bool,
    /// `feature-barrier`.
    pub barrier: bool,
    /// `feature-discard`.
    pub discard: bool,
    /// `discard-secure`.
    pub secure_discard: bool,
    /// `feature-max-indirect-segments`: 0 when it is not offered; what is above the table's room or
    /// [`wire::INDIRECT_SEGMENTS_MAX`] is not used.
    pub indirect_segments_max: u16,
}

impl Limits {
    /// Sectors of a logical block less one.
    #[inline]
    fn mask(&self) -> u64 {
        (u64::from(self.block_bytes) / SECTOR_BYTES).max(1) - 1
    }
}

/// Indirect segments offered by default, as Linux's backend does: 1 MiB per request.
pub const INDIRECT_SEGMENTS_DEFAULT: u16 = 256;

/// What is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// Fill the segments.
    Read,
    /// Store the segments.
    Write,
    /// What was answered before is durable; then the segments, if there are any, are stored like a write's.
    Flush,
    /// Everything that this ring asked before is complete and durable; then the segments, if there are any, are stored, and durable before the
    /// answer. The engine runs nothing else of the ring meanwhile.
    Barrier,
    /// The range is not needed any more.
    Discard {
        /// Nobody may be able to have it back.
        secure: bool,
    },
}

/// A piece of one granted page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// The page, by the frontend's name of it.
    pub gref: u32,
    /// First byte in the page, a multiple of 512.
    pub offset: u16,
    /// Bytes, a multiple of 512, at least 512; `offset + len` is at most 4096.
    pub len: u16,
}

impl Segment {
    /// Checks a segment; `None` when it does not lie in its page.
    #[inline]
    pub fn check(segment: WireSegment) -> Option<Segment> {
        let WireSegment { gref, first, last } = segment;
        (first <= last && last <= wire::LAST_SECTOR).then(|| Segment {
            gref,
            offset: u16::from(first) * 512,
            len: (u16::from(last - first) + 1) * 512,
        })
    }
}

/// A request that was checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Body {
    /// What is asked.
    pub operation: Operation,
    /// First sector of 512 bytes; of a flush or barrier without segments, nothing.
    pub sector: u64,
    /// Number of sectors: that of all segments, or of a discard.
    pub sectors: u64,
    /// Number of segments.
    pub segments: u16,
}

impl Body {
    /// First byte on the disk.
    #[inline]
    pub fn offset_bytes(&self) -> u64 {
        self.sector * SECTOR_BYTES
    }

    /// Bytes of the range on the disk: of all segments, or of a discard.
    #[inline]
    pub fn len_bytes(&self) -> u64 {
        self.sectors * SECTOR_BYTES
    }
}

/// An indirect request whose segments have yet to be fetched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IndirectBody {
    /// What is asked: [`Operation::Read`] or [`Operation::Write`].
    pub operation: Operation,
    /// First sector of 512 bytes.
    pub sector: u64,
    /// Number of segments.
    pub segments: u16,
    /// Pages that hold them, as many as are needed.
    pub grefs: [u32; INDIRECT_PAGES_MAX],
}

/// A request after the checks of its entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Checked {
    /// It can run.
    Direct(Body),
    /// Its segments have to be fetched and checked first.
    Indirect(IndirectBody),
}

/// How a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// Done.
    Okay,
    /// Failed.
    Error,
    /// Not offered; the frontend will not ask for it again.
    NotSupported,
}

impl Status {
    /// The number on the ring.
    #[inline]
    pub const fn to_wire(self) -> i16 {
        match self {
            Status::Okay => wire::status::OKAY,
            Status::Error => wire::status::ERROR,
            Status::NotSupported => wire::status::EOPNOTSUPP,
        }
    }

    /// The status of a number; anything unknown is an error.
    pub const fn from_wire(status: i16) -> Status {
        match status {
            wire::status::OKAY => Status::Okay,
            wire::status::EOPNOTSUPP => Status::NotSupported,
            _ => Status::Error,
        }
    }
}

/// Why a request was refused. Its number is its place in [`Reason::ALL`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// An operation that nobody knows.
    UnknownOperation,
    /// An operation, or a kind of it, that was not offered.
    NotOffered,
    /// No segments where there have to be some, or more than the limit.
    SegmentCount,
    /// An indirect request of something else than a read or write.
    IndirectOperation,
    /// A segment that does not lie in its page.
    SegmentRange,
    /// Not on the borders of logical blocks.
    Alignment,
    /// Behind the end of the disk, or a discard of nothing.
    OutOfRange,
    /// A write to a disk that is read-only.
    ReadOnly,
    /// The pages of an indirect request could not be read.
    IndirectPage,
}

impl Reason {
    /// All reasons, in the order of their numbers.
    pub const ALL: [Reason; 9] = [
        Reason::UnknownOperation,
        Reason::NotOffered,
        Reason::SegmentCount,
        Reason::IndirectOperation,
        Reason::SegmentRange,
        Reason::Alignment,
        Reason::OutOfRange,
        Reason::ReadOnly,
        Reason::IndirectPage,
    ];

    /// The word for metrics and logs.
    pub const fn name(self) -> &'static str {
        match self {
            Reason::UnknownOperation => "unknown_operation",
            Reason::NotOffered => "not_offered",
            Reason::SegmentCount => "segment_count",
            Reason::IndirectOperation => "indirect_operation",
            Reason::SegmentRange => "segment_range",
            Reason::Alignment => "alignment",
            Reason::OutOfRange => "out_of_range",
            Reason::ReadOnly => "read_only",
            Reason::IndirectPage => "indirect_page",
        }
    }

    /// What the frontend is told.
    pub const fn status(self) -> Status {
        match self {
            Reason::UnknownOperation | Reason::NotOffered => Status::NotSupported,
            _ => Status::Error,
        }
    }
}

/// Checks a request's entry. `entry` is the private copy that `decoded` was read from; it holds the segments of a direct request.
///
/// # Errors
/// The first reason to refuse it.
pub fn check(
    abi: wire::Abi,
    entry: &wire::Entry,
    decoded: &Decoded,
    limits: &Limits,
) -> Result<Checked, Reason> {
    match decoded.message {
        Message::Direct { operation, segments, sector } => {
            let operation = direct_operation(operation, limits)?;
            let count = usize::from(segments);
            let from = abi.segments_at();
            let data = matches!(operation, Operation::Read | Operation::Write);
            if count > wire::SEGMENTS_MAX || (data && count == 0) {
                return Err(Reason::SegmentCount);
            }
            if count == 0 {
                return Ok(Checked::Direct(Body { operation, sector: 0, sectors: 0, segments: 0 }));
            }
            check_segments(operation, sector, &entry[from..from + count * wire::SEGMENT_BYTES], limits)
                .map(Checked::Direct)
        }
        Message::Discard { flag, sector, sectors } => {
            let secure = flag & wire::DISCARD_SECURE != 0;
            if !limits.discard || (secure && !limits.secure_discard) {
                return Err(Reason::NotOffered);
            }
            let body = Body { operation: Operation::Discard { secure }, sector, sectors, segments: 0 };
            check_range(body, limits).map(Checked::Direct)
        }
        Message::Indirect { operation, segments, sector, grefs } => {
            let max = limits.indirect_segments_max.min(wire::INDIRECT_SEGMENTS_MAX);
            let operation = match operation {
                _ if max == 0 => return Err(Reason::NotOffered),
                operation::READ => Operation::Read,
                operation::WRITE => Operation::Write,
                _ => return Err(Reason::IndirectOperation),
            };
            if segments == 0 || segments > max {
                return Err(Reason::SegmentCount);
            }
            // What cannot become right by any segments is refused before anything is fetched.
            let body = Body { operation, sector, sectors: limits.mask() + 1, segments };
            check_range(body, limits)?;
            Ok(Checked::Indirect(IndirectBody { operation, sector, segments, grefs }))
        }
        Message::Unknown { .. } => Err(Reason::UnknownOperation),
    }
}

fn direct_operation(number: u8, limits: &Limits) -> Result<Operation, Reason> {
    match number {
        operation::READ => Ok(Operation::Read),
        operation::WRITE => Ok(Operation::Write),
        operation::WRITE_BARRIER if limits.barrier => Ok(Operation::Barrier),
        operation::FLUSH_DISKCACHE if limits.flush => Ok(Operation::Flush),
        operation::WRITE_BARRIER | operation::FLUSH_DISKCACHE => Err(Reason::NotOffered),
        _ => Err(Reason::UnknownOperation),
    }
}

/// Checks the segments of a request, direct or indirect: `wire` is a private copy of them, 8 bytes each.
///
/// # Errors
/// The first reason to refuse it.
pub fn check_segments(
    operation: Operation,
    sector: u64,
    wire: &[u8],
    limits: &Limits,
) -> Result<Body, Reason> {
    let mut sectors = 0;
    let mut unaligned = 0;
    let (segments, _) = wire.as_chunks::<{ wire::SEGMENT_BYTES }>();
    for &bytes in segments {
        let segment = Segment::check(WireSegment::decode(bytes)).ok_or(Reason::SegmentRange)?;
        let part = u64::from(segment.len) / SECTOR_BYTES;
        sectors += part;
        unaligned |= part;
    }
    if unaligned & limits.mask() != 0 {
        return Err(Reason::Alignment);
    }
    let segments = u16::try_from(segments.len()).map_err(|_| Reason::SegmentCount)?;
    check_range(Body { operation, sector, sectors, segments }, limits)
}

/// Checks what a request does to the disk.
fn check_range(body: Body, limits: &Limits) -> Result<Body, Reason> {
    if limits.read_only && body.operation != Operation::Read {
        return Err(Reason::ReadOnly);
    }
    let end = body.sector.checked_add(body.sectors).ok_or(Reason::OutOfRange)?;
    // A size that overflows bytes cannot be published; the second comparison keeps that from being an assumption.
    if body.sectors == 0 || end > limits.sectors || end > u64::MAX / SECTOR_BYTES {
        return Err(Reason::OutOfRange);
    }
    if (body.sector | body.sectors) & limits.mask() != 0 {
        return Err(Reason::Alignment);
    }
    Ok(body)
}
