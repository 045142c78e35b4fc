//! Tests of the VHD driver: files to run it on, and the suites.

mod chain;
mod crash;
mod damage;
mod encrypted;
mod model;
mod others;
mod plans;
mod space;
mod store;
mod suites;

use std::rc::Rc;

use crate::driver::{Create, Description, Findings, Format, Link, Open, Repair};
use crate::error::Error;
use crate::file::{Buf, ImageFile};
use crate::metadata::Budget;
use crate::vhd::Vhd;
use crate::volume::{Layer, Memory, Volume, Window};

pub use futures_lite::future::block_on;

/// How to open a file.
pub fn open_of(file: &Rc<dyn ImageFile>, writable: bool, below_size: Option<u64>) -> Open {
    Open {
        files: vec![file.clone()],
        writable,
        below_size,
        budget: Budget::new(1 << 20),
        log: None,
        snapshot: None,
        key: None,
    }
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
    let options = options.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
    block_on(Vhd.create(file.clone(), Vec::new(), &Create { size, backing, options, key: None }))
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

/// Bytes of a volume.
pub fn read(volume: &Volume, offset: u64, len: u64) -> Result<Vec<u8>, Error> {
    let memory = Memory::new(len as usize);
    let window = Window { memory: &memory, volume, at: 0 };
    block_on(volume.read(offset, len, &window))?;
    Ok(memory.take().to_vec())
}

/// Writes bytes to a volume.
pub fn write(volume: &Volume, offset: u64, bytes: &[u8]) -> Result<(), Error> {
    let memory = Memory::of(Buf::copy_of(bytes));
    let window = Window { memory: &memory, volume, at: 0 };
    block_on(volume.write(offset, bytes.len() as u64, &window))
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

/// A small generator of numbers, the same in every run.
pub struct Numbers(pub u64);

impl Numbers {
    /// A number below `limit`.
    pub fn below(&mut self, limit: u64) -> u64 {
        // splitmix64
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % limit
    }

    /// Bytes, none of them zero.
    pub fn bytes(&mut self, len: u64) -> Vec<u8> {
        let first = self.below(255) as u8;
        (0..len).map(|at| ((u64::from(first) + at / 512 + at) % 255) as u8 + 1).collect()
    }
}
