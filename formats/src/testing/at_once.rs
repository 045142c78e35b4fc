//! Chains over files whose operations are done when they are made ([`DiskFile`], [`MemFile::alone`](super::MemFile::alone)), and
//! what tests do with them: for the tests in a format's own folder, where the schedule of the simulated store plays no part.

use std::path::{Path, PathBuf};
use std::rc::Rc;

pub use futures_lite::future::block_on;

use super::DiskFile;
use super::rig;
use crate::driver::{Budget, Create, Erase, Link, Open};
use crate::error::Error;
use crate::file::ImageFile;
use crate::registry;
use crate::volume::{Layer, Volume};

/// Memory for tables of a chain, in bytes: little, so that they come and go.
const BUDGET_BYTES: usize = 256 << 10;

/// The files of an image, as its driver numbers them.
pub type Files = Vec<Rc<dyn ImageFile>>;

/// Files of the system.
pub fn disk_files<P: AsRef<Path>>(paths: &[P], writable: bool) -> Files {
    paths.iter().map(|path| DiskFile::open(path.as_ref(), writable) as Rc<dyn ImageFile>).collect()
}

/// How to open an image by itself.
pub fn open_of(files: Files, writable: bool, below_size: Option<u64>) -> Open {
    Open {
        files,
        writable,
        below_size,
        budget: Budget::new(BUDGET_BYTES),
        log: None,
        snapshot: None,
        key: None,
    }
}

/// The disk of a chain; `layers` are type and files, the first on top and the only one that may be written.
///
/// # Errors
/// A format refuses, or there is none of this name.
pub fn open_files(layers: &[(&str, Files)], writable: bool, snapshot: Option<&str>) -> Result<Volume, Error> {
    let budget = Budget::new(BUDGET_BYTES);
    let mut opened: Vec<Layer> = Vec::new();
    for (number, (kind, files)) in layers.iter().enumerate().rev() {
        let format = registry::format(kind).ok_or_else(|| Error::invalid(format!("no format {kind}")))?;
        let open = Open {
            budget: budget.clone(),
            snapshot: snapshot.filter(|_| number == 0).map(str::to_owned),
            ..open_of(files.clone(), writable && number == 0, opened.first().map(|layer| layer.driver.size()))
        };
        opened.insert(0, Layer { driver: block_on(format.open(open))?, files: files.clone() });
    }
    Volume::new(opened)
}

/// [`open_files`] of files of the system.
///
/// # Errors
/// As [`open_files`].
pub fn open_paths(
    layers: &[(&str, Vec<PathBuf>)],
    writable: bool,
    snapshot: Option<&str>,
) -> Result<Volume, Error> {
    let layers: Vec<(&str, Files)> = layers
        .iter()
        .enumerate()
        .map(|(number, (kind, paths))| (*kind, disk_files(paths, writable && number == 0)))
        .collect();
    open_files(&layers, writable, snapshot)
}

/// Makes an image of the format `kind` in the first of `files`; the others are its data files.
///
/// # Errors
/// The format refuses, or there is none of this name.
pub fn create(
    kind: &str,
    files: &[Rc<dyn ImageFile>],
    size: Option<u64>,
    backing: Option<(Link, u64)>,
    options: &[(&str, &str)],
) -> Result<(), Error> {
    let format = registry::format(kind).ok_or_else(|| Error::invalid(format!("no format {kind}")))?;
    let Some((first, data_files)) = files.split_first() else {
        return Err(Error::invalid("an image has a file"));
    };
    let options = options.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect();
    block_on(format.create(first.clone(), data_files.to_vec(), &Create { size, backing, options, key: None }))
}

/// Reads `len` bytes at `offset`.
///
/// # Errors
/// Those of the volume.
pub fn read(volume: &Volume, offset: u64, len: u64) -> Result<Vec<u8>, Error> {
    block_on(rig::read(volume, offset, len)).map(|bytes| bytes.to_vec())
}

/// Reads a whole disk.
///
/// # Errors
/// Those of the volume.
pub fn read_all(volume: &Volume) -> Result<Vec<u8>, Error> {
    block_on(rig::read_all(volume))
}

/// Writes bytes.
///
/// # Errors
/// Those of the volume.
pub fn write(volume: &Volume, offset: u64, bytes: &[u8]) -> Result<(), Error> {
    block_on(rig::write(volume, offset, bytes))
}

/// `len` random bytes, none of them zero.
pub fn nonzero(rng: &mut fastrand::Rng, len: u64) -> Vec<u8> {
    (0..len).map(|_| rng.u8(1..)).collect()
}

/// One random change of a disk and of the bytes that it shall hold, in multiples of `unit` bytes.
///
/// # Errors
/// Those of the volume.
///
/// # Panics
/// A discard shows bytes that are neither the old ones nor zero.
pub fn change(volume: &Volume, model: &mut [u8], unit: u64, rng: &mut fastrand::Rng) -> Result<(), Error> {
    let units = model.len() as u64 / unit;
    let start = rng.u64(..units);
    let most = if rng.u8(..4) == 0 { (300 << 10) / unit } else { (8 << 10) / unit };
    let len = rng.u64(1..=most.max(1)).min(units - start);
    let (offset, bytes) = (start * unit, len * unit);
    let range = offset as usize..(offset + bytes) as usize;
    let how = match rng.u8(..10) {
        0..=6 => {
            let data = nonzero(rng, bytes);
            write(volume, offset, &data)?;
            model[range].copy_from_slice(&data);
            return Ok(());
        }
        7 => Erase::Zero,
        8 => Erase::ZeroKeep,
        _ => Erase::Discard,
    };
    block_on(volume.erase(offset, bytes, how))?;
    if how != Erase::Discard {
        model[range].fill(0);
        return Ok(());
    }
    // A discard may leave parts as they were; what it left is what it shows.
    let shown = read(volume, offset, bytes)?;
    for (old, new) in model[range].iter_mut().zip(shown) {
        assert!(new == *old || new == 0, "a discard shows foreign bytes");
        *old = new;
    }
    Ok(())
}

/// Fails the test with the first place where two disks differ.
///
/// # Panics
/// They differ.
#[track_caller]
pub fn same(what: &str, ours: &[u8], theirs: &[u8]) {
    assert_eq!(ours.len(), theirs.len(), "{what}: sizes");
    if let Some(at) = ours.iter().zip(theirs).position(|(a, b)| a != b) {
        panic!("{what}: byte {at} is {:#x} and should be {:#x}", ours[at], theirs[at]);
    }
}
