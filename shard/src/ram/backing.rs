//! The files that RAM disks are made of. Everything here runs on the control side.
//!
//! A disk NAME is the file `NAME.ram` in the RAM directory (tmpfs, or hugetlbfs for huge pages). It is made as `NAME.new` and gets
//! its name when its first contents are complete ([`publish_backing`]), so a file that is found under the final name after a
//! restart is whole, and is taken up as it is. Which parts of it have memory is found by asking the file.
//!
//! A file carries an OFD write lock while a server has it open, mode 0600, and our user as its owner: nobody else changes its
//! size or its holes under the mapping.

use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, FcntlArg, OFlag, fallocate, fcntl, openat, renameat};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::stat::{Mode, fstat};
use nix::sys::statfs::{HUGETLBFS_MAGIC, TMPFS_MAGIC, fstatfs};
use nix::sys::uio::pread;
use nix::unistd::{UnlinkatFlags, Whence, ftruncate, geteuid, lseek, unlinkat};

use super::{PageSize, RamError, RamErrorKind};

/// Longest name, so that the file's name fits any file system.
const NAME_BYTES_MAX: usize = 200;
/// Sizes above this overflow file offsets or address spaces.
const SIZE_BYTES_MAX: u64 = 1 << 46;
/// Where the kernel tells how many huge pages it has.
const HUGE_POOL: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";

/// A file for a RAM disk.
#[derive(Debug)]
pub struct Backing {
    /// For [`super::RamDisk::create`].
    pub file: OwnedFd,
    /// It existed with its contents. Otherwise it is new and empty: load the initial contents, if any, then call
    /// [`publish_backing`].
    pub taken_up: bool,
}

/// Opens the file of the RAM disk `name` in the directory `dir`, or makes a new one of `size_bytes`.
///
/// # Errors
/// `Invalid` (name, size), `WrongFileSystem`, `Mismatch` (it exists with another size or owner), `Busy` (in use),
/// `NoHugePages`, `Io`.
pub fn open_backing(
    dir: BorrowedFd<'_>,
    name: &str,
    size_bytes: u64,
    page: PageSize,
) -> Result<Backing, RamError> {
    check_name(name)?;
    check_size(name, size_bytes, page)?;
    check_file_system(dir, name, page)?;
    let flags = OFlag::O_RDWR | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW;
    match openat(dir, final_name(name).as_str(), flags, Mode::empty()) {
        Ok(file) => {
            lock(&file, name)?;
            check_owner(&file, name)?;
            check_file(&file, name, size_bytes, page)?;
            return Ok(Backing { file, taken_up: true });
        }
        Err(Errno::ENOENT) => {}
        Err(errno) => return Err(io_error(name, "cannot open its file", errno)),
    }
    check_huge_pool(name, page)?;
    let file = openat(dir, new_name(name).as_str(), flags | OFlag::O_CREAT, Mode::S_IRUSR | Mode::S_IWUSR)
        .map_err(|errno| io_error(name, "cannot create its file", errno))?;
    lock(&file, name)?;
    check_owner(&file, name)?;
    // What an attempt that did not end left behind goes first.
    set_length(&file, name, 0)?;
    set_length(&file, name, size_bytes)?;
    Ok(Backing { file, taken_up: false })
}

/// Gives a new file its final name: from now on a restart takes it up.
///
/// # Errors
/// `Io`.
pub fn publish_backing(dir: BorrowedFd<'_>, name: &str) -> Result<(), RamError> {
    check_name(name)?;
    renameat(dir, new_name(name).as_str(), dir, final_name(name).as_str())
        .map_err(|errno| io_error(name, "cannot rename its new file", errno))
}

/// Removes the file of a RAM disk, new or published; its memory is free when the last [`super::RamDisk`] on it is dropped. No
/// file is no error.
///
/// # Errors
/// `Io`.
pub fn remove_backing(dir: BorrowedFd<'_>, name: &str) -> Result<(), RamError> {
    check_name(name)?;
    for file in [new_name(name), final_name(name)] {
        match unlinkat(dir, file.as_str(), UnlinkatFlags::NoRemoveDir) {
            Ok(()) | Err(Errno::ENOENT) => {}
            Err(errno) => return Err(io_error(name, "cannot remove its file", errno)),
        }
    }
    Ok(())
}

/// A file without a name, for a disk that ends with the process (no RAM directory).
///
/// # Errors
/// `Invalid` (name, size), `NoHugePages`, `Io`.
pub fn anonymous_backing(name: &str, size_bytes: u64, page: PageSize) -> Result<OwnedFd, RamError> {
    check_name(name)?;
    check_size(name, size_bytes, page)?;
    check_huge_pool(name, page)?;
    let flags = match page {
        PageSize::Base => MFdFlags::MFD_CLOEXEC,
        PageSize::Huge2M => MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_HUGETLB | MFdFlags::MFD_HUGE_2MB,
    };
    let file = memfd_create(name, flags).map_err(|errno| io_error(name, "cannot create a memfd", errno))?;
    set_length(&file, name, size_bytes)?;
    Ok(file)
}

/// Refuses sizes that no RAM disk can have.
pub(super) fn check_size(name: &str, size_bytes: u64, page: PageSize) -> Result<(), RamError> {
    let (multiple, what) = match page {
        PageSize::Base => (512, "512"),
        PageSize::Huge2M => (PageSize::HUGE_BYTES, "2 MiB (2097152), the size of its huge pages"),
    };
    if size_bytes == 0 || size_bytes > SIZE_BYTES_MAX || !size_bytes.is_multiple_of(multiple) {
        return Err(invalid(format!(
            "RAM disk {name}: size {size_bytes} is not possible; give a multiple of {what}, from {multiple} to {SIZE_BYTES_MAX}"
        )));
    }
    Ok(())
}

/// Checks that an open file fits the disk; returns the bytes of its pages.
pub(super) fn check_file(
    file: &OwnedFd,
    name: &str,
    size_bytes: u64,
    page: PageSize,
) -> Result<u64, RamError> {
    let unit_bytes = check_file_system(file.as_fd(), name, page)?;
    let found = fstat(file).map_err(|errno| io_error(name, "cannot stat its file", errno))?.st_size as u64;
    if found != size_bytes {
        return Err(RamError::new(
            RamErrorKind::Mismatch,
            format!(
                "RAM disk {name} exists with {found} bytes, not {size_bytes}; attach it with size={found}, or remove its \
                 file to give up its contents"
            ),
        ));
    }
    Ok(unit_bytes)
}

/// Finds the parts of a file that have memory, and makes everything else a true hole.
///
/// tmpfs tells by SEEK_DATA, but takes a page that was allocated and never touched for a hole although it
/// uses memory; hugetlbfs cannot tell at all, and is read (its holes read as zeroes without being filled). In both cases what
/// holds no data is punched out, so that the file uses what is reported here and no more.
pub(super) fn find_memory(
    file: &OwnedFd,
    size_bytes: u64,
    page: PageSize,
    mut found: impl FnMut(Range<u64>),
) -> io::Result<()> {
    if fstat(file)?.st_blocks == 0 {
        return Ok(());
    }
    let mut at = 0;
    while at < size_bytes {
        let data = match page {
            PageSize::Base => next_data(file, at, size_bytes)?,
            PageSize::Huge2M => next_nonzero_page(file, at, size_bytes)?,
        };
        if data.start > at {
            let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
            fallocate(file, flags, at as i64, (data.start - at) as i64)?;
        }
        if !data.is_empty() {
            found(data.clone());
        }
        at = data.end;
    }
    Ok(())
}

/// The next range with data at or behind `at`; empty at the end of the file when there is none.
fn next_data(file: &OwnedFd, at: u64, size_bytes: u64) -> io::Result<Range<u64>> {
    match lseek(file, at as i64, Whence::SeekData) {
        Ok(start) => Ok(start as u64..lseek(file, start, Whence::SeekHole)? as u64),
        Err(Errno::ENXIO) => Ok(size_bytes..size_bytes),
        Err(errno) => Err(errno.into()),
    }
}

/// The next huge page at or behind `at` that is not all zeroes; empty at the end of the file when there is none.
fn next_nonzero_page(file: &OwnedFd, at: u64, size_bytes: u64) -> io::Result<Range<u64>> {
    let mut buffer = vec![0u8; 64 << 10];
    let mut offset = at;
    while offset < size_bytes {
        let read = pread(file, &mut buffer, offset as i64)?;
        if read == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if buffer[..read].iter().any(|&byte| byte != 0) {
            let start = offset / PageSize::HUGE_BYTES * PageSize::HUGE_BYTES;
            return Ok(start..start + PageSize::HUGE_BYTES);
        }
        offset += read as u64;
    }
    Ok(size_bytes..size_bytes)
}

fn final_name(name: &str) -> String {
    format!("{name}.ram")
}

fn new_name(name: &str) -> String {
    format!("{name}.new")
}

fn check_name(name: &str) -> Result<(), RamError> {
    if name.is_empty() || name.len() > NAME_BYTES_MAX || name.contains(['/', '\0']) {
        return Err(invalid(format!(
            "RAM disk name {name:?} is not possible; it needs 1 to {NAME_BYTES_MAX} bytes without a slash"
        )));
    }
    Ok(())
}

/// Checks that `file` (or a directory) is on the file system that pages of this size come from; returns their bytes.
fn check_file_system(file: BorrowedFd<'_>, name: &str, page: PageSize) -> Result<u64, RamError> {
    let system = fstatfs(file).map_err(|errno| io_error(name, "cannot stat its file system", errno))?;
    let page_bytes = system.block_size() as u64;
    let found = system.filesystem_type();
    let (fits, need) = match page {
        PageSize::Base => (found == TMPFS_MAGIC, "a directory on tmpfs"),
        PageSize::Huge2M => (
            found == HUGETLBFS_MAGIC && page_bytes == PageSize::HUGE_BYTES,
            "a directory on hugetlbfs of 2 MiB pages (mount -t hugetlbfs -o pagesize=2M none DIR)",
        ),
    };
    if !fits {
        let found = match found {
            TMPFS_MAGIC => "tmpfs".to_owned(),
            HUGETLBFS_MAGIC => format!("hugetlbfs with pages of {page_bytes} bytes"),
            other => format!("a file system of type {:#x}", other.0),
        };
        return Err(RamError::new(
            RamErrorKind::WrongFileSystem,
            format!("RAM disk {name}: the RAM directory is on {found}; this disk needs {need}"),
        ));
    }
    Ok(page_bytes)
}

fn check_owner(file: &OwnedFd, name: &str) -> Result<(), RamError> {
    let stat = fstat(file).map_err(|errno| io_error(name, "cannot stat its file", errno))?;
    let (uid, mode) = (stat.st_uid, stat.st_mode);
    if mode & libc::S_IFMT != libc::S_IFREG || mode & 0o077 != 0 || uid != geteuid().as_raw() {
        return Err(RamError::new(
            RamErrorKind::Mismatch,
            format!(
                "RAM disk {name}: its file has mode {mode:o} and owner {uid}; expected a regular file of mode 600 that this \
                 server made: remove it, or use a RAM directory of the server's own"
            ),
        ));
    }
    Ok(())
}

/// Refuses huge pages on a host that has none, where every write would fail.
fn check_huge_pool(name: &str, page: PageSize) -> Result<(), RamError> {
    if page == PageSize::Base {
        return Ok(());
    }
    let pages = |file: &str| -> Option<u64> {
        std::fs::read_to_string(format!("{HUGE_POOL}/{file}")).ok()?.trim().parse().ok()
    };
    let (reserved, overcommit) = (pages("nr_hugepages"), pages("nr_overcommit_hugepages"));
    if reserved.unwrap_or(0) + overcommit.unwrap_or(0) > 0 {
        return Ok(());
    }
    let found = if reserved.is_some() { "none are reserved" } else { "the kernel has no pages of that size" };
    Err(RamError::new(
        RamErrorKind::NoHugePages,
        format!(
            "RAM disk {name} wants huge pages of 2 MiB and {found}; reserve N of them by sysctl vm.nr_hugepages=N (2 MiB \
             each), or attach it without huge pages"
        ),
    ))
}

/// Takes the file for this process: an OFD lock goes when the last descriptor of this open is closed.
fn lock(file: &OwnedFd, name: &str) -> Result<(), RamError> {
    let whole = libc::flock {
        l_type: libc::F_WRLCK as i16,
        l_whence: libc::SEEK_SET as i16,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    match fcntl(file, FcntlArg::F_OFD_SETLK(&whole)) {
        Ok(_) => Ok(()),
        Err(Errno::EAGAIN | Errno::EACCES) => Err(RamError::new(
            RamErrorKind::Busy,
            format!(
                "RAM disk {name}: its file is in use, by another server or by a disk that is still being detached; wait \
                 for that, or give each server a RAM directory of its own"
            ),
        )),
        Err(errno) => Err(io_error(name, "cannot lock its file", errno)),
    }
}

fn set_length(file: &OwnedFd, name: &str, bytes: u64) -> Result<(), RamError> {
    ftruncate(file, bytes as i64).map_err(|errno| io_error(name, "cannot size its file", errno))
}

fn invalid(message: String) -> RamError {
    RamError::new(RamErrorKind::Invalid, message)
}

fn io_error(name: &str, what: &str, errno: Errno) -> RamError {
    let kind = match errno {
        Errno::ENOSPC | Errno::EDQUOT | Errno::ENOMEM => RamErrorKind::NoSpace,
        _ => RamErrorKind::Io,
    };
    RamError::new(kind, format!("RAM disk {name}: {what}: {errno}"))
}
