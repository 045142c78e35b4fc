//! Images of formats with what is below them. Every file passes the gate before a byte of it is read: it is opened without side
//! effects and locked, then the gate looks at where it is, and only then somebody reads it.
//!
//! The gate: the image that the operator names may be anywhere he may name files; what that image names by itself (its parent, its
//! data file) must lie beside the image that names it or below that folder, or in an allowed directory of the
//! configuration, and be a regular file there. No file comes twice. What else holds for references holds for the offline tools, too:
//! [`super::links`].

use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use formats::crypt::Secret;
use formats::crypt::source::KeySource;
use formats::driver::{Create, Description, Format, Identity, Link};
use formats::spec::{FormatOptions, ImageSpec, Target};
use shard::alog::LogFile;
use shard::api::{Backend, ChainLayer, FileKind, ImageChain, ImageFile};
use tokio::time::Instant;

use super::links::{self, named_format};
use super::logs::refuse_live_new;
use super::{Held, Images, Measure, OpenImage, problem};
use crate::files::{FileKey, OpenError, OpenErrorKind, OpenRequest};
use crate::keys;
use crate::problem::{Problem, ProblemKind};

/// An image of a format that a disk wants.
pub(super) struct Wanted<'a> {
    pub format: &'static str,
    pub path: PathBuf,
    pub options: FormatOptions,
    pub read_only: bool,
    pub disk: &'a str,
    pub deadline: Instant,
}

/// The chain as far as it is open.
#[derive(Default)]
struct Chain {
    layers: Vec<ChainLayer>,
    keys: Vec<FileKey>,
    logs: Vec<Arc<LogFile>>,
    notes: Vec<String>,
}

fn image_problem(message: String) -> Problem {
    Problem::new(ProblemKind::Image, message)
}

/// A format that an operator named.
fn built_in(name: &str) -> Result<&'static dyn Format, Problem> {
    named_format(name).ok_or_else(|| image_problem(format!("the format {name} is not built in")))
}

/// Where a descriptor's file is now.
fn real_path(image: &ImageFile) -> Option<PathBuf> {
    std::fs::read_link(format!("/proc/self/fd/{}", image.fd.as_raw_fd())).ok()
}

impl Images {
    /// Opens an image and everything below it. Nothing stays open after an error.
    pub(super) async fn open_chain(&self, wanted: Wanted<'_>) -> Result<OpenImage, Problem> {
        let mut chain = Chain::default();
        let opened = self.open_layers(&wanted, &mut chain).await;
        self.finish_chain(chain, opened, wanted.disk).await
    }

    /// The image that a chain is, if everything of it could be opened; else gives back what was. `opened` is the size of the disk, in
    /// bytes, and the identity of its first image.
    async fn finish_chain(
        &self,
        chain: Chain,
        opened: Result<(u64, Option<Identity>), Problem>,
        disk: &str,
    ) -> Result<OpenImage, Problem> {
        let Chain { layers, keys, logs, notes } = chain;
        match opened {
            Ok((size_bytes, identity)) => Ok(OpenImage {
                backend: Backend::Image(Arc::new(ImageChain { layers })),
                size_bytes,
                block_bytes: 1,
                note: (!notes.is_empty()).then(|| notes.join("; ")),
                identity,
                held: Held::Chain(keys),
                logs,
                released: false,
            }),
            Err(error) => {
                drop(layers);
                self.logs.remove(logs, disk).await;
                self.release_files(&keys, disk).await;
                Err(error)
            }
        }
    }

    /// Returns the size of the first image, in bytes, and its identity.
    async fn open_layers(
        &self,
        wanted: &Wanted<'_>,
        chain: &mut Chain,
    ) -> Result<(u64, Option<Identity>), Problem> {
        let snapshot = wanted.options.snapshot.clone();
        if snapshot.is_some() && !wanted.read_only {
            return Err(Problem::invalid(format!(
                "{}: a snapshot inside an image is served read-only: add --read-only, or make an overlay over it with \
                 `blktapd image snapshot`",
                wanted.path.display()
            )));
        }
        let format = built_in(wanted.format)?;
        let (image, description) =
            self.open_layer(wanted, chain, format, wanted.path.clone(), wanted.read_only, None).await?;
        if let (false, Err(reason)) = (wanted.read_only, &description.writable) {
            return Err(image_problem(format!(
                "{} can only be read: {reason}; attach it with --read-only, or mend it with `blktapd image repair`",
                wanted.path.display()
            )));
        }
        let size = self.disk_size(wanted, chain, format, &description).await?;
        let identity = description.identity;
        let (mut above, mut above_path) = (description, self.place_of(&image, &wanted.path));
        while let Some(link) = above.backing.take() {
            links::check_depth(chain.layers.len(), wanted.path.display()).map_err(image_problem)?;
            let (image, description) = self.open_parent(wanted, chain, &link, &above_path).await?;
            above_path = self.place_of(&image, &above_path);
            above = description;
        }
        if let Some(layer) = chain.layers.first_mut() {
            layer.snapshot = snapshot;
        }
        let encrypted: Vec<_> = chain.layers.iter().map(|layer| layer.key.is_some()).collect();
        wanted.options.keys.check_used(&encrypted).map_err(Problem::invalid)?;
        Ok((size, identity))
    }

    /// Bytes of the disk that the first image of `chain` serves.
    async fn disk_size(
        &self,
        wanted: &Wanted<'_>,
        chain: &Chain,
        format: &'static dyn Format,
        description: &Description,
    ) -> Result<u64, Problem> {
        let snapshots = match (&wanted.options.snapshot, chain.keys.first()) {
            (Some(snapshot), Some(key)) => {
                let left = wanted.deadline.saturating_duration_since(Instant::now());
                let all = self.files.snapshots(*key, format, left).await.map_err(problem)?;
                Some((snapshot.as_str(), all))
            }
            _ => None,
        };
        let snapshot = snapshots.as_ref().map(|(wanted, all)| (*wanted, &all[..]));
        links::disk_size(wanted.path.display(), description, snapshot).map_err(image_problem)
    }

    fn place_of(&self, image: &ImageFile, named: &Path) -> PathBuf {
        real_path(image).unwrap_or_else(|| named.to_owned())
    }

    /// Opens one image with its data files and reads its header. `beside` is the image that named it, if one did.
    async fn open_layer(
        &self,
        wanted: &Wanted<'_>,
        chain: &mut Chain,
        format: &'static dyn Format,
        path: PathBuf,
        read_only: bool,
        beside: Option<&Path>,
    ) -> Result<(Arc<ImageFile>, Description), Problem> {
        let (image, key) = self.open_gated(wanted, chain, path.clone(), read_only, beside).await?;
        let left = wanted.deadline.saturating_duration_since(Instant::now());
        let description = self.files.describe(key, format, left).await.map_err(problem)?;
        let volume_key = self.unlock(wanted, chain, format, (key, &path), &description).await?;
        let name: Arc<str> = path.display().to_string().into();
        let (mut files, mut names, mut keys) = (vec![image.clone()], vec![name], vec![key]);
        let place = self.place_of(&image, &path);
        for link in &description.data_files {
            let named = link.paths.first().map_or("", String::as_str);
            let path = links::resolve(named, &place).map_err(image_problem)?;
            let (file, key) = self.open_gated(wanted, chain, path.clone(), read_only, Some(&place)).await?;
            files.push(file);
            keys.push(key);
            names.push(path.display().to_string().into());
        }
        let log = match read_only {
            true => {
                self.logs.refuse_live(key).await?;
                None
            }
            false => match self.open_log(wanted, &keys, &place, (format, &description)).await? {
                Ok(log) => Some(log),
                Err(note) => {
                    tracing::warn!(disk = wanted.disk, "{note}");
                    chain.notes.push(note);
                    None
                }
            },
        };
        chain.logs.extend(log.clone());
        chain.layers.push(ChainLayer {
            format,
            files,
            names,
            writable: !read_only,
            flush: false,
            snapshot: None,
            key: volume_key,
            log,
        });
        Ok((image, description))
    }

    /// The key at a place that an operator named.
    pub async fn read_key(&self, source: &KeySource, deadline: Instant) -> Result<Secret, Problem> {
        match source {
            KeySource::File(path) => self.files.read_key(path, deadline).await.map_err(problem),
            KeySource::Credential(name) => {
                let path = keys::credential_path(name).map_err(image_problem)?;
                let what = source.to_string();
                let read = tokio::task::spawn_blocking(move || keys::read_file(&path, &what));
                read.await.unwrap_or_else(|error| Err(error.to_string())).map_err(image_problem)
            }
            KeySource::Descriptor(number) => Err(Problem::invalid(format!(
                "key-fd={number}: a descriptor is of one process, and the daemon is another: use key-file= or key-credential="
            ))),
        }
    }

    /// The key of the next image of a chain, if it is encrypted.
    async fn unlock(
        &self,
        wanted: &Wanted<'_>,
        chain: &mut Chain,
        format: &'static dyn Format,
        (file, path): (FileKey, &Path),
        description: &Description,
    ) -> Result<Option<Secret>, Problem> {
        let Some(encryption) = &description.encryption else { return Ok(None) };
        let number = chain.layers.len();
        let Some(source) = wanted.options.keys.of(number) else {
            return Err(image_problem(format!(
                "{} is encrypted ({}) and no key was named for it: add key-file=PATH, or key-file-{number}=PATH for this image of the chain \
                 alone",
                path.display(),
                encryption.words
            )));
        };
        let secret = self.read_key(source, wanted.deadline).await?;
        if let Some(warning) = encryption.warning {
            chain.notes.push(format!("{}: {warning}", path.display()));
        }
        let turn = tokio::time::timeout_at(wanted.deadline, self.unlock_turn.clone().lock_owned()).await;
        let turn = turn.map_err(|_| {
            let message = format!("{}: other images are still being unlocked", path.display());
            Problem::new(ProblemKind::TimedOut, message)
        })?;
        let left = wanted.deadline.saturating_duration_since(Instant::now());
        let unlocked = self.files.unlock(file, format, secret, turn, left).await;
        unlocked.map(Some).map_err(|error| problem(error).context(&format!("the key from {source}")))
    }

    /// The log of an image whose files are open for writing.
    async fn open_log(
        &self,
        wanted: &Wanted<'_>,
        keys: &[FileKey],
        place: &Path,
        (format, description): (&dyn Format, &Description),
    ) -> Result<Result<Arc<LogFile>, String>, Problem> {
        let mut files = Vec::new();
        for key in keys {
            let left = wanted.deadline.saturating_duration_since(Instant::now());
            files.push((*key, self.files.born(*key, left).await.map_err(problem)?));
        }
        self.logs.open(&files, place, format.name(), description).await
    }

    /// Opens a file; one that an image named must be where the gate lets it be.
    async fn open_gated(
        &self,
        wanted: &Wanted<'_>,
        chain: &mut Chain,
        path: PathBuf,
        read_only: bool,
        beside: Option<&Path>,
    ) -> Result<(Arc<ImageFile>, FileKey), Problem> {
        let request = OpenRequest {
            path: path.clone(),
            read_only,
            cache: wanted.options.cache,
            sector: None,
            formatted: true,
            user: wanted.disk.to_owned(),
            deadline: wanted.deadline.saturating_duration_since(Instant::now()),
        };
        let opened = self.files.open(request).await.map_err(|error| {
            let problem = problem(error);
            match beside {
                Some(image) => problem.context(&format!("{} refers to a file", image.display())),
                None => problem,
            }
        })?;
        // The table has refused a file that the disk has already: a loop.
        chain.keys.push(opened.key);
        if let Some(image) = beside {
            self.check_gate(&opened.image, &path, image)?;
        }
        Ok((opened.image, opened.key))
    }

    fn check_gate(&self, file: &ImageFile, named: &Path, image: &Path) -> Result<(), Problem> {
        let place = self.place_of(file, named);
        let allowed = self.allowed_dirs();
        // With allowed directories the opener has let nothing else through.
        let listed = !allowed.is_empty();
        let beside = image.parent().is_some_and(|folder| place.starts_with(folder));
        if !listed && !beside {
            return Err(image_problem(format!(
                "{} refers to {}, which is neither beside it nor in an allowed directory: a guest could have written that \
                 name; move the file, or name its directory in allowed_dirs of the configuration",
                image.display(),
                place.display()
            )));
        }
        if matches!(file.kind, FileKind::Block { .. }) && !listed {
            return Err(image_problem(format!(
                "{} refers to the device {}: that is allowed only when allowed_dirs of the configuration has its directory",
                image.display(),
                place.display()
            )));
        }
        Ok(())
    }

    /// Opens the first of a link's paths that is what the image at `image` expects.
    async fn open_parent(
        &self,
        wanted: &Wanted<'_>,
        chain: &mut Chain,
        link: &Link,
        image: &Path,
    ) -> Result<(Arc<ImageFile>, Description), Problem> {
        let format = links::parent_format(link, image.display()).map_err(image_problem)?;
        let mut failure = None;
        for path in &link.paths {
            let path = links::resolve(path, image).map_err(image_problem)?;
            let (keys, layers) = (chain.keys.len(), chain.layers.len());
            let opened = self.open_layer(wanted, chain, format, path.clone(), true, Some(image)).await;
            let opened = opened.and_then(|(file, description)| {
                let found = description.identity;
                let modified = found.and_then(|identity| identity.modified);
                let checked = links::check_identity(link, found, modified, (image.display(), path.display()));
                chain.notes.extend(checked.map_err(image_problem)?);
                Ok((file, description))
            });
            match opened {
                Ok(opened) => return Ok(opened),
                Err(error) => {
                    chain.layers.truncate(layers);
                    let keys = chain.keys.split_off(keys);
                    self.release_files(&keys, wanted.disk).await;
                    failure.get_or_insert(error);
                }
            }
        }
        Err(failure.unwrap_or_else(|| image_problem(links::missing(link, image.display(), &[]))))
    }
}

/// Adds how the image at `child` names its parent relatively, behind the absolute name: formats that have a place for one name have the
/// absolute one, those that have several find each other again when their folder is moved. Blocks.
fn add_relative(link: &mut Link, child: &Path) {
    let absolute = link.paths.iter().find(|path| path.starts_with('/'));
    let folder = child.parent().unwrap_or(Path::new("/"));
    let relative = absolute.and_then(|parent| links::relative(Path::new(parent), folder));
    link.paths.extend(relative);
}

/// Overlays of live snapshots.
impl Images {
    /// Makes the file of an overlay. Nothing is overwritten, and nothing stays behind after an error.
    pub async fn create_overlay(
        &self,
        spec: &ImageSpec,
        mut create: Create,
        disk: &str,
        deadline: Instant,
    ) -> Result<(), Problem> {
        let path = PathBuf::from(&spec.path);
        let format = built_in(spec.image_type.name())?;
        let name = path.display().to_string();
        tracing::debug!(disk, "making the overlay {name}");
        let run_dir = self.logs.run_dir().to_owned();
        let fill = move |file: std::fs::File| {
            refuse_live_new(&run_dir, &file)
                .map_err(|message| OpenError::new(OpenErrorKind::Invalid, format!("{name}: {message}")))?;
            if let Some((link, _)) = &mut create.backing {
                add_relative(link, Path::new(&name));
            }
            let make = || {
                let file = formats::blocking::Blocking::new(file, &name, true)?;
                formats::blocking::wait(async {
                    format.create(file.clone(), Vec::new(), &create).await?;
                    formats::file::ImageFile::flush(&*file).await
                })
            };
            make()
                .map_err(|error: formats::error::Error| OpenError::new(OpenErrorKind::Invalid, error.message))
        };
        self.files.create(&path, deadline, fill).await.map_err(problem)
    }

    /// The identity that an open image has now; nobody writes to it meanwhile.
    pub async fn identity_now(
        &self,
        image: &Measure,
        spec: &ImageSpec,
        deadline: Instant,
    ) -> Result<Option<Identity>, Problem> {
        let key = image.first_file().ok_or_else(|| Problem::failed("it has no file"))?;
        let left = deadline.saturating_duration_since(Instant::now());
        let described = self.files.describe(key, built_in(spec.image_type.name())?, left).await;
        Ok(described.map_err(problem)?.identity)
    }

    /// Opens an overlay that was just made over `below`, alone. One whose link to `below` would be refused at the next attach is
    /// refused now.
    pub async fn open_overlay(
        &self,
        spec: &ImageSpec,
        below: (Arc<ImageFile>, &ImageSpec),
        disk: &str,
        deadline: Instant,
    ) -> Result<OpenImage, Problem> {
        let Target::Image { format, path, options } = spec.target()? else {
            return Err(image_problem(format!("{spec} is no overlay")));
        };
        let wanted = Wanted { format, path, options, read_only: false, disk, deadline };
        let mut chain = Chain::default();
        let format = built_in(wanted.format)?;
        let opened = self.open_layer(&wanted, &mut chain, format, wanted.path.clone(), false, None).await;
        let opened = opened.and_then(|(image, description)| {
            let (file, named) = below;
            self.check_gate(&file, Path::new(&named.path), &self.place_of(&image, &wanted.path))?;
            Ok((description.size, description.identity))
        });
        self.finish_chain(chain, opened, disk).await
    }

    /// Removes the file of an overlay that is not used.
    pub async fn remove_overlay(&self, spec: &ImageSpec, deadline: Instant) {
        if let Err(error) = self.files.remove(Path::new(&spec.path), deadline).await {
            tracing::warn!("the overlay of a snapshot that failed is left: {error}");
        }
    }

    /// A writer only reads these files from now on.
    pub async fn become_reader(&self, keys: &[FileKey], disk: &str) {
        for &key in keys {
            if let Err(error) = self.files.become_reader(key, std::time::Duration::from_secs(5)).await {
                tracing::warn!(disk, "others cannot share an image below a snapshot yet: {error}");
            }
        }
    }
}
