//! From a path to the object that it names, without trusting the path.
//!
//! The way: symbolic links are followed one mount at a time, each on the lane of the mount it is on, so that
//! a link into a dead mount hangs in the dead mount's lane. Then the object is opened with O_PATH, which asks
//! nothing of a driver (opening a tape rewinds it, opening a FIFO waits, opening a watchdog arms it), and its
//! type is checked. Only a regular file or a block device goes on to [`super::image`], which opens that very
//! object, not the path again.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Component, Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, open, openat, openat2};
use nix::sys::stat::{FileStat, Mode, SFlag, fstat};
use nix::unistd::{UnlinkatFlags, fsync, unlinkat};
use tokio::time::Instant;

use super::lanes::{Lanes, OnLane};
use super::mounts::{Mount, Mounts};
use super::{FileKey, OpenError, OpenErrorKind};

/// Links and `..` that are followed before the path is called a circle (the kernel's own bound for links is
/// 40).
const STEPS_MAX: usize = 64;

/// Opens objects by path.
pub struct Opener {
    lanes: Lanes,
    /// Empty: every path is allowed. Shared with calls in progress.
    roots: Mutex<Arc<[PathBuf]>>,
}

/// A regular file or block device, held by an O_PATH descriptor: identified, not yet opened for I/O.
#[derive(Debug)]
pub struct Object {
    fd: OwnedFd,
    /// Which file it is.
    pub key: FileKey,
    /// What fstat said.
    pub stat: FileStat,
    /// As the operator named it, for messages.
    pub path: PathBuf,
    /// The mount it is on.
    pub mount: Arc<Mount>,
}

impl Object {
    /// A path that opens this very object, whatever has happened to its name (proc(5), `/proc/PID/fd`).
    pub fn reopen_path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}", self.fd.as_raw_fd()))
    }
}

impl Opener {
    /// With no `roots` every path is allowed, else only what lies beneath one of them.
    pub fn new(lanes: Lanes, roots: Vec<PathBuf>) -> Result<Opener, OpenError> {
        let opener = Opener { lanes, roots: Mutex::new(Arc::from([])) };
        opener.set_roots(roots)?;
        Ok(opener)
    }

    /// Replaces the allowed directories; holds for what is opened from now on. The directories need not exist
    /// yet.
    pub fn set_roots(&self, roots: Vec<PathBuf>) -> Result<(), OpenError> {
        for root in &roots {
            check_absolute(root)
                .map_err(|error| OpenError::new(error.kind, format!("allowed_roots: {}", error.message)))?;
        }
        *self.roots.lock().unwrap_or_else(PoisonError::into_inner) = roots.into();
        Ok(())
    }

    fn roots(&self) -> Arc<[PathBuf]> {
        self.roots.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The pool.
    pub fn lanes(&self) -> &Lanes {
        &self.lanes
    }

    /// Finds the regular file or block device that `path` names.
    ///
    /// Errors: `Invalid` for a path that is not absolute and for any other kind of object, `OutsideRoots`,
    /// `NotFound`, `Permission`, `Timeout`, `Io`.
    pub async fn find(&self, path: &Path, deadline: Instant) -> Result<OnLane<Object>, OpenError> {
        check_absolute(path)?;
        let roots = self.roots();
        if !roots.is_empty() && !roots.iter().any(|root| path.starts_with(root)) {
            return Err(outside(path, path, &roots));
        }
        let (plain, mount) = self.follow_links(path, deadline).await?;
        let (lanes, at, named) = (self.lanes.clone(), mount.clone(), path.to_owned());
        self.lanes
            .run(&mount, deadline, path, "open it", move || {
                let fd = if roots.is_empty() {
                    let opened = open(&plain, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty());
                    opened.map_err(|errno| OpenError::from_io(&named, "open", &errno.into()))?
                } else {
                    open_beneath(&named, &plain, &roots)?
                };
                let stat = fstat(&fd).map_err(|errno| OpenError::from_io(&named, "fstat", &errno.into()))?;
                let key = disk_key(&named, &stat)?;
                Ok(OnLane::new(&lanes, &at, Object { fd, key, stat, path: named, mount: at.clone() }))
            })
            .await?
    }

    /// Makes a new file at `path` and runs `fill` on it, on the lane of its mount; a file that cannot be filled is removed.
    ///
    /// Errors: those of [`Opener::find`] for its directory; `Busy` when there is something at `path` already.
    pub async fn create(
        &self,
        path: &Path,
        deadline: Instant,
        fill: impl FnOnce(File) -> Result<(), OpenError> + Send + 'static,
    ) -> Result<(), OpenError> {
        let (directory, roots, mount) = self.directory_of(path, deadline).await?;
        let (named, name) = (path.to_owned(), path.file_name().unwrap_or_default().to_owned());
        let work = move || {
            let directory = open_directory(&named, &directory, &roots)?;
            let flags = OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
            let made = openat(&directory, &*name, flags, Mode::from_bits_truncate(0o600));
            let file = made.map_err(|errno| match errno {
                Errno::EEXIST => {
                    let message =
                        format!("{} exists: nothing is overwritten; name a new file", named.display());
                    OpenError::new(OpenErrorKind::Busy, message)
                }
                errno => OpenError::from_io(&named, "make it", &errno.into()),
            })?;
            let filled = fill(File::from(file)).and_then(|()| {
                fsync(&directory)
                    .map_err(|errno| OpenError::from_io(&named, "fsync its directory", &errno.into()))
            });
            if filled.is_err() {
                let _ = unlinkat(&directory, &*name, UnlinkatFlags::NoRemoveDir);
            }
            filled
        };
        self.lanes.run(&mount, deadline, path, "make it", work).await?
    }

    /// Removes a file that was made by [`Opener::create`].
    pub async fn remove(&self, path: &Path, deadline: Instant) -> Result<(), OpenError> {
        let (directory, roots, mount) = self.directory_of(path, deadline).await?;
        let (named, name) = (path.to_owned(), path.file_name().unwrap_or_default().to_owned());
        let work = move || {
            let directory = open_directory(&named, &directory, &roots)?;
            unlinkat(&directory, &*name, UnlinkatFlags::NoRemoveDir)
                .map_err(|errno| OpenError::from_io(&named, "remove it", &errno.into()))
        };
        self.lanes.run(&mount, deadline, path, "remove it", work).await?
    }

    /// The plain directory of a new file, the allowed directories, and the mount.
    async fn directory_of(
        &self,
        path: &Path,
        deadline: Instant,
    ) -> Result<(PathBuf, Arc<[PathBuf]>, Arc<Mount>), OpenError> {
        check_absolute(path)?;
        let (Some(parent), Some(_)) = (path.parent(), path.file_name()) else {
            let message = format!("{} names no file", path.display());
            return Err(OpenError::new(OpenErrorKind::Invalid, message));
        };
        let roots = self.roots();
        if !roots.is_empty() && !roots.iter().any(|root| path.starts_with(root)) {
            return Err(outside(path, path, &roots));
        }
        let (plain, mount) = self.follow_links(parent, deadline).await?;
        Ok((plain, roots, mount))
    }

    /// The same object's path without symbolic links and `..`, and its mount.
    async fn follow_links(&self, path: &Path, deadline: Instant) -> Result<(PathBuf, Arc<Mount>), OpenError> {
        let mut current = path.to_owned();
        for _ in 0..STEPS_MAX {
            // Read anew at each step: an automounter may have added one.
            let mounts = Mounts::read().map_err(|error| {
                OpenError::from_io(Path::new("/proc/self/mountinfo"), "read the mounts", &error)
            })?;
            // `..` is taken out by text only behind components that are known to be no links.
            let upto = current.components().position(|part| part == Component::ParentDir);
            let head: PathBuf = current.components().take(upto.unwrap_or(usize::MAX)).collect();
            let mount = mounts.of(&head).ok_or_else(|| {
                let message = format!("{}: no mount holds it; is /proc complete?", path.display());
                OpenError::new(OpenErrorKind::Io, message)
            })?;
            let (named, walked, point) = (path.to_owned(), current.clone(), mount.point.clone());
            let step = move || next_step(&walked, &point, &named);
            match self.lanes.run(&mount, deadline, path, "look it up", step).await?? {
                Some(next) => current = next,
                None => return Ok((current, mount)),
            }
        }
        Err(OpenError::from_io(path, "look it up", &Errno::ELOOP.into()))
    }
}

/// Walks `path` from the mount point on and replaces the first link or `..` in it; `None` when there is none.
/// Touches only the mount at `point`: everything before a component is free of links by then.
fn next_step(path: &Path, point: &Path, named: &Path) -> Result<Option<PathBuf>, OpenError> {
    let mut plain = PathBuf::new();
    let mut parts = path.components();
    while let Some(part) = parts.next() {
        let parent = plain.clone();
        match part {
            Component::ParentDir => {
                plain.pop();
                return Ok(Some(with_rest(plain, parts.as_path())));
            }
            other => plain.push(other),
        }
        if point.starts_with(&plain) {
            continue;
        }
        match std::fs::read_link(&plain) {
            Ok(target) => return Ok(Some(with_rest(parent.join(target), parts.as_path()))),
            Err(error) if error.raw_os_error() == Some(Errno::EINVAL as i32) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(missing(named, &plain)),
            Err(error) => return Err(OpenError::from_io(named, "look it up", &error)),
        }
    }
    Ok(None)
}

/// `join` alone would end the path in a slash where there is no rest, and ask for a directory.
fn with_rest(path: PathBuf, rest: &Path) -> PathBuf {
    if rest.as_os_str().is_empty() { path } else { path.join(rest) }
}

fn missing(named: &Path, plain: &Path) -> OpenError {
    let parent = plain.parent().unwrap_or(Path::new("/"));
    let message = format!(
        "{}: no such file: there is no {} in {}; check the path, and that its file system is mounted",
        named.display(),
        plain.file_name().unwrap_or_default().display(),
        parent.display()
    );
    OpenError::new(OpenErrorKind::NotFound, message)
}

fn check_absolute(path: &Path) -> Result<(), OpenError> {
    if path.is_absolute() {
        return Ok(());
    }
    let message = format!(
        "{:?} is no absolute path; expected one that begins with a slash",
        path.display().to_string()
    );
    Err(OpenError::new(OpenErrorKind::Invalid, message))
}

/// Opens the directory that a new file shall be in.
fn open_directory(named: &Path, plain: &Path, roots: &[PathBuf]) -> Result<OwnedFd, OpenError> {
    if !roots.is_empty() {
        // Found beneath an allowed directory; opened again to work in it.
        let parent = named.parent().unwrap_or(named);
        let found = open_beneath(parent, plain, roots)?;
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        return openat(&found, ".", flags, Mode::empty())
            .map_err(|errno| OpenError::from_io(named, "open its directory", &errno.into()));
    }
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    open(plain, flags, Mode::empty())
        .map_err(|errno| OpenError::from_io(named, "open its directory", &errno.into()))
}

/// Opens the object beneath one of `roots`; the kernel refuses every step that leaves the root.
///
/// The plain path is tried first, since RESOLVE_BENEATH refuses absolute links even if they lead back inside;
/// the named one second, since the root itself may have been configured through a link.
fn open_beneath(named: &Path, plain: &Path, roots: &[PathBuf]) -> Result<OwnedFd, OpenError> {
    for path in [plain, named] {
        for root in roots {
            let Ok(rest) = path.strip_prefix(root) else { continue };
            let directory = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
            let root_fd = open(root, directory, Mode::empty())
                .map_err(|errno| OpenError::from_io(root, "open the allowed directory", &errno.into()))?;
            let rest = if rest.as_os_str().is_empty() { Path::new(".") } else { rest };
            let how = OpenHow::new()
                .flags(OFlag::O_PATH | OFlag::O_CLOEXEC)
                .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_MAGICLINKS);
            match openat2(&root_fd, rest, how) {
                Ok(fd) => return Ok(fd),
                // EXDEV: it leaves the root; ELOOP: a magic link; EAGAIN: a rename raced with a `..`.
                Err(Errno::EXDEV | Errno::ELOOP | Errno::EAGAIN) => {}
                Err(errno) => return Err(OpenError::from_io(named, "open", &errno.into())),
            }
        }
    }
    Err(outside(named, plain, roots))
}

fn outside(named: &Path, plain: &Path, roots: &[PathBuf]) -> OpenError {
    let list: Vec<_> = roots.iter().map(|root| root.display().to_string()).collect();
    let leads = if named == plain { String::new() } else { format!(" (it leads to {})", plain.display()) };
    let message = format!(
        "{}{leads} is outside the allowed directories {}; move the image or add its directory to \
        allowed_roots in the configuration",
        named.display(),
        list.join(", ")
    );
    OpenError::new(OpenErrorKind::OutsideRoots, message)
}

/// What identifies the object, if it can hold a disk.
fn disk_key(path: &Path, stat: &FileStat) -> Result<FileKey, OpenError> {
    let kind = SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT;
    let found = match kind {
        SFlag::S_IFREG => return Ok(FileKey::Regular { device: stat.st_dev, inode: stat.st_ino }),
        SFlag::S_IFBLK => return Ok(FileKey::Block { device: stat.st_rdev }),
        SFlag::S_IFDIR => "a directory",
        SFlag::S_IFIFO => "a FIFO",
        SFlag::S_IFSOCK => "a socket",
        SFlag::S_IFCHR => "a character device",
        _ => "neither file nor device",
    };
    let message = format!(
        "{} is {found}; a disk needs a regular file or a block device: check the path",
        path.display()
    );
    Err(OpenError::new(OpenErrorKind::Invalid, message))
}
