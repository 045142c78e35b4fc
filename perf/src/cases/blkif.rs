//! `blkif`: a disk through a ring in shared memory, as guests reach it: blktapd's blkif beside the vhost-user-blk of qemu-storage-daemon, and
//! fio on the file. Two parts, `blkif-memory` (null disks, and memory that holds what was verified) and `blkif-raw`.

use anyhow::Result;

use super::Bench;
use super::single::{self, Contender, Lifetime, Plan, Point, Subject};
use crate::files::ImageDir;
use crate::load::{Op, Pattern};
use crate::report::Row;
use crate::servers::{Aio, Disk, Frontend, Kind};

/// The name on the command line.
pub const CASE: &str = "blkif";
/// The part in memory.
pub const MEMORY: &str = "blkif-memory";
/// The part on a file.
pub const RAW: &str = "blkif-raw";
/// The server's name of the row that is the limit.
pub use super::raw::LIMIT;

/// 128 in flight, more than the smallest ring holds.
pub const READ_4K_QD128: Point = Point::new(4, Pattern::Random, Op::Read, 128);
/// The same for writes.
pub const WRITE_4K_QD128: Point = Point::new(4, Pattern::Random, Op::Write, 128);
/// Requests of 256 segments, for which blkif needs indirect ones.
pub const READ_1M_QD8: Point = Point::new(1024, Pattern::Sequential, Op::Read, 8);
/// The same for writes.
pub const WRITE_1M_QD8: Point = Point::new(1024, Pattern::Sequential, Op::Write, 8);

/// All points.
pub const POINTS: [Point; 8] = [
    single::READ_4K_QD1,
    single::WRITE_4K_QD1,
    single::READ_4K_QD32,
    single::WRITE_4K_QD32,
    READ_4K_QD128,
    WRITE_4K_QD128,
    READ_1M_QD8,
    WRITE_1M_QD8,
];

/// Our row without data.
pub fn null() -> Row {
    Row::new(Kind::Blktapd, "null")
}

/// Our row in memory.
pub fn ram() -> Row {
    Row::new(Kind::Blktapd, "ram")
}

/// Our row on the file.
pub fn raw() -> Row {
    Row::new(Kind::Blktapd, "raw")
}

/// The variant of a peer's row without data.
pub const PEER_NULL: &str = "null-co";
/// How variants of a peer's rows in memory begin.
pub const PEER_MEMORY: &str = "file on tmpfs";

/// Runs both parts.
pub fn run(bench: &mut Bench) -> Result<()> {
    memory(bench)?;
    file(bench)
}

fn memory(bench: &mut Bench) -> Result<()> {
    let size_bytes = bench.settings.ram_bytes;
    let mut contenders = Vec::new();
    for program in bench.programs.clone() {
        let mut add = |row: Row, aio: Aio, disk: Disk| {
            contenders
                .push(Contender { row, subject: Subject::Server { program: program.clone(), aio, disk } });
        };
        match program.kind {
            Kind::Blktapd => {
                add(null(), Aio::IoUring, Disk::Null(size_bytes));
                add(ram(), Aio::IoUring, Disk::Ram(size_bytes));
            }
            Kind::QemuStorageDaemon => {
                add(Row::new(program.kind, PEER_NULL), Aio::IoUring, Disk::Null(size_bytes));
                // Without direct I/O, which Linux AIO would need, there are a pool of threads and io_uring.
                for aio in [Aio::Threads, Aio::IoUring] {
                    let row = Row::new(program.kind, format!("{PEER_MEMORY}, aio={}", aio.name()));
                    add(row, aio, Disk::Ram(size_bytes));
                }
            }
            Kind::QemuNbd | Kind::Nbdkit => {}
        }
    }
    let plan = Plan {
        case: MEMORY,
        size_bytes,
        lifetime: Lifetime::Case,
        frontend: Frontend::Ring,
        points: &POINTS,
        warm: false,
    };
    single::run(bench, plan, single::with_control(contenders))
}

fn file(bench: &mut Bench) -> Result<()> {
    let size_bytes = bench.settings.file_bytes;
    let images = ImageDir::new(&bench.settings.dir, size_bytes)?;
    eprintln!("{RAW}: writing a file of {} MiB", size_bytes >> 20);
    let path = images.file("disk.img", size_bytes)?;
    let mut contenders = Vec::new();
    for program in bench.programs.clone() {
        let mut add = |row: Row, aio: Aio| {
            let disk = Disk::File(path.clone());
            contenders
                .push(Contender { row, subject: Subject::Server { program: program.clone(), aio, disk } });
        };
        match program.kind {
            Kind::Blktapd => add(raw(), Aio::IoUring),
            Kind::QemuStorageDaemon => {
                for &aio in &bench.settings.aio {
                    add(Row::new(program.kind, format!("direct, aio={}", aio.name())), aio);
                }
            }
            Kind::QemuNbd | Kind::Nbdkit => {}
        }
    }
    let mut contenders = single::with_control(contenders);
    contenders.push(Contender { row: Row::new(LIMIT, "io_uring, direct"), subject: Subject::File(path) });
    let plan = Plan {
        case: RAW,
        size_bytes,
        lifetime: Lifetime::Measurement,
        frontend: Frontend::Ring,
        points: &POINTS,
        warm: false,
    };
    single::run(bench, plan, contenders)
}
