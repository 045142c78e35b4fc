//! Files for the tables of requests in flight: in RUN_DIR, so that they outlive the process and not the host.

use std::fs::{DirBuilder, OpenOptions};
use std::io::{Error, ErrorKind};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{FallocateFlags, fallocate};
use ring_bridge::memory::SharedRegion;

use ring_bridge::blkif::inflight::table_bytes;
use ring_bridge::blkif::wire::entries;
use shard::blkif::QueueConnect;

use crate::problem::Problem;
use crate::xen::device::DeviceId;
use crate::xen::keys::Queue;

const DIRECTORY: &str = "inflight";
/// How names of devices without Xen begin.
const SHARED: &str = "shared-";

/// How files of a guest's device are named.
pub fn device(id: DeviceId) -> String {
    format!("{}-{}-{}", id.kind.name(), id.domid, id.devid)
}

/// How files of a client's device are named.
pub fn shared_device(domid: u16, devid: u32) -> String {
    format!("{SHARED}{domid}-{devid}")
}

/// The file of one queue.
fn path(run_dir: &Path, device: &str, queue: usize) -> PathBuf {
    run_dir.join(DIRECTORY).join(format!("{device}.q{queue}"))
}

/// Makes the tables of all queues of a device, for requests of up to `segments` segments.
pub async fn make_all(
    run_dir: &Path,
    device: &str,
    queues: &[Queue],
    segments: u16,
) -> Result<Vec<QueueConnect>, Problem> {
    let mut made = Vec::new();
    for (number, queue) in queues.iter().enumerate() {
        let pages = queue.grefs.len() as u32;
        let Some(entries) = entries(pages) else {
            return Err(Problem::invalid(format!("a ring of {pages} pages is none")));
        };
        let (path, bytes) = (path(run_dir, device, number), table_bytes(entries, segments));
        let table = tokio::task::spawn_blocking(move || make(&path, bytes)).await;
        let table = table.map_err(|error| Problem::failed(format!("a thread ended: {error}")))??;
        made.push(QueueConnect { grefs: queue.grefs.clone(), port: queue.port, table });
    }
    Ok(made)
}

/// Makes a table of `bytes`, all of it in memory before it is touched: a full tmpfs refuses the guest's connect, and nothing else.
/// Blocks.
fn make(path: &Path, bytes: usize) -> Result<SharedRegion, Problem> {
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
pub fn remove(run_dir: &Path, device: &str, queues: usize) {
    for queue in 0..queues {
        let path = path(run_dir, device, queue);
        if let Err(error) = std::fs::remove_file(&path)
            && error.kind() != ErrorKind::NotFound
        {
            tracing::warn!("{} cannot be removed: {error}", path.display());
        }
    }
}

/// Removes the tables of all clients without Xen.
pub fn remove_shared(run_dir: &Path) {
    let Ok(entries) = std::fs::read_dir(run_dir.join(DIRECTORY)) else { return };
    for entry in
        entries.flatten().filter(|entry| entry.file_name().as_encoded_bytes().starts_with(SHARED.as_bytes()))
    {
        if let Err(error) = std::fs::remove_file(entry.path()) {
            tracing::warn!("{} cannot be removed: {error}", entry.path().display());
        }
    }
}
