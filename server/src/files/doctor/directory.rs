//! What a directory for images can do, tried on a small file without a name.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::statvfs::fstatvfs;

use super::Check;
use crate::files::image::{direct_units, probe_alignment};
use crate::files::locks::{self, Access};
use crate::files::mounts::Mounts;

/// Bytes of the file that is written: one block of every file system.
const SAMPLE: usize = 64 << 10;

pub(super) fn checks(directory: &Path) -> Vec<Check> {
    let name = directory.display().to_string();
    let sample = match Sample::new(directory) {
        Ok(sample) => sample,
        Err(error) => {
            return vec![Check::missing(
                name,
                format!("no file can be made in it: {error}"),
                "check that it exists, its mode, its free space and whether it is mounted read-only",
            )];
        }
    };
    let subject = |part: &str| format!("{name}: {part}");
    vec![
        file_system(subject("file system"), directory),
        direct_io(subject("direct I/O"), &sample),
        holes(subject("holes"), &sample),
        lock_support(subject("locks"), &sample),
        free_space(subject("free space"), &sample),
    ]
}

/// A written file in the directory that has no name, or loses it with this.
struct Sample {
    file: File,
    /// How to open it again.
    path: PathBuf,
    named: Option<PathBuf>,
}

impl Sample {
    fn new(directory: &Path) -> io::Result<Sample> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).mode(0o600);
        let unnamed = options.clone().custom_flags(libc::O_TMPFILE).open(directory);
        let sample = match unnamed {
            Ok(file) => {
                let path = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
                Sample { file, path, named: None }
            }
            // The file system has no O_TMPFILE (NFS): a name, removed with the sample.
            Err(error) if matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::EISDIR)) => {
                let path = directory.join(format!(".blktapd-doctor-{}", std::process::id()));
                let file = options.create_new(true).open(&path)?;
                Sample { file, path: path.clone(), named: Some(path) }
            }
            Err(error) => return Err(error),
        };
        sample.file.write_all_at(&vec![1; SAMPLE], 0)?;
        sample.file.sync_data()?;
        Ok(sample)
    }

    fn open_again(&self, flags: i32) -> io::Result<File> {
        OpenOptions::new().read(true).write(true).custom_flags(flags).open(&self.path)
    }
}

impl Drop for Sample {
    fn drop(&mut self) {
        if let Some(path) = &self.named
            && let Err(error) = std::fs::remove_file(path)
        {
            eprintln!("{}: the doctor's file could not be removed: {error}", path.display());
        }
    }
}

fn file_system(subject: String, directory: &Path) -> Check {
    let mount = std::fs::canonicalize(directory).and_then(|path| Ok(Mounts::read()?.of(&path)));
    match mount {
        Ok(Some(mount)) => Check::info(
            subject,
            format!("{} on {} from {}", mount.fs_type, mount.point.display(), mount.source),
        ),
        Ok(None) => Check::info(subject, "not among the mounts of this process"),
        Err(error) => Check::info(subject, format!("not known: {error}")),
    }
}

fn direct_io(subject: String, sample: &Sample) -> Check {
    let advice = "attach images of this directory with ?cache=writeback, or keep them on another file system";
    let file = match sample.open_again(libc::O_DIRECT) {
        Ok(file) => file,
        Err(error) => return Check::warning(subject, format!("O_DIRECT is refused: {error}"), advice),
    };
    let (units, how) = match direct_units(&file) {
        Some(units) => (Some(units), "told by statx"),
        None => (probe_alignment(&file, SAMPLE as u64), "found by reading"),
    };
    match units {
        None | Some((0, _)) => Check::warning(subject, "O_DIRECT does not work", advice),
        Some((offset, memory)) if offset > 4096 || memory > 4096 => {
            Check::warning(subject, format!("units of {offset} bytes: more than 4096"), advice)
        }
        Some((offset, memory)) => {
            Check::ok(subject, format!("units of {offset} bytes in memory aligned to {memory} ({how})"))
        }
    }
}

fn holes(subject: String, sample: &Sample) -> Check {
    let keep = FallocateFlags::FALLOC_FL_KEEP_SIZE;
    let works = |mode| fallocate(&sample.file, mode, 0, 4096).is_ok();
    let punch = works(FallocateFlags::FALLOC_FL_PUNCH_HOLE | keep);
    let zero = works(FallocateFlags::FALLOC_FL_ZERO_RANGE | keep);
    match (punch, zero) {
        (true, true) => Check::ok(subject, "punching holes and zeroing ranges work"),
        (true, false) => Check::warning(
            subject,
            "punching holes works, zeroing ranges does not",
            "write-zeroes without holes are written byte by byte: slower, else no harm",
        ),
        (false, true) => Check::warning(
            subject,
            "zeroing ranges works, punching holes does not",
            "discards free no space here",
        ),
        (false, false) => Check::warning(
            subject,
            "neither punching holes nor zeroing ranges works",
            "discards free no space here, and zeroes are written byte by byte",
        ),
    }
}

fn lock_support(subject: String, sample: &Sample) -> Check {
    let advice = "images here cannot be attached: mount it with locks (NFS: start the lock service)";
    let tried = locks::take(&sample.file, Access::Write).and_then(|_| {
        let other = sample.open_again(0)?;
        locks::take(&other, Access::Write)
    });
    match tried {
        Ok(Some(_)) => Check::ok(subject, "a second writer is kept out"),
        Ok(None) => Check::missing(subject, "locks are taken and keep nobody out", advice),
        Err(error) => Check::missing(subject, format!("no locks: {error}"), advice),
    }
}

fn free_space(subject: String, sample: &Sample) -> Check {
    let stat = match fstatvfs(&sample.file) {
        Ok(stat) => stat,
        Err(errno) => return Check::info(subject, format!("not known: {errno}")),
    };
    let bytes = |blocks: u64| blocks.saturating_mul(stat.fragment_size());
    let (free, total) = (bytes(stat.blocks_available()), bytes(stat.blocks()));
    let found = format!("{} MiB of {} MiB", free >> 20, total >> 20);
    // Sparse images fail in the middle of a guest's write when it is gone. ramfs counts no blocks at all.
    if total > 0 && free < total / 20 {
        Check::warning(
            subject,
            found,
            "less than a twentieth: guests on sparse images will be stopped when it is gone",
        )
    } else {
        Check::ok(subject, found)
    }
}
