//! Locks that other programs respect: QEMU's byte protocol with open-file-description (OFD) locks, and the
//! fence after a crash.
//!
//! Protocol (QEMU `docs/system/qemu-block-drivers.rst.inc`, "Disk image file locking", and what its tools are
//! seen to hold): permission `p` is in use while somebody holds a *read* lock on byte `100+p`, and is not
//! shared while somebody holds one on byte `200+p`. Read locks never exclude each other; each party takes its
//! own and then asks, with F_OFD_GETLK for a write lock, whether anybody holds the opposite byte of one of
//! them.
//!
//! | p | permission | reader | writer |
//! |---|---|---|---|
//! | 0 | consistent read | uses | uses |
//! | 1 | write | does not share | uses, does not share |
//! | 2 | write unchanged bytes | - | - |
//! | 3 | resize | does not share | uses, does not share |
//!
//! The locks belong to the open file description. When the process dies, the kernel drops it, and with it the
//! locks, only after the last operation in flight has ended. That is what the **fence** is: one more
//! read-locked byte, numbered from the identity of RUN_DIR, that only the daemon holds. A successor waits
//! until nobody holds it, since writes of its predecessor may land until then.
//!
//! Invariant: locks go with their descriptor; the one that is given back before is a writer's, when it becomes a reader
//! ([`become_reader`]).

use std::io;
use std::os::fd::AsFd;
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::stat::stat;

/// Byte of permission 0 "is used".
const USES: i64 = 100;
/// Byte of permission 0 "is not shared".
const KEEPS: i64 = 200;
const CONSISTENT_READ: i64 = 0;
const WRITE: i64 = 1;
const RESIZE: i64 = 3;

/// Above every offset that a file can have data at, or that another program is known to lock.
const FENCE_BASE: i64 = 1 << 62;

/// The byte by which a daemon knows its predecessor's kernel operations.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fence {
    byte: i64,
}

impl Fence {
    /// The fence of the daemon whose RUN_DIR this is. The number must be the same in every later release of
    /// the program.
    pub fn of_run_dir(run_dir: &Path) -> io::Result<Fence> {
        let stat = stat(run_dir)?;
        // Two directories of one host must not share a byte: mix device and inode well (splitmix64's
        // finaliser), keep 61 bits.
        let mut mixed = stat.st_ino ^ stat.st_dev.rotate_left(32);
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^= mixed >> 31;
        Ok(Fence { byte: FENCE_BASE + (mixed >> 3) as i64 })
    }

    /// Offset of the byte.
    pub fn byte(&self) -> i64 {
        self.byte
    }

    /// True when another description holds the fence: operations of a predecessor are under way (or a second
    /// daemon runs on one RUN_DIR).
    pub fn is_held(&self, fd: impl AsFd) -> io::Result<bool> {
        somebody_holds(fd, self.byte)
    }

    /// Holds the fence on this description for as long as it is open.
    pub fn hold(&self, fd: impl AsFd) -> io::Result<()> {
        hold(fd, self.byte)
    }
}

/// What a user of an image does with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Reads only; others may read as well.
    Read,
    /// Reads and writes; nobody else may write, and nobody who wants the bytes unchanged may read.
    Write,
}

impl Access {
    fn used(self) -> &'static [i64] {
        match self {
            Access::Read => &[CONSISTENT_READ],
            // Resize: the last sector of a file may be partial, and a write to it lengthens the file.
            Access::Write => &[CONSISTENT_READ, WRITE, RESIZE],
        }
    }

    fn kept(self) -> &'static [i64] {
        &[WRITE, RESIZE]
    }

    /// The bytes that are read-locked.
    fn held_bytes(self) -> impl Iterator<Item = i64> {
        let used = self.used().iter().map(|permission| USES + permission);
        used.chain(self.kept().iter().map(|permission| KEEPS + permission))
    }

    /// The bytes that nobody else may hold.
    fn opposite_bytes(self) -> impl Iterator<Item = i64> {
        // What others use is tested first: "it is open for writing" says more than "it does not share".
        let kept = self.kept().iter().map(|permission| USES + permission);
        kept.chain(self.used().iter().map(|permission| KEEPS + permission))
    }
}

/// A byte that somebody else holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Conflict {
    /// Its offset.
    pub byte: i64,
}

impl Conflict {
    /// What the other party does, to be put behind its name.
    pub fn what_they_do(&self) -> &'static str {
        match self.byte {
            b if b == USES + WRITE => "has it open for writing",
            b if b == USES + RESIZE => "may change its length",
            b if b == KEEPS + WRITE => "has it open and allows nobody to write",
            b if b == KEEPS + RESIZE => "has it open and allows nobody to change its length",
            _ => "has it open and wants it for itself",
        }
    }
}

/// Takes the locks for `access` on the description and asks whether somebody else's stand against them.
///
/// `Ok(Some)` is a conflict: close the descriptor to let go of what was taken. Errors: what fcntl answered,
/// ENOLCK where the file system has no locks.
pub fn take(fd: impl AsFd, access: Access) -> io::Result<Option<Conflict>> {
    for byte in access.held_bytes() {
        match hold(&fd, byte) {
            Ok(()) => {}
            // Somebody has a write lock there: another protocol, but a lock.
            Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => {
                return Ok(Some(Conflict { byte }));
            }
            Err(error) => return Err(error),
        }
    }
    for byte in access.opposite_bytes() {
        if somebody_holds(&fd, byte)? {
            return Ok(Some(Conflict { byte }));
        }
    }
    Ok(None)
}

/// A writer becomes a reader: others may read the file, and nobody can write it.
pub fn become_reader(fd: impl AsFd) -> io::Result<()> {
    for byte in Access::Write.held_bytes() {
        if !Access::Read.held_bytes().any(|kept| kept == byte) {
            let lock = byte_lock(libc::F_UNLCK, byte);
            fcntl(fd.as_fd(), FcntlArg::F_OFD_SETLK(&lock)).map_err(io::Error::from)?;
        }
    }
    Ok(())
}

fn hold(fd: impl AsFd, byte: i64) -> io::Result<()> {
    let lock = byte_lock(libc::F_RDLCK, byte);
    fcntl(fd.as_fd(), FcntlArg::F_OFD_SETLK(&lock)).map(drop).map_err(io::Error::from)
}

fn somebody_holds(fd: impl AsFd, byte: i64) -> io::Result<bool> {
    let mut lock = byte_lock(libc::F_WRLCK, byte);
    loop {
        match fcntl(fd.as_fd(), FcntlArg::F_OFD_GETLK(&mut lock)) {
            Ok(_) => return Ok(i32::from(lock.l_type) != libc::F_UNLCK),
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

fn byte_lock(kind: i32, byte: i64) -> libc::flock {
    // The kernel wants pid 0 for OFD locks.
    libc::flock { l_type: kind as i16, l_whence: libc::SEEK_SET as i16, l_start: byte, l_len: 1, l_pid: 0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;

    fn open_twice() -> (tempfile::TempDir, File, File) {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join("image");
        File::create(&path).expect("create");
        let open = || File::options().read(true).write(true).open(&path).expect("open");
        let (one, two) = (open(), open());
        (dir, one, two)
    }

    /// Goal: readers share, a writer excludes everybody, and locks go with the descriptor.
    /// Method: all pairs on two descriptions of one file.
    #[test]
    fn readers_share_and_writers_exclude() {
        for (first, second, byte) in [
            (Access::Read, Access::Read, None),
            (Access::Read, Access::Write, Some(KEEPS + WRITE)),
            (Access::Write, Access::Read, Some(USES + WRITE)),
            (Access::Write, Access::Write, Some(USES + WRITE)),
        ] {
            let (_dir, one, two) = open_twice();
            assert_eq!(take(&one, first).expect("locks work"), None);
            let found = take(&two, second).expect("locks work").map(|conflict| conflict.byte);
            assert_eq!(found, byte, "{first:?} then {second:?}");
            drop(one);
            assert_eq!(take(&two, second).expect("locks work"), None, "free after close");
        }
    }

    /// Goal: the fence is seen by others and not by its holder, and says nothing to QEMU's protocol.
    /// Method: two descriptions of one file.
    #[test]
    fn fence_is_a_byte_of_its_own() {
        let (dir, one, two) = open_twice();
        let fence = Fence::of_run_dir(dir.path()).expect("stat");
        fence.hold(&one).expect("locks work");
        assert!(!fence.is_held(&one).expect("locks work"));
        assert!(fence.is_held(&two).expect("locks work"));
        assert_eq!(take(&two, Access::Write).expect("locks work"), None);
        drop(one);
        assert!(!fence.is_held(&two).expect("locks work"));
    }

    /// Goal: the fence's number depends on the directory alone and leaves room for a lock of one byte.
    /// Method: two directories, asked twice.
    #[test]
    fn fence_number_follows_the_directory() {
        let (one, two) = (tempfile::tempdir().expect("dir"), tempfile::tempdir().expect("dir"));
        let byte = |dir: &tempfile::TempDir| Fence::of_run_dir(dir.path()).expect("stat").byte();
        assert_eq!(byte(&one), byte(&one));
        assert_ne!(byte(&one), byte(&two));
        assert!((FENCE_BASE..i64::MAX).contains(&byte(&one)));
        assert!(Fence::of_run_dir(&one.path().join("none")).is_err());
    }
}
