//! `cold`: what a read costs in metadata when nothing is cached. A sparse disk of 1 TiB has one block of data in each stretch of
//! 2 GiB, so that each read needs parts of the tables that no other read needs. A server that was just started reads each
//! block once, with one request in flight; what it read of the file beyond the data is divided by the reads.
//!
//! The kernel counts bytes per process (also of direct I/O through io_uring), not requests. blktapd reads tables in slices of a
//! known size, so its bytes divided by that are the number of its metadata reads. A change of the slices must be
//! told to [`slice_bytes`]; the bytes themselves are in the table, too.

use anyhow::Result;

use super::{Bench, order};
use crate::files::{self, ImageDir};
use crate::load::sweep::{self, Sweep};
use crate::load::{Client, Op};
use crate::report::{Metric, Row, Values};
use crate::servers::{self, Aio, Disk, Format, Frontend, Kind, Program, Setup};
use crate::{proc, stop};

/// The case's name.
pub const CASE: &str = "cold";
const DISK_BYTES: u64 = 1 << 40;
/// More than the largest slice maps: 4 KiB of an L2 table are 512 clusters of 64 KiB, 4 KiB of a VHD's table 1024 blocks of 2 MiB.
const STRIDE_BYTES: u64 = 2 << 30;
const BLOCK_BYTES: u32 = 4096;
/// The writes and the reads must go to the same places.
const SEED: u64 = 7;

/// The point of a format.
pub fn point(format: Format) -> String {
    format!("{} of 1 TiB, 4k random read QD1", format.name())
}

/// What blktapd reads of a table at once.
fn slice_bytes(format: Format) -> f64 {
    match format {
        Format::Qcow2 => 4096.0,
        Format::Vhd => 512.0,
        Format::Vmdk => 4096.0,
    }
}

/// Our row.
pub fn subject() -> Row {
    Row::new(Kind::Blktapd, "")
}

fn sweep(op: Op) -> Sweep {
    Sweep {
        op,
        block_bytes: BLOCK_BYTES,
        stride_bytes: STRIDE_BYTES,
        count: DISK_BYTES / STRIDE_BYTES,
        depth: if op == Op::Read { 1 } else { 8 },
        seed: SEED,
    }
}

/// Runs the case.
pub fn run(bench: &mut Bench) -> Result<()> {
    let Some(tool) = bench.image_tool_for(CASE) else { return Ok(()) };
    let Some(blktapd) = bench.program(Kind::Blktapd) else { return Ok(()) };
    let images = ImageDir::new(&bench.settings.dir, 2 << 30)?;
    for format in [Format::Qcow2, Format::Vhd] {
        let disk = Disk::image(format, images.path(&format!("disk.{}", format.name())));
        tool.create(&disk, DISK_BYTES)?;
        let server = start(bench, &blktapd, Aio::IoUring, &disk)?;
        let client = Client::open(&server.endpoints[0], Op::Write, BLOCK_BYTES)?;
        sweep::run(client, &sweep(Op::Write))?;
        drop(server);

        let mut rows = vec![(subject(), blktapd.clone()), (subject().again(), blktapd.clone())];
        if let Some(program) = bench.program(Kind::QemuStorageDaemon) {
            rows.push((Row::new(program.kind, format!("{}, aio=io_uring", format.qemu_driver())), program));
        }
        for round in 0..bench.settings.rounds {
            for index in order(rows.len(), round) {
                stop::check()?;
                let (row, program) = &rows[index];
                match measure(bench, row, program, format, &disk) {
                    Ok(values) => bench.record(CASE, &point(format), row, round, values),
                    Err(error) => bench.failed(CASE, row, error.context(point(format)))?,
                }
            }
        }
    }
    Ok(())
}

fn start(bench: &Bench, program: &Program, aio: Aio, disk: &Disk) -> Result<servers::Running> {
    let cores = vec![bench.cores().server];
    servers::start(&Setup {
        program,
        aio,
        cores,
        disks: vec![disk.clone()],
        frontend: Frontend::Nbd,
        attach: Vec::new(),
    })
}

fn measure(bench: &mut Bench, row: &Row, program: &Program, format: Format, disk: &Disk) -> Result<Values> {
    if let Some(path) = disk.path() {
        files::flush(path)?;
    }
    let server = start(bench, program, Aio::IoUring, disk)?;
    bench.started(CASE, row, &server);
    let pids = server.pids();
    let job = sweep(Op::Read);
    let client = Client::open(&server.endpoints[0], job.op, BLOCK_BYTES)?;
    let before = proc::read_bytes(&pids)?;
    let elapsed = sweep::run(client, &job)?;
    let read = proc::read_bytes(&pids)?.saturating_sub(before);
    let data = job.count * u64::from(BLOCK_BYTES);
    anyhow::ensure!(read >= data, "the server read {read} bytes of its file for {data} bytes of data");
    let metadata_bytes = (read - data) as f64 / job.count as f64;
    let mut values = Values::from([
        (Metric::Iops, job.count as f64 / elapsed.as_secs_f64()),
        (Metric::MetadataBytes, metadata_bytes),
    ]);
    if program.kind == Kind::Blktapd {
        values.insert(Metric::MetadataReads, metadata_bytes / slice_bytes(format));
    }
    Ok(values)
}
