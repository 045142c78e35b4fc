//! `formats`: allocated qcow2, VHD and VMDK images, reads and overwrites, beside our own raw file in the same rounds (the limit of the
//! format drivers) and beside qemu-storage-daemon on the same image. Images are converted from the raw file, so every block is
//! allocated and written; each disk is read once before each measurement, so that metadata is cached.

use anyhow::Result;

use super::Bench;
use super::single::{self, Contender, Lifetime, Plan, Subject};
use crate::files::ImageDir;
use crate::report::Row;
use crate::servers::{Aio, Disk, Format, Frontend, Kind};

/// The case's name on the command line; in reports it is one case per format.
pub const CASE: &str = "formats";

/// What is measured.
pub const FORMATS: [Format; 3] = [Format::Qcow2, Format::Vhd, Format::Vmdk];

/// The case of a format in reports.
pub const fn case_of(format: Format) -> &'static str {
    match format {
        Format::Qcow2 => "formats-qcow2",
        Format::Vhd => "formats-vhd",
        Format::Vmdk => "formats-vmdk",
    }
}

/// Our row of a format.
pub fn subject(format: Format) -> Row {
    Row::new(Kind::Blktapd, format.name())
}

/// Our raw file in the same rounds.
pub fn raw() -> Row {
    Row::new(Kind::Blktapd, "raw")
}

/// Runs the case.
pub fn run(bench: &mut Bench) -> Result<()> {
    let Some(tool) = bench.image_tool_for(CASE) else { return Ok(()) };
    let size_bytes = bench.settings.file_bytes;
    let images = ImageDir::new(&bench.settings.dir, 2 * size_bytes + (64 << 20))?;
    eprintln!("{CASE}: writing a file and images of {} MiB", size_bytes >> 20);
    let file = Disk::File(images.file("disk.img", size_bytes)?);
    for format in FORMATS {
        let image = Disk::image(format, images.path(&format!("disk.{}", format.name())));
        tool.convert(&file, &image)?;
        let plan = Plan {
            case: case_of(format),
            size_bytes,
            lifetime: Lifetime::Measurement,
            points: &single::POINTS,
            frontend: Frontend::Nbd,
            warm: true,
        };
        single::run(bench, plan, contenders(bench, format, &file, &image))?;
        if let Some(path) = image.path() {
            std::fs::remove_file(path)?;
        }
    }
    Ok(())
}

fn contenders(bench: &Bench, format: Format, file: &Disk, image: &Disk) -> Vec<Contender> {
    let mut ours = Vec::new();
    let mut theirs = Vec::new();
    for program in bench.programs.clone() {
        let row = |row: Row, aio: Aio, disk: &Disk| Contender {
            row,
            subject: Subject::Server { program: program.clone(), aio, disk: disk.clone() },
        };
        match program.kind {
            Kind::Blktapd => {
                ours.push(row(subject(format), Aio::IoUring, image));
                ours.push(row(raw(), Aio::IoUring, file));
            }
            Kind::QemuStorageDaemon => theirs.extend(bench.settings.aio.iter().map(|&aio| {
                let name = Row::new(program.kind, format!("{}, aio={}", format.qemu_driver(), aio.name()));
                row(name, aio, image)
            })),
            Kind::QemuNbd | Kind::Nbdkit => {}
        }
    }
    let mut all = single::with_control(ours);
    all.extend(theirs);
    all
}
