//! What the tests share: images in files of the system, and `qemu-img check` of them.

use std::path::{Path, PathBuf};

use crate::driver::{Findings, Format, Link, Open, Repair};
use crate::error::Error;
use crate::qcow2::Qcow2;
use crate::testing::at_once::{self, disk_files};
use crate::volume::Volume;

pub use crate::testing::DiskFile;
pub use crate::testing::at_once::{block_on, same};
pub use crate::testing::programs::{have_qemu, must_run, qemu_finds_nothing};

/// The disk of a chain: `layers` are (type, files), the first on top.
pub fn try_open(
    layers: &[(&str, Vec<PathBuf>)],
    writable: bool,
    snapshot: Option<&str>,
) -> Result<Volume, Error> {
    at_once::open_paths(layers, writable, snapshot)
}

/// [`try_open`] of a chain that opens.
pub fn open(layers: &[(&str, Vec<PathBuf>)], writable: bool) -> Volume {
    try_open(layers, writable, None).unwrap()
}

/// Files to work on offline.
pub fn open_of(paths: &[&Path], writable: bool) -> Open {
    at_once::open_of(disk_files(paths, writable), writable, Some(0))
}

pub fn check(paths: &[&Path], repair: Option<Repair>) -> Findings {
    block_on(Qcow2.check(open_of(paths, repair.is_some()), repair)).unwrap()
}

pub fn create(
    path: &Path,
    size: u64,
    backing: Option<(&Path, &str)>,
    options: &[(&str, &str)],
) -> Result<(), Error> {
    let mut paths = vec![path.to_owned()];
    let data_files = options.iter().filter(|(name, _)| *name == "data_file");
    paths.extend(data_files.map(|(_, name)| path.with_file_name(name)));
    let link = backing.map(|(path, format)| {
        let paths = vec![path.display().to_string()];
        (Link { paths, format: Some(format.to_owned()), identity: None }, size)
    });
    at_once::create("qcow2", &disk_files(&paths, true), Some(size), link, options)
}

pub fn read(volume: &Volume, offset: u64, len: u64) -> Vec<u8> {
    at_once::read(volume, offset, len).unwrap()
}

pub fn read_all(volume: &Volume) -> Vec<u8> {
    at_once::read_all(volume).unwrap()
}

pub fn write(volume: &Volume, offset: u64, bytes: &[u8]) {
    at_once::write(volume, offset, bytes).unwrap();
}

/// One random change of a disk and its model, in units of 512 bytes.
pub fn change(volume: &Volume, model: &mut [u8], rng: &mut fastrand::Rng) {
    at_once::change(volume, model, 512, rng).unwrap();
}

/// What QEMU reads of an image.
pub fn qemu_reads(image: &str, folder: &Path, snapshot: Option<&str>) -> Vec<u8> {
    crate::testing::programs::qemu_reads(folder, "qcow2", image, snapshot)
}
