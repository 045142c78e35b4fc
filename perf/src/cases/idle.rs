//! `idle`: 512 qcow2 disks in one process, measured as the `density` case measures raw files.

use anyhow::Result;

use super::Bench;
use super::density::{self, Contender};
use crate::files::ImageDir;
use crate::report::Row;
use crate::servers::{Aio, Disk, Format, Kind};

/// The case's name.
pub const CASE: &str = "idle";
/// Disks, also with `--quick`: the target is per disk of so many.
pub const DISKS: usize = 512;
const DISK_BYTES: u64 = 1 << 20;

/// Our row.
pub fn subject() -> Row {
    Row::new(Kind::Blktapd, "qcow2, one process")
}

/// Runs the case.
pub fn run(bench: &mut Bench) -> Result<()> {
    let Some(tool) = bench.image_tool_for(CASE) else { return Ok(()) };
    let images = ImageDir::new(&bench.settings.dir, DISKS as u64 * 2 * DISK_BYTES)?;
    eprintln!("{CASE}: writing {DISKS} qcow2 images of {} MiB", DISK_BYTES >> 20);
    let contents = Disk::File(images.file("contents.img", DISK_BYTES)?);
    let first = images.path("d0.qcow2");
    tool.convert(&contents, &Disk::image(Format::Qcow2, first.clone()))?;
    let mut disks = vec![Disk::image(Format::Qcow2, first.clone())];
    for index in 1..DISKS {
        let path = images.path(&format!("d{index}.qcow2"));
        std::fs::copy(&first, &path)?;
        disks.push(Disk::image(Format::Qcow2, path));
    }
    let mut list = Vec::new();
    for program in bench.programs.clone() {
        let aio = Aio::IoUring;
        let row = match program.kind {
            Kind::Blktapd => subject(),
            Kind::QemuStorageDaemon => {
                Row::new(program.kind, format!("qcow2, one process, aio={}", aio.name()))
            }
            Kind::QemuNbd | Kind::Nbdkit => continue,
        };
        list.push(Contender { row, program, aio, failed: false });
    }
    density::rounds(bench, CASE, density::with_control(list), &disks)
}
