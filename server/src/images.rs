//! Images by their specification: files from the file table, RAM disks from a registry by name, and null disks.
//!
//! A RAM disk exists while an attachment names it: it is made by the first that opens it, shared by all that do, and its memory
//! goes with the last detach ([`Images::forget_ram`]). Over a restart of the daemon its file in the RAM directory stays.

use std::collections::{BTreeSet, HashMap};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use formats::driver::{Identity, Link};
use formats::spec::{CacheMode, ImageSpec, RamOptions, RawOptions, Target};
use shard::alog::LogFile;
use shard::api::{Backend, ImageFile};
use shard::ram::{PageSize, RamBudget, RamDisk, RamError, RamErrorKind};
use tokio::time::Instant;

use crate::config::Settings;
use crate::files::{FileKey, Files, OpenError, OpenErrorKind, OpenRequest, Released};
use crate::problem::{Problem, ProblemKind};
use crate::ram_dir::RamDir;

mod chain;
pub mod links;
pub mod logs;

use chain::Wanted;
use logs::Logs;

/// How long closing a file may take before it goes on in the background.
const RELEASE_TIMEOUT: Duration = Duration::from_secs(5);

/// An image that is open for a disk. Give it back with [`Images::release`].
#[derive(Debug)]
pub struct OpenImage {
    /// For the shard.
    pub backend: Backend,
    /// Size that clients see, in bytes.
    pub size_bytes: u64,
    /// Smallest request that clients are told to send; 1 unless the image was attached with `sector=`.
    pub block_bytes: u32,
    /// Something the operator should know about it.
    pub note: Option<String>,
    /// What an overlay over it remembers it by.
    identity: Option<Identity>,
    held: Held,
    /// Allocation logs of the images of a chain that are or were written.
    logs: Vec<Arc<LogFile>>,
    released: bool,
}

/// What has to be given back.
#[derive(Debug, Clone)]
enum Held {
    File(FileKey),
    /// Files of a chain, those of the first image first.
    Chain(Vec<FileKey>),
    Ram(String),
    Nothing,
}

impl Held {
    fn files(&self) -> Vec<FileKey> {
        match self {
            Held::File(key) => vec![*key],
            Held::Chain(keys) => keys.clone(),
            Held::Ram(_) | Held::Nothing => Vec::new(),
        }
    }
}

/// Where the space of an image can be measured, without keeping it open.
#[derive(Debug, Clone)]
pub struct Measure(Held);

impl Measure {
    /// The image's own file.
    fn first_file(&self) -> Option<FileKey> {
        self.0.files().first().copied()
    }
}

impl OpenImage {
    /// For [`Images::allocated_bytes`].
    pub fn measure(&self) -> Measure {
        Measure(self.held.clone())
    }

    /// The image was closed for a script to work on.
    pub fn is_released(&self) -> bool {
        self.released
    }

    /// No image, of a size in bytes.
    pub fn nothing(size_bytes: u64) -> OpenImage {
        OpenImage {
            backend: Backend::Null,
            size_bytes,
            block_bytes: 1,
            note: None,
            identity: None,
            held: Held::Nothing,
            logs: Vec::new(),
            released: true,
        }
    }

    /// Its identity is one of its contents, and another one after a write.
    pub fn is_known_by_contents(&self) -> bool {
        self.identity.is_some_and(|identity| identity.of_contents)
    }

    /// How an overlay refers to it, if its contents are what they were when it was opened.
    pub fn link(&self, spec: &ImageSpec) -> Link {
        let format = Some(spec.image_type.name().to_owned());
        Link { paths: vec![spec.path.clone()], format, identity: self.identity }
    }

    /// Which images of its chain are encrypted.
    pub fn encrypted(&self) -> Vec<bool> {
        match &self.backend {
            Backend::Image(chain) => chain.layers.iter().map(|layer| layer.key.is_some()).collect(),
            Backend::File(_) | Backend::Ram(_) | Backend::Null => vec![false],
        }
    }

    /// The image's own file.
    pub fn file(&self) -> Option<Arc<ImageFile>> {
        match &self.backend {
            Backend::File(file) => Some(file.clone()),
            Backend::Image(chain) => chain.layers.first()?.files.first().cloned(),
            Backend::Ram(_) | Backend::Null => None,
        }
    }

    /// An overlay takes over; this image is below it from now on.
    pub fn put_on_top(&mut self, overlay: OpenImage) {
        let mut keys = overlay.held.files();
        keys.extend(self.held.files());
        self.backend = overlay.backend;
        self.identity = overlay.identity;
        self.held = Held::Chain(keys);
        self.logs.extend(overlay.logs);
    }

    /// The files of the image that was put below an overlay last: all but the overlay's own.
    pub fn below(&self) -> Vec<FileKey> {
        self.held.files().split_off(1)
    }
}

/// All images of the process.
pub struct Images {
    files: Files,
    logs: Logs,
    /// As the configuration has them now.
    allowed_dirs: Mutex<Vec<PathBuf>>,
    ram_dir: RamDir,
    budget: Arc<RamBudget>,
    rams: Mutex<HashMap<String, Ram>>,
    /// Held while a RAM disk is made or removed.
    ram_turn: tokio::sync::Mutex<()>,
    /// Held while an image is unlocked: one may take all of a core, and a GiB.
    unlock_turn: Arc<tokio::sync::Mutex<()>>,
}

struct Ram {
    disk: Arc<RamDisk>,
    page: PageSize,
    note: Option<String>,
    users: BTreeSet<String>,
}

impl Images {
    /// No image is open. The run directory must exist.
    pub fn new(settings: &Settings) -> Result<Images, Problem> {
        Ok(Images {
            allowed_dirs: Mutex::new(settings.allowed_dirs.clone()),
            files: Files::new(settings.allowed_dirs.clone(), &settings.run_dir).map_err(problem)?,
            logs: Logs::new(&settings.run_dir),
            ram_dir: RamDir::new(settings.ram_dir.clone(), &settings.run_dir),
            budget: Arc::new(RamBudget::new(settings.ram_limit_bytes.unwrap_or(u64::MAX))),
            rams: Mutex::default(),
            ram_turn: tokio::sync::Mutex::new(()),
            unlock_turn: Arc::default(),
        })
    }

    /// Takes over what a reload may change.
    pub fn reconfigure(&self, settings: &Settings) -> Result<(), Problem> {
        self.budget.set_limit_bytes(settings.ram_limit_bytes.unwrap_or(u64::MAX));
        self.files.set_allowed_roots(settings.allowed_dirs.clone()).map_err(problem)?;
        *self.allowed_dirs.lock().unwrap_or_else(std::sync::PoisonError::into_inner) =
            settings.allowed_dirs.clone();
        Ok(())
    }

    fn allowed_dirs(&self) -> Vec<PathBuf> {
        self.allowed_dirs.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone()
    }

    /// The memory of all RAM disks.
    pub fn ram_budget(&self) -> &RamBudget {
        &self.budget
    }

    /// Opens an image for the disk `disk`. Nothing stays open after an error.
    pub async fn open(
        &self,
        spec: &ImageSpec,
        read_only: bool,
        disk: &str,
        deadline: Instant,
    ) -> Result<OpenImage, Problem> {
        match spec.target()? {
            Target::Null { options } => Ok(OpenImage {
                backend: Backend::Null,
                size_bytes: options.size,
                block_bytes: 1,
                note: None,
                identity: None,
                held: Held::Nothing,
                logs: Vec::new(),
                released: false,
            }),
            Target::Image { format, path, options } => {
                let wanted = Wanted { format, path, options, read_only, disk, deadline };
                self.open_chain(wanted).await
            }
            Target::Raw { path, options } => self.open_file(path, options, read_only, disk, deadline).await,
            Target::Ram { name, options } => {
                let turn = tokio::time::timeout_at(deadline, self.ram_turn.lock()).await;
                let _turn = turn.map_err(|_| {
                    Problem::new(
                        ProblemKind::TimedOut,
                        format!("RAM disk {name}: another one is still being made"),
                    )
                })?;
                self.open_ram(&name, &options, disk, deadline).await
            }
        }
    }

    async fn open_file(
        &self,
        path: PathBuf,
        options: RawOptions,
        read_only: bool,
        disk: &str,
        deadline: Instant,
    ) -> Result<OpenImage, Problem> {
        let deadline = deadline.saturating_duration_since(Instant::now());
        let user = disk.to_owned();
        let request = OpenRequest {
            path,
            read_only,
            cache: options.cache,
            sector: options.sector,
            formatted: false,
            user,
            deadline,
        };
        let opened = self.files.open(request).await.map_err(problem)?;
        if let Err(refused) = self.logs.refuse_live(opened.key).await {
            let key = opened.key;
            drop(opened);
            self.release_files(&[key], disk).await;
            return Err(refused);
        }
        Ok(OpenImage {
            backend: Backend::File(opened.image),
            size_bytes: opened.served_bytes,
            block_bytes: options.sector.map_or(1, |_| opened.sector_bytes),
            note: None,
            identity: None,
            held: Held::File(opened.key),
            logs: Vec::new(),
            released: false,
        })
    }

    async fn open_ram(
        &self,
        name: &str,
        options: &RamOptions,
        disk: &str,
        deadline: Instant,
    ) -> Result<OpenImage, Problem> {
        let page = match options.huge {
            None => PageSize::Base,
            Some(PageSize::HUGE_BYTES) => PageSize::Huge2M,
            Some(other) => {
                return Err(Problem::invalid(format!(
                    "RAM disk {name}: huge={other} is not possible: pages of 2M are"
                )));
            }
        };
        if let Some(open) = self.share_ram(name, options.size, page, disk)? {
            return Ok(open);
        }
        let init = match &options.init {
            None => None,
            Some(path) => Some(self.open_initial(path, name, deadline).await?),
        };
        let dir = self.ram_dir.clone();
        let (owned, size, budget) = (name.to_owned(), options.size, self.budget.clone());
        let contents = init.as_ref().map(|(file, _)| file.try_clone()).transpose();
        let made = match contents {
            Err(error) => Err(Problem::failed(format!("RAM disk {name}: {error}"))),
            Ok(contents) => {
                tokio::task::spawn_blocking(move || make_ram(&dir, &owned, size, page, budget, contents))
                    .await
                    .unwrap_or_else(|error| {
                        Err(Problem::failed(format!("RAM disk: its maker ended: {error}")))
                    })
            }
        };
        if let Some((file, key)) = init {
            drop(file);
            self.files.release(key, &initial_user(name), RELEASE_TIMEOUT).await;
        }
        let (made, note) = made?;
        self.lock_rams()
            .insert(name.to_owned(), Ram { disk: made, page, note: note.clone(), users: BTreeSet::new() });
        let open = self.share_ram(name, options.size, page, disk)?;
        open.ok_or_else(|| Problem::failed(format!("RAM disk {name}: it was lost while it was made")))
    }

    /// The RAM disk `name` if it exists; an error if it is another one.
    fn share_ram(
        &self,
        name: &str,
        size: u64,
        page: PageSize,
        user: &str,
    ) -> Result<Option<OpenImage>, Problem> {
        let mut rams = self.lock_rams();
        let Some(ram) = rams.get_mut(name) else { return Ok(None) };
        if ram.disk.size_bytes() != size || ram.page != page {
            return Err(Problem::new(
                ProblemKind::Conflict,
                format!(
                    "RAM disk {name} exists with {} bytes and {:?} pages (used by {}), and {size} bytes and {page:?} pages \
                     are asked for: give the same size and pages, or another name",
                    ram.disk.size_bytes(),
                    ram.page,
                    ram.users.iter().cloned().collect::<Vec<_>>().join(", ")
                ),
            ));
        }
        ram.users.insert(user.to_owned());
        Ok(Some(OpenImage {
            backend: Backend::Ram(ram.disk.clone()),
            size_bytes: size,
            block_bytes: 1,
            note: ram.note.clone(),
            identity: None,
            held: Held::Ram(name.to_owned()),
            logs: Vec::new(),
            released: false,
        }))
    }

    /// The file of a RAM disk's first contents, as a file of its own.
    async fn open_initial(
        &self,
        path: &Path,
        name: &str,
        deadline: Instant,
    ) -> Result<(OwnedFd, FileKey), Problem> {
        let request = OpenRequest {
            path: path.to_owned(),
            read_only: true,
            cache: CacheMode::Writeback,
            sector: None,
            formatted: false,
            user: initial_user(name),
            deadline: deadline.saturating_duration_since(Instant::now()),
        };
        let opened = self.files.open(request).await.map_err(problem)?;
        match opened.image.fd.try_clone() {
            Ok(fd) => Ok((fd, opened.key)),
            Err(error) => {
                let key = opened.key;
                drop(opened);
                self.files.release(key, &initial_user(name), RELEASE_TIMEOUT).await;
                Err(Problem::failed(format!("RAM disk {name}: {}: {error}", path.display())))
            }
        }
    }

    /// Gives an image back. The shard must not have it any more, unless it died with it.
    pub async fn release(&self, image: OpenImage, disk: &str) {
        let OpenImage { backend, held, logs, .. } = image;
        drop(backend);
        if !logs.is_empty() {
            self.logs.remove(logs, disk).await;
        }
        match held {
            Held::Nothing => {}
            Held::Ram(name) => {
                let mut rams = self.lock_rams();
                if let Some(ram) = rams.get_mut(&name) {
                    ram.users.remove(disk);
                    if ram.users.is_empty() {
                        rams.remove(&name);
                    }
                }
            }
            Held::File(key) => self.release_files(&[key], disk).await,
            Held::Chain(keys) => self.release_files(&keys, disk).await,
        }
    }

    async fn release_files(&self, keys: &[FileKey], disk: &str) {
        self.files.reap();
        for &key in keys {
            let released = self.files.release(key, disk, RELEASE_TIMEOUT).await;
            match released {
                Released::Closed | Released::StillUsed => {}
                Released::Closing | Released::Zombie | Released::Unknown => {
                    tracing::warn!(disk, "its image is not closed yet: {released:?}");
                }
            }
        }
    }

    /// Closes what a dead user has dropped since.
    pub fn reap(&self) {
        self.files.reap();
    }

    /// The last attachment of a RAM disk is gone: its memory goes as well. Nothing happens when the image is no RAM disk, or
    /// somebody has opened it again.
    pub async fn forget_ram(&self, spec: &ImageSpec) {
        let Ok(Target::Ram { name, .. }) = spec.target() else { return };
        let _turn = self.ram_turn.lock().await;
        if self.lock_rams().contains_key(&name) {
            return;
        }
        let dir = self.ram_dir.clone();
        let removed = tokio::task::spawn_blocking(move || {
            let removed =
                dir.existing().iter().try_for_each(|dir| shard::ram::remove_backing(dir.as_fd(), &name));
            dir.tidy();
            removed
        })
        .await;
        if let Ok(Err(error)) = removed {
            tracing::warn!("{error}");
        }
    }

    /// Bytes that the image occupies in its store; `None` when the store does not tell in time.
    pub async fn allocated_bytes(&self, image: &Measure) -> Option<u64> {
        match &image.0 {
            Held::Nothing => Some(0),
            Held::Ram(name) => self.lock_rams().get(name).map(|ram| ram.disk.allocated_bytes()),
            Held::File(key) => self.files.allocated_bytes(*key, Duration::from_secs(1)).await.ok(),
            Held::Chain(keys) => {
                // The first image's own: what is below it may belong to others, too.
                let key = *keys.first()?;
                self.files.allocated_bytes(key, Duration::from_secs(1)).await.ok()
            }
        }
    }

    fn lock_rams(&self) -> std::sync::MutexGuard<'_, HashMap<String, Ram>> {
        self.rams.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

/// Makes or takes up a RAM disk. Blocks.
fn make_ram(
    ram_dir: &RamDir,
    name: &str,
    size: u64,
    page: PageSize,
    budget: Arc<RamBudget>,
    contents: Option<OwnedFd>,
) -> Result<(Arc<RamDisk>, Option<String>), Problem> {
    let (dir, dir_file) = ram_dir.open(size)?;
    let backing = match shard::ram::open_backing(dir_file.as_fd(), name, size, page) {
        Ok(backing) => Some(backing),
        Err(error) if error.kind == RamErrorKind::WrongFileSystem && !ram_dir.is_given() => None,
        Err(error) => return Err(ram_problem(error)),
    };
    let (file, taken_up, named) = match backing {
        Some(backing) => (backing.file, backing.taken_up, true),
        None => (shard::ram::anonymous_backing(name, size, page).map_err(ram_problem)?, false, false),
    };
    let build = || {
        let disk = RamDisk::create(file, name, size, page, budget)?;
        if !taken_up && let Some(contents) = contents {
            disk.load_initial(&std::fs::File::from(contents))?;
        }
        if named && !taken_up {
            shard::ram::publish_backing(dir_file.as_fd(), name)?;
        }
        Ok(disk)
    };
    let disk = build().map_err(|error: RamError| {
        if named && !taken_up {
            // The error that matters is the first one.
            let _ = shard::ram::remove_backing(dir_file.as_fd(), name);
        }
        ram_problem(error)
    })?;
    let note = (!named).then(|| {
        format!(
            "RAM disk {name}: {} is not on the memory file system that it needs, so its contents end with the daemon; name a \
             tmpfs (for huge pages a hugetlbfs) with --ram-dir to keep them over a restart",
            dir.display()
        )
    });
    Ok((disk, note))
}

/// Who holds the file of first contents.
fn initial_user(name: &str) -> String {
    format!("the first contents of RAM disk {name}")
}

fn ram_problem(error: RamError) -> Problem {
    let kind = match error.kind {
        RamErrorKind::Invalid => ProblemKind::Invalid,
        RamErrorKind::Mismatch | RamErrorKind::Busy => ProblemKind::Conflict,
        RamErrorKind::WrongFileSystem
        | RamErrorKind::NoSpace
        | RamErrorKind::NoHugePages
        | RamErrorKind::Io => ProblemKind::Image,
    };
    Problem::new(kind, error.message)
}

fn problem(error: OpenError) -> Problem {
    let kind = match error.kind {
        OpenErrorKind::Busy => ProblemKind::Conflict,
        OpenErrorKind::Timeout => ProblemKind::TimedOut,
        OpenErrorKind::NotFound
        | OpenErrorKind::Permission
        | OpenErrorKind::OutsideRoots
        | OpenErrorKind::Unsupported
        | OpenErrorKind::Invalid
        | OpenErrorKind::Io => ProblemKind::Image,
    };
    Problem::new(kind, error.message)
}
