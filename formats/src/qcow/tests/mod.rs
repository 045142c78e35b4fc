//! Tests of the qcow driver against QEMU and a model, with images as blktap made them, and with damaged ones.

mod ancestors;
mod damaged;
mod peers;

use std::path::{Path, PathBuf};
use std::rc::Rc;

use futures_lite::future::block_on;

use crate::driver::{Budget, Create, Findings, Format, Link, Open, Repair};
use crate::error::Error;
use crate::file::ImageFile;
use crate::qcow::Qcow;
use crate::qcow2::tests::rig::DiskFile;

fn create(path: &Path, size: u64, backing: Option<(&str, &str)>, options: &str) -> Result<(), Error> {
    let options = options.split(',').filter_map(|option| option.split_once('='));
    let options = options.map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
    let link = |(path, format): (&str, &str)| {
        (Link { paths: vec![path.to_owned()], format: Some(format.to_owned()), identity: None }, size)
    };
    let create = Create { size: Some(size), backing: backing.map(link), options, key: None };
    block_on(Qcow.create(DiskFile::open(path, true), Vec::new(), &create))
}

fn layers(folder: &Path) -> [(&'static str, Vec<PathBuf>); 1] {
    [("qcow", vec![folder.join("a.qcow")])]
}

fn open_of(path: &Path, writable: bool) -> Open {
    let files: Vec<Rc<dyn ImageFile>> = vec![DiskFile::open(path, writable)];
    Open {
        files,
        writable,
        below_size: None,
        budget: Budget::new(64 << 10),
        log: None,
        snapshot: None,
        key: None,
    }
}

fn check(path: &Path, repair: Option<Repair>) -> Findings {
    block_on(Qcow.check(open_of(path, repair.is_some()), repair)).unwrap()
}

fn is_sound(path: &Path, what: &str) {
    let found = check(path, None);
    assert_eq!((found.corruptions, found.leaks), (vec![], vec![]), "{what}");
}
