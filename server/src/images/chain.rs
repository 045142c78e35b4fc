//! Images of formats with what is below them: every file passes the gate before it is read.
//!
//! The gate: the image that the operator names may be anywhere he may name files; what that image names by itself (its parent, its
//! data file) must lie beside the image that names it or below that folder, or in an allowed directory of the
//! configuration, and be a regular file there. Its type is the one that is stated; raw is never guessed. No file comes twice, and no
//! chain is deeper than [`formats::volume::DEPTH_MAX`].

use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use formats::driver::{Create, Description, Format, Identity, Link};
use formats::spec::{FormatOptions, ImageSpec, Target};
use formats::volume::DEPTH_MAX;
use shard::alog::LogFile;
use shard::api::{Backend, ChainLayer, FileKind, ImageChain, ImageFile};
use tokio::time::Instant;

use super::{Held, Images, OpenImage, problem};
use crate::files::{FileKey, OpenError, OpenErrorKind, OpenRequest};
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

/// Names that other programs have for our formats.
fn format_named(name: &str) -> Option<&'static dyn Format> {
    formats::registry::format(if name == "vpc" { "vhd" } else { name })
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
        let keys = std::mem::take(&mut chain.keys);
        match opened {
            Ok((size_bytes, identity)) => {
                let note = (!chain.notes.is_empty()).then(|| chain.notes.join("; "));
                let backend = Backend::Image(Arc::new(ImageChain { layers: chain.layers }));
                let (held, logs) = (Held::Chain(keys), chain.logs);
                Ok(OpenImage {
                    backend,
                    size_bytes,
                    block_bytes: 1,
                    note,
                    identity,
                    held,
                    logs,
                    released: false,
                })
            }
            Err(error) => {
                let logs = std::mem::take(&mut chain.logs);
                drop(chain);
                self.logs.remove(logs, wanted.disk).await;
                self.release_files(&keys, wanted.disk).await;
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
        let format = format_named(wanted.format)
            .ok_or_else(|| image_problem(format!("the format {} is not built in", wanted.format)))?;
        let (image, description) =
            self.open_layer(wanted, chain, format, wanted.path.clone(), wanted.read_only, None).await?;
        if let (false, Err(reason)) = (wanted.read_only, &description.writable) {
            return Err(image_problem(format!(
                "{} can only be read: {reason}; attach it with --read-only, or mend it with `blktapd image repair`",
                wanted.path.display()
            )));
        }
        let (size, identity) = (description.size, description.identity);
        let (mut above, mut above_path) = (description, self.place_of(&image, &wanted.path));
        while let Some(link) = above.backing.take() {
            if chain.layers.len() >= DEPTH_MAX {
                return Err(image_problem(format!(
                    "{}: the chain of images is deeper than {DEPTH_MAX}: shorten it with `blktapd image coalesce`",
                    wanted.path.display()
                )));
            }
            let (image, description) = self.open_parent(wanted, chain, &link, &above_path).await?;
            check_identity(&link, &description, &above_path, chain)?;
            above_path = self.place_of(&image, &above_path);
            above = description;
        }
        if let Some(layer) = chain.layers.first_mut() {
            layer.snapshot = snapshot;
        }
        Ok((size, identity))
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
        let name: Arc<str> = path.display().to_string().into();
        let (mut files, mut names, mut keys) = (vec![image.clone()], vec![name], vec![key]);
        let place = self.place_of(&image, &path);
        for link in &description.data_files {
            let path = resolve(link, &place)?;
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
            false => match self.logs.open(&keys, &place, format.name(), &description).await? {
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
            log,
        });
        Ok((image, description))
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

    /// Opens the first of a link's paths that can be opened.
    async fn open_parent(
        &self,
        wanted: &Wanted<'_>,
        chain: &mut Chain,
        link: &Link,
        image: &Path,
    ) -> Result<(Arc<ImageFile>, Description), Problem> {
        let format = link.format.as_deref().ok_or_else(|| {
            image_problem(format!(
                "{} does not say of which type its parent {} is, and raw is never guessed: state it with `blktapd image \
                 rebase --unsafe`",
                image.display(),
                link.paths.first().map_or("", String::as_str)
            ))
        })?;
        let format = format_named(format).ok_or_else(|| {
            image_problem(format!(
                "{}: its parent is of type {format}, which is not built in",
                image.display()
            ))
        })?;
        let mut failure = None;
        for path in &link.paths {
            let single = Link { paths: vec![path.clone()], ..link.clone() };
            let path = resolve(&single, image)?;
            let before = chain.keys.len();
            match self.open_layer(wanted, chain, format, path, true, Some(image)).await {
                Ok(opened) => return Ok(opened),
                Err(error) => {
                    let keys = chain.keys.split_off(before);
                    self.release_files(&keys, wanted.disk).await;
                    failure.get_or_insert(error);
                }
            }
        }
        Err(failure.unwrap_or_else(|| {
            image_problem(format!("{} has a parent and does not say where", image.display()))
        }))
    }
}

/// The path that a link means, seen from the image that has it.
fn resolve(link: &Link, image: &Path) -> Result<PathBuf, Problem> {
    let text = link.paths.first().map_or("", String::as_str);
    if text.is_empty() || text.contains('\0') {
        return Err(image_problem(format!("{} refers to a file without a name", image.display())));
    }
    let path = Path::new(text);
    if path.is_absolute() {
        return Ok(path.to_owned());
    }
    Ok(image.parent().unwrap_or(Path::new("/")).join(path))
}

/// The parent is the one that the child was made over.
fn check_identity(link: &Link, parent: &Description, child: &Path, chain: &mut Chain) -> Result<(), Problem> {
    let (Some(expected), Some(found)) = (link.identity, parent.identity) else { return Ok(()) };
    let hex = |uuid: [u8; 16]| uuid.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    if expected.uuid != found.uuid {
        return Err(image_problem(format!(
            "{}: its parent has the identity {}, and {} is expected: it is another image, or was made anew; data would be \
             wrong; find the right parent, or name it with `blktapd image rebase`",
            child.display(),
            hex(found.uuid),
            hex(expected.uuid)
        )));
    }
    if let (Some(expected), Some(found)) = (expected.modified, found.modified)
        && expected != found
    {
        chain.notes.push(format!(
            "the parent of {} was changed after the child was made (time stamps {expected} and {found})",
            child.display()
        ));
    }
    Ok(())
}

/// Overlays of live snapshots.
impl Images {
    /// Makes the file of an overlay. Nothing is overwritten, and nothing stays behind after an error.
    pub async fn create_overlay(
        &self,
        spec: &ImageSpec,
        create: Create,
        disk: &str,
        deadline: Instant,
    ) -> Result<(), Problem> {
        let path = PathBuf::from(&spec.path);
        let format = format_named(spec.image_type.name())
            .ok_or_else(|| image_problem(format!("the format {} is not built in", spec.image_type)))?;
        let name = path.display().to_string();
        tracing::debug!(disk, "making the overlay {name}");
        let fill = move |file: std::fs::File| {
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
        let wanted = Wanted { format: format.name(), path, options, read_only: false, disk, deadline };
        let mut chain = Chain::default();
        let format = format_named(wanted.format)
            .ok_or_else(|| image_problem(format!("the format {} is not built in", wanted.format)))?;
        let opened = self.open_layer(&wanted, &mut chain, format, wanted.path.clone(), false, None).await;
        let opened = opened.and_then(|(image, description)| {
            let (file, named) = below;
            self.check_gate(&file, Path::new(&named.path), &self.place_of(&image, &wanted.path))?;
            Ok((description.size, description.identity))
        });
        let keys = std::mem::take(&mut chain.keys);
        match opened {
            Ok((size_bytes, identity)) => {
                let backend = Backend::Image(Arc::new(ImageChain { layers: chain.layers }));
                let (held, logs) = (Held::Chain(keys), chain.logs);
                let note = chain.notes.pop();
                Ok(OpenImage {
                    backend,
                    size_bytes,
                    block_bytes: 1,
                    note,
                    identity,
                    held,
                    logs,
                    released: false,
                })
            }
            Err(error) => {
                let logs = std::mem::take(&mut chain.logs);
                drop(chain);
                self.logs.remove(logs, disk).await;
                self.release_files(&keys, disk).await;
                Err(error)
            }
        }
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
