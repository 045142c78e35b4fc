//! The allocation logs of the images that are open for writing: `RUN_DIR/log/DEVICE-INODE.alog` (`DEVICE.alog` for a block device),
//! see [`shard::alog`].
//!
//! A log is found or made when its image has been opened and locked, and removed, if it is empty, while it still is. One that holds
//! something stays until the image was opened for writing again: it is the only place of acknowledged writes. Until then nobody may
//! read the image either, through the daemon or by a tool: [`refuse_live`].

use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use formats::driver::Description;
use shard::alog::{self, LogError, LogFile, LogIdentity};

use crate::files::FileKey;
use crate::problem::{Problem, ProblemKind};

/// Properties that no use of an image changes.
const STABLE: &[&str] = &[
    "compat",
    "cluster_size",
    "refcount_bits",
    "extended_l2",
    "data_file_raw",
    "snapshots",
    "type",
    "creator",
    "uuid",
    "created",
    "block_size",
    "max_size",
];

/// The log of the image whose first file is `key`.
pub fn log_path(run_dir: &Path, key: FileKey) -> PathBuf {
    let name = match key {
        FileKey::Regular { device, inode } => format!("{device:x}-{inode}.alog"),
        FileKey::Block { device } => format!("{device:x}.alog"),
    };
    run_dir.join("log").join(name)
}

/// Refuses a file to which acknowledged writes are missing that only the allocation log of a daemon that died has. For everybody but
/// the daemon that opens the image for writing: tools have to ask before they read or write it. Blocks, on the run directory only.
///
/// # Errors
/// There is such a log, or it cannot be read: what to say.
pub fn refuse_live(run_dir: &Path, key: FileKey) -> Result<(), String> {
    let path = log_path(run_dir, key);
    match alog::live(&path) {
        Ok(None) => Ok(()),
        Ok(Some(live)) => Err(live.to_string()),
        Err(error) => Err(format!("the allocation log {} cannot be read: {error}", path.display())),
    }
}

/// The logs of one daemon.
pub(super) struct Logs {
    run_dir: PathBuf,
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, Problem> {
    let ended = tokio::task::spawn_blocking(work).await;
    ended.map_err(|error| Problem::failed(format!("an allocation log: its opener ended: {error}")))
}

impl Logs {
    pub fn new(run_dir: &Path) -> Logs {
        Logs { run_dir: run_dir.to_owned() }
    }

    /// The log of an image that was opened for writing. `Err` of the inner result says why it is served without one.
    pub async fn open(
        &self,
        keys: &[FileKey],
        path: &Path,
        format: &str,
        image: &Description,
    ) -> Result<Result<Arc<LogFile>, String>, Problem> {
        let Some(first) = keys.first() else { return Err(Problem::failed("an image without a file")) };
        let log = log_path(&self.run_dir, *first);
        let identity = LogIdentity {
            files: keys.iter().map(|key| identity(*key)).collect(),
            size: image.size,
            digest: digest(format, image),
            path: path.display().to_string(),
        };
        let opened = blocking(move || {
            if let Some(dir) = log.parent() {
                // What is wrong with it, the log will say.
                let _ = DirBuilder::new().recursive(true).mode(0o700).create(dir);
            }
            LogFile::open(&log, &identity)
        });
        match opened.await? {
            Ok(log) => Ok(Ok(Arc::new(log))),
            Err(error @ LogError::Mismatch { .. }) => {
                Err(Problem::new(ProblemKind::Image, error.to_string()))
            }
            Err(error @ LogError::Unavailable { .. }) => Ok(Err(format!(
                "{error}; every allocation waits for a write of metadata: make room in the run directory and attach it again"
            ))),
        }
    }

    /// See [`refuse_live`].
    pub async fn refuse_live(&self, key: FileKey) -> Result<(), Problem> {
        let run_dir = self.run_dir.clone();
        let refused = blocking(move || refuse_live(&run_dir, key)).await?;
        refused.map_err(|message| Problem::new(ProblemKind::Image, message))
    }

    /// Removes logs that are empty and that nobody else has. The images are locked still.
    pub async fn remove(&self, logs: Vec<Arc<LogFile>>, disk: &str) {
        let work = move || {
            for log in logs {
                // A shard that still has it may note in it yet.
                if Arc::strong_count(&log) > 1 {
                    continue;
                }
                match log.remove_if_empty() {
                    Ok(true) => {}
                    Ok(false) => tracing::warn!(
                        "{}: it holds acknowledged writes of an image that was not closed; attach the image again before anything \
                         else uses it",
                        log.path().display()
                    ),
                    Err(error) => tracing::warn!("{}: it cannot be removed: {error}", log.path().display()),
                }
            }
        };
        if let Err(error) = blocking(work).await {
            tracing::warn!(disk, "{error}");
        }
    }
}

fn identity(key: FileKey) -> (u64, u64) {
    match key {
        FileKey::Regular { device, inode } => (device, inode),
        FileKey::Block { device } => (0, device),
    }
}

/// A digest of what an image says of itself and its use does not change.
fn digest(format: &str, image: &Description) -> u64 {
    let stable: Vec<_> = image.properties.iter().filter(|(name, _)| STABLE.contains(name)).collect();
    let identity = image.identity.map(|identity| identity.uuid);
    alog::digest(&format!("{format} {:?} {:?} {identity:?} {stable:?}", image.backing, image.data_files))
}

#[cfg(test)]
mod tests {
    //! Goal: the digest is blind to what use changes, and to nothing else. Method: one description, changed field by field.

    use super::*;
    use formats::driver::{Identity, Link};

    fn image() -> Description {
        Description {
            size: 1 << 20,
            backing: Some(Link { paths: vec!["a".into()], format: Some("raw".into()), identity: None }),
            data_files: Vec::new(),
            identity: Some(Identity { uuid: [1; 16], modified: None }),
            writable: Ok(()),
            properties: vec![("cluster_size", "65536".into()), ("dirty", "no".into())],
        }
    }

    #[test]
    fn digests_are_of_what_stays() {
        let first = digest("qcow2", &image());
        let used = Description {
            size: 2 << 20,
            writable: Err("why".into()),
            properties: vec![
                ("cluster_size", "65536".into()),
                ("dirty", "yes".into()),
                ("footer", "lost".into()),
            ],
            ..image()
        };
        assert_eq!(digest("qcow2", &used), first);
        let others = [
            ("vhd", image()),
            ("qcow2", Description { backing: None, ..image() }),
            ("qcow2", Description { identity: None, ..image() }),
            ("qcow2", Description { data_files: image().backing.into_iter().collect(), ..image() }),
            ("qcow2", Description { properties: vec![("cluster_size", "4096".into())], ..image() }),
        ];
        for (format, other) in others {
            assert_ne!(digest(format, &other), first, "{format} {other:?}");
        }
    }

    #[test]
    fn names_of_logs_are_of_the_file() {
        let path = |key| log_path(Path::new("/r"), key).display().to_string();
        assert_eq!(path(FileKey::Regular { device: 0xfd01, inode: 77 }), "/r/log/fd01-77.alog");
        assert_eq!(path(FileKey::Block { device: 0xfd02 }), "/r/log/fd02.alog");
    }
}
