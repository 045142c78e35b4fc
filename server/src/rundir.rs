//! The run and state directories, each owned by one daemon at a time through a lock file.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{Read, Seek, Write};
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

use crate::config::Settings;
use crate::problem::{Problem, ProblemKind};

/// Where sockets are before they get their permissions, in the run directory.
pub const HIDDEN: &str = ".new";

/// The locks of a running daemon.
#[derive(Debug)]
pub struct Owned {
    _run: Flock<File>,
    _state: Flock<File>,
}

/// Makes the directories and locks them.
pub fn own(settings: &Settings) -> Result<Owned, Problem> {
    make(&settings.run_dir, 0o755, "--run-dir")?;
    make(&settings.nbd_dir(), 0o755, "--run-dir")?;
    make(&settings.blkif_dir(), 0o755, "--run-dir")?;
    make(&settings.run_dir.join(HIDDEN), 0o700, "--run-dir")?;
    make(&settings.state_dir, 0o700, "--state-dir")?;
    let run = lock(&settings.run_dir, "run", "--run-dir")?;
    let state = lock(&settings.state_dir, "state", "--state-dir")?;
    remove_stale(&settings.nbd_dir());
    remove_stale(&settings.blkif_dir());
    remove_stale(&settings.run_dir.join(HIDDEN));
    Ok(Owned { _run: run, _state: state })
}

fn make(dir: &Path, mode: u32, option: &str) -> Result<(), Problem> {
    DirBuilder::new().recursive(true).mode(mode).create(dir).map_err(|error| {
        Problem::failed(format!(
            "the directory {} cannot be made: {error}; name another with {option}",
            dir.display()
        ))
    })
}

fn lock(dir: &Path, what: &str, option: &str) -> Result<Flock<File>, Problem> {
    let path = dir.join(format!("{what}.lock"));
    let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path).map_err(
        |error| {
            Problem::failed(format!(
                "the lock {} cannot be opened: {error}; name another directory with {option}",
                path.display()
            ))
        },
    )?;
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(mut lock) => {
            // Only for the message below in another process.
            let _ = lock
                .set_len(0)
                .and_then(|()| lock.rewind())
                .and_then(|()| writeln!(*lock, "{}", std::process::id()));
            Ok(lock)
        }
        Err((mut file, Errno::EWOULDBLOCK)) => {
            let mut pid = String::new();
            let _ = file.read_to_string(&mut pid);
            let pid = pid.trim();
            Err(Problem::new(
                ProblemKind::Conflict,
                format!(
                    "the {what} directory {} belongs to a running blktapd (pid {pid}): stop that one, or name another \
                     directory with {option}",
                    dir.display()
                ),
            ))
        }
        Err((_, errno)) => {
            Err(Problem::failed(format!("the lock {} cannot be taken: {errno}", path.display())))
        }
    }
}

/// Removes the sockets of a daemon that is gone: the directory is locked, so nobody answers there.
fn remove_stale(dir: &Path) {
    let Ok(entries) = std::fs::read_dir(dir) else { return };
    for entry in entries.flatten() {
        use std::os::unix::fs::FileTypeExt;
        if entry.file_type().is_ok_and(|kind| kind.is_socket()) {
            let _ = std::fs::remove_file(entry.path());
        }
    }
}
