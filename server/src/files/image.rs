//! From an identified object to an [`ImageFile`]: opened for I/O, fenced, locked, measured.
//!
//! Everything here blocks and runs on a lane. It opens the object that was identified, not its path again.
//! The order matters: the fence first (a predecessor's kernel operations also hold the predecessor's locks),
//! the locks second, and only then the length, which a former holder could still have changed.
//!
//! Size rule: a device is served as it is; a regular file is served with its length rounded *up* to 512
//! bytes, the last sector's missing bytes read as zeroes, and a write to them lengthens the file.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::rc::Rc;

use nix::sys::stat::fstat;
use rustix::fs::{AtFlags, StatxFlags};
use shard::api::{CacheMode, FileKind, ImageFile};

use super::device::Device;
use super::holders;
use super::locks::{self, Access, Fence};
use super::opener::Object;
use super::{FileKey, OpenError, OpenErrorKind};

/// Sizes are served in units of this.
const SECTOR: u64 = 512;
/// Coarsest unit of direct I/O that the shards' bounce buffers are made for, in bytes.
const ALIGN_MAX: u32 = 4096;
/// Bytes of a page of the page cache.
const PAGE: u64 = 4096;

/// How an image is to be opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ImageOptions {
    /// Without write access; other readers may share it.
    pub read_only: bool,
    /// Direct or through the page cache.
    pub cache: CacheMode,
    /// Sector size in bytes that clients shall see (512 or 4096); without it the unit of direct I/O decides.
    pub sector: Option<u32>,
    /// The file holds an image of a format: its length is no disk's, and all of it is reached in one way.
    pub formatted: bool,
}

impl ImageOptions {
    fn access(&self) -> Access {
        if self.read_only { Access::Read } else { Access::Write }
    }
}

/// What clients see of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    /// Size in bytes: a multiple of `sector_bytes`.
    pub served_bytes: u64,
    /// 512 or 4096.
    pub sector_bytes: u32,
}

/// Why an attempt ended without an image.
#[derive(Debug)]
pub enum Attempt {
    /// A predecessor's operations are under way: try again until the deadline.
    Fenced,
    /// Final.
    Refused(OpenError),
}

impl From<OpenError> for Attempt {
    fn from(error: OpenError) -> Self {
        Attempt::Refused(error)
    }
}

/// Opens, fences, locks and measures `object`.
pub fn open_image(object: &Object, options: &ImageOptions, fence: Fence) -> Result<ImageFile, Attempt> {
    let path = object.path.as_path();
    check_sector_option(path, options.sector)?;
    let device = match object.key {
        FileKey::Block { device } => Some(Device::new(device)),
        FileKey::Regular { .. } => None,
    };
    if let Some(device) = device.as_ref().filter(|device| !options.read_only && device.is_read_only()) {
        let name = device.name().unwrap_or_default();
        return Err(refuse(
            path,
            OpenErrorKind::Permission,
            format!("the device {name} is read-only: attach it with --read-only"),
        ));
    }
    let mut file = open_for_io(object, options, device.as_ref(), fence)?;
    take_locks(object, &file, options, fence)?;
    let length = measure(path, &mut file, device.is_some())?;
    let (offset_align, memory_align) = match options.cache {
        CacheMode::None => direct_alignment(object, &file, length, device.as_ref())?,
        CacheMode::Writeback | CacheMode::Writethrough => (1, 1),
    };
    // A page at least, so that the page cache of the tail holds nothing that O_DIRECT reaches; a device is whole blocks.
    if options.formatted && device.is_none() && !length.is_multiple_of(u64::from(offset_align)) {
        // Whole units of direct I/O would move the end of the file, where some formats have a structure of theirs.
        // Its locks go with it.
        drop(file);
        let buffered = ImageOptions { cache: CacheMode::Writeback, ..*options };
        return open_image(object, &buffered, fence);
    }
    let tail = if device.is_some()
        || options.formatted
        || length.is_multiple_of(u64::from(offset_align).max(PAGE))
        || offset_align == 1
    {
        None
    } else {
        Some(open_tail(object, options, fence)?)
    };
    let (kind, store) = match (&device, object.key) {
        (Some(device), FileKey::Block { device: number }) => {
            (FileKind::Block { discard: device.takes_discard() }, number)
        }
        _ => (FileKind::Regular, object.stat.st_dev),
    };
    let punts = device.is_none() && punts_direct_io(&file);
    let image = ImageFile {
        fd: OwnedFd::from(file),
        tail,
        offset_align,
        memory_align,
        cache: options.cache,
        kind,
        length,
        length_now: length.into(),
        punts,
        store,
    };
    geometry(path, &image, options.sector)?;
    Ok(image)
}

/// What a driver reads in an image of its format. Blocks.
///
/// Errors: `Invalid` with the driver's words.
pub fn ask<T>(
    path: &Path,
    image: &ImageFile,
    question: impl FnOnce(Rc<dyn formats::file::ImageFile>) -> formats::file::Pending<'static, T>,
) -> Result<T, OpenError> {
    let read = || {
        // The same description, so that nothing is opened that was not checked; positioned reads leave it alone.
        let fd = image.fd.try_clone().map_err(|error| {
            formats::error::Error::io(&path.display().to_string(), "dup", error.raw_os_error().unwrap_or(5))
        })?;
        let file = formats::blocking::Blocking::new(File::from(fd), &path.display().to_string(), false)?;
        formats::blocking::wait(question(file))
    };
    read().map_err(|error| OpenError::new(OpenErrorKind::Invalid, error.message))
}

/// Size and sectors that clients see.
///
/// Errors: `Invalid` when the length does not fit the wanted sectors.
pub fn geometry(path: &Path, image: &ImageFile, sector: Option<u32>) -> Result<Geometry, OpenError> {
    check_sector_option(path, sector)?;
    let sector_bytes = sector.unwrap_or(match image.kind {
        // Clients of a device with 4096-byte blocks should not be invited to smaller requests; of a file they
        // always were.
        FileKind::Block { .. } if image.length.is_multiple_of(image.offset_align.into()) => {
            image.offset_align.max(512)
        }
        _ => 512,
    });
    let served_bytes = match image.kind {
        FileKind::Regular => image.length.next_multiple_of(SECTOR),
        FileKind::Block { .. } => image.length,
    };
    if !served_bytes.is_multiple_of(sector_bytes.into()) {
        let message = format!(
            "{}: its {} bytes are no multiple of {sector_bytes}-byte sectors; leave ?sector={sector_bytes} \
            out or change the length to {}",
            path.display(),
            image.length,
            served_bytes.next_multiple_of(u64::from(sector_bytes))
        );
        return Err(OpenError::new(OpenErrorKind::Invalid, message));
    }
    Ok(Geometry { served_bytes, sector_bytes })
}

fn check_sector_option(path: &Path, sector: Option<u32>) -> Result<(), OpenError> {
    match sector {
        None | Some(512 | 4096) => Ok(()),
        Some(found) => {
            let message = format!("{}: sector={found}: expected 512 or 4096", path.display());
            Err(OpenError::new(OpenErrorKind::Invalid, message))
        }
    }
}

fn refuse(path: &Path, kind: OpenErrorKind, why: impl std::fmt::Display) -> Attempt {
    Attempt::Refused(OpenError::new(kind, format!("{}: {why}", path.display())))
}

fn open_for_io(
    object: &Object,
    options: &ImageOptions,
    device: Option<&Device>,
    fence: Fence,
) -> Result<File, Attempt> {
    let path = object.path.as_path();
    let direct = options.cache == CacheMode::None;
    // On a block device O_EXCL claims it: not mounted, not part of another device, not claimed by somebody
    // else, and kept so.
    let exclusive = device.filter(|_| !options.read_only);
    let flags = if direct { libc::O_DIRECT } else { 0 } | if exclusive.is_some() { libc::O_EXCL } else { 0 };
    let opened = open_again(object, !options.read_only, flags);
    opened.map_err(|error| match (error.raw_os_error(), exclusive) {
        (Some(libc::EINVAL), _) if direct => no_direct_io(object),
        (Some(libc::EBUSY), Some(device)) => {
            // The claim of a predecessor goes with its last operation, like its fence.
            let fenced = open_again(object, false, 0).and_then(|file| fence.is_held(&file)).unwrap_or(false);
            if fenced {
                return Attempt::Fenced;
            }
            let why = format!("is in use: {}; a disk needs the device alone", device.users());
            refuse(path, OpenErrorKind::Busy, why)
        }
        (Some(libc::EACCES | libc::EPERM | libc::EROFS), _) if !options.read_only => refuse(
            path,
            OpenErrorKind::Permission,
            format!(
                "open for writing: {error}; check owner, mode, attributes (lsattr) and whether {} is \
                mounted read-only, or attach it with --read-only",
                object.mount.point.display()
            ),
        ),
        _ => OpenError::from_io(path, "open for I/O", &error).into(),
    })
}

fn open_again(object: &Object, write: bool, flags: i32) -> io::Result<File> {
    OpenOptions::new().read(true).write(write).custom_flags(flags).open(object.reopen_path())
}

fn no_direct_io(object: &Object) -> Attempt {
    refuse(
        &object.path,
        OpenErrorKind::Unsupported,
        format!(
            "{} ({}) does not take direct I/O (O_DIRECT) on this file; attach it with ?cache=writeback, \
            which goes through the page cache and still makes flushes durable, or move the image to \
            another file system",
            object.mount.point.display(),
            object.mount.fs_type
        ),
    )
}

/// Waits for nobody: `Fenced` while a predecessor's operations are out, else the locks or who stands against
/// them.
fn take_locks(object: &Object, file: &File, options: &ImageOptions, fence: Fence) -> Result<(), Attempt> {
    let path = object.path.as_path();
    let failed = |error: io::Error| {
        let why = format!(
            "its file system ({} on {}) does not take locks: {error}; without them two programs could \
            write one image: mount it with locks (NFS: start the lock service)",
            object.mount.fs_type,
            object.mount.point.display()
        );
        refuse(path, OpenErrorKind::Unsupported, why)
    };
    if fence.is_held(file).map_err(failed)? {
        return Err(Attempt::Fenced);
    }
    let conflict = locks::take(file, options.access()).map_err(failed)?;
    if let Some(conflict) = conflict {
        let name = holders::name_in_own_lock(file.as_raw_fd())
            .unwrap_or_else(|| holders::name_from_stat(&object.stat));
        let holder = holders::find(&name, conflict.byte);
        let advice = if options.read_only {
            "stop it first"
        } else {
            "stop it first; if it only reads, --read-only may do"
        };
        let why =
            format!("is in use: {} {}; {advice}", holders::name(holder.as_ref()), conflict.what_they_do());
        return Err(refuse(path, OpenErrorKind::Busy, why));
    }
    fence.hold(file).map_err(failed)
}

/// Why the fence did not open before the deadline: names the process if one is alive.
pub fn still_fenced(object: &Object, fence: Fence, waited_ms: u128) -> OpenError {
    let holder = holders::find(&holders::name_from_stat(&object.stat), fence.byte());
    let who = match holder {
        Some(holder) => format!(
            "{holder} still has it: another blktapd with the same run directory, or one that ends and has \
             operations under way; stop it, or wait until the store has answered them"
        ),
        None => "kernel operations of a former blktapd are still under way on it; it is free when its store \
                 has answered them"
            .to_owned(),
    };
    let message = format!("{}: after {waited_ms} ms {who}", object.path.display());
    OpenError::new(OpenErrorKind::Timeout, message)
}

fn measure(path: &Path, file: &mut File, is_device: bool) -> Result<u64, OpenError> {
    // The end of a device is its size (BLKGETSIZE64 says the same); fstat says 0 there.
    let length = if is_device { file.seek(SeekFrom::End(0)) } else { file.metadata().map(|meta| meta.len()) };
    let length = length.map_err(|error| OpenError::from_io(path, "ask for its size", &error))?;
    let what = if is_device { "the device has no medium, or no size" } else { "the file is empty" };
    if length == 0 {
        let message =
            format!("{}: {what}; a disk needs at least one byte: give it a size first", path.display());
        return Err(OpenError::new(OpenErrorKind::Invalid, message));
    }
    if length > i64::MAX as u64 - SECTOR {
        let message = format!("{}: {length} bytes are more than the kernel can address", path.display());
        return Err(OpenError::new(OpenErrorKind::Invalid, message));
    }
    Ok(length)
}

/// Units of direct I/O: offsets and lengths, then memory.
fn direct_alignment(
    object: &Object,
    file: &File,
    length: u64,
    device: Option<&Device>,
) -> Result<(u32, u32), Attempt> {
    let path = object.path.as_path();
    let (offset, memory) = match (direct_units(file), device) {
        // The kernel knows this file and says no (encrypted, data journalled).
        (Some((0, _)), _) => return Err(no_direct_io(object)),
        (Some(answer), _) => answer,
        (None, Some(device)) => {
            let block = rustix::fs::ioctl_blksszget(file).ok().or_else(|| device.logical_block_bytes());
            let block = block.ok_or_else(|| {
                refuse(path, OpenErrorKind::Unsupported, "the device does not tell its logical block size")
            })?;
            (block, block)
        }
        (None, None) => probe_alignment(file, length).ok_or_else(|| no_direct_io(object))?,
    };
    let valid = |unit: u32| unit.is_power_of_two() && unit <= ALIGN_MAX;
    if !valid(offset) || !valid(memory.max(1)) {
        let why = format!(
            "direct I/O needs units of {offset} bytes in memory aligned to {memory}; at most {ALIGN_MAX} \
            is supported: attach it with ?cache=writeback"
        );
        return Err(refuse(path, OpenErrorKind::Unsupported, why));
    }
    // Finer than a sector is never asked for; coarser than the answer is never needed.
    Ok((offset.max(512), memory.max(1)))
}

/// Units of direct I/O as the kernel tells them: offsets, then memory; zeroes when this file takes none.
pub(crate) fn direct_units(file: &File) -> Option<(u32, u32)> {
    let stat = rustix::fs::statx(file, c"", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN).ok()?;
    let told = stat.stx_mask & StatxFlags::DIOALIGN.bits() != 0;
    told.then_some((stat.stx_dio_offset_align, stat.stx_dio_mem_align))
}

/// Where the kernel does not tell (tmpfs, some network file systems): the finest unit in which a read is not
/// refused. Only reads, and only inside the file, since a read behind its end may return before it is
/// checked.
pub(crate) fn probe_alignment(file: &File, length: u64) -> Option<(u32, u32)> {
    [512_u32, 4096].into_iter().find_map(|unit| {
        if length < 2 * u64::from(unit) {
            // Too short to ask. Whatever takes 512 takes 4096; the rest goes through the buffered descriptor.
            return (unit == 4096).then_some((unit, unit));
        }
        let size = unit as usize;
        let mut buffer = vec![0_u8; 4 * ALIGN_MAX as usize];
        // Aligned to `unit` and to nothing coarser.
        let start = buffer.as_ptr().align_offset(2 * ALIGN_MAX as usize) + size;
        let target = buffer.get_mut(start..start + size)?;
        file.read_at(target, u64::from(unit)).ok().map(|_| (unit, unit))
    })
}

/// The buffered descriptor for the bytes behind the last whole unit of direct I/O.
/// Whether the kernel's direct I/O on this file system may block its caller: true unless it is known not to.
pub(crate) fn punts_direct_io(file: &File) -> bool {
    use nix::sys::statfs::{EXT4_SUPER_MAGIC, XFS_SUPER_MAGIC, fstatfs};
    match fstatfs(file) {
        Ok(stat) => !matches!(stat.filesystem_type(), EXT4_SUPER_MAGIC | XFS_SUPER_MAGIC),
        Err(_) => true,
    }
}

fn open_tail(object: &Object, options: &ImageOptions, fence: Fence) -> Result<OwnedFd, OpenError> {
    let tail = open_again(object, !options.read_only, 0)
        .map_err(|error| OpenError::from_io(&object.path, "open its last bytes", &error))?;
    fence.hold(&tail).map_err(|error| OpenError::from_io(&object.path, "lock its last bytes", &error))?;
    Ok(tail.into())
}

/// Bytes that the file takes in its store: fstat's blocks; a device takes its size.
pub fn allocated_bytes(path: &Path, image: &ImageFile) -> Result<u64, OpenError> {
    match image.kind {
        FileKind::Block { .. } => current_length(path, image),
        FileKind::Regular => {
            let stat = fstat(&image.fd).map_err(|errno| OpenError::from_io(path, "fstat", &errno.into()))?;
            // st_blocks counts 512 bytes whatever the block size is (stat(2)).
            Ok(u64::try_from(stat.st_blocks).unwrap_or(0) * 512)
        }
    }
}

/// When a regular file was made (seconds and nanoseconds since 1970), where its file system knows: a file that has got the inode of a
/// deleted one is told from that by it. `None` for devices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Born(pub Option<(i64, u32)>);

/// See [`Born`].
pub fn born(path: &Path, image: &ImageFile) -> Result<Born, OpenError> {
    let found = rustix::fs::statx(&image.fd, c"", AtFlags::EMPTY_PATH, StatxFlags::BTIME)
        .map_err(|errno| OpenError::from_io(path, "statx", &errno.into()))?;
    let is_known = matches!(image.kind, FileKind::Regular) && found.stx_mask & StatxFlags::BTIME.bits() != 0;
    Ok(Born(is_known.then_some((found.stx_btime.tv_sec, found.stx_btime.tv_nsec))))
}

/// The length in bytes now: of a file or device that somebody has resized since it was opened.
pub fn current_length(path: &Path, image: &ImageFile) -> Result<u64, OpenError> {
    let length = match image.kind {
        FileKind::Regular => {
            fstat(&image.fd).map(|stat| u64::try_from(stat.st_size).unwrap_or(0)).map_err(io::Error::from)
        }
        // I/O is positioned, so the description's own offset is nobody's.
        FileKind::Block { .. } => {
            rustix::fs::seek(image.fd.as_fd(), rustix::fs::SeekFrom::End(0)).map_err(io::Error::from)
        }
    };
    length.map_err(|error| OpenError::from_io(path, "ask for its size", &error))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(file: &File, kind: FileKind) -> ImageFile {
        ImageFile {
            fd: file.try_clone().expect("duplicates").into(),
            tail: None,
            offset_align: 1,
            memory_align: 1,
            cache: CacheMode::Writeback,
            kind,
            length: 0,
            length_now: 0.into(),
            punts: false,
            store: 0,
        }
    }

    /// Goal: a file that takes the place of another one is told from it, and use changes nothing. Method: two files, one written.
    #[test]
    fn another_file_was_born_at_another_time() {
        let dir = tempfile::tempdir().expect("directory");
        let make = |name: &str| File::create(dir.path().join(name)).expect("create");
        let of = |file: &File, kind| born(dir.path(), &image(file, kind)).expect("statx");
        let one = make("one");
        let first = of(&one, FileKind::Regular);
        assert_eq!(of(&one, FileKind::Block { discard: false }), Born(None));
        if first == Born(None) {
            println!("skipped: this file system does not know when a file was made");
            return;
        }
        one.set_len(4096).expect("set_len");
        assert_eq!(of(&one, FileKind::Regular), first, "use does not change it");
        // More than the grain of the kernel's clock.
        std::thread::sleep(std::time::Duration::from_millis(20));
        assert_ne!(of(&make("two"), FileKind::Regular), first);
    }
}
