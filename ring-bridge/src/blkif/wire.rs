//! The bytes of blkif: entries of the ring, in both layouts.
//!
//! Everything here works on private copies. Integers are little-endian (x86 and arm guests). A ring is a header of 64 bytes and a power of
//! two of entries; request and response k share entry `k mod entries`.
//!
//! | header | bytes | written by |
//! |---|---|---|
//! | 0 | `req_prod` u32 | frontend |
//! | 4 | `req_event` u32 | backend |
//! | 8 | `rsp_prod` u32 | backend |
//! | 12 | `rsp_event` u32 | frontend |
//! | 16 | private, padding | |
//!
//! | request | x86_64, arm | x86_32 |
//! |---|---|---|
//! | operation u8 | 0 | 0 |
//! | number of segments u8; discard: flag u8; indirect: inner operation u8 | 1 | 1 |
//! | handle u16 (unused); indirect: number of segments u16 | 2 | 2 |
//! | id u64 | 8 | 4 |
//! | sector u64 | 16 | 12 |
//! | 11 segments of 8; discard: sectors u64 | 24 | 20 |
//! | indirect: handle u16 (unused), padding u16, then 8 grefs u32 | 24, 28 | 20, 24 |
//! | bytes of an entry | 112 | 108 |
//!
//! A segment is gref u32, first sector u8, last sector u8 (inclusive), padding u16. A response is id u64 at 0, operation u8 at 8, status i16 at
//! 10; it has 16 bytes (x86_32: 12), of which 9 and 12 to 15 are padding that must not carry anything of ours.
//!
//! Source: `io/blkif.h`, `io/ring.h`; sizes as compilers lay them out.

/// Bytes of a page, of a grant and of a page of the ring, on every architecture.
pub const PAGE_BYTES: usize = 4096;
/// Bytes of a sector of the ring, whatever the disk's logical block is.
pub const SECTOR_BYTES: u64 = 512;
/// Pages of the largest ring.
pub const RING_PAGES_MAX: u32 = 16;
/// Entries of the largest ring.
pub const ENTRIES_MAX: u32 = 512;
/// Offset of `req_prod` in the ring.
pub const REQ_PROD: usize = 0;
/// Offset of `req_event`: the backend wants an event when `req_prod` passes it.
pub const REQ_EVENT: usize = 4;
/// Offset of `rsp_prod`.
pub const RSP_PROD: usize = 8;
/// Offset of `rsp_event`: the frontend wants an event when `rsp_prod` passes it.
pub const RSP_EVENT: usize = 12;
/// Offset of the first entry.
pub const ENTRIES_AT: usize = 64;
/// Bytes of the larger request.
pub const REQUEST_BYTES_MAX: usize = 112;
/// Segments inside a request.
pub const SEGMENTS_MAX: usize = 11;
/// Bytes of a segment.
pub const SEGMENT_BYTES: usize = 8;
/// Segments in one page of an indirect request.
pub const SEGMENTS_PER_PAGE: usize = PAGE_BYTES / SEGMENT_BYTES;
/// Pages of segments of an indirect request.
pub const INDIRECT_PAGES_MAX: usize = 8;
/// Segments of an indirect request that the protocol has room for.
pub const INDIRECT_SEGMENTS_MAX: u16 = (SEGMENTS_PER_PAGE * INDIRECT_PAGES_MAX) as u16;
/// Last sector of a page.
pub const LAST_SECTOR: u8 = 7;

/// Operations.
pub mod operation {
    /// Read.
    pub const READ: u8 = 0;
    /// Write.
    pub const WRITE: u8 = 1;
    /// Everything before is durable and complete, then an optional write, then everything after.
    pub const WRITE_BARRIER: u8 = 2;
    /// What was answered is durable; with segments, a write follows.
    pub const FLUSH_DISKCACHE: u8 = 3;
    /// Used by one vendor for packet commands.
    pub const RESERVED: u8 = 4;
    /// The sectors are not needed any more.
    pub const DISCARD: u8 = 5;
    /// A read or write whose segments are in other pages.
    pub const INDIRECT: u8 = 6;
}

/// Flag of a discard: erased so that it cannot be had back.
pub const DISCARD_SECURE: u8 = 1;

/// Statuses of responses.
pub mod status {
    /// Done.
    pub const OKAY: i16 = 0;
    /// Failed.
    pub const ERROR: i16 = -1;
    /// Not offered.
    pub const EOPNOTSUPP: i16 = -2;
}

/// The layout of a ring's entries: the frontend's key `protocol`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Abi {
    /// `x86_64-abi`, and `arm-abi`, which is the same.
    X86_64,
    /// `x86_32-abi`: words of eight bytes are aligned to four.
    X86_32,
}

impl Abi {
    /// The layout that the frontend's key `protocol` names; a frontend without the key speaks x86_32 (as every backend takes it, against
    /// the header's text). `None`: a layout that nobody knows.
    pub fn from_protocol(protocol: Option<&str>) -> Option<Abi> {
        match protocol {
            None | Some("x86_32-abi") => Some(Abi::X86_32),
            Some("x86_64-abi" | "arm-abi") => Some(Abi::X86_64),
            Some(_) => None,
        }
    }

    /// Bytes of an entry of the ring.
    #[inline]
    pub const fn entry_bytes(self) -> usize {
        match self {
            Abi::X86_64 => 112,
            Abi::X86_32 => 108,
        }
    }

    /// Bytes of a response.
    #[inline]
    pub const fn response_bytes(self) -> usize {
        match self {
            Abi::X86_64 => 16,
            Abi::X86_32 => 12,
        }
    }

    /// Offset of a request's id.
    #[inline]
    const fn id_at(self) -> usize {
        match self {
            Abi::X86_64 => 8,
            Abi::X86_32 => 4,
        }
    }

    /// Offset of a request's first sector.
    #[inline]
    const fn sector_at(self) -> usize {
        self.id_at() + 8
    }

    /// Offset of a request's first segment; of the sectors of a discard.
    #[inline]
    pub const fn segments_at(self) -> usize {
        self.id_at() + 16
    }

    /// Offset of the first gref of an indirect request.
    #[inline]
    const fn grefs_at(self) -> usize {
        self.segments_at() + 4
    }
}

/// Entries of a ring of `pages` pages, the same in both layouts; `None` for a number of pages that no ring has (the key is an
/// order, so a power of two up to [`RING_PAGES_MAX`]).
pub const fn entries(pages: u32) -> Option<u32> {
    if pages.is_power_of_two() && pages <= RING_PAGES_MAX { Some(pages * 32) } else { None }
}

/// Offset of the entry of index `index` in a ring of `entries` entries (a power of two).
#[inline]
pub const fn entry_at(abi: Abi, entries: u32, index: u32) -> usize {
    ENTRIES_AT + (index & (entries - 1)) as usize * abi.entry_bytes()
}

/// A request's own bytes: a private copy of an entry. In the smaller layout the last four are zero.
pub type Entry = [u8; REQUEST_BYTES_MAX];

/// What a request says, not checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Decoded {
    /// The frontend's name of the request.
    pub id: u64,
    /// What it asks.
    pub message: Message,
}

/// The part of a request that depends on its operation, not checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Message {
    /// READ, WRITE, WRITE_BARRIER or FLUSH_DISKCACHE; its segments follow in the entry, if there are at most [`SEGMENTS_MAX`].
    Direct {
        /// Which.
        operation: u8,
        /// Number of segments.
        segments: u8,
        /// First sector.
        sector: u64,
    },
    /// DISCARD.
    Discard {
        /// [`DISCARD_SECURE`] and bits that mean nothing.
        flag: u8,
        /// First sector.
        sector: u64,
        /// Number of sectors.
        sectors: u64,
    },
    /// INDIRECT.
    Indirect {
        /// The operation: READ or WRITE.
        operation: u8,
        /// Number of segments.
        segments: u16,
        /// First sector.
        sector: u64,
        /// Pages that hold the segments, as many as `segments` needs.
        grefs: [u32; INDIRECT_PAGES_MAX],
    },
    /// Any other.
    Unknown {
        /// Which.
        operation: u8,
    },
}

impl Message {
    /// The operation that the response has to name. For an indirect request that is the inner one: Linux gives its disk up when it
    /// reads 6 there.
    pub fn response_operation(&self) -> u8 {
        match *self {
            Message::Direct { operation, .. }
            | Message::Indirect { operation, .. }
            | Message::Unknown { operation } => operation,
            Message::Discard { .. } => operation::DISCARD,
        }
    }
}

#[inline]
fn bytes_at<const N: usize>(bytes: &Entry, at: usize) -> [u8; N] {
    std::array::from_fn(|i| bytes[at + i])
}

/// Reads a request.
#[inline]
pub fn decode(abi: Abi, entry: &Entry) -> Decoded {
    let word = |at| u64::from_le_bytes(bytes_at(entry, at));
    let sector = word(abi.sector_at());
    let message = match entry[0] {
        operation @ operation::READ..=operation::FLUSH_DISKCACHE => {
            Message::Direct { operation, segments: entry[1], sector }
        }
        operation::DISCARD => Message::Discard { flag: entry[1], sector, sectors: word(abi.segments_at()) },
        operation::INDIRECT => Message::Indirect {
            operation: entry[1],
            segments: u16::from_le_bytes(bytes_at(entry, 2)),
            sector,
            grefs: std::array::from_fn(|i| u32::from_le_bytes(bytes_at(entry, abi.grefs_at() + 4 * i))),
        },
        operation => Message::Unknown { operation },
    };
    Decoded { id: word(abi.id_at()), message }
}

/// Bytes of a request that mean something: what has to be kept of it. At most the entry.
#[inline]
pub fn used_bytes(abi: Abi, entry: &Entry) -> usize {
    match entry[0] {
        operation::READ..=operation::FLUSH_DISKCACHE if usize::from(entry[1]) <= SEGMENTS_MAX => {
            abi.segments_at() + SEGMENT_BYTES * usize::from(entry[1])
        }
        operation::INDIRECT => abi.grefs_at() + 4 * INDIRECT_PAGES_MAX,
        _ => abi.segments_at() + 8,
    }
}

/// Writes a request as a frontend does; `segments` are those of a [`Message::Direct`], at most [`SEGMENTS_MAX`] are written.
pub fn encode(abi: Abi, request: &Decoded, segments: &[WireSegment]) -> Entry {
    let mut entry = [0; REQUEST_BYTES_MAX];
    let mut put = |at: usize, bytes: &[u8]| entry[at..at + bytes.len()].copy_from_slice(bytes);
    put(abi.id_at(), &request.id.to_le_bytes());
    match request.message {
        Message::Direct { operation, segments: count, sector } => {
            put(0, &[operation, count]);
            put(abi.sector_at(), &sector.to_le_bytes());
            for (i, segment) in segments.iter().take(SEGMENTS_MAX).enumerate() {
                put(abi.segments_at() + SEGMENT_BYTES * i, &segment.encode());
            }
        }
        Message::Discard { flag, sector, sectors } => {
            put(0, &[operation::DISCARD, flag]);
            put(abi.sector_at(), &sector.to_le_bytes());
            put(abi.segments_at(), &sectors.to_le_bytes());
        }
        Message::Indirect { operation, segments, sector, grefs } => {
            put(0, &[operation::INDIRECT, operation]);
            put(2, &segments.to_le_bytes());
            put(abi.sector_at(), &sector.to_le_bytes());
            for (i, gref) in grefs.iter().enumerate() {
                put(abi.grefs_at() + 4 * i, &gref.to_le_bytes());
            }
        }
        Message::Unknown { operation } => put(0, &[operation]),
    }
    entry
}

/// A segment as it is on the ring, not checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WireSegment {
    /// The granted page.
    pub gref: u32,
    /// First sector in the page.
    pub first: u8,
    /// Last sector in the page, inclusive.
    pub last: u8,
}

impl WireSegment {
    /// Reads a segment.
    #[inline]
    pub fn decode(bytes: [u8; SEGMENT_BYTES]) -> WireSegment {
        let [a, b, c, d, first, last, _, _] = bytes;
        WireSegment { gref: u32::from_le_bytes([a, b, c, d]), first, last }
    }

    /// Writes a segment.
    pub fn encode(self) -> [u8; SEGMENT_BYTES] {
        let [a, b, c, d] = self.gref.to_le_bytes();
        [a, b, c, d, self.first, self.last, 0, 0]
    }
}

/// A response.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Response {
    /// Of the request.
    pub id: u64,
    /// [`Message::response_operation`].
    pub operation: u8,
    /// One of [`status`].
    pub status: i16,
}

/// Bytes of the larger response.
pub const RESPONSE_BYTES_MAX: usize = 16;

impl Response {
    /// All bytes of the response, padding zero; the first [`Abi::response_bytes`] go to the ring.
    #[inline]
    pub fn encode(self) -> [u8; RESPONSE_BYTES_MAX] {
        let mut bytes = [0; RESPONSE_BYTES_MAX];
        bytes[..8].copy_from_slice(&self.id.to_le_bytes());
        bytes[8] = self.operation;
        bytes[10..12].copy_from_slice(&self.status.to_le_bytes());
        bytes
    }

    /// Reads a response; `None` when its padding is not zero, by which a backend would tell what it had in memory.
    #[inline]
    pub fn decode(bytes: [u8; RESPONSE_BYTES_MAX]) -> Option<Response> {
        let [a, b, c, d, e, f, g, h, operation, padding, low, high, rest @ ..] = bytes;
        (padding == 0 && rest == [0; 4]).then_some(Response {
            id: u64::from_le_bytes([a, b, c, d, e, f, g, h]),
            operation,
            status: i16::from_le_bytes([low, high]),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // Goal: the numbers of entries are those of the protocol's own rule, in both layouts.
    // Method: the rule: the largest power of two that fits behind the header.
    #[test]
    fn entries_by_the_rule() {
        for abi in [Abi::X86_64, Abi::X86_32] {
            for pages in [1, 2, 4, 8, 16] {
                let fit = (pages as usize * PAGE_BYTES - ENTRIES_AT) / abi.entry_bytes();
                assert_eq!(entries(pages), Some(1 << fit.ilog2()), "{abi:?} {pages}");
                let end = entry_at(abi, 1 << fit.ilog2(), u32::MAX) + abi.entry_bytes();
                assert!(end <= pages as usize * PAGE_BYTES);
            }
        }
        assert_eq!(entries(16), Some(ENTRIES_MAX));
        assert!([0, 3, 5, 15, 17, 32, u32::MAX].into_iter().all(|pages| entries(pages).is_none()));
        assert_eq!(entry_at(Abi::X86_32, 32, 33), 64 + 108);
    }

    /// An entry from (offset, bytes), everything else 0xee, so that bytes that mean nothing are seen to mean nothing.
    fn entry(parts: &[(usize, &[u8])]) -> Entry {
        let mut entry = [0xee; REQUEST_BYTES_MAX];
        for (at, bytes) in parts {
            entry[*at..at + bytes.len()].copy_from_slice(bytes);
        }
        entry
    }

    const ID: [u8; 8] = [1, 2, 3, 4, 5, 6, 7, 8];
    const SECTOR: [u8; 8] = [0x11, 0x12, 0x13, 0x14, 0x15, 0x16, 0x17, 0x18];
    const ID_NUMBER: u64 = 0x0807_0605_0403_0201;
    const SECTOR_NUMBER: u64 = 0x1817_1615_1413_1211;

    // Goal: a direct request in both layouts. Method: bytes written out at the offsets of the table, and encoded back.
    #[test]
    fn direct_byte_for_byte() {
        let segment: [u8; 8] = [0x21, 0x22, 0x23, 0x24, 1, 6, 0xee, 0xee];
        for (abi, id_at, sector_at, segments_at) in [(Abi::X86_64, 8, 16, 24), (Abi::X86_32, 4, 12, 20)] {
            for operation in 0..=3 {
                let last = segments_at + 10 * 8;
                let bytes = entry(&[
                    (0, &[operation, 11]),
                    (id_at, &ID),
                    (sector_at, &SECTOR),
                    (segments_at, &segment),
                    (last, &segment),
                ]);
                let message = Message::Direct { operation, segments: 11, sector: SECTOR_NUMBER };
                assert_eq!(decode(abi, &bytes), Decoded { id: ID_NUMBER, message });
                assert_eq!(message.response_operation(), operation);
                assert_eq!(used_bytes(abi, &bytes), abi.entry_bytes());
                let wire = WireSegment { gref: 0x2423_2221, first: 1, last: 6 };
                assert_eq!(WireSegment::decode(bytes_at(&bytes, last)), wire);
                let back = encode(abi, &Decoded { id: ID_NUMBER, message }, &[wire; 11]);
                assert_eq!(back[id_at..id_at + 8], ID);
                assert_eq!(back[sector_at..sector_at + 8], SECTOR);
                assert_eq!(back[last..last + 6], segment[..6]);
                assert_eq!(back[abi.entry_bytes()..], [0; 4][..REQUEST_BYTES_MAX - abi.entry_bytes()]);
                assert_eq!(decode(abi, &back), decode(abi, &bytes));
            }
            let too_many = entry(&[(0, &[0, 12])]);
            assert!(used_bytes(abi, &too_many) < abi.entry_bytes());
        }
    }

    // Goal: a discard in both layouts. Method: as above.
    #[test]
    fn discard_byte_for_byte() {
        let sectors: [u8; 8] = [0x31, 0x32, 0x33, 0x34, 0x35, 0x36, 0x37, 0x38];
        for (abi, id_at, sector_at, sectors_at) in [(Abi::X86_64, 8, 16, 24), (Abi::X86_32, 4, 12, 20)] {
            let bytes = entry(&[(0, &[5, 1]), (id_at, &ID), (sector_at, &SECTOR), (sectors_at, &sectors)]);
            let message = Message::Discard { flag: 1, sector: SECTOR_NUMBER, sectors: 0x3837_3635_3433_3231 };
            let decoded = Decoded { id: ID_NUMBER, message };
            assert_eq!(decode(abi, &bytes), decoded);
            assert_eq!(message.response_operation(), 5);
            assert_eq!(used_bytes(abi, &bytes), sectors_at + 8);
            assert_eq!(decode(abi, &encode(abi, &decoded, &[])), decoded);
        }
    }

    // Goal: an indirect request in both layouts, and the operation of its response. Method: as above.
    #[test]
    fn indirect_byte_for_byte() {
        for (abi, id_at, sector_at, grefs_at) in [(Abi::X86_64, 8, 16, 28), (Abi::X86_32, 4, 12, 24)] {
            let grefs: Vec<u8> = (0x40..0x60).collect();
            let bytes =
                entry(&[(0, &[6, 1, 0x01, 0x02]), (id_at, &ID), (sector_at, &SECTOR), (grefs_at, &grefs)]);
            let Decoded { id, message } = decode(abi, &bytes);
            let expected = std::array::from_fn(|i| 0x4342_4140 + 0x0404_0404 * i as u32);
            assert_eq!(
                message,
                Message::Indirect { operation: 1, segments: 0x0201, sector: SECTOR_NUMBER, grefs: expected }
            );
            assert_eq!((id, message.response_operation()), (ID_NUMBER, operation::WRITE));
            assert_eq!(used_bytes(abi, &bytes), grefs_at + 32);
            assert_eq!(decode(abi, &encode(abi, &Decoded { id, message }, &[])), Decoded { id, message });
        }
    }

    // Goal: an operation that nobody knows keeps its id. Method: all other operations.
    #[test]
    fn unknown_operations_keep_their_id() {
        for operation in (4..=u8::MAX).filter(|operation| ![5, 6].contains(operation)) {
            for (abi, id_at) in [(Abi::X86_64, 8), (Abi::X86_32, 4)] {
                let decoded = decode(abi, &entry(&[(0, &[operation]), (id_at, &ID)]));
                assert_eq!(decoded, Decoded { id: ID_NUMBER, message: Message::Unknown { operation } });
            }
        }
    }

    // Goal: responses byte for byte; padding is zero. Method: bytes written out.
    #[test]
    fn responses_byte_for_byte() {
        let response = Response { id: ID_NUMBER, operation: 3, status: status::EOPNOTSUPP };
        let bytes = [1, 2, 3, 4, 5, 6, 7, 8, 3, 0, 0xfe, 0xff, 0, 0, 0, 0];
        assert_eq!(response.encode(), bytes);
        assert_eq!(Response::decode(bytes), Some(response));
        for padding in [9, 12, 15] {
            let mut leaks = bytes;
            leaks[padding] = 1;
            assert_eq!(Response::decode(leaks), None);
        }
        assert_eq!((Abi::X86_64.response_bytes(), Abi::X86_32.response_bytes()), (16, 12));
    }

    // Goal: the names of layouts. Method: a table.
    #[test]
    fn protocols() {
        assert_eq!(Abi::from_protocol(None), Some(Abi::X86_32));
        assert_eq!(Abi::from_protocol(Some("x86_32-abi")), Some(Abi::X86_32));
        assert_eq!(Abi::from_protocol(Some("x86_64-abi")), Some(Abi::X86_64));
        assert_eq!(Abi::from_protocol(Some("arm-abi")), Some(Abi::X86_64));
        assert_eq!(Abi::from_protocol(Some("")), None);
        assert_eq!(Abi::from_protocol(Some("ia64-abi")), None);
    }
}
