//! Where the files of RAM disks are.
//!
//! An operator's choice has to be right. Else they are on the first tmpfs of: RUN_DIR/ram, and a directory of this RUN_DIR in
//! /dev/shm (RUN_DIR is a tmpfs wherever systemd is, and an ordinary directory in many containers). Both outlive the process and
//! not the host. /dev/shm is everybody's: a directory there is used only if it is ours and closed to others, and only for disks
//! that fit it (containers often have 64 MiB). Without a tmpfs a RAM disk ends with the daemon, which the disk then says.

use std::fs::{DirBuilder, File};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::sys::statfs::{TMPFS_MAGIC, fstatfs};

use crate::problem::Problem;

/// Shared memory of the host.
const SHM: &str = "/dev/shm";

/// Where the files of RAM disks are. All functions block.
#[derive(Debug, Clone)]
pub struct RamDir {
    given: Option<PathBuf>,
    in_run_dir: PathBuf,
    in_shm: PathBuf,
}

impl RamDir {
    /// `given` is what an operator chose.
    pub fn new(given: Option<PathBuf>, run_dir: &Path) -> RamDir {
        RamDir::with_shm(given, run_dir, Path::new(SHM))
    }

    fn with_shm(given: Option<PathBuf>, run_dir: &Path, shm: &Path) -> RamDir {
        // One name for each run directory: %2D is a `-` of its own path, `-` a `/`.
        let name = run_dir.to_string_lossy().replace('%', "%25").replace('-', "%2D").replace('/', "-");
        RamDir { given, in_run_dir: run_dir.join("ram"), in_shm: shm.join(format!("blktapd{name}")) }
    }

    /// An operator chose it: it has to be right.
    pub fn is_given(&self) -> bool {
        self.given.is_some()
    }

    /// The directory in /dev/shm that belongs to this RUN_DIR, whether or not it is there.
    pub fn in_shm(&self) -> &Path {
        &self.in_shm
    }

    /// The directory for a disk of `size_bytes`, which is made when it is missing, and open.
    pub fn open(&self, size_bytes: u64) -> Result<(PathBuf, File), Problem> {
        let first = self.given.as_ref().unwrap_or(&self.in_run_dir);
        let made = DirBuilder::new().recursive(true).mode(0o700).create(first);
        let opened = made.and_then(|()| File::open(first)).map_err(|error| {
            Problem::failed(format!(
                "the RAM directory {} cannot be made or opened: {error}; name another with --ram-dir",
                first.display()
            ))
        });
        if self.is_given() || opened.as_ref().is_ok_and(|dir| tmpfs_bytes(dir).is_some()) {
            return opened.map(|dir| (first.clone(), dir));
        }
        match self.open_in_shm() {
            Some(dir) if tmpfs_bytes(&dir).is_some_and(|bytes| bytes >= size_bytes) => {
                Ok((self.in_shm.clone(), dir))
            }
            _ => {
                self.tidy();
                opened.map(|dir| (first.clone(), dir))
            }
        }
    }

    /// Every directory where a file of a disk can be, open.
    pub fn existing(&self) -> Vec<File> {
        let dirs = match &self.given {
            Some(given) => vec![given],
            None => vec![&self.in_run_dir, &self.in_shm],
        };
        dirs.into_iter().filter_map(|dir| File::open(dir).ok()).collect()
    }

    /// Removes the directory in /dev/shm if nothing is in it.
    pub fn tidy(&self) {
        if !self.is_given() {
            // Not there, not empty or not ours: it stays.
            let _ = std::fs::remove_dir(&self.in_shm);
        }
    }

    fn open_in_shm(&self) -> Option<File> {
        // Nothing is made where it would not be memory.
        tmpfs_bytes(&File::open(self.in_shm.parent()?).ok()?)?;
        if DirBuilder::new().mode(0o700).create(&self.in_shm).is_err() {
            let found = std::fs::symlink_metadata(&self.in_shm).ok()?;
            let ours = found.is_dir() && found.uid() == nix::unistd::geteuid().as_raw();
            if !ours || found.permissions().mode() & 0o077 != 0 {
                tracing::warn!(
                    "{} is not a directory that only this user may use: RAM disks are not kept there",
                    self.in_shm.display()
                );
                return None;
            }
        }
        File::open(&self.in_shm).ok()
    }
}

/// The size of the tmpfs that a directory is on; `None` on other file systems.
fn tmpfs_bytes(dir: &File) -> Option<u64> {
    let found = fstatfs(dir).ok().filter(|found| found.filesystem_type() == TMPFS_MAGIC)?;
    // A tmpfs without a limit says 0.
    match found.blocks() * found.block_size() as u64 {
        0 => Some(u64::MAX),
        bytes => Some(bytes),
    }
}

#[cfg(test)]
mod tests {
    //! Goal: RAM disks are on a tmpfs where there is one, apart for each run directory, and never in somebody else's directory.
    //! Method: directories on /dev/shm stand for one or the other, where it is a tmpfs and the temporary directory is none.

    use super::*;

    /// A directory on tmpfs and one that is not, where this host has both.
    fn both() -> Option<(tempfile::TempDir, tempfile::TempDir)> {
        let (memory, disk) = (tempfile::tempdir_in(SHM).ok()?, tempfile::tempdir().ok()?);
        let is_tmpfs = |dir: &tempfile::TempDir| tmpfs_bytes(&File::open(dir.path()).unwrap()).is_some();
        let usable = is_tmpfs(&memory) && !is_tmpfs(&disk);
        if !usable {
            println!("skipped: no tmpfs at {SHM}, or the temporary directory is one");
        }
        usable.then_some((memory, disk))
    }

    #[test]
    fn the_first_tmpfs_is_taken() {
        let Some((memory, disk)) = both() else { return };
        let (shm, run) = (memory.path(), disk.path().join("run"));
        let of = |given: Option<&Path>, run: &Path, shm: &Path, bytes| {
            RamDir::with_shm(given.map(Path::to_owned), run, shm).open(bytes).unwrap().0
        };
        let in_shm = RamDir::with_shm(None, &run, shm).in_shm;
        assert_eq!(of(None, &run, shm, 1 << 20), in_shm);
        assert_eq!(std::fs::metadata(&in_shm).unwrap().permissions().mode() & 0o777, 0o700);
        assert_eq!(of(None, &run, shm, 1 << 20), in_shm, "again");
        assert_eq!(of(None, &run, shm, 1 << 60), run.join("ram"), "what cannot fit is not promised");
        assert!(!in_shm.exists(), "and leaves nothing");
        assert_eq!(of(None, &shm.join("run"), shm, 1 << 20), shm.join("run/ram"), "RUN_DIR is a tmpfs");
        assert_eq!(of(None, &run, disk.path(), 1 << 20), run.join("ram"), "no tmpfs at all");
        let given = disk.path().join("given");
        assert_eq!(of(Some(&given), &run, shm, 1 << 20), given, "as the operator says");
        let other = RamDir::with_shm(None, Path::new("/run/a-b"), shm).in_shm;
        assert_ne!(other, RamDir::with_shm(None, Path::new("/run/a/b"), shm).in_shm);
    }

    #[test]
    fn a_directory_that_others_may_use_is_not_taken() {
        let Some((memory, disk)) = both() else { return };
        let dir = RamDir::with_shm(None, &disk.path().join("run"), memory.path());
        std::os::unix::fs::symlink(disk.path(), &dir.in_shm).unwrap();
        assert_eq!(dir.open(4096).unwrap().0, dir.in_run_dir, "a link");
        std::fs::remove_file(&dir.in_shm).unwrap();
        std::fs::create_dir(&dir.in_shm).unwrap();
        std::fs::set_permissions(&dir.in_shm, PermissionsExt::from_mode(0o777)).unwrap();
        assert_eq!(dir.open(4096).unwrap().0, dir.in_run_dir, "open to others");
    }
}
