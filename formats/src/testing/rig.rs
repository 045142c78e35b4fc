//! A chain of images in a simulated store, made, opened, crashed and opened again as a table of cases says.

use std::rc::Rc;

use super::fault::{Op, Rule};
use super::log::MemLog;
use super::pages::Pages;
use super::replay::{Cause, Crash};
use super::store::Store;
use crate::allocation_log::replay;
use crate::crypt::Secret;
use crate::driver::{Budget, Create, Erase, Findings, Format, Link, Open, Repair};
use crate::error::Error;
use crate::file::{Buf, ImageFile};
use crate::volume::{Layer, Memory, Volume, Window};

/// The passphrase of all encrypted images here.
pub const PASSPHRASE: &str = "0123456789abcdef";

/// How a layer of a chain is made.
#[derive(Clone)]
pub struct LayerCase {
    /// Its format.
    pub format: &'static dyn Format,
    /// Options of the new image.
    pub options: Vec<(String, String)>,
    /// Bytes of its disk.
    pub size: u64,
    /// Number of further files that the options ask for.
    pub data_files: usize,
    /// Its (first) file is a block device of this many bytes, full of junk.
    pub device_bytes: Option<u64>,
    /// It holds compressed data from the start.
    pub encoded: bool,
    /// The passphrase of an encrypted image.
    pub key: Option<Secret>,
}

impl LayerCase {
    /// A layer in one regular file.
    pub fn new(format: &'static dyn Format, options: &[(&str, &str)], size: u64) -> LayerCase {
        let options = options.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect();
        LayerCase { format, options, size, data_files: 0, device_bytes: None, encoded: false, key: None }
    }

    /// The same with compressed data in it.
    #[must_use]
    pub fn encoded(self) -> LayerCase {
        LayerCase { encoded: true, ..self }
    }

    /// The same, encrypted.
    #[must_use]
    pub fn encrypted(self) -> LayerCase {
        LayerCase { key: Some(Secret::new(PASSPHRASE.into())), ..self }
    }
}

/// A chain that the suites run on.
#[derive(Clone)]
pub struct Case {
    /// For messages.
    pub name: String,
    /// The layers, the first on top.
    pub layers: Vec<LayerCase>,
    /// Capacity of the allocation log of the top layer; `None` for none.
    pub log_capacity: Option<usize>,
    /// Memory for tables, in bytes.
    pub budget_bytes: usize,
    /// A closed image has no leaks.
    pub closes_clean: bool,
}

impl std::fmt::Debug for Case {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.name)
    }
}

impl Case {
    /// A chain without an allocation log and with room for 256 KiB of tables.
    pub fn new(name: &str, layers: Vec<LayerCase>) -> Case {
        Case {
            name: name.to_string(),
            layers,
            log_capacity: None,
            budget_bytes: 256 << 10,
            closes_clean: true,
        }
    }

    /// The same with an allocation log.
    #[must_use]
    pub fn logged(mut self, capacity: usize) -> Case {
        self.name += "+log";
        self.log_capacity = Some(capacity);
        self
    }

    /// The same of a format that leaks what it had reserved.
    #[must_use]
    pub fn leaking(mut self) -> Case {
        self.closes_clean = false;
        self
    }

    /// The same with this much memory for tables.
    #[must_use]
    pub fn with_budget(mut self, bytes: usize) -> Case {
        self.budget_bytes = bytes;
        self
    }
}

/// A case in a store.
#[derive(Debug)]
pub struct Rig {
    /// What was asked for.
    pub case: Case,
    /// Where it is.
    pub store: Rc<Store>,
    /// What the disk held when it was made: what its parents have.
    pub initial: Vec<u8>,
    /// Numbers of the files of each layer.
    files: Vec<Vec<usize>>,
    log: Option<Rc<MemLog>>,
    /// Keys of encrypted layers.
    keys: Vec<Option<Secret>>,
}

/// Writes `bytes` to a volume.
///
/// # Errors
/// Those of the volume.
pub async fn write(volume: &Volume, offset: u64, bytes: &[u8]) -> Result<(), Error> {
    let memory = Memory::of(Buf::copy_of(bytes));
    volume.write(offset, bytes.len() as u64, &Window { memory: &memory, volume, at: 0 }).await
}

/// Reads `len` bytes of a volume.
///
/// # Errors
/// Those of the volume.
pub async fn read(volume: &Volume, offset: u64, len: u64) -> Result<Buf, Error> {
    // Not zero, so that what is not filled shows.
    let mut buf = Buf::zeroed(len as usize);
    buf.fill(0xa5);
    let memory = Memory::of(buf);
    volume.read(offset, len, &Window { memory: &memory, volume, at: 0 }).await?;
    Ok(memory.take())
}

/// Reads a whole volume, in requests of 1 MiB.
///
/// # Errors
/// Those of the volume.
pub async fn read_all(volume: &Volume) -> Result<Vec<u8>, Error> {
    let (size, mut bytes) = (volume.size(), Vec::new());
    while (bytes.len() as u64) < size {
        let at = bytes.len() as u64;
        bytes.extend_from_slice(&read(volume, at, (size - at).min(1 << 20)).await?);
    }
    Ok(bytes)
}

impl Rig {
    /// Makes the images of a case, and fills the parents with data.
    ///
    /// # Errors
    /// The format refuses.
    pub fn create(case: &Case, seed: u64) -> Result<Rig, Error> {
        let store = Store::new(seed);
        let mut rng = fastrand::Rng::with_seed(seed ^ 0x5eed);
        let mut files = Vec::new();
        for (index, layer) in case.layers.iter().enumerate() {
            let name = |what: &str| format!("mem/{index}{what}.{}", layer.format.name());
            let pages = match layer.device_bytes {
                Some(bytes) => Pages::device(bytes, rng.u64(..)),
                None => Pages::empty(),
            };
            let mut numbers = vec![store.add(&name(""), pages).file()];
            for data in 0..layer.data_files {
                numbers.push(store.add(&name(&format!("-data{data}")), Pages::empty()).file());
            }
            files.push(numbers);
        }
        let log = case.log_capacity.map(|capacity| store.add_log(capacity));
        let keys = vec![None; case.layers.len()];
        let mut rig = Rig { case: case.clone(), store, initial: Vec::new(), files, log, keys };
        for index in (0..case.layers.len()).rev() {
            rig.create_layer(index)?;
            rig.unlock(index)?;
            rig.initial.resize(case.layers[index].size as usize, 0);
            if case.layers[index].encoded {
                rig.fill_encoded(index, &mut rng)?;
            }
            if index > 0 {
                rig.fill_parent(index, &mut rng)?;
            }
        }
        Ok(rig)
    }

    fn create_layer(&self, index: usize) -> Result<(), Error> {
        let layer = &self.case.layers[index];
        let mut backing = None;
        if let Some(parent) = self.case.layers.get(index + 1) {
            let file = self.store.open(self.files[index + 1][0], false);
            let path = file.name().trim_start_matches("mem/").to_string();
            let description = self.store.run(parent.format.describe(file))?;
            let format = Some(parent.format.name().to_string());
            let link = Link { paths: vec![path], format, identity: description.identity };
            backing = Some((link, description.size));
        }
        let create = Create {
            size: Some(layer.size),
            backing,
            options: layer.options.clone(),
            key: layer.key.clone(),
        };
        let mut files = self.open_files(index, true);
        let first = files.remove(0);
        self.store.run(layer.format.create(first, files, &create))
    }

    /// Puts encoded units into the layer `index` while it is on top: about every second one.
    fn fill_encoded(&mut self, index: usize, rng: &mut fastrand::Rng) -> Result<(), Error> {
        let volume = self.open_from(index, true)?;
        let Some(encoding) = volume.layers()[0].driver.encoding() else {
            return Err(Error::invalid("this case has a layer that takes nothing encoded"));
        };
        let (size, unit) = (volume.size(), encoding.unit);
        let mut units = Vec::new();
        for at in (0..size).step_by(unit as usize) {
            if rng.bool() {
                continue;
            }
            let mut bytes = vec![0; unit as usize];
            let inside = unit.min(size - at) as usize;
            // Sectors that differ, and get shorter by different amounts.
            for sector in bytes[..inside].chunks_mut(512) {
                sector.fill(rng.u8(1..));
                let noise = rng.usize(..sector.len() / 2);
                rng.fill(&mut sector[..noise]);
            }
            if let Some(encoded) = crate::codec::encode(encoding.method, &bytes, encoding.encoded_max) {
                self.initial[at as usize..at as usize + inside].copy_from_slice(&bytes[..inside]);
                units.push((at, encoded));
            }
        }
        assert!(!units.is_empty(), "nothing is encoded in this case");
        self.store.clone().run(async {
            let rest = units.split_off(units.len() / 2);
            volume.write_encoded(units).await?;
            volume.write_encoded(rest).await?;
            volume.close().await
        })
    }

    /// Writes to the layer `index` while it is on top.
    fn fill_parent(&mut self, index: usize, rng: &mut fastrand::Rng) -> Result<(), Error> {
        let volume = self.open_from(index, true)?;
        let size = volume.size();
        self.store.clone().run(async {
            for _ in 0..12 {
                let start = rng.u64(..size / 512) * 512;
                let len = (rng.u64(1..=64) * 512).min(size - start);
                let mut bytes = vec![rng.u8(1..); len as usize];
                rng.fill(&mut bytes);
                write(&volume, start, &bytes).await?;
                self.initial[start as usize..(start + len) as usize].copy_from_slice(&bytes);
            }
            // Zeroes over data of a layer below.
            let start = rng.u64(..size / 512) * 512;
            let len = (64 << 10).min(size - start);
            volume.erase(start, len, Erase::Zero).await?;
            self.initial[start as usize..(start + len) as usize].fill(0);
            volume.close().await
        })
    }

    /// What a crash left, in a store of its own: the log is replayed as the daemon does before it opens an image.
    ///
    /// # Errors
    /// The log does not fit the files.
    pub fn from_crash(&self, crash: &Crash, seed: u64) -> Result<Rig, String> {
        let rig = self.with_files(crash.files.clone(), seed);
        if let (Cause::ProcessDeath, Some(log)) = (crash.cause, &self.log) {
            let files = rig.open_files(0, true);
            rig.store.run(replay(&crash.logs[log.number()], &files)).map_err(|error| error.message)?;
        }
        Ok(rig)
    }

    /// The same chain with other contents, in a store of its own and with an empty log.
    pub fn with_files(&self, files: Vec<Pages>, seed: u64) -> Rig {
        let store = Store::new(seed);
        for (number, pages) in files.into_iter().enumerate() {
            store.add(self.store.open(number, false).name(), pages);
        }
        let log = self.case.log_capacity.map(|capacity| store.add_log(capacity));
        Rig {
            case: self.case.clone(),
            store,
            initial: self.initial.clone(),
            files: self.files.clone(),
            log,
            keys: self.keys.clone(),
        }
    }

    /// The chain as it is now, in a store of its own and with an empty log.
    pub fn copy(&self, seed: u64) -> Rig {
        let files = (0..self.files.iter().flatten().count()).map(|number| self.store.pages(number)).collect();
        self.with_files(files, seed)
    }

    /// The state now, as if the process had died with nothing in flight.
    ///
    /// # Errors
    /// The log does not fit the files.
    pub fn after_death(&self, seed: u64) -> Result<Rig, String> {
        self.store.settle();
        let files = (0..self.files.iter().flatten().count()).map(|number| self.store.pages(number)).collect();
        let mut logs = vec![Vec::new(); 1];
        if let Some(log) = &self.log {
            logs[log.number()] = log.state().0;
        }
        self.from_crash(&Crash { at: 0, cause: Cause::ProcessDeath, files, logs }, seed)
    }

    /// Numbers of the files of a layer in the store.
    pub fn files(&self, layer: usize) -> &[usize] {
        &self.files[layer]
    }

    /// The allocation log of the top layer.
    pub fn log(&self) -> Option<&Rc<MemLog>> {
        self.log.as_ref()
    }

    fn open_files(&self, layer: usize, writable: bool) -> Vec<Rc<dyn ImageFile>> {
        let open = |number: &usize| self.store.open(*number, writable) as Rc<dyn ImageFile>;
        self.files[layer].iter().map(open).collect()
    }

    /// Opens the chain, the top layer writable or not.
    ///
    /// # Errors
    /// A format refuses.
    pub fn open(&self, writable: bool) -> Result<Volume, Error> {
        self.open_from(0, writable)
    }

    /// Opens the layers from `first` on.
    fn open_from(&self, first: usize, writable: bool) -> Result<Volume, Error> {
        let budget = Budget::new(self.case.budget_bytes);
        self.store.run(self.open_in(first, writable, &budget))
    }

    /// As [`Rig::open`], as a future and with a budget of the caller's.
    pub async fn open_in(&self, first: usize, writable: bool, budget: &Rc<Budget>) -> Result<Volume, Error> {
        let mut layers = Vec::new();
        let mut below_size = None;
        for index in (first..self.case.layers.len()).rev() {
            let open = self.open_of(index, writable && index == first, below_size, budget, first == 0);
            let files = open.files.clone();
            let driver = self.case.layers[index].format.open(open).await?;
            below_size = Some(driver.size());
            layers.insert(0, Layer { driver, files });
        }
        Volume::new(layers)
    }

    fn open_of(
        &self,
        layer: usize,
        writable: bool,
        below_size: Option<u64>,
        budget: &Rc<Budget>,
        logged: bool,
    ) -> Open {
        let log = self.log.clone().filter(|_| layer == 0 && logged && writable);
        Open {
            files: self.open_files(layer, writable),
            writable,
            below_size,
            budget: budget.clone(),
            log: log.map(|log| log as Rc<dyn crate::allocation_log::AllocationLog>),
            snapshot: None,
            key: self.keys[layer].clone(),
        }
    }

    /// The key of a layer that was made encrypted. In a store of its own: what that costs is not what the suites look at.
    fn unlock(&mut self, index: usize) -> Result<(), Error> {
        let LayerCase { format, key, .. } = &self.case.layers[index];
        if let Some(passphrase) = key {
            let aside = Store::new(1);
            aside.add("aside", self.store.pages(self.files[index][0]));
            self.keys[index] = Some(aside.run(format.unlock(aside.open(0, false), passphrase))?);
        }
        Ok(())
    }

    /// Checks the image of a layer.
    ///
    /// # Errors
    /// The check could not be made.
    pub fn check(&self, layer: usize, repair: Option<Repair>) -> Result<Findings, Error> {
        let budget = Budget::new(self.case.budget_bytes);
        let below_size = match self.case.layers.get(layer + 1) {
            Some(below) => {
                let file = self.store.open(self.files[layer + 1][0], false);
                Some(self.store.run(below.format.describe(file))?.size)
            }
            None => None,
        };
        let open = self.open_of(layer, repair.is_some(), below_size, &budget, false);
        self.store.run(self.case.layers[layer].format.check(open, repair))
    }

    /// Checks that the image of the top layer has no damage (leaks are allowed).
    ///
    /// # Errors
    /// What is wrong.
    pub fn check_sound(&self) -> Result<Findings, String> {
        let findings = self.check(0, None).map_err(|error| format!("check: {error}"))?;
        match findings.corruptions.first() {
            Some(line) => {
                Err(format!("check: {} corruptions, the first: {line}", findings.corruptions_total))
            }
            None => Ok(findings),
        }
    }

    /// Makes operations fail, see [`Store::inject`]; only of files of the top layer.
    pub fn inject_on_top(&self, fault: super::fault::Fault, which: impl Fn(&Op) -> bool + 'static) {
        let top = self.files[0].clone();
        self.store.inject(Rule::when(fault, move |op| top.contains(&op.file) && which(op)));
    }
}
