//! The one table of open image files of the process.
//!
//! One entry per file, whatever paths lead to it: one open file description for I/O, which carries the locks
//! and the fence, and the disks that use it. Readers share an entry; a writer has it alone. The table holds
//! the last reference to a file's descriptors, so that neither a shard nor the control thread ever closes
//! one.
//!
//! ```text
//! (absent) ─▶ Opening ─▶ Open ─────────────────▶ Closing ─▶ (absent)
//!                          └─▶ Zombie ─(reap)───────▲
//! ```
//! *Zombie*: the last disk has left, but a clone of the [`ImageFile`] is still out (a forced detach with
//! kernel operations under way). *Closing*: the descriptors are on their way through the mount's lane; a new
//! open of the file waits for them, since their locks would stand against it.
//!
//! A file that was closed while operations of the kernel were still out (those of a shard that failed) is absent here, and
//! its old description lives on until the last of them has ended. Opening it makes another description, which is
//! not handed out before nobody holds the fence: the same wait as behind a former daemon.
//!
//! Every new description of a file has a new `generation`: what was cached about the file under another one
//! is stale.
//!
//! All futures may be dropped at any point: what they held goes back through the guards (`OnLane`,
//! `Reservation`).

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use formats::crypt::Secret;
use shard::api::{CacheMode, ImageFile};
use tokio::sync::Notify;
use tokio::time::Instant;

use super::image::{self, Attempt, Born, Geometry, ImageOptions};
use super::lanes::{Bounds, Lanes, OnLane};
use super::mounts::Mount;
use super::opener::{Object, Opener};
use super::{Fence, FileKey, OpenError, OpenErrorKind};

/// First and longest pause between two looks at a fence.
const FENCE_PAUSE_MS: (u64, u64) = (10, 200);

/// A disk wants a file.
#[derive(Debug, Clone)]
pub struct OpenRequest {
    /// Absolute path.
    pub path: PathBuf,
    /// Without write access.
    pub read_only: bool,
    /// Direct or through the page cache.
    pub cache: CacheMode,
    /// Sector size that clients shall see: 512 or 4096, or as the store suggests.
    pub sector: Option<u32>,
    /// The file holds an image of a format, not the disk's bytes.
    pub formatted: bool,
    /// The disk's name, for messages to those who want the file as well.
    pub user: String,
    /// For everything together, waiting for a fence included.
    pub deadline: Duration,
}

/// A file as a disk gets it. Dropping it releases nothing: call [`Files::release`].
#[derive(Debug)]
pub struct Opened {
    /// For the shard; every clone must be gone before [`Files::release`].
    pub image: Arc<ImageFile>,
    /// Size that clients see, in bytes.
    pub served_bytes: u64,
    /// Sector size that clients see, in bytes: 512 or 4096.
    pub sector_bytes: u32,
    /// To release and to measure the file.
    pub key: FileKey,
    /// Of the description; another one when the file has been opened anew.
    pub generation: u64,
}

/// What came of [`Files::release`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Released {
    /// The descriptors are closed and the locks gone.
    Closed,
    /// Other disks read the file; it stays open for them.
    StillUsed,
    /// Its mount has not closed it before the deadline; it will when the mount answers.
    Closing,
    /// Somebody still has a clone of the [`ImageFile`]; call [`Files::reap`] when that has been dropped.
    Zombie,
    /// This disk does not use this file.
    Unknown,
}

/// Where an entry is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum FileState {
    /// Being opened, fenced and locked.
    Opening,
    /// Serves.
    Open,
    /// Left by its last disk, held by kernel operations.
    Zombie,
    /// Being closed.
    Closing,
}

/// An entry of the table, for listings.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileEntry {
    /// Identity.
    pub key: FileKey,
    /// As first named.
    pub path: PathBuf,
    /// Opened for writing.
    pub writable: bool,
    /// See [`FileState`].
    pub state: FileState,
    /// See the module's text.
    pub generation: u64,
    /// The disks that use it; of a zombie the last one.
    pub users: Vec<String>,
}

/// The files of the process.
pub struct Files {
    opener: Opener,
    table: Arc<Table>,
    fence: Fence,
}

#[derive(Default)]
struct Table {
    entries: Mutex<Entries>,
    /// Told whenever an entry leaves `Opening` or goes away.
    changed: Notify,
}

#[derive(Default)]
struct Entries {
    by_key: HashMap<FileKey, Entry>,
    last_generation: u64,
}

struct Entry {
    path: PathBuf,
    writable: bool,
    cache: CacheMode,
    generation: u64,
    users: Vec<String>,
    state: State,
}

enum State {
    Opening,
    Open(Arc<OnLane<Descriptors>>),
    Zombie(Arc<OnLane<Descriptors>>),
    Closing,
}

/// What is closed on the lane: first the descriptors, then the place in the table.
struct Descriptors {
    image: Arc<ImageFile>,
    _place: Arc<Reservation>,
}

/// A place in the table: when it is dropped, the entry goes and those who wait for it are told. An attempt to
/// open keeps it even if its caller has given up, so that nobody runs into the locks that the attempt may be
/// taking.
struct Reservation {
    /// Weak: the table holds its entries, and they hold this.
    table: Weak<Table>,
    key: FileKey,
    generation: u64,
}

impl Drop for Reservation {
    fn drop(&mut self) {
        let Some(table) = self.table.upgrade() else { return };
        let entry = {
            let mut entries = table.lock();
            let mine = entries.by_key.get(&self.key).is_some_and(|entry| entry.generation == self.generation);
            if mine { entries.by_key.remove(&self.key) } else { None }
        };
        drop(entry);
        table.changed.notify_waiters();
    }
}

/// The table's answer to a request.
enum Place {
    Mine(Arc<Reservation>),
    Shared {
        image: Arc<ImageFile>,
        generation: u64,
    },
    /// Being opened or closed: ask again after a change.
    Wait {
        state: FileState,
        path: PathBuf,
    },
    Refused(OpenError),
}

impl Table {
    fn lock(&self) -> MutexGuard<'_, Entries> {
        // Nothing that can panic runs under the lock, so a poisoned table is whole.
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A place for `request`, or why there is none.
    fn reserve(self: &Arc<Self>, key: FileKey, request: &OpenRequest) -> Place {
        let mut entries = self.lock();
        let Some(entry) = entries.by_key.get_mut(&key) else {
            entries.last_generation += 1;
            let generation = entries.last_generation;
            let entry = Entry {
                path: request.path.clone(),
                writable: !request.read_only,
                cache: request.cache,
                generation,
                users: vec![request.user.clone()],
                state: State::Opening,
            };
            entries.by_key.insert(key, entry);
            return Place::Mine(Arc::new(Reservation { table: Arc::downgrade(self), key, generation }));
        };
        match &entry.state {
            State::Open(held) => {
                if let Some(refusal) = entry.refusal(request) {
                    return Place::Refused(refusal);
                }
                entry.users.push(request.user.clone());
                Place::Shared { image: held.image.clone(), generation: entry.generation }
            }
            // A conflict is not worth a wait.
            State::Opening => match entry.refusal(request) {
                Some(refusal) => Place::Refused(refusal),
                None => Place::Wait { state: FileState::Opening, path: entry.path.clone() },
            },
            State::Closing => Place::Wait { state: FileState::Closing, path: entry.path.clone() },
            State::Zombie(_) => {
                let message = format!(
                    "{}: kernel operations of the detached disk {} are still under way on it; it is free \
                    when its store has answered them",
                    request.path.display(),
                    entry.user_names()
                );
                Place::Refused(OpenError::new(OpenErrorKind::Busy, message))
            }
        }
    }
}

impl Entry {
    /// Why `request` cannot share this entry.
    fn refusal(&self, request: &OpenRequest) -> Option<OpenError> {
        let (path, users) = (request.path.display(), self.user_names());
        let also =
            if self.path == request.path { String::new() } else { format!(" (as {})", self.path.display()) };
        let why = if request.formatted && self.users.contains(&request.user) {
            format!(
                "it comes twice in the chain of the disk {}{also}: a loop; correct it with `blktapd image \
                rebase`",
                request.user
            )
        } else if self.writable {
            format!("the disk {users} writes to it{also}; a writer needs it alone: detach {users} first")
        } else if !request.read_only {
            format!(
                "the disk {users} reads it{also}; a writer needs it alone: detach {users} first, or attach \
                this one with --read-only"
            )
        } else if self.users.contains(&request.user) {
            format!("the disk {} uses it already{also}", request.user)
        } else if self.cache != request.cache {
            let mode = |cache| serde_json::to_string(&cache).unwrap_or_default().replace('"', "");
            format!(
                "the disk {users} has it open{also} with cache={}; a file has one cache mode: use that \
                instead of cache={}",
                mode(self.cache),
                mode(request.cache)
            )
        } else {
            return None;
        };
        Some(OpenError::new(OpenErrorKind::Busy, format!("{path}: {why}")))
    }

    fn user_names(&self) -> String {
        self.users.join(", ")
    }
}

impl Files {
    /// An empty table. With no `allowed_roots` every path is allowed. `run_dir` must exist: the fence is
    /// numbered from it.
    pub fn new(allowed_roots: Vec<PathBuf>, run_dir: &Path) -> Result<Files, OpenError> {
        Files::with_bounds(allowed_roots, run_dir, Bounds::default())
    }

    /// The same with bounds of its own for the pool.
    pub fn with_bounds(
        allowed_roots: Vec<PathBuf>,
        run_dir: &Path,
        bounds: Bounds,
    ) -> Result<Files, OpenError> {
        let fence = Fence::of_run_dir(run_dir)
            .map_err(|error| OpenError::from_io(run_dir, "stat the run directory", &error))?;
        let opener = Opener::new(Lanes::new(bounds), allowed_roots)?;
        Ok(Files { opener, table: Arc::default(), fence })
    }

    /// Replaces the allowed directories (a reload); what is open stays open.
    pub fn set_allowed_roots(&self, roots: Vec<PathBuf>) -> Result<(), OpenError> {
        self.opener.set_roots(roots)
    }

    /// The fence that every description for I/O carries.
    pub fn fence(&self) -> Fence {
        self.fence
    }

    /// Opens, fences and locks a file for a disk, or lets a reader share one that is open.
    ///
    /// Errors: see [`OpenErrorKind`]; nothing is left open and no entry left behind by one.
    pub async fn open(&self, request: OpenRequest) -> Result<Opened, OpenError> {
        let started = Instant::now();
        let deadline = started + request.deadline;
        if request.user.is_empty() {
            let message = format!("{}: a file is opened for a disk with a name", request.path.display());
            return Err(OpenError::new(OpenErrorKind::Invalid, message));
        }
        let object = self.opener.find(&request.path, deadline).await?;
        let key = object.key;
        match self.place(key, &request, deadline).await? {
            Ok(place) => self.open_new(object, place, &request, started).await,
            Err((image, generation)) => {
                let shared = image::geometry(&request.path, &image, request.sector);
                let geometry = shared.inspect_err(|_| self.forget_user(key, &request.user))?;
                let (served_bytes, sector_bytes) = (geometry.served_bytes, geometry.sector_bytes);
                Ok(Opened { image, served_bytes, sector_bytes, key, generation })
            }
        }
    }

    /// A reservation, or an open file to share.
    async fn place(
        &self,
        key: FileKey,
        request: &OpenRequest,
        deadline: Instant,
    ) -> Result<Result<Arc<Reservation>, (Arc<ImageFile>, u64)>, OpenError> {
        loop {
            self.reap();
            let changed = self.table.changed.notified();
            tokio::pin!(changed);
            // From here on no change is missed.
            changed.as_mut().enable();
            let (state, path) = match self.table.reserve(key, request) {
                Place::Mine(reservation) => return Ok(Ok(reservation)),
                Place::Shared { image, generation } => return Ok(Err((image, generation))),
                Place::Refused(error) => return Err(error),
                Place::Wait { state, path } => (state, path),
            };
            if tokio::time::timeout_at(deadline, changed).await.is_err() {
                let doing = if state == FileState::Closing { "closing" } else { "opening" };
                let message = format!(
                    "{}: blktapd is still {doing} it (as {}) and its mount does not answer; try again when \
                    it does",
                    request.path.display(),
                    path.display()
                );
                return Err(OpenError::new(OpenErrorKind::Timeout, message));
            }
        }
    }

    async fn open_new(
        &self,
        object: OnLane<Object>,
        place: Arc<Reservation>,
        request: &OpenRequest,
        started: Instant,
    ) -> Result<Opened, OpenError> {
        let (key, generation) = (place.key, place.generation);
        let held = Arc::new(self.open_behind_fence(Arc::new(object), place, request, started).await?);
        let image = held.image.clone();
        let Geometry { served_bytes, sector_bytes } = image::geometry(&request.path, &image, request.sector)?;
        if let Some(entry) = self.table.lock().by_key.get_mut(&key) {
            entry.state = State::Open(held);
        }
        self.table.changed.notify_waiters();
        Ok(Opened { image, served_bytes, sector_bytes, key, generation })
    }

    /// Tries until no predecessor holds the fence.
    async fn open_behind_fence(
        &self,
        object: Arc<OnLane<Object>>,
        place: Arc<Reservation>,
        request: &OpenRequest,
        started: Instant,
    ) -> Result<OnLane<Descriptors>, OpenError> {
        let (lanes, fence) = (self.opener.lanes(), self.fence);
        let (mount, path) = (object.mount().clone(), request.path.as_path());
        let deadline = started + request.deadline;
        let options = ImageOptions {
            read_only: request.read_only,
            cache: request.cache,
            sector: request.sector,
            formatted: request.formatted,
        };
        let mut pause_ms = FENCE_PAUSE_MS.0;
        loop {
            let (pool, at, it, place) = (lanes.clone(), mount.clone(), object.clone(), place.clone());
            let attempt = move || {
                let image = Arc::new(image::open_image(&it, &options, fence)?);
                Ok(OnLane::new(&pool, &at, Descriptors { image, _place: place }))
            };
            match lanes.run(&mount, deadline, path, "open it for I/O", attempt).await? {
                Ok(held) => return Ok(held),
                Err(Attempt::Refused(error)) => return Err(error),
                Err(Attempt::Fenced) => {}
            }
            let pause = Duration::from_millis(pause_ms);
            if Instant::now() + pause >= deadline {
                let waited_ms = started.elapsed().as_millis();
                // Past the deadline by the time of one walk through /proc; without it the message would be
                // worth little.
                let grace = deadline + Duration::from_secs(3);
                let explain = move || image::still_fenced(&object, fence, waited_ms);
                return Err(lanes.run(&mount, grace, path, "find who holds it", explain).await?);
            }
            tokio::time::sleep(pause).await;
            pause_ms = (pause_ms * 2).min(FENCE_PAUSE_MS.1);
        }
    }

    /// A disk has no more use for a file. Drop every clone of its [`ImageFile`] first.
    ///
    /// The last user's release closes the descriptors, on the mount's lane, and waits for that until
    /// `deadline`.
    pub async fn release(&self, key: FileKey, user: &str, deadline: Duration) -> Released {
        let deadline = Instant::now() + deadline;
        let generation = match self.leave(key, user) {
            Ok(generation) => generation,
            Err(outcome) => return outcome,
        };
        loop {
            let changed = self.table.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            let waits = |entry: &Entry| entry.generation == generation;
            if !self.table.lock().by_key.get(&key).is_some_and(waits) {
                return Released::Closed;
            }
            if tokio::time::timeout_at(deadline, changed).await.is_err() {
                return Released::Closing;
            }
        }
    }

    /// Takes the user off the entry; `Ok` when it was the last and the entry, of this generation, is being
    /// closed.
    fn leave(&self, key: FileKey, user: &str) -> Result<u64, Released> {
        let mut entries = self.table.lock();
        let Some(entry) = entries.by_key.get_mut(&key) else { return Err(Released::Unknown) };
        let Some(index) = entry.users.iter().position(|name| name == user) else {
            return Err(Released::Unknown);
        };
        let State::Open(held) = &entry.state else {
            return Err(if matches!(entry.state, State::Zombie(_)) {
                Released::Zombie
            } else {
                Released::Unknown
            });
        };
        if entry.users.len() > 1 {
            entry.users.remove(index);
            return Err(Released::StillUsed);
        }
        if Arc::strong_count(&held.image) > 1 {
            entry.state = State::Zombie(held.clone());
            return Err(Released::Zombie);
        }
        let generation = entry.generation;
        let open = std::mem::replace(&mut entry.state, State::Closing);
        // Dropped behind the lock.
        drop(entries);
        drop(open);
        Ok(generation)
    }

    fn forget_user(&self, key: FileKey, user: &str) {
        if let Some(entry) = self.table.lock().by_key.get_mut(&key) {
            entry.users.retain(|name| name != user);
        }
    }

    /// Closes zombies whose last clone has been dropped. Returns how many are left.
    pub fn reap(&self) -> usize {
        let mut left = 0;
        let mut gone = Vec::new();
        for entry in self.table.lock().by_key.values_mut() {
            let State::Zombie(held) = &entry.state else { continue };
            if Arc::strong_count(&held.image) > 1 {
                left += 1;
            } else {
                gone.push(std::mem::replace(&mut entry.state, State::Closing));
            }
        }
        drop(gone);
        left
    }

    /// Bytes that the file takes in its store; a device takes its size. Errors: `Timeout`, `Io`; `NotFound`
    /// when it is not open.
    pub async fn allocated_bytes(&self, key: FileKey, deadline: Duration) -> Result<u64, OpenError> {
        self.measure(key, deadline, "count its blocks", image::allocated_bytes).await
    }

    /// Makes a new file and fills it. Errors: see [`super::opener::Opener::create`].
    pub async fn create(
        &self,
        path: &Path,
        deadline: Instant,
        fill: impl FnOnce(std::fs::File) -> Result<(), OpenError> + Send + 'static,
    ) -> Result<(), OpenError> {
        self.opener.create(path, deadline, fill).await
    }

    /// Removes a file that was made by [`Files::create`] and is not open.
    pub async fn remove(&self, path: &Path, deadline: Instant) -> Result<(), OpenError> {
        self.opener.remove(path, deadline).await
    }

    /// The writer of a file only reads it from now on: other disks may read it as well. Errors: `Timeout`, `Io`.
    pub async fn become_reader(&self, key: FileKey, deadline: Duration) -> Result<(), OpenError> {
        let unlock = |path: &Path, image: &ImageFile| {
            super::locks::become_reader(&image.fd)
                .map_err(|error| OpenError::from_io(path, "unlock it", &error))
        };
        self.measure(key, deadline, "give its write lock back", unlock).await?;
        if let Some(entry) = self.table.lock().by_key.get_mut(&key) {
            entry.writable = false;
        }
        Ok(())
    }

    /// What an open image of a format says of itself. Errors: `Timeout`, `Io`; `Invalid` with the driver's words.
    pub async fn describe(
        &self,
        key: FileKey,
        format: &'static dyn formats::driver::Format,
        deadline: Duration,
    ) -> Result<formats::driver::Description, OpenError> {
        let ask = move |path: &Path, image: &ImageFile| {
            image::ask(path, image, |file| Box::pin(formats::registry::describe(format, file)))
        };
        self.measure(key, deadline, "read its header", ask).await
    }

    /// The key of an open encrypted image, by what the operator has. Takes as long as the image wants. Errors: `Timeout`, `Io`; `Invalid`
    /// with the driver's words. `turn` is held until the work has ended, also when nobody waits for it any more: it may take a gigabyte.
    pub async fn unlock(
        &self,
        key: FileKey,
        format: &'static dyn formats::driver::Format,
        secret: Secret,
        turn: tokio::sync::OwnedMutexGuard<()>,
        deadline: Duration,
    ) -> Result<Secret, OpenError> {
        let ask = move |path: &Path, image: &ImageFile| {
            let _turn = turn;
            image::ask(path, image, |file| Box::pin(async move { format.unlock(file, &secret).await }))
        };
        self.measure(key, deadline, "unlock it", ask).await
    }

    /// The key in a file, which is where the allowed directories let it be. Errors: those of the opener; `Invalid` if it is no key.
    pub async fn read_key(&self, path: &Path, deadline: Instant) -> Result<Secret, OpenError> {
        let object = self.opener.find(path, deadline).await?;
        let mount = object.mount.clone();
        let call = move || {
            crate::keys::read_file(&object.reopen_path(), &object.path.display().to_string())
                .map_err(|message| OpenError::new(OpenErrorKind::Invalid, message))
        };
        self.opener.lanes().run(&mount, deadline, path, "read the key", call).await?
    }

    /// The snapshots inside an open image of a format. Errors as above.
    pub async fn snapshots(
        &self,
        key: FileKey,
        format: &'static dyn formats::driver::Format,
        deadline: Duration,
    ) -> Result<Vec<formats::driver::Snapshot>, OpenError> {
        let ask =
            move |path: &Path, image: &ImageFile| image::ask(path, image, |file| format.snapshots(file));
        self.measure(key, deadline, "read its snapshots", ask).await
    }

    /// When an open file was made. Errors: `Timeout`, `Io`.
    pub async fn born(&self, key: FileKey, deadline: Duration) -> Result<Born, OpenError> {
        self.measure(key, deadline, "ask when it was made", image::born).await
    }

    /// The length in bytes that the file or device has now. Errors as above.
    pub async fn current_length(&self, key: FileKey, deadline: Duration) -> Result<u64, OpenError> {
        self.measure(key, deadline, "ask for its size", image::current_length).await
    }

    async fn measure<T: Send + 'static>(
        &self,
        key: FileKey,
        deadline: Duration,
        doing: &str,
        ask: impl FnOnce(&Path, &ImageFile) -> Result<T, OpenError> + Send + 'static,
    ) -> Result<T, OpenError> {
        let open = self.table.lock().by_key.get(&key).and_then(|entry| match &entry.state {
            State::Open(held) => Some((held.clone(), entry.path.clone())),
            _ => None,
        });
        let Some((held, path)) = open else {
            return Err(OpenError::new(OpenErrorKind::NotFound, format!("{key:?} is not open")));
        };
        let mount: Arc<Mount> = held.mount().clone();
        let named = path.clone();
        // The call keeps the descriptors, not a clone of the image: it makes no zombie of a file released
        // meanwhile.
        let call = move || ask(&named, &held.image);
        self.opener.lanes().run(&mount, Instant::now() + deadline, &path, doing, call).await?
    }

    /// The table, for listings: sorted by key.
    pub fn entries(&self) -> Vec<FileEntry> {
        let entries = self.table.lock();
        let mut list: Vec<_> = entries
            .by_key
            .iter()
            .map(|(key, entry)| FileEntry {
                key: *key,
                path: entry.path.clone(),
                writable: entry.writable,
                state: match entry.state {
                    State::Opening => FileState::Opening,
                    State::Open(_) => FileState::Open,
                    State::Zombie(_) => FileState::Zombie,
                    State::Closing => FileState::Closing,
                },
                generation: entry.generation,
                users: entry.users.clone(),
            })
            .collect();
        list.sort_by_key(|entry| entry.key);
        list
    }

    /// Threads that the pool has now.
    pub fn threads(&self) -> usize {
        self.opener.lanes().threads()
    }
}
