//! Files for the tables of requests in flight: in RUN_DIR, so that they outlive the process and not the host.

use std::fs::{DirBuilder, OpenOptions};
use std::io::{Error, ErrorKind};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{FallocateFlags, fallocate};
use ring_bridge::memory::SharedRegion;

use crate::problem::Problem;
use crate::xen::device::DeviceId;

const DIRECTORY: &str = "inflight";

/// The file of one queue.
pub fn path(run_dir: &Path, id: DeviceId, queue: usize) -> PathBuf {
    run_dir.join(DIRECTORY).join(format!("{}-{}-{}.q{queue}", id.kind.name(), id.domid, id.devid))
}

/// Makes a table of `bytes`, all of it in memory before it is touched: a full tmpfs refuses the guest's connect, and nothing else.
/// Blocks.
pub fn make(path: &Path, bytes: usize) -> Result<SharedRegion, Problem> {
    let failed = |what: &str, error: &Error| {
        let advice = match error.kind() {
            ErrorKind::StorageFull | ErrorKind::QuotaExceeded => "; make room on the file system of RUN_DIR",
            _ => "",
        };
        Problem::failed(format!(
            "the table of requests in flight {} cannot be {what}: {error}{advice}",
            path.display()
        ))
    };
    let dir = path.parent().unwrap_or(path);
    DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(|error| failed("made", &error))?;
    // One that a dead daemon left has nothing to say any more: its guest has connected anew.
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => return Err(failed("replaced", &error)),
        _ => {}
    }
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .map_err(|error| failed("made", &error))?;
    let allocated = fallocate(&file, FallocateFlags::empty(), 0, bytes as i64);
    allocated.map_err(|errno| failed("allocated", &errno.into()))?;
    SharedRegion::map(&file, bytes).map_err(|error| failed("mapped", &Error::other(error)))
}

/// Removes the tables of a device. What is not there is no error.
pub fn remove(run_dir: &Path, id: DeviceId, queues: usize) {
    for queue in 0..queues {
        let path = path(run_dir, id, queue);
        if let Err(error) = std::fs::remove_file(&path)
            && error.kind() != ErrorKind::NotFound
        {
            tracing::warn!("{} cannot be removed: {error}", path.display());
        }
    }
}
