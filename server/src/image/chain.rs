//! The gate through which images are opened: an image, what it refers to, and so on down.
//!
//! A path inside an image may have been written by anybody. So: only regular files are opened, block devices if the operator named them,
//! and nothing twice. What else holds for references holds for the daemon, too: [`crate::images::links`].

use std::path::{Path, PathBuf};
use std::rc::Rc;

use formats::crypt::Secret;
use formats::crypt::source::{KeySource, KeySources};
use formats::driver::{Description, Format, Identity, Link, Snapshot};
use formats::error::ErrorKind;
use formats::file::ImageFile;
use formats::registry;
use formats::tools::layers::LayerFiles;

use super::failure::Failure;
use super::file::{OpenFile, Want};
use super::name::ImageName;
use crate::files::FileKey;
use crate::images::links;
use crate::images::logs::{refuse_live, refuse_live_new};
use crate::keys;

/// What an operator allows images to name, and where a daemon may have left something of theirs.
#[derive(Debug)]
pub struct Gate {
    devices: Vec<FileKey>,
    run_dir: PathBuf,
}

impl Gate {
    /// These devices, and all regular files; the run directory of the daemon.
    ///
    /// # Errors
    /// One of them cannot be looked at.
    pub fn new(devices: &[PathBuf], run_dir: &Path) -> Result<Gate, Failure> {
        let key = |path: &PathBuf| OpenFile::open(path, Want::Look).map(|file| file.key);
        let devices = devices.iter().map(key).collect::<Result<_, _>>()?;
        Ok(Gate { devices, run_dir: run_dir.to_owned() })
    }

    /// Refuses a file to which acknowledged writes are missing that the log of a dead daemon has.
    ///
    /// # Errors
    /// It has such a log.
    pub fn refuse_live(&self, name: &ImageName, file: &OpenFile) -> Result<(), Failure> {
        refuse_live(&self.run_dir, file.key).map_err(|message| Failure::new(format!("{name}: {message}")))
    }

    /// The same for a file that was made a moment ago: its inode may be that of an image that was deleted.
    ///
    /// # Errors
    /// There is a log with that inode.
    pub fn refuse_live_new(&self, name: &ImageName, file: &OpenFile) -> Result<(), Failure> {
        refuse_live_new(&self.run_dir, &file.file)
            .map_err(|message| Failure::new(format!("{name}: {message}")))
    }

    /// Refuses a device that only an image has named.
    fn refuse_device(&self, file: &OpenFile, by: &ImageName) -> Result<(), Failure> {
        if !file.is_device() || self.devices.contains(&file.key) {
            return Ok(());
        }
        let path = file.path.display();
        Err(Failure::new(format!(
            "{by} names the block device {path}, which nobody has allowed: add --allow-device {path} if that is right"
        )))
    }
}

/// An image of a chain, opened and looked at.
#[derive(Debug)]
pub struct Opened {
    /// What it is called.
    pub name: ImageName,
    /// Its file, then its further files.
    pub files: Vec<OpenFile>,
    /// What it says of itself.
    pub description: Description,
    /// Its key, when it is encrypted and one was named.
    pub key: Option<Secret>,
}

impl Opened {
    /// Opens an image and the files that hold its data; what is below is not looked at.
    ///
    /// # Errors
    /// No such file, in use, no image of this format.
    pub fn open(name: &ImageName, want: Want, gate: &Gate) -> Result<Opened, Failure> {
        let mut file = OpenFile::open(&name.path, want)?;
        file.buffered = name.buffered;
        if want != Want::Look {
            gate.refuse_live(name, &file)?;
        }
        let blocking = file.blocking()?;
        let described = futures_lite::future::block_on(registry::describe(name.format, blocking));
        let description = described?;
        let mut files = vec![file];
        for link in &description.data_files {
            files.push(open_data_file(name, link, want, gate)?);
        }
        Ok(Opened { name: name.clone(), files, description, key: None })
    }

    /// How another image refers to this one that lies at `child`: paths (best first), type, identity; and its size.
    ///
    /// # Errors
    /// It is a snapshot inside an image: none can refer to that.
    pub fn link_from(&self, child: &ImageName) -> Result<(Link, u64), Failure> {
        links::check_parent(&self.name, self.name.snapshot.as_deref()).map_err(Failure::usage)?;
        let absolute = self.name.path.display().to_string();
        let relative = links::relative(&self.name.path, child.folder());
        let paths = match (relative, self.name.typed_absolute) {
            (None, _) => vec![absolute],
            (Some(relative), true) => vec![absolute, relative],
            (Some(relative), false) => vec![relative, absolute],
        };
        let modified = self.files.first().and_then(OpenFile::modified);
        // A raw image has a time alone.
        let uuid = self.description.identity.map_or([0; 16], |identity| identity.uuid);
        let identity = Some(Identity { uuid, modified });
        let link = Link { paths, format: Some(self.name.format.name().to_owned()), identity };
        Ok((link, self.description.size))
    }

    /// The snapshots inside it; none where the format has no such thing.
    ///
    /// # Errors
    /// Their table is damaged.
    pub fn snapshots(&self) -> Result<Vec<Snapshot>, Failure> {
        let found = futures_lite::future::block_on(self.name.format.snapshots(self.files[0].blocking()?));
        match found {
            Err(error) if error.kind == ErrorKind::Unsupported => Ok(Vec::new()),
            found => Ok(found?),
        }
    }

    /// Bytes of the disk: of a snapshot inside it, as it was then.
    ///
    /// # Errors
    /// There is no such snapshot.
    pub fn disk_size(&self) -> Result<u64, Failure> {
        let snapshots = match &self.name.snapshot {
            Some(wanted) => Some((wanted.as_str(), self.snapshots()?)),
            None => None,
        };
        let snapshot = snapshots.as_ref().map(|(wanted, all)| (*wanted, &all[..]));
        links::disk_size(&self.name, &self.description, snapshot).map_err(Failure::new)
    }
}

fn open_data_file(name: &ImageName, link: &Link, want: Want, gate: &Gate) -> Result<OpenFile, Failure> {
    let named = link.paths.first().map_or("", String::as_str);
    let path = links::resolve(named, &name.path).map_err(Failure::new)?;
    let opened = OpenFile::open(&path, want);
    let mut file = opened.map_err(|error| Failure {
        message: format!("the data file of {name}: {}", error.message),
        ..error
    })?;
    gate.refuse_device(&file, name)?;
    file.buffered = name.buffered;
    Ok(file)
}

/// Images from the top down.
#[derive(Debug)]
pub struct Chain {
    /// The first is the top.
    pub images: Vec<Opened>,
}

impl Chain {
    /// Opens an image and everything below it, to be read.
    ///
    /// # Errors
    /// Those of [`Opened::open`], and of the gate.
    pub fn open(name: &ImageName, gate: &Gate) -> Result<Chain, Failure> {
        Chain::open_for(name, &[], gate)
    }

    /// The same with other wants for the uppermost images.
    ///
    /// # Errors
    /// As for [`Chain::open`].
    pub fn open_for(name: &ImageName, wants: &[Want], gate: &Gate) -> Result<Chain, Failure> {
        let want = wants.first().copied().unwrap_or(Want::Read);
        let mut images = vec![Opened::open(name, want, gate)?];
        follow(&mut images, wants, gate)?;
        unlock(&mut images, &name.keys)?;
        let chain = Chain { images };
        chain.check_writable(wants)?;
        Ok(chain)
    }

    /// Opens everything below an image, to be read.
    ///
    /// # Errors
    /// As for [`Chain::open`]; nothing is below.
    pub fn open_below(image: &Opened, gate: &Gate) -> Result<Chain, Failure> {
        let Some(link) = &image.description.backing else {
            return Err(Failure::new(format!("{} has no parent", image.name)));
        };
        let own = image.files.iter().map(|file| file.key).collect::<Vec<_>>();
        let mut images = vec![open_parent(image, link, Want::Read, gate, &own)?];
        follow(&mut images, &[], gate)?;
        Ok(Chain { images })
    }

    fn check_writable(&self, wants: &[Want]) -> Result<(), Failure> {
        for (image, _) in self.images.iter().zip(wants).filter(|(_, want)| **want == Want::Write) {
            if let Err(reason) = &image.description.writable {
                return Err(Failure::new(format!("{} cannot be written: {reason}", image.name)));
            }
            if image.name.snapshot.is_some() {
                return Err(Failure::new(format!("{}: a snapshot inside an image is read-only", image.name)));
            }
        }
        Ok(())
    }

    /// All files, in the order of [`Shape::take`].
    pub fn files(&self) -> Vec<&OpenFile> {
        self.images.iter().flat_map(|image| &image.files).collect()
    }

    /// How many files each image has.
    pub fn shape(&self) -> Shape {
        let image = |image: &Opened| LayerShape {
            format: image.name.format,
            files: image.files.len(),
            snapshot: image.name.snapshot.clone(),
            key: image.key.clone(),
        };
        Shape(self.images.iter().map(image).collect())
    }

    /// The top.
    pub fn top(&self) -> &Opened {
        &self.images[0]
    }

    /// Bytes of the disk below the top.
    pub fn below_size(&self) -> Option<u64> {
        self.images.get(1).map(|image| image.description.size)
    }
}

/// Opens what the last image names as its parent, and so on.
fn follow(images: &mut Vec<Opened>, wants: &[Want], gate: &Gate) -> Result<(), Failure> {
    while let Some(last) = images.last()
        && let Some(link) = &last.description.backing
    {
        links::check_depth(images.len(), &images[0].name).map_err(Failure::new)?;
        let want = wants.get(images.len()).copied().unwrap_or(Want::Read);
        let above: Vec<_> = images.iter().flat_map(|image| &image.files).map(|file| file.key).collect();
        let parent = open_parent(last, link, want, gate, &above)?;
        images.push(parent);
    }
    Ok(())
}

/// Opens the encrypted images of a chain with the keys that were named for them. Without a key an image stays closed, which is enough
/// for who looks at tables only.
fn unlock(images: &mut [Opened], keys: &KeySources) -> Result<(), Failure> {
    let is_encrypted = |image: &Opened| image.description.encryption.is_some();
    let encrypted: Vec<_> = images.iter().map(is_encrypted).collect();
    keys.check_used(&encrypted).map_err(Failure::usage)?;
    for (number, image) in images.iter_mut().enumerate().filter(|(_, image)| is_encrypted(image)) {
        if let Some(warning) = image.description.encryption.as_ref().and_then(|found| found.warning) {
            eprintln!("blktapd image: {}: {warning}", image.name);
        }
        if let Some(source) = keys.of(number) {
            let secret = read_key(source)?;
            let file = image.files[0].blocking()?;
            let unlocked = futures_lite::future::block_on(image.name.format.unlock(file, &secret));
            image.key = Some(unlocked.map_err(|error| error.context(&format!("the key from {source}")))?);
        }
    }
    Ok(())
}

/// The key at a place.
///
/// # Errors
/// There is none.
pub fn read_key(source: &KeySource) -> Result<Secret, Failure> {
    let read = match source {
        KeySource::File(path) => keys::read_file(path, &path.display().to_string()),
        KeySource::Credential(name) => {
            keys::credential_path(name).and_then(|path| keys::read_file(&path, &source.to_string()))
        }
        KeySource::Descriptor(number) => {
            let path = format!("/proc/self/fd/{number}");
            let file = std::fs::File::open(&path)
                .map_err(|error| format!("the key cannot be read from descriptor {number}: {error}"));
            file.and_then(|file| keys::read(file, &format!("descriptor {number}")))
        }
    };
    read.map_err(Failure::new)
}

/// What has to be known of an image besides its files.
#[derive(Clone)]
struct LayerShape {
    format: &'static dyn Format,
    files: usize,
    snapshot: Option<String>,
    key: Option<Secret>,
}

/// Which files belong to which image.
#[derive(Clone)]
pub struct Shape(Vec<LayerShape>);

impl Shape {
    /// Takes the files of a chain from the front.
    pub fn take(&self, files: &mut std::vec::IntoIter<Rc<dyn ImageFile>>) -> Vec<LayerFiles> {
        let layer = |shape: &LayerShape| LayerFiles {
            format: shape.format,
            files: files.take(shape.files).collect(),
            snapshot: shape.snapshot.clone(),
            key: shape.key.clone(),
        };
        self.0.iter().map(layer).collect()
    }
}

/// Opens what `child` calls its parent: the first of its paths that is there and is what the child expects.
fn open_parent(
    child: &Opened,
    link: &Link,
    want: Want,
    gate: &Gate,
    above: &[FileKey],
) -> Result<Opened, Failure> {
    let name = &child.name;
    let format = links::parent_format(link, name).map_err(Failure::new)?;
    let (mut problem, mut missing) = (None, Vec::new());
    for path in &link.paths {
        let path = links::resolve(path, &name.path).map_err(Failure::new)?;
        let mut parent = ImageName::plain(format, path);
        parent.buffered = name.buffered;
        if !parent.path.exists() {
            missing.push(parent.path);
            continue;
        }
        // Before it is opened as an image: a loop would meet our own locks.
        let key = OpenFile::open(&parent.path, Want::Look)?;
        if above.contains(&key.key) {
            return Err(Failure::new(format!(
                "the parents of {name} go round in a circle: {parent} again; {}",
                links::advice(name)
            )));
        }
        gate.refuse_device(&key, name)?;
        match Opened::open(&parent, want, gate).and_then(|opened| check_identity(name, link, opened)) {
            Ok(opened) => return Ok(opened),
            Err(error) => problem = problem.or(Some(error)),
        }
    }
    Err(problem.map_or_else(
        || Failure::new(links::missing(link, name, &missing)),
        |error| Failure { message: format!("the parent of {name}: {}", error.message), ..error },
    ))
}

fn check_identity(child: &ImageName, link: &Link, parent: Opened) -> Result<Opened, Failure> {
    let modified = parent.files.first().and_then(OpenFile::modified);
    let note = links::check_identity(link, parent.description.identity, modified, (child, &parent.name));
    if let Some(note) = note.map_err(Failure::new)? {
        eprintln!("blktapd image: {note}");
    }
    Ok(parent)
}
