//! `chain`: random reads through 30 qcow2 images, each of which has a part of the data, beside one flat image of the same contents.
//! Metadata is cached. That both have the same contents is checked before (`blktapd image compare`).

use anyhow::Result;

use super::Bench;
use super::single::{self, Contender, Lifetime, Plan, Point, Subject};
use crate::files::ImageDir;
use crate::images::Tool;
use crate::report::Row;
use crate::servers::{Aio, Disk, Format, Frontend, Kind};

/// The case's name.
pub const CASE: &str = "chain";
/// Images in the chain.
const DEPTH: u64 = 30;
/// The points.
pub const POINTS: [Point; 3] = [single::READ_4K_QD32, single::READ_4K_QD1, single::READ_64K_QD32];

/// The row with the chain.
pub fn deep() -> Row {
    Row::new(Kind::Blktapd, format!("{DEPTH} deep"))
}

/// The row with the flat image.
pub fn flat() -> Row {
    Row::new(Kind::Blktapd, "flat")
}

/// Runs the case.
pub fn run(bench: &mut Bench) -> Result<()> {
    let Some(tool) = bench.image_tool_for(CASE) else { return Ok(()) };
    let size_bytes = bench.settings.file_bytes;
    let images = ImageDir::new(&bench.settings.dir, 3 * size_bytes + (256 << 20))?;
    eprintln!("{CASE}: making {DEPTH} images of {} MiB", size_bytes >> 20);
    let chain = make_chain(&tool, &images, size_bytes)?;
    let one = Disk::image(Format::Qcow2, images.path("flat.qcow2"));
    tool.convert(&chain, &one)?;
    tool.compare(&chain, &one)?;

    let mut ours = Vec::new();
    let mut theirs = Vec::new();
    for program in bench.programs.clone() {
        let row = |row: Row, aio: Aio, disk: &Disk| Contender {
            row,
            subject: Subject::Server { program: program.clone(), aio, disk: disk.clone() },
        };
        match program.kind {
            Kind::Blktapd => {
                ours.push(row(deep(), Aio::IoUring, &chain));
                ours.push(row(flat(), Aio::IoUring, &one));
            }
            Kind::QemuStorageDaemon => {
                for &aio in &bench.settings.aio {
                    let name = Row::new(program.kind, format!("{DEPTH} deep, aio={}", aio.name()));
                    theirs.push(row(name, aio, &chain));
                }
            }
            Kind::QemuNbd | Kind::Nbdkit => {}
        }
    }
    let mut contenders = single::with_control(ours);
    contenders.extend(theirs);
    let plan = Plan {
        case: CASE,
        size_bytes,
        lifetime: Lifetime::Measurement,
        points: &POINTS,
        frontend: Frontend::Nbd,
        warm: true,
    };
    single::run(bench, plan, contenders)
}

/// Snapshot after snapshot, and into each its share of a file's contents: image n has the n-th thirtieth of the disk.
fn make_chain(tool: &Tool, images: &ImageDir, size_bytes: u64) -> Result<Disk> {
    let contents = Disk::File(images.file("contents.img", size_bytes)?);
    let mib = size_bytes >> 20;
    let mut top: Option<Disk> = None;
    for layer in 0..DEPTH {
        let path = images.path(&format!("layer{layer}.qcow2"));
        let disk = match top.take() {
            None => {
                let disk = Disk::image(Format::Qcow2, path);
                tool.create(&disk, size_bytes)?;
                disk
            }
            Some(below) => {
                let below_spec = below.spec("");
                let disk = Disk::Image { format: Format::Qcow2, path, below: Some(Box::new(below)) };
                tool.run(["snapshot", "--empty", &below_spec, &disk.spec("")])?;
                disk
            }
        };
        let (from, to) = (mib * layer / DEPTH, mib * (layer + 1) / DEPTH);
        if to > from {
            tool.run([
                "dd".to_owned(),
                "--bs=1M".to_owned(),
                format!("--skip={from}"),
                format!("--seek={from}"),
                format!("--count={}", to - from),
                contents.spec(""),
                disk.spec(""),
            ])?;
        }
        top = Some(disk);
    }
    if let Some(path) = contents.path() {
        std::fs::remove_file(path)?;
    }
    top.ok_or_else(|| anyhow::anyhow!("a chain of no images"))
}
