//! A request inside a shard: what a client asked of a disk, and how far it has come.
//!
//! Requests live in one slab of the reactor, outside every `catch_unwind`, until they have been answered exactly once. Disks and
//! connections hold keys.

use crate::clock::Nanos;
use crate::stats::OpClass;
use crate::storage::pool::Buf;
use crate::storage::side::Extent;

/// Key of a request in the reactor's slab.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ReqKey(pub u32);

/// Most bytes that one read or write request carries. Frontends cut larger ones into pieces.
pub const PIECE: u32 = 256 << 10;

/// What is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Fill the payload.
    Read,
    /// Store the payload; `fua`: durable before the answer.
    Write {
        /// Force unit access.
        fua: bool,
    },
    /// What was answered before is durable.
    Flush,
    /// The range is not needed any more.
    Discard {
        /// Force unit access.
        fua: bool,
    },
    /// The range reads as zero.
    WriteZeroes {
        /// Force unit access.
        fua: bool,
        /// Keep the space allocated.
        no_hole: bool,
        /// Fail with EOPNOTSUPP rather than write zeroes one by one.
        fast: bool,
    },
    /// Data and holes.
    Extents {
        /// Bound of the answer.
        max: usize,
    },
    /// The file is as long as the request's offset says: of an image's files, never of a client.
    SetLength {
        /// Only if it is shorter; else cut it.
        grow: bool,
    },
}

impl Kind {
    /// The counters that it belongs to; extents are not counted.
    pub fn class(self) -> Option<OpClass> {
        match self {
            Kind::Read => Some(OpClass::Read),
            Kind::Write { .. } => Some(OpClass::Write),
            Kind::Flush => Some(OpClass::Flush),
            Kind::Discard { .. } => Some(OpClass::Discard),
            Kind::WriteZeroes { .. } => Some(OpClass::WriteZeroes),
            Kind::Extents { .. } | Kind::SetLength { .. } => None,
        }
    }

    /// It changes data.
    pub fn changes(self) -> bool {
        !matches!(self, Kind::Read | Kind::Flush | Kind::Extents { .. })
    }

    /// Durable before the answer.
    pub fn fua(self) -> bool {
        matches!(
            self,
            Kind::Write { fua: true } | Kind::Discard { fua: true } | Kind::WriteZeroes { fua: true, .. }
        )
    }
}

/// Who can ask.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Client {
    /// An NBD connection, by its slot.
    Conn(u32),
    /// A guest's ring, by its slot.
    Ring(u32),
}

/// Who asked, and its command. The generation guards against a client that has gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Origin {
    /// The client.
    pub client: Client,
    /// Its generation.
    pub generation: u32,
    /// The client's own number of the command.
    pub command: u32,
}

/// For whom a request of an image's file runs: the disk of the volume counts it as its own operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Via {
    /// A piece of a request of the volume's disk; its memory is that request's payload from `at` on.
    Piece {
        /// The volume's disk.
        disk: u32,
        /// The request.
        req: ReqKey,
        /// Byte of its payload.
        at: u32,
        /// What the file has is encrypted.
        sealed: Sealed,
    },
    /// Something that a future asked for.
    Future {
        /// The volume's disk.
        disk: u32,
        /// Whom to answer.
        reply: usize,
        /// Its memory is the payload of this request from a byte on; else it has its own.
        payload: Option<(ReqKey, u32)>,
        /// What was read may stay in the buffer that it was read to.
        lend: bool,
    },
}

/// Whether the bytes of a piece are encrypted in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sealed {
    /// They are not.
    No,
    /// What is read is decrypted where it arrived, with the cipher of this layer.
    Read(u16),
    /// What is written is encrypted, in memory of its own.
    Written,
}

impl Via {
    /// The volume's disk.
    pub fn disk(self) -> u32 {
        match self {
            Via::Piece { disk, .. } | Via::Future { disk, .. } => disk,
        }
    }

    /// The request whose payload is used, and from which byte on.
    pub fn payload(self) -> Option<(ReqKey, u32)> {
        match self {
            Via::Piece { sealed: Sealed::Written, .. } => None,
            Via::Piece { req, at, .. } => Some((req, at)),
            Via::Future { payload, .. } => payload,
        }
    }
}

/// How far a started request has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Not started.
    Waiting,
    /// Kernel operations move the payload itself.
    Transfer,
    /// A read into the bounce buffer.
    BounceRead,
    /// Edges of a read-modify-write are being read.
    EdgeRead,
    /// The merged range is being written.
    EdgeWrite,
    /// Waits for a block that a read-modify-write holds.
    Blocked,
    /// Waits for fallocate or a side thread.
    Punch,
    /// Zeroes are written one by one.
    ZeroFill,
    /// Waits for fdatasync.
    Sync,
}

/// A request.
#[derive(Debug)]
pub struct Request {
    /// The disk's slot in the reactor.
    pub disk: u32,
    /// What is asked.
    pub kind: Kind,
    /// Byte offset on the disk.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
    /// Data: of a write from the start, of a read when it was started.
    pub payload: Option<Buf>,
    /// Data of a write that came from another shard and has no buffer here yet.
    pub carried: Option<Vec<u8>>,
    /// Who asked; `None` when the connection has gone or the reactor itself asks.
    pub origin: Option<Origin>,
    /// The volume that it runs for; `None` for requests of clients and of the reactor itself.
    pub via: Option<Via>,
    /// Keeps its range of a volume from being erased meanwhile.
    pub guard: Option<formats::locks::RangeGuard>,
    /// Operations that it costs: 1, or 0 for the later pieces of a large one.
    pub operations: u32,
    /// When it was taken.
    pub arrived: Nanos,
    /// When its first kernel operation was queued; 0 before.
    pub started: Nanos,
    /// Set when it began to wait for a limit; 0 otherwise.
    pub throttled: Nanos,
    /// Progress.
    pub phase: Phase,
    /// Kernel operations out.
    pub pending: u8,
    /// First error, as errno; 0 is none.
    pub errno: i32,
    /// Private buffer for what is not aligned.
    pub bounce: Option<Buf>,
    /// Position of a zero fill.
    pub cursor: u64,
    /// Answer of `Extents`.
    pub extents: Vec<Extent>,
}

impl Request {
    /// A request that has just been taken.
    pub fn new(disk: u32, kind: Kind, offset: u64, len: u64, origin: Option<Origin>, now: Nanos) -> Request {
        Request {
            disk,
            kind,
            offset,
            len,
            payload: None,
            carried: None,
            origin,
            via: None,
            guard: None,
            operations: 1,
            arrived: now,
            started: 0,
            throttled: 0,
            phase: Phase::Waiting,
            pending: 0,
            errno: 0,
            bounce: None,
            cursor: 0,
            extents: Vec::new(),
        }
    }

    /// First byte behind the range.
    pub fn end(&self) -> u64 {
        self.offset + self.len
    }

    /// Bytes that it counts against what its connection may hold.
    #[cfg(test)]
    pub fn held_bytes(&self) -> u64 {
        if matches!(self.kind, Kind::Read | Kind::Write { .. }) { self.len } else { 0 }
    }

    /// Back to the state before the start, to run again.
    pub fn rewind(&mut self) {
        self.phase = Phase::Waiting;
        self.errno = 0;
        self.cursor = 0;
        self.started = 0;
        self.extents.clear();
        self.guard = None;
    }
}

/// All requests of a shard.
#[derive(Debug, Default)]
pub struct Requests {
    slab: slab::Slab<Request>,
}

impl Requests {
    /// Adds a request.
    pub fn insert(&mut self, request: Request) -> ReqKey {
        ReqKey(self.slab.insert(request) as u32)
    }

    /// Takes a request out.
    pub fn remove(&mut self, key: ReqKey) -> Request {
        self.slab.remove(key.0 as usize)
    }

    /// A request that may have gone.
    pub fn get(&self, key: ReqKey) -> Option<&Request> {
        self.slab.get(key.0 as usize)
    }

    /// All requests.
    pub fn iter(&self) -> impl Iterator<Item = (ReqKey, &Request)> {
        self.slab.iter().map(|(index, request)| (ReqKey(index as u32), request))
    }

    /// How many.
    pub fn len(&self) -> usize {
        self.slab.len()
    }

    /// None at all.
    pub fn is_empty(&self) -> bool {
        self.slab.is_empty()
    }
}

impl std::ops::Index<ReqKey> for Requests {
    type Output = Request;
    fn index(&self, key: ReqKey) -> &Request {
        &self.slab[key.0 as usize]
    }
}

impl std::ops::IndexMut<ReqKey> for Requests {
    fn index_mut(&mut self, key: ReqKey) -> &mut Request {
        &mut self.slab[key.0 as usize]
    }
}
