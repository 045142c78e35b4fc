//! Goal: VMDKs mean the same to us and to others, and nothing that is wrong with one does harm. Method: each file says.

mod chain;
mod damage;
mod descriptor;
mod foreign;
mod peers;
mod stream;

use std::path::Path;
use std::process::Command;
use std::rc::Rc;

use crate::blocking::{Blocking, wait};
use crate::driver::{Budget, Create, Findings, Format, Link, Open, Repair};
use crate::error::Error;
use crate::file::ImageFile;
use crate::testing::rig;
use crate::vmdk::Vmdk;
use crate::volume::{Layer, Volume};

const MIB: u64 = 1 << 20;

/// Runs a program of QEMU in a folder; returns what it printed.
fn qemu(folder: &Path, arguments: &[&str]) -> Result<String, String> {
    let output =
        Command::new("timeout").args(["-s", "KILL", "60"]).args(arguments).current_dir(folder).output();
    let output = output.unwrap();
    assert!(output.status.code() != Some(127), "{}: install qemu-utils", arguments[0]);
    let text = [String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr)].concat();
    let line = text.lines().find(|line| line.contains("fail") || line.contains("error")).unwrap_or(&text);
    if output.status.success() { Ok(text) } else { Err(format!("{}: {line}", arguments[0])) }
}

/// The files of an image.
fn files(path: &Path, writable: bool) -> Result<Vec<Rc<dyn ImageFile>>, Error> {
    let own: Rc<dyn ImageFile> = Blocking::open(path, writable)?;
    let description = wait(Vmdk.describe(own.clone()))?;
    let mut files = vec![own];
    for link in description.data_files {
        files.push(Blocking::open(&path.with_file_name(&link.paths[0]), writable)?);
    }
    Ok(files)
}

/// An image without anything below it.
fn open_of(path: &Path, writable: bool, below_size: Option<u64>) -> Result<Open, Error> {
    let files = files(path, writable)?;
    Ok(Open {
        files,
        writable,
        below_size,
        budget: Budget::new(1 << 20),
        log: None,
        snapshot: None,
        key: None,
    })
}

/// An image with its parents, which are beside it.
fn open(path: &Path, writable: bool) -> Result<Volume, Error> {
    let mut paths = vec![path.to_owned()];
    while let Some(link) = wait(Vmdk.describe(Blocking::open(&paths[paths.len() - 1], false)?))?.backing {
        paths.push(path.with_file_name(&link.paths[0]));
    }
    let mut layers: Vec<Layer> = Vec::new();
    for (number, path) in paths.iter().enumerate().rev() {
        let below = layers.first().map(|below| below.driver.size());
        let open = open_of(path, writable && number == 0, below)?;
        let files = open.files.clone();
        layers.insert(0, Layer { driver: wait(Vmdk.open(open))?, files });
    }
    Volume::new(layers)
}

fn check(path: &Path, repair: Option<Repair>) -> Findings {
    let below = wait(Vmdk.describe(Blocking::open(path, false).unwrap())).unwrap().backing.map(|_| MIB);
    wait(Vmdk.check(open_of(path, repair.is_some(), below).unwrap(), repair)).unwrap()
}

fn assert_clean(path: &Path, what: &str) {
    let found = check(path, None);
    assert_eq!((found.corruptions, found.leaks), (vec![], vec![]), "{what}");
}

/// Makes an image, over `parent` if there is one.
fn create(
    path: &Path,
    size: Option<u64>,
    parent: Option<&Path>,
    options: &[(&str, &str)],
) -> Result<(), Error> {
    let backing = parent.map(|parent| {
        let name = parent.file_name().unwrap().to_string_lossy().into_owned();
        let description = wait(Vmdk.describe(Blocking::open(parent, false).unwrap())).unwrap();
        let link =
            Link { paths: vec![name], format: Some("vmdk".to_owned()), identity: description.identity };
        (link, description.size)
    });
    let options = options.iter().map(|(key, value)| (key.to_string(), value.to_string())).collect();
    let create = Create { size, backing, options, key: None };
    let new = |path: &Path| -> Result<Rc<dyn ImageFile>, Error> {
        std::fs::write(path, "").unwrap();
        Ok(Blocking::open(path, true)?)
    };
    let names = Vmdk.data_files(&create, &path.file_name().unwrap().to_string_lossy())?;
    let data = names.iter().map(|name| new(&path.with_file_name(name))).collect::<Result<_, _>>()?;
    wait(Vmdk.create(new(path)?, data, &create))
}

fn write(volume: &Volume, at: u64, bytes: &[u8]) {
    wait(rig::write(volume, at, bytes)).unwrap();
}

fn read(volume: &Volume, at: u64, len: u64) -> Vec<u8> {
    wait(rig::read(volume, at, len)).unwrap().to_vec()
}

/// What an image says of its contents.
fn cid(path: &Path) -> u32 {
    super::cid_of(wait(Vmdk.describe(Blocking::open(path, false).unwrap())).unwrap().identity).unwrap()
}
