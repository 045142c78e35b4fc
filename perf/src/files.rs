//! Image files for the benches: every block is allocated *and written*, so that no row pays for the conversion of unwritten
//! extents, and the bytes are not compressible, so that no device has it easy. They live in a temporary directory.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use nix::fcntl::{FallocateFlags, OFlag, PosixFadviseAdvice, fallocate, posix_fadvise};
use tempfile::TempDir;

use crate::stop;

const CHUNK: usize = 4 << 20;

/// A directory for image files, removed when dropped.
#[derive(Debug)]
pub struct ImageDir {
    dir: TempDir,
}

impl ImageDir {
    /// Makes a directory in `parent` and checks that O_DIRECT and enough room are there.
    pub fn new(parent: &Path, need_bytes: u64) -> Result<Self> {
        let dir = tempfile::Builder::new()
            .prefix("blktapd-perf-")
            .tempdir_in(parent)
            .with_context(|| format!("cannot create a directory in {} (see --dir)", parent.display()))?;
        let probe = dir.path().join("probe");
        File::create(&probe)?;
        let direct = OpenOptions::new().read(true).custom_flags(OFlag::O_DIRECT.bits()).open(&probe);
        let stats = nix::sys::statfs::statfs(dir.path())?;
        let on_memory = stats.filesystem_type() == nix::sys::statfs::TMPFS_MAGIC;
        if direct.is_err() || on_memory {
            bail!(
                "{} does not do direct I/O to a disk, which the raw cases measure: choose a directory on a disk with --dir",
                parent.display()
            );
        }
        std::fs::remove_file(&probe)?;
        let free = stats.blocks_available() * stats.block_size() as u64;
        if free < need_bytes {
            bail!(
                "{} has {free} bytes free, {need_bytes} are needed (see --dir, --size-mib)",
                parent.display()
            );
        }
        Ok(Self { dir })
    }

    /// A file of `bytes`, written and on the disk.
    pub fn file(&self, name: &str, bytes: u64) -> Result<PathBuf> {
        let path = self.dir.path().join(name);
        write_file(&path, bytes).with_context(|| format!("cannot prepare {}", path.display()))?;
        Ok(path)
    }

    /// The path of a file that somebody else makes.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// `count` files in a directory of their own.
    pub fn files(&self, name: &str, count: usize, bytes: u64) -> Result<Vec<PathBuf>> {
        let dir = self.dir.path().join(name);
        std::fs::create_dir(&dir)?;
        (0..count)
            .map(|index| {
                stop::check()?;
                let path = dir.join(format!("d{index}"));
                write_file(&path, bytes).with_context(|| format!("cannot prepare {}", path.display()))?;
                Ok(path)
            })
            .collect()
    }
}

fn write_file(path: &Path, bytes: u64) -> Result<()> {
    let mut file = OpenOptions::new().write(true).create_new(true).open(path)?;
    fallocate(&file, FallocateFlags::empty(), 0, bytes as i64)?;
    let mut chunk = vec![0u8; CHUNK.min(bytes as usize)];
    let mut state = 0x243f_6a88_85a3_08d3u64;
    for word in chunk.chunks_mut(8) {
        // xorshift64 (Marsaglia 2003): cheap bytes that do not compress.
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        word.copy_from_slice(&state.to_le_bytes()[..word.len()]);
    }
    let mut left = bytes as usize;
    while left > 0 {
        stop::check()?;
        let part = left.min(chunk.len());
        file.write_all(&chunk[..part])?;
        left -= part;
    }
    flush(path)
}

/// Brings a file to the disk and out of the page cache: what one server left dirty must not be written during the next row,
/// and cached pages must not serve the one server that has no direct I/O.
pub fn flush(path: &Path) -> Result<()> {
    let file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    file.sync_all()?;
    posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    // Goal: a prepared file has its whole size on the disk and does not survive its directory. Method: 1 MiB + 512 bytes.
    #[test]
    fn files_are_allocated_and_removed() {
        let parent = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let dir = match ImageDir::new(parent.path(), 1 << 20) {
            Ok(dir) => dir,
            Err(reason) => return eprintln!("skipped: {reason}"),
        };
        let path = dir.file("a", (1 << 20) + 512).unwrap();
        let meta = std::fs::metadata(&path).unwrap();
        assert_eq!(meta.len(), (1 << 20) + 512);
        assert!(meta.blocks() * 512 >= meta.len());
        drop(dir);
        assert!(!path.exists());
        let error = ImageDir::new(parent.path(), u64::MAX).unwrap_err();
        assert!(error.to_string().contains("--dir"), "{error}");
    }
}
