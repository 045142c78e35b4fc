//! Tests of the VHD driver: files to run it on, and the suites.

mod chain;
mod crash;
mod damage;
mod encrypted;
mod model;
mod others;
mod plans;
mod space;
mod suites;

use std::rc::Rc;

use crate::driver::{Description, Findings, Format, Link, Open, Repair};
use crate::error::Error;
use crate::file::{Buf, ImageFile};
use crate::testing::{MemFile, Pages, at_once};
use crate::vhd::Vhd;
use crate::volume::{Layer, Volume};

pub use crate::testing::at_once::{block_on, nonzero, read, write};

/// A file in memory.
pub fn mem(pages: &Pages, writable: bool) -> Rc<MemFile> {
    MemFile::alone("mem.vhd", pages.clone(), writable)
}

/// An empty file in memory.
pub fn empty() -> Rc<dyn ImageFile> {
    mem(&Pages::empty(), true)
}

/// How to open a file.
pub fn open_of(file: &Rc<dyn ImageFile>, writable: bool, below_size: Option<u64>) -> Open {
    at_once::open_of(vec![file.clone()], writable, below_size)
}

/// Makes an image.
pub fn create(
    file: &Rc<dyn ImageFile>,
    size: Option<u64>,
    backing: Option<(Link, u64)>,
    options: &[(&str, &str)],
) {
    try_create(file, size, backing, options).unwrap();
}

/// Makes an image, or not.
pub fn try_create(
    file: &Rc<dyn ImageFile>,
    size: Option<u64>,
    backing: Option<(Link, u64)>,
    options: &[(&str, &str)],
) -> Result<(), Error> {
    at_once::create("vhd", std::slice::from_ref(file), size, backing, options)
}

/// A layer of a VHD.
pub fn layer(file: &Rc<dyn ImageFile>, writable: bool, below_size: Option<u64>) -> Result<Layer, Error> {
    let driver = block_on(Vhd.open(open_of(file, writable, below_size)))?;
    Ok(Layer { driver, files: vec![file.clone()] })
}

/// A VHD alone.
pub fn volume(file: &Rc<dyn ImageFile>, writable: bool) -> Volume {
    Volume::new(vec![layer(file, writable, None).unwrap()]).unwrap()
}

/// A check of a file.
pub fn check(file: &Rc<dyn ImageFile>, repair: Option<Repair>) -> Findings {
    block_on(Vhd.check(open_of(file, repair.is_some(), None), repair)).unwrap()
}

/// A check that finds nothing, remarks aside.
pub fn assert_clean(file: &Rc<dyn ImageFile>) {
    let findings = check(file, None);
    assert_eq!((&findings.corruptions, &findings.leaks), (&Vec::new(), &Vec::new()), "{}", file.name());
}

/// What an image says of itself.
pub fn describe(file: &Rc<dyn ImageFile>) -> Description {
    block_on(Vhd.describe(file.clone())).unwrap()
}

/// A link to a VHD parent by its description.
pub fn link_to(file: &Rc<dyn ImageFile>, paths: &[&str]) -> (Link, u64) {
    let parent = describe(file);
    let paths = paths.iter().map(|path| (*path).to_owned()).collect();
    (Link { paths, format: Some("vhd".to_owned()), identity: parent.identity }, parent.size)
}
