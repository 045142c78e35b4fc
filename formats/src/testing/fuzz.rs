//! Hostile images: mutations of real ones are described, opened, mapped, read, checked, repaired and written to. Whatever the bytes
//! say there is no panic, no endless loop (a budget of polls and operations), no unreasonable memory (size of single reads,
//! budget of tables), and no change through a read-only open.
//!
//! The targets are plain functions. The seeded run is `cargo test -p formats fuzz`; `FUZZ_SEEDS` (default 60 per format) and `SEED`
//! choose how long and from where. It runs in a process of its own that may take 2 GiB and a bounded time of processor.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;

use super::pages::Pages;
use super::store::{Store, Stuck};
use crate::crypt::Secret;
use crate::driver::{Budget, Driver, Erase, Extent, Format, Open, Place, Repair};
use crate::error::Error;
use crate::file::{Buf, ImageFile};
use crate::volume::{Layer, Memory, Volume, Window};

/// Polls and operations for one target.
const TURNS_MAX: u64 = 1_000_000;
/// Memory for tables, in bytes.
const BUDGET_BYTES: usize = 256 << 10;
/// What a driver may hold beyond it: [`crate::metadata::SLICES_MIN`] slices for each of its tables.
const BUDGET_SLACK_BYTES: usize = 1 << 20;
/// The largest cluster or block in the corpus, in bytes.
const CLUSTER_MAX_BYTES: u64 = 2 << 20;
/// Calls of `map` on one image.
const MAPS: usize = 300;

/// Changes an image in a few places, with an eye for numbers that matter.
pub fn mutate(format: &str, image: &mut Pages, rng: &mut fastrand::Rng) {
    let length = image.length().max(1);
    for _ in 0..rng.u8(1..=4) {
        // Mostly where headers and the first tables are, sometimes at the end, sometimes anywhere.
        let at = match rng.u8(..8) {
            0 => rng.u64(..length),
            1 => length.saturating_sub(rng.u64(1..=512)),
            2 | 3 => rng.u64(..length.min(64 << 10)),
            _ => rng.u64(..length.min(1600)),
        };
        let number = interesting(length, rng);
        match rng.u8(..8) {
            0 => image.write(at, &[rng.u8(..)]),
            1 => image.write(at, &[image.bytes(at..at + 1)[0] ^ 1 << rng.u8(..8)]),
            2 | 3 => image.write(at & !3, &(number as u32).to_be_bytes()),
            4 | 5 => image.write(at & !7, &number.to_be_bytes()),
            6 => {
                let from = rng.u64(..length) & !511;
                let piece = image.bytes(from..from + 512);
                image.write(at & !511, &piece);
            }
            _ if rng.u8(..4) == 0 => image.truncate(rng.u64(..length)),
            _ => image.write(at & !7, &(number.rotate_right(8)).to_be_bytes()),
        }
    }
    if format == "vhd" && rng.u8(..8) != 0 {
        // A wrong sum hides everything behind it.
        for (start, sum_at, len) in
            [(0, 64, 512), (512, 36, 1024), (image.length().saturating_sub(512), 64, 512)]
        {
            let mut bytes = image.bytes(start..start + len);
            bytes[sum_at..sum_at + 4].fill(0);
            let sum = !bytes.iter().fold(0u32, |sum, byte| sum.wrapping_add(u32::from(*byte)));
            if start + len <= image.length() {
                image.write(start + sum_at as u64, &sum.to_be_bytes());
            }
        }
    }
}

/// A number at which programs go wrong.
fn interesting(length: u64, rng: &mut fastrand::Rng) -> u64 {
    let near = |number: u64, rng: &mut fastrand::Rng| number.wrapping_add(rng.u64(..3)).wrapping_sub(1);
    match rng.u8(..7) {
        0 => near(0, rng),
        1 => near(1 << rng.u8(..64), rng),
        2 => near(length, rng),
        3 => rng.u64(..length) & !511,
        4 => (rng.u64(..length) & !511) | 1 << 63,
        5 => rng.u64(..length) >> 9,
        _ => rng.u64(..),
    }
}

struct Target {
    store: Rc<Store>,
    budget: Rc<Budget>,
    format: &'static dyn Format,
}

impl Target {
    fn new(format: &'static dyn Format, image: &Pages) -> Target {
        let store = Store::new(1);
        store.add("hostile", image.clone());
        // Whatever data file an image asks for is there, and short.
        store.add("data", Pages::of(&[3; 8192]));
        store.set_turns_max(TURNS_MAX);
        Target { store, budget: Budget::new(BUDGET_BYTES), format }
    }

    fn open(&self, writable: bool, description: Option<&crate::driver::Description>) -> Open {
        let count = description.map_or(0, |description| description.data_files.len()).min(4);
        let mut files: Vec<Rc<dyn ImageFile>> = vec![self.store.open(0, writable)];
        files.extend((0..count).map(|_| self.store.open(1, writable) as Rc<dyn ImageFile>));
        let below_size = description.and_then(|description| description.backing.as_ref()).map(|_| 3 << 20);
        Open {
            files,
            writable,
            below_size,
            budget: self.budget.clone(),
            log: None,
            snapshot: None, // Not unlocked: what a header asks for is another test's affair.
            key: Some(Secret::new(vec![7; 64])),
        }
    }

    /// The answer, or what ended the attempt: an error is fine, being stuck is not.
    fn run<T>(
        &self,
        what: &str,
        future: impl Future<Output = Result<T, Error>>,
    ) -> Result<Option<T>, String> {
        match self.store.try_run(future) {
            Ok(answer) => Ok(answer.ok()),
            Err(Stuck::Budget) => Err(format!("{what}: more than {TURNS_MAX} polls and operations")),
            Err(stuck) => Err(format!("{what}: {stuck:?}")),
        }
    }

    fn verdict(&self) -> Result<(), String> {
        if let Some(violation) = self.store.violations().first() {
            return Err(violation.clone());
        }
        let used = self.budget.used_bytes();
        if used > BUDGET_BYTES + BUDGET_SLACK_BYTES {
            return Err(format!("{used} bytes of tables, {BUDGET_BYTES} were allowed"));
        }
        Ok(())
    }
}

/// Describes, opens read-only, maps, reads and checks an image.
///
/// # Errors
/// What a driver must not do.
pub fn fuzz_open(format: &'static dyn Format, image: &Pages, seed: u64) -> Result<(), String> {
    let target = Target::new(format, image);
    let mut rng = fastrand::Rng::with_seed(seed);
    format.recognises(
        &image.bytes(0..image.length().min(65536)),
        &image.bytes(image.length().saturating_sub(512)..image.length()),
    );
    let description = target.run("describe", format.describe(target.store.open(0, false)))?;
    target.run("check", format.check(target.open(false, description.as_ref()), None))?;
    target.store.set_turns_max(TURNS_MAX);
    let open = target.open(false, description.as_ref());
    let files = open.files.clone();
    if let Some(driver) = target.run("open", format.open(open))? {
        target.store.set_turns_max(TURNS_MAX);
        map_all(&target, &*driver, &files, &mut rng)?;
        if let Ok(volume) = Volume::new(vec![Layer { driver, files }]) {
            read_some(&target, &volume, &mut rng)?;
            target.run("close", volume.close())?;
        }
    }
    target.verdict()?;
    match target.store.pages(0).first_difference(image) {
        Some(at) => Err(format!("a read-only open changed the byte {at}")),
        None => Ok(()),
    }
}

/// Maps from the begin on and at random places; answers must cover what they say, in order.
fn map_all(
    target: &Target,
    driver: &dyn Driver,
    files: &[Rc<dyn ImageFile>],
    rng: &mut fastrand::Rng,
) -> Result<(), String> {
    let size = driver.size();
    if size == 0 {
        return Ok(());
    }
    let mut at = 0;
    for _ in 0..MAPS {
        if at >= size || rng.u8(..4) == 0 {
            at = rng.u64(..size) & !511;
        }
        let len = (size - at).min(1 << rng.u8(9..40));
        let mut out = Vec::new();
        let covered = driver.map(at, len, &mut out);
        let covered = match covered {
            Ok(0) => {
                target.run("load", driver.load(at, len))?;
                driver.map(at, len, &mut out)
            }
            other => other,
        };
        let Ok(covered) = covered else {
            at = at.saturating_add(driver.granule());
            continue;
        };
        covers(&out, at, covered, len, files)?;
        at += covered.max(512);
    }
    Ok(())
}

fn covers(
    extents: &[Extent],
    start: u64,
    covered: u64,
    asked: u64,
    files: &[Rc<dyn ImageFile>],
) -> Result<(), String> {
    let mut at = start;
    for extent in extents {
        if extent.start != at || extent.len == 0 {
            return Err(format!("extent {extent:?} does not follow {at}"));
        }
        at += extent.len;
        if let Place::Data { file, offset, .. } = extent.place {
            let length = files.get(usize::from(file.0)).map_or(0, |file| file.length());
            // A cluster that begins in the file may end behind it.
            if offset >= length + CLUSTER_MAX_BYTES || offset.checked_add(extent.len).is_none() {
                return Err(format!("{extent:?} lies outside the file of {length} bytes"));
            }
        }
    }
    if at - start != covered || covered > asked {
        return Err(format!("map says {covered} of {asked} bytes at {start}, its extents are {extents:?}"));
    }
    Ok(())
}

fn read_some(target: &Target, volume: &Volume, rng: &mut fastrand::Rng) -> Result<(), String> {
    for _ in 0..10 {
        if volume.size() == 0 {
            break;
        }
        let start = if rng.bool() { rng.u64(..volume.size()) } else { rng.u64(..volume.size().min(1 << 20)) };
        let len = (volume.size() - start).min(rng.u64(1..200_000));
        let memory = Memory::of(Buf::zeroed(len as usize));
        let window = Window { memory: &memory, volume, at: 0 };
        target.run("read", volume.read(start, len, &window))?;
    }
    Ok(())
}

/// Repairs an image, and opens it writable, writes, erases, flushes, closes.
///
/// # Errors
/// What a driver must not do.
pub fn fuzz_change(format: &'static dyn Format, image: &Pages, seed: u64) -> Result<(), String> {
    let mut rng = fastrand::Rng::with_seed(seed);
    let target = Target::new(format, image);
    let description = target.run("describe", format.describe(target.store.open(0, false)))?;
    if rng.bool() {
        let repair = if rng.bool() { Repair::All } else { Repair::Leaks };
        target.run("repair", target.format.check(target.open(true, description.as_ref()), Some(repair)))?;
        target.store.set_turns_max(TURNS_MAX);
    }
    let open = target.open(true, description.as_ref());
    let files = open.files.clone();
    let Some(driver) = target.run("open", format.open(open))? else { return target.verdict() };
    let Ok(volume) = Volume::new(vec![Layer { driver, files }]) else { return Ok(()) };
    if volume.size() == 0 {
        return Ok(());
    }
    for _ in 0..8 {
        target.store.set_turns_max(TURNS_MAX);
        let start = if rng.bool() { rng.u64(..volume.size()) } else { rng.u64(..volume.size().min(1 << 20)) };
        let len = (volume.size() - start).min(rng.u64(1..100_000));
        match rng.u8(..4) {
            0 => {
                let how = [Erase::Discard, Erase::Zero, Erase::ZeroKeep][rng.usize(..3)];
                target.run("erase", volume.erase(start, len, how))?;
            }
            1 => {
                target.run("flush", volume.flush())?;
            }
            _ => {
                let memory = Memory::of(Buf::zeroed(len as usize));
                let window = Window { memory: &memory, volume: &volume, at: 0 };
                target.run("write", volume.write(start, len, &window))?;
            }
        }
    }
    target.run("close", volume.close())?;
    target.verdict()
}

/// Mutates each image of `corpus` by `seed` and runs both targets on the result.
///
/// # Errors
/// What a driver must not do, panics included.
pub fn run(format: &'static dyn Format, corpus: &[Pages], seed: u64) -> Result<(), String> {
    let mut rng = fastrand::Rng::with_seed(seed);
    for (number, image) in corpus.iter().enumerate() {
        let mut image = image.clone();
        mutate(format.name(), &mut image, &mut rng);
        for (name, target) in
            [("open", fuzz_open as fn(&'static dyn Format, &Pages, u64) -> _), ("change", fuzz_change)]
        {
            let result = catch_unwind(AssertUnwindSafe(|| target(format, &image, seed)))
                .unwrap_or_else(|_| Err("panic".to_string()));
            result.map_err(|error| {
                format!("{}, image {number}, SEED={seed}, {name}: {error}", format.name())
            })?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    //! Goal: see the module. Method: images of each format that our drivers made and wrote to, mutated by seeds, in a process that
    //! may not take more memory and time than a sound driver needs; and proof that a driver that believes its image is caught.

    use super::*;
    use crate::testing::rig::{Case, LayerCase, Rig, write};
    use crate::testing::size_of_run;
    use crate::testing::toy::{Bug, Toy};

    const MIB: u64 = 1 << 20;

    /// An image with some data in it.
    fn image(layer: LayerCase) -> Pages {
        let rig = Rig::create(&Case::new("seed", vec![layer]), 1).unwrap();
        let volume = rig.open(true).unwrap();
        rig.store
            .run(async {
                for number in 0..12u64 {
                    let start = (number * volume.size() / 12) & !511;
                    write(&volume, start, &[number as u8 + 1; 5000]).await?;
                }
                volume.erase(0, 70_000, Erase::Zero).await?;
                volume.close().await
            })
            .unwrap();
        rig.store.pages(0)
    }

    fn seeds(format: &'static dyn Format, corpus: &[Pages]) {
        let first = size_of_run("SEED", 1);
        let mut failures = Vec::new();
        for seed in first..first + size_of_run("FUZZ_SEEDS", 60) {
            failures.extend(run(format, corpus, seed).err());
        }
        assert!(failures.is_empty(), "{} failures:\n{}", failures.len(), failures.join("\n"));
    }

    #[test]
    #[ignore = "run by `hostile_images` in a process of its own"]
    fn inner() {
        let qcow2 = |options: &[(&str, &str)]| image(LayerCase::new(&crate::qcow2::Qcow2, options, 3 * MIB));
        let compressed = |options: &[(&str, &str)]| {
            image(LayerCase::new(&crate::qcow2::Qcow2, options, 3 * MIB).encoded())
        };
        let qcow = |options: &[(&str, &str)]| image(LayerCase::new(&crate::qcow::Qcow, options, 3 * MIB));
        let vhd = |options: &[(&str, &str)]| image(LayerCase::new(&crate::vhd::Vhd, options, 3 * MIB));
        match std::env::var("FUZZ_FORMAT").as_deref() {
            Ok("qcow2") => seeds(
                &crate::qcow2::Qcow2,
                &[
                    qcow2(&[]),
                    qcow2(&[("cluster_size", "512"), ("refcount_bits", "1")]),
                    qcow2(&[("cluster_size", "4k"), ("compat", "0.10")]),
                    qcow2(&[("cluster_size", "16k"), ("extended_l2", "on"), ("lazy_refcounts", "on")]),
                    image(
                        LayerCase::new(
                            &crate::qcow2::Qcow2,
                            &[("encrypt.format", "luks"), ("encrypt.iter-time", "1")],
                            3 * MIB,
                        )
                        .encrypted(),
                    ),
                    compressed(&[("cluster_size", "4k")]),
                    compressed(&[
                        ("compression_type", "zstd"),
                        ("cluster_size", "16k"),
                        ("extended_l2", "on"),
                    ]),
                ],
            ),
            Ok("qcow") => seeds(
                &crate::qcow::Qcow,
                &[
                    qcow(&[]),
                    qcow(&[("cluster_size", "512"), ("extended", "off")]),
                    image(LayerCase::new(&crate::qcow::Qcow, &[("cluster_size", "16k")], 3 * MIB).encoded()),
                ],
            ),
            Ok("luks") => seeds(
                &crate::crypt::luks::Luks,
                &[image(LayerCase::new(&crate::crypt::luks::Luks, &[("iter-time", "1")], MIB).encrypted())],
            ),
            _ => seeds(
                &crate::vhd::Vhd,
                &[
                    vhd(&[]),
                    vhd(&[("block_size", "4k")]),
                    vhd(&[("type", "fixed")]),
                    vhd(&[("creator", "qem2")]),
                ],
            ),
        }
    }

    /// Runs `inner` for a format, with at most 2 GiB of address space and 10 minutes of processor.
    fn hostile_images(format: &str) {
        let program = std::env::current_exe().unwrap();
        let mut command = std::process::Command::new("prlimit");
        command.args(["--as=2147483648", "--cpu=600"]).arg(program);
        command.args(["testing::fuzz::tests::inner", "--exact", "--ignored", "--nocapture"]);
        let output = command.env("FUZZ_FORMAT", format).env("RUST_BACKTRACE", "0").output().unwrap();
        let text =
            [String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr)].concat();
        let tail: Vec<&str> = text.lines().rev().take(60).collect();
        let tail: Vec<&str> = tail.into_iter().rev().collect();
        assert!(output.status.success(), "{:?}:\n{}", output.status, tail.join("\n"));
    }

    #[test]
    fn hostile_qcow2_images() {
        hostile_images("qcow2");
    }

    #[test]
    fn hostile_luks_images() {
        hostile_images("luks");
    }

    #[test]
    fn hostile_qcow_images() {
        hostile_images("qcow");
    }

    #[test]
    fn hostile_vhd_images() {
        hostile_images("vhd");
    }

    #[test]
    fn a_credulous_driver_is_caught() {
        static CREDULOUS: Toy = Toy(Some(Bug::Credulous));
        static TOY: Toy = Toy(None);
        let corpus = [image(LayerCase::new(&TOY, &[], MIB))];
        (0..200).for_each(|seed| run(&TOY, &corpus, seed).unwrap());
        assert!((0..200).any(|seed| run(&CREDULOUS, &corpus, seed).is_err()));
    }
}
