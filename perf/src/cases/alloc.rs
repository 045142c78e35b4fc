//! `alloc`: writes that allocate. A random permutation of the clusters of an empty image, one 4k write into each, and the final
//! flush inside the timing. Every measurement has a new image; what blktapd wrote is checked afterwards (`blktapd image check`).

use anyhow::Result;

use super::{Bench, order, per_million};
use crate::files::ImageDir;
use crate::images::Tool;
use crate::load::sweep::{self, Sweep};
use crate::load::{Client, Op};
use crate::report::{Metric, Row, Values};
use crate::servers::{self, Aio, Disk, Format, Frontend, Kind, Program, Setup};
use crate::{proc, stop};

/// The case's name.
pub const CASE: &str = "alloc";
const BLOCK_BYTES: u32 = 4096;
const DEPTH: u32 = 32;

/// What is written to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Point {
    /// A qcow2 image with nothing below it.
    Qcow2,
    /// A qcow2 image over a raw file full of data: each write copies the rest of its cluster.
    Qcow2Backed,
    /// A dynamic VHD.
    Vhd,
    /// A VMDK (monolithicSparse).
    Vmdk,
}

impl Point {
    /// All points.
    pub const ALL: [Point; 4] = [Point::Qcow2, Point::Qcow2Backed, Point::Vhd, Point::Vmdk];

    /// The name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Point::Qcow2 => "qcow2, 4k write per cluster of 64k QD32",
            Point::Qcow2Backed => "qcow2 with a backing file, 4k write per cluster of 64k QD32",
            Point::Vhd => "VHD, 4k write per block of 2M QD32",
            Point::Vmdk => "VMDK, 4k write per grain of 64k QD32",
        }
    }

    fn stride_bytes(self) -> u64 {
        match self {
            Point::Qcow2 | Point::Qcow2Backed | Point::Vmdk => 64 << 10,
            Point::Vhd => 2 << 20,
        }
    }
}

/// Our row.
pub fn subject() -> Row {
    Row::new(Kind::Blktapd, "")
}

struct Contender {
    row: Row,
    program: Program,
    aio: Aio,
    failed: bool,
}

/// Runs the case.
pub fn run(bench: &mut Bench) -> Result<()> {
    let Some(tool) = bench.image_tool_for(CASE) else { return Ok(()) };
    for point in Point::ALL {
        let count = if point == Point::Vhd { bench.settings.blocks } else { bench.settings.clusters };
        let size_bytes = count * point.stride_bytes();
        // QEMU allocates whole clusters on the disk; blocks of a VHD stay sparse on both sides.
        let need_bytes = match point {
            Point::Qcow2 | Point::Vmdk => size_bytes,
            Point::Qcow2Backed => 2 * size_bytes,
            Point::Vhd => count * (64 << 10),
        };
        let images = ImageDir::new(&bench.settings.dir, need_bytes + (64 << 20))?;
        let below = match point {
            Point::Qcow2Backed => {
                eprintln!("{CASE}: writing a backing file of {} MiB", size_bytes >> 20);
                Some(Box::new(Disk::File(images.file("below.img", size_bytes)?)))
            }
            Point::Qcow2 | Point::Vhd | Point::Vmdk => None,
        };
        let format = match point {
            Point::Qcow2 | Point::Qcow2Backed => Format::Qcow2,
            Point::Vhd => Format::Vhd,
            Point::Vmdk => Format::Vmdk,
        };
        let disk = Disk::Image { format, path: images.path("disk.image"), below };
        let mut contenders = contenders(bench);
        for round in 0..bench.settings.rounds {
            for index in order(contenders.len(), round) {
                let contender = &mut contenders[index];
                if contender.failed {
                    continue;
                }
                stop::check()?;
                match measure(bench, &tool, point, count, &disk, contender, round) {
                    Ok(values) => bench.record(CASE, point.name(), &contender.row, round, values),
                    Err(error) => {
                        let error = error.context(point.name());
                        bench.failed(CASE, &contender.row, error)?;
                        contender.failed = true;
                    }
                }
            }
        }
    }
    Ok(())
}

fn contenders(bench: &Bench) -> Vec<Contender> {
    let mut list = Vec::new();
    for program in bench.programs.clone() {
        let row = |row, aio| Contender { row, program: program.clone(), aio, failed: false };
        match program.kind {
            Kind::Blktapd => {
                list.push(row(subject(), Aio::IoUring));
                list.push(row(subject().again(), Aio::IoUring));
            }
            Kind::QemuStorageDaemon => list.extend(
                bench
                    .settings
                    .aio
                    .iter()
                    .map(|&aio| row(Row::new(program.kind, format!("aio={}", aio.name())), aio)),
            ),
            Kind::QemuNbd | Kind::Nbdkit => {}
        }
    }
    list
}

fn measure(
    bench: &mut Bench,
    tool: &Tool,
    point: Point,
    count: u64,
    disk: &Disk,
    contender: &Contender,
    round: u32,
) -> Result<Values> {
    if let Some(path) = disk.path()
        && path.exists()
    {
        std::fs::remove_file(path)?;
    }
    tool.create(disk, count * point.stride_bytes())?;
    let setup = Setup {
        program: &contender.program,
        aio: contender.aio,
        cores: vec![bench.cores().server],
        disks: vec![disk.clone()],
        frontend: Frontend::Nbd,
        attach: Vec::new(),
    };
    let server = servers::start(&setup)?;
    bench.started(CASE, &contender.row, &server);
    let job = Sweep {
        op: Op::Write,
        block_bytes: BLOCK_BYTES,
        stride_bytes: point.stride_bytes(),
        count,
        depth: DEPTH,
        seed: u64::from(round) + 1,
    };
    let pids = server.pids();
    let client = Client::open(&server.endpoints[0], job.op, BLOCK_BYTES)?;
    let before = proc::cpu(&pids)?;
    let elapsed = sweep::run(client, &job)
        .map_err(|error| error.context(format!("the server said: {}", server.last_words())))?;
    let after = proc::usage(&pids)?;
    drop(server);
    if contender.program.kind == Kind::Blktapd {
        tool.check(disk)?;
    }
    Ok(Values::from([
        (Metric::Iops, count as f64 / elapsed.as_secs_f64()),
        (Metric::CpuPerMillion, per_million(after.cpu.saturating_sub(before), count)),
        (Metric::PssKib, after.pss_kib as f64),
        (Metric::WallMs, elapsed.as_secs_f64() * 1e3),
    ]))
}
