//! What the tests share: real files as image files, volumes over them, and QEMU's tools.

use std::cell::Cell;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::rc::Rc;

use futures_lite::future::block_on;

use crate::driver::{Budget, Create, Erase, Findings, Format, Link, Open, Repair};
use crate::error::Error;
use crate::file::{Buf, ImageFile, Pending};
use crate::qcow2::Qcow2;
use crate::registry;
use crate::volume::{Layer, Memory, Volume, Window};

/// A file of the system as an image file: every operation is done when its future is made.
#[derive(Debug)]
pub struct DiskFile {
    name: String,
    file: File,
    writable: bool,
    /// Changes of a file that was opened read-only.
    pub forbidden: Cell<u64>,
    /// Bytes that were read.
    pub read_bytes: Cell<u64>,
}

impl DiskFile {
    pub fn open(path: &Path, writable: bool) -> Rc<DiskFile> {
        let file = OpenOptions::new()
            .read(true)
            .write(writable)
            .create(writable)
            .truncate(false)
            .open(path)
            .unwrap();
        Rc::new(DiskFile {
            name: path.display().to_string(),
            file,
            writable,
            forbidden: Cell::new(0),
            read_bytes: Cell::new(0),
        })
    }

    fn change<T: 'static>(&self, made: impl FnOnce(&File) -> std::io::Result<T>) -> Pending<'static, T> {
        if !self.writable {
            self.forbidden.set(self.forbidden.get() + 1);
        }
        let result = made(&self.file)
            .map_err(|error| Error::io(&self.name, "a change", error.raw_os_error().unwrap_or(5)));
        Box::pin(std::future::ready(result))
    }
}

impl ImageFile for DiskFile {
    fn name(&self) -> &str {
        &self.name
    }

    fn length(&self) -> u64 {
        self.file.metadata().unwrap().len()
    }

    fn is_device(&self) -> bool {
        false
    }

    fn is_writable(&self) -> bool {
        self.writable
    }

    fn read(&self, offset: u64, len: usize) -> Pending<'static, Buf> {
        self.read_bytes.set(self.read_bytes.get() + len as u64);
        let mut buf = Buf::zeroed(len);
        let mut done = 0;
        while done < len {
            match self.file.read_at(&mut buf[done..], offset + done as u64) {
                Ok(0) => break,
                Ok(count) => done += count,
                Err(error) => {
                    let error = Error::io(&self.name, "read", error.raw_os_error().unwrap_or(5));
                    return Box::pin(std::future::ready(Err(error)));
                }
            }
        }
        Box::pin(std::future::ready(Ok(buf)))
    }

    fn write(&self, offset: u64, data: Buf) -> Pending<'static, ()> {
        self.change(|file| file.write_all_at(&data, offset))
    }

    fn flush(&self) -> Pending<'static, ()> {
        Box::pin(std::future::ready(Ok(())))
    }

    fn extend(&self, length: u64) -> Pending<'static, ()> {
        if length <= self.length() {
            return Box::pin(std::future::ready(Ok(())));
        }
        self.change(|file| file.set_len(length))
    }

    fn truncate(&self, length: u64) -> Pending<'static, ()> {
        self.change(|file| file.set_len(length))
    }

    fn zero(&self, range: std::ops::Range<u64>) -> Pending<'static, ()> {
        assert!(range.start <= range.end, "{range:?}");
        self.change(|file| {
            let zeroes = vec![0; (1 << 20).min((range.end - range.start) as usize)];
            let mut at = range.start;
            while at < range.end {
                let len = zeroes.len().min((range.end - at) as usize);
                file.write_all_at(&zeroes[..len], at)?;
                at += len as u64;
            }
            Ok(())
        })
    }
}

/// The disk of a chain: `layers` are (type, files), the first on top.
pub fn try_open(
    layers: &[(&str, Vec<PathBuf>)],
    writable: bool,
    snapshot: Option<&str>,
) -> Result<Volume, Error> {
    let budget = Budget::new(256 << 10);
    let mut opened: Vec<Layer> = Vec::new();
    for (number, (kind, paths)) in layers.iter().enumerate().rev() {
        let writable = writable && number == 0;
        let files: Vec<Rc<dyn ImageFile>> =
            paths.iter().map(|path| DiskFile::open(path, writable) as Rc<dyn ImageFile>).collect();
        let open = Open {
            files: files.clone(),
            writable,
            below_size: opened.first().map(|layer| layer.driver.size()),
            budget: budget.clone(),
            log: None,
            snapshot: snapshot.filter(|_| number == 0).map(str::to_owned),
            key: None,
        };
        let driver = block_on(registry::format(kind).unwrap().open(open))?;
        opened.insert(0, Layer { driver, files });
    }
    Volume::new(opened)
}

/// [`try_open`] of a chain that opens.
pub fn open(layers: &[(&str, Vec<PathBuf>)], writable: bool) -> Volume {
    try_open(layers, writable, None).unwrap()
}

/// Files to work on offline.
pub fn open_of(paths: &[&Path], writable: bool) -> Open {
    Open {
        files: paths.iter().map(|path| DiskFile::open(path, writable) as Rc<dyn ImageFile>).collect(),
        writable,
        below_size: Some(0),
        budget: Budget::new(64 << 10),
        log: None,
        snapshot: None,
        key: None,
    }
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
    let data_files = options
        .iter()
        .filter(|(name, _)| *name == "data_file")
        .map(|(_, name)| DiskFile::open(&path.with_file_name(name), true) as Rc<dyn ImageFile>)
        .collect();
    let link = backing.map(|(path, format)| {
        let paths = vec![path.display().to_string()];
        (Link { paths, format: Some(format.to_owned()), identity: None }, size)
    });
    let options = options.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect();
    let wanted = Create { size: Some(size), backing: link, options, key: None };
    block_on(Qcow2.create(DiskFile::open(path, true), data_files, &wanted))
}

pub fn read(volume: &Volume, offset: u64, len: u64) -> Vec<u8> {
    let memory = Memory::new(len as usize);
    block_on(volume.read(offset, len, &Window { memory: &memory, volume, at: 0 })).unwrap();
    memory.take().to_vec()
}

pub fn read_all(volume: &Volume) -> Vec<u8> {
    read(volume, 0, volume.size())
}

pub fn write(volume: &Volume, offset: u64, bytes: &[u8]) {
    let memory = Memory::of(Buf::copy_of(bytes));
    block_on(volume.write(offset, bytes.len() as u64, &Window { memory: &memory, volume, at: 0 })).unwrap();
}

/// One random change of a disk and its model, in units of 512 bytes.
pub fn change(volume: &Volume, model: &mut [u8], rng: &mut Rng) {
    let sectors = model.len() as u64 / 512;
    let len = 1 + if rng.below(4) == 0 { rng.below(600) } else { rng.below(16) };
    let start = rng.below(sectors);
    let len = len.min(sectors - start);
    let range = (start * 512) as usize..((start + len) * 512) as usize;
    let how = match rng.below(10) {
        0..=6 => {
            let mut bytes = vec![rng.next() as u8 | 1; range.len()];
            for sector in bytes.chunks_exact_mut(512) {
                sector[..8].copy_from_slice(&rng.next().to_le_bytes());
            }
            write(volume, start * 512, &bytes);
            model[range].copy_from_slice(&bytes);
            return;
        }
        7 => Erase::Zero,
        8 => Erase::ZeroKeep,
        _ => Erase::Discard,
    };
    block_on(volume.erase(start * 512, len * 512, how)).unwrap();
    if how != Erase::Discard {
        model[range].fill(0);
        return;
    }
    // A discard may leave parts as they were; what it left is what it shows.
    let shown = read(volume, start * 512, len * 512);
    for (shown, model) in shown.chunks_exact(512).zip(model[range].chunks_exact_mut(512)) {
        assert!(shown == model || shown.iter().all(|byte| *byte == 0), "a discard shows foreign bytes");
        model.copy_from_slice(shown);
    }
}

/// A small generator of numbers from a seed (xorshift).
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16
    }

    pub fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit.max(1)
    }
}

/// QEMU's tools are here; else the test says that it skips.
pub fn have_qemu() -> bool {
    let have = Command::new("qemu-img").arg("--version").output().is_ok();
    if !have {
        eprintln!("skipped: qemu-img is not installed");
    }
    have
}

/// Runs a tool of QEMU, killed after a minute.
pub fn qemu(arguments: &[&str], folder: &Path) -> Output {
    Command::new("timeout").args(["-s", "KILL", "60"]).args(arguments).current_dir(folder).output().unwrap()
}

/// [`qemu`] that must succeed.
pub fn qemu_ok(arguments: &[&str], folder: &Path) -> String {
    let output = qemu(arguments, folder);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{arguments:?}: {text}{}", String::from_utf8_lossy(&output.stderr));
    text
}

/// What QEMU reads of an image.
pub fn qemu_reads(image: &str, folder: &Path, snapshot: Option<&str>) -> Vec<u8> {
    let mut arguments = vec!["qemu-img", "convert", "-t", "unsafe", "-O", "raw"];
    let id = snapshot.map(|name| format!("snapshot.name={name}"));
    if let Some(id) = &id {
        arguments.extend(["-l", id]);
    }
    arguments.extend([image, "qemu-reads.raw"]);
    qemu_ok(&arguments, folder);
    std::fs::read(folder.join("qemu-reads.raw")).unwrap()
}

/// `qemu-img check` finds nothing at all.
pub fn qemu_check(image: &str, folder: &Path) {
    let output = qemu(&["qemu-img", "check", image], folder);
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{image}: {text}{}", String::from_utf8_lossy(&output.stderr));
}

/// The first place where two disks differ, for messages.
pub fn same(what: &str, ours: &[u8], theirs: &[u8]) {
    assert_eq!(ours.len(), theirs.len(), "{what}: sizes");
    if ours == theirs {
        return;
    }
    if let Some(at) = ours.iter().zip(theirs).position(|(a, b)| a != b) {
        panic!("{what}: byte {at} is {} and should be {}", ours[at], theirs[at]);
    }
}
