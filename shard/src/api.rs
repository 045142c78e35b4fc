//! What the control thread says to a shard and what a shard answers: plain messages, moved by value.
//!
//! A command travels through a crossbeam channel and one eventfd (`mailbox`); its reply carries the same `tag`.
//! Nothing here blocks, opens a path or closes a descriptor: files come opened, and go back in the reply to be
//! closed on the control side.

use std::os::fd::OwnedFd;
use std::sync::Arc;

pub use formats::spec::CacheMode;
use hdrhistogram::Histogram;
use ring_bridge::nbd::Handoff;

use crate::blkif::{GuestConnect, GuestInUse};
use crate::limits::{Group, Limits};
use crate::park::ParkedDisk;
use crate::ram::RamDisk;
use crate::stats::DiskCounters;

/// Identity of an attached disk for its life in this process; never used again after a detach.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct DiskId(pub u64);

/// What to do when the store answers with an error (`on-error`, `on-enospc`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ErrorPolicy {
    /// Hold the request, put the disk into `storage-error` and wait for `ctl resume` or `ctl fail`.
    Pause,
    /// Answer the request with the error and go on.
    Report,
}

/// What kind of object a descriptor names: decides how holes are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileKind {
    /// A regular file: fallocate punches holes.
    Regular,
    /// A block device or partition.
    Block {
        /// The device takes discards (BLKDISCARD granularity above zero).
        discard: bool,
    },
}

/// An image file as the control side opened it. Shared by `Arc` with the file table, so that dropping it on a shard
/// closes nothing; the table holds the last reference.
#[derive(Debug)]
pub struct ImageFile {
    /// The descriptor for I/O: O_DIRECT unless `cache` says otherwise.
    pub fd: OwnedFd,
    /// A buffered descriptor of the same file, for the bytes behind the last whole physical block; absent when the size is a
    /// multiple of a page or `fd` is buffered itself.
    pub tail: Option<OwnedFd>,
    /// Offsets and lengths of I/O on `fd` must be multiples of this (bytes, a power of two; 1 when buffered).
    pub offset_align: u32,
    /// Memory of I/O on `fd` must be aligned to this (bytes, at most 4096).
    pub memory_align: u32,
    /// How `fd` was opened.
    pub cache: CacheMode,
    /// Regular file or device.
    pub kind: FileKind,
    /// Length in bytes when it was opened (may be no multiple of a sector).
    pub length: u64,
    /// Length in bytes as the drivers of its image have changed it since; written by the one shard that has it.
    pub length_now: std::sync::atomic::AtomicU64,
    /// Direct I/O of this file system always blocks, so that the kernel punts it to a worker (everything but block devices, ext4
    /// and xfs): all of it counts against the bound of its store. Else only what has to wait does.
    pub punts: bool,
    /// Identity of the backing store (`st_dev` of the file, or `st_rdev` of a device): kernel work that may be punted is
    /// bounded per store.
    pub store: u64,
}

/// Where the bytes of a disk are.
#[derive(Debug, Clone)]
pub enum Backend {
    /// A raw file or block device.
    File(Arc<ImageFile>),
    /// A named RAM disk, shared by exports on any shard.
    Ram(Arc<RamDisk>),
    /// An image of a format, with the images below it.
    Image(Arc<ImageChain>),
    /// Reads as zeroes, forgets writes: for benches.
    Null,
}

/// Images on top of each other, the first on top. Only that one is ever written.
#[derive(Debug, Clone)]
pub struct ImageChain {
    /// At least one.
    pub layers: Vec<ChainLayer>,
}

/// One image of a chain, opened, locked and found to be of its format by the control side.
#[derive(Clone)]
pub struct ChainLayer {
    /// Its format.
    pub format: &'static dyn formats::driver::Format,
    /// Its file, then the further files that it asked for.
    pub files: Vec<Arc<ImageFile>>,
    /// Paths of these files, for messages.
    pub names: Vec<Arc<str>>,
    /// It may be changed: the first of a writable disk.
    pub writable: bool,
    /// It was written until now: it is flushed before the chain is used.
    pub flush: bool,
    /// A snapshot inside of it to serve.
    pub snapshot: Option<String>,
    /// The key of an encrypted one.
    pub key: Option<formats::crypt::Secret>,
    /// Where its allocations are noted: of a writable one, unless there was no room for a log. What it holds is carried out before the
    /// image is opened.
    pub log: Option<Arc<crate::alog::LogFile>>,
}

impl std::fmt::Debug for ChainLayer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ChainLayer")
            .field("format", &self.format.name())
            .field("names", &self.names)
            .field("writable", &self.writable)
            .finish_non_exhaustive()
    }
}

/// Everything a shard needs to serve a disk.
#[derive(Debug)]
pub struct DiskConfig {
    /// Identity.
    pub id: DiskId,
    /// The operator's name, for messages.
    pub name: Arc<str>,
    /// Where the bytes are.
    pub backend: Backend,
    /// Size that clients see, in bytes: a multiple of 512.
    pub size_bytes: u64,
    /// Refuse everything that changes data.
    pub read_only: bool,
    /// Policy for EIO and its like.
    pub on_error: ErrorPolicy,
    /// Policy for ENOSPC and EDQUOT.
    pub on_enospc: ErrorPolicy,
    /// The disk's own limits.
    pub limits: Limits,
    /// Groups whose limits hold as well, nearest first.
    pub groups: Vec<Arc<Group>>,
    /// Counters that the control thread reads at a scrape; they go with the disk from shard to shard.
    pub counters: Arc<DiskCounters>,
}

/// The state of a disk, as `ctl list` names it. Stored as its number in [`DiskCounters`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum DiskState {
    /// Serves.
    Running = 0,
    /// Takes no new requests; those in flight finish.
    Pausing = 1,
    /// Nothing in flight; requests wait.
    Paused = 2,
    /// The store failed and the policy is to hold requests.
    StorageError = 3,
    /// The disk's own code failed; waits for its operations, then is opened again.
    Quarantined = 4,
    /// Being detached.
    Draining = 5,
    /// Detached by force; kernel operations are still out.
    Zombie = 6,
    /// On its way to another shard.
    Parked = 7,
    /// Given up by `ctl fail` or a second failure: every request is answered with an error.
    Failed = 8,
}

/// A command and the tag that its reply will carry.
#[derive(Debug)]
pub struct Envelope {
    /// Chosen by the sender; comes back in [`Event::Reply`].
    pub tag: u64,
    /// What to do.
    pub command: Command,
}

/// Commands of the control thread. Each is answered exactly once by an [`Event::Reply`].
#[derive(Debug)]
pub enum Command {
    /// Serve a disk. Reply: `Done`.
    AddDisk(Box<DiskConfig>),
    /// Stop serving a disk: no new requests, those in flight finish, the disk is flushed, its connections are closed. Reply:
    /// `Removed` when all is done. With `force` requests that wait are dropped and connections are closed at once; if kernel
    /// operations are out the reply is `Zombie` and an [`Event::ZombieGone`] follows when they have come back.
    RemoveDisk {
        /// Which disk.
        disk: DiskId,
        /// Do not wait for clients or kernel.
        force: bool,
    },
    /// Serve one more NBD connection of a disk, negotiated by the control thread. Reply: `Done`, or an error (the connection
    /// is then closed by the shard).
    Connect {
        /// Which disk.
        disk: DiskId,
        /// Descriptor, unread bytes, negotiated options, TLS session.
        handoff: Box<Handoff>,
    },
    /// Serve a guest's rings. Reply: `GuestConnected`, or an error that names the key and the number at fault; nothing of it is left
    /// then.
    ConnectGuest {
        /// Which disk.
        disk: DiskId,
        /// What the guest has and what it is offered.
        guest: Box<GuestConnect>,
    },
    /// Stop serving a guest: nothing new is taken, what was taken is answered, rings are unmapped and ports unbound. Reply: `Done` when all
    /// that is so. A paused or failed store can keep that from happening; then `force`: the guest goes at once, and so do its
    /// requests that have not begun. Reply then: `Done`, or `Zombie` while the kernel works for requests of it (their buffers are ours; until
    /// they have ended nobody can connect). Flushes that are held are dropped in both cases.
    DisconnectGuest {
        /// Which disk.
        disk: DiskId,
        /// The guest's domain.
        domid: u16,
        /// The device's number.
        devid: u32,
        /// Wait for nothing.
        force: bool,
    },
    /// Change limits and groups; effective at once. Reply: `Done`.
    SetLimits {
        /// Which disk.
        disk: DiskId,
        /// New limits of the disk itself.
        limits: Limits,
        /// New groups, nearest first.
        groups: Vec<Arc<Group>>,
    },
    /// Hold new requests and wait for those in flight. Reply: `Done` when nothing is in flight. The control thread sends
    /// `Resume` when its patience ends first; the pending reply is then an error of kind `Interrupted`.
    Pause {
        /// Which disk.
        disk: DiskId,
    },
    /// Run a paused disk, or run held requests of a disk in `storage-error` again. Reply: `Done`, or an error of kind
    /// `DataInDoubt` after a failed fdatasync unless `data_in_doubt`.
    Resume {
        /// Which disk.
        disk: DiskId,
        /// The operator accepts that acknowledged data may be lost.
        data_in_doubt: bool,
    },
    /// Give a paused disk another image of the same size, with its connections and the requests that wait. The old one is flushed
    /// and closed first; when that fails, or the new one cannot be opened, the old one is open again when the error comes. Reply:
    /// `Done`, at once when it is the image that the disk has.
    Swap {
        /// Which disk.
        disk: DiskId,
        /// The new image.
        backend: Backend,
    },
    /// Make a disk larger: its file, or the disk that its image describes. Clients see it when they connect again. Reply: `Done`.
    Resize {
        /// Which disk.
        disk: DiskId,
        /// Bytes, a multiple of 512, not less than now.
        size_bytes: u64,
    },
    /// Give a disk up: held and new requests are answered with errors. Reply: `Done`.
    Fail {
        /// Which disk.
        disk: DiskId,
    },
    /// Take a disk off this shard with its connections. Reply: `Parked`. `Unpark` on any shard goes on where it stopped.
    /// `CancelPark` returns to serving.
    Park {
        /// Which disk.
        disk: DiskId,
    },
    /// Give up a park that has not been answered; its reply is then an error of kind `Interrupted`. Reply: `Done`.
    CancelPark {
        /// Which disk.
        disk: DiskId,
    },
    /// Serve a parked disk. Reply: `Done`, or `NotTaken` from a shard that is stopping or has a disk of that identity.
    Unpark(Box<ParkedDisk>),
    /// Histograms and queue depths of one disk. Reply: `Stats`.
    Stats {
        /// Which disk.
        disk: DiskId,
    },
    /// Clients of a disk. Reply: `Clients`.
    Clients {
        /// Which disk.
        disk: DiskId,
    },
    /// End the shard's loop; every disk must have been removed. Reply: `Done`, then [`Event::Stopped`].
    Stop,
    /// Panic inside this disk's work: the test of quarantine. Refused unless the shard was started with fault commands.
    InjectPanic {
        /// Which disk.
        disk: DiskId,
    },
    /// Panic in the reactor itself, outside every disk: the test of a shard's end. No reply but [`Event::Stopped`]. Refused
    /// unless the shard was started with fault commands.
    InjectShardPanic,
}

/// Answers of a shard.
#[derive(Debug)]
pub enum Reply {
    /// The command took effect.
    Done,
    /// The disk is gone; its configuration (and with it the descriptors) goes back to the control side.
    Removed(Box<DiskConfig>),
    /// The disk is gone for clients; kernel operations are out.
    Zombie {
        /// How many.
        in_flight: u32,
    },
    /// The disk with its connections, ready for another shard.
    Parked(Box<ParkedDisk>),
    /// The shard does not serve the parked disk. Nothing of it was lost: any other shard can take it, also the one that it
    /// came from.
    NotTaken(Box<ParkedDisk>),
    /// The guest is served so.
    GuestConnected(Box<GuestInUse>),
    /// Figures of one disk.
    Stats(Box<DiskStats>),
    /// Connections of one disk.
    Clients(Vec<ClientInfo>),
}

/// Figures of a disk at one instant. Histograms are in microseconds, 1 µs to 60 s, two significant digits; absent when the
/// disk was idle for long.
#[derive(Debug, Default)]
pub struct DiskStats {
    /// Time from arrival to answer, reads.
    pub read_us: Option<Histogram<u32>>,
    /// Time from arrival to answer, writes.
    pub write_us: Option<Histogram<u32>>,
    /// Time from arrival to answer, flushes.
    pub flush_us: Option<Histogram<u32>>,
    /// Time from arrival to the first kernel operation (limits, pauses), all operations.
    pub queue_us: Option<Histogram<u32>>,
}

/// One connection of a disk.
#[derive(Debug, Clone)]
pub struct ClientInfo {
    /// Who: `unix pid 1234 (fio)` or `tcp 127.0.0.1:4711`.
    pub peer: String,
    /// Requests in flight.
    pub in_flight: u32,
    /// Seconds since it connected.
    pub age_s: u64,
}

/// Why a command failed: a small kind and a sentence.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{message}")]
pub struct ShardError {
    /// For exit codes and HTTP status.
    pub kind: ShardErrorKind,
    /// For the operator.
    pub message: String,
}

/// Kinds of [`ShardError`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ShardErrorKind {
    /// No such disk on this shard.
    NoSuchDisk,
    /// The disk's state does not allow it.
    WrongState,
    /// A later command ended this one.
    Interrupted,
    /// A failed fdatasync stands in the way.
    DataInDoubt,
    /// A bound was reached (connections per disk).
    Limit,
    /// The shard or the disk failed.
    Failed,
    /// What a guest has handed over cannot be used, or there is no such guest.
    Guest,
}

/// What a shard tells the control thread, in order.
#[derive(Debug)]
pub enum Event {
    /// The answer to a command.
    Reply {
        /// The command's tag.
        tag: u64,
        /// What came of it.
        result: Result<Reply, ShardError>,
    },
    /// A disk changed its state by itself (storage error, quarantine, failure, recovery).
    State {
        /// Which disk.
        disk: DiskId,
        /// The state it has now.
        state: DiskState,
        /// Why, for the operator.
        reason: String,
    },
    /// A request on an image failed, or its tables could not be written; told at most once a second for each disk.
    ImageError {
        /// Which disk.
        disk: DiskId,
        /// What was found and where.
        message: String,
    },
    /// The last kernel operation of a zombie came back.
    ZombieGone {
        /// Its configuration, to be closed.
        config: Box<DiskConfig>,
    },
    /// A connection ended.
    ClientGone {
        /// Which disk.
        disk: DiskId,
        /// Who it was.
        peer: String,
        /// Empty when the client said goodbye, else what went wrong.
        reason: String,
    },
    /// A guest broke a ring, or it cannot be served any more after a move. That ring is stopped for good; the device's other rings go on.
    RingBroken {
        /// Which disk.
        disk: DiskId,
        /// The guest's domain.
        domid: u16,
        /// The device's number.
        devid: u32,
        /// Number of the queue.
        queue: u32,
        /// What was found.
        reason: String,
    },
    /// A flush of a guest failed and is not answered: an ERROR would tell the guest that it needs no flushes. If the disk was given up the
    /// device has to go to Closing; else a resume runs the flush again. Told once until then.
    FlushHeld {
        /// Which disk.
        disk: DiskId,
        /// The guest's domain.
        domid: u16,
        /// The device's number.
        devid: u32,
    },
    /// The shard's loop has ended.
    Stopped {
        /// Present when it ended by a failure.
        error: Option<String>,
    },
}
