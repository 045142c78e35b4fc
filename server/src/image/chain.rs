//! The gate through which images are opened: an image, what it refers to, and so on down.
//!
//! A path inside an image may have been written by anybody. So: the type of what it names must be stated in the image (raw is never
//! guessed), only regular files are opened, block devices if the operator named them, nothing twice, and no more than
//! [`DEPTH_MAX`] images.

use std::path::{Path, PathBuf};
use std::rc::Rc;

use formats::driver::{Description, Format, Identity, Link};
use formats::file::ImageFile;
use formats::tools::layers::LayerFiles;
use formats::volume::DEPTH_MAX;

use super::failure::Failure;
use super::file::{OpenFile, Want};
use super::name::{ImageName, format};
use crate::files::FileKey;
use crate::images::logs::refuse_live;

/// Bytes at the start of a file that show what it is.
const HEAD_BYTES: usize = 64 << 10;

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
            refuse_live(&gate.run_dir, file.key)
                .map_err(|message| Failure::new(format!("{name}: {message}")))?;
        }
        let blocking = file.blocking()?;
        let described = futures_lite::future::block_on(name.format.describe(blocking.clone()));
        let description = described.map_err(|error| {
            let mut failure = Failure::from(error);
            if let Some(hint) = other_format(name.format, &*blocking) {
                failure.message = format!("{}; {hint}", failure.message);
            }
            failure
        })?;
        let mut files = vec![file];
        for link in &description.data_files {
            files.push(open_data_file(name, link, want, gate)?);
        }
        Ok(Opened { name: name.clone(), files, description })
    }

    /// How another image refers to this one that lies at `child`: paths (best first), type, identity; and its size.
    pub fn link_from(&self, child: &ImageName) -> (Link, u64) {
        let absolute = self.name.path.display().to_string();
        let relative = relative(&self.name.path, child.folder());
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
        (link, self.description.size)
    }
}

/// A path as seen from a folder, without symbolic links on the way.
fn relative(path: &Path, folder: &Path) -> Option<String> {
    let name = path.file_name()?;
    let to = path.parent()?.canonicalize().ok()?;
    let from = folder.canonicalize().ok()?;
    let common = to.components().zip(from.components()).take_while(|(a, b)| a == b).count();
    let up = from.components().skip(common).map(|_| "..".as_ref());
    let down = to.components().skip(common);
    let mut relative: PathBuf = up.chain(down.map(|part| part.as_os_str())).collect();
    relative.push(name);
    relative.into_os_string().into_string().ok()
}

/// What a file is instead, if it shows that.
fn other_format(asked: &dyn Format, file: &dyn ImageFile) -> Option<String> {
    let length = file.length();
    let read = |offset, len: usize| futures_lite::future::block_on(file.read(offset, len)).ok();
    let head = read(0, HEAD_BYTES.min(length as usize))?;
    let tail = read(length.saturating_sub(512), 512.min(length as usize))?;
    let found = formats::registry::recognise(&head, &tail)?;
    (found.name() != asked.name())
        .then(|| format!("it looks like {0}: write {0}:{1}", found.name(), file.name()))
}

fn open_data_file(name: &ImageName, link: &Link, want: Want, gate: &Gate) -> Result<OpenFile, Failure> {
    let path = link.paths.first().map(|path| name.folder().join(path));
    let path = path.ok_or_else(|| Failure::new(format!("{name} does not name its data file")))?;
    let opened = OpenFile::open(&path, want);
    let mut file = opened.map_err(|error| Failure {
        message: format!("the data file of {name}: {}", error.message),
        ..error
    })?;
    check_device(&file, name, gate)?;
    file.buffered = name.buffered;
    Ok(file)
}

fn check_device(file: &OpenFile, by: &ImageName, gate: &Gate) -> Result<(), Failure> {
    if !file.is_device() || gate.devices.contains(&file.key) {
        return Ok(());
    }
    let path = file.path.display();
    Err(Failure::new(format!(
        "{by} names the block device {path}, which nobody has allowed: add --allow-device {path} if that is right"
    )))
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
        let image = |image: &Opened| (image.name.format, image.files.len(), image.name.snapshot.clone());
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
        if images.len() == DEPTH_MAX {
            return Err(Failure::new(format!(
                "the chain of {} has more than {DEPTH_MAX} images: shorten it with image coalesce",
                images[0].name
            )));
        }
        let want = wants.get(images.len()).copied().unwrap_or(Want::Read);
        let above: Vec<_> = images.iter().flat_map(|image| &image.files).map(|file| file.key).collect();
        let parent = open_parent(last, link, want, gate, &above)?;
        images.push(parent);
    }
    Ok(())
}

/// Which files belong to which image.
#[derive(Clone)]
pub struct Shape(Vec<(&'static dyn Format, usize, Option<String>)>);

impl Shape {
    /// Takes the files of a chain from the front.
    pub fn take(&self, files: &mut std::vec::IntoIter<Rc<dyn ImageFile>>) -> Vec<LayerFiles> {
        let layer = |(format, count, snapshot): &(&'static dyn Format, usize, Option<String>)| LayerFiles {
            format: *format,
            files: files.take(*count).collect(),
            snapshot: snapshot.clone(),
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
    let advice = format!("give it the right one with image rebase --unsafe --parent TYPE:PATH {name}");
    let Some(type_name) = &link.format else {
        return Err(Failure::new(format!(
            "{name} does not say of which type its parent {:?} is, and that is not guessed: {advice}",
            link.paths.first().map_or("", String::as_str)
        )));
    };
    let format = format(type_name).map_err(|error| Failure::new(format!("the parent of {name}: {error}")))?;
    let mut problem = None;
    for path in &link.paths {
        let mut parent = ImageName::plain(format, name.folder().join(path));
        parent.buffered = name.buffered;
        if !parent.path.exists() {
            continue;
        }
        // Before it is opened as an image: a loop would meet our own locks.
        let key = OpenFile::open(&parent.path, Want::Look)?;
        if above.contains(&key.key) {
            return Err(Failure::new(format!(
                "the parents of {name} go round in a circle: {parent} again; {advice}"
            )));
        }
        check_device(&key, name, gate)?;
        match Opened::open(&parent, want, gate).and_then(|opened| check_identity(name, link, opened)) {
            Ok(opened) => return Ok(opened),
            Err(error) => problem = problem.or(Some(error)),
        }
    }
    Err(problem.map_or_else(
        || {
            let tried: Vec<_> =
                link.paths.iter().map(|path| name.folder().join(path).display().to_string()).collect();
            Failure::new(format!(
                "the parent of {name} is missing: there is no {}; {advice}",
                tried.join(", nor ")
            ))
        },
        |error| Failure { message: format!("the parent of {name}: {}", error.message), ..error },
    ))
}

fn check_identity(child: &ImageName, link: &Link, parent: Opened) -> Result<Opened, Failure> {
    let (Some(expected), Some(found)) = (link.identity, parent.description.identity) else {
        return Ok(parent);
    };
    let show = |uuid: [u8; 16]| format!("{:032x}", u128::from_be_bytes(uuid));
    if expected.uuid != found.uuid {
        return Err(Failure::new(format!(
            "{} is another image than the one that {child} was made over: it is {}, expected {}",
            parent.name,
            show(found.uuid),
            show(expected.uuid)
        )));
    }
    let changed = parent.files.first().and_then(OpenFile::modified);
    if let (Some(expected), Some(changed)) = (expected.modified, changed)
        && expected != changed
    {
        eprintln!(
            "blktapd image: {}: its time of modification is not the one that {child} remembers",
            parent.name
        );
    }
    Ok(parent)
}
