//! The driver interface: a format is a map.
//!
//! A driver answers *where the bytes of a disk are* and *what must happen so that a range may be written*. It moves no payload:
//! [`crate::volume`] carries plans out, in the daemon and in the offline tools alike.
//!
//! ```text
//!            map ──────────────▶ extents ─────────────▶ payload is read, or written in place
//!   request ─┤ (cached metadata)
//!            ├ load ───────────▶ map again                                (metadata was not in memory)
//!            └ plan_write ─▶ fills ─▶ payload is written ─▶ commit ─▶ answer  (no place yet)
//!                                           └─ failed ────▶ abort
//! ```
//!
//! # Who guarantees what
//! The caller (`volume`):
//! - asks only for ranges inside [`Driver::size`], in bytes; plans, discards and zeroes are rounded to [`Driver::granule`] by the
//!   driver (plans: outwards) and by the caller (discards and zeroes: inwards, the rest is written as data);
//! - never has two plans, or a plan and a discard, zero or resize, out whose granules overlap; discards, zeroes and resizes
//!   also wait for reads and in-place writes of their range, and keep new ones away. So a driver never frees a place that
//!   somebody still reads or writes, and needs no locks for ranges;
//! - writes all fills of a plan before it commits it, and ends every plan by commit, [`Driver::abort`] or
//!   [`Driver::abort_at_rest`] exactly once. A dropped plan
//!   (its disk was forgotten) leaks space at most.
//!
//! The driver:
//! - checks every byte that it read from the file before it believes it. A place that a map returns lies inside the file's data,
//!   on no metadata, and belongs to this range alone; else the answer is [`ErrorKind::Corrupt`](crate::error::ErrorKind) for
//!   that range, and other ranges work on;
//! - keeps the promise of durability (below) for its metadata;
//! - changes nothing in a file that was opened read-only, and nothing before the first change that a guest asks for, except
//!   where its format's specification demands it (dirty and autoclear bits);
//! - bounds its memory by [`Open::budget`] and its loops by sizes that it has checked.
//!
//! # The promise
//! 1. What [`Driver::flush`] plus the file's flush acknowledged survives power loss.
//! 2. What [`Driver::commit`] acknowledged survives the death of the process.
//! 3. After power loss a byte that was not flushed is old or new, never another block's or a former owner's; the image opens,
//!    and a check finds leaks at most.
//! 4. One failed operation fails its caller only; the driver goes on. After ENOSPC everything that was there is there.
//!
//! A flush that has failed ends (1): what was written since the last one that succeeded may be lost, whatever later flushes say.
//! [`Driver::write_again`], when an operator accepts that, makes the promise hold again *for what is acknowledged from then on*, and
//! (2) to (4) for all: every change of metadata that no flush has covered is kept in memory until one does, and is written once
//! more, lost or not. In doubt stays payload: a granule that was written to since the last good flush may be zero or hold what it
//! held at any time, in bytes that the requests did not name as well, when they have made it change its place; of an encrypted
//! image it may be noise, which is what lost bytes decrypt to.
//!
//! How ([`crate::metadata`] does this for all drivers): places come from a reserve that is known to read as zero and whose
//! bookkeeping was made durable before; a mapping over *zero or nothing* may be written at any time ([`Order::Anytime`]); one
//! that hides *other bytes* (of the layer below, or of a cluster that was shared) is written only when the payload is
//! durable ([`Order::AfterData`]); a place that was freed is given out again only when the removal of its mapping is durable.
//!
//! # Encrypted payload
//! A driver with a [`Driver::cipher`] has encrypted bytes in its places; `volume` encrypts what it writes there and decrypts what it
//! reads, and nothing else does. What follows for such a driver:
//! - a place that reads as zero does not read as zero when it is decrypted: a fill is [`Under::Kept`] only where the place has the
//!   range's own bytes, encrypted; else [`Under::Zeroes`] or what the layers below have, and the caller writes the whole granule;
//! - granules and places are whole sectors of the cipher, and so are requests: `volume` reads and merges what is around smaller ones;
//! - bytes that it moves itself, from one place to another, it decrypts for the one and encrypts for the other;
//! - [`Format::check`], [`Format::describe`] and the work on snapshots need no key.
//!
//! # On paper
//! *64 KiB qcow2 copy-on-write, 4 KiB written*: map says `Absent`; plan gives one fill of the cluster, `Under::Below`; the caller
//! reads 60 KiB from the layer below around the payload, writes 64 KiB at once, commits: L2 entry, `AfterData`.
//! *qcow2 without backing*: fill of the cluster, `Under::Zero`: 4 KiB are written, nothing around; commit `Anytime`.
//! *VHD differencing disk, sectors of a present block*: granule 512; fill of the written sectors only, `Under::Below` which has
//! nothing to copy; commit sets bits of the sector bitmap, `AfterData`. *Its absent block*: the same fill; plan reserves a block
//! and remembers it in memory, a second plan for other sectors of that block joins the same reservation; each commit sets
//! its bits, the first one the entry of the block table, too.
//! *VMDK grain*: as qcow2, with two tables to keep equal.

use std::ops::Range;
use std::rc::Rc;

use crate::codec::Method;
use crate::crypt::{PayloadCipher, Secret};
use crate::error::Error;
use crate::file::{ImageFile, Pending};

pub use crate::allocation_log::AllocationLog;
pub use crate::metadata::{Budget, Order};

/// A file of a driver: index into [`Open::files`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FileIndex(pub u16);

/// A stretch of a disk and where its bytes are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// First byte of the disk.
    pub start: u64,
    /// Bytes; never 0.
    pub len: u64,
    /// Where they are.
    pub place: Place,
}

/// Where the bytes of an extent are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// In a file, from this offset on.
    Data {
        /// Which.
        file: FileIndex,
        /// Byte offset.
        offset: u64,
        /// They may be overwritten where they are: no other range refers to them, and no metadata has to change.
        in_place: bool,
    },
    /// They read as zero, whatever the layer below has.
    Zero {
        /// The image holds space for them.
        allocated: bool,
    },
    /// This image does not have them: the layer below does; without one they are zero.
    Absent,
    /// They have to be decoded: [`Driver::decode`] gives them. Never written in place.
    Encoded,
}

/// Appends an extent to what a map answers, or lengthens the last one behind index `own` if that continues in the new one.
#[inline]
pub(crate) fn push_extent(out: &mut Vec<Extent>, own: usize, start: u64, len: u64, place: Place) {
    if out.len() > own
        && let Some(last) = out.last_mut()
    {
        let continues = match (last.place, place) {
            (
                Place::Data { file, offset, in_place },
                Place::Data { file: next_file, offset: next, in_place: next_in_place },
            ) => file == next_file && offset + last.len == next && in_place == next_in_place,
            (before, after) => before == after,
        };
        if continues {
            last.len += len;
            return;
        }
    }
    out.push(Extent { start, len, place });
}

/// What is to be done so that a range can be written.
#[derive(Debug)]
pub struct Plan {
    /// The driver's own number of this plan.
    pub id: u64,
    /// Where to write, ascending and without gaps over the range; the first may begin before it, the last end behind it.
    pub fills: Vec<Fill>,
}

/// A stretch of a plan: bytes of the disk that get a place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fill {
    /// Bytes of the disk, whole granules; more than what the request covers when the place is larger.
    pub range: Range<u64>,
    /// Where `range.start` goes.
    pub file: FileIndex,
    /// Byte offset of `range.start`.
    pub offset: u64,
    /// What becomes of the bytes of `range` that the request does not write.
    pub under: Under,
}

/// The bytes of a fill around the payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Under {
    /// Right as they are in the file (they read as zero already and shall, or hold this range's own data): only the payload is written.
    Kept,
    /// The layer below has them: the caller reads them there and writes them with the payload. The place reads as zero, so
    /// what is zero below need not be written.
    Below,
    /// This image has them at another place: the caller reads them there (`offset` is of `range.start`) and writes the whole range.
    Copied {
        /// Which file.
        file: FileIndex,
        /// Byte offset of `range.start`.
        offset: u64,
    },
    /// They shall be zero and may not be yet: the caller writes the whole range.
    Zeroes,
    /// This image has them encoded: the caller takes them from [`Driver::decode`] and writes the whole range.
    Decoded,
}

/// How an image takes encoded units, for [`Driver::write_encoded`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Encoding {
    /// The method.
    pub method: Method,
    /// Bytes of the disk that are encoded together, a power of two.
    pub unit: u64,
    /// A longer form is not taken: such a unit is written as it is.
    pub encoded_max: usize,
}

/// What a zeroed range shall leave behind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Erase {
    /// A discard: the range reads as zero afterwards where the format can say so, else as before; space is given back.
    Discard,
    /// It reads as zero; space is given back.
    Zero,
    /// It reads as zero and keeps (or gets) its space, so that a later write needs no allocation.
    ZeroKeep,
}

/// How far a driver could serve an erase.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Erased {
    /// Done.
    Done,
    /// The format cannot say that without writing: the caller writes zeroes (or, for a discard, does nothing).
    WriteZeroes,
}

/// How an image is to be opened.
#[derive(Debug, Clone)]
pub struct Open {
    /// The image's file, then the further files that its [`Description`] asked for, in that order.
    pub files: Vec<Rc<dyn ImageFile>>,
    /// Changes are wanted. Every file that the driver writes is writable.
    pub writable: bool,
    /// Bytes of the layer below; `None` when there is none.
    pub below_size: Option<u64>,
    /// Memory for tables, shared with others.
    pub budget: Rc<Budget>,
    /// Where mappings are noted that are not in the file yet; without one [`Driver::commit`] waits for the file.
    pub log: Option<Rc<dyn AllocationLog>>,
    /// A snapshot inside the image to serve instead of its active state (by name or identifier), read-only.
    pub snapshot: Option<String>,
    /// The key of an encrypted image, as [`Format::unlock`] gave it.
    pub key: Option<Secret>,
}

/// What a running driver looks like from outside.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Table look-ups that were in memory.
    pub cache_hits: u64,
    /// Table look-ups that had to be read.
    pub cache_misses: u64,
    /// Bytes of tables in memory.
    pub cache_bytes: u64,
    /// Mappings that are acknowledged and not yet in the file.
    pub pending_mappings: u64,
}

/// One opened image. Single-threaded; shared by `Rc`; several calls may be out at a time, and a future that is dropped leaves the
/// driver usable.
pub trait Driver {
    /// Bytes of the disk, a multiple of 512.
    fn size(&self) -> u64;

    /// The unit in which ranges get places, in bytes: a power of two, at least 512.
    fn granule(&self) -> u64;

    /// Appends to `out` where the bytes from `offset` on are, using only what is in memory, and returns how many bytes that
    /// covers: at most `len`, fewer when something has to be read, 0 when [`Driver::load`] must come first. Neighbouring
    /// extents that continue each other are merged as far as that is cheap.
    ///
    /// # Errors
    /// The tables for `offset` are damaged. (Damage further on ends the answer before it.)
    fn map(&self, offset: u64, len: u64, out: &mut Vec<Extent>) -> Result<u64, Error>;

    /// Reads what [`Driver::map`] needs at `offset`, so that it then covers at least a part of `len` bytes.
    fn load(&self, offset: u64, len: u64) -> Pending<'_, ()>;

    /// Finds places for a range that map did not call in place. Loads what it needs. Nothing of it is visible to `map` before
    /// the commit.
    fn plan_write(&self, offset: u64, len: u64) -> Pending<'_, Plan>;

    /// The payload of a plan is written: makes it visible to `map` at once, and safe against the death of the process when the
    /// future is done. After an error the range holds old or new bytes.
    fn commit(&self, plan: Plan) -> Pending<'_, ()>;

    /// The payload of a plan was not written as a whole: what was reserved goes back. Some of it may be on its way to the file still,
    /// and land at any time.
    fn abort(&self, plan: Plan);

    /// As [`Driver::abort`], and nothing of the payload is on its way any more: places may be given to others once they are clean.
    fn abort_at_rest(&self, plan: Plan) {
        self.abort(plan);
    }

    /// Unmaps or zeroes whole granules.
    fn erase(&self, range: Range<u64>, how: Erase) -> Pending<'_, Erased>;

    /// Writes what is in memory only, in an order that keeps the promise, so that the flushes of all files *that follow* make
    /// everything durable that was committed before this call. Flushes files itself where order demands it.
    fn flush(&self) -> Pending<'_, ()>;

    /// Writes mappings back that only the log and the memory have: called now and then while there are some
    /// ([`Usage::pending_mappings`]), also when no guest flushes.
    fn tidy(&self) -> Pending<'_, ()>;

    /// A flush of a file has failed, and an operator goes on all the same: writes all metadata again that was written and that no flush
    /// has covered since, in an order that keeps the promise, so that the flushes of all files *that follow* make it durable. Nothing
    /// that was reserved counts as clean or durable unless it was flushed. See "The promise".
    ///
    /// # Errors
    /// Of the files: it has to be done again before anything is acknowledged as durable. A driver that does not know how refuses.
    fn write_again(&self) -> Pending<'_, ()> {
        let what = "this format cannot write its tables again: fail the disk and attach it again";
        Box::pin(std::future::ready(Err(Error::new(crate::error::ErrorKind::Unsupported, what))))
    }

    /// Changes the size of the disk, in bytes. Growing reads as zero, whatever the layer below has there.
    fn resize(&self, size: u64) -> Pending<'_, ()>;

    /// What is written from now on does not change what a child of this image reads (a merge of that child into it, data of a parent
    /// that is copied up): an identity of the contents ([`Identity::of_contents`]) stays what it is.
    fn keep_identity(&self) {}

    /// Ends the use of the image: everything is flushed, what was reserved goes back, marks of use are removed. The driver is not
    /// used afterwards, unless it failed because a flush did. Dropping a driver without this is what a crash does.
    fn close(&self) -> Pending<'_, ()>;

    /// How the payload in the places of this image is encrypted; `None`: it is as it is. See the module.
    fn cipher(&self) -> Option<&PayloadCipher> {
        None
    }

    /// Decodes bytes of a range that `map` called [`Place::Encoded`], from its start on: those that one encoded unit has, at least one
    /// byte and at most the range. ([`crate::codec::Decoded`] does that within bounds of memory and time.)
    fn decode(&self, range: Range<u64>) -> Pending<'_, crate::file::Buf> {
        let message = format!("nothing at {} is encoded", range.start);
        Box::pin(std::future::ready(Err(Error::invalid(message))))
    }

    /// How this image takes encoded units; `None` when it takes none.
    fn encoding(&self) -> Option<Encoding> {
        None
    }

    /// Stores units in encoded form: pairs of the offset on the disk, ascending multiples of [`Encoding::unit`], and the encoded bytes
    /// of the whole unit (behind the end of the disk it is zero). As visible and safe when it is done as after a commit. The caller
    /// keeps everybody away from these units meanwhile, and gives a bounded number of them at a time.
    fn write_encoded(&self, _units: Vec<(u64, Vec<u8>)>) -> Pending<'_, ()> {
        let message = "this image takes nothing that is compressed";
        Box::pin(std::future::ready(Err(Error::new(crate::error::ErrorKind::Unsupported, message))))
    }

    /// Figures.
    fn usage(&self) -> Usage;
}

/// What an image refers to besides itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    /// Paths as the image names them, best first; relative ones are relative to the folder of the image. Not yet checked against
    /// anything: the opener has its gate.
    pub paths: Vec<String>,
    /// Type that the image says it has (`raw`, `qcow2`, `vhd`); `None` when it does not say, which the opener must not guess raw.
    pub format: Option<String>,
    /// The identity that the image expects; `None` when the format has none.
    pub identity: Option<Identity>,
}

/// How a format recognises that a parent is the one it was made over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    /// UUID, as 16 bytes in the order of the file.
    pub uuid: [u8; 16],
    /// Time of modification that the image remembers, seconds since 1970; `None` when not recorded. A difference is a warning.
    pub modified: Option<u64>,
    /// It is one of the contents (a VMDK's CID): the first write after an opening changes it.
    pub of_contents: bool,
}

/// How the data of an image is encrypted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Encryption {
    /// Method and cipher, for people.
    pub words: String,
    /// What an operator should know about it.
    pub warning: Option<&'static str>,
}

/// What an image says of itself: enough to open it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Description {
    /// Bytes of the disk.
    pub size: u64,
    /// The layer below.
    pub backing: Option<Link>,
    /// Further files that hold data of this image.
    pub data_files: Vec<Link>,
    /// Its own identity, for children that remember it.
    pub identity: Option<Identity>,
    /// The image can be written by this program; else why not.
    pub writable: Result<(), String>,
    /// How its data is encrypted: it cannot be opened without a key. `None`: it is not.
    pub encryption: Option<Encryption>,
    /// Properties for people and `--json`, in order: name, value (cluster size, version, features, creator…).
    pub properties: Vec<(&'static str, String)>,
}

/// What a check found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Findings {
    /// Damage: data may be lost or wrong. One line each, bounded by [`Findings::LINES_MAX`].
    pub corruptions: Vec<String>,
    /// Number of corruptions, also those without a line.
    pub corruptions_total: u64,
    /// Space that nothing refers to. One line each, bounded.
    pub leaks: Vec<String>,
    /// Number of leaks.
    pub leaks_total: u64,
    /// Odd, harmless.
    pub remarks: Vec<String>,
    /// Corruptions and leaks that were repaired.
    pub repaired_total: u64,
    /// Bytes of the disk that have a place in this image.
    pub allocated_bytes: u64,
    /// First byte behind everything that the image uses in its file.
    pub end: u64,
}

impl Findings {
    /// Lines that are kept of each kind.
    pub const LINES_MAX: usize = 1000;

    /// Notes damage.
    pub fn corruption(&mut self, line: impl Into<String>) {
        self.corruptions_total += 1;
        if self.corruptions.len() < Self::LINES_MAX {
            self.corruptions.push(line.into());
        }
    }

    /// Notes `count` lost pieces of space.
    pub fn leak(&mut self, count: u64, line: impl Into<String>) {
        self.leaks_total += count;
        if self.leaks.len() < Self::LINES_MAX {
            self.leaks.push(line.into());
        }
    }
}

/// What a repair may touch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Repair {
    /// Space that nothing refers to is given back; nothing else is changed.
    Leaks,
    /// Everything that can be repaired without guessing what data is right.
    All,
}

/// Options of a new image, as `image create -o name=value` gives them, and what every format has.
#[derive(Debug, Clone)]
pub struct Create {
    /// Bytes of the disk; `None` takes the size of the layer below.
    pub size: Option<u64>,
    /// The layer below: how the new image shall name it (path as it will be stored, format), its identity and size.
    pub backing: Option<(Link, u64)>,
    /// Format's own options, as typed by the user; unknown ones are refused by name with the known ones listed.
    pub options: Vec<(String, String)>,
    /// The passphrase of an image that shall be encrypted.
    pub key: Option<Secret>,
}

/// What images of a format need in their file, for `measure`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Space {
    /// Bytes of the disk that get space together (cluster, block).
    pub unit: u64,
    /// Bytes that such a unit takes in the file.
    pub unit_space: u64,
    /// Bytes that everything else takes, at most.
    pub overhead: u64,
}

/// A state of the disk that an image keeps beside its active one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// Identifier, unique in the image.
    pub id: String,
    /// Name as a user gave it; may be empty, and need not be unique.
    pub name: String,
    /// Bytes of the disk then; `None` when the image does not say.
    pub size: Option<u64>,
    /// When it was made, seconds since 1970.
    pub created: u64,
    /// Bytes of the state of a running machine that are kept with it.
    pub machine_bytes: u64,
}

impl Snapshot {
    /// The one of `all` that `wanted` means; an identifier wins over a name.
    pub fn find<'a>(all: &'a [Snapshot], wanted: &str) -> Option<&'a Snapshot> {
        let by_id = all.iter().find(|one| one.id == wanted);
        by_id.or_else(|| all.iter().find(|one| one.name == wanted))
    }
}

/// What is to be done with the snapshots inside an image. A name is looked up as identifier first, as in [`Open::snapshot`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SnapshotChange {
    /// Keep the active state under a name that no snapshot has yet.
    Create(String),
    /// Make the active state what the snapshot is; the active state is lost.
    Apply(String),
    /// Forget a snapshot and give back what only it had.
    Delete(String),
}

/// A format: the one line of [`crate::registry`] that makes it known.
pub trait Format: Sync {
    /// Its type in specifications: `vhd`, `qcow2`.
    fn name(&self) -> &'static str;

    /// Whether a file is of this format, from its first (at most) 64 KiB and its last 512 bytes. Never true for anything a guest
    /// could have written into a raw disk *and* an operator called raw: the answer is used for messages and for backing files
    /// whose type the image names, not to guess.
    fn recognises(&self, head: &[u8], tail: &[u8]) -> bool;

    /// Reads what an image says of itself. Changes nothing.
    fn describe(&self, file: Rc<dyn ImageFile>) -> Pending<'_, Description>;

    /// The key of an encrypted image, by what its user has: a passphrase, or the key itself. Takes as long as the image wants (seconds):
    /// not for a thread that others wait for.
    ///
    /// The error of a wrong key is [`ErrorKind::Invalid`](crate::error::ErrorKind).
    fn unlock<'a>(&'a self, file: Rc<dyn ImageFile>, _passphrase: &'a Secret) -> Pending<'a, Secret> {
        let message = format!("{}: {}", file.name(), refused(self.name(), "is not encrypted").message);
        Box::pin(std::future::ready(Err(Error::invalid(message))))
    }

    /// Opens an image.
    fn open(&self, open: Open) -> Pending<'_, Rc<dyn Driver>>;

    /// Makes an empty image in an empty file. `data_files` are the further files, if the options ask for some.
    fn create<'a>(
        &'a self,
        file: Rc<dyn ImageFile>,
        data_files: Vec<Rc<dyn ImageFile>>,
        create: &'a Create,
    ) -> Pending<'a, ()>;

    /// Finds everything that is wrong with an image, and repairs what `repair` allows. `below_size` as in [`Open`].
    fn check(&self, open: Open, repair: Option<Repair>) -> Pending<'_, Findings>;

    /// Paths of the further files that [`Format::create`] wants for these options, in its order; relative ones are relative to the
    /// folder of the image, which has the name `image` there.
    ///
    /// # Errors
    /// The options make no sense.
    fn data_files(&self, _create: &Create, _image: &str) -> Result<Vec<String>, Error> {
        Ok(Vec::new())
    }

    /// Whether an image made in this way reads as zero.
    fn starts_zero(&self, _create: &Create) -> bool {
        true
    }

    /// What an image made in this way needs in its file.
    ///
    /// # Errors
    /// The options make no sense, or the format cannot say.
    fn space(&self, _create: &Create) -> Result<Space, Error> {
        Err(refused(self.name(), "cannot be measured: make the image and look at its length"))
    }

    /// Changes which image lies below: what the new one is called, its identity and its size; `None` for none at all. Changes that
    /// reference alone and looks at no data. After a crash the image names the old one or the new one, whole.
    fn set_backing(&self, file: Rc<dyn ImageFile>, _backing: Option<(Link, u64)>) -> Pending<'_, ()> {
        let message =
            format!("{}: {}", file.name(), refused(self.name(), "cannot have another parent").message);
        Box::pin(std::future::ready(Err(Error::new(crate::error::ErrorKind::Unsupported, message))))
    }

    /// Makes the disk of an image that nobody has open smaller: what is behind `size` is lost. A crash leaves the old size or the new
    /// one.
    fn shrink(&self, open: Open, size: u64) -> Pending<'_, ()> {
        Box::pin(async move {
            let driver = self.open(open).await?;
            driver.resize(size).await?;
            driver.flush().await?;
            driver.close().await
        })
    }

    /// Images may keep snapshots inside; one of them can be served instead of the active state.
    fn has_snapshots(&self) -> bool {
        false
    }

    /// The snapshots inside an image, oldest first. Changes nothing.
    fn snapshots(&self, _file: Rc<dyn ImageFile>) -> Pending<'_, Vec<Snapshot>> {
        Box::pin(std::future::ready(Err(refused(self.name(), "has no snapshots inside the image"))))
    }

    /// Makes, applies or deletes a snapshot inside an image. After a crash the change is done or not, with leaks at most.
    fn change_snapshots<'a>(&'a self, _open: Open, _change: &'a SnapshotChange) -> Pending<'a, ()> {
        Box::pin(std::future::ready(Err(refused(self.name(), "has no snapshots inside the image"))))
    }
}

fn refused(format: &str, what: &str) -> Error {
    Error::new(crate::error::ErrorKind::Unsupported, format!("the format {format} {what}"))
}
