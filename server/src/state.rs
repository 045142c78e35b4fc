//! What outlives a restart: attachments and the limits of groups, in one JSON file of the state directory.
//!
//! A change is in effect when it is on the disk: written to a new file, synchronised, renamed over the old one, and the
//! directory synchronised. Changes that arrive while a write runs share the next one, so that 256 attaches at once cost a
//! few synchronisations and not 256. A file that cannot be understood stops the start: attachments are never dropped silently.

use std::collections::BTreeMap;
use std::fs::{DirBuilder, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use formats::spec::ImageSpec;
use serde::{Deserialize, Serialize};
use shard::limits::Limits;

use crate::model::{AttachRequest, ErrorPolicy};
use crate::problem::Problem;

const FILE: &str = "attachments.json";
const VERSION: u32 = 1;

/// What an operator told a disk to do until it is told otherwise.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Hold {
    /// To serve.
    #[default]
    No,
    /// `ctl pause`: to hold its requests, until `ctl resume`.
    Paused,
    /// `ctl pause --release`: the same with its image closed, so that others can work on it. Never opened before `ctl resume`.
    Released,
    /// `ctl fail`: to answer everything with errors, until it is detached.
    GivenUp,
}

impl Hold {
    fn is_no(&self) -> bool {
        *self == Hold::No
    }

    /// Its requests wait for `ctl resume`.
    pub fn is_pause(self) -> bool {
        matches!(self, Hold::Paused | Hold::Released)
    }

    /// Why a disk that is held does not serve, for the operator.
    pub fn reason(self) -> Option<&'static str> {
        match self {
            Hold::No => None,
            Hold::Paused => Some("paused by `ctl pause`; `ctl resume` runs it again"),
            Hold::Released => Some(
                "paused by `ctl pause --release`, its image is closed; `ctl resume` opens it and runs it again",
            ),
            Hold::GivenUp => Some("given up by `ctl fail`; detach it, and attach it again to use it"),
        }
    }
}

/// One disk as it is to be served after a restart.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Attachment {
    /// As it was attached: repeating this is no conflict.
    pub request: AttachRequest,
    /// The image that the request names.
    pub image: ImageSpec,
    /// Limits as of now.
    pub limits: Limits,
    /// Groups as of now, nearest first.
    pub groups: Vec<String>,
    /// Policy in force.
    pub on_error: ErrorPolicy,
    /// Policy in force.
    pub on_enospc: ErrorPolicy,
    /// The shard that an operator chose, if one did.
    pub shard: Option<u16>,
    /// Times that acknowledged data was declared in doubt.
    pub data_in_doubt: u64,
    /// Held by an operator.
    #[serde(default, skip_serializing_if = "Hold::is_no")]
    pub hold: Hold,
    /// The device of a guest that it is for, as [`crate::xen::device::DeviceId`] is written.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
    /// The boot of the host that it ends with: that of every guest's disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boot: Option<String>,
}

/// Everything that is kept.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    version: u32,
    /// By name.
    pub disks: BTreeMap<String, Attachment>,
    /// Groups that the configuration does not name.
    pub groups: BTreeMap<String, Limits>,
}

/// The state and its file.
#[derive(Debug)]
pub struct StateStore {
    dir: PathBuf,
    inner: Mutex<Inner>,
    /// Held by the one flow that writes.
    writer: tokio::sync::Mutex<()>,
}

#[derive(Debug)]
struct Inner {
    state: State,
    /// Counts changes.
    generation: u64,
    /// The generation that is on the disk.
    written: u64,
}

impl StateStore {
    /// Reads the state of `dir`, which is made when it is missing. Blocks.
    pub fn open(dir: &Path) -> Result<StateStore, Problem> {
        DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(|error| {
            Problem::failed(format!(
                "the state directory {} cannot be made: {error}; name another with --state-dir",
                dir.display()
            ))
        })?;
        let path = dir.join(FILE);
        let state = match std::fs::read(&path) {
            Ok(bytes) => parse(&bytes, &path)?,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                State { version: VERSION, ..State::default() }
            }
            Err(error) => {
                return Err(Problem::failed(format!("the state {} cannot be read: {error}", path.display())));
            }
        };
        let mut state = state;
        // Guests of another boot are gone, and their disks with them.
        let boot = boot_id();
        state.disks.retain(|_, disk| disk.boot.is_none() || disk.boot == boot);
        let inner = Mutex::new(Inner { state, generation: 0, written: 0 });
        Ok(StateStore { dir: dir.to_owned(), inner, writer: tokio::sync::Mutex::new(()) })
    }

    /// Looks at the state.
    pub fn read<T>(&self, look: impl FnOnce(&State) -> T) -> T {
        look(&self.lock().state)
    }

    /// Keeps `attachment` under `name`, or nothing. Returns when that is on the disk; after an error the state is as before.
    pub async fn set_disk(&self, name: &str, attachment: Option<Attachment>) -> Result<(), Problem> {
        let exchange = |state: &mut State, value: Option<Attachment>| match value {
            Some(value) => state.disks.insert(name.to_owned(), value),
            None => state.disks.remove(name),
        };
        let before = self.change(|state| exchange(state, attachment));
        let result = self.commit().await;
        if result.is_err() {
            self.change(|state| exchange(state, before));
        }
        result
    }

    /// Keeps several attachments, all or none. Returns when that is on the disk; after an error the state is as before.
    pub async fn set_disks(&self, attachments: Vec<(String, Attachment)>) -> Result<(), Problem> {
        let before: Vec<_> = self.change(|state| {
            let set = |(name, attachment): (String, Attachment)| {
                let before = state.disks.insert(name.clone(), attachment);
                (name, before)
            };
            attachments.into_iter().map(set).collect()
        });
        let result = self.commit().await;
        if result.is_err() {
            self.change(|state| {
                for (name, before) in before {
                    match before {
                        Some(before) => state.disks.insert(name, before),
                        None => state.disks.remove(&name),
                    };
                }
            });
        }
        result
    }

    /// Keeps the limits of a group, or nothing. Returns when that is on the disk; after an error the state is as before.
    pub async fn set_group(&self, name: &str, limits: Option<Limits>) -> Result<(), Problem> {
        let exchange = |state: &mut State, value: Option<Limits>| match value {
            Some(value) => state.groups.insert(name.to_owned(), value),
            None => state.groups.remove(name),
        };
        let before = self.change(|state| exchange(state, limits));
        let result = self.commit().await;
        if result.is_err() {
            self.change(|state| exchange(state, before));
        }
        result
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let mut inner = self.lock();
        inner.generation += 1;
        change(&mut inner.state)
    }

    /// Waits until everything that was changed before this call is on the disk.
    async fn commit(&self) -> Result<(), Problem> {
        let wanted = self.lock().generation;
        let _turn = self.writer.lock().await;
        let (generation, bytes) = {
            let inner = self.lock();
            if inner.written >= wanted {
                return Ok(());
            }
            let bytes = serde_json::to_vec_pretty(&inner.state);
            (
                inner.generation,
                bytes.map_err(|error| {
                    Problem::failed(format!("the state cannot be written as JSON: {error}"))
                })?,
            )
        };
        let dir = self.dir.clone();
        let written = tokio::task::spawn_blocking(move || write(&dir, &bytes)).await;
        match written {
            Ok(Ok(())) => {
                self.lock().written = generation;
                Ok(())
            }
            Ok(Err(error)) => Err(Problem::failed(format!(
                "the change cannot be kept, and was undone: writing {} failed: {error}; make room there, or correct its \
                 permissions",
                self.dir.join(FILE).display()
            ))),
            Err(error) => Err(Problem::failed(format!("the thread that writes the state ended: {error}"))),
        }
    }
}

/// The boot of the host, as the kernel names it; none when it does not.
pub fn boot_id() -> Option<String> {
    let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    Some(text.trim().to_owned())
}

fn parse(bytes: &[u8], path: &Path) -> Result<State, Problem> {
    let advice = "correct it, or move it away to start without attachments";
    let state: State = serde_json::from_slice(bytes).map_err(|error| {
        Problem::failed(format!("the state {} is damaged: {error}; {advice}", path.display()))
    })?;
    if state.version != VERSION {
        return Err(Problem::failed(format!(
            "the state {} has version {}, and this program reads version {VERSION}; {advice}",
            path.display(),
            state.version
        )));
    }
    Ok(state)
}

/// Replaces the file of `dir` so that after a power loss it is the old one or the new one.
fn write(dir: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let new = dir.join(format!("{FILE}.new"));
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    std::fs::rename(&new, dir.join(FILE))?;
    File::open(dir)?.sync_all()
}

#[cfg(test)]
mod tests {
    //! Goal: what was acknowledged is there after a restart, and a failed write changes nothing.
    //! Method: a real directory; a directory that takes no files.

    use super::*;

    fn attachment(image: &str) -> Attachment {
        Attachment {
            image: image.parse().unwrap(),
            request: serde_json::from_value(serde_json::json!({"image": image, "nbd": true})).unwrap(),
            limits: Limits::default(),
            groups: vec!["g".into()],
            on_error: ErrorPolicy::Pause,
            on_enospc: ErrorPolicy::Report,
            shard: None,
            data_in_doubt: 2,
            hold: Hold::Paused,
            device: None,
            boot: None,
        }
    }

    #[tokio::test]
    async fn disks_of_guests_end_with_the_boot() {
        let dir = tempfile::tempdir().unwrap();
        let store = StateStore::open(dir.path()).unwrap();
        let of =
            |boot: Option<&str>| Attachment { boot: boot.map(str::to_owned), ..attachment("null:?size=1M") };
        for (name, boot) in [("now", boot_id().as_deref()), ("before", Some("another")), ("always", None)] {
            store.set_disk(name, Some(of(boot))).await.unwrap();
        }
        let again = StateStore::open(dir.path()).unwrap();
        assert_eq!(again.read(|state| state.disks.keys().cloned().collect::<Vec<_>>()), ["always", "now"]);
    }

    #[tokio::test]
    async fn changes_survive_and_share_writes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("deep/state");
        let store = StateStore::open(&path).unwrap();
        let names: Vec<String> = (0..50).map(|n| format!("d{n}")).collect();
        let tasks: Vec<_> =
            names.iter().map(|name| store.set_disk(name, Some(attachment("null:?size=1M")))).collect();
        for result in join_all(tasks).await {
            result.unwrap();
        }
        store.set_disk("d7", None).await.unwrap();
        store.set_group("g", Some(Limits { iops_size: 5, ..Limits::default() })).await.unwrap();
        let again = StateStore::open(&path).unwrap();
        let state = again.read(Clone::clone);
        assert_eq!(state.disks.len(), 49);
        assert_eq!(state.disks["d1"], attachment("null:?size=1M"));
        assert_eq!(state.groups["g"].iops_size, 5);
    }

    #[tokio::test]
    async fn a_failed_write_is_undone() {
        let dir = tempfile::tempdir().unwrap();
        let store = StateStore::open(dir.path()).unwrap();
        store.set_disk("a", Some(attachment("null:?size=1M"))).await.unwrap();
        // A directory in the place of the new file makes opening it fail, also for root.
        std::fs::create_dir(dir.path().join("attachments.json.new")).unwrap();
        let problem = store.set_disk("b", Some(attachment("null:?size=2M"))).await.unwrap_err();
        assert!(problem.message.contains("attachments.json"), "{problem}");
        assert!(store.set_disk("a", None).await.is_err());
        assert_eq!(store.read(|state| state.disks.keys().cloned().collect::<Vec<_>>()), ["a"]);
        std::fs::remove_dir(dir.path().join("attachments.json.new")).unwrap();
        store.set_disk("c", Some(attachment("null:?size=2M"))).await.unwrap();
        let again = StateStore::open(dir.path()).unwrap();
        assert_eq!(again.read(|state| state.disks.keys().cloned().collect::<Vec<_>>()), ["a", "c"]);
    }

    #[test]
    fn a_damaged_file_stops_the_start() {
        let dir = tempfile::tempdir().unwrap();
        for text in ["{", "{\"version\": 9, \"disks\": {}, \"groups\": {}}", "{\"version\":1}"] {
            std::fs::write(dir.path().join(FILE), text).unwrap();
            let problem = StateStore::open(dir.path()).unwrap_err();
            assert!(problem.message.contains("move it away"), "{problem}");
        }
    }

    /// Polls all futures to their ends.
    async fn join_all<F: Future>(futures: Vec<F>) -> Vec<F::Output> {
        let mut pending: Vec<_> = futures.into_iter().map(Box::pin).collect();
        let mut done = Vec::new();
        std::future::poll_fn(|context| {
            pending.retain_mut(|future| match future.as_mut().poll(context) {
                std::task::Poll::Ready(value) => {
                    done.push(value);
                    false
                }
                std::task::Poll::Pending => true,
            });
            if pending.is_empty() { std::task::Poll::Ready(()) } else { std::task::Poll::Pending }
        })
        .await;
        done
    }
}
