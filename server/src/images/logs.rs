//! The allocation logs of the images that are open for writing: `RUN_DIR/log/DEVICE-INODE.alog` (`DEVICE.alog` for a block device),
//! see [`shard::alog`].
//!
//! A log is found or made when its image has been opened and locked, and removed, if it is empty, while it still is. One that holds
//! something stays until the image was opened for writing again: it is the only place of acknowledged writes. Until then nobody may
//! read the image either, through the daemon or by a tool: [`refuse_live`].

use std::fs::{DirBuilder, File};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use formats::driver::Description;
use shard::alog::{self, LogError, LogFile, LogIdentity};

use crate::files::{Born, FileKey};
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
    log_dir(run_dir).join(name)
}

fn log_dir(run_dir: &Path) -> PathBuf {
    run_dir.join("log")
}

/// What speaks against the directory of the logs: something else is there. Then nobody can tell what the logs say.
fn check_log_dir(run_dir: &Path) -> Result<(), String> {
    let dir = log_dir(run_dir);
    match std::fs::metadata(&dir) {
        Ok(found) if !found.is_dir() => Err(format!(
            "{} is a file, and has to be the directory of the allocation logs, which hold acknowledged writes of images: move the file \
             away, and bring the directory back if there was one",
            dir.display()
        )),
        // None yet, or what the log itself will say.
        _ => Ok(()),
    }
}

/// Refuses a file to which acknowledged writes are missing that only the allocation log of a daemon that died has. For everybody but
/// the daemon that opens the image for writing: tools have to ask before they read or write it. Blocks, on the run directory only.
///
/// # Errors
/// There is such a log, or it cannot be read: what to say.
pub fn refuse_live(run_dir: &Path, key: FileKey) -> Result<(), String> {
    check_log_dir(run_dir)?;
    let path = log_path(run_dir, key);
    match alog::live(&path) {
        Ok(None) => Ok(()),
        Ok(Some(live)) => Err(live.to_string()),
        Err(error) => Err(format!("the allocation log {} cannot be read: {error}", path.display())),
    }
}

/// Refuses a regular file that was made a moment ago, if a log says of its device and inode that there are acknowledged writes: those of
/// an image that was deleted, and in the new one they would be garbage. Blocks.
///
/// # Errors
/// There is such a log, or it cannot be read: what to say.
pub fn refuse_live_new(run_dir: &Path, file: &File) -> Result<(), String> {
    let stat = file.metadata().map_err(|error| format!("fstat of the new file: {error}"))?;
    let key = FileKey::Regular { device: stat.dev(), inode: stat.ino() };
    refuse_live(run_dir, key).map_err(|message| {
        format!("the new file has the device and inode of one that was deleted: {message}")
    })
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

    /// Where they are.
    pub fn run_dir(&self) -> &Path {
        &self.run_dir
    }

    /// The log of an image that was opened for writing: its files, and when each was made. `Err` of the inner result says why it is served without one.
    pub async fn open(
        &self,
        files: &[(FileKey, Born)],
        path: &Path,
        format: &str,
        image: &Description,
    ) -> Result<Result<Arc<LogFile>, String>, Problem> {
        let Some((first, _)) = files.first() else { return Err(Problem::failed("an image without a file")) };
        let log = log_path(&self.run_dir, *first);
        let born: Vec<_> = files.iter().map(|(_, born)| *born).collect();
        let identity = LogIdentity {
            files: files.iter().map(|(key, _)| identity(*key)).collect(),
            size: image.size,
            digest: digest(format, image, &born),
            path: path.display().to_string(),
        };
        let run_dir = self.run_dir.clone();
        let opened = blocking(move || {
            check_log_dir(&run_dir)?;
            // What else is wrong with it, the log will say.
            let _ = DirBuilder::new().recursive(true).mode(0o700).create(log_dir(&run_dir));
            Ok(LogFile::open(&log, &identity))
        });
        let opened: Result<_, String> = opened.await?;
        match opened.map_err(|message| Problem::new(ProblemKind::Image, message))? {
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

/// A digest of what an image says of itself and its use does not change, and of when its files were made: an image that was deleted
/// and made anew with the same options says the same of itself, and may get the same inode.
fn digest(format: &str, image: &Description, born: &[Born]) -> u64 {
    let stable: Vec<_> = image.properties.iter().filter(|(name, _)| STABLE.contains(name)).collect();
    let identity = image.identity.map(|identity| identity.uuid);
    alog::digest(&format!(
        "{format} {:?} {:?} {identity:?} {stable:?} {born:?}",
        image.backing, image.data_files
    ))
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
            encryption: None,
            properties: vec![("cluster_size", "65536".into()), ("dirty", "no".into())],
        }
    }

    #[test]
    fn digests_are_of_what_stays() {
        let born = [Born(Some((1, 2)))];
        let first = digest("qcow2", &image(), &born);
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
        assert_eq!(digest("qcow2", &used, &born), first);
        for other in [Born(Some((1, 3))), Born(Some((2, 2))), Born(None)] {
            assert_ne!(digest("qcow2", &image(), &[other]), first, "{other:?}");
        }
        let others = [
            ("vhd", image()),
            ("qcow2", Description { backing: None, ..image() }),
            ("qcow2", Description { identity: None, ..image() }),
            ("qcow2", Description { data_files: image().backing.into_iter().collect(), ..image() }),
            ("qcow2", Description { properties: vec![("cluster_size", "4096".into())], ..image() }),
        ];
        for (format, other) in others {
            assert_ne!(digest(format, &other, &born), first, "{format} {other:?}");
        }
    }

    #[test]
    fn what_is_in_the_way_of_the_logs_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let key = FileKey::Regular { device: 1, inode: 2 };
        assert_eq!(refuse_live(dir.path(), key), Ok(()), "no logs yet");
        std::fs::write(dir.path().join("log"), "").unwrap();
        let said = refuse_live(dir.path(), key).unwrap_err();
        assert!(["/log is a file", "directory", "move"].iter().all(|word| said.contains(word)), "{said}");
    }

    #[test]
    fn a_new_file_with_the_number_of_a_logged_one_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let new = File::create(dir.path().join("new")).unwrap();
        assert_eq!(refuse_live_new(dir.path(), &new), Ok(()));
        let stat = new.metadata().unwrap();
        let path = log_path(dir.path(), FileKey::Regular { device: stat.dev(), inode: stat.ino() });
        std::fs::create_dir(dir.path().join("log")).unwrap();
        // What cannot be read as a log is taken for one that holds something.
        std::fs::write(path, "x").unwrap();
        let said = refuse_live_new(dir.path(), &new).unwrap_err();
        assert!(said.contains("deleted") && said.contains(".alog"), "{said}");
    }

    #[test]
    fn names_of_logs_are_of_the_file() {
        let path = |key| log_path(Path::new("/r"), key).display().to_string();
        assert_eq!(path(FileKey::Regular { device: 0xfd01, inode: 77 }), "/r/log/fd01-77.alog");
        assert_eq!(path(FileKey::Block { device: 0xfd02 }), "/r/log/fd02.alog");
    }
}
